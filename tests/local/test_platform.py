"""The Python face: what a user's test does with the platform, and sees of it."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
from typing import Any, Callable, Dict

import pytest

from sekuire.errors import APIError, ConfigurationError
from sekuire.local import LocalPlatform

from ..contract.client import Installation, audit_event
from ..support.waiting import until
from .conftest import client_of, local_threads

Make = Callable[..., LocalPlatform]

# -- life -------------------------------------------------------------------------------------------------------------


def test_start_and_stop_may_be_repeated() -> None:
    """A second start() or stop() does nothing; a stopped platform starts again at the same address."""
    platform = LocalPlatform()
    platform.stop()
    platform.start()
    url = platform.url
    platform.start()
    task_id = platform.submit("c", {}, agent_id="a")
    platform.stop()
    platform.stop()
    assert platform.task(task_id)["status"] == "queued"
    with platform:
        assert platform.url == url
        assert client_of(platform).task(task_id)["status"] == "queued"
    assert local_threads() == []


def test_the_same_address_is_free_at_once(platform: LocalPlatform, installation: Installation) -> None:
    """Connections that the platform ended do not keep it from its own port."""
    with installation.stream() as stream:
        platform.stop()
        assert stream.next() is None
    platform.start()
    assert installation.heartbeat().status == 200


def test_stop_ends_streams_and_threads() -> None:
    """stop() with open streams takes less than two seconds, ends each properly, and leaves no thread."""
    with LocalPlatform() as platform:
        installation = client_of(platform).install()
        streams = [installation.stream(f"w{n}") for n in range(20)]
        began = time.monotonic()
        platform.stop()
        assert time.monotonic() - began < 2
        assert [stream.next() for stream in streams] == [None] * 20
        for stream in streams:
            stream.close()
    assert local_threads() == []


def test_stop_does_not_wait_for_a_client_that_reads_nothing() -> None:
    """A stream whose client takes nothing in, and a request that never ends, do not hold stop() up."""
    with LocalPlatform() as platform:
        installation = client_of(platform).install()
        with installation.stream() as stream:
            # Far more than the sockets buffer, and it is not read.
            installation.submit(input="x" * 20_000_000)
            slow = installation.client.connect()
            slow.putrequest("POST", "/api/v1/logs")
            slow.putheader("Content-Length", "100")
            slow.endheaders(b"{")
            began = time.monotonic()
            platform.stop()
            assert time.monotonic() - began < 2.5
            slow.close()
            assert stream.connected
    assert local_threads() == []


def test_two_hundred_streams(make: Make) -> None:
    """200 workers can be connected at once, and requests are still answered."""
    platform = make()
    installation = client_of(platform).install()
    streams = [installation.stream(f"w{n}", max_in_flight=1) for n in range(200)]
    try:
        assert len(platform.streams()) == 200
        ids = {platform.submit("c", n) for n in range(200)}
        assert {stream.next("task")["task_id"] for stream in streams} == ids
        assert installation.heartbeat().status == 200
    finally:
        for stream in streams:
            stream.close()


def test_streams_beyond_the_limit_are_put_off(make: Make) -> None:
    """With max_streams reached another stream is 503, with Retry-After, and goes through when there is room."""
    platform = make(max_streams=1)
    installation = client_of(platform).install()
    with installation.stream("w1"):
        answer = installation.refused("w2")
        assert (answer.status, answer.headers["Retry-After"]) == (503, "1")
    until(lambda: not platform.streams())
    with installation.stream("w2"):
        pass


def test_the_url_is_known_after_start() -> None:
    """The port is the system's choice, so asking for the URL before start() is an error that says so."""
    platform = LocalPlatform()
    assert repr(platform) == "<LocalPlatform not started>"
    with pytest.raises(ConfigurationError, match="before start"):
        _ = platform.url
    with platform:
        assert platform.url in repr(platform)
        assert platform.api_key not in repr(platform)
        assert platform.api_key.startswith("sk_live_")


