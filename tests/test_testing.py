"""sekuire.testing: a handler run as a worker runs it, a workbench, waiting without sleeping, and the pytest plugin."""

from __future__ import annotations

import asyncio
import contextvars
import pathlib
import subprocess
import sys
import threading
from typing import Any, Iterator

import pytest

from sekuire import PolicyGateway, TaskContext, TaskError, TaskRegistry, create_worker
from sekuire.errors import ConfigurationError, PolicyViolationError
from sekuire.testing import AGENT, TaskResult, Workbench, run_task, wait_idle

from .support.builders import tasks_of
from .support.gateway import FakeGateway
from .support.scripted import Scripted
from .support.waiting import GUARD, client_threads


@pytest.fixture
def bench() -> Iterator[Workbench]:
    with Workbench() as bench:
        yield bench


REGISTRY = TaskRegistry()


def fail(ctx: Any, input: Any) -> Any:
    raise TaskError("no_funds", "empty", retryable=True, details={"left": 0})


# -- run_task ---------------------------------------------------------------------------------------------------------


def test_an_output() -> None:
    """The output is what comes out of JSON, with progress and time beside it."""

    def work(ctx: Any, input: Any) -> Any:
        ctx.report_progress(0.5, "half")
        ctx.report_progress(1)
        return {"input": input, "pair": (1, 2), 3: ctx.attempt}

    result = run_task(tasks_of(work=work), "work", {"x": (1, None)}, attempt=2)
    assert result.status == "completed"
    assert result.output == {"input": {"x": [1, None]}, "pair": [1, 2], "3": 2}
    assert result.progress == ((0.5, "half"), (1.0, None))
    assert (result.error, result.exception) == (None, None)
    assert result.execution_time_ms >= 0


def test_the_context() -> None:
    """The handler sees the fields that were given, and an id of its own for each task."""
    seen = []

    def look(ctx: Any, input: Any) -> None:
        seen.append((ctx.workspace_id, ctx.trace_id, ctx.requester_id, ctx.tool, ctx.capability, ctx.remaining()))
        seen.append(ctx.task_id)

    fields = {"workspace_id": "ws", "trace_id": "t", "requester_id": "r", "tool": "hammer"}
    assert run_task(tasks_of(look=look), "look", **fields).output is None
    run_task(tasks_of(look=look), "look", task_id="t-7", timeout=60)
    assert seen[0] == ("ws", "t", "r", "hammer", "look", None)
    assert seen[1] != "t-7" == seen[3]
    assert 0 < seen[2][-1] <= 60


def test_failures() -> None:
    """What a handler raises is the failure that its requester would get; the exception itself can be looked at."""
    failed = run_task(tasks_of(fail=fail), "fail")
    assert failed.status == "failed"
    assert failed.error is not None
    assert (failed.error.code, failed.error.message, failed.error.retryable) == ("no_funds", "empty", True)
    assert failed.error.details == {"left": 0}
    assert isinstance(failed.exception, TaskError)

    crashed = run_task(tasks_of(crash=lambda ctx, input: 1 / 0), "crash")
    assert crashed.error is not None
    assert crashed.error.code == "handler_error"
    assert crashed.error.message == "ZeroDivisionError: division by zero"
    assert isinstance(crashed.exception, ZeroDivisionError)

    unable = run_task(tasks_of(unable=lambda ctx, input: object()), "unable")
    assert unable.error is not None
    assert unable.error.code == "result_not_serializable"

    assert "bytes" in str(run_task(worker_with(big=lambda ctx, input: "x" * 2000, max_result_bytes=1000), "big").error)


def worker_with(max_result_bytes: int = 10_000, **handlers: Any) -> Any:
    worker = create_worker(
        agent_id="a", runtime_token="rt-canary-1", installation_id="i", max_result_bytes=max_result_bytes
    )
    for name, handler in handlers.items():
        worker.on_task(name, handler)
    return worker


