"""Define the wire contract: paths, event names, bodies and answers. Pure; no I/O.

docs/protocol.md says which items the Sekuire documentation states and which are this project's decision. All of the
latter are in this module, so that one file changes when the platform's answer becomes known.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import re
import string
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Mapping, NoReturn, Optional, Sequence, Tuple
from urllib.parse import quote

from .._internal.checks import is_number
from .._internal.clock import time
from ..errors import APIError, ConfigurationError, PlanLimitError, RevokedError
from ..secret import Secret
from ..version import __version__
from .canonical import canonical_json
from .models import (
    MAX_ID_BYTES,
    Approval,
    Cancel,
    Command,
    Completion,
    Connected,
    Failure,
    Grant,
    HeartbeatReply,
    RuntimeCredentials,
    Task,
    WorkerReport,
)
from .models import is_id as is_id

if TYPE_CHECKING:
    from typing_extensions import TypeGuard

DEFAULT_API_BASE_URL = "https://api.sekuire.ai"
API_PREFIX = "/api/v1"
SDK_INFO = {"name": "sekuire-python", "version": __version__}
USER_AGENT = f"sekuire-python/{__version__}"

JSON_TYPE = "application/json"
STREAM_TYPE = "text/event-stream"

EVENT_TASK = "task"
EVENT_COMMAND = "command"
EVENT_CONNECTED = "connected"
EVENT_CANCEL = "cancel"
EVENT_APPROVAL = "approval"
EVENT_PING = "ping"
EVENT_MESSAGE = "message"

COMMANDS = ("pause", "resume", "terminate")

#: The code of credentials that belong to another agent.
CODE_WRONG_AGENT = "WRONG_AGENT"
#: The code of an install token that the platform has not made.
CODE_UNKNOWN_INSTALL_TOKEN = "INVALID_INSTALL_TOKEN"
CODE_REVOKED = "INSTALLATION_REVOKED"
_CODE_REVOKED = CODE_REVOKED.encode()

#: The rule that denies while no policy could be loaded.
RULE_UNAVAILABLE = "policy.unavailable"
#: The types and the severities of audit events.
EVENT_TYPES = (
    "tool_execution",
    "model_call",
    "policy_violation",
    "policy_check",
    "network_access",
    "file_access",
    "health",
)
SEVERITIES = ("debug", "info", "warn", "error")

#: The library's own failure codes, each with the ``retryable`` that is sent with it.
RETRYABLE = {
    "handler_error": False,
    "unknown_capability": False,
    "invalid_task": False,
    "worker_paused": True,
    "worker_terminated": True,
    "worker_shutdown": True,
    "policy_denied": False,
    "policy_unavailable": True,
    "rate_limited": True,
    "timeout": True,
    "cancelled": False,
    "result_not_serializable": False,
    "result_too_large": False,
    "result_rejected": False,
    "expired": False,
    "approval_denied": False,
    "approval_expired": True,
}

#: What an approval is asked for, the states of a request, and what a person may decide.
APPROVAL_KINDS = ("tool", "capability", "action")
APPROVAL_STATES = ("pending", "approved", "denied", "expired")
DECISIONS = ("approved", "denied")

#: The last states of a task.
FINAL_STATES = ("completed", "failed")
#: All states of a task.
TASK_STATES = ("queued", "assigned", *FINAL_STATES)
#: Longest wait of one question for a task (milliseconds), and most tasks of one question.
MAX_WAIT_MS, MAX_IDS = 20_000, 100

#: Longest lifetime (seconds) of a token. A longer one counts as unknown.
MAX_TOKEN_LIFETIME = 400 * 24 * 3600.0
#: Longest duration (seconds) of a wire field in milliseconds, 30 days. A client ignores a longer one that it receives.
MAX_DURATION = 30 * 24 * 3600.0
#: Most bytes of one schema of a capability.
MAX_SCHEMA = 64 * 1024
#: Most bytes of the details of an approval, in their canonical form.
MAX_DETAILS = 64 * 1024
#: Shortest and longest interval of heartbeats (seconds) that a platform can set.
MIN_INTERVAL, MAX_INTERVAL = 0.5, 24 * 3600.0
#: Longest ``Retry-After`` (seconds) that is honoured.
MAX_RETRY_AFTER = 300.0
#: Longest ``Last-Event-ID`` sent back, in bytes; servers refuse larger header lines.
MAX_EVENT_ID_BYTES = 4096
#: How many characters of an error body that is not JSON are kept.
MAX_ERROR_TEXT = 500


class Malformed(ValueError):
    """Report an answer or event that breaks the contract. The text names the field and never quotes a token."""


class MalformedTask(Malformed):
    """Report a task that cannot run. If ``task_id`` is not None it can be answered ``invalid_task``."""

    def __init__(self, reason: str, task_id: Optional[str] = None, attempt: int = 1) -> None:
        super().__init__(reason)
        self.task_id = task_id
        self.attempt = attempt


# -- paths ------------------------------------------------------------------------------------------------------------

_PATHS: Dict[str, str] = {
    "bootstrap": "/installations/bootstrap",
    "recover": "/installations/recover",
    "refresh": "/installations/{installation_id}/refresh",
    "heartbeat": "/installations/{installation_id}/heartbeat",
    "capabilities": "/installations/{installation_id}/capabilities",
    "revoke": "/installations/{installation_id}/revoke",
    "commands": "/installations/{installation_id}/commands",
    "installations": "/installations",
    "install_tokens": "/install-tokens",
    "tasks": "/tasks",
    "task": "/tasks/{task_id}",
    "task_stream": "/tasks/stream",
    "cancel": "/tasks/{task_id}/cancel",
    "retry": "/tasks/{task_id}/retry",
    "complete": "/tasks/{task_id}/complete",
    "release": "/tasks/{task_id}/release",
    "progress": "/tasks/{task_id}/progress",
    "approvals": "/tasks/{task_id}/approvals",
    "approval": "/tasks/{task_id}/approvals/{approval_id}",
    "approval_list": "/approvals",
    "decision": "/approvals/{approval_id}/decision",
    "policy": "/workspaces/{workspace_id}/policy",
    "logs": "/logs",
}

#: Every path of the contract by its name, each appended to ``api_base_url``.
DEFAULT_ENDPOINTS: Mapping[str, str] = {name: API_PREFIX + path for name, path in _PATHS.items()}

_PATH_PATTERN = re.compile(r"/(?!/)[\x21-\x7e]*\Z")


class Endpoints:
    """Hold the contract's paths, with a user's overrides.

    :param overrides: endpoint name → path appended to ``api_base_url``. It begins with one ``/`` and has the
        placeholders of the path that it replaces, for example ``{"refresh": "/v2/{installation_id}/renew"}``. That of
        ``bootstrap`` may hold ``{installation_id}``, as on older platforms.
    :raises ConfigurationError: an unknown name, a path with a host, a query or ``..``, or a wrong placeholder.
    """

    __slots__ = ("_paths",)

    def __init__(self, overrides: Optional[Mapping[str, str]] = None) -> None:
        self._paths = dict(DEFAULT_ENDPOINTS)
        if overrides is not None and not isinstance(overrides, Mapping):
            raise ConfigurationError("must map endpoint names to paths", "endpoints")
        for name, path in (overrides or {}).items():
            self._check(name, path)
            self._paths[name] = path

    def path(self, name: str, **ids: str) -> str:
        """Return the path of endpoint ``name`` with ``ids`` percent-encoded into it.

        :raises Malformed: an id that cannot stand in a path.
        """
        template = self._paths[name]
        if not ids:
            return template
        return template.format_map({key: encode_id(value) for key, value in ids.items()})

    @staticmethod
    def _check(name: str, path: str) -> None:
        option = f"endpoints[{name!r}]"
        default = DEFAULT_ENDPOINTS.get(name)
        if default is None:
            raise ConfigurationError(f"no such endpoint; known are {', '.join(sorted(DEFAULT_ENDPOINTS))}", option)
        if not isinstance(path, str) or not _PATH_PATTERN.match(path) or set("?#\\") & set(path):
            raise ConfigurationError(
                f"must be a path that begins with one '/', without host, query or spaces, such as {default!r}", option
            )
        if any(segment in (".", "..") for segment in path.split("/")):
            raise ConfigurationError("must not hold '.' or '..' segments", option)
        found = _placeholders(path, option)
        # The older platform names the installation in the path of a bootstrap.
        is_old_bootstrap = name == "bootstrap" and found == ["installation_id"]
        if found != _placeholders(default, option) and not is_old_bootstrap:
            wanted = ", ".join(f"{{{key}}}" for key in _placeholders(default, option)) or "none"
            raise ConfigurationError(f"must hold exactly these placeholders: {wanted}", option)

    @property
    def bootstrap_names_installation(self) -> bool:
        """Return True if the path of bootstrap holds an installation's id."""
        return "{" in self._paths["bootstrap"]


