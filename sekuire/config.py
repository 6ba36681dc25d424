"""Declare and check every option. Nothing is read from the environment at import."""

from __future__ import annotations

import concurrent.futures
import contextlib
import contextvars
import functools
import inspect
import ipaddress
import os
import re
import unicodedata
from typing import (
    TYPE_CHECKING,
    Any,
    Callable,
    Dict,
    Iterable,
    Iterator,
    Literal,
    Mapping,
    Optional,
    Sequence,
    Tuple,
    Type,
    TypeVar,
    Union,
)
from urllib.parse import urlsplit

import attrs

from ._internal.checks import check_number, check_whole
from ._internal.speech import speech
from ._internal.values import Shown
from .errors import ConfigurationError
from .secret import HiddenUrls, Secret, check_secret, discreet_class, hide, to_secret
from .wire import protocol

if TYPE_CHECKING:
    from typing import Protocol

    from typing_extensions import Concatenate, ParamSpec

    from .approvals import ApprovalRequest
    from .wire.models import BeaconStatus, RuntimeCredentials

    _Options = ParamSpec("_Options")

    class CredentialsStore(Protocol):
        """Offer what a :class:`~sekuire.RuntimeCredentialsStore` offers."""

        @property
        def current(self) -> RuntimeCredentials: ...

        @property
        def generation(self) -> int: ...

        def update(self, credentials: RuntimeCredentials, /) -> object: ...

    class PolicyChecks(Protocol):
        """Offer what a :class:`~sekuire.PolicyGateway` offers."""

        def check_request(self) -> object: ...

        def check_capability(self, name: str, /) -> object: ...

        def on_heartbeat_response(self, response: Any, /) -> object: ...


__all__ = [
    "AgentConfig",
    "BeaconConfig",
    "ClientConfig",
    "ConnectionConfig",
    "SDKConfig",
    "WorkerConfig",
    "from_options",
    "function_of_options",
    "method_of_options",
]

_Config = TypeVar("_Config")
_Self = TypeVar("_Self")
_Result = TypeVar("_Result")

#: Decides on a request for approval; only True approves.
ApprovalHandler = Callable[["ApprovalRequest"], object]
#: Returns a runtime token.
TokenSource = Callable[[], Union[str, Secret]]

MIB = 1024 * 1024
_LONGEST = 366 * 24 * 3600.0
#: What a policy's signature may cover: hash, id, version and workspace, or the hash alone.
SIGNATURE_FORMS = ("bound", "hash")


def from_options(
    cls: Type[_Config], options: Mapping[str, Any], sources: Optional[Mapping[str, str]] = None
) -> _Config:
    """Return ``cls(**options)``. An error suggests the option that was meant, and says where a wrong value came from.

    :param sources: where each value came from, by option, for the error's text.
    :raises ConfigurationError: an option is unknown, or a value is wrong.
    """
    known = [field.alias for field in attrs.fields(cls) if field.init]  # type: ignore[arg-type]
    unknown = next((name for name in options if name not in known), None)
    if unknown is not None:
        found = ConfigurationError(f"unknown option of {cls.__name__}; {_hint(unknown, known)}", unknown)
    elif "agent_id" not in options and any(
        field.name == "agent_id" and field.default is attrs.NOTHING
        for field in attrs.fields(cls)  # type: ignore[arg-type]
    ):
        found = ConfigurationError("is required", "agent_id")
    else:
        try:
            return cls(**options)
        except ConfigurationError as error:
            # Without its traceback, whose frames hold the options, tokens included.
            found = error.with_traceback(None)
    del options
    raise with_source(found, sources or {})


#: Names that other libraries use → the options of this one. The hint shows those that the object has.
_OTHER_NAMES: Mapping[str, Tuple[str, ...]] = {
    **dict.fromkeys(("api_url", "url", "base_url", "api_base", "endpoint", "host", "server_url"), ("api_base_url",)),
    **dict.fromkeys(
        ("token", "access_token", "auth_token", "auth", "secret", "credentials"),
        ("install_token", "runtime_token", "api_key", "credentials_store"),
    ),
    **dict.fromkeys(("key", "apikey"), ("api_key",)),
    **dict.fromkeys(
        ("concurrency", "max_concurrency", "threads", "num_workers", "workers", "pool_size"), ("max_workers",)
    ),
    **dict.fromkeys(("timeout", "timeout_ms"), ("task_timeout", "read_timeout", "connect_timeout")),
    "heartbeat_interval_ms": ("heartbeat_interval",),
    "heartbeat_interval_seconds": ("heartbeat_interval",),
    **dict.fromkeys(("agent", "id", "sekuire_id"), ("agent_id",)),
    "name": ("agent_name",),
    **dict.fromkeys(("workspace", "tenant"), ("workspace_id",)),
    **dict.fromkeys(("ssl_verify", "verify_ssl", "ca", "ca_bundle"), ("verify",)),
    **dict.fromkeys(("proxy", "http_proxy", "https_proxy"), ("proxies",)),
    "insecure": ("allow_insecure_http",),
}


def _hint(unknown: str, known: Sequence[str]) -> str:
    """Return what to write instead of the option ``unknown``. TypeScript's names become those of Python."""
    import difflib  # Only an error needs it.

    name = re.sub(r"(?<=[a-z0-9])[A-Z]", r"_\g<0>", unknown).lower()
    meant = [one for one in _OTHER_NAMES.get(name, (name,)) if one in known]
    if meant:
        unit = " (seconds)" if name.endswith("_ms") else ""
        return f"use {' or '.join(meant)}{unit}"
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known options: {', '.join(sorted(known))}"


