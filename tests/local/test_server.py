"""The HTTP server: whom it answers, and how it treats odd clients."""

from __future__ import annotations

import contextlib
import errno
import json
import socket
import struct
import threading
import time
import tracemalloc
from typing import Any, Callable, Dict

import pytest

from sekuire.local import LocalPlatform, server
from sekuire.local import platform as platform_module
from sekuire.local.app import Hosts
from sekuire.wire.protocol import API_PREFIX, DEFAULT_ENDPOINTS

from ..contract.client import Installation
from ..support.waiting import GUARD, until
from .conftest import client_of, local_threads

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
        parked = None

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
        target = path[len(API_PREFIX) :].format(installation_id="i", task_id="t", workspace_id="w", approval_id="a")
        for method in ("GET", "POST", "PUT"):
            for headers in ({}, {"X-API-Key": "sk_live_guess"}, {"Authorization": "Bearer guess"}):
                answer = client.call(method, target, {}, headers=headers)
                assert answer.status in (400, 401, 404, 405), (name, method, headers, answer)
                seen.add((name, answer.status))
    # Those that take a credential in their body say what is missing there.
    assert {name for name, status in seen if status == 400} <= {"bootstrap", "refresh"}
    assert all((name, 401) in seen for name in DEFAULT_ENDPOINTS if name not in ("bootstrap", "refresh"))


def _ask(platform: LocalPlatform, *parts: bytes) -> bytes:
    """Send the parts and read until the server closes; the client's side stays open."""
    host, _, port = platform.url[7:].rpartition(":")
    with socket.create_connection((host, int(port)), timeout=GUARD) as sock:
        with contextlib.suppress(ConnectionError):
            for part in parts:
                sock.sendall(part)
        answer = b""
        with contextlib.suppress(ConnectionError):
            while True:
                part = sock.recv(65536)
                if not part:
                    break
                answer += part
        return answer


def _status(answer: bytes) -> int:
    assert answer.startswith(b"HTTP/1.1 "), answer[:200]
    return int(answer[9:12])


_AMBIGUOUS = {
    "two hosts": "Host: {host}\r\nHost: {host}\r\n",
    "no host": "X: y\r\n",
    "two lengths": "Host: {host}\r\nContent-Length: 2\r\nContent-Length: 2\r\n",
    "two keys": "Host: {host}\r\nX-API-Key: a\r\nX-API-Key: b\r\n",
    "length and coding": "Host: {host}\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n",
    "another coding": "Host: {host}\r\nTransfer-Encoding: gzip, chunked\r\n",
    "negative length": "Host: {host}\r\nContent-Length: -2\r\n",
    "signed length": "Host: {host}\r\nContent-Length: +2\r\n",
    "listed length": "Host: {host}\r\nContent-Length: 2, 2\r\n",
    "folded line": "Host: {host}\r\nX: a\r\n b\r\n",
    "space before the colon": "Host: {host}\r\nX : a\r\n",
    "no colon": "Host: {host}\r\nnonsense\r\n",
    "bare line feed": "Host: {host}\nX: a\r\n",
    "control character": "Host: {host}\r\nX: a\x00b\r\n",
}


@pytest.mark.parametrize("headers", _AMBIGUOUS.values(), ids=_AMBIGUOUS)
def test_an_ambiguous_head_is_refused(platform: LocalPlatform, headers: str) -> None:
    """What two programs could read differently is 400, also with the right key."""
    host = platform.url[7:]
    head = f"POST /api/v1/logs HTTP/1.1\r\n{headers.format(host=host)}X-API-Key: {platform.api_key}\r\n\r\n"
    assert _status(_ask(platform, head.encode())) == 400


@pytest.mark.parametrize(
    "line",
    [
        "GET /", "GET / HTTP/0.9", "GET / HTTP/2.0", "GET  / HTTP/1.1", "GET /\xff HTTP/1.1",
        "GET http://[/ HTTP/1.1", "OPTIONS * HTTP/1.1", "\x16\x03\x01\x02", "GET / HTTP/1.1 x", "/ HTTP/1.1",
    ],
)  # fmt: skip
def test_a_malformed_request_line_is_refused_at_once(platform: LocalPlatform, line: str) -> None:
    """The first line alone is enough for a 400: nobody waits for headers that HTTP/0.9 does not send."""
    assert _status(_ask(platform, line.encode("latin-1") + b"\r\n")) == 400


@pytest.mark.parametrize("path", ["//[", "//evil.example/api/v1/tasks", "/%ff", "/%", "/api/v1/tasks/%00", "/;", "/@:"])
def test_an_odd_path_is_not_found(platform: LocalPlatform, path: str) -> None:
    """A path of which nothing can be made is 404."""
    head = f"GET {path} HTTP/1.1\r\nHost: {platform.url[7:]}\r\nX-API-Key: {platform.api_key}\r\n"
    assert _status(_ask(platform, head.encode() + b"Connection: close\r\n\r\n")) == 404


