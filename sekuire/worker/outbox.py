"""Completions on disk until the platform has accepted them: one SQLite file, one process, group commit."""

from __future__ import annotations

import contextlib
import itertools
import os
import sqlite3
import threading
import time
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple, TypeVar, Union
from urllib.parse import quote

import attrs

from .._internal import filelock
from .._internal.logs import get_logger
from .._internal.threads import Deadline
from ..errors import ConfigurationError
from ..wire.protocol import is_id, one_line

log = get_logger("sekuire.outbox")

_SCHEMA_VERSION = 1
#: "SKUO" as SQLite's application_id, so that another program's file is not taken for ours.
_APPLICATION_ID = 0x534B554F
_LONGEST_WAIT = 60.0
#: Seconds that :func:`open_outbox` waits for another thread that opens or closes the same file.
_TURN_TIMEOUT = 30.0
#: What sqlite3 raises; the second where its message quotes a name in a damaged file that is no UTF-8.
_FAILURES = (sqlite3.Error, UnicodeDecodeError)
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
_Key = Tuple[str, str, str]
#: A completion to be removed, if it is of this attempt or an earlier one.
_Removal = Tuple[str, str, str, int]


class _Ticket:
    """One caller that waits: for its row to be on disk, or (without a row) for its turn at the database.

    ``gate`` is held until another thread opens it; ``leads`` tells that the turn came, not the end.
    """

    __slots__ = ("gate", "leads", "problem", "row")

    def __init__(self, row: Tuple[Any, ...] = ()) -> None:
        self.row = row
        self.gate = threading.Lock()
        self.gate.acquire()
        self.leads = False
        self.problem: Optional[str] = "it was not reached"

    def wait(self) -> None:
        while not self.gate.acquire(timeout=_LONGEST_WAIT):
            pass


