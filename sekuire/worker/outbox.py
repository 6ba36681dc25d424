"""Keep completions on disk until the platform has accepted them: one file, one process, group commit."""

from __future__ import annotations

import os
import sqlite3
import threading
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

from .._internal import files, fork
from .._internal.clock import time
from .._internal.logs import get_logger
from .._internal.monitor import Monitor
from .._internal.threads import Deadline
from ..errors import ConfigurationError
from ..wire.protocol import one_line
from .outbox_file import BESIDE, FAILURES, CompletionFile, Removal, Stored, stored_of

__all__ = ["Outbox", "Stored", "Ticket", "checked_path", "open_outbox"]

log = get_logger("sekuire.outbox")

_LONGEST_WAIT = 60.0
_GUARD = files.Guard("outbox")
#: Seconds that :func:`open_outbox` waits for another thread that opens or closes the same file.
_TURN_TIMEOUT = 30.0
_Key = Tuple[str, str, str]


class Ticket:
    """Let one caller wait: for its row to be on disk, or (without a row) for its turn at the file.

    ``gate`` is held until another thread opens it. ``leads`` is True if the turn came, and not the end.
    """

    __slots__ = ("gate", "leads", "problem", "row")

    def __init__(self, row: Tuple[Any, ...] = ()) -> None:
        self.row = row
        self.gate = threading.Lock()
        self.gate.acquire()
        self.leads = False
        self.problem: Optional[str] = "it was not reached"

    def wait(self) -> None:
        """Wait until another thread opens the gate."""
        while not self.gate.acquire(timeout=_LONGEST_WAIT):
            pass


