"""Serve the contract's endpoints over HTTP: Flask routes, and the server that runs them (cheroot).

Every path comes from :mod:`sekuire.wire.protocol`. Requests run on the pool's threads. This module keeps no
state of its own.
"""

from __future__ import annotations

import contextlib
import errno
import io
import ipaddress
import logging
import os
import queue
import socket
import struct
import threading
import time
from email.utils import formatdate
from http import HTTPStatus
from typing import (
    Any,
    Callable,
    Dict,
    FrozenSet,
    Iterable,
    Iterator,
    List,
    Mapping,
    NoReturn,
    Optional,
    Sequence,
    Set,
    Tuple,
)
from urllib.parse import parse_qs, unquote, urlsplit

import flask
from cheroot import errors as cheroot_errors
from cheroot import server as cheroot_server
from cheroot import wsgi as cheroot_wsgi
from werkzeug.exceptions import HTTPException, MethodNotAllowed, NotFound
from werkzeug.routing import BaseConverter, ValidationError

from .._internal.logs import get_logger
from ..errors import ConfigurationError
from ..wire.protocol import (
    COMMANDS,
    DEFAULT_ENDPOINTS,
    EVENT_TYPES,
    JSON_TYPE,
    SEVERITIES,
    STREAM_TYPE,
    Malformed,
    decode_body,
    encode_json,
    is_id,
    parse_time,
)
from .faults import Fault, Faults, Plan
from .record import NO_ANSWER, Record
from .store import TASK_TEXTS, Identity, Refusal, Settings, Store, check_id, revoked
from .streams import KEEP_ALIVE, Hub, Stream, StreamBody, break_off

__all__ = ["Application", "Server", "check_submission"]

logger = get_logger("sekuire.local")

#: Largest body that is read, and how much of a larger one is discarded so that its sender can read the 413.
MAX_BODY = 32 * 1024 * 1024
MAX_DRAIN = 256 * 1024 * 1024

#: A half answer of a stream ends in the middle of one of its first events, of this many.
HALF_STREAM_EVENTS = 8
#: l_onoff and l_linger of SO_LINGER.
_RESET_ON_CLOSE = struct.pack("hh" if os.name == "nt" else "ii", 1, 0)

STATUSES = ("healthy", "degraded", "paused", "stopping", "stopped")
TASK_STATUSES = ("queued", "assigned", "completed", "failed")

# cheroot's type stubs are partial and differ from version to version.
_HTTPRequest: Any = cheroot_server.HTTPRequest
_HTTPConnection: Any = cheroot_server.HTTPConnection
_WSGIGateway: Any = cheroot_wsgi.Gateway_10
_WSGIServer: Any = cheroot_wsgi.Server
#: cheroot adds every server it makes to `logging.statistics`, and never removes one.
_STATISTICS: Dict[str, Any] = logging.statistics  # type: ignore[attr-defined]

Environ = Dict[str, Any]
StartResponse = Callable[..., Any]


class _IdConverter(BaseConverter):
    """Convert an id that is one percent-encoded segment. PATH_INFO stays encoded, so that an id may hold a slash."""

    regex = "[^/]+"

    def to_python(self, value: str) -> str:
        text = unquote(value, errors="surrogateescape")
        if not is_id(text):
            raise ValidationError
        return text


