"""Notify systemd of a worker's state: ready, alive, stopping (``Type=notify`` and ``WatchdogSec=`` of a unit)."""

# Threads: `sekuire-systemd` beats, and alone writes the state. The thread that runs the worker starts and ends it.

from __future__ import annotations

import contextlib
import math
import os
import socket
from typing import Iterator, List, Optional, Protocol

from .._internal.clock import time
from .._internal.logs import get_logger
from .._internal.threads import Deadline, PeriodicThread
from ..wire.models import WorkerStats
from ..wire.protocol import one_line

log = get_logger("sekuire.systemd")

#: Seconds between two looks at the worker, at most: a stop must be known soon.
_LOOK = 1.0
#: Seconds between two looks before the worker is connected.
_FIRST_LOOK = 0.1
#: Seconds that a start which waits for the platform asks for. It asks again long before their end.
_MORE_TIME = 60
#: Seconds that the thread has to end.
_END_TIME = 1.0
#: Seconds that systemd may take to accept a message.
_SEND_TIME = 1.0


class Watched(Protocol):
    """Say how a worker is. A :class:`~sekuire.Worker` does."""

    @property
    def stop_reason(self) -> Optional[str]:
        """Return why it stops, None while it does not."""

    def is_alive(self) -> bool:
        """Return True while its own threads live."""

    def is_connected(self) -> bool:
        """Return True while its task stream is open."""

    def is_paused(self) -> bool:
        """Return True while it accepts no tasks."""

    def stats(self) -> WorkerStats:
        """Return its counts."""


@contextlib.contextmanager
def notified(worker: Watched) -> Iterator[None]:
    """Notify systemd of ``worker`` while the block runs, if systemd started this process and asks for it.

    ``READY=1`` is sent when the task stream is open for the first time. Until then the start may take as long as it
    likes. ``WATCHDOG=1`` is sent while the worker is alive: a platform that cannot be reached does not end it.
    ``STOPPING=1`` is sent when the drain begins.
    """
    address = _address(os.environ.get("NOTIFY_SOCKET"))
    if address is None:
        yield
        return
    notifier = _Notifier(worker, address, _watchdog_seconds())
    thread = PeriodicThread("sekuire-systemd", notifier)
    thread.start()
    try:
        yield
    finally:
        thread.stop()
        if thread.join(Deadline(_END_TIME)):
            # Once more: a worker that has just stopped by itself has not said so.
            notifier.beat()


class _Notifier:
    """Send what has changed since the last beat, and that the worker is alive."""

    def __init__(self, worker: Watched, address: str, watchdog: Optional[float]) -> None:
        self._worker = worker
        self._address = address
        self._watchdog = watchdog
        self._is_ready = False
        self._is_stopping = False
        self._status = ""
        self._is_off = False
        #: When it last said that the worker is alive (``time.monotonic()``).
        self._alive_at = -math.inf

    def interval(self) -> float:
        """Return the seconds to the next beat."""
        look = _LOOK if self._is_ready or self._is_stopping else _FIRST_LOOK
        # Well within half the time in which systemd must hear of the worker, as its manual advises.
        return look if self._watchdog is None else min(look, self._watchdog / 4)

    def beat(self) -> None:
        """Look at the worker and notify systemd."""
        lines: List[str] = []
        worker = self._worker
        if worker.is_connected() and not self._is_ready:
            self._is_ready = True
            lines.append("READY=1")
        if worker.stop_reason is not None and not self._is_stopping:
            self._is_stopping = True
            lines.append("STOPPING=1")
        status = self._describe()
        if status != self._status:
            self._status = status
            lines.append(f"STATUS={status}")
        now = time.monotonic()
        if now - self._alive_at >= min(_LOOK / 2, self.interval()) and worker.is_alive():
            self._alive_at = now
            if self._watchdog is not None:
                lines.append("WATCHDOG=1")
            if not self._is_ready and not self._is_stopping:
                lines.append(f"EXTEND_TIMEOUT_USEC={_MORE_TIME * 1_000_000}")
        if lines and not self._is_off:
            self._send("\n".join(lines))

    def _describe(self) -> str:
        worker = self._worker
        stats = worker.stats()
        if worker.stop_reason is not None:
            state = "stopping"
        elif not worker.is_connected():
            state = "not connected to the platform, retrying"
        else:
            state = "paused" if worker.is_paused() else "connected"
        return f"{state}; {stats.running} running, {stats.waiting} waiting, {stats.undelivered} not delivered"

    def _send(self, text: str) -> None:
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.settimeout(_SEND_TIME)
                sock.sendto(text.encode(), self._address)
        except socket.timeout:
            # systemd is busy. What is to be said once is said again.
            self._is_ready = self._is_ready and "READY=1" not in text
            self._is_stopping = self._is_stopping and "STOPPING=1" not in text
            self._status = ""
        except OSError as error:
            self._is_off = True
            log.warning(
                "cannot notify systemd at NOTIFY_SOCKET=%s (%s); a unit with Type=notify will be taken for hung",
                self._address.replace("\0", "@"), error.strerror or error,
            )  # fmt: skip


def _address(given: Optional[str]) -> Optional[str]:
    """Return the address to send to, None without one. ``@`` begins the name of an abstract socket."""
    if not given or not hasattr(socket, "AF_UNIX"):
        return None
    if given[0] not in "/@" or len(given) < 2:
        log.warning("NOTIFY_SOCKET=%s is neither a path nor @NAME; systemd is not notified", one_line(given)[:100])
        return None
    return "\0" + given[1:] if given[0] == "@" else given


def _watchdog_seconds() -> Optional[float]:
    """Return within how many seconds systemd must hear of this process again, None if it need not."""
    given, pid = os.environ.get("WATCHDOG_USEC"), os.environ.get("WATCHDOG_PID")
    if given is None or (pid is not None and pid != str(os.getpid())):
        return None
    try:
        seconds = int(given) / 1_000_000
    except ValueError:
        seconds = 0.0
    if seconds <= 0:
        log.warning("WATCHDOG_USEC=%s is not a number of microseconds; it is ignored", one_line(given)[:100])
        return None
    return seconds
