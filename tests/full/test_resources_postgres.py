"""A pool of connections to PostgreSQL as a resource: in threads, in processes, and gone after each stop."""

from __future__ import annotations

import os
import pathlib
import shutil
import signal
import tempfile
from typing import Any, Callable, Dict, Iterator, List

import pytest

from sekuire import ProcessExecutor, TaskContext, TaskRegistry, Worker

from ..conftest import AGENT
from ..support.waiting import GUARD, until
from .postgres import postgres

pytestmark = pytest.mark.full

psycopg = pytest.importorskip("psycopg")

#: The address of the server, for this process and those of a pool.
ADDRESS = "RESOURCES_POSTGRES"

threads = TaskRegistry()
processes = TaskRegistry()


@threads.resource
def pool() -> Iterator[Any]:
    from psycopg_pool import ConnectionPool

    with ConnectionPool(os.environ[ADDRESS], min_size=2, max_size=2, timeout=GUARD) as made:
        made.wait(GUARD)
        yield made


@threads.resource(scope="task")
def db(*, pool: Any) -> Iterator[Any]:
    # The pool commits at the end of the block, or rolls back if the handler fails.
    with pool.connection() as connection:
        yield connection


@processes.resource(name="db", scope="process")
def own() -> Iterator[Any]:
    with psycopg.connect(os.environ[ADDRESS], autocommit=True) as connection:
        yield connection


@threads.task("book")
@processes.task("book")
def book(ctx: TaskContext, input: Dict[str, Any], *, db: Any) -> List[int]:
    db.execute("INSERT INTO bookings VALUES (%s)", [input["name"]])
    if input["name"] == "nobody":
        raise ValueError("who?")
    [backend] = db.execute("SELECT pg_backend_pid() FROM pg_sleep(0.01)").fetchone()
    return [os.getpid(), backend]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A server. Its path is short, because that of a socket must be."""
    directory = pathlib.Path(tempfile.mkdtemp(prefix="pg"))
    try:
        with postgres(directory) as server:
            yield f"host={server['HOST']} dbname={server['NAME']} user={server['USER']}"
    finally:
        shutil.rmtree(directory)


@pytest.fixture
def watch(address: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A connection of the test's own, beside those of the worker."""
    monkeypatch.setenv(ADDRESS, address)
    with psycopg.connect(address, autocommit=True) as connection:
        connection.execute("DROP TABLE IF EXISTS bookings")
        connection.execute("CREATE TABLE bookings (name text)")
        yield connection


def count(watch: Any, query: str) -> int:
    number: int = watch.execute(query).fetchone()[0]
    return number


def others(watch: Any) -> int:
    """How many further connections the server has."""
    return count(
        watch,
        "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()",
    )


def book_all(platform: Any, names: List[str]) -> List[Dict[str, Any]]:
    ids = [platform.submit("book", {"name": name}, AGENT) for name in names]
    return [platform.wait(one, 4 * GUARD) for one in ids]


def test_threads(platform: Any, worker_of: Callable[..., Worker], watch: Any) -> None:
    """Eight handlers share two connections, each has its transaction, and a stop leaves none, a hundred times."""
    worker = worker_of(platform, max_workers=8)
    worker.include(threads)
    with worker:
        results = book_all(platform, [*map(str, range(30)), "nobody"])
        assert [one["status"] for one in results] == ["completed"] * 30 + ["failed"]
        assert len({one["output"][1] for one in results[:-1]}) <= 2
        assert others(watch) == 2
    assert count(watch, "SELECT count(*) FROM bookings") == 30
    until(lambda: others(watch) == 0, GUARD)
    for _ in range(100):
        worker = worker_of(platform)
        worker.include(threads)
        with worker:
            pass
    until(lambda: others(watch) == 0, GUARD)


def test_processes(platform: Any, worker_of: Callable[..., Worker], watch: Any) -> None:
    """Each process has a connection of its own; the one after a killed process opens another; the end closes all."""
    with ProcessExecutor(2) as executor:
        worker = worker_of(platform, executor=executor, max_workers=2)
        worker.include(processes)
        with worker:
            pairs = {tuple(one["output"]) for one in book_all(platform, list("abcdefgh"))}
            assert len(pairs) == len({process for process, _ in pairs}) == len({backend for _, backend in pairs})
            for process, _ in pairs:
                os.kill(process, signal.SIGKILL)
            until(lambda: others(watch) == 0, GUARD)
            after = {tuple(one["output"]) for one in book_all(platform, ["i"])}
            assert not after & pairs
            assert others(watch) >= 1
    until(lambda: others(watch) == 0, GUARD)
