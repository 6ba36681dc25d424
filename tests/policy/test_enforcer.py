"""Every rule is raised with its id and message, beside a twin that passes; and what comes of a decision."""

from __future__ import annotations

import logging
import os
import pathlib
import re
import threading
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import attrs
import pytest

from sekuire.errors import ConfigurationError, PolicyIntegrityError, PolicyViolationError
from sekuire.policy import Decision, Policy, PolicyEnforcer, RateLimiter
from sekuire.policy.enforcer import MESSAGES

from .test_limits import Clock, limiter_at

PROTOCOL = (pathlib.Path(__file__).resolve().parents[2] / "docs" / "protocol.md").read_text(encoding="utf-8")
PAGE = (pathlib.Path(__file__).resolve().parents[2] / "docs" / "policy.md").read_text(encoding="utf-8")

NETWORK = {"enabled": True, "allowed_domains": ["*.example.com"], "blocked_domains": ["bad.example.com"]}
FILES = {"enabled": True, "allowed_paths": ["/srv/work/*"], "blocked_paths": ["/srv/work/keys"]}
TOOLS = {"allowed_tools": ["read_*"], "blocked_tools": ["read_secrets"]}
SERVICES = {"allowed_services": ["stripe*"], "blocked_services": ["stripe-live"]}
MODELS = {"allowed_models": ["gpt-*"], "denied_models": ["gpt-3*"], "allowed_providers": ["openai"]}
CAPABILITIES = {"allowed_capabilities": ["read*"], "denied_capabilities": ["read-mail"]}


def permissions(**sections: Any) -> Dict[str, Any]:
    return {"permissions": sections}


class Case(NamedTuple):
    """A rule, the content that has it, what it refuses and with what message, and what the same content allows."""

    rule: str
    content: Optional[Dict[str, Any]]
    method: str
    refused: Tuple[Any, ...]
    message: str
    twin: Tuple[Any, ...]
    twin_content: Optional[Dict[str, Any]] = None


def rate(kind: str, window: str, limit: int) -> Dict[str, Any]:
    return {"rate_limits": {kind: {f"max_per_{window}": limit}}}


