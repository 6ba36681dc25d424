"""Run the server under the local platform: connections, request bodies, and the threads that answer (cheroot).

A client that nobody knows yet costs little. One thread accepts connections and reads the heads of requests. A thread of
the pool gets a connection once a head is complete. A body is read when the application asks for it, which it does after
it has found out who sent it. A body that nobody asks for is discarded.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import logging
import os
import queue
import re
import selectors
import socket
import struct
import threading
from email.utils import formatdate
from http import HTTPStatus
from typing import Any, Callable, Dict, Iterable, List, Optional, Sequence, Set, Tuple

import attrs
from cheroot import errors as cheroot_errors
from cheroot import server as cheroot_server
from cheroot import wsgi as cheroot_wsgi

from .._internal.clock import time
from .._internal.logs import get_logger
from ..errors import ConfigurationError
from ..wire.protocol import JSON_TYPE, encode_json
from .http import END_OF_HEAD, MAX_HEAD, REQUEST_LINE, BadRequest, Head, parse_head
from .store import Refusal

__all__ = ["Body", "Limits", "Parked", "Server", "error_name", "explain_bind"]

logger = get_logger("sekuire.local")

#: Bytes that are read from a socket at once.
PIECE = 64 * 1024
#: How much is read and discarded after an answer that came before the body, so that its sender can read the answer.
MAX_DISCARD = 256 * 1024 * 1024
#: Longest line of a chunked body: the size of a chunk with its extension, or a trailer. And how many trailers.
MAX_CHUNK_LINE = 1024
MAX_TRAILERS = 32
#: How many threads may wait at once for the rest of a body whose sender is unknown.
MAX_UNKNOWN_BODIES = 16
#: Seconds in which a client must accept an answer, before and after it has proven who it is.
SEND_SECONDS = 2.0
KNOWN_SEND_SECONDS = 75.0
#: Seconds that a connection is kept between two requests.
IDLE_SECONDS = 75.0
#: Seconds between two looks for connections whose time has ended.
LOOK_SECONDS = 0.1

#: l_onoff and l_linger of SO_LINGER.
_RESET_ON_CLOSE = struct.pack("hh" if os.name == "nt" else "ii", 1, 0)
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,12})[ \t]*(?:;[^\r\n]*)?\r\n")
#: The system has no descriptor or no memory for another connection.
_EXHAUSTED = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM))

# cheroot's type stubs are partial and differ from version to version.
_HTTPRequest: Any = cheroot_server.HTTPRequest
_HTTPConnection: Any = cheroot_server.HTTPConnection
_WSGIGateway: Any = cheroot_wsgi.Gateway_10
_WSGIServer: Any = cheroot_wsgi.Server
#: cheroot adds every server it makes to `logging.statistics`, and never removes one.
_STATISTICS: Dict[str, Any] = logging.statistics  # type: ignore[attr-defined]


@attrs.frozen(kw_only=True, slots=True)
class Limits:
    """Hold what a server allows its clients."""

    #: Threads that answer. An open stream occupies one.
    threads: int
    #: Open connections. Beyond it, those that have waited longest for a request are closed.
    connections: int
    #: Seconds in which the whole head of a request must arrive, and after it the whole body.
    head_seconds: float = 10.0
    body_seconds: float = 30.0


# -- one connection ---------------------------------------------------------------------------------------------------


class _Phase(enum.Enum):
    """Say what a connection waits for, which decides how long it may."""

    REQUEST = "the next request"
    HEAD = "the rest of a head"
    SKIPPED = "the rest of a body that nobody reads"


class _Reader:
    """Hold what has arrived on a connection. It stands in for the file object of cheroot's."""

    # Threads: the connections' thread while the connection waits there, else the thread that answers.

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._data = bytearray()
        #: Bytes of an unread body that come before the next head.
        self._skip = 0
        #: Up to where the end of the head was looked for, and where it is once it was found.
        self._searched = 0
        self._end = 0
        self._is_line_checked = False
        #: True if the other side will send nothing more.
        self.is_at_end = False

    def __len__(self) -> int:
        return len(self._data)

    @property
    def phase(self) -> _Phase:
        if self._skip:
            return _Phase.SKIPPED
        return _Phase.HEAD if self._data else _Phase.REQUEST

    @property
    def has_begun_request(self) -> bool:
        # An empty line before a request is allowed (RFC 9112, 2.2). Some old clients send one after a body.
        return self.phase is _Phase.HEAD and bytes(self._data[:3]) not in (b"\r", b"\r\n")

    # -- in the connections' thread ---------------------------------------------------------------------------------

    def receive(self) -> None:
        """Read what is there. The socket must not block."""
        try:
            part = self._socket.recv(PIECE)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            part = b""
        self._data += part
        self.is_at_end = not part

    def has_data(self) -> bool:
        """Return True if a thread can answer what is there: a whole head, or one that can only be refused."""
        if self._skip:
            skipped = min(self._skip, len(self._data))
            del self._data[:skipped]
            self._skip -= skipped
        data = self._data
        if not data:
            return self.is_at_end
        match = END_OF_HEAD.search(data, max(0, self._searched - 3))
        if match is not None:
            self._end = match.end()
            return True
        is_wrong = False
        if not self._is_line_checked:
            start = 2 if data.startswith(b"\r\n") else 0
            line = data.find(b"\n", max(start, self._searched))
            if line >= 0:
                self._is_line_checked = True
                is_wrong = REQUEST_LINE.fullmatch(bytes(data[start:line]).rstrip(b"\r")) is None
        self._searched = len(data)
        return is_wrong or self.is_at_end or len(data) > MAX_HEAD

    def discard(self) -> int:
        """Discard what is there, and return how much that was."""
        length = len(self._data)
        self._data.clear()
        return length

    # -- in the thread that answers ---------------------------------------------------------------------------------

    def take_head(self) -> bytes:
        """Return the head that :meth:`has_data` has found, or all there is."""
        head = self.take(self._end or len(self._data))
        self._end = self._searched = 0
        self._is_line_checked = False
        return head[2:] if head.startswith(b"\r\n") else head

    def take(self, length: int) -> bytes:
        """Return up to ``length`` of the bytes that are there."""
        part = bytes(self._data[:length])
        del self._data[: len(part)]
        return part

    def take_line(self) -> bytes:
        """Return the next line with its end, or nothing if it is not whole yet."""
        return self.take(self._data.find(b"\n", 0, MAX_CHUNK_LINE) + 1)

    def skip(self, length: int) -> None:
        """Discard the next ``length`` bytes, also those that have not arrived."""
        self._skip = length

    def has_more(self) -> bool:
        """Read what is there, without waiting. Return True if that was something."""
        timeout, before = self._socket.gettimeout(), len(self._data)
        self._socket.settimeout(0)
        self.receive()
        self._socket.settimeout(timeout)
        return len(self._data) > before

    def fill(self, deadline: float) -> None:
        """Wait for more.

        :raises OSError: nothing came until ``deadline`` (monotonic), or the connection has ended.
        """
        left = deadline - time.monotonic()
        if left <= 0:
            raise socket.timeout("timed out")
        timeout = self._socket.gettimeout()
        self._socket.settimeout(left)
        part = self._socket.recv(PIECE)
        self._socket.settimeout(timeout)
        if not part:
            self.is_at_end = True
            raise ConnectionAbortedError(errno.ECONNABORTED, "the body ended early")
        self._data += part

    def close(self) -> None:
        self._data.clear()


