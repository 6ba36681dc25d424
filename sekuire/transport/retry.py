"""Retry calls: with full jitter and ``Retry-After``, until a deadline, with a stop that ends every wait."""

from __future__ import annotations

import random
import threading
from typing import TYPE_CHECKING, Callable, Optional, TypeVar

from .._internal.threads import Deadline
from ..errors import APIError, TransportError
from ..wire import protocol

if TYPE_CHECKING:
    import tenacity

_T = TypeVar("_T")

#: First and longest delay of a call's retries, in seconds.
RETRY_MIN = 0.1
RETRY_MAX = 5.0


#: Seconds that a connection must have been open to undo one doubling of the delay, and all of them.
HEALING = 5.0
HEALTHY = 60.0


class Interrupted(TransportError):
    """Report that a wait ended because its owner is stopping. The request can still be sent."""


def is_retryable(error: BaseException) -> bool:
    """Return True if the same call may succeed later: after no answer (unless TLS failed), 408, 425, 429 and 5xx."""
    if isinstance(error, TransportError):
        return error.retryable
    return isinstance(error, APIError) and protocol.is_transient(error.status) and not protocol.is_revoked(error)


def full_jitter(attempt: int, first: float, longest: float) -> float:
    """Return the seconds before retry number ``attempt`` (from 0): a random part of a bound that doubles each time.

    Clients that lost the same platform at the same moment must not come back at the same moment.
    """
    return random.uniform(0.0, min(longest, first * 2.0 ** min(attempt, 60)))


class Backoff:
    """Compute the delays between reconnects of one stream: they double, with full jitter. One thread uses it.

    A connection that was open for a while makes them shorter again. So a stream that a proxy cuts every half a minute
    reconnects at once each time, and one that breaks as soon as it is open does not. ::

        backoff = Backoff(0.5, 60.0)
        stop.wait(backoff.next(at_least=retry_after))
        backoff.was_open(12.0)
    """

    def __init__(self, first: float, longest: float) -> None:
        self.first = first
        self.longest = longest
        self._attempt = 0

    def next(self, at_least: Optional[float] = None) -> float:
        """Return the next delay in seconds, at least ``at_least`` (``Retry-After``)."""
        delay = full_jitter(self._attempt, self.first, max(self.longest, self.first))
        if self.first * 2.0 ** min(self._attempt, 60) < self.longest:
            self._attempt += 1
        return max(delay, at_least or 0.0)

    def was_open(self, seconds: float) -> None:
        """Shorten the delays by how long the last connection was open, in seconds."""
        healed = self._attempt if seconds >= HEALTHY else int(seconds / HEALING)
        self._attempt = max(0, self._attempt - healed)

    def reset(self) -> None:
        """Begin again with the first delay."""
        self._attempt = 0


def call(function: Callable[[], _T], *, stop: threading.Event, deadline: Deadline) -> _T:
    """Call ``function``, and retry it while its error is retryable, until ``deadline``. Return what it returns.

    :raises Interrupted: ``stop`` was set during a wait.
    :raises SekuireError: what ``function`` raised last.
    """
    import tenacity  # It imports asyncio, which would take a tenth of the time of this library's import.

    def wait(state: tenacity.RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome is not None else None
        delay = full_jitter(state.attempt_number - 1, RETRY_MIN, RETRY_MAX)
        return max(delay, getattr(error, "retry_after", None) or 0.0)

    def must_stop(state: tenacity.RetryCallState) -> bool:
        return stop.is_set() or state.upcoming_sleep >= deadline.remaining()

    def sleep(seconds: float) -> None:
        if stop.wait(seconds):
            raise Interrupted("stopped while waiting to try again")

    # Built per call: a Retrying shared by threads can raise a KeyError of its own (jd/tenacity#701).
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(is_retryable), wait=wait, stop=must_stop, sleep=sleep, reraise=True
    )
    return retrying(function)
