"""The signals that end a process: taken over for a while, and put back."""

from __future__ import annotations

import queue
import signal
from types import FrameType
from typing import Any, Callable, List, Optional, Sequence, Tuple, TypeVar

#: Those that this system has.
ENDING: Tuple[int, ...] = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGBREAK") if hasattr(signal, name)
)

_Taken = TypeVar("_Taken", bound="TakenSignals")


class TakenSignals:
    """Inside its ``with`` block, ``note`` is called with the number of each signal, instead of what was set before.

    The main thread alone may enter it, and ``note`` runs there, between any two instructions: it must take no lock and
    not log. Even an ``Event.set()`` there can deadlock against the same thread inside ``Event.wait()``.
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
            # None: it was not set from Python, so it cannot be put back; the default is the nearest.
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def _on_signal(self, number: int, frame: Optional[FrameType]) -> None:
        self._call(number)


class SignalQueue(TakenSignals):
    """The signals that came, in their order. As :class:`TakenSignals`, but for who reads it: any thread."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[int] = queue.SimpleQueue()
        super().__init__(self._note)

    def get(self, timeout: float) -> Optional[int]:
        """The next one, None after ``timeout`` seconds. Wait in slices: on Windows no signal interrupts a wait."""
        try:
            return self._queue.get(timeout=timeout)
        except queue.Empty:
            return None

    def _note(self, number: int) -> None:
        self._queue.put(number)
