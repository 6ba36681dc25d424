"""The published vocabularies over real HTTP: each loads without a warning, pinned or not, and each section decides."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, Dict, List, Tuple

import attrs
import pytest

from sekuire import PolicyClient, PolicyGateway, SekuireSDK
from sekuire.errors import PolicyViolationError
from sekuire.policy import document

from ..conftest import AGENT
from ..support.scripted import Scripted
from ..support.waiting import GUARD
from .signing import WORKSPACE, Served, Signer

DATA = Path(__file__).parent / "data"
OWNER = Signer(1)
DOCUMENTED: Dict[str, Dict[str, Any]] = {
    "permissions": {"network": document.Network, "filesystem": document.Filesystem, "tools": document.Tools},
    "agent": {"models": document.Models, "capabilities": document.Capabilities},
    "rate_limits": {"requests": document.Rate, "tokens": document.Rate},
}
#: (question, its arguments, the rule that refuses, or None)
Case = Tuple[str, Tuple[Any, ...], Any]

CASES: Dict[str, List[Case]] = {
    "enterprise": [
        ("network", ("api.example.com", "https"), None),
        ("network", ("a.partner.example", "https"), None),
        ("network", ("api.example.com", "http"), "network.tls_required"),
        ("network", ("billing.partner.example", "https"), "network.blocked"),
        ("network", ("evil.example", "https"), "network.not_allowed"),
        ("filesystem", ("/srv/reports/may.csv", "read"), None),
        ("filesystem", ("/srv/reports/private/may.csv", "read"), "fs.blocked"),
        ("filesystem", ("/etc/passwd.csv", "read"), "fs.not_allowed"),
        ("filesystem", ("/srv/reports/may.exe", "write"), "fs.ext"),
        ("tool", ("shell",), "tool.blocked"),
        ("tool", ("delete_user",), "tool.blocked"),
        ("tool", ("browse",), "tool.not_allowed"),
        ("tool", ("send_mail",), "tool.not_allowed"),
        ("tool", ("search",), "tool.approval_required"),
        ("model", ("gpt-4o",), None),
        ("model", ("claude-3", "anthropic"), None),
        ("model", ("claude-1.3", "anthropic"), "model.blocked"),
        ("model", ("llama", "openai"), "model.not_allowed"),
        ("model", ("gpt-4o", "azure"), "model.provider_not_allowed"),
        ("capability", ("anything",), None),
        ("rate_limit", ("tokens", 4000), None),
        ("rate_limit", ("token", 2000), "rate_limit.tokens_per_minute"),
        ("rate_limit", ("requests", 60), None),
        ("rate_limit", ("request",), "rate_limit.requests_per_minute"),
    ],
    "sekuire-yml": [
        ("network", ("api.example.com", "https"), None),
        ("network", ("a.partner.example", "https"), None),
        ("network", ("api.example.com", "http"), "network.tls_required"),
        ("network", ("billing.partner.example", "https"), "network.blocked"),
        ("network", ("evil.example", "https"), "network.not_allowed"),
        ("filesystem", ("/srv/reports/may.csv", "read"), None),
        ("filesystem", ("/srv/reports/may.exe", "read"), "fs.ext"),
        ("tool", ("shell",), None),
        ("model", ("llama", "meta"), None),
        ("rate_limit", ("request", 2), None),
        ("rate_limit", ("request",), "rate_limit.requests_per_minute"),
    ],
    "rule-reference": [
        ("network", ("api.example.com", "https"), None),
        ("network", ("internal.example.com", "https"), "network.blocked"),
        ("network", ("example.org", "https"), "network.not_allowed"),
        ("filesystem", ("/srv/reports/may.csv", "read"), "fs.disabled"),
        ("tool", ("read_mail",), None),
        ("tool", ("read_secrets",), "tool.blocked"),
        ("tool", ("write_mail",), "tool.not_allowed"),
        ("model", ("llama", "meta"), None),
        ("rate_limit", ("requests", 10**6), None),
    ],
}


def content_of(name: str) -> Dict[str, Any]:
    found: Dict[str, Any] = json.loads((DATA / f"{name}.json").read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    ("covers", "pinned", "origin"),
    [("bound", True, "pinned"), ("bound", False, "integrity"), ("hash", True, "content"), ("none", False, "unsigned")],
)
def test_it_loads_and_decides(
    scripted: Scripted, caplog: pytest.LogCaptureFixture, name: str, covers: str, pinned: bool, origin: str
) -> None:
    """No section and no key is warned of, whatever is pinned; each section allows and refuses by its own rule."""
    changed: Dict[str, Any] = {"signature": None} if covers == "none" else {}
    Served(scripted, OWNER.policy(1, content_of(name), covers="hash" if covers == "hash" else "bound", **changed))
    keys = [OWNER.public] if pinned else []
    form: Any = "hash" if covers == "hash" else "bound"
    with PolicyClient(scripted.url, api_key="k", trusted_policy_keys=keys, policy_signature=form) as client:
        with PolicyGateway(client, WORKSPACE) as gateway:
            policy = gateway.refresh()
            assert policy is not None
            assert (policy.origin, policy.warnings) == (origin, ())
            warned = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
            assert [one for one in warned if "policy_signature" not in one] == []
            for question, arguments, rule in CASES[name]:
                decision = getattr(gateway.enforcer, f"check_{question}")(*arguments)
                assert decision.rule == rule, (question, arguments)
                assert bool(decision) == (rule is None)


def test_the_enterprise_policy_has_every_documented_key() -> None:
    """Whatever a policy can say, but for what is this project's own, stands in the document."""
    ours = {"allowed_capabilities", "denied_capabilities", "require_approval", "allowed_hosts", "blocked_hosts"}
    content = content_of("enterprise")
    assert {part: set(sections) for part, sections in content.items() if part != "compliance"} == {
        part: set(kinds) for part, kinds in DOCUMENTED.items()
    }
    for part, kinds in DOCUMENTED.items():
        for section, kind in kinds.items():
            assert set(content[part][section]) == {field.name for field in attrs.fields(kind)} - ours


def test_a_worker_under_the_enterprise_policy(platform: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A local platform serves it, a pinned SDK enforces it on tasks, and nothing is warned of but what is denied."""
    platform.set_policy("ws_local", content_of("enterprise"))

    def report(ctx: Any, input: Any) -> str:
        ctx.policy.enforce_network("api.example.com", "https")
        with pytest.raises(PolicyViolationError, match="billing"):
            ctx.policy.enforce_network("billing.partner.example", "https")
        return "reported"

    with SekuireSDK(
        AGENT,
        api_base_url=platform.url,
        install_token=platform.create_install_token(AGENT),
        trusted_policy_keys=[platform.policy_public_key],
    ) as sdk:
        worker = sdk.create_task_worker(policy_required=True)
        worker.on_task("*", report)
        worker.start()
        done = platform.wait(platform.submit("report", {}, AGENT), GUARD)
        assert done["output"] == "reported"
        assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == []
        blocked = platform.wait(platform.submit("report", {}, AGENT, tool="shell"), GUARD)["error"]
        assert (blocked["code"], blocked["details"]["rule"]) == ("policy_denied", "tool.blocked")
        task_id = platform.submit("report", {}, AGENT, tool="search")
        asked = platform.wait_for_approval(GUARD, task_id=task_id)
        assert asked["subject"] == {"kind": "tool", "name": "search"}
        platform.decide(asked["approval_id"], "denied")
        denied = platform.wait(task_id, GUARD)["error"]
        assert (denied["code"], denied["details"]["rule"]) == ("approval_denied", "tool.approval_required")
