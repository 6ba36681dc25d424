"""Store installations, tokens, tasks and policies in SQLite, and make every change of their state.

Each public method that changes something is one transaction. This module knows nothing of HTTP connections or live
streams: :mod:`sekuire.local.streams` decides which worker gets a task, and this module records it.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import hmac
import json
import os
import secrets
import sqlite3
import stat
import threading
import uuid
import weakref
from typing import (
    Any,
    Callable,
    ContextManager,
    Dict,
    FrozenSet,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Protocol,
    Sequence,
    Tuple,
    Union,
)

import attrs

from .._internal.clock import time
from ..errors import ConfigurationError
from ..wire.protocol import CODE_REVOKED, encode_json, format_time, is_id
from .signing import PolicyKey, policy_hash

__all__ = ["Claim", "Completed", "Identity", "NewTask", "Refusal", "Settings", "Store", "cancel_event", "erase"]

#: Marks a database as ours ("Seku"), so that another program's file is refused and not filled with tables.
APPLICATION_ID = 0x53656B75
SCHEMA_VERSION = 3

#: How many audit events are kept. The oldest are dropped.
MAX_LOGS = 10_000

#: How many versions of a workspace's policy are kept, to compare them.
MAX_POLICY_VERSIONS = 100

#: Seconds in which a repeated ``Idempotency-Key`` of a submission gets the same task.
SUBMISSION_WINDOW = 24 * 3600.0

#: Seconds in which a revoked installation may still report its tasks, if the revocation names no time.
DEFAULT_SHUTDOWN_TIMEOUT = 30.0
#: Longest pause between two tries of a task with several attempts (seconds).
MAX_RETRY_DELAY = 60.0

FINAL = ("completed", "failed")
STATES = {"pause": "paused", "resume": "running", "terminate": "terminated"}
#: Optional fields of a task that are strings, as a worker receives them.
TASK_TEXTS = ("tool", "workspace_id", "requester_agent_id", "parent_task_id", "workflow_id", "trace_id")

_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE install_tokens (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, hash TEXT NOT NULL UNIQUE, agent_id TEXT NOT NULL,
    max_uses INTEGER NOT NULL, uses INTEGER NOT NULL DEFAULT 0, created_at REAL NOT NULL);
CREATE TABLE installations (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, installation_id TEXT NOT NULL UNIQUE, agent_id TEXT NOT NULL,
    workspace_id TEXT NOT NULL, capabilities TEXT NOT NULL, runtime_info TEXT NOT NULL, created_at REAL NOT NULL,
    lease_expires_at REAL NOT NULL, last_heartbeat_at REAL, heartbeat TEXT,
    desired_state TEXT NOT NULL DEFAULT 'running', reason TEXT, shutdown_timeout REAL,
    revoked_until REAL);
CREATE TABLE tokens (
    hash TEXT PRIMARY KEY, installation_id TEXT NOT NULL, kind TEXT NOT NULL, expires_at REAL) WITHOUT ROWID;
CREATE INDEX tokens_by_installation ON tokens (installation_id, kind);
CREATE TABLE replays (
    key TEXT PRIMARY KEY, fingerprint TEXT NOT NULL, answer TEXT NOT NULL, token TEXT NOT NULL,
    expires_at REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE commands (id INTEGER PRIMARY KEY AUTOINCREMENT, installation_id TEXT NOT NULL, data TEXT NOT NULL);
CREATE TABLE tasks (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, task_id TEXT NOT NULL UNIQUE, agent_id TEXT NOT NULL,
    capability TEXT NOT NULL, data TEXT NOT NULL, status TEXT NOT NULL DEFAULT 'queued',
    attempt INTEGER NOT NULL DEFAULT 0, next_attempt INTEGER NOT NULL DEFAULT 1, worker_id TEXT, installation_id TEXT,
    max_attempts INTEGER NOT NULL, failures INTEGER NOT NULL DEFAULT 0, available_at REAL NOT NULL,
    created_at REAL NOT NULL, updated_at REAL NOT NULL, result TEXT, progress TEXT);
CREATE INDEX tasks_queued ON tasks (agent_id, seq) WHERE status = 'queued';
CREATE INDEX tasks_queued_by_capability ON tasks (agent_id, capability, seq) WHERE status = 'queued';
CREATE INDEX tasks_assigned ON tasks (installation_id, worker_id) WHERE status = 'assigned';
CREATE INDEX tasks_by_capability ON tasks (capability, seq);
CREATE TABLE assignments (
    task_id TEXT NOT NULL, attempt INTEGER NOT NULL, worker_id TEXT NOT NULL, installation_id TEXT NOT NULL,
    reported INTEGER NOT NULL DEFAULT 0, PRIMARY KEY (task_id, attempt)) WITHOUT ROWID;
CREATE TABLE completions (
    task_id TEXT NOT NULL, key TEXT NOT NULL, answer TEXT NOT NULL, PRIMARY KEY (task_id, key)) WITHOUT ROWID;
CREATE TABLE policies (
    workspace_id TEXT PRIMARY KEY, policy_id TEXT NOT NULL, version INTEGER NOT NULL, hash TEXT NOT NULL,
    content TEXT NOT NULL, activated_at REAL NOT NULL, updated_at REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE logs (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, batch TEXT, event_type TEXT NOT NULL, severity TEXT NOT NULL,
    data TEXT NOT NULL);
CREATE INDEX logs_by_batch ON logs (batch) WHERE batch IS NOT NULL;
"""
#: Tables that a file of this version may lack, because they were added without a change of the others.
_ADDED = """
CREATE TABLE IF NOT EXISTS published (
    installation_id TEXT PRIMARY KEY, capabilities TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS submissions (
    workspace_id TEXT NOT NULL, key TEXT NOT NULL, fingerprint TEXT NOT NULL, task_id TEXT NOT NULL,
    expires_at REAL NOT NULL, PRIMARY KEY (workspace_id, key)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS submissions_by_end ON submissions (expires_at);
CREATE TABLE IF NOT EXISTS requests (
    agent_id TEXT NOT NULL, workspace_id TEXT NOT NULL, task_id TEXT NOT NULL,
    PRIMARY KEY (agent_id, workspace_id, task_id)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS policy_versions (
    workspace_id TEXT NOT NULL, version INTEGER NOT NULL, hash TEXT NOT NULL, content TEXT NOT NULL,
    activated_at REAL NOT NULL, PRIMARY KEY (workspace_id, version)) WITHOUT ROWID;
INSERT OR IGNORE INTO policy_versions SELECT workspace_id, version, hash, content, activated_at FROM policies;
CREATE TABLE IF NOT EXISTS sessions (hash TEXT PRIMARY KEY, expires_at REAL NOT NULL) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS tasks_by_agent ON tasks (agent_id, seq);
CREATE INDEX IF NOT EXISTS tasks_failed ON tasks (seq) WHERE status = 'failed';
CREATE INDEX IF NOT EXISTS tasks_ended ON tasks (updated_at) WHERE status IN ('completed', 'failed');
CREATE TABLE IF NOT EXISTS approvals (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, approval_id TEXT NOT NULL UNIQUE, task_id TEXT NOT NULL,
    attempt INTEGER NOT NULL, worker_id TEXT NOT NULL, kind TEXT NOT NULL, name TEXT NOT NULL, details TEXT NOT NULL,
    policy_hash TEXT, digest TEXT NOT NULL, status TEXT NOT NULL DEFAULT 'pending', created_at REAL NOT NULL,
    expires_at REAL NOT NULL, decided_at REAL, decided_by TEXT, credential TEXT, reason TEXT, decision_key TEXT);
CREATE INDEX IF NOT EXISTS approvals_by_task ON approvals (task_id);
CREATE INDEX IF NOT EXISTS approvals_pending ON approvals (expires_at) WHERE status = 'pending';
CREATE TRIGGER IF NOT EXISTS approvals_of_ended_task AFTER UPDATE OF status ON tasks
    WHEN NEW.status IN ('completed', 'failed') BEGIN
    UPDATE approvals SET status = 'expired', decided_at = NEW.updated_at, reason = 'the task has ended'
        WHERE task_id = NEW.task_id AND status = 'pending'; END;
"""
#: Columns of tasks that a file of this version may lack, for the same reason. `cancel` is the JSON object of a cancel
#: that was accepted, `retry_key` is that of the last retry, and `timeline` holds JSON objects, each with a comma.
_ADDED_COLUMNS = (
    ("expires_at", "REAL"),
    ("cancel", "TEXT"),
    ("retry_key", "TEXT"),
    ("timeline", "TEXT NOT NULL DEFAULT ''"),
)
_ADDED_INDEX = "CREATE INDEX IF NOT EXISTS tasks_by_expiry ON tasks (expires_at) WHERE expires_at IS NOT NULL"
#: From this length on a timeline gets no further entries.
_LONGEST_TIMELINE = 64 * 1024


