"""Health, metrics and status of real workers over real HTTP."""

from __future__ import annotations

import datetime as dt
import os
import socket
import threading
from email.utils import format_datetime
from typing import Any, Callable, Dict, Iterator, Tuple

import pytest

from sekuire import SekuireSDK, TaskContext, Worker, WorkerHealth
from sekuire.errors import ConfigurationError, TaskError
from sekuire.local import LocalPlatform

from ..conftest import AGENT
from ..docs.markdown import table
from ..support.scripted import Scripted
from ..support.servers import run_python
from ..support.waiting import GUARD, until
from .asking import Address, ask, ask_json, samples

pytest.importorskip("prometheus_client")

Make = Callable[..., Worker]
HERE = ("127.0.0.1", 0)


def address(worker: Worker) -> Address:
    found = worker.health_address
    assert found is not None
    return found


def readiness(worker: Worker) -> Tuple[int, Any]:
    return ask_json(address(worker), "/readyz")


def metrics(worker: Worker) -> Dict[str, Dict[str, float]]:
    status, body = ask(address(worker), "/metrics")
    assert status == 200
    return samples(body.decode())


def agents(**labels: str) -> str:
    """Labels as they are written, with the agent's."""
    return ",".join(f'{name}="{value}"' for name, value in sorted({"agent_id": AGENT, **labels}.items()))


@pytest.fixture
def worker(platform: LocalPlatform, worker_of: Make) -> Worker:
    made = worker_of(platform, health=HERE)

    @made.on_task("copy")
    def copy(ctx: TaskContext, input: Any) -> Any:
        return input

    @made.on_task("fail")
    def fail(ctx: TaskContext, input: Any) -> Any:
        raise TaskError(input, "as asked")

    @made.on_task("ask")
    def ask_a_person(ctx: TaskContext, input: Any) -> Any:
        ctx.require_approval("refund")

    @made.on_task("wait")
    def wait(ctx: TaskContext, input: Any) -> Any:
        ctx.wait_cancelled(GUARD)

    return made


@pytest.fixture
def running(worker: Worker) -> Iterator[Worker]:
    with worker:
        assert worker.wait_until_connected(GUARD)
        yield worker


# -- health -----------------------------------------------------------------------------------------------------------


def test_ready(running: Worker) -> None:
    """A connected worker is live and ready, over HTTP and in Python."""
    assert ask_json(address(running), "/livez") == (200, {"live": True, "reasons": []})
    assert readiness(running) == (200, {"ready": True, "reasons": [], "notes": []})
    health = running.health()
    assert isinstance(health, WorkerHealth)
    assert (health.live, health.ready, health.reasons, health.state) == (True, True, (), "running")
    until(lambda: running.health().heartbeat_age is not None)
    assert (running.health().lease_seconds_left or 0) > 0


def test_no_server_unless_asked_for(platform: LocalPlatform, worker_of: Make) -> None:
    """Without the option nothing listens and nothing is measured; ``health()`` answers all the same."""
    worker = worker_of(platform)
    worker.on_task("copy", lambda ctx, input: input)
    assert (worker.health().state, worker.health().reasons) == ("new", ("stream closed",))
    with worker:
        assert worker.wait_until_connected(GUARD)
        assert worker.health().ready
        assert worker.health_address is None
        assert "sekuire-health" not in [one.name for one in threading.enumerate()]
    assert (worker.health().state, worker.health().live) == ("stopped", False)


def test_paused(running: Worker, platform: LocalPlatform) -> None:
    """A pause is a reason, whoever ordered it; the worker lives."""
    running.pause()
    assert readiness(running) == (503, {"ready": False, "reasons": ["paused"], "notes": []})
    running.resume()
    assert readiness(running)[0] == 200
    (installation,) = platform.installations()
    platform.command(installation["installation_id"], "pause")
    until(lambda: readiness(running)[0] == 503)
    assert ask(address(running), "/livez")[0] == 200
    assert metrics(running)["sekuire_workers_paused"] == {agents(): 1}


