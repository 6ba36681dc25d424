"""Handlers in other processes: the same contract as in a thread, and what becomes of a task whose process is lost."""

from __future__ import annotations

import concurrent.futures
import contextvars
import datetime as dt
import logging
import multiprocessing
import os
import pathlib
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import Executor
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import pytest

from sekuire import ProcessExecutor, RemoteExecutor, RemoteTaskContext, TaskContext, TaskRegistry, Worker
from sekuire._internal.threads import is_in_executor
from sekuire.config import WorkerConfig
from sekuire.errors import ConfigurationError, PolicyViolationError, TaskError
from sekuire.executors.backends import WITHDRAWN, ClaimedFlag, FileFlag, is_remote
from sekuire.executors.process import load_error
from sekuire.executors.remote import RemoteControl, carrier_of, run_remote
from sekuire.handlers.context import control_of
from sekuire.policy import Policy, PolicyEnforcer

from ..conftest import AGENT
from ..support import elsewhere
from ..support.builders import context_of, task_of
from ..support.scripted import Scripted
from ..support.waiting import GUARD, until

Make = Callable[..., Worker]
SPAWN = multiprocessing.get_context("spawn")
FORKING = concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork"))


@pytest.fixture(scope="module")
def processes() -> Iterator[ProcessExecutor]:
    """Two processes, made before the first test."""
    with ProcessExecutor(2, kill_after=0.1) as executor:
        list(executor.map(elsewhere.square, range(2)))
        yield executor


@pytest.fixture
def make(worker_of: Make, processes: ProcessExecutor) -> Make:
    """Workers whose handlers are those of tests/support/elsewhere.py, in processes."""

    def make(platform: Any, **options: Any) -> Worker:
        worker = worker_of(platform, **{"executor": processes, "max_workers": 2, **options})
        worker.include(elsewhere.tasks)
        return worker

    return make


@pytest.fixture
def flags(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """The directory in which the files for cancellations are made."""
    path = tmp_path / "flags"
    path.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(path))
    return path


def ended(platform: Any, capability: str, input: Any, **fields: Any) -> Dict[str, Any]:
    # Longer than any other wait: what runs it may have to be started first, on a machine that has much to do.
    task: Dict[str, Any] = platform.wait(platform.submit(capability, input, AGENT, **fields), 4 * GUARD)
    return task


def remote_of(context: TaskContext, flag: Optional[FileFlag] = None) -> RemoteTaskContext:
    """Make the context that the handler gets in another process."""
    return RemoteTaskContext(RemoteControl.of(context, flag or FileFlag()))


def lines_of(path: pathlib.Path) -> List[str]:
    return path.read_text().split("\n")[:-1] if path.exists() else []


def test_typed_handlers(platform: Any, make: Make) -> None:
    """Input and result are built in the other process, and a mismatch is reported as from a thread."""
    with make(platform):
        output = ended(platform, "sum", {"numbers": [1, 2], "by": "ada"})["output"]
        assert (output["sum"], output["built"]) == (3, {"numbers": [1], "by": "ada"})
        assert output["pid"] != os.getpid()
        error = ended(platform, "sum", {"numbers": ["x"]})["error"]
        assert (error["code"], error["retryable"]) == ("invalid_task", False)
        assert error["message"] == "input.numbers[0]: expected an integer, got a string"
        assert error["details"]["problems"][0]["path"] == "input.numbers[0]"