class _Writer:
    """Send on a connection. It stands in for the file object of cheroot's."""

    # Threads: only the one that answers.

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._held = b""
        #: While true, keep what is written and send it together with what comes next.
        self.is_holding = False

    def write(self, data: bytes) -> int:
        whole = self._held + data if self._held else data
        self._held = b""
        if self.is_holding:
            self._held = whole
        else:
            self._socket.sendall(whole)
        return len(data)

    def flush(self) -> None:
        if self._held:
            self.write(b"")

    def close(self) -> None:
        self._held = b""


def _make_file(sock: socket.socket, mode: str = "rb", bufsize: int = 0) -> Any:
    return _Reader(sock) if "r" in mode else _Writer(sock)


class Body:
    """Read the body of one request when it is asked for, within a size and a time."""

    # Threads: only the one that answers.

    def __init__(self, connection: Any, head: Head) -> None:
        self._connection = connection
        self._reader: _Reader = connection.rfile
        self._head = head
        self._seats: threading.Semaphore = connection.server.seats
        self._needs_seat = False
        self._is_seated = False
        self._deadline = 0.0
        #: True if nothing of the body is left in the connection.
        self.is_read = not head.length and not head.is_chunked

    def read(self, largest: int, *, known: bool) -> bytes:
        """Return the whole body.

        :param largest: the most bytes that are accepted.
        :param known: True if its sender has proven who it is. Only a few others are waited for at once.
        :raises Refusal: 400 cut or malformed, 408 too slow, 413 too large, 503 too many unknown senders.
        """
        if self.is_read:
            return b""
        if self._head.length > largest:
            raise _too_large(largest)
        limits: Limits = self._connection.server.limits
        self._deadline = time.monotonic() + (limits.body_seconds if known else limits.head_seconds)
        self._needs_seat = not known
        try:
            if self._head.expects_continue and not len(self._reader):
                self._connection.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            body = self._read_chunks(largest) if self._head.is_chunked else self._read_length()
        except socket.timeout:
            problem = Refusal(408, "REQUEST_TIMEOUT", "the body did not arrive in time")
        except OSError:
            problem = Refusal(400, "INVALID_BODY", "the body ended early")
        else:
            self.is_read = True
            return body
        finally:
            if self._is_seated:
                self._is_seated = False
                self._seats.release()
        raise problem

    def skip(self) -> bool:
        """Leave the body to the connections' thread, which discards it. Return False if its length is not known."""
        if self._head.is_chunked or self._head.expects_continue:
            return False
        self._reader.skip(self._head.length)
        self.is_read = True
        return True

    def _read_length(self) -> bytes:
        while len(self._reader) < self._head.length:
            self._fill()
        return self._reader.take(self._head.length)

    def _read_chunks(self, largest: int) -> bytes:
        whole = bytearray()
        while True:
            match = _CHUNK_SIZE.fullmatch(self._line())
            if match is None:
                raise _malformed()
            size = int(match[1], 16)
            if not size:
                break
            end = len(whole) + size
            if end > largest:
                raise _too_large(largest)
            while len(whole) < end:
                if not len(self._reader):
                    self._fill()
                whole += self._reader.take(end - len(whole))
            if self._line() != b"\r\n":
                raise _malformed()
        for _ in range(MAX_TRAILERS):
            if self._line() == b"\r\n":
                return bytes(whole)
        raise _malformed()

    def _line(self) -> bytes:
        while True:
            line = self._reader.take_line()
            if line:
                return line
            if len(self._reader) >= MAX_CHUNK_LINE:
                raise _malformed()
            self._fill()

    def _fill(self) -> None:
        if self._needs_seat and not self._is_seated:
            # Nearly always the body has arrived since the head.
            if self._reader.has_more():
                return
            if not self._seats.acquire(blocking=False):
                raise Refusal(503, "BUSY", "too many clients that have not logged in are sending; try again")
            self._is_seated = True
        self._reader.fill(self._deadline)


