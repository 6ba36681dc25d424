"""Show a handler its task: identity, time left, cancellation, progress, a logger.

A handler sees a :class:`TaskContext`, which only reads. What changes while the handler runs is in its
:class:`TaskControl`, which the worker holds.
"""

# Threads: the handler's thread, and any thread that it starts, read. The library's threads write through TaskControl.
# The reason of a cancellation is written once, before anyone is notified, so that reading it needs no lock.
# `_event_lock` guards the event that wait() makes, and the watcher.

from __future__ import annotations

import contextvars
import datetime as dt
import logging
import sys
import threading
import traceback
from types import FrameType
from typing import TYPE_CHECKING, Any, Callable, Dict, Mapping, Optional, Protocol, Set, Tuple

from .._internal.checks import is_number
from .._internal.clock import time
from .._internal.logs import make_record
from .._internal.speech import PERSON, audience, print_record
from ..errors import ApprovalDenied, ConfigurationError, TaskCancelled
from ..wire.models import Approval, Task

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

__all__ = ["TaskContext", "TaskControl", "control_of"]

_log = logging.getLogger("sekuire.task")
# One lock for all tasks: it is held for a few instructions, and only by handlers that wait and by cancellations.
_event_lock = threading.Lock()

ProgressSink = Callable[["TaskContext", float, Optional[str]], None]

#: The reasons of a cancellation that decide how the task is answered.
TERMINATED, SHUTDOWN, PROGRAM_ENDS = "terminated", "shutdown", "the program ends"
#: The reasons that are the library's own. A requester's must not be taken for one of them.
_OWN_REASONS = frozenset(
    (TERMINATED, SHUTDOWN, PROGRAM_ENDS, "timeout", "lease lost", "superseded", "withdrawn", "the worker died")
)


def cancel_reason_of(reason: Optional[str]) -> str:
    """Return the reason that a handler sees when its task alone is cancelled."""
    if not reason:
        return "cancelled"
    return f"cancelled: {reason}" if reason in _OWN_REASONS else reason


#: Seconds that a person has to decide, unless the handler says otherwise.
APPROVAL_TIME = 300.0


class Asker(Protocol):
    """Ask a person on behalf of a task."""

    def ask(
        self, context: TaskContext, kind: str, name: str, details: Any, timeout: float, enforcer: Any = None
    ) -> Optional[Approval]:
        """Return the approval. None if a policy does not ask for it any more, or a person has allowed it before.

        :param enforcer: the policy that asks for it; None if the handler does.
        :raises ApprovalDenied, ApprovalExpired, TaskCancelled, PolicyViolationError, TaskError: it is not approved.
        """

    async def ask_async(self, context: TaskContext, kind: str, name: str, details: Any, timeout: float) -> Approval:
        """Do the same without blocking the loop. A handler asks for it, so that there is always an answer."""


class Asked:
    """Remember what was asked for a task in this run: how often, and what a person has allowed before the handler.

    ``counts``: the number of the last request of each digest. ``granted``: kind, name and policy hash of each approval
    that a policy wanted before the handler begins. A granted tool is used up by the handler's first use of it.
    """

    __slots__ = ("counts", "granted")

    def __init__(self) -> None:
        self.counts: Dict[str, int] = {}
        self.granted: Set[Tuple[str, str, Optional[str]]] = set()

    def use_up(self, name: str) -> bool:
        """Use the approval of the task's own tool. Return False if there is none."""
        found = next((one for one in self.granted if one[:2] == ("tool", name)), None)
        if found is not None:
            self.granted.discard(found)
        return found is not None


