"""Serve the live event streams: assign tasks to connected workers, and notice workers that disconnect."""

from __future__ import annotations

import collections
import contextlib
import enum
import errno
import heapq
import itertools
import queue
import selectors
import socket
import threading
from typing import (
    Any,
    Callable,
    Collection,
    Counter,
    Deque,
    Dict,
    FrozenSet,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    NoReturn,
    Optional,
    Sequence,
    Set,
    Tuple,
    Union,
)

from .._internal.clock import time
from .._internal.logs import get_logger
from ..wire.protocol import EVENT_CANCEL, EVENT_COMMAND, EVENT_CONNECTED, EVENT_TASK, encode_json
from .record import Record
from .store import Completed, Identity, Refusal, Settings, Store, cancel_event, revoked

__all__ = ["Hub", "Stream", "StreamBody", "Watch", "break_off"]

logger = get_logger("sekuire.local")

KEEP_ALIVE = b": keep-alive\n\n"


class _Sign(enum.Enum):
    """Signal something other than an event in a stream's queue."""

    #: End the answer properly, or cut it.
    END = "end"
    CUT = "cut"
    #: End a stall.
    RESUME = "resume"


class _Stall(NamedTuple):
    """Send nothing until a time of the monotonic clock."""

    end: float


_END, _CUT, _RESUME = _Sign
#: Workers that have disconnected, which are remembered.
_MOST_LEFT = 1000

Key = Tuple[str, str]
Item = Union[bytes, _Sign, _Stall]


class Stream:
    """Hold the state of one open stream. The hub's lock guards all but ``outbox``."""

    def __init__(
        self,
        identity: Identity,
        worker_id: str,
        max_in_flight: int,
        capabilities: Optional[FrozenSet[str]],
        sock: Optional[socket.socket],
    ) -> None:
        self.identity = identity
        self.worker_id = worker_id
        self.key: Key = (identity.installation_id, worker_id)
        self.max_in_flight = max_in_flight
        self.capabilities = capabilities
        self.socket = sock
        #: The watch on the stream's socket.
        self.watch: Optional[Watch] = None
        #: What to send, in order. Its HTTP thread waits on it, and any thread may put.
        self.outbox: queue.SimpleQueue[Item] = queue.SimpleQueue()
        #: The tasks that the worker has: task and attempt.
        self.in_flight: Set[Tuple[str, int]] = set()
        #: Tasks that the worker released on this stream, which does not get them again.
        self.refused: Set[str] = set()
        self.desired_state = "running"
        #: The state of the worker in its last heartbeat.
        self.reported: Optional[str] = None
        self.turn = 0

    @property
    def paused(self) -> bool:
        return self.desired_state == "paused" or self.reported == "paused"

    @property
    def closing(self) -> bool:
        return self.desired_state == "terminated" or self.reported in ("stopping", "stopped")

    @property
    def room(self) -> int:
        return 0 if self.closing else self.max_in_flight - len(self.in_flight)

    @property
    def accepted(self) -> Collection[Optional[str]]:
        """The capabilities whose tasks it accepts now. None stands for all of them."""
        if self.paused or self.closing:
            return ()
        return (None,) if self.capabilities is None else self.capabilities

    def serves(self, capability: str) -> bool:
        return self.capabilities is None or capability in self.capabilities


