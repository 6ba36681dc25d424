"""A whole life with everything that goes wrong in it, and no token in anything that can be seen afterwards."""

from __future__ import annotations

import datetime as dt
import inspect
import json
import logging
import threading
import traceback
from typing import Any, Callable, Dict, Iterator, List, Optional, Set

import pytest

from sekuire import Beacon, RuntimeCredentialsStore, SekuireSDK, create_worker
from sekuire.credentials.store import Renewed
from sekuire.errors import ConfigurationError, SekuireError
from sekuire.local import LocalPlatform
from sekuire.secret import Secret
from sekuire.wire import protocol

from .support.servers import Answer, Certificates, Request, WebServer, grant_of, inside, refusing_url, traces_of
from .support.waiting import GUARD, until

LOGGERS = ("sekuire", "urllib3", "requests", "tenacity")


class Canary(logging.Handler):
    """Remembers all that is logged, shown or raised, and every secret there ever was."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.secrets: Set[str] = set()
        self.seen: List[str] = []
        self.names: Set[str] = set()
        self.chained: List[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.names.add(record.name.partition(".")[0])
        error = record.exc_info[1] if record.exc_info else None
        shown = {name: value for name, value in vars(record).items() if name not in ("exc_info", "exc_text")}
        self.seen.append(f"log: {record.getMessage()} {shown}")
        # A handler's own exception is shown in full: it is the user's text in the user's log.
        if error is not None and not isinstance(error, HandlerError):
            self.look_at_error(error)

    def look_at(self, *values: Any) -> None:
        for value in values:
            self.seen += [f"shown: {text}" for text in inside(value, 3)]
            self.seen.append(f"shown: {value} {value!r}")

    def look_at_error(self, error: BaseException) -> None:
        self.chained += [repr(one) for one in (error.__cause__, error.__context__) if one is not None]
        self.seen.append(f"error: {traces_of(error, 3)}")
        self.seen.append("error: " + "".join(traceback.format_exception(type(error), error, error.__traceback__)))

    def check(self, *known: str) -> None:
        """No secret is in anything seen; ``known`` are some that must have been there."""
        assert set(known) <= self.secrets
        assert self.chained == []
        assert self.seen
        found = {text[:300] for text in self.seen for secret in self.secrets if secret in text}
        assert not found, found


class HandlerError(Exception):
    pass


@pytest.fixture
def canary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Canary]:
    canary = Canary()
    init = Secret.__init__

    def remember(self: Secret, text: str) -> None:
        init(self, text)
        # The tokens of these tests are long enough not to be found by chance.
        if len(text) >= 8:
            canary.secrets.add(text)

    monkeypatch.setattr(Secret, "__init__", remember)
    for name in LOGGERS:
        logger = logging.getLogger(name)
        monkeypatch.setattr(logger, "level", logging.DEBUG)
        logger.addHandler(canary)
    logging.getLogger("sekuire").manager._clear_cache()  # type: ignore[attr-defined]
    yield canary
    for name in LOGGERS:
        logging.getLogger(name).removeHandler(canary)
    logging.getLogger("sekuire").manager._clear_cache()  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    import shutil

    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl program")
    return Certificates(str(tmp_path_factory.mktemp("tls")))


def test_the_canary_sings(canary: Canary) -> None:
    """A secret that is logged, shown, raised or held by a frame of an error is found."""
    Secret("skt_canary_itself")
    log = logging.getLogger("sekuire.test")
    sights: List[Callable[[], Any]] = [
        lambda: log.debug("it is %s", "skt_canary_itself"),
        lambda: log.debug("it is", extra={"token": "skt_canary_itself"}),
        lambda: canary.look_at({"x": ["skt_canary_itself"]}),
        lambda: canary.look_at_error(ValueError("skt_canary_itself")),
    ]
    for sight in sights:
        canary.seen.clear()
        sight()
        with pytest.raises(AssertionError):
            canary.check()
    canary.seen.clear()
    canary.look_at(Secret("skt_canary_itself"))
    canary.check("skt_canary_itself")


def test_a_whole_life(canary: Canary, tmp_path: Any) -> None:
    """Login, refresh, heartbeats, tasks, reports, a revocation: no token is seen, and none of a handler goes out."""
    statuses: List[Any] = []
    # Every heartbeat brings a token.
    with LocalPlatform(heartbeat_refreshes_token=1.0, redelivery_delay=0.2) as platform:
        install_token = platform.create_install_token("agent-1")
        store = RuntimeCredentialsStore(path=tmp_path / "credentials.json")
        sdk = SekuireSDK(
            "agent-1",
            api_base_url=platform.url,
            install_token=install_token,
            api_key=platform.api_key,
            workspace_id="ws_local",
            credentials_store=store,
            heartbeat_interval=0.2,
        )
        worker = sdk.create_task_worker(heartbeat_interval=0.2, reconnect_min=0.01, reconnect_max=0.05)
        contexts: List[Any] = []

        @worker.on_task("greet")
        def greet(ctx: Any, input: Any) -> Any:
            contexts.append(repr(ctx))
            return {"hello": input["name"]}

        @worker.on_task("leak")
        def leak(ctx: Any, input: Any) -> Any:
            current, before = store.current, store.generation
            assert current.runtime_token is not None
            # A heartbeat replaces the token meanwhile; the platform takes the old one for a while yet.
            until(lambda: store.generation > before)
            raise HandlerError(f"{current.runtime_token.reveal()} and {install_token}")

        worker.on_command(statuses.append)
        sdk.start()
        worker.start()
        assert worker.wait_until_connected(GUARD)
        generation = store.generation
        done = platform.wait(platform.submit("greet", {"name": "Ada"}, "agent-1"), GUARD)
        leaked = platform.wait(platform.submit("leak", {}, "agent-1"), GUARD)
        until(lambda: store.generation > generation)
        platform.expire_tokens()
        refused = platform.wait(platform.submit("greet", {"name": "Bob"}, "agent-1"), GUARD)
        until(lambda: platform.count("refresh", 200) >= 1)
        current = store.current
        canary.look_at(sdk, worker, store, store.snapshot, current, worker.stats(), sdk.beacon_status, contexts)
        canary.look_at(worker.config, sdk.config, *vars(worker).values())
        canary.look_at(platform.task(leaked["task_id"]), platform.completions(leaked["task_id"]))
        assert current.installation_id is not None
        platform.revoke(current.installation_id, "the canary is done", shutdown_timeout=1.0)
        assert worker.wait(GUARD)
        until(lambda: sdk.beacon_status.state == "revoked")
        canary.look_at(worker, sdk.beacon_status, worker.stats(), statuses)
        sdk.shutdown(GUARD)
    assert (done["status"], refused["status"], leaked["status"]) == ("completed", "completed", "failed")
    assert leaked["error"]["message"] == "HandlerError: *** and ***"
    assert {"sekuire", "urllib3"} <= canary.names
    canary.check(install_token, platform.api_key)
    assert len([secret for secret in canary.secrets if secret in (tmp_path / "credentials.json").read_text()]) == 2


# -- logins that fail -------------------------------------------------------------------------------------------------

Say = Callable[[Request], Answer]


def echo(status: int, code: str = "X") -> Say:
    """An error that quotes all that it was asked with."""

    def say(request: Request) -> Answer:
        text = f"{request.body.decode()} {request.headers.get('Authorization')} {request.headers.get('X-API-Key')}"
        return Answer(status, {"code": code, "message": text, "detail": [{"input": text}]}, [("Retry-After", "100")])

    return say


def say(answer: Answer) -> Say:
    return lambda request: answer


FAILURES: Dict[str, Say] = {
    "400": echo(400),
    "401": echo(401),
    "402": echo(402),
    "403": echo(403),
    "404": echo(404),
    "409": echo(409),
    "422": echo(422),
    "429": echo(429),
    "500": echo(500),
    "503": echo(503),
    "revoked": echo(403, "INSTALLATION_REVOKED"),
    "redirect": say(Answer(307, b"", [("Location", "http://127.0.0.1:1/")])),
    "not json": say(Answer(200, b"<html>")),
    "wrong json": say(Answer(200, ["x"])),
    "no installation": say(Answer(200, {"runtime_token": "skr_canary_half", "installation_id": ".."})),
    "unusable token": say(Answer(200, {"runtime_token": "skr_canary_two words", "installation_id": "i"})),
    "too large": say(Answer(200, b"x" * 2_000_000)),
    "cut": say(Answer(200, b"{", [("Content-Length", "1000"), ("Connection", "close")])),
    "not packed": say(Answer(200, b"{}", [("Content-Encoding", "gzip")])),
}
GIVEN: Dict[str, Dict[str, str]] = {
    "install token": {"install_token": "skt_canary_install"},
    "refresh token": {"installation_id": "inst-1", "refresh_token": "skf_canary_refresh"},
    "runtime token": {"installation_id": "inst-1", "runtime_token": "skr_canary_runtime"},
    "all": {
        "installation_id": "inst-1",
        "runtime_token": "skr_canary_runtime",
        "refresh_token": "skf_canary_refresh",
        "install_token": "skt_canary_install",
    },
}


def tokens_of(given: Dict[str, str]) -> List[str]:
    return [value for name, value in given.items() if name.endswith("_token")]


def live_and_fail(canary: Canary, url: str, given: Dict[str, str], **options: Any) -> None:
    """Start a Worker and a Beacon where it cannot work, see what they say, and stop them."""

    def provider() -> str:
        return "skr_canary_provided"

    for extra in ({}, {"token_provider": provider}):
        worker = create_worker(
            api_base_url=url, agent_id="agent-1", start_timeout=0.3, reconnect_min=0.01, reconnect_max=0.02,
            heartbeat_interval=0.1, connect_timeout=0.5, read_timeout=0.5, shutdown_timeout=1.0, proxies={},
            **{**given, **extra, **options},
        )  # fmt: skip
        worker.on_task("*", lambda ctx, input: None)
        see_life(canary, worker)
        canary.look_at(worker.stats(), worker.installation.auth, worker.installation)
        if "token_provider" in extra:
            break
    seen: List[Any] = []
    beacon = Beacon(
        "agent-1", api_base_url=url, api_key="sk_canary_api_key", workspace_id="ws-1", heartbeat_interval=0.1,
        on_status_change=seen.append, connect_timeout=0.5, read_timeout=0.5, proxies={}, **{**given, **options},
    )  # fmt: skip
    see_life(canary, beacon)
    canary.look_at(seen, beacon.status, beacon.installation_credentials)


def see_life(canary: Canary, one: Any) -> None:
    try:
        one.start()
    except SekuireError as error:
        canary.look_at_error(error)
    canary.look_at(one)
    try:
        one.stop(1.0)
    except SekuireError as error:
        canary.look_at_error(error)
    canary.look_at(one)


@pytest.fixture(autouse=True)
def no_long_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first verdict of a Beacon that cannot be reached is not waited for."""
    from sekuire import beacon, sdk

    for start in (beacon.LeaseKeeper.start, sdk.SekuireSDK.start):
        monkeypatch.setattr(inspect.unwrap(start), "__defaults__", (0.3,))


