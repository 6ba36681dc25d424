"""Remember the requests that the platform answered, for tests and for reading."""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from typing import Any, Deque, Dict, List, Optional, Tuple

__all__ = ["Record"]

#: How much is kept: entries in a list, and lists (one for each task or installation). The oldest are dropped.
MAX_ENTRIES = 10_000
#: Stands for the status of a request whose connection was reset.
NO_ANSWER = 0


class Record:
    """Keep bounded lists of what was received.

    Every HTTP thread writes, any thread reads. ``_lock`` guards all lists. No other lock is acquired under it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Deque[Tuple[str, int]] = deque(maxlen=MAX_ENTRIES)
        self._counts: Dict[Tuple[str, int], int] = {}
        self._heartbeats: OrderedDict[str, Deque[Any]] = OrderedDict()
        self._completions: OrderedDict[str, Deque[Any]] = OrderedDict()
        self._progress: OrderedDict[str, Deque[Any]] = OrderedDict()

    def request(self, endpoint: str, status: int) -> None:
        with self._lock:
            self._requests.append((endpoint, status))
            self._counts[endpoint, status] = self._counts.get((endpoint, status), 0) + 1

    def heartbeat(self, installation_id: str, body: Any) -> None:
        self._add(self._heartbeats, installation_id, body)

    def completion(self, task_id: str, status: int, body: Any) -> None:
        self._add(self._completions, task_id, (status, body))

    def progress(self, task_id: str, body: Any) -> None:
        self._add(self._progress, task_id, body)

    def requests(self) -> List[Tuple[str, int]]:
        with self._lock:
            return list(self._requests)

    def count(self, endpoint: str, status: Optional[int] = None) -> int:
        with self._lock:
            return sum(n for (name, code), n in self._counts.items() if name == endpoint and status in (None, code))

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
