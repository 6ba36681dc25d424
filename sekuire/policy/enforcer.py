"""Decisions: whether a policy allows this tool, host, path, service, model, capability or rate, and by which rule."""

from __future__ import annotations

import os
import re
from typing import Any, Callable, Dict, Mapping, Optional, Tuple, Union

import attrs

from .._internal.logs import get_logger
from ..errors import ConfigurationError, PolicyIntegrityError, PolicyUnavailableError, PolicyViolationError
from .document import Filesystem, Policy, Rate, Rules, read_rules
from .limits import RateLimiter, check_request
from .matching import Domains, Extensions, Names, Paths, Unreadable, name_problem, path_text, read_host, read_path

__all__ = ["MESSAGES", "TLS_PROTOCOLS", "Decision", "PolicyEnforcer"]

log = get_logger("sekuire.policy")

#: Every rule's id and its message. A subject that cannot be compared with any entry is refused by ``...not_allowed``,
#: with the message below the empty key.
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
    "api.blocked": "service {subject} is refused: {entry} in {list} matches it",
    "api.not_allowed": "service {subject} is refused: no entry of {list} matches it",
    "model.blocked": "model {subject} is refused: {entry} in {list} matches it",
    "model.not_allowed": "model {subject} is refused: no entry of {list} matches it",
    "model.provider_not_allowed": "model {subject} of {provider} is refused: no entry of {list} matches the provider",
    "capability.blocked": "capability {subject} is refused: {entry} in {list} matches it",
    "capability.not_allowed": "capability {subject} is refused: no entry of {list} matches it",
    "rate_limit.requests_per_minute": "{amount} more would exceed {limit} requests a minute",
    "rate_limit.requests_per_hour": "{amount} more would exceed {limit} requests an hour",
    "rate_limit.tokens_per_minute": "{amount} more would exceed {limit} tokens a minute",
    "rate_limit.tokens_per_hour": "{amount} more would exceed {limit} tokens an hour",
    "policy.unavailable": "{subject} is refused: {problem}",
    "policy.unknown_key": "{noun} {subject} is refused: {key} in the policy is unknown, and may block it",
    "": "{subject} is refused: {problem}",
}

#: Protocols that ``require_tls`` admits, in lower case. Any other is taken for one without TLS.
TLS_PROTOCOLS = frozenset(
    [
        "https", "h2", "h3", "http3", "wss", "tls", "ssl", "quic", "dtls", "grpcs", "ftps", "smtps", "imaps", "pop3s",
        "ldaps", "mqtts", "amqps", "rediss", "nntps", "ircs", "sips", "doh", "dot", "xmpps", "stuns", "turns", "coaps",
    ]
)  # fmt: skip


@attrs.frozen(slots=True)
class Decision:
    """Whether something is allowed; true in a condition if it is.

    ``rule`` is the id of the rule that refuses it (or would, where a ``warn_only`` enforcer allows it all the same);
    None where nothing refuses it. ``reason`` is a sentence for people. ``retry_after`` is seconds until a rate limit
    may admit it; None where that is unknown or never.
    """

    allowed: bool
    rule: Optional[str] = None
    reason: str = ""
    retry_after: Optional[float] = None
    #: What was asked about, as far as it may be shown; None where it is allowed, or is no single thing.
    target: Optional[str] = attrs.field(default=None, eq=False, repr=False)

    def __bool__(self) -> bool:
        return self.allowed


_NO_POLICY = Decision(True, None, "allowed: the workspace has no policy")
_UNRESTRICTED = Decision(True, None, "allowed: the policy does not restrict it")
_UNCOUNTED = Decision(True, None, "allowed: within the policy's rate limits")

PathLike = Union[str, bytes, "os.PathLike[str]", "os.PathLike[bytes]"]


