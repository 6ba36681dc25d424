"""Describe tasks and installations in tables and lines for a person."""

from __future__ import annotations

import datetime as dt
import json
import sys
from typing import Any, List, Mapping, Optional, Sequence

from ..wire.protocol import parse_time
from . import terminal

__all__ = ["COLOURS", "ago", "as_json", "duration", "error_of", "fit", "print_table", "state_of", "text_of"]

#: The colour of each state of a task or an installation.
COLOURS = {"completed": "green", "running": "green", "failed": "red", "revoked": "red", "paused": "yellow"}
#: Units of time, from the longest, and from how many seconds on each is used.
_UNITS = (("day", 2 * 86400, 86400), ("h", 2 * 3600, 3600), ("min", 2 * 60, 60), ("s", 0, 1))


def as_json(value: Any, *, indent: Optional[int] = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def text_of(value: Any, default: str = "-") -> str:
    """Return what the platform says as one line that cannot steer the terminal."""
    return terminal.clean(value) or default if isinstance(value, str) else default


def duration(seconds: float) -> str:
    """Return a length of time in one unit: ``"90 s"``, ``"5 min"``, ``"3 h"``, ``"4 days"``."""
    for unit, least, size in _UNITS:
        if seconds >= least:
            count = round(seconds / size)
            return f"{count} {unit}{'s' if unit == 'day' else ''}"
    return "0 s"


def ago(value: Any, now: Optional[dt.datetime] = None) -> str:
    """Return how long ago an instant of the platform was, or in how much time it will be."""
    instant = parse_time(value)
    if instant is None:
        return "-"
    passed = ((now or dt.datetime.now(dt.timezone.utc)) - instant).total_seconds()
    if -1 < passed < 1:
        return "now"
    return f"{duration(passed)} ago" if passed > 0 else f"in {duration(-passed)}"


def state_of(task: Mapping[str, Any]) -> str:
    """Return a task's status, or ``"delayed"`` for one that is queued and may not begin yet."""
    status = text_of(task.get("status"))
    available = parse_time(task.get("available_at"))
    is_later = available is not None and available > dt.datetime.now(dt.timezone.utc)
    return "delayed" if status == "queued" and is_later else status


def error_of(task: Mapping[str, Any]) -> str:
    """Return a failed task's code and message, or nothing."""
    error = task.get("error")
    if not isinstance(error, dict):
        return ""
    code, message = text_of(error.get("code"), "unknown"), text_of(error.get("message"), "")
    return f"{code}: {message}" if message else code


def print_table(heads: Sequence[str], rows: Sequence[Sequence[str]], states: Sequence[str]) -> None:
    """Print rows below their heads. On a terminal each fits its line; elsewhere nothing is cut.

    :param states: of each row, for its colour.
    """
    all_rows: List[Sequence[str]] = [heads, *rows]
    if terminal.draws_tables():
        colours = ["", *(COLOURS.get(state, "") for state in states)]
        lines = terminal.drawn_table(all_rows, colours, terminal.columns())
    else:
        lines = list(map(fit, terminal.plain_table(all_rows)))
    for line in lines:
        terminal.say(line.rstrip())


def fit(line: str) -> str:
    """Return the line, cut to the terminal's width if stdout is a terminal."""
    columns = terminal.columns()
    return line if len(line) <= columns or not terminal.is_terminal(sys.stdout) else line[: columns - 1] + "…"
