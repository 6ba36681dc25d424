"""Which proxy is used, calls and streams through each kind of it, and what is said of each failure."""

from __future__ import annotations

import importlib.util
import pathlib
import socket
import threading
import time
import warnings
from typing import Any, Callable, Iterator, List, Optional

import pytest

from sekuire import create_worker
from sekuire.config import ConnectionConfig
from sekuire.errors import ConfigurationError, TransportError
from sekuire.secret import Secret
from sekuire.transport.http import HttpClient, Route
from sekuire.transport.live import LiveClient
from sekuire.transport.proxies import Choice, choose, listed

from ..support.proxies import ConnectProxy, SocksProxy
from ..support.servers import (
    Answer,
    Certificates,
    RawServer,
    Request,
    WebServer,
    assert_clean,
    frames_of,
    open_descriptors,
    read_request,
    refusing_url,
)
from ..support.waiting import GUARD, until

TOKEN = Secret("skr_do_not_show_me")
PASSWORD = "hunter2"
#: Names that nobody can resolve (RFC 6761).
UNKNOWN = "platform.invalid"

needs_pysocks = pytest.mark.skipif(importlib.util.find_spec("socks") is None, reason="needs sekuire[socks]")


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.fixture
def server(certificates: Certificates) -> Iterator[WebServer]:
    """A platform with TLS."""
    with WebServer(ok, certificates.server_context()) as one:
        yield one


def ok(request: Request) -> Answer:
    return Answer(200, {"ok": True})


def client(url: str, proxy: Optional[str], **options: Any) -> HttpClient:
    proxies = {} if proxy is None else {"all": proxy}
    return HttpClient(ConnectionConfig(api_base_url=url, proxies=proxies, allow_insecure_http=True, **options))


def ask(http: HttpClient) -> int:
    return http.request("POST", "/x", credential=lambda: ("Authorization", f"Bearer {TOKEN.reveal()}")).status


def fails(url: str, proxy: Optional[str], **options: Any) -> TransportError:
    """The error of a call, which shows neither the token nor the proxy's password, and leaves nothing open."""
    http = client(url, proxy, **options)
    with pytest.raises(TransportError) as caught:
        ask(http)
    http.close()
    assert_clean(caught.value, TOKEN.reveal(), PASSWORD)
    assert list(frames_of(caught.value))
    return caught.value


def local(server: WebServer) -> str:
    return server.url.replace("127.0.0.1", "localhost")


