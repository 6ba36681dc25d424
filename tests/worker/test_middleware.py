"""Middleware around handlers: order, thread, context variables, what it may change, and what it may not."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import threading
from typing import Any, Callable, List

import pytest

from sekuire import TaskContext, TaskError, Worker
from sekuire.errors import ConfigurationError, PolicyViolationError

from ..support.scripted import Scripted
from ..support.waiting import GUARD, until

Make = Callable[..., Worker]

user: contextvars.ContextVar[str] = contextvars.ContextVar("user", default="nobody")


def test_the_onion(platform: Any, worker_of: Make) -> None:
    """First registered is outermost; each sees the input before and the result after, and may change both."""
    worker = worker_of(platform)
    seen: List[Any] = []

    @worker.middleware
    def outer(ctx: TaskContext, input: Any, call_next: Any) -> Any:
        seen.append(("outer", ctx.task_id, input))
        result = call_next([*input, "outer"])
        seen.append(("outer", result))
        return {"result": result}

    def inner(ctx: TaskContext, input: Any, call_next: Any) -> Any:
        seen.append(("inner", input))
        return [*call_next([*input, "inner"]), "inner was here"]

    assert worker.middleware(inner) is inner
    worker.on_task("echo", lambda ctx, input: input)
    with worker:
        task_id = platform.submit("echo", ["in"])
        assert platform.wait(task_id, GUARD)["output"] == {"result": ["in", "outer", "inner", "inner was here"]}
    assert seen == [
        ("outer", task_id, ["in"]),
        ("inner", ["in", "outer"]),
        ("outer", ["in", "outer", "inner", "inner was here"]),
    ]


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_context_variables_and_thread(platform: Any, worker_of: Make, kind: str) -> None:
    """What a middleware sets the handler sees, in the same thread, and the next task does not; async ones too."""
    worker = worker_of(platform, max_workers=1)
    threads: List[str] = []
    before: List[str] = []

    @worker.middleware
    def who(ctx: TaskContext, input: Any, call_next: Any) -> Any:
        threads.append(threading.current_thread().name)
        before.append(user.get())
        user.set(input)
        result = call_next(input)
        assert isinstance(result, str)
        return result

    def handler(ctx: TaskContext, input: Any) -> str:
        threads.append(threading.current_thread().name)
        return user.get()

    async def async_handler(ctx: TaskContext, input: Any) -> str:
        await asyncio.sleep(0)
        return handler(ctx, input)

    worker.on_task("echo", handler if kind == "sync" else async_handler)
    with worker:
        for name in ("ada", "grace"):
            assert platform.wait(platform.submit("echo", name), GUARD)["output"] == name
    assert before == ["nobody", "nobody"]
    assert len(set(threads)) == 1
    assert threads[0].startswith("sekuire-task")


def test_errors_go_through(platform: Any, worker_of: Make) -> None:
    """A middleware sees what the handler raises, may replace it by another error or by a result, and may clean up."""
    worker = worker_of(platform)
    cleaned: List[str] = []

    @worker.middleware
    def mend(ctx: TaskContext, input: Any, call_next: Any) -> Any:
        try:
            return call_next(input)
        except KeyError as error:
            raise TaskError("no_such_key", str(error), retryable=True) from error
        except ZeroDivisionError:
            return "infinite"
        finally:
            cleaned.append(ctx.capability)

    worker.on_task("key", lambda ctx, input: {}["k"])
    worker.on_task("zero", lambda ctx, input: 1 / 0)
    worker.on_task("other", lambda ctx, input: int("x"))
    with worker:
        ended = {name: platform.wait(platform.submit(name, None), GUARD) for name in ("key", "zero", "other")}
    assert (ended["key"]["error"]["code"], ended["key"]["error"]["retryable"]) == ("no_such_key", True)
    assert ended["zero"]["output"] == "infinite"
    assert ended["other"]["error"]["code"] == "handler_error"
    assert sorted(cleaned) == ["key", "other", "zero"]


def test_not_going_on(platform: Any, worker_of: Make) -> None:
    """A middleware that does not call call_next answers by itself: the handler does not run."""
    worker = worker_of(platform)
    ran: List[str] = []
    worker.middleware(lambda ctx, input, call_next: "from the cache" if input == "hit" else call_next(input))
    worker.on_task("echo", lambda ctx, input: ran.append(ctx.task_id))
    with worker:
        assert platform.wait(platform.submit("echo", "hit"), GUARD)["output"] == "from the cache"
        assert platform.wait(platform.submit("echo", "miss"), GUARD)["output"] is None
    assert len(ran) == 1


def test_a_handler_runs_once(platform: Any, worker_of: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second call of call_next, or one after the middleware's end, is an error and runs nothing."""
    monkeypatch.setattr(logging.getLogger("sekuire.task"), "disabled", True)
    worker = worker_of(platform)
    kept: List[Any] = []
    ran: List[str] = []

    @worker.middleware
    def twice(ctx: TaskContext, input: Any, call_next: Any) -> Any:
        kept.append(call_next)
        if input == "late":
            return "answered"
        call_next(input)
        return call_next(input)

    worker.on_task("echo", lambda ctx, input: ran.append(input))
    with worker:
        error = platform.wait(platform.submit("echo", "twice"), GUARD)["error"]
        assert platform.wait(platform.submit("echo", "late"), GUARD)["output"] == "answered"
    assert error["code"] == "handler_error"
    assert __file__ not in error["message"]
    assert "twice called call_next a second time" in error["message"]
    with pytest.raises(RuntimeError, match="or after its own end"):
        kept[-1]("late")
    assert ran == ["twice"]


