"""The command as a whole: usage, exit codes, output that leads nowhere."""

from __future__ import annotations

import logging
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Union

import pytest

import sekuire
from sekuire.cli import parsing

from ..support.waiting import GUARD
from .conftest import POSIX_ONLY, Call, Run, clean_environ

COMMANDS = tuple(parsing.COMMANDS)


def test_version(run: Run) -> None:
    """--version prints name and version on stdout."""
    assert run("--version").end() == (0, f"sekuire {sekuire.__version__}\n", "")


@POSIX_ONLY
def test_another_sekuire_on_the_path(tmp_path: Path) -> None:
    """Where another program of the name comes first, ``python -m sekuire`` runs this library's commands."""
    other = tmp_path / "sekuire"
    other.write_text("#!/bin/sh\necho another program\n")
    other.chmod(0o755)
    environ = clean_environ(PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    def output(*command: str) -> str:
        return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=GUARD, check=True).stdout

    assert output("sekuire", "--version") == "another program\n"
    assert output(sys.executable, "-m", "sekuire", "--version") == f"sekuire {sekuire.__version__}\n"


def test_help_names_the_commands(call: Call) -> None:
    """--help lists every command and the exit codes."""
    code, out, _ = call("--help")
    assert code == 0
    assert all(name in out for name in COMMANDS)
    assert "130 interrupted" in out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command(call: Call, command: str) -> None:
    """Each command has a help with its own exit codes."""
    code, out, _ = call(command, "--help")
    assert code == 0
    assert f"usage: sekuire {command}" in out
    assert "Exit codes:" in out


@pytest.mark.parametrize(
    "args", [(), ("nonsense",), ("demo", "--nonsense"), ("demo", "--log-level", "loud"), ("worker",), ("send", "x")]
)
def test_wrong_usage_is_2(call: Call, args: tuple[str, ...]) -> None:
    """Wrong usage exits 2, with the usage on stderr and nothing on stdout."""
    code, out, err = call(*args)
    assert (code, out) == (2, "")
    assert "usage: sekuire" in err


#: Prints on stdout the modules that a command line has loaded, beside those that argparse needs.
LOADED = """
import argparse, shutil, sys
before = set(sys.modules)
import atexit, sekuire.cli
atexit.register(lambda: print(*sorted(name for name in set(sys.modules) - before if "encodings" not in name)))
sekuire.cli.main()
"""


def loaded_by(*args: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", LOADED, *args], capture_output=True, check=True, timeout=GUARD, env=clean_environ()
    )
    return set(done.stdout.decode().splitlines()[-1].split())


@pytest.mark.parametrize("args", [("--version",), ("--help",)])
def test_what_asks_for_nothing_loads_nothing(args: tuple[str, ...]) -> None:
    """The version and the list of commands load no command, no dependency and hardly a module of Python's own."""
    ours = {"sekuire", "sekuire.version", "sekuire.cli", "sekuire.cli.parsing", "sekuire.cli.streams"}
    loaded = loaded_by(*args)
    assert {name for name in loaded if name.startswith("sekuire")} == ours
    # What the interpreter and argparse add differs with their version.
    assert not loaded & {"requests", "attrs", "attr", "flask", "tenacity", "logging", "typing", "asyncio", "socket"}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_loads_no_other(command: str) -> None:
    """The help of one command loads its module and not the others, and no web server."""
    loaded = loaded_by(command, "--help")
    others = {f"sekuire.cli.{name}" for name in COMMANDS if name != command}
    # These do a part of what the other one does.
    needed = {"dev": {"sekuire.cli.policy"}, "capabilities": {"sekuire.cli.worker"}}
    assert loaded & others <= needed.get(command, set())
    assert not loaded & {"flask", "werkzeug", "cheroot", "sekuire.local", "rich"}


