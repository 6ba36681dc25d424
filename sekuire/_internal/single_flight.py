"""Let one thread do what several threads need at the same moment, and share its result or error."""

from __future__ import annotations

import copy
import threading
from typing import Callable, Generic, Optional, TypeVar, cast

from ..errors import SekuireError, TransportError
from . import fork
from .threads import Deadline, spawn

_T = TypeVar("_T")


class Flight(Generic[_T]):
    """Hold one call in progress, and its result or error once it has ended. Any thread may wait for it.

    ``tag`` says what the call was made for: see ``may_share`` of :meth:`SingleFlight.run`.
    """

    # Threads: the thread that makes the call writes the result or the error before it sets `_ended`. Others read them
    # after that, so there is no lock.

    __slots__ = ("_ended", "_result", "error", "tag", "thread")

    def __init__(self, tag: object) -> None:
        self.tag = tag
        self.thread = threading.get_ident()
        self.error: Optional[BaseException] = None
        self._result: Optional[_T] = None
        self._ended = threading.Event()

    def wait(self, seconds: float) -> bool:
        """Wait until the call has ended. Return True if it has."""
        return self._ended.wait(seconds)

    def result(self) -> _T:
        """Return the result of a call that has ended.

        :raises BaseException: what the call raised; each caller gets a copy of its own.
        """
        if self.error is not None:
            raise own_copy(self.error)
        return cast(_T, self._result)

    def set_result(self, result: _T) -> None:
        """Note the result, before :meth:`end`."""
        self._result = result

    def end(self) -> None:
        """Wake all who wait."""
        self._ended.set()


def _share_all(flight: Flight[_T]) -> bool:
    return True


class SingleFlight(Generic[_T]):
    """Make at most one call at a time, and share its result or error with the threads that ask during it.

    ::

        flights = SingleFlight[str]("fetch of the token")
        token = flights.run(fetch, Deadline(10.0))

    :param what: a noun that names the call, for errors: ``renewal of the credentials``.
    :param misuse: the error for a call that waits for itself.
    """

    # Threads: any thread may call anything. `_lock` guards which flight is on, and is never held over a call. A forked
    # child begins without a flight, because the thread that would end it is not there.

    def __init__(self, what: str, *, misuse: str = "") -> None:
        self._what = what
        self._misuse = misuse or f"a {what} must not wait for itself"
        self._lock = threading.Lock()
        self._flight: Optional[Flight[_T]] = None
        #: How many threads wait in :meth:`run` for another thread's call.
        self.waiting = 0
        fork.reset_in_child(self, SingleFlight._reset)

    def run(
        self,
        action: Callable[[], _T],
        deadline: Deadline,
        *,
        tag: object = None,
        may_share: Callable[[Flight[_T]], bool] = _share_all,
    ) -> _T:
        """Call ``action`` on this thread, or wait for the call in progress and share its result or error.

        ``action`` should look first whether it is still needed: another call may have ended just before.

        :param tag: what ``action`` is for, for the ``may_share`` of those who wait for it.
        :param may_share: return False if the call that has ended does not count for this caller, who tries again.
        :raises SekuireError: what the call raised; each waiting thread gets a copy of its own.
        :raises TransportError: ``deadline`` passed first, or an interrupt such as Ctrl-C ended the shared call.
        """
        mine: Flight[_T] = Flight(tag)
        try:
            while True:
                with self._lock:
                    flight = self._flight
                    if flight is None:
                        self._flight = mine
                if flight is None:
                    return self._lead(mine, action)
                if flight.thread == mine.thread:
                    raise SekuireError(self._misuse)
                if not self._wait(flight, deadline):
                    break
                if may_share(flight):
                    return flight.result()
                if deadline.is_expired():
                    # Without this, calls that do not count could come before this thread again and again.
                    break
        finally:
            self._forget(mine)
        raise TransportError(f"waiting for another thread's {self._what} took too long")

    def is_busy(self) -> bool:
        """Return True while a call is in progress."""
        return self._flight is not None

    def start(self, action: Callable[[], _T], name: str) -> Optional[Flight[_T]]:
        """Return the call in progress, or else begin one on a new daemon thread called ``name``.

        For a call that may hang. Return None if no thread can be started.
        """

        def lead() -> None:
            try:
                self._lead(flight, action)
            except BaseException:  # noqa: BLE001  # The flight has it, for those who wait.
                pass
            finally:
                self._forget(flight)

        with self._lock:
            if self._flight is not None:
                return self._flight
            flight: Flight[_T] = Flight(None)
            if spawn(lead, name) is None:
                return None
            # Only now: nobody would ever end a flight whose thread has not started. The thread needs the lock to end.
            self._flight = flight
            return flight

    def _lead(self, flight: Flight[_T], action: Callable[[], _T]) -> _T:
        try:
            result = action()
        except Exception as error:
            flight.error = error
            raise
        except BaseException as error:
            # Ctrl-C, for example: it is meant for this thread only.
            flight.error = TransportError(f"the {self._what} was interrupted ({type(error).__name__})")
            raise
        flight.set_result(result)
        return result

    def _wait(self, flight: Flight[_T], deadline: Deadline) -> bool:
        with self._lock:
            self.waiting += 1
        try:
            return flight.wait(deadline.remaining())
        finally:
            with self._lock:
                self.waiting -= 1

    def _forget(self, flight: Flight[_T]) -> None:
        with self._lock:
            if self._flight is flight:
                self._flight = None
        flight.end()

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._flight = None
        self.waiting = 0


def own_copy(error: BaseException) -> BaseException:
    """Return a copy of ``error`` for this thread. One exception raised by many would collect all their tracebacks."""
    try:
        twin = copy.copy(error)
    except Exception:  # noqa: BLE001
        return error
    twin.__traceback__ = twin.__cause__ = twin.__context__ = None
    return twin