class Outbox:
    """Store the undelivered completions of one process, for all its Workers, in one file. ::

        outbox = open_outbox("results.db")
        outbox.put(api_url, agent_id, installation_id, Stored("task-1", 1, False, head))
        outbox.remove(api_url, agent_id, "task-1", 1)
        outbox.close()

    A completion that is put is synced to the disk before :meth:`put` returns. A removal is not waited for, and not
    synced: it survives a kill of the process. Should a kill come before it is written, the result is sent once more
    under the same key.
    """

    # Threads: any thread may call anything. `_lock` guards what waits to be written, who owns what, and whether a
    # thread leads. The leader alone touches the file, outside the lock. It commits everything that has queued since the
    # last commit in one transaction: at eight threads the cost of a sync to disk is shared by eight results. Then it
    # opens the gate of each thread whose row that was, and hands the lead to the first that has queued since.
    # `_registry_changed` guards which outboxes the process has, `users` and `is_open`. It is not held over I/O either:
    # an outbox that is not open belongs to the one thread that opens or closes it.

    def __init__(self, path: str) -> None:
        self.path = path
        self.pid = os.getpid()
        self.file = CompletionFile(path)
        #: Who waits for a turn at the file.
        self.visitors: List[Ticket] = []
        #: Workers that have it open.
        self.users = 0
        #: False while one thread opens it, and from the moment when the last user has begun to close it.
        self.is_open = False
        self._lock = threading.Lock()
        self._puts: List[Ticket] = []
        self._removals: List[Removal] = []
        #: Removals whose commit failed. They go with the next one.
        self._unwritten: List[Removal] = []
        self._has_leader = False
        self._is_closed = False
        #: Who delivers a completion, and which attempt's it is.
        self._owners: Dict[_Key, Tuple[object, int]] = {}

    # -- contents --

    def put(
        self, api_url: str, agent_id: str, installation_id: Optional[str], stored: Stored, owner: object = None
    ) -> bool:
        """Store a completion, or replace the one of the same task. It is on disk when this returns.

        :param owner: who delivers it; :meth:`claim` gives it to nobody else.
        :returns: False if it could not be written (disk full). One warning is logged, and the caller delivers without.
        """
        return self._store((api_url, agent_id), installation_id, (stored,), owner)

    def put_all(
        self, api_url: str, agent_id: str, installation_id: Optional[str], many: Sequence[Stored], owner: object = None
    ) -> bool:
        """Store at least one completion, in one transaction: all are on disk when this returns, or none is."""
        return self._store((api_url, agent_id), installation_id, many, owner)

    def _store(
        self, origin: Tuple[str, str], installation_id: Optional[str], many: Sequence[Stored], owner: object
    ) -> bool:
        now = time.time()
        tickets = [
            Ticket((*origin, one.task_id, installation_id, one.attempt, one.substituted, one.head, now)) for one in many
        ]
        with self._lock:
            if self._is_closed:
                return False
            for one in many:
                self._owners[(*origin, one.task_id)] = owner, one.attempt
            self._puts.extend(tickets)
            leads = not self._has_leader
            self._has_leader = True
        # They queue as one and are written as one, so the first speaks for all.
        ticket = tickets[0]
        if not leads:
            ticket.wait()
            leads = ticket.leads
        if leads:
            self.lead(ticket)
        if ticket.problem is None:
            return True
        with self._lock:
            for one in many:
                self._drop_owner((*origin, one.task_id), one.attempt)
        return False

    def remove(self, api_url: str, agent_id: str, task_id: str, attempt: int) -> None:
        """Remove a completion that was accepted, unless it is of a higher attempt: the next try of its task.

        It is written at once, or, if a thread leads, by that thread or the next before they return.
        """
        with self._lock:
            self._drop_owner((api_url, agent_id, task_id), attempt)
            if self._is_closed:
                return
            self._removals.append((api_url, agent_id, task_id, attempt))
            if self._has_leader:
                return
            self._has_leader = True
        self.lead()

    @property
    def epoch(self) -> int:
        """A number that rises when the file is opened again: it was deleted, replaced, or could not be opened before.

        What was put under a lower one may not be in the file.
        """
        return self.file.epoch

    def verify(self) -> None:
        """Open the file again if it is not the one at its path any more. Write what was put into the file itself.

        Until then some of it may be in a file beside it, which a copy of the file alone would lack.
        """
        with self._lock:
            if self._is_closed:
                return
        self.take_lead()
        try:
            if self.write_queued() is None:
                self.file.checkpoint()
        finally:
            self.lead()

    def owner_of(self, api_url: str, agent_id: str, task_id: str) -> object:
        """Return who in this process delivers a completion of this task, or None."""
        found = self._owners.get((api_url, agent_id, task_id))
        return None if found is None else found[0]

    def disown(self, owner: object) -> None:
        """Let others claim what ``owner`` has not delivered."""
        with self._lock:
            self._owners = {key: one for key, one in self._owners.items() if one[0] is not owner}

    def claim(self, api_url: str, agent_id: str, owner: object) -> List[Stored]:
        """Return what is stored for this platform and agent and has no owner, oldest first. ``owner`` delivers it now.

        A row that is damaged stays in the file and is named in the log. If nothing can be read, nothing is claimed.
        """
        found: List[Stored] = []
        self.take_lead()
        try:
            try:
                for row in self.file.load(api_url, agent_id):
                    stored = stored_of(*row)
                    if stored is not None:
                        found.append(stored)
                    else:
                        log.error("the outbox %s holds a damaged row (task %r); it stays there", self.path, row[0])
            except (*FAILURES, OSError) as error:
                problem = one_line(str(error))
                log.error("the outbox %s cannot be read (%s); what it holds is left for the next start",
                          self.path, problem)  # fmt: skip
            with self._lock:
                # A removal that waits for this thread has no owner any more, but its row has been read.
                removed: Dict[_Key, int] = {}
                for removal in (*self._unwritten, *self._removals):
                    removed[removal[:3]] = max(removal[3], removed.get(removal[:3], 0))
                found = [one for one in found if self._is_free((api_url, agent_id, one.task_id), one.attempt, removed)]
                self._owners.update({(api_url, agent_id, one.task_id): (owner, one.attempt) for one in found})
        finally:
            self.lead()
        return found

    def _is_free(self, key: _Key, attempt: int, removed: Dict[_Key, int]) -> bool:
        """Return True if a row that was read may be claimed. Needs the lock."""
        return key not in self._owners and attempt > removed.get(key, 0)

    def _drop_owner(self, key: _Key, attempt: int) -> None:
        """Note that nobody delivers a completion of ``attempt`` or an earlier one any more. Needs the lock."""
        found = self._owners.get(key)
        if found is not None and found[1] <= attempt:
            del self._owners[key]

    # -- life --

    def close(self) -> None:
        """Count one user less. The last one closes the file. In a forked child, whose file it is not, do nothing."""
        if self.pid != os.getpid():
            return
        is_last = False
        try:
            with _registry_changed.lock:
                is_last = self.users == 1
                self.users = max(0, self.users - 1)
                if not is_last:
                    return
                # It stays in the registry: whoever wants the file now waits until its lock has been dropped.
                self.is_open = False
            with self._lock:
                self._is_closed = True
            self.take_lead()
            try:
                self.write_queued()
                self.file.close()
            finally:
                self.lead()
        finally:
            if is_last:
                self.let_go()

    def let_go(self) -> None:
        """Close the file, drop its lock, and let others open it. Only the thread that opens or closes calls this."""
        try:
            self.file.let_go()
        finally:
            with _registry_changed.lock:
                if _registry.get(self.path) is self:
                    del _registry[self.path]
                _registry_changed.wake()

    def __repr__(self) -> str:
        return f"<Outbox {self.path}>"

    # -- group commit --

    def take_lead(self) -> None:
        """Wait for a turn at the database; :meth:`lead` ends it."""
        ticket = Ticket()
        with self._lock:
            if not self._has_leader:
                self._has_leader = True
                return
            self.visitors.append(ticket)
        try:
            ticket.wait()
        except BaseException:
            # Ctrl-C, for example: a turn that is given to nobody would hold up all others.
            with self._lock:
                if ticket in self.visitors:
                    self.visitors.remove(ticket)
                elif not self._pass_on():
                    self._has_leader = False
            raise

    def lead(self, mine: Optional[Ticket] = None) -> None:
        """Write what has queued, then hand the lead on, or end it if nothing is left.

        Only the leader calls this.

        :param mine: the leader's own ticket, which was not written yet.
        """
        while True:
            if mine is None:
                with self._lock:
                    if self._pass_on():
                        return
                    if not self._removals:
                        self._has_leader = False
                        return
            mine = None
            try:
                self.write_queued()
            except BaseException:
                # Whatever ends this thread, the others must not wait for it.
                with self._lock:
                    if not self._pass_on():
                        self._has_leader = False
                raise

    def write_queued(self) -> Optional[str]:
        """Commit what has queued and open the gates of those who wait for it. Only the leader calls this.

        :returns: what was wrong, or None. It has been logged, once until a commit succeeds.
        """
        with self._lock:
            puts, self._puts = self._puts, []
            removals, self._removals, self._unwritten = [*self._unwritten, *self._removals], [], []
        problem: Optional[str] = "the commit did not end"
        try:
            problem = self.file.commit([ticket.row for ticket in puts], removals)
        finally:
            if problem is not None:
                with self._lock:
                    self._unwritten = removals
            for ticket in puts:
                ticket.problem = problem
                ticket.gate.release()
            if problem is not None:
                self.file.warn(problem)
        return problem

    def _pass_on(self) -> bool:
        """Give the lead to a thread that waits for it. Return False if there is none. Needs the lock."""
        if self.visitors:
            heir = self.visitors.pop(0)
        elif self._puts:
            heir = self._puts[0]
        else:
            return False
        heir.leads = True
        heir.gate.release()
        return True