class TaskControl:
    """Hold the part of a task's context that changes, for the code that runs the task.

    ``attempt``, ``end`` (on the clock of ``time.monotonic()``, None without a limit), ``policy``, ``resources`` (the
    open ones, None unless a handler that can have some runs) and ``owner`` (the Worker, for its ids in the log; in
    another process a mapping of these ids), ``asker`` (asks a person while the handler runs, None before and after) and
    ``asked`` (None until something was asked) may be assigned. So may ``is_pushed`` (the platform does not know the
    task) and ``is_withdrawn``, by the code that has kept the handler from beginning. The reason of a cancellation is
    set by :meth:`cancel` alone, ``is_wanted_back`` by :meth:`withdraw`, and ``is_called_off`` by :meth:`call_off`.
    """

    __slots__ = (
        "_event",
        "_progress",
        "_reason",
        "_waiters",
        "_watcher",
        "_withdrawer",
        "asked",
        "asker",
        "attempt",
        "end",
        "is_called_off",
        "is_pushed",
        "is_wanted_back",
        "is_withdrawn",
        "owner",
        "policy",
        "resources",
        "task",
    )

    def __init__(self, task: Task, end: Optional[float] = None, *, progress: Optional[ProgressSink] = None) -> None:
        self.task = task
        self.attempt = task.attempt
        self.end = end
        self.policy: Any = None
        self.owner: Any = None
        self.resources: Any = None
        self.asker: Optional[Asker] = None
        self.asked: Optional[Asked] = None
        self._progress = progress
        self._reason: Optional[str] = None
        self._event: Optional[threading.Event] = None
        self._watcher: Optional[Callable[[bool], None]] = None
        self._waiters: Tuple[Callable[[], None], ...] = ()
        self._withdrawer: Optional[Callable[[], None]] = None
        self.is_called_off = self.is_pushed = self.is_wanted_back = self.is_withdrawn = False

    def reason(self) -> Optional[str]:
        """Return why the task was cancelled, None if it was not."""
        return self._reason

    def ask_policy(self) -> Any:
        """Return the enforcer that the handler may ask, None without one."""
        return self.policy

    def cancel(self, reason: str, answered: bool = False) -> bool:
        """Cancel the task with ``reason``. Return True if it was not cancelled before.

        :param answered: the task has its answer already, so that the handler's result is of no use.
        """
        with _event_lock:
            is_first = self._reason is None
            if is_first:
                self._reason = reason
            event, watcher, waiters = self._event, self._watcher, self._waiters
        if is_first and event is not None:
            event.set()
        for wake in waiters:
            wake()
        if watcher is not None:
            watcher(answered)
        return is_first

    def call_off(self, reason: str) -> bool:
        """Cancel this task alone, because its requester wants it. Return True if it was not cancelled before."""
        self.is_called_off = True
        return self.cancel(reason)

    def withdraw(self) -> None:
        """Ask for the task back, if its handler waits to begin in another process. One that has begun goes on."""
        with _event_lock:
            self.is_wanted_back = True
            withdrawer = self._withdrawer
        if withdrawer is not None:
            withdrawer()

    def watch(self, watcher: Callable[[bool], None], on_withdraw: Optional[Callable[[], None]] = None) -> None:
        """Call ``watcher(answered)`` at every cancellation, and at once if the task is cancelled already.

        The watcher must be quick: it runs in the thread that cancels. So must ``on_withdraw``, which :meth:`withdraw`
        calls.
        """
        with _event_lock:
            self._watcher, self._withdrawer = watcher, on_withdraw
            is_late = self._reason is not None
        if is_late:
            watcher(False)

    def unwatch(self) -> None:
        """Forget the watcher. Another thread may be about to call it all the same."""
        with _event_lock:
            self._watcher = None

    def add_waiter(self, wake: Callable[[], None]) -> None:
        """Call ``wake()`` at every cancellation, and at once if the task is cancelled already. It must be quick."""
        with _event_lock:
            self._waiters += (wake,)
            is_late = self._reason is not None
        if is_late:
            wake()

    def remove_waiter(self, wake: Callable[[], None]) -> None:
        """Undo :meth:`add_waiter`. Another thread may be about to call it all the same."""
        with _event_lock:
            self._waiters = tuple(one for one in self._waiters if one != wake)

    def attach_loop(self, loop: AbstractEventLoop, cancel: Callable[[], object]) -> None:
        """Have ``loop`` call ``cancel()``, once, when the task is cancelled. The loop's thread calls this.

        :meth:`detach_loop` ends it.
        """
        is_done = False

        def wake(answered: bool) -> None:
            try:
                loop.call_soon_threadsafe(note)
            except RuntimeError:
                # The loop was closed just now: the handler has ended.
                return

        def note() -> None:
            nonlocal is_done
            if not is_done:
                is_done = True
                cancel()

        self.watch(wake)

    def detach_loop(self) -> None:
        """Undo :meth:`attach_loop`. The loop's thread calls this."""
        self.unwatch()

    def wait(self, timeout: Optional[float]) -> bool:
        """Wait up to ``timeout`` seconds for a cancellation. Return True if the task is cancelled."""
        event = self._event
        if event is None:
            with _event_lock:
                event = self._event
                if event is None:
                    event = self._event = threading.Event()
                    if self._reason is not None:
                        event.set()
        return event.wait(timeout)

    def report(self, context: TaskContext, fraction: float, message: Optional[str]) -> None:
        """Pass a report of progress on, if somebody listens."""
        if self._progress is not None:
            self._progress(context, fraction, message)


