"""Keep the requests for approval and the decisions about them, and send each decision to the worker that waits.

They are in the database of :mod:`sekuire.local.store`. A trigger there closes the pending requests of a task that ends.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from .._internal.clock import time
from ..wire import protocol
from ..wire.canonical import NotCanonical
from ..wire.protocol import EVENT_APPROVAL, encode_json
from .fields import Question
from .record import Record
from .store import FINAL, Identity, Refusal, Store, hash_of, instant
from .streams import Hub

__all__ = ["Approvals", "Decision"]

#: Longest sleep of a thread that waits for a request (seconds).
_LONG_WAIT = 3600.0
#: How many requests of one task with one digest may have been lost on their way here.
_MOST_LOST = 1000


class Decision(NamedTuple):
    """Hold what somebody has decided. ``credential`` names what proved that they may; ``decided_by`` is a claim."""

    decision: str
    credential: str
    reason: Optional[str] = None
    decided_by: Optional[str] = None


class Approvals:
    """Take requests for approval, and decide them."""

    # Threads: HTTP threads, the watch thread and users' threads call it. The store's transactions guard the rows.
    # `_condition` guards nothing but the sleep of those who wait for a request; it is not held over the store.

    def __init__(self, store: Store, hub: Hub, record: Record) -> None:
        self._store = store
        self._hub = hub
        self._record = record
        self._condition = threading.Condition()
        #: How many requests have come, so that none is missed between a look and a sleep.
        self._count = 0

    def start(self) -> None:
        """Continue from the database. Call it after the hub has started."""
        with self._store.transaction() as db:
            ends = db.execute("SELECT expires_at FROM approvals WHERE status = 'pending'").fetchall()
        for (end,) in ends:
            self._expire_at(end)

    # -- what a worker does -------------------------------------------------------------------------------------------

    def ask(self, identity: Identity, task_id: str, question: Question) -> Tuple[Dict[str, Any], bool]:
        """Record a request, unless it is known. Return its state, and True if it is new.

        :raises Refusal: 403 not this installation's task, 404 no such task, 409 another attempt has the task, the task
            has ended or the id is that of another request, 422 the digest or the id is wrong.
        """
        now = self._store.now()
        details = encode_json(question.details).decode()
        with self._store.transaction() as db:
            agent_id, capability = _check_holder(db, identity, task_id, question.attempt)
            known = db.execute(f"{_SELECT} WHERE approval_id = ?", (question.approval_id,)).fetchone()
            if known is not None:
                approval = _approval(known, now)
                if (approval["task_id"], approval["digest"]) != (task_id, question.digest):
                    raise Refusal(409, "APPROVAL_ID_REUSED", "another request has this approval_id")
            else:
                _check_digest(db, task_id, question)
                end = now + question.timeout
                db.execute(
                    "INSERT INTO approvals (approval_id, task_id, attempt, worker_id, kind, name, details, policy_hash,"
                    " digest, created_at, expires_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (
                        question.approval_id, task_id, question.attempt, question.worker_id, question.kind,
                        question.name, details, question.policy_hash, question.digest, now, end,
                    ),
                )  # fmt: skip
        if known is not None:
            return _answer(approval), False
        self._record.note(
            "approval", approval_id=question.approval_id, task_id=task_id, agent_id=agent_id, capability=capability,
            subject={"kind": question.kind, "name": question.name}, timeout=question.timeout,
        )  # fmt: skip
        self._expire_at(end)
        with self._condition:
            self._count += 1
            self._condition.notify_all()
        return {"approval_id": question.approval_id, "status": "pending", "expires_at": instant(end)}, True

    def state(self, identity: Optional[Identity], task_id: str, approval_id: str) -> Dict[str, Any]:
        """Return the state of a request, for the installation that has made it, or None for the administrator.

        :raises Refusal: 403 the task was never this installation's, 404 no such request.
        """
        with self._store.transaction() as db:
            row = db.execute(f"{_SELECT} WHERE approval_id = ? AND task_id = ?", (approval_id, task_id)).fetchone()
            is_own = (
                identity is None
                or db.execute(
                    "SELECT 1 FROM assignments WHERE task_id = ? AND installation_id = ?",
                    (task_id, identity.installation_id),
                ).fetchone()
            )
        if not is_own:
            raise Refusal(403, "NOT_ASSIGNED", "the task was never assigned to this installation")
        if row is None:
            raise _no_approval(approval_id)
        return _answer(_approval(row, self._store.now()))

    # -- what a person does -------------------------------------------------------------------------------------------

    def decide(self, approval_id: str, decision: Decision, key: Optional[str] = None) -> Dict[str, Any]:
        """Record a decision, send it to the worker, and return the request. A repetition with the same key is one call.

        :raises Refusal: 404 no such request, 409 it is decided, 410 it has expired or its task has ended.
        """
        now = self._store.now()
        digest = None if key is None else hash_of(key)
        with self._store.transaction() as db:
            row = db.execute(f"{_SELECT} WHERE approval_id = ?", (approval_id,)).fetchone()
            if row is None:
                raise _no_approval(approval_id)
            approval = _approval(row, now)
            if digest is not None and row[-1] == digest and approval["status"] == decision.decision:
                return approval
            _check_open(approval)
            db.execute(
                "UPDATE approvals SET status = ?, decided_at = ?, decided_by = ?, credential = ?, reason = ?,"
                " decision_key = ? WHERE approval_id = ?",
                (
                    decision.decision, now, decision.decided_by, decision.credential, decision.reason, digest,
                    approval_id,
                ),
            )  # fmt: skip
            approval = _approval(db.execute(f"{_SELECT} WHERE approval_id = ?", (approval_id,)).fetchone(), now)
            holder = _holder(db, approval["task_id"])
        self._record.note(
            "decision", approval_id=approval_id, task_id=approval["task_id"], subject=approval["subject"],
            decision=decision.decision, decided_by=decision.decided_by, reason=decision.reason,
            credential=decision.credential,
        )  # fmt: skip
        self._send(holder, approval)
        return approval

    def page(
        self, status: Optional[str] = None, limit: int = 50, before: Optional[str] = None
    ) -> Tuple[List[Dict[str, Any]], Optional[str]]:
        """Return requests, newest first, and the ``before`` of the next page (None on the last).

        :raises Refusal: 400 ``before`` is not the id of a request.
        """
        now = self._store.now()
        where, values = ["1"], []  # type: Tuple[List[str], List[Any]]
        if status == "pending":
            where.append("a.status = 'pending' AND a.expires_at > ?")
            values.append(now)
        elif status == "expired":
            where.append("(a.status = 'expired' OR (a.status = 'pending' AND a.expires_at <= ?))")
            values.append(now)
        elif status is not None:
            where.append("a.status = ?")
            values.append(status)
        with self._store.transaction() as db:
            if before is not None:
                row = db.execute("SELECT seq FROM approvals WHERE approval_id = ?", (before,)).fetchone()
                if row is None:
                    raise Refusal(400, "INVALID_REQUEST", "before must be the approval_id of a request")
                where.append("a.seq < ?")
                values.append(row[0])
            rows = db.execute(
                f"{_SELECT} WHERE {' AND '.join(where)} ORDER BY a.seq DESC LIMIT ?", (*values, limit + 1)
            ).fetchall()
        found = [_approval(row, now) for row in rows[:limit]]
        return found, found[-1]["approval_id"] if len(rows) > limit else None

    def wait(self, timeout: Optional[float], task_id: Optional[str] = None) -> Dict[str, Any]:
        """Wait for a pending request, of this task if one is named, and return the oldest.

        :raises TimeoutError: there is none after ``timeout`` seconds.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        where, values = ("", ()) if task_id is None else (" AND a.task_id = ?", (task_id,))
        while True:
            with self._condition:
                seen = self._count
            now = self._store.now()
            with self._store.transaction() as db:
                row = db.execute(
                    f"{_SELECT} WHERE a.status = 'pending' AND a.expires_at > ?{where} ORDER BY a.seq LIMIT 1",
                    (now, *values),
                ).fetchone()
            if row is not None:
                return _approval(row, now)
            left = _LONG_WAIT if deadline is None else deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"nothing asked for an approval in {timeout} s")
            with self._condition:
                if self._count == seen:
                    self._condition.wait(min(left, _LONG_WAIT))

    # -- time ---------------------------------------------------------------------------------------------------------

    def _expire_at(self, end: float) -> None:
        # A little late rather than early, because the wall clock is compared.
        self._hub.call_later(max(0.0, end - self._store.now()) + 0.01, self._expire)

    def _expire(self) -> None:
        """Close the requests that nobody has answered in time."""
        now = self._store.now()
        with self._store.transaction() as db:
            rows = db.execute(f"{_SELECT} WHERE a.status = 'pending' AND a.expires_at <= ?", (now,)).fetchall()
            db.execute(
                "UPDATE approvals SET status = 'expired', decided_at = expires_at"
                " WHERE status = 'pending' AND expires_at <= ?",
                (now,),
            )
            expired = [_approval(row, now) for row in rows]
            holders = [_holder(db, approval["task_id"]) for approval in expired]
        for approval, holder in zip(expired, holders):
            self._record.note(
                "decision", approval_id=approval["approval_id"], task_id=approval["task_id"],
                subject=approval["subject"], decision="expired", decided_by=None, reason=None, credential=None,
            )  # fmt: skip
            self._send(holder, approval)

    def _send(self, holder: Optional[Tuple[str, str]], approval: Mapping[str, Any]) -> None:
        if holder is None:
            return
        data = {"task_id": approval["task_id"], **_answer(approval)}
        self._hub.notify(holder, EVENT_APPROVAL, encode_json(data).decode())