def test_a_head_that_is_too_large(platform: LocalPlatform) -> None:
    """64 KiB and 100 headers are the most; beyond is 413."""
    host = platform.url[7:].encode()
    line = b"GET /api/v1/tasks HTTP/1.1\r\nHost: " + host + b"\r\n"
    assert _status(_ask(platform, line, b"X: " + b"x" * 70_000)) == 413
    assert _status(_ask(platform, line, b"".join(b"X-%d: x\r\n" % n for n in range(101)), b"\r\n")) == 413


@pytest.mark.parametrize("framing", ["Content-Length: 50000000", "Transfer-Encoding: chunked"])
@pytest.mark.parametrize(
    ("path", "status"), [("/api/v1/tasks", 401), ("/api/v1/logs", 401), ("/api/v1/tasks/t/complete", 401), ("/x", 404)]
)
def test_nobody_waits_for_the_body_of_a_stranger(platform: LocalPlatform, framing: str, path: str, status: int) -> None:
    """Without a credential, or at an unknown path, the answer comes before the body, and the connection is closed."""
    head = f"POST {path} HTTP/1.1\r\nHost: {platform.url[7:]}\r\n{framing}\r\n\r\n".encode()
    host, _, port = platform.url[7:].rpartition(":")
    with socket.create_connection((host, int(port)), timeout=GUARD) as sock:
        sock.sendall(head)
        answer = b""
        while True:
            part = sock.recv(65536)
            if not part:
                break
            answer += part
    assert _status(answer) == status
    assert b"\r\nConnection: close\r\n" in answer


def test_the_body_of_a_stranger_is_not_kept(platform: LocalPlatform) -> None:
    """A refused client that sends its body all the same can read its answer, and its body is not in memory."""
    head = f"POST /api/v1/tasks HTTP/1.1\r\nHost: {platform.url[7:]}\r\nContent-Length: 40000000\r\n\r\n".encode()
    tracemalloc.start()
    try:
        body = b"x" * 1_000_000
        before = tracemalloc.get_traced_memory()[0]
        answer = _ask(platform, head, *[body] * 40)
        most = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert _status(answer) == 401
    assert most < 5_000_000


def test_a_login_has_a_small_body(platform: LocalPlatform) -> None:
    """A bootstrap and a refresh carry their credential in the body, so that only a small one is read."""
    host = platform.url[7:]
    for path in ("bootstrap", "i/refresh"):
        head = f"POST /api/v1/installations/{path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 300000\r\n\r\n".encode()
        assert _status(_ask(platform, head)) == 413


