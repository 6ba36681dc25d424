"""sekuire dev: a platform to develop against."""

from __future__ import annotations

import contextlib
import functools
import http.client
import json
import os
import re
import shlex
import signal
import socket
from pathlib import Path
from typing import Dict, List, Optional
from urllib.parse import urlsplit

import pytest

from sekuire import PolicyClient, SekuireSDK, Worker, create_worker
from sekuire.cli import dev
from sekuire.policy.document import thaw

from ..contract.client import Client
from ..support.waiting import until
from .conftest import POSIX_ONLY, Call, Process, Run


def exported(process: Process) -> Dict[str, str]:
    """The variables that a running `sekuire dev` printed, as a shell would read them."""
    process.line("stderr", "the local platform runs on")
    process.line("stdout", "SEKUIRE_API_KEY")
    found = {}
    for line in process._lines["stdout"]:
        command, assignment = shlex.split(line)
        assert command == "export"
        name, _, found[name] = assignment.partition("=")
    return found


def worker_for(found: Dict[str, str]) -> Worker:
    worker = create_worker(
        api_base_url=found["SEKUIRE_API_URL"],
        agent_id=found["SEKUIRE_AGENT_ID"],
        install_token=found["SEKUIRE_INSTALL_TOKEN"],
    )
    worker.on_task("echo", lambda ctx, input: input)
    return worker


@POSIX_ONLY
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_prints_the_environment_and_stops(run: Run, number: int) -> None:
    """stdout holds nothing but the variables, at once; a worker with them runs; a signal ends it with 0."""
    process = run("dev", "--port", "0", "--agent-id", "it's me")
    found = exported(process)
    assert list(found) == ["SEKUIRE_API_URL", "SEKUIRE_AGENT_ID", "SEKUIRE_INSTALL_TOKEN", "SEKUIRE_API_KEY"]
    assert found["SEKUIRE_AGENT_ID"] == "it's me"
    with worker_for(found) as worker:
        assert worker.wait_until_connected(10)
    body = {"agent_id": "it's me", "install_token": found["SEKUIRE_INSTALL_TOKEN"], "capabilities": []}
    for _ in range(3):
        # A worker is restarted often while it is developed.
        client = Client(found["SEKUIRE_API_URL"], found["SEKUIRE_API_KEY"])
        assert client.call("POST", "/installations/bootstrap", {**body, "runtime_info": {}}).status == 201
    process.signal(number)
    code, _, err = process.end()
    assert code == 0
    assert err.splitlines()[-1] == "stopped"
    assert "Traceback" not in err
    assert "Warning" not in err


@pytest.mark.slow
@POSIX_ONLY
def test_it_shows_audit_events(run: Run) -> None:
    """With --show-logs every audit event is a line on stderr, with nothing in it that could steer the terminal."""
    process = run("dev", "--port", "0", "--show-logs")
    found = exported(process)
    with SekuireSDK(
        found["SEKUIRE_AGENT_ID"],
        api_base_url=found["SEKUIRE_API_URL"],
        install_token=found["SEKUIRE_INSTALL_TOKEN"],
    ) as sdk:
        sdk.log("model_call", {"model": "large\x1b[31m\x9b\u202e\n"}, "warn")
        sdk.log("file_access", {"path": "/tmp/ä"})
    line = process.line("stderr", "model_call")
    _, at, rest = line.split(" ", 2)
    assert re.fullmatch(r"\d\d:\d\d:\d\d", at)
    assert rest == 'warn model_call of my-agent: model="large\\u001b[31m\\x9b\\u202e\\n"\n'
    assert "path=/tmp/ä" in process.line("stderr", "file_access")
    assert "state=connected" in process.line("stderr", "health")
    process.signal(signal.SIGTERM)
    assert process.end()[0] == 0


