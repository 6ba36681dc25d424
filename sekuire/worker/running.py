"""Run tasks on the pool's threads: lease, policy, clock, handler, first report."""

from __future__ import annotations

import functools
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Optional

import attrs

from .._internal.clock import time
from .._internal.logs import get_logger
from .._internal.threads import Deadline, Timer, owned_by
from ..config import WorkerConfig
from ..handlers.context import TaskContext, TaskControl, control_of, current_task
from ..wire import protocol
from ..wire.models import Completion, Failure
from .answers import Answers
from .approvals import GATEKEEPER, ApprovalNeeded, Approvals
from .calling import Caller
from .gates import Gates
from .gates import Lease as Lease
from .records import (
    ASKING,
    FINISHED,
    REJECTED,
    RELEASED,
    RUNNING,
    SENT,
    STARTING,
    Record,
    Records,
    Withdrawal,
    move,
)
from .sink import Accepted, ResultSink

log = get_logger("sekuire.dispatch")


def terminated() -> Failure:
    """Return the answer to a task that a termination keeps from starting."""
    return protocol.failure("worker_terminated", "the worker was terminated before this task began")


class Runner:
    """Start waiting tasks as permits come free, and run them to their end.

    The pool has room for twice ``max_workers`` threads, because a thread cannot be taken from a handler that does not
    return. Permits bound what runs: ``max_workers`` of them.
    """

    # Threads: `sekuire-task-N`, or those of the user's executor, run _work(); `sekuire-timer` runs _expire(); any
    # thread may call the public methods. The lock of `records` guards the state, and is never held over a handler, a
    # policy check or I/O.

    def __init__(
        self,
        config: WorkerConfig,
        records: Records,
        answers: Answers,
        caller: Caller,
        sink: ResultSink,
        *,
        timer: Timer,
        lease: Lease,
        approvals: Optional[Approvals] = None,
        owner: object = None,
    ) -> None:
        self._approvals = approvals
        self._gates = None if approvals is None else Gates(config, records, answers, approvals, lease, self)
        self._records = records
        self._lock = records.lock
        self._answers = answers
        self._caller = caller
        #: Of the platform's tasks: while it has no room, nothing that waits is started.
        self._sink = sink
        self._timer = timer
        self._lease = lease
        self._owner = owner
        self._task_timeout = config.task_timeout
        # An executor of other processes is called from threads of our own, with all that is around a call (remote.py).
        is_remote = _is_remote(config.executor)
        self._foreign = None if is_remote else config.executor
        #: The state of a task whose handler is called here, or is sent to another process.
        self._state_of_calls = SENT if is_remote else RUNNING
        self._pool: Optional[Executor] = self._foreign
        #: True once a thread of the pool has run.
        self._has_threads = False

    # -- starting --

    def can_start(self, record: Record) -> bool:
        """Return True if a new task may start before all that wait. Needs the lock."""
        records = self._records
        return bool(records.permits and not records.queue and record.entry.has_room() and self._lease.is_held())

    def hand_over(self, record: Record) -> None:
        """Give a started record to a thread, or answer it if there is none. Without a lock."""
        try:
            pool = self._pool
            if pool is None:
                pool = ThreadPoolExecutor(2 * self._records.max_workers, thread_name_prefix="sekuire-task")
                self._pool = pool
            future = pool.submit(self._work, record)
        except Exception as error:  # noqa: BLE001  # An executor of the user's own may refuse in its own way.
            problem = f"{type(error).__name__}: {error}"
        else:
            if self._foreign is not None:
                future.add_done_callback(functools.partial(self._note_done, record))
            return
        if self._foreign is None and self._has_threads and "start new thread" in problem:
            # The pool has queued the call before it failed.
            log.warning("no further thread can be started; the task waits for one of those there are")
            return
        log.error("the executor accepts no more work (%s)", problem)
        self._lose_thread(record)

    def start_waiting(self) -> None:
        """Start and answer what waits, as far as there is room for it. Any thread, without a lock."""
        records = self._records
        while records.refused:
            with self._lock:
                if not records.refused or not self._sink.has_room():
                    break
                refused = records.refused.popleft()
                records.leave_queue(refused)
                move(refused, REJECTED)
            self._answers.reject(refused, terminated())
        while records.permits and records.queue:
            with self._lock:
                record = self._start_next() if records.permits else None
                if record is None:
                    return
            self.hand_over(record)

    def reconsider(self, record: Record) -> bool:
        """Have the new policy decide over a task that waits for an approval. Return False if it does not wait so."""
        with self._lock:
            if record.state is not ASKING:
                return False
            self._records.requeue(record)
        self.start_waiting()
        return True

    def end_pool(self, deadline: Deadline) -> None:
        """End the pool's threads. An executor of the user's own is its owner's to end."""
        if self._foreign is not None or not isinstance(self._pool, ThreadPoolExecutor):
            return
        records = self._records
        with self._lock:
            # A thread that has handed on its result may still be in its last report.
            while records.threads and not records.overdue and not deadline.is_expired():
                records.monitor.wait(min(deadline.remaining(), 0.1))
            is_idle = not records.threads
        self._pool.shutdown(wait=is_idle)

    def _start_next(self) -> Optional[Record]:
        """Start the next waiting record that may start. The caller has seen that there is a permit. Needs the lock."""
        records = self._records
        if records.queue and self._sink.has_room() and self._lease.is_held():
            record = records.next_startable()
            if record is not None:
                return records.start(record)
        return None

    def _note_done(self, record: Record, future: Future[None]) -> None:
        """Note that the user's executor is done with a record, which it may have cancelled instead of running it."""
        if record.holds_thread and record.control is None:
            log.error("[%s] the executor has not run this task", record.task.task_id)
            self._lose_thread(record)
            # Not from here: whoever cancels may hold the executor's lock, which handing over needs.
            self._timer.call_at(0.0, self.start_waiting)

    def _lose_thread(self, record: Record) -> None:
        """Answer a started record that no thread will come to, and free what it holds."""
        with self._lock:
            # In one step: a thread may come to it all the same, and must find nothing left to do or to free.
            self._records.free_thread(record)
            is_open = record.state is STARTING
            if is_open:
                move(record, FINISHED)
        if is_open:
            failure = protocol.failure("worker_shutdown", "the worker's executor takes no more work")
            self._answers.end_early(record, failure.as_logged())

    # -- running (the pool's threads) --

    def _work(self, record: Optional[Record]) -> None:
        """Run records until none waits. Run only one in the user's executor, so that its other users get a turn."""
        with owned_by(self._owner):
            self._has_threads = True
            while record is not None:
                if not record.holds_thread:
                    # The executor had refused it, and it was answered.
                    return
                is_parked = False
                try:
                    is_parked = self._run(record)
                except BaseException as error:
                    # Nothing of a handler's gets here; what does must cost one task, not a thread and its permit.
                    log.exception("[%s] running the task failed in an unforeseen way", record.task.task_id)
                    if self._finish(record):
                        message = f"the worker failed ({type(error).__name__})"
                        self._answers.end_early(record, protocol.failure("handler_error", message).as_logged())
                current_task.set(None)
                record = self._next_after(None if is_parked else record)
                if record is not None and self._foreign is not None:
                    self.hand_over(record)
                    self.start_waiting()
                    return

    def _next_after(self, done: Optional[Record]) -> Optional[Record]:
        """Free the thread that ran ``done``. Return the record that it runs next, if any.

        :param done: None for a record that waits for an approval. Its thread was freed when it began to wait, and it
            may have another one by now.
        """
        following = None
        was_overdue = False
        with self._lock:
            had_permit = self._records.permits > 0 if done is None else done.holds_permit
            if done is not None:
                was_overdue = self._records.free_thread(done)
            if had_permit and self._records.queue:
                following = self._start_next()
        if done is not None and was_overdue:
            log.info("[%s] the handler ended after its task was answered; its result is discarded", done.task.task_id)
            self.start_waiting()
        return following

    def _run(self, record: Record) -> bool:
        """Run one record. Return True if it waits for an approval now, and holds this thread no more."""
        task = record.task
        context = TaskContext(task, progress=record.sink.progress)
        control = control_of(context)
        control.owner = self._owner
        control.is_pushed = record.sink is not self._sink
        if record.gate is not None:
            control.asked = record.gate.asked
        with self._lock:
            if record.state is not STARTING:
                return False
            control.attempt = record.attempt
            record.control = control
            has_lease = self._lease.is_held()
            if has_lease and not self._caller.has_policy:
                move(record, self._state_of_calls)
        current_task.set(context)
        if not has_lease:
            self._give_back(record)
            return False
        if self._caller.has_policy:
            if self._approvals is not None:
                control.asker = GATEKEEPER
            denial = self._caller.check(record, context)
            if isinstance(denial, ApprovalNeeded):
                return self._gates is not None and self._gates.hold(record, control, denial)
            if denial is not None:
                self._deny(record, Completion(task_id=task.task_id, attempt=record.attempt, failure=denial))
                return False
            if not self._goes_on(record):
                return False
        control.asker = self._approvals
        began = self._start_clock(record, control)
        completion = self._caller.call(record, context, began)
        # What the handler has left behind, such as a thread, can ask nobody.
        control.asker = None
        if record.timer is not None:
            self._timer.cancel(record.timer)
        if control.is_withdrawn:
            completion = attrs.evolve(completion, execution_time_ms=0)
            if record.withdrawal is not None:
                self._end_withdrawn(record, record.withdrawal)
                return False
        if self._finish(record):
            if control.asked is not None and _is_superseded(control, completion):
                self._answers.drop(record)
            else:
                self._report(record, completion)
        return False

    def _goes_on(self, record: Record) -> bool:
        """Return True if a task may still begin after the policy check, which may have blocked for a while."""
        with self._lock:
            if record.state is not STARTING:
                return False
            has_lease = self._lease.is_held()
            if has_lease:
                move(record, self._state_of_calls)
        if not has_lease:
            self._give_back(record)
        return has_lease

    def _give_back(self, record: Record) -> None:
        """Give back a task that the lease does not allow to begin."""
        with self._lock:
            if record.state is not STARTING:
                return
            move(record, RELEASED)
        self._answers.give_back(record)

    def _end_withdrawn(self, record: Record, withdrawal: Withdrawal) -> None:
        """Answer or give back a task whose call was taken back from its executor, unless it was answered before."""
        failure = withdrawal.failure
        with self._lock:
            if record.state is not SENT:
                return
            move(record, RELEASED if failure is None else REJECTED)
        if failure is None:
            self._answers.give_back(record)
        else:
            self._answers.reject(record, failure)

    def _deny(self, record: Record, completion: Completion) -> None:
        """Answer a task that the policy denies, unless it lost its lease or was answered while the policy was asked."""
        with self._lock:
            if record.state is not STARTING:
                return
            has_lease = self._lease.is_held()
            if has_lease:
                move(record, REJECTED)
        if has_lease:
            self._report(record, completion)
        else:
            self._give_back(record)

    def _start_clock(self, record: Record, control: TaskControl) -> float:
        """Start the task's time now, and return that moment."""
        began = record.began = time.monotonic()
        limits = [t for t in (self._task_timeout, record.entry.timeout, record.task.timeout) if t is not None]
        if limits:
            end = control.end = began + min(limits)
            record.timer = self._timer.call_at(end, functools.partial(self._expire, record))
        return began

    # -- the end of a task --

    def _finish(self, record: Record) -> bool:
        """Claim the right to answer a task. Return False if another thread was first."""
        with self._lock:
            if record.state not in (RUNNING, SENT, STARTING):
                return False
            move(record, FINISHED)
            return True

    def _report(self, record: Record, completion: Completion) -> None:
        """Hand on a result, start what waited for its place, and send it."""
        report = self._answers.answer(record, completion)
        try:
            # A task that was parked behind this one must not wait for the report below.
            self.start_waiting()
        finally:
            if report is not None:
                self._send(record.sink, report)

    def _send(self, sink: ResultSink, report: Accepted) -> None:
        """Send the result of a handler, in its thread."""
        if self._foreign is None:
            sink.post(report)
            return
        # Not by this thread, whose executor has other users. But the result must be on disk however long the platform
        # lets the others wait.
        try:
            sink.keep(report)
        finally:
            sink.enqueue(report)

    def _expire(self, record: Record) -> None:
        """Answer a task whose time is over. The timer's thread."""
        records = self._records
        with self._lock:
            if record.state is not self._state_of_calls:
                return
            records.end_early(record)
        try:
            record.cancel("timeout", is_answered=True)
        finally:
            failure = protocol.failure("timeout", "the task's time was over before its handler ended")
            self._answers.end_early(record, failure.as_logged())
        with self._lock:
            records.pass_permits_on()
            count = len(records.overdue)
            replaced = not record.holds_permit
        log.warning(
            "[%s] %s failed timeout: its handler has not ended in its time%s (%d such handlers run)",
            record.task.task_id, record.capability,
            "" if replaced else ", and its thread cannot be replaced", count,
        )  # fmt: skip
        self.start_waiting()


def _is_superseded(control: TaskControl, completion: Completion) -> bool:
    """Return True if a handler has ended because another worker has its task."""
    failure = completion.failure
    return control.reason() == "superseded" and failure is not None and failure.code == "cancelled"


def _is_remote(executor: Optional[Executor]) -> bool:
    """Return True if ``executor`` runs calls in other processes."""
    if executor is None:
        return False
    from ..executors import remote  # Only here: it loads what most workers never need.

    return remote.is_remote(executor)
