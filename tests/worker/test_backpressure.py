"""What a platform that does not keep to max_in_flight can do to a worker: nothing but wait."""

from __future__ import annotations

import threading
from typing import Any, Callable

import pytest

from sekuire import TaskContext, Worker

from ..scripted import GUARD, Scripted, until

Make = Callable[..., Worker]


@pytest.mark.parametrize("kind", ["paused", "unknown", "malformed"])
def test_answers_without_a_run_are_bounded_too(
    scripted: Scripted, worker_of: Make, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """A flood of tasks that are only answered, on a platform that takes no answers, fills no memory; none is lost."""
    monkeypatch.setattr("sekuire.report.BACKLOG", 5)
    accept = threading.Event()
    scripted.on["complete"] = lambda request: (200, {}) if accept.is_set() else (503, {})
    worker = worker_of(scripted, heartbeat_interval=0.05)
    worker.on_task("echo", lambda ctx, input: input)
    codes = {"paused": "worker_paused", "unknown": "unknown_capability", "malformed": "invalid_task"}
    with worker:
        if kind == "paused":
            worker.pause()
        for number in range(50):
            task = {"task_id": f"t{number}", "capability": "echo" if kind == "paused" else "other"}
            scripted.send("task", {**task, "timeout_ms": "soon"} if kind == "malformed" else task)
        until(lambda: worker.stats().undelivered == 5)
        beats = scripted.count("heartbeat")
        scripted.wait_for("heartbeat", beats + 4)
        assert worker.stats().undelivered <= 6
        assert worker.stats().received <= 7
        accept.set()
        for number in range(50):
            until(lambda: any(r.json["status"] == "failed" for r in scripted.completions(f"t{number}")))  # noqa: B023
            assert scripted.completion(f"t{number}")["error"]["code"] == codes[kind]
        until(lambda: worker.stats().undelivered == 0)


@pytest.mark.parametrize("order", ["paused", "terminated", "revoked"])
def test_an_order_reaches_a_worker_that_does_not_read(scripted: Scripted, worker_of: Make, order: str) -> None:
    """With the stream full and not read, pause, terminate and revocation act through the heartbeat, within two."""
    answer: Any = {}
    told = []

    def beat(request: Any) -> Any:
        said = dict(answer)
        if said and not (worker.is_paused() or worker.stop_reason):
            told.append(request)
        return 200, said

    scripted.on["heartbeat"] = beat
    begun, go = threading.Event(), threading.Event()
    reasons = []

    def hold(ctx: TaskContext, input: Any) -> None:
        begun.set()
        until(lambda: go.is_set() or ctx.is_cancelled())
        reasons.append(ctx.cancel_reason)

    worker = worker_of(scripted, max_workers=1, max_queued=1, heartbeat_interval=0.2)
    worker.on_task("echo", hold)
    worker.start()
    for number in range(10):
        scripted.task(f"t{number}")
    until(lambda: worker.stats().received == 3)
    assert begun.wait(GUARD)
    # Sent on the stream it would wait behind the tasks; it comes by the heartbeat.
    scripted.command({"paused": "pause"}.get(order, "terminate"))
    answer.update({"revoked": True, "reason": "bad"} if order == "revoked" else {"desired_state": order})
    until(lambda: worker.is_paused() if order == "paused" else worker.stop_reason)
    assert 1 <= len(told) <= 2
    if order == "paused":
        go.set()
    worker.stop()
    assert reasons == [None if order == "paused" else "terminated"]
    code = "worker_paused" if order == "paused" else "worker_terminated"
    assert scripted.completion("t1")["error"]["code"] == code
