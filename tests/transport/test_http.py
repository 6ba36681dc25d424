"""One exchange over real sockets: bounded, without redirects, cookies or netrc, and silent about tokens."""

from __future__ import annotations

import functools
import gzip
import logging
import pathlib
import socket
import threading
import time
from email.utils import formatdate
from typing import Any, List

import pytest
import requests
import urllib3

from sekuire.config import ConnectionConfig
from sekuire.errors import APIError, ConfigurationError, PlanLimitError, SekuireError, TransportError
from sekuire.secret import Secret
from sekuire.transport import http
from sekuire.transport.http import MAX_ANSWER, HttpClient, Reply, Route, describe
from sekuire.wire import protocol

from ..support.servers import (
    Answer,
    Certificates,
    RawServer,
    Request,
    WebServer,
    assert_clean,
    read_request,
    refusing_url,
)
from ..support.waiting import GUARD

TOKEN = Secret("skr_do_not_show_me")
KEY = Secret("sk_live_do_not_show_me")
BEARER = functools.partial(protocol.bearer, TOKEN)
API_KEY = functools.partial(protocol.api_key_header, KEY)
BODY = functools.partial(protocol.refresh_body, Secret("skf_do_not_show_me"))
TOKENS = ("skr_do_not_show_me", "sk_live_do_not_show_me", "skf_do_not_show_me")


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxy, CA bundle or netrc of the machine that runs the tests."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


def client(url: str, **options: Any) -> HttpClient:
    return HttpClient(ConnectionConfig(api_base_url=url, **options))


def ok(request: Request) -> Answer:
    return Answer(200, {"ok": True})


def fails(url: str, *, timeout: float = GUARD, **options: Any) -> TransportError:
    """The error of a call with every kind of token in it, found to be clean."""
    one = client(url, **options)
    try:
        with pytest.raises(TransportError) as caught:
            one.request("POST", "/x", body=BODY, credential=BEARER, idempotency_key="k", timeout=timeout)
    finally:
        one.close()
    assert_clean(caught.value, *TOKENS)
    return caught.value


# -- what is sent -----------------------------------------------------------------------------------------------------


def test_a_whole_exchange() -> None:
    """Method, path, body and headers arrive as they should; the reply has status, headers, body and its moment."""
    with WebServer(lambda request: Answer(201, {"a": 1}, [("X-Thing", "y")])) as server:
        one = client(server.url + "/base")
        before = time.monotonic()
        reply = one.request("POST", "/api/v1/x?y=1", body=b'{"q":1}', credential=BEARER, idempotency_key="k-1")
        one.close()
    request = server.requests[0]
    assert (request.method, request.path, request.body) == ("POST", "/base/api/v1/x?y=1", b'{"q":1}')
    assert request.headers["Authorization"] == "Bearer skr_do_not_show_me"
    assert request.headers["Idempotency-Key"] == "k-1"
    assert request.headers["Content-Type"] == "application/json"
    assert request.headers["Content-Length"] == "7"
    assert request.headers["User-Agent"] == protocol.USER_AGENT
    assert request.headers["Accept"] == "application/json"
    assert request.headers["Accept-Encoding"] == "identity"
    assert "X-API-Key" not in request.headers
    assert "Cookie" not in request.headers
    assert (reply.status, reply.json(), reply.headers["x-thing"]) == (201, {"a": 1}, "y")
    assert reply.is_success
    assert reply.check() is reply
    assert before <= reply.sent_at <= time.monotonic()
    assert reply.now.timestamp() == pytest.approx(reply.sent_wall)
    assert reply.date is not None
    assert '"a"' not in repr(reply)


def test_what_is_not_given_is_not_sent() -> None:
    """Without body and credential none of their headers is sent; a POST says that it is empty."""
    with WebServer(ok) as server:
        one = client(server.url)
        one.request("GET", "/x")
        one.request("POST", "/x")
        one.request("POST", "/x", body=BODY, credential=API_KEY)
        one.close()
    get, post, built = server.requests
    for request in (get, post):
        for name in ("Authorization", "X-API-Key", "Content-Type"):
            assert name not in request.headers
    assert "Idempotency-Key" not in get.headers
    assert "Content-Length" not in get.headers
    assert post.headers["Content-Length"] == "0"
    assert built.headers["X-API-Key"] == KEY.reveal()
    assert built.json() == {"refresh_token": "skf_do_not_show_me"}


