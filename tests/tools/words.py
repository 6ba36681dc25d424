"""Refuse words that readers stumble over: `python -m tests.tools.words`. Prints each with what to write instead.

It reads the library and the documentation: names, docstrings, comments, messages and pages. It knows the plain cases;
the others are found by reading.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Iterable, Iterator, List, NamedTuple, Tuple

PLACES = ("sekuire", "docs", "README.md", "CONTRIBUTING.md", "SECURITY.md")

#: A refused expression, and what to write instead. A space stands for any gap between two words, also a line end.
REFUSED: Tuple[Tuple[str, str], ...] = (
    ("mend(s|ed|ing)?", "fix, repair"),
    ("anew", "again, retry, resend, reconnect"),
    ("for ?ever", "permanently, until …, without an end"),
    ("for good(?! reason)", "permanently, until …"),
    ("stragglers?", "overdue (a handler that outlived its task)"),
    ("befall(s|en|ing)?|befell", "inject, fault"),
    ("meanwhile", "say what runs at the same time"),
    ("(?<!there )is no(?! longer| more| other| less| one)(?= [a-z`\"'])", "is not a …, unknown …"),
    ("(cannot|can not|could not|is not to) be had", "is not available"),
    ("(throw|throws|threw|thrown|throwing) (it |them |that )?away", "discard, drop"),
    ("out of reach", "unreachable, not available"),
)


# Whole words, also those in names.
_PATTERNS = [(re.compile(f"(?<![a-z])(?:{words})(?![a-z])", re.IGNORECASE), instead) for words, instead in REFUSED]


class Finding(NamedTuple):
    path: str
    line: int
    found: str
    instead: str

    def __str__(self) -> str:
        return f'{self.path}:{self.line}: "{self.found}": write {self.instead}'


def flatten(text: str) -> Tuple[str, List[int]]:
    """Return the text with one space for each gap between words, and the line of each of its characters."""
    pieces: List[str] = []
    lines: List[int] = []
    line = 1
    # A gap may hold a line end, and then the sign of a comment or a quotation, or the quotes between two literals.
    for match in re.finditer(r"""[ \t]*["']?[ \t]*\n[ \t]*(?:[#>]+[ \t]*|[rbf]?["'])?|[ \t]+|.""", text):
        found = match.group()
        pieces.append(found if len(found) == 1 and found != "\n" else " ")
        lines.append(line)
        line += found.count("\n")
    return "".join(pieces), lines


def search(path: str, text: str) -> Iterator[Finding]:
    """Find the refused words in a text."""
    flat, lines = flatten(text)
    for pattern, instead in _PATTERNS:
        for match in pattern.finditer(flat):
            yield Finding(path, lines[match.start()], match.group(), instead)


def files(places: Iterable[str]) -> Iterator[Path]:
    """Return the Python files and pages in ``places``."""
    for place in map(Path, places):
        if place.is_dir():
            yield from (path for path in sorted(place.rglob("*")) if path.suffix in (".py", ".md", ".html", ".js"))
        else:
            yield place


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.tools.words", description=__doc__)
    parser.add_argument("places", nargs="*", default=PLACES, help="files and folders (%(default)s)")
    parser.add_argument("--count", action="store_true", help="print how many there are in each folder instead")
    options = parser.parse_args()
    findings = [
        finding
        for path in files(options.places)
        if "_build" not in path.parts
        for finding in sorted(search(path.as_posix(), path.read_text(encoding="utf-8")), key=lambda one: one.line)
    ]
    if options.count:
        counts = Counter("/".join(finding.path.split("/")[:2]) for finding in findings)
        for place, count in sorted(counts.items()):
            print(f"{count:5d} {place}")
    else:
        for finding in findings:
            print(finding)
    print(f"{len(findings)} refused words")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
