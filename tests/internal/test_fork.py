"""Check that what a forked child inherits is reset there, and nowhere else."""

from __future__ import annotations

import gc
import os
from typing import List

import pytest

from sekuire._internal import fork

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]


class Noting:
    def __init__(self, notes: List[str], name: str, error: bool = False) -> None:
        self._notes = notes
        self._name = name
        self._error = error
        fork.reset_in_child(self, Noting._reset)

    def _reset(self) -> None:
        if self._error:
            raise ValueError("not this one")
        self._notes.append(self._name)


def test_only_in_the_child() -> None:
    """Each object that lives is reset, in order; one that fails does not keep the next from it."""
    notes: List[str] = []
    objects = [Noting(notes, "one"), Noting(notes, "two", error=True), Noting(notes, "gone"), Noting(notes, "three")]
    del objects[2]
    gc.collect()
    pid = os.fork()
    if pid == 0:  # pragma: no cover  # The child.
        os._exit(0 if notes == ["one", "three"] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert notes == []
    assert len(objects) == 3
