"""Run a handler, and translate what it returns or raises into the task's result."""

from __future__ import annotations

import contextvars
import os
from types import TracebackType
from typing import Any, Dict, Iterator, List, Mapping, Optional, Set, cast

from .._internal import instrumentation
from .._internal.clock import time
from .._internal.logs import get_logger
from .._internal.scrub import scrub, scrub_json
from .._internal.threads import is_leaving
from ..errors import PolicyUnavailableError, PolicyViolationError, TaskCancelled, TaskError
from ..wire import protocol
from ..wire.models import Completion, Failure
from .context import PROGRAM_ENDS, SHUTDOWN, TERMINATED, TaskContext
from .invoke import call
from .registry import HandlerEntry

log = get_logger("sekuire.task")

#: Where the library's own frames are.
_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
#: Longest message of an unexpected exception on the wire, in characters.
MAX_MESSAGE = 1000
#: What Python's own RuntimeErrors say once the program ends, or has ended the executor that it shares with handlers.
_ENDINGS = ("cannot schedule new futures after", "interpreter shutdown", "register atexit after shutdown")
#: Errors within an error that are looked at.
_MOST_LINKS = 100
#: The answer to TaskCancelled, if it is not "cancelled", by the reason of the cancellation.
_CODE_FOR = {TERMINATED: "worker_terminated", SHUTDOWN: "worker_shutdown", PROGRAM_ENDS: "worker_shutdown"}


def run(
    entry: HandlerEntry,
    context: TaskContext,
    input: Any,
    *,
    began: float,
    expose_errors: bool,
) -> Completion:
    """Call the handler and return the task's completion. Raise nothing, not even ``SystemExit``.

    :param began: when the task's time began (``time.monotonic()``).
    """
    output: Any = None
    failure: Optional[Failure] = None
    # Each task has a context of its own: the thread's next task must not see a variable that this one sets.
    space = contextvars.copy_context()
    watching = instrumentation.current
    span = None if watching is None else watching.begin_task(space, context, entry.name)
    try:
        output = space.run(call, entry.call, context, input)
    except BaseException as error:  # noqa: BLE001
        if span is not None:
            span.note_error(error)
        # The failure is logged in the same context: filters and error trackers read the handler's variables.
        failure = space.run(failure_of, error, context, expose_errors)
    if span is not None:
        span.end(failure)
    return Completion(
        task_id=context.task_id,
        attempt=context.attempt,
        output=output,
        failure=failure,
        execution_time_ms=int((time.monotonic() - began) * 1000),
        capability=context.capability,
    )


def failure_of(error: BaseException, context: TaskContext, expose_errors: bool) -> Failure:
    """Return the failure for an exception of a handler, or of the policy check before it."""
    leaves = list(_leaves(error, set()))
    said = [leaf for leaf in leaves if _is_said(leaf)]
    if said:
        chosen = _first_of(said)
        failure = _failure_said(chosen, context)
        if len(leaves) > 1:
            others = ", ".join(type(leaf).__name__ for leaf in leaves if leaf is not chosen)
            log.warning(
                "[%s] %s failed %s: its handler raised several errors; this one counts, and not: %s",
                context.task_id, context.capability, failure.code, others,
                exc_info=error, extra={"task_id": context.task_id, "capability": context.capability},
            )  # fmt: skip
            return failure.as_logged()
        return failure
    if is_leaving() or any(map(_is_programs_end, leaves)):
        log.warning(
            "[%s] %s failed worker_shutdown: the program ends, and the handler with it (%s)",
            context.task_id, context.capability, type(leaves[0]).__name__,
            extra={"task_id": context.task_id, "capability": context.capability},
        )  # fmt: skip
        return protocol.failure("worker_shutdown", "the program ended before the task did").as_logged()
    kind = type(leaves[0]).__name__
    log.error(
        "[%s] %s failed handler_error: %s: %s",
        context.task_id, context.capability, kind, protocol.one_line(_text(leaves[0]))[:MAX_MESSAGE],
        exc_info=(type(error), error, _own_part(error.__traceback__)),
        extra={"task_id": context.task_id, "capability": context.capability},
    )  # fmt: skip
    if not expose_errors:
        return protocol.failure("handler_error", kind).as_logged()
    more = ", ".join(type(leaf).__name__ for leaf in leaves[1:])
    message = f"{kind}: {_text(leaves[0])}" + (f" (and {len(leaves) - 1} more: {more})" if more else "")
    return protocol.failure("handler_error", message[:MAX_MESSAGE]).as_logged()


