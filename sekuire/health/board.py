"""Keep which workers of this process are shown over HTTP, and the one server that shows them."""

from __future__ import annotations

import logging
import threading
from typing import Dict, Iterable, List, Mapping, NamedTuple, Optional, Protocol, Tuple

from .._internal import fork
from .._internal.logs import get_logger
from .._internal.tally import Tally
from .._internal.threads import Deadline
from ..config import HEALTH_STATUS_VARIABLE, boolean_variable, shown_address
from ..errors import ConfigurationError
from ..wire.models import WorkerHealth
from .meter import Histogram, Meter
from .pages import Pages
from .server import HealthServer

log = get_logger("sekuire.health")

#: Seconds that a new server waits for the end of the one before it.
_PATIENCE = 2.0


class Totals:
    """Hold what has been counted of the tasks of an agent since the server was opened. Later counts can be added."""

    def __init__(self) -> None:
        #: Name → count.
        self.counts: Dict[str, int] = {}
        #: (capability, status, code) → tasks.
        self.finished: Dict[Tuple[str, str, str], int] = {}
        #: Capability → durations.
        self.durations: Dict[str, Histogram] = {}

    def add(self, counts: Mapping[str, int], meter: Optional[Meter]) -> None:
        """Add the counts of one worker. The caller holds the lock that guards ``meter``."""
        for name, count in counts.items():
            self.counts[name] = self.counts.get(name, 0) + count
        if meter is not None:
            self._merge(meter.finished, meter.durations)

    def merge(self, other: Totals) -> None:
        """Add all that another one holds."""
        self.add(other.counts, None)
        self._merge(other.finished, other.durations)

    def _merge(self, finished: Mapping[Tuple[str, str, str], int], durations: Mapping[str, Histogram]) -> None:
        for key, count in finished.items():
            self.finished[key] = self.finished.get(key, 0) + count
        for name, histogram in durations.items():
            self.durations.setdefault(name, Histogram()).add(histogram)


class Watched(Protocol):
    """Describe a worker that is shown."""

    def health(self) -> WorkerHealth:
        """Return how it is now."""

    def add_to(self, totals: Totals) -> None:
        """Add what it has counted since its start."""

    def tallies(self) -> Mapping[str, Tally]:
        """Return what it counts together with other workers of its installation or its policy, by name."""


class Sight(NamedTuple):
    """Hold what the workers of one agent are and have counted, at one moment."""

    agent_id: str
    workers: List[WorkerHealth]
    totals: Totals
    #: Name → label → count.
    shared: Dict[str, Dict[str, int]]


class Board:
    """Keep the workers of this process that one server shows, and what those that have ended had counted."""

    # Threads: any thread may add and remove; `sekuire-health` reads. `_lock` guards the fields. A worker is asked
    # without it.

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._workers: List[Watched] = []
        #: Agent → what its workers had counted that are gone. Without it a total would fall when a worker ends.
        self._ended: Dict[str, Totals] = {}
        #: Agent → what was and is counted together, by name. A tally outlives its workers.
        self._tallies: Dict[str, Dict[str, List[Tally]]] = {}

    def add(self, worker: Watched) -> None:
        """Show a worker."""
        agent_id = worker.health().agent_id
        with self._lock:
            self._workers.append(worker)
            known = self._tallies.setdefault(agent_id, {})
            for name, tally in worker.tallies().items():
                tallies = known.setdefault(name, [])
                if all(one is not tally for one in tallies):
                    tallies.append(tally)

    def remove(self, worker: Watched) -> bool:
        """Show a worker no more. Return True if none is left."""
        totals = Totals()
        worker.add_to(totals)
        agent_id = worker.health().agent_id
        with self._lock:
            if worker in self._workers:
                self._workers.remove(worker)
                self._ended.setdefault(agent_id, Totals()).merge(totals)
            return not self._workers

    def has(self, worker: Watched) -> bool:
        """Return True if the worker is shown."""
        return worker in self._workers

    def health(self) -> List[WorkerHealth]:
        """Return how each worker is."""
        with self._lock:
            workers = list(self._workers)
        return [one.health() for one in workers]

    def look(self) -> List[Sight]:
        """Return what is to be seen of each agent."""
        found: Dict[str, Sight] = {}
        with self._lock:
            workers = list(self._workers)
            for agent_id, tallies in self._tallies.items():
                totals = Totals()
                if agent_id in self._ended:
                    totals.merge(self._ended[agent_id])
                shared = {name: _sum(many) for name, many in tallies.items()}
                found[agent_id] = Sight(agent_id, [], totals, shared)
        for worker in workers:
            health = worker.health()
            sight = found[health.agent_id]
            sight.workers.append(health)
            worker.add_to(sight.totals)
        return [sight for sight in found.values() if sight.workers]


def _sum(tallies: Iterable[Tally]) -> Dict[str, int]:
    counts: Dict[str, int] = {}
    for tally in tallies:
        for name, count in tally.counts().items():
            counts[name] = counts.get(name, 0) + count
    return counts


# -- one of each process ----------------------------------------------------------------------------------------------

# `_lock` guards the three. It is held while a server opens its port, so that two workers that start at once share one.
_lock = threading.Lock()
_board: Optional[Board] = None
_server: Optional[HealthServer] = None
#: The last server, which may still have its port.
_ending: Optional[HealthServer] = None


def show(worker: Watched, address: Tuple[str, int]) -> None:
    """Show a worker over HTTP, with the others of this process. The first one opens the server.

    :raises ConfigurationError: the port is taken, the address is not one of this machine, or this process has its
        server at another address.
    """
    global _board, _server
    shows_status = boolean_variable(HEALTH_STATUS_VARIABLE)
    is_new = False
    with _lock:
        if _server is None or _board is None:
            ending = _ending
            if ending is not None:
                ending.join(Deadline(_PATIENCE))
            board = Board()
            pages = Pages(board, shows_status)
            server = HealthServer(address, pages.respond, pages.refuse)
            server.open()
            pages.is_local = server.is_local
            _board, _server, is_new = board, server, True
        elif address not in (_server.asked_for, _server.address):
            shown = shown_address(_server.address)
            raise ConfigurationError(
                f"differs from that of another worker in this process, whose server is at {shown}; one server shows "
                "all workers of a process, so give them all the same address",
                "health",
            )
        board, server = _board, _server
        if not board.has(worker):
            board.add(worker)
    if is_new:
        log.say(logging.INFO, "health and metrics are at http://%s", shown_address(server.address))


def hide(worker: Watched) -> None:
    """Show a worker no more. The last one closes the server. Return at once."""
    global _board, _server, _ending
    with _lock:
        board, server = _board, _server
        if board is None or server is None or not board.has(worker):
            return
        if board.remove(worker):
            _board, _server, _ending = None, None, server
            server.close()


def join(deadline: Deadline) -> bool:
    """Wait for the end of the server's thread, if the last worker is gone. Return True if it ended in time."""
    ending = _ending
    return ending is None or ending.join(deadline)


def address_of(worker: Watched) -> Optional[Tuple[str, int]]:
    """Return where a worker is shown, or None."""
    with _lock:
        board, server = _board, _server
        return server.address if server is not None and board is not None and board.has(worker) else None


def _after_fork() -> None:
    """Begin without a server in a forked child. The port stays the parent's, whatever becomes of it."""
    global _lock, _board, _server, _ending
    _lock = threading.Lock()
    for server in (_server, _ending):
        if server is not None:
            server.forget()
    _board = _server = _ending = None


fork.call_in_child(_after_fork)
