"""When a worker has had nothing to do for a while: for drains that a scheduler starts, and that end by themselves."""

from __future__ import annotations

import time
from typing import Callable, NamedTuple

from .lifecycle import Timer

#: Longest time between two looks, in seconds.
_LOOK = 1.0


class Activity(NamedTuple):
    """What a worker has to do now, and how many tasks have come so far."""

    received: int
    is_busy: bool


class IdleWatch:
    """Calls ``on_idle`` once, after ``seconds`` without a task.

    The timer's thread looks a few times within that time; nothing is done for a task, so watching costs it nothing. A
    task that came and went between two looks shows in the count. No lock: all state is the timer's thread's after
    :meth:`start`.
    """

    def __init__(
        self, seconds: float, timer: Timer, activity: Callable[[], Activity], on_idle: Callable[[], None]
    ) -> None:
        self._seconds = seconds
        self._timer = timer
        self._activity = activity
        self._on_idle = on_idle
        self._received = 0
        self._since = 0.0

    def start(self) -> None:
        """Begin to count."""
        self._since = time.monotonic()
        self._look_later(self._since)

    def _look_later(self, now: float) -> None:
        left = self._since + self._seconds - now
        self._timer.call_at(now + min(left, self._seconds / 4, _LOOK), self._look)

    def _look(self) -> None:
        now = time.monotonic()
        activity = self._activity()
        if activity.is_busy or activity.received != self._received:
            self._received = activity.received
            self._since = now
        elif now - self._since >= self._seconds:
            self._on_idle()
            return
        self._look_later(now)