def with_source(error: ConfigurationError, sources: Mapping[str, str]) -> ConfigurationError:
    """Return a copy of ``error`` that says where the value came from, without a traceback."""
    return ConfigurationError(error.problem, error.option, error.source or sources.get(error.option or ""))


def method_of_options(
    config: Callable[_Options, object], *, first: str = "", left_out: Sequence[str] = ()
) -> Callable[[Callable[[_Self, Dict[str, Any]], _Result]], Callable[Concatenate[_Self, _Options], _Result]]:
    """Return a decorator that gives a method the parameters of ``config``, which declares them.

    Editors, type checkers and :func:`inspect.signature` see each option with its type. The method itself receives the
    options that were given as one dictionary, which is cleared when it ends: an error's frames must not hold tokens.

    :param first: the one option that may be positional, and that may be left out. The method itself reads one that
        ``config`` does not declare.
    :param left_out: options of ``config`` that the method refuses.
    """

    def decorate(
        method: Callable[[_Self, Dict[str, Any]], _Result],
    ) -> Callable[Concatenate[_Self, _Options], _Result]:
        typed: Callable[Concatenate[_Self, _Options], _Result] = _accept_options(method, config, 1, first, left_out)
        return typed

    return decorate


def function_of_options(
    config: Callable[_Options, object],
) -> Callable[[Callable[[Dict[str, Any]], _Result]], Callable[_Options, _Result]]:
    """Return a decorator that gives a function the parameters of ``config``. See :func:`method_of_options`."""

    def decorate(function: Callable[[Dict[str, Any]], _Result]) -> Callable[_Options, _Result]:
        typed: Callable[_Options, _Result] = _accept_options(function, config, 0)
        return typed

    return decorate


def _may_be_left_out(parameter: inspect.Parameter) -> inspect.Parameter:
    return parameter.replace(default=None) if parameter.default is parameter.empty else parameter


def _accept_options(
    function: Callable[..., Any],
    config: Callable[..., object],
    owners: int,
    first: str = "",
    left_out: Sequence[str] = (),
) -> Any:
    parameters = [one for one in inspect.signature(config).parameters.values() if one.name not in left_out]
    if first:
        names = [each.name for each in parameters]
        one = inspect.Parameter(first, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation="_Path")
        if first in names:
            one = parameters.pop(names.index(first)).replace(kind=inspect.Parameter.POSITIONAL_OR_KEYWORD)
        rest = [_may_be_left_out(each).replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in parameters]
        parameters = [_may_be_left_out(one), *rest]
    positional = [one.name for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD]

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        owner, given = args[:owners], args[owners:]
        twice = [name for name, _ in zip(positional, given) if name in options]
        found: Exception
        if len(given) > len(positional) or twice:
            problem = f"got several values for {twice[0]!r}" if twice else "takes its options by keyword"
            found = TypeError(f"{function.__qualname__}() {problem}")
        else:
            options.update(zip(positional, given))
            # At once: a warning that is logged below may be reported with all frames that are running.
            conceal(options)
            try:
                return function(*owner, options)
            except ConfigurationError as error:
                # Without its traceback, whose frames hold an object that is not whole.
                found = error.with_traceback(None)
            finally:
                options.clear()
        # An error's frames must not hold plain tokens.
        del args, owner, given
        options.clear()
        raise found

    before = list(inspect.signature(function).parameters.values())[:owners]
    returned = function.__annotations__["return"]
    call.__signature__ = inspect.Signature([*before, *parameters], return_annotation=returned)  # type: ignore[attr-defined]
    call.__annotations__ = {"return": returned}
    return call


# -- checks -----------------------------------------------------------------------------------------------------------


def _fail(attribute: Any, problem: str) -> None:
    raise ConfigurationError(problem, attribute.name)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _seconds(instance: object, attribute: Any, value: Any) -> None:
    check_number(attribute.name, value, most=_LONGEST)


def _seconds_or_zero(instance: object, attribute: Any, value: Any) -> None:
    check_number(attribute.name, value, zero=True, most=_LONGEST)


def _optional_seconds(instance: object, attribute: Any, value: Any) -> None:
    if value is not None:
        _seconds(instance, attribute, value)


def _count(instance: object, attribute: Any, value: Any) -> None:
    check_whole(attribute.name, value)


def _optional_count(instance: object, attribute: Any, value: Any) -> None:
    check_whole(attribute.name, value, least=0, or_none=True)


def _flag(instance: object, attribute: Any, value: Any) -> None:
    if not isinstance(value, bool):
        _fail(attribute, f"must be True or False, got {value!r}")


def _optional_flag(instance: object, attribute: Any, value: Any) -> None:
    if value is not None:
        _flag(instance, attribute, value)


#: The forms of a log line; the first is the default.
LOG_FORMATS = ("text", "json")


def _not_a_format(value: object) -> str:
    return f"must be {' or '.join(map(repr, LOG_FORMATS))}, got {value!r}"


def _log_format(instance: object, attribute: Any, value: Any) -> None:
    if value not in (None, *LOG_FORMATS):
        _fail(attribute, _not_a_format(value))


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


