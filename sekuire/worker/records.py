"""Track each task from its arrival to its end: its state, and its share of the worker's limits."""

from __future__ import annotations

import enum
from collections import deque
from typing import Deque, Dict, Hashable, List, NamedTuple, Optional, Protocol, Set, Tuple

from .._internal.clock import time
from .._internal.monitor import Monitor
from .._internal.threads import Deadline
from ..handlers.context import APPROVAL_TIME, Asked, TaskControl
from ..handlers.registry import HandlerEntry
from ..wire import protocol
from ..wire.models import Failure, Task
from .sink import ResultSink


class State(enum.Enum):
    """Name the states of a task. ``edges`` are the states that may follow; a state without edges is the end."""

    #: The stream's thread has it in hand.
    RECEIVED = "received"
    #: It waits for a thread, for the lease, or for results to be delivered.
    WAITING = "waiting"
    #: A thread has it, or will have it. Its handler was not called: the policy is asked first.
    STARTING = "starting"
    #: A person has to approve it before its handler is called. No thread has it.
    ASKING = "asking"
    #: Its handler is called, or was.
    RUNNING = "running"
    #: Its call is in an executor of other processes, or will be, which may or may not have begun it.
    SENT = "sent"
    #: It is answered with a failure; its handler was not called.
    REJECTED = "rejected"
    #: It goes back to the platform; its handler was not called.
    RELEASED = "released"
    #: It is answered; its handler was called, or its thread was lost.
    FINISHED = "finished"

    def __init__(self, name: str) -> None:
        # On the state itself, because a look-up by an enum's member is slow.
        self.edges: Tuple[State, ...] = ()


RECEIVED, WAITING, STARTING, ASKING, RUNNING, SENT, REJECTED, RELEASED, FINISHED = State
RECEIVED.edges = (STARTING, WAITING, REJECTED, RELEASED)
WAITING.edges = (STARTING, REJECTED, RELEASED)
# To FINISHED: when a stop does not wait for its policy, when its thread is lost, or when something fails before the
# handler is called.
STARTING.edges = (RUNNING, SENT, ASKING, REJECTED, RELEASED, FINISHED)
# To FINISHED: when the platform has given the task to another worker.
ASKING.edges = (WAITING, REJECTED, RELEASED, FINISHED)
RUNNING.edges = (FINISHED,)
# To REJECTED and RELEASED: when its call was taken back before it began.
SENT.edges = (FINISHED, REJECTED, RELEASED)
# The platform does not offer releases, so the task is answered instead.
RELEASED.edges = (REJECTED,)


#: The states, after the arrival, of a task whose handler was not called and that has no answer.
_UNSTARTED = (WAITING, STARTING, ASKING)


class Withdrawal(NamedTuple):
    """Say how a task ends that has not begun in its executor: with ``failure``, or given back without one."""

    failure: Optional[Failure]


class Gate:
    """Keep what is asked for a task before its handler begins, over all questions and policies."""

    __slots__ = ("asked", "deadline", "skipped")

    def __init__(self) -> None:
        self.asked = Asked()
        #: How many numbers nobody has answered in earlier runs.
        self.skipped = 0
        self.deadline = Deadline(APPROVAL_TIME)