def test_the_context(scripted: Scripted, make: Make) -> None:
    """The handler's context says what the worker's does, with time left on the clock of its own process."""
    with make(scripted):
        scripted.send("task", {"task_id": "t/1", "capability": "facts", "tool": "hammer", "requester_agent_id": "r",
                               "workspace_id": "ws", "parent_task_id": "p", "workflow_id": "w", "trace_id": "tr",
                               "attempt": 4, "timeout_ms": 50_000, "input": [1]})  # fmt: skip
        found = scripted.wait_for("complete")[0].json["output"]
    left, deadline = found.pop("remaining"), dt.datetime.fromisoformat(found.pop("deadline"))
    assert 0 < left <= 50
    assert dt.timedelta(0) < deadline - dt.datetime.now(dt.timezone.utc) <= dt.timedelta(seconds=50)
    assert found == {
        "kind": "RemoteTaskContext", "is_a": True, "task_id": "t/1", "capability": "facts", "tool": "hammer",
        "workspace_id": "ws", "requester_id": "r", "parent_task_id": "p", "workflow_id": "w", "trace_id": "tr",
        "attempt": 4, "is_cancelled": False, "reason": None, "input": [1], "waited": False,
        "repr": "<RemoteTaskContext t/1 facts attempt 4>",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("how", "code", "message", "retryable"),
    [
        ("own", "own", "said", True),
        ("odd", "handler_error", "Odd: 1 and 2", False),
        ("exit", "handler_error", "SystemExit: 3", False),
        ("ctrl-c", "worker_shutdown", "Ctrl-C ended the task in its process", True),
        ("local", "handler_error", "Local: of no module", False),
        ("plain", "handler_error", "ValueError: plain", False),
        ("result", "result_not_serializable",
         "the handler's result cannot be sent back by its process (RuntimeError: not this one)", False),
    ],
)  # fmt: skip
def test_failures(
    platform: Any, make: Make, monkeypatch: pytest.MonkeyPatch, how: str, code: str, message: str, retryable: bool
) -> None:
    """What a handler raises there is the failure that it would be here."""
    monkeypatch.setattr(logging.getLogger("sekuire.task"), "disabled", True)
    with make(platform):
        error = ended(platform, "fail", how)["error"]
    assert (error["code"], error["message"], error["retryable"]) == (code, message, retryable)
    assert error.get("details") == ({"x": 1} if how == "own" else None)


def test_signals_of_the_terminal(platform: Any, make: Make) -> None:
    """Ctrl-C, a closed terminal and a SIGTERM to the whole group do not end a handler: the worker decides."""
    with make(platform):
        assert ended(platform, "fail", "interrupt")["output"] == "still here"


def test_middleware_stays_here(platform: Any, make: Make) -> None:
    """Middleware runs in the task's thread of the worker, around the wait: it may change input, result and error."""
    worker = make(platform)
    user: contextvars.ContextVar[str] = contextvars.ContextVar("user")
    seen: List[Any] = []

    @worker.middleware
    def outer(ctx: TaskContext, input: Any, call_next: Any) -> Any:
        user.set("ada")
        try:
            return {"result": call_next({"numbers": [1, 2, 3]}), "user": user.get()}
        except ValueError as error:
            seen.append(str(error))
            raise KeyError("another") from error

    @worker.middleware
    def inner(ctx: TaskContext, input: Any, call_next: Any) -> Any:
        result = call_next(input if ctx.capability == "sum" else "plain")
        seen.append((os.getpid(), user.get(), result["sum"], result["built"]))
        return "changed"

    with worker:
        assert ended(platform, "sum", None)["output"] == {"result": "changed", "user": "ada"}
        assert ended(platform, "fail", None)["error"]["message"] == "KeyError: 'another'"
    assert seen == [(os.getpid(), "ada", 6, elsewhere.Sum([1])), "plain"]


def test_the_gate_is_before(platform: Any, worker_of: Make) -> None:
    """A task that the policy denies is never given to the executor."""

    class Gateway:
        def check_request(self) -> None: ...

        def check_capability(self, name: str) -> None:
            raise PolicyViolationError("capability.not_allowed", "no")

        def on_heartbeat_response(self, reply: Any) -> None: ...

    executor = ProcessExecutor(1)
    worker = worker_of(platform, executor=executor, max_workers=1, policy_gateway=Gateway())
    worker.include(elsewhere.tasks)
    with worker:
        assert ended(platform, "sum", {"numbers": []})["error"]["code"] == "policy_denied"
    assert repr(executor) == "<ProcessExecutor of 1, 0 running>"


