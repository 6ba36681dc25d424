"""Fetches a workspace's policy, verifies it, and keeps the last good one."""

from __future__ import annotations

import functools
import importlib.util
import os
import threading
import time
import weakref
from types import TracebackType
from typing import Any, Callable, Dict, Iterator, Optional, Sequence, Tuple, Type, Union

from .._internal.logs import get_logger
from .._internal.threads import Deadline
from ..config import PolicyClientConfig, from_options, method_of_options
from ..credentials import RuntimeCredentialsStore
from ..credentials.login import TokenProvider, bearer_of
from ..credentials.store import own_copy
from ..errors import (
    AuthenticationError,
    ConfigurationError,
    PolicyIntegrityError,
    TransportError,
)
from ..transport.http import Credential, HttpClient, Reply
from ..transport.retry import Interrupted, call
from ..wire import protocol
from ..wire.verdict import Failed, Unauthorized, verdict
from .cache import PolicyCache
from .document import Policy, check_succession, decode_policy, parse_key
from .enforcer import PolicyEnforcer

__all__ = ["PolicyClient", "require_extra"]

log = get_logger("sekuire.policy")

#: Seconds a fetch may take, all its retries together.
FETCH_TIMEOUT = 20.0

#: Sends a GET with whatever credentials there are, within a deadline; any status is a reply.
Source = Callable[[str, Deadline], Reply]

_EXTRA = ("blake3", "cryptography", "rfc8785")


def missing_packages() -> Tuple[str, ...]:
    """Which packages of the extra are not installed."""
    return tuple(name for name in _EXTRA if importlib.util.find_spec(name) is None)


def require_extra() -> None:
    """:raises ConfigurationError: the extra is not installed."""
    missing = missing_packages()
    if missing:
        raise ConfigurationError(
            f"policies need {', '.join(missing)}, not installed here; run: pip install 'sekuire[policy]'"
        )


class _Flight:
    """A fetch in progress: the others wait for ``done`` and share ``policy`` or ``error``."""

    __slots__ = ("done", "epoch", "error", "policy")

    def __init__(self, epoch: int) -> None:
        #: How often the cache had been invalidated when it began.
        self.epoch = epoch
        self.done = threading.Event()
        self.policy: Optional[Policy] = None
        self.error: Optional[BaseException] = None


class _Known:
    """What is known of one workspace. The client's lock guards every field."""

    __slots__ = ("answered_at", "epoch", "flight", "is_loaded", "policy", "version")

    def __init__(self) -> None:
        #: The last good policy; None: none is known, or the platform said that there is none.
        self.policy: Optional[Policy] = None
        #: The highest version ever seen, over restarts too.
        self.version = -1
        #: ``time.monotonic()`` of the last good answer; None: ask again.
        self.answered_at: Optional[float] = None
        #: How often the cache was invalidated.
        self.epoch = 0
        self.is_loaded = False
        self.flight: Optional[_Flight] = None


