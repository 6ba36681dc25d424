"""Keep undelivered completions in a SQLite file, and lock other processes out of it."""

from __future__ import annotations

import contextlib
import datetime as dt
import itertools
import os
import sqlite3
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple, TypeVar
from urllib.parse import quote

import attrs

from .._internal import filelock, files
from .._internal.clock import time
from .._internal.logs import get_logger
from ..errors import ConfigurationError
from ..wire.protocol import is_id, one_line

log = get_logger("sekuire.outbox")

_SCHEMA_VERSION = 1
#: "SKUO" as SQLite's application_id, so that another program's file is not taken for ours.
_APPLICATION_ID = 0x534B554F
#: What sqlite3 raises; the second if its message quotes a name in a damaged file that is not UTF-8.
FAILURES = (sqlite3.Error, UnicodeDecodeError)
#: How SQLite says that there is no room on the disk, or none for the files beside the database.
_FULL = ("disk is full", "disk I/O error")
#: How SQLite says that another program holds the database.
_BUSY = "is locked"
#: Seconds that a commit waits for another program, until that has been in vain once.
BUSY_WAIT = 2.0
#: Seconds between two looks at the files beside the database, while results are put. The database is always looked at.
_LOOK_PAUSE = 1.0
#: The files that SQLite keeps beside the database. What is committed may be in the first one only.
BESIDE = ("-wal", "-shm", "-journal")
#: Tries to lock a lock file that others delete at the same time.
_LOCK_TRIES = 10
# A link that leads to the file has been followed before, by `checked_path`.
_GUARD = files.Guard("outbox", follows_links=False)

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
# As BLOBs: a text that is not UTF-8 would fail the whole query, and one damaged row must not hold up the others.
_LOAD = (
    "SELECT CAST(task_id AS BLOB), attempt, substituted, CAST(body AS BLOB) FROM completion"
    " WHERE api_url = ? AND agent_id = ? ORDER BY stored_at"
)


@attrs.frozen(slots=True)
class Stored:
    """Hold one completion as it is on disk: its encoded head, and what the request for it needs."""

    task_id: str
    attempt: int
    substituted: bool
    head: bytes = attrs.field(repr=False)


_T = TypeVar("_T")
#: A completion to be removed, if it is of this attempt or an earlier one.
Removal = Tuple[str, str, str, int]


