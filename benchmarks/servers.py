"""Start the servers that the peers need, each in a directory of its own, and end them."""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional

from .process import ChildError

#: Name → the program to run, and Debian's package.
_PROGRAMS = {"redis": ("redis-server", "redis-server"), "postgres": ("postgres", "postgresql")}


class Server(NamedTuple):
    """A running server: its URL, and the id of its process."""

    url: str
    pid: int


def is_installed(name: str) -> bool:
    """Return True if the server can be started here."""
    return _find(_PROGRAMS[name][0]) is not None


@contextlib.contextmanager
def start(name: str) -> Iterator[Server]:
    """Run a server until the block ends. Only this machine reaches it, and it syncs nothing to the disk.

    :param name: ``redis`` or ``postgres``.
    :raises ChildError: it is not installed, or does not answer.
    """
    program, package = _PROGRAMS[name]
    path = _find(program)
    if path is None:
        raise ChildError(f"there is no {program} on this machine; on Debian: apt-get install {package}")
    with tempfile.TemporaryDirectory(prefix="sekuire-peers-") as directory:
        with (_redis if name == "redis" else _postgres)(path, directory) as server:
            yield server


def _find(program: str) -> Optional[str]:
    # Debian does not put the programs of PostgreSQL on the path.
    return shutil.which(program) or max(glob.glob(f"/usr/lib/postgresql/*/bin/{program}"), default=None)


@contextlib.contextmanager
def _redis(program: str, directory: str) -> Iterator[Server]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def answers() -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1.0) as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(16).startswith(b"+PONG")
        return False

    options = ["--bind", "127.0.0.1", "--port", str(port), "--save", "", "--appendonly", "no", "--dir", directory]
    with _running([program, *options], answers, {}) as process:
        yield Server(f"redis://127.0.0.1:{port}/0", process.pid)


@contextlib.contextmanager
def _postgres(program: str, directory: str) -> Iterator[Server]:
    user: Dict[str, Any] = {"cwd": directory}
    if os.getuid() == 0:
        # It refuses to run as root, and its user must get to its directory.
        user.update(user="postgres", group="postgres")
        shutil.chown(directory, "postgres", "postgres")
    data = os.path.join(directory, "data")
    initdb = [_find("initdb") or "initdb", "--auth=trust", "--username=peer", "--no-sync", "--pgdata", data]
    subprocess.run(initdb, check=True, stdout=subprocess.DEVNULL, timeout=60.0, **user)
    ready = [_find("pg_isready") or "pg_isready", "-q", "-h", directory]

    def answers() -> bool:
        return subprocess.run(ready, check=False, timeout=10.0).returncode == 0

    # -F: no fsync, as Redis without a file.
    with _running([program, "-D", data, "-k", directory, "-h", "", "-F"], answers, user) as process:
        yield Server(f"postgresql://peer@/postgres?host={directory}", process.pid)


@contextlib.contextmanager
def _running(
    command: List[str], answers: Callable[[], bool], options: Dict[str, Any]
) -> "Iterator[subprocess.Popen[bytes]]":
    with open(os.devnull, "wb") as nowhere:
        process = subprocess.Popen(command, stdout=nowhere, stderr=nowhere, start_new_session=True, **options)
    try:
        end = time.monotonic() + 30.0
        while not answers():
            if time.monotonic() > end or process.poll() is not None:
                raise ChildError(f"{os.path.basename(command[0])} did not answer")
            time.sleep(0.02)
        yield process
    finally:
        # PostgreSQL ends its sessions too. SIGTERM would wait for them.
        process.send_signal(signal.SIGINT)
        process.wait(30.0)
