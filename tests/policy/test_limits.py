"""Rate limits: never more than allowed in any window, under threads, and what a shared store can do wrong."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import threading
from typing import Any, Dict, List, Optional, Tuple

import pytest

from sekuire.errors import ConfigurationError, PolicyUnavailableError
from sekuire.policy import Policy, PolicyEnforcer
from sekuire.policy.document import Rate
from sekuire.policy.limits import MAX_UNITS, Excess, RateLimiter, _Window

from ..support.waiting import GUARD


class Clock:
    def __init__(self) -> None:
        self.now = 5000.0


class TimedLimiter(RateLimiter):
    """A limiter by a clock of the test's own."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(namespace="w")
        self.clock = clock

    def now(self) -> float:
        return self.clock.now


def limiter_at(clock: Clock) -> RateLimiter:
    return TimedLimiter(clock)


def test_a_window_moves() -> None:
    """What was used comes back a minute after it was used, not at the turn of a minute."""
    clock = Clock()
    limiter = limiter_at(clock)
    rate = Rate(max_per_minute=3)
    for _ in range(3):
        assert limiter.hit("requests", rate) is None
        clock.now += 10
    assert limiter.hit("requests", rate) == Excess("minute", 3, 30.0)
    clock.now += 30
    assert limiter.hit("requests", rate) is None
    assert limiter.hit("requests", rate) == Excess("minute", 3, 10.0)


def test_what_is_refused_is_not_counted() -> None:
    """By neither window: trying again and again does not put the end off."""
    clock = Clock()
    limiter = limiter_at(clock)
    rate = Rate(max_per_minute=2, max_per_hour=3)
    assert [limiter.hit("requests", rate) for _ in range(2)] == [None, None]
    for _ in range(100):
        assert limiter.hit("requests", rate) == Excess("minute", 2, 60.0)
    clock.now += 60
    assert limiter.hit("requests", rate) is None
    for _ in range(100):
        assert limiter.hit("requests", rate) == Excess("hour", 3, 3540.0)
    clock.now += 3540
    assert [limiter.hit("requests", rate) for _ in range(2)] == [None, None]


def test_kinds_are_counted_apart() -> None:
    """Requests do not use up tokens."""
    limiter = RateLimiter(namespace="w")
    rate = Rate(max_per_minute=1)
    assert limiter.hit("requests", rate) is None
    assert limiter.hit("tokens", rate) is None
    assert limiter.hit("tokens", rate) is not None


def test_amounts() -> None:
    """Several at once fit whole or not at all; more than the limit never; none always."""
    clock = Clock()
    limiter = limiter_at(clock)
    rate = Rate(max_per_minute=10)
    assert limiter.hit("tokens", rate, 4) is None
    clock.now += 15
    assert limiter.hit("tokens", rate, 5) is None
    assert limiter.hit("tokens", rate, 2) == Excess("minute", 10, 45.0)
    assert limiter.hit("tokens", rate, 6) == Excess("minute", 10, 60.0)
    assert limiter.hit("tokens", rate, 11) == Excess("minute", 10, None)
    assert limiter.hit("tokens", rate, 1) is None
    assert limiter.hit("tokens", rate, 0) is None
    assert limiter.hit("tokens", Rate(), 10**12) is None
    assert limiter.hit("tokens", Rate(max_per_hour=0), 1) == Excess("hour", 0, None)


def test_no_window_ever_holds_more_than_the_limit() -> None:
    """Over a long run of random amounts and pauses, checked from outside by every window that ends in a hit."""
    clock = Clock()
    limiter = limiter_at(clock)
    rate = Rate(max_per_minute=50, max_per_hour=900)
    chance = random.Random(7)
    admitted: List[Tuple[float, int]] = []
    refused = 0
    for _ in range(6000):
        clock.now += chance.choice([0.0, 0.001, 0.3, 2.0, 7.0])
        amount = chance.choice([1, 1, 2, 9])
        if limiter.hit("tokens", rate, amount) is None:
            admitted.append((clock.now, amount))
        else:
            refused += 1
    for seconds, limit in ((60, 50), (3600, 900)):
        begin = total = most = 0
        for end, (instant, amount) in enumerate(admitted):
            total += amount
            while admitted[begin][0] <= instant - seconds:
                total -= admitted[begin][1]
                begin += 1
            most = max(most, total)
            assert total <= limit, (end, seconds)
        assert most > limit * 0.95
    assert refused > 100


def test_memory_is_bounded() -> None:
    """However many are counted, a window remembers some thousand entries."""
    clock = Clock()
    limiter = limiter_at(clock)
    rate = Rate(max_per_minute=10**9, max_per_hour=10**9)
    for _ in range(20_000):
        clock.now += 0.003
        assert limiter.hit("requests", rate) is None
    assert max(len(window._entries) for window in limiter._windows.values()) <= 6001
    clock.now += 10**6
    limiter.hit("requests", rate)
    assert [len(window._entries) for window in limiter._windows.values()] == [1, 1]


