"""Keep the figures of the last minutes: how many tasks ended, how long they took, how many wait."""

from __future__ import annotations

import math
import threading
from collections import deque
from typing import Deque, Dict, List, NamedTuple, Optional, Sequence

from ...wire.protocol import parse_time
from ..store import Store
from ..streams import Hub
from .queries import Queries

__all__ = ["Figures", "Summary"]

#: Seconds that are kept, and that the numbers on top are about.
KEPT = 900
RECENT = 300
#: Seconds of one point of a chart.
STEP = 5
#: Durations of one second that are kept, and tasks that are read at the start.
_MOST_DURATIONS = 100
_MOST_READ = 20_000
#: Seconds for which a task that ended may not be visible yet.
_SETTLE = 0.2


class _Second:
    """Count what happened in one second."""

    __slots__ = ("at", "completed", "durations", "failed")

    def __init__(self, at: int) -> None:
        self.at = at
        self.completed = 0
        self.failed = 0
        self.durations: List[float] = []


class _Gauge(NamedTuple):
    at: int
    queued: int
    running: int
    workers: int


class Summary(NamedTuple):
    """Hold the numbers of the last five minutes, and the series of the charts. None: nothing ended."""

    per_second: float
    ended: int
    failed: int
    failure_share: Optional[float]
    p50: Optional[float]
    p95: Optional[float]
    queued: int
    running: int
    workers: int
    #: Unix times, and for each: tasks a second that completed and that failed, p50 and p95 in seconds, queued, running.
    series: Dict[str, List[Optional[float]]]


class Figures:
    """Collect the figures once a second, and summarise them."""

    # Threads: the dashboard's thread collects, HTTP threads summarise. `_lock` guards the lists.

    def __init__(self, store: Store, hub: Hub, queries: Queries) -> None:
        self._store = store
        self._hub = hub
        self._queries = queries
        self._lock = threading.Lock()
        self._seconds: Deque[_Second] = deque(maxlen=KEPT)
        self._gauges: Deque[_Gauge] = deque(maxlen=KEPT)
        self._until: Optional[float] = None
        self._changes = -1
        self._is_due = False
        self._depth = (0, 0)

    def look(self) -> None:
        """Collect what is new, at most once a second."""
        now = self._store.now()
        until = now - _SETTLE
        if self._until is not None and until - self._until < 1.0 and until >= self._until:
            return
        after = now - KEPT if self._until is None or until < self._until else self._until
        changes = self._store.changes()
        is_new = changes != self._changes
        # Once more after the last change, for the tasks that ended in `_SETTLE`.
        ended = self._queries.ended(after, until, _MOST_READ) if is_new or self._is_due else []
        if is_new:
            self._depth = self._queries.depth()
        self._is_due, self._changes, self._until = is_new, changes, until
        workers = len(self._hub.snapshot())
        with self._lock:
            for when, status, assigned in reversed(ended):
                second = self._second(int(when))
                if status == "completed":
                    second.completed += 1
                else:
                    second.failed += 1
                began = None if assigned is None else parse_time(assigned)
                if began is not None and len(second.durations) < _MOST_DURATIONS:
                    second.durations.append(max(0.0, when - began.timestamp()))
            self._gauges.append(_Gauge(int(now), *self._depth, workers))

    def summary(self, span: int = RECENT) -> Summary:
        """Return the numbers of the last ``span`` seconds, with a point for each :data:`STEP`."""
        now = int(self._store.now())
        last = now - now % STEP
        first = last - span
        with self._lock:
            seconds = [one for one in self._seconds if first <= one.at < last + STEP]
            gauges = [one for one in self._gauges if first <= one.at < last + STEP]
        depth = self._queries.depth()
        workers = len(self._hub.snapshot())
        recent = [one for one in seconds if one.at >= now - 60]
        completed, failed = sum(one.completed for one in seconds), sum(one.failed for one in seconds)
        durations = sorted(duration for one in seconds for duration in one.durations)
        ended = completed + failed
        return Summary(
            per_second=sum(one.completed + one.failed for one in recent) / 60.0,
            ended=ended,
            failed=failed,
            failure_share=failed / ended if ended else None,
            p50=_percentile(durations, 0.5),
            p95=_percentile(durations, 0.95),
            queued=depth[0],
            running=depth[1],
            workers=workers,
            series=_series(seconds, gauges, first, last),
        )

    def _second(self, at: int) -> _Second:
        """Return the counts of a second. Needs the lock."""
        for one in reversed(self._seconds):
            if one.at == at:
                return one
            if one.at < at:
                break
        new = _Second(at)
        self._seconds.append(new)
        return new


def _series(
    seconds: Sequence[_Second], gauges: Sequence[_Gauge], first: int, last: int
) -> Dict[str, List[Optional[float]]]:
    times = list(range(first, last, STEP))
    parts: Dict[int, List[_Second]] = {}
    for one in seconds:
        parts.setdefault(one.at - one.at % STEP, []).append(one)
    levels = {one.at - one.at % STEP: one for one in gauges}
    series: Dict[str, List[Optional[float]]] = {
        "at": [float(at) for at in times],
        "completed": [sum(one.completed for one in parts.get(at, ())) / STEP for at in times],
        "failed": [sum(one.failed for one in parts.get(at, ())) / STEP for at in times],
    }
    for name, share in (("p50", 0.5), ("p95", 0.95)):
        series[name] = [
            _percentile(sorted(each for one in parts.get(at, ()) for each in one.durations), share) for at in times
        ]
    for name in ("queued", "running", "workers"):
        series[name] = [getattr(levels[at], name) if at in levels else None for at in times]
    return series


def _percentile(values: Sequence[float], share: float) -> Optional[float]:
    """Return a percentile of sorted values."""
    return values[min(len(values) - 1, math.ceil(share * len(values)) - 1)] if values else None
