"""Check step by step whether an agent can work with a configuration, and say how to fix what is wrong.

``sekuire doctor`` and the commands of the web frameworks show what :func:`examine` finds.
"""

from __future__ import annotations

import functools
import os
import platform as python_platform
import socket
import threading
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple
from urllib.parse import urlsplit

import attrs

from .._internal.clock import time
from ..config import (
    CREDENTIALS_FILE_VARIABLE,
    ENVIRONMENT,
    KNOWN_VARIABLES,
    OUTBOX_VARIABLE,
    POLICY_KEYS_VARIABLE,
    POLICY_OVERRIDE_VARIABLE,
    ConnectionConfig,
    advice_on_variable,
    from_options,
    policy_keys_from_environment,
    policy_signature_from_environment,
    read_environment,
    unknown_variables,
    variable,
)
from ..credentials import RuntimeCredentialsStore
from ..credentials.file import CredentialsFile
from ..errors import APIError, ConfigurationError, PolicyIntegrityError, SekuireError, TransportError
from ..secret import Secret, as_secret
from ..session import platforms
from ..transport.http import HttpClient, Reply, Route
from ..version import __version__
from ..wire import protocol
from ..wire.models import RuntimeCredentials
from .findings import GOOD, SKIPPED, WARNING, WRONG, Findings
from .policies import ORIGINS, client_for

_SECRETS = ("install_token", "runtime_token", "refresh_token", "api_key")
_PREFIXES = {"install_token": "skt_", "api_key": "sk_live_"}
_NAMES = {"skt_": "an install token", "sk_live_": "an API key"}
_RESOLVE_TIME = 5.0
#: Seconds by which this machine's clock may differ from the platform's.
_SKEW = 60.0
#: Option → variable, also of the options that only some objects have.
_VARIABLES: Mapping[str, str] = {
    **ENVIRONMENT,
    "outbox": OUTBOX_VARIABLE,
    "credentials_file": CREDENTIALS_FILE_VARIABLE,
    "trusted_policy_keys": POLICY_KEYS_VARIABLE,
}


class Configuration:
    """Say what each option is, and where it is set. This class reads the environment.

    A command with options of its own, or with a framework's settings, overrides what it reads elsewhere.
    """

    def given(self) -> Mapping[str, Any]:
        """Return the options that are set elsewhere. They win over the environment."""
        return {}

    def name(self, option: str) -> str:
        """Return the user's name for the place where ``option`` is set, or is to be set."""
        return _VARIABLES.get(option, option)

    def check(self) -> None:
        """Check what the examination does not know.

        :raises ConfigurationError: a value is wrong.
        """

    def key_from_file(self) -> Optional[Secret]:
        """Return the API key, if it comes from a file.

        :raises ConfigurationError: it cannot be read.
        """
        return None

    def connection(self) -> ConnectionConfig:
        """Return where the platform is.

        :raises ConfigurationError: a value is wrong; the text names it.
        """
        known = {str(field.alias) for field in attrs.fields(ConnectionConfig)}
        names = [name for name in ENVIRONMENT if name in known]
        options, sources = read_environment(self.given(), names)
        return from_options(
            ConnectionConfig, {name: value for name, value in options.items() if name in known}, sources
        )

    def value(self, option: str) -> Any:
        """Return the option's value, or None if it is not set or its variable cannot be read, which is a finding."""
        found = self.given().get(option)
        if found is not None:
            return found
        try:
            return variable(_VARIABLES[option])
        except ConfigurationError:
            return None

    def is_set(self, option: str) -> bool:
        """Return True if the option is set at all."""
        return self.given().get(option) is not None or bool(os.environ.get(_VARIABLES[option]))

    def policy_keys(self) -> Tuple[str, ...]:
        """Return the keys of which one must have signed the policy.

        :raises ConfigurationError: the variable cannot be read, or holds no key.
        """
        found = self.given().get("trusted_policy_keys")
        return tuple(found) if found is not None else policy_keys_from_environment()

    def policy_signature(self) -> str:
        """Return what a policy's signature must cover.

        :raises ConfigurationError: the variable cannot be read, or says something else.
        """
        found: Optional[str] = self.given().get("policy_signature")
        return found or policy_signature_from_environment()


