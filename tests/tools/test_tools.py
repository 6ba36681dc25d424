"""The checks of `tox -e lint` find what they are for, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from .clones import code_lines, find
from .structure import Measure
from .words import search

COPY = "".join(f"    one_{number} = {number}\n" for number in range(8))


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "line", "found"),
    [
        ("how to mend it", 1, "mend"),
        ("ok\nlogs in anew", 2, "anew"),
        ("waits for\n    # ever", 1, "for ever"),
        ('("one\n" "two")\nprint("is no "\n      "option")', 3, "is no"),
        ("self._stragglers = 0", 1, "stragglers"),
        ("must be a str; it is no `str`", 1, "is no"),
        ("Meanwhile, others", 1, "Meanwhile"),
    ],
)
def test_refused_words_are_found(text: str, line: int, found: str) -> None:
    """A refused word is found in prose and in names, over a line's end too, with the line that it begins on."""
    assert [(one.line, one.found) for one in search("x.py", text)] == [(line, found)]


@pytest.mark.parametrize(
    "text", ["recommended", "is no longer held", "there is no lock", "for good reasons", "Geofore"]
)
def test_plain_words_are_let_through(text: str) -> None:
    """A word that only contains a refused one, and plain uses, are not refused."""
    assert list(search("x.py", text)) == []


def test_copied_code_is_found(tmp_path: Path) -> None:
    """A run of eight lines in two files is one clone, whatever its indentation, comments and docstrings."""
    one = write(tmp_path, "one.py", f'def one():\n    """One."""\n{COPY}    return 1\n')
    indented = COPY.replace("    ", "        ")
    two = write(tmp_path, "two.py", f"class Two:\n    def two():\n{indented}        # End.\n")
    files = {"one": code_lines(one), "two": code_lines(two)}
    assert [(clone.length, clone.first, clone.second) for clone in find(files)] == [(8, ("one", 3), ("two", 3))]
    assert find(files, 9) == []


def test_structure_is_measured(tmp_path: Path) -> None:
    """Private reach, constructor parameters and callables are counted without options, modules and one's own names."""
    write(tmp_path, "sekuire/config.py", "class Config:\n    interval: float = 1.0\n")
    write(
        tmp_path,
        "sekuire/one.py",
        "import os\nfrom typing import Callable\nDone = Callable[[], None]\n\nclass One:\n"
        "    def __init__(self, a, done: Done, interval: float, *, on: Callable[[], None] = print) -> None:\n"
        "        self._a = a._b\n        os._exit(1)\n        super()._c()\n",
    )
    measure = Measure(tmp_path)
    assert measure.private_reach() == ["sekuire/one.py:7"]
    rows = measure.rows()
    assert rows["most constructor parameters"] == "2 (sekuire.one.One)"
    assert (rows["callables through constructors"], rows["... that are not options"]) == ("2", "1")
