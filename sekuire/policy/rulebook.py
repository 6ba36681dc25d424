"""Decide by the lists and switches of one policy. Pure: no counting, no callback, no log line."""

from __future__ import annotations

import os
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import attrs

from ..errors import PolicyIntegrityError
from .decision import (
    NO_POLICY,
    TLS_PROTOCOLS,
    UNRESTRICTED,
    Decision,
    allow,
    deny,
    quote,
    refuse,
    show_host,
    show_path,
)
from .document import Policy, Rate, Rules, read_rules
from .matching import Domains, Extensions, Names, Paths, Unreadable, name_problem, read_host, read_path

__all__ = ["BothRulebooks", "LocalRules", "Rulebook"]

#: Why a list refuses: the end of the rule's id, the entry that matches, and the list's path in the policy.
_Refusal = Tuple[str, str, str]

PathLike = Union[str, bytes, "os.PathLike[str]", "os.PathLike[bytes]"]

#: What a rule's id begins with → what its subject is called.
_NOUNS = {"tool": "tool", "api": "service", "model": "model", "capability": "capability"}
#: How a subject is shown that may be a URL with a secret in it.
_SHOWN = {"host": show_host, "path": show_path}


class _Lists:
    """Search the lists of what is blocked and what is allowed, for one kind of subject.

    :param kind: :class:`~sekuire.policy.matching.Names`, ``Domains`` or ``Paths``.
    :param sections: each part of the rules that has such lists, its path in the policy, and the names of its list of
        what is blocked and of its list of what is allowed.
    """

    __slots__ = ("allowed", "blocked", "is_empty")

    def __init__(self, kind: Any, *sections: Tuple[Any, str, str, str]) -> None:
        #: Each compiled list with its path.
        self.blocked: List[Tuple[Any, str]] = []
        self.allowed: List[Tuple[Any, str]] = []
        for section, where, blocked, allowed in sections:
            entries: Optional[Tuple[str, ...]] = getattr(section, blocked)
            if entries:
                name = f"{where}.{blocked}"
                self.blocked.append((kind({entry: quote(entry) for entry in entries}, generous=True), name))
            entries = getattr(section, allowed)
            if entries is not None:
                name = f"{where}.{allowed}"
                self.allowed.append((kind({entry: allow(entry, name) for entry in entries}), name))
        self.is_empty = not self.blocked and not self.allowed

    def search(self, forms: Sequence[Any]) -> Union[Decision, _Refusal]:
        """Return the decision that allows, or why a list refuses.

        :param forms: the readings of one subject. A list of what is blocked refuses any of them, and a list of what is
            allowed must hold all of them.
        """
        for entries, name in self.blocked:
            for form in forms:
                entry = entries.find(form)
                if entry is not None:
                    return "blocked", entry, name
        decision = UNRESTRICTED
        for entries, name in self.allowed:
            for form in forms:
                found = entries.find(form)
                if found is None:
                    return "not_allowed", "", name
                decision = found
        return decision


