"""Run actions at their time, on a few threads that are started when they are needed.

# Threads: any thread may call anything. The monitor's lock guards the queue, the threads and the counts; a user of a
# Delivery shares it, to change its own state and the queue in one step. No lock is held while an action runs.
"""

from __future__ import annotations

import heapq
import itertools
import threading
from typing import Callable, List, NamedTuple, Optional

from .clock import time
from .logs import get_logger
from .monitor import Monitor
from .threads import LONG_WAIT, Deadline, join_all, owned_by

log = get_logger("sekuire.lifecycle")

#: Threads of one Delivery, at most.
MAX_THREADS = 4


class Action(NamedTuple):
    """Hold one function to call at ``when`` (``time.monotonic()``). Only awaited ones are counted as such."""

    when: float
    number: int
    function: Callable[[], None]
    is_awaited: bool


class Delivery:
    """Call functions at their time, each on one of a few threads of its own. ::

        delivery = Delivery("sekuire-report")
        delivery.schedule(0.5, send)
        delivery.wait_until(lambda: not delivery.awaited, Deadline(10.0))
        delivery.close()

    The threads are daemons, started when more actions are due than threads are free, and ended by :meth:`close`. An
    action that raises is logged and ends no thread. While no thread can be started, the actions wait;
    :meth:`start_threads` tries again, and :meth:`wait_until` runs them itself.

    :param name: the threads' names begin with it.
    :param owner: the object whose ``stop()`` a thread of this pool must not wait for.
    """

    def __init__(self, name: str, *, owner: object = None) -> None:
        #: Wakes the threads of the pool.
        self._work_came = Monitor()
        #: Wakes those who wait for actions to end, and for what a user of this object reports with it.
        self.changed = Monitor(self._work_came.lock)
        self.lock = self._work_came.lock
        #: What is to be done, as a heap.
        self.queue: List[Action] = []
        self.threads: List[threading.Thread] = []
        #: Awaited actions that have not ended.
        self.awaited = 0
        self.is_closed = False
        self._name = name
        self._owner = owner
        self._numbers = itertools.count()
        #: Threads inside an action. The others are free, or on their way to the queue.
        self._busy = 0

    @property
    def idle_threads(self) -> int:
        """Return how many threads wait for an action."""
        return self._work_came.sleepers

    def schedule(self, delay: float, function: Callable[[], None], *, is_awaited: bool = True) -> Optional[int]:
        """Call ``function`` in ``delay`` seconds. Return the action's number, or None once this is closed."""
        with self.lock:
            if self.is_closed:
                return None
            number = next(self._numbers)
            heapq.heappush(self.queue, Action(time.monotonic() + delay, number, function, is_awaited))
            # After the push, which may fail: nobody must wait for an action that is not there.
            self.awaited += is_awaited
            self.start_threads()
            self._work_came.wake()
            return number

    def cancel(self, number: int) -> None:
        """Forget an action that has not begun. Do nothing if it has. Needs the lock."""
        found = next((action for action in self.queue if action.number == number), None)
        if found is not None:
            self.queue.remove(found)
            heapq.heapify(self.queue)
            self.awaited -= found.is_awaited

    def hurry(self) -> None:
        """Make every action due now."""
        with self.lock:
            self.queue = [action._replace(when=0.0) for action in self.queue]
            heapq.heapify(self.queue)
            self.start_threads()
            self._work_came.wake()

    def start_threads(self) -> None:
        """Start threads until each due action has a free one. Needs the lock.

        One thread at least waits for later actions. A thread that was woken but has not taken its action yet counts
        as free, so that a burst of actions does not start more threads than it needs.
        """
        if len(self.threads) >= MAX_THREADS or not self.queue:
            return
        try:
            now = time.monotonic()
            wanted = max(1, sum(action.when <= now for action in self.queue))
            while len(self.threads) < MAX_THREADS and len(self.threads) - self._busy < wanted:
                name = f"{self._name}-{len(self.threads) + 1}"
                thread = threading.Thread(target=self._work, name=name, daemon=True)
                thread.start()
                self.threads.append(thread)
        except (RuntimeError, MemoryError):
            # Too many threads, or the interpreter is ending. The next call tries again. Whoever calls has queued an
            # action, or taken one out, and must go on.
            return

    def wait_until(self, is_done: Callable[[], bool], deadline: Deadline) -> bool:
        """Wait until ``is_done()``, which is called with the lock. Return False if ``deadline`` came first.

        The calling thread runs what is due if no thread can be started.
        """
        while True:
            action: Optional[Action] = None
            with self.lock:
                if is_done():
                    return True
                if deadline.is_expired():
                    return False
                self.start_threads()
                if not self.threads:
                    action = self._take_due()
                if action is None:
                    self.changed.wait(min(deadline.remaining(), 0.5))
            if action is not None:
                self.perform(action)

    def perform(self, action: Action) -> None:
        """Run an action that was taken out of the queue. Never raises what the action raises."""
        try:
            action.function()
        except BaseException:
            # No action of ours raises. One that does must not end the thread.
            log.exception("an action of %s failed in an unforeseen way", self._name)
        finally:
            with self.lock:
                self._busy -= 1
                if action.is_awaited:
                    self.awaited -= 1
                    self.changed.wake()

    def close(self) -> None:
        """Forget all actions and let the threads end. Nothing can be scheduled afterwards."""
        with self.lock:
            self.is_closed = True
            self.queue.clear()
            self._work_came.wake()
            self.changed.wake()

    def join(self, deadline: Deadline) -> List[str]:
        """Wait for the threads to end. Return the names of those that still run at ``deadline``."""
        with self.lock:
            threads = list(self.threads)
        return join_all(threads, deadline)

    # -- the pool's threads --

    def _work(self) -> None:
        try:
            with owned_by(self._owner):
                while True:
                    action = self._next()
                    if action is None:
                        return
                    self.perform(action)
                    # What it holds must not live until the next one comes.
                    del action
        finally:
            with self.lock:
                if not self.is_closed:
                    # An exception ends this thread. What is planned needs another one.
                    self.threads = [thread for thread in self.threads if thread is not threading.current_thread()]
                    self.start_threads()

    def _next(self) -> Optional[Action]:
        """Wait for the next due action and take it. Return None once this is closed."""
        with self.lock:
            while not self.is_closed:
                action = self._take_due()
                if action is not None:
                    return action
                delay = self.queue[0].when - time.monotonic() if self.queue else LONG_WAIT
                self._work_came.wait(min(max(delay, 0.0), LONG_WAIT))
            return None

    def _take_due(self) -> Optional[Action]:
        """Take the next action out of the queue if its time has come. Needs the lock."""
        if not self.queue or self.queue[0].when > time.monotonic():
            return None
        action = heapq.heappop(self.queue)
        self._busy += 1
        self.start_threads()
        return action