def _optional_header(instance: object, attribute: Any, value: Any) -> None:
    if value is None:
        return
    is_text = isinstance(value, str) and value.isascii() and value.isprintable() and value == value.strip()
    if not is_text or not 0 < len(value) <= 1024:
        _fail(attribute, "must be a str of 1 to 1,024 visible ASCII characters, without a space at an end")


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


#: Where health and metrics are: a pair (host, port), or its text.
HealthAddress = Union[Tuple[str, int], str]
_HEALTH_FORM = "must be (host, port) such as ('127.0.0.1', 8080), or its text: '8080' for this machine, '0.0.0.0:8080'"


def shown_address(address: Tuple[str, int]) -> str:
    """Return an address as URLs have it."""
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def health_address(text: str) -> Optional[Tuple[str, int]]:
    """Return the address that ``[HOST:]PORT`` names, or None if it has another form. Without a host it is loopback."""
    host, colon, port = text.rpartition(":")
    if not port.isascii() or not port.isdigit() or len(port) > 5 or int(port) > 65535:
        return None
    if not colon:
        return "127.0.0.1", int(port)
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        return None
    is_name = host.isascii() and host.isprintable() and not set(host) & set(" /@[]")
    return (host, int(port)) if host and is_name else None


def _health(value: Optional[HealthAddress]) -> Any:
    if isinstance(value, str):
        return health_address(value) or value
    return tuple(value) if isinstance(value, (list, tuple)) else value


def _at_port(instance: object, attribute: Any, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, tuple) and len(value) == 2:
        host, port = value
        is_typed = isinstance(host, str) and type(port) is int and port >= 0
        if is_typed and health_address(shown_address((host, port))) == (host, port):
            return
    _fail(attribute, f"{_HEALTH_FORM}; got {value!r}"[:300])


def _credentials_store(value: Optional[CredentialsStore]) -> Any:
    return value


def _policy_gateway(value: Optional[PolicyChecks]) -> Any:
    return value


def check_capability(name: object, option: str) -> str:
    """Return ``name`` if it can name a capability.

    :raises ConfigurationError: it is not a str, is empty, or holds a comma or a control character.
    """
    if not isinstance(name, str):
        raise ConfigurationError(f"a capability's name must be a str, got {type(name).__name__}", option)
    if not protocol.is_id(name) or "," in name or name != name.strip():
        raise ConfigurationError(
            f"{name!r} cannot name a capability: 1 to 256 bytes, no comma, control character or space at an end", option
        )
    return name