def test_stream_closed(worker_of: Make) -> None:
    """A platform that cannot be reached makes it not ready, and is nothing to liveness."""
    worker = worker_of("http://127.0.0.1:9", health=HERE, start_timeout=0.0)
    worker.on_task("copy", lambda ctx, input: input)
    with worker:
        assert readiness(worker) == (503, {"ready": False, "reasons": ["stream closed"], "notes": []})
        assert ask(address(worker), "/livez")[0] == 200
        assert worker.health().heartbeat_age is None
        assert "sekuire_heartbeat_age_seconds" not in metrics(worker)


def test_without_credentials() -> None:
    """A program that goes on without the platform is live, and says that no task would run."""
    with SekuireSDK(AGENT, api_base_url="http://127.0.0.1:9", required=False, health=HERE) as sdk:
        worker = sdk.create_task_worker()
        worker.on_task("copy", lambda ctx, input: input)
        worker.start()
        assert ask(address(worker), "/livez")[0] == 200
        assert readiness(worker)[1]["reasons"] == ["stream closed"]
    assert worker.health_address is None


def test_no_lease(scripted: Scripted, worker_of: Make) -> None:
    """A lease that the platform has ended is a reason, after its grace; the metric shows its end before."""
    ended = dt.datetime.now(dt.timezone.utc) - dt.timedelta(seconds=60)
    # Without a date of the platform's own it would be ignored.
    date = {"Date": format_datetime(dt.datetime.now(dt.timezone.utc), usegmt=True)}
    scripted.on["heartbeat"] = lambda request: (200, {"lease_expires_at": ended.isoformat()}, date)
    worker = worker_of(scripted, health=HERE)
    worker.on_task("copy", lambda ctx, input: input)
    with worker:
        until(lambda: worker.health().lease_seconds_left is not None)
        assert (worker.health().lease_seconds_left or 0) <= 0
        worker.vitals.lease.allow(0.0)
        assert "no lease" in readiness(worker)[1]["reasons"]
        assert metrics(worker)["sekuire_lease_remaining_seconds"][agents()] <= 0


def test_policy_missing(scripted: Scripted) -> None:
    """A policy that could never be loaded is a reason."""
    scripted.on["policy"] = lambda request: (500, {"error": {"code": "BROKEN"}})
    sdk = SekuireSDK(AGENT, api_base_url=scripted.url, install_token="skt-1", workspace_id="ws-1", health=HERE)
    with sdk:
        # Its first load takes its time, and the stream waits for that.
        worker = sdk.create_task_worker(start_timeout=0.0)
        worker.on_task("copy", lambda ctx, input: input)
        worker.start()
        until(lambda: readiness(worker)[1]["reasons"] == ["stream closed", "policy missing"])


def test_draining(running: Worker, platform: LocalPlatform) -> None:
    """From the stop's begin to its end it is not ready, and lives; then the port is closed."""
    where = address(running)
    task = platform.submit("wait", None, agent_id=AGENT)
    until(lambda: running.stats().running)
    running.request_stop(GUARD)
    assert readiness(running) == (503, {"ready": False, "reasons": ["draining"], "notes": []})
    assert ask(where, "/livez")[0] == 200
    assert metrics(running)["sekuire_workers_draining"] == {agents(): 1}
    running.stop(0.0)
    assert platform.wait(task, GUARD)["status"] in ("failed", "completed")
    assert running.health_address is None
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(where, timeout=GUARD)


