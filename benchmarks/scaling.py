"""Tasks a second with 1, 2 and 4 worker processes of one agent: ``python -m benchmarks.scaling``.

The local platform runs in this process, the workers (four threads each) in processes of their own that share an
installation through a credentials file. Each round runs every number of processes in turn.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from contextlib import ExitStack
from typing import Dict, List, Optional, Tuple

from sekuire.local import LocalPlatform

from . import report
from .process import Child, ChildError
from .report import Spread, cells, number, table

AGENT = "agent-scaling"
PROCESSES = (1, 2, 4)
#: What the handlers do, and for how many seconds each.
WORK = {"wait": 0.05, "compute": 0.01}


def _measure(processes: int, tasks: int) -> Dict[str, Tuple[float, float]]:
    """By kind of work: tasks a second, and the share of them that the busiest process did."""
    found = {}
    with ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory())
        platform = stack.enter_context(LocalPlatform())
        os.environ.update(
            SEKUIRE_API_URL=platform.url,
            SEKUIRE_AGENT_ID=AGENT,
            SEKUIRE_INSTALL_TOKEN=platform.create_install_token(AGENT),
            SEKUIRE_CREDENTIALS_FILE=os.path.join(directory, "credentials.json"),
        )
        children = [stack.enter_context(Child("scaled")) for _ in range(processes)]
        for child in children:
            child.receive()
        for kind, seconds in WORK.items():
            before = [child.ask("stats")["completed"] for child in children]
            begun = time.monotonic()
            waiting = [platform.submit(kind, seconds, AGENT) for _ in range(tasks)]
            for task_id in waiting:
                task = platform.wait(task_id, 120.0)
                if task["status"] != "completed":
                    raise ChildError(f"a task ended {task['status']}: {task['error']}")
            took = time.monotonic() - begun
            # A worker counts a task a moment after the platform has its result; nobody waits for that here.
            done = [child.ask("stats")["completed"] - one for child, one in zip(children, before)]
            found[kind] = (tasks / took, max(done) / tasks)
    return found


def main(arguments: Optional[List[str]] = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description="Several processes of an agent.")
    parser.add_argument("--rounds", type=int, default=3, help="how often each number of processes is measured")
    parser.add_argument("--tasks", type=int, default=400, help="tasks for one measurement")
    options = parser.parse_args(arguments)
    rounds: List[Dict[int, Dict[str, Tuple[float, float]]]] = []
    print("  ".join(f"{name} {value}" for name, value in report.facts().items()))
    try:
        for _ in range(max(1, options.rounds)):
            rounds.append({count: _measure(count, max(20, options.tasks)) for count in PROCESSES})
    except ChildError as error:
        print(f"cannot measure: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    rows = []
    for kind, seconds in WORK.items():
        for count in PROCESSES:
            speed = Spread.of([one[count][kind][0] for one in rounds])
            gain = Spread.of([one[count][kind][0] / one[1][kind][0] for one in rounds])
            share = Spread.of([one[count][kind][1] for one in rounds])
            label = f"{kind} {seconds * 1000:.0f} ms, {count} process{'es' if count > 1 else ''} of 4 threads"
            rows.append([label, *cells(speed, number), f"{gain.median:.2f}", f"{share.median:.0%}"])
    print()
    print(table(["work", "tasks a second", "min - max", "÷ 1 process", "busiest did"], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
