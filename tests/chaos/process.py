"""A process that speaks JSON lines with its parent, can be killed at any moment, and never outlives it."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from typing import IO, Any, Dict, Optional

Message = Dict[str, Any]

_ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


class Ended(Exception):
    """The process has ended, or does not answer."""


class Child:
    """A module (of this package, or named whole), run with ``settings`` as a process and a process group of its own.

    It ends when its standard input does, so it does not outlive a parent that was killed. One thread of the parent
    uses it; another reads its lines. Its standard error goes to ``log``.
    """

    def __init__(self, module: str, settings: Message, log: str) -> None:
        self.log = log
        self._lines: queue.SimpleQueue[Optional[str]] = queue.SimpleQueue()
        self._asked = 0
        with open(log, "ab") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module if "." in module else f"{__package__}.{module}", json.dumps(settings)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd=_ROOT,
                text=True,
                bufsize=1,
                start_new_session=True,
            )
        self.pid = self._process.pid
        self._reader = threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True)
        self._reader.start()

    def say(self, op: str, **fields: Any) -> int:
        """Ask for something without waiting for the answer; the question's number.

        :raises Ended: it has ended.
        """
        self._asked += 1
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"op": op, "number": self._asked, **fields}) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            problem = str(error)
        else:
            return self._asked
        raise Ended(f"{self!r} takes no questions: {problem}\n{self.last_words()}")

    def ask(self, op: str, timeout: float = 30.0, **fields: Any) -> Message:
        """The answer to a question.

        :raises Ended: it has ended, or has not answered in time.
        """
        number = self.say(op, **fields)
        end = time.monotonic() + timeout
        while True:
            answer = self.hear(max(0.0, end - time.monotonic()))
            if answer is None:
                raise Ended(f"{self!r} has not answered {op!r} in {timeout:g} s\n{self.last_words()}")
            if answer.get("number") == number:
                return answer

    def hear(self, timeout: float) -> Optional[Message]:
        """Its next line; None where none comes in time.

        :raises Ended: it has ended.
        """
        try:
            line = self._lines.get(timeout=timeout)
        except queue.Empty:
            return None
        if line is None:
            self._lines.put(None)
            raise Ended(f"{self!r} has ended ({self._process.poll()})\n{self.last_words()}")
        message: Message = json.loads(line)
        return message

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        """End it and its group with SIGKILL, and wait for that. Harmless afterwards."""
        with contextlib.suppress(OSError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        self._free()

    def wait(self, timeout: float) -> Optional[int]:
        """Its exit code, or None where it still runs after ``timeout`` seconds."""
        try:
            code = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None
        self._free()
        return code

    def last_words(self) -> str:
        """The end of what it wrote to standard error."""
        with open(self.log, encoding="utf-8", errors="replace") as file:
            return file.read()[-3000:]

    def __repr__(self) -> str:
        return f"<{os.path.basename(self.log)} {self.pid}>"

    def _free(self) -> None:
        self._reader.join(5.0)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def _read(self, pipe: IO[str]) -> None:
        with contextlib.suppress(OSError, ValueError):
            for line in pipe:
                self._lines.put(line)
        self._lines.put(None)


# -- the child's side -------------------------------------------------------------------------------------------------

_say_lock = threading.Lock()


def reply(**message: Any) -> None:
    """Send a line to the parent; from any thread."""
    line = json.dumps(message) + "\n"
    with _say_lock:
        sys.stdout.write(line)
        sys.stdout.flush()


def question() -> Message:
    """The parent's next line. Where there is no parent any more, this process ends."""
    line = sys.stdin.readline()
    if not line:
        os._exit(1)
    message: Message = json.loads(line)
    return message