def examine(configuration: Configuration, findings: Findings) -> None:
    """Check everything that an agent with this configuration would find, in order, and note it in ``findings``.

    Nothing is used up: install and refresh tokens are not sent. With a runtime token and an installation id one
    heartbeat is sent.
    """
    findings.add(GOOD, "library", f"sekuire {__version__} on Python {python_platform.python_version()}")
    secrets = _options(configuration, findings)
    with findings.catching("API key"):
        key = configuration.key_from_file()
        if key is not None:
            secrets["api_key"] = key
    stored = _credentials_file(configuration, findings)
    _login_methods(configuration, findings, secrets, stored)
    can_verify = _policy_settings(configuration, findings)
    config: Optional[ConnectionConfig] = None
    with findings.catching("address"):
        config = configuration.connection()
        findings.add(GOOD, "address", config.api_base_url)
    http: Optional[HttpClient] = None
    with findings.catching("network"):
        http = HttpClient(config, pool_size=1) if config is not None else None
    if not findings.is_wrong:
        with findings.catching("settings"):
            configuration.check()
    findings.is_usage = findings.is_wrong
    if config is None or http is None:
        findings.add(SKIPPED, "platform", f"not asked: its {'address' if config is None else 'network'} is wrong")
    else:
        _platform(configuration, findings, config, http, secrets, stored, can_verify)


# -- this machine -----------------------------------------------------------------------------------------------------


def _options(configuration: Configuration, findings: Findings) -> Dict[str, Secret]:
    """Check each variable and the options of general kind. Return the secrets that are well-formed."""
    unknown = unknown_variables()
    for name in sorted(os.environ):
        if name in unknown:
            findings.add(WARNING, name, "is not a variable of this library", advice_on_variable(unknown[name]))
        elif name in KNOWN_VARIABLES and not os.environ[name]:
            findings.add(WARNING, name, "is set but empty, which counts as not set", "set it, or unset it")
        elif name in KNOWN_VARIABLES:
            try:
                variable(name)
            except ConfigurationError as error:
                findings.refuse(name, error.problem)
    _identifiers(configuration, findings)
    secrets: Dict[str, Secret] = {}
    for option in _SECRETS:
        secret = _secret(configuration, findings, option)
        if secret is not None:
            secrets[option] = secret
    outbox = configuration.value("outbox")
    if outbox is not None:
        from ..worker.outbox import checked_path  # SQLite is for those who keep results on disk.

        try:
            checked_path(outbox)
        except ConfigurationError as error:
            findings.refuse(configuration.name("outbox"), error.problem)
    return secrets


def _identifiers(configuration: Configuration, findings: Findings) -> None:
    for option in ("agent_id", "installation_id", "workspace_id"):
        name = configuration.name(option)
        value = configuration.value(option)
        if value is None:
            if option == "agent_id" and not configuration.is_set(option):
                variable_name = ENVIRONMENT[option]
                fix = f"export {variable_name}=... with the agent's id, or pass agent_id=... in code"
                if name != variable_name:
                    fix = f"set it, or the variable {variable_name}, to the agent's id"
                findings.add(WRONG, name, "is not set", fix)
        elif not protocol.is_id(value):
            findings.add(WRONG, name, "is longer than 256 bytes or holds control characters", "copy it again, whole")
        else:
            findings.add(GOOD, name, value)


def _secret(configuration: Configuration, findings: Findings, option: str) -> Optional[Secret]:
    value = configuration.value(option)
    name = configuration.name(option)
    if value is None:
        return None
    try:
        secret = as_secret(value, name)
        text = secret.reveal()
    except ConfigurationError as error:
        problem = error.problem
    else:
        prefix = _PREFIXES.get(option)
        other = next((one for one in _NAMES if one != prefix and text.startswith(one)), None)
        if other is not None:
            findings.add(WRONG, name, f"holds {_NAMES[other]} ({other}...)", "put each into the variable of its name")
            return None
        if prefix is not None and not text.startswith(prefix):
            findings.add(WARNING, name, f"does not begin with {prefix}", f"check that it is {_NAMES[prefix]}")
        else:
            findings.add(GOOD, name, "is set and well-formed")
        return secret
    findings.add(WRONG, name, problem, "copy it again, whole and without quotes")
    return None


