"""A soak run: ``python -m tests.soak --seconds 300`` or ``python -m tests.soak --tasks 1000000``."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from typing import List, Optional

from .run import Plan, run


def main(arguments: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.soak",
        description="A worker under load, and what it holds at the end. Exit code 1: something grew or was left.",
    )
    parser.add_argument("--seconds", type=float, default=300.0, metavar="S", help="how long (default: %(default)s)")
    parser.add_argument(
        "--tasks", type=int, default=0, metavar="N", help="so many tasks of one shape instead, on a fast platform"
    )
    parser.add_argument("--trouble", type=float, default=1.0, metavar="S", help="mean time between troubles (0: none)")
    parser.add_argument("--max-workers", type=int, default=8, metavar="N", help="handler threads")
    parser.add_argument("--no-outbox", action="store_true", help="without the outbox")
    parser.add_argument("--seed", type=int, default=1, help="of the load and the trouble (default: %(default)s)")
    options = parser.parse_args(arguments)
    plan = Plan(
        seconds=options.seconds,
        tasks=options.tasks,
        seed=options.seed,
        max_workers=options.max_workers,
        trouble=options.trouble,
        quick=bool(options.tasks),
        outbox=not options.no_outbox,
        sample_every=max(5.0, options.seconds / 15),
    )
    # As an interrupt does: the processes are ended on the way out.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="sekuire-soak-") as directory:
        try:
            figures = run(plan, directory, say=lambda text: print(text, file=sys.stderr, flush=True))
        except KeyboardInterrupt:
            return 130
    print("\n".join(figures.lines()))
    return 1 if figures.problems else 0


if __name__ == "__main__":
    sys.exit(main())