def _placeholders(template: str, option: str) -> List[str]:
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError:
        parts = [("", "{", "", None)]
    names = [field for _, field, _, _ in parts if field is not None]
    plain = all(not spec and conversion is None for _, field, spec, conversion in parts if field is not None)
    # "{{" and "}}" are parsed to single braces; a path without placeholders would be sent with both.
    plain = plain and not any(set("{}") & set(literal) for literal, _, _, _ in parts)
    if not plain or any(not name.isidentifier() for name in names):
        raise ConfigurationError("braces must hold a plain placeholder such as {installation_id}", option)
    return sorted(names)


#: Matches an id that needs no encoding, as nearly all are.
_is_plain_id = re.compile(f"[A-Za-z0-9_.~-]{{1,{MAX_ID_BYTES}}}").fullmatch


def encode_id(value: str) -> str:
    """Return ``value`` percent-encoded for a path segment or a header.

    :raises Malformed: it is not an id.
    """
    if _is_plain_id(value) and value not in (".", ".."):
        return value
    if not is_id(value):
        raise Malformed("an id is empty, too long, '.' or '..', or holds control characters")
    return quote(value, safe="")


def stream_query(
    agent_id: str, installation_id: Optional[str], worker_id: str, max_in_flight: int, capabilities: Sequence[str]
) -> str:
    """Return the query string of the task stream. No ``capabilities`` means any (a catch-all handler)."""
    pairs = [("agent_id", agent_id)]
    if installation_id:
        pairs.append(("installation_id", installation_id))
    pairs += [("worker_id", worker_id), ("max_in_flight", str(max_in_flight))]
    query = "&".join(f"{key}={quote(value, safe='')}" for key, value in pairs)
    if capabilities:
        query += "&capabilities=" + ",".join(quote(name, safe="") for name in capabilities)
    return query


# -- headers ----------------------------------------------------------------------------------------------------------


def bearer(token: Secret) -> Tuple[str, str]:
    """Return the header of a runtime token. It is plain text: build it only where the request is sent."""
    return "Authorization", f"Bearer {token.reveal()}"


#: The header of an API key, and the one that goes with each API key where the user names a device.
API_KEY_HEADER, FINGERPRINT_HEADER = "X-API-Key", "X-Device-Fingerprint"


def api_key_header(key: Secret) -> Tuple[str, str]:
    """Return the header of an API key. It is plain text: build it only where the request is sent."""
    return API_KEY_HEADER, key.reveal()


def idempotency_key(endpoint: str, credential: Secret, agent_id: str, holder: str) -> str:
    """Return the ``Idempotency-Key`` of bootstrap, recover and refresh.

    :param holder: the random value of whoever logs in. Its retries have one key; two replicas have two.
    """
    return hashlib.sha256("\n".join((endpoint, credential.reveal(), agent_id, holder)).encode()).hexdigest()


