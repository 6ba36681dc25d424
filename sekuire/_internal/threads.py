"""Share deadlines, run periodic work, timed calls and callbacks on threads, and act when the process ends or forks."""

from __future__ import annotations

import abc
import atexit
import concurrent.futures.thread
import contextlib
import heapq
import itertools
import os
import sys
import threading
import weakref
from collections import deque
from typing import Any, Callable, Deque, Dict, Iterable, Iterator, List, Optional, Protocol, Tuple

from ..errors import SekuireError
from . import fork
from .clock import Clock, time
from .greenlets import is_thrown, patched_by
from .logs import get_logger

log = get_logger("sekuire.lifecycle")

#: Longest single wait in seconds; a wait for "ever" is a loop of these, so that platforms with small limits accept it.
LONG_WAIT = 3600.0
#: Longest wait between two looks at a clock that counts a suspend. The wait itself stands still during one.
LOOK_AGAIN = 1.0
#: Seconds by which a periodic thread may be late before that is worth a warning.
_LATE = 5.0

_Call = Tuple[Callable[..., object], Tuple[Any, ...]]


class Deadline:
    """Hold a moment that all steps of one stop share. It can move to an earlier time, never to a later one.

    ::

        deadline = Deadline(30.0)
        join_all(threads, deadline)
        flush(deadline.remaining())
    """

    # Threads: any thread may call anything. The one field is replaced whole, so there is no lock.

    __slots__ = ("_end",)

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def remaining(self) -> float:
        """Return the seconds left, 0 after the deadline."""
        return max(0.0, self._end - time.monotonic())

    def is_expired(self) -> bool:
        """Return True if the deadline has passed."""
        return time.monotonic() >= self._end

    def shorten(self, seconds: float) -> None:
        """End in ``seconds`` from now, unless it ends sooner already."""
        self._end = min(self._end, time.monotonic() + seconds)

    def earlier(self, seconds: float) -> Deadline:
        """Return a deadline that lies ``seconds`` before this one, and moves with it."""
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
    """Join every thread by one deadline. Return the names of those that still run."""
    for thread in threads:
        if thread is not threading.current_thread() and thread.ident is not None:
            thread.join(deadline.remaining())
    return [thread.name for thread in threads if thread.is_alive() and thread is not threading.current_thread()]


# -- who owns the current thread --------------------------------------------------------------------------------------

# By the thread's number. A threading.local would be one for all greenlets if gevent or eventlet patches later.
_owners: Dict[int, List[object]] = {}


@contextlib.contextmanager
def owned_by(owner: object) -> Iterator[None]:
    """Mark the current thread as working for ``owner``, so that a stop asked for from it does not wait for itself."""
    number = threading.get_ident()
    stack = _owners.setdefault(number, [])
    stack.append(owner)
    try:
        yield
    finally:
        stack.pop()
        if not stack:
            del _owners[number]


def is_owned_by(owner: object) -> bool:
    """Return True if the current thread works for ``owner``."""
    return any(one is owner for one in _owners.get(threading.get_ident(), ()))


def owner_of_thread() -> object:
    """Return the object that the current thread works for, None if it is not one of the library's."""
    stack = _owners.get(threading.get_ident())
    return stack[-1] if stack else None


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
    except (RuntimeError, MemoryError):
        return False
    return True


class Periodic(Protocol):
    """Do the work that a :class:`PeriodicThread` repeats."""

    def beat(self) -> None:
        """Do one round of the work."""

    def interval(self) -> float:
        """Return the seconds from the start of one round to the start of the next."""


