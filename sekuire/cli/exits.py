"""Report errors to the user, and turn them into exit codes."""

from __future__ import annotations

import logging
import sys
from typing import Tuple

from .._internal.speech import speech
from ..service.exit_codes import FAILED as FAILED
from ..service.exit_codes import INTERRUPTED as INTERRUPTED
from ..service.exit_codes import OK as OK
from ..service.exit_codes import USAGE as USAGE
from ..service.exit_codes import code_of
from ..wire.protocol import one_line


class CommandError(Exception):
    """End a command with ``code``. Each of ``lines`` is a sentence for the user."""

    def __init__(self, *lines: str, code: int = USAGE) -> None:
        super().__init__(*lines)
        self.lines: Tuple[str, ...] = lines
        self.code = code


class Lines:
    """Say in which form a command's own lines go to stderr: as they are, or as JSON (``--log-format json``)."""

    def __init__(self) -> None:
        self.is_json = False

    def made(self, level: int, text: str, traceback: str = "") -> str:
        """Return ``text`` as one line of this form, with its end. As they are, a traceback stands in its place."""
        if self.is_json:
            from ..logging import json_line

            return json_line(level, "sekuire.cli", text, traceback) + "\n"
        return traceback or text + "\n"


#: The form of this process's lines. ``terminal.logs()`` sets it.
lines_of_process = Lines()


def complain(command: str, *lines: str) -> None:
    """Write an error to stderr, with control characters as spaces. Ignore a stderr that cannot be written."""
    name = "sekuire " + command if command else "sekuire"
    text = "".join(lines_of_process.made(logging.ERROR, f"{name}: error: {one_line(line)}") for line in lines)
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
    if str(error) != speech.last_error:
        complain(command, str(error))
    return code_of(error)
