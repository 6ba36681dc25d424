"""SekuireSDK: one login, one heartbeat, many workers."""

from __future__ import annotations

import threading
from typing import Any, Callable, Dict, Iterator, List

import pytest

from sekuire import RuntimeCredentialsStore, SekuireSDK
from sekuire.errors import AuthenticationError, ConfigurationError

from ..conftest import AGENT
from ..support.scripted import Scripted, grant
from ..support.waiting import GUARD, client_threads, until

Make = Callable[..., SekuireSDK]


@pytest.fixture
def sdk_of() -> Iterator[Make]:
    """SDKs for a platform, shut down at the end."""
    made: List[SekuireSDK] = []

    def make(platform: Any, **options: Any) -> SekuireSDK:
        issue = getattr(platform, "create_install_token", lambda agent: "skt-1")
        sdk = SekuireSDK(
            AGENT,
            **{
                "api_base_url": platform.url,
                "install_token": issue(AGENT),
                "heartbeat_interval": 0.05,
                "connect_timeout": 2.0,
                "read_timeout": 5.0,
                **options,
            },
        )
        made.append(sdk)
        return sdk

    yield make
    for sdk in made:
        sdk.shutdown(1.0)


def echo(ctx: Any, input: Any) -> Any:
    return input


@pytest.fixture
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    import os

    for name in list(os.environ):
        if name.startswith("SEKUIRE_"):
            monkeypatch.delenv(name)
    return monkeypatch


def test_workers_share_one_login_and_one_heartbeat(platform: Any, sdk_of: Make) -> None:
    """Several workers of one SDK: one bootstrap, one heartbeat that carries them all, at the smallest interval."""
    sdk = sdk_of(platform, heartbeat_interval=1000.0)
    with sdk:
        assert sdk.is_connected()
        workers = [sdk.create_task_worker(heartbeat_interval=interval) for interval in (0.05, 500.0, 600.0)]
        for number, worker in enumerate(workers):
            worker.on_task(f"c{number}", echo)
            worker.start()
        for number in range(3):
            assert platform.wait(platform.submit(f"c{number}", number, AGENT), GUARD)["output"] == number
        installation = sdk.beacon_status.installation_id
        assert installation is not None
        until(lambda: len(platform.heartbeats(installation)[-1]["workers"]) == 3)
        last = platform.heartbeats(installation)[-1]
        assert {one["worker_id"] for one in last["workers"]} == {worker.worker_id for worker in workers}
        assert set(last["capabilities"]) == {"c0", "c1", "c2"}
        assert [thread.name for thread in client_threads()].count("sekuire-heartbeat") == 1
        before = len(platform.heartbeats(installation))
        until(lambda: len(platform.heartbeats(installation)) > before + 3)
        assert {worker.stats().last_heartbeat_at is not None for worker in workers} == {True}
        workers[0].stop()
        until(lambda: len(platform.heartbeats(installation)[-1]["workers"]) == 2)
        assert platform.heartbeats(installation)[-1]["status"] == "healthy"
    assert platform.count("bootstrap") == 1
    assert platform.heartbeats(installation)[-1]["status"] == "stopped"
    assert not any(worker.is_running() for worker in workers)
    assert sdk.beacon_status.state == "stopped"


def test_without_a_heartbeat_of_its_own(platform: Any, sdk_of: Make) -> None:
    """With auto_heartbeat=False beats come only while a worker runs, and the last worker says goodbye."""
    sdk = sdk_of(platform, auto_heartbeat=False)
    sdk.start()
    assert client_threads() == []
    assert platform.installations() == []
    first, second = sdk.create_task_worker(heartbeat_interval=0.05), sdk.create_task_worker(heartbeat_interval=0.05)
    for worker in (first, second):
        worker.on_task("echo", echo)
        worker.start()
    installation = platform.installations()[0]["installation_id"]
    until(lambda: len((platform.heartbeats(installation) or [{"workers": []}])[-1]["workers"]) == 2)
    first.stop()
    assert platform.heartbeats(installation)[-1]["status"] != "stopped"
    second.stop()
    assert platform.heartbeats(installation)[-1]["status"] == "stopped"
    third = sdk.create_task_worker(heartbeat_interval=0.05)
    third.on_task("echo", echo)
    with third:
        until(lambda: platform.heartbeats(installation)[-1]["status"] == "healthy")
    assert platform.count("bootstrap") == 1