class PeriodicThread:
    """Call ``work.beat()`` at once and then at every interval, on a daemon thread of its own.

    ::

        thread = PeriodicThread("sekuire-heartbeat", heartbeat)
        thread.start()
        thread.nudge()
        thread.stop()

    :param clock: measures the interval. It may count a suspend, so it is read every second.
    """

    # Threads: any thread may call the methods; `beat` and `interval` run on this one. The wake event is the timer.
    # `_is_nudged` and `_is_stopping` are written before it is set, and read after it is cleared.

    def __init__(self, name: str, work: Periodic, owner: object = None, clock: Optional[Clock] = None) -> None:
        self._work = work
        self._owner = owner
        self._now = time.monotonic if clock is None else clock.elapsed
        self._longest_wait = LONG_WAIT if clock is None else LOOK_AGAIN
        self._wake = threading.Event()
        self._is_nudged = False
        self._is_stopping = False
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Start the thread.

        :raises RuntimeError: no thread can be started.
        """
        self.thread.start()

    def nudge(self) -> None:
        """Beat now, or again after the beat in progress."""
        self._is_nudged = True
        self._wake.set()

    def reconsider(self) -> None:
        """Ask for the interval again, because it has become shorter."""
        self._wake.set()

    def stop(self) -> None:
        """Have the thread end after the beat in progress."""
        self._is_stopping = True
        self._wake.set()

    def join(self, deadline: Deadline) -> bool:
        """Wait for the thread's end. Return True if it has ended."""
        return not join_all([self.thread], deadline)

    def _run(self) -> None:
        with owned_by(self._owner):
            while not self._is_stopping:
                self._is_nudged = False
                started = self._now()
                try:
                    self._work.beat()
                except Exception:
                    log.exception("%s: one round failed; the next comes at its time", self.thread.name)
                except BaseException as error:  # sys.exit() in a user's callback must not end it.
                    if is_thrown(error):
                        raise
                    log.error("%s: one round raised %s; ignored", self.thread.name, type(error).__name__)
                self._wait_from(started)

    def _wait_from(self, started: float) -> None:
        """Wait until the next beat is due."""
        while True:
            self._wake.clear()
            if self._is_stopping or self._is_nudged:
                return
            delay = started + self._work.interval() - self._now()
            if delay <= 0:
                return
            self._wait(min(delay, self._longest_wait))

    def _wait(self, seconds: float) -> None:
        """Wait, and warn if this thread was kept from going on afterwards. A suspend does not count."""
        asked_at = time.monotonic()
        self._wake.wait(seconds)
        late = time.monotonic() - asked_at - seconds
        if late >= _LATE:
            library = patched_by()
            log.warning(
                "%s could not run for %.0f s: %s", self.thread.name, late,
                "the machine is overloaded, or code holds the interpreter" if library is None else
                f"under {library} a greenlet that computes or blocks stops all others (docs/gevent.md)",
            )  # fmt: skip


class _CallThread(abc.ABC):
    """Make calls one after the other on one daemon thread, which is started with the first of them.

    If no thread can be started the calls are kept, with one warning, and the next one tries again.
    """

    # Threads: any thread may call the public methods. `_condition` guards what is to be called and which thread it is.
    # The calls are made without it.

    #: What is called, for log lines.
    _calls = "calls"

    def __init__(self, name: str, owner: object) -> None:
        self._name = name
        self._owner = owner
        self._condition = threading.Condition()
        self._thread: Optional[threading.Thread] = None
        self._is_closed = False
        self._has_warned = False

    def join(self, deadline: Deadline) -> bool:
        """Wait for the thread's end. Return True if it has ended, or was never started."""
        thread = self._thread
        return thread is None or not join_all([thread], deadline)

    @abc.abstractmethod
    def _take(self) -> Optional[_Call]:
        """Wait for the next call and take it out. Return None to end the thread. Needs the lock; a wait releases it."""

    def _start_thread(self) -> bool:
        """Start the thread. Return True if that fails for the first time. Needs the lock."""
        self._thread = spawn(self._run, self._name)
        is_missing = self._thread is None
        is_new = is_missing and not self._has_warned
        self._has_warned = is_missing
        return is_new

    def _warn(self) -> None:
        log.warning("%s: no new thread can be started, so %s come late; the next one tries again",
                    self._name, self._calls)  # fmt: skip

    def _run(self) -> None:
        with self._condition:
            # A Ctrl-C can end spawn() while the thread starts all the same. Of two threads, the first one serves.
            if self._thread is not None and self._thread is not threading.current_thread():
                return
            self._thread = threading.current_thread()
        with owned_by(self._owner):
            while True:
                with self._condition:
                    call = self._take()
                if call is None:
                    return
                function, args = call
                try:
                    function(*args)
                except Exception:
                    log.exception("%s: a %s failed: %r", self._name, self._calls[:-1], function)
                except BaseException as error:  # sys.exit() must not end the thread of all calls.
                    if is_thrown(error):
                        raise
                    log.error("%s: a %s raised %s; ignored", self._name, self._calls[:-1], type(error).__name__)


