"""What a platform that does not keep to max_in_flight can do to a worker: its commands act, and nothing grows."""

from __future__ import annotations

import datetime as dt
import json
import threading
from typing import Any, Callable, List

import pytest

from sekuire import TaskContext, Worker
from sekuire.worker.dispatch import WAITING_COST

from ..support.scripted import Request, Scripted
from ..support.waiting import GUARD, until

Make = Callable[..., Worker]


def flood(scripted: Scripted, count: int, capability: str = "echo", size: int = 0) -> None:
    """Send many tasks in a few pieces."""
    parts: List[bytes] = []
    for number in range(count):
        task = {"task_id": f"t{number}", "capability": capability, "input": "x" * size}
        parts.append(b"event: task\ndata: " + json.dumps(task).encode() + b"\n\n")
    for start in range(0, count, 500):
        scripted.raw(b"".join(parts[start : start + 500]))


class Held:
    """A handler that runs until its context is cancelled or the test lets it go."""

    def __init__(self) -> None:
        self.begun, self.go = threading.Event(), threading.Event()
        self.reasons: List[Any] = []

    def __call__(self, ctx: TaskContext, input: Any) -> None:
        self.begun.set()
        until(lambda: self.go.is_set() or ctx.is_cancelled())
        self.reasons.append(ctx.cancel_reason)


