"""Cancelling one task: in every state it can be in, on threads, on processes and in a loop."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any, Callable, Dict, List

import pytest

from sekuire import ProcessExecutor, SekuireClient, TaskCancelled, TaskContext, Worker
from sekuire.local import LocalPlatform

from ..conftest import AGENT
from ..support.scripted import Scripted
from ..support.waiting import GUARD, until

Make = Callable[..., Worker]


@pytest.fixture
def client(platform: LocalPlatform) -> Any:
    with SekuireClient(api_base_url=platform.url, api_key=platform.api_key, agent_id=AGENT) as client:
        yield client


def code_of(task: Dict[str, Any]) -> Any:
    return (task["error"] or {}).get("code")


class Handler:
    """Waits until it is cancelled or let go, and then raises or returns as it is told."""

    def __init__(self) -> None:
        self.begun = threading.Semaphore(0)
        self.reasons: List[Any] = []
        self.may_end = threading.Event()

    def __call__(self, ctx: TaskContext, input: Any) -> Any:
        self.begun.release()
        while not ctx.wait_cancelled(0.02):
            if self.may_end.is_set():
                return "ended"
        self.reasons.append(ctx.cancel_reason)
        if input == "raise":
            ctx.raise_if_cancelled()
        return "returned"


@pytest.fixture
def handler() -> Any:
    handler = Handler()
    yield handler
    handler.may_end.set()


# -- running ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("input", "status", "code"), [("raise", "failed", "cancelled"), ("return", "completed", None)])
def test_a_running_task(
    platform: LocalPlatform,
    worker_of: Make,
    client: SekuireClient,
    handler: Handler,
    input: str,
    status: str,
    code: Any,
) -> None:
    """Its context is cancelled with the reason, and what the handler then does is the result."""
    worker = worker_of(platform)
    worker.on_task("work", handler)
    worker.start()
    handle = client.submit("work", input)
    assert handler.begun.acquire(timeout=GUARD)
    handle.cancel("not needed")
    task = platform.wait(handle.id, GUARD)
    assert (task["status"], code_of(task)) == (status, code)
    assert handler.reasons == ["not needed"]
    assert len(platform.completions(handle.id)) == 1


@pytest.mark.parametrize(
    ("reason", "seen"),
    [(None, "cancelled"), ("terminated", "cancelled: terminated"), ("timeout", "cancelled: timeout")],
)
def test_a_reason_that_is_the_librarys(
    platform: LocalPlatform, worker_of: Make, client: SekuireClient, handler: Handler, reason: Any, seen: str
) -> None:
    """A requester cannot make a cancel look like a termination."""
    worker = worker_of(platform)
    worker.on_task("work", handler)
    worker.start()
    handle = client.submit("work", "raise")
    assert handler.begun.acquire(timeout=GUARD)
    handle.cancel(reason)
    assert code_of(platform.wait(handle.id, GUARD)) == "cancelled"
    assert handler.reasons == [seen]


def test_only_that_task(platform: LocalPlatform, worker_of: Make, client: SekuireClient, handler: Handler) -> None:
    """The others go on."""
    worker = worker_of(platform)
    worker.on_task("work", handler)
    worker.start()
    first, second = client.submit("work", "raise"), client.submit("work", "raise")
    for _ in range(2):
        assert handler.begun.acquire(timeout=GUARD)
    first.cancel()
    assert code_of(platform.wait(first.id, GUARD)) == "cancelled"
    assert second.status() == "assigned"
    handler.may_end.set()
    assert second.result(GUARD) == "ended"


def test_an_event_that_is_lost(
    platform: LocalPlatform, worker_of: Make, client: SekuireClient, handler: Handler
) -> None:
    """The next heartbeat makes it good."""
    worker = worker_of(platform)
    worker.on_task("work", handler)
    worker.start()
    handle = client.submit("work", "raise")
    assert handler.begun.acquire(timeout=GUARD)
    platform.hold_commands = True
    handle.cancel()
    assert code_of(platform.wait(handle.id, GUARD)) == "cancelled"
    assert handler.reasons == ["cancelled"]


def test_an_async_handler(platform: LocalPlatform, worker_of: Make, client: SekuireClient) -> None:
    """Its coroutine is cancelled."""
    begun, seen = threading.Event(), []

    async def sleep(ctx: TaskContext, input: Any) -> None:
        begun.set()
        try:
            await asyncio.sleep(GUARD)
        finally:
            seen.append(ctx.cancel_reason)

    worker = worker_of(platform)
    worker.on_task("sleep", sleep)
    worker.start()
    handle = client.submit("sleep")
    assert begun.wait(GUARD)
    handle.cancel("not needed")
    assert code_of(platform.wait(handle.id, GUARD)) == "cancelled"
    assert seen == ["not needed"]


# -- not begun --------------------------------------------------------------------------------------------------------


def test_a_waiting_task(platform: LocalPlatform, worker_of: Make, client: SekuireClient, handler: Handler) -> None:
    """It is answered without a run, and the queue goes on."""
    worker = worker_of(platform, max_workers=1, max_queued=3)
    worker.on_task("work", handler)
    worker.start()
    handles = [client.submit("work", "return") for _ in range(4)]
    until(lambda: worker.stats().waiting == 3)
    handles[2].cancel("not needed")
    task = platform.wait(handles[2].id, GUARD)
    assert (code_of(task), task["execution_time_ms"]) == ("cancelled", 0)
    assert "not needed" in task["error"]["message"]
    handler.may_end.set()
    assert [handles[n].result(GUARD) for n in (0, 1, 3)] == ["ended"] * 3
    assert worker.stats().waiting == 0


def test_a_task_that_waits_for_its_handlers_turn(
    platform: LocalPlatform, worker_of: Make, client: SekuireClient, handler: Handler
) -> None:
    """One beyond ``max_concurrency``, too."""
    worker = worker_of(platform, max_workers=4)
    worker.on_task("work", handler, max_concurrency=1)
    worker.start()
    handles = [client.submit("work", "return") for _ in range(3)]
    until(lambda: worker.stats().waiting == 2)
    handles[1].cancel()
    assert code_of(platform.wait(handles[1].id, GUARD)) == "cancelled"
    handler.may_end.set()
    assert [handles[n].result(GUARD) for n in (0, 2)] == ["ended"] * 2


class Gateway:
    """A policy gateway whose question takes until it is let go."""

    def __init__(self) -> None:
        self.asked, self.may_answer = threading.Event(), threading.Event()

    def check_request(self) -> None:
        self.asked.set()
        assert self.may_answer.wait(GUARD)

    def check_capability(self, name: str) -> None:
        pass

    def on_heartbeat_response(self, response: Any) -> None:
        pass


def test_a_task_whose_policy_is_asked(platform: LocalPlatform, worker_of: Make, client: SekuireClient) -> None:
    """It is answered at once, and its handler is not called when the policy allows it."""
    gateway, calls = Gateway(), []
    worker = worker_of(platform, policy_gateway=gateway, max_workers=1)
    worker.on_task("work", lambda ctx, input: calls.append(input))
    worker.start()
    handle = client.submit("work", 1)
    assert gateway.asked.wait(GUARD)
    handle.cancel()
    assert code_of(platform.wait(handle.id, GUARD)) == "cancelled"
    gateway.may_answer.set()
    client.submit("work", 2).result(GUARD)
    assert calls == [2]


# -- over -------------------------------------------------------------------------------------------------------------


def test_a_task_that_reports(scripted: Scripted, worker_of: Make) -> None:
    """Its result is its result, whatever comes while it is sent."""
    arrived, may_answer = threading.Event(), threading.Event()

    def answer(request: Any) -> Any:
        arrived.set()
        assert may_answer.wait(GUARD)
        return 200, {}

    scripted.on["complete"] = answer
    worker = worker_of(scripted)
    worker.on_task("echo", lambda ctx, input: "done")
    worker.start()
    scripted.task("t1")
    assert arrived.wait(GUARD)
    scripted.send("cancel", {"task_id": "t1"})
    scripted.send("cancel", {"task_id": "never seen"})
    scripted.task("t2")
    may_answer.set()
    assert scripted.completion("t1")["status"] == scripted.completion("t2")["status"] == "completed"
    assert len(scripted.completions("t1")) == 1


def test_a_task_that_is_given_back(
    platform: LocalPlatform, worker_of: Make, client: SekuireClient, handler: Handler
) -> None:
    """The platform ends it when it comes back."""
    worker = worker_of(platform, max_workers=1)
    worker.on_task("work", handler)
    worker.start()
    running, waiting = client.submit("work", "return"), client.submit("work", "return")
    until(lambda: worker.stats().waiting == 1)
    # The release waits, and the cancel comes before it.
    fault = platform.faults.add("latency:0.5,times=1,on=release")
    worker.request_stop()
    until(lambda: fault.injected or platform.count("release"))
    waiting.cancel()
    assert code_of(platform.wait(waiting.id, GUARD)) == "cancelled"
    handler.may_end.set()
    assert running.result(GUARD) == "ended"


@pytest.mark.parametrize("data", ["nonsense", "[]", '{"task_id": 5}', '{"task_id": ""}', "{}"])
def test_an_event_that_cannot_be_read(scripted: Scripted, worker_of: Make, data: str) -> None:
    """It is counted, and the stream goes on."""
    worker = worker_of(scripted)
    worker.on_task("echo", lambda ctx, input: "done")
    worker.start()
    scripted.send("cancel", data)
    scripted.task("t1")
    assert scripted.completion("t1")["status"] == "completed"
    assert worker.stats().dropped == 1


@pytest.mark.parametrize("value", ["t1", 5, [5, None, "..", "unknown"], {"t1": True}])
def test_cancel_tasks_of_a_wrong_form(scripted: Scripted, worker_of: Make, value: Any) -> None:
    """What is no list of ids is ignored, and so are ids that do not run here."""
    scripted.on["heartbeat"] = lambda request: (200, {"cancel_tasks": value})
    begun, may_end = threading.Event(), threading.Event()

    def work(ctx: TaskContext, input: Any) -> Any:
        begun.set()
        may_end.wait(GUARD)
        return ctx.is_cancelled()

    worker = worker_of(scripted)
    worker.on_task("echo", work)
    worker.start()
    scripted.task("t1")
    assert begun.wait(GUARD)
    scripted.wait_for("heartbeat", scripted.count("heartbeat") + 2)
    may_end.set()
    assert scripted.completion("t1")["output"] is False


# -- the stream is cut ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_cut_stream(make_platform: Any, worker_of: Make, handler: Handler, when: str) -> None:
    """A cancel around a cut reaches the handler, and there is one result."""
    platform = make_platform()
    worker = worker_of(platform, reconnect_min=0.3, reconnect_max=0.3)
    worker.on_task("work", handler)
    worker.start()
    with SekuireClient(api_base_url=platform.url, api_key=platform.api_key, agent_id=AGENT) as client:
        handle = client.submit("work", "raise")
        assert handler.begun.acquire(timeout=GUARD)
        if when == "after":
            platform.drop_streams()
        handle.cancel("cut")
        if when == "before":
            platform.drop_streams()
        assert code_of(platform.wait(handle.id, GUARD)) == "cancelled"
    assert handler.reasons in (["cut"], ["cancelled"])
    assert [status for status, _ in platform.completions(handle.id)] == [200]


def test_a_delivery_that_was_lost(platform: LocalPlatform, worker_of: Make, client: SekuireClient) -> None:
    """A cancelled task that its worker never got ends too: the worker has no tasks, and has been asked to cancel it."""
    worker = worker_of(platform)
    worker.on_task("work", lambda ctx, input: "ran")
    worker.start()
    assert worker.wait_until_connected(GUARD)
    until(platform.streams)
    platform.faults.stall_streams(GUARD)
    handle = client.submit("work")
    assert handle.status() == "assigned"
    handle.cancel()
    # What was on its way to the worker is lost with the stream.
    platform.drop_streams()
    assert code_of(platform.wait(handle.id, GUARD)) == "cancelled"
    assert platform.completions(handle.id) == []


# -- processes --------------------------------------------------------------------------------------------------------


def wait_in_process(ctx: TaskContext, input: Any) -> Any:
    ctx.report_progress(0.5)
    if input == "ignore":
        time.sleep(GUARD)
    if not ctx.wait_cancelled(GUARD):
        return "nobody came"
    if input == "raise":
        raise TaskCancelled(ctx.cancel_reason or "")
    return ctx.cancel_reason


@pytest.fixture
def processes() -> Any:
    with ProcessExecutor(max_workers=1, kill_after=0.3) as executor:
        yield executor


def test_in_a_process(
    platform: LocalPlatform, worker_of: Make, client: SekuireClient, processes: ProcessExecutor
) -> None:
    """A handler there sees it, one that ignores it is killed after the grace, and one that has not begun never does."""
    worker = worker_of(platform, executor=processes, max_workers=2)
    worker.on_task("work", wait_in_process)
    worker.start()
    results = {}
    for input in ("return", "raise", "ignore"):
        handle = client.submit("work", input)
        until(lambda h=handle: platform.progress(h.id))  # type: ignore[misc]
        # Not before: two threads of the worker could come to the executor in either order.
        waiting = client.submit("work", "return")
        until(lambda: worker.stats().running == 2)
        waiting.cancel()
        task = platform.wait(waiting.id, GUARD)
        assert (code_of(task), task["execution_time_ms"]) == ("cancelled", 0)
        handle.cancel("not needed")
        task = platform.wait(handle.id, GUARD)
        results[input] = task["output"] or code_of(task)
        assert len(platform.completions(handle.id)) == 1
    assert results == {"return": "not needed", "raise": "cancelled", "ignore": "cancelled"}


# -- trying again -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("retryable", [False, True])
def test_a_failed_task_that_is_tried_again(
    platform: LocalPlatform, worker_of: Make, client: SekuireClient, retryable: bool
) -> None:
    """It runs again, on the only worker there is, also if its failure was not retryable."""
    from sekuire import TaskError

    attempts: List[int] = []

    def work(ctx: TaskContext, input: Any) -> Any:
        attempts.append(ctx.attempt)
        if len(attempts) == 1:
            raise TaskError("no_luck", "not today", retryable)
        return "better"

    worker = worker_of(platform)
    worker.on_task("work", work)
    worker.start()
    handle = client.submit("work")
    assert handle.wait(GUARD)
    assert client.retry(handle.id).result(GUARD) == "better"
    assert attempts == [1, 2]