# -- which one --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("no_proxy", "named", "others"),
    [
        ("*", ["a.test", "10.0.0.1", "fd00::5"], []),
        ("corp", ["corp", "a.corp", "A.CORP", "a.corp."], ["xcorp", "corp.test"]),
        (".corp", ["corp", "a.b.corp"], ["xcorp", "corp.test"]),
        ("*.corp", ["a.corp", "a.b.corp"], ["xcorp", "corp.test"]),
        ("host.test:443", ["host.test", "a.host.test"], ["test"]),
        ("*.corp:443", ["a.corp"], ["b.test"]),
        ("host.test:8443, 10.0.0.1:80", [], ["host.test", "10.0.0.1"]),
        ("a.test b.test,,  c.test", ["a.test", "b.test", "c.test"], ["d.test"]),
        ("10.1.2.3", ["10.1.2.3"], ["10.1.2.30", "110.1.2.3", "a.test"]),
        ("10.1.2.3:443", ["10.1.2.3"], ["10.1.2.4"]),
        ("10.0.0.0/8", ["10.1.2.3", "::ffff:10.1.2.3"], ["11.1.2.3", "10.test"]),
        ("10.1.2.3/8", ["10.9.9.9"], ["11.1.2.3"]),
        ("fd00::5", ["fd00::5", "fd00:0::0:5"], ["fd00::6", "a.test"]),
        ("[fd00::5]", ["fd00::5"], ["fd00::6"]),
        ("[fd00::5]:443", ["fd00::5"], ["fd00::6"]),
        ("[fd00::5]:80", [], ["fd00::5"]),
        ("fd00::/8", ["fd00::5", "fdff::1"], ["fe80::1", "10.0.0.1"]),
        ("[fd00::]/8", [], ["a.test"]),
        ("0.0.0.0/0", ["10.0.0.1"], ["a.test", "fd00::5"]),
        ("", [], ["a.test"]),
        (".,*.,/,:443,10.0.0.0/99", [], ["a.test", "10.0.0.1"]),
    ],
)
def test_no_proxy(no_proxy: str, named: List[str], others: List[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every form of an entry names what it says and nothing else."""
    for host in named:
        assert listed(host, 443, no_proxy), host
    for host in others:
        assert listed(host, 443, no_proxy) is None, host
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.test:3128")
    monkeypatch.setenv("NO_PROXY", no_proxy)
    for host in [*named, *others]:
        choice = choose(f"https://[{host}]" if ":" in host else f"https://{host}", None)
        assert (choice.proxy is None) is (host in named), host
        assert ("NO_PROXY holds" in choice.reason) is (host in named)


def test_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable for the scheme wins over ALL_PROXY; a URL without a scheme is one of HTTP; the source is named."""

    def chosen(url: str = "https://platform.test") -> Choice:
        return choose(url, None)

    assert chosen().proxy is None
    monkeypatch.setenv("ALL_PROXY", "socks://desktop.test:1/")
    monkeypatch.setenv("https_proxy", "proxy.test:3128")
    assert str(chosen().proxy) == "http://proxy.test:3128"
    assert chosen().reason == "https_proxy"
    with pytest.raises(ConfigurationError, match=r"ALL_PROXY: .*socks5h://.*, not with socks://"):
        chosen("http://platform.test")
    monkeypatch.setenv("https_proxy", "")
    monkeypatch.setenv("ALL_PROXY", "HTTPS://[fd00::5]")
    proxy = chosen().proxy
    assert proxy is not None
    assert (str(proxy), proxy.source) == ("https://[fd00::5]:443", "environment variable ALL_PROXY")
    # A platform on this machine has none, nor has one that the option gives none.
    assert chosen("http://localhost:9300").proxy is None
    assert choose("https://platform.test", {}).proxy is None
    assert choose("https://platform.test", {"http": "http://proxy.test"}).proxy is None


def test_the_environment_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is set later changes nothing for a client that exists."""
    monkeypatch.setenv("HTTPS_PROXY", f"http://user:{PASSWORD}@proxy.test:3128")
    route = Route(ConnectionConfig(api_base_url="https://platform.test"))
    monkeypatch.setenv("HTTPS_PROXY", "http://other.test:1")
    assert str(route.proxy) == "http://proxy.test:3128"
    assert PASSWORD not in repr(route.proxy) + str(route.proxy) + repr(route)


@pytest.mark.parametrize(
    "url",
    [
        f"ftp://user:{PASSWORD}@proxy.test",
        f"http://user:{PASSWORD}/x@proxy.test:3128",
        f"http://user:{PASSWORD}#@proxy.test:3128",
        f"http://user:1?{PASSWORD}@proxy.test:3128",
        f"http://user:{PASSWORD}@proxy.test:port",
        f"http://user:{PASSWORD}@proxy.test:99999",
        f"http://user:{PASSWORD}@:3128",
        f"http://user:{PASSWORD}@fd00::5:3128",
        f"http://user:{PASSWORD}@a proxy:3128",
        f"http://user:{PASSWORD}@{'a' * 64}.test:3128",
        "http://",
    ],
)
def test_a_url_that_cannot_be_used(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused at construction, its source named and nothing of it shown."""
    with pytest.raises(ConfigurationError, match=r"^proxies: ") as caught:
        client("https://platform.test", url)
    monkeypatch.setenv("HTTPS_PROXY", url)
    with pytest.raises(ConfigurationError, match=r"^environment variable HTTPS_PROXY: ") as found:
        create_worker(agent_id="agent-1", api_base_url="https://platform.test", install_token="skt_x")
    for error in (caught.value, found.value):
        assert PASSWORD not in str(error) + repr(error)


def test_socks_without_pysocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without PySocks a SOCKS proxy is refused at construction, with what to install. Other proxies need none."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for scheme in ("socks5", "socks5h", "socks4", "socks4a", "SOCKS5"):
        with pytest.raises(ConfigurationError, match=r"pip install 'sekuire\[socks\]'"):
            create_worker(
                agent_id="agent-1",
                api_base_url="https://platform.test",
                install_token="skt_x",
                proxies={"https": f"{scheme}://user:{PASSWORD}@proxy.test"},
            )
    client("https://platform.test", "https://proxy.test").close()


@needs_pysocks
def test_a_login_that_socks_cannot_send() -> None:
    """SOCKS5 needs both parts of a login, and PySocks sends short ones only."""
    for login in ("user", f":{PASSWORD}", f"user:{PASSWORD * 30}"):
        with pytest.raises(ConfigurationError) as caught:
            client("https://platform.test", f"socks5h://{login}@proxy.test")
        assert PASSWORD not in str(caught.value)


# -- SOCKS ------------------------------------------------------------------------------------------------------------


@needs_pysocks
@pytest.mark.parametrize(
    ("scheme", "host"),
    [("socks5", "127.0.0.1"), ("socks5h", "localhost"), ("socks4", "127.0.0.1"), ("socks4a", "localhost")],
)
def test_calls_through_socks(scheme: str, host: str, certificates: Certificates, server: WebServer) -> None:
    """Each kind leads to the platform and its TLS, resolves the name where it says, and keeps the connection."""
    before = open_descriptors()
    with SocksProxy(server.port) as proxy:
        http = client(local(server), proxy.url_of(scheme), verify=certificates.ca)
        assert [ask(http) for _ in range(3)] == [200] * 3
        http.close()
    # A name may stand for an IPv6 address here.
    assert proxy.targets in ([(host, server.port)], [("::1", server.port)])
    assert (server.connections, proxy.accepted) == (1, 1)
    until(lambda: open_descriptors() <= before)


@needs_pysocks
def test_a_login_with_socks(certificates: Certificates, server: WebServer) -> None:
    """User and password are decoded from the URL; a missing or wrong one is said, and not shown."""
    with SocksProxy(server.port, login=("us:er", f"{PASSWORD}/é")) as proxy:
        http = client(local(server), proxy.url_of("socks5h", f"us%3Aer:{PASSWORD}%2F%C3%A9@"), verify=certificates.ca)
        assert ask(http) == 200
        http.close()
        wrong = fails(local(server), proxy.url_of("socks5h", f"other:{PASSWORD}@"))
        assert f"the proxy socks5h://127.0.0.1:{proxy.port} rejected its user and password; check" in str(wrong)
        missing = fails(local(server), proxy.url_of("socks5"))
        assert "asks for a user and a password; write them into the option proxies" in str(missing)
        assert wrong.retryable
        assert missing.retryable


@needs_pysocks
def test_http_through_socks() -> None:
    """Without TLS too: the platform gets the path, not the whole URL, and the connection is kept."""
    with WebServer(ok) as server, SocksProxy(server.port) as proxy:
        http = client(f"http://{UNKNOWN}:{server.port}", proxy.url_of("socks5h"))
        assert [ask(http) for _ in range(3)] == [200] * 3
        http.close()
    assert [request.path for request in server.requests] == ["/x"] * 3
    assert (proxy.targets, proxy.accepted) == ([(UNKNOWN, server.port)], 1)


@needs_pysocks
@pytest.mark.parametrize(
    ("scheme", "code", "text"),
    [
        ("socks5h", 1, "cannot connect to platform.invalid:443 (General SOCKS server failure); check api_base_url"),
        ("socks5h", 2, "does not allow connections to platform.invalid:443 (SOCKS code 2); have them allowed"),
        ("socks5h", 3, "cannot connect to platform.invalid:443 (Network unreachable)"),
        ("socks5h", 4, "cannot connect to platform.invalid:443 (Host unreachable)"),
        ("socks5h", 5, "was refused a connection to platform.invalid:443; check api_base_url"),
        ("socks5h", 99, "cannot connect to platform.invalid:443 (Unknown error)"),
        ("socks4a", 0x5B, "cannot connect to platform.invalid:443 (Request rejected or failed)"),
    ],
)
def test_what_a_socks_proxy_says(scheme: str, code: int, text: str) -> None:
    """Each code is said in words, with the proxy and the target."""
    with SocksProxy(9, code=code) as proxy:
        error = fails(f"https://{UNKNOWN}", proxy.url_of(scheme))
    assert f"cannot reach {UNKNOWN}: the proxy {scheme}://127.0.0.1:{proxy.port} {text}" in str(error)
    assert error.retryable


@needs_pysocks
@pytest.mark.parametrize("scheme", ["socks5", "socks4"])
def test_a_name_that_is_not_known_here(scheme: str) -> None:
    """Where this machine resolves the name, the failure says so, and how to leave it to the proxy."""
    with SocksProxy(9) as proxy:
        error = fails(f"https://{UNKNOWN}", proxy.url_of(scheme))
    assert f"the name of {UNKNOWN}:443 cannot be resolved on this machine" in str(error)
    assert "socks5h://" in str(error)


@needs_pysocks
def test_a_socks_url_for_another_server() -> None:
    """A server that is not a SOCKS proxy is named, whether it answers something else, nothing, or closes."""

    def http_error(sock: socket.socket, number: int) -> None:
        sock.recv(1)
        sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    with RawServer(http_error) as other:
        error = fails(f"https://{UNKNOWN}", f"socks5h://127.0.0.1:{other.port}")
    assert "did not answer in SOCKS; check in the option proxies that it is a SOCKS proxy" in str(error)
    with RawServer(lambda sock, number: None) as other:
        error = fails(f"https://{UNKNOWN}", f"socks4a://127.0.0.1:{other.port}")
    assert "broke the connection; check in the option proxies" in str(error)
    with RawServer(lambda sock, number: other.ended.wait(GUARD) and None) as other:
        error = fails(f"https://{UNKNOWN}", f"socks5://127.0.0.1:{other.port}", connect_timeout=0.2)
    assert f"did not connect to {UNKNOWN}:443 in time; check that it is a SOCKS proxy" in str(error)


@needs_pysocks
def test_a_socks_proxy_that_drips_is_limited() -> None:
    """The negotiation ends within the connect timeout, however its bytes come."""

    def drip(sock: socket.socket, number: int) -> None:
        sock.recv(65536)
        sock.sendall(b"\x05")
        time.sleep(0.3)
        sock.sendall(b"\x00")
        sock.recv(65536)
        # A bound name of 255 bytes, which comes one by one.
        sock.sendall(b"\x05\x00\x00\x03\xff")
        while not drips.ended.wait(0.1):
            sock.sendall(b"x")
            sent.append(1)

    sent: List[int] = []
    with RawServer(drip) as drips:
        error = fails(f"https://{UNKNOWN}", f"socks5h://127.0.0.1:{drips.port}", connect_timeout=1.0)
    assert "in time" in str(error)
    assert len(sent) < 200


# -- streams ----------------------------------------------------------------------------------------------------------


def talking(context: Any, silence: Callable[[socket.socket], None]) -> Callable[[socket.socket, int], None]:
    """What answers a request for a stream with one piece, and then does ``silence(sock)``, over TLS if given."""

    def talk(sock: socket.socket, number: int) -> None:
        wrapped = sock if context is None else context.wrap_socket(sock, server_side=True)
        with wrapped:
            read_request(wrapped)
            wrapped.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n: hello\n\n")
            silence(wrapped)

    return talk


@pytest.fixture(params=["http", "https", pytest.param("socks5h", marks=needs_pysocks)])
def through(request: pytest.FixtureRequest, certificates: Certificates) -> Callable[[int], Any]:
    """Makes a proxy to a port, and gives it and its URL."""

    def make(port: int) -> Any:
        if request.param == "socks5h":
            one: Any = SocksProxy(port)
            return one, one.url_of("socks5h")
        context = certificates.server_context() if request.param == "https" else None
        two = ConnectProxy(port, context=context)
        return two, two.url.replace("127.0.0.1", "localhost")

    return make


def open_live(certificates: Certificates, port: int, proxy: str, **options: Any) -> LiveClient:
    return LiveClient(
        ConnectionConfig(
            api_base_url=f"https://localhost:{port}", proxies={"https": proxy}, verify=certificates.ca, **options
        )
    )


def test_a_stream_outlives_the_read_timeout(certificates: Certificates, through: Callable[[int], Any]) -> None:
    """Through each kind of proxy the patience of the stream counts, also below TLS in TLS: longer and then shorter."""

    def silence(sock: socket.socket) -> None:
        time.sleep(1.0)
        sock.sendall(b": still here\n\n")
        server.ended.wait(GUARD)

    with RawServer(talking(certificates.server_context(), silence)) as server:
        proxy, url = through(server.port)
        with proxy:
            live = open_live(certificates, server.port, url, read_timeout=0.3, connect_timeout=GUARD)
            answer = live.open("/stream", credential=None, headers={})
            pieces = answer.chunks(GUARD)
            assert b"".join([next(pieces), next(pieces)]) == b": hello\n\n: still here\n\n"
            impatient = answer.chunks(0.2)
            with pytest.raises(TransportError, match=r"was silent for 0\.2 s"):
                next(impatient)
            answer.close()
            live.close()


def test_a_stream_through_a_proxy_can_be_woken(certificates: Certificates, through: Callable[[int], Any]) -> None:
    """wake() from another thread ends a read through each kind of proxy."""
    with RawServer(talking(certificates.server_context(), lambda sock: server.ended.wait(GUARD) and None)) as server:
        proxy, url = through(server.port)
        with proxy:
            live = open_live(certificates, server.port, url, connect_timeout=GUARD, read_timeout=GUARD)
            answer = live.open("/stream", credential=None, headers={})
            pieces = answer.chunks(600.0)
            assert next(pieces) == b": hello\n\n"
            rest: List[Any] = []

            def read() -> None:
                try:
                    rest.extend(pieces)
                except TransportError as error:
                    rest.append(error)

            reader = threading.Thread(target=read, daemon=True)
            reader.start()
            live.wake()
            reader.join(GUARD)
            assert not reader.is_alive()
            answer.close()
            live.close()


@needs_pysocks
def test_wake_ends_a_negotiation() -> None:
    """A stop does not wait for a SOCKS proxy that says nothing."""
    asked = threading.Event()

    def talk(sock: socket.socket, number: int) -> None:
        sock.recv(1)
        asked.set()
        silent.ended.wait(GUARD)

    with RawServer(talk) as silent:
        live = LiveClient(
            ConnectionConfig(
                api_base_url="https://platform.test",
                proxies={"https": f"socks5h://127.0.0.1:{silent.port}"},
                connect_timeout=600.0,
            )
        )
        problems: List[Exception] = []

        def read() -> None:
            try:
                live.open("/stream", credential=None, headers={})
            except TransportError as error:
                problems.append(error)

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        assert asked.wait(GUARD)
        live.wake()
        reader.join(GUARD)
        assert len(problems) == 1
        live.close()


# -- HTTP and HTTPS proxies -------------------------------------------------------------------------------------------


def test_calls_through_an_https_proxy(certificates: Certificates, server: WebServer) -> None:
    """One CA file serves for proxy and platform; the client certificate goes to the platform only."""
    wants = certificates.server_context()
    wants.verify_mode = 1  # type: ignore[assignment]  # CERT_OPTIONAL
    wants.load_verify_locations(certificates.ca)
    before = open_descriptors()
    with (
        WebServer(ok, certificates.server_context(client_ca=True)) as strict,
        ConnectProxy(strict.port, context=wants, login=f"user:{PASSWORD}é") as proxy,
    ):
        http = client(
            strict.url,
            proxy.url.replace("//", f"//user:{PASSWORD}%C3%A9@"),
            verify=certificates.ca,
            client_cert=(certificates.client, certificates.client_key),
        )
        assert [ask(http) for _ in range(3)] == [200] * 3
        http.close()
        assert (strict.connections, proxy.accepted) == (1, 1)
    assert proxy.certificates == [None]
    # The platform's token is inside the tunnel.
    assert TOKEN.reveal().encode() not in b"".join(proxy.heads)
    until(lambda: open_descriptors() <= before)


@pytest.mark.parametrize("scheme", ["https", "http"])
def test_the_certificate_of_a_proxy_is_checked(scheme: str, certificates: Certificates) -> None:
    """Also in front of a platform without TLS, where requests would not look at it."""
    with WebServer(ok) as server, ConnectProxy(server.port, context=certificates.server_context("self")) as proxy:
        address = f"{scheme}://{UNKNOWN}:{server.port}"
        error = fails(address, f"https://user:{PASSWORD}@127.0.0.1:{proxy.port}", verify=certificates.ca)
        assert f"TLS with the proxy https://127.0.0.1:{proxy.port} failed: " in str(error)
        assert "verify=" in str(error)
        assert not error.retryable
        # Nothing was sent.
        assert proxy.heads == []
    with WebServer(ok) as server, ConnectProxy(server.port, context=certificates.server_context()) as proxy:
        http = client(f"http://{UNKNOWN}:{server.port}", proxy.url, verify=certificates.ca)
        assert [ask(http) for _ in range(2)] == [200] * 2
        http.close()


def test_a_proxy_without_verification(certificates: Certificates, server: WebServer) -> None:
    """verify=False holds for the proxy too, as its documentation says."""
    with warnings.catch_warnings(), ConnectProxy(server.port, context=certificates.server_context("self")) as proxy:
        warnings.simplefilter("ignore")
        http = client(server.url, proxy.url, verify=False)
        assert ask(http) == 200
        http.close()


SQUID = b"HTTP/1.1 503 Service Unavailable\r\nX-Squid-Error: %b 0\r\nContent-Length: 0\r\n\r\n"
STATUS = b"HTTP/1.1 502 Bad Gateway\r\nProxy-Status: p; error=%b\r\nContent-Length: 0\r\n\r\n"


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (b"HTTP/1.1 407 X\r\n\r\n", "asks for a user and a password (407); write them into the option proxies"),
        (b"HTTP/1.1 403 X\r\n\r\n", "does not allow connections to platform.invalid:443 (403); have them allowed"),
        (SQUID % b"ERR_DNS_FAIL", "cannot resolve the name of platform.invalid:443; check api_base_url"),
        (SQUID % b"ERR_CONNECT_FAIL", "cannot connect to platform.invalid:443 (503); check api_base_url"),
        (STATUS % b"dns_error", "cannot resolve the name of platform.invalid:443"),
        (STATUS % b"connection_refused", "was refused a connection to platform.invalid:443; check api_base_url"),
        (b"HTTP/1.1 502 X\r\n\r\n", "cannot connect to platform.invalid:443 (502)"),
        (b"HTTP/1.0 504 X\r\n\r\n", "cannot connect to platform.invalid:443 (504)"),
        (b"HTTP/1.1 500 X\r\n\r\n", "cannot connect to platform.invalid:443 (500)"),
        (
            b"HTTP/1.1 405 X\r\n\r\n",
            "did not accept CONNECT to platform.invalid:443 (405); check in the option proxies",
        ),
        (b"HTTP/1.1 501 X\r\n\r\n", "did not accept CONNECT to platform.invalid:443 (501)"),
        (b"\x15\x03\x03\x00\x02\x02\x16", "did not answer in HTTP; check the scheme in the option proxies"),
        (b"", "closed the connection without an answer; check the scheme in the option proxies"),
    ],
)
@pytest.mark.parametrize("kind", ["http", "https"])
def test_what_a_proxy_says(kind: str, answer: bytes, text: str, certificates: Certificates) -> None:
    """Each refusal of CONNECT is said in words, with the proxy and the target, for proxies with and without TLS."""
    before = open_descriptors()
    context = certificates.server_context() if kind == "https" else None
    with ConnectProxy(9, context=context, answer=answer) as proxy:
        error = fails(f"https://{UNKNOWN}", proxy.url, verify=certificates.ca)
        assert f"cannot reach {UNKNOWN}: the proxy {proxy.url} {text}" in str(error)
        assert error.retryable
    until(lambda: open_descriptors() <= before)