class PolicyClient:
    """Asks the platform for active policies. Whatever it returns has passed every check of docs/protocol.md, "Policy".

    It authenticates with ``token_provider``, or the runtime token in ``credentials_store`` (shared with a
    :class:`~sekuire.Worker` or :class:`~sekuire.Beacon`, which renews it), or ``api_key``; the next of them where one
    has nothing to give or is refused.

    Any thread may call anything. ``_lock`` guards what is known and is not held over I/O; per workspace one fetch is in
    flight, and whoever else asks meanwhile waits for it and shares its result. It has no thread of its own.

    :param trusted_policy_keys: Ed25519 public keys, each a str in hex or base64. With one given, only a policy that one
        of them signed is taken; without, a policy's hash and signature prove that it is whole, not whose it is.
    :param cache_ttl: seconds for which an answer is used again; 0 asks every time.
    :param path: a file that keeps the last good policy and its version over restarts, readable by its owner only; what
        is read from it is verified again.
    :raises ConfigurationError: a wrong option, nothing to authenticate with, or the extra is not installed.
    """

    @method_of_options(PolicyClientConfig)
    def __init__(self, options: Dict[str, Any]) -> None:
        config = from_options(PolicyClientConfig, options)
        require_extra()
        http = HttpClient(config, pool_size=2)
        self._set_up(_Caller(http, config), config.endpoints, config.trusted_policy_keys, config.cache_ttl, config.path)
        self._http: Optional[HttpClient] = http

    def _set_up(
        self,
        source: Source,
        endpoints: protocol.Endpoints,
        keys: Sequence[str],
        cache_ttl: float,
        path: Union[str, os.PathLike[str], None],
    ) -> None:
        self._source = source
        self._endpoints = endpoints
        self._keys = tuple(parse_key(key) for key in keys)
        self.cache_ttl = cache_ttl
        self._cache = None if path is None else PolicyCache(path)
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._known: Dict[str, _Known] = {}
        _clients.add(self)

    # -- what a user asks --

    @property
    def is_pinned(self) -> bool:
        """Whether the origin of a policy must be proved by a pinned key."""
        return bool(self._keys)

    def fetch_active_policy(self, workspace_id: str) -> Optional[Policy]:
        """The workspace's active policy, verified; None where it has none. From memory for ``cache_ttl`` seconds.

        Whatever it raises, the last good policy stays what :meth:`last_good_policy` returns.

        :raises PolicyIntegrityError: the policy was refused; with what was expected and found.
        :raises AuthenticationError: the platform refused the credentials.
        :raises APIError, TransportError: no usable answer came within 20 s, retries included.
        """
        if not protocol.is_id(workspace_id):
            raise ConfigurationError(f"must be a workspace's id, got {workspace_id!r}", "workspace_id")
        deadline = Deadline(FETCH_TIMEOUT)
        known = self._known_of(workspace_id)
        epoch = -1
        while True:
            with self._lock:
                at = known.answered_at
                if at is not None and time.monotonic() - at < self.cache_ttl:
                    return known.policy
                # What was asked before an invalidation that came before this call may be too old for it.
                epoch = known.epoch if epoch < 0 else epoch
                flight = known.flight
                if flight is None:
                    mine = known.flight = _Flight(known.epoch)
            if flight is None:
                return self._lead(workspace_id, known, mine, deadline)
            if not flight.done.wait(deadline.remaining()):
                raise TransportError("waiting for another thread's fetch of the policy took too long")
            if flight.epoch < epoch:
                continue
            if flight.error is None:
                return flight.policy
            raise own_copy(flight.error)

    def last_good_policy(self, workspace_id: str) -> Optional[Policy]:
        """The last policy that passed every check, however old, from memory or from ``path``; None where there is none.

        Asks nobody.
        """
        return self._known_of(workspace_id).policy

    def invalidate_cache(self, workspace_id: str) -> None:
        """Ask the platform at the next :meth:`fetch_active_policy`; the last good policy stays known."""
        known = self._known_of(workspace_id)
        with self._lock:
            known.answered_at = None
            known.epoch += 1

    def close(self) -> None:
        """End the waits between retries and close the connections. What is known stays."""
        self._stop.set()
        if self._http is not None:
            self._http.close()

    def __enter__(self) -> PolicyClient:
        return self

    def __exit__(
        self,
        kind: Optional[Type[BaseException]],
        error: Optional[BaseException],
        traceback: Optional[TracebackType],
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        pinned = f"{len(self._keys)} pinned keys" if self._keys else "no pinned key"
        return f"<PolicyClient {len(self._known)} workspaces, {pinned}>"

    # -- inside --

    def _known_of(self, workspace_id: str) -> _Known:
        with self._lock:
            known = self._known.get(workspace_id)
            if known is None:
                known = self._known[workspace_id] = _Known()
            if known.is_loaded or self._cache is None:
                return known
        # Outside the lock: this reads a file. Two threads may do it at once, and find the same.
        version, body = self._cache.load(workspace_id)
        policy = None if body is None else self._from_disk(workspace_id, version, body)
        with self._lock:
            if not known.is_loaded:
                known.is_loaded = True
                if known.policy is None:
                    known.policy = policy
                    known.version = version if policy is None else policy.version
        return known

    def _from_disk(self, workspace_id: str, version: int, body: bytes) -> Optional[Policy]:
        assert self._cache is not None
        try:
            policy = decode_policy(body, workspace_id=workspace_id, trusted_keys=self._keys)
            if policy.version >= version:
                PolicyEnforcer(policy)
                return policy
            problem = f"it is version {policy.version}, and version {version} was seen before"
        except PolicyIntegrityError as error:
            problem = str(error)
        log.error("the policy of %s in %s is refused and not used: %s", workspace_id, self._cache.path, problem)
        return None

    def _lead(self, workspace_id: str, known: _Known, flight: _Flight, deadline: Deadline) -> Optional[Policy]:
        try:
            flight.policy = self._fetch(workspace_id, known, flight.epoch, deadline)
            return flight.policy
        except Exception as error:
            flight.error = error
            raise
        except BaseException as error:
            # Ctrl-C, for example: it is meant for this thread only.
            flight.error = TransportError(f"fetching the policy was interrupted ({type(error).__name__})")
            raise
        finally:
            with self._lock:
                known.flight = None
            flight.done.set()

    def _fetch(self, workspace_id: str, known: _Known, epoch: int, deadline: Deadline) -> Optional[Policy]:
        path = self._endpoints.path("policy", workspace_id=workspace_id)
        asked_at = time.monotonic()
        try:
            reply = call(lambda: self._ask(path, deadline), stop=self._stop, deadline=deadline)
        except Interrupted:
            reply = None
        if reply is None:
            raise TransportError("the policy client was closed")
        policy = None
        if reply.status == 404:
            self._check_none(workspace_id, known)
        else:
            policy = decode_policy(reply.body, workspace_id=workspace_id, trusted_keys=self._keys)
            self._check_version(known, policy)
            # One that cannot be enforced on this machine must not take the place of one that can.
            PolicyEnforcer(policy)
        with self._lock:
            old = known.policy
            known.policy = policy
            known.version = -1 if policy is None else policy.version
            known.answered_at = asked_at if epoch == known.epoch else None
        if policy is None:
            if old is not None and self._cache is not None:
                self._cache.forget(workspace_id)
        elif old is None or old.raw != policy.raw:
            for warning in policy.warnings:
                log.warning("policy of %s, version %d: %s", workspace_id, policy.version, warning)
            if self._cache is not None:
                self._cache.save(workspace_id, policy.version, policy.raw)
        return policy

    def _ask(self, path: str, deadline: Deadline) -> Reply:
        """Ask once. Return the policy's answer, or the 404 that says that there is none.

        :raises SekuireError: any other answer.
        """
        reply = self._source(path, deadline)
        found = verdict("policy", reply)
        if not isinstance(found, Failed):
            return reply
        if isinstance(found, Unauthorized):
            code = getattr(found.error, "code", None)
            raise AuthenticationError(f"the platform refused the credentials: {found.error}", 401, code)
        raise found.error

    def _check_none(self, workspace_id: str, known: _Known) -> None:
        """Check that "there is no policy" may be believed: nobody signs it.

        :raises PolicyIntegrityError: a key is pinned, and a version was seen before, of any workspace: whoever can
            answer in the platform's place can name a workspace that never had a policy.
        """
        if not self._keys:
            return
        with self._lock:
            seen = max((one.version for one in self._known.values()), default=-1)
        if seen < 0 and self._cache is not None:
            seen = self._cache.highest_version()
        if seen >= 0:
            version = known.version if known.version >= 0 else seen
            where = "" if known.version >= 0 else " of another workspace"
            raise PolicyIntegrityError(
                f"the platform says that {workspace_id} has no policy, which no key can prove; version {version}{where}"
                " was there before. Activate a policy that allows what is meant" + self._or_forget(),
                expected=f"version {version} or later" if known.version >= 0 else "a signed policy",
                found="none",
            )

    def _check_version(self, known: _Known, policy: Policy) -> None:
        """:raises PolicyIntegrityError: an older one than was seen before, or another with the same number."""
        if known.policy is not None:
            check_succession(known.policy, policy)
        if policy.version < known.version:
            raise PolicyIntegrityError(
                f"version: {policy.version} is older than {known.version}, which was seen before (a rollback?). "
                "Activate a newer one" + self._or_forget(),
                expected=f"{known.version} or later",
                found=str(policy.version),
            )

    def _or_forget(self) -> str:
        where = f"remove {self._cache.path} and " if self._cache is not None else ""
        return f", or {where}restart if the platform itself was set back"


class InstallationPolicyClient(PolicyClient):
    """Fetch policies with the connections and credentials of an installation, for a :class:`~sekuire.SekuireSDK`."""

    def __init__(
        self,
        source: Source,
        endpoints: protocol.Endpoints,
        trusted_policy_keys: Sequence[str],
        path: Union[str, os.PathLike[str], None],
    ) -> None:
        require_extra()
        self._set_up(source, endpoints, trusted_policy_keys, 300.0, path)
        self._http = None


class _Caller:
    """GETs with a client's own credentials. Any thread; it keeps no state but a token provider's."""

    def __init__(self, http: HttpClient, config: PolicyClientConfig) -> None:
        self._http = http
        self._provider = None if config.token_provider is None else TokenProvider(config.token_provider)
        self._store: Optional[RuntimeCredentialsStore] = config.credentials_store
        self._api_key = config.api_key

    def __call__(self, path: str, deadline: Deadline) -> Reply:
        reply: Optional[Reply] = None
        for credential in self._ways():
            timeout = max(deadline.remaining(), 0.001)
            reply = self._http.request("GET", path, credential=credential, timeout=timeout)
            if reply.status != 401:
                break
        if reply is None:
            raise TransportError("the credentials_store holds no runtime token yet; waiting for one")
        return reply

    def _ways(self) -> Iterator[Credential]:
        """What to try; asked for the next only after a 401."""
        if self._provider is not None:
            first = self._provider.ask()
            yield functools.partial(protocol.bearer, first)
            second = self._provider.ask()
            if second != first:
                yield functools.partial(protocol.bearer, second)
        if self._store is not None:
            snapshot = self._store.snapshot
            bearer = bearer_of(snapshot)
            if bearer is not None:
                yield bearer
            # Refused, or none there: whoever renews the token may have done so meanwhile.
            self._store.reload()
            newer = self._store.snapshot
            bearer = bearer_of(newer)
            if bearer is not None and newer.generation != snapshot.generation:
                yield bearer
        if self._api_key is not None:
            yield functools.partial(protocol.api_key_header, self._api_key)


_clients: weakref.WeakSet[PolicyClient] = weakref.WeakSet()


def _after_fork() -> None:
    # A lock held by a thread of the parent at the moment of the fork would never be released in the child.
    for client in list(_clients):
        client._lock = threading.Lock()
        for known in client._known.values():
            known.flight = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
