"""A live answer over real sockets: read as it arrives, ended at once by another thread, leaving nothing behind."""

from __future__ import annotations

import functools
import socket
import threading
from typing import Any, Callable, Iterator, List, Optional

import pytest

from sekuire.config import ConnectionConfig
from sekuire.errors import TransportError
from sekuire.secret import Secret
from sekuire.transport.live import LiveAnswer, LiveClient, Waker
from sekuire.wire import protocol

from ..support.servers import (
    Answer,
    Certificates,
    RawServer,
    WebServer,
    assert_clean,
    open_descriptors,
    read_request,
    refusing_url,
)
from ..support.waiting import GUARD, until

TOKEN = Secret("skr_do_not_show_me")
BEARER = functools.partial(protocol.bearer, TOKEN)
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
Make = Callable[..., LiveClient]


@pytest.fixture
def live() -> Iterator[Make]:
    made: List[LiveClient] = []

    def make(url: str, **options: Any) -> LiveClient:
        config = ConnectionConfig(api_base_url=url, proxies={}, **{"read_timeout": GUARD, **options})
        made.append(LiveClient(config))
        return made[-1]

    yield make
    for one in made:
        one.close()


def open_stream(client: LiveClient) -> LiveAnswer:
    return client.open("/stream", credential=BEARER, headers={"Last-Event-ID": "é".encode()})


class Reader(threading.Thread):
    """Opens a stream and reads it to its end on a thread of its own."""

    def __init__(self, client: LiveClient, idle_timeout: float = GUARD) -> None:
        super().__init__(daemon=True)
        self.pieces: List[bytes] = []
        self.error: Optional[BaseException] = None
        self.got = threading.Event()
        self._client = client
        self._idle_timeout = idle_timeout
        self.start()

    def run(self) -> None:
        try:
            answer = open_stream(self._client)
            try:
                for piece in answer.chunks(self._idle_timeout):
                    self.pieces.append(piece)
                    self.got.set()
            finally:
                answer.close()
        except TransportError as error:
            self.error = error

    def finish(self) -> None:
        self.join(GUARD)
        assert not self.is_alive()


def streaming(server: Callable[[], RawServer], started: threading.Event, head: bytes = HEAD) -> Any:
    """Sends one event and then nothing until the server ends."""

    def talk(sock: socket.socket, number: int) -> None:
        read_request(sock)
        sock.sendall(head + b"\r\n: hello\n\n")
        started.set()
        server().ended.wait(GUARD)

    return talk


# -- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("framing", ["chunked", "length", "close"])
def test_pieces_arrive_at_once(framing: str, live: Make) -> None:
    """However the answer is framed, a piece is given as soon as it has been sent: the next waits for it to be read."""
    read = threading.Event()
    heads = {"chunked": b"Transfer-Encoding: chunked\r\n", "length": b"Content-Length: 9\r\n", "close": b""}

    def talk(sock: socket.socket, number: int) -> None:
        request = read_request(sock).lower()
        assert b"accept: text/event-stream\r\n" in request
        assert b"accept-encoding: identity\r\n" in request
        assert "last-event-id: é\r\n".encode() in request
        sock.sendall(HEAD + heads[framing] + b"\r\n")
        for piece in (b"one", b"two", b"end"):
            sock.sendall(b"3\r\n" + piece + b"\r\n" if framing == "chunked" else piece)
            if not read.wait(GUARD):
                return
            read.clear()
        if framing == "chunked":
            sock.sendall(b"0\r\n\r\n")

    with RawServer(talk) as server:
        answer = open_stream(live(server.url))
        assert answer.status == 200
        assert answer.headers["content-type"] == "text/event-stream"
        got = []
        for piece in answer.chunks(GUARD):
            got.append(piece)
            read.set()
        answer.close()
    assert got == [b"one", b"two", b"end"]


def test_silence_is_noticed(live: Make) -> None:
    """A stream on which nothing comes for the idle timeout is an error that says so and may pass."""
    started = threading.Event()
    with RawServer(streaming(lambda: server, started)) as server:
        answer = open_stream(live(server.url))
        pieces = answer.chunks(0.05)
        assert next(pieces) == b": hello\n\n"
        with pytest.raises(TransportError, match=r"was silent for 0\.05 s") as caught:
            next(pieces)
        answer.close()
    assert caught.value.retryable
    assert_clean(caught.value, TOKEN.reveal())


@pytest.mark.parametrize(
    "rest",
    [
        b"Content-Length: 9\r\n\r\nabc",
        b"Transfer-Encoding: chunked\r\n\r\n9\r\nabc",
        b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n",
        b"Content-Encoding: br\r\n\r\nabc",
        b"Content-Encoding: gzip\r\n\r\nabc",
    ],
)
def test_broken_streams(rest: bytes, live: Make) -> None:
    """A stream that is cut or cannot be decoded ends with an error, with what came before given first."""

    def talk(sock: socket.socket, number: int) -> None:
        read_request(sock)
        sock.sendall(HEAD + rest)

    with RawServer(talk) as server:
        answer = open_stream(live(server.url))
        with pytest.raises(TransportError) as caught:
            list(answer.chunks(GUARD))
        answer.close()
    assert caught.value.retryable
    assert_clean(caught.value, TOKEN.reveal())


