"""A PostgreSQL server of the tests' own, on a socket in a directory of its own."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import signal
import subprocess
from typing import Any, Dict, Iterator, Optional

from ..support.waiting import GUARD, until


def program(name: str) -> str:
    """A program of the server, which Debian does not put on the path."""
    found: Optional[str] = shutil.which(name)
    installed = sorted(pathlib.Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    if found is None and installed:
        found = str(installed[-1])
    assert found, f"tox -e full installs PostgreSQL; here {name} is missing"
    return found


@contextlib.contextmanager
def postgres(directory: pathlib.Path) -> Iterator[Dict[str, Any]]:
    """A running server; what Django's ``DATABASES`` needs to know of it."""
    options: Dict[str, Any] = {}
    if os.getuid() == 0:
        # It refuses to run as root, and its user must get to its directory.
        options = {"user": "postgres", "group": "postgres"}
        shutil.chown(directory, "postgres", "postgres")
    data = str(directory / "data")
    subprocess.run(
        [program("initdb"), "--auth=trust", "--username=tester", "--no-sync", "--pgdata", data],
        check=True, cwd=directory, stdout=subprocess.DEVNULL, timeout=GUARD, **options,
    )  # fmt: skip
    command = [program("postgres"), "-D", data, "-k", str(directory), "-h", "", "-F", "-c", "lc_messages=C"]
    with open(directory / "postgres.log", "w", encoding="utf-8") as log:
        process = subprocess.Popen(command, cwd=directory, stdout=log, stderr=log, **options)
        try:
            # The socket is there before the server accepts anybody.
            until(lambda: "ready to accept connections" in (directory / "postgres.log").read_text("utf-8"), GUARD)
            yield {"HOST": str(directory), "NAME": "postgres", "USER": "tester"}
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(GUARD)
