"""The attack on a local platform in the suite: a short one, and that it notices what it must."""

from __future__ import annotations

import logging
import random
from typing import Any

import pytest

from sekuire.local import LocalPlatform
from sekuire.local.store import Store

from . import http


def test_an_attack() -> None:
    """No 500, no traceback, bounded threads, memory and descriptors; and most calls of the contract are reached."""
    outcome = http.attack(500, seed=1)
    assert outcome.is_fine, (str(outcome), outcome.problems)
    assert outcome.statuses[200] + outcome.statuses[201] > 20


def test_a_failure_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A view that crashes, and an error in the log, fail the attack."""

    def crash(*args: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(Store, "logs", crash)
    outcome = http.attack(200, seed=1)
    assert outcome.suspects
    assert any("ZeroDivisionError" in problem for problem in outcome.problems)


def test_an_attack_can_be_repeated() -> None:
    """A request is a function of the seed and its number, but for the ids and secrets that it needs."""
    with LocalPlatform() as platform:
        ground = http.Ground(platform)
        for number in range(50):
            first, second = (http.request_of(ground, random.Random(f"3:{number}")) for _ in range(2))
            assert first == second
    assert not logging.getLogger("sekuire").handlers
