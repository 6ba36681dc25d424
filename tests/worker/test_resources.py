"""Resources of real workers: opened by the start, closed by the stop, kept by processes, and never leaked."""

from __future__ import annotations

import logging
import os
import pathlib
import queue
import signal
import sqlite3
import threading
import time
from typing import Any, Callable, Dict, Iterator, List

import pytest

from sekuire import ProcessExecutor, TaskContext, TaskRegistry, Worker
from sekuire.errors import ConfigurationError

from ..conftest import AGENT
from ..support import shared
from ..support.builders import NOWHERE
from ..support.scripted import Scripted
from ..support.waiting import GUARD, until

Make = Callable[..., Worker]


def ended(platform: Any, capability: str, input: Any = None, **fields: Any) -> Dict[str, Any]:
    task: Dict[str, Any] = platform.wait(platform.submit(capability, input, AGENT, **fields), 4 * GUARD)
    return task


class Pool:
    """Connections to one SQLite file, for all threads of a worker."""

    def __init__(self, path: pathlib.Path, size: int) -> None:
        self._free: queue.Queue[sqlite3.Connection] = queue.Queue()
        self._all = [sqlite3.connect(path, timeout=GUARD, check_same_thread=False) for _ in range(size)]
        for connection in self._all:
            self._free.put(connection)

    def take(self) -> sqlite3.Connection:
        return self._free.get(timeout=GUARD)

    def give_back(self, connection: sqlite3.Connection) -> None:
        self._free.put(connection)

    def close(self) -> None:
        for connection in self._all:
            connection.close()


def test_a_pool_of_connections(platform: Any, worker_of: Make, tmp_path: pathlib.Path) -> None:
    """The worker keeps the pool, each task has a transaction of its own, and a handler that fails undoes it."""
    worker = worker_of(platform, max_workers=4)
    pools: List[Pool] = []

    @worker.resource
    def pool() -> Iterator[Pool]:
        made = Pool(tmp_path / "hotel.db", 2)
        pools.append(made)
        yield made
        made.close()

    @worker.resource(scope="task")
    def db(*, pool: Pool) -> Iterator[sqlite3.Connection]:
        connection = pool.take()
        try:
            with connection:
                yield connection
        finally:
            pool.give_back(connection)

    @worker.on_task("book")
    def book(ctx: TaskContext, input: Dict[str, Any], *, db: sqlite3.Connection) -> str:
        db.execute("INSERT INTO bookings VALUES (?)", [input["name"]])
        if input["name"] == "nobody":
            raise ValueError("who?")
        return "booked"

    @worker.on_task("guests")
    async def guests(ctx: TaskContext, input: Any, *, pool: Pool) -> List[str]:
        connection = pool.take()
        try:
            return [name for (name,) in connection.execute("SELECT name FROM bookings ORDER BY name")]
        finally:
            pool.give_back(connection)

    with sqlite3.connect(tmp_path / "hotel.db") as connection:
        connection.execute("CREATE TABLE bookings (name TEXT)")
    connection.close()
    names = [f"guest {number:02}" for number in range(20)]
    with worker:
        ids = [platform.submit("book", {"name": name}, AGENT) for name in [*names, "nobody"]]
        results = [platform.wait(one, GUARD) for one in ids]
        assert [one["status"] for one in results] == ["completed"] * 20 + ["failed"]
        assert results[-1]["error"]["message"] == "ValueError: who?"
        assert ended(platform, "guests")["output"] == names
    assert len(pools) == 1
    with pytest.raises(sqlite3.ProgrammingError):
        pools[0].take().execute("SELECT 1")


def noting(worker: Worker, events: List[str], *names: str) -> None:
    """Give the worker resources that note what becomes of them, each of which receives the one before it."""
    before = ""
    for name in names:
        scope: Dict[str, Any] = {"events": events}
        exec(
            f"def {name}(*, {before or 'unused=0'}):\n"
            f"    events.append('open {name}')\n    yield '{name}'\n    events.append('close {name}')\n",
            scope,
        )
        worker.resource(scope[name])
        before = name


