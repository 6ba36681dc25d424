"""Errors: their texts, their facts, and that they can be copied and pickled."""

from __future__ import annotations

import copy
import pickle

import pytest

from sekuire import errors

EXAMPLES = [
    errors.SekuireError("something"),
    errors.ConfigurationError("is wrong", "agent_id", "environment variable SEKUIRE_AGENT_ID"),
    errors.AuthenticationError("refused", 401, "UNAUTHORIZED"),
    errors.TransportError("no answer", retryable=False),
    errors.APIError(503, "BUSY", "come back later", 2.5, {"code": "BUSY"}),
    errors.PlanLimitError(402, "PLAN", "too small", None, {"required_plan": "pro", "upgrade_url": "https://x.test/up"}),
    errors.StreamError("204"),
    errors.RevokedError("compromised", 3.0),
    errors.TaskError("no_such_city", "there is no Atlantis", True, {"city": "Atlantis"}),
    errors.ApprovalDenied("action 'pay' was denied", {"reason": "too much", "decided_by": "ada"}),
    errors.ApprovalExpired("nobody has decided", {"name": "pay"}),
    errors.TaskCancelled("timeout"),
    errors.TaskFailed("no_such_city", "there is no Atlantis", {"city": "Atlantis"}, True, "task-1"),
    errors.TaskTimeout("task-1", "queued", "cannot reach 127.0.0.1"),
    errors.PolicyViolationError("tool.blocked", "the tool is blocked", 1.0),
    errors.PolicyIntegrityError("hash"),
    errors.PolicyUnavailableError("none"),
]


def test_one_root() -> None:
    """Every error of the library is a SekuireError and is exported."""
    exported = {getattr(errors, name) for name in errors.__all__}
    assert {type(example) for example in EXAMPLES} == exported
    assert all(issubclass(cls, errors.SekuireError) for cls in exported)
    assert issubclass(errors.PlanLimitError, errors.APIError)


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_errors_travel(error: errors.SekuireError) -> None:
    """A copy and an unpickled error have the text and the facts of the original."""
    for twin in (copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert type(twin) is type(error)
        assert str(twin) == str(error)
        assert twin.args == error.args
        assert vars(twin) == vars(error)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (errors.ConfigurationError("is wrong"), "is wrong"),
        (errors.ConfigurationError("is wrong", "agent_id"), "agent_id: is wrong"),
        (errors.ConfigurationError("is wrong", source="file x"), "file x: is wrong"),
        (errors.ConfigurationError("is wrong", "agent_id", "file x"), "agent_id (from file x): is wrong"),
        (errors.AuthenticationError("no"), "no"),
        (errors.TransportError("no"), "no"),
        (errors.APIError(500), "HTTP 500"),
        (errors.APIError(500, None, "boom"), "HTTP 500: boom"),
        (errors.APIError(500, "CODE", "boom"), "HTTP 500 CODE: boom"),
        (errors.PlanLimitError(402), "HTTP 402"),
        (
            errors.PlanLimitError(402, "PLAN", "no", None, {"required_plan": "pro", "upgrade_url": "https://x.test"}),
            "HTTP 402 PLAN: no (needs the plan 'pro') (upgrade: https://x.test)",
        ),
        (errors.RevokedError(), "the installation was revoked"),
        (errors.RevokedError("leak"), "the installation was revoked: leak"),
        (errors.RevokedError("the installation was revoked: leak"), "the installation was revoked: leak"),
        (errors.TaskError("code"), "code"),
        (errors.TaskError("code", "text"), "code: text"),
        (errors.TaskCancelled(), "cancelled"),
        (errors.PolicyViolationError("rule", "why"), "rule: why"),
    ],
)
def test_texts(error: errors.SekuireError, text: str) -> None:
    """The text of an error says what is known and nothing more."""
    assert str(error) == text


def test_plan_limits_are_facts() -> None:
    """A plan limit tells the plan, the address and the usage where the platform sent them in a usable form."""
    error = errors.PlanLimitError(402, details={"required_plan": "pro", "upgrade_url": "u", "current_usage": {"n": 1}})
    assert (error.required_plan, error.upgrade_url, error.current_usage) == ("pro", "u", {"n": 1})
    odd = errors.PlanLimitError(402, details={"required_plan": 5, "upgrade_url": "u\nforged line"})
    assert (odd.required_plan, odd.upgrade_url, odd.current_usage) == (None, None, None)
    assert str(odd) == "HTTP 402"
