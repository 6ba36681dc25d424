"""Write what a person sees: results, tables, colours, a progress bar, and log lines above the bar."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import sys
import threading
import time
from typing import Any, Iterator, List, Optional, Sequence, TextIO

from .exits import FAILED, CommandError

_REDRAW = 0.05
#: What the bar is made of.
_FULL, _EMPTY = "\u2588", "\u2591"
_LOG_FORMAT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"

#: Held while anything is written to stderr; log lines come from any thread.
_lock = threading.RLock()
_bar: Optional[Progress] = None


class OutputClosed(Exception):
    """Raised when nobody reads stdout any more (``| head``)."""


# -- stdout: results --------------------------------------------------------------------------------------------------


def prepare() -> None:
    """Replace characters that the terminal's encoding lacks, instead of failing on them."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            with contextlib.suppress(OSError, ValueError):
                reconfigure(errors="replace")


def say(text: str = "") -> None:
    """Write a line to stdout and flush it.

    :raises OutputClosed: nobody reads stdout any more.
    :raises CommandError: the line cannot be written, for example because the disk is full.
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
    # Windows reports EINVAL for a pipe without a reader.
    if isinstance(problem, BrokenPipeError) or (os.name == "nt" and problem.errno == errno.EINVAL):
        raise OutputClosed
    raise CommandError(f"cannot write the output: {problem.strerror}", code=FAILED)


def flush_output() -> None:
    """Flush stdout and stderr. Discard one that cannot be flushed, or the interpreter's own flush would fail."""
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
    """Return ``text`` as one line without control characters: a file's content must not steer the terminal."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def columns() -> int:
    """Return the width for a table: ``COLUMNS``, or that of the terminal on stdout."""
    return max(1, shutil.get_terminal_size().columns)


def draws_tables() -> bool:
    """Return True if stdout is a terminal and ``rich`` (extra ``cli``) is installed to draw on it."""
    if not is_terminal(sys.stdout):
        return False
    try:
        import rich  # noqa: F401
    except ImportError:
        return False
    return True


def plain_table(rows: Sequence[Sequence[str]]) -> List[str]:
    """Return the rows as lines, their columns aligned with spaces and no text cut."""
    sizes = [max(map(len, cells)) for cells in zip(*rows)]
    return ["  ".join(map(str.ljust, row, sizes)).rstrip() for row in rows]


def drawn_table(rows: Sequence[Sequence[str]], colours: Sequence[str], columns: int) -> List[str]:
    """Return the rows as lines of at most ``columns``. The last column is cut to fit; ``colours`` has one for each row.

    Imports ``rich``, which knows how wide each character is.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2, 0, 0))
    for _ in rows[0][:-1]:
        grid.add_column(no_wrap=True, overflow="ellipsis")
    for row, colour in zip(rows, colours):
        # The last column alone may shrink, so it is not declared as one that must not wrap.
        grid.add_row(*map(Text, row[:-1]), Text(row[-1], colour, no_wrap=True, overflow="ellipsis"))
    console = Console(
        width=columns, color_system="standard" if _shows_colours() else None, force_terminal=True, legacy_windows=False
    )
    with console.capture() as drawn:
        console.print(grid)
    return drawn.get().splitlines()


def is_terminal(stream: Optional[TextIO]) -> bool:
    """Return True if ``stream`` is a terminal that can do more than append."""
    if stream is None or os.environ.get("TERM") == "dumb" or (os.name == "posix" and not os.environ.get("TERM")):
        return False
    try:
        return stream.isatty()
    except ValueError:
        return False


_COLOURS = {"red": "31", "green": "32", "yellow": "33"}


def paint(text: str, colour: str) -> str:
    """Return ``text`` in a colour if stdout shows colours and ``NO_COLOR`` is not set."""
    return f"\x1b[{_COLOURS[colour]}m{text}\x1b[0m" if _shows_colours() else text


def _shows_colours() -> bool:
    is_wanted = not os.environ.get("NO_COLOR") and (os.name == "posix" or "WT_SESSION" in os.environ)
    return is_wanted and is_terminal(sys.stdout)


# -- stderr: progress and logs ----------------------------------------------------------------------------------------


def note(text: str) -> None:
    """Write a line to stderr. Ignore a stderr that cannot be written."""
    with _lock:
        _clear()
        _to_stderr(text + "\n")
        _draw()


def _can_show(stream: Optional[TextIO], text: str) -> bool:
    try:
        text.encode(getattr(stream, "encoding", None) or "ascii")
    except (UnicodeError, LookupError):
        return False
    return True


class Progress:
    """Show on stderr how many of ``total`` things are done: a bar on a terminal, else a line at each quarter.

    Use it as a context manager. One thread updates it; log lines of other threads appear above the bar. ``rich``'s bar
    does not replace it: that one moves the cursor with escape sequences where ``NO_COLOR`` is set, too.
    """

    def __init__(self, label: str, total: int) -> None:
        self._label = label
        self._total = total
        self._done = 0
        self._is_bar = is_terminal(sys.stderr) and _can_show(sys.stderr, _FULL + _EMPTY)
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
        """Show that ``done`` things are done. A smaller number than before is ignored."""
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
        """Redraw the bar. Needs the lock."""
        line = self._line(_stderr_width() - 1)
        self.clear()
        _to_stderr(line)
        self._drawn = len(line)
        self._drawn_at = time.monotonic()

    def clear(self) -> None:
        """Erase the bar. Needs the lock."""
        if self._drawn:
            _to_stderr("\r" + " " * min(self._drawn, _stderr_width() - 1) + "\r")
            self._drawn = 0

    def _line(self, width: int) -> str:
        count = f"{self._done}/{self._total}"
        length = min(40, width - len(self._label) - len(count) - 4)
        if length < 5:
            return count if len(count) <= width else ""
        filled = length * self._done // self._total
        bar = _FULL * filled + _EMPTY * (length - filled)
        return f"{self._label} {bar} {count}"


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
    """Write log lines to stderr, above the bar."""

    def emit(self, record: logging.LogRecord) -> None:
        with _lock:
            _clear()
            super().emit(record)
            _draw()

    def handleError(self, record: logging.LogRecord) -> None:
        """Ignore a closed stderr. Print the traceback of a log call with wrong arguments, as usual."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


@contextlib.contextmanager
def logs(level: str) -> Iterator[None]:
    """Send this process's log to stderr from ``level`` up, until the context ends."""
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
