"""What keeps a worker from its end: a policy gateway that calls sys.exit(), a thread that cannot be started."""

from __future__ import annotations

import sys
import threading
from typing import Any, Callable

import pytest

from sekuire import SekuireError, Worker
from sekuire.worker import outbox

from ..support.gateway import FakeGateway
from ..support.scripted import Scripted
from ..support.waiting import GUARD, client_threads, until

Make = Callable[..., Worker]


class Exiting(FakeGateway):
    """Calls sys.exit() in one of its methods."""

    def __init__(self, method: str) -> None:
        super().__init__()
        self.method = method

    def _exit_in(self, method: str) -> None:
        if method == self.method:
            sys.exit(3)

    def add_listener(self, listener: Any) -> None: ...

    def remove_listener(self, listener: Any) -> None:
        self._exit_in("remove_listener")

    def on_heartbeat_response(self, response: Any) -> None:
        self._exit_in("on_heartbeat_response")

    def ensure_loaded(self, stop: Any = None) -> None:
        self._exit_in("ensure_loaded")


def started(make: Make, scripted: Scripted, method: str) -> Worker:
    worker = make(scripted, policy_gateway=Exiting(method))
    worker.on_task("echo", lambda ctx, input: input)
    worker.start()
    return worker


@pytest.mark.parametrize("method", ["remove_listener", "on_heartbeat_response"])
def test_a_stop_ends(scripted: Scripted, worker_of: Make, method: str) -> None:
    """All steps of a stop are made, so that wait() returns and no thread is left."""
    worker = started(worker_of, scripted, method)
    scripted.wait_for("heartbeat")
    worker.stop(1.0)
    assert worker.wait(10.0)
    until(lambda: client_threads() == [])


def test_a_failed_listener_keeps_nothing_open(scripted: Scripted, worker_of: Make, tmp_path: Any) -> None:
    """The outbox is closed, and with it the lock of its file."""
    gateway = Exiting("remove_listener")
    worker = worker_of(scripted, policy_gateway=gateway, outbox=tmp_path / "results.db")
    worker.on_task("echo", lambda ctx, input: input)
    worker.start()
    worker.stop(1.0)
    assert worker.wait(10.0)
    assert not outbox._registry


def test_the_stream_ends_the_worker(scripted: Scripted, worker_of: Make) -> None:
    """A worker whose stream's thread has ended does not stay running without a stream."""
    with pytest.raises(SekuireError, match="SystemExit"):
        started(worker_of, scripted, "ensure_loaded").wait(10.0)


def test_orders_of_a_heartbeat_are_carried_out(scripted: Scripted, worker_of: Make) -> None:
    """The desired state of the answer counts, whatever the gateway does with the answer."""
    scripted.on["heartbeat"] = lambda request: (200, {"desired_state": "paused"})
    worker = started(worker_of, scripted, "on_heartbeat_response")
    until(worker.is_paused, min(GUARD, 10.0))


@pytest.mark.parametrize("is_started", [False, True])
def test_no_memory_for_the_thread_of_the_stop(
    scripted: Scripted,
    worker_of: Make,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    is_started: bool,
) -> None:
    """The stop is carried out once, whether or not the thread has started before start() failed."""
    caplog.set_level("INFO")
    worker = worker_of(scripted)
    worker.on_task("echo", lambda ctx, input: input)
    worker.start()
    real = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        if thread.name != "sekuire-shutdown":
            real(thread)
            return
        if is_started:
            real(thread)
        raise MemoryError

    monkeypatch.setattr(threading.Thread, "start", start)
    scripted.command("terminate")
    assert worker.wait(10.0)
    until(lambda: client_threads() == [])
    assert caplog.text.count("the worker has stopped") == 1
    assert "failed" not in caplog.text