def test_a_timeout() -> None:
    """A task's time ends its context, and the result is the timeout's, whatever the handler returns then."""
    result = run_task(tasks_of(wait=lambda ctx, input: ctx.wait_cancelled(GUARD)), "wait", timeout=0.01)
    assert result.error is not None
    assert (result.error.code, result.error.retryable) == ("timeout", True)
    tasks = TaskRegistry()
    tasks.task("wait", lambda ctx, input: ctx.wait_cancelled(GUARD), timeout=0.01)
    assert run_task(tasks, "wait", timeout=GUARD).error == result.error


def test_the_calling_thread() -> None:
    """The handler runs in the caller's thread, in a context of its own, so that its variables do not leak out."""
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")

    def work(ctx: Any, input: Any) -> Any:
        variable.set("set")
        return threading.current_thread() is threading.main_thread()

    before = client_threads()
    assert run_task(tasks_of(work=work), "work").output is True
    assert variable.get() == "unset"
    assert client_threads() == before


def test_an_async_handler() -> None:
    """An async handler is awaited; also where the caller is in an event loop of its own."""

    async def work(ctx: Any, input: Any) -> Any:
        await asyncio.sleep(0)
        return input

    async def main() -> Any:
        return run_task(tasks_of(work=work), "work", 7).output

    assert run_task(tasks_of(work=work), "work", 5).output == 5
    assert asyncio.run(main()) == 7


def test_ctrl_c_is_not_a_result() -> None:
    """A KeyboardInterrupt in the handler ends the test, as it should."""

    def interrupted(ctx: Any, input: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_task(tasks_of(interrupted=interrupted), "interrupted")


def test_middleware_is_around_it() -> None:
    """The middleware of registry and worker is around the handler, as it will be in the worker."""
    tasks = tasks_of(work=lambda ctx, input: [*input, "handler"])
    tasks.middleware(lambda ctx, input, call_next: [*call_next([*input, "registry"]), "back"])
    assert run_task(tasks, "work", []).output == ["registry", "handler", "back"]
    worker = worker_with()
    worker.include(tasks)
    worker.middleware(lambda ctx, input, call_next: call_next([*input, "worker"]))
    assert run_task(worker, "work", []).output == ["worker", "registry", "handler", "back"]


def test_the_worker_is_not_changed(bench: Workbench) -> None:
    """run_task leaves a worker as it was: more can be registered, and a started one counts nothing."""
    worker = bench.worker()
    worker.on_task("one", lambda ctx, input: 1)
    assert run_task(worker, "one").output == 1
    worker.on_task("two", lambda ctx, input: 2, max_concurrency=1)
    worker.start()
    assert run_task(worker, "two").output == 2
    assert bench.platform.wait(bench.platform.submit("two", None), GUARD)["output"] == 2
    wait_idle(worker)
    assert worker.stats().received == 1


def test_the_policy_gateway_is_asked() -> None:
    """The worker's gateway decides, or the one that the test gives, or none."""
    worker = create_worker(
        agent_id="a",
        runtime_token="rt-1",
        installation_id="i",
        policy_gateway=FakeGateway(PolicyViolationError("capability.blocked", "work is forbidden", retry_after=3.0)),
    )
    worker.on_task("work", lambda ctx, input: "done")
    denied = run_task(worker, "work")
    assert denied.error is not None
    assert (denied.error.code, denied.error.message) == ("policy_denied", "capability.blocked: work is forbidden")
    limited = run_task(
        worker,
        "work",
        policy_gateway=FakeGateway(
            PolicyViolationError("rate_limit.requests_per_minute", "work is forbidden", retry_after=3.0)
        ),
    )
    assert limited.error is not None
    assert limited.error.code == "rate_limited"
    assert limited.error.details == {"rule": "rate_limit.requests_per_minute", "retry_after": 3.0}
    assert run_task(worker, "work", policy_gateway=None).output == "done"


def test_tokens_are_taken_out_of_errors() -> None:
    """As in the worker, a live token in an exception's message does not reach the result."""

    def leak(ctx: Any, input: Any) -> None:
        raise ValueError("it is rt-canary-1")

    result = run_task(worker_with(leak=leak), "leak")
    assert result.error is not None
    assert result.error.message == "ValueError: it is ***"


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: run_task(None, "x"), "must be a Worker or a TaskRegistry, got NoneType"),  # type: ignore[arg-type]
        (lambda: run_task(tasks_of(x=fail), "x", object()), "input: has no JSON form"),
        (lambda: run_task(tasks_of(x=fail), "x", float("nan")), "input: has no JSON form"),
        (lambda: run_task(tasks_of(summarize=fail), "sumarize"), "'sumarize'; did you mean 'summarize'?"),
        (lambda: run_task(tasks_of(a=fail, b=fail), "other"), "capability: no handler for 'other'; there are 'a', 'b'"),
        (lambda: run_task(tasks_of(), "other"), "no handler for 'other'; there are no handlers"),
        (lambda: run_task(tasks_of(x=fail), "x", trace="t"), "trace: unknown field of a task; known are task_id"),
        (lambda: run_task(tasks_of(x=fail), "x", trace_id=7), "trace_id must be a string"),
        (lambda: run_task(tasks_of(x=fail), "x", timeout="1"), "timeout: must be a number of seconds"),
        (lambda: run_task(tasks_of(x=fail), "x", timeout=-1), "timeout_ms must be a positive number"),
        (lambda: run_task(tasks_of(x=fail), "x", policy_gateway=object()), "policy_gateway: must offer"),
    ],
)
def test_wrong_arguments(call: Any, words: str) -> None:
    """A wrong argument is told, naming it, instead of being a failure of the task."""
    with pytest.raises(ConfigurationError) as caught:
        call()
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (sys.modules[__name__], f"got the module {__name__}; did you mean {__name__}.REGISTRY?"),
        (pathlib, "must be a TaskRegistry, or a mapping from a capability to its handler, got the module pathlib"),
        ([fail], "got list"),
        ("greetings", "got str"),
        (fail, "got function"),
    ],
)
def test_what_holds_no_handlers(bench: Workbench, source: Any, words: str) -> None:
    """It is told before a worker is made of what stands beside it."""
    with pytest.raises(ConfigurationError) as caught:
        bench.worker({"x": fail}, source)
    assert words in str(caught.value)
    assert bench._workers == []


