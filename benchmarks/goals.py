"""The goals and what is measured of each, in one table: ``python -m benchmarks --goals``.

Ratios are formed within a round, whose parts follow each other at once; a ratio is refused where the platform was the
limit. Nothing here passes or fails: the last column says whether the median meets the goal.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import tempfile
from contextlib import ExitStack
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

from . import measuring, report
from .measuring import Plan
from .process import Child, ChildError, Message
from .report import Spread, cells, number, table

#: Tasks measured at the beginning and at the end of a long run.
_SAMPLE = 30_000
_WAITING = 10_000
_MIB = 1024.0


class Goal(NamedTuple):
    """One line of the table; ``found`` is None where a ratio had to be refused."""

    name: str
    at_most: float
    unit: str
    found: Optional[Spread]

    def cells(self) -> List[str]:
        """The line's cells."""
        limit = f"≤ {self.at_most:g}{self.unit}"
        if self.found is None:
            return [self.name, limit, "refused", "platform saturated", ""]
        verdict = "met" if self.found.median <= self.at_most else "NOT MET"
        return [self.name, limit, *cells(self.found, lambda value: f"{number(value)}{self.unit}"), verdict]


def measure(plan: Plan, tasks: int) -> Tuple[List[Goal], Message]:
    """All goals, and the raw figures. ``tasks`` are run for the memory's sake alone, by one worker."""
    raw: Message = {"rounds": []}
    with ExitStack() as stack:
        platform = stack.enter_context(Child("platform"))
        port = platform.receive()["port"]
        folder = tempfile.mkdtemp(prefix="sekuire-bench-")
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        for turn in range(plan.rounds):
            _progress(f"round {turn + 1} of {plan.rounds}")
            raw["rounds"].append(_round(platform, port, plan, f"{folder}/{turn}.db"))
        _progress(f"memory: {_WAITING:,} waiting tasks, then {tasks:,} tasks one after the other")
        raw["waiting_mib"] = _waiting(platform, port)
        raw["long"] = _long(platform, port, tasks)
        _progress("an idle worker, single stages, imports")
        with Child("worker", "--port", str(port)) as child:
            child.receive()
            platform.ask("feed", seconds=plan.warm_up_seconds)
            raw["idle"] = measuring.idle(
                platform, child, plan.idle_seconds, lambda: raw.update(measuring.stages(port, plan))
            )
        raw["imports"] = measuring.imports(plan.imports)
    return _goals(raw), raw


def _round(platform: Child, port: int, plan: Plan, outbox: str) -> Message:
    """The floor and every kind of worker, one right after the other."""

    def worker(threads: int, options: Optional[Message] = None, handlers: int = 1) -> Message:
        return measuring.worker(platform, port, threads, plan, json.dumps(options or {}), handlers)

    return {
        "floor": measuring.floor(platform, port, "requests", plan.floor_seconds),
        "8": worker(8),
        "outbox": worker(8, {"outbox": outbox}),
        "1": worker(1),
        "handlers": worker(8, handlers=1000),
        "64": worker(64),
    }


def _waiting(platform: Child, port: int) -> float:
    """MiB that 10,000 tasks take while they wait for a thread."""
    options = json.dumps({"max_queued": _WAITING})
    with Child("worker", "--port", str(port), "--threads", "1", "--options", options) as child:
        child.receive()
        platform.ask("feed", tasks=2000, timeout=60.0)
        child.ask("hold")
        before = child.ask("usage")
        platform.send("feed", tasks=_WAITING + 1)
        for _ in range(600):
            after = child.ask("usage")
            if after["waiting"] == _WAITING:
                break
        else:
            raise ChildError(f"only {after['waiting']} of {_WAITING} tasks wait")
        child.ask("release")
        platform.receive(timeout=120.0)
    grown_kib: int = after["rss_kib"] - before["rss_kib"]
    return grown_kib / _MIB


