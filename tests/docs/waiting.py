"""Waiting for what nobody announces."""

from __future__ import annotations

import time
from typing import Any, Callable

#: Seconds; guards against a hang, no test measures with it.
GUARD = 30.0


def until(condition: Callable[[], Any], timeout: float = GUARD) -> Any:
    """The condition's value once it is true."""
    end = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)