def completion_key(task_id: str, attempt: int, substituted: bool = False) -> str:
    """Return the ``Idempotency-Key`` of a completion: ``{task_id}:{attempt}``, with ``:2`` for a substituted one."""
    return f"{encode_id(task_id)}:{attempt}" + (":2" if substituted else "")


def event_id_header(event_id: str) -> Optional[bytes]:
    """Return the value of ``Last-Event-ID``, or None if there is none to send.

    It is bytes, because http.client would encode a str as Latin-1, and the standard says UTF-8. An id that is too long
    or holds control characters is left out: servers answer 400 to such a header, and the stream would never open.
    """
    value = event_id.encode()
    if not value or len(value) > MAX_EVENT_ID_BYTES or any(byte < 32 or byte == 127 for byte in value):
        return None
    return value


def retry_after(header: Optional[str], now: dt.datetime, date: Optional[str] = None) -> Optional[float]:
    """Return the seconds that ``Retry-After`` asks for, in either of its forms (RFC 9110, section 10.2.3).

    An instant counts by the clock of the answer, its ``Date`` header ``date``, and without one by ours, ``now``.
    Negative or unreadable values are None; longer than five minutes is cut to that.
    """
    if not header:
        return None
    text = header.strip()
    if text.isascii() and text.isdigit():
        seconds = float(text[:9])
    else:
        instant = parse_http_date(text)
        if instant is None:
            return None
        seconds = (instant - (parse_http_date(date) or now)).total_seconds()
    return min(seconds, MAX_RETRY_AFTER) if seconds > 0 else None


# -- times ------------------------------------------------------------------------------------------------------------

_RFC3339 = re.compile(
    r"(\d{4}-\d\d-\d\d)[Tt ](\d\d:\d\d:\d\d)(?:\.(\d{1,6})\d*)?(?:([Zz])|([+-]\d\d:\d\d))\Z", re.ASCII
)


def utc_now() -> dt.datetime:
    """Return the time of our clock, as an aware UTC datetime."""
    return dt.datetime.fromtimestamp(time.time(), dt.timezone.utc)


def parse_time(value: object) -> Optional[dt.datetime]:
    """Return an RFC 3339 instant as an aware UTC datetime, or None if ``value`` is not one."""
    match = _RFC3339.match(value) if isinstance(value, str) else None
    if match is None:
        return None
    date, clock, fraction, _, offset = match.groups()
    try:
        instant = dt.datetime.fromisoformat(f"{date}T{clock}.{(fraction or '0').ljust(6, '0')}{offset or '+00:00'}")
        return instant.astimezone(dt.timezone.utc)
    except (ValueError, OverflowError):
        return None


def format_time(instant: dt.datetime) -> str:
    """Return an aware datetime as RFC 3339 in UTC, with microseconds."""
    return instant.astimezone(dt.timezone.utc).replace(tzinfo=None).isoformat(timespec="microseconds") + "Z"


def parse_http_date(value: Optional[str]) -> Optional[dt.datetime]:
    """Return a ``Date`` header as an aware UTC datetime, or None if it is absent or unreadable."""
    if not value:
        return None
    try:
        instant = parsedate_to_datetime(value)
        if instant.tzinfo is None:
            instant = instant.replace(tzinfo=dt.timezone.utc)
        return instant.astimezone(dt.timezone.utc)
    except (TypeError, ValueError, IndexError, OverflowError):
        return None


def token_lifetime(end: Optional[dt.datetime], date: Optional[str], now: dt.datetime) -> Optional[float]:
    """Return the seconds from an answer to the end of a token, counted by the answer's ``Date``, else by our clock.

    None means unknown: no end is given, it has passed, or it is more than 400 days away. Then only a 401 shows the end.
    """
    if end is None:
        return None
    seconds = (end - (parse_http_date(date) or now)).total_seconds()
    return seconds if 0 < seconds <= MAX_TOKEN_LIFETIME else None


def lease_lifetime(
    value: object, date: Optional[str], now: dt.datetime, ignored: Dict[str, str]
) -> Tuple[Optional[dt.datetime], Optional[float]]:
    """Return the end that ``lease_expires_at`` gives and the seconds until then, or twice None if it is not usable.

    0 seconds mean that the platform has ended the lease. Only the answer's ``Date`` can show that: without one an end
    that has passed may be the fault of our clock.

    :param ignored: gets the reason if a value is not used.
    """
    if value is None:
        return None, None
    end = parse_time(value)
    if end is None:
        ignored["lease_expires_at"] = "it is not an RFC 3339 time"
        return None, None
    answered_at = parse_http_date(date)
    seconds = (end - (answered_at or now)).total_seconds()
    if seconds <= 0 and answered_at is None:
        ignored["lease_expires_at"] = "it has passed by this machine's clock, and the answer has no Date header"
        return None, None
    return end, max(0.0, seconds)


def has_ended(end: Optional[dt.datetime], date: Optional[str]) -> bool:
    """Return True if ``end`` had passed when the platform answered, by its own clock (the ``Date`` header).

    Without ``Date`` nothing is known. An end longer ago than any lifetime is not meant as a time.
    """
    answered = parse_http_date(date)
    return end is not None and answered is not None and 0 <= (answered - end).total_seconds() <= MAX_TOKEN_LIFETIME


# -- JSON -------------------------------------------------------------------------------------------------------------


def refuse_constant(name: str) -> NoReturn:
    """Refuse ``NaN`` and ``Infinity``, which Python's decoder accepts: the ``parse_constant`` of a strict one."""
    raise Malformed(f"{name} is not JSON")


_STRICT = json.JSONDecoder(parse_constant=refuse_constant)
_ENCODE: Callable[[Any], str] = json.JSONEncoder(
    ensure_ascii=False, allow_nan=False, separators=(",", ":"), check_circular=True
).encode
_PACK: Callable[[Any], str] = json.JSONEncoder(separators=(",", ":")).encode


