"""The same handlers on a Dask cluster: two processes, one of which is killed in mid-task."""

from __future__ import annotations

import logging
import os
import pathlib
import signal
from typing import Any, Callable, Dict, Iterator

import pytest

from sekuire import TaskContext, Worker
from sekuire.executors.remote import is_remote

from ..conftest import AGENT
from ..support import elsewhere
from ..support.cancelling import CUTS, STATES_OF_EXECUTORS, check_cancel
from ..support.waiting import GUARD, until

pytestmark = [
    pytest.mark.full,
    # Dask's own threads and sockets at the end of a cluster one of whose processes was killed.
    pytest.mark.filterwarnings("default"),
]

Make = Callable[..., Worker]


@pytest.fixture
def client() -> Iterator[Any]:
    """A client of a cluster of two worker processes, each with two threads."""
    from distributed import Client, LocalCluster

    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    with LocalCluster(n_workers=2, threads_per_worker=2, processes=True, dashboard_address=None) as cluster:
        with Client(cluster) as client:
            yield client


def ended(platform: Any, capability: str, input: Any, **fields: Any) -> Dict[str, Any]:
    task: Dict[str, Any] = platform.wait(platform.submit(capability, input, AGENT, **fields), GUARD)
    return task


def events_of(client: Any) -> int:
    """How many events the scheduler remembers."""
    return int(client.run_on_scheduler(lambda dask_scheduler: len(dask_scheduler.extensions["events"]._events)))


def test_tasks_on_a_cluster(platform: Any, worker_of: Make, client: Any, tmp_path: pathlib.Path) -> None:
    """Handlers run in the cluster's processes: typed, async, failing, timed out, of the main module, and killed."""
    executor = client.get_executor()
    assert is_remote(executor)
    worker = worker_of(platform, executor=executor, max_workers=4)
    worker.include(elsewhere.tasks)

    @worker.on_task("local")
    def local(ctx: TaskContext, input: Any) -> Any:
        return [os.getpid(), type(ctx).__name__, input]

    with worker:
        # As the processes of a pool do, and with a handler that only cloudpickle can send.
        output = ended(platform, "sum", {"numbers": [1, 2], "by": "ada"})["output"]
        assert (output["sum"], output["built"]) == (3, {"numbers": [1], "by": "ada"})
        assert ended(platform, "sum", {"numbers": [None]})["error"]["code"] == "invalid_task"
        found = ended(platform, "facts", [1], timeout_ms=50_000)["output"]
        assert (found["kind"], found["capability"], found["input"]) == ("RemoteTaskContext", "facts", [1])
        assert ended(platform, "fail", "own")["error"]["code"] == "own"
        pid, kind, given = ended(platform, "local", {"x": 1})["output"]
        assert (pid != os.getpid(), kind, given) == (True, "RemoteTaskContext", {"x": 1})

        # A task whose time is over is cancelled by the cluster's own clock.
        path = tmp_path / "late"
        error = ended(platform, "hang", {"path": str(path), "until": "cancelled"}, timeout_ms=1000)["error"]
        assert error["code"] == "timeout"
        until(lambda: worker.stats().overdue == 0)
        assert path.read_text().split()[1] == "timeout"

        # SIGKILL in mid-task: that task fails, retryably, and Dask does not run it again; the others go on.
        stays, dies = tmp_path / "stays", tmp_path / "dies"
        task_id = platform.submit("hang", {"path": str(dies), "until": "killed"}, AGENT)
        until(lambda: dies.exists() and dies.read_text())
        others = []
        for number in range(3):
            path = pathlib.Path(f"{stays}{number}")
            others.append((path, platform.submit("hang", {"path": str(path), "until": "gone"}, AGENT)))
            until(lambda: path.exists() and path.read_text())  # noqa: B023
        victim = int(dies.read_text())
        os.kill(victim, signal.SIGKILL)
        error = platform.wait(task_id, GUARD)["error"]
        assert (error["code"], error["retryable"]) == ("handler_error", True)
        assert "lost" in error["message"]
        for path, other in others:
            was_there = int(path.read_text().split()[0]) == victim
            path.unlink()
            task = platform.wait(other, GUARD)
            assert (task["error"]["code"] if was_there else task["output"]) in ("handler_error", "let go")
        assert dies.read_text().split() == [str(victim)]

        # The cluster has a process left, and made a new one.
        for number in range(8):
            assert ended(platform, "sum", {"numbers": [number]})["output"]["sum"] == number
    assert events_of(client) == 0


def test_a_cancellation_reaches_the_cluster(
    platform: Any, worker_of: Make, client: Any, tmp_path: pathlib.Path
) -> None:
    """A command that terminates the worker is seen by the handler on the cluster."""
    path = tmp_path / "pid"
    worker = worker_of(platform, executor=client.get_executor(), max_workers=4)
    worker.include(elsewhere.tasks)
    with worker:
        task_id = platform.submit("hang", {"path": str(path), "until": "cancelled"}, AGENT)
        until(lambda: path.exists() and path.read_text())
        platform.command(platform.installations()[0]["installation_id"], "terminate", "enough")
        assert platform.wait(task_id, GUARD)["error"]["code"] == "worker_terminated"
        assert worker.wait(GUARD)
    assert path.read_text().split()[1] == "cancelled"
    assert events_of(client) == 0


def test_one_task_is_cancelled_in_each_state(make_platform: Any, worker_of: Make, tmp_path: pathlib.Path) -> None:
    """Also while the stream is cut, and where it waits in a cluster of one thread: it has one result each time."""
    from distributed import Client, LocalCluster

    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    with LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None) as cluster, Client(cluster) as client:
        for state in STATES_OF_EXECUTORS:
            for cut in CUTS:
                directory = tmp_path / state / cut
                directory.mkdir(parents=True)
                check_cancel(make_platform(), worker_of, directory, state, cut, executor=client.get_executor())
        until(lambda: events_of(client) == 0)


def test_a_pause_holds_what_waits_in_the_cluster(
    platform: Any, worker_of: Make, client: Any, tmp_path: pathlib.Path
) -> None:
    """What its four threads have not begun is answered worker_paused at once and never begins; what runs goes on."""
    worker = worker_of(platform, executor=client.get_executor(), max_workers=7)
    worker.include(elsewhere.tasks)
    paths = [tmp_path / f"{number}" for number in range(7)]
    with worker:
        tasks = [platform.submit("hang", {"path": str(path), "until": "gone"}, AGENT) for path in paths]
        until(lambda: sum(path.exists() for path in paths) == 4 and worker.stats().running == 7)
        begun = {one for one, path in zip(tasks, paths) if path.exists()}
        platform.command(platform.installations()[0]["installation_id"], "pause")
        for one in set(tasks) - begun:
            assert platform.wait(one, GUARD)["error"]["code"] == "worker_paused"
        assert {platform.task(one)["status"] for one in begun} == {"assigned"}
        for path in paths:
            path.unlink(missing_ok=True)
        for one in begun:
            assert platform.wait(one, GUARD)["output"] == "let go"
        until(lambda: events_of(client) == 0)
    assert not any(path.exists() for path in paths)
