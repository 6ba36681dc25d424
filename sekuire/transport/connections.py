"""Make the connections of requests and urllib3: choose the address, and drop idle connections that may be dead."""

# Threads: any thread uses the adapter and its pools, and one at a time uses a connection. `_worked` has no lock,
# because each operation on it is one step of a dict.

from __future__ import annotations

import base64
import contextlib
import errno
import functools
import http.client
import math
import os
import selectors
import socket
import sys
from typing import Any, Callable, Dict, List, Optional, Protocol, Sequence, Tuple, cast

import requests.adapters
import urllib3
import urllib3.connection
import urllib3.exceptions
import urllib3.util.connection

from .._internal import fork
from .._internal.clock import time
from .._internal.logs import scrub_loggers
from .answers import CLOSED, ClosedBeforeAnswerError, ConnectionResponse, Source
from .kept import Lane
from .problems import ProxyFaultError, at_answer, at_connect, at_tls, at_tunnel
from .proxies import Proxy

#: Most seconds that one address of a name is tried alone (RFC 8305, section 5, calls it Connection Attempt Delay).
_STAGGER = 0.25
#: Most names whose address is remembered.
_MAX_NAMES = 100

#: What ``connect_ex`` returns for a connect that goes on, or is done already.
_BEGUN = (0, errno.EINPROGRESS, getattr(errno, "WSAEWOULDBLOCK", 0))

_Address = Tuple[int, int, int, Any]

#: The address that worked last for a name and port.
_worked: Dict[Tuple[str, int], Any] = {}


def connect(
    host: str,
    port: int,
    timeout: Optional[float],
    source_address: Optional[Tuple[str, int]] = None,
    options: Optional[Sequence[Tuple[int, int, Any]]] = None,
) -> socket.socket:
    """Return a socket that is connected to one of the addresses of ``host``.

    The address that worked last comes first. While one does not answer, the next ones are tried beside it, all of them
    within the first half of ``timeout``. So a dead address costs a moment, and a slow one has the whole time.

    :raises OSError: no address accepted the connection, or none did in time.
    """
    host = host.strip("[]") if host.startswith("[") else host
    try:
        host.encode("idna")
    except UnicodeError:
        raise urllib3.exceptions.LocationParseError(f"{host!r}, label empty or too long") from None
    addresses = _addresses(host, port)

    def make(address: _Address) -> socket.socket:
        sock = socket.socket(*address[:3])
        try:
            for option in options or ():
                sock.setsockopt(*option)
            if source_address:
                sock.bind(source_address)
        except OSError:
            sock.close()
            raise
        return sock

    if len(addresses) > 1:
        sock, address = _race(addresses, make, timeout)
        if len(_worked) >= _MAX_NAMES:
            _worked.clear()
        _worked[host, port] = address[3]
        sock.settimeout(timeout)
        return sock
    sock = make(addresses[0])
    try:
        sock.settimeout(timeout)
        sock.connect(addresses[0][3])
    except OSError:
        sock.close()
        raise
    return sock


def _addresses(host: str, port: int) -> List[_Address]:
    """Return the addresses of ``host``, each once, in the order in which they are tried."""
    family = urllib3.util.connection.allowed_gai_family()
    found: Dict[Any, _Address] = {}
    for kind, type_, proto, _, address in socket.getaddrinfo(host, port, family, socket.SOCK_STREAM):
        found.setdefault(address, (kind, type_, proto, address))
    if not found:
        raise OSError("getaddrinfo returned no address")
    best = found.pop(_worked.get((host, port)), None)
    return [*([best] if best is not None else []), *found.values()]