@attrs.frozen(kw_only=True, slots=True)
class Settings:
    """Hold the options of a :class:`~sekuire.local.LocalPlatform`. Times are in seconds."""

    lease_seconds: float = 60.0
    heartbeat_interval: float = 10.0
    token_lifetime: float = 3600.0
    keepalive_interval: float = 15.0
    refresh_grace: float = 600.0
    idempotency_window: float = 600.0
    redelivery_delay: float = 5.0
    retry_delay: float = 1.0
    workspace_id: str = "ws_local"
    rotate_refresh_tokens: bool = True
    #: A heartbeat renews the runtime token when less than this fraction of its lifetime is left; 0 never does.
    heartbeat_refresh_below: float = 0.2


#: What it means that this platform does not know a credential.
OF_ANOTHER = "it belongs to another platform, or to an earlier start of this one"


class Refusal(Exception):
    """Refuse a request, with an HTTP status, a code for programs and a sentence for people."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(status, code, message)
        self.status = status
        self.code = code
        self.message = message


class Identity(NamedTuple):
    """Identify the installation that a runtime token belongs to."""

    installation_id: str
    agent_id: str
    workspace_id: str
    expires_at: float
    #: Until when a revoked installation may still report, as a Unix time. None if it is not revoked.
    revoked_until: Optional[float]


class Claim(NamedTuple):
    """Describe a task that a worker gets. ``data`` is the JSON text of the ``task`` event."""

    task_id: str
    attempt: int
    data: str
    #: True if it was cancelled. ``data`` is then that of the ``cancel`` event.
    is_cancelled: bool = False


class Completed(NamedTuple):
    """Describe how a completion was handled: the answer, and the worker that is free again."""

    status: int
    answer: Dict[str, Any]
    agent_id: str
    capability: str
    worker_id: str
    attempt: int
    #: True if the task has its last result now.
    final: bool = False
    #: Seconds until the task may be tried again, if it was queued again.
    retry_in: Optional[float] = None


class Store:
    """Hold the platform's state.

    On disk the journal is a WAL with ``synchronous=NORMAL``. A killed process loses nothing. A power cut may lose the
    last transactions, which is acceptable for a development tool. This process locks the file, because two platforms
    with one file would give each task to two workers.

    Tokens are stored only as SHA-256. Four secrets are stored in plain text, so only the file's owner can read it
    (mode 0600): the API key and the install token of :meth:`reuse_install_token`, which are made to be printed; the key
    that signs policies; and, for ``idempotency_window``, the answers of bootstrap, recover and refresh. A client that
    lost such an answer, because the platform restarted for example, gets the same answer again. Expired answers are
    deleted, and ``secure_delete`` overwrites them.

    :raises ConfigurationError: the path cannot be used; the text says why and what to do.
    """

    # Threads: HTTP threads, the watch thread and users' threads call it. `_lock` guards the one connection: SQLite has
    # one writer anyway, and a transaction here takes some ten microseconds. Only SQLite is called under the lock.

    def __init__(self, path: Optional[str], settings: Settings, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._settings = settings
        self._clock = clock
        self._lock = threading.Lock()
        self._db: Optional[sqlite3.Connection] = None
        self._finalizer: Optional[weakref.finalize] = None  # type: ignore[type-arg]
        self.api_key = ""
        #: The key that signs policies. It is replaced, never changed.
        self.policy_key: PolicyKey
        self.open()

    # -- opening and closing ------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Open the database, and make it if it does not exist. Does nothing while it is open."""
        with self._lock:
            if self._db is not None:
                return
            db = _connect(self._path)
            try:
                key = db.execute("SELECT value FROM meta WHERE key = 'api_key'").fetchone()
                if key is None:
                    key = ("sk_live_" + secrets.token_urlsafe(32),)
                    db.execute("INSERT INTO meta VALUES ('api_key', ?)", key)
                secret = db.execute("SELECT value FROM meta WHERE key = 'policy_key'").fetchone()
                policy_key = PolicyKey("" if secret is None else secret[0])
                if secret is None:
                    db.execute("INSERT INTO meta VALUES ('policy_key', ?)", (policy_key.secret(),))
            except BaseException:
                db.close()
                raise
            self._db = db
            self.api_key = key[0]
            self.policy_key = policy_key
            # An owner that does not call stop() must not leave an open connection behind.
            self._finalizer = weakref.finalize(self, db.close)

    def close(self) -> None:
        """Close a database on disk and free its file. A database in memory stays open, or it would be lost."""
        if self._path is None:
            return
        with self._lock:
            if self._finalizer is not None:
                self._finalizer()
            self._db = None

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            db = self._db
            if db is None:
                raise ConfigurationError("the local platform is stopped and its database closed; call start() first")
            db.execute("BEGIN")
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                db.execute("ROLLBACK")
                raise

    def transaction(self) -> ContextManager[sqlite3.Connection]:
        """Return a transaction for another module's tables. Nothing else of the store may be called within it."""
        return self._transaction()

    def now(self) -> float:
        """Return the time by which the store counts (Unix time)."""
        return self._clock()

    # -- credentials --------------------------------------------------------------------------------------------------

    def is_api_key(self, key: Optional[str]) -> bool:
        return key is not None and hmac.compare_digest(key.encode("utf-8", "replace"), self.api_key.encode())

    def authenticate(self, token: str) -> Identity:
        """Return the installation that a runtime token belongs to.

        :raises Refusal: 401, the token is unknown or has expired.
        """
        with self._lock:
            row = (
                self._connection()
                .execute(
                    "SELECT i.installation_id, i.agent_id, i.workspace_id, t.expires_at, i.revoked_until"
                    " FROM tokens t JOIN installations i USING (installation_id)"
                    " WHERE t.hash = ? AND t.kind = 'runtime'",
                    (hash_of(token),),
                )
                .fetchone()
            )
        if row is None:
            raise Refusal(401, "INVALID_TOKEN", f"this platform knows no such runtime token; {OF_ANOTHER}")
        identity = Identity(*row)
        if identity.expires_at <= self._clock():
            raise Refusal(401, "TOKEN_EXPIRED", "the runtime token has expired; refresh it")
        return identity

    def is_draining(self, identity: Identity) -> bool:
        """Return True if this installation may report: it is not revoked, or its time to shut down has not ended."""
        return identity.revoked_until is None or self._clock() < identity.revoked_until

    def create_install_token(self, agent_id: str, max_uses: int = 1) -> str:
        token = "skt_" + secrets.token_urlsafe(32)
        with self._transaction() as db:
            db.execute(
                "INSERT INTO install_tokens (hash, agent_id, max_uses, created_at) VALUES (?, ?, ?, ?)",
                (hash_of(token), agent_id, max_uses, self._clock()),
            )
        return token

    def reuse_install_token(self, agent_id: str, max_uses: int) -> str:
        """Return the agent's install token that is kept, with all its uses. Make it if there is none."""
        with self._transaction() as db:
            name = f"install_token:{agent_id}"
            row = db.execute("SELECT value FROM meta WHERE key = ?", (name,)).fetchone()
            token = "skt_" + secrets.token_urlsafe(32) if row is None else str(row[0])
            if row is None:
                db.execute("INSERT INTO meta VALUES (?, ?)", (name, token))
            db.execute(
                "INSERT INTO install_tokens (hash, agent_id, max_uses, created_at) VALUES (?, ?, ?, ?)"
                " ON CONFLICT (hash) DO UPDATE SET uses = 0, max_uses = excluded.max_uses",
                (hash_of(token), agent_id, max_uses, self._clock()),
            )
        return token

    def bootstrap(
        self,
        token: str,
        agent_id: str,
        capabilities: Sequence[str],
        runtime_info: Mapping[str, Any],
        key: Optional[str],
    ) -> Dict[str, Any]:
        """Make an installation for an install token.

        :raises Refusal: 401 unknown token, 403 another agent's, 409 used up.
        """
        fingerprint = hash_of("\n".join(("bootstrap", token, agent_id)))
        with self._transaction() as db:
            known = self._replay(db, key, fingerprint)
            if known is not None:
                return known
            row = db.execute(
                "SELECT agent_id, max_uses, uses FROM install_tokens WHERE hash = ?", (hash_of(token),)
            ).fetchone()
            if row is None:
                raise Refusal(
                    401, "INVALID_INSTALL_TOKEN", f"this platform has not made this install token; {OF_ANOTHER}"
                )
            if row[0] != agent_id:
                raise Refusal(403, "WRONG_AGENT", f"the install token was made for the agent {row[0]!r}")
            if row[2] >= row[1]:
                raise Refusal(
                    409,
                    "INSTALL_TOKEN_CONSUMED",
                    f"the install token has been used {row[2]} of {row[1]} times",
                )
            db.execute("UPDATE install_tokens SET uses = uses + 1 WHERE hash = ?", (hash_of(token),))
            # What is in memory ends with the platform, so that nobody needs the token again.
            left = {} if self._path is None else {"install_token_uses_left": row[1] - row[2] - 1}
            workspace = self._settings.workspace_id
            return self._install(db, agent_id, workspace, capabilities, runtime_info, key, fingerprint, left)

    def recover(
        self, agent_id: str, workspace_id: Optional[str], runtime_info: Mapping[str, Any], key: Optional[str]
    ) -> Dict[str, Any]:
        """Make an installation for a holder of the API key."""
        fingerprint = hash_of("\n".join(("recover", self.api_key, agent_id)))
        with self._transaction() as db:
            known = self._replay(db, key, fingerprint)
            if known is not None:
                return known
            workspace = workspace_id or self._settings.workspace_id
            return self._install(db, agent_id, workspace, (), runtime_info, key, fingerprint)

    def refresh(self, installation_id: str, token: str, key: Optional[str]) -> Dict[str, Any]:
        """Make a runtime token for a refresh token.

        Any number of refresh tokens can be current (``expires_at`` NULL). The use of a current one proves that its
        holder has stored it. The previous ones expire then, and the current ones become previous, valid for
        ``refresh_grace``. The use of a previous one only adds a current one. Thus neither a client that lost the answer
        nor its twin is locked out.

        :raises Refusal: 401 unknown or too old, 403 revoked, 404 no such installation.
        """
        now = self._clock()
        settings = self._settings
        fingerprint = hash_of("\n".join(("refresh", installation_id, token)))
        with self._transaction() as db:
            row = _find_installation(
                db, installation_id, "SELECT workspace_id, revoked_until, reason FROM installations"
            )
            if row[1] is not None:
                raise revoked(row[2])
            known = self._replay(db, key, fingerprint)
            if known is not None:
                return known
            found = db.execute(
                "SELECT expires_at FROM tokens WHERE hash = ? AND installation_id = ? AND kind = 'refresh'",
                (hash_of(token), installation_id),
            ).fetchone()
            if found is None or (found[0] is not None and found[0] <= now):
                raise Refusal(401, "INVALID_REFRESH_TOKEN", f"the refresh token was replaced, or {OF_ANOTHER}")
            answer = self._runtime_token(db, installation_id)
            if settings.rotate_refresh_tokens:
                if found[0] is None:
                    db.execute(
                        "DELETE FROM tokens WHERE installation_id = ? AND kind = 'refresh' AND expires_at IS NOT NULL",
                        (installation_id,),
                    )
                    db.execute(
                        "UPDATE tokens SET expires_at = ? WHERE installation_id = ? AND kind = 'refresh'",
                        (now + settings.refresh_grace, installation_id),
                    )
                answer["refresh_token"] = self._refresh_token(db, installation_id)
            self._remember(db, key, fingerprint, answer)
            return answer

    def expire_tokens(self, installation_id: Optional[str] = None) -> int:
        """Expire every valid runtime token, of one installation or of all. Return their number."""
        now = self._clock()
        with self._transaction() as db:
            return db.execute(
                "UPDATE tokens SET expires_at = ?"
                " WHERE kind = 'runtime' AND expires_at > ? AND (? IS NULL OR installation_id = ?)",
                (now, now, installation_id, installation_id),
            ).rowcount

    def _install(
        self,
        db: sqlite3.Connection,
        agent_id: str,
        workspace_id: str,
        capabilities: Sequence[str],
        runtime_info: Mapping[str, Any],
        key: Optional[str],
        fingerprint: str,
        more: Mapping[str, Any] = {},
    ) -> Dict[str, Any]:
        now = self._clock()
        installation_id = new_id("inst")
        lease = now + self._settings.lease_seconds
        db.execute(
            "INSERT INTO installations (installation_id, agent_id, workspace_id, capabilities, runtime_info,"
            " created_at, lease_expires_at) VALUES (?, ?, ?, ?, ?, ?, ?)",
            (installation_id, agent_id, workspace_id, _text(list(capabilities)), _text(dict(runtime_info)), now, lease),
        )
        answer = {
            "installation_id": installation_id,
            "workspace_id": workspace_id,
            **self._runtime_token(db, installation_id),
            "refresh_token": self._refresh_token(db, installation_id),
            "heartbeat_interval_seconds": _plain(self._settings.heartbeat_interval),
            "lease_expires_at": instant(lease),
            **more,
        }
        self._remember(db, key, fingerprint, answer)
        return answer

    def _runtime_token(self, db: sqlite3.Connection, installation_id: str) -> Dict[str, Any]:
        now = self._clock()
        token = "rt_" + secrets.token_urlsafe(32)
        end = now + self._settings.token_lifetime
        # Kept for one more day, so that an expired token can be distinguished from a wrong one.
        db.execute(
            "DELETE FROM tokens WHERE installation_id = ? AND expires_at IS NOT NULL AND expires_at < ?",
            (installation_id, now - 86400.0),
        )
        db.execute("INSERT INTO tokens VALUES (?, ?, 'runtime', ?)", (hash_of(token), installation_id, end))
        return {"runtime_token": token, "expires_at": instant(end)}

    def _refresh_token(self, db: sqlite3.Connection, installation_id: str) -> str:
        token = "rf_" + secrets.token_urlsafe(32)
        db.execute("INSERT INTO tokens VALUES (?, ?, 'refresh', NULL)", (hash_of(token), installation_id))
        return token

    def _replay(self, db: sqlite3.Connection, key: Optional[str], fingerprint: str) -> Optional[Dict[str, Any]]:
        """Return the answer already given to this key, or None.

        An answer whose token has expired or whose installation is revoked is useless: the request counts as new then.
        """
        now = self._clock()
        db.execute("DELETE FROM replays WHERE expires_at <= ?", (now,))
        if key is None:
            return None
        row = db.execute(
            "SELECT r.fingerprint, r.answer, t.expires_at > ? AND i.revoked_until IS NULL FROM replays r"
            " LEFT JOIN tokens t ON t.hash = r.token LEFT JOIN installations i USING (installation_id)"
            " WHERE r.key = ?",
            (now, hash_of(key)),
        ).fetchone()
        if row is None:
            return None
        if row[0] != fingerprint:
            raise Refusal(400, "IDEMPOTENCY_KEY_REUSED", "this Idempotency-Key was used before with another request")
        if not row[2]:
            return None
        answer: Dict[str, Any] = json.loads(row[1])
        return answer

    def _remember(
        self, db: sqlite3.Connection, key: Optional[str], fingerprint: str, answer: Mapping[str, Any]
    ) -> None:
        if key is None or self._settings.idempotency_window <= 0:
            return
        now = self._clock()
        db.execute(
            "INSERT OR REPLACE INTO replays VALUES (?, ?, ?, ?, ?)",
            (
                hash_of(key),
                fingerprint,
                _text(answer),
                hash_of(answer["runtime_token"]),
                now + self._settings.idempotency_window,
            ),
        )

    # -- installations ------------------------------------------------------------------------------------------------

    def publish(self, installation_id: str, capabilities: Sequence[Mapping[str, Any]]) -> None:
        """Store what an installation can do, in place of what was there."""
        with self._transaction() as db:
            db.execute(
                "INSERT OR REPLACE INTO published (installation_id, capabilities) VALUES (?, ?)",
                (installation_id, _text(list(capabilities))),
            )

    def heartbeat(self, identity: Identity, body: Mapping[str, Any]) -> Dict[str, Any]:
        """Renew the lease, and return the answer to the heartbeat."""
        now = self._clock()
        settings = self._settings
        lease = now + settings.lease_seconds
        with self._transaction() as db:
            db.execute(
                "UPDATE installations SET lease_expires_at = ?, last_heartbeat_at = ?, heartbeat = ?"
                " WHERE installation_id = ?",
                (lease, now, _text(body), identity.installation_id),
            )
            desired, reason, timeout, revoked_until = db.execute(
                "SELECT desired_state, reason, shutdown_timeout, revoked_until FROM installations"
                " WHERE installation_id = ?",
                (identity.installation_id,),
            ).fetchone()
            policy = db.execute("SELECT hash FROM policies WHERE workspace_id = ?", (identity.workspace_id,)).fetchone()
            answer: Dict[str, Any] = {
                "lease_expires_at": instant(lease),
                "heartbeat_interval_seconds": _plain(settings.heartbeat_interval),
                "desired_state": desired,
                "revoked": revoked_until is not None,
            }
            if reason is not None:
                answer["reason"] = reason
            if timeout is not None:
                answer["shutdown_timeout_ms"] = round(timeout * 1000)
            if policy is not None and policy[0]:
                answer["active_policy_hash"] = policy[0]
            cancelled = db.execute(
                "SELECT task_id FROM tasks WHERE installation_id = ? AND status = 'assigned' AND cancel IS NOT NULL",
                (identity.installation_id,),
            ).fetchall()
            if cancelled:
                answer["cancel_tasks"] = [row[0] for row in cancelled]
            left = identity.expires_at - now
            if revoked_until is None and left < settings.heartbeat_refresh_below * settings.token_lifetime:
                token = self._runtime_token(db, identity.installation_id)
                answer["refreshed_token"] = token["runtime_token"]
                answer["refreshed_token_expires_at"] = token["expires_at"]
        return answer

    def command(
        self,
        installation_id: str,
        kind: str,
        reason: Optional[str],
        shutdown_timeout: Optional[float],
        send: bool,
    ) -> Tuple[Dict[str, Any], Optional[int]]:
        """Record a command. Return the state it leads to and, if it must be sent, the event with its id.

        :raises Refusal: 404 no such installation, 409 it is revoked.
        """
        with self._transaction() as db:
            row = _find_installation(db, installation_id, "SELECT revoked_until, reason FROM installations")
            if row[0] is not None:
                raise Refusal(409, CODE_REVOKED, "the installation was revoked; no command can reach it")
            return self._command(db, installation_id, kind, reason, shutdown_timeout, send)

    def revoke(
        self, installation_id: str, reason: Optional[str], shutdown_timeout: Optional[float], send: bool
    ) -> Tuple[Dict[str, Any], Optional[int], float]:
        """Revoke an installation. A repetition changes nothing. The last value is when its reports end (Unix time).

        :raises Refusal: 404 no such installation.
        """
        with self._transaction() as db:
            row = _find_installation(db, installation_id, "SELECT revoked_until FROM installations")
            if row[0] is not None:
                return {}, None, row[0]
            timeout = DEFAULT_SHUTDOWN_TIMEOUT if shutdown_timeout is None else shutdown_timeout
            data, event_id = self._command(db, installation_id, "terminate", reason, timeout, send)
            end = self._clock() + timeout
            db.execute(
                "UPDATE installations SET revoked_until = ? WHERE installation_id = ?",
                (end, installation_id),
            )
            return data, event_id, end

    def _command(
        self,
        db: sqlite3.Connection,
        installation_id: str,
        kind: str,
        reason: Optional[str],
        shutdown_timeout: Optional[float],
        send: bool,
    ) -> Tuple[Dict[str, Any], Optional[int]]:
        db.execute(
            "UPDATE installations SET desired_state = ?, reason = ?, shutdown_timeout = ? WHERE installation_id = ?",
            (STATES[kind], reason, shutdown_timeout, installation_id),
        )
        data: Dict[str, Any] = {"type": kind, "command_id": new_id("cmd")}
        if reason is not None:
            data["reason"] = reason
        if shutdown_timeout is not None:
            data["shutdown_timeout_ms"] = round(shutdown_timeout * 1000)
        if not send:
            return data, None
        cursor = db.execute(
            "INSERT INTO commands (installation_id, data) VALUES (?, ?)", (installation_id, _text(data))
        )
        return data, cursor.lastrowid

    def commands_since(self, installation_id: str, event_id: Optional[int]) -> Tuple[int, List[Tuple[int, str]]]:
        """Return the id at which a stream that last saw ``event_id`` goes on, and the commands it missed.

        An id that was never sent, for example by a database that was deleted, counts as none. Without an id nothing was
        missed, because ``connected`` contains the state that the commands have led to.
        """
        with self._lock:
            db = self._connection()
            # The counter and not the largest row, so that an id is never used twice.
            row = db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'commands'").fetchone()
            newest: int = row[0] if row else 0
            if event_id is None or not 0 <= event_id <= newest:
                return newest, []
            missed = db.execute(
                "SELECT id, data FROM commands WHERE installation_id = ? AND id > ? ORDER BY id",
                (installation_id, event_id),
            ).fetchall()
            return event_id, missed

    def installation(self, installation_id: str) -> Dict[str, Any]:
        """Return an installation as JSON.

        :raises Refusal: 404 no such installation.
        """
        with self._lock:
            row = _find_installation(self._connection(), installation_id, _INSTALLATION)
        return _installation(row)

    def installations(self, limit: int = -1) -> List[Dict[str, Any]]:
        """Return every installation, oldest first, or the newest ``limit``."""
        with self._lock:
            rows = self._connection().execute(f"{_INSTALLATION} ORDER BY seq DESC LIMIT ?", (limit,)).fetchall()
        return [_installation(row) for row in reversed(rows)]

    def draining(self) -> List[Tuple[str, float]]:
        """Return the revoked installations that may still report: id and end (Unix time)."""
        with self._lock:
            return (
                self._connection()
                .execute(
                    "SELECT installation_id, revoked_until FROM installations WHERE revoked_until > ?", (self._clock(),)
                )
                .fetchall()
            )

    def latest_agent(self) -> Optional[str]:
        """Return the agent of the newest install token or installation, or None."""
        with self._lock:
            row = (
                self._connection()
                .execute(
                    "SELECT agent_id FROM (SELECT agent_id, created_at FROM install_tokens"
                    " UNION ALL SELECT agent_id, created_at FROM installations) ORDER BY created_at DESC LIMIT 1"
                )
                .fetchone()
            )
        return row[0] if row else None

    # -- tasks --------------------------------------------------------------------------------------------------------

    def submit(self, agent_id: str, task: NewTask) -> str:
        """Queue a task and return its id."""
        with self._transaction() as db:
            return self._queue(db, agent_id, task)

    def submit_once(self, key: str, agent_id: str, task: NewTask) -> Tuple[str, bool]:
        """Queue a task unless one with this key was queued in its workspace. Return its id, and True if it is new.

        :raises Refusal: 422 the key came with another task.
        """
        now = self._clock()
        workspace_id = task.fields.get("workspace_id") or self._settings.workspace_id
        facts = [agent_id, task.capability, task.max_attempts, task.fields]
        if task.delay or task.expires_in is not None:
            facts += [task.delay, task.expires_in]
        fingerprint = hash_of(json.dumps(facts, sort_keys=True, separators=(",", ":")))
        with self._transaction() as db:
            db.execute("DELETE FROM submissions WHERE expires_at <= ?", (now,))
            known = db.execute(
                "SELECT fingerprint, task_id FROM submissions WHERE workspace_id = ? AND key = ?",
                (workspace_id, hash_of(key)),
            ).fetchone()
            if known is not None:
                if known[0] != fingerprint:
                    raise Refusal(
                        422,
                        "IDEMPOTENCY_KEY_REUSED",
                        "this Idempotency-Key came before with another task; use a new one",
                    )
                return known[1], False
            task_id = self._queue(db, agent_id, task)
            db.execute(
                "INSERT INTO submissions VALUES (?, ?, ?, ?, ?)",
                (workspace_id, hash_of(key), fingerprint, task_id, now + SUBMISSION_WINDOW),
            )
            return task_id, True

    def _queue(self, db: sqlite3.Connection, agent_id: str, task: NewTask) -> str:
        now = self._clock()
        task_id = new_id("task")
        workspace_id = task.fields.get("workspace_id") or self._settings.workspace_id
        requester = task.fields.get("requester_agent_id")
        data = _text({"task_id": task_id, "capability": task.capability, **task.fields, "workspace_id": workspace_id})
        if requester is not None:
            db.execute("INSERT INTO requests VALUES (?, ?, ?)", (requester, workspace_id, task_id))
        end = None if task.expires_in is None else now + task.expires_in
        db.execute(
            "INSERT INTO tasks (task_id, agent_id, capability, data, max_attempts, available_at, created_at,"
            " updated_at, expires_at, timeline) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                task_id, agent_id, task.capability, data, task.max_attempts, now + task.delay, now, now, end,
                _entry("queued", now, 0),
            ),
        )  # fmt: skip
        return task_id

    def retry(self, task_id: str, key: Optional[str]) -> Tuple[str, str, Optional[float]]:
        """Queue a failed task again, as its next attempt. Return its agent, its capability, and in how many seconds.

        The seconds are None if the key has done so before.

        :raises Refusal: 404 no such task, 409 it has not failed.
        """
        now = self._clock()
        with self._transaction() as db:
            row = _find_task(db, task_id, "SELECT agent_id, capability, status, attempt, retry_key FROM tasks")
            agent_id, capability, status, attempt, last_key = row
            digest = None if key is None else hash_of(key)
            if digest is not None and digest == last_key:
                return agent_id, capability, None
            if status != "failed":
                raise Refusal(409, "NOT_FAILED", f"the task is {status}; only a failed task can be tried again")
            db.execute(
                "UPDATE tasks SET status = 'queued', result = NULL, progress = NULL, failures = 0, cancel = NULL,"
                " expires_at = NULL, available_at = ?, next_attempt = attempt + 1, retry_key = ?, updated_at = ?,"
                f" timeline = {_APPEND} WHERE task_id = ?",
                # Not at once: its worker may not have seen the answer to its report.
                (now + self._settings.retry_delay, digest, now, _entry("queued", now, attempt), task_id),
            )
            return agent_id, capability, self._settings.retry_delay

    def cancel(self, task_id: str, reason: Optional[str]) -> Optional[Tuple[str, str]]:
        """Cancel a task. A queued one ends; of an assigned one return the installation and the worker to notify.

        :raises Refusal: 404 no such task, 409 it has its result.
        """
        now = self._clock()
        with self._transaction() as db:
            select = "SELECT status, attempt, installation_id, worker_id, result, cancel FROM tasks"
            status, attempt, installation_id, worker_id, result, cancel = _find_task(db, task_id, select)
            if status in FINAL:
                if cancel is not None and _is_ended_by_cancel(result):
                    return None
                raise Refusal(409, "ALREADY_COMPLETED", "the task has its result already")
            order = _text({} if reason is None else {"reason": reason})
            if status == "queued":
                db.execute("UPDATE tasks SET cancel = ? WHERE task_id = ?", (order, task_id))
                self._end_cancelled(db, now, "task_id = ?", (task_id,))
                return None
            if cancel is None:
                db.execute(
                    f"UPDATE tasks SET cancel = ?, updated_at = ?, timeline = {_APPEND} WHERE task_id = ?",
                    (order, now, _entry("cancelling", now, attempt, worker_id), task_id),
                )
            return installation_id, worker_id

    @staticmethod
    def _end_cancelled(db: sqlite3.Connection, now: float, where: str, values: Sequence[Any]) -> List[str]:
        """End the cancelled tasks that fulfil a condition and will get no result. Return their ids."""
        rows = db.execute(
            f"SELECT task_id, attempt, cancel FROM tasks WHERE {where} AND cancel IS NOT NULL", values
        ).fetchall()
        for task_id, attempt, cancel in rows:
            reason = json.loads(cancel).get("reason")
            message = "the task was cancelled" + (f": {reason}" if reason else "")
            result = {"error": {"code": "cancelled", "message": message, "retryable": False}, "by_platform": True}
            db.execute(
                f"UPDATE tasks SET status = 'failed', result = ?, updated_at = ?, timeline = {_APPEND}"
                " WHERE task_id = ?",
                (_text(result), now, _entry("failed", now, attempt), task_id),
            )
        return [row[0] for row in rows]

    def end_cancelled(self, installation_id: str, workers: Sequence[str], task_ids: FrozenSet[str]) -> List[str]:
        """End those of these cancelled tasks that one of these workers has. Return their ids."""
        if not workers or not task_ids:
            return []
        where = "installation_id = ? AND status = 'assigned'"
        where += f" AND worker_id IN ({','.join('?' * len(workers))}) AND task_id IN ({_marks(task_ids)})"
        with self._transaction() as db:
            return self._end_cancelled(db, self._clock(), where, (installation_id, *workers, *task_ids))

    def expire(self) -> List[str]:
        """End the queued tasks whose time to begin has passed. Return their ids."""
        now = self._clock()
        with self._transaction() as db:
            rows = db.execute(
                "SELECT task_id, attempt FROM tasks WHERE expires_at <= ? AND status = 'queued' AND failures = 0",
                (now,),
            ).fetchall()
            error = {"code": "expired", "message": "the task did not begin in its time", "retryable": False}
            for task_id, attempt in rows:
                db.execute(
                    f"UPDATE tasks SET status = 'failed', result = ?, updated_at = ?, timeline = {_APPEND}"
                    " WHERE task_id = ?",
                    (_text({"error": error, "by_platform": True}), now, _entry("failed", now, attempt), task_id),
                )
        return [row[0] for row in rows]

    def expiring(self) -> List[float]:
        """Return when the queued tasks expire that can (Unix times)."""
        with self._lock:
            rows = (
                self._connection()
                .execute("SELECT expires_at FROM tasks WHERE expires_at IS NOT NULL AND status = 'queued'")
                .fetchall()
            )
        return [row[0] for row in rows]

    def is_final(self, task_id: str) -> bool:
        """Return True if a task has its last result."""
        with self._lock:
            row = self._connection().execute("SELECT status FROM tasks WHERE task_id = ?", (task_id,)).fetchone()
        return row is not None and row[0] in FINAL

    def claim(
        self,
        installation_id: str,
        worker_id: str,
        agent_id: str,
        *,
        capabilities: Optional[FrozenSet[str]],
        left_to_others: Optional[FrozenSet[str]],
        paused: bool,
        refused: FrozenSet[str],
    ) -> Optional[Claim]:
        """Assign the oldest suitable queued task to a worker. Return None if no task is suitable.

        :param left_to_others: capabilities that another, unpaused worker serves (None: all of them). A paused worker
            gets none of these, and a worker that failed a task does not get it again.
        :param refused: the tasks that this stream has released.
        """
        if paused and left_to_others is None:
            return None
        now = self._clock()
        where = ["agent_id = ?", "status = 'queued'", "available_at <= ?"]
        where.append("(expires_at IS NULL OR expires_at > ? OR failures > 0)")
        values: List[Any] = [agent_id, now, now]
        unserved, unserved_values = "0", ()  # type: Tuple[str, Tuple[str, ...]]
        if left_to_others is not None:
            unserved, unserved_values = f"capability NOT IN ({_marks(left_to_others)})", tuple(left_to_others)
        if paused:
            # A paused worker answers `worker_paused`. A task that can be retried waits for a worker that is not paused.
            where += [unserved, "failures = 0"]
        else:
            where.append(f"(failures = 0 OR worker_id IS NOT ? OR {unserved})")
            values.append(worker_id)
        values += unserved_values
        if refused:
            where.append(f"task_id NOT IN ({_marks(refused)})")
            values += refused
        # One query for each capability: an index in order of age answers it, however long the queue is. It is named,
        # because SQLite would choose one that has the finished tasks too.
        names: Tuple[Optional[str], ...] = (None,) if capabilities is None else tuple(capabilities)
        index = "tasks_queued" if capabilities is None else "tasks_queued_by_capability"
        rows = []
        with self._transaction() as db:
            for name in names:
                row = db.execute(
                    "SELECT seq, task_id, attempt, next_attempt, worker_id, installation_id, data"
                    f" FROM tasks INDEXED BY {index}"
                    f" WHERE {' AND '.join(where)}{'' if name is None else ' AND capability = ?'} ORDER BY seq LIMIT 1",
                    values if name is None else [*values, name],
                ).fetchone()
                if row is not None:
                    rows.append(row)
            if not rows:
                return None
            seq, task_id, attempt, next_attempt, last_worker, last_installation, data = min(rows)
            if (last_worker, last_installation) != (worker_id, installation_id):
                next_attempt = attempt + 1
            db.execute(
                "UPDATE tasks SET status = 'assigned', attempt = ?, next_attempt = ?, worker_id = ?,"
                f" installation_id = ?, updated_at = ?, timeline = {_APPEND} WHERE seq = ?",
                (
                    next_attempt,
                    next_attempt,
                    worker_id,
                    installation_id,
                    now,
                    _entry("assigned", now, next_attempt, worker_id),
                    seq,
                ),
            )
            # A task that its worker released and gets again is the same attempt.
            db.execute(
                "INSERT OR IGNORE INTO assignments (task_id, attempt, worker_id, installation_id) VALUES (?, ?, ?, ?)",
                (task_id, next_attempt, worker_id, installation_id),
            )
        return Claim(task_id, next_attempt, _event(data, next_attempt))

    def has_queued(self, agent_id: str) -> bool:
        """Return True if a task waits for this agent."""
        with self._lock:
            row = (
                self._connection()
                .execute(
                    "SELECT 1 FROM tasks INDEXED BY tasks_queued WHERE agent_id = ? AND status = 'queued' LIMIT 1",
                    (agent_id,),
                )
                .fetchone()
            )
        return row is not None

    def delayed(self) -> List[Tuple[str, str, float]]:
        """Return the queued tasks that wait for their next try: agent, capability, when (Unix time)."""
        with self._lock:
            return (
                self._connection()
                .execute(
                    "SELECT agent_id, capability, available_at FROM tasks WHERE status = 'queued' AND available_at > ?",
                    (self._clock(),),
                )
                .fetchall()
            )

    def assigned(self, installation_id: str, worker_id: str) -> List[Claim]:
        """Return the tasks that this worker has and has not reported, oldest first."""
        with self._lock:
            rows = (
                self._connection()
                .execute(
                    "SELECT task_id, attempt, data, cancel FROM tasks"
                    " WHERE installation_id = ? AND worker_id = ? AND status = 'assigned' ORDER BY seq",
                    (installation_id, worker_id),
                )
                .fetchall()
            )
        return [
            Claim(task_id, attempt, _event(data, attempt))
            if cancel is None
            # A task that was cancelled is not sent again.
            else Claim(task_id, attempt, cancel_event(task_id, json.loads(cancel).get("reason")), True)
            for task_id, attempt, data, cancel in rows
        ]

    def assigned_workers(self) -> List[Tuple[str, str, str]]:
        """Return every worker that has a task: installation, worker, agent."""
        with self._lock:
            return (
                self._connection()
                .execute("SELECT DISTINCT installation_id, worker_id, agent_id FROM tasks WHERE status = 'assigned'")
                .fetchall()
            )

    def is_finishing(self, installation_id: str, worker_id: str) -> bool:
        """Return True if a heartbeat within the lease said that this worker is stopping and still has tasks."""
        with self._lock:
            row = (
                self._connection()
                .execute(
                    "SELECT heartbeat FROM installations WHERE installation_id = ? AND lease_expires_at > ?",
                    (installation_id, self._clock()),
                )
                .fetchone()
            )
        workers = json.loads(row[0]).get("workers", ()) if row is not None and row[0] is not None else ()
        return any(
            worker.get("worker_id") == worker_id and worker.get("status") == "stopping" and worker.get("active_tasks")
            for worker in workers
        )

    def requeue(self, installation_id: str, worker_id: str) -> Tuple[int, List[str]]:
        """Queue the tasks of a vanished worker again. If it comes back first, it gets the same attempts.

        Return the number of those tasks, and the ids of the cancelled ones, which end instead.
        """
        now = self._clock()
        where, values = "installation_id = ? AND worker_id = ? AND status = 'assigned'", (installation_id, worker_id)
        with self._transaction() as db:
            ended = self._end_cancelled(db, now, where, values)
            count = db.execute(
                f"UPDATE tasks SET status = 'queued', updated_at = ?, timeline = {_APPEND_QUEUED} WHERE {where}",
                (now, instant(now), *values),
            ).rowcount
        return count, ended

    def complete(self, identity: Identity, task_id: str, key: Optional[str], body: Mapping[str, Any]) -> Completed:
        """Accept a task's result. The first result of any attempt wins. The same key gets the same answer again.

        :raises Refusal: 400 an attempt that never began, 403 not this installation's, 404 no such task.
        """
        now = self._clock()
        with self._transaction() as db:
            row = _find_task(
                db, task_id, "SELECT agent_id, status, attempt, max_attempts, failures, capability, cancel FROM tasks"
            )
            agent_id, status, current, max_attempts, failures, capability, cancel = row
            attempt = body.get("attempt", current)
            given = self._assignment(db, identity, task_id, attempt)
            worker_id, reported = given
            if key is not None:
                known = db.execute(
                    "SELECT answer FROM completions WHERE task_id = ? AND key = ?", (task_id, key)
                ).fetchone()
                if known is not None:
                    return Completed(200, json.loads(known[0]), agent_id, capability, worker_id, attempt)
            if status in FINAL or reported:
                problem = {
                    "error": "conflict",
                    "message": "the task has its result already",
                    "code": "ALREADY_COMPLETED",
                }
                return Completed(409, problem, agent_id, capability, worker_id, attempt)
            result = {name: body[name] for name in ("output", "error", "execution_time_ms") if name in body}
            failed = body["status"] == "failed"
            retry = failed and body["error"].get("retryable") is True and failures + 1 < max_attempts
            # Who has cancelled a task does not want it tried again.
            retry = retry and cancel is None
            retry_in = min(self._settings.retry_delay * 2.0**failures, MAX_RETRY_DELAY) if retry else None
            state = "queued" if retry else body["status"]
            if retry and status == "assigned" and attempt != current:
                # An older attempt failed while a newer one runs, which may still succeed.
                state, retry_in = "assigned", None
            db.execute(
                "UPDATE tasks SET status = ?, result = ?, failures = failures + ?, available_at = ?,"
                f" next_attempt = attempt + 1, updated_at = ?, timeline = {_APPEND} WHERE task_id = ?",
                (
                    state,
                    _text(result),
                    int(failed),
                    now + (retry_in or 0.0),
                    now,
                    _entry(state, now, attempt, worker_id),
                    task_id,
                ),
            )
            db.execute("UPDATE assignments SET reported = 1 WHERE task_id = ? AND attempt = ?", (task_id, attempt))
            answer = {"task_id": task_id, "status": state, "attempt": attempt}
            if key is not None:
                db.execute("INSERT INTO completions VALUES (?, ?, ?)", (task_id, key, _text(answer)))
        return Completed(200, answer, agent_id, capability, worker_id, attempt, state in FINAL, retry_in)

    def release(self, identity: Identity, task_id: str, worker_id: str, attempt: int) -> str:
        """Queue a task again that its worker has not begun, and return its agent. A repetition changes nothing.

        :raises Refusal: 403 not this installation's, 404 no such task, 409 no longer this worker's.
        """
        with self._transaction() as db:
            row = _find_task(db, task_id, "SELECT agent_id, status, attempt, worker_id FROM tasks")
            self._assignment(db, identity, task_id, attempt)
            agent_id, status, current, holder = row
            if status not in ("assigned", "queued") or (current, holder) != (attempt, worker_id):
                raise Refusal(409, "NOT_ASSIGNED", "the task is no longer this worker's")
            now = self._clock()
            where = "task_id = ? AND status = 'assigned'"
            self._end_cancelled(db, now, where, (task_id,))
            db.execute(
                f"UPDATE tasks SET status = 'queued', updated_at = ?, timeline = {_APPEND_QUEUED} WHERE {where}",
                (now, instant(now), task_id),
            )
        return str(agent_id)

    def progress(self, identity: Identity, task_id: str, body: Mapping[str, Any]) -> None:
        """Store a task's newest progress.

        :raises Refusal: 403 not this installation's, 404 no such task, 409 it has its result.
        """
        with self._transaction() as db:
            row = _find_task(db, task_id, "SELECT status, attempt FROM tasks")
            if not _owns(db, identity, task_id):
                raise _not_yours()
            if row[0] in FINAL:
                raise Refusal(409, "ALREADY_COMPLETED", "the task has its result already")
            db.execute(
                "UPDATE tasks SET progress = ?, updated_at = ? WHERE task_id = ?",
                (_text(body), self._clock(), task_id),
            )

    def task(self, task_id: str, requester: Optional[Identity] = None) -> Dict[str, Any]:
        """Return a task as JSON.

        :param requester: find only what this agent requested.
        :raises Refusal: 404 no such task.
        """
        where, values = _requested_by(requester)
        with self._lock:
            row = self._connection().execute(f"{_TASK} WHERE task_id = ? AND {where}", (task_id, *values)).fetchone()
        if row is None:
            raise _no_task(task_id)
        return _task(row)

    def tasks(
        self,
        status: Optional[str] = None,
        capability: Optional[str] = None,
        limit: int = 50,
        before: Optional[str] = None,
        requester: Optional[Identity] = None,
        *,
        agent_id: Optional[str] = None,
        is_short: bool = False,
    ) -> Tuple[List[Dict[str, Any]], Optional[str]]:
        """Return tasks, newest first, and the ``before`` of the next page (None on the last).

        :param requester: find only what this agent requested.
        :param is_short: leave out inputs and outputs.
        :raises Refusal: 400 ``before`` is not a task's id.
        """
        condition, visible = _requested_by(requester)
        where, values = [condition], [*visible]
        if status is not None:
            where.append("status = ?")
            values.append(status)
        if capability is not None:
            where.append("capability = ?")
            values.append(capability)
        if agent_id is not None:
            where.append("agent_id = ?")
            values.append(agent_id)
        with self._lock:
            db = self._connection()
            if before is not None:
                find = f"SELECT seq FROM tasks WHERE {condition} AND task_id = ?"
                row = db.execute(find, (*visible, before)).fetchone()
                if row is None:
                    raise Refusal(400, "INVALID_REQUEST", "before must be the task_id of a task")
                where.append("seq < ?")
                values.append(row[0])
            rows = db.execute(
                f"{_SUMMARY if is_short else _TASK} WHERE {' AND '.join(where)} ORDER BY seq DESC LIMIT ?",
                (*values, limit + 1),
            ).fetchall()
        tasks = [_summary(row) if is_short else _task(row) for row in rows[:limit]]
        return tasks, tasks[-1]["task_id"] if len(rows) > limit else None

    def summaries(self, task_ids: Sequence[str], requester: Optional[Identity] = None) -> List[Dict[str, Any]]:
        """Return these tasks without input and output, in the order of the ids. Unknown ones are left out.

        :param requester: find only what this agent requested.
        """
        where, values = _requested_by(requester)
        with self._lock:
            rows = (
                self._connection()
                .execute(
                    f"{_SUMMARY} WHERE task_id IN ({','.join('?' * len(task_ids))}) AND {where}", (*task_ids, *values)
                )
                .fetchall()
            )
        known = {row[0]: row for row in rows}
        return [_summary(known[task_id]) for task_id in dict.fromkeys(task_ids) if task_id in known]

    @staticmethod
    def _assignment(db: sqlite3.Connection, identity: Identity, task_id: str, attempt: int) -> Tuple[str, int]:
        row = db.execute(
            "SELECT worker_id, reported, installation_id FROM assignments WHERE task_id = ? AND attempt = ?",
            (task_id, attempt),
        ).fetchone()
        if row is not None and row[2] == identity.installation_id:
            return row[0], row[1]
        if row is None and _owns(db, identity, task_id):
            raise Refusal(400, "INVALID_REQUEST", f"attempt {attempt} of this task never began")
        raise _not_yours()

    # -- policies -----------------------------------------------------------------------------------------------------

    def set_policy(self, workspace_id: str, content: Mapping[str, Any]) -> Dict[str, Any]:
        """Make ``content`` the workspace's active policy, one version higher than the last.

        :raises Refusal: 400 the content cannot be hashed and signed.
        """
        now = self._clock()
        problem = ""
        try:
            digest = policy_hash(content)
        except ValueError as error:
            problem = str(error)
        if problem:
            raise Refusal(400, "INVALID_POLICY", f"content has no canonical JSON form (RFC 8785): {problem}")
        with self._transaction() as db:
            db.execute(
                "INSERT INTO policies VALUES (?, ?, 1, ?, ?, ?, ?) ON CONFLICT (workspace_id) DO UPDATE SET"
                " version = version + 1, hash = excluded.hash, content = excluded.content,"
                " activated_at = excluded.activated_at, updated_at = excluded.updated_at",
                (workspace_id, new_id("pol"), digest, _text(content), now, now),
            )
            db.execute(
                "INSERT OR IGNORE INTO policy_versions SELECT workspace_id, version, hash, content, activated_at"
                " FROM policies WHERE workspace_id = ?",
                (workspace_id,),
            )
            db.execute(
                "DELETE FROM policy_versions WHERE workspace_id = ? AND version <="
                " (SELECT version FROM policies WHERE workspace_id = ?) - ?",
                (workspace_id, workspace_id, MAX_POLICY_VERSIONS),
            )
        return self.policy(workspace_id)

    def policy(self, workspace_id: str) -> Dict[str, Any]:
        """Return the workspace's policy, signed with the current key, also if it was set under an older one.

        :raises Refusal: 404 the workspace has none.
        """
        with self._lock:
            row = (
                self._connection()
                .execute(
                    "SELECT policy_id, version, hash, content, activated_at, updated_at FROM policies"
                    " WHERE workspace_id = ?",
                    (workspace_id,),
                )
                .fetchone()
            )
        if row is None:
            raise Refusal(404, "POLICY_NOT_FOUND", "this workspace has no policy")
        key = self.policy_key
        policy = {
            "policy_id": row[0],
            "workspace_id": workspace_id,
            "version": row[1],
            "status": "active",
            "hash": row[2],
            "content": json.loads(row[3]),
            "activated_at": instant(row[4]),
            "updated_at": instant(row[5]),
        }
        signature = key.sign(policy)
        return {**policy, "signature": signature, "signing_key_id": key.id, "signing_public_key": key.public}

    def rotate_policy_key(self) -> None:
        """Sign every policy with a new key from now on, and forget the old key."""
        key = PolicyKey()
        with self._transaction() as db:
            db.execute("UPDATE meta SET value = ? WHERE key = 'policy_key'", (key.secret(),))
            self.policy_key = key

    # -- audit events -------------------------------------------------------------------------------------------------

    def log(self, events: Sequence[Mapping[str, Any]], batch: Optional[str]) -> None:
        """Store events, unless a batch with this name is stored already: its sender did not get the answer."""
        with self._transaction() as db:
            if batch is not None and db.execute("SELECT 1 FROM logs WHERE batch = ? LIMIT 1", (batch,)).fetchone():
                return
            db.executemany(
                "INSERT INTO logs (batch, event_type, severity, data) VALUES (?, ?, ?, ?)",
                [(batch, event["event_type"], event["severity"], _text(event)) for event in events],
            )
            db.execute("DELETE FROM logs WHERE seq <= (SELECT max(seq) FROM logs) - ?", (MAX_LOGS,))

    def logs(
        self, event_type: Optional[str], severity: Optional[str], limit: int = MAX_LOGS, after: int = 0
    ) -> List[Tuple[int, Dict[str, Any]]]:
        """Return the events with a number above ``after``, oldest first, with their numbers."""
        with self._lock:
            rows = (
                self._connection()
                .execute(
                    "SELECT seq, data FROM logs WHERE seq > ? AND event_type = coalesce(?, event_type)"
                    " AND severity = coalesce(?, severity) ORDER BY seq LIMIT ?",
                    (after, event_type, severity, limit),
                )
                .fetchall()
            )
        return [(row[0], json.loads(row[1])) for row in rows]

    # -- the dashboard ------------------------------------------------------------------------------------------------

    def read(self, sql: str, values: Sequence[Any] = ()) -> List[Tuple[Any, ...]]:
        """Return the rows of a query. It holds up every request while it runs, so it must be short."""
        with self._lock:
            return self._connection().execute(sql, values).fetchall()

    def changes(self) -> int:
        """Return how many rows were changed since the database was opened."""
        with self._lock:
            return self._connection().total_changes

    def open_session(self, digest: str, seconds: float) -> None:
        """Store a session of the dashboard by its secret's hash, and drop those that have expired."""
        now = self._clock()
        with self._transaction() as db:
            db.execute("DELETE FROM sessions WHERE expires_at <= ?", (now,))
            db.execute("INSERT OR REPLACE INTO sessions VALUES (?, ?)", (digest, now + seconds))

    def is_session(self, digest: str) -> bool:
        return bool(self.read("SELECT 1 FROM sessions WHERE hash = ? AND expires_at > ?", (digest, self._clock())))

    def close_session(self, digest: str) -> None:
        with self._transaction() as db:
            db.execute("DELETE FROM sessions WHERE hash = ?", (digest,))

    def _connection(self) -> sqlite3.Connection:
        if self._db is None:
            raise ConfigurationError("the local platform is stopped and its database closed; call start() first")
        return self._db


