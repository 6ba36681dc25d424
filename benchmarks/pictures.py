"""Measure and draw the plots of docs/performance.md: ``python -m benchmarks --plot`` writes them as SVG.

Throughput against threads and processes, the latency of an idle worker, and where a task's time goes.
"""

from __future__ import annotations

import os
import statistics
from typing import Any, List

from . import measuring, plots, started
from .measuring import Plan
from .process import Child, Message
from .report import percentile

_THREADS = (1, 2, 4, 8, 16, 32, 64)


def measure(plan: Plan) -> Message:
    """Return raw figures."""
    raw: Message = {"threads": {str(count): [] for count in _THREADS}, "latencies_us": []}
    with Child("platform") as platform:
        port = platform.receive()["port"]
        for _ in range(plan.rounds):
            for count in _THREADS:
                phase = measuring.worker(platform, port, count, plan, "{}")
                raw["threads"][str(count)].append(phase)
                if count == 8:
                    raw["latencies_us"] += phase["latencies_us"]
        raw["processes"] = started.processes(platform, port, plan.rounds, plan.task_seconds)
        raw.update(measuring.stages(port, plan))
    return raw


def draw(raw: Message, directory: str) -> List[str]:
    """Write the plots, and return their paths."""
    paths = [os.path.join(directory, f"performance-{name}.svg") for name in ("throughput", "latency", "stages")]
    axes: List[Any]
    with plots.figure(paths[0], 2, "threads of one worker", "tasks a second") as axes:
        counts = [int(count) for count in raw["threads"]]
        _points(axes[0], counts, [[one["per_second"] for one in each] for each in raw["threads"].values()])
        axes[0].set_title("a handler that does nothing", fontsize=10)
        _points(axes[1], [int(count) for count in raw["processes"]], list(raw["processes"].values()))
        axes[1].set_title("a handler that computes for 2 ms", fontsize=10)
        axes[1].set_xlabel("processes of two threads")
    with plots.figure(paths[1], 1, "ms from the platform's send to the handler's first line", "tasks (%)") as axes:
        values = [value / 1e3 for value in raw["latencies_us"]]
        most = percentile(values, 0.99)
        axes[0].hist(
            [value for value in values if value <= most], bins=60, weights=[100 / len(values)] * _within(values, most)
        )
        for share in (0.5, 0.99):
            value = percentile(values, share)
            axes[0].axvline(value, linestyle="--", color="C1")
            axes[0].annotate(
                f" p{share * 100:.0f} {value:.2f} ms", (value, 0), xytext=(0, 60), textcoords="offset points"
            )
        axes[0].set_title("an idle worker, 8 threads, 100 tasks a second", fontsize=10)
    with plots.figure(paths[2], 1, "µs of CPU", "") as axes:
        stages = [(stage["name"], stage["cpu_us"]) for stage in raw["stages"] if stage["in_task"]]
        whole = statistics.median(one["cpu_us"] for one in raw["threads"]["8"])
        stages.append(("read, dispatch, locks, wake-ups", max(0.0, whole - sum(cpu for _, cpu in stages))))
        axes[0].barh([name for name, _ in stages], [cpu for _, cpu in stages])
        axes[0].invert_yaxis()
        axes[0].set_title(f"one task at 8 threads: {whole:.0f} µs of CPU in all", fontsize=10)
    return paths


def _within(values: List[float], most: float) -> int:
    return sum(value <= most for value in values)


def _points(axis: Any, counts: List[int], speeds: List[List[float]]) -> None:
    """Draw medians with the least and the most of the rounds, at equal distances."""
    medians = [statistics.median(each) for each in speeds]
    below = [median - min(each) for median, each in zip(medians, speeds)]
    above = [max(each) - median for median, each in zip(medians, speeds)]
    axis.errorbar(range(len(counts)), medians, yerr=[below, above], marker="o", capsize=3)
    axis.set_xticks(range(len(counts)), [str(count) for count in counts])
