"""Ask a SOCKS proxy for a connection, by PySocks. Only this module imports it, and only where there is such a proxy."""

from __future__ import annotations

import math
import socket
from typing import Any, Optional

import socks

from .._internal.clock import time
from .problems import ProxyFaultError
from .proxies import Proxy

_VERSIONS = {"socks4": socks.SOCKS4, "socks4a": socks.SOCKS4, "socks5": socks.SOCKS5, "socks5h": socks.SOCKS5}
#: What the codes of an answer in SOCKS5 mean (RFC 1928, section 6), where more than its words can be said.
_FORBIDDEN, _REFUSED = "0x02", "0x05"


# Not socket.socket: PySocks may have been imported before gevent or eventlet replaced that, and both bases of a class
# must be of one kind.
_Socket: Any = socks.socksocket.__mro__[2]


class _Dialled(_Socket):  # type: ignore[misc]
    """Skip the connect: the socket is connected to the proxy already."""

    def connect(self, address: Any) -> None:
        return


class _Negotiating(socks.socksocket, _Dialled):  # type: ignore[misc]
    """Let PySocks negotiate over an open connection, and let no drop of an answer prolong the time for it."""

    end = math.inf

    def recv_into(self, *args: Any) -> int:
        left = self.end - time.monotonic()
        if left <= 0:
            raise socket.timeout("timed out")
        self.settimeout(None if left == math.inf else left)
        return int(super().recv_into(*args))


def negotiate(sock: socket.socket, proxy: Proxy, host: str, port: int, timeout: Optional[float]) -> socket.socket:
    """Return a socket that leads to ``host``, over ``sock``, which is connected to ``proxy`` and is used up.

    :param timeout: seconds for all of it.
    :raises ProxyFaultError: the proxy did not connect.
    """
    user, password = (part.decode(errors="replace") for part in proxy.login())
    kind = sock.family, sock.type, sock.proto
    negotiating = _Negotiating(*kind, fileno=sock.detach())
    problem: Optional[ProxyFaultError] = None
    try:
        negotiating.set_proxy(
            _VERSIONS[proxy.scheme], proxy.host, proxy.port, proxy.resolves_names, user or None, password or None
        )
        negotiating.settimeout(timeout)
        negotiating.end = math.inf if timeout is None else time.monotonic() + timeout
        negotiating.connect((host.strip("[]"), port))
        result = socket.socket(*kind, fileno=negotiating.detach())
    except (OSError, UnicodeError) as error:
        problem = _fault(error, proxy, f"{host}:{port}")
    finally:
        negotiating.close()
    if problem is not None:
        raise problem
    result.settimeout(timeout)
    return result


def _fault(error: Exception, proxy: Proxy, target: str) -> ProxyFaultError:
    below = getattr(error, "socket_err", None)
    if isinstance(below, socks.ProxyError):
        # PySocks takes its own errors for those of the socket.
        error, below = below, None
    text = str(error)
    if isinstance(below, socket.gaierror) or isinstance(error, UnicodeError):
        return ProxyFaultError(
            f"the name of {target} cannot be resolved on this machine; check api_base_url, or let the proxy resolve it "
            "(socks5h:// or socks4a://)"
        )
    if isinstance(below, socket.timeout):
        return ProxyFaultError(
            f"the proxy {proxy} did not connect to {target} in time; check that it is a SOCKS proxy ({proxy.source}), "
            "and that it can reach the platform"
        )
    if isinstance(error, socks.SOCKS5AuthError):
        return ProxyFaultError.login(proxy)
    if isinstance(error, (socks.SOCKS5Error, socks.SOCKS4Error)):
        code, _, words = text.partition(": ")
        if code == _FORBIDDEN and isinstance(error, socks.SOCKS5Error):
            return ProxyFaultError.forbidden(proxy, target, "SOCKS code 2")
        if code == _REFUSED and isinstance(error, socks.SOCKS5Error):
            return ProxyFaultError.target_refused(proxy, target)
        return ProxyFaultError.unreachable(proxy, target, words)
    # It said something else, or nothing.
    what = "broke the connection" if below is not None or "closed" in text else "did not answer in SOCKS"
    return ProxyFaultError(
        f"the proxy {proxy} {what}; check in {proxy.source} that it is a SOCKS proxy of this version: the URL of an "
        "HTTP proxy begins with http://"
    )
