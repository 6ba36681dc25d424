"""Examples in the docstrings of public classes and functions."""

from __future__ import annotations

import doctest
import inspect
from typing import Any, List

import pytest

import sekuire

EXAMPLES = [name for name in sekuire.__all__ if ">>> " in (getattr(sekuire, name).__doc__ or "")]


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run(name: str) -> None:
    """Each example that is written as a session prints what it says."""
    found: Any = getattr(sekuire, name)
    examples = doctest.DocTestParser().get_doctest(inspect.getdoc(found) or "", {}, name, found.__module__, 0)
    report: List[str] = []
    assert doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(examples, out=report.append).failed == 0, "".join(
        report
    )