def _too_large(largest: int) -> Refusal:
    unit, size = ("MiB", largest >> 20) if largest >> 20 else ("KiB", largest >> 10)
    return Refusal(413, "BODY_TOO_LARGE", f"the body is larger than {size} {unit}")


def _malformed() -> Refusal:
    return Refusal(400, "INVALID_BODY", "the chunks of the body are malformed")


class _Request(_HTTPRequest):  # type: ignore[misc]
    """Parse the head with :mod:`sekuire.local.http`. What is left of cheroot's is the writing of answers."""

    def parse_request(self) -> None:
        if self.conn.has_waited:
            # It has waited, and is answered now.
            return
        self.started_request = True
        try:
            head = parse_head(self.conn.rfile.take_head())
        except BadRequest as error:
            self.simple_response(str(error.status), error.message)
            return
        self.head = head
        self.method, self.uri, self.path, self.qs = head.method, head.target, head.path, head.query
        self.inheaders = head.headers
        self.request_protocol = b"HTTP/1.1" if head.minor else b"HTTP/1.0"
        self.response_protocol = self.request_protocol.decode()
        self.close_connection = not head.keeps_alive
        self.chunked_read = head.is_chunked
        self.rfile = Body(self.conn, head)
        self.ready = True

    def respond(self) -> None:
        try:
            self.server.gateway(self).respond()
            if self.conn.parked is not None:
                return
            self.ensure_headers_sent()
            if self.chunked_write:
                self.conn.wfile.write(b"0\r\n\r\n")
        finally:
            self.conn.wfile.flush()

    def send_headers(self) -> None:
        if not self.rfile.is_read:
            # What is left would be read as the next request.
            self.close_connection = self.conn.discards = True
        writer = self.conn.wfile
        writer.is_holding = True
        self.outheaders.append((b"Date", _now().encode("ascii")))
        super().send_headers()
        writer.is_holding = False

    def simple_response(self, status: Any, msg: str = "") -> None:
        """Answer malformed HTTP: in the shape of the other answers, with a Date, and close the connection."""
        self.close_connection = self.conn.discards = True
        try:
            self.conn.wfile.write(_answer(int(str(status)[:3]), "INVALID_REQUEST", msg or str(status)))
        except OSError as error:
            if error.args[0] not in cheroot_errors.socket_errors_to_ignore:
                raise


