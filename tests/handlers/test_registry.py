"""Handlers declared without a worker, and how they come together."""

from __future__ import annotations

import functools
from typing import Any, Callable, Dict, List

import pytest

import sekuire
from sekuire import TaskContext, TaskRegistry, Worker
from sekuire.errors import ConfigurationError

from ..support.builders import context_of
from ..support.scripted import Scripted

Make = Callable[..., Worker]


def first(ctx: Any, input: Any) -> str:
    return "first"


def second(ctx: Any, input: Any) -> str:
    return "second"


def run(registry: TaskRegistry, capability: str, input: Any = None) -> Any:
    """What the registry's handler returns once everything is put together."""
    registry.freeze()
    entry = registry.find(capability)
    assert entry is not None
    return entry.call(context_of("t1", capability), input)


def test_handlers_are_declared_without_a_worker() -> None:
    """The decorator gives the function back unchanged, and its limits are kept."""
    tasks = TaskRegistry()
    assert tasks.is_empty()
    assert tasks.task("first", timeout=5, max_concurrency=2)(first) is first
    assert tasks.task("*", second) is second
    entry = tasks.find("first")
    assert entry is not None
    assert (entry.timeout, entry.max_concurrency) == (5, 2)
    assert (tasks.names, tasks.has_catch_all, tasks.is_empty()) == (["first"], True, False)
    assert (repr(tasks), repr(TaskRegistry())) == ("<TaskRegistry first, *>", "<TaskRegistry empty>")


def test_wrong_declarations() -> None:
    """What on_task refuses, a registry refuses under its own name."""
    tasks = TaskRegistry()
    tasks.task("first", first)
    cases: List[Any] = [
        (lambda: tasks.task("first", second), "task('first'): is taken by first ("),
        (lambda: tasks.task(first), f"name first: @….task('summarize'), got first ({__file__}:"),
        (lambda: tasks.task(3), "task: needs the capability's name first: @….task('summarize'), got int"),
        (lambda: tasks.task("a", lambda ctx: None), "must accept two arguments: handler(ctx, input)"),
        (lambda: tasks.task("a", first, timeout=-1), "timeout must be"),
        (lambda: tasks.task("a,b", first), "task: 'a,b' cannot name a capability"),
        (lambda: tasks.include({}), "include: must be a TaskRegistry, got dict"),  # type: ignore[arg-type]
        (lambda: tasks.include(tasks), "include: a registry cannot include itself"),
    ]
    for call, text in cases:
        with pytest.raises(ConfigurationError) as caught:
            call()
        assert text in str(caught.value)
    assert tasks.names == ["first"]


def typed_context(first: TaskContext, ctx: Dict[str, Any]) -> Any:
    return ctx


def one_argument(input: Any) -> Any:
    return input


def swapped(input: Any, ctx: Any) -> Any:
    return input


def swapped_by_name(input: Any, context: Any) -> Any:
    return input


def swapped_by_annotation(data: Any, task: TaskContext) -> Any:
    return data


def swapped_by_text(data: Any, task: sekuire.TaskContext) -> Any:
    return data


def unbound(self: Any, ctx: Any) -> Any:
    return self


async def swapped_async(input: Any, ctx: Any) -> Any:
    return input


def generator(ctx: Any, input: Any) -> Any:
    yield input


async def async_generator(ctx: Any, input: Any) -> Any:
    yield input


class Generator:
    def __call__(self, ctx: Any, input: Any) -> Any:
        yield input


@pytest.mark.parametrize(
    ("handler", "problem", "signature"),
    [
        (one_argument, "must accept two arguments", "def one_argument(ctx, input):"),
        (swapped, "wrong order", "def swapped(ctx, input):"),
        (swapped_by_name, "wrong order", "def swapped_by_name(ctx, input):"),
        (swapped_by_annotation, "wrong order", "def swapped_by_annotation(ctx, input):"),
        (swapped_by_text, "wrong order", "def swapped_by_text(ctx, input):"),
        (unbound, "wrong order", "def unbound(ctx, input):"),
        (swapped_async, "wrong order", "async def swapped_async(ctx, input):"),
        (functools.partial(swapped), "wrong order", ""),
        (generator, "is a generator function", "def generator(ctx, input):"),
        (async_generator, "is a generator function", "async def async_generator(ctx, input):"),
        (functools.partial(generator), "is a generator function", ""),
        (Generator(), "is a generator function", ""),
    ],
)
def test_a_handler_of_another_shape(handler: Any, problem: str, signature: str) -> None:
    """It is refused where it is declared, and the text shows how it should look."""
    with pytest.raises(ConfigurationError) as caught:
        TaskRegistry().task("a", handler)
    assert problem in str(caught.value)
    assert str(caught.value).partition("; write: ")[2] == signature


