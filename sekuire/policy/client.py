"""Fetch a workspace's policy, verify it, and keep the last good one."""

from __future__ import annotations

import importlib.util
import os
import threading
import time
from typing import Any, Dict, Optional, Sequence, Tuple, Union

from .._internal import fork
from .._internal.logs import get_logger
from .._internal.single_flight import Flight, SingleFlight
from .._internal.threads import Deadline
from ..config import PolicyClientConfig, from_options, method_of_options
from ..errors import (
    AuthenticationError,
    ConfigurationError,
    PolicyIntegrityError,
    TransportError,
)
from ..transport.http import Reply
from ..transport.retry import Interrupted, call
from ..wire import protocol
from ..wire.verdict import Failed, Unauthorized, verdict
from .cache import PolicyCache
from .document import Policy, check_succession, decode_policy, parse_key
from .rulebook import Rulebook
from .source import ClientSource, Source

__all__ = ["PolicyClient", "PolicyFetcher", "missing_packages", "require_extra"]

log = get_logger("sekuire.policy")

#: Seconds a fetch may take, all its retries together.
FETCH_TIMEOUT = 20.0
#: Seconds for which an answer is used again, by default.
CACHE_TTL = 300.0

_EXTRA = ("blake3", "cryptography", "rfc8785")


def missing_packages() -> Tuple[str, ...]:
    """Return the packages of the extra that are not installed."""
    return tuple(name for name in _EXTRA if importlib.util.find_spec(name) is None)


def require_extra() -> None:
    """Check that the extra is installed.

    :raises ConfigurationError: it is not.
    """
    missing = missing_packages()
    if missing:
        raise ConfigurationError(
            f"policies need {', '.join(missing)}, not installed here; run: pip install 'sekuire[policy]'"
        )


class _Known:
    """Hold what is known of one workspace. The fetcher's lock guards every field but ``fetches``."""

    __slots__ = ("answered_at", "epoch", "fetches", "is_loaded", "policy", "version")

    def __init__(self) -> None:
        #: The last good policy. None: none is known, or the platform said that there is none.
        self.policy: Optional[Policy] = None
        #: The highest version ever seen, over restarts too.
        self.version = -1
        #: ``time.monotonic()`` of the last good answer. None: ask again.
        self.answered_at: Optional[float] = None
        #: How often the cache was invalidated.
        self.epoch = 0
        #: True once the file was read.
        self.is_loaded = False
        self.fetches = SingleFlight[Optional[Policy]]("fetch of the policy")

    def is_fresh(self, ttl: float) -> bool:
        """Return True if the last answer is not older than ``ttl`` seconds."""
        return self.answered_at is not None and time.monotonic() - self.answered_at < ttl