def _now() -> str:
    """Return the present time for a ``Date`` header. It is the real one also while a test freezes the clocks."""
    return formatdate(time.time(), usegmt=True)


def _answer(status: int, code: str, message: str) -> bytes:
    """Return a whole answer after which the connection is closed."""
    body = encode_json({"error": error_name(status), "message": message, "code": code})
    retry = "Retry-After: 1\r\n" if status == 503 else ""
    head = (
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nContent-Length: {len(body)}\r\n"
        f"Content-Type: {JSON_TYPE}\r\nDate: {_now()}\r\n{retry}Connection: close\r\n\r\n"
    )
    return head.encode("latin-1") + body


class Parked(Exception):
    """Leave the answer to a request for later. Raise it after :meth:`_Connection.park`, out of the application."""


class _Connection(_HTTPConnection):  # type: ignore[misc]
    def __init__(self, server: Any, sock: socket.socket) -> None:
        super().__init__(server, sock, _make_file)
        # Not every system inherits it from the listening socket. Without it an event may wait for an ACK.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        #: True if the connection ends with a reset, without an answer.
        self.resetting = False
        #: True if the sender of the present request has proven who it is.
        self.is_known = False
        #: True if its client may still be sending when the connection is closed, which would cost it the answer.
        self.discards = False
        #: How much may still be discarded, once that has begun.
        self.discard_left: Optional[int] = None
        self.was_answered = False
        #: The request that waits for its answer without a thread, and what is called to let it wait.
        self.parked: Optional[_Request] = None
        self._begin_wait: Callable[[Callable[[], None]], None] = lambda resume: None
        #: True if the present request has waited. What it carries is added to its environment.
        self.has_waited = False
        self.carried: Dict[str, Any] = {}
        self._request: Optional[_Request] = None
        #: Since when and until when it waits in the connections' thread (monotonic).
        self.since = self.deadline = 0.0

    def communicate(self) -> bool:
        self.is_known = False
        self.socket.settimeout(SEND_SECONDS)
        self.was_answered = True
        return bool(super().communicate())

    def RequestHandlerClass(self, server: Any, conn: Any) -> _Request:  # cheroot's name.
        """Return the request that has waited, or a new one."""
        request, self.parked = self.parked, None
        self.has_waited = request is not None
        if request is None:
            request = _Request(server, conn)
            self.carried = {}
        self._request = request
        return request

    def park(self, begin_wait: Callable[[Callable[[], None]], None], carried: Dict[str, Any]) -> None:
        """Let the present request wait without a thread. The application then raises :class:`Parked`.

        :param begin_wait: called with a function once the thread is free. A call of that function, by any thread, has
            the application answer the request again, with ``has_waited``.
        :param carried: added to the environment of that second answer.
        """
        self._begin_wait = begin_wait
        self.carried = carried
        self.parked = self._request

    def wait(self) -> None:
        """Begin to wait. The thread that has parked the request calls this last."""
        self._begin_wait(lambda: self.server.requests.put(self))

    def know(self) -> None:
        """Note that the request's sender has proven who it is."""
        self.is_known = True
        self.socket.settimeout(KNOWN_SEND_SECONDS)

    def close(self) -> None:
        """Close the connection. If its client may still be sending, the connections' thread reads that first."""
        if not self.discards or self.resetting or not self.server.discard(self):
            self.end()

    def end(self) -> None:
        """Close the connection at once."""
        self.server.forget(self)
        if self.resetting or self.server.resetting:
            # Closing sends a RST then; a shutdown(), as in cheroot's close(), would send a FIN first.
            with contextlib.suppress(OSError):
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        else:
            with contextlib.suppress(OSError):
                self.socket.shutdown(socket.SHUT_RDWR)
        self.rfile.close()
        self.wfile.close()
        self.socket.close()


