"""When a worker has had nothing to do for a while: for drains that a scheduler starts, and that end by themselves."""

from __future__ import annotations

import math
import time
from typing import Callable, NamedTuple

from .._internal.threads import Timer

#: Longest time between two looks, in seconds, and the fewest looks within the time.
_LOOK = 1.0
_FEWEST = 4


class Activity(NamedTuple):
    """What a worker has to do now, and how many tasks have come so far.

    ``is_working``: it has something to do that needs no new word of the platform. ``is_waiting``: a task waits for its
    turn, for room or for the lease. ``is_fed``: the platform can give it tasks, and it may begin them.
    """

    received: int
    is_working: bool
    is_waiting: bool
    is_fed: bool


class IdleWatch:
    """Calls ``on_idle`` once, after ``seconds`` without a task, or ``on_away``, after as long without the platform.

    The timer's thread looks a few times within that time; nothing is done for a task, so watching costs it nothing. A
    task that came and went between two looks shows in the count. Time in which the platform could not give a task
    counts as neither idle nor busy: an outage ends nothing while it passes, and a stream that is opened anew again and
    again does not keep a worker for ever. No lock: all state is the timer's thread's after :meth:`start`.
    """

    def __init__(
        self,
        seconds: float,
        timer: Timer,
        activity: Callable[[], Activity],
        *,
        on_idle: Callable[[], None],
        on_away: Callable[[], None],
    ) -> None:
        self._looks = max(_FEWEST, math.ceil(seconds / _LOOK))
        self._pause = seconds / self._looks
        self._timer = timer
        self._activity = activity
        self._on_idle = on_idle
        self._on_away = on_away
        self._received = 0
        self._was_fed = False
        #: Looks before which the worker had nothing to do, and looks in a row before which it could not work.
        self._idle = 0
        self._away = 0

    def start(self) -> None:
        """Begin to count."""
        self._look_later()

    def _look_later(self) -> None:
        self._timer.call_at(time.monotonic() + self._pause, self._look)

    def _look(self) -> None:
        activity = self._activity()
        is_news = activity.received != self._received
        self._received = activity.received
        # What waits is work, unless the platform must come back first.
        if is_news or activity.is_working or (activity.is_waiting and activity.is_fed):
            self._idle = self._away = 0
        elif not activity.is_fed:
            self._away += 1
        else:
            self._away = 0
            # Between the last look and this one it may have been away for most of the time.
            self._idle += self._was_fed
        self._was_fed = activity.is_fed
        if self._idle >= self._looks:
            self._on_idle()
        elif self._away >= self._looks:
            self._on_away()
        else:
            self._look_later()
