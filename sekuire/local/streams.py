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
import time
from typing import (
    Any,
    Callable,
    Deque,
    Dict,
    FrozenSet,
    Iterator,
    List,
    NamedTuple,
    NoReturn,
    Optional,
    Sequence,
    Set,
    Tuple,
    Union,
)

from .._internal.logs import get_logger
from ..wire.protocol import EVENT_COMMAND, EVENT_CONNECTED, EVENT_TASK, encode_json
from .store import Completed, Identity, Refusal, Settings, Store, revoked

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

    def serves(self, capability: str) -> bool:
        return self.capabilities is None or capability in self.capabilities


class Hub:
    """Assign tasks to streams."""

    # Threads: HTTP threads call it (a stream opens, a task is submitted or completed), users' threads, and the watch
    # thread (a client has disconnected, a delay has passed). `_lock` guards every attribute. The store's lock is
    # acquired under it, never the other way round. Nothing is written to a socket under it: events go into the stream's
    # queue, and the stream's own HTTP thread writes them.

    def __init__(self, store: Store, settings: Settings, max_streams: int) -> None:
        self._store = store
        self._settings = settings
        self._max_streams = max_streams
        self._lock = threading.Lock()
        self._streams: Dict[Key, Stream] = {}
        self._turns = itertools.count(1)
        self._waiters: Dict[str, List[threading.Event]] = {}
        #: None while the platform is stopped.
        self._watch: Optional[Watch] = None
        #: While true, commands are recorded but not sent on the streams.
        self.hold_commands = False
        #: How many streams each worker has opened, so that a late timer of an earlier connection does nothing.
        self._epochs: Dict[Key, int] = {}

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

    def close(self) -> None:
        """End every stream properly. Calls of wait() go on, because the platform may start again."""
        with self._lock:
            self._watch = None
            streams = list(self._streams.values())
            self._streams.clear()
        for stream in streams:
            stream.outbox.put(_END)

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
                stream.outbox.put(_frame(EVENT_TASK, claim.data))
            self._streams[stream.key] = stream
            self._epochs[stream.key] = self._epochs.get(stream.key, 0) + 1
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

    def drop_all(self) -> int:
        """Cut every live stream at its socket, and return their number."""
        streams = self._all()
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
            if self._store.requeue(*key):
                self._pump(agent_id)

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

    def submitted(self, agent_id: str, capability: str) -> None:
        """Handle a new task of this agent."""
        with self._lock:
            able, working = self._able(agent_id)
            for stream in able:
                if stream.serves(capability) and self._feed(stream, working):
                    break

    def completed(self, identity: Identity, task_id: str, done: Completed) -> None:
        """Handle a result, whether the first or not: its worker has room again."""
        with self._lock:
            stream = self._streams.get((identity.installation_id, done.worker_id))
            if stream is not None:
                stream.in_flight.discard((task_id, done.attempt))
                self._fill(stream)
            waiters = self._waiters.pop(task_id, []) if done.final else []
            if done.retry_in is not None:
                self._offer_later(done.retry_in, done.agent_id, done.capability)
        for waiter in waiters:
            waiter.set()

    def released(self, identity: Identity, task_id: str, worker_id: str, attempt: int, agent_id: str) -> None:
        """Handle a task that its worker has released."""
        with self._lock:
            stream = self._streams.get((identity.installation_id, worker_id))
            if stream is not None:
                stream.in_flight.discard((task_id, attempt))
                stream.refused.add(task_id)
            self._pump(agent_id)

    def wait(self, task_id: str, timeout: Optional[float]) -> Dict[str, Any]:
        """Wait until the task has its last result, and return it.

        :raises TimeoutError: it has none after ``timeout`` seconds.
        :raises Refusal: 404 no such task.
        """
        event = threading.Event()
        with self._lock:
            self._waiters.setdefault(task_id, []).append(event)
        try:
            task = self._store.task(task_id)
            if task["completed_at"] is None:
                if not event.wait(timeout):
                    raise TimeoutError(f"the task {task_id} has no result after {timeout} s (it is {task['status']})")
                task = self._store.task(task_id)
            return task
        finally:
            with self._lock, contextlib.suppress(KeyError, ValueError):
                self._waiters[task_id].remove(event)
                if not self._waiters[task_id]:
                    del self._waiters[task_id]

    def _pump(self, agent_id: str) -> None:
        """Assign this agent's queued tasks, one to each stream in turn. Needs the lock."""
        if not self._store.has_queued(agent_id):
            return
        able, working = self._able(agent_id)
        while able:
            able = [stream for stream in able if self._feed(stream, working) and stream.room > 0]

    def _fill(self, stream: Stream) -> None:
        """Assign tasks to a stream until it has no room. Needs the lock."""
        if stream.room > 0:
            _, working = self._able(stream.identity.agent_id)
            while stream.room > 0 and self._feed(stream, working):
                pass

    def _able(self, agent_id: str) -> Tuple[List[Stream], List[Stream]]:
        """Return this agent's streams with room, in the order they are served, and all that accept tasks."""
        streams = [stream for stream in self._streams.values() if stream.identity.agent_id == agent_id]
        able = [stream for stream in streams if stream.room > 0]
        # The one with the fewest tasks first, then the one that has waited longest. Paused workers come last.
        able.sort(key=lambda s: (s.paused, len(s.in_flight) / s.max_in_flight, s.turn))
        return able, [stream for stream in streams if not stream.paused and not stream.closing]

    def _feed(self, stream: Stream, working: Sequence[Stream]) -> bool:
        """Assign a task to a stream with room. Return True if there was one."""
        others = [other for other in working if other is not stream]
        left_to_others: Optional[FrozenSet[str]] = None
        if all(other.capabilities is not None for other in others):
            left_to_others = frozenset().union(*(other.capabilities or () for other in others))
        claim = self._store.claim(
            *stream.key,
            stream.identity.agent_id,
            capabilities=stream.capabilities,
            left_to_others=left_to_others,
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

    def reported(self, identity: Identity, body: Dict[str, Any]) -> None:
        """Update the streams of a heartbeat's workers: a worker that stops gets no more tasks."""
        workers = {worker["worker_id"]: worker.get("status") for worker in body.get("workers") or []}
        changed = False
        with self._lock:
            for stream in self._of(identity.installation_id):
                status = workers.get(stream.worker_id) if workers else body["status"]
                if status is not None and status != stream.reported:
                    stream.reported = status
                    changed = True
            if changed:
                self._pump(identity.agent_id)

    def _tell(self, installation_id: str, data: Dict[str, Any], event_id: Optional[int]) -> None:
        state = self._store.installation(installation_id)
        for stream in self._of(installation_id):
            stream.desired_state = state["desired_state"]
            if data["type"] == "resume" and stream.reported == "paused":
                # The pause by a command has ended. Its next heartbeat shows whether it is paused for another reason.
                stream.reported = None
            if event_id is not None:
                stream.outbox.put(_frame(EVENT_COMMAND, encode_json(data).decode(), event_id))
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
