"""Pushed tasks under gunicorn: one process with threads, the worker made in it by the hooks, drained at the end."""

from __future__ import annotations

import pathlib
import signal
import subprocess
import sys
import threading
from typing import Any, Dict, List

import pytest
import requests

from sekuire.local import LocalPlatform

from ..cli.conftest import POSIX_ONLY, clean_environ
from ..conftest import AGENT
from ..support.servers import free_port
from ..support.waiting import GUARD, until

pytestmark = [POSIX_ONLY, pytest.mark.full]

SECRET = "canary-a2a-0123456789"
HEADERS = {"Authorization": f"Bearer {SECRET}"}
CONFIG = """
workers = 1
threads = 8
worker_class = "gthread"
graceful_timeout = 60

def post_worker_init(worker):
    import greeter
    worker.sdk = greeter.start()

def worker_exit(server, worker):
    worker.sdk.shutdown()
"""
APPLICATION = f"""
import pathlib, time
import flask
from sekuire.contrib.flask import Sekuire, pushed_tasks

app = flask.Flask("greeter")
sekuire = Sekuire(app)
workers = []
app.register_blueprint(pushed_tasks(lambda: workers[0] if workers else None, secret="{SECRET}", wait=25.0))

@sekuire.task("greet")
def greet(ctx, input):
    if "begun" in input:
        pathlib.Path(input["begun"]).touch()
        time.sleep(1.5)
    return "Hello, " + input["name"]

def start():
    sdk = sekuire.sdk(app)
    sdk.start()
    workers.append(sekuire.create_worker(app, sdk))
    workers[0].start()
    return sdk
"""


@pytest.mark.parametrize("preload", [[], ["--preload"]], ids=["plain", "preload"])
def test_gunicorn(make_platform: Any, tmp_path: pathlib.Path, preload: List[str]) -> None:
    """A push that runs when gunicorn is stopped gets its result."""
    platform: LocalPlatform = make_platform()
    (tmp_path / "greeter.py").write_text(APPLICATION, encoding="utf-8")
    (tmp_path / "gunicorn.conf.py").write_text(CONFIG, encoding="utf-8")
    port = free_port()
    environ: Dict[str, str] = {
        **clean_environ(),
        "SEKUIRE_API_URL": platform.url,
        "SEKUIRE_AGENT_ID": AGENT,
        "SEKUIRE_INSTALL_TOKEN": platform.create_install_token(AGENT),
    }
    url = f"http://127.0.0.1:{port}/a2a/tasks"

    def push(task: Dict[str, Any]) -> Any:
        try:
            return requests.post(url, json=task, headers=HEADERS, timeout=GUARD)
        except requests.ConnectionError:
            return None

    command = [sys.executable, "-m", "gunicorn", "--bind", f"127.0.0.1:{port}", *preload, "greeter:app"]
    with subprocess.Popen(command, cwd=tmp_path, env=environ, stderr=subprocess.PIPE, text=True) as server:
        try:
            until(lambda: getattr(push({"type": "greet", "input": {"name": "Ada"}}), "ok", False))
            found: List[Any] = []
            begun = tmp_path / "begun"
            task = {"task_id": "7", "type": "greet", "input": {"name": "Bob", "begun": str(begun)}}
            thread = threading.Thread(target=lambda: found.append(push(task)))
            thread.start()
            until(begun.exists)
            server.send_signal(signal.SIGTERM)
            thread.join(GUARD)
            assert found[0].json()["output"] == "Hello, Bob"
            errors = server.communicate(timeout=GUARD)[1]
        finally:
            server.kill()
    assert server.returncode == 0
    assert "Traceback" not in errors
    assert "the program ends while" not in errors
    assert [one["status"] for one in platform.installations()] == ["stopped"]