def test_few_strangers_are_waited_for(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients that begin the body of a login and do not go on keep no others out."""
    monkeypatch.setattr(server, "MAX_UNKNOWN_BODIES", 2)
    platform = make(max_streams=1, head_timeout=2 * GUARD)
    host = platform.url[7:]
    head = f"POST /api/v1/installations/bootstrap HTTP/1.1\r\nHost: {host}\r\nContent-Length: 100\r\n\r\n".encode()
    with contextlib.ExitStack() as stack:

        def is_refused() -> bool:
            # Whoever is waited for stays connected.
            sock = stack.enter_context(socket.create_connection(client_of(platform).address, timeout=0.5))
            sock.sendall(head)
            with contextlib.suppress(socket.timeout):
                return sock.recv(65536)[9:12] == b"503"
            return False

        until(is_refused)
        # One whose body comes with the head does not wait.
        fields = {"install_token": platform.create_install_token("a"), "agent_id": "a", "capabilities": []}
        body = json.dumps({**fields, "runtime_info": {}}).encode()
        whole = head.replace(b"Length: 100", b"Length: %d\r\nConnection: close" % len(body)) + body
        assert _status(_ask(platform, whole)) == 201


def test_slow_heads_cost_no_thread(make: Make) -> None:
    """Connections that send nothing, or a head byte by byte, occupy no thread, and end in time."""
    platform = make(max_streams=1, head_timeout=1.0)
    client = client_of(platform)
    with contextlib.ExitStack() as stack:
        threads = len(local_threads())
        socks = [stack.enter_context(socket.create_connection(client.address, timeout=GUARD)) for _ in range(100)]
        for sock in socks[:50]:
            sock.sendall(b"GET /api/v1/tasks HTTP/1.1\r\nX-")
        assert client.admin("GET", "/installations").status == 200
        assert len(local_threads()) == threads
        ended = set()

        def all_ended() -> bool:
            for number, sock in enumerate(socks):
                with contextlib.suppress(OSError):
                    # The drip does not prolong the time.
                    if number < 50 and number not in ended:
                        sock.sendall(b"a")
                sock.settimeout(0.001)
                with contextlib.suppress(socket.timeout):
                    try:
                        part = sock.recv(65536)
                    except ConnectionError:
                        part = b""
                    assert not part or (number < 50 and b" 408 " in part)
                    if not part:
                        ended.add(number)
            return len(ended) == len(socks)

        until(all_ended)


def test_a_slow_body_ends_in_time(make: Make) -> None:
    """A body that is sent byte by byte is 408 after its time, whoever sends it."""
    platform = make(body_timeout=0.5)
    host, key = platform.url[7:], platform.api_key
    for framing, drip in (("Content-Length: 1000", b"x"), ("Transfer-Encoding: chunked", b"1\r\nx\r\n")):
        head = f"POST /api/v1/logs HTTP/1.1\r\nHost: {host}\r\nX-API-Key: {key}\r\n{framing}\r\n\r\n".encode()
        with socket.create_connection(client_of(platform).address, timeout=GUARD) as sock:
            sock.sendall(head)
            received = b""

            def answered(sock: socket.socket = sock, drip: bytes = drip) -> bool:
                nonlocal received
                with contextlib.suppress(OSError):
                    sock.sendall(drip)
                    sock.settimeout(0.05)
                    received += sock.recv(65536)
                return bool(received)

            until(answered)
            assert _status(received) == 408


def test_connections_are_bounded(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """When all places are occupied, the connection that has waited longest makes room."""
    monkeypatch.setattr(platform_module, "MORE_CONNECTIONS", 8)
    platform = make(max_streams=1, head_timeout=2 * GUARD)
    client = client_of(platform)
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(socket.create_connection(client.address, timeout=GUARD)) for _ in range(13)]
        assert socks[0].recv(100) == b""
        assert client.admin("GET", "/installations").status == 200


def test_no_descriptor_is_left(platform: LocalPlatform, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """A system without descriptors costs one warning and a moment, not the server."""
    client = client_of(platform)
    failures = [OSError(errno.EMFILE, "Too many open files") for _ in range(3)]
    accept = socket.socket.accept

    def exhausted(self: socket.socket) -> Any:
        if failures:
            raise failures.pop()
        return accept(self)

    monkeypatch.setattr(socket.socket, "accept", exhausted)
    assert client.admin("GET", "/installations").status == 200
    assert [record.levelname for record in caplog.records if "ulimit" in record.getMessage()] == ["WARNING"]
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_expect_100_continue(platform: LocalPlatform) -> None:
    """A client that asks first is asked for its body only once it is known."""
    body = b'{"agent_id": "a"}'
    head = f"POST /api/v1/install-tokens HTTP/1.1\r\nHost: {platform.url[7:]}\r\nContent-Length: {len(body)}\r\n"
    for key, first, last in ((platform.api_key, 100, b" 201 "), ("sk_live_x", 401, b" 401 ")):
        with socket.create_connection(client_of(platform).address, timeout=GUARD) as sock:
            sock.sendall(f"{head}X-API-Key: {key}\r\nExpect: 100-continue\r\n\r\n".encode())
            answer = sock.recv(65536)
            assert _status(answer) == first
            if first == 100:
                sock.sendall(body)
                answer = answer[25:] or sock.recv(65536)
            assert last in answer.splitlines()[0]
    odd = f"{head}X-API-Key: {platform.api_key}\r\nExpect: magic\r\n\r\n".encode()
    assert _status(_ask(platform, odd)) == 417


def test_pipelined_requests_are_answered_in_turn(platform: LocalPlatform) -> None:
    """Several requests in one piece get as many answers, also behind a body and in small pieces."""
    host, key = platform.url[7:], platform.api_key
    get = f"GET /api/v1/tasks HTTP/1.1\r\nHost: {host}\r\nX-API-Key: {key}\r\n\r\n"
    post = f"POST /api/v1/install-tokens HTTP/1.1\r\nHost: {host}\r\nX-API-Key: {key}\r\n"
    sized = post + 'Content-Length: 17\r\n\r\n{"agent_id": "a"}'
    chunked = post + 'Transfer-Encoding: chunked\r\n\r\n6;x=y\r\n{"agen\r\nB\r\nt_id": "a"}\r\n0\r\nT: x\r\n\r\n'
    last = get.replace("\r\n\r\n", "\r\nConnection: close\r\n\r\n")
    data = (get + sized + chunked + "\r\n" + sized + last).encode()
    for size in (len(data), 7):
        pieces = [data[at : at + size] for at in range(0, len(data), size)]
        answer = _ask(platform, *pieces)
        assert [int(part[:3]) for part in answer.split(b"HTTP/1.1 ")[1:]] == [200, 201, 201, 201, 200]


_WRONG_JSON = {
    "broken UTF-8": b'{"agent_id": "\xff"}',
    "not JSON": b"{",
    "no object": b"[]",
    "a key twice": b'{"agent_id": "a", "agent_id": "b"}',
    "NaN": b'{"agent_id": "a", "max_uses": NaN}',
    "infinity": b'{"agent_id": "a", "max_uses": 1e999}',
    "a huge integer": b'{"agent_id": "a", "max_uses": ' + b"9" * 400 + b"}",
    "half a surrogate pair": b'{"agent_id": "a", "x": "\\ud800"}',
    "deep": b'{"agent_id": "a", "x": ' + b"[" * 450 + b"]" * 450 + b"}",
    "deeper": b'{"agent_id": "a", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
}


@pytest.mark.parametrize("body", _WRONG_JSON.values(), ids=_WRONG_JSON)
def test_a_wrong_body_is_a_400(platform: LocalPlatform, body: bytes) -> None:
    """Whatever is wrong with a body is its sender's error."""
    client = client_of(platform)
    answer = client.call("POST", "/install-tokens", headers={"X-API-Key": client.api_key}, raw=body)
    assert answer.status == 400, answer


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/tasks?limit=000000001" + "9" * 5000, None),
        ("GET", "/tasks?capability=%ff", None),
        ("GET", "/logs?event_type=%00", None),
        ("POST", "/installations/{id}/commands", {"type": ["pause"]}),
        ("POST", "/installations/{id}/revoke", {"shutdown_timeout_ms": 10**300}),
        ("POST", "/tasks", {"agent_id": "a", "capability": "c", "input": 1, "timeout_ms": 10**400}),
    ],
)
def test_a_wrong_value_is_a_400(
    platform: LocalPlatform, installation: Installation, method: str, path: str, body: Any
) -> None:
    """Values that no program can use are refused before they reach the database or a timer."""
    client = client_of(platform)
    assert client.admin(method, path.format(id=installation.id), body).status == 400


