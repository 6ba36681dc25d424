"""The ways of authenticating: their order, their refusals, and how a token is kept fresh."""

from __future__ import annotations

import datetime as dt
import json
import logging
import os
import pathlib
import socket
import subprocess
import sys
import threading
import time
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple, Union

import pytest

from sekuire._internal.threads import Deadline
from sekuire.config import AgentConfig
from sekuire.credentials import Authenticator, RuntimeCredentialsStore, Snapshot
from sekuire.credentials import authenticator as authenticator_module
from sekuire.credentials import login as login_module
from sekuire.credentials.authenticator import is_fresh
from sekuire.credentials.login import Login, TokenProvider
from sekuire.errors import (
    APIError,
    AuthenticationError,
    ConfigurationError,
    PlanLimitError,
    RevokedError,
    SekuireError,
    TransportError,
)
from sekuire.local import LocalPlatform
from sekuire.secret import Secret
from sekuire.transport.http import HttpClient
from sekuire.transport.retry import Interrupted
from sekuire.wire import protocol
from sekuire.wire.models import Grant, HeartbeatReply, RuntimeCredentials

from ..support.scripted import Scripted
from ..support.scripted import grant as scripted_grant
from ..support.servers import (
    Answer,
    RawServer,
    Request,
    WebServer,
    assert_clean,
    grant_of,
    read_request,
    refusing_url,
    run_python,
)
from ..support.users import in_mounts
from ..support.waiting import GUARD, SLACK, until

HOUR = 3600.0
AGENT = "agent-1"
INSTALL, API_KEY = "skt_do_not_show", "sk_live_do_not_show"
On = Union[Answer, Callable[[Request], Answer]]


class Fake:
    """A platform that answers as it is told; by default each grant has new tokens that live an hour."""

    def __init__(self) -> None:
        self.lifetime: Optional[float] = HOUR
        self.on: Dict[str, On] = {}
        self.calls: List[str] = []
        self._grants = 0
        self._lock = threading.Lock()
        self.server = WebServer(self._answer)

    @property
    def url(self) -> str:
        return self.server.url

    def requests(self, name: str) -> List[Request]:
        return [request for request in self.server.requests if request.path.endswith(f"/{name}")]

    def grant(self, **fields: Any) -> Answer:
        with self._lock:
            self._grants += 1
            number = self._grants
        if self.lifetime is not None:
            end = dt.datetime.now(dt.timezone.utc) + dt.timedelta(seconds=self.lifetime)
            fields.setdefault("expires_at", protocol.format_time(end))
        return Answer(201, grant_of(number, **fields))

    def _answer(self, request: Request) -> Answer:
        name = request.path.rpartition("/")[2]
        with self._lock:
            self.calls.append(name)
        on = self.on.get(name)
        if on is not None:
            return on(request) if callable(on) else on
        return self.grant() if name in ("bootstrap", "refresh", "recover") else Answer(200, {})


@pytest.fixture
def fake() -> Iterator[Fake]:
    fake = Fake()
    yield fake
    fake.server.close()


Make = Callable[..., Authenticator]


@pytest.fixture
def make() -> Iterator[Make]:
    clients: List[HttpClient] = []
    stops: List[threading.Event] = []

    def make(
        url: Any,
        *,
        store: Optional[RuntimeCredentialsStore] = None,
        token_provider: Any = None,
        api_key: Optional[str] = None,
        workspace_id: Optional[str] = None,
        stop: Optional[threading.Event] = None,
        pool_size: int = 4,
        **options: Any,
    ) -> Authenticator:
        config = AgentConfig(
            api_base_url=getattr(url, "url", url), agent_id=AGENT, read_timeout=GUARD, proxies={}, **options
        )
        client = HttpClient(config, pool_size=pool_size)
        clients.append(client)
        stops.append(stop or threading.Event())
        login = Login(
            config,
            client,
            store or RuntimeCredentialsStore(),
            stop=stops[-1],
            runtime_info={"hostname": "h", "pid": 1, "platform": {}},
            token_provider=None if token_provider is None else TokenProvider(token_provider),
            api_key=None if api_key is None else Secret(api_key),
            workspace_id=workspace_id,
        )
        return Authenticator(login)

    yield make
    for stop in stops:
        stop.set()
    for client in clients:
        client.close()
    until(lambda: not [t for t in threading.enumerate() if t.name in ("sekuire-refresh", "sekuire-token-provider")])