class Application:
    """Answer requests, as a WSGI application: check the host, the origin and the credentials, act, and answer JSON."""

    # Threads: every HTTP thread calls it at once. It has no lock, because the store, the hub and the record, which it
    # changes, have their own.

    def __init__(self, store: Store, hub: Hub, record: Record, settings: Settings, faults: Faults) -> None:
        self._store = store
        self._hub = hub
        self._record = record
        self._settings = settings
        self._faults = faults
        #: The hosts that this server answers to; set once its port is known.
        self.hosts: Hosts = Hosts("127.0.0.1", 0, ())
        self._flask = self._build()

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        refusal = self.hosts.refuse(environ)
        if refusal is not None:
            self._record.request("refused", refusal.status)
            return _refuse(refusal)(environ, start_response)
        answer = self._flask.wsgi_app(environ, start_response)
        connection = environ["sekuire.connection"]
        # A fault of this request resets it, or the network has gone while it was handled.
        if connection.resetting or connection.server.resetting:
            _close(answer)
            break_off()
        return answer

    def _build(self) -> flask.Flask:
        app = flask.Flask("sekuire.local", static_folder=None)
        app.url_map.converters["id"] = _IdConverter
        app.url_map.merge_slashes = False
        routes: List[Tuple[str, str, Callable[..., flask.Response]]] = [
            ("bootstrap", "POST", self._bootstrap),
            ("recover", "POST", self._recover),
            ("refresh", "POST", self._refresh),
            ("heartbeat", "POST", self._heartbeat),
            ("revoke", "POST", self._revoke),
            ("commands", "POST", self._command),
            ("installations", "GET", self._installations),
            ("install_tokens", "POST", self._install_token),
            ("tasks", "POST", self._submit),
            ("tasks", "GET", self._tasks),
            ("task", "GET", self._task),
            ("task_stream", "GET", self._stream),
            ("complete", "POST", self._complete),
            ("release", "POST", self._release),
            ("progress", "POST", self._progress),
            ("policy", "GET", self._policy),
            ("policy", "PUT", self._set_policy),
            ("logs", "POST", self._log),
            ("logs", "GET", self._logs),
        ]
        for name, method, view in routes:
            rule = DEFAULT_ENDPOINTS[name].replace("{", "<id:").replace("}", ">")
            app.add_url_rule(
                rule, f"{name}:{method}", view, methods=[method], strict_slashes=True, provide_automatic_options=False
            )
        app.register_error_handler(Refusal, _refuse)
        app.register_error_handler(HTTPException, _http_error)
        app.register_error_handler(Exception, _crash)
        app.before_request(self._before)
        app.after_request(self._after)
        return app

    def _before(self) -> Optional[flask.Response]:
        _read_ahead()
        return self._apply_faults_before() if self._faults.active else None

    def _after(self, response: flask.Response) -> flask.Response:
        plan: Optional[Plan] = flask.request.environ.get("sekuire.plan")
        if plan is not None:
            response = self._apply_faults_after(response, plan)
        is_reset = flask.request.environ["sekuire.connection"].resetting
        self._record.request(_endpoint(), NO_ANSWER if is_reset else response.status_code)
        return response

    # -- faults -------------------------------------------------------------------------------------------------------

    def _apply_faults_before(self) -> Optional[flask.Response]:
        """Apply the faults that strike before a request is handled. Return a response if one ends the request."""
        plan = self._faults.plan(_endpoint())
        if plan is None:
            return None
        environ = flask.request.environ
        fault = plan.ends("before")
        if plan.delays and not self._faults.delay(plan, "before"):
            return _reset(environ)
        if fault is not None and fault.kind == "reset":
            return _reset(environ)
        if plan.interim and environ["SERVER_PROTOCOL"] != "HTTP/1.0":
            # Written past the server, which would treat it as the answer. Nothing else has been written yet.
            environ["sekuire.connection"].wfile.write(b"".join(_interim(fault) for fault in plan.interim))
        if fault is not None:
            return _injected(fault)
        environ["sekuire.plan"] = plan
        return None

    def _apply_faults_after(self, response: flask.Response, plan: Plan) -> flask.Response:
        """Apply the faults that strike after the platform has acted, and return what is sent as the answer."""
        environ = flask.request.environ
        fault = plan.ending
        if plan.delays and not self._faults.delay(plan, "after"):
            response.close()
            return _reset(environ)
        if fault is None:
            return response
        if fault.kind == "half_answer":
            body: Iterable[bytes] = response.response  # type: ignore[assignment]
            is_stream = response.mimetype == STREAM_TYPE
            response.response = _HalfStream(body, plan.where) if is_stream else _half(body, plan.where)
            return response
        response.close()
        return _reset(environ) if fault.kind == "reset" else _injected(fault)

    # -- who is asking ------------------------------------------------------------------------------------------------

    def _runtime(self, draining: bool = False) -> Identity:
        """Return the installation whose runtime token came with the request.

        :param draining: accept a revoked installation until its time to shut down ends.
        """
        scheme, _, token = flask.request.headers.get("Authorization", "").partition(" ")
        token = token.strip()
        if scheme.lower() != "bearer" or not token:
            raise Refusal(401, "INVALID_TOKEN", "this needs a runtime token: Authorization: Bearer <token>")
        identity = self._store.authenticate(token)
        if identity.revoked_until is not None and not (draining and self._store.is_draining(identity)):
            raise revoked(self._store.installation(identity.installation_id)["reason"])
        return identity

    def _admin(self) -> None:
        if not self._store.is_api_key(flask.request.headers.get("X-API-Key")):
            raise Refusal(401, "INVALID_API_KEY", "this needs the platform's API key: X-API-Key: sk_live_...")

    def _either(self) -> None:
        if "X-API-Key" in flask.request.headers:
            self._admin()
        else:
            self._runtime(draining=True)

    def _same(self, identity: Identity, installation_id: str) -> None:
        if identity.installation_id != installation_id:
            self._store.installation(installation_id)
            raise Refusal(403, "WRONG_INSTALLATION", "the runtime token belongs to another installation")

    # -- installations ------------------------------------------------------------------------------------------------

    def _bootstrap(self) -> flask.Response:
        body = _body()
        answer = self._store.bootstrap(
            _string(body, "install_token"),
            check_id(body.get("agent_id"), "agent_id"),
            _strings(body, "capabilities"),
            _object(body, "runtime_info"),
            flask.request.headers.get("Idempotency-Key"),
        )
        return _answer(answer, 201)

    def _recover(self) -> flask.Response:
        self._admin()
        body = _body()
        answer = self._store.recover(
            check_id(body.get("agent_id"), "agent_id"),
            _optional_string(body, "workspace_id"),
            _object(body, "runtime_info"),
            flask.request.headers.get("Idempotency-Key"),
        )
        return _answer(answer, 201)

    def _refresh(self, installation_id: str) -> flask.Response:
        token = _string(_body(), "refresh_token")
        return _answer(self._store.refresh(installation_id, token, flask.request.headers.get("Idempotency-Key")))

    def _heartbeat(self, installation_id: str) -> flask.Response:
        identity = self._runtime(draining=True)
        self._same(identity, installation_id)
        body = _body()
        if body.get("status") not in STATUSES:
            raise _invalid(f"status must be one of {', '.join(STATUSES)}")
        _number(body, "uptime_seconds")
        if not isinstance(body.get("platform"), dict):
            raise _invalid("platform must be an object")
        _strings(body, "capabilities")
        workers = body.get("workers")
        if workers is not None and not (
            isinstance(workers, list) and all(isinstance(w, dict) and is_id(w.get("worker_id")) for w in workers)
        ):
            raise _invalid("workers must be a list of objects with a worker_id")
        self._record.heartbeat(installation_id, body)
        answer = self._store.heartbeat(identity, body)
        self._hub.reported(identity, body)
        return _answer(answer)

    def _command(self, installation_id: str) -> flask.Response:
        self._admin()
        body = _body()
        kind = body.get("type")
        if kind not in COMMANDS:
            raise _invalid(f"type must be one of {', '.join(COMMANDS)}")
        data = self._hub.command(installation_id, kind, _optional_string(body, "reason"), _shutdown_timeout(body))
        return _answer(data, 202)

    def _revoke(self, installation_id: str) -> flask.Response:
        self._admin()
        body = _body(empty=True)
        self._hub.revoke(installation_id, _optional_string(body, "reason"), _shutdown_timeout(body))
        return _answer(self._store.installation(installation_id))

    def _installations(self) -> flask.Response:
        self._admin()
        return _answer({"installations": self._store.installations()})

    def _install_token(self) -> flask.Response:
        self._admin()
        body = _body()
        agent_id = check_id(body.get("agent_id"), "agent_id")
        max_uses = body.get("max_uses", 1)
        if not _is_int(max_uses) or not 1 <= max_uses <= 1_000_000:
            raise _invalid("max_uses must be an integer from 1 to 1000000")
        token = self._store.create_install_token(agent_id, max_uses)
        return _answer({"install_token": token, "agent_id": agent_id, "max_uses": max_uses}, 201)

    # -- tasks --------------------------------------------------------------------------------------------------------

    def _submit(self) -> flask.Response:
        self._admin()
        body = _body()
        agent_id = check_id(body.get("agent_id"), "agent_id")
        capability, fields, max_attempts = check_submission(body)
        task_id = self._store.submit(agent_id, capability, fields, max_attempts)
        # Read before a worker gets it, so that the answer is the task as it was queued.
        answer = _answer(self._store.task(task_id), 201)
        self._hub.submitted(agent_id, capability)
        return answer

    def _task(self, task_id: str) -> flask.Response:
        self._admin()
        return _answer(self._store.task(task_id))

    def _tasks(self) -> flask.Response:
        self._admin()
        query = _query()
        status = query.get("status")
        if status is not None and status not in TASK_STATUSES:
            raise _invalid(f"status must be one of {', '.join(TASK_STATUSES)}")
        limit = query.get("limit", "50")
        if not (limit.isascii() and limit.isdigit() and 1 <= int(limit[:9]) <= 1000):
            raise _invalid("limit must be an integer from 1 to 1000")
        tasks, before = self._store.tasks(status, query.get("capability"), int(limit), query.get("before"))
        return _answer({"tasks": tasks, "next_before": before})

    def _stream(self) -> flask.Response:
        if flask.request.method == "HEAD":
            raise MethodNotAllowed(["GET"])
        identity = self._runtime()
        query = _query()
        if query.get("agent_id") not in (None, identity.agent_id):
            raise Refusal(403, "WRONG_AGENT", "the runtime token belongs to an installation of another agent_id")
        if "installation_id" in query:
            self._same(identity, query["installation_id"])
        worker_id = check_id(query.get("worker_id"), "worker_id")
        room = query.get("max_in_flight", "1")
        if not (room.isascii() and room.isdigit() and len(room) <= 6):
            raise _invalid("max_in_flight must be an integer from 0")
        last = flask.request.headers.get("Last-Event-ID", "")
        stream = Stream(
            identity,
            worker_id,
            int(room),
            _capabilities(flask.request.environ["QUERY_STRING"]),
            flask.request.environ["sekuire.connection"].socket,
        )
        self._hub.open(stream, int(last[:18]) if last.isascii() and last.isdigit() else None)
        response = flask.Response(StreamBody(self._hub, stream, self._settings.keepalive_interval))
        response.direct_passthrough = True
        response.headers["Content-Type"] = STREAM_TYPE
        response.headers["Cache-Control"] = "no-store"
        return response

    def _complete(self, task_id: str) -> flask.Response:
        body: Any = None
        status = 500
        try:
            body = _body()
            identity = self._runtime(draining=True)
            _check_completion(task_id, body)
            done = self._store.complete(identity, task_id, flask.request.headers.get("Idempotency-Key"), body)
            status = done.status
        except (Refusal, HTTPException) as error:
            status = (error.status if isinstance(error, Refusal) else error.code) or 500
            raise
        finally:
            self._record.completion(task_id, status, body)
        self._hub.completed(identity, task_id, done)
        return _answer(done.answer, done.status)

    def _release(self, task_id: str) -> flask.Response:
        identity = self._runtime(draining=True)
        body = _body()
        worker_id = check_id(body.get("worker_id"), "worker_id")
        attempt = _attempt(body)
        if attempt is None:
            raise _invalid("attempt must be an integer from 1")
        agent_id = self._store.release(identity, task_id, worker_id, attempt)
        self._hub.released(identity, task_id, worker_id, attempt, agent_id)
        return _answer({"task_id": task_id, "attempt": attempt})

    def _progress(self, task_id: str) -> flask.Response:
        identity = self._runtime(draining=True)
        body = _body()
        fraction = body.get("progress")
        if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 <= fraction <= 1:
            raise _invalid("progress must be a number from 0 to 1")
        _optional_string(body, "message")
        self._store.progress(identity, task_id, body)
        self._record.progress(task_id, body)
        return _answer({"task_id": task_id})

    # -- policies and logs --------------------------------------------------------------------------------------------

    def _policy(self, workspace_id: str) -> flask.Response:
        # The local platform has one tenant: any of its credentials may read any workspace's policy.
        self._either()
        return _answer(self._store.policy(workspace_id))

    def _set_policy(self, workspace_id: str) -> flask.Response:
        self._admin()
        content = _body().get("content")
        if not isinstance(content, dict):
            raise _invalid('content must be an object: {"content": {...}}')
        return _answer(self._store.set_policy(workspace_id, content))

    def _log(self) -> flask.Response:
        self._either()
        events = _body().get("events")
        if not isinstance(events, list):
            raise _invalid("events must be a list of objects")
        for event in events:
            _check_event(event)
        self._store.log(events, flask.request.headers.get("Idempotency-Key"))
        return _answer({"accepted": len(events)}, 202)

    def _logs(self) -> flask.Response:
        self._admin()
        query = _query()
        for name, known in (("event_type", EVENT_TYPES), ("severity", SEVERITIES)):
            if query.get(name) not in (None, *known):
                raise _invalid(f"{name} must be one of {', '.join(known)}")
        limit, after = query.get("limit", "50"), query.get("after", "0")
        if not (limit.isascii() and limit.isdigit() and 1 <= int(limit[:9]) <= 1000):
            raise _invalid("limit must be an integer from 1 to 1000")
        if not (after.isascii() and after.isdigit() and len(after) <= 18):
            raise _invalid("after must be the next_after of an earlier answer")
        found = self._store.logs(query.get("event_type"), query.get("severity"), int(limit), int(after))
        return _answer({"events": [event for _, event in found], "next_after": found[-1][0] if found else int(after)})