def test_what_an_error_says(live: Make) -> None:
    """The body of an answer that is no stream can be read, without our token, and only up to its bounds."""
    bodies = [b'{"message": "no: Bearer skr_do_not_show_me"}', b"x" * 70_000]
    with WebServer(lambda request: Answer(403, bodies[int(request.headers["Last-Event-ID"])])) as server:
        client = live(server.url)
        for number, expected in enumerate([b'{"message": "no: Bearer ***"}', b""]):
            answer = client.open("/stream", credential=BEARER, headers={"Last-Event-ID": str(number)})
            assert answer.status == 403
            assert answer.body == expected
            answer.close()
        # The token of another object of this process.
        answer = client.open("/stream", credential=None, headers={"Last-Event-ID": "0"})
        assert answer.body == b'{"message": "no: Bearer ***"}'
        answer.close()


def test_a_dripping_error_is_bounded(live: Make) -> None:
    """The body of an error that comes byte by byte is given up at the read timeout."""

    def talk(sock: socket.socket, number: int) -> None:
        read_request(sock)
        sock.sendall(b"HTTP/1.1 503 Busy\r\nContent-Length: 1000000\r\n\r\n")
        while not server.ended.wait(0.02):
            sock.sendall(b"x")

    with RawServer(talk) as server:
        answer = open_stream(live(server.url, read_timeout=0.3))
        assert answer.body == b""
        answer.close()


def test_no_stream_at_all(live: Make) -> None:
    """A refused connection, a broken answer and silence are errors that hold no token."""
    with refusing_url() as url:
        with pytest.raises(TransportError, match="Connection refused") as caught:
            open_stream(live(url))
    assert_clean(caught.value, TOKEN.reveal())

    def talk(sock: socket.socket, number: int) -> None:
        read_request(sock)
        if number == 0:
            sock.sendall(b"nonsense\r\n\r\n")
        else:
            server.ended.wait(GUARD)

    with RawServer(talk) as server:
        client = live(server.url, read_timeout=0.1)
        for _ in range(2):
            with pytest.raises(TransportError) as caught:
                open_stream(client)
            assert caught.value.retryable
            assert_clean(caught.value, TOKEN.reveal())


def test_redirects_are_not_followed(live: Make) -> None:
    """A redirect of the stream is an answer; the token does not reach the other host."""
    with (
        WebServer(lambda request: Answer(200)) as other,
        WebServer(lambda request: Answer(307, b"", [("Location", other.url)])) as server,
    ):
        answer = open_stream(live(server.url))
        assert answer.status == 307
        answer.close()
    assert other.requests == []


def test_streams_over_tls(certificates: Certificates, live: Make) -> None:
    """A stream over TLS is read the same way; an unknown certificate is refused for good."""
    with WebServer(lambda request: Answer(200, b"data: x\n\n"), certificates.server_context()) as server:
        answer = open_stream(live(server.url, verify=certificates.ca))
        assert b"".join(answer.chunks(GUARD)) == b"data: x\n\n"
        answer.close()
        with pytest.raises(TransportError, match="certificate") as caught:
            open_stream(live(server.url))
    assert not caught.value.retryable


def test_a_stream_through_a_proxy() -> None:
    """A stream through a proxy is wakeable too."""
    started = threading.Event()
    with RawServer(streaming(lambda: server, started)) as server:
        config = ConnectionConfig(
            api_base_url="http://platform.test", allow_insecure_http=True, proxies={"http": server.url}
        )
        client = LiveClient(config)
        reader = Reader(client, idle_timeout=600)
        assert reader.got.wait(GUARD)
        client.wake()
        reader.finish()
        client.close()
    assert reader.pieces == [b": hello\n\n"]


def test_closing_ends_the_connection(live: Make) -> None:
    """A stream that is closed in the middle ends its connection at once, for the server too."""
    left = threading.Event()

    def talk(sock: socket.socket, number: int) -> None:
        read_request(sock)
        sock.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n3\r\none\r\n")
        if sock.recv(1) == b"":
            left.set()

    with RawServer(talk) as server:
        answer = open_stream(live(server.url))
        assert next(answer.chunks(GUARD)) == b"one"
        answer.close()
        assert left.wait(GUARD)


# -- waking -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", [HEAD, HEAD + b"Content-Length: 100\r\n"], ids=["close", "length"])
def test_wake_ends_a_blocked_read(head: bytes, live: Make) -> None:
    """wake() from another thread ends a read that would wait for minutes; what had come was given."""
    started = threading.Event()
    with RawServer(streaming(lambda: server, started, head)) as server:
        client = live(server.url)
        reader = Reader(client, idle_timeout=600)
        assert reader.got.wait(GUARD)
        client.wake()
        reader.finish()
    assert reader.pieces == [b": hello\n\n"]