class OnePolicy:
    """A gateway with one policy."""

    def __init__(self, content: Any) -> None:
        self.violations: List[str] = []
        self.enforcer: Any = PolicyEnforcer(
            Policy.from_content(content, version=7), on_violation=lambda error: self.violations.append(str(error))
        )

    def check_request(self) -> None: ...

    def check_capability(self, name: str) -> None: ...

    def check_task(self, capability: str) -> Any:
        return self.enforcer

    def on_heartbeat_response(self, reply: Any) -> None: ...


def test_the_policy_is_there_too(platform: Any, make: Make) -> None:
    """ctx.policy decides in the other process as it does here, and what it refuses is reported here."""
    gateway = OnePolicy(
        {"permissions": {"tools": {"blocked_tools": ["knife"]}}, "rate_limits": {"tokens": {"max_per_minute": 9}}}
    )
    with make(platform, policy_gateway=gateway):
        for _ in range(2):
            output = ended(platform, "use tools", ["knife", "spoon"])["output"]
            assert output == {"said": [False, True], "version": 7, "same": True}
        error = ended(platform, "use tools", ["spoon", "knife"])["error"]
        assert (error["code"], error["details"]) == ("policy_denied", {"rule": "tool.blocked"})
        # What is counted in this process cannot be counted there: it is refused, never let pass.
        said = ended(platform, "use tools", ["rate"])["output"]["said"][1]
        assert said.startswith("policy.unavailable: ")
        assert "storage_uri" in said
    assert len([one for one in gateway.violations if one.startswith("tool.blocked: ")]) == 4


def test_an_enforcer_that_cannot_travel(platform: Any, make: Make) -> None:
    """Where a gateway's enforcer cannot be sent, asking it is refused; a handler that does not ask runs."""
    gateway = OnePolicy({})
    gateway.enforcer = elsewhere.Unpicklable()
    gateway.enforcer.policy = None
    with make(platform, policy_gateway=gateway):
        assert ended(platform, "use tools", ["spoon"])["error"]["code"] == "policy_unavailable"
        assert ended(platform, "sum", {"numbers": [5]})["output"]["sum"] == 5


# -- lost processes ---------------------------------------------------------------------------------------------------


def test_a_killed_process(platform: Any, make: Make, tmp_path: pathlib.Path) -> None:
    """SIGKILL in mid-task: that task fails, retryably, once; the other one goes on; the next gets a new process."""
    stays = tmp_path / "stays"
    with make(platform) as worker:
        other = platform.submit("hang", {"path": str(stays), "until": "gone"}, AGENT)
        until(lambda: lines_of(stays))
        task_id = platform.submit("hang", {"path": str(tmp_path / "dies"), "until": "killed"}, AGENT)
        until(lambda: lines_of(tmp_path / "dies"))
        os.kill(int(lines_of(tmp_path / "dies")[0]), signal.SIGKILL)
        error = platform.wait(task_id, GUARD)["error"]
        assert (error["code"], error["retryable"]) == ("handler_error", True)
        assert error["message"] == (
            "the handler's process was lost: the process that ran the call was ended by SIGKILL"
        )
        assert ended(platform, "sum", {"numbers": [5]})["output"]["sum"] == 5
        stays.unlink()
        assert platform.wait(other, GUARD)["output"] == "let go"
        assert worker.stats().overdue == 0
    assert len(lines_of(tmp_path / "dies")) == 1


def test_a_handler_that_ignores_the_end_of_its_time(
    platform: Any, make: Make, tmp_path: pathlib.Path, flags: pathlib.Path
) -> None:
    """It is answered timeout, and its process is killed after kill_after: no overdue handler is left."""
    path = tmp_path / "pid"
    with make(platform) as worker:
        error = ended(platform, "hang", {"path": str(path), "until": "killed"}, timeout_ms=500)["error"]
        assert error["code"] == "timeout"
        until(lambda: worker.stats().overdue == 0)
        assert ended(platform, "sum", {"numbers": [5]})["output"]["sum"] == 5
    assert list(flags.iterdir()) == []


