"""Decide what happens to each task that arrives: run it, let it wait, answer it, or give it back."""

from __future__ import annotations

from typing import Callable, Dict, List, Optional

import attrs

from .._internal.logs import SparseLog, get_logger
from .._internal.threads import Deadline, Timer
from ..config import WorkerConfig
from ..handlers.context import TaskContext
from ..handlers.registry import HandlerEntry, TaskRegistry
from ..wire import protocol
from ..wire.models import Failure, Task
from . import release
from .answers import Answers, WorkerAudit
from .approvals import Approvals
from .calling import Caller
from .gates import RELEASE_PAUSE
from .gates import WAITING_COST as WAITING_COST
from .records import (
    RECEIVED,
    REJECTED,
    RELEASED,
    RUNNING,
    SENT,
    STARTING,
    WAITING,
    Counts,
    PushedSink,
    Record,
    Records,
    State,
    Withdrawal,
    move,
)
from .release import Release
from .running import Lease, Runner, terminated
from .sink import PlatformSink

log = get_logger("sekuire.dispatch")

#: Longest wait of the stream's thread between two looks for room, in seconds.
_LOOK_AGAIN = 0.25
#: Waiting tasks from which on further ones wait with their input as JSON, a fourth of its size in Python's objects;
#: and the size of a task's JSON, in bytes, above which each one does.
_UNPACKED, _UNPACKED_BYTES = 64, 16 * 1024