class Clock:
    """The clocks of the store and the login, ahead of the real ones by what a test says."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead

    def time(self) -> float:
        return time.time() + self.ahead


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    from sekuire.credentials import store as store_module

    clock = Clock()
    monkeypatch.setattr(store_module, "time", clock)
    monkeypatch.setattr(login_module, "time", clock)
    monkeypatch.setattr(authenticator_module, "time", clock)
    return clock


def patience() -> Deadline:
    return Deadline(GUARD)


def token(snapshot: Snapshot) -> Optional[str]:
    found = snapshot.credentials.runtime_token
    return None if found is None else found.reveal()


def beat(auth: Authenticator, deadline: Optional[Deadline] = None) -> Tuple[Any, Snapshot]:
    """A call with the runtime token."""
    return auth.request("POST", lambda snapshot: "/api/v1/beat", body=b"{}", deadline=deadline or patience())


def key_of(auth: Authenticator, endpoint: str, credential: str) -> str:
    """The key of a login; no other thread may use the store now."""
    return protocol.idempotency_key(endpoint, Secret(credential), AGENT, auth.store.holder())


def refused(auth: Authenticator, error: type = AuthenticationError, deadline: Optional[Deadline] = None) -> Any:
    with pytest.raises(error) as caught:
        auth.snapshot(deadline or patience())
    assert_clean(caught.value, INSTALL, API_KEY, "skr_", "skf_")
    return caught.value


def error(status: int, code: str = "", message: str = "no") -> Answer:
    return Answer(status, {"error": "refused", "code": code, "message": message})


# -- the ways and their order -----------------------------------------------------------------------------------------


def test_a_runtime_token_needs_no_login(fake: Fake, make: Make) -> None:
    """A token that was given is used as it is, whatever else was given too."""
    auth = make(
        fake, runtime_token="skr_given", installation_id="inst-1", refresh_token="skf_given", install_token=INSTALL
    )
    assert token(auth.snapshot(patience())) == "skr_given"
    assert fake.calls == []


def test_bootstrap(fake: Fake, make: Make) -> None:
    """An install token is exchanged for credentials, once, with all that the contract wants told."""
    auth = make(fake, install_token=INSTALL, capabilities=["x"])
    auth.declare(("x", "y"))
    grants: List[Tuple[Grant, float]] = []
    auth.login.on_grant = lambda grant, sent_at: grants.append((grant, sent_at))
    for _ in range(2):
        snapshot = auth.snapshot(patience())
        assert token(snapshot) == "skr_runtime_1"
    assert snapshot.credentials.installation_id == "inst-1"
    assert snapshot.credentials.workspace_id == "ws-1"
    left = snapshot.time_left()
    assert left is not None
    assert HOUR - SLACK < left <= HOUR + 1
    assert fake.calls == ["bootstrap"]
    assert len(grants) == 1
    request = fake.server.requests[0]
    assert request.json() == {
        "install_token": INSTALL,
        "agent_id": AGENT,
        "capabilities": ["x", "y"],
        "runtime_info": {"hostname": "h", "pid": 1, "platform": {}, "sdk": protocol.SDK_INFO},
    }
    assert request.headers["Idempotency-Key"] == key_of(auth, "bootstrap", INSTALL)
    assert "Authorization" not in request.headers
    assert "X-API-Key" not in request.headers


def test_refresh(fake: Fake, make: Make) -> None:
    """A refresh token comes before the install token; a rotated one replaces it."""
    auth = make(fake, installation_id="inst-1", refresh_token="skf_given", install_token=INSTALL)
    snapshot = auth.snapshot(patience())
    assert token(snapshot) == "skr_runtime_1"
    assert snapshot.credentials.refresh_token == Secret("skf_refresh_1")
    assert fake.calls == ["refresh"]
    request = fake.server.requests[0]
    assert request.path == "/api/v1/installations/inst-1/refresh"
    assert request.json() == {"refresh_token": "skf_given"}
    assert request.headers["Idempotency-Key"] == key_of(auth, "refresh", "skf_given")
    assert "Authorization" not in request.headers


def test_a_refresh_that_does_not_rotate(fake: Fake, make: Make) -> None:
    """A refresh token that the platform does not replace is kept."""
    fake.on["refresh"] = Answer(200, {"runtime_token": "skr_new"})
    auth = make(fake, installation_id="inst-1", refresh_token="skf_given")
    snapshot = auth.snapshot(patience())
    assert snapshot.credentials == RuntimeCredentials(
        installation_id="inst-1", runtime_token="skr_new", refresh_token="skf_given"
    )
    assert snapshot.time_left() is None


def test_every_way_in_its_order(fake: Fake, make: Make) -> None:
    """Refused ways are followed by the next: refresh, install token, API key; and are not tried again."""
    fake.on.update(beat=error(401), refresh=error(401), bootstrap=error(409))
    auth = make(
        fake, runtime_token="skr_given", installation_id="inst-1", refresh_token="skf_given", install_token=INSTALL,
        api_key=API_KEY, workspace_id="ws-1",
    )  # fmt: skip
    beat(auth)
    assert fake.calls == ["beat", "refresh", "bootstrap", "recover", "beat"]
    recover = fake.requests("recover")[0]
    assert recover.headers["X-API-Key"] == API_KEY
    assert recover.json()["workspace_id"] == "ws-1"
    assert recover.json()["agent_id"] == AGENT
    beat(auth)
    # The refresh token that the recovery brought is a new one, so it is tried.
    assert fake.calls[5:] == ["beat", "refresh", "recover", "beat"]


def test_when_every_way_is_refused(fake: Fake, make: Make) -> None:
    """The error of a login that failed for good tells what each way was answered, and later ones do not try again."""
    fake.on.update(refresh=error(401, "DEAD", "unknown refresh token"), bootstrap=error(403, "X", "wrong agent"))
    auth = make(fake, installation_id="inst-1", refresh_token="skf_given", install_token=INSTALL)
    problem = refused(auth)
    assert str(problem) == (
        "the platform refused the refresh token (HTTP 401 DEAD: unknown refresh token) and the install token: HTTP 403 "
        "X: wrong agent"
    )
    assert (problem.status, problem.code) == (403, "X")
    # Whoever comes later gets the same reason.
    assert str(refused(auth)) == str(problem)
    assert fake.calls == ["refresh", "bootstrap"]


def test_nothing_to_authenticate_with(fake: Fake, make: Make) -> None:
    """Without anything given the error names every option and variable that would do; any one of them does."""
    with pytest.raises(ConfigurationError, match="SEKUIRE_INSTALL_TOKEN") as caught:
        make(fake).require_credentials()
    assert "token_provider" in str(caught.value)
    ways: List[Dict[str, Any]] = [
        {"install_token": INSTALL},
        {"runtime_token": "skr"},
        {"installation_id": "i", "refresh_token": "skf"},
        {"token_provider": lambda: "skr"},
        {"api_key": API_KEY},
        {"store": RuntimeCredentialsStore(RuntimeCredentials(runtime_token="skr"))},
    ]
    for way in ways:
        make(fake, **way).require_credentials()


def test_a_runtime_token_alone_that_is_refused(fake: Fake, make: Make) -> None:
    """A runtime token without anything behind it that the platform refuses is an authentication error."""
    fake.on["beat"] = error(401)
    auth = make(fake, runtime_token="skr_given")
    with pytest.raises(AuthenticationError, match="nothing else was given") as caught:
        beat(auth)
    assert caught.value.status == 401
    assert_clean(caught.value, "skr_given")


def test_a_store_that_is_filled_later(fake: Fake, make: Make) -> None:
    """With a store that is still empty the login waits: the error may pass."""
    store = RuntimeCredentialsStore()
    auth = make(fake, store=store)
    assert refused(auth, TransportError).retryable
    store.update(RuntimeCredentials(runtime_token="skr_later"))
    assert token(auth.snapshot(patience())) == "skr_later"


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [401, 409, 410])
def test_a_consumed_install_token(status: int, fake: Fake, make: Make) -> None:
    """The error of a consumed install token says how to live with tokens that work once."""
    fake.on["bootstrap"] = error(status, "INSTALL_TOKEN_CONSUMED", "already used")
    text = str(refused(make(fake, install_token=INSTALL)))
    for hint in ("SEKUIRE_CREDENTIALS_FILE", "one token per replica", "max_uses", "already used"):
        assert hint in text


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (error(404), "api_base_url"),
        (Answer(301, b"", [("Location", "https://other.test/")]), "redirect"),
        (Answer(200, b"<html>"), "that is another server"),
        (Answer(200, []), "that is another server"),
        (Answer(200, {"runtime_token": "a b"}), "did not answer as the contract says"),
        (error(422, "BAD", "what?"), "what?"),
    ],
)
def test_other_refusals(answer: Answer, hint: str, fake: Fake, make: Make) -> None:
    """A wrong path, a redirect and an answer that is none are refusals that say what to look at."""
    fake.on["bootstrap"] = answer
    assert hint in str(refused(make(fake, install_token=INSTALL)))


@pytest.mark.parametrize("status", [402])
def test_a_plan_limit(status: int, fake: Fake, make: Make) -> None:
    """A plan limit is raised as itself, with its facts."""
    fake.on["bootstrap"] = Answer(status, {"error": "plan", "required_plan": "pro", "upgrade_url": "https://x.test"})
    problem = refused(make(fake, install_token=INSTALL, api_key=API_KEY), PlanLimitError)
    assert problem.required_plan == "pro"
    assert fake.calls == ["bootstrap"]


@pytest.mark.parametrize("status", [401, 403, 410, 503])
@pytest.mark.parametrize("way", ["bootstrap", "refresh", "recover", "beat"])
def test_the_kill_switch(way: str, status: int, fake: Fake, make: Make) -> None:
    """The code of a revocation is read before the status, wherever it comes, with its reason and its time."""
    fake.on[way] = Answer(
        status, {"code": "INSTALLATION_REVOKED", "message": "compromised", "shutdown_timeout_ms": 2500}
    )
    given: Dict[str, Dict[str, Any]] = {
        "bootstrap": {"install_token": INSTALL, "api_key": API_KEY},
        "refresh": {"installation_id": "i", "refresh_token": "skf_given", "install_token": INSTALL},
        "recover": {"api_key": API_KEY},
        "beat": {"runtime_token": "skr_given", "install_token": INSTALL},
    }
    auth = make(fake, **given[way])
    with pytest.raises(RevokedError) as caught:
        beat(auth)
    assert (caught.value.reason, caught.value.shutdown_timeout) == ("compromised", 2.5)
    assert_clean(caught.value, INSTALL, API_KEY, "skr_given", "skf_given")
    assert fake.calls == [way]


def test_a_body_that_is_echoed(fake: Fake, make: Make) -> None:
    """A platform that quotes the request in its error, as validating frameworks do, leaks no token through us."""
    for name in ("bootstrap", "refresh", "recover"):
        fake.on[name] = lambda request: Answer(
            422, {"error": "invalid", "message": f"bad input {request.body.decode()} {request.headers['X-API-Key']}"}
        )
    auth = make(fake, installation_id="i", refresh_token="skf_given", install_token=INSTALL, api_key=API_KEY)
    assert "***" in str(refused(auth))


# -- what passes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [408, 425, 429, 500, 503])
def test_a_passing_failure_is_tried_again(status: int, fake: Fake, make: Make) -> None:
    """A failure that may pass is tried again with the same idempotency key until it has passed."""
    answers = iter([error(status), error(status)])
    fake.on["bootstrap"] = lambda request: next(answers, None) or fake.grant()
    auth = make(fake, install_token=INSTALL)
    assert token(auth.snapshot(patience())) == "skr_runtime_1"
    keys = {request.headers["Idempotency-Key"] for request in fake.requests("bootstrap")}
    assert len(fake.requests("bootstrap")) == 3
    assert len(keys) == 1


def test_a_failure_that_does_not_pass_in_time(fake: Fake, make: Make) -> None:
    """A failure that lasts until the deadline may pass later: the ways behind it are not used up for it."""
    fake.on["refresh"] = error(503, "BUSY", "come back")._replace(headers=[("Retry-After", "300")])
    auth = make(fake, installation_id="i", refresh_token="skf_given", install_token=INSTALL)
    with pytest.raises(TransportError, match=r"failed for now: .*/refresh: HTTP 503 BUSY: come back") as caught:
        auth.snapshot(patience())
    assert_clean(caught.value, "skf_given", INSTALL)
    assert fake.calls == ["refresh"]
    with refusing_url() as url:
        with pytest.raises(TransportError, match="refused"):
            make(url, install_token=INSTALL).snapshot(Deadline(0.05))


def test_a_stop_ends_a_login(fake: Fake, make: Make) -> None:
    """A stop ends the wait between two tries."""
    stop = threading.Event()

    def busy(request: Request) -> Answer:
        stop.set()
        return Answer(503, b"", [("Retry-After", "20")])

    fake.on["bootstrap"] = busy
    auth = make(fake, install_token=INSTALL, stop=stop)
    with pytest.raises(SekuireError) as caught:
        auth.snapshot(patience())
    assert isinstance(caught.value, (Interrupted, TransportError))
    assert fake.calls == ["bootstrap"]


def test_a_lost_answer_is_repeated() -> None:
    """A refresh whose answer was lost is sent again with the same token and key, and the platform repeats itself."""
    with LocalPlatform() as platform:
        first = platform.create_install_token(AGENT)
        store = RuntimeCredentialsStore()
        config = AgentConfig(api_base_url=platform.url, agent_id=AGENT, install_token=first)
        client = HttpClient(config)
        auth = Authenticator(Login(config, client, store, stop=threading.Event(), runtime_info={}))
        before = auth.snapshot(patience())
        assert before.credentials.refresh_token is not None
        # The answer is lost: what it brought is not stored.
        path = config.endpoints.path("refresh", installation_id=before.credentials.installation_id or "")
        secret = before.credentials.refresh_token
        key = key_of(auth, "refresh", secret.reveal())
        lost = client.request("POST", path, body=protocol.refresh_body(secret), idempotency_key=key).json()
        after = auth.rejected(before.generation, patience())
        client.close()
        assert token(after) == lost["runtime_token"]
        assert after.credentials.refresh_token == Secret(lost["refresh_token"])
        assert platform.count("bootstrap") == 1


# -- whose answer it is -----------------------------------------------------------------------------------------------


class Waits(threading.Event):
    """A stop event whose waits take no time and are noted; after ``most`` of them it stops."""

    def __init__(self, most: int = 1000) -> None:
        super().__init__()
        self.seconds: List[float] = []
        self._most = most

    def wait(self, timeout: Optional[float] = None) -> bool:
        assert timeout is not None
        self.seconds.append(timeout)
        if len(self.seconds) >= self._most:
            self.set()
        return self.is_set()


PAGE = [("Content-Type", "text/html; charset=utf-8")]
PAGES = [
    *(Answer(status, b"<html><h1>not here</h1></html>", PAGE) for status in (200, 400, 401, 403, 404, 409, 410, 422)),
    Answer(404, b"404 page not found\n", [("Content-Type", "text/plain")]),
    Answer(404),
    Answer(401, b"[]", [("Content-Type", "application/json")]),
    Answer(200, {"status": "ok"}, [("Content-Type", "application/json")]),
    Answer(201, {"runtime_token": "a b"}, [("Content-Type", "application/json")]),
    Answer(302, b"", [("Location", "https://portal.test/")]),
    Answer(503, b"<html>maintenance</html>", PAGE),
]
METHODS: Dict[str, Dict[str, Any]] = {
    "refresh": {"installation_id": "i", "refresh_token": "skf_given", "install_token": INSTALL, "api_key": API_KEY},
    "bootstrap": {"install_token": INSTALL, "api_key": API_KEY},
    "recover": {"api_key": API_KEY},
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.status}-{page.data()[:12].decode()}")
@pytest.mark.parametrize("method", list(METHODS))
def test_no_page_of_another_server_condemns_credentials(method: str, page: Answer, fake: Fake, make: Make) -> None:
    """Once the platform has answered, a page of something in between is retried, whatever its status.

    The credentials it was an answer to are used again, and those behind them are not touched.
    """
    auth = make(fake, stop=Waits(), **METHODS[method])
    if method != "refresh":
        # No refresh token comes with it, so the same method is needed again.
        fake.on[method] = lambda request: fake.grant(refresh_token=None)
        auth.snapshot(patience())
    pages = iter([page, page])
    fake.on[method] = lambda request: next(pages, None) or fake.grant()
    before = len(fake.calls)
    snapshot = auth.rejected(auth.store.generation, patience())
    assert snapshot.credentials.runtime_token is not None
    assert fake.calls[before:] == [method] * 3
    assert len(set(keys(fake, method))) == 1


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.status not in (401, 503)], ids=lambda page: page.status
)
@pytest.mark.parametrize("method", ["bootstrap", "recover"])
def test_another_server_at_the_first_login_is_fatal(method: str, page: Answer, fake: Fake, make: Make) -> None:
    """Before the first success such an answer ends the login and is quoted: the URL is probably wrong."""
    fake.on[method] = page
    problem = refused(make(fake, **METHODS[method]))
    assert f"{fake.url}/api/v1/installations/{method}" in str(problem)
    assert "api_base_url" in str(problem)
    assert "endpoints=" in str(problem)
    assert problem.status == page.status
    if page.headers == PAGE:
        assert str(problem).startswith("that is another server: ")
        assert f"/installations/{method} answered {page.status}, text/html: it says " in str(problem)
        assert "'not here'" in str(problem)
    # The next method would go to the same server.
    assert fake.calls == [method]


@pytest.mark.parametrize("status", [401, 408, 425, 429, 500, 502, 503])
def test_a_page_that_may_pass_is_retried_at_the_first_login(status: int, fake: Fake, make: Make) -> None:
    """Maintenance pages, and a 401 of something in between, are waited for from the beginning."""
    pages = iter([Answer(status, b"<html>wait</html>", PAGE)] * 2)
    fake.on["bootstrap"] = lambda request: next(pages, None) or fake.grant()
    assert token(make(fake, install_token=INSTALL, stop=Waits()).snapshot(patience())) == "skr_runtime_1"
    assert fake.calls == ["bootstrap"] * 3


def test_the_retry_after_of_another_server_is_honoured(fake: Fake, make: Make) -> None:
    """A page that says when to come back is not asked again sooner; past the deadline the error says when."""
    pages = iter([Answer(404, b"<html>", [*PAGE, ("Retry-After", "7")])] * 2)
    fake.on["refresh"] = lambda request: next(pages, None) or fake.grant()
    waits = Waits()
    make(fake, installation_id="i", refresh_token="skf_given", stop=waits).snapshot(patience())
    assert waits.seconds == [7.0, 7.0]
    soon = Deadline(GUARD / 2)
    pages = iter([Answer(404, b"<html>", [*PAGE, ("Retry-After", "300")])])
    problem = refused(make(fake, installation_id="i", refresh_token="skf_given"), TransportError, soon)
    assert problem.retry_after == 300.0


def test_an_echo_in_a_page_shows_no_token(fake: Fake, make: Make) -> None:
    """A page that quotes the request leaks no token through the error that quotes it."""
    fake.on["bootstrap"] = lambda request: Answer(403, b"<p>blocked: " + request.body + b"</p>", PAGE)
    assert "***" in str(refused(make(fake, install_token=INSTALL)))


# -- grants that are of no use ----------------------------------------------------------------------------------------


def expired() -> str:
    return protocol.format_time(dt.datetime.now(dt.timezone.utc) - dt.timedelta(minutes=1))


@pytest.mark.parametrize("method", list(METHODS))
def test_an_expired_grant_is_a_refusal(method: str, fake: Fake, make: Make) -> None:
    """A login that brings a token which has expired by the platform's own clock is refused: the next method follows."""
    fake.on[method] = lambda request: fake.grant(expires_at=expired())
    auth = make(fake, **METHODS[method])
    follower = {"refresh": "bootstrap", "bootstrap": "recover"}.get(method)
    if follower is not None:
        auth.snapshot(patience())
        assert fake.calls == [method, follower]
        return
    assert "has expired already" in str(refused(auth))
    assert "has expired already" in str(refused(auth))
    assert fake.calls == [method]


