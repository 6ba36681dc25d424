"""Count the ends of tasks for metrics: by capability, status and code, with how long they took."""

from __future__ import annotations

import bisect
from typing import Dict, Iterable, List, Optional, Tuple

from ..wire import protocol

#: Upper bounds of the histogram of durations, in seconds.
BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0)
#: Stands for each name that is not registered: a label must not have any number of values.
OTHER = "other"


class Histogram:
    """Count durations by the bounds between which they lie."""

    __slots__ = ("buckets", "total")

    def __init__(self) -> None:
        self.buckets: List[int] = [0] * (len(BOUNDS) + 1)
        self.total = 0.0

    def observe(self, seconds: float) -> None:
        """Count one duration."""
        self.buckets[bisect.bisect_left(BOUNDS, seconds)] += 1
        self.total += seconds

    def add(self, other: Histogram) -> None:
        """Add what another one has counted."""
        self.buckets = [mine + theirs for mine, theirs in zip(self.buckets, other.buckets)]
        self.total += other.total


class Meter:
    """Count the ends of one worker's tasks.

    :param names: the registered capabilities. Each other one counts as ``other``.
    """

    # Threads: the lock of the worker's `records` guards all of it. note() is called for each task, so it does little.

    __slots__ = ("_names", "durations", "finished")

    def __init__(self, names: Iterable[str]) -> None:
        self._names = frozenset(names)
        #: (capability, status, code) → tasks.
        self.finished: Dict[Tuple[str, str, str], int] = {}
        #: Capability → how long its handlers ran.
        self.durations: Dict[str, Histogram] = {}

    def note(self, capability: str, status: str, code: Optional[str], seconds: Optional[float]) -> None:
        """Count the end of one task.

        :param status: ``completed``, ``failed``, or ``rejected`` if it was answered without running.
        :param code: of its failure. A handler's own code counts as ``other``.
        :param seconds: since its handler began; None if it never did.
        """
        name = capability if capability in self._names else OTHER
        shown = "" if code is None else code if code in protocol.RETRYABLE else OTHER
        key = (name, status, shown)
        self.finished[key] = self.finished.get(key, 0) + 1
        if seconds is not None:
            histogram = self.durations.get(name)
            if histogram is None:
                histogram = self.durations[name] = Histogram()
            histogram.observe(seconds)
