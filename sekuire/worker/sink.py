"""Say where the result of a task goes: each record has the sink of whoever gave the task."""

from __future__ import annotations

from typing import Any, Callable, Optional, Protocol

from ..errors import SekuireError
from ..handlers.context import TaskContext
from ..wire.models import Completion
from .release import Release


class Accepted(Protocol):
    """Describe a result that a sink has accepted and not sent yet."""

    @property
    def code(self) -> Optional[str]:
        """Return the code of the failure that the requester gets, None for an output."""


class ResultSink(Protocol):
    """Accept results and deliver them.

    :class:`sekuire.worker.report.Reporter` is the one of the platform's tasks, and documents each method.
    :class:`SingleResult` is that of one task which somebody else gave. ``can_release`` is None until the platform has
    answered a first release.
    """

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


class PlatformSink(ResultSink, Protocol):
    """Accept the results of the platform's tasks.

    ``on_room`` is called, without a lock, when ``has_room()`` has been False and is True again.
    """

    on_room: Callable[[], None]


class NotReadyError(SekuireError):
    """Report a worker that accepts no pushed task now."""


class SingleResult:
    """Accept the one result of one task that is not the platform's. It has room, and sends nothing.

    A subclass says what :meth:`accept`, :meth:`release` and :meth:`progress` do.
    """

    #: What has no room in the worker is given back at once: nobody may wait for room with a request in hand.
    can_release: Optional[bool] = True

    def accept(self, completion: Completion) -> Optional[Accepted]:
        """Make a completion the result of the task. Return None if it has one already."""
        raise NotImplementedError

    def release(self, release: Release, delay: float = 0.0) -> None:
        """Give the task, which was not begun, back to whoever gave it."""
        raise NotImplementedError

    def progress(self, context: TaskContext, fraction: float, message: Optional[str]) -> None:
        """Note the progress of the task. Never blocks."""
        raise NotImplementedError

    def post(self, report: Any) -> None: ...

    def keep(self, report: Any) -> None: ...

    def enqueue(self, report: Any) -> None: ...

    def redelivered(self, task_id: str, attempt: int) -> bool:
        return False

    def has_room(self) -> bool:
        return True

    def has_room_for_release(self) -> bool:
        return True
