"""Check the arguments of a fault, read them from text, and write them as text."""

from __future__ import annotations

import math
import re
from typing import Any, Callable, Container, Dict, FrozenSet, List, Mapping, Optional, Tuple, Union

import attrs

from .._internal.checks import is_whole
from ..errors import ConfigurationError
from ..wire.protocol import DEFAULT_ENDPOINTS

#: A number of seconds, or two numbers between which each is drawn.
Span = Union[float, Tuple[float, float]]

#: Every kind of fault, with an example of it as text.
EXAMPLES: Mapping[str, str] = {
    "latency": "latency:0.05-0.2",
    "error": "error:503,rate=0.1,on=complete",
    "reset": "reset:rate=0.05,on=heartbeat,when=after",
    "half_answer": "half-answer:rate=0.05",
    "page": "page:404,rate=0.05,on=complete",
    "interim": "interim:103,rate=0.2",
    "cut_streams": "cut-streams:every=20-40",
    "stall_streams": "stall-streams:10,every=60",
    "expire_tokens": "expire-tokens:every=30",
    "outage": "outage:3,every=20-40",
}
#: The arguments of each kind in text. The first one may be written without its name.
_ARGUMENTS: Mapping[str, Tuple[str, ...]] = {
    "latency": ("seconds", "rate", "times", "on", "when"),
    "error": ("status", "rate", "times", "on", "when", "retry_after", "code"),
    "reset": ("rate", "times", "on", "when"),
    "half_answer": ("rate", "times", "on"),
    "page": ("status", "rate", "times", "on", "when", "retry_after"),
    "interim": ("status", "rate", "times", "on"),
    "cut_streams": ("every", "times"),
    "stall_streams": ("seconds", "every", "times"),
    "expire_tokens": ("every", "times"),
    "outage": ("seconds", "every", "times", "status", "retry_after"),
}
#: Arguments that may be written without their name, as the first.
_BARE = ("seconds", "status")
_DAY = 86_400.0

_NUMBER = r"[0-9]+(?:\.[0-9]*)?|\.[0-9]+"
_CODE = re.compile(r"[A-Za-z0-9_.-]{1,100}\Z")
_SPAN_TEXT = re.compile(rf"({_NUMBER})(?:-({_NUMBER}))?\Z", re.ASCII)


# -- checks: each returns the converted argument ---------------------------------------------------------------------


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def check_seconds(value: Any, option: str, least: float = 0.0) -> float:
    if not _is_number(value) or not least <= value <= _DAY:
        raise ConfigurationError(f"must be a number of seconds from {least:g} to {_DAY:g}", option)
    return float(value)


def _seconds(value: Any) -> Optional[Tuple[float, float]]:
    return None if value is None else _span(value, "seconds")


def _every(value: Any) -> Optional[Tuple[float, float]]:
    return None if value is None else _span(value, "every")


def _span(value: Any, option: str) -> Tuple[float, float]:
    if not isinstance(value, (tuple, list)):
        value = (value, value)
    if len(value) != 2:
        raise ConfigurationError("must be a number of seconds, or two: the least and the most", option)
    # A fault that repeats without a pause would leave the platform no time for anything else.
    high = check_seconds(value[1], option, 0.001)
    low = check_seconds(value[0], option)
    if high < low:
        raise ConfigurationError("the least must come first", option)
    return low, high


def _rate(value: Any) -> float:
    if not _is_number(value) or not 0 <= value <= 1:
        raise ConfigurationError("must be a number from 0 to 1", "rate")
    return float(value)


def _times(value: Any) -> Optional[int]:
    if value is not None and (not is_whole(value) or value < 1):
        raise ConfigurationError("must be an integer from 1", "times")
    return value


def _on(value: Any) -> Optional[FrozenSet[str]]:
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, (list, tuple, set, frozenset)) or not value:
        raise ConfigurationError("must be the name of an endpoint, several, or '*' for all", "on")
    for name in value:
        if name != "*" and name not in DEFAULT_ENDPOINTS:
            known = ", ".join(sorted(DEFAULT_ENDPOINTS))
            raise ConfigurationError(f"there is no endpoint {name!r}; known are {known}, and '*' for all", "on")
    return None if "*" in value else frozenset(value)


def _when(value: Any) -> str:
    if value not in ("before", "after"):
        raise ConfigurationError("must be 'before' (the platform has not acted) or 'after' (it has)", "when")
    return str(value)


def check_failure(value: Any) -> int:
    """Return the status of an error or an outage."""
    return _check_status(value, range(300, 600), "must be the status of a failure, from 300 to 599")


def check_page(value: Any) -> int:
    """Return the status of a page: any final one that has a body."""
    wanted = [status for status in range(200, 600) if status not in (204, 205, 304)]
    return _check_status(value, wanted, "must be a status with a body, from 200 to 599 without 204, 205 and 304")


def check_interim(value: Any) -> int:
    """Return the status of an interim answer. 101 is not one: it ends HTTP on its connection."""
    wanted = [status for status in range(100, 200) if status != 101]
    return _check_status(value, wanted, "must be an interim status such as 100, 102 or 103; 101 is not one")


def _check_status(value: Any, wanted: Container[int], problem: str) -> int:
    if not is_whole(value) or value not in wanted:
        raise ConfigurationError(problem, "status")
    return int(value)


