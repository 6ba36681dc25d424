"""Send the audit events of a buffer to the platform, in batches, on a thread of their own."""

from __future__ import annotations

import datetime as dt
import functools
import logging
import os
import threading
from typing import Callable, Optional, Protocol, Set

from .._internal.logs import get_logger
from .._internal.scrub import scrub_bytes, scrub_json
from .._internal.threads import LONG_WAIT, Deadline, at_exit, forget_exit, join_all, spawn
from ..config import SDKConfig
from ..credentials import Authenticator, Snapshot
from ..errors import AuthenticationError, SekuireError, TransportError
from ..transport.retry import full_jitter
from ..wire import protocol
from ..wire.verdict import Later, Retry, Revoked, Settled, Substitute, Unauthorized, Unsupported, Verdict, verdict
from .buffer import MAX_BYTES, MAX_EVENTS, Batch, Buffer, encode

__all__ = ["Connection", "Sender", "is_sending"]

log = get_logger("sekuire.audit")

#: Shortest and longest delay between tries of one batch, in seconds.
RETRY_MIN, RETRY_MAX = 0.1, 60.0
#: Delay after a problem that repeating is unlikely to fix, in seconds.
SLOW_RETRY = 60.0
#: Seconds between two looks for a login that others make.
_LOOK = 0.5
#: Seconds for the last tries if the platform accepted nothing lately.
_LAST_TRY = 1.0
#: Seconds that an ending process tries to send what is left.
_LEAVE = 2.0

#: The numbers of the threads that send events: what is logged there must not become an event. Not a threading.local,
#: which would be one for all greenlets if gevent or eventlet patches later.
_sending: Set[int] = set()


def is_sending() -> bool:
    """Return True on a thread that sends audit events."""
    return threading.get_ident() in _sending


class Connection(Protocol):
    """Describe what a :class:`Sender` uses of an installation."""

    @property
    def auth(self) -> Authenticator: ...