# -- rows and values --------------------------------------------------------------------------------------------------

_INSTALLATION = (
    "SELECT installation_id, agent_id, workspace_id, capabilities, runtime_info, created_at, lease_expires_at,"
    " last_heartbeat_at, heartbeat, desired_state, reason, revoked_until,"
    " (SELECT capabilities FROM published p WHERE p.installation_id = installations.installation_id)"
    " FROM installations"
)
_TASK = (
    "SELECT task_id, agent_id, data, status, attempt, worker_id, installation_id, max_attempts, created_at,"
    " updated_at, result, progress, available_at, timeline FROM tasks"
)
_SUMMARY = _TASK.replace(" data,", " json_remove(data, '$.input'),").replace(
    " result,", " json_remove(result, '$.output'),"
)
#: Append an entry to a timeline: one that is given, or that of a queued task at a time that is given.
_FITS = f"length(timeline) < {_LONGEST_TIMELINE}"
_APPEND = f"CASE WHEN {_FITS} THEN timeline || ? ELSE timeline END"
_APPEND_QUEUED = (
    f'CASE WHEN {_FITS} THEN timeline || \'{{"state":"queued","at":"\' || ? || \'","attempt":\''
    " || attempt || '},' ELSE timeline END"
)


class NewTask(Protocol):
    """Describe a checked submission (:class:`sekuire.local.fields.Submission`). Times are in seconds.

    ``fields`` go to the worker unchanged, with the default ``workspace_id`` where they have none.
    """

    @property
    def capability(self) -> str: ...

    @property
    def fields(self) -> Mapping[str, Any]: ...

    @property
    def max_attempts(self) -> int: ...

    @property
    def delay(self) -> float: ...

    @property
    def expires_in(self) -> Optional[float]: ...