def _race(
    addresses: Sequence[_Address], make: Callable[[_Address], socket.socket], timeout: Optional[float]
) -> Tuple[socket.socket, _Address]:
    """Return the first socket that is connected, and its address. Close the others."""
    stagger = _STAGGER if timeout is None else min(_STAGGER, timeout / (2 * len(addresses)))
    end = math.inf if timeout is None else time.monotonic() + timeout
    waiting = list(reversed(addresses))
    trying: Dict[Any, _Address] = {}
    problem: OSError = socket.timeout("timed out")
    try:
        with selectors.DefaultSelector() as selector:
            while waiting or trying:
                if waiting:
                    address = waiting.pop()
                    try:
                        sock = make(address)
                    except OSError as error:
                        problem = error
                        continue
                    trying[sock] = address
                    sock.setblocking(False)
                    code = sock.connect_ex(address[3])
                    if code not in _BEGUN:
                        problem = OSError(code, os.strerror(code))
                        del trying[sock]
                        sock.close()
                        continue
                    selector.register(sock, selectors.EVENT_WRITE)
                left = max(0.0, min(end - time.monotonic(), stagger if waiting else math.inf))
                ready = selector.select(None if left == math.inf else left)
                if not ready and not waiting:
                    raise socket.timeout("timed out")
                for key, _ in ready:
                    sock = cast(socket.socket, key.fileobj)
                    selector.unregister(sock)
                    code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                    address = trying.pop(sock)
                    if code == 0:
                        return sock, address
                    sock.close()
                    problem = OSError(code, os.strerror(code))
        raise problem
    finally:
        for sock in trying:
            sock.close()


def leave_to_parent(sock: Any) -> None:
    """Close ``sock`` in each forked child, which must not use it and must not keep it open."""
    # A socket of another library may allow no weak reference.
    with contextlib.suppress(TypeError):
        fork.reset_in_child(sock, _close_in_child)


def _close_in_child(sock: Any) -> None:
    while sock is not None and not isinstance(sock, socket.socket):
        # TLS within TLS, or pyOpenSSL's.
        sock = getattr(sock, "socket", None)
    # Not by close(), which leaves the descriptor open as long as a file over the socket is.
    descriptor = -1 if sock is None else sock.detach()
    if descriptor >= 0:
        os.close(descriptor)


class Watcher(Protocol):
    """Receive each new socket, to end it from another thread."""

    def attach(self, sock: socket.socket) -> None:
        """Note ``sock``, which has begun to connect. The connecting thread calls this."""


class _TunnelRefusedError(Exception):
    """A proxy refused to connect."""

    def __init__(self, status: int, headers: http.client.HTTPMessage) -> None:
        super().__init__(status)
        self.status = status
        self.headers = headers


class _TunnelResponse(ConnectionResponse):
    """The answer to CONNECT. http.client does not read the headers of a refusal, which may say why."""

    def _read_status(self) -> Tuple[str, int, str]:
        version, status, reason = super()._read_status()
        if status != http.HTTPStatus.OK:
            headers = http.client.HTTPMessage()
            with contextlib.suppress(OSError, http.client.HTTPException):
                headers = http.client.parse_headers(cast(Any, self.fp))
            raise _TunnelRefusedError(status, headers)
        return version, status, reason