def test_a_revocation_stops_the_workers_too(platform: Any, sdk_of: Make) -> None:
    """The kill switch that the shared heartbeat hears stops every worker."""
    sdk = sdk_of(platform)
    sdk.start()
    workers = [sdk.create_task_worker(heartbeat_interval=0.05) for _ in range(2)]
    for worker in workers:
        worker.on_task("echo", echo)
        worker.start()
    platform.hold_commands = True
    platform.revoke(platform.installations()[0]["installation_id"], "breach")
    for worker in workers:
        assert worker.wait(GUARD)
        assert "breach" in str(worker.stop_reason)
    until(lambda: sdk.beacon_status.state == "revoked")
    assert not sdk.is_connected()


def test_a_401_for_all_is_one_refresh(scripted: Scripted, sdk_of: Make) -> None:
    """Streams and heartbeat of one SDK share one refresh."""

    def guarded(usual: Callable[[Any], Any]) -> Callable[[Any], Any]:
        return lambda request: (
            (401, {"error": "x"}) if request.headers["Authorization"] == "Bearer rt-1" else usual(request)
        )

    scripted.on["stream"] = guarded(scripted.stream)
    scripted.on["heartbeat"] = guarded(lambda request: (200, {}))
    with sdk_of(scripted) as sdk:
        workers = [sdk.create_task_worker() for _ in range(3)]
        threads = []
        for worker in workers:
            worker.on_task("echo", echo)
            threads.append(threading.Thread(target=worker.start))
            threads[-1].start()
        for thread in threads:
            thread.join(GUARD)
        assert sdk.is_connected()
    assert scripted.count("refresh") == 1


def test_shutdown_from_a_handler(platform: Any, sdk_of: Make) -> None:
    """shutdown() in a handler asks for it and returns; the task's result is delivered."""
    sdk = sdk_of(platform)
    sdk.start()
    worker = sdk.create_task_worker()
    worker.on_task("echo", lambda ctx, input: sdk.shutdown() or "bye")
    worker.start()
    assert platform.wait(platform.submit("echo", {}, AGENT), GUARD)["output"] == "bye"
    until(lambda: sdk.beacon_status.state == "stopped")


def test_a_refused_login(scripted: Scripted, sdk_of: Make) -> None:
    """start() raises what the platform refused."""
    scripted.on["bootstrap"] = lambda request: (403, {"error": "x", "message": "no such agent"})
    with pytest.raises(AuthenticationError, match="no such agent"):
        sdk_of(scripted).start()


def test_wrong_uses(scripted: Scripted, sdk_of: Make) -> None:
    """What is the SDK's cannot be given to a worker; a second start and a worker after shutdown are errors."""
    sdk = sdk_of(scripted, capabilities=["a"])
    for name in ("agent_id", "install_token", "runtime_token", "credentials_store", "token_provider", "policy_gateway"):
        with pytest.raises(ConfigurationError, match="belongs to SekuireSDK"):
            sdk.create_task_worker(**{name: "x"})
    with pytest.raises(ConfigurationError, match="did you mean 'max_workers'"):
        sdk.create_task_worker(max_worker=2)
    assert sdk.create_task_worker().capabilities == ("a",)
    assert sdk.create_task_worker(["b"], read_timeout=1.5).config.read_timeout == 1.5
    with sdk, pytest.raises(ConfigurationError, match="starts once"):
        sdk.start()
    with pytest.raises(ConfigurationError, match="was shut down"):
        sdk.create_task_worker()
    assert AGENT in repr(sdk)


# -- the environment --


