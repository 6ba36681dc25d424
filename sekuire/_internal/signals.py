"""Handle the signals that end a process inside a ``with`` block, and restore the former handlers after it."""

from __future__ import annotations

import abc
import os
import queue
import signal
from types import FrameType
from typing import Any, Dict, NamedTuple, Optional, Sequence, Tuple, TypeVar

from .clock import time
from .speech import is_terminal

#: The signals that end a process and that this system has.
ENDING: Tuple[int, ...] = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGBREAK") if hasattr(signal, name)
)

#: The signals that drain a worker: those, and the one of a terminal that is closed.
DRAINING: Tuple[int, ...] = (*ENDING, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []))

#: Seconds after the first signal during which a further one changes nothing: a terminal and a supervisor may both send
#: one for a single stop.
SECOND_AFTER = 1.0

_Taken = TypeVar("_Taken", bound="TakenSignals")
_Draining = TypeVar("_Draining", bound="DrainSignals")


class TakenSignals(abc.ABC):
    """Call :meth:`note` with the number of each signal inside a ``with`` block, instead of the former handler.

    Only the main thread may enter it. ``note`` runs there, between any two instructions, so it must not log and must
    take no lock. Even an ``Event.set()`` there can deadlock against the same thread inside ``Event.wait()``.

    A signal that is ignored when the block is entered stays ignored: nohup and shells start processes so that a closed
    terminal, or a Ctrl-C that is meant for another program, does not end them.

    A process that is forked inside the block has the former handlers, so that its maker can end it.
    """

    def __init__(self, numbers: Sequence[int] = ENDING) -> None:
        self._numbers = numbers
        self._previous: Dict[int, Any] = {}
        #: The process that has entered the block.
        self._pid = 0

    @abc.abstractmethod
    def note(self, number: int) -> None:
        """Handle a signal."""

    def __enter__(self: _Taken) -> _Taken:
        self._pid = os.getpid()
        for number in self._numbers:
            handler = signal.getsignal(number)
            if handler is signal.SIG_IGN:
                continue
            # None: it was not set from Python, so it cannot be put back. The default is the nearest.
            self._previous[number] = signal.SIG_DFL if handler is None else handler
            signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *exception: object) -> None:
        while self._previous:
            number, handler = self._previous.popitem()
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: Optional[FrameType]) -> None:
        if self._pid == os.getpid():
            self.note(number)
            return
        # A forked child has the handlers of its parent. Nothing reads what they queue.
        handler = self._previous.get(number, signal.SIG_DFL)
        signal.signal(number, handler)
        if callable(handler):
            handler(number, frame)
        else:
            os.kill(os.getpid(), number)


class SignalQueue(TakenSignals):
    """Queue the signals that come inside a ``with`` block, for any thread to read.

    ::

        with SignalQueue() as signals:
            while signals.get(0.5) is None:
                check_the_worker()

    :param into: the queue to put them into.
    """

    def __init__(self, numbers: Sequence[int] = ENDING, into: Optional[queue.SimpleQueue[Any]] = None) -> None:
        super().__init__(numbers)
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue() if into is None else into

    def get(self, timeout: float) -> Optional[int]:
        """Return the next signal, or None after ``timeout`` seconds. On Windows no signal interrupts a wait."""
        try:
            number: int = self._queue.get(timeout=timeout)
        except queue.Empty:
            return None
        return number

    def note(self, number: int) -> None:
        self._queue.put(number)


def name_of(number: int) -> str:
    """Return a signal's name for a person: SIGINT is Ctrl-C at a terminal."""
    if number == signal.SIGINT and is_terminal():
        return "Ctrl-C"
    return signal.Signals(number).name


class Signalled(NamedTuple):
    """Describe a signal that came. ``must_end``: it came long enough after the first one to end the process."""

    number: int
    is_first: bool
    must_end: bool


class _Stop:
    """Hold the signals that have come for one stop."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.queue: queue.SimpleQueue[Signalled] = queue.SimpleQueue()
        #: When the first signal came (``time.monotonic()``).
        self.first_at: Optional[float] = None


#: That of the blocks that are entered.
_entered: Optional[_Stop] = None


class DrainSignals(TakenSignals):
    """Queue the signals that drain a worker, and tell the first one from a later one that ends the process.

    Such blocks may be inside one another, as that of a worker inside that of its command line. They share what has
    come. ::

        with DrainSignals() as signals:
            while (come := signals.get(0.5)) is None or not come.must_end:
                check_the_worker()
    """

    # Threads: the main thread enters, leaves and runs note(), also between two instructions of get().

    def __init__(self, numbers: Sequence[int] = DRAINING) -> None:
        super().__init__(numbers)
        self._stop = _Stop()
        self._shares = False

    def __enter__(self: _Draining) -> _Draining:
        global _entered
        # A forked child begins with its own.
        self._shares = _entered is not None and _entered.pid == os.getpid()
        if _entered is not None and self._shares:
            self._stop = _entered
        else:
            _entered = self._stop
        super().__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        global _entered
        super().__exit__(*exception)
        if not self._shares:
            _entered = None

    def get(self, timeout: float) -> Optional[Signalled]:
        """Return the next signal, or None after ``timeout`` seconds. On Windows no signal interrupts a wait."""
        try:
            return self._stop.queue.get(timeout=timeout)
        except queue.Empty:
            return None

    def note(self, number: int) -> None:
        self.put(self.classify(number))

    def put(self, come: Signalled) -> None:
        """Queue what has come."""
        self._stop.queue.put(come)

    def classify(self, number: int) -> Signalled:
        """Return what a signal that comes now means."""
        now = time.monotonic()
        is_first = self._stop.first_at is None
        if self._stop.first_at is None:
            self._stop.first_at = now
        return Signalled(number, is_first, number in ENDING and now - self._stop.first_at >= SECOND_AFTER)