# -- wrong settings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "option"),
    [
        ({"port": 70000}, "port"),
        ({"port": "9300"}, "port"),
        ({"host": ""}, "host"),
        ({"lease_seconds": 0}, "lease_seconds"),
        ({"keepalive_interval": 16}, "keepalive_interval"),
        ({"token_lifetime": float("nan")}, "token_lifetime"),
        ({"redelivery_delay": -1}, "redelivery_delay"),
        ({"workspace_id": ""}, "workspace_id"),
        ({"heartbeat_refreshes_token": 2}, "heartbeat_refreshes_token"),
        ({"max_streams": 0}, "max_streams"),
        ({"allowed_hosts": "localhost"}, "allowed_hosts"),
    ],
)
def test_a_wrong_option_is_named(options: Dict[str, Any], option: str) -> None:
    """A wrong value is a ConfigurationError that names the option, at construction."""
    with pytest.raises(ConfigurationError) as caught:
        LocalPlatform(**options)
    assert caught.value.option == option


def test_a_taken_port_is_named(platform: LocalPlatform) -> None:
    """A port in use is an error that names it and says what to do. The platform can start on another port later."""
    port = int(platform.url.rpartition(":")[2])
    with pytest.raises(ConfigurationError, match=rf"port {port} on 127.0.0.1 is taken; stop the program") as caught:
        LocalPlatform(port=port).start()
    assert caught.value.option == "port"


def test_an_unusable_host_is_named() -> None:
    """An address that is not this machine's, or no address at all, is named."""
    for host in ("192.0.2.1", "no-such-host.invalid"):
        with pytest.raises(ConfigurationError) as caught:
            LocalPlatform(host=host).start()
        assert caught.value.option == "host"
        assert host in str(caught.value)
    assert local_threads() == []


