"""The SDK: one agent's credentials, heartbeat and connections, shared by any number of Workers."""

from __future__ import annotations

import functools
import os
import threading
from types import TracebackType
from typing import TYPE_CHECKING, Any, Callable, List, Mapping, Optional, Sequence, Tuple, Type, Union

import attrs

from ._internal.logs import get_logger
from ._internal.threads import Deadline, check_process, check_starter, is_owned_by
from .audit.log import AuditLog
from .beacon import STOP_TIMEOUT, Beacon
from .config import (
    CREDENTIALS_FILE_VARIABLE,
    ENVIRONMENT,
    OUTBOX_VARIABLE,
    POLICY_KEYS_VARIABLE,
    ConnectionConfig,
    SDKConfig,
    WorkerConfig,
    from_options,
    policy_keys_from_environment,
    read_environment,
    source_of,
    variable,
)
from .credentials import RuntimeCredentialsStore
from .errors import ConfigurationError, PolicyViolationError
from .handlers.context import current_task
from .secret import Secret
from .wire import protocol
from .wire.models import BeaconStatus, RuntimeCredentials
from .worker.worker import POOL_SIZE, Worker

if TYPE_CHECKING:
    from .policy.gateway import InstallationGateway

log = get_logger("sekuire.sdk")

_OWN = ("agent_id", "api_base_url", "install_token", "runtime_token", "installation_id", "refresh_token")
#: Seconds a shutdown keeps for audit events: the least, also where its time is over, and the most.
_AUDIT_LEAST, _AUDIT_MOST = 1.0, 5.0
#: How grave an audit event of a Beacon's new state is.
_GRAVITY = {"connected": "info", "degraded": "warn", "revoked": "error"}

_FORBIDDEN = (*_OWN, "credentials_store", "token_provider", "policy_gateway")


