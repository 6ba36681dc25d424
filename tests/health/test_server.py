"""The HTTP of the health server: small, bounded, and for this machine only unless it listens elsewhere."""

from __future__ import annotations

import os
import socket
import threading
from typing import Any, Callable, Iterator, List

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sekuire._internal.threads import Deadline
from sekuire.errors import ConfigurationError
from sekuire.health import server as module
from sekuire.health.server import MAX_CONNECTIONS, MAX_HEAD, Answer, HealthServer, Refused, Request, parse

from ..support.waiting import GUARD, until
from .asking import ask, raw

Make = Callable[..., HealthServer]


def respond(request: Request) -> Answer:
    if request.path == "/broken":
        raise LookupError("the page")
    if request.path == "/long":
        return Answer(200, b"x" * 4_000_000, "text/plain")
    return Answer(200, request.path.encode(), "text/plain")


def refuse(status: int, problem: str) -> Answer:
    return Answer(status, problem.encode(), "text/plain")


@pytest.fixture
def make() -> Iterator[Make]:
    made: List[HealthServer] = []

    def make(host: str = "127.0.0.1", port: int = 0) -> HealthServer:
        server = HealthServer((host, port), respond, refuse)
        server.open()
        made.append(server)
        return server

    yield make
    for server in made:
        server.close()
        assert server.join(Deadline(GUARD))


@pytest.fixture
def server(make: Make) -> HealthServer:
    return make()


def test_get_and_head(server: HealthServer) -> None:
    """The query is not part of the path, and HEAD has the headers of GET without its body."""
    assert ask(server.address, "/livez?verbose=1") == (200, b"/livez")
    assert ask(server.address, "/livez", "HEAD") == (200, b"")
    answer = raw(server.address, b"HEAD /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert b"Content-Length: 6\r\n" in answer
    assert answer.endswith(b"\r\n\r\n")
    assert b"Connection: close\r\n" in answer


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE", "CONNECT"])
def test_other_methods(server: HealthServer, method: str) -> None:
    """They are refused with the methods that there are, whatever body comes with them."""
    answer = raw(
        server.address, f"{method} /livez HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\n\r\nabc".encode()
    )
    assert answer.startswith(b"HTTP/1.1 405 ")
    assert b"\r\nAllow: GET, HEAD\r\n" in answer


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /livez HTTP/1.0\r\n\r\n", 200),
        (b"GET /livez HTTP/1.1\nHost: localhost\n\n", 200),
        (b"GET /livez HTTP/1.1\r\n\r\n", 400),
        (b"GET /livez HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n", 400),
        (b"GET livez HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"GET http://localhost/livez HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"GET /livez\r\n\r\n", 400),
        (b"nonsense\r\n\r\n", 400),
        (b"GET /livez HTTP/2.0\r\nHost: localhost\r\n\r\n", 505),
        (b"GET /livez HTTP/1.1\r\nHost: localhost\r\nno colon\r\n\r\n", 400),
        (b"GET /livez HTTP/1.1\r\nHost: localhost\r\n : x\r\n\r\n", 400),
        (b"GET /\x00 HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * MAX_HEAD + b"\r\n\r\n", 431),
        (b"x" * (MAX_HEAD + 1), 431),
    ],
)
def test_malformed_requests(server: HealthServer, request_: bytes, status: int) -> None:
    """Each gets an answer, and the next request is served."""
    assert raw(server.address, request_).startswith(f"HTTP/1.1 {status} ".encode())
    assert ask(server.address, "/livez")[0] == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "10.0.0.1", "", "[::2]:80"]
)
def test_a_foreign_host_is_refused_on_loopback(server: HealthServer, host: str) -> None:
    """A page of the web that gives its own name this machine's address learns nothing."""
    status, body = ask(server.address, "/livez", headers={"Host": host})
    assert status == 421
    assert b"/livez" not in body


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:1", "127.0.0.1", "127.1.2.3:8080", "[::1]:8080", "a.localhost"]
)
def test_the_names_of_this_machine(server: HealthServer, host: str) -> None:
    """All of them are accepted, with any port: a tunnel may have another one."""
    assert ask(server.address, "/livez", headers={"Host": host})[0] == 200


@given(st.one_of(st.binary(), st.binary().map(lambda data: b"GET /" + data + b" HTTP/1.1\r\nHost: localhost\r\n\r\n")))
def test_any_head(head: bytes) -> None:
    """Whatever comes is a request or is refused with a status."""
    status = 0
    try:
        method, request = parse(head, True)
    except Refused as refused:
        status = refused.status
    assert status in (0, 400, 405, 421, 505)
    assert status or (method in ("GET", "HEAD") and request.path.startswith("/"))


def test_any_host_off_loopback(make: Make) -> None:
    """A probe of Kubernetes names the address of the pod."""
    server = make("0.0.0.0")
    assert ask(("127.0.0.1", server.address[1]), "/livez", headers={"Host": "10.1.2.3:8080"})[0] == 200


