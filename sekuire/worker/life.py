"""Keep one worker's phase, its link to the platform, and when and why it stops."""

from __future__ import annotations

import enum
import logging
import threading
from typing import Callable, Optional, Protocol, Tuple

from .._internal.logs import get_logger
from .._internal.speech import speech
from .._internal.threads import Deadline
from ..errors import ConfigurationError, RevokedError, SekuireError
from ..wire.models import Command
from .announcer import Announcer

log = get_logger("sekuire.worker")

#: The reason of a stop that the user's own code asks for.
STOPPED_BY_USER = "stop()"
#: Longest single wait in seconds. Between two waits a thread can receive an interrupt, also on Windows.
_SLICE = 0.5


class Phase(enum.Enum):
    """Name the phases of a worker's life. ``edges`` are the phases that may follow."""

    NEW = "new"
    RUNNING = "running"
    #: It drains: no task begins, and running handlers may finish.
    STOPPING = "stopping"
    STOPPED = "stopped"

    def __init__(self, name: str) -> None:
        self.edges: Tuple[Phase, ...] = ()


Phase.NEW.edges = (Phase.RUNNING, Phase.STOPPED)
Phase.RUNNING.edges = (Phase.STOPPING,)
Phase.STOPPING.edges = (Phase.STOPPED,)


class Link(enum.Enum):
    """Say what is known of the task stream. ``edges`` are the values that may follow."""

    #: The platform has not answered.
    UNKNOWN = "unknown"
    #: The platform has answered, but not with a stream.
    REFUSED = "refused"
    OPEN = "open"
    #: The stream was open, and is not open now.
    LOST = "lost"

    def __init__(self, name: str) -> None:
        self.edges: Tuple[Link, ...] = ()


Link.UNKNOWN.edges = (Link.REFUSED, Link.OPEN)
Link.REFUSED.edges = (Link.OPEN,)
Link.OPEN.edges = (Link.LOST,)
Link.LOST.edges = (Link.OPEN,)


class Stopper(Protocol):
    """Carry out a stop that a :class:`Life` has been asked for."""

    def begin(self) -> None:
        """Begin the stop of a running worker, unless it has begun. Return at once."""

    def hurry(self) -> None:
        """Look again at the deadline and at :attr:`Life.is_terminated`: a stop in progress was asked for again."""

    def close_unstarted(self) -> None:
        """Close what a worker holds that was never started."""