def test_a_rejected_login() -> None:
    """A login that the proxy rejects is named as rejected, not shown; without a tunnel too."""
    with ConnectProxy(9, login="user:other") as proxy:
        for scheme in ("https", "http"):
            error = fails(f"{scheme}://{UNKNOWN}", proxy.url.replace("//", f"//user:{PASSWORD}@"))
            assert f"the proxy {proxy.url} rejected its user and password (407); check them" in str(error)
        live = LiveClient(
            ConnectionConfig(api_base_url=f"http://{UNKNOWN}", proxies={"http": proxy.url}, allow_insecure_http=True)
        )
        with pytest.raises(TransportError, match="asks for a user and a password"):
            live.open("/stream", credential=None, headers={})
        live.close()


@pytest.mark.parametrize("scheme", ["http", "https", pytest.param("socks5h", marks=needs_pysocks)])
def test_a_proxy_that_is_not_there(scheme: str) -> None:
    """A refusal, an unknown name and a silence of the proxy itself are three different things."""
    with refusing_url() as url:
        port = url.rpartition(":")[2]
        error = fails("https://platform.test", f"{scheme}://user:{PASSWORD}@127.0.0.1:{port}")
        assert f"the proxy {scheme}://127.0.0.1:{port} refuses connections; check that it runs" in str(error)
    error = fails("https://platform.test", f"{scheme}://user:{PASSWORD}@proxy.invalid:3128")
    assert f"the name of the proxy {scheme}://proxy.invalid:3128 cannot be resolved (" in str(error)
    assert "check it in the option proxies" in str(error)
    assert error.retryable


