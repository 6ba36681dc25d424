"""Show the last requests of workers and clients, and how many there were by endpoint and status."""

from __future__ import annotations

from typing import Any, Dict, List, Mapping

import flask

from ...record import NO_ANSWER
from ..desk import Desk
from ..rendering import Region, render

__all__ = ["add"]

_SHOWN = 100


def add(app: flask.Flask, desk: Desk) -> None:
    """Add the route of the page."""

    def show() -> flask.Response:
        def totals() -> Mapping[str, Any]:
            counts = desk.record.counts()
            statuses = sorted({status for _, status in counts})
            rows: Dict[str, List[int]] = {}
            for endpoint in sorted({endpoint for endpoint, _ in counts}):
                rows[endpoint] = [counts.get((endpoint, status), 0) for status in statuses]
            return {"statuses": statuses, "rows": rows}

        def last() -> Mapping[str, Any]:
            return {"calls": desk.record.last_requests(_SHOWN)}

        return render(
            "requests", "Requests", {"totals": Region(["requests"], totals), "last": Region(["requests"], last)},
            no_answer=NO_ANSWER,
        )  # fmt: skip

    app.add_url_rule("/ui/requests", "requests", show)
