"""sekuire status: a worker's health as a table, and as an exit code."""

from __future__ import annotations

import json
import signal
import socket
from typing import Any, Callable, Iterator

import pytest

from sekuire import Worker
from sekuire.local import LocalPlatform

from ..health.asking import free_port
from ..support.waiting import GUARD, until
from .conftest import AGENT, POSIX_ONLY, Call, Run, variables

Make = Callable[..., Worker]


@pytest.fixture
def worker(platform: LocalPlatform, worker_of: Make) -> Iterator[Worker]:
    made = worker_of(platform, agent_id=AGENT, health=("127.0.0.1", 0))
    made.on_task("copy", lambda ctx, input: input)
    with made:
        assert made.wait_until_connected(GUARD)
        until(lambda: made.health().heartbeat_age is not None)
        yield made


def port_of(worker: Worker) -> int:
    assert worker.health_address is not None
    return worker.health_address[1]


def test_ready(call: Call, worker: Worker) -> None:
    """A table with all that a person asks first; exit code 0. Lines fit a terminal."""
    code, out, err = call("status", str(port_of(worker)))
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "ready"
    assert f"url           http://127.0.0.1:{port_of(worker)} (process " in out
    assert f"worker        {worker.worker_id[:8]} of {AGENT}, running" in lines
    assert "tasks         0 of 8 running, 0 waiting" in lines
    assert max(map(len, lines)) <= 80


def test_not_ready(call: Call, worker: Worker) -> None:
    """Exit code 1 with the reasons; for liveness 0."""
    worker.pause()
    code, out, _ = call("status", f"http://127.0.0.1:{port_of(worker)}")
    assert (code, out.splitlines()[0]) == (1, "not ready: paused")
    assert call("status", f"127.0.0.1:{port_of(worker)}", "--live")[0] == 0