# -- checks -----------------------------------------------------------------------------------------------------------


def _check_holder(db: sqlite3.Connection, identity: Identity, task_id: str, attempt: int) -> Tuple[str, str]:
    """Check that an attempt has the task and is this installation's. Return the task's agent and capability."""
    task = db.execute(
        "SELECT status, attempt, agent_id, capability FROM tasks WHERE task_id = ?", (task_id,)
    ).fetchone()
    if task is None:
        raise Refusal(404, "TASK_NOT_FOUND", f"there is no task {task_id!r}")
    given = dict(
        db.execute(
            "SELECT attempt, reported FROM assignments WHERE task_id = ? AND installation_id = ?",
            (task_id, identity.installation_id),
        ).fetchall()
    )
    if not given:
        raise Refusal(403, "NOT_ASSIGNED", "the task was never assigned to this installation")
    status, current, agent_id, capability = task
    if status in FINAL or given.get(attempt):
        raise Refusal(409, "ALREADY_COMPLETED", "the task has its result already")
    if attempt not in given:
        raise Refusal(400, "INVALID_REQUEST", f"attempt {attempt} of this task never began here")
    if attempt != current:
        raise Refusal(409, "SUPERSEDED", f"attempt {current} has the task now")
    return agent_id, capability


def _check_digest(db: sqlite3.Connection, task_id: str, question: Question) -> None:
    """Check that a new request has the digest and the id that follow from what it asks."""
    problem = ""
    try:
        digest = protocol.approval_digest(task_id, question.kind, question.name, question.details, question.policy_hash)
    except NotCanonical as error:
        problem = f"details has no canonical JSON form (RFC 8785): {error}"
    except ValueError as error:
        problem = f"details is too long: {error}"
    if problem:
        raise Refusal(422, "INVALID_DETAILS", problem)
    if digest != question.digest:
        raise Refusal(422, "WRONG_DIGEST", "digest is not that of task_id, subject, details and policy_hash")
    known = db.execute("SELECT count(*) FROM approvals WHERE task_id = ? AND digest = ?", (task_id, digest)).fetchone()[
        0
    ]
    numbers = range(1, known + _MOST_LOST)
    if not any(protocol.approval_id(task_id, digest, n) == question.approval_id for n in numbers):
        raise Refusal(422, "WRONG_APPROVAL_ID", "approval_id is not the hash of task_id, digest and a number from 1")


