"""Define what a decision is, and word it: rules, their messages, and how a subject is shown."""

from __future__ import annotations

import os
import re
from typing import Mapping, Optional

import attrs

from .matching import Unreadable, path_text

__all__ = ["MESSAGES", "TLS_PROTOCOLS", "Decision"]

#: Every rule's id and its message. A subject that cannot be compared with any entry is refused by ``...not_allowed``,
#: with the message under the empty key.
MESSAGES: Mapping[str, str] = {
    "network.missing": "{subject} is refused: the policy has no permissions.network",
    "network.disabled": "{subject} is refused: permissions.network.enabled is false",
    "network.tls_required": "{subject} by {protocol} is refused: permissions.network.require_tls is true",
    "network.blocked": "{subject} is refused: {entry} in {list} matches it",
    "network.not_allowed": "{subject} is refused: no entry of {list} matches it",
    "fs.missing": "{operation} {subject} is refused: the policy has no permissions.filesystem",
    "fs.disabled": "{operation} {subject} is refused: permissions.filesystem.enabled is false",
    "fs.blocked": "{operation} {subject} is refused: {entry} in {list} matches it",
    "fs.not_allowed": "{operation} {subject} is refused: no entry of {list} matches it",
    "fs.ext": "{operation} {subject} is refused: {list} does not hold its extension",
    "tool.blocked": "tool {subject} is refused: {entry} in {list} matches it",
    "tool.not_allowed": "tool {subject} is refused: no entry of {list} matches it",
    "tool.approval_required": "tool {subject} needs a person's approval: {list} is true",
    "api.blocked": "service {subject} is refused: {entry} in {list} matches it",
    "api.not_allowed": "service {subject} is refused: no entry of {list} matches it",
    "model.blocked": "model {subject} is refused: {entry} in {list} matches it",
    "model.not_allowed": "model {subject} is refused: no entry of {list} matches it",
    "model.provider_not_allowed": "model {subject} of {provider} is refused: no entry of {list} matches the provider",
    "capability.blocked": "capability {subject} is refused: {entry} in {list} matches it",
    "capability.not_allowed": "capability {subject} is refused: no entry of {list} matches it",
    "capability.approval_required": "capability {subject} needs a person's approval: {entry} in {list} matches it",
    "rate_limit.requests_per_minute": "{amount} more would exceed {limit} requests a minute",
    "rate_limit.requests_per_hour": "{amount} more would exceed {limit} requests an hour",
    "rate_limit.tokens_per_minute": "{amount} more would exceed {limit} tokens a minute",
    "rate_limit.tokens_per_hour": "{amount} more would exceed {limit} tokens an hour",
    "policy.unavailable": "{subject} is refused: {problem}",
    "policy.unknown_key": "{noun} {subject} is refused: {key} in the policy is unknown, and may block it",
    "": "{subject} is refused: {problem}",
}

#: Protocols that ``require_tls`` admits, in lower case. Any other counts as one without TLS.
TLS_PROTOCOLS = frozenset(
    [
        "https", "h2", "h3", "http3", "wss", "tls", "ssl", "quic", "dtls", "grpcs", "ftps", "smtps", "imaps", "pop3s",
        "ldaps", "mqtts", "amqps", "rediss", "nntps", "ircs", "sips", "doh", "dot", "xmpps", "stuns", "turns", "coaps",
    ]
)  # fmt: skip


@attrs.frozen(slots=True)
class Decision:
    """Say whether something is allowed. A decision is true in a condition if it allows. ::

        policy = Policy.from_content({"permissions": {"tools": {"blocked_tools": ["shell"]}}})
        decision = PolicyEnforcer(policy).check_tool("shell")
        if not decision:
            print(decision.rule)  # tool.blocked

    ``rule`` is the id of the rule that refuses, or that would refuse without ``warn_only``; it is None if nothing
    refuses. ``reason`` is a sentence for people. ``retry_after`` is the number of seconds until a rate limit may admit
    it; it is None if that is unknown or never.
    """

    allowed: bool
    rule: Optional[str] = None
    reason: str = ""
    retry_after: Optional[float] = None
    #: What was asked about, as far as it may be shown. None if it is allowed, or is not a single thing.
    target: Optional[str] = attrs.field(default=None, eq=False, repr=False)

    def __bool__(self) -> bool:
        return self.allowed

    @property
    def needs_approval(self) -> bool:
        """Return True if it is refused only until a person approves it."""
        return self.rule in _APPROVALS


#: The rules that refuse until a person approves.
_APPROVALS = ("tool.approval_required", "capability.approval_required")

NO_POLICY = Decision(True, None, "allowed: the workspace has no policy")
UNRESTRICTED = Decision(True, None, "allowed: the policy does not restrict it")
UNCOUNTED = Decision(True, None, "allowed: within the policy's rate limits")


def allow(entry: str, list_name: str) -> Decision:
    """Return a decision that allows, because ``entry`` of a list matches."""
    return Decision(True, None, f"allowed by {quote(entry)} in {list_name}")


def deny(rule: str, *, subject: str, **facts: object) -> Decision:
    """Return a decision by which ``rule`` refuses ``subject``. ``facts`` fill in the rule's message."""
    target = subject[1:-1] if subject[:1] in ("'", '"') and subject[-1:] == subject[:1] else subject
    return Decision(False, rule, MESSAGES[rule].format(subject=subject, **facts), target=target)


def refuse(rule: str, subject: str, problem: str) -> Decision:
    """Return a decision that refuses a ``subject`` which cannot be checked, and says why."""
    return Decision(False, rule, MESSAGES[""].format(subject=subject, problem=problem))


# -- how a subject is shown -------------------------------------------------------------------------------------------


def show_host(value: object) -> str:
    """Quote a host. Of a URL given by mistake leave out what may be secret: a password, its path and its query."""
    if not isinstance(value, str) or not set("@?#/\\") & set(value):
        return quote(value)
    if "@" in value:
        return "'...@...'"
    return quote(re.split(r"[/\\?#]", value.partition("://")[2] or value)[0] + "...")


def show_path(value: object) -> str:
    """Quote a path. Of a URL given by mistake show only what :func:`show_host` shows."""
    is_url = isinstance(value, str) and "://" in value
    return show_host(value) if is_url else quote(value)


def quote(value: object) -> str:
    """Return what was asked for in the form of a reason: escaped, on one line, cut."""
    if isinstance(value, (bytes, os.PathLike)):
        try:
            value = path_text(value)
        except Unreadable:
            pass
    text = repr(value) if isinstance(value, str) or value is None else f"of type {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:199]}…"
