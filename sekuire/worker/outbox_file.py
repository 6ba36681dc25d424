"""The SQLite file of undelivered completions, and the lock that keeps other processes away from it."""

from __future__ import annotations

import contextlib
import itertools
import os
import sqlite3
import time
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple, TypeVar
from urllib.parse import quote

import attrs

from .._internal import filelock
from .._internal.logs import get_logger
from ..errors import ConfigurationError
from ..wire.protocol import is_id, one_line

log = get_logger("sekuire.outbox")

_SCHEMA_VERSION = 1
#: "SKUO" as SQLite's application_id, so that another program's file is not taken for ours.
_APPLICATION_ID = 0x534B554F
#: What sqlite3 raises; the second where its message quotes a name in a damaged file that is no UTF-8.
FAILURES = (sqlite3.Error, UnicodeDecodeError)
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
_PUT = "INSERT OR REPLACE INTO completion VALUES "
_PUT_ROW = "(?, ?, ?, ?, ?, ?, ?, ?)"
# The ids in one list: of whole keys in one, SQLite would look through all rows.
_REMOVE = "DELETE FROM completion WHERE api_url = ? AND agent_id = ? AND attempt <= ? AND task_id IN "
#: Most rows of one statement; SQLite takes 999 values at least.
_MOST_ROWS = 64
# As BLOBs: a text that is no UTF-8 would fail the whole query, and one damaged row must not hold up the others.
_LOAD = (
    "SELECT CAST(task_id AS BLOB), attempt, substituted, CAST(body AS BLOB) FROM completion"
    " WHERE api_url = ? AND agent_id = ? ORDER BY stored_at"
)


@attrs.frozen(slots=True)
class Stored:
    """One completion kept on disk: its encoded head and what the request for it needs."""

    task_id: str
    attempt: int
    substituted: bool
    head: bytes = attrs.field(repr=False)


_T = TypeVar("_T")
#: A completion to be removed, if it is of this attempt or an earlier one.
Removal = Tuple[str, str, str, int]


class CompletionFile:
    """One SQLite file and its lock. It belongs to one thread at a time: the one that leads its :class:`Outbox`."""

    def __init__(self, path: str) -> None:
        self.path = path
        #: None while the disk is too full even to open it; the next change tries again.
        self.database: Optional[sqlite3.Connection] = None
        self._lock_path = path + ".lock"
        #: The lock file's descriptor; -1 while it is not open.
        self._lock_file = -1
        self._has_warned = False
        #: How SQLite syncs now.
        self._level = ""

    def open(self) -> None:
        """Lock the file and open it.

        :raises ConfigurationError: another process uses it, or it is another program's.
        """
        self._take_lock()
        self.database = self._open()

    def close(self) -> None:
        """Close the database. The lock stays."""
        if self.database is not None:
            with contextlib.suppress(sqlite3.Error):
                self.database.close()

    def let_go(self) -> None:
        """Close the database and drop the lock."""
        self.close()
        self._drop_lock()

    def let_go_in_child(self) -> None:
        """Close the lock's descriptor in a forked child. The connection, and the lock itself, are the parent's."""
        if self._lock_file >= 0:
            with contextlib.suppress(OSError):
                os.close(self._lock_file)

    def load(self, api_url: str, agent_id: str) -> Iterator[Tuple[Any, ...]]:
        """Return the rows of a sender, oldest first."""
        if self.database is not None:
            yield from self.database.execute(_LOAD, (api_url, agent_id))
        elif os.path.getsize(self.path):
            # Without a byte to spare there is no place for SQLite's journal, which reading would want too.
            reader = sqlite3.connect(f"file:{quote(self.path)}?mode=ro&immutable=1", uri=True)
            try:
                yield from reader.execute(_LOAD, (api_url, agent_id))
            finally:
                reader.close()

    def commit(self, rows: Sequence[Tuple[Any, ...]], removals: Sequence[Removal]) -> Optional[str]:
        """Write rows and remove others, in one transaction. Return what was wrong, or None."""
        try:
            database = self.database = self.database or self._connect()
        except (*FAILURES, OSError, ConfigurationError) as error:
            return one_line(str(error))
        try:
            level = "FULL" if rows else "NORMAL"
            if level != self._level:
                database.execute(f"PRAGMA synchronous = {level}")
                self._level = level
            database.execute("BEGIN IMMEDIATE")
            # In this order: a removal is of a row that is on disk already; a row may be of the same task again.
            # Many rows a statement: each gives up the interpreter, and among eight threads must then wait for it.
            senders: Dict[Tuple[str, str, int], List[str]] = {}
            for api_url, agent_id, task_id, attempt in removals:
                senders.setdefault((api_url, agent_id, attempt), []).append(task_id)
            for sender, task_ids in senders.items():
                for ids in _portions(task_ids):
                    database.execute(f"{_REMOVE}({', '.join('?' * len(ids))})", [*sender, *ids])
            for portion in _portions(rows):
                database.execute(
                    _PUT + ", ".join([_PUT_ROW] * len(portion)), list(itertools.chain.from_iterable(portion))
                )
            database.execute("COMMIT")
        except FAILURES as error:
            with contextlib.suppress(*FAILURES):
                database.execute("ROLLBACK")
            return one_line(str(error))
        except BaseException:
            # A MemoryError, for example: an open transaction would refuse the next one.
            with contextlib.suppress(*FAILURES):
                database.execute("ROLLBACK")
            raise
        self._has_warned = False
        return None

    def warn(self, problem: str) -> None:
        """Log once, until a commit succeeds, that the file cannot be written."""
        if not self._has_warned:
            self._has_warned = True
            log.warning(
                "the outbox %s cannot be written (%s): results are delivered without it, and a crash now could lose "
                "those that are not delivered yet",
                self.path,
                problem,
            )

    # -- opening and locking --

    def _open(self) -> Optional[sqlite3.Connection]:
        try:
            return self._connect()
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            if any(words in str(error) for words in _FULL):
                self.warn(str(error))
                return None
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

    def _take_lock(self) -> None:
        problem = ""
        try:
            # Noted before it is locked: a child that is forked right then must know what to let go of.
            self._lock_file = filelock.open_lock(self._lock_path)
            if not filelock.try_lock(self._lock_file):
                problem = "another process uses it; give every process an outbox of its own"
        except OSError as error:
            problem = f"{self._lock_path!r} cannot be locked: {error.strerror}"
        if problem:
            raise ConfigurationError(f"{self.path!r}: {problem}", "outbox")

    def _drop_lock(self) -> None:
        # Forgotten before it is closed: its number may be another file's at once, which a forked child must not close.
        descriptor, self._lock_file = self._lock_file, -1
        if descriptor < 0:
            return
        with contextlib.suppress(OSError):
            filelock.unlock(descriptor)
        os.close(descriptor)


def _portions(rows: Sequence[_T]) -> Iterator[Sequence[_T]]:
    for start in range(0, len(rows), _MOST_ROWS):
        yield rows[start : start + _MOST_ROWS]


def stored_of(task_id: object, attempt: object, substituted: object, body: object) -> Optional[Stored]:
    """Return what a row holds, or None if it cannot be sent. Whether the body is JSON is the platform's to say."""
    try:
        text = task_id.decode() if isinstance(task_id, bytes) else None
    except UnicodeDecodeError:
        return None
    if not is_id(text) or type(attempt) is not int or not 1 <= attempt < 2**31 or not isinstance(body, bytes):
        return None
    return Stored(text, attempt, bool(substituted), body)
