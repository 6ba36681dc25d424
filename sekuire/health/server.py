"""Answer HTTP requests for the state of this process, on one thread: GET and HEAD, small heads, short deadlines.

One request is one connection. All connections are served side by side by a loop over non-blocking sockets, so a client
that sends nothing keeps nobody waiting. Each system call may cost a wait for the interpreter where handlers compute, so
an answer needs few of them.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import threading
from typing import Callable, Dict, List, NamedTuple, Optional, Set, Tuple

from .._internal.clock import time
from .._internal.greenlets import is_thrown
from .._internal.logs import SparseLog, get_logger
from .._internal.threads import Deadline, join_all, try_start
from ..config import is_loopback, shown_address
from ..errors import ConfigurationError

log = get_logger("sekuire.health")

#: Most connections at once. One more takes the place of the oldest.
MAX_CONNECTIONS = 32
#: Most bytes of a request's head.
MAX_HEAD = 8 * 1024
#: Seconds from a connection to the end of its answer.
TIME = 5.0
#: Seconds after the answer in which the client may close the connection first.
LINGER = 1.0
#: Seconds without accepting, after the system could not.
_PAUSE = 0.1
_BACKLOG = 64
_READ = 64 * 1024
#: What a socket without anything to read, or room to write, raises.
_NOT_NOW = (BlockingIOError, InterruptedError)

_REASONS = {
    200: "OK",
    400: "Bad Request",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    421: "Misdirected Request",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    501: "Not Implemented",
    503: "Service Unavailable",
    505: "HTTP Version Not Supported",
}


class Answer(NamedTuple):
    """Hold what a request is answered."""

    status: int
    body: bytes
    content_type: str = "application/json"


class Request(NamedTuple):
    """Hold what a page needs of a request. ``path`` is without the query."""

    path: str
    accept: str


class Refused(Exception):
    """Refuse a request that is not to be answered by a page."""

    def __init__(self, status: int, problem: str) -> None:
        super().__init__(problem)
        self.status = status
        self.problem = problem


class HealthServer:
    """Serve pages at one address. ::

        server = HealthServer(("127.0.0.1", 8080), lambda request: Answer(200, b"{}"))
        server.open()
        server.close()

    :param respond: returns a page's answer. It runs on the server's thread and must not block.
    :param refuse: returns the answer to what no page answers, from a status and a sentence.
    """

    # Threads: `sekuire-health` runs _serve() and owns the connections. Any thread may call open() (once), close() and
    # join(). `_is_closed` is written before the wake-up is sent and read after it has come.

    def __init__(
        self,
        address: Tuple[str, int],
        respond: Callable[[Request], Answer],
        refuse: Callable[[int, str], Answer],
    ) -> None:
        self.asked_for = address
        self.pid = os.getpid()
        #: Where it listens: the real port if 0 was asked for.
        self.address = address
        #: It listens on this machine only.
        self.is_local = True
        self._respond = respond
        self._refuse = refuse
        self._listener: Optional[socket.socket] = None
        self._waker: Optional[socket.socket] = None
        self._woken: Optional[socket.socket] = None
        self.connections: Dict[int, _Connection] = {}
        self._is_closed = False
        self._failures = SparseLog(log.name)
        self._thread = threading.Thread(target=self._run, name="sekuire-health", daemon=True)

    def open(self) -> None:
        """Listen, and start the thread.

        :raises ConfigurationError: the port is taken, or the address is not one of this machine.
        """
        self._listener = _listen(self.asked_for)
        try:
            name = self._listener.getsockname()
            self.address = (name[0], name[1])
            self.is_local = is_loopback(name[0])
            self._waker, self._woken = socket.socketpair()
            for one in (self._listener, self._waker, self._woken):
                one.setblocking(False)
            is_started = try_start(self._thread)
        except BaseException:
            self.forget()
            raise
        if not is_started:
            self.forget()
            raise ConfigurationError("no thread can be started for it now", "health")

    def close(self) -> None:
        """Have the thread close everything. Return at once."""
        self._is_closed = True
        waker = self._waker
        if waker is not None:
            with contextlib.suppress(OSError):
                waker.send(b"x")

    def join(self, deadline: Deadline) -> bool:
        """Wait for the thread's end. Return True if it ended before ``deadline``."""
        return not join_all([self._thread], deadline)

    def forget(self) -> None:
        """Close this process's copies of the sockets. In a forked child, where the thread does not run, call this."""
        self._is_closed = True
        sockets = (self._listener, self._waker, self._woken, *(one.socket for one in self.connections.values()))
        self.connections = {}
        for one in sockets:
            if one is not None:
                with contextlib.suppress(OSError):
                    one.close()

    # -- the loop (sekuire-health) --

    def _run(self) -> None:
        try:
            self._serve()
        except BaseException as error:
            if not is_thrown(error):
                log.exception("the health server failed and answers no more")
        finally:
            if self.pid == os.getpid():
                self.forget()

    def _serve(self) -> None:
        listener, woken = self._listener, self._woken
        assert listener is not None
        assert woken is not None
        pause_until = 0.0
        while True:
            now = time.monotonic()
            self._close_late(now)
            reading: Set[int] = {woken.fileno()}
            writing: Set[int] = set()
            for number, one in self.connections.items():
                (writing if one.left else reading).add(number)
            ends = [one.end for one in self.connections.values()]
            if now >= pause_until:
                reading.add(listener.fileno())
            else:
                ends.append(pause_until)
            ready = _wait(reading, writing, max(0.0, min(ends) - now) if ends else None)
            if self._is_closed:
                return
            if listener.fileno() in ready:
                ready.discard(listener.fileno())
                if not self._accept(listener):
                    pause_until = time.monotonic() + _PAUSE
            for number in ready:
                connection = self.connections.get(number)
                if connection is not None:
                    self._step(connection)

    def _accept(self, listener: socket.socket) -> bool:
        """Accept one connection, and serve it at once if its request is there. Return False if none can be accepted."""
        try:
            connected, _ = listener.accept()
        except (*_NOT_NOW, ConnectionError):
            return True
        except OSError as error:
            self._failures.error("the health server cannot accept a connection: %s", error.strerror)
            return False
        if len(self.connections) >= MAX_CONNECTIONS:
            self._drop(min(self.connections.values(), key=lambda one: one.end))
        connected.setblocking(False)
        connection = _Connection(connected, time.monotonic() + TIME)
        self.connections[connected.fileno()] = connection
        self._step(connection)
        return True

    def _close_late(self, now: float) -> None:
        for one in [one for one in self.connections.values() if one.end <= now]:
            self._drop(one)

    def _drop(self, connection: _Connection) -> None:
        self.connections.pop(connection.number, None)
        with contextlib.suppress(OSError):
            connection.socket.close()

    def _step(self, connection: _Connection) -> None:
        """Go on with one connection as far as that is possible now."""
        try:
            if not connection.is_answered:
                if not connection.read():
                    return
                connection.left = self._answer(connection)
                connection.is_answered = True
            if not connection.write():
                return
            if connection.is_over():
                self._drop(connection)
        except OSError:
            # The client has left.
            self._drop(connection)

    def _answer(self, connection: _Connection) -> bytes:
        """Return the whole answer to the request that a connection has sent."""
        method = ""
        try:
            if connection.is_too_long:
                raise Refused(431, f"the head of the request is longer than {MAX_HEAD} bytes")
            method, request = parse(bytes(connection.received), self.is_local)
            answer = self._respond(request)
        except Refused as refused:
            answer = self._refuse(refused.status, refused.problem)
        except Exception as error:  # noqa: BLE001  # It is logged, and the next request may fare better.
            self._failures.error("the health server cannot answer a request", exc_info=error)
            answer = self._refuse(500, "the page failed; the log says why")
        return _encode(answer, is_head=method == "HEAD")


