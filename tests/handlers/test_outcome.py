"""Handlers by capability, and what their end means."""

from __future__ import annotations

import logging
import time
from typing import Any

import pytest

from sekuire.errors import ConfigurationError, TaskCancelled, TaskError
from sekuire.handlers.outcome import MAX_MESSAGE, run
from sekuire.handlers.registry import TaskRegistry
from sekuire.wire.models import Completion

from ..support.builders import context_of


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
        scrub=lambda text: text.replace("secret", "***"),
    )


def test_a_result() -> None:
    """The handler's return is the output, under the task's attempt."""
    completion = ended(lambda ctx, input: input)
    assert (completion.task_id, completion.attempt, completion.output) == ("t1", 3, {"a": 1})
    assert completion.failure is None


@pytest.mark.parametrize(
    ("error", "code", "message", "retryable"),
    [
        (TaskError("own", "the secret", retryable=True), "own", "the ***", True),
        (TaskError("own", "x", retryable="yes"), "own", "x", False),  # type: ignore[arg-type]
        (TaskError(None, "x"), "handler_error", "TaskError: None: x", False),  # type: ignore[arg-type]
        (TaskCancelled("the secret"), "cancelled", "the ***", False),
        (KeyError("secret"), "handler_error", "KeyError: '***'", False),
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
    text = "x" * (10 * MAX_MESSAGE - 3) + "secret"

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