class Hub:
    """Assign tasks to streams."""

    # Threads: HTTP threads call it (a stream opens, a task is submitted or completed), users' threads, and the watch
    # thread (a client has disconnected, a delay has passed). `_lock` guards every attribute. The store's lock is
    # acquired under it, never the other way round. Nothing is written to a socket under it: events go into the stream's
    # queue, and the stream's own HTTP thread writes them.

    def __init__(self, store: Store, record: Record, settings: Settings, max_streams: int) -> None:
        self._store = store
        self._record = record
        self._settings = settings
        self._max_streams = max_streams
        self._lock = threading.Lock()
        self._streams: Dict[Key, Stream] = {}
        #: Agent → how many streams that accept tasks serve each capability. Counted again after a stream has changed.
        self._served: Dict[str, Counter[Optional[str]]] = {}
        self._turns = itertools.count(1)
        #: Callers of wait(), and requests that wait for a task's end.
        self._waiters: Dict[str, List[Callable[[], None]]] = {}
        self._polls: Dict[str, List[Callable[[], None]]] = {}
        #: Installation → the cancelled tasks that the answer to its last heartbeat has named.
        self._named: Dict[str, FrozenSet[str]] = {}
        #: None while the platform is stopped.
        self._watch: Optional[Watch] = None
        #: While true, commands are recorded but not sent on the streams.
        self.hold_commands = False
        #: How many streams each worker has opened, so that a late timer of an earlier connection does nothing.
        self._epochs: Dict[Key, int] = {}
        #: What was noted of the last workers that have disconnected.
        self._left: Dict[Key, Dict[str, Any]] = {}

    def start(self, watch: Watch) -> None:
        """Continue from the database: workers that have tasks count as disconnected now, and delays go on."""
        with self._lock:
            self._watch = watch
            self._epochs.clear()
            for installation_id, worker_id, agent_id in self._store.assigned_workers():
                self._gone((installation_id, worker_id), agent_id)
            for installation_id, end in self._store.draining():
                self._close_at(installation_id, end)
            for agent_id, capability, due in self._store.delayed():
                self._offer_later(due - time.time(), agent_id, capability)
            for due in self._store.expiring():
                self._later(due - time.time() + 0.01, self.expire)

    def close(self) -> None:
        """End every stream properly. Calls of wait() go on, because the platform may start again."""
        with self._lock:
            self._watch = None
            streams = list(self._streams.values())
            self._streams.clear()
            self._served.clear()
        for stream in streams:
            stream.outbox.put(_END)
        self._end_polls()

    # -- streams ------------------------------------------------------------------------------------------------------

    def open(self, stream: Stream, last_event_id: Optional[int]) -> None:
        """Open a new stream. Its first events are in its queue when this returns.

        :raises Refusal: 403 revoked, 503 too many streams or the platform is stopping.
        """
        installation_id = stream.identity.installation_id
        with self._lock:
            known = self._store.installation(installation_id)
            if known["revoked"]:
                raise revoked(known["reason"])
            watch = self._watch
            if watch is None:
                raise Refusal(503, "STOPPED", "the local platform is stopping")
            old = self._streams.get(stream.key)
            if old is None and len(self._streams) >= self._max_streams:
                raise Refusal(503, "TOO_MANY_STREAMS", "no room for another stream; raise max_streams")
            stream.desired_state = known["desired_state"]
            first, missed = self._store.commands_since(installation_id, last_event_id)
            connected = {
                "installation_id": installation_id,
                "heartbeat_interval_seconds": self._settings.heartbeat_interval,
                "desired_state": stream.desired_state,
            }
            stream.outbox.put(_frame(EVENT_CONNECTED, encode_json(connected).decode(), first))
            for event_id, data in missed:
                stream.outbox.put(_frame(EVENT_COMMAND, data, event_id))
            for claim in self._store.assigned(*stream.key):
                stream.in_flight.add((claim.task_id, claim.attempt))
                stream.outbox.put(_frame(EVENT_CANCEL if claim.is_cancelled else EVENT_TASK, claim.data))
            self._streams[stream.key] = stream
            self._served.clear()
            self._epochs[stream.key] = self._epochs.get(stream.key, 0) + 1
            self._record.note(
                "connect", agent_id=stream.identity.agent_id, installation_id=installation_id,
                worker_id=stream.worker_id, capabilities=stream.capabilities, state=stream.desired_state,
            )  # fmt: skip
            self._fill(stream)
        if old is not None:
            # The same worker has connected again: its old connection is dead, even if that was not noticed yet.
            old.outbox.put(_END)
        if stream.socket is not None:
            stream.watch = watch
            watch.add(stream.socket, lambda: self.lose(stream))

    def leave(self, stream: Stream) -> None:
        """Handle the end of a stream: its HTTP thread will close the socket next."""
        if stream.socket is not None and stream.watch is not None:
            stream.watch.remove(stream.socket)
        self._detach(stream)

    def lose(self, stream: Stream) -> None:
        """Handle that a stream's client has disconnected."""
        self._detach(stream)
        stream.outbox.put(_CUT)

    def drop_all(self, installation_id: Optional[str] = None) -> int:
        """Cut every live stream, or those of one installation, at its socket. Return their number."""
        streams = [stream for stream in self._all() if installation_id in (None, stream.identity.installation_id)]
        for stream in streams:
            self.lose(stream)
            if stream.socket is not None:
                with contextlib.suppress(OSError):
                    stream.socket.shutdown(socket.SHUT_RDWR)
        return len(streams)

    def lose_all(self) -> None:
        """Handle the loss of the network: every client has disconnected."""
        for stream in self._all():
            self.lose(stream)
        self._end_polls()

    def stall_all(self, seconds: float) -> int:
        """Send nothing on the live streams for ``seconds``, and return their number."""
        streams = self._all()
        stall = _Stall(time.monotonic() + seconds)
        for stream in streams:
            stream.outbox.put(stall)
        return len(streams)

    def resume_all(self) -> None:
        """End every stall."""
        for stream in self._all():
            stream.outbox.put(_RESUME)

    def _all(self) -> List[Stream]:
        with self._lock:
            return list(self._streams.values())

    def _detach(self, stream: Stream) -> None:
        with self._lock:
            if self._streams.get(stream.key) is not stream:
                return
            del self._streams[stream.key]
            self._served.clear()
            fields = self._record.note(
                "disconnect", agent_id=stream.identity.agent_id, worker_id=stream.worker_id, reported=stream.reported,
                in_flight=len(stream.in_flight),
            )  # fmt: skip
            self._left[stream.key] = fields
            while len(self._left) > _MOST_LEFT:
                self._left.pop(next(iter(self._left)))
            self._gone(stream.key, stream.identity.agent_id)
            # A paused worker may now be the only one for some tasks.
            self._pump(stream.identity.agent_id)

    def _gone(self, key: Key, agent_id: str) -> None:
        epoch = self._epochs.setdefault(key, 0)
        self._later(self._settings.redelivery_delay, lambda: self._reclaim(key, agent_id, epoch))

    def _reclaim(self, key: Key, agent_id: str, epoch: int) -> None:
        with self._lock:
            if self._watch is None or self._epochs.get(key) != epoch or key in self._streams:
                return
            if self._store.is_finishing(*key):
                # It closed its stream in order and still works on its tasks, which its heartbeats report.
                self._later(max(self._settings.redelivery_delay, 0.1), lambda: self._reclaim(key, agent_id, epoch))
                return
            del self._epochs[key]
            is_queued, ended = self._store.requeue(*key)
            if is_queued:
                self._pump(agent_id)
        self._finish(ended)
        self.expire()

    def snapshot(self) -> List[Dict[str, Any]]:
        with self._lock:
            return [
                {
                    "worker_id": stream.worker_id,
                    "installation_id": stream.identity.installation_id,
                    "capabilities": None if stream.capabilities is None else sorted(stream.capabilities),
                    "in_flight": len(stream.in_flight),
                    "max_in_flight": stream.max_in_flight,
                }
                for stream in self._streams.values()
            ]

    # -- tasks --------------------------------------------------------------------------------------------------------

    def queued(
        self, agent_id: str, capability: str, delay: float, expires_in: Optional[float], task_id: Optional[str] = None
    ) -> None:
        """Handle a new task of this agent, or without a ``task_id`` a known one. It may have to wait or may expire."""
        with self._lock:
            if expires_in is not None:
                self._later(expires_in + 0.01, self.expire)
            if delay:
                self._offer_later(delay, agent_id, capability)
        if not delay:
            self.submitted(agent_id, capability, task_id)

    def submitted(self, agent_id: str, capability: str, task_id: Optional[str] = None) -> None:
        """Handle a new task of this agent, or without a ``task_id`` one that may be tried again. It may begin now."""
        with self._lock:
            for stream in self._able(agent_id):
                if stream.serves(capability) and self._feed(stream):
                    return
            served = self._served_of(agent_id)
            if task_id is not None and not served[capability] and not served[None]:
                self._record.note("waiting", agent_id=agent_id, capability=capability, task_id=task_id)

    def complete(self, identity: Identity, task_id: str, key: Optional[str], body: Mapping[str, Any]) -> Completed:
        """Accept a result. Its worker has room again, whether it was the first result or not.

        :raises Refusal: see :meth:`Store.complete`.
        """
        # In one turn: requests that wait for the interpreter at each statement of SQLite cost more than they gain.
        with self._lock:
            done = self._store.complete(identity, task_id, key, body)
            # Whoever waits for the task's end finds its completion recorded.
            self._record.completion(task_id, done.status, body)
            stream = self._streams.get((identity.installation_id, done.worker_id))
            if stream is not None:
                stream.in_flight.discard((task_id, done.attempt))
                self._fill(stream)
            if done.retry_in is not None:
                self._offer_later(done.retry_in, done.agent_id, done.capability)
        if done.final:
            self._finish([task_id])
        return done

    def cancel(self, task_id: str, reason: Optional[str]) -> None:
        """Cancel a task: end it if it is queued, else notify its worker.

        :raises Refusal: see :meth:`Store.cancel`.
        """
        with self._lock:
            key = self._store.cancel(task_id, reason)
            stream = None if key is None else self._streams.get(key)
            if stream is not None and not self.hold_commands:
                stream.outbox.put(_frame(EVENT_CANCEL, cancel_event(task_id, reason)))
        if key is None:
            self._finish([task_id])

    def notify(self, key: Key, event: str, data: str) -> None:
        """Send an event to a worker, if it is connected."""
        with self._lock:
            stream = self._streams.get(key)
            if stream is not None and not self.hold_commands:
                stream.outbox.put(_frame(event, data))

    def call_later(self, delay: float, callback: Callable[[], None]) -> None:
        """Call back on the watch thread after ``delay`` seconds, unless the platform stops before."""
        with self._lock:
            self._later(delay, callback)

    def expire(self) -> None:
        """End the queued tasks whose time to begin has passed."""
        self._finish(self._store.expire())

    def release(self, identity: Identity, task_id: str, worker_id: str, attempt: int) -> None:
        """Queue a task again that its worker has not begun. A cancelled one ends.

        :raises Refusal: see :meth:`Store.release`.
        """
        with self._lock:
            agent_id = self._store.release(identity, task_id, worker_id, attempt)
            stream = self._streams.get((identity.installation_id, worker_id))
            if stream is not None:
                stream.in_flight.discard((task_id, attempt))
                stream.refused.add(task_id)
            self._pump(agent_id)
        if self._store.is_final(task_id):
            self._finish([task_id])
        self.expire()

    def wait(self, task_id: str, timeout: Optional[float]) -> Dict[str, Any]:
        """Wait until the task has its last result, and return it.

        :raises TimeoutError: it has none after ``timeout`` seconds.
        :raises Refusal: 404 no such task.
        """
        event = threading.Event()
        with self._lock:
            self._waiters.setdefault(task_id, []).append(event.set)
        try:
            task = self._store.task(task_id)
            if task["completed_at"] is None:
                if not event.wait(timeout):
                    raise TimeoutError(f"the task {task_id} has no result after {timeout} s (it is {task['status']})")
                task = self._store.task(task_id)
            return task
        finally:
            with self._lock, contextlib.suppress(KeyError, ValueError):
                self._waiters[task_id].remove(event.set)
                if not self._waiters[task_id]:
                    del self._waiters[task_id]

    def poll(self, task_id: str, seconds: float, resume: Callable[[], None]) -> None:
        """Call ``resume`` once: when the task has ended, after ``seconds``, or when the platform stops."""
        with self._lock:
            watch = self._watch
            self._polls.setdefault(task_id, []).append(resume)
            if watch is not None:
                watch.call_later(seconds, lambda: self._resume(task_id, resume))
        # After it was noted, so that no end in between is missed.
        if watch is None or self._store.is_final(task_id):
            self._resume(task_id, resume)

    def _resume(self, task_id: str, resume: Callable[[], None]) -> None:
        with self._lock:
            polls = self._polls.get(task_id, [])
            if resume not in polls:
                return
            polls.remove(resume)
            if not polls:
                del self._polls[task_id]
        resume()

    def _finish(self, task_ids: Sequence[str]) -> None:
        """Notify all who wait for the end of these tasks. Without the lock."""
        for task_id in task_ids:
            with self._lock:
                waiting = self._waiters.pop(task_id, []) + self._polls.pop(task_id, [])
            for notify in waiting:
                notify()

    def _end_polls(self) -> None:
        with self._lock:
            polls = [resume for each in self._polls.values() for resume in each]
            self._polls.clear()
        for resume in polls:
            resume()

    def _pump(self, agent_id: str) -> None:
        """Assign this agent's queued tasks, one to each stream in turn. Needs the lock."""
        if not self._store.has_queued(agent_id):
            return
        able = self._able(agent_id)
        while able:
            able = [stream for stream in able if self._feed(stream) and stream.room > 0]

    def _fill(self, stream: Stream) -> None:
        """Assign tasks to a stream until it has no room. Needs the lock."""
        while stream.room > 0 and self._feed(stream):
            pass

    def _able(self, agent_id: str) -> List[Stream]:
        """Return this agent's streams with room, in the order they are served."""
        streams = [stream for stream in self._streams.values() if stream.identity.agent_id == agent_id]
        able = [stream for stream in streams if stream.room > 0]
        # The one with the fewest tasks first, then the one that has waited longest. Paused workers come last.
        able.sort(key=lambda s: (s.paused, len(s.in_flight) / s.max_in_flight, s.turn))
        return able

    def _served_of(self, agent_id: str) -> Counter[Optional[str]]:
        """Return how many of this agent's streams that accept tasks serve each capability. None: all capabilities."""
        served = self._served.get(agent_id)
        if served is None:
            served = self._served[agent_id] = collections.Counter()
            for stream in self._streams.values():
                if stream.identity.agent_id == agent_id:
                    served.update(stream.accepted)
        return served

    def _left_to_others(self, stream: Stream) -> Optional[FrozenSet[str]]:
        """Return the capabilities that a stream other than ``stream`` serves. None: all of them."""
        served, own = self._served_of(stream.identity.agent_id), stream.accepted
        if served[None] > (None in own):
            return None
        return frozenset(name for name, count in served.items() if name is not None and count > (name in own))

    def _feed(self, stream: Stream) -> bool:
        """Assign a task to a stream with room. Return True if there was one."""
        claim = self._store.claim(
            *stream.key,
            stream.identity.agent_id,
            capabilities=stream.capabilities,
            left_to_others=self._left_to_others(stream),
            paused=stream.paused,
            refused=frozenset(stream.refused),
        )
        if claim is None:
            return False
        stream.in_flight.add((claim.task_id, claim.attempt))
        stream.turn = next(self._turns)
        stream.outbox.put(_frame(EVENT_TASK, claim.data))
        return True

    # -- installations ------------------------------------------------------------------------------------------------

    def command(
        self, installation_id: str, kind: str, reason: Optional[str], shutdown_timeout: Optional[float]
    ) -> Dict[str, Any]:
        """Record a command and send it on every stream of the installation.

        :raises Refusal: see :meth:`Store.command`.
        """
        with self._lock:
            data, event_id = self._store.command(
                installation_id, kind, reason, shutdown_timeout, not self.hold_commands
            )
            self._tell(installation_id, data, event_id)
        self._record.note("command", installation_id=installation_id, type=kind, reason=reason)
        return data

    def revoke(self, installation_id: str, reason: Optional[str], shutdown_timeout: Optional[float]) -> None:
        """Revoke an installation: its streams get a ``terminate`` and end with its time to shut down.

        :raises Refusal: 404 no such installation.
        """
        with self._lock:
            data, event_id, end = self._store.revoke(installation_id, reason, shutdown_timeout, not self.hold_commands)
            if data:
                self._tell(installation_id, data, event_id)
                self._close_at(installation_id, end)
        self._record.note("command", installation_id=installation_id, type="revoke", reason=reason)

    def reported(self, identity: Identity, body: Dict[str, Any], cancelled: FrozenSet[str]) -> None:
        """Update the streams of a heartbeat's workers: a worker that stops gets no more tasks.

        :param cancelled: the cancelled tasks that the answer names.
        """
        self._end_unknown(identity.installation_id, body, cancelled)
        workers = {worker["worker_id"]: worker.get("status") for worker in body.get("workers") or []}
        changed = False
        with self._lock:
            for stream in self._of(identity.installation_id):
                status = workers.get(stream.worker_id) if workers else body["status"]
                if status is not None and status != stream.reported:
                    stream.reported = status
                    changed = True
            if changed:
                self._served.clear()
                self._pump(identity.agent_id)
            for key in [key for key in self._left if key[0] == identity.installation_id]:
                # A worker that stops closes its stream and sends this at the same time.
                status = workers.get(key[1]) if workers else body["status"]
                if status in ("stopping", "stopped"):
                    self._left.pop(key)["reported"] = status

    def _end_unknown(self, installation_id: str, body: Dict[str, Any], cancelled: FrozenSet[str]) -> None:
        """End the cancelled tasks that their worker does not have, because their delivery was lost.

        That is so if an earlier heartbeat was answered with their cancel, and the worker has no tasks now.
        """
        with self._lock:
            before = self._named.pop(installation_id, frozenset())
            if not cancelled:
                return
            self._named[installation_id] = cancelled
            idle = [one["worker_id"] for one in body.get("workers") or [] if one.get("active_tasks") == 0]
            ended = self._store.end_cancelled(installation_id, idle, before & cancelled)
        self._finish(ended)

    def _tell(self, installation_id: str, data: Dict[str, Any], event_id: Optional[int]) -> None:
        state = self._store.installation(installation_id)
        for stream in self._of(installation_id):
            stream.desired_state = state["desired_state"]
            if data["type"] == "resume" and stream.reported == "paused":
                # The pause by a command has ended. Its next heartbeat shows whether it is paused for another reason.
                stream.reported = None
            if event_id is not None:
                stream.outbox.put(_frame(EVENT_COMMAND, encode_json(data).decode(), event_id))
        self._served.clear()
        self._pump(state["agent_id"])

    def _close_at(self, installation_id: str, end: float) -> None:
        def close() -> None:
            with self._lock:
                streams = self._of(installation_id)
            for stream in streams:
                self._detach(stream)
                stream.outbox.put(_END)

        self._later(end - time.time(), close)

    def _offer_later(self, delay: float, agent_id: str, capability: str) -> None:
        # A little late rather than early, because the store compares with the wall clock.
        self._later(delay + 0.01, lambda: self.submitted(agent_id, capability))

    def _later(self, delay: float, callback: Callable[[], None]) -> None:
        # While the platform is stopped nothing is due. start() schedules it again.
        if self._watch is not None:
            self._watch.call_later(delay, callback)

    def _of(self, installation_id: str) -> List[Stream]:
        return [s for s in self._streams.values() if s.identity.installation_id == installation_id]


