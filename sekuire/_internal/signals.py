"""Handle the signals that end a process for a while, and put the former handlers back."""

from __future__ import annotations

import abc
import queue
import signal
from types import FrameType
from typing import Any, List, Optional, Sequence, Tuple, TypeVar

#: The signals that end a process and that this system has.
ENDING: Tuple[int, ...] = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGBREAK") if hasattr(signal, name)
)

_Taken = TypeVar("_Taken", bound="TakenSignals")


class TakenSignals(abc.ABC):
    """Call :meth:`note` with the number of each signal inside a ``with`` block, instead of the former handler.

    Only the main thread may enter it. ``note`` runs there, between any two instructions, so it must not log and must
    take no lock. Even an ``Event.set()`` there can deadlock against the same thread inside ``Event.wait()``.
    """

    def __init__(self, numbers: Sequence[int] = ENDING) -> None:
        self._numbers = numbers
        self._previous: List[Tuple[int, Any]] = []

    @abc.abstractmethod
    def note(self, number: int) -> None:
        """Handle a signal."""

    def __enter__(self: _Taken) -> _Taken:
        for number in self._numbers:
            self._previous.append((number, signal.signal(number, self._on_signal)))
        return self

    def __exit__(self, *exception: object) -> None:
        while self._previous:
            number, handler = self._previous.pop()
            # None: it was not set from Python, so it cannot be put back. The default is the nearest.
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def _on_signal(self, number: int, frame: Optional[FrameType]) -> None:
        self.note(number)


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