class Timer(_CallThread):
    """Call functions at moments of the monotonic clock, on one daemon thread.

    The functions must be quick and must not block, because they share the thread. ::

        timer = Timer()
        number = timer.call_at(time.monotonic() + 5.0, cancel_the_task)
        timer.cancel(number)
        timer.close()
    """

    _calls = "timed calls"

    def __init__(self, name: str = "sekuire-timer", owner: object = None) -> None:
        super().__init__(name, owner)
        self._heap: List[Tuple[float, int]] = []
        self._functions: Dict[int, Callable[[], None]] = {}
        self._numbers = itertools.count()

    def call_at(self, when: float, function: Callable[[], None]) -> int:
        """Call ``function`` at ``when`` (``time.monotonic()``). Return a number for :meth:`cancel`."""
        with self._condition:
            number = next(self._numbers)
            if self._is_closed:
                return number
            self._functions[number] = function
            heapq.heappush(self._heap, (when, number))
            if self._thread is not None and self._heap[0][1] == number:
                self._condition.notify()
            must_warn = self._thread is None and self._start_thread()
        if must_warn:
            self._warn()
        return number

    def retry(self) -> None:
        """Start the thread if calls wait for one that could not be started."""
        with self._condition:
            if self._heap and self._thread is None and not self._is_closed:
                self._start_thread()

    def cancel(self, number: int) -> None:
        """Forget a call that has not been made. After the call it does nothing."""
        with self._condition:
            self._functions.pop(number, None)
            # Without this, tasks that end long before their deadline would pile up here.
            if len(self._heap) > 64 and len(self._heap) > 2 * len(self._functions):
                self._heap = [entry for entry in self._heap if entry[1] in self._functions]
                heapq.heapify(self._heap)

    def close(self) -> None:
        """Forget all calls and let the thread end."""
        with self._condition:
            self._is_closed = True
            self._functions.clear()
            self._heap.clear()
            self._condition.notify()

    def _take(self) -> Optional[_Call]:
        while not self._is_closed:
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
                return function, ()
        return None


class CallbackThread(_CallThread):
    """Run users' callbacks one after the other, in order, on one daemon thread.

    One that hangs delays only callbacks, of which at most ``limit`` wait. ::

        callbacks = CallbackThread()
        callbacks.post(print, "paused")
        callbacks.close()
    """

    _calls = "callbacks"

    def __init__(self, name: str = "sekuire-callback", owner: object = None, limit: int = 1000) -> None:
        super().__init__(name, owner)
        self._limit = limit
        self._queue: Deque[_Call] = deque()
        self._is_full = False

    def post(self, callback: Callable[..., object], *args: Any) -> None:
        """Call ``callback(*args)`` soon. Drop it after :meth:`close`, or while ``limit`` callbacks wait."""
        with self._condition:
            if self._is_closed:
                return
            is_full = len(self._queue) >= self._limit
            must_warn_full = is_full and not self._is_full
            self._is_full = is_full
            if not is_full:
                self._queue.append((callback, args))
            must_warn = self._thread is None and self._start_thread()
            self._condition.notify()
        if must_warn:
            self._warn()
        if must_warn_full:
            log.warning("%s: %d callbacks wait behind one that does not return; further ones are left out",
                        self._name, self._limit)  # fmt: skip

    def close(self) -> None:
        """Accept no more callbacks. Those that wait still run, then the thread ends."""
        with self._condition:
            self._is_closed = True
            if self._queue and self._thread is None:
                self._start_thread()
            self._condition.notify()
            left_out = len(self._queue) if self._thread is None else 0
        if left_out:
            log.warning("%s: no new thread can be started; %d callbacks are left out", self._name, left_out)

    def _take(self) -> Optional[_Call]:
        while not self._queue and not self._is_closed:
            self._condition.wait(LONG_WAIT)
        return self._queue.popleft() if self._queue else None


