"""The one command: ``python -m benchmarks`` measures floors and worker in turn and prints what it found.

Every round starts fresh processes, first the floors, then the worker, so that whatever the machine does meanwhile
meets all of them; a ratio is formed within a round. Nothing here passes or fails on a time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from contextlib import ExitStack
from typing import Any, Dict, List, Optional

from . import floors, goals, measuring, payloads, pictures, report
from . import worker as worker_module
from .process import Child, ChildError, Message
from .report import Spread, cells, number, table

_THREADS = (8, 1)

_DEFAULT = measuring.Plan(5, 0.6, 0.4, 1.2, None, 100.0, 1.5, 10.0, 0.4, 7)
_QUICK = measuring.Plan(2, 0.25, 0.2, 0.5, None, 100.0, 0.7, 2.0, 0.1, 3)


def measure(plan: measuring.Plan, has_worker: bool, options: str) -> Message:
    """All rounds, then what needs no rounds; raw figures."""
    rounds: List[Message] = []
    raw: Message = {"rounds": rounds, "idle": None, "imports": None}
    with ExitStack() as stack:
        platform = stack.enter_context(Child("platform"))
        port = platform.receive()["port"]
        for turn in range(plan.rounds):
            _progress(f"round {turn + 1} of {plan.rounds}")
            figures: Message = {"floors": {}, "workers": {}}
            for kind in floors.KINDS:
                figures["floors"][kind] = measuring.floor(platform, port, kind, plan.floor_seconds)
            for threads in _THREADS if has_worker else ():
                figures["workers"][str(threads)] = measuring.worker(platform, port, threads, plan, options)
            rounds.append(figures)
        if has_worker:
            _progress("an idle worker, single stages, imports")
            with Child("worker", "--port", str(port), "--options", options) as child:
                child.receive()
                platform.ask("feed", seconds=plan.warm_up_seconds)
                raw["idle"] = measuring.idle(
                    platform, child, plan.idle_seconds, lambda: raw.update(measuring.stages(port, plan))
                )
            raw["imports"] = measuring.imports(plan.imports)
        else:
            _progress("single stages")
            raw.update(measuring.stages(port, plan))
        raw["platform"] = platform.ask("usage")
    return raw


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"... {text}", file=sys.stderr)


def _phase_row(label: str, phases: List[Message]) -> List[str]:
    cpu = Spread.of([phase["cpu_us"] for phase in phases])
    speed = Spread.of([phase["per_second"] for phase in phases])
    used = statistics.median(phase["busy"] for phase in phases)
    platform_used = statistics.median(phase["platform_busy"] for phase in phases)
    note = " !" if any(report.is_saturated(phase) for phase in phases) else ""
    return [
        label,
        *cells(cpu, number),
        *cells(speed, number),
        f"{used:.0%}",
        f"{platform_used:.0%}{note}",
    ]


def _phases(raw: Message, group: str, name: str) -> List[Message]:
    return [turn[group][name] for turn in raw["rounds"] if name in turn[group]]


def show(raw: Message) -> None:
    """Print the tables."""
    print("  ".join(f"{name} {value}" for name, value in raw["facts"].items()))
    print(
        f"\ninput {payloads.INPUT_BYTES} B, result {payloads.RESULT_BYTES} B, body of a completion"
        f" {len(payloads.compact(payloads.completion()))} B, rounds: {len(raw['rounds'])}\n"
    )
    head = ["one POST, or one task", "CPU µs", "min - max", "per second", "min - max", "client", "platform"]
    rows = [_phase_row(floors.LABELS[kind], _phases(raw, "floors", kind)) for kind in floors.KINDS]
    workers = {threads: _phases(raw, "workers", str(threads)) for threads in _THREADS}
    for threads, phases in workers.items():
        if phases:
            rows.append(_phase_row(f"worker, {threads} thread{'s' if threads > 1 else ''}", phases))
    print(table(head, rows))
    print("(client, platform: share of one core; ! the platform was the limit)")
    if raw["rounds"][0]["workers"]:
        _show_ratios(raw, workers)
        _show_rest(raw)
    else:
        print("\nno worker was measured: this checkout has no sekuire.create_worker")
    _show_stages(raw, workers[_THREADS[0]])


def _show_ratios(raw: Message, workers: Dict[int, List[Message]]) -> None:
    rows = []
    for threads, phases in workers.items():
        for kind in floors.KINDS:
            label = f"CPU of a task at {threads} thread{'s' if threads > 1 else ''} ÷ POST by {kind}"
            found = report.ratio(phases, _phases(raw, "floors", kind), "cpu_us")
            rows.append([label, *cells(found, "{:.2f}".format)] if found else [label, "refused", "platform saturated"])
    imports = raw["imports"]
    if imports:
        base = statistics.median(imports["import requests"])
        for statement in measuring.IMPORTS[1:]:
            of_each = Spread.of([value / base for value in imports[statement]])
            rows.append([f"{statement} ÷ import requests", *cells(of_each, "{:.2f}".format)])
    print()
    print(table(["ratio, within this run", "median", "min - max"], rows))


def _show_rest(raw: Message) -> None:
    rows: List[List[str]] = []
    phases = _phases(raw, "workers", str(_THREADS[0]))
    each = [phase["latencies_us"] for phase in phases]
    together = [value for values in each for value in values]
    for share in (0.5, 0.99):
        spread = Spread.of([report.percentile(values, share) for values in each])
        spread = spread._replace(median=report.percentile(together, share))
        rows.append([f"stream to handler, idle worker, p{share * 100:.0f}, µs ({len(together)} tasks)"])
        rows[-1] += cells(spread, number)
    switches = Spread.of([phase["switches"] for phase in phases])
    rows.append([f"context switches a task, {_THREADS[0]} threads", *cells(switches, number)])
    idle = raw["idle"]
    beats = f"in {idle['seconds']:.0f} s, heartbeats: {idle['heartbeats']}"
    rows.append([f"idle worker, % of a core ({beats})", f"{idle['core_percent']:.3f}", ""])
    rows.append(["its memory, MiB", f"{idle['rss_kib'] / 1024:.1f}", ""])
    for statement, values in raw["imports"].items():
        rows.append([f"{statement}, ms", *cells(Spread.of(values), number)])
    print()
    print(table(["worker", "measured", "min - max"], rows))


def _show_stages(raw: Message, phases: List[Message]) -> None:
    rows = []
    known = 0.0
    for stage in raw["stages"]:
        known += stage["cpu_us"] if stage["in_task"] else 0.0
        rows.append([stage["name"], *cells(Spread(stage["cpu_us"], stage["lowest_us"], stage["highest_us"]), number)])
    rows.append(["stages of a task, together", number(known), ""])
    if phases:
        whole = statistics.median(phase["cpu_us"] for phase in phases)
        rows.append([f"a whole task, {_THREADS[0]} threads", number(whole), ""])
        rest = "the rest: read, dispatch, locks, wake-ups"
        rows.append([rest, number(whole - known), f"{(whole - known) / whole:.0%} of the task"])
    print()
    print(table(["stage alone", "CPU µs", "min - max"], rows))
    if raw["left_out"]:
        print(f"left out, so part of the rest: {'; '.join(raw['left_out'])}")


def _parse(arguments: Optional[List[str]]) -> Any:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="What a task costs beside a plain POST.")
    parser.add_argument("--quick", action="store_true", help="a quarter of the time, with wider spreads")
    parser.add_argument("--json", metavar="FILE", help="write the raw figures there")
    parser.add_argument("--rounds", type=int, help="how often to repeat floors and worker")
    parser.add_argument("--tasks", type=int, help="tasks a round and worker, instead of a time")
    parser.add_argument("--goals", action="store_true", help="one table: each goal and what is measured of it")
    parser.add_argument("--long", type=int, metavar="N", help="tasks run to see memory stand still (with --goals)")
    parser.add_argument(
        "--plot", nargs="?", const="docs/_static", metavar="DIRECTORY",
        help="measure and write the plots of docs/performance.md there (default: docs/_static); needs matplotlib",
    )  # fmt: skip
    parser.add_argument("--options", default="{}", metavar="JSON", help="more options of create_worker")
    return parser.parse_args(arguments)


def main(arguments: Optional[List[str]] = None) -> int:
    """Measure, print, and write the raw figures where that was asked for."""
    options = _parse(arguments)
    plan = _QUICK if options.quick else _DEFAULT
    plan = plan._replace(rounds=max(1, options.rounds or plan.rounds), tasks=options.tasks)
    begun = time.monotonic()
    has_worker = worker_module.is_available()
    facts = report.facts()
    found: List[goals.Goal] = []
    try:
        if options.plot:
            raw = pictures.measure(plan)
        elif options.goals:
            found, raw = goals.measure(plan, options.long or (100_000 if options.quick else 1_000_000))
        else:
            raw = measure(plan, has_worker, options.options)
    except ChildError as error:
        print(f"cannot measure: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    raw = {"facts": facts, "plan": plan._asdict(), **raw}
    if options.plot:
        for path in pictures.draw(raw, options.plot):
            print(f"wrote {path}")
    elif options.goals:
        print("  ".join(f"{name} {value}" for name, value in facts.items()) + "\n")
        goals.show(found)
    else:
        show(raw)
    print(f"\ntook {time.monotonic() - begun:.0f} s")
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(raw, file, indent=1)
            file.write("\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
