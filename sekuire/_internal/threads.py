"""How threads live here: shared deadlines, periodic and timer threads, ordered callbacks, exit and fork."""

from __future__ import annotations

import atexit
import concurrent.futures.thread
import contextlib
import heapq
import itertools
import os
import sys
import threading
import time
import weakref
from collections import deque
from typing import Any, Callable, Deque, Dict, Iterable, Iterator, List, Optional, Tuple

from ..errors import SekuireError
from . import fork
from .logs import get_logger

log = get_logger("sekuire.lifecycle")

#: Longest single wait in seconds; a wait for "ever" is a loop of these, so that platforms with small limits accept it.
LONG_WAIT = 3600.0
#: Longest wait between two looks at a clock that counts a suspend. The wait itself stands still during one.
LOOK_AGAIN = 1.0


class Deadline:
    """A moment on the monotonic clock, shared by all steps of one stop; it may be brought forward, never put off.

    Any thread may call anything; the one field is replaced whole, so no lock is needed.
    """

    __slots__ = ("_end",)

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def remaining(self) -> float:
        """Seconds left, 0 when it has passed."""
        return max(0.0, self._end - time.monotonic())

    def is_expired(self) -> bool:
        return time.monotonic() >= self._end

    def shorten(self, seconds: float) -> None:
        """End in ``seconds`` from now, unless it ends sooner already."""
        self._end = min(self._end, time.monotonic() + seconds)

    def earlier(self, seconds: float) -> Deadline:
        """A view of this deadline that lies ``seconds`` before it, and moves with it."""
        return _Earlier(self, seconds)


class _Earlier(Deadline):
    __slots__ = ("_lead", "_whole")

    def __init__(self, whole: Deadline, lead: float) -> None:
        super().__init__(whole.remaining())
        self._whole = whole
        self._lead = lead

    def remaining(self) -> float:
        return max(0.0, min(self._whole.remaining() - self._lead, super().remaining()))

    def is_expired(self) -> bool:
        return self.remaining() <= 0.0


def join_all(threads: Iterable[threading.Thread], deadline: Deadline) -> List[str]:
    """Join every thread by one deadline; the names of those that still run."""
    for thread in threads:
        if thread is not threading.current_thread() and thread.ident is not None:
            thread.join(deadline.remaining())
    return [thread.name for thread in threads if thread.is_alive() and thread is not threading.current_thread()]


# -- who owns the current thread --------------------------------------------------------------------------------------

_current = threading.local()


@contextlib.contextmanager
def owned_by(owner: object) -> Iterator[None]:
    """Mark the current thread as working for ``owner``, so that a stop asked for from it does not wait for itself."""
    stack: List[object] = _current.__dict__.setdefault("owners", [])
    stack.append(owner)
    try:
        yield
    finally:
        stack.pop()


def is_owned_by(owner: object) -> bool:
    """Whether the current thread works for ``owner``."""
    return any(one is owner for one in _current.__dict__.get("owners", ()))


# -- threads ----------------------------------------------------------------------------------------------------------


def spawn(run: Callable[..., object], name: str, *args: Any) -> Optional[threading.Thread]:
    """Start a daemon thread that calls ``run(*args)``, and return it.

    Return None if no thread can be started: there are too many, or the interpreter is ending.
    """
    thread = threading.Thread(target=run, name=name, args=args, daemon=True)
    return thread if try_start(thread) else None


def try_start(thread: threading.Thread) -> bool:
    """Start ``thread``. Return False if no thread can be started now."""
    try:
        thread.start()
    except RuntimeError:
        return False
    return True


class PeriodicThread:
    """Call ``beat`` at once and then at every interval, on a daemon thread of its own.

    ``start``, ``nudge``, ``reconsider``, ``stop`` and ``join`` may be called from any thread; ``beat`` and ``interval``
    run on this one. The wake event is the timer: :meth:`nudge` brings the next beat forward, :meth:`stop` ends the
    thread after the current beat. An exception of ``beat`` is logged and does not end it.

    :param clock: what the interval is measured with. A clock that counts a suspend is looked at every second.
    """

    def __init__(
        self,
        name: str,
        beat: Callable[[], None],
        interval: Callable[[], float],
        owner: object = None,
        clock: Optional[Callable[[], float]] = None,
    ) -> None:
        self._beat = beat
        self._interval = interval
        self._owner = owner
        self._clock = time.monotonic if clock is None else clock
        self._longest_wait = LONG_WAIT if clock is None else LOOK_AGAIN
        self._wake = threading.Event()
        # Written before the event is set, and read after it is cleared.
        self._nudged = False
        self._stopping = False
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self.thread.start()

    def nudge(self) -> None:
        """Beat now, or again after the beat in progress."""
        self._nudged = True
        self._wake.set()

    def reconsider(self) -> None:
        """Ask for the interval again: it has become shorter."""
        self._wake.set()

    def stop(self) -> None:
        self._stopping = True
        self._wake.set()

    def join(self, deadline: Deadline) -> bool:
        """Wait for the thread's end; whether it came."""
        return not join_all([self.thread], deadline)

    def _run(self) -> None:
        with owned_by(self._owner):
            while not self._stopping:
                self._nudged = False
                started = self._clock()
                try:
                    self._beat()
                except Exception:
                    log.exception("%s: one round failed; the next comes at its time", self.thread.name)
                except BaseException as error:  # noqa: BLE001  # sys.exit() in a user's callback must not end it.
                    log.error("%s: one round raised %s; ignored", self.thread.name, type(error).__name__)
                self._wait_from(started)

    def _wait_from(self, started: float) -> None:
        """Wait until the next beat is due."""
        while True:
            self._wake.clear()
            if self._stopping or self._nudged:
                return
            delay = started + self._interval() - self._clock()
            if delay <= 0:
                return
            self._wake.wait(min(delay, self._longest_wait))


