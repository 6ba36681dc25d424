"""Audit events: noted in a moment by any thread, sent in batches by a thread of their own."""

from __future__ import annotations

import datetime as dt
import difflib
import functools
import logging
import math
import os
import threading
import time
import uuid
from collections import deque
from typing import Any, Callable, Deque, Dict, List, Mapping, NamedTuple, Optional, Tuple, Union

import attrs

from .._internal.logs import get_logger
from .._internal.threads import LONG_WAIT, Deadline, at_exit, check_process, forget_exit, join_all
from ..config import SDKConfig
from ..credentials import Authenticator, Snapshot
from ..errors import ConfigurationError, SekuireError
from ..transport.retry import full_jitter
from ..wire import protocol
from ..wire.models import Completion, Task
from ..wire.verdict import Later, Retry, Revoked, Settled, Substitute, Unauthorized, Unsupported, Verdict, verdict

__all__ = ["AuditHandler", "AuditLog", "AuditStats"]

log = get_logger("sekuire.audit")

#: A batch goes when it has so many events, or when its oldest has waited so many seconds.
BATCH, INTERVAL = 50, 10.0
#: A batch is no larger than this, in bytes: many servers take no body of more than 1 MiB.
BATCH_BYTES = 512 * 1024
#: What waits at most; beyond it the oldest go.
MAX_EVENTS, MAX_BYTES = 10_000, 8 * 1024 * 1024
#: Longest ``event_data`` of one event, in bytes of JSON.
MAX_DATA = 64 * 1024
#: Longest message of a log record or an exception in an event, in characters.
MAX_TEXT = 2000
#: Longest id or name in an event of the library's own, in characters.
_MAX_ID = 256
#: What an event is counted for besides its data, and what one of the library's own is counted for, in bytes.
_HEAD, _OWN = 300, 600
#: First and longest delay between tries of one batch, in seconds.
RETRY_MIN, RETRY_MAX = 0.1, 60.0
#: Delay after a problem that repeating is unlikely to mend, in seconds.
STUBBORN = 60.0
#: Seconds between two looks for a login that others make.
_LOOK = 0.5
#: Seconds that the end gets where the platform took nothing lately.
_LAST_TRY = 1.0
#: Seconds that an ending process tries for what is left.
_LEAVE = 2.0

_TYPES = frozenset(protocol.EVENT_TYPES)
_SEVERITIES = frozenset(protocol.SEVERITIES)
#: Failures of a task that something is broken for, where the others are decisions.
_BROKEN = frozenset(("handler_error", "timeout", "result_not_serializable", "result_too_large"))

#: Set while a thread sends events: what is logged meanwhile must not become one.
_sending = threading.local()


class _Event(NamedTuple):
    """``data`` is JSON already where it was the user's, who may change his object the moment after."""

    noted_at: float
    wall: float
    event_type: str
    severity: str
    data: Union[bytes, Mapping[str, Any]]
    size: int


class _Batch:
    """Events on their way; its content and key never change, so that the platform can tell a repetition."""

    __slots__ = ("body", "events", "key", "next_try", "size", "tries")

    def __init__(self, key: str, events: List[_Event]) -> None:
        self.key = key
        self.events = events
        self.size = sum(event.size for event in events)
        self.body: Optional[bytes] = None
        self.tries = 0
        self.next_try = 0.0


@attrs.frozen(kw_only=True, slots=True)
class AuditStats:
    """Counts of an :class:`AuditLog`: ``noted`` is the sum of ``delivered``, ``dropped`` and ``waiting``.

    ``dropped`` events went to keep the bounds, were refused by the platform, or were left at the end; the data of
    ``replaced`` ones had no JSON form, or too much, and gave way to a short description.
    """

    noted: int = 0
    delivered: int = 0
    dropped: int = 0
    waiting: int = 0
    replaced: int = 0


