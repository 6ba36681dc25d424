"""Connect to one worker's task stream, read it, reconnect, and hand what comes to a listener."""

from __future__ import annotations

import threading
from typing import Any, Dict, Optional, Protocol, Set, Union

from .._internal.clock import time
from .._internal.logs import SparseLog, get_logger
from .._internal.threads import Deadline, join_all, owned_by
from ..config import WorkerConfig
from ..credentials import Authenticator, Snapshot
from ..credentials.login import RENEWAL_TIMEOUT, bearer_of
from ..errors import APIError, PlanLimitError, RevokedError, SekuireError, StreamError, TransportError
from ..transport.live import LiveAnswer, LiveClient
from ..transport.retry import Backoff, Interrupted
from ..transport.sse import Event, EventStream
from ..wire import protocol
from ..wire.models import Approval, Cancel, Command, Connected, Task
from ..wire.verdict import Failed, Retry, Revoked, Settled, Unauthorized, verdict
from .life import Life, Phase
from .profile import Profile

log = get_logger("sekuire.stream")

#: Bounds of a server's ``retry:``, in seconds.
_RETRY_LOW, _RETRY_HIGH = 0.1, 60.0


class StreamListener(Protocol):
    """Receive what comes in a stream, on the stream's thread. While a call blocks, the stream is not read."""

    def on_login(self) -> None:
        """Prepare for the stream: there are credentials, and it is opened next."""

    def on_first_open(self, url: str, after: Optional[float]) -> None:
        """Say that the worker is connected. ``after``: how many seconds it could not be, if that was said."""

    def on_connected(self, connected: Connected, as_of: float) -> None:
        """Act on the greeting. The platform has not said it before ``as_of`` (``time.monotonic()``)."""

    def on_task(self, task: Task) -> None:
        """Accept a task."""

    def on_malformed_task(self, error: protocol.MalformedTask) -> None:
        """Answer a task that could not be read."""

    def on_command(self, command: Command) -> None:
        """Carry out a command."""

    def on_cancel(self, cancel: Cancel) -> None:
        """Cancel one task."""

    def on_approval(self, approval: Approval) -> None:
        """Pass on the decision on a request for approval."""

    def on_reopen(self) -> None:
        """Make good what may have been lost while the stream was not open."""

    def on_unusable_event(self) -> None:
        """Count an event that was skipped: one that is too large, or a command that could not be read."""


