"""What is declared as a resource, what is refused when a worker starts, and how a handler gets it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from typing import Any, Callable, Dict, Iterator, List, Tuple

import pytest

from sekuire import TaskContext, TaskError, TaskRegistry
from sekuire.errors import ConfigurationError
from sekuire.testing import run_task

from ..support.waiting import GUARD


def plain(ctx: Any, input: Any) -> None: ...


def value() -> Iterator[int]:
    yield 1


def place(function: Any) -> str:
    return f"{function.__qualname__} ({__file__}:{function.__code__.co_firstlineno})"


def registry_of(*functions: Any, scope: str = "worker") -> TaskRegistry:
    tasks = TaskRegistry()
    tasks.task("plain", plain)
    for function in functions:
        tasks.resource(function, scope=scope)
    return tasks


def problem_of(call: Callable[[], object]) -> str:
    with pytest.raises(ConfigurationError) as caught:
        call()
    return str(caught.value)


def test_what_is_no_resource() -> None:
    """A function that yields nothing, async ones, and names that no parameter can have are refused at once."""
    tasks = TaskRegistry()

    async def loop() -> Any:
        yield 1

    @contextlib.contextmanager
    def managed() -> Iterator[int]:
        yield 1

    assert "plain (" in problem_of(lambda: tasks.resource(plain))
    assert "is not a generator function; yield the value" in problem_of(lambda: tasks.resource(plain))
    assert "is not a generator function; take its decorator" in problem_of(lambda: tasks.resource(managed))
    assert "is an async generator function" in problem_of(lambda: tasks.resource(loop))
    assert "must be a generator function, got int" in problem_of(lambda: tasks.resource(3))  # type: ignore[call-overload]
    assert "'a-b' cannot name a resource" in problem_of(lambda: tasks.resource(value, name="a-b"))
    assert "must be 'worker', 'process' or 'task', got 'session'" in problem_of(
        lambda: tasks.resource(value, scope="session")
    )
    tasks.task("plain", plain)
    TaskRegistry().include(tasks)
    assert "declare every resource before include()" in problem_of(lambda: tasks.resource(value))


def test_a_name_that_two_have() -> None:
    """Both places are named, also where the two come from different registries."""
    one = registry_of(value)

    def another() -> Iterator[int]:
        yield 2

    one.resource(another, name="value")
    expected = f"resource('value'): is taken by {place(value)}; cannot give it to {place(another)} too"
    assert problem_of(one.freeze) == expected
    parts = TaskRegistry(), TaskRegistry()
    parts[0].resource(value)
    parts[1].resource(another, name="value")
    whole = registry_of()
    for part in parts:
        whole.include(part)
    assert problem_of(whole.freeze) == expected


def test_an_unknown_name() -> None:
    """A handler or a resource that asks for a name which nothing has is refused, with what was probably meant."""
    tasks = registry_of(value)

    @tasks.task("book")
    def book(ctx: Any, input: Any, *, valeu: int) -> None: ...

    assert problem_of(tasks.freeze) == (
        f"task('book'): {place(book)} asks for 'valeu', and there is no such resource; "
        f"did you mean 'value', {place(value)}?"
    )
    tasks = TaskRegistry()
    tasks.task("book", book)
    assert "there is no such resource (none); declare it: @….resource above def valeu():" in problem_of(tasks.freeze)

    def other(*, missing: int) -> Iterator[int]:
        yield missing

    assert f"{place(other)} asks for 'missing'" in problem_of(registry_of(other).freeze)


def test_a_parameter_with_a_default() -> None:
    """It is left alone where there is no such resource, and filled where there is."""

    def book(ctx: Any, input: Any, *, value: int = 5, **more: Any) -> int:
        return value

    tasks = TaskRegistry()
    tasks.task("book", book)
    assert run_task(tasks, "book").output == 5
    tasks.resource(value)
    assert run_task(tasks, "book").output == 1


def test_resources_that_need_each_other() -> None:
    """The whole circle is named."""

    def one(*, two: int) -> Iterator[int]:
        yield two

    def two(*, one: int) -> Iterator[int]:
        yield one

    assert problem_of(registry_of(one, two).freeze) == (
        f"resource('one'): needs itself: {place(one)} needs {place(two)} needs {place(one)}"
    )


def test_a_positional_parameter() -> None:
    """A resource receives others by keyword only, and the error shows the line to write."""

    def other(value: int) -> Iterator[int]:
        yield value

    assert problem_of(registry_of(value, other).freeze) == (
        f"resource('other'): {place(other)} has the positional parameter 'value'; a resource receives other resources "
        "by keyword only; write: def other(*, value):"
    )
    tasks = TaskRegistry()
    assert "must accept two arguments" in problem_of(lambda: tasks.task("x", lambda ctx, input, db: None))
    assert "must accept three arguments" in problem_of(
        lambda: tasks.middleware(lambda ctx, input, call_next, *, db: None)  # type: ignore[misc, arg-type]
    )


def test_scopes_that_do_not_fit() -> None:
    """What lives longer cannot receive what ends earlier, and a worker without processes has none to keep things."""

    def short() -> Iterator[int]:
        yield 1

    def long(*, short: int) -> Iterator[int]:
        yield short

    tasks = registry_of(long)
    tasks.resource(short, scope="task")
    text = problem_of(tasks.freeze)
    assert f"{place(long)} has the scope 'worker' and receives 'short', {place(short)}, of the scope 'task'" in text
    text = problem_of(registry_of(value, scope="process").freeze)
    assert f"{place(value)} has the scope 'process', and this worker has no pool of processes" in text


def kept(events: List[Any], tasks: TaskRegistry) -> None:
    """Declare two resources of a task, of which one receives the other."""

    def outer() -> Iterator[str]:
        events.append(("open outer", threading.get_ident()))
        try:
            yield "outer"
        except BaseException as error:
            events.append(("outer", type(error)))
            raise
        finally:
            events.append(("close outer", threading.get_ident()))

    def inner(*, outer: str) -> Iterator[str]:
        events.append(("open inner", threading.get_ident()))
        try:
            yield f"inner of {outer}"
        finally:
            events.append(("close inner", threading.get_ident()))

    tasks.resource(outer, scope="task")
    tasks.resource(inner, scope="task")


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_order_and_thread(kind: str) -> None:
    """Each is opened after those that it receives, once, and closed before them, in the handler's own thread."""
    events: List[Any] = []
    tasks = TaskRegistry()
    kept(events, tasks)

    def use(ctx: TaskContext, input: Any, *, inner: str) -> List[str]:
        events.append(("run", threading.get_ident()))
        return [inner, ctx.resource("outer")]

    async def use_async(ctx: TaskContext, input: Any, *, inner: str) -> List[str]:
        await asyncio.sleep(0)
        return use(ctx, input, inner=inner)

    tasks.task("use", use if kind == "sync" else use_async)
    result = run_task(tasks, "use")
    assert result.output == ["inner of outer", "outer"]
    assert [name for name, _ in events] == ["open outer", "open inner", "run", "close inner", "close outer"]
    assert len({thread for _, thread in events}) == 1


