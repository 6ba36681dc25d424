"""Hold the policy that decides now, and put a newer one in its place."""

from __future__ import annotations

import functools
import threading
from typing import Callable, List, Optional

import attrs

from .._internal import fork
from .._internal.logs import get_logger
from ..errors import PolicyIntegrityError, PolicyUnavailableError
from .client import PolicyFetcher
from .document import Policy
from .enforcer import PolicyEnforcer
from .rulebook import Rulebook

__all__ = ["Listener", "PolicyInForce", "Standing"]

log = get_logger("sekuire.policy")

#: Gets ``is_allowed(capability, tool=None)``, which asks a new policy whether such a task may run.
Listener = Callable[[Callable[..., bool]], None]


@attrs.frozen(slots=True)
class Standing:
    """Hold all that a decision is made by. It is replaced as a whole, so that one decision sees one policy."""

    enforcer: PolicyEnforcer
    policy: Optional[Policy] = None
    #: True if the platform has answered, with a policy or with "there is none", or a stored policy was good.
    is_loaded: bool = False


class PolicyInForce:
    """Hold the policy in force. Adopt a newer one, or a stored one if the platform does not answer.

    :param client: has the stored policy.
    :param enforcer: asks all policies, one after the other, and counts for them.
    :param allows_without: allow everything while no policy was ever loaded.
    :param cancels: call the listeners after a change.
    """

    # Threads: any thread may call anything. `standing` is replaced as a whole and read without a lock. `_swap_lock`
    # orders two answers, and `_lock` guards the listeners. Neither is held over I/O or a callback.

    def __init__(
        self,
        client: PolicyFetcher,
        enforcer: PolicyEnforcer,
        *,
        allows_without: bool,
        cancels: bool,
    ) -> None:
        self._client = client
        self._enforcer = enforcer
        self.allows_without = allows_without
        self._cancels = cancels
        #: True if "the workspace has no policy" is never adopted.
        self.is_required = False
        #: The number of the last question whose answer was adopted.
        self._adopted = 0
        self._lock = threading.Lock()
        self._swap_lock = threading.Lock()
        self._listeners: List[Listener] = []
        self.standing = self._without("no policy has been loaded yet")
        fork.reset_in_child(self, PolicyInForce.reset_in_child)

    @property
    def hash(self) -> Optional[str]:
        """Return the hash of the policy in force, or None."""
        policy = self.standing.policy
        return None if policy is None else policy.hash

    def require(self) -> None:
        """Refuse later answers that the workspace has no policy."""
        with self._swap_lock:
            self.is_required = True

    def adopt(self, workspace_id: str, policy: Optional[Policy], number: int) -> None:
        """Let ``policy`` decide from now on. None: everything is allowed.

        :param number: the number of the question that this answers. Later questions have higher numbers.
        :raises PolicyUnavailableError: there is none, and one is required.
        """
        with self._swap_lock:
            if policy is None and self.is_required:
                raise PolicyUnavailableError(
                    f"the platform says that {workspace_id} has no policy, and one is required; activate one"
                )
            old = self.standing.policy
            is_late = number < self._adopted
            self._adopted = max(self._adopted, number)
            if not self._is_news(policy, is_late):
                return
            limiter = self._enforcer.limiter
            if limiter is not None and limiter.namespace != workspace_id:
                # It was made before the workspace was known, and has counted nothing yet.
                limiter.rename(workspace_id)
            enforcer = self._enforcer.with_policy(policy)
            self.standing = Standing(enforcer, policy, is_loaded=True)
        _log_change(workspace_id, policy, old)
        if self._cancels and policy is not None:
            self._call_listeners(enforcer)

    def fall_back(self, workspace_id: str, denial: str) -> None:
        """Let a stored policy decide, unless one was loaded. If there is none, deny and say why.

        :param denial: the reason.
        """
        if self.standing.is_loaded:
            return
        stored = self._client.last_good_policy(workspace_id)
        if stored is not None:
            try:
                self.adopt(workspace_id, stored, 0)
                return
            except PolicyIntegrityError as error:
                # It could be enforced when it was loaded. The working directory is gone, for example.
                denial = f"{denial}; the last good one cannot be enforced any more: {error}"
        with self._swap_lock:
            if not self.standing.is_loaded:
                self.standing = self._without(denial)

    def describe(self) -> str:
        """Return what decides now, for a log line that says that no newer policy could be loaded."""
        standing = self.standing
        if standing.policy is not None:
            return f"version {standing.policy.version} stays in force"
        if standing.is_loaded:
            return "everything stays allowed"
        return ("everything is allowed" if self.allows_without else "every task is denied") + " until one is loaded"

    def add_listener(self, listener: Listener) -> None:
        """Call ``listener`` after each change."""
        with self._lock:
            self._listeners.append(listener)

    def remove_listener(self, listener: Listener) -> None:
        """Undo :meth:`add_listener`."""
        with self._lock:
            if listener in self._listeners:
                self._listeners.remove(listener)

    @property
    def listener_count(self) -> int:
        """Return how many listeners there are."""
        return len(self._listeners)

    def _is_news(self, policy: Optional[Policy], is_late: bool) -> bool:
        """Return True if an answer replaces what is in force. Needs the swap lock."""
        standing = self.standing
        old = standing.policy
        if policy is not None and old is not None and old.workspace_id == policy.workspace_id:
            # Another thread may have been faster with a newer one.
            if not self._client.proves_version:
                return policy.hash != old.hash and not self._client.was_replaced(policy.workspace_id, policy.hash)
            return policy.version > old.version or (policy.version == old.version and policy.hash != old.hash)
        if is_late:
            # There was a policy, or there was none: the later question has the better answer.
            return False
        return policy is not None or old is not None or not standing.is_loaded

    def _without(self, problem: str) -> Standing:
        """Return what decides until a policy has been loaded."""
        return Standing(self._enforcer.with_policy(None if self.allows_without else Rulebook(None, problem)))

    def _call_listeners(self, enforcer: PolicyEnforcer) -> None:
        with self._lock:
            listeners = list(self._listeners)
        for listener in listeners:
            try:
                listener(functools.partial(_allows, enforcer))
            except Exception:
                log.exception("a listener to policy changes failed: %r", listener)

    def reset_in_child(self) -> None:
        """Replace what a forked child cannot use of its parent."""
        self._lock = threading.Lock()
        self._swap_lock = threading.Lock()


def _log_change(workspace_id: str, policy: Optional[Policy], old: Optional[Policy]) -> None:
    if policy is not None:
        log.info("policy %s of %s, version %d (%s), is in force", policy.policy_id, workspace_id, policy.version,
                 policy.origin)  # fmt: skip
    elif old is not None:
        log.warning("%s has no policy any more: everything is allowed", workspace_id)
    else:
        log.info("%s has no policy: everything is allowed", workspace_id)


def _allows(enforcer: PolicyEnforcer, capability: str, tool: Optional[str] = None) -> bool:
    """Return True if a task of this capability and this tool may run, rates aside."""
    decisions = (enforcer.check_capability(capability), None if tool is None else enforcer.check_tool(tool))
    # A person is asked before a task begins, and not for one that runs.
    return all(one is None or one.allowed or one.needs_approval for one in decisions)
