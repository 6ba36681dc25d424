"""A program whose logging raises: nothing of a task's life may depend on a log call."""

from __future__ import annotations

import asyncio
import contextvars
import io
import logging
import threading
from typing import Any, Callable, Dict, Iterator, List, Tuple, Type

import pytest

from sekuire import TaskContext, Worker
from sekuire._internal import logs
from sekuire.handlers.context import current_task

from ..support.scripted import Scripted
from ..support.waiting import GUARD, until

Make = Callable[..., Worker]


class Mischief(Exception):
    pass


class Refusing(logging.Filter):
    """As many projects have it: a filter that needs a request."""

    def __init__(self, error: Type[BaseException]) -> None:
        super().__init__()
        self.error = error
        self.asked = 0

    def filter(self, record: logging.LogRecord) -> bool:
        if not record.name.startswith("sekuire"):
            return True
        self.asked += 1
        raise self.error()


class RefusingHandler(logging.Handler):
    def __init__(self, error: Type[BaseException]) -> None:
        super().__init__()
        self.error = error
        self.asked = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.asked += 1
        raise self.error()


class RefusingFormatter(logging.Formatter):
    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def format(self, record: logging.LogRecord) -> str:
        self.asked += 1
        raise Mischief


@pytest.fixture(params=["filter", "exit", "logger filter", "handler", "quiet handler", "formatter", "factory"])
def trouble(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Tuple[str, Callable[[], int]]]:
    """One thing that raises whenever the library logs; its name, and how often it has."""
    monkeypatch.setattr(logs, "_said", {})
    kind = request.param
    logger = logging.getLogger("sekuire")
    level = logger.level
    factory = logging.getLogRecordFactory()
    handler: logging.Handler = logging.StreamHandler(io.StringIO())
    guard: Any = None
    if kind in ("filter", "exit"):
        guard = Refusing(SystemExit if kind == "exit" else Mischief)
        handler.addFilter(guard)
    elif kind == "logger filter":
        guard = Refusing(Mischief)
        for name in ("worker", "task", "dispatch", "report", "stream", "heartbeat", "outbox", "credentials", "http"):
            logging.getLogger(f"sekuire.{name}").addFilter(guard)
    elif kind in ("handler", "quiet handler"):
        monkeypatch.setattr(logging, "raiseExceptions", kind == "handler")
        guard = handler = RefusingHandler(Mischief)
    elif kind == "formatter":
        monkeypatch.setattr(logging, "raiseExceptions", False)
        guard = RefusingFormatter()
        handler.setFormatter(guard)
    else:
        guard = Refusing(Mischief)

        def make(name: str, *args: Any, **kwargs: Any) -> logging.LogRecord:
            record = factory(name, *args, **kwargs)
            guard.filter(record)
            return record

        logging.setLogRecordFactory(make)
    logging.getLogger().addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield kind, lambda: guard.asked
    logger.setLevel(level)
    logging.getLogger().removeHandler(handler)
    logging.setLogRecordFactory(factory)
    for name in ("worker", "task", "dispatch", "report", "stream", "heartbeat", "outbox", "credentials", "http"):
        logging.getLogger(f"sekuire.{name}").removeFilter(guard)


