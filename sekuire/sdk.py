"""Share one agent's credentials, heartbeat and connections between any number of Workers."""

from __future__ import annotations

import functools
import os
import threading
from types import TracebackType
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Optional, Tuple, Type, Union

import attrs

from ._internal.checks import check_number
from ._internal.logs import enable_loggers, get_logger
from ._internal.raising import raises_here
from ._internal.threads import Deadline, check_process, check_starter, is_owned_by
from .audit.log import AuditLog
from .beacon import START_TIMEOUT, STOP_TIMEOUT, LeaseKeeper
from .config import (
    CREDENTIALS_FILE_VARIABLE,
    DECIDED_BY_SDK,
    ENVIRONMENT,
    OUTBOX_VARIABLE,
    POLICY_KEYS_VARIABLE,
    ClientConfig,
    ConnectionConfig,
    EnvFile,
    EnvironmentConfig,
    SDKConfig,
    TaskWorkerConfig,
    WorkerConfig,
    advice_on_variable,
    file_in_use,
    from_options,
    keep_quiet,
    method_of_options,
    policy_keys_from_environment,
    read_environment,
    source_of,
    unknown_variables,
    using_file,
    variable,
    with_source,
)
from .credentials import RuntimeCredentialsStore
from .errors import ConfigurationError, PolicyIntegrityError, PolicyViolationError
from .handlers.context import current_task
from .logging import print_as
from .wire.models import BeaconStatus, RuntimeCredentials
from .worker.worker import POOL_SIZE, Worker

if TYPE_CHECKING:
    from .client import SekuireClient
    from .manifest import Manifest
    from .policy.gateway import InstallationGateway
    from .policy.rulebook import LocalRules

log = get_logger("sekuire.sdk")

#: Seconds that a shutdown keeps for audit events: at least, also after its deadline, and at most.
_AUDIT_LEAST, _AUDIT_MOST = 1.0, 5.0
#: The severity of the audit event for a Beacon's new state.
_SEVERITY = {"connected": "info", "degraded": "warn", "revoked": "error"}


class _AuditedLease(LeaseKeeper):
    """Keep the lease of an SDK, and write each new state to its audit log."""

    audit: AuditLog

    def on_change(self, status: BeaconStatus) -> None:
        severity = _SEVERITY.get(status.state)
        if severity is not None:
            self.audit.health(
                status.state, severity, of="installation", installation_id=status.installation_id, reason=status.error
            )


