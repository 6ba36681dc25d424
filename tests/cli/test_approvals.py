"""sekuire approvals: what waits, in full or in a line, and deciding it by a short id."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple

import pytest

from sekuire.local import LocalPlatform

from ..contract.client import Client, Installation
from ..local.test_approvals import ask
from ..support.terminal import Terminal
from .conftest import AGENT, POSIX_ONLY, Call

pytestmark = pytest.mark.usefixtures("given")


class Given(NamedTuple):
    platform: LocalPlatform
    installation: Installation
    task_id: str

    def ask(self, **fields: Any) -> str:
        return ask(self.installation, self.task_id, **fields)

    def states(self) -> Dict[str, str]:
        return {one["approval_id"]: one["status"] for one in self.platform.approvals()}


@pytest.fixture
def given(platform: LocalPlatform, monkeypatch: pytest.MonkeyPatch, call: Call) -> Iterator[Given]:
    """An installation whose worker has a task, and the variables of whoever decides."""
    monkeypatch.setenv("SEKUIRE_API_URL", platform.url)
    monkeypatch.setenv("SEKUIRE_API_KEY", platform.api_key)
    installation = Client(platform.url, platform.api_key).install(AGENT)
    with installation.stream() as stream:
        task_id = installation.submit()
        stream.next("task")
        yield Given(platform, installation, task_id)


def test_nothing_waits(call: Call) -> None:
    """It says so, and where the rest is."""
    assert call("approvals", "list") == (0, "", "nothing waits for an approval; --all shows what has been decided\n")
    assert call("approvals", "list", "--all") == (0, "", "no requests\n")


def test_what_waits(call: Call, given: Given) -> None:
    """One line for each, the most urgent first; nothing is cut in a pipe."""
    later = given.ask(details={"amount": 500, "why": "x" * 100}, timeout_ms=3_600_000)
    soon = given.ask(name="plain", timeout_ms=300_000)
    code, out, err = call("approvals", "list")
    assert (code, err) == (0, "`show ID` shows one in full; `approve ID` and `deny ID` decide it\n")
    lines = out.splitlines()
    assert re.fullmatch(r"APPROVAL +LEFT +AGENT", lines[0])
    assert re.fullmatch(rf"{soon[:12]}  5 min   {AGENT}: action plain", lines[1])
    details = json.dumps({"amount": 500, "why": "x" * 100})
    assert lines[2] == f"{later[:12]}  60 min  {AGENT}: action pay {details}"
    code, out, _ = call("approvals", "list", "--json")
    assert [one["approval_id"] for one in json.loads(out)["approvals"]] == [soon, later]
    assert call("approvals", "list", "--task-id", "another")[1] == ""


@pytest.mark.parametrize(("action", "status"), [("approve", "approved"), ("deny", "denied")])
def test_deciding(call: Call, given: Given, action: str, status: str) -> None:
    """The beginning of an id is enough. What was decided is printed, and recorded with who and why."""
    first, second = given.ask(details={"amount": 5}), given.ask(name="other")
    code, out, err = call("approvals", action, first[:8], "--reason", "because", "--by", "ada")
    assert (code, out, err) == (0, f'{first[:12]} {status}: action pay {{"amount": 5}}\n', "")
    assert given.states() == {first: status, second: "pending"}
    decided = given.platform.approvals(status)[0]
    assert (decided["decided_by"], decided["reason"], decided["credential"]) == ("ada", "because", "api_key")
    code, out, _ = call("approvals", "list", "--all")
    assert f"{first[:12]}  {status}" in out
    code, out, _ = call("approvals", "show", first[:8])
    assert f"state       {status} by ada (credential: api_key): because" in out.splitlines()
    code, out, _ = call("approvals", action, second, "--json")
    assert json.loads(out)["approval_id"] == second
    assert json.loads(out)["decided_by"]


def test_who_comes_too_late(call: Call, given: Given) -> None:
    """A request that is decided or has ended says so, and stays as it is."""
    first, second = given.ask(), given.ask(name="other")
    given.platform.decide(first, "denied", decided_by="bob")
    assert call("approvals", "approve", first[:8]) == (
        1, "", "sekuire approvals: error: HTTP 409 ALREADY_DECIDED: the request was denied by bob already\n",
    )  # fmt: skip
    assert given.installation.complete(given.task_id, output=1).status == 200
    code, _, err = call("approvals", "approve", second)
    assert code == 1
    assert "nobody can decide this request any more: the task has ended" in err
    assert given.states() == {first: "denied", second: "expired"}


def test_which_request_is_meant(call: Call, given: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unknown, a short and an ambiguous beginning are refused, and nothing is decided."""
    ids = [given.ask(n=n + 1) for n in range(2)]
    error = "no request for approval begins with 'zzzz'; see sekuire approvals list --all"
    assert call("approvals", "approve", "zzzz") == (1, "", f"sekuire approvals: error: {error}\n")
    code, _, err = call("approvals", "approve", ids[0][:3])
    assert code == 2
    assert "give at least 4 characters of the id" in err
    monkeypatch.setattr("sekuire.cli.approvals._LEAST", 0)
    code, _, err = call("approvals", "deny", "")
    assert code == 1
    assert "2 requests begin with ''" in err
    assert all(one[:12] in err for one in ids)
    assert set(given.states().values()) == {"pending"}
    # Of two that begin so, the one that waits is meant.
    given.platform.decide(ids[0], "denied")
    assert call("approvals", "approve", "")[0] == 0
    assert given.states() == {ids[0]: "denied", ids[1]: "approved"}