def test_wake_ends_a_wait_for_headers(live: Make) -> None:
    """wake() ends a request that is not answered."""
    asked = threading.Event()

    def talk(sock: socket.socket, number: int) -> None:
        read_request(sock)
        asked.set()
        server.ended.wait(GUARD)

    with RawServer(talk) as server:
        client = live(server.url, read_timeout=600)
        reader = Reader(client)
        assert asked.wait(GUARD)
        client.wake()
        reader.finish()
    assert reader.error is not None
    assert_clean(reader.error, TOKEN.reveal())


def test_wake_ends_a_stalled_handshake(live: Make) -> None:
    """wake() ends a TLS handshake that the server does not go on with."""
    greeted = threading.Event()

    def talk(sock: socket.socket, number: int) -> None:
        sock.recv(65536)
        greeted.set()
        server.ended.wait(GUARD)

    with RawServer(talk) as server:
        client = live(server.url.replace("http:", "https:"), connect_timeout=600, read_timeout=600)
        reader = Reader(client)
        assert greeted.wait(GUARD)
        client.wake()
        reader.finish()
    assert reader.error is not None


def test_wake_ends_a_read_over_tls(certificates: Certificates, live: Make) -> None:
    """wake() ends a blocked read of a stream over TLS."""
    context = certificates.server_context()
    started = threading.Event()

    def talk(sock: socket.socket, number: int) -> None:
        with context.wrap_socket(sock, server_side=True) as wrapped:
            streaming(lambda: server, started)(wrapped, number)

    with RawServer(talk) as server:
        client = live(server.url.replace("http:", "https:"), verify=certificates.ca)
        reader = Reader(client, idle_timeout=600)
        assert reader.got.wait(GUARD)
        client.wake()
        reader.finish()
    assert reader.pieces == [b": hello\n\n"]


def test_wake_before_open(live: Make) -> None:
    """After wake() nothing can be opened any more: each connection ends as soon as it is made."""
    with RawServer(streaming(lambda: server, threading.Event())) as server:
        client = live(server.url, read_timeout=600)
        client.wake()
        client.wake()
        for _ in range(2):
            with pytest.raises(TransportError):
                open_stream(client)


def test_wake_at_any_moment(live: Make) -> None:
    """Whenever wake() comes, before, during or after the connect, the reader ends."""
    with RawServer(streaming(lambda: server, threading.Event())) as server:
        for round_ in range(60):
            client = live(server.url, read_timeout=600)
            reader = Reader(client, idle_timeout=600)
            for _ in range(round_ * 50):
                pass
            client.wake()
            reader.finish()
            client.close()


@pytest.mark.parametrize("how", ["read", "woken", "refused", "handshake"])
def test_nothing_is_left_open(how: str, certificates: Certificates) -> None:
    """After many rounds of streams that ended, were woken or never came, no descriptor is left open."""

    def talk(sock: socket.socket, number: int) -> None:
        if how == "handshake":
            sock.recv(65536)
            return
        read_request(sock)
        sock.sendall(HEAD + b"\r\n: hello\n\n")
        if how == "woken":
            server.ended.wait(GUARD)

    def round_(url: str) -> None:
        client = LiveClient(ConnectionConfig(api_base_url=url, proxies={}))
        reader = Reader(client)
        if how == "woken":
            assert reader.got.wait(GUARD)
            client.wake()
        reader.finish()
        client.close()

    with RawServer(talk) as server, refusing_url() as nobody:
        url = {"refused": nobody, "handshake": server.url.replace("http:", "https:")}.get(how, server.url)
        round_(url)
        before = open_descriptors()
        for _ in range(30):
            round_(url)
        # The server's own ends of woken connections stay until it closes them.
        served = 30 if how == "woken" else 0
        until(lambda: open_descriptors() <= before + served)


def test_a_waker_keeps_one_copy() -> None:
    """Each new socket replaces the copy of the one before, and detaching or waking closes it."""
    before = open_descriptors()
    waker = Waker()
    pairs = [socket.socketpair() for _ in range(3)]
    for one, _ in pairs:
        waker.attach(one)
        assert open_descriptors() == before + 7
    waker.detach()
    waker.detach()
    assert open_descriptors() == before + 6
    waker.attach(pairs[0][0])
    pairs[0][0].close()
    pairs[0][1].close()
    waker.wake()
    waker.attach(pairs[1][0])
    assert pairs[1][1].recv(1) == b""
    for one, other in pairs:
        one.close()
        other.close()
    waker.detach()
    assert open_descriptors() == before


def test_logs_hold_no_token(live: Make, caplog: pytest.LogCaptureFixture) -> None:
    """At DEBUG, opening a stream shows no token."""
    with caplog.at_level("DEBUG"), WebServer(lambda request: Answer(401)) as server:
        open_stream(live(server.url)).close()
    assert caplog.messages
    assert TOKEN.reveal() not in caplog.text


def test_tls_errors_of_a_live_client_name_the_reason(live: Make) -> None:
    """https to a server that speaks http is told as an error of TLS."""
    with WebServer(lambda request: Answer(200)) as server:
        with pytest.raises(TransportError, match="TLS with"):
            open_stream(live(server.url.replace("http:", "https:")))
