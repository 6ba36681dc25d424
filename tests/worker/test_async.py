"""Async handlers: their coroutine is cancelled whenever their task is."""

from __future__ import annotations

import asyncio
import threading
from typing import Any, Callable, List

import pytest

from sekuire import TaskContext, Worker

from ..conftest import AGENT
from ..support.waiting import GUARD, until

Make = Callable[..., Worker]


class Sleeper:
    """An async handler that sleeps until it is cancelled, and notes that it was."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.cancelled: List[Any] = []

    async def __call__(self, ctx: TaskContext, input: Any) -> None:
        self.begun.set()
        try:
            await asyncio.sleep(GUARD)
        except asyncio.CancelledError:
            self.cancelled.append(ctx.cancel_reason)
            raise


def started(platform: Any, worker: Worker, sleeper: Sleeper, **options: Any) -> str:
    """Start the worker and a task that sleeps. Return the task's id."""
    worker.on_task("sleep", sleeper, **options)
    worker.start()
    task_id: str = platform.submit("sleep", None, AGENT)
    assert sleeper.begun.wait(GUARD)
    return task_id


def test_the_end_of_its_time(platform: Any, worker_of: Make) -> None:
    """It is answered timeout, and its thread is free again."""
    sleeper = Sleeper()
    worker = worker_of(platform, max_workers=1)
    task_id = started(platform, worker, sleeper, timeout=0.2)
    assert platform.wait(task_id, GUARD)["error"]["code"] == "timeout"
    until(lambda: worker.stats().overdue == 0)
    assert sleeper.cancelled == ["timeout"]
    worker.stop()


@pytest.mark.parametrize("order", ["terminate", "revoke"])
def test_a_termination(platform: Any, worker_of: Make, order: str) -> None:
    """The coroutine ends at once, and is answered worker_terminated, retryable."""
    sleeper = Sleeper()
    worker = worker_of(platform, shutdown_timeout=GUARD)
    task_id = started(platform, worker, sleeper)
    (installation,) = platform.installations()
    if order == "terminate":
        platform.command(installation["installation_id"], "terminate")
    else:
        platform.revoke(installation["installation_id"], "stolen", GUARD)
    assert worker.wait(GUARD)
    assert sleeper.cancelled == ["terminated"]
    error = platform.wait(task_id, GUARD)["error"]
    assert (error["code"], error["retryable"]) == ("worker_terminated", True)


def test_the_end_of_a_drain(platform: Any, worker_of: Make) -> None:
    """It may finish until then."""
    sleeper = Sleeper()
    worker = worker_of(platform)
    task_id = started(platform, worker, sleeper)
    worker.request_stop(1.0)
    assert sleeper.cancelled == []
    assert worker.wait(GUARD)
    assert platform.wait(task_id, GUARD)["error"]["code"] == "worker_shutdown"
    until(lambda: sleeper.cancelled == ["shutdown"])


def test_one_that_goes_on_is_overdue(platform: Any, worker_of: Make) -> None:
    """So is a thread that it has left behind: the coroutine has ended, and its task's thread waits for it."""
    gate, began = threading.Event(), threading.Event()

    def block() -> None:
        began.set()
        gate.wait(GUARD)

    async def handler(ctx: TaskContext, input: Any) -> None:
        # As asyncio.to_thread() does, which Python 3.9 has too.
        await asyncio.get_running_loop().run_in_executor(None, block)

    worker = worker_of(platform, max_workers=1)
    worker.on_task("block", handler, timeout=0.2)
    with worker:
        task_id = platform.submit("block", None, AGENT)
        assert began.wait(GUARD)
        assert platform.wait(task_id, GUARD)["error"]["code"] == "timeout"
        assert worker.stats().overdue == 1
        gate.set()
        until(lambda: worker.stats().overdue == 0)
