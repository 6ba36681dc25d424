"""End tasks: hand their results to the reporter, answer those that do not run, give the others back."""

from __future__ import annotations

from typing import Any, Callable, Dict, Optional, Protocol, Tuple

import attrs

from .._internal.logs import get_logger
from ..handlers.context import TaskContext
from ..wire import protocol
from ..wire.models import Completion, Failure, Task
from .records import REJECTED, Record, Records, move
from .release import Release

log = get_logger("sekuire.dispatch")


class Accepted(Protocol):
    """Describe a result that a sink has accepted and not sent yet."""

    @property
    def code(self) -> Optional[str]:
        """Return the code of the failure that the requester gets, None for an output."""


class ResultSink(Protocol):
    """Accept results and deliver them. :class:`sekuire.worker.report.Reporter` is one, and documents each method.

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

    def redelivered(self, task_id: str, attempt: int) -> bool: ...

    def release(self, release: Release, delay: float = 0.0) -> None: ...

    def has_room(self) -> bool: ...

    def has_room_for_release(self) -> bool: ...

    def progress(self, context: TaskContext, fraction: float, message: Optional[str]) -> None: ...


class TaskAudit(Protocol):
    """Note what becomes of tasks. No method may block."""

    def task(self, worker_id: str, task: Task, completion: Completion, report: Any) -> None:
        """Note a result that the sink has accepted."""

    def passed(self, task: Task) -> None:
        """Note a task that the policy allowed."""


class WorkerAudit:
    """Note what becomes of one worker's tasks."""

    def __init__(self, audit: TaskAudit, worker_id: str) -> None:
        self._audit = audit
        self._worker_id = worker_id

    def note_passed(self, task: Task) -> None:
        """Note a task that the policy allowed."""
        self._audit.passed(task)

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

    def __init__(self, records: Records, sink: ResultSink, audit: Optional[WorkerAudit] = None) -> None:
        self._records = records
        self._lock = records.lock
        self.sink = sink
        self.audit = audit
        #: Tasks that are being given back.
        self.given_back: Dict[str, Tuple[Release, Record]] = {}

    def answer(self, record: Record, completion: Completion) -> Optional[Accepted]:
        """Give an ended record's result to the sink, then forget the record. Return what is to be sent."""
        report: Optional[Accepted] = None
        records = self._records
        counts = records.counts
        is_failed = completion.failure is not None
        is_rejected = record.state is REJECTED
        # Known to the sink before it is forgotten here: a repeated delivery must always meet one of the two.
        try:
            try:
                report = self.sink.accept(completion)
            except BaseException as error:
                # Part of a result is code of the user's own. Whatever it does, the task is answered and its place free.
                log.exception("[%s] the result cannot be accepted", record.task.task_id)
                is_failed, is_rejected = True, False
                failure = protocol.failure("handler_error", f"the worker failed ({type(error).__name__})")
                completion = attrs.evolve(completion, output=None, failure=failure)
                report = self.sink.accept(completion)
            if report is not None:
                # The sink may not be able to send what the handler gave.
                is_failed = is_failed or report.code is not None
                if self.audit is not None:
                    self.audit.note_result(record.task, completion, report)
        finally:
            with self._lock:
                records.forget(record)
                if record.attempt > completion.attempt:
                    self.sink.redelivered(record.task.task_id, record.attempt)
                if is_rejected:
                    counts.rejected += 1
                elif is_failed:
                    counts.failed += 1
                else:
                    counts.completed += 1
        return report

    def end_early(self, record: Record, failure: Failure) -> None:
        """Answer a finished record whose handler still runs, or was never called."""
        self._answer_later(record, failure, record.elapsed_ms())

    def reject(self, record: Record, failure: Failure) -> None:
        """Answer a rejected record. A refusal for which it waited comes before ``failure``."""
        failure = record.refusal or failure
        log.info("[%s] %s is answered %s: %s",
                 record.task.task_id, record.capability, failure.code, failure.message)  # fmt: skip
        self._answer_later(record, failure, 0)

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
            self.sink.enqueue(report)

    def _forget(self, record: Record) -> None:
        """Forget a record that could not be ended: its place is free, and a repeated delivery runs the task."""
        with self._lock:
            self._records.forget(record)

    # -- giving tasks back --

    def give_back(self, record: Record, delay: float = 0.0) -> None:
        """Give a released record back to the platform in ``delay`` seconds."""
        try:
            # Without its input: many may be under way.
            record.task = attrs.evolve(record.task, input=None)
            record.packed = None
            with self._lock:
                # In one step, because a delivery in between could raise the attempt.
                release = Release(self._records.monitor, record.task.task_id, record.attempt, self)
                self.given_back[release.task_id] = release, record
                self._records.forget(record)
                self._records.counts.released += 1
        except BaseException:
            self._forget(record)
            raise
        log.info("[%s] %s is given back unbegun", release.task_id, record.capability)
        self.sink.release(release, delay)

    def call_off(self, task_id: str) -> None:
        """Stop giving a task back, because it has come again. Needs the lock."""
        found = self.given_back.pop(task_id, None)
        if found is not None:
            found[0].call_off()

    def note_release(self, release: Release, *, is_supported: bool) -> None:
        """Note that a release has ended. Answer its task if the platform does not offer releases."""
        with self._lock:
            found = self.given_back.get(release.task_id)
            if found is None or found[0] is not release:
                # The task has come again.
                return
            del self.given_back[release.task_id]
            if is_supported:
                return
            record = found[1]
            move(record, REJECTED)
            # Known again until it is answered: a delivery in between must not run it.
            self._records.known[release.task_id] = record
            self._records.counts.released -= 1
        self.reject(record, protocol.failure("worker_shutdown", "the worker gave the task back unbegun"))