class Life:
    """Keep the state of one worker, and begin its stop when a part of the worker asks for it.

    The Worker shares it with its stream, its control and its reporter. Each of them calls the method that names what
    happened::

        life = Life(30.0, Announcer())
        life.start()
        life.connect()
        assert life.is_connected and life.phase is Phase.RUNNING
        life.request_stop(reason="maintenance")
        assert life.reason == "maintenance"

    :param shutdown_timeout: the seconds of a stop that names none.
    :param announcer: announces a revocation.
    :param owner: the object whose ``stop()`` the worker's own threads must not wait for.
    :param is_required: False if the worker goes on where the platform does not let it in.
    """

    # Threads: any thread may call anything. `_condition` guards all fields. It is never held over I/O, a callback or
    # the lock of another part. `stop_event` is the timer of the waits that a stop must end; the stopper sets it.

    def __init__(
        self, shutdown_timeout: float, announcer: Announcer, *, owner: object = None, is_required: bool = True
    ) -> None:
        self.owner = owner
        self.is_required = is_required
        self.phase = Phase.NEW
        self.link = Link.UNKNOWN
        self.stop_event = threading.Event()
        #: When the stop has to be over; passed until one begins.
        self.deadline = Deadline(0)
        #: A later signal ends the process. Its line has said so, and which handlers it does not wait for.
        self.is_cut_short = False
        #: Why the worker stops or has stopped.
        self.reason: Optional[str] = None
        #: The error because of which it stops. It is raised to the caller of ``start()``.
        self.error: Optional[SekuireError] = None
        #: The caller of ``start()`` waits, and gets the error.
        self.is_awaited = False
        #: A command, the desired state or a revocation has ended this worker: tasks are not given back but answered.
        self.is_terminated = False
        self._is_revoked = False
        self._shutdown_timeout = shutdown_timeout
        self._announcer = announcer
        self._condition = threading.Condition()
        self._stopper: Optional[Stopper] = None

    def attach(self, stopper: Stopper) -> None:
        """Have ``stopper`` carry out the stop."""
        self._stopper = stopper

    def start(self) -> None:
        """Begin the life.

        :raises ConfigurationError: the worker was started or stopped before.
        """
        with self._condition:
            if self.phase is not Phase.NEW:
                raise ConfigurationError(
                    f"this worker is {self.phase.value}; a worker starts once, make a new one", "Worker.start"
                )
            self._move(Phase.RUNNING)

    # -- the link to the platform (the stream's thread) --

    @property
    def is_connected(self) -> bool:
        """Return True if the task stream is open."""
        return self.link is Link.OPEN

    @property
    def was_connected(self) -> bool:
        """Return True if the task stream is open or has been open."""
        return self.link in (Link.OPEN, Link.LOST)

    def connect(self) -> None:
        """Note that the task stream is open."""
        with self._condition:
            # A stop may have left the stream's thread behind: it is too late for that one.
            if self.phase in (Phase.RUNNING, Phase.STOPPING) and self.link is not Link.OPEN:
                self._move_link(Link.OPEN)

    def disconnect(self, is_verdict: bool) -> None:
        """Note that the task stream ended, broke or could not be opened.

        :param is_verdict: the platform has answered, even if badly. Silence is not a verdict.
        """
        with self._condition:
            if self.link is Link.OPEN:
                self._move_link(Link.LOST)
            elif self.link is Link.UNKNOWN and is_verdict:
                self._move_link(Link.REFUSED)

    @property
    def is_refused(self) -> bool:
        """Return True if it stops before it was ever connected, by an error which start() raises."""
        return self.is_awaited and self.error is not None and not self.was_connected

    # -- the stop (any thread) --

    def request_stop(self, timeout: Optional[float] = None, *, reason: str = STOPPED_BY_USER) -> None:
        """Begin the stop, or hurry one that has begun. Return at once.

        :param timeout: seconds for all of it; None for the worker's ``shutdown_timeout``.
        """
        seconds = self._shutdown_timeout if timeout is None else max(0.0, timeout)
        with self._condition:
            was = self.phase
            if was is Phase.NEW:
                self._move(Phase.STOPPED)
            elif was is Phase.RUNNING:
                self.deadline = Deadline(seconds)
                self.reason = reason
                # Last: whoever sees it, such as a second stop() after an interrupt of this one, sees the others too.
                self._move(Phase.STOPPING)
            elif was is Phase.STOPPING and timeout is not None:
                self.deadline.shorten(seconds)
                self._condition.notify_all()
        stopper = self._stopper
        if stopper is None or was is Phase.STOPPED:
            return
        if was is Phase.NEW:
            stopper.close_unstarted()
            return
        # Also where the stop was asked for before: an interrupt may have kept that call from beginning it.
        stopper.begin()
        if was is Phase.STOPPING:
            stopper.hurry()

    def claim_termination(self) -> bool:
        """Note that the platform ends this worker. Return True if it had not done so before."""
        with self._condition:
            was_terminated, self.is_terminated = self.is_terminated, True
        return not was_terminated

    def terminate(self, timeout: Optional[float], reason: str) -> None:
        """Stop because the platform has ordered it: waiting tasks are answered, running ones are cancelled."""
        self.claim_termination()
        self.request_stop(timeout, reason=reason)

    def fail(self, error: SekuireError) -> None:
        """Stop because of an error that a retry would not fix."""
        with self._condition:
            if self.phase is Phase.STOPPED:
                return
            if self.phase is Phase.RUNNING and self.error is None:
                self.error = error
        self._log_error(error)
        self.request_stop(reason=str(error))

    def revoke(self, error: RevokedError) -> None:
        """Stop because the installation was revoked, and announce it as a ``terminate``. Only the first call counts."""
        with self._condition:
            if self.phase not in (Phase.RUNNING, Phase.STOPPING) or self._is_revoked:
                return
            self._is_revoked = True
            if self.phase is Phase.RUNNING and not self.was_connected:
                # The platform never let it in: the caller of start() has to know.
                self.error = error
        self._log_error(error)
        is_news = self.claim_termination()
        if is_news:
            # Before the stop begins, so that no event of its end comes earlier.
            self._announcer.note_state("terminated", error.reason)
        self.terminate(error.shutdown_timeout, str(error))
        if is_news:
            self._announcer.announce(
                Command(type="terminate", reason=error.reason, shutdown_timeout=error.shutdown_timeout)
            )

    def _log_error(self, error: SekuireError) -> None:
        level = logging.DEBUG if self.is_refused else logging.ERROR
        if log.is_printed(level):
            speech.last_error = str(error)
        log.log(level, "the worker stops: %s", error)

    def leave(self, reason: str) -> bool:
        """Begin the end of a worker whose program ends. Return True if it was running; only then the rest follows."""
        with self._condition:
            if self.phase is not Phase.RUNNING:
                return False
            self.reason = reason
            self._move(Phase.STOPPING)
            return True

    def stay_in_parent(self) -> None:
        """End without a stop, in a forked child. The worker goes on in the parent. No thread runs: there is no lock."""
        self.phase = Phase.STOPPED
        self.stop_event.set()

    def finish(self) -> None:
        """Note that the stop is over."""
        with self._condition:
            if self.link is Link.OPEN:
                self._move_link(Link.LOST)
            self._move(Phase.STOPPED)

    # -- waiting (any thread) --

    def wait(self, timeout: Optional[float] = None) -> bool:
        """Wait at most ``timeout`` seconds for the end of the stop. Return True if it came."""
        return self._wait_until(lambda: self.phase is Phase.STOPPED, timeout)

    def wait_until_connected(self, timeout: Optional[float] = None) -> bool:
        """Wait at most ``timeout`` seconds for an open task stream. Return True if there is one."""
        self._wait_until(lambda: self.is_connected or self.phase is Phase.STOPPED, timeout)
        return self.is_connected

    def wait_for_verdict(self, timeout: float) -> None:
        """Wait at most ``timeout`` seconds for the platform's first answer to the login or the stream."""
        self._wait_until(lambda: self.link is not Link.UNKNOWN or self.phase is Phase.STOPPED, timeout)

    def _wait_until(self, is_reached: Callable[[], bool], timeout: Optional[float]) -> bool:
        deadline = None if timeout is None else Deadline(timeout)
        with self._condition:
            while not is_reached():
                if deadline is not None and deadline.is_expired():
                    return False
                self._condition.wait(_SLICE if deadline is None else min(_SLICE, deadline.remaining()))
            return True

    # -- the states --

    def _move(self, to: Phase) -> None:
        """Change the phase; the only place that does. Needs the lock."""
        assert to in self.phase.edges, f"{self.phase} -> {to}"
        self.phase = to
        self._condition.notify_all()

    def _move_link(self, to: Link) -> None:
        """Change what is known of the task stream; the only place that does. Needs the lock."""
        assert to in self.link.edges, f"{self.link} -> {to}"
        self.link = to
        self._condition.notify_all()
