"""The HTTP server: whom it answers, and how it treats odd clients."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
import time
from typing import Callable, Dict

import pytest

from sekuire.local import LocalPlatform
from sekuire.local.app import Hosts
from sekuire.wire.protocol import API_PREFIX, DEFAULT_ENDPOINTS

from ..contract.client import Installation
from ..support.waiting import GUARD, until
from .conftest import client_of

Make = Callable[..., LocalPlatform]


def _raw(platform: LocalPlatform, text: str) -> bytes:
    host, _, port = platform.url[7:].rpartition(":")
    with socket.create_connection((host, int(port)), timeout=GUARD) as sock:
        sock.sendall(text.encode())
        sock.shutdown(socket.SHUT_WR)
        answer = b""
        while True:
            part = sock.recv(65536)
            if not part:
                return answer
            answer += part


def test_a_foreign_host_is_refused(platform: LocalPlatform) -> None:
    """A Host that is not this server's is 421, so that no web page can reach it under a name of its own."""
    client = client_of(platform)
    port = client.address[1]
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1:1", f"127.0.0.1.evil.example:{port}", "localhost"):
        answer = client.call("GET", "/installations", headers={"Host": host, "X-API-Key": client.api_key})
        assert (answer.status, answer.code) == (421, "WRONG_HOST"), host
    for host in (f"localhost:{port}", f"LOCALHOST:{port}", f"[::1]:{port}", f"127.0.0.1:{port}"):
        answer = client.call("GET", "/installations", headers={"Host": host, "X-API-Key": client.api_key})
        assert answer.status == 200, host
    assert platform.count("refused", 421) == 5


def test_a_missing_host_is_refused(platform: LocalPlatform) -> None:
    """HTTP/1.1 asks for a Host; without one the answer is 400."""
    assert b" 400 " in _raw(platform, "GET /api/v1/tasks HTTP/1.1\r\n\r\n").splitlines()[0]


def test_allowed_hosts(make: Make) -> None:
    """allowed_hosts adds names, with a port or for any."""
    client = client_of(make(allowed_hosts=["host.docker.internal", "proxy:80"]))
    for host, status in (
        ("host.docker.internal:1", 401),
        ("host.docker.internal", 401),
        ("proxy:80", 401),
        ("proxy:81", 421),
    ):
        assert client.call("GET", "/tasks", headers={"Host": host}).status == status, host


def test_addresses_are_harmless_where_the_network_may_come_in() -> None:
    """Bound to an open address, any address is a good Host, and no foreign name is."""
    hosts = Hosts("0.0.0.0", 9300, ())
    for host, fine in (("10.1.2.3:9300", True), ("[fe80::1]:9300", True), ("10.1.2.3:80", False), ("evil:9300", False)):
        assert (hosts.refuse({"HTTP_HOST": host}) is None) is fine, host
    assert Hosts("127.0.0.1", 9300, ()).refuse({"HTTP_HOST": "10.1.2.3:9300"}) is not None
    assert Hosts("127.0.0.1", 80, ()).refuse({"HTTP_HOST": "localhost"}) is None


def test_a_foreign_origin_is_refused(platform: LocalPlatform) -> None:
    """A page from elsewhere gets 403, whatever it knows; one of this server's own does not."""
    client = client_of(platform)
    for origin, status in (("http://evil.example", 403), ("null", 403), (platform.url, 200)):
        headers = {"Origin": origin, "X-API-Key": client.api_key}
        assert client.call("GET", "/installations", headers=headers).status == status


@pytest.mark.parametrize(
    "text",
    ["nonsense\r\n\r\n", "GET /x HTTP/1.1\r\nHost: x\r\nContent-Length: abc\r\n\r\n", "get / HTTP/1.1\r\n\r\n"],
)
def test_malformed_http_gets_a_json_error(platform: LocalPlatform, text: str) -> None:
    """Malformed HTTP is answered 400 in the usual shape, and the connection is closed."""
    head, _, body = _raw(platform, text).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400")
    assert b"Date: " in head
    assert json.loads(body)["code"] == "INVALID_REQUEST"


