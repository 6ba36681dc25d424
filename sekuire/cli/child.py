"""Run a user's command beside the local platform, with its output marked, and leave nothing of it behind."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from typing import Any, BinaryIO, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

from .._internal.threads import Deadline
from .exits import CommandError

__all__ = ["Child"]

_POSIX = os.name == "posix"
#: A line that is longer is written in pieces.
_LONGEST_LINE = 64 * 1024
#: Seconds for what the command leaves behind, and for its last output.
_PATIENCE = 2.0
_SLICE = 0.05


class Child:
    """Run a command in a process group of its own.

    :param environ: the command's environment.
    :param say: called with each line of its output and True for stdout, False for stderr.
    :raises CommandError: it cannot be started.
    """

    # Threads: the main thread starts and ends it. `sekuire-dev-stdout` and `-stderr` each read one pipe and call `say`;
    # they end when the pipe has no writer left, at the latest shortly after the command's group has ended.

    def __init__(self, command: Sequence[str], environ: Mapping[str, str], say: Callable[[str, bool], None]) -> None:
        self._say = say
        self._watch: Optional[subprocess.Popen[bytes]] = None
        self._alive: Optional[int] = None
        options: Dict[str, Any] = {"start_new_session": True}
        if not _POSIX:
            options = {"creationflags": getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)}
        program = find_program(command[0], environ)
        problem = ""
        try:
            # Its terminal's Ctrl-C comes to this process, which passes it on, so it has no terminal to read from.
            self._process = subprocess.Popen(
                [program, *command[1:]], env={**environ, "PYTHONUNBUFFERED": "1"}, stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options,
            )  # fmt: skip
        except OSError as error:
            problem = error.strerror or type(error).__name__
        if problem:
            raise CommandError(f"cannot start {command[0]!r}: {problem}")
        if _POSIX:
            self._begin_watch()
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._threads = [
            threading.Thread(target=self._read, args=(pipe, is_stdout), name=f"sekuire-dev-{name}", daemon=True)
            for pipe, is_stdout, name in (
                (self._process.stdout, True, "stdout"), (self._process.stderr, False, "stderr")
            )
        ]  # fmt: skip
        for thread in self._threads:
            thread.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def has_ended(self) -> bool:
        """Return True if the command has ended."""
        return self._process.poll() is not None

    def signal(self, number: int) -> None:
        """Send a signal to the command and all that it has started, as a terminal would."""
        with contextlib.suppress(OSError):
            if _POSIX:
                os.killpg(self._process.pid, number)
            else:
                self._process.send_signal(getattr(signal, "CTRL_BREAK_EVENT", number))

    def kill(self) -> None:
        """End the command at once."""
        if _POSIX:
            self.signal(signal.SIGKILL)
        else:
            self._process.kill()

    def close(self) -> int:
        """End what the command has left behind, wait for its last output and return its exit code.

        That is 128 and the number of the signal that ended it, as for a shell.
        """
        if not self.has_ended():
            self.kill()
        code = self._process.wait()
        if _POSIX:
            self._end_rest()
        deadline = Deadline(_PATIENCE)
        for thread in self._threads:
            thread.join(deadline.remaining())
        if self._watch is not None and self._alive is not None:
            with contextlib.suppress(OSError):
                os.write(self._alive, b".")
            os.close(self._alive)
            self._watch.wait()
        return 128 - code if code < 0 else code

    def _end_rest(self) -> None:
        """End the processes that the command has left in its group. Its number is not used again while one lives."""
        deadline = Deadline(_PATIENCE)
        with contextlib.suppress(OSError):
            os.killpg(self._process.pid, signal.SIGTERM)
            while not deadline.is_expired():
                time.sleep(_SLICE)
                os.killpg(self._process.pid, 0)
            os.killpg(self._process.pid, signal.SIGKILL)

    def _begin_watch(self) -> None:
        """Start the process that ends the command if this process dies."""
        reading, writing = os.pipe()
        try:
            script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "orphans.py")
            self._watch = subprocess.Popen(
                [sys.executable, "-I", "-S", script, str(reading), str(self._process.pid)],
                pass_fds=[reading], start_new_session=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )  # fmt: skip
            self._alive = writing
        except OSError:
            # Without it only a kill of this process leaves the command behind.
            os.close(writing)
        finally:
            os.close(reading)

    def _read(self, pipe: BinaryIO, is_stdout: bool) -> None:
        with pipe:
            rest = b""
            while True:
                try:
                    chunk = os.read(pipe.fileno(), _LONGEST_LINE)
                except OSError:
                    chunk = b""
                *lines, rest = (rest + chunk).split(b"\n")
                if rest and (not chunk or len(rest) > _LONGEST_LINE):
                    lines, rest = [*lines, rest], b""
                for line in lines:
                    self._say(line.decode("utf-8", "replace").rstrip("\r"), is_stdout)
                if not chunk:
                    return


def find_program(name: str, environ: Mapping[str, str]) -> str:
    """Return the path of a program.

    :raises CommandError: there is none of this name.
    """
    found = shutil.which(name, path=environ.get("PATH"))
    if found is None:
        hint = "; did you mean python3?" if name == "python" and shutil.which("python3") else ""
        raise CommandError(f"there is no program {name!r} to run{hint}")
    return found


def environment(
    base: Mapping[str, str], variables: Mapping[str, str], logins: Sequence[str]
) -> Tuple[Dict[str, str], List[str]]:
    """Return ``base`` with ``variables`` and without the other login settings, and the names of those left out."""
    left_out = [name for name in logins if base.get(name) and name not in variables]
    kept = {name: value for name, value in base.items() if name not in left_out}
    return {**kept, **variables}, left_out