def _check_open(approval: Mapping[str, Any]) -> None:
    if approval["status"] == "expired":
        why = approval["reason"] or f"it expired at {approval['expires_at']}"
        raise Refusal(410, "APPROVAL_EXPIRED", f"nobody can decide this request any more: {why}")
    if approval["status"] != "pending":
        claim = f" by {approval['decided_by']}" if approval["decided_by"] else ""
        raise Refusal(409, "ALREADY_DECIDED", f"the request was {approval['status']}{claim} already")


def _no_approval(approval_id: str) -> Refusal:
    return Refusal(404, "APPROVAL_NOT_FOUND", f"there is no request for approval {approval_id!r}")


# -- rows -------------------------------------------------------------------------------------------------------------

_SELECT = (
    "SELECT a.approval_id, a.task_id, a.attempt, a.worker_id, a.kind, a.name, a.details, a.policy_hash, a.digest,"
    " a.status, a.created_at, a.expires_at, a.decided_at, a.decided_by, a.credential, a.reason,"
    " t.agent_id, t.capability, json_extract(t.data, '$.workspace_id'), a.decision_key"
    " FROM approvals a JOIN tasks t USING (task_id)"
)


def _approval(row: Sequence[Any], now: float) -> Dict[str, Any]:
    """Return a request as JSON. Its time may have passed since the row was written."""
    has_passed = row[9] == "pending" and row[11] <= now
    decided_at = row[11] if has_passed else row[12]
    return {
        "approval_id": row[0],
        "task_id": row[1],
        "agent_id": row[16],
        "capability": row[17],
        "workspace_id": row[18],
        "attempt": row[2],
        "worker_id": row[3],
        "subject": {"kind": row[4], "name": row[5]},
        "details": json.loads(row[6]),
        "policy_hash": row[7],
        "digest": row[8],
        "status": "expired" if has_passed else row[9],
        "created_at": instant(row[10]),
        "expires_at": instant(row[11]),
        "decided_at": None if decided_at is None else instant(decided_at),
        "decided_by": row[13],
        "credential": row[14],
        "reason": row[15],
    }


def _answer(approval: Mapping[str, Any]) -> Dict[str, Any]:
    """Return what a worker learns of a request."""
    names = ("approval_id", "status", "expires_at", "decided_by", "reason", "digest")
    return {name: approval[name] for name in names if approval[name] is not None}


def _holder(db: sqlite3.Connection, task_id: str) -> Optional[Tuple[str, str]]:
    """Return the installation and the worker that have the task now."""
    row: Optional[Tuple[str, str]] = db.execute(
        "SELECT installation_id, worker_id FROM tasks WHERE task_id = ? AND status = 'assigned'", (task_id,)
    ).fetchone()
    return row
