"""sekuire.logging: lines of JSON from whatever is logged, and the ids of the task on it."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import io
import json
import logging
import logging.config
import logging.handlers
import math
import queue
import re
import sys
import threading
from typing import Any, Callable, Dict, Iterator, List

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sekuire import ProcessExecutor, TaskContext, Worker
from sekuire.logging import JsonFormatter, TaskFilter, task_ids

from .support import elsewhere
from .support.scripted import Scripted
from .support.waiting import GUARD, until

Make = Callable[..., Worker]

TS = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")


def refuse_constant(text: str) -> Any:
    raise AssertionError(f"{text} is not JSON")


def read(line: str) -> Dict[str, Any]:
    """One line as a strict reader sees it."""
    assert line.isascii()
    assert "\n" not in line
    found: Dict[str, Any] = json.loads(line, parse_constant=refuse_constant)
    json.dumps(found, ensure_ascii=False).encode()
    assert list(found)[:1] in (["ts"], ["message"])
    return found


def line_of(*args: Any, **attributes: Any) -> Dict[str, Any]:
    """The line for a record with these arguments and attributes."""
    record = logging.LogRecord("app", logging.INFO, "app.py", 1, args[0] if args else "hello", args[1:], None)
    vars(record).update(attributes)
    assert TaskFilter().filter(record)
    return read(JsonFormatter().format(record))


def test_a_line() -> None:
    """ts, level, logger and message; nothing else where nothing else is known."""
    line = line_of("%s of %d", "one", 2)
    assert TS.fullmatch(line.pop("ts"))
    assert line == {"level": "INFO", "logger": "app", "message": "one of 2"}


def test_the_time_is_utc() -> None:
    """RFC 3339, with milliseconds."""
    assert line_of(created=0.25)["ts"] == "1970-01-01T00:00:00.250Z"


def test_an_exception_and_a_stack() -> None:
    """The traceback is one text of the line."""
    try:
        raise ValueError("wrong\nin two lines")
    except ValueError:
        line = line_of(exc_info=sys.exc_info(), stack_info="Stack:\n  here")
    assert line["exception"].startswith("Traceback (most recent call last):\n")
    assert line["exception"].endswith("ValueError: wrong\nin two lines")
    assert line["stack"] == "Stack:\n  here"
    assert "exception" not in line_of(exc_info=(None, None, None))
    assert line_of(exc_text="made before")["exception"] == "made before"


def test_what_the_program_adds() -> None:
    """``extra`` is on the line. It does not replace the line's own keys; an id of its own stays."""
    line = line_of(order=7, parts=["a", {"b": None}], level="mine", ts=1, exception="mine", task_id="t-9")
    assert line["order"] == 7
    assert line["parts"] == ["a", {"b": None}]
    assert line["task_id"] == "t-9"
    assert (line["level"], line["logger"]) == ("INFO", "app")
    assert "exception" not in line


class Hostile:
    """It raises whatever is asked of it."""

    def __str__(self) -> str:
        raise RuntimeError("no text")

    __repr__ = __str__


class HostileError(Exception):
    __str__ = Hostile.__str__


def recursive() -> List[Any]:
    found: List[Any] = []
    found.append(found)
    return found


def deep() -> Any:
    found: Any = 1
    for _ in range(100_000):
        found = [found]
    return found


