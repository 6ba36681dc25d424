"""sekuire tasks, installations and tokens: what a person asks of a platform from a terminal."""

from __future__ import annotations

import datetime as dt
import json
import signal
import threading
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional

import pytest

from sekuire import SekuireClient, SekuireSDK, TaskError, create_worker
from sekuire.cli import access, describe, tasks
from sekuire.local import LocalPlatform

from ..support.terminal import COLUMNS, Terminal
from ..support.waiting import GUARD, until
from .conftest import AGENT, POSIX_ONLY, Call, Run


@pytest.fixture
def gate() -> threading.Event:
    """What the handler of `hold` waits for."""
    return threading.Event()


@pytest.fixture
def worker(platform: LocalPlatform, gate: threading.Event) -> Iterator[Any]:
    worker = create_worker(
        api_base_url=platform.url, agent_id=AGENT, install_token=platform.create_install_token(AGENT), quiet=True
    )

    @worker.on_task("hold")
    def hold(ctx: Any, input: Any) -> str:
        ctx.report_progress(0.5, "half of it")
        while not gate.wait(0.01):
            ctx.raise_if_cancelled()
        return "held"

    @worker.on_task("fail")
    def fail(ctx: Any, input: Any) -> None:
        raise TaskError("no_luck", "not today", details={"tomorrow": True})

    worker.on_task("echo", lambda ctx, input: input)
    with worker:
        assert worker.wait_until_connected(GUARD)
        yield worker
        gate.set()


def status_of(client: SekuireClient, task_id: str) -> str:
    return client.handle(task_id).status()


# -- list -------------------------------------------------------------------------------------------------------------


def test_an_empty_list_says_what_to_do(call: Call, environ: Dict[str, str]) -> None:
    assert call("tasks", "list", env=environ) == (0, "", "no tasks yet; submit one: sekuire send CAPABILITY JSON\n")
    code, out, err = call("tasks", "list", "--status", "failed")
    assert (code, out, err) == (0, "", "no such tasks; leave out a filter to see more\n")
    assert json.loads(call("tasks", "list", "--json")[1]) == {"tasks": []}


def test_list(call: Call, environ: Dict[str, str], client: SekuireClient, worker: Any) -> None:
    """Newest first, aligned, with the error of a failed task; --json has everything."""
    ids = [client.submit(name, {"n": 1}).id for name in ("echo", "fail")]
    for one in ids:
        client.handle(one).wait(GUARD)
    later = client.submit("echo", delay=7200).id
    code, out, err = call("tasks", "list", env=environ)
    assert (code, err) == (0, "")
    head, *rows = [line.split(None, 2) for line in out.splitlines()]
    assert head[:2] == ["TASK", "STATE"]
    assert [row[:2] for row in rows] == [[later, "delayed"], [ids[1], "failed"], [ids[0], "completed"]]
    assert rows[1][2].endswith("fail: no_luck: not today")
    assert len({line.index("  ") for line in out.splitlines()[1:]}) == 1
    found = json.loads(call("tasks", "list", "--json", "--limit", "2")[1])["tasks"]
    assert [one["task_id"] for one in found] == [later, ids[1]]
    assert "timeline" in found[0]


def test_filters_and_limit(call: Call, environ: Dict[str, str], client: SekuireClient) -> None:
    for number in range(3):
        client.submit("echo", number)
    other = client.submit("other", agent_id="somebody").id
    code, out, err = call("tasks", "list", "--capability", "other", "--agent-id", "somebody", env=environ)
    assert (code, [line.split()[0] for line in out.splitlines()], err) == (0, ["TASK", other], "")
    code, out, err = call("tasks", "list", "--limit", "2")
    assert (code, len(out.splitlines()), err) == (0, 3, "the newest 2; --limit N shows more\n")