class StreamBody:
    """Yield the body of a stream's answer: events from the queue, and comments while no event comes.

    The stream's HTTP thread iterates over it and blocks on the queue.
    """

    def __init__(self, hub: Hub, stream: Stream, keepalive_interval: float) -> None:
        self._hub = hub
        self._stream = stream
        self._interval = keepalive_interval
        #: What has accumulated during a stall.
        self._held: Deque[Item] = collections.deque()

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        while True:
            try:
                item = self._held.popleft() if self._held else self._stream.outbox.get(timeout=self._interval)
            except queue.Empty:
                return KEEP_ALIVE
            if isinstance(item, bytes):
                return item
            if item is _END:
                raise StopIteration
            if item is _CUT:
                break_off()
            if isinstance(item, _Stall):
                self._stall(item.end)

    def _stall(self, end: float) -> None:
        held: List[Item] = []
        left = end - time.monotonic()
        while left > 0:
            try:
                item = self._stream.outbox.get(timeout=left)
            except queue.Empty:
                break
            if item is _RESUME:
                break
            if item is _END or item is _CUT:
                held = [item]
                break
            if isinstance(item, _Stall):
                end = max(end, item.end)
            else:
                held.append(item)
            left = end - time.monotonic()
        self._held.extend(held)

    def close(self) -> None:
        self._hub.leave(self._stream)


