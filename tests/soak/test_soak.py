"""A short soak: threads and descriptors stay flat under load and trouble, and the judge sees what grows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import pytest

from .measure import Held, growth, left, verdict
from .run import Plan, run

HELD = Held(
    threads=["sekuire-stream", "sekuire-heartbeat", "sekuire-task_0", "sekuire-report-1"],
    descriptors=20,
    rss_kib=50_000,
    blocks=200_000,
    objects=40_000,
    types={"sekuire.worker.results.Report": 10_000, "builtins.dict": 3000},
)


@pytest.mark.slow
def test_a_short_soak(tmp_path: Path) -> None:
    """Nine hundred tasks of all shapes, under cuts, pauses, expired tokens and restarts: nothing grows or stays."""
    figures = run(Plan(seconds=60.0, tasks=900, warm_up=300, trouble=0.15), str(tmp_path))
    assert figures.problems == []
    assert figures.tasks >= 900
    assert sum(figures.troubles.values()) > 0
    assert figures.stats["undelivered"] == figures.stats["running"] == figures.stats["waiting"] == 0
    assert figures.outcomes["completed"] > 0
    assert "verdict: flat" in "\n".join(figures.lines())


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"threads": HELD.threads * 2}, "2 threads of kind 'stream', of which there may be 1"),
        ({"threads": [f"sekuire-task_{number}" for number in range(17)]}, "17 threads of kind 'task'"),
        ({"threads": ["Thread-1"] * 2}, "2 threads of kind 'Thread-1'"),
        ({"descriptors": 60}, "descriptors grew from 20 to 60"),
        ({"rss_kib": 60_000}, "resident memory grew from 50000 to 60000 KiB"),
        ({"objects": 44_000}, "objects grew from 40000 to 44000"),
        (
            {"types": {"sekuire.handlers.context.TaskContext": 101}},
            "objects of sekuire.handlers.context.TaskContext grew from 0 to 101",
        ),
    ],
)
def test_what_grows_is_seen(changes: Any, text: str) -> None:
    """Each kind of growth is named with its figures; memory only where the start was measured warm."""
    problems = verdict(HELD, attrs.evolve(HELD, **changes), max_workers=8)
    assert any(text in problem for problem in problems), problems
    assert verdict(HELD, HELD, max_workers=8) == []
    is_memory = "threads" not in changes and "descriptors" not in changes
    assert bool(verdict(HELD, attrs.evolve(HELD, **changes), max_workers=8, is_warm=False)) is not is_memory


def test_what_is_left_is_seen() -> None:
    """A thread or descriptor that a stopped worker leaves is named; growth is told by type, the most first."""
    after = attrs.evolve(HELD, threads=[*HELD.threads, "sekuire-timer"], descriptors=21)
    assert left(HELD, after) == ["the thread sekuire-timer is left", "1 descriptors are left"]
    assert left(HELD, HELD) == []
    end = attrs.evolve(HELD, types={"sekuire.worker.results.Report": 10_001, "builtins.dict": 3100, "builtins.set": 51})
    assert growth(HELD, end) == [
        ("builtins.dict", 3000, 3100), ("builtins.set", 0, 51), ("sekuire.worker.results.Report", 10_000, 10_001),
    ]  # fmt: skip
