"""Check step by step whether an agent can work with this machine's configuration: ``sekuire doctor``."""

from __future__ import annotations

import argparse
import difflib
import functools
import os
import platform as python_platform
import socket
import threading
import time
from typing import Any, Callable, Dict, List, Optional
from urllib.parse import urlsplit

from ..config import (
    CREDENTIALS_FILE_VARIABLE,
    ENVIRONMENT,
    POLICY_KEYS_VARIABLE,
    POLICY_OVERRIDE_VARIABLE,
    ConnectionConfig,
    policy_keys_from_environment,
    variable,
)
from ..credentials.file import CredentialsFile
from ..errors import APIError, ConfigurationError, PolicyIntegrityError, SekuireError, TransportError
from ..secret import Secret, as_secret
from ..session import platforms
from ..transport.http import HttpClient, Reply
from ..version import __version__
from ..wire import protocol
from ..wire.models import RuntimeCredentials
from . import terminal
from .exits import FAILED, OK, USAGE, CommandError
from .options import add_connection, api_key, connection, key_header
from .policy import ORIGINS, client_for

HELP = "check the configuration, and say how to fix it"
DESCRIPTION = """\
Check, step by step, what an agent on this machine would find: the environment variables, the credentials file, the
network up to the platform, and whether the platform accepts the credentials. Nothing is used up: install and refresh
tokens are not sent. With a runtime token and an installation id one heartbeat is sent, as the agent itself would."""
EPILOG = "Exit codes: 0 all is well (there may be warnings), 1 the platform cannot be used, 2 a setting is wrong."
LOG_LEVEL = "error"

_KNOWN = (
    *ENVIRONMENT.values(),
    CREDENTIALS_FILE_VARIABLE,
    "SEKUIRE_OUTBOX",
    POLICY_KEYS_VARIABLE,
    POLICY_OVERRIDE_VARIABLE,
)
_SECRETS = ("install_token", "runtime_token", "refresh_token", "api_key")
_PREFIXES = {"install_token": "skt_", "api_key": "sk_live_"}
_NAMES = {"skt_": "an install token", "sk_live_": "an API key"}
_RESOLVE_TIME = 5.0
#: Seconds by which this machine's clock may differ from the platform's.
_SKEW = 60.0

_OK, _WARNING, _WRONG, _SKIPPED = "ok", "warning", "WRONG", "skipped"
_COLOURS = {_OK: "green", _WARNING: "yellow", _WRONG: "red"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--api-key-file", metavar="PATH", help="a file with the API key (default: SEKUIRE_API_KEY)")
    add_connection(parser)


def run(args: argparse.Namespace) -> int:
    findings = _Findings()
    findings.add(_OK, "library", f"sekuire {__version__} on Python {python_platform.python_version()}")
    secrets = _environment(findings)
    if args.api_key_file is not None:
        secrets.pop("api_key", None)
        with findings.catching("API key"):
            secrets["api_key"] = api_key(args.api_key_file)[0]
    stored = _credentials_file(findings)
    _login_methods(findings, secrets, stored)
    can_verify = _policy_settings(findings)
    config: Optional[ConnectionConfig] = None
    with findings.catching("address"):
        config = connection(args)
        findings.add(_OK, "address", config.api_base_url)
    is_wrong = findings.is_wrong
    if config is None:
        findings.add(_SKIPPED, "platform", "not asked: its address is wrong")
    else:
        _platform(findings, config, secrets, stored, can_verify)
    terminal.say()
    terminal.say(findings.verdict())
    if is_wrong:
        return USAGE
    return FAILED if findings.is_wrong else OK


class _Findings:
    """Print and count what the checks find."""

    def __init__(self) -> None:
        self._counts: Dict[str, int] = {}

    def add(self, state: str, what: str, text: str, fix: str = "") -> None:
        self._counts[state] = self._counts.get(state, 0) + 1
        label = state.ljust(8)
        colour = _COLOURS.get(state)
        shown = terminal.paint(label, colour) if colour else label
        terminal.say(f"{shown} {terminal.clean(what)}: {terminal.clean(text)}")
        if fix:
            terminal.say(f"         -> {terminal.clean(fix)}")

    def catching(self, what: str) -> _Catching:
        """Return a context that reports a configuration error as a finding."""
        return _Catching(self, what)

    @property
    def is_wrong(self) -> bool:
        return _WRONG in self._counts

    def verdict(self) -> str:
        wrong, warnings = self._counts.get(_WRONG, 0), self._counts.get(_WARNING, 0)
        if wrong:
            return f"{wrong} wrong, {warnings} to look at"
        return f"nothing wrong, {warnings} to look at" if warnings else "all is well"


class _Catching:
    def __init__(self, findings: _Findings, what: str) -> None:
        self._findings = findings
        self._what = what

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: object, error: Optional[BaseException], tb: object) -> bool:
        if isinstance(error, CommandError):
            self._findings.add(_WRONG, self._what, "; ".join(error.lines))
            return True
        if isinstance(error, ConfigurationError):
            self._findings.add(_WRONG, self._what, str(error))
            return True
        return False


