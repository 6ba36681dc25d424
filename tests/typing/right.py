"""What a user may write: mypy --strict has nothing to say about it."""

from __future__ import annotations

import contextvars
import dataclasses
import functools
from typing import Any, Coroutine, Dict, Iterator, List, Mapping, Optional

from typing_extensions import assert_type

from sekuire import (
    CallNext,
    Handler,
    Middleware,
    ProcessExecutor,
    RemoteTaskContext,
    TaskContext,
    TaskError,
    TaskRegistry,
    Worker,
    create_worker,
)


@dataclasses.dataclass
class Order:
    items: List[str]


@dataclasses.dataclass
class Receipt:
    pieces: int


tasks = TaskRegistry()
tenant: contextvars.ContextVar[Optional[str]] = contextvars.ContextVar("tenant", default=None)


@tasks.resource
def pool() -> Iterator[List[int]]:
    yield [1]


@tasks.resource(scope="task", name="db")
def connection(*, pool: List[int]) -> Iterator[int]:
    yield pool[0]


@tasks.task("resources")
async def with_resources(ctx: TaskContext, input: Order, *, db: int) -> int:
    return db + int(ctx.resource("pool")[0])


assert_type(with_resources.__name__, str)


@tasks.task("plain", timeout=5, max_concurrency=2)
def plain(ctx: TaskContext, input: Dict[str, Any]) -> Dict[str, Any]:
    ctx.raise_if_cancelled()
    left: Optional[float] = ctx.remaining()
    ctx.report_progress(0.5, f"{ctx.task_id}: {left}")
    ctx.logger.info("attempt %d", ctx.attempt)
    if ctx.wait_cancelled(0.1):
        raise TaskError("cancelled", ctx.cancel_reason or "", retryable=True, details={"x": 1})
    return input


@tasks.task("typed")
def typed(ctx: TaskContext, input: Order) -> Receipt:
    return Receipt(len(input.items))


@tasks.task("later")
async def later(ctx: TaskContext, payload: Optional[Order]) -> Receipt:
    return Receipt(0)


@tasks.task("*")
def anything(ctx: TaskContext, input: Any, *, more: int = 0) -> None:
    return None


@tasks.middleware
def for_a_tenant(ctx: TaskContext, input: Any, call_next: CallNext) -> Any:
    tenant.set(ctx.workspace_id)
    return call_next(input)


# Decorators give back what they were given.
assert_type(typed(RemoteTaskContext.__new__(RemoteTaskContext), Order([])), Receipt)
waiting = assert_type(later(TaskContext.__new__(TaskContext), None), Coroutine[Any, Any, Receipt])


class Service:
    def __init__(self, worker: Worker) -> None:
        worker.on_task("method", self.method)
        worker.on_task("call", self)
        worker.on_task("partial", functools.partial(self.three, "prefix"))

    def method(self, ctx: TaskContext, input: Mapping[str, object]) -> str:
        return ctx.capability

    def __call__(self, ctx: TaskContext, input: object) -> object:
        return input

    def three(self, prefix: str, ctx: TaskContext, input: str) -> str:
        return prefix + input


def main() -> None:
    with ProcessExecutor(2, initializer=print, initargs=("up",)) as executor:
        worker = create_worker(agent_id="a", install_token="t", executor=executor)
        worker.include(tasks)
        worker.on_task("lambda", lambda ctx, input: ctx.task_id)
        worker.middleware(lambda ctx, input, call_next: call_next(input))
        handler: Handler = plain
        middleware: Middleware = for_a_tenant
        worker.on_task("again", handler, timeout=2.5)
        worker.middleware(middleware)
        Service(worker)

        @worker.on_task("inner")
        def inner(ctx: TaskContext, input: Order) -> int:
            return len(input.items)

        @worker.middleware
        def measured(ctx: TaskContext, input: Any, call_next: CallNext) -> Any:
            return call_next(input)

        assert_type(inner(TaskContext.__new__(TaskContext), Order([])), int)
        worker.start(block=True)