def test_its_results_compare() -> None:
    """A result is a value: a test can compare it as a whole."""
    result = run_task(tasks_of(work=lambda ctx, input: 1), "work")
    assert result == TaskResult(status="completed", output=1, execution_time_ms=result.execution_time_ms)


# -- the workbench and wait_idle --------------------------------------------------------------------------------------


def test_a_workbench(bench: Workbench) -> None:
    """Workers of a workbench take registries and mappings, are started with them, and stop with it."""
    worker = bench.worker(tasks_of(one=lambda ctx, input: 1), {"two": lambda ctx, input: 2}, max_workers=3)
    assert worker.is_running()
    assert worker.capabilities == ("one", "two")
    ids = [bench.platform.submit(name, None) for name in ("one", "two") for _ in range(20)]
    wait_idle(worker)
    assert [bench.platform.task(task_id)["output"] for task_id in ids] == [1] * 20 + [2] * 20
    bench.close()
    bench.close()
    assert not worker.is_running()
    assert client_threads() == []


def test_workers_of_different_agents(bench: Workbench) -> None:
    """wait_idle looks at the tasks of the worker's own agent."""
    worker = bench.worker({"work": lambda ctx, input: 1}, agent_id="one")
    bench.platform.create_install_token("two")
    bench.platform.submit("work", None, "two")
    bench.platform.submit("work", None, "one")
    wait_idle(worker)
    assert worker.stats().completed == 1


