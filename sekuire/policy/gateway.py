"""Decides for each task by the policy in force, and keeps that policy the active one."""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import math
import os
import random
import threading
import time
import weakref
from types import TracebackType
from typing import Any, Callable, List, Mapping, Optional, Type

import attrs

from .._internal.logs import get_logger
from .._internal.threads import Deadline, join_all
from ..config import (
    ENVIRONMENT,
    POLICY_OVERRIDE_VARIABLE,
    boolean_variable,
    is_production,
    source_of,
    variable,
)
from ..errors import (
    ConfigurationError,
    PolicyIntegrityError,
    PolicyUnavailableError,
    PolicyViolationError,
    SekuireError,
)
from ..transport.retry import Backoff
from ..wire import protocol
from .client import PolicyClient
from .document import Policy
from .enforcer import PolicyEnforcer
from .limits import RateLimiter

__all__ = ["PolicyGateway", "may_only_warn"]

log = get_logger("sekuire.policy")

#: Seconds between tries while the active policy cannot be had: full jitter, doubling up to the second.
_RETRY_MIN, _RETRY_MAX = 0.5, 30.0
#: Fewest seconds after which a policy is asked for again only because its time is over.
_LEAST_TTL = 1.0
#: Seconds that close() waits for the thread; one in the middle of a request ends by itself.
_CLOSE_TIMEOUT = 2.0
#: Seconds that a first decision waits for a first answer, and between two looks at what else may end that wait.
_LOAD_TIMEOUT, _SLICE = 10.0, 0.1

_PINNED_AND_UNKNOWN = (
    "a policy key is pinned, and the workspace is not known: the platform has not told it at the login; give "
    "workspace_id= (SEKUIRE_WORKSPACE_ID)"
)
_REQUIRED_AND_UNKNOWN = (
    "policy_required=True, and the workspace is not known: the platform did not name it at the login; give "
    "workspace_id= (SEKUIRE_WORKSPACE_ID)"
)

#: Gets ``is_allowed(capability, tool=None)``, which asks a new policy whether such a task may run.
Listener = Callable[[Callable[..., bool]], None]


@attrs.frozen(slots=True)
class _Standing:
    """What decisions are made by; replaced whole, so that one decision sees one policy."""

    enforcer: PolicyEnforcer
    policy: Optional[Policy] = None
    #: Whether the platform has answered, with a policy or with "there is none", or a stored policy was good.
    is_loaded: bool = False