def _entry(state: str, at: float, attempt: int, worker_id: Optional[str] = None) -> str:
    """Return an entry of a timeline."""
    entry: Dict[str, Any] = {"state": state, "at": instant(at), "attempt": attempt}
    if worker_id is not None:
        entry["worker_id"] = worker_id
    return _text(entry) + ","


def cancel_event(task_id: str, reason: Optional[str]) -> str:
    """Return the JSON text of a ``cancel`` event."""
    return _text({"task_id": task_id} if reason is None else {"task_id": task_id, "reason": reason})


def _is_ended_by_cancel(result: Optional[str]) -> bool:
    return result is not None and bool(json.loads(result).get("by_platform"))


def _installation(row: Sequence[Any]) -> Dict[str, Any]:
    heartbeat = json.loads(row[8]) if row[8] else {}
    return {
        "installation_id": row[0],
        "agent_id": row[1],
        "workspace_id": row[2],
        "capabilities": json.loads(row[3]),
        "runtime_info": json.loads(row[4]),
        "created_at": instant(row[5]),
        "lease_expires_at": instant(row[6]),
        "last_heartbeat_at": None if row[7] is None else instant(row[7]),
        "status": heartbeat.get("status"),
        "platform": heartbeat.get("platform"),
        "workers": heartbeat.get("workers", []),
        "desired_state": row[9],
        "reason": row[10],
        "revoked": row[11] is not None,
        "capability_info": json.loads(row[12]) if row[12] else [],
    }


