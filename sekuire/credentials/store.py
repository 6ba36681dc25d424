"""Store credentials for several threads, objects and processes: numbered snapshots, one renewal at a time."""

# Threads: any thread may call anything. `_lock` guards the snapshot and is never held over I/O. `_write_lock` orders
# writers (a renewal, a heartbeat's token, the user's update) and guards what only they use. It is held while the file
# is written, because a rotated refresh token must be on disk before anyone uses it.

from __future__ import annotations

import hashlib
import os
import random
import secrets
import threading
from typing import Callable, List, Optional, Tuple, Union

import attrs

from .._internal import fork
from .._internal.clock import time
from .._internal.logs import get_logger
from .._internal.single_flight import Flight, SingleFlight
from .._internal.threads import Deadline
from .._internal.values import Value
from ..errors import AuthenticationError, ConfigurationError, PlanLimitError, TransportError
from ..secret import Secret
from ..transport.retry import Interrupted, full_jitter
from ..wire.models import Grant, RuntimeCredentials
from ..wire.protocol import MAX_TOKEN_LIFETIME
from .file import CredentialsFile, Stored

log = get_logger("sekuire.credentials")

_LOCK_TIMEOUT = 10.0
#: Hashes of settings that are remembered: those of the objects that share one store.
_MOST_SEEDS = 8
#: First and longest delay, in seconds, before a login that replaces a token which was refused at its first use.
_LOGIN_MIN, _LOGIN_MAX = 0.5, 60.0
#: Replaced tokens that are remembered, because a platform may accept them for a while yet.
_MOST_REPLACED = 100
#: Errors that concern the login methods of the renewing thread, or its own stop. Another thread may succeed.
_OF_THE_LEADER = (AuthenticationError, PlanLimitError, Interrupted)


@attrs.frozen(kw_only=True, slots=True, eq=False, repr=False)
class Snapshot(Value):
    """Hold the credentials at one moment.

    ``generation`` rises with every change. ``ends_at`` (monotonic) and ``ends_at_wall`` (``time.time()``) are the end
    of the runtime token, if it is known. The earlier of the two counts, because the first stands still during a suspend
    and the second jumps when the clock is set. ``lifetime`` counts the seconds that the token had when it was obtained.
    """

    generation: int
    credentials: RuntimeCredentials
    lifetime: Optional[float] = None
    ends_at: Optional[float] = None
    ends_at_wall: Optional[float] = None
    #: Part of the lifetime, 0 to 0.2, by which an early refresh comes sooner, so that a fleet does not refresh at once.
    jitter: float = attrs.field(factory=lambda: random.uniform(0.0, 0.2))

    def time_left(self) -> Optional[float]:
        """Return the seconds that the runtime token has left, at least 0. Return None if its end is unknown."""
        if self.ends_at is None or self.ends_at_wall is None:
            return None
        return max(0.0, min(self.ends_at - time.monotonic(), self.ends_at_wall - time.time()))


@attrs.frozen(kw_only=True, slots=True, eq=False, repr=False)
class Renewed(Value):
    """Hold the result of a renewal: a grant, and when its request was sent (monotonic and wall clock)."""

    grant: Grant
    sent_at: float
    sent_wall: float


class _Rejections:
    """Delay the next login while the platform rejects at once what it has just granted.

    A platform that does so must not be logged in to in a loop. From the second token in a row that was never accepted,
    the delay doubles. Needs the store's lock.
    """

    def __init__(self) -> None:
        #: The newest generation whose runtime token the platform accepted.
        self.proven = 0
        self._rejected = 0
        self._count = 0
        self._next_login = 0.0

    def note_accepted(self, generation: int) -> None:
        if generation > self.proven:
            self.proven = generation
            self._count = 0

    def note_rejected(self, generation: int) -> float:
        """Return the seconds until the next login."""
        now = time.monotonic()
        if generation > max(self.proven, self._rejected):
            self._rejected = generation
            self._count += 1
            if self._count > 1:
                self._next_login = now + full_jitter(self._count - 2, _LOGIN_MIN, _LOGIN_MAX)
        return max(0.0, self._next_login - now)


