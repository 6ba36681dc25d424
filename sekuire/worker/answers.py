"""End tasks: hand their results to the reporter, answer those that do not run, give the others back."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Callable, Dict, Hashable, Iterable, Mapping, Optional, Protocol, Tuple

import attrs

from .._internal.clock import time
from .._internal.logs import get_logger
from ..handlers.context import cancel_reason_of
from ..wire import protocol
from ..wire.models import Completion, Failure, Task
from .records import ASKING, REJECTED, SENT, STARTING, WAITING, Record, Records, Withdrawal, move
from .release import Release
from .sink import Accepted

if TYPE_CHECKING:
    from ..health.meter import Meter

log = get_logger("sekuire.dispatch")

#: Answers to tasks that are part of an operator's own order.
_ORDERED = frozenset(("worker_paused", "worker_terminated"))
#: Answers whose message begins with the rule of the policy.
_DENIALS = frozenset(("policy_denied", "rate_limited"))
#: Who decided on a request for approval, and why, as the platform says.
Claims = Mapping[str, Optional[str]]
#: Most characters of what a line says of a failure.
_MOST_SHOWN = 500


class TaskAudit(Protocol):
    """Note what becomes of tasks. No method may block."""

    def task(self, worker_id: str, task: Task, completion: Completion, report: Any) -> None:
        """Note a result that the sink has accepted."""

    def passed(self, task: Task) -> None:
        """Note a task that the policy allowed."""

    def approval(self, task: Task, subject: Tuple[str, str], approval_id: str, state: str, claims: Claims) -> None:
        """Note a request for approval, or what became of it."""


class WorkerAudit:
    """Note what becomes of one worker's tasks."""

    def __init__(self, audit: TaskAudit, worker_id: str) -> None:
        self._audit = audit
        self._worker_id = worker_id

    def note_passed(self, task: Task) -> None:
        """Note a task that the policy allowed."""
        self._audit.passed(task)

    def note_approval(self, task: Task, subject: Tuple[str, str], approval_id: str, state: str, claims: Claims) -> None:
        """Note a request for approval, or what became of it. Never raises: a decision must reach its task."""
        try:
            self._audit.approval(task, subject, approval_id, state, claims)
        except BaseException:
            log.exception("[%s] noting an approval in the audit log failed", task.task_id)

    def note_result(self, task: Task, completion: Completion, report: Accepted) -> None:
        """Note a result that the sink has accepted. Never raises: what is accepted must be sent."""
        try:
            self._audit.task(self._worker_id, task, completion, report)
        except BaseException:
            log.exception("[%s] noting the result in the audit log failed", task.task_id)


