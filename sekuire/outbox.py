"""Completions on disk until the platform has accepted them: one SQLite file, one process, group commit."""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import threading
import time
from typing import Dict, List, Optional, Tuple, Union
from urllib.parse import quote

import attrs

from . import filelock
from .errors import ConfigurationError

log = logging.getLogger("sekuire.outbox")

_SCHEMA_VERSION = 1
#: "SKUO" as SQLite's application_id, so that another program's file is not taken for ours.
_APPLICATION_ID = 0x534B554F
_LONGEST_WAIT = 60.0
#: How SQLite says that there is no room on the disk, or none for the files beside the database.
_FULL = ("disk is full", "disk I/O error")

_SCHEMA = """
CREATE TABLE IF NOT EXISTS completion (
    api_url TEXT NOT NULL,
    agent_id TEXT NOT NULL,
    task_id TEXT NOT NULL,
    installation_id TEXT,
    attempt INTEGER NOT NULL,
    substituted INTEGER NOT NULL,
    body BLOB NOT NULL,
    stored_at REAL NOT NULL,
    PRIMARY KEY (api_url, agent_id, task_id)
) WITHOUT ROWID
"""
_PUT = "INSERT OR REPLACE INTO completion VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
_REMOVE = "DELETE FROM completion WHERE api_url = ? AND agent_id = ? AND task_id = ? AND attempt <= ?"
_LOAD = (
    "SELECT task_id, attempt, substituted, body FROM completion WHERE api_url = ? AND agent_id = ? ORDER BY stored_at"
)

_Change = Tuple[str, Tuple[object, ...]]


@attrs.frozen(slots=True)
class Stored:
    """One completion kept on disk: its encoded head and what the request for it needs."""

    task_id: str
    attempt: int
    substituted: bool
    head: bytes = attrs.field(repr=False)


class _Ticket:
    """One caller's changes on their way to the disk."""

    __slots__ = ("changes", "done", "durable", "problem")

    def __init__(self, changes: List[_Change], durable: bool) -> None:
        self.changes = changes
        self.durable = durable
        self.done = False
        self.problem: Optional[str] = None