class AuditLog:
    """The audit events of one :class:`~sekuire.SekuireSDK`, as its attribute ``audit``.

    They go to the platform in batches: 50 events, or what has come in 10 s. What cannot be delivered is kept and tried
    again, at most 10,000 events and 8 MiB; beyond that the oldest go, counted and with one warning. A batch carries an
    ``Idempotency-Key``, so that none is taken twice. A platform that takes no logs (404, 405, 501) switches this off.

    Any thread may call anything. ``_lock`` guards all state; it is held for an append, never over I/O or a log line.
    ``sekuire-audit``, made with the first event after the login, encodes and sends; :meth:`close` ends it.

    :param scrub: takes live tokens out of JSON.
    """

    def __init__(self, config: SDKConfig, auth: Authenticator, *, scrub: Callable[[bytes], bytes]) -> None:
        self.pid = os.getpid()
        #: Random, and the same for all events of this object.
        self.session_id = uuid.uuid4().hex
        self.is_enabled = config.logging_enabled
        self._config = config
        self._auth = auth
        self._scrub = scrub
        self._path = config.endpoints.path("logs")
        self._call_timeout = config.connect_timeout + config.read_timeout
        # Reentrant: a signal's handler may log while its thread is in the middle of noting another event.
        self._lock = threading.RLock()
        self._condition = threading.Condition(self._lock)
        self._buffer: Deque[_Event] = deque()
        self._held: Optional[_Batch] = None
        self._bytes = 0
        self._noted = self._delivered = self._dropped = self._replaced = 0
        self._batches = 0
        self._flush_to = 0
        self._is_open = False
        self._may_log_in = False
        self._closing: Optional[Deadline] = None
        self._thread: Optional[threading.Thread] = None
        self._is_full = self._tell_full = False
        self._is_failing = self._is_refused = self._was_taken = self._told_closed = False

    # -- what users call --

    def log(self, event_type: str, data: Any = None, severity: str = "info") -> None:
        """Note one event; the same as :meth:`sekuire.SekuireSDK.log`."""
        _check("event_type", event_type, _TYPES, protocol.EVENT_TYPES)
        _check("severity", severity, _SEVERITIES, protocol.SEVERITIES)
        check_process(self.pid, "SekuireSDK")
        if not self.is_enabled:
            return
        encoded, is_whole = self._encode(data if isinstance(data, Mapping) else _wrapped(data))
        self._note(event_type, severity, encoded, len(encoded) + _HEAD, not is_whole)

    def passed(self, task: Task) -> None:
        """Note that the policy let a task begin. Never blocks, never raises."""
        target, task_id = task.capability[:_MAX_ID], task.task_id[:_MAX_ID]
        data = {"kind": "capability", "target": target, "task_id": task_id, "allowed": True}
        self._note("policy_check", "info", data, _OWN)

    def policy(
        self, decision: Any, kind: Optional[str] = None, target: Optional[str] = None, *, task_id: Optional[str] = None
    ) -> None:
        """Note a decision of the policy; for policy gateways and enforcers. Never blocks, never raises.

        It fits an enforcer's ``on_violation``: ``PolicyEnforcer(policy, on_violation=sdk.audit.policy)``. A decision
        with a ``rule`` is a ``policy_violation``, one without a ``policy_check`` that was passed.

        :param decision: a ``Decision``, a :class:`~sekuire.errors.PolicyViolationError`, or another object with
            ``rule`` and ``reason``, and ``allowed`` where that is known.
        :param kind: what was asked for, such as ``"tool"`` or ``"network"``; default: what the rule's id begins with.
        :param target: which, such as the tool's name or the domain.
        """
        rule = getattr(decision, "rule", None)
        data: Dict[str, Any] = {"kind": kind or str(rule or "").partition(".")[0] or None, "target": target}
        data.update({"rule": rule, "reason": getattr(decision, "reason", None), "task_id": task_id})
        data = {name: str(value)[:MAX_TEXT] for name, value in data.items() if value}
        is_allowed = getattr(decision, "allowed", None)
        if is_allowed is not None:
            data["allowed"] = bool(is_allowed)
        if rule is None:
            self._note("policy_check", "info", data, _OWN)
        else:
            self._note("policy_violation", "warn", data, _OWN + MAX_TEXT)

    def flush(self, timeout: float = 10.0) -> bool:
        """Send what has been noted until now, without waiting for a batch to fill; whether all of it is settled.

        :param timeout: seconds to wait at most. False also where the SDK has not been started.
        """
        deadline = Deadline(timeout)
        with self._lock:
            target = self._noted
            self._hurry()
            while self._noted - self._waiting() < target:
                if deadline.is_expired() or not self._is_open or self._closing is not None:
                    return False
                self._condition.wait(min(deadline.remaining(), 0.5))
            return True

    def stats(self) -> AuditStats:
        """What became of the events so far."""
        with self._lock:
            return AuditStats(
                noted=self._noted,
                delivered=self._delivered,
                dropped=self._dropped,
                waiting=self._waiting(),
                replaced=self._replaced,
            )

    def __repr__(self) -> str:
        state = "off" if not self.is_enabled else "closed" if self._closing is not None else f"{self._waiting()} wait"
        return f"<AuditLog {self.session_id[:8]} {state}>"

    # -- what the library notes by itself --

    def task(self, worker_id: str, task: Task, completion: Completion, report: Any) -> None:
        """A task has its result; ``report.code`` is the failure's code as the requester gets it, None for an output."""
        code = report.code
        data: Dict[str, Any] = {
            # The requester chooses some of these: cut, they neither drive the rest out nor fill the memory.
            "task_id": task.task_id[:_MAX_ID],
            "capability": task.capability[:_MAX_ID],
            "status": "completed" if code is None else "failed",
            "execution_time_ms": completion.execution_time_ms,
            "attempt": completion.attempt,
            "worker_id": worker_id,
        }
        if task.trace_id is not None:
            data["trace_id"] = task.trace_id[:_MAX_ID]
        severity = "info"
        if code is not None:
            data["error_code"] = code
            severity = "error" if code in _BROKEN else "warn"
        self._note("tool_execution", severity, data, _OWN if task.trace_id is None else _OWN + _MAX_ID)

    def health(self, state: str, severity: str = "info", **facts: Optional[str]) -> None:
        """The installation or a worker of it has come into another state."""
        data: Dict[str, Any] = {"state": state}
        data.update((name, value[:MAX_TEXT]) for name, value in facts.items() if value)
        self._note("health", severity, data, _OWN)

    # -- life --

    def open(self, *, may_log_in: bool = False) -> None:
        """Begin to send, once there is a login; ``may_log_in`` where nobody else makes one."""
        with self._lock:
            self._is_open = True
            self._may_log_in = self._may_log_in or may_log_in
            self._need_thread()

    def close(self, deadline: Deadline) -> bool:
        """Send what is left and end the thread, until ``deadline``; whether nothing was lost. Idempotent."""
        with self._lock:
            if self._closing is None:
                self._closing = deadline
            else:
                self._closing.shorten(deadline.remaining())
            # Where nothing suggests that it can be told now, a process that ends must not be held up.
            if self._auth.store.current.runtime_token is None:
                self._closing.shorten(_LAST_TRY if self._may_log_in else 0.0)
            elif self._is_failing:
                self._closing.shorten(_LAST_TRY)
            deadline.shorten(self._closing.remaining())
            self._hurry()
            thread = self._thread
            # No thread could be started any more: the interpreter is ending.
            is_alone = thread is None and self._is_open and self._waiting() > 0
        if is_alone:
            self._run()
        elif thread is not None:
            join_all([thread], deadline)
        with self._lock:
            left = self._clear()
        forget_exit(self)
        if left:
            log.warning("%d audit events could not be delivered before the end", left)
        return not left

    def leave(self) -> None:
        """The interpreter ends: try for what is left. Starts no thread."""
        self.close(Deadline(_LEAVE))

    # -- inside: noting --

    def _note(
        self,
        event_type: str,
        severity: str,
        data: Union[bytes, Mapping[str, Any]],
        size: int,
        is_replaced: bool = False,
    ) -> None:
        if not self.is_enabled:
            return
        event = _Event(time.monotonic(), time.time(), event_type, severity, data, size)
        with self._lock:
            if self._closing is None:
                buffer = self._buffer
                self._noted += 1
                self._replaced += is_replaced
                self._bytes += size
                buffer.append(event)
                if self._bytes > MAX_BYTES or len(buffer) > MAX_EVENTS:
                    self._make_room()
                count = len(buffer)
                if count == 1 or count == BATCH or self._bytes >= BATCH_BYTES:
                    self._need_thread()
                    self._condition.notify_all()
                return
            tell, self._told_closed = not self._told_closed, True
        if tell:
            log.debug("an audit event came after the SDK was shut down; it and all that follow are ignored")

    def _make_room(self) -> None:
        """Drop the oldest events but for those on their way. Needs the lock."""
        buffer = self._buffer
        while len(buffer) > 1 and (self._bytes > MAX_BYTES or len(buffer) > MAX_EVENTS):
            self._bytes -= buffer.popleft().size
            self._dropped += 1
        if not self._is_full:
            # Told by the thread that sends: a log line is I/O, and this is a handler's thread.
            self._is_full = self._tell_full = True
            self._condition.notify_all()

    def _encode(self, data: Mapping[str, Any]) -> Tuple[bytes, bool]:
        """JSON of the data, or of a description where that cannot be; whether it is the data itself."""
        try:
            encoded = protocol.encode_json(data if isinstance(data, dict) else dict(data))
        except Exception as error:  # noqa: BLE001  # A value may be of a class with code of its own.
            # The type alone: the text may quote the data.
            problem = f"the data has no JSON form ({type(error).__name__})"
        else:
            if len(encoded) <= MAX_DATA:
                return encoded, True
            problem = f"the data has {len(encoded)} bytes of JSON; an event takes {MAX_DATA}"
        return protocol.encode_json({"omitted": problem}), False

    def _waiting(self) -> int:
        held = self._held
        return len(self._buffer) + (0 if held is None else len(held.events))

    def _clear(self) -> int:
        """Drop all that waits; how many those were. Needs the lock."""
        left = self._waiting()
        self._buffer.clear()
        self._held = None
        self._bytes = 0
        self._dropped += left
        self._condition.notify_all()
        return left

    def _hurry(self) -> None:
        """Have all that is here sent now. Needs the lock."""
        self._flush_to = self._noted
        if self._held is not None:
            self._held.next_try = 0.0
            self._held.tries = 0
        self._condition.notify_all()

    def _need_thread(self) -> None:
        """Have the thread, where there is something to do for it. Needs the lock."""
        if self._thread is None and self._is_open and self._buffer:
            thread = threading.Thread(target=self._run, name="sekuire-audit", daemon=True)
            try:
                thread.start()
            except RuntimeError:
                # No new thread any more: the interpreter is ending; leave() sends what is here.
                return
            finally:
                at_exit(self)
            self._thread = thread

    # -- inside: the thread --

    def _run(self) -> None:
        _sending.is_active = True
        try:
            while True:
                action = self._next()
                if action is None:
                    return
                try:
                    action()
                except Exception:
                    log.exception("sending audit events failed in an unforeseen way; a batch is dropped")
                    self._drop_held()
        finally:
            _sending.is_active = False

    def _next(self) -> Optional[Callable[[], None]]:
        """What to do now, as soon as there is something; None at the end."""
        with self._lock:
            while True:
                if self._tell_full:
                    self._tell_full = False
                    return functools.partial(self._warn_full, self._dropped)
                delay = self._delay()
                if delay <= 0 and not self._is_over():
                    if self._held is None:
                        self._held = self._take()
                    return functools.partial(self._send, self._held)
                if self._is_over() or (self._closing is not None and delay >= self._closing.remaining()):
                    return None
                self._condition.wait(min(delay, LONG_WAIT))

    def _is_over(self) -> bool:
        return not self.is_enabled or (self._closing is not None and self._closing.is_expired())

    def _delay(self) -> float:
        """Seconds until there is something to send. Needs the lock."""
        now = time.monotonic()
        if self._held is not None:
            return self._held.next_try - now
        if not self._buffer:
            return math.inf
        is_due = len(self._buffer) >= BATCH or self._bytes >= BATCH_BYTES
        if is_due or self._flush_to > self._noted - self._waiting():
            return 0.0
        return self._buffer[0].noted_at + INTERVAL - now

    def _take(self) -> _Batch:
        """The oldest events, as many as one batch holds. Needs the lock."""
        events: List[_Event] = []
        size = 0
        while self._buffer and len(events) < BATCH and (not events or size + self._buffer[0].size <= BATCH_BYTES):
            event = self._buffer.popleft()
            size += event.size
            events.append(event)
        return self._batch_of(events)

    def _batch_of(self, events: List[_Event]) -> _Batch:
        self._batches += 1
        return _Batch(f"{self.session_id}:{self._batches}", events)

    def _body_of(self, batch: _Batch) -> bytes:
        config = self._config
        workspace_id = config.workspace_id or self._auth.store.current.workspace_id
        head = protocol.audit_head(
            config.agent_id, self.session_id, config.environment, workspace_id, config.agent_name
        )
        pieces = []
        for event in batch.events:
            data, is_whole = (event.data, True) if isinstance(event.data, bytes) else self._encode(event.data)
            if not is_whole:
                with self._lock:
                    self._replaced += 1
            pieces.append(data)
        # At once, and the data alone: the rest is ours. Neither compact JSON nor a token holds a newline.
        scrubbed = self._scrub(b"\n".join(pieces)).split(b"\n")
        encoded = []
        for event, data in zip(batch.events, scrubbed):
            instant = dt.datetime.fromtimestamp(event.wall, dt.timezone.utc)
            encoded.append(protocol.audit_event(head, event.event_type, event.severity, instant, data))
        return protocol.audit_body(encoded)

    def _send(self, batch: _Batch) -> None:
        if self._auth.store.current.runtime_token is None and not self._may_log_in:
            self._put_off(batch, _LOOK)
            return
        if batch.body is None:
            batch.body = self._body_of(batch)
        limit = self._call_timeout
        if self._closing is not None:
            limit = max(min(limit, self._closing.remaining()), 0.05)

        def path_of(snapshot: Snapshot) -> str:
            return self._path

        try:
            reply, _ = self._auth.request(
                "POST", path_of, body=batch.body, idempotency_key=batch.key, deadline=Deadline(limit)
            )
            found = verdict("logs", reply)
        except SekuireError as error:
            found = verdict("logs", error)
            if isinstance(found, Retry) and self._closing is not None:
                self._closing.shorten(_LAST_TRY)
        self._act_on(batch, found)

    def _act_on(self, batch: _Batch, found: Verdict) -> None:
        is_off = self._auth.support.note("logs", found)
        if isinstance(found, Settled):
            self._settle(batch)
        elif isinstance(found, Revoked):
            self._switch_off(f"{found.error}; no further audit events are sent")
        elif is_off and not self._was_taken:
            self._switch_off(f"the platform does not offer audit events ({found.error}); no more are sent")
        elif isinstance(found, Later):
            self._retry(batch, found.error, STUBBORN)
        elif isinstance(found, (Retry, Unauthorized, Unsupported)):
            # Where it has accepted some before, a 404 is a platform that is being replaced.
            least = found.delay if isinstance(found, Retry) else 0.0
            self._retry(batch, found.error, max(full_jitter(batch.tries, RETRY_MIN, RETRY_MAX), least))
        elif isinstance(found, Substitute) and len(batch.events) > 1:
            self._split(batch)
        else:
            is_news = not self._is_refused
            self._is_refused = True
            log.log(
                logging.ERROR if is_news else logging.DEBUG,
                "the platform refused %d audit events, which are dropped: %s", len(batch.events), found.error,
            )  # fmt: skip
            self._settle(batch, dropped=True)

    def _retry(self, batch: _Batch, why: SekuireError, delay: float) -> None:
        if not self._put_off(batch, delay):
            return
        is_news = not self._is_failing
        self._is_failing = True
        log.log(
            logging.WARNING if is_news else logging.DEBUG,
            "audit events were not delivered (%s); they are kept and sent again in %.1f s", why, delay,
        )  # fmt: skip

    def _put_off(self, batch: _Batch, delay: float) -> bool:
        """Send it again in ``delay`` seconds; whether it is not given up meanwhile."""
        with self._lock:
            batch.tries += 1
            batch.next_try = time.monotonic() + delay
            return self._held is batch

    def _split(self, batch: _Batch) -> None:
        """Two batches of one that is too large for the platform."""
        middle = len(batch.events) // 2
        with self._lock:
            if self._held is batch:
                self._held = self._batch_of(batch.events[:middle])
                self._buffer.extendleft(reversed(batch.events[middle:]))
                # Now, and not when the batch would have been full.
                self._flush_to = max(self._flush_to, self._noted - self._waiting() + len(batch.events))

    def _settle(self, batch: _Batch, dropped: bool = False) -> None:
        if not dropped:
            self._was_taken = True
            self._is_refused = False
            if self._is_failing:
                self._is_failing = False
                log.info("audit events are delivered again")
        with self._lock:
            if self._held is not batch:
                # Closed meanwhile, and counted as dropped: whether it came is not known any more.
                return
            self._held = None
            self._bytes -= batch.size
            if dropped:
                self._dropped += len(batch.events)
            else:
                self._delivered += len(batch.events)
            if self._bytes < MAX_BYTES // 2 and len(self._buffer) < MAX_EVENTS // 2:
                self._is_full = False
            self._condition.notify_all()

    def _drop_held(self) -> None:
        held = self._held
        if held is not None:
            self._settle(held, dropped=True)

    def _switch_off(self, why: str) -> None:
        with self._lock:
            self.is_enabled = False
            left = self._waiting()
        # Before a flush returns, which waits for the next step.
        log.warning("%s (%d are dropped)", why, left)
        with self._lock:
            self._clear()

    def _warn_full(self, dropped: int) -> None:
        log.warning(
            "audit events come faster than they are delivered: at most %d (or %d MiB) are kept, and the oldest of them "
            "are dropped (%d so far)", MAX_EVENTS, MAX_BYTES // 1024 // 1024, dropped,
        )  # fmt: skip


