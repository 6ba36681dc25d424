"""Rate limits that processes share through a real Redis: never exceeded, and closed when it is gone."""

from __future__ import annotations

import pathlib
import subprocess
import sys
from typing import Callable, Iterator, List

import pytest

from sekuire import ProcessExecutor
from sekuire.errors import PolicyUnavailableError
from sekuire.policy import Policy, PolicyEnforcer
from sekuire.policy.document import Rate
from sekuire.policy.limits import RateLimiter

from ..support import elsewhere
from ..support.waiting import GUARD
from .redis import free_port, redis_server

pytestmark = pytest.mark.full

ROOT = pathlib.Path(__file__).resolve().parents[2]

#: Asks from several threads as fast as it can, once told to begin; prints how much was admitted.
ASKER = """
import sys, threading
from sekuire.policy import Policy, PolicyEnforcer
from sekuire.policy.limits import RateLimiter
uri, kind, minute, hour, amount, times = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
content = {"rate_limits": {kind: {"max_per_minute": minute, "max_per_hour": hour}}}
policy = Policy.from_content(content, workspace_id="ws_1")
enforcer = PolicyEnforcer(policy, limiter=RateLimiter(uri, namespace="ws_1"))
admitted = [0] * 4
def ask(index):
    for _ in range(times):
        decision = enforcer.check_rate_limit(kind, amount)
        assert decision or decision.rule.startswith("rate_limit."), decision
        admitted[index] += amount * bool(decision)
threads = [threading.Thread(target=ask, args=(index,)) for index in range(4)]
print("ready", flush=True)
sys.stdin.readline()
for thread in threads: thread.start()
for thread in threads: thread.join()
print(sum(admitted), flush=True)
"""


@pytest.fixture(scope="module")
def uri() -> Iterator[str]:
    port = free_port()
    with redis_server(port):
        yield f"redis://127.0.0.1:{port}/0"


@pytest.fixture(autouse=True)
def empty(uri: str) -> None:
    import redis

    with redis.Redis.from_url(uri) as client:
        client.flushall()


@pytest.fixture
def limiter_of() -> Iterator[Callable[[str, str], RateLimiter]]:
    """Limiters of a store and a namespace, closed at the end."""
    made: List[RateLimiter] = []

    def make(uri: str, namespace: str) -> RateLimiter:
        made.append(RateLimiter(uri, namespace=namespace))
        return made[-1]

    yield make
    for limiter in made:
        limiter.close()


def admitted_by_two(uri: str, *arguments: object) -> int:
    """What two processes of four threads each were admitted, all asking at once."""
    command = [sys.executable, "-c", ASKER, uri, *map(str, arguments)]
    processes: List["subprocess.Popen[str]"] = []
    try:
        for _ in range(2):
            processes.append(
                subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            )
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        return sum(int(process.communicate(timeout=GUARD)[0]) for process in processes)
    finally:
        for process in processes:
            process.kill()
            process.wait(GUARD)


@pytest.mark.parametrize(("minute", "hour", "wanted"), [(300, 1000, 300), (1000, 250, 250), (1, 1, 1)])
def test_two_processes_share_one_limit_of_requests(uri: str, minute: int, hour: int, wanted: int) -> None:
    """Together they are admitted exactly what the smaller limit says."""
    assert admitted_by_two(uri, "requests", minute, hour, 1, 100) == wanted


def test_two_processes_share_one_limit_of_tokens(uri: str) -> None:
    """Counted in units, they never exceed it, and come close."""
    admitted = admitted_by_two(uri, "tokens", 100_000, 10**6, 700, 100)
    assert 90_000 <= admitted <= 100_000


def test_amounts_as_large_as_a_store_takes_at_once(uri: str, limiter_of: Callable[[str, str], RateLimiter]) -> None:
    """A whole limit in one question fits, and nothing after it."""
    limiter = limiter_of(uri, "large")
    rate = Rate(max_per_minute=10**7, max_per_hour=10**8)
    assert limiter.hit("tokens", rate, 10**7) is None
    excess = limiter.hit("tokens", rate, 1)
    assert excess is not None
    assert excess.window == "minute"
    assert excess.retry_after is not None
    assert 0 < excess.retry_after <= 60