class TaskContext:
    """Show a handler its task. The worker passes one to the handler, before the input.

    >>> from sekuire import TaskContext, TaskRegistry
    >>> tasks = TaskRegistry()
    >>> @tasks.task("count")
    ... def count(ctx: TaskContext, input: dict) -> int:
    ...     ctx.raise_if_cancelled()
    ...     ctx.logger.info("%s seconds left", ctx.remaining())
    ...     return len(input["text"].split())

    Any thread of the handler may use it.
    """

    __slots__ = ("__weakref__", "_control", "_logger")

    def __init__(
        self, task: Task, *, deadline: Optional[float] = None, progress: Optional[ProgressSink] = None
    ) -> None:
        self._control = TaskControl(task, deadline, progress=progress)
        self._logger: Optional[logging.LoggerAdapter[logging.Logger]] = None

    # -- identity --

    @property
    def task_id(self) -> str:
        """Return the task's id."""
        return self._control.task.task_id

    @property
    def capability(self) -> str:
        """Return the capability that was asked for."""
        return self._control.task.capability

    @property
    def tool(self) -> Optional[str]:
        """Return the tool that the task names, None without one."""
        return self._control.task.tool

    @property
    def workspace_id(self) -> Optional[str]:
        """Return the workspace that the task belongs to."""
        return self._control.task.workspace_id

    @property
    def requester_id(self) -> Optional[str]:
        """Return the agent that submitted the task."""
        return self._control.task.requester_id

    @property
    def parent_task_id(self) -> Optional[str]:
        """Return the task that this one was submitted by."""
        return self._control.task.parent_task_id

    @property
    def workflow_id(self) -> Optional[str]:
        """Return the workflow that the task is a step of."""
        return self._control.task.workflow_id

    @property
    def trace_id(self) -> Optional[str]:
        """Return the trace that the requester continues here."""
        return self._control.task.trace_id

    @property
    def attempt(self) -> int:
        """Return the number of this attempt, from 1. It can rise while the handler runs (protocol.md, "Tasks")."""
        return self._control.attempt

    # -- time --

    @property
    def deadline(self) -> Optional[dt.datetime]:
        """Return when the task's time ends, as an aware UTC datetime; None without a limit."""
        left = self.remaining()
        if left is None:
            return None
        # By the clock that the handler sees: a test may have frozen it.
        return dt.datetime.now(dt.timezone.utc) + dt.timedelta(seconds=left)

    def remaining(self) -> Optional[float]:
        """Return the seconds left, 0.0 when the time has passed, None without a limit."""
        end = self._control.end
        return None if end is None else max(0.0, end - time.monotonic())

    # -- cancellation --

    def is_cancelled(self) -> bool:
        """Return True if the task was cancelled: the handler should end."""
        return self._control.reason() is not None

    @property
    def cancel_reason(self) -> Optional[str]:
        """Return why the task was cancelled, None while it is not.

        The reason is ``"timeout"``, ``"terminated"``, ``"shutdown"``, ``"lease lost"``, ``"superseded"`` (the platform
        has the task's result already) or ``"the program ends"``. If the task itself was cancelled, it is the reason
        that was given, or ``"cancelled"``. The coroutine of an async handler is cancelled too.
        """
        return self._control.reason()

    def raise_if_cancelled(self) -> None:
        """Raise an error if the task was cancelled.

        :raises TaskCancelled: the task was cancelled. A handler that does not catch it ends its task ``cancelled``,
            after a termination ``worker_terminated``, and at the program's end ``worker_shutdown``.
        """
        reason = self._control.reason()
        if reason is not None:
            raise TaskCancelled(reason)

    def wait_cancelled(self, timeout: Optional[float] = None) -> bool:
        """Sleep up to ``timeout`` seconds, less if the task is cancelled. Return True if it is."""
        return self._control.wait(timeout)

    # -- what is allowed --

    @property
    def policy(self) -> Any:
        """Return the :class:`~sekuire.PolicyEnforcer` that let this task begin; None without a policy gateway.

        Ask it questions such as ``ctx.policy.enforce_tool("search")``. It stays the same while the handler runs, also
        when the workspace's policy changes.
        """
        return self._control.ask_policy()

    def require_approval(self, name: str, details: Any = None, *, timeout: float = APPROVAL_TIME) -> Approval:
        """Ask a person, and wait for the decision. Return it if it is an approval. ::

            decision = ctx.require_approval("refund", {"order": input["order"], "amount": input["amount"]})
            ctx.logger.info("approved by %s: %s", decision.decided_by, decision.reason)

        Whatever goes wrong counts as denied. The task's own time goes on. After a restart of the worker, the handler
        finds the decision for the same name and details again. A second call with the same ones asks a second time.

        :param name: what is to be done, for the person who decides.
        :param details: JSON of at most 64 KiB, shown to that person. Secrets of this process are replaced by ``***``.
        :param timeout: seconds to wait, at most. The time left of the task limits them too.
        :raises ApprovalDenied: the person said no, or nobody can be asked.
        :raises ApprovalExpired: nobody has decided in time.
        :raises TaskCancelled: the task was cancelled while it waited.
        :raises TaskError: the worker stops (``worker_shutdown``).
        :raises ValueError: ``name`` is not a text, or ``timeout`` not a number above 0.
        """
        decision = self._asker("action", name, timeout).ask(self, "action", name, details, timeout)
        assert decision is not None
        return decision

    async def require_approval_async(
        self, name: str, details: Any = None, *, timeout: float = APPROVAL_TIME
    ) -> Approval:
        """Do the same as :meth:`require_approval` in an async handler: others of its coroutines go on. ::

            await ctx.require_approval_async("refund", {"amount": 500})

        It raises what :meth:`require_approval` raises.
        """
        asker = self._asker("action", name, timeout)
        return await asker.ask_async(self, "action", name, details, timeout)

    def _asker(self, kind: str, name: str, timeout: float) -> Asker:
        """Return what asks for this task, once the arguments are found good."""
        if not isinstance(name, str) or not name:
            raise ValueError(f"name must be a str that is not empty, got {name!r}")
        if not is_number(timeout) or not timeout > 0:
            raise ValueError(f"timeout must be a number of seconds above 0, got {timeout!r}")
        asker = self._control.asker
        if asker is None:
            raise ApprovalDenied("nobody can be asked: no handler of this task runs", {"kind": kind, "name": name})
        return asker

    # -- resources --

    def resource(self, name: str) -> Any:
        """Return the value of a resource: ``ctx.resource("db")``. One of the task's own is opened if it is not open.

        A handler may also receive it as a keyword-only parameter, ``def book(ctx, input, *, db)``. The worker checks
        that when it starts.

        :raises ConfigurationError: there is no such resource, or the handler does not run.
        """
        resources = self._control.resources
        if resources is None:
            raise ConfigurationError(
                "no resource is declared, or no handler runs; declare it with @worker.resource, ask in the handler",
                f"resource({name!r})",
            )
        return resources.get(name)

    # -- reports --

    def report_progress(self, fraction: float, message: Optional[str] = None) -> None:
        """Report to the platform how far the task is. It never blocks.

        The newest value is sent, at most once a second. A report may be lost.

        :param fraction: 0 to 1.
        :raises ValueError: ``fraction`` is not a number from 0 to 1, or ``message`` is not a str.
        """
        if not is_number(fraction) or not 0 <= fraction <= 1:
            raise ValueError(f"fraction must be a number from 0 to 1, got {fraction!r}")
        if message is not None and not isinstance(message, str):
            raise ValueError(f"message must be a str, got {type(message).__name__}")
        self._control.report(self, float(fraction), message)

    @property
    def logger(self) -> logging.LoggerAdapter[logging.Logger]:
        """Return a logger (``sekuire.task``) whose records begin with the task's id and carry it as ``task_id``.

        It belongs to the handler: what a filter or handler of the program raises in a call of it reaches the handler,
        as with any other logger.
        """
        if self._logger is None:
            self._logger = _TaskLogger(_log, {"task_id": self.task_id, "capability": self.capability})
        return self._logger

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.task_id} {self.capability} attempt {self.attempt}>"


