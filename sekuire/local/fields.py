"""Read the JSON bodies of requests, and check their fields.

What is refused here raises a :class:`~sekuire.local.store.Refusal` that names the field. A value that passes can be
stored, sent and read again: it has a depth, a size and a form that every program copes with.
"""

from __future__ import annotations

import json
import math
from typing import Any, Collection, Dict, List, Mapping, NamedTuple, Optional, Tuple

from .._internal.checks import is_whole
from ..wire.protocol import (
    APPROVAL_KINDS,
    EVENT_TYPES,
    MAX_DURATION,
    MAX_SCHEMA,
    SEVERITIES,
    encode_json,
    parse_time,
)
from .store import TASK_TEXTS, Refusal, check_id

__all__ = [
    "Question", "Submission", "attempt", "capability_info", "check_completion", "check_event", "check_question",
    "check_submission", "decode_object", "integer", "invalid", "number", "object_of", "one_of", "optional_string",
    "shutdown_timeout", "string", "strings",
]  # fmt: skip

#: How deep a body may be nested. It is far below what Python's decoder and encoder can do, also from a deeper stack.
MAX_DEPTH = 400
#: Largest number that every reader of JSON reads exactly.
MAX_NUMBER = 2**53
#: Longest duration that a body may name.
_LONGEST_MS = MAX_DURATION * 1000
#: Most bytes of the name of what an approval is asked for.
MAX_NAME = 4096
#: What is stored of a capability.
_INFO = ("name", "description", "input_schema", "output_schema")


def decode_object(raw: bytes) -> Dict[str, Any]:
    """Return the JSON object that a body is.

    :raises Refusal: 400, it is none, or holds a key twice, a number that is not finite, half a character, or too many
        levels.
    """
    problem = "is not valid JSON"
    value: Any = None
    try:
        text = raw.decode("utf-8-sig")
        value = _DECODER.decode(text)
        if text.count("[") + text.count("{") > MAX_DEPTH and _is_deep(value):
            problem = "is nested too deep"
        elif "\\" in text and _has_surrogate(value):
            problem = "holds half of a surrogate pair"
        elif not isinstance(value, dict):
            problem = "is not a JSON object"
        else:
            problem = ""
    except Refusal as refusal:
        problem = refusal.message
    except RecursionError:
        problem = "is nested too deep"
    except (UnicodeDecodeError, json.JSONDecodeError):
        pass
    except ValueError:
        # Python refuses to read integers of more than 4,300 digits, because that takes quadratic time.
        problem = "holds a number with too many digits"
    if problem:
        raise Refusal(400, "INVALID_JSON", f"the body {problem}")
    found: Dict[str, Any] = value
    return found


def _pairs(pairs: List[Tuple[str, Any]]) -> Dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise Refusal(400, "INVALID_JSON", "holds a key twice")
    return value


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise Refusal(400, "INVALID_JSON", "holds a number that is too large")
    return value


def _constant(name: str) -> None:
    raise Refusal(400, "INVALID_JSON", f"holds {name}, which is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_pairs, parse_float=_float, parse_constant=_constant)


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, (dict, list))
        ]
        if not level:
            return False
    return True


def _has_surrogate(value: Any) -> bool:
    # JSON can spell half of a surrogate pair, which no text in UTF-8 can contain. The encoder finds it fastest.
    try:
        encode_json(value)
    except UnicodeEncodeError:
        return True
    return False


def invalid(message: str) -> Refusal:
    return Refusal(400, "INVALID_REQUEST", message)


def string(body: Mapping[str, Any], name: str) -> str:
    value = body.get(name)
    if not isinstance(value, str) or not value:
        raise invalid(f"{name} must be a non-empty string")
    return value


def optional_string(body: Mapping[str, Any], name: str) -> Optional[str]:
    value = body.get(name)
    if value is not None and not isinstance(value, str):
        raise invalid(f"{name} must be a string")
    return value


def strings(body: Mapping[str, Any], name: str) -> List[str]:
    value = body.get(name)
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise invalid(f"{name} must be a list of strings")
    return value


def object_of(body: Mapping[str, Any], name: str) -> Dict[str, Any]:
    value = body.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise invalid(f"{name} must be an object")
    return value


def number(body: Mapping[str, Any], name: str, highest: float = MAX_NUMBER) -> Optional[float]:
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= highest:
        raise invalid(f"{name} must be a number from 0 to {highest:.0f}")
    return float(value)


def one_of(body: Mapping[str, Any], name: str, known: Collection[str]) -> str:
    value = body.get(name)
    if not isinstance(value, str) or value not in known:
        raise invalid(f"{name} must be one of {', '.join(known)}")
    return value


def integer(text: str, name: str, lowest: int, highest: int) -> int:
    """Return the integer that a text of a query is."""
    if not (text.isascii() and text.isdigit() and len(text) <= 18 and lowest <= int(text) <= highest):
        raise invalid(f"{name} must be an integer from {lowest} to {highest}")
    return int(text)


def attempt(body: Mapping[str, Any]) -> Optional[int]:
    value = body.get("attempt")
    if value is None:
        return None
    if not is_whole(value) or not 1 <= value < 2**31:
        raise invalid("attempt must be an integer from 1")
    return int(value)


def shutdown_timeout(body: Mapping[str, Any]) -> Optional[float]:
    value = number(body, "shutdown_timeout_ms", _LONGEST_MS)
    return None if value is None else value / 1000.0