class _Pair:
    """A list of what is blocked and one of what is allowed, compiled; each None where the policy has none.

    The first gives an entry's text, quoted; the second the decision for an entry, made once.
    """

    __slots__ = ("allowed", "allowed_name", "blocked", "blocked_name")

    def __init__(
        self,
        make: Callable[..., Any],
        blocked: Optional[Tuple[str, ...]],
        blocked_name: str,
        allowed: Optional[Tuple[str, ...]],
        allowed_name: str,
    ) -> None:
        self.blocked_name = blocked_name
        self.allowed_name = allowed_name
        self.blocked: Any = make(blocked, _quote, generous=True) if blocked else None
        self.allowed: Any = (
            None
            if allowed is None
            else make(allowed, lambda entry: Decision(True, None, f"allowed by {_quote(entry)} in {allowed_name}"))
        )


def _used(*pairs: _Pair) -> Tuple[_Pair, ...]:
    return tuple(pair for pair in pairs if pair.blocked is not None or pair.allowed is not None)


class PolicyEnforcer:
    """Asks one policy. ``enforce_...`` raises for what it forbids; ``check_...`` gives a :class:`Decision` instead.

    What is asked for and how entries match is in docs/policy.md. Nothing of an argument makes a ``check_...`` raise,
    but for an unknown kind of rate and an amount that is no number: what cannot be understood is refused.

    It can be pickled, for handlers in other processes: the copy has no ``on_violation``, and refuses to count what is
    limited unless ``limiter`` counts in a shared store.

    Any thread may ask; nothing here changes after construction and no lock is taken, but for rate limits in memory,
    whose counting takes one of its own for microseconds. Links, the home and the working directory in lists of paths
    are resolved at construction.

    :param policy: the policy, or None where the workspace has none: everything is allowed.
    :param warn_only: log what is forbidden as a warning, and allow it; refused for a policy whose key was pinned.
    :param on_violation: called with the :class:`~sekuire.errors.PolicyViolationError` of everything forbidden, in the
        thread that asks, also with ``warn_only``; what it raises is logged and ignored.
    :param limiter: counts for the rate limits. Give the same one to the enforcers of successive policies, and to all
        that share a limit. Default: one in this process for this enforcer alone.
    :raises PolicyIntegrityError: an entry for paths cannot be resolved on this machine, or the policy was made by hand
        and an enforced part of it is wrong.
    """

    def __init__(
        self,
        policy: Optional[Policy],
        warn_only: bool = False,
        on_violation: Optional[Callable[[PolicyViolationError], object]] = None,
        *,
        limiter: Optional[RateLimiter] = None,
    ) -> None:
        if policy is not None and not isinstance(policy, Policy):
            raise ConfigurationError(
                f"must be a Policy or None, got {type(policy).__name__}; Policy.from_content() makes one", "policy"
            )
        if on_violation is not None and not callable(on_violation):
            raise ConfigurationError(f"must be callable, got {type(on_violation).__name__}", "on_violation")
        if warn_only and policy is not None and policy.origin == "pinned":
            raise ConfigurationError("is refused where a policy key is pinned; remove one of the two", "warn_only")
        self._policy = policy
        self._warn_only = bool(warn_only)
        self._on_violation = on_violation
        self._unavailable: Optional[str] = None
        self._limiter = limiter
        if policy is not None:
            self._compile(read_rules(policy.content)[0])
            if limiter is None:
                self._limiter = RateLimiter(namespace=policy.workspace_id or "local")

    @classmethod
    def unavailable(
        cls,
        problem: str,
        warn_only: bool = False,
        on_violation: Optional[Callable[[PolicyViolationError], object]] = None,
    ) -> PolicyEnforcer:
        """An enforcer for when no policy could be loaded: it refuses everything by ``policy.unavailable``.

        :param problem: why there is none, for people.
        """
        enforcer = cls(None, warn_only, on_violation)
        enforcer._unavailable = problem
        return enforcer

    def __reduce__(self) -> Tuple[Any, ...]:
        return _restore, (self._policy, self._warn_only, self._unavailable, self._limiter)

    def telling(self, on_violation: Callable[[PolicyViolationError], object]) -> PolicyEnforcer:
        """The same enforcer with another ``on_violation``; it costs nothing to make."""
        other = object.__new__(PolicyEnforcer)
        other.__dict__.update(self.__dict__, _on_violation=on_violation)
        return other

    def repeat(self, error: PolicyViolationError) -> None:
        """Tell ``on_violation`` of what a copy of this enforcer has refused in another process."""
        self._tell(error)

    @property
    def policy(self) -> Optional[Policy]:
        return self._policy

    @property
    def warn_only(self) -> bool:
        return self._warn_only

    @property
    def limiter(self) -> Optional[RateLimiter]:
        """What counts for the rate limits; None where there is no policy and none was given."""
        return self._limiter

    def _compile(self, rules: Rules) -> None:
        self._rules = rules
        self._closed = rules.closed
        network, filesystem = rules.network, rules.filesystem
        tools, api, models, capabilities = rules.tools, rules.api, rules.models, rules.capabilities
        if network is not None:
            self._domains = _used(
                _Pair(
                    Domains,
                    network.blocked_domains, "permissions.network.blocked_domains",
                    network.allowed_domains, "permissions.network.allowed_domains",
                ),
                _Pair(
                    Domains,
                    network.blocked_hosts, "permissions.network.blocked_hosts",
                    network.allowed_hosts, "permissions.network.allowed_hosts",
                ),
            )  # fmt: skip
        if filesystem is not None:
            self._paths = self._compile_paths(filesystem)
            known = filesystem.allowed_extensions
            self._extensions = None if known is None else Extensions(known)
        self._tools = _used(
            _Pair(
                Names,
                tools.blocked_tools, "permissions.tools.blocked_tools",
                tools.allowed_tools, "permissions.tools.allowed_tools",
            ),
            _Pair(
                Names,
                capabilities.denied_tools, "agent.capabilities.denied_tools",
                capabilities.allowed_tools, "agent.capabilities.allowed_tools",
            ),
        )  # fmt: skip
        self._services = _used(
            _Pair(
                Names,
                api.blocked_services, "permissions.api.blocked_services",
                api.allowed_services, "permissions.api.allowed_services",
            ),
        )  # fmt: skip
        self._models = _used(
            _Pair(
                Names,
                models.denied_models, "agent.models.denied_models",
                # Documented: an empty list of models allows every model of the allowed providers.
                models.allowed_models or None, "agent.models.allowed_models",
            ),
        )  # fmt: skip
        self._providers = _Pair(Names, None, "", models.allowed_providers, "agent.models.allowed_providers")
        self._capabilities = _used(
            _Pair(
                Names,
                capabilities.denied_capabilities, "agent.capabilities.denied_capabilities",
                capabilities.allowed_capabilities, "agent.capabilities.allowed_capabilities",
            ),
        )  # fmt: skip
        self._rates: Dict[str, Rate] = {"requests": rules.requests, "tokens": rules.tokens}

    @staticmethod
    def _compile_paths(section: Filesystem) -> _Pair:
        try:
            return _Pair(
                Paths,
                section.blocked_paths, "permissions.filesystem.blocked_paths",
                section.allowed_paths, "permissions.filesystem.allowed_paths",
            )  # fmt: skip
        except Unreadable as error:
            problem = str(error)
        raise PolicyIntegrityError(f"permissions.filesystem: {problem}")

    # -- tools, services, models, capabilities --

    def check_tool(self, name: str) -> Decision:
        """Whether the tool ``name`` may be used."""
        return self._settle(self._tool(name))

    def enforce_tool(self, name: str) -> None:
        """:raises PolicyViolationError: the tool ``name`` may not be used."""
        self._demand(self._tool(name))

    def check_api(self, service: str) -> Decision:
        """Whether the API of ``service`` may be called."""
        return self._settle(self._api(service))

    def enforce_api(self, service: str) -> None:
        """:raises PolicyViolationError: the API of ``service`` may not be called."""
        self._demand(self._api(service))

    def check_model(self, model: str, provider: Optional[str] = None) -> Decision:
        """Whether ``model`` may be called; where the policy lists providers, ``provider`` must be one of them."""
        return self._settle(self._model(model, provider))

    def enforce_model(self, model: str, provider: Optional[str] = None) -> None:
        """:raises PolicyViolationError: ``model`` of ``provider`` may not be called."""
        self._demand(self._model(model, provider))

    def check_capability(self, name: str) -> Decision:
        """Whether a task for the capability ``name`` may run."""
        return self._settle(self._capability(name))

    def enforce_capability(self, name: str) -> None:
        """:raises PolicyViolationError: a task for the capability ``name`` may not run."""
        self._demand(self._capability(name))

    # -- network and filesystem --

    def check_network(self, domain: str, protocol: str) -> Decision:
        """Whether ``domain`` may be reached.

        :param domain: a host name or address, with or without a port; not a URL.
        :param protocol: ``"https"``, ``"wss"``, ``"http"``...; ``require_tls`` admits those of :data:`TLS_PROTOCOLS`.
        """
        return self._settle(self._network(domain, protocol))

    def enforce_network(self, domain: str, protocol: str) -> None:
        """:raises PolicyViolationError: ``domain`` may not be reached by ``protocol``."""
        self._demand(self._network(domain, protocol))

    def check_filesystem(self, path: PathLike, operation: str) -> Decision:
        """Whether ``path`` may be used. Asks the file system, to follow links.

        :param path: the path as it will be opened, after every expansion of ``~``, variables and wildcards; a relative
            one begins at the working directory.
        :param operation: what for, such as ``"read"`` or ``"write"``; it appears in the reason, no rule differs by it.
        """
        return self._settle(self._filesystem(path, operation))

    def enforce_filesystem(self, path: PathLike, operation: str) -> None:
        """:raises PolicyViolationError: ``path`` may not be used."""
        self._demand(self._filesystem(path, operation))

    # -- rates --

    def check_rate_limit(self, kind: str, amount: int = 1) -> Decision:
        """Whether ``amount`` more may be used now. It is counted if so, and not if not.

        :param kind: ``"requests"`` or ``"tokens"``.
        :raises ConfigurationError: an unknown kind, or an amount that is no whole number of 0 or more.
        """
        return self._settle(self._rate_limit(kind, amount))

    def enforce_rate_limit(self, kind: str, amount: int = 1) -> None:
        """As :meth:`check_rate_limit`.

        :raises PolicyViolationError: a limit would be exceeded; ``retry_after`` says when to try again.
        :raises ConfigurationError: an unknown kind, or an amount that is no whole number of 0 or more.
        """
        self._demand(self._rate_limit(kind, amount))

    # -- what the policy says --

    def _tool(self, name: str) -> Decision:
        general = self._general("tool", name, "tools", "capabilities")
        # Not "or": a decision that refuses is false.
        return self._names("tool", name, self._tools) if general is None else general

    def _api(self, service: str) -> Decision:
        general = self._general("service", service, "api")
        # Not "or": a decision that refuses is false.
        return self._names("api", service, self._services) if general is None else general

    def _capability(self, name: str) -> Decision:
        general = self._general("capability", name, "capabilities")
        # Not "or": a decision that refuses is false.
        return self._names("capability", name, self._capabilities) if general is None else general

    def _model(self, model: str, provider: Optional[str]) -> Decision:
        general = self._general("model", model, "models")
        if general is not None:
            return general
        decision = self._names("model", model, self._models, self._providers.allowed is not None)
        if decision.rule == "model.blocked" or self._providers.allowed is None:
            return decision
        # Names first: whether the model is blocked must not depend on what its provider is called.
        found = None
        if isinstance(provider, str) and not name_problem(provider):
            found = self._providers.allowed.find(provider)
        if found is None:
            rule = "model.provider_not_allowed"
            named = "a provider that was not named" if provider is None else f"provider {_quote(provider)}"
            return _deny(rule, subject=_quote(model), provider=named, list=self._providers.allowed_name)
        return found if decision is _UNRESTRICTED else decision

    def _names(self, prefix: str, name: object, pairs: Tuple[_Pair, ...], restricted: bool = False) -> Decision:
        if not isinstance(name, str):
            return _refuse(
                f"{prefix}.not_allowed", f"{_NOUNS[prefix]} {_quote(name)}", f"it is a {_type(name)}, not a str"
            )
        if not pairs and not restricted:
            return _UNRESTRICTED
        problem = name_problem(name)
        if problem:
            return _refuse(f"{prefix}.not_allowed", f"{_NOUNS[prefix]} {_quote(name)}", f"it {problem}")
        for pair in pairs:
            if pair.blocked is not None:
                entry = pair.blocked.find(name)
                if entry is not None:
                    return _deny(f"{prefix}.blocked", subject=_quote(name), entry=entry, list=pair.blocked_name)
        decision = _UNRESTRICTED
        for pair in pairs:
            if pair.allowed is not None:
                found = pair.allowed.find(name)
                if found is None:
                    return _deny(f"{prefix}.not_allowed", subject=_quote(name), list=pair.allowed_name)
                decision = found
        return decision

    def _network(self, domain: str, protocol: str) -> Decision:
        general = self._general("host", domain, "network")
        if general is not None:
            return general
        asked = _host(domain)
        section = self._rules.network
        if section is None:
            return _deny("network.missing", subject=asked)
        if not section.enabled:
            return _deny("network.disabled", subject=asked)
        if section.require_tls and not (isinstance(protocol, str) and protocol.lower() in TLS_PROTOCOLS):
            return _deny("network.tls_required", subject=asked, protocol=_quote(protocol))
        problem = ""
        try:
            forms = read_host(domain)
        except Unreadable as error:
            problem = str(error)
        if problem:
            return _refuse("network.not_allowed", f"host {asked}", problem)
        for pair in self._domains:
            for form in forms if pair.blocked is not None else ():
                entry = pair.blocked.find(form)
                if entry is not None:
                    return _deny("network.blocked", subject=asked, entry=entry, list=pair.blocked_name)
        decision = _UNRESTRICTED
        for pair in self._domains:
            for form in forms if pair.allowed is not None else ():
                found = pair.allowed.find(form)
                if found is None:
                    return _deny("network.not_allowed", subject=asked, list=pair.allowed_name)
                decision = found
        return decision

    def _filesystem(self, path: PathLike, operation: str) -> Decision:
        general = self._general("path", path, "filesystem")
        if general is not None:
            return general
        section = self._rules.filesystem
        done, asked = _quote(operation), _path(path)
        if isinstance(operation, str) and operation.isidentifier() and len(operation) <= 40:
            done = operation
        if section is None:
            return _deny("fs.missing", operation=done, subject=asked)
        if not section.enabled:
            return _deny("fs.disabled", operation=done, subject=asked)
        problem = ""
        try:
            subject = read_path(path)
        except Unreadable as error:
            problem = str(error)
        if problem:
            return _refuse("fs.not_allowed", f"{done} {asked}", problem)
        pair = self._paths
        if pair.blocked is not None:
            entry = pair.blocked.find(subject)
            if entry is not None:
                return _deny("fs.blocked", operation=done, subject=asked, entry=entry, list=pair.blocked_name)
        decision = _UNRESTRICTED
        if pair.allowed is not None:
            found = pair.allowed.find(subject)
            if found is None:
                decision = _deny("fs.not_allowed", operation=done, subject=asked, list=pair.allowed_name)
                return attrs.evolve(decision, reason=decision.reason + pair.allowed.hint(subject))
            decision = found
        if self._extensions is not None and not self._extensions.holds(subject.real):
            name = "permissions.filesystem.allowed_extensions"
            return _deny("fs.ext", operation=done, subject=asked, list=name)
        return decision

    def _rate_limit(self, kind: str, amount: int) -> Decision:
        check_request(kind, amount)
        general = self._general("rate", kind)
        if general is not None:
            return general
        limiter = self._limiter
        assert limiter is not None
        problem = ""
        try:
            excess = limiter.hit(kind, self._rates[kind], amount)
        except PolicyUnavailableError as error:
            problem = str(error)
        if problem:
            return _refuse("policy.unavailable", f"rate {_quote(kind)}", problem)
        if excess is None:
            return _UNCOUNTED
        rule = f"rate_limit.{kind}_per_{excess.window}"
        reason = MESSAGES[rule].format(amount=amount, limit=excess.limit)
        return Decision(False, rule, reason, excess.retry_after)

    def _general(self, noun: str, subject: object, *sections: str) -> Optional[Decision]:
        """Return the decision that asks no list; None where the lists of ``sections`` decide."""
        if self._policy is not None:
            if not self._closed:
                return None
            key = next((self._closed[one] for one in sections if one in self._closed), None)
            if key is None:
                return None
            asked = {"host": _host, "path": _path}.get(noun, _quote)(subject)
            return _deny("policy.unknown_key", noun=noun, subject=asked, key=key)
        if self._unavailable is None:
            return _NO_POLICY
        asked = {"host": _host, "path": _path}.get(noun, _quote)(subject)
        return _refuse("policy.unavailable", f"{noun} {asked}", self._unavailable)

    # -- what comes of it --

    def _settle(self, decision: Decision) -> Decision:
        if decision.allowed:
            return decision
        self._tell(self._error(decision))
        return attrs.evolve(decision, allowed=True) if self._warn_only else decision

    def _demand(self, decision: Decision) -> None:
        if decision.allowed:
            return
        error = self._error(decision)
        self._tell(error)
        if not self._warn_only:
            raise error

    def _error(self, decision: Decision) -> PolicyViolationError:
        error = PolicyViolationError(decision.rule or "", decision.reason, decision.retry_after)
        error.target = decision.target
        error.allowed = self._warn_only
        return error

    def _tell(self, error: PolicyViolationError) -> None:
        if self._warn_only:
            log.warning("allowed only because violations are not enforced (warn_only): %s", error)
        if self._on_violation is not None:
            try:
                self._on_violation(error)
            except Exception:
                log.exception("on_violation failed; the decision stands")