def _endpoint() -> str:
    endpoint = flask.request.endpoint
    return endpoint.partition(":")[0] if endpoint else "unknown"


# -- reading a request ------------------------------------------------------------------------------------------------


def _body(empty: bool = False) -> Dict[str, Any]:
    raw = _read()
    if empty and not raw:
        return {}
    problem = ""
    try:
        body = decode_body(raw)
    except Malformed as error:
        body, problem = None, str(error)
    if problem:
        raise Refusal(400, "INVALID_JSON", f"the body {problem}")
    if not isinstance(body, dict):
        raise Refusal(400, "INVALID_JSON", "the body is not a JSON object")
    return body


def _read_ahead() -> None:
    # An answer may come before the body was read. The server itself reads the rest of a body of known length. It would
    # leave the rest of a chunked one, and closing then can cost the client the answer.
    environ = flask.request.environ
    if environ.get("wsgi.input_terminated"):
        environ["wsgi.input"] = io.BytesIO(_read())


def _read() -> bytes:
    environ = flask.request.environ
    stream = environ["wsgi.input"]
    try:
        if environ.get("wsgi.input_terminated"):
            return _read_chunks(stream)
        length = max(0, int(environ.get("CONTENT_LENGTH") or 0))
        if length > MAX_BODY:
            _drain(stream, length)
        raw: bytes = stream.read(length) if length else b""
        if len(raw) == length:
            return raw
    except (OSError, ValueError):
        # Cut, timed out, or chunked wrongly.
        pass
    raise Refusal(400, "INVALID_BODY", "the body ended early")