@pytest.mark.parametrize("method", list(METHODS))
def test_a_repeated_grant_is_a_refusal(method: str, fake: Fake, make: Make) -> None:
    """A login that brings the token which the platform has just refused is a refusal, and is not tried again."""
    fake.on.update({method: lambda request: Answer(201, grant_of(7, refresh_token=None)), "beat": error(401)})
    auth = make(fake, runtime_token="skr_runtime_7", **{"installation_id": "i", **METHODS[method]})
    follower = {"refresh": "bootstrap", "bootstrap": "recover"}.get(method)
    if follower is not None:
        assert token(auth.rejected(auth.store.generation, patience())) == "skr_runtime_1"
        assert fake.calls == [method, follower]
        return
    for _ in range(3):
        with pytest.raises(AuthenticationError):
            beat(auth)
    assert fake.calls == ["beat", method, "beat", "beat"]


def test_another_servers_401_condemns_nothing(fake: Fake, make: Make) -> None:
    """A 401 that is not the platform's starts a renewal; the same token again is then no refusal."""
    page = Answer(401, b"<html>log in</html>", PAGE)
    same = {"installation_id": "i", "runtime_token": "skr_same", "refresh_token": "skf_given"}
    fake.on.update(beat=page, refresh=Answer(200, {"runtime_token": "skr_same"}))
    auth = make(fake, **same, stop=Waits())
    for _ in range(3):
        assert beat(auth)[0].status == 401
    assert fake.calls == ["beat", "refresh", "beat"] * 3
    fake.on["beat"] = Answer(200, {})
    assert beat(auth)[0].status == 200


def test_another_servers_401_and_a_provider(fake: Fake, make: Make) -> None:
    """A provider may give the same token again where the platform has not refused it."""
    fake.on["beat"] = Answer(401, b"<html>log in</html>", PAGE)
    auth = make(fake, token_provider=lambda: "skr_same", stop=Waits())
    assert beat(auth)[0].status == 401
    fake.on["beat"] = Answer(200, {})
    assert beat(auth)[0].status == 200


@pytest.mark.parametrize(
    "given", [{}, {"installation_id": "i", "refresh_token": "skf_given"}], ids=["alone", "refresh"]
)
def test_another_servers_401_to_a_token_that_cannot_be_renewed(given: Dict[str, str], fake: Fake, make: Make) -> None:
    """Without anything to renew it with, a token that the platform has not refused is kept."""
    fake.on.update(beat=Answer(401, b"<html>log in</html>", PAGE), refresh=error(401))
    auth = make(fake, runtime_token="skr_given", **given)
    for _ in range(2):
        with pytest.raises(TransportError, match="another server answered 401"):
            beat(auth)
    fake.on["beat"] = Answer(200, {})
    assert beat(auth)[0].status == 200