class RuntimeCredentialsStore:
    """Share runtime credentials between objects such as a Beacon and a Worker, and keep them in a file.

    ::

        store = RuntimeCredentialsStore(path="/var/lib/agent/credentials.json")
        worker = create_worker(agent_id="agent-1", credentials_store=store)

    :param credentials: what to begin with.
    :param path: a file in which the credentials outlive the process, in a directory that exists. It is created with
        mode 0600 and must stay private to this user. Processes may share it. What it holds takes precedence over
        ``credentials``, unless those are new.
    :raises ConfigurationError: an argument is wrong, or the file is not private, belongs to another user, or is mounted
        as a single file.
    """

    def __init__(
        self, credentials: Optional[RuntimeCredentials] = None, *, path: Union[str, os.PathLike[str], None] = None
    ) -> None:
        if credentials is not None and not isinstance(credentials, RuntimeCredentials):
            raise ConfigurationError(f"must be RuntimeCredentials, got {type(credentials).__name__}", "credentials")
        self._lock, self._write_lock = threading.Lock(), threading.Lock()
        #: The renewal in progress, which all objects that share this store wait for.
        self.renewals = SingleFlight[Snapshot](
            "renewal of the credentials", misuse="a token_provider must not use the credentials that it provides"
        )
        self._seeds: Tuple[str, ...] = ()
        self._offered: Tuple[str, ...] = ()
        self._revision = 0
        #: Who uses this store, and which agent's the credentials of which installation are.
        self._agent_id: Optional[str] = None
        self._owner: Tuple[Optional[str], Optional[str]] = (None, None)
        self._is_from_file = False
        #: The last workspace that an answer named and that was not adopted.
        self._foreign_workspace: Optional[str] = None
        self._holder: Optional[str] = None
        self._rejections = _Rejections()
        #: The newest generation whose runtime token the platform accepted. Others only read it.
        self.proven = 0
        self._file = CredentialsFile(path) if path is not None else None
        self._snapshot = Snapshot(generation=0, credentials=RuntimeCredentials())
        self._replaced: Tuple[Secret, ...] = ()
        stored = self._file.load() if self._file is not None else None
        if stored is not None:
            self._adopt(stored)
        if credentials is not None:
            self.seed(credentials, None)
        fork.reset_in_child(self, RuntimeCredentialsStore._reset)

    # -- what a user sees --

    @property
    def current(self) -> RuntimeCredentials:
        """Return the present credentials. All fields are None if there are none."""
        return self._snapshot.credentials

    @property
    def generation(self) -> int:
        """Return a number that rises with every change."""
        return self._snapshot.generation

    def update(self, credentials: RuntimeCredentials) -> None:
        """Replace the credentials. They are in the file, if there is one, before anyone sees them.

        :raises TransportError: another process or thread holds the file for more than 10 s.
        """
        if not isinstance(credentials, RuntimeCredentials):
            raise ConfigurationError(f"must be RuntimeCredentials, got {type(credentials).__name__}", "credentials")
        with self._writing(Deadline(_LOCK_TIMEOUT)):
            # For the revision: others ignore one that is not higher than what they have read.
            self._catch_up()
            self._store(credentials, _lifetime_of(credentials), time.monotonic(), time.time())

    def clear(self) -> None:
        """Forget the credentials, also on disk."""
        self.update(RuntimeCredentials())

    def __repr__(self) -> str:
        where = f" path={self._file.path!r}" if self._file is not None else ""
        return f"<RuntimeCredentialsStore generation={self.generation}{where}>"

    # -- what the library uses --

    @property
    def snapshot(self) -> Snapshot:
        return self._snapshot

    @property
    def secrets(self) -> Tuple[Secret, ...]:
        """Return the tokens that must not be shown: the present ones, and the newest of those that they replaced.

        A handler may have read a token just before a heartbeat or another process replaced it.
        """
        with self._lock:
            return (*_tokens_of(self._snapshot.credentials), *self._replaced)

    @property
    def origin(self) -> str:
        """Return where the credentials are and whose, for an error that says that they are another agent's."""
        where = f" in {self._file.path}" if self._file is not None else ""
        return f"the credentials{where} belong to " + (f"the agent {self._owner[1]!r}" if self._owner[1] else "another")

    def seed(
        self, credentials: RuntimeCredentials, install_token_hash: Optional[str], agent_id: Optional[str] = None
    ) -> None:
        """Start from what the user's settings give, unless this store already grew from the same settings.

        Rotation makes a store's content newer than the settings it began with: the same settings at a restart must
        not bring a consumed token back, and new settings must win.

        :raises TransportError: the settings are new, and another holds the file for more than 10 s.
        :param install_token_hash: a hash of the install token given, so that a new one counts as new settings.
        :param agent_id: whose settings they are.
        """
        self._agent_id = agent_id or self._agent_id
        mark = _seed_of(credentials, install_token_hash)
        if mark is None:
            return
        with self._lock:
            self._offered = (*self._offered, mark)[-_MOST_SEEDS:]
        if mark in self._seeds:
            # The usual restart. It must not wait for a lock that another process may hold for as long as an outage.
            return
        with self._writing(Deadline(_LOCK_TIMEOUT)):
            self._catch_up()
            if mark in self._seeds:
                return
            # A new install token alone replaces what older settings left in the file, not what this process was given.
            is_stale = self._is_from_file and bool(self._seeds) and _has_tokens(self.current)
            if _has_tokens(credentials) or is_stale:
                self._seeds = self._offered
                self._store(credentials, _lifetime_of(credentials), time.monotonic(), time.time())
                return
            self._seeds = (*self._seeds, mark)[-_MOST_SEEDS:]
            snapshot = self._snapshot
            if _has_tokens(snapshot.credentials) or credentials.installation_id is not None:
                # The file must know at a restart that these settings were there already.
                self._complete(snapshot, credentials.installation_id)

    def renew(
        self, used: int, action: Callable[[Snapshot], Renewed], deadline: Deadline, who: object = None
    ) -> Snapshot:
        """Return the credentials that replace generation ``used``: those that are there now, or those of ``action``.

        One thread runs its ``action``. The others wait for it, each until its own ``deadline``, and share its success.
        They share its error too, unless it concerns only the login methods of the other thread, or its stop, and their
        ``who`` differs. Then each ``who`` tries its own ``action``, one after the other. With a file, what another
        process has written is read before ``action`` is tried.

        :param who: who tries, and by which login methods. Equal if a refusal of one is a refusal of all.
        :raises SekuireError: what ``action`` raised. Each thread that waits gets a copy of its own.
        :raises TransportError: ``deadline`` passed first.
        """
        snapshot = self._snapshot
        if snapshot.generation != used:
            return snapshot

        def may_share(flight: Flight[Snapshot]) -> bool:
            if flight.error is None:
                return flight.result().generation != used
            return flight.tag == who or not isinstance(flight.error, _OF_THE_LEADER)

        return self.renewals.run(lambda: self._lead(used, action, deadline), deadline, tag=who, may_share=may_share)

    def prove(self, generation: int) -> None:
        """Note that the platform accepted the runtime token of ``generation``."""
        with self._lock:
            self._rejections.note_accepted(generation)
            self.proven = self._rejections.proven

    def reject(self, generation: int) -> float:
        """Note a 401 to the runtime token of ``generation``. Return the seconds to wait before it is replaced."""
        with self._lock:
            return self._rejections.note_rejected(generation) if generation == self._snapshot.generation else 0.0

    @property
    def has_file(self) -> bool:
        """Return True if the credentials are kept in a file."""
        return self._file is not None

    @property
    def is_read_only(self) -> bool:
        """Return True if there is a file and it cannot be written, so that a restart finds no newer credentials."""
        return self._file is not None and self._file.read_only

    def holder(self, *, before_spending: Optional[str] = None) -> str:
        """Return the random value by which the platform tells this store's logins from those of a replica.

        It is kept beside the file, so that a restart has the same one. Without a file, or with one that cannot be
        written, it belongs to this object. Needs the write lock: only the ``action`` of :meth:`renew` may call it.

        :param before_spending: what the login uses up. What it brings must be certain to be stored, so the file is
            replaced by one with the same content, as a proof.
        :raises TransportError: the file cannot be replaced, and a token would be used up.
        :raises ConfigurationError: what is kept beside the file is not private to this user.
        """
        if self._holder is None:
            self._holder = secrets.token_hex(16)
        if self._file is None or self._file.read_only:
            return self._holder
        self._holder = self._file.holder(self._holder, before_spending=before_spending)
        return self._holder

    def offer(self, used: int, renewed: Renewed) -> bool:
        """Store a runtime token that came with a heartbeat sent with generation ``used``. Return True if it was stored.

        It is not if the credentials have changed since, because an older token never replaces a newer one.
        """
        credentials = renewed.grant.credentials
        with self._writing(Deadline(_LOCK_TIMEOUT)):
            # Another process may have rotated the refresh token, which this must not bring back.
            self._catch_up()
            snapshot = self._snapshot
            if snapshot.generation != used:
                return False
            merged = attrs.evolve(
                snapshot.credentials, runtime_token=credentials.runtime_token, expires_at=credentials.expires_at
            )
            self._store(merged, renewed.grant.lifetime, renewed.sent_at, renewed.sent_wall)
            return True

    def adopt_installation(self, installation_id: str) -> None:
        """Add the installation id that the platform has sent, if the credentials had only a runtime token."""
        with self._writing(Deadline(_LOCK_TIMEOUT)):
            self._catch_up()
            if self.current.installation_id is None:
                self._complete(self._snapshot, installation_id)

    def reload(self) -> bool:
        """Read from the file what another process has written. Return True if there was anything new."""
        if self._file is None:
            return False
        before = self._snapshot.generation
        with self._writing(Deadline(_LOCK_TIMEOUT)):
            self._catch_up()
        return self._snapshot.generation != before

    # -- inside --

    def _reset(self) -> None:
        """Make this the store of a forked child."""
        self._lock = threading.Lock()
        self._write_lock = threading.Lock()
        # Parent and child are two: what the child logs in for is an installation of its own.
        self._holder = None

    def _lead(self, used: int, action: Callable[[Snapshot], Renewed], deadline: Deadline) -> Snapshot:
        with self._writing(deadline):
            self._catch_up()
            snapshot = self._snapshot
            if snapshot.generation != used:
                return snapshot
            renewed = action(snapshot)
            credentials = self._keep_workspace(renewed.grant.credentials)
            self._store(credentials, renewed.grant.lifetime, renewed.sent_at, renewed.sent_wall)
            return self._snapshot

    def _keep_workspace(self, credentials: RuntimeCredentials) -> RuntimeCredentials:
        """Return credentials that an answer brought, in the workspace that is known. Needs the write lock.

        The workspace says whose policy is enforced: whoever can answer in the platform's place must not choose another.
        """
        known, named = self.current.workspace_id, credentials.workspace_id
        if known is None or named == known:
            return credentials
        if named is not None and named != self._foreign_workspace:
            self._foreign_workspace = named
            _warn_of_workspace(named, known)
        return attrs.evolve(credentials, workspace_id=known)

    def _writing(self, deadline: Deadline) -> _Writing:
        return _Writing(self._write_lock, self._file, deadline)

    def _catch_up(self) -> None:
        """Adopt what another process has written, if there is a file. Needs the write lock."""
        if self._file is None:
            return
        try:
            stored = self._file.load()
        except ConfigurationError as error:
            log.warning("%s", error)
            return
        if stored is not None and stored.revision > self._revision:
            self._adopt(stored)

    def _adopt(self, stored: Stored) -> None:
        self._revision = stored.revision
        self._seeds = stored.seeds
        self._is_from_file = True
        self._owner = (stored.credentials.installation_id, stored.agent_id)
        with self._lock:
            left = None if stored.ends_at is None else stored.ends_at - time.time()
            self._publish(
                Snapshot(
                    generation=self._snapshot.generation + 1,
                    credentials=stored.credentials,
                    lifetime=left if stored.lifetime is None else stored.lifetime,
                    ends_at=None if left is None else time.monotonic() + left,
                    ends_at_wall=stored.ends_at,
                )
            )

    def _complete(self, snapshot: Snapshot, installation_id: Optional[str]) -> None:
        """Write ``snapshot`` again, with an installation id if it has none. Needs the write lock."""
        credentials = snapshot.credentials
        if credentials.installation_id is None and installation_id is not None:
            credentials = attrs.evolve(credentials, installation_id=installation_id)
        self._write(credentials, snapshot.lifetime, snapshot.ends_at_wall)
        if credentials is not snapshot.credentials:
            with self._lock:
                self._publish(attrs.evolve(snapshot, generation=snapshot.generation + 1, credentials=credentials))

    def _store(
        self, credentials: RuntimeCredentials, lifetime: Optional[float], sent_at: float, sent_wall: float
    ) -> None:
        """Write, then publish. Needs the write lock."""
        ends_at_wall = None if lifetime is None else sent_wall + lifetime
        self._write(credentials, lifetime, ends_at_wall)
        self._is_from_file = False
        with self._lock:
            self._publish(
                Snapshot(
                    generation=self._snapshot.generation + 1,
                    credentials=credentials,
                    lifetime=lifetime,
                    ends_at=None if lifetime is None else sent_at + lifetime,
                    ends_at_wall=ends_at_wall,
                )
            )

    def _publish(self, snapshot: Snapshot) -> None:
        """Make the new credentials the present ones. Needs both locks."""
        kept = _tokens_of(snapshot.credentials)
        replaced = [one for one in _tokens_of(self._snapshot.credentials) if one not in kept]
        if replaced:
            self._replaced = (*replaced, *self._replaced)[:_MOST_REPLACED]
        self._snapshot = snapshot

    def _write(self, credentials: RuntimeCredentials, lifetime: Optional[float], ends_at: Optional[float]) -> None:
        """Write to the file, if there is one. Needs the write lock."""
        if credentials.installation_id != self._owner[0]:
            self._owner = (credentials.installation_id, self._agent_id)
        if self._file is None:
            return
        self._revision += 1
        times = {"lifetime": lifetime, "ends_at": ends_at}
        revision, agent_id = self._revision, self._owner[1]
        self._file.save(
            Stored(credentials=credentials, revision=revision, seeds=self._seeds, agent_id=agent_id, **times)
        )


