"""Keep the tests that docs/reliability.md names in footnotes, so that its tables stay narrow.

``python -m tests.docs.footnotes --write`` turns each `path::test` of a row into a footnote and sorts the list of
footnotes. A row may therefore be written, or merged, with the whole names in it.
"""

from __future__ import annotations

import re
import sys
from typing import Dict, List

from .markdown import ROOT, read

PAGE = "docs/reliability.md"
TEST = re.compile(r"`(tests/[\w/]+\.py(?:::\w+)+)`")
_DEFINITION = re.compile(r"^\[\^([\w.]+)\]: `(.+)`\n", re.MULTILINE)


def definitions(page: str) -> Dict[str, str]:
    """Return the test of each footnote."""
    return dict(_DEFINITION.findall(page))


def rewritten(page: str) -> str:
    """Return the page with a footnote for each test that a row names, and with no other footnote."""
    known = definitions(page)
    body = _DEFINITION.sub("", page).rstrip("\n") + "\n"
    named = {known[label]: label for label in re.findall(r"\[\^([\w.]+)\]", body) if label in known}

    def footnote(test: str) -> str:
        if test not in named:
            path, _, name = test.partition("::")
            label = name.rpartition("::")[2][len("test_") :]
            file = path.rpartition("/")[2][len("test_") : -len(".py")]
            wanted = (label, f"{file}.{label}", f"{path[len('tests/') : -len('.py')].replace('/', '.')}.{label}")
            named[test] = next(one for one in wanted if one not in named.values())
        return f"[^{named[test]}]"

    def row(line: str) -> str:
        if not line.startswith("|") or not TEST.search(line):
            return line
        cells = line.split(" | ")
        cells[-1] = re.sub(r"\](, )\[", "] [", TEST.sub(lambda found: footnote(found.group(1)), cells[-1]))
        return " | ".join(cells)

    lines: List[str] = [row(line) for line in body.splitlines()]
    notes = [f"[^{label}]: `{test}`" for test, label in sorted(named.items())]
    return "\n".join([*lines, "", *notes]) + "\n"


def main() -> None:
    """Write the page, or say whether it is as it should be."""
    page = read(PAGE)
    if "--write" in sys.argv[1:]:
        (ROOT / PAGE).write_text(rewritten(page), encoding="utf-8")
    elif rewritten(page) != page:
        raise SystemExit(f"{PAGE} names tests in its rows: python -m tests.docs.footnotes --write")


if __name__ == "__main__":
    main()
