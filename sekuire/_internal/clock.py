"""Measure elapsed time so that a suspend of the machine counts.

``time.monotonic()`` stands still on Linux and macOS while the machine sleeps, and the platform's clock does not. What
the platform limits, above all a lease, is therefore measured here. What only this process waits for is not.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import time
from typing import Callable, Protocol

#: Seconds by which the wall clock must run ahead of the monotonic one, between two looks, to be a suspend or a step.
LEAST_GAP = 1.0


class Clock:
    """Two clocks of one machine: ``elapsed()`` counts a suspend, and waits are measured with ``monotonic()``.

    A test gives its own::

        clock = Clock(lambda: time.monotonic() + ahead)
        lease = Lease(clock)
    """

    __slots__ = ("elapsed", "monotonic")

    def __init__(self, elapsed: Callable[[], float], monotonic: Callable[[], float] = time.monotonic) -> None:
        self.elapsed = elapsed
        self.monotonic = monotonic

    def offset(self) -> float:
        """Return by how much ``elapsed()`` is ahead of ``monotonic()``. It grows with each suspend."""
        return self.elapsed() - self.monotonic()


class Times(Protocol):
    """Two clocks, such as those of the module :mod:`time`."""

    def monotonic(self) -> float: ...

    def time(self) -> float: ...


class WallElapsed:
    """Count the monotonic clock and add each gap by which the wall clock ran ahead of it.

    For systems without a clock that counts a suspend. A step of the wall clock forwards looks the same as a suspend, so
    time may seem to have passed that has not. A step backwards is ignored.
    """

    # Threads: any thread may call it. `_lock` guards the last readings.

    def __init__(self, source: Times = time) -> None:
        self._source = source
        self._lock = threading.Lock()
        self._added = 0.0
        self._last = (source.monotonic(), source.time())

    def __call__(self) -> float:
        with self._lock:
            now, wall = self._source.monotonic(), self._source.time()
            gap = (wall - self._last[1]) - (now - self._last[0])
            if gap >= LEAST_GAP:
                self._added += gap
            self._last = (now, wall)
            return now + self._added


def choose_elapsed(platform: str = sys.platform) -> Callable[[], float]:
    """Return the clock of this system that counts a suspend."""
    if hasattr(time, "CLOCK_BOOTTIME"):
        elapsed = functools.partial(time.clock_gettime, time.CLOCK_BOOTTIME)
        # A sandbox may know the name and not the clock.
        with contextlib.suppress(OSError):
            elapsed()
            return elapsed
    if platform == "darwin" and hasattr(time, "CLOCK_MONOTONIC_RAW"):
        # mach_continuous_time, which goes on during sleep; time.monotonic() is mach_absolute_time, which does not.
        # On Linux the clock of this name stands still, but there the one above was found.
        return functools.partial(time.clock_gettime, time.CLOCK_MONOTONIC_RAW)
    if platform == "win32":
        # Both clocks that Python uses there, GetTickCount64 and QueryPerformanceCounter, count sleep.
        return time.monotonic
    return WallElapsed()


#: The clock of this machine.
SYSTEM_CLOCK = Clock(choose_elapsed())
