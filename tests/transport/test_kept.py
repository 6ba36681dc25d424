"""Calls over a connection that is open already: the same as over a new one, whatever the server answers."""

from __future__ import annotations

import functools
import gzip
import http.client
import io
import socket
from typing import Any, Callable, List, Tuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sekuire.config import ConnectionConfig
from sekuire.errors import SekuireError, TransportError
from sekuire.secret import Secret
from sekuire.transport import kept
from sekuire.transport.http import MAX_ANSWER, HttpClient, Reply
from sekuire.wire import protocol

from ..support.servers import Answer, Certificates, RawServer, WebServer, assert_clean, open_descriptors, read_request
from ..support.waiting import GUARD, until

TOKEN = Secret("skr_do_not_show_me")
BEARER = functools.partial(protocol.bearer, TOKEN)
FIRST = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nfirst"
LAST = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nlast"


def client(url: str, **options: Any) -> HttpClient:
    return HttpClient(ConnectionConfig(api_base_url=url, **options), pool_size=4)


def post(one: HttpClient, body: bytes = b"{}", **options: Any) -> Reply:
    return one.request("POST", "/x", body=body, credential=BEARER, **options)


def after_one_call(second: Callable[[socket.socket], None]) -> Callable[[socket.socket, int], None]:
    """A server whose first connection serves one plain call and then ``second``; later ones serve plain calls."""

    def talk(sock: socket.socket, number: int) -> None:
        if number == 0:
            assert read_request(sock)
            sock.sendall(FIRST)
            assert read_request(sock)
            second(sock)
        while read_request(sock):
            sock.sendall(LAST)

    return talk


def piecewise(sock: socket.socket, data: bytes) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for byte in data:
        sock.send(bytes([byte]))