def control_of(context: TaskContext) -> TaskControl:
    """Return the control of ``context``, for the code that runs its task."""
    return context._control


class _TaskLogger(logging.LoggerAdapter):  # type: ignore[type-arg]  # Not subscriptable at run time before 3.11.
    """Log with the task's id before the message, and as an attribute of the record.

    The attributes are set on the finished record. As ``extra`` they would collide with those that a record factory of
    the program sets under the same names.
    """

    def log(
        self,
        level: int,
        msg: object,
        *args: object,
        exc_info: Any = None,
        stack_info: bool = False,
        stacklevel: int = 1,
        extra: Optional[Mapping[str, object]] = None,
        **kwargs: object,
    ) -> None:
        whose = audience(self.logger, level)
        if whose is not PERSON and not self.isEnabledFor(level):
            return
        own = self.extra or {}
        prefix = f"[{own.get('task_id', '?')}] "
        if args:
            # The arguments are formatted into the whole text, and an id may hold any character.
            prefix = prefix.replace("%", "%%")
        frame = _caller(stacklevel)
        record = make_record(
            self.logger, level, f"{prefix}{msg}", args, frame,
            exc_info=exc_info, extra=extra, stack_info=_stack_of(frame) if stack_info else None,
        )  # fmt: skip
        for name, value in own.items():
            if extra is None or name not in extra:
                setattr(record, name, value)
        if whose is PERSON:
            print_record(self.logger, record)
        else:
            self.logger.handle(record)


_LOGGING_FILE = logging.info.__code__.co_filename


def _caller(stacklevel: int) -> FrameType:
    """Return the frame that called the logger, or one further out for a ``stacklevel`` above 1."""
    frame = sys._getframe(2)
    while frame.f_back is not None and (frame.f_code.co_filename == _LOGGING_FILE or stacklevel > 1):
        stacklevel -= frame.f_code.co_filename != _LOGGING_FILE
        frame = frame.f_back
    return frame


def _stack_of(frame: FrameType) -> str:
    return "Stack (most recent call last):\n" + "".join(traceback.format_stack(frame)).rstrip("\n")


#: The task of the current thread, from before its policy is asked until its handler has ended.
current_task: contextvars.ContextVar[Optional[TaskContext]] = contextvars.ContextVar("sekuire_task", default=None)