class _Connection:
    """Keep one connection, its request so far, and what is left to send."""

    __slots__ = ("end", "is_answered", "is_too_long", "left", "number", "received", "socket")

    def __init__(self, connected: socket.socket, end: float) -> None:
        self.socket = connected
        self.number = connected.fileno()
        #: When it is closed, whatever has come.
        self.end = end
        self.received = bytearray()
        self.is_too_long = False
        self.is_answered = False
        self.left = b""

    def read(self) -> bool:
        """Read what has come. Return True if the head of the request is there, or too long.

        :raises OSError: the client has left before that.
        """
        try:
            data = self.socket.recv(MAX_HEAD + 1)
        except _NOT_NOW:
            return False
        if not data:
            raise ConnectionResetError(errno.ECONNRESET, "closed before the request was complete")
        self.received += data
        end = self.received.find(b"\r\n\r\n")
        if end < 0 and b"\n\n" in self.received:
            end = self.received.find(b"\n\n")
        self.is_too_long = (end if end >= 0 else len(self.received)) > MAX_HEAD
        return end >= 0 or self.is_too_long

    def write(self) -> bool:
        """Send what is left of the answer. Return True if all of it is sent."""
        if not self.left:
            return True
        try:
            sent = self.socket.send(self.left)
        except _NOT_NOW:
            return False
        self.left = self.left[sent:]
        if self.left:
            return False
        # The client closes first, so that it reads the answer whatever it has sent beyond its head.
        self.socket.shutdown(socket.SHUT_WR)
        self.end = min(self.end, time.monotonic() + LINGER)
        return True

    def is_over(self) -> bool:
        """Read and discard what the client still sends. Return True if it has closed the connection."""
        try:
            return not self.socket.recv(_READ)
        except _NOT_NOW:
            return False