class Record:
    """Describe one task between its arrival and its end. The lock of :class:`Records` guards every field.

    - ``sink``: where its result goes.
    - ``key``: what it is known by: the id of a task of the platform's. One that came otherwise has a key that no such
      id equals.
    - ``attempt``: the newest attempt under which it was delivered.
    - ``packed``: its input as JSON, if it waits without it.
    - ``cost``: what it counts of ``max_waiting_bytes``.
    - ``refusal``: its answer, if it must not run; it waits with it while results pile up.
    - ``gate``: what is asked for it before its handler is called; None if the policy wants nothing approved.
    - ``control``: of its handler's context, made by its thread when that comes to it.
    - ``timer``: the number of the call that ends its time.
    - ``withdrawal``: how it ends if its handler has not begun in another process; None if it is to begin.
    - ``began``: when its handler was called (``time.monotonic()``). Only its own thread writes it, once.
    - ``holds_permit``, ``holds_place``, ``holds_thread``: what it occupies of ``max_workers``, of its handler's
      ``max_concurrency``, and of the pool. It gives each back at a moment of its own.
    """

    __slots__ = (
        "attempt",
        "began",
        "control",
        "cost",
        "entry",
        "gate",
        "holds_permit",
        "holds_place",
        "holds_thread",
        "key",
        "packed",
        "refusal",
        "sink",
        "state",
        "task",
        "timer",
        "withdrawal",
    )

    def __init__(self, task: Task, entry: HandlerEntry, sink: ResultSink, key: Hashable) -> None:
        self.task = task
        self.entry = entry
        self.sink = sink
        self.key = key
        self.attempt = task.attempt
        self.state = RECEIVED
        self.control: Optional[TaskControl] = None
        self.gate: Optional[Gate] = None
        self.timer: Optional[int] = None
        self.began: Optional[float] = None
        self.packed: Optional[bytes] = None
        self.cost = 0
        self.refusal: Optional[Failure] = None
        self.withdrawal: Optional[Withdrawal] = None
        self.holds_permit = self.holds_place = self.holds_thread = False

    @property
    def name(self) -> str:
        """Return the task's capability and id, for a log line."""
        return f"{self.capability} {self.task.task_id}"

    @property
    def capability(self) -> str:
        """Return the task's capability for a log line: whatever the platform sent, which must not forge one."""
        return protocol.one_line(self.task.capability)[:200]

    @property
    def is_ended(self) -> bool:
        """Return True if the task has its answer, or goes back to the platform."""
        return self.state is FINISHED or self.state is REJECTED or self.state is RELEASED

    def elapsed_ms(self) -> int:
        """Return the milliseconds since the handler was called, 0 if it never was."""
        return 0 if self.began is None else int((time.monotonic() - self.began) * 1000)

    def input(self) -> object:
        """Return the task's input, unpacked if it waited as JSON."""
        return self.task.input if self.packed is None else protocol.unpack(self.packed)

    def cancel(self, reason: str, *, is_answered: bool = False) -> None:
        """Cancel the handler's context, if its thread has come to it."""
        if self.control is not None:
            self.control.cancel(reason, answered=is_answered)

    def call_off(self, reason: str) -> bool:
        """Cancel the handler's context because the task's requester wants it. Return True if it was not cancelled."""
        return self.control is not None and self.control.call_off(reason)

    def withdraw(self) -> None:
        """Ask for it back, if its handler waits to begin in another process."""
        if self.control is not None:
            self.control.withdraw()

    def raise_attempt(self, attempt: int) -> None:
        """Note a delivery under a higher attempt: its number is what the platform will accept. Needs the lock."""
        if attempt > self.attempt:
            self.attempt = attempt
            if self.control is not None:
                self.control.attempt = attempt


class PushedSink(ResultSink, Protocol):
    """Accept the result of one task that did not come from the platform. ``record`` is its record, once it has one."""

    record: Optional[Record]

    def __hash__(self) -> int: ...


def move(record: Record, to: State) -> None:
    """Change a task's state. Nothing else does. Needs the lock."""
    assert to in record.state.edges, f"{record.state} -> {to}"
    record.state = to


class Counts:
    """Count totals since the start. They change under the lock of :class:`Records`."""

    __slots__ = ("completed", "dropped", "duplicates", "failed", "received", "rejected", "released")

    def __init__(self) -> None:
        self.received = self.completed = self.failed = self.rejected = 0
        self.released = self.duplicates = self.dropped = 0


