"""The recipes of docs/running.md and docs/gevent.md, with the programs that they name."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from typing import Any, Dict, Iterator, List

import pytest

from sekuire.local import LocalPlatform

from ..cli.conftest import clean_environ
from ..conftest import AGENT
from ..docs.markdown import blocks, read
from ..support.waiting import GUARD, until

pytestmark = pytest.mark.full

PAGE = "docs/running.md"
PAGES = (PAGE, "docs/gevent.md")


@pytest.fixture
def directory(tmp_path: pathlib.Path) -> pathlib.Path:
    """A directory with the pages' files."""
    for page in PAGES:
        for block in blocks(page):
            if "file" in block.marks:
                (tmp_path / block.marks["file"]).write_text(block.text, encoding="utf-8")
    return tmp_path


@pytest.fixture
def environ(platform: LocalPlatform, directory: pathlib.Path) -> Dict[str, str]:
    found = clean_environ(
        SEKUIRE_API_URL=platform.url,
        SEKUIRE_AGENT_ID=AGENT,
        SEKUIRE_INSTALL_TOKEN=platform.create_install_token(AGENT),
        SEKUIRE_CREDENTIALS_FILE=str(directory / "credentials.json"),
    )
    found["PATH"] = os.path.dirname(sys.executable) + os.pathsep + found["PATH"]
    return found


@contextlib.contextmanager
def running(command: List[str], directory: pathlib.Path, environ: Dict[str, str], number: int) -> Iterator[Any]:
    """A program that is ended by the signal that its manual names, and ends with 0."""
    log = open(directory / "program.log", "w+", encoding="utf-8")  # noqa: SIM115
    program = shutil.which(command[0], path=environ["PATH"])
    assert program, f"tox -e full installs {command[0]}; here it is missing"
    process = subprocess.Popen(
        [program, *command[1:]], cwd=directory, env=environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log
    )
    try:
        yield process
        process.send_signal(number)
        assert process.wait(GUARD) == 0, pathlib.Path(log.name).read_text()
    except BaseException:
        print(pathlib.Path(log.name).read_text())
        raise
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        log.close()


def double(platform: LocalPlatform, number: int) -> Any:
    return platform.wait(platform.submit("double", number, agent_id=AGENT), timeout=GUARD)["output"]


def last_heartbeat(platform: LocalPlatform) -> Dict[str, Any]:
    (installation,) = platform.installations()
    beat: Dict[str, Any] = platform.heartbeats(installation["installation_id"])[-1]
    return beat


def spawned(directory: pathlib.Path) -> List[int]:
    """The processes that supervisord says it has started."""
    text = (directory / "supervisord.log").read_text()
    return [int(number) for number in re.findall(r"spawned: 'agent' with pid (\d+)", text)]


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
    return port


def test_supervisord(platform: LocalPlatform, directory: pathlib.Path, environ: Dict[str, str]) -> None:
    """It starts the worker, starts it again after kill -9, and lets it drain at its own end."""
    head = "[supervisord]\nnodaemon=true\nlogfile=%(here)s/supervisord.log\npidfile=%(here)s/supervisord.pid\n\n"
    config = directory / "supervisord.conf"
    config.write_text(head + (directory / "agent.conf").read_text(), encoding="utf-8")
    with running(["supervisord", "-c", str(config)], directory, environ, signal.SIGTERM):
        assert double(platform, 1) == 2
        (pid,) = spawned(directory)
        os.kill(pid, signal.SIGKILL)
        until(lambda: len(spawned(directory)) == 2, GUARD)
        assert double(platform, 2) == 4
    assert last_heartbeat(platform)["status"] == "stopped"


def test_cron(platform: LocalPlatform, directory: pathlib.Path, environ: Dict[str, str]) -> None:
    """The line of the crontab works off what is queued, ends with 0, and leaves out a start beside another."""
    line = next(line for line in read(PAGE).splitlines() if line.startswith("*/10 "))
    command = line.split(None, 5)[5].replace("cd /opt/agent && . ./agent.env && ", "").replace("venv/bin/", "")
    arguments = shlex.split(command.replace("--stop-when-idle 20", "--stop-when-idle 1"))
    tasks = [platform.submit("double", number, agent_id=AGENT) for number in range(20)]
    first = subprocess.Popen(arguments, cwd=directory, env=environ)
    try:
        until(platform.streams)
        beside = subprocess.run(arguments, cwd=directory, env=environ, timeout=GUARD, check=False)
        assert beside.returncode == 1
        assert first.wait(GUARD) == 0
    finally:
        first.kill()
        first.wait()
    assert [platform.task(task)["output"] for task in tasks] == [2 * number for number in range(20)]


#: A handler for `jobs.py` that takes a while, and writes a file when it has begun.
SLOW_HANDLER = """
@tasks.task("slow")
def slow(ctx, path):
    import time
    open(path, "w").close()
    time.sleep(1.5)
    return "done"
"""


def check_web_server(platform: LocalPlatform, command: List[str], directory: pathlib.Path, environ: Any) -> None:
    """Each of its two processes has a worker of its own, in one installation, and drains it at the end."""
    jobs = directory / "jobs.py"
    jobs.write_text(jobs.read_text(encoding="utf-8").replace("\ndef start_sdk", SLOW_HANDLER + "\ndef start_sdk"))
    with running(command, directory, environ, signal.SIGTERM):
        until(lambda: len(platform.streams()) == 2, GUARD)
        assert sorted(double(platform, number) for number in range(8)) == list(range(0, 16, 2))
        has_begun = directory / "has-begun"
        slow = platform.submit("slow", str(has_begun), agent_id=AGENT)
        until(has_begun.exists)
    assert platform.task(slow)["output"] == "done"
    assert last_heartbeat(platform)["status"] == "stopped"
    assert platform.streams() == []


@pytest.mark.parametrize("kind", ["sync", "gthread", "gevent", "gevent, patched first"])
def test_gunicorn(platform: LocalPlatform, directory: pathlib.Path, environ: Dict[str, str], kind: str) -> None:
    """The recipe works with each kind of web worker; with gevent's also if it is patched as late as gunicorn does."""
    kind, _, is_first = kind.partition(", ")
    if is_first:
        config = directory / "gunicorn.conf.py"
        config.write_text(f"from gevent import monkey\nmonkey.patch_all()\n{config.read_text(encoding='utf-8')}")
    bind = f"127.0.0.1:{free_port()}"
    command = ["gunicorn", "--config", "gunicorn.conf.py", "-k", kind, "--bind", bind, "web:application"]
    check_web_server(platform, command, directory, environ)


@pytest.mark.parametrize("options", [[], ["--lazy-apps"]], ids=["postfork", "lazy-apps"])
def test_uwsgi(platform: LocalPlatform, directory: pathlib.Path, environ: Dict[str, str], options: List[str]) -> None:
    """As gunicorn, with uWSGI's own hook after the fork."""
    command = ["uwsgi", "--ini", "uwsgi.ini", "--http-socket", f"127.0.0.1:{free_port()}", *options]
    check_web_server(platform, [*command, "--virtualenv", sys.prefix], directory, environ)