def test_the_handlers_exception() -> None:
    """Each resource of the task gets it, one that swallows it changes nothing, and all are closed."""
    events: List[Any] = []
    tasks = TaskRegistry()
    kept(events, tasks)

    def swallowing(*, outer: str) -> Iterator[int]:
        with contextlib.suppress(TaskError):
            yield 1
        events.append(("swallowed", None))

    def replacing() -> Iterator[int]:
        try:
            yield 1
        except TaskError as error:
            raise ValueError("of the resource") from error

    tasks.resource(swallowing, scope="task")
    tasks.resource(replacing, scope="task")

    @tasks.task("use")
    def use(ctx: TaskContext, input: Any, *, swallowing: int, replacing: int) -> None:
        if input == "stop":
            raise StopIteration("odd")
        raise TaskError("full", "no room", retryable=True)

    result = run_task(tasks, "use")
    assert result.error is not None
    assert (result.error.code, result.error.retryable) == ("full", True)
    assert [name for name, _ in events] == ["open outer", "swallowed", "outer", "close outer"]
    assert events[2] == ("outer", TaskError)
    result = run_task(tasks, "use", "stop")
    assert result.error is not None
    assert result.error.message == "StopIteration: odd"


def test_a_close_that_fails() -> None:
    """It fails the task, as a commit that fails must, and the others get its error."""
    seen: List[Any] = []
    tasks = TaskRegistry()

    def outer() -> Iterator[int]:
        try:
            yield 1
        except OSError as error:
            seen.append(str(error))
            raise

    def commit(*, outer: int) -> Iterator[int]:
        yield 1
        raise OSError("disk full")

    tasks.resource(outer, scope="task")
    tasks.resource(commit, scope="task")

    @tasks.task("use")
    def use(ctx: TaskContext, input: Any, *, commit: int) -> str:
        return "done"

    result = run_task(tasks, "use")
    assert result.error is not None
    assert (result.error.code, result.error.message) == ("handler_error", "OSError: disk full")
    assert seen == ["disk full"]


