"""Deliver the results of one worker: encoded once, sent until accepted, remembered for repeated deliveries."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Callable, List, Optional

from .._internal.clock import time
from .._internal.delivery import Delivery
from .._internal.logs import get_logger
from .._internal.threads import Deadline, Timer
from ..config import WorkerConfig
from ..credentials import Authenticator
from ..errors import SekuireError
from ..handlers.context import TaskContext
from ..transport.retry import full_jitter
from ..wire import protocol
from ..wire.models import Completion
from ..wire.verdict import Dropped, Failed, Retry, Settled, Substitute, Unauthorized
from .progress import Progress
from .release import Release, Releases
from .results import HELD, PLANNED, SENDING, Report, Results, encode, move
from .sending import Revocable, Sender

if TYPE_CHECKING:
    from .outbox import Outbox
    from .spool import Spool

log = get_logger("sekuire.report")

#: First and longest delay between tries of one report, in seconds.
RETRY_MIN, RETRY_MAX = 0.1, 60.0
#: Delay after an answer that repeating is unlikely to change, in seconds.
REFUSED_PAUSE = 60.0
#: Tries after an answer 401 before it counts as the platform's word on the result.
REFUSALS = 5
#: Seconds between two looks for results that no thread has, and for threads that could not be started.
SWEEP = 5.0
#: Seconds after a result was not delivered until the outbox is looked at.
UPKEEP = 1.0


class Reporter:
    """Deliver results, releases and progress of one worker. ::

        reporter = Reporter(config, auth, worker_id, life)
        report = reporter.accept(completion)
        if report is not None:
            reporter.post(report)

    Each report that is held has an owner: the pool's queue, or the thread that sends it. That thread plans it again
    whatever happens. With an outbox, a result is on disk before it is first sent, and leaves it when it is settled.

    :param life: what a revocation of the installation ends. It is called without a lock.
    :param outbox: where results are kept until they are settled; None for memory only.
    :param owner: the object whose ``stop()`` a thread of the pool must not wait for.
    """

    # Threads: any thread may call anything. A handler's thread sends its own first report (accept, then post). All
    # else, retries included, is sent by `sekuire-report-N`, the threads of `delivery`. Its lock guards all state here
    # and in `results`, `releases` and `progress_reports`, and is never held over I/O or a callback. A sweep, on the
    # timer's thread, plans what the thread that accepted a result has left.

    def __init__(
        self,
        config: WorkerConfig,
        auth: Authenticator,
        worker_id: str,
        life: Revocable,
        *,
        outbox: Optional[Outbox] = None,
        owner: object = None,
    ) -> None:
        #: Called without a lock when :meth:`has_room` has been False and is True again.
        self.on_room: Callable[[], None] = lambda: None
        self.delivery = Delivery("sekuire-report", owner=owner)
        self.results = Results(self.delivery.lock)
        self.sender = sender = Sender(config, auth, worker_id, life)
        self.releases = Releases(sender, self.delivery)
        self.progress_reports = Progress(sender, self.delivery, self.results)
        self._lock = self.delivery.lock
        self._max_bytes = config.max_result_bytes
        self._result_encoder = config.result_encoder
        self._is_flushing = False
        self.spool: Optional[Spool] = None
        if outbox is not None:
            from .spool import Spool  # SQLite is for those who keep results on disk.

            self.spool = Spool(outbox, config, sender, self.results, self.delivery, self)

    # -- results --

    def accept(self, completion: Completion) -> Optional[Report]:
        """Make a completion the result of its task. Return None if the task has one already."""
        head, code = encode(completion, self._max_bytes, self._result_encoder)
        report = Report(completion.task_id, completion.attempt, head, is_final=code is None, code=code)
        with self._lock:
            if not self.results.add(report):
                return None
            self.progress_reports.forget(report.task_id)
            return report

    def enqueue(self, report: Report) -> None:
        """Have a report sent by the pool, at once."""
        self.plan(report, 0.0)

    def plan(self, report: Report, delay: float, is_awaited: bool = True) -> None:
        """Have the pool send ``report`` in ``delay`` seconds, or as planned before if that is sooner."""
        with self._lock:
            when = time.monotonic() + delay
            if report.plan is not None:
                before, number = report.plan
                if before <= when:
                    return
                self.delivery.cancel(number)
            planned = self.delivery.schedule(delay, lambda: self.post(report), is_awaited=is_awaited)
            if planned is not None:
                move(report, PLANNED)
                report.plan = (when, planned)
            elif report.state in (PLANNED, SENDING):
                move(report, HELD)

    def keep(self, report: Report) -> None:
        """Put a report that was not sent yet into the outbox, for a thread that leaves the sending to the pool.

        The pool may come to it late: all its threads can wait for a platform that does not answer.
        """
        if self.spool is None:
            return
        with self._lock:
            attempt, head, is_substitute = report.attempt, report.head, report.is_substitute
        self.spool.put(report, attempt, is_substitute, head)

    def redelivered(self, task_id: str, attempt: int) -> bool:
        """Note that a task was delivered again. Return True if it has a result, which a higher ``attempt`` gets too.

        A failure that the platform has accepted is not the task's result any more once a higher attempt comes: the
        platform tries the task again, by itself or because somebody has asked for it.
        """
        with self._lock:
            report = self.results.held.get(task_id)
            if report is not None:
                is_news = attempt > report.attempt
                report.attempt = max(report.attempt, attempt)
                if is_news and report.is_refused and report.state is PLANNED:
                    # The platform asks for what it refused, for example in the name of a new installation. A report
                    # that is being sent is sent again after that.
                    self.plan(report, 0.0)
                return True
            report = self.results.remembered.get(task_id)
            if report is not None:
                has_result = self.results.redelivered(report, attempt)
                if self.results.is_held(report):
                    self.plan(report, 0.0)
                return has_result
        if self.spool is None:
            return False
        # Another worker of this process may have run it and be delivering it. Outside our lock, as it has its own.
        other = self.spool.find_other_owner(task_id)
        if other is None:
            return False
        return other.redelivered(task_id, attempt) if isinstance(other, Reporter) else True

    def post(self, report: Report) -> None:
        """Send a report once. Unless that settles it, the pool sends it again later, whatever is raised here."""
        me = threading.get_ident()
        with self._lock:
            if self.results.held.get(report.task_id) is not report or report.state is SENDING:
                # Settled, or another thread has it.
                return
            move(report, SENDING)
            report.sender = me
            attempt, body, is_substitute = report.attempt, report.head, report.is_substitute
        try:
            self._deliver(report, attempt, body, is_substitute)
        except BaseException as error:  # sys.exit() in a user's token provider, no memory, a library's bug.
            if report.state is SENDING and report.sender == me:
                found = Retry(SekuireError(f"{type(error).__name__} while sending"))
                self._retry(report, found, is_unforeseen=True)
            else:
                log.exception("[%s] a failure after the result was settled or planned", report.task_id)
        finally:
            # Without the lock: only this thread moves a report out of its hands.
            if report.state is SENDING and report.sender == me:
                self._own_again(report)

    def has_room(self) -> bool:
        """Return False if so many results are undelivered that no more should be made.

        Then ``on_room`` is called when that has changed.
        """
        return self.results.has_room()

    def undelivered(self) -> List[str]:
        """Return the ids of the tasks whose result the platform has not accepted."""
        return self.results.ids()

    @property
    def backlog(self) -> int:
        """Return how many results the platform has not accepted."""
        return len(self.results.held)

    # -- releases and progress --

    @property
    def can_release(self) -> Optional[bool]:
        """Return True if the platform accepts releases, False if it does not offer them, None if that is not known."""
        return self.releases.is_offered

    def release(self, release: Release, delay: float = 0.0) -> None:
        """Give a task that was not begun back, in ``delay`` seconds, or at once when the worker stops."""
        self.releases.send(release, delay)

    def has_room_for_release(self) -> bool:
        """Return False if so many releases are under way that no further task should be released."""
        return self.releases.has_room()

    def progress(self, context: TaskContext, fraction: float, message: Optional[str]) -> None:
        """Send the progress of a task soon. Never blocks."""
        self.progress_reports.report(context, fraction, message)

    # -- beginning and ending --

    def restore(self, deadline: Deadline) -> int:
        """Send what an earlier process left in the outbox, and wait until each result was sent once.

        :returns: how many there were. Those that are not settled by then are sent again like any other.
        """
        reports = [] if self.spool is None else self.spool.claim()
        if not reports:
            return 0
        with self._lock:
            for report in reports:
                self.results.add(report)
                self.enqueue(report)
        log.info("%d results of an earlier process are in the outbox; they are delivered first", len(reports))

        def was_each_sent() -> bool:
            if self._is_flushing or self.delivery.is_closed:
                return True
            return not any(self.results.is_held(one) and not (one.tries or one.is_refused) for one in reports)

        self.delivery.wait_until(was_each_sent, deadline)
        return len(reports)

    def watch(self, timer: Timer) -> None:
        """Sweep now and then, on the timer's thread, until :meth:`close`."""

        def look() -> None:
            if not self.delivery.is_closed:
                timer.call_at(time.monotonic() + SWEEP, look)
                self.sweep()
                if self.spool is not None:
                    self.spool.plan_upkeep(0.0)

        timer.call_at(time.monotonic() + SWEEP, look)

    def sweep(self, at_once: bool = False) -> None:
        """Plan each result that its thread has left unsent, and start missing threads of the pool.

        :param at_once: plan every such result. False: only those that the previous sweep has found, too.
        """
        with self._lock:
            for report in self.results.notice_left(at_once):
                self.plan(report, 0.0)
            self.delivery.start_threads()

    def flush(self, deadline: Deadline) -> bool:
        """Send at once what waits for its next try, and wait for it until ``deadline``. Return True if all is settled.

        It waits only once for a result that the platform refuses for a lasting reason.
        """
        with self._lock:
            self._is_flushing = True
            for report in self.results.held.values():
                report.tries = 0
            self.delivery.hurry()

        def is_settled() -> bool:
            if self.delivery.awaited:
                return False
            if all(report.is_given_up for report in self.results.held.values()):
                return True
            self.sweep(at_once=True)
            return False

        return self.delivery.wait_until(is_settled, deadline) and not self.results.held

    def keep_all(self) -> List[str]:
        """Put every undelivered result that is not in the outbox there. Return the tasks that it does not hold then.

        For the end: what no thread of the pool has come to, such as timeouts and refusals, is in memory only.
        """
        return self.undelivered() if self.spool is None else self.spool.put_held()

    def close(self, deadline: Deadline) -> List[str]:
        """End the pool's threads. Return the names of those that still send at ``deadline``."""
        self.delivery.close()
        if self.spool is not None:
            self.spool.put_held()
            self.spool.disown()
        return self.delivery.join(deadline)

    # -- inside: one result --

    def _own_again(self, report: Report) -> None:
        """Plan a report whose sending ended in an unforeseen way."""
        with self._lock:
            # First, because it needs no memory: should planning fail too, a sweep finds it.
            move(report, HELD)
            report.tries += 1
            self.plan(report, full_jitter(report.tries, RETRY_MIN, RETRY_MAX))

    def _deliver(self, report: Report, attempt: int, body: bytes, is_substitute: bool) -> None:
        """Send what a report held when its sending began, and act on the answer."""
        if self.spool is not None and not self.spool.holds(report, attempt, is_substitute):
            self.spool.put(report, attempt, is_substitute, body)
        key = protocol.completion_key(report.task_id, attempt, is_substitute)
        data = body + protocol.completion_tail(attempt, self.sender.worker_id)
        found = self.sender.ask("complete", report.task_id, data, key)
        self.sender.support.note("complete", found)
        if isinstance(found, Settled):
            self._settle(report, attempt)
        elif isinstance(found, Retry):
            self._retry(report, found)
        elif isinstance(found, Dropped):
            log.warning("[%s] the platform no longer knows this task (%s); its result is dropped",
                        report.task_id, found.error)  # fmt: skip
            self._settle(report, attempt, is_dropped=True)
        elif isinstance(found, Substitute) and not is_substitute:
            self._substitute(report, found)
        elif isinstance(found, Unauthorized) and (found.is_foreign or report.unauthorized < REFUSALS):
            # The token was renewed, but it can have been ended since, or one of several gateways not know it yet.
            report.unauthorized += not found.is_foreign
            self._retry(report, Retry(found.error, found.delay))
        else:
            self._retry_slowly(report, attempt, found)

    def _settle(self, report: Report, attempt: int, is_dropped: bool = False) -> None:
        """Note that the platform has, or does not want, what was sent under ``attempt``."""
        with self._lock:
            if self.results.held.get(report.task_id) is not report:
                return
            stored, newest = report.stored, report.attempt
            is_settled = self.results.settle(report, attempt, is_dropped=is_dropped)
            if is_settled:
                report.stored = None
                self.delivery.changed.wake()
        if not is_settled:
            self.enqueue(report)
        elif self.spool is not None and stored is not None:
            self.spool.remove(report.task_id, newest)
        if self.results.was_full and self.results.has_room_again():
            self.on_room()

    def _substitute(self, report: Report, found: Substitute) -> None:
        """Send a failure in place of a result that the platform refused."""
        log.error("[%s] the platform refused the result (%s); the failure %s is sent instead",
                  report.task_id, found.error, found.code)  # fmt: skip
        self.results.substitute(report, found.code, f"the platform refused the result: {found.error}")
        self.enqueue(report)

    def _retry(self, report: Report, found: Retry, is_unforeseen: bool = False) -> None:
        """Send again after a backoff."""
        with self._lock:
            # In one step, or a flush in between would find nothing to hurry, and then wait for the whole delay.
            tries = report.tries
            report.tries += 1
            delay = max(full_jitter(tries, RETRY_MIN, RETRY_MAX), found.delay)
            self.plan(report, delay)
        if self.spool is not None and not tries:
            self.spool.plan_upkeep(UPKEEP)
        log.log(
            logging.DEBUG if tries else logging.WARNING,
            "[%s] the result was not delivered (%s); it is kept and sent again in %.1f s",
            report.task_id, found.error, delay, exc_info=is_unforeseen and not tries,
        )  # fmt: skip

    def _retry_slowly(self, report: Report, attempt: int, found: Failed) -> None:
        """Send again after a long pause: repeating is unlikely to help."""
        if not report.is_refused:
            report.is_refused = True
            log.error("[%s] the result cannot be delivered (%s); it is kept and sent every %g s",
                      report.task_id, found.error, REFUSED_PAUSE)  # fmt: skip
        with self._lock:
            report.is_given_up = self._is_flushing
            # At once if the platform has asked for it under a higher attempt since.
            delay = REFUSED_PAUSE if report.attempt == attempt else 0.0
            self.plan(report, delay, is_awaited=not self._is_flushing)
            self.delivery.changed.wake()
