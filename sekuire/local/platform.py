"""Start, use and observe the local platform as a Python object."""

from __future__ import annotations

import os
import socket
import threading
from types import TracebackType
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple, Type, Union

from .._internal.checks import is_whole
from .._internal.logs import get_logger
from ..errors import APIError, ConfigurationError
from ..wire.protocol import APPROVAL_STATES, COMMANDS, DECISIONS, MAX_DURATION
from .app import MAX_APPROVALS, Application, Hosts, is_loopback
from .approvals import Approvals, Decision
from .faults import Faults
from .fields import check_submission
from .record import Happening, Record
from .server import Limits, Server, explain_bind
from .store import TASK_TEXTS, Refusal, Settings, Store, check_id
from .streams import Hub, Watch

if TYPE_CHECKING:
    from .ui import Dashboard

__all__ = ["LocalPlatform"]

logger = get_logger("sekuire.local")

#: Threads for requests, which are short, and connections without a stream, beside those of the streams.
MORE_THREADS = 32
#: Threads for the open pages of the dashboard.
UI_THREADS = 24
MORE_CONNECTIONS = 512

_SUBMIT_FIELDS = (*TASK_TEXTS, "timeout_ms", "max_attempts", "delay_ms", "expires_in_ms")


class LocalPlatform:
    """Run a Sekuire platform on this machine, for development and tests: real HTTP, state in SQLite. ::

        with LocalPlatform() as platform:
            worker = create_worker(
                api_base_url=platform.url, agent_id="my-agent", install_token=platform.create_install_token("my-agent")
            )
            ...
            task_id = platform.submit("greet", {"name": "Ada"})
            print(platform.wait(task_id, timeout=5)["output"])

    It keeps the whole contract of docs/protocol.md. It signs policies with an Ed25519 key of its own, which it keeps in
    its database. Clients pin :attr:`policy_public_key`.

    Every method may be called from any thread. A refused call raises :class:`~sekuire.errors.APIError`, with the status
    and code that an HTTP client would get.

    :param path: the database file, made if it does not exist. None keeps everything in memory, as long as the object
        exists. Tasks, tokens and the API key in a file survive a restart, also after a kill. Only one platform uses a
        file at a time.
    :param host: the address to listen on. Whoever can reach it and has the API key can submit tasks to your workers.
    :param port: 0 chooses a free one; a restarted object uses the same port again.
    :param lease_seconds: how long a heartbeat keeps an installation's lease.
    :param heartbeat_interval: the interval that workers are asked for, in seconds.
    :param token_lifetime: the lifetime of runtime tokens, in seconds.
    :param keepalive_interval: seconds without an event after which a stream gets a comment; at most 15.
    :param refresh_grace: seconds a replaced refresh token stays valid.
    :param idempotency_window: seconds in which the same ``Idempotency-Key`` gets the same answer.
    :param redelivery_delay: seconds a worker may be disconnected before others get its tasks.
    :param retry_delay: seconds before the first retry of a task with ``max_attempts``; each further retry waits twice
        as long, up to a minute.
    :param workspace_id: the workspace of new installations.
    :param rotate_refresh_tokens: True if a refresh replaces the refresh token.
    :param heartbeat_refreshes_token: True if heartbeats renew the runtime token when a fifth of its lifetime is left. A
        number sets another fraction (1.0: every heartbeat).
    :param max_streams: how many workers may be connected at once; each needs a thread.
    :param head_timeout: seconds in which the request line and all headers of a request must arrive.
    :param body_timeout: seconds in which the whole body must arrive after that.
    :param allowed_hosts: further values of the ``Host`` header to accept, with or without a port, for example
        ``["host.docker.internal"]``.
    :param faults: the faults to inject, see :attr:`faults`; None makes an object without any.
    :param ui: True serves the dashboard under ``/ui/``; :meth:`dashboard_link` lets a person in.
    :raises ConfigurationError: a value is wrong, or the file cannot be used; the text says why and what to do.
    """

    # Threads: `_lock` guards starting and stopping. `_door`, acquired under it, guards the server, which an outage
    # stops and starts again. Both are held while a server starts or stops, and by no request.

    def __init__(
        self,
        path: Union[str, os.PathLike[str], None] = None,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        lease_seconds: float = 60.0,
        heartbeat_interval: float = 10.0,
        token_lifetime: float = 3600.0,
        keepalive_interval: float = 15.0,
        refresh_grace: float = 600.0,
        idempotency_window: float = 600.0,
        redelivery_delay: float = 5.0,
        retry_delay: float = 1.0,
        workspace_id: str = "ws_local",
        rotate_refresh_tokens: bool = True,
        heartbeat_refreshes_token: Union[bool, float] = True,
        max_streams: int = 1000,
        head_timeout: float = 10.0,
        body_timeout: float = 30.0,
        allowed_hosts: Sequence[str] = (),
        faults: Optional[Faults] = None,
        ui: bool = False,
    ) -> None:
        if not isinstance(host, str) or not host:
            raise ConfigurationError("must be a host name or an address such as 127.0.0.1", "host")
        if not is_whole(port) or not 0 <= port <= 65535:
            raise ConfigurationError("must be an integer from 0 (any free port) to 65535", "port")
        if not is_whole(max_streams) or max_streams < 1:
            raise ConfigurationError("must be an integer from 1", "max_streams")
        if isinstance(allowed_hosts, str) or not all(isinstance(name, str) for name in allowed_hosts):
            raise ConfigurationError("must be a list of host names", "allowed_hosts")
        if faults is not None and not isinstance(faults, Faults):
            raise ConfigurationError("must be a sekuire.local.Faults", "faults")
        _check_id(workspace_id, "workspace_id")
        below = 0.2 if heartbeat_refreshes_token is True else float(heartbeat_refreshes_token)
        if not 0 <= below <= 1:
            raise ConfigurationError("must be True, False or a fraction from 0 to 1", "heartbeat_refreshes_token")
        self._settings = Settings(
            lease_seconds=_seconds(lease_seconds, "lease_seconds"),
            heartbeat_interval=_seconds(heartbeat_interval, "heartbeat_interval"),
            token_lifetime=_seconds(token_lifetime, "token_lifetime"),
            keepalive_interval=_seconds(keepalive_interval, "keepalive_interval", highest=15.0),
            refresh_grace=_seconds(refresh_grace, "refresh_grace", zero=True),
            idempotency_window=_seconds(idempotency_window, "idempotency_window", zero=True),
            redelivery_delay=_seconds(redelivery_delay, "redelivery_delay", zero=True),
            retry_delay=_seconds(retry_delay, "retry_delay", zero=True),
            workspace_id=workspace_id,
            rotate_refresh_tokens=bool(rotate_refresh_tokens),
            heartbeat_refresh_below=below,
        )
        self._host = host
        self._port = port
        self._limits = Limits(
            threads=max_streams + MORE_THREADS + (UI_THREADS if ui else 0),
            connections=4 * max_streams + MORE_CONNECTIONS,
            head_seconds=_seconds(head_timeout, "head_timeout"),
            body_seconds=_seconds(body_timeout, "body_timeout"),
        )
        self._allowed_hosts = tuple(allowed_hosts)
        self._lock = threading.Lock()
        self._record = Record()
        self._faults = Faults() if faults is None else faults
        self._watch: Optional[Watch] = None
        self._door = threading.Lock()
        #: While the platform runs: its server, or in an outage None and the socket that keeps the port.
        self._application: Optional[Application] = None
        self._server: Optional[Server] = None
        self._guard: Optional[socket.socket] = None
        self._store = Store(None if path is None else os.fspath(path), self._settings)
        self._hub = Hub(self._store, self._record, self._settings, max_streams)
        self._approvals = Approvals(self._store, self._hub, self._record)
        self._dashboard: Optional[Dashboard] = None
        if ui:
            from .ui import Dashboard

            self._dashboard = Dashboard(
                self._store, self._hub, self._approvals, self._record, self._settings, self._faults
            )

    # -- life ---------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Listen and serve. Does nothing while it runs.

        :raises ConfigurationError: the address cannot be bound, the file is in use, or another platform has the faults.
        """
        with self._lock:
            if self._watch is not None:
                return
            self._store.open()
            watch = Watch()
            application = Application(
                self._store, self._hub, self._approvals, self._record, self._settings, self._faults
            )
            application.dashboard = self._dashboard
            problem: Optional[ConfigurationError] = None
            server: Optional[Server] = None
            try:
                server = self._listen(application)
                self._faults.attach(_Network(self, watch))
            except ConfigurationError as error:
                problem = error
            if server is None or problem is not None:
                if server is not None:
                    server.stop()
                watch.stop()
                self._store.close()
                assert problem is not None
                raise problem
            self._hub.start(watch)
            self._approvals.start()
            watch.start()
            if self._dashboard is not None:
                self._dashboard.start(watch, self.url, self._port)
            # Clients that connected before this waited on the listening socket.
            server.run()
            self._watch = watch
            with self._door:
                self._application, self._server = application, server
        # An outage may have begun since.
        self._settle()
        if not is_loopback(self._host):
            logger.warning(
                "the local platform listens on %s, which other machines may reach; it is made for development",
                self._host,
            )

    def stop(self) -> None:
        """End every stream, thread and connection, within about two seconds. Does nothing while stopped."""
        with self._lock:
            if self._watch is None:
                return
            watch, self._watch = self._watch, None
            self._faults.detach()
            with self._door:
                # From here on no outage begins or ends. The watch thread, which would do it, is joined below.
                server, guard = self._server, self._guard
                self._application = self._server = self._guard = None
            self._hub.close()
            if self._dashboard is not None:
                self._dashboard.stop()
            if server is not None:
                server.stop()
            if guard is not None:
                guard.close()
            watch.stop()
            self._store.close()

    def _listen(self, application: Application) -> Server:
        """Return a server on this platform's address, not yet running."""
        server = Server(self._host, self._port, application, self._limits)
        try:
            self._port = server.listen()
        except OSError as error:
            problem = explain_bind(error, self._host, self._port)
        else:
            application.hosts = Hosts(self._host, self._port, self._allowed_hosts)
            return server
        raise problem

    def _settle(self) -> None:
        """Go off the network or come back, according to the faults.

        :raises ConfigurationError: another program has taken the port during the outage.
        """
        with self._door:
            if self._application is None:
                return
            if self._faults.is_down:
                if self._dashboard is not None:
                    # The dashboard, where an outage can be ended, stays. The application resets all other requests.
                    self._hub.lose_all()
                elif self._server is not None:
                    server, self._server = self._server, None
                    server.resetting = True
                    self._hub.lose_all()
                    self._guard = server.vanish()
            elif self._server is None:
                try:
                    server = self._listen(self._application)
                except ConfigurationError:
                    # Some systems do not let two sockets have a port, even if only one of them listens.
                    self._let_go()
                    server = self._listen(self._application)
                self._let_go()
                server.run()
                self._server = server

    def _let_go(self) -> None:
        guard, self._guard = self._guard, None
        if guard is not None:
            guard.close()

    def __enter__(self) -> LocalPlatform:
        self.start()
        return self

    def __exit__(
        self,
        exc_type: Optional[Type[BaseException]],
        exc: Optional[BaseException],
        tb: Optional[TracebackType],
    ) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"<LocalPlatform {self.url if self._port else 'not started'}>"

    @property
    def url(self) -> str:
        """The address for clients' ``api_base_url``.

        :raises ConfigurationError: the port is not known before the first start.
        """
        if not self._port:
            raise ConfigurationError("the port is not known before start()", "url")
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self._host, self._host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self._port}"

    @property
    def workspace_id(self) -> str:
        """The workspace of new installations."""
        return self._settings.workspace_id

    @property
    def api_key(self) -> str:
        """The platform's API key, which is kept in the database."""
        return self._store.api_key

    def dashboard_link(self) -> str:
        """Return a link to the dashboard, which lets one browser in, once and within ten minutes.

        :raises ConfigurationError: there is no dashboard, or the platform has not started yet.
        """
        if self._dashboard is None or not self._port:
            raise ConfigurationError("the dashboard needs LocalPlatform(ui=True), and start()", "ui")
        return self._dashboard.link()

    # -- what an administrator does -----------------------------------------------------------------------------------

    def create_install_token(self, agent_id: str, max_uses: int = 1) -> str:
        """Return an install token for ``max_uses`` installations of this agent."""
        _check_id(agent_id, "agent_id")
        if not is_whole(max_uses) or not 1 <= max_uses <= 1_000_000:
            raise ConfigurationError("must be an integer from 1 to 1000000", "max_uses")
        return self._store.create_install_token(agent_id, max_uses)

    def reuse_install_token(self, agent_id: str, max_uses: int = 1) -> str:
        """Return the agent's own install token, for ``max_uses`` more installations. It stays the same.

        The database keeps it in plain text.
        """
        _check_id(agent_id, "agent_id")
        if not is_whole(max_uses) or not 1 <= max_uses <= 1_000_000:
            raise ConfigurationError("must be an integer from 1 to 1000000", "max_uses")
        return self._store.reuse_install_token(agent_id, max_uses)

    def submit(self, capability: str, input: Any, agent_id: Optional[str] = None, **fields: Any) -> str:
        """Queue a task and return its id.

        :param agent_id: the agent that gets the task; None: the agent of the newest install token or installation.
        :param fields: ``tool``, ``workspace_id``, ``requester_agent_id``, ``parent_task_id``, ``workflow_id``,
            ``trace_id``, ``timeout_ms``, ``max_attempts``, ``delay_ms``, ``expires_in_ms``.
        :raises ConfigurationError: no agent exists yet, or a field is unknown.
        :raises APIError: 400, a value is wrong.
        """
        unknown = sorted(set(fields) - set(_SUBMIT_FIELDS))
        if unknown:
            raise ConfigurationError(f"unknown field; known are {', '.join(_SUBMIT_FIELDS)}", unknown[0])
        if agent_id is None:
            agent_id = self._store.latest_agent()
            if agent_id is None:
                raise ConfigurationError("name the agent, or call create_install_token() first", "agent_id")
        _check_id(agent_id, "agent_id")
        try:
            task = check_submission({"capability": capability, "input": input, **fields})
            task_id = self._store.submit(agent_id, task)
        except Refusal as refusal:
            problem = refusal
        except (ValueError, TypeError, RecursionError, OverflowError) as error:
            problem = Refusal(400, "INVALID_REQUEST", f"input is not JSON: {error}")
        else:
            self._hub.queued(agent_id, task.capability, task.delay, task.expires_in, task_id)
            return task_id
        raise _api_error(problem)

    def task(self, task_id: str) -> Dict[str, Any]:
        """Return a task as ``GET /tasks/{id}`` shows it.

        ``status`` is ``queued``, ``assigned``, ``completed`` or ``failed``. ``attempt`` is 0 until a worker gets it.

        :raises APIError: 404, no such task.
        """
        try:
            return self._store.task(task_id)
        except Refusal as refusal:
            problem = refusal
        raise _api_error(problem)

    def wait(self, task_id: str, timeout: Optional[float] = None) -> Dict[str, Any]:
        """Wait until the task is ``completed`` or ``failed``, and return it.

        :raises TimeoutError: it is neither after ``timeout`` seconds.
        :raises APIError: 404, no such task.
        """
        try:
            return self._hub.wait(task_id, timeout)
        except Refusal as refusal:
            problem = refusal
        raise _api_error(problem)

    def command(
        self,
        installation_id: str,
        type: str,
        reason: Optional[str] = None,
        shutdown_timeout: Optional[float] = None,
    ) -> str:
        """Send ``pause``, ``resume`` or ``terminate`` to an installation, and return the command's id.

        A terminated installation stays so until a ``resume``, also when its worker is restarted.

        :raises APIError: 404 no such installation, 409 it is revoked.
        """
        if type not in COMMANDS:
            raise ConfigurationError(f"must be one of {', '.join(COMMANDS)}", "type")
        try:
            data = self._hub.command(installation_id, type, reason, _timeout(shutdown_timeout))
            return str(data["command_id"])
        except Refusal as refusal:
            problem = refusal
        raise _api_error(problem)

    def revoke(
        self, installation_id: str, reason: Optional[str] = None, shutdown_timeout: Optional[float] = None
    ) -> None:
        """Revoke an installation; its running tasks may be reported for ``shutdown_timeout`` seconds (None: 30).

        :raises APIError: 404, no such installation.
        """
        try:
            return self._hub.revoke(installation_id, reason, _timeout(shutdown_timeout))
        except Refusal as refusal:
            problem = refusal
        raise _api_error(problem)

    def approvals(self, status: Optional[str] = None) -> List[Dict[str, Any]]:
        """Return the requests for approval, newest first, as ``GET /approvals`` shows them.

        :param status: only those that are ``"pending"``, ``"approved"``, ``"denied"`` or ``"expired"``.
        """
        if status is not None and status not in APPROVAL_STATES:
            raise ConfigurationError(f"must be one of {', '.join(APPROVAL_STATES)}, got {status!r}", "status")
        found: List[Dict[str, Any]] = []
        before: Optional[str] = None
        while True:
            page, before = self._approvals.page(status, MAX_APPROVALS, before)
            found += page
            if before is None:
                return found

    def wait_for_approval(self, timeout: Optional[float] = None, *, task_id: Optional[str] = None) -> Dict[str, Any]:
        """Wait until something asks for an approval, and return the oldest request that is pending.

        :param task_id: wait for one of this task.
        :raises TimeoutError: there is none after ``timeout`` seconds.
        """
        return self._approvals.wait(timeout, task_id)

    def decide(
        self, approval_id: str, decision: str, reason: Optional[str] = None, *, decided_by: Optional[str] = None
    ) -> Dict[str, Any]:
        """Decide a request for approval, as a person does, and return it.

        :param decision: ``"approved"`` or ``"denied"``.
        :param decided_by: who decides, for the worker's log. Nothing proves it.
        :raises APIError: 404 no such request, 409 it is decided, 410 it has expired or its task has ended.
        """
        if decision not in DECISIONS:
            raise ConfigurationError(f"must be one of {', '.join(DECISIONS)}, got {decision!r}", "decision")
        for name, value in (("reason", reason), ("decided_by", decided_by)):
            if value is not None and not isinstance(value, str):
                raise ConfigurationError(f"must be a str, got {type(value).__name__}", name)
        try:
            return self._approvals.decide(approval_id, Decision(decision, "local", reason, decided_by))
        except Refusal as refusal:
            problem = refusal
        raise _api_error(problem)

    def set_policy(self, workspace_id: str, content: Mapping[str, Any]) -> Dict[str, Any]:
        """Make ``content`` the next version of the workspace's policy. Return the signed policy as workers get it.

        :raises APIError: 400, the content has no canonical JSON form.
        """
        _check_id(workspace_id, "workspace_id")
        if not isinstance(content, Mapping):
            raise ConfigurationError(f"must be a mapping, got {type(content).__name__}", "content")
        try:
            return self._store.set_policy(workspace_id, content)
        except Refusal as refusal:
            problem = refusal
        raise _api_error(problem)

    def policy(self, workspace_id: str) -> Optional[Dict[str, Any]]:
        """Return the workspace's policy as workers get it, or None if it has none."""
        _check_id(workspace_id, "workspace_id")
        try:
            return self._store.policy(workspace_id)
        except Refusal:
            return None

    @property
    def policy_public_key(self) -> str:
        """The key that proves the origin of this platform's policies, as hex.

        Use it for ``trusted_policy_keys`` or ``SEKUIRE_POLICY_PUBLIC_KEYS``."""
        return self._store.policy_key.public

    def rotate_policy_key(self) -> str:
        """Sign every policy with a new key from now on, also those set before. Return the new public key as hex."""
        self._store.rotate_policy_key()
        return self.policy_public_key

    def installations(self) -> List[Dict[str, Any]]:
        """Return every installation, oldest first, with its last heartbeat's ``status`` and ``workers``."""
        return self._store.installations()

    # -- looking inside, for tests ------------------------------------------------------------------------------------

    @property
    def requests(self) -> List[Tuple[str, int]]:
        """Return the last 10,000 requests, oldest first: endpoint (as in :mod:`sekuire.wire.protocol`) and status.

        The status is the answer's, also if it was injected. It is 0 if the connection was reset instead.
        """
        return self._record.requests()

    def count(self, endpoint: str, status: Optional[int] = None) -> int:
        """Count the requests that an endpoint has answered, in all or with a status: ``count("refresh", 200)``."""
        return self._record.count(endpoint, status)

    def heartbeats(self, installation_id: str) -> List[Dict[str, Any]]:
        """Return the bodies of the last 1,000 heartbeats of an installation."""
        return self._record.heartbeats_of(installation_id)

    def completions(self, task_id: str) -> List[Tuple[int, Any]]:
        """Return every completion sent for a task, also refused ones: the answer's status, and the request's body."""
        return self._record.completions_of(task_id)

    def progress(self, task_id: str) -> List[Dict[str, Any]]:
        """Return every progress report of a task."""
        return self._record.progress_of(task_id)

    def logs(self, event_type: Optional[str] = None, severity: Optional[str] = None) -> List[Dict[str, Any]]:
        """Return the last 10,000 audit events, oldest first: all of them, or those of a type or a severity."""
        return [event for _, event in self._store.logs(event_type, severity)]

    def logs_after(self, number: int) -> List[Tuple[int, Dict[str, Any]]]:
        """Return the audit events with a number above ``number``, oldest first, with their numbers. They begin at 1."""
        return self._store.logs(None, None, after=number)

    def happenings_after(self, number: int) -> List[Happening]:
        """Return what happened after the one with this number, oldest first, of the last 10,000. They begin at 1."""
        return self._record.happenings_after(number)

    def streams(self) -> List[Dict[str, Any]]:
        """Return the connected workers.

        Each has ``worker_id``, ``installation_id``, ``capabilities`` (None: any), ``in_flight`` and ``max_in_flight``.
        """
        return self._hub.snapshot()

    @property
    def faults(self) -> Faults:
        """The faults that are injected between this platform and its clients."""
        return self._faults

    def expire_tokens(self, installation_id: Optional[str] = None) -> None:
        """Expire the valid runtime tokens: the next request with one of them gets 401."""
        self._store.expire_tokens(installation_id)

    def drop_streams(self) -> None:
        """Cut every live stream at its socket, as a failing network would."""
        self._hub.drop_all()

    @property
    def hold_commands(self) -> bool:
        """While true, lose commands: they change the ``desired_state`` but are not sent on streams, now or later."""
        return self._hub.hold_commands

    @hold_commands.setter
    def hold_commands(self, value: bool) -> None:
        self._hub.hold_commands = bool(value)