class Records:
    """Keep the tasks of one worker, its queue and its permits. It decides nothing and calls no other part.

    ``monitor.lock`` guards all of it; every method needs it, except where it says otherwise. ``monitor`` wakes those
    who wait for room, for the drain, or for the pool to be idle.

    A handler that outlives its task is *overdue*. Its permit goes to another task, for up to ``max_workers`` of them:
    the pool has twice as many threads, because a thread cannot be taken from a handler that does not return.
    """

    def __init__(self, max_workers: int) -> None:
        self.monitor = Monitor()
        self.lock = self.monitor.lock
        self.counts = Counts()
        #: Tasks that have not ended, and those whose result is about to be handed on.
        self.known: Dict[Hashable, Record] = {}
        #: What waits to start, and what waits to be refused.
        self.queue: Deque[Record] = deque()
        self.refused: Deque[Record] = deque()
        self.waiting = 0
        self.waiting_bytes = 0
        #: What waits for a person's approval before its handler is called. It counts as waiting.
        self.asking: Set[Record] = set()
        #: Tasks that hold a place; threads that have a task, or will; permits that nobody holds.
        self.running = 0
        self.threads = 0
        self.overdue: Set[Record] = set()
        self.resize(max_workers)

    def resize(self, max_workers: int) -> None:
        """Change the limit, before the first task."""
        self.max_workers = self.permits = max_workers

    # -- waiting --

    def enqueue(self, record: Record, cost: int) -> None:
        """Queue a new task. It waits to start, or to be answered with its refusal."""
        move(record, WAITING)
        self.known[record.key] = record
        record.cost = cost
        if record.refusal is not None:
            self.refused.append(record)
        elif record.entry.has_room():
            self.queue.append(record)
        else:
            record.entry.parked.append(record)
        self.waiting += 1
        self.waiting_bytes += cost

    def leave_queue(self, record: Record) -> None:
        """Count a record as waiting no more."""
        self.waiting -= 1
        self.waiting_bytes -= record.cost
        if self.asking:
            self.asking.discard(record)
        # The stream's thread may wait for the room.
        self.monitor.wake()

    def take_waiting(self, record: Record) -> None:
        """Take a waiting record out of its queue, for the caller to end."""
        queues = (self.refused,) if record.refusal is not None else (self.queue, record.entry.parked)
        for queue in queues:
            if record in queue:
                queue.remove(record)
        self.leave_queue(record)

    def next_startable(self) -> Optional[Record]:
        """Take the next waiting record whose handler has room out of the queue. Return None if there is none."""
        while self.queue:
            record = self.queue.popleft()
            if record.entry.has_room():
                self.leave_queue(record)
                return record
            record.entry.parked.append(record)
        return None

    def take_unstarted(self) -> List[Record]:
        """Return all records whose handler was not called, for the caller to end. Nothing waits any more."""
        taken = [record for record in self.known.values() if record.state in _UNSTARTED]
        self.queue.clear()
        self.asking.clear()
        self.refused.clear()
        for record in taken:
            record.entry.parked.clear()
        self.waiting = self.waiting_bytes = 0
        self.monitor.wake()
        return taken

    def take_startable(self) -> List[Record]:
        """Return all records whose handler was not called, except those that wait to be refused, for the caller to end.

        The latter go on waiting.
        """
        # Both lists first: what fails must leave the queue as it is.
        waiting = [
            record
            for record in self.known.values()
            if record.state is ASKING or (record.state is WAITING and record.refusal is None)
        ]
        taken = waiting + [record for record in self.known.values() if record.state is STARTING]
        self.queue.clear()
        for record in waiting:
            record.entry.parked.clear()
            self.leave_queue(record)
        return taken

    def mark_withdrawn(self, withdrawal: Withdrawal) -> List[Record]:
        """Have each record end by ``withdrawal`` whose call has not begun in another process. Return those to ask.

        The caller calls ``withdraw()`` of each one's control, without the lock.
        """
        marked = [record for record in self.known.values() if record.state is SENT]
        for record in marked:
            record.withdrawal = withdrawal
        return marked

    # -- waiting for approval --

    def park(self, record: Record, cost: int) -> None:
        """Let a starting record wait for an approval, without a thread, a permit and a place."""
        move(record, ASKING)
        self.free_thread(record)
        self._free_place(record)
        record.cost = cost
        self.asking.add(record)
        self.waiting += 1
        self.waiting_bytes += cost

    def requeue(self, record: Record) -> None:
        """Let a record that was approved wait to start, before those that came after it."""
        move(record, WAITING)
        self.asking.discard(record)
        (self.queue if record.entry.has_room() else record.entry.parked).appendleft(record)

    # -- permits, places and threads --

    def start(self, record: Record) -> Record:
        """Give a new or waiting record a permit, a place and a thread. Return it. Needs a free permit."""
        move(record, STARTING)
        self.known[record.key] = record
        self.permits -= 1
        record.entry.running += 1
        self.running += 1
        self.threads += 1
        record.holds_permit = record.holds_place = record.holds_thread = True
        return record

    def free_thread(self, record: Record) -> bool:
        """Take the thread back, and the permit if it still holds one. Return True if the handler was overdue."""
        if not record.holds_thread:
            return False
        self.threads -= 1
        record.holds_thread = False
        if record.holds_permit:
            record.holds_permit = False
            self.permits += 1
        was_overdue = False
        if self.overdue and record in self.overdue:
            was_overdue = True
            self.overdue.remove(record)
            # The thread is free again, so the permit of another overdue handler can be passed on.
            self.pass_permits_on()
        self.monitor.wake()
        return was_overdue

    def end_early(self, record: Record) -> None:
        """End a record whose handler may still run, which makes that handler overdue."""
        # One step: the handler may return at any moment after, and then it is not overdue any more.
        move(record, FINISHED)
        if record.control is not None:
            self.overdue.add(record)

    def pass_permits_on(self) -> None:
        """Take the permits from as many overdue handlers as the pool has threads to replace."""
        replaced = sum(not record.holds_permit for record in self.overdue)
        for record in self.overdue:
            if record.holds_permit and replaced < self.max_workers:
                record.holds_permit = False
                self.permits += 1
                replaced += 1
        self.monitor.wake()

    def forget(self, record: Record) -> None:
        """Forget a record that has ended. A parked one of the same handler gets its turn."""
        if self.known.get(record.key) is record:
            del self.known[record.key]
        self._free_place(record)
        self.monitor.wake()

    def _free_place(self, record: Record) -> None:
        entry = record.entry
        if record.holds_place:
            record.holds_place = False
            self.running -= 1
            entry.running -= 1
        if entry.parked and entry.has_room():
            self.queue.append(entry.parked.popleft())
