"""Make calls over connections that are open already, at no more than the cost of short answers.

requests and urllib3 make every connection: they resolve, connect, verify and speak to proxies. What they do for each
call after that (merging settings, cookies, redirects, a response in three layers) is half of a task's cost, and of no
use here. So a :class:`Lane` keeps a connection that has served one call, and later calls go over its socket directly.
``http.client`` reads whatever is unusual in an answer, as it would below urllib3.
"""

from __future__ import annotations

import _socket
import math
import re
import socket
import struct
import sys
import types
from collections import deque
from typing import Any, Deque, Dict, Mapping, NamedTuple, Optional, Tuple, cast

from urllib3._collections import HTTPHeaderDict
from urllib3.util.wait import wait_for_read

from .._internal.clock import time
from .answers import CLOSED, ClosedBeforeAnswerError, FinalResponse, Source
from .body import read_body

#: Largest body that is sent together with its head. A larger one is not worth the copy.
_TOGETHER = 65536
#: Most bytes of an answer taken with the first read. Answers to calls are short.
_FIRST_READ = 16384
#: What the target of a request may hold. Anything else is left to urllib3, which encodes it.
_PLAIN_TARGET = re.compile(r"/(?!/)[A-Za-z0-9/_.~%:@!$&'()*+,;=?-]*")
_DOTS = re.compile(r"/\.\.?(?:[/?]|\Z)")

# The kernel limits a blocking read or write by itself, where its `struct timeval` is known to be two longs. A timeout
# of Python's own costs a poll() before each one: two more moments at which a thread loses the interpreter.
_KERNEL_TIMES = sys.platform.startswith("linux") and struct.calcsize("l") == 8
#: What this module uses of a socket. pyOpenSSL's, which urllib3 can be made to use, lacks some of it.
_USED = ("recv", "recv_into", "send", "settimeout", "gettimeout", "fileno", "getsockopt")
_LOOK = socket.MSG_PEEK | socket.MSG_DONTWAIT if _KERNEL_TIMES else 0