def _capabilities(value: Iterable[str]) -> Tuple[str, ...]:
    names: Any
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
    """Return True if ``host`` is this machine: ``localhost``, or an address of the loopback range."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _base_url(value: str) -> str:
    option = "api_base_url"
    if not _is_text(value):
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


def _keys(value: Iterable[str]) -> Tuple[str, ...]:
    if isinstance(value, (str, bytes)):
        raise ConfigurationError("must be a list of keys, not a single one", "trusted_policy_keys")
    keys: Tuple[Any, ...]
    try:
        keys = tuple(value)
    except TypeError:
        keys = (value,)
    if not all(isinstance(key, str) and key for key in keys):
        raise ConfigurationError(
            "must be a list of Ed25519 public keys, each a str in hex or base64", "trusted_policy_keys"
        )
    return keys


def _signature_form(instance: object, attribute: Any, value: Any) -> None:
    if value not in SIGNATURE_FORMS:
        _fail(attribute, f"must be {' or '.join(map(repr, SIGNATURE_FORMS))}, got {value!r}")


def _endpoints(value: Union[protocol.Endpoints, Mapping[str, str], None]) -> protocol.Endpoints:
    return value if isinstance(value, protocol.Endpoints) else protocol.Endpoints(value)


def _ca_path(value: Union[bool, str, os.PathLike[str]]) -> Union[bool, str]:
    return _as_str(value)  # type: ignore[no-any-return]


def _cert_paths(
    value: Union[str, os.PathLike[str], Tuple[Union[str, os.PathLike[str]], Union[str, os.PathLike[str]]], None],
) -> Union[str, Tuple[str, str], None]:
    return _as_str(value)  # type: ignore[no-any-return]


def _proxies(value: Optional[Mapping[str, str]]) -> Any:
    given: Any = value
    if given is None or isinstance(given, HiddenUrls):
        return given
    if isinstance(given, Mapping) and all(
        isinstance(key, str) and isinstance(url, str) and "://" in url for key, url in given.items()
    ):
        return HiddenUrls(given)
    # For the check, which refuses it. It is not kept: it may hold a password.
    return type(given)


def _policy_options(value: Optional[Mapping[str, Any]]) -> Any:
    uri = value.get("storage_uri") if isinstance(value, Mapping) else None
    # It may hold the password of a store.
    return {**value, "storage_uri": hide(uri)} if value is not None and isinstance(uri, str) else value


#: Options that may hold secrets, with what hides them. The configurations use it too.
_CONCEALED: Mapping[str, Callable[[Any], Any]] = {
    "api_key": to_secret,
    "install_token": to_secret,
    "policy_options": _policy_options,
    "proxies": _proxies,
    "refresh_token": to_secret,
    "runtime_token": to_secret,
}


def conceal(options: Dict[str, Any]) -> None:
    """Replace plain tokens and passwords among ``options`` by objects that do not show them. What is wrong stays so."""
    for name in _CONCEALED.keys() & options.keys():
        options[name] = _CONCEALED[name](options[name])


def _as_str(path: Any) -> Any:
    # requests accepts paths as str only: it counts a Path as a pair, or ignores it.
    if isinstance(path, os.PathLike):
        return os.fspath(path)
    if isinstance(path, (tuple, list)):
        return tuple(_as_str(one) for one in path)
    return path


def _file(option: str, value: object) -> None:
    if not isinstance(value, str) or not os.path.exists(value):
        raise ConfigurationError(f"no such file: {value!r}", option)


# -- the settings -----------------------------------------------------------------------------------------------------


# Each option is declared here, once: name, type, default and check. The callables that take it are typed by
# `takes_options`; where one leaves an option out, its class declares it again with `init=False`.
# `kw_only` is given for each field, because `agent_id` may be positional, and releases of attrs differ in what it
# means for a class.


@attrs.frozen(slots=False, eq=False, repr=False)
class ConnectionConfig(Shown):
    """Say how to reach the platform. Times are in seconds.

    :param api_base_url: where the platform is, without ``/api/v1``.
    :param connect_timeout: longest wait for a connection, TLS included.
    :param read_timeout: longest wait for an answer, body included.
    :param verify: True, False, or the path of a CA bundle.
    :param client_cert: the path of a certificate with its key, or a pair (certificate, key).
    :param proxies: a mapping from scheme to URL. None: from the environment; ``{}``: no proxy.
    :param allow_insecure_http: permit ``http://`` to a host that is not this machine.
    :param device_fingerprint: sent as ``X-Device-Fingerprint`` with each API key, where the platform asks for one.
    :param endpoints: paths that differ from the contract's (:class:`sekuire.wire.protocol.Endpoints`).
    """

    api_base_url: str = attrs.field(default=protocol.DEFAULT_API_BASE_URL, converter=_base_url, kw_only=True)
    connect_timeout: float = attrs.field(default=3.0, validator=_seconds, kw_only=True)
    read_timeout: float = attrs.field(default=10.0, validator=_seconds, kw_only=True)
    verify: Union[bool, str] = attrs.field(default=True, converter=_ca_path, kw_only=True)
    client_cert: Union[str, Tuple[str, str], None] = attrs.field(default=None, converter=_cert_paths, kw_only=True)
    proxies: Optional[Mapping[str, str]] = attrs.field(default=None, converter=_proxies, repr=False, kw_only=True)
    allow_insecure_http: bool = attrs.field(default=False, validator=_flag, kw_only=True)
    device_fingerprint: Optional[str] = attrs.field(default=None, validator=_optional_header, kw_only=True)
    endpoints: protocol.Endpoints = attrs.field(default=None, converter=_endpoints, repr=False, kw_only=True)

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
        if value is not None and not isinstance(value, HiddenUrls):
            _fail(attribute, "must map 'http' and 'https' to URLs such as 'http://proxy.example:3128'")

    @allow_insecure_http.validator
    def _check_scheme(self, attribute: Any, value: bool) -> None:
        parts = urlsplit(self.api_base_url)
        if parts.scheme == "http" and not value and not is_loopback(parts.hostname or ""):
            raise ConfigurationError(
                "is http:// to another machine, so tokens would travel unencrypted; use https://, or pass "
                "allow_insecure_http=True (SEKUIRE_ALLOW_INSECURE_HTTP=1) where the network itself is trusted",
                "api_base_url",
            )


@attrs.frozen(slots=False, eq=False, repr=False)
class AgentConfig(ConnectionConfig):
    """Say who the agent is and how it authenticates. A Beacon, an SDK and a Worker share these options."""

    agent_id: str = attrs.field(validator=_identifier)
    install_token: Optional[Secret] = attrs.field(
        default=None, converter=to_secret, validator=check_secret, kw_only=True
    )
    runtime_token: Optional[Secret] = attrs.field(
        default=None, converter=to_secret, validator=check_secret, kw_only=True
    )
    installation_id: Optional[str] = attrs.field(default=None, validator=_optional_identifier, kw_only=True)
    refresh_token: Optional[Secret] = attrs.field(
        default=None, converter=to_secret, validator=check_secret, kw_only=True
    )
    credentials_store: Any = attrs.field(
        default=None,
        converter=_credentials_store,
        validator=_offers("current", "generation", "update"),
        repr=False,
        kw_only=True,
    )
    capabilities: Tuple[str, ...] = attrs.field(default=(), converter=_capabilities, kw_only=True)
    policy_gateway: Any = attrs.field(
        default=None,
        converter=_policy_gateway,
        validator=_offers("check_request", "check_capability", "on_heartbeat_response"),
        repr=False,
        kw_only=True,
    )

    def __attrs_post_init__(self) -> None:
        if self.refresh_token is not None and self.installation_id is None and self.credentials_store is None:
            raise ConfigurationError("is needed with refresh_token: it says whose token it is", "installation_id")
        if self.endpoints.bootstrap_names_installation and self.install_token and self.installation_id is None:
            raise ConfigurationError("is needed where endpoints['bootstrap'] holds it", "installation_id")


@attrs.frozen(slots=False, eq=False, repr=False)
class BeaconConfig(AgentConfig):
    """Hold the settings of a :class:`sekuire.Beacon`. Times are in seconds."""

    api_key: Optional[Secret] = attrs.field(default=None, converter=to_secret, validator=check_secret, kw_only=True)
    workspace_id: Optional[str] = attrs.field(default=None, validator=_optional_identifier, kw_only=True)
    heartbeat_interval: float = attrs.field(default=60.0, validator=_seconds, kw_only=True)
    on_status_change: Optional[Callable[[BeaconStatus], object]] = attrs.field(
        default=None, validator=_optional_callable, repr=False, kw_only=True
    )
    required: bool = attrs.field(default=True, validator=_flag, kw_only=True)

    def __attrs_post_init__(self) -> None:
        AgentConfig.__attrs_post_init__(self)
        if self.runtime_token is not None and self.installation_id is None and self.credentials_store is None:
            raise ConfigurationError(
                "is needed with runtime_token: heartbeats carry it in their path", "installation_id"
            )


@attrs.frozen(slots=False, eq=False, repr=False)
class PolicyTrust(Shown):
    """Say whose policies are believed. A PolicyClient and an SDK share these options.

    :param policy_signature: ``"bound"``: the platform signs the policy's id, version and workspace with its hash.
        ``"hash"``: a signature over the hash alone is accepted too; older policies can then be replayed.
    """

    trusted_policy_keys: Tuple[str, ...] = attrs.field(default=(), converter=_keys, kw_only=True)
    policy_signature: Literal["bound", "hash"] = attrs.field(default="bound", validator=_signature_form, kw_only=True)


@attrs.frozen(slots=False, eq=False, repr=False)
class SDKConfig(BeaconConfig, PolicyTrust):
    """Hold the settings of a :class:`sekuire.SekuireSDK`. Times are in seconds."""

    # The SDK itself listens to its Beacon.
    on_status_change: Optional[Callable[[BeaconStatus], object]] = attrs.field(default=None, init=False, repr=False)
    agent_name: Optional[str] = attrs.field(default=None, validator=_optional_text, kw_only=True)
    policy_path: Union[str, os.PathLike[str], None] = attrs.field(default=None, validator=_optional_path, kw_only=True)
    policy_options: Optional[Mapping[str, Any]] = attrs.field(
        default=None, converter=_policy_options, validator=_optional_mapping, repr=False, kw_only=True
    )
    auto_heartbeat: bool = attrs.field(default=True, validator=_flag, kw_only=True)
    environment: str = attrs.field(default="production", validator=_text, kw_only=True)
    logging_enabled: bool = attrs.field(default=True, validator=_flag, kw_only=True)
    result_encoder: Optional[Callable[[Any], Any]] = attrs.field(
        default=None, validator=_optional_callable, repr=False, kw_only=True
    )
    health: Optional[Tuple[str, int]] = attrs.field(default=None, converter=_health, validator=_at_port, kw_only=True)
    approval_handler: Optional[ApprovalHandler] = attrs.field(
        default=None, validator=_optional_callable, repr=False, kw_only=True
    )
    quiet: Optional[bool] = attrs.field(default=None, validator=_optional_flag, kw_only=True)
    log_format: Optional[str] = attrs.field(default=None, validator=_log_format, kw_only=True)


@attrs.frozen(slots=False, eq=False, repr=False)
class PolicyClientConfig(ConnectionConfig, PolicyTrust):
    """Hold the settings of a :class:`sekuire.PolicyClient`. Times are in seconds."""

    # Declared again, because it may be positional here.
    api_base_url: str = attrs.field(default=protocol.DEFAULT_API_BASE_URL, converter=_base_url)
    api_key: Optional[Secret] = attrs.field(default=None, converter=to_secret, validator=check_secret, kw_only=True)
    credentials_store: Any = attrs.field(
        default=None,
        converter=_credentials_store,
        validator=_offers("snapshot", "reload"),
        repr=False,
        kw_only=True,
    )
    token_provider: Optional[TokenSource] = attrs.field(
        default=None, validator=_optional_callable, repr=False, kw_only=True
    )
    cache_ttl: float = attrs.field(default=300.0, validator=_seconds_or_zero, kw_only=True)
    path: Union[str, os.PathLike[str], None] = attrs.field(default=None, validator=_optional_path, kw_only=True)

    def __attrs_post_init__(self) -> None:
        if self.api_key is None and self.credentials_store is None and self.token_provider is None:
            raise ConfigurationError(
                "no credentials: give api_key, a credentials_store that a Worker or Beacon shares, or token_provider"
            )


@discreet_class
@attrs.frozen(slots=False, eq=False, repr=False)
class ClientConfig(ConnectionConfig):
    """Hold the settings of a :class:`sekuire.SekuireClient`. Times are in seconds, sizes in bytes.

    :param api_key: the platform's key, ``sk_live_...``.
    :param agent_id: the agent that gets tasks for which no other is named.
    :param workspace_id: the workspace of tasks for which no other is named. None: the platform's default.
    :param retry_for: how long a call is sent again while the platform cannot be reached or says that it is busy.
    :param max_result_bytes: most bytes of a task as the platform returns it, with its input and output.
    """

    api_key: Optional[Secret] = attrs.field(default=None, converter=to_secret, validator=check_secret, kw_only=True)
    agent_id: Optional[str] = attrs.field(default=None, validator=_optional_identifier, kw_only=True)
    workspace_id: Optional[str] = attrs.field(default=None, validator=_optional_identifier, kw_only=True)
    retry_for: float = attrs.field(default=60.0, validator=_seconds_or_zero, kw_only=True)
    max_result_bytes: int = attrs.field(default=16 * MIB, validator=_count, kw_only=True)


@discreet_class
@attrs.frozen(slots=False, eq=False, repr=False)
class WorkerConfig(AgentConfig):
    """Hold the settings of a :class:`~sekuire.Worker`. Times are in seconds, sizes in bytes. ::

        config = WorkerConfig(agent_id="support-agent", install_token="skt_install_...", max_workers=4)
        worker = Worker(config)

    :func:`~sekuire.create_worker` makes both from the same keywords.

    :param max_workers: how many handlers run at once.
    :param max_queued: how many tasks the platform may send beyond those that run. None: as many as ``max_workers``.
    :param task_timeout: longest run of a handler. None: no limit.
    :param start_timeout: how long :meth:`~sekuire.Worker.start` waits for the login's first verdict.
    :param shutdown_timeout: how long a stop lets running handlers go on, reports included.
    :param stop_when_idle: stop after this long without a task, or with an error after as long without the platform.
        None: never.
    :param stream_idle_timeout: reopen a stream on which nothing has come for this long.
    :param max_waiting_bytes: most bytes of the tasks that wait; further tasks are released.
    :param outbox: a file that keeps results until the platform has them, also through a crash. One process may use it
        at a time.
    :param result_encoder: called with each value of a result that has no JSON form; returns one that has, or raises
        TypeError.
    :param approval_handler: decides on requests for approval where the platform offers none, as
        :func:`sekuire.approvals.ask_on_terminal` does. It approves by returning True, and by nothing else.
    :param expose_errors: send the message of an unexpected exception to the platform; False: only its type.
    :param quiet: print no lines for people on stderr, in all of the process. None: as ``SEKUIRE_QUIET`` says.
    :param log_format: ``"text"`` or ``"json"``: the form of the lines that the library prints where the program has no
        logging, in all of the process. None: as ``SEKUIRE_LOG_FORMAT`` says.
    :param health: where health and metrics are shown over HTTP, such as ``("127.0.0.1", 8080)``. None: nowhere.
    :raises ConfigurationError: a value is wrong; the error names its option.
    """

    token_provider: Optional[TokenSource] = attrs.field(
        default=None, validator=_optional_callable, repr=False, kw_only=True
    )
    policy_required: bool = attrs.field(default=False, validator=_flag, kw_only=True)
    heartbeat_interval: float = attrs.field(default=10.0, validator=_seconds, kw_only=True)
    max_workers: int = attrs.field(default=8, validator=_count, kw_only=True)
    max_queued: Optional[int] = attrs.field(default=None, validator=_optional_count, kw_only=True)
    executor: Optional[concurrent.futures.Executor] = attrs.field(
        default=None, validator=_executor, repr=False, kw_only=True
    )
    task_timeout: Optional[float] = attrs.field(default=None, validator=_optional_seconds, kw_only=True)
    start_timeout: float = attrs.field(default=10.0, validator=_seconds_or_zero, kw_only=True)
    shutdown_timeout: float = attrs.field(default=30.0, validator=_seconds_or_zero, kw_only=True)
    stop_when_idle: Optional[float] = attrs.field(default=None, validator=_optional_seconds, kw_only=True)
    stream_idle_timeout: float = attrs.field(default=45.0, validator=_seconds, kw_only=True)
    reconnect_min: float = attrs.field(default=0.5, validator=_seconds, kw_only=True)
    reconnect_max: float = attrs.field(default=30.0, validator=_seconds, kw_only=True)
    max_event_bytes: int = attrs.field(default=16 * MIB, validator=_count, kw_only=True)
    max_result_bytes: int = attrs.field(default=16 * MIB, validator=_count, kw_only=True)
    max_waiting_bytes: int = attrs.field(default=64 * MIB, validator=_count, kw_only=True)
    outbox: Union[str, os.PathLike[str], None] = attrs.field(default=None, validator=_optional_path, kw_only=True)
    result_encoder: Optional[Callable[[Any], Any]] = attrs.field(
        default=None, validator=_optional_callable, repr=False, kw_only=True
    )
    expose_errors: bool = attrs.field(default=True, validator=_flag, kw_only=True)
    approval_handler: Optional[ApprovalHandler] = attrs.field(
        default=None, validator=_optional_callable, repr=False, kw_only=True
    )
    quiet: Optional[bool] = attrs.field(default=None, validator=_optional_flag, kw_only=True)
    log_format: Optional[str] = attrs.field(default=None, validator=_log_format, kw_only=True)
    health: Optional[Tuple[str, int]] = attrs.field(default=None, converter=_health, validator=_at_port, kw_only=True)

    def __attrs_post_init__(self) -> None:
        AgentConfig.__attrs_post_init__(self)
        if self.reconnect_min > self.reconnect_max:
            raise ConfigurationError(
                f"must be at least reconnect_min ({self.reconnect_min}), got {self.reconnect_max}", "reconnect_max"
            )

    @property
    def queue_size(self) -> int:
        """Return how many tasks the platform may send beyond those that run."""
        return self.max_workers if self.max_queued is None else self.max_queued


#: The options of a Worker that a SekuireSDK decides: its ``create_task_worker`` refuses them.
DECIDED_BY_SDK = (
    "agent_id",
    "api_base_url",
    "install_token",
    "runtime_token",
    "installation_id",
    "refresh_token",
    "credentials_store",
    "token_provider",
    "policy_gateway",
)

# For type checkers only, because attrs takes a millisecond to make a class.
if TYPE_CHECKING:

    @attrs.frozen
    class EnvironmentConfig(SDKConfig):
        """Hold the options of ``SekuireSDK.from_env``, which finds the agent's id in the environment."""

        env_file: Union[str, os.PathLike[str], None] = attrs.field(default=None)
        agent_id: str = attrs.field(default="", kw_only=True)

    @attrs.frozen
    class TaskWorkerConfig(WorkerConfig):
        """Hold the options of ``SekuireSDK.create_task_worker``: a Worker's, without those in DECIDED_BY_SDK."""

        # Declared again, because it may be positional here.
        capabilities: Tuple[str, ...] = attrs.field(default=(), converter=_capabilities)
        agent_id: str = attrs.field(default="", init=False)
        api_base_url: str = attrs.field(default="", init=False)
        install_token: None = attrs.field(default=None, init=False)
        runtime_token: None = attrs.field(default=None, init=False)
        installation_id: None = attrs.field(default=None, init=False)
        refresh_token: None = attrs.field(default=None, init=False)
        credentials_store: None = attrs.field(default=None, init=False)
        token_provider: None = attrs.field(default=None, init=False)
        policy_gateway: None = attrs.field(default=None, init=False)