class _Gateway(_WSGIGateway):  # type: ignore[misc]
    def get_environ(self) -> Dict[str, Any]:
        environ: Dict[str, Any] = super().get_environ()
        environ["sekuire.connection"] = self.req.conn
        environ.update(self.req.conn.carried)
        return environ

    def respond(self) -> None:
        try:
            super().respond()
        except Parked:
            # Nothing of it was sent.
            self.req.status, self.req.outheaders = "", []


# -- all connections --------------------------------------------------------------------------------------------------


class _Connections:
    """Accept connections, wait for the next head on each, and end those whose time is over.

    A client that sends slowly, or nothing, occupies a place here and no thread. It stands in for cheroot's manager.
    """

    # Threads: `sekuire-local-http` runs run(), and it alone accepts and expires. The threads that answer give
    # connections back, and end them. `_lock` guards the selector's map, `_waiting` and `_open`; nothing is sent,
    # received or closed under it.

    #: What cheroot asks before it keeps a connection.
    can_add_keepalive_connection = True

    def __init__(self, server: Server, listener: socket.socket) -> None:
        self._server = server
        self._listener = listener
        self._limits = server.limits
        self._lock = threading.Lock()
        self._selector = selectors.DefaultSelector()
        self._waiting: Set[_Connection] = set()
        self._open: Set[_Connection] = set()
        self._stopping = False
        self._ended = threading.Event()
        self._ended.set()
        self._is_exhausted = False
        listener.settimeout(0)
        self._selector.register(listener, selectors.EVENT_READ)

    def __len__(self) -> int:
        with self._lock:
            return len(self._open)

    def run(self) -> None:
        self._ended.clear()
        try:
            while not self._stopping:
                self._look()
                self._expire(time.monotonic())
        finally:
            self._ended.set()

    def stop(self) -> None:
        """End :meth:`run`, and wait until it has ended."""
        self._stopping = True
        self._ended.wait()

    def close(self) -> None:
        """Close the connections that wait. The threads that answer close the others."""
        with self._lock:
            waiting = list(self._waiting)
        for conn in waiting:
            conn.end()
        with self._lock:
            self._selector.close()

    def put(self, conn: _Connection) -> None:
        """Wait for the next request on a connection that was answered."""
        conn.socket.settimeout(0)
        if conn.rfile.has_data():
            self._hand_over(conn)
        else:
            self._wait(conn)

    def discard(self, conn: _Connection) -> bool:
        """Read and discard what a connection's client still sends, then close it. Return False if nothing can come."""
        if conn.discard_left is not None or conn.rfile.is_at_end:
            return False
        conn.discard_left = MAX_DISCARD - conn.rfile.discard()
        try:
            conn.socket.settimeout(0)
            conn.socket.shutdown(socket.SHUT_WR)
        except OSError:
            return False
        self._wait(conn)
        return True

    def forget(self, conn: _Connection) -> None:
        with self._lock:
            self._open.discard(conn)
            self._unregister(conn)

    # -- waiting ------------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        try:
            ready = self._selector.select(LOOK_SECONDS)
        except (OSError, ValueError):
            # Only select() does this (Windows): a socket was closed during the call.
            time.sleep(0.01)
            return
        for key, _ in ready:
            if key.data is None:
                self._accept()
            else:
                self._receive(key.data)

    def _receive(self, conn: _Connection) -> None:
        reader: _Reader = conn.rfile
        phase = reader.phase
        reader.receive()
        if conn.discard_left is not None:
            conn.discard_left -= reader.discard()
            if conn.discard_left <= 0 or reader.is_at_end:
                conn.end()
        elif reader.has_data():
            with self._lock:
                self._unregister(conn)
            self._hand_over(conn)
        elif conn not in self._waiting or reader.phase is not phase:
            self._wait(conn)

    def _hand_over(self, conn: _Connection) -> None:
        if len(conn.rfile):
            self._server.requests.put(conn)
        else:
            conn.end()

    def _wait(self, conn: _Connection) -> None:
        conn.since = time.monotonic()
        conn.deadline = conn.since + self._seconds(conn)
        with self._lock:
            is_waiting = not self._stopping
            if is_waiting and conn not in self._waiting:
                try:
                    self._selector.register(conn.socket, selectors.EVENT_READ, conn)
                    self._waiting.add(conn)
                except (KeyError, ValueError, OSError):
                    # The other side has just closed it, or select() has no room for it (Windows).
                    is_waiting = False
        if not is_waiting:
            conn.end()

    def _seconds(self, conn: _Connection) -> float:
        phase = conn.rfile.phase
        if conn.discard_left is not None or phase is _Phase.SKIPPED:
            return self._limits.body_seconds
        return IDLE_SECONDS if phase is _Phase.REQUEST and conn.was_answered else self._limits.head_seconds

    def _expire(self, now: float) -> None:
        with self._lock:
            late = [conn for conn in self._waiting if conn.deadline <= now]
        for conn in late:
            if conn.discard_left is None and conn.rfile.has_begun_request:
                with contextlib.suppress(OSError):
                    conn.socket.send(_answer(408, "REQUEST_TIMEOUT", "the head of the request did not arrive in time"))
            conn.end()

    def _unregister(self, conn: _Connection) -> None:
        # Needs the lock.
        if conn in self._waiting:
            self._waiting.discard(conn)
            with contextlib.suppress(KeyError, ValueError, OSError):
                self._selector.unregister(conn.socket)

    # -- accepting ----------------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        try:
            sock, address = self._listener.accept()
        except OSError as error:
            if error.errno in _EXHAUSTED:
                self._make_room(error)
            return
        self._is_exhausted = False
        if len(self) >= self._limits.connections and not self._drop_oldest():
            _turn_away(sock)
            return
        sock.settimeout(0)
        try:
            conn = _Connection(self._server, sock)
        except OSError:
            # It was reset already.
            sock.close()
            return
        conn.remote_addr, conn.remote_port = address[:2]
        conn.ssl_env = {}
        with self._lock:
            self._open.add(conn)
        # Nearly always a client sends its request with the connection.
        self._receive(conn)

    def _make_room(self, error: OSError) -> None:
        if not self._is_exhausted:
            self._is_exhausted = True
            logger.warning(
                "the local platform cannot accept another connection (%s); it closes waiting ones. Raise the limit of"
                " open files (ulimit -n), or connect fewer workers",
                error.strerror,
            )
        if not self._drop_oldest():
            # The listening socket stays readable.
            time.sleep(0.05)

    def _drop_oldest(self) -> bool:
        """Close the connection that has waited longest for a request. Return False if none waits."""
        with self._lock:
            oldest = min(self._waiting, key=lambda conn: conn.since, default=None)
        if oldest is None:
            return False
        oldest.end()
        return True