def test_the_order_of_a_life(scripted: Scripted, worker_of: Make) -> None:
    """They are open before the login, closed in reverse after the handlers, and before the last heartbeat."""
    worker = worker_of(scripted)
    events: List[str] = []
    noting(worker, events, "one", "two")
    requests: List[int] = []

    @worker.resource
    def last(*, two: str) -> Iterator[int]:
        requests.append(len(scripted.requests))
        yield 1
        events.append(f"stopped {any('stopped' in str(one.json) for one in scripted.of('heartbeat'))}")

    @worker.on_task("use")
    def use(ctx: TaskContext, input: Any, *, one: str) -> None:
        events.append("running")
        ctx.wait_cancelled(0.1)
        events.append("ended")

    worker.start()
    scripted.send("task", {"task_id": "t1", "capability": "use", "input": None})
    until(lambda: "running" in events, GUARD)
    worker.stop()
    assert events == ["open one", "open two", "running", "ended", "stopped False", "close two", "close one"]
    assert requests == [0]


def test_an_open_that_fails(scripted: Scripted, worker_of: Make) -> None:
    """``start()`` raises its error, what was open is closed, nobody has logged in, and no thread is left."""
    worker = worker_of(scripted)
    events: List[str] = []
    noting(worker, events, "one", "two")

    @worker.resource
    def broken(*, two: str) -> Iterator[int]:
        raise sqlite3.OperationalError("unable to open database file")
        yield 1

    worker.on_task("x", lambda ctx, input: None)
    with pytest.raises(sqlite3.OperationalError, match="unable to open"):
        worker.start()
    assert events == ["open one", "open two", "close two", "close one"]
    assert not scripted.requests
    assert worker.wait(GUARD)
    assert worker.stop_reason == "a resource could not be opened"
    with pytest.raises(ConfigurationError, match="a worker starts once"):
        worker.start()


def test_an_error_of_the_declarations(scripted: Scripted, worker_of: Make) -> None:
    """It comes before the login, and the worker can be started once it is corrected."""
    worker = worker_of(scripted)

    @worker.on_task("use")
    def use(ctx: TaskContext, input: Any, *, db: int) -> int:
        return db

    with pytest.raises(ConfigurationError, match="asks for 'db'"):
        worker.start()
    assert not scripted.requests

    @worker.resource
    def db() -> Iterator[int]:
        yield 7

    with worker:
        scripted.send("task", {"task_id": "t1", "capability": "use", "input": None})
        assert scripted.wait_for("complete")[0].json["output"] == 7


def test_a_stop_while_they_open(worker_of: Make, caplog: pytest.LogCaptureFixture) -> None:
    """The one that is being opened is closed, the next is not opened, and the worker has stopped."""
    worker = worker_of(NOWHERE, shutdown_timeout=0.5)
    events: List[str] = []
    opening, go_on = threading.Event(), threading.Event()

    @worker.resource
    def slow() -> Iterator[int]:
        opening.set()
        assert go_on.wait(GUARD)
        events.append("open")
        yield 1
        events.append("close")

    noting(worker, events, "never")
    worker.on_task("x", lambda ctx, input: None)
    thread = threading.Thread(target=worker.start)
    thread.start()
    assert opening.wait(GUARD)
    worker.stop()
    go_on.set()
    thread.join(GUARD)
    assert not thread.is_alive()
    assert events == ["open", "close"]
    assert worker.wait(GUARD)
    assert [one.getMessage() for one in caplog.records if one.levelno >= logging.ERROR] == []