def decode_json(text: str) -> Any:
    """Return the value of a JSON text.

    :raises Malformed: it is not JSON, holds NaN or Infinity, or is nested too deep.
    """
    problem = "is not valid JSON"
    try:
        return _STRICT.decode(text)
    except Malformed as error:
        problem = str(error)
    except RecursionError:
        problem = "is nested too deep"
    except json.JSONDecodeError:
        pass
    except ValueError:
        # Python refuses to read integers of more than 4,300 digits, because that takes quadratic time.
        problem = "holds a number with too many digits"
    raise Malformed(problem)


def encode_json(value: Any) -> bytes:
    """Return ``value`` as compact UTF-8 JSON.

    :raises ValueError, TypeError, RecursionError, OverflowError: the value has no JSON form (NaN and lone surrogates
        included).
    """
    return _ENCODE(value).encode()


def pack(value: Any) -> Optional[bytes]:
    """Return a value that came from JSON as JSON again, for :func:`unpack`, or None if it is nested too deep.

    Unlike :func:`encode_json` it accepts all that a decoder returns: lone surrogates, and infinity for ``1e999``.
    """
    try:
        return _PACK(value).encode("ascii")
    except (ValueError, RecursionError, MemoryError):
        return None


def unpack(packed: bytes) -> Any:
    """Return the value that :func:`pack` was given."""
    return json.loads(packed)


def decode_body(body: bytes) -> Any:
    """Return the JSON value of an answer's body.

    :raises Malformed: as :func:`decode_json`, or the body is not UTF-8.
    """
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = ""
    return decode_json(text)


# -- bodies -----------------------------------------------------------------------------------------------------------


def bootstrap_body(
    install_token: Secret, agent_id: str, capabilities: Sequence[str], runtime_info: Mapping[str, Any]
) -> bytes:
    """Return the body of a bootstrap."""
    return encode_json(
        {
            "install_token": install_token.reveal(),
            "agent_id": agent_id,
            "capabilities": list(capabilities),
            "runtime_info": dict(runtime_info, sdk=SDK_INFO),
        }
    )


def recover_body(agent_id: str, workspace_id: Optional[str], runtime_info: Mapping[str, Any]) -> bytes:
    """Return the body of a recovery."""
    return encode_json(
        {"agent_id": agent_id, "workspace_id": workspace_id, "runtime_info": dict(runtime_info, sdk=SDK_INFO)}
    )


def refresh_body(refresh_token: Secret) -> bytes:
    """Return the body of a refresh."""
    return encode_json({"refresh_token": refresh_token.reveal()})


def heartbeat_body(
    status: str,
    uptime_seconds: float,
    platform: Mapping[str, Any],
    capabilities: Sequence[str],
    workers: Sequence[WorkerReport],
    policy_hash: Optional[str] = None,
) -> bytes:
    """Return the body of a heartbeat."""
    body: Dict[str, Any] = {
        "status": status,
        "uptime_seconds": int(uptime_seconds),
        "platform": dict(platform),
        "capabilities": list(capabilities),
        "workers": [
            {
                "worker_id": worker.worker_id,
                "status": worker.status,
                "active_tasks": worker.active_tasks,
                "capabilities": list(worker.capabilities),
            }
            for worker in workers
        ],
        "sdk": SDK_INFO,
    }
    if policy_hash:
        body["policy_hash"] = policy_hash
    return encode_json(body)


def capabilities_body(capabilities: Sequence[Mapping[str, Any]]) -> bytes:
    """Return the body that publishes what an installation can do."""
    return encode_json({"capabilities": list(capabilities)})


def completion_head(completion: Completion, encoder: Optional[Callable[[Any], Any]] = None) -> bytes:
    """Return all of a completion's body except its end, which :func:`completion_tail` returns.

    The end holds the attempt, which may rise while the result waits to be delivered. The head never changes.

    :param encoder: asked for what has no JSON form in an output (``result_encoder``).
    :raises ValueError, TypeError, RecursionError, OverflowError: the output or the details have no JSON form.
    """
    body: Dict[str, Any] = {"task_id": completion.task_id}
    failure = completion.failure
    if failure is None:
        body["status"] = "completed"
        body["output"] = completion.output
    else:
        error: Dict[str, Any] = {
            "code": failure.code,
            "message": failure.message,
            "retryable": failure.retryable,
        }
        if failure.details is not None:
            error["details"] = dict(failure.details)
        body["status"] = "failed"
        body["error"] = error
    body["execution_time_ms"] = completion.execution_time_ms
    # The details of a failure were searched for secrets before, when nobody knew their form.
    return encode_value(body, encoder if failure is None else None)[:-1]


def encode_value(value: Any, encoder: Optional[Callable[[Any], Any]] = None) -> bytes:
    """Return the JSON of what a handler gave, which may hold classes, dates and more that JSON lacks.

    :raises ValueError, TypeError, RecursionError, OverflowError: it has no JSON form.
    """
    try:
        return encode_json(value)
    except TypeError:
        # What is JSON already is never searched for those.
        pass
    from .jsonform import to_json

    return encode_json(to_json(value, encoder))


def completion_problem(completion: Completion, encoder: Optional[Callable[[Any], Any]] = None) -> Optional[str]:
    """Return where a completion that :func:`completion_head` refuses has no JSON form, and what to do.

    None if the place is not found.
    """
    from .jsonform import problem_of

    if completion.failure is None:
        return problem_of(completion.output, "output", encoder)
    details = completion.failure.details
    return None if details is None else problem_of(dict(details), "error.details")


def completion_tail(attempt: int, worker_id: str) -> bytes:
    """Return the end of a completion's body. Head and tail together are the JSON object."""
    return f',"attempt":{attempt},"worker_id":"{worker_id}"}}'.encode()