def _turn_away(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.settimeout(0)
        sock.send(_answer(503, "TOO_MANY_CONNECTIONS", "the local platform has no room for another connection"))
        # Closing with unread bytes would reset the connection before the answer is read.
        sock.recv(PIECE)
        sock.shutdown(socket.SHUT_RDWR)
    sock.close()


class _Pool:
    """Run the threads that answer requests. They are made on demand and kept until the end.

    cheroot's own pool has a fixed size or needs a caller to grow it. Its threads have no names of ours, and its stop()
    waits for a blocked thread without limit.
    """

    # Threads: an open stream occupies its thread. `_lock` guards the counters; the queue needs no lock.

    def __init__(self, server: Server, smallest: int, limit: int) -> None:
        self.min = smallest
        self._server = server
        self._limit = limit
        self._lock = threading.Lock()
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._threads: List[threading.Thread] = []
        self._busy: Set[Any] = set()
        self._idle = 0
        self._waiting = 0
        self._stopping = False

    @property
    def idle(self) -> int:
        return self._idle

    def start(self) -> None:
        with self._lock:
            for _ in range(self.min):
                self._spawn()

    def put(self, conn: Any) -> None:
        with self._lock:
            if not self._stopping:
                self._waiting += 1
                if self._waiting > self._idle and len(self._threads) < self._limit:
                    self._spawn()
                self._queue.put(conn)
                return
        conn.close()

    def stop(self, timeout: float = 1.0) -> None:
        """End all threads: first the idle ones, then those that answer, then by force those that wait for a client."""
        with self._lock:
            self._stopping = True
            threads = list(self._threads)
            for _ in threads:
                self._queue.put(None)
        deadline = time.monotonic() + timeout
        _join(threads, deadline)
        with self._lock:
            busy = list(self._busy)
        for conn in busy:
            try:
                conn.socket.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
        _join(threads, deadline + timeout)
        with contextlib.suppress(queue.Empty):
            while True:
                conn = self._queue.get_nowait()
                if conn is not None:
                    conn.close()
        # Threads that still work find it later.
        for _ in threads:
            self._queue.put(None)

    def _spawn(self) -> None:
        name = f"sekuire-local-http-{len(self._threads) + 1}"
        thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._threads.append(thread)
        # Counted as idle from here on, so that two requests in a row make two threads and not three.
        self._idle += 1
        thread.start()

    def _work(self) -> None:
        while True:
            conn = self._queue.get()
            if conn is None:
                return
            with self._lock:
                self._idle -= 1
                self._waiting -= 1
                self._busy.add(conn)
            keep = False
            try:
                keep = conn.communicate()
            except Exception:
                logger.exception("the local platform failed while it served a connection")
            finally:
                with self._lock:
                    self._busy.discard(conn)
                    self._idle += 1
                if conn.parked is not None:
                    conn.wait()
                elif keep:
                    self._server.put_conn(conn)
                else:
                    conn.close()


def _join(threads: Sequence[threading.Thread], deadline: float) -> None:
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))


