"""Connections: which address they try, answers that stay in step with their requests, and what dies together."""

from __future__ import annotations

import functools
import os
import socket
import ssl
import threading
from typing import Any, Callable, Dict, Iterator, List, Tuple

import pytest

from sekuire.config import ConnectionConfig
from sekuire.errors import TransportError
from sekuire.secret import Secret
from sekuire.transport import connections, kept
from sekuire.transport.http import HttpClient, Reply, make_idempotency_key
from sekuire.transport.live import LiveClient
from sekuire.wire import protocol

from ..support.servers import Answer, Certificates, RawServer, WebServer, read_request, run_python
from ..support.waiting import GUARD

TOKEN = Secret("skr_do_not_show_me")
BEARER = functools.partial(protocol.bearer, TOKEN)
Make = Callable[..., HttpClient]

#: Over which connection a call goes: a new one, a kept one, one of urllib3's behind a proxy.
ROADS = ("new", "kept", "proxy")


def answer_of(body: bytes, more: bytes = b"") -> bytes:
    return b"HTTP/1.1 200 OK\r\n%sContent-Length: %d\r\n\r\n%s" % (more, len(body), body)


@pytest.fixture
def make() -> Iterator[Make]:
    made: List[HttpClient] = []

    def client(url: str, road: str = "new", **options: Any) -> HttpClient:
        if road == "proxy":
            options.update(proxies={"http": url}, allow_insecure_http=True)
            url = "http://platform.example"
        made.append(HttpClient(ConnectionConfig(api_base_url=url, **options), pool_size=32))
        return made[-1]

    yield client
    for one in made:
        one.close()


def call(one: HttpClient, method: str = "POST", **options: Any) -> Reply:
    return one.request(method, "/x", credential=BEARER, **{"timeout": GUARD, **options})


def after(road: str, second: Callable[[socket.socket], Any]) -> Callable[[socket.socket, int], None]:
    """A server whose first connection does ``second`` with the call that goes over ``road``; later ones answer."""

    def talk(sock: socket.socket, number: int) -> None:
        if number == 0:
            if road != "new":
                read_request(sock)
                sock.sendall(answer_of(b"first"))
            read_request(sock)
            second(sock)
        while read_request(sock):
            sock.sendall(answer_of(b"last"))

    return talk


def begin(one: HttpClient, road: str) -> None:
    """Make the call whose connection the next one reuses."""
    if road != "new":
        assert call(one).body == b"first"


# -- answers in step --------------------------------------------------------------------------------------------------

INTERIM = {
    "102": b"HTTP/1.1 102 Processing\r\n\r\n",
    "103 with headers": b"HTTP/1.1 103 Early Hints\r\nLink: </x>; rel=preload\r\nContent-Length: 7\r\n\r\n",
    "several": b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 199 What\r\nA: b\r\n\r\n",
    "bare line feeds": b"HTTP/1.1 103 Early Hints\nLink: x\n\n",
}


@pytest.mark.parametrize("is_split", [False, True])
@pytest.mark.parametrize("interim", INTERIM.values(), ids=INTERIM)
@pytest.mark.parametrize("road", ROADS)
def test_interim_answers_are_read_past(road: str, interim: bytes, is_split: bool, make: Make) -> None:
    """The final answer is the answer, and the connection stays in step: the next call gets its own."""

    def second(sock: socket.socket) -> None:
        final = answer_of(b"final", b"X-A: b\r\n")
        if is_split:
            sock.sendall(interim)
            sock.sendall(final)
        else:
            sock.sendall(interim + final)

    with RawServer(after(road, second)) as server:
        one = make(server.url, road)
        begin(one, road)
        reply = call(one)
        assert (reply.status, reply.body, reply.headers.get("Link"), reply.headers.get("X-A")) == (
            200, b"final", None, "b"
        )  # fmt: skip
        assert call(one).body == b"last"
        assert server.accepted == 1


