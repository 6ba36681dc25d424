"""Serve the contract's endpoints, as a Flask application. :mod:`sekuire.local.server` runs it.

Every path comes from :mod:`sekuire.wire.protocol`. Requests run on the server's threads. This module keeps no state of
its own. Each view finds out who asks before it reads the body.
"""

from __future__ import annotations

import ipaddress
import socket
from http import HTTPStatus
from typing import Any, Callable, Dict, FrozenSet, Iterable, Iterator, List, Optional, Protocol, Sequence, Set, Tuple
from urllib.parse import parse_qs, unquote

import flask
import flask.sessions
from werkzeug.exceptions import HTTPException, MethodNotAllowed, NotFound
from werkzeug.routing import BaseConverter, ValidationError

from .._internal.checks import is_whole
from .._internal.logs import get_logger
from ..errors import ConfigurationError
from ..wire.protocol import (
    APPROVAL_STATES,
    COMMANDS,
    DECISIONS,
    DEFAULT_ENDPOINTS,
    EVENT_TYPES,
    JSON_TYPE,
    MAX_IDS,
    MAX_WAIT_MS,
    SEVERITIES,
    STREAM_TYPE,
    TASK_STATES,
    encode_json,
    is_id,
)
from .approvals import Approvals, Decision
from .faults import Fault, Faults, Plan
from .fields import (
    attempt,
    capability_info,
    check_completion,
    check_event,
    check_question,
    check_submission,
    decode_object,
    integer,
    invalid,
    number,
    object_of,
    one_of,
    optional_string,
    shutdown_timeout,
    string,
    strings,
)
from .record import NO_ANSWER, Record
from .server import Parked, error_name
from .store import OF_ANOTHER, Identity, Refusal, Settings, Store, check_id, revoked
from .streams import KEEP_ALIVE, Hub, Stream, StreamBody, break_off

__all__ = ["Application", "Hosts", "is_loopback"]

logger = get_logger("sekuire.local")

#: Largest body that is read, and largest one of a client that logs in, which has proven nothing yet.
MAX_BODY = 32 * 1024 * 1024
MAX_LOGIN_BODY = 256 * 1024

#: Most requests for approval of one page. The details of one may have 64 KiB.
MAX_APPROVALS = 100
#: A half answer of a stream ends in the middle of one of its first events, of this many.
HALF_STREAM_EVENTS = 8
STATUSES = ("healthy", "degraded", "paused", "stopping", "stopped")

Environ = Dict[str, Any]
StartResponse = Callable[..., Any]


class Pages(Protocol):
    """Serve a part of the paths beside the contract's endpoints."""

    def serves(self, environ: Environ) -> bool: ...

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]: ...


class _IdConverter(BaseConverter):
    """Convert an id that is one percent-encoded segment. PATH_INFO stays encoded, so that an id may hold a slash."""

    regex = "[^/]+"

    def to_python(self, value: str) -> str:
        text = unquote(value, errors="surrogateescape")
        if not is_id(text):
            raise ValidationError
        return text


class _NoSessions(flask.sessions.SessionInterface):
    """Keep no sessions: nothing here has any."""

    def open_session(self, app: flask.Flask, request: flask.Request) -> flask.sessions.SessionMixin:
        return flask.sessions.NullSession()

    def save_session(self, app: flask.Flask, session: flask.sessions.SessionMixin, response: flask.Response) -> None:
        pass


class _Flask(flask.Flask):
    """Leave out what Flask does for each request and nothing here needs: sessions, and a look for coroutines."""

    session_interface = _NoSessions()

    def ensure_sync(self, func: Callable[..., Any]) -> Callable[..., Any]:
        return func


