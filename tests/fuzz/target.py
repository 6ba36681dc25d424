"""The process that libFuzzer runs in; its arguments are libFuzzer's. :mod:`tests.fuzz.__main__` starts it."""

from __future__ import annotations

import atexit
import logging
import sys

import atheris

with atheris.instrument_imports(include=["sekuire"]):
    from .targets import FILES, run


def main() -> None:
    # Warnings are part of what is watched; nobody reads a million of them.
    logging.getLogger("sekuire").propagate = False
    atexit.register(FILES.close)
    atheris.Setup(sys.argv, run)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
