"""Every setting: frozen, keyword-only, checked when it is given. Nothing is read from the environment at import."""

from __future__ import annotations

import concurrent.futures
import ipaddress
import os
import re
import unicodedata
from typing import Any, Callable, Dict, Mapping, Optional, Sequence, Tuple, Type, TypeVar, Union
from urllib.parse import urlsplit

import attrs

from .errors import ConfigurationError
from .secret import Secret, as_secret
from .wire import protocol

__all__ = ["AgentConfig", "BeaconConfig", "ConnectionConfig", "SDKConfig", "WorkerConfig", "from_options"]

_Config = TypeVar("_Config")

MIB = 1024 * 1024
_LONGEST = 366 * 24 * 3600.0


def from_options(
    cls: Type[_Config], options: Mapping[str, Any], sources: Optional[Mapping[str, str]] = None
) -> _Config:
    """``cls(**options)``, with an error that names a misspelt option or the environment variable a value came from.

    :param sources: option name → where its value came from, for the error's text.
    :raises ConfigurationError: an unknown option or a wrong value.
    """
    known = [field.alias for field in attrs.fields(cls)]  # type: ignore[arg-type]
    unknown = next((name for name in options if name not in known), None)
    if unknown is not None:
        import difflib  # Only an error needs it.

        close = difflib.get_close_matches(unknown, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known options: {', '.join(sorted(known))}"
        found = ConfigurationError(f"is no option of {cls.__name__}; {hint}", unknown)
    elif "agent_id" in known and "agent_id" not in options:
        found = ConfigurationError("is required", "agent_id")
    else:
        try:
            return cls(**options)
        except ConfigurationError as error:
            # Without its traceback, whose frames hold the options, tokens included.
            found = error.with_traceback(None)
    del options
    source = (sources or {}).get(found.option or "")
    raise ConfigurationError(found.problem, found.option, found.source or source)


# -- checks -----------------------------------------------------------------------------------------------------------


def _fail(attribute: Any, problem: str) -> None:
    raise ConfigurationError(problem, attribute.name)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _seconds(instance: object, attribute: Any, value: Any) -> None:
    if not _is_number(value) or not 0 < value <= _LONGEST:
        _fail(attribute, f"must be a number of seconds above 0, got {value!r}")


def _seconds_or_zero(instance: object, attribute: Any, value: Any) -> None:
    if not _is_number(value) or not 0 <= value <= _LONGEST:
        _fail(attribute, f"must be a number of seconds, 0 or more, got {value!r}")


def _optional_seconds(instance: object, attribute: Any, value: Any) -> None:
    if value is not None:
        _seconds(instance, attribute, value)


def _count(instance: object, attribute: Any, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        _fail(attribute, f"must be a whole number, 1 or more, got {value!r}")


def _optional_count(instance: object, attribute: Any, value: Any) -> None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
        _fail(attribute, f"must be a whole number, 0 or more, or None, got {value!r}")


def _flag(instance: object, attribute: Any, value: Any) -> None:
    if not isinstance(value, bool):
        _fail(attribute, f"must be True or False, got {value!r}")


def _optional_callable(instance: object, attribute: Any, value: Any) -> None:
    if value is not None and not callable(value):
        _fail(attribute, f"must be callable, got {type(value).__name__}")


def _identifier(instance: object, attribute: Any, value: Any) -> None:
    if not protocol.is_id(value):
        hint = "; is the environment variable set?" if value in (None, "") else ""
        _fail(
            attribute, f"must be a non-empty str of at most 256 bytes without control characters, got {value!r}{hint}"
        )


def _optional_identifier(instance: object, attribute: Any, value: Any) -> None:
    if value is not None:
        _identifier(instance, attribute, value)


def _optional_path(instance: object, attribute: Any, value: Any) -> None:
    if value is not None and (not isinstance(value, (str, os.PathLike)) or not os.fspath(value)):
        _fail(attribute, f"must be the path of a file, got {value!r}")


def _optional_mapping(instance: object, attribute: Any, value: Any) -> None:
    if value is not None and not isinstance(value, Mapping):
        _fail(attribute, f"must be a mapping, got {type(value).__name__}")


def _text(instance: object, attribute: Any, value: Any) -> None:
    if not isinstance(value, str) or not value or not value.isprintable():
        _fail(attribute, f"must be a non-empty str of printable characters, got {value!r}")


def _optional_text(instance: object, attribute: Any, value: Any) -> None:
    if value is not None:
        _text(instance, attribute, value)


def _offers(*names: str) -> Callable[[object, Any, object], None]:
    def check(instance: object, attribute: Any, value: Any) -> None:
        missing = [name for name in names if value is not None and not hasattr(value, name)]
        if missing:
            _fail(attribute, f"must offer {', '.join(missing)}; {type(value).__name__} does not")

    return check


def _executor(instance: object, attribute: Any, value: Any) -> None:
    if value is not None and not isinstance(value, concurrent.futures.Executor):
        _fail(attribute, f"must be a concurrent.futures.Executor, got {type(value).__name__}")
    context = getattr(value, "_mp_context", None)
    if context is not None and context.get_start_method() == "fork":
        _fail(
            attribute,
            "must not fork this process, whose threads and locks a fork copies in any state; use "
            "sekuire.ProcessExecutor(), or give the pool mp_context=multiprocessing.get_context('spawn')",
        )


def _secret(option: str) -> Any:
    def convert(value: Union[str, Secret, None]) -> Optional[Secret]:
        return None if value is None else as_secret(value, option)

    return attrs.field(default=None, converter=convert)


def check_capability(name: object, option: str) -> str:
    """``name`` if it can name a capability.

    :raises ConfigurationError: it is no str, is empty, or holds a comma or a control character.
    """
    if not isinstance(name, str):
        raise ConfigurationError(f"a capability's name must be a str, got {type(name).__name__}", option)
    if not protocol.is_id(name) or "," in name or name != name.strip():
        raise ConfigurationError(
            f"{name!r} cannot name a capability: 1 to 256 bytes, no comma, control character or space at an end", option
        )
    return name


def _capabilities(value: Any) -> Tuple[str, ...]:
    if isinstance(value, (str, bytes)):
        raise ConfigurationError(f"must be a list of names, such as [{value!r}], not a single str", "capabilities")
    try:
        names = list(value)
    except TypeError:
        names = None
    if names is None:
        raise ConfigurationError(f"must be a list of names, got {type(value).__name__}", "capabilities")
    return tuple(dict.fromkeys(check_capability(name, "capabilities") for name in names))


def is_loopback(host: str) -> bool:
    """Whether ``host`` is this machine: ``localhost`` or an address of the loopback range."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _base_url(value: object) -> str:
    option = "api_base_url"
    if not isinstance(value, str):
        raise ConfigurationError(f"must be a str such as 'https://api.sekuire.ai', got {type(value).__name__}", option)
    problem = _url_problem(value)
    if problem:
        raise ConfigurationError(problem, option)
    url = value.rstrip("/")
    if url.endswith(protocol.API_PREFIX):
        raise ConfigurationError(f"must not end with {protocol.API_PREFIX}; the library adds it", option)
    return url


def _url_problem(value: str) -> str:
    if not value.isascii() or not value.isprintable() or " " in value or "\\" in value:
        return "holds spaces, control characters, backslashes or characters outside ASCII"
    try:
        parts = urlsplit(value)
        host, _ = parts.hostname, parts.port
    except ValueError:
        return "is not a URL (a wrong port or address?)"
    if parts.scheme not in ("http", "https") or not host:
        shown = f", got {value!r}" if not set("@?#") & set(value) else ""
        return f"must begin with https:// (or http:// for a local platform) and name a host{shown}"
    if "@" in parts.netloc:
        return "must not hold a user name or password; give credentials by their own options"
    if parts.query or parts.fragment or "?" in value or "#" in value:
        return "must not hold a query or a fragment"
    if any(segment in (".", "..") for segment in parts.path.split("/")):
        return "must not hold '.' or '..' segments"
    return ""


def _keys(value: Any) -> Tuple[str, ...]:
    if isinstance(value, (str, bytes)):
        raise ConfigurationError("must be a list of keys, not a single one", "trusted_policy_keys")
    try:
        keys = tuple(value)
    except TypeError:
        keys = (value,)
    if not all(isinstance(key, str) and key for key in keys):
        raise ConfigurationError(
            "must be a list of Ed25519 public keys, each a str in hex or base64", "trusted_policy_keys"
        )
    return keys


def _endpoints(value: Union[protocol.Endpoints, Mapping[str, str], None]) -> protocol.Endpoints:
    return value if isinstance(value, protocol.Endpoints) else protocol.Endpoints(value)


def _path(value: Any) -> Any:
    # requests takes paths as str only: a Path counts as a pair, or is not looked at.
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, (tuple, list)):
        return tuple(_path(one) for one in value)
    return value


def _file(option: str, value: object) -> None:
    if not isinstance(value, str) or not os.path.exists(value):
        raise ConfigurationError(f"no such file: {value!r}", option)


# -- the settings -----------------------------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class ConnectionConfig:
    """How to reach the platform. Times in seconds.

    ``verify`` is True, False or the path of a CA bundle; ``client_cert`` a path or a pair (certificate, key);
    ``proxies`` a mapping scheme → URL (None: from the environment, ``{}``: none); ``allow_insecure_http`` permits
    ``http://`` to a host that is not this machine; ``endpoints`` overrides paths
    (:class:`sekuire.wire.protocol.Endpoints`).
    """

    api_base_url: str = attrs.field(default=protocol.DEFAULT_API_BASE_URL, converter=_base_url)
    connect_timeout: float = attrs.field(default=3.0, validator=_seconds)
    read_timeout: float = attrs.field(default=10.0, validator=_seconds)
    verify: Union[bool, str] = attrs.field(default=True, converter=_path)
    client_cert: Union[str, Tuple[str, str], None] = attrs.field(default=None, converter=_path)
    proxies: Optional[Mapping[str, str]] = attrs.field(default=None, repr=False)
    allow_insecure_http: bool = attrs.field(default=False, validator=_flag)
    endpoints: protocol.Endpoints = attrs.field(default=None, converter=_endpoints, repr=False)

    @verify.validator
    def _check_verify(self, attribute: Any, value: Any) -> None:
        if not isinstance(value, bool):
            _file("verify", value)

    @client_cert.validator
    def _check_client_cert(self, attribute: Any, value: Any) -> None:
        if value is None:
            return
        if isinstance(value, tuple) and len(value) != 2:
            _fail(attribute, "must be a path or a pair (certificate, key)")
        for path in value if isinstance(value, tuple) else (value,):
            _file("client_cert", path)

    @proxies.validator
    def _check_proxies(self, attribute: Any, value: Any) -> None:
        if value is None:
            return
        if not isinstance(value, Mapping) or not all(
            isinstance(key, str) and isinstance(url, str) and "://" in url for key, url in value.items()
        ):
            _fail(attribute, "must map 'http' and 'https' to URLs such as 'http://proxy.example:3128'")

    @allow_insecure_http.validator
    def _check_scheme(self, attribute: Any, value: bool) -> None:
        parts = urlsplit(self.api_base_url)
        if parts.scheme == "http" and not value and not is_loopback(parts.hostname or ""):
            raise ConfigurationError(
                "is http:// to another machine, so tokens would travel unencrypted; use https://, or pass "
                "allow_insecure_http=True where the network itself is trusted",
                "api_base_url",
            )


@attrs.frozen(kw_only=True)
class AgentConfig(ConnectionConfig):
    """What a Beacon and a Worker have in common: who the agent is and how it authenticates."""

    agent_id: str = attrs.field(validator=_identifier)
    install_token: Optional[Secret] = _secret("install_token")
    runtime_token: Optional[Secret] = _secret("runtime_token")
    installation_id: Optional[str] = attrs.field(default=None, validator=_optional_identifier)
    refresh_token: Optional[Secret] = _secret("refresh_token")
    credentials_store: Any = attrs.field(default=None, validator=_offers("current", "generation", "update"), repr=False)
    capabilities: Tuple[str, ...] = attrs.field(default=(), converter=_capabilities)
    policy_gateway: Any = attrs.field(
        default=None, validator=_offers("check_request", "check_capability", "on_heartbeat_response"), repr=False
    )

    def __attrs_post_init__(self) -> None:
        if self.refresh_token is not None and self.installation_id is None and self.credentials_store is None:
            raise ConfigurationError("is needed with refresh_token: it says whose token it is", "installation_id")


@attrs.frozen(kw_only=True)
class BeaconConfig(AgentConfig):
    """The settings of a :class:`sekuire.Beacon`. Times in seconds."""

    api_key: Optional[Secret] = _secret("api_key")
    workspace_id: Optional[str] = attrs.field(default=None, validator=_optional_identifier)
    heartbeat_interval: float = attrs.field(default=60.0, validator=_seconds)
    on_status_change: Optional[Callable[[Any], object]] = attrs.field(
        default=None, validator=_optional_callable, repr=False
    )

    def __attrs_post_init__(self) -> None:
        AgentConfig.__attrs_post_init__(self)
        if self.runtime_token is not None and self.installation_id is None and self.credentials_store is None:
            raise ConfigurationError(
                "is needed with runtime_token: heartbeats carry it in their path", "installation_id"
            )


@attrs.frozen(kw_only=True)
class SDKConfig(BeaconConfig):
    """The settings of a :class:`sekuire.SekuireSDK`. Times in seconds."""

    agent_name: Optional[str] = attrs.field(default=None, validator=_optional_text)
    trusted_policy_keys: Tuple[str, ...] = attrs.field(default=(), converter=_keys)
    policy_path: Union[str, os.PathLike[str], None] = attrs.field(default=None, validator=_optional_path)
    policy_options: Optional[Mapping[str, Any]] = attrs.field(default=None, validator=_optional_mapping, repr=False)
    auto_heartbeat: bool = attrs.field(default=True, validator=_flag)
    environment: str = attrs.field(default="production", validator=_text)
    logging_enabled: bool = attrs.field(default=True, validator=_flag)


@attrs.frozen(kw_only=True)
class PolicyClientConfig(ConnectionConfig):
    """The settings of a :class:`sekuire.PolicyClient`. Times in seconds."""

    api_key: Optional[Secret] = _secret("api_key")
    credentials_store: Any = attrs.field(default=None, validator=_offers("snapshot", "reload"), repr=False)
    token_provider: Optional[Callable[[], str]] = attrs.field(default=None, validator=_optional_callable, repr=False)
    trusted_policy_keys: Tuple[str, ...] = attrs.field(default=(), converter=_keys)
    cache_ttl: float = attrs.field(default=300.0, validator=_seconds_or_zero)
    path: Union[str, os.PathLike[str], None] = attrs.field(default=None, validator=_optional_path)

    def __attrs_post_init__(self) -> None:
        if self.api_key is None and self.credentials_store is None and self.token_provider is None:
            raise ConfigurationError(
                "no credentials: give api_key, a credentials_store that a Worker or Beacon shares, or token_provider"
            )


@attrs.frozen(kw_only=True)
class WorkerConfig(AgentConfig):
    """The settings of a :class:`sekuire.Worker`. Times in seconds, sizes in bytes.

    :param max_workers: handlers that run at once.
    :param max_queued: tasks that the platform may send beyond those that run (None: as many as ``max_workers``).
    :param task_timeout: longest run of a handler, or None for no limit.
    :param start_timeout: how long :meth:`~sekuire.Worker.start` waits for the login's first verdict.
    :param shutdown_timeout: how long a stop lets running handlers go on, reports included.
    :param stop_when_idle: stop by itself after this long without a task, or with an error after as long without the
        platform; None: never.
    :param stream_idle_timeout: a stream on which nothing came for this long is opened anew.
    :param max_waiting_bytes: most bytes of the tasks that wait; further ones are released.
    :param outbox: a file that keeps results until the platform has them, also through a crash; one process at a time.
    :param expose_errors: whether the message of an unexpected exception goes to the platform, or only its type.
    :raises ConfigurationError: a wrong value, naming its option.
    """

    token_provider: Optional[Callable[[], str]] = attrs.field(default=None, validator=_optional_callable, repr=False)
    policy_required: bool = attrs.field(default=False, validator=_flag)
    heartbeat_interval: float = attrs.field(default=10.0, validator=_seconds)
    max_workers: int = attrs.field(default=8, validator=_count)
    max_queued: Optional[int] = attrs.field(default=None, validator=_optional_count)
    executor: Optional[concurrent.futures.Executor] = attrs.field(default=None, validator=_executor, repr=False)
    task_timeout: Optional[float] = attrs.field(default=None, validator=_optional_seconds)
    start_timeout: float = attrs.field(default=10.0, validator=_seconds_or_zero)
    shutdown_timeout: float = attrs.field(default=30.0, validator=_seconds_or_zero)
    stop_when_idle: Optional[float] = attrs.field(default=None, validator=_optional_seconds)
    stream_idle_timeout: float = attrs.field(default=45.0, validator=_seconds)
    reconnect_min: float = attrs.field(default=0.5, validator=_seconds)
    reconnect_max: float = attrs.field(default=30.0, validator=_seconds)
    max_event_bytes: int = attrs.field(default=16 * MIB, validator=_count)
    max_result_bytes: int = attrs.field(default=16 * MIB, validator=_count)
    max_waiting_bytes: int = attrs.field(default=64 * MIB, validator=_count)
    outbox: Union[str, os.PathLike[str], None] = attrs.field(default=None, validator=_optional_path)
    expose_errors: bool = attrs.field(default=True, validator=_flag)

    def __attrs_post_init__(self) -> None:
        AgentConfig.__attrs_post_init__(self)
        if self.reconnect_min > self.reconnect_max:
            raise ConfigurationError(
                f"must be at least reconnect_min ({self.reconnect_min}), got {self.reconnect_max}", "reconnect_max"
            )

    @property
    def queue_size(self) -> int:
        """Tasks that the platform may send beyond those that run."""
        return self.max_workers if self.max_queued is None else self.max_queued


# -- the environment --------------------------------------------------------------------------------------------------

#: Option → environment variable (protocol.md, "Environment variables").
ENVIRONMENT: Mapping[str, str] = {
    "api_base_url": "SEKUIRE_API_URL",
    "agent_id": "SEKUIRE_AGENT_ID",
    "install_token": "SEKUIRE_INSTALL_TOKEN",
    "runtime_token": "SEKUIRE_RUNTIME_TOKEN",
    "installation_id": "SEKUIRE_INSTALLATION_ID",
    "refresh_token": "SEKUIRE_REFRESH_TOKEN",
    "api_key": "SEKUIRE_API_KEY",
    "workspace_id": "SEKUIRE_WORKSPACE_ID",
    "environment": "SEKUIRE_ENVIRONMENT",
}

OUTBOX_VARIABLE = "SEKUIRE_OUTBOX"
CREDENTIALS_FILE_VARIABLE = "SEKUIRE_CREDENTIALS_FILE"
POLICY_KEYS_VARIABLE = "SEKUIRE_POLICY_PUBLIC_KEYS"
POLICY_OVERRIDE_VARIABLE = "SEKUIRE_POLICY_DEV_OVERRIDE"


#: Characters that a file, a shell or a YAML document leaves around a value, and that belong to none.
_QUOTES = "\"'`\u2018\u2019\u201c\u201d"
_UNSEEN = "\ufeff\u200b\u2060"
_YES, _NO = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


def source_of(name: str) -> str:
    """Return how an error names the environment variable ``name``."""
    return f"environment variable {name}"


def variable(name: str, option: Optional[str] = None) -> Optional[str]:
    """Return the value of an environment variable, or None if it is not set or empty.

    :param option: the option that it gives, for the error.
    :raises ConfigurationError: quotes, a byte order mark, a space or a line end are part of the value. The error does
        not show the value, which may be a token.
    """
    value = os.environ.get(name)
    if not value:
        return None
    problem = ""
    ends = (value[0], value[-1])
    if any(end in _UNSEEN for end in ends):
        problem = "begins or ends with a byte order mark or another character that shows nothing; write it again"
    elif any(end.isspace() for end in ends):
        what = "a line end" if any(end in "\r\n" for end in ends) else "a space"
        problem = f"begins or ends with {what}; remove it"
    elif any(end in _QUOTES for end in ends):
        problem = "begins or ends with a quote, which is part of the value here; remove the quotes"
    if problem:
        raise ConfigurationError(problem, option, source_of(name))
    return value


def boolean_variable(name: str) -> bool:
    """Return what a boolean environment variable says; False if it is not set or empty.

    :raises ConfigurationError: it is neither 1, true, yes, on nor 0, false, no, off, in any case; and as
        :func:`variable`.
    """
    value = variable(name)
    if value is None or value.lower() in _NO:
        return False
    if value.lower() in _YES:
        return True
    raise ConfigurationError(
        f"must be one of {', '.join(_YES)} or one of {', '.join(_NO)}, got {value[:40]!r}", None, source_of(name)
    )


_PRODUCTION = frozenset(("production", "prod", "prd"))
_NOT_PRODUCTION = frozenset(("non", "not", "no", "pre", "like", "test"))


def is_production(environment: str) -> bool:
    """Return True if ``environment`` means production, however it is written, such as ``PROD`` or ``prod-eu``."""
    words = set(re.findall("[a-z]+", unicodedata.normalize("NFKC", environment).casefold()))
    return bool(words & _PRODUCTION) and not words & _NOT_PRODUCTION


def policy_keys_from_environment() -> Tuple[str, ...]:
    """Return the public keys that ``SEKUIRE_POLICY_PUBLIC_KEYS`` names, separated by commas; none if it is not set.

    :raises ConfigurationError: it is set, and names no key; and as :func:`variable`.
    """
    text = variable(POLICY_KEYS_VARIABLE)
    keys = split_policy_keys(text or "")
    if text is not None and not keys:
        raise ConfigurationError(PINS_NOTHING, None, source_of(POLICY_KEYS_VARIABLE))
    return keys


#: What is wrong with a list of keys that was given and holds none: its author means to have pinned one.
PINS_NOTHING = "names no key, so that nothing would be pinned; name one, or unset it"


def split_policy_keys(text: str) -> Tuple[str, ...]:
    """Return the public keys in a text that separates them by commas."""
    return tuple(key.strip() for key in text.split(",") if key.strip())


def read_environment(overrides: Mapping[str, Any], names: Sequence[str]) -> Tuple[Dict[str, Any], Dict[str, str]]:
    """Options from the environment, ``overrides`` before it, and for each taken from there its source.

    A variable that is set but empty counts as not set.

    :raises ConfigurationError: as :func:`variable`.
    """
    options = dict(overrides)
    sources: Dict[str, str] = {}
    for name in names:
        if name in options:
            continue
        value = variable(ENVIRONMENT[name], name)
        if value is not None:
            options[name] = value
            sources[name] = source_of(ENVIRONMENT[name])
    return options, sources
