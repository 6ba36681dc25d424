"""Read the real clocks, and measure elapsed time so that a suspend of the machine counts.

A test may freeze the clocks of the module :mod:`time`, as freezegun does, to see what its code does at another time.
Deadlines, heartbeats and leases must go on then. The library therefore reads its clocks from the :data:`time` of this
module, in place of the standard one.

``time.monotonic()`` stands still on Linux and macOS while the machine sleeps, and the platform's clock does not. What
the platform limits, above all a lease, is therefore measured by :data:`SYSTEM_CLOCK`. What only this process waits for
is not.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import time as standard
from typing import Any, Callable, Protocol

#: Seconds by which the wall clock must run ahead of the monotonic one, between two looks, to be a suspend or a step.
LEAST_GAP = 1.0


class RealTime:
    """The clocks of the module :mod:`time`, which stay real when a test freezes those.

    They are attributes of an object, because freezegun replaces functions in the namespaces of modules.
    """

    def __init__(self) -> None:
        self.monotonic: Callable[[], float] = _unfrozen("monotonic")
        self.time: Callable[[], float] = _unfrozen("time")

    def sleep(self, seconds: float) -> None:
        """Sleep. It is looked up with each call: gevent replaces it, maybe after this module was imported."""
        standard.sleep(seconds)


def _unfrozen(name: str) -> Callable[[], float]:
    # The library may be imported while time is frozen.
    freezegun: Any = sys.modules.get("freezegun.api")
    real: Callable[[], float] = getattr(freezegun, f"real_{name}", getattr(standard, name))
    return real


#: What modules of the library use in place of the module :mod:`time`.
time = RealTime()


def use_real_time(loop: Any) -> None:
    """Have an event loop measure by the real clock also while a test freezes it: its timers would never be due."""
    if standard.monotonic is not time.monotonic:
        # The loop of another library, such as uvloop's, has a clock of its own.
        with contextlib.suppress(AttributeError):
            loop.time = time.monotonic


class Clock:
    """Measure time by two clocks: ``elapsed()`` counts a suspend of the machine, ``monotonic()`` measures waits.

    A test passes its own clock::

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
    """Offer two clocks, as the module :mod:`time` does."""

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
    if hasattr(standard, "CLOCK_BOOTTIME"):
        elapsed = functools.partial(standard.clock_gettime, standard.CLOCK_BOOTTIME)
        # A sandbox may know the name and not the clock.
        with contextlib.suppress(OSError):
            elapsed()
            return elapsed
    if platform == "darwin" and hasattr(standard, "CLOCK_MONOTONIC_RAW"):
        # mach_continuous_time, which goes on during sleep; time.monotonic() is mach_absolute_time, which does not.
        # On Linux the clock of this name stands still, but there the one above was found.
        return functools.partial(standard.clock_gettime, standard.CLOCK_MONOTONIC_RAW)
    if platform == "win32":
        # Both clocks that Python uses there, GetTickCount64 and QueryPerformanceCounter, count sleep.
        return time.monotonic
    return WallElapsed()


#: The clock of this machine.
SYSTEM_CLOCK = Clock(choose_elapsed())