def _task(row: Sequence[Any]) -> Dict[str, Any]:
    final = row[3] in FINAL
    result = json.loads(row[10]) if row[10] else {}
    return {
        **json.loads(row[2]),
        "agent_id": row[1],
        "status": row[3],
        "attempt": row[4],
        "worker_id": row[5],
        "installation_id": row[6],
        "max_attempts": row[7],
        "created_at": instant(row[8]),
        "updated_at": instant(row[9]),
        "completed_at": instant(row[9]) if final else None,
        "output": result.get("output"),
        "error": result.get("error"),
        "execution_time_ms": result.get("execution_time_ms"),
        "progress": json.loads(row[11]) if row[11] else None,
        "available_at": instant(row[12]),
        "timeline": json.loads(f"[{row[13][:-1]}]"),
    }


def _summary(row: Sequence[Any]) -> Dict[str, Any]:
    """Return a task as JSON, without its input and output."""
    task = _task(row)
    del task["output"]
    return task


def _event(data: str, attempt: int) -> str:
    # `data` is a JSON object with at least a task_id. Adding a field as text avoids parsing a large input.
    return f'{data[:-1]},"attempt":{attempt}}}'


def _owns(db: sqlite3.Connection, identity: Identity, task_id: str) -> bool:
    row = db.execute(
        "SELECT 1 FROM assignments WHERE task_id = ? AND installation_id = ?", (task_id, identity.installation_id)
    ).fetchone()
    return row is not None