def test_a_life_without_a_log(
    trouble: Tuple[str, Callable[[], int]],
    scripted: Scripted,
    worker_of: Make,
    tmp_path: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Every task is answered, the worker reconnects and stops, and stderr has one line, wherever logging raises."""
    kind, asked = trouble
    refusals = {"retry": [503, 500], "refused": [400]}
    beats = [500, 401]

    def complete(request: Any) -> Any:
        left = refusals.get(request.task_id)
        return (left.pop(0), {"error": "x", "message": "no"}) if left else (200, {})

    def heartbeat(request: Any) -> Any:
        return (beats.pop(0), {"error": "x", "message": "no"}) if beats else (200, {})

    scripted.on["complete"] = complete
    scripted.on["heartbeat"] = heartbeat
    problems: List[Any] = []
    worker = worker_of(scripted, max_workers=4, outbox=tmp_path / "outbox.db", heartbeat_interval=0.1)
    begun, release = threading.Event(), threading.Event()

    @worker.on_task("fine")
    def fine(ctx: TaskContext, input: Any) -> Any:
        return {"got": input}

    @worker.on_task("boom")
    def boom(ctx: TaskContext, input: Any) -> Any:
        raise ValueError("its own")

    @worker.on_task("async_boom")
    async def async_boom(ctx: TaskContext, input: Any) -> Any:
        await asyncio.sleep(0)
        raise ValueError("its own")

    @worker.on_task("odd")
    def odd(ctx: TaskContext, input: Any) -> Any:
        return object()

    @worker.on_task("slow", timeout=0.1)
    def slow(ctx: TaskContext, input: Any) -> Any:
        ctx.wait_cancelled(GUARD)

    @worker.on_task("hang")
    def hang(ctx: TaskContext, input: Any) -> Any:
        begun.set()
        release.wait(GUARD)

    @worker.on_command
    def callback(command: Any) -> None:
        raise ValueError("a callback of the program")

    before = threading.excepthook
    threading.excepthook = problems.append
    try:
        worker.start()
        for name in ("fine", "boom", "async_boom", "odd", "slow"):
            scripted.task(name, name)
        for name in ("fine", "boom", "async_boom", "odd", "slow"):
            scripted.completion(name)
        scripted.task("unknown", "no such capability")
        scripted.task("retry", "fine")
        scripted.task("refused", "fine")
        scripted.send("task", {"task_id": "malformed"})
        scripted.send("task", {})
        scripted.send("command", {"type": "promote"})
        until(lambda: len(scripted.completions("retry")) == 3)
        until(lambda: len(scripted.completions("refused")) == 2)
        scripted.rst()
        until(lambda: worker.stats().reconnects == 1 and worker.is_connected())
        scripted.command("pause")
        until(worker.is_paused)
        scripted.task("paused", "fine")
        scripted.completion("paused")
        scripted.command("resume")
        until(lambda: not worker.is_paused())
        scripted.end()
        until(lambda: worker.stats().reconnects == 2 and worker.is_connected())
        scripted.task("again", "fine")
        scripted.completion("again")
        scripted.task("hang", "hang")
        assert begun.wait(GUARD)
        worker.stop(0.3)
        assert worker.wait(GUARD)
    finally:
        release.set()
        threading.excepthook = before
    codes: Dict[str, Any] = {}
    for request in scripted.of("complete"):
        body = request.json
        codes[body["task_id"]] = body["error"]["code"] if body["status"] == "failed" else body["output"]
    assert codes == {
        "fine": {"got": {}},
        "boom": "handler_error",
        "async_boom": "handler_error",
        "odd": "result_not_serializable",
        "slow": "timeout",
        "unknown": "unknown_capability",
        "retry": {"got": {}},
        "refused": "result_rejected",
        "malformed": "invalid_task",
        "paused": "worker_paused",
        "again": {"got": {}},
        "hang": "worker_shutdown",
    }
    assert worker.stats().undelivered == 0
    assert problems == []
    assert asked() > 10
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sekuire:")]
    # logging itself deals with what a formatter raises.
    assert len(said) == (0 if kind == "formatter" else 1), said


# -- the failure in its task's context --------------------------------------------------------------------------------

request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="-")


class Seen(logging.Handler):
    """What error trackers and filters read where a record is made."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.seen: List[Tuple[str, Any, Any, Any]] = []

    def emit(self, record: logging.LogRecord) -> None:
        task = current_task.get()
        kind = record.exc_info[0] if record.exc_info else None
        self.seen.append((request_id.get(), task and task.task_id, getattr(record, "task_id", None), kind))


@pytest.fixture
def seen() -> Iterator[List[Tuple[str, Any, Any, Any]]]:
    handler = Seen()
    logging.getLogger("sekuire.task").addHandler(handler)
    yield handler.seen
    logging.getLogger("sekuire.task").removeHandler(handler)


def by_middleware(worker: Worker) -> None:
    @worker.middleware
    def ids(ctx: TaskContext, input: Any, call_next: Any) -> Any:
        request_id.set(f"of {ctx.task_id}")
        return call_next(input)

    @worker.on_task("echo")
    def echo(ctx: TaskContext, input: Any) -> Any:
        raise ValueError("x")


def by_handler(worker: Worker) -> None:
    @worker.on_task("echo")
    def echo(ctx: TaskContext, input: Any) -> Any:
        request_id.set(f"of {ctx.task_id}")
        raise ValueError("x")


def by_async_handler(worker: Worker) -> None:
    @worker.on_task("echo")
    async def echo(ctx: TaskContext, input: Any) -> Any:
        request_id.set(f"of {ctx.task_id}")
        await asyncio.sleep(0)
        raise ValueError("x")


def by_async_handler_in_middleware(worker: Worker) -> None:
    @worker.middleware
    def outer(ctx: TaskContext, input: Any, call_next: Any) -> Any:
        try:
            return call_next(input)
        finally:
            # As with a plain handler, what it has set is there.
            assert request_id.get() == f"of {ctx.task_id}"

    by_async_handler(worker)


@pytest.mark.parametrize("build", [by_middleware, by_handler, by_async_handler, by_async_handler_in_middleware])
def test_a_failure_is_logged_in_its_tasks_context(
    build: Callable[[Worker], None], scripted: Scripted, worker_of: Make, seen: List[Any]
) -> None:
    """The record of a failed handler is made where its context variables are set, with the error and the task."""
    worker = worker_of(scripted, max_workers=1)
    build(worker)
    with worker:
        for task_id in ("t-1", "t-2"):
            scripted.task(task_id)
            assert scripted.completion(task_id)["error"]["message"] == "ValueError: x"
    assert seen == [(f"of {task_id}", task_id, task_id, ValueError) for task_id in ("t-1", "t-2")]


def test_what_an_async_handler_sets_ends_with_its_task(scripted: Scripted, worker_of: Make) -> None:
    """A context variable that one task has set is not there for the next one of the same thread."""
    worker = worker_of(scripted, max_workers=1)

    @worker.on_task("echo")
    async def echo(ctx: TaskContext, input: Any) -> Any:
        before = request_id.get()
        request_id.set("left behind")
        return before

    with worker:
        for task_id in ("t-1", "t-2"):
            scripted.task(task_id)
            assert scripted.completion(task_id)["output"] == "-"


def test_a_record_factory_that_sets_our_names(scripted: Scripted, worker_of: Make) -> None:
    """A factory that gives each record a ``task_id`` breaks neither our record of a failure nor ``ctx.logger``."""
    old = logging.getLogRecordFactory()

    def factory(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = old(*args, **kwargs)
        record.task_id = record.capability = "-"
        return record

    logging.setLogRecordFactory(factory)
    try:
        worker = worker_of(scripted)

        @worker.on_task("boom")
        def boom(ctx: TaskContext, input: Any) -> Any:
            raise ValueError("my own")

        @worker.on_task("logs")
        def tells(ctx: TaskContext, input: Any) -> Any:
            ctx.logger.warning("hello")

        with worker:
            scripted.task("t-1", "boom")
            scripted.task("t-2", "logs")
            assert scripted.completion("t-1")["error"]["message"] == "ValueError: my own"
            assert scripted.completion("t-2")["status"] == "completed"
    finally:
        logging.setLogRecordFactory(old)
