"""Hold the results of tasks: encoded once, held until delivered, then remembered for repeated deliveries."""

from __future__ import annotations

import enum
import threading
from collections import OrderedDict
from typing import Any, Callable, Dict, List, Optional, Tuple

from .._internal.logs import get_logger
from .._internal.scrub import scrub
from ..wire import protocol
from ..wire.models import Completion

log = get_logger("sekuire.report")

#: Undelivered results at which intake pauses: their number and their bytes.
BACKLOG = 1000
BACKLOG_BYTES = 64 * 1024 * 1024
#: Delivered results remembered: tasks, and bytes of the results kept to answer a repeated delivery.
MEMORY = 10_000
MEMORY_BYTES = 16 * 1024 * 1024
MEMORY_ENTRY_BYTES = 64 * 1024


class State(enum.Enum):
    """Name the states of a report. ``edges`` are the states that may follow."""

    #: With the thread that accepted it, which sends or plans it next. A sweep plans one that was left here.
    HELD = "held"
    #: In the pool's queue.
    PLANNED = "planned"
    #: In the hands of one thread, which plans it again unless it settles it.
    SENDING = "sending"
    #: The platform has it.
    SETTLED = "settled"
    #: The platform does not want it.
    DROPPED = "dropped"

    def __init__(self, name: str) -> None:
        # On the state itself, because a look-up by an enum's member is slow.
        self.edges: Tuple[State, ...] = ()


HELD, PLANNED, SENDING, SETTLED, DROPPED = State
HELD.edges = (SENDING, PLANNED)
# To SENDING also by a thread that sends what a sweep has planned. To HELD when the pool is closed.
PLANNED.edges = (SENDING, PLANNED, HELD)
SENDING.edges = (SETTLED, PLANNED, DROPPED, HELD)
# The platform asks again for what it once accepted.
SETTLED.edges = DROPPED.edges = (PLANNED,)


class Report:
    """Describe one result. Its fields change under the lock of its :class:`Results`.

    - ``head``: its encoded body without the end; empty once it is no longer kept.
    - ``code``: the failure's code as it is sent; None for an output.
    - ``is_final``: False for a failure, after which the task may be tried again.
    - ``is_substitute``: it is the failure that is sent in place of a result which the platform refused.
    - ``is_refused``: the platform refused it for a reason that will hardly pass, so it is sent slowly.
    - ``is_given_up``: it was refused while the worker stopped, so a flush does not wait for it.
    - ``stored``: the attempt and ``is_substitute`` of what the outbox holds of it, and the outbox's epoch; None if it
      holds nothing.
    - ``plan``: when the pool sends it, and the number of that action, while it is PLANNED.
    - ``sender``: the thread that has it, while it is SENDING.
    - ``is_noticed``: a sweep has found it HELD before.
    """

    __slots__ = (
        "attempt",
        "code",
        "head",
        "is_final",
        "is_given_up",
        "is_noticed",
        "is_refused",
        "is_substitute",
        "plan",
        "sender",
        "state",
        "stored",
        "task_id",
        "tries",
        "unauthorized",
    )

    def __init__(self, task_id: str, attempt: int, head: bytes, is_final: bool, code: Optional[str] = None) -> None:
        self.task_id = task_id
        self.code = code
        self.attempt = attempt
        self.head = head
        self.is_final = is_final
        self.is_substitute = self.is_refused = self.is_given_up = self.is_noticed = False
        self.state = HELD
        self.stored: Optional[Tuple[int, bool, int]] = None
        self.plan: Optional[Tuple[float, int]] = None
        self.sender: Optional[int] = None
        self.tries = 0
        self.unauthorized = 0


def move(report: Report, to: State) -> None:
    """Change a report's state. Nothing else does. Needs the lock."""
    assert to in report.state.edges, f"{report.state} -> {to}"
    report.state = to
    report.plan = report.sender = None