def _find_task(db: sqlite3.Connection, task_id: str, select: str) -> Tuple[Any, ...]:
    row: Optional[Tuple[Any, ...]] = db.execute(f"{select} WHERE task_id = ?", (task_id,)).fetchone()
    if row is None:
        raise _no_task(task_id)
    return row


def _no_task(task_id: str) -> Refusal:
    return Refusal(404, "TASK_NOT_FOUND", f"there is no task {task_id!r}")


def _requested_by(requester: Optional[Identity]) -> Tuple[str, List[Any]]:
    """Return the condition, with its values, on tasks that an agent may see: those that it requested. None: all."""
    if requester is None:
        return "1", []
    where = "task_id IN (SELECT task_id FROM requests WHERE agent_id = ? AND workspace_id = ?)"
    return where, [requester.agent_id, requester.workspace_id]


def _not_yours() -> Refusal:
    return Refusal(403, "NOT_ASSIGNED", "the task was never assigned to this installation")


def _find_installation(db: sqlite3.Connection, installation_id: str, select: str) -> Tuple[Any, ...]:
    row: Optional[Tuple[Any, ...]] = db.execute(f"{select} WHERE installation_id = ?", (installation_id,)).fetchone()
    if row is None:
        raise Refusal(404, "INSTALLATION_NOT_FOUND", f"there is no installation {installation_id!r} here; {OF_ANOTHER}")
    return row


