"""Results on their way to the platform: encoded once, sent until accepted, remembered for repeated deliveries."""

from __future__ import annotations

import enum
import heapq
import itertools
import logging
import threading
import time
from collections import OrderedDict
from typing import TYPE_CHECKING, Callable, Dict, List, NamedTuple, Optional, Protocol, Tuple

from .._internal.logs import get_logger
from .._internal.threads import LONG_WAIT, Deadline, Timer, join_all, owned_by
from ..config import WorkerConfig
from ..credentials import Authenticator, Snapshot
from ..errors import SekuireError
from ..handlers.context import TaskContext
from ..transport.retry import full_jitter
from ..wire import protocol
from ..wire.models import Completion
from ..wire.verdict import (
    Dropped,
    Failed,
    Retry,
    Revoked,
    Settled,
    Substitute,
    Unauthorized,
    Unsupported,
    Verdict,
    verdict,
)
from .life import Life

if TYPE_CHECKING:
    from .outbox import Outbox

log = get_logger("sekuire.report")

#: First and longest delay between tries of one report, in seconds.
RETRY_MIN, RETRY_MAX = 0.1, 60.0
#: Delay after an answer that repeating is unlikely to change, in seconds.
STUBBORN = 60.0
#: How often a result that is refused with 401, also after a renewal of the token, is taken to be so by bad luck.
REFUSALS = 5
#: Threads that send what was not sent by a handler's own thread.
MAX_THREADS = 4
#: Undelivered results at which intake pauses: their number and their bytes.
BACKLOG = 1000
BACKLOG_BYTES = 64 * 1024 * 1024
#: Releases under way at which no further task is released: a platform that takes none must not fill the memory.
RELEASES = 10_000
#: Seconds between two looks for results that no thread has, and for threads that could not be started.
SWEEP = 5.0
#: Delivered results remembered: tasks, and bytes of the results kept to answer a repeated delivery.
MEMORY = 10_000
MEMORY_BYTES = 16 * 1024 * 1024
MEMORY_ENTRY_BYTES = 64 * 1024
#: Seconds between two progress reports of one task.
PROGRESS_PAUSE = 1.0


class State(enum.Enum):
    """Where a report is; ``edges`` are the states that it may have next."""

    #: With the thread that accepted it, which posts or enqueues it next. A sweep plans one that was left here.
    HELD = "held"
    #: In the pool's queue.
    PLANNED = "planned"
    #: In the hands of one thread inside :meth:`Reporter.post`, which plans it if it does not settle it.
    SENDING = "sending"
    #: The platform has it.
    SETTLED = "settled"
    #: The platform does not want it.
    DROPPED = "dropped"

    def __init__(self, name: str) -> None:
        # On the state itself, because a look-up by an enum's member is slow.
        self.edges: Tuple[State, ...] = ()


_HELD, _PLANNED, _SENDING, _SETTLED, _DROPPED = State
_HELD.edges = (_SENDING, _PLANNED)
# Sending: also by a thread that posts what a sweep has planned. Held: close() ends the pool.
_PLANNED.edges = (_SENDING, _PLANNED, _HELD)
_SENDING.edges = (_SETTLED, _PLANNED, _DROPPED, _HELD)
# The platform asks again for what it once accepted.
_SETTLED.edges = _DROPPED.edges = (_PLANNED,)


class Report:
    """One result; its fields change under the reporter's lock.

    ``code`` is the failure's as it is sent, None for an output.
    ``head`` is its encoded body without the end, empty once it is no longer kept. ``is_final`` is false for a failure
    that the platform may answer with a new try of the task. ``is_given_up``: a flush need not wait for it.
    ``is_stored``: its present form is in the outbox, under ``stored_attempt``. ``planned``: when the pool sends it, and
    the number of that action, while it is PLANNED. ``sender``: the thread that has it, while it is SENDING.
    ``is_noticed``: a sweep has found it HELD before.
    """

    __slots__ = (
        "attempt",
        "code",
        "head",
        "is_final",
        "is_given_up",
        "is_noticed",
        "is_stored",
        "planned",
        "refused",
        "sender",
        "state",
        "stored_attempt",
        "stubborn",
        "substituted",
        "task_id",
        "tries",
    )

    def __init__(self, task_id: str, attempt: int, head: bytes, is_final: bool, code: Optional[str] = None) -> None:
        self.task_id = task_id
        self.code = code
        self.attempt = attempt
        self.head = head
        self.is_final = is_final
        self.is_given_up = False
        self.is_noticed = False
        self.is_stored = False
        self.stored_attempt = 0
        self.state = _HELD
        self.sender: Optional[int] = None
        self.planned: Optional[Tuple[float, int]] = None
        self.tries = 0
        self.refused = 0
        self.substituted = False
        self.stubborn = False