def test_from_env_takes_everything(scripted: Scripted, clean_environment: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """Every documented variable is read at the call; overrides win; the credentials file makes them last."""
    variables: Dict[str, str] = {
        "SEKUIRE_API_URL": scripted.url,
        "SEKUIRE_AGENT_ID": "env-agent",
        "SEKUIRE_INSTALL_TOKEN": "skt-env",
        "SEKUIRE_WORKSPACE_ID": "ws-env",
        "SEKUIRE_API_KEY": "sk_live_env",
        "SEKUIRE_ENVIRONMENT": "staging",
        "SEKUIRE_CREDENTIALS_FILE": str(tmp_path / "credentials.json"),
        "SEKUIRE_REFRESH_TOKEN": "",
    }
    for name, value in variables.items():
        clean_environment.setenv(name, value)
    with SekuireSDK.from_env(environment="test") as sdk:
        assert sdk.config.environment == "test"
        assert sdk.installation_credentials.installation_id == "inst-1"
    body = scripted.of("bootstrap")[0].json
    assert (body["agent_id"], body["install_token"]) == ("env-agent", "skt-env")
    with SekuireSDK.from_env() as sdk:
        assert sdk.config.environment == "staging"
        assert sdk.is_connected()
    assert scripted.count("bootstrap") == 1


@pytest.mark.parametrize(
    ("variables", "overrides", "words"),
    [
        ({}, {}, ["agent_id", "SEKUIRE_AGENT_ID"]),
        ({"SEKUIRE_AGENT_ID": "a"}, {}, ["no credentials", "SEKUIRE_INSTALL_TOKEN"]),
        (
            {"SEKUIRE_AGENT_ID": "a", "SEKUIRE_API_URL": "ftp://x", "SEKUIRE_INSTALL_TOKEN": "t"},
            {},
            ["api_base_url", "environment variable SEKUIRE_API_URL", "https://"],
        ),
        (
            {"SEKUIRE_AGENT_ID": "a", "SEKUIRE_INSTALL_TOKEN": "has space"},
            {},
            ["install_token", "environment variable SEKUIRE_INSTALL_TOKEN"],
        ),
        ({"SEKUIRE_AGENT_ID": "a", "SEKUIRE_RUNTIME_TOKEN": "t"}, {}, ["installation_id"]),
        (
            {"SEKUIRE_AGENT_ID": "a", "SEKUIRE_CREDENTIALS_FILE": "/nowhere/at/all/file"},
            {},
            ["environment variable SEKUIRE_CREDENTIALS_FILE"],
        ),
        ({"SEKUIRE_AGENT_ID": "a"}, {"install_tokens": "x"}, ["did you mean 'install_token'?"]),
    ],
)
def test_a_wrong_environment_is_named(
    clean_environment: pytest.MonkeyPatch, variables: Dict[str, str], overrides: Dict[str, str], words: List[str]
) -> None:
    """An error tells the option, and the variable its value came from, and never a secret's value."""
    for name, value in variables.items():
        clean_environment.setenv(name, value)
    with pytest.raises(ConfigurationError) as caught:
        SekuireSDK.from_env(**overrides)
    for word in words:
        assert word in str(caught.value)
    assert "has space" not in str(caught.value)


def test_http_to_another_machine(clean_environment: pytest.MonkeyPatch) -> None:
    """``SEKUIRE_ALLOW_INSECURE_HTTP`` permits what a compose file needs; an argument wins; another value is refused."""
    clean_environment.setenv("SEKUIRE_API_URL", "http://host.docker.internal:9300")
    clean_environment.setenv("SEKUIRE_AGENT_ID", AGENT)
    clean_environment.setenv("SEKUIRE_INSTALL_TOKEN", "skt_1")
    with pytest.raises(ConfigurationError, match="SEKUIRE_ALLOW_INSECURE_HTTP=1"):
        SekuireSDK.from_env()
    clean_environment.setenv("SEKUIRE_ALLOW_INSECURE_HTTP", "Yes")
    assert SekuireSDK.from_env().config.allow_insecure_http
    with pytest.raises(ConfigurationError, match="is http:// to another machine"):
        SekuireSDK.from_env(allow_insecure_http=False)
    clean_environment.setenv("SEKUIRE_ALLOW_INSECURE_HTTP", "2")
    with pytest.raises(ConfigurationError, match="SEKUIRE_ALLOW_INSECURE_HTTP"):
        SekuireSDK.from_env()


def test_a_bootstrap_of_an_older_platform(scripted: Scripted, sdk_of: Make) -> None:
    """Its path may hold the installation's id, which is then required."""
    endpoints = {"bootstrap": "/api/v1/installations/{installation_id}/bootstrap"}
    with pytest.raises(ConfigurationError, match="installation_id") as caught:
        sdk_of(scripted, endpoints=endpoints)
    assert caught.value.option == "installation_id"
    scripted.on["unknown"] = lambda request: (201, grant())
    with sdk_of(scripted, endpoints=endpoints, installation_id="i/1"):
        paths = [request.path for request in scripted.of("unknown")]
    assert paths == ["/api/v1/installations/i%2F1/bootstrap"]


def test_a_misspelt_variable(
    scripted: Scripted, clean_environment: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """from_env() warns of a variable that nothing reads, and says which was meant."""
    clean_environment.setenv("SEKUIRE_AGENT_ID", AGENT)
    clean_environment.setenv("SEKUIRE_API_URL", scripted.url)
    clean_environment.setenv("SEKUIRE_INSTALL_TOKENS", "skt_secret")
    with pytest.raises(ConfigurationError, match="no credentials"):
        SekuireSDK.from_env()
    expected = "unknown environment variable SEKUIRE_INSTALL_TOKENS; did you mean SEKUIRE_INSTALL_TOKEN?"
    assert [record.getMessage() for record in caplog.records] == [expected]


def test_credentials_before_the_login(scripted: Scripted, sdk_of: Make) -> None:
    """The credentials are false until there is an installation."""
    sdk = sdk_of(scripted)
    assert not sdk.installation_credentials
    with sdk:
        assert sdk.installation_credentials


def test_a_store_of_ones_own(scripted: Scripted, sdk_of: Make) -> None:
    """credentials_store= is filled by the SDK's login and shared by its workers."""
    store = RuntimeCredentialsStore()
    with sdk_of(scripted, credentials_store=store) as sdk:
        assert store.current == sdk.installation_credentials
        worker = sdk.create_task_worker()
        worker.on_task("echo", echo)
        with worker:
            assert worker.is_connected()


def test_decisions_of_the_policy_are_audit_events(platform: Any) -> None:
    """A task that the policy lets begin is a policy_check; what it refuses is a policy_violation, and is told on."""
    pytest.importorskip("limits")
    told: List[str] = []
    content = {
        "permissions": {"tools": {"blocked_tools": ["shell"]}},
        "agent": {"capabilities": {"denied_capabilities": ["forbidden"]}},
    }
    platform.set_policy("ws-1", content)
    sdk = SekuireSDK(
        AGENT,
        api_base_url=platform.url,
        install_token=platform.create_install_token(AGENT),
        workspace_id="ws-1",
        policy_options={"on_violation": lambda error: told.append(error.rule)},
    )
    with sdk:
        worker = sdk.create_task_worker(heartbeat_interval=0.2)
        worker.on_task("*", lambda ctx, input: ctx.policy.check_tool("shell").allowed)
        with worker:
            allowed = platform.wait(platform.submit("allowed", None, agent_id=AGENT), timeout=GUARD)
            denied = platform.wait(platform.submit("forbidden", None, agent_id=AGENT), timeout=GUARD)
    assert (allowed["output"], denied["error"]["code"]) == (False, "policy_denied")
    assert told == ["tool.blocked", "capability.blocked"]
    events = [(event["event_type"], event["event_data"]) for event in platform.logs()]
    (check,) = [data for kind, data in events if kind == "policy_check"]
    assert check == {"kind": "capability", "target": "allowed", "task_id": allowed["task_id"], "allowed": True}
    assert [data["rule"] for kind, data in events if kind == "policy_violation"] == told