class Answer(NamedTuple):
    """Hold a whole answer. The names in ``headers`` are found in upper and lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Headers(Dict[str, str]):
    """Hold the headers of an answer by their names in lower case. A look-up works in upper and lower case."""

    def __getitem__(self, name: str) -> str:
        return super().__getitem__(name.lower())

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and super().__contains__(name.lower())

    def get(self, name: str, default: Any = None) -> Any:
        return super().get(name.lower(), default)


def is_plain_target(target: str) -> bool:
    """Return True if ``target`` can be sent as it is: no character needs encoding, and it has no dot segments."""
    return _PLAIN_TARGET.fullmatch(target) is not None and _DOTS.search(target) is None


def _is_systems(sock: Any) -> bool:
    """Return True if reads and writes of ``sock`` go straight to the system: no TLS, no other library's event loop.

    The class is not compared with ``socket.socket``: gevent and eventlet put their own class under that name.
    """
    own = _socket.socket
    kind = type(sock)
    return isinstance(sock, own) and kind.recv is own.recv and kind.send is own.send and kind.recv_into is own.recv_into


class Kept:
    """Make calls over one open connection. One thread at a time uses it."""

    __slots__ = ("_connection", "_is_plain", "_patience", "_socket", "host")

    def __init__(self, connection: Any, sock: Any, patience: float) -> None:
        self._connection = connection
        self._socket = sock
        self._is_plain = _KERNEL_TIMES and _is_systems(sock)
        self._patience = 0.0
        name = f"[{connection.host}]" if ":" in connection.host else connection.host
        #: The value of its ``Host`` header.
        self.host: str = name if connection.port == connection.default_port else f"{name}:{connection.port}"
        if self._is_plain:
            sock.settimeout(None)
        self._limit(patience)

    def is_alive(self) -> bool:
        """Return True if the other side has neither closed the connection nor sent anything without a request."""
        try:
            if not self._is_plain:
                return not wait_for_read(self._socket, timeout=0.0)
            self._socket.recv(1, _LOOK)
        except BlockingIOError:
            return True
        except (OSError, ValueError):
            pass
        return False

    def close(self) -> None:
        self._connection.close()

    def exchange(
        self, method: str, head: bytes, body: bytes, *, limit: int, patience: float, end: float
    ) -> Tuple[Answer, bool]:
        """Send a request and read the answer. Return it, and True if the connection can be used again.

        :param limit: most bytes of the decoded answer.
        :param patience: seconds that one read or write may take.
        :param end: when all must be done (``time.monotonic()``).
        :raises ClosedBeforeAnswerError: it was closed or reset, and no byte of an answer came.
        :raises OSError, http.client.HTTPException, BodyError: no whole answer came, and the connection is useless.
        """
        self._limit(min(patience, end - time.monotonic()))
        try:
            try:
                if len(body) <= _TOGETHER:
                    self._send(head + body, end)
                else:
                    self._send(head, end)
                    self._send(body, end)
            except CLOSED:
                # The other side may have answered before it closed, for example because the body is too large.
                pass
            data = self._socket.recv(_FIRST_READ)
        except BlockingIOError:
            data = None
        except CLOSED as error:
            raise ClosedBeforeAnswerError(*error.args) from error
        if data is None:
            raise socket.timeout("timed out")
        if not data:
            raise ClosedBeforeAnswerError("the connection was closed without an answer")
        simple = _read_simple(data)
        if simple is not None and len(simple.body) <= limit:
            return simple, True
        return self._read_any(method, data, limit, patience, end)

    def _send(self, data: bytes, end: float) -> None:
        sent = self._socket.send(data)
        if sent == len(data):
            return
        rest = memoryview(data)
        while sent < len(rest):
            if time.monotonic() >= end:
                raise socket.timeout("timed out")
            sent += self._socket.send(rest[sent:])

    def _read_any(self, method: str, begun: bytes, limit: int, patience: float, end: float) -> Tuple[Answer, bool]:
        """Read an answer that came in pieces, or is not framed by one Content-Length. ``begun`` is what has come."""
        self._socket.settimeout(patience)
        response = FinalResponse(Source(self._socket, patience=patience, end=end, begun=begun), method=method)
        response.begin()
        content = read_body(types.SimpleNamespace(_fp=response, headers=response.headers), limit, end)
        if self._is_plain:
            self._socket.settimeout(None)
        self._limit(patience, always=True)
        # As urllib3 does, which joins headers that come twice.
        headers = cast(Mapping[str, str], HTTPHeaderDict(response.headers.items()))
        return Answer(response.status, headers, content), response.is_in_step and not response.will_close

    def _limit(self, seconds: float, always: bool = False) -> None:
        """Let no read or write wait longer than ``seconds``. Make system calls only if that changes."""
        seconds = max(seconds, 0.001)
        if seconds == self._patience and not always:
            return
        self._patience = seconds
        if self._is_plain:
            fraction, whole = math.modf(seconds)
            value = struct.pack("ll", int(whole), int(fraction * 1e6))
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)
        else:
            self._socket.settimeout(seconds)


def _read_simple(data: bytes) -> Optional[Answer]:
    """Return the answer if ``data`` is exactly one, framed by one Content-Length. Return None otherwise."""
    end = data.find(b"\r\n\r\n")
    if end < 0 or not data.startswith(b"HTTP/1.1 "):
        return None
    text = data[:end].decode("latin-1")
    lines = text.split("\r\n")
    code = lines[0][9:12]
    if not (code.isascii() and code.isdigit() and lines[0][12:13] in ("", " ")):
        return None
    breaks = len(lines) - 1
    if text.count("\n") != breaks or text.count("\r") != breaks:
        return None
    headers = Headers()
    del lines[0]
    for line in lines:
        name, colon, value = line.partition(":")
        name = name.lower()
        if not colon or not name or " " in name or "\t" in name or dict.__contains__(headers, name):
            return None
        headers[name] = value.lstrip(" \t")
    get = cast(Dict[str, str], headers).get
    status = int(code)
    length = get("content-length", "")
    if (
        status < 200
        or status in (204, 304)
        or not (length.isascii() and length.isdigit() and len(length) < 10)
        or len(data) - end - 4 != int(length)
        or "transfer-encoding" in headers
        or "content-encoding" in headers
        or get("connection", "keep-alive").lower() != "keep-alive"
    ):
        return None
    return Answer(status, headers, data[end + 4 :])


class Lane:
    """Keep the open connections of one client that no thread uses. The last one used is the next.

    :param limit: connections kept.
    """

    # Threads: any thread may call anything. There is no lock: the ends of a deque are safe to use from any thread, and
    # a connection is either in it or used by one thread.

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._idle: Deque[Kept] = deque()
        self._closed = False
        #: When :meth:`empty` was last called (``time.monotonic()``).
        self.emptied_at = 0.0

    def take(self) -> Optional[Kept]:
        """Remove and return a connection that is open, or None."""
        while self._idle:
            try:
                kept = self._idle.pop()
            except IndexError:
                return None
            if kept.is_alive():
                return kept
            kept.close()
        return None

    def keep(self, kept: Kept) -> None:
        """Keep a connection for the next call. Close it if there are enough, or after :meth:`close`."""
        if len(self._idle) >= self._limit:
            kept.close()
            return
        self._idle.append(kept)
        if self._closed:
            self.close()

    def adopt(self, raw: Any, patience: float) -> bool:
        """Keep the connection of a urllib3 response that was read to its end. Return True if that is possible.

        It is not if the answer closed the connection, behind a proxy, or if the socket lacks what is used here.
        """
        connection = getattr(raw, "_connection", None)
        sock = getattr(connection, "sock", None)
        pool = getattr(raw, "_pool", None)
        if self._closed or pool is None or getattr(pool, "proxy", None) is not None:
            return False
        if not all(hasattr(sock, name) for name in _USED) or not getattr(raw._fp, "isclosed", bool)():
            return False
        raw._connection = None
        self.keep(Kept(connection, sock, patience))
        return True

    def empty(self) -> None:
        """Close the idle connections, because one was found dead and the others may be dead too.

        After a failover each of them would be silent until the time limit of the next call.
        """
        self.emptied_at = time.monotonic()
        self._close_idle()

    def close(self) -> None:
        """Close the idle connections, and those that are given back later."""
        self._closed = True
        self._close_idle()

    def _close_idle(self) -> None:
        while self._idle:
            try:
                self._idle.pop().close()
            except IndexError:
                return