def _read_chunks(stream: Any) -> bytes:
    parts: List[bytes] = []
    total = 0
    while True:
        part = stream.read(65536)
        if not part:
            return b"".join(parts)
        total += len(part)
        if total > MAX_BODY:
            parts.clear()
            _drain(stream, MAX_DRAIN)
        parts.append(part)


def _drain(stream: Any, length: int) -> NoReturn:
    # A client that is still sending sees a reset instead of the answer, so read on for a while.
    left = min(length, MAX_DRAIN)
    while left > 0:
        part = stream.read(min(left, 65536))
        if not part:
            break
        left -= len(part)
    raise Refusal(413, "BODY_TOO_LARGE", f"the body is larger than {MAX_BODY // 1024 // 1024} MiB")


def _query() -> Dict[str, str]:
    pairs = parse_qs(flask.request.environ["QUERY_STRING"], keep_blank_values=True, errors="surrogateescape")
    return {name: values[-1] for name, values in pairs.items()}


def _capabilities(query: str) -> Optional[FrozenSet[str]]:
    """Return the names in the query, each percent-encoded on its own. Absent or empty means any."""
    for pair in query.split("&"):
        name, _, value = pair.partition("=")
        if name == "capabilities" and value:
            return frozenset(
                unquote(part.replace("+", " "))
                for part in value.replace("%2c", ",").replace("%2C", ",").split(",")
                if part
            )
    return None


