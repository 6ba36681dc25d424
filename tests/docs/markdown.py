"""The fenced blocks, tables and links of a Markdown page, as far as these pages use them."""

from __future__ import annotations

import pathlib
import re
from typing import Dict, Iterator, List, NamedTuple, Tuple

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    *sorted(str(path.relative_to(ROOT)).replace("\\", "/") for path in (ROOT / "docs").rglob("*.md")),
]

_FENCE = re.compile(r"(`{3,})(.*)")
_MARK = re.compile(r"<!-- ([a-z ]+?)(?:: (.+))? -->")
_LINK = re.compile(r"\]\(([^)\s]+)\)")


class Block(NamedTuple):
    """A fenced block; ``line`` is the number of the line before its text, ``marks`` the comments right above it."""

    page: str
    line: int
    language: str
    text: str
    marks: Dict[str, str]

    @property
    def name(self) -> str:
        return f"{self.page}: {self.text.splitlines()[0] if self.text else ''}"


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> Iterator[Block]:
    marks: Dict[str, str] = {}
    fence, begun, language = "", 0, ""
    text: List[str] = []
    for number, line in enumerate(read(page).splitlines(), 1):
        if fence:
            if line == fence:
                yield Block(page, begun, language, "\n".join(text) + "\n", marks)
                fence, marks, text = "", {}, []
            else:
                text.append(line)
            continue
        opening = _FENCE.match(line)
        mark = _MARK.match(line)
        if opening:
            fence, language = opening.groups()
            begun = number
        elif mark:
            marks[mark.group(1)] = mark.group(2) or ""
        elif line.strip():
            marks = {}
    assert not fence, f"{page}: the block at line {begun} has no end"


def table(page: str, heading: str) -> List[List[str]]:
    """The rows of the first table below a heading, without its head; cells as they are written."""
    section = re.split(rf"^#+ {re.escape(heading)}$", read(page), flags=re.MULTILINE)[1]
    rows = []
    for line in section.splitlines():
        if line.startswith("|"):
            rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
        elif rows:
            break
    return rows[2:]


def listed(page: str, heading: str) -> List[Tuple[str, str, str]]:
    """Return the definition list below a heading: name, the rest of the term, and the text in one line.

    A term is a name in backquotes with its anchor. The text is the definition in one line.
    """
    section = re.split(rf"^## {re.escape(heading)}$", read(page), flags=re.MULTILINE)[1].partition("\n## ")[0]
    found = re.findall(r"^`(\w+)`\{#[\w-]+\}(.*)\n: ((?:.+\n?)+)", section, flags=re.MULTILINE)
    return [(name, rest.strip(), " ".join(text.split())) for name, rest, text in found]


def links(page: str) -> List[str]:
    return _LINK.findall(read(page))
