"""From a task's arrival to its handler's end: dedupe, pause, queue, threads, gate, deadlines, drain."""

from __future__ import annotations

import functools
import threading
import time
import weakref
from collections import deque
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any, Callable, Deque, Dict, List, Optional, Protocol, Set, Tuple

import attrs

from .._internal.logs import get_logger
from .._internal.threads import Deadline, Timer, owned_by
from ..config import WorkerConfig
from ..errors import ConfigurationError, PolicyUnavailableError, PolicyViolationError
from ..handlers import outcome as outcomes
from ..handlers.context import TaskContext, current_task
from ..handlers.registry import HandlerEntry, TaskRegistry
from ..wire import protocol
from ..wire.models import Completion, Failure, Task

log = get_logger("sekuire.dispatch")

#: Longest wait of the stream's thread between two looks for room, in seconds.
_LOOK_AGAIN = 0.25
#: Waiting tasks from which on further ones wait with their input as JSON, a fourth of its size in Python's objects;
#: and the size of a task's JSON, in bytes, above which each one does.
_UNPACKED, _UNPACKED_BYTES = 64, 16 * 1024
#: Bytes of a waiting task besides its input.
WAITING_COST = 1024
#: Seconds until a task is released for lack of room: a platform that sends it again at once must not keep us busy.
_RELEASE_PAUSE = 1.0

# States of a record. What follows a claim (delivered, dropped) is the reporter's.
_WAITING, _RUNNING, _CLAIMED = "waiting", "running", "claimed"


class Accepted(Protocol):
    """What a sink made of a result."""

    @property
    def code(self) -> Optional[str]:
        """The code of the failure that the requester gets, None for an output."""


class ResultSink(Protocol):
    """Where results go; :class:`sekuire.worker.report.Reporter` is one.

    ``on_room`` is called, without a lock, when ``has_room()`` has been False and is True again. ``can_release`` is None
    until the platform has answered a first release.
    """

    on_room: Callable[[], None]

    @property
    def can_release(self) -> Optional[bool]: ...

    def accept(self, completion: Completion) -> Optional[Accepted]: ...

    def post(self, report: Any) -> None: ...

    def keep(self, report: Any) -> None: ...

    def enqueue(self, report: Any) -> None: ...

    def recall(self, task_id: str, attempt: int) -> bool: ...

    def release(self, order: Any, delay: float = 0.0) -> None: ...

    def has_room(self) -> bool: ...

    def has_room_for_release(self) -> bool: ...

    def progress(self, context: TaskContext, fraction: float, message: Optional[str]) -> None: ...


class _Record:
    """One task between its arrival and its result. The dispatcher's lock guards every field."""

    __slots__ = (
        "attempt",
        "began",
        "context",
        "cost",
        "entry",
        "holds_permit",
        "is_begun",
        "is_called",
        "is_lost",
        "is_reached",
        "packed",
        "refusal",
        "state",
        "task",
        "timer",
    )

    def __init__(self, task: Task, entry: HandlerEntry) -> None:
        self.task = task
        self.entry = entry
        self.attempt = task.attempt
        self.state = _WAITING
        self.context: Optional[TaskContext] = None
        self.timer: Optional[int] = None
        #: When its handler was called (``time.monotonic()``). Only its own thread writes it, once.
        self.began: Optional[float] = None
        #: The task's input as JSON, where the task waits without it (:func:`_pack`).
        self.packed: Optional[bytes] = None
        #: What it counts of ``max_waiting_bytes``.
        self.cost = 0
        #: Its answer, where it waits only because results pile up.
        self.refusal: Optional[Failure] = None
        self.holds_permit = False
        #: Whether it was given to a thread (and counts as running), and whether the thread has come to it.
        self.is_begun = False
        self.is_reached = False
        #: Whether its handler is called now, or was: past the policy, it is begun for whoever stops or pauses.
        self.is_called = False
        #: Whether its thread could not be had, and it was answered; a thread that comes to it all the same leaves it.
        self.is_lost = False

    def elapsed_ms(self) -> int:
        """Return the milliseconds since the handler began, 0 if it never did."""
        return 0 if self.began is None else int((time.monotonic() - self.began) * 1000)


def _pack(task: Task) -> Tuple[Task, Optional[bytes]]:
    """The task without its input, and the input as JSON; where that has no such form, the task as it is."""
    packed = protocol.pack(task.input)
    if packed is None:
        return task, None
    return attrs.evolve(task, input=None), packed


