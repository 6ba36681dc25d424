"""The examples in the docstrings of the policy's classes run, and print what their comments say."""

from __future__ import annotations

import os
import re
from typing import Any

import pytest

from sekuire import policy
from sekuire.policy.rulebook import Rulebook

from ..docs.test_docstrings import example_of


@pytest.mark.parametrize(
    "documented", [policy.Policy, policy.PolicyEnforcer, policy.Decision, policy.RateLimiter, Rulebook]
)
def test_examples_run(documented: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """An example needs no platform, and shows its result."""
    example = example_of(documented)
    names = {name: getattr(policy, name) for name in policy.__all__}
    exec(compile(example, f"<docstring of {documented.__name__}>", "exec"), {**names, "Rulebook": Rulebook})
    said = re.findall(r"print\(.*\)  # (.+)$", example, flags=re.MULTILINE)
    assert said
    assert capsys.readouterr().out.splitlines() == said


def test_the_client_asks(platform: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The example of the client fetches a policy from a platform."""
    monkeypatch.setenv("SEKUIRE_API_URL", platform.url)
    monkeypatch.setenv("SEKUIRE_API_KEY", platform.api_key)
    platform.set_policy("ws_1", {})
    names = {"os": os, "PolicyClient": policy.PolicyClient}
    exec(compile(example_of(policy.PolicyClient), "<docstring of PolicyClient>", "exec"), names)
    assert capsys.readouterr().out == "1 integrity\n"