def test_an_overdue_handler(scripted: Scripted, worker_of: Make, caplog: pytest.LogCaptureFixture) -> None:
    """While it runs its resources stay open, one warning names it, and when it ends they are closed."""
    worker = worker_of(scripted, shutdown_timeout=0.2)
    events: List[str] = []
    noting(worker, events, "one")
    running, go_on = threading.Event(), threading.Event()

    @worker.on_task("use")
    def use(ctx: TaskContext, input: Any, *, one: str) -> None:
        running.set()
        assert go_on.wait(GUARD)
        events.append("ended")

    worker.start()
    scripted.send("task", {"task_id": "t1", "capability": "use", "input": None})
    assert running.wait(GUARD)
    worker.stop()
    assert events == ["open one"]
    warnings = [one.getMessage() for one in caplog.records if "resources stay open" in one.getMessage()]
    assert len(warnings) == 1
    assert "t1" in warnings[0]
    go_on.set()
    until(lambda: "close one" in events, GUARD)
    assert events == ["open one", "ended", "close one"]


def test_a_close_that_hangs_or_fails(scripted: Scripted, worker_of: Make, caplog: pytest.LogCaptureFixture) -> None:
    """Neither keeps the stop from its end, or other resources from being closed."""
    worker = worker_of(scripted, shutdown_timeout=0.2)
    events: List[str] = []
    noting(worker, events, "one")
    go_on = threading.Event()

    @worker.resource
    def failing(*, one: str) -> Iterator[int]:
        yield 1
        raise OSError("cannot close")

    @worker.resource
    def hanging(*, failing: int) -> Iterator[int]:
        yield 1
        assert go_on.wait(GUARD)

    worker.on_task("x", lambda ctx, input: None)
    with worker:
        pass
    assert worker.wait(GUARD)
    assert events == ["open one"]
    assert "takes longer than the stop" in caplog.text
    go_on.set()
    until(lambda: "close one" in events, GUARD)
    until(lambda: "closing the worker's resources failed: OSError" in caplog.text, GUARD)


def test_a_failing_open_of_a_task(platform: Any, worker_of: Make) -> None:
    """The task fails as by its handler, the next one has a resource of its own."""
    worker = worker_of(platform)
    left = [OSError("no route"), None]

    @worker.resource(scope="task")
    def db() -> Iterator[int]:
        error = left.pop(0)
        if error is not None:
            raise error
        yield 1

    worker.on_task("use", lambda ctx, input: ctx.resource("db"))
    with worker:
        error = ended(platform, "use")["error"]
        assert (error["code"], error["message"]) == ("handler_error", "OSError: no route")
        assert ended(platform, "use")["output"] == 1


def test_opening_counts_as_the_tasks_time(platform: Any, worker_of: Make) -> None:
    """A task whose time ends while its resources are opened fails as timeout, its handler never runs, all is closed."""
    worker = worker_of(platform, task_timeout=0.05)
    events: List[str] = []

    @worker.resource(scope="task")
    def slow() -> Iterator[int]:
        while not worker.stats().overdue:
            time.sleep(0.01)
        try:
            yield 1
        except BaseException as error:
            events.append(type(error).__name__)
            raise

    @worker.on_task("use")
    def use(ctx: TaskContext, input: Any, *, slow: int) -> None:
        events.append("run")

    with worker:
        assert ended(platform, "use")["error"]["code"] == "timeout"
        until(lambda: bool(events), GUARD)
    assert events == ["TaskCancelled"]


def test_a_hundred_starts_and_stops(platform: Any, worker_of: Make, tmp_path: pathlib.Path) -> None:
    """Each opens one connection and closes it: no thread, file or generator is left."""
    path = tmp_path / "x.db"
    alive: List[sqlite3.Connection] = []

    def run() -> None:
        worker = worker_of(platform)

        @worker.resource
        def db() -> Iterator[sqlite3.Connection]:
            connection = sqlite3.connect(path, check_same_thread=False)
            connection.execute("SELECT 1")
            alive.append(connection)
            yield connection
            connection.close()
            alive.remove(connection)

        worker.on_task("x", lambda ctx, input: None)
        with worker:
            pass

    run()
    threads = threading.active_count()
    for _ in range(99):
        run()
        assert alive == []
    until(lambda: threading.active_count() <= threads, GUARD)
    if os.path.isdir("/proc/self/fd"):
        opened = [
            os.readlink(f"/proc/self/fd/{one}")
            for one in os.listdir("/proc/self/fd")
            if os.path.exists(f"/proc/self/fd/{one}")
        ]
        assert str(path) not in opened


