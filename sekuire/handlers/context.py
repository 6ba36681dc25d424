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
import time
import traceback
from types import FrameType
from typing import Any, Callable, Mapping, Optional

from .._internal.checks import is_number
from .._internal.logs import make_record
from ..errors import TaskCancelled
from ..wire.models import Task

__all__ = ["TaskContext", "TaskControl", "control_of"]

_log = logging.getLogger("sekuire.task")
# One lock for all tasks: it is held for a few instructions, and only by handlers that wait and by cancellations.
_event_lock = threading.Lock()

ProgressSink = Callable[["TaskContext", float, Optional[str]], None]


class TaskControl:
    """Hold the part of a task's context that changes, for the code that runs the task.

    ``attempt``, ``end`` (on the clock of ``time.monotonic()``, None without a limit) and ``policy`` may be assigned.
    The reason of a cancellation is set by :meth:`cancel` alone.
    """

    __slots__ = ("_event", "_progress", "_reason", "_watcher", "attempt", "end", "policy", "task")

    def __init__(self, task: Task, end: Optional[float] = None, *, progress: Optional[ProgressSink] = None) -> None:
        self.task = task
        self.attempt = task.attempt
        self.end = end
        self.policy: Any = None
        self._progress = progress
        self._reason: Optional[str] = None
        self._event: Optional[threading.Event] = None
        self._watcher: Optional[Callable[[bool], None]] = None

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
            event, watcher = self._event, self._watcher
        if is_first and event is not None:
            event.set()
        if watcher is not None:
            watcher(answered)
        return is_first

    def watch(self, watcher: Callable[[bool], None]) -> None:
        """Call ``watcher(answered)`` at every cancellation, and at once if the task is cancelled already.

        The watcher must be quick: it runs in the thread that cancels.
        """
        with _event_lock:
            self._watcher = watcher
            is_late = self._reason is not None
        if is_late:
            watcher(False)

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
        has the task's result already) or ``"the program ends"``.
        """
        return self._control.reason()

    def raise_if_cancelled(self) -> None:
        """Raise an error if the task was cancelled.

        :raises TaskCancelled: the task was cancelled. A handler that does not catch it ends its task ``cancelled``.
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
        if not self.isEnabledFor(level):
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