else:
    EnvironmentConfig, TaskWorkerConfig = SDKConfig, WorkerConfig


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
    "log_format": "SEKUIRE_LOG_FORMAT",
    "device_fingerprint": "SEKUIRE_DEVICE_FINGERPRINT",
    "policy_signature": "SEKUIRE_POLICY_SIGNATURE",
    "health": "SEKUIRE_WORKER_HTTP",
}
#: Boolean option → environment variable.
BOOLEAN_ENVIRONMENT: Mapping[str, str] = {
    "allow_insecure_http": "SEKUIRE_ALLOW_INSECURE_HTTP",
    "quiet": "SEKUIRE_QUIET",
}

OUTBOX_VARIABLE = "SEKUIRE_OUTBOX"
CREDENTIALS_FILE_VARIABLE = "SEKUIRE_CREDENTIALS_FILE"
POLICY_KEYS_VARIABLE = "SEKUIRE_POLICY_PUBLIC_KEYS"
POLICY_OVERRIDE_VARIABLE = "SEKUIRE_POLICY_DEV_OVERRIDE"
HEALTH_STATUS_VARIABLE = "SEKUIRE_WORKER_HTTP_STATUS"

#: All variables that this library reads.
KNOWN_VARIABLES = (
    *ENVIRONMENT.values(),
    *BOOLEAN_ENVIRONMENT.values(),
    OUTBOX_VARIABLE,
    CREDENTIALS_FILE_VARIABLE,
    POLICY_KEYS_VARIABLE,
    POLICY_OVERRIDE_VARIABLE,
    HEALTH_STATUS_VARIABLE,
)
#: Set by the library itself for its child processes.
OWN_VARIABLES = frozenset(("SEKUIRE_RELOADER", "SEKUIRE_WORKER_RELOAD"))
#: Kubernetes sets these for a service whose name begins with "sekuire".
_SERVICE_LINK = re.compile(r"_(SERVICE_HOST|SERVICE_PORT(_.+)?|PORT(_.+)?)\Z")


