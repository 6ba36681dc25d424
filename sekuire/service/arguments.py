"""Arguments that every command line for a worker has, for argparse."""

from __future__ import annotations

import argparse
import math


def add_worker_arguments(parser: argparse.ArgumentParser) -> None:
    """How much at once, when to end, and what to tell a probe."""
    parser.add_argument("--max-workers", type=count, metavar="N", help="handlers that run at once")
    parser.add_argument(
        "--stop-when-idle",
        type=seconds,
        metavar="S",
        help="end after so many seconds without a task, with exit code 0; for a drain that a scheduler starts",
    )
    parser.add_argument(
        "--liveness-file",
        metavar="PATH",
        help="touch this file every 5 s while the worker is alive, and remove it at the end; for a probe",
    )
    parser.add_argument(
        "--reload",
        action="store_true",
        help="for development: run it anew whenever a Python file is saved, after the run before has drained",
    )


def count(text: str) -> int:
    """A whole number of workers.

    :raises argparse.ArgumentTypeError: it is none, below 1 or above 10,000.
    """
    if not text.isascii() or not text.isdigit() or not 1 <= int(text[:9]) <= 10_000:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 to 10000, got {text!r}")
    return int(text)


def seconds(text: str) -> float:
    """A time above 0.

    :raises argparse.ArgumentTypeError: it is none.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of seconds above 0, got {text!r}")
    return value