def _retry_after(value: Any) -> Optional[int]:
    if value is not None and (not is_whole(value) or not 0 <= value <= _DAY):
        raise ConfigurationError(f"must be a whole number of seconds from 0 to {_DAY:g}", "retry_after")
    return value


def _code(value: Any) -> Optional[str]:
    if value is not None and (not isinstance(value, str) or not _CODE.match(value)):
        raise ConfigurationError("must be a word such as SERVICE_UNAVAILABLE", "code")
    return value


def _installation_id(value: Any) -> Optional[str]:
    if value is not None and not isinstance(value, str):
        raise ConfigurationError("must be an installation's id, or None for all", "installation_id")
    return value


@attrs.frozen(kw_only=True, slots=True)
class Terms:
    """Hold the checked arguments of a fault. Those that its kind does not have keep the default.

    :raises ConfigurationError: an argument is wrong; the text names it.
    """

    seconds: Optional[Tuple[float, float]] = attrs.field(default=None, converter=_seconds)
    #: Checked by the methods that have it; each kind has its own range.
    status: Optional[int] = None
    rate: float = attrs.field(default=1.0, converter=_rate)
    #: None: any.
    on: Optional[FrozenSet[str]] = attrs.field(default="*", converter=_on)  # type: ignore[assignment]
    when: str = attrs.field(default="before", converter=_when)
    every: Optional[Tuple[float, float]] = attrs.field(default=None, converter=_every)
    times: Optional[int] = attrs.field(default=None, converter=_times)
    retry_after: Optional[int] = attrs.field(default=None, converter=_retry_after)
    code: Optional[str] = attrs.field(default=None, converter=_code)
    installation_id: Optional[str] = attrs.field(default=None, converter=_installation_id)


_DEFAULTS = Terms()


# -- as text ----------------------------------------------------------------------------------------------------------


def write(kind: str, terms: Terms) -> str:
    """Return a fault as the text that :func:`read` accepts. An ``installation_id`` is left out."""
    parts: List[str] = []
    for name in _ARGUMENTS[kind]:
        value = getattr(terms, name)
        if value != getattr(_DEFAULTS, name):
            text = _show(value)
            parts.append(text if not parts and name in _BARE else f"{name.replace('_', '-')}={text}")
    return ":".join(filter(None, (kind.replace("_", "-"), ",".join(parts))))


def read(text: str) -> Tuple[str, Dict[str, Any]]:
    """Return the kind of a fault and the arguments for its method.

    :raises ConfigurationError: the text is wrong; the message says why.
    """
    kind, _, rest = text.strip().partition(":")
    kind = kind.strip().replace("-", "_")
    known = _ARGUMENTS.get(kind)
    if known is None:
        raise ConfigurationError(f"unknown kind; known are {', '.join(EXAMPLES).replace('_', '-')}")
    found: Dict[str, Any] = {}
    for number, part in enumerate(rest.split(",") if rest.strip() else ()):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals:
            if number or not name or known[0] not in _BARE:
                raise ConfigurationError(f"{part.strip()!r} is not NAME=VALUE")
            name, value = known[0], name
        name = name.replace("-", "_")
        if name not in known:
            raise ConfigurationError(f"unknown argument; known are {', '.join(known)}", name)
        if name in found:
            raise ConfigurationError("given twice", name)
        found[name] = _READERS[name](value, name)
    if kind in ("latency", "stall_streams") and "seconds" not in found:
        raise ConfigurationError("missing", "seconds")
    if "every" in known and "every" not in found:
        raise ConfigurationError("missing: the seconds from one to the next", "every")
    if kind == "latency":
        seconds = found.pop("seconds")
        found["low"], found["high"] = seconds if isinstance(seconds, tuple) else (seconds, None)
    return kind, found


def _read_span(text: str, name: str) -> Span:
    match = _SPAN_TEXT.match(text)
    if match is None:
        raise ConfigurationError(f"must be seconds such as 0.5 or 0.1-0.5, got {text!r}", name)
    low, high = match.groups()
    return float(low) if high is None else (float(low), float(high))


def _read_float(text: str, name: str) -> float:
    try:
        return float(text)
    except ValueError:
        problem = f"must be a number, got {text!r}"
    raise ConfigurationError(problem, name)


def _read_int(text: str, name: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise ConfigurationError(f"must be a whole number, got {text!r}", name)
    return int(text[:18])


def _read_names(text: str, name: str) -> List[str]:
    return [part.strip() for part in text.split("+")]


def _read_text(text: str, name: str) -> str:
    return text


_READERS: Mapping[str, Callable[[str, str], Any]] = {
    "seconds": _read_span,
    "every": _read_span,
    "rate": _read_float,
    "times": _read_int,
    "status": _read_int,
    "retry_after": _read_int,
    "on": _read_names,
    "when": _read_text,
    "code": _read_text,
}


def _show(value: Any) -> str:
    if isinstance(value, tuple):
        low, high = value
        return f"{low:g}" if low == high else f"{low:g}-{high:g}"
    if isinstance(value, frozenset):
        return "+".join(sorted(value))
    return f"{value:g}" if isinstance(value, float) else str(value)
