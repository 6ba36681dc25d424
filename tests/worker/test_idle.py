"""A worker that ends by itself when it has nothing to do."""

from __future__ import annotations

import datetime as dt
import threading
from pathlib import Path
from typing import Any, Callable, List, Tuple

import pytest

from sekuire import TaskContext, Worker
from sekuire.errors import ConfigurationError, SekuireError, TransportError
from sekuire.local import LocalPlatform
from sekuire.worker.announcer import Announcer
from sekuire.worker.control import Control
from sekuire.worker.idle import Activity, IdleWatch
from sekuire.worker.life import Life

from ..conftest import AGENT
from ..support.scripted import Blackhole, Scripted
from ..support.waiting import GUARD, until

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


def failed(worker: Worker) -> Tuple[threading.Thread, List[SekuireError]]:
    """Run a worker to its end beside the test; the thread, and the error with which it ends."""
    errors: List[SekuireError] = []

    def run() -> None:
        try:
            worker.start(block=True)
        except SekuireError as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, errors


def test_a_stream_that_is_lost(scripted: Scripted, worker_of: Make) -> None:
    """An outage that lasts is no end of the work: the worker ends with an error, after its running handler."""
    worker = worker_of(scripted, stop_when_idle=0.2)
    begun, go = threading.Event(), threading.Event()

    @worker.on_task("work")
    def work(ctx: TaskContext, input: Any) -> str:
        begun.set()
        assert go.wait(GUARD)
        return "done"

    thread, errors = failed(worker)
    scripted.task("t1", "work")
    assert begun.wait(GUARD)
    scripted.on["stream"] = lambda request: (503, {"error": "unavailable"})
    scripted.cut()
    streams = scripted.count("stream")
    scripted.wait_for("stream", streams + 3)
    until(lambda: not worker.is_connected())
    assert worker.stop_reason is None
    go.set()
    thread.join(GUARD)
    (error,) = errors
    assert isinstance(error, TransportError)
    assert str(error) == "the task stream was lost and not open again within stop_when_idle (0.2 s)"
    assert scripted.completion("t1")["status"] == "completed"


