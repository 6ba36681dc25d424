"""Show one task: its facts, its timeline drawn to scale, what it got and what became of it."""

from __future__ import annotations

import json
import shlex
from typing import Any, Dict, List, Mapping, NamedTuple, Optional

import flask

from ....wire.protocol import parse_time
from ..desk import Desk
from ..rendering import Region, done, render

__all__ = ["add"]

#: The width of the drawn timeline, in its own units, and the smallest width of a part.
_WIDTH = 1000.0
_NARROWEST = 3.0


class Part(NamedTuple):
    """Describe one part of the timeline: a wait or an attempt."""

    kind: str
    label: str
    begin: float
    end: float
    x: float
    width: float
    is_open: bool


def add(app: flask.Flask, desk: Desk) -> None:
    """Add the routes of the page."""

    def show(task_id: str) -> flask.Response:
        task = desk.store.task(task_id)

        def facts() -> Mapping[str, Any]:
            now = desk.store.now()
            return {
                "task": task,
                "timeline": task["timeline"],
                "parts": _parts(task, now),
                "total": _total(task, now),
                "problems": _problems(task),
            }

        def approvals() -> Mapping[str, Any]:
            return {"approvals": desk.queries.approvals_of(task_id)}

        def events() -> Mapping[str, Any]:
            return {"events": desk.queries.events_of(task_id)}

        return render(
            "task", f"Task {task_id[-12:]}",
            {
                "facts": Region(["tasks"], facts, every=0 if task["completed_at"] else 2),
                "approvals": Region(["approvals"], approvals),
                "events": Region(["audit"], events),
            },
            task=task, commands=_commands(task, desk.url),
        )  # fmt: skip

    def cancel(task_id: str) -> flask.Response:
        desk.cancel(task_id, flask.request.form.get("reason") or None)
        return done("Cancel requested", f"/ui/tasks/{task_id}")

    def retry(task_id: str) -> flask.Response:
        desk.retry(task_id)
        return done("Queued again", f"/ui/tasks/{task_id}")

    app.add_url_rule("/ui/tasks/<task_id>", "task", show)
    app.add_url_rule("/ui/tasks/<task_id>/cancel", "task_cancel", cancel, methods=["POST"])
    app.add_url_rule("/ui/tasks/<task_id>/retry", "task_retry", retry, methods=["POST"])


def _seconds(text: Optional[str], default: float) -> float:
    at = parse_time(text) if text else None
    return default if at is None else at.timestamp()


def _total(task: Mapping[str, Any], now: float) -> float:
    begin = _seconds(task["created_at"], now)
    return max(0.0, _seconds(task["completed_at"], now) - begin)


def _parts(task: Mapping[str, Any], now: float) -> List[Part]:
    """Return the parts of a task's life, with their places on a line that is drawn to scale."""
    entries: List[Dict[str, Any]] = task["timeline"]
    if not entries:
        return []
    begin = _seconds(entries[0]["at"], now)
    end = max(_seconds(task["completed_at"], now), begin + 0.001)
    scale = _WIDTH / (end - begin)
    parts: List[Part] = []
    for index, entry in enumerate(entries):
        if entry["state"] not in ("queued", "assigned"):
            continue
        # A cancel that was accepted does not end an attempt.
        after = [one for one in entries[index + 1 :] if one["state"] != "cancelling"]
        starts = _seconds(entry["at"], begin)
        stops = _seconds(after[0]["at"], end) if after else end
        kind, label = "wait", "queued" if not parts else "queued again"
        if entry["state"] == "assigned":
            ending = after[0]["state"] if after else ""
            kind = {"failed": "bad", "queued": "lost", "completed": "good"}.get(ending, "run")
            label = f"attempt {entry['attempt']}"
        width = max((stops - starts) * scale, _NARROWEST)
        x = min((starts - begin) * scale, _WIDTH - width)
        parts.append(Part(kind, label, starts, stops, round(x, 2), round(width, 2), not after))
    return parts


def _problems(task: Mapping[str, Any]) -> List[Dict[str, str]]:
    """Return what the error's details say of places in the input."""
    details = (task.get("error") or {}).get("details")
    found = details.get("errors") or details.get("problems") if isinstance(details, dict) else None
    problems = []
    for one in found if isinstance(found, list) else ():
        if isinstance(one, dict):
            where = one.get("path", one.get("loc", one.get("field", "")))
            path = ".".join(map(str, where)) if isinstance(where, list) else str(where)
            problems.append({"path": path, "message": str(one.get("message", one.get("msg", one.get("problem", ""))))})
    return problems


def _commands(task: Mapping[str, Any], url: str) -> Dict[str, str]:
    """Return how the same task is submitted by other means."""
    body: Dict[str, Any] = {"agent_id": task["agent_id"], "capability": task["capability"], "input": task["input"]}
    for name in ("tool", "timeout_ms", "trace_id"):
        if task.get(name) is not None:
            body[name] = task[name]
    if (task.get("max_attempts") or 1) > 1:
        body["max_attempts"] = task["max_attempts"]
    text = json.dumps(body, ensure_ascii=False)
    value = json.dumps(task["input"], ensure_ascii=False)
    more = f", max_attempts={body['max_attempts']}" if "max_attempts" in body else ""
    return {
        "curl": f'curl -X POST {url}/api/v1/tasks -H "X-API-Key: $SEKUIRE_API_KEY" \\\n'
        f"  -H 'Content-Type: application/json' \\\n  -d {shlex.quote(text)}",
        "sekuire": f"sekuire send {shlex.quote(task['capability'])} {shlex.quote(value)}"
        f" --agent-id {shlex.quote(task['agent_id'])} --wait",
        "Python": "from sekuire import SekuireClient\n\nwith SekuireClient.from_env() as client:\n"
        f"    handle = client.submit({task['capability']!r}, {task['input']!r},"
        f" agent_id={task['agent_id']!r}{more})\n    print(handle.result(timeout=60))",
    }
