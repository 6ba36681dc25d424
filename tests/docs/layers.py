"""Write the layers of sekuire into CONTRIBUTING.md, from the import contracts in setup.cfg.

``python -m tests.docs.layers --write`` replaces the part of CONTRIBUTING.md between the two marks; without
``--write`` it prints that part.
"""

from __future__ import annotations

import ast
import configparser
import sys
from typing import Dict, List

from .markdown import ROOT, read

PAGE = "CONTRIBUTING.md"
BEGIN = "<!-- layers: written by `python -m tests.docs.layers --write` -->\n"
END = "<!-- end of the layers -->\n"

_PREFIX = "importlinter:contract:"


def contracts() -> Dict[str, configparser.SectionProxy]:
    """Return the import contracts of setup.cfg by their ids."""
    settings = configparser.ConfigParser(interpolation=None)
    settings.read(ROOT / "setup.cfg", encoding="utf-8")
    return {name[len(_PREFIX) :]: settings[name] for name in settings.sections() if name.startswith(_PREFIX)}


def lines_of(text: str) -> List[str]:
    return [line for line in text.splitlines() if line]


def purpose_of(package: str) -> str:
    """Return the first line of a package's docstring."""
    tree = ast.parse((ROOT / package / "__init__.py").read_text(encoding="utf-8"))
    return (ast.get_docstring(tree) or "").partition("\n")[0].replace("``", "`")


def draw() -> str:
    """Return the part of CONTRIBUTING.md that setup.cfg and the packages' docstrings decide."""
    found = contracts()
    parts = ["```text", *lines_of(found["layers"]["layers"]), "```", "", "| package | what it does |", "|---|---|"]
    packages = sorted(path.parent.name for path in (ROOT / "sekuire").glob("*/__init__.py"))
    parts += [f"| `sekuire/{name}/` | {purpose_of(f'sekuire/{name}')} |" for name in packages]
    parts += ["", "Inside a package, from the top down:", "", "| package | its modules |", "|---|---|"]
    for name, contract in found.items():
        if name.startswith("inside-"):
            layers = [line.strip("()").replace(" | ", ", ") for line in lines_of(contract["layers"])]
            container = lines_of(contract["containers"])[0].replace(".", "/")
            parts.append(f"| `{container}/` | {' → '.join(layers)} |")
    parts += ["", "More contracts:", ""]
    for contract in found.values():
        if contract["type"] == "protected":
            modules = ", ".join(f"`{name}`" for name in lines_of(contract["protected_modules"]))
            importers = ", ".join(f"`{name}`" for name in lines_of(contract["allowed_importers"]))
            parts.append(f"- {contract['name']}: {modules} in {importers}.")
        elif contract["type"] == "forbidden":
            modules = ", ".join(f"`{name}`" for name in lines_of(contract["forbidden_modules"]))
            parts.append(f"- {contract['name']}: not {modules}.")
    return "\n".join(parts) + "\n"


def replace_in(page: str) -> str:
    """Return the page with its part on the layers written again."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{PAGE} lacks a mark: {BEGIN.strip()} … {END.strip()}")
    return before + begin + draw() + end + after


def main() -> None:
    if "--write" in sys.argv[1:]:
        page = replace_in(read(PAGE))
        (ROOT / PAGE).write_text(page, encoding="utf-8")
    else:
        print(draw(), end="")


if __name__ == "__main__":
    main()