class Server(_WSGIServer):  # type: ignore[misc]
    """Run cheroot with this module's connections and pool, its thread names and log, and with a stop() that returns."""

    _connections: _Connections

    def __init__(self, host: str, port: int, application: Callable[..., Iterable[bytes]], limits: Limits) -> None:
        super().__init__((host, port), application, server_name="sekuire-local", request_queue_size=1024)
        self.gateway = _Gateway
        self.shutdown_timeout = 0.7
        self.limits = limits
        #: For those who wait for the body of a sender that is unknown.
        self.seats = threading.BoundedSemaphore(MAX_UNKNOWN_BODIES)
        self.requests = _Pool(self, min(8, limits.threads), limits.threads)
        self.bind_error: Optional[OSError] = None
        #: True if every connection ends with a reset.
        self.resetting = False
        self._thread: Optional[threading.Thread] = None

    def prepare(self) -> None:
        super().prepare()
        self._connections.close()
        self._connections = _Connections(self, self.socket)

    def listen(self) -> int:
        """Bind the socket and return the port. Connections wait until :meth:`run`.

        :raises OSError: the address cannot be bound.
        """
        try:
            self.prepare()
        except OSError as error:
            _STATISTICS.pop(f"Cheroot HTTPServer {id(self)}", None)
            raise self.bind_error or error from None
        return int(self.bind_addr[1])

    def run(self) -> None:
        """Start to serve, on a thread of its own."""
        self._thread = threading.Thread(target=self.serve, name="sekuire-local-http", daemon=True)
        self._thread.start()

    def serve(self) -> None:
        while self.ready:
            try:
                self._connections.run()
            except Exception:
                if self.ready:
                    logger.exception("the local platform failed while it waited for requests")
                    time.sleep(0.05)

    def stop(self) -> None:
        super().stop()
        if self._thread is not None:
            self._thread.join()
        _STATISTICS.pop(f"Cheroot HTTPServer {id(self)}", None)

    def discard(self, conn: _Connection) -> bool:
        """Read what the client of an answered connection still sends, then close it. Return False if it must not."""
        return bool(self.ready) and self._connections.discard(conn)

    def forget(self, conn: _Connection) -> None:
        """Note that a connection is closed."""
        self._connections.forget(conn)

    def vanish(self) -> Optional[socket.socket]:
        """Stop at once, as if the network had gone: reset every connection, and answer no running request.

        Return a socket that keeps the port without listening, so that connections are refused and no other program gets
        the port. Return None if the system does not allow that.
        """
        self.resetting = True
        self.shutdown_timeout = 0.05
        family, address = self.socket.family, self.socket.getsockname()
        self.stop()
        guard = socket.socket(family)
        try:
            guard.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            guard.bind(address)
        except OSError:
            guard.close()
            return None
        return guard

    def bind_socket(self, sock: socket.socket, address: Tuple[str, int]) -> socket.socket:
        try:
            sock.bind(address)
        except OSError as error:
            # cheroot would lose both the socket and the reason.
            sock.close()
            self.bind_error = error
            raise
        if os.name == "posix":
            # cheroot does it only for a port that was given. Without it a restart on the same port must wait.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return sock

    def error_log(self, msg: str = "", level: int = logging.INFO, traceback: bool = False) -> None:
        logger.log(level, "%s", msg, exc_info=traceback)