class SekuireSDK:
    """An agent under Sekuire's governance: logs in, keeps the lease, and makes Workers that share both.

    Without a ``policy_gateway`` it makes one, where the extra is installed (``pip install 'sekuire[policy]'``): the
    policy of its workspace then decides over its Workers' tasks. The workspace is ``workspace_id``, or else the one
    that the platform tells at the login.

    Any thread may call its methods; ``_lock`` guards the list of Workers. Its threads are its Beacon's, its Workers',
    its policy gateway's, and that of ``audit``, the :class:`~sekuire.audit.AuditLog` that :meth:`log` writes to.

    :param agent_id: who the agent is.
    :param agent_name: a name for people; part of audit events.
    :param trusted_policy_keys: Ed25519 public keys, each a str in hex or base64, one of which must have signed the
        policy.
    :param policy_path: a file that keeps the last good policy, so that a restart during an outage finds one.
    :param policy_options: further options of the :class:`~sekuire.PolicyGateway` that it makes, such as
        ``on_violation``, ``on_unavailable``, ``on_change`` or ``storage_uri``.
    :param auto_heartbeat: beat from :meth:`start` on; False: only while a Worker runs.
    :param heartbeat_interval: seconds between beats, at most; a Worker that asks for less gets it while it runs.
    :param environment: such as ``"production"``; part of audit events.
    :param logging_enabled: False: no audit events, neither of :meth:`log` nor of the library's own.
    :raises ConfigurationError: a wrong option, or nothing to authenticate with.
    """

    def __init__(
        self,
        agent_id: str,
        *,
        api_base_url: str = protocol.DEFAULT_API_BASE_URL,
        agent_name: Optional[str] = None,
        workspace_id: Optional[str] = None,
        api_key: Union[str, Secret, None] = None,
        install_token: Union[str, Secret, None] = None,
        runtime_token: Union[str, Secret, None] = None,
        installation_id: Optional[str] = None,
        refresh_token: Union[str, Secret, None] = None,
        credentials_store: Optional[RuntimeCredentialsStore] = None,
        policy_gateway: Any = None,
        trusted_policy_keys: Sequence[str] = (),
        policy_path: Union[str, os.PathLike[str], None] = None,
        policy_options: Optional[Mapping[str, Any]] = None,
        capabilities: Sequence[str] = (),
        heartbeat_interval: float = 60.0,
        auto_heartbeat: bool = True,
        environment: str = "production",
        logging_enabled: bool = True,
        connect_timeout: float = 3.0,
        read_timeout: float = 10.0,
        verify: Union[bool, str] = True,
        client_cert: Union[str, Tuple[str, str], None] = None,
        proxies: Optional[Mapping[str, str]] = None,
        allow_insecure_http: bool = False,
        endpoints: Optional[Mapping[str, str]] = None,
    ) -> None:
        options = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        # An error's frames must not hold plain tokens.
        del install_token, runtime_token, refresh_token, api_key
        try:
            config = from_options(SDKConfig, options)
        finally:
            options.clear()
        self._set_up(config)

    @classmethod
    def from_env(cls, **overrides: Any) -> SekuireSDK:
        """An SDK with its options from the ``SEKUIRE_...`` variables, read now; ``overrides`` win over them.

        ``SEKUIRE_CREDENTIALS_FILE`` names a file in which the credentials last, ``SEKUIRE_OUTBOX`` one that keeps its
        Workers' results until the platform has them, ``SEKUIRE_POLICY_PUBLIC_KEYS`` the keys that may sign a policy.

        :raises ConfigurationError: a variable or option is missing or wrong; the text names it.
        """
        options, sources = read_environment(overrides, tuple(ENVIRONMENT))
        if "credentials_store" not in options:
            path = variable(CREDENTIALS_FILE_VARIABLE, "credentials_store")
            if path is not None:
                options["credentials_store"] = _store_at(path)
        outbox = variable(OUTBOX_VARIABLE, "outbox")
        keys = policy_keys_from_environment()
        if keys and "trusted_policy_keys" not in options and options.get("policy_gateway") is None:
            options["trusted_policy_keys"] = keys
            sources["trusted_policy_keys"] = source_of(POLICY_KEYS_VARIABLE)
        if "agent_id" not in options:
            raise ConfigurationError("is required; set SEKUIRE_AGENT_ID or pass agent_id=...", "agent_id")
        try:
            config = from_options(SDKConfig, options, sources)
        finally:
            options.clear()
            overrides.clear()
        sdk = cls.__new__(cls)
        sdk._set_up(config, sources.get("trusted_policy_keys"))
        sdk._outbox = outbox
        return sdk

    def _set_up(self, config: SDKConfig, keys_source: Optional[str] = None) -> None:
        self.pid = os.getpid()
        self._config = config
        self._gateway: Optional[InstallationGateway] = None
        if config.policy_gateway is not None:
            _refuse_unused(config)
        else:
            self._gateway = self._make_gateway(config, keys_source)
            self._config = config = attrs.evolve(config, policy_gateway=self._gateway)
        self._outbox: Optional[str] = None
        self._lock = threading.Lock()
        self._workers: List[Worker] = []
        self._is_started = False
        self._is_shut_down = False
        self._beacon = Beacon._from_config(config, POOL_SIZE, self._note_status)
        installation = self._beacon._installation
        if self._gateway is not None:
            self._gateway.attach(installation.auth)
        self.audit = AuditLog(config, installation)

    def _make_gateway(self, config: SDKConfig, keys_source: Optional[str]) -> Optional[InstallationGateway]:
        from .policy.client import missing_packages

        wanted = config.trusted_policy_keys or config.policy_path is not None or config.policy_options
        if missing_packages() and not wanted:
            log.debug("without the extra (pip install 'sekuire[policy]') no policy is enforced")
            return None
        from .policy.gateway import InstallationGateway

        options = dict(config.policy_options or {})
        theirs = options.get("on_violation")
        if theirs is None or callable(theirs):
            options["on_violation"] = functools.partial(self._note_violation, theirs)
        try:
            return InstallationGateway(config, options)
        except ConfigurationError as error:
            problem = error
        option = {"path": "policy_path"}.get(problem.option or "", problem.option)
        origin = keys_source if option == "trusted_policy_keys" else None
        raise ConfigurationError(problem.problem, option, problem.source or origin)

    def _note_violation(
        self, theirs: Optional[Callable[[PolicyViolationError], object]], error: PolicyViolationError
    ) -> None:
        context = current_task.get()
        self.audit.policy(error, target=error.target, task_id=None if context is None else context.task_id)
        if theirs is not None:
            theirs(error)

    # -- life --

    def start(self) -> None:
        """Log in and keep the lease. Waits up to 10 s for the platform's first verdict; without one it goes on alone.

        :raises AuthenticationError: the platform refused every way of authenticating.
        :raises RevokedError: the installation is revoked.
        """
        check_starter("SekuireSDK")
        check_process(self.pid, "SekuireSDK")
        with self._lock:
            if self._is_started or self._is_shut_down:
                raise ConfigurationError("an SDK starts once; make a new one", "SekuireSDK.start")
            self._is_started = True
        if self._config.auto_heartbeat:
            self._beacon.start()
        # Not before: a login is the Beacon's, which tells what was refused.
        self.audit.open(may_log_in=not self._config.auto_heartbeat)

    def shutdown(self, timeout: Optional[float] = None) -> None:
        """Stop all Workers side by side, send what audit events are left, stop the heartbeat, within ``timeout`` s.

        The default is the longest ``shutdown_timeout`` of the Workers. Idempotent; from a handler or a callback it
        asks for the stop and returns.
        """
        check_process(self.pid, "SekuireSDK")
        with self._lock:
            self._is_shut_down = True
            workers = list(self._workers)
        if any(is_owned_by(one) for one in (*workers, self._beacon)):
            threading.Thread(
                target=self._shut_down, args=(workers, timeout), name="sekuire-shutdown", daemon=True
            ).start()
        else:
            self._shut_down(workers, timeout)

    def _shut_down(self, workers: List[Worker], timeout: Optional[float]) -> None:
        longest = max((worker.config.shutdown_timeout for worker in workers), default=STOP_TIMEOUT)
        deadline = Deadline(longest if timeout is None else timeout)
        for worker in workers:
            worker.request_stop(timeout)
        for worker in workers:
            worker.stop(timeout)
        if self._gateway is not None:
            self._gateway.close()
        if self._is_started:
            self.audit.health("stopped", of="installation")
        # After the reports, which make events; before the Beacon, which closes the connections.
        self.audit.close(Deadline(min(max(deadline.remaining(), _AUDIT_LEAST), _AUDIT_MOST)))
        self._beacon.stop(STOP_TIMEOUT if timeout is None else min(timeout, STOP_TIMEOUT))

    def __enter__(self) -> SekuireSDK:
        self.start()
        return self

    def __exit__(
        self,
        kind: Optional[Type[BaseException]],
        error: Optional[BaseException],
        traceback: Optional[TracebackType],
    ) -> None:
        self.shutdown()

    # -- workers --

    def create_task_worker(
        self, capabilities: Sequence[str] = (), heartbeat_interval: float = 10.0, **options: Any
    ) -> Worker:
        """A Worker that shares this SDK's credentials, heartbeat and connections.

        :param capabilities: united with the names given to ``on_task``.
        :param heartbeat_interval: seconds between beats while it runs.
        :param options: further options of :class:`~sekuire.WorkerConfig`, but for those that say who the agent is.
        :raises ConfigurationError: a wrong option, or an SDK that was shut down.
        """
        for name in _FORBIDDEN:
            if name in options:
                raise ConfigurationError("belongs to SekuireSDK(...), whose credentials its workers share", name)
        inherited = {
            field.name: getattr(self._config, field.name)
            for field in attrs.fields(ConnectionConfig)
            if field.name not in options
        }
        config = from_options(
            WorkerConfig,
            {
                **inherited,
                "outbox": self._outbox,
                **options,
                "agent_id": self._config.agent_id,
                "capabilities": capabilities or self._config.capabilities,
                "heartbeat_interval": heartbeat_interval,
                "policy_gateway": self._config.policy_gateway,
            },
        )
        audit = self.audit if self._config.logging_enabled else None
        worker = Worker(config, _installation=self._beacon._installation, _audit=audit)
        worker.sdk = self
        with self._lock:
            if self._is_shut_down:
                raise ConfigurationError("this SDK was shut down; make a new one", "SekuireSDK.create_task_worker")
            self._workers.append(worker)
        return worker

    # -- telling --

    def log(self, event_type: str, data: Any = None, severity: str = "info") -> None:
        """Note an audit event. It is sent in a batch, soon, by another thread; this returns at once.

        Before :meth:`start` events are kept until the login; after :meth:`shutdown` they are ignored. Nothing is in
        them but what is given here; live tokens of this installation are replaced by ``***``.

        :param event_type: ``"tool_execution"``, ``"model_call"``, ``"policy_violation"``, ``"policy_check"``,
            ``"network_access"``, ``"file_access"`` or ``"health"``.
        :param data: a mapping with a JSON form, at most 64 KiB of it; another value becomes ``{"value": …}``. One
            without a JSON form, or too large, is replaced by a short description and counted: it is no error.
        :param severity: ``"debug"``, ``"info"``, ``"warn"`` or ``"error"``.
        :raises ConfigurationError: an unknown type or severity.
        :raises SekuireError: in a process forked from the one that made this SDK.
        """
        self.audit.log(event_type, data, severity)

    def _note_status(self, status: BeaconStatus) -> None:
        severity = _GRAVITY.get(status.state)
        if severity is not None:
            self.audit.health(
                status.state, severity, of="installation", installation_id=status.installation_id, reason=status.error
            )

    # -- where it stands --

    def is_connected(self) -> bool:
        """Whether the last heartbeat was taken."""
        return self._beacon.is_connected()

    @property
    def beacon_status(self) -> BeaconStatus:
        return self._beacon.status

    @property
    def policy_gateway(self) -> Any:
        """The :class:`~sekuire.PolicyGateway` that decides for its Workers: the one given, or the one it made; None
        where the extra is not installed."""
        return self._config.policy_gateway

    @property
    def installation_credentials(self) -> RuntimeCredentials:
        """The credentials now; ``to_env()`` gives them as environment variables."""
        return self._beacon.installation_credentials

    def __repr__(self) -> str:
        if not hasattr(self, "_beacon"):
            return "<SekuireSDK (not set up)>"
        return f"<SekuireSDK {self._config.agent_id} {self._beacon.status.state}>"


def _refuse_unused(config: SDKConfig) -> None:
    """:raises ConfigurationError: options for a gateway that is not made."""
    for name in ("trusted_policy_keys", "policy_path", "policy_options"):
        if getattr(config, name):
            raise ConfigurationError("belongs to the PolicyClient or PolicyGateway given with policy_gateway=", name)


def _store_at(path: str) -> RuntimeCredentialsStore:
    try:
        return RuntimeCredentialsStore(path=path)
    except ConfigurationError as error:
        found = error
    raise ConfigurationError(found.problem, "credentials_store", source_of(CREDENTIALS_FILE_VARIABLE))