def move(report: Report, to: State) -> None:
    """Change a report's state; the only place that does. Needs the reporter's lock."""
    assert to in report.state.edges, f"{report.state} -> {to}"
    report.state = to
    report.planned = report.sender = None


class ReleaseOrder(Protocol):
    """One task on its way back to the platform; the sender calls it, without a lock."""

    @property
    def task_id(self) -> str: ...

    @property
    def attempt(self) -> int: ...

    def begin(self) -> bool:
        """Called before each try. Return False if the task is not to be given back any more."""

    def postpone(self) -> None:
        """The try had no verdict; the next one comes later."""

    def end(self, *, is_released: bool, is_supported: bool = True) -> None:
        """Called once, with the platform's verdict. Without support the task needs an answer of its own."""


class _Action(NamedTuple):
    """What the pool does at ``when`` (``time.monotonic()``); ``counts``: a flush waits for it."""

    when: float
    number: int
    function: Callable[[], None]
    counts: bool


class Reporter:
    """Delivers results, releases and progress of one worker.

    Any thread may call anything. A handler's thread sends its own first report (:meth:`accept`, then :meth:`post`);
    everything else, retries included, is sent by ``sekuire-report-N`` (at most four, made when more is due than threads
    are free, ended by :meth:`close`). ``_condition`` guards all state, the pool's queue and its count of busy threads
    among it, and is never held over I/O or a callback.

    A held report always has an owner: the pool's queue, or the thread that sends it, which plans it again whatever
    happens. :meth:`sweep`, on the timer's thread, plans what the thread that accepted a result has left, and starts
    threads that could not be started before.

    With an outbox, a result is on disk before it is first sent, and leaves it when it is settled. One that has not been
    sent, because all threads wait for the platform, is put there by :meth:`keep` or at the end.

    :param life: revoked, without a lock held, when an answer carries the kill switch.

    ``on_room`` is called, without a lock, when :meth:`has_room` has been False and is True again.
    """

    def __init__(
        self,
        config: WorkerConfig,
        auth: Authenticator,
        worker_id: str,
        life: Life,
        *,
        outbox: Optional[Outbox] = None,
        owner: object = None,
    ) -> None:
        self.dropped = 0
        self.on_room: Callable[[], None] = lambda: None
        self._has_released = False
        self._outbox = outbox
        self._sender = (config.api_base_url, config.agent_id)
        self._auth = auth
        self._support = auth.support
        self._worker_id = worker_id
        self._life = life
        self._owner = owner
        self._max_bytes = config.max_result_bytes
        self._endpoints = config.endpoints
        self._call_timeout = config.connect_timeout + config.read_timeout
        self._condition = threading.Condition()
        self._held: Dict[str, Report] = {}
        self._held_bytes = 0
        self._remembered: OrderedDict[str, Report] = OrderedDict()
        self._remembered_bytes = 0
        self._queue: List[_Action] = []
        self._numbers = itertools.count()
        self._pending = 0
        #: Threads of the pool inside an action; the others are free, or on their way to the queue.
        self._busy = 0
        self._threads: List[threading.Thread] = []
        self._closed = False
        self._flushing = False
        self._progress: Dict[str, Tuple[float, Optional[str]]] = {}
        self._progress_at: Dict[str, float] = {}
        self._was_full = False
        self._releases = 0

    # -- results --

    def accept(self, completion: Completion) -> Optional[Report]:
        """Take a result: from now on it is the task's only one. None where the task has one already."""
        head, code = encode(completion, self._max_bytes)
        with self._condition:
            if completion.task_id in self._held or completion.task_id in self._remembered:
                return None
            failure = completion.failure
            is_final = failure is None or not failure.retryable
            report = Report(completion.task_id, completion.attempt, head, is_final, code)
            self._held[report.task_id] = report
            self._held_bytes += len(head)
            self._progress.pop(report.task_id, None)
            self._progress_at.pop(report.task_id, None)
            return report

    def enqueue(self, report: Report) -> None:
        """Have a report sent by the pool, at once."""
        self._plan(report, 0.0)

    def keep(self, report: Report) -> None:
        """Put a report that was not sent yet into the outbox, for a thread that leaves the sending to the pool.

        The pool may be long in coming to it: its threads can all wait for a platform that does not answer.
        """
        if self._outbox is None:
            return
        with self._condition:
            attempt, head, substituted = report.attempt, report.head, report.substituted
        self._keep_on_disk(self._outbox, report, attempt, substituted, head)

    def recall(self, task_id: str, attempt: int) -> bool:
        """Whether this task has a result already; a delivery with a higher ``attempt`` gets it under that number.

        A retryable failure that the platform has taken is no result any more once a higher attempt comes: the
        platform tries the task again.
        """
        with self._condition:
            held = self._held.get(task_id)
            if held is not None:
                report = held
                is_news = attempt > report.attempt
                report.attempt = max(report.attempt, attempt)
                if is_news and report.stubborn and report.planned is not None:
                    # What the platform refused it asks for now, for example in the name of a new installation. One
                    # that is being sent is sent again after that.
                    self._plan(report, 0.0)
                return True
            remembered = self._remembered.get(task_id)
            if remembered is not None:
                return self._recall_remembered(remembered, attempt)
        if self._outbox is None:
            return False
        # Another worker of this process may have run it and be delivering it; outside our lock, as it has its own. What
        # is ours there and not here is on its way out.
        owner = self._outbox.owner_of(*self._sender, task_id)
        if owner is None or owner is self:
            return False
        return owner.recall(task_id, attempt) if isinstance(owner, Reporter) else True

    def _recall_remembered(self, report: Report, attempt: int) -> bool:
        """:meth:`recall` of a delivered result. Needs the lock."""
        if not report.is_final and attempt > report.attempt:
            del self._remembered[report.task_id]
            self._remembered_bytes -= len(report.head)
            return False
        if report.head:
            # The platform asks again, so it does not have what it once accepted: give it once more.
            del self._remembered[report.task_id]
            self._remembered_bytes -= len(report.head)
            report.attempt = max(report.attempt, attempt)
            self._held[report.task_id] = report
            self._held_bytes += len(report.head)
            self._plan(report, 0.0)
        return True

    def post(self, report: Report) -> None:
        """Send a report once; where it is not settled then, it is sent again by the pool, later.

        Whatever is raised on the way plans it again.
        """
        me = threading.get_ident()
        with self._condition:
            if self._held.get(report.task_id) is not report or report.state is _SENDING:
                # Settled, or another thread has it.
                return
            move(report, _SENDING)
            report.sender = me
            attempt, body, substituted = report.attempt, report.head, report.substituted
        try:
            self._deliver(report, attempt, body, substituted)
        except BaseException as error:  # sys.exit() in a user's token provider, no memory, a library's bug.
            if report.state is _SENDING and report.sender == me:
                self._retry(
                    report, attempt, Retry(SekuireError(f"{type(error).__name__} while sending")), unforeseen=True
                )
            else:
                log.exception("[%s] a failure after the result was settled or planned", report.task_id)
        finally:
            # Without the lock: only this thread moves a report out of its hands.
            if report.state is _SENDING and report.sender == me:
                self._own_again(report)

    def _own_again(self, report: Report) -> None:
        """Plan a report whose sending ended in a way nobody foresaw."""
        with self._condition:
            # First, because it needs no memory: should planning fail too, a sweep finds it.
            move(report, _HELD)
            report.tries += 1
            self._plan(report, full_jitter(report.tries, RETRY_MIN, RETRY_MAX))

    def _deliver(self, report: Report, attempt: int, body: bytes, substituted: bool) -> None:
        """Send what a report held when its sending began, and act on the answer."""
        if self._outbox is not None and not (report.is_stored and report.stored_attempt == attempt):
            self._keep_on_disk(self._outbox, report, attempt, substituted, body)
        key = protocol.completion_key(report.task_id, attempt, substituted)
        path = self._endpoints.path("complete", task_id=report.task_id)
        data = body + protocol.completion_tail(attempt, self._worker_id)
        found = self._ask("complete", path, data, key)
        self._support.note("complete", found)
        if isinstance(found, Settled):
            self._settle(report, attempt)
        elif isinstance(found, Retry):
            self._retry(report, attempt, found)
        elif isinstance(found, Dropped):
            log.warning("[%s] the platform no longer knows this task (%s); its result is dropped",
                        report.task_id, found.error)  # fmt: skip
            self._settle(report, attempt, dropped=True)
        elif isinstance(found, Substitute) and not substituted:
            self._substitute(report, found)
        elif isinstance(found, Unauthorized) and report.refused < REFUSALS:
            # The token was renewed, but can have been ended since, or one of several gateways not know it yet.
            report.refused += 1
            self._retry(report, attempt, Retry(found.error))
        else:
            self._keep(report, attempt, found)

    def restore(self, deadline: Deadline) -> int:
        """Take up what an earlier process left in the outbox, send it, and wait until each was sent once.

        :returns: how many there were. Those that are not settled by then are sent again like any other.
        """
        if self._outbox is None:
            return 0
        reports = []
        for stored in self._outbox.claim(*self._sender, owner=self):
            is_final = not protocol.is_retryable_failure(stored.head)
            report = Report(stored.task_id, stored.attempt, stored.head, is_final)
            report.is_stored = True
            report.stored_attempt = stored.attempt
            report.substituted = stored.substituted
            reports.append(report)
        with self._condition:
            for report in reports:
                self._held[report.task_id] = report
                self._held_bytes += len(report.head)
        for report in reports:
            self.enqueue(report)
        if reports:
            log.info("%d results of an earlier process are in the outbox; they are delivered first", len(reports))
        with self._condition:
            while any(self._held.get(one.task_id) is one and not (one.tries or one.stubborn) for one in reports):
                if deadline.is_expired() or self._flushing or self._closed:
                    break
                self._condition.wait(min(deadline.remaining(), 0.5))
        return len(reports)

    def undelivered(self) -> List[str]:
        """Ids of tasks whose result the platform has not accepted."""
        with self._condition:
            return list(self._held)

    @property
    def backlog(self) -> int:
        return len(self._held)

    def has_room(self) -> bool:
        """Return False if so many results are undelivered that no more should be made.

        Then ``on_room`` is called when that has changed.
        """
        if len(self._held) < BACKLOG and self._held_bytes < BACKLOG_BYTES:
            return True
        with self._condition:
            # Under the lock, so that no result that settles now is missed.
            self._was_full = len(self._held) >= BACKLOG or self._held_bytes >= BACKLOG_BYTES
            return not self._was_full

    def _note_room(self) -> None:
        """Call ``on_room`` if results may be made again and could not before. Without the lock."""
        with self._condition:
            if len(self._held) >= BACKLOG or self._held_bytes >= BACKLOG_BYTES:
                return
            self._was_full = False
        self.on_room()

    # -- release and progress --

    @property
    def can_release(self) -> Optional[bool]:
        """True if the platform takes tasks back, False if it does not offer that, None if that is not known yet."""
        if not self._support.is_offered("release"):
            return False
        return True if self._has_released else None

    def release(self, order: ReleaseOrder, delay: float = 0.0) -> None:
        """Give a task that was not begun back, in ``delay`` seconds, or at once when the worker stops."""
        if self.can_release is False:
            order.end(is_released=False, is_supported=False)
            return
        with self._condition:
            self._releases += 1
        self._schedule(delay, lambda: self._release(order, 0))

    def has_room_for_release(self) -> bool:
        """Return False if so many releases are under way that no further task should be released."""
        return self._releases < RELEASES

    def progress(self, context: TaskContext, fraction: float, message: Optional[str]) -> None:
        """Remember the newest progress of a task and send it soon. Never blocks."""
        task_id = context.task_id
        with self._condition:
            if (
                not self._support.is_offered("progress")
                or self._closed
                or task_id in self._held
                or task_id in self._remembered
            ):
                return
            waiting = task_id in self._progress
            self._progress[task_id] = (fraction, message)
            due = self._progress_at.get(task_id, 0.0) - time.monotonic()
        if not waiting:
            self._schedule(max(due, 0.0), lambda: self._send_progress(context), counts=False)

    # -- ending --

    def flush(self, deadline: Deadline) -> bool:
        """Send at once what waits for its next try, and wait until all is settled; whether it is.

        A result that the platform refuses for a reason that will not pass is not waited for a second time.
        """
        with self._condition:
            self._flushing = True
            for report in self._held.values():
                report.tries = 0
            self._queue = [action._replace(when=0.0) for action in self._queue]
            heapq.heapify(self._queue)
            self._fit_threads()
            self._condition.notify_all()
        while True:
            action: Optional[_Action] = None
            with self._condition:
                if not self._pending:
                    if all(report.is_given_up for report in self._held.values()):
                        return not self._held
                    self.sweep(at_once=True)
                if deadline.is_expired():
                    return False
                self._fit_threads()
                if not self._threads:
                    # None could be started, so this one sends.
                    action = self._take_due()
                if action is None:
                    self._condition.wait(min(deadline.remaining(), 0.5))
            if action is not None:
                self._perform(action)

    def keep_all(self) -> List[str]:
        """Put every undelivered result that is not in the outbox there; the tasks of those that it has not taken.

        For the end: what no thread of the pool has come to, such as timeouts and refusals, is in memory only.
        """
        outbox = self._outbox
        if outbox is None:
            return self.undelivered()
        from .outbox import Stored  # Loaded already, by whoever made the outbox.

        while True:
            with self._condition:
                missing = [
                    (report, Stored(report.task_id, report.attempt, report.substituted, report.head))
                    for report in self._held.values()
                    if not _is_kept(report)
                ]
            if not missing or not outbox.put_all(
                *self._sender, self._auth.store.current.installation_id, [stored for _, stored in missing], self
            ):
                break
            settled: List[Stored] = []
            with self._condition:
                for report, stored in missing:
                    if self._held.get(report.task_id) is not report:
                        # Accepted while it was written: whoever settled it did not know that it is there.
                        settled.append(stored)
                        continue
                    # Where a higher attempt came meanwhile, the next round replaces it.
                    report.stored_attempt = stored.attempt
                    report.is_stored = report.substituted == stored.substituted
            for stored in settled:
                outbox.remove(*self._sender, stored.task_id, stored.attempt)
        with self._condition:
            return [report.task_id for report in self._held.values() if not _is_kept(report)]

    def close(self, deadline: Deadline) -> List[str]:
        """End the pool's threads; the names of those still sending at ``deadline``."""
        with self._condition:
            self._closed = True
            self._queue.clear()
            self._condition.notify_all()
            threads = list(self._threads)
        if self._outbox is not None:
            self.keep_all()
            self._outbox.disown(self)
        return join_all(threads, deadline)

    # -- inside: one result --

    def _ask(self, endpoint: str, path: str, body: bytes, key: Optional[str] = None) -> Verdict:
        """Send once, and return what came of it; the kill switch has been passed on then."""
        found: Verdict

        def path_of(snapshot: Snapshot) -> str:
            return path

        try:
            reply, _ = self._auth.request(
                "POST", path_of, body=body, idempotency_key=key, deadline=Deadline(self._call_timeout)
            )
            found = verdict(endpoint, reply)
        except SekuireError as error:
            found = verdict(endpoint, error)
        if isinstance(found, Revoked):
            self._life.revoke(found.error)
        return found

    def _settle(self, report: Report, attempt: int, dropped: bool = False) -> None:
        """The platform has, or does not want, what was sent under ``attempt``."""
        again = False
        with self._condition:
            if self._held.get(report.task_id) is not report:
                return
            # The platform's next try of the task may have come before its answer to this one. It was taken for a
            # repetition, so nobody runs it: it gets this result too. One look and one step, or it could come between.
            again = not dropped and not report.is_final and report.attempt > attempt
            was_stored, attempt = report.is_stored, report.attempt
            if not again:
                report.is_stored = False
                move(report, _DROPPED if dropped else _SETTLED)
                del self._held[report.task_id]
                self._held_bytes -= len(report.head)
                self.dropped += dropped
                self._remember(report)
                self._condition.notify_all()
        if again:
            self.enqueue(report)
        elif self._outbox is not None and was_stored:
            self._outbox.remove(*self._sender, report.task_id, attempt)
        if self._was_full:
            self._note_room()

    def _keep_on_disk(self, outbox: Outbox, report: Report, attempt: int, substituted: bool, head: bytes) -> None:
        from .outbox import Stored  # Loaded already, by whoever made the outbox.

        stored = Stored(report.task_id, attempt, substituted, head)
        # Under the attempt that it is sent with: the next process must not make another result of that one.
        report.stored_attempt = attempt
        report.is_stored = outbox.put(*self._sender, self._auth.store.current.installation_id, stored, self)

    def _remember(self, report: Report) -> None:
        if len(report.head) > MEMORY_ENTRY_BYTES:
            report.head = b""
        self._remembered[report.task_id] = report
        self._remembered_bytes += len(report.head)
        while len(self._remembered) > MEMORY:
            _, oldest = self._remembered.popitem(last=False)
            self._remembered_bytes -= len(oldest.head)
        if self._remembered_bytes > MEMORY_BYTES:
            for oldest in self._remembered.values():
                self._remembered_bytes -= len(oldest.head)
                oldest.head = b""
                if self._remembered_bytes <= MEMORY_BYTES:
                    break

    def _substitute(self, report: Report, found: Substitute) -> None:
        log.error("[%s] the platform refused the result (%s); the failure %s is sent instead",
                  report.task_id, found.error, found.code)  # fmt: skip
        substitute = Completion(
            task_id=report.task_id,
            attempt=report.attempt,
            failure=protocol.failure(found.code, f"the platform refused the result: {found.error}"),
            execution_time_ms=protocol.execution_time_of(report.head),
        )
        head = protocol.completion_head(substitute)
        with self._condition:
            self._held_bytes += len(head) - len(report.head)
            report.head = head
            report.is_final = report.substituted = True
            report.is_stored = False
            report.tries = 0
        self.enqueue(report)

    def _retry(self, report: Report, attempt: int, found: Retry, unforeseen: bool = False) -> None:
        """Send again after a backoff."""
        with self._condition:
            # In one step, or a flush in between would find nothing to hurry, and then wait for the whole delay.
            tries = report.tries
            report.tries += 1
            delay = max(full_jitter(tries, RETRY_MIN, RETRY_MAX), found.delay)
            self._plan(report, delay)
        log.log(
            logging.DEBUG if tries else logging.WARNING,
            "[%s] the result was not delivered (%s); it is kept and sent again in %.1f s",
            report.task_id,
            found.error,
            delay,
            exc_info=unforeseen and not tries,
        )

    def _keep(self, report: Report, attempt: int, found: Failed) -> None:
        """Send again, slowly: repeating is unlikely to help."""
        if not report.stubborn:
            report.stubborn = True
            log.error("[%s] the result cannot be delivered (%s); it is kept and sent every %g s",
                      report.task_id, found.error, STUBBORN)  # fmt: skip
        self._try_late(report, attempt)

    def _try_late(self, report: Report, attempt: int) -> None:
        with self._condition:
            report.is_given_up = self._flushing
            # At once where the platform has asked for it under a higher attempt meanwhile.
            self._plan(report, STUBBORN if report.attempt == attempt else 0.0, counts=not self._flushing)
            self._condition.notify_all()

    # -- inside: release and progress --

    def _release(self, order: ReleaseOrder, tries: int) -> None:
        """Try to give a task back; plan the next try where there is no verdict, whatever happens."""
        delay: Optional[float] = full_jitter(tries, RETRY_MIN, RETRY_MAX)
        try:
            delay = self._try_release(order, tries) if order.begin() else None
        finally:
            if delay is None:
                with self._condition:
                    self._releases -= 1
            else:
                order.postpone()
                self._schedule(delay, lambda: self._release(order, tries + 1))

    def _try_release(self, order: ReleaseOrder, tries: int) -> Optional[float]:
        """Send a release once. Return the seconds until the next try, or None if the platform gave its verdict."""
        task_id = order.task_id
        path = self._endpoints.path("release", task_id=task_id)
        found = self._ask("release", path, protocol.release_body(order.attempt, self._worker_id))
        self._support.note("release", found)
        if isinstance(found, Unsupported):
            order.end(is_released=False, is_supported=False)
            return None
        if isinstance(found, Retry) or (isinstance(found, Unauthorized) and tries < REFUSALS):
            least = found.delay if isinstance(found, Retry) else 0.0
            delay = max(full_jitter(tries, RETRY_MIN, RETRY_MAX), least)
            log.debug("[%s] not released (%s); again in %.1f s", task_id, found.error, delay)
            return delay
        if isinstance(found, Settled):
            self._has_released = True
        else:
            log.warning("[%s] the platform did not accept the release of the task (%s)", task_id, found.error)
        order.end(is_released=isinstance(found, Settled))
        return None

    def _send_progress(self, context: TaskContext) -> None:
        task_id = context.task_id
        with self._condition:
            newest = self._progress.pop(task_id, None)
            if newest is None:
                return
            self._progress_at[task_id] = time.monotonic() + PROGRESS_PAUSE
        path = self._endpoints.path("progress", task_id=task_id)
        found = self._ask("progress", path, protocol.progress_body(*newest))
        # A task that has ended since may be unknown to the platform by now: that says nothing of the endpoint.
        is_open = self._is_open(task_id)
        if is_open and isinstance(found, Unsupported) and self._support.note("progress", found):
            with self._condition:
                self._progress.clear()
            log.warning("the platform does not offer progress reports (%s); no more are sent", found.error)
        elif isinstance(found, Dropped) and found.is_superseded and is_open:
            # Another worker, which the platform gave the task to since, was first: nobody waits for this result.
            log.warning("[%s] the platform has the task's result already; the handler is cancelled", task_id)
            context._cancel("superseded")
        elif not isinstance(found, Settled):
            log.debug("[%s] progress was not accepted (%s)", task_id, found.error)

    def _is_open(self, task_id: str) -> bool:
        """Whether this task has no result here."""
        with self._condition:
            return task_id not in self._held and task_id not in self._remembered

    # -- inside: the pool --

    def _plan(self, report: Report, delay: float, counts: bool = True) -> None:
        """Have the pool send ``report`` in ``delay`` seconds, or as planned before where that is sooner."""
        with self._condition:
            when = time.monotonic() + delay
            if report.planned is not None:
                before, number = report.planned
                if before <= when:
                    return
                self._unschedule(number)
            planned = self._schedule(delay, lambda: self.post(report), counts)
            if planned is not None:
                move(report, _PLANNED)
                report.planned = (when, planned)
            elif report.state in (_PLANNED, _SENDING):
                move(report, _HELD)

    def watch(self, timer: Timer) -> None:
        """Sweep now and then, on the timer's thread, until :meth:`close`."""

        def look() -> None:
            if not self._closed:
                timer.call_at(time.monotonic() + SWEEP, look)
                self.sweep()

        timer.call_at(time.monotonic() + SWEEP, look)

    def sweep(self, at_once: bool = False) -> None:
        """Plan each result that the thread which accepted it has left, and start missing threads of the pool.

        :param at_once: plan what no thread sends; else only what a sweep before has found like this.
        """
        with self._condition:
            for report in self._held.values():
                if report.state is not _HELD:
                    continue
                if report.is_noticed or at_once:
                    self._plan(report, 0.0)
                report.is_noticed = True
            self._fit_threads()
            self._condition.notify_all()

    def _schedule(self, delay: float, action: Callable[[], None], counts: bool = True) -> Optional[int]:
        """Have the pool do ``action`` in ``delay`` seconds; one that ``counts`` is waited for by :meth:`flush`.

        :returns: the action's number; None when it is too late for any.
        """
        with self._condition:
            if self._closed:
                return None
            number = next(self._numbers)
            heapq.heappush(self._queue, _Action(time.monotonic() + delay, number, action, counts))
            # After the push, which may fail: a flush must not wait for what is not there.
            self._pending += counts
            self._fit_threads()
            self._condition.notify_all()
            return number

    def _unschedule(self, number: int) -> None:
        """Take an action that was not begun out of the queue. Needs the lock."""
        found = next((action for action in self._queue if action.number == number), None)
        if found is not None:
            self._queue.remove(found)
            heapq.heapify(self._queue)
            self._pending -= found.counts

    def _fit_threads(self) -> None:
        """Make threads until there is a free one for each action that is due, and one to await others. Needs the lock.

        A thread that was woken and has not come to its action yet is free: who counts waiting ones alone makes none for
        the second action of a burst, which then waits for the answer to the first.
        """
        if len(self._threads) >= MAX_THREADS or not self._queue:
            return
        now = time.monotonic()
        wanted = max(1, sum(action.when <= now for action in self._queue))
        while len(self._threads) < MAX_THREADS and len(self._threads) - self._busy < wanted:
            name = f"sekuire-report-{len(self._threads) + 1}"
            try:
                thread = threading.Thread(target=self._work, name=name, daemon=True)
                thread.start()
            except (RuntimeError, MemoryError):
                # No new thread now, or the interpreter is ending. Those that are there go on; a sweep tries again.
                return
            self._threads.append(thread)

    def _work(self) -> None:
        try:
            with owned_by(self._owner):
                while True:
                    action = self._next()
                    if action is None:
                        return
                    self._perform(action)
                    # What it holds must not live until the next one comes.
                    del action
        finally:
            with self._condition:
                if not self._closed:
                    # An exception ends this thread. What is planned must have another one.
                    self._threads = [thread for thread in self._threads if thread is not threading.current_thread()]
                    self._fit_threads()

    def _perform(self, action: _Action) -> None:
        try:
            action.function()
        except BaseException:
            # Nothing of a report's gets here; what does must not end the thread.
            log.exception("an action of the report pool failed in an unforeseen way")
        finally:
            with self._condition:
                self._busy -= 1
                if action.counts:
                    self._pending -= 1
                    self._condition.notify_all()

    def _next(self) -> Optional[_Action]:
        with self._condition:
            while not self._closed:
                action = self._take_due()
                if action is not None:
                    return action
                delay = self._queue[0].when - time.monotonic() if self._queue else LONG_WAIT
                self._condition.wait(min(max(delay, 0.0), LONG_WAIT))
            return None

    def _take_due(self) -> Optional[_Action]:
        """Take the next action out of the queue if its time has come. Needs the lock."""
        if not self._queue or self._queue[0].when > time.monotonic():
            return None
        action = heapq.heappop(self._queue)
        self._busy += 1
        self._fit_threads()
        return action


