"""sekuire dev -- COMMAND: a program beside its platform, from its start to its end."""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from pathlib import Path
from typing import Dict, Iterator, List, Tuple

import pytest

from sekuire.cli.child import environment

from ..support.waiting import GUARD, until
from .conftest import Call, Run, clean_environ

pty = pytest.importorskip("pty")

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name != "posix", reason="process groups and terminals of POSIX")]

AGENT = """
from sekuire import SekuireSDK
with SekuireSDK.from_env() as sdk:
    worker = sdk.create_task_worker()
    @worker.on_task("echo")
    def echo(ctx, input):
        print("echoes", input)
        return input
    worker.start(block=True)
"""
#: Writes its process id into a file, and goes on until it is killed.
SLEEPER = "import os, time\nopen('sleeper', 'w').write(str(os.getpid()))\ntime.sleep(600)\n"


def is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def sleeper(tmp_path: Path) -> Iterator[Path]:
    """A file that will hold the id of a process; the process ends with the test in any case."""
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    path = tmp_path / "sleeper"
    yield path
    if path.exists() and is_alive(int(path.read_text())):
        os.kill(int(path.read_text()), signal.SIGKILL)


def pid_in(path: Path) -> int:
    until(lambda: path.exists() and path.read_text() != "")
    return int(path.read_text())


def test_an_agent(run: Run, tmp_path: Path) -> None:
    """It finds the platform, its output is marked, and Ctrl-C lets it end in order while the platform is there."""
    (tmp_path / "agent.py").write_text(AGENT)
    process = run("dev", "--port", "0", "--", sys.executable, "agent.py", env={"SEKUIRE_RUNTIME_TOKEN": "production"})
    process.line("stderr", f"SEKUIRE_RUNTIME_TOKEN of another platform: not set for {sys.executable}")
    process.line("stderr", "accepts echo")
    sent = run("send", "echo", '"hello"', "--wait", "30")
    assert sent.end()[:2] == (0, '"hello"\n')
    assert process.line("stdout", "echoes") == "my-agent | echoes hello\n"
    process.line("stderr", "echo completed in")
    process.signal(signal.SIGINT)
    code, out, err = process.end()
    assert code == 0
    assert out == "my-agent | echoes hello\n"
    assert "agent.py ended with exit code 0" in err
    assert "INTERRUPT" not in err.upper().replace("KEYBOARDINTERRUPT", "INTERRUPT")
    assert "sk_live_" not in out + err


@pytest.mark.parametrize(
    ("script", "code"), [("raise SystemExit(3)", 3), ("import os; os.kill(os.getpid(), 15)", 143), ("", 0)]
)
def test_its_exit_code(call: Call, script: str, code: int) -> None:
    """When it ends, so does the platform, with its exit code, and the end is said."""
    found, _, err = call("dev", "--port", "0", "--", sys.executable, "-c", script)
    assert found == code
    assert f"ended with exit code {code}\nstopped\n" in err


def test_its_output(call: Call, tmp_path: Path) -> None:
    """Both outputs come line by line, each to its own, a last line without an end and bytes that are no text too."""
    script = (
        "import sys; print('one'); print('two', file=sys.stderr); sys.stdout.buffer.write(b'\\xff\\n'); "
        "sys.stdout.write('x' * 200000); sys.stdout.write('\\nlast')"
    )
    code, out, err = call("dev", "--port", "0", "--ephemeral", "--agent-id", "a", "--", sys.executable, "-c", script)
    assert code == 0
    lines = out.splitlines()
    assert lines[:2] == ["a | one", "a | \ufffd"]
    assert lines[-1] == "a | last"
    assert sum(line.count("x") for line in lines) == 200000
    assert "a | two\n" in err


def test_its_output_comes_at_once(run: Run, tmp_path: Path) -> None:
    """Its print() is not held back although its output is a pipe."""
    script = "import time; print('now'); time.sleep(600)"
    process = run("dev", "--port", "0", "--", sys.executable, "-c", script, env={"PYTHONUNBUFFERED": ""})
    process.line("stdout", "my-agent | now")
    process.signal(signal.SIGTERM)
    assert process.end()[0] == 143


def test_its_options_are_its_own(call: Call) -> None:
    """What comes after -- is not read as options of sekuire dev, not even a second --."""
    script = "import sys; print(sys.argv[1:])"
    code, out, _ = call(
        "dev", "--port", "0", "--", sys.executable, "-c", script, "--port", "1", "--help", "--", "-v", "--", "x"
    )
    assert (code, out) == (0, "my-agent | ['--port', '1', '--help', '--', '-v', '--', 'x']\n")