class Rulebook:
    """Answer whether one policy allows something. ::

        rulebook = Rulebook(Policy.from_content({"permissions": {"tools": {"blocked_tools": ["shell"]}}}))
        print(rulebook.tool("shell").rule)  # tool.blocked

    Any thread may ask: nothing changes after construction. Links, the home and the working directory in lists of paths
    are resolved at construction.

    :param policy: the policy, or None if the workspace has none: everything is allowed.
    :param problem: why no policy could be loaded. With it everything is refused by ``policy.unavailable``.
    :param is_local: True for the rules of a manifest, in which a section that is not there restricts nothing.
    :raises PolicyIntegrityError: an entry for paths cannot be resolved on this machine, or the policy was made by hand
        and an enforced part of it is wrong.
    """

    def __init__(self, policy: Optional[Policy], problem: Optional[str] = None, *, is_local: bool = False) -> None:
        self.policy = policy
        self.is_local = is_local
        self.problem = problem
        self.rates: Dict[str, Rate] = {}
        #: True if :meth:`general` has nothing to say. It spares the most frequent questions a call.
        self._has_lists_only = False
        if policy is not None:
            self._compile(read_rules(policy.content)[0])

    def _compile(self, rules: Rules) -> None:
        capabilities, tools, models = rules.capabilities, rules.tools, rules.models
        self.rates = {"requests": rules.requests, "tokens": rules.tokens}
        self._closed = rules.closed
        self._has_lists_only = not rules.closed
        self._network_section = rules.network
        if rules.network is not None:
            where = "permissions.network"
            self._domains = _Lists(
                Domains,
                (rules.network, where, "blocked_domains", "allowed_domains"),
                (rules.network, where, "blocked_hosts", "allowed_hosts"),
            )
        self._filesystem_section = rules.filesystem
        if rules.filesystem is not None:
            self._paths = _compile_paths(rules.filesystem)
            known = rules.filesystem.allowed_extensions
            self._extensions = None if known is None else Extensions(known)
        self._tools = _Lists(
            Names,
            (tools, "permissions.tools", "blocked_tools", "allowed_tools"),
            (capabilities, "agent.capabilities", "denied_tools", "allowed_tools"),
        )
        self._services = _Lists(Names, (rules.api, "permissions.api", "blocked_services", "allowed_services"))
        # Documented: an empty list of models allows every model of the allowed providers.
        models = attrs.evolve(models, allowed_models=models.allowed_models or None)
        self._named_models = frozenset(one for one in models.allowed_models or () if "*" not in one)
        self._models = _Lists(Names, (models, "agent.models", "denied_models", "allowed_models"))
        self._provider_list = "agent.models.allowed_providers"
        providers = models.allowed_providers
        self._providers: Optional[Names[Decision]] = (
            None if providers is None else Names({one: allow(one, self._provider_list) for one in providers})
        )
        self._capabilities = _Lists(
            Names, (capabilities, "agent.capabilities", "denied_capabilities", "allowed_capabilities")
        )
        self._asks_for_tools = capabilities.require_tool_approval
        asked = capabilities.require_approval
        self._asked_capabilities: Optional[Names[str]] = (
            Names({entry: quote(entry) for entry in asked}, generous=True) if asked else None
        )

    # -- names --

    def tool(self, name: str) -> Decision:
        """Decide on a tool."""
        general = None if self._has_lists_only else self.general("tool", name, "tools", "capabilities")
        # Not "or": a decision that refuses is false.
        decision = self._names("tool", name, self._tools) if general is None else general
        if general is None and self._asks_for_tools and decision.allowed:
            return deny("tool.approval_required", subject=quote(name), list="agent.capabilities.require_tool_approval")
        return decision

    def api(self, service: str) -> Decision:
        """Decide on the API of a service."""
        general = None if self._has_lists_only else self.general("service", service, "api")
        return self._names("api", service, self._services) if general is None else general

    def capability(self, name: str) -> Decision:
        """Decide on tasks of a capability."""
        general = None if self._has_lists_only else self.general("capability", name, "capabilities")
        decision = self._names("capability", name, self._capabilities) if general is None else general
        if general is None and self._asked_capabilities is not None and decision.allowed:
            entry = self._asked_capabilities.find(name)
            if entry is not None:
                where = "agent.capabilities.require_approval"
                return deny("capability.approval_required", subject=quote(name), entry=entry, list=where)
        return decision

    def model(self, model: str, provider: Optional[str]) -> Decision:
        """Decide on a model and its provider."""
        general = self.general("model", model, "models")
        if general is not None:
            return general
        decision = self._names("model", model, self._models, self._providers is not None)
        if decision.rule == "model.blocked" or self._providers is None:
            return decision
        if provider is None and decision.allowed and model in self._named_models:
            # Documented: a model that the policy names is allowed by its name alone. A pattern names no model.
            return decision
        # Names first: the name of the provider must not decide whether the model is blocked.
        found = None
        if isinstance(provider, str) and not name_problem(provider):
            found = self._providers.find(provider)
        if found is None:
            named = "a provider that was not named" if provider is None else f"provider {quote(provider)}"
            rule = "model.provider_not_allowed"
            return deny(rule, subject=quote(model), provider=named, list=self._provider_list)
        return found if decision is UNRESTRICTED else decision

    def _names(self, prefix: str, name: object, lists: _Lists, is_restricted: bool = False) -> Decision:
        if isinstance(name, str):
            if lists.is_empty and not is_restricted:
                return UNRESTRICTED
            problem = name_problem(name)
            if not problem:
                found = lists.search((name,))
                return _deny_by(prefix, found, subject=quote(name)) if isinstance(found, tuple) else found
            problem = f"it {problem}"
        else:
            problem = f"it is a {type(name).__name__}, not a str"
        return refuse(f"{prefix}.not_allowed", f"{_NOUNS[prefix]} {quote(name)}", problem)

    # -- network and filesystem --

    def network(self, domain: str, protocol: str) -> Decision:
        """Decide on reaching a host by a protocol."""
        general = self.general("host", domain, "network")
        if general is not None:
            return general
        shown = show_host(domain)
        section = self._network_section
        if section is None:
            return UNRESTRICTED if self.is_local else deny("network.missing", subject=shown)
        if not section.enabled:
            return deny("network.disabled", subject=shown)
        if section.require_tls and not (isinstance(protocol, str) and protocol.lower() in TLS_PROTOCOLS):
            return deny("network.tls_required", subject=shown, protocol=quote(protocol))
        try:
            forms = read_host(domain)
        except Unreadable as error:
            return refuse("network.not_allowed", f"host {shown}", str(error))
        found = self._domains.search(forms)
        return _deny_by("network", found, subject=shown) if isinstance(found, tuple) else found

    def filesystem(self, path: PathLike, operation: str) -> Decision:
        """Decide on a path. Follow its links in the file system."""
        general = self.general("path", path, "filesystem")
        if general is not None:
            return general
        section = self._filesystem_section
        done, shown = quote(operation), show_path(path)
        if isinstance(operation, str) and operation.isidentifier() and len(operation) <= 40:
            done = operation
        if section is None:
            return UNRESTRICTED if self.is_local else deny("fs.missing", operation=done, subject=shown)
        if not section.enabled:
            return deny("fs.disabled", operation=done, subject=shown)
        try:
            subject = read_path(path)
        except Unreadable as error:
            return refuse("fs.not_allowed", f"{done} {shown}", str(error))
        found = self._paths.search((subject,))
        if isinstance(found, tuple):
            decision = _deny_by("fs", found, operation=done, subject=shown)
            hint = self._paths.allowed[0][0].hint(subject) if found[0] == "not_allowed" else ""
            return attrs.evolve(decision, reason=decision.reason + hint) if hint else decision
        if self._extensions is not None and not self._extensions.holds(subject.real):
            name = "permissions.filesystem.allowed_extensions"
            return deny("fs.ext", operation=done, subject=shown, list=name)
        return found

    # -- before any list --

    def general(self, noun: str, subject: object, *sections: str) -> Optional[Decision]:
        """Return the decision that needs no list, or None if the lists of ``sections`` decide."""
        if self._has_lists_only:
            return None
        if self.policy is not None:
            key = next((self._closed[one] for one in sections if one in self._closed), None)
            if key is None:
                return None
            return deny("policy.unknown_key", noun=noun, subject=_SHOWN.get(noun, quote)(subject), key=key)
        if self.problem is None:
            return NO_POLICY
        return refuse("policy.unavailable", f"{noun} {_SHOWN.get(noun, quote)(subject)}", self.problem)

    def source_of_rate(self, kind: str, limit: int) -> str:
        """Return which policy has the limit that was exceeded, in brackets, where there are several."""
        return ""


