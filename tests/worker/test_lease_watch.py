"""The watch over the lease by itself, with a clock that the test turns."""

from __future__ import annotations

import math
from typing import Any, Callable, List, Tuple

import pytest

from sekuire.worker.lease_watch import LeaseWatch


class Around:
    """The timer, the heartbeat with its lease, the dispatcher and the announcer around a LeaseWatch."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        #: The end of the lease, its grace included.
        self.limit = math.inf
        #: When the newest heartbeat ended.
        self.beat_at = 0.0
        self.waiting = 0
        self.noted: List[str] = []
        self.calls: List[Tuple[float, int, Callable[[], None]]] = []
        monkeypatch.setattr("sekuire.worker.lease_watch.time.monotonic", lambda: self.now)
        me: Any = self
        self.watch = LeaseWatch(me, me, me, me)

    # -- the timer --

    def call_at(self, when: float, function: Callable[[], None]) -> int:
        number = len(self.calls) + 1
        self.calls.append((when, number, function))
        return number

    def retry(self) -> None:
        """The thread runs."""

    def cancel(self, number: int) -> None:
        self.calls = [one if one[1] != number else (math.inf, number, one[2]) for one in self.calls]

    def turn(self, until: float) -> None:
        """Let time pass, and make the calls that become due."""
        while True:
            due = min((one for one in self.calls if one[0] <= until), default=None)
            if due is None:
                break
            self.cancel(due[1])
            self.now = max(self.now, due[0])
            due[2]()
        self.now = until

    # -- the heartbeat and its lease --

    @property
    def lease(self) -> Any:
        return self

    def time_left(self) -> float:
        return self.limit - self.now

    def beat_limit(self) -> float:
        return 5.0

    def nudge(self) -> None:
        self.noted.append("nudge")

    def has_tried_since(self, moment: float) -> bool:
        return self.beat_at >= moment

    def renew(self, limit: float) -> None:
        self.limit = limit
        self.watch.renew()

    def beat(self) -> None:
        self.beat_at = self.now
        self.watch.note_beat()

    # -- the dispatcher and the announcer --

    def start_waiting(self) -> None:
        self.noted.append("start")

    def lose_lease(self) -> None:
        self.noted.append("lose")

    def note_state(self, state: str, reason: Any, severity: str) -> None:
        self.noted.append(f"{severity}: {state}")


LOST = ["nudge", "lose", "error: lease lost"]


@pytest.fixture
def around(monkeypatch: pytest.MonkeyPatch) -> Around:
    return Around(monkeypatch)


def test_no_lease_is_no_limit(around: Around) -> None:
    """Until the platform has sent a lease nothing is watched."""
    around.renew(math.inf)
    assert around.calls == []


def test_one_more_heartbeat_comes_first(around: Around) -> None:
    """At the lease's end the platform is asked; the lease is lost if that heartbeat brings nothing, and only once."""
    around.renew(110.0)
    around.turn(109.9)
    assert around.noted == []
    around.turn(110.5)
    assert around.noted == ["nudge"]
    around.beat()
    around.turn(111.0)
    assert around.noted == LOST
    for now in (112.0, 130.0):
        around.watch.renew()
        around.turn(now)
        around.beat()
    assert around.noted == LOST


def test_a_heartbeat_that_renews_it(around: Around) -> None:
    """A lease that the platform extends when it is asked was never lost."""
    around.renew(110.0)
    around.turn(110.5)
    around.renew(200.0)
    around.beat()
    around.turn(199.0)
    assert around.noted == ["nudge"]


def test_a_heartbeat_that_does_not_end(around: Around) -> None:
    """One that hangs is waited for as long as two may take."""
    around.renew(110.0)
    around.turn(119.9)
    assert around.noted == ["nudge"]
    around.turn(121.0)
    assert around.noted == LOST


def test_each_lease_can_be_lost(around: Around) -> None:
    """After a lost lease a new one is watched like the first."""
    for limit in (110.0, 140.0):
        around.renew(limit)
        around.turn(limit + 0.5)
        around.beat()
        around.turn(limit + 1.0)
    assert around.noted == LOST * 2


def test_waiting_tasks_start_on_the_timer(around: Around) -> None:
    """Who brings the lease does not start them itself."""
    around.waiting = 3
    around.renew(200.0)
    assert around.noted == []
    around.turn(100.0)
    assert around.noted == ["start"]