def _check(option: str, value: Any, known: frozenset[str], shown: Tuple[str, ...]) -> None:
    if isinstance(value, str) and value in known:
        return
    close = difflib.get_close_matches(value, shown, n=1) if isinstance(value, str) else []
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise ConfigurationError(f"must be one of {', '.join(shown)}, got {value!r}{hint}", option)


def _wrapped(data: Any) -> Dict[str, Any]:
    return {} if data is None else {"value": data}


# -- logging ----------------------------------------------------------------------------------------------------------

_LEVELS = ((logging.ERROR, "error"), (logging.WARNING, "warn"), (logging.INFO, "info"))


class AuditHandler(logging.Handler):
    """A handler for Python's logging that makes audit events of records. ::

        logging.getLogger("my_agent").addHandler(AuditHandler(sdk))

    The event holds the logger's name, the message, for an exception its type and message (no traceback and no
    variables), and the task's id where the record carries one, as those of ``ctx.logger`` do. Levels become
    severities: ``debug``, ``info``, ``warn``, ``error``. Records that come of sending events make no new ones. A
    message goes to the platform as it is: attach this to loggers whose records hold no secrets.

    :param sdk: whose events they become.
    :param level: records below it are left out.
    :param event_type: one of the protocol's.
    :raises ConfigurationError: ``sdk`` is no SekuireSDK, or the type is unknown.
    """

    def __init__(self, sdk: Any, level: Union[int, str] = logging.WARNING, event_type: str = "health") -> None:
        super().__init__(level)
        if not isinstance(getattr(sdk, "audit", None), AuditLog):
            raise ConfigurationError(f"must be a SekuireSDK, got {type(sdk).__name__}", "sdk")
        _check("event_type", event_type, _TYPES, protocol.EVENT_TYPES)
        self._audit: AuditLog = sdk.audit
        self._event_type = event_type
        self._is_lost = False

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(_sending, "is_active", False) or record.name == log.name:
            return
        try:
            if self._audit.pid == os.getpid():
                self._audit.log(self._event_type, _fields_of(record), _severity_of(record.levelno))
            elif not self._is_lost:
                # No handler may raise; and nothing of this process will ever send.
                self._is_lost = True
                check_process(self._audit.pid, "SekuireSDK")
        except Exception:  # noqa: BLE001
            self.handleError(record)


def _severity_of(level: int) -> str:
    return next((name for least, name in _LEVELS if level >= least), "debug")


def _fields_of(record: logging.LogRecord) -> Dict[str, Any]:
    fields: Dict[str, Any] = {"logger": record.name, "message": record.getMessage()[:MAX_TEXT]}
    error = record.exc_info[1] if record.exc_info else None
    if error is not None:
        fields["exception"] = {"type": type(error).__name__, "message": str(error)[:MAX_TEXT]}
    for name in ("task_id", "capability"):
        value = getattr(record, name, None)
        if isinstance(value, str):
            fields[name] = value
    return fields