@pytest.mark.parametrize(
    ("args", "attributes"),
    [
        (("%d things", "not a number"), {}),
        (("%s and %s", "too few"), {}),
        (("100 %", "x"), {}),
        ((Hostile(),), {}),
        (("%s", Hostile()), {}),
        (("\ud800 half a pair",), {}),
        (("\U0001f600 whole",), {"half": "\udfff", "nested": {"\ud800": ["\udc00"]}}),
        (("zero \0 and \x1b[31m and \u2028",), {}),
        ((b"bytes",), {"more": b"\xff"}),
        (("x",), {"number": math.nan, "numbers": [math.inf, -math.inf], "big": 10**5000}),
        (("x",), {"itself": recursive(), "deep": deep(), "hostile": Hostile(), "odd keys": {(1, 2): 3, Hostile(): 4}}),
        (("x",), {"set": {1}, "thread": threading.current_thread(), "type": int}),
        (("x",), {"exc_info": True}),
        (("x",), {"exc_info": (ValueError, "no exception", None)}),
        (("x",), {"exc_info": (HostileError, HostileError(), None)}),
        (("x",), {"exc_info": 1, "exc_text": None, "stack_info": 7}),
        (("x",), {"created": None}),
        (("x",), {"created": math.nan}),
        (("x",), {"created": 1e30}),
        (("x",), {"levelname": None, "name": Hostile(), "args": Hostile()}),
        (("x",), {"task_id": Hostile(), "args": [1]}),
        ((None,), {}),
    ],
)
def test_odd_records(args: Any, attributes: Dict[str, Any]) -> None:
    """Nothing that a record holds makes it raise, or a line that is not JSON."""
    if "deep" in attributes:
        attributes = {**attributes, "deep": deep()}
    line = line_of(*args, **attributes)
    assert isinstance(line["message"], str)


def test_a_record_that_is_none() -> None:
    """A record without its attributes is a line too."""

    class Empty:
        pass

    assert "cannot be read" in read(JsonFormatter().format(Empty()))["message"]  # type: ignore[arg-type]


def test_arguments_that_do_not_fit_are_shown() -> None:
    assert line_of("%d things", "seven")["message"] == "%d things ('seven',)"


@given(
    st.text() | st.binary() | st.integers() | st.floats(),
    st.lists(st.text() | st.floats() | st.none(), max_size=3),
    st.dictionaries(st.text(min_size=1), st.recursive(st.none() | st.floats() | st.text(), st.lists), max_size=3),
)
def test_any_record(message: Any, args: List[Any], extra: Dict[str, Any]) -> None:
    """Whatever is logged, each line is one JSON object."""
    line_of(message, *args, **{f"x{key}": value for key, value in extra.items()})


# -- the ids ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def lines() -> Iterator[List[Dict[str, Any]]]:
    """The lines of the logger ``third.party`` and of the library's, as a program sets it up by a dict."""
    stream = io.StringIO()
    config = {
        "version": 1,
        "disable_existing_loggers": False,
        "filters": {"task": {"()": "sekuire.logging.TaskFilter"}},
        "formatters": {"json": {"()": "sekuire.logging.JsonFormatter"}},
        "handlers": {
            "it": {"class": "logging.StreamHandler", "stream": stream, "formatter": "json", "filters": ["task"]}
        },
        "loggers": {name: {"level": "DEBUG", "handlers": ["it"]} for name in ("third.party", "sekuire")},
    }
    loggers = [logging.getLogger(name) for name in ("third.party", "sekuire")]
    before = [(logger.level, logger.handlers[:]) for logger in loggers]
    logging.config.dictConfig(config)

    class Lines(List[Dict[str, Any]]):
        def of(self, part: str) -> Dict[str, Any]:
            until(lambda: part in stream.getvalue())
            return next(line for line in map(read, stream.getvalue().splitlines()) if part in line["message"])

    yield Lines()
    for logger, (level, handlers) in zip(loggers, before):
        logger.setLevel(level)
        logger.handlers[:] = handlers


third = logging.getLogger("third.party")