class _Writing:
    """Hold the write lock and, inside it, the file's lock, both by one deadline."""

    __slots__ = ("_deadline", "_file", "_file_lock", "_lock")

    def __init__(self, lock: threading.Lock, file: Optional[CredentialsFile], deadline: Deadline) -> None:
        self._lock = lock
        self._file = file
        self._deadline = deadline

    def __enter__(self) -> None:
        if not self._lock.acquire(timeout=self._deadline.remaining()):
            raise TransportError("another thread is writing the credentials and takes too long")
        if self._file is None:
            return
        self._file_lock = self._file.lock(self._deadline)
        try:
            self._file_lock.__enter__()
        except BaseException:
            self._lock.release()
            raise

    def __exit__(self, *args: object) -> None:
        try:
            if self._file is not None:
                self._file_lock.__exit__(None, None, None)
        finally:
            self._lock.release()


def _warn_of_workspace(named: str, known: str) -> None:
    log.error(
        "the platform names the workspace %s, and the agent is of %s, which stays; an agent that has really moved "
        "needs a new install token", named, known,
    )  # fmt: skip


def fingerprint(text: str) -> str:
    """Return a hash by which a secret can be recognised but not recovered."""
    return hashlib.sha256(b"sekuire seed\n" + text.encode()).hexdigest()