# -- this machine -----------------------------------------------------------------------------------------------------


def _environment(findings: _Findings) -> Dict[str, Secret]:
    """Check each variable, and return the secrets that are well-formed."""
    for name in sorted(os.environ):
        if name.startswith("SEKUIRE_") and name not in _KNOWN:
            close = difflib.get_close_matches(name, _KNOWN, n=1, cutoff=0.8)
            fix = f"did you mean {close[0]}?" if close else "unset it, unless another program reads it"
            findings.add(_WARNING, name, "is not a variable of this library", fix)
        elif name in _KNOWN and not os.environ[name]:
            findings.add(_WARNING, name, "is set but empty, which counts as not set", "set it, or unset it")
        elif name in _KNOWN:
            try:
                variable(name)
            except ConfigurationError as error:
                problem, _, remedy = error.problem.partition("; ")
                findings.add(_WRONG, name, problem, remedy)
    _identifiers(findings)
    secrets: Dict[str, Secret] = {}
    for option in _SECRETS:
        secret = _secret(findings, option, ENVIRONMENT[option])
        if secret is not None:
            secrets[option] = secret
    outbox = _value("SEKUIRE_OUTBOX")
    if outbox and not os.path.isdir(os.path.dirname(os.path.abspath(outbox))):
        findings.add(_WRONG, "SEKUIRE_OUTBOX", f"the directory of {outbox!r} does not exist", "make it first")
    return secrets


def _value(name: str) -> Optional[str]:
    """Return a variable's value, or None if it is not set or cannot be used, which _environment() reports."""
    try:
        return variable(name)
    except ConfigurationError:
        return None


def _identifiers(findings: _Findings) -> None:
    for option in ("agent_id", "installation_id", "workspace_id"):
        name = ENVIRONMENT[option]
        value = _value(name)
        if value is None:
            if option == "agent_id" and not os.environ.get(name):
                fix = f"export {name}=... with the agent's id, or pass agent_id=... in code"
                findings.add(_WRONG, name, "is not set", fix)
        elif not protocol.is_id(value):
            findings.add(_WRONG, name, "is longer than 256 bytes or holds control characters", "copy it again, whole")
        else:
            findings.add(_OK, name, value)


def _secret(findings: _Findings, option: str, name: str) -> Optional[Secret]:
    text = _value(name)
    if text is None:
        return None
    try:
        secret = as_secret(text, name)
    except ConfigurationError as error:
        problem = error.problem
    else:
        prefix = _PREFIXES.get(option)
        other = next((one for one in _NAMES if one != prefix and text.startswith(one)), None)
        if other is not None:
            findings.add(_WRONG, name, f"holds {_NAMES[other]} ({other}...)", "put each into the variable of its name")
            return None
        if prefix is not None and not text.startswith(prefix):
            findings.add(_WARNING, name, f"does not begin with {prefix}", f"check that it is {_NAMES[prefix]}")
        else:
            findings.add(_OK, name, "is set and well-formed")
        return secret
    findings.add(_WRONG, name, problem, "copy it again, whole and without quotes")
    return None