NASTY = {"to": "\x1b[31mAda\x07", "hidden": "a\u202eb\u200b", "markup": "[red]x[/red]", "lines": "a\nb"}


def test_details_steer_nothing(call: Call, given: Given) -> None:
    """What does not print is escaped, so that what a person reads is what is decided."""
    approval_id = given.ask(details=NASTY)
    shown = r'{"to": "\u001b[31mAda\u0007", "hidden": "a\u202eb\u200b", "markup": "[red]x[/red]", "lines": "a\nb"}'
    for args in (("list",), ("approve", approval_id)):
        code, out, _ = call("approvals", *args)
        assert code == 0
        assert shown in out
        assert all(c.isprintable() or c == "\n" for c in out)
    code, out, _ = call("approvals", "show", approval_id[:8])
    assert '    "hidden": "a\\u202eb\\u200b",\n' in out
    assert json.loads(out.partition("details\n")[2]) == NASTY


@POSIX_ONLY
@pytest.mark.slow
def test_a_terminal(given: Given, tmp_path: Path) -> None:
    """Each line fits 80 columns, wide characters and markup included."""
    given.ask(details={**NASTY, "wide": "\u6f22\u5b57" * 30})
    given.ask(name="\u6f22\u5b57" * 20, details="x" * 500)
    variables = {name: os.environ[name] for name in ("SEKUIRE_API_URL", "SEKUIRE_API_KEY")}
    terminal = Terminal(("-m", "sekuire", "approvals", "list"), tmp_path, variables)
    try:
        assert terminal.end() == 0
        lines: List[str] = terminal.lines
    finally:
        terminal.close()
    rich_cells = pytest.importorskip("rich.cells")
    assert len(lines) == 4
    assert max(rich_cells.cell_len(re.sub(r"\x1b\[[0-9;]*m", "", line)) for line in lines) <= 80
    assert not any("\x1b[31mAda" in line or "\u202e" in line for line in lines)


def test_a_wrong_key(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """It names the variable, and the platform's answer."""
    code, _, err = call("approvals", "list", env={"SEKUIRE_API_KEY": "sk_live_wrong"})
    assert code == 1
    assert "the platform refused the API key from SEKUIRE_API_KEY: HTTP 401 INVALID_API_KEY" in err
    monkeypatch.delenv("SEKUIRE_API_KEY")
    code, _, err = call("approvals", "list")
    assert code == 2
    assert "no API key: set SEKUIRE_API_KEY" in err