def break_off() -> NoReturn:
    """Cut the connection from within an answer, by an error.

    The server then closes the connection without the last chunk and logs nothing.
    """
    raise ConnectionAbortedError(errno.ECONNABORTED, "the stream was cut")


def _frame(event: str, data: str, event_id: Optional[int] = None) -> bytes:
    # JSON on the wire is compact and escapes line ends, so it is always one line of data.
    head = "" if event_id is None else f"id: {event_id}\n"
    return f"{head}event: {event}\ndata: {data}\n\n".encode()


class Watch:
    """Notice closed connections at once, and call back after delays, on the thread ``sekuire-local-watch``."""

    # Threads: any thread adds, removes and schedules. The callbacks run on the watch thread, outside `_lock`, which
    # guards the selector's map and the heap.

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._selector = selectors.DefaultSelector()
        self._timers: List[Tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._waker, self._wakee = socket.socketpair()
        self._waker.setblocking(False)
        self._wakee.setblocking(False)
        self._selector.register(self._wakee, selectors.EVENT_READ)
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="sekuire-local-watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping = True
        self._wake()
        if self._thread.is_alive():
            self._thread.join()
        with self._lock:
            self._selector.close()
            self._waker.close()
            self._wakee.close()
            self._timers.clear()

    def add(self, sock: socket.socket, gone: Callable[[], None]) -> None:
        """Call ``gone`` once when the peer of ``sock`` has closed it."""
        with self._lock, contextlib.suppress(ValueError, KeyError, OSError):
            if not self._stopping:
                self._selector.register(sock, selectors.EVENT_READ, gone)
        self._wake()

    def remove(self, sock: socket.socket) -> None:
        """Forget ``sock``. Call this before closing it."""
        with self._lock, contextlib.suppress(ValueError, KeyError, OSError, RuntimeError):
            self._selector.unregister(sock)

    def call_later(self, delay: float, callback: Callable[[], None]) -> None:
        with self._lock:
            heapq.heappush(self._timers, (time.monotonic() + delay, next(self._numbers), callback))
        self._wake()

    def _wake(self) -> None:
        # A full pipe wakes the thread as well. A closed one belongs to a watch that has ended.
        with contextlib.suppress(OSError):
            self._waker.send(b"\0")

    def _run(self) -> None:
        while not self._stopping:
            try:
                ready = self._selector.select(self._delay())
            except (OSError, ValueError):
                # Only select() does this (Windows): a socket was closed during the call, or there are too many. The
                # owner of a closed one removes it. The next keep-alive comment finds a connection that is not watched.
                ready = []
                time.sleep(0.05)
            calls = [call for key, _ in ready for call in self._look(key)] + self._due()
            for call in calls:
                try:
                    call()
                except Exception:
                    if not self._stopping:
                        logger.exception("a callback on the local platform's watch thread failed")

    def _delay(self) -> Optional[float]:
        with self._lock:
            return max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else None

    def _due(self) -> List[Callable[[], None]]:
        calls = []
        now = time.monotonic()
        with self._lock:
            while self._timers and self._timers[0][0] <= now:
                calls.append(heapq.heappop(self._timers)[2])
        return calls

    def _look(self, key: selectors.SelectorKey) -> List[Callable[[], None]]:
        sock: socket.socket = key.fileobj  # type: ignore[assignment]
        if sock is self._wakee:
            with contextlib.suppress(OSError):
                self._wakee.recv(4096)
            return []
        try:
            gone = not sock.recv(1, socket.MSG_PEEK)
        except (BlockingIOError, InterruptedError, socket.timeout):
            return []
        except (OSError, ValueError):
            gone = True
        # The socket stays ready from now on, so a client that sends more requests cannot be watched any longer.
        self.remove(sock)
        return [key.data] if gone else []
