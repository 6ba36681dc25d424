"""The examples of the Sekuire documentation, in Python, over real HTTP."""

from __future__ import annotations

import threading
from typing import Any, Callable, Dict

import pytest

from sekuire import Beacon, Command, RuntimeCredentials, RuntimeCredentialsStore, SekuireSDK, Worker, create_worker

from ..conftest import AGENT
from ..support.waiting import GUARD, until


def bootstrapped(platform: Any) -> Dict[str, str]:
    """The environment of an installation that was made before."""
    with Beacon(AGENT, api_base_url=platform.url, install_token=platform.create_install_token(AGENT)) as beacon:
        return beacon.installation_credentials.to_env()


def summarize(ctx: Any, input: Any) -> Dict[str, str]:
    return {"summary": str(input.get("text", ""))[:140]}


def check(platform: Any, worker: Worker) -> None:
    """The worker summarizes."""
    assert worker.wait_until_connected(GUARD)
    task_id = platform.submit("summarize", {"text": "x" * 200}, AGENT)
    task = platform.wait(task_id, GUARD)
    assert (task["status"], task["output"]) == ("completed", {"summary": "x" * 140})


def test_sdk_from_the_environment(platform: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The quick start: an SDK from the environment makes a worker that shares its credentials."""
    monkeypatch.setenv("SEKUIRE_API_URL", platform.url)
    monkeypatch.setenv("SEKUIRE_AGENT_ID", AGENT)
    monkeypatch.setenv("SEKUIRE_INSTALL_TOKEN", platform.create_install_token(AGENT))
    sdk = SekuireSDK.from_env()
    sdk.start()
    worker = sdk.create_task_worker(capabilities=["summarize"], heartbeat_interval=10.0)

    @worker.on_task("summarize")
    def handler(ctx: Any, input: Any) -> Any:
        return {"summary": str(input.get("text", ""))[:140]}

    thread = threading.Thread(target=worker.start, kwargs={"block": True})
    thread.start()
    check(platform, worker)
    assert sdk.is_connected()
    sdk.shutdown()
    thread.join(GUARD)
    assert not thread.is_alive()
    assert not worker.is_running()
    assert platform.count("bootstrap") == 1
    assert platform.installations()[0]["status"] == "stopped"


def test_manual_with_an_install_token(platform: Any) -> None:
    """create_worker(install_token=...) bootstraps by itself and gives the handler its context."""
    seen = []
    worker = create_worker(
        api_base_url=platform.url,
        agent_id=AGENT,
        install_token=platform.create_install_token(AGENT),
        capabilities=["summarize"],
    )

    @worker.on_task("summarize")
    async def handler(ctx: Any, input: Any) -> Any:
        seen.append((ctx.task_id, ctx.workspace_id, ctx.trace_id))
        return {"summary": str(input.get("text", ""))[:140]}

    with worker:
        check(platform, worker)
        task_id = platform.submit("summarize", {}, workspace_id="ws-9", trace_id="trace-9")
        platform.wait(task_id, GUARD)
    assert seen[1] == (task_id, "ws-9", "trace-9")


def test_with_a_runtime_token(platform: Any) -> None:
    """A runtime token and its installation id work without any login."""
    env = bootstrapped(platform)
    worker = create_worker(
        api_base_url=platform.url,
        agent_id=AGENT,
        runtime_token=env["SEKUIRE_RUNTIME_TOKEN"],
        installation_id=env["SEKUIRE_INSTALLATION_ID"],
    )
    worker.on_task("summarize", summarize)
    with worker:
        check(platform, worker)
    assert (platform.count("bootstrap"), platform.count("refresh")) == (1, 0)


def test_a_runtime_token_alone_adopts_the_installation(platform: Any) -> None:
    """Without an installation id the worker takes the one that the stream's `connected` tells, and beats with it."""
    env = bootstrapped(platform)
    worker = create_worker(api_base_url=platform.url, agent_id=AGENT, runtime_token=env["SEKUIRE_RUNTIME_TOKEN"])
    worker.on_task("summarize", summarize)
    before = platform.count("heartbeat")
    with worker:
        check(platform, worker)
        until(lambda: platform.count("heartbeat", 200) > before)
        until(lambda: worker.stats().last_heartbeat_at)
    assert platform.heartbeats(env["SEKUIRE_INSTALLATION_ID"])[-1]["status"] == "stopped"


def test_with_installation_and_refresh_token(platform: Any) -> None:
    """installation_id and refresh_token get a runtime token by one refresh."""
    env = bootstrapped(platform)
    worker = create_worker(
        api_base_url=platform.url,
        agent_id=AGENT,
        installation_id=env["SEKUIRE_INSTALLATION_ID"],
        refresh_token=env["SEKUIRE_REFRESH_TOKEN"],
    )
    worker.on_task("summarize", summarize)
    with worker:
        check(platform, worker)
    assert (platform.count("bootstrap"), platform.count("refresh", 200)) == (1, 1)


def test_with_a_token_provider(platform: Any) -> None:
    """A token_provider is asked at the start, and again after a 401."""
    env = bootstrapped(platform)
    store = RuntimeCredentialsStore(
        RuntimeCredentials(
            installation_id=env["SEKUIRE_INSTALLATION_ID"],
            refresh_token=env["SEKUIRE_REFRESH_TOKEN"],
            runtime_token=env["SEKUIRE_RUNTIME_TOKEN"],
        )
    )
    calls = []

    def provide() -> str:
        calls.append(1)
        if len(calls) == 1:
            return env["SEKUIRE_RUNTIME_TOKEN"]
        with Beacon(AGENT, api_base_url=platform.url, credentials_store=store) as beacon:
            until(beacon.is_connected)
        return store.current.to_env()["SEKUIRE_RUNTIME_TOKEN"]

    worker = create_worker(api_base_url=platform.url, agent_id=AGENT, token_provider=provide)
    worker.on_task("summarize", summarize)
    with worker:
        check(platform, worker)
        assert len(calls) == 1
        platform.expire_tokens()
        platform.drop_streams()
        until(lambda: len(calls) == 2 and worker.is_connected())
        check(platform, worker)


def test_one_store_for_beacon_and_worker(make_platform: Callable[..., Any]) -> None:
    """A token that a heartbeat refreshed for the Beacon is at once the Worker's, in whatever order they were made."""
    platform = make_platform(heartbeat_refreshes_token=1.0, heartbeat_interval=0.05)
    store = RuntimeCredentialsStore()
    worker = create_worker(
        api_base_url=platform.url, agent_id=AGENT, credentials_store=store, heartbeat_interval=30.0, reconnect_min=0.01
    )
    worker.on_task("summarize", summarize)
    beacon = Beacon(
        AGENT,
        api_base_url=platform.url,
        install_token=platform.create_install_token(AGENT),
        credentials_store=store,
        heartbeat_interval=0.05,
    )
    with beacon, worker:
        check(platform, worker)
        generation = store.generation
        until(lambda: store.generation > generation + 2)
        check(platform, worker)
        assert beacon.installation_credentials is store.current
    assert (platform.count("bootstrap"), platform.count("refresh")) == (1, 0)


def test_control_commands(platform: Any, worker_of: Callable[..., Worker]) -> None:
    """Commands reach the callback, is_paused() tells the state, and a paused worker rejects new tasks."""
    worker = worker_of(platform, heartbeat_interval=1000.0)
    worker.on_task("summarize", summarize)
    heard = []

    @worker.on_command
    def on_command(command: Command) -> None:
        heard.append((command.type, command.reason, worker.is_paused()))

    worker.start()
    # A heartbeat under way would tell the desired state before the stream tells the command.
    until(lambda: worker.stats().last_heartbeat_at)
    installation = platform.installations()[0]["installation_id"]
    platform.command(installation, "pause", "maintenance")
    until(lambda: len(heard) == 1)
    assert heard == [("pause", "maintenance", True)]
    task = platform.wait(platform.submit("summarize", {}), GUARD)
    assert task["error"]["code"] == "worker_paused"
    assert task["error"]["retryable"] is True
    assert "maintenance" in task["error"]["message"]
    platform.command(installation, "resume")
    until(lambda: len(heard) == 2)
    assert not worker.is_paused()
    check(platform, worker)