def test_threads_never_exceed_a_limit() -> None:
    """Many threads at once are admitted exactly as often as the limit says."""
    limiter = RateLimiter(namespace="w")
    policy = Policy.from_content({"rate_limits": {"requests": {"max_per_minute": 500, "max_per_hour": 1000}}})
    enforcer = PolicyEnforcer(policy, limiter=limiter)
    admitted = [0] * 8
    begin = threading.Barrier(8)

    def ask(index: int) -> None:
        begin.wait(30)
        for _ in range(200):
            admitted[index] += bool(enforcer.check_rate_limit("requests"))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=ask, args=(index,)) for index in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    finally:
        sys.setswitchinterval(interval)
    assert sum(admitted) == 500


def test_looking_and_counting_are_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads that want the last of a limit do not both find it: the second looks after the first has counted."""
    both = threading.Barrier(2)
    look = _Window.wait

    def look_together(window: _Window, now: float, limit: int, amount: int) -> float:
        found = look(window, now, limit, amount)
        try:
            # Only without a lock both get here, and count what they saw.
            both.wait(0.2)
        except threading.BrokenBarrierError:
            pass
        return found

    monkeypatch.setattr(_Window, "wait", look_together)
    limiter = RateLimiter(namespace="w")
    found: List[Optional[Excess]] = []
    threads = [
        threading.Thread(target=lambda: found.append(limiter.hit("requests", Rate(max_per_minute=1)))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(excess is None for excess in found) == [False, True]


def test_no_thread_is_started() -> None:
    """Counting in memory needs none."""
    before = threading.enumerate()
    limiter = RateLimiter("memory://", namespace="w")
    limiter.hit("requests", Rate(max_per_minute=1))
    assert threading.enumerate() == before
    assert not limiter.is_shared


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_is_not_blocked_by_its_parents_lock() -> None:
    """A fork at the moment in which another thread counts leaves the child a limiter that answers: it refuses what is
    limited, because a child has no share of its parent's counts."""
    code = """if True:
        import os, threading
        from sekuire.policy.document import Rate
        from sekuire.errors import ConfigurationError
        from sekuire.policy.limits import RateLimiter
        limiter = RateLimiter(namespace="w")
        limiter.hit("requests", Rate(max_per_minute=2))
        held = threading.Event()
        def hold():
            with limiter._lock:
                held.set()
                threading.Event().wait(60)
        threading.Thread(target=hold, daemon=True).start()
        held.wait(10)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                limiter.hit("requests", Rate(max_per_minute=2))
            except ConfigurationError as error:
                free = limiter.hit("requests", Rate()) is None and limiter.hit("requests", Rate(max_per_hour=0), 1)
                own = RateLimiter(namespace="w").hit("requests", Rate(max_per_minute=1))
                code = 0 if "after the fork" in str(error) and free and own is None else 2
            os._exit(code)
        print(os.waitpid(child, 0)[1])
    """
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=GUARD, check=False
    )
    assert ran.stdout.strip() == "0", ran.stderr


# -- shared stores ----------------------------------------------------------------------------------------------------


class Store:
    """As a store of the package ``limits`` for moving windows: one entry for each unit, newest first."""

    def __init__(self, full: Optional[str] = None) -> None:
        self.entries: Dict[str, int] = {}
        self.asked: List[Tuple[str, str, int, int]] = []
        #: A window that fills up between a look and a count.
        self.full = full

    def acquire_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
        self.asked.append(("acquire", key, limit, amount))
        if (self.full and self.full in key) or self.entries.get(key, 0) + amount > limit:
            return False
        self.entries[key] = self.entries.get(key, 0) + amount
        return True

    def get_moving_window(self, key: str, limit: int, expiry: int) -> Tuple[float, int]:
        import time

        return time.time() - 20, self.entries.get(key, 0)


def shared(store: Any, monkeypatch: pytest.MonkeyPatch) -> RateLimiter:
    import limits.storage

    monkeypatch.setattr(limits.storage, "storage_from_string", lambda uri, **options: store)
    return RateLimiter("redis://localhost", namespace="ws 1")


def test_closing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Closes the store's client, whose failure is nobody's; a limiter in memory has nothing to close."""
    closed: List[str] = []

    class Client:
        def close(self) -> None:
            closed.append("closed")
            raise OSError("gone")

    store = Store()
    store.storage = Client()  # type: ignore[attr-defined]
    shared(store, monkeypatch).close()
    assert closed == ["closed"]
    RateLimiter(namespace="w").close()
    shared(Store(), monkeypatch).close()


def test_keys_of_a_shared_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workspace, kind and window, not the limit: counts go on when a policy changes it."""
    store = Store()
    limiter = shared(store, monkeypatch)
    assert limiter.is_shared
    assert limiter.hit("requests", Rate(max_per_minute=2, max_per_hour=10)) is None
    assert limiter.hit("requests", Rate(max_per_minute=3)) is None
    assert store.entries == {"sekuire/ws 1/requests/minute/1": 2, "sekuire/ws 1/requests/hour/1": 1}