def _credentials_file(findings: _Findings) -> Optional[RuntimeCredentials]:
    """Return the credentials in the file, or None. The file is only read."""
    path = _value(CREDENTIALS_FILE_VARIABLE)
    if path is None:
        if _value(ENVIRONMENT["install_token"]) is not None and not os.environ.get(CREDENTIALS_FILE_VARIABLE):
            findings.add(
                _WARNING,
                CREDENTIALS_FILE_VARIABLE,
                "is not set, so a restart needs a new install token once this one is used up",
                f"export {CREDENTIALS_FILE_VARIABLE}=... with a file of the agent's own",
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
                _WARNING, CREDENTIALS_FILE_VARIABLE, f"{path!r} cannot be written: rotated tokens cannot be kept in it",
                "make it and its directory writable",
            )  # fmt: skip
        if stored is None:
            findings.add(_OK, CREDENTIALS_FILE_VARIABLE, f"{path!r} is still empty; the first login fills it")
            return None
        findings.add(_OK, CREDENTIALS_FILE_VARIABLE, f"{path!r} is private and holds credentials")
        return stored.credentials
    findings.add(_WRONG, CREDENTIALS_FILE_VARIABLE, problem)
    return None


def _login_methods(findings: _Findings, secrets: Dict[str, Secret], stored: Optional[RuntimeCredentials]) -> None:
    """Report the login methods that the configuration allows."""
    installation = _value(ENVIRONMENT["installation_id"])
    what = "credentials"
    if "refresh_token" in secrets and not installation and stored is None:
        findings.add(_WRONG, what, "SEKUIRE_REFRESH_TOKEN without SEKUIRE_INSTALLATION_ID", "set both")
    if "runtime_token" in secrets and not installation and stored is None:
        fix = "set SEKUIRE_INSTALLATION_ID; SekuireSDK and Beacon need it"
        findings.add(_WARNING, what, "SEKUIRE_RUNTIME_TOKEN without SEKUIRE_INSTALLATION_ID", fix)
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
        findings.add(_OK, what, "will be tried in this order: " + ", ".join(methods))
    else:
        fix = (
            "set SEKUIRE_INSTALL_TOKEN, or SEKUIRE_RUNTIME_TOKEN, or SEKUIRE_INSTALLATION_ID and SEKUIRE_REFRESH_TOKEN"
        )
        findings.add(_WRONG, what, "there is nothing to authenticate with", fix)


def _policy_settings(findings: _Findings) -> bool:
    """Check what a policy needs on this machine. Return True if a policy can be verified."""
    from ..policy.client import missing_packages
    from ..policy.document import parse_key
    from ..policy.gateway import may_only_warn

    what = "policy"
    try:
        keys = policy_keys_from_environment()
    except ConfigurationError as error:
        if _value(POLICY_KEYS_VARIABLE) is not None:
            # Not what _environment() has reported.
            findings.add(_WRONG, POLICY_KEYS_VARIABLE, error.problem)
        return False
    names = (POLICY_OVERRIDE_VARIABLE, ENVIRONMENT["environment"])
    is_readable = all(not os.environ.get(name) or _value(name) is not None for name in names)
    with findings.catching(POLICY_OVERRIDE_VARIABLE):
        if is_readable and may_only_warn(False, None, bool(keys)):
            findings.add(
                _WARNING, POLICY_OVERRIDE_VARIABLE, "is set: policies are not enforced", "unset it in production"
            )
    missing = missing_packages()
    if missing:
        state, text = (_WRONG, f"{POLICY_KEYS_VARIABLE} is set, and") if keys else (_WARNING, "it is not enforced:")
        findings.add(state, what, f"{text} {', '.join(missing)} is not installed", "run: pip install 'sekuire[policy]'")
        return False
    is_good = True
    for key in keys:
        try:
            parse_key(key)
        except ConfigurationError as error:
            is_good = False
            findings.add(_WRONG, POLICY_KEYS_VARIABLE, error.problem, "copy the key again, whole")
    if keys and is_good:
        findings.add(_OK, POLICY_KEYS_VARIABLE, f"pins {len(keys)} key{'s' if len(keys) > 1 else ''}")
    return is_good


def _workspace(stored: Optional[RuntimeCredentials]) -> Optional[str]:
    given = _value(ENVIRONMENT["workspace_id"]) or (stored.workspace_id if stored is not None else None)
    return given if protocol.is_id(given) else None


