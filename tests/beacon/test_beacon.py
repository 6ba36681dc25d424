"""The Beacon: how it logs in, what it says of itself, and that the agent runs on without the platform."""

from __future__ import annotations

import threading
from typing import Any, Callable, Iterator, List

import pytest

from sekuire import Beacon, BeaconStatus, RuntimeCredentials, RuntimeCredentialsStore
from sekuire.errors import AuthenticationError, ConfigurationError, PlanLimitError, RevokedError, TransportError
from sekuire.wire.models import HeartbeatReply

from ..conftest import AGENT
from ..support.scripted import Blackhole, Scripted, grant
from ..support.waiting import GUARD, client_threads, until

Make = Callable[..., Beacon]


@pytest.fixture
def states() -> List[str]:
    return []


@pytest.fixture
def beacon_of(states: List[str]) -> Iterator[Make]:
    """Beacons for a platform, stopped at the end; their states are noted."""
    made: List[Beacon] = []

    def make(platform: Any, **options: Any) -> Beacon:
        beacon = Beacon(
            options.pop("agent_id", AGENT),
            **{
                "api_base_url": platform if isinstance(platform, str) else platform.url,
                "heartbeat_interval": 0.05,
                "connect_timeout": 2.0,
                "read_timeout": 5.0,
                "on_status_change": lambda status: states.append(status.state),
                **options,
            },
        )
        made.append(beacon)
        return beacon

    yield make
    for beacon in made:
        beacon.stop(1.0)


