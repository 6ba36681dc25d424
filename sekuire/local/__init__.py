"""Run a Sekuire platform on this machine, for development and tests: ``pip install sekuire[local]``."""

from __future__ import annotations

import importlib.util

from ..errors import ConfigurationError

__all__ = ["Fault", "Faults", "LocalPlatform"]

_missing = [
    name for name in ("flask", "cheroot", "blake3", "cryptography", "rfc8785") if importlib.util.find_spec(name) is None
]
if _missing:
    raise ConfigurationError(
        f"the local platform needs {', '.join(_missing)}, not installed here; run: pip install 'sekuire[local]'"
    )

from .faults import Fault, Faults  # noqa: E402
from .platform import LocalPlatform  # noqa: E402
