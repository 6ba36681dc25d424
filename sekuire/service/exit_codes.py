"""Define the exit codes of every command: fine; failed; wrong usage or configuration; interrupted."""

from __future__ import annotations

from ..errors import ConfigurationError

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


def code_of(error: Exception) -> int:
    """Return the exit code of a command that ends because of ``error``."""
    return USAGE if isinstance(error, ConfigurationError) else FAILED
