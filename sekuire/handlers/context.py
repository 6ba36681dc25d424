"""What a handler knows of its task: identity, time left, cancellation, progress, a logger."""

from __future__ import annotations

import contextvars
import datetime as dt
import logging
import math
import sys
import threading
import time
import traceback
from types import FrameType
from typing import Any, Callable, Mapping, Optional

from .._internal.logs import make_record
from ..errors import TaskCancelled
from ..wire.models import Task

__all__ = ["TaskContext"]

_log = logging.getLogger("sekuire.task")
# Events are made only for handlers that wait; one lock for all of them is never contended enough to matter.
_event_lock = threading.Lock()

ProgressSink = Callable[["TaskContext", float, Optional[str]], None]


class TaskContext:
    """Given to a handler with its task's input.

    The handler's thread (and any it starts) reads it; the library's threads call ``_cancel``. The reason is written
    once, before the flag that readers look at, so no lock is needed to read; ``_event_lock`` guards the making of the
    event that :meth:`wait_cancelled` waits on.
    """

    __slots__ = (
        "__weakref__",
        "_attempt",
        "_deadline",
        "_event",
        "_logger",
        "_policy",
        "_progress",
        "_reason",
        "_task",
        "_watcher",
    )

    def __init__(
        self, task: Task, *, deadline: Optional[float] = None, progress: Optional[ProgressSink] = None
    ) -> None:
        self._task = task
        self._attempt = task.attempt
        self._deadline = deadline
        self._progress = progress
        self._policy: Any = None
        self._reason: Optional[str] = None
        self._event: Optional[threading.Event] = None
        self._logger: Optional[logging.LoggerAdapter[logging.Logger]] = None
        self._watcher: Optional[Callable[[bool], None]] = None

    # -- identity --

    @property
    def task_id(self) -> str:
        return self._task.task_id

    @property
    def capability(self) -> str:
        return self._task.capability

    @property
    def tool(self) -> Optional[str]:
        return self._task.tool

    @property
    def workspace_id(self) -> Optional[str]:
        return self._task.workspace_id

    @property
    def requester_id(self) -> Optional[str]:
        return self._task.requester_id

    @property
    def parent_task_id(self) -> Optional[str]:
        return self._task.parent_task_id

    @property
    def workflow_id(self) -> Optional[str]:
        return self._task.workflow_id

    @property
    def trace_id(self) -> Optional[str]:
        return self._task.trace_id

    @property
    def attempt(self) -> int:
        """Which attempt this is, from 1. It can rise while the handler runs (protocol.md, "Tasks")."""
        return self._attempt

    # -- time --

    @property
    def deadline(self) -> Optional[dt.datetime]:
        """When the task's time ends, as an aware UTC datetime; None without a limit."""
        left = self.remaining()
        if left is None:
            return None
        return dt.datetime.now(dt.timezone.utc) + dt.timedelta(seconds=left)

    def remaining(self) -> Optional[float]:
        """Seconds left, 0.0 when the time has passed, None without a limit."""
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    # -- cancellation --

    def is_cancelled(self) -> bool:
        return self._reason is not None

    @property
    def cancel_reason(self) -> Optional[str]:
        """Why: ``"timeout"``, ``"terminated"``, ``"shutdown"``, ``"lease lost"``, ``"superseded"`` (the platform told
        that it has the task's result already) or ``"the program ends"``; None while it is not."""
        return self._reason

    def raise_if_cancelled(self) -> None:
        """:raises TaskCancelled: the task was cancelled. A handler that lets it pass ends its task ``cancelled``."""
        if self._reason is not None:
            raise TaskCancelled(self._reason)

    def wait_cancelled(self, timeout: Optional[float] = None) -> bool:
        """Wait up to ``timeout`` seconds for a cancellation: a sleep that ends when the task should."""
        event = self._event
        if event is None:
            with _event_lock:
                event = self._event
                if event is None:
                    event = self._event = threading.Event()
                    if self._reason is not None:
                        event.set()
        return event.wait(timeout)

    def _cancel(self, reason: str, answered: bool = False) -> bool:
        """Cancel with ``reason``; whether this call was the first.

        :param answered: the task has its answer already; what its handler still does is of no use.
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

    def _watch(self, watcher: Callable[[bool], None]) -> None:
        """Have ``watcher(answered)`` called, quick as it is, with every cancellation, one that came before included."""
        with _event_lock:
            self._watcher = watcher
            is_late = self._reason is not None
        if is_late:
            watcher(False)

    # -- what is allowed --

    @property
    def policy(self) -> Any:
        """The :class:`~sekuire.PolicyEnforcer` that let this task begin, for questions such as
        ``ctx.policy.enforce_tool("search")``; None where no policy gateway was asked.

        It stays the same while the handler runs, also when the workspace's policy changes meanwhile.
        """
        return self._policy

    # -- telling --

    def report_progress(self, fraction: float, message: Optional[str] = None) -> None:
        """Tell the platform how far the task is, best effort: the newest value, at most once a second. Never blocks.

        :param fraction: 0 to 1.
        :raises ValueError: ``fraction`` is no number from 0 to 1, or ``message`` no str.
        """
        if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not math.isfinite(fraction):
            raise ValueError(f"fraction must be a number from 0 to 1, got {fraction!r}")
        if not 0 <= fraction <= 1:
            raise ValueError(f"fraction must be a number from 0 to 1, got {fraction!r}")
        if message is not None and not isinstance(message, str):
            raise ValueError(f"message must be a str, got {type(message).__name__}")
        if self._progress is not None:
            self._progress(self, float(fraction), message)

    @property
    def logger(self) -> logging.LoggerAdapter[logging.Logger]:
        """A logger (``sekuire.task``) whose records begin with the task's id and carry it as ``task_id``.

        It belongs to the handler: what a filter or handler of the program raises in a call of it reaches the handler,
        as with any other logger.
        """
        if self._logger is None:
            self._logger = _TaskLogger(_log, {"task_id": self.task_id, "capability": self.capability})
        return self._logger

    def __repr__(self) -> str:
        return f"<TaskContext {self.task_id} {self.capability} attempt {self._attempt}>"


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
            # They are formatted into the whole text, and an id may hold any character.
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
    """Return the frame that called the logger; with a ``stacklevel`` above 1 as many frames further out."""
    frame = sys._getframe(2)
    while frame.f_back is not None and (frame.f_code.co_filename == _LOGGING_FILE or stacklevel > 1):
        stacklevel -= frame.f_code.co_filename != _LOGGING_FILE
        frame = frame.f_back
    return frame


def _stack_of(frame: FrameType) -> str:
    return "Stack (most recent call last):\n" + "".join(traceback.format_stack(frame)).rstrip("\n")


#: The task that this thread is with: from before its policy is asked until its handler has ended.
current_task: contextvars.ContextVar[Optional[TaskContext]] = contextvars.ContextVar("sekuire_task", default=None)
