"""One of several worker processes of an agent, for ``benchmarks.scaling``; its settings come from the environment."""

from __future__ import annotations

import logging
import time
from typing import Any

from sekuire import SekuireSDK, TaskContext, TaskRegistry

from .process import hear, say

tasks = TaskRegistry()


@tasks.task("wait")
def wait(ctx: TaskContext, input: Any) -> None:
    """A handler that waits, as for a model's answer."""
    ctx.wait_cancelled(input)


@tasks.task("compute")
def compute(ctx: TaskContext, input: Any) -> int:
    """A handler that computes for about that many seconds of this thread's CPU time."""
    end = time.thread_time() + input
    turns = 0
    while time.thread_time() < end:
        turns += sum(range(200)) > 0
    return turns


def main() -> None:
    """Run a worker until the parent ends it."""
    logging.basicConfig(level=logging.WARNING)
    with SekuireSDK.from_env() as sdk:
        worker = sdk.create_task_worker(max_workers=4, max_queued=1)
        worker.include(tasks)
        with worker:
            worker.wait_until_connected(15.0)
            say({"ready": True})
            while hear() is not None:
                say({"completed": worker.stats().completed})


if __name__ == "__main__":
    main()
