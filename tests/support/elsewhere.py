"""Handlers at the top level of a module, for other processes to import."""

from __future__ import annotations

import asyncio
import atexit
import dataclasses
import logging
import os
import pathlib
import signal
import sys
import threading
import time
from typing import Any, Dict, List

from sekuire import TaskContext, TaskError, TaskRegistry
from sekuire.executors.process import send_message
from sekuire.logging import IDS, TaskFilter

GUARD = 180.0

tasks = TaskRegistry()


def until_gone(path: str) -> str:
    """Wait until the file is gone; without a name forever."""
    end = time.monotonic() + GUARD
    while not path or os.path.exists(path):
        assert time.monotonic() < end
        time.sleep(0.01)
    return "let go"


@dataclasses.dataclass
class Sum:
    numbers: List[int]
    by: str = ""


class Odd(Exception):
    """Picklable, but not to be brought back."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


class Unpicklable:
    def __reduce__(self) -> Any:
        raise RuntimeError("not this one")


@tasks.task("sum")
def sum_of(ctx: TaskContext, input: Sum) -> Any:
    return {"sum": sum(input.numbers), "pid": os.getpid(), "built": Sum([1], input.by)}


@tasks.task("facts")
async def facts(ctx: TaskContext, input: Any) -> Dict[str, Any]:
    ctx.logger.info("here")
    return {
        "kind": type(ctx).__name__, "is_a": isinstance(ctx, TaskContext), "task_id": ctx.task_id,
        "capability": ctx.capability, "tool": ctx.tool, "workspace_id": ctx.workspace_id,
        "requester_id": ctx.requester_id, "parent_task_id": ctx.parent_task_id, "workflow_id": ctx.workflow_id,
        "trace_id": ctx.trace_id, "attempt": ctx.attempt, "remaining": ctx.remaining(), "deadline": ctx.deadline,
        "is_cancelled": ctx.is_cancelled(), "reason": ctx.cancel_reason, "input": input,
        "waited": ctx.wait_cancelled(0.01), "repr": repr(ctx),
    }  # fmt: skip


@tasks.task("fail")
def fail(ctx: TaskContext, input: str) -> Any:
    ctx.raise_if_cancelled()
    if input == "own":
        raise TaskError("own", "said", retryable=True, details={"x": 1})
    if input == "wrapped":
        raise RuntimeError("wrapped") from TaskError("own", "said", retryable=True, details={"x": 1})
    if input == "odd":
        raise Odd(1, 2)
    if input == "exit":
        raise SystemExit(3)
    if input == "local":
        raise type("Local", (ValueError,), {})("of no module")
    if input == "result":
        return Unpicklable()
    if input == "interrupt":
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        if hasattr(signal, "SIGHUP"):
            os.kill(os.getpid(), signal.SIGHUP)
        return "still here"
    if input == "ctrl-c":
        raise KeyboardInterrupt
    raise ValueError("plain")


@tasks.task("die")
def die(ctx: TaskContext, input: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@tasks.task("hang")
def hang(ctx: TaskContext, input: Any) -> Any:
    """Writes its process's number, then waits for its cancellation, or for the file to go, or for nothing at all."""
    with open(input["path"], "a", encoding="utf-8") as file:
        file.write(f"{os.getpid()}\n")
    if input["until"] == "cancelled":
        assert ctx.wait_cancelled(GUARD)
        with open(input["path"], "a", encoding="utf-8") as file:
            file.write(f"{ctx.cancel_reason}\n")
        ctx.raise_if_cancelled()
    if input["until"] == "gone":
        return until_gone(input["path"])
    return until_gone("")


@tasks.task("sleep")
async def sleep(ctx: TaskContext, input: Any) -> None:
    """Writes its process's number, then sleeps until it is cancelled, and writes why."""
    note(input["path"])
    try:
        await asyncio.sleep(GUARD)
    except asyncio.CancelledError:
        with open(input["path"], "a", encoding="utf-8") as file:
            file.write(f"{ctx.cancel_reason}\n")
        raise


@tasks.task("progress")
def progress(ctx: TaskContext, input: Any) -> None:
    ctx.report_progress(0.5, "half")
    assert ctx.wait_cancelled(0.3) is False
    ctx.report_progress(0.75)