#: Runs a command line after a line on stdout, and signals itself at the import of the number that the variable has; at
#: the negative one of that number where the importing system calls back, which cannot pass an exception on. With
#: "count" it prints how many imports come before the first connection, and ends.
INTERRUPTED = """
import os, signal, sys, sekuire.cli
wanted = os.environ.get("AT_IMPORT", "0")
at = 0 if wanted == "count" else int(wanted)
imports = 0

def count(step):
    global at
    at -= step
    if at == 0:
        os.kill(os.getpid(), signal.SIGINT)

def hook(event, args):
    global imports
    if event == "import":
        imports += 1
        if at > 0:
            count(1)
    elif event == "socket.connect" and wanted == "count":
        print(imports, flush=True)
        os._exit(0)

def profile(frame, event, arg):
    if event == "call" and frame.f_code.co_name == "cb" and "importlib" in frame.f_code.co_filename and at < 0:
        count(-1)

sys.addaudithook(hook)
if at < 0:
    sys.setprofile(profile)
print("begun", flush=True)
sys.exit(sekuire.cli.main())
"""


def interrupted(url: str, at_import: Union[int, str], **options: Any) -> subprocess.Popen[bytes]:
    """A command that runs until it is interrupted."""
    return subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, "send", "copy", "{}", "--url", url, "--wait"],
        env=clean_environ(SEKUIRE_API_KEY="sk_live_x", SEKUIRE_AGENT_ID="a", AT_IMPORT=str(at_import)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


@pytest.fixture(scope="module")
def imports_of_a_command() -> int:
    """The number of imports before the first connection. It differs with the interpreter, and under coverage."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        process = interrupted(f"http://127.0.0.1:{listener.getsockname()[1]}", "count")
        lines = process.communicate(timeout=GUARD)[0].split()
    assert lines[0] == b"begun"
    assert int(lines[1]) > 20
    return int(lines[1])


def end_of_interrupted(process: subprocess.Popen[bytes]) -> None:
    err = process.communicate(timeout=GUARD)[1]
    assert process.returncode == 130, err
    assert len(err.splitlines()) <= 1, err
    assert b"interrupted" in err or not err


@pytest.mark.slow
@POSIX_ONLY
@pytest.mark.parametrize("at_import", [1, 2, 5, 10, 0.1, 0.2, 0.4, 0.6, 0.8, 0.95, -1, -20])
def test_ctrl_c_at_an_import(silent_url: str, imports_of_a_command: int, at_import: float) -> None:
    """Ctrl-C while a command is imported: exit code 130, at most one line, no traceback.

    A fraction is that share of the command's imports.
    """
    number = int(at_import * imports_of_a_command) if 0 < at_import < 1 else int(at_import)
    end_of_interrupted(interrupted(silent_url, number))


@pytest.mark.slow
@POSIX_ONLY
def test_ctrl_c_at_any_moment(silent_url: str) -> None:
    """The same at moments that chance chooses, from the start on."""
    for _ in range(12):
        process = interrupted(silent_url, 0)
        assert process.stdout is not None
        assert process.stdout.readline() == b"begun\n"
        time.sleep(random.uniform(0, 0.5))
        process.send_signal(signal.SIGINT)
        end_of_interrupted(process)


def test_a_calling_program_keeps_its_ctrl_c(monkeypatch: pytest.MonkeyPatch, call: Call) -> None:
    """main() with a command line of its own changes no signal handler."""
    handlers = []
    load = parsing.parse

    def parse(argv: Any) -> Any:
        handlers.append(signal.getsignal(signal.SIGINT))
        return load(argv)

    monkeypatch.setattr(parsing, "parse", parse)
    assert call("--version")[0] == 0
    assert handlers == [signal.getsignal(signal.SIGINT)]


@POSIX_ONLY
def test_an_ignored_ctrl_c_stays_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the background of a shell."""
    monkeypatch.setattr(sys, "argv", ["sekuire", "--version"])
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with pytest.raises(SystemExit):
            sekuire.cli.main()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["demo", "dev"])