def mark_of(
    install_token: Optional[str], runtime_token: Optional[str], installation_id: Optional[str], refresh: Optional[str]
) -> Optional[str]:
    """Return the mark that a file of credentials keeps of the settings it grew from, or None if these are none."""
    given = RuntimeCredentials(
        installation_id=installation_id,
        runtime_token=None if runtime_token is None else Secret(runtime_token),
        refresh_token=None if refresh is None else Secret(refresh),
    )
    return _seed_of(given, fingerprint(install_token) if install_token else None)


def _seed_of(credentials: RuntimeCredentials, install_token_hash: Optional[str]) -> Optional[str]:
    parts = [
        install_token_hash or "",
        credentials.runtime_token.reveal() if credentials.runtime_token else "",
        credentials.installation_id or "",
        credentials.refresh_token.reveal() if credentials.refresh_token else "",
    ]
    return fingerprint("\n".join(parts)) if any(parts) else None


def _lifetime_of(credentials: RuntimeCredentials) -> Optional[float]:
    """Return the seconds left by our clock. Return None if they are unknown, or too many to be meant (protocol.md)."""
    if credentials.expires_at is None:
        return None
    seconds = max(0.0, credentials.expires_at.timestamp() - time.time())
    return seconds if seconds <= MAX_TOKEN_LIFETIME else None


def _tokens_of(credentials: RuntimeCredentials) -> List[Secret]:
    return [one for one in (credentials.runtime_token, credentials.refresh_token) if one is not None]


def _has_tokens(credentials: RuntimeCredentials) -> bool:
    return credentials.runtime_token is not None or credentials.refresh_token is not None
