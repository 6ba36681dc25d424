"""Check that one thread makes the call that several need, and that the others share what comes of it."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Iterator

import pytest

from sekuire._internal.single_flight import SingleFlight
from sekuire._internal.threads import Deadline
from sekuire.errors import SekuireError, TransportError

LONG = 60.0


class Call:
    """A call that has begun and returns when it is let go."""

    def __init__(self, result: str = "result", error: BaseException | None = None) -> None:
        self.begun = threading.Event()
        self.go = threading.Event()
        self.count = 0
        self._result = result
        self._error = error

    def __call__(self) -> str:
        self.count += 1
        self.begun.set()
        assert self.go.wait(LONG)
        if self._error is not None:
            raise self._error
        return self._result


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


def _wait_for(flights: SingleFlight[str], count: int) -> None:
    """Wait until ``count`` threads wait for the call in progress."""
    end = Deadline(LONG)
    while flights.waiting != count:
        assert not end.is_expired()
        time.sleep(0.001)


def test_the_result_is_shared(pool: ThreadPoolExecutor) -> None:
    """Threads that ask during a call get its result, and make none of their own."""
    flights = SingleFlight[str]("test")
    call = Call()
    first = pool.submit(flights.run, call, Deadline(LONG))
    assert call.begun.wait(LONG)
    others = [pool.submit(flights.run, call, Deadline(LONG)) for _ in range(5)]
    _wait_for(flights, 5)
    call.go.set()
    assert {one.result(LONG) for one in [first, *others]} == {"result"}
    assert call.count == 1
    assert flights.run(lambda: "next", Deadline(LONG)) == "next"


def test_one_call_while_it_lasts(pool: ThreadPoolExecutor) -> None:
    """A thread that waits makes no call, and ends at its own deadline."""
    flights = SingleFlight[str]("test")
    call = Call()
    first = pool.submit(flights.run, call, Deadline(LONG))
    assert call.begun.wait(LONG)
    with pytest.raises(TransportError, match="waiting for another thread's test took too long"):
        flights.run(call, Deadline(0.01))
    call.go.set()
    assert first.result(LONG) == "result"
    assert call.count == 1


def test_an_error_is_copied(pool: ThreadPoolExecutor) -> None:
    """Each waiting thread gets an exception object of its own."""
    flights = SingleFlight[str]("test")
    error = TransportError("unreachable")
    call = Call(error=error)
    first = pool.submit(flights.run, call, Deadline(LONG))
    assert call.begun.wait(LONG)
    waiting = pool.submit(flights.run, call, Deadline(LONG))
    _wait_for(flights, 1)
    call.go.set()
    assert first.exception(LONG) is error
    found = waiting.exception(LONG)
    assert found is not error
    assert str(found) == "unreachable"
    assert call.count == 1


def test_an_interrupt_is_not_shared() -> None:
    """Ctrl-C is raised in its own thread; the others hear that the call was interrupted."""
    flights = SingleFlight[str]("test")
    call = Call(error=KeyboardInterrupt())
    flight = flights.start(call, "sekuire-test")
    assert flight is not None
    call.go.set()
    assert flight.wait(LONG)
    with pytest.raises(TransportError, match=r"the test was interrupted \(KeyboardInterrupt\)"):
        flight.result()


def test_a_call_that_does_not_count(pool: ThreadPoolExecutor) -> None:
    """A thread for which the call does not count makes one of its own, after it."""
    flights = SingleFlight[str]("test")
    call = Call(error=TransportError("refused"))
    pool.submit(flights.run, call, Deadline(LONG), tag="theirs")
    assert call.begun.wait(LONG)
    mine = pool.submit(
        flights.run, lambda: "mine", Deadline(LONG), tag="mine", may_share=lambda flight: flight.tag == "mine"
    )
    _wait_for(flights, 1)
    call.go.set()
    assert mine.result(LONG) == "mine"


def test_a_call_that_waits_for_itself() -> None:
    flights = SingleFlight[str]("test")
    with pytest.raises(SekuireError, match="a test must not wait for itself"):
        flights.run(lambda: flights.run(lambda: "inner", Deadline(LONG)), Deadline(LONG))
    assert flights.run(lambda: "after", Deadline(LONG)) == "after"


def test_a_call_on_a_thread_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A started call is shared until it ends. Without a thread there is no call, and the next one tries again."""
    flights = SingleFlight[str]("test")
    call = Call()
    flight = flights.start(call, "sekuire-test")
    assert flight is not None
    assert flights.start(call, "sekuire-test") is flight
    assert not flight.wait(0.01)
    call.go.set()
    assert flight.wait(LONG)
    assert (flight.result(), call.count) == ("result", 1)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", lambda thread: (_ for _ in ()).throw(RuntimeError("no thread")))
        assert flights.start(call, "sekuire-test") is None
    again = flights.start(call, "sekuire-test")
    assert again is not None
    assert again is not flight
    assert again.wait(LONG)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_after_a_fork(pool: ThreadPoolExecutor) -> None:
    """A child does not wait for a call that a thread of its parent makes."""
    flights = SingleFlight[str]("test")
    call = Call()
    first = pool.submit(flights.run, call, Deadline(LONG))
    assert call.begun.wait(LONG)
    pid = os.fork()
    if pid == 0:  # pragma: no cover  # The child.
        code = 1
        try:
            code = 0 if flights.run(lambda: "child", Deadline(LONG)) == "child" else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    call.go.set()
    assert first.result(LONG) == "result"
