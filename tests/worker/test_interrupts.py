"""Ctrl-C at any moment: a KeyboardInterrupt before any line of the library that the calling thread runs."""

from __future__ import annotations

import linecache
import os
import sys
import threading
from types import FrameType
from typing import Any, Callable, Dict

import pytest

import sekuire
from sekuire import Beacon, SekuireSDK, Worker

from ..conftest import AGENT
from ..support.scripted import Scripted
from ..support.waiting import GUARD, client_threads, until

Make = Callable[..., Worker]

#: A Beacon's last heartbeat is sent by the caller of stop(); one that is interrupted leaves its connection behind.
dropped_connection = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

_PACKAGE = os.path.dirname(sekuire.__file__)


class Interrupt:
    """Raises KeyboardInterrupt in the calling thread before the library's line number ``moment``, counted from 1."""

    def __init__(self, moment: int) -> None:
        self._left = moment

    def during(self, call: Callable[[], object]) -> bool:
        """Whether the moment came before the call's end; then the call must have let the interrupt pass."""
        before = sys.gettrace()
        sys.settrace(self._trace)
        try:
            call()
        except KeyboardInterrupt:
            assert self._left <= 0
            return True
        finally:
            sys.settrace(before)
        assert self._left > 0, "the interrupt was swallowed"
        return False

    def _trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(_PACKAGE):
            return None
        if event == "line" and not self._is_closed_to_signals(frame):
            self._left -= 1
            if self._left == 0:
                raise KeyboardInterrupt
        return self._trace

    @staticmethod
    def _is_closed_to_signals(frame: FrameType) -> bool:
        # The line of a "with" is told once more before __exit__ is called, and "try:" before its block is entered:
        # there the interpreter lets no signal in, and what is raised nevertheless leaves locks held.
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
        return line.startswith("with ") or line == "try:"


def moments(once: Callable[[int], bool], step: int) -> int:
    """Run ``once(moment)`` for moments ``step`` apart, until it ends before its moment comes; how many there were."""
    count = 0
    moment = 1
    while once(moment):
        count += 1
        moment += step
        assert count < 1000
    return count


def ended() -> bool:
    return client_threads() == []


def test_during_start(scripted: Scripted, worker_of: Make) -> None:
    """An interrupted start() ends by itself what it had begun, and leaves a worker that can be stopped."""

    went_on = []

    def once(moment: int) -> bool:
        worker = worker_of(scripted, shutdown_timeout=5.0)
        worker.on_task("echo", lambda ctx, input: input)
        was_interrupted = Interrupt(moment).during(worker.start)
        if was_interrupted:
            # The last lines of start() come when all is done: it is as if the interrupt had come right after it.
            until(lambda: ended() or (worker.is_connected() and worker.stop_reason is None))
            went_on.append(not ended())
        worker.stop()
        assert worker.wait(0)
        until(ended)
        return was_interrupted

    assert moments(once, step=1) > 20
    assert not any(went_on[:-4])


@pytest.mark.parametrize("state", ["idle", "busy"])
def test_during_stop(scripted: Scripted, worker_of: Make, state: str) -> None:
    """A stop() that was interrupted goes on by itself, or with the next stop(); the result is delivered."""
    numbers = iter(range(10_000))

    def once(moment: int) -> bool:
        begun, go = threading.Event(), threading.Event()
        worker = worker_of(scripted, heartbeat_interval=30.0)

        @worker.on_task("echo")
        def echo(ctx: Any, input: Any) -> str:
            begun.set()
            assert go.wait(GUARD)
            return "done"

        worker.start()
        task_id = f"t{next(numbers)}"
        if state == "busy":
            scripted.task(task_id)
            assert begun.wait(GUARD)
        # Let go once the stop waits for the handler, so that the moments of that wait are among those tried.
        threading.Timer(0.02, go.set).start()
        was_interrupted = Interrupt(moment).during(worker.stop)
        worker.stop()
        assert worker.wait(0)
        until(ended)
        if state == "busy":
            assert scripted.completion(task_id)["output"] == "done"
        return was_interrupted

    assert moments(once, step=5) > 5


def test_during_a_wait(scripted: Scripted, worker_of: Make) -> None:
    """An interrupted wait() leaves the worker running, and a with statement then stops it."""

    def once(moment: int) -> bool:
        worker = worker_of(scripted)
        worker.on_task("echo", lambda ctx, input: input)
        with worker:
            was_interrupted = Interrupt(moment).during(lambda: worker.wait(0.02))
            assert worker.is_running()
        assert worker.wait(0)
        return was_interrupted

    assert moments(once, step=2) > 5


@pytest.mark.slow
@dropped_connection
def test_of_a_beacon(scripted: Scripted) -> None:
    """A Beacon whose start() or stop() was interrupted is ended by the next stop()."""

    def beacon() -> Beacon:
        return Beacon(AGENT, api_base_url=scripted.url, install_token="skt-1", heartbeat_interval=30.0)

    def starting(moment: int) -> bool:
        made = beacon()
        was_interrupted = Interrupt(moment).during(made.start)
        made.stop()
        until(ended)
        return was_interrupted

    def stopping(moment: int) -> bool:
        made = beacon()
        made.start()
        was_interrupted = Interrupt(moment).during(made.stop)
        made.stop()
        until(ended)
        assert made.status.state == "stopped"
        return was_interrupted

    assert moments(starting, step=4) > 5
    assert moments(stopping, step=12) > 5


@dropped_connection
def test_of_an_sdk(scripted: Scripted) -> None:
    """An SDK whose shutdown() was interrupted is ended by the next one, its workers and its heartbeat too."""

    def once(moment: int) -> bool:
        sdk = SekuireSDK(AGENT, api_base_url=scripted.url, install_token="skt-1")
        sdk.start()
        worker = sdk.create_task_worker(heartbeat_interval=30.0)
        worker.on_task("echo", lambda ctx, input: input)
        worker.start()
        was_interrupted = Interrupt(moment).during(sdk.shutdown)
        sdk.shutdown()
        assert worker.wait(0)
        until(ended)
        return was_interrupted

    assert moments(once, step=15) > 5


def test_the_interrupt_is_real() -> None:
    """The tool of these tests interrupts before the line it is told, and not at all where there is none."""
    seen: Dict[str, bool] = {}

    def call() -> None:
        sekuire.errors.TaskError("code", "message")
        seen["whole"] = True

    assert Interrupt(1).during(call)
    assert seen == {}
    assert not Interrupt(1000).during(call)
    assert seen == {"whole": True}