def test_a_useless_grant_does_not_close_its_method(fake: Fake, make: Make) -> None:
    """Once the credentials have changed, the method that brought a useless grant is tried again."""
    fake.on["refresh"] = Answer(200, {"runtime_token": "skr_same"})
    auth = make(fake, installation_id="i", runtime_token="skr_same", refresh_token="skf_given", install_token=INSTALL)
    auth.rejected(auth.store.generation, patience())
    assert fake.calls == ["refresh", "bootstrap"]
    auth.store.update(RuntimeCredentials(installation_id="i", runtime_token="skr_other", refresh_token="skf_given"))
    assert token(auth.rejected(auth.store.generation, patience())) == "skr_same"
    assert fake.calls == ["refresh", "bootstrap", "refresh"]


# -- grants that are refused at once ----------------------------------------------------------------------------------


def test_logins_whose_tokens_are_refused_at_once_back_off(
    fake: Fake, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A platform that grants tokens and refuses them is logged in to at growing intervals, by all who share a store."""
    from sekuire.credentials import store as store_module

    monkeypatch.setattr(store_module, "full_jitter", lambda count, first, longest: min(longest, first * 2.0**count))
    fake.on["beat"] = error(401)
    store, waits = RuntimeCredentialsStore(), Waits()
    auths = [make(fake, install_token=INSTALL, store=store, stop=waits) for _ in range(2)]
    for number in range(12):
        assert beat(auths[number % 2], Deadline(1000.0))[0].status == 401
    # The first login, and the one that replaces its token, are made at once.
    assert fake.calls.count("bootstrap") + fake.calls.count("refresh") == 13
    expected = [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 60.0, 60.0]
    assert waits.seconds == pytest.approx(expected, abs=SLACK / 100)


def test_whoever_cannot_wait_for_the_next_login_learns_when_it_is(
    fake: Fake, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A caller whose deadline comes first logs in no more than others do, and learns how long to wait."""
    from sekuire.credentials import store as store_module

    monkeypatch.setattr(store_module, "full_jitter", lambda count, first, longest: longest)
    fake.on["beat"] = error(401)
    auth = make(fake, install_token=INSTALL)
    beat(auth)
    for _ in range(5):
        with pytest.raises(TransportError, match="refused at its first use") as caught:
            beat(auth, Deadline(30.0))
        assert caught.value.retryable
        assert caught.value.retry_after is not None
    assert fake.calls.count("bootstrap") + fake.calls.count("refresh") == 2


def test_a_stop_ends_the_wait_for_the_next_login(fake: Fake, make: Make) -> None:
    """A stop ends the delay before a login, and no login follows."""
    fake.on["beat"] = error(401)
    waits = Waits(most=3)
    auth = make(fake, install_token=INSTALL, stop=waits)
    with pytest.raises(Interrupted):
        for _ in range(10):
            beat(auth, Deadline(1000.0))
    assert len(waits.seconds) == 3
    assert fake.calls.count("bootstrap") + fake.calls.count("refresh") == 4


def test_tokens_that_were_accepted_are_renewed_without_delay(fake: Fake, make: Make) -> None:
    """A token that worked and is refused later, as at a restart of the platform, is replaced at once, however often."""
    waits = Waits()
    auth = make(fake, install_token=INSTALL, stop=waits)
    for _ in range(10):
        assert beat(auth)[0].status == 200
        auth.rejected(auth.store.generation, patience())
    assert fake.calls.count("refresh") == 10
    assert waits.seconds == []


# -- replicas ---------------------------------------------------------------------------------------------------------


def keys(fake: Fake, name: str = "bootstrap") -> List[str]:
    return [request.headers["Idempotency-Key"] for request in fake.requests(name)]


def test_two_replicas_with_one_token_are_two_installations(make: Make) -> None:
    """Each replica gets an installation of its own; once the token is used up, the next one is refused."""
    with LocalPlatform() as platform:
        install_token = platform.create_install_token(AGENT, max_uses=2)
        found = [make(platform, install_token=install_token).snapshot(patience()) for _ in range(2)]
        assert len({snapshot.credentials.installation_id for snapshot in found}) == 2
        assert len(platform.installations()) == 2
        assert refused(make(platform, install_token=install_token)).code == "INSTALL_TOKEN_CONSUMED"


@pytest.mark.parametrize("kept", [False, True], ids=["memory", "file"])
def test_retries_of_one_holder_are_one_installation(kept: bool, path: pathlib.Path, make: Make) -> None:
    """A login whose answer was lost is repeated under the same key and uses the token once.

    With a credentials file this holds for a process that was killed before it stored the answer.
    """
    with LocalPlatform() as platform:
        install_token = platform.create_install_token(AGENT)
        store = RuntimeCredentialsStore(path=path if kept else None)
        first = make(platform, install_token=install_token, store=store).snapshot(patience())
        if kept:
            path.unlink()
            store = RuntimeCredentialsStore(path=path)
        else:
            store.clear()
        again = make(platform, install_token=install_token, store=store).snapshot(patience())
        assert again.credentials.installation_id == first.credentials.installation_id
        assert platform.count("bootstrap", 201) == 2
        assert len(platform.installations()) == 1


def test_the_holder_is_on_disk_before_a_token_is_spent(path: pathlib.Path, fake: Fake, make: Make) -> None:
    """When the login arrives the holder is beside the credentials file, and readable by its owner only."""
    holder = path.with_name("credentials.json.holder")
    seen: List[Tuple[str, int]] = []

    def look(request: Request) -> Answer:
        seen.append((holder.read_text(), holder.stat().st_mode & 0o777))
        return fake.grant()

    fake.on["bootstrap"] = look
    previous = os.umask(0)
    try:
        auth = make(fake, install_token=INSTALL, store=RuntimeCredentialsStore(path=path))
        auth.snapshot(patience())
    finally:
        os.umask(previous)
    [(text, mode)] = seen
    assert len(bytes.fromhex(text)) == 16
    assert mode == 0o600 or os.name != "posix"
    assert keys(fake) == [protocol.idempotency_key("bootstrap", Secret(INSTALL), AGENT, text.strip())]


def test_no_token_is_spent_where_its_credentials_could_not_be_kept(
    path: pathlib.Path, fake: Fake, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a full disk the install token is not sent; the login goes on once there is room.

    A holder that is there already does not make the disk writable. A refresh token is not used up, so it is sent.
    """
    from sekuire._internal import files

    def fail(path: str, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    for seed in ({"install_token": INSTALL}, {"install_token": "skt_later"}):
        auth = make(fake, store=RuntimeCredentialsStore(path=path), **seed)
        with monkeypatch.context() as patched:
            patched.setattr(files, "replace", fail)
            problem = refused(auth, TransportError)
        assert "No space left on device" in str(problem)
        assert "install token is not used" in str(problem)
        assert str(path) in str(problem)
        assert problem.retryable
    assert fake.calls == []
    auth.snapshot(patience())
    with monkeypatch.context() as patched:
        patched.setattr(files, "replace", fail)
        auth.rejected(auth.store.generation, patience())
    assert fake.calls == ["bootstrap", "refresh"]


def test_a_mounted_seed_has_the_holder_of_its_store(
    path: pathlib.Path, fake: Fake, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replicas that read one file which they cannot write have a holder each, and write nothing beside it."""
    from sekuire.credentials import file as file_module

    RuntimeCredentialsStore(path=path).update(RuntimeCredentials(installation_id="i", refresh_token="skf_seed"))
    before = sorted(os.listdir(path.parent))
    monkeypatch.setattr(file_module, "_can_write", lambda where: False)
    for _ in range(2):
        make(fake, store=RuntimeCredentialsStore(path=path)).snapshot(patience())
    assert len(set(keys(fake, "refresh"))) == 2
    assert sorted(os.listdir(path.parent)) == before


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"short", b"x" * 64, b"no/hex" * 5 + b"no"])
def test_a_damaged_holder_is_replaced(content: bytes, path: pathlib.Path, fake: Fake, make: Make) -> None:
    """What is in the place of the holder and is not one is replaced; then it stays."""
    holder = path.with_name("credentials.json.holder")
    holder.write_bytes(content)
    holder.chmod(0o600)
    auth = make(fake, installation_id="i", refresh_token="skf_one", store=RuntimeCredentialsStore(path=path))
    auth.snapshot(patience())
    text = holder.read_bytes()
    assert text != content
    auth.rejected(auth.store.generation, patience())
    assert holder.read_bytes() == text


@pytest.mark.skipif(os.name != "posix", reason="needs modes")
def test_a_holder_that_others_can_read_is_refused(path: pathlib.Path, fake: Fake, make: Make) -> None:
    """A holder that others could have planted is refused like such a credentials file, before anything is sent."""
    holder = path.with_name("credentials.json.holder")
    holder.write_text("0" * 32)
    holder.chmod(0o644)
    with pytest.raises(ConfigurationError, match=f"chmod 600 {holder}"):
        RuntimeCredentialsStore(path=path)
    holder.chmod(0o600)
    auth = make(fake, install_token=INSTALL, store=RuntimeCredentialsStore(path=path))
    holder.chmod(0o644)
    with pytest.raises(ConfigurationError, match=f"chmod 600 {holder}"):
        auth.snapshot(patience())
    assert fake.calls == []