def failure_code(head: bytes) -> Optional[str]:
    """Return the code of the failure in a completion's head (:func:`completion_head`), None for an output."""
    try:
        error = decode_body(head + b"}").get("error")
    except (Malformed, AttributeError):
        return None
    return str(error.get("code")) if isinstance(error, dict) else None


def execution_time_of(head: bytes) -> int:
    """Return the ``execution_time_ms`` with which a completion's head (:func:`completion_head`) ends."""
    digits = head[-40:].rpartition(b":")[2]
    return int(digits) if digits.isdigit() else 0


def release_body(attempt: int, worker_id: str) -> bytes:
    """Return the body that gives a task back."""
    return encode_json({"attempt": attempt, "worker_id": worker_id})


def progress_body(fraction: float, message: Optional[str]) -> bytes:
    """Return the body of a progress report."""
    body: Dict[str, Any] = {"progress": fraction}
    if message is not None:
        body["message"] = message
    return encode_json(body)


def approval_digest(task_id: str, kind: str, name: str, details: Any, policy_hash: Optional[str] = None) -> str:
    """Return what an approval is about, as 64 lower-case hex digits: a decision counts for this digest alone.

    It is the SHA-256 of the canonical form (RFC 8785) of ``{"task_id", "subject", "details", "policy_hash"}``.

    :raises ValueError: the details have no canonical form, or are longer than :data:`MAX_DETAILS`. The text says which.
    """
    length = len(canonical_json(details))
    if length > MAX_DETAILS:
        raise ValueError(f"it has {length} bytes as JSON, and may have {MAX_DETAILS}")
    subject = {"kind": kind, "name": name}
    asked = {"task_id": task_id, "subject": subject, "details": details, "policy_hash": policy_hash}
    return hashlib.sha256(canonical_json(asked)).hexdigest()


def approval_id(task_id: str, digest: str, n: int) -> str:
    """Return the id of the ``n``-th request, from 1, that this task makes with this digest: 64 hex digits."""
    return hashlib.sha256(f"{task_id}:{digest}:{n}".encode()).hexdigest()


def approval_body(
    approval_id: str,
    attempt: int,
    worker_id: str,
    *,
    kind: str,
    name: str,
    details: Any,
    policy_hash: Optional[str],
    digest: str,
    timeout: float,
) -> bytes:
    """Return the body that asks for an approval; ``timeout`` in seconds.

    :param details: what :func:`approval_digest` was given.
    """
    body: Dict[str, Any] = {
        "approval_id": approval_id,
        "attempt": attempt,
        "worker_id": worker_id,
        "subject": {"kind": kind, "name": name},
        "details": details,
        "digest": digest,
        "timeout_ms": max(1, int(timeout * 1000)),
    }
    if policy_hash is not None:
        body["policy_hash"] = policy_hash
    return encode_json(body)


def decision_body(decision: str, reason: Optional[str], decided_by: Optional[str]) -> bytes:
    """Return the body that decides a request for approval."""
    return reason_body(reason, decision=decision, decided_by=decided_by)


def submit_body(capability: str, input: Any, agent_id: str, fields: Mapping[str, Any]) -> bytes:
    """Return the body that submits a task; ``fields`` as docs/protocol.md lists them."""
    return encode_json({"agent_id": agent_id, "capability": capability, "input": input, **fields})


def reason_body(reason: Optional[str], **fields: Any) -> bytes:
    """Return the body of a cancel, a command or a revocation, without what is None."""
    body = {"reason": reason, **fields}
    return encode_json({name: value for name, value in body.items() if value is not None})


def install_token_body(agent_id: str, max_uses: int) -> bytes:
    """Return the body that asks for an install token."""
    return encode_json({"agent_id": agent_id, "max_uses": max_uses})


def query_of(**values: Any) -> str:
    """Return the query string of ``values``, with its question mark, without those that are None."""
    pairs = [f"{name}={quote(str(value), safe='')}" for name, value in values.items() if value is not None]
    return "?" + "&".join(pairs) if pairs else ""


def ids_query(task_ids: Sequence[str]) -> str:
    """Return the query string that asks for the state of several tasks."""
    return "?ids=" + ",".join(quote(one, safe="") for one in task_ids)


def audit_head(
    agent_id: str, session_id: str, environment: str, workspace_id: Optional[str], agent_name: Optional[str]
) -> bytes:
    """Return what the events of a batch share: a JSON object without its end, which :func:`audit_event` adds."""
    head = {"sekuire_id": agent_id, "session_id": session_id, "environment": environment}
    if workspace_id is not None:
        head["workspace_id"] = workspace_id
    if agent_name is not None:
        head["agent_name"] = agent_name
    return encode_json(head)[:-1]


def audit_event(head: bytes, event_type: str, severity: str, instant: dt.datetime, data: bytes) -> bytes:
    """Return one audit event; ``data`` is the JSON object of its ``event_data``."""
    # Of EVENT_TYPES, SEVERITIES and digits: nothing to escape.
    fields = f',"event_type":"{event_type}","severity":"{severity}","event_timestamp":"{format_time(instant)}"'
    return b"".join((head, fields.encode(), b',"event_data":', data, b"}"))


def audit_body(events: Sequence[bytes]) -> bytes:
    """Return the body of a batch of :func:`audit_event`."""
    return b'{"events":[' + b",".join(events) + b"]}"


# -- answers ----------------------------------------------------------------------------------------------------------


def decode_error(status: int, body: bytes, retry_after_seconds: Optional[float] = None) -> APIError:
    """Return the error for an answer with a status other than 2xx; 402 is a :class:`PlanLimitError`."""
    code: Optional[str] = None
    message = ""
    details: Optional[Mapping[str, Any]] = None
    try:
        payload = decode_body(body)
    except Malformed:
        payload = None
    if isinstance(payload, dict):
        details = payload
        nested = payload.get("error")
        inner = nested if isinstance(nested, dict) else payload
        code = _line(_str(inner.get("code")) or _str(payload.get("code")) or _str(nested) or "") or None
        message = _str(inner.get("message")) or _str(payload.get("message")) or _str(nested) or ""
    else:
        message = body[: 4 * MAX_ERROR_TEXT].decode("utf-8", "replace")
    error = PlanLimitError if status == 402 else APIError
    return error(status, code, _line(message), retry_after_seconds, details)


