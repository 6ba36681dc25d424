"""The worker under load, in a process of its own, so that what it holds is its own."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from typing import Any, Dict

from sekuire import TaskContext, TaskError, Worker, create_worker

from ..chaos.process import question, reply
from .measure import snapshot


def main() -> None:
    settings = json.loads(sys.argv[1])
    # What the load provokes is told at these levels; a line for each would only fill a disk.
    logging.basicConfig(level=logging.CRITICAL)
    # Once through a whole life first: what is imported and cached with it is no growth.
    before: Dict[str, Any] = snapshot()
    worker = create_worker(**settings["options"])
    register(worker, settings["capabilities"])
    worker.start()
    reply(started=worker.wait_until_connected(30.0))
    while True:
        asked = question()
        if asked["op"] == "measure":
            reply(number=asked["number"], **snapshot(), stats=stats_of(worker))
        elif asked["op"] == "stop":
            worker.stop()
            stats = stats_of(worker)
            del worker
            reply(number=asked["number"], before=before, after=snapshot(), stats=stats)
            return


def stats_of(worker: Worker) -> Dict[str, int]:
    stats = worker.stats()
    names = ("received", "completed", "failed", "rejected", "released", "duplicates", "dropped", "undelivered")
    return {name: getattr(stats, name) for name in (*names, "running", "waiting", "overdue", "reconnects")}


# -- tasks of several shapes ------------------------------------------------------------------------------------------


def register(worker: Worker, capabilities: Any) -> None:
    """The handlers for ``capabilities``; each takes any input."""
    limits: Dict[str, Dict[str, Any]] = {"late": {"timeout": 0.02}, "narrow": {"max_concurrency": 1}}
    for name in capabilities:
        worker.on_task(name, HANDLERS.get(name, small), **limits.get(name, {}))

    @worker.on_command
    def heard(command: Any) -> None:
        if command.type == "resume":
            raise RuntimeError("a callback that fails")


def small(ctx: TaskContext, input: Any) -> Any:
    return {"ok": True}


def echo(ctx: TaskContext, input: Any) -> Any:
    return input


def large(ctx: TaskContext, input: Any) -> Any:
    return "x" * 200_000


async def coroutine(ctx: TaskContext, input: Any) -> Any:
    await asyncio.sleep(0)
    return {"ok": True}


def progress(ctx: TaskContext, input: Any) -> Any:
    for part in range(10):
        ctx.report_progress(part / 10, "on the way")
    return {"ok": True}


def fail(ctx: TaskContext, input: Any) -> Any:
    raise TaskError("planned", "this one was to fail", details={"why": "a soak"})


def flaky(ctx: TaskContext, input: Any) -> Any:
    if ctx.attempt < 2:
        raise TaskError("flaky", "this one may be tried again", retryable=True)
    return {"ok": True}


def crash(ctx: TaskContext, input: Any) -> Any:
    return input["missing"] / 0


def late(ctx: TaskContext, input: Any) -> Any:
    ctx.wait_cancelled(5.0)
    # A moment as an overdue handler.
    asyncio.run(asyncio.sleep(0.01))
    return None


def odd(ctx: TaskContext, input: Any) -> Any:
    return {1, 2, 3}


HANDLERS = {
    "echo": echo, "large": large, "async": coroutine, "progress": progress, "fail": fail, "flaky": flaky,
    "crash": crash, "late": late, "odd": odd, "narrow": small,
}  # fmt: skip


if __name__ == "__main__":
    main()
