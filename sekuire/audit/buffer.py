"""Hold the audit events that wait to be delivered: bounded, counted, and in the order in which they came."""

from __future__ import annotations

import json
import math
import threading
from collections import deque
from typing import Any, Deque, Dict, List, Mapping, NamedTuple, Optional, Tuple, Union

import attrs

from .._internal.clock import time
from .._internal.logs import get_logger
from .._internal.values import Value
from ..secret import Secret
from ..wire import protocol

__all__ = ["AuditStats", "Batch", "Buffer", "Event", "encode"]

log = get_logger("sekuire.audit")

#: A batch is sent when it has this many events, or when its oldest event has waited this many seconds.
BATCH, INTERVAL = 50, 10.0
#: Most bytes of a batch: many servers accept no body of more than 1 MiB.
BATCH_BYTES = 512 * 1024
#: How much waits at most. Beyond it the oldest events are dropped.
MAX_EVENTS, MAX_BYTES = 10_000, 8 * 1024 * 1024
#: Longest ``event_data`` of one event, in bytes of JSON.
MAX_DATA = 64 * 1024


class Event(NamedTuple):
    """Hold one event. ``data`` is JSON text if it came from the user, who may change the object afterwards."""

    noted_at: float
    wall: float
    event_type: str
    severity: str
    data: Union[bytes, Mapping[str, Any]]
    size: int

    def __repr__(self) -> str:
        # Without the data, from which secrets are removed when it is sent.
        return f"<Event {self.event_type} {self.severity} of {self.size} bytes>"


class Batch:
    """Hold the events of one request. Events and key never change, so that the platform can recognise a repetition."""

    __slots__ = ("body", "events", "key", "next_try", "size", "tries")

    def __init__(self, key: str, events: List[Event]) -> None:
        self.key = key
        self.events = events
        self.size = sum(event.size for event in events)
        self.body: Optional[bytes] = None
        self.tries = 0
        self.next_try = 0.0


@attrs.frozen(kw_only=True, slots=True, eq=False, repr=False)
class AuditStats(Value):
    """Count the events of an :class:`AuditLog`: ``noted`` is the sum of ``delivered``, ``dropped`` and ``waiting``.

    ``dropped`` events went beyond the bounds, were refused by the platform, or were left at the end. The data of
    ``replaced`` ones had no JSON form or was too large; a short description took its place.
    """

    noted: int = 0
    delivered: int = 0
    dropped: int = 0
    waiting: int = 0
    replaced: int = 0


def _encode(data: Dict[str, Any]) -> bytes:
    try:
        return protocol.encode_json(data)
    except TypeError:
        # json.dumps costs more with a function for other types, which few events need.
        return json.dumps(data, default=_mask, allow_nan=False, ensure_ascii=False, separators=(",", ":")).encode()


def _mask(value: object) -> str:
    if isinstance(value, Secret):
        return "***"
    raise TypeError(type(value).__name__)


def encode(data: Mapping[str, Any]) -> Tuple[bytes, bool]:
    """Return the data as JSON, and True. Without a JSON form, or if it is too large, return a description and False."""
    try:
        encoded = _encode(data if isinstance(data, dict) else dict(data))
    except Exception as error:  # noqa: BLE001  # A value may be of a class with code of its own.
        # The type alone: the text may quote the data.
        problem = f"the data has no JSON form ({type(error).__name__})"
    else:
        if len(encoded) <= MAX_DATA:
            return encoded, True
        problem = f"the data has {len(encoded)} bytes of JSON; the limit of an event is {MAX_DATA}"
    return protocol.encode_json({"omitted": problem}), False


