"""When to try again: what may pass, with full jitter, until the deadline or a stop."""

from __future__ import annotations

import sys
import threading
from typing import List, Optional

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sekuire._internal.threads import Deadline
from sekuire.errors import APIError, PlanLimitError, SekuireError, TransportError
from sekuire.transport import retry
from sekuire.transport.retry import Backoff, Interrupted, call, full_jitter, is_retryable

from ..support.servers import assert_clean
from ..support.waiting import GUARD


class Stop(threading.Event):
    """A stop event on which nothing waits: it remembers for how long it was asked to."""

    def __init__(self, set_at: Optional[int] = None) -> None:
        super().__init__()
        self.waits: List[float] = []
        self._set_at = set_at

    def wait(self, timeout: Optional[float] = None) -> bool:
        assert timeout is not None
        self.waits.append(timeout)
        if len(self.waits) == self._set_at:
            self.set()
        return self.is_set()


class Calls:
    """A function that fails with each of ``errors`` in turn, then succeeds."""

    def __init__(self, *errors: SekuireError) -> None:
        self.count = 0
        self._errors = errors

    def __call__(self) -> str:
        self.count += 1
        if self.count <= len(self._errors):
            raise self._errors[self.count - 1]
        return "done"


BUSY = APIError(503)


@pytest.mark.parametrize(
    ("error", "may_pass"),
    [
        (TransportError("no answer"), True),
        (TransportError("TLS", retryable=False), False),
        *((APIError(status), True) for status in (408, 425, 429, 500, 502, 503, 504)),
        *((APIError(status), False) for status in (301, 400, 401, 403, 404, 405, 409, 410, 413, 422)),
        (PlanLimitError(402), False),
        (APIError(503, "INSTALLATION_REVOKED"), False),
        (ValueError(), False),
    ],
    ids=repr,
)
def test_what_may_pass(error: BaseException, may_pass: bool) -> None:
    """No answer, 408, 425, 429 and 5xx are tried again; TLS errors, other statuses and the kill switch are not."""
    assert is_retryable(error) is may_pass


@given(st.integers(0, 10**6), st.floats(0.001, 10), st.floats(0.001, 100))
def test_full_jitter(attempt: int, first: float, longest: float) -> None:
    """A delay is anything from nothing to the doubled bound, which stays below the longest."""
    assert 0 <= full_jitter(attempt, first, longest) <= min(longest, first * 2.0 ** min(attempt, 60))


def test_jitter_is_full() -> None:
    """Delays spread over the whole range, so that clients do not come back together."""
    delays = [full_jitter(10, 0.1, 5.0) for _ in range(2000)]
    assert min(delays) < 0.5
    assert max(delays) > 4.5
    assert 2.0 < sum(delays) / len(delays) < 3.0


def test_success_needs_no_wait() -> None:
    """What succeeds is called once, and nothing is waited for; also where the stop was set before."""
    stop = Stop()
    stop.set()
    calls = Calls()
    assert call(calls, stop=stop, deadline=Deadline(0)) == "done"
    assert (calls.count, stop.waits) == (1, [])


def test_a_passing_error_is_tried_again() -> None:
    """Errors that may pass are tried again, each wait within its bound."""
    stop = Stop()
    calls = Calls(BUSY, TransportError("x"), BUSY, BUSY)
    assert call(calls, stop=stop, deadline=Deadline(3600)) == "done"
    assert calls.count == 5
    assert all(0 <= wait <= min(5.0, 0.1 * 2**at) for at, wait in enumerate(stop.waits))


@pytest.mark.parametrize("error", [APIError(400), TransportError("TLS", retryable=False)], ids=repr)
def test_a_final_error_is_not_tried_again(error: SekuireError) -> None:
    """An error that cannot pass is raised at once, as it is."""
    stop = Stop()
    with pytest.raises(SekuireError) as caught:
        call(Calls(error), stop=stop, deadline=Deadline(3600))
    assert caught.value is error
    assert stop.waits == []
    assert_clean(error)


