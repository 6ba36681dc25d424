"""Read what the pages show from the store, by indexes, and never for long: a query holds up every request.

A search that no index answers reads the tasks in pieces, newest first, and stops after a time; the page says how far it
has come.
"""

from __future__ import annotations

import json
import re
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

from ..._internal.clock import time
from ...wire.protocol import TASK_STATES
from ..store import Refusal, Store

__all__ = ["PAGE", "Found", "Queries", "Row", "Wanted"]

#: Tasks on a page.
PAGE = 50
#: Seconds that one search may take, and what one piece of it should.
_BUDGET = 0.12
_PIECE_SECONDS = 0.015
_SMALLEST_PIECE = 500
_LARGEST_PIECE = 50_000
#: What finds the tasks of one state fastest. Most tasks are completed, so that these are found without an index.
_HINTS = {
    "queued": " INDEXED BY tasks_queued",
    "assigned": " INDEXED BY tasks_assigned",
    "failed": " INDEXED BY tasks_failed",
    "completed": " NOT INDEXED",
}
_FINAL = "status IN ('completed', 'failed')"
_ASSIGNED = re.compile(r'"state":"assigned","at":"([^"]+)"')

_COLUMNS = (
    "seq, task_id, capability, agent_id, status, attempt, max_attempts, created_at, updated_at, available_at, progress,"
    " CASE status WHEN 'failed' THEN json_extract(result, '$.error.code') END, substr(timeline, -1500),"
    " cancel IS NOT NULL"
)


class Wanted(NamedTuple):
    """Say which tasks are wanted. None: any."""

    status: Optional[str] = None
    capability: Optional[str] = None
    agent_id: Optional[str] = None
    text: Optional[str] = None
    #: Seconds before now.
    within: Optional[float] = None


class Row(NamedTuple):
    """Hold one line of the list of tasks. Times are Unix times."""

    task_id: str
    capability: str
    agent_id: str
    status: str
    attempt: int
    max_attempts: int
    created_at: float
    ended_at: Optional[float]
    #: When it may begin, if that is in the future.
    due_at: Optional[float]
    #: When its present or last attempt was assigned, in the form of the wire.
    assigned_at: Optional[str]
    progress: Optional[float]
    message: Optional[str]
    error_code: Optional[str]
    is_cancelled: bool


class Found(NamedTuple):
    """Hold a page of tasks."""

    rows: List[Row]
    #: The last task of this page, if there may be older ones.
    next_before: Optional[str]
    #: Since when the tasks were searched, if the search has stopped for lack of time.
    searched_to: Optional[float] = None


