"""Several terminals of 80 columns in one directory, and what a person types and sees in them."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import socket
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Dict, Iterable, List, Optional, Tuple, Type

from .terminal import Terminal

#: What differs from run to run, and what stands for it. Nothing else of a transcript is touched.
PLACEHOLDERS: Tuple[Tuple[str, str], ...] = (
    (r"\b(inst|task|pol)_[0-9a-f]{8,}", r"\1_…"),
    (r"\bskt_[\w-]{20,}", "skt_…"),
    (r"\bsk_live_[\w-]{20,}", "sk_live_…"),
    (r"\bcode=[\w-]{20,}", "code=…"),
    (r"(PUBLIC_KEYS=)[0-9a-f]{64}\b", r"\1c11c…"),
    # What notices the end of the connection first.
    (r"(lost the connection to \S+) \([^)]*\)", r"\1 (…)"),
    # Which of a worker's requests is refused first.
    (r"\ba request \(\w+\) was refused", "a request (…) was refused"),
    # The id of a request for approval, in full and shortened.
    (r"\b[0-9a-f]{12}(?:[0-9a-f]{52})?\b", "3f2a91c4ab12"),
    (r"\bexpires in 1[78]\d\d s\b", "expires in 1800 s"),
    (r"\bexpires in (?:2\d\d|300) s\b", "expires in 300 s"),
    (r"\b\d+ ms\b", "34 ms"),
    (r"\bafter \d+\.\d s\b", "after 4.2 s"),
    # Python 3.9 and 3.10 print no marks below a line of a traceback, and later versions print different ones.
    (r"(?m)^ *[~^]+\n", ""),
)
_PORTS = range(9310, 10000)
#: The port of a transcript, which a test must share with others.
PORT, WRONG_PORT = 9300, 9301


class Stage:
    """Type commands into named terminals, all in one empty directory, and show what each of them has shown. ::

    with Stage() as stage:
        platform = stage.type("platform", "sekuire dev")
        platform.line("the local platform runs")
        stage.transcript("platform")  # "$ sekuire dev\\n…"
    """

    def __init__(self) -> None:
        self.directory = Path(os.path.realpath(tempfile.mkdtemp(prefix="sekuire-stage-")))
        self.port, self.wrong_port = free_ports(2)
        #: The terminal's name, the line and, unless it is an ``export``, what it has started.
        self._typed: List[Tuple[str, str, Optional[Terminal]]] = []
        self._exported: Dict[str, Dict[str, str]] = {}

    def __enter__(self) -> Stage:
        return self

    def __exit__(
        self, kind: Optional[Type[BaseException]], error: Optional[BaseException], tb: Optional[TracebackType]
    ) -> None:
        for _, _, terminal in reversed(self._typed):
            if terminal is not None:
                terminal.close()
        shutil.rmtree(self.directory, ignore_errors=True)

    def write(self, name: str, text: str) -> None:
        (self.directory / name).write_text(text, encoding="utf-8")

    def export(self, where: str, lines: Iterable[str]) -> None:
        """Type lines such as ``export NAME=value`` into the terminal ``where``. They hold for its later commands."""
        for line in lines:
            name, _, value = line[len("export ") :].partition("=")
            self._exported.setdefault(where, {})[name] = shlex.split(self._here(value))[0]
            self._typed.append((where, line, None))

    def type(self, where: str, command: str) -> Terminal:
        """Run a command of the shell in the terminal ``where``.

        For 9300 and 9301 in it, this stage has ports of its own. A platform listens on the first, nobody on the second.
        """
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        own = self._here(command)
        if own == "sekuire dev" or own.startswith("sekuire dev "):
            own = f"sekuire dev --port {self.port}{own[len('sekuire dev') :]}"
        terminal = Terminal(["-c", own], self.directory, {"PATH": path, **self._exported.get(where, {})}, ["/bin/sh"])
        self._typed.append((where, command, terminal))
        return terminal

    def _here(self, text: str) -> str:
        return text.replace(str(PORT), str(self.port)).replace(str(WRONG_PORT), str(self.wrong_port))

    def transcript(self, where: str) -> str:
        """Return what was typed into a terminal and what it showed, with placeholders for what differs."""
        parts = [
            f"$ {line}\n{'' if terminal is None else terminal.text}"
            for name, line, terminal in self._typed
            if name == where
        ]
        text = "\n".join(part.rstrip("\n") for part in parts) + "\n"
        text = text.replace(f"{self.directory}{os.sep}", "…/")
        text = text.replace(str(self.port), str(PORT)).replace(str(self.wrong_port), str(WRONG_PORT))
        for pattern, placeholder in PLACEHOLDERS:
            text = re.sub(pattern, placeholder, text)
        return text

    @property
    def terminals(self) -> List[str]:
        return list(dict.fromkeys(where for where, _, _ in self._typed))


def free_ports(count: int) -> List[int]:
    """Return ports with as many digits as 9300, on which nobody listens."""
    found: List[int] = []
    # Not those that a test beside this one finds at the same moment.
    first = os.getpid() * 37 % len(_PORTS)
    for port in (*_PORTS[first:], *_PORTS[:first]):
        with contextlib.closing(socket.socket()) as one, contextlib.suppress(OSError):
            one.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            return found
    raise AssertionError(f"no {count} free ports")
