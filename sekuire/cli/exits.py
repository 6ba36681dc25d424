"""The error that carries an exit code, and how any error is told to the user."""

from __future__ import annotations

import sys
from typing import Tuple

from ..service.exit_codes import FAILED as FAILED
from ..service.exit_codes import INTERRUPTED as INTERRUPTED
from ..service.exit_codes import OK as OK
from ..service.exit_codes import USAGE as USAGE
from ..service.exit_codes import code_of
from ..wire.protocol import one_line


class CommandError(Exception):
    """What a command tells its user before it ends with ``code``: a line or two, each a sentence."""

    def __init__(self, *lines: str, code: int = USAGE) -> None:
        super().__init__(*lines)
        self.lines: Tuple[str, ...] = lines
        self.code = code


def complain(command: str, *lines: str) -> None:
    """Write an error to stderr, whatever state stderr is in; control characters in it are shown as spaces."""
    text = "".join(f"sekuire {command}: error: {one_line(line)}\n" for line in lines)
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except (OSError, ValueError, AttributeError):
        # Nobody is left to hear it; the exit code still tells.
        pass


def report(command: str, error: Exception) -> int:
    """Tell the user of ``error``; the exit code it means."""
    if isinstance(error, CommandError):
        complain(command, *error.lines)
        return error.code
    complain(command, str(error))
    return code_of(error)