class Sender:
    """Send what is in a buffer, and retry until the platform has accepted it.

    :param connection: the installation, whose login and connections are used.
    """

    # Threads: any thread may call anything. The buffer's lock guards the fields up to `_thread`. `sekuire-audit` is
    # started with the first event after `open()`; it encodes and sends, and `close()` ends it. Only it, or whoever runs
    # in its place, uses the fields below `_thread`.

    def __init__(self, config: SDKConfig, connection: Connection, session_id: str, buffer: Buffer) -> None:
        self.pid = os.getpid()
        self.is_enabled = config.logging_enabled
        self._config = config
        self._auth = connection.auth
        self._session_id = session_id
        self._path = config.endpoints.path("logs")
        self._api_key = config.api_key
        self._call_timeout = config.connect_timeout + config.read_timeout
        self._buffer = buffer
        self._changed = buffer.condition
        self._is_open = False
        self._may_log_in = False
        self._closing: Optional[Deadline] = None
        self._thread: Optional[threading.Thread] = None
        #: The last batch waits for another try; it waits for one because the login was refused.
        self._is_failing = self._is_login_refused = False
        #: The last answer but "try again" refused a batch.
        self._is_refused = False
        #: The platform has accepted a batch.
        self._was_accepted = False

    @property
    def is_closing(self) -> bool:
        """Return True once :meth:`close` was called."""
        return self._closing is not None

    # -- life --

    def open(self, *, may_log_in: bool) -> None:
        """Send events from now on, as soon as there is a runtime token.

        :param may_log_in: True if this may log in, because neither a Beacon nor a Worker does.
        """
        with self._changed:
            self._is_open = True
            self._may_log_in = self._may_log_in or may_log_in
            self._need_thread()

    def wake(self) -> None:
        """Look again at what there is to send."""
        with self._changed:
            self._need_thread()
            self._changed.notify_all()

    def flush(self, deadline: Deadline) -> bool:
        """Send what is here without waiting for a batch to fill. Return True once all of it is settled."""
        with self._changed:
            target = self._buffer.noted
            self._buffer.hurry()
            while self._buffer.settled() < target:
                if deadline.is_expired() or not self._is_open or self._closing is not None:
                    return False
                self._changed.wait(min(deadline.remaining(), 0.5))
            return True

    def close(self, deadline: Deadline) -> bool:
        """Send what is left and end the thread, until ``deadline``. Return True if nothing was lost. Idempotent."""
        with self._changed:
            self._buffer.is_closed = True
            if self._closing is None:
                self._closing = deadline
            else:
                self._closing.shorten(deadline.remaining())
            # A process that ends must not be held up if nothing suggests that the platform would accept events now.
            if self._auth.store.current.runtime_token is None and self._api_key is None:
                self._closing.shorten(_LAST_TRY if self._may_log_in else 0.0)
            elif self._is_failing:
                self._closing.shorten(_LAST_TRY)
            deadline.shorten(self._closing.remaining())
            self._buffer.hurry()
            thread = self._thread
            # No thread could be started any more: the interpreter is ending.
            is_alone = thread is None and self._is_open and self._buffer.waiting() > 0
        if is_alone:
            self._run()
        elif thread is not None:
            join_all([thread], deadline)
        left = self._buffer.clear()
        forget_exit(self)
        if left:
            level = logging.DEBUG if self._is_login_refused else logging.WARNING
            log.log(level, "%d audit events could not be delivered before the end", left)
        return not left

    def leave(self) -> None:
        """Try to send what is left while the interpreter ends. Start no thread."""
        self.close(Deadline(_LEAVE))

    def _need_thread(self) -> None:
        """Start the thread, if there is something to do for it. Needs the lock."""
        if self._thread is None and self._is_open and self._closing is None and self._buffer.waiting():
            # None if the interpreter is ending: leave() sends what is here.
            self._thread = spawn(self._run, "sekuire-audit")
            at_exit(self)

    # -- on the thread --

    def _run(self) -> None:
        number = threading.get_ident()
        _sending.add(number)
        try:
            while True:
                action = self._next()
                if action is None:
                    return
                try:
                    action()
                except Exception:
                    log.exception("sending audit events failed in an unforeseen way; a batch is dropped")
                    self._buffer.drop_held()
        finally:
            _sending.discard(number)

    def _next(self) -> Optional[Callable[[], None]]:
        """Wait until there is something to do, and return it, or None at the end."""
        buffer = self._buffer
        with self._changed:
            while True:
                dropped = buffer.pop_warning()
                if dropped is not None:
                    return functools.partial(_warn_full, dropped)
                delay = buffer.delay()
                is_over = not self.is_enabled or (self._closing is not None and self._closing.is_expired())
                if delay <= 0 and not is_over:
                    return functools.partial(self._send, buffer.batch())
                if is_over or (self._closing is not None and delay >= self._closing.remaining()):
                    return None
                self._changed.wait(min(delay, LONG_WAIT))

    def body_of(self, batch: Batch) -> bytes:
        """Return the request's body for a batch, without secrets."""
        config = self._config
        workspace_id = config.workspace_id or self._auth.store.current.workspace_id
        head = protocol.audit_head(
            config.agent_id, self._session_id, config.environment, workspace_id, config.agent_name
        )
        pieces = []
        for event in batch.events:
            data, is_whole = (event.data, True) if isinstance(event.data, bytes) else encode(event.data)
            if not is_whole:
                self._buffer.note_replaced()
            pieces.append(data)
        # All at once, because there is rarely a secret, and the data alone: the rest is ours.
        joined = b"\n".join(pieces)
        if scrub_bytes(joined) is not joined:
            pieces = [scrub_json(piece) for piece in pieces]
        encoded = []
        for event, data in zip(batch.events, pieces):
            instant = dt.datetime.fromtimestamp(event.wall, dt.timezone.utc)
            encoded.append(protocol.audit_event(head, event.event_type, event.severity, instant, data))
        return protocol.audit_body(encoded)

    def _send(self, batch: Batch) -> None:
        has_token = self._auth.store.current.runtime_token is not None
        if not has_token and self._api_key is None and not self._may_log_in:
            self._buffer.put_off(batch, _LOOK)
            return
        if batch.body is None:
            batch.body = self.body_of(batch)
        limit = self._call_timeout
        if self._closing is not None:
            limit = max(min(limit, self._closing.remaining()), 0.05)

        def path_of(snapshot: Snapshot) -> str:
            return self._path

        try:
            if has_token or self._api_key is None:
                reply, _ = self._auth.request(
                    "POST", path_of, body=batch.body, idempotency_key=batch.key, deadline=Deadline(limit)
                )
            else:
                # The older platform knows no runtime tokens, and the key is all there is.
                key = functools.partial(protocol.api_key_header, self._api_key)
                reply = self._auth.login.http.request(
                    "POST", self._path, body=batch.body, credential=key, idempotency_key=batch.key, timeout=limit
                )
            found = verdict("logs", reply)
        except SekuireError as error:
            found = verdict("logs", error)
            if isinstance(found, Retry) and self._closing is not None:
                self._closing.shorten(_LAST_TRY)
        self._act_on(batch, found)

    def _act_on(self, batch: Batch, found: Verdict) -> None:
        is_off = self._auth.support.note("logs", found)
        if isinstance(found, Settled):
            self._note_delivery()
            self._buffer.settle(batch)
        elif isinstance(found, Revoked):
            self._switch_off(f"{found.error}; no further audit events are sent")
        elif is_off and not self._was_accepted:
            self._switch_off(f"the platform does not offer audit events ({found.error}); no more are sent")
        elif isinstance(found, Later):
            self._retry(batch, found.error, SLOW_RETRY)
        elif isinstance(found, (Retry, Unauthorized, Unsupported)):
            # If it has accepted some before, a 404 comes from a platform that is being replaced.
            least = 0.0 if isinstance(found, Unsupported) else found.delay
            self._retry(batch, found.error, max(full_jitter(batch.tries, RETRY_MIN, RETRY_MAX), least))
        elif isinstance(found, Substitute) and len(batch.events) > 1:
            self._buffer.split(batch)
        else:
            is_news = not self._is_refused
            self._is_refused = True
            log.log(
                logging.ERROR if is_news else logging.DEBUG,
                "the platform refused %d audit events, which are dropped: %s", len(batch.events), found.error,
            )  # fmt: skip
            self._buffer.settle(batch, is_dropped=True)

    def _note_delivery(self) -> None:
        self._was_accepted = True
        self._is_refused = False
        if self._is_failing:
            self._is_failing = self._is_login_refused = False
            log.info("audit events are delivered again")

    def _retry(self, batch: Batch, why: SekuireError, delay: float) -> None:
        if not self._buffer.put_off(batch, delay):
            return
        is_news = not self._is_failing
        self._is_failing = True
        # An outage and a refused login are said by those who cannot work without the platform.
        is_said = isinstance(why, (AuthenticationError, TransportError)) or self._auth.reach.is_lost
        self._is_login_refused = isinstance(why, AuthenticationError)
        log.log(
            logging.WARNING if is_news and not is_said else logging.DEBUG,
            "audit events were not delivered (%s); they are kept and sent again in %.1f s", why, delay,
        )  # fmt: skip

    def _switch_off(self, why: str) -> None:
        with self._changed:
            self.is_enabled = False
            left = self._buffer.waiting()
        # Before a flush returns, which waits for the next step.
        log.warning("%s (%d are dropped)", why, left)
        self._buffer.clear()


def _warn_full(dropped: int) -> None:
    log.warning(
        "audit events come faster than they are delivered: at most %d (or %d MiB) are kept, and the oldest of them "
        "are dropped (%d so far)", MAX_EVENTS, MAX_BYTES // 1024 // 1024, dropped,
    )  # fmt: skip
