"""docs/reliability.md names tests that exist, for every fault that it lists."""

from __future__ import annotations

import ast
from typing import Iterator, Set

from .footnotes import TEST, definitions, rewritten
from .markdown import ROOT, read


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
    named = TEST.findall(read("docs/reliability.md"))
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
    footnotes = {f"[^{label}]" for label in definitions(read("docs/reliability.md"))}
    assert [row for row in faults if row.count("|") == 4 and not footnotes & set(row.split())] == []
    assert len(faults) > 60


def test_tests_are_named_in_footnotes() -> None:
    """The tables stay narrow: ``python -m tests.docs.footnotes --write`` moves the names out of the rows."""
    page = read("docs/reliability.md")
    assert rewritten(page) == page
    assert definitions(rewritten("| a | b | `tests/a/test_b.py::test_c` |\n")) == {"c": "tests/a/test_b.py::test_c"}