def test_what_is_left_is_told(bench: Workbench) -> None:
    """A wait that is in vain says what it waited for."""
    begun = threading.Event()

    def work(ctx: Any, input: Any) -> None:
        begun.set()
        ctx.wait_cancelled(GUARD)

    worker = bench.worker({"work": work})
    task_id = bench.platform.submit("work", None)
    other = bench.platform.submit("other", None)
    assert begun.wait(GUARD)
    with pytest.raises(TimeoutError) as caught:
        wait_idle(worker, 0.05)
    assert str(caught.value) == (
        f"after 0.05 s there are still queued task {other} (other), assigned task {task_id} (work), 1 running"
    )
    worker.stop(0)


def test_without_a_platform(scripted: Scripted, worker_of: Any) -> None:
    """Of a worker on any platform, what it knows itself is waited for: results that are not delivered yet."""
    taken = threading.Event()
    scripted.on["complete"] = lambda request: (200, {}) if taken.is_set() else (503, {})
    worker = worker_of(scripted)
    worker.on_task("echo", lambda ctx, input: input)
    worker.start()
    scripted.task("t-1")
    scripted.wait_for("complete", 2)
    with pytest.raises(TimeoutError, match="1 undelivered"):
        wait_idle(worker, 0.02)
    taken.set()
    wait_idle(worker, GUARD)
    assert worker.stats().undelivered == 0


def test_audit_events_are_waited_for(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The events of a worker's SDK are there when nothing is left to do."""
    from sekuire import SekuireSDK

    for name, value in bench.environment().items():
        monkeypatch.setenv(name, value)
    worker = SekuireSDK.from_env().create_task_worker()
    worker.on_task("work", lambda ctx, input: 1)
    with worker:
        task_id = bench.platform.submit("work", None)
        wait_idle(worker, platform=bench.platform)
        assert bench.platform.logs("tool_execution")[0]["event_data"]["task_id"] == task_id
        assert bench.platform.task(task_id)["agent_id"] == AGENT
        monkeypatch.setattr(worker.audit, "flush", lambda timeout: False)
        with pytest.raises(TimeoutError, match="audit events"):
            wait_idle(worker)
    assert worker.sdk is not None
    worker.sdk.shutdown()


# -- the plugin -------------------------------------------------------------------------------------------------------


def run_pytest(folder: pathlib.Path, code: str, *args: str) -> str:
    (folder / "test_it.py").write_text(code)
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *args, "test_it.py"],
        cwd=folder, capture_output=True, text=True, timeout=GUARD, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


@pytest.mark.slow
def test_the_fixtures(tmp_path: pathlib.Path) -> None:
    """The plugin gives platform, workers and environment, each test its own, and stops what it started."""
    code = """
import os, threading
import pytest
from sekuire import SekuireSDK
from sekuire.testing import wait_idle

urls = set()

@pytest.fixture
def sekuire_platform_options():
    return {"workspace_id": "ws_mine"}

@pytest.mark.parametrize("n", [1, 2])
def test_one(n, sekuire_platform, sekuire_worker):
    worker = sekuire_worker({"double": lambda ctx, input: 2 * input})
    task_id = sekuire_platform.submit("double", n)
    wait_idle(worker)
    assert sekuire_platform.task(task_id)["output"] == 2 * n
    assert sekuire_platform.installations()[0]["workspace_id"] == "ws_mine"
    assert len(sekuire_platform.installations()) == 1

def test_environment(sekuire_environment, sekuire_platform):
    with SekuireSDK.from_env() as sdk:
        assert sdk.is_connected()
    assert sekuire_environment["SEKUIRE_API_URL"] == sekuire_platform.url == os.environ["SEKUIRE_API_URL"]

def test_nothing_is_left():
    assert "SEKUIRE_API_URL" not in os.environ
    assert [one.name for one in threading.enumerate() if one.name.startswith("sekuire-")] == []
"""
    assert "4 passed" in run_pytest(tmp_path, code)


@pytest.mark.slow
def test_the_plugin_costs_nothing(tmp_path: pathlib.Path) -> None:
    """A run of pytest that uses no fixture of the plugin imports nothing of the library."""
    code = """
import sys

def test_it(pytestconfig):
    assert pytestconfig.pluginmanager.has_plugin("sekuire")
    assert [name for name in sys.modules if name.split(".")[0] in ("sekuire", "requests", "flask")] == []
"""
    # A plugin of another package imports requests.
    assert "1 passed" in run_pytest(tmp_path, code, "-p", "no:requests_mock")