def test_it_is_inside_the_tasks_time(scripted: Scripted, worker_of: Make) -> None:
    """A middleware that does not return in the task's time is answered timeout, with its context cancelled."""
    worker = worker_of(scripted)
    over = threading.Event()

    @worker.middleware
    def slow(ctx: TaskContext, input: Any, call_next: Any) -> Any:
        assert ctx.remaining() is not None
        assert ctx.wait_cancelled(GUARD)
        over.set()

    worker.on_task("echo", lambda ctx, input: None, timeout=0.05)
    with worker:
        scripted.task("t1")
        assert scripted.completion("t1")["error"]["code"] == "timeout"
        assert over.wait(GUARD)
        until(lambda: worker.stats().overdue == 0)


def test_it_runs_after_the_policy_gate(platform: Any, worker_of: Make) -> None:
    """What the policy denies reaches no middleware."""

    class Gateway:
        def check_request(self) -> None: ...

        def check_capability(self, name: str) -> None:
            raise PolicyViolationError("capability.not_allowed", "no")

        def on_heartbeat_response(self, reply: Any) -> None: ...

    worker = worker_of(platform, policy_gateway=Gateway())
    seen: List[str] = []
    worker.middleware(lambda ctx, input, call_next: seen.append(ctx.task_id))
    worker.on_task("echo", lambda ctx, input: None)
    with worker:
        assert platform.wait(platform.submit("echo", None), GUARD)["error"]["code"] == "policy_denied"
    assert seen == []


def test_wrong_middleware(scripted: Scripted, worker_of: Make) -> None:
    """What cannot serve as a middleware is refused when it is given, with its place."""

    async def later(ctx: Any, input: Any, call_next: Any) -> Any: ...

    class Later:
        async def __call__(self, ctx: Any, input: Any, call_next: Any) -> Any: ...

    worker = worker_of(scripted)
    cases: List[Any] = [
        ("x", "must be callable, got str"),
        (lambda ctx, input: None, "must accept three arguments: middleware(ctx, input, call_next)"),
        (later, "is async; a middleware is a plain function"),
        (Later(), "is async; a middleware is a plain function"),
    ]
    for function, text in cases:
        with pytest.raises(ConfigurationError) as caught:
            worker.middleware(function)
        assert text in str(caught.value)
        assert str(caught.value).startswith("middleware: ")
