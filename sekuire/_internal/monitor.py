"""Count the threads that wait at a lock, so that waking them costs next to nothing while there are none."""

from __future__ import annotations

import threading
from typing import Optional


class Monitor:
    """Hold a reentrant lock and let threads wait for a change of what it guards. ::

        monitor = Monitor()
        with monitor.lock:
            while not ready:
                monitor.wait(1.0)

    Two monitors may share one lock: a thread then wakes only those that wait for its kind of change.

    :param lock: the lock to share; default: a new one.
    """

    __slots__ = ("_condition", "lock", "sleepers")

    def __init__(self, lock: Optional[threading.RLock] = None) -> None:
        # Entered directly: a condition's own `with` is Python code, and tasks pass here ten times.
        self.lock = threading.RLock() if lock is None else lock
        self._condition = threading.Condition(self.lock)
        #: How many threads wait.
        self.sleepers = 0

    def wait(self, timeout: float) -> None:
        """Wait for :meth:`wake`, at most ``timeout`` seconds. Needs the lock."""
        self.sleepers += 1
        try:
            self._condition.wait(timeout)
        finally:
            self.sleepers -= 1

    def wake(self) -> None:
        """Wake every thread that waits. Needs the lock."""
        if self.sleepers:
            self._condition.notify_all()
