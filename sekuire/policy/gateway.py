"""Decide for each task by the policy in force, and keep that policy the active one."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import threading
from typing import Any, Callable, Literal, Mapping, Optional, Sequence, Union

from .._internal.clock import time
from .._internal.logs import get_logger
from .._internal.tally import Tally
from .._internal.threads import Deadline
from ..config import (
    ENVIRONMENT,
    POLICY_OVERRIDE_VARIABLE,
    SIGNATURE_FORMS,
    SDKConfig,
    boolean_variable,
    is_production,
    source_of,
    variable,
)
from ..credentials import Authenticator
from ..errors import (
    ConfigurationError,
    PolicyIntegrityError,
    PolicyUnavailableError,
    PolicyViolationError,
    SekuireError,
    TransportError,
)
from ..secret import Secret, discreet
from ..transport.http import Reply
from ..wire import protocol
from .client import PolicyFetcher
from .decision import MESSAGES
from .document import Policy, read_document
from .enforcer import PolicyEnforcer
from .in_force import Listener, PolicyInForce
from .limits import RateLimiter
from .loader import Loader
from .rulebook import LocalRules
from .source import InstallationSource, Workspace

__all__ = ["InstallationGateway", "PolicyGateway", "may_only_warn"]

log = get_logger("sekuire.policy")

#: Most bytes of a policy in a file.
_LONGEST_FILE = 1024 * 1024
#: Seconds that close() waits for the thread. One in the middle of a request ends by itself.
_CLOSE_TIMEOUT = 2.0
#: Seconds that a first decision waits for a first answer.
_LOAD_TIMEOUT = 10.0

_UNKNOWN = (
    "the workspace is not known: the platform did not name it at the login; give workspace_id= (SEKUIRE_WORKSPACE_ID)"
)
_PINNED_AND_UNKNOWN = f"a policy key is pinned, and {_UNKNOWN}"
_REQUIRED_AND_UNKNOWN = f"policy_required=True, and {_UNKNOWN}"


class PolicyGateway:
    """Decide whether each task of a Worker may run, and follow the changes that heartbeats announce. ::

        store = RuntimeCredentialsStore()
        login = {"agent_id": "my-agent", "install_token": os.environ["SEKUIRE_INSTALL_TOKEN"]}
        with PolicyClient(credentials_store=store) as client, PolicyGateway(client, "ws_1") as gateway:
            worker = create_worker(**login, credentials_store=store, policy_gateway=gateway)
            worker.on_task("echo", lambda ctx, input: input)
            worker.start(block=True)

    Decisions come from the policy in force, in memory. The last good policy goes on deciding while the platform is
    unreachable or offers a policy that is refused. Until a policy was loaded everything is denied
    (:class:`PolicyUnavailableError`). A workspace without a policy allows everything. A new policy decides from the
    next task on.

    Any thread may call anything. A decision never waits for a policy that is loaded in the background.

    :param client: fetches and verifies. It stays its maker's to close.
    :param workspace_id: whose policy counts.
    :param warn_only: log what would be denied, and allow it. ``SEKUIRE_POLICY_DEV_OVERRIDE=1`` does the same.
    :param on_violation: as for :class:`~sekuire.PolicyEnforcer`.
    :param on_unavailable: ``"deny"`` or ``"allow"`` while no policy was ever loaded.
    :param on_change: ``"continue"``: running tasks go on under the policy they began with. ``"cancel"``: the context of
        a task whose capability a new policy does not allow is cancelled, with the reason "policy changed".
    :param storage_uri: where the counts of rate limits are, such as ``redis://host:6379``, for processes that share
        them; None: in this process.
    :param environment: where this runs (default: ``SEKUIRE_ENVIRONMENT``, or ``"production"``). In production, and
        wherever a key is pinned, ``warn_only`` and the override are refused.
    :param local: rules that must allow too, as :meth:`SekuireSDK.from_manifest <sekuire.SekuireSDK.from_manifest>` has
        them.
    :raises ConfigurationError: a wrong option, or the extra is not installed.
    """

    # Threads: a decision reads one reference and takes no lock of this object; the limiter has one of its own. The
    # loader has the thread, and the policy in force the order of two answers: see there.

    @discreet
    def __init__(
        self,
        client: PolicyFetcher,
        workspace_id: Union[str, Workspace],
        *,
        warn_only: bool = False,
        on_violation: Optional[Callable[..., object]] = None,
        on_unavailable: str = "deny",
        on_change: str = "continue",
        storage_uri: Union[str, Secret, None] = None,
        environment: Optional[str] = None,
        local: Optional[LocalRules] = None,
    ) -> None:
        workspace = workspace_id if isinstance(workspace_id, Workspace) else Workspace(workspace_id)
        if not isinstance(workspace_id, Workspace) and not protocol.is_id(workspace_id):
            raise ConfigurationError(f"must be a workspace's id, got {workspace_id!r}", "workspace_id")
        if not isinstance(client, PolicyFetcher):
            raise ConfigurationError(f"must be a PolicyClient, got {type(client).__name__}", "client")
        _check_choice("on_unavailable", on_unavailable, ("deny", "allow"))
        _check_choice("on_change", on_change, ("continue", "cancel"))
        if on_violation is not None and not callable(on_violation):
            raise ConfigurationError(f"must be callable, got {type(on_violation).__name__}", "on_violation")
        only_warns = may_only_warn(warn_only, environment, client.is_pinned)
        if not client.proves_version and not isinstance(client, _FileFetcher):
            log.warning(
                "policy_signature is 'hash': older policies can be replayed, because the signature proves neither "
                "version nor workspace"
            )
        self.client = client
        self._workspace = workspace
        # Made now, whether the workspace is known or not: a store that cannot be used must be reported at once.
        self.limiter = RateLimiter(storage_uri, namespace=workspace.workspace_id or "?")
        #: What was denied, by rule.
        self.denials = Tally()
        report = functools.partial(_count_denial, self.denials, on_violation)
        enforcer = PolicyEnforcer(None, only_warns, report, limiter=self.limiter, local=local)
        #: What decides where there is no workspace, or None if nothing does.
        self._alone = None if local is None else enforcer
        self.in_force = PolicyInForce(
            client,
            enforcer,
            allows_without=on_unavailable == "allow" or only_warns,
            cancels=on_change == "cancel",
        )
        self.loader = Loader(client, workspace, self.in_force)

    @classmethod
    def from_file(
        cls,
        path: Union[str, os.PathLike[str]],
        *,
        trusted_policy_keys: Sequence[str] = (),
        policy_signature: Literal["bound", "hash"] = "bound",
        warn_only: bool = False,
        on_violation: Optional[Callable[..., object]] = None,
        storage_uri: Optional[str] = None,
        environment: Optional[str] = None,
    ) -> PolicyGateway:
        """Return a gateway that decides by a policy in a file, and asks no platform. ::

            gateway = PolicyGateway.from_file("policy.json")
            worker = create_worker(agent_id="my-agent", install_token="skt_...", policy_gateway=gateway)

        The file holds a policy as ``sekuire policy pull`` writes it, which is verified, or the content of one.
        :meth:`refresh` reads it again. If the platform names another policy as the active one, that is an error in the
        log, because nothing enforces it.

        :param trusted_policy_keys: one of them must have signed the policy. A content alone is then refused.
        :param policy_signature: ``"hash"``: a signature over the policy's hash alone is accepted too.
        :raises ConfigurationError: the file cannot be read, a wrong option, or the extra is not installed.
        :raises PolicyIntegrityError: what the file holds is refused.
        """
        _check_choice("policy_signature", policy_signature, SIGNATURE_FORMS)
        client = _FileFetcher(path, trusted_policy_keys, policy_signature)
        policy = client.read()
        gateway = _FileGateway(
            client,
            policy.workspace_id,
            warn_only=warn_only,
            on_violation=on_violation,
            storage_uri=storage_uri,
            environment=environment,
        )
        gateway.refresh()
        return gateway

    # -- deciding --

    @property
    def policy(self) -> Optional[Policy]:
        """Return the policy in force, or None if the workspace has none or none could be loaded."""
        return self.in_force.standing.policy

    @property
    def enforcer(self) -> PolicyEnforcer:
        """Return what decides now, for questions about tools, domains, paths and models.

        Do not keep it: after a change of the policy it is another one.
        """
        return self._current()

    @property
    def is_active(self) -> bool:
        """Return True if there is a workspace whose policy can be asked for. Without one nothing is enforced."""
        return self._workspace.workspace_id is not None

    def is_policy_missing(self) -> bool:
        """Return True if everything is denied because no policy was ever loaded. It asks nobody."""
        in_force = self.in_force
        if in_force.standing.is_loaded or in_force.allows_without:
            return False
        return self.is_active or self.client.is_pinned or in_force.is_required

    def check_task(self, capability: str, tool: Optional[str] = None) -> Optional[PolicyEnforcer]:
        """Check that a task may begin, all of it by one policy. Return the enforcer that decided.

        :param tool: the tool that the task names, checked as its capability is.
        :raises PolicyViolationError: the capability or the tool is not allowed, or too many tasks have begun.
        :raises PolicyUnavailableError: no policy could be loaded, or the workspace is not known, and a key is pinned or
            a policy required.
        :raises ConfigurationError: rates are limited, and counted in the process that this one was forked from.
        """
        if not self.in_force.standing.is_loaded and not self.is_active:
            if self.client.is_pinned and not self.in_force.allows_without:
                # Whoever answers in the platform's place must not evade the key by naming no workspace.
                raise PolicyUnavailableError(_PINNED_AND_UNKNOWN)
            if self.in_force.is_required:
                raise PolicyUnavailableError(_REQUIRED_AND_UNKNOWN)
            if self._alone is None:
                return None
            enforcer = self._alone
        else:
            enforcer = self._current()
        try:
            # Rates last: a task that is denied must not use up what another one may need.
            enforcer.enforce_task(capability, tool)
            enforcer.enforce_rate_limit("requests")
        except PolicyViolationError as error:
            raise _unavailable(error) from None
        return enforcer

    def check_request(self) -> None:
        """Count one request against the policy's rate limits.

        :raises PolicyViolationError: a limit is reached; ``retry_after`` says for how long.
        :raises PolicyUnavailableError: no policy could be loaded.
        """
        self._enforce(PolicyEnforcer.enforce_rate_limit, "requests")

    def check_capability(self, name: str) -> None:
        """Check that tasks of this capability may run.

        :raises PolicyViolationError: they may not.
        :raises PolicyUnavailableError: no policy could be loaded.
        """
        self._enforce(PolicyEnforcer.enforce_capability, name)

    def check_tool(self, name: str) -> None:
        """Check that this tool may be used.

        :raises PolicyViolationError: it may not.
        :raises PolicyUnavailableError: no policy could be loaded.
        """
        self._enforce(PolicyEnforcer.enforce_tool, name)

    def _enforce(self, question: Callable[[PolicyEnforcer, str], None], subject: str) -> None:
        try:
            question(self._current(), subject)
        except PolicyViolationError as error:
            raise _unavailable(error) from None

    def _current(self) -> PolicyEnforcer:
        loader = self.loader
        standing = self.in_force.standing
        if not standing.is_loaded and not loader.is_tried:
            # Nobody has loaded it, and a first question deserves an answer.
            with contextlib.suppress(PolicyUnavailableError):
                self.ensure_loaded()
            standing = self.in_force.standing
        if time.monotonic() >= loader.due or not standing.is_loaded:
            loader.wake(may_wait=False)
        return standing.enforcer

    # -- staying up to date --

    def ensure_loaded(self, timeout: float = _LOAD_TIMEOUT, stop: Optional[threading.Event] = None) -> None:
        """Wait for the first answer, unless it came before. Without one decide by ``PolicyClient(path=)``.

        A Worker calls this after its login and before its first task. The loading goes on in the background.

        :param timeout: seconds to wait at most.
        :param stop: ends the wait too.
        :raises PolicyUnavailableError: there is neither an answer nor a stored policy.
        """
        if not self.in_force.standing.is_loaded and self.is_active:
            self.loader.wait(timeout, stop)

    def require_policy(self) -> None:
        """Refuse later answers that the workspace has no policy. The last good one stays in force.

        A Worker with ``policy_required=True`` calls this before it asks for a policy.
        """
        self.in_force.require()

    def refresh(self) -> Optional[Policy]:
        """Ask the platform now, on this thread. Return the policy in force then, or None if the workspace has none.

        If it raises, the last good policy stays in force.

        :raises SekuireError: as :meth:`PolicyClient.fetch_active_policy`.
        """
        return self.loader.load()

    def on_heartbeat_response(self, response: Any) -> None:
        """Load the policy in the background if the platform names another one than the one in force.

        :param response: a :class:`~sekuire.wire.models.HeartbeatReply`, or the answer's JSON as a mapping.
        """
        if self.is_active:
            self.loader.compare(_hash_named(response))

    def add_listener(self, listener: Listener) -> None:
        """With ``on_change="cancel"``: call ``listener(is_allowed)`` after each change, on the thread that loaded it.

        ``is_allowed(capability, tool=None)`` asks the new policy.
        """
        self.in_force.add_listener(listener)

    def remove_listener(self, listener: Listener) -> None:
        """Undo :meth:`add_listener`."""
        self.in_force.remove_listener(listener)

    def close(self, timeout: float = _CLOSE_TIMEOUT) -> None:
        """End the thread, within ``timeout`` seconds, and close the connections to a shared store of rate limits.

        The policy in force goes on deciding. Idempotent.
        """
        self.loader.close()
        self.limiter.close()
        self.loader.join(timeout)

    def __enter__(self) -> PolicyGateway:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        standing = self.in_force.standing
        state = "no policy" if standing.is_loaded else "new"
        if standing.policy is not None:
            state = f"version {standing.policy.version}"
        return f"<PolicyGateway {self._workspace.workspace_id} {state}>"


class InstallationGateway(PolicyGateway):
    """Decide for the workers of an installation, as the SDK does: with a client of its own, which it closes.

    It is made before the installation: see :meth:`attach`.

    :param options: of :class:`PolicyGateway`, by name.
    :raises ConfigurationError: a wrong option, or the extra is not installed.
    """

    def __init__(self, config: SDKConfig, options: Mapping[str, Any]) -> None:
        source = InstallationSource(config.workspace_id)
        client = PolicyFetcher(
            source,
            config.endpoints,
            config.trusted_policy_keys,
            config.policy_path,
            signature=config.policy_signature,
        )
        known = ("warn_only", "on_violation", "on_unavailable", "on_change", "storage_uri", "local")
        unknown = next((name for name in options if name not in known), None)
        if unknown is not None:
            raise ConfigurationError(f"has no {unknown!r}; known are {', '.join(known)}", "policy_options")
        super().__init__(client, source, environment=config.environment, **options)
        self._source = source

    def attach(self, auth: Authenticator) -> None:
        """Ask with the credentials of ``auth`` from now on. Its login names the workspace, unless one was given."""
        self._source.attach(auth)

    def close(self, timeout: float = _CLOSE_TIMEOUT) -> None:
        self.loader.close()
        self.client.close()
        super().close(timeout)


class _NoSource:
    """Stand for the platform where a policy comes from a file."""

    def get(self, path: str, deadline: Deadline) -> Reply:
        raise TransportError("the policy comes from a file")

    def close(self) -> None:
        return


class _FileFetcher(PolicyFetcher):
    """Read a policy from a file each time it is asked for."""

    def __init__(self, path: Union[str, os.PathLike[str]], keys: Sequence[str], signature: str) -> None:
        # Nothing but refresh() reads the file again.
        super().__init__(_NoSource(), protocol.Endpoints(), keys, cache_ttl=math.inf, signature=signature)
        self._path = os.fspath(path)

    def fetch_active_policy(self, workspace_id: str) -> Optional[Policy]:
        return self.read()

    def read(self) -> Policy:
        """Return the policy in the file, after every check."""
        problem = ""
        try:
            with open(self._path, "rb") as file:
                body = file.read(_LONGEST_FILE + 1)
            problem = "is larger than 1 MiB" if len(body) > _LONGEST_FILE else ""
        except OSError as error:
            problem = f"cannot be read: {error.strerror or type(error).__name__}"
        if problem:
            raise ConfigurationError(f"the file {self._path!r} {problem}", "path")
        payload = read_document(body)
        if isinstance(payload, dict) and "hash" in payload and "content" in payload:
            workspace_id = payload.get("workspace_id")
            return self._decode(body, workspace_id if protocol.is_id(workspace_id) else "local")
        if self.is_pinned:
            raise PolicyIntegrityError(
                f"{self._path!r} holds the content of a policy alone, which no pinned key can prove",
                expected="a signed policy",
                found="a content",
            )
        return Policy.from_content(payload)


class _FileGateway(PolicyGateway):
    """Decide by a file, whatever the platform names as the active policy."""

    _has_warned = False

    def on_heartbeat_response(self, response: Any) -> None:
        named = _hash_named(response)
        policy = self.policy
        if named and policy is not None and named != policy.hash and not self._has_warned:
            self._has_warned = True
            log.error(
                "the platform names another active policy (%s) than the file holds, and nothing enforces it; to follow "
                "the platform use SekuireSDK without policy_gateway=", named,
            )  # fmt: skip


def _hash_named(response: Any) -> Optional[str]:
    """Return the hash of the active policy that a heartbeat's answer names, or None."""
    if isinstance(response, Mapping):
        named = response.get("active_policy_hash")
    else:
        named = getattr(response, "active_policy_hash", None)
    return named.lower() if isinstance(named, str) else None


