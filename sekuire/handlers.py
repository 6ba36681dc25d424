"""Handlers by capability, and what their return or exception means as a task's result."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import logging
import math
import time
from collections import deque
from typing import Any, Callable, Deque, Dict, List, Optional

from . import protocol
from .config import check_capability
from .context import TaskContext
from .errors import (
    ConfigurationError,
    PolicyUnavailableError,
    PolicyViolationError,
    TaskCancelled,
    TaskError,
)
from .models import Completion, Failure

log = logging.getLogger("sekuire.task")

Handler = Callable[[TaskContext, Any], Any]

CATCH_ALL = "*"
#: Longest message of an unexpected exception on the wire, in characters.
MAX_MESSAGE = 1000


class HandlerEntry:
    """One registered handler. ``running`` and ``parked`` are the dispatcher's, under its lock."""

    __slots__ = ("function", "max_concurrency", "name", "parked", "running", "timeout", "where")

    def __init__(
        self, name: str, function: Handler, timeout: Optional[float], max_concurrency: Optional[int], where: str
    ) -> None:
        self.name = name
        self.function = function
        self.timeout = timeout
        self.max_concurrency = max_concurrency
        self.where = where
        self.running = 0
        self.parked: Deque[Any] = deque()

    def has_room(self) -> bool:
        return self.max_concurrency is None or self.running < self.max_concurrency


class Registry:
    """Handlers by capability. Filled by the user's thread before the start, only read after :meth:`freeze`."""

    def __init__(self) -> None:
        self._entries: Dict[str, HandlerEntry] = {}
        self._catch_all: Optional[HandlerEntry] = None
        self._frozen = False

    def add(
        self,
        name: str,
        function: Handler,
        timeout: Optional[float] = None,
        max_concurrency: Optional[int] = None,
    ) -> None:
        """Register ``function`` for the capability ``name``, or for all without a handler of their own (``"*"``).

        :raises ConfigurationError: a wrong argument, a name taken, or a worker that has started.
        """
        option = f"on_task({name!r})"
        if self._frozen:
            raise ConfigurationError("the worker has started; register every handler before start()", option)
        if name != CATCH_ALL:
            check_capability(name, "on_task")
        entry = HandlerEntry(name, function, timeout, max_concurrency, _where(function))
        _check(option, function, timeout, max_concurrency)
        taken = self._catch_all if name == CATCH_ALL else self._entries.get(name)
        if taken is not None:
            raise ConfigurationError(f"is taken by {taken.where}; cannot give it to {entry.where} too", option)
        if name == CATCH_ALL:
            self._catch_all = entry
        else:
            self._entries[name] = entry

    def freeze(self) -> None:
        self._frozen = True

    def find(self, capability: str) -> Optional[HandlerEntry]:
        return self._entries.get(capability, self._catch_all)

    @property
    def names(self) -> List[str]:
        return list(self._entries)

    @property
    def has_catch_all(self) -> bool:
        return self._catch_all is not None

    def is_empty(self) -> bool:
        return not self._entries and self._catch_all is None


def _check(option: str, function: Any, timeout: Any, max_concurrency: Any) -> None:
    if not callable(function):
        raise ConfigurationError(f"the handler must be callable, got {type(function).__name__}", option)
    try:
        inspect.signature(function).bind(None, None)
    except TypeError:
        fits = False
    except ValueError:
        fits = True  # A builtin without a signature: nothing to check.
    else:
        fits = True
    if not fits:
        raise ConfigurationError(f"{_where(function)} must accept two arguments: handler(ctx, input)", option)
    if timeout is not None and (
        isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not 0 < timeout < math.inf
    ):
        raise ConfigurationError(f"timeout must be a number of seconds above 0, got {timeout!r}", option)
    if max_concurrency is not None and (
        isinstance(max_concurrency, bool) or not isinstance(max_concurrency, int) or max_concurrency < 1
    ):
        raise ConfigurationError(f"max_concurrency must be a whole number, 1 or more, got {max_concurrency!r}", option)


def _where(function: Any) -> str:
    """Where ``function`` was written, for an error's text."""
    name = getattr(function, "__qualname__", None) or repr(function)
    code = getattr(inspect.unwrap(function) if callable(function) else function, "__code__", None)
    return f"{name} ({code.co_filename}:{code.co_firstlineno})" if code is not None else name


def run(
    entry: HandlerEntry, context: TaskContext, input: Any, *, expose_errors: bool, scrub: Callable[[str], str]
) -> Completion:
    """Call the handler and say what came of it; nothing that it raises gets out, not even ``SystemExit``.

    :param scrub: takes secrets out of a text that goes to the platform.
    """
    started = time.monotonic()
    output: Any = None
    failure: Optional[Failure] = None
    try:
        # A context of its own: a variable set by one task must not be there for the next one of this thread.
        output = contextvars.copy_context().run(_call, entry.function, context, input)
    except BaseException as error:  # noqa: BLE001
        failure = failure_of(error, context, expose_errors, scrub)
    return Completion(
        task_id=context.task_id,
        attempt=context.attempt,
        output=output,
        failure=failure,
        execution_time_ms=int((time.monotonic() - started) * 1000),
    )


def _call(function: Handler, context: TaskContext, input: Any) -> Any:
    result = function(context, input)
    if inspect.iscoroutine(result):
        return asyncio.run(result)
    return result


def failure_of(error: BaseException, context: TaskContext, expose_errors: bool, scrub: Callable[[str], str]) -> Failure:
    """What an exception of a handler, or of the policy gate before it, means to the requester."""
    if isinstance(error, TaskError) and isinstance(error.code, str) and error.code:
        return Failure(
            code=error.code,
            message=scrub(_text(error.message)),
            retryable=error.retryable is True,
            details=error.details,
        )
    if isinstance(error, TaskCancelled):
        return protocol.failure("cancelled", scrub(_text(error)))
    if isinstance(error, PolicyViolationError):
        limited = error.rule.startswith("rate_limit.")
        details: Dict[str, Any] = {"rule": error.rule}
        if error.retry_after is not None:
            details["retry_after"] = error.retry_after
        return protocol.failure("rate_limited" if limited else "policy_denied", _text(error), details)
    if isinstance(error, PolicyUnavailableError):
        return protocol.failure("policy_unavailable", _text(error))
    log.error(
        "[%s] the handler of %r raised", context.task_id, context.capability,
        exc_info=error, extra={"task_id": context.task_id, "capability": context.capability},
    )  # fmt: skip
    kind = type(error).__name__
    return protocol.failure("handler_error", scrub(f"{kind}: {_text(error)}")[:MAX_MESSAGE] if expose_errors else kind)


def _text(value: object) -> str:
    try:
        text = str(value)
    except BaseException:  # noqa: BLE001
        return "(its text cannot be made)"
    # The message must not spoil its own JSON.
    return text.encode("utf-8", "replace").decode()[: 10 * MAX_MESSAGE]
