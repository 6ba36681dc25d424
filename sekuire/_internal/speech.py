"""Print the library's lines on stderr where the program has not set up logging, and a person may read them.

The lines are records of the ``sekuire`` loggers. Each time it is decided who gets one (:func:`audience`): the handlers
that the program has added, or, if there are none, the reader of stderr. This module adds no handler, so a later
``logging.basicConfig()`` finds the loggers as Python made them.
"""

# Threads: any thread may print. A line is one call of write(). The fields of `speech` are replaced whole.

from __future__ import annotations

import logging
import sys
from typing import Any, Optional

#: Who gets a line.
NOBODY, HANDLERS, PERSON = range(3)

_FORMAT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"


class Speech:
    """Say for this process if lines are printed, and how."""

    __slots__ = ("formatter", "is_quiet", "is_worker", "last_error")

    def __init__(self) -> None:
        #: ``quiet`` was asked for: only warnings and errors come, as Python's ``logging.lastResort`` prints them.
        self.is_quiet = False
        #: This process is ``sekuire worker``, or the same of a web framework: it prints also where no terminal is.
        self.is_worker = False
        #: The text of the error that has ended a worker and was printed: a command does not print it again.
        self.last_error: Optional[str] = None
        #: Makes the text of a record; None for the message alone on a terminal, and with time and level elsewhere.
        self.formatter: Optional[logging.Formatter] = None


speech = Speech()
_plain = logging.Formatter("%(message)s")
_dated = logging.Formatter(_FORMAT)


def audience(logger: logging.Logger, level: int) -> int:
    """Return who gets a line of ``level``: NOBODY, HANDLERS or PERSON. It is cheap where nobody listens."""
    if logger.hasHandlers():
        return HANDLERS if logger.isEnabledFor(level) else NOBODY
    if logging.root.handlers or speech.is_quiet or not (speech.is_worker or is_terminal()):
        return NOBODY
    return PERSON if _is_wanted(logger, level) else NOBODY


def print_record(logger: logging.Logger, record: logging.LogRecord) -> None:
    """Print a record on stderr, unless a filter of the logger refuses it. A stderr that fails is ignored."""
    # From Python 3.12 on a filter may return another record.
    found: Any = logger.filter(record)
    if not found:
        return
    text = _text_of(found if isinstance(found, logging.LogRecord) else record)
    try:
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
    except (OSError, ValueError, AttributeError):
        return


def _text_of(record: logging.LogRecord) -> str:
    if speech.formatter is not None:
        return speech.formatter.format(record)
    # One line: what a platform or a handler says must not steer the terminal, or forge a line.
    record.msg, record.args = _one_line(record.getMessage()), None
    return (_plain if is_terminal() else _dated).format(record)


def _one_line(text: str) -> str:
    return text if text.isprintable() else "".join(c if c.isprintable() else " " for c in text).strip()


def is_terminal() -> bool:
    """Return True if stderr is a terminal now. It may be another stream at each call."""
    try:
        return sys.stderr.isatty()
    except (OSError, ValueError, AttributeError):
        return False


def _is_wanted(logger: logging.Logger, level: int) -> bool:
    """Return True unless the program has silenced the logger. The root logger's level is Python's own, as a rule."""
    if logger.disabled or logger.manager.disable >= level:
        return False
    one: Optional[logging.Logger] = logger
    while one is not None and one is not logging.root:
        if one.level:
            return level >= one.level
        one = one.parent
    return level >= logging.INFO