# -- sockets ----------------------------------------------------------------------------------------------------------


def _listen(address: Tuple[str, int]) -> socket.socket:
    """Return a socket that listens at ``address``.

    :raises ConfigurationError: it cannot.
    """
    host, port = address
    try:
        family, kind, number, _, where = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, number)
        try:
            # On Windows the option of this name lets two programs listen on one port.
            name = "SO_EXCLUSIVEADDRUSE" if os.name == "nt" else "SO_REUSEADDR"
            listener.setsockopt(socket.SOL_SOCKET, getattr(socket, name), 1)
            listener.bind(where)
            listener.listen(_BACKLOG)
        except BaseException:
            listener.close()
            raise
        return listener
    except OSError as error:
        problem = f"cannot listen on {shown_address(address)}: {error.strerror or error}"
        if error.errno == errno.EADDRINUSE:
            problem = (
                f"port {port} on {host} is taken; stop the program that uses it, or choose another: each process needs "
                "a port of its own"
            )
        elif error.errno == errno.EACCES:
            problem += "; ports below 1024 are for root, take a higher one"
    except UnicodeError:
        problem = f"{host!r} is not the name of a host"
    raise ConfigurationError(problem, "health")


def _wait(reading: Set[int], writing: Set[int], timeout: Optional[float]) -> Set[int]:
    """Return those of the descriptors on which something has happened, after ``timeout`` seconds at the latest.

    gevent and eventlet replace ``select`` and what is in it, so it is looked up with each call.
    """
    make = getattr(select, "poll", None)
    if make is None:
        found = select.select(list(reading), list(writing), [], timeout)
        return {*found[0], *found[1]}
    poll = make()
    for number in reading:
        poll.register(number, select.POLLIN)
    for number in writing:
        poll.register(number, select.POLLOUT)
    events = poll.poll(None if timeout is None else int(timeout * 1000) + 1)
    return {number for number, _ in events}


# -- HTTP -------------------------------------------------------------------------------------------------------------


def parse(head: bytes, is_local: bool) -> Tuple[str, Request]:
    """Return the method and the request in ``head``.

    :param is_local: refuse a ``Host`` that is not this machine: a page of the web, in a browser here, may give its own
        name the address of this machine.
    :raises Refused: it is malformed, has another method, or names another host.
    """
    lines = head.replace(b"\r\n", b"\n").partition(b"\n\n")[0].decode("latin-1").split("\n")
    parts = lines[0].split(" ")
    if len(parts) != 3 or not parts[2].startswith("HTTP/") or not lines[0].isprintable():
        raise Refused(400, "this is not a request of HTTP/1.1")
    method, target, version = parts
    if version not in ("HTTP/1.1", "HTTP/1.0"):
        raise Refused(505, "only HTTP/1.1 and HTTP/1.0 are spoken here")
    fields = _fields(lines[1:])
    hosts = fields.get("host", [])
    if len(hosts) > 1 or (not hosts and version == "HTTP/1.1"):
        raise Refused(400, "a request has one Host header")
    if is_local and hosts and not is_loopback(host_of(hosts[0])):
        raise Refused(421, "this address is for this machine only; call it localhost or 127.0.0.1")
    if method not in ("GET", "HEAD"):
        raise Refused(405, "only GET and HEAD are answered")
    if not target.startswith("/"):
        raise Refused(400, "the target of a request begins with /")
    return method, Request(target.partition("?")[0], ", ".join(fields.get("accept", [])))


def _fields(lines: List[str]) -> Dict[str, List[str]]:
    fields: Dict[str, List[str]] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or not name or name != name.strip():
            raise Refused(400, "a header of the request is malformed")
        fields.setdefault(name.lower(), []).append(value.strip())
    return fields


def host_of(value: str) -> str:
    """Return the name in a ``Host`` header, without its port and the brackets of an IPv6 address."""
    if value.startswith("["):
        return value[1:].partition("]")[0]
    return value.partition(":")[0].lower()


def _encode(answer: Answer, is_head: bool) -> bytes:
    lines = [
        f"HTTP/1.1 {answer.status} {_REASONS[answer.status]}",
        f"Content-Type: {answer.content_type}",
        f"Content-Length: {len(answer.body)}",
        "Cache-Control: no-store",
        "X-Content-Type-Options: nosniff",
        "Connection: close",
    ]
    if answer.status == 405:
        lines.append("Allow: GET, HEAD")
    head = "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n"
    return head if is_head else head + answer.body
