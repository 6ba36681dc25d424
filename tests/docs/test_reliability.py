"""docs/reliability.md names tests that exist, for every fault that it lists."""

from __future__ import annotations

import ast
import re
from typing import Iterator, Set

from .markdown import ROOT, read

_TEST = re.compile(r"`(tests/[\w/]+\.py(?:::\w+)+)`")


def names_in(path: str) -> Set[str]:
    """The tests of a file as ``path::name`` and ``path::Class::name``."""

    def found(body: list[ast.stmt], prefix: str) -> Iterator[str]:
        for node in body:
            if isinstance(node, ast.ClassDef):
                yield from found(node.body, f"{prefix}::{node.name}")
            elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name.startswith("test_"):
                yield f"{prefix}::{node.name}"

    file = ROOT / path
    return set(found(ast.parse(file.read_text(encoding="utf-8")).body, path)) if file.is_file() else set()


def test_every_named_test_exists() -> None:
    """A test that is renamed or removed must be renamed or removed in the table too."""
    named = _TEST.findall(read("docs/reliability.md"))
    known: Set[str] = set()
    for path in {name.partition("::")[0] for name in named}:
        known |= names_in(path)
    assert sorted(set(named) - known) == []
    assert len(set(named)) > 100


def test_every_fault_has_a_test() -> None:
    """No row tells of a fault without naming the test that proves what is said."""
    text, _, figures = read("docs/reliability.md").partition("## Figures")
    assert figures
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    heads = ("| fault |", "| attack |")
    faults = [row for row in rows if not row.startswith(heads)]
    assert [row for row in faults if row.count("|") == 4 and not _TEST.search(row)] == []
    assert len(faults) > 60
