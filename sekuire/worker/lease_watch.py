"""Watch the lease: begin what waits for it, and cancel what runs when it is lost."""

from __future__ import annotations

import math
import threading
from typing import Optional

from .._internal.clock import time
from .._internal.logs import get_logger
from .._internal.threads import LOOK_AGAIN, Timer
from ..session.heartbeat import Heartbeat
from .announcer import Announcer
from .dispatch import Dispatcher

log = get_logger("sekuire.worker")


class LeaseWatch:
    """Cancel running tasks once the lease has ended and one more heartbeat brought no new one.

    The lease counts a suspend and, on some systems, a step of the wall clock. The platform may know of neither, or
    would extend the lease if it were asked: it is asked first.
    """

    # Threads: any thread may call renew() and note_beat(); `sekuire-timer` runs _look(). `_lock` guards all fields and
    # is not held over a call of the heartbeat or the dispatcher.

    def __init__(self, heartbeat: Heartbeat, dispatcher: Dispatcher, timer: Timer, announcer: Announcer) -> None:
        self._heartbeat = heartbeat
        self._dispatcher = dispatcher
        self._timer = timer
        self._announcer = announcer
        self._lock = threading.Lock()
        self._call: Optional[int] = None
        #: The limit of the lease that counts as lost.
        self._lost: Optional[float] = None
        #: When one more heartbeat was asked for, because the lease looks ended (monotonic); else None.
        self._asked_at: Optional[float] = None

    def renew(self) -> None:
        """Watch the lease that the heartbeat has now, and start the tasks that waited for it. Return at once."""
        if self._heartbeat.lease.limit < math.inf:
            with self._lock:
                self._look_in(min(max(0.0, self._heartbeat.lease.time_left()), LOOK_AGAIN))
        if self._dispatcher.waiting:
            # On the timer's thread: this one has to go on.
            self._timer.call_at(0.0, self._dispatcher.start_waiting)

    def note_beat(self) -> None:
        """Look at the lease again if it waits for the end of a heartbeat: one has ended, answered or not."""
        # The timer's thread could not be started, and without it no task would end at its time.
        self._timer.retry()
        with self._lock:
            if self._asked_at is not None:
                self._look_in(0.0)

    def _look_in(self, delay: float) -> None:
        """Have the timer look at the lease in ``delay`` seconds. This replaces an earlier request. Needs the lock."""
        old = self._call
        self._call = self._timer.call_at(time.monotonic() + delay, self._look)
        if old is not None:
            self._timer.cancel(old)

    def _look(self) -> None:
        lease = self._heartbeat.lease
        # A beat that was sent before a suspend may hold the heartbeat's thread for its whole time.
        patience = 2 * self._heartbeat.beat_limit()
        must_ask = is_lost = False
        with self._lock:
            now, limit, left = time.monotonic(), lease.limit, lease.time_left()
            if left > 0:
                self._asked_at = None
                # Not until its end: the timer's waits do not count a suspend.
                self._look_in(min(left, LOOK_AGAIN))
            elif limit == self._lost:
                self._asked_at = None
            elif self._asked_at is None:
                must_ask = True
                self._asked_at = now
                self._look_in(patience)
            elif self._heartbeat.has_tried_since(self._asked_at) or now >= self._asked_at + patience:
                is_lost = True
                self._asked_at, self._lost = None, limit
            else:
                self._look_in(self._asked_at + patience - now)
        if must_ask:
            self._heartbeat.nudge()
        if is_lost:
            log.error("the lease has ended without a heartbeat; no task begins and running ones are cancelled until "
                      "the platform renews it")  # fmt: skip
            self._dispatcher.lose_lease()
            self._announcer.note_state("lease lost", None, "error")