#: Characters that a file, a shell or a YAML document leaves around a value. No value begins or ends with them.
_QUOTES = "\"'`\u2018\u2019\u201c\u201d"
_UNSEEN = "\ufeff\u200b\u2060"
_YES, _NO = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


class EnvFile:
    """Hold the ``SEKUIRE_...`` variables of a file, without those that the environment sets itself."""

    __slots__ = ("path", "set_elsewhere", "values")

    def __init__(self, path: str, values: Mapping[str, str], set_elsewhere: Sequence[str] = ()) -> None:
        self.path = path
        self.values = values
        #: The names in the file that the environment sets too.
        self.set_elsewhere = tuple(set_elsewhere)

    def __repr__(self) -> str:
        return f"<EnvFile {self.path!r}: {', '.join(self.values)}>"


#: The file whose variables count where the environment sets none. Each thread has its own value, so there is no lock.
_env_file: contextvars.ContextVar[Optional[EnvFile]] = contextvars.ContextVar("sekuire_env_file", default=None)


@contextlib.contextmanager
def using_file(file: Optional[EnvFile]) -> Iterator[None]:
    """Read the variables that the environment does not set from ``file``, inside the context and on this thread.

    None changes nothing: a file in use stays so.
    """
    if file is None:
        yield
        return
    token = _env_file.set(file)
    try:
        yield
    finally:
        _env_file.reset(token)