@pytest.mark.parametrize("interim", INTERIM.values(), ids=INTERIM)
def test_interim_answers_before_a_stream(interim: bytes) -> None:
    """The stream is the final answer too."""

    def talk(sock: socket.socket, number: int) -> None:
        read_request(sock)
        sock.sendall(interim + b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\nevent")

    with RawServer(talk) as server:
        live = LiveClient(ConnectionConfig(api_base_url=server.url))
        answer = live.open("/stream", credential=BEARER, headers={})
        assert (answer.status, answer.headers["Content-Type"]) == (200, "text/event-stream")
        assert b"".join(answer.chunks(GUARD)) == b"event"
        answer.close()
        live.close()


DRIPPING = {"interim answers": INTERIM["102"], "a head": b"X", "an endless interim head": b"HTTP/1.1 102 X\r\nA: b\r\n"}


@pytest.mark.parametrize("piece", DRIPPING.values(), ids=DRIPPING)
@pytest.mark.parametrize("road", [*ROADS, "stream"])
def test_a_head_that_never_ends_is_bounded(road: str, piece: bytes, make: Make) -> None:
    """Interim answers without a final one, or a head in drops, end at the time limit, though no read is slow."""

    def drip(sock: socket.socket) -> None:
        sock.sendall(piece if piece != b"X" else b"HTTP/1.1 200 OK\r\nX-A: ")
        while not server.ended.wait(0.02):
            sock.sendall(piece if not piece.endswith(b"A: b\r\n") else b"x")

    with RawServer(after("new" if road == "stream" else road, drip)) as server:
        if road == "stream":
            live = LiveClient(ConnectionConfig(api_base_url=server.url, read_timeout=0.3))
            with pytest.raises(TransportError, match="in time"):
                live.open("/stream", credential=BEARER, headers={})
            live.close()
            return
        one = make(server.url, road, read_timeout=GUARD)
        begin(one, road)
        with pytest.raises(TransportError, match="in time"):
            call(one, timeout=0.3)


def test_an_interim_answer_with_a_huge_head(make: Make) -> None:
    """It is an error that may pass, not one that is read for as long as it goes on."""
    for head in (b"A: b\r\n" * 200, b"A: " + b"b" * 70000 + b"\r\n"):
        flood = b"HTTP/1.1 102 Processing\r\n" + head + b"\r\n" + answer_of(b"final")
        with RawServer(after("new", lambda sock, flood=flood: sock.sendall(flood))) as server:  # type: ignore[misc]
            with pytest.raises(TransportError) as caught:
                call(make(server.url))
            assert caught.value.retryable


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nfirst\r\n0\r\n\r\n"
OUT_OF_STEP = {
    "bytes beyond the answer": answer_of(b"first") + answer_of(b"stray"),
    "bytes beyond a chunked answer": CHUNKED + b"stray",
    "another protocol": b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n",
    "another protocol that begins": b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n\0\0",
}


@pytest.mark.parametrize("data", OUT_OF_STEP.values(), ids=OUT_OF_STEP)
@pytest.mark.parametrize("road", ROADS)
def test_a_connection_out_of_step_is_not_used_again(road: str, data: bytes, make: Make) -> None:
    """An answer that is below 200, or left bytes, is the last on its connection."""
    with RawServer(after(road, lambda sock: sock.sendall(data))) as server:
        one = make(server.url, road)
        begin(one, road)
        reply = call(one)
        assert (reply.status, reply.body) in [(200, b"first"), (101, b"")]
        assert call(one).body == b"last"
        assert server.accepted == 2


@pytest.mark.parametrize("road", ["new", "kept"])
def test_bytes_that_tls_holds_back_are_noticed(road: str, certificates: Certificates, make: Make) -> None:
    """Bytes beyond an answer, in its last TLS record, are not visible to a look at the socket."""
    context = certificates.server_context()

    def second(sock: socket.socket) -> None:
        # The end of the answer is read by its exact length, which leaves the rest of its record to TLS.
        sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 20005\r\n\r\n")
        sock.sendall(b"x" * 10000)
        sock.sendall(b"x" * 10005 + b"stray")

    turns = after(road, second)

    def talk(sock: socket.socket, number: int) -> None:
        with context.wrap_socket(sock, server_side=True) as wrapped:
            turns(wrapped, number)

    with RawServer(talk) as server:
        one = make(f"https://127.0.0.1:{server.port}", verify=certificates.ca)
        begin(one, road)
        assert len(call(one).body) == 20005
        assert call(one).body == b"last"
        assert server.accepted == 2


# -- a request that a reused connection lost --------------------------------------------------------------------------


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
    sock.close()


@pytest.mark.parametrize("end", [reset, socket.socket.close])
@pytest.mark.parametrize("body", [b"{}", b"x" * 300_000])
@pytest.mark.parametrize("road", ["kept", "proxy"])
def test_a_request_that_a_reused_connection_lost(
    road: str, body: bytes, end: Callable[[socket.socket], None], make: Make
) -> None:
    """A request whose connection ends before any byte of its answer is sent once more, the same, over a new one."""
    seen: List[bytes] = []

    def talk(sock: socket.socket, number: int) -> None:
        while request := read_request(sock):
            seen.append(request)
            if len(seen) == 2:
                end(sock)
                return
            sock.sendall(answer_of(b"answer %d" % number))

    with RawServer(talk) as server:
        one = make(server.url, road)
        assert call(one).body == b"answer 0"
        assert call(one, body=body).body == b"answer 1"
        assert server.accepted == 2
    assert seen[1] == seen[2]
    assert b"Idempotency-Key: " in seen[1]


@pytest.mark.parametrize("road", ["kept", "proxy"])
def test_a_request_is_sent_once_more_at_most(road: str, make: Make) -> None:
    """A new connection that ends too is an error for the caller."""
    seen: List[int] = []

    def talk(sock: socket.socket, number: int) -> None:
        while read_request(sock):
            seen.append(number)
            if len(seen) > 1:
                return
            sock.sendall(answer_of(b"first"))

    with RawServer(talk) as server:
        one = make(server.url, road)
        begin(one, road)
        with pytest.raises(TransportError) as caught:
            call(one)
        assert caught.value.retryable
        assert seen == [0, 0, 1]


@pytest.mark.parametrize("begun", [b"", b"H", b"HTTP/1.1 102 Processing\r\n\r\n"])
@pytest.mark.parametrize("is_silent", [False, True])
@pytest.mark.parametrize("road", ROADS)
def test_what_is_not_sent_once_more(road: str, is_silent: bool, begun: bytes, make: Make) -> None:
    """Not after a time limit, not after a byte of an answer, not on a new connection: it may have been accepted."""
    if not is_silent and not begun and road != "new":
        pytest.skip("this is sent once more")

    def second(sock: socket.socket) -> None:
        sock.sendall(begun)
        if is_silent:
            server.ended.wait(GUARD)
        else:
            sock.close()

    with RawServer(after(road, second)) as server:
        one = make(server.url, road, read_timeout=0.2 if is_silent else GUARD)
        begin(one, road)
        with pytest.raises(TransportError):
            call(one)
        assert server.accepted == 1
        assert call(one).body == b"last"


def test_every_post_has_a_key_of_its_own(make: Make) -> None:
    """Each call has another Idempotency-Key, a GET has none, and one that is given stays."""
    with WebServer(lambda request: Answer(200, {})) as server:
        one = make(server.url)
        for _ in range(3):
            call(one)
        call(one, "GET")
        call(one, idempotency_key="k:1")
    keys = [request.headers.get("Idempotency-Key") for request in server.requests]
    assert len({*keys[:3]}) == 3
    assert None not in keys[:3]
    assert keys[3:] == [None, "k:1"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_has_keys_of_its_own() -> None:
    """Two processes never send the same key, whatever they inherited."""
    out = run_python(
        """
        import os
        from sekuire.transport.http import make_idempotency_key
        make_idempotency_key()
        child = os.fork()
        os.write(1, f"{make_idempotency_key()}\\n".encode())
        if not child:
            os._exit(0)
        os.waitpid(child, 0)
        """,
        forks=True,
    ).stdout.split()
    assert len({*out}) == 2
    assert make_idempotency_key() not in out


# -- connections that die together ------------------------------------------------------------------------------------


class Failover:
    """A server whose connections can be left silent, all together; new ones answer."""

    def __init__(self) -> None:
        self.old = 0
        self.lost: List[int] = []
        self._together = threading.Barrier(8)
        self.server = RawServer(self._talk)

    def _talk(self, sock: socket.socket, number: int) -> None:
        request = read_request(sock)
        while request:
            if number < self.old:
                self.lost.append(number)
                self.server.ended.wait(GUARD)
                return
            if b"together" in request:
                self._together.wait(GUARD)
            sock.sendall(answer_of(b"%d" % number))
            request = read_request(sock)

    def call(self, one: HttpClient) -> List[Any]:
        """Have eight calls at once, each over a connection of its own: their answers and errors."""
        results: List[Any] = []

        def run() -> None:
            try:
                results.append(one.request("POST", "/together", timeout=GUARD).body)
            except TransportError as error:
                results.append(error)

        threads = [threading.Thread(target=run, daemon=True) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(GUARD)
        return results


@pytest.mark.parametrize("road", ["kept", "proxy"])
def test_one_dead_connection_empties_the_idle_ones(road: str, make: Make) -> None:
    """After a failover that leaves eight idle connections silent, one call is lost, not one for each of them."""
    failover = Failover()
    with failover.server as server:
        one = make(server.url, road)
        assert len(set(failover.call(one))) == 8
        failover.old = server.accepted
        with pytest.raises(TransportError, match="in time") as caught:
            call(one, timeout=0.3)
        assert caught.value.was_stale
        assert {*failover.call(one)} == {b"%d" % number for number in range(8, 16)}
        assert len(failover.lost) == 1


def test_a_slow_answer_is_no_dead_connection(make: Make) -> None:
    """A time limit that ends on a new connection says nothing of the kept ones."""
    with RawServer(after("new", lambda sock: server.ended.wait(GUARD))) as server:
        with pytest.raises(TransportError, match="in time") as caught:
            call(make(server.url), timeout=0.3)
        assert not caught.value.was_stale


# -- addresses --------------------------------------------------------------------------------------------------------


@pytest.fixture
def dead() -> Iterator[List[Tuple[str, int]]]:
    """Two addresses that let every connect hang."""
    listeners, fillers, addresses = [], [], []
    for host in ("127.0.0.1", "127.0.0.2"):
        listener = socket.socket()
        listener.bind((host, 0))
        listener.listen(0)
        listeners.append(listener)
        addresses.append(listener.getsockname())
        for _ in range(4):
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(addresses[-1])
            fillers.append(filler)
    yield addresses
    for sock in (*listeners, *fillers):
        sock.close()


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Dict[str, List[Any]]:
    """What names resolve to: addresses as ``getsockname`` gives them."""
    known: Dict[str, List[Any]] = {}
    ask = socket.getaddrinfo

    def resolve(host: Any, port: Any, *args: Any, **options: Any) -> Any:
        if host not in known:
            return ask(host, port, *args, **options)
        return [
            (socket.AF_INET if len(address) == 2 else socket.AF_INET6, socket.SOCK_STREAM, 6, "", address)
            for address in known[host]
        ]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(connections, "_worked", {})
    return known


#: An address of no network, to which connects fail at once or never.
NOWHERE = ("2001:db8::1", 9, 0, 0)


@pytest.mark.parametrize("kind", ["call", "stream"])
def test_dead_addresses_before_the_living_one(
    kind: str, make: Make, dead: List[Any], names: Dict[str, List[Any]]
) -> None:
    """The living address of a name is found beside dead ones, within the connect timeout, and tried first next time."""
    with WebServer(lambda request: Answer(200, b"x")) as server:
        living = ("127.0.0.1", server.port)
        names["platform.example"] = [*dead, NOWHERE, living]
        # Each dead one would take all of the time.
        options = {"allow_insecure_http": True, "connect_timeout": GUARD, "read_timeout": GUARD}
        url = f"http://platform.example:{server.port}"
        if kind == "call":
            assert call(make(url, **options), timeout=GUARD).status == 200
        else:
            live = LiveClient(ConnectionConfig(api_base_url=url, **options))
            live.open("/stream", credential=BEARER, headers={}).close()
            live.close()
        assert [one[3] for one in connections._addresses("platform.example", server.port)] == [living, *dead, NOWHERE]
        assert call(make(url, **options), timeout=GUARD).status == 200
        # Gone from the name, it is not tried any more.
        names["platform.example"] = [*dead]
        assert [one[3] for one in connections._addresses("platform.example", server.port)] == dead


def test_addresses_that_all_refuse_or_hang(make: Make, dead: List[Any], names: Dict[str, List[Any]]) -> None:
    """Without a living address the error says what the last one did, within the connect timeout."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        refusing = sock.getsockname()
        for addresses, text in (([refusing, ("127.0.0.3", refusing[1])], "Connection refused"), (dead, "timed out"),
                                ([*dead, refusing], "timed out"), ([], "cannot reach|broke")):  # fmt: skip
            names["platform.example"] = addresses
            one = make("http://platform.example", allow_insecure_http=True, connect_timeout=0.3)
            with pytest.raises(TransportError, match=text) as caught:
                call(one)
            assert caught.value.retryable


def test_the_names_that_are_remembered_are_bounded(names: Dict[str, List[Any]]) -> None:
    """A process that talks to many names does not grow."""
    with WebServer(lambda request: Answer(200, b"x")) as server:
        for number in range(connections._MAX_NAMES + 5):
            names[f"host-{number}"] = [("127.0.0.2", server.port), ("127.0.0.1", server.port)]
            connections.connect(f"host-{number}", server.port, GUARD).close()
    assert 0 < len(connections._worked) <= connections._MAX_NAMES


# -- sockets of other libraries ---------------------------------------------------------------------------------------


def test_whose_socket_it_is(certificates: Certificates, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads go straight to the system only where the socket's own do, whatever ``socket.socket`` is called now."""

    class Green(socket.socket):
        def recv(self, *args: Any) -> bytes:
            return super().recv(*args)

    class Named(socket.socket):
        pass

    with socket.socket() as plain, Green() as green, Named() as named, socket.socket() as inner:
        with ssl.create_default_context().wrap_socket(inner, server_hostname="x", do_handshake_on_connect=False) as tls:
            monkeypatch.setattr(socket, "socket", Green)
            found = [kept._is_systems(one) for one in (plain, named, green, tls, object())]
    assert found == [True, True, False, False, False]


@pytest.mark.parametrize("library", ["gevent", "eventlet"])
def test_an_event_loop_that_patches_sockets(library: str) -> None:
    """Calls over new and kept connections, and the stream, work where another library put its sockets in place."""
    pytest.importorskip(library)
    out = run_python(
        """
        import sys, warnings
        warnings.simplefilter("ignore")
        if sys.argv[1] == "gevent":
            from gevent import monkey
            monkey.patch_all()
        else:
            import eventlet
            eventlet.monkey_patch()
        import http.server, threading
        from sekuire.config import ConnectionConfig
        from sekuire.transport.http import HttpClient
        from sekuire.transport.live import LiveClient

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            def do_GET(self):
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                self.wfile.write(b"HTTP/1.1 200 OK\\r\\nContent-Length: 2\\r\\n\\r\\nok")
            do_POST = do_GET
            def log_message(self, *args):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        config = ConnectionConfig(api_base_url=f"http://127.0.0.1:{server.server_port}")
        one = HttpClient(config)
        print([one.request("POST", "/x", body=b"{}").body.decode() for _ in range(3)], len(one._lane._idle))
        live = LiveClient(config)
        print(b"".join(live.open("/x", credential=None, headers={}).chunks(5.0)))
        one.close()
        live.close()
        """,
        library,
    ).stdout
    assert out.split("\n")[:2] == ["['ok', 'ok', 'ok'] 1", "b'ok'"]