def test_a_stop_kills_what_does_not_end(platform: Any, make: Make, tmp_path: pathlib.Path) -> None:
    """At the end of its time to stop, the worker answers worker_shutdown, and the process is killed."""
    path = tmp_path / "pid"
    worker = make(platform)
    worker.start()
    task_id = platform.submit("hang", {"path": str(path), "until": "killed"}, AGENT)
    until(lambda: lines_of(path))
    worker.stop(0.2)
    assert platform.wait(task_id, GUARD)["error"]["code"] == "worker_shutdown"
    until(lambda: worker.stats().overdue == 0)


def test_a_cancellation_is_seen(platform: Any, make: Make, tmp_path: pathlib.Path, flags: pathlib.Path) -> None:
    """A command that terminates the worker reaches the handler, with its reason, and leaves no file behind."""
    path = tmp_path / "pid"
    worker = make(platform)
    with worker:
        task_id = platform.submit("hang", {"path": str(path), "until": "cancelled"}, AGENT)
        until(lambda: lines_of(path))
        assert list(flags.iterdir()) == []
        platform.command(platform.installations()[0]["installation_id"], "terminate", "enough")
        assert platform.wait(task_id, GUARD)["error"]["code"] == "worker_terminated"
        assert worker.wait(GUARD)
    assert lines_of(path)[1] == "terminated"
    assert list(flags.iterdir()) == []