def file_in_use() -> Optional[EnvFile]:
    """Return the file whose variables count here, or None."""
    return _env_file.get()


def _raw(name: str) -> Optional[str]:
    value = os.environ.get(name)
    file = _env_file.get()
    return file.values.get(name) if value is None and file is not None else value


def source_of(name: str) -> str:
    """Return how an error names the environment variable ``name``."""
    file = _env_file.get()
    value = None if file is None else file.values.get(name)
    # A command sets them in the environment too.
    if file is not None and value is not None and os.environ.get(name, value) == value:
        return f"{name} in {file.path}"
    return f"environment variable {name}"


def variable(name: str, option: Optional[str] = None) -> Optional[str]:
    """Return the value of an environment variable, or None if it is not set or empty.

    :param option: the option that it gives, for the error.
    :raises ConfigurationError: the value begins or ends with a quote, a byte order mark, a space or a line end. The
        error does not show the value, which may be a token.
    """
    value = _raw(name)
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
    """Return the value of a boolean environment variable. Return False if it is not set or empty.

    :raises ConfigurationError: the value is neither 1, true, yes, on nor 0, false, no, off, in any case. Also as
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


def keep_quiet(quiet: Optional[bool]) -> None:
    """Print no lines for people in this process, if the option ``quiet`` or, without it, ``SEKUIRE_QUIET`` says so.

    :raises ConfigurationError: the variable is neither true nor false.
    """
    if boolean_variable(BOOLEAN_ENVIRONMENT["quiet"]) if quiet is None else quiet:
        speech.is_quiet = True


def log_format(given: Optional[str]) -> str:
    """Return ``"json"`` or ``"text"``: the option ``log_format`` or, without it, ``SEKUIRE_LOG_FORMAT``.

    :raises ConfigurationError: the variable holds another format.
    """
    name = ENVIRONMENT["log_format"]
    found = variable(name) if given is None else given
    if found not in (None, *LOG_FORMATS):
        raise ConfigurationError(_not_a_format(found), "log_format", source_of(name))
    return found or LOG_FORMATS[0]


_PRODUCTION = frozenset(("production", "prod", "prd"))
_NOT_PRODUCTION = frozenset(("non", "not", "no", "pre", "like", "test"))


def is_production(environment: str) -> bool:
    """Return True if ``environment`` means production, however it is written, such as ``PROD`` or ``prod-eu``."""
    words = set(re.findall("[a-z]+", unicodedata.normalize("NFKC", environment).casefold()))
    return bool(words & _PRODUCTION) and not words & _NOT_PRODUCTION


def policy_keys_from_environment() -> Tuple[str, ...]:
    """Return the public keys in ``SEKUIRE_POLICY_PUBLIC_KEYS``, which separates them by commas.

    :raises ConfigurationError: the variable is set and holds no key, or as for :func:`variable`.
    """
    text = variable(POLICY_KEYS_VARIABLE)
    keys = split_policy_keys(text or "")
    if text is not None and not keys:
        raise ConfigurationError(PINS_NOTHING, None, source_of(POLICY_KEYS_VARIABLE))
    return keys


def policy_signature_from_environment() -> str:
    """Return what ``SEKUIRE_POLICY_SIGNATURE`` says of policies' signatures, or ``"bound"`` if it is not set.

    :raises ConfigurationError: it says something else, or as for :func:`variable`.
    """
    name = ENVIRONMENT["policy_signature"]
    value = variable(name) or "bound"
    if value not in SIGNATURE_FORMS:
        raise ConfigurationError(
            f"must be {' or '.join(map(repr, SIGNATURE_FORMS))}, got {value[:40]!r}", None, source_of(name)
        )
    return value


#: The problem of a list of keys that was given and is empty. Its author meant to pin a key.
PINS_NOTHING = "names no key, so that nothing would be pinned; name one, or unset it"


def split_policy_keys(text: str) -> Tuple[str, ...]:
    """Return the public keys in a text that separates them by commas."""
    return tuple(key.strip() for key in text.split(",") if key.strip())


def read_environment(overrides: Mapping[str, Any], names: Sequence[str]) -> Tuple[Dict[str, Any], Dict[str, str]]:
    """Return ``overrides`` completed from the environment, and the source of each option taken from there.

    A variable that is set but empty counts as not set.

    :raises ConfigurationError: as :func:`variable` and :func:`boolean_variable`.
    """
    options = dict(overrides)
    sources: Dict[str, str] = {}
    for name, boolean in BOOLEAN_ENVIRONMENT.items():
        if name not in options and boolean_variable(boolean):
            options[name] = True
            sources[name] = source_of(boolean)
    for name in names:
        if name in options:
            continue
        value = variable(ENVIRONMENT[name], name)
        if value is not None:
            options[name] = value
            sources[name] = source_of(ENVIRONMENT[name])
    conceal(options)
    return options, sources


def unknown_variables() -> Dict[str, str]:
    """Return each ``SEKUIRE_...`` variable that nothing reads, with the one that was probably meant, or ``""``.

    Variables of framework settings (:mod:`sekuire.contrib`) have other places, and Kubernetes' service links count as
    known.
    """
    found: Dict[str, str] = {}
    file = _env_file.get()
    for name in sorted({*os.environ, *(() if file is None else file.values)}):
        if not name.upper().startswith("SEKUIRE_") or name in KNOWN_VARIABLES or name in OWN_VARIABLES:
            continue
        if _SERVICE_LINK.search(name) is None:
            import difflib

            found[name] = next(iter(difflib.get_close_matches(name.upper(), KNOWN_VARIABLES, n=1, cutoff=0.8)), "")
    return found


def advice_on_variable(meant: str) -> str:
    """Return what to do about a variable that nothing reads, of which :func:`unknown_variables` gives ``meant``."""
    return f"did you mean {meant}?" if meant else "unset it, unless another program reads it"
