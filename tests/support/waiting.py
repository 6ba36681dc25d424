"""Wait for what nobody announces, with one limit for all tests."""

from __future__ import annotations

import threading
import time
from typing import Any, Callable, List

#: Seconds after which a test that waits gives up. It guards against a hang: a machine that is ten times slower, or busy
#: with other work, must pass too. No test measures with it. The limit of a whole test (setup.cfg) is longer. So is a
#: Retry-After that comes too late for a caller (200 s).
GUARD = 180.0
#: Seconds that may pass between two readings of a clock that a test compares.
SLACK = 30.0


def until(condition: Callable[[], Any], timeout: float = GUARD, pause: float = 0.005) -> Any:
    """Return the condition's value once it is true. Look again after ``pause`` seconds."""
    end = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < end, f"it did not happen within {timeout:g} s"
        time.sleep(pause)


def client_threads() -> List[threading.Thread]:
    """Return the library's threads, without those of a local platform."""
    return [
        thread
        for thread in threading.enumerate()
        if thread.name.startswith("sekuire-") and not thread.name.startswith("sekuire-local")
    ]