class Dispatcher:
    """Decide what happens to each task, and start, pause, cancel and drain their handlers. ::

        dispatcher = Dispatcher(config, registry, reporter, timer=timer, lease=lease)
        dispatcher.submit(task)
        dispatcher.close(False)
        dispatcher.drain(Deadline(10.0))

    What cannot start waits: for a thread, for the lease, or for results to be delivered. So the stream is read on, and
    a command behind a thousand tasks acts at once. What waits has at most ``max_waiting_bytes``. After that a new task
    is released. Only if the platform accepts no releases does :meth:`submit` block until there is room.

    :param lease: the platform's permission to work, looked at when a task arrives and before its handler is called.
    :param audit: notes the tasks that the policy allowed, and the results.
    :param approvals: asks people for approval. None: what needs an approval is denied.
    """

    # Threads: the stream's thread calls submit() and answer_malformed(); any thread may pause, cancel, close and drain.
    # The lock of `records` guards the records and the flags here. It is never held over a handler, a policy check or
    # I/O: what must be called or answered is taken out under the lock and done after.

    def __init__(
        self,
        config: WorkerConfig,
        registry: TaskRegistry,
        sink: PlatformSink,
        *,
        timer: Timer,
        lease: Lease,
        audit: Optional[WorkerAudit] = None,
        approvals: Optional[Approvals] = None,
        owner: object = None,
    ) -> None:
        self.records = Records(config.max_workers)
        self.answers = Answers(self.records, audit)
        caller = Caller(config, audit)
        self._runner = Runner(
            config, self.records, self.answers, caller, sink, timer=timer, lease=lease, approvals=approvals, owner=owner
        )
        self.approvals = approvals
        self._registry, self._sink = registry, sink
        self._max_waiting_bytes, self._max_event_bytes = config.max_waiting_bytes, config.max_event_bytes
        self._malformed_log = SparseLog(log.name)
        self._monitor = self.records.monitor
        self._lock = self.records.lock
        #: Who has paused the worker, and why.
        self._pauses: Dict[str, Optional[str]] = {}
        #: "stopped" or "terminated" once nothing starts any more.
        self._closed: Optional[str] = None
        sink.on_room = self._runner.start_waiting

    def resize(self, config: WorkerConfig) -> None:
        """Take ``max_workers`` from ``config``, before the first task."""
        with self._lock:
            self.records.resize(config.max_workers)

    # -- what is now --

    @property
    def counts(self) -> Counts:
        """Return the totals since the start."""
        return self.records.counts

    @property
    def waiting(self) -> int:
        """Return how many tasks wait."""
        return self.records.waiting

    @property
    def waiting_bytes(self) -> int:
        """Return the size of the waiting tasks, at most ``max_waiting_bytes``."""
        return self.records.waiting_bytes

    @property
    def running(self) -> int:
        """Return how many tasks were started and have no answer."""
        return self.records.running

    def running_names(self) -> List[str]:
        """Return the tasks that have begun and have no answer."""
        with self._lock:
            return [record.name for record in self.records.known.values() if record.state in (STARTING, RUNNING, SENT)]

    def overdue_names(self) -> List[str]:
        """Return the tasks whose handler still runs although they have been answered."""
        with self._lock:
            return [record.name for record in self.records.overdue]

    def is_paused(self) -> bool:
        """Return True if anybody has paused the worker."""
        return bool(self._pauses)

    def is_paused_by(self, source: str) -> bool:
        """Return True if ``source`` has paused the worker."""
        return source in self._pauses

    # -- arrivals (the stream's thread) --

    def submit(self, task: Task) -> None:
        """Run a task, let it wait, answer it, or give it back.

        Blocks only while what waits fills ``max_waiting_bytes`` and the platform accepts no releases.
        """
        self._receive(Record(task, self._registry.find(task.capability) or _NO_HANDLER, self._sink, task.task_id))

    def push(self, task: Task, sink: PushedSink) -> None:
        """Run a task that did not come from the platform, let it wait, answer it, or give it back. Any thread.

        It is on the same path as the platform's, and its result goes to ``sink``. Never blocks.
        """
        record = Record(task, self._registry.find(task.capability) or _NO_HANDLER, sink, sink)
        sink.record = record
        self._receive(record)

    def answer_malformed(self, error: protocol.MalformedTask) -> None:
        """Answer a task that cannot run. One without an id can only be counted."""
        if error.task_id is None:
            self._malformed_log.error("the platform sent a task that cannot be read and has no id to answer: %s", error)
            with self._lock:
                self.counts.received += 1
                self.counts.dropped += 1
            return
        self._malformed_log.error("[%s] the platform sent a malformed task: %s", error.task_id, error)
        record = Record(
            Task(task_id=error.task_id, capability="?", attempt=error.attempt), _NO_HANDLER, self._sink, error.task_id
        )
        record.refusal = protocol.failure("invalid_task", str(error)).as_logged()
        self._receive(record)

    def _receive(self, record: Record) -> None:
        # One that may wait as it is finds its place in one step: most tasks of a busy worker wait for a moment.
        cost = None if _is_packed(record.task, self.records.waiting) else WAITING_COST + record.task.size
        with self._lock:
            self.records.counts.received += 1
            self.answers.call_off(record.key)
            state = self._place(record, cost)
        if state is None:
            state = self._hold(record)
        # Not the record's own state, which other threads may have changed by now.
        if state is STARTING:
            self._runner.hand_over(record)
        elif state is WAITING:
            self._runner.start_waiting()
        elif state is REJECTED:
            self.answers.reject(record, terminated())
        elif state is RELEASED:
            self.answers.give_back(record, RELEASE_PAUSE if self._closed is None else 0.0)

    def _place(self, record: Record, cost: Optional[int]) -> Optional[State]:
        """Move a new task out of RECEIVED, and return its state then. Needs the lock.

        Return RECEIVED if it is known already, so that nothing is left to do; None if there is no place for it now.

        :param cost: what it counts of ``max_waiting_bytes``; None to find no place where it would have to wait.
        """
        records = self.records
        if self._is_known(record):
            records.counts.duplicates += 1
            return RECEIVED
        sink = record.sink
        refusal = record.refusal = record.refusal or self._find_refusal(record)
        if self._closed is not None:
            move(record, RELEASED if refusal is None else REJECTED)
        # An answer takes room too: a platform that floods without accepting answers must not fill the memory.
        elif refusal is not None and sink.has_room():
            move(record, REJECTED)
        elif refusal is None and sink.has_room() and self._runner.can_start(record):
            records.start(record)
        elif cost is None:
            return None
        elif records.waiting_bytes + cost <= self._max_waiting_bytes:
            records.enqueue(record, cost)
        elif sink.can_release and sink.has_room_for_release():
            move(record, RELEASED)
        else:
            return None
        return record.state

    def _hold(self, record: Record) -> State:
        """Let a new task wait. If it does not fit, give it back, or wait here until it does."""
        cost = WAITING_COST + _pack(record, self.records.waiting, self._max_event_bytes)
        probe: Optional[Release] = None
        with self._lock:
            while True:
                # A release that is being sent is waited for: the platform may give the task to another worker.
                if probe is None or probe.state is not release.SENDING:
                    if probe is not None and probe.state is release.RELEASED:
                        move(record, RELEASED)
                        self.counts.released += 1
                        log.info("[%s] %s is given back unbegun: too many tasks wait",
                                 record.task.task_id, record.capability)  # fmt: skip
                        return RECEIVED
                    state = self._place(record, cost)
                    if state is not None:
                        break
                if probe is None and record.sink.can_release is None and record.sink.has_room_for_release():
                    # The task stays here until it is known that the platform accepts releases.
                    probe = Release(self._monitor, record.task.task_id, record.attempt)
                    record.sink.release(probe)
                    continue
                log.debug("no room for task %s: the stream is not read on until there is", record.task.task_id)
                self._monitor.wait(_LOOK_AGAIN)
            if probe is not None:
                probe.call_off()
            return state

    def _is_known(self, new: Record) -> bool:
        """Return True if a task was delivered before. A higher attempt is noted then. Needs the lock."""
        record = self.records.known.get(new.key)
        task = new.task
        if record is None:
            return new.sink.redelivered(task.task_id, task.attempt)
        record.raise_attempt(task.attempt)
        if record.is_ended:
            # Its result may be on its way to the sink already.
            new.sink.redelivered(task.task_id, record.attempt)
        return True

    def _find_refusal(self, record: Record) -> Optional[Failure]:
        """Return the answer to a new task that must not run now, or None."""
        if self._closed == "terminated":
            return terminated()
        if self._closed is not None:
            return None
        if self._pauses:
            return self._paused()
        if record.entry is _NO_HANDLER:
            return protocol.failure("unknown_capability", f"no handler for {record.task.capability[:200]!r}")
        return None

    def _paused(self) -> Failure:
        reason = next((reason for reason in self._pauses.values() if reason), None)
        return protocol.failure("worker_paused", "the worker is paused" + (f": {reason}" if reason else ""))

    # -- pause, cancel, close (any thread) --

    def start_waiting(self) -> None:
        """Start and answer what waits, as far as there is room for it. Any thread, without a lock."""
        self._runner.start_waiting()

    def pause(self, source: str, reason: Optional[str] = None) -> bool:
        """Set the pause of ``source``, and answer what has not begun ``worker_paused``. Return False if it was set."""
        with self._lock:
            if self._closed is not None:
                return False
            is_new = source not in self._pauses
            self._pauses[source] = reason
            failure = self._paused()
            taken = self.records.take_unstarted()
            marked = self.records.mark_withdrawn(Withdrawal(failure))
            for record in taken:
                move(record, REJECTED)
        self.answers.end_each(taken, lambda record: self.answers.reject(record, failure))
        self.answers.end_each(marked, Record.withdraw)
        self._runner.start_waiting()
        return is_new

    def resume(self, *sources: str) -> bool:
        """Clear the pauses of ``sources``. Return True if one of them was set."""
        with self._lock:
            cleared = [source for source in sources if source in self._pauses]
            for source in cleared:
                del self._pauses[source]
            self._monitor.wake()
        return bool(cleared)

    def close(self, is_terminated: bool) -> None:
        """Start no further task. Release those that have not begun, or answer them ``worker_terminated``."""
        with self._lock:
            if self._closed is None or is_terminated:
                self._closed = "terminated" if is_terminated else "stopped"
            taken = self.records.take_unstarted()
            rejected = [record for record in taken if is_terminated or record.refusal is not None]
            released = [record for record in taken if not (is_terminated or record.refusal is not None)]
            for record in rejected:
                move(record, REJECTED)
            for record in released:
                move(record, RELEASED)
            marked = self.records.mark_withdrawn(Withdrawal(terminated() if is_terminated else None))
        try:
            self.answers.end_each(rejected, lambda record: self.answers.reject(record, terminated()))
        finally:
            self.answers.end_each(released, self.answers.give_back)
        self.answers.end_each(marked, Record.withdraw)

    def cancel_running(self, reason: str) -> None:
        """Cancel the context of every handler that runs."""
        with self._lock:
            records = [*self.records.known.values(), *self.records.overdue]
        for record in records:
            record.cancel(reason)

    def lose_lease(self) -> None:
        """Give back what has not begun and cancel what runs: other workers get it. What comes later waits."""
        with self._lock:
            taken = self.records.take_startable()
            for record in taken:
                move(record, RELEASED)
            # Those that have not begun in another process end when they are cancelled.
            self.records.mark_withdrawn(Withdrawal(None))
        try:
            self.answers.end_each(taken, self.answers.give_back)
        finally:
            self.cancel_running("lease lost")

    def cancel_denied(self, is_allowed: Callable[..., bool], reason: str) -> None:
        """Cancel the context of every handler whose capability, or whose task's tool, is not allowed any more."""
        with self._lock:
            # A record has its control before the gateway is asked: none that an older policy let pass is missed here.
            records = [record for record in self.records.known.values() if record.control is not None]
        for record in records:
            if not is_allowed(record.task.capability, record.task.tool) and not self._runner.reconsider(record):
                log.warning("[%s] %s is not allowed by the new policy and cancelled", record.task.task_id,
                            record.task.capability)  # fmt: skip
                record.cancel(reason)

    def wake(self) -> None:
        """Have every wait look at its deadline again."""
        with self._lock:
            self._monitor.wake()

    def drain(self, deadline: Deadline) -> bool:
        """Wait until nothing runs. Return False if ``deadline`` came first."""
        with self._lock:
            while self.records.running or self.records.waiting:
                if deadline.is_expired():
                    return False
                self._monitor.wait(min(deadline.remaining(), 0.5))
            return True

    def abandon(self, reason: str) -> List[str]:
        """Answer ``worker_shutdown`` for every handler that still runs, and cancel it. Return their names."""
        with self._lock:
            records = [record for record in self.records.known.values() if record.state in (STARTING, RUNNING, SENT)]
            for record in records:
                self.records.end_early(record)
        failure = protocol.failure("worker_shutdown", "the worker stopped before the task ended").as_logged()

        def end(record: Record) -> None:
            try:
                record.cancel(reason, is_answered=True)
            finally:
                self.answers.end_early(record, failure)

        self.answers.end_each(records, end)
        return [record.name for record in records]

    def end_pool(self, deadline: Deadline) -> None:
        """End the pool's threads. An executor of the user's own is its owner's to end."""
        self._runner.end_pool(deadline)


def _unknown(context: TaskContext, input: object) -> None:
    """Do nothing, in place of the handler of a task that is only answered."""


_NO_HANDLER = HandlerEntry("?", _unknown)


def _is_packed(task: Task, waiting: int) -> bool:
    """Return True if a task that has to wait beside ``waiting`` others is to wait with its input as JSON."""
    return waiting >= _UNPACKED or task.size > _UNPACKED_BYTES


def _pack(record: Record, waiting: int, most: int) -> int:
    """Pack the input of a task that is to wait, if it waits long or is large. Return its size in bytes.

    :param most: the size of one whose input has no JSON.
    """
    task = record.task
    if record.refusal is not None:
        record.task = attrs.evolve(task, input=None)
    elif _is_packed(task, waiting):
        # Without the lock: it may be large.
        packed = protocol.pack(task.input)
        if packed is None:
            return max(task.size, most)
        record.task = attrs.evolve(task, input=None)
        record.packed = packed
        return max(task.size, len(packed))
    return task.size
