"""Know each task from its arrival to its end: its state, and what it takes of the worker's limits."""

from __future__ import annotations

import enum
import time
from collections import deque
from typing import Deque, Dict, List, Optional, Set, Tuple

from .._internal.monitor import Monitor
from ..handlers.context import TaskControl
from ..handlers.registry import HandlerEntry
from ..wire import protocol
from ..wire.models import Failure, Task


class State(enum.Enum):
    """Where a task is. ``edges`` are the states that it may have next; one without edges is an end."""

    #: The stream's thread has it in hand.
    RECEIVED = "received"
    #: It waits for a thread, for the lease, or for results to be delivered.
    WAITING = "waiting"
    #: A thread has it, or will have it. Its handler was not called: the policy is asked first.
    STARTING = "starting"
    #: Its handler is called, or was.
    RUNNING = "running"
    #: It is answered with a failure; its handler was not called.
    REJECTED = "rejected"
    #: It goes back to the platform; its handler was not called.
    RELEASED = "released"
    #: It is answered; its handler was called, or its thread was lost.
    FINISHED = "finished"

    def __init__(self, name: str) -> None:
        # On the state itself, because a look-up by an enum's member is slow.
        self.edges: Tuple[State, ...] = ()


RECEIVED, WAITING, STARTING, RUNNING, REJECTED, RELEASED, FINISHED = State
RECEIVED.edges = (STARTING, WAITING, REJECTED, RELEASED)
WAITING.edges = (STARTING, REJECTED, RELEASED)
# To FINISHED: when a stop does not wait for its policy, when its thread is lost, or when something fails before the
# handler is called.
STARTING.edges = (RUNNING, REJECTED, RELEASED, FINISHED)
RUNNING.edges = (FINISHED,)
# The platform does not offer releases, so the task is answered instead.
RELEASED.edges = (REJECTED,)


class Record:
    """Describe one task between its arrival and its end. The lock of :class:`Records` guards every field.

    - ``attempt``: the newest attempt under which it was delivered.
    - ``packed``: its input as JSON, if it waits without it.
    - ``cost``: what it counts of ``max_waiting_bytes``.
    - ``refusal``: its answer, if it must not run; it waits with it while results pile up.
    - ``control``: of its handler's context, made by its thread when that comes to it.
    - ``timer``: the number of the call that ends its time.
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
        "holds_permit",
        "holds_place",
        "holds_thread",
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
        self.state = RECEIVED
        self.control: Optional[TaskControl] = None
        self.timer: Optional[int] = None
        self.began: Optional[float] = None
        self.packed: Optional[bytes] = None
        self.cost = 0
        self.refusal: Optional[Failure] = None
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

    def raise_attempt(self, attempt: int) -> None:
        """Note a delivery under a higher attempt: its number is what the platform will accept. Needs the lock."""
        if attempt > self.attempt:
            self.attempt = attempt
            if self.control is not None:
                self.control.attempt = attempt


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
        self.known: Dict[str, Record] = {}
        #: What waits to start, and what waits to be refused.
        self.queue: Deque[Record] = deque()
        self.refused: Deque[Record] = deque()
        self.waiting = 0
        self.waiting_bytes = 0
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
        """Let a new task wait: to start, or to be answered with its refusal."""
        move(record, WAITING)
        self.known[record.task.task_id] = record
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
        # The stream's thread may wait for the room.
        self.monitor.wake()

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
        taken = [record for record in self.known.values() if record.state is WAITING or record.state is STARTING]
        self.queue.clear()
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
        waiting = [record for record in self.known.values() if record.state is WAITING and record.refusal is None]
        taken = waiting + [record for record in self.known.values() if record.state is STARTING]
        self.queue.clear()
        for record in waiting:
            record.entry.parked.clear()
            self.leave_queue(record)
        return taken

    # -- permits, places and threads --

    def start(self, record: Record) -> Record:
        """Give a new or waiting record a permit, which must be there, a place and a thread. Return it."""
        move(record, STARTING)
        self.known[record.task.task_id] = record
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
        if self.known.get(record.task.task_id) is record:
            del self.known[record.task.task_id]
        entry = record.entry
        if record.holds_place:
            record.holds_place = False
            self.running -= 1
            entry.running -= 1
        if entry.parked and entry.has_room():
            self.queue.append(entry.parked.popleft())
        self.monitor.wake()
