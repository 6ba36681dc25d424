"""Handle the signals that end a process for a while, and put the former handlers back."""

from __future__ import annotations

import queue
import signal
from types import FrameType
from typing import Any, Callable, List, Optional, Sequence, Tuple, TypeVar

#: The signals that end a process and that this system has.
ENDING: Tuple[int, ...] = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGBREAK") if hasattr(signal, name)
)

_Taken = TypeVar("_Taken", bound="TakenSignals")


class TakenSignals:
    """Call ``note`` with the number of each signal inside a ``with`` block, instead of the former handler.

    Only the main thread may enter it. ``note`` runs there, between any two instructions, so it must not log and must
    take no lock. Even an ``Event.set()`` there can deadlock against the same thread inside ``Event.wait()``.
    """

    def __init__(self, note: Callable[[int], None], numbers: Sequence[int] = ENDING) -> None:
        self._call = note
        self._numbers = numbers
        self._previous: List[Tuple[int, Any]] = []

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
        self._call(number)


class SignalQueue(TakenSignals):
    """Queue the signals that come inside a ``with`` block, for any thread to read.

    ::

        with SignalQueue() as signals:
            while signals.get(0.5) is None:
                check_the_worker()
    """

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[int] = queue.SimpleQueue()
        super().__init__(self._note)

    def get(self, timeout: float) -> Optional[int]:
        """Return the next signal, or None after ``timeout`` seconds. On Windows no signal interrupts a wait."""
        try:
            return self._queue.get(timeout=timeout)
        except queue.Empty:
            return None

    def _note(self, number: int) -> None:
        self._queue.put(number)