def test_a_shared_limit_that_is_exceeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is counted in the minute when the hour is full; ``retry_after`` is when the oldest entry leaves."""
    store = Store()
    limiter = shared(store, monkeypatch)
    rate = Rate(max_per_minute=5, max_per_hour=2)
    assert [limiter.hit("requests", rate) for _ in range(2)] == [None, None]
    excess = limiter.hit("requests", rate)
    assert excess is not None
    assert (excess.window, excess.limit) == ("hour", 2)
    assert excess.retry_after == pytest.approx(3580, abs=5)
    assert store.entries["sekuire/ws 1/requests/minute/1"] == 2
    excess = limiter.hit("requests", Rate(max_per_minute=2))
    assert excess is not None
    assert (excess.window, excess.retry_after) == ("minute", pytest.approx(40, abs=5))
    assert limiter.hit("requests", Rate(max_per_minute=2), 3) == Excess("minute", 2, None)


def test_a_race_for_the_last_of_an_hour(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever loses it is refused, although there was room when it looked."""
    limiter = shared(Store(full="hour"), monkeypatch)
    excess = limiter.hit("requests", Rate(max_per_minute=5, max_per_hour=2))
    assert excess is not None
    assert excess.window == "hour"


@pytest.mark.parametrize(
    ("limit", "amount"), [(MAX_UNITS, 7), (MAX_UNITS + 1, 7), (10**6, 1), (10**6, 999), (123457, 4321)]
)
def test_units_of_tokens(limit: int, amount: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large limit is counted in units, so that a store keeps few entries, and never admits more than the limit."""
    store = Store()
    limiter = shared(store, monkeypatch)
    admitted = 0
    while limiter.hit("tokens", Rate(max_per_hour=limit), amount) is None:
        admitted += amount
    assert admitted <= limit
    ((_, units),) = store.entries.items()
    assert units <= MAX_UNITS
    if amount > limit / 2000:
        assert admitted > limit * 0.8


def test_requests_are_counted_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the limit: rounding up one request would halve it."""
    store = Store()
    limiter = shared(store, monkeypatch)
    limiter.hit("requests", Rate(max_per_hour=10**6))
    assert store.entries == {"sekuire/ws 1/requests/hour/1": 1}


def test_a_store_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is admitted that was not counted; the error repeats nothing of the store's, which may hold a password."""

    class Broken:
        def acquire_entry(self, *arguments: Any) -> bool:
            raise OSError("redis://:hunter2@localhost is gone")

        get_moving_window = acquire_entry

    limiter = shared(Broken(), monkeypatch)
    for rate in (
        Rate(max_per_minute=5),
        Rate(max_per_hour=5),
        Rate(5, 5) if False else Rate(max_per_minute=5, max_per_hour=5),
    ):
        with pytest.raises(PolicyUnavailableError) as caught:
            limiter.hit("requests", rate)
        assert str(caught.value) == "the store of the rate limits cannot be asked (OSError)"
        assert caught.value.__context__ is None
    policy = Policy.from_content({"rate_limits": {"requests": {"max_per_minute": 5}}})
    decision = PolicyEnforcer(policy, limiter=limiter).check_rate_limit("requests")
    assert decision.rule == "policy.unavailable"
    assert decision.reason == "rate 'requests' is refused: the store of the rate limits cannot be asked (OSError)"
    assert PolicyEnforcer(policy, limiter=limiter).check_rate_limit("tokens")


def test_a_store_that_is_not_there() -> None:
    """A Redis that does not answer denies within a time limit, without naming the password."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    limiter = RateLimiter(f"redis://:hunter2@127.0.0.1:{port}/0", namespace="w")
    with pytest.raises(PolicyUnavailableError) as caught:
        limiter.hit("requests", Rate(max_per_minute=5))
    assert "ConnectionError" in str(caught.value)
    assert "hunter2" not in str(caught.value)
    assert "hunter2" not in repr(limiter)
    limiter.close()


@pytest.mark.parametrize(
    ("uri", "problem"),
    [
        (5, "must be a str"),
        ("", "no store for rate limits at ''"),
        ("nonsense", "no store"),
        ("gopher://:hunter2@localhost", "no store for rate limits at 'gopher'://"),
        ("async+memory://", "no moving window that threads can use"),
        ("redis://:hunter2@[::1", "no store for rate limits at 'redis'://"),
    ],
)
def test_stores_that_are_none(uri: Any, problem: str) -> None:
    """The error names the option and the scheme, and nothing of the rest."""
    with pytest.raises(ConfigurationError) as caught:
        RateLimiter(uri, namespace="w")
    assert problem in str(caught.value)
    assert caught.value.option == "storage_uri"
    assert "hunter2" not in str(caught.value)
    assert caught.value.__context__ is None


@pytest.mark.parametrize("namespace", ["", None, 5])
def test_a_namespace_is_needed(namespace: Any) -> None:
    """Without one, strangers would share a limit."""
    with pytest.raises(ConfigurationError, match="namespace"):
        RateLimiter(namespace=namespace)
