"""Files of other users, processes of other users, and mounts of one's own."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from .waiting import GUARD

#: A user and a group that nobody here is.
OTHER = 12345
is_root = os.name == "posix" and os.geteuid() == 0


def give_to_another(path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a file, or a link, another user's. Who may not do that becomes another user, as far as os.geteuid() says."""
    if is_root:
        os.chown(path, OTHER, -1, follow_symlinks=False)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: OTHER)


def in_mounts(script: str, *arguments: str) -> str:
    """Run a script that may mount what it likes: as root, in mounts of its own. Return what it prints.

    Skips the test where the machine does not allow that.
    """
    mounts = ["unshare", "--mount"] if is_root else ["unshare", "--map-root-user", "--mount"]
    if os.name != "posix" or shutil.which("unshare") is None:
        pytest.skip("needs unshare")
    trial = [*mounts, "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    if subprocess.run(trial, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount")
    command = [*mounts, sys.executable, "-W", "ignore", "-c", script, *arguments]
    run = subprocess.run(command, capture_output=True, text=True, timeout=GUARD, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout
