"""What a worker costs at its beginning, and while it has nothing to do: the first task, and memory."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from typing import Dict, Iterator, List

from . import payloads
from .process import Child

_ROUND_TRIPS = 4


@contextlib.contextmanager
def _own_bytecode() -> Iterator[None]:
    """Have the processes that are started here keep bytecode, wherever it may be kept otherwise."""
    names = ("PYTHONPYCACHEPREFIX", "PYTHONDONTWRITEBYTECODE")
    before = {name: os.environ.pop(name, None) for name in names}
    with tempfile.TemporaryDirectory() as cache:
        os.environ["PYTHONPYCACHEPREFIX"] = cache
        try:
            yield
        finally:
            del os.environ["PYTHONPYCACHEPREFIX"]
            os.environ.update({name: value for name, value in before.items() if value is not None})


def first_task(platform: Child, port: int, round_trip: float, rounds: int) -> Dict[str, List[float]]:
    """Seconds from the start of a process to its first completed task, and those that its import takes, in turn."""
    found: Dict[str, List[float]] = {"first": [], "import": [], "ratio": []}
    with _own_bytecode():
        # The first round only makes the bytecode.
        for turn in range(rounds + 1):
            begun = time.monotonic()
            with Child("first", "--only-import") as child:
                child.receive()
                imported = time.monotonic() - begun
            platform.send("feed", tasks=1, early=True)
            begun = time.monotonic()
            with Child("first", f"http://127.0.0.1:{port}", payloads.AGENT_ID, payloads.CAPABILITY):
                platform.receive(timeout=60.0)
                first = time.monotonic() - begun
            if turn:
                found["first"].append(first)
                found["import"].append(imported)
                found["ratio"].append(first / (imported + _ROUND_TRIPS * round_trip))
    return found


def memory(port: int, rounds: int) -> List[float]:
    """MiB of an idle worker above a Python that has imported requests."""
    modules = "argparse, importlib, json, logging, threading, requests"
    code = f"import {modules}; from benchmarks import payloads, process; print(json.dumps(process.usage()))"
    found = []
    with _own_bytecode():
        # The first round only makes the bytecode: compiling leaves memory behind.
        for _ in range(rounds + 1):
            ran = subprocess.run(
                [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, timeout=60, check=True
            )
            with Child("worker", "--port", str(port)) as child:
                child.receive()
                time.sleep(1.0)
                found.append((child.ask("usage")["rss_kib"] - json.loads(ran.stdout)["rss_kib"]) / 1024)
    return found[1:]


def processes(platform: Child, port: int, rounds: int, seconds: float) -> Dict[int, List[float]]:
    """Tasks a second of 1, 2 and 4 workers whose handler uses 2 ms of CPU."""
    found: Dict[int, List[float]] = {1: [], 2: [], 4: []}
    for _ in range(rounds):
        for count, speeds in found.items():
            arguments = ("--port", str(port), "--threads", "2", "--compute", "2")
            with ExitStack() as stack:
                children = [stack.enter_context(Child("worker", *arguments)) for _ in range(count)]
                for child in children:
                    child.receive()
                platform.ask("feed", tasks=40 * count)
                fed = platform.ask("feed", seconds=seconds, timeout=seconds + 60.0)
                speeds.append(fed["completed"] / fed["seconds"])
    return found
