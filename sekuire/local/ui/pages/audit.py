"""Show the audit events as they come, and export them."""

from __future__ import annotations

from typing import Any, Iterator, Mapping, Optional
from urllib.parse import urlencode

import flask

from ....wire.protocol import EVENT_TYPES, SEVERITIES, encode_json
from ..desk import Desk
from ..rendering import Region, render

__all__ = ["add"]

_SHOWN = 100
#: Events that are read at once for the export.
_PIECE = 500


def add(app: flask.Flask, desk: Desk) -> None:
    """Add the routes of the page."""

    def show() -> flask.Response:
        event_type, severity = _asked("type", EVENT_TYPES), _asked("severity", SEVERITIES)
        text = flask.request.args.get("before", "")
        before = int(text[:18]) if text.isascii() and text.isdigit() else 0
        asked = {key: value for key, value in (("type", event_type), ("severity", severity)) if value}

        def listed() -> Mapping[str, Any]:
            found = desk.queries.events(event_type, severity, _SHOWN + 1, before)
            older = found[_SHOWN - 1][0] if len(found) > _SHOWN else None
            return {"events": found[:_SHOWN], "older": older and f"/ui/audit?{urlencode({**asked, 'before': older})}"}

        return render(
            "audit", "Audit", {"list": Region(["audit"] if not before else [], listed)},
            types=EVENT_TYPES, severities=SEVERITIES, event_type=event_type, severity=severity, is_first=not before,
            newest=f"/ui/audit?{urlencode(asked)}", export=f"/ui/audit.jsonl?{urlencode(asked)}",
        )  # fmt: skip

    def export() -> flask.Response:
        event_type, severity = _asked("type", EVENT_TYPES), _asked("severity", SEVERITIES)

        def lines() -> Iterator[bytes]:
            after = 0
            while True:
                found = desk.store.logs(event_type, severity, _PIECE, after)
                if not found:
                    return
                yield b"".join(encode_json(event) + b"\n" for _, event in found)
                after = found[-1][0]

        response = flask.Response(lines(), mimetype="application/jsonl")
        response.headers["Content-Disposition"] = 'attachment; filename="audit.jsonl"'
        return response

    app.add_url_rule("/ui/audit", "audit", show)
    app.add_url_rule("/ui/audit.jsonl", "audit_export", export)


def _asked(name: str, known: Any) -> Optional[str]:
    value = flask.request.args.get(name)
    return value if value in known else None