def test_one_yield() -> None:
    """No yield, or a second one, fails the task and says which resource it is."""
    tasks = TaskRegistry()

    def none() -> Iterator[int]:
        return
        yield 1

    def two() -> Iterator[int]:
        yield 1
        yield 2

    for function in (none, two):
        tasks.resource(function, scope="task")
    tasks.task("none", lambda ctx, input: ctx.resource("none"))
    tasks.task("two", lambda ctx, input: ctx.resource("two"))
    assert "has ended without a yield" in (run_task(tasks, "none").error or result_missing()).message
    assert "has yielded twice" in (run_task(tasks, "two").error or result_missing()).message


def result_missing() -> Any:
    raise AssertionError("the task did not fail")


def test_asking_by_name() -> None:
    """Another thread gets what is open and opens nothing, and nobody gets anything after the handler's end."""
    tasks = registry_of(value, scope="task")
    kept_context: List[TaskContext] = []

    @tasks.task("use")
    def use(ctx: TaskContext, input: Any) -> List[Any]:
        kept_context.append(ctx)
        found: List[Any] = []

        def ask() -> None:
            try:
                found.append(ctx.resource("value"))
            except ConfigurationError as error:
                found.append(str(error))

        for _ in range(2):
            thread = threading.Thread(target=ask)
            thread.start()
            thread.join(GUARD)
            found.append(ctx.resource("value"))
        return found

    refused, *rest = run_task(tasks, "use").output
    assert "in the handler's own thread" in refused
    assert rest == [1, 1, 1]
    assert "is closed already" in problem_of(lambda: kept_context[0].resource("value"))
    tasks.task("odd", lambda ctx, input: ctx.resource("valeu"))
    error = run_task(tasks, "odd").error
    assert error is not None
    assert "did you mean 'value'" in error.message
    bare = TaskRegistry()
    bare.task("odd", lambda ctx, input: ctx.resource("value"))
    error = run_task(bare, "odd").error
    assert error is not None
    assert "no resource is declared" in error.message


def test_fakes() -> None:
    """``run_task`` replaces what is named, opens the rest, and leaves handlers alone that it does not run."""
    opened: List[str] = []
    tasks = TaskRegistry()

    @tasks.resource
    def db() -> Iterator[str]:
        opened.append("db")
        yield "real"
        opened.append("closed")

    @tasks.resource(scope="process")
    def cache(*, db: str) -> Iterator[str]:
        opened.append("cache")
        yield f"cache of {db}"

    @tasks.task("use")
    def use(ctx: TaskContext, input: Any, *, db: str, cache: str) -> List[str]:
        return [db, cache, ctx.resource("cache")]

    @tasks.task("elsewhere")
    def elsewhere(ctx: TaskContext, input: Any, *, mailer: Any) -> str:
        return str(mailer)

    assert run_task(tasks, "elsewhere", resources={"mailer": "fake"}).output == "fake"
    assert opened == []
    assert run_task(tasks, "use", resources={"db": "fake", "cache": "c"}).output == ["fake", "c", "c"]
    assert opened == []
    assert "no resource 'dbb'; did you mean 'db'?" in problem_of(
        lambda: run_task(tasks, "use", resources={"dbb": "fake"})
    )
    assert "asks for 'mailer'" in problem_of(lambda: run_task(tasks, "elsewhere"))
    assert "must be a mapping" in problem_of(lambda: run_task(tasks, "use", resources=["db"]))  # type: ignore[arg-type]


def test_a_typed_input_and_middleware() -> None:
    """The input is built first, so that one that does not fit opens nothing; middleware is around the resources."""
    events: List[str] = []
    tasks = TaskRegistry()

    @tasks.resource(scope="task")
    def db() -> Iterator[str]:
        events.append("open")
        yield "db"
        events.append("close")

    @tasks.middleware
    def around(ctx: TaskContext, input: Any, call_next: Any) -> Any:
        events.append("before")
        with pytest.raises(ConfigurationError):
            ctx.resource("db")
        try:
            return call_next(input)
        finally:
            events.append("after")

    @tasks.task("use")
    def use(ctx: TaskContext, input: Dict[str, int], *, db: str) -> Tuple[str, int]:
        return db, input["n"]

    assert run_task(tasks, "use", {"n": 1}).output == ["db", 1]
    assert events == ["before", "open", "close", "after"]
    events.clear()
    result = run_task(tasks, "use", {"n": "1"})
    assert result.error is not None
    assert result.error.code == "invalid_task"
    assert events == ["before", "after"]