class Answers:
    """Give each task exactly one end. Any thread may call anything; the lock of ``records`` guards all state.

    Whoever ends a task has moved its record to REJECTED, RELEASED or FINISHED under the lock, and so is the only one.

    :param audit: notes each result that the sink has accepted.
    """

    def __init__(self, records: Records, audit: Optional[WorkerAudit] = None) -> None:
        self._records = records
        self._lock = records.lock
        self.audit = audit
        #: Counts each end for metrics, where they are wanted.
        self.meter: Optional[Meter] = None
        #: Tasks that are being given back, by the keys of their records.
        self.given_back: Dict[Hashable, Tuple[Release, Record]] = {}

    def answer(self, record: Record, completion: Completion) -> Optional[Accepted]:
        """Give an ended record's result to its sink, then forget the record. Return what is to be sent."""
        report: Optional[Accepted] = None
        records = self._records
        sink = record.sink
        counts = records.counts
        is_failed = completion.failure is not None
        is_rejected = record.state is REJECTED
        # Known to the sink before it is forgotten here: a repeated delivery must always meet one of the two.
        try:
            try:
                report = sink.accept(completion)
            except BaseException as error:
                # Part of a result is code of the user's own. Whatever it does, the task is answered and its place free.
                log.exception("[%s] the result cannot be accepted", record.task.task_id)
                is_failed, is_rejected = True, False
                failure = protocol.failure("handler_error", f"the worker failed ({type(error).__name__})").as_logged()
                completion = attrs.evolve(completion, output=None, failure=failure)
                report = sink.accept(completion)
            if report is not None:
                # The sink may not be able to send what the handler gave.
                is_failed = is_failed or report.code is not None
                if self.audit is not None:
                    self.audit.note_result(record.task, completion, report)
        finally:
            with self._lock:
                records.forget(record)
                if record.attempt > completion.attempt:
                    sink.redelivered(record.task.task_id, record.attempt)
                if is_rejected:
                    counts.rejected += 1
                elif is_failed:
                    counts.failed += 1
                else:
                    counts.completed += 1
                if self.meter is not None:
                    measure(self.meter, record, completion, report, is_rejected)
        if report is not None and (completion.failure is not None or report.code is None):
            _log_end(record, completion)
        return report

    def end_each(self, records: Iterable[Record], end: Callable[[Record], object]) -> None:
        """Call ``end`` for every record, even if it fails for some. Then raise the last failure."""
        failed: Optional[BaseException] = None
        for record in records:
            try:
                end(record)
            except BaseException as error:  # No memory, or a Ctrl-C: the others must not be lost with this one.
                log.exception("[%s] ending the task failed", record.task.task_id)
                failed = error
                self._forget(record)
        if failed is not None:
            raise failed

    def end_early(self, record: Record, failure: Failure) -> None:
        """Answer a finished record whose handler still runs, or was never called."""
        self._answer_later(record, failure, record.elapsed_ms())

    def reject(self, record: Record, failure: Failure) -> None:
        """Answer a rejected record. A refusal for which it waited comes before ``failure``."""
        self._answer_later(record, record.refusal or failure, 0)

    def _answer_later(self, record: Record, failure: Failure, execution_time_ms: int) -> None:
        try:
            completion = Completion(
                task_id=record.task.task_id,
                attempt=record.attempt,
                failure=failure,
                execution_time_ms=execution_time_ms,
            )
            report = self.answer(record, completion)
        except BaseException:
            self._forget(record)
            raise
        if report is not None:
            record.sink.enqueue(report)

    def _forget(self, record: Record) -> None:
        """Forget a record that could not be ended: its place is free, and a repeated delivery runs the task."""
        with self._lock:
            self._records.forget(record)

    def drop(self, record: Record) -> None:
        """Forget an ended record without an answer: another worker has its task, and will give it."""
        with self._lock:
            self._records.forget(record)
            self._records.counts.dropped += 1
        log.warning("[%s] %s is another worker's now; it gets no result from here", record.task.task_id,
                    record.capability)  # fmt: skip

    # -- cancelling one task --

    def cancel(self, key: Hashable, reason: Optional[str] = None) -> None:
        """Cancel one task: answer it if it has not begun, else cancel its context. Any thread; it may be repeated.

        A task that has ended, is given back or is not known here is left alone.

        :param key: the key of its record: the id of a task of the platform's.
        """
        shown = cancel_reason_of(reason)
        failure = protocol.failure(
            "cancelled", "the task was cancelled before it began" + (f": {reason}" if reason else "")
        )
        is_taken = False
        with self._lock:
            record = self._records.known.get(key)
            if record is None or record.is_ended:
                return
            if record.state is WAITING or record.state is STARTING or record.state is ASKING:
                if record.state is not STARTING:
                    self._records.take_waiting(record)
                move(record, REJECTED)
                is_taken = True
            elif record.state is SENT:
                # It ends so if it has not begun in its executor.
                record.withdrawal = Withdrawal(failure)
        if is_taken:
            self.reject(record, failure)
        elif record.call_off(shown):
            log.info("[%s] %s is cancelled: %s", record.task.task_id, record.capability, shown)

    # -- giving tasks back --

    def give_back(self, record: Record, delay: float = 0.0) -> None:
        """Give a released record back to whoever gave the task, in ``delay`` seconds."""
        try:
            # Without its input: many may be under way.
            record.task = attrs.evolve(record.task, input=None)
            record.packed = None
            with self._lock:
                # In one step, because a delivery in between could raise the attempt.
                release = Release(self._records.monitor, record.task.task_id, record.attempt, self, record.key)
                self.given_back[record.key] = release, record
                self._records.forget(record)
                self._records.counts.released += 1
        except BaseException:
            self._forget(record)
            raise
        log.info("[%s] %s is given back unbegun", release.task_id, record.capability)
        record.sink.release(release, delay)

    def call_off(self, key: Hashable) -> None:
        """Stop giving a task back, because it has come again. Needs the lock."""
        found = self.given_back.pop(key, None)
        if found is not None:
            found[0].call_off()

    def note_release(self, release: Release, *, is_supported: bool) -> None:
        """Note that a release has ended. Answer its task if the platform does not offer releases."""
        with self._lock:
            found = self.given_back.get(release.key)
            if found is None or found[0] is not release:
                # The task has come again.
                return
            del self.given_back[release.key]
            if is_supported:
                return
            record = found[1]
            move(record, REJECTED)
            # Known again until it is answered: a delivery in between must not run it.
            self._records.known[release.key] = record
            self._records.counts.released -= 1
        self.reject(record, protocol.failure("worker_shutdown", "the worker gave the task back unbegun"))


def measure(
    meter: Meter, record: Record, completion: Completion, report: Optional[Accepted], is_rejected: bool
) -> None:
    """Count the end of a task for metrics. Needs the lock."""
    failure = completion.failure
    # The sink may not be able to send what the handler gave.
    code = report.code if report is not None else None if failure is None else failure.code
    status = "rejected" if is_rejected else "completed" if code is None else "failed"
    seconds = None if is_rejected or record.began is None else time.monotonic() - record.began
    meter.note(record.task.capability, status, code, seconds)


def _log_end(record: Record, completion: Completion) -> None:
    """Log the end of a task in one line, unless its failure was logged with more than that."""
    failure = completion.failure
    task = record.task
    if failure is None:
        log.say(logging.INFO, "[%s] %s completed in %d ms", task.task_id, task.capability, completion.execution_time_ms)
    elif not failure.is_logged:
        how = "denied by the policy" if failure.code in _DENIALS else f"failed {failure.code}"
        text = protocol.one_line(f"{how}: {failure.message}" if failure.message else how)[:_MOST_SHOWN]
        level = logging.INFO if failure.code in _ORDERED else logging.WARNING
        log.say(level, "[%s] %s %s", task.task_id, record.capability, text)