@pytest.mark.slow
@POSIX_ONLY
def test_a_signal_while_a_worker_is_connected(run: Run) -> None:
    """An open stream does not hold it up."""
    process = run("dev", "--port", "0")
    found = exported(process)
    worker = worker_for(found)
    with worker:
        assert worker.wait_until_connected(10)
        process.signal(signal.SIGTERM)
        assert process.end()[0] == 0
        worker.stop(1.0)


@pytest.mark.slow
@POSIX_ONLY
def test_the_database_keeps_the_state(run: Run, tmp_path: Path) -> None:
    """With --db a restarted platform has the same API key and tasks."""
    keys, ids = [], []
    for _ in range(2):
        process = run("dev", "--port", "0", "--db", "platform.db")
        found = exported(process)
        client = Client(found["SEKUIRE_API_URL"], found["SEKUIRE_API_KEY"])
        keys.append(found["SEKUIRE_API_KEY"])
        if not ids:
            ids.append(client.submit("my-agent", "echo", {"n": 1}))
        else:
            assert client.task(ids[0])["input"] == {"n": 1}
        process.signal(signal.SIGTERM)
        assert process.end()[0] == 0
        # Nothing but the database is left: it was closed in order.
        assert [path.name for path in tmp_path.glob("platform.db*") if not path.name.endswith(".lock")] == [
            "platform.db"
        ]
    assert keys[0] == keys[1]


def test_a_port_that_is_taken(call: Call) -> None:
    """Exit 2, naming the port and what to do."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        code, out, err = call("dev", "--port", str(port))
    assert (code, out) == (2, "")
    assert err.startswith(f"sekuire dev: error: --port: port {port} on 127.0.0.1 is taken; stop the program")


@pytest.mark.parametrize(
    ("args", "problem"),
    [
        (["--port", "65536"], "--port: must be a whole number from 0 to 65535, got '65536'"),
        (["--port", "x"], "--port: must be a whole number"),
        (["--host", "host.invalid"], "--host: the host 'host.invalid' cannot be resolved"),
        (["--db", "missing/platform.db"], "--db: "),
        (["--db", "."], "--db: "),
        (["--agent-id", ""], "--agent-id: "),
        (["--agent-id", "a" * 300], "--agent-id: "),
    ],
)
def test_wrong_settings(call: Call, args: List[str], problem: str) -> None:
    """Exit 2, naming the option."""
    code, out, err = call("dev", "--port", "0", *args)
    assert (code, out) == (2, "")
    assert problem in err
    assert "Traceback" not in err


def test_a_second_signal_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one asks for the stop, the second ends the process."""
    codes: List[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    with dev._Signals() as signals:
        signal.raise_signal(signal.SIGTERM)
        signals.wait()
        signal.raise_signal(signal.SIGINT)
    assert codes == [130]


POLICY = {"agent": {"capabilities": {"denied_capabilities": ["drop"]}}}


@pytest.mark.slow
@POSIX_ONLY
def test_a_policy(run: Run, tmp_path: Path) -> None:
    """--policy makes a file's content the signed, active policy; saving the file makes it active again."""
    path = tmp_path / "policy.json"
    path.write_text(json.dumps(POLICY))
    process = run("dev", "--port", "0", "--db", "dev.db", "--policy", "policy.json")
    process.line("stdout", "SEKUIRE_POLICY_PUBLIC_KEYS")
    found = exported(process)
    assert list(found)[4:] == ["SEKUIRE_WORKSPACE_ID", "SEKUIRE_POLICY_PUBLIC_KEYS"]
    with PolicyClient(
        found["SEKUIRE_API_URL"],
        api_key=found["SEKUIRE_API_KEY"],
        trusted_policy_keys=[found["SEKUIRE_POLICY_PUBLIC_KEYS"]],
        cache_ttl=0,
    ) as client:
        first = client.fetch_active_policy(found["SEKUIRE_WORKSPACE_ID"])
        assert first is not None
        assert (first.version, first.origin, thaw(first.content)) == (1, "pinned", POLICY)
        # A whole policy, as `sekuire policy pull` writes it, will do too.
        path.write_text(json.dumps({"policy_id": "p", "hash": "x", "content": {"rate_limits": None}}))
        process.line("stderr", "version 2 is active in ws_local")
        path.write_text("{")
        process.line("stderr", "the policy stays as it was")
        second = client.fetch_active_policy(found["SEKUIRE_WORKSPACE_ID"])
        assert second is not None
        assert second.version == 2
    path.write_text('{"permissions": {"n": 1}}')
    process.line("stderr", "version 3 is active in ws_local")
    process.line("stderr", "warning: permissions.n is unknown")
    process.signal(signal.SIGTERM)
    assert process.end()[0] == 0
    # The same content makes no new version.
    path.write_text('{"permissions": {"n": 1.0}}')
    again = run("dev", "--port", "0", "--db", "dev.db", "--policy", "policy.json")
    again.line("stderr", "version 3 is active in ws_local")
    again.signal(signal.SIGTERM)
    assert again.end()[0] == 0


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (None, "No such file"),
        ("{", "is not valid JSON"),
        ("[]", "not a JSON object"),
        ('{"permissions": {"network": {"enabled": "yes"}}}', "permissions.network.enabled"),
        ('{"a": 1, "a": 2}', "twice"),
        ('{"compliance": 99999999999999999999}', "99999999999999999999"),
        ('{"Statement": [{"Effect": "Deny"}]}', "has 'Statement' and not one of permissions"),
        ('{"a": "' + "x" * 1024 * 1024 + '"}', "larger than 1 MiB"),
    ],
)
def test_a_policy_that_cannot_be_used(call: Call, tmp_path: Path, text: Optional[str], problem: str) -> None:
    """Exit 2, and what is wrong with the file."""
    if text is not None:
        (tmp_path / "policy.json").write_text(text)
    code, out, err = call("dev", "--port", "0", "--policy", "policy.json")
    assert (code, out) == (2, "")
    assert "--policy: cannot use 'policy.json'" in err
    assert problem in err


