"""What a user may get wrong: each line that ends with a code is an error of mypy --strict, with that code."""

from __future__ import annotations

import dataclasses
from typing import Any, Dict

from sekuire import CallNext, ProcessExecutor, TaskContext, TaskRegistry, create_worker


@dataclasses.dataclass
class Order:
    number: int


tasks = TaskRegistry()
worker = create_worker(agent_id="a", install_token="t")


@tasks.task("one argument")  # E: type-var
def one(ctx: TaskContext) -> None: ...


@worker.on_task("one argument")  # E: type-var
def one_too(ctx: TaskContext) -> None: ...


@tasks.task("the wrong context")  # E: type-var
def wrong_context(ctx: str, input: Any) -> None: ...


@tasks.task("swapped")  # E: type-var
def swapped(input: Dict[str, Any], ctx: TaskContext) -> None: ...


@tasks.task("a keyword")  # E: type-var
def keyword(ctx: TaskContext, *, input: Any) -> None: ...


tasks.task("no function", 5)  # E: call-overload
tasks.task(5)  # E: call-overload
worker.on_task("one argument", one)  # E: type-var
worker.on_task("a limit", timeout="5")  # E: call-overload
worker.include(worker)  # E: arg-type


@worker.middleware  # E: type-var
def without_next(ctx: TaskContext, input: Any) -> Any:
    return input


@tasks.middleware  # E: type-var
def wrong_next(ctx: TaskContext, input: Any, call_next: int) -> Any:
    return input


@tasks.middleware
def called_wrongly(ctx: TaskContext, input: Any, call_next: CallNext) -> Any:
    return call_next(ctx, input)  # E: call-arg


@tasks.task("typed")
def typed(ctx: TaskContext, input: Order) -> int:
    ctx.cancel()  # E: attr-defined
    ctx.report_progress("half")  # E: arg-type
    ctx.task_id = "another"  # E: misc
    print(input.name)  # E: attr-defined
    return input.number


@tasks.task("later")
async def later(ctx: TaskContext, input: Order) -> str:
    return input.number  # E: return-value


def call(ctx: TaskContext) -> str:
    typed(ctx, {"number": 5})  # E: arg-type
    return typed(ctx, Order(5))  # E: return-value


ProcessExecutor("2")  # E: arg-type