class Buffer:
    """Hold the events that wait, and the batch that is on its way.

    :param session_id: begins the key of each batch.
    """

    # Threads: any thread may call anything. `_lock`, the lock of `condition`, guards all fields, and `condition` is
    # notified of each change that a thread may wait for. The lock is held for an append, and never over I/O or a log
    # line. It is reentrant: a signal's handler may log while its thread is in the middle of noting another event.

    def __init__(self, session_id: str) -> None:
        self._lock = threading.RLock()
        self.condition = threading.Condition(self._lock)
        self.is_closed = False
        self._session_id = session_id
        self._events: Deque[Event] = deque()
        self._held: Optional[Batch] = None
        self._bytes = 0
        self._noted = self._delivered = self._dropped = self._replaced = 0
        self._batches = 0
        #: Events up to this number are sent now, without waiting for a batch to fill.
        self._flush_to = 0
        self._is_full = self._should_warn = self._has_ignored = False

    # -- noting --

    def note(self, event: Event, is_replaced: bool = False) -> bool:
        """Add an event. Return True if the sender must look: the event is the first one, or a batch is full."""
        with self._lock:
            if not self.is_closed:
                events = self._events
                self._noted += 1
                self._replaced += is_replaced
                self._bytes += event.size
                events.append(event)
                if self._bytes > MAX_BYTES or len(events) > MAX_EVENTS:
                    self._drop_oldest()
                count = len(events)
                return count == 1 or count == BATCH or self._bytes >= BATCH_BYTES
            is_first, self._has_ignored = not self._has_ignored, True
        if is_first:
            log.debug("an audit event came after the SDK was shut down; it and all that follow are ignored")
        return False

    def note_replaced(self) -> None:
        """Count an event whose data was replaced by a description."""
        with self._lock:
            self._replaced += 1

    def _drop_oldest(self) -> None:
        """Drop the oldest events, except those on their way, until the rest fits. Needs the lock."""
        events = self._events
        while len(events) > 1 and (self._bytes > MAX_BYTES or len(events) > MAX_EVENTS):
            self._bytes -= events.popleft().size
            self._dropped += 1
        if not self._is_full:
            # The thread that sends logs it: a log line is I/O, and this is a handler's thread.
            self._is_full = self._should_warn = True
            self.condition.notify_all()

    # -- looking --

    def waiting(self) -> int:
        """Return how many events are not delivered yet."""
        held = self._held
        return len(self._events) + (0 if held is None else len(held.events))

    def stats(self) -> AuditStats:
        """Return what became of the events so far."""
        with self._lock:
            return AuditStats(
                noted=self._noted,
                delivered=self._delivered,
                dropped=self._dropped,
                waiting=self.waiting(),
                replaced=self._replaced,
            )

    def settled(self) -> int:
        """Return how many events are delivered or dropped. Needs the lock."""
        return self._noted - self.waiting()

    @property
    def noted(self) -> int:
        """Return how many events were noted so far."""
        return self._noted

    def delay(self) -> float:
        """Return the seconds until there is something to send. Needs the lock."""
        now = time.monotonic()
        if self._held is not None:
            return self._held.next_try - now
        if not self._events:
            return math.inf
        is_due = len(self._events) >= BATCH or self._bytes >= BATCH_BYTES
        if is_due or self._flush_to > self.settled():
            return 0.0
        return self._events[0].noted_at + INTERVAL - now

    def pop_warning(self) -> Optional[int]:
        """Return how many events were dropped, if that has to be logged now. Needs the lock."""
        should_warn, self._should_warn = self._should_warn, False
        return self._dropped if should_warn else None

    # -- sending --

    def hurry(self) -> None:
        """Make every waiting event due now. Needs the lock."""
        self._flush_to = self._noted
        if self._held is not None:
            self._held.next_try = 0.0
            self._held.tries = 0
        self.condition.notify_all()

    def batch(self) -> Batch:
        """Return the batch on its way, or else the oldest events as a new one. Needs the lock."""
        if self._held is None:
            events: List[Event] = []
            size = 0
            waiting = self._events
            while waiting and len(events) < BATCH and (not events or size + waiting[0].size <= BATCH_BYTES):
                event = waiting.popleft()
                size += event.size
                events.append(event)
            self._held = self._make(events)
        return self._held

    def put_off(self, batch: Batch, delay: float) -> bool:
        """Send the batch again in ``delay`` seconds. Return True unless it was given up before."""
        with self._lock:
            batch.tries += 1
            batch.next_try = time.monotonic() + delay
            return self._held is batch

    def split(self, batch: Batch) -> None:
        """Make two batches of one that is too large for the platform."""
        middle = len(batch.events) // 2
        with self._lock:
            if self._held is batch:
                self._held = self._make(batch.events[:middle])
                self._events.extendleft(reversed(batch.events[middle:]))
                # Now, and not when the batch would have been full.
                self._flush_to = max(self._flush_to, self.settled() + len(batch.events))

    def settle(self, batch: Batch, *, is_dropped: bool = False) -> None:
        """Count the batch as delivered or dropped."""
        with self._lock:
            if self._held is not batch:
                # The buffer was closed, and counted it as dropped: whether it came is not known any more.
                return
            self._held = None
            self._bytes -= batch.size
            if is_dropped:
                self._dropped += len(batch.events)
            else:
                self._delivered += len(batch.events)
            if self._bytes < MAX_BYTES // 2 and len(self._events) < MAX_EVENTS // 2:
                self._is_full = False
            self.condition.notify_all()

    def drop_held(self) -> None:
        """Drop the batch on its way."""
        held = self._held
        if held is not None:
            self.settle(held, is_dropped=True)

    def clear(self) -> int:
        """Drop all that waits, and return how many events that were."""
        with self._lock:
            left = self.waiting()
            self._events.clear()
            self._held = None
            self._bytes = 0
            self._dropped += left
            self.condition.notify_all()
            return left

    def _make(self, events: List[Event]) -> Batch:
        self._batches += 1
        return Batch(f"{self._session_id}:{self._batches}", events)