def _credentials_file(configuration: Configuration, findings: Findings) -> Optional[RuntimeCredentials]:
    """Return the credentials in the file, or None. The file is only read."""
    store = configuration.given().get("credentials_store")
    if store is not None:
        findings.add(GOOD, configuration.name("credentials_store"), "is a store of the program's own")
        return store.current if isinstance(store, RuntimeCredentialsStore) else None
    path, name = configuration.value("credentials_file"), configuration.name("credentials_file")
    if path is None:
        if configuration.value("install_token") is not None and not configuration.is_set("credentials_file"):
            findings.add(
                WARNING,
                name,
                "is not set, so a restart needs a new install token once this one is used up",
                "set it to a file of the agent's own, in a directory that others cannot write to",
            )
        return None
    try:
        file = CredentialsFile(path)
        stored = file.load()
    except ConfigurationError as error:
        problem = error.problem
    else:
        if file.read_only:
            findings.add(
                WARNING, name, f"{path!r} cannot be written: rotated tokens cannot be kept in it",
                "make it and its directory writable",
            )  # fmt: skip
        if stored is None:
            findings.add(GOOD, name, f"{path!r} is still empty; the first login fills it")
            return None
        findings.add(GOOD, name, f"{path!r} is private and holds credentials")
        return stored.credentials
    findings.refuse(name, problem, "name another file")
    return None


def _login_methods(
    configuration: Configuration,
    findings: Findings,
    secrets: Dict[str, Secret],
    stored: Optional[RuntimeCredentials],
) -> None:
    """Report the login methods that the configuration allows."""
    installation = configuration.value("installation_id")
    what = "credentials"
    if "refresh_token" in secrets and not installation and stored is None:
        findings.add(WRONG, what, "SEKUIRE_REFRESH_TOKEN without SEKUIRE_INSTALLATION_ID", "set both")
    if "runtime_token" in secrets and not installation and stored is None:
        fix = "set SEKUIRE_INSTALLATION_ID; SekuireSDK and Beacon need it"
        findings.add(WARNING, what, "SEKUIRE_RUNTIME_TOKEN without SEKUIRE_INSTALLATION_ID", fix)
    methods = []
    if stored is not None and (stored.runtime_token or stored.refresh_token):
        methods.append("the credentials file")
    if "runtime_token" in secrets:
        methods.append("a runtime token")
    if "refresh_token" in secrets and installation:
        methods.append("a refresh token")
    if "install_token" in secrets:
        methods.append("an install token (not tried: trying uses it up)")
    if "api_key" in secrets:
        methods.append("recovery with the API key")
    if methods:
        findings.add(GOOD, what, "will be tried in this order: " + ", ".join(methods))
    else:
        fix = (
            "set SEKUIRE_INSTALL_TOKEN, or SEKUIRE_RUNTIME_TOKEN, or SEKUIRE_INSTALLATION_ID and SEKUIRE_REFRESH_TOKEN"
        )
        findings.add(WRONG, what, "there is nothing to authenticate with", fix)


