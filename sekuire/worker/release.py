"""Give tasks that have not begun back to the platform."""

from __future__ import annotations

import enum
import logging
from typing import Hashable, Optional, Protocol, Tuple

from .._internal.delivery import Delivery
from .._internal.logs import get_logger
from .._internal.monitor import Monitor
from ..transport.retry import full_jitter
from ..wire import protocol
from ..wire.verdict import Later, Retry, Settled, Unauthorized, Unsupported
from .sending import Sender

log = get_logger("sekuire.report")

#: First and longest delay between tries of one release, in seconds.
RETRY_MIN, RETRY_MAX = 0.1, 60.0
#: Delay after a failure that repeating is unlikely to change, such as one of TLS, in seconds.
REFUSED_PAUSE = 60.0
#: Tries after which a 401 of the platform counts as its word.
REFUSALS = 5
#: Releases under way at which no further task is released: a platform that accepts none must not fill the memory.
RELEASES = 10_000


class State(enum.Enum):
    """Name the states of a release. ``edges`` are the states that may follow."""

    PLANNED = "planned"
    SENDING = "sending"
    #: The platform has the task again.
    RELEASED = "released"
    #: The platform did not accept it.
    REFUSED = "refused"
    #: The task came again, or is kept: the release is not sent any more, and its answer means nothing.
    CALLED_OFF = "called off"

    def __init__(self, name: str) -> None:
        self.edges: Tuple[State, ...] = ()


PLANNED, SENDING, RELEASED, REFUSED, CALLED_OFF = State
PLANNED.edges = (SENDING, REFUSED, CALLED_OFF)
SENDING.edges = (PLANNED, RELEASED, REFUSED, CALLED_OFF)


class Keeper(Protocol):
    """Act on what the platform says to a release."""

    def note_release(self, release: Release, *, is_supported: bool) -> None:
        """Note that a release has ended. Without support its task needs an answer. Called without a lock."""


class Release:
    """Track one task on its way back to the platform.

    :param monitor: the dispatcher's; its lock guards the state, and each change wakes it.
    :param keeper: notified when it has ended; None for no notification.
    :param key: the key of the task's record.
    """

    __slots__ = ("_keeper", "_monitor", "attempt", "key", "state", "task_id")

    def __init__(
        self, monitor: Monitor, task_id: str, attempt: int, keeper: Optional[Keeper] = None, key: Hashable = None
    ) -> None:
        self.task_id = task_id
        self.key = key
        self.attempt = attempt
        self.state = PLANNED
        self._monitor = monitor
        self._keeper = keeper

    def begin(self) -> bool:
        """Begin a try. Return False if the task is not to be released any more."""
        with self._monitor.lock:
            if self.state is PLANNED:
                self._move(SENDING)
            return self.state is SENDING

    def postpone(self) -> None:
        """End a try that brought no verdict. The next one comes later."""
        with self._monitor.lock:
            if self.state is SENDING:
                self._move(PLANNED)

    def end(self, *, is_released: bool, is_supported: bool = True) -> None:
        """End it with the platform's verdict. Without support the task needs an answer of its own."""
        with self._monitor.lock:
            is_called_off = self.state is CALLED_OFF
            if not is_called_off:
                self._move(RELEASED if is_released else REFUSED)
        if not is_called_off and self._keeper is not None:
            self._keeper.note_release(self, is_supported=is_supported)

    def call_off(self) -> None:
        """Do not send it any more. Needs the lock."""
        if CALLED_OFF in self.state.edges:
            self._move(CALLED_OFF)

    def _move(self, to: State) -> None:
        assert to in self.state.edges, f"{self.state} -> {to}"
        self.state = to
        self._monitor.wake()


class Releases:
    """Send releases until the platform gives its verdict on each.

    Any thread may call anything; the releases are sent by the threads of ``delivery``, whose lock guards the count.
    """

    def __init__(self, sender: Sender, delivery: Delivery) -> None:
        #: Releases that have no verdict yet.
        self.under_way = 0
        self._sender = sender
        self._delivery = delivery
        self._has_released = False

    @property
    def is_offered(self) -> Optional[bool]:
        """Return True if the platform accepts releases, False if it does not offer them, None if that is not known."""
        if not self._sender.support.is_offered("release"):
            return False
        return True if self._has_released else None

    def has_room(self) -> bool:
        """Return False if so many releases are under way that no further task should be released."""
        return self.under_way < RELEASES

    def send(self, release: Release, delay: float = 0.0) -> None:
        """Release a task in ``delay`` seconds, or at once when the worker stops."""
        if self.is_offered is False:
            release.end(is_released=False, is_supported=False)
            return
        with self._delivery.lock:
            self.under_way += 1
        self._delivery.schedule(delay, lambda: self._try(release, 0))

    def _try(self, release: Release, tries: int) -> None:
        """Send a release once, and plan the next try unless there is a verdict, whatever happens."""
        again: Optional[Tuple[float, bool]] = (full_jitter(tries, RETRY_MIN, RETRY_MAX), True)
        try:
            again = self._send(release, tries) if release.begin() else None
        finally:
            if again is None:
                with self._delivery.lock:
                    self.under_way -= 1
            else:
                release.postpone()
                delay, is_awaited = again
                self._delivery.schedule(delay, lambda: self._try(release, tries + 1), is_awaited=is_awaited)

    def _send(self, release: Release, tries: int) -> Optional[Tuple[float, bool]]:
        """Send a release. Return None if the platform gave its verdict.

        Else return the seconds until the next try, and whether a stop waits for it.
        """
        task_id = release.task_id
        found = self._sender.ask("release", task_id, protocol.release_body(release.attempt, self._sender.worker_id))
        self._sender.support.note("release", found)
        if isinstance(found, Unsupported):
            release.end(is_released=False, is_supported=False)
            return None
        if isinstance(found, Later):
            # The task stays this worker's until the platform has it again, and nobody else runs it.
            level = logging.WARNING if tries == 0 else logging.DEBUG
            log.log(level, "[%s] not released (%s); again in %g s", task_id, found.error, REFUSED_PAUSE)
            return REFUSED_PAUSE, False
        is_unproven = isinstance(found, Unauthorized) and (found.is_foreign or tries < REFUSALS)
        if isinstance(found, Retry) or (isinstance(found, Unauthorized) and is_unproven):
            delay = max(full_jitter(tries, RETRY_MIN, RETRY_MAX), found.delay)
            log.debug("[%s] not released (%s); again in %.1f s", task_id, found.error, delay)
            return delay, True
        if isinstance(found, Settled):
            self._has_released = True
        else:
            log.warning("[%s] the platform did not accept the release of the task (%s)", task_id, found.error)
        release.end(is_released=isinstance(found, Settled))
        return None