class PooledConnection:
    """Add the address choice and the answers of this package to a connection class of urllib3."""

    lane: Optional[Lane] = None
    watcher: Optional[Watcher] = None
    #: The proxy between, or None. A SOCKS proxy is asked here: to urllib3 the connection is a direct one.
    via: Optional[Proxy] = None
    #: When it gave its last answer (``time.monotonic()``), 0 for a connection that has given none.
    answered_at = 0.0
    #: Where a program has set it for all connections, http.client would print requests, and with them tokens.
    debuglevel = 0
    _source: Optional[Source] = None
    _is_tunnelling = False
    _tunnel_answer: Optional[ConnectionResponse] = None
    # What urllib3's class has.
    _dns_host: str
    _tunnel_host: Optional[str]
    _tunnel_port: Optional[int]

    def connect(self) -> None:
        self.answered_at = 0.0
        try:
            cast(Any, super()).connect()
        except ProxyFaultError:
            raise
        except (OSError, ValueError, urllib3.exceptions.HTTPError) as error:
            if self.via is None or self.via.scheme != "https" or self._tunnel_target:
                raise
            # Without a tunnel, TLS is only with the proxy.
            raise at_tls(self.via, error) from error
        leave_to_parent(cast(Any, self).sock)

    @property
    def _tunnel_target(self) -> str:
        """The host and port that the proxy is asked for, or an empty string where it gets whole requests."""
        return f"{self._tunnel_host}:{self._tunnel_port}" if getattr(self, "_tunnel_host", None) else ""

    def _new_conn(self) -> socket.socket:
        this = cast(Any, self)
        via = self.via
        begun = time.monotonic()
        if via is not None and via.is_socks:
            sock = self._dial(via.host, via.port)
        else:
            sock = self._dial(self._dns_host, this.port)
        if self.watcher is not None:
            self.watcher.attach(sock)
        if via is not None and via.is_socks:
            from .negotiation import negotiate

            timeout: Optional[float] = this.timeout
            left = None if timeout is None else max(timeout - (time.monotonic() - begun), 0.001)
            sock = negotiate(sock, via, this.host, this.port, left)
            sock.settimeout(timeout)
        return sock

    def _dial(self, host: str, port: int) -> socket.socket:
        this = cast(Any, self)
        try:
            sock = connect(host, port, this.timeout, this.source_address, this.socket_options)
        except OSError as error:
            if self.via is not None:
                raise at_connect(self.via, error) from error
            if isinstance(error, socket.timeout):
                text = f"connecting to {this.host} timed out (connect timeout={this.timeout})"
                raise urllib3.exceptions.ConnectTimeoutError(this, text) from error
            raise urllib3.exceptions.NewConnectionError(this, f"cannot connect: {error}") from error
        sys.audit("http.client.connect", self, host, port)
        return sock

    def _connect_tls_proxy(self, *args: Any, **options: Any) -> Any:
        try:
            return cast(Any, super())._connect_tls_proxy(*args, **options)
        except (OSError, ValueError, urllib3.exceptions.HTTPError) as error:
            raise at_tls(cast(Proxy, self.via), error) from error

    def _tunnel(self) -> None:
        via = cast(Proxy, self.via)
        self._is_tunnelling = True
        try:
            cast(Any, super())._tunnel()
        except _TunnelRefusedError as refusal:
            fault = at_tunnel(via, self._tunnel_target, refusal.status, refusal.headers)
            raise fault from refusal
        except (OSError, http.client.HTTPException) as error:
            problem = at_answer(via, self._tunnel_target, error)
            if problem is None:
                raise
            raise problem from error
        finally:
            self._is_tunnelling = False
            # Not every http.client closes it, and it would keep the socket open.
            answer, self._tunnel_answer = self._tunnel_answer, None
            if answer is not None:
                answer.close()

    def send(self, data: Any) -> None:
        try:
            cast(Any, super()).send(data)
        except CLOSED as error:
            if isinstance(error, BrokenPipeError) or not self.answered_at:
                raise
            # For urllib3 only this error means that there may be an answer to read.
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE)) from error

    def response_class(self, sock: Any, *args: Any, **options: Any) -> ConnectionResponse:
        response: ConnectionResponse
        if self._is_tunnelling:
            response = self._tunnel_answer = _TunnelResponse(sock, *args, **options)
        else:
            response = ConnectionResponse(sock, *args, **options)
        self._source = response.source
        return response

    def getresponse(self, *args: Any, **options: Any) -> Any:
        self._source = None
        try:
            response = cast(Any, super()).getresponse(*args, **options)
        except (OSError, http.client.HTTPException) as error:
            if not self.answered_at:
                is_proxys = self.via is not None and not self.via.is_socks and not self._tunnel_target
                if is_proxys and isinstance(error, (http.client.BadStatusLine, *CLOSED)):
                    raise cast(Exception, at_answer(cast(Proxy, self.via), "", error)) from error
                raise
            if self.lane is not None:
                self.lane.empty()
            if not isinstance(error, CLOSED) or self._has_received():
                raise
            raise ClosedBeforeAnswerError(*error.args) from error
        self.answered_at = time.monotonic()
        return response

    def _has_received(self) -> bool:
        return self._source is not None and self._source.has_received


