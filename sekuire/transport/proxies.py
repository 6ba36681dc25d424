"""Choose the proxy for the platform: from the options, or from the variables of the environment, ``NO_PROXY`` too."""

from __future__ import annotations

import importlib.util
import ipaddress
import os
import re
import urllib.request
from typing import Mapping, Optional, Tuple, Union
from urllib.parse import quote, unquote_to_bytes, urlsplit

import attrs

from .._internal.values import Value
from ..config import is_loopback
from ..errors import ConfigurationError
from ..secret import Secret

#: The kinds of proxy, and the port of each where its URL names none.
_PORTS = {"http": 80, "https": 443, "socks4": 1080, "socks4a": 1080, "socks5": 1080, "socks5h": 1080}
_KINDS = "http://, https://, socks5h://, socks5://, socks4a:// or socks4://"
_HOST_AND_PORT = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\s:\[\]]+)(?::([0-9]{1,5}))?")
#: PySocks writes the length of a user or password as a character in UTF-8, which is one byte up to here.
_MAX_SOCKS_LOGIN = 127

_Address = Union[ipaddress.IPv4Address, ipaddress.IPv6Address]


@attrs.frozen(slots=True, eq=False, repr=False)
class Proxy(Value):
    """Hold where a proxy is. ``str()`` gives its URL without user and password, ``source`` where that URL came from.

    ``url`` holds user and password. It is a Secret, because errors and logs may show this object.
    """

    scheme: str
    host: str
    port: int
    source: str
    has_login: bool
    url: Secret

    def __str__(self) -> str:
        return f"{self.scheme}://{_bracketed(self.host)}:{self.port}"

    @property
    def is_socks(self) -> bool:
        return self.scheme.startswith("socks")

    @property
    def resolves_names(self) -> bool:
        """True if the name of the platform is resolved by the proxy, not on this machine."""
        return self.scheme not in ("socks4", "socks5")

    def login(self) -> Tuple[bytes, bytes]:
        """Return the user and the password. Call it only where they are sent."""
        user, _, password = urlsplit(self.url.reveal()).netloc.rpartition("@")[0].partition(":")
        return unquote_to_bytes(user), unquote_to_bytes(password)


@attrs.frozen(slots=True, eq=False, repr=False)
class Choice(Value):
    """Hold the proxy that is used, or None, and ``reason``, which says why for :program:`sekuire doctor`."""

    proxy: Optional[Proxy]
    reason: str


def choose(base_url: str, given: Optional[Mapping[str, str]]) -> Choice:
    """Return the proxy for ``base_url``.

    :param given: the option ``proxies``. None: from the environment, but for a platform on this machine.
    :raises ConfigurationError: the URL of the proxy cannot be used, or PySocks is missing.
    """
    parts = urlsplit(base_url)
    host = parts.hostname or ""
    keys = (f"{parts.scheme}://{host}", parts.scheme, f"all://{host}", "all")
    if given is not None:
        key = next((key for key in keys if given.get(key)), None)
        if key is None:
            return Choice(None, "the option proxies names none")
        return Choice(_parse(given[key], "proxies", None), "the option proxies")
    if is_loopback(host):
        return Choice(None, "a platform on this machine is reached without one")
    variables = urllib.request.getproxies_environment()
    # Without the variables, macOS and Windows have settings of their own.
    found = variables or urllib.request.getproxies()
    key = next((key for key in keys if found.get(key)), None)
    if key is None:
        return Choice(None, "no variable names one")
    name = _variable(key, found[key])
    if variables:
        port = parts.port or _PORTS[parts.scheme]
        entry = listed(host, port, variables.get("no", ""))
        if entry is not None:
            return Choice(None, f"{name} does not apply: NO_PROXY holds {entry!r}")
    elif urllib.request.proxy_bypass(host):
        return Choice(None, "the settings of the system exclude the platform")
    return Choice(_parse(found[key], None, f"environment variable {name}" if variables else name), name)


def _variable(key: str, url: str) -> str:
    """Return the name of the variable that holds ``url``."""
    names = (f"{key}_proxy".upper(), f"{key}_proxy", *os.environ)
    wanted = f"{key}_proxy".lower()
    return next(
        (name for name in names if name.lower() == wanted and os.environ.get(name) == url), "the settings of the system"
    )