@pytest.mark.parametrize(
    ("args", "problem"),
    [
        (["list", "--status", "running"], "invalid choice: 'running'"),
        (["list", "--limit", "0"], "must be a whole number, 1 or more, got '0'"),
        (["list", "--capability", ""], "capability: must be a non-empty str"),
        (["show"], "the following arguments are required: ID"),
        (["show", ".."], "task_id: must be a non-empty str"),
        (["cancel"], "the following arguments are required: ID"),
        (["wait", "x", "--timeout", "soon"], "must be seconds up to 30 days, such as 90, 10m, 2h or 1d, got 'soon'"),
        (["wait", "x", "--timeout", "nan"], "must be seconds up to 30 days"),
        (["lost"], "invalid choice: 'lost'"),
        ([], "the following arguments are required: ACTION"),
    ],
)
def test_wrong_usage(call: Call, environ: Dict[str, str], args: List[str], problem: str) -> None:
    code, out, err = call("tasks", *args, env=environ)
    assert (code, out) == (2, "")
    assert problem in err


@pytest.mark.parametrize(
    "args", [("tasks", "list"), ("tasks", "watch"), ("installations", "list"), ("tokens", "create")]
)
def test_what_refuses_them_all(call: Call, environ: Dict[str, str], args: List[str]) -> None:
    """No key, a wrong key, and a platform that is not there: one line, and the right exit code."""
    code, _, err = call(*args, env={**environ, "SEKUIRE_API_KEY": "sk_live_canary"})
    assert code == 1
    assert "the platform refused the API key from SEKUIRE_API_KEY: HTTP 401 INVALID_API_KEY" in err
    assert "canary" not in err
    code, _, err = call(*args, env={"SEKUIRE_API_KEY": ""})
    assert (code, len(err.splitlines())) == (2, 1)
    assert "no API key: set SEKUIRE_API_KEY, or give --api-key-file PATH" in err


def test_a_platform_that_is_not_there(call: Call, environ: Dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "RETRY_FOR", 0.1)
    monkeypatch.setattr(tasks, "_PATIENCE", 0.0)
    monkeypatch.setattr(tasks, "_PAUSE", 0.01)
    for args in (("tasks", "list"), ("tasks", "watch"), ("installations", "list")):
        code, out, err = call(*args, "--url", "http://127.0.0.1:9", env=environ)
        assert (code, out) == (1, "")
        assert "cannot reach 127.0.0.1:9" in err


# -- show -------------------------------------------------------------------------------------------------------------


def test_show(call: Call, environ: Dict[str, str], client: SekuireClient, worker: Any) -> None:
    """Facts, the timeline, the input, and the output or the error."""
    good, bad = client.submit("echo", {"text": "é\x1b[2J"}, trace_id="t-1"), client.submit("fail", None)
    assert good.wait(GUARD)
    assert bad.wait(GUARD)
    code, out, _ = call("tasks", "show", good.id, env=environ)
    assert code == 0
    for part in (f"task        {good.id}", "state       completed", "trace       t-1", "what happened:", "output:"):
        assert part in out
    assert out.count('"text": "é\\u001b[2J"') == 2
    out = call("tasks", "show", bad.id)[1]
    assert '"code": "no_luck"' in out
    assert "output:" not in out
    assert json.loads(call("tasks", "show", bad.id, "--json")[1])["error"]["message"] == "not today"


def test_show_of_a_task_that_is_not_there(call: Call, environ: Dict[str, str]) -> None:
    code, out, err = call("tasks", "show", "task_x", env=environ)
    assert (code, out) == (1, "")
    assert err == "sekuire tasks: error: HTTP 404 TASK_NOT_FOUND: there is no task 'task_x'\n"


# -- wait -------------------------------------------------------------------------------------------------------------


def test_wait_for_one(call: Call, environ: Dict[str, str], client: SekuireClient, worker: Any) -> None:
    """Like `send --wait`: the output on stdout, or the error on stderr."""
    assert call("tasks", "wait", client.submit("echo", [1, "é"]).id, env=environ)[:2] == (0, '[\n  1,\n  "é"\n]\n')
    code, out, err = call("tasks", "wait", client.submit("fail").id)
    assert (code, out) == (1, "")
    assert "sekuire tasks wait: error: the task failed: no_luck: not today" in err
    late = client.submit("echo", delay=3600).id
    code, out, err = call("tasks", "wait", late, "--timeout", "0.1")
    assert (code, out) == (1, "")
    assert f"task {late} is still queued after 0.1 s" in err