def _policy_settings(configuration: Configuration, findings: Findings) -> bool:
    """Check what a policy needs on this machine. Return True if a policy can be verified."""
    from ..policy.client import missing_packages
    from ..policy.document import parse_key
    from ..policy.gateway import may_only_warn

    what = "policy"
    if configuration.given().get("policy_gateway") is not None:
        findings.add(GOOD, what, "a gateway of the program's own decides")
        return False
    name = configuration.name("trusted_policy_keys")
    try:
        keys = configuration.policy_keys()
    except ConfigurationError as error:
        if configuration.value("trusted_policy_keys") is not None:
            # Not what _options() has reported.
            findings.refuse(name, error.problem)
        return False
    names = (POLICY_OVERRIDE_VARIABLE, ENVIRONMENT["environment"])
    is_readable = all(not os.environ.get(one) or _is_readable(one) for one in names)
    with findings.catching(POLICY_OVERRIDE_VARIABLE):
        if is_readable and may_only_warn(False, configuration.value("environment"), bool(keys)):
            findings.add(
                WARNING, POLICY_OVERRIDE_VARIABLE, "is set: policies are not enforced", "unset it in production"
            )
    option = "policy_signature"
    try:
        if configuration.policy_signature() == "hash":
            fix = "use it only if the platform signs the hash alone"
            findings.add(WARNING, configuration.name(option), "is 'hash': older policies can be replayed", fix)
    except ConfigurationError as error:
        if configuration.value(option) is not None:
            findings.refuse(configuration.name(option), error.problem)
        return False
    missing = missing_packages()
    if missing:
        state, text = (WRONG, f"{name} is set, and") if keys else (WARNING, "it is not enforced:")
        findings.add(state, what, f"{text} {', '.join(missing)} is not installed", "run: pip install 'sekuire[policy]'")
        return False
    is_good = True
    for key in keys:
        try:
            parse_key(key)
        except ConfigurationError as error:
            is_good = False
            findings.add(WRONG, name, error.problem, "copy the key again, whole")
    if keys and is_good:
        findings.add(GOOD, name, f"pins {len(keys)} key{'s' if len(keys) > 1 else ''}")
    return is_good


def _is_readable(name: str) -> bool:
    try:
        variable(name)
    except ConfigurationError:
        return False
    return True


def _workspace(configuration: Configuration, stored: Optional[RuntimeCredentials]) -> Optional[str]:
    given = configuration.value("workspace_id") or (stored.workspace_id if stored is not None else None)
    return given if protocol.is_id(given) else None


# -- the platform -----------------------------------------------------------------------------------------------------


def _platform(
    configuration: Configuration,
    findings: Findings,
    config: ConnectionConfig,
    http: HttpClient,
    secrets: Dict[str, Secret],
    stored: Optional[RuntimeCredentials],
    can_verify: bool,
) -> None:
    try:
        if not _network(configuration, findings, http.route, config.connect_timeout):
            return
        if not _answer(configuration, findings, http):
            return
        _runtime_token(configuration, findings, http, secrets, stored)
        if "api_key" in secrets:
            _api_key(findings, http, secrets["api_key"])
        if can_verify:
            _policy(configuration, findings, config, secrets, stored)
    finally:
        http.close()