class Timer:
    """Calls functions at moments of the monotonic clock, on one daemon thread made with the first of them.

    Any thread may call :meth:`call_at`, :meth:`cancel` and :meth:`close`. ``_condition`` guards the heap and which
    thread it is; the functions are called outside it. They must be quick and must not block: they share the thread.
    While no thread can be started the calls are kept, and each further :meth:`call_at` tries again.
    """

    def __init__(self, name: str = "sekuire-timer", owner: object = None) -> None:
        self._name = name
        self._owner = owner
        self._condition = threading.Condition()
        self._heap: List[Tuple[float, int]] = []
        self._functions: Dict[int, Callable[[], None]] = {}
        self._numbers = itertools.count()
        self._thread: Optional[threading.Thread] = None
        self._closed = False
        self._warned = False

    def call_at(self, when: float, function: Callable[[], None]) -> int:
        """Call ``function`` at ``when`` (``time.monotonic()``); the number is for :meth:`cancel`."""
        with self._condition:
            number = next(self._numbers)
            if self._closed:
                return number
            self._functions[number] = function
            heapq.heappush(self._heap, (when, number))
            if self._thread is None:
                self._thread = spawn(self._run, self._name)
            elif self._heap[0][1] == number:
                self._condition.notify()
            missing = self._thread is None
            warn = missing and not self._warned
            self._warned = missing
        if warn:
            log.warning("%s: no new thread can be started, so timed calls come late; the next one tries again",
                        self._name)  # fmt: skip
        return number

    def cancel(self, number: int) -> None:
        """Forget a call that has not been made; harmless afterwards."""
        with self._condition:
            self._functions.pop(number, None)
            # Without this, tasks that end long before their deadline would pile up here.
            if len(self._heap) > 64 and len(self._heap) > 2 * len(self._functions):
                self._heap = [entry for entry in self._heap if entry[1] in self._functions]
                heapq.heapify(self._heap)

    def close(self) -> None:
        """Forget all calls and let the thread end."""
        with self._condition:
            self._closed = True
            self._functions.clear()
            self._heap.clear()
            self._condition.notify()

    def join(self, deadline: Deadline) -> bool:
        thread = self._thread
        return thread is None or not join_all([thread], deadline)

    def _run(self) -> None:
        with self._condition:
            if not _serves(self._thread):
                return
            self._thread = threading.current_thread()
        with owned_by(self._owner):
            while True:
                function = self._next()
                if function is None:
                    return
                try:
                    function()
                except Exception:
                    log.exception("%s: a timed call failed", self._name)

    def _next(self) -> Optional[Callable[[], None]]:
        with self._condition:
            while not self._closed:
                if not self._heap:
                    self._condition.wait(LONG_WAIT)
                    continue
                when, number = self._heap[0]
                delay = when - time.monotonic()
                if number in self._functions and delay > 0:
                    self._condition.wait(min(delay, LONG_WAIT))
                    continue
                heapq.heappop(self._heap)
                function = self._functions.pop(number, None)
                if function is not None:
                    return function
            return None


