"""Cancel one task in each of its states, wherever its handler runs, while the stream is cut and the order is lost."""

from __future__ import annotations

import asyncio
import contextlib
import pathlib
from typing import Any, Callable, Dict, Iterator, List

from sekuire import SekuireClient, TaskContext, TaskHandle, TaskRegistry, Worker
from sekuire.local import LocalPlatform

from .waiting import GUARD, until

tasks = TaskRegistry()

#: State of the task → the code of its one result; None: it has completed.
STATES: Dict[str, Any] = {
    "queued": "cancelled",
    "waiting": "cancelled",
    "running": "cancelled",
    "reporting": None,
    "released": "cancelled",
}
#: Those of a task whose handler runs in an executor of one's own: it may wait there, too.
STATES_OF_EXECUTORS = {**STATES, "sent": "cancelled"}
#: What happens to the order: its event is lost; the stream ends before it, or after it.
CUTS = ("event lost", "cut before", "cut after")


@tasks.task("hold")
def hold(ctx: TaskContext, input: Any) -> str:
    """Note that it runs, and go on until it is cancelled or let go."""
    path = pathlib.Path(input)
    path.touch()
    while path.exists():
        if ctx.wait_cancelled(0.02):
            ctx.raise_if_cancelled()
    return "let go"


@tasks.task("hold-async")
async def hold_async(ctx: TaskContext, input: Any) -> str:
    """Do the same in a coroutine, which ends where it waits."""
    path = pathlib.Path(input)
    path.touch()
    while path.exists():
        await asyncio.sleep(0.02)
    return "let go"


class Three:
    """Three tasks and a worker that has room for two: one runs, one waits in the worker, one at the platform.

    With ``max_workers=2`` and an executor that runs one call at a time, the second has been sent to the executor.
    """

    def __init__(
        self, platform: LocalPlatform, worker: Worker, client: SekuireClient, capability: str, directory: pathlib.Path
    ) -> None:
        self.platform = platform
        self.worker = worker
        self.paths: List[pathlib.Path] = [directory / f"task-{number}" for number in range(3)]
        self.running = client.submit(capability, str(self.paths[0]))
        # Processes may have to be started first, on a machine that has much to do.
        until(self.paths[0].exists, timeout=4 * GUARD)
        self.waiting = client.submit(capability, str(self.paths[1]))
        until(lambda: worker.stats().waiting + worker.stats().running == 2)
        self.queued = client.submit(capability, str(self.paths[2]))

    def cancel(self, state: str, cut: str) -> TaskHandle:
        """Cancel the task that is in a state. Return its handle when it has its result."""
        with getattr(self, f"_{state}")() as handle:
            self.platform.hold_commands = True
            if cut == "cut before":
                self.platform.drop_streams()
            handle.cancel("not needed")
            if cut == "cut after":
                self.platform.drop_streams()
        assert handle.wait(GUARD)
        return handle  # type: ignore[no-any-return]

    def path_of(self, handle: TaskHandle) -> pathlib.Path:
        """Return the file that a task's handler makes when it begins."""
        return self.paths[(self.running, self.waiting, self.queued).index(handle)]

    def let_go(self) -> None:
        """End every task as soon as it runs. One that was cancelled has ended without that."""
        for handle, path in zip((self.running, self.waiting, self.queued), self.paths):
            until(lambda h=handle, p=path: p.exists() or h.status() in ("completed", "failed"))  # type: ignore[misc]
            if handle.status() != "failed":
                path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _queued(self) -> Iterator[TaskHandle]:
        assert self.queued.status() == "queued"
        yield self.queued

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[TaskHandle]:
        yield self.waiting

    @contextlib.contextmanager
    def _sent(self) -> Iterator[TaskHandle]:
        until(lambda: self.worker.stats().running == 2)
        yield self.waiting

    @contextlib.contextmanager
    def _running(self) -> Iterator[TaskHandle]:
        yield self.running

    @contextlib.contextmanager
    def _reporting(self) -> Iterator[TaskHandle]:
        """The handler has ended, and its result does not come through."""
        with self.platform.faults.error(503, on="complete") as fault:
            self.paths[0].unlink()
            until(lambda: fault.injected)
            yield self.running

    @contextlib.contextmanager
    def _released(self) -> Iterator[TaskHandle]:
        """The worker stops and gives back what it has not begun, which does not come through."""
        with self.platform.faults.error(503, on="release") as fault:
            self.worker.request_stop()
            until(lambda: fault.injected)
            yield self.waiting


def check_cancel(
    platform: LocalPlatform,
    worker_of: Callable[..., Worker],
    directory: pathlib.Path,
    state: str,
    cut: str,
    capability: str = "hold",
    **options: Any,
) -> None:
    """Cancel a task in this state: it has one result, which stays, and the others have theirs."""
    worker = worker_of(platform, max_workers=2 if state == "sent" else 1, max_queued=1, **options)
    worker.include(tasks)
    worker.start()
    with SekuireClient(api_base_url=platform.url, api_key=platform.api_key, agent_id=worker.config.agent_id) as client:
        three = Three(platform, worker, client, capability, directory)
        handle = three.cancel(state, cut)
        found = platform.task(handle.id)
        assert (found["error"] or {}).get("code") == STATES_OF_EXECUTORS[state], found
        platform.hold_commands = False
        if state == "released":
            three.paths[0].unlink()
            assert three.running.result(GUARD) == "let go"
            # The worker has stopped: the third task stays where it is.
            assert worker.wait(GUARD)
        else:
            three.let_go()
            for other in (three.running, three.waiting, three.queued):
                if other is not handle:
                    assert other.result(GUARD) == "let go"
            worker.stop()
    after = platform.task(handle.id)
    assert {name: after[name] for name in ("status", "output", "error")} == {
        name: found[name] for name in ("status", "output", "error")
    }
    assert [one["state"] in ("completed", "failed") for one in after["timeline"]].count(True) == 1, after["timeline"]
    reported = [status for status, _ in platform.completions(handle.id)].count(200)
    assert reported == (0 if state in ("queued", "released") else 1)
    if state in ("queued", "waiting", "sent", "released"):
        assert not three.path_of(handle).exists(), "its handler never began"