@pytest.mark.slow
@POSIX_ONLY
def test_faults(run: Run) -> None:
    """--fault injects; the faults are listed at the start and their counts at the end, on stderr."""
    process = run(
        "dev",
        "-v",
        "--port=0",
        "--fault=error:rate=0.5,status=503,on=complete,retry-after=0",
        "--fault",
        "latency:0.001-0.002",
        "--fault=outage:0.05,every=0.05-0.1,times=2",
        "--fault-seed",
        "7",
    )
    found = exported(process)
    for line in (
        "error:503,rate=0.5,on=complete,retry-after=0",
        "latency:0.001-0.002",
        "outage:0.05,every=0.05-0.1,times=2",
    ):
        process.line("stderr", f"fault: {line}")
    process.line("stderr", "fault seed: 7")
    worker = worker_for(found)
    client = Client(found["SEKUIRE_API_URL"], found["SEKUIRE_API_KEY"])

    def is_done(task_id: str) -> bool:
        # Whoever meets an outage comes back.
        with contextlib.suppress(OSError, http.client.HTTPException):
            return bool(client.task(task_id)["status"] == "completed")
        return False

    def submitted(number: int) -> str:
        with contextlib.suppress(OSError, http.client.HTTPException):
            return client.submit("my-agent", "echo", number)
        return ""

    with worker:
        for number in range(10):
            task_id = until(functools.partial(submitted, number))
            until(functools.partial(is_done, task_id))
    process.line("stderr", "injected, hits 1: outage:")
    process.signal(signal.SIGTERM)
    code, out, err = process.end()
    assert code == 0
    assert len(out.splitlines()) == 4
    counts = dict(re.findall(r"([a-z-]+) (\d+)", err.partition("injected: ")[2]))
    assert set(counts) == {"error", "latency", "outage"}
    assert "Traceback" not in err