@pytest.mark.slow
def test_without_the_extra(tmp_path: pathlib.Path) -> None:
    """Where the local platform cannot run, a test that needs it says what to install; others run."""
    code = """
import importlib.util
import pytest
from sekuire import TaskRegistry
from sekuire.testing import run_task

find = importlib.util.find_spec

@pytest.fixture(autouse=True)
def no_flask(monkeypatch):
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name in ("flask", "cheroot") else find(name, *more)
    )

def test_one_handler():
    tasks = TaskRegistry()
    tasks.task("double", lambda ctx, input: 2 * input)
    assert run_task(tasks, "double", 2).output == 4

def test_platform(request):
    with pytest.raises(Exception, match=r"pip install 'sekuire\\[local\\]'"):
        request.getfixturevalue("sekuire_platform")
"""
    assert "2 passed" in run_pytest(tmp_path, code)


# -- approvals --------------------------------------------------------------------------------------------------------


def approved_tasks() -> TaskRegistry:
    tasks = TaskRegistry()

    @tasks.task("pay")
    def pay(ctx: TaskContext, input: Any) -> Any:
        decision = ctx.require_approval("pay", input)
        return [decision.status, threading.current_thread() is threading.main_thread()]

    @tasks.task("pay async")
    async def pay_async(ctx: TaskContext, input: Any) -> Any:
        return (await ctx.require_approval_async("pay", input)).status

    return tasks


@pytest.mark.parametrize("capability", ["pay", "pay async"])
def test_approvals_are_denied_by_default(capability: str) -> None:
    """A test says who approves; without that nobody does."""
    result = run_task(approved_tasks(), capability, {"amount": 5})
    assert result.error is not None
    assert result.error.code == "approval_denied"
    assert [(one.kind, one.name, one.details) for one in result.approvals] == [("action", "pay", {"amount": 5})]


def test_approvals_of_a_test() -> None:
    """True approves all, a function decides on each, and its errors deny."""
    tasks = approved_tasks()
    assert run_task(tasks, "pay", {"amount": 5}, approve=True).output == ["approved", True]
    assert run_task(tasks, "pay async", approve=True).output == "approved"
    small = lambda request: request.details["amount"] < 10  # noqa: E731
    assert run_task(tasks, "pay", {"amount": 5}, approve=small).status == "completed"
    assert run_task(tasks, "pay", {"amount": 50}, approve=small).status == "failed"
    assert run_task(tasks, "pay", {}, approve=small).status == "failed"
    assert run_task(tasks, "pay", {}, approve=lambda request: 1).status == "failed"
    with pytest.raises(ConfigurationError, match="approve"):
        run_task(tasks, "pay", approve="yes")  # type: ignore[arg-type]


@pytest.mark.parametrize("approves", [True, False])
def test_approvals_that_a_policy_wants(tmp_path: Any, approves: bool) -> None:
    """The gate before the handler is the same, and the handler runs in the test's thread."""
    path = tmp_path / "policy.json"
    path.write_text('{"agent": {"capabilities": {"require_approval": ["where"], "require_tool_approval": true}}}')
    tasks = TaskRegistry()

    @tasks.task("where")
    def where(ctx: TaskContext, input: Any) -> Any:
        ctx.policy.enforce_tool("search")
        return threading.current_thread() is threading.main_thread()

    with PolicyGateway.from_file(path) as gateway:
        result = run_task(tasks, "where", policy_gateway=gateway, approve=approves, tool="search")
    asked = [(one.kind, one.name) for one in result.approvals]
    if approves:
        assert result.output is True
        assert asked == [("capability", "where"), ("tool", "search")]
    else:
        assert result.error is not None
        assert result.error.code == "approval_denied"
        assert asked == [("capability", "where")]
