"""Show what waits for a person's approval, and decide it."""

from __future__ import annotations

from typing import Any, Mapping

import flask

from ....wire.protocol import DECISIONS
from ...store import Refusal
from ..desk import Desk
from ..rendering import Region, done, render

__all__ = ["add"]

_SHOWN = 50


def add(app: flask.Flask, desk: Desk) -> None:
    """Add the routes of the page."""

    def show() -> flask.Response:
        def waiting() -> Mapping[str, Any]:
            return {"approvals": list(reversed(desk.approvals.page("pending", _SHOWN)[0]))}

        def decided() -> Mapping[str, Any]:
            found = desk.approvals.page(None, _SHOWN)[0]
            return {"approvals": [one for one in found if one["status"] != "pending"]}

        return render(
            "approvals", "Approvals",
            {"waiting": Region(["approvals"], waiting, every=5), "decided": Region(["approvals"], decided)},
        )  # fmt: skip

    def decide(approval_id: str) -> flask.Response:
        decision = flask.request.form.get("decision", "")
        if decision not in DECISIONS:
            raise Refusal(400, "INVALID_REQUEST", f"the decision must be one of {', '.join(DECISIONS)}")
        desk.decide(approval_id, decision, flask.request.form.get("reason", "").strip() or None)
        return done(decision.capitalize(), "/ui/approvals")

    app.add_url_rule("/ui/approvals", "approvals", show)
    app.add_url_rule("/ui/approvals/<approval_id>", "approvals_decide", decide, methods=["POST"])