def test_a_task_that_waits_in_the_executor(
    platform: Any, make: Make, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With more max_workers than processes there is a warning, and a task cancelled in the queue has not begun."""
    paths = [tmp_path / f"{number}" for number in range(3)]
    worker = make(platform, max_workers=3)
    with worker:
        tasks = [platform.submit("hang", {"path": str(path), "until": "cancelled"}, AGENT) for path in paths]
        until(lambda: sum(bool(lines_of(path)) for path in paths) == 2 and worker.stats().running == 3)
        platform.command(platform.installations()[0]["installation_id"], "terminate")
        errors = [platform.wait(task_id, GUARD)["error"] for task_id in tasks]
        assert worker.wait(GUARD)
    assert [(error["code"], error["retryable"]) for error in errors] == [("worker_terminated", True)] * 3
    assert sum(path.exists() for path in paths) == 2
    assert any("give max_workers=2" in record.getMessage() for record in caplog.records)


@pytest.fixture(params=["ours", "standard"])
def pool(request: pytest.FixtureRequest, processes: ProcessExecutor) -> Iterator[Tuple[Executor, int]]:
    """A pool of two processes, and the number of tasks for it: some of them wait within the pool."""
    if request.param == "ours":
        yield processes, 4
        return
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=SPAWN) as executor:
        # It holds one more than it runs in a pipe, where nothing can be cancelled.
        yield executor, 6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("order", "code"), [("pause", "worker_paused"), ("terminate", "worker_terminated"), ("stop", None)]
)
def test_what_waits_inside_a_pool_has_not_begun(
    platform: Any,
    make: Make,
    pool: Tuple[Executor, int],
    tmp_path: pathlib.Path,
    flags: pathlib.Path,
    order: str,
    code: Optional[str],
) -> None:
    """It is answered or given back at once, and never begins; what runs goes on."""
    executor, count = pool
    paths = [tmp_path / f"{number}" for number in range(count)]
    worker = make(platform, executor=executor, max_workers=count)
    with worker:
        tasks = [platform.submit("hang", {"path": str(path), "until": "gone"}, AGENT) for path in paths]
        until(lambda: sum(bool(lines_of(path)) for path in paths) == 2 and worker.stats().running == count)
        begun = {one for one, path in zip(tasks, paths) if lines_of(path)}
        if order == "stop":
            worker.request_stop()
            until(lambda: sum(platform.task(one)["status"] == "queued" for one in tasks) == count - 2)
        else:
            platform.command(platform.installations()[0]["installation_id"], order)
            for one in set(tasks) - begun:
                task = platform.wait(one, GUARD)
                assert (task["error"]["code"], task["error"]["retryable"]) == (code, True)
                assert platform.completions(one)[-1][1]["execution_time_ms"] == 0
        assert {platform.task(one)["status"] for one in begun} == {"assigned"}
        assert worker.stats().running == 2
        for path in paths:
            path.unlink(missing_ok=True)
        for one in begun:
            assert platform.wait(one, GUARD)["output"] == "let go"
        # Those that came after in the pool's queue have been passed over.
        assert executor.submit(elsewhere.square, 3).result(GUARD) == 9
    assert not any(path.exists() for path in paths)
    until(lambda: list(flags.iterdir()) == [])


def test_a_claim_is_made_once(flags: pathlib.Path) -> None:
    """Either the worker takes a call back, or the process begins it."""
    for first, second in (("withdraw", "begin"), ("begin", "withdraw")):
        flag = ClaimedFlag()
        there = pickle.loads(pickle.dumps(flag))
        calls = {"withdraw": flag.withdraw, "begin": there.begin}
        assert calls[first]() == {"withdraw": True, "begin": ""}[first]
        assert calls[second]() == {"withdraw": False, "begin": WITHDRAWN}[second]
        flag.lower()
    assert list(flags.iterdir()) == []
    flags.rmdir()
    assert not ClaimedFlag().withdraw()
    assert ClaimedFlag().begin() == ""


def test_a_coroutine_in_another_process(platform: Any, make: Make, tmp_path: pathlib.Path) -> None:
    """It is cancelled with its task."""
    path = tmp_path / "pid"
    with make(platform) as worker:
        error = ended(platform, "sleep", {"path": str(path)}, timeout_ms=500)["error"]
        assert error["code"] == "timeout"
        until(lambda: lines_of(path)[1:] == ["timeout"])
        until(lambda: worker.stats().overdue == 0)


def test_an_error_that_another_process_has_wrapped(platform: Any, make: Make) -> None:
    """What the handler said arrives, though the cause of an error is not pickled with it."""
    with make(platform):
        error = ended(platform, "fail", "wrapped")["error"]
    assert (error["code"], error["retryable"], error["details"]) == ("own", True, {"x": 1})


def test_progress(scripted: Scripted, make: Make) -> None:
    """From a ProcessExecutor, report_progress reaches the platform."""
    with make(scripted):
        scripted.task("t1", "progress")
        assert scripted.wait_for("progress")[0].json == {"progress": 0.5, "message": "half"}
        assert scripted.completion("t1")["output"] is None


def test_a_thread_that_a_handler_leaves_behind(scripted: Scripted, worker_of: Make, tmp_path: pathlib.Path) -> None:
    """What it reports costs the next task of its process nothing, and does not count as that task's progress."""
    path = tmp_path / "reports"
    with ProcessExecutor(1) as executor:
        worker = worker_of(scripted, executor=executor, max_workers=1)
        worker.include(elsewhere.tasks)
        with worker:
            scripted.task("t1", "leave a thread", str(path))
            assert scripted.completion("t1")["status"] == "completed"
            known = path.stat().st_size
            # Longer than the pause between two reports that a process sends.
            until(lambda: path.stat().st_size >= known + 15)
            scripted.task("t2", "sum", {"numbers": [1, 2]})
            assert scripted.completion("t2")["status"] == "completed"
            assert all(request.task_id == "t1" for request in scripted.of("progress"))
        executor.kill_workers()


# -- other executors --------------------------------------------------------------------------------------------------


def test_a_pool_of_the_standard_library(
    platform: Any, worker_of: Make, tmp_path: pathlib.Path, flags: pathlib.Path
) -> None:
    """A ProcessPoolExecutor serves; once a process of it was killed it accepts no more, and tasks say so, retryably."""
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=SPAWN) as pool:
        assert pool.submit(elsewhere.square, 2).result(GUARD) == 4
        worker = worker_of(platform, executor=RemoteExecutor(pool), max_workers=1)
        worker.include(elsewhere.tasks)
        with worker:
            assert ended(platform, "sum", {"numbers": [1, 2]})["output"]["sum"] == 3
            assert ended(platform, "progress", None)["status"] == "completed"
            path = tmp_path / "pid"
            error = ended(platform, "hang", {"path": str(path), "until": "cancelled"}, timeout_ms=500)["error"]
            assert error["code"] == "timeout"
            until(lambda: worker.stats().overdue == 0)
            assert lines_of(path)[1] == "timeout"
            error = ended(platform, "die", None)["error"]
            assert (error["code"], error["retryable"]) == ("handler_error", True)
            assert "lost: BrokenProcessPool: " in error["message"]
            error = ended(platform, "sum", {"numbers": [1, 2]})["error"]
            assert (error["code"], error["retryable"]) == ("worker_shutdown", True)
    assert list(flags.iterdir()) == []