def test_a_body_that_ends_early(platform: LocalPlatform, caplog: pytest.LogCaptureFixture) -> None:
    """A client that dies in the middle of its body leaves nothing behind, also no noise."""
    host = platform.url[7:]
    _raw(platform, f"POST /api/v1/logs HTTP/1.1\r\nHost: {host}\r\nContent-Length: 100\r\n\r\n{{")
    assert client_of(platform).admin("GET", "/installations").status == 200
    assert not [record for record in caplog.records if record.levelname in ("ERROR", "CRITICAL")]


@pytest.mark.parametrize("length", ["-5", "0"])
def test_a_body_of_no_length(platform: LocalPlatform, length: str) -> None:
    """A negative length does not make the server wait for the end of the connection."""
    client = client_of(platform)
    with socket.create_connection(client.address, timeout=GUARD) as sock:
        host = platform.url[7:]
        sock.sendall(
            f"POST /api/v1/logs HTTP/1.1\r\nHost: {host}\r\nX-API-Key: {client.api_key}\r\n"
            f"Content-Length: {length}\r\n\r\n".encode()
        )
        assert sock.recv(65536).startswith(b"HTTP/1.1 400")


@pytest.mark.parametrize("size", [10, 33 * 1024 * 1024])
def test_a_chunked_body_that_is_not_read(platform: LocalPlatform, size: int) -> None:
    """An answer that comes before a chunked body was read closes the connection instead of misreading the rest."""
    connection = client_of(platform).connect()
    headers = {"Transfer-Encoding": "chunked"}
    if size > 10:
        headers["X-API-Key"] = platform.api_key
    try:
        chunks = (b"x" * min(size, 1024 * 1024) for _ in range(max(1, size // 1024 // 1024)))
        connection.request("POST", "/api/v1/logs", chunks, headers, encode_chunked=True)
        response = connection.getresponse()
        assert response.status == (413 if size > 10 else 401)
        assert response.headers["Connection"] == "close"
        response.read()
    finally:
        connection.close()


def test_a_wrong_chunk_is_a_400(platform: LocalPlatform) -> None:
    """A chunk that is none is answered, not crashed on."""
    host = platform.url[7:]
    head = f"POST /api/v1/logs HTTP/1.1\r\nHost: {host}\r\nX-API-Key: {platform.api_key}\r\n"
    answer = _raw(platform, head + "Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400")


def test_http_1_0_streams_until_close(platform: LocalPlatform, installation: Installation) -> None:
    """A client of HTTP/1.0 gets the stream without chunks."""
    host, _, port = platform.url[7:].rpartition(":")
    with socket.create_connection((host, int(port)), timeout=GUARD) as sock, sock.makefile("rb") as file:
        sock.sendall(
            f"GET /api/v1/tasks/stream?worker_id=w HTTP/1.0\r\nHost: {host}:{port}\r\n"
            f"Authorization: Bearer {installation.token}\r\n\r\n".encode()
        )
        head: Dict[str, str] = {}
        assert b" 200 " in file.readline()
        for line in iter(file.readline, b"\r\n"):
            name, _, value = line.decode().partition(":")
            head[name.lower()] = value.strip()
        assert "transfer-encoding" not in head
        assert file.readline().startswith(b"id: ")


def test_a_reset_stream_is_noticed(platform: LocalPlatform, installation: Installation) -> None:
    """A connection that is reset counts as gone as fast as one that is closed."""
    connection, response = installation.open()
    response.readline()
    sock = connection.sock
    assert sock is not None
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    response.close()
    connection.close()
    # Before the next keepalive, which would notice it too, after 15 s.
    until(lambda: not platform.streams(), timeout=10.0)


def test_a_pipelined_request_does_not_disturb(platform: LocalPlatform, installation: Installation) -> None:
    """A client that sends more on a stream's connection keeps its stream, and costs no processor time."""
    connection, response = installation.open()
    try:
        assert connection.sock is not None
        connection.sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
        task_id = platform.submit("c", {})
        text = b""
        while task_id.encode() not in text:
            text += response.readline()
        assert len(platform.streams()) == 1
        began = time.process_time()
        time.sleep(0.5)  # doing nothing, which is what is measured
        assert time.process_time() - began < 0.2
    finally:
        response.close()
        connection.close()
    platform.drop_streams()


def test_head_opens_no_stream(platform: LocalPlatform, installation: Installation) -> None:
    """HEAD on the stream is refused, not answered with an endless nothing."""
    connection = installation.client.connect()
    try:
        connection.request(
            "HEAD", "/api/v1/tasks/stream?worker_id=w", headers={"Authorization": f"Bearer {installation.token}"}
        )
        assert connection.getresponse().status == 405
    finally:
        connection.close()
    assert platform.streams() == []


def test_a_thread_that_works_beyond_the_stop_ends_after_it(platform: LocalPlatform) -> None:
    """stop() does not wait without limit for a thread that answers, and the thread ends when it has answered."""
    begun, may_end = threading.Event(), threading.Event()

    class Slow:
        def __init__(self) -> None:
            self.socket = socket.socket()

        def communicate(self) -> bool:
            begun.set()
            may_end.wait(20)
            return False

        def close(self) -> None:
            self.socket.close()

    pool = platform._server.requests  # type: ignore[union-attr]
    pool.put(Slow())
    assert begun.wait(20)
    pool.stop(0.01)
    assert any(thread.is_alive() for thread in pool._threads)
    may_end.set()
    until(lambda: not any(thread.is_alive() for thread in pool._threads))


def test_it_has_no_debug_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure of the platform shows no traceback and offers no console, whatever the environment asks of Flask."""
    monkeypatch.setenv("FLASK_DEBUG", "1")
    monkeypatch.setenv("FLASK_ENV", "development")
    monkeypatch.setenv("WERKZEUG_DEBUG_PIN", "off")
    with LocalPlatform() as platform:
        client = client_of(platform)
        monkeypatch.setattr(platform._store, "installations", lambda: 1 / 0)
        answer = client.call("GET", "/installations", headers={"X-API-Key": client.api_key})
        assert (answer.status, answer.code) == (500, "INTERNAL_ERROR")
        assert "ZeroDivisionError" not in json.dumps(answer.body)
        for path in ("/?__debugger__=yes&cmd=resource", "/console", "/installations?__debugger__=yes&cmd=printpin"):
            answer = client.call("GET", path)
            assert answer.status in (401, 404)
            assert "debugger" not in json.dumps(answer.body).lower()


def test_it_listens_on_this_machine_only(platform: LocalPlatform) -> None:
    """By default no other address of this machine leads to it, so that no other machine can."""
    host, _, port = platform.url[7:].rpartition(":")
    assert host == "127.0.0.1"
    others = {"127.0.0.2"}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        # Sends nothing; the system says from which address it would.
        probe.connect(("192.0.2.1", 9))
        others.add(probe.getsockname()[0])
    for other in others - {"127.0.0.1"}:
        with pytest.raises(OSError), socket.create_connection((other, int(port)), timeout=GUARD):
            pass


def test_nothing_is_done_without_a_credential(platform: LocalPlatform) -> None:
    """Every endpoint refuses a request without credentials, and one with those of somebody else."""
    client = client_of(platform)
    seen = set()
    for name, path in DEFAULT_ENDPOINTS.items():
        target = path[len(API_PREFIX) :].format(installation_id="i", task_id="t", workspace_id="w")
        for method in ("GET", "POST", "PUT"):
            for headers in ({}, {"X-API-Key": "sk_live_guess"}, {"Authorization": "Bearer guess"}):
                answer = client.call(method, target, {}, headers=headers)
                assert answer.status in (400, 401, 404, 405), (name, method, headers, answer)
                seen.add((name, answer.status))
    # Those that take a credential in their body say what is missing there.
    assert {name for name, status in seen if status == 400} <= {"bootstrap", "refresh"}
    assert all((name, 401) in seen for name in DEFAULT_ENDPOINTS if name not in ("bootstrap", "refresh"))