LARGE = b"x" * 300_000
PACKED = gzip.compress(b'{"packed":true}')
#: Name, the answer, whether its connection can be used again.
WHOLE: List[Tuple[str, bytes, bool]] = [
    ("plain", b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nX-A: 1\r\n\r\nabc", True),
    ("empty", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", True),
    ("no reason", b"HTTP/1.1 202\r\nContent-Length: 2\r\n\r\nok", True),
    ("an error", b"HTTP/1.1 503 No\r\nRetry-After: 3\r\nContent-Length: 2\r\n\r\n{}", True),
    ("names in any case", b"HTTP/1.1 200 OK\r\ncOnTeNt-LeNgTh:\t3 \r\nx-A:1\r\n\r\nabc", True),
    ("large", b"HTTP/1.1 200 OK\r\nContent-Length: 300000\r\n\r\n" + LARGE, True),
    ("chunked", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n", True),
    ("both framings", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n1\r\na\r\n0\r\n\r\n",
     True),
    ("gzip", b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(PACKED) + PACKED, True),
    ("204", b"HTTP/1.1 204 No Content\r\n\r\n", True),
    ("304", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 3\r\n\r\n", True),
    ("continue", b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc", True),
    ("a folded header", b"HTTP/1.1 200 OK\r\nX-Folded: 1\r\n 2\r\nContent-Length: 3\r\n\r\nabc", True),
    ("a header twice", b"HTTP/1.1 200 OK\r\nX-A: 1\r\nX-A: 2\r\nContent-Length: 3\r\n\r\nabc", True),
    ("bare line feeds", b"HTTP/1.1 200 OK\nContent-Length: 3\n\nabc", True),
    ("a redirect", b"HTTP/1.1 307 Go\r\nLocation: http://127.0.0.1:9/\r\nContent-Length: 3\r\n\r\nabc", True),
    ("keep-alive", b"HTTP/1.1 200 OK\r\nConnection: Keep-Alive\r\nContent-Length: 3\r\n\r\nabc", True),
    ("close", b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 3\r\n\r\nabc", False),
    ("HTTP/1.0", b"HTTP/1.0 200 OK\r\nContent-Length: 3\r\n\r\nabc", False),
]  # fmt: skip


@pytest.mark.parametrize("in_pieces", [False, True])
@pytest.mark.parametrize(("answer", "is_kept"), [row[1:] for row in WHOLE], ids=[row[0] for row in WHOLE])
def test_an_answer_is_the_same_as_over_a_new_connection(answer: bytes, is_kept: bool, in_pieces: bool) -> None:
    """Status, headers and body are those that requests reads, and the connection is kept where that is allowed."""

    def send(sock: socket.socket) -> None:
        piecewise(sock, answer) if in_pieces and len(answer) < 1000 else sock.sendall(answer)

    def fresh(sock: socket.socket, number: int) -> None:
        read_request(sock)
        send(sock)

    with RawServer(fresh) as server:
        one = client(server.url)
        expected = post(one)
        one.close()
    with RawServer(after_one_call(send)) as server:
        one = client(server.url)
        assert post(one).body == b"first"
        got = post(one)
        assert server.accepted == 1
        assert post(one).body == b"last"
        one.close()
        assert server.accepted == (1 if is_kept else 2)
    assert (got.status, got.body) == (expected.status, expected.body)
    for name in ("x-a", "Retry-After", "Location", "CONTENT-LENGTH"):
        assert got.headers.get(name) == expected.headers.get(name)
        assert (name in got.headers) == (name in expected.headers)


def test_an_answer_that_ends_with_its_connection() -> None:
    """Without a length the body is what comes until the end, and the next call makes a connection."""

    def second(sock: socket.socket) -> None:
        sock.sendall(b"HTTP/1.1 200 OK\r\n\r\nall")
        sock.shutdown(socket.SHUT_RDWR)

    with RawServer(after_one_call(second)) as server:
        one = client(server.url)
        assert [post(one).body for _ in range(3)] == [b"first", b"all", b"last"]
        one.close()
    assert server.accepted == 2


def test_what_is_sent_is_the_same() -> None:
    """The second request has the headers of the first, its own body, and one Host."""
    with WebServer(lambda request: Answer(200, {})) as server:
        one = client(server.url + "/base")
        for number in range(2):
            one.request("POST", "/a/b%20c?q=1", body=b"%d" % number, credential=BEARER, idempotency_key="k:1")
        one.request("GET", "/y")
        one.request("POST", "/z")
        one.close()
    assert server.connections == 1
    first, second, get, empty = server.requests
    assert sorted(first.headers.items()) == sorted(second.headers.items())
    assert (second.method, second.path, second.body) == ("POST", "/base/a/b%20c?q=1", b"1")
    assert second.headers["Host"] == f"127.0.0.1:{server.port}"
    for name in ("Authorization", "Idempotency-Key", "Content-Type", "Content-Length"):
        assert name not in get.headers
    assert empty.headers["Content-Length"] == "0"


def test_a_large_body_arrives_whole() -> None:
    """A body of many megabytes is sent over a kept connection as it is."""
    with WebServer(lambda request: Answer(200, {"bytes": len(request.body)})) as server:
        one = client(server.url)
        post(one)
        body = b"0123456789abcdef" * 1_000_000
        assert post(one, body, timeout=GUARD).json() == {"bytes": len(body)}
        one.close()
    assert server.connections == 1
    assert server.requests[1].body == body


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 2",
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nnot a number\r\n",
        b"HTTP/1.1 2x0 OK\r\nContent-Length: 0\r\n\r\n",
        b"nonsense\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2000000\r\n\r\n" + b"x" * 2_000_000,
        b"HTTP/1.1 200 OK\r\nContent-Encoding: br\r\nContent-Length: 3\r\n\r\nabc",
    ],
)
def test_no_whole_answer_is_an_error_that_may_pass(answer: bytes) -> None:
    """A cut, broken or too large answer is a clean TransportError, and its connection is not used again."""

    def second(sock: socket.socket) -> None:
        sock.sendall(answer)
        sock.shutdown(socket.SHUT_RDWR)

    with RawServer(after_one_call(second)) as server:
        one = client(server.url)
        post(one)
        with pytest.raises(TransportError) as caught:
            post(one)
        assert caught.value.retryable
        assert_clean(caught.value, TOKEN.reveal())
        assert post(one).body == b"last"
        one.close()
    assert server.accepted == 2


def test_a_reset_within_an_answer_is_an_error_that_may_pass() -> None:
    """A connection that is reset in the middle of an answer is reported as that, without a token."""

    def second(sock: socket.socket) -> None:
        sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
        sock.close()

    with RawServer(after_one_call(second)) as server:
        one = client(server.url)
        post(one)
        with pytest.raises(TransportError, match="Connection reset by peer") as caught:
            post(one)
        assert caught.value.retryable
        assert_clean(caught.value, TOKEN.reveal())
        one.close()


@pytest.mark.parametrize("begun", [b"", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nx"])
@pytest.mark.parametrize("options", [{"timeout": 0.1, "read_timeout": 600}, {"timeout": GUARD, "read_timeout": 0.1}])
def test_silence_is_bounded(begun: bytes, options: Any) -> None:
    """A server that is silent before or within its answer is given up at the deadline or the read timeout."""
    with RawServer(after_one_call(lambda sock: sock.sendall(begun) or server.ended.wait(GUARD))) as server:
        one = client(server.url, read_timeout=options["read_timeout"])
        post(one, timeout=GUARD)
        with pytest.raises(TransportError, match="in time") as caught:
            post(one, timeout=options["timeout"])
        assert caught.value.retryable
        assert post(one, timeout=GUARD).body == b"last"
        one.close()


@pytest.mark.parametrize("head", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n"])
def test_a_dripping_answer_is_bounded(head: bytes) -> None:
    """Headers or a body that come byte by byte are given up at the total deadline, though no read is slow."""

    def second(sock: socket.socket) -> None:
        sock.sendall(head or b"HTTP/1.1 200 OK\r\nX-A: ")
        while not server.ended.wait(0.02):
            sock.sendall(b"x")

    with RawServer(after_one_call(second)) as server:
        one = client(server.url, read_timeout=GUARD)
        post(one)
        with pytest.raises(TransportError, match="in time"):
            post(one, timeout=0.3)
        one.close()


@pytest.mark.slow
def test_a_server_that_does_not_read_is_given_up() -> None:
    """A body that nobody takes is no wait without an end."""
    with RawServer(after_one_call(lambda sock: server.ended.wait(GUARD))) as server:
        one = client(server.url, read_timeout=0.1)
        post(one)
        with pytest.raises(TransportError, match="in time"):
            post(one, b"x" * 50_000_000)
        one.close()


def test_an_early_answer_is_read() -> None:
    """A server that answers before it has read a large body, and closes instead of reading on, is heard."""

    def talk(sock: socket.socket, number: int) -> None:
        assert read_request(sock)
        sock.sendall(FIRST)
        sock.recv(10)
        sock.sendall(b"HTTP/1.1 413 No\r\nContent-Length: 2\r\n\r\n{}")

    with RawServer(talk) as server:
        one = client(server.url)
        post(one)
        assert post(one, b"x" * 5_000_000, timeout=GUARD).status == 413
        one.close()


def test_bytes_that_nobody_asked_for_end_a_connection() -> None:
    """What follows an answer must not be taken for the next one."""
    with RawServer(after_one_call(lambda sock: sock.sendall(FIRST + b"HTTP/1.1 200 OK\r\n"))) as server:
        one = client(server.url)
        assert post(one).body == b"first"
        assert post(one).body == b"first"
        assert post(one).body == b"last"
        one.close()
    assert server.accepted == 2


@pytest.mark.parametrize("key", ["a\r\nX-Evil: 1", "a\nb", "é", "\x00"])
def test_a_header_that_cannot_be_sent(key: str) -> None:
    """A value that would end its line is refused as over a new connection, and nothing of it is sent."""
    with WebServer(lambda request: Answer(200, {})) as server:
        one = client(server.url)
        outcomes = []
        for known in (False, True):
            if known:
                post(one)
            try:
                outcomes.append((post(one, idempotency_key=key).status, ""))
            except SekuireError as error:
                outcomes.append((0, str(error)))
        assert post(one).status == 200
        one.close()
    assert outcomes[0] == outcomes[1]
    assert not any("X-Evil" in request.headers for request in server.requests)


@pytest.mark.parametrize("target", ["/a b", "//a", "a", "", "/é", "/a\r\nX: y", "/a/../b", "/.", "/a#b", "/a<b"])
def test_targets_that_urllib3_must_encode(target: str) -> None:
    """Only what needs no encoding, and no thought, goes out as it is."""
    assert not kept.is_plain_target(target)
    assert kept.is_plain_target("/api/v1/tasks/a%20b~.:c/complete?x=1&y=,")


def test_tls_connections_are_kept(certificates: Certificates) -> None:
    """Many calls over TLS use one connection, short answers and long ones."""
    sizes = iter([1, 2, 200_000, 3])

    def answer(request: Any) -> Answer:
        return Answer(200, b"x" * next(sizes))

    with WebServer(answer, certificates.server_context()) as server:
        one = client(server.url, verify=certificates.ca)
        assert [len(post(one).body) for _ in range(4)] == [1, 2, 200_000, 3]
        one.close()
    assert server.connections == 1


def test_a_closed_tls_connection_is_replaced(certificates: Certificates) -> None:
    """A kept TLS connection that the server has closed is not used again."""
    with WebServer(
        lambda request: Answer(200, b"x", [("Content-Length", "1")]), certificates.server_context()
    ) as server:
        one = client(server.url, verify=certificates.ca)
        assert post(one).status == 200
        (idle,) = one._lane._idle
        idle._socket.shutdown(socket.SHUT_RDWR)
        assert post(one).status == 200
        one.close()
    assert server.connections == 2


def test_no_descriptor_is_left() -> None:
    """Closing the client closes what it kept, and what a call gives back later is closed at once."""
    before = open_descriptors()
    with WebServer(lambda request: Answer(200, {})) as server:
        one = client(server.url)
        post(one)
        post(one)
        one.close()
        assert not one._lane._idle
        post(one)
        assert not one._lane._idle
        one.close()
    until(lambda: open_descriptors() <= before)


def test_no_more_than_the_limit_is_kept() -> None:
    """A connection for which there is no place is closed."""
    lane = kept.Lane(1)
    closed = []

    class Connection:
        host, port, default_port = "::1", 80, 80

        def __init__(self, name: str) -> None:
            self.name = name

        def close(self) -> None:
            closed.append(self.name)

    pairs = [socket.socketpair() for _ in range(2)]
    for name, (mine, _) in zip("ab", pairs):
        one = kept.Kept(Connection(name), mine, 1.0)
        assert one.host == "[::1]"
        lane.keep(one)
    assert closed == ["b"]
    pairs[0][1].close()
    assert lane.take() is None
    assert closed == ["b", "a"]
    for pair in pairs:
        for sock in pair:
            sock.close()


# -- the short way of reading against http.client's -------------------------------------------------------------------

_VALUES = st.text(st.sampled_from("0123abc, \t=;é\x00\x0b"), max_size=6)
_LINES = st.one_of(
    st.tuples(st.sampled_from(["X-A", "x-a", "Date", "Set-Cookie", "Retry-After", "X A", "", " X", "Ü"]), _VALUES),
    st.tuples(st.sampled_from(["Content-Length", "content-length"]), st.sampled_from(["0", "3", "4", "-1", "", "3,3"])),
    st.tuples(
        st.sampled_from(["Connection", "Transfer-Encoding", "Content-Encoding"]),
        st.sampled_from(["close", "keep-alive", "chunked", "gzip", "identity"]),
    ),
)  # fmt: skip
_START = st.sampled_from(
    ["HTTP/1.1 200 OK", "HTTP/1.1 200", "HTTP/1.1 404 x y", "HTTP/1.1 2000", "HTTP/1.1 99 x", "HTTP/1.1 204 x",
     "HTTP/1.0 200 OK", "HTTP/1.1  200 OK", "HTTP/1.1 100 x", "http/1.1 200 OK", "HTTP/1.12 00 OK"]
)  # fmt: skip


@given(_START, st.lists(_LINES, max_size=4), st.sampled_from([": ", ":", " : ", " "]),
       st.sampled_from(["\r\n", "\n", "\r"]), st.binary(max_size=4))  # fmt: skip
def test_the_short_way_reads_what_http_client_reads(
    start: str, lines: List[Tuple[str, str]], colon: str, end: str, body: bytes
) -> None:
    """Whatever is taken on the short way, http.client reads alike, keeping the connection; the rest is left to it."""
    text = start + "\r\n" + "".join(f"{name}{colon}{value}{end}" for name, value in lines) + "\r\n"
    data = text.encode("latin-1") + body
    simple = kept._read_simple(data)
    if simple is None:
        return

    class Sock:
        def makefile(self, mode: str) -> io.BytesIO:
            return io.BytesIO(data)

    response = http.client.HTTPResponse(Sock(), method="POST")  # type: ignore[arg-type]
    response.begin()
    assert (response.status, response.read()) == (simple.status, simple.body)
    assert not response.will_close
    assert {name.lower(): value for name, value in response.headers.items()} == dict(simple.headers)


def test_the_short_way_is_taken() -> None:
    """The answer that a platform gives is read without http.client."""
    data = (
        b"HTTP/1.1 200 OK\r\nServer: x\r\nDate: Tue, 01 Jul 2025 00:00:00 GMT\r\nContent-Type: application/json\r\n"
        b'Content-Length: 21\r\n\r\n{"status":"accepted"}'
    )
    simple = kept._read_simple(data)
    assert simple is not None
    assert (simple.status, simple.body) == (200, b'{"status":"accepted"}')
    assert simple.headers["DATE"].startswith("Tue")
    assert kept._read_simple(data[:-1]) is None
    assert kept._read_simple(data + b"x") is None
    assert len(simple.body) <= MAX_ANSWER


def test_a_proxy_stays_between() -> None:
    """Calls through a proxy are requests' own, the second as the first: each names the whole URL to the proxy."""
    with WebServer(lambda request: Answer(200, {"via": "proxy"})) as proxy:
        one = client("http://platform.example", proxies={"http": proxy.url}, allow_insecure_http=True)
        assert [post(one).json() for _ in range(2)] == [{"via": "proxy"}] * 2
        one.close()
    assert [request.path for request in proxy.requests] == ["http://platform.example/x"] * 2