def revoked(reason: Optional[str]) -> Refusal:
    """Return the refusal of a revoked installation's request."""
    return Refusal(403, CODE_REVOKED, "the installation was revoked" + (f": {reason}" if reason else ""))


def new_id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"


def instant(seconds: float) -> str:
    """Return a Unix time in the form of the wire."""
    return format_time(dt.datetime.fromtimestamp(seconds, dt.timezone.utc))


def _plain(number: float) -> Union[int, float]:
    return int(number) if number == int(number) else number


def hash_of(text: str) -> str:
    """Return the SHA-256 of a text, which is kept in its place."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _text(value: Any) -> str:
    return encode_json(value).decode()


def _marks(values: FrozenSet[str]) -> str:
    return ",".join("?" * len(values))


# -- the file ---------------------------------------------------------------------------------------------------------


def _connect(path: Optional[str]) -> sqlite3.Connection:
    if path is None:
        db = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        _create(db)
        _add_missing(db)
        return db
    _make_file(path)
    problem = ""
    try:
        db = sqlite3.connect(path, timeout=2.0, isolation_level=None, check_same_thread=False)
    except sqlite3.Error as error:
        problem = f"cannot be opened as a database: {error}; give the path of a file this user may write"
    if not problem:
        try:
            problem = _prepare(db)
        except sqlite3.Error as error:
            problem = _describe(error)
        if problem:
            db.close()
    if problem:
        raise ConfigurationError(f"{path}: {problem}", "path")
    _restrict(path)
    return db


def erase(path: str) -> bool:
    """Delete a platform's database, and return False if there is none.

    :raises ConfigurationError: the file is in use, or it is not the database of a local platform.
    """
    if not os.path.exists(path):
        return False
    problem = ""
    try:
        db = sqlite3.connect(path, timeout=2.0, isolation_level=None)
        try:
            db.execute("PRAGMA locking_mode = EXCLUSIVE")
            application = db.execute("PRAGMA application_id").fetchone()[0]
            if db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] and application != APPLICATION_ID:
                problem = "is the database of another program, which is not deleted"
            else:
                # Fails while another process uses it.
                db.execute("BEGIN EXCLUSIVE")
                db.execute("ROLLBACK")
        finally:
            db.close()
    except sqlite3.Error as error:
        problem = _describe(error)
    try:
        if not problem:
            for name in (f"{path}-wal", f"{path}-shm", path):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name)
    except OSError as error:
        problem = f"cannot be deleted: {error.strerror}"
    if problem:
        raise ConfigurationError(f"{path}: {problem}", "path")
    return True


def _make_file(path: str) -> None:
    problem = ""
    folder = os.path.dirname(os.path.abspath(path))
    if os.path.isdir(path):
        problem = f"is a directory; give the path of a file in it, such as {os.path.join(path, 'sekuire.db')}"
    elif not os.path.isdir(folder):
        problem = f"the directory {folder} does not exist; make it first or choose another path"
    else:
        try:
            # Made here and not by SQLite, so that no other user can read it even for a moment.
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        except OSError as error:
            problem = f"cannot be written ({error.strerror}); give the path of a file this user may write"
    if problem:
        raise ConfigurationError(f"{path}: {problem}", "path")


def _prepare(db: sqlite3.Connection) -> str:
    """Check that the file is ours, and set up an empty one. Return what is wrong with it, or None."""
    # Before the first access, so that the WAL needs no shared memory and the first write acquires the lock.
    db.execute("PRAGMA locking_mode = EXCLUSIVE")
    application = db.execute("PRAGMA application_id").fetchone()[0]
    tables = db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    if tables and application != APPLICATION_ID:
        return "is the database of another program; give the path of a new file"
    if tables:
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version != SCHEMA_VERSION:
            return (
                f"was made by another version of sekuire.local (schema {version}, this one writes {SCHEMA_VERSION});"
                " delete it (sekuire dev --reset does), or give another path"
            )
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = NORMAL")
    if not tables:
        _create(db)
    else:
        db.execute("PRAGMA secure_delete = ON")
    _add_missing(db)
    # A write acquires the lock until the connection closes.
    db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    return ""


def _create(db: sqlite3.Connection) -> None:
    db.execute("PRAGMA secure_delete = ON")
    db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    db.executescript(f"BEGIN;{_SCHEMA}PRAGMA user_version = {SCHEMA_VERSION};COMMIT;")


def _add_missing(db: sqlite3.Connection) -> None:
    """Add what a file of this version may lack."""
    db.executescript(_ADDED)
    columns = {row[1] for row in db.execute("PRAGMA table_info(tasks)")}
    for name, kind in _ADDED_COLUMNS:
        if name not in columns:
            db.execute(f"ALTER TABLE tasks ADD COLUMN {name} {kind}")
    db.execute(_ADDED_INDEX)


def _describe(error: sqlite3.Error) -> str:
    text = str(error)
    if "not a database" in text:
        return "is not an SQLite database; give the path of a new file"
    if "locked" in text:
        return "is in use, most likely by another local platform; stop that one or give another path"
    if "readonly" in text:
        return "is read-only; give the path of a file this user may write"
    return f"cannot be used as a database: {text}; give the path of a new file"


def _restrict(path: str) -> None:
    if os.name != "posix":
        return
    for name in (path, path + "-wal"):
        with contextlib.suppress(OSError):
            if stat.S_IMODE(os.stat(name).st_mode) & 0o077:
                os.chmod(name, 0o600)


def check_id(value: object, name: str) -> str:
    """Return ``value`` if it is an id.

    :raises Refusal: 400, naming the field.
    """
    if not is_id(value):
        raise Refusal(400, "INVALID_REQUEST", f"{name} must be a string of 1 to 256 bytes without control characters")
    return value
