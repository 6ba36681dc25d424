"""Ask the rules of a policy: whether they can be enforced, and what they allow. The library's own rules answer."""

from __future__ import annotations

from typing import Any, List, Mapping, NamedTuple, Optional, Tuple

from ...errors import PolicyIntegrityError
from ...policy.document import Policy
from ...policy.enforcer import PolicyEnforcer

__all__ = ["KINDS", "Verdict", "decide", "find_problems"]

#: What can be asked about: kind, what the second value is, and its choices (none: free text).
KINDS: Mapping[str, Tuple[str, Tuple[str, ...]]] = {
    "tool": ("", ()),
    "capability": ("", ()),
    "network": ("protocol", ("https", "http", "wss", "ws")),
    "filesystem": ("operation", ("read", "write", "delete", "execute")),
    "api": ("", ()),
    "model": ("provider", ()),
}


class Verdict(NamedTuple):
    """Say what a policy answers."""

    is_allowed: bool
    rule: Optional[str]
    reason: str


def find_problems(content: Mapping[str, Any]) -> Tuple[str, List[str]]:
    """Return why a content cannot be enforced, or nothing, and warnings."""
    try:
        policy = Policy.from_content(content)
        PolicyEnforcer(policy)
    except PolicyIntegrityError as error:
        return str(error), []
    return "", list(policy.warnings)


def decide(content: Optional[Mapping[str, Any]], kind: str, name: str, second: str) -> Verdict:
    """Ask a content, or None where the workspace has no policy.

    :raises PolicyIntegrityError: the content cannot be enforced.
    """
    enforcer = PolicyEnforcer(None if content is None else Policy.from_content(content))
    if kind == "network":
        decision = enforcer.check_network(name, second or "https")
    elif kind == "filesystem":
        decision = enforcer.check_filesystem(name, second or "read")
    elif kind == "model":
        decision = enforcer.check_model(name, second or None)
    elif kind == "api":
        decision = enforcer.check_api(name)
    elif kind == "capability":
        decision = enforcer.check_capability(name)
    else:
        decision = enforcer.check_tool(name)
    return Verdict(decision.allowed, decision.rule, decision.reason)