def _restore(
    policy: Optional[Policy], warn_only: bool, unavailable: Optional[str], limiter: Optional[RateLimiter]
) -> PolicyEnforcer:
    enforcer = PolicyEnforcer(policy, warn_only, limiter=limiter)
    enforcer._unavailable = unavailable
    return enforcer


_NOUNS = {"tool": "tool", "api": "service", "model": "model", "capability": "capability"}


def _deny(rule: str, *, subject: str, **facts: object) -> Decision:
    target = subject[1:-1] if subject[:1] in ("'", '"') and subject[-1:] == subject[:1] else subject
    return Decision(False, rule, MESSAGES[rule].format(subject=subject, **facts), target=target)


def _refuse(rule: str, subject: str, problem: str) -> Decision:
    return Decision(False, rule, MESSAGES[""].format(subject=subject, problem=problem))


def _type(value: object) -> str:
    return type(value).__name__


def _host(value: object) -> str:
    """As :func:`_quote`, without what a URL given by mistake may hold: a password, a token in its path or query."""
    if not isinstance(value, str) or not set("@?#/\\") & set(value):
        return _quote(value)
    if "@" in value:
        return "'...@...'"
    return _quote(re.split(r"[/\\?#]", value.partition("://")[2] or value)[0] + "...")


def _path(value: object) -> str:
    """As :func:`_quote`; of a URL given by mistake only what :func:`_host` shows."""
    is_url = isinstance(value, str) and "://" in value
    return _host(value) if is_url else _quote(value)


def _quote(value: object) -> str:
    """What was asked for, for a reason: escaped, on one line, cut."""
    if isinstance(value, (bytes, os.PathLike)):
        try:
            value = path_text(value)
        except Unreadable:
            pass
    text = repr(value) if isinstance(value, str) or value is None else f"of type {_type(value)}"
    return text if len(text) <= 200 else f"{text[:199]}…"
