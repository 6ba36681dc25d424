"""Make the connections of requests and urllib3: choose the address, and drop idle connections that may be dead."""

# Threads: any thread uses the adapter and its pools, and one at a time uses a connection. `_worked` has no lock,
# because each operation on it is one step of a dict.

from __future__ import annotations

import contextlib
import errno
import http.client
import math
import os
import selectors
import socket
import sys
import time
from typing import Any, Callable, Dict, List, Optional, Protocol, Sequence, Tuple, cast

import requests.adapters
import urllib3.connection
import urllib3.exceptions
import urllib3.util.connection

from .._internal import fork
from .answers import CLOSED, ClosedBeforeAnswerError, ConnectionResponse, Source
from .kept import Lane

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
    """What is given each new socket, to end it from another thread."""

    def attach(self, sock: socket.socket) -> None:
        """Note ``sock``, which has begun to connect. The connecting thread calls this."""


class PooledConnection:
    """Add the address choice and the answers of this package to a connection class of urllib3."""

    lane: Optional[Lane] = None
    watcher: Optional[Watcher] = None
    #: When it gave its last answer (``time.monotonic()``), 0 for a connection that has given none.
    answered_at = 0.0
    _source: Optional[Source] = None

    def connect(self) -> None:
        self.answered_at = 0.0
        cast(Any, super()).connect()
        leave_to_parent(cast(Any, self).sock)

    def _new_conn(self) -> socket.socket:
        inherited = cast(Any, super())._new_conn
        if getattr(inherited, "__func__", None) is urllib3.connection.HTTPConnection._new_conn:
            sock = self._dial()
        else:
            # SOCKS: the proxy chooses the address.
            sock = inherited()
        if self.watcher is not None:
            self.watcher.attach(sock)
        return sock

    def _dial(self) -> socket.socket:
        this = cast(Any, self)
        try:
            sock = connect(this._dns_host, this.port, this.timeout, this.source_address, this.socket_options)
        except socket.timeout as error:
            text = f"connecting to {this.host} timed out (connect timeout={this.timeout})"
            raise urllib3.exceptions.ConnectTimeoutError(this, text) from error
        except OSError as error:
            raise urllib3.exceptions.NewConnectionError(this, f"cannot connect: {error}") from error
        sys.audit("http.client.connect", self, this.host, this.port)
        return sock

    def send(self, data: Any) -> None:
        try:
            cast(Any, super()).send(data)
        except CLOSED as error:
            if isinstance(error, BrokenPipeError) or not self.answered_at:
                raise
            # For urllib3 only this error means that there may be an answer to read.
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE)) from error

    def response_class(self, sock: Any, *args: Any, **options: Any) -> ConnectionResponse:
        response = ConnectionResponse(sock, *args, **options)
        self._source = response.source
        return response

    def getresponse(self, *args: Any, **options: Any) -> Any:
        self._source = None
        try:
            response = cast(Any, super()).getresponse(*args, **options)
        except (OSError, http.client.HTTPException) as error:
            if not self.answered_at:
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


class Adapter(requests.adapters.HTTPAdapter):
    """Connect to one platform, directly or through a proxy, by connections of :class:`PooledConnection`.

    :param lane: keeps idle connections. When it finds one dead, the pools of this adapter drop theirs too.
    :param watcher: gets each new socket, from the connecting thread.
    """

    def __init__(
        self,
        pool_size: int,
        *,
        lane: Optional[Lane] = None,
        watcher: Optional[Watcher] = None,
    ) -> None:
        self._lane = lane
        self._watcher = watcher
        super().__init__(pool_connections=1, pool_maxsize=pool_size, max_retries=0)

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self._extend(self.poolmanager)

    def proxy_manager_for(self, *args: Any, **kwargs: Any) -> Any:
        manager = super().proxy_manager_for(*args, **kwargs)
        self._extend(manager)
        return manager

    def _extend(self, manager: Any) -> None:
        classes = manager.pool_classes_by_scheme
        if not any(issubclass(pool, _Pool) for pool in classes.values()):
            manager.pool_classes_by_scheme = {scheme: self._extended(pool) for scheme, pool in classes.items()}

    def _extended(self, pool: Any) -> Any:
        names = {"lane": self._lane, "watcher": self._watcher}
        connection = type("Connection", (PooledConnection, pool.ConnectionCls), names)
        return type(pool.__name__, (_Pool, pool), {"ConnectionCls": connection, "lane": self._lane})
