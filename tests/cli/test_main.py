"""The command as a whole: usage, exit codes, output that leads nowhere."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

import sekuire

from ..support.waiting import GUARD
from .conftest import POSIX_ONLY, Call, Run, clean_environ

COMMANDS = ("demo", "dev", "worker", "send", "doctor")


def test_version(run: Run) -> None:
    """--version prints name and version on stdout."""
    assert run("--version").end() == (0, f"sekuire {sekuire.__version__}\n", "")


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


def test_nothing_heavy_is_imported_for_nothing(run: Run) -> None:
    """The web server of the local platform is imported by the commands that run it only."""
    program = "import sys, sekuire.cli; print([n for n in ('flask', 'cheroot', 'sekuire.local') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, timeout=GUARD)
    assert done.stdout.strip() == b"[]"


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


@pytest.mark.parametrize("args", [("-v", "demo", "a.txt"), ("demo", "a.txt", "--log-level", "DEBUG")])
def test_log_level(call: Call, tmp_path: Path, args: tuple[str, ...]) -> None:
    """-v and --log-level work before and behind the command's name; without them the demo logs nothing."""
    (tmp_path / "a.txt").write_text("One.\n")
    code, _, err = call(*args)
    assert code == 0
    assert "DEBUG" in err
    assert "INFO    sekuire" in err
    code, _, err = call("demo", "a.txt")
    assert code == 0
    assert "sekuire" not in err