@pytest.mark.slow
@pytest.mark.parametrize("failure", FAILURES)
def test_failures_of_the_platform(failure: str, canary: Canary) -> None:
    """Whatever the platform answers, even one that echoes requests, no token is seen."""
    with WebServer(FAILURES[failure]) as server:
        for given in GIVEN.values():
            live_and_fail(canary, server.url, given)
            canary.check(*tokens_of(given))
            canary.seen.clear()


@pytest.mark.slow
def test_failures_after_a_good_login(canary: Canary) -> None:
    """After a login that succeeded, failures of stream, heartbeat and refresh show no token either."""
    for status in (401, 403, 500):

        def answer(request: Request, status: int = status) -> Answer:
            if request.path.endswith(("/bootstrap", "/refresh")):
                end = protocol.format_time(dt.datetime.now(dt.timezone.utc) + dt.timedelta(hours=1))
                return Answer(200, grant_of(7, expires_at=end))
            return echo(status)(request)

        with WebServer(answer) as server:
            live_and_fail(canary, server.url, GIVEN["install token"])
        canary.check("skt_canary_install", "skr_runtime_7", "skf_refresh_7")
        canary.seen.clear()


@pytest.mark.slow
def test_failures_of_the_network(canary: Canary, certificates: Certificates) -> None:
    """A refused connection, a wrong certificate and a server that speaks no TLS show no token."""
    given = GIVEN["all"]
    with refusing_url() as url:
        live_and_fail(canary, url, given)
    with WebServer(say(Answer(200)), certificates.server_context("self")) as server:
        live_and_fail(canary, server.url, given)
        assert server.requests == []
    with WebServer(say(Answer(200))) as server:
        live_and_fail(canary, server.url.replace("http:", "https:"), given)
    canary.check(*tokens_of(given))