def _network(configuration: Configuration, findings: Findings, route: Route, timeout: float) -> bool:
    """Resolve the name of the platform or its proxy, and connect to its port. Return True if both succeed."""
    proxy = route.proxy
    if proxy is None:
        parts = urlsplit(route.base)
        findings.add(GOOD, "network", f"no proxy: {route.proxy_reason}")
        host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
        setting, who = configuration.name("api_base_url"), "the platform running (sekuire dev)"
    else:
        login = ", with user and password" if proxy.has_login else ""
        resolves = (
            "it resolves the platform's name" if proxy.resolves_names else "this machine resolves the name for it"
        )
        findings.add(GOOD, "network", f"through the proxy {proxy} ({route.proxy_reason}){login}; {resolves}")
        host, port = proxy.host, proxy.port
        setting, who = route.proxy_reason, "the proxy running"
    addresses: List[Any] = []
    problems: List[str] = []

    def resolve() -> None:
        try:
            addresses.extend(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:
            problems.append(getattr(error, "strerror", None) or str(error))

    # On a thread: a look-up has no timeout of its own.
    thread = threading.Thread(target=resolve, name="sekuire-resolve", daemon=True)
    thread.start()
    thread.join(_RESOLVE_TIME)
    if not addresses:
        problem = problems[0] if problems else f"no answer within {_RESOLVE_TIME:g} s"
        findings.add(WRONG, "name", f"{host} cannot be resolved: {problem}", f"check {setting} and the DNS")
        return False
    findings.add(GOOD, "name", f"{host} has {len(addresses)} address{'es' if len(addresses) > 1 else ''}")
    begun = time.monotonic()
    try:
        socket.create_connection((host, port), timeout=timeout).close()
    except OSError as error:
        fix = f"is {who}? does a firewall stand in between? check {setting}"
        findings.add(WRONG, "port", f"{host} port {port}: {error.strerror or 'no answer in time'}", fix)
        return False
    findings.add(GOOD, "port", f"{host} port {port} was reached in {1000 * (time.monotonic() - begun):.0f} ms")
    return True


def _answer(configuration: Configuration, findings: Findings, http: HttpClient) -> bool:
    """Check TLS, and that a Sekuire platform answers, without credentials. Return True if the checks can go on."""
    reply = _ask(findings, "platform", lambda: http.request("GET", http.endpoints.path("tasks")))
    if reply is None:
        return False
    if http.route.base.startswith("https://"):
        if http.route.verify is not False:
            findings.add(GOOD, "TLS", "the certificate is good")
        else:
            fix = f"give the path of your CA's bundle as {configuration.name('verify')}"
            findings.add(WARNING, "TLS", "the certificate is not checked: tokens can be stolen on the way", fix)
    if 300 <= reply.status < 400:
        findings.add(WRONG, "platform", f"it answered with a redirect ({reply.status})", "give the address it leads to")
        return False
    error = None if reply.is_success else protocol.decode_error(reply.status, reply.body)
    if error is not None and error.details is None:
        fix = "check the address: is it a Sekuire platform's, without a path behind the host?"
        findings.add(WRONG, "platform", f"HTTP {reply.status} and no JSON: this is another server", fix)
        return False
    findings.add(GOOD, "platform", f"it answers (HTTP {reply.status})")
    date = protocol.parse_http_date(reply.date)
    if date is None:
        fix = "compare it by other means: the ends of tokens and leases depend on it"
        findings.add(WARNING, "clock", "the platform sent no time to compare with", fix)
        return True
    skew = (reply.now - date).total_seconds()
    if abs(skew) > _SKEW:
        which = "ahead of" if skew > 0 else "behind"
        fix = "set it, best by NTP: the ends of tokens and leases are compared with it"
        findings.add(WARNING, "clock", f"this machine's is {abs(skew):.0f} s {which} the platform's", fix)
    else:
        findings.add(GOOD, "clock", "agrees with the platform's")
    return True


def _ask(findings: Findings, what: str, call: Callable[[], Reply]) -> Optional[Reply]:
    try:
        return call()
    except TransportError as error:
        problem = str(error)
    # What failed at the proxy or in TLS says itself how to fix it.
    if problem.startswith("TLS "):
        what = "TLS"
    elif " the proxy " in problem:
        what = "proxy"
    findings.refuse(what, problem, "try again; if it fails again, check the platform and the network")
    return None


def _runtime_token(
    configuration: Configuration,
    findings: Findings,
    http: HttpClient,
    secrets: Dict[str, Secret],
    stored: Optional[RuntimeCredentials],
) -> None:
    """Send one heartbeat with the runtime token, as the agent would.

    A new token in the answer is ignored: the present one stays valid until it expires.
    """
    what = "runtime token"
    token, installation_id = secrets.get("runtime_token"), configuration.value("installation_id")
    has_refresh = "refresh_token" in secrets
    if stored is not None and stored.runtime_token is not None:
        token, installation_id, has_refresh = stored.runtime_token, stored.installation_id, bool(stored.refresh_token)
    if token is None:
        return
    if installation_id is None or not protocol.is_id(installation_id):
        findings.add(SKIPPED, what, "not tried: without an installation id there is no heartbeat")
        return
    path = http.endpoints.path("heartbeat", installation_id=installation_id)
    body = protocol.heartbeat_body("healthy", 0, platforms.runtime_info()["platform"], (), ())
    credential = functools.partial(protocol.bearer, token)
    reply = _ask(findings, what, lambda: http.request("POST", path, body=body, credential=credential))
    if reply is None:
        return
    error = None if reply.is_success else protocol.decode_error(reply.status, reply.body)
    if error is None:
        _accepted(findings, what, reply)
    elif protocol.is_revoked(error):
        findings.add(
            WRONG,
            what,
            f"the installation is revoked: {error}",
            "ask who revoked it; a new one needs an install token",
        )
    elif error.status == 401 and has_refresh:
        fix = "nothing, while the refresh token is good: the agent gets another with it"
        findings.add(WARNING, what, f"was rejected ({error})", fix)
    else:
        fix = "get a new one, or set SEKUIRE_INSTALLATION_ID and SEKUIRE_REFRESH_TOKEN, or an install token"
        findings.add(WRONG, what, f"was rejected: {error}", fix)


def _accepted(findings: Findings, what: str, reply: Reply) -> None:
    try:
        payload = reply.json()
    except protocol.Malformed:
        payload = None
    answer = protocol.decode_heartbeat(payload, reply.date, reply.now)
    if answer.revoked:
        fix = "ask who revoked it; a new one needs an install token"
        findings.add(WRONG, what, f"the installation is revoked: {answer.reason or 'no reason given'}", fix)
    elif answer.desired_state not in (None, "running"):
        fix = "ask who wanted it; the platform has to resume it"
        findings.add(WARNING, what, f"was accepted, but the platform wants this agent {answer.desired_state}", fix)
    else:
        findings.add(GOOD, what, "was accepted by a heartbeat")


def _api_key(findings: Findings, http: HttpClient, key: Secret) -> None:
    what = "API key"
    path = http.endpoints.path("tasks") + "?limit=1"
    reply = _ask(
        findings, what, lambda: http.request("GET", path, credential=functools.partial(protocol.api_key_header, key))
    )
    if reply is None:
        return
    error: Optional[APIError] = None if reply.is_success else protocol.decode_error(reply.status, reply.body)
    if error is None:
        findings.add(GOOD, what, "was accepted")
    elif error.status in (401, 403):
        findings.add(WRONG, what, f"was rejected: {error}", "copy it again, and check that it is this platform's")
    else:
        findings.add(WARNING, what, f"cannot be checked here: {error}", "submit a task with it: sekuire send")


def _policy(
    configuration: Configuration,
    findings: Findings,
    config: ConnectionConfig,
    secrets: Dict[str, Secret],
    stored: Optional[RuntimeCredentials],
) -> None:
    """Fetch the policy as the agent would, and verify it."""
    what = "policy"
    workspace_id = _workspace(configuration, stored)
    key = secrets.get("api_key")
    token = stored.runtime_token if stored is not None and stored.runtime_token else secrets.get("runtime_token")
    if workspace_id is None:
        name = configuration.name("workspace_id")
        findings.add(GOOD, what, f"the login names the workspace; set {name} to check its policy here")
        return
    if key is None and token is None:
        findings.add(SKIPPED, what, "not asked for: there is no runtime token before the login, and no API key")
        return
    problem: Optional[SekuireError] = None
    # Prefer the token, which the agent itself would use. Before its first login it has none.
    keys, signature = configuration.policy_keys(), configuration.policy_signature()
    with client_for(config, keys, signature, None if token is not None else key, token) as client:
        try:
            policy = client.fetch_active_policy(workspace_id)
        except SekuireError as error:
            problem = error
    if isinstance(problem, PolicyIntegrityError):
        fix = f"compare {configuration.name('trusted_policy_keys')} with the key that the workspace's owner gives"
        findings.add(WRONG, what, f"is refused: {problem}", fix)
    elif problem is not None:
        findings.add(WARNING, what, f"is not available: {problem}", "without a policy every task is denied")
    elif policy is None:
        findings.add(GOOD, what, f"{workspace_id} has none: everything is allowed")
    else:
        text = f"version {policy.version} of {workspace_id} is good: {ORIGINS[policy.origin]}"
        if policy.origin not in ("pinned", "content"):
            text += f" (see {configuration.name('trusted_policy_keys')})"
        findings.add(GOOD, what, text)
        for warning in policy.warnings:
            findings.add(WARNING, what, warning, "correct it in the policy")
