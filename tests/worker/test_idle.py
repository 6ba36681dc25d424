"""A worker that ends by itself when it has nothing to do."""

from __future__ import annotations

import threading
from typing import Any, Callable, List, Tuple

import pytest

from sekuire import TaskContext, Worker
from sekuire.errors import ConfigurationError, TransportError
from sekuire.idle import Activity, IdleWatch
from sekuire.local import LocalPlatform

from ..conftest import AGENT
from ..scripted import GUARD, Blackhole, Scripted, until

Make = Callable[..., Worker]


def test_a_drain_ends_when_the_work_is_done(platform: LocalPlatform, worker_of: Make) -> None:
    """start(block=True) works off what is queued, longer tasks than the idle time included, and returns."""
    worker = worker_of(platform, stop_when_idle=0.2, max_workers=2)
    release = threading.Event()

    @worker.on_task("slow")
    def slow(ctx: TaskContext, input: Any) -> Any:
        assert release.wait(GUARD)
        return input

    tasks = [platform.submit("slow", number, agent_id=AGENT) for number in range(5)]
    # Longer than the idle time: a running task is work, however quiet it is.
    timer = threading.Timer(0.6, release.set)
    timer.start()
    worker.start(block=True)
    timer.join()
    assert [platform.task(task)["output"] for task in tasks] == [0, 1, 2, 3, 4]
    assert worker.stop_reason == "idle for 0.2 s"
    assert worker.stats().undelivered == 0
    (installation,) = platform.installations()
    assert platform.heartbeats(installation["installation_id"])[-1]["status"] == "stopped"


def test_results_that_wait_are_work(scripted: Scripted, worker_of: Make) -> None:
    """Without an outbox, a worker whose results are not taken yet does not end."""
    taken = threading.Event()
    scripted.on["complete"] = lambda request: (200, {}) if taken.is_set() else (503, {"error": "unavailable"})
    worker = worker_of(scripted, stop_when_idle=0.1)
    worker.on_task("echo", lambda ctx, input: input)
    worker.start()
    scripted.task("t-1", "echo", {})
    until(lambda: scripted.count("complete") >= 3)
    assert worker.is_running()
    assert worker.stats().undelivered == 1
    taken.set()
    assert worker.wait(GUARD)
    assert worker.stats().undelivered == 0


def test_a_platform_that_is_not_there(worker_of: Make, blackhole: Blackhole) -> None:
    """It ends too, but with an error: nobody must take this for work that is done."""
    worker = worker_of(blackhole.url, stop_when_idle=0.2, start_timeout=0.0, shutdown_timeout=0.5)
    worker.on_task("echo", lambda ctx, input: input)
    with pytest.raises(TransportError, match=r"there was no task stream within stop_when_idle \(0.2 s\)"):
        worker.start(block=True)


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), "5", True])
def test_wrong_values(value: Any, worker_of: Make) -> None:
    """They are refused when the worker is made."""
    with pytest.raises(ConfigurationError, match="stop_when_idle"):
        worker_of("http://127.0.0.1:9", install_token="skt-1", stop_when_idle=value)


def test_a_task_between_two_looks_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that came and went unseen begins the time anew; a busy worker is never idle."""
    now = 100.0
    calls: List[Tuple[float, Callable[[], None]]] = []
    monkeypatch.setattr("sekuire.idle.time.monotonic", lambda: now)

    class Hand:
        """A timer that a test turns."""

        def call_at(self, when: float, function: Callable[[], None]) -> int:
            calls.append((when, function))
            return len(calls)

    activity = Activity(0, False)
    ends: List[float] = []
    IdleWatch(8.0, Hand(), lambda: activity, lambda: ends.append(now)).start()  # type: ignore[arg-type]

    def turn(until: float) -> None:
        nonlocal now
        while calls and calls[0][0] <= until:
            now, function = calls.pop(0)
            function()
        now = until

    turn(107.5)
    activity = Activity(1, False)
    turn(115.5)
    assert ends == []
    activity = Activity(1, True)
    turn(200.0)
    activity = Activity(1, False)
    turn(207.0)
    assert ends == []
    turn(300.0)
    # The last look that saw it busy was at 200.
    assert ends == [208.0]