def _invalid(message: str) -> Refusal:
    return Refusal(400, "INVALID_REQUEST", message)


def _string(body: Mapping[str, Any], name: str) -> str:
    value = body.get(name)
    if not isinstance(value, str) or not value:
        raise _invalid(f"{name} must be a non-empty string")
    return value


def _optional_string(body: Mapping[str, Any], name: str) -> Optional[str]:
    value = body.get(name)
    if value is not None and not isinstance(value, str):
        raise _invalid(f"{name} must be a string")
    return value


def _strings(body: Mapping[str, Any], name: str) -> List[str]:
    value = body.get(name)
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise _invalid(f"{name} must be a list of strings")
    return value


def _object(body: Mapping[str, Any], name: str) -> Dict[str, Any]:
    value = body.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise _invalid(f"{name} must be an object")
    return value


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(body: Mapping[str, Any], name: str) -> Optional[float]:
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
        raise _invalid(f"{name} must be a number from 0")
    return float(value)


def _attempt(body: Mapping[str, Any]) -> Optional[int]:
    value = body.get("attempt")
    if value is None:
        return None
    if not _is_int(value) or not 1 <= value < 2**31:
        raise _invalid("attempt must be an integer from 1")
    return int(value)


def _shutdown_timeout(body: Mapping[str, Any]) -> Optional[float]:
    value = _number(body, "shutdown_timeout_ms")
    return None if value is None else value / 1000.0


def _check_completion(task_id: str, body: Mapping[str, Any]) -> None:
    if body.get("task_id") not in (None, task_id):
        raise _invalid("task_id must be the one of the path")
    _attempt(body)
    _optional_string(body, "worker_id")
    _number(body, "execution_time_ms")
    status = body.get("status")
    if status == "completed":
        if "output" not in body:
            raise _invalid("output is missing")
    elif status == "failed":
        error = body.get("error")
        if not isinstance(error, dict):
            raise _invalid("error must be an object")
        for name in ("code", "message"):
            if not isinstance(error.get(name), str):
                raise _invalid(f"error.{name} must be a string")
        if not isinstance(error.get("retryable", False), bool):
            raise _invalid("error.retryable must be true or false")
    else:
        raise _invalid("status must be completed or failed")


def _check_event(event: Any) -> None:
    if not isinstance(event, dict):
        raise _invalid("events must be a list of objects")
    for name in ("sekuire_id", "session_id", "environment"):
        _string(event, name)
    for name in ("workspace_id", "agent_name"):
        _optional_string(event, name)
    for name, known in (("event_type", EVENT_TYPES), ("severity", SEVERITIES)):
        if event.get(name) not in known:
            raise _invalid(f"{name} must be one of {', '.join(known)}")
    if parse_time(event.get("event_timestamp")) is None:
        raise _invalid("event_timestamp must be an RFC 3339 time")
    if not isinstance(event.get("event_data"), dict):
        raise _invalid("event_data must be an object")


def check_submission(body: Mapping[str, Any]) -> Tuple[str, Dict[str, Any], int]:
    """Return a new task's capability, the fields its worker gets, and how often it may be tried.

    :raises Refusal: 400, naming the field.
    """
    capability = check_id(body.get("capability"), "capability")
    if "input" not in body:
        raise _invalid("input is missing")
    fields: Dict[str, Any] = {"input": body["input"]}
    for name in TASK_TEXTS:
        value = _optional_string(body, name)
        if value is not None:
            fields[name] = value
    timeout = body.get("timeout_ms")
    if timeout is not None:
        if not _number(body, "timeout_ms"):
            raise _invalid("timeout_ms must be a positive number")
        fields["timeout_ms"] = timeout
    max_attempts = body.get("max_attempts")
    if max_attempts is None:
        max_attempts = 1
    if not _is_int(max_attempts) or not 1 <= max_attempts <= 1000:
        raise _invalid("max_attempts must be an integer from 1 to 1000")
    return capability, fields, max_attempts


# -- answers ----------------------------------------------------------------------------------------------------------


def _answer(payload: Any, status: int = 200) -> flask.Response:
    return flask.Response(encode_json(payload), status, content_type=JSON_TYPE)