def check_completion(task_id: str, body: Mapping[str, Any]) -> None:
    if body.get("task_id") not in (None, task_id):
        raise invalid("task_id must be the one of the path")
    attempt(body)
    optional_string(body, "worker_id")
    number(body, "execution_time_ms")
    status = body.get("status")
    if status == "completed":
        if "output" not in body:
            raise invalid("output is missing")
    elif status == "failed":
        error = body.get("error")
        if not isinstance(error, dict):
            raise invalid("error must be an object")
        for name in ("code", "message"):
            if not isinstance(error.get(name), str):
                raise invalid(f"error.{name} must be a string")
        if not isinstance(error.get("retryable", False), bool):
            raise invalid("error.retryable must be true or false")
    else:
        raise invalid("status must be completed or failed")


def check_event(event: Any) -> None:
    if not isinstance(event, dict):
        raise invalid("events must be a list of objects")
    for name in ("sekuire_id", "session_id", "environment"):
        string(event, name)
    for name in ("workspace_id", "agent_name"):
        optional_string(event, name)
    one_of(event, "event_type", EVENT_TYPES)
    one_of(event, "severity", SEVERITIES)
    if parse_time(event.get("event_timestamp")) is None:
        raise invalid("event_timestamp must be an RFC 3339 time")
    if not isinstance(event.get("event_data"), dict):
        raise invalid("event_data must be an object")


def capability_info(body: Mapping[str, Any]) -> List[Dict[str, Any]]:
    """Return what an installation says of its capabilities.

    :raises Refusal: it has not the form of the contract.
    """
    found = body.get("capabilities")
    if not isinstance(found, list):
        raise invalid("capabilities must be a list of objects with a name")
    infos = []
    for one in found:
        if not isinstance(one, dict) or not isinstance(one.get("name"), str) or not one["name"]:
            raise invalid("capabilities must be a list of objects with a name")
        optional_string(one, "description")
        for key in ("input_schema", "output_schema"):
            schema = one.get(key)
            if schema is not None and not isinstance(schema, dict):
                raise invalid(f"{key} must be an object")
            if schema is not None and len(encode_json(schema)) > MAX_SCHEMA:
                raise invalid(f"{key} must have at most {MAX_SCHEMA} bytes")
        infos.append({key: one[key] for key in _INFO if one.get(key) is not None})
    return infos


class Submission(NamedTuple):
    """Hold a new task: what its worker gets (``fields``), how often it may be tried, and when (seconds)."""

    capability: str
    fields: Dict[str, Any]
    max_attempts: int
    delay: float
    expires_in: Optional[float]


def check_submission(body: Mapping[str, Any]) -> Submission:
    """Return the new task that a body describes.

    :raises Refusal: 400, naming the field.
    """
    capability = check_id(body.get("capability"), "capability")
    if "input" not in body:
        raise invalid("input is missing")
    fields: Dict[str, Any] = {"input": body["input"]}
    for name in TASK_TEXTS:
        value = optional_string(body, name)
        if value is not None:
            fields[name] = value
    timeout = body.get("timeout_ms")
    if timeout is not None:
        if not number(body, "timeout_ms"):
            raise invalid("timeout_ms must be a positive number")
        fields["timeout_ms"] = timeout
    max_attempts = body.get("max_attempts")
    if max_attempts is None:
        max_attempts = 1
    if not is_whole(max_attempts) or not 1 <= max_attempts <= 1000:
        raise invalid("max_attempts must be an integer from 1 to 1000")
    delay = number(body, "delay_ms", _LONGEST_MS) or 0.0
    expires_in = number(body, "expires_in_ms", _LONGEST_MS)
    if expires_in == 0:
        raise invalid("expires_in_ms must be a positive number")
    return Submission(
        capability, fields, max_attempts, delay / 1000.0, None if expires_in is None else expires_in / 1000.0
    )


class Question(NamedTuple):
    """Hold a request for approval: who asks for what, and for how long (seconds)."""

    approval_id: str
    attempt: int
    worker_id: str
    kind: str
    name: str
    details: Any
    policy_hash: Optional[str]
    digest: str
    timeout: float


def _name(value: object) -> str:
    # That of an action is free text, for the person who decides.
    if not isinstance(value, str) or not value or len(value.encode()) > MAX_NAME:
        raise invalid(f"subject.name must be a non-empty string of at most {MAX_NAME} bytes")
    return value


def check_question(body: Mapping[str, Any]) -> Question:
    """Return the request for approval that a body describes.

    :raises Refusal: 400, naming the field.
    """
    subject = body.get("subject")
    if not isinstance(subject, dict):
        raise invalid("subject must be an object with kind and name")
    kind = subject.get("kind")
    if not isinstance(kind, str) or kind not in APPROVAL_KINDS:
        raise invalid(f"subject.kind must be one of {', '.join(APPROVAL_KINDS)}")
    if "details" not in body:
        raise invalid("details is missing")
    given = attempt(body)
    if given is None:
        raise invalid("attempt must be an integer from 1")
    timeout = number(body, "timeout_ms", _LONGEST_MS)
    if not timeout:
        raise invalid("timeout_ms must be a positive number")
    return Question(
        check_id(body.get("approval_id"), "approval_id"),
        given,
        check_id(body.get("worker_id"), "worker_id"),
        kind,
        _name(subject.get("name")),
        body["details"],
        optional_string(body, "policy_hash"),
        string(body, "digest"),
        timeout / 1000.0,
    )