class Outbox:
    """The file of one process's undelivered completions, shared by all its Workers. :func:`open_outbox` makes it.

    Any thread may call anything. ``_lock`` guards what waits to be written, who owns what, and whether somebody leads;
    the leader alone touches SQLite, outside the lock. It commits everything that has queued meanwhile in one
    transaction, so that at eight threads the cost of a sync to disk is shared by eight results; then it opens the gate
    of each thread whose row that was, hands the lead to the first that has queued since, and goes its way.
    The module's ``_registry_changed`` guards which outboxes the process has, ``_users`` and ``_is_open``. It is not
    held over I/O either: an outbox that is not open belongs to the one thread that opens or closes it.

    What is put is synced to the disk before :meth:`put` returns. A removal is not waited for: it is written at once,
    or, where somebody leads, by that thread or the next before they return. It is not synced: it survives a kill of the
    process, and should a kill or a power failure come first, the result is sent once more under the same key.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.pid = os.getpid()
        self._lock_path = path + ".lock"
        self._lock = threading.Lock()
        self._puts: List[_Ticket] = []
        self._visitors: List[_Ticket] = []
        self._removals: List[_Removal] = []
        self._leading = False
        self._closed = False
        self._warned = False
        self._users = 0
        #: False while one thread opens it, and from the moment when the last user has begun to close it.
        self._is_open = False
        #: Who delivers a completion, and which attempt's it is.
        self._owners: Dict[_Key, Tuple[object, int]] = {}
        self._level = ""
        #: The lock file's descriptor; -1 while it is not open.
        self._lock_file = -1
        #: None while the disk is too full even to open it; the next change tries again.
        self._database: Optional[sqlite3.Connection] = None

    # -- contents --

    def put(
        self, api_url: str, agent_id: str, installation_id: Optional[str], stored: Stored, owner: object = None
    ) -> bool:
        """Keep a completion, or replace the one of the same task; on disk when this returns.

        :param owner: who delivers it; :meth:`claim` gives it to nobody else meanwhile.
        :returns: False where it could not be written (disk full); one warning is logged, the caller delivers without.
        """
        key = (api_url, agent_id, stored.task_id)
        ticket = _Ticket((*key, installation_id, stored.attempt, stored.substituted, stored.head, time.time()))
        with self._lock:
            if self._closed:
                return False
            self._owners[key] = owner, stored.attempt
            self._puts.append(ticket)
            leads = not self._leading
            self._leading = True
        if leads or self._wait(ticket):
            self._lead(ticket)
        if ticket.problem is None:
            return True
        self._warn(ticket.problem)
        self._disown(*key, stored.attempt)
        return False

    def put_all(
        self, api_url: str, agent_id: str, installation_id: Optional[str], many: Sequence[Stored], owner: object = None
    ) -> bool:
        """:meth:`put` of at least one completion, in one transaction: all are on disk then, or none is."""
        sender, now = (api_url, agent_id), time.time()
        tickets = [
            _Ticket((*sender, one.task_id, installation_id, one.attempt, one.substituted, one.head, now))
            for one in many
        ]
        with self._lock:
            if self._closed:
                return False
            self._owners.update({(*sender, one.task_id): (owner, one.attempt) for one in many})
            self._puts.extend(tickets)
            leads = not self._leading
            self._leading = True
        # They queue as one and are written as one, so the first speaks for all.
        if leads or self._wait(tickets[0]):
            self._lead(tickets[0])
        if tickets[0].problem is None:
            return True
        self._warn(tickets[0].problem)
        for one in many:
            self._disown(*sender, one.task_id, one.attempt)
        return False

    def remove(self, api_url: str, agent_id: str, task_id: str, attempt: int) -> None:
        """Forget a completion that was accepted; the next try of its task, with a higher ``attempt``, may be here."""
        with self._lock:
            self._drop_owner((api_url, agent_id, task_id), attempt)
            if self._closed:
                return
            self._removals.append((api_url, agent_id, task_id, attempt))
            if self._leading:
                return
            self._leading = True
        problem = self._lead()
        if problem is not None:
            self._warn(problem)

    def owner_of(self, api_url: str, agent_id: str, task_id: str) -> object:
        """Who in this process is delivering a completion of this task; None where nobody is."""
        found = self._owners.get((api_url, agent_id, task_id))
        return None if found is None else found[0]

    def disown(self, owner: object) -> None:
        """``owner`` delivers no more; what it leaves may be claimed."""
        with self._lock:
            self._owners = {key: one for key, one in self._owners.items() if one[0] is not owner}

    def claim(self, api_url: str, agent_id: str, owner: object) -> List[Stored]:
        """What is kept for this platform and agent and has no owner, oldest first; ``owner`` delivers it now.

        A row that is damaged stays in the file and is named in the log; where nothing can be read, nothing is claimed.
        """
        found: List[Stored] = []
        self._take_lead()
        try:
            try:
                for row in self._load(api_url, agent_id):
                    stored = _stored(*row)
                    if stored is not None:
                        found.append(stored)
                    else:
                        log.error("the outbox %s holds a damaged row (task %r); it stays there", self.path, row[0])
            except _FAILURES as error:
                problem = one_line(str(error))
                log.error("the outbox %s cannot be read (%s); what it holds is left for the next start",
                          self.path, problem)  # fmt: skip
            with self._lock:
                # A removal that waits for this thread has no owner any more, but its row has been read.
                removed: Dict[_Key, int] = {}
                for removal in self._removals:
                    removed[removal[:3]] = max(removal[3], removed.get(removal[:3], 0))
                found = [one for one in found if self._is_free((api_url, agent_id, one.task_id), one.attempt, removed)]
                self._owners.update({(api_url, agent_id, one.task_id): (owner, one.attempt) for one in found})
        finally:
            self._lead()
        return found

    def _is_free(self, key: _Key, attempt: int, removed: Dict[_Key, int]) -> bool:
        """Whether a row that was read may be claimed. Needs the lock."""
        return key not in self._owners and attempt > removed.get(key, 0)

    def _load(self, api_url: str, agent_id: str) -> Iterator[Tuple[Any, ...]]:
        """The rows of a sender. Only the leader calls this."""
        if self._database is not None:
            yield from self._database.execute(_LOAD, (api_url, agent_id))
        elif os.path.getsize(self.path):
            # Without a byte to spare there is no place for SQLite's journal, which reading would want too.
            reader = sqlite3.connect(f"file:{quote(self.path)}?mode=ro&immutable=1", uri=True)
            try:
                yield from reader.execute(_LOAD, (api_url, agent_id))
            finally:
                reader.close()

    def _disown(self, api_url: str, agent_id: str, task_id: str, attempt: int) -> None:
        with self._lock:
            self._drop_owner((api_url, agent_id, task_id), attempt)

    def _drop_owner(self, key: _Key, attempt: int) -> None:
        """Needs the lock."""
        found = self._owners.get(key)
        if found is not None and found[1] <= attempt:
            del self._owners[key]

    # -- life --

    def open(self) -> None:
        """Lock the file and open it. Only :func:`open_outbox` calls this, and :meth:`let_go` where it fails."""
        self._take_lock()
        self._database = self._open()

    def close(self) -> None:
        """One user less; the last one closes the file. In a forked child, whose file it is not, nothing happens."""
        if self.pid != os.getpid():
            return
        is_last = False
        try:
            with _registry_changed:
                is_last = self._users == 1
                self._users = max(0, self._users - 1)
                if not is_last:
                    return
                # It stays in the registry: whoever wants the file now waits until its lock has been dropped.
                self._is_open = False
            with self._lock:
                self._closed = True
            self._take_lead()
            try:
                self._write_queued()
                if self._database is not None:
                    with contextlib.suppress(sqlite3.Error):
                        self._database.close()
            finally:
                self._lead()
        finally:
            if is_last:
                self.let_go()

    def let_go(self) -> None:
        """Drop the file and its lock, then let others open it anew. Only the thread that opens or closes calls this."""
        try:
            if self._database is not None:
                with contextlib.suppress(sqlite3.Error):
                    self._database.close()
            self._drop_lock()
        finally:
            with _registry_changed:
                if _registry.get(self.path) is self:
                    del _registry[self.path]
                _registry_changed.notify_all()

    def __repr__(self) -> str:
        return f"<Outbox {self.path}>"

    # -- group commit --

    def _take_lead(self) -> None:
        """Wait for a turn at the database; :meth:`_lead` ends it."""
        ticket = _Ticket()
        with self._lock:
            if not self._leading:
                self._leading = True
                return
            self._visitors.append(ticket)
        try:
            ticket.wait()
        except BaseException:
            # Ctrl-C, for example: a turn that is given to nobody would hold up all others for ever.
            with self._lock:
                if ticket in self._visitors:
                    self._visitors.remove(ticket)
                elif not self._pass_on():
                    self._leading = False
            raise

    @staticmethod
    def _wait(ticket: _Ticket) -> bool:
        """Wait until a row is on disk; whether the lead came instead."""
        ticket.wait()
        return ticket.leads

    def _lead(self, mine: Optional[_Ticket] = None) -> Optional[str]:
        """Write what has queued, then hand the lead on, or end it where nothing is left; the last problem, or None.

        Only the leader calls this.
        """
        problem: Optional[str] = None
        while True:
            if mine is None:
                with self._lock:
                    if self._pass_on():
                        return problem
                    if not self._removals:
                        self._leading = False
                        return problem
            mine = None
            try:
                problem = self._write_queued()
            except BaseException:
                # Whatever ends this thread, the others must not wait for it.
                with self._lock:
                    if not self._pass_on():
                        self._leading = False
                raise

    def _write_queued(self) -> Optional[str]:
        """Commit what has queued and open the gates of those who wait for it. Only the leader calls this."""
        with self._lock:
            puts, self._puts = self._puts, []
            removals, self._removals = self._removals, []
        problem: Optional[str] = "the commit did not end"
        try:
            problem = self._commit(puts, removals)
        finally:
            for ticket in puts:
                ticket.problem = problem
                ticket.gate.release()
        return problem

    def _pass_on(self) -> bool:
        """Give the lead to whoever has waited for it, if anybody has. Needs the lock."""
        if self._visitors:
            heir = self._visitors.pop(0)
        elif self._puts:
            heir = self._puts[0]
        else:
            return False
        heir.leads = True
        heir.gate.release()
        return True

    def _commit(self, puts: List[_Ticket], removals: List[_Removal]) -> Optional[str]:
        """Write a batch in one transaction; what was wrong, or None. Only the leader calls this."""
        try:
            database = self._database = self._database or self._connect()
        except (*_FAILURES, OSError, ConfigurationError) as error:
            return one_line(str(error))
        try:
            level = "FULL" if puts else "NORMAL"
            if level != self._level:
                database.execute(f"PRAGMA synchronous = {level}")
                self._level = level
            database.execute("BEGIN IMMEDIATE")
            # In this order: a removal is of a row that is on disk already; a put may be of the same task anew.
            # Many rows a statement: each gives up the interpreter, and among eight threads must then wait for it.
            senders: Dict[Tuple[str, str, int], List[str]] = {}
            for api_url, agent_id, task_id, attempt in removals:
                senders.setdefault((api_url, agent_id, attempt), []).append(task_id)
            for sender, task_ids in senders.items():
                for ids in _portions(task_ids):
                    database.execute(f"{_REMOVE}({', '.join('?' * len(ids))})", [*sender, *ids])
            for rows in _portions([ticket.row for ticket in puts]):
                database.execute(_PUT + ", ".join([_PUT_ROW] * len(rows)), list(itertools.chain.from_iterable(rows)))
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

    def _open(self) -> Optional[sqlite3.Connection]:
        try:
            return self._connect()
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            if any(words in str(error) for words in _FULL):
                self._warn(str(error))
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
_registry_changed = threading.Condition()


def _after_fork() -> None:
    """In a forked child: let go of the parent's outboxes, so that none stays locked by a child that outlives it."""
    global _registry_changed
    _registry_changed = threading.Condition()
    for outbox in _registry.values():
        if outbox._lock_file >= 0:
            with contextlib.suppress(OSError):
                os.close(outbox._lock_file)
    # Kept, and never closed here: SQLite's connection belongs to the parent too.
    _inherited.extend(_registry.values())
    _registry.clear()


