"""Answer each path: ``/livez``, ``/readyz``, ``/metrics`` and ``/status``."""

from __future__ import annotations

import datetime as dt
import json
import os
from types import ModuleType
from typing import Any, Dict, List, Optional, Protocol

import attrs

from .._internal.scrub import scrub_json
from ..version import __version__
from ..wire.models import WorkerHealth
from .server import Answer, Request

_NO_CLIENT = "metrics need the extra: pip install 'sekuire[metrics]'"
_NOT_HERE = (
    "the status is shown on loopback only; SEKUIRE_WORKER_HTTP_STATUS=1 shows it to everybody who reaches this address"
)


class Shown(Protocol):
    """Know the workers that are shown. A :class:`~sekuire.health.board.Board` does."""

    def health(self) -> List[WorkerHealth]:
        """Return how each worker is."""

    def look(self) -> List[Any]:
        """Return what is to be seen of each agent."""


class Pages:
    """Answer requests by what the workers say of themselves. It runs on ``sekuire-health`` and keeps no state.

    :param shows_status: show ``/status`` also off loopback.
    """

    def __init__(self, board: Shown, shows_status: bool) -> None:
        self._board = board
        self._shows_status = shows_status
        #: The server listens on this machine only. Set once it listens.
        self.is_local = False
        # Now, because its import may take longer than a probe waits.
        self._metrics = _load_metrics()

    def respond(self, request: Request) -> Answer:
        """Return the answer to a request."""
        if request.path == "/livez":
            return self._livez()
        if request.path == "/readyz":
            return self._readyz()
        if request.path == "/metrics":
            if self._metrics is None:
                return self.refuse(501, _NO_CLIENT)
            text, content_type = self._metrics.expose(self._board.look(), request.accept)
            return Answer(200, text, content_type)
        if request.path == "/status":
            return self._status() if self.is_local or self._shows_status else self.refuse(403, _NOT_HERE)
        return self.refuse(404, "there are /livez, /readyz, /metrics and /status")

    def refuse(self, status: int, problem: str) -> Answer:
        """Return an error's answer."""
        return _json(status, {"error": problem})

    def _livez(self) -> Answer:
        workers = self._board.health()
        reasons = [f"a thread of worker {one.worker_id[:8]} has ended" for one in workers if not one.live]
        return _json(503 if reasons else 200, {"live": not reasons, "reasons": reasons})

    def _readyz(self) -> Answer:
        found = verdict_of(self._board.health())
        return _json(200 if found["ready"] else 503, found)

    def _status(self) -> Answer:
        workers = self._board.health()
        found = {
            "live": all(one.live for one in workers),
            **verdict_of(workers),
            "pid": os.getpid(),
            "version": __version__,
            "workers": [attrs.asdict(one) for one in workers],
        }
        return _json(200, found)


def verdict_of(workers: List[WorkerHealth]) -> Dict[str, Any]:
    """Return what ``/readyz`` says of several workers: ready if each of them is."""
    reasons = list(dict.fromkeys(reason for one in workers for reason in one.reasons))
    waiting = sum(one.approvals_waiting for one in workers)
    notes = [f"approvals waiting: {waiting}"] if waiting else []
    return {"ready": all(one.ready for one in workers), "reasons": reasons, "notes": notes}


def _json(status: int, value: Dict[str, Any]) -> Answer:
    # A reason or an error may quote what somebody else has said.
    text = json.dumps(value, ensure_ascii=False, default=_plain) + "\n"
    return Answer(status, scrub_json(text.encode("utf-8", "replace")))


def _plain(value: object) -> str:
    return value.isoformat() if isinstance(value, dt.datetime) else str(value)


def _load_metrics() -> Optional[ModuleType]:
    try:
        from . import metrics
    except ImportError:
        return None
    return metrics
