"""The projects under examples/ do what their README says."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import urllib.request
from typing import Any, Dict

import pytest

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
    worker.line("stderr", "the task stream is open")
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
