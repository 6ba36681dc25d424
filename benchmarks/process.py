"""Child processes that speak JSON lines, and that end whatever happens to their parent."""

from __future__ import annotations

import glob
import json
import os
import queue
import resource
import subprocess
import sys
import threading
import time
from contextlib import suppress
from types import TracebackType
from typing import IO, Any, Dict, Optional, Type

Message = Dict[str, Any]


class ChildError(RuntimeError):
    """A measuring process ended, kept silent for too long, or reported that it could not measure."""


class Child:
    """A module of this package run as a process: one JSON line in, one JSON line back.

    The child ends when its standard input does, so it cannot outlive its parent; leaving the ``with`` block ends it.
    """

    def __init__(self, module: str, *arguments: str) -> None:
        self.module = module
        self._arguments = arguments
        self._lines: "queue.Queue[Optional[str]]" = queue.Queue()

    def __enter__(self) -> "Child":
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.{self.module}", *self._arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            # An interrupt at the terminal is the parent's: it ends its children.
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True)
        self._reader.start()
        return self

    def __exit__(
        self,
        kind: Optional[Type[BaseException]],
        error: Optional[BaseException],
        traceback: Optional[TracebackType],
    ) -> None:
        try:
            if self._process.stdin is not None:
                with suppress(OSError):
                    self._process.stdin.close()
            if kind is None:
                self._wait(10.0)
        finally:
            if self._process.poll() is None:
                self._process.terminate()
                if not self._wait(2.0):
                    self._process.kill()
                    self._process.wait()
            self._reader.join(2.0)
            if self._process.stdout is not None:
                self._process.stdout.close()

    def ask(self, op: str, timeout: float = 30.0, **fields: Any) -> Message:
        """Send one request and return the answer.

        :raises ChildError: the child ended, did not answer in time, or answered with an ``error``.
        """
        self.send(op, **fields)
        return self.receive(timeout)

    def send(self, op: str, **fields: Any) -> None:
        """Send one request whose answer :meth:`receive` takes later.

        :raises ChildError: the child ended.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"op": op, **fields}) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            raise ChildError(f"{self.module} has ended") from error

    def receive(self, timeout: float = 30.0) -> Message:
        """The child's next line.

        :raises ChildError: as :meth:`ask`.
        """
        try:
            line = self._lines.get(timeout=timeout)
        except queue.Empty:
            raise ChildError(f"{self.module} did not answer within {timeout:g} s") from None
        if line is None:
            raise ChildError(f"{self.module} has ended")
        message: Message = json.loads(line)
        if message.get("error"):
            raise ChildError(f"{self.module}: {message['error']}")
        return message

    def _read(self, lines: IO[str]) -> None:
        for line in lines:
            self._lines.put(line)
        self._lines.put(None)

    def _wait(self, timeout: float) -> bool:
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            return False
        return True


def say(message: Message) -> None:
    """Inside a child: one line to the parent."""
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def hear() -> Optional[Message]:
    """Inside a child: the parent's next line, or None when there will be no more."""
    line = sys.stdin.readline()
    if not line:
        return None
    message: Message = json.loads(line)
    return message


def usage() -> Message:
    """What this process has used so far; the difference of two of these is the cost of what lies between."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "wall_ns": time.monotonic_ns(),
        "cpu_ns": time.process_time_ns(),
        "delay_ns": _delay_ns(),
        "switches": used.ru_nvcsw + used.ru_nivcsw,
        "rss_kib": _rss_kib(used.ru_maxrss),
    }


def busy(before: Message, after: Message) -> float:
    """The share of one core a process used between two :func:`usage`."""
    wall_ns: int = after["wall_ns"] - before["wall_ns"]
    cpu_ns: int = after["cpu_ns"] - before["cpu_ns"]
    return cpu_ns / max(1, wall_ns)


def wanted(before: Message, after: Message) -> float:
    """The share of one core a process used or waited for: what :func:`busy` would be on a machine of its own."""
    used: int = after["cpu_ns"] - before["cpu_ns"] + max(0, after["delay_ns"] - before["delay_ns"])
    wall_ns: int = after["wall_ns"] - before["wall_ns"]
    return used / max(1, wall_ns)


def _delay_ns() -> int:
    """How long the threads of this process were ready to run, but had no core; 0 where the system does not say."""
    total = 0
    for path in glob.glob("/proc/self/task/*/schedstat"):
        with suppress(OSError, ValueError, IndexError), open(path, encoding="ascii") as file:
            total += int(file.read().split()[1])
    return total


def _rss_kib(peak_kib: int) -> int:
    try:
        with open("/proc/self/statm", encoding="ascii") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024
    except OSError:
        return peak_kib