def test_a_silent_proxy(certificates: Certificates) -> None:
    """A proxy that does not answer is named, in TLS and in the tunnel."""
    with RawServer(lambda sock, number: silent.ended.wait(GUARD) and None) as silent:
        error = fails(f"https://{UNKNOWN}", silent.url, connect_timeout=0.2)
        assert f"did not connect to {UNKNOWN}:443 in time; check" in str(error)
        error = fails(f"https://{UNKNOWN}", silent.url.replace("http:", "https:"), connect_timeout=0.2)
        assert "did not answer in TLS in time; check in the option proxies" in str(error)


def test_the_wrong_scheme(certificates: Certificates, server: WebServer) -> None:
    """Each mix of schemes is named: of the proxy and of the platform."""
    with ConnectProxy(9) as plain:
        error = fails(f"https://{UNKNOWN}", plain.url.replace("http:", "https:"))
        assert f"the proxy https://127.0.0.1:{plain.port} does not speak TLS on this port; write http:// in" in str(
            error
        )
        assert not error.retryable
    with ConnectProxy(9, context=certificates.server_context()) as secure:
        for scheme in ("https", "http"):
            error = fails(f"{scheme}://{UNKNOWN}", secure.url.replace("https:", "http:"))
            assert "check the scheme in the option proxies: http:// or https://" in str(error)
    with SocksProxy(9) as socks:
        error = fails(f"https://{UNKNOWN}", f"http://127.0.0.1:{socks.port}")
        assert "socks5h:// for a SOCKS proxy" in str(error)
    with WebServer(ok) as plain_server:
        error = fails(plain_server.url.replace("http:", "https:"), None)
        assert "does not speak TLS on this port; check the port, or use http://" in str(error)
        assert not error.retryable
        with ConnectProxy(plain_server.port) as proxy:
            error = fails(plain_server.url.replace("http:", "https:"), proxy.url)
            assert f"TLS with 127.0.0.1:{plain_server.port} failed: " in str(error)

    def alert(sock: socket.socket, number: int) -> None:
        read_request(sock)
        sock.sendall(b"\x15\x03\x03\x00\x02\x02\x16")

    with RawServer(alert) as tls:
        error = fails(tls.url, None)
        assert "did not answer in HTTP; if it expects TLS there, use https://" in str(error)


