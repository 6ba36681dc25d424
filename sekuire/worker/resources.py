"""Open the resources of the worker's scope when it starts, and close them when its handlers have ended."""

# Threads: start()'s thread opens. `sekuire-resources` closes, because code of the user's own must not hold up the stop.
# It ends when the last overdue handler has. `_lock` guards the state, and is never held over a resource's code.

from __future__ import annotations

import enum
import threading
from typing import TYPE_CHECKING, Optional

from .._internal.logs import get_logger
from .._internal.threads import Deadline, owned_by, spawn
from ..handlers.resources import WORKER, Opened

if TYPE_CHECKING:
    from .records import Records

log = get_logger("sekuire.worker")


class _State(enum.Enum):
    NEW, OPENING, OPEN, CLOSING, CLOSED = range(5)


class WorkerResources:
    """Keep the open resources of one worker, which has a stop that may come at any moment.

    :param owner: the worker, whose ``stop()`` a resource's own code must not wait for.
    """

    def __init__(self, owner: object) -> None:
        self._owner = owner
        self._opened: Optional[Opened] = None
        self._state = _State.NEW
        self._lock = threading.Lock()
        self._is_closed = threading.Event()

    @property
    def is_opening(self) -> bool:
        """Return True while resources are being opened. It takes no lock, so a signal's handler may ask."""
        return self._state is _State.OPENING

    def open(self, opened: Optional[Opened]) -> None:
        """Open all resources of the worker's scope, in order. If one fails, close the others and raise its error."""
        if opened is None:
            return
        with self._lock:
            if self._state is not _State.NEW:
                # The worker was stopped before.
                return
            self._opened = opened
            self._state = _State.OPENING
        is_open = False
        try:
            with owned_by(self._owner):
                for resource in opened.plan.values():
                    if resource.scope == WORKER and not self._is_unwanted():
                        opened.get(resource.name)
            is_open = True
        finally:
            with self._lock:
                must_close = not is_open or self._state is _State.CLOSING
                self._state = _State.CLOSING if must_close else _State.OPEN
            if must_close:
                self._close_all(opened)

    def close(self, records: Records, deadline: Deadline) -> None:
        """Close what is open, as soon as no handler runs. Wait for it until ``deadline``.

        :param records: of the handlers that still run.
        """
        with self._lock:
            opened, was = self._opened, self._state
            if was in (_State.OPENING, _State.OPEN):
                self._state = _State.CLOSING
        if opened is None or was is _State.CLOSED:
            return
        with records.lock:
            names = [record.name for record in records.overdue]
        if names:
            log.warning("the worker's resources stay open until these handlers have ended: %s", ", ".join(names))
        if was is _State.OPEN and spawn(self._close_later, "sekuire-resources", records, opened) is None and not names:
            # No thread can be started: the interpreter is ending.
            self._close_all(opened)
        if not names and not self._is_closed.wait(deadline.remaining()):
            log.warning("closing the worker's resources takes longer than the stop; it goes on")

    def _is_unwanted(self) -> bool:
        with self._lock:
            return self._state is _State.CLOSING

    def _close_later(self, records: Records, opened: Opened) -> None:
        with owned_by(self._owner):
            with records.lock:
                while records.overdue:
                    records.monitor.wait(1.0)
            self._close_all(opened)

    def _close_all(self, opened: Opened) -> None:
        try:
            with owned_by(self._owner):
                failed = opened.close()
            if failed is not None:
                log.error("closing the worker's resources failed: %s", type(failed).__name__, exc_info=failed)
        finally:
            with self._lock:
                self._state = _State.CLOSED
            self._is_closed.set()