def test_retry_after_bounds_the_wait_from_below() -> None:
    """What Retry-After asks for is waited for, at least."""
    stop = Stop()
    assert call(Calls(APIError(429, retry_after=120.0)), stop=stop, deadline=Deadline(3600)) == "done"
    assert stop.waits == [120.0]


def test_no_wait_that_ends_after_the_deadline() -> None:
    """Where the next try would come after the deadline, the last error is raised without a wait."""
    stop = Stop()
    error = APIError(429, retry_after=120.0)
    with pytest.raises(APIError) as caught:
        call(Calls(error), stop=stop, deadline=Deadline(60))
    assert caught.value is error
    assert stop.waits == []
    with pytest.raises(APIError):
        call(Calls(BUSY), stop=stop, deadline=Deadline(0))
    assert_clean(error)


@pytest.mark.parametrize("at", [1, 2])
def test_a_stop_ends_the_wait(at: int) -> None:
    """A stop during a wait ends it with Interrupted, and nothing is tried after it."""
    stop = Stop(set_at=at)
    calls = Calls(*[BUSY] * 9)
    with pytest.raises(Interrupted) as caught:
        call(calls, stop=stop, deadline=Deadline(3600))
    assert calls.count == at
    assert_clean(caught.value)


def test_a_stop_during_a_try_ends_it() -> None:
    """A stop that comes while the function runs raises what it raised, and nothing is waited for."""
    stop = Stop()

    def fail() -> None:
        stop.set()
        raise BUSY

    with pytest.raises(APIError):
        call(fail, stop=stop, deadline=Deadline(3600))
    assert stop.waits == []


def test_a_real_wait_is_woken() -> None:
    """A wait for minutes ends when the stop event is set by another thread."""
    stop = threading.Event()
    waiting = threading.Event()

    def fail() -> None:
        waiting.set()
        raise APIError(503, retry_after=300.0)

    def wake() -> None:
        assert waiting.wait(GUARD)
        stop.set()

    thread = threading.Thread(target=wake)
    thread.start()
    with pytest.raises((Interrupted, APIError)):
        call(fail, stop=stop, deadline=Deadline(3600))
    thread.join(GUARD)


def test_many_threads_at_once() -> None:
    """Calls from many threads do not get into each other's way, however often the interpreter switches."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    results: List[object] = []

    def work() -> None:
        for _ in range(20):
            try:
                results.append(call(Calls(BUSY, BUSY), stop=Stop(), deadline=Deadline(3600)))
            except BaseException as error:
                results.append(error)

    try:
        threads = [threading.Thread(target=work) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(GUARD)
    finally:
        sys.setswitchinterval(interval)
    assert results == ["done"] * 320


def test_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    """The delays of a stream double up to the longest, begin anew after a reset, and have a lower bound on demand."""
    monkeypatch.setattr(retry.random, "uniform", lambda low, high: high)
    backoff = Backoff(0.5, 4.0)
    assert [backoff.next() for _ in range(5)] == [0.5, 1.0, 2.0, 4.0, 4.0]
    assert backoff.next(at_least=60.0) == 60.0
    backoff.reset()
    assert backoff.next(at_least=0.1) == 0.5
    backoff.reset()
    backoff.first = 10.0
    assert backoff.next() == 10.0


def test_backoff_heals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each 5 s of an open connection undo one doubling, 60 s all; the longest delay has no doublings beyond it."""
    monkeypatch.setattr(retry.random, "uniform", lambda low, high: high)
    backoff = Backoff(0.5, 4.0)
    for _ in range(20):
        backoff.next()
    backoff.was_open(4.9)
    assert backoff.next() == 4.0
    backoff.was_open(10.0)
    assert [backoff.next() for _ in range(3)] == [1.0, 2.0, 4.0]
    backoff.was_open(1000.0)
    assert backoff.next() == 0.5
    slow = Backoff(0.001, 3600.0)
    for _ in range(50):
        slow.next()
    slow.was_open(60.0)
    assert slow.next() == 0.001
    backoff.first = 10.0
    assert [backoff.next() for _ in range(2)] == [10.0, 10.0]