class Application:
    """Answer requests, as a WSGI application: check the host, the origin and the credentials, act, and answer JSON."""

    # Threads: every HTTP thread calls it at once. It has no lock, because the store, the hub and the record, which it
    # changes, have their own.

    def __init__(
        self, store: Store, hub: Hub, approvals: Approvals, record: Record, settings: Settings, faults: Faults
    ) -> None:
        self._store = store
        self._hub = hub
        self._approvals = approvals
        self._record = record
        self._settings = settings
        self._faults = faults
        #: The hosts that this server answers to; set once its port is known.
        self.hosts: Hosts = Hosts("127.0.0.1", 0, ())
        #: The dashboard, if the platform has one.
        self.dashboard: Optional[Pages] = None
        self._flask = self._build()

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        refusal = self.hosts.refuse(environ)
        if refusal is not None:
            self._record.request("refused", refusal.status)
            self._record.note(
                "refused", endpoint="", status=refusal.status, code=refusal.code, message=refusal.message,
                has_credential=True,
            )  # fmt: skip
            return _refuse(refusal)(environ, start_response)
        connection = environ["sekuire.connection"]
        if self.dashboard is not None:
            if self.dashboard.serves(environ):
                return self.dashboard(environ, start_response)
            if self._faults.is_down:
                # Without a dashboard nobody listens during an outage.
                connection.resetting = True
                break_off()
        answer = self._flask.wsgi_app(environ, start_response)
        if connection.parked is not None:
            _close(answer)
            raise Parked
        # A fault of this request resets it, or the network has gone while it was handled.
        if connection.resetting or connection.server.resetting or (self.dashboard is not None and self._faults.is_down):
            connection.resetting = True
            _close(answer)
            break_off()
        return answer

    def _build(self) -> flask.Flask:
        app = _Flask("sekuire.local", static_folder=None)
        app.url_map.converters["id"] = _IdConverter
        app.url_map.merge_slashes = False
        routes: List[Tuple[str, str, Callable[..., flask.Response]]] = [
            ("bootstrap", "POST", self._bootstrap),
            ("recover", "POST", self._recover),
            ("refresh", "POST", self._refresh),
            ("heartbeat", "POST", self._heartbeat),
            ("revoke", "POST", self._revoke),
            ("commands", "POST", self._command),
            ("capabilities", "POST", self._capabilities),
            ("installations", "GET", self._installations),
            ("install_tokens", "POST", self._install_token),
            ("tasks", "POST", self._submit),
            ("tasks", "GET", self._tasks),
            ("task", "GET", self._task),
            ("task_stream", "GET", self._stream),
            ("cancel", "POST", self._cancel),
            ("retry", "POST", self._retry),
            ("complete", "POST", self._complete),
            ("release", "POST", self._release),
            ("progress", "POST", self._progress),
            ("approvals", "POST", self._ask),
            ("approval", "GET", self._approval),
            ("approval_list", "GET", self._approval_list),
            ("decision", "POST", self._decide),
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
        app.register_error_handler(Refusal, self._refused)
        app.register_error_handler(HTTPException, _http_error)
        app.register_error_handler(Exception, _crash)
        app.before_request(self._before)
        app.after_request(self._after)
        return app

    def _before(self) -> Optional[flask.Response]:
        # A request that has waited had its faults before.
        has_waited = flask.request.environ["sekuire.connection"].has_waited
        return self._apply_faults_before() if self._faults.active and not has_waited else None

    def _after(self, response: flask.Response) -> flask.Response:
        if flask.request.environ["sekuire.connection"].parked is not None:
            return response
        plan: Optional[Plan] = flask.request.environ.get("sekuire.plan")
        if plan is not None:
            response = self._apply_faults_after(response, plan)
        is_reset = flask.request.environ["sekuire.connection"].resetting
        self._record.request(_endpoint(), NO_ANSWER if is_reset else response.status_code)
        return response

    def _refused(self, refusal: Refusal) -> flask.Response:
        has_credential = any(name in flask.request.headers for name in ("Authorization", "X-API-Key"))
        self._record.note(
            "refused", endpoint=_endpoint(), status=refusal.status, code=refusal.code, message=refusal.message,
            has_credential=has_credential,
        )  # fmt: skip
        return _refuse(refusal)

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
            # A platform that fails so has read the request, and its connection can be used again.
            environ["wsgi.input"].skip()
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
        flask.request.environ["sekuire.connection"].know()
        if identity.revoked_until is not None and not (draining and self._store.is_draining(identity)):
            raise revoked(self._store.installation(identity.installation_id)["reason"])
        return identity

    def _admin(self) -> None:
        if not self._store.is_api_key(flask.request.headers.get("X-API-Key")):
            problem = "this needs the platform's API key: X-API-Key: sk_live_..."
            if "X-API-Key" in flask.request.headers:
                problem = f"this is not the platform's API key; {OF_ANOTHER}"
            raise Refusal(401, "INVALID_API_KEY", problem)
        flask.request.environ["sekuire.connection"].know()

    def _either(self) -> None:
        if "X-API-Key" in flask.request.headers:
            self._admin()
        else:
            self._runtime(draining=True)

    def _requester(self) -> Optional[Identity]:
        """Return the installation that submits or looks at its own tasks, or None for the administrator."""
        if "Authorization" in flask.request.headers and "X-API-Key" not in flask.request.headers:
            return self._runtime()
        self._admin()
        return None

    def _same(self, identity: Identity, installation_id: str) -> None:
        if identity.installation_id != installation_id:
            self._store.installation(installation_id)
            raise Refusal(403, "WRONG_INSTALLATION", "the runtime token belongs to another installation")

    # -- installations ------------------------------------------------------------------------------------------------

    def _bootstrap(self) -> flask.Response:
        body = _body()
        answer = self._store.bootstrap(
            string(body, "install_token"),
            check_id(body.get("agent_id"), "agent_id"),
            strings(body, "capabilities"),
            object_of(body, "runtime_info"),
            flask.request.headers.get("Idempotency-Key"),
        )
        self._record.note("login", agent_id=body["agent_id"], installation_id=answer["installation_id"])
        return _answer(answer, 201)

    def _recover(self) -> flask.Response:
        self._admin()
        body = _body()
        answer = self._store.recover(
            check_id(body.get("agent_id"), "agent_id"),
            optional_string(body, "workspace_id"),
            object_of(body, "runtime_info"),
            flask.request.headers.get("Idempotency-Key"),
        )
        self._record.note("login", agent_id=body["agent_id"], installation_id=answer["installation_id"])
        return _answer(answer, 201)

    def _refresh(self, installation_id: str) -> flask.Response:
        token = string(_body(), "refresh_token")
        return _answer(self._store.refresh(installation_id, token, flask.request.headers.get("Idempotency-Key")))

    def _heartbeat(self, installation_id: str) -> flask.Response:
        identity = self._runtime(draining=True)
        self._same(identity, installation_id)
        body = _body()
        one_of(body, "status", STATUSES)
        number(body, "uptime_seconds")
        if not isinstance(body.get("platform"), dict):
            raise invalid("platform must be an object")
        strings(body, "capabilities")
        workers = body.get("workers")
        if workers is not None and not (
            isinstance(workers, list) and all(isinstance(w, dict) and is_id(w.get("worker_id")) for w in workers)
        ):
            raise invalid("workers must be a list of objects with a worker_id")
        self._record.heartbeat(installation_id, body)
        answer = self._store.heartbeat(identity, body)
        self._hub.reported(identity, body, frozenset(answer.get("cancel_tasks", ())))
        return _answer(answer)

    def _capabilities(self, installation_id: str) -> flask.Response:
        self._same(self._runtime(draining=True), installation_id)
        self._store.publish(installation_id, capability_info(_body()))
        return _answer({})

    def _command(self, installation_id: str) -> flask.Response:
        self._admin()
        body = _body()
        kind = one_of(body, "type", COMMANDS)
        data = self._hub.command(installation_id, kind, optional_string(body, "reason"), shutdown_timeout(body))
        return _answer(data, 202)

    def _revoke(self, installation_id: str) -> flask.Response:
        self._admin()
        body = _body(empty=True)
        self._hub.revoke(installation_id, optional_string(body, "reason"), shutdown_timeout(body))
        return _answer(self._store.installation(installation_id))

    def _installations(self) -> flask.Response:
        self._admin()
        return _answer({"installations": self._store.installations()})

    def _install_token(self) -> flask.Response:
        self._admin()
        body = _body()
        agent_id = check_id(body.get("agent_id"), "agent_id")
        max_uses = body.get("max_uses", 1)
        if not is_whole(max_uses) or not 1 <= max_uses <= 1_000_000:
            raise invalid("max_uses must be an integer from 1 to 1000000")
        token = self._store.create_install_token(agent_id, max_uses)
        return _answer({"install_token": token, "agent_id": agent_id, "max_uses": max_uses}, 201)

    # -- tasks --------------------------------------------------------------------------------------------------------

    def _submit(self) -> flask.Response:
        requester = self._requester()
        body = _body()
        agent_id = check_id(body.get("agent_id"), "agent_id")
        task = check_submission(body)
        if requester is not None:
            if (task.fields.get("workspace_id") or requester.workspace_id) != requester.workspace_id:
                raise Refusal(403, "WRONG_WORKSPACE", "the runtime token belongs to another workspace_id")
            task.fields.update(workspace_id=requester.workspace_id, requester_agent_id=requester.agent_id)
        key = flask.request.headers.get("Idempotency-Key")
        if key:
            task_id, is_new = self._store.submit_once(key, agent_id, task)
        else:
            task_id, is_new = self._store.submit(agent_id, task), True
        # Read before a worker gets it, so that the answer is the task as it was queued.
        answer = _answer(self._store.task(task_id), 201 if is_new else 200)
        if is_new:
            self._hub.queued(agent_id, task.capability, task.delay, task.expires_in, task_id)
        return answer

    def _task(self, task_id: str) -> flask.Response:
        task = self._store.task(task_id, self._requester())
        wait = min(integer(_query().get("wait_ms", "0"), "wait_ms", 0, 10**18 - 1), MAX_WAIT_MS) / 1000.0
        connection = flask.request.environ["sekuire.connection"]
        if wait and task["completed_at"] is None and not connection.has_waited:
            # It waits without a thread: there may be more such requests than threads.
            plan = flask.request.environ.get("sekuire.plan")
            connection.park(
                lambda resume: self._hub.poll(task_id, wait, resume), {} if plan is None else {"sekuire.plan": plan}
            )
        return _answer(task)

    def _tasks(self) -> flask.Response:
        requester = self._requester()
        query = _query()
        if "ids" in query:
            ids = query["ids"].split(",")
            if len(ids) > MAX_IDS:
                raise invalid(f"ids must name at most {MAX_IDS} tasks")
            return _answer({"tasks": self._store.summaries(ids, requester), "next_before": None})
        status = one_of(query, "status", TASK_STATES) if "status" in query else None
        limit = integer(query.get("limit", "50"), "limit", 1, 1000)
        tasks, before = self._store.tasks(
            status,
            query.get("capability"),
            limit,
            query.get("before"),
            requester,
            agent_id=query.get("agent_id"),
            is_short=True,
        )
        return _answer({"tasks": tasks, "next_before": before})

    def _cancel(self, task_id: str) -> flask.Response:
        requester = self._requester()
        if requester is not None:
            # What it did not request does not exist for it.
            self._store.task(task_id, requester)
        self._hub.cancel(task_id, optional_string(_body(empty=True), "reason"))
        return _answer({})

    def _retry(self, task_id: str) -> flask.Response:
        self._admin()
        _body(empty=True)
        agent_id, capability, delay = self._store.retry(task_id, flask.request.headers.get("Idempotency-Key"))
        answer = _answer(self._store.task(task_id))
        if delay is not None:
            self._hub.queued(agent_id, capability, delay, None)
        return answer

    def _stream(self) -> flask.Response:
        if flask.request.method == "HEAD":
            raise MethodNotAllowed(["GET"])
        identity = self._runtime()
        query = _query()
        if query.get("agent_id") not in (None, identity.agent_id):
            raise Refusal(403, "WRONG_AGENT", f"the runtime token belongs to the agent {identity.agent_id!r}")
        if "installation_id" in query:
            self._same(identity, query["installation_id"])
        worker_id = check_id(query.get("worker_id"), "worker_id")
        room = integer(query.get("max_in_flight", "1"), "max_in_flight", 0, 999_999)
        last = flask.request.headers.get("Last-Event-ID", "")
        stream = Stream(
            identity,
            worker_id,
            room,
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
        try:
            identity = self._runtime(draining=True)
            body = _body()
            check_completion(task_id, body)
            done = self._hub.complete(identity, task_id, flask.request.headers.get("Idempotency-Key"), body)
        except BaseException as error:
            code = error.code if isinstance(error, HTTPException) else 500
            self._record.completion(task_id, error.status if isinstance(error, Refusal) else code or 500, body)
            raise
        if done.final or done.retry_in is not None:
            self._record.note(
                "end", task_id=task_id, capability=done.capability, agent_id=done.agent_id, attempt=done.attempt,
                error=body.get("error"), milliseconds=body.get("execution_time_ms"), retry_in=done.retry_in,
            )  # fmt: skip
        return _answer(done.answer, done.status)

    def _release(self, task_id: str) -> flask.Response:
        identity = self._runtime(draining=True)
        body = _body()
        worker_id = check_id(body.get("worker_id"), "worker_id")
        given = attempt(body)
        if given is None:
            raise invalid("attempt must be an integer from 1")
        self._hub.release(identity, task_id, worker_id, given)
        return _answer({"task_id": task_id, "attempt": given})

    def _progress(self, task_id: str) -> flask.Response:
        identity = self._runtime(draining=True)
        body = _body()
        fraction = body.get("progress")
        if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 <= fraction <= 1:
            raise invalid("progress must be a number from 0 to 1")
        optional_string(body, "message")
        self._store.progress(identity, task_id, body)
        self._record.progress(task_id, body)
        return _answer({"task_id": task_id})

    # -- approvals ----------------------------------------------------------------------------------------------------

    def _ask(self, task_id: str) -> flask.Response:
        identity = self._runtime()
        answer, is_new = self._approvals.ask(identity, task_id, check_question(_body()))
        return _answer(answer, 201 if is_new else 200)

    def _approval(self, task_id: str, approval_id: str) -> flask.Response:
        is_agent = "X-API-Key" not in flask.request.headers
        identity = self._runtime() if is_agent else None
        if not is_agent:
            self._admin()
        return _answer(self._approvals.state(identity, task_id, approval_id))

    def _approval_list(self) -> flask.Response:
        self._person()
        query = _query()
        status = one_of(query, "status", APPROVAL_STATES) if "status" in query else None
        limit = integer(query.get("limit", "50"), "limit", 1, MAX_APPROVALS)
        approvals, before = self._approvals.page(status, limit, query.get("before"))
        return _answer({"approvals": approvals, "next_before": before})

    def _decide(self, approval_id: str) -> flask.Response:
        credential = self._person()
        body = _body()
        decision = Decision(
            one_of(body, "decision", DECISIONS), credential, optional_string(body, "reason"),
            optional_string(body, "decided_by"),
        )  # fmt: skip
        return _answer(self._approvals.decide(approval_id, decision, flask.request.headers.get("Idempotency-Key")))

    def _person(self) -> str:
        """Check that whoever asks may decide, and return which credential proves it. An agent may not."""
        if "Authorization" in flask.request.headers and "X-API-Key" not in flask.request.headers:
            self._runtime(draining=True)
            raise Refusal(
                403, "API_KEY_REQUIRED", "an agent's runtime token cannot list or decide approvals; use the API key"
            )
        self._admin()
        return "api_key"

    # -- policies and logs --------------------------------------------------------------------------------------------

    def _policy(self, workspace_id: str) -> flask.Response:
        # The local platform has one tenant: any of its credentials may read any workspace's policy.
        self._either()
        return _answer(self._store.policy(workspace_id))

    def _set_policy(self, workspace_id: str) -> flask.Response:
        self._admin()
        content = _body().get("content")
        if not isinstance(content, dict):
            raise invalid('content must be an object: {"content": {...}}')
        return _answer(self._store.set_policy(workspace_id, content))

    def _log(self) -> flask.Response:
        self._either()
        events = _body().get("events")
        if not isinstance(events, list):
            raise invalid("events must be a list of objects")
        for event in events:
            check_event(event)
        self._store.log(events, flask.request.headers.get("Idempotency-Key"))
        return _answer({"accepted": len(events)}, 202)

    def _logs(self) -> flask.Response:
        self._admin()
        query = _query()
        for name, known in (("event_type", EVENT_TYPES), ("severity", SEVERITIES)):
            if name in query:
                one_of(query, name, known)
        limit = integer(query.get("limit", "50"), "limit", 1, 1000)
        after = integer(query.get("after", "0"), "after", 0, 10**18 - 1)
        found = self._store.logs(query.get("event_type"), query.get("severity"), limit, after)
        return _answer({"events": [event for _, event in found], "next_after": found[-1][0] if found else after})


def _endpoint() -> str:
    endpoint = flask.request.endpoint
    return endpoint.partition(":")[0] if endpoint else "unknown"


# -- reading a request ------------------------------------------------------------------------------------------------


def _body(empty: bool = False) -> Dict[str, Any]:
    """Read the body, which must be a JSON object.

    :param empty: accept nothing as an empty object.
    """
    environ = flask.request.environ
    is_known: bool = environ["sekuire.connection"].is_known
    raw: bytes = environ["wsgi.input"].read(MAX_BODY if is_known else MAX_LOGIN_BODY, known=is_known)
    return {} if empty and not raw else decode_object(raw)


def _query() -> Dict[str, str]:
    try:
        pairs = parse_qs(flask.request.environ["QUERY_STRING"], keep_blank_values=True, errors="strict")
    except ValueError:
        pairs = None
    if pairs is None:
        raise invalid("the query is not UTF-8")
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


# -- answers ----------------------------------------------------------------------------------------------------------


def _answer(payload: Any, status: int = 200) -> flask.Response:
    return flask.Response(encode_json(payload), status, content_type=JSON_TYPE)


def _refuse(refusal: Refusal) -> flask.Response:
    name = error_name(refusal.status)
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