@pytest.mark.parametrize("name", ["no-such-program", "./directory"])
def test_a_program_that_is_not_there(call: Call, tmp_path: Path, name: str) -> None:
    (tmp_path / "directory").mkdir()
    code, out, err = call("dev", "--port", "0", "--", name)
    assert (code, out) == (2, "")
    assert err == f"sekuire dev: error: there is no program {name!r} to run\n"
    assert not (tmp_path / ".sekuire").exists()


def test_what_it_leaves_behind(call: Call, sleeper: Path) -> None:
    """A process that it has started and not waited for is ended with it."""
    script = "import subprocess, sys, os, time\nsubprocess.Popen([sys.executable, 'sleeper.py'])\n"
    script += "while not os.path.exists('sleeper') or not open('sleeper').read(): time.sleep(0.01)"
    code, _, _ = call("dev", "--port", "0", "--", sys.executable, "-c", script)
    assert code == 0
    until(lambda: not is_alive(int(sleeper.read_text())))


@pytest.mark.parametrize("wraps", [False, True])
def test_no_orphan_after_a_kill(run: Run, sleeper: Path, wraps: bool) -> None:
    """When sekuire dev is killed, the command ends, also behind a shell."""
    command = ["sh", "-c", f"{sys.executable} sleeper.py; true"] if wraps else [sys.executable, "sleeper.py"]
    process = run("dev", "--port", "0", "--", *command)
    pid = pid_in(sleeper)
    process.signal(signal.SIGKILL)
    until(lambda: not is_alive(pid))


def test_a_command_that_ignores_signals(run: Run, tmp_path: Path) -> None:
    """The third signal kills it."""
    script = (
        "import signal, time\nfor n in (2, 15, 1): signal.signal(n, signal.SIG_IGN)\nprint('ready')\ntime.sleep(600)"
    )
    process = run("dev", "--port", "0", "--", sys.executable, "-c", script)
    process.line("stdout", "ready")
    process.signal(signal.SIGTERM)
    process.line("stderr", "stopping: waiting for")
    process.signal(signal.SIGTERM)
    time.sleep(0.3)
    process.signal(signal.SIGTERM)
    assert process.end()[0] == 137


def test_a_terminal(tmp_path: Path) -> None:
    """Ctrl-C in a terminal reaches the command once, and all lines are there."""
    (tmp_path / "agent.py").write_text(
        "import signal, time\nseen = []\nsignal.signal(signal.SIGINT, lambda n, f: seen.append(n))\nprint('ready')\n"
        "while not seen: time.sleep(0.01)\ntime.sleep(0.5)\nprint('seen', len(seen))\n"
    )
    process, terminal = pty.fork()
    if process == 0:  # pragma: no cover  # The child.
        os.chdir(tmp_path)
        arguments = [sys.executable, "-m", "sekuire", "dev", "--port", "0", "--", sys.executable, "agent.py"]
        os.execve(sys.executable, arguments, clean_environ())
    shown = b""

    def read(part: bytes) -> None:
        nonlocal shown
        end = time.monotonic() + GUARD
        while part not in shown:
            assert time.monotonic() < end, shown
            if select.select([terminal], [], [], 0.1)[0]:
                try:
                    shown += os.read(terminal, 4096)
                except OSError:
                    break
        assert part in shown, shown

    try:
        read(b"my-agent | ready")
        os.write(terminal, b"\x03")
        read(b"my-agent | seen 1")
        read(b"stopped")
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    finally:
        os.close(terminal)


def test_the_environment() -> None:
    """The login of another platform is left out, and named."""
    base = {"PATH": "/bin", "SEKUIRE_RUNTIME_TOKEN": "t", "SEKUIRE_REFRESH_TOKEN": "", "SEKUIRE_API_KEY": "k"}
    logins = ("SEKUIRE_RUNTIME_TOKEN", "SEKUIRE_REFRESH_TOKEN")
    found: Tuple[Dict[str, str], List[str]] = environment(base, {"SEKUIRE_API_KEY": "ours"}, logins)
    assert found == (
        {"PATH": "/bin", "SEKUIRE_REFRESH_TOKEN": "", "SEKUIRE_API_KEY": "ours"},
        ["SEKUIRE_RUNTIME_TOKEN"],
    )