# -- the process: exit and fork ---------------------------------------------------------------------------------------

_leavers: weakref.WeakSet[Any] = weakref.WeakSet()
_leave_lock = threading.Lock()
_hooked = False
_is_leaving = False


def _after_fork() -> None:
    # A thread of the parent may have held the lock. In the child it would never be released.
    global _leave_lock, _is_leaving
    _leave_lock = threading.Lock()
    _is_leaving = False
    # A handler's thread that forks is the child's main thread. At the child's end concurrent.futures would have it join
    # itself, and multiprocessing would take the error for a failed child: exit code 1.
    thread = threading.current_thread()
    if thread.name.startswith("sekuire-"):
        getattr(concurrent.futures.thread, "_threads_queues", {}).pop(thread, None)


fork.call_in_child(_after_fork)


def at_exit(leaver: Any) -> None:
    """Call ``leaver.leave()`` when the interpreter ends, before it joins executors' threads.

    It is called only in the process that registered it, and must start no thread.
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
            register(leave_all)
            # eventlet replaces what calls such hooks. Each leaver leaves once all the same.
            atexit.register(leave_all)


def forget_exit(leaver: Any) -> None:
    """Undo :func:`at_exit`."""
    with _leave_lock:
        _leavers.discard(leaver)


def leave_all() -> None:
    """Call ``leave()`` of all that asked for it with :func:`at_exit`, because the process ends."""
    global _is_leaving
    _is_leaving = True
    with _leave_lock:
        leavers = list(_leavers)
        _leavers.clear()
    for leaver in leavers:
        if leaver.pid == os.getpid():
            with contextlib.suppress(Exception):
                leaver.leave()


def is_leaving() -> bool:
    """Return True once the interpreter ends: no executor accepts work, and connections of the program may be closed."""
    return _is_leaving


def check_process(pid: int, what: str) -> None:
    """Refuse to use an object that was started before a fork.

    :raises SekuireError: this process is not ``pid``.
    """
    if os.getpid() != pid:
        raise SekuireError(
            f"this {what} was started in process {pid}, and its threads and sockets stayed there; "
            f"after fork() make a new {what} in the child (in gunicorn: in post_worker_init)"
        )


# -- processes that run handlers for another --------------------------------------------------------------------------

_in_executor = False


def enter_executor() -> None:
    """Note that this process runs handlers for the worker of another one, so nothing in it may start a worker."""
    global _in_executor
    _in_executor = True


def is_in_executor() -> bool:
    """Return True if this process runs handlers for the worker of another one."""
    # The second: a spawned process that imports its parent's main module has not called enter_executor() yet.
    spawned = sys.modules.get("multiprocessing.process")
    return _in_executor or (spawned is not None and getattr(spawned.current_process(), "_inheriting", False))


def check_starter(what: str) -> None:
    """Refuse to start in a process where no thread of the library would run, or none should.

    :raises SekuireError: it runs handlers for another process, whose main module it has imported; or uWSGI runs it
        without threads.
    """
    if is_in_executor():
        raise SekuireError(
            f"a process that runs handlers was about to start a {what} of its own, because it imports the module that "
            "does so; start it under `if __name__ == '__main__':`, or keep handlers in a module apart (TaskRegistry)"
        )
    if getattr(sys.modules.get("uwsgi"), "has_threads", True) in (0, False):
        raise SekuireError(
            f"uWSGI runs this process without Python threads, so a {what} would stand still; start uWSGI with "
            "enable-threads = true (--enable-threads)"
        )
