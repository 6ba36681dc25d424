"""--log-format json: each line on stderr is one JSON object."""

from __future__ import annotations

import json
import signal
import textwrap
from pathlib import Path
from typing import Any, Dict, List, Tuple

import pytest

from sekuire import create_worker
from sekuire._internal.speech import speech
from sekuire.errors import ConfigurationError
from sekuire.local import LocalPlatform

from ..support.waiting import GUARD
from .conftest import AGENT, Call, Run, variables

MODULE = """
import logging, threading, warnings
from sekuire import TaskRegistry

tasks = TaskRegistry()

def end_badly():
    raise LookupError("of a thread")

@tasks.task("everything")
def everything(ctx, input):
    logging.getLogger("third.party").warning("of another package")
    ctx.logger.info("of the handler")
    logging.getLogger("third.party").error("does not fit: %d", "text")
    warnings.warn("of Python")
    thread = threading.Thread(target=end_badly, name="bad-thread")
    thread.start()
    thread.join()
    raise ValueError("in\\ntwo lines")
"""


@pytest.fixture
def module(tmp_path: Path) -> None:
    (tmp_path / "jobs.py").write_text(MODULE)


def read(err: str) -> List[Dict[str, Any]]:
    return [json.loads(line) for line in err.splitlines()]


def line_with(lines: List[Dict[str, Any]], part: str) -> Dict[str, Any]:
    return next(line for line in lines if part in line["message"])


@pytest.mark.slow
@pytest.mark.parametrize("by", ["option", "variable"])
def test_a_workers_lines(run: Run, platform: LocalPlatform, module: None, by: str) -> None:
    """Those of the library, of the handler, of other packages, of Python's warnings and of threads that end badly."""
    options: Tuple[str, ...] = ("--log-format", "json") if by == "option" else ()
    more = {} if by == "option" else {"SEKUIRE_LOG_FORMAT": "json"}
    process = run("worker", "jobs:tasks", *options, env={**variables(platform), "PYTHONDEVMODE": "", **more})
    process.line("stderr", "connected to")
    task_id = platform.submit("everything", {}, agent_id=AGENT, trace_id="trace-1")
    assert platform.wait(task_id, GUARD)["status"] == "failed"
    process.signal(signal.SIGTERM)
    code, _, err = process.end()
    assert code == 0
    lines = read(err)
    for part in ("of another package", "of the handler", "does not fit: %d ('text',)", "UserWarning: of Python"):
        line = line_with(lines, part)
        assert (line["task_id"], line["capability"], line["trace_id"]) == (task_id, "everything", "trace-1")
    failure = line_with(lines, "failed handler_error")
    assert failure["task_id"] == task_id
    assert failure["exception"].endswith("ValueError: in\ntwo lines")
    thread = line_with(lines, "ended the thread bad-thread")
    assert thread["exception"].endswith("LookupError: of a thread")
    opened = line_with(lines, "connected to")
    assert opened["worker_id"] == failure["worker_id"]
    assert failure["installation_id"] == platform.installations()[0]["installation_id"]


@pytest.mark.parametrize(
    ("source", "target", "message", "exception"),
    [
        ("", "nowhere:tasks", "there is no module 'nowhere'", ""),
        ("import nowhere_at_all", "jobs:tasks", "importing 'jobs' failed", "ModuleNotFoundError"),
        ("tasks = 1", "jobs:tasks", "jobs:tasks is a int", ""),
    ],
)
def test_a_commands_own_errors(
    call: Call, tmp_path: Path, source: str, target: str, message: str, exception: str
) -> None:
    """They are lines of the same form, with the traceback of the user's module in one of them."""
    import sys

    (tmp_path / "jobs.py").write_text(source)
    code, _, err = call("worker", target, "--log-format", "json")
    sys.modules.pop("jobs", None)
    assert code == 2
    lines = read(err)
    assert {(line["level"], line["logger"]) for line in lines} == {("ERROR", "sekuire.cli")}
    assert message in lines[-1]["message"]
    assert exception in lines[0].get("exception", "")