def test_not_alive(call: Call, worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """--live fails only where a restart helps."""
    monkeypatch.setattr(worker.vitals.stream, "has_ended", lambda: True)
    code, out, _ = call("status", str(port_of(worker)), "--live")
    assert code == 1
    assert out.splitlines()[0].startswith("not alive: a thread of worker ")


@pytest.mark.parametrize("is_paused", [False, True])
def test_json(call: Call, worker: Worker, is_paused: bool) -> None:
    """One object, with the same exit code."""
    if is_paused:
        worker.pause()
    code, out, _ = call("status", str(port_of(worker)), "--json")
    found = json.loads(out)
    assert code == int(is_paused)
    assert (found["live"], found["ready"], found["reasons"]) == (True, not is_paused, ["paused"] * is_paused)
    assert found["workers"][0]["worker_id"] == worker.worker_id
    assert found["url"] == f"http://127.0.0.1:{port_of(worker)}"


def test_the_address_of_the_variable(call: Call, worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an argument it asks where the worker of this environment is; 0.0.0.0 is asked on loopback."""
    monkeypatch.setenv("SEKUIRE_WORKER_HTTP", f"0.0.0.0:{port_of(worker)}")
    code, out, _ = call("status")
    assert code == 0
    assert f"http://127.0.0.1:{port_of(worker)}" in out


def test_the_address_of_a_file(call: Call, worker: Worker, tmp_path: Any) -> None:
    """As for every command, .env counts."""
    (tmp_path / ".env").write_text(f"SEKUIRE_WORKER_HTTP={port_of(worker)}\n")
    (tmp_path / ".env").chmod(0o600)
    assert call("status")[0] == 0


def test_where_the_status_is_not_shown(call: Call, worker_of: Make) -> None:
    """What the probes say is enough for the verdict, and a row says what is missing."""
    worker = worker_of("http://127.0.0.1:9", agent_id=AGENT, health=("0.0.0.0", 0), start_timeout=0.0)
    worker.on_task("copy", lambda ctx, input: input)
    with worker:
        code, out, _ = call("status", str(port_of(worker)))
        assert (code, out.splitlines()[0]) == (1, "not ready: stream closed")
        assert "SEKUIRE_WORKER_HTTP_STATUS=1" in out
        code, out, _ = call("status", str(port_of(worker)), "--json")
        assert json.loads(out)["workers"] is None


def test_nobody_answers(call: Call) -> None:
    """Exit code 1, and one line with the address and what may be missing."""
    port = free_port()
    code, out, err = call("status", str(port))
    assert (code, out) == (1, "")
    assert err.startswith(f"sekuire status: error: no worker answers at http://127.0.0.1:{port} (Connection refused); ")
    assert f"--http {port}" in err
    assert err.count("\n") == 1


def test_somebody_says_nothing(call: Call, silent_url: str) -> None:
    """The wait is bounded."""
    code, _, err = call("status", silent_url, "--timeout", "0.2")
    assert code == 1
    assert "no answer within 0.2 s" in err


def test_another_server(call: Call, platform: LocalPlatform) -> None:
    """It is not taken for a worker."""
    code, out, err = call("status", platform.url)
    assert (code, out) == (1, "")
    assert f"another server than a worker's answers at {platform.url}" in err


@pytest.mark.parametrize(
    "url", ["", "x", ":8080", "http://", "ftp://127.0.0.1:1", "http://me@127.0.0.1:1", "127.0.0.1:x"]
)
def test_wrong_addresses(call: Call, url: str) -> None:
    """Exit code 2, with the forms that there are."""
    code, out, err = call("status", url)
    assert (code, out) == (2, "")
    assert "http://127.0.0.1:8080" in err


def test_a_wrong_variable(call: Call) -> None:
    """It is named."""
    code, _, err = call("status", env={"SEKUIRE_WORKER_HTTP": "x"})
    assert code == 2
    assert "SEKUIRE_WORKER_HTTP" in err


MODULE = """
import time
from sekuire import TaskRegistry

tasks = TaskRegistry()

@tasks.task("nap")
def nap(ctx, input):
    ctx.report_progress(0.5)
    time.sleep(input)
"""


@pytest.mark.slow
@POSIX_ONLY
@pytest.mark.parametrize("by", ["option", "variable"])
def test_as_a_kubelet_sees_it(run: Run, call: Call, platform: LocalPlatform, tmp_path: Any, by: str) -> None:
    """Live before the login, ready when connected, not ready from SIGTERM on, live until the running task has ended."""
    (tmp_path / "jobs.py").write_text(MODULE)
    port = free_port()
    options = ("--http", f"0.0.0.0:{port}") if by == "option" else ()
    more = {} if by == "option" else {"SEKUIRE_WORKER_HTTP": f"0.0.0.0:{port}"}
    process = run("worker", "jobs:tasks", *options, env=variables(platform, **more))
    seen = []

    def probe() -> Any:
        """Both probes, as the kubelet sends them: 0, or 1 where the process does not answer."""
        found = (call("status", str(port), "--live")[0], call("status", str(port))[0])
        if not seen or seen[-1] != found:
            seen.append(found)
        return found

    until(lambda: probe() == (0, 0))
    task = platform.submit("nap", 1.5, agent_id=AGENT)
    until(lambda: platform.progress(task))
    process.signal(signal.SIGTERM)
    until(lambda: process.popen.poll() is not None or (probe(), False)[1])
    code, _, err = process.end()
    assert code == 0, err
    assert f"health and metrics are at http://0.0.0.0:{port}" in err
    assert platform.wait(task, GUARD)["status"] == "completed"
    # The process is not there yet, is there, is ready, drains, and has gone. It may come up between the two probes.
    seen = [one for one in seen[: seen.index((0, 0))] if one != (1, 0)] + seen[seen.index((0, 0)) :]
    assert [one for one in seen if one != (0, 1)] in ([(1, 1), (0, 0), (1, 1)], [(1, 1), (0, 0)], [(0, 0), (1, 1)])
    assert (0, 1) in seen[seen.index((0, 0)) :]


@pytest.mark.slow
def test_a_taken_port_of_a_worker(run: Run, platform: LocalPlatform, tmp_path: Any) -> None:
    """Exit code 2, one line, and no install token is used up."""
    (tmp_path / "jobs.py").write_text(MODULE)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        code, out, err = run("worker", "jobs:tasks", "--http", str(port), env=variables(platform)).end()
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith(f"sekuire worker: error: health: port {port} on 127.0.0.1 is taken; ")
    assert platform.installations() == []


@pytest.mark.parametrize("value", ["x", ":8080", "127.0.0.1", "1.2.3.4:99999", "8080x"])
def test_wrong_options_of_a_worker(call: Call, value: str) -> None:
    """Exit code 2, with the forms that there are; the variable is named where it is wrong."""
    code, _, err = call("worker", "jobs:tasks", "--http", value)
    assert code == 2
    assert "must be PORT or HOST:PORT, such as 8080 or 0.0.0.0:8080" in err


def test_a_wrong_variable_of_a_worker(call: Call, tmp_path: Any) -> None:
    """It is named, whether an SDK reads it or the command does."""
    (tmp_path / "wrong.py").write_text(
        "from sekuire import create_worker\nworker = create_worker(agent_id='a', install_token='skt_x')\n" + MODULE
    )
    env = {"SEKUIRE_WORKER_HTTP": "x", "SEKUIRE_AGENT_ID": AGENT, "SEKUIRE_INSTALL_TOKEN": "skt_x"}
    for target in ("wrong:worker", "wrong:tasks"):
        code, _, err = call("worker", target, env=env)
        assert code == 2
        assert "SEKUIRE_WORKER_HTTP" in err
        assert "'0.0.0.0:8080'" in err
