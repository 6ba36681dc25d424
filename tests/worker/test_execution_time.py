"""``execution_time_ms``: the time since the handler began, whoever answers the task; 0 where it never began."""

from __future__ import annotations

import threading
import time
from typing import Any, Callable

import pytest

from sekuire import TaskContext, Worker
from sekuire.wire import protocol

from ..support.builders import completion_of
from ..support.scripted import Scripted
from ..support.waiting import GUARD, until

Make = Callable[..., Worker]


def test_a_timeout(scripted: Scripted, worker_of: Make) -> None:
    """A task that is answered at its limit has run for as long as the limit."""
    worker = worker_of(scripted)
    worker.on_task("echo", lambda ctx, input: ctx.wait_cancelled(GUARD), timeout=0.2)
    with worker:
        scripted.task("t-1")
        body = scripted.completion("t-1")
    assert body["error"]["code"] == "timeout"
    assert body["execution_time_ms"] >= 200


def test_a_stop(scripted: Scripted, worker_of: Make) -> None:
    """A task that is answered at the end of a stop has run since its handler began; one in the queue has not."""
    worker = worker_of(scripted, max_workers=1)
    release = threading.Event()
    worker.on_task("echo", lambda ctx, input: release.wait(GUARD))
    scripted.on["release"] = lambda request: (405, {"error": "x", "message": "no such endpoint"})
    try:
        worker.start()
        scripted.task("t-1")
        scripted.task("t-2")
        until(lambda: worker.stats().running == 1 and worker.stats().waiting == 1)
        time.sleep(0.2)
        worker.stop(0.1)
        stopped, waiting = scripted.completion("t-1"), scripted.completion("t-2")
    finally:
        release.set()
    assert (stopped["error"]["code"], waiting["error"]["code"]) == ("worker_shutdown", "worker_shutdown")
    assert stopped["execution_time_ms"] >= 200
    assert waiting["execution_time_ms"] == 0


def test_what_never_began(scripted: Scripted, worker_of: Make) -> None:
    """A task that is refused has run for no time."""
    worker = worker_of(scripted)
    worker.on_task("echo", lambda ctx, input: input)
    with worker:
        scripted.task("t-1", "unknown")
        worker.pause()
        scripted.task("t-2")
        assert scripted.completion("t-1")["execution_time_ms"] == 0
        assert scripted.completion("t-2")["execution_time_ms"] == 0


@pytest.mark.parametrize("status", [400, 413])
def test_a_refused_result(scripted: Scripted, worker_of: Make, status: int) -> None:
    """The failure that stands in for a refused result keeps its time."""

    def complete(request: Any) -> Any:
        is_first = len(scripted.completions("t-1")) == 1
        return (status, {"error": "x", "message": "no"}) if is_first else (200, {})

    scripted.on["complete"] = complete
    worker = worker_of(scripted)

    @worker.on_task("echo")
    def echo(ctx: TaskContext, input: Any) -> Any:
        time.sleep(0.1)
        return {"execution_time_ms": 5}

    with worker:
        scripted.task("t-1")
        until(lambda: len(scripted.completions("t-1")) == 2)
    first, second = (request.json for request in scripted.completions("t-1"))
    assert second["error"]["code"] in ("result_rejected", "result_too_large")
    assert second["execution_time_ms"] == first["execution_time_ms"] >= 100


@pytest.mark.parametrize("output", [None, 1, "x:2", {"execution_time_ms": 7}, ["x"] * 100])
@pytest.mark.parametrize("execution_time", [0, 1, 2**53])
def test_the_time_of_a_head(output: Any, execution_time: int) -> None:
    """The time is read back from a completion's encoded head, also from one that an outbox kept."""
    completion = completion_of("t", output=output, execution_time_ms=execution_time)
    assert protocol.execution_time_of(protocol.completion_head(completion)) == execution_time


@pytest.mark.parametrize("head", [b"", b"{", b'{"execution_time_ms":x', b'{"a":-1'])
def test_a_head_without_a_time(head: bytes) -> None:
    assert protocol.execution_time_of(head) == 0
