"""One measurement each: a floor, a worker under load, an idle worker, stages, imports; raw figures."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from typing import Callable, Dict, List, NamedTuple, Optional

from .process import Child, ChildError, Message, busy, wanted

NAMES = "from sekuire import SekuireSDK, create_worker"
IMPORTS = ("import requests", "import sekuire", NAMES)


class Plan(NamedTuple):
    """How long to measure what."""

    rounds: int
    floor_seconds: float
    warm_up_seconds: float
    task_seconds: float
    tasks: Optional[int]
    rate: float
    latency_seconds: float
    idle_seconds: float
    stage_seconds: float
    imports: int


def floor(platform: Child, port: int, kind: str, seconds: float) -> Message:
    with Child("floors", kind, "--port", str(port)) as child:
        child.receive()
        before = platform.ask("usage")
        figures = child.ask("run", seconds=seconds, timeout=seconds + 30)
        figures["platform_busy"] = busy(before, platform.ask("usage"))
    return figures


def order(plan: Plan) -> Message:
    return {"tasks": plan.tasks} if plan.tasks else {"seconds": plan.task_seconds}


def throughput(platform: Child, child: Child, order: Message) -> Message:
    before = child.ask("usage")
    fed = platform.ask("feed", timeout=60.0 + order.get("seconds", 0) + order.get("tasks", 0) / 50, **order)
    # The worker still reads the answer to its last completion: that belongs to the task too.
    time.sleep(0.05)
    after = child.ask("usage")
    done = fed["completed"]
    if not done or fed["failed"] or done != fed["sent"]:
        raise ChildError(f"of {fed['sent']} tasks {done} were completed and {fed['failed']} failed")
    cpu_seconds = (after["cpu_ns"] - before["cpu_ns"]) / 1e9
    return {
        "tasks": done,
        "cpu_us": cpu_seconds * 1e6 / done,
        "per_second": done / fed["seconds"],
        "busy": cpu_seconds / fed["seconds"],
        "wanted": wanted(before, after),
        "platform_busy": fed["cpu_seconds"] / fed["seconds"],
        "switches": (after["switches"] - before["switches"]) / done,
        "rss_kib": after["rss_kib"],
    }


def worker(platform: Child, port: int, threads: int, plan: Plan, options: str, *more: str) -> Message:
    with Child("worker", "--port", str(port), "--threads", str(threads), "--options", options, *more) as child:
        child.receive()
        platform.ask("feed", seconds=plan.warm_up_seconds)
        figures = throughput(platform, child, order(plan))
        if threads > 1:
            child.ask("time")
            platform.ask("feed", tasks=max(1, int(plan.latency_seconds * plan.rate)), rate=plan.rate, timeout=120.0)
            figures["latencies_us"] = [ns / 1e3 for ns in child.ask("latencies")["latencies_ns"]]
    return figures


def idle(platform: Child, child: Child, seconds: float, meanwhile: Callable[[], None]) -> Message:
    """The CPU of a worker that waits; CPU is accounted by process, so something else may run ``meanwhile``."""
    time.sleep(0.5)
    before, platform_before = child.ask("usage"), platform.ask("usage")
    end = time.monotonic() + seconds
    meanwhile()
    time.sleep(max(0.0, end - time.monotonic()))
    after, platform_after = child.ask("usage"), platform.ask("usage")
    return {
        "seconds": (after["wall_ns"] - before["wall_ns"]) / 1e9,
        "core_percent": busy(before, after) * 100,
        "heartbeats": platform_after["heartbeats"] - platform_before["heartbeats"],
        "rss_kib": after["rss_kib"],
    }


def stages(port: int, plan: Plan) -> Message:
    with Child("stages", "--port", str(port), "--seconds", str(plan.stage_seconds)) as child:
        child.receive()
        return child.ask("run", timeout=300.0)


def import_ms(statement: str, cache: str) -> float:
    """CPU milliseconds of an import in a fresh interpreter, from bytecode, as an installed package is imported."""
    code = f"import time; begun = time.process_time(); {statement}; print((time.process_time() - begun) * 1e3)"
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": cache}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    ran = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, timeout=60, check=True, env=environment
    )
    return float(ran.stdout)


def imports(times: int) -> Dict[str, List[float]]:
    """Milliseconds of each import in a fresh interpreter, in turn; the first of each only makes its bytecode."""
    found: Dict[str, List[float]] = {statement: [] for statement in IMPORTS}
    with tempfile.TemporaryDirectory() as cache:
        for turn in range(times + 1):
            for statement in IMPORTS:
                took = import_ms(statement, cache)
                if turn:
                    found[statement].append(took)
    return found
