"""Show what happens now: the figures, the last minutes as charts, what needs a look, and how to begin."""

from __future__ import annotations

import json
from typing import Any, Dict, List, Mapping, NamedTuple, Optional

import flask

from ...store import instant
from ..desk import Desk
from ..queries import Wanted
from ..rendering import Region, plural, render

__all__ = ["Alert", "add", "alerts"]

#: Seconds for which what happened once is worth a look.
_RECENT = 900.0
_MOST = 12


class Alert(NamedTuple):
    """Say what needs a look, in words, and where to look."""

    #: ``bad`` or ``warn``.
    kind: str
    text: str
    #: What to do, or more detail.
    hint: str
    link: str
    at: Optional[str] = None


def add(app: flask.Flask, desk: Desk) -> None:
    """Add the route of the page."""

    def show() -> flask.Response:
        def figures() -> Mapping[str, Any]:
            summary = desk.figures.summary()
            return {"now": summary, "series": json.dumps(summary.series, separators=(",", ":"))}

        def recent() -> Mapping[str, Any]:
            return {"rows": desk.queries.tasks(Wanted(), limit=10).rows}

        def workers() -> Mapping[str, Any]:
            installations = desk.installations()
            return {"streams": streams_of(desk, installations), "has_installations": bool(installations)}

        return render(
            "overview", "Overview",
            {
                "alerts": Region(["tasks", "workers", "policy", "faults", "approvals"], lambda: _alerts(desk), every=5),
                "figures": Region(["tasks", "workers"], figures, every=5),
                "recent": Region(["tasks"], recent),
                "workers": Region(["workers", "tasks"], workers),
            },
            agent_id=desk.store.latest_agent() or "my-agent", url=desk.url,
        )  # fmt: skip

    app.add_url_rule("/ui/", "overview", show)


def streams_of(desk: Desk, installations: List[Dict[str, Any]]) -> List[Dict[str, Any]]:
    """Return the connected workers, each with its installation."""
    known = {one["installation_id"]: one for one in installations}
    return [
        {**stream, "installation": known[stream["installation_id"]]}
        for stream in desk.hub.snapshot()
        if stream["installation_id"] in known
    ]


def _alerts(desk: Desk) -> Mapping[str, Any]:
    installations = desk.installations()
    return {
        "alerts": alerts(desk, installations)[:_MOST],
        "is_new": not installations,
    }


def alerts(desk: Desk, installations: List[Dict[str, Any]]) -> List[Alert]:
    """Return what needs a look, the most urgent first."""
    found = _unserved(desk, installations) + _installations(desk, installations)
    waiting = desk.approvals.page("pending", 10)[0]
    if waiting:
        names = ", ".join(dict.fromkeys(one["subject"]["name"] for one in waiting))
        text = f"{plural(len(waiting), 'approval waits', 'approvals wait')} for you"
        found.append(Alert("warn", text, names[:160], "/ui/approvals"))
    found += _failures(desk)
    if desk.faults.standing:
        text = f"{plural(len(desk.faults.standing), 'fault is', 'faults are')} being injected"
        hint = "; ".join(map(str, desk.faults.standing))
        found.append(Alert("warn", text, hint[:160], "/ui/faults"))
    return sorted(found, key=lambda alert: alert.kind != "bad")


def _unserved(desk: Desk, installations: List[Dict[str, Any]]) -> List[Alert]:
    agent_of = {one["installation_id"]: one["agent_id"] for one in installations}
    state_of = {one["installation_id"]: one["desired_state"] for one in installations}
    streams = desk.hub.snapshot()
    found = []
    for agent_id, capability, count in desk.queries.waiting():
        able = [
            stream
            for stream in streams
            if agent_of.get(stream["installation_id"]) == agent_id
            and (stream["capabilities"] is None or capability in stream["capabilities"])
        ]
        link = f"/ui/tasks?status=queued&capability={flask.current_app.jinja_env.filters['urlencode'](capability)}"
        waits = f"{plural(count, 'task waits', 'tasks wait')} for agent {agent_id}"
        if not able:
            has_other = any(agent_of.get(stream["installation_id"]) == agent_id for stream in streams)
            hint = "its workers have other handlers" if has_other else "no worker of this agent is connected"
            found.append(Alert("bad", f"No worker accepts “{capability}”", f"{waits}: {hint}", link))
        elif all(state_of.get(stream["installation_id"]) == "paused" for stream in able):
            text = f"Every worker that accepts “{capability}” is paused"
            found.append(Alert("warn", text, f"{waits}: resume one", "/ui/workers"))
    return found


def _installations(desk: Desk, installations: List[Dict[str, Any]]) -> List[Alert]:
    now = desk.store.now()
    found = []
    for one in installations:
        name = f"{one['agent_id']} ({one['installation_id'][-8:]})"
        link = f"/ui/workers#{one['installation_id']}"
        is_recent = one["lease_expires_at"] > instant(now - _RECENT)
        is_over = one["lease_expires_at"] <= instant(now)
        if is_over and is_recent and not one["revoked"] and one["status"] not in ("stopped", "stopping"):
            hint = "no heartbeat came in time: the worker was killed, or cannot reach the platform"
            found.append(Alert("bad", f"Lease lost: {name}", hint, link, one["lease_expires_at"]))
        elif one["revoked"] and is_recent:
            found.append(Alert("warn", f"Revoked: {name}", one["reason"] or "no reason given", link))
        elif one["desired_state"] == "terminated" and is_recent:
            hint = "it stays so until it is resumed, also after a restart"
            found.append(Alert("warn", f"Terminated: {name}", hint, link))
    return found


def _failures(desk: Desk) -> List[Alert]:
    after = instant(desk.store.now() - _RECENT)
    rules: Dict[str, List[Any]] = {}
    for _, event in desk.queries.events("policy_violation", None, 50):
        if event["event_timestamp"] < after:
            continue
        data = event["event_data"]
        key = f"{data.get('rule') or 'policy'}: {data.get('target') or data.get('kind') or ''}".strip(": ")
        seen = rules.setdefault(key, [0, str(data.get("reason") or ""), event["event_timestamp"]])
        seen[0] += 1
    found = [
        Alert("warn", f"Policy refused {key}", (f"{count} times; " if count > 1 else "") + reason, "/ui/policy", at)
        for key, (count, reason, at) in list(rules.items())[:4]
    ]
    codes = desk.queries.failures(desk.store.now() - 300.0)
    for code, count in [pair for pair in codes if not rules or pair[0] != "policy_denied"][:3]:
        text = f"{plural(count, 'task')} failed with {code}"
        found.append(Alert("warn", text, "in the last 5 minutes", f"/ui/tasks?status=failed&time=5m&text={code}"))
    return found