# -- the platform -----------------------------------------------------------------------------------------------------


def _platform(
    findings: _Findings,
    config: ConnectionConfig,
    secrets: Dict[str, Secret],
    stored: Optional[RuntimeCredentials],
    can_verify: bool,
) -> None:
    http = HttpClient(config, pool_size=1)
    try:
        if http.route.proxies:
            findings.add(
                _OK, "network", "goes through a proxy (HTTP_PROXY, HTTPS_PROXY), which resolves the name and connects"
            )
        elif not _network(findings, config):
            return
        if not _answer(findings, http):
            return
        _runtime_token(findings, http, secrets, stored)
        if "api_key" in secrets:
            _api_key(findings, http, secrets["api_key"])
        if can_verify:
            _policy(findings, config, secrets, stored)
    finally:
        http.close()


def _network(findings: _Findings, config: ConnectionConfig) -> bool:
    """Resolve the platform's name and connect to its port. Return True if both succeed."""
    parts = urlsplit(config.api_base_url)
    host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
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
        findings.add(_WRONG, "name", f"{host} cannot be resolved: {problem}", "check SEKUIRE_API_URL and the DNS")
        return False
    findings.add(_OK, "name", f"{host} has {len(addresses)} address{'es' if len(addresses) > 1 else ''}")
    begun = time.monotonic()
    try:
        socket.create_connection((host, port), timeout=config.connect_timeout).close()
    except OSError as error:
        fix = "is the platform running (sekuire dev)? does a firewall or a proxy stand in between?"
        findings.add(_WRONG, "port", f"{host} port {port}: {error.strerror or 'no answer in time'}", fix)
        return False
    findings.add(_OK, "port", f"{host} port {port} was reached in {1000 * (time.monotonic() - begun):.0f} ms")
    return True


def _answer(findings: _Findings, http: HttpClient) -> bool:
    """Check TLS, and that a Sekuire platform answers, without credentials. Return True if the checks can go on."""
    reply = _ask(findings, "platform", lambda: http.request("GET", http.endpoints.path("tasks")))
    if reply is None:
        return False
    if http.route.base.startswith("https://"):
        state = _OK if http.route.verify is not False else _WARNING
        findings.add(state, "TLS", "the certificate is good" if state == _OK else "the certificate is not checked")
    if 300 <= reply.status < 400:
        findings.add(
            _WRONG, "platform", f"it answered with a redirect ({reply.status})", "give the address it leads to"
        )
        return False
    error = None if reply.is_success else protocol.decode_error(reply.status, reply.body)
    if error is not None and error.details is None:
        fix = "check the address: is it a Sekuire platform's, without a path behind the host?"
        findings.add(_WRONG, "platform", f"HTTP {reply.status} and no JSON: this is another server", fix)
        return False
    findings.add(_OK, "platform", f"it answers (HTTP {reply.status})")
    date = protocol.parse_http_date(reply.date)
    if date is None:
        findings.add(_WARNING, "clock", "the platform sent no time to compare with")
        return True
    skew = (reply.now - date).total_seconds()
    if abs(skew) > _SKEW:
        which = "ahead of" if skew > 0 else "behind"
        fix = "set it, best by NTP: the ends of tokens and leases are compared with it"
        findings.add(_WARNING, "clock", f"this machine's is {abs(skew):.0f} s {which} the platform's", fix)
    else:
        findings.add(_OK, "clock", "agrees with the platform's")
    return True


def _ask(findings: _Findings, what: str, call: Callable[[], Reply]) -> Optional[Reply]:
    try:
        return call()
    except TransportError as error:
        problem = str(error)
    fix = "try again; if it fails again, check the platform and the network"
    if problem.startswith("TLS "):
        what = "TLS"
        fix = "check the host's name and its certificate; for a CA of your own set REQUESTS_CA_BUNDLE"
    findings.add(_WRONG, what, problem, fix)
    return None


