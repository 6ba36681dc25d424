"""Completions on disk until the platform has accepted them: one SQLite file, one process, group commit."""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import threading
import time
from typing import Dict, List, Optional, Tuple, Union

import attrs

from . import filelock
from .errors import ConfigurationError
from .protocol import is_id, one_line

log = logging.getLogger("sekuire.outbox")

_SCHEMA_VERSION = 1
#: "SKUO" as SQLite's application_id, so that another program's file is not taken for ours.
_APPLICATION_ID = 0x534B554F
_LONGEST_WAIT = 60.0
#: What sqlite3 raises; the second where its message quotes a name in a damaged file that is no UTF-8.
_FAILURES = (sqlite3.Error, UnicodeDecodeError)

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
_REMOVE = "DELETE FROM completion WHERE api_url = ? AND agent_id = ? AND task_id = ?"
# As BLOBs: a text that is no UTF-8 would fail the whole query, and one damaged row must not hold up the others.
_LOAD = (
    "SELECT CAST(task_id AS BLOB), attempt, substituted, CAST(body AS BLOB) FROM completion"
    " WHERE api_url = ? AND agent_id = ? ORDER BY stored_at"
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
        self._owners: Dict[Tuple[str, str, str], object] = {}
        self._lock_file = self._take_lock()
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
            self._owners[api_url, agent_id, stored.task_id] = owner
        if self._change([(_PUT, row)], durable=True):
            return True
        self._disown(api_url, agent_id, stored.task_id)
        return False

    def remove(self, api_url: str, agent_id: str, task_id: str) -> None:
        """Forget a completion that was accepted."""
        self._change([(_REMOVE, (api_url, agent_id, task_id))], durable=False)
        self._disown(api_url, agent_id, task_id)

    def holds(self, api_url: str, agent_id: str, task_id: str) -> bool:
        """Whether somebody in this process is delivering a completion of this task."""
        return (api_url, agent_id, task_id) in self._owners

    def disown(self, owner: object) -> None:
        """``owner`` delivers no more; what it leaves may be claimed."""
        with self._condition:
            self._owners = {key: one for key, one in self._owners.items() if one is not owner}

    def claim(self, api_url: str, agent_id: str, owner: object) -> List[Stored]:
        """What is kept for this platform and agent and has no owner, oldest first; ``owner`` delivers it now.

        A row that is damaged stays in the file and is named in the log; where nothing can be read, nothing is claimed.
        """
        with self._condition:
            while self._leading:
                self._condition.wait(_LONGEST_WAIT)
            self._leading = True
        found: List[Stored] = []
        try:
            for row in self._database.execute(_LOAD, (api_url, agent_id)):
                stored = _stored(*row)
                if stored is not None:
                    found.append(stored)
                else:
                    log.error("the outbox %s holds a damaged row (task %r); it stays there", self.path, row[0])
        except _FAILURES as error:
            problem = one_line(str(error))
            log.error("the outbox %s cannot be read (%s); what it holds is left for the next start", self.path, problem)
        finally:
            with self._condition:
                self._leading = False
                found = [one for one in found if (api_url, agent_id, one.task_id) not in self._owners]
                self._owners.update({(api_url, agent_id, one.task_id): owner for one in found})
                self._condition.notify_all()
        return found

    def _disown(self, api_url: str, agent_id: str, task_id: str) -> None:
        with self._condition:
            self._owners.pop((api_url, agent_id, task_id), None)

    # -- life --

    def close(self) -> None:
        """One user less; the last one closes the file."""
        with _registry_lock:
            self._users -= 1
            if self._users > 0:
                return
            _registry.pop(self.path, None)
        with self._condition:
            self._closed = True
            while self._leading:
                self._condition.wait(_LONGEST_WAIT)
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
            problem: Optional[str] = "the thread that wrote was interrupted"
            try:
                problem = self._commit(batch)
            finally:
                # Whatever happened to this thread, the others must not wait for it.
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
        database = self._database
        try:
            level = "FULL" if any(ticket.durable for ticket in batch) else "NORMAL"
            database.execute(f"PRAGMA synchronous = {level}")
            database.execute("BEGIN IMMEDIATE")
            for ticket in batch:
                for statement, values in ticket.changes:
                    database.execute(statement, values)
            database.execute("COMMIT")
        except _FAILURES as error:
            with contextlib.suppress(*_FAILURES):
                database.execute("ROLLBACK")
            return one_line(str(error))
        except BaseException:
            # A MemoryError, for example: an open transaction would refuse the next one.
            with contextlib.suppress(*_FAILURES):
                database.execute("ROLLBACK")
            raise
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

    def _open(self) -> sqlite3.Connection:
        try:
            return self._connect()
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            # Exactly this class means "not a database" or "malformed"; its subclasses (locked, cannot open) pass.
            if isinstance(error, sqlite3.DatabaseError) and type(error) is not sqlite3.DatabaseError:
                raise
            problem = one_line(str(error))
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


def _stored(task_id: object, attempt: object, substituted: object, body: object) -> Optional[Stored]:
    """What a row holds; None where it cannot be sent. Whether the body is JSON is the platform's to say."""
    try:
        text = task_id.decode() if isinstance(task_id, bytes) else None
    except UnicodeDecodeError:
        return None
    if not is_id(text) or type(attempt) is not int or not 1 <= attempt < 2**31 or not isinstance(body, bytes):
        return None
    return Stored(text, attempt, bool(substituted), body)


_registry: Dict[str, Outbox] = {}
_registry_lock = threading.Lock()


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
        if outbox is None or outbox.pid != os.getpid():
            outbox = _registry[name] = _made(name)
        outbox._users += 1
        return outbox


def _made(name: str) -> Outbox:
    try:
        return Outbox(name)
    except (OSError, sqlite3.Error) as error:
        text = getattr(error, "strerror", None) or str(error)
    raise ConfigurationError(f"cannot open {name!r}: {text}", "outbox")