class LocalRules(Rulebook):
    """Hold the rules of a manifest or a file, which are asked beside the workspace's policy.

    :param source: what a denial calls them, such as the file's name.
    """

    def __init__(self, policy: Policy, source: str) -> None:
        super().__init__(policy, is_local=True)
        self.source = source


class BothRulebooks:
    """Ask the workspace's policy and local rules. Both must allow. A denial names which of them refuses. ::

        local = LocalRules(Policy.from_content({"permissions": {"tools": {"blocked_tools": ["shell"]}}}), "sekuire.yml")
        print(BothRulebooks(Rulebook(None), local).tool("shell").reason)

    It answers what a :class:`Rulebook` answers. The workspace's policy is asked first.
    """

    def __init__(self, workspace: Rulebook, local: LocalRules) -> None:
        self._workspace = workspace
        self._local = local
        self.policy = workspace.policy
        self.problem = workspace.problem
        kinds = ("requests", "tokens")
        #: The smaller limit of each. A request counts once for both.
        self.rates = {kind: _smaller(workspace.rates.get(kind), local.rates[kind]) for kind in kinds}

    def tool(self, name: str) -> Decision:
        """Decide on a tool."""
        return self._both(self._workspace.tool(name), self._local.tool(name))

    def api(self, service: str) -> Decision:
        """Decide on the API of a service."""
        return self._both(self._workspace.api(service), self._local.api(service))

    def capability(self, name: str) -> Decision:
        """Decide on tasks of a capability."""
        return self._both(self._workspace.capability(name), self._local.capability(name))

    def model(self, model: str, provider: Optional[str]) -> Decision:
        """Decide on a model and its provider."""
        return self._both(self._workspace.model(model, provider), self._local.model(model, provider))

    def network(self, domain: str, protocol: str) -> Decision:
        """Decide on reaching a host by a protocol."""
        return self._both(self._workspace.network(domain, protocol), self._local.network(domain, protocol))

    def filesystem(self, path: PathLike, operation: str) -> Decision:
        """Decide on a path. Follow its links in the file system."""
        return self._both(self._workspace.filesystem(path, operation), self._local.filesystem(path, operation))

    def general(self, noun: str, subject: object, *sections: str) -> Optional[Decision]:
        """Return the decision that needs no list, or None if the lists decide."""
        general = self._workspace.general(noun, subject, *sections)
        # Without a policy of the workspace the local rates count.
        return None if general is NO_POLICY else general

    def source_of_rate(self, kind: str, limit: int) -> str:
        """Return which policy has the limit that was exceeded, in brackets."""
        local = self._local.rates[kind]
        is_local = limit in (local.max_per_minute, local.max_per_hour)
        return f" ({self._local.source if is_local else _WORKSPACE})"

    def _both(self, first: Decision, second: Decision) -> Decision:
        if not first.allowed and (second.allowed or second.needs_approval or not first.needs_approval):
            return attrs.evolve(first, reason=f"{first.reason} ({_WORKSPACE})")
        if not second.allowed:
            # Also where the first one needs an approval: what is denied is not asked about.
            return attrs.evolve(second, reason=f"{second.reason} ({self._local.source})")
        return first if second is UNRESTRICTED else second


#: What a denial calls the policy of the workspace where there are local rules too.
_WORKSPACE = "the workspace's policy"


def _smaller(one: Optional[Rate], other: Rate) -> Rate:
    if one is None:
        return other
    limits = {}
    for name in ("max_per_minute", "max_per_hour"):
        present = [limit for limit in (getattr(one, name), getattr(other, name)) if limit is not None]
        limits[name] = min(present, default=None)
    return Rate(**limits)


def _compile_paths(section: Any) -> _Lists:
    try:
        return _Lists(Paths, (section, "permissions.filesystem", "blocked_paths", "allowed_paths"))
    except Unreadable as error:
        problem = str(error)
    raise PolicyIntegrityError(f"permissions.filesystem: {problem}")


def _deny_by(prefix: str, refusal: _Refusal, **facts: str) -> Decision:
    end, entry, name = refusal
    return deny(f"{prefix}.{end}", entry=entry, list=name, **facts)
