"""Count rare events by name, from any thread."""

from __future__ import annotations

import threading
from typing import Dict

from . import fork


class Tally:
    """Count by name. After ``tally.add("tool.blocked")``, ``tally.counts()`` is ``{"tool.blocked": 1}``."""

    # Threads: any thread may call anything. `_lock` guards the counts, and is held for one step of a dictionary.

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Dict[str, int] = {}
        fork.reset_in_child(self, Tally._reset)

    def add(self, name: str) -> None:
        """Count one more of ``name``."""
        with self._lock:
            self._counts[name] = self._counts.get(name, 0) + 1

    def counts(self) -> Dict[str, int]:
        """Return a copy of the counts."""
        with self._lock:
            return dict(self._counts)

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._counts = {}