def test_the_ids_of_a_task(lines: Any, scripted: Scripted, worker_of: Make) -> None:
    """Records of any logger have them: in the handler's thread, in a coroutine, and in a copy of the context."""
    worker = worker_of(scripted)
    ended = threading.Event()

    @worker.on_task("plain")
    def plain(ctx: TaskContext, input: Any) -> Any:
        third.info("in the thread")
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            pool.submit(contextvars.copy_context().run, third.info, "in a copy").result(GUARD)
            pool.submit(third.info, "in a thread of its own").result(GUARD)
        return task_ids()

    @worker.on_task("async")
    async def coroutine(ctx: TaskContext, input: Any) -> Any:
        await asyncio.sleep(0)
        third.info("in the coroutine")
        await asyncio.to_thread(third.info, "in to_thread")
        await asyncio.gather(*(asyncio.create_task(log_later(number)) for number in range(2)))

    async def log_later(number: int) -> None:
        await asyncio.sleep(0)
        third.info("in the asyncio task %d", number)

    @worker.on_task("bad")
    def bad(ctx: TaskContext, input: Any) -> Any:
        raise ValueError("of the handler")

    worker.on_command(lambda command: ended.set())
    with worker:
        scripted.task("t-1", "plain", trace_id="trace-1")
        output = scripted.completion("t-1")["output"]
        scripted.task("t-2", "async")
        scripted.completion("t-2")
        scripted.task("t-3", "bad")
        scripted.completion("t-3")
        installation = worker.installation.store.current.installation_id
        assert installation
        third.info("outside")
    known = {"worker_id": worker.worker_id, "installation_id": installation}
    first = {"task_id": "t-1", "capability": "plain", "trace_id": "trace-1", **known}
    assert output == first
    for part in ("in the thread", "in a copy"):
        assert ids_in(lines.of(part)) == first
    for part in ("in the coroutine", "in to_thread", "asyncio task 0", "asyncio task 1"):
        assert ids_in(lines.of(part)) == {"task_id": "t-2", "capability": "async", **known}
    failure = lines.of("bad failed handler_error")
    assert ids_in(failure) == {"task_id": "t-3", "capability": "bad", **known}
    assert failure["exception"].endswith("ValueError: of the handler")
    for part in ("in a thread of its own", "outside"):
        assert ids_in(lines.of(part)) == {}
    assert task_ids() == {}


def ids_in(line: Dict[str, Any]) -> Dict[str, Any]:
    return {name: value for name, value in line.items() if name.endswith("_id") or name == "capability"}


def test_the_ids_of_the_librarys_threads(lines: Any, scripted: Scripted, worker_of: Make) -> None:
    """They know their worker. A line about a task that another thread runs has the id that it begins with."""
    worker = worker_of(scripted, task_timeout=0.1)
    over = threading.Event()
    worker.on_task("slow", lambda ctx, input: over.wait(GUARD))
    with worker:
        scripted.task("t-1", "slow", trace_id="trace-1")
        scripted.completion("t-1")
        opened = lines.of("connected to")
        late = lines.of("has not ended in its time")
        over.set()
    assert opened["worker_id"] == worker.worker_id
    assert "task_id" not in opened
    assert late["task_id"] == "t-1"
    assert late["worker_id"] == worker.worker_id


def test_the_ids_in_another_process(scripted: Scripted, worker_of: Make) -> None:
    """A handler in a process of a pool has the same ids, and the next call in that process has none of them."""
    with ProcessExecutor(1) as executor:
        worker = worker_of(scripted, executor=executor, max_workers=1)
        worker.on_task("far", elsewhere.ids_of_record)
        with worker:
            scripted.task("t-1", "far", trace_id="trace-1")
            output = scripted.completion("t-1")["output"]
            installation = worker.installation.store.current.installation_id
        assert executor.submit(task_ids).result(GUARD) == {}
    known = {"worker_id": worker.worker_id, "installation_id": installation}
    assert output == {"task_id": "t-1", "capability": "far", "trace_id": "trace-1", **known}


def test_a_queue_handler(scripted: Scripted, worker_of: Make) -> None:
    """The filter on the handler that runs in the task's thread keeps the ids for the thread that writes."""
    waiting: queue.Queue[Any] = queue.Queue()
    handler = logging.handlers.QueueHandler(waiting)
    handler.addFilter(TaskFilter())
    worker = worker_of(scripted)
    worker.on_task("echo", lambda ctx, input: third.error("through a queue"))
    third.addHandler(handler)
    try:
        with worker:
            scripted.task("t-1")
            scripted.completion("t-1")
    finally:
        third.removeHandler(handler)
    assert read(JsonFormatter().format(waiting.get(timeout=GUARD)))["task_id"] == "t-1"


def test_a_text_formatter() -> None:
    """An id that is not known has a value of the program's choice, and one that the record has stays."""
    record = logging.makeLogRecord({"msg": "x", "task_id": "mine"})
    assert TaskFilter(missing="-").filter(record) is True
    assert logging.Formatter("%(task_id)s %(capability)s %(message)s").format(record) == "mine - x"
