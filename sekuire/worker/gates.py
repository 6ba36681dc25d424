"""Hold tasks that a person must approve before they begin, without a thread for each."""

# Threads: the thread of a task holds it, and any thread ends a question. The lock of `records` guards all state.

from __future__ import annotations

import functools
from typing import Protocol

from ..config import WorkerConfig
from ..handlers import outcome
from ..handlers.context import TaskContext, TaskControl
from .answers import Answers
from .approvals import ApprovalNeeded, Approvals
from .questions import APPROVED, MOST_SKIPPED, SKIPPED, SUPERSEDED, Question
from .records import ASKING, FINISHED, REJECTED, RELEASED, STARTING, Gate, Record, Records, move

#: Bytes of a waiting task besides its input.
WAITING_COST = 1024
#: Seconds until a task is released for lack of room: a platform that sends it again at once must not keep us busy.
RELEASE_PAUSE = 1.0
#: Most tasks that wait for an approval before they begin. Further ones are released.
MOST_ASKING = 1000


class Lease(Protocol):
    """Say if the platform permits work now."""

    def is_held(self) -> bool:
        """Return True if the lease allows work now. One comparison, called under locks."""


class Starter(Protocol):
    """Start what waits."""

    def start_waiting(self) -> None:
        """Start and answer what waits, as far as there is room for it. Any thread, without a lock."""


class Gates:
    """Hold the tasks of one worker until a person has decided, then start or answer them."""

    def __init__(
        self,
        config: WorkerConfig,
        records: Records,
        answers: Answers,
        approvals: Approvals,
        lease: Lease,
        starter: Starter,
    ) -> None:
        self._records = records
        self._lock = records.lock
        self._answers = answers
        self._approvals = approvals
        self._lease = lease
        self._starter = starter
        self._max_waiting_bytes = config.max_waiting_bytes
        self._expose_errors = config.expose_errors

    def hold(self, record: Record, control: TaskControl, needed: ApprovalNeeded) -> bool:
        """Have a person asked before a task begins. Return True if the task waits for that without a thread."""
        records = self._records
        gate = record.gate or Gate()
        question = self._question(record, control, gate, needed)
        cost = WAITING_COST + record.task.size
        with self._lock:
            if record.state is not STARTING:
                return False
            has_lease = self._lease.is_held()
            has_room = len(records.asking) < MOST_ASKING and records.waiting_bytes + cost <= self._max_waiting_bytes
            if has_lease and has_room:
                record.gate = gate
                records.park(record, cost)
            else:
                move(record, RELEASED)
        if not (has_lease and has_room):
            self._answers.give_back(record, RELEASE_PAUSE if has_lease else 0.0)
            return False
        self._begin(record, question, needed)
        return True

    def _question(self, record: Record, control: TaskControl, gate: Gate, needed: ApprovalNeeded) -> Question:
        return self._approvals.ask_for(control, gate, needed, record.input(), lambda: record.state is ASKING)

    def _begin(self, record: Record, question: Question, needed: ApprovalNeeded) -> None:
        self._approvals.questions.when_ended(question, functools.partial(self._decide, record, question, needed))
        self._approvals.questions.begin(question)

    def _decide(self, record: Record, question: Question, needed: ApprovalNeeded) -> None:
        """Start a task that a person has approved, or answer it."""
        assert question.outcome is not None
        assert record.gate is not None
        state = question.outcome.state
        if state == APPROVED:
            with self._lock:
                if record.state is not ASKING:
                    return
                record.gate.asked.granted.add((needed.kind, needed.name, needed.policy_hash))
                self._records.requeue(record)
            self._starter.start_waiting()
        elif state == SKIPPED and record.gate.skipped < MOST_SKIPPED:
            record.gate.skipped += 1
            self._begin(record, self._question(record, question.control, record.gate, needed), needed)
        else:
            is_dropped = state == SUPERSEDED
            with self._lock:
                if record.state is not ASKING:
                    return
                self._records.leave_queue(record)
                move(record, FINISHED if is_dropped else REJECTED)
            if is_dropped:
                self._answers.drop(record)
            else:
                self._answers.reject(
                    record, outcome.failure_of(question.error(), TaskContext(record.task), self._expose_errors)
                )
            self._starter.start_waiting()