class Results:
    """Hold the results of one worker until they are delivered, and remember them after that.

    :param lock: the reporter's. It guards all state; what needs it is marked so.
    """

    def __init__(self, lock: threading.RLock) -> None:
        self.lock = lock
        self.held: Dict[str, Report] = {}
        self.held_bytes = 0
        self.remembered: OrderedDict[str, Report] = OrderedDict()
        self.remembered_bytes = 0
        #: Results that the platform did not want.
        self.dropped = 0
        #: Set when :meth:`has_room` has returned False; cleared when there is room again.
        self.was_full = False

    def add(self, report: Report) -> bool:
        """Hold a report. Return False if its task has a result already. Needs the lock."""
        if report.task_id in self.held or report.task_id in self.remembered:
            return False
        self.held[report.task_id] = report
        self.held_bytes += len(report.head)
        return True

    def is_held(self, report: Report) -> bool:
        """Return True if this report is not settled."""
        return self.held.get(report.task_id) is report

    def has_result(self, task_id: str) -> bool:
        """Return True if this task has a result, delivered or not. Needs the lock."""
        return task_id in self.held or task_id in self.remembered

    def ids(self) -> List[str]:
        """Return the ids of the tasks whose result is held."""
        with self.lock:
            return list(self.held)

    def notice_left(self, at_once: bool) -> List[Report]:
        """Return the reports that no thread has and that are not planned. Needs the lock.

        :param at_once: return all of them. False: only those that the previous call has found, too.
        """
        left = [report for report in self.held.values() if report.state is HELD]
        found = [report for report in left if report.is_noticed or at_once]
        for report in left:
            report.is_noticed = True
        return found

    def substitute(self, report: Report, code: str, message: str) -> None:
        """Put a failure in place of a held result."""
        failed = Completion(
            task_id=report.task_id,
            attempt=report.attempt,
            failure=protocol.failure(code, scrub(message)),
            execution_time_ms=protocol.execution_time_of(report.head),
        )
        head = protocol.completion_head(failed)
        with self.lock:
            self.held_bytes += len(head) - len(report.head)
            report.head = head
            report.is_final, report.is_substitute = False, True
            report.tries = 0

    def has_room(self) -> bool:
        """Return False if so many results are held that no more should be made."""
        if len(self.held) < BACKLOG and self.held_bytes < BACKLOG_BYTES:
            return True
        with self.lock:
            # Under the lock, so that no result that settles now is missed.
            self.was_full = len(self.held) >= BACKLOG or self.held_bytes >= BACKLOG_BYTES
            return not self.was_full

    def has_room_again(self) -> bool:
        """Return True if :meth:`has_room` has returned False and would return True now; each change counts once."""
        with self.lock:
            if not self.was_full or len(self.held) >= BACKLOG or self.held_bytes >= BACKLOG_BYTES:
                return False
            self.was_full = False
            return True

    def settle(self, report: Report, attempt: int, *, is_dropped: bool = False) -> bool:
        """Move a report from the held ones to the remembered ones: the platform answered it under ``attempt``.

        Return False if it must be sent again instead, because the platform's next try of the task came first. That
        delivery was taken for a repetition, and does not run: it gets this result too. Needs the lock.
        """
        # One look and one step, or the next try could come in between.
        if not is_dropped and not report.is_final and report.attempt > attempt:
            return False
        if is_dropped:
            move(report, DROPPED)
            self.dropped += 1
        else:
            move(report, SETTLED)
        del self.held[report.task_id]
        size = len(report.head)
        self.held_bytes -= size
        if size > MEMORY_ENTRY_BYTES:
            report.head, size = b"", 0
        self.remembered[report.task_id] = report
        self.remembered_bytes += size
        if len(self.remembered) > MEMORY or self.remembered_bytes > MEMORY_BYTES:
            self._forget_oldest()
        return True

    def redelivered(self, report: Report, attempt: int) -> bool:
        """Note that a task whose result was delivered has come again. Return False if the task is to run again.

        A failure is not the task's result any more once a higher attempt comes: the platform, or a person, tries the
        task again. Else the platform does not have what it once accepted, and the report is held again. Needs the lock.
        """
        if report.is_final or attempt <= report.attempt:
            if not report.head:
                return True
            report.attempt = max(report.attempt, attempt)
            self.held[report.task_id] = report
            self.held_bytes += len(report.head)
        del self.remembered[report.task_id]
        self.remembered_bytes -= len(report.head)
        return report.task_id in self.held

    def _forget_oldest(self) -> None:
        """Forget delivered results, or their bodies, until what is remembered keeps to its limits."""
        while len(self.remembered) > MEMORY:
            _, oldest = self.remembered.popitem(last=False)
            self.remembered_bytes -= len(oldest.head)
        if self.remembered_bytes > MEMORY_BYTES:
            for oldest in self.remembered.values():
                self.remembered_bytes -= len(oldest.head)
                oldest.head = b""
                if self.remembered_bytes <= MEMORY_BYTES:
                    break


def encode(
    completion: Completion,
    max_bytes: int,
    encoder: Optional[Callable[[Any], Any]] = None,
    logged_id: Optional[str] = None,
) -> Tuple[bytes, Optional[str]]:
    """Return a completion's head, and the code of the failure in it: None for an output.

    A result that has no JSON form, or one of more than ``max_bytes``, is replaced by a failure that says so.

    :param encoder: the user's ``result_encoder``.
    :param logged_id: the task's id in log lines, if it is another one there.
    """
    logged_id = logged_id or completion.task_id
    problem = ""
    head = b""
    try:
        head = protocol.completion_head(completion, encoder)
    except Exception as error:  # noqa: BLE001  # The user's own encoder may raise anything.
        problem = scrub(_describe(completion, error, encoder))
    except BaseException as error:  # noqa: BLE001  # A result may be a subclass of dict with code of its own.
        problem = type(error).__name__
    if problem:
        log.error("[%s] the result has no JSON form: %s", logged_id, problem)
        code = "result_not_serializable"
        text = f"the handler's result has no JSON form: {problem}"[:1000]
        return _substitute_head(completion, code, text), code
    if len(head) > max_bytes:
        message = f"the result has {len(head)} bytes of JSON; max_result_bytes is {max_bytes}"
        log.error("[%s] %s", logged_id, message)
        return _substitute_head(completion, "result_too_large", message), "result_too_large"
    return head, None if completion.failure is None else completion.failure.code


def _describe(completion: Completion, error: BaseException, encoder: Optional[Callable[[Any], Any]]) -> str:
    """Return where the result has no JSON form and what to do. Only the error's text if that is not found."""
    try:
        problem = protocol.completion_problem(completion, encoder) or f"{type(error).__name__}: {error}"
        return f"{completion.capability}: {problem}" if completion.capability else problem
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