class _Order:
    """An order to give one task back, which the reporter carries out (``ReleaseOrder`` there).

    *planned → sending → (planned →) ended*, or *called off* where the task is kept or has come again. The dispatcher's
    lock guards it. ``on_unsupported`` is called, without the lock, where the platform takes no task back.
    """

    __slots__ = ("__weakref__", "_lock", "attempt", "is_released", "on_unsupported", "state", "task_id")

    def __init__(
        self,
        lock: threading.Condition,
        task_id: str,
        attempt: int,
        on_unsupported: Optional[Callable[[_Order], None]] = None,
    ) -> None:
        self._lock = lock
        self.task_id = task_id
        self.attempt = attempt
        self.on_unsupported = on_unsupported
        self.state = "planned"
        self.is_released = False

    def begin(self) -> bool:
        with self._lock:
            if self.state == "planned":
                self.state = "sending"
            return self.state == "sending"

    def postpone(self) -> None:
        with self._lock:
            if self.state == "sending":
                self.state = "planned"
                self._lock.notify_all()

    def end(self, *, is_released: bool, is_supported: bool = True) -> None:
        with self._lock:
            is_off = self.state == "called off"
            self.is_released = is_released
            self.state = "ended"
            self._lock.notify_all()
        if not is_supported and not is_off and self.on_unsupported is not None:
            self.on_unsupported(self)

    def call_off(self) -> None:
        """Do not send it any more. Needs the lock."""
        if self.state != "ended":
            self.state = "called off"


class Counts:
    """Totals since the start, and what is now; changed under the dispatcher's lock."""

    __slots__ = ("completed", "dropped", "duplicates", "failed", "received", "rejected", "released")

    def __init__(self) -> None:
        self.received = self.completed = self.failed = self.rejected = 0
        self.released = self.duplicates = self.dropped = 0