_registry: Dict[str, Outbox] = {}
_registry_changed = Monitor()
_inherited: List[Outbox] = []


def openers_waiting() -> int:
    """Return how many threads wait in :func:`open_outbox` for another one."""
    return _registry_changed.sleepers


def _after_fork() -> None:
    """Let go of the parent's outboxes in a forked child, so that none stays locked by a child that outlives it."""
    global _registry_changed
    _registry_changed = Monitor()
    for outbox in _registry.values():
        outbox.file.let_go_in_child()
    # Kept, and never closed here: SQLite's connection belongs to the parent too.
    _inherited.extend(_registry.values())
    _registry.clear()


fork.call_in_child(_after_fork)


def checked_path(path: Any) -> str:
    """Return where an outbox at ``path`` would be. Open and make nothing.

    :raises ConfigurationError: it cannot be there, or what is there cannot be trusted.
    """
    if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
        raise ConfigurationError(f"must be a path, got {path!r}", "outbox")
    if os.path.isdir(path):
        raise ConfigurationError(f"{os.fspath(path)!r} is a directory; name a file in it", "outbox")
    # Before the links are gone: one that another user made must not choose the file.
    _GUARD.check(os.path.abspath(os.fspath(path)))
    name = os.path.realpath(os.fspath(path))
    directory = os.path.dirname(name)
    if not os.path.isdir(directory):
        raise ConfigurationError(f"the directory {directory!r} does not exist; make it first", "outbox")
    if files.is_mounted_alone(name):
        raise ConfigurationError(
            f"{name!r} is mounted as a single file, and SQLite keeps results in files beside it ({', '.join(BESIDE)}), "
            "which would not be in the mount; mount the directory that it is in",
            "outbox",
        )
    return name


def open_outbox(path: Union[str, os.PathLike[str]]) -> Outbox:
    """Return the outbox at ``path``: the one this process has open, or a new one. Each call wants its own ``close()``.

    Waits up to 30 s for another thread that opens or closes it at this moment.

    :raises ConfigurationError: the directory is missing, the file is another program's or not private to this user, or
        another process uses it.
    """
    name = checked_path(path)
    mine = Outbox(name)
    try:
        outbox = _share(mine)
        if outbox is mine:
            _open(mine)
            with _registry_changed.lock:
                mine.users = 1
                mine.is_open = True
                _registry_changed.wake()
        return outbox
    finally:
        if not mine.is_open and _registry.get(name) is mine:
            mine.let_go()


def _share(mine: Outbox) -> Outbox:
    """Return the open outbox of this path, with one user more; or ``mine``, which others wait for from now on."""
    deadline = Deadline(_TURN_TIMEOUT)
    with _registry_changed.lock:
        while True:
            outbox = _registry.setdefault(mine.path, mine)
            if outbox is mine:
                return mine
            if outbox.is_open:
                outbox.users += 1
                return outbox
            if deadline.is_expired():
                raise ConfigurationError(
                    f"{mine.path!r}: another thread of this process has been opening or closing it for "
                    f"{_TURN_TIMEOUT:g} s",
                    "outbox",
                )
            _registry_changed.wait(deadline.remaining())


def _open(outbox: Outbox) -> None:
    try:
        outbox.file.open()
        return
    except (OSError, sqlite3.Error) as error:
        text = getattr(error, "strerror", None) or str(error)
    raise ConfigurationError(f"cannot open {outbox.path!r}: {text}", "outbox")
