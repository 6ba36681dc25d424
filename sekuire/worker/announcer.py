"""Announce what changes a worker's state: to its audit log and to the user's callbacks."""

from __future__ import annotations

from typing import Callable, List, Optional

from .._internal.threads import CallbackThread, Deadline
from ..audit.log import AuditLog
from ..wire.models import Command


class Announcer:
    """Announce each change of a worker's state once. ::

        announcer = Announcer(worker_id, audit)
        announcer.add_callback(print)
        announcer.note_state("paused", "maintenance")
        announcer.announce(Command(type="pause", reason="maintenance"))

    :param audit: the audit log that gets an event for each change; None for a worker without one.
    :param owner: the object whose ``stop()`` a callback must not wait for.
    """

    # Threads: any thread may call anything. `sekuire-callback` runs the user's callbacks, in order. Nothing here
    # blocks: the audit log and the callbacks' thread only queue what they are given.

    def __init__(self, worker_id: str = "", audit: Optional[AuditLog] = None, *, owner: object = None) -> None:
        self._worker_id = worker_id
        self._audit = audit
        self._callbacks: List[Callable[[Command], object]] = []
        self._thread = CallbackThread(owner=owner)

    def add_callback(self, callback: Callable[[Command], object]) -> None:
        """Call ``callback`` with each command that takes effect from now on."""
        self._callbacks.append(callback)

    def note_state(self, state: str, reason: Optional[str] = None, severity: str = "info") -> None:
        """Send an audit event for the worker's new state."""
        if self._audit is not None:
            self._audit.health(state, severity, of="worker", worker_id=self._worker_id, reason=reason)

    def announce(self, command: Command) -> None:
        """Call the user's callbacks, on their own thread, with a command that took effect."""
        for callback in self._callbacks:
            self._thread.post(callback, command)

    def close(self) -> None:
        """Accept no more commands. Those that wait still reach the callbacks."""
        self._thread.close()

    def join(self, deadline: Deadline) -> bool:
        """Wait for the end of the callbacks' thread. Return True if it ended before ``deadline``."""
        return self._thread.join(deadline)