class PolicyGateway:
    """Asked before every task of a Worker, and told of every heartbeat.

    Decisions come from the policy in force, in memory: while the platform cannot be reached, or offers a policy that is
    refused, the last good one goes on deciding. A policy that was never loaded denies everything
    (:class:`PolicyUnavailableError`), a workspace without one allows everything. A new policy decides from the next
    task on.

    Any thread may call anything. A decision reads one reference and takes no lock of this object; the enforcer's rate
    limits have their own. ``sekuire-policy`` fetches: it is made when there is something to fetch, ends when that is
    done, and is this object's; :meth:`close` ends it. ``_lock`` guards that thread's state, ``_swap_lock`` the order of
    two results, ``_verdict`` whether there was one; none is held over I/O or a callback.

    :param client: fetches and verifies; it stays its maker's to close.
    :param warn_only: log what would be denied, and allow it. ``SEKUIRE_POLICY_DEV_OVERRIDE=1`` does the same.
    :param on_violation: as for :class:`~sekuire.PolicyEnforcer`.
    :param on_unavailable: ``"deny"`` or ``"allow"`` while no policy was ever loaded.
    :param on_change: ``"continue"``: running tasks go on under the policy they began with. ``"cancel"``: the context of
        one whose capability a new policy does not allow is cancelled, with the reason "policy changed".
    :param storage_uri: where the counts of rate limits are, such as ``redis://host:6379``, for processes that share
        them; None: in this process.
    :param environment: where this runs (default: ``SEKUIRE_ENVIRONMENT``, or ``"production"``). In production, and
        wherever a key is pinned, ``warn_only`` and the override are refused.
    :raises ConfigurationError: a wrong option, or the extra is not installed.
    """

    def __init__(
        self,
        client: PolicyClient,
        workspace_id: str,
        *,
        warn_only: bool = False,
        on_violation: Optional[Callable[..., object]] = None,
        on_unavailable: str = "deny",
        on_change: str = "continue",
        storage_uri: Optional[str] = None,
        environment: Optional[str] = None,
    ) -> None:
        if not protocol.is_id(workspace_id):
            raise ConfigurationError(f"must be a workspace's id, got {workspace_id!r}", "workspace_id")
        self._set_up(
            client,
            lambda: workspace_id,
            warn_only=warn_only,
            on_violation=on_violation,
            on_unavailable=on_unavailable,
            on_change=on_change,
            storage_uri=storage_uri,
            environment=environment,
        )

    @classmethod
    def _owning(
        cls,
        client: PolicyClient,
        workspace_id: Callable[[], Optional[str]],
        options: Mapping[str, Any],
        environment: Optional[str] = None,
    ) -> PolicyGateway:
        """A gateway that closes its client, for a workspace that may only be known after the login."""
        known = ("warn_only", "on_violation", "on_unavailable", "on_change", "storage_uri")
        unknown = next((name for name in options if name not in known), None)
        if unknown is not None:
            raise ConfigurationError(f"has no {unknown!r}; known are {', '.join(known)}", "policy_options")
        gateway = cls.__new__(cls)
        gateway._set_up(client, workspace_id, environment=environment, **options)
        gateway._owns_client = True
        return gateway

    def _set_up(
        self,
        client: PolicyClient,
        workspace_id: Callable[[], Optional[str]],
        *,
        warn_only: bool = False,
        on_violation: Optional[Callable[..., object]] = None,
        on_unavailable: str = "deny",
        on_change: str = "continue",
        storage_uri: Optional[str] = None,
        environment: Optional[str] = None,
    ) -> None:
        if not isinstance(client, PolicyClient):
            raise ConfigurationError(f"must be a PolicyClient, got {type(client).__name__}", "client")
        _check_choice("on_unavailable", on_unavailable, ("deny", "allow"))
        _check_choice("on_change", on_change, ("continue", "cancel"))
        if on_violation is not None and not callable(on_violation):
            raise ConfigurationError(f"must be callable, got {type(on_violation).__name__}", "on_violation")
        self._client = client
        self._owns_client = False
        self._workspace_id = workspace_id
        self._warn_only = may_only_warn(warn_only, environment, client.is_pinned)
        self._on_violation = on_violation
        self._allows_without = on_unavailable == "allow" or self._warn_only
        self._cancels = on_change == "cancel"
        self._is_required = False
        # Made now, whether the workspace is known or not: a store that cannot be used must be told at once.
        self._limiter = RateLimiter(storage_uri, namespace=workspace_id() or "?")
        self._standing = self._without("no policy has been loaded yet")
        #: ``time.monotonic()`` after which the policy is asked for again.
        self._due = math.inf
        self._lock = threading.Lock()
        self._swap_lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: Optional[threading.Thread] = None
        self._is_wanted = False
        #: The hash that the last heartbeat named.
        self._named: Optional[str] = None
        self._is_closed = False
        self._backoff = Backoff(_RETRY_MIN, _RETRY_MAX)
        self._not_before = 0.0
        #: Of the questions, in their order, and of the last whose answer was taken (under ``_swap_lock``).
        self._numbers = itertools.count(1)
        self._taken = 0
        #: Told of every answer and every failure to get one; guards the two below.
        self._verdict = threading.Condition()
        self._is_tried = False
        self._problem: Optional[str] = None
        self._listeners: List[Listener] = []
        _gateways.add(self)

    # -- deciding --

    @property
    def policy(self) -> Optional[Policy]:
        """The policy in force; None where the workspace has none, or none could be loaded."""
        return self._standing.policy

    @property
    def enforcer(self) -> PolicyEnforcer:
        """What decides now, for the finer questions: tools, domains, paths, models. Never kept for long: it is another
        one after the policy has changed."""
        return self._current()

    @property
    def is_active(self) -> bool:
        """Whether there is a workspace whose policy can be asked for; without one nothing is enforced."""
        return self._workspace_id() is not None

    def check_task(self, capability: str, tool: Optional[str] = None) -> Optional[PolicyEnforcer]:
        """Check that a task may begin, all of it by one policy. Return the enforcer that decided.

        :param tool: the tool that the task names, checked as its capability is.
        :raises PolicyViolationError: the capability or the tool is not allowed, or too many tasks have begun.
        :raises PolicyUnavailableError: no policy could be loaded, or the workspace is not known, and a key is pinned or
            a policy required.
        :raises ConfigurationError: rates are limited, and counted in the process that this one was forked from.
        """
        if not self._standing.is_loaded and not self.is_active:
            if self._client.is_pinned and not self._allows_without:
                # Whoever answers in the platform's place must not get round the key by telling no workspace.
                raise PolicyUnavailableError(_PINNED_AND_UNKNOWN)
            if self._is_required:
                raise PolicyUnavailableError(_REQUIRED_AND_UNKNOWN)
            return None
        enforcer = self._current()
        try:
            # First what costs nothing: a task that is denied must not use up what another one may need.
            enforcer.enforce_capability(capability)
            if tool is not None:
                enforcer.enforce_tool(tool)
            enforcer.enforce_rate_limit("requests")
        except PolicyViolationError as error:
            raise _unavailable(error) from None
        return enforcer

    def check_request(self) -> None:
        """Count one request against the policy's rate limits.

        :raises PolicyViolationError: a limit is reached; ``retry_after`` says for how long.
        :raises PolicyUnavailableError: no policy could be loaded.
        """
        try:
            self._current().enforce_rate_limit("requests")
        except PolicyViolationError as error:
            raise _unavailable(error) from None

    def check_capability(self, name: str) -> None:
        """Whether tasks of this capability may run.

        :raises PolicyViolationError: they may not.
        :raises PolicyUnavailableError: no policy could be loaded.
        """
        try:
            self._current().enforce_capability(name)
        except PolicyViolationError as error:
            raise _unavailable(error) from None

    def check_tool(self, name: str) -> None:
        """Check that this tool may be used.

        :raises PolicyViolationError: it may not.
        :raises PolicyUnavailableError: no policy could be loaded.
        """
        try:
            self._current().enforce_tool(name)
        except PolicyViolationError as error:
            raise _unavailable(error) from None

    def _current(self) -> PolicyEnforcer:
        standing = self._standing
        if not standing.is_loaded and not self._is_tried:
            # Nobody has loaded it, and a first question deserves an answer.
            with contextlib.suppress(PolicyUnavailableError):
                self.ensure_loaded()
            standing = self._standing
        if time.monotonic() >= self._due or not standing.is_loaded:
            self._wake(wait=False)
        return standing.enforcer

    # -- staying up to date --

    def ensure_loaded(self, timeout: float = _LOAD_TIMEOUT, stop: Optional[threading.Event] = None) -> None:
        """Wait for the first answer, unless it came before; then decide from ``PolicyClient(path=)`` if there is none.

        A Worker calls this after its login and before its first task. The loading goes on in the background.

        :param timeout: seconds to wait at most.
        :param stop: ends the wait too.
        :raises PolicyUnavailableError: there is neither an answer nor a stored policy.
        """
        deadline = Deadline(timeout)
        if self._standing.is_loaded or not self.is_active:
            return
        self._wake()
        with self._verdict:
            while not (self._is_tried or deadline.is_expired() or (stop is not None and stop.is_set())):
                if self._thread is None:
                    # Closed, or the interpreter is ending: nobody will load it.
                    break
                self._verdict.wait(min(_SLICE, deadline.remaining()))
        problem = self._problem or f"no answer within {timeout:g} s"
        workspace_id = self._workspace_id()
        if not self._standing.is_loaded and workspace_id is not None:
            self._fall_back(workspace_id, f"no policy could be loaded: {problem}")
        if not self._standing.is_loaded:
            raise PolicyUnavailableError(f"no policy could be loaded: {problem}")

    def require_policy(self) -> None:
        """Never again adopt that the workspace has no policy; the last good one stays in force.

        A Worker with ``policy_required=True`` calls this before it asks for a policy.
        """
        with self._swap_lock:
            self._is_required = True

    def refresh(self) -> Optional[Policy]:
        """Ask the platform now, on this thread; the policy in force then, None where the workspace has none.

        Where it raises, the last good policy stays in force.

        :raises SekuireError: as :meth:`PolicyClient.fetch_active_policy`.
        """
        workspace_id = self._workspace_id()
        if workspace_id is None:
            raise ConfigurationError(
                "is not known: the platform has not told it; give workspace_id= (SEKUIRE_WORKSPACE_ID)", "workspace_id"
            )
        number = next(self._numbers)
        self._client.invalidate_cache(workspace_id)
        try:
            policy = self._client.fetch_active_policy(workspace_id)
            self._adopt(workspace_id, policy, number)
        except SekuireError as error:
            try:
                self._stay(workspace_id, error)
            finally:
                self._note(str(error))
            raise
        self._due = time.monotonic() + max(self._client.cache_ttl, _LEAST_TTL) * random.uniform(0.9, 1.0)
        self._note(None)
        return policy

    def on_heartbeat_response(self, response: Any) -> None:
        """See whether the platform names another policy than the one in force; fetch it in the background then.

        :param response: a :class:`~sekuire.wire.models.HeartbeatReply`, or the answer's JSON as a mapping.
        """
        if isinstance(response, Mapping):
            named = response.get("active_policy_hash")
        else:
            named = getattr(response, "active_policy_hash", None)
        if not self.is_active:
            return
        self._named = named.lower() if isinstance(named, str) else None
        if self._named is not None and self._named != self._hash():
            self._wake(again=True)
        elif not self._standing.is_loaded or time.monotonic() >= self._due:
            self._wake()

    def add_listener(self, listener: Listener) -> None:
        """With ``on_change="cancel"``: have ``listener(is_allowed)`` called after a policy has changed, on the thread
        that loaded it. ``is_allowed(capability, tool=None)`` asks the new one."""
        with self._lock:
            self._listeners.append(listener)

    def remove_listener(self, listener: Listener) -> None:
        """Undo :meth:`add_listener`."""
        with self._lock:
            if listener in self._listeners:
                self._listeners.remove(listener)

    def close(self, timeout: float = _CLOSE_TIMEOUT) -> None:
        """End the thread, within ``timeout`` seconds, and close the connections to a shared store of rate limits;
        decisions go on by the policy in force. Idempotent."""
        with self._lock:
            self._is_closed = True
            thread = self._thread
        self._stop.set()
        self._limiter.close()
        if self._owns_client:
            self._client.close()
        if thread is not None and join_all([thread], Deadline(timeout)):
            log.warning("still running after the gateway was closed: %s (it ends with its request)", thread.name)

    def __enter__(self) -> PolicyGateway:
        return self

    def __exit__(
        self,
        kind: Optional[Type[BaseException]],
        error: Optional[BaseException],
        traceback: Optional[TracebackType],
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        if not hasattr(self, "_standing"):
            return "<PolicyGateway (not set up)>"
        policy = self._standing.policy
        state = (
            f"version {policy.version}" if policy is not None else ("no policy" if self._standing.is_loaded else "new")
        )
        return f"<PolicyGateway {self._workspace_id()} {state}>"

    # -- inside: the policy in force --

    def _enforcer_of(self, policy: Optional[Policy]) -> PolicyEnforcer:
        return PolicyEnforcer(policy, self._warn_only, self._on_violation, limiter=self._limiter)

    def _without(self, problem: str) -> _Standing:
        """What counts while no policy could be loaded."""
        if self._allows_without:
            return _Standing(self._enforcer_of(None))
        return _Standing(PolicyEnforcer.unavailable(problem, self._warn_only, self._on_violation))

    def _note(self, problem: Optional[str]) -> None:
        with self._verdict:
            self._problem = problem
            self._is_tried = True
            self._verdict.notify_all()

    def _adopt(self, workspace_id: str, policy: Optional[Policy], number: int) -> None:
        """Let ``policy`` decide from now on (None: everything is allowed); ``number`` is that of the question.

        :raises PolicyUnavailableError: there is none, and one is required.
        """
        with self._swap_lock:
            if policy is None and self._is_required:
                raise PolicyUnavailableError(
                    f"the platform says that {workspace_id} has no policy, and one is required; activate one"
                )
            standing = self._standing
            old = standing.policy
            is_late = number < self._taken
            self._taken = max(self._taken, number)
            if policy is not None and old is not None and old.workspace_id == policy.workspace_id:
                if policy.version < old.version:
                    # Another thread was faster with a newer one.
                    return
                if policy.hash == old.hash and policy.version == old.version:
                    return
            elif is_late:
                # There was a policy, or there was none: whoever asked later knows.
                return
            if policy is None and standing.is_loaded and old is None:
                return
            if self._limiter.namespace != workspace_id:
                # The one before has counted nothing, and so has no connection to close.
                self._limiter = self._limiter.renamed(workspace_id)
            enforcer = self._enforcer_of(policy)
            self._standing = _Standing(enforcer, policy, is_loaded=True)
        self._tell(workspace_id, policy, old)
        if self._cancels and policy is not None:
            with self._lock:
                listeners = list(self._listeners)
            for listener in listeners:
                try:
                    listener(functools.partial(_allows, enforcer))
                except Exception:
                    log.exception("telling of a new policy failed")

    def _tell(self, workspace_id: str, policy: Optional[Policy], old: Optional[Policy]) -> None:
        if policy is not None:
            log.info("policy %s of %s, version %d (%s), is in force", policy.policy_id, workspace_id, policy.version,
                     policy.origin)  # fmt: skip
        elif old is not None:
            log.warning("%s has no policy any more: everything is allowed", workspace_id)
        else:
            log.info("%s has no policy: everything is allowed", workspace_id)

    def _stay(self, workspace_id: str, error: SekuireError) -> None:
        """The active policy could not be had: go on with the last good one, if there is one."""
        self._fall_back(workspace_id, f"no policy could be loaded: {error}")
        standing = self._standing
        if standing.policy is not None:
            what = f"version {standing.policy.version} stays in force"
        elif standing.is_loaded:
            what = "everything stays allowed"
        else:
            what = "everything is allowed" if self._allows_without else "every task is denied"
            what += " until one is loaded"
        is_news = self._problem != str(error)
        level = logging.ERROR if isinstance(error, PolicyIntegrityError) or not standing.is_loaded else logging.WARNING
        log.log(
            level if is_news else logging.DEBUG, "the policy of %s cannot be had, %s: %s", workspace_id, what, error
        )

    def _fall_back(self, workspace_id: str, denial: str) -> None:
        """Without an answer: let a stored policy decide, or say why there is none."""
        if self._standing.is_loaded:
            return
        stored = self._client.last_good_policy(workspace_id)
        if stored is not None:
            try:
                self._adopt(workspace_id, stored, 0)
                return
            except PolicyIntegrityError as error:
                # It could be enforced when it was loaded; the working directory is gone, for example.
                denial = f"{denial}; the last good one cannot be enforced any more: {error}"
        with self._swap_lock:
            if not self._standing.is_loaded:
                self._standing = self._without(denial)

    # -- inside: the thread --

    def _wake(self, wait: bool = True, again: bool = False) -> None:
        """Have the thread fetch.

        :param wait: False where a decision asks: it must not wait for the lock, and another one will ask again.
        :param again: whether a fetch that goes on already may be too old.
        """
        if not self._lock.acquire(blocking=wait):
            return
        try:
            self._due = math.inf
            if self._thread is not None or self._is_closed:
                self._is_wanted = self._is_wanted or again
                return
            self._is_wanted = True
            thread = threading.Thread(target=self._run, name="sekuire-policy", daemon=True)
            try:
                thread.start()
            except RuntimeError:
                # No new thread any more: the interpreter is ending.
                return
            self._thread = thread
        finally:
            self._lock.release()

    def _hash(self) -> Optional[str]:
        policy = self._standing.policy
        return None if policy is None else policy.hash

    def _run(self) -> None:
        is_loaded = False
        while True:
            with self._lock:
                # A heartbeat may have asked meanwhile for the very policy that has come since.
                is_served = is_loaded and self._named == self._hash()
                if self._is_closed or not self._is_wanted or is_served:
                    self._is_wanted = False
                    self._thread = None
                    return
                self._is_wanted = False
            if self._stop.wait(max(0.0, self._not_before - time.monotonic())):
                continue
            try:
                is_loaded = self._refresh_once()
            except Exception:
                log.exception("refreshing the policy failed in an unforeseen way")
                is_loaded = False
                self._try_again(None)

    def _refresh_once(self) -> bool:
        """Fetch; whether there was an answer. If not, the thread tries again."""
        try:
            self.refresh()
        except SekuireError as error:
            self._try_again(getattr(error, "retry_after", None))
            return False
        self._backoff.reset()
        # What a heartbeat names may be ahead of what is served; one answer a moment is enough.
        self._not_before = time.monotonic() + _RETRY_MIN
        return True

    def _try_again(self, at_least: Optional[float]) -> None:
        self._not_before = time.monotonic() + max(0.1, self._backoff.next(at_least))
        with self._lock:
            self._is_wanted = True


def _allows(enforcer: PolicyEnforcer, capability: str, tool: Optional[str] = None) -> bool:
    """Return True if a task of this capability and this tool may run, rates aside."""
    return bool(enforcer.check_capability(capability)) and (tool is None or bool(enforcer.check_tool(tool)))


def _unavailable(error: PolicyViolationError) -> SekuireError:
    """``error``, or where it says that there is no policy, the error that says so."""
    return PolicyUnavailableError(error.reason) if error.rule == protocol.RULE_UNAVAILABLE else error


def _check_choice(option: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigurationError(f"must be {' or '.join(map(repr, choices))}, got {value!r}", option)


def may_only_warn(warn_only: object, environment: Optional[str], is_pinned: bool) -> bool:
    """Whether violations are only logged, as the option or ``SEKUIRE_POLICY_DEV_OVERRIDE`` asks.

    :raises ConfigurationError: they would be, where that is refused.
    """
    if not isinstance(warn_only, bool):
        raise ConfigurationError(f"must be True or False, got {warn_only!r}", "warn_only")
    option, source = "warn_only", None
    if boolean_variable(POLICY_OVERRIDE_VARIABLE) and not warn_only:
        option, source = "", source_of(POLICY_OVERRIDE_VARIABLE)
    elif not warn_only:
        return False
    where = environment or variable(ENVIRONMENT["environment"]) or "production"
    problem = ""
    if is_pinned:
        problem = "is refused where a policy key is pinned; remove one of the two"
    elif is_production(where):
        problem = (
            "is refused in production; where this is not production, say so: environment='development' "
            "(SEKUIRE_ENVIRONMENT=development)"
        )
    if problem:
        raise ConfigurationError(problem, option or None, source)
    log.warning(
        "POLICIES ARE NOT ENFORCED (%s, environment %r): what they deny is logged and allowed. Never use this in "
        "production", source or "warn_only=True", where,
    )  # fmt: skip
    return True


_gateways: weakref.WeakSet[PolicyGateway] = weakref.WeakSet()


def _after_fork() -> None:
    # The parent's thread is not here, and a lock that it held would never be released.
    for gateway in list(_gateways):
        gateway._lock = threading.Lock()
        gateway._swap_lock = threading.Lock()
        gateway._verdict = threading.Condition()
        gateway._thread = None
        if not gateway._is_closed:
            gateway._stop = threading.Event()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