def test_a_middleware_of_another_shape() -> None:
    """What holds for a handler holds for a middleware."""

    def swapped(input: Any, ctx: Any, call_next: Any) -> Any:
        return call_next(input)

    def yielding(ctx: Any, input: Any, call_next: Any) -> Any:
        yield call_next(input)

    for function, problem in ((swapped, "wrong order"), (yielding, "is a generator function")):
        with pytest.raises(ConfigurationError, match=f"{problem}.*def {function.__name__}") as caught:
            TaskRegistry().middleware(function)
        assert "(ctx, input, call_next):" in str(caught.value)


@pytest.mark.parametrize(
    "handler",
    [
        lambda _, context: context,
        lambda ctx, context: context,
        lambda task, data: data,
        lambda *args: args,
        functools.partial(lambda extra, ctx, input: input, "extra"),
        typed_context,
    ],
)
def test_names_that_are_fine(handler: Any) -> None:
    """Names are free: only a context in the second place is refused."""
    TaskRegistry().task("a", handler)


def test_a_worker_includes_registries(platform: Any, worker_of: Make) -> None:
    """The handlers of included registries run as if they had been given to the worker, beside its own."""
    inner, outer = TaskRegistry(), TaskRegistry()
    inner.task("inner", first)
    outer.task("*", second)
    outer.include(inner)
    worker = worker_of(platform)
    worker.on_task("own", lambda ctx, input: "own")
    worker.include(outer)
    assert worker.capabilities == ("own", "inner")
    with worker:
        for name, output in {"own": "own", "inner": "first", "whatever": "second"}.items():
            assert platform.wait(platform.submit(name, None), 20)["output"] == output


def test_two_workers_share_a_registry(scripted: Scripted, worker_of: Make) -> None:
    """A registry may be included by several workers; what one of them runs does not count for the other."""
    tasks = TaskRegistry()
    tasks.task("first", first, max_concurrency=1)
    workers = [worker_of(scripted) for _ in range(2)]
    for worker in workers:
        worker.include(tasks)
    entries = [worker.handlers.find("first") for worker in workers]
    assert entries[0] is not None
    assert entries[1] is not None
    entries[0].running = 1
    assert (entries[0].has_room(), entries[1].has_room()) == (False, True)


@pytest.mark.parametrize("name", ["first", "*"])
def test_a_name_twice_names_both_places(scripted: Scripted, worker_of: Make, name: str) -> None:
    """A name that two modules declare is refused with both places, and nothing of the second is taken over."""
    one, two = TaskRegistry(), TaskRegistry()
    one.task(name, first)
    two.task("other", first)
    two.task(name, second)
    worker = worker_of(scripted)
    worker.include(one)
    with pytest.raises(ConfigurationError) as caught:
        worker.include(two)
    text = str(caught.value)
    assert text.startswith(f"include(), '{name}': is taken by first ({__file__}:")
    assert f"second ({__file__}:" in text
    assert "other" not in worker.capabilities


def test_what_comes_too_late(scripted: Scripted, worker_of: Make) -> None:
    """A declaration after include(), and an include() after start(), would be lost: both are errors."""
    tasks, late = TaskRegistry(), TaskRegistry()
    tasks.task("first", first)
    worker = worker_of(scripted)
    worker.include(tasks)
    for call in (lambda: tasks.task("b", first), lambda: tasks.include(late), lambda: tasks.middleware(print)):
        with pytest.raises(ConfigurationError, match=r"the registry is included already; .* before include"):
            call()
    with worker:
        for call in (lambda: worker.include(late), lambda: worker.middleware(print)):
            with pytest.raises(ConfigurationError, match=r"the worker has started; .* before start"):
                call()


def test_middleware_of_registries_is_nested() -> None:
    """A registry's middleware is around its own handlers only; that of who includes it is outside, whenever given."""

    def naming(name: str) -> Any:
        return lambda ctx, input, call_next: f"{name}({call_next(input)})"

    inner, outer, other = TaskRegistry(), TaskRegistry(), TaskRegistry()
    inner.task("first", first)
    inner.middleware(naming("a"))
    inner.middleware(naming("b"))
    outer.include(inner)
    outer.middleware(naming("c"))
    other.task("second", second)
    worker = TaskRegistry()
    worker.task("own", first)
    worker.include(outer)
    worker.include(other)
    worker.middleware(naming("w"))
    assert run(worker, "first") == "w(c(a(b(first))))"
    assert run(worker, "second") == "w(second)"
    assert run(worker, "own") == "w(first)"
    assert run(inner, "first") == "a(b(first))"


def test_without_middleware_nothing_is_put_around() -> None:
    """A worker without middleware calls the handler itself."""
    tasks = TaskRegistry()
    tasks.task("first", first)
    tasks.freeze()
    entry = tasks.find("first")
    assert entry is not None
    assert entry.call is first
