"""Edit, validate and activate a workspace's policy, ask it, compare its versions, and show what was decided."""

from __future__ import annotations

import difflib
import json
from typing import Any, Dict, List, Mapping, Optional, Tuple

import flask

from ....errors import PolicyIntegrityError
from ...store import Refusal, check_id
from ..desk import Desk
from ..forms import read_json
from ..rendering import Region, render
from ..rules import KINDS, Verdict, decide, find_problems

__all__ = ["add"]

#: Audit events that are decisions of a policy.
_DECISIONS = ("policy_violation", "policy_check")
_SHOWN = 30
#: What the editor holds while there is no policy.
_BEGIN = {
    "permissions": {
        "tools": {"blocked_tools": []},
        "network": {"enabled": True, "require_tls": True, "allowed_domains": ["*"]},
        "filesystem": {"enabled": True, "allowed_paths": ["*"]},
    },
}


def add(app: flask.Flask, desk: Desk) -> None:
    """Add the routes of the page."""

    def show() -> flask.Response:
        return _page(desk, _workspace(desk, flask.request.args))

    def act() -> flask.Response:
        form = flask.request.form
        workspace_id = _workspace(desk, form)
        text = form.get("content", "").replace("\r\n", "\n")
        result = _act(desk, workspace_id, text, form)
        only = "result" if "HX-Request" in flask.request.headers else ""
        return _page(desk, workspace_id, result=result, text=text, form=form, only=only)

    app.add_url_rule("/ui/policy", "policy", show)
    app.add_url_rule("/ui/policy", "policy_act", act, methods=["POST"])


def _workspace(desk: Desk, values: Mapping[str, str]) -> str:
    return check_id(values.get("workspace") or desk.settings.workspace_id, "workspace")


def _active(desk: Desk, workspace_id: str) -> Optional[Dict[str, Any]]:
    try:
        return desk.store.policy(workspace_id)
    except Refusal:
        return None


def _page(
    desk: Desk,
    workspace_id: str,
    *,
    result: Optional[Mapping[str, Any]] = None,
    text: Optional[str] = None,
    form: Optional[Mapping[str, str]] = None,
    only: str = "",
) -> flask.Response:
    active = _active(desk, workspace_id)
    content = _BEGIN if active is None else active["content"]

    def versions() -> Mapping[str, Any]:
        known = _versions(desk, workspace_id)
        return {"versions": known, "lines": _difference(known, flask.request.args), "active": active}

    def decisions() -> Mapping[str, Any]:
        found = [pair for kind in _DECISIONS for pair in desk.queries.events(kind, None, _SHOWN)]
        return {"events": [event for _, event in sorted(found, key=lambda pair: -pair[0])[:_SHOWN]]}

    return render(
        "policy", "Policy",
        {
            "state": Region(["policy"], lambda: {"active": _active(desk, workspace_id)}),
            "result": Region([], lambda: {"result": result}),
            "versions": Region(["policy"], versions),
            "decisions": Region(["audit"], decisions),
        },
        only=only, workspace_id=workspace_id, workspaces=_workspaces(desk), kinds=KINDS, form=form or {},
        text=json.dumps(content, indent=2, ensure_ascii=False) if text is None else text,
        public_key=desk.store.policy_key.public,
    )  # fmt: skip


def _act(desk: Desk, workspace_id: str, text: str, form: Mapping[str, str]) -> Mapping[str, Any]:
    """Do what a button says, and return what is shown beside the editor."""
    content, problem = read_json(text)
    if problem is None and not isinstance(content, dict):
        problem = "not a JSON object"
    if problem is not None:
        return {"kind": "bad", "title": "The policy cannot be read", "text": f"It is {problem}."}
    action = form.get("action", "")
    if action == "check":
        return _ask(content, form)
    wrong, warnings = find_problems(content)
    if wrong:
        return {"kind": "bad", "title": "Workers would refuse it", "text": wrong}
    if action != "activate":
        return {"kind": "good", "title": "It can be enforced", "text": "Nothing was activated.", "warnings": warnings}
    try:
        policy = desk.store.set_policy(workspace_id, content)
    except Refusal as refusal:
        return {"kind": "bad", "title": "It cannot be signed", "text": refusal.message}
    desk.signals.nudge("policy")
    return {
        "kind": "good",
        "title": f"Version {policy['version']} is signed and active",
        "text": "Workers adopt it with their next heartbeat.",
        "warnings": warnings,
    }


def _ask(content: Mapping[str, Any], form: Mapping[str, str]) -> Mapping[str, Any]:
    kind, name = form.get("kind", "tool"), form.get("name", "").strip()
    if kind not in KINDS or not name:
        return {"kind": "bad", "title": "What is asked about?", "text": "Give the name of a tool, a host, a path…"}
    try:
        verdict = decide(content, kind, name, form.get("second", "").strip())
    except PolicyIntegrityError as error:
        return {"kind": "bad", "title": "Workers would refuse this policy", "text": str(error)}
    return {"kind": "good" if verdict.is_allowed else "bad", **_told(verdict, kind, name)}


def _told(verdict: Verdict, kind: str, name: str) -> Dict[str, Any]:
    title = f"{kind} “{name}” would be {'allowed' if verdict.is_allowed else 'denied'}"
    if verdict.is_allowed and verdict.rule:
        title += ", after an approval"
    return {"title": title[:1].upper() + title[1:], "text": verdict.reason, "rule": verdict.rule}


def _workspaces(desk: Desk) -> List[str]:
    rows = desk.store.read("SELECT workspace_id FROM policies UNION SELECT workspace_id FROM installations LIMIT 100")
    return sorted({desk.settings.workspace_id, *(row[0] for row in rows)})


def _versions(desk: Desk, workspace_id: str) -> List[Tuple[int, str, str, float]]:
    """Return the versions that are kept, the newest first: number, hash, content as lines, when."""
    rows = desk.store.read(
        "SELECT version, hash, content, activated_at FROM policy_versions WHERE workspace_id = ?"
        " ORDER BY version DESC LIMIT 100",
        (workspace_id,),
    )
    return [(row[0], row[1], json.dumps(json.loads(row[2]), indent=2, ensure_ascii=False), row[3]) for row in rows]


def _difference(
    versions: List[Tuple[int, str, str, float]], args: Mapping[str, str]
) -> Optional[Tuple[int, int, List[Tuple[str, str]]]]:
    """Return two versions and the lines in which they differ, with what each line is."""
    texts = {str(number): text for number, _, text, _ in versions}
    if len(versions) < 2:
        return None
    new = args.get("new", "") if args.get("new") in texts else str(versions[0][0])
    old = args.get("old", "") if args.get("old") in texts else str(versions[1][0])
    lines = []
    for line in difflib.unified_diff(texts[old].split("\n"), texts[new].split("\n"), n=3, lineterm=""):
        if line.startswith(("---", "+++")):
            continue
        lines.append(({"+": "ins", "-": "del", "@": "muted"}.get(line[:1], ""), line))
    return int(old), int(new), lines