def peak_of(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> List[int]:
    """What waits, in bytes, after each task that was let wait."""
    seen: List[int] = []
    enqueue = worker._dispatcher.records.enqueue

    def noted(*args: Any) -> None:
        enqueue(*args)
        seen.append(worker._dispatcher.waiting_bytes)

    monkeypatch.setattr(worker._dispatcher.records, "enqueue", noted)
    return seen


@pytest.mark.slow
def test_a_command_behind_ten_thousand_tasks(scripted: Scripted, worker_of: Make) -> None:
    """Tasks beyond max_in_flight wait here, so a terminate behind them acts while the first one runs."""
    worker = worker_of(scripted, max_workers=1, max_queued=1, heartbeat_interval=5.0)
    held = Held()
    worker.on_task("echo", held)
    worker.start()
    flood(scripted, 10_000)
    assert held.begun.wait(GUARD)
    scripted.command("terminate")
    until(lambda: worker.stop_reason)
    until(lambda: held.reasons)
    assert held.reasons == ["terminated"]
    assert worker.stats().received == 10_000
    assert scripted.count("release") == 0
    until(lambda: worker.stats().rejected == 9_999)
    assert worker.stats().waiting == worker._dispatcher.waiting_bytes == 0


def test_what_does_not_fit_is_released(scripted: Scripted, worker_of: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond max_waiting_bytes the newest tasks go back to the platform, and the stream is read on."""
    limit = 100 * (WAITING_COST + 1000)
    worker = worker_of(scripted, max_workers=1, max_queued=1, max_waiting_bytes=limit, heartbeat_interval=5.0)
    held = Held()
    worker.on_task("echo", held)
    peak = peak_of(worker, monkeypatch)
    with worker:
        flood(scripted, 2_000, size=900)
        scripted.command("pause")
        until(lambda: worker.stats().released + worker.stats().rejected == 1_999)
        assert max(peak) <= limit
        kept = worker.stats().rejected
        assert 80 <= kept <= 110
        assert worker.is_paused()
        assert worker.stats().received == 2_000
        # The oldest were kept.
        for number in range(1, kept + 1):
            assert scripted.completion(f"t{number}")["error"]["code"] == "worker_paused"
        scripted.wait_for("release", 1_999 - kept)
        held.go.set()
        assert scripted.completion("t0")["status"] == "completed"


@pytest.mark.parametrize("status", [404, 405, 501, 403])
def test_a_platform_that_takes_no_task_back_is_not_read_on(
    scripted: Scripted, worker_of: Make, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    """Without releases the stream waits for room, however long: it does not count as silent, and no task is lost."""
    scripted.on["release"] = lambda request: (status, {"error": "x", "message": "x"})
    limit = 10 * (WAITING_COST + 1000)
    worker = worker_of(
        scripted, max_workers=1, max_queued=1, max_waiting_bytes=limit, stream_idle_timeout=0.2, heartbeat_interval=0.1
    )
    held = Held()
    worker.on_task("echo", held)
    peak = peak_of(worker, monkeypatch)
    with worker:
        flood(scripted, 100, size=900)
        until(lambda: worker.stats().waiting >= 10)
        beats = scripted.count("heartbeat")
        # Much longer than the stream may be silent.
        scripted.wait_for("heartbeat", beats + 10)
        assert worker.stats().received == worker.stats().waiting + 2
        assert worker.stats().released == worker.stats().reconnects == 0
        held.go.set()
        until(lambda: worker.stats().completed == 100)
        assert max(peak) <= limit
        assert worker.stats().released == worker.stats().rejected == 0
        if status in (405, 501):
            assert scripted.count("release") == 1


def test_a_task_whose_release_has_no_answer_runs_when_there_is_room(scripted: Scripted, worker_of: Make) -> None:
    """While it is not known whether the platform takes tasks back, the task stays; it is not given back after all."""
    scripted.on["release"] = lambda request: (503, {"error": "x", "message": "x"})
    worker = worker_of(scripted, max_workers=1, max_queued=0, max_waiting_bytes=1)
    held = Held()
    worker.on_task("echo", held)
    with worker:
        scripted.task("t0")
        scripted.task("t1")
        scripted.wait_for("release", 2)
        held.go.set()
        assert scripted.completion("t1")["status"] == "completed"
        assert worker.stats().released == 0


def test_a_release_that_the_platform_takes_while_the_stream_waits(scripted: Scripted, worker_of: Make) -> None:
    """The first task that does not fit is not run here once the platform has taken it back."""
    asked, answer = threading.Event(), threading.Event()

    def release(request: Request) -> Any:
        asked.set()
        assert answer.wait(GUARD)
        return 200, {}

    scripted.on["release"] = release
    worker = worker_of(scripted, max_workers=1, max_queued=0, max_waiting_bytes=1)
    held = Held()
    worker.on_task("echo", held)
    with worker:
        scripted.task("t0")
        scripted.task("t1")
        assert asked.wait(GUARD)
        # There is room now, but another worker may have it already.
        held.go.set()
        scripted.completion("t0")
        answer.set()
        until(lambda: worker.stats().released == 1 and worker._dispatcher.records.permits == 1)
        scripted.task("t2")
        assert scripted.completion("t2")["status"] == "completed"
    assert scripted.completions("t1") == []


@pytest.mark.parametrize("kind", ["paused", "unknown", "malformed"])
def test_answers_without_a_run_are_bounded_too(
    scripted: Scripted, worker_of: Make, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """A flood of tasks that are only answered, on a platform that takes no answers, fills no memory; none is lost.

    The answers wait as tasks do. A command behind them acts.
    """
    monkeypatch.setattr("sekuire.worker.results.BACKLOG", 5)
    monkeypatch.setattr("sekuire.worker.report.RETRY_MAX", 0.05)
    monkeypatch.setattr("sekuire.worker.release.RETRY_MAX", 0.05)
    accept = threading.Event()
    scripted.on["complete"] = lambda request: (200, {}) if accept.is_set() else (503, {"error": "x"})
    scripted.on["release"] = lambda request: (405, {"error": "x"})
    worker = worker_of(scripted, heartbeat_interval=0.05, max_waiting_bytes=20 * (WAITING_COST + 100))
    worker.on_task("echo", lambda ctx, input: input)
    codes = {"paused": "worker_paused", "unknown": "unknown_capability", "malformed": "invalid_task"}
    with worker:
        commands: List[str] = []
        worker.on_command(lambda command: commands.append(command.type))
        if kind == "paused":
            worker.pause()

        def send(number: int) -> None:
            task = {"task_id": f"t{number}", "capability": "echo" if kind == "paused" else "other"}
            scripted.send("task", {**task, "timeout_ms": "soon"} if kind == "malformed" else task)

        for number in range(20):
            send(number)
        scripted.command("resume")
        until(lambda: worker.stats().received == 20)
        until(lambda: commands)
        assert worker.stats().undelivered <= 6
        for number in range(20, 60):
            send(number)
        until(lambda: worker.stats().waiting >= 15)
        beats = scripted.count("heartbeat")
        scripted.wait_for("heartbeat", beats + 4)
        assert worker.stats().undelivered <= 6
        assert worker._dispatcher.waiting_bytes <= 20 * (WAITING_COST + 100)
        assert worker.stats().received < 60
        accept.set()
        for number in range(60):
            until(lambda: any(r.json["status"] == "failed" for r in scripted.completions(f"t{number}")))  # noqa: B023
            assert scripted.completion(f"t{number}")["error"]["code"] == codes[kind]
        until(lambda: worker.stats().undelivered == 0)


def test_releases_that_the_platform_does_not_answer_are_bounded(
    scripted: Scripted, worker_of: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A platform that takes neither results nor tasks back is not read on: what is on its way back is bounded."""
    monkeypatch.setattr("sekuire.worker.release.RELEASES", 5)
    monkeypatch.setattr("sekuire.worker.dispatch.RELEASE_PAUSE", 0.01)
    monkeypatch.setattr("sekuire.worker.report.RETRY_MAX", 0.05)
    monkeypatch.setattr("sekuire.worker.release.RETRY_MAX", 0.05)
    accept = threading.Event()
    accept.set()
    scripted.on["release"] = lambda request: (200, {}) if accept.is_set() else (503, {"error": "x"})
    worker = worker_of(scripted, max_workers=1, max_queued=0, max_waiting_bytes=1, heartbeat_interval=0.05)
    held = Held()
    worker.on_task("echo", held)
    with worker:
        scripted.task("t0")
        scripted.task("first")
        until(lambda: worker.stats().released == 1)
        accept.clear()
        flood(scripted, 50)
        # t0 came again; five are on their way; one is in the stream's hands.
        until(lambda: worker.stats().received == 9)
        beats = scripted.count("heartbeat")
        scripted.wait_for("heartbeat", beats + 4)
        assert worker.stats().received == 9
        accept.set()
        until(lambda: worker.stats().released == 50)
        held.go.set()


def test_tasks_that_come_without_the_lease_wait(
    scripted: Scripted, worker_of: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """None begins before the lease is back; a command behind them acts."""
    monkeypatch.setattr("sekuire.session.heartbeat.MIN_GRACE", 0.0)
    ok = threading.Event()
    ok.set()

    def beat(request: Any) -> Any:
        if not ok.is_set():
            return 503, {"error": "x"}
        end = dt.datetime.now(dt.timezone.utc) + dt.timedelta(seconds=1.5)
        return 200, {"lease_expires_at": end.isoformat()}

    scripted.on["heartbeat"] = beat
    begun_without: List[str] = []
    worker = worker_of(scripted, heartbeat_interval=0.05, max_workers=2)

    def run(ctx: TaskContext, input: Any) -> str:
        if not ok.is_set():
            begun_without.append(ctx.task_id)
        return "done"

    worker.on_task("echo", run)
    commands: List[str] = []
    worker.on_command(lambda command: commands.append(command.type))
    with worker:
        until(lambda: worker.stats().lease_expires_at)
        ok.clear()
        # What waits at this moment is given back; what comes later waits.
        until(lambda: "the lease has ended" in caplog.text)
        flood(scripted, 100)
        scripted.command("resume")
        until(lambda: commands)
        assert (worker.stats().received, worker.stats().waiting, worker.stats().running) == (100, 100, 0)
        ok.set()
        until(lambda: worker.stats().completed == 100)
    assert begun_without == []


@pytest.mark.parametrize("how", ["pause", "stop"])
def test_all_that_waits_is_answered_or_given_back(scripted: Scripted, worker_of: Make, how: str) -> None:
    """A pause answers every waiting task; a stop gives every one back."""
    worker = worker_of(scripted, max_workers=1, max_queued=1)
    held = Held()
    worker.on_task("echo", held)
    worker.start()
    flood(scripted, 300)
    until(lambda: worker.stats().waiting == 299)
    if how == "pause":
        scripted.command("pause")
        until(lambda: worker.stats().rejected == 299)
        until(lambda: worker.stats().undelivered == 0)
        codes = {request.json["error"]["code"] for request in scripted.of("complete")}
        assert codes == {"worker_paused"}
    stopper = threading.Thread(target=worker.stop)
    stopper.start()
    until(lambda: worker.stats().released == (0 if how == "pause" else 299) and worker.stop_reason)
    held.go.set()
    stopper.join(GUARD)
    released = {request.task_id for request in scripted.of("release")}
    assert released == (set() if how == "pause" else {f"t{number}" for number in range(1, 300)})


@pytest.mark.parametrize("order", ["paused", "terminated", "revoked"])
def test_an_order_reaches_a_worker_that_does_not_read(scripted: Scripted, worker_of: Make, order: str) -> None:
    """With the stream full and not read, pause, terminate and revocation act through the heartbeat, within two."""
    answer: Any = {}
    sent = []

    def beat(request: Any) -> Any:
        said = dict(answer)
        if said and not (worker.is_paused() or worker.stop_reason):
            sent.append(request)
        return 200, said

    scripted.on["heartbeat"] = beat
    scripted.on["release"] = lambda request: (405, {"error": "x"})
    held = Held()
    worker = worker_of(scripted, max_workers=1, max_queued=1, heartbeat_interval=0.2, max_waiting_bytes=1500)
    worker.on_task("echo", held)
    worker.start()
    for number in range(10):
        scripted.task(f"t{number}")
    until(lambda: worker.stats().received == 3)
    assert held.begun.wait(GUARD)
    scripted.wait_for("release")
    # Sent on the stream it would wait behind the tasks; it comes by the heartbeat.
    scripted.command({"paused": "pause"}.get(order, "terminate"))
    answer.update({"revoked": True, "reason": "bad"} if order == "revoked" else {"desired_state": order})
    until(lambda: worker.is_paused() if order == "paused" else worker.stop_reason)
    assert 1 <= len(sent) <= 2
    if order == "paused":
        held.go.set()
    worker.stop()
    assert held.reasons == [None if order == "paused" else "terminated"]
    code = "worker_paused" if order == "paused" else "worker_terminated"
    assert scripted.completion("t1")["error"]["code"] == code
