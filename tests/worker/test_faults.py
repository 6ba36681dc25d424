"""The worker under every fault that the local platform can inject: each task is done once, and every stop returns."""

from __future__ import annotations

import collections
import threading
from typing import Any, Callable, Counter, List

import pytest

from sekuire import Worker
from sekuire.local import Faults
from sekuire.worker import release, report, shutdown

from ..conftest import AGENT
from ..support.waiting import GUARD, until

Make = Callable[..., Worker]

TASKS = 30

#: Every kind, as text: what one line of `sekuire dev --fault` does.
FAULTS = [
    "latency:0.001-0.03",
    "latency:0.001-0.03,when=after",
    "error:500,rate=0.4",
    "error:503,rate=0.4,retry-after=0",
    "error:429,rate=0.4,when=after",
    "error:503,rate=0.5,on=complete",
    "error:401,rate=0.2,on=complete+heartbeat+task_stream",
    "reset:rate=0.4",
    "reset:rate=0.4,when=after",
    "half-answer:rate=0.4",
    "half-answer:on=task_stream,times=20",
    "cut-streams:every=0.01-0.03,times=8",
    "stall-streams:0.01-0.05,every=0.01-0.03,times=5",
    "expire-tokens:every=0.01-0.03,times=8",
    "outage:0.02-0.1,every=0.02-0.1,times=3",
    "outage:0.02-0.1,every=0.02-0.1,times=3,status=503,retry-after=0",
]


@pytest.fixture(autouse=True)
def short_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    """A result that was struck many times in a row is not the one that everybody waits for."""
    monkeypatch.setattr(report, "RETRY_MAX", 0.2)
    monkeypatch.setattr(release, "RETRY_MAX", 0.2)


class Work:
    """Handlers that count their runs."""

    def __init__(self, worker: Worker) -> None:
        self.runs: Counter[int] = collections.Counter()
        self._lock = threading.Lock()
        worker.on_task("double", self._double)
        worker.on_task("shout", self._shout)

    def _double(self, ctx: Any, input: Any) -> Any:
        with self._lock:
            self.runs[input] += 1
        return {"is": input * 2}

    def _shout(self, ctx: Any, input: Any) -> Any:
        ctx.report_progress(0.5, "halfway")
        with self._lock:
            self.runs[input] += 1
        return {"is": f"{input}!"}

    @staticmethod
    def submit(platform: Any, number: int) -> str:
        task_id: str = platform.submit("double" if number % 2 else "shout", number, AGENT)
        return task_id

    def check(self, platform: Any, tasks: List[str]) -> None:
        """Each task was run once and has its one result."""
        for number, task_id in enumerate(tasks):
            task = platform.wait(task_id, GUARD)
            assert task["output"] == {"is": number * 2 if number % 2 else f"{number}!"}, task
            keys = {body["attempt"] for status, body in platform.completions(task_id) if status == 200}
            assert len(keys) == 1
        assert self.runs == dict.fromkeys(range(len(tasks)), 1)


@pytest.mark.parametrize("text", FAULTS)
def test_each_task_is_done_once(make_platform: Callable[..., Any], worker_of: Make, text: str) -> None:
    """From login to stop under one fault: every task runs once, its result is accepted once, nothing is undelivered."""
    platform = make_platform(faults=Faults(seed=7))
    worker = worker_of(platform, read_timeout=2.0, max_workers=4)
    work = Work(worker)
    fault = platform.faults.add(text)
    worker.start()
    tasks = []
    while len(tasks) < TASKS or not (fault.is_over() or fault.injected > 5):
        tasks.append(Work.submit(platform, len(tasks)))
        if len(tasks) % 10 == 0:
            platform.wait(tasks[-1], GUARD)
    work.check(platform, tasks)
    until(lambda: worker.stats().undelivered == 0)
    worker.stop()
    stats = worker.stats()
    assert (stats.completed, stats.failed, stats.rejected, stats.dropped) == (len(tasks), 0, 0, 0)


@pytest.mark.slow
def test_all_faults_together(make_platform: Callable[..., Any], worker_of: Make) -> None:
    """A bit of everything at once changes nothing of that."""
    platform = make_platform(faults=Faults(seed=11))
    faults = platform.faults
    for kind in ("error:500,", "error:429,when=after,", "reset:", "reset:when=after,", "half-answer:", "page:502,"):
        faults.add(kind + "rate=0.08")
    faults.add("interim:103,rate=0.2")
    faults.latency(0.001, 0.02, rate=0.3)
    for text in ("cut-streams:", "stall-streams:0.05,", "expire-tokens:", "outage:0.05,", "outage:0.05,status=503,"):
        # Not without end: where a login takes longer than the time between them, nothing would ever get through.
        faults.add(text + "every=0.05-0.3,times=50")
    worker = worker_of(platform, read_timeout=2.0, max_workers=4)
    work = Work(worker)
    worker.start()
    tasks: List[str] = []
    while len(tasks) < 100 or not all(faults.injected.values()):
        tasks.append(Work.submit(platform, len(tasks)))
        if len(tasks) % 20 == 0:
            platform.wait(tasks[-1], GUARD)
    work.check(platform, tasks)
    faults.clear()
    until(lambda: worker.stats().undelivered == 0)


