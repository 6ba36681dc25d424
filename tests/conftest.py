"""Fixtures for all tests: a local platform, workers that are stopped, and no thread left behind."""

from __future__ import annotations

import gc
import signal
import threading
import time
from typing import Any, Callable, Iterator, List

import pytest
from hypothesis import HealthCheck, settings

from sekuire import Worker, create_worker

from .support.scripted import Blackhole, Scripted
from .support.waiting import GUARD, client_threads

AGENT = "agent-1"

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # A shell's background job ignores Ctrl-C, and so would every process that a test starts to send it one.
    signal.signal(signal.SIGINT, signal.default_int_handler)


# The same examples everywhere. A busy machine makes slow examples, which say nothing of the code.
settings.register_profile(
    "ci", derandomize=True, database=None, deadline=None, print_blob=True, suppress_health_check=list(HealthCheck)
)


def pytest_collection_finish() -> None:
    """Leave what the collection has made out of later rounds of the garbage collector. Some tests collect often."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    """Every thread of the library ends with its test."""
    before = set(threading.enumerate())
    yield
    mine = [thread for thread in client_threads() if thread not in before]
    end = time.monotonic() + GUARD
    for thread in mine:
        # One that has told its end may still be on its last line.
        thread.join(max(0.0, end - time.monotonic()))
    assert [thread.name for thread in mine if thread.is_alive()] == []


@pytest.fixture
def make_platform() -> Iterator[Callable[..., Any]]:
    """Started local platforms with options of one's own, stopped at the end."""
    from sekuire.local import LocalPlatform

    made: List[LocalPlatform] = []

    def make(**options: Any) -> LocalPlatform:
        platform = LocalPlatform(**{"redelivery_delay": 60.0, "retry_delay": 0.05, **options})
        made.append(platform)
        platform.start()
        return platform

    yield make
    for platform in made:
        platform.stop()


@pytest.fixture
def platform(make_platform: Callable[..., Any]) -> Any:
    return make_platform()


@pytest.fixture
def scripted() -> Iterator[Scripted]:
    server = Scripted()
    yield server
    server.close()


@pytest.fixture
def blackhole() -> Iterator[Blackhole]:
    hole = Blackhole()
    yield hole
    hole.close()


@pytest.fixture
def worker_of(request: pytest.FixtureRequest) -> Iterator[Callable[..., Worker]]:
    """Workers for a platform (local, scripted, or a URL), with options of one's own, stopped at the end."""
    made: List[Worker] = []

    def make(platform: Any, **options: Any) -> Worker:
        url = platform if isinstance(platform, str) else platform.url
        ways = {"install_token", "runtime_token", "refresh_token", "token_provider", "credentials_store"}
        if not ways & set(options):
            issue = getattr(platform, "create_install_token", lambda agent: "skt-1")
            options["install_token"] = issue(options.get("agent_id", AGENT))
        worker = create_worker(
            **{
                "api_base_url": url,
                "agent_id": AGENT,
                "heartbeat_interval": 0.2,
                "reconnect_min": 0.01,
                "reconnect_max": 0.05,
                "connect_timeout": 2.0,
                "read_timeout": 5.0,
                "start_timeout": GUARD,
                "shutdown_timeout": GUARD,
                **options,
            }
        )
        made.append(worker)
        return worker

    yield make
    for worker in made:
        worker.stop(1.0)
