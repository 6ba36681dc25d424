"""The third command: ``python -m benchmarks.local`` measures the local platform with many streams open.

The platform runs in a process of its own with its tasks submitted beforehand. A second process opens the streams over
plain sockets, answers each task with a completion on a few kept connections, and does as little else as possible: what
it costs is outside the figure, but it runs on the same machine.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import selectors
import socket
import statistics
import sys
import tempfile
import time
from typing import Any, Deque, Dict, List, Optional

from . import payloads, report
from .process import Child, ChildError, Message, busy, hear, say, usage
from .report import Spread, cells, number, table

_TASK = re.compile(rb'"task_id":"([^"]+)"')
_LENGTH = re.compile(rb"\r\nContent-Length: (\d+)", re.IGNORECASE)
_WARM_UP = 300
#: Completions that are on their way at once, each on a kept connection of its own.
_CONNECTIONS = 8


def _serve(options: argparse.Namespace) -> None:
    from sekuire.local import LocalPlatform

    with tempfile.TemporaryDirectory(prefix="sekuire-local-") as directory:
        path = os.path.join(directory, "platform.db") if options.file else None
        with LocalPlatform(path, max_streams=options.streams + 10) as platform:
            document = payloads.task_input()
            for _ in range(options.tasks):
                platform.submit(payloads.CAPABILITY, document, agent_id=payloads.AGENT_ID)
            token = platform.create_install_token(payloads.AGENT_ID)
            say({"url": platform.url, "install_token": token})
            while hear() is not None:
                say(usage())


class _Load:
    """The other side: streams in, completions out, on one thread."""

    def __init__(self, host: str, port: int, token: str, streams: int) -> None:
        self._address = (host, port)
        self._auth = f"Host: {host}:{port}\r\nAuthorization: Bearer {token}\r\n".encode()
        self._selector = selectors.DefaultSelector()
        self._result = payloads.compact(payloads.result())
        self.completed = 0
        self._todo: Deque[Any] = Deque()
        self._idle: List[socket.socket] = []
        self._rest: Dict[socket.socket, bytes] = {}
        self._worker: Dict[socket.socket, str] = {}
        for index in range(streams):
            self._open(f"worker-{index:04d}")
        for _ in range(_CONNECTIONS):
            sock = socket.create_connection(self._address, 30.0)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._selector.register(sock, selectors.EVENT_READ, False)
            self._idle.append(sock)

    def _open(self, worker_id: str) -> None:
        sock = socket.create_connection(self._address, 30.0)
        query = f"agent_id={payloads.AGENT_ID}&worker_id={worker_id}&max_in_flight=2"
        sock.sendall(f"GET /api/v1/tasks/stream?{query} HTTP/1.1\r\n".encode() + self._auth + b"\r\n")
        self._worker[sock] = worker_id
        self._rest[sock] = b""
        self._selector.register(sock, selectors.EVENT_READ, True)

    def run(self, until: int, seconds: float) -> None:
        end = time.monotonic() + seconds
        while self.completed < until:
            if time.monotonic() > end:
                raise ChildError(f"{self.completed} of {until} completions in {seconds:g} s")
            for key, _ in self._selector.select(1.0):
                sock: Any = key.fileobj
                if key.data:
                    self._take(sock)
                else:
                    self._finish(sock)
            while self._todo and self._idle:
                self._post(self._idle.pop(), *self._todo.popleft())

    def _take(self, sock: socket.socket) -> None:
        data = sock.recv(262144)
        if not data:
            raise ChildError("a stream has ended")
        text = self._rest[sock] + data
        end = 0
        for match in _TASK.finditer(text):
            self._todo.append((match.group(1).decode(), self._worker[sock]))
            end = match.end()
        self._rest[sock] = text[max(end, len(text) - 100) :]

    def _post(self, sock: socket.socket, task_id: str, worker_id: str) -> None:
        body = (
            f'{{"task_id":"{task_id}","status":"completed","output":{self._result},"execution_time_ms":0,'
            f'"attempt":1,"worker_id":"{worker_id}"}}'
        ).encode()
        head = f"POST /api/v1/tasks/{task_id}/complete HTTP/1.1\r\n".encode() + self._auth
        head += f"Idempotency-Key: {task_id}:1\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        sock.sendall(head + body)

    def _finish(self, sock: socket.socket) -> None:
        answer = self._rest.get(sock, b"") + sock.recv(65536)
        head, found, body = answer.partition(b"\r\n\r\n")
        length = _LENGTH.search(head)
        if not found or length is None or len(body) < int(length.group(1)):
            self._rest[sock] = answer
            return
        self._rest[sock] = b""
        if not answer.startswith(b"HTTP/1.1 200"):
            raise ChildError(f"a completion was answered {answer[:60]!r}")
        self._idle.append(sock)
        self.completed += 1


def _bootstrap(url: str, install_token: str) -> str:
    import urllib.request

    body = {"install_token": install_token, "agent_id": payloads.AGENT_ID, "capabilities": [], "runtime_info": {}}
    request = urllib.request.Request(f"{url}/api/v1/installations/bootstrap", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=30.0) as answer:
        token: str = json.load(answer)["runtime_token"]
    return token


def _load(options: argparse.Namespace) -> None:
    host, _, port = options.url.rpartition("/")[2].rpartition(":")
    load = _Load(host, int(port), _bootstrap(options.url, options.install_token), options.streams)
    load.run(_WARM_UP, 60.0)
    say({"ready": True})
    while hear() is not None:
        before = usage()
        begun = load.completed
        load.run(options.tasks, 120.0)
        after = usage()
        say(
            {
                "done": load.completed - begun,
                "wall_ns": after["wall_ns"] - before["wall_ns"],
                "busy": busy(before, after),
            }
        )


def measure(streams: int, tasks: int, file: bool) -> Message:
    """One round: a fresh platform, a fresh load."""
    shared = ["--streams", str(streams), "--tasks", str(tasks + _WARM_UP)]
    with Child("local", "serve", *shared, *(["--file"] if file else [])) as platform:
        made = platform.receive(timeout=120.0)
        with Child("local", "load", *shared, "--url", made["url"], "--install-token", made["install_token"]) as load:
            load.receive(timeout=120.0)
            before = platform.ask("usage")
            done = load.ask("run", timeout=180.0)
            after = platform.ask("usage")
    return {
        "per_second": done["done"] * 1e9 / done["wall_ns"],
        "cpu_us": (after["cpu_ns"] - before["cpu_ns"]) / 1e3 / done["done"],
        "busy": busy(before, after),
        "client_busy": done["busy"],
        "rss_mib": after["rss_kib"] / 1024,
    }


def show(rounds: List[Message], options: argparse.Namespace) -> None:
    kept = "in a file" if options.file else "in memory"
    print(f"{options.streams} streams, {options.tasks} tasks a round, state {kept}, rounds: {len(rounds)}\n")
    rows = [
        ["completions a second", *cells(Spread.of([one["per_second"] for one in rounds]), number)],
        ["CPU of the platform, µs a task", *cells(Spread.of([one["cpu_us"] for one in rounds]), number)],
        ["its memory, MiB", *cells(Spread.of([one["rss_mib"] for one in rounds]), number)],
        ["share of a core: platform", f"{statistics.median(one['busy'] for one in rounds):.0%}", ""],
        ["share of a core: clients", f"{statistics.median(one['client_busy'] for one in rounds):.0%}", ""],
    ]
    print(table(["local platform", "median", "min - max"], rows))


def main(arguments: Optional[List[str]] = None) -> int:
    """Measure and print; the two further roles are the processes that it starts."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.local", description="The local platform under load.")
    parser.add_argument("role", nargs="?", choices=("measure", "serve", "load"), default="measure")
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--tasks", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--file", action="store_true", help="keep the state in a file, as sekuire dev --db does")
    parser.add_argument("--url", help=argparse.SUPPRESS)
    parser.add_argument("--install-token", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.role == "serve":
        _serve(options)
        return 0
    if options.role == "load":
        _load(options)
        return 0
    facts = report.facts()
    try:
        rounds = [measure(options.streams, options.tasks, options.file) for _ in range(max(1, options.rounds))]
    except ChildError as error:
        print(f"cannot measure: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print("  ".join(f"{name} {value}" for name, value in facts.items()) + "\n")
    show(rounds, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