def test_approvals_that_wait(running: Worker, platform: LocalPlatform) -> None:
    """They are a note and not a reason: the worker is ready for other tasks. A denial is counted by its code."""
    task = platform.submit("ask", None, agent_id=AGENT)
    asked = platform.wait_for_approval(GUARD, task_id=task)
    assert running.health().notes == ("approvals waiting: 1",)
    assert readiness(running) == (200, {"ready": True, "reasons": [], "notes": ["approvals waiting: 1"]})
    assert metrics(running)["sekuire_approvals_waiting"] == {agents(): 1}
    platform.decide(asked["approval_id"], "denied")
    platform.wait(task, GUARD)
    until(lambda: running.stats().failed)
    assert readiness(running)[1]["notes"] == []
    finished = agents(capability="ask", status="failed", code="approval_denied")
    assert metrics(running)["sekuire_tasks_finished_total"] == {finished: 1}


def test_a_thread_that_has_ended(running: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only that is not live: a restart is what helps."""
    monkeypatch.setattr(running.vitals.stream, "has_ended", lambda: True)
    status, found = ask_json(address(running), "/livez")
    assert (status, found["live"]) == (503, False)
    assert running.worker_id[:8] in found["reasons"][0]


# -- status -----------------------------------------------------------------------------------------------------------


def test_status(running: Worker, platform: LocalPlatform) -> None:
    """All of each worker's health, without a secret."""
    task = platform.submit("copy", {"text": "of the task"}, agent_id=AGENT)
    platform.wait(task, GUARD)
    status, found = ask_json(address(running), "/status")
    assert status == 200
    (one,) = found["workers"]
    assert (one["agent_id"], one["worker_id"], one["state"]) == (AGENT, running.worker_id, "running")
    assert one["stats"]["received"] == 1
    assert one["installation_id"] == platform.installations()[0]["installation_id"]
    token = running.installation.store.current.runtime_token
    assert token is not None
    text = b"".join(ask(address(running), path)[1] for path in ("/livez", "/readyz", "/metrics", "/status"))
    assert token.reveal().encode() not in text
    assert b"of the task" not in text


@pytest.mark.parametrize(("value", "expected"), [(None, 403), ("0", 403), ("1", 200)])
def test_status_off_loopback(worker_of: Make, monkeypatch: pytest.MonkeyPatch, value: Any, expected: int) -> None:
    """It is refused with the variable that allows it; probes and metrics are answered."""
    if value is not None:
        monkeypatch.setenv("SEKUIRE_WORKER_HTTP_STATUS", value)
    worker = worker_of("http://127.0.0.1:9", health=("0.0.0.0", 0), start_timeout=0.0)
    worker.on_task("copy", lambda ctx, input: input)
    with worker:
        where = ("127.0.0.1", address(worker)[1])
        status, found = ask_json(where, "/status")
        assert status == expected
        assert expected == 200 or "SEKUIRE_WORKER_HTTP_STATUS=1" in found["error"]
        assert [ask(where, path)[0] for path in ("/livez", "/readyz", "/metrics")] == [200, 503, 200]


def test_a_wrong_variable(worker_of: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is named at the start, and no server stays."""
    monkeypatch.setenv("SEKUIRE_WORKER_HTTP_STATUS", "maybe")
    worker = worker_of("http://127.0.0.1:9", health=HERE)
    worker.on_task("copy", lambda ctx, input: input)
    with pytest.raises(ConfigurationError, match="SEKUIRE_WORKER_HTTP_STATUS"):
        worker.start()


def test_other_paths(running: Worker) -> None:
    """404, with those that there are."""
    status, found = ask_json(address(running), "/")
    assert (status, found) == (404, {"error": "there are /livez, /readyz, /metrics and /status"})


# -- metrics ----------------------------------------------------------------------------------------------------------


def test_counts(running: Worker, platform: LocalPlatform) -> None:
    """Each end of a task is counted once, by capability, status and code; durations only of handlers that ran."""
    for capability, input in [("copy", 1), ("copy", 2), ("fail", "timeout"), ("fail", "of my own")]:
        platform.wait(platform.submit(capability, input, agent_id=AGENT), GUARD)
    running.pause()
    platform.wait(platform.submit("copy", 3, agent_id=AGENT), GUARD)
    running.resume()
    until(lambda: running.stats().undelivered == 0)
    found = metrics(running)
    assert found["sekuire_tasks_finished_total"] == {
        agents(capability="copy", status="completed", code=""): 2,
        agents(capability="copy", status="rejected", code="worker_paused"): 1,
        agents(capability="fail", status="failed", code="other"): 1,
        agents(capability="fail", status="failed", code="timeout"): 1,
    }
    assert found["sekuire_tasks_received_total"] == {agents(): 5}
    counts = found["sekuire_task_duration_seconds_count"]
    assert counts == {agents(capability="copy"): 2, agents(capability="fail"): 2}
    assert found["sekuire_tasks_running_limit"] == {agents(): 8}
    assert found["sekuire_tasks_running"] == {agents(): 0}
    stats = running.stats()
    assert sum(found["sekuire_tasks_finished_total"].values()) == stats.completed + stats.failed + stats.rejected


def test_labels_are_bounded(platform: LocalPlatform, worker_of: Make) -> None:
    """What a catch-all handler runs is one label, whatever the names."""
    worker = worker_of(platform, health=HERE, capabilities=["declared"])
    worker.on_task("*", lambda ctx, input: input)
    with worker:
        for name in ("declared", *(f"made-up-{number}" for number in range(20))):
            platform.wait(platform.submit(name, None, agent_id=AGENT), GUARD)
        assert metrics(worker)["sekuire_tasks_finished_total"] == {
            agents(capability="declared", status="completed", code=""): 1,
            agents(capability="other", status="completed", code=""): 20,
        }


def test_denials(platform: LocalPlatform) -> None:
    """What the policy denies is counted by rule, before the handler and in it, with the SDK's gateway."""
    platform.set_policy(
        "ws_local",
        {
            "agent": {"capabilities": {"denied_capabilities": ["drop"]}},
            "permissions": {"tools": {"blocked_tools": ["shell"]}},
        },
    )
    token = platform.create_install_token(AGENT)
    with SekuireSDK(AGENT, api_base_url=platform.url, install_token=token, health=HERE) as sdk:
        worker = sdk.create_task_worker(start_timeout=GUARD)
        worker.on_task("drop", lambda ctx, input: None)

        @worker.on_task("tool")
        def tool(ctx: TaskContext, input: Any) -> Any:
            return bool(ctx.policy.check_tool("shell"))

        worker.start()
        for name in ("drop", "drop", "tool"):
            platform.wait(platform.submit(name, None, agent_id=AGENT), GUARD)
        assert metrics(worker)["sekuire_policy_denials_total"] == {
            agents(rule="capability.blocked"): 2,
            agents(rule="tool.blocked"): 1,
        }


def test_reconnects_and_refreshes(scripted: Scripted, worker_of: Make) -> None:
    """A stream that was opened again and a token that was replaced are counted."""
    scripted.on["heartbeat"] = lambda request: (200, {"refreshed_token": "rt-2"})
    worker = worker_of(scripted, health=HERE)
    worker.on_task("copy", lambda ctx, input: input)
    with worker:
        assert worker.wait_until_connected(GUARD)
        scripted.end()
        until(lambda: worker.stats().reconnects and scripted.count("heartbeat") > 1)
        found = metrics(worker)
        assert found["sekuire_stream_reconnects_total"] == {agents(): 1}
        assert found["sekuire_credentials_refreshes_total"][agents()] >= 1


def test_the_documentation_lists_the_metrics(running: Worker, platform: LocalPlatform) -> None:
    """docs/observability.md has a row for each metric, with its labels and its help."""
    text = ask(address(running), "/metrics")[1].decode()
    helps = dict(
        line[len("# HELP ") :].split(" ", 1) for line in text.splitlines() if line.startswith("# HELP sekuire")
    )
    rows = table("docs/observability.md", "Metrics")
    assert {row[0].strip("`") for row in rows} == set(helps)
    labels = {row[0].strip("`"): {one.strip(" `") for one in row[1].split(",")} for row in rows}
    platform.wait(platform.submit("copy", 1, agent_id=AGENT), GUARD)
    for name, values in metrics(running).items():
        known = name.replace("_bucket", "").replace("_count", "").replace("_sum", "")
        if known in labels:
            used = {label.partition("=")[0] for found in values for label in found.split(",")}
            assert used - {"le"} == labels[known], name


def test_openmetrics(running: Worker) -> None:
    """A Prometheus that asks for the newer form gets it."""
    accept = "application/openmetrics-text; version=1.0.0"
    status, body = ask(address(running), "/metrics", headers={"Accept": accept})
    assert status == 200
    assert body.endswith(b"# EOF\n")


def test_without_the_extra(platform: LocalPlatform) -> None:
    """/metrics is 501 and names the extra; health is shown all the same."""
    run_python(
        """
        import http.client, json, sys
        sys.modules["prometheus_client"] = None
        from sekuire import create_worker
        worker = create_worker(
            agent_id="agent-1", install_token="skt-1", api_base_url="http://127.0.0.1:9", health="0", start_timeout=0.0
        )
        worker.on_task("copy", lambda ctx, input: input)
        with worker:
            def ask(path):
                connection = http.client.HTTPConnection(*worker.health_address)
                connection.request("GET", path)
                answer = connection.getresponse()
                return answer.status, json.loads(answer.read())
            status, found = ask("/metrics")
            assert status == 501
            assert "pip install 'sekuire[metrics]'" in found["error"]
            assert ask("/livez")[0] == 200
        """
    )


# -- several workers --------------------------------------------------------------------------------------------------


def test_two_workers_share_the_server(worker_of: Make, platform: LocalPlatform) -> None:
    """One thread; ready if both are; totals do not fall when one ends; the last one closes the port."""
    first, second = (worker_of(platform, health=HERE, agent_id=name) for name in (AGENT, "agent-2"))
    third = worker_of(platform, health=HERE)
    for one in (first, second, third):
        one.on_task("copy", lambda ctx, input: input)
        one.start()
        assert one.wait_until_connected(GUARD)
    where = address(first)
    assert address(second) == address(third) == where
    assert [one.name for one in threading.enumerate()].count("sekuire-health") == 1
    for number in range(10):
        platform.wait(platform.submit("copy", number, agent_id=AGENT), GUARD)
    second.pause()
    assert readiness(first) == (503, {"ready": False, "reasons": ["paused"], "notes": []})
    second.stop()
    assert readiness(first)[0] == 200
    assert len(ask_json(where, "/status")[1]["workers"]) == 2
    finished = agents(capability="copy", status="completed", code="")
    until(lambda: metrics(third)["sekuire_tasks_finished_total"] == {finished: 10})
    first.stop()
    assert metrics(third)["sekuire_tasks_finished_total"] == {finished: 10}
    assert metrics(third)["sekuire_workers"] == {agents(): 1}
    third.stop()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(where, timeout=GUARD)


def test_another_address_in_one_process(running: Worker, worker_of: Make, platform: LocalPlatform) -> None:
    """It is refused, with the address that there is."""
    other = worker_of(platform, health=("127.0.0.1", 1))
    other.on_task("copy", lambda ctx, input: input)
    with pytest.raises(ConfigurationError, match=f"127.0.0.1:{address(running)[1]}"):
        other.start()


def test_a_taken_port(scripted: Scripted, worker_of: Make) -> None:
    """It is said before the login, and the worker can start once the port is free."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        worker = worker_of(scripted, health=other.getsockname())
        worker.on_task("copy", lambda ctx, input: input)
        with pytest.raises(ConfigurationError, match=r"health: port .* is taken"):
            worker.start()
    assert scripted.count("bootstrap") == 0
    with worker:
        assert worker.wait_until_connected(GUARD)


def test_a_second_start_changes_nothing(running: Worker) -> None:
    """It is refused, and the server goes on."""
    with pytest.raises(ConfigurationError):
        running.start()
    assert readiness(running)[0] == 200


def test_a_worker_that_does_not_start(worker_of: Make) -> None:
    """What ends its start closes the server."""
    worker = worker_of("http://127.0.0.1:9", health=HERE)
    worker.on_task("copy", lambda ctx, input, *, db: input)

    @worker.resource
    def db() -> Iterator[int]:
        raise OSError("no database")
        yield 1

    with pytest.raises(OSError, match="no database"):
        worker.start()
    assert worker.health_address is None


# -- under load -------------------------------------------------------------------------------------------------------


def test_answers_while_handlers_wait(running: Worker, platform: LocalPlatform) -> None:
    """They take no thread from it."""
    for _ in range(8):
        platform.submit("wait", None, agent_id=AGENT)
    until(lambda: running.stats().running == 8)
    assert metrics(running)["sekuire_tasks_running"] == {agents(): 8}
    for _ in range(20):
        assert readiness(running)[0] == 200
    running.stop(0.0)


@pytest.mark.slow
def test_answers_while_handlers_compute(platform: LocalPlatform, worker_of: Make) -> None:
    """It gets its turn among as many threads as there are handlers."""
    worker = worker_of(platform, health=HERE)
    is_over = threading.Event()

    @worker.on_task("compute")
    def compute(ctx: TaskContext, input: Any) -> int:
        count = 0
        while not is_over.is_set():
            count += 1
        return count

    with worker:
        assert worker.wait_until_connected(GUARD)
        for _ in range(8):
            platform.submit("compute", None, agent_id=AGENT)
        until(lambda: worker.stats().running == 8)
        # From another process: this one's threads would wait for their own turn.
        script = """
        import http.client, sys, time
        for number in range(10):
            began = time.monotonic()
            connection = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]))
            connection.request("GET", "/livez" if number % 2 else "/metrics")
            answer = connection.getresponse()
            answer.read()
            print(answer.status, time.monotonic() - began)
        """
        output = run_python(script, str(address(worker)[1])).stdout.splitlines()
        is_over.set()
    assert [line.split()[0] for line in output] == ["200"] * 10
    print("seconds of each answer:", *(line.split()[1][:5] for line in output))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child() -> None:
    """It does not answer, does not keep the port, and may have a server of its own."""
    run_python(
        """
        import http.client, json, os
        # Before the fork: a thread that imports at that moment leaves the child half a module.
        import tenacity
        from sekuire import create_worker

        def make(health):
            worker = create_worker(
                agent_id="agent-1", install_token="skt-1", api_base_url="http://127.0.0.1:9", health=health,
                start_timeout=0.0,
            )
            worker.on_task("copy", lambda ctx, input: input)
            return worker

        def ask(address):
            connection = http.client.HTTPConnection(*address)
            connection.request("GET", "/status")
            return json.loads(connection.getresponse().read())["pid"]

        worker = make("0")
        worker.start()
        address = worker.health_address
        reading, writing = os.pipe()
        ending, living = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(living)
            try:
                own = make("0")
                own.start()
                assert own.health_address != address
                assert ask(own.health_address) == os.getpid()
                assert ask(address) == os.getppid()
                os.write(writing, b"x")
                own.stop()
                # Until the parent is done, or has failed.
                os.read(ending, 1)
            except BaseException:
                import traceback
                traceback.print_exc()
                os.write(writing, b"-")
            finally:
                os._exit(0)
        assert os.read(reading, 1) == b"x"
        assert ask(address) == os.getpid()
        worker.stop()
        # The child lives, and has not kept the port.
        again = make(address)
        again.start()
        assert ask(address) == os.getpid()
        again.stop()
        os.close(living)
        os.waitpid(child, 0)
        """,
        forks=True,
    )