# -- processes --------------------------------------------------------------------------------------------------------


@pytest.fixture
def directory(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    monkeypatch.setenv(shared.DIRECTORY, str(tmp_path))
    with sqlite3.connect(tmp_path / "shared.db") as connection:
        connection.execute("CREATE TABLE bookings (name TEXT)")
    connection.close()
    return tmp_path


@pytest.mark.slow
def test_processes(platform: Any, worker_of: Make, directory: pathlib.Path) -> None:
    """Each process opens its own once, tasks have transactions, and a killed process closes nothing."""
    with ProcessExecutor(1, kill_after=0.1) as executor:
        worker = worker_of(platform, executor=executor, max_workers=1)
        worker.include(shared.tasks)
        with worker:
            first = ended(platform, "book", {"name": "ada"})["output"]
            assert first != os.getpid()
            assert ended(platform, "book", {"name": "bob", "fail": True})["error"]["message"] == "ValueError: full"
            assert ended(platform, "count")["output"] == [1, first]
            assert shared.notes() == [f"{one} {first}" for one in ("open db", "commit", "rollback ValueError")]
            lost = platform.submit("book", {"name": "eve", "wait": True}, AGENT)
            until(lambda: f"waiting {first}" in shared.notes(), 4 * GUARD)
            os.kill(first, signal.SIGKILL)
            assert platform.wait(lost, 4 * GUARD)["error"]["code"] == "handler_error"
            count, second = ended(platform, "count")["output"]
            assert (count, second != first) == (1, True)
    assert f"open db {second}" in shared.notes()
    assert f"close db {first}" not in shared.notes()
    assert f"close db {second}" in shared.notes()


def of_the_worker() -> Iterator[int]:
    yield 1


def behind(*, of_the_worker: int) -> Iterator[int]:
    yield of_the_worker


def use(ctx: TaskContext, input: Any, *, behind: int) -> int:
    return behind


def ask(ctx: TaskContext, input: Any) -> Any:
    return ctx.resource("of_the_worker")


@pytest.mark.slow
def test_a_resource_of_the_worker_in_processes(platform: Any, worker_of: Make) -> None:
    """A handler elsewhere that receives one, also by another resource, is refused at the start; asking is an error."""
    with ProcessExecutor(1) as executor:
        worker = worker_of(platform, executor=executor)
        worker.resource(of_the_worker)
        worker.resource(behind, scope="task")
        worker.on_task("use", use)
        with pytest.raises(ConfigurationError, match="of the scope 'worker'"):
            worker.capability_info()
        with pytest.raises(ConfigurationError) as caught:
            worker.start()
        assert str(caught.value).startswith(f"on_task('use'): use ({__file__}:")
        assert f"receives 'of_the_worker', of_the_worker ({__file__}:" in str(caught.value)
        worker = worker_of(platform, executor=executor)
        # It is used by nothing elsewhere, so it need not be picklable.
        noting(worker, [], "of_the_worker")
        worker.on_task("ask", ask)
        with worker:
            assert "runs in another process" in ended(platform, "ask")["error"]["message"]


def test_a_local_resource_in_processes(worker_of: Make) -> None:
    """A resource that other processes cannot import is refused at the start."""
    tasks = TaskRegistry()

    @tasks.resource(scope="process")
    def local() -> Iterator[int]:
        yield 1

    tasks.task("ask", ask)
    with ProcessExecutor(1) as executor:
        worker = worker_of(NOWHERE, executor=executor)
        worker.include(tasks)
        with pytest.raises(ConfigurationError, match="and so must resources"):
            worker.start()