def _refuse(refusal: Refusal) -> flask.Response:
    name = _NAMES.get(refusal.status, "error")
    response = _answer({"error": name, "message": refusal.message, "code": refusal.code}, refusal.status)
    if refusal.status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    elif refusal.status == 503:
        response.headers["Retry-After"] = "1"
    return response


def _interim(fault: Fault) -> bytes:
    status = fault.terms.status or 103
    hint = "Link: </style.css>; rel=preload; as=style\r\n" if status == 103 else ""
    return f"HTTP/1.1 {status} {_phrase(status)}\r\n{hint}\r\n".encode()


def _page(fault: Fault) -> flask.Response:
    """Return an HTML page that names the fault, as something between a client and the platform answers."""
    status = fault.terms.status or 502
    title = f"{status} {_phrase(status)}"
    text = (
        f"<!DOCTYPE html><html><head><title>{title}</title></head><body><h1>{title}</h1><p>{fault}</p></body></html>\n"
    )
    response = flask.Response(text, status, mimetype="text/html")
    if 300 <= status < 400:
        response.headers["Location"] = "/portal/login"
    if status == 401:
        response.headers["WWW-Authenticate"] = 'Basic realm="portal"'
    return response


def _phrase(status: int) -> str:
    return HTTPStatus(status).phrase if status in _STATUSES else "Unknown"


def _injected(fault: Fault) -> flask.Response:
    response = _page(fault) if fault.kind == "page" else _error(fault)
    if fault.terms.retry_after is not None:
        response.headers["Retry-After"] = str(fault.terms.retry_after)
    return response


def _error(fault: Fault) -> flask.Response:
    terms = fault.terms
    status = terms.status or 503
    body = {
        "error": _phrase(status).lower().replace(" ", "_") if status in _STATUSES else "error",
        "message": f"injected by the local platform: {fault}",
        "code": terms.code or "INJECTED",
    }
    if status == 402:
        body.update(required_plan="team", upgrade_url="https://sekuire.ai/pricing")
    response = _answer(body, status)
    if status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    return response


def _reset(environ: Environ) -> flask.Response:
    """Reset the connection instead of answering."""
    environ["sekuire.connection"].resetting = True
    return flask.Response(status=500)


def _half(body: Iterable[bytes], where: float) -> Iterator[bytes]:
    """Yield the first part of ``body``, perhaps none but never all of it."""
    whole = b"".join(body)
    yield whole[: int(len(whole) * where)]
    break_off()


class _HalfStream:
    """Yield events up to the middle of one of the first."""

    def __init__(self, body: Iterable[bytes], where: float) -> None:
        self._body = body
        self._left = int(where * HALF_STREAM_EVENTS)

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self._body:
            if chunk == KEEP_ALIVE:
                yield chunk
            elif self._left:
                self._left -= 1
                yield chunk
            else:
                yield chunk[: len(chunk) // 2]
                break_off()

    def close(self) -> None:
        _close(self._body)


def _close(body: Iterable[bytes]) -> None:
    close = getattr(body, "close", None)
    if close is not None:
        close()


_STATUSES = frozenset(HTTPStatus)

_NAMES = {
    400: "bad_request",
    401: "unauthorized",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    409: "conflict",
    413: "payload_too_large",
    421: "misdirected_request",
    500: "internal_error",
    503: "unavailable",
}


def _http_error(error: HTTPException) -> flask.Response:
    if isinstance(error, NotFound):
        refusal = Refusal(404, "NOT_FOUND", f"there is nothing at {flask.request.path}")
    elif isinstance(error, MethodNotAllowed):
        refusal = Refusal(405, "METHOD_NOT_ALLOWED", f"{flask.request.method} is not allowed here")
    else:
        refusal = Refusal(error.code or 500, (error.name or "error").upper().replace(" ", "_"), error.description or "")
    response = _refuse(refusal)
    if isinstance(error, MethodNotAllowed) and error.valid_methods:
        response.headers["Allow"] = ", ".join(sorted(error.valid_methods))
    return response


def _crash(error: Exception) -> flask.Response:
    if isinstance(error, UnicodeEncodeError):
        # JSON can spell half of a surrogate pair, which no text can contain.
        return _refuse(Refusal(400, "INVALID_JSON", "the body holds a lone surrogate"))
    if isinstance(error, ConfigurationError):
        return _refuse(Refusal(503, "STOPPED", "the local platform is stopping"))
    logger.error("the local platform failed to answer %s %s", flask.request.method, flask.request.path, exc_info=error)
    return _refuse(Refusal(500, "INTERNAL_ERROR", "the local platform failed; see its log"))


class Hosts:
    """Refuse requests whose ``Host`` or ``Origin`` header is not this server's.

    A page in a browser can make its own host name resolve to 127.0.0.1 (DNS rebinding) and then read from this server
    as from itself. It cannot choose the Host header. An address in that header is harmless if the server is open to the
    network anyway: rebinding needs a name.
    """

    def __init__(self, host: str, port: int, allowed: Sequence[str]) -> None:
        names = {host, "localhost", "127.0.0.1", "::1"}
        self._own: Set[str] = {f"[{name}]:{port}" if ":" in name else f"{name}:{port}" for name in names}
        if port == 80:
            self._own |= {name.rpartition(":")[0] for name in self._own}
        self._port = port
        self._open = not is_loopback(host)
        if self._open:
            self._own.add(f"{socket.gethostname().lower()}:{port}")
        self._own |= {name.lower() for name in allowed}

    def refuse(self, environ: Environ) -> Optional[Refusal]:
        host = environ.get("HTTP_HOST")
        if host is None:
            return Refusal(400, "INVALID_REQUEST", "the Host header is missing")
        if not self._is_own(host):
            return Refusal(421, "WRONG_HOST", "this platform does not accept that Host; see allowed_hosts")
        origin = environ.get("HTTP_ORIGIN")
        if origin is not None and not (origin.startswith("http://") and self._is_own(origin[7:])):
            return Refusal(403, "WRONG_ORIGIN", "this platform does not answer pages of other origins")
        return None

    def _is_own(self, host: str) -> bool:
        host = host.lower()
        if host in self._own:
            return True
        name, _, port = host.rpartition(":")
        if name in self._own:  # allowed_hosts without a port: any
            return True
        return self._open and port == str(self._port) and _is_address(name)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name[1:-1] if name.startswith("[") and name.endswith("]") else name)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