class Dispatcher:
    """Decides what happens to each task and runs its handler.

    The stream's thread calls :meth:`submit`; the pool's threads run :meth:`_work`; the timer's thread ends tasks whose
    time is over; any thread may pause, cancel, close and drain.
    ``_condition`` guards the records, the queue, the permits and the flags. It is never held over a handler, a policy
    check or I/O: what must be called or answered is taken out under it and done after.

    What cannot begin waits: for a thread, for the lease, or for results to be delivered. So the stream is read on, and
    a command behind a thousand tasks acts at once. What waits has at most ``max_waiting_bytes``. After that a new task
    is released. Only where the platform takes none back does :meth:`submit` block until there is room.

    The pool has room for twice ``max_workers`` threads, because a thread cannot be taken from a handler that does not
    return: permits (``max_workers`` of them) bound what runs, and a straggler hands its permit on, up to
    ``max_workers`` of them.

    :param lease_held: whether the lease allows work now; one comparison, called at intake and before each handler.
    :param on_result: told of each result that the sink took, with what the sink made of it; it must not block.
    :param on_checked: told of each task that a policy allowed; it must not block.
    """

    def __init__(
        self,
        config: WorkerConfig,
        registry: TaskRegistry,
        sink: ResultSink,
        *,
        timer: Timer,
        lease_held: Callable[[], bool],
        scrub: Callable[[str], str],
        on_result: Optional[Callable[[Task, Completion, Any], None]] = None,
        on_checked: Optional[Callable[[Task], None]] = None,
        owner: object = None,
    ) -> None:
        self.counts = Counts()
        self._on_result = on_result
        self._on_checked = on_checked
        self._registry = registry
        self._sink = sink
        self._timer = timer
        self._lease_held = lease_held
        self._scrub = scrub
        self._owner = owner
        self._expose_errors = config.expose_errors
        self._gateway = config.policy_gateway
        #: One question where the gateway has it, so that one policy answers all of it.
        self._check_task = getattr(config.policy_gateway, "check_task", None)
        self._check_tool = getattr(config.policy_gateway, "check_tool", None)
        self._task_timeout = config.task_timeout
        self._max_waiting_bytes = config.max_waiting_bytes
        self._max_event_bytes = config.max_event_bytes
        self._max_workers = config.max_workers
        self._permits = config.max_workers
        self._condition = threading.Condition()
        self._records: Dict[str, _Record] = {}
        #: What waits to begin, and what waits to be refused.
        self._queue: Deque[_Record] = deque()
        self._refused: Deque[_Record] = deque()
        self._waiting = 0
        self._waiting_bytes = 0
        self._running = 0
        self._busy = 0
        self._stragglers: Set[_Record] = set()
        self._pauses: Dict[str, Optional[str]] = {}
        self._closed: Optional[str] = None
        #: Tasks that are being given back; who sends the order holds it.
        self._given: weakref.WeakValueDictionary[str, _Order] = weakref.WeakValueDictionary()
        self._has_threads = False
        # An executor of other processes is called from threads of our own, with all that is around a call (remote.py).
        self._foreign = None if _is_remote(config.executor) else config.executor
        self._pool: Optional[Executor] = self._foreign
        sink.on_room = self.begin_waiting

    def resize(self, config: WorkerConfig) -> None:
        """Take ``max_workers`` from ``config``; before the first task."""
        with self._condition:
            self._max_workers = self._permits = config.max_workers

    # -- what is now --

    @property
    def waiting(self) -> int:
        return self._waiting

    @property
    def waiting_bytes(self) -> int:
        """What the waiting tasks take, at most ``max_waiting_bytes``."""
        return self._waiting_bytes

    @property
    def running(self) -> int:
        return self._running

    def straggler_names(self) -> List[str]:
        """Tasks whose handler still runs although they have been answered."""
        with self._condition:
            return [_name(record.task) for record in self._stragglers]

    def is_paused(self) -> bool:
        return bool(self._pauses)

    def is_paused_by(self, source: str) -> bool:
        return source in self._pauses

    # -- intake (the stream's thread) --

    def submit(self, task: Task) -> None:
        """Take a task: run it, hold it, answer it, or give it back.

        Blocks only while what waits fills ``max_waiting_bytes`` and the platform takes no task back.
        """
        entry = self._registry.find(task.capability)
        with self._condition:
            self.counts.received += 1
            self._call_off(task.task_id)
            if self._is_known(task):
                self.counts.duplicates += 1
                return
            refusal = self._refusal(task, entry)
            begin: Optional[_Record] = None
            if self._closed is None and self._sink.has_room():
                if entry is not None and refusal is None and self._can_begin(entry):
                    begin = self._begin(self._admit(task, entry))
                must_wait = begin is None and refusal is None
            else:
                # An answer takes room too: a platform that floods without taking answers must not fill the memory.
                must_wait = self._closed is None
        if begin is not None:
            self._hand_over(begin)
        elif must_wait:
            self._hold(task, _NO_HANDLER if entry is None else entry, refusal)
        elif refusal is not None:
            self._reject(task, task.attempt, refusal)
        else:
            self._give_back(task, task.attempt)

    def answer_malformed(self, error: protocol.MalformedTask) -> None:
        """Answer a task that cannot run; without an id it can only be counted."""
        with self._condition:
            self.counts.received += 1
            self.counts.dropped += error.task_id is None
        if error.task_id is None:
            log.error("the platform sent a task that cannot be read and has no id to answer: %s", error)
            return
        log.error("[%s] the platform sent a malformed task: %s", error.task_id, error)
        task = Task(task_id=error.task_id, capability="?", attempt=error.attempt)
        refusal = protocol.failure("invalid_task", str(error))
        with self._condition:
            self._call_off(task.task_id)
            if self._is_known(task):
                # It came whole before, and goes on.
                self.counts.duplicates += 1
                return
            must_wait = self._closed is None and not self._sink.has_room()
        if must_wait:
            self._hold(task, _NO_HANDLER, refusal)
        else:
            self._reject(task, task.attempt, refusal)

    def _hold(self, task: Task, entry: HandlerEntry, refusal: Optional[Failure]) -> None:
        """Let a new task wait; where it does not fit, give it back, or wait here until it does."""
        packed: Optional[bytes] = None
        size = task.size
        if refusal is not None:
            task = attrs.evolve(task, input=None)
        elif self._waiting >= _UNPACKED or size > _UNPACKED_BYTES:
            # Without the lock: it may be large.
            task, packed = _pack(task)
            size = max(size, self._max_event_bytes if packed is None else len(packed))
        cost = WAITING_COST + size
        probe: Optional[_Order] = None
        begin: Optional[_Record] = None
        outcome = "give back"
        with self._condition:
            # A release that is being sent is waited for: the platform may give the task to another worker.
            while self._closed is None or (probe is not None and probe.state == "sending"):
                if probe is not None and probe.is_released:
                    self.counts.released += 1
                    outcome = "released"
                    break
                if probe is None or probe.state != "sending":
                    if self._is_known(task):
                        self.counts.duplicates += 1
                        outcome = "known"
                        break
                    refusal = refusal or self._refusal(task, entry)
                    if refusal is not None and self._sink.has_room():
                        outcome = "refused"
                        break
                    if refusal is None and self._sink.has_room() and self._can_begin(entry):
                        begin = self._begin(self._admit(task, entry, packed))
                        outcome = "begun"
                        break
                    if self._waiting_bytes + cost <= self._max_waiting_bytes:
                        self._enqueue(self._admit(task, entry, packed), cost, refusal)
                        outcome = "held"
                        break
                if probe is None and self._sink.can_release is not False and self._sink.has_room_for_release():
                    if self._sink.can_release:
                        break
                    # The task stays here until it is known that the platform takes tasks back.
                    probe = _Order(self._condition, task.task_id, task.attempt)
                    self._sink.release(probe)
                    continue
                log.debug("no room for task %s: the stream is not read on until there is", task.task_id)
                self._condition.wait(_LOOK_AGAIN)
            else:
                refusal = refusal or self._refusal(task, entry)
                if refusal is not None:
                    outcome = "refused"
            if probe is not None:
                probe.call_off()
            delay = _RELEASE_PAUSE if self._closed is None else 0.0
        if begin is not None:
            self._hand_over(begin)
        elif outcome == "held":
            self.begin_waiting()
        elif outcome == "released":
            log.info("[%s] %s is given back unbegun: too many tasks wait", task.task_id, _capability(task))
        elif outcome == "refused" and refusal is not None:
            self._reject(task, task.attempt, refusal)
        elif outcome == "give back":
            self._give_back(task, task.attempt, delay)

    def _can_begin(self, entry: HandlerEntry) -> bool:
        """Return True if a new task of this handler may begin before all that wait. Needs the lock."""
        return bool(self._permits and not self._queue and entry.has_room() and self._lease_held())

    def _admit(self, task: Task, entry: HandlerEntry, packed: Optional[bytes] = None) -> _Record:
        """Make the record of a new task. Needs the lock."""
        record = self._records[task.task_id] = _Record(task, entry)
        record.packed = packed
        return record

    def _enqueue(self, record: _Record, cost: int, refusal: Optional[Failure]) -> None:
        """Let a task wait. Needs the lock."""
        record.cost, record.refusal = cost, refusal
        if record.refusal is not None:
            self._refused.append(record)
        elif record.entry.has_room():
            self._queue.append(record)
        else:
            record.entry.parked.append(record)
        self._waiting += 1
        self._waiting_bytes += record.cost

    def _call_off(self, task_id: str) -> None:
        """A task has come: an order to give it back must not be carried out any more. Needs the lock."""
        order = self._given.pop(task_id, None)
        if order is not None:
            order.call_off()

    def _is_known(self, task: Task) -> bool:
        record = self._records.get(task.task_id)
        if record is not None:
            self._raise_attempt(record, task.attempt)
            return True
        return self._sink.recall(task.task_id, task.attempt)

    def _raise_attempt(self, record: _Record, attempt: int) -> None:
        # The platform gave the task to another worker and then to us again: its new number is what it will accept.
        record.attempt = max(record.attempt, attempt)
        if record.context is not None:
            record.context._attempt = record.attempt
        if record.state == _CLAIMED:
            self._sink.recall(record.task.task_id, record.attempt)

    def _refusal(self, task: Task, entry: Optional[HandlerEntry]) -> Optional[Failure]:
        if self._closed == "terminated":
            return _terminated()
        if self._closed is not None:
            return None
        if self._pauses:
            return protocol.failure("worker_paused", self._pause_message())
        if entry is None:
            return protocol.failure("unknown_capability", f"no handler for {task.capability[:200]!r}")
        return None

    def _pause_message(self) -> str:
        reason = next((reason for reason in self._pauses.values() if reason), None)
        return "the worker is paused" + (f": {reason}" if reason else "")

    # -- pause, cancel, close (any thread) --

    def pause(self, source: str, reason: Optional[str] = None) -> bool:
        """Set one pause flag; tasks not yet begun are answered ``worker_paused``. Whether it was not set before."""
        with self._condition:
            if self._closed is not None:
                return False
            new = source not in self._pauses
            self._pauses[source] = reason
            failure = protocol.failure("worker_paused", self._pause_message())
            taken = self._take_unbegun()
            self._condition.notify_all()
        for record in taken:
            self._reject_record(record, failure)
        self.begin_waiting()
        return new

    def resume(self, *sources: str) -> bool:
        """Clear pause flags; whether one of them was set."""
        with self._condition:
            cleared = [source for source in sources if source in self._pauses]
            for source in cleared:
                del self._pauses[source]
            self._condition.notify_all()
        return bool(cleared)

    def close(self, terminated: bool) -> None:
        """Begin nothing any more: what has not begun is answered ``worker_terminated``, or given back (plain stop)."""
        with self._condition:
            if self._closed is None or terminated:
                self._closed = "terminated" if terminated else "stopped"
            taken = self._take_unbegun()
            self._condition.notify_all()
        for record in taken:
            if terminated or record.refusal is not None:
                self._reject_record(record, _terminated())
            else:
                self._give_back_record(record)

    def cancel_running(self, reason: str) -> None:
        """Cancel the context of every handler that runs."""
        with self._condition:
            contexts = [record.context for record in self._records.values() if record.context is not None]
            contexts += [record.context for record in self._stragglers if record.context is not None]
        for context in contexts:
            context._cancel(reason)

    def lose_lease(self) -> None:
        """Give back what waits and cancel what runs: the platform gives it to others. What comes later waits."""
        with self._condition:
            taken = [one for one in self._records.values() if one.state == _WAITING and one.refusal is None]
            self._queue.clear()
            for record in taken:
                record.entry.parked.clear()
                record.state = _CLAIMED
                self._leave_queue(record)
        for record in taken:
            self._give_back_record(record)
        self.cancel_running("lease lost")

    def cancel_denied(self, is_allowed: Callable[..., bool], reason: str) -> None:
        """Cancel the context of every handler whose capability, or whose task's tool, is not allowed any more."""
        with self._condition:
            records = [record for record in self._records.values() if record.context is not None]
        for record in records:
            # A record has its context before the gateway is asked: none that an older policy let pass is missed here.
            if record.context is not None and not is_allowed(record.task.capability, record.task.tool):
                log.warning("[%s] %s is not allowed by the new policy and cancelled", record.task.task_id,
                            record.task.capability)  # fmt: skip
                record.context._cancel(reason)

    def wake(self) -> None:
        """Have every wait look at its deadline again."""
        with self._condition:
            self._condition.notify_all()

    def drain(self, deadline: Deadline) -> bool:
        """Wait until nothing runs; whether that came before ``deadline``."""
        with self._condition:
            while self._running or self._waiting:
                if deadline.is_expired():
                    return False
                self._condition.wait(min(deadline.remaining(), 0.5))
            return True

    def abandon(self, reason: str) -> List[str]:
        """Answer ``worker_shutdown`` for every handler that still runs, and cancel it; their names."""
        with self._condition:
            records = [record for record in self._records.values() if record.state == _RUNNING]
            for record in records:
                self._claim_early(record)
        failure = protocol.failure("worker_shutdown", "the worker stopped before the task ended")
        for record in records:
            if record.context is not None:
                record.context._cancel(reason, answered=True)
            self._finish_early(record, failure)
        return [_name(record.task) for record in records]

    def end_pool(self, deadline: Deadline) -> None:
        """End the pool's threads; a foreign executor is its owner's to end."""
        if self._foreign is not None or not isinstance(self._pool, ThreadPoolExecutor):
            return
        with self._condition:
            # A thread that has told its result may still be in its last report.
            while self._busy and not self._stragglers and not deadline.is_expired():
                self._condition.wait(min(deadline.remaining(), 0.1))
            is_idle = not self._busy
        self._pool.shutdown(wait=is_idle)

    # -- running (the pool's threads) --

    def _begin(self, record: _Record) -> _Record:
        """Move a record to running, with a permit that is there. Needs the lock."""
        self._permits -= 1
        record.state = _RUNNING
        record.is_begun = record.holds_permit = True
        record.entry.running += 1
        self._running += 1
        self._busy += 1
        return record

    def _hand_over(self, record: _Record) -> None:
        """Give a begun record to a thread; where there is none any more, answer it."""
        pool = self._pool
        if pool is None:
            pool = self._pool = ThreadPoolExecutor(2 * self._max_workers, thread_name_prefix="sekuire-task")
        try:
            future = pool.submit(self._work, record)
        except Exception as error:  # noqa: BLE001  # An executor of the user's own may refuse in its own way.
            problem = f"{type(error).__name__}: {error}"
        else:
            if self._foreign is not None:
                future.add_done_callback(functools.partial(self._miss, record))
            return
        if self._foreign is None and self._has_threads and "start new thread" in problem:
            # The pool has queued the call before it failed.
            log.warning("no further thread can be started; the task waits for one of those there are")
            return
        log.error("the executor takes no more work (%s)", problem)
        record.is_lost = True
        self._lose_thread(record)

    def _miss(self, record: _Record, future: Future[None]) -> None:
        """A foreign executor is done with a record; it may have cancelled it instead of running it."""
        if not record.is_reached:
            log.error("[%s] the executor has not run this task", record.task.task_id)
            self._lose_thread(record)
            # Not from here: whoever cancels may hold the executor's lock, which handing over needs.
            self._timer.call_at(0.0, self.begin_waiting)

    def _lose_thread(self, record: _Record) -> None:
        """A begun record that no thread will come to: answer it, and free its place."""
        if self._claim(record):
            self._finish_early(record, protocol.failure("worker_shutdown", "the worker's executor takes no more work"))
        with self._condition:
            self._busy -= 1
            self._permits += record.holds_permit
            record.holds_permit = False
            self._condition.notify_all()

    def begin_waiting(self) -> None:
        """Begin and answer what waits, as far as there is room for it. Any thread, without a lock."""
        while self._refused:
            with self._condition:
                if not self._refused or not self._sink.has_room():
                    break
                refused = self._refused.popleft()
                self._leave_queue(refused)
                refused.state = _CLAIMED
            self._reject_record(refused, _terminated())
        while self._permits and self._queue:
            with self._condition:
                record = self._pick() if self._permits else None
                if record is None:
                    return
            self._hand_over(record)

    def _work(self, record: Optional[_Record]) -> None:
        """Run records until none waits; with a foreign executor one, so that its other users get their turn."""
        with owned_by(self._owner):
            self._has_threads = True
            while record is not None:
                record.is_reached = True
                if record.is_lost:
                    return
                try:
                    self._run(record)
                except BaseException as error:
                    # Nothing of a handler's gets here; what does must cost one task, not a thread and its permit.
                    log.exception("[%s] running the task failed in an unforeseen way", record.task.task_id)
                    if self._claim(record):
                        message = f"the worker failed ({type(error).__name__})"
                        self._finish_early(record, protocol.failure("handler_error", message))
                current_task.set(None)
                record = self._next_for(record)
                if record is not None and self._foreign is not None:
                    self._hand_over(record)
                    self.begin_waiting()
                    return

    def _next_for(self, done: _Record) -> Optional[_Record]:
        """A thread is free of ``done``, however that went: the record it has to run next."""
        following = None
        with self._condition:
            self._busy -= 1
            was_late = done in self._stragglers
            if was_late:
                self._stragglers.discard(done)
                # This thread is free again, and may be what another one's place can be filled with.
                self._replace_stragglers()
            self._condition.notify_all()
            if done.holds_permit:
                done.holds_permit = False
                self._permits += 1
                following = self._pick()
        if was_late:
            log.info("[%s] the handler ended after its task was answered; its result is discarded", done.task.task_id)
            self.begin_waiting()
        return following

    def _pick(self) -> Optional[_Record]:
        """The next record that may begin, begun. Its caller has seen that there is a permit. Needs the lock."""
        while self._queue and self._sink.has_room() and self._lease_held():
            record = self._queue.popleft()
            if not record.entry.has_room():
                record.entry.parked.append(record)
                continue
            self._leave_queue(record)
            return self._begin(record)
        return None

    def _leave_queue(self, record: _Record) -> None:
        """Take a record out of what waits. Needs the lock."""
        self._waiting -= 1
        self._waiting_bytes -= record.cost
        # The stream's thread may wait for the room.
        self._condition.notify_all()

    def _take_unbegun(self) -> List[_Record]:
        """Claim all records whose handler has not begun, an executor's queue included. Needs the lock."""
        taken = [
            record
            for record in self._records.values()
            if record.state == _WAITING or (record.state == _RUNNING and not record.is_called)
        ]
        self._queue.clear()
        self._refused.clear()
        for record in taken:
            record.entry.parked.clear()
            record.state = _CLAIMED
        self._waiting = self._waiting_bytes = 0
        return taken

    def _run(self, record: _Record) -> None:
        task = record.task
        context = TaskContext(task, progress=self._sink.progress)
        with self._condition:
            if record.state != _RUNNING:
                return
            context._attempt = record.attempt
            record.context = context
            record.is_called = self._gateway is None
        current_task.set(context)
        if not self._has_lease(record):
            return
        denial = self._ask_gateway(task, context)
        if self._gateway is not None and not self._goes_on(record):
            return
        if denial is not None:
            completion = Completion(task_id=task.task_id, attempt=record.attempt, failure=denial)
        else:
            began = self._start_clock(record, context)
            given = task.input if record.packed is None else protocol.unpack(record.packed)
            completion = outcomes.run(
                record.entry, context, given, began=began, expose_errors=self._expose_errors, scrub=self._scrub
            )
            if record.timer is not None:
                self._timer.cancel(record.timer)
        if not self._claim(record):
            return
        count = "completed" if completion.failure is None else "failed"
        self._finish(record, completion, "rejected" if denial is not None else count)

    def _goes_on(self, record: _Record) -> bool:
        """Whether a task still begins after its policy was asked, which may have taken its time."""
        with self._condition:
            if record.state != _RUNNING:
                return False
            record.is_called = True
        return self._has_lease(record)

    def _has_lease(self, record: _Record) -> bool:
        """Whether the lease allows a task to begin now; else it is given back."""
        if self._lease_held():
            return True
        if self._claim(record):
            self._give_back_record(record)
        return False

    def _start_clock(self, record: _Record, context: TaskContext) -> float:
        """Count the task's time from now, which is returned."""
        began = record.began = time.monotonic()
        limits = [t for t in (self._task_timeout, record.entry.timeout, record.task.timeout) if t is not None]
        if limits:
            end = context._deadline = began + min(limits)
            record.timer = self._timer.call_at(end, functools.partial(self._expire, record))
        return began

    def _ask_gateway(self, task: Task, context: TaskContext) -> Optional[Failure]:
        gateway = self._gateway
        if gateway is None:
            return None
        try:
            if self._check_task is not None:
                # A gateway of the user's own that knows no tools fails for a task that names one: it is denied.
                asked = (task.capability,) if task.tool is None else (task.capability, task.tool)
                enforcer = context._policy = self._check_task(*asked)
                if self._on_checked is not None and enforcer is not None and enforcer.policy is not None:
                    self._on_checked(task)
            else:
                gateway.check_request()
                gateway.check_capability(task.capability)
                if task.tool is not None and self._check_tool is not None:
                    self._check_tool(task.tool)
        except (PolicyViolationError, PolicyUnavailableError) as error:
            return outcomes.failure_of(error, context, self._expose_errors, self._scrub)
        except ConfigurationError as error:
            log.error("[%s] the policy cannot be asked, the task is denied: %s", task.task_id, error)
            return protocol.failure("policy_unavailable", str(error))
        except Exception as error:
            log.exception("[%s] the policy gateway failed; the task is denied", task.task_id)
            return protocol.failure("policy_unavailable", f"the policy gateway failed ({type(error).__name__})")
        return None

    # -- ends of a task --

    def _claim(self, record: _Record) -> bool:
        """Become the one that answers this task; whether nobody was before."""
        with self._condition:
            if record.state != _RUNNING:
                return False
            record.state = _CLAIMED
            return True

    def _claim_early(self, record: _Record) -> None:
        """Claim a running record before its handler has ended. Needs the lock."""
        # One step: the handler may end at any moment after, and then it is no straggler any more.
        record.state = _CLAIMED
        if record.context is not None:
            self._stragglers.add(record)

    def _answer(self, record: _Record, completion: Completion, count: str) -> Optional[Accepted]:
        """Give a claimed record's result to the sink, then forget the record; what is to be sent."""
        report: Optional[Accepted] = None
        # Known to the sink before it is forgotten here: a repeated delivery must always meet one of the two.
        try:
            try:
                report = self._sink.accept(completion)
            except BaseException as error:
                # Part of a result is code of the user's own. Whatever it does, the task is answered and its place free.
                log.exception("[%s] the result cannot be taken", record.task.task_id)
                count = "failed"
                failure = protocol.failure("handler_error", f"the worker failed ({type(error).__name__})")
                completion = attrs.evolve(completion, output=None, failure=failure)
                report = self._sink.accept(completion)
            self._tell_result(record.task, completion, report)
        finally:
            if count == "completed" and report is not None and report.code is not None:
                count = "failed"  # The sink could not send what the handler gave.
            with self._condition:
                if record.attempt > completion.attempt:
                    self._sink.recall(record.task.task_id, record.attempt)
                self._forget(record)
                setattr(self.counts, count, getattr(self.counts, count) + 1)
        return report

    def _tell_result(self, task: Task, completion: Completion, report: Optional[Accepted]) -> None:
        if self._on_result is None or report is None:
            return
        try:
            self._on_result(task, completion, report)
        except BaseException:
            # What is accepted must be sent.
            log.exception("[%s] telling of the result failed", task.task_id)

    def _finish(self, record: _Record, completion: Completion, count: str) -> None:
        report = self._answer(record, completion, count)
        try:
            # One that was parked behind this one must not wait for the report below.
            self.begin_waiting()
        finally:
            if report is not None:
                self._send(report)

    def _send(self, report: Accepted) -> None:
        """Send the result of a handler, in its thread."""
        if self._foreign is None:
            self._sink.post(report)
            return
        # Not by this thread, whose executor has other users. But the result must be on disk however long the platform
        # lets the others wait.
        try:
            self._sink.keep(report)
        finally:
            self._sink.enqueue(report)

    def _finish_early(self, record: _Record, failure: Failure) -> None:
        """Answer a claimed record whose handler still runs (or never began)."""
        completion = Completion(
            task_id=record.task.task_id,
            attempt=record.attempt,
            failure=failure,
            execution_time_ms=record.elapsed_ms(),
        )
        report = self._answer(record, completion, "failed")
        if report is not None:
            self._sink.enqueue(report)

    def _forget(self, record: _Record) -> None:
        """Take a claimed record out; a parked one of the same handler gets its turn. Needs the lock."""
        self._records.pop(record.task.task_id, None)
        entry = record.entry
        if record.is_begun:
            self._running -= 1
            entry.running -= 1
        if entry.parked and entry.has_room():
            self._queue.append(entry.parked.popleft())
        self._condition.notify_all()

    def _expire(self, record: _Record) -> None:
        """The timer's thread: a task's time is over."""
        with self._condition:
            if record.state != _RUNNING:
                return
            self._claim_early(record)
        if record.context is not None:
            record.context._cancel("timeout", answered=True)
        self._finish_early(record, protocol.failure("timeout", "the task's time was over before its handler ended"))
        with self._condition:
            self._replace_stragglers()
            count = len(self._stragglers)
            replaced = not record.holds_permit
        log.warning(
            "[%s] the handler of %r has not ended in its time; the task is answered 'timeout'%s (%d such handlers run)",
            record.task.task_id, record.task.capability,
            "" if replaced else ", and its thread cannot be replaced", count,
        )  # fmt: skip
        self.begin_waiting()

    def _replace_stragglers(self) -> None:
        """Pass on the permits of as many stragglers as the pool has threads to replace. Needs the lock."""
        replaced = sum(not record.holds_permit for record in self._stragglers)
        for record in self._stragglers:
            if record.holds_permit and replaced < self._max_workers:
                record.holds_permit = False
                self._permits += 1
                replaced += 1
        self._condition.notify_all()

    def _reject(self, task: Task, attempt: int, failure: Failure) -> None:
        with self._condition:
            self.counts.rejected += 1
        _log_answer(task, failure)
        completion = Completion(task_id=task.task_id, attempt=attempt, failure=failure)
        report = self._sink.accept(completion)
        if report is not None:
            self._tell_result(task, completion, report)
            self._sink.enqueue(report)

    def _reject_record(self, record: _Record, failure: Failure) -> None:
        task = record.task
        failure = record.refusal or failure
        _log_answer(task, failure)
        completion = Completion(task_id=task.task_id, attempt=record.attempt, failure=failure)
        report = self._answer(record, completion, "rejected")
        if report is not None:
            self._sink.enqueue(report)

    def _give_back_record(self, record: _Record) -> None:
        with self._condition:
            self._forget(record)
        self._give_back(record.task, record.attempt)

    def _give_back(self, task: Task, attempt: int, delay: float = 0.0) -> None:
        # Without its input: many may be under way.
        task = attrs.evolve(task, input=None)

        def answer(order: _Order) -> None:
            with self._condition:
                if self._given.get(order.task_id) is not order:
                    # It has come again.
                    return
                del self._given[order.task_id]
                self.counts.released -= 1
            failure = protocol.failure("worker_shutdown", "the worker gave the task back unbegun")
            self._reject(task, attempt, failure)

        order = _Order(self._condition, task.task_id, attempt, answer)
        with self._condition:
            self.counts.released += 1
            self._given[task.task_id] = order
        log.info("[%s] %s is given back unbegun", task.task_id, _capability(task))
        self._sink.release(order, delay)


def _unknown(context: TaskContext, input: Any) -> None:
    """Stands for the handler of a task that is only answered."""


_NO_HANDLER = HandlerEntry("?", _unknown)


def _terminated() -> Failure:
    return protocol.failure("worker_terminated", "the worker was terminated before this task began")


def _capability(task: Task) -> str:
    """A task's capability for a log line: whatever the platform sent, which must not forge one."""
    return protocol.one_line(task.capability)[:200]


def _name(task: Task) -> str:
    return f"{_capability(task)} {task.task_id}"


def _log_answer(task: Task, failure: Failure) -> None:
    log.info("[%s] %s is answered %s: %s", task.task_id, _capability(task), failure.code, failure.message)


def _is_remote(executor: Optional[Executor]) -> bool:
    """Whether ``executor`` runs calls in other processes."""
    if executor is None:
        return False
    from ..executors import remote  # Only here: it loads what most workers never need.

    return remote.is_remote(executor)