class PolicyFetcher:
    """Ask a source for active policies. Whatever this returns has passed every check of docs/protocol.md, "Policy".

    :param source: sends the requests.
    :param cache_ttl: seconds for which an answer is used again; 0 asks every time.
    :raises ConfigurationError: a wrong key, a path that cannot be used, or the extra is not installed.
    """

    # Threads: any thread may call anything. `_lock` guards what is known and is not held over I/O. A workspace has one
    # fetch at a time; whoever asks during it waits for it and shares its result. There is no thread of its own.

    def __init__(
        self,
        source: Source,
        endpoints: protocol.Endpoints,
        trusted_policy_keys: Sequence[str] = (),
        path: Union[str, os.PathLike[str], None] = None,
        cache_ttl: float = CACHE_TTL,
    ) -> None:
        require_extra()
        self.cache_ttl = cache_ttl
        self._source = source
        self._endpoints = endpoints
        self._keys = tuple(parse_key(key) for key in trusted_policy_keys)
        self._cache = None if path is None else PolicyCache(path)
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._known: Dict[str, _Known] = {}
        fork.reset_in_child(self, PolicyFetcher.reset_in_child)

    # -- what a user asks --

    @property
    def is_pinned(self) -> bool:
        """True if a pinned key must prove the origin of a policy."""
        return bool(self._keys)

    def fetch_active_policy(self, workspace_id: str) -> Optional[Policy]:
        """Return the workspace's active policy, verified, or None if it has none.

        The answer comes from memory for ``cache_ttl`` seconds. Whatever this raises, :meth:`last_good_policy` goes on
        returning the last good policy.

        :raises PolicyIntegrityError: the policy was refused; with what was expected and found.
        :raises AuthenticationError: the platform refused the credentials.
        :raises APIError, TransportError: no usable answer came within 20 s, retries included.
        """
        if not protocol.is_id(workspace_id):
            raise ConfigurationError(f"must be a workspace's id, got {workspace_id!r}", "workspace_id")
        deadline = Deadline(FETCH_TIMEOUT)
        known = self._known_of(workspace_id)
        with self._lock:
            if known.is_fresh(self.cache_ttl):
                return known.policy
            epoch = known.epoch

        def is_recent(flight: Flight[Optional[Policy]]) -> bool:
            # A fetch that began before an invalidation may be too old for whoever asks after it.
            return isinstance(flight.tag, int) and flight.tag >= epoch

        return known.fetches.run(
            lambda: self._fetch_unless_fresh(workspace_id, known, deadline), deadline, tag=epoch, may_share=is_recent
        )

    def last_good_policy(self, workspace_id: str) -> Optional[Policy]:
        """Return the last policy that passed every check, however old, from memory or from ``path``, or None.

        This sends no request.
        """
        return self._known_of(workspace_id).policy

    def invalidate_cache(self, workspace_id: str) -> None:
        """Have the next :meth:`fetch_active_policy` ask the platform. The last good policy stays known."""
        known = self._known_of(workspace_id)
        with self._lock:
            known.answered_at = None
            known.epoch += 1

    def close(self) -> None:
        """End the waits between retries and close the connections. What is known stays known."""
        self._stop.set()
        self._source.close()

    def __repr__(self) -> str:
        pinned = f"{len(self._keys)} pinned keys" if self._keys else "no pinned key"
        return f"<{type(self).__name__} {len(self._known)} workspaces, {pinned}>"

    # -- inside --

    def _known_of(self, workspace_id: str) -> _Known:
        with self._lock:
            known = self._known.get(workspace_id)
            if known is None:
                known = self._known[workspace_id] = _Known()
            if known.is_loaded or self._cache is None:
                return known
        # Outside the lock: this reads a file. Two threads may do it at the same time, and find the same.
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
                Rulebook(policy)
                return policy
            problem = f"it is version {policy.version}, and version {version} was seen before"
        except PolicyIntegrityError as error:
            problem = str(error)
        log.error("the policy of %s in %s is refused and not used: %s", workspace_id, self._cache.path, problem)
        return None

    def _fetch_unless_fresh(self, workspace_id: str, known: _Known, deadline: Deadline) -> Optional[Policy]:
        with self._lock:
            if known.is_fresh(self.cache_ttl):
                return known.policy
            epoch = known.epoch
        path = self._endpoints.path("policy", workspace_id=workspace_id)
        asked_at = time.monotonic()
        try:
            reply = call(lambda: self._ask(path, deadline), stop=self._stop, deadline=deadline)
        except Interrupted:
            reply = None
        if reply is None:
            raise TransportError("the policy client was closed")
        policy = self._read(workspace_id, known, reply)
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

    def _read(self, workspace_id: str, known: _Known, reply: Reply) -> Optional[Policy]:
        """Return the policy in an answer that passed every check, or None if the answer says that there is none."""
        if reply.status == 404:
            self._check_none(workspace_id, known)
            return None
        policy = decode_policy(reply.body, workspace_id=workspace_id, trusted_keys=self._keys)
        self._check_version(known, policy)
        # A policy that cannot be enforced on this machine must not replace one that can.
        Rulebook(policy)
        return policy

    def _ask(self, path: str, deadline: Deadline) -> Reply:
        """Ask once. Return the answer that holds a policy, or the 404 that says that there is none.

        :raises SekuireError: any other answer.
        """
        reply = self._source.get(path, deadline)
        found = verdict("policy", reply)
        if not isinstance(found, Failed):
            return reply
        if isinstance(found, Unauthorized) and not found.is_foreign:
            code = getattr(found.error, "code", None)
            raise AuthenticationError(f"the platform refused the credentials: {found.error}", 401, code)
        raise found.error

    def _check_none(self, workspace_id: str, known: _Known) -> None:
        """Check that "there is no policy" may be believed, because nobody signs it.

        :raises PolicyIntegrityError: a key is pinned, and a version was seen before, of any workspace. Whoever can
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
        """Check that ``policy`` is newer than what was seen before.

        :raises PolicyIntegrityError: it is older, or another one with the same number.
        """
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

    def reset_in_child(self) -> None:
        """Replace what a forked child cannot use of its parent."""
        self._lock = threading.Lock()


class PolicyClient(PolicyFetcher):
    """Ask the platform for active policies over connections of its own. ::

        with PolicyClient(os.environ["SEKUIRE_API_URL"], api_key=os.environ["SEKUIRE_API_KEY"]) as client:
            policy = client.fetch_active_policy("ws_1")
            if policy is not None:
                print(policy.version, policy.origin)

    Whatever it returns has passed every check of docs/protocol.md, "Policy". It authenticates with ``token_provider``,
    the runtime token in ``credentials_store``, or ``api_key``. It tries the next of them if one has no token or is
    refused. A :class:`~sekuire.Worker` or :class:`~sekuire.Beacon` that shares the store renews its token.

    Any thread may call anything.

    :param trusted_policy_keys: Ed25519 public keys, each a str in hex or base64. With one given, only a policy that one
        of them signed is accepted. Without, hash and signature prove that a policy is whole, not whose it is.
    :param cache_ttl: seconds for which an answer is used again; 0 asks every time.
    :param path: a file that keeps the last good policy and its version over restarts, readable by its owner only. What
        is read from it is verified again.
    :raises ConfigurationError: a wrong option, nothing to authenticate with, or the extra is not installed.
    """

    @method_of_options(PolicyClientConfig)
    def __init__(self, options: Dict[str, Any]) -> None:
        config = from_options(PolicyClientConfig, options)
        require_extra()
        super().__init__(
            ClientSource(config), config.endpoints, config.trusted_policy_keys, config.path, config.cache_ttl
        )

    def __enter__(self) -> PolicyClient:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