@pytest.mark.parametrize("missing", ["flask", "werkzeug"])
def test_missing_extra(tmp_path: Path, command: str, missing: str) -> None:
    """Without the extra, one line says what to install."""
    program = (
        f"import sys; sys.modules[{missing!r}] = None; from sekuire.cli import main; sys.exit(main([{command!r}]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        check=False,
        cwd=str(tmp_path),
        env=clean_environ(),
        capture_output=True,
        timeout=GUARD,
    )
    assert done.returncode == 2
    lines = done.stderr.decode().splitlines()
    assert len(lines) == 1
    assert "pip install 'sekuire[local]'" in lines[0]


@pytest.mark.slow
@POSIX_ONLY
def test_a_closed_pipe_is_quiet(run: Run) -> None:
    """`sekuire demo | head`: once stdout is closed the command ends and writes nothing to stderr."""
    reader, writer = os.pipe()
    os.close(reader)
    process = run("demo", "--limit", "3", stdout=writer)
    os.close(writer)
    assert process.end()[::2] == (1, "")


@pytest.mark.slow
@POSIX_ONLY
def test_a_closed_pipe_in_the_middle_stops_all(run: Run) -> None:
    """The platform and the worker of the demo are stopped in order when stdout's reader leaves."""
    reader, writer = os.pipe()
    process = run("demo", "--limit", "30", stdout=writer)
    os.close(writer)
    assert os.read(reader, 1) == b"1"
    os.close(reader)
    code, _, err = process.end()
    assert code == 1
    assert "Traceback" not in err
    assert "Warning" not in err
    assert "error" not in err


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_told(run: Run) -> None:
    """Output that cannot be written is a failure with its reason."""
    with open("/dev/full", "wb") as full:
        code, _, err = run("demo", "--limit", "3", stdout=full).end()
    assert code == 1
    assert err == "sekuire demo: error: cannot write the output: No space left on device\n"


@pytest.mark.slow
@POSIX_ONLY
def test_a_closed_stderr_changes_nothing(run: Run, tmp_path: Path) -> None:
    """Progress and errors are dropped."""
    (tmp_path / "a.txt").write_text("One.\n")
    reader, writer = os.pipe()
    os.close(reader)
    process = run("demo", "a.txt", "-v", stderr=writer)
    os.close(writer)
    code, out, _ = process.end()
    assert code == 0
    assert "failures   0" in out


@pytest.mark.slow
def test_an_encoding_without_the_character(run: Run, tmp_path: Path) -> None:
    """What the output's encoding lacks is replaced."""
    (tmp_path / "a.txt").write_text("日本語 é\n", encoding="utf-8")
    code, out, err = run("demo", "a.txt", env={"PYTHONIOENCODING": "ascii"}).end()
    assert (code, "Traceback" in err) == (0, False)
    assert "??? ?" in out


def test_logging_is_undone(call: Call) -> None:
    """A command run within a program leaves its logging as it was."""
    root = logging.getLogger()
    before = (root.level, list(root.handlers))
    call("doctor", "-v", env={"SEKUIRE_API_URL": "nonsense"})
    assert (root.level, list(root.handlers)) == before


@pytest.mark.parametrize(
    "args", [("-v", "demo", "a.txt"), ("demo", "a.txt", "--log-level", "DEBUG"), ("-vv", "demo", "a.txt")]
)
def test_log_level(call: Call, tmp_path: Path, args: tuple[str, ...]) -> None:
    """-v, -vv and --log-level work before and behind the command's name; without them the demo logs nothing."""
    (tmp_path / "a.txt").write_text("One.\n")
    code, _, err = call(*args)
    assert code == 0
    assert ("urllib3" in err) == ("-vv" in args)
    assert "INFO    sekuire" in err
    code, _, err = call("demo", "a.txt")
    assert code == 0
    assert "sekuire" not in err
