"""Report errors to the user, and turn them into exit codes."""

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
    """Raised to end a command with ``code``. Each of ``lines`` is a sentence for the user."""

    def __init__(self, *lines: str, code: int = USAGE) -> None:
        super().__init__(*lines)
        self.lines: Tuple[str, ...] = lines
        self.code = code


def complain(command: str, *lines: str) -> None:
    """Write an error to stderr, with control characters as spaces. Ignore a stderr that cannot be written."""
    text = "".join(f"sekuire {command}: error: {one_line(line)}\n" for line in lines)
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except (OSError, ValueError, AttributeError):
        # The exit code still reports the failure.
        pass


def report(command: str, error: Exception) -> int:
    """Report ``error`` to the user and return its exit code."""
    if isinstance(error, CommandError):
        complain(command, *error.lines)
        return error.code
    complain(command, str(error))
    return code_of(error)