def test_an_injected_fault_keeps_the_connection(platform: LocalPlatform) -> None:
    """An injected answer comes before the body was read, and the next request on the connection is understood."""
    connection = client_of(platform).connect()
    headers = {"X-API-Key": platform.api_key}
    try:
        with platform.faults.error(503, on="install_tokens", times=1):
            for status in (503, 201):
                connection.request("POST", "/api/v1/install-tokens", b'{"agent_id": "a"}', headers)
                sock = connection.sock
                response = connection.getresponse()
                response.read()
                assert (response.status, connection.sock) == (status, sock)
    finally:
        connection.close()


def test_questions_that_wait_occupy_no_thread() -> None:
    """Many more requests wait for a task than there are threads, others are answered, and all see the task's end."""
    waiting = 120
    with LocalPlatform(max_streams=1) as platform:
        limit = platform._server.limits.threads  # type: ignore[union-attr]
        assert waiting > 3 * limit
        task_id = platform.submit("c", {}, agent_id="a")
        client = client_of(platform)
        answers = []
        threads = [
            threading.Thread(
                target=lambda: answers.append(client.admin("GET", f"/tasks/{task_id}?wait_ms=20000").body["status"])
            )
            for _ in range(waiting)
        ]
        for thread in threads:
            thread.start()
        until(lambda: len(platform._hub._polls.get(task_id, ())) == waiting)
        assert client.task(task_id)["status"] == "queued"
        assert client.admin("POST", f"/tasks/{task_id}/cancel").status == 200
        for thread in threads:
            thread.join()
        assert answers == ["failed"] * waiting
        assert platform.count("task", 200) == waiting + 1
        assert platform._hub._polls == {}


def test_a_question_that_waits_while_the_platform_stops(platform: LocalPlatform) -> None:
    """It is answered with the task as it is, and stop() does not wait for its time."""
    task_id = platform.submit("c", {}, agent_id="a")
    client = client_of(platform)
    answers = []
    thread = threading.Thread(
        target=lambda: answers.append(client.admin("GET", f"/tasks/{task_id}?wait_ms=20000").body["status"])
    )
    thread.start()
    until(lambda: platform._hub._polls)
    platform.stop()
    thread.join()
    assert answers == ["queued"]
    assert local_threads() == []


def test_a_fault_strikes_a_question_that_waits_once(platform: LocalPlatform) -> None:
    """What is injected after the platform has acted comes when it answers, and what comes before is not repeated."""
    client = client_of(platform)
    fault = platform.faults.add("error:503,when=after,times=1,on=task")
    answer = client.admin("GET", f"/tasks/{platform.submit('c', {}, agent_id='a')}?wait_ms=100")
    assert (answer.status, fault.injected) == (503, 1)
    assert platform.count("task") == 1
