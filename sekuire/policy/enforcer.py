"""Ask one policy what is allowed, raise for what is not, and count rates."""

from __future__ import annotations

from typing import Any, Callable, Optional, Tuple, Union

import attrs

from .._internal.logs import get_logger
from ..errors import ConfigurationError, PolicyUnavailableError, PolicyViolationError
from ..handlers.context import APPROVAL_TIME, control_of, current_task
from .decision import MESSAGES, TLS_PROTOCOLS, UNCOUNTED, Decision, quote, refuse
from .document import Policy
from .limits import RateLimiter, check_request
from .rulebook import BothRulebooks, LocalRules, PathLike, Rulebook

__all__ = ["MESSAGES", "TLS_PROTOCOLS", "Decision", "PolicyEnforcer"]

log = get_logger("sekuire.policy")

# Threads: any thread may ask. Nothing changes after construction and no lock is taken, except that the counting of rate
# limits in memory takes the limiter's lock for microseconds.


class PolicyEnforcer:
    """Ask one policy. ``enforce_...`` raises for what it forbids; ``check_...`` returns a :class:`Decision` instead. ::

        policy = Policy.from_content({"permissions": {"tools": {"blocked_tools": ["shell"]}}})
        enforcer = PolicyEnforcer(policy)
        enforcer.enforce_tool("search")
        print(enforcer.check_tool("shell").rule)  # tool.blocked

    docs/policy.md says what can be asked and how entries match. A ``check_...`` raises only for an unknown kind of rate
    and an amount that is not a number. It refuses any other argument that it does not understand.

    An enforcer can be pickled for handlers in other processes. The copy has no ``on_violation``. It refuses to count
    what is limited unless ``limiter`` counts in a shared store. Links, the home and the working directory in lists of
    paths are resolved at construction.

    :param policy: the policy, or None if the workspace has none: everything is allowed.
    :param warn_only: log what is forbidden as a warning, and allow it. A policy whose key was pinned refuses this.
    :param on_violation: called with the :class:`~sekuire.errors.PolicyViolationError` of everything forbidden, in the
        thread that asks, also with ``warn_only``. What it raises is logged and ignored.
    :param limiter: counts for the rate limits. Give the same one to the enforcers of successive policies, and to all
        that share a limit. The default is one in this process for this enforcer alone.
    :param local: rules that must allow too, such as those of a manifest.
    :raises PolicyIntegrityError: an entry for paths cannot be resolved on this machine, or the policy was made by hand
        and an enforced part of it is wrong.
    """

    def __init__(
        self,
        policy: Union[Policy, Rulebook, None],
        warn_only: bool = False,
        on_violation: Optional[Callable[[PolicyViolationError], object]] = None,
        *,
        limiter: Optional[RateLimiter] = None,
        local: Optional[LocalRules] = None,
    ) -> None:
        if policy is not None and not isinstance(policy, (Policy, Rulebook)):
            raise ConfigurationError(
                f"must be a Policy or None, got {type(policy).__name__}; Policy.from_content() makes one", "policy"
            )
        if on_violation is not None and not callable(on_violation):
            raise ConfigurationError(f"must be callable, got {type(on_violation).__name__}", "on_violation")
        origin = policy.policy if isinstance(policy, Rulebook) else policy
        if warn_only and origin is not None and origin.origin in ("pinned", "content"):
            raise ConfigurationError("is refused where a policy key is pinned; remove one of the two", "warn_only")
        self._workspace = policy if isinstance(policy, Rulebook) else Rulebook(policy)
        self._local = local
        self._rules = self._workspace if local is None else BothRulebooks(self._workspace, local)
        self._warn_only = bool(warn_only)
        self._on_violation = on_violation
        if limiter is None and (origin is not None or local is not None):
            limiter = RateLimiter(namespace=(origin.workspace_id if origin is not None else "") or "local")
        self._limiter = limiter

    @classmethod
    def unavailable(
        cls,
        problem: str,
        warn_only: bool = False,
        on_violation: Optional[Callable[[PolicyViolationError], object]] = None,
    ) -> PolicyEnforcer:
        """Return an enforcer for when no policy could be loaded: it refuses everything by ``policy.unavailable``.

        :param problem: why there is none, for people.
        """
        return cls(Rulebook(None, problem), warn_only, on_violation)

    def __reduce__(self) -> Tuple[Any, ...]:
        local = None if self._local is None else (self._local.policy, self._local.source)
        return _restore, (self.policy, self._rules.problem, self._warn_only, self._limiter, local)

    def with_policy(self, policy: Union[Policy, Rulebook, None]) -> PolicyEnforcer:
        """Return an enforcer that asks another policy, and reports and counts as this one does."""
        return PolicyEnforcer(policy, self._warn_only, self._on_violation, limiter=self._limiter, local=self._local)

    def reporting_to(self, on_violation: Callable[[PolicyViolationError], object]) -> PolicyEnforcer:
        """Return the same enforcer with another ``on_violation``. The policy is not compiled again."""
        return PolicyEnforcer(self._workspace, self._warn_only, on_violation, limiter=self._limiter, local=self._local)

    def repeat(self, error: PolicyViolationError) -> None:
        """Report to ``on_violation`` what a copy of this enforcer has refused in another process."""
        self._report(error)

    @property
    def policy(self) -> Optional[Policy]:
        """Return the policy that decides, or None."""
        return self._rules.policy

    @property
    def warn_only(self) -> bool:
        """Return True if what is forbidden is only logged."""
        return self._warn_only

    @property
    def limiter(self) -> Optional[RateLimiter]:
        """Return what counts for the rate limits, or None if there is no policy and none was given."""
        return self._limiter

    # -- tools, services, models, capabilities --

    def check_tool(self, name: str) -> Decision:
        """Decide whether the tool ``name`` may be used."""
        return self._settle(self._rules.tool(name))

    def enforce_tool(self, name: str, *, details: Any = None) -> None:
        """Check that the tool ``name`` may be used. ::

            ctx.policy.enforce_tool("wire-transfer", details={"to": "DE02...", "amount": 500})

        If the policy wants a person's approval for it, a handler waits here for the decision, at most 300 s. Elsewhere
        than in a task's own thread or context nobody can be asked.

        :param details: JSON of at most 64 KiB for the person who decides.
        :raises PolicyViolationError: it may not be used, or needs an approval that nobody here can be asked for.
        :raises ApprovalDenied, ApprovalExpired, TaskCancelled, TaskError: as
            :meth:`TaskContext.require_approval() <sekuire.TaskContext.require_approval>`.
        """
        self._demand(self._rules.tool(name), "tool", name, details)

    def check_api(self, service: str) -> Decision:
        """Decide whether the API of ``service`` may be called."""
        return self._settle(self._rules.api(service))

    def enforce_api(self, service: str) -> None:
        """Check that the API of ``service`` may be called.

        :raises PolicyViolationError: it may not.
        """
        self._demand(self._rules.api(service))

    def check_model(self, model: str, provider: Optional[str] = None) -> Decision:
        """Decide whether ``model`` may be called.

        If the policy lists providers, ``provider`` must be one of them. A model that ``allowed_models`` names,
        other than by a pattern, is allowed without a provider too.
        """
        return self._settle(self._rules.model(model, provider))

    def enforce_model(self, model: str, provider: Optional[str] = None) -> None:
        """Check that ``model`` of ``provider`` may be called.

        :raises PolicyViolationError: it may not.
        """
        self._demand(self._rules.model(model, provider))

    def check_capability(self, name: str) -> Decision:
        """Decide whether a task for the capability ``name`` may run."""
        return self._settle(self._rules.capability(name))

    def enforce_capability(self, name: str) -> None:
        """Check that a task for the capability ``name`` may run.

        :raises PolicyViolationError: it may not.
        """
        self._demand(self._rules.capability(name), "capability", name)

    def enforce_task(self, capability: str, tool: Optional[str] = None) -> None:
        """Check that a task of this capability, and of this tool, may run. What is denied is not asked about.

        :raises PolicyViolationError: it may not.
        """
        first = self._rules.capability(capability)
        second = UNCOUNTED if tool is None else self._rules.tool(tool)
        if first.allowed and second.allowed:
            return
        for decision in (first, second):
            if not decision.needs_approval:
                self._demand(decision)
        self._demand(first, "capability", capability)
        if tool is not None:
            self._demand(second, "tool", tool)

    def still_needs_approval(self, kind: str, name: str, capability: str) -> bool:
        """Return True if a person must approve this by this policy, for a task that asked by an older one.

        :param kind: ``"tool"``, ``"capability"`` or ``"action"``, which no policy knows: it always needs it.
        :param capability: the task's.
        :raises PolicyViolationError: this policy forbids it, or the task.
        """
        task = self._rules.capability(capability)
        if not task.needs_approval:
            self._demand(task)
        if kind == "action":
            return True
        decision = self._rules.tool(name) if kind == "tool" else self._rules.capability(name)
        if not decision.needs_approval or self._warn_only:
            self._demand(decision)
            return False
        return True

    # -- network and filesystem --

    def check_network(self, domain: str, protocol: str) -> Decision:
        """Decide whether ``domain`` may be reached.

        :param domain: a host name or address, with or without a port; not a URL.
        :param protocol: ``"https"``, ``"wss"``, ``"http"``...; ``require_tls`` admits those of :data:`TLS_PROTOCOLS`.
        """
        return self._settle(self._rules.network(domain, protocol))

    def enforce_network(self, domain: str, protocol: str) -> None:
        """Check that ``domain`` may be reached by ``protocol``.

        :raises PolicyViolationError: it may not.
        """
        self._demand(self._rules.network(domain, protocol))

    def check_filesystem(self, path: PathLike, operation: str) -> Decision:
        """Decide whether ``path`` may be used. Follow its links in the file system.

        :param path: the path as it will be opened, after every expansion of ``~``, variables and wildcards. A relative
            one begins at the working directory.
        :param operation: what for, such as ``"read"`` or ``"write"``. It appears in the reason; no rule depends on it.
        """
        return self._settle(self._rules.filesystem(path, operation))

    def enforce_filesystem(self, path: PathLike, operation: str) -> None:
        """Check that ``path`` may be used.

        :raises PolicyViolationError: it may not.
        """
        self._demand(self._rules.filesystem(path, operation))

    # -- rates --

    def check_rate_limit(self, kind: str, amount: int = 1) -> Decision:
        """Decide whether ``amount`` more may be used now. Count it if so, and do not count it otherwise.

        :param kind: ``"requests"`` or ``"tokens"``; also ``"request"`` or ``"token"``.
        :raises ConfigurationError: an unknown kind, or an amount that is not a whole number of 0 or more.
        """
        return self._settle(self._rate_limit(kind, amount))

    def enforce_rate_limit(self, kind: str, amount: int = 1) -> None:
        """Count ``amount``, as :meth:`check_rate_limit` does.

        :raises PolicyViolationError: a limit would be exceeded; ``retry_after`` says when to try again.
        :raises ConfigurationError: an unknown kind, or an amount that is not a whole number of 0 or more.
        """
        self._demand(self._rate_limit(kind, amount))

    def _rate_limit(self, kind: str, amount: int) -> Decision:
        kind = check_request(kind, amount)
        general = self._rules.general("rate", kind)
        if general is not None:
            return general
        limiter = self._limiter
        assert limiter is not None
        try:
            excess = limiter.hit(kind, self._rules.rates[kind], amount)
        except PolicyUnavailableError as error:
            return refuse("policy.unavailable", f"rate {quote(kind)}", str(error))
        if excess is None:
            return UNCOUNTED
        rule = f"rate_limit.{kind}_per_{excess.window}"
        reason = MESSAGES[rule].format(amount=amount, limit=excess.limit) + self._rules.source_of_rate(
            kind, excess.limit
        )
        return Decision(False, rule, reason, excess.retry_after)

    # -- what follows from a decision --

    def _settle(self, decision: Decision) -> Decision:
        if decision.allowed or (decision.needs_approval and not self._warn_only):
            # What a person may still approve is not a violation.
            return decision
        self._report(self._error(decision))
        return attrs.evolve(decision, allowed=True) if self._warn_only else decision

    def _demand(self, decision: Decision, kind: str = "", name: str = "", details: Any = None) -> None:
        """Raise for what is not allowed. If only an approval is missing and a task can ask for it, wait for that.

        :param kind: what to ask for, with its name and its details; empty to ask nobody.
        """
        if decision.allowed:
            return
        if kind and decision.needs_approval and not self._warn_only:
            context = current_task.get()
            asker = None if context is None else control_of(context).asker
            if context is not None and asker is not None:
                asker.ask(context, kind, name, details, APPROVAL_TIME, self)
                return
        error = self._error(decision)
        self._report(error)
        if not self._warn_only:
            raise error

    def _error(self, decision: Decision) -> PolicyViolationError:
        error = PolicyViolationError(decision.rule or "", decision.reason, decision.retry_after)
        error.target = decision.target
        error.allowed = self._warn_only
        return error

    def _report(self, error: PolicyViolationError) -> None:
        if self._warn_only:
            log.warning("allowed only because violations are not enforced (warn_only): %s", error)
        if self._on_violation is not None:
            try:
                self._on_violation(error)
            except Exception:
                log.exception("on_violation failed; the decision stands")


def _restore(
    policy: Optional[Policy],
    problem: Optional[str],
    warn_only: bool,
    limiter: Optional[RateLimiter],
    local: Optional[Tuple[Policy, str]],
) -> PolicyEnforcer:
    rules = None if local is None else LocalRules(*local)
    return PolicyEnforcer(Rulebook(policy, problem), warn_only, limiter=limiter, local=rules)