def test_its_life(make_platform: Callable[..., Any], beacon_of: Make, states: List[str], tmp_path: Any) -> None:
    """connecting, connected, degraded while the platform is gone, connected, stopped: each told once, in order."""
    platform = make_platform(path=tmp_path / "db")
    beacon = beacon_of(platform, install_token=platform.create_install_token(AGENT), capabilities=["x"])
    assert beacon.status == BeaconStatus()
    beacon.start()
    assert beacon.is_connected()
    status = beacon.status
    assert status.state == "connected"
    assert status.installation_id == platform.installations()[0]["installation_id"]
    assert status.lease_expires_at is not None
    assert status.last_heartbeat_at is not None
    assert status.error is None
    platform.stop()
    until(lambda: beacon.status.state == "degraded")
    assert beacon.status.error
    assert beacon.status.last_heartbeat_at is not None
    platform.start()
    until(beacon.is_connected)
    # The next outage begins with short pauses again.
    assert beacon._backoff._attempt == 0
    beacon.stop()
    assert beacon.status.state == "stopped"
    # A platform that is going may take one more heartbeat between two that it does not.
    outages = states[2:-1]
    assert (states[:2], states[-1]) == (["connecting", "connected"], "stopped")
    assert outages == ["degraded", "connected"] * (len(outages) // 2)
    assert platform.count("bootstrap") == 1
    assert platform.installations()[0]["status"] == "stopped"
    assert "stopped" in repr(beacon)


def test_the_heartbeat_says_where_it_runs(platform: Any, beacon_of: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its heartbeats carry the platform's metadata and the declared capabilities, and no worker."""
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("POD_NAME", "pod-7")
    monkeypatch.setenv("POD_NAMESPACE", "agents")
    monkeypatch.setenv("NODE_NAME", "node-3")
    beacon = beacon_of(platform, install_token=platform.create_install_token(AGENT), capabilities=["x"])
    with beacon:
        body = platform.heartbeats(beacon.status.installation_id)[0]
    assert body["platform"] == {
        "type": "kubernetes", "pod_name": "pod-7", "namespace": "agents", "node": "node-3",
    }  # fmt: skip
    assert (body["status"], body["capabilities"], body["workers"]) == ("healthy", ["x"], [])


def test_its_credentials_can_be_kept(platform: Any, beacon_of: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """installation_credentials.to_env() is all that the next start needs."""
    beacon = beacon_of(platform, install_token=platform.create_install_token(AGENT))
    with beacon:
        credentials = beacon.installation_credentials
    env = credentials.to_env()
    assert set(env) == {
        "SEKUIRE_INSTALLATION_ID", "SEKUIRE_RUNTIME_TOKEN", "SEKUIRE_REFRESH_TOKEN", "SEKUIRE_WORKSPACE_ID",
    }  # fmt: skip
    assert env["SEKUIRE_RUNTIME_TOKEN"] not in repr(credentials)
    again = beacon_of(
        platform,
        runtime_token=env["SEKUIRE_RUNTIME_TOKEN"],
        installation_id=env["SEKUIRE_INSTALLATION_ID"],
        refresh_token=env["SEKUIRE_REFRESH_TOKEN"],
    )
    with again:
        assert again.is_connected()
    assert (platform.count("bootstrap"), platform.count("refresh")) == (1, 0)


# -- the order of its ways in --


def test_a_present_token_is_proved_by_a_heartbeat(scripted: Scripted, beacon_of: Make) -> None:
    """A runtime token at hand is tried with a heartbeat first; refused, the refresh token is next."""
    scripted.on["heartbeat"] = lambda request: (
        (401, {"error": "unauthorized"}) if request.headers["Authorization"] == "Bearer rt-old" else (200, {})
    )
    with beacon_of(scripted, runtime_token="rt-old", refresh_token="rf", installation_id="inst-1", install_token="skt"):
        pass
    assert [scripted.count(name) for name in ("refresh", "bootstrap", "recover")] == [1, 0, 0]
    assert scripted.of("refresh")[0].json == {"refresh_token": "rf"}


def test_dead_recovery_credentials_fall_through(scripted: Scripted, beacon_of: Make) -> None:
    """A refused refresh token is followed by the install token, a refused install token by the API key."""
    refused = (401, {"error": "unauthorized", "message": "no"})
    order: List[str] = []

    def refuse(request: Any) -> Any:
        order.append(request.name)
        return refused

    def recover(request: Any) -> Any:
        order.append(request.name)
        return 201, grant("rt-recovered")

    scripted.on.update(refresh=refuse, bootstrap=refuse, recover=recover)
    beacon = beacon_of(
        scripted,
        installation_id="inst-0",
        refresh_token="rf",
        install_token="skt",
        api_key="sk_live_1",
        workspace_id="ws-1",
    )
    with beacon:
        assert beacon.status.installation_id == "inst-1"
    assert order == ["refresh", "bootstrap", "recover"]
    (request,) = scripted.of("recover")
    assert request.headers["X-API-Key"] == "sk_live_1"
    assert (request.json["agent_id"], request.json["workspace_id"]) == (AGENT, "ws-1")
    assert scripted.of("heartbeat")[0].headers["Authorization"] == "Bearer rt-recovered"


def test_recovery_with_the_local_platform(platform: Any, beacon_of: Make) -> None:
    """An API key alone gets an installation."""
    with beacon_of(platform, api_key=platform.api_key) as beacon:
        assert beacon.is_connected()
    assert platform.count("recover", 201) == 1


def test_every_way_refused(scripted: Scripted, beacon_of: Make, states: List[str]) -> None:
    """When every way is refused start() raises an error that names them all, and nothing goes on."""
    scripted.on["refresh"] = lambda request: (401, {"error": "x", "message": "refresh is dead"})
    scripted.on["bootstrap"] = lambda request: (410, {"error": "x", "message": "token is spent"})
    beacon = beacon_of(scripted, installation_id="i", refresh_token="rf", install_token="skt")
    with pytest.raises(AuthenticationError) as caught:
        beacon.start()
    assert "refresh is dead" in str(caught.value)
    assert "token is spent" in str(caught.value)
    assert states == ["connecting", "degraded", "stopped"]
    assert client_threads() == []


def test_a_plan_limit_raises(scripted: Scripted, beacon_of: Make) -> None:
    """402 for the login is raised as what it is."""
    scripted.on["bootstrap"] = lambda request: (402, {"error": "plan", "message": "full", "required_plan": "team"})
    with pytest.raises(PlanLimitError, match="team"):
        beacon_of(scripted, install_token="skt").start()


def test_wrong_options(scripted: Scripted) -> None:
    """What cannot work is refused at construction."""
    url = scripted.url
    with pytest.raises(ConfigurationError, match="no credentials"):
        Beacon(AGENT, api_base_url=url)
    with pytest.raises(ConfigurationError, match="installation_id: is needed with runtime_token"):
        Beacon(AGENT, api_base_url=url, runtime_token="rt")
    with pytest.raises(ConfigurationError, match="installation_id: is needed with refresh_token"):
        Beacon(AGENT, api_base_url=url, refresh_token="rt")
    with pytest.raises(ConfigurationError, match="on_status_change"):
        Beacon(AGENT, api_base_url=url, install_token="x", on_status_change="x")  # type: ignore[arg-type]
    assert scripted.requests == {}


def test_an_answer_that_comes_after_the_stop_changes_nothing(scripted: Scripted, beacon_of: Make) -> None:
    """A heartbeat that was under way when the Beacon stopped does not bring it back to life."""
    beacon = beacon_of(scripted, install_token="skt")
    beacon.start()
    beacon.stop()
    beacon.on_heartbeat(HeartbeatReply(), 0.0)
    beacon.on_heartbeat_problem(TransportError("gone"))
    assert beacon.status.state == "stopped"


# -- revocation --


def test_revoked_while_it_runs(platform: Any, beacon_of: Make, states: List[str]) -> None:
    """A revocation ends the heartbeats and is the last state; stop() keeps it."""
    beacon = beacon_of(platform, install_token=platform.create_install_token(AGENT))
    beacon.start()
    assert beacon.status.installation_id is not None
    platform.revoke(beacon.status.installation_id, "breach")
    until(lambda: beacon.status.state == "revoked")
    assert "breach" in str(beacon.status.error)
    until(lambda: [t for t in client_threads() if t.name == "sekuire-heartbeat"] == [])
    beacon.stop()
    assert states == ["connecting", "connected", "revoked"]


def test_revoked_before_it_starts(platform: Any, beacon_of: Make, states: List[str]) -> None:
    """start() of a Beacon whose installation is revoked raises RevokedError."""
    with beacon_of(platform, install_token=platform.create_install_token(AGENT), on_status_change=None) as first:
        env = first.installation_credentials.to_env()
    platform.revoke(env["SEKUIRE_INSTALLATION_ID"], "breach")
    beacon = beacon_of(
        platform,
        installation_id=env["SEKUIRE_INSTALLATION_ID"],
        runtime_token=env["SEKUIRE_RUNTIME_TOKEN"],
    )
    with pytest.raises(RevokedError, match="breach"):
        beacon.start()
    assert states == ["connecting", "revoked"]


# -- starting and stopping --


def test_an_unreachable_platform_is_no_error(
    make_platform: Callable[..., Any], beacon_of: Make, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """start() returns without a verdict, and the Beacon connects by itself when the platform is there."""
    platform = make_platform(path=tmp_path / "db")
    token = platform.create_install_token(AGENT)
    beacon = beacon_of(platform, install_token=token)
    platform.stop()
    beacon.start(0.05)
    assert beacon.status.state in ("connecting", "degraded")
    platform.start()
    until(beacon.is_connected)


def test_it_starts_once(scripted: Scripted, beacon_of: Make) -> None:
    """A second start, and one after stop(), are errors."""
    beacon = beacon_of(scripted, install_token="skt")
    with beacon, pytest.raises(ConfigurationError, match="starts once"):
        beacon.start()
    with pytest.raises(ConfigurationError, match="starts once"):
        beacon.start()
    unstarted = beacon_of(scripted, install_token="skt")
    unstarted.stop()
    with pytest.raises(ConfigurationError, match="starts once"):
        unstarted.start()


def test_stop_from_its_callback(scripted: Scripted, beacon_of: Make) -> None:
    """stop() in on_status_change stops without waiting for itself."""
    done = threading.Event()

    def changed(status: BeaconStatus) -> None:
        if status.state == "connected":
            beacon.stop()
            done.set()

    beacon = beacon_of(scripted, install_token="skt", on_status_change=changed)
    beacon.start()
    assert done.wait(GUARD)
    assert beacon.status.state == "stopped"


def test_a_failing_callback_harms_nothing(scripted: Scripted, beacon_of: Make, caplog: Any) -> None:
    """A callback that raises is logged; heartbeats go on."""

    def failing(status: BeaconStatus) -> None:
        raise RuntimeError("callback")

    with beacon_of(scripted, install_token="skt", on_status_change=failing):
        scripted.wait_for("heartbeat", 4)
    assert any("a callback failed: " in record.message for record in caplog.records)


def test_stop_during_a_login(blackhole: Blackhole, beacon_of: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stop while the login waits for an answer returns without it."""
    beacon = beacon_of(blackhole.url, install_token="skt", read_timeout=GUARD)
    beacon.start(0.01)
    with blackhole.accept() as sock:
        sock.recv(1)
        beacon.stop(0.2)
        assert beacon.status.state == "stopped"


def test_stop_from_many_threads(scripted: Scripted, beacon_of: Make, states: List[str]) -> None:
    """Concurrent stops say goodbye once."""
    beacon = beacon_of(scripted, install_token="skt")
    beacon.start()
    threads = [threading.Thread(target=beacon.stop) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(GUARD)
    until(lambda: states[-1] == "stopped")
    assert states == ["connecting", "connected", "stopped"]
    assert sum(request.json["status"] == "stopped" for request in scripted.of("heartbeat")) == 1


def test_a_store_given_is_used_and_filled(scripted: Scripted, beacon_of: Make) -> None:
    """credentials_store= is where the Beacon's credentials are, also for others."""
    store = RuntimeCredentialsStore(RuntimeCredentials(installation_id="inst-1", runtime_token="rt-9"))
    with beacon_of(scripted, credentials_store=store):
        assert scripted.of("heartbeat")[0].headers["Authorization"] == "Bearer rt-9"
    empty = RuntimeCredentialsStore()
    with beacon_of(scripted, credentials_store=empty, install_token="skt") as beacon:
        assert empty.current == beacon.installation_credentials
        assert empty.current.installation_id == "inst-1"
