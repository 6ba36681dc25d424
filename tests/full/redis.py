"""A Redis of a test's own: a process on a free port of the loopback, in memory, ended with the test."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import time
from typing import Iterator

from ..support.waiting import GUARD

PROGRAM = "redis-server"


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
        return port


@contextlib.contextmanager
def redis_server(port: int, *options: str) -> Iterator["subprocess.Popen[bytes]"]:
    """The process, once it answers."""
    program = shutil.which(PROGRAM)
    assert program, "tox -e full installs Redis; here it is missing"
    command = [program, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", *options]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + GUARD
        while not _answers(port):
            assert process.poll() is None, "redis-server ended"
            assert time.monotonic() < end, "redis-server does not answer"
            time.sleep(0.02)
        yield process
    finally:
        process.kill()
        process.wait(GUARD)


def _answers(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1.0) as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(64)[:1] in (b"+", b"-")
    except OSError:
        return False