class TaskStream:
    """Read one worker's task stream until the worker stops or the platform refuses the stream for a lasting reason.

    docs/protocol.md describes it (``GET /tasks/stream``).
    """

    # Threads: run() is the stream thread's. wake() may be called from any thread after the stop event was set, and ends
    # a connect, a read or a wait for headers at once. No locks: all state belongs to the stream's thread; `connected`
    # and `reconnects` are single values that others only read.

    def __init__(
        self,
        config: WorkerConfig,
        auth: Authenticator,
        listener: StreamListener,
        profile: Profile,
        life: Life,
    ) -> None:
        self.connected = False
        self.reconnects = 0
        self._config = config
        self._auth = auth
        self._reach = auth.reach
        self._listener = listener
        self._profile = profile
        self._life = life
        self._stop = life.stop_event
        self._thread = threading.Thread(target=self._serve, name="sekuire-stream", daemon=True)
        self._live = LiveClient(config)
        self._backoff = Backoff(config.reconnect_min, config.reconnect_max)
        self._path = config.endpoints.path("task_stream")
        #: The fewest seconds before the next try, by what was wrong with this one.
        self._least_delay = 0.0
        self._last_event_id = ""
        self._was_open = False
        self._opened_at: Optional[float] = None
        #: When the stream was asked for, until it has said ``connected``.
        self._asked_at: Optional[float] = None
        self._refused: Optional[int] = None
        self._ignored: Set[str] = set()
        self._malformed_log = SparseLog(log.name)

    def start(self) -> None:
        """Begin to read, on the thread ``sekuire-stream``."""
        self._thread.start()

    def has_ended(self) -> bool:
        """Return True if the stream's thread has lived."""
        return self._thread.ident is not None and not self._thread.is_alive()

    def join(self, deadline: Deadline) -> bool:
        """Wait for the stream's thread. Return True if it ended before ``deadline``."""
        return not join_all([self._thread], deadline)

    def _serve(self) -> None:
        """Read until the stop. Stop the worker if an error ends the reading before."""
        with owned_by(self._life.owner):
            error: Optional[SekuireError] = None
            try:
                self.run()
            except RevokedError as revoked:
                self._life.revoke(revoked)
            except SekuireError as fatal:
                error = fatal
            except BaseException as unforeseen:  # sys.exit() in a policy gateway, for example.
                if self._life.phase is Phase.STOPPED:
                    # A copy of the stream's greenlet in a forked child, whose sockets were closed.
                    return
                log.exception("the stream's thread failed")
                error = SekuireError(f"the stream's thread failed ({type(unforeseen).__name__}); see the log")
            if error is not None:
                self._life.fail(error)

    def run(self) -> None:
        """Read until ``stop`` is set.

        :raises AuthenticationError, ConfigurationError: no login method is left.
        :raises StreamError, PlanLimitError: the platform's answer says that a retry cannot help.
        :raises RevokedError: the installation was revoked.
        """
        try:
            while not self._stop.is_set():
                problem = self._try()
                self.connected = False
                if self._stop.is_set():
                    return
                # An answer is a verdict, even a bad one; silence is not.
                is_verdict = problem is not None and not isinstance(problem, TransportError)
                self._life.disconnect(is_verdict)
                if self._opened_at is not None:
                    self._backoff.was_open(time.monotonic() - self._opened_at)
                delay = max(self._backoff.next(getattr(problem, "retry_after", None)), self._least_delay)
                if problem is None:
                    log.info("the task stream ended; reconnecting in %.1f s", delay)
                else:
                    self._reach.fail(self, problem)
                    log.debug("the task stream is not open (%s); reconnecting in %.1f s", problem, delay)
                self._stop.wait(delay)
                if not self._stop.is_set() and self._was_open:
                    self.reconnects += 1
        finally:
            self.connected = False
            self._reach.leave(self)
            self._live.close()

    def wake(self) -> None:
        """End what the stream's thread waits for on the network."""
        self._live.wake()

    # -- one connection --

    def _try(self) -> Optional[SekuireError]:
        """Open the stream and read it to its end, as :meth:`_listen`. Return also what cannot pass, if it may wait."""
        self._least_delay = 0.0
        try:
            return self._listen()
        except SekuireError as error:
            if self._life.is_required or self._was_open or isinstance(error, RevokedError):
                raise
            # Refused for a lasting reason: it is not asked for often.
            self._least_delay = self._config.reconnect_max
            return error

    def _listen(self) -> Optional[SekuireError]:
        """Open the stream and read it to its end. Return what was wrong, if that may pass."""
        answer: Optional[LiveAnswer] = None
        self._opened_at = None
        try:
            snapshot = self._auth.snapshot(Deadline(RENEWAL_TIMEOUT))
            if self._stop.is_set():
                # Who stopped the worker has not waited for this thread: nothing must be attached to it any more.
                return None
            self._listener.on_login()
            answer = self._open(snapshot)
            found = verdict("task_stream", answer)
            if isinstance(found, Settled):
                self._refused = None
                self._auth.store.prove(snapshot.generation)
                self._read(answer)
                return None
            answer.close()
            if isinstance(found, Unauthorized):
                return self._renew(snapshot, found)
            return self._problem(found, answer)
        except Interrupted:
            return None
        except (TransportError, APIError) as error:
            if isinstance(error, APIError) and not protocol.is_transient(error.status) and error.status != 404:
                raise
            if isinstance(error, TransportError) and not error.retryable and not self._was_open:
                fatal = StreamError(str(error))
            else:
                return error
        finally:
            if answer is not None:
                answer.close()
        raise fatal

    def _open(self, snapshot: Snapshot) -> LiveAnswer:
        headers: Dict[str, Union[str, bytes]] = {}
        event_id = protocol.event_id_header(self._last_event_id)
        if event_id is not None:
            headers["Last-Event-ID"] = event_id
        path = f"{self._path}?{self._profile.stream_query(snapshot.credentials.installation_id)}"
        self._asked_at = time.monotonic()
        return self._live.open(path, credential=bearer_of(snapshot), headers=headers)

    def _renew(self, snapshot: Snapshot, found: Unauthorized) -> Optional[SekuireError]:
        fresh = self._auth.rejected(snapshot.generation, Deadline(RENEWAL_TIMEOUT), is_foreign=found.is_foreign)
        first = self._refused is None
        self._refused = fresh.generation
        # With a fresh token there is nothing to wait for; should that be refused too, the backoff slows this down.
        return self._listen() if first else found.error

    def _problem(self, found: Failed, answer: LiveAnswer) -> SekuireError:
        """Return why the stream is not open, if that may pass.

        :raises SekuireError: it cannot pass.
        """
        if isinstance(found, Retry) and (self._was_open or not found.is_fatal_at_first):
            return found.error
        if isinstance(found, Revoked) or isinstance(found.error, PlanLimitError):
            raise found.error
        if isinstance(found.error, APIError) and found.error.code == protocol.CODE_WRONG_AGENT:
            raise StreamError(
                f"{self._auth.store.origin}, and this one is {self._config.agent_id!r}; give each agent credentials of "
                f"its own, in a file of its own ({found.error})"
            )
        url = self._live.route.base + self._path
        if isinstance(found, Retry):
            kind = protocol.one_line(answer.headers.get("Content-Type", ""))[:80] or "none"
            raise StreamError(
                f"{url} answered {answer.status} with content type {kind!r}, not a task stream: {found.error}; "
                "is api_base_url right, or is endpoints= needed?"
            )
        raise StreamError(f"{url} refused the task stream: {found.error}")

    def _read(self, answer: LiveAnswer) -> None:
        events = EventStream(
            answer.chunks(self._config.stream_idle_timeout),
            max_event_bytes=self._config.max_event_bytes,
            last_event_id=self._last_event_id,
        )
        was_open, self._was_open = self._was_open, True
        self.connected = True
        self._opened_at = time.monotonic()
        self._life.connect()
        after = self._reach.restore(self)
        if was_open:
            log.info("the task stream is open again")
            self._listener.on_reopen()
        else:
            self._listener.on_first_open(self._live.route.base, after)
        oversized = 0
        handled = True
        try:
            for event in events.events():
                handled = False
                self._handle(event)
                handled = True
                # Only now: an event that was not handled must be asked for again.
                self._last_event_id = events.last_event_id
                if events.oversized > oversized:
                    oversized = self._count_oversized(events, oversized)
                if self._stop.is_set():
                    return
        finally:
            if handled:
                self._last_event_id = events.last_event_id
            self._count_oversized(events, oversized)
            if events.retry is not None:
                self._backoff.first = min(max(events.retry / 1000.0, _RETRY_LOW), _RETRY_HIGH)

    def _count_oversized(self, events: EventStream, known: int) -> int:
        for _ in range(events.oversized - known):
            self._listener.on_unusable_event()
        return events.oversized

    def _handle(self, event: Event) -> None:
        kind = event.event
        try:
            if kind == protocol.EVENT_TASK:
                self._listener.on_task(protocol.decode_task(event.data))
            elif kind == protocol.EVENT_COMMAND:
                self._listener.on_command(protocol.decode_command(event.data))
            elif kind == protocol.EVENT_CANCEL:
                self._listener.on_cancel(protocol.decode_cancel(event.data))
            elif kind == protocol.EVENT_APPROVAL:
                self._listener.on_approval(protocol.parse_approval(event.data))
            elif kind == protocol.EVENT_CONNECTED:
                as_of, self._asked_at = self._asked_at, None
                connected = protocol.decode_connected(event.data)
                self._listener.on_connected(connected, time.monotonic() if as_of is None else as_of)
            elif kind == protocol.EVENT_MESSAGE:
                task = protocol.decode_untyped_task(event.data)
                if task is not None:
                    self._listener.on_task(task)
            elif kind != protocol.EVENT_PING:
                self._ignore(kind)
        except protocol.MalformedTask as error:
            self._listener.on_malformed_task(error)
        except protocol.Malformed as error:
            self._malformed_log.error("the platform sent a command that cannot be read: %s", error)
            self._listener.on_unusable_event()

    def _ignore(self, kind: Any) -> None:
        # Bounded, because the names come from outside.
        if kind not in self._ignored and len(self._ignored) < 100:
            self._ignored.add(kind)
            log.debug("events of the unknown type %r are ignored", kind[:80])