class _Pool:
    """Add to a pool class of urllib3 that it drops idle connections that may be dead."""

    lane: Optional[Lane] = None

    def _get_conn(self, timeout: Optional[float] = None) -> Any:
        found = cast(Any, super())._get_conn(timeout)
        if self.lane is None or not 0.0 < getattr(found, "answered_at", 0.0) <= self.lane.emptied_at:
            return found
        # It was idle when another connection was found dead.
        found.close()
        return cast(Any, self)._new_conn()


# What sends requests, and by which connections, where no tool for tests has replaced it.
_send = requests.adapters.HTTPAdapter.send
_pools: Tuple[Any, ...] = (urllib3.HTTPConnectionPool, urllib3.HTTPSConnectionPool)
_connection_classes: Dict[Any, Any] = {pool: pool.ConnectionCls for pool in _pools}


class Adapter(requests.adapters.HTTPAdapter):
    """Connect to one platform, directly or through a proxy, by connections of :class:`PooledConnection`.

    :param proxy: the proxy between, or None.
    :param lane: keeps idle connections. When it finds one dead, the pools of this adapter drop theirs too.
    :param watcher: gets each new socket, from the connecting thread.
    """

    def __init__(
        self,
        pool_size: int,
        *,
        proxy: Optional[Proxy] = None,
        lane: Optional[Lane] = None,
        watcher: Optional[Watcher] = None,
    ) -> None:
        self._proxy = proxy
        self._lane = lane
        self._watcher = watcher
        scrub_loggers("urllib3", "requests", "sseclient")
        super().__init__(pool_connections=1, pool_maxsize=pool_size, max_retries=0)

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self._extend(self.poolmanager)

    def use_no_mocks(self) -> None:
        """Send over the network also while a tool for tests mocks or records requests (responses, VCR.py)."""
        self.send = functools.partial(_send, self)  # type: ignore[method-assign]
        self.poolmanager.pool_classes_by_scheme = {
            pool.scheme: self._extended(pool, connection) for pool, connection in _connection_classes.items()
        }

    def proxy_manager_for(self, *args: Any, **kwargs: Any) -> Any:
        manager = super().proxy_manager_for(*args, **kwargs)
        self._extend(manager)
        return manager

    def proxy_headers(self, proxy: str) -> Dict[str, str]:
        if self._proxy is None or not self._proxy.has_login:
            return {}
        return {"Proxy-Authorization": "Basic " + base64.b64encode(b":".join(self._proxy.login())).decode("ascii")}

    def cert_verify(self, conn: Any, url: str, verify: Any, cert: Any) -> None:
        if self._proxy is not None and self._proxy.scheme == "https" and not url.lower().startswith("https"):
            # For http:// requests would not check the proxy's certificate. The client certificate is the platform's.
            url, cert = str(self._proxy), None
        cast(Any, super()).cert_verify(conn, url, verify, cert)

    def _extend(self, manager: Any) -> None:
        classes = manager.pool_classes_by_scheme
        if not any(issubclass(pool, _Pool) for pool in classes.values()):
            manager.pool_classes_by_scheme = {
                scheme: self._extended(pool, pool.ConnectionCls) for scheme, pool in classes.items()
            }

    def _extended(self, pool: Any, base: Any) -> Any:
        names = {"lane": self._lane, "watcher": self._watcher, "via": self._proxy}
        connection = type("Connection", (PooledConnection, base), names)
        return type(pool.__name__, (_Pool, pool), {"ConnectionCls": connection, "lane": self._lane})
