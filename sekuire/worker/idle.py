"""Stop a worker that has had nothing to do for a while: for drains that a scheduler starts."""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

from .._internal.clock import time
from .._internal.threads import Timer
from ..errors import TransportError
from .life import Life

#: Longest time between two looks, in seconds, and the fewest looks within the time.
_LOOK = 1.0
_FEWEST = 4


class Activity(NamedTuple):
    """Describe what a worker has to do now, and how many tasks have come so far.

    ``is_working``: it has something to do that needs nothing more from the platform. ``is_waiting``: a task waits for
    its turn, for room or for the lease. ``is_fed``: the platform can give it tasks, and it may begin them.
    """

    received: int
    is_working: bool
    is_waiting: bool
    is_fed: bool


class Watched(Protocol):
    """Report what a worker has to do."""

    def activity(self) -> Activity:
        """Return what it has to do now."""


class IdleWatch:
    """Stop the worker after ``seconds`` without a task. Let it fail after as long without the platform.

    The timer's thread looks a few times within that time; nothing is done for a task, so watching costs it nothing. A
    task that came and went between two looks shows in the count. Time in which the platform could not give a task
    counts as neither idle nor busy. So an outage ends nothing while it passes, and a stream that breaks again and again
    does not keep a worker running permanently.

    :param seconds: the option ``stop_when_idle``.
    :param life: what is stopped.
    :param watched: knows what the worker has to do.
    """

    # Threads: only `sekuire-timer` reads and writes the fields after start(). No lock.

    def __init__(self, seconds: float, timer: Timer, life: Life, watched: Watched) -> None:
        self._seconds = seconds
        self._looks = max(_FEWEST, math.ceil(seconds / _LOOK))
        self._pause = seconds / self._looks
        self._timer = timer
        self._life = life
        self._watched = watched
        self._received = 0
        self._was_fed = False
        #: Looks before which the worker had nothing to do, and looks in a row before which it could not work.
        self._idle = 0
        self._away = 0

    def start(self) -> None:
        """Begin to watch."""
        self._look_later()

    def _look_later(self) -> None:
        self._timer.call_at(time.monotonic() + self._pause, self._look)

    def _look(self) -> None:
        activity = self._watched.activity()
        is_news = activity.received != self._received
        self._received = activity.received
        # A waiting task is work, unless it waits for the platform.
        if is_news or activity.is_working or (activity.is_waiting and activity.is_fed):
            self._idle = self._away = 0
        elif not activity.is_fed:
            self._away += 1
        else:
            self._away = 0
            # Between the last look and this one the platform may have been unreachable for most of the time.
            self._idle += self._was_fed
        self._was_fed = activity.is_fed
        if self._idle >= self._looks:
            self._life.request_stop(reason=f"idle for {self._seconds:g} s")
        elif self._away >= self._looks:
            self._fail()
        else:
            self._look_later()

    def _fail(self) -> None:
        # As an error: to stop without one would say that the work is done.
        within = f"within stop_when_idle ({self._seconds:g} s)"
        if not self._life.was_connected:
            problem = f"there was no task stream {within}"
        elif not self._life.is_connected:
            problem = f"the task stream was lost and not open again {within}"
        else:
            problem = f"the lease was lost and not renewed {within}"
        self._life.fail(TransportError(problem))