def test_other_commands(call: Call, platform: LocalPlatform) -> None:
    """What they note on stderr is JSON; their results on stdout stay."""
    env = {**variables(platform), "SEKUIRE_API_KEY": platform.api_key}
    code, out, err = call("send", "copy", "{}", "--wait", "0.1", "--log-format", "json", env=env)
    assert (code, out) == (1, "")
    assert [line["level"] for line in read(err)] == ["INFO", "ERROR"]
    assert call("send", "copy", "{}", "--log-format", "text")[2] == ""


def test_the_option_wins(call: Call) -> None:
    code, _, err = call("send", "copy", "[", "--log-format", "TEXT", env={"SEKUIRE_LOG_FORMAT": "json"})
    assert code == 2
    assert err.startswith("sekuire send: error: ")


def test_another_format_is_refused(call: Call) -> None:
    """By the option with the usage, by the variable with its name."""
    code, _, err = call("send", "copy", "{}", "--log-format", "xml")
    assert code == 2
    assert "invalid choice: 'xml'" in err
    code, _, err = call("send", "copy", "{}", env={"SEKUIRE_LOG_FORMAT": "xml"})
    assert code == 2
    assert len(err.splitlines()) == 1
    assert "SEKUIRE_LOG_FORMAT" in err
    assert "must be 'text' or 'json', got 'xml'" in err


OPTION = """
import os
from sekuire import SekuireSDK, create_worker

def alone():
    return with_handler(create_worker(
        agent_id="cli-agent", api_base_url=os.environ["SEKUIRE_API_URL"],
        install_token=os.environ["SEKUIRE_INSTALL_TOKEN"], log_format="json",
    ))

def of_an_sdk():
    return with_handler(SekuireSDK.from_env(log_format="json").create_task_worker())

def with_handler(worker):
    worker.on_task("copy", lambda ctx, input: input)
    return worker
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["alone", "of_an_sdk"])
def test_the_option_of_an_object(run: Run, platform: LocalPlatform, tmp_path: Path, name: str) -> None:
    """The lines that the library prints by itself have the form that the object's option asks for."""
    (tmp_path / "jobs.py").write_text(OPTION)
    process = run("worker", f"jobs:{name}", env={**variables(platform), "PYTHONDEVMODE": ""})
    process.line("stderr", "connected to")
    task_id = platform.submit("copy", {}, agent_id=AGENT)
    platform.wait(task_id, GUARD)
    process.line("stderr", "completed in")
    process.signal(signal.SIGTERM)
    code, _, err = process.end()
    assert code == 0
    done = line_with(read(err), "completed in")
    assert (done["task_id"], done["capability"]) == (task_id, "copy")


def test_another_format_of_an_object(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused by the option's name, or by the variable's."""
    with pytest.raises(ConfigurationError, match="log_format: must be 'text' or 'json', got 'xml'"):
        create_worker(agent_id="a", install_token="skt_x", log_format="xml")
    monkeypatch.setenv("SEKUIRE_LOG_FORMAT", "xml")
    with pytest.raises(ConfigurationError, match="SEKUIRE_LOG_FORMAT"):
        create_worker(agent_id="a", install_token="skt_x")


def test_the_form_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """An object that says nothing of it changes nothing; one that says "text" undoes it."""
    monkeypatch.setattr(speech, "formatter", None)
    options = {"agent_id": "a", "install_token": "skt_x", "api_base_url": "http://127.0.0.1:9"}
    seen = []
    for log_format in (None, "json", None, "text"):
        create_worker(**options, log_format=log_format).stop()
        seen.append(speech.formatter is not None)
    assert seen == [False, True, True, False]


@pytest.mark.slow
def test_a_reload_passes_it_on(run: Run, platform: LocalPlatform, module: None, tmp_path: Path) -> None:
    """The lines of the reloader and of its child are JSON."""
    process = run("worker", "jobs:tasks", "--reload", "--log-format", "json", env=variables(platform))
    process.line("stderr", "connected to")
    (tmp_path / "jobs.py").write_text(textwrap.dedent(MODULE) + "\n")
    process.line("stderr", "reload: jobs.py changed")
    process.signal(signal.SIGTERM)
    code, _, err = process.end()
    assert code == 0
    assert read(err)
