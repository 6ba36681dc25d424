"""The projects under examples/ do what their README says."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from typing import Any, Dict, Tuple

import pytest

from sekuire import SekuireClient, TaskFailed
from sekuire.local import LocalPlatform

from ..cli.conftest import POSIX_ONLY, Run, clean_environ
from ..conftest import AGENT
from ..support.waiting import GUARD, until

EXAMPLES = pathlib.Path(__file__).resolve().parents[2] / "examples"

pytestmark = [POSIX_ONLY, pytest.mark.slow]


@pytest.fixture
def variables(platform: LocalPlatform) -> Dict[str, str]:
    return {
        "SEKUIRE_API_URL": platform.url,
        "SEKUIRE_AGENT_ID": AGENT,
        "SEKUIRE_INSTALL_TOKEN": platform.create_install_token(AGENT),
    }


def command(directory: pathlib.Path, *args: str, env: Dict[str, str]) -> str:
    ran = subprocess.run(
        [sys.executable, *args],
        cwd=directory,
        env=clean_environ(**env),
        capture_output=True,
        text=True,
        timeout=GUARD,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def ask(platform: LocalPlatform, capability: str, input: Any) -> Any:
    done = platform.wait(platform.submit(capability, input, agent_id=AGENT), timeout=GUARD)
    return done["output"] if done["status"] == "completed" else done["error"]["code"]


def test_flask(platform: LocalPlatform, tmp_path: pathlib.Path, run: Run, variables: Dict[str, str]) -> None:
    """The worker writes notes, the page shows them, and a task that comes again writes none."""
    pytest.importorskip("flask_sqlalchemy")
    shutil.copytree(EXAMPLES / "flask" / "notes", tmp_path / "notes")
    app = ("-m", "flask", "--app", "notes")
    command(tmp_path, *app, "init-db", env=variables)
    worker = run("sekuire", "worker", env=variables, program=app)
    assert ask(platform, "add_note", {"text": "Buy milk and bread"}) == {"note_id": 1}
    assert ask(platform, "add_note", {"text": " "}) == "no_text"
    assert ask(platform, "count_words", {"note_id": 1}) == {"words": 4}
    assert ask(platform, "count_words", {"note_id": 2}) == "no_such_note"
    pages = run("run", "--port", "0", env=variables, program=app)
    url = pages.line("stderr", "Running on http").split()[-1]
    with urllib.request.urlopen(url, timeout=GUARD) as answer:
        assert json.load(answer) == {"notes": ["Buy milk and bread"]}
    pages.signal(signal.SIGINT)
    worker.signal(signal.SIGTERM)
    assert worker.end()[0] == 0
    assert os.path.exists(tmp_path / "notes.db")


def test_django(platform: LocalPlatform, tmp_path: pathlib.Path, run: Run, variables: Dict[str, str]) -> None:
    """A committed order is confirmed by the worker, in the project's language and time zone."""
    pytest.importorskip("django")
    shutil.copytree(EXAMPLES / "django", tmp_path, dirs_exist_ok=True)
    manage = ("manage.py",)
    env = {**variables, "SEKUIRE_API_KEY": platform.api_key}
    command(tmp_path, *manage, "migrate", "--verbosity", "0", env=env)
    assert "no issues" in command(tmp_path, *manage, "check", env=env)
    worker = run("run_sekuire_worker", env=env, program=manage)
    worker.line("stderr", "connected to")
    pages = run("runserver", "--noreload", "127.0.0.1:0", env={**env, "PYTHONUNBUFFERED": "1"}, program=manage)
    url = pages.line("stdout", "development server at ").split()[-1]
    request = urllib.request.Request(url, b"item=tea")
    with urllib.request.urlopen(request, timeout=GUARD) as answer:
        assert json.load(answer) == {"order_id": 1}

    def confirmed() -> Any:
        with urllib.request.urlopen(url, timeout=GUARD) as answer:
            (order,) = json.load(answer)["orders"]
        return order["confirmation"]

    assert until(confirmed) == "Ja: tea (Europe/Berlin)"
    assert ask(platform, "confirm_order", {"order_id": 2}) == "no_such_order"
    pages.signal(signal.SIGINT)
    worker.signal(signal.SIGTERM)
    assert worker.end()[0] == 0


def fetch(url: str, body: Any = None) -> Tuple[int, Any]:
    """Status and JSON of a page; ``body`` is posted as JSON."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=GUARD) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def test_workspace_agent(tmp_path: pathlib.Path, run: Run) -> None:
    """With ``sekuire dev``: all its fields of work, its page, the policy, a pause, and the end by a command."""
    pytest.importorskip("cattrs")
    shutil.copytree(EXAMPLES / "workspace_agent", tmp_path, dirs_exist_ok=True)
    dev = run(
        "dev", "--port", "0", "--policy", "policy.json", "--show-logs", "--", sys.executable, "-m", "agent",
        env={"PORT": "0"},
    )  # fmt: skip
    page = dev.line("stdout", "health and tasks on ").split()[-1]
    dev.line("stderr", "my-agent connected")
    settings = dict(line.split("=", 1) for line in (tmp_path / ".env").read_text().splitlines() if "=" in line)
    with SekuireClient(
        api_base_url=settings["SEKUIRE_API_URL"], api_key=settings["SEKUIRE_API_KEY"], agent_id="my-agent"
    ) as client:
        document = client.call("documents.create", {"title": "The plan", "text": "On Monday."}, wait=GUARD)
        sheet = client.call("sheets.create", {"columns": ["name", "email"]}, wait=GUARD)
        rows = [["Ada", "ada@example.com"], ["Grace", "grace@example.com"]]
        client.call("sheets.append", {"sheet_id": sheet["sheet_id"], "rows": rows}, wait=GUARD)
        letter = {"document_id": document["document_id"], "sheet_id": sheet["sheet_id"]}
        assert client.call("mail.merge", letter, wait=GUARD) == {"sent": 2}
        with pytest.raises(TaskFailed, match="policy_denied"):
            client.call("mail.send", {"to": "eve@elsewhere.net", "subject": "Hello"}, wait=GUARD)

        assert fetch(f"{page}/tasks/mail.list", {}) == (200, {"output": [
            {"subject": "The plan", "to": "ada@example.com"}, {"subject": "The plan", "to": "grace@example.com"},
        ]})  # fmt: skip
        status, problem = fetch(f"{page}/tasks/documents.read", {"document_id": "none"})
        assert (status, problem["error"]["code"]) == (422, "no_such_document")
        assert fetch(f"{page}/tasks/{problem['task_id']}")[1]["status"] == "failed"
        assert fetch(f"{page}/tasks/unknown")[0] == 404
        status, health = fetch(f"{page}/health")
        assert (status, health["state"], health["failed"]) == (200, "connected", 2)

        [installation] = client.installations()
        client.pause(installation["installation_id"], "maintenance")
        assert until(lambda: fetch(f"{page}/health")[1]["state"] == "paused")
        assert fetch(f"{page}/health")[0] == 503
        client.terminate(installation["installation_id"], "the day is over")
    dev.line("stdout", "terminate: the day is over")
    assert dev.end()[0] == 0


def test_workspace_agent_has_tests(tmp_path: pathlib.Path) -> None:
    """Its own tests pass where a user has copied it to."""
    pytest.importorskip("cattrs")
    shutil.copytree(EXAMPLES / "workspace_agent", tmp_path, dirs_exist_ok=True)
    assert "5 passed" in command(tmp_path, "-m", "pytest", "-q", "-p", "no:cacheprovider", env={})