def test_failures_of_the_disk(canary: Canary, tmp_path: Any) -> None:
    """A credentials file that cannot be written, or breaks, is warned of without a token."""
    directory = tmp_path / "gone"
    directory.mkdir()
    store = RuntimeCredentialsStore(path=directory / "credentials.json")
    with WebServer(say(Answer(200, grant_of(8)))) as server:
        live_and_fail(canary, server.url, GIVEN["install token"], credentials_store=store)
        (directory / "credentials.json").write_text(json.dumps({"runtime_token": "skr_canary_broken"}))
        store.reload()
        (directory / "credentials.json").unlink()
        (directory / "credentials.json.lock").unlink()
        (directory / "credentials.json.holder").unlink()
        directory.rmdir()
        store.update(store.current)
    canary.look_at(store)
    canary.check("skr_runtime_8")


def test_failures_shared_by_threads(canary: Canary) -> None:
    """The errors that threads waiting for one failed renewal get hold no token."""
    store = RuntimeCredentialsStore()
    store.seed(store.current, "x")
    entered, release = threading.Event(), threading.Event()
    secret = Secret("skr_canary_shared")
    problems: List[Optional[BaseException]] = []

    def action(snapshot: Any) -> Renewed:
        entered.set()
        assert release.wait(GUARD)
        assert secret.reveal()
        raise SekuireError("no")

    def ask() -> None:
        from sekuire._internal.threads import Deadline

        try:
            store.renew(0, action, Deadline(GUARD))
        except SekuireError as error:
            problems.append(error)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    assert entered.wait(GUARD)
    release.set()
    for thread in threads:
        thread.join(GUARD)
    assert len(problems) == 8
    for problem in problems:
        assert problem is not None
        canary.look_at_error(problem)
    canary.check("skr_canary_shared")


@pytest.mark.parametrize("wrong", [{"heartbeat_interval": -1}, {"heart_beat": 1}, {"verify": "/no/such/file"}])
@pytest.mark.parametrize("build", [create_worker, Beacon, SekuireSDK, SekuireSDK.from_env])
def test_a_wrong_setting_shows_no_token(build: Any, wrong: Dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """No frame of the library's, in an error over a setting, holds the tokens that were given beside it."""
    monkeypatch.setenv("SEKUIRE_REFRESH_TOKEN", "rt-canary-frame")
    tokens = {"install_token": "skt_canary-frame", "runtime_token": "canary-frame", "installation_id": "inst-1"}
    if build is not create_worker:
        tokens["api_key"] = "sk_live_canary-frame"
    if "heart_beat" in wrong and build in (Beacon, SekuireSDK):
        wrong = {"read_timeout": 0}
    with pytest.raises(ConfigurationError) as caught:
        build(agent_id="agent-1", **tokens, **wrong)
    frame = caught.value.__traceback__
    assert frame is not None
    frame = frame.tb_next
    assert frame is not None
    while frame is not None:
        assert "canary-frame" not in repr(frame.tb_frame.f_locals)
        frame = frame.tb_next
    assert caught.value.__context__ is None