_inherited: List[Outbox] = []
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def checked_path(path: Any) -> str:
    """Where an outbox at ``path`` would be; nothing is opened or made.

    :raises ConfigurationError: it cannot be there.
    """
    if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
        raise ConfigurationError(f"must be a path, got {path!r}", "outbox")
    name = os.path.realpath(os.fspath(path))
    directory = os.path.dirname(name)
    if not os.path.isdir(directory):
        raise ConfigurationError(f"the directory {directory!r} does not exist; make it first", "outbox")
    if os.path.isdir(name):
        raise ConfigurationError(f"{name!r} is a directory; name a file in it", "outbox")
    return name


def open_outbox(path: Union[str, os.PathLike[str]]) -> Outbox:
    """The outbox at ``path``: the one this process has open, or a new one. Each call wants its own ``close()``.

    One that another thread opens or closes at this moment is waited for, up to 30 s.

    :raises ConfigurationError: the directory is missing, the file is another program's, or another process uses it.
    """
    name = checked_path(path)
    mine = Outbox(name)
    try:
        outbox = _share(mine)
        if outbox is mine:
            _open(mine)
            with _registry_changed:
                mine._users = 1
                mine._is_open = True
                _registry_changed.notify_all()
        return outbox
    finally:
        if not mine._is_open and _registry.get(name) is mine:
            mine.let_go()


def _share(mine: Outbox) -> Outbox:
    """The outbox of this path that is open, with one user more; or ``mine``, which others wait for from now on."""
    deadline = Deadline(_TURN_TIMEOUT)
    with _registry_changed:
        while True:
            outbox = _registry.setdefault(mine.path, mine)
            if outbox is mine:
                return mine
            if outbox._is_open:
                outbox._users += 1
                return outbox
            if not _registry_changed.wait(deadline.remaining()):
                raise ConfigurationError(
                    f"{mine.path!r}: another thread of this process has been opening or closing it for "
                    f"{_TURN_TIMEOUT:g} s",
                    "outbox",
                )


def _open(outbox: Outbox) -> None:
    try:
        outbox.open()
        return
    except (OSError, sqlite3.Error) as error:
        text = getattr(error, "strerror", None) or str(error)
    raise ConfigurationError(f"cannot open {outbox.path!r}: {text}", "outbox")
