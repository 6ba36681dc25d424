"""The goals and what is measured of each, in one table: ``python -m benchmarks --goals``.

Ratios are formed within a round, whose parts follow each other at once; a ratio is refused where the platform was the
limit. Nothing here passes or fails: the last column says whether the median meets the goal.
"""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import statistics
import sys
import tempfile
from contextlib import ExitStack
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

from . import local, measuring, peer, peers, report, servers, started
from .measuring import Plan
from .process import Child, ChildError, Message
from .report import Spread, cells, number, table

#: Tasks measured at the beginning and at the end of a long run.
_SAMPLE = 30_000
_WAITING = 10_000
_MIB = 1024.0
_STREAMS = 200
_LOCAL_TASKS = 3000
_PEER_TASKS = 1500


class Goal(NamedTuple):
    """One line of the table; ``found`` is None where nothing can be said, for the reason in ``missing``."""

    name: str
    bound: float
    unit: str
    found: Optional[Spread]
    #: The bound is the least, not the most.
    is_least: bool = False
    missing: str = "refused: platform saturated"

    def cells(self) -> List[str]:
        """The line's cells."""
        has_bound = 0 < self.bound < math.inf
        limit = f"{'≥' if self.is_least else '≤'} {self.bound:,g}{self.unit}" if has_bound else ""
        if self.found is None:
            return [self.name, limit, "", self.missing, ""]
        is_met = self.found.median >= self.bound if self.is_least else self.found.median <= self.bound
        verdict = ("met" if is_met else "NOT MET") if has_bound else ""
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
        _progress("a first task, an idle worker's memory, several processes")
        round_trip = statistics.median(1 / one["bare"]["per_second"] for one in raw["rounds"])
        raw["first"] = started.first_task(platform, port, round_trip, plan.imports)
        raw["idle_mib"] = started.memory(port, plan.rounds)
        raw["processes"] = started.processes(platform, port, plan.rounds, plan.task_seconds)
        _progress("the local platform")
        raw["local"] = [local.measure(_STREAMS, _LOCAL_TASKS, False)["per_second"] for _ in range(plan.rounds)]
        raw["local_file"] = [local.measure(_STREAMS, _LOCAL_TASKS, True)["per_second"] for _ in range(plan.rounds)]
        raw["peers"], raw["no_peers"] = _peers(plan)
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

    def worker(threads: int, *more: str, **options: str) -> Message:
        return measuring.worker(platform, port, threads, plan, json.dumps(options), *more)

    features = ("--features", "--policy") if _has("cryptography") else ("--features",)
    tracing = ("--tracing",) if _has("opentelemetry.sdk") else ()
    return {
        "floor": measuring.floor(platform, port, "requests", plan.floor_seconds),
        "bare": measuring.floor(platform, port, "http.client", plan.floor_seconds),
        "8": worker(8),
        "features": worker(8, *features),
        "traced": worker(8, *features, *tracing),
        "outbox": worker(8, outbox=outbox),
        "1": worker(1),
        "handlers": worker(8, "--handlers", "1000"),
        "64": worker(64),
    }


def _has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _peers(plan: Plan) -> Tuple[List[Dict[str, Message]], str]:
    """The rounds beside the peers, or why there are none."""
    absent = [kind for kind in peer.KINDS if peer.version(kind) is None]
    absent += [name for name in ("redis", "postgres") if not servers.is_installed(name)]
    if absent:
        return [], f"not measured: no {', '.join(absent)}"
    _progress("the peers")
    return peers.measure(list(peer.KINDS), plan.rounds, 8, _PEER_TASKS), ""


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
    processes = raw["processes"]
    more = {n: Spread.of([m / o for m, o in zip(processes[n], processes[1])]) for n in processes}
    return [
        Goal("CPU of a task at 8 threads ÷ one http.client POST", 1.2, "", ratio("8", "bare")),
        Goal("CPU of a task at 1 thread ÷ the same", 1.4, "", ratio("1", "bare")),
        Goal("tasks a second ÷ the best peer's", 2, "", _beside_peers(raw["peers"]), True, raw["no_peers"]),
        Goal("first task after process start ÷ (import + 4 round trips)", 1.5, "", Spread.of(raw["first"]["ratio"])),
        Goal("idle worker's RSS above a Python with requests", 6, " MiB", Spread.of(raw["idle_mib"])),
        Goal("CPU of a task, policy, health, metrics, resource ÷ bare", 1.25, "", ratio("features", "8")),
        Goal("  the same with tracing (OpenTelemetry's SDK)", math.inf, "", ratio("traced", "8")),
        Goal("local platform, completions a second, in memory", 2500, "", Spread.of(raw["local"]), True),
        Goal("local platform, completions a second, in a file", 2000, "", Spread.of(raw["local_file"]), True),
        Goal("tasks a second (2 ms of CPU each), 2 processes ÷ 1", 1.8, "", more[2], True),
        Goal("  the same, 4 processes ÷ 1", 0, "", more[4], True),
        Goal("CPU of a task at 8 threads ÷ one requests.Session().post", 0.5, "", ratio("8", "floor")),
        Goal("CPU of a task at 1 thread ÷ the same", 0.5, "", ratio("1", "floor")),
        Goal("stream to handler, idle worker, p50", 1, " ms", _percentiles(latencies, 0.5)),
        Goal("stream to handler, idle worker, p99", 5, " ms", _percentiles(latencies, 0.99)),
        Goal("an idle worker, of one core", 0.1, " %", _single(raw["idle"]["core_percent"])),
        Goal(f"RSS growth over {long['tasks']:,} tasks", 2, " MiB", _single(growth)),
        Goal(f"RSS of {_WAITING:,} waiting tasks", 20, " MiB", _single(raw["waiting_mib"])),
        Goal("import sekuire ÷ import requests", 1.2, "", imports["import sekuire"]),
        Goal("from sekuire import SekuireSDK, create_worker ÷ the same", 1.2, "", imports[measuring.NAMES]),
        Goal("a 16 MiB event ÷ its json.loads", 1.5, "", _single(big["cpu_us"] / big_floor["cpu_us"])),
        Goal("what lets one task be cancelled, at most", 5, " µs", _single(stages["cancel"]["cpu_us"])),
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


def _beside_peers(rounds: List[Dict[str, Message]]) -> Optional[Spread]:
    if not rounds:
        return None
    best = peers.best_of(rounds)
    return report.ratio([one[peers.OURS] for one in rounds], [one[best] for one in rounds], "per_second")


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
