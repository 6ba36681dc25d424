"""What a person sees: text cut to the terminal, colours, a progress bar, and log lines that do not break it."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import sys
import threading
import time
import unicodedata
from typing import Any, Iterator, Optional, TextIO

from .exits import FAILED, CommandError

#: Columns assumed where the output is no terminal.
_PIPE_WIDTH = 100
_REDRAW = 0.05
_LOG_FORMAT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"

#: Held while anything is written to stderr; log lines come from any thread.
_lock = threading.RLock()
_bar: Optional[Progress] = None


class OutputClosed(Exception):
    """Nobody reads stdout any more (``| head``)."""


# -- stdout: results --------------------------------------------------------------------------------------------------


def prepare() -> None:
    """Have characters that the terminal's encoding lacks replaced, not refused."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            with contextlib.suppress(OSError, ValueError):
                reconfigure(errors="replace")


def say(text: str = "") -> None:
    """Write a line to stdout at once.

    :raises OutputClosed: its reader is gone.
    :raises CommandError: it cannot be written (disk full).
    """
    out = sys.stdout
    if out is None:
        return
    try:
        out.write(text + "\n")
        out.flush()
    except OSError as error:
        problem = error
    else:
        return
    # Windows says EINVAL for a pipe without a reader.
    if isinstance(problem, BrokenPipeError) or (os.name == "nt" and problem.errno == errno.EINVAL):
        raise OutputClosed
    raise CommandError(f"cannot write the output: {problem.strerror}", code=FAILED)


def flush_output() -> None:
    """Flush stdout and stderr; one that cannot be is given up quietly, or the interpreter's own flush would fail."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            _discard(stream)


def _discard(stream: Optional[TextIO]) -> None:
    if stream is None:
        return
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


# -- text -------------------------------------------------------------------------------------------------------------


def clean(text: str) -> str:
    """``text`` as one line without control characters: a file's content must not steer the terminal."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def width(text: str) -> int:
    """Columns that ``text`` takes."""
    return sum(_columns(character) for character in text)