def test_a_connection_serves_many_calls() -> None:
    """Calls one after the other use one connection, whatever they are answered."""
    statuses = iter([200, 404, 204, 500, 401, 200])

    def answer(request: Request) -> Answer:
        status = next(statuses)
        return Answer(status, b"" if status == 204 else {"status": status})

    with WebServer(answer) as server:
        one = client(server.url)
        got = [one.request("POST", "/x", body=b"{}").status for _ in range(6)]
        one.close()
    assert got == [200, 404, 204, 500, 401, 200]
    assert server.connections == 1


def test_the_pool_is_as_large_as_the_threads(caplog: pytest.LogCaptureFixture) -> None:
    """As many threads as the pool has places use as many connections, over and over, and throw none away."""
    threads, rounds = 12, 5
    barrier = threading.Barrier(threads)

    def answer(request: Request) -> Answer:
        barrier.wait(GUARD)
        return Answer(200)

    with caplog.at_level(logging.WARNING), WebServer(answer) as server:
        one = HttpClient(ConnectionConfig(api_base_url=server.url), pool_size=threads)

        def work() -> None:
            for _ in range(rounds):
                one.request("POST", "/x", body=b"{}", timeout=GUARD)

        workers = [threading.Thread(target=work) for _ in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(GUARD)
        one.close()
    assert len(server.requests) == threads * rounds
    assert server.connections == threads
    assert caplog.messages == []


def test_a_connection_that_the_server_closed_is_replaced() -> None:
    """A kept connection that the server has closed meanwhile is not used again."""

    def talk(sock: socket.socket, number: int) -> None:
        read_request(sock)
        sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
        sock.shutdown(socket.SHUT_RDWR)
        closed[number].set()

    closed = [threading.Event() for _ in range(3)]
    with RawServer(talk) as server:
        one = client(server.url)
        for event in closed:
            assert one.request("POST", "/x", body=b"{}").status == 200
            assert event.wait(GUARD)
        one.close()
    assert server.accepted == 3


# -- what the environment may not do ----------------------------------------------------------------------------------


def test_netrc_does_not_replace_the_header(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A matching entry of a netrc file leaves our header alone."""
    file = tmp_path / "netrc"
    file.write_text("machine 127.0.0.1 login user password hunter2\ndefault login user password hunter2\n")
    file.chmod(0o600)
    monkeypatch.setenv("NETRC", str(file))
    with WebServer(ok) as server:
        one = client(server.url)
        one.request("POST", "/x", credential=BEARER)
        one.request("POST", "/x")
        one.close()
        # That this file does what the test fears:
        requests.get(server.url, headers={"Authorization": "Bearer x"}, timeout=GUARD)
    assert [request.headers.get("Authorization") for request in server.requests[:2]] == [
        "Bearer skr_do_not_show_me",
        None,
    ]
    assert server.requests[2].headers["Authorization"].startswith("Basic ")


def test_the_environments_ca_bundle_is_taken_once(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """REQUESTS_CA_BUNDLE, then CURL_CA_BUNDLE, count where nothing was said; what was said counts more."""
    bundles = [tmp_path / name for name in ("a.pem", "b.pem", "c.pem")]
    for bundle in bundles:
        bundle.write_text("")
    first, second, given = map(str, bundles)

    def verify(**options: Any) -> Any:
        return Route(ConnectionConfig(**options)).verify

    assert verify() is True
    monkeypatch.setenv("CURL_CA_BUNDLE", second)
    assert verify() == second
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", first)
    route = Route(ConnectionConfig())
    assert route.verify == first
    assert verify(verify=given) == given
    assert verify(verify=False) is False
    monkeypatch.delenv("REQUESTS_CA_BUNDLE")
    assert route.verify == first


@pytest.mark.parametrize("variable", ["REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"])
def test_a_ca_bundle_that_is_not_there(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable that names no file is a ConfigurationError at construction, not a failure of every call."""
    monkeypatch.setenv(variable, "/no/such/bundle.pem")
    with pytest.raises(ConfigurationError, match=variable) as caught:
        client("https://platform.test")
    assert caught.value.option == "verify"
    client("https://platform.test", verify=False)


def test_proxies_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment's proxies count for other machines only, and not where the options say otherwise."""
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.test:3128")
    monkeypatch.setenv("HTTP_PROXY", "http://proxy.test:3128")

    def proxies(url: str, **options: Any) -> str:
        proxy = Route(ConnectionConfig(api_base_url=url, allow_insecure_http=True, **options)).proxy
        return "" if proxy is None else str(proxy)

    assert proxies("https://platform.test") == "http://proxy.test:3128"
    for local in ("http://127.0.0.1:9300", "http://localhost:9300", "http://[::1]:9300", "https://localhost:9300"):
        assert proxies(local) == ""
    assert proxies("https://platform.test", proxies={}) == ""
    assert proxies("https://platform.test", proxies={"https": "http://mine.test:1"}) == "http://mine.test:1"
    monkeypatch.setenv("NO_PROXY", "platform.test")
    assert proxies("https://platform.test") == ""


def test_a_proxy_is_used() -> None:
    """With a proxy the whole request goes to it, its own credentials beside ours; without an answer it is named."""
    with WebServer(ok) as proxy:
        address = f"http://user:hunter2@127.0.0.1:{proxy.port}"
        one = client("http://platform.test", allow_insecure_http=True, proxies={"http": address})
        assert one.request("POST", "/x", credential=BEARER).status == 200
        one.close()
    assert proxy.requests[0].path == "http://platform.test/x"
    assert proxy.requests[0].headers["Proxy-Authorization"].startswith("Basic ")
    with refusing_url() as url:
        error = fails("https://platform.test", proxies={"https": url.replace("//", "//user:hunter2@")})
    assert str(error).startswith(f"cannot reach platform.test: the proxy {url} refuses connections; ")
    assert "hunter2" not in str(error) + repr(error)


# -- what an answer may not do ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_not_followed(status: int) -> None:
    """A redirect is an answer like any other: neither a header nor a body of ours reaches the other host."""
    with (
        WebServer(ok) as other,
        WebServer(lambda request: Answer(status, b"moved", [("Location", f"{other.url}/stolen")])) as server,
    ):
        one = client(server.url)
        for credential in (BEARER, API_KEY):
            reply = one.request("POST", "/x", body=BODY, credential=credential)
            assert reply.status == status
            assert reply.body == b"moved"
            with pytest.raises(APIError, match="redirect, which is not followed; check api_base_url") as caught:
                reply.check()
            assert caught.value.status == status
        one.close()
    assert other.requests == []
    assert server.connections == 1


def test_the_body_of_a_redirect_is_bounded() -> None:
    """A redirect's body is read within the same bounds as any other."""

    def talk(sock: socket.socket, number: int) -> None:
        read_request(sock)
        sock.sendall(b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 100000000\r\n\r\n")
        for _ in range(1600):
            sock.sendall(b"x" * 65536)

    with RawServer(talk) as server:
        assert "larger than 1048576 bytes" in str(fails(server.url))


def test_cookies_are_refused() -> None:
    """A cookie that the platform sets is not sent back."""
    with WebServer(lambda request: Answer(200, b"", [("Set-Cookie", "session=1; Path=/")])) as server:
        one = client(server.url)
        for _ in range(2):
            one.request("GET", "/x")
        assert list(one._session.cookies) == []
        one.close()
    assert [request.headers.get("Cookie") for request in server.requests] == [None, None]


def test_an_answer_as_large_as_the_limit() -> None:
    """An answer of exactly 1 MiB is read."""
    with WebServer(lambda request: Answer(200, b"x" * MAX_ANSWER)) as server:
        one = client(server.url)
        assert len(one.request("GET", "/x").body) == MAX_ANSWER
        one.close()


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (b"x" * (MAX_ANSWER + 1), []),
        (gzip.compress(b"\0" * (64 * MAX_ANSWER)), [("Content-Encoding", "gzip")]),
    ],
    ids=["plain", "bomb"],
)
def test_answers_that_are_too_large(body: bytes, headers: List[Any]) -> None:
    """An answer larger than 1 MiB, also one that only becomes so when it is unpacked, is refused."""
    with WebServer(lambda request: Answer(200, body, headers)) as server:
        error = fails(server.url)
    assert "the answer is larger than 1048576 bytes" in str(error)
    assert error.retryable


def test_a_compressed_answer_is_read() -> None:
    """An answer that comes compressed though that was not asked for is read."""
    packed = gzip.compress(b'{"a":1}')
    with WebServer(lambda request: Answer(200, packed, [("Content-Encoding", "gzip")])) as server:
        one = client(server.url)
        assert one.request("GET", "/x").json() == {"a": 1}
        one.close()


@pytest.mark.parametrize("chunked", [False, True])
def test_a_dripping_body_is_bounded(chunked: bool) -> None:
    """A body that comes byte by byte is given up at the total deadline, though no single read is slow."""

    def talk(sock: socket.socket, number: int) -> None:
        read_request(sock)
        kind = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: 1000000"
        sock.sendall(b"HTTP/1.1 200 OK\r\n" + kind + b"\r\n\r\n")
        while not server.ended.wait(0.02):
            sock.sendall(b"1\r\nx\r\n" if chunked else b"x")

    with RawServer(talk) as server:
        error = fails(server.url, timeout=0.3, read_timeout=GUARD)
    assert "in time" in str(error)
    assert error.retryable


def test_silence_is_bounded_by_the_deadline() -> None:
    """A server that is silent, before or within its answer, is given up at the deadline or the read timeout."""

    def talk(sock: socket.socket, number: int) -> None:
        read_request(sock)
        if number % 2:
            sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nx")
        server.ended.wait(GUARD)

    with RawServer(talk) as server:
        for _ in range(2):
            assert "did not answer in time" in str(fails(server.url, timeout=0.1, read_timeout=600))
        for _ in range(2):
            assert "did not answer in time" in str(fails(server.url, read_timeout=0.1))


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nnot a number\r\n",
        b"nonsense\r\n\r\n",
        b"",
    ],
)
def test_truncated_and_broken_answers(answer: bytes) -> None:
    """An answer that is cut or is no HTTP is an error that may pass, and its connection is not used again."""

    def talk(sock: socket.socket, number: int) -> None:
        read_request(sock)
        sock.sendall(answer if number == 0 else b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")

    with RawServer(talk) as server:
        one = client(server.url)
        with pytest.raises(TransportError) as caught:
            one.request("POST", "/x", body=BODY, credential=BEARER)
        assert caught.value.retryable
        assert_clean(caught.value, *TOKENS)
        assert one.request("POST", "/x").status == 200
        one.close()


def test_an_answer_without_a_length() -> None:
    """An answer that ends with its connection is read to that end."""

    def talk(sock: socket.socket, number: int) -> None:
        read_request(sock)
        sock.sendall(b"HTTP/1.0 200 OK\r\n\r\n[1,")
        sock.sendall(b"2]")

    with RawServer(talk) as server:
        one = client(server.url)
        assert one.request("GET", "/x").json() == [1, 2]
        assert one.request("GET", "/x").json() == [1, 2]
        one.close()


def test_an_echoed_token_is_masked() -> None:
    """An error that repeats our header does so without the token; a success is left as it is."""

    def echo(request: Request) -> Answer:
        return Answer(int(request.path[1:]), {"message": f"bad header: {request.headers['Authorization']}"})

    with WebServer(echo) as server:
        one = client(server.url)
        with pytest.raises(APIError, match=r"bad header: Bearer \*\*\*") as caught:
            one.request("POST", "/422", credential=BEARER).check()
        assert_clean(caught.value, *TOKENS)
        assert TOKEN.reveal() in one.request("POST", "/200", credential=BEARER).json()["message"]
        one.close()


# -- errors -----------------------------------------------------------------------------------------------------------


def test_a_refused_connection() -> None:
    """A refused connection says so, names the host, and may pass."""
    with refusing_url() as url:
        error = fails(url)
    assert str(error) == f"cannot reach {url[7:]}: Connection refused"
    assert error.retryable


def test_a_reset_connection() -> None:
    """A connection that is reset in the middle of the answer may pass."""

    def talk(sock: socket.socket, number: int) -> None:
        read_request(sock)
        sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")

    with RawServer(talk) as server:
        assert fails(server.url).retryable


def test_a_name_that_does_not_resolve(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host without an address is named, and may get one."""

    def unknown(*args: Any, **kwargs: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    error = fails("https://platform.invalid")
    assert "platform.invalid" in str(error)
    assert error.retryable


def test_a_connect_that_takes_too_long() -> None:
    """A connect to a full listening socket ends at the connect timeout."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        address = listener.getsockname()
        fillers = []
        try:
            for _ in range(4):
                filler = socket.socket()
                filler.setblocking(False)
                filler.connect_ex(address)
                fillers.append(filler)
            error = fails(f"http://127.0.0.1:{address[1]}", connect_timeout=0.2)
        finally:
            for filler in fillers:
                filler.close()
    assert "timed out" in str(error)
    assert error.retryable


@pytest.mark.parametrize("bad", ["x\r\nInjected: y", "x\n", "\u20ac"])
def test_a_header_that_cannot_be_sent(bad: str) -> None:
    """A header that HTTP cannot carry is an error that quotes nothing of it and is not tried again."""
    secret = f"{TOKEN.reveal()}{bad}"
    with WebServer(ok) as server:
        one = client(server.url)
        with pytest.raises(TransportError) as caught:
            one.request("POST", "/x", credential=lambda: ("Authorization", "Bearer " + secret))
        assert not caught.value.retryable
        assert TOKEN.reveal() not in str(caught.value) + repr(caught.value)
        assert caught.value.__context__ is None
        one.close()
    assert server.requests == []


def test_unforeseen_errors_are_described_without_their_text() -> None:
    """An error of any other kind is told by its type only."""
    error = describe(RuntimeError(TOKEN.reveal()), "host")
    assert str(error) == "a request to host failed (RuntimeError)"
    assert not error.retryable
    error = describe(requests.exceptions.InvalidHeader(TOKEN.reveal()), "host")
    assert str(error) == "a request to host could not be built (InvalidHeader)"
    assert not error.retryable
    loop = urllib3.exceptions.HTTPError()
    loop.__context__ = urllib3.exceptions.HTTPError(loop)
    assert describe(loop, "host").retryable


def test_errors_of_answers_are_clean() -> None:
    """An error made from an answer holds no token and no request, and is of the right class."""
    with WebServer(lambda request: Answer(int(request.path[1:]), {"code": "X", "message": "no"})) as server:
        one = client(server.url)
        for status, cls in ((400, APIError), (402, PlanLimitError), (503, APIError)):
            with pytest.raises(SekuireError) as caught:
                one.request("POST", f"/{status}", body=BODY, credential=API_KEY).check()
            assert type(caught.value) is cls
            assert_clean(caught.value, *TOKENS)
        one.close()


def test_logs_hold_no_token(caplog: pytest.LogCaptureFixture) -> None:
    """At DEBUG, neither ours nor the HTTP libraries' logs show a token."""
    with caplog.at_level(logging.DEBUG), WebServer(ok) as server:
        one = client(server.url)
        one.request("POST", "/x", body=BODY, credential=BEARER)
        one.close()
        with refusing_url() as url:
            fails(url)
    assert any(record.name.startswith("urllib3") for record in caplog.records)
    assert not [message for message in caplog.messages for token in TOKENS if token in message]


# -- replies ----------------------------------------------------------------------------------------------------------


def test_retry_after_of_a_reply() -> None:
    """A reply tells what its Retry-After asks for, and its error carries that along."""

    def reply(value: str, **headers: str) -> Reply:
        return Reply(503, {"Retry-After": value, **headers}, b"", 0.0, 0.0)

    assert reply("7").retry_after() == 7.0
    later = reply(formatdate(time.time() + 100, usegmt=True)).retry_after()
    assert later is not None
    assert 50 < later <= 100
    assert reply("-1").retry_after() is None
    # The platform's clock may be an hour off, or far more.
    for skew in (-3600, 0, 3600, 10**8):
        date, instant = (formatdate(time.time() + skew + more, usegmt=True) for more in (0, 4))
        assert reply(instant, Date=date).retry_after() == 4.0
    with pytest.raises(APIError) as caught:
        reply("7").check()
    assert caught.value.retry_after == 7.0


def test_a_reply_without_a_secret() -> None:
    """An error is given without a secret of its request's body; a success stays whole."""
    body = b'{"message": "refused: skr_do_not_show_me"}'
    assert Reply(422, {}, body, 0.0, 0.0).without(TOKEN).json() == {"message": "refused: ***"}
    good = Reply(200, {}, body, 0.0, 0.0)
    assert good.without(TOKEN) is good


def test_a_body_that_is_no_json() -> None:
    """A reply whose body is not JSON says so."""
    with pytest.raises(protocol.Malformed):
        Reply(200, {}, b"<html>", 0.0, 0.0).json()


# -- TLS --------------------------------------------------------------------------------------------------------------


def test_an_unknown_certificate_is_refused(certificates: Certificates) -> None:
    """A self-signed certificate is refused before anything is sent, with the reason and the way out, for good."""
    with WebServer(ok, certificates.server_context("self")) as server:
        error = fails(server.url)
    assert "certificate" in str(error)
    assert "verify=" in str(error)
    assert not error.retryable
    assert server.requests == []


def test_a_ca_of_ones_own(certificates: Certificates, monkeypatch: pytest.MonkeyPatch) -> None:
    """A certificate of a private CA is accepted with that CA, given by option or environment, and not without."""
    with WebServer(ok, certificates.server_context()) as server:
        assert not fails(server.url).retryable
        one = client(server.url, verify=pathlib.Path(certificates.ca))
        assert one.request("POST", "/x", credential=BEARER).status == 200
        one.close()
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", certificates.ca)
        one = client(server.url)
        assert one.request("POST", "/x", credential=BEARER).status == 200
        one.close()
    assert [request.headers["Authorization"] for request in server.requests] == [f"Bearer {TOKEN.reveal()}"] * 2


def test_a_certificate_of_another_host(certificates: Certificates) -> None:
    """A certificate that names another host is refused."""
    with WebServer(ok, certificates.server_context("client")) as server:
        error = fails(server.url, verify=certificates.ca)
    assert "mismatch" in str(error) or "not valid for" in str(error) or "doesn't match" in str(error)
    assert not error.retryable


@pytest.mark.filterwarnings("ignore::urllib3.exceptions.InsecureRequestWarning")
def test_verification_switched_off(
    certificates: Certificates, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """verify=False accepts any certificate, with a warning, also where the environment names a CA bundle."""
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", certificates.ca)
    with WebServer(ok, certificates.server_context("self")) as server:
        one = client(server.url, verify=False)
        assert one.request("POST", "/x").status == 200
        one.close()
    assert any("not verified (verify=False)" in message for message in caplog.messages)


def test_client_certificates(certificates: Certificates) -> None:
    """A platform that asks for a client certificate gets ours, as a pair or as one file, and refuses without."""
    combined = pathlib.Path(certificates.client).with_name("combined.pem")
    combined.write_bytes(
        pathlib.Path(certificates.client).read_bytes() + pathlib.Path(certificates.client_key).read_bytes()
    )
    with WebServer(ok, certificates.server_context(client_ca=True)) as server:
        for given in ((certificates.client, pathlib.Path(certificates.client_key)), combined):
            one = client(server.url, verify=certificates.ca, client_cert=given)
            assert one.request("POST", "/x").status == 200
            one.close()
        fails(server.url, verify=certificates.ca)
    assert len(server.requests) == 2


def test_a_server_that_speaks_no_tls(certificates: Certificates) -> None:
    """https to a server that speaks http is an error of TLS."""
    with WebServer(ok) as server:
        error = fails(server.url.replace("http:", "https:"))
    assert "TLS with" in str(error)
    assert not error.retryable


def test_a_handshake_that_breaks_off() -> None:
    """A connection that ends within the handshake is no verdict on TLS: it may pass."""

    def talk(sock: socket.socket, number: int) -> None:
        sock.recv(65536)
        sock.shutdown(socket.SHUT_RDWR)

    with RawServer(talk) as server:
        assert fails(server.url.replace("http:", "https:")).retryable


def test_insecure_http_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    """http to another machine, once allowed, is warned of."""
    client("http://platform.test", allow_insecure_http=True).close()
    assert any("unencrypted" in message for message in caplog.messages)


def test_the_session_takes_nothing_from_outside() -> None:
    """The session of a route trusts no environment and has adapters of its own only."""
    route = Route(ConnectionConfig())
    adapter = requests.adapters.HTTPAdapter()
    session = route.session(adapter)
    assert session.trust_env is False
    assert set(session.adapters.values()) == {adapter}
    assert http.log.name == "sekuire.http"
    session.close()


@pytest.mark.parametrize(
    "head",
    [
        b"Transfer-Encoding: chunked\r\n\r\n",
        b"Transfer-Encoding: chunked\r\n\r\n5\r\nab",
    ],
)
def test_an_answer_that_ends_too_early(head: bytes) -> None:
    """The error says so in plain words, without the class of an error that the parser meets."""

    def talk(sock: socket.socket, number: int) -> None:
        read_request(sock)
        sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n" + head)

    with RawServer(talk) as server:
        one = client(server.url)
        with pytest.raises(
            TransportError, match=r"the connection to 127\.0\.0\.1:\d+ was closed in the middle of an answer$"
        ):
            one.request("GET", "/healthz")
        one.close()