_TITLE = re.compile("<title[^>]*>(.*?)</title", re.IGNORECASE | re.DOTALL)
_MARKUP = re.compile(r"<(script|style)\b.*?</\1\s*>|<[^>]*>", re.DOTALL | re.IGNORECASE)


def page_text(body: bytes) -> str:
    """Return the title of a foreign page, or the beginning of what it says, in one line; at most 200 characters."""
    text = body[: 8 * MAX_ERROR_TEXT].decode("utf-8", "replace")
    title = _TITLE.search(text)
    text = title.group(1) if title is not None and title.group(1).strip() else text
    return " ".join(one_line(_MARKUP.sub(" ", text)).split())[:200]


def one_line(text: str) -> str:
    """Return ``text`` for one log line: control characters, which could forge a line, become spaces."""
    return "".join(c if c.isprintable() else " " for c in text).strip()


def is_revoked(error: APIError) -> bool:
    """Return True if this error is the kill switch. The code decides, not the status."""
    return error.code == CODE_REVOKED


def may_revoke(body: bytes) -> bool:
    """Return False if the body of a success is certainly not the kill switch. This costs no decoder."""
    return b"revoked" in body or _CODE_REVOKED in body


def revocation(error: APIError) -> RevokedError:
    """Return what the kill switch (:func:`is_revoked`) says: why, and how long running work may go on."""
    timeout = (error.details or {}).get("shutdown_timeout_ms")
    return RevokedError(error.message or None, milliseconds(timeout))


def is_transient(status: int) -> bool:
    """Return True if the same request may succeed later: 408, 425, 429 and 5xx."""
    return status in (408, 425, 429) or 500 <= status <= 599


def decode_grant(payload: Any, date: Optional[str], now: dt.datetime, previous: Optional[RuntimeCredentials]) -> Grant:
    """Read the answer of bootstrap, recover or refresh.

    :param date: the answer's ``Date`` header.
    :param now: our clock when the request was sent.
    :param previous: the credentials before a refresh. They fill in what the answer leaves out.
    :raises Malformed: no usable runtime token, or no installation id.
    """
    if not isinstance(payload, dict):
        raise Malformed("the answer is not a JSON object")
    base = previous or RuntimeCredentials()
    token = _token(payload, "runtime_token")
    if token is None:
        raise Malformed("the answer has no runtime_token")
    installation_id = payload.get("installation_id")
    if installation_id is None:
        installation_id = base.installation_id
    if not is_id(installation_id):
        raise Malformed("the answer has no usable installation_id")
    expires_at = parse_time(payload.get("expires_at"))
    ignored: Dict[str, str] = {}
    lease_end, lease_seconds = lease_lifetime(payload.get("lease_expires_at"), date, now, ignored)
    workspace_id = payload.get("workspace_id")
    return Grant(
        credentials=RuntimeCredentials(
            installation_id=installation_id,
            runtime_token=token,
            refresh_token=_token(payload, "refresh_token") or base.refresh_token,
            expires_at=expires_at,
            workspace_id=workspace_id if is_id(workspace_id) else base.workspace_id,
        ),
        lifetime=token_lifetime(expires_at, date, now),
        lease_lifetime=lease_seconds,
        lease_expires_at=lease_end,
        heartbeat_interval=_interval(payload.get("heartbeat_interval_seconds")),
        install_token_uses_left=_count(payload.get("install_token_uses_left")),
        ignored=ignored,
    )


def _count(value: object) -> Optional[int]:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def decode_heartbeat(payload: Any, date: Optional[str], now: dt.datetime) -> HeartbeatReply:
    """Read the answer to a heartbeat; None is an empty one.

    Every field is optional, and one of a wrong type counts as absent. Orders (``revoked``, ``desired_state``) are
    accepted in any spelling whose meaning is plain.
    """
    if not isinstance(payload, dict):
        return HeartbeatReply()
    ignored: Dict[str, str] = {}
    lease_end, lease_seconds = lease_lifetime(payload.get("lease_expires_at"), date, now, ignored)
    token_end = parse_time(payload.get("refreshed_token_expires_at"))
    try:
        token = _token(payload, "refreshed_token")
    except Malformed:
        token = None
    return HeartbeatReply(
        lease_expires_at=lease_end,
        lease_lifetime=lease_seconds,
        heartbeat_interval=_interval(payload.get("heartbeat_interval_seconds")),
        refreshed_token=token,
        refreshed_token_expires_at=token_end,
        refreshed_token_lifetime=token_lifetime(token_end, date, now),
        active_policy_hash=_str(payload.get("active_policy_hash")),
        revoked=_is_revoked(payload, ignored),
        reason=_reason(payload.get("reason")),
        shutdown_timeout=milliseconds(payload.get("shutdown_timeout_ms")),
        desired_state=_desired_state(payload, ignored),
        cancel_tasks=_ids(payload.get("cancel_tasks")),
        raw=payload,
        ignored=ignored,
    )


# -- events -----------------------------------------------------------------------------------------------------------


def decode_task(text: str) -> Task:
    """Read a task from an event's data.

    :raises MalformedTask: it cannot run. The error has the task's id if one could be read.
    """
    try:
        payload = decode_json(text)
    except Malformed as error:
        raise _unreadable_task(text, str(error)) from None
    return _build_task(payload, len(text))