def test_wait_for_several(call: Call, environ: Dict[str, str], client: SekuireClient, worker: Any) -> None:
    """An object a line, in the order of the ids; one that is unknown does not keep the others back."""
    good, bad, late = client.submit("echo", 1).id, client.submit("fail").id, client.submit("echo", delay=3600).id
    code, out, _ = call("tasks", "wait", "task_x", good, bad, late, good, "--timeout", "2", env=environ)
    unknown, completed, failed, queued = map(json.loads, out.splitlines())
    assert code == 1
    assert unknown == {"task_id": "task_x", "error": {"code": "TASK_NOT_FOUND", "message": "there is no task 'task_x'"}}
    assert completed == {"task_id": good, "status": "completed", "output": 1}
    error = {"code": "no_luck", "message": "not today", "retryable": False, "details": {"tomorrow": True}}
    assert failed == {"task_id": bad, "status": "failed", "error": error}
    assert queued == {"task_id": late, "status": "queued"}
    assert call("tasks", "wait", good, "--quiet")[0] == 0


@POSIX_ONLY
@pytest.mark.slow
@pytest.mark.parametrize("is_last", [False, True])
def test_ctrl_c_says_how_to_continue(
    run: Run, environ: Dict[str, str], client: SekuireClient, worker: Any, gate: threading.Event, is_last: bool
) -> None:
    """The command that it prints waits on for what is left, at the same platform."""
    held = client.submit("hold").id
    ids = [client.submit("echo", "first").id, held] if is_last else [held]
    url = environ.pop("SEKUIRE_API_URL")
    process = run("tasks", "wait", *ids, "--url", url, env=environ)
    if is_last:
        process.line("stdout", "first")
    else:
        process.line("stderr", "half of it")
    process.signal(signal.SIGINT)
    code, _, err = process.end()
    assert code == 130
    assert "sekuire tasks wait: error: interrupted" in err
    command = process.line("stderr", "to continue, run: sekuire ").partition("sekuire ")[2]
    assert command.endswith(f"{held} --url {url}\n")
    gate.set()
    code, out, _ = run(*command.split(), env=environ).end()
    assert code == 0
    assert '"held"' in out


# -- watch ------------------------------------------------------------------------------------------------------------


def test_watch_one(
    call: Call, environ: Dict[str, str], client: SekuireClient, worker: Any, gate: threading.Event
) -> None:
    """A line for each event, to the end of the task; the exit code says how it ended."""
    handle = client.submit("hold")
    threading.Timer(0.2, gate.set).start()
    code, out, _ = call("tasks", "watch", handle.id, env=environ)
    assert code == 0
    assert [line.split()[1] for line in out.splitlines()] == ["queued", "assigned", "completed"]
    bad = client.submit("fail").id
    code, out, _ = call("tasks", "watch", bad)
    assert code == 1
    assert out.splitlines()[-1] == "failed no_luck: not today"
    code, out, _ = call("tasks", "watch", bad, "--json")
    assert [json.loads(line)["state"] for line in out.splitlines()] == ["queued", "assigned", "failed"]


@POSIX_ONLY
@pytest.mark.slow
@pytest.mark.parametrize("is_json", [False, True])
def test_watch_all(run: Run, environ: Dict[str, str], client: SekuireClient, worker: Any, is_json: bool) -> None:
    """What has not ended, then each change; Ctrl-C ends it without an error."""
    old = client.submit("echo").id
    assert client.handle(old).wait(GUARD)
    waits = client.submit("nobody", {}).id
    process = run("tasks", "watch", *(["--json"] if is_json else []), env=environ)
    process.line("stdout", waits)
    new = client.submit("fail").id
    process.line("stdout", "no_luck")
    process.signal(signal.SIGINT)
    code, out, err = process.end()
    assert (code, err) == (130, "following tasks; Ctrl-C ends it\n")
    assert old not in out
    assert new in out
    if is_json:
        assert all(json.loads(line)["task_id"] in (waits, new) for line in out.splitlines())


