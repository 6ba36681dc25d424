"""User code under mypy --strict: what is right passes, and each mistake is an error on its line."""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]


@pytest.mark.slow
def test_user_code_is_checked() -> None:
    """The samples give exactly the errors that their comments say, the right one none."""
    wanted = []
    for name in ("right.py", "wrong.py"):
        for number, line in enumerate((HERE / name).read_text(encoding="utf-8").splitlines(), 1):
            marked = re.search(r"# E: ([a-z-]+)$", line)
            if marked:
                wanted.append((name, number, marked.group(1)))
    # The library as one that is installed: what it imports is not the user's to answer for.
    ran = subprocess.run(
        [
            sys.executable, "-m", "mypy", "--strict", "--config-file=", "--follow-imports=silent", "--no-error-summary",
            "--hide-error-context", str(HERE / "right.py"), str(HERE / "wrong.py"),
        ],
        cwd=ROOT, capture_output=True, text=True, timeout=110, check=False,
    )  # fmt: skip
    found = []
    for line in ran.stdout.splitlines():
        error = re.match(r"(?:.*[/\\])?(\w+\.py):(\d+): error: .*\[([a-z-]+)\]$", line)
        if error:
            found.append((error.group(1), int(error.group(2)), error.group(3)))
    assert sorted(found) == sorted(wanted), ran.stdout + ran.stderr
    assert len(wanted) > 10