class CallbackThread:
    """Runs users' callbacks one after the other, in order, on one daemon thread made with the first of them.

    Any thread may call :meth:`post` and :meth:`close`. ``_condition`` guards the queue and which thread it is;
    callbacks run outside it. One that raises is logged; one that hangs delays only callbacks, of which at most
    ``limit`` wait. While no thread can be started they wait too: each further :meth:`post`, and :meth:`close`, tries
    again.
    """

    def __init__(self, name: str = "sekuire-callback", owner: object = None, limit: int = 1000) -> None:
        self._name = name
        self._owner = owner
        self._limit = limit
        self._condition = threading.Condition()
        self._queue: Deque[Tuple[Callable[..., object], Tuple[Any, ...]]] = deque()
        self._thread: Optional[threading.Thread] = None
        self._closed = False
        self._full = False
        self._warned = False

    def post(self, callback: Callable[..., object], *args: Any) -> None:
        """Call ``callback(*args)`` soon. After :meth:`close`, or with ``limit`` waiting, it is left out."""
        with self._condition:
            if self._closed:
                return
            full = len(self._queue) >= self._limit
            warn = full and not self._full
            self._full = full
            if not full:
                self._queue.append((callback, args))
            self._need_thread()
            missing = self._thread is None
            warn_missing = missing and not self._warned
            self._warned = missing
        if warn_missing:
            log.warning("%s: no new thread can be started, so callbacks come late; the next one tries again",
                        self._name)  # fmt: skip
        if warn:
            log.warning("%s: %d callbacks wait behind one that does not return; further ones are left out",
                        self._name, self._limit)  # fmt: skip

    def close(self) -> None:
        """Take no more; those waiting still run, then the thread ends."""
        with self._condition:
            self._closed = True
            self._need_thread()
            left_out = len(self._queue) if self._thread is None else 0
        if left_out:
            log.warning("%s: no new thread can be started; %d callbacks are left out", self._name, left_out)

    def join(self, deadline: Deadline) -> bool:
        thread = self._thread
        return thread is None or not join_all([thread], deadline)

    def _need_thread(self) -> None:
        """Have the thread, where there is something to do for it, and wake it. Needs the lock."""
        if self._thread is None and self._queue:
            self._thread = spawn(self._run, self._name)
        self._condition.notify()

    def _run(self) -> None:
        with self._condition:
            if not _serves(self._thread):
                return
            self._thread = threading.current_thread()
        with owned_by(self._owner):
            while True:
                with self._condition:
                    while not self._queue and not self._closed:
                        self._condition.wait(LONG_WAIT)
                    if not self._queue:
                        return
                    callback, args = self._queue.popleft()
                try:
                    callback(*args)
                except Exception:
                    log.exception("a callback failed: %r", callback)
                except BaseException as error:  # noqa: BLE001  # sys.exit() must not end the thread of all callbacks.
                    log.error("a callback raised %s; ignored", type(error).__name__)


def _serves(known: Optional[threading.Thread]) -> bool:
    """Whether the current thread is the one to serve, where ``known`` is the one that counts as started.

    A Ctrl-C can end :func:`spawn` while the thread starts all the same; of two, the first to ask serves.
    """
    return known is None or known is threading.current_thread()


# -- the process: exit and fork ---------------------------------------------------------------------------------------

_leavers: weakref.WeakSet[Any] = weakref.WeakSet()
_leave_lock = threading.Lock()
_hooked = False


def _after_fork() -> None:
    # A thread of the parent may have held it; in the child nobody would ever let it go.
    global _leave_lock
    _leave_lock = threading.Lock()
    # A handler's thread that forks is the child's main thread. At the child's end concurrent.futures would have it join
    # itself, and multiprocessing would take the error for a failed child: exit code 1.
    thread = threading.current_thread()
    if thread.name.startswith("sekuire-"):
        getattr(concurrent.futures.thread, "_threads_queues", {}).pop(thread, None)


fork.call_in_child(_after_fork)


def at_exit(leaver: Any) -> None:
    """Have ``leaver.leave()`` called when the interpreter ends, before it joins executors' threads.

    It is called in the process that registered it only, and must start no thread.
    """
    global _hooked
    with _leave_lock:
        _leavers.add(leaver)
        if not _hooked:
            _hooked = True
            # concurrent.futures joins its threads in such a hook too, which it registers when it is imported, and hooks
            # run last in, first out: a plain atexit function would only run after every handler had returned.
            import concurrent.futures.thread  # noqa: F401

            register = getattr(threading, "_register_atexit", atexit.register)
            register(_leave)


def forget_exit(leaver: Any) -> None:
    """Undo :func:`at_exit`."""
    with _leave_lock:
        _leavers.discard(leaver)


def _leave() -> None:
    with _leave_lock:
        leavers = list(_leavers)
    for leaver in leavers:
        if leaver.pid == os.getpid():
            with contextlib.suppress(Exception):
                leaver.leave()


def check_process(pid: int, what: str) -> None:
    """Refuse to use an object that was started before a fork.

    :raises SekuireError: this process is not ``pid``.
    """
    if os.getpid() != pid:
        raise SekuireError(
            f"this {what} was started in process {pid}, and its threads and sockets stayed there; "
            f"after fork() make a new {what} in the child (in gunicorn: in post_fork, not before preload)"
        )


# -- processes that run handlers for another --------------------------------------------------------------------------

_in_executor = False


def enter_executor() -> None:
    """This process runs handlers for the worker of another one: nothing that it imports may start a worker."""
    global _in_executor
    _in_executor = True


def is_in_executor() -> bool:
    """Whether this process runs handlers for the worker of another one."""
    # The second: a spawned process that imports its parent's main module has told nobody yet what it is for.
    spawned = sys.modules.get("multiprocessing.process")
    return _in_executor or (spawned is not None and getattr(spawned.current_process(), "_inheriting", False))


def check_starter(what: str) -> None:
    """Refuse to start in a process that runs handlers for another one, which has imported the module that starts it.

    :raises SekuireError: it is such a process.
    """
    if is_in_executor():
        raise SekuireError(
            f"a process that runs handlers was about to start a {what} of its own, because it imports the module that "
            "does so; start it under `if __name__ == '__main__':`, or keep handlers in a module apart (TaskRegistry)"
        )
