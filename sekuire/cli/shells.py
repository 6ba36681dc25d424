"""Write lines that set environment variables, in the language of the shell they are pasted into."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
from typing import Callable, Dict, List, Mapping, Optional, Tuple

__all__ = ["SHELLS", "detect", "lines"]

#: How far up the processes are followed: a shell may have started this one through other programs.
_MOST_ANCESTORS = 8
_PROGRAMS = {
    "fish": "fish",
    "pwsh": "powershell",
    "powershell": "powershell",
    **dict.fromkeys(("sh", "bash", "zsh", "dash", "ksh", "ash"), "sh"),
}


def _sh(name: str, value: str) -> str:
    return f"export {name}={shlex.quote(value)}"


def _fish(name: str, value: str) -> str:
    quoted = re.sub(r"(['\\])", r"\\\1", value)
    return f"set -gx {name} '{quoted}'"


def _powershell(name: str, value: str) -> str:
    # PowerShell takes the typographic quotes for quotes as well.
    quoted = re.sub("(['\u2018\u2019\u201a\u201b])", r"\1\1", value)
    return f"$env:{name} = '{quoted}'"


def _cmd(name: str, value: str) -> str:
    return f'set "{name}={value}"'


_WRITERS: Dict[str, Callable[[str, str], str]] = {"sh": _sh, "fish": _fish, "powershell": _powershell, "cmd": _cmd}
SHELLS = tuple(_WRITERS)


def lines(variables: Mapping[str, str], shell: str) -> List[str]:
    """Return a line for each variable that sets it in ``shell``, one of :data:`SHELLS`."""
    return [_WRITERS[shell](name, value) for name, value in variables.items()]


def detect(environ: Optional[Mapping[str, str]] = None, is_windows: bool = os.name == "nt") -> str:
    """Return the shell that this process was started from, as far as that can be seen."""
    environ = os.environ if environ is None else environ
    if is_windows:
        # PowerShell adds a directory of the user's own; cmd has those of the system only.
        folders = environ.get("PSModulePath", "").split(";")
        return "powershell" if len(folders) >= 3 else "cmd"
    process = os.getppid()
    for _ in range(_MOST_ANCESTORS):
        name, process = _process(process)
        if name in _PROGRAMS:
            return _PROGRAMS[name]
        if process <= 1:
            break
    return _PROGRAMS.get(os.path.basename(environ.get("SHELL", "")), "sh")


def _process(number: int) -> Tuple[str, int]:
    """Return a process's name and the number of its parent. Without /proc: an empty name and 0."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        with open(f"/proc/{number}/stat", encoding="utf-8", errors="replace") as file:
            head, _, rest = file.read().rpartition(")")
        return head.partition("(")[2].lstrip("-"), int(rest.split()[1])
    return "", 0
