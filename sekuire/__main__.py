"""Run the command line where its script is not on the PATH: ``python -m sekuire``."""

from __future__ import annotations

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
