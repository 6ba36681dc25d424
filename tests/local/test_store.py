"""The store by itself: times it cannot wait for."""

from __future__ import annotations

import threading
from typing import Any, Dict, FrozenSet, List, Optional

import pytest

from sekuire.local import store as local_store
from sekuire.local.fields import Submission
from sekuire.local.store import Identity, Refusal, Settings, Store


def task_of(capability: str, fields: Dict[str, Any], max_attempts: int = 1) -> Submission:
    return Submission(capability, fields, max_attempts, 0.0, None)


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
    task_id = store.submit("a", task_of("c", {"input": 1}, 10))
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
    ids = [store.submit("a", task_of(name, {"input": 1})) for name in ("x", "y", "z", "y", "x")]
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
    ids = [store.submit("a", task_of("c", {"input": 1})) for _ in range(200)]
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
    task_id = store.submit("a", task_of("c", {"input": 1}))
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
    task_id = store.submit("a", task_of("c", {"input": 1}))
    with pytest.raises(Refusal):
        store.complete(identity, task_id, "k", {"status": "completed", "output": 1})
    assert store.task(task_id)["status"] == "queued"
    assert _claim(store, identity) is not None


@pytest.mark.parametrize("seconds", [0.0, 601.0, 3601.0])
def test_a_used_up_install_token_is_used_up(store: Store, clock: Clock, seconds: float) -> None:
    """Another holder never gets an installation for it. The same one gets its answer again, for ten minutes."""
    token = store.create_install_token("a")
    first = store.bootstrap(token, "a", [], {}, "holder-1")
    clock.now += seconds
    if not seconds:
        assert store.bootstrap(token, "a", ["other"], {}, "holder-1") == first
    for key in ("holder-2", None) if not seconds else ("holder-1", "holder-2", None):
        with pytest.raises(Refusal) as refused:
            store.bootstrap(token, "a", [], {}, key)
        assert (refused.value.status, refused.value.code) == (409, "INSTALL_TOKEN_CONSUMED")
    assert len(store.installations()) == 1


def test_the_key_of_a_submission_is_forgotten_after_a_day(store: Store, clock: Clock) -> None:
    """For 24 hours a repeated key gets the same task; after that it makes another."""
    fields = {"input": {}}
    first = store.submit_once("k", "a", task_of("c", fields))
    clock.now += 86_399
    assert store.submit_once("k", "a", task_of("c", fields)) == (first[0], False)
    clock.now += 2
    second = store.submit_once("k", "a", task_of("c", fields))
    assert second[1]
    assert second[0] != first[0]


@pytest.mark.parametrize("capabilities", [None, frozenset({"c"})])
def test_a_claim_does_not_read_finished_tasks(store: Store, capabilities: Optional[FrozenSet[str]]) -> None:
    """What a claim costs does not grow with the tasks that have ended, whatever other indexes there are."""
    identity = _install(store)

    def steps_of_a_claim() -> int:
        steps: List[None] = []
        store.submit("a", task_of("c", {"input": 1}))
        with store.transaction() as db:
            db.set_progress_handler(lambda: steps.append(None), 1)
        claim = _claim(store, identity, capabilities=capabilities)
        with store.transaction() as db:
            db.set_progress_handler(None, 1)
        assert claim is not None
        store.complete(identity, claim.task_id, None, {"status": "completed", "output": 1})
        return len(steps)

    first = steps_of_a_claim()
    for _ in range(200):
        last = steps_of_a_claim()
    assert last < first + 50