# -- certificates -----------------------------------------------------------------------------------------------------


def signed(certificates: Certificates, name: str, first_day: int, last_day: int) -> str:
    """The path of a certificate and its key for 127.0.0.1, by our CA, with the days of its life counted from now."""
    crypto = pytest.importorskip("cryptography.x509")
    import datetime
    import ipaddress

    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    folder = pathlib.Path(certificates.ca).parent
    authority = crypto.load_pem_x509_certificate(pathlib.Path(certificates.ca).read_bytes())
    ca_key: Any = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), None)
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.datetime.now(datetime.timezone.utc)
    subject = crypto.Name([crypto.NameAttribute(crypto.NameOID.COMMON_NAME, "server")])
    names = [crypto.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    made = (
        crypto.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(authority.subject)
        .public_key(key.public_key())
        .serial_number(crypto.random_serial_number())
        .not_valid_before(now + datetime.timedelta(days=first_day))
        .not_valid_after(now + datetime.timedelta(days=last_day))
        .add_extension(crypto.SubjectAlternativeName(names), critical=False)
        # Python 3.13 asks for it.
        .add_extension(
            crypto.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key()),  # type: ignore[arg-type]
            critical=False,
        )
        .sign(ca_key, hashes.SHA256())
    )
    (folder / f"{name}.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    (folder / f"{name}.key").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return name


# urllib3 1 leaves the socket to the garbage collector when it finds the wrong name in the proxy's certificate.
@pytest.mark.filterwarnings("ignore:unclosed <ssl.SSLSocket:ResourceWarning")
@pytest.mark.parametrize("where", ["platform", "proxy"])
def test_each_fault_of_a_certificate_has_its_own_advice(where: str, certificates: Certificates) -> None:
    """`verify=` is advised only where the CA is unknown. At the proxy as at the platform."""

    def text_of(which: str, verify: Any = None) -> str:
        context = certificates.server_context(which)
        verify = certificates.ca if verify is None else verify
        if where == "platform":
            with WebServer(ok, context) as server:
                error = fails(server.url, None, verify=verify)
                assert server.requests == []
        else:
            with ConnectProxy(9, context=context) as proxy:
                error = fails("https://platform.test", proxy.url, verify=verify)
                assert proxy.heads == []
        assert not error.retryable
        return str(error)

    expired = text_of(signed(certificates, "expired", -10, -1))
    assert "renewed, or set the clock of this machine" in expired
    early = text_of(signed(certificates, "early", 5, 10))
    assert early.endswith("; set the clock of this machine")
    other = text_of("client")
    assert "; check the host in " in other
    for text in (expired, early, other):
        assert "verify=" not in text
    for unknown in (text_of("server", True), text_of("self")):
        assert "name that CA's file with verify= or REQUESTS_CA_BUNDLE" in unknown


def test_a_platform_that_asks_for_a_certificate(certificates: Certificates) -> None:
    """A client without one is advised to give it."""
    with WebServer(ok, certificates.server_context(client_ca=True)) as server:
        error = fails(server.url, None, verify=certificates.ca)
    # The alert may come after the handshake, when the request is on its way: then the connection is seen broken.
    assert "check client_cert=" in str(error) or "broke" in str(error) or "reset" in str(error)
