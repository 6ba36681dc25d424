"""The lines to paste: each shell reads back what was written."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from sekuire.cli import shells

from .conftest import POSIX_ONLY, Call, Run

HARD = 'it\'s $5, "two" `x` \\ words & more'


def test_forms() -> None:
    """Values are quoted for each shell."""
    one = {"A": "x y'z"}
    assert shells.lines(one, "sh") == ["export A='x y'\"'\"'z'"]
    assert shells.lines(one, "fish") == ["set -gx A 'x y\\'z'"]
    assert shells.lines(one, "powershell") == ["$env:A = 'x y''z'"]
    assert shells.lines({"A": "x & y"}, "cmd") == ['set "A=x & y"']
    assert shells.lines({"A": "a\\b\u2019"}, "fish") == ["set -gx A 'a\\\\b\u2019'"]
    assert shells.lines({"A": "a\u2019b"}, "powershell") == ["$env:A = 'a\u2019\u2019b'"]


@pytest.mark.parametrize(
    ("shell", "program", "show"),
    [
        ("sh", "sh", 'printf %s "$SEKUIRE_A"'),
        ("sh", "zsh", 'printf %s "$SEKUIRE_A"'),
        ("fish", "fish", 'printf %s "$SEKUIRE_A"'),
        ("powershell", "pwsh", "[Console]::Write($env:SEKUIRE_A)"),
    ],
)
def test_a_real_shell(shell: str, program: str, show: str) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"needs {program}")
    [line] = shells.lines({"SEKUIRE_A": HARD}, shell)
    ran = subprocess.run([program, "-c", f"{line}\n{show}"], capture_output=True, check=True)
    assert ran.stdout.decode() == HARD


def test_on_windows() -> None:
    """PowerShell adds the user's own directory to those of the system."""
    assert shells.detect({"PSModulePath": "C:\\a;C:\\b"}, is_windows=True) == "cmd"
    assert shells.detect({"PSModulePath": "C:\\me;C:\\a;C:\\b"}, is_windows=True) == "powershell"
    assert shells.detect({}, is_windows=True) == "cmd"


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")
@pytest.mark.parametrize(("name", "wanted"), [("fish", "fish"), ("pwsh", "powershell"), ("zsh", "sh"), ("dash", "sh")])
def test_the_shell_above(name: str, wanted: str) -> None:
    """The nearest shell among the processes above counts, not the login shell."""
    inner = "from sekuire.cli import shells; print(shells.detect())"
    outer = f"import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', {inner!r}]).returncode)"
    # The name of a process is its own to choose.
    script = f"""
import subprocess, sys
with open("/proc/self/comm", "w") as file:
    file.write({name!r})
subprocess.run([sys.executable, "-c", {outer!r}], check=True)
"""
    environ = {**os.environ, "SHELL": "/bin/csh"}
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environ)
    assert ran.stdout.strip() == wanted


@POSIX_ONLY
def test_the_option(run: Run, call: Call) -> None:
    """--shell decides."""
    process = run("dev", "--port", "0", "--shell", "fish")
    assert process.line("stdout", "SEKUIRE_API_KEY").startswith("set -gx SEKUIRE_API_KEY 'sk_live_")
    code, _, err = call("dev", "--shell", "csh")
    assert code == 2
    assert "--shell" in err
