"""TaskContext: time left, cancellation, what it says of itself."""

from __future__ import annotations

import datetime as dt
import threading
import time
from typing import Any, List

import pytest

from sekuire.errors import TaskCancelled
from sekuire.handlers.context import TaskContext, control_of

from ..support.builders import task_of
from ..support.waiting import GUARD

TASK = task_of()


def test_without_a_limit() -> None:
    """A task without a limit has no deadline and nothing remaining to count."""
    context = TaskContext(TASK)
    assert (context.deadline, context.remaining()) == (None, None)
    assert repr(context) == "<TaskContext t1 echo attempt 1>"


def test_with_a_limit() -> None:
    """deadline is an aware UTC time, remaining() counts down to 0."""
    context = TaskContext(TASK, deadline=time.monotonic() + 100)
    assert context.deadline is not None
    left = (context.deadline - dt.datetime.now(dt.timezone.utc)).total_seconds()
    assert 0 < left <= 100
    assert 0 < (context.remaining() or 0) <= 100
    assert TaskContext(TASK, deadline=time.monotonic() - 1).remaining() == 0.0


def test_cancellation() -> None:
    """The first reason counts; raise_if_cancelled() carries it; a wait that began before or after ends."""
    context = TaskContext(TASK)
    context.raise_if_cancelled()
    assert context.wait_cancelled(0) is False
    assert (context.is_cancelled(), context.cancel_reason) == (False, None)
    assert control_of(context).cancel("timeout")
    assert not control_of(context).cancel("terminated")
    assert (context.is_cancelled(), context.cancel_reason) == (True, "timeout")
    assert context.wait_cancelled(GUARD)
    with pytest.raises(TaskCancelled, match="timeout"):
        context.raise_if_cancelled()
    cancelled = TaskContext(TASK)
    control_of(cancelled).cancel("x")
    assert cancelled.wait_cancelled()


def test_many_waiters() -> None:
    """Every thread that waits is woken."""
    context = TaskContext(TASK)
    woken: List[bool] = []
    ready = threading.Barrier(5)

    def wait() -> None:
        ready.wait(GUARD)
        woken.append(context.wait_cancelled(GUARD))

    threads = [threading.Thread(target=wait) for _ in range(4)]
    for thread in threads:
        thread.start()
    ready.wait(GUARD)
    control_of(context).cancel("now")
    for thread in threads:
        thread.join(GUARD)
    assert woken == [True] * 4


def test_progress_goes_to_the_sink() -> None:
    """report_progress() gives value and message on; without a sink it does nothing."""
    reports: List[Any] = []
    TaskContext(TASK, progress=lambda *args: reports.append(args[1:])).report_progress(1, "all")
    assert reports == [(1.0, "all")]
    TaskContext(TASK).report_progress(0.5)
