"""A short run of many submissions through the misbehaving proxy; and that its checker finds what it is for."""

from __future__ import annotations

import os
from typing import Any, Dict, List

import pytest

from .submits import SubmitPlan, judge_submits, run_submits

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL and process groups")


@pytest.mark.slow
def test_each_submission_is_one_task(tmp_path: Any) -> None:
    """Four hundred, with faulty calls, pages, interim answers and kills of the platform."""
    figures = run_submits(SubmitPlan(seed=5, submits=400, faults=0.1, kill_every=3.0), str(tmp_path))
    report = "\n".join(figures.lines())
    assert not figures.violations, report
    assert (figures.submitted, figures.tasks) == (400, 400), report
    assert sum(figures.injected.values()) > 20, report
    assert figures.pages > 10, report


@pytest.mark.parametrize(
    ("handles", "tasks", "found"),
    [
        (["a", "b"], {"a": 0, "b": 1}, []),
        (["a"], {"a": 0}, ["1 of 2 submissions were answered", "there are 1 tasks of 2 submissions"]),
        (
            ["a", "b"],
            {"a": 0, "b": 1, "c": 1},
            ["there are 3 tasks of 2 submissions", "submission 1 became 2 tasks"],
        ),
        (
            ["a", "a"],
            {"a": 0, "b": 1},
            ["the handle of submission 1 leads to a, which holds 0"],
        ),
        (["a", "c"], {"a": 0, "b": 1}, ["the handle of submission 1 leads to c, which holds None"]),
    ],
)
def test_what_the_checker_finds(handles: List[str], tasks: Dict[str, int], found: List[str]) -> None:
    assert judge_submits(2, handles, tasks) == found
