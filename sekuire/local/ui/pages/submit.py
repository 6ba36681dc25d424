"""Submit a task: by a form made from the published schema, or as JSON, checked before it is sent."""

from __future__ import annotations

import json
from typing import Any, Dict, List, Mapping, Optional, Tuple
from urllib.parse import urlencode

import attrs
import flask

from ...store import Refusal
from ..desk import Desk
from ..forms import Field, Problem, fields_of, mark, problems_of, read_fields, read_json
from ..rendering import Region, done, render

__all__ = ["add"]

#: The fields beside the input: name, label, kind, hint.
_MORE = (
    ("max_attempts", "Attempts", "number", "1 to 1000; how often it is tried when it fails retryably"),
    ("timeout_ms", "Time limit (ms)", "number", "how long its handler may run"),
    ("delay_ms", "Delay (ms)", "number", "how long it waits before it may begin"),
    ("expires_in_ms", "Expires after (ms)", "number", "fails if it has not begun until then"),
    ("tool", "Tool", "text", "the tool that a policy is asked about"),
    ("trace_id", "Trace", "text", "an id that travels with the task"),
)


@attrs.define
class _Draft:
    """Hold what has been typed so far."""

    agent_id: str
    capability: str
    is_json: bool
    text: str = ""
    fields: Optional[List[Field]] = None
    schema: Optional[Mapping[str, Any]] = None
    description: str = ""
    more: Dict[str, str] = attrs.Factory(dict)
    problems: List[Problem] = attrs.Factory(list)
    #: What the platform refused, or what cannot be read at all.
    refusal: str = ""
    can_force: bool = False


def add(app: flask.Flask, desk: Desk) -> None:
    """Add the routes of the page."""

    def show() -> flask.Response:
        args = flask.request.args
        like = desk.store.task(args["like"]) if args.get("like") else None
        agent_id = args.get("agent") or (like["agent_id"] if like else "") or desk.store.latest_agent() or ""
        capability = args.get("capability", "").strip() or (like["capability"] if like else "")
        draft = _draft(desk, agent_id, capability, args.get("as") == "json", like["input"] if like else None)
        if like is not None:
            draft.more = {name: str(like[name]) for name, *_ in _MORE if like.get(name) is not None}
            if draft.more.get("max_attempts") == "1":
                del draft.more["max_attempts"]
        return _page(desk, draft)

    def send() -> flask.Response:
        form = flask.request.form
        draft = _draft(desk, form.get("agent", "").strip(), form.get("capability", "").strip(), "json" in form, None)
        value = _read(draft, form)
        draft.more = {name: form.get(name, "").strip() for name, *_ in _MORE}
        body: Dict[str, Any] = {"capability": draft.capability, "input": value}
        for name, label, kind, _ in _MORE:
            text = draft.more[name]
            if text and kind == "number" and not (text.isascii() and text.isdigit() and len(text) < 16):
                draft.refusal = draft.refusal or f"{label} must be a whole number"
            elif text:
                body[name] = int(text) if kind == "number" else text
        if not draft.agent_id:
            draft.refusal = "Name the agent that gets the task"
        if not draft.refusal and not draft.can_force:
            try:
                task_id = desk.submit(draft.agent_id, body)
            except Refusal as refusal:
                draft.refusal = refusal.message[:1].upper() + refusal.message[1:]
            else:
                return done("Submitted", f"/ui/tasks/{task_id}", moves=True)
        return _page(desk, draft, 422)

    app.add_url_rule("/ui/submit", "submit", show)
    app.add_url_rule("/ui/submit", "submit_send", send, methods=["POST"])


def _page(desk: Desk, draft: _Draft, status: int = 200) -> flask.Response:
    recent = desk.queries.recent_inputs(draft.agent_id or None, draft.capability) if draft.capability else []
    switch = {"agent": draft.agent_id, "capability": draft.capability}
    if not draft.is_json:
        switch["as"] = "json"
    region = Region([], lambda: {"draft": draft, "more": _MORE, "switch": f"/ui/submit?{urlencode(switch)}"})
    if status != 200 and "HX-Request" in flask.request.headers:
        return render("submit", "Submit", {"form": region}, status=status, only="form")
    return render(
        "submit", "Submit", {"form": region}, status=status, draft=draft, recent=recent,
        known=_known(desk), agents=desk.queries.agents(),
    )  # fmt: skip


def _draft(desk: Desk, agent_id: str, capability: str, is_json: bool, value: Any) -> _Draft:
    draft = _Draft(agent_id, capability, is_json)
    info = _info(desk, agent_id, capability)
    draft.schema = info.get("input_schema")
    draft.description = str(info.get("description") or "")
    if draft.schema is not None:
        draft.fields = fields_of(draft.schema, value)
    draft.is_json = is_json or draft.fields is None
    draft.text = json.dumps({} if value is None else value, indent=2, ensure_ascii=False)
    return draft


def _read(draft: _Draft, form: Mapping[str, str]) -> Any:
    """Return the input, and note in the draft what is wrong with it."""
    if draft.is_json:
        draft.text = form.get("input", "").replace("\r\n", "\n")
        value, problem = read_json(draft.text)
        if problem is not None:
            draft.refusal = f"The input is {problem}"
            return None
    else:
        value, draft.problems = read_fields(draft.fields or [], form)
        if draft.problems:
            draft.refusal = "Some of it cannot be read"
            draft.problems = mark(draft.fields or [], draft.problems)
            return value
    if draft.schema is not None and "force" not in form:
        problems = problems_of(draft.schema, value)
        draft.can_force = bool(problems)
        draft.problems = problems if draft.is_json else mark(draft.fields or [], problems)
    return value


def _info(desk: Desk, agent_id: str, capability: str) -> Mapping[str, Any]:
    """Return what the newest installation of the agent has published of a capability."""
    for one in reversed(desk.installations()):
        if one["agent_id"] == agent_id and not one["revoked"]:
            for info in one["capability_info"]:
                if info.get("name") == capability:
                    found: Mapping[str, Any] = info
                    return found
    return {}


def _known(desk: Desk) -> List[Tuple[str, str, str]]:
    """Return the capabilities that can be chosen: agent, name, description. Those of live workers come first."""
    found: Dict[Tuple[str, str], str] = {}
    for one in reversed(desk.installations()):
        if one["revoked"]:
            continue
        for info in one["capability_info"]:
            found.setdefault((one["agent_id"], str(info.get("name"))), str(info.get("description") or ""))
        for name in one["capabilities"]:
            found.setdefault((one["agent_id"], name), "")
    return [(agent, name, text) for (agent, name), text in sorted(found.items())][:200]
