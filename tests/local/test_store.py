"""The store by itself: times it cannot wait for, and the form policies are hashed in."""

from __future__ import annotations

import json
import math
import sys
import threading
import types
from typing import Any, Optional

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sekuire.local import store as local_store
from sekuire.local.store import Identity, Refusal, Settings, Store, _canonical, policy_hash


class Clock:
    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(clock: Clock) -> Store:
    return Store(None, Settings(), clock)


def _install(store: Store, agent_id: str = "a") -> Identity:
    grant = store.bootstrap(store.create_install_token(agent_id), agent_id, [], {}, None)
    return store.authenticate(grant["runtime_token"])


def _claim(store: Store, identity: Identity, worker_id: str = "w", **options: Any) -> Optional[Any]:
    defaults: Any = {"capabilities": None, "left_to_others": frozenset(), "paused": False, "refused": frozenset()}
    return store.claim(identity.installation_id, worker_id, identity.agent_id, **{**defaults, **options})


FAILED = {"status": "failed", "error": {"code": "x", "message": "", "retryable": True}, "execution_time_ms": 1}


def test_the_newest_audit_events_are_kept(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The log holds a bounded number of events; numbers go on rising, and a batch is known while one is kept."""
    monkeypatch.setattr(local_store, "MAX_LOGS", 5)
    for number in range(4):
        events = [{"event_type": "health", "severity": "info", "n": 3 * number + i} for i in range(3)]
        store.log(events, f"b:{number}")
        store.log(events, f"b:{number}")
    assert [(seq, event["n"]) for seq, event in store.logs(None, None)] == [(8, 7), (9, 8), (10, 9), (11, 10), (12, 11)]
    assert [seq for seq, _ in store.logs("health", "info", limit=2, after=9)] == [10, 11]
    assert store.logs("health", "warn") == []


def test_tries_wait_twice_as_long_each_time(store: Store, clock: Clock) -> None:
    """The pause before a new try is 1, 2, 4 … seconds and at most a minute."""
    identity = _install(store)
    task_id = store.submit("a", "c", {"input": 1}, max_attempts=10)
    delays = []
    for attempt in range(1, 10):
        claim = _claim(store, identity)
        assert claim is not None
        assert claim.attempt == attempt
        done = store.complete(identity, task_id, f"{task_id}:{attempt}", FAILED)
        assert done.retry_in is not None
        delays.append(done.retry_in)
        clock.now += done.retry_in - 0.001
        assert _claim(store, identity) is None
        clock.now += 0.002
    assert delays == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    _claim(store, identity)
    assert store.complete(identity, task_id, None, FAILED).final


def test_the_oldest_of_several_capabilities_comes_first(store: Store) -> None:
    """A worker with several capabilities gets its tasks in order of age."""
    identity = _install(store)
    ids = [store.submit("a", name, {"input": 1}) for name in ("x", "y", "z", "y", "x")]
    got = []
    while True:
        claim = _claim(store, identity, capabilities=frozenset({"x", "y"}))
        if claim is None:
            break
        got.append(claim.task_id)
    assert got == [ids[0], ids[1], ids[3], ids[4]]


def test_a_task_is_given_once_under_contention(store: Store) -> None:
    """Many threads that claim at once never get the same task."""
    identity = _install(store)
    ids = [store.submit("a", "c", {"input": 1}) for _ in range(200)]
    got: list[str] = []

    def claim_all(worker_id: str) -> None:
        while True:
            claim = _claim(store, identity, worker_id)
            if claim is None:
                return
            got.append(claim.task_id)

    threads = [threading.Thread(target=claim_all, args=(f"w{n}",)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == sorted(ids)


def test_the_first_completion_wins_under_contention(store: Store) -> None:
    """Of many completions at once exactly one is accepted."""
    identity = _install(store)
    task_id = store.submit("a", "c", {"input": 1})
    _claim(store, identity)
    statuses: list[int] = []
    barrier = threading.Barrier(8)

    def complete(n: int) -> None:
        barrier.wait()
        body = {"status": "completed", "output": n}
        statuses.append(store.complete(identity, task_id, f"key{n}", body).status)

    threads = [threading.Thread(target=complete, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(statuses) == [200] + [409] * 7


def test_an_install_token_is_used_once_under_contention(store: Store) -> None:
    """Of many bootstraps with one token exactly one succeeds."""
    token = store.create_install_token("a")
    results: list[str] = []
    barrier = threading.Barrier(8)

    def bootstrap() -> None:
        barrier.wait()
        try:
            store.bootstrap(token, "a", [], {}, None)
            results.append("made")
        except Refusal as refusal:
            results.append(refusal.code)

    threads = [threading.Thread(target=bootstrap) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == ["INSTALL_TOKEN_CONSUMED"] * 7 + ["made"]


def test_a_refused_change_leaves_nothing_behind(store: Store) -> None:
    """A refusal in the middle of a transaction undoes it, and the next one works."""
    identity = _install(store)
    task_id = store.submit("a", "c", {"input": 1})
    with pytest.raises(Refusal):
        store.complete(identity, task_id, "k", {"status": "completed", "output": 1})
    assert store.task(task_id)["status"] == "queued"
    assert _claim(store, identity) is not None


def test_the_canonical_form() -> None:
    """Objects are ordered by UTF-16 units, strings escaped as little as JSON allows (RFC 8785)."""
    value = {
        "\u20ac": 1,
        "\r": 2,
        "\ufb33": 3,
        "1": 4,
        "\U0001f600": 5,
        "\x80": 6,
        "\u00f6": 7,
        "a": ['\x1f/\\"\u2028', True, None],
    }
    assert _canonical(value) == (
        '{"\\r":2,"1":4,"a":["\\u001f/\\\\\\"\u2028",true,null],"\x80":6,"ö":7,"€":1,"\U0001f600":5,"\ufb33":3}'
    )


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (-0.0, "0"),
        (1, "1"),
        (-1.5, "-1.5"),
        (100, "100"),
        (1e21, "1e+21"),
        (1e20, "100000000000000000000"),
        (1e-6, "0.000001"),
        (1e-7, "1e-7"),
        (1.5e-7, "1.5e-7"),
        (5e-324, "5e-324"),
        (1.7976931348623157e308, "1.7976931348623157e+308"),
        (9007199254740992, "9007199254740992"),
        (295147905179352830000, "295147905179352830000"),
        (333333333.33333329, "333333333.3333333"),
        (4.5, "4.5"),
        (0.002, "0.002"),
        (0.1, "0.1"),
        (1e23, "1e+23"),
        (123456.789, "123456.789"),
        (1234567e15, "1.234567e+21"),
    ],
)
def test_the_canonical_form_of_numbers(number: float, text: str) -> None:
    """Numbers are written as ECMAScript writes them; examples of RFC 8785, appendix B, and their neighbours."""
    assert _canonical(number) == text


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_canonical_numbers_are_the_numbers(number: float) -> None:
    """No number changes its value in its canonical form."""
    assert float(_canonical(number)) == number
    assert json.loads(_canonical([number]), parse_int=float) == [number]


def test_the_hash_needs_blake3(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package `blake3` the hash is empty; with it, it is of the canonical form."""
    monkeypatch.setitem(sys.modules, "blake3", None)
    assert policy_hash({"b": 1, "a": 2.0}) == ""
    seen = []

    class Digest:
        def __init__(self, data: bytes) -> None:
            seen.append(data)

        def hexdigest(self) -> str:
            return "ab" * 32

    monkeypatch.setitem(sys.modules, "blake3", types.SimpleNamespace(blake3=Digest))
    assert policy_hash({"b": 1, "a": 2.0}) == "ab" * 32
    assert seen == [b'{"a":2,"b":1}']
    with pytest.raises(ValueError):
        policy_hash({"a": math.inf})