def _long(platform: Child, port: int, tasks: int) -> Message:
    """RSS and CPU of a worker at the beginning and at the end of many tasks."""
    with Child("worker", "--port", str(port), "--threads", "8") as child:
        child.receive()
        # Until then the memory of delivered results (10,000 of them) fills, and each thread's part of the heap grows.
        settled = max(_SAMPLE, tasks // 10)
        platform.ask("feed", tasks=settled, timeout=1800.0)
        begun = measuring.throughput(platform, child, {"tasks": _SAMPLE})
        left = max(0, tasks - settled - 2 * _SAMPLE)
        if left:
            platform.ask("feed", tasks=left, timeout=7200.0)
        ended = measuring.throughput(platform, child, {"tasks": _SAMPLE})
    return {"tasks": settled + 2 * _SAMPLE + left, "settled": settled, "begun": begun, "ended": ended}


def _goals(raw: Message) -> List[Goal]:
    rounds: Sequence[Dict[str, Message]] = raw["rounds"]
    pairs = {name: [one[name] for one in rounds] for name in rounds[0]}

    def ratio(above: str, below: str, field: str = "cpu_us") -> Optional[Spread]:
        return report.ratio(pairs[above], pairs[below], field)

    slower = report.ratio(pairs["8"], pairs["outbox"], "per_second")
    latencies = [one["latencies_us"] for one in pairs["8"]]
    long = raw["long"]
    growth = (long["ended"]["rss_kib"] - long["begun"]["rss_kib"]) / _MIB
    stages = {stage["key"]: stage for stage in raw["stages"]}
    big, big_floor = stages["big-event"], stages["big-reference"]
    base = statistics.median(raw["imports"]["import requests"])
    imports = {statement: Spread.of([value / base for value in values]) for statement, values in raw["imports"].items()}
    return [
        Goal("CPU of a task at 8 threads ÷ one requests.Session().post", 0.5, "", ratio("8", "floor")),
        Goal("CPU of a task at 1 thread ÷ the same", 0.5, "", ratio("1", "floor")),
        Goal("stream to handler, idle worker, p50", 1, " ms", _percentiles(latencies, 0.5)),
        Goal("stream to handler, idle worker, p99", 5, " ms", _percentiles(latencies, 0.99)),
        Goal("an idle worker, of one core", 0.1, " %", _single(raw["idle"]["core_percent"])),
        Goal(f"RSS growth over {long['tasks']:,} tasks", 2, " MiB", _single(growth)),
        Goal(f"RSS of {_WAITING:,} waiting tasks", 20, " MiB", _single(raw["waiting_mib"])),
        Goal("import sekuire ÷ import requests", 1.2, "", imports["import sekuire"]),
        Goal("from sekuire import SekuireSDK ÷ import requests", 1.2, "", imports["from sekuire import SekuireSDK"]),
        Goal("a 16 MiB event ÷ its json.loads", 1.5, "", _single(big["cpu_us"] / big_floor["cpu_us"])),
        Goal("CPU of a task, 1,000 handlers ÷ 1 handler", 1.1, "", ratio("handlers", "8")),
        Goal(
            f"CPU of a task, after {long['tasks']:,} tasks ÷ after {long['settled']:,}", 1.1, "",
            report.ratio([long["ended"]], [long["begun"]], "cpu_us"),
        ),
        Goal("CPU of a task, 64 threads ÷ 8 threads", 1.1, "", ratio("64", "8")),
        Goal("CPU of a task, 64 threads ÷ 1 thread", 1.5, "", ratio("64", "1")),
        Goal("CPU of a task with the outbox ÷ without", 1.3, "", ratio("outbox", "8")),
        Goal("time of a task with the outbox ÷ without", 1.3, "", slower),
    ]  # fmt: skip


def _single(value: float) -> Spread:
    return Spread(value, value, value)


def _percentiles(each: Sequence[Sequence[float]], share: float) -> Spread:
    """Milliseconds of all rounds together, and of the fastest and the slowest round."""
    of_rounds = Spread.of([report.percentile(values, share) / 1e3 for values in each])
    together = [value for values in each for value in values]
    return of_rounds._replace(median=report.percentile(together, share) / 1e3)


def show(goals: Sequence[Goal]) -> None:
    """Print the table."""
    print(table(["goal", "wanted", "measured", "min - max", ""], [goal.cells() for goal in goals]))


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"... {text}", file=sys.stderr)