class _Network:
    """Let the faults act on one run of a platform."""

    def __init__(self, platform: LocalPlatform, watch: Watch) -> None:
        self._platform = platform
        self._watch = watch

    def cut_streams(self) -> int:
        return self._platform._hub.drop_all()

    def stall_streams(self, seconds: float) -> int:
        return self._platform._hub.stall_all(seconds)

    def resume_streams(self) -> None:
        self._platform._hub.resume_all()

    def expire_tokens(self, installation_id: Optional[str]) -> int:
        return self._platform._store.expire_tokens(installation_id)

    def settle(self) -> None:
        self._platform._settle()

    def call_later(self, delay: float, callback: Callable[[], None]) -> None:
        self._watch.call_later(delay, callback)


def _api_error(refusal: Refusal) -> APIError:
    return APIError(refusal.status, refusal.code, refusal.message)


def _check_id(value: object, option: str) -> None:
    problem = ""
    try:
        check_id(value, option)
    except Refusal as refusal:
        problem = refusal.message
    if problem:
        raise ConfigurationError(problem.partition(" ")[2], option)


def _seconds(value: Any, option: str, highest: float = MAX_DURATION, zero: bool = False) -> float:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not (value >= 0 if zero else value > 0) or value > highest:
        raise ConfigurationError(f"must be a number of seconds {'from' if zero else 'above'} 0 to {highest:g}", option)
    return float(value)


def _timeout(value: Optional[float]) -> Optional[float]:
    return None if value is None else _seconds(value, "shutdown_timeout", zero=True)