def _is_kept(report: Report) -> bool:
    """Whether the outbox has a report as it would be sent now."""
    return report.is_stored and report.stored_attempt == report.attempt


def encode(completion: Completion, max_bytes: int) -> Tuple[bytes, Optional[str]]:
    """A completion's head, and the code of the failure in it, None for an output.

    A result that has no JSON form, or one of more than ``max_bytes``, gives way to a failure that says so.
    """
    problem = ""
    head = b""
    try:
        head = protocol.completion_head(completion)
    except (ValueError, TypeError, RecursionError, OverflowError, MemoryError) as error:
        problem = _describe(error)
    except BaseException as error:  # noqa: BLE001  # A result may be a subclass of dict with code of its own.
        problem = type(error).__name__
    if problem:
        log.error("[%s] the result has no JSON form: %s", completion.task_id, problem)
        code = "result_not_serializable"
        text = f"the handler's result has no JSON form: {problem}"[:1000]
        return _substitute_head(completion, code, text), code
    if len(head) > max_bytes:
        message = f"the result has {len(head)} bytes of JSON; max_result_bytes is {max_bytes}"
        log.error("[%s] %s", completion.task_id, message)
        return _substitute_head(completion, "result_too_large", message), "result_too_large"
    return head, None if completion.failure is None else completion.failure.code


def _describe(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"
    except BaseException:  # noqa: BLE001  # A class of the user's own.
        return type(error).__name__


def _substitute_head(completion: Completion, code: str, message: str) -> bytes:
    text = message.encode("utf-8", "replace").decode()
    failed = Completion(
        task_id=completion.task_id,
        attempt=completion.attempt,
        failure=protocol.failure(code, text),
        execution_time_ms=completion.execution_time_ms,
    )
    return protocol.completion_head(failed)
