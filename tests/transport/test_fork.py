"""Check that a forked child has no connection of its parent's: it uses none, and it keeps none open."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import threading
from typing import Any, Iterator, List, Optional

import pytest

from sekuire.config import ConnectionConfig
from sekuire.errors import TransportError
from sekuire.transport.http import HttpClient
from sekuire.transport.live import LiveClient

from ..support.servers import Certificates, RawServer, read_request
from ..support.waiting import GUARD, until

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n%d"


class Child:
    """A forked child. It makes ``calls`` calls with ``client`` and lives until :meth:`end`."""

    def __init__(self, client: HttpClient, calls: int) -> None:
        told, tell = os.pipe()
        ends, self._end = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:  # pragma: no cover  # The child.
            try:
                os.close(self._end)
                bodies = [client.request("POST", "/x", timeout=GUARD).body for _ in range(calls)]
                os.write(tell, b"".join(bodies) or b"-")
                os.read(ends, 1)
            except BaseException as error:
                os.write(tell, repr(error).encode())
            finally:
                os._exit(0)
        os.close(ends)
        os.close(tell)
        with os.fdopen(told, "rb") as file:
            #: What it was answered.
            self.answers = file.read1(1000)

    def end(self) -> None:
        os.close(self._end)
        os.waitpid(self._pid, 0)


class Numbered:
    """A server that answers each call with its connection's number, and notes the connections that were closed."""

    def __init__(self, context: Optional[ssl.SSLContext]) -> None:
        self.closed: List[int] = []
        self._context = context
        self.server = RawServer(self._talk)

    def _talk(self, sock: socket.socket, number: int) -> None:
        if self._context is not None:
            sock = self._context.wrap_socket(sock, server_side=True)
        with sock, contextlib.suppress(OSError):
            while read_request(sock):
                sock.sendall(ANSWER % number)
        self.closed.append(number)


@pytest.fixture(params=["plain", "tls"])
def numbered(request: Any, certificates: Certificates) -> Iterator[Any]:
    is_tls = request.param == "tls"
    talk = Numbered(certificates.server_context() if is_tls else None)
    with contextlib.closing(talk.server) as server:
        url = server.url.replace("http:", "https:") if is_tls else server.url
        client = HttpClient(ConnectionConfig(api_base_url=url, verify=certificates.ca if is_tls else True))
        yield talk, client
        client.close()


def test_idle_connections_stay_with_the_parent(numbered: Any) -> None:
    """Parent and child never write over one socket, and the child keeps none of the parent's open."""
    talk, client = numbered
    assert [client.request("POST", "/x").body for _ in range(2)] == [b"0", b"0"]
    child = Child(client, 2)
    try:
        assert child.answers == b"11"
        assert client.request("POST", "/x").body == b"0"
        # The server sees the end of the parent's connection while the child lives.
        client.close()
        until(lambda: talk.closed == [0])
    finally:
        child.end()


@pytest.mark.slow
def test_connections_in_use_stay_with_the_parent() -> None:
    """An open stream, and a call in progress, end when the parent ends them, whatever children live."""
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n:\n\n"
    begun = threading.Semaphore(0)
    ended = threading.Semaphore(0)

    def talk(sock: socket.socket, number: int) -> None:
        request = read_request(sock)
        if b"GET" in request:
            sock.sendall(head)
        begun.release()
        # A time limit of the server's is not the end of the connection.
        with contextlib.suppress(ConnectionResetError):
            assert sock.recv(1) == b""
        ended.release()

    with contextlib.closing(RawServer(talk)) as server:
        config = ConnectionConfig(api_base_url=server.url)
        live = LiveClient(config)
        answer = live.open("/stream", credential=None, headers={})
        client = HttpClient(config)

        def call() -> None:
            with contextlib.suppress(TransportError):
                client.request("POST", "/x", timeout=2.0)

        caller = threading.Thread(target=call)
        caller.start()
        for _ in range(2):
            assert begun.acquire(timeout=GUARD)
        child = Child(HttpClient(config), 0)
        try:
            assert child.answers == b"-"
            answer.close()
            live.close()
            client.close()
            caller.join(GUARD)
            for _ in range(2):
                assert ended.acquire(timeout=GUARD)
        finally:
            child.end()
