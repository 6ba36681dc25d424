"""Handlers by capability, and what their end means."""

from __future__ import annotations

import asyncio
import builtins
import logging
import threading
import time
from typing import Any, List, Sequence

import pytest

from sekuire.errors import ConfigurationError, TaskCancelled, TaskError
from sekuire.handlers.context import TaskContext, control_of
from sekuire.handlers.outcome import MAX_MESSAGE, run
from sekuire.handlers.registry import TaskRegistry
from sekuire.secret import Secret
from sekuire.wire.models import Completion

from ..support.builders import context_of
from ..support.waiting import GUARD

TOKEN = "skt_outcome-canary"
#: Kept, because only what lives is looked for.
SECRET = Secret(TOKEN)


def ended(function: Any, expose_errors: bool = True) -> Completion:
    registry = TaskRegistry()
    registry.add("echo", function)
    entry = registry.find("echo")
    assert entry is not None
    context = context_of("t1", "echo", attempt=3)
    return run(
        entry,
        context,
        {"a": 1},
        began=time.monotonic(),
        expose_errors=expose_errors,
    )


def test_a_result() -> None:
    """The handler's return is the output, under the task's attempt."""
    completion = ended(lambda ctx, input: input)
    assert (completion.task_id, completion.attempt, completion.output) == ("t1", 3, {"a": 1})
    assert completion.failure is None


@pytest.mark.parametrize(
    ("error", "code", "message", "retryable"),
    [
        (TaskError("own", f"the {TOKEN}", retryable=True), "own", "the ***", True),
        (TaskError("own", "x", retryable="yes"), "own", "x", False),  # type: ignore[arg-type]
        (TaskError(None, "x"), "handler_error", "TaskError: None: x", False),  # type: ignore[arg-type]
        (TaskCancelled(f"the {TOKEN}"), "cancelled", "the ***", False),
        (KeyError(TOKEN), "handler_error", "KeyError: '***'", False),
    ],
    ids=["own", "truthy", "no code", "cancelled", "unexpected"],
)
def test_an_exception(error: BaseException, code: str, message: str, retryable: bool) -> None:
    """What a handler raises becomes the failure that the contract says, without secrets."""

    def handler(ctx: Any, input: Any) -> None:
        raise error

    failure = ended(handler).failure
    assert failure is not None
    assert (failure.code, failure.message, failure.retryable) == (code, message, retryable)


@pytest.mark.parametrize("kind", [TaskError, TaskCancelled])
def test_half_a_secret_is_not_told(kind: Any) -> None:
    """A long text is cut after its secrets are taken out, so that the cut cannot hide one from the search."""
    text = "x" * (10 * MAX_MESSAGE - 3) + TOKEN

    def handler(ctx: Any, input: Any) -> None:
        raise TaskError("own", text) if kind is TaskError else TaskCancelled(text)

    failure = ended(handler).failure
    assert failure is not None
    assert failure.message == "x" * (10 * MAX_MESSAGE - 3) + "***"


def test_a_text_that_has_no_utf8(monkeypatch: pytest.MonkeyPatch) -> None:
    """A message with a lone surrogate does not spoil the report of its task."""
    # pytest-xdist cannot carry the log line.
    monkeypatch.setattr(logging.getLogger("sekuire.task"), "disabled", True)

    def handler(ctx: Any, input: Any) -> None:
        raise ValueError("\ud800")

    failure = ended(handler).failure
    assert failure is not None
    assert failure.message == "ValueError: ?"


def test_the_registry_finds_the_own_handler_first() -> None:
    """A capability's own handler comes before the catch-all."""
    registry = TaskRegistry()
    assert registry.is_empty()
    registry.add("*", lambda ctx, input: None)
    registry.add("echo", print)
    own, other = registry.find("echo"), registry.find("else")
    assert own is not None
    assert other is not None
    assert (own.name, other.name, registry.names, registry.has_catch_all) == ("echo", "*", ["echo"], True)
    registry.freeze()
    with pytest.raises(ConfigurationError):
        registry.add("late", print)


class FakeGroup(Exception):
    """As the package exceptiongroup has it, for Python before 3.11."""

    def __init__(self, text: str, errors: Sequence[BaseException]) -> None:
        super().__init__(text)
        self.exceptions = tuple(errors)


FakeGroup.__name__ = "ExceptionGroup"
GROUPS: List[Any] = [FakeGroup, *([builtins.ExceptionGroup] if hasattr(builtins, "ExceptionGroup") else [])]
OWN = TaskError("no_funds", "the account is empty", retryable=True, details={"x": 1})
FINAL = TaskError("closed", "the account is closed")