def _runtime_token(
    findings: _Findings, http: HttpClient, secrets: Dict[str, Secret], stored: Optional[RuntimeCredentials]
) -> None:
    """Send one heartbeat with the runtime token, as the agent would.

    A new token in the answer is ignored: the present one stays valid until it expires.
    """
    what = "runtime token"
    token, installation_id = secrets.get("runtime_token"), _value(ENVIRONMENT["installation_id"])
    has_refresh = "refresh_token" in secrets
    if stored is not None and stored.runtime_token is not None:
        token, installation_id, has_refresh = stored.runtime_token, stored.installation_id, bool(stored.refresh_token)
    if token is None:
        return
    if installation_id is None or not protocol.is_id(installation_id):
        findings.add(_SKIPPED, what, "not tried: without an installation id there is no heartbeat")
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
            _WRONG,
            what,
            f"the installation is revoked: {error}",
            "ask who revoked it; a new one needs an install token",
        )
    elif error.status == 401 and has_refresh:
        findings.add(_WARNING, what, f"was rejected ({error}); the agent will get another with its refresh token")
    else:
        fix = "get a new one, or set SEKUIRE_INSTALLATION_ID and SEKUIRE_REFRESH_TOKEN, or an install token"
        findings.add(_WRONG, what, f"was rejected: {error}", fix)


def _accepted(findings: _Findings, what: str, reply: Reply) -> None:
    try:
        payload = reply.json()
    except protocol.Malformed:
        payload = None
    answer = protocol.decode_heartbeat(payload, reply.date, reply.now)
    if answer.revoked:
        fix = "ask who revoked it; a new one needs an install token"
        findings.add(_WRONG, what, f"the installation is revoked: {answer.reason or 'no reason given'}", fix)
    elif answer.desired_state not in (None, "running"):
        findings.add(_WARNING, what, f"was accepted, but the platform wants this agent {answer.desired_state}")
    else:
        findings.add(_OK, what, "was accepted by a heartbeat")


def _api_key(findings: _Findings, http: HttpClient, key: Secret) -> None:
    what = "API key"
    path = http.endpoints.path("tasks") + "?limit=1"
    reply = _ask(findings, what, lambda: http.request("GET", path, credential=key_header(key)))
    if reply is None:
        return
    error: Optional[APIError] = None if reply.is_success else protocol.decode_error(reply.status, reply.body)
    if error is None:
        findings.add(_OK, what, "was accepted")
    elif error.status in (401, 403):
        findings.add(_WRONG, what, f"was rejected: {error}", "copy it again, and check that it is this platform's")
    else:
        findings.add(_WARNING, what, f"cannot be checked here: {error}")


def _policy(
    findings: _Findings, config: ConnectionConfig, secrets: Dict[str, Secret], stored: Optional[RuntimeCredentials]
) -> None:
    """Fetch the policy as the agent would, and verify it."""
    what = "policy"
    workspace_id = _workspace(stored)
    key = secrets.get("api_key")
    token = stored.runtime_token if stored is not None and stored.runtime_token else secrets.get("runtime_token")
    if workspace_id is None:
        name = ENVIRONMENT["workspace_id"]
        findings.add(_OK, what, f"the login names the workspace; set {name} to check its policy here")
        return
    if key is None and token is None:
        findings.add(_SKIPPED, what, "not asked for: there is no runtime token before the login, and no API key")
        return
    problem: Optional[SekuireError] = None
    # Prefer the token, which the agent itself would use. Before its first login it has none.
    with client_for(config, policy_keys_from_environment(), None if token is not None else key, token) as client:
        try:
            policy = client.fetch_active_policy(workspace_id)
        except SekuireError as error:
            problem = error
    if isinstance(problem, PolicyIntegrityError):
        fix = "compare SEKUIRE_POLICY_PUBLIC_KEYS with the key that the workspace's owner gives"
        findings.add(_WRONG, what, f"is refused: {problem}", fix)
    elif problem is not None:
        findings.add(_WARNING, what, f"is not available: {problem}", "without a policy every task is denied")
    elif policy is None:
        findings.add(_OK, what, f"{workspace_id} has none: everything is allowed")
    else:
        text = f"version {policy.version} of {workspace_id} is good: {ORIGINS[policy.origin]}"
        findings.add(_OK, what, text if policy.origin == "pinned" else f"{text} (see {POLICY_KEYS_VARIABLE})")
        for warning in policy.warnings:
            findings.add(_WARNING, what, warning)
