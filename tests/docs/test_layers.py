"""CONTRIBUTING.md shows the layers that the import contracts enforce."""

from __future__ import annotations

from . import layers
from .markdown import read


def test_contributing_shows_the_contracts() -> None:
    """The picture in CONTRIBUTING.md is what setup.cfg says; `python -m tests.docs.layers --write` updates it."""
    page = read(layers.PAGE)
    assert layers.replace_in(page) == page


def test_every_package_says_what_it_does() -> None:
    """Each row of the table has a purpose, taken from the package's docstring."""
    packages = [path.parent.name for path in (layers.ROOT / "sekuire").glob("*/__init__.py")]
    assert len(packages) > 10
    assert [name for name in packages if not layers.purpose_of(f"sekuire/{name}").endswith((".", "`"))] == []