def test_namespaces_and_kinds_do_not_meet(uri: str, limiter_of: Callable[[str, str], RateLimiter]) -> None:
    """Another workspace has a limit of its own."""
    rate = Rate(max_per_minute=1)
    for namespace in ("a", "b"):
        for kind in ("requests", "tokens"):
            limiter = limiter_of(uri, namespace)
            assert limiter.hit(kind, rate) is None
            assert limiter.hit(kind, rate) is not None


def test_a_changed_limit_keeps_its_counts(uri: str, limiter_of: Callable[[str, str], RateLimiter]) -> None:
    """A lower limit counts what was used before, a higher one gives the difference."""
    limiter = limiter_of(uri, "changed")
    assert [limiter.hit("requests", Rate(max_per_minute=5)) for _ in range(4)] == [None] * 4
    assert limiter.hit("requests", Rate(max_per_minute=3)) is not None
    assert [limiter.hit("requests", Rate(max_per_minute=6)) is None for _ in range(3)] == [True, True, False]


def test_a_changed_limit_of_other_units(uri: str, limiter_of: Callable[[str, str], RateLimiter]) -> None:
    """What was counted in larger units goes on counting; what is left of a higher limit may be used."""
    limiter = limiter_of(uri, "units")
    assert limiter.hit("tokens", Rate(max_per_minute=100_000), 100_000) is None
    for lower in (90_000, 70_000, 4_000):
        excess = limiter.hit("tokens", Rate(max_per_minute=lower), 1)
        assert excess is not None
        assert excess.retry_after is not None
        assert 0 < excess.retry_after <= 60
    assert limiter.hit("tokens", Rate(max_per_minute=1_000_000), 800_000) is None
    assert limiter.hit("tokens", Rate(max_per_minute=1_000_000), 200_000) is not None


def test_the_store_goes_and_comes_back(limiter_of: Callable[[str, str], RateLimiter]) -> None:
    """Without it nothing is admitted, and the rule says why; with it again, the same enforcer goes on."""
    port = free_port()
    uri = f"redis://:hunter2@127.0.0.1:{port}/0"
    policy = Policy.from_content({"rate_limits": {"requests": {"max_per_minute": 5}}})
    with redis_server(port, "--requirepass", "hunter2"):
        enforcer = PolicyEnforcer(policy, limiter=limiter_of(uri, "w"))
        assert enforcer.check_rate_limit("requests")
        with pytest.raises(PolicyUnavailableError) as caught:
            limiter_of(f"redis://127.0.0.1:{port}/0", "w").hit("requests", Rate(max_per_minute=5))
        assert "Authentication" in str(caught.value)
    decision = enforcer.check_rate_limit("requests")
    assert (bool(decision), decision.rule) == (False, "policy.unavailable")
    assert "hunter2" not in decision.reason
    with redis_server(port, "--requirepass", "hunter2"):
        assert enforcer.check_rate_limit("requests")


def test_a_handlers_process_shares_the_count(uri: str, limiter_of: Callable[[str, str], RateLimiter]) -> None:
    """The copy of an enforcer in a process that runs handlers counts in the same store, for all copies together."""
    policy = Policy.from_content({"rate_limits": {"tokens": {"max_per_minute": 10}}}, workspace_id="ws_1")
    enforcer = PolicyEnforcer(policy, limiter=limiter_of(uri, "ws_1"))
    assert enforcer.check_rate_limit("tokens", 4)
    with ProcessExecutor(1) as executor:
        assert executor.submit(elsewhere.count, enforcer, 4).result(GUARD)
        assert not executor.submit(elsewhere.count, enforcer, 4).result(GUARD)
    assert enforcer.check_rate_limit("tokens", 2)
    assert not enforcer.check_rate_limit("tokens", 1)