def test_a_lease_that_is_lost_with_a_task_in_hand(
    scripted: Scripted, worker_of: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task that cannot begin without the lease is not 'nothing left': it goes back, and the exit code is 1."""
    monkeypatch.setattr("sekuire.session.heartbeat.MIN_GRACE", 0.0)
    held = threading.Event()
    held.set()

    def beat(request: Any) -> Any:
        if not held.is_set():
            return 503, {"error": "unavailable"}
        end = dt.datetime.now(dt.timezone.utc) + dt.timedelta(seconds=0.5)
        return 200, {"lease_expires_at": end.isoformat()}

    scripted.on["heartbeat"] = beat
    worker = worker_of(scripted, stop_when_idle=0.2, heartbeat_interval=0.1, max_workers=1)

    @worker.on_task("work")
    def work(ctx: TaskContext, input: Any) -> None:
        # Until the lease is lost: a running handler keeps the worker from ending before.
        assert ctx.wait_cancelled(GUARD)
        scripted.task("t2", "work")
        until(lambda: worker.stats().received == 2)

    thread, errors = failed(worker)
    scripted.task("t1", "work")
    until(lambda: worker.stats().running)
    until(lambda: worker.stats().lease_expires_at)
    held.clear()
    thread.join(GUARD)
    (error,) = errors
    assert isinstance(error, TransportError)
    assert str(error) == "the lease was lost and not renewed within stop_when_idle (0.2 s)"
    assert [request.task_id for request in scripted.of("release")] == ["t2"]


def test_a_task_that_waits_for_room_is_work(
    scripted: Scripted, worker_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task whose turn has not come, because results must be taken first, keeps the worker; then it is done."""
    monkeypatch.setattr("sekuire.worker.results.BACKLOG", 1)
    monkeypatch.setattr("sekuire.worker.report.RETRY_MAX", 0.05)
    monkeypatch.setattr("sekuire.worker.release.RETRY_MAX", 0.05)
    taken = threading.Event()
    scripted.on["complete"] = lambda request: (200, {}) if taken.is_set() else (503, {"error": "unavailable"})
    worker = worker_of(scripted, stop_when_idle=0.1, outbox=tmp_path / "outbox.db", max_workers=1, max_queued=0)
    looks: List[Activity] = []
    look = Control.activity

    def noted(control: Control) -> Activity:
        looks.append(look(control))
        return looks[-1]

    monkeypatch.setattr(Control, "activity", noted)

    @worker.on_task("work")
    def work(ctx: TaskContext, input: Any) -> None:
        if ctx.task_id == "t1":
            # In hand before this one's result leaves no room, so that no look comes in between.
            scripted.task("t2", "work")
            until(lambda: worker.stats().received == 2)

    worker.start()
    scripted.task("t1", "work")
    until(lambda: worker.stats().undelivered and not worker.stats().running)
    count = len(looks)
    until(lambda: len(looks) >= count + 12 or worker.stop_reason)
    assert worker.stop_reason is None
    taken.set()
    assert worker.wait(GUARD)
    assert worker.stop_reason == "idle for 0.1 s"
    assert scripted.completion("t2")["status"] == "completed"


class Hand:
    """A timer and a clock that a test turns."""

    def __init__(self) -> None:
        self.now = 100.0
        self.calls: List[Tuple[float, Callable[[], None]]] = []

    def call_at(self, when: float, function: Callable[[], None]) -> int:
        self.calls.append((when, function))
        return len(self.calls)

    def turn(self, until: float) -> None:
        while self.calls and self.calls[0][0] <= until:
            self.now, function = self.calls.pop(0)
            function()
        self.now = until


class Watched:
    """An IdleWatch of 8 seconds, its hand, and when it stopped how."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.hand = Hand()
        self.turn = self.hand.turn
        self.now = Activity(0, False, False, True)
        self.ends: List[Tuple[str, float]] = []
        monkeypatch.setattr("sekuire.worker.idle.time.monotonic", lambda: self.hand.now)
        self.life = Life(1.0, Announcer())
        self.life.start()
        self.life.attach(self)
        IdleWatch(8.0, self.hand, self.life, self).start()  # type: ignore[arg-type]

    def activity(self) -> Activity:
        return self.now

    def begin(self) -> None:
        self.ends.append(("idle" if self.life.error is None else "away", self.hand.now))

    def hurry(self) -> None:
        raise AssertionError("it stops once")

    def close_unstarted(self) -> None:
        raise AssertionError("it was started")


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(monkeypatch)


def test_a_task_between_two_looks_counts(watched: Watched) -> None:
    """One that came and went unseen begins the time anew; a busy worker is never idle."""
    watched.turn(107.5)
    watched.now = Activity(1, False, False, True)
    watched.turn(115.5)
    assert watched.ends == []
    watched.now = Activity(1, True, False, True)
    watched.turn(200.0)
    watched.now = Activity(1, False, True, True)
    watched.turn(300.0)
    watched.now = Activity(1, False, False, True)
    watched.turn(307.0)
    assert watched.ends == []
    watched.turn(400.0)
    # The last look that saw it busy was at 300.
    assert watched.ends == [("idle", 308.0)]


def test_time_without_the_platform_is_not_idle(watched: Watched) -> None:
    """It counts for nothing while it passes, and the stream must be open for a while after it."""
    fed, away = Activity(0, False, False, True), Activity(0, False, False, False)
    watched.turn(107.0)
    watched.now = away
    watched.turn(114.0)
    watched.now = fed
    # Six looks were counted before, the one that sees it back counts for nothing.
    watched.turn(116.0)
    assert watched.ends == []
    watched.turn(200.0)
    assert watched.ends == [("idle", 117.0)]


def test_a_platform_that_comes_and_goes_keeps_nobody_for_ever(watched: Watched) -> None:
    """A stream that never lasts for the whole time, but is open for most of it, ends the worker all the same."""
    for start in range(100, 200, 5):
        watched.now = Activity(0, False, False, True)
        watched.turn(start + 4.0)
        watched.now = Activity(0, False, False, False)
        watched.turn(start + 5.0)
    assert [what for what, _ in watched.ends] == ["idle"]


def test_a_platform_that_stays_away(watched: Watched) -> None:
    """It is waited for as long as there is work, and as long as the idle time after it; what waits for it is none."""
    watched.now = Activity(1, True, False, False)
    watched.turn(200.0)
    watched.now = Activity(1, False, True, False)
    watched.turn(207.0)
    assert watched.ends == []
    watched.turn(300.0)
    assert watched.ends == [("away", 208.0)]