class CompletionFile:
    """Read and write one SQLite file, and hold its lock. Only the thread that leads its :class:`Outbox` may call it.

    ``epoch`` counts how often the file was opened. What was committed under a lower one may be in another file, which
    was deleted or replaced since. Any thread may read it.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        #: None while it cannot be opened (disk full, another program holds it); the next change tries again.
        self.database: Optional[sqlite3.Connection] = None
        self.epoch = 0
        self._lock_path = path + ".lock"
        #: The lock file's descriptor; -1 while it is not open.
        self._lock_file = -1
        self._has_warned = False
        #: Another program holds the database, and has been waited for.
        self._is_busy = False
        #: The disk was too full to open the database at the start.
        self._is_full = False
        #: How SQLite syncs now.
        self._level = ""
        #: Device and inode of the open files.
        self._identity: Tuple[Optional[Tuple[int, int]], ...] = ()
        #: When the files beside the database are looked at again. Each look costs a tenth of a commit.
        self._next_look = 0.0

    def open(self) -> None:
        """Lock the file and open it. Open it later, after one warning, if the disk is full or another program holds it.

        :raises ConfigurationError: another process uses it, it is another program's, or it cannot be trusted.
        """
        self._take_lock()
        try:
            self.database = self._connect_or_set_aside()
        except FAILURES as error:
            problem = one_line(str(error))
            self._is_full = any(words in problem for words in _FULL)
            if not self._is_full and not self._note_busy(problem):
                raise
            self.warn(problem)

    def close(self) -> None:
        """Close the database, with all that was committed in the file itself. The lock stays."""
        if self.database is not None:
            # Closing does this too, but not while another program reads the database.
            self.checkpoint()
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

    def checkpoint(self) -> None:
        """Write what was committed into the file itself, as far as that needs no wait. Any failure leaves it beside."""
        if self.database is not None:
            with contextlib.suppress(*FAILURES):
                self.database.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()

    def load(self, api_url: str, agent_id: str) -> Iterator[Tuple[Any, ...]]:
        """Return the rows of a sender, oldest first."""
        if self.database is not None:
            yield from self.database.execute(_LOAD, (api_url, agent_id))
        elif self._is_full and os.path.getsize(self.path):
            # Without a byte to spare there is no place for SQLite's journal, which reading would want too.
            reader = sqlite3.connect(f"file:{quote(self.path)}?mode=ro&immutable=1", uri=True)
            try:
                yield from reader.execute(_LOAD, (api_url, agent_id))
            finally:
                reader.close()

    def commit(self, rows: Sequence[Tuple[Any, ...]], removals: Sequence[Removal]) -> Optional[str]:
        """Write rows and remove others, in one transaction. Return what was wrong, or None.

        If the file was deleted or replaced since the last time, or could not be opened, open what is there now.
        """
        try:
            if self.database is not None and self._has_moved(bool(rows), bool(removals)):
                self._abandon()
            database = self.database = self.database or self._reopen()
        except (*FAILURES, OSError, ConfigurationError) as error:
            problem = error.problem if isinstance(error, ConfigurationError) else one_line(str(error))
            self._note_busy(problem)
            return problem
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
            problem = one_line(str(error))
            if not self._is_busy and self._note_busy(problem):
                with contextlib.suppress(*FAILURES):
                    database.execute("PRAGMA busy_timeout = 0")
            return problem
        except BaseException:
            # A MemoryError, for example: an open transaction would refuse the next one.
            with contextlib.suppress(*FAILURES):
                database.execute("ROLLBACK")
            raise
        if self._has_warned:
            self._has_warned = False
            log.info("the outbox %s can be written again", self.path)
        if self._is_busy:
            self._is_busy = False
            database.execute(f"PRAGMA busy_timeout = {int(BUSY_WAIT * 1000)}")
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

    def _note_busy(self, problem: str) -> bool:
        """Wait no second time for another program that holds the database. Return False if that is not the problem."""
        if _BUSY in problem:
            self._is_busy = True
            return True
        return False

    def _has_moved(self, has_rows: bool, has_removals: bool) -> bool:
        """Return True if one of the open files is not at its path any more."""
        if has_removals and not has_rows:
            # It can be late: at the worst a result is sent once more, under the same key.
            return False
        now = time.monotonic()
        if has_rows and now < self._next_look:
            return _inode(self.path) != self._identity[0]
        self._next_look = now + _LOOK_PAUSE
        return self._look() != self._identity

    def _look(self) -> Tuple[Optional[Tuple[int, int]], ...]:
        """Return device and inode of what is at the paths now: the database, what SQLite keeps beside it, the lock."""
        return _inode(self.path), _inode(self.path + "-wal"), _inode(self.path + "-shm"), _inode(self._lock_path)

    def _abandon(self) -> None:
        """Close the database because one of its files is not at its path any more."""
        database, self.database = self.database, None
        log.warning(
            "the outbox %s, or a file beside it, was deleted or replaced by another program; it is opened again, and "
            "the undelivered results of this process are written again",
            self.path,
        )
        if database is not None:
            with contextlib.suppress(sqlite3.Error):
                # If the database itself has moved, SQLite neither writes nor deletes what is at its path now.
                database.close()

    def _reopen(self) -> sqlite3.Connection:
        if self._lock_file < 0 or not filelock.is_at(self._lock_file, self._lock_path):
            self._drop_lock()
            self._take_lock()
        self._remove_left()
        return self._connect_or_set_aside()

    def _remove_left(self) -> None:
        """Remove what SQLite has left of a database that is not at its path any more: it would go into the new one."""
        before, now = self._identity, self._look()
        if not before or now[0] == before[0]:
            return
        for path, held, found in zip((self.path + "-wal", self.path + "-shm"), before[1:], now[1:]):
            if found is not None and found == held:
                os.unlink(path)

    def _connect_or_set_aside(self) -> sqlite3.Connection:
        try:
            return self._connect()
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            if any(words in str(error) for words in _FULL):
                raise
            # Exactly this class means "not a database" or "malformed"; its subclasses (locked, cannot open) pass.
            if isinstance(error, sqlite3.DatabaseError) and type(error) is not sqlite3.DatabaseError:
                raise
            problem = one_line(str(error))
        aside = f"{self.path}.corrupt-{dt.datetime.now():%Y%m%dT%H%M%S}-{os.getpid()}"
        for suffix in ("", *BESIDE):
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
        # Each before SQLite opens it: it believes what it finds, gives a new file the permissions of the database, and
        # loses its locks when this process closes another descriptor of the same file.
        for suffix in BESIDE:
            _GUARD.make_private(self.path + suffix)
        made = _GUARD.make_private(self.path, create=True)
        wait = 0.0 if self._is_busy else BUSY_WAIT
        database = sqlite3.connect(self.path, timeout=wait, isolation_level=None, check_same_thread=False)
        try:
            (application,) = database.execute("PRAGMA application_id").fetchone()
            (version,) = database.execute("PRAGMA user_version").fetchone()
            (tables,) = database.execute("SELECT count(*) FROM sqlite_master").fetchone()
            if _inode(self.path) != made:
                raise ConfigurationError(f"{self.path!r} was replaced while it was opened", "outbox")
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
        self._level = ""
        self._is_full = False
        self._identity = self._look()
        self.epoch += 1
        return database

    def _take_lock(self) -> None:
        problem = "another process deletes its lock again and again"
        try:
            for _ in range(_LOCK_TRIES):
                # Noted before it is locked: a child that is forked right then must know what to let go of.
                self._lock_file = filelock.open_lock(self._lock_path)
                if not filelock.try_lock(self._lock_file):
                    problem = "another process uses it; give every process an outbox of its own"
                    break
                if filelock.is_at(self._lock_file, self._lock_path):
                    return
                self._drop_lock()
        except OSError as error:
            problem = f"{self._lock_path!r} cannot be locked: {error.strerror}"
        self._drop_lock()
        raise ConfigurationError(f"{self.path!r}: {problem}", "outbox")

    def _drop_lock(self) -> None:
        # Forgotten before it is closed: its number may be another file's at once, which a forked child must not close.
        descriptor, self._lock_file = self._lock_file, -1
        if descriptor < 0:
            return
        with contextlib.suppress(OSError):
            filelock.unlock(descriptor)
        os.close(descriptor)


def _inode(path: str) -> Optional[Tuple[int, int]]:
    try:
        status = os.stat(path, follow_symlinks=False)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _portions(rows: Sequence[_T]) -> Iterator[Sequence[_T]]:
    for start in range(0, len(rows), _MOST_ROWS):
        yield rows[start : start + _MOST_ROWS]


def stored_of(task_id: object, attempt: object, substituted: object, body: object) -> Optional[Stored]:
    """Return what a row holds, or None if it cannot be sent. The platform decides if the body is JSON."""
    try:
        text = task_id.decode() if isinstance(task_id, bytes) else None
    except UnicodeDecodeError:
        return None
    if not is_id(text) or type(attempt) is not int or not 1 <= attempt < 2**31 or not isinstance(body, bytes):
        return None
    return Stored(text, attempt, bool(substituted), body)