# -- cancel and retry -------------------------------------------------------------------------------------------------


def test_cancel(call: Call, environ: Dict[str, str], client: SekuireClient, worker: Any, gate: threading.Event) -> None:
    """Several at once: what waits is cancelled, what runs is asked to, what has ended is refused by name."""
    running, waiting, ended = client.submit("hold"), client.submit("echo", delay=3600), client.submit("echo")
    assert ended.wait(GUARD)
    until(lambda: running.status() == "assigned")
    code, out, err = call(
        "tasks", "cancel", waiting.id, ended.id, running.id, "task_x", waiting.id, "--reason", "tired", env=environ
    )
    assert code == 1
    assert out.splitlines()[0] == f"{waiting.id} cancelled"
    assert out.splitlines()[1].startswith(running.id)
    assert f"sekuire tasks cancel: error: {ended.id}: HTTP 409 ALREADY_COMPLETED" in err
    assert "sekuire tasks cancel: error: task_x: HTTP 404 TASK_NOT_FOUND" in err
    assert running.wait(GUARD)
    assert client.task(running.id)["error"]["code"] == "cancelled"
    assert "tired" in client.task(waiting.id)["error"]["message"]


def test_a_handler_that_finishes_all_the_same(
    call: Call, environ: Dict[str, str], platform: LocalPlatform, client: SekuireClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its task is not said to be cancelled."""
    worker = create_worker(
        api_base_url=platform.url, agent_id="other", install_token=platform.create_install_token("other"), quiet=True
    )
    worker.on_task("finish", lambda ctx, input: ctx.wait_cancelled(GUARD))
    cancel = SekuireClient.cancel

    def cancel_and_wait(self: SekuireClient, task_id: str, reason: Optional[str] = None) -> None:
        cancel(self, task_id, reason)
        assert handle.wait(GUARD)

    with worker:
        handle = client.submit("finish", agent_id="other")
        until(lambda: handle.status() == "assigned")
        monkeypatch.setattr(SekuireClient, "cancel", cancel_and_wait)
        assert call("tasks", "cancel", handle.id, env=environ)[:2] == (0, f"{handle.id} completed nevertheless\n")


def test_retry(call: Call, environ: Dict[str, str], client: SekuireClient, worker: Any) -> None:
    failed, good = client.submit("fail"), client.submit("echo")
    assert failed.wait(GUARD)
    assert good.wait(GUARD)
    code, out, err = call("tasks", "retry", failed.id, good.id, env=environ)
    assert (code, out) == (1, f"{failed.id} queued again\n")
    assert f"{good.id}: HTTP 409 NOT_FAILED: the task is completed; only a failed task can be tried again" in err
    until(lambda: client.task(failed.id)["attempt"] == 2)


# -- installations and tokens -----------------------------------------------------------------------------------------


def test_installations(call: Call, environ: Dict[str, str], platform: LocalPlatform, client: SekuireClient) -> None:
    """Each action on an installation has its effect, and the list shows it."""
    code, out, err = call("installations", "list", env=environ)
    assert (code, out) == (0, "")
    assert err == "no installations yet; one is made when a worker logs in: sekuire worker MODULE:NAME\n"
    worker = create_worker(
        api_base_url=platform.url, agent_id=AGENT, install_token=platform.create_install_token(AGENT), quiet=True
    )
    worker.on_task("echo", lambda ctx, input: input)
    with worker:
        assert worker.wait_until_connected(GUARD)
        one = client.installations()[0]["installation_id"]
        until(lambda: client.installations()[0]["workers"])

        def row() -> str:
            return call("installations", "list")[1].splitlines()[1]

        assert row().split()[:2] == [one, "running"]
        assert row().endswith(f"{AGENT}: 1 worker, echo")
        assert call("installations", "pause", one, "--reason", "upgrade") == (0, f"{one} asked to pause\n", "")
        until(worker.is_paused)
        assert row().split()[1] == "paused"
        assert call("installations", "resume", one)[0] == 0
        until(lambda: not worker.is_paused())
        assert json.loads(call("installations", "list", "--json")[1])["installations"][0]["installation_id"] == one
        assert call("installations", "list", "--agent-id", "somebody")[1] == ""
        assert call("installations", "terminate", one)[0] == 0
        assert worker.wait(GUARD)
    code, out, _ = call("installations", "revoke", one, "inst_x", "--shutdown-timeout", "1")
    assert (code, out) == (1, f"{one} revoked\n")
    assert call("installations", "list")[1:] == ("", "1 more, stopped or revoked: --all shows it\n")
    assert call("installations", "list", "--all")[1].splitlines()[1].split()[:2] == [one, "revoked"]


def test_installations_of_an_sdk(
    call: Call, environ: Dict[str, str], platform: LocalPlatform, client: SekuireClient
) -> None:
    """It has logged in before its worker had handlers, and what the worker accepts is shown all the same."""
    token = platform.create_install_token(AGENT)
    sdk = SekuireSDK(AGENT, api_base_url=platform.url, install_token=token, heartbeat_interval=0.2, quiet=True)
    with sdk:
        worker = sdk.create_task_worker()
        worker.on_task("echo", lambda ctx, input: input)
        with worker:
            until(lambda: client.installations()[0]["workers"])
            shown = call("installations", "list", env=environ)[1].splitlines()[1]
            assert shown.endswith(f"{AGENT}: 1 worker, echo")


def test_tokens(call: Call, environ: Dict[str, str], platform: LocalPlatform) -> None:
    """The token alone is on stdout, and an agent can log in with it."""
    code, out, err = call("tokens", "create", "--max-uses", "2", env=environ)
    assert code == 0
    assert err == f"an install token of {AGENT}, good 2 times; put it into SEKUIRE_INSTALL_TOKEN of its worker\n"
    for _ in range(2):
        worker = create_worker(api_base_url=platform.url, agent_id=AGENT, install_token=out.strip(), quiet=True)
        worker.on_task("echo", lambda ctx, input: input)
        with worker:
            assert worker.wait_until_connected(GUARD)
    found = json.loads(call("tokens", "create", "--json", "--agent-id", "other")[1])
    assert found == {"install_token": found["install_token"], "agent_id": "other", "max_uses": 1}
    code, _, err = call("tokens", "create", env={"SEKUIRE_AGENT_ID": ""})
    assert (code, err) == (2, "sekuire tokens: error: whose token is it? give --agent-id, or set SEKUIRE_AGENT_ID\n")


# -- how it looks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "now"), (1, "1 s ago"), (119, "119 s ago"), (120, "2 min ago"), (7199, "120 min ago"), (7200, "2 h ago"),
     (172800, "2 days ago"), (-90, "in 90 s"), (-36000, "in 10 h")],
)  # fmt: skip
def test_times_are_relative(seconds: int, text: str) -> None:
    now = dt.datetime(2026, 11, 30, 12, tzinfo=dt.timezone.utc)
    assert describe.ago((now - dt.timedelta(seconds=seconds)).isoformat(), now) == text
    assert describe.ago("yesterday", now) == describe.ago(None, now) == "-"


@POSIX_ONLY
@pytest.mark.slow
def test_in_a_terminal(tmp_path: Path, environ: Dict[str, str], client: SekuireClient, worker: Any) -> None:
    """No line of a table is wider than the terminal, and the columns are aligned."""
    for number in range(3):
        client.submit("fail", number, idempotency_key=f"k{number}").wait(GUARD)
    client.submit("a-capability-with-a-name-that-is-longer-than-its-column", delay=60)
    for args in (("tasks", "list"), ("installations", "list")):
        terminal = Terminal(["-m", "sekuire", *args], tmp_path, {**environ, "NO_COLOR": "1"})
        try:
            assert terminal.end() == 0
            assert len(terminal.lines) >= 2
            assert max(map(len, terminal.lines)) <= COLUMNS
        finally:
            terminal.close()
