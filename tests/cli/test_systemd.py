"""What systemd is notified of, over a socket such as its own."""

from __future__ import annotations

import os
import pathlib
import signal
import socket
import threading
from typing import Any, Callable, Dict, Iterator, List

import pytest

from sekuire.local import LocalPlatform
from sekuire.service.systemd import notified
from sekuire.wire.models import WorkerStats

from ..support.servers import free_port
from ..support.waiting import until
from .conftest import POSIX_ONLY, Run, variables
from .test_worker import BASE, PLAIN, Write, begin
from .test_worker import module as module

pytestmark = POSIX_ONLY


class Manager:
    """Receive what a service sends, as systemd does."""

    def __init__(self, address: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(address.replace("@", "\0", 1))
        self._socket.settimeout(0.05)
        self.environ = {"NOTIFY_SOCKET": address}
        self.lines: List[str] = []
        self._is_over = False
        self._thread = threading.Thread(target=self._receive)
        self._thread.start()

    def _receive(self) -> None:
        while not self._is_over:
            try:
                self.lines += self._socket.recv(65536).decode().splitlines()
            except socket.timeout:
                continue

    def has(self, line: str) -> bool:
        return any(one.startswith(line) for one in self.lines)

    def close(self) -> None:
        self._is_over = True
        self._thread.join()
        self._socket.close()


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> Iterator[Manager]:
    name = f"@sekuire-{os.getpid()}-{free_port()}" if request.param == "abstract" else str(tmp_path / "notify")
    made = Manager(name)
    yield made
    made.close()


class FakeWorker:
    """A worker in a state that the test sets."""

    stop_reason: Any = None
    is_there = True
    connected = False
    paused = False

    def is_alive(self) -> bool:
        return self.is_there

    def is_connected(self) -> bool:
        return self.connected

    def is_paused(self) -> bool:
        return self.paused

    def stats(self) -> WorkerStats:
        return WorkerStats()


Environ = Callable[..., None]


@pytest.fixture
def environ(monkeypatch: pytest.MonkeyPatch) -> Environ:
    def set_all(**variables: Any) -> None:
        for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))

    return set_all


@pytest.mark.slow
def test_a_workers_life(
    run: Run, module: Write, platform: LocalPlatform, manager: Manager, tmp_path: pathlib.Path
) -> None:
    """Ready when it is connected, alive all the time, stopping when it drains, and its state in words."""
    module(BASE, PLAIN)
    process = run("worker", "tasks:worker", env=variables(platform, WATCHDOG_USEC="2000000", **manager.environ))
    task_id = begin(process, platform, "slow")
    until(lambda: manager.has("READY=1"))
    until(lambda: manager.has("STATUS=connected; 1 running, 0 waiting, 0 not delivered"))
    seen = manager.lines.count("WATCHDOG=1")
    until(lambda: manager.lines.count("WATCHDOG=1") >= seen + 2)
    assert not manager.has("STOPPING=1")
    process.signal(signal.SIGTERM)
    until(lambda: manager.has("STOPPING=1"))
    until(lambda: manager.has("STATUS=stopping; 1 running"))
    # A handler that ends in its time is no reason to take the worker for hung.
    seen = manager.lines.count("WATCHDOG=1")
    until(lambda: manager.lines.count("WATCHDOG=1") > seen)
    (tmp_path / "go").touch()
    assert process.end()[0] == 0
    assert platform.task(task_id)["status"] == "completed"
    assert [line for line in manager.lines if line in ("READY=1", "STOPPING=1")] == ["READY=1", "STOPPING=1"]


def test_a_start_that_waits_for_the_platform(environ: Environ, manager: Manager) -> None:
    """It asks for more time as long as the worker lives, and is ready when the platform has come."""
    environ(**manager.environ)
    worker = FakeWorker()
    with notified(worker):
        until(lambda: manager.lines.count("EXTEND_TIMEOUT_USEC=60000000") >= 2)
        assert "STATUS=not connected to the platform, retrying; 0 running, 0 waiting, 0 not delivered" in manager.lines
        assert not manager.has("READY=1")
        worker.connected = True
        until(lambda: manager.has("READY=1"))
    # No watchdog was asked for.
    assert not manager.has("WATCHDOG=1")


def test_a_worker_that_is_stuck(environ: Environ, manager: Manager) -> None:
    """Without its own threads nothing keeps the watchdog quiet. An outage or a pause does."""
    environ(WATCHDOG_USEC=200_000, WATCHDOG_PID=os.getpid(), **manager.environ)
    worker = FakeWorker()
    worker.connected = worker.paused = True
    with notified(worker):
        until(lambda: manager.has("STATUS=paused"))
        worker.connected = False
        until(lambda: manager.has("STATUS=not connected"))
        until(lambda: manager.lines[-1] == "WATCHDOG=1")
        worker.is_there = False
        worker.paused, worker.connected = True, True
        until(lambda: manager.lines[-1].startswith("STATUS=paused"))
        seen = manager.lines.count("WATCHDOG=1")
        worker.paused = False
        until(lambda: manager.lines[-1].startswith("STATUS=connected"))
        assert manager.lines.count("WATCHDOG=1") == seen
        worker.stop_reason = "idle"
    until(lambda: manager.has("STOPPING=1"))


def test_another_processs_watchdog(environ: Environ, manager: Manager) -> None:
    """WATCHDOG_PID names the process that is watched."""
    environ(WATCHDOG_USEC=200_000, WATCHDOG_PID=1, **manager.environ)
    worker = FakeWorker()
    worker.connected = True
    with notified(worker):
        until(lambda: manager.has("STATUS=connected"))
    assert not manager.has("WATCHDOG=1")


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"NOTIFY_SOCKET": "relative"}, "NOTIFY_SOCKET=relative is neither a path nor @NAME; systemd is not notified"),
        (
            {"NOTIFY_SOCKET": "/nowhere/notify"},
            "cannot notify systemd at NOTIFY_SOCKET=/nowhere/notify (No such file or",
        ),
        ({"NOTIFY_SOCKET": "/nowhere/notify", "WATCHDOG_USEC": "soon"}, "WATCHDOG_USEC=soon is not a number of micro"),
        ({}, ""),
    ],
    ids=["relative", "missing", "watchdog", "none"],
)
def test_what_cannot_be_notified(
    environ: Environ, caplog: pytest.LogCaptureFixture, given: Dict[str, str], text: str
) -> None:
    """One warning says why. The worker runs."""
    environ(**given)
    with notified(FakeWorker()):
        until(lambda: not text or any(text in record.message for record in caplog.records))
    mine = [record.message for record in caplog.records if record.name == "sekuire.systemd"]
    assert len(mine) == len(set(mine)) == len([text for text in mine if text])
    assert bool(mine) is bool(text)
