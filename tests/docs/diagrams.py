"""Draw the diagrams of the documentation: ``python -m tests.docs.diagrams --write``.

Each ``docs/diagrams/NAME.mmd`` becomes two pictures, ``docs/_static/diagrams/NAME-light.svg`` and ``…-dark.svg``. The
repository keeps them, so that neither a build nor a reader needs another program or host. Drawing needs mermaid's
command line (``npm install @mermaid-js/mermaid-cli``) and Chromium: MMDC and PUPPETEER_EXECUTABLE_PATH name them.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from typing import List

ROOT = pathlib.Path(__file__).resolve().parents[2]
SOURCES = ROOT / "docs" / "diagrams"
DRAWN = ROOT / "docs" / "_static" / "diagrams"
THEMES = {"light": "neutral", "dark": "dark"}
MARK = "<!-- drawn from {} -->"


def mark_of(source: pathlib.Path) -> str:
    """Return the line that an SVG drawn from ``source`` ends with."""
    return MARK.format(hashlib.sha256(source.read_bytes()).hexdigest())


def outdated() -> List[str]:
    """Return the diagrams that were not drawn from their present source."""
    found = []
    for source in sorted(SOURCES.glob("*.mmd")):
        for theme in THEMES:
            drawn = DRAWN / f"{source.stem}-{theme}.svg"
            if not drawn.exists() or mark_of(source) not in drawn.read_text(encoding="utf-8"):
                found.append(drawn.name)
    return found


def draw() -> None:
    DRAWN.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        browser = pathlib.Path(work, "puppeteer.json")
        path = os.environ.get("PUPPETEER_EXECUTABLE_PATH", "/usr/bin/chromium")
        browser.write_text(json.dumps({"executablePath": path, "args": ["--no-sandbox"]}))
        for source in sorted(SOURCES.glob("*.mmd")):
            for theme, mermaid in THEMES.items():
                target = DRAWN / f"{source.stem}-{theme}.svg"
                config = pathlib.Path(work, "config.json")
                config.write_text(
                    json.dumps({"theme": mermaid, "fontFamily": "system-ui, sans-serif", "htmlLabels": False,
                                "flowchart": {"htmlLabels": False}})
                )  # fmt: skip
                command = [os.environ.get("MMDC", "mmdc"), "-q", "-p", str(browser), "-c", str(config)]
                subprocess.run(
                    [*command, "-b", "transparent", "-I", f"d-{source.stem}", "-i", str(source), "-o", str(target)],
                    check=True,
                )
                drawn = re.sub(r"\s+$", "", target.read_text(encoding="utf-8"))
                target.write_text(f"{drawn}\n{mark_of(source)}\n", encoding="utf-8")


if __name__ == "__main__":
    if "--write" in sys.argv:
        draw()
    names = outdated()
    for name in names:
        print(f"{name} is out of date; run python -m tests.docs.diagrams --write", file=sys.stderr)
    sys.exit(1 if names else 0)