def _columns(character: str) -> int:
    if unicodedata.combining(character) or unicodedata.category(character) in ("Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in ("W", "F") else 1


def fit(text: str, columns: int) -> str:
    """``text``, cut with an ellipsis where it takes more than ``columns``."""
    if width(text) <= columns:
        return text
    end = ellipsis()
    room = columns - len(end)
    if room < 0:
        return end[:columns]
    kept = []
    for character in text:
        room -= _columns(character)
        if room < 0:
            break
        kept.append(character)
    return "".join(kept).rstrip() + end


def pad(text: str, columns: int, right: bool = False) -> str:
    """``text`` cut or filled to exactly ``columns``; ``right`` aligns it there."""
    text = fit(text, columns)
    space = " " * (columns - width(text))
    return space + text if right else text + space


def ellipsis() -> str:
    """Three dots, as one character where stdout can show it."""
    return "\N{HORIZONTAL ELLIPSIS}" if _can_show(sys.stdout, "\N{HORIZONTAL ELLIPSIS}") else "..."


def _can_show(stream: Optional[TextIO], text: str) -> bool:
    try:
        text.encode(getattr(stream, "encoding", None) or "ascii")
    except (UnicodeError, LookupError):
        return False
    return True


def columns() -> int:
    """The width for tables on stdout: ``COLUMNS``, the terminal's, or that of a wide page."""
    return max(1, shutil.get_terminal_size((_PIPE_WIDTH, 24)).columns)


def is_terminal(stream: Optional[TextIO]) -> bool:
    """Whether ``stream`` is a terminal that can do more than append."""
    if stream is None or os.environ.get("TERM") == "dumb" or (os.name == "posix" and not os.environ.get("TERM")):
        return False
    try:
        return stream.isatty()
    except ValueError:
        return False


_COLOURS = {"red": "31", "green": "32", "yellow": "33", "bold": "1"}


def paint(text: str, colour: str) -> str:
    """``text`` in a colour, where stdout shows colours and ``NO_COLOR`` is not set."""
    is_wanted = not os.environ.get("NO_COLOR") and (os.name == "posix" or "WT_SESSION" in os.environ)
    if not is_wanted or not is_terminal(sys.stdout):
        return text
    return f"\x1b[{_COLOURS[colour]}m{text}\x1b[0m"


# -- stderr: progress and logs ----------------------------------------------------------------------------------------


def note(text: str) -> None:
    """Write a line to stderr; where that fails, do without."""
    with _lock:
        _clear()
        _to_stderr(text + "\n")
        _draw()


class Progress:
    """How far ``total`` things are, on stderr: a bar on a terminal, else a line at each quarter. A context manager.

    One thread updates it; lines from others (logs) go above it.
    """

    def __init__(self, label: str, total: int) -> None:
        self._label = label
        self._total = total
        self._done = 0
        self._is_bar = is_terminal(sys.stderr)
        self._drawn = 0
        self._drawn_at = 0.0
        self._quarter = -1

    def __enter__(self) -> Progress:
        global _bar
        with _lock:
            if self._is_bar:
                _bar = self
            self._show()
        return self

    def __exit__(self, *exception: object) -> None:
        global _bar
        with _lock:
            if self._is_bar:
                self.draw()
                _to_stderr("\n")
                self._drawn = 0
                _bar = None

    def update(self, done: int) -> None:
        """``done`` of them are ready; it never goes back."""
        done = min(done, self._total)
        if done <= self._done:
            return
        self._done = done
        with _lock:
            self._show()

    def _show(self) -> None:
        if self._is_bar:
            if self._done == self._total or time.monotonic() - self._drawn_at >= _REDRAW:
                self.draw()
            return
        quarter = 4 * self._done // self._total
        if quarter > self._quarter:
            self._quarter = quarter
            _to_stderr(f"{self._label}: {self._done} of {self._total} ({100 * self._done // self._total} %)\n")

    def draw(self) -> None:
        """Write the bar anew. Needs the lock."""
        line = self._line(_stderr_width() - 1)
        self.clear()
        _to_stderr(line)
        self._drawn = len(line)
        self._drawn_at = time.monotonic()

    def clear(self) -> None:
        """Take the bar off the line. Needs the lock."""
        if self._drawn:
            room = min(self._drawn, _stderr_width() - 1)
            _to_stderr("\r" + " " * room + "\r")
            self._drawn = 0

    def _line(self, room: int) -> str:
        count = f"{self._done}/{self._total}"
        length = min(40, room - len(self._label) - len(count) - 4)
        if length < 5:
            return count if len(count) <= room else ""
        filled = length * self._done // self._total
        full, empty = ("\u2588", "\u2591") if _can_show(sys.stderr, "\u2588\u2591") else ("#", ".")
        return f"{self._label} {full * filled}{empty * (length - filled)} {count}"


def _stderr_width() -> int:
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    except (OSError, ValueError, AttributeError):
        return 80


def _clear() -> None:
    if _bar is not None:
        _bar.clear()


def _draw() -> None:
    if _bar is not None:
        _bar.draw()


def _to_stderr(text: str) -> None:
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stderr.write(text)
        sys.stderr.flush()


class _LogHandler(logging.StreamHandler):  # type: ignore[type-arg]  # It is generic in the stubs only.
    """Log lines on stderr, above the bar."""

    def emit(self, record: logging.LogRecord) -> None:
        with _lock:
            _clear()
            super().emit(record)
            _draw()

    def handleError(self, record: logging.LogRecord) -> None:
        """A closed stderr is no reason for a traceback on it; a log call with wrong arguments is."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


@contextlib.contextmanager
def logs(level: str) -> Iterator[None]:
    """Send the log of this process to stderr from ``level`` on; undone at the end."""
    root = logging.getLogger()
    handler: Any = _LogHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(_LOG_FORMAT))
    before = root.level
    root.addHandler(handler)
    root.setLevel(level)
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(before)