def test_an_open_address_is_warned_of(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    """Listening where other machines can reach it is possible, and logged as a warning."""
    with caplog.at_level(logging.WARNING, "sekuire.local"):
        platform = make(host="0.0.0.0")
    assert "0.0.0.0" in caplog.text
    assert platform.url.startswith("http://127.0.0.1:")
    assert client_of(platform).admin("GET", "/installations").status == 200


def test_missing_packages_are_named() -> None:
    """Without Flask or cheroot the import says which is missing and what to install."""
    code = (
        "import sys; sys.modules['cheroot'] = None\n"
        "from sekuire.errors import ConfigurationError\n"
        "try: import sekuire.local\n"
        "except ConfigurationError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "cheroot" in done.stdout
    assert "flask" not in done.stdout
    assert "pip install 'sekuire[local]'" in done.stdout


# -- tasks ------------------------------------------------------------------------------------------------------------


def test_submit_without_an_agent(platform: LocalPlatform) -> None:
    """A task without agent_id is the newest install token's or installation's; without either that is said."""
    with pytest.raises(ConfigurationError, match="create_install_token"):
        platform.submit("c", {})
    platform.create_install_token("a")
    platform.create_install_token("b")
    assert platform.task(platform.submit("c", {}))["agent_id"] == "b"


def test_submit_checks_its_arguments(platform: LocalPlatform) -> None:
    """Unknown fields, wrong values and inputs that are not JSON are refused."""
    with pytest.raises(ConfigurationError, match="max_attempts") as wrong:
        platform.submit("c", {}, agent_id="a", max_attempt=2)
    assert wrong.value.option == "max_attempt"
    for value in (object(), float("nan"), "\ud800"):
        with pytest.raises(APIError, match="input is not JSON"):
            platform.submit("c", value, agent_id="a")
    with pytest.raises(APIError, match="timeout_ms") as refused:
        platform.submit("c", {}, agent_id="a", timeout_ms=0)
    assert refused.value.status == 400


def test_wait_returns_the_finished_task(platform: LocalPlatform, installation: Installation) -> None:
    """wait() blocks until the task is finished, whoever asked first."""
    with installation.stream() as stream:
        task_id = platform.submit("c", {})
        found: list[Any] = []
        waiters = [threading.Thread(target=lambda: found.append(platform.wait(task_id, 10))) for _ in range(3)]
        for waiter in waiters:
            waiter.start()
        stream.next("task")
        installation.complete(task_id, output=7)
        for waiter in waiters:
            waiter.join()
    assert [task["output"] for task in found] == [7, 7, 7]
    assert platform.wait(task_id, 0)["output"] == 7


def test_wait_outlasts_a_restart(platform: LocalPlatform, installation: Installation) -> None:
    """Who waits for a task while the platform stops and starts again gets it all the same."""
    task_id = platform.submit("c", {})
    found: list[Any] = []
    waiter = threading.Thread(target=lambda: found.append(platform.wait(task_id, 10)))
    waiter.start()
    platform.stop()
    platform.start()
    with installation.stream() as stream:
        stream.next("task")
        installation.complete(task_id, output=7)
    waiter.join()
    assert found[0]["output"] == 7


def test_delays_outlast_a_restart(platform: LocalPlatform, installation: Installation) -> None:
    """A task that waits for its next try gets it also if the platform was restarted before that."""
    task_id = platform.submit("c", {}, max_attempts=2)
    with installation.stream() as stream:
        stream.next("task")
        assert installation.fail(task_id).status == 200
        platform.stop()
    platform.start()
    with installation.stream() as stream:
        assert stream.next("task")["attempt"] == 2


def test_wait_gives_up(platform: LocalPlatform) -> None:
    """wait() raises TimeoutError naming the task and its state, and 404 for an unknown task."""
    task_id = platform.submit("c", {}, agent_id="a")
    with pytest.raises(TimeoutError, match=f"{task_id}.*queued"):
        platform.wait(task_id, 0.01)
    for call in (platform.task, lambda task_id: platform.wait(task_id, 0)):
        with pytest.raises(APIError) as caught:
            call("task_unknown")
        assert caught.value.status == 404


# -- installations ----------------------------------------------------------------------------------------------------


def test_commands_and_revocation_of_the_unknown(platform: LocalPlatform) -> None:
    """A command or revocation for an unknown installation is 404, a wrong command a wrong argument."""
    for call in (lambda: platform.command("inst_x", "pause"), lambda: platform.revoke("inst_x")):
        with pytest.raises(APIError) as caught:
            call()
        assert caught.value.status == 404
    with pytest.raises(ConfigurationError, match="pause, resume, terminate"):
        platform.command("inst_x", "stop")


def test_commands_reach_the_stream(platform: LocalPlatform, installation: Installation) -> None:
    """command() sends type, reason and time; revoked, an installation takes no more."""
    with installation.stream() as stream:
        command_id = platform.command(installation.id, "terminate", "done", 1.5)
        command = stream.next("command")
        assert command == {
            "type": "terminate",
            "command_id": command_id,
            "reason": "done",
            "shutdown_timeout_ms": 1500,
        }
    platform.revoke(installation.id, "gone")
    platform.revoke(installation.id, "again")
    assert platform.installations()[0]["reason"] == "gone"
    with pytest.raises(APIError) as caught:
        platform.command(installation.id, "resume")
    assert caught.value.status == 409


def test_a_resumed_worker_works_before_its_next_heartbeat(platform: LocalPlatform, installation: Installation) -> None:
    """A worker that reported to be paused gets second tries as soon as it is resumed."""
    with installation.stream() as stream:
        task_id = platform.submit("c", {}, max_attempts=2)
        stream.next("task")
        platform.command(installation.id, "pause")
        installation.heartbeat("paused")
        installation.fail(task_id)
        platform.command(installation.id, "resume")
        assert [stream.next("command")["type"] for _ in range(2)] == ["pause", "resume"]
        assert stream.next("task")["task_id"] == task_id


def test_a_paused_worker_gets_what_no_other_serves(platform: LocalPlatform, installation: Installation) -> None:
    """Who serves what is known after each change: a worker pauses, another comes, pauses, goes on and leaves."""
    other = client_of(platform).install(installation.agent_id)
    with installation.stream("one", max_in_flight=9) as one:
        submitted = platform.submit("c", {})
        assert one.next("task")["task_id"] == submitted
        platform.command(installation.id, "pause")
        one.next("command")
        submitted = platform.submit("c", {})
        assert one.next("task")["task_id"] == submitted
        with other.stream("two", max_in_flight=1) as two:
            first, second = platform.submit("c", {}), platform.submit("c", {})
            assert two.next("task")["task_id"] == first
            assert platform.task(second)["status"] == "queued"
            other.heartbeat("paused")
            assert one.next("task")["task_id"] == second
            other.heartbeat("healthy")
            third = platform.submit("c", {})
            assert platform.task(third)["status"] == "queued"
        assert one.next("task")["task_id"] == third


def test_held_commands_are_lost_on_the_stream(platform: LocalPlatform, installation: Installation) -> None:
    """With hold_commands a pause is in the heartbeat's answer but on no stream, not even after a reconnect."""
    with installation.stream() as stream:
        platform.command(installation.id, "resume")
        seen = stream.next().id
        platform.hold_commands = True
        platform.command(installation.id, "pause")
        platform.hold_commands = False
        assert installation.heartbeat().body["desired_state"] == "paused"
        platform.command(installation.id, "resume")
        assert stream.next("command")["type"] == "resume"
    with installation.stream(last_event_id=seen) as stream:
        assert stream.next("command")["type"] == "resume"


def test_revocation_ends_the_stream_in_time(platform: LocalPlatform, installation: Installation) -> None:
    """When the time to shut down is over the stream of a revoked installation ends."""
    with installation.stream() as stream:
        platform.revoke(installation.id, shutdown_timeout=0.1)
        stream.next("command")
        assert stream.next() is None


def test_the_policy_hash_is_in_heartbeats(platform: LocalPlatform, installation: Installation) -> None:
    """Heartbeats carry the active policy's hash if there is one."""
    assert "active_policy_hash" not in installation.heartbeat().body
    policy = platform.set_policy("ws_local", {"permissions": {}})
    assert installation.heartbeat().body["active_policy_hash"] == policy["hash"]


# -- tokens -----------------------------------------------------------------------------------------------------------


def test_expired_tokens_are_told_apart(platform: LocalPlatform, installation: Installation) -> None:
    """expire_tokens() makes the next use a 401 TOKEN_EXPIRED; a refresh helps, also with the key of an earlier one."""
    key = "k" * 64
    first = installation.refresh(installation.grant["refresh_token"], key).body
    platform.expire_tokens()
    assert installation.heartbeat().code == "TOKEN_EXPIRED"
    installation.token = first["runtime_token"]
    assert installation.heartbeat().code == "TOKEN_EXPIRED"
    installation.token = "rt_unknown"
    assert installation.heartbeat().code == "INVALID_TOKEN"
    installation.token = installation.refresh(installation.grant["refresh_token"], key).body["runtime_token"]
    assert installation.heartbeat().status == 200


def test_tokens_of_one_installation_can_be_expired(platform: LocalPlatform) -> None:
    """expire_tokens() with an id leaves the others alone."""
    client = client_of(platform)
    one, two = client.install(), client.install()
    platform.expire_tokens(one.id)
    assert (one.heartbeat().status, two.heartbeat().status) == (401, 200)


def test_tokens_end_by_themselves(make: Make) -> None:
    """A runtime token lives for token_lifetime."""
    platform = make(token_lifetime=0.05, heartbeat_refreshes_token=False)
    installation = client_of(platform).install()
    assert until(lambda: installation.heartbeat().status == 401)


@pytest.mark.parametrize(("setting", "renews"), [(True, False), (1.0, True), (False, False)])
def test_heartbeats_renew_tokens(make: Make, setting: Any, renews: bool) -> None:
    """A heartbeat sends a new runtime token when the set fraction of the old one's lifetime is left."""
    installation = client_of(make(heartbeat_refreshes_token=setting)).install()
    answer = installation.heartbeat().body
    assert ("refreshed_token" in answer) is renews
    if renews:
        installation.token = answer["refreshed_token"]
        assert installation.heartbeat().status == 200
        assert answer["refreshed_token_expires_at"].endswith("Z")


def test_refresh_without_rotation(make: Make) -> None:
    """Without rotation a refresh token stays and no new one is sent."""
    installation = client_of(make(rotate_refresh_tokens=False)).install()
    for _ in range(3):
        answer = installation.refresh(installation.grant["refresh_token"])
        assert answer.status == 200
        assert "refresh_token" not in answer.body


def test_the_grace_of_a_refresh_token_ends(make: Make) -> None:
    """A replaced refresh token is refused after refresh_grace."""
    installation = client_of(make(refresh_grace=0.0)).install()
    first = installation.grant["refresh_token"]
    second = installation.refresh(first).body["refresh_token"]
    assert installation.refresh(first).code == "INVALID_REFRESH_TOKEN"
    assert installation.refresh(second).status == 200


def test_replays_end(make: Make) -> None:
    """After idempotency_window the same key is a new request."""
    platform = make(idempotency_window=0.05)
    client = client_of(platform)
    token = client.install_token("a")
    assert client.bootstrap("a", token, "k").status == 201
    assert until(lambda: client.bootstrap("a", token, "k").status == 409)


@pytest.mark.parametrize("uses", [1, 2])
def test_no_answer_with_an_expired_token_is_repeated(make: Make, uses: int) -> None:
    """Once the token of an answer has expired, the same key is a new request, also for bootstrap and recover."""
    platform = make()
    client = client_of(platform)
    other = client.install()
    token = client.install_token("a", max_uses=uses)
    headers = {"X-API-Key": client.api_key, "Idempotency-Key": "recovery"}
    body = {"agent_id": "a", "workspace_id": None, "runtime_info": {}}
    first, recovered = client.bootstrap("a", token, "k"), client.call("POST", "/installations/recover", body, headers)
    platform.expire_tokens(other.id)
    assert client.bootstrap("a", token, "k").body == first.body
    platform.expire_tokens()
    second = client.bootstrap("a", token, "k")
    assert second.status == (409 if uses == 1 else 201)
    if uses == 2:
        assert second.body["installation_id"] != first.body["installation_id"]
    again = client.call("POST", "/installations/recover", body, headers)
    assert again.body["installation_id"] != recovered.body["installation_id"]


# -- looking inside ---------------------------------------------------------------------------------------------------


def test_requests_are_counted(platform: LocalPlatform, installation: Installation) -> None:
    """Every request is counted by endpoint and status, before its answer is out."""
    installation.heartbeat()
    installation.heartbeat("wrong")
    installation.client.call("GET", "/nothing")
    with installation.stream():
        pass
    assert (platform.count("heartbeat"), platform.count("heartbeat", 200)) == (2, 1)
    assert platform.count("heartbeat", status=400) == 1
    assert platform.count("unknown", 404) == 1
    assert platform.count("task_stream", 200) == 1
    assert platform.count("refresh") == 0
    assert platform.requests[-4:] == [("heartbeat", 200), ("heartbeat", 400), ("unknown", 404), ("task_stream", 200)]


def test_what_came_in_is_kept(platform: LocalPlatform, installation: Installation) -> None:
    """Heartbeats, completions with their answers, progress and audit events can be looked at."""
    with installation.stream() as stream:
        task_id = platform.submit("c", {})
        stream.next("task")
        installation.heartbeat("degraded")
        installation.call("POST", f"/tasks/{task_id}/progress", {"progress": 0.5})
        events = [
            audit_event(event_type=kind, severity=severity)
            for kind, severity in (("health", "info"), ("model_call", "info"), ("model_call", "warn"))
        ]
        installation.call("POST", "/logs", {"events": events})
        installation.complete(task_id, status="odd")
        installation.complete(task_id)
        installation.complete(task_id)
        installation.complete(task_id, key="another")
        installation.client.call("POST", f"/tasks/{task_id}/complete", {"status": "completed"})
    assert [body["status"] for body in platform.heartbeats(installation.id)] == ["degraded"]
    assert platform.progress(task_id) == [{"progress": 0.5}]
    assert platform.logs() == events
    assert platform.logs("model_call") == events[1:]
    assert platform.logs(severity="info") == events[:2]
    assert platform.logs("model_call", "warn") == events[2:]
    assert [status for status, _ in platform.completions(task_id)] == [400, 200, 200, 409, 401]
    assert platform.completions(task_id)[1][1]["status"] == "completed"
    assert platform.heartbeats("x") == platform.completions("x") == platform.progress("x") == []


def test_streams_are_shown(platform: LocalPlatform, installation: Installation) -> None:
    """streams() shows who is connected, with what, and how much each holds."""
    with installation.stream("w", max_in_flight=3, capabilities=["b", "a"]) as stream:
        platform.submit("a", {})
        stream.next("task")
        assert platform.streams() == [
            {
                "worker_id": "w",
                "installation_id": installation.id,
                "capabilities": ["a", "b"],
                "in_flight": 1,
                "max_in_flight": 3,
            }
        ]


def test_dropped_streams_break_off(platform: LocalPlatform, installation: Installation) -> None:
    """drop_streams() cuts the connection without a proper end, and the worker can come back."""
    connection, response = installation.open()
    assert response.readline()
    platform.drop_streams()
    assert platform.streams() == []
    with pytest.raises((ConnectionError, OSError, Exception)) as caught:
        while response.read(100):
            pass
    assert "IncompleteRead" in repr(caught.value) or isinstance(caught.value, ConnectionError)
    response.close()
    connection.close()
    with installation.stream():
        assert len(platform.streams()) == 1


def test_a_vanished_client_is_noticed(platform: LocalPlatform, installation: Installation) -> None:
    """A client that closes its connection is gone from streams() at once, though nothing is sent to it."""
    stream = installation.stream()
    assert platform.streams()
    stream.close()
    # Before the next keepalive, which would notice it too, after 15 s.
    until(lambda: not platform.streams(), timeout=10.0)


def test_a_late_answer_to_an_old_attempt_does_not_disturb(platform: LocalPlatform, installation: Installation) -> None:
    """A retryable failure of an attempt that was taken away does not take the task from who has it now."""
    task_id = platform.submit("c", {}, agent_id=installation.agent_id, max_attempts=3)
    with installation.stream("old") as stream:
        stream.next("task")
    with installation.stream("new") as stream:
        assert stream.next("task")["attempt"] == 2
        assert installation.fail(task_id, attempt=1).status == 200
        assert platform.task(task_id)["status"] == "assigned"
        assert installation.complete(task_id, attempt=2, output="fine").status == 200
    assert platform.wait(task_id, 1)["output"] == "fine"


def test_events_are_fast(platform: LocalPlatform, installation: Installation) -> None:
    """A submitted task is on the wire within a few milliseconds, not at the next tick of anything."""
    times = []
    with installation.stream(max_in_flight=50) as stream:
        for _ in range(50):
            began = time.perf_counter()
            platform.submit("c", {})
            stream.next("task")
            times.append(time.perf_counter() - began)
    assert sorted(times)[25] < 0.02
