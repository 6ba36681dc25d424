"""Find copied code: `python -m tests.tools.clones`. Fails when it finds more clones than the bound.

A clone is a run of at least eight lines of code that stands in two places. Blank lines, comments, docstrings and
imports are not lines of code. Indentation does not matter. A run that stands in three places counts twice.
"""

from __future__ import annotations

import argparse
import ast
import sys
import tokenize
from collections import defaultdict
from pathlib import Path
from typing import Dict, Iterable, List, NamedTuple, Set, Tuple

LINES = 8
#: The most clones that may be found. Lower it when some have been removed, never raise it.
BOUND = 10


class Line(NamedTuple):
    number: int
    text: str


class Clone(NamedTuple):
    length: int
    first: Tuple[str, int]
    second: Tuple[str, int]

    def __str__(self) -> str:
        (path, line), (other, start) = self.first, self.second
        return f"{path}:{line}: {self.length} lines stand at {other}:{start} too"


def code_lines(path: Path) -> List[Line]:
    """Return the lines of code of a file, stripped."""
    source = path.read_text(encoding="utf-8")
    left_out = lines_of_no_code(ast.parse(source))
    with path.open("rb") as file:
        code = {
            number
            for token in tokenize.tokenize(file.readline)
            if token.type not in (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
            for number in range(token.start[0], token.end[0] + 1)
        }
    lines = enumerate(source.splitlines(), 1)
    return [Line(number, text.strip()) for number, text in lines if number in code - left_out and text.strip()]


def lines_of_no_code(tree: ast.Module) -> Set[int]:
    """Return the numbers of the lines that are docstrings or imports."""
    found: Set[int] = set()
    for node in (one for one in ast.walk(tree) if isinstance(one, ast.stmt)):
        is_text = (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        )
        if is_text or isinstance(node, (ast.Import, ast.ImportFrom)):
            found.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return found


def find(files: Dict[str, List[Line]], least: int = LINES) -> List[Clone]:
    """Return the clones in ``files``, the longest first."""
    seen: Dict[Tuple[str, ...], List[Tuple[str, int]]] = defaultdict(list)
    for name, lines in files.items():
        for index in range(len(lines) - least + 1):
            seen[tuple(line.text for line in lines[index : index + least])].append((name, index))
    # Windows that follow each other in both places are one clone.
    pairs = {(places[0], other) for places in seen.values() for other in places[1:]}
    clones = []
    for (first, start), (second, begin) in sorted(pairs):
        if ((first, start - 1), (second, begin - 1)) in pairs:
            continue
        length = least
        while ((first, start + length - least + 1), (second, begin + length - least + 1)) in pairs:
            length += 1
        if first == second and begin < start + length:
            length = begin - start  # A run that overlaps its own copy.
            if length < least:
                continue
        clones.append(Clone(length, (first, files[first][start].number), (second, files[second][begin].number)))
    return sorted(clones, key=lambda clone: (-clone.length, clone))


def read(folders: Iterable[str]) -> Dict[str, List[Line]]:
    paths = sorted(path for folder in folders for path in Path(folder).rglob("*.py"))
    return {path.as_posix(): code_lines(path) for path in paths}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.tools.clones", description="Find copied code.")
    parser.add_argument("folders", nargs="*", default=["sekuire", "tests"])
    parser.add_argument("--bound", type=int, default=BOUND, metavar="N", help="how many may be found (%(default)s)")
    options = parser.parse_args()
    clones = find(read(options.folders))
    for clone in clones:
        print(clone)
    print(f"{len(clones)} clones of {LINES} lines or more; at most {options.bound} may be found")
    return 0 if len(clones) <= options.bound else 1


if __name__ == "__main__":
    sys.exit(main())