def _own_part(traceback: Optional[TracebackType]) -> Optional[TracebackType]:
    """Return the part of a handler's traceback that begins with the user's own code."""
    while traceback is not None and traceback.tb_next is not None:
        if not traceback.tb_frame.f_code.co_filename.startswith(_PACKAGE):
            break
        traceback = traceback.tb_next
    return traceback


def unwrap(error: BaseException) -> BaseException:
    """Return the error inside ``error`` that :func:`failure_of` answers with; ``error`` itself if there is none."""
    said = [leaf for leaf in _leaves(error, set()) if _is_said(leaf)]
    return _first_of(said) if said else error


def _first_of(said: List[BaseException]) -> BaseException:
    """Return the error that decides: one that makes the task's failure final before others, then the first."""
    errors = [one for one in said if not isinstance(one, TaskCancelled)]
    final = [one for one in errors if isinstance(one, TaskError) and one.retryable is not True]
    return (final or errors or said)[0]


def _leaves(error: BaseException, seen: Set[int]) -> Iterator[BaseException]:
    """Yield the errors that ``error`` stands for.

    Those are the errors inside a group, without those of cancelled siblings. An error that the library does not know
    stands for the one from which it was raised, if that one says how to answer.
    """
    if id(error) in seen:
        return
    if len(seen) >= _MOST_LINKS:
        yield error
        return
    seen.add(id(error))
    if _is_group(error):
        inner = [leaf for one in error.exceptions for leaf in _leaves(one, seen)]  # type: ignore[attr-defined]
        own = [leaf for leaf in inner if type(leaf).__name__ != "CancelledError"]
        yield from own or inner or [error]
        return
    if error.__cause__ is not None and not _is_said(error):
        causes = [leaf for leaf in _leaves(error.__cause__, seen) if _is_said(leaf) or _is_programs_end(leaf)]
        if causes:
            yield from causes
            return
    yield error


def _is_group(error: BaseException) -> bool:
    # By name: before Python 3.11 the class comes from a package, and older versions of anyio have one of their own.
    names = {one.__name__ for one in type(error).__mro__}
    is_named = "BaseExceptionGroup" in names or "ExceptionGroup" in names
    return is_named and isinstance(getattr(error, "exceptions", None), (list, tuple))


def _is_said(error: BaseException) -> bool:
    """Return True if the error itself says how the task is answered."""
    if isinstance(error, TaskError):
        return isinstance(error.code, str) and bool(error.code)
    return isinstance(error, (TaskCancelled, PolicyViolationError, PolicyUnavailableError))


def _is_programs_end(error: BaseException) -> bool:
    """Return True if Python refuses something because the program ends."""
    return isinstance(error, RuntimeError) and any(text in _text(error) for text in _ENDINGS)


def _failure_said(error: BaseException, context: TaskContext) -> Failure:
    """Return the failure for an error that says how the task is answered."""
    if isinstance(error, TaskError):
        return Failure(
            code=scrub(error.code),
            message=_text(error.message),
            retryable=error.retryable is True,
            details=_without_secrets(error.details),
        )
    if isinstance(error, TaskCancelled):
        return protocol.failure(_CODE_FOR.get(context.cancel_reason or "", "cancelled"), _text(error))
    if isinstance(error, PolicyViolationError):
        limited = error.rule.startswith("rate_limit.")
        details: Dict[str, Any] = {"rule": error.rule}
        if error.retry_after is not None:
            details["retry_after"] = error.retry_after
        if error.rule == protocol.RULE_UNAVAILABLE:
            return protocol.failure("policy_unavailable", _text(error), details)
        return protocol.failure("rate_limited" if limited else "policy_denied", _text(error), details)
    return protocol.failure("policy_unavailable", _text(error))


def _text(value: object) -> str:
    try:
        text = str(value)
    except BaseException:  # noqa: BLE001
        return "(its text cannot be made)"
    # Lone surrogates have no JSON. Of a huge text only so much is scrubbed that the last cut finds no half of a token.
    text = text[: 20 * MAX_MESSAGE].encode("utf-8", "replace").decode()
    return scrub(text)[: 10 * MAX_MESSAGE]


def _without_secrets(details: Optional[Mapping[str, Any]]) -> Optional[Mapping[str, Any]]:
    """Return the details of a failure without secrets, which may be anywhere in them, keys included."""
    if details is None:
        return None
    try:
        encoded = protocol.encode_value(dict(details))
    except BaseException:  # noqa: BLE001  # It has no JSON form, or code of its own: it is never sent.
        return details
    clean = scrub_json(encoded)
    return details if clean is encoded else cast(Mapping[str, Any], protocol.decode_body(clean))
