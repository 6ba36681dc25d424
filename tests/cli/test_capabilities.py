"""sekuire capabilities, and sekuire send --check, which asks for what a worker has published."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional

import pytest

from sekuire import TaskContext, create_worker
from sekuire.cli import check
from sekuire.local import LocalPlatform

from ..support.waiting import until
from .conftest import AGENT, Call, Run

MODULE = '''
import dataclasses
from typing import List, Literal, Optional
from sekuire import create_worker

@dataclasses.dataclass
class Line:
    sku: str

@dataclasses.dataclass
class Order:
    lines: List[Line]
    speed: Literal["fast", "slow"] = "slow"
    note: Optional[str] = None

worker = create_worker(agent_id="a", install_token="skt_x", capabilities=["later"])

@worker.on_task("order")
def order(ctx, input: Order) -> float:
    """Place an order.

    More."""

broken = create_worker(agent_id="a", install_token="skt_x")

@broken.on_task("book")
def book(ctx, input, *, db): ...
'''


@pytest.mark.slow
def test_what_it_prints(run: Run, tmp_path: Path) -> None:
    """A line for each capability and each field; with --json everything; a wrong declaration is an error in a line."""
    (tmp_path / "tasks.py").write_text(MODULE)
    assert run("capabilities", "tasks:worker").end() == (
        0,
        "later\n"
        "order: Place an order.\n"
        "  input: Order\n"
        "    lines: array of Line\n"
        '    speed: one of "fast", "slow", optional\n'
        "    note: string or null, optional\n"
        "  result: number\n",
        "",
    )
    code, out, _ = run("capabilities", "tasks:worker", "--json").end()
    later, order = json.loads(out)["capabilities"]
    assert (code, later) == (0, {"name": "later"})
    assert order["input_schema"]["required"] == ["lines"]
    code, out, err = run("capabilities", "tasks:broken").end()
    assert (code, out) == (2, "")
    assert "asks for 'db'" in err
    assert "Traceback" not in err


@dataclasses.dataclass
class Order:
    number: int
    names: List[str] = dataclasses.field(default_factory=list)


def order(ctx: TaskContext, input: Order) -> int:
    return input.number


@pytest.fixture
def worker(platform: LocalPlatform) -> Iterator[None]:
    worker = create_worker(
        api_base_url=platform.url, agent_id=AGENT, install_token=platform.create_install_token(AGENT)
    )
    worker.on_task("order", order)
    with worker:
        until(lambda: bool(platform.installations()[0]["capability_info"]))
        yield


def test_an_input_that_fits(call: Call, environ: Dict[str, str], worker: None, platform: LocalPlatform) -> None:
    """It is sent as without the option."""
    code, out, _ = call("send", "order", '{"number": 1}', "--check", "--wait", "30", env=environ)
    assert (code, out) == (0, "1\n")


def test_an_input_that_does_not_fit(call: Call, environ: Dict[str, str], worker: None, platform: LocalPlatform) -> None:
    """It is not sent, and each problem has its path."""
    code, out, err = call("send", "order", '{"number": "x", "names": ["a", 3]}', "--check", env=environ)
    assert (code, out) == (1, "")
    assert "the input does not fit 'order', and was not sent" in err
    assert "input.number: 'x' is not of type 'integer'" in err
    assert "input.names[1]: 3 is not of type 'string'" in err


@pytest.mark.parametrize("capability", ["other", "order"])
def test_without_a_schema(call: Call, environ: Dict[str, str], capability: str) -> None:
    """A note says that it was not checked, and it is sent."""
    code, out, err = call("send", capability, "{}", "--check", env=environ)
    assert code == 0
    assert out
    assert f"not checked: no worker of agent {AGENT!r} has published a schema for {capability!r}" in err


def test_without_the_package(
    call: Call, environ: Dict[str, str], monkeypatch: pytest.MonkeyPatch, platform: LocalPlatform
) -> None:
    """It names the extra, and nothing is sent."""
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    code, out, err = call("send", "order", "{}", "--check", env=environ)
    assert (code, out) == (2, "")
    assert "pip install 'sekuire[cli]'" in err


@pytest.mark.parametrize("schema", [{"type": "nonsense"}, {"$ref": "#/nowhere"}, {"$ref": "http://127.0.0.1:9/x"}])
def test_a_schema_that_cannot_be_used(schema: Dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Whatever another program has published, the task is sent, with a note."""
    infos: List[Any] = [{"name": "order", "input_schema": schema}]
    found: List[Optional[Dict[str, Any]]] = [None, {"agent_id": AGENT, "capability_info": infos}]
    monkeypatch.setattr(check, "_installations", lambda submitter: found)
    check.check_input(None, "order", {}, AGENT)  # type: ignore[arg-type]
    assert "not checked: the published schema cannot be used" in capsys.readouterr().err