# -- the server -------------------------------------------------------------------------------------------------------


class _Request(_HTTPRequest):  # type: ignore[misc]
    def simple_response(self, status: Any, msg: str = "") -> None:
        """Answer malformed HTTP: in the shape of the other answers, with a Date, and close the connection."""
        code = int(str(status)[:3])
        name = _NAMES.get(code, "bad_request")
        body = encode_json({"error": name, "message": msg or str(status), "code": "INVALID_REQUEST"})
        self.close_connection = True
        head = (
            f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nContent-Type: {JSON_TYPE}\r\n"
            f"Date: {formatdate(usegmt=True)}\r\nConnection: close\r\n\r\n"
        )
        try:
            self.conn.wfile.write(head.encode("latin-1") + body)
        except OSError as error:
            if error.args[0] not in cheroot_errors.socket_errors_to_ignore:
                raise


class _Connection(_HTTPConnection):  # type: ignore[misc]
    RequestHandlerClass = _Request

    def __init__(self, server: Any, sock: socket.socket, *args: Any) -> None:
        super().__init__(server, sock, *args)
        # Not every system inherits it from the listening socket. Without it an event may wait for an ACK.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        #: True if the connection ends with a reset, without an answer.
        self.resetting = False

    def close(self) -> None:
        if self.resetting or self.server.resetting:
            # Closing sends a RST then; a shutdown(), as in cheroot's close(), would send a FIN first.
            with contextlib.suppress(OSError):
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            self.linger = True
        super().close()
        # cheroot leaves it to the garbage collector, which warns if the client has gone before reading everything.
        with contextlib.suppress(OSError, ValueError):
            self.wfile.close()
        if self.linger:
            self.socket.close()


class _Gateway(_WSGIGateway):  # type: ignore[misc]
    def get_environ(self) -> Environ:
        environ: Environ = super().get_environ()
        # Still encoded, see _IdConverter.
        environ["PATH_INFO"] = urlsplit(environ["REQUEST_URI"]).path
        environ["sekuire.connection"] = self.req.conn
        if self.req.chunked_read:
            # cheroot does not find the real end of such a body.
            self.req.close_connection = True
        return environ


class _Pool:
    """Run the threads that answer requests. They are made on demand and kept until the end.

    cheroot's own pool has a fixed size or needs a caller to grow it. Its threads have no names of ours, and its stop()
    waits for a blocked thread without limit.
    """

    # Threads: an open stream occupies its thread. `_lock` guards the counters; the queue needs no lock.

    def __init__(self, server: Server, smallest: int, limit: int) -> None:
        self.min = smallest
        self._server = server
        self._limit = limit
        self._lock = threading.Lock()
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._threads: List[threading.Thread] = []
        self._busy: Set[Any] = set()
        self._idle = 0
        self._waiting = 0
        self._stopping = False

    @property
    def idle(self) -> int:
        return self._idle

    def start(self) -> None:
        with self._lock:
            for _ in range(self.min):
                self._spawn()

    def put(self, conn: Any) -> None:
        with self._lock:
            if not self._stopping:
                self._waiting += 1
                if self._waiting > self._idle and len(self._threads) < self._limit:
                    self._spawn()
                self._queue.put(conn)
                return
        conn.close()

    def stop(self, timeout: float = 1.0) -> None:
        """End all threads: first the idle ones, then those that answer, then by force those that wait for a client."""
        with self._lock:
            self._stopping = True
            threads = list(self._threads)
            for _ in threads:
                self._queue.put(None)
        deadline = time.monotonic() + timeout
        _join(threads, deadline)
        with self._lock:
            busy = list(self._busy)
        for conn in busy:
            try:
                conn.socket.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
        _join(threads, deadline + timeout)
        with contextlib.suppress(queue.Empty):
            while True:
                conn = self._queue.get_nowait()
                if conn is not None:
                    conn.close()
        # Threads that still work find it later.
        for _ in threads:
            self._queue.put(None)

    def _spawn(self) -> None:
        name = f"sekuire-local-http-{len(self._threads) + 1}"
        thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._threads.append(thread)
        # Counted as idle from here on, so that two requests in a row make two threads and not three.
        self._idle += 1
        thread.start()

    def _work(self) -> None:
        while True:
            conn = self._queue.get()
            if conn is None:
                return
            with self._lock:
                self._idle -= 1
                self._waiting -= 1
                self._busy.add(conn)
            keep = False
            try:
                keep = conn.communicate()
            except Exception:
                logger.exception("the local platform failed while it served a connection")
            finally:
                with self._lock:
                    self._busy.discard(conn)
                    self._idle += 1
                if keep:
                    self._server.put_conn(conn)
                else:
                    conn.close()