@tasks.task("leave a thread")
def leave_a_thread(ctx: TaskContext, input: str) -> None:
    """Leave a thread behind that reports progress without an end, and writes a file each time."""

    def report() -> None:
        while True:
            ctx.report_progress(0.9, "left behind")
            with open(input, "a", encoding="utf-8") as file:
                file.write(".")
            time.sleep(0.05)

    threading.Thread(target=report, daemon=True).start()


@tasks.task("use tools")
def use_tools(ctx: TaskContext, input: List[str]) -> Dict[str, Any]:
    """Asks for each tool, catching refusals, then enforces the last one again."""
    said = [bool(ctx.policy.check_tool(name)) for name in input]
    if input[-1] == "rate":
        limited = ctx.policy.check_rate_limit("tokens", 1)
        said.append(f"{limited.rule}: {limited.reason}")
    ctx.policy.enforce_tool(input[-1])
    return {"said": said, "version": ctx.policy.policy.version, "same": ctx.policy is ctx.policy}


def set_up(path: str) -> None:
    """An initializer."""
    logging.basicConfig(filename=path, level=logging.INFO, force=True)


def square(number: int) -> int:
    return number * number


def fail_in(path: str) -> None:
    raise RuntimeError(path)


def raise_odd() -> None:
    raise Odd(1, 2)


def note(path: str) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(f"{os.getpid()}\n")


def write_pid_and_wait(path: str, let_go: str) -> str:
    """Write the process's number, then wait for the file ``let_go`` to go; without a name forever."""
    note(path)
    return until_gone(let_go)


class OnlyThere:
    """Cannot be built in the process that sent for it."""

    def __init__(self, here: int) -> None:
        self.here = here

    def __reduce__(self) -> Any:
        return not_here, (self.here,)


def not_here(pid: int) -> OnlyThere:
    if os.getpid() == pid:
        raise RuntimeError("not here")
    return OnlyThere(pid)


def only_there(pid: int) -> OnlyThere:
    return OnlyThere(pid)


def send_twice() -> bool:
    return send_message(1) and send_message(2)


def count(enforcer: Any, amount: int) -> bool:
    """Whether the policy's enforcer lets that many more tokens be used."""
    return bool(enforcer.check_rate_limit("tokens", amount))


class ExitsThere:
    """Ends the program that loads it."""

    def __reduce__(self) -> Any:
        return sys.exit, (3,)


def exits_there() -> ExitsThere:
    return ExitsThere()


class ExitingError(Exception):
    """Ends the program that loads it."""

    def __reduce__(self) -> Any:
        return sys.exit, (3,)


def raise_exiting() -> None:
    raise ExitingError("odd")


def send_exit() -> str:
    send_message(ExitsThere())
    return "done"


def send_beside_results(size: int) -> bytes:
    """Leave a thread behind that sends messages without an end; return a result of ``size`` bytes."""

    def send() -> None:
        while True:
            send_message(b"m" * 20_000)

    if threading.active_count() < 4:
        threading.Thread(target=send, daemon=True).start()
    return b"r" * size


def ids_of_record(ctx: Any, input: Any) -> Any:
    """The ids that a record of another package has in this process."""
    record = logging.makeLogRecord({})
    TaskFilter().filter(record)
    return {name: getattr(record, name) for name in IDS}


def ask_for_approval(ctx: TaskContext, input: Dict[str, Any]) -> Any:
    decision = ctx.require_approval("pay", {"amount": input["amount"]}, timeout=GUARD)
    return [decision.status, decision.decided_by, type(ctx).__name__]


async def ask_for_approvals(ctx: TaskContext, input: Any) -> Any:
    asked = [ctx.require_approval_async("pay", {"n": n}, timeout=GUARD) for n in range(2)]
    return [decision.status for decision in await asyncio.gather(*asked)]


def ask_for_tools(ctx: TaskContext, input: Any) -> str:
    ctx.policy.enforce_tool("search")
    ctx.policy.enforce_tool("search", details={"query": "x"})
    return "used"


def current_trace(ctx: TaskContext, input: Any) -> List[str]:
    """Return the ids of the current span of OpenTelemetry."""
    from opentelemetry import trace  # Only here: most tests that use this module do without.

    span = trace.get_current_span().get_span_context()
    return [f"{span.trace_id:032x}", f"{span.span_id:016x}"]


def write_at_exit(path: str) -> None:
    """Write a file when the interpreter of this process ends."""
    atexit.register(lambda: pathlib.Path(path).write_text("ended"))
