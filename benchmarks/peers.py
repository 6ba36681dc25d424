"""Measure the worker beside its peers: ``python -m benchmarks.peers``.

All run the same handler on the same input with the same number of threads in one process: the peers on a Redis or a
PostgreSQL that this command starts, the worker on the benchmarks' platform. Each round runs all of them, one after the
other, in fresh processes. Ratios are formed within a round.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import Dict, List, Optional

from . import measuring, peer, report, servers
from .process import Child, ChildError, Message
from .report import Spread, cells, number, table

OURS = "sekuire"


def _measure_peer(server: servers.Server, kind: str, results: bool, threads: int, tasks: int) -> Message:
    arguments = [kind, "--server", server.url, "--server-pid", str(server.pid)]
    arguments += ["--threads", str(threads), "--tasks", str(tasks), *(["--results"] if results else [])]
    with Child("peer", *arguments) as child:
        child.receive(timeout=120.0)
        return child.ask("run", timeout=120.0)


def _measure_ours(platform: Child, port: int, threads: int, tasks: int) -> Message:
    with Child("worker", "--port", str(port), "--threads", str(threads)) as child:
        child.receive()
        platform.ask("feed", tasks=peer.WARM_UP, timeout=60.0)
        return measuring.throughput(platform, child, {"tasks": tasks})


def label(kind: str, results: bool) -> str:
    """Return the name of a row."""
    return kind if kind == OURS else f"{kind}, {'results stored' if results else 'no results'}"


def measure(kinds: List[str], rounds: int, threads: int, tasks: int) -> List[Dict[str, Message]]:
    """Return the figures of each round by row."""
    found: List[Dict[str, Message]] = []
    with Child("platform") as platform:
        port = platform.receive()["port"]
        for turn in range(rounds):
            if sys.stderr.isatty():
                print(f"... round {turn + 1} of {rounds}", file=sys.stderr)
            figures = {OURS: _measure_ours(platform, port, threads, tasks)}
            for kind in kinds:
                for results in peer.KINDS[kind].results:
                    # A server of its own each time: an idle one does nothing, and nobody finds another's tasks.
                    with servers.start(peer.KINDS[kind].server) as server:
                        figures[label(kind, results)] = _measure_peer(server, kind, results, threads, tasks)
            found.append(figures)
    return found


def best_of(rounds: List[Dict[str, Message]]) -> str:
    """Return the peer with the highest rate, by the median of all rounds."""
    peers = [name for name in rounds[0] if name != OURS]
    return max(peers, key=lambda name: statistics.median(one[name]["per_second"] for one in rounds))


def show(rounds: List[Dict[str, Message]], threads: int, tasks: int) -> None:
    """Print the table and the ratio to the best."""
    rows = []
    for name in rounds[0]:
        phases = [one[name] for one in rounds]
        note = " !" if any(report.is_saturated(one) for one in phases) else ""
        rows.append(
            [
                name,
                *cells(Spread.of([one["per_second"] for one in phases]), number),
                *cells(Spread.of([one["cpu_us"] for one in phases]), number),
                f"{statistics.median(one['busy'] for one in phases):.0%}",
                f"{statistics.median(one['platform_busy'] for one in phases):.0%}{note}",
            ]
        )
    print(f"{tasks} tasks a round and row after {peer.WARM_UP} to warm up, {threads} threads, rounds: {len(rounds)}\n")
    head = ["worker", "per second", "min - max", "CPU µs a task", "min - max", "worker", "server"]
    print(table(head, rows))
    print("(worker, server: share of one core; ! the server was the limit; RQ runs one task after the other)\n")
    best = best_of(rounds)
    ours, theirs = [one[OURS] for one in rounds], [one[best] for one in rounds]
    ratio_rows = []
    for field, what in (("per_second", "tasks a second"), ("cpu_us", "CPU a task")):
        ratio = report.ratio(ours, theirs, field)
        name = f"{what}, {OURS} ÷ {best}"
        ratio_rows.append([name, *cells(ratio, "{:.2f}".format)] if ratio else [name, "refused", "server saturated"])
    print(table(["ratio to the best peer, within this run", "median", "min - max"], ratio_rows))


def main(arguments: Optional[List[str]] = None) -> int:
    """Measure, print, and write the raw figures where that was asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description="The worker beside its peers.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tasks", type=int, default=4000)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--only", nargs="+", choices=list(peer.KINDS), help="these peers only")
    parser.add_argument("--json", metavar="FILE", help="write the raw figures there")
    options = parser.parse_args(arguments)
    kinds = options.only or list(peer.KINDS)
    absent = [kind for kind in kinds if peer.version(kind) is None]
    if absent:
        print(f"not installed: {', '.join(absent)}; tox -e peers brings them", file=sys.stderr)
        return 2
    facts = {**report.facts(), **{name: peer.version(name) or "" for name in kinds}}
    begun = time.monotonic()
    try:
        rounds = measure(kinds, max(1, options.rounds), options.threads, options.tasks)
    except ChildError as error:
        print(f"cannot measure: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print("  ".join(f"{name} {value}" for name, value in facts.items()) + "\n")
    show(rounds, options.threads, options.tasks)
    print(f"\ntook {time.monotonic() - begun:.0f} s")
    report.save(options.json, facts, {"rounds": rounds})
    return 0


if __name__ == "__main__":
    sys.exit(main())