CASES = [
    Case(
        "network.missing", permissions(), "network", ("a.example.com", "https"),
        "'a.example.com' is refused: the policy has no permissions.network",
        ("a.example.com", "https"), permissions(network={}),
    ),
    Case(
        "network.disabled", permissions(network={**NETWORK, "enabled": False}), "network", ("a.example.com", "https"),
        "'a.example.com' is refused: permissions.network.enabled is false",
        ("a.example.com", "https"), permissions(network=NETWORK),
    ),
    Case(
        "network.tls_required", permissions(network={**NETWORK, "require_tls": True}),
        "network", ("a.example.com", "http"),
        "'a.example.com' by 'http' is refused: permissions.network.require_tls is true",
        ("a.example.com", "HTTPS"),
    ),
    Case(
        "network.blocked", permissions(network=NETWORK), "network", ("bad.example.com", "https"),
        "'bad.example.com' is refused: 'bad.example.com' in permissions.network.blocked_domains matches it",
        ("good.example.com", "http"),
    ),
    Case(
        "network.not_allowed", permissions(network=NETWORK), "network", ("example.org", "https"),
        "'example.org' is refused: no entry of permissions.network.allowed_domains matches it",
        ("example.com", "https"),
    ),
    Case(
        "fs.missing", permissions(), "filesystem", ("/srv/work/a", "read"),
        "read '/srv/work/a' is refused: the policy has no permissions.filesystem",
        ("/srv/work/a", "read"), permissions(filesystem={}),
    ),
    Case(
        "fs.disabled", permissions(filesystem={**FILES, "enabled": False}), "filesystem", ("/srv/work/a", "write"),
        "write '/srv/work/a' is refused: permissions.filesystem.enabled is false",
        ("/srv/work/a", "write"), permissions(filesystem=FILES),
    ),
    Case(
        "fs.blocked", permissions(filesystem=FILES), "filesystem", ("/srv/work/a/../keys/b", "read"),
        "read '/srv/work/a/../keys/b' is refused: '/srv/work/keys' in permissions.filesystem.blocked_paths matches it",
        ("/srv/work/keys2", "read"),
    ),
    Case(
        "fs.not_allowed", permissions(filesystem=FILES), "filesystem", ("/srv/work/../a", "read"),
        "read '/srv/work/../a' is refused: no entry of permissions.filesystem.allowed_paths matches it",
        ("/srv/work", "read"),
    ),
    Case(
        "fs.ext", permissions(filesystem={**FILES, "allowed_extensions": [".csv"]}),
        "filesystem", ("/srv/work/a.exe", "read"),
        "read '/srv/work/a.exe' is refused: permissions.filesystem.allowed_extensions does not hold its extension",
        ("/srv/work/a.csv", "read"),
    ),
    Case(
        "tool.blocked", permissions(tools=TOOLS), "tool", ("read_secrets",),
        "tool 'read_secrets' is refused: 'read_secrets' in permissions.tools.blocked_tools matches it",
        ("read_file",),
    ),
    Case(
        "tool.blocked", {"agent": {"capabilities": {"denied_tools": ["sh*"]}}}, "tool", ("shell",),
        "tool 'shell' is refused: 'sh*' in agent.capabilities.denied_tools matches it",
        ("read_file",),
    ),
    Case(
        "tool.not_allowed", permissions(tools=TOOLS), "tool", ("write_file",),
        "tool 'write_file' is refused: no entry of permissions.tools.allowed_tools matches it",
        ("read_",),
    ),
    Case(
        "tool.not_allowed",
        {**permissions(tools=TOOLS), "agent": {"capabilities": {"allowed_tools": ["read_a"]}}}, "tool", ("read_b",),
        "tool 'read_b' is refused: no entry of agent.capabilities.allowed_tools matches it",
        ("read_a",),
    ),
    Case(
        "api.blocked", permissions(api=SERVICES), "api", ("stripe-live",),
        "service 'stripe-live' is refused: 'stripe-live' in permissions.api.blocked_services matches it",
        ("stripe-test",),
    ),
    Case(
        "api.not_allowed", permissions(api=SERVICES), "api", ("github",),
        "service 'github' is refused: no entry of permissions.api.allowed_services matches it",
        ("stripe",),
    ),
    Case(
        "model.blocked", {"agent": {"models": MODELS}}, "model", ("GPT-3.5", "openai"),
        "model 'GPT-3.5' is refused: 'gpt-3*' in agent.models.denied_models matches it",
        ("gpt-4", "openai"),
    ),
    Case(
        "model.not_allowed", {"agent": {"models": MODELS}}, "model", ("llama", "openai"),
        "model 'llama' is refused: no entry of agent.models.allowed_models matches it",
        ("gpt-4", "openai"),
    ),
    Case(
        "model.provider_not_allowed", {"agent": {"models": MODELS}}, "model", ("gpt-4", "other"),
        "model 'gpt-4' of provider 'other' is refused: no entry of agent.models.allowed_providers matches the provider",
        ("gpt-4", "openai"),
    ),
    Case(
        "model.provider_not_allowed", {"agent": {"models": {**MODELS, "allowed_models": ["gpt-*"]}}}, "model",
        ("gpt-4",),
        "model 'gpt-4' of a provider that was not named is refused:"
        " no entry of agent.models.allowed_providers matches the provider",
        # The documentation asks for a model by its name alone.
        ("gpt-4",), {"agent": {"models": {**MODELS, "allowed_models": ["gpt-4"]}}},
    ),
    Case(
        "tool.approval_required", {"agent": {"capabilities": {"require_tool_approval": True}}}, "tool", ("shell",),
        "tool 'shell' needs a person's approval: agent.capabilities.require_tool_approval is true",
        ("shell",), {"agent": {"capabilities": {"require_tool_approval": False}}},
    ),
    Case(
        "capability.approval_required", {"agent": {"capabilities": {"require_approval": ["send-*"]}}}, "capability",
        ("send-mail",),
        "capability 'send-mail' needs a person's approval: 'send-*' in agent.capabilities.require_approval matches it",
        ("read-mail",),
    ),
    Case(
        "capability.blocked", {"agent": {"capabilities": CAPABILITIES}}, "capability", ("read-mail",),
        "capability 'read-mail' is refused: 'read-mail' in agent.capabilities.denied_capabilities matches it",
        ("read-news",),
    ),
    Case(
        "capability.not_allowed", {"agent": {"capabilities": CAPABILITIES}}, "capability", ("write",),
        "capability 'write' is refused: no entry of agent.capabilities.allowed_capabilities matches it",
        ("read",),
    ),
    Case(
        "rate_limit.requests_per_minute", rate("requests", "minute", 2), "rate_limit", ("requests", 3),
        "3 more would exceed 2 requests a minute", ("requests", 2),
    ),
    Case(
        "rate_limit.requests_per_hour", rate("requests", "hour", 2), "rate_limit", ("requests", 3),
        "3 more would exceed 2 requests an hour", ("requests", 2),
    ),
    Case(
        "rate_limit.tokens_per_minute", rate("tokens", "minute", 99), "rate_limit", ("tokens", 100),
        "100 more would exceed 99 tokens a minute", ("tokens", 99),
    ),
    Case(
        "rate_limit.tokens_per_hour", rate("tokens", "hour", 99), "rate_limit", ("tokens", 100),
        "100 more would exceed 99 tokens an hour", ("tokens", 99),
    ),
    Case(
        "policy.unknown_key", permissions(tools={"blocked_tool": ["x"]}), "tool", ("read_file",),
        "tool 'read_file' is refused: permissions.tools.blocked_tool in the policy is unknown, and may block it",
        ("read_file",), permissions(tools={}),
    ),
    Case(
        "policy.unavailable", None, "tool", ("read_file",),
        "tool 'read_file' is refused: it was never loaded", ("read_file",), {},
    ),
]  # fmt: skip

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.rule}-{case.method}")


