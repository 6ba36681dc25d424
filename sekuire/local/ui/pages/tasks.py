"""Show the list of tasks, filter it, and cancel or retry those that are ticked."""

from __future__ import annotations

from typing import Any, Dict, List, Mapping, Optional
from urllib.parse import urlencode

import flask

from ....wire.protocol import TASK_STATES
from ..desk import Desk
from ..queries import Wanted
from ..rendering import Region, done, plural, render

__all__ = ["SPANS", "add"]

#: What can be chosen as a time, in seconds.
SPANS = {"5m": 300.0, "1h": 3600.0, "24h": 86400.0, "7d": 7 * 86400.0}
_MOST_TICKED = 1000
_NAMES = ("status", "capability", "agent", "time", "text")


def add(app: flask.Flask, desk: Desk) -> None:
    """Add the routes of the page."""

    def show() -> flask.Response:
        asked = _asked()
        wanted = Wanted(
            status=asked["status"] if asked["status"] in TASK_STATES else None,
            capability=asked["capability"] or None,
            agent_id=asked["agent"] or None,
            text=asked["text"] or None,
            within=SPANS.get(asked["time"]),
        )

        def listed() -> Mapping[str, Any]:
            found = desk.queries.tasks(wanted, flask.request.args.get("before") or None)
            return {
                "found": found,
                "older": _address(asked, before=found.next_before) if found.next_before else None,
                "is_first": "before" not in flask.request.args,
                "newest": _address(asked),
            }

        def tabs() -> Mapping[str, Any]:
            counts = desk.queries.counts()
            return {
                "tabs": [
                    (name, counts[name or "all"], _address({**asked, "status": name}), asked["status"] == name)
                    for name in ("", *TASK_STATES)
                ]
            }

        return render(
            "tasks", "Tasks", {"tabs": Region(["tasks"], tabs), "list": Region(["tasks"], listed)},
            asked=asked, spans=SPANS, is_filtered=any(asked.values()),
            capabilities=desk.queries.capabilities, agents=desk.queries.agents,
            here=_address(asked),
        )  # fmt: skip

    def bulk() -> flask.Response:
        form = flask.request.form
        ids = form.getlist("ids")[:_MOST_TICKED]
        verb = form.get("action", "")
        actions = {"cancel": (desk.cancel, "cancelled"), "retry": (desk.retry, "queued again")}
        if not ids or verb not in actions:
            return done("Tick at least one task first", "/ui/tasks", is_bad=True)
        action, word = actions[verb]
        count, problems = desk.each(action, ids)
        text = f"{plural(count, 'task')} {word}"
        if problems:
            text += f"; {plural(len(ids) - count, 'other was', 'others were')} not: {problems[0]}"
        return done(text, "/ui/tasks", is_bad=bool(problems))

    app.add_url_rule("/ui/tasks", "tasks", show)
    app.add_url_rule("/ui/tasks/bulk", "tasks_bulk", bulk, methods=["POST"])


def _asked() -> Dict[str, str]:
    return {name: flask.request.args.get(name, "").strip()[:200] for name in _NAMES}


def _address(asked: Mapping[str, str], before: Optional[str] = None) -> str:
    pairs: List[Any] = [(name, value) for name, value in asked.items() if value]
    if before is not None:
        pairs.append(("before", before))
    return "/ui/tasks" + (f"?{urlencode(pairs)}" if pairs else "")
