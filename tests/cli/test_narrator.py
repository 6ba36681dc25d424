"""What sekuire dev says of what happens, in one line each."""

from __future__ import annotations

from typing import Callable, Iterator, List

import pytest

from sekuire import SekuireSDK, TaskError, Worker, create_worker
from sekuire.cli import terminal
from sekuire.cli.narrator import Narrator
from sekuire.errors import AuthenticationError
from sekuire.local import LocalPlatform

from ..contract.client import Client
from ..local.test_approvals import ask
from ..support.waiting import until
from .conftest import AGENT

Lines = Callable[[], List[str]]


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, platform: LocalPlatform) -> Lines:
    """Return a function that looks once, and returns every line so far."""
    written: List[str] = []
    monkeypatch.setattr(terminal, "note", written.append)
    narrator = Narrator(platform)

    def look() -> List[str]:
        narrator.look()
        return written

    return look


@pytest.fixture
def worker(platform: LocalPlatform) -> Iterator[Worker]:
    worker = create_worker(
        api_base_url=platform.url, agent_id=AGENT, install_token=platform.create_install_token(AGENT)
    )

    @worker.on_task("echo")
    def echo(ctx: object, input: object) -> object:
        return input

    @worker.on_task("fail")
    def fail(ctx: object, input: object) -> object:
        raise TaskError("no_text", "the input\nneeds \x1b[31ma text", retryable=True)

    with worker:
        assert worker.wait_until_connected(30)
        yield worker


def test_a_worker_and_its_tasks(platform: LocalPlatform, worker: Worker, said: Lines) -> None:
    """One line for the login, the connection, and each end of a task, with ids; nothing steers the terminal."""
    [installation] = platform.installations()
    inst = installation["installation_id"]
    assert said() == [f"{AGENT} logged in as {inst}", f"{AGENT} connected as {inst}, accepts echo, fail"]
    good = platform.submit("echo", 1)
    platform.wait(good, 30)
    until(lambda: f"[{good}] echo completed in " in said()[-1])
    bad = platform.submit("fail", 1, max_attempts=2)
    platform.wait(bad, 30)
    until(lambda: len(said()) == 5)
    assert said()[3:] == [
        f"[{bad}] fail failed no_text: the input needs [31ma text; attempt 1, the next in 0.05 s",
        f"[{bad}] fail failed no_text: the input needs [31ma text",
    ]
    platform.command(inst, "pause", "lunch")
    assert said()[5:] == [f"[{inst}] pause sent: lunch"]
    worker.stop()
    until(lambda: said()[-1] == f"{AGENT} stopped")


def test_approvals(platform: LocalPlatform, said: Lines) -> None:
    """One line for what is wanted, with the command that decides it, and one for the decision or its absence."""
    installation = Client(platform.url, platform.api_key).install(AGENT)
    with installation.stream() as stream:
        task_id = installation.submit()
        stream.next("task")
        before = len(said())
        first = ask(installation, task_id, name="refund [red]", timeout_ms=600_000)
        platform.decide(first, "denied", "not\n\x1b[31mtoday", decided_by="ada")
        ask(installation, task_id, name="send", timeout_ms=1)
        until(lambda: len(said()) == before + 4)
    lines = [line.replace(task_id, "TASK") for line in said()[before:]]
    assert lines[0] == (
        f"[TASK] approval wanted: action refund [red]; sekuire approvals approve {first[:12]} (or deny), within 10 min"
    )
    assert lines[1] == "[TASK] action refund [red] denied by ada: not [31mtoday"
    assert lines[3] == "[TASK] action send: nobody answered the request for approval in time"


def test_a_task_that_waits(platform: LocalPlatform, said: Lines) -> None:
    """One line for a capability that no worker serves, not one for each task."""
    ids = [platform.submit("draw", 1, AGENT) for _ in range(3)]
    assert said() == [f"[{ids[0]}] draw waits: no connected worker of {AGENT} accepts it"]


def test_refused_logins(platform: LocalPlatform, said: Lines) -> None:
    """A refused login is said once in a while, however often it is tried; no token is shown."""
    for _ in range(3):
        with pytest.raises(AuthenticationError):
            SekuireSDK(AGENT, api_base_url=platform.url, install_token="skt_wrong").start()
    problem = "this platform has not made this install token; it belongs to another platform, or to an earlier start of"
    assert said() == [f"a login was refused: INVALID_INSTALL_TOKEN: {problem} this one"]
    wrong = Client(platform.url, "sk_live_wrong")
    assert wrong.call("GET", "/tasks", headers={"X-API-Key": "sk_live_wrong"}).status == 401
    [_, line] = said()
    assert line.startswith("a request (tasks) was refused: INVALID_API_KEY: ")


def test_who_only_asks_is_not_a_failure(platform: LocalPlatform, said: Lines) -> None:
    """A request without credentials, or for what is not there, is not spoken of."""
    client = Client(platform.url, platform.api_key)
    assert client.call("GET", "/tasks").status == 401
    assert client.admin("GET", "/tasks/nothing").status == 404
    assert said() == []


def test_a_denial(platform: LocalPlatform, said: Lines) -> None:
    """A task that the policy denies has one line, although an audit event says the same."""
    pytest.importorskip("limits")
    platform.set_policy("ws_local", {"agent": {"capabilities": {"denied_capabilities": ["drop"]}}})
    with SekuireSDK(AGENT, api_base_url=platform.url, install_token=platform.create_install_token(AGENT)) as sdk:
        worker = sdk.create_task_worker()
        worker.on_task("drop", lambda ctx, input: input)
        with worker:
            assert worker.wait_until_connected(30)
            task = platform.submit("drop", 1)
            assert platform.wait(task, 30)["error"]["code"] == "policy_denied"
            sdk.audit.flush(30)
            until(lambda: bool(platform.logs("policy_violation")))
            said()
            sdk.audit.policy(_Denied(), "tool", "shell")
            sdk.audit.flush(30)
            until(lambda: len(platform.logs("policy_violation")) == 2)
    lines = [line for line in said() if "denied" in line]
    assert lines[0].startswith(f"[{task}] drop denied by the policy: ")
    assert "denied_capabilities" in lines[0] or "capability" in lines[0]
    assert lines[1:] == ["tool shell denied by the policy: tool.denied: not here"]


class _Denied:
    rule = "tool.denied"
    reason = "not here"
