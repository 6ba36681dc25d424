"""Which task runs when, and how often: registration, dedupe, attempts, limits, threads."""

from __future__ import annotations

import concurrent.futures
import functools
import threading
from typing import Any, Callable, List

import pytest

from sekuire import TaskContext, Worker
from sekuire.errors import ConfigurationError

from ..conftest import AGENT
from ..support.scripted import Scripted
from ..support.waiting import GUARD, until

Make = Callable[..., Worker]


class Gate:
    """A handler that waits until it is let go, and tells which tasks it runs."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.begun: List[str] = []

    def __call__(self, ctx: TaskContext, input: Any) -> str:
        self.begun.append(ctx.task_id)
        # Longer than any wait of a test: a hanging handler must not end by itself.
        assert self.go.wait(3 * GUARD)
        return f"attempt {ctx.attempt}"


# -- registering --


def test_wrong_registrations(worker_of: Make, scripted: Scripted) -> None:
    """A name twice, a wrong signature, a wrong name or limit: each is refused and named."""
    worker = worker_of(scripted)
    worker.on_task("echo", lambda ctx, input: None)
    cases: List[Any] = [
        (lambda: worker.on_task("echo", lambda ctx, input: None), "on_task('echo'): is taken by"),
        (lambda: worker.on_task("a", lambda ctx: None), "must accept two arguments"),
        (lambda: worker.on_task("a", lambda ctx, input, more: None), "must accept two arguments"),
        (lambda: worker.on_task("a", "handler"), "must be callable, got str"),
        (lambda: worker.on_task("a,b", lambda ctx, input: None), "no comma"),
        (lambda: worker.on_task("", lambda ctx, input: None), "cannot name a capability"),
        (lambda: worker.on_task(lambda ctx, input: None), "needs the capability's name first"),
        (lambda: worker.on_task("a", lambda c, i: None, timeout=0), "timeout must be a number of seconds above 0"),
        (lambda: worker.on_task("a", lambda c, i: None, timeout=True), "timeout must be"),
        (lambda: worker.on_task("a", lambda c, i: None, max_concurrency=0), "max_concurrency must be a whole number"),
        (lambda: worker.on_command("x"), "must be callable"),
        (lambda: Worker({"agent_id": "a"}), "must be a WorkerConfig, got dict"),  # type: ignore[arg-type]
        (lambda: worker_of(scripted, capabilities="echo"), "must be a list of names"),
        (lambda: worker_of(scripted, max_worker=3), "did you mean 'max_workers'?"),
    ]
    for call, text in cases:
        with pytest.raises(ConfigurationError) as caught:
            call()
        assert text in str(caught.value)
    worker.on_task("*", lambda ctx, input: None)
    with pytest.raises(ConfigurationError, match="is taken by"):
        worker.on_task("*", lambda ctx, input: None)


def test_no_registration_after_start(worker_of: Make, scripted: Scripted) -> None:
    """After start() no handler can be added."""
    worker = worker_of(scripted)
    worker.on_task("echo", lambda ctx, input: None)
    with worker, pytest.raises(ConfigurationError, match="before start"):
        worker.on_task("late", lambda ctx, input: None)


def test_many_kinds_of_handlers(platform: Any, worker_of: Make) -> None:
    """Functions, methods, partials, callables and builtins serve."""

    class Service:
        def method(self, ctx: Any, input: Any) -> str:
            return "method"

        def __call__(self, ctx: Any, input: Any) -> str:
            return "call"

    def three(prefix: str, ctx: Any, input: Any) -> str:
        return prefix

    worker = worker_of(platform)
    worker.on_task("method", Service().method)
    worker.on_task("call", Service())
    worker.on_task("partial", functools.partial(three, "partial"))
    worker.on_task("any", lambda *args: "any")
    with worker:
        for name in ("method", "call", "partial", "any"):
            assert platform.wait(platform.submit(name, {}, AGENT), GUARD)["output"] == name


def test_declared_and_handled_capabilities_are_united(
    scripted: Scripted, worker_of: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """The stream is asked for what is declared and what has a handler; what has none is warned of."""
    worker = worker_of(scripted, capabilities=["b", "a"], max_workers=3, max_queued=2)
    worker.on_task("a", lambda ctx, input: None)
    worker.on_task("c d", lambda ctx, input: None)
    with worker:
        query = scripted.wait_for("stream")[0].query
        assert worker.capabilities == ("b", "a", "c d")
        assert query["capabilities"] == "b,a,c d"
        assert query["max_in_flight"] == "5"
        assert query["worker_id"] == worker.worker_id
        assert (query["agent_id"], query["installation_id"]) == (AGENT, "inst-1")
        assert scripted.of("bootstrap")[0].json["capabilities"] == ["b", "a", "c d"]
    assert any("no handler for b" in record.message for record in caplog.records)


def test_catch_all(scripted: Scripted, worker_of: Make) -> None:
    """on_task("*") gets every capability without its own handler, and the stream is asked for all."""
    worker = worker_of(scripted)
    worker.on_task("echo", lambda ctx, input: "own")
    worker.on_task("*", lambda ctx, input: ctx.capability)
    with worker:
        assert "capabilities" not in scripted.wait_for("stream")[0].query
        scripted.task("t1", "echo")
        scripted.task("t2", "whatever it is")
        assert scripted.completion("t1")["output"] == "own"
        assert scripted.completion("t2")["output"] == "whatever it is"


# -- the same task again --


def test_a_repeated_delivery_runs_once(scripted: Scripted, worker_of: Make) -> None:
    """A task delivered again while it runs, waits, or is delivered runs once; each repetition is counted."""
    gate = Gate()
    worker = worker_of(scripted, max_workers=1)
    worker.on_task("echo", gate)
    with worker:
        for task_id in ("running", "waiting", "running", "waiting"):
            scripted.task(task_id)
        until(lambda: worker.stats().duplicates == 2)
        assert (worker.stats().running, worker.stats().waiting) == (1, 1)
        gate.go.set()
        assert scripted.completion("waiting")["output"] == "attempt 1"
        until(lambda: worker.stats().undelivered == 0)
        scripted.task("running")
        until(lambda: len(scripted.completions("running")) == 2)
        assert gate.begun == ["running", "waiting"]
        bodies = [request.raw for request in scripted.completions("running")]
        assert bodies[0] == bodies[1]
        assert len(scripted.completions("waiting")) == 1
        stats = worker.stats()
        assert (stats.received, stats.completed, stats.duplicates) == (5, 2, 3)


def test_a_delivery_while_the_result_is_undelivered(scripted: Scripted, worker_of: Make) -> None:
    """A repeated delivery of a task whose result is not accepted yet does not run it, and its result is sent once."""
    gate = Gate()
    gate.go.set()
    accept = threading.Event()
    scripted.on["complete"] = lambda request: (200, {}) if accept.is_set() else (503, {})
    worker = worker_of(scripted)
    worker.on_task("echo", gate)
    with worker:
        scripted.task("t1")
        scripted.wait_for("complete")
        scripted.task("t1", attempt=2)
        until(lambda: worker.stats().duplicates == 1)
        accept.set()
        until(lambda: worker.stats().undelivered == 0)
        assert gate.begun == ["t1"]
        last = scripted.completions("t1")[-1]
        assert (last.json["attempt"], last.headers["Idempotency-Key"]) == (2, "t1:2")


@pytest.mark.parametrize("state", ["waiting", "running"])
def test_a_higher_attempt_is_adopted(scripted: Scripted, worker_of: Make, state: str) -> None:
    """A task that comes again with a higher attempt runs once, and is reported under the higher number."""
    gate, first = Gate(), Gate()
    worker = worker_of(scripted, max_workers=1)
    worker.on_task("echo", gate)
    worker.on_task("first", first)
    first.go.set()
    with worker:
        if state == "waiting":
            first.go.clear()
            scripted.task("t0", "first")
            until(lambda: first.begun)
        scripted.task("t1")
        until(lambda: worker.stats().waiting == 1 if state == "waiting" else gate.begun)
        scripted.task("t1", attempt=3)
        scripted.task("t1", attempt=2)
        until(lambda: worker.stats().duplicates == 2)
        first.go.set()
        gate.go.set()
        body = scripted.completion("t1")
        assert (body["attempt"], body["output"]) == (3, "attempt 3")
        assert gate.begun == ["t1"]


def test_a_delivered_result_answers_a_higher_attempt(scripted: Scripted, worker_of: Make) -> None:
    """A completed task that comes again with a higher attempt gets the same result under it, without a second run."""
    gate = Gate()
    gate.go.set()
    worker = worker_of(scripted)
    worker.on_task("echo", gate)
    with worker:
        scripted.task("t1")
        scripted.completion("t1")
        until(lambda: worker.stats().undelivered == 0)
        scripted.task("t1", attempt=2)
        until(lambda: len(scripted.completions("t1")) == 2)
        assert scripted.completions("t1")[1].json["attempt"] == 2
        assert gate.begun == ["t1"]


def test_a_retryable_failure_is_tried_again(platform: Any, worker_of: Make) -> None:
    """A task with max_attempts that failed retryably runs anew on the only worker there is, with a higher attempt."""
    from sekuire import TaskError

    attempts = []

    def handler(ctx: TaskContext, input: Any) -> str:
        attempts.append(ctx.attempt)
        if len(attempts) < 3:
            raise TaskError("busy", retryable=True)
        return "done"

    worker = worker_of(platform)
    worker.on_task("echo", handler)
    with worker:
        # Room for more: on a slow machine an attempt can come before the failure of the one before it is settled, which
        # is then reported again.
        task = platform.wait(platform.submit("echo", {}, AGENT, max_attempts=20), GUARD)
        assert (task["status"], task["output"]) == ("completed", "done"), task
    assert len(attempts) == 3
    assert attempts[0] == 1
    assert attempts == sorted(set(attempts))


# -- limits --


def test_max_concurrency_bounds_one_capability(scripted: Scripted, worker_of: Make) -> None:
    """Tasks above a handler's max_concurrency wait, without keeping others from running."""
    gate = Gate()
    worker = worker_of(scripted, max_workers=4, max_queued=10)
    worker.on_task("narrow", gate, max_concurrency=2)
    worker.on_task("echo", lambda ctx, input: "through")
    with worker:
        for number in range(5):
            scripted.task(f"n{number}", "narrow")
        scripted.task("t1")
        assert scripted.completion("t1")["output"] == "through"
        until(lambda: len(gate.begun) == 2)
        stats = worker.stats()
        assert (stats.running, stats.waiting) == (2, 3)
        gate.go.set()
        until(lambda: worker.stats().completed == 6)
    assert sorted(gate.begun) == [f"n{number}" for number in range(5)]


