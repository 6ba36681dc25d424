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
from typing import Any, ContextManager, Iterator, List, Mapping, Optional, Sequence, TextIO

from .exits import FAILED, CommandError, lines_of_process

_REDRAW = 0.05
#: What the bar is made of.
_FULL, _EMPTY = "\u2588", "\u2591"
_LOG_FORMAT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"

#: Held while anything is written to stderr; log lines come from any thread.
_lock = threading.RLock()
_bar: Optional[Progress] = None


class OutputClosed(Exception):
    """Report that nobody reads stdout any more (``| head``)."""


# -- stdout: results --------------------------------------------------------------------------------------------------


def say(text: str = "") -> None:
    """Write a line to stdout and flush it.

    :raises OutputClosed: nobody reads stdout any more.
    :raises CommandError: the line cannot be written, for example because the disk is full.
    """
    out = sys.stdout
    if out is None:
        return
    try:
        with _lock:
            # A line on the same terminal would begin behind the bar.
            is_below_bar = _bar is not None and is_terminal(out)
            if is_below_bar:
                _clear()
            out.write(text + "\n")
            out.flush()
            if is_below_bar:
                _draw()
    except OSError as error:
        problem = error
    else:
        return
    # Windows reports EINVAL for a pipe without a reader.
    if isinstance(problem, BrokenPipeError) or (os.name == "nt" and problem.errno == errno.EINVAL):
        raise OutputClosed
    raise CommandError(f"cannot write the output: {problem.strerror}", code=FAILED)


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
        _to_stderr(lines_of_process.made(logging.INFO, text))
        _draw()


def _can_show(stream: Optional[TextIO], text: str) -> bool:
    try:
        text.encode(getattr(stream, "encoding", None) or "ascii")
    except (UnicodeError, LookupError):
        return False
    return True


class Progress:
    """Show on stderr how many of ``total`` things are done: a bar on a terminal, else a line at each quarter.

    Where ``total`` is None, because nobody knows it, a terminal shows the number, and nothing else does. With
    ``is_percent`` it shows per cent instead of numbers,
    and at its end it is erased, because what it shows may stop anywhere.

    Use it as a context manager. One thread updates it; log lines of other threads appear above the bar. ``rich``'s bar
    does not replace it: that one moves the cursor with escape sequences where ``NO_COLOR`` is set, too.
    """

    def __init__(self, label: str, total: Optional[int], *, done: int = 0, is_percent: bool = False) -> None:
        self._label = label
        self._total = total
        self._is_percent = is_percent
        self._done = done
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
                if self._is_percent:
                    self.clear()
                else:
                    self.draw()
                    _to_stderr("\n")
                self._drawn = 0
                _bar = None

    def update(self, done: int, label: Optional[str] = None) -> None:
        """Show that ``done`` things are done. A smaller number than before is ignored."""
        if self._total is not None:
            done = min(done, self._total)
        is_news = done > self._done or (label is not None and label != self._label)
        self._done = max(done, self._done)
        self._label = self._label if label is None else label
        if is_news:
            with _lock:
                self._show()

    def _show(self) -> None:
        if self._is_bar:
            if self._done == self._total or time.monotonic() - self._drawn_at >= _REDRAW:
                self.draw()
            return
        if self._total is None:
            return
        quarter = 4 * self._done // self._total
        if quarter > self._quarter:
            self._quarter = quarter
            percent = f"{100 * self._done // self._total} %"
            count = percent if self._is_percent else f"{self._done} of {self._total} ({percent})"
            _to_stderr(lines_of_process.made(logging.INFO, f"{self._label}: {count}"))

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
        if self._total is None:
            return f"{self._label} {self._done}"[:width]
        count = f"{100 * self._done // self._total} %" if self._is_percent else f"{self._done}/{self._total}"
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


#: Packages whose log lines say nothing to the user of a command. ``-vv`` shows them.
_OTHERS = ("urllib3", "sseclient", "watchfiles", "werkzeug", "cheroot", "django.utils")


@contextlib.contextmanager
def logs(level: str, *, others: Optional[str] = None, is_json: bool = False) -> Iterator[None]:
    """Send this process's log to stderr until the context ends: the library's from ``level`` up.

    :param others: the level of all other packages; None for ``level``, but without their debugging.
    :param is_json: write each line as a JSON object, also Python's warnings and the errors that end a thread.
    """
    root = logging.getLogger()
    handler: Any = _LogHandler(sys.stderr)
    handler.setFormatter(_json_formatter() if is_json else logging.Formatter(_LOG_FORMAT))
    least = "INFO" if level == "DEBUG" else level
    all_in_json = _all_in_json() if is_json else contextlib.nullcontext()
    with _levels({"": others or least, "sekuire": level}), _quiet(others is None), all_in_json:
        root.addHandler(handler)
        try:
            yield
        finally:
            root.removeHandler(handler)


@contextlib.contextmanager
def printed_logs(level: Optional[str]) -> Iterator[None]:
    """Have the library's records printed from ``level`` up, until the context ends. Add no handler.

    The user's module may set up logging by itself, which a handler would hinder.
    """
    with _levels({} if level is None else {"sekuire": level}), _quiet(True):
        yield


@contextlib.contextmanager
def _levels(levels: Mapping[str, str]) -> Iterator[None]:
    before = {name: logging.getLogger(name).level for name in levels}
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    try:
        yield
    finally:
        for name, number in before.items():
            logging.getLogger(name).setLevel(number)


def _quiet(is_wanted: bool) -> ContextManager[None]:
    """Return a context in which other packages log errors only, unless the user has given them a level."""
    names = [name for name in _OTHERS if is_wanted and logging.getLogger(name).level == logging.NOTSET]
    return _levels(dict.fromkeys(names, "ERROR"))


def _json_formatter() -> logging.Formatter:
    from ..logging import JsonFormatter

    return JsonFormatter()


@contextlib.contextmanager
def _all_in_json() -> Iterator[None]:
    """Log what Python and the command itself would write to stderr as text."""
    hook = threading.excepthook
    log = logging.getLogger("sekuire.cli")

    def note(args: threading.ExceptHookArgs) -> None:
        if args.exc_value is not None and not isinstance(args.exc_value, SystemExit):
            name = args.thread.name if args.thread is not None else "?"
            details = args.exc_type, args.exc_value, args.exc_traceback
            log.error("an error that nothing caught ended the thread %s", name, exc_info=details)

    threading.excepthook = note
    logging.captureWarnings(True)
    lines_of_process.is_json = True
    try:
        yield
    finally:
        lines_of_process.is_json = False
        logging.captureWarnings(False)
        threading.excepthook = hook