def decode_pushed_task(text: str, new_id: str) -> Task:
    """Read a task that somebody pushes, under the id that it names or else under ``new_id``.

    :raises Malformed: it cannot run.
    """
    try:
        payload = decode_json(text)
    except Malformed as error:
        raise Malformed(f"the task {error}") from None
    if isinstance(payload, dict) and _first(payload, "task_id", "id") is None:
        payload["task_id"] = new_id
    return _build_task(payload, len(text))


def decode_untyped_task(text: str) -> Optional[Task]:
    """Read the task in an untyped ``message`` event. Return None if its JSON is not a task.

    :raises MalformedTask: it is meant as a task (an id and an ``input``) but cannot run.
    """
    try:
        payload = decode_json(text)
    except Malformed as error:
        outline = _outline(text)
        if not _looks_like_task(outline):
            return None
        raise _unreadable_task(text, str(error)) from None
    return _build_task(payload, len(text)) if _looks_like_task(payload) else None


def _looks_like_task(payload: Any) -> bool:
    return isinstance(payload, dict) and "input" in payload and ("task_id" in payload or "id" in payload)


def _unreadable_task(text: str, problem: str) -> MalformedTask:
    outline = _outline(text)
    task_id = _first(outline, "task_id", "id")
    attempt = outline.get("attempt")
    return MalformedTask(
        f"the task {problem}", task_id if is_id(task_id) else None, attempt if _is_attempt(attempt) else 1
    )


_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[{}\[\]:,"]|[^\s"{}\[\]:,]+', re.DOTALL)


def _outline(text: str) -> Dict[str, Any]:
    """Return the plain values of the outermost object, and None for its others. Return nothing if it has no end.

    A task that Python's decoder refuses (NaN, nesting, a number of a million digits) still has an id. It can be
    answered instead of being delivered again and again.
    """
    found: Dict[str, Any] = {}
    path: List[str] = []
    key: Optional[str] = None
    last = ""
    for match in _TOKEN.finditer(text):
        token = match.group()
        if token == '"' or (not path and (last or token != "{")):
            return {}
        if token in "{[":
            path.append("}" if token == "{" else "]")
        elif token in "}]":
            if path.pop() != token:
                return {}
        elif len(path) == 1 and token == ":":
            key = _plain(last) if last.startswith('"') else None
            if isinstance(key, str):
                found[key] = None
        elif len(path) == 1 and last == ":" and isinstance(key, str):
            found[key] = _plain(token)
        last = token
    return found if not path else {}


def _plain(token: str) -> Any:
    try:
        return json.loads(token) if len(token) <= 6 * MAX_ID_BYTES + 2 else None
    except ValueError:
        return None


def _build_task(payload: Any, size: int) -> Task:
    if not isinstance(payload, dict):
        raise MalformedTask("the task is not a JSON object")
    get = payload.get
    task_id = get("task_id")
    if task_id is None:
        task_id = get("id")
    if not is_id(task_id):
        raise MalformedTask("the task has no usable task_id")
    attempt = get("attempt")
    if attempt is None:
        attempt = 1
    if not _is_attempt(attempt):
        raise MalformedTask("attempt must be an integer from 1", task_id)
    capability = _first(payload, "capability", "target_capability")
    pushed = get("context")
    if capability is None or pushed is not None:
        payload = _with_pushed_fields(payload, pushed)
        get = payload.get
        capability = _first(payload, "capability", "target_capability", "tool", "target_tool", "type")
    if not is_id(capability):
        # The name appears in log lines, ours and the user's, and no handler can be registered under such a name.
        raise MalformedTask(
            "capability must be a non-empty string of at most 256 bytes without control characters", task_id, attempt
        )
    timeout = get("timeout_ms")
    if timeout is not None:
        timeout = milliseconds(timeout)
        if not timeout:
            raise MalformedTask("timeout_ms must be a positive number", task_id, attempt)
    texts = (
        _first(payload, "tool", "target_tool"),
        get("workspace_id"),
        _first(payload, "requester_agent_id", "requester_id"),
        get("parent_task_id"),
        get("workflow_id"),
        get("trace_id"),
    )
    for name, value in zip(_TEXT_FIELDS, texts):
        if value is not None and not isinstance(value, str):
            raise MalformedTask(f"{name} must be a string", task_id, attempt)
    tool, workspace_id, requester_id, parent_task_id, workflow_id, trace_id = texts
    return Task(
        task_id=task_id,
        capability=capability,
        input=get("input", {}),
        attempt=attempt,
        tool=tool,
        workspace_id=workspace_id,
        requester_id=requester_id,
        parent_task_id=parent_task_id,
        workflow_id=workflow_id,
        trace_id=trace_id,
        timeout=timeout,
        size=size,
    )


def _with_pushed_fields(payload: Dict[str, Any], context: Any) -> Dict[str, Any]:
    """Return a task with the fields that the pushed form has in its ``context``, unless it has its own."""
    if not isinstance(context, dict):
        return payload
    names = {"workspace_id": ("workspace_id",), "requester_id": ("requester_agent_id", "requester_id")}
    found = {name: context.get(name) for name, own in names.items() if _first(payload, *own) is None}
    if payload.get("type") is None:
        found["type"] = context.get("skill")
    return {**payload, **found}


_TEXT_FIELDS = ("tool", "workspace_id", "requester_agent_id", "parent_task_id", "workflow_id", "trace_id")


def decode_command(text: str) -> Command:
    """Read a command from an event's data.

    :raises Malformed: it is not JSON or its type is unknown.
    """
    payload = decode_json(text)
    kind = _word(payload.get("type")) if isinstance(payload, dict) else None
    if kind not in COMMANDS:
        shown = repr(kind[:80]) if isinstance(kind, str) else type(kind).__name__
        raise Malformed(f"the command's type must be one of {', '.join(COMMANDS)}, got {shown}")
    command_id = payload.get("command_id")
    return Command(
        type=kind,
        reason=_reason(payload.get("reason")),
        command_id=command_id if is_id(command_id) else None,
        shutdown_timeout=milliseconds(payload.get("shutdown_timeout_ms")),
    )