def test_a_slow_report_does_not_hold_up_the_next(scripted: Scripted, worker_of: Make) -> None:
    """A task that waited for another of its kind begins when that one ends, not when its report has been taken."""
    second = threading.Event()
    scripted.on["complete"] = lambda request: (200, {}) if request.task_id != "n1" or second.wait(GUARD) else (500, {})
    worker = worker_of(scripted, max_workers=2)

    @worker.on_task("narrow", max_concurrency=1)
    def handler(ctx: TaskContext, input: Any) -> None:
        if ctx.task_id == "n2":
            second.set()
        else:
            until(lambda: worker.stats().waiting == 1)

    with worker:
        scripted.task("n1", "narrow")
        scripted.task("n2", "narrow")
        scripted.completion("n2")
        until(lambda: worker.stats().undelivered == 0)
    assert scripted.count("complete") == 2


def test_undelivered_results_hold_the_work(
    scripted: Scripted, worker_of: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With too many results undelivered no task begins until some are accepted; the stream is read on."""
    monkeypatch.setattr("sekuire.worker.results.BACKLOG", 2)
    accept = threading.Event()
    scripted.on["complete"] = lambda request: (200, {}) if accept.is_set() else (503, {})
    worker = worker_of(scripted, max_workers=1, max_queued=0)
    worker.on_task("echo", lambda ctx, input: None)
    with worker:
        for number in range(6):
            scripted.task(f"t{number}")
        until(lambda: worker.stats().undelivered == 2 and worker.stats().received == 6)
        assert worker.stats().waiting == 4
        accept.set()
        until(lambda: worker.stats().completed == 6 and worker.stats().undelivered == 0)


def test_overdue_handlers_are_replaced_up_to_max_workers(scripted: Scripted, worker_of: Make) -> None:
    """Handlers past their time are counted and their threads replaced, at most max_workers; each end frees a place."""
    gates = [Gate() for _ in range(5)]
    worker = worker_of(scripted, max_workers=2, max_queued=10)
    for number, gate in enumerate(gates):
        worker.on_task(f"hang{number}", gate, timeout=0.05)
    worker.on_task("echo", lambda ctx, input: "through")
    with worker:
        for number in (0, 1):
            scripted.task(f"h{number}", f"hang{number}")
            assert scripted.completion(f"h{number}")["error"]["code"] == "timeout"
        scripted.task("t1")
        assert scripted.completion("t1")["output"] == "through"
        assert worker.stats().overdue == 2
        for number in (2, 3):
            scripted.task(f"h{number}", f"hang{number}")
            assert scripted.completion(f"h{number}")["error"]["code"] == "timeout"
        scripted.task("t2")
        until(lambda: worker.stats().waiting == 1)
        assert worker.stats().overdue == 4
        # A replaced one ends: its thread takes the place of one that could not be replaced.
        gates[0].go.set()
        assert scripted.completion("t2")["output"] == "through"
        for gate in gates:
            gate.go.set()
        until(lambda: worker.stats().overdue == 0)
        for number in range(6):
            scripted.task(f"e{number}")
            assert scripted.completion(f"e{number}")["output"] == "through"
        assert all(len(scripted.completions(f"h{number}")) == 1 for number in range(4))


def test_a_handler_that_ends_right_at_its_timeout_is_not_overdue(scripted: Scripted, worker_of: Make) -> None:
    """Handlers that return the moment they are cancelled leave nothing counted behind."""
    worker = worker_of(scripted, max_workers=4, task_timeout=0.01)
    worker.on_task("echo", lambda ctx, input: ctx.wait_cancelled(GUARD))
    with worker:
        for number in range(40):
            scripted.task(f"t{number}")
        until(lambda: worker.stats().failed == 40)
        until(lambda: worker.stats().overdue == 0 and worker.stats().running == 0)


# -- a user's executor --


def test_a_users_executor(scripted: Scripted, worker_of: Make) -> None:
    """With executor= the handlers run in it, it is not shut down, and results are sent by the library's threads."""
    names = []

    def handler(ctx: TaskContext, input: Any) -> None:
        names.append(threading.current_thread().name)

    with concurrent.futures.ThreadPoolExecutor(2, thread_name_prefix="mine") as executor:
        worker = worker_of(scripted, executor=executor, max_workers=2, max_queued=20)
        worker.on_task("echo", handler)
        with worker:
            for number in range(20):
                scripted.task(f"t{number}")
            until(lambda: worker.stats().completed == 20 and worker.stats().undelivered == 0)
        assert executor.submit(lambda: 7).result(GUARD) == 7
    assert len(names) == 20
    assert all(name.startswith("mine") for name in names)


def test_a_task_in_a_users_queue_has_not_begun(scripted: Scripted, worker_of: Make) -> None:
    """A task that waits in the user's executor is paused like any that has not begun."""
    busy = threading.Event()
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        executor.submit(busy.wait, GUARD)
        worker = worker_of(scripted, executor=executor, max_workers=2)
        worker.on_task("echo", lambda ctx, input: "ran")
        with worker:
            scripted.task("t1")
            until(lambda: worker.stats().running == 1)
            worker.pause("lunch")
            assert scripted.completion("t1")["error"]["code"] == "worker_paused"
            worker.resume()
            busy.set()
            for number in range(2, 6):
                scripted.task(f"t{number}")
                assert scripted.completion(f"t{number}")["output"] == "ran"


def test_an_executor_that_takes_no_more_work(scripted: Scripted, worker_of: Make) -> None:
    """Tasks that the user's executor refuses or cancels are answered worker_shutdown; none is lost."""
    busy = threading.Event()
    executor = concurrent.futures.ThreadPoolExecutor(1)
    executor.submit(busy.wait, GUARD)
    worker = worker_of(scripted, executor=executor, max_workers=2, max_queued=4)
    worker.on_task("echo", lambda ctx, input: None)
    with worker:
        for number in range(4):
            scripted.task(f"t{number}")
        until(lambda: worker.stats().waiting == 2)
        executor.shutdown(wait=False, cancel_futures=True)
        scripted.task("t4")
        for number in range(5):
            error = scripted.completion(f"t{number}")["error"]
            assert (error["code"], error["retryable"]) == ("worker_shutdown", True)
        busy.set()
    executor.shutdown()


# -- async, context --


def test_async_handlers(platform: Any, worker_of: Make) -> None:
    """An async handler runs in the handler's thread with a loop of its own; its failure is its task's."""
    import asyncio

    worker = worker_of(platform)

    @worker.on_task("echo")
    async def handler(ctx: TaskContext, input: Any) -> Any:
        await asyncio.sleep(0)
        if input.get("fail"):
            raise ValueError("async")
        return threading.current_thread().name.startswith("sekuire-task")

    with worker:
        assert platform.wait(platform.submit("echo", {}), GUARD)["output"] is True
        task = platform.wait(platform.submit("echo", {"fail": True}), GUARD)
        assert task["error"]["message"] == "ValueError: async"


def test_the_context_says_what_the_task_is(scripted: Scripted, worker_of: Make) -> None:
    """Every field of the task is on the context, under either of its names; the input is the handler's."""
    seen: List[Any] = []

    def handler(ctx: TaskContext, input: Any) -> None:
        seen.append((ctx.task_id, ctx.capability, ctx.tool, ctx.workspace_id, ctx.requester_id, ctx.parent_task_id,
                     ctx.workflow_id, ctx.trace_id, ctx.attempt, ctx.deadline, ctx.remaining(), input))  # fmt: skip

    worker = worker_of(scripted)
    worker.on_task("echo", handler)
    common = {"workspace_id": "ws", "parent_task_id": "p", "workflow_id": "w", "trace_id": "tr", "input": [1]}
    with worker:
        scripted.send("task", {"task_id": "t/1", "capability": "echo", "tool": "hammer", "requester_agent_id": "r",
                               "attempt": 4, **common})  # fmt: skip
        scripted.send("message", {"id": "t/2", "target_capability": "echo", "target_tool": "saw", "requester_id": "q",
                                  **common})  # fmt: skip
        requests = scripted.wait_for("complete", 2)
    expected = [
        ("t/1", "echo", "hammer", "ws", "r", "p", "w", "tr", 4, None, None, [1]),
        ("t/2", "echo", "saw", "ws", "q", "p", "w", "tr", 1, None, None, [1]),
    ]
    assert sorted(seen) == expected
    assert sorted(request.path for request in requests) == [f"/api/v1/tasks/t%2F{n}/complete" for n in (1, 2)]