def listed(host: str, port: int, no_proxy: str) -> Optional[str]:
    """Return the entry of ``no_proxy`` that names ``host`` and ``port``, or None.

    Entries are separated by commas or spaces. Each is a name, which stands for those below it too (``corp``, ``.corp``
    and ``*.corp`` are the same), an address, a network (``10.0.0.0/8``, ``fd00::/8``), or ``*`` for everything. It may
    end with ``:PORT``; an IPv6 address is in brackets then.
    """
    name = host.lower().rstrip(".")
    address = _address(name)
    for entry in re.split(r"[\s,]+", no_proxy):
        if entry and _names(entry.lower(), name, address, port):
            return entry
    return None


def _names(entry: str, name: str, address: Optional[_Address], port: int) -> bool:
    match = re.fullmatch(r"\[([^\[\]]+)\](?::(\d+))?", entry) or re.fullmatch(r"([^:]*)(?::(\d+))?", entry)
    # What matches neither is an IPv6 address or network without brackets, which has no port.
    pattern, wanted = match.groups() if match is not None else (entry, None)
    if wanted is not None and int(wanted) != port:
        return False
    if pattern == "*":
        return True
    if address is not None:
        try:
            network = ipaddress.ip_network(pattern, strict=False)
        except ValueError:
            return False
        return address in network
    pattern = pattern.lstrip("*").strip(".")
    return bool(pattern) and (name == pattern or name.endswith(f".{pattern}"))


def _address(host: str) -> Optional[_Address]:
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


def _parse(text: str, option: Optional[str], source: Optional[str]) -> Proxy:
    """Return the proxy with the URL ``text``. Without a scheme it is an HTTP proxy, as for other programs."""

    def wrong(problem: str) -> ConfigurationError:
        return ConfigurationError(f"{problem}; use SCHEME://[USER:PASSWORD@]HOST[:PORT]", option, source)

    text = text.strip()
    if "://" not in text:
        text = f"http://{text}"
    scheme, _, rest = text.partition("://")
    scheme = scheme.lower()
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    if "@" in rest[len(authority) :]:
        raise wrong(
            "the URL of the proxy has '/', '?' or '#' in its user or password, where these are %2F, %3F and %23"
        )
    if scheme not in _PORTS:
        raise wrong(f"the URL of a proxy begins with {_KINDS}" + (", not with socks://" if scheme == "socks" else ""))
    userinfo, _, place = authority.rpartition("@")
    match = _HOST_AND_PORT.fullmatch(place)
    if match is None or not _is_host(match[1]) or not 0 < int(match[2] or _PORTS[scheme]) < 65536:
        raise wrong("the URL of the proxy has no host, or its port is not a number")
    user, _, password = userinfo.partition(":")
    login = ":".join(quote(unquote_to_bytes(part), safe="") for part in (user, password))
    if scheme.startswith("socks"):
        _check_socks(scheme, unquote_to_bytes(user), unquote_to_bytes(password), option, source)
    host = match[1].strip("[]")
    port = int(match[2] or _PORTS[scheme])
    url = f"{scheme}://{f'{login}@' if userinfo else ''}{_bracketed(host)}:{port}"
    return Proxy(scheme, host, port, source or f"the option {option}", bool(userinfo), Secret(url))


def _check_socks(scheme: str, user: bytes, password: bytes, option: Optional[str], source: Optional[str]) -> None:
    if importlib.util.find_spec("socks") is None:
        raise ConfigurationError("a SOCKS proxy needs PySocks; run: pip install 'sekuire[socks]'", option, source)
    if max(len(user), len(password)) > _MAX_SOCKS_LOGIN:
        raise ConfigurationError(
            f"the user or the password of the SOCKS proxy is longer than {_MAX_SOCKS_LOGIN} bytes, which PySocks "
            "cannot send; use a shorter one",
            option,
            source,
        )
    if scheme.startswith("socks5") and bool(user) != bool(password):
        raise ConfigurationError("SOCKS5 needs a user and a password, or neither; write both", option, source)


def _is_host(host: str) -> bool:
    if host.startswith("["):
        return _address(host.strip("[]")) is not None
    try:
        return bool(host.encode("idna")) and host.isascii()
    except UnicodeError:
        return False


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