def error_name(status: int) -> str:
    """Return what the field ``error`` of an error's body says."""
    return _ERROR_NAMES.get(status, "error")


_ERROR_NAMES = {
    400: "bad_request",
    401: "unauthorized",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    409: "conflict",
    413: "payload_too_large",
    417: "expectation_failed",
    421: "misdirected_request",
    422: "unprocessable",
    500: "internal_error",
    503: "unavailable",
}


def explain_bind(error: OSError, host: str, port: int) -> ConfigurationError:
    """Return why the address cannot be bound, and what to do."""
    if isinstance(error, socket.gaierror):
        return ConfigurationError(f"the host {host!r} cannot be resolved; give an address of this machine", "host")
    if error.errno == errno.EADDRINUSE:
        return ConfigurationError(
            f"port {port} on {host} is taken; stop the program that uses it, choose another, or 0 for any free one",
            "port",
        )
    if error.errno == errno.EACCES:
        return ConfigurationError(f"this user may not listen on port {port}; choose one above 1023", "port")
    if error.errno == errno.EADDRNOTAVAIL:
        return ConfigurationError(f"{host} is not an address of this machine; give 127.0.0.1 or one that is", "host")
    return ConfigurationError(f"cannot listen on {host} port {port}: {error.strerror or error}", "port")
