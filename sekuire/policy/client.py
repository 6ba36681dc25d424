"""Fetch a workspace's policy, verify it, and keep the last good one."""

from __future__ import annotations

import importlib.util
import os
import shlex
import threading
from typing import Any, Dict, Optional, Sequence, Tuple, Union

from .._internal import fork
from .._internal.clock import time
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
from .cache import PolicyCache, Stored, with_replaced
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

    __slots__ = (
        "answered_at",
        "epoch",
        "fetches",
        "is_loaded",
        "is_saved",
        "policy",
        "replaced",
        "version",
        "was_there",
    )

    def __init__(self) -> None:
        #: The last good policy. None: none is known, or the platform said that there is none.
        self.policy: Optional[Policy] = None
        #: True if a policy was ever seen, over restarts too.
        self.was_there = False
        #: The highest version ever seen, over restarts too; -1 where versions are not proved.
        self.version = -1
        #: Where versions are not proved: the hashes of the policies before the last one, the newest last.
        self.replaced: Tuple[str, ...] = ()
        #: True if the file has them all.
        self.is_saved = True
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
    :param signature: what a signature must cover: see ``policy_signature`` of :class:`PolicyClient`.
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
        signature: str = "bound",
    ) -> None:
        require_extra()
        self.cache_ttl = cache_ttl
        #: True if a signature must prove id, version and workspace too. If not, older policies can be replayed.
        self.proves_version = signature == "bound"
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
        """Return True if a pinned key must prove the origin of a policy."""
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

    def was_replaced(self, workspace_id: str, digest: str) -> bool:
        """Return True if a newer policy has replaced the one with this hash. Always False where versions say that."""
        return digest in self._known_of(workspace_id).replaced

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
        stored = self._cache.load(workspace_id)
        policy = self._from_disk(workspace_id, stored)
        with self._lock:
            if not known.is_loaded:
                known.is_loaded = True
                if known.policy is None:
                    known.policy = policy
                    known.was_there = stored.is_there
                    if self.proves_version:
                        known.version = stored.version if policy is None else policy.version
                    else:
                        known.replaced = stored.replaced
        return known

    def _from_disk(self, workspace_id: str, stored: Stored) -> Optional[Policy]:
        assert self._cache is not None
        if stored.body is None:
            return None
        try:
            policy = self._decode(stored.body, workspace_id)
            problem = ""
            if self.proves_version and policy.version < stored.version:
                problem = f"it is version {policy.version}, and version {stored.version} was seen before"
            elif not self.proves_version and policy.hash in stored.replaced:
                problem = "it was replaced before"
            if not problem:
                Rulebook(policy)
                return policy
        except PolicyIntegrityError as error:
            problem = str(error)
        log.error("the policy of %s in %s is refused and not used: %s", workspace_id, self._cache.path, problem)
        return None

    def _decode(self, body: bytes, workspace_id: str) -> Policy:
        return decode_policy(
            body, workspace_id=workspace_id, trusted_keys=self._keys, accepts_hash=not self.proves_version
        )

    def _fetch_unless_fresh(self, workspace_id: str, known: _Known, deadline: Deadline) -> Optional[Policy]:
        with self._lock:
            if known.is_fresh(self.cache_ttl):
                return known.policy
            epoch = known.epoch
        path = self._endpoints.path("policy", workspace_id=workspace_id)
        asked_at, asked_on = time.monotonic(), time.time()
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
            known.was_there = policy is not None
            known.version = policy.version if policy is not None and self.proves_version else -1
            if policy is None:
                known.replaced = ()
            elif old is not None and old.hash != policy.hash and not self.proves_version:
                known.replaced = with_replaced(known.replaced, old.hash)
            known.answered_at = asked_at if epoch == known.epoch else None
        if policy is None:
            if old is not None and self._cache is not None:
                self._cache.forget(workspace_id)
        elif old is None or old.raw != policy.raw:
            for warning in policy.warnings:
                log.warning("policy of %s, version %d: %s", workspace_id, policy.version, warning)
            self._save(workspace_id, known, policy, old, asked_on)
        return policy

    def _save(self, workspace_id: str, known: _Known, policy: Policy, old: Optional[Policy], asked_on: float) -> None:
        """Keep ``policy``, which replaces ``old``, in the file. Only the fetch in progress calls this."""
        if self._cache is None:
            return
        if self.proves_version:
            self._cache.save(workspace_id, policy.version, policy.raw, policy.hash)
            return
        mine: Tuple[str, ...] = () if old is None or old.hash == policy.hash else (old.hash,)
        if not known.is_saved:
            mine = known.replaced
        all_of_them = self._cache.save_replacing(workspace_id, policy.raw, policy.hash, mine, asked_on)
        with self._lock:
            known.is_saved = all_of_them is not None
            if all_of_them is not None:
                known.replaced = all_of_them

    def _read(self, workspace_id: str, known: _Known, reply: Reply) -> Optional[Policy]:
        """Return the policy in an answer that passed every check, or None if the answer says that there is none."""
        if reply.status == 404:
            self._check_none(workspace_id, known)
            return None
        policy = self._decode(reply.body, workspace_id)
        if self.proves_version:
            self._check_version(known, policy)
        else:
            self._check_replay(workspace_id, known, policy)
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
            was_there = any(one.was_there for one in self._known.values())
        if was_there or (self._cache is not None and self._cache.has_any()):
            before = f"version {known.version}" if known.version >= 0 else "a policy"
            where = "" if known.was_there else " of another workspace"
            raise PolicyIntegrityError(
                f"the platform says that {workspace_id} has no policy, which no key can prove; {before}{where}"
                " was there before. Activate a policy that allows what is meant" + self._or_forget(),
                expected=f"version {known.version} or later" if known.version >= 0 else "a signed policy",
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

    def _check_replay(self, workspace_id: str, known: _Known, policy: Policy) -> None:
        """Check that ``policy`` was not replaced before.

        :raises PolicyIntegrityError: it was.
        """
        old = known.policy
        if old is not None and old.hash == policy.hash:
            return
        if self._cache is not None and known.is_saved:
            # Another process may have replaced some, and `sekuire policy accept` has removed what may return.
            stored = self._cache.load(workspace_id)
            if stored.is_there:
                with self._lock:
                    known.replaced = stored.replaced
        if policy.hash in known.replaced:
            how = "restart, which forgets it, because there is no policy_path="
            if self._cache is not None:
                how = f"run: sekuire policy accept {policy.hash} --policy-path {shlex.quote(self._cache.path)}"
            raise PolicyIntegrityError(
                f"hash: {policy.hash} was in force before, and was replaced (an older policy, replayed?). If it is to "
                f"be in force again, {how}",
                expected="a policy that was not replaced before",
                found=policy.hash,
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
    :param policy_signature: what a signature must cover. ``"bound"``: the hash with id, version and workspace.
        ``"hash"``: a signature over the hash alone is accepted too. Older policies can then be replayed, but for the
        last 100 that were replaced.
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
            ClientSource(config),
            config.endpoints,
            config.trusted_policy_keys,
            config.path,
            config.cache_ttl,
            config.policy_signature,
        )

    def __enter__(self) -> PolicyClient:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