class SekuireSDK:
    """Log an agent in, keep its lease, and make Workers that share both. ::

        with SekuireSDK("support-agent", install_token="skt_install_...") as sdk:
            worker = sdk.create_task_worker(max_workers=4)

            @worker.on_task("shorten")
            def shorten(ctx, input):
                return {"text": input["text"][:100]}

            worker.start(block=True)

    :meth:`from_env` reads the options from environment variables.

    Without a ``policy_gateway`` the SDK makes one, if the extra is installed (``pip install 'sekuire[policy]'``). The
    policy of the workspace then decides over the tasks of its Workers. The workspace is ``workspace_id``, or else the
    one that the platform names at the login. :meth:`log` writes to ``audit``, an :class:`~sekuire.audit.AuditLog`.

    Any thread may call its methods.

    :param agent_id: who the agent is.
    :param agent_name: a name for people; part of audit events.
    :param trusted_policy_keys: Ed25519 public keys, each a str in hex or base64. One of them must have signed the
        policy.
    :param policy_signature: ``"hash"``: a signature over the policy's hash alone is accepted too. Older policies can
        then be replayed.
    :param policy_path: a file that keeps the last good policy, so that a restart during an outage finds it.
    :param policy_options: further options of the :class:`~sekuire.PolicyGateway` that the SDK makes, such as
        ``on_violation``, ``on_unavailable``, ``on_change`` or ``storage_uri``.
    :param auto_heartbeat: beat from :meth:`start` on. False: beat only while a Worker runs.
    :param heartbeat_interval: seconds between beats, at most. A Worker that asks for less gets it while it runs.
    :param environment: such as ``"production"``; part of audit events.
    :param required: False: go on without the platform. A login that is refused or not possible makes the state
        *degraded* with its error. :meth:`start` and the ``start()`` of its Workers raise nothing then; they keep
        trying, or are off where there is nothing to log in with. A revocation is raised all the same.
    :param result_encoder: of its Workers, as in :class:`~sekuire.WorkerConfig`.
    :param quiet: print no lines for people on stderr, in all of the process. None: as ``SEKUIRE_QUIET`` says.
    :param log_format: ``"text"`` or ``"json"``: the form of the lines that the library prints where the program has no
        logging, in all of the process. None: as ``SEKUIRE_LOG_FORMAT`` says.
    :param approval_handler: decides on requests for approval of its Workers where the platform offers none. It approves
        by returning True, and by nothing else.
    :param health: where the health and the metrics of its Workers are shown over HTTP, such as
        ``("127.0.0.1", 8080)``. None: nowhere.
    :param logging_enabled: send audit events. False: neither those of :meth:`log` nor the library's own.
    :raises ConfigurationError: an option is unknown or wrong, or there is nothing to authenticate with.
    """

    # `_lock` guards `_workers`, `_is_started` and `_is_shut_down`. The SDK's threads are those of its Beacon, its
    # Workers, its policy gateway and `audit`.

    @method_of_options(SDKConfig)
    def __init__(self, options: Dict[str, Any]) -> None:
        config = from_options(SDKConfig, options)
        keep_quiet(config.quiet)
        print_as(config.log_format)
        self.pid = os.getpid()
        self.config = config
        self._gateway: Optional[InstallationGateway] = None
        if config.policy_gateway is not None:
            _refuse_unused(config)
        else:
            self._gateway = _make_gateway(config, self._note_violation)
            self.config = config = attrs.evolve(config, policy_gateway=self._gateway)
        # The file that keeps its Workers' results, where the environment names one.
        self.outbox: Optional[str] = None
        #: Capabilities that a manifest promises: a Worker that starts needs a handler for each.
        self.provided: Tuple[str, ...] = ()
        self._lock = threading.Lock()
        self._workers: List[Worker] = []
        self._is_started = False
        self._is_shut_down = False
        self._beacon = _AuditedLease(config, POOL_SIZE)
        self._installation = self._beacon.installation
        if self._gateway is not None:
            self._gateway.attach(self._installation.auth)
        self.audit = self._beacon.audit = AuditLog(config, self._installation)
        if self._installation.problem is not None:
            self.audit.disable()

    @classmethod
    @method_of_options(EnvironmentConfig, first="env_file")
    def from_env(cls, options: Dict[str, Any]) -> SekuireSDK:
        """Return an SDK with its options from the ``SEKUIRE_...`` variables, read now. Keywords win over variables.

        ``SEKUIRE_CREDENTIALS_FILE`` names a file that keeps the credentials. ``SEKUIRE_OUTBOX`` names a file that keeps
        the Workers' results until the platform has them. ``SEKUIRE_POLICY_PUBLIC_KEYS`` holds the keys that may sign a
        policy. A ``SEKUIRE_...`` variable that nothing reads is warned of.

        :param env_file: a file such as ``.env`` whose ``SEKUIRE_...`` lines count where the environment sets no such
            variable. None: no file is searched for.
        :raises ConfigurationError: a variable or option is missing or wrong, or the platform's address comes from a
            file and a credential does not; the error names it.
        """
        return _from_environment(cls, options, None)

    @classmethod
    def from_manifest(cls, path: Union[str, os.PathLike[str]] = "sekuire.yml", **overrides: Any) -> SekuireSDK:
        """Return an SDK for the agent that a manifest describes (``pip install 'sekuire[manifest]'``). ::

            sdk = SekuireSDK.from_manifest("sekuire.yml")

        The manifest gives the agent's id (``project.sekuire_id``, or the one that ``identity`` yields), its name
        (``project.name``) and its capabilities (``capabilities.provides``), each of which needs a handler when a Worker
        starts. Its ``permissions`` and ``rate_limits`` are rules beside the workspace's policy: both must allow.
        Everything else comes from the environment, as for :meth:`from_env`. Environment variables win over the
        manifest, and keywords win over both.

        :param path: the manifest's file.
        :param env_file: as for :meth:`from_env`.
        :raises ConfigurationError: the manifest, a variable or an option is missing or wrong; the error names it.
        """
        from .manifest import read_manifest  # Only this needs it.

        try:
            return _from_environment(cls, overrides, read_manifest(path))
        finally:
            # An error's frames must not hold plain tokens.
            overrides.clear()

    def _note_violation(
        self, theirs: Optional[Callable[[PolicyViolationError], object]], error: PolicyViolationError
    ) -> None:
        context = current_task.get()
        self.audit.policy(error, target=error.target, task_id=None if context is None else context.task_id)
        if theirs is not None:
            theirs(error)

    # -- life --

    @raises_here
    def start(self, timeout: float = START_TIMEOUT) -> None:
        """Log in and keep the lease.

        It waits at most ``timeout`` seconds (default 10) for the platform's first verdict. Without a verdict it
        returns, and the login goes on in the background. A Worker started afterwards then waits no longer than what is
        left of this time. With ``required=False`` it also returns if the login is refused or not possible: the state
        is then *degraded*.

        :raises AuthenticationError: the platform refused every login method.
        :raises RevokedError: the installation is revoked.
        :raises ConfigurationError: the SDK was started or shut down before, or ``timeout`` is not a number of seconds.
        """
        check_number("timeout", timeout, zero=True)
        check_starter("SekuireSDK")
        enable_loggers()
        check_process(self.pid, "SekuireSDK")
        with self._lock:
            if self._is_started or self._is_shut_down:
                raise ConfigurationError("an SDK starts once; make a new one", "SekuireSDK.start")
            self._is_started = True
        if self.config.auto_heartbeat:
            self._beacon.start(timeout)
        # After the Beacon: its login reports what was refused.
        self.audit.open(may_log_in=not self.config.auto_heartbeat)

    def shutdown(self, timeout: Optional[float] = None) -> None:
        """Stop all Workers side by side, send the remaining audit events and stop the heartbeat.

        Calling it again is harmless. A handler or a callback may call it: it requests the stop and returns.

        :param timeout: seconds for all of it. The default is the longest ``shutdown_timeout`` of the Workers.
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
        # After the reports, which write events, and before the Beacon closes the connections.
        self.audit.close(Deadline(min(max(deadline.remaining(), _AUDIT_LEAST), _AUDIT_MOST)))
        self._beacon.stop(STOP_TIMEOUT if timeout is None else min(timeout, STOP_TIMEOUT))

    @raises_here
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

    @method_of_options(TaskWorkerConfig, first="capabilities", left_out=DECIDED_BY_SDK)
    def create_task_worker(self, options: Dict[str, Any]) -> Worker:
        """Return a Worker that shares this SDK's credentials, heartbeat and connections.

        It accepts the options of :class:`~sekuire.WorkerConfig`, except those that say who the agent is.

        :param capabilities: the SDK's, unless given. The Worker adds the names given to ``on_task``.
        :param heartbeat_interval: seconds between beats while it runs.
        :raises ConfigurationError: an option is unknown or wrong, or the SDK was shut down.
        """
        for name in DECIDED_BY_SDK:
            if name in options:
                raise ConfigurationError("belongs to SekuireSDK(...), whose credentials its workers share", name)
        inherited = {
            field.name: getattr(self.config, field.name)
            for field in attrs.fields(ConnectionConfig)
            if field.name not in options
        }
        config = from_options(
            WorkerConfig,
            {
                **inherited,
                "outbox": self.outbox,
                "result_encoder": self.config.result_encoder,
                "approval_handler": self.config.approval_handler,
                "health": self.config.health,
                **options,
                "agent_id": self.config.agent_id,
                "capabilities": options.get("capabilities") or self.config.capabilities,
                "policy_gateway": self.config.policy_gateway,
            },
        )
        audit = self.audit if self.config.logging_enabled else None
        worker = Worker(config, _installation=self._installation, _audit=audit)
        worker.sdk = self
        with self._lock:
            if self._is_shut_down:
                raise ConfigurationError("this SDK was shut down; make a new one", "SekuireSDK.create_task_worker")
            self._workers.append(worker)
        return worker

    # -- tasks for others --

    def client(self) -> SekuireClient:
        """Return a client that submits tasks as this agent, with its runtime token. ::

            handle = sdk.client().submit("summarize", {"text": "..."}, agent_id="writer")

        It sees the tasks that this agent has submitted. Without ``agent_id`` a task is for this agent itself. The
        client uses the SDK's connections, and ends with them.

        :raises SekuireError: in a process forked from the one that made this SDK.
        """
        from .client import SekuireClient  # Most agents submit nothing.

        check_process(self.pid, "SekuireSDK")
        config = self.config
        shared = {field.name: getattr(config, field.name) for field in attrs.fields(ConnectionConfig)}
        options = ClientConfig(agent_id=config.agent_id, **shared)
        return SekuireClient.of_agent(options, self._installation.auth)

    def check_handlers(self) -> None:
        """Check that its Workers have a handler for each capability that a manifest promises.

        :raises ConfigurationError: one has none.
        """
        with self._lock:
            workers = list(self._workers)
        missing = [name for name in self.provided if all(one.handlers.find(name) is None for one in workers)]
        if missing:
            raise ConfigurationError(
                f"the manifest provides {', '.join(missing)}, and no handler is registered for it; register it with "
                "@worker.on_task(...), or remove it from the manifest",
                "capabilities.provides",
            )

    # -- audit --

    def log(self, event_type: str, data: Any = None, severity: str = "info") -> None:
        """Record an audit event and return at once. Another thread sends it soon, in a batch.

        Events recorded before :meth:`start` are kept until the login. After :meth:`shutdown` they are ignored. An
        event holds nothing but what is given here. Tokens of this process, a Secret in the data, and passwords within
        URLs are replaced by ``***``.

        :param event_type: ``"tool_execution"``, ``"model_call"``, ``"policy_violation"``, ``"policy_check"``,
            ``"network_access"``, ``"file_access"`` or ``"health"``.
        :param data: a mapping with a JSON form of at most 64 KiB. Another value becomes ``{"value": …}``. Data without
            a JSON form, or too large, is replaced by a short description and counted; it raises nothing.
        :param severity: ``"debug"``, ``"info"``, ``"warn"`` or ``"error"``.
        :raises ConfigurationError: an unknown type or severity.
        :raises SekuireError: in a process forked from the one that made this SDK.
        """
        self.audit.log(event_type, data, severity)

    # -- status --

    def is_started(self) -> bool:
        """Return True if :meth:`start` was called."""
        return self._is_started

    def is_connected(self) -> bool:
        """Return True if the platform accepted the last heartbeat."""
        return self._beacon.is_connected()

    @property
    def beacon_status(self) -> BeaconStatus:
        """Return the state of the heartbeat, as :attr:`Beacon.status <sekuire.Beacon.status>` does."""
        return self._beacon.status

    @property
    def policy_gateway(self) -> Any:
        """Return the :class:`~sekuire.PolicyGateway` of its Workers: the one given, or the one that the SDK made.

        It is None if the extra is not installed.
        """
        return self.config.policy_gateway

    @property
    def installation_credentials(self) -> RuntimeCredentials:
        """Return the current credentials. They are false as long as there is no installation. ::

            if sdk.installation_credentials:
                save(sdk.installation_credentials.to_env())

        ``to_env()`` gives them as environment variables.
        """
        return self._beacon.installation_credentials

    def __repr__(self) -> str:
        return f"<SekuireSDK {self.config.agent_id} {self._beacon.status.state}>"


def _from_environment(cls: Type[SekuireSDK], options: Dict[str, Any], manifest: Optional[Manifest]) -> SekuireSDK:
    path = options.pop("env_file", None)
    file: Optional[EnvFile] = None
    if path is not None:
        from . import envfile  # Only for those who name a file.

        file = envfile.read(path)
    with using_file(file):
        return _from_variables(cls, options, manifest)


def _from_variables(cls: Type[SekuireSDK], options: Dict[str, Any], manifest: Optional[Manifest]) -> SekuireSDK:
    found: Optional[ConfigurationError] = None
    for name, meant in unknown_variables().items():
        log.warning("unknown environment variable %s; %s", name, advice_on_variable(meant))
    complete, sources = read_environment(options, tuple(ENVIRONMENT))
    try:
        _check_file(options)
        outbox = variable(OUTBOX_VARIABLE, "outbox")
        _read_files_and_keys(complete, sources)
        if manifest is not None:
            _read_manifest(manifest, complete, sources)
        if "agent_id" not in complete:
            raise ConfigurationError("is required; set SEKUIRE_AGENT_ID or pass agent_id=...", "agent_id")
        sdk = cls(**complete)
    except ConfigurationError as error:
        # Without its traceback, whose frames hold the options, tokens included.
        found = error.with_traceback(None)
    finally:
        complete.clear()
    if found is not None:
        raise with_source(found, sources)
    sdk.outbox = outbox
    sdk.provided = () if manifest is None else manifest.capabilities
    return sdk


def _make_gateway(config: SDKConfig, note_violation: Callable[..., None]) -> Optional[InstallationGateway]:
    from .policy.client import missing_packages

    wanted = config.trusted_policy_keys or config.policy_path is not None or config.policy_options
    if missing_packages() and not wanted:
        log.debug("without the extra (pip install 'sekuire[policy]') no policy is enforced")
        return None
    from .policy.gateway import InstallationGateway

    options = dict(config.policy_options or {})
    theirs = options.get("on_violation")
    if theirs is None or callable(theirs):
        options["on_violation"] = functools.partial(note_violation, theirs)
    try:
        return InstallationGateway(config, options)
    except ConfigurationError as error:
        problem = error
    option = {"path": "policy_path"}.get(problem.option or "", problem.option)
    raise ConfigurationError(problem.problem, option, problem.source)


def _check_file(options: Dict[str, Any]) -> None:
    """Check that no credential from elsewhere goes to an address that a file names.

    :raises ConfigurationError: one would.
    """
    file = file_in_use()
    if file is None or "api_base_url" in options:
        return
    from . import envfile

    names = (*envfile.CREDENTIALS, "credentials_store")
    elsewhere = {f"the option {name}": options.get(name) for name in names}
    stored = variable(CREDENTIALS_FILE_VARIABLE) if options.get("credentials_store") is None else None
    envfile.check_credentials(file, elsewhere, stored)


def _read_files_and_keys(options: Dict[str, Any], sources: Dict[str, str]) -> None:
    """Add to ``options`` what the environment says of the credentials' file and the policy's keys.

    :raises ConfigurationError: a variable is wrong, or the agent's id is missing.
    """
    if "credentials_store" not in options:
        path = variable(CREDENTIALS_FILE_VARIABLE, "credentials_store")
        if path is not None:
            options["credentials_store"] = _store_at(path)
    keys = policy_keys_from_environment()
    if keys and "trusted_policy_keys" not in options and options.get("policy_gateway") is None:
        options["trusted_policy_keys"] = keys
        sources["trusted_policy_keys"] = source_of(POLICY_KEYS_VARIABLE)
    if "policy_signature" in sources and options.get("policy_gateway") is not None:
        # As with the keys: the variable is for a gateway that the SDK makes.
        del options["policy_signature"]


def _read_manifest(manifest: Manifest, options: Dict[str, Any], sources: Dict[str, str]) -> None:
    """Add to ``options`` what a manifest says, unless it is given elsewhere.

    :raises ConfigurationError: the manifest names no agent, or its rules cannot be enforced.
    """
    for warning in manifest.warnings:
        log.warning("%s: %s", manifest.path, warning)
    if "agent_id" not in options:
        options["agent_id"] = manifest.agent_id()
        sources["agent_id"] = manifest.path
    elif options["agent_id"] != manifest.sekuire_id is not None:
        log.info("the agent is %s, not the manifest's %s", options["agent_id"], manifest.sekuire_id)
    for option, value in (("agent_name", manifest.name), ("capabilities", manifest.capabilities)):
        if value and option not in options:
            options[option] = value
            sources[option] = manifest.path
    if not manifest.rules:
        return
    if options.get("policy_gateway") is not None:
        raise ConfigurationError(
            "cannot enforce the permissions of a manifest; leave it out, and the SDK makes a gateway that does",
            "policy_gateway",
        )
    rules = _local_rules(manifest)
    options["policy_options"] = {**(options.get("policy_options") or {}), "local": rules}


def _local_rules(manifest: Manifest) -> LocalRules:
    from .policy.client import require_extra
    from .policy.document import Policy
    from .policy.rulebook import LocalRules

    require_extra()
    try:
        policy = Policy.from_content(manifest.rules, policy_id="manifest")
        for warning in policy.warnings:
            log.warning("%s: %s", manifest.path, warning)
        return LocalRules(policy, os.path.basename(manifest.path))
    except PolicyIntegrityError as error:
        problem = str(error)
    raise ConfigurationError(problem, None, manifest.path)


def _refuse_unused(config: SDKConfig) -> None:
    """Raise ConfigurationError if there are options for a gateway that the SDK does not make."""
    defaults = {field.name: field.default for field in attrs.fields(SDKConfig)}
    for name in ("trusted_policy_keys", "policy_signature", "policy_path", "policy_options"):
        value = getattr(config, name)
        if value and value != defaults[name]:
            raise ConfigurationError("belongs to the PolicyClient or PolicyGateway given with policy_gateway=", name)


def _store_at(path: str) -> RuntimeCredentialsStore:
    try:
        return RuntimeCredentialsStore(path=path)
    except ConfigurationError as error:
        found = error
    raise ConfigurationError(found.problem, "credentials_store", source_of(CREDENTIALS_FILE_VARIABLE))
