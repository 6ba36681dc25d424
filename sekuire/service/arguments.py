"""Declare the arguments that every command line for a worker has, for argparse."""

from __future__ import annotations

import argparse
import math
from typing import Tuple

from ..config import health_address

#: The refusal of two options together, by every command that has them.
IDLE_WITH_RELOAD = "--stop-when-idle does not go with --reload, which waits for the next save"


def add_worker_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of a worker: its threads, when it ends, its liveness file, and its reload."""
    parser.add_argument("--max-workers", type=count, metavar="N", help="handlers that run at once")
    parser.add_argument(
        "--stop-when-idle",
        type=seconds,
        metavar="S",
        help="end after so many seconds without a task, with exit code 0; for a drain that a scheduler starts",
    )
    parser.add_argument(
        "--http",
        type=address,
        metavar="[HOST:]PORT",
        help="show health and metrics here: /livez, /readyz, /metrics, /status; PORT alone is for this machine only "
        "(default: SEKUIRE_WORKER_HTTP)",
    )
    parser.add_argument(
        "--liveness-file",
        metavar="PATH",
        help="touch this file every 5 s while the worker is alive, and remove it at the end; for a probe",
    )
    parser.add_argument(
        "--reload",
        action="store_true",
        help="for development: restart it whenever a Python file is saved, after it has drained",
    )


def address(text: str) -> Tuple[str, int]:
    """Return the host and the port of ``[HOST:]PORT``.

    :raises argparse.ArgumentTypeError: ``text`` has another form.
    """
    found = health_address(text)
    if found is None:
        raise argparse.ArgumentTypeError(f"must be PORT or HOST:PORT, such as 8080 or 0.0.0.0:8080, got {text!r}")
    return found


def count(text: str) -> int:
    """Return a whole number from 1 to 10,000.

    :raises argparse.ArgumentTypeError: ``text`` is not such a number.
    """
    if not text.isascii() or not text.isdigit() or not 1 <= int(text[:9]) <= 10_000:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 to 10000, got {text!r}")
    return int(text)


def seconds(text: str) -> float:
    """Return a number of seconds above 0.

    :raises argparse.ArgumentTypeError: ``text`` is not such a number.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of seconds above 0, got {text!r}")
    return value
