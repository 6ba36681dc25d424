"""Check a task that is to be submitted, and write it as JSON."""

from __future__ import annotations

import functools
from typing import Any, Callable, Dict, Mapping, NamedTuple, Optional

from .._internal.checks import check_number, check_whole
from .._internal.instrumentation import Submitting
from ..config import check_capability
from ..errors import ConfigurationError
from ..transport.http import make_idempotency_key
from ..wire import protocol

__all__ = ["Submission", "check_id", "check_names", "check_reason", "prepare", "prepare_item"]


class Submission(NamedTuple):
    """Hold a task that is ready to be sent.

    ``span`` watches it, if anything does.
    """

    body: bytes
    key: str
    span: Optional[Submitting] = None


def prepare(capability: str, input: Any, agent_id: Optional[str], fields: Mapping[str, Any]) -> Submission:
    """Return a task that is ready to be sent.

    :param fields: by the names of ``SekuireClient.submit``. One that is None is left out.
    :raises ConfigurationError: something is wrong, or no agent is named.
    """
    check_capability(capability, "capability")
    if agent_id is None:
        raise ConfigurationError(
            "is required: whose task is it? give agent_id= here or to the client, or set SEKUIRE_AGENT_ID", "agent_id"
        )
    check_id("agent_id", agent_id)
    check_names(fields)
    wire: Dict[str, Any] = {}
    key: Optional[str] = None
    for name, value in fields.items():
        if value is None:
            continue
        _CHECKS[name](name, value)
        if name == "idempotency_key":
            key = value
        elif name in _IN_SECONDS:
            # 0 would mean something else than very little.
            wire[f"{name}_ms"] = max(1, round(value * 1000)) if value else 0
        else:
            wire[name] = value
    delay, expires_in = fields.get("delay"), fields.get("expires_in")
    if delay and expires_in and expires_in <= delay:
        raise ConfigurationError(
            f"must be more than delay, got {expires_in:g} s and {delay:g} s: the task would expire before it may begin",
            "expires_in",
        )
    try:
        body = protocol.submit_body(capability, input, agent_id, wire)
    except (ValueError, TypeError, RecursionError, OverflowError) as error:
        problem = f"{type(error).__name__}: {error}"
    else:
        return Submission(body, key or make_idempotency_key())
    raise ConfigurationError(f"the task cannot be written as JSON: {problem}")


def prepare_item(number: int, item: Mapping[str, Any], prepare: Callable[..., Submission]) -> Submission:
    """Return one of many tasks, ready to be sent.

    :param item: the arguments of ``prepare``, by their names.
    :raises ConfigurationError: something is wrong; the error has the item's number.
    """
    option = f"items[{number}]"
    if not isinstance(item, Mapping):
        raise ConfigurationError(f"must be a mapping such as {{'capability': ...}}, got {type(item).__name__}", option)
    try:
        if "capability" not in item:
            raise ConfigurationError("is required", "capability")
        check_names({name: value for name, value in item.items() if name not in ("capability", "input", "agent_id")})
        return prepare(**item)
    except ConfigurationError as error:
        problem = error
    raise ConfigurationError(problem.problem, f"{option}.{problem.option}" if problem.option else option)


def check_id(name: str, value: Any) -> None:
    """Check that ``value`` is an id.

    :raises ConfigurationError: it is not.
    """
    if not protocol.is_id(value):
        raise ConfigurationError(
            f"must be a non-empty str of at most 256 bytes without control characters, got {value!r:.100}", name
        )


def check_names(fields: Mapping[str, Any]) -> None:
    """Check the names of a task's optional fields.

    :raises ConfigurationError: one is unknown. The error says what was probably meant.
    """
    for name in fields:
        if name not in _CHECKS:
            hint = _MEANT.get(name) or f"known are capability, input, agent_id, {', '.join(_CHECKS)}"
            raise ConfigurationError(f"unknown field of a task; {hint}", str(name))


def check_reason(value: Any) -> Optional[str]:
    """Return ``value`` if it can be a reason: a str, or None.

    :raises ConfigurationError: it is neither.
    """
    if value is not None and not isinstance(value, str):
        raise ConfigurationError(f"must be a str, got {type(value).__name__}", "reason")
    return value


def _check_key(name: str, value: Any) -> None:
    if not isinstance(value, str) or not 1 <= len(value) <= 256 or not value.isascii() or not value.isprintable():
        raise ConfigurationError(f"must be a str of 1 to 256 printable ASCII characters, got {value!r:.100}", name)


#: Fields of a task that its submitter may give, by their names here.
_CHECKS: Dict[str, Callable[[str, Any], None]] = {
    "idempotency_key": _check_key,
    "delay": functools.partial(check_number, zero=True, most=protocol.MAX_DURATION),
    "expires_in": functools.partial(check_number, most=protocol.MAX_DURATION),
    "timeout": functools.partial(check_number, most=protocol.MAX_DURATION),
    "max_attempts": check_whole,
    "trace_id": check_id,
    "workspace_id": check_id,
}
#: Those that the platform counts in milliseconds.
_IN_SECONDS = frozenset(("delay", "expires_in", "timeout"))
#: The platform's names, and those of other libraries.
_MEANT = {
    "timeout_ms": "use timeout (seconds)",
    "delay_ms": "use delay (seconds)",
    "expires_in_ms": "use expires_in (seconds)",
    "countdown": "use delay (seconds)",
    "expires": "use expires_in (seconds)",
    "wait": "only call() waits; use result(timeout=...) of the handle",
}
