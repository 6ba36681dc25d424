"""The long runs: ``python -m tests.chaos --tasks 100000 --faults 0.05 --kill-every 5 --seed 1`` and ``--submits N``."""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
from typing import List, Optional, Union

from .scenario import KINDS, Figures, Plan, run
from .submits import SubmitFigures, SubmitPlan, run_submits


def main(arguments: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description="Worker and platform under faults.")
    parser.add_argument("--tasks", type=int, default=100_000, help="tasks to submit (default: %(default)s)")
    parser.add_argument(
        "--submits",
        type=int,
        metavar="N",
        help="have one client submit N tasks instead, without a worker: each must become exactly one task",
    )
    parser.add_argument("--faults", type=float, default=0.05, help="share of faulty calls (default: %(default)s)")
    parser.add_argument(
        "--kill-every",
        type=float,
        default=5.0,
        metavar="S",
        help="seconds between kills (0: none; default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=None, help="repeat this scenario (default: a new one)")
    parser.add_argument(
        "--limit", type=float, default=600.0, metavar="S", help="seconds for the whole run (default: %(default)s)"
    )
    parser.add_argument(
        "--max-workers", type=int, default=8, metavar="N", help="handler threads (default: %(default)s)"
    )
    parser.add_argument("--no-outbox", action="store_true", help="without the outbox")
    parser.add_argument(
        "--kinds",
        nargs="*",
        default=list(KINDS),
        choices=list(KINDS),
        metavar="KIND",
        help=f"what there is besides faulty calls and kills: {', '.join(KINDS)} (default: all)",
    )
    parser.add_argument("--without", nargs="*", default=[], metavar="FAULT", help="kinds of faults to leave out")
    parser.add_argument("--keep", action="store_true", help="keep the database and the logs")
    options = parser.parse_args(arguments)
    seed = random.SystemRandom().randrange(10**6) if options.seed is None else options.seed
    # As an interrupt does: the processes are ended on the way out.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    directory = tempfile.mkdtemp(prefix="sekuire-chaos-")
    keep = options.keep
    try:
        figures = figures_of(options, seed, directory)
        print("\n".join(figures.lines()))
        if figures.violations:
            keep = True
            with open(os.path.join(directory, "violations.txt"), "w", encoding="utf-8") as file:
                file.write("\n".join(figures.violations))
            print(f"repeat it with: {repetition(options, seed)}")
        return 1 if figures.violations else 0
    except KeyboardInterrupt:
        return 130
    finally:
        if keep:
            print(f"kept: {directory}")
        else:
            shutil.rmtree(directory, ignore_errors=True)


def figures_of(options: argparse.Namespace, seed: int, directory: str) -> Union[Figures, SubmitFigures]:
    """Return what the run that was asked for has found."""

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    if options.submits is not None:
        return run_submits(SubmitPlan(seed, options.submits, options.faults, options.kill_every), directory, say=say)
    # A part of the time is for the end: what was submitted must come to its completion.
    settle = min(120.0, options.limit / 4)
    plan = Plan(
        seed=seed,
        tasks=options.tasks,
        faults=options.faults,
        kill_every=options.kill_every,
        limit=options.limit - settle,
        settle=settle,
        outbox=False if options.no_outbox else None,
        max_workers=options.max_workers,
        without=tuple(options.without),
        kinds=tuple(options.kinds),
    )
    return run(plan, directory, say=say)


def repetition(options: argparse.Namespace, seed: int) -> str:
    """The command that repeats a run."""
    if options.submits is not None:
        return (
            f"python -m tests.chaos --submits {options.submits} --faults {options.faults:g}"
            f" --kill-every {options.kill_every:g} --seed {seed}"
        )
    words = ["python -m tests.chaos", f"--tasks {options.tasks}", f"--faults {options.faults:g}"]
    words += [f"--kill-every {options.kill_every:g}", f"--limit {options.limit:g}"]
    words += [f"--max-workers {options.max_workers}", f"--seed {seed}"]
    words += ["--no-outbox"] if options.no_outbox else []
    words += ["--kinds", *options.kinds] if set(options.kinds) != set(KINDS) else []
    words += ["--without", *options.without] if options.without else []
    return " ".join(words)


if __name__ == "__main__":
    sys.exit(main())