def test_a_page_that_fails(server: HealthServer, caplog: pytest.LogCaptureFixture) -> None:
    """The answer is 500 without its text, the log has it, and the server goes on."""
    status, body = ask(server.address, "/broken")
    assert status == 500
    assert b"the page failed" in body
    assert "LookupError" in caplog.text
    assert ask(server.address, "/livez")[0] == 200


def test_a_client_that_sends_nothing_holds_up_nobody(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """More of them than there is room for take each other's places."""
    # Longer than the test waits: the time limit is not what closes the first one.
    monkeypatch.setattr(module, "TIME", 2 * GUARD)
    server = make()
    silent = [socket.create_connection(server.address, timeout=GUARD) for _ in range(MAX_CONNECTIONS * 2)]
    try:
        for _ in range(3):
            assert ask(server.address, "/livez")[0] == 200
        # The oldest was closed.
        assert silent[0].recv(1) == b""
    finally:
        for one in silent:
            one.close()


def test_a_request_that_comes_slowly(server: HealthServer) -> None:
    """It is answered once it is whole, beside others."""
    with socket.create_connection(server.address, timeout=GUARD) as slow:
        for part in (b"GET /li", b"vez HTTP/1.1\r\nHo", b"st: localhost\r\n", b"\r"):
            slow.sendall(part)
            assert ask(server.address, "/livez")[0] == 200
        slow.sendall(b"\n")
        assert slow.recv(65536).startswith(b"HTTP/1.1 200 ")


def test_deadlines(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that does not come, and a client that does not close after its answer, are given up."""
    monkeypatch.setattr(module, "TIME", 0.2)
    monkeypatch.setattr(module, "LINGER", 0.1)
    server = make()
    with socket.create_connection(server.address, timeout=GUARD) as silent:
        assert silent.recv(1) == b""
    with socket.create_connection(server.address, timeout=GUARD) as lazy:
        lazy.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
        while lazy.recv(65536):
            pass
        until(lambda: not server.connections)


def test_a_long_answer_to_a_slow_reader(server: HealthServer) -> None:
    """It is sent as far as there is room, and others are served at that time."""
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.settimeout(GUARD)
        slow.connect(server.address)
        slow.sendall(b"GET /long HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert ask(server.address, "/livez")[0] == 200
        count = 0
        while True:
            data = slow.recv(65536)
            if not data:
                break
            count += len(data)
    assert count > 4_000_000


def test_clients_that_leave(server: HealthServer) -> None:
    """At every moment, also with a reset."""
    for data in (b"", b"GET /liv", b"GET /long HTTP/1.1\r\nHost: localhost\r\n\r\n"):
        one = socket.create_connection(server.address, timeout=GUARD)
        one.sendall(data)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
        one.close()
    until(lambda: not server.connections)
    assert ask(server.address, "/livez")[0] == 200


def test_many_at_once(server: HealthServer) -> None:
    """Each gets its own answer."""
    found: List[Any] = []
    threads = [
        threading.Thread(target=lambda number=number: found.append((number, ask(server.address, f"/{number}"))))
        for number in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [(number, (200, f"/{number}".encode())) for number in range(20)]


def test_a_taken_port(server: HealthServer) -> None:
    """The error names option and port, and says what to do; nothing is left open."""
    port = server.address[1]
    with pytest.raises(ConfigurationError, match=f"health: port {port} on 127.0.0.1 is taken; .*a port of its own"):
        HealthServer(("127.0.0.1", port), respond, refuse).open()


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid", "a" * 70 + ".example"])
def test_an_address_of_another_machine(host: str) -> None:
    """It is named, with the system's words."""
    with pytest.raises(ConfigurationError, match="health: "):
        HealthServer((host, 0), respond, refuse).open()


def test_the_port_is_free_after_the_end(make: Make) -> None:
    """The next server may have it at once."""
    first = make()
    assert ask(first.address, "/livez")[0] == 200
    first.close()
    assert first.join(Deadline(GUARD))
    assert ask(make(port=first.address[1]).address, "/livez")[0] == 200


def test_no_descriptor_is_left(make: Make) -> None:
    """After its end none is open, whatever the connections were doing."""
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("needs /proc")
    before = len(os.listdir("/proc/self/fd"))
    server = make()
    with socket.create_connection(server.address) as one:
        one.sendall(b"GET /")
        assert ask(server.address, "/livez")[0] == 200
        server.close()
        assert server.join(Deadline(GUARD))
    assert len(os.listdir("/proc/self/fd")) == before


def test_without_poll(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows and eventlet have ``select`` only."""
    monkeypatch.delattr(module.select, "poll")
    server = make()
    assert ask(server.address, "/livez") == (200, b"/livez")
    assert ask(server.address, "/long")[0] == 200
