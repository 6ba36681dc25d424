"""Programs in a terminal of 80 columns, as a person sees them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Dict, List, Optional, Sequence

from .waiting import GUARD

COLUMNS = 80
#: Makes the terminal at its stdin the one that sends Ctrl-C to a program, then becomes the program.
_CONTROLLED = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execvp(sys.argv[1], sys.argv[1:])"
)


def clean_environ(**variables: str) -> Dict[str, str]:
    """Return this process's environment without what changes the library's behaviour, and with ``variables``."""
    dropped = ("SEKUIRE_", "NO_COLOR", "COLUMNS", "PYTHONWARNINGS", "PYTHONUNBUFFERED")
    environ = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    return {**environ, "PYTHONIOENCODING": "utf-8", "TERM": "xterm", **variables}


class Terminal:
    """Run ``python ARGS`` with all three streams at a terminal, and collect what it shows.

    :param args: what follows the interpreter's name.
    :param program: what ``args`` follow instead of the interpreter's name.
    """

    # A thread reads the terminal. `_changed` guards `_data` and `_has_ended`.

    def __init__(
        self,
        args: Sequence[str],
        cwd: Path,
        variables: Optional[Dict[str, str]] = None,
        program: Sequence[str] = (sys.executable,),
    ) -> None:
        import fcntl
        import pty
        import struct
        import termios

        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
        self.popen = subprocess.Popen(
            [sys.executable, "-c", _CONTROLLED, *program, *args],
            cwd=str(cwd),
            env=clean_environ(**(variables or {})),
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
        )
        os.close(slave)
        self._changed = threading.Condition()
        self._data = b""
        self._has_ended = False
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self._master, 65536)
            except OSError:
                # Linux reports the end of a terminal so (EIO).
                data = b""
            with self._changed:
                self._data += data
                self._has_ended = not data
                self._changed.notify_all()
            if not data:
                return

    @property
    def text(self) -> str:
        """What it has shown until now."""
        with self._changed:
            return self._data.decode("utf-8").replace("\r\n", "\n")

    @property
    def lines(self) -> List[str]:
        """The whole lines that it has shown until now."""
        return self.text.split("\n")[:-1]

    def line(self, part: str) -> str:
        """The first line that holds ``part``, once it is there."""
        found: List[str] = []

        def is_there() -> bool:
            text = self._data.decode("utf-8", "replace").replace("\r\n", "\n")
            found[:] = [line for line in text.split("\n")[:-1] if part in line]
            return bool(found) or self._has_ended

        with self._changed:
            assert self._changed.wait_for(is_there, GUARD), f"{part!r} did not come: {self._data!r}"
        assert found, f"{part!r} did not come before the end: {self.text}"
        return found[0]

    def interrupt(self) -> None:
        """Send what Ctrl-C sends."""
        os.killpg(self.popen.pid, signal.SIGINT)

    def enter(self, line: str) -> None:
        """Type a line, which the terminal shows."""
        os.write(self._master, line.encode() + b"\n")

    def press_ctrl_c(self) -> None:
        """Press Ctrl-C, which the terminal shows as ``^C``."""
        os.write(self._master, b"\x03")

    def end(self) -> int:
        """Wait for its end, and return the exit code. Its text is complete then."""
        code = self.popen.wait(GUARD)
        self._thread.join(GUARD)
        return code

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait(GUARD)
        self._thread.join(GUARD)
        os.close(self._master)