_MOUNTED_LATER = """
import subprocess, sys, threading
from sekuire._internal.threads import Deadline
from sekuire.config import AgentConfig
from sekuire.credentials import Authenticator, RuntimeCredentialsStore
from sekuire.credentials.login import Login
from sekuire.errors import SekuireError
from sekuire.transport.http import HttpClient
url, path = sys.argv[1:]
open(path, "w").close()
subprocess.run(["chmod", "600", path], check=True)
config = AgentConfig(api_base_url=url, agent_id="agent-1", install_token="skt_one")
store = RuntimeCredentialsStore(path=path)
auth = Authenticator(Login(config, HttpClient(config), store, stop=threading.Event(), runtime_info={}))
subprocess.run(["mount", "--bind", path, path], check=True)
try:
    auth.snapshot(Deadline(60))
except SekuireError as error:
    print(type(error).__name__, error)
subprocess.run(["umount", path], check=True)
auth.snapshot(Deadline(60))
"""


def test_the_file_itself_must_be_replaceable(path: pathlib.Path, fake: Fake) -> None:
    """That its directory can be written is not enough to use the install token: the file can be a mount of its own."""
    output = in_mounts(_MOUNTED_LATER, fake.url, str(path))
    assert output.startswith("TransportError cannot replace the credentials file")
    assert "the install token is not used" in output
    assert "mount the directory that it is in" in output
    # The second try, when it could be replaced.
    assert fake.calls == ["bootstrap"]


