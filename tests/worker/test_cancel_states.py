"""Cancelling a task in each state, on everything that runs handlers, while the stream is cut: one result each time."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import pathlib
from typing import Any, Callable, Iterator

import pytest

from sekuire import ProcessExecutor, Worker

from ..support.cancelling import CUTS, STATES, STATES_OF_EXECUTORS, check_cancel

Make = Callable[..., Worker]


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("capability", ["hold", pytest.param("hold-async", marks=pytest.mark.slow)])
def test_in_a_thread(
    platform: Any, worker_of: Make, tmp_path: pathlib.Path, capability: str, state: str, cut: str
) -> None:
    """The next heartbeat makes a lost order good, for a handler in a thread and for a coroutine."""
    check_cancel(platform, worker_of, tmp_path, state, cut, capability)


@pytest.fixture(scope="module", params=["ProcessExecutor", "ProcessPoolExecutor", "ThreadPoolExecutor"])
def executor(request: pytest.FixtureRequest) -> Iterator[Any]:
    """One process of ours or of the standard library's, or one thread."""
    made: Any
    if request.param == "ProcessExecutor":
        made = ProcessExecutor(1, kill_after=0.3)
    elif request.param == "ProcessPoolExecutor":
        made = concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
    else:
        made = concurrent.futures.ThreadPoolExecutor(1)
    with made:
        # What watches its processes outlives a test.
        assert made.submit(abs, -1).result() == 1
        yield made


@pytest.mark.slow
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("state", STATES_OF_EXECUTORS)
def test_in_an_executor(
    platform: Any, worker_of: Make, tmp_path: pathlib.Path, executor: Any, state: str, cut: str
) -> None:
    """The same for a handler elsewhere, and for one that waits in the executor."""
    check_cancel(platform, worker_of, tmp_path, state, cut, executor=executor)