class Queries:
    """Answer the pages' questions."""

    # Threads: any. It has no state.

    def __init__(self, store: Store) -> None:
        self._store = store

    def tasks(self, wanted: Wanted, before: Optional[str] = None, limit: int = PAGE) -> Found:
        """Return a page of tasks, newest first.

        :raises Refusal: 400 ``before`` is not a task's id.
        """
        below = self._seq_of(before)
        lowest = 0 if wanted.within is None else self._first_after(self._store.now() - wanted.within)
        where, values = _conditions(wanted)
        if wanted.text is not None:
            known = self._store.read("SELECT seq FROM tasks WHERE task_id = ?", (wanted.text,))
            if known:
                return self._page([known[0][0]], limit, None)
        if wanted.text is None and len(where) <= 1:
            seqs = self._seqs(where, values, lowest, below, limit + 1, _HINTS.get(wanted.status or "", ""))
            return self._page(seqs, limit, None)
        return self._search(where, values, lowest, below, limit)

    def counts(self) -> Dict[str, int]:
        """Return how many tasks there are in each state, and under ``all``."""
        read = self._store.read
        counts = {
            status: read(f"SELECT count(*) FROM tasks WHERE status = '{status}'")[0][0]
            for status in ("queued", "assigned", "failed")
        }
        whole = read("SELECT count(*) FROM tasks")[0][0]
        return {"all": whole, **counts, "completed": whole - sum(counts.values())}

    def depth(self) -> Tuple[int, int]:
        """Return how many tasks are queued and assigned."""
        read = self._store.read
        return (
            read("SELECT count(*) FROM tasks WHERE status = 'queued'")[0][0],
            read("SELECT count(*) FROM tasks WHERE status = 'assigned'")[0][0],
        )

    def waiting(self) -> List[Tuple[str, str, int]]:
        """Return how many tasks are queued for each agent and capability."""
        rows = self._store.read(
            "SELECT agent_id, capability, count(*) FROM tasks WHERE status = 'queued' GROUP BY agent_id, capability"
        )
        return [(row[0], row[1], row[2]) for row in rows]

    def capabilities(self) -> List[str]:
        """Return the capabilities of all tasks, at most 500, by name."""
        return self._distinct("capability", "tasks_by_capability")

    def agents(self) -> List[str]:
        """Return the agents of all tasks, at most 500, by name."""
        return self._distinct("agent_id", "tasks_by_agent")

    def ended(self, after: float, until: float, limit: int) -> List[Tuple[float, str, Optional[str]]]:
        """Return the tasks that ended in a span of time, newest first: when, state, last assignment."""
        rows = self._store.read(
            f"SELECT updated_at, status, substr(timeline, -600) FROM tasks WHERE {_FINAL} AND updated_at > ?"
            " AND updated_at <= ? ORDER BY updated_at DESC LIMIT ?",
            (after, until, limit),
        )
        return [(row[0], row[1], _last_assigned(row[2])) for row in rows]

    def failures(self, after: float, limit: int = 500) -> List[Tuple[str, int]]:
        """Return the codes of the failures since a time with their number, the most frequent first."""
        counts: Dict[str, int] = {}
        for (code,) in self._store.read(
            "SELECT json_extract(result, '$.error.code') FROM tasks WHERE status = 'failed' AND updated_at > ?"
            f" AND {_FINAL} ORDER BY updated_at DESC LIMIT ?",
            (after, limit),
        ):
            counts[code or "unknown"] = counts.get(code or "unknown", 0) + 1
        return sorted(counts.items(), key=lambda pair: -pair[1])

    def events_of(self, task_id: str, limit: int = 200) -> List[Dict[str, Any]]:
        """Return the newest audit events that name a task, oldest first."""
        rows = self._store.read(
            "SELECT data FROM logs WHERE json_extract(data, '$.event_data.task_id') = ? ORDER BY seq DESC LIMIT ?",
            (task_id, limit),
        )
        return [json.loads(row[0]) for row in reversed(rows)]

    def approvals_of(self, task_id: str) -> List[Dict[str, Any]]:
        """Return a task's requests for approval, oldest first."""
        names = ("approval_id", "kind", "name", "status", "attempt", "created_at", "expires_at", "decided_at", "reason")
        rows = self._store.read(
            f"SELECT {', '.join(names)}, coalesce(decided_by, credential) FROM approvals WHERE task_id = ?"
            " ORDER BY seq LIMIT 100",
            (task_id,),
        )
        return [dict(zip((*names, "by"), row)) for row in rows]

    def events(
        self, event_type: Optional[str], severity: Optional[str], limit: int, before: int = 0, after: int = 0
    ) -> List[Tuple[int, Dict[str, Any]]]:
        """Return the newest audit events with their numbers, newest first."""
        where, values = ["1"], []  # type: List[str], List[Any]
        for column, value in (("event_type", event_type), ("severity", severity)):
            if value is not None:
                where.append(f"{column} = ?")
                values.append(value)
        if before:
            where.append("seq < ?")
            values.append(before)
        if after:
            where.append("seq > ?")
            values.append(after)
        rows = self._store.read(
            f"SELECT seq, data FROM logs WHERE {' AND '.join(where)} ORDER BY seq DESC LIMIT ?", (*values, limit)
        )
        return [(row[0], json.loads(row[1])) for row in rows]

    def recent_inputs(self, agent_id: Optional[str], capability: str, limit: int = 5) -> List[Tuple[str, Any]]:
        """Return the newest different inputs of a capability, each with its task."""
        found: Dict[str, Tuple[str, Any]] = {}
        rows = self._store.read(
            "SELECT task_id, agent_id, data FROM tasks INDEXED BY tasks_by_capability WHERE capability = ?"
            " AND length(data) < 20000 ORDER BY seq DESC LIMIT 50",
            (capability,),
        )
        for task_id, agent, data in rows:
            if agent_id is not None and agent != agent_id:
                continue
            value = json.loads(data)["input"]
            found.setdefault(json.dumps(value, sort_keys=True), (task_id, value))
            if len(found) == limit:
                break
        return list(found.values())

    # -- inside --------------------------------------------------------------------------------------------------------

    def _distinct(self, column: str, index: str) -> List[str]:
        # A step from one name to the next by the index, instead of a look at every task.
        rows = self._store.read(
            f"WITH RECURSIVE names(name) AS (SELECT min({column}) FROM tasks INDEXED BY {index} UNION ALL"
            f" SELECT (SELECT min({column}) FROM tasks INDEXED BY {index} WHERE {column} > name) FROM names"
            " WHERE name IS NOT NULL) SELECT name FROM names WHERE name IS NOT NULL LIMIT 500"
        )
        return [row[0] for row in rows]

    def _seq_of(self, task_id: Optional[str]) -> Optional[int]:
        if task_id is None:
            return None
        rows = self._store.read("SELECT seq FROM tasks WHERE task_id = ?", (task_id,))
        if not rows:
            raise Refusal(400, "INVALID_REQUEST", "before must be the task_id of a task")
        return int(rows[0][0])

    def _first_after(self, when: float) -> int:
        """Return the number of the first task that was created at a time or later. They are in that order."""
        ends = self._store.read("SELECT min(seq), max(seq) FROM tasks")[0]
        if ends[0] is None:
            return 0
        low, high = int(ends[0]), int(ends[1]) + 1
        while low < high:
            middle = (low + high) // 2
            rows = self._store.read("SELECT seq, created_at FROM tasks WHERE seq >= ? ORDER BY seq LIMIT 1", (middle,))
            if not rows or rows[0][1] >= when:
                high = middle
            else:
                low = int(rows[0][0]) + 1
        return low

    def _seqs(
        self,
        where: Sequence[str],
        values: Sequence[Any],
        lowest: int,
        below: Optional[int],
        limit: int,
        hint: str = "",
    ) -> List[int]:
        conditions = [*where, "seq >= ?"]
        given = [*values, lowest]
        if below is not None:
            conditions.append("seq < ?")
            given.append(below)
        rows = self._store.read(
            f"SELECT seq FROM tasks{hint} WHERE {' AND '.join(conditions)} ORDER BY seq DESC LIMIT ?", (*given, limit)
        )
        return [row[0] for row in rows]

    def _search(
        self, where: Sequence[str], values: Sequence[Any], lowest: int, below: Optional[int], limit: int
    ) -> Found:
        """Read the tasks in pieces until a page is full, none is left, or the time has passed."""
        end = time.monotonic() + _BUDGET
        top = self._store.read("SELECT coalesce(max(seq), 0) + 1 FROM tasks")[0][0] if below is None else below
        piece = _SMALLEST_PIECE
        seqs: List[int] = []
        while top > lowest and len(seqs) <= limit:
            began = time.monotonic()
            if began >= end:
                break
            bottom = max(lowest, top - piece)
            seqs += self._seqs(where, values, bottom, top, limit + 1 - len(seqs))
            top = bottom
            if time.monotonic() - began < _PIECE_SECONDS:
                piece = min(piece * 2, _LARGEST_PIECE)
            else:
                piece = max(piece // 2, _SMALLEST_PIECE)
        is_stopped = top > lowest and len(seqs) <= limit
        return self._page(seqs, limit, top if is_stopped else None)

    def _page(self, seqs: Sequence[int], limit: int, stopped_at: Optional[int]) -> Found:
        shown = seqs[:limit]
        rows = {
            row[0]: _row(row, self._store.now())
            for row in self._store.read(
                f"SELECT {_COLUMNS} FROM tasks WHERE seq IN ({','.join('?' * len(shown))})", tuple(shown)
            )
        }
        found = [rows[seq] for seq in shown if seq in rows]
        if stopped_at is not None:
            edge = self._store.read(
                "SELECT task_id, created_at FROM tasks WHERE seq >= ? ORDER BY seq LIMIT 1", (stopped_at,)
            )
            return Found(found, edge[0][0] if edge else None, edge[0][1] if edge else None)
        return Found(found, found[-1].task_id if len(seqs) > limit and found else None)


def _conditions(wanted: Wanted) -> Tuple[List[str], List[Any]]:
    where: List[str] = []
    values: List[Any] = []
    if wanted.status in TASK_STATES:
        # In the text and not as a value, so that the indexes of one state serve it.
        where.append(f"status = '{wanted.status}'")
    for column, value in (("capability", wanted.capability), ("agent_id", wanted.agent_id)):
        if value is not None:
            where.append(f"{column} = ?")
            values.append(value)
    if wanted.text is not None:
        pattern = "%" + wanted.text.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_") + "%"
        where.append("(data LIKE ? ESCAPE '\\' OR agent_id LIKE ? ESCAPE '\\' OR result LIKE ? ESCAPE '\\')")
        values += [pattern] * 3
    return where, values


def _last_assigned(timeline: str) -> Optional[str]:
    found = _ASSIGNED.findall(timeline)
    return found[-1] if found else None


def _row(row: Sequence[Any], now: float) -> Row:
    progress = json.loads(row[10]) if row[10] else {}
    status = row[4]
    is_final = status in ("completed", "failed")
    return Row(
        task_id=row[1],
        capability=row[2],
        agent_id=row[3],
        status=status,
        attempt=row[5],
        max_attempts=row[6],
        created_at=row[7],
        ended_at=row[8] if is_final else None,
        due_at=row[9] if status == "queued" and row[9] > now else None,
        assigned_at=_last_assigned(row[12]),
        progress=progress.get("progress") if status == "assigned" else None,
        message=progress.get("message") if status == "assigned" else None,
        error_code=row[11],
        is_cancelled=bool(row[13]) and not is_final,
    )
