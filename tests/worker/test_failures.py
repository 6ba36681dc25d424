"""Every failure code of the contract, as the platform gets it."""

from __future__ import annotations

import contextvars
import dataclasses
import json
import logging
import math
import sys
import threading
import urllib.parse
from typing import Any, Callable, Dict, List

import pytest

from sekuire import TaskContext, TaskError, TaskRegistry, Worker
from sekuire._internal.threads import is_owned_by
from sekuire.errors import PolicyUnavailableError, PolicyViolationError
from sekuire.testing import run_task
from sekuire.transport.retry import Backoff

from ..conftest import AGENT
from ..support.gateway import FakeGateway
from ..support.scripted import Scripted
from ..support.waiting import GUARD, until

Make = Callable[..., Worker]


def failing(platform: Any, capability: str = "echo", input: Any = None, **fields: Any) -> Dict[str, Any]:
    """The error with which a task ends."""
    task = platform.wait(platform.submit(capability, input or {}, AGENT, **fields), GUARD)
    assert task["status"] == "failed", task
    return dict(task["error"])


def raising(error: BaseException) -> Callable[..., Any]:
    def handler(ctx: TaskContext, input: Any) -> Any:
        raise error

    return handler


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("bad input"), "ValueError: bad input"),
        (SystemExit(3), "SystemExit: 3"),
        (KeyboardInterrupt(), "KeyboardInterrupt: "),
        (MemoryError("much"), "MemoryError: much"),
        (RecursionError("deep"), "RecursionError: deep"),
        (GeneratorExit(), "GeneratorExit: "),
        (TaskError("", "no code"), "TaskError: : no code"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_whatever_a_handler_raises_is_a_handler_error(
    platform: Any, worker_of: Make, error: BaseException, message: str
) -> None:
    """Any exception, those that end a program included, fails its task and nothing else."""
    worker = worker_of(platform, max_workers=1)
    worker.on_task("echo", raising(error))
    worker.on_task("fine", lambda ctx, input: "still here")
    with worker:
        assert failing(platform) == {"code": "handler_error", "message": message, "retryable": False}
        assert platform.wait(platform.submit("fine", {}), GUARD)["output"] == "still here"
        assert (worker.stats().failed, worker.stats().completed) == (1, 1)


def test_a_real_recursion_error_is_a_handler_error(platform: Any, worker_of: Make) -> None:
    """A handler that recurses without end fails its task."""
    worker = worker_of(platform)

    def endless(ctx: Any, input: Any) -> Any:
        return endless(ctx, input)

    worker.on_task("echo", endless)
    with worker:
        assert failing(platform)["message"].startswith("RecursionError: ")


def test_an_exception_without_a_text_fails_its_task(platform: Any, worker_of: Make) -> None:
    """An exception whose text cannot be made is reported all the same."""

    class Mute(Exception):
        def __str__(self) -> str:
            raise SystemExit

    worker = worker_of(platform)
    worker.on_task("echo", raising(Mute()))
    with worker:
        assert failing(platform)["message"] == "Mute: (its text cannot be made)"


def test_expose_errors_false_tells_only_the_type(platform: Any, worker_of: Make) -> None:
    """With expose_errors=False the message stays in the log."""
    worker = worker_of(platform, expose_errors=False)
    worker.on_task("echo", raising(ValueError("internal")))
    with worker:
        assert failing(platform)["message"] == "ValueError"


def test_a_long_message_is_cut(platform: Any, worker_of: Make) -> None:
    """An unexpected exception's message has at most 1,000 characters on the wire."""
    worker = worker_of(platform)
    worker.on_task("echo", raising(ValueError("é" * 5000)))
    with worker:
        message = failing(platform)["message"]
    assert len(message) == 1000
    assert message == "ValueError: " + "é" * 988


def test_live_tokens_are_replaced_in_messages(scripted: Scripted, worker_of: Make) -> None:
    """A handler's exception that quotes a live token does not send it."""
    worker = worker_of(scripted)
    worker.on_task("echo", raising(ValueError("Bearer rt-1, then rf-1 and skt-1")))
    worker.on_task("own", raising(TaskError("own", "rt-1")))
    with worker:
        scripted.task("t1")
        assert scripted.completion("t1")["error"]["message"] == "ValueError: Bearer ***, then *** and ***"
        scripted.task("t2", "own")
        assert scripted.completion("t2")["error"]["message"] == "***"


def test_the_traceback_is_in_the_log_only(platform: Any, worker_of: Make, caplog: pytest.LogCaptureFixture) -> None:
    """The log has the full traceback of a handler's exception, and the task's id."""
    worker = worker_of(platform)
    worker.on_task("echo", raising(ValueError("bad")))
    with worker:
        task_id = platform.submit("echo", {})
        error = platform.wait(task_id, GUARD)["error"]
    assert "Traceback" not in str(error)
    (record,) = [record for record in caplog.records if record.name == "sekuire.task"]
    assert record.exc_info is not None
    assert record.task_id == task_id  # type: ignore[attr-defined]


def test_task_error_is_that_failure(platform: Any, worker_of: Make) -> None:
    """TaskError's own code, message, retryable and details are the task's failure."""
    worker = worker_of(platform)
    worker.on_task("echo", raising(TaskError("quota", "come back", retryable=True, details={"left": 0})))
    with worker:
        assert failing(platform) == {
            "code": "quota", "message": "come back", "retryable": True, "details": {"left": 0},
        }  # fmt: skip


def test_unknown_capability(scripted: Scripted, worker_of: Make) -> None:
    """A task for which there is no handler is answered unknown_capability."""
    worker = worker_of(scripted)
    worker.on_task("echo", lambda ctx, input: None)
    with worker:
        scripted.task("t1", "other")
        assert scripted.completion("t1")["error"] == {
            "code": "unknown_capability", "message": "no handler for 'other'", "retryable": False,
        }  # fmt: skip
        assert worker.stats().rejected == 1


def test_invalid_task_with_an_id_is_answered(scripted: Scripted, worker_of: Make) -> None:
    """A malformed task that has an id is answered invalid_task under its attempt, whatever is wrong with it."""
    worker = worker_of(scripted)
    worker.on_task("echo", lambda ctx, input: None)
    with worker:
        bad = [
            {"task_id": "t1"},
            {"id": "t2", "capability": 7, "attempt": 3},
            {"task_id": "t3", "capability": "echo", "timeout_ms": -1},
            {"task_id": "t4", "capability": "echo", "trace_id": 4},
            {"task_id": "t5", "capability": "echo", "attempt": 0},
        ]
        for task in bad:
            scripted.send("task", task)
        scripted.send("task", '{"task_id": "t6", "capability": "echo", "input": NaN}')
        scripted.send("message", {"id": "t7", "input": {}})
        for number in range(1, 8):
            assert scripted.completion(f"t{number}")["error"]["code"] == "invalid_task"
        assert scripted.completion("t2")["attempt"] == 3
        assert "timeout_ms" in scripted.completion("t3")["error"]["message"]
        scripted.task("t8")
        assert scripted.completion("t8")["status"] == "completed"


def test_invalid_task_without_an_id_is_counted(
    scripted: Scripted, worker_of: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """A malformed task without an id, and a command that cannot be read, are logged and counted."""
    worker = worker_of(scripted)
    worker.on_task("echo", lambda ctx, input: None)
    with worker:
        for data in ("no json", "[]", '{"task_id": "", "capability": "echo"}', '{"task_id": "a\\u0000"}'):
            scripted.send("task", data)
        scripted.send("command", {"type": "explode"})
        scripted.send("weather", "sunny")
        scripted.send("message", "chat")
        scripted.task("t1")
        assert scripted.completion("t1")["status"] == "completed"
        assert worker.stats().dropped == 5
        assert scripted.count("complete") == 1
    assert sum("cannot be read" in record.message for record in caplog.records) == 5


@pytest.mark.parametrize(
    ("error", "code", "retryable", "details"),
    [
        (PolicyViolationError("capability.blocked", "no"), "policy_denied", False, {"rule": "capability.blocked"}),
        (
            PolicyViolationError("rate_limit.requests_per_minute", "slow down", 2.5),
            "rate_limited",
            True,
            {"rule": "rate_limit.requests_per_minute", "retry_after": 2.5},
        ),
        (PolicyUnavailableError("no policy"), "policy_unavailable", True, None),
        (PolicyViolationError("policy.unavailable", "x"), "policy_unavailable", True, {"rule": "policy.unavailable"}),
        (RuntimeError("broken"), "policy_unavailable", True, None),
    ],
    ids=["denied", "limited", "unavailable", "no policy", "broken"],
)
def test_the_gateway_decides_before_the_handler(
    platform: Any, worker_of: Make, error: Exception, code: str, retryable: bool, details: Any
) -> None:
    """What the policy gateway refuses is answered with its code; the handler does not run."""
    ran = threading.Event()
    gateway = FakeGateway(error)
    worker = worker_of(platform, policy_gateway=gateway)
    worker.on_task("echo", lambda ctx, input: ran.set())
    with worker:
        answer = failing(platform)
        assert (answer["code"], answer["retryable"], answer.get("details")) == (code, retryable, details)
        assert worker.stats().rejected == 1
        gateway.error = None
        assert not ran.is_set()
        assert platform.wait(platform.submit("echo", {}), GUARD)["status"] == "completed"
    assert [call for call in gateway.calls if call != "heartbeat"] == ["request", "echo"] * 2
    assert "heartbeat" in gateway.calls


def test_an_exception_of_a_policy_inside_the_handler_is_its_code(platform: Any, worker_of: Make) -> None:
    """A violation that a handler lets pass is policy_denied too."""
    worker = worker_of(platform)
    worker.on_task("echo", raising(PolicyViolationError("tool.blocked", "no")))
    with worker:
        assert failing(platform)["code"] == "policy_denied"


@pytest.mark.parametrize("smallest", ["worker", "handler", "task"])
def test_timeout_is_the_smallest_of_three(platform: Any, worker_of: Make, smallest: str) -> None:
    """The smallest of task_timeout, on_task(timeout=) and timeout_ms ends the task and cancels its context."""
    times = {name: 0.05 if name == smallest else 60.0 for name in ("worker", "handler", "task")}
    seen = []
    worker = worker_of(platform, task_timeout=times["worker"])

    @worker.on_task("echo", timeout=times["handler"])
    def handler(ctx: TaskContext, input: Any) -> str:
        assert ctx.deadline is not None
        assert 0 <= (ctx.remaining() or 0) <= 0.05
        assert ctx.wait_cancelled(GUARD)
        seen.append(ctx.cancel_reason)
        return "late"

    with worker:
        error = failing(platform, timeout_ms=int(times["task"] * 1000))
        assert (error["code"], error["retryable"]) == ("timeout", True)
        until(lambda: worker.stats().overdue == 0 and seen == ["timeout"])
        assert (worker.stats().failed, worker.stats().completed) == (1, 0)


def test_cancelled(platform: Any, worker_of: Make) -> None:
    """A handler that gives up after a timeout has been answered changes nothing; one that raises it itself does."""
    from sekuire import TaskCancelled

    worker = worker_of(platform)
    worker.on_task("echo", raising(TaskCancelled("no more")))
    with worker:
        assert failing(platform) == {"code": "cancelled", "message": "no more", "retryable": False}


class Odd(dict):  # type: ignore[type-arg]
    def items(self) -> Any:
        raise SystemExit


def _loop() -> Any:
    loop: List[Any] = []
    loop.append(loop)
    return loop


def _deep() -> Any:
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    return deep


@pytest.mark.parametrize(
    "make",
    [
        lambda: math.nan, object, _loop, _deep, lambda: "\ud800", lambda: 1j, lambda: b"x", lambda: Odd(a=1),
        lambda: (i for i in ()),
    ],
    ids=["nan", "object", "loop", "deep", "surrogate", "complex", "bytes", "odd", "generator"],
)  # fmt: skip
def test_result_not_serializable(platform: Any, worker_of: Make, make: Callable[[], Any]) -> None:
    """A result without a JSON form fails its task, and says so."""
    worker = worker_of(platform)
    worker.on_task("echo", lambda ctx, input: make())
    with worker:
        error = failing(platform)
        assert (error["code"], error["retryable"]) == ("result_not_serializable", False)
        until(lambda: worker.stats().failed)
        assert worker.stats().completed == 0


@dataclasses.dataclass
class Row:
    when: Any


@pytest.mark.parametrize(
    ("result", "problem"),
    [
        ({"rows": [Row(b"x")]}, "output.rows[0].when is bytes; decode it"),
        (Row, "output is the class Row itself, not an instance of it; return Row(...)"),
        ([1.0, math.nan], "output[1] is nan, which JSON lacks"),
        ({"a b": math.inf}, "output['a b'] is inf"),
        (["\ud800"], "output[0] is a text with a lone surrogate"),
        ({"x": {(1, 2): 3}}, "output.x has a key of type tuple; use texts as keys"),
        ({"\ud800": 1}, "output has a key that is a text with a lone surrogate"),
        (_loop(), "contains itself"),
        (_deep(), "is nested too deep"),
        ({1, 1j}, "is of type complex; return"),
        ((i for i in ()), "output is a generator, which is read only once; return list(...)"),
        (map(str, []), "output is a map, which is read only once"),
        (len, "output is a function"),
        ({"n": 10**5000}, "output.n is an integer with too many digits"),
    ],
)
def test_where_a_result_has_no_json_form(result: Any, problem: str) -> None:
    """The failure names the capability, the place in the result and what to do."""
    if isinstance(result, dict) and "n" in result and not hasattr(sys, "get_int_max_str_digits"):
        pytest.skip("this Python writes integers of any size")
    tasks = TaskRegistry()
    tasks.task("summarize", lambda ctx, input: result)
    error = run_task(tasks, "summarize").error
    assert error is not None
    assert error.message.startswith("the handler's result has no JSON form: summarize: output")
    assert problem in error.message


def test_where_details_have_no_json_form() -> None:
    """So do the details of a TaskError."""
    tasks = TaskRegistry()
    tasks.task("summarize", raising(TaskError("own", details={"x": [object()]})))
    error = run_task(tasks, "summarize").error
    assert error is not None
    assert "summarize: error.details.x[0] is of type object; return" in error.message


class Unspeakable(ValueError):
    def __str__(self) -> str:
        raise RuntimeError("no text")


class Mute(Dict[str, Any]):
    def items(self) -> Any:
        raise Unspeakable


def test_a_result_whose_error_has_no_text(platform: Any, worker_of: Make) -> None:
    """Even that is told, and the next task of the handler runs."""
    worker = worker_of(platform)
    results: List[Any] = ["fine", {"key": Mute(a=1)}]
    worker.on_task("echo", lambda ctx, input: results.pop(), max_concurrency=1)
    with worker:
        assert failing(platform)["code"] == "result_not_serializable"
        assert platform.wait(platform.submit("echo", {}), GUARD)["output"] == "fine"


def test_details_without_a_json_form(platform: Any, worker_of: Make) -> None:
    """A TaskError whose details have no JSON form is result_not_serializable too."""
    worker = worker_of(platform)
    worker.on_task("echo", raising(TaskError("own", details={"x": object()})))
    with worker:
        assert failing(platform)["code"] == "result_not_serializable"


def test_result_too_large_by_the_option(platform: Any, worker_of: Make) -> None:
    """A result above max_result_bytes is not sent."""
    worker = worker_of(platform, max_result_bytes=2000)
    worker.on_task("echo", lambda ctx, input: "x" * input["size"])
    with worker:
        error = failing(platform, input={"size": 2001})
        assert error["code"] == "result_too_large"
        assert "max_result_bytes is 2000" in error["message"]
        assert platform.wait(platform.submit("echo", {"size": 1000}), GUARD)["status"] == "completed"


@pytest.mark.parametrize(
    ("status", "code"), [(413, "result_too_large"), (400, "result_rejected"), (422, "result_rejected")]
)
def test_a_refused_result_is_substituted_once(scripted: Scripted, worker_of: Make, status: int, code: str) -> None:
    """A result the platform refuses is replaced by a failure under a key of its own; once."""
    refused = (status, {"error": "bad", "message": "not like this"})
    scripted.on["complete"] = lambda request: refused if request.json["status"] == "completed" else (200, {})
    worker = worker_of(scripted)
    worker.on_task("echo", lambda ctx, input: "result")
    with worker:
        scripted.task("t1")
        first, second = until(lambda: len(scripted.completions("t1")) == 2 and scripted.completions("t1"))
        assert first.headers["Idempotency-Key"] == "t1:1"
        assert second.headers["Idempotency-Key"] == "t1:1:2"
        assert second.json["error"]["code"] == code
        assert "not like this" in second.json["error"]["message"]
        until(lambda: worker.stats().undelivered == 0)


def test_a_refused_substitute_is_kept(scripted: Scripted, worker_of: Make, caplog: pytest.LogCaptureFixture) -> None:
    """A substitute that is refused too is not replaced again: it is kept, and named when the worker stops."""
    scripted.on["complete"] = lambda request: (422, {"error": "bad", "message": "never"})
    worker = worker_of(scripted)
    worker.on_task("echo", lambda ctx, input: "result")
    worker.start()
    scripted.task("t1")
    until(lambda: len(scripted.completions("t1")) == 2)
    worker.stop()
    assert worker.stats().undelivered == 1
    assert {r.headers["Idempotency-Key"] for r in scripted.completions("t1")[1:]} == {"t1:1:2"}
    assert any("were not delivered" in record.message and "t1" in record.message for record in caplog.records)


def test_context_variables_do_not_leak(platform: Any, worker_of: Make) -> None:
    """What a handler sets in a context variable is gone for the next task of the same thread."""
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="clean")
    worker = worker_of(platform, max_workers=1)

    @worker.on_task("plain")
    def plain(ctx: Any, input: Any) -> str:
        before = variable.get()
        variable.set("dirty")
        return before

    @worker.on_task("async")
    async def coroutine(ctx: Any, input: Any) -> str:
        before = variable.get()
        variable.set("dirty")
        return before

    with worker:
        for capability in ("plain", "async", "plain", "async"):
            assert platform.wait(platform.submit(capability, {}), GUARD)["output"] == "clean"


def test_the_task_log_carries_the_id(platform: Any, worker_of: Make, caplog: pytest.LogCaptureFixture) -> None:
    """ctx.logger begins its lines with the task's id and gives it as an attribute."""
    caplog.set_level(logging.INFO, "sekuire.task")
    worker = worker_of(platform)
    worker.on_task("echo", lambda ctx, input: ctx.logger.info("hello %s", "you", extra={"mine": 1}))
    with worker:
        task_id = platform.submit("echo", {})
        platform.wait(task_id, GUARD)
    (record,) = [record for record in caplog.records if "hello" in record.getMessage()]
    assert record.getMessage() == f"[{task_id}] hello you"
    assert (record.task_id, record.mine) == (task_id, 1)  # type: ignore[attr-defined]


def test_no_line_of_the_log_can_be_forged(
    scripted: Scripted, worker_of: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """Line breaks and colours in ids, names, reasons, event names and errors of the platform stay out of the log."""
    forged = "x\r\n2026-01-01 ERROR forged\x1b[31m\u2028\x85"
    scripted.on["complete"] = lambda request: (
        403 if request.task_id == "t1" else 404,
        {"code": forged, "message": forged},
    )
    scripted.on["release"] = lambda request: (403, {"code": forged, "message": forged})
    worker = worker_of(scripted)
    worker.on_task("*", lambda ctx, input: ctx.logger.info("%s", ctx.capability))
    with caplog.at_level(logging.DEBUG, "sekuire"):
        worker.start()
        for number, fields in enumerate(
            [{"task_id": forged}, {"task_id": "t1"}, {"task_id": "t2", "capability": forged}, {"task_id": "t3\u2028"}]
        ):
            scripted.send("task", {"capability": "echo", "trace_id": forged, **fields}, event_id=f"{number}\x1b[31m")
        scripted.send(forged.replace("\r\n", ""), "{}")
        scripted.send("task", forged.replace("\r\n", ""))
        scripted.command("pause", reason=forged, command_id=forged)
        until(worker.is_paused)
        scripted.task("t4", "echo")
        scripted.completion("t4")
        scripted.on["stream"] = lambda request: (503, {"code": forged, "message": forged})
        scripted.cut()
        until(lambda: any("503" in record.message for record in caplog.records))
        scripted.on["heartbeat"] = lambda request: (
            200,
            {"revoked": True, "reason": forged, "shutdown_timeout_ms": 100},
        )
        assert worker.wait(GUARD)
    mine = [record for record in caplog.records if record.name.startswith("sekuire")]
    assert len(mine) > 10
    assert [record.message for record in mine if not record.message.isprintable()] == []
    assert {record.name for record in mine} >= {
        "sekuire.stream",
        "sekuire.worker",
        "sekuire.report",
        "sekuire.dispatch",
    }


def test_a_superseded_task(scripted: Scripted, worker_of: Make) -> None:
    """A handler whose progress is answered 409, because another worker was first, is cancelled as superseded."""
    scripted.on["progress"] = lambda request: (409, {"error": "conflict", "code": "ALREADY_COMPLETED"})
    scripted.on["complete"] = lambda request: (409, {"error": "conflict", "code": "ALREADY_COMPLETED"})
    reasons = []

    def handler(ctx: TaskContext, input: Any) -> None:
        ctx.report_progress(0.5)
        assert ctx.wait_cancelled(GUARD)
        reasons.append(ctx.cancel_reason)
        ctx.raise_if_cancelled()

    worker = worker_of(scripted)
    worker.on_task("echo", handler)
    with worker:
        scripted.task("t1")
        assert scripted.completion("t1")["error"]["code"] == "cancelled"
        until(lambda: worker.stats().undelivered == 0)
        # The others still tell theirs.
        scripted.on["progress"] = lambda request: (200, {})
        scripted.task("t2")
        until(lambda: any(request.task_id == "t2" for request in scripted.of("progress")))
        worker.stop(0.1)
    assert reasons[0] == "superseded"


def test_a_superseded_task_of_two_workers(
    make_platform: Callable[..., Any], worker_of: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that was away so long that another finished its task learns so, and its result changes nothing."""
    platform = make_platform(redelivery_delay=0.0)
    begun, resume = threading.Event(), threading.Event()
    reasons = []
    first = worker_of(platform, reconnect_min=30.0, reconnect_max=30.0)
    second = worker_of(platform)

    def slow(ctx: TaskContext, input: Any) -> str:
        begun.set()
        assert resume.wait(GUARD)
        ctx.report_progress(0.9)
        ctx.wait_cancelled(GUARD)
        reasons.append(ctx.cancel_reason)
        return "first"

    first.on_task("echo", slow)
    second.on_task("echo", lambda ctx, input: "second")
    with first:
        task_id = platform.submit("echo", {}, AGENT)
        assert begun.wait(GUARD)
        with second:
            real_next = Backoff.next
            # Back only after a long pause: full jitter could bring it back at once.
            monkeypatch.setattr(Backoff, "next", lambda *args: 3600.0 if is_owned_by(first) else real_next(*args))
            platform.drop_streams()
            assert platform.wait(task_id, GUARD)["output"] == "second"
            resume.set()
            until(lambda: reasons == ["superseded"])
            until(lambda: first.stats().undelivered == 0 and first.stats().completed == 1)
    assert platform.task(task_id)["output"] == "second"
    assert [status for status, _ in platform.completions(task_id)] == [200, 409]


@pytest.mark.parametrize(
    "task_id",
    ["../../installations/bootstrap", "a/../b", "%2e%2e%2f", "a?x=1#y", "a b", "é😀", "a:1", "..%2f", "\\..\\x"],
)
def test_an_id_stays_in_its_segment(scripted: Scripted, worker_of: Make, task_id: str) -> None:
    """Whatever a task's id holds, its result goes to that task's path, and its key is one header value."""
    worker = worker_of(scripted)
    worker.on_task("echo", lambda ctx, input: "done")
    with worker:
        scripted.task(task_id)
        (request,) = scripted.wait_for("complete")
    prefix, slash, end = request.path[: -len("/complete")].rpartition("/")
    assert (prefix, slash) == ("/api/v1/tasks", "/")
    assert urllib.parse.unquote(end) == task_id
    assert request.json["task_id"] == task_id
    assert request.headers["Idempotency-Key"] == f"{end}:1"


@pytest.mark.parametrize("task_id", ["", ".", "..", "a\nb", "a\r\nX-Evil: 1", "\x00", "\ud800", "x" * 257, 7, None])
def test_an_id_that_cannot_stand_in_a_path(scripted: Scripted, worker_of: Make, task_id: Any) -> None:
    """An id that could leave its place is no id: the task is counted, and nothing is sent for it."""
    worker = worker_of(scripted)
    worker.on_task("echo", lambda ctx, input: "done")
    with worker:
        scripted.send("task", json.dumps({"task_id": task_id, "capability": "echo"}))
        scripted.task("good")
        scripted.completion("good")
        assert worker.stats().dropped == 1
    assert scripted.count("complete") == 1


STRANGE = {
    "a hundred thousand levels": '{"task_id": "t1", "capability": "echo", "input": '
    + "[" * 100_000
    + "]" * 100_000
    + "}",
    "NaN": '{"task_id": "t1", "capability": "echo", "input": NaN}',
    "Infinity": '{"task_id": "t1", "capability": "echo", "input": [-Infinity]}',
    "a number of 5,000 digits": '{"task_id": "t1", "capability": "echo", "input": ' + "9" * 5000 + "}",
    "a lone surrogate": '{"task_id": "t1", "capability": "echo", "input": "\\ud800"}',
    "duplicate keys": '{"task_id": "t0", "capability": "x", "task_id": "t1", "capability": "echo", "input": 7}',
    "a string of 10 MB": '{"task_id": "t1", "capability": "echo", "input": "' + "s" * (10 * 1024 * 1024) + '"}',
}
ENDS = {
    "a lone surrogate": "result_not_serializable",
    "duplicate keys": None,
    "a string of 10 MB": None,
}


@pytest.mark.parametrize("what", STRANGE)
def test_strange_json(scripted: Scripted, worker_of: Make, what: str) -> None:
    """A task whose JSON is extreme or no JSON is run or answered, and the worker takes the next one."""
    worker = worker_of(scripted)
    worker.on_task("echo", lambda ctx, input: input)
    with worker:
        scripted.send("task", STRANGE[what])
        code = ENDS.get(what, "invalid_task")
        assert (scripted.completion("t1").get("error") or {}).get("code") == code
        scripted.task("t2")
        assert scripted.completion("t2")["status"] == "completed"
        # Answers of the same kind do no harm either: what cannot be read is no verdict, and is sent again.
        for name in ("heartbeat", "complete"):
            scripted.on[name] = lambda request: (200, STRANGE[what][:900_000].encode("utf-8", "surrogatepass"))
        scripted.task("t3")
        scripted.wait_for("heartbeat", scripted.count("heartbeat") + 2)
        scripted.completion("t3")
        del scripted.on["complete"]
        until(lambda: worker.stats().completed >= 2 and worker.stats().undelivered == 0)
        assert worker.is_connected()