def enforcer_of(content: Optional[Dict[str, Any]], *more: Any, **options: Any) -> PolicyEnforcer:
    if content is None:
        return PolicyEnforcer.unavailable("it was never loaded", *more, **options)
    return PolicyEnforcer(Policy.from_content(content), *more, **options)


@each_case
def test_each_rule_and_its_twin(case: Case) -> None:
    """``enforce_...`` raises the rule with its message, ``check_...`` says the same, and the twin passes both."""
    enforcer = enforcer_of(case.content)
    with pytest.raises(PolicyViolationError) as caught:
        getattr(enforcer, f"enforce_{case.method}")(*case.refused)
    assert (caught.value.rule, caught.value.reason) == (case.rule, case.message)
    decision = getattr(enforcer, f"check_{case.method}")(*case.refused)
    assert (bool(decision), decision.rule, decision.reason) == (False, case.rule, case.message)
    for prefix in ("enforce", "check"):
        twin = enforcer_of(case.content if case.twin_content is None else case.twin_content)
        result = getattr(twin, f"{prefix}_{case.method}")(*case.twin)
        assert result is None or (bool(result), result.rule) == (True, None)


@each_case
def test_each_rule_with_warn_only(
    case: Case, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Allowed, with a warning and a call to ``on_violation``; the decision still names the rule."""
    seen: List[PolicyViolationError] = []
    enforcer = enforcer_of(case.content, True, seen.append)
    with caplog.at_level(logging.WARNING, logger="sekuire.policy"):
        getattr(enforcer, f"enforce_{case.method}")(*case.refused)
        decision = getattr(enforcer, f"check_{case.method}")(*case.refused)
    assert (bool(decision), decision.rule, decision.reason) == (True, case.rule, case.message)
    assert [(error.rule, error.reason) for error in seen] == [(case.rule, case.message)] * 2
    assert [record.getMessage() for record in caplog.records] == [
        f"allowed only because violations are not enforced (warn_only): {case.rule}: {case.message}"
    ] * 2


def test_the_table_holds_every_rule() -> None:
    """The cases above, the messages and docs/protocol.md name the same rules."""
    listed = re.findall(
        r"`((?:network|fs|tool|api|model|capability|rate_limit|policy)\.\w+)`", PROTOCOL.partition("Rules, by")[2]
    )
    assert len(listed) == 27
    assert {case.rule for case in CASES} == set(listed) == set(MESSAGES) - {""}


def test_the_page_holds_every_message() -> None:
    """docs/policy.md lists every rule with its message."""
    rows = dict(re.findall(r"^\| `([a-z_.]+)` \| (.+?) \|", PAGE.partition("## Rules")[2], flags=re.MULTILINE))
    written = {rule: text.replace("{", "*").replace("}", "*") for rule, text in MESSAGES.items() if rule}
    assert rows == written


# -- sections and lists -----------------------------------------------------------------------------------------------


def allows(content: Dict[str, Any], method: str, *arguments: Any) -> bool:
    return bool(getattr(enforcer_of(content), f"check_{method}")(*arguments))


ASKED = {
    "network": ("network", ("example.com", "https")),
    "filesystem": ("filesystem", ("/tmp/x", "read")),
    "tools": ("tool", ("x",)),
    "api": ("api", ("x",)),
    "models": ("model", ("x",)),
    "capabilities": ("capability", ("x",)),
}
OPEN: Dict[str, Any] = {"permissions": {"network": {}, "filesystem": {}}}
LIST = ["nothing"]


@pytest.mark.parametrize(
    ("content", "closed"),
    [
        ({"permissions": {"network": {"blockedDomains": LIST}}}, ["network"]),
        ({"permissions": {"filesystem": {"denied_paths": LIST}}}, ["filesystem"]),
        ({"permissions": {"tools": {"allow": []}}}, ["tools"]),
        ({"permissions": {"api": {"Deny": LIST}}}, ["api"]),
        ({"permissions": {"tools": {" blocked_tools": LIST}}}, ["tools"]),
        ({"permissions": {"tools": {"\ufeffblocked_tools": LIST}}}, ["tools"]),
        ({"permissions": {"network": {"\uff42locked_domains": LIST}}}, ["network"]),
        ({"agent": {"models": {"blocked_models": LIST}}}, ["models"]),
        ({"agent": {"capabilities": {"blocked_tools": LIST}}}, ["tools", "capabilities"]),
        ({"permissions": {"blocked_tools": LIST}}, ["network", "filesystem", "tools", "api"]),
        ({"permissions": {"netwrok": {"blocked_domains": LIST}}}, ["network", "filesystem", "tools", "api"]),
        ({"permissions": {"network": {"rules": [{"deny": LIST}]}}}, ["network"]),
        ({"agent": {"denied_models": LIST}}, ["tools", "models", "capabilities"]),
        ({"permissions": {"tools": {"blocked_tool": None}}}, []),
        ({"permissions": {"tools": {"blocked_tool": "shell", "deny": True, "notes": LIST}}}, []),
        ({"rate_limits": {"denied_users": LIST, "requests": {"allowed_users": LIST}}}, []),
        ({"denied_tools": LIST, "elsewhere": {"denied_tools": LIST}}, []),
    ],
)
def test_an_unknown_list_closes_what_is_around_it(content: Dict[str, Any], closed: List[str]) -> None:
    """A list that may block something is not slipped by a name that this library does not know."""
    whole = {**OPEN, **content}
    whole["permissions"] = {**OPEN["permissions"], **content.get("permissions", {})}
    enforcer = enforcer_of(whole)
    rules = {name: getattr(enforcer, f"check_{method}")(*asked).rule for name, (method, asked) in ASKED.items()}
    assert rules == {name: "policy.unknown_key" if name in closed else None for name in ASKED}
    assert bool(enforcer.check_rate_limit("requests"))


def test_an_unknown_list_behind_many_unknown_keys() -> None:
    """It closes its section also where it is too far down to be named in a warning."""
    unknown: Dict[str, Any] = {f"x{number}": 1 for number in range(200)}
    assert not allows(permissions(tools={**unknown, "block": ["shell"]}), "tool", "shell")


def test_hosts_are_domains_by_another_name() -> None:
    """``allowed_hosts`` and ``blocked_hosts`` are enforced; where both names are given both must allow."""
    hosts = permissions(network={"allowed_hosts": ["*.example.com"], "blocked_hosts": ["billing.example.com"]})
    assert allows(hosts, "network", "api.example.com", "https")
    assert not allows(hosts, "network", "example.org", "https")
    assert not allows(hosts, "network", "BILLING.example.com.", "https")
    both = permissions(network={"allowed_hosts": ["a.com", "b.com"], "allowed_domains": ["b.com", "c.com"]})
    assert [name for name in ("a.com", "b.com", "c.com") if allows(both, "network", name, "https")] == ["b.com"]
    mixed = permissions(network={"allowed_domains": ["*"], "blocked_hosts": ["10.0.0.1"]})
    decision = enforcer_of(mixed).check_network("64:ff9b::a00:1", "https")
    assert decision.rule == "network.blocked"
    assert "permissions.network.blocked_hosts" in decision.reason
    with pytest.raises(PolicyIntegrityError, match="allowed_hosts"):
        enforcer_of(permissions(network={"allowed_hosts": ["https://example.com/"]}))


def test_absent_sections() -> None:
    """Network and filesystem deny when they are absent, everything else allows."""
    assert not allows({}, "network", "example.com", "https")
    assert not allows({}, "filesystem", "/x", "read")
    for method, arguments in [
        ("tool", ("x",)), ("api", ("x",)), ("model", ("x",)), ("model", ("x", "y")), ("capability", ("x",)),
        ("rate_limit", ("requests", 10**9)), ("rate_limit", ("tokens", 10**9)),
    ]:  # fmt: skip
        assert allows({}, method, *arguments)
        assert allows({"permissions": None, "agent": {}, "rate_limits": {"requests": {}}}, method, *arguments)


@pytest.mark.parametrize("nothing", [{}, {"allowed_domains": None}, {"enabled": None, "blocked_domains": []}])
def test_a_section_without_lists_does_not_restrict(nothing: Dict[str, Any]) -> None:
    """A section that is there is enabled unless it says otherwise; an absent or null list restricts nothing."""
    assert allows(permissions(network=nothing), "network", "example.com", "http")


def test_empty_lists() -> None:
    """An empty list of what is allowed denies all; of models it allows every model of the allowed providers."""
    assert not allows(permissions(network={"allowed_domains": []}), "network", "example.com", "https")
    assert not allows(permissions(filesystem={"allowed_paths": []}), "filesystem", "/x", "read")
    assert not allows(permissions(filesystem={"allowed_extensions": []}), "filesystem", "/x.csv", "read")
    assert not allows(permissions(tools={"allowed_tools": []}), "tool", "x")
    assert not allows(permissions(api={"allowed_services": []}), "api", "x")
    assert not allows({"agent": {"capabilities": {"allowed_capabilities": []}}}, "capability", "x")
    assert not allows({"agent": {"models": {"allowed_providers": []}}}, "model", "x", "y")
    models = {"agent": {"models": {"allowed_models": [], "allowed_providers": ["p"]}}}
    assert allows(models, "model", "x", "p")
    assert not allows(models, "model", "x", "q")
    assert allows({"agent": {"models": {"allowed_models": []}}}, "model", "x")
    assert not allows({"rate_limits": {"requests": {"max_per_hour": 0}}}, "rate_limit", "requests")
    for section in ({"blocked_tools": []}, {"blocked_tools": None}):
        assert allows(permissions(tools=section), "tool", "x")


def test_blocked_before_allowed() -> None:
    """What both lists hold is blocked, and the decision says by what."""
    content = permissions(
        network={"allowed_domains": ["x.org"], "blocked_domains": ["*"]},
        filesystem={"allowed_paths": ["/x"], "blocked_paths": ["/*"]},
        tools={"allowed_tools": ["x"], "blocked_tools": ["*"]},
        api={"allowed_services": ["x"], "blocked_services": ["x"]},
    )
    content["agent"] = {
        "models": {"allowed_models": ["x"], "denied_models": ["x"], "allowed_providers": ["p"]},
        "capabilities": {"allowed_capabilities": ["x"], "denied_capabilities": ["x"]},
    }
    enforcer = enforcer_of(content)
    assert enforcer.check_network("x.org", "https").rule == "network.blocked"
    assert enforcer.check_filesystem("/x", "read").rule == "fs.blocked"
    assert enforcer.check_tool("x").rule == "tool.blocked"
    assert enforcer.check_api("x").rule == "api.blocked"
    assert enforcer.check_model("x", "q").rule == "model.blocked"
    assert enforcer.check_capability("x").rule == "capability.blocked"


def test_order_of_the_network_rules() -> None:
    """Disabled before TLS, TLS before blocked, blocked before allowed."""
    section: Dict[str, Any] = {
        "enabled": False,
        "require_tls": True,
        "blocked_domains": ["x.org"],
        "allowed_domains": [],
    }
    for change, rule in [({}, "disabled"), ({"enabled": True}, "tls_required"), ({"require_tls": False}, "blocked"),
                         ({"blocked_domains": []}, "not_allowed")]:  # fmt: skip
        section.update(change)
        assert enforcer_of(permissions(network=section)).check_network("x.org", "ftp").rule == f"network.{rule}"


@pytest.mark.parametrize("protocol", ["https", "WSS", "grpcs", "ftps", "ldaps"])
def test_protocols_with_tls(protocol: str) -> None:
    """These pass ``require_tls``."""
    assert allows(permissions(network={"require_tls": True}), "network", "x.org", protocol)


@pytest.mark.parametrize("protocol", ["http", "ws", "", "https ", "https://", "ssh", "tcp", None, 443, "\uff48ttps"])
def test_protocols_without_tls(protocol: Any) -> None:
    """An unknown protocol is taken for one without TLS."""
    decision = enforcer_of(permissions(network={"require_tls": True})).check_network("x.org", protocol)
    assert decision.rule == "network.tls_required"


def test_a_decision_says_what_allowed_it() -> None:
    """By which entry of which list, or that nothing restricts it."""
    enforcer = enforcer_of(permissions(network=NETWORK, filesystem={}, tools=TOOLS))
    assert enforcer.check_tool("read_x") == Decision(
        True, None, "allowed by 'read_*' in permissions.tools.allowed_tools"
    )
    assert enforcer.check_network("a.example.com", "ws").reason == (
        "allowed by '*.example.com' in permissions.network.allowed_domains"
    )
    assert enforcer.check_filesystem("/x", "read").reason == "allowed: the policy does not restrict it"
    assert enforcer.check_rate_limit("requests").reason == "allowed: within the policy's rate limits"
    assert PolicyEnforcer(None).check_tool("x").reason == "allowed: the workspace has no policy"


def test_an_entry_that_names_a_directory_alone() -> None:
    """The reason tells how what is under it would be allowed."""
    decision = enforcer_of(permissions(filesystem={"allowed_paths": ["/srv/data/"]})).check_filesystem(
        "/srv/data/x", "read"
    )
    assert decision.rule == "fs.not_allowed"
    assert decision.reason.endswith("'/srv/data' there is that path alone, and '/srv/data/*' would be what is under it")


# -- what cannot be understood ----------------------------------------------------------------------------------------

ODD: List[Any] = [None, 5, 1.5, b"x", [], {}, object(), "", "\0", "\ud800", "x" * 100000, "a\nb", "\u200b"]


@pytest.mark.parametrize("value", ODD, ids=[repr(value)[:20] for value in range(len(ODD))])
def test_subjects_that_are_none(value: Any) -> None:
    """Whatever is asked, a check answers; what cannot be compared is refused, and never quoted whole."""
    enforcer = enforcer_of(
        {
            **permissions(
                network=NETWORK, filesystem=FILES, tools={"blocked_tools": ["x"]}, api={"blocked_services": ["x"]}
            ),
            "agent": {"models": {"denied_models": ["x"]}, "capabilities": {"denied_capabilities": ["x"]}},
        }
    )
    decisions = [
        enforcer.check_network(value, "https"),
        enforcer.check_filesystem(value, value),
        enforcer.check_tool(value),
        enforcer.check_api(value),
        enforcer.check_model(value, value),
        enforcer.check_capability(value),
    ]
    assert [decision.rule for decision in decisions] == [
        "network.not_allowed", "fs.not_allowed", "tool.not_allowed", "api.not_allowed", "model.not_allowed",
        "capability.not_allowed",
    ]  # fmt: skip
    assert all(decision.reason.isprintable() and len(decision.reason) < 600 for decision in decisions)
    assert enforcer.check_network("a.example.com", value)
    for other, rule in ((PolicyEnforcer(None), None), (PolicyEnforcer.unavailable("x"), "policy.unavailable")):
        assert other.check_tool(value).rule == other.check_network(value, value).rule == rule
        assert other.check_filesystem(value, value).rule == other.check_model(value, value).rule == rule


def test_a_provider_that_is_no_name() -> None:
    """It is not allowed."""
    enforcer = enforcer_of({"agent": {"models": {"allowed_providers": ["*"]}}})
    assert enforcer.check_model("x", "p")
    for value in (None, 5, "", "p\0", "\u200b"):
        assert enforcer.check_model("x", value).rule == "model.provider_not_allowed"  # type: ignore[arg-type]


def test_a_url_given_for_a_host_is_not_repeated() -> None:
    """A password or a token in it reaches no reason."""
    enforcer = enforcer_of(permissions(network={}))
    urls = [
        "https://me:hunter2@example.com/?token=hunter2", "me:hunter2@example.com", "https://me:hun/ter2@example.com",
        "https://example.com/hooks/hunter2", "example.com/#hunter2", "example.com?hunter2", "https://example.com/x@ter2",
    ]  # fmt: skip
    for url in urls:
        for one in (enforcer, PolicyEnforcer.unavailable("x"), enforcer_of({})):
            decision = one.check_network(url, "https")
            assert not decision
            assert "ter2" not in decision.reason
            assert ("'example.com...'" in decision.reason) is ("@" not in url)


# -- construction and violations --------------------------------------------------------------------------------------


def test_wrong_arguments() -> None:
    """A policy that is none, a callback that cannot be called, an unknown kind or a wrong amount."""
    with pytest.raises(ConfigurationError, match="from_content"):
        PolicyEnforcer({"permissions": {}})  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="on_violation"):
        PolicyEnforcer(None, False, 5)  # type: ignore[arg-type]
    for enforcer in (PolicyEnforcer(None), PolicyEnforcer.unavailable("x"), enforcer_of({})):
        for kind, amount in [
            ("call", 1),
            ([], 1),
            ("tokens", -1),
            ("tokens", 1.5),
            ("tokens", True),
            ("tokens", None),
            ("tokens", 10**5000),
            ("tokens", -(10**5000)),
            ("tokens", 2**53),
        ]:
            with pytest.raises(ConfigurationError, match=r"kind|amount"):
                enforcer.check_rate_limit(kind, amount)  # type: ignore[arg-type]


def test_names_of_rates() -> None:
    """The documentation's ``request`` and ``token`` count with ``requests`` and ``tokens``."""
    enforcer = enforcer_of({"rate_limits": {"requests": {"max_per_hour": 2}, "tokens": {"max_per_hour": 5}}})
    enforcer.enforce_rate_limit("request")
    enforcer.enforce_rate_limit("requests")
    assert enforcer.check_rate_limit("request").rule == "rate_limit.requests_per_hour"
    enforcer.enforce_rate_limit("token", 5)
    assert enforcer.check_rate_limit("tokens").rule == "rate_limit.tokens_per_hour"


@pytest.mark.parametrize(
    ("content", "method", "subject", "rule"),
    [
        ({"denied_tools": ["shell"], "require_tool_approval": True}, "tool", "shell", "tool.blocked"),
        ({"allowed_tools": ["search"], "require_tool_approval": True}, "tool", "shell", "tool.not_allowed"),
        ({"allowed_tools": ["shell"], "require_tool_approval": True}, "tool", "shell", "tool.approval_required"),
        ({"denied_capabilities": ["*"], "require_approval": ["*"]}, "capability", "x", "capability.blocked"),
        ({"require_approval": ["SEND"]}, "capability", "send", "capability.approval_required"),
        ({"require_approval": []}, "capability", "send", None),
    ],
)
def test_denying_comes_before_asking(content: Dict[str, Any], method: str, subject: str, rule: Optional[str]) -> None:
    """What is denied anyway is not asked about. A name that needs an approval matches as a blocked one does."""
    decision = getattr(enforcer_of({"agent": {"capabilities": content}}), f"check_{method}")(subject)
    assert (decision.rule, bool(decision)) == (rule, rule is None)


def test_a_policy_made_by_hand() -> None:
    """Its content is checked when an enforcer is made of it."""
    policy = Policy(
        policy_id="p", workspace_id="w", version=1, hash="", content={"permissions": {"tools": {"allowed_tools": "x"}}}
    )
    with pytest.raises(PolicyIntegrityError, match=r"permissions\.tools\.allowed_tools"):
        PolicyEnforcer(policy)


def test_a_path_that_cannot_be_resolved_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry at a home directory that is not known refuses the policy; it is not dropped."""
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    with pytest.raises(PolicyIntegrityError, match=r"permissions\.filesystem: '~/keys' begins at the home directory"):
        enforcer_of(permissions(filesystem={"blocked_paths": ["~/keys"]}))


def test_on_violation() -> None:
    """Called in the asking thread with the error that is raised, also for checks; its own failure changes nothing."""
    seen: List[Tuple[str, PolicyViolationError]] = []

    def note(error: PolicyViolationError) -> None:
        seen.append((threading.current_thread().name, error))
        raise RuntimeError("a bug of the user's")

    enforcer = enforcer_of(permissions(tools=TOOLS), on_violation=note)
    with pytest.raises(PolicyViolationError) as caught:
        enforcer.enforce_tool("x")
    assert not enforcer.check_tool("y")
    assert enforcer.check_tool("read_x")
    assert [error.rule for _, error in seen] == ["tool.not_allowed"] * 2
    assert seen[0] == (threading.current_thread().name, caught.value)
    assert "'y'" in seen[1][1].reason


def test_a_failing_callback_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """With its traceback, so that the user finds it."""

    def fail(error: PolicyViolationError) -> None:
        raise RuntimeError("a bug of the user's")

    with caplog.at_level(logging.ERROR, logger="sekuire.policy"):
        enforcer_of(permissions(tools=TOOLS), on_violation=fail).check_tool("x")
    assert "on_violation failed" in caplog.text
    assert "a bug of the user's" in caplog.text


def test_warn_only_is_refused_with_a_pinned_key() -> None:
    """Whoever pins a key wants its policy enforced."""
    policy = attrs.evolve(Policy.from_content({}), origin="pinned")
    with pytest.raises(ConfigurationError, match="warn_only: is refused where a policy key is pinned"):
        PolicyEnforcer(policy, True)
    assert PolicyEnforcer(policy).check_tool("x")


def test_what_an_enforcer_tells_of_itself() -> None:
    """Policy, mode and limiter; none of them where there is no policy."""
    policy = Policy.from_content({}, workspace_id="w")
    enforcer = PolicyEnforcer(policy, True)
    assert (enforcer.policy, enforcer.warn_only) == (policy, True)
    assert enforcer.limiter is not None
    assert enforcer.limiter.namespace == "w"
    none = PolicyEnforcer(None)
    assert (none.policy, none.warn_only, none.limiter) == (None, False, None)
    assert none.check_rate_limit("requests", 5)
    limiter = RateLimiter(namespace="w")
    assert PolicyEnforcer(None, limiter=limiter).limiter is limiter


def test_a_limiter_outlives_its_policy() -> None:
    """What was counted under one policy counts under the next, whose limit holds from now on."""
    limiter = RateLimiter(namespace="w")
    first = enforcer_of(rate("requests", "minute", 5), limiter=limiter)
    assert [bool(first.check_rate_limit("requests")) for _ in range(4)] == [True] * 4
    second = enforcer_of(rate("requests", "minute", 3), limiter=limiter)
    assert not second.check_rate_limit("requests")
    third = enforcer_of(rate("requests", "minute", 5), limiter=limiter)
    assert [bool(third.check_rate_limit("requests")) for _ in range(2)] == [True, False]


def test_a_rate_limit_says_when_to_try_again() -> None:
    """``retry_after`` is in the decision and in the error; None where waiting does not help."""
    clock = Clock()
    limiter = limiter_at(clock)
    enforcer = enforcer_of(rate("tokens", "minute", 10), limiter=limiter)
    enforcer.enforce_rate_limit("tokens", 10)
    clock.now += 20
    with pytest.raises(PolicyViolationError) as caught:
        enforcer.enforce_rate_limit("tokens", 5)
    assert caught.value.retry_after == pytest.approx(40.0)
    assert enforcer.check_rate_limit("tokens", 5).retry_after == pytest.approx(40.0)
    assert enforcer.check_rate_limit("tokens", 11).retry_after is None


def test_decisions_are_values() -> None:
    """Frozen, comparable, true if allowed."""
    assert Decision(True) == Decision(True)
    assert bool(Decision(True)) is True
    assert bool(Decision(False, "x.y", "because", 1.0)) is False
    with pytest.raises(AttributeError):
        Decision(True).allowed = False  # type: ignore[misc]