def decode_cancel(text: str) -> Cancel:
    """Read the cancellation of one task from an event's data.

    :raises Malformed: it is not JSON or names no task.
    """
    payload = decode_json(text)
    task_id = payload.get("task_id") if isinstance(payload, dict) else None
    if not is_id(task_id):
        raise Malformed("the cancel event names no task_id")
    return Cancel(task_id=task_id, reason=_reason(payload.get("reason")))


def parse_approval(data: Any) -> Approval:
    """Read the state of a request for approval from an ``approval`` event's data, a text, or from a decoded answer.

    An event must name its ``approval_id`` and ``task_id``. In an answer only ``status`` is required.

    :raises Malformed: it is not an object, its status is unknown, or an event names no request.
    """
    payload = decode_json(data) if isinstance(data, str) else data
    if not isinstance(payload, dict):
        raise Malformed("the approval is not a JSON object")
    status = _word(payload.get("status"))
    if status not in APPROVAL_STATES:
        raise Malformed(
            f"the approval's status must be one of {', '.join(APPROVAL_STATES)}, got {_quoted(payload.get('status'))}"
        )
    ids = [payload.get(name) for name in ("approval_id", "task_id")]
    if isinstance(data, str) and not all(is_id(one) for one in ids):
        raise Malformed("the approval event names no approval_id or no task_id")
    approval_id, task_id = (one if is_id(one) else None for one in ids)
    return Approval(
        status=status,
        approval_id=approval_id,
        task_id=task_id,
        decided_by=_reason(payload.get("decided_by")),
        reason=_reason(payload.get("reason")),
        digest=_str(payload.get("digest")),
        expires_at=parse_time(payload.get("expires_at")),
    )


def decode_connected(text: str) -> Connected:
    """Read the stream's ``connected`` event. Every field is optional, so nothing is refused."""
    try:
        payload = decode_json(text)
    except Malformed:
        payload = None
    if not isinstance(payload, dict):
        return Connected()
    installation_id = payload.get("installation_id")
    ignored: Dict[str, str] = {}
    return Connected(
        installation_id=installation_id if is_id(installation_id) else None,
        heartbeat_interval=_interval(payload.get("heartbeat_interval_seconds")),
        desired_state=_desired_state(payload, ignored),
        ignored=ignored,
    )


def failure(code: str, message: str, details: Optional[Mapping[str, Any]] = None) -> Failure:
    """Return a failure with one of the library's own codes and its ``retryable``."""
    return Failure(code=code, message=message, retryable=RETRYABLE[code], details=details)


# -- reading single fields --------------------------------------------------------------------------------------------


def _first(payload: Mapping[str, Any], *names: str) -> Any:
    """Return the first value that is not None, by the names of one field."""
    for name in names:
        value = payload.get(name)
        if value is not None:
            return value
    return None


def _str(value: Any) -> Optional[str]:
    return value if isinstance(value, str) and value else None


def _ids(value: Any) -> Tuple[str, ...]:
    return tuple(one for one in value if is_id(one)) if isinstance(value, list) else ()


def _reason(value: Any) -> Optional[str]:
    return _line(value) if isinstance(value, str) else None


def _line(text: str) -> str:
    # Cut first as well: nobody needs ten megabytes searched.
    return one_line(text[: 4 * MAX_ERROR_TEXT])[:MAX_ERROR_TEXT]


def _is_attempt(value: object) -> TypeGuard[int]:
    return type(value) is int and 1 <= value < 2**31


def _number(value: Any, highest: float) -> Optional[float]:
    return float(value) if is_number(value) and 0 <= value <= highest else None


def milliseconds(value: Any) -> Optional[float]:
    """Return a wire duration in milliseconds as seconds, or None if it is not a usable number."""
    number = _number(value, MAX_DURATION * 1000)
    return None if number is None else number / 1000.0


def _interval(value: Any) -> Optional[float]:
    seconds = _number(value, MAX_INTERVAL)
    # A platform that names a billionth of a second must not make us beat without a pause.
    return max(seconds, MIN_INTERVAL) if seconds else None


def _word(value: Any) -> Optional[str]:
    """Return ``value`` in lower case, without spaces and quotes around it. Return None if it is not a str."""
    return value.strip(" \t\r\n\"'").lower() if isinstance(value, str) else None


_YES, _NO = ("true", "1", "yes", "on"), ("false", "0", "no", "off", "")
_STATES = {
    "running": "running", "run": "running", "resume": "running", "resumed": "running",
    "paused": "paused", "pause": "paused",
    "terminated": "terminated", "terminate": "terminated",
}  # fmt: skip


def _is_revoked(payload: Mapping[str, Any], ignored: Dict[str, str]) -> bool:
    value = payload.get("revoked")
    if value is None or isinstance(value, bool):
        return value is True
    if isinstance(value, (int, float)) and value in (0, 1):
        return value == 1
    word = _word(value)
    if word not in _YES and word not in _NO:
        ignored["revoked"] = f"it must be true or false, got {_quoted(value)}"
    return word in _YES


def _desired_state(payload: Mapping[str, Any], ignored: Dict[str, str]) -> Optional[str]:
    value = payload.get("desired_state")
    if value is None:
        return None
    state = _STATES.get(_word(value) or "")
    if state is None:
        ignored["desired_state"] = f"it must be running, paused or terminated, got {_quoted(value)}"
    return state


def _quoted(value: Any) -> str:
    """Return a value of the platform for a log line. Objects and lists could hold anything: their type is named."""
    return repr(value[:80]) if isinstance(value, str) else type(value).__name__


def _token(payload: Mapping[str, Any], name: str) -> Optional[Secret]:
    value = payload.get(name)
    if value is None:
        return None
    try:
        return Secret(value)
    except ConfigurationError:
        pass
    raise Malformed(f"{name} is not a token (visible ASCII, no whitespace)")