def test_a_result_finished_in_an_outage_arrives_after_it(platform: Any, worker_of: Make) -> None:
    """The handler runs on while the platform is gone; its result is delivered when it is back."""
    worker = worker_of(platform)
    finish, runs = threading.Event(), []

    def slow(ctx: Any, input: Any) -> Any:
        runs.append(ctx.task_id)
        finish.wait(GUARD)
        return "done"

    worker.on_task("slow", slow)
    worker.start()
    task_id = platform.submit("slow", {}, AGENT)
    until(lambda: runs)
    with platform.faults.outage():
        until(lambda: not worker.is_connected())
        finish.set()
        until(lambda: worker.stats().undelivered == 1)
        later = platform.submit("slow", {}, AGENT)
        assert platform.task(task_id)["status"] == "assigned"
    assert platform.wait(task_id, GUARD)["output"] == "done"
    assert platform.wait(later, GUARD)["output"] == "done"
    assert runs == [task_id, later]


def test_a_silent_stream_is_given_up(platform: Any, worker_of: Make) -> None:
    """A stalled stream is abandoned after stream_idle_timeout, and the task is got on a new one."""
    worker = worker_of(platform, stream_idle_timeout=0.3)
    work = Work(worker)
    worker.start()
    assert worker.wait_until_connected(GUARD)
    platform.faults.stall_streams(3600)
    work.check(platform, [Work.submit(platform, 0)])
    assert worker.stats().reconnects >= 1


def test_a_revocation_in_an_outage(platform: Any, worker_of: Make) -> None:
    """It takes effect when the platform can be reached again: the worker stops because of it."""
    worker = worker_of(platform)
    Work(worker)
    worker.start()
    assert worker.wait_until_connected(GUARD)
    with platform.faults.outage():
        until(lambda: not worker.is_connected())
        platform.revoke(platform.installations()[0]["installation_id"], "misbehaved")
    assert worker.wait(GUARD)
    assert "misbehaved" in str(worker.stop_reason)


@pytest.mark.parametrize("command", ["pause", "terminate"])
def test_a_command_in_an_outage(platform: Any, worker_of: Make, command: str) -> None:
    """It takes effect when the platform can be reached again."""
    worker = worker_of(platform)
    Work(worker)
    worker.start()
    installation_id = platform.installations()[0]["installation_id"]
    assert worker.wait_until_connected(GUARD)
    with platform.faults.outage():
        until(lambda: not worker.is_connected())
        platform.command(installation_id, command, "in the dark")
    if command == "terminate":
        assert worker.wait(GUARD)
        return
    until(worker.is_paused)
    with platform.faults.outage():
        platform.command(installation_id, "resume")
    until(lambda: not worker.is_paused())
    work_id = Work.submit(platform, 1)
    assert platform.wait(work_id, GUARD)["status"] == "completed"


@pytest.mark.parametrize(
    "text",
    [
        "latency:3600",
        "latency:3600,when=after",
        "error:500",
        "error:503,retry-after=60",
        "reset",
        "reset:when=after",
        "half-answer",
        "cut-streams:every=0.01",
        "stall-streams:3600,every=0.01",
        "expire-tokens:every=0.005",
        "outage:3600,every=0.01",
        "outage:3600,every=0.01,status=503",
    ],
)
def test_a_stop_under_a_fault(
    make_platform: Callable[..., Any], worker_of: Make, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    """stop() returns by its deadline with a handler at work and a fault that does not end, and no thread is left."""
    platform = make_platform()
    worker = worker_of(platform)
    begun, runs = threading.Event(), []

    def handler(ctx: Any, input: Any) -> Any:
        runs.append(ctx.task_id)
        begun.set()
        ctx.wait_cancelled(0.05)
        return "done"

    worker.on_task("slow", handler)
    worker.start()
    task_id = platform.submit("slow", {}, AGENT)
    assert begun.wait(GUARD)
    fault = platform.faults.add(text)
    if "every" in text:
        until(lambda: fault.injected)
    # The least that a stop leaves for the reports, whatever its deadline.
    monkeypatch.setattr(shutdown, "_FLUSH_LEAST", 0.2)
    worker.stop(0.3)
    assert not worker.is_running()
    assert runs == [task_id]
    platform.faults.clear()
