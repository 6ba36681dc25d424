"""Run a handler, and translate what it returns or raises into the task's result."""

from __future__ import annotations

import contextvars
import time
from typing import Any, Callable, Dict, Optional

from .._internal.logs import get_logger
from ..errors import PolicyUnavailableError, PolicyViolationError, TaskCancelled, TaskError
from ..wire import protocol
from ..wire.models import Completion, Failure
from .context import TaskContext
from .invoke import call
from .registry import HandlerEntry

log = get_logger("sekuire.task")

#: Longest message of an unexpected exception on the wire, in characters.
MAX_MESSAGE = 1000


def run(
    entry: HandlerEntry,
    context: TaskContext,
    input: Any,
    *,
    began: float,
    expose_errors: bool,
    scrub: Callable[[str], str],
) -> Completion:
    """Call the handler and return the task's completion. Raise nothing, not even ``SystemExit``.

    :param began: when the task's time began (``time.monotonic()``).
    :param scrub: removes secrets from a text that goes to the platform.
    """
    output: Any = None
    failure: Optional[Failure] = None
    # Each task has a context of its own: the thread's next task must not see a variable that this one sets.
    space = contextvars.copy_context()
    try:
        output = space.run(call, entry.call, context, input)
    except BaseException as error:  # noqa: BLE001
        # The failure is logged in the same context: filters and error trackers read the handler's variables.
        failure = space.run(failure_of, error, context, expose_errors, scrub)
    return Completion(
        task_id=context.task_id,
        attempt=context.attempt,
        output=output,
        failure=failure,
        execution_time_ms=int((time.monotonic() - began) * 1000),
    )


def failure_of(error: BaseException, context: TaskContext, expose_errors: bool, scrub: Callable[[str], str]) -> Failure:
    """Return the failure for an exception of a handler, or of the policy check before it."""
    if isinstance(error, TaskError) and isinstance(error.code, str) and error.code:
        return Failure(
            code=error.code,
            message=_text(error.message, scrub),
            retryable=error.retryable is True,
            details=error.details,
        )
    if isinstance(error, TaskCancelled):
        return protocol.failure("cancelled", _text(error, scrub))
    if isinstance(error, PolicyViolationError):
        limited = error.rule.startswith("rate_limit.")
        details: Dict[str, Any] = {"rule": error.rule}
        if error.retry_after is not None:
            details["retry_after"] = error.retry_after
        if error.rule == protocol.RULE_UNAVAILABLE:
            return protocol.failure("policy_unavailable", _text(error, scrub), details)
        return protocol.failure("rate_limited" if limited else "policy_denied", _text(error, scrub), details)
    if isinstance(error, PolicyUnavailableError):
        return protocol.failure("policy_unavailable", _text(error, scrub))
    log.error(
        "[%s] the handler of %r raised", context.task_id, context.capability,
        exc_info=error, extra={"task_id": context.task_id, "capability": context.capability},
    )  # fmt: skip
    kind = type(error).__name__
    message = f"{kind}: {_text(error, scrub)}"[:MAX_MESSAGE] if expose_errors else kind
    return protocol.failure("handler_error", message)


def _text(value: object, scrub: Callable[[str], str] = str) -> str:
    try:
        text = str(value)
    except BaseException:  # noqa: BLE001
        return "(its text cannot be made)"
    # Lone surrogates have no JSON. The text is scrubbed before it is cut: half a token would not be recognised.
    return scrub(text.encode("utf-8", "replace").decode())[: 10 * MAX_MESSAGE]
