"""What each part around a handler adds to a task: ``python -m benchmarks.parts``.

First the run of a handler and the encoding of its result alone, in a loop. Then whole tasks: every round runs a worker
with each part in turn, one thread, in fresh processes, against the fast platform; what a part adds is the difference to
the plain handler of the same round. Nothing here passes or fails on a time.
"""

from __future__ import annotations

import argparse
import sys
from typing import Dict, List, Optional

from . import report
from .part import PARTS, alone
from .process import Child, ChildError
from .report import Spread, cells, number, table


def _measure(platform: Child, port: int, part: str, tasks: int) -> Dict[str, float]:
    with Child("part", "--port", str(port), "--part", part) as child:
        child.receive()
        platform.ask("feed", tasks=max(20, tasks // 5), timeout=120.0)
        before = child.ask("usage")
        fed = platform.ask("feed", tasks=tasks, timeout=600.0)
        after = child.ask("usage")
    if fed["failed"] or fed["completed"] != tasks:
        raise ChildError(f"{part}: of {tasks} tasks {fed['completed']} were completed and {fed['failed']} failed")
    return {"cpu_us": (after["cpu_ns"] - before["cpu_ns"]) / 1e3 / tasks, "per_second": tasks / fed["seconds"]}


def _show_alone(parts: List[str]) -> None:
    # The least of several loops: what else the machine does can only add to it.
    least = {part: min(alone(part, 0.7)) for part in parts}
    rows = []
    for part, cost in least.items():
        rows.append([PARTS[part][0], number(cost), "" if part == "bare" else f"{cost - least['bare']:+.1f}"])
    print()
    print(table(["handler and result alone", "CPU µs", "added"], rows))


def main(arguments: Optional[List[str]] = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parts", description="What each part adds to a task.")
    parser.add_argument("--rounds", type=int, default=5, help="how often each part is measured")
    parser.add_argument("--tasks", type=int, default=2000, help="tasks for one measurement")
    parser.add_argument("--part", action="append", choices=list(PARTS), help="only these, and the plain handler")
    options = parser.parse_args(arguments)
    chosen = [part for part in PARTS if part == "bare" or not options.part or part in options.part]
    found: Dict[str, List[Dict[str, float]]] = {part: [] for part in chosen}
    print("  ".join(f"{name} {value}" for name, value in report.facts().items()))
    _show_alone([part for part in chosen if part not in ("threads", "processes", "registry")])
    try:
        with Child("platform") as platform:
            port = platform.receive()["port"]
            for _ in range(max(1, options.rounds)):
                for part in chosen:
                    found[part].append(_measure(platform, port, part, max(100, options.tasks)))
    except ChildError as error:
        print(f"cannot measure: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    rows = []
    for part in chosen:
        cpu = Spread.of([one["cpu_us"] for one in found[part]])
        added = Spread.of([one["cpu_us"] - bare["cpu_us"] for one, bare in zip(found[part], found["bare"])])
        speed = Spread.of([one["per_second"] for one in found[part]])
        more = cells(added, lambda value: f"{value:+.0f}") if part != "bare" else ["", ""]
        rows.append([PARTS[part][0], number(cpu.median), *more, number(speed.median)])
    print()
    print(table(["one thread, 1 KB of input", "CPU µs a task", "added", "min - max", "tasks a second"], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
