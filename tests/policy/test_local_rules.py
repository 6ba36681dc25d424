"""Local rules beside the workspace's policy: both must allow, and a denial names which of them refuses."""

from __future__ import annotations

import pickle
from typing import Any, Dict, Optional

import pytest

from sekuire.policy import Policy, PolicyEnforcer
from sekuire.policy.rulebook import LocalRules, Rulebook

MANIFEST = "sekuire.yml"
WORKSPACE = "the workspace's policy"


def enforcer_of(workspace: Optional[Dict[str, Any]], local: Dict[str, Any]) -> PolicyEnforcer:
    policy = None if workspace is None else Policy.from_content(workspace)
    return PolicyEnforcer(policy, local=LocalRules(Policy.from_content(local), MANIFEST))


def content(**sections: Any) -> Dict[str, Any]:
    return {"permissions": sections}


@pytest.mark.parametrize(
    ("workspace", "local", "refused_by"),
    [
        (["a"], ["a"], WORKSPACE),
        (["a"], ["b"], WORKSPACE),
        (["b"], ["a"], MANIFEST),
        (["b"], ["b"], None),
        (None, ["a"], MANIFEST),
        (None, ["b"], None),
    ],
)
def test_both_must_allow(workspace: Any, local: Any, refused_by: Optional[str]) -> None:
    """A tool passes if neither refuses it. Without a policy of the workspace the local rules decide."""
    rules = None if workspace is None else content(tools={"blocked_tools": workspace})
    decision = enforcer_of(rules, content(tools={"blocked_tools": local})).check_tool("a")
    assert bool(decision) is (refused_by is None)
    assert refused_by is None or decision.reason.endswith(f" ({refused_by})")


QUESTIONS = {
    "tool": ("x",),
    "api": ("x",),
    "model": ("x",),
    "capability": ("x",),
    "network": ("x.test", "https"),
    "filesystem": ("/x", "read"),
}
NOTHING: Dict[str, Any] = {
    "permissions": {
        "tools": {"allowed_tools": []},
        "api": {"allowed_services": []},
        "network": {"enabled": False},
        "filesystem": {"enabled": False},
    },
    "agent": {"models": {"denied_models": ["*"]}, "capabilities": {"allowed_capabilities": []}},
}
ALL: Dict[str, Any] = {"permissions": {"network": {}, "filesystem": {}}}


@pytest.mark.parametrize("method", QUESTIONS)
def test_every_question_asks_both(method: str) -> None:
    """Each kind of question is refused by either of the two, and allowed by both."""
    for workspace, local, refused_by in [(NOTHING, ALL, WORKSPACE), (ALL, NOTHING, MANIFEST), (ALL, ALL, None)]:
        decision = getattr(enforcer_of(workspace, local), f"check_{method}")(*QUESTIONS[method])
        assert bool(decision) is (refused_by is None)
        assert refused_by is None or refused_by in decision.reason


def test_a_section_that_is_not_there() -> None:
    """In local rules it restricts nothing. In the workspace's policy it goes on denying network and files."""
    local = {"permissions": {"tools": {}}}
    assert enforcer_of(None, local).check_network("x.test", "https")
    assert enforcer_of(ALL, local).check_filesystem("/x", "read")
    assert enforcer_of({"compliance": {}}, local).check_network("x.test", "https").rule == "network.missing"


@pytest.mark.parametrize(
    ("workspace", "local", "amount", "refused_by"), [(5, 3, 3, MANIFEST), (3, 5, 3, WORKSPACE), (None, 2, 2, MANIFEST)]
)
def test_rates_count_once(workspace: Optional[int], local: int, amount: int, refused_by: str) -> None:
    """The smaller limit counts, and each request counts once for both."""
    rates = [{"rate_limits": {"requests": {"max_per_hour": limit}}} if limit else None for limit in (workspace, local)]
    enforcer = enforcer_of(rates[0], rates[1] or {})
    for _ in range(amount):
        enforcer.enforce_rate_limit("requests")
    decision = enforcer.check_rate_limit("requests")
    assert decision.rule == "rate_limit.requests_per_hour"
    assert decision.reason.endswith(f" ({refused_by})")


def test_copies_keep_them() -> None:
    """An enforcer for another policy, another callback or another process asks the local rules too."""
    enforcer = enforcer_of(ALL, content(tools={"blocked_tools": ["a"]}))
    for copy in (
        enforcer.with_policy(None),
        enforcer.reporting_to(print),
        pickle.loads(pickle.dumps(enforcer)),
    ):
        assert copy.check_tool("a").reason.endswith(f" ({MANIFEST})")


def test_without_a_policy_everything_is_denied() -> None:
    """Local rules do not take the place of a policy that could not be loaded."""
    local = LocalRules(Policy.from_content(ALL), MANIFEST)
    unavailable = PolicyEnforcer(Rulebook(None, "x"), local=local)
    assert unavailable.check_tool("a").rule == "policy.unavailable"
