"""Remember the requests that the platform answered, for tests and for reading."""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from typing import Any, Deque, Dict, List, Mapping, NamedTuple, Optional, Tuple

from .._internal.clock import time

__all__ = ["Happening", "Record"]

#: How much is kept: entries in a list, and lists (one for each task or installation). The oldest are dropped.
MAX_ENTRIES = 10_000
#: Stands for the status of a request whose connection was reset.
NO_ANSWER = 0


class Happening(NamedTuple):
    """Describe what happened on the platform, for people.

    ``kind`` is ``login``, ``connect``, ``disconnect``, ``waiting`` (a task that no connected worker serves), ``end``
    (of a task, or of an attempt that will be repeated), ``command``, ``approval`` (one is wanted), ``decision`` (of a
    person, or ``expired``) or ``refused`` (a request).
    """

    number: int
    kind: str
    fields: Mapping[str, Any]


class Record:
    """Keep bounded lists of what was received.

    Every HTTP thread writes, any thread reads. ``_lock`` guards all lists. No other lock is acquired under it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Deque[Tuple[str, int, float]] = deque(maxlen=MAX_ENTRIES)
        self._counts: Dict[Tuple[str, int], int] = {}
        self._heartbeats: OrderedDict[str, Deque[Any]] = OrderedDict()
        self._completions: OrderedDict[str, Deque[Any]] = OrderedDict()
        self._progress: OrderedDict[str, Deque[Any]] = OrderedDict()
        self._happenings: Deque[Happening] = deque(maxlen=MAX_ENTRIES)
        self._happened = 0

    def note(self, kind: str, **fields: Any) -> Dict[str, Any]:
        """Note what happened, and return its fields. A caller may hold the hub's lock."""
        with self._lock:
            self._happened += 1
            self._happenings.append(Happening(self._happened, kind, fields))
        return fields

    def happenings_after(self, number: int) -> List[Happening]:
        """Return what happened after the one with this number, oldest first."""
        with self._lock:
            new = min(self._happened - number, len(self._happenings))
            return [self._happenings[index] for index in range(-new, 0)]

    def request(self, endpoint: str, status: int) -> None:
        with self._lock:
            self._requests.append((endpoint, status, time.time()))
            self._counts[endpoint, status] = self._counts.get((endpoint, status), 0) + 1

    def heartbeat(self, installation_id: str, body: Any) -> None:
        self._add(self._heartbeats, installation_id, body)

    def completion(self, task_id: str, status: int, body: Any) -> None:
        self._add(self._completions, task_id, (status, body))

    def progress(self, task_id: str, body: Any) -> None:
        self._add(self._progress, task_id, body)

    def requests(self) -> List[Tuple[str, int]]:
        with self._lock:
            return [(endpoint, status) for endpoint, status, _ in self._requests]

    def last_requests(self, limit: int) -> List[Tuple[str, int, float]]:
        """Return the newest requests, newest first: endpoint, status and Unix time."""
        with self._lock:
            return [self._requests[-number] for number in range(1, min(limit, len(self._requests)) + 1)]

    def count(self, endpoint: str, status: Optional[int] = None) -> int:
        with self._lock:
            return sum(n for (name, code), n in self._counts.items() if name == endpoint and status in (None, code))

    def totals(self) -> Dict[str, int]:
        """Return how many requests each endpoint has answered."""
        totals: Dict[str, int] = {}
        with self._lock:
            for (name, _), count in self._counts.items():
                totals[name] = totals.get(name, 0) + count
        return totals

    def counts(self) -> Dict[Tuple[str, int], int]:
        """Return how many requests there were for each endpoint and status."""
        with self._lock:
            return dict(self._counts)

    def happened(self) -> int:
        """Return the number of the last that happened."""
        with self._lock:
            return self._happened

    def heartbeats_of(self, installation_id: str) -> List[Any]:
        with self._lock:
            return list(self._heartbeats.get(installation_id, ()))

    def completions_of(self, task_id: str) -> List[Any]:
        with self._lock:
            return list(self._completions.get(task_id, ()))

    def progress_of(self, task_id: str) -> List[Any]:
        with self._lock:
            return list(self._progress.get(task_id, ()))

    def _add(self, lists: OrderedDict[str, Deque[Any]], key: str, entry: Any) -> None:
        with self._lock:
            entries = lists.get(key)
            if entries is None:
                entries = lists[key] = deque(maxlen=1000)
                if len(lists) > MAX_ENTRIES:
                    lists.popitem(last=False)
            entries.append(entry)
