"""Figures made readable: medians with their spread, ratios that may be shown, and tables that line up."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
import statistics
from typing import Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence

from .process import Message

#: Share of a core above which the platform is taken for the limit.
SATURATED = 0.85
#: Share of a core that the client must at least use or wait for; one that wants less waits for the platform.
IDLE = 0.4

PACKAGES = ("requests", "urllib3", "sseclient-py", "attrs", "tenacity")


class Spread(NamedTuple):
    """Several measurements of one thing."""

    median: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(statistics.median(values), min(values), max(values))


def is_saturated(phase: Message) -> bool:
    """Whether the platform, not its client, was the limit of this phase."""
    if phase["platform_busy"] > SATURATED and phase["busy"] < phase["platform_busy"]:
        return True
    # A peer's server is not this platform, and its client says nothing of what it wanted.
    return bool(phase.get("wanted", 1.0) < IDLE)


def ratio(above: Sequence[Message], below: Sequence[Message], field: str) -> Optional[Spread]:
    """``above`` ÷ ``below`` round by round, so that a drift of the machine meets both; None where it must not be shown.

    Refused are ratios in which any round was limited by the platform: they would compare the platform with itself.
    """
    if not above or not below or any(is_saturated(phase) for phase in [*above, *below]):
        return None
    return Spread.of([one[field] / other[field] for one, other in zip(above, below)])


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least ``share`` of ``values`` do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -(-len(ordered) * int(share * 1000) // 1000) - 1))]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of equal width: the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        first = cells[0].ljust(widths[0])
        return "  ".join([first, *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:]))]).rstrip()

    return "\n".join([line(head), "  ".join("-" * width for width in widths), *(line(row) for row in rows)])


def cells(spread: Spread, show: Callable[[float], str]) -> List[str]:
    """The median, and ``lowest-highest`` beside it."""
    return [show(spread.median), f"{show(spread.lowest)} - {show(spread.highest)}"]


def number(value: float) -> str:
    """With as many digits as mean something."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def facts() -> Dict[str, str]:
    """The machine and the versions; nothing that names it."""
    found = {
        "cpu": _cpu_model(),
        "cores": str(_cores()),
        "system": f"{platform.system()} {platform.machine()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "load before": f"{os.getloadavg()[0]:.2f}",
    }
    found["sekuire"] = importlib.import_module("sekuire.version").__version__
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


def save(path: Optional[str], known: Mapping[str, str], found: Mapping[str, object]) -> None:
    """Write raw figures, with the :func:`facts` that are known, to a file, if one is named."""
    if path:
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"facts": known, **found}, file, indent=1)
            file.write("\n")


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"