def caused_by(cause: BaseException, error: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


def raised(error: BaseException) -> Any:
    def handler(ctx: Any, input: Any) -> None:
        raise error

    return ended(handler).failure


@pytest.mark.parametrize("group", GROUPS)
def test_an_error_within_others(group: Any) -> None:
    """What the handler said arrives whole, whatever has wrapped it."""
    for error in (
        group("g", [OWN]),
        group("outer", [group("inner", [OWN])]),
        caused_by(OWN, RuntimeError("a framework's own")),
        caused_by(group("g", [OWN]), RuntimeError("twice")),
        group("g", [caused_by(OWN, RuntimeError("within"))]),
    ):
        failure = raised(error)
        assert (failure.code, failure.message, failure.retryable) == ("no_funds", "the account is empty", True)
        assert failure.details == {"x": 1}


@pytest.mark.parametrize("group", GROUPS)
def test_several_errors(group: Any, caplog: pytest.LogCaptureFixture) -> None:
    """What the handler said goes before what it did not foresee, and a final error before a retryable one."""
    assert raised(group("g", [OWN, FINAL])).code == "closed"
    assert raised(group("g", [ValueError("unforeseen"), OWN])).code == "no_funds"
    assert raised(group("g", [TaskCancelled("x"), OWN])).code == "no_funds"
    assert raised(FakeGroup("g", [asyncio.CancelledError(), KeyError("k")])).message == "KeyError: 'k'"
    assert "failed closed: its handler raised several errors; this one counts, and not: TaskError" in caplog.text
    secret = Secret("skt_in-an-error")
    failure = raised(group("g", [ValueError(f"the {secret.reveal()}"), TypeError("b"), KeyError("c")]))
    assert (failure.code, failure.retryable) == ("handler_error", False)
    assert failure.message == "ValueError: the *** (and 2 more: TypeError, KeyError)"


def test_errors_without_end() -> None:
    """A circle, and a chain that is too long, are left where they are."""
    one, two = ValueError("one"), ValueError("two")
    one.__cause__, two.__cause__ = two, one
    assert raised(one).message == "ValueError: one"
    error: BaseException = OWN
    for number in range(5000):
        error = caused_by(error, ValueError(number))
    assert raised(error).message == "ValueError: 4999"


@pytest.mark.parametrize(
    "text", ["cannot schedule new futures after shutdown", "can't create new thread at interpreter shutdown"]
)
def test_an_executor_that_the_program_has_ended(text: str) -> None:
    """It is not the handler's own failure, also where an HTTP client has wrapped it."""
    for error in (RuntimeError(text), caused_by(RuntimeError(text), OSError("cannot connect"))):
        failure = raised(error)
        assert (failure.code, failure.retryable) == ("worker_shutdown", True)
    assert raised(ValueError(text)).code == "handler_error"


@pytest.mark.parametrize(
    ("reason", "code"),
    [
        ("terminated", "worker_terminated"),
        ("the program ends", "worker_shutdown"),
        ("lease lost", "cancelled"),
        ("enough", "cancelled"),
    ],
)
@pytest.mark.parametrize("way", ["thread", "coroutine"])
def test_a_cancelled_task(reason: str, code: str, way: str) -> None:
    """A coroutine is cancelled with its task, and answered as a handler that asks its context."""

    def handler(ctx: TaskContext, input: Any) -> None:
        control_of(ctx).cancel(reason)
        ctx.raise_if_cancelled()

    async def coroutine(ctx: TaskContext, input: Any) -> None:
        threading.Timer(0.05, control_of(ctx).cancel, [reason]).start()
        await asyncio.sleep(GUARD)

    failure = ended(handler if way == "thread" else coroutine).failure
    assert failure is not None
    assert (failure.code, failure.message) == (code, reason)


def test_a_coroutine_that_cancels_itself() -> None:
    """It is the handler's own error while its task is not cancelled."""

    async def handler(ctx: Any, input: Any) -> None:
        raise asyncio.CancelledError

    failure = ended(handler).failure
    assert failure is not None
    assert failure.code == "handler_error"


def test_a_coroutine_is_cancelled_once() -> None:
    """It may clean up, and return: further cancellations of its context do not interrupt it."""

    async def handler(ctx: TaskContext, input: Any) -> str:
        try:
            control_of(ctx).cancel("terminated")
            await asyncio.sleep(GUARD)
        except asyncio.CancelledError:
            control_of(ctx).cancel("shutdown", answered=True)
            await asyncio.sleep(0.05)
        return "cleaned up"

    assert ended(handler).output == "cleaned up"