def _unavailable(error: PolicyViolationError) -> SekuireError:
    """Return ``error``, or :class:`PolicyUnavailableError` if it says that no policy could be loaded."""
    return PolicyUnavailableError(error.reason) if error.rule == protocol.RULE_UNAVAILABLE else error


def _count_denial(denials: Tally, theirs: Optional[Callable[..., object]], error: PolicyViolationError) -> None:
    """Count what the policy denies by its rule, and pass it on to the user's ``on_violation``."""
    if not error.allowed:
        denials.add(error.rule if error.rule in MESSAGES else "other")
    if theirs is not None:
        theirs(error)


def _check_choice(option: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigurationError(f"must be {' or '.join(map(repr, choices))}, got {value!r}", option)


def may_only_warn(warn_only: object, environment: Optional[str], is_pinned: bool) -> bool:
    """Return True if violations are only logged, by the option or by ``SEKUIRE_POLICY_DEV_OVERRIDE``.

    :raises ConfigurationError: they would be, but a policy key is pinned or this is production.
    """
    if not isinstance(warn_only, bool):
        raise ConfigurationError(f"must be True or False, got {warn_only!r}", "warn_only")
    option, source = "warn_only", None
    if boolean_variable(POLICY_OVERRIDE_VARIABLE) and not warn_only:
        option, source = "", source_of(POLICY_OVERRIDE_VARIABLE)
    elif not warn_only:
        return False
    where = environment or variable(ENVIRONMENT["environment"]) or "production"
    problem = ""
    if is_pinned:
        problem = "is refused where a policy key is pinned; remove one of the two"
    elif is_production(where):
        problem = (
            "is refused in production; where this is not production, say so: environment='development' "
            "(SEKUIRE_ENVIRONMENT=development)"
        )
    if problem:
        raise ConfigurationError(problem, option or None, source)
    log.warning(
        "POLICIES ARE NOT ENFORCED (%s, environment %r): what they deny is logged and allowed. Never use this in "
        "production", source or "warn_only=True", where,
    )  # fmt: skip
    return True