def _join(threads: Sequence[threading.Thread], deadline: float) -> None:
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))


class Server(_WSGIServer):  # type: ignore[misc]
    """Run cheroot with this module's pool, thread names and log, and with a stop() that returns."""

    ConnectionClass = _Connection
    keep_alive_conn_limit = None
    #: Seconds between two checks of idle connections, and how long stop() may wait for the thread that checks.
    expiration_interval = 0.1
    max_request_header_size = 64 * 1024

    def __init__(self, host: str, port: int, application: Application, max_threads: int) -> None:
        super().__init__((host, port), application, server_name="sekuire-local", request_queue_size=1024, timeout=75)
        self.gateway = _Gateway
        self.shutdown_timeout = 0.7
        self.requests = _Pool(self, min(8, max_threads), max_threads)
        self.bind_error: Optional[OSError] = None
        #: True if every connection ends with a reset.
        self.resetting = False
        self._thread: Optional[threading.Thread] = None

    def listen(self) -> int:
        """Bind the socket and return the port. Connections wait until :meth:`run`.

        :raises OSError: the address cannot be bound.
        """
        try:
            self.prepare()
        except OSError as error:
            _STATISTICS.pop(f"Cheroot HTTPServer {id(self)}", None)
            raise self.bind_error or error from None
        return int(self.bind_addr[1])

    def run(self) -> None:
        """Start to serve, on a thread of its own."""
        self._thread = threading.Thread(target=self.serve, name="sekuire-local-http", daemon=True)
        self._thread.start()

    def serve(self) -> None:
        # Like cheroot's, but without a second thread: the queue is unbounded, so no connection is ever refused.
        while self.ready:
            try:
                self._connections.run(self.expiration_interval)
            except Exception:
                if self.ready:
                    logger.exception("the local platform failed while it waited for requests")
                    time.sleep(0.05)

    def stop(self) -> None:
        super().stop()
        if self._thread is not None:
            self._thread.join()
        _STATISTICS.pop(f"Cheroot HTTPServer {id(self)}", None)

    def vanish(self) -> Optional[socket.socket]:
        """Stop at once, as if the network had gone: reset every connection, and answer no running request.

        Return a socket that keeps the port without listening, so that connections are refused and no other program gets
        the port. Return None if the system does not allow that.
        """
        self.resetting = True
        self.shutdown_timeout = 0.05
        family, address = self.socket.family, self.socket.getsockname()
        self.stop()
        guard = socket.socket(family)
        try:
            guard.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            guard.bind(address)
        except OSError:
            guard.close()
            return None
        return guard

    def put_conn(self, conn: Any) -> None:
        try:
            super().put_conn(conn)
        except (KeyError, ValueError, OSError):
            # The other side or stop() has just closed it.
            conn.close()

    def bind_socket(self, sock: socket.socket, address: Tuple[str, int]) -> socket.socket:
        try:
            sock.bind(address)
        except OSError as error:
            # cheroot would lose both the socket and the reason.
            sock.close()
            self.bind_error = error
            raise
        if os.name == "posix":
            # cheroot does it only for a port that was given. Without it a restart on the same port must wait.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return sock

    def error_log(self, msg: str = "", level: int = logging.INFO, traceback: bool = False) -> None:
        logger.log(level, "%s", msg, exc_info=traceback)


def explain_bind(error: OSError, host: str, port: int) -> ConfigurationError:
    """Return why the address cannot be bound, and what to do."""
    if isinstance(error, socket.gaierror):
        return ConfigurationError(f"the host {host!r} cannot be resolved; give an address of this machine", "host")
    if error.errno == errno.EADDRINUSE:
        return ConfigurationError(
            f"port {port} on {host} is taken; stop the program that uses it, choose another, or 0 for any free one",
            "port",
        )
    if error.errno == errno.EACCES:
        return ConfigurationError(f"this user may not listen on port {port}; choose one above 1023", "port")
    if error.errno == errno.EADDRNOTAVAIL:
        return ConfigurationError(f"{host} is not an address of this machine; give 127.0.0.1 or one that is", "host")
    return ConfigurationError(f"cannot listen on {host} port {port}: {error.strerror or error}", "port")