class Outbox:
    """The file of one process's undelivered completions, shared by all its Workers. :func:`open_outbox` makes it.

    Any thread may call anything. ``_condition`` guards the queue of changes and who leads; the leader alone touches
    SQLite, outside the lock, and commits everything that has queued meanwhile in one transaction: at eight threads the
    cost of a sync to disk is shared by eight results.

    What is put is synced to the disk before :meth:`put` returns. A removal is written but not synced: it survives a
    kill of the process, and should a power failure undo it, the result is sent once more under the same key.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.pid = os.getpid()
        self._lock_path = path + ".lock"
        self._condition = threading.Condition()
        self._queue: List[_Ticket] = []
        self._leading = False
        self._closed = False
        self._warned = False
        self._users = 0
        #: Who delivers a completion, and which attempt's it is.
        self._owners: Dict[Tuple[str, str, str], Tuple[object, int]] = {}
        self._lock_file = self._take_lock()
        #: None while the disk is too full even to open it; the next change tries again.
        self._database: Optional[sqlite3.Connection] = None
        try:
            self._database = self._open()
        except BaseException:
            self._drop_lock()
            raise

    # -- contents --

    def put(
        self, api_url: str, agent_id: str, installation_id: Optional[str], stored: Stored, owner: object = None
    ) -> bool:
        """Keep a completion, or replace the one of the same task; on disk when this returns.

        :param owner: who delivers it; :meth:`claim` gives it to nobody else meanwhile.
        :returns: False where it could not be written (disk full); one warning is logged, the caller delivers without.
        """
        row = (
            api_url, agent_id, stored.task_id, installation_id,
            stored.attempt, stored.substituted, stored.head, time.time(),
        )  # fmt: skip
        with self._condition:
            self._owners[api_url, agent_id, stored.task_id] = owner, stored.attempt
        if self._change([(_PUT, row)], durable=True):
            return True
        self._disown(api_url, agent_id, stored.task_id, stored.attempt)
        return False

    def remove(self, api_url: str, agent_id: str, task_id: str, attempt: int) -> None:
        """Forget a completion that was accepted; the next try of its task, with a higher ``attempt``, may be here."""
        self._change([(_REMOVE, (api_url, agent_id, task_id, attempt))], durable=False)
        self._disown(api_url, agent_id, task_id, attempt)

    def owner_of(self, api_url: str, agent_id: str, task_id: str) -> object:
        """Who in this process is delivering a completion of this task; None where nobody is."""
        found = self._owners.get((api_url, agent_id, task_id))
        return None if found is None else found[0]

    def disown(self, owner: object) -> None:
        """``owner`` delivers no more; what it leaves may be claimed."""
        with self._condition:
            self._owners = {key: one for key, one in self._owners.items() if one[0] is not owner}

    def claim(self, api_url: str, agent_id: str, owner: object) -> List[Stored]:
        """What is kept for this platform and agent and has no owner, oldest first; ``owner`` delivers it now.

        Where the file cannot be read, which is logged, that is nothing; it stays as it is for the next process.
        """
        with self._condition:
            while self._leading:
                self._condition.wait(_LONGEST_WAIT)
            self._leading = True
        rows = []
        try:
            rows = self._load(api_url, agent_id)
        except sqlite3.Error as error:
            log.error("the outbox %s cannot be read (%s): what an earlier process left in it is not delivered now",
                      self.path, error)  # fmt: skip
        finally:
            with self._condition:
                self._leading = False
                rows = [row for row in rows if (api_url, agent_id, row[0]) not in self._owners]
                self._owners.update({(api_url, agent_id, row[0]): (owner, row[1]) for row in rows})
                self._condition.notify_all()
        return [Stored(task_id, attempt, bool(substituted), body) for task_id, attempt, substituted, body in rows]

    def _load(self, api_url: str, agent_id: str) -> List[Tuple[str, int, int, bytes]]:
        if self._database is not None:
            return self._database.execute(_LOAD, (api_url, agent_id)).fetchall()
        if not os.path.getsize(self.path):
            return []
        # Without a byte to spare there is no place for SQLite's journal, which reading would want too.
        reader = sqlite3.connect(f"file:{quote(self.path)}?mode=ro&immutable=1", uri=True)
        try:
            return reader.execute(_LOAD, (api_url, agent_id)).fetchall()
        finally:
            reader.close()

    def _disown(self, api_url: str, agent_id: str, task_id: str, attempt: int) -> None:
        key = api_url, agent_id, task_id
        with self._condition:
            if key in self._owners and self._owners[key][1] <= attempt:
                del self._owners[key]

    # -- life --

    def close(self) -> None:
        """One user less; the last one closes the file. In a forked child, whose file it is not, nothing happens."""
        if self.pid != os.getpid():
            return
        with _registry_lock:
            self._users -= 1
            if self._users > 0:
                return
            _registry.pop(self.path, None)
        with self._condition:
            self._closed = True
            while self._leading:
                self._condition.wait(_LONGEST_WAIT)
        if self._database is not None:
            with contextlib.suppress(sqlite3.Error):
                self._database.close()
        self._drop_lock()

    def __repr__(self) -> str:
        return f"<Outbox {self.path}>"

    # -- group commit --

    def _change(self, changes: List[_Change], durable: bool) -> bool:
        ticket = _Ticket(changes, durable)
        batch: List[_Ticket] = []
        with self._condition:
            if self._closed:
                return False
            self._queue.append(ticket)
            while self._leading and not ticket.done:
                self._condition.wait(_LONGEST_WAIT)
            if not ticket.done:
                self._leading = True
                batch, self._queue = self._queue, []
        if batch:
            problem = self._commit(batch)
            with self._condition:
                for one in batch:
                    one.done = True
                    one.problem = problem
                self._leading = False
                self._condition.notify_all()
        if ticket.problem is not None:
            self._warn(ticket.problem)
        return ticket.problem is None

    def _commit(self, batch: List[_Ticket]) -> Optional[str]:
        """Write a batch in one transaction; what was wrong, or None. Only the leader calls this."""
        try:
            database = self._database = self._database or self._connect()
        except (sqlite3.Error, OSError, ConfigurationError) as error:
            return str(error)
        try:
            level = "FULL" if any(ticket.durable for ticket in batch) else "NORMAL"
            database.execute(f"PRAGMA synchronous = {level}")
            database.execute("BEGIN IMMEDIATE")
            for ticket in batch:
                for statement, values in ticket.changes:
                    database.execute(statement, values)
            database.execute("COMMIT")
        except sqlite3.Error as error:
            with contextlib.suppress(sqlite3.Error):
                database.execute("ROLLBACK")
            return str(error)
        self._warned = False
        return None

    def _warn(self, problem: str) -> None:
        if not self._warned:
            self._warned = True
            log.warning(
                "the outbox %s cannot be written (%s): results are delivered without it, and a crash now could lose "
                "those that are not delivered yet",
                self.path,
                problem,
            )

    # -- the file --

    def _open(self) -> Optional[sqlite3.Connection]:
        try:
            return self._connect()
        except sqlite3.DatabaseError as error:
            if any(words in str(error) for words in _FULL):
                self._warn(str(error))
                return None
            # Exactly this class means "not a database" or "malformed"; its subclasses (locked, cannot open) pass.
            if type(error) is not sqlite3.DatabaseError:
                raise
            problem = str(error)
        aside = f"{self.path}.corrupt-{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}"
        for suffix in ("", "-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                os.replace(self.path + suffix, aside + suffix)
        log.error(
            "the outbox %s cannot be read (%s); it was set aside as %s, with the undelivered results in it, and a new "
            "one begun",
            self.path,
            problem,
            aside,
        )
        return self._connect()

    def _connect(self) -> sqlite3.Connection:
        # Made before SQLite would make it, because results may be private.
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        os.close(descriptor)
        database = sqlite3.connect(self.path, timeout=10.0, isolation_level=None, check_same_thread=False)
        try:
            (application,) = database.execute("PRAGMA application_id").fetchone()
            (version,) = database.execute("PRAGMA user_version").fetchone()
            (tables,) = database.execute("SELECT count(*) FROM sqlite_master").fetchone()
            if tables and (application != _APPLICATION_ID or version != _SCHEMA_VERSION):
                raise ConfigurationError(
                    f"{self.path!r} is another program's database, or of another version; name another file", "outbox"
                )
            (check,) = database.execute("PRAGMA quick_check(1)").fetchone()
            if check != "ok":
                raise sqlite3.DatabaseError(check)
            if not tables:
                # Nothing is written to a file that is there already: it must open on a full disk too.
                database.execute("PRAGMA journal_mode = WAL")
                database.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
                database.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")
                database.execute(_SCHEMA)
        except BaseException:
            database.close()
            raise
        return database

    def _take_lock(self) -> int:
        problem = ""
        descriptor = -1
        try:
            descriptor = filelock.open_lock(self._lock_path)
            if not filelock.try_lock(descriptor):
                problem = "another process uses it; give every process an outbox of its own"
        except OSError as error:
            problem = f"{self._lock_path!r} cannot be locked: {error.strerror}"
        if problem:
            if descriptor >= 0:
                os.close(descriptor)
            raise ConfigurationError(f"{self.path!r}: {problem}", "outbox")
        return descriptor

    def _drop_lock(self) -> None:
        with contextlib.suppress(OSError):
            filelock.unlock(self._lock_file)
        os.close(self._lock_file)


_registry: Dict[str, Outbox] = {}
_registry_lock = threading.Lock()


def _after_fork() -> None:
    """In a forked child: let go of the parent's outboxes, so that none stays locked by a child that outlives it."""
    global _registry_lock
    _registry_lock = threading.Lock()
    for outbox in _registry.values():
        with contextlib.suppress(OSError):
            os.close(outbox._lock_file)
    # Kept, and never closed here: SQLite's connection belongs to the parent too.
    _inherited.extend(_registry.values())
    _registry.clear()


_inherited: List[Outbox] = []
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def open_outbox(path: Union[str, os.PathLike[str]]) -> Outbox:
    """The outbox at ``path``: the one this process has open, or a new one. Each call wants its own ``close()``.

    :raises ConfigurationError: the directory is missing, the file is another program's, or another process uses it.
    """
    if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
        raise ConfigurationError(f"must be a path, got {path!r}", "outbox")
    name = os.path.realpath(os.fspath(path))
    directory = os.path.dirname(name)
    if not os.path.isdir(directory):
        raise ConfigurationError(f"the directory {directory!r} does not exist; make it first", "outbox")
    if os.path.isdir(name):
        raise ConfigurationError(f"{name!r} is a directory; name a file in it", "outbox")
    with _registry_lock:
        outbox = _registry.get(name)
        if outbox is None:
            outbox = _registry[name] = _made(name)
        outbox._users += 1
        return outbox


def _made(name: str) -> Outbox:
    try:
        return Outbox(name)
    except (OSError, sqlite3.Error) as error:
        text = getattr(error, "strerror", None) or str(error)
    raise ConfigurationError(f"cannot open {name!r}: {text}", "outbox")