def test_which_executors_are_remote() -> None:
    """Pools of processes are known as such, threads are not, and anything else says so itself."""
    pool = concurrent.futures.ProcessPoolExecutor(1, mp_context=SPAWN)
    threads = concurrent.futures.ThreadPoolExecutor(1)
    assert [is_remote(one) for one in (pool, ProcessExecutor(1), RemoteExecutor(threads))] == [True] * 3
    assert [is_remote(one) for one in (threads, None)] == [False] * 2
    with pytest.raises(ConfigurationError, match=r"must be a concurrent\.futures\.Executor, got int"):
        RemoteExecutor(5)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="must not fork"):
        WorkerConfig(agent_id="a", executor=RemoteExecutor(FORKING))
    RemoteExecutor(threads).shutdown()
    with pytest.raises(RuntimeError):
        threads.submit(len, "")
    pool.shutdown()


def test_a_handler_that_cannot_travel(scripted: Scripted, worker_of: Make) -> None:
    """A handler that pickle refuses is a ConfigurationError at start(), which names its place."""

    def local(ctx: Any, input: Any) -> None: ...

    for function in (local, lambda ctx, input: None):
        tasks = TaskRegistry()
        tasks.task("echo", function)
        worker = worker_of(scripted, executor=ProcessExecutor(1), max_workers=1)
        worker.include(tasks)
        with pytest.raises(ConfigurationError) as caught:
            worker.start()
        assert str(caught.value).startswith("on_task('echo'): test_a_handler_that_cannot_travel.<locals>.")
        assert f"({__file__}:" in str(caught.value)
        assert "a handler must be a function at the top level of a module" in str(caught.value)
        assert not worker.is_running()


def test_an_executor_that_gives_a_call_up(platform: Any, worker_of: Make) -> None:
    """A future that somebody cancels, or that ends with an error of the executor's own, is a retryable failure."""

    class GivesUp(concurrent.futures.Executor):
        def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
            future: concurrent.futures.Future[Any] = concurrent.futures.Future()
            future.cancel()
            return future

    worker = worker_of(platform, executor=RemoteExecutor(GivesUp()))
    worker.include(elsewhere.tasks)
    with worker:
        error = ended(platform, "sum", {"numbers": []})["error"]
    assert (error["code"], error["retryable"]) == ("handler_error", True)
    assert error["message"] == "the handler's process was lost: the executor has given the call up"