@pytest.mark.slow
@POSIX_ONLY
def test_no_fault_is_not_spoken_of(run: Run) -> None:
    """Without --fault nothing is said of faults."""
    process = run("dev", "--port", "0")
    exported(process)
    process.signal(signal.SIGTERM)
    code, _, err = process.end()
    assert code == 0
    assert "fault" not in err
    assert "injected" not in err


@pytest.mark.parametrize(
    ("args", "problem"),
    [
        (["--fault", "eror:rate=0.1"], "--fault: 'eror:rate=0.1': unknown kind; known are latency, error, reset, "),
        (
            ["--fault", "error:rate=2"],
            "--fault: 'error:rate=2': rate: must be a number from 0 to 1; for example error:",
        ),
        (["--fault", "reset", "--fault", "outage:3"], "--fault: 'outage:3': every: missing"),
        (["--fault", "latency:1,on=completes"], "--fault: 'latency:1,on=completes': on: there is no endpoint"),
        (["--fault", ""], "--fault: '': unknown kind; known are "),
        (["--fault-seed", "x"], "--fault-seed: invalid int value: 'x'"),
        (["--fault"], "--fault: expected one argument"),
    ],
)
def test_wrong_faults(call: Call, args: List[str], problem: str) -> None:
    """Exit 2, naming the option, what is wrong, and an example."""
    code, out, err = call("dev", "--port", "0", *args)
    assert (code, out) == (2, "")
    assert problem in err
    assert "Traceback" not in err


def dashboard_link(process: Process) -> str:
    return process.line("stderr", "dashboard: ").partition("dashboard: ")[2].strip()


def status_of(url: str) -> int:
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=10)
    try:
        connection.request("GET", f"{parts.path}?{parts.query}")
        return connection.getresponse().status
    finally:
        connection.close()


def test_it_prints_links_to_the_dashboard(run: Run, call: Call) -> None:
    """One at its start, and with --link another one for the platform that runs, as .env names it."""
    process = run("dev", "--port", "0")
    link = dashboard_link(process)
    assert status_of(link) == 200
    process.line("stderr", ".env")
    code, out, err = call("dev", "--link")
    assert (code, err) == (0, "")
    assert out.startswith(link.partition("code=")[0])
    assert out.strip() != link
    assert status_of(out.strip()) == 200
    process.signal(signal.SIGINT)
    process.end()
    code, out, err = call("dev", "--link")
    assert (code, out) == (1, "")
    assert "no platform answers at" in err
    assert "start it: sekuire dev" in err


def test_a_link_needs_the_key_of_the_platform_that_runs(run: Run, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    process = run("dev", "--port", "0", "--ephemeral")
    monkeypatch.setenv("SEKUIRE_API_URL", exported(process)["SEKUIRE_API_URL"])
    code, _, err = call("dev", "--link")
    assert code == 2
    assert "no API key" in err
    monkeypatch.setenv("SEKUIRE_API_KEY", "sk_live_of_another_one")
    code, _, err = call("dev", "--link")
    assert code == 1
    assert "does not accept the key of SEKUIRE_API_KEY" in err


def test_without_the_dashboard(run: Run, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    process = run("dev", "--port", "0", "--no-ui")
    found = exported(process)
    process.line("stderr", ".env")
    assert not any("dashboard" in line for line in process._lines["stderr"])
    assert status_of(f"{found['SEKUIRE_API_URL']}/ui/") == 404
    code, _, err = call("dev", "--link")
    assert code == 1
    assert "has no dashboard; start it without --no-ui" in err
    code, _, err = call("dev", "--no-ui", "--open")
    assert code == 2
    assert "--open opens the dashboard" in err


def test_a_browser_is_opened(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Where none can be started, a line says so."""
    opened: List[str] = []
    monkeypatch.setattr("webbrowser.open", lambda url: opened.append(url) or url.endswith("1"))
    dev._open("http://127.0.0.1:1/1")
    assert capsys.readouterr().err == ""
    dev._open("http://127.0.0.1:1/2")
    assert "open the link yourself" in capsys.readouterr().err
    assert len(opened) == 2