def test_an_install_token_is_not_spent_for_a_file_that_is_only_read(
    path: pathlib.Path, fake: Fake, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A restart would find the old content and need another token. What spends nothing is used all the same."""
    from sekuire.credentials import file as file_module

    RuntimeCredentialsStore(path=path).update(RuntimeCredentials(installation_id="i", refresh_token="skf_seed"))
    monkeypatch.setattr(file_module, "_can_write", lambda where: False)
    fake.on["refresh"] = error(401)
    auth = make(fake, install_token=INSTALL, store=RuntimeCredentialsStore(path=path))
    auth.store.seed(RuntimeCredentials(installation_id="i", refresh_token="skf_seed"), None)
    problem = refused(auth, AuthenticationError)
    assert "the install token is not used" in str(problem)
    assert "bootstrap" not in fake.calls
    auth = make(fake, install_token=INSTALL, api_key="skp_key", store=RuntimeCredentialsStore(path=path))
    auth.snapshot(patience())
    assert fake.calls[-1] == "recover"


def test_a_refresh_token_waits_for_a_file_that_can_be_written(
    path: pathlib.Path, fake: Fake, make: Make, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """While the token lives it is not rotated on a full disk; a token that has expired is, and kept in memory."""
    from sekuire._internal import files

    fake.lifetime = 1000.0
    auth = make(fake, install_token=INSTALL, store=RuntimeCredentialsStore(path=path))
    auth.snapshot(patience())

    def fail(path: str, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(files, "replace", fail)
        for left in (155, 55):
            clock.ahead = 1000.0 - left
            assert token(auth.snapshot(patience())) == "skr_runtime_1"
            until(lambda: "the refresh token is not used" in caplog.text and not auth.is_renewing)
        assert fake.calls == ["bootstrap"]
        clock.ahead = 1010.0
        assert token(auth.snapshot(patience())) == "skr_runtime_2"
        assert fake.calls == ["bootstrap", "refresh"]
    assert "kept in memory only" in caplog.text


_FORKED = """
import os, sys, threading, warnings
warnings.simplefilter("ignore", DeprecationWarning)
from sekuire.config import AgentConfig
from sekuire.credentials import Authenticator, RuntimeCredentialsStore
from sekuire.credentials.login import Login
from sekuire._internal.threads import Deadline
from sekuire.transport.http import HttpClient
url, install_token = sys.argv[1:]
config = AgentConfig(api_base_url=url, agent_id="agent-1", install_token=install_token)
store = RuntimeCredentialsStore()
store.holder()
def log_in():
    auth = Authenticator(Login(config, HttpClient(config), store, stop=threading.Event(), runtime_info={}))
    return auth.snapshot(Deadline(60)).credentials.installation_id
child = os.fork()
if child == 0:
    print(log_in(), flush=True)
    os._exit(0)
os.waitpid(child, 0)
print(log_in(), flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork()")
def test_a_forked_child_is_an_installation_of_its_own() -> None:
    """A child that inherited a store without a file logs in as another holder than its parent."""
    with LocalPlatform() as platform:
        install_token = platform.create_install_token(AGENT, max_uses=2)
        lines = run_python(_FORKED, platform.url, install_token, forks=True).stdout.split()
        assert len(set(lines)) == 2
        assert len(platform.installations()) == 2


# -- 401 --------------------------------------------------------------------------------------------------------------


def test_a_401_is_one_refresh_and_one_replay(fake: Fake, make: Make) -> None:
    """A call that is refused is repeated once with new credentials, the same body and key; a second 401 is final."""
    fake.on["beat"] = lambda request: Answer(200 if request.headers["Authorization"].endswith("_2") else 401)
    auth = make(fake, install_token=INSTALL)
    reply, snapshot = auth.request(
        "POST", lambda one: f"/api/v1/{one.generation}/beat", body=b'{"a":1}', idempotency_key="k", deadline=patience()
    )
    assert reply.status == 200
    assert token(snapshot) == "skr_runtime_2"
    assert fake.calls == ["bootstrap", "beat", "refresh", "beat"]
    first, second = fake.requests("beat")
    assert first.path != second.path
    assert (first.body, first.headers["Idempotency-Key"]) == (second.body, second.headers["Idempotency-Key"])
    fake.on["beat"] = error(401)
    reply, _ = beat(auth)
    assert reply.status == 401
    assert fake.calls[4:] == ["beat", "refresh", "beat"]


def test_64_threads_that_get_401_together() -> None:
    """64 threads whose token ends at the same moment cause one refresh, and all get through."""
    count = 64
    with LocalPlatform() as platform:
        config = AgentConfig(
            api_base_url=platform.url, agent_id=AGENT, install_token=platform.create_install_token(AGENT)
        )
        client = HttpClient(config, pool_size=count)
        store = RuntimeCredentialsStore()
        auth = Authenticator(Login(config, client, store, stop=threading.Event(), runtime_info={}))
        old = auth.snapshot(patience())
        platform.expire_tokens()
        together = threading.Barrier(count)
        statuses: List[Any] = []

        def path_of(snapshot: Snapshot) -> str:
            if snapshot is old:
                together.wait(GUARD)
            return config.endpoints.path("heartbeat", installation_id=snapshot.credentials.installation_id or "")

        def call() -> None:
            try:
                reply, _ = auth.request(
                    "POST", path_of, body=protocol.heartbeat_body("healthy", 1, {}, (), ()), deadline=patience()
                )
                statuses.append(reply.status)
            except BaseException as problem:
                statuses.append(problem)

        threads = [threading.Thread(target=call) for _ in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(GUARD)
        client.close()
        assert statuses == [200] * count
        assert platform.count("heartbeat", 401) == count
        assert platform.count("heartbeat", 200) == count
        assert platform.count("refresh") == 1
        assert store.generation == old.generation + 1


# -- several that renew together --------------------------------------------------------------------------------------


class Refusing:
    """Refreshes of a scripted platform that are refused once the test lets them be."""

    def __init__(self, scripted: Scripted) -> None:
        self.entered, self.release = threading.Event(), threading.Event()
        scripted.on["refresh"] = self._answer

    def _answer(self, request: Any) -> Any:
        self.entered.set()
        assert self.release.wait(GUARD)
        return 401, {"error": "dead", "message": "unknown refresh token"}


class Calls:
    """The same call in several threads; what each got, or the error that it got."""

    def __init__(self, call: Callable[[], Snapshot], count: int = 1) -> None:
        self._results: List[Any] = []
        self._call = call
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def _run(self) -> None:
        try:
            self._results.append(self._call())
        except BaseException as problem:
            self._results.append(problem)

    def finish(self) -> List[Any]:
        for thread in self._threads:
            thread.join(GUARD)
        assert len(self._results) == len(self._threads)
        return self._results


def waiting_for(store: RuntimeCredentialsStore, count: int) -> bool:
    """Return True if ``count`` threads wait for the renewal in progress."""
    return store.renewals.waiting == count


def granting(scripted: Scripted, lifetime: float) -> None:
    """Bootstraps whose tokens are numbered; the first of them lives so long."""

    def bootstrap(request: Any) -> Any:
        number = scripted.count("bootstrap")
        end = dt.datetime.now(dt.timezone.utc) + dt.timedelta(seconds=lifetime)
        fields = {"expires_at": protocol.format_time(end)} if number == 1 else {}
        return 201, scripted_grant(f"skr_{number}", refresh_token=f"skf_{number}", **fields)

    scripted.on["bootstrap"] = bootstrap


@pytest.mark.parametrize("count", [1, 64])
def test_a_refused_early_renewal_is_not_the_end_of_who_has_other_ways(
    count: int, scripted: Scripted, make: Make, clock: Clock
) -> None:
    """Threads whose 401 meets a background refresh that is refused go on to the install token, in one bootstrap."""
    granting(scripted, 1000.0)
    refusing = Refusing(scripted)
    auth = make(scripted, install_token=INSTALL)
    old = auth.snapshot(patience())
    clock.ahead = 1000.0 - 155
    assert token(auth.snapshot(patience())) == "skr_1"
    assert refusing.entered.wait(GUARD)
    calls = Calls(lambda: auth.rejected(old.generation, patience()), count)
    until(lambda: waiting_for(auth.store, count))
    refusing.release.set()
    assert [token(one) if isinstance(one, Snapshot) else one for one in calls.finish()] == ["skr_2"] * count
    assert (scripted.count("refresh"), scripted.count("bootstrap")) == (1, 2)


def two_of_one_store(
    scripted: Scripted, make: Make
) -> Tuple[Refusing, RuntimeCredentialsStore, Authenticator, Authenticator]:
    """Two agents on one store, whose refresh is refused: one without another way, one with an install token."""
    refusing = Refusing(scripted)
    given = RuntimeCredentials(installation_id="inst-1", runtime_token="skr_given", refresh_token="skf_given")
    store = RuntimeCredentialsStore(given)
    return refusing, store, make(scripted, store=store), make(scripted, store=store, install_token=INSTALL)


def test_two_of_one_store_with_other_ways(scripted: Scripted, make: Make) -> None:
    """Of two agents on one store, the one with an install token uses it though the other's renewal was refused."""
    refusing, store, poor, rich = two_of_one_store(scripted, make)
    used = store.generation
    leader = Calls(lambda: poor.rejected(used, patience()))
    assert refusing.entered.wait(GUARD)
    waiter = Calls(lambda: rich.rejected(used, patience()))
    until(lambda: waiting_for(store, 1))
    refusing.release.set()
    assert [type(one) for one in leader.finish()] == [AuthenticationError]
    assert [token(one) if isinstance(one, Snapshot) else one for one in waiter.finish()] == ["rt-1"]
    # The other one goes on with what this one got.
    assert token(poor.snapshot(patience())) == "rt-1"
    assert scripted.count("bootstrap") == 1


def test_a_success_is_shared_by_two_of_one_store(scripted: Scripted, make: Make) -> None:
    """What one agent of a store gets by its own ways serves the other, which asks for nothing."""
    refusing, store, poor, rich = two_of_one_store(scripted, make)
    used = store.generation
    leader = Calls(lambda: rich.rejected(used, patience()))
    assert refusing.entered.wait(GUARD)
    waiter = Calls(lambda: poor.rejected(used, patience()))
    until(lambda: waiting_for(store, 1))
    refusing.release.set()
    for calls in (leader, waiter):
        assert [token(one) if isinstance(one, Snapshot) else one for one in calls.finish()] == ["rt-1"]
    assert (scripted.count("refresh"), scripted.count("bootstrap")) == (1, 1)


def test_a_late_refresh_does_not_repeat_a_refusal(scripted: Scripted, make: Make, clock: Clock) -> None:
    """A refresh token that the platform called dead meanwhile is not sent again; the live token is served."""
    granting(scripted, 1000.0)
    refusing = Refusing(scripted)
    auth = make(scripted, install_token=INSTALL)
    old = auth.snapshot(patience())
    scripted.on["bootstrap"] = lambda request: (409, {"error": "consumed"})
    leader = Calls(lambda: auth.rejected(old.generation, patience()))
    assert refusing.entered.wait(GUARD)
    clock.ahead = 1000.0 - 55
    waiter = Calls(lambda: auth.snapshot(patience()))
    until(lambda: waiting_for(auth.store, 1))
    refusing.release.set()
    assert [type(one) for one in leader.finish()] == [AuthenticationError]
    assert waiter.finish() == [old]
    assert scripted.count("refresh") == 1


# -- keeping fresh ----------------------------------------------------------------------------------------------------


def test_a_fresh_token_is_left_alone(fake: Fake, make: Make, clock: Clock) -> None:
    """Until a fifth of the lifetime is left nothing is renewed."""
    auth = make(fake, install_token=INSTALL)
    auth.snapshot(patience())
    clock.ahead = HOUR - 301
    assert token(auth.snapshot(patience())) == "skr_runtime_1"
    assert fake.calls == ["bootstrap"]


def test_an_early_refresh_is_in_the_background(fake: Fake, make: Make, clock: Clock) -> None:
    """With little of its lifetime left the token is renewed by one thread in the background, and served meanwhile."""
    fake.lifetime = 1000.0
    auth = make(fake, install_token=INSTALL)
    auth.snapshot(patience())
    entered, release = threading.Event(), threading.Event()

    def slow(request: Request) -> Answer:
        entered.set()
        assert release.wait(GUARD)
        return fake.grant()

    fake.on["refresh"] = slow
    clock.ahead = 1000.0 - 155
    for _ in range(5):
        assert token(auth.snapshot(patience())) == "skr_runtime_1"
    assert entered.wait(GUARD)
    assert token(auth.snapshot(patience())) == "skr_runtime_1"
    # The new token counts from the real clock: to one that is ahead it would be old at once.
    clock.ahead = 0.0
    release.set()
    until(lambda: token(auth.snapshot(patience())) == "skr_runtime_2")
    assert fake.calls == ["bootstrap", "refresh"]


@pytest.mark.parametrize(("jitter", "early"), [(0.0, 200.0), (0.1, 180.0), (0.2, 160.0)])
def test_the_early_window_is_spread(jitter: float, early: float) -> None:
    """The early window begins at a fifth of the lifetime, less the jitter of these credentials."""
    snapshot = Snapshot(generation=1, credentials=RuntimeCredentials(), lifetime=1000.0, jitter=jitter)
    assert is_fresh(snapshot, early + 0.1)
    assert not is_fresh(snapshot, early - 0.1)
    long = Snapshot(generation=1, credentials=RuntimeCredentials(), lifetime=10 * HOUR, jitter=jitter)
    assert is_fresh(long, 300 * (1 - jitter) + 0.1)
    assert not is_fresh(long, 300 * (1 - jitter) - 0.1)
    assert all(0 <= Snapshot(generation=1, credentials=RuntimeCredentials()).jitter <= 0.2 for _ in range(50))


@pytest.mark.parametrize("lifetime", [1000.0, HOUR])
def test_a_late_refresh_is_waited_for(lifetime: float, fake: Fake, make: Make, clock: Clock) -> None:
    """Shortly before its end the token is renewed before it is handed out."""
    fake.lifetime = lifetime
    auth = make(fake, install_token=INSTALL)
    auth.snapshot(patience())
    clock.ahead = lifetime - 55
    assert token(auth.snapshot(patience())) == "skr_runtime_2"
    assert fake.calls == ["bootstrap", "refresh"]


@pytest.mark.parametrize("left", [155, 55], ids=["early", "late"])
def test_a_failed_refresh_of_a_live_token(
    left: float, fake: Fake, make: Make, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """A renewal that fails while the token lives is no error: it is served, and tried again half a minute later."""
    fake.lifetime = 1000.0
    fake.on["refresh"] = error(422, "ODD", "not now")
    auth = make(fake, install_token=INSTALL)
    auth.snapshot(patience())
    clock.ahead = 1000.0 - left
    for _ in range(5):
        assert token(auth.snapshot(patience())) == "skr_runtime_1"
        until(lambda: "the present one still works" in caplog.text)
    assert fake.calls == ["bootstrap", "refresh"]
    clock.ahead += 29
    until(lambda: not auth.is_renewing)
    assert token(auth.snapshot(patience())) == "skr_runtime_1"
    assert fake.calls == ["bootstrap", "refresh"]
    clock.ahead += 8
    assert token(auth.snapshot(patience())) == "skr_runtime_1"
    until(lambda: fake.calls == ["bootstrap", "refresh", "refresh"])
    # A live token is not given up for a new installation.
    assert "bootstrap" not in fake.calls[1:]


def test_a_late_refresh_ends_with_the_callers_deadline(fake: Fake, make: Make, clock: Clock) -> None:
    """A caller with little time gets the live token when the renewal does not come in that time."""
    fake.lifetime = 1000.0
    auth = make(fake, install_token=INSTALL)
    auth.snapshot(patience())
    fake.on["refresh"] = error(503)
    clock.ahead = 1000.0 - 55
    assert token(auth.snapshot(Deadline(0.05))) == "skr_runtime_1"


def test_a_dead_refresh_token_is_not_tried_again_and_again(fake: Fake, make: Make, clock: Clock) -> None:
    """While the token lives, a refresh token that the platform called dead is left alone."""
    fake.lifetime = 1000.0
    fake.on["refresh"] = error(401)
    auth = make(fake, install_token=INSTALL)
    auth.snapshot(patience())
    clock.ahead = 1000.0 - 59
    for _ in range(2):
        assert token(auth.snapshot(patience())) == "skr_runtime_1"
        clock.ahead += 29
    assert fake.calls == ["bootstrap", "refresh"]


def test_an_expired_token_is_never_handed_out(fake: Fake, make: Make, clock: Clock) -> None:
    """A token past its end is renewed first, and where that fails there is an error instead of a token."""
    auth = make(fake, installation_id="inst-1", refresh_token="skf_given")
    auth.snapshot(patience())
    fake.on["refresh"] = error(503)
    clock.ahead = HOUR + 1
    for _ in range(2):
        with pytest.raises(TransportError):
            auth.snapshot(Deadline(0.01))
    del fake.on["refresh"]
    assert token(auth.snapshot(patience())) not in (None, "skr_runtime_1")


@pytest.mark.parametrize("refusal", [401, 422])
def test_a_token_that_ends_during_its_late_refresh(
    refusal: int, fake: Fake, make: Make, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """A token whose end comes while its renewal is refused is not handed out; the other ways are tried."""
    fake.lifetime = 1000.0
    auth = make(fake, install_token=INSTALL)
    auth.snapshot(patience())

    def slow(request: Request) -> Answer:
        clock.ahead = 1000.0 + 45
        return error(refusal)

    fake.on["refresh"] = slow
    clock.ahead = 1000.0 - 55
    assert token(auth.snapshot(patience())) == "skr_runtime_2"
    # One that the platform called dead is not sent again.
    assert fake.calls == ["bootstrap", "refresh", *(["refresh"] if refusal == 422 else []), "bootstrap"]
    assert "still works" not in caplog.text


def test_a_token_that_ends_with_nothing_to_replace_it(fake: Fake, make: Make, clock: Clock) -> None:
    """A token whose end comes while its renewal is refused, and behind which is no other way, is an error."""
    fake.lifetime = 1000.0
    auth = make(fake, installation_id="inst-1", refresh_token="skf_given")
    auth.snapshot(patience())

    def slow(request: Request) -> Answer:
        clock.ahead = 1000.0 + 45
        return error(401)

    fake.on["refresh"] = slow
    clock.ahead = 1000.0 - 55
    refused(auth)
    assert fake.calls == ["refresh", "refresh"]


def test_a_revocation_in_a_late_refresh(fake: Fake, make: Make, clock: Clock) -> None:
    """The kill switch is no failed refresh: it is raised though the token lives."""
    fake.lifetime = 1000.0
    auth = make(fake, install_token=INSTALL)
    auth.snapshot(patience())
    fake.on["refresh"] = error(403, "INSTALLATION_REVOKED", "leak")
    clock.ahead = 1000.0 - 55
    refused(auth, RevokedError)


def test_a_token_that_cannot_be_renewed_is_served(fake: Fake, make: Make, clock: Clock) -> None:
    """A live token with nothing to renew it is served to its end; then the other ways are tried."""
    fake.lifetime = 1000.0
    fake.on["bootstrap"] = lambda request: fake.grant(refresh_token=None)
    auth = make(fake, install_token=INSTALL)
    auth.snapshot(patience())
    clock.ahead = 1000.0 - 30
    assert token(auth.snapshot(patience())) == "skr_runtime_1"
    assert fake.calls == ["bootstrap"]
    clock.ahead = 1001.0
    assert token(auth.snapshot(patience())) == "skr_runtime_2"
    assert fake.calls == ["bootstrap", "bootstrap"]


def test_a_skewed_clock_does_not_matter(fake: Fake, make: Make) -> None:
    """The lifetime counts by the platform's Date, however wrong either clock is."""
    away = dt.datetime(2031, 1, 1, tzinfo=dt.timezone.utc)
    fake.on["bootstrap"] = lambda request: Answer(
        201, grant_of(1, expires_at="2031-01-01T01:00:00Z"), [("Date", "Wed, 01 Jan 2031 00:00:00 GMT")]
    )
    # The server adds a Date of its own, before ours; ours is the one to be read where there is one only.
    auth = make(fake, install_token=INSTALL)
    client = auth._http
    real = client.request

    def dated(*args: Any, **kwargs: Any) -> Any:
        reply = real(*args, **kwargs)
        return type(reply)(
            reply.status, {"Date": "Wed, 01 Jan 2031 00:00:00 GMT"}, reply.body, reply.sent_at, reply.sent_wall
        )

    client.request = dated  # type: ignore[method-assign]
    left = auth.snapshot(patience()).time_left()
    assert left is not None
    assert HOUR - SLACK < left <= HOUR
    assert auth.store.current.expires_at == away + dt.timedelta(hours=1)


def test_a_background_refresh_that_cannot_start(
    fake: Fake, make: Make, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no thread can be started any more, because the interpreter ends, the live token is served."""
    fake.lifetime = 1000.0
    auth = make(fake, install_token=INSTALL)
    auth.snapshot(patience())
    clock.ahead = 1000.0 - 155

    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", fail)
        assert token(auth.snapshot(patience())) == "skr_runtime_1"
    auth.snapshot(patience())
    until(lambda: fake.calls == ["bootstrap", "refresh"])


def test_a_background_refresh_that_is_interrupted_as_it_starts(
    fake: Fake, make: Make, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Ctrl-C while the background thread is started does not end the early refreshes for good."""
    fake.lifetime = 1000.0
    auth = make(fake, install_token=INSTALL)
    auth.snapshot(patience())
    clock.ahead = 1000.0 - 155

    def interrupt(thread: threading.Thread) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", interrupt)
        with pytest.raises(KeyboardInterrupt):
            auth.snapshot(patience())
    auth.snapshot(patience())
    until(lambda: fake.calls == ["bootstrap", "refresh"])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_during_a_background_refresh(fake: Fake, make: Make) -> None:
    """A child whose parent was renewing in the background does not wait for that renewal, or for its lock."""
    auth = make(fake, runtime_token="rt-1")
    auth.is_renewing = True
    with auth._lock:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                code = 0 if not auth.is_renewing and auth._lock.acquire(timeout=1.0) else 2
            finally:
                os._exit(code)
    auth.is_renewing = False
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_an_unforeseen_error_in_the_background(
    fake: Fake, make: Make, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """An error that nobody foresaw in a background renewal is logged, and the token served."""
    fake.lifetime = 1000.0
    auth = make(fake, install_token=INSTALL)
    auth.snapshot(patience())

    def fail(grant: Grant, sent_at: float) -> None:
        raise ZeroDivisionError

    auth.login.on_grant = fail
    clock.ahead = 1000.0 - 155
    assert token(auth.snapshot(patience())) == "skr_runtime_1"
    until(lambda: "renewing the runtime token failed" in caplog.text)


# -- heartbeats -------------------------------------------------------------------------------------------------------


def test_a_heartbeats_token(fake: Fake, make: Make) -> None:
    """A token that a heartbeat brought is used from then on; one for older credentials is not."""
    auth = make(fake, install_token=INSTALL)
    used = auth.snapshot(patience()).generation
    reply = HeartbeatReply(refreshed_token=Secret("skr_beat"), refreshed_token_lifetime=100.0)
    auth.accept_heartbeat(HeartbeatReply(), used, time.monotonic(), time.time())
    assert token(auth.snapshot(patience())) == "skr_runtime_1"
    auth.accept_heartbeat(reply, used, time.monotonic(), time.time())
    snapshot = auth.snapshot(patience())
    assert token(snapshot) == "skr_beat"
    assert snapshot.lifetime == 100.0
    late = HeartbeatReply(refreshed_token=Secret("skr_late"))
    auth.accept_heartbeat(late, used, time.monotonic(), time.time())
    assert token(auth.snapshot(patience())) == "skr_beat"


# -- token_provider ---------------------------------------------------------------------------------------------------


def test_a_provider_is_asked_first_and_after_a_401(fake: Fake, make: Make) -> None:
    """Without a token the provider is asked, and again after a 401; other ways come after it."""
    tokens = iter(["skr_one", "skr_two"])
    auth = make(fake, token_provider=lambda: next(tokens), install_token=INSTALL)
    assert token(auth.snapshot(patience())) == "skr_one"
    fake.on["beat"] = lambda request: Answer(200 if request.headers["Authorization"].endswith("two") else 401)
    reply, _ = beat(auth)
    assert reply.status == 200
    assert fake.calls == ["beat", "beat"]


def test_a_provider_with_an_installation(fake: Fake, make: Make) -> None:
    """The installation id given beside a provider is kept with its tokens."""
    auth = make(fake, token_provider=lambda: Secret("skr_one"), installation_id="inst-7")
    assert auth.snapshot(patience()).credentials.installation_id == "inst-7"


def test_a_provider_that_gives_the_refused_token(fake: Fake, make: Make) -> None:
    """A provider that gives the token just refused does not cause a loop."""
    fake.on["beat"] = error(401)
    auth = make(fake, token_provider=lambda: "skr_same")
    with pytest.raises(AuthenticationError, match="the same token") as caught:
        beat(auth)
    assert_clean(caught.value, "skr_same")
    assert fake.calls == ["beat"]


def leak() -> str:
    raise RuntimeError("skr_secret leaked")


def leave() -> str:
    sys.exit("skr_secret leaked")


def provide_nothing() -> None:
    return None


@pytest.mark.parametrize(
    ("provide", "problem"),
    [
        (leak, "RuntimeError"),
        (leave, "SystemExit"),
        (lambda: "skr_secret\n", "its result begins or ends with whitespace"),
        (str, "its result is empty"),
        (provide_nothing, "its result must be a str"),
    ],
)
def test_a_provider_that_fails(
    provide: Any, problem: str, fake: Fake, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """A provider that raises, or gives no token, is an error that may pass and quotes nothing of it."""
    with caplog.at_level(logging.DEBUG):
        found = refused(make(fake, token_provider=provide), TransportError)
    assert f"token_provider failed: {problem}" in str(found)
    assert found.retryable
    assert "skr_secret" not in caplog.text
    assert_clean(found, "skr_secret")


def test_a_provider_that_hangs(fake: Fake, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A provider that hangs is given up after its time; it is not called a second time until it has returned."""
    monkeypatch.setattr(login_module, "PROVIDER_TIMEOUT", 0.05)
    release = threading.Event()
    calls: List[int] = []

    def provide() -> str:
        calls.append(1)
        if len(calls) == 1:
            assert release.wait(GUARD)
        return f"skr_{len(calls)}"

    auth = make(fake, token_provider=provide)
    for _ in range(3):
        assert "did not return within 0.05 s" in str(refused(auth, TransportError))
    assert len(calls) == 1
    release.set()
    provider = auth.login.token_provider
    assert provider is not None
    until(lambda: not provider.calls.is_busy())
    monkeypatch.setattr(login_module, "PROVIDER_TIMEOUT", GUARD)
    assert token(auth.snapshot(patience())) == "skr_2"


def test_a_provider_whose_thread_cannot_be_started(
    scripted: Scripted, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no thread can be started the provider is not called, which may pass; the next who needs it calls it."""
    calls: List[int] = []
    real, fails = threading.Thread.start, [1]

    def start(thread: threading.Thread) -> None:
        if thread.name == "sekuire-token-provider" and fails:
            fails.pop()
            raise RuntimeError("can't start new thread")
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    auth = make(scripted, token_provider=lambda: calls.append(1) or "skr_one")
    problem = refused(auth, TransportError)
    assert "no new thread can be started" in str(problem)
    assert problem.retryable
    assert calls == []
    reply, snapshot = beat(auth)
    assert (reply.status, token(snapshot)) == (404, "skr_one")
    assert calls == [1]


def test_many_threads_ask_a_provider_once(fake: Fake, make: Make) -> None:
    """Threads that need a token together cause one call of the provider."""
    entered, release = threading.Event(), threading.Event()
    running: List[int] = []

    def provide() -> str:
        running.append(1)
        entered.set()
        assert release.wait(GUARD)
        return f"skr_{len(running)}"

    auth = make(fake, token_provider=provide)
    results: List[Optional[str]] = []
    threads = [threading.Thread(target=lambda: results.append(token(auth.snapshot(patience())))) for _ in range(16)]
    for thread in threads:
        thread.start()
    assert entered.wait(GUARD)
    release.set()
    for thread in threads:
        thread.join(GUARD)
    assert results == ["skr_1"] * 16


# -- the file, over restarts and kills --------------------------------------------------------------------------------

_PROCESS = """
import os, signal, sys, threading
from sekuire.config import AgentConfig
from sekuire.credentials import Authenticator, RuntimeCredentialsStore
from sekuire.credentials.login import Login
from sekuire._internal.threads import Deadline
from sekuire.transport.http import HttpClient
from sekuire._internal import files
from sekuire.wire import protocol
url, install_token, path, how = sys.argv[1:]
config = AgentConfig(api_base_url=url, agent_id="agent-1", install_token=install_token)
store = RuntimeCredentialsStore(path=path)
auth = Authenticator(Login(config, HttpClient(config), store, stop=threading.Event(), runtime_info={}))
if how == "killed":
    # Right after the answer of the refresh, before anything of it is on disk.
    files.replace = lambda path, data: os.kill(os.getpid(), signal.SIGKILL)
if how == "shared":
    auth.snapshot(Deadline(60))
    print("ready", flush=True)
    sys.stdin.readline()
path_of = lambda one: config.endpoints.path("heartbeat", installation_id=one.credentials.installation_id)
body = protocol.heartbeat_body("healthy", 1, {}, (), ())
reply, _ = auth.request("POST", path_of, body=body, deadline=Deadline(60))
print(reply.status, flush=True)
"""


def spawn(platform: LocalPlatform, install_token: str, path: pathlib.Path, how: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", _PROCESS, platform.url, install_token, str(path), how],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def path(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "credentials.json"


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_a_process_killed_between_the_answer_and_the_disk(path: pathlib.Path) -> None:
    """A process killed right after the answer of a rotating refresh recovers at its restart, with the same file."""
    with LocalPlatform() as platform:
        install_token = platform.create_install_token(AGENT)

        def run(how: str) -> Tuple[int, str]:
            process = spawn(platform, install_token, path, how)
            output, errors = process.communicate(timeout=GUARD)
            assert process.returncode in (0, -9), errors
            return process.returncode, output

        assert run("normal") == (0, "200\n")
        for round_ in range(1, 3):
            platform.expire_tokens()
            kept = path.read_text()
            assert run("killed") == (-9, "")
            assert platform.count("refresh", 200) == 2 * round_ - 1
            assert path.read_text() == kept
            assert run("normal") == (0, "200\n")
            assert path.read_text() != kept
        assert platform.count("bootstrap") == 1


def test_processes_that_share_a_file_refresh_once(path: pathlib.Path) -> None:
    """Of processes that share a file and are refused together one refreshes, and the others take its result."""
    with LocalPlatform() as platform:
        install_token = platform.create_install_token(AGENT)
        processes = [spawn(platform, install_token, path, "shared") for _ in range(3)]
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        assert platform.count("bootstrap") == 1
        platform.expire_tokens()
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        for process in processes:
            output, errors = process.communicate(timeout=GUARD)
            assert output == "200\n", errors
        assert platform.count("refresh") == 1
        assert platform.count("bootstrap") == 1


def test_a_rotated_token_is_on_disk_before_it_is_used(path: pathlib.Path, fake: Fake, make: Make) -> None:
    """When the first request with new credentials arrives, the file holds them already."""
    seen: List[bool] = []

    def check(request: Request) -> Answer:
        runtime_token = request.headers["Authorization"].partition(" ")[2]
        seen.append(runtime_token in path.read_text())
        return Answer(200 if runtime_token.endswith("_2") else 401)

    fake.on["beat"] = check
    auth = make(fake, install_token=INSTALL, store=RuntimeCredentialsStore(path=path))
    reply, _ = beat(auth)
    assert reply.status == 200
    assert seen == [True, True]


def test_a_restart_uses_the_file(path: pathlib.Path, fake: Fake, make: Make) -> None:
    """A restart with the same install token uses the file; with a new one it bootstraps."""
    for _ in range(3):
        auth = make(fake, install_token=INSTALL, store=RuntimeCredentialsStore(path=path))
        assert token(auth.snapshot(patience())) == "skr_runtime_1"
    assert fake.calls == ["bootstrap"]
    auth = make(fake, install_token="skt_new", store=RuntimeCredentialsStore(path=path))
    assert token(auth.snapshot(patience())) == "skr_runtime_2"
    assert fake.calls == ["bootstrap", "bootstrap"]


def test_what_another_process_wrote_comes_before_a_refresh(path: pathlib.Path, fake: Fake, make: Make) -> None:
    """A process that is refused takes what another one has written, instead of refreshing with a consumed token."""
    first = make(fake, install_token=INSTALL, store=RuntimeCredentialsStore(path=path))
    first.snapshot(patience())
    second = make(fake, install_token=INSTALL, store=RuntimeCredentialsStore(path=path))
    old = second.snapshot(patience())
    first.rejected(first.store.generation, patience())
    assert token(second.rejected(old.generation, patience())) == "skr_runtime_2"
    assert fake.calls == ["bootstrap", "refresh"]


def test_a_lock_that_is_held_too_long(path: pathlib.Path, fake: Fake, make: Make) -> None:
    """A process that cannot get the file's lock in time fails for now."""
    auth = make(fake, install_token=INSTALL, store=RuntimeCredentialsStore(path=path))
    with RuntimeCredentialsStore(path=path)._writing(patience()):
        with pytest.raises(TransportError, match=r"credentials\.json\.lock") as caught:
            auth.snapshot(Deadline(0.05))
    assert caught.value.retryable
    assert fake.calls == []


def test_api_errors_are_not_shared_between_ways(fake: Fake, make: Make) -> None:
    """An error of the platform that is neither a refusal nor passing is a refusal of that way only."""
    fake.on["refresh"] = error(418, "TEAPOT", "short and stout")
    auth = make(fake, installation_id="i", refresh_token="skf_given", install_token=INSTALL)
    assert token(auth.snapshot(patience())) == "skr_runtime_1"
    assert fake.calls == ["refresh", "bootstrap"]
    assert isinstance(APIError(418), SekuireError)


@pytest.mark.parametrize(
    "cut", [b"HTTP/1.1 201 Created\r\nContent-Le", b'HTTP/1.1 201 Created\r\n\r\n{"installation_id": "i']
)
def test_an_answer_cut_on_its_way_is_asked_for_again(make: Make, cut: bytes) -> None:
    """A connection that ends within the answer is no refusal: the same request is sent again, under the same key."""
    body = json.dumps(grant_of(1)).encode()
    whole = b"HTTP/1.1 201 Created\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    keys = []

    def talk(sock: socket.socket, number: int) -> None:
        lines = read_request(sock).split(b"\r\n")
        keys.append([line for line in lines if line.lower().startswith(b"idempotency-key:")])
        sock.sendall(cut if number == 0 else whole)

    with RawServer(talk) as server:
        auth = make(server.url, install_token=INSTALL)
        assert token(auth.snapshot(patience())) == "skr_runtime_1"
    assert len(keys) == 2
    assert keys[0] == keys[1] != []