def test_a_flag_that_cannot_be_raised(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a place for its file a cancellation is not seen there, and the log says so."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "no such directory"))
    flag = FileFlag()
    flag.raise_("enough")
    assert flag.read() is None
    flag.lower()
    assert any("cannot be notified of its cancellation" in record.getMessage() for record in caplog.records)


def test_a_task_that_is_cancelled_before_its_process_has_it() -> None:
    """A call that comes to a process after its task was cancelled does not begin."""
    late = TaskContext(task_of(), deadline=0.0)
    context = remote_of(late)
    code = pickle.dumps((elsewhere.fail, None))
    kind, value, _ = pickle.loads(run_remote(pickle.dumps((code, context, "own"))))
    error = load_error(value)
    assert kind == "raised"
    assert isinstance(error, TaskError)
    assert (error.code, error.retryable) == ("worker_shutdown", True)
    assert error.message == "cancelled before the task began (timeout)"
    # This process is the worker's own, and may go on starting others.
    assert not is_in_executor()


def until_cancelled(ctx: TaskContext, input: Any) -> None:
    ctx.wait_cancelled(GUARD)
    ctx.raise_if_cancelled()


@pytest.mark.parametrize("left", [0.0, 0.1])
def test_a_process_that_sees_the_end_of_the_time_first(left: float) -> None:
    """The task fails as timeout, also if the worker's timer has not come to it: before the handler began, or after."""
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        carrier = carrier_of(WorkerConfig(agent_id="a", executor=RemoteExecutor(threads)))
        assert carrier is not None
        context = TaskContext(task_of(), deadline=time.monotonic() + left)
        with pytest.raises(TaskError) as caught:
            carrier.carry("echo", until_cancelled, None)(context, None)
    assert (caught.value.code, caught.value.retryable) == ("timeout", True)


def test_an_input_that_cannot_travel(platform: Any, make: Make) -> None:
    """What a middleware puts in place of the input must be picklable, or the task fails and says so."""
    worker = make(platform)
    worker.middleware(lambda ctx, input, call_next: call_next(lambda: None))
    with worker:
        error = ended(platform, "sum", None)["error"]
    assert error["code"] == "handler_error"
    assert "the input cannot be sent to the handler's process" in error["message"]


# -- the context, alone -----------------------------------------------------------------------------------------------


def test_a_context_travels_further() -> None:
    """A context may be sent on; there, too, its time ends, and it is cancelled by that."""
    context = remote_of(context_of("t1", "echo", input=5))
    again = pickle.loads(pickle.dumps(context))
    assert (again.task_id, again.remaining(), again.deadline, again.cancel_reason) == ("t1", None, None, None)
    assert control_of(again).task.input is None
    late = TaskContext(task_of(), deadline=0.0)
    context = remote_of(late)
    assert (context.remaining(), context.cancel_reason, context.wait_cancelled()) == (0.0, "timeout", True)


def test_the_workers_death_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A handler whose worker has died sees it in its context."""
    flag = FileFlag()
    context = remote_of(context_of(), flag)
    monkeypatch.setattr(os, "getppid", os.getpid)
    assert flag.begin() == ""
    assert not context.is_cancelled()
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert context.cancel_reason == "the worker died"


# -- programs ---------------------------------------------------------------------------------------------------------

MODULE = """
import sys
sys.path[:0] = {path!r}
from sekuire import ProcessExecutor, create_worker

executor = ProcessExecutor(1)
worker = create_worker(api_base_url={url!r}, agent_id={agent!r}, install_token={token!r}, executor=executor,
                       max_workers=1, outbox="outbox.db", shutdown_timeout=10.0)

@worker.on_task("echo")
def echo(ctx, input):
    return input
"""


def program_of(platform: Any) -> str:
    token = platform.create_install_token(AGENT)
    return MODULE.format(path=sys.path, url=platform.url, agent=AGENT, token=token)


@pytest.mark.slow
def test_a_program_whose_main_module_is_guarded(platform: Any, tmp_path: pathlib.Path) -> None:
    """Worker, outbox and handlers in one module, started under __main__: processes import it without starting it."""
    text = program_of(platform) + "\nif __name__ == '__main__':\n    worker.start(block=True)\n"
    (tmp_path / "program.py").write_text(text)
    with subprocess.Popen([sys.executable, "program.py"], cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            task = ended(platform, "echo", "hello")
        finally:
            process.terminate()
        assert process.wait(4 * GUARD) == 0, process.stderr.read()
    assert task["output"] == "hello"


@pytest.mark.slow
def test_a_program_whose_main_module_is_not_guarded(platform: Any, tmp_path: pathlib.Path) -> None:
    """Without the guard no second worker starts: the task fails, and the error output says how to fix it."""
    (tmp_path / "program.py").write_text(program_of(platform) + "\nworker.start(block=True)\n")
    with subprocess.Popen([sys.executable, "program.py"], cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            error = ended(platform, "echo", "hello")["error"]
        finally:
            process.terminate()
        said = process.stderr.read()
        assert process.wait(4 * GUARD) == 0
    assert (error["code"], error["retryable"]) == ("handler_error", True)
    assert "before it could run the call" in error["message"]
    assert "start it under `if __name__ == '__main__':`" in said
    assert len(platform.installations()) == 1
