"""Show installations with their workers, command them, and make install tokens."""

from __future__ import annotations

from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple

import flask

from ....wire.protocol import COMMANDS, parse_time
from ...store import Refusal, check_id
from ..desk import Desk
from ..rendering import Region, done, plural, render

__all__ = ["add"]

#: Seconds after the end of its lease for which an installation is shown in full.
_RECENT = 600.0
_MOST_USES = 1_000_000


def add(app: flask.Flask, desk: Desk) -> None:
    """Add the routes of the page."""

    def listed() -> Mapping[str, Any]:
        live, over = _installations(desk)
        return {"live": live, "over": over}

    listing = Region(["workers"], listed, every=5)

    def show() -> flask.Response:
        return render("workers", "Workers", {"list": listing, "token": Region([], lambda: _token(desk))})

    def command(installation_id: str) -> flask.Response:
        kind = flask.request.form.get("type", "")
        if kind not in COMMANDS:
            raise Refusal(400, "INVALID_REQUEST", f"the command must be one of {', '.join(COMMANDS)}")
        desk.command(installation_id, kind, _reason())
        return done({"pause": "Paused", "resume": "Resumed", "terminate": "Terminating"}[kind], "/ui/workers")

    def revoke(installation_id: str) -> flask.Response:
        if flask.request.form.get("confirm", "").strip() != installation_id:
            raise Refusal(400, "NOT_CONFIRMED", "type the whole id of the installation to revoke it")
        desk.revoke(installation_id, _reason())
        return done("Revoked", "/ui/workers")

    def act(action: Callable[[str], int], one: str, nothing: str) -> Callable[[str], flask.Response]:
        def view(installation_id: str) -> flask.Response:
            desk.store.installation(installation_id)
            count = action(installation_id)
            desk.signals.nudge("workers")
            return done(plural(count, one) if count else nothing, "/ui/workers", is_bad=not count)

        return view

    def make_token() -> flask.Response:
        form = flask.request.form
        agent_id, uses = form.get("agent", "").strip(), form.get("max_uses", "1").strip()
        problem, token = "", None
        try:
            check_id(agent_id, "the agent")
        except Refusal:
            problem = "Name the agent"
        if not (uses.isascii() and uses.isdigit() and 1 <= int(uses[:9]) <= _MOST_USES):
            problem = problem or f"Uses must be a whole number from 1 to {_MOST_USES:,}"
        if not problem:
            token = desk.store.create_install_token(agent_id, int(uses))
            desk.signals.nudge("workers")
        region = Region([], lambda: {**_token(desk), "agent": agent_id, "uses": uses, "made": token, "bad": problem})
        only = "token" if "HX-Request" in flask.request.headers else ""
        return render(
            "workers", "Workers", {"list": listing, "token": region}, status=422 if problem else 200, only=only
        )

    path = "/ui/workers/<installation_id>"
    app.add_url_rule("/ui/workers", "workers", show)
    app.add_url_rule("/ui/workers", "workers_token", make_token, methods=["POST"])
    app.add_url_rule(f"{path}/command", "workers_command", command, methods=["POST"])
    app.add_url_rule(f"{path}/revoke", "workers_revoke", revoke, methods=["POST"])
    cut = act(desk.hub.drop_all, "stream cut", "It has no stream")
    app.add_url_rule(f"{path}/cut", "workers_cut", cut, methods=["POST"])
    expire = act(desk.store.expire_tokens, "token expired", "It has no valid token")
    app.add_url_rule(f"{path}/expire", "workers_expire", expire, methods=["POST"])


def _reason() -> Optional[str]:
    return flask.request.form.get("reason", "").strip() or None


def _token(desk: Desk) -> Dict[str, Any]:
    return {"agent": desk.store.latest_agent() or "my-agent", "uses": "1", "made": None, "bad": "", "url": desk.url}


def _installations(desk: Desk) -> Tuple[List[Dict[str, Any]], List[Dict[str, Any]]]:
    """Return the installations that live or did a moment ago, and the others; the newest first."""
    now = desk.store.now()
    streams: Dict[str, List[Dict[str, Any]]] = {}
    for stream in desk.hub.snapshot():
        streams.setdefault(stream["installation_id"], []).append(stream)
    live: List[Dict[str, Any]] = []
    over: List[Dict[str, Any]] = []
    for one in reversed(desk.installations()):
        ends = parse_time(one["lease_expires_at"])
        left = 0.0 if ends is None else ends.timestamp() - now
        one["streams"] = streams.get(one["installation_id"], [])
        one["is_alive"] = left > 0 and not one["revoked"]
        one["state"] = _state(one)
        one["rows"] = _workers(one)
        has_ended = one["revoked"] or one["status"] == "stopped"
        is_shown = one["streams"] or (left > -_RECENT and not has_ended)
        (live if is_shown else over).append(one)
    return live, over


def _state(one: Mapping[str, Any]) -> Tuple[str, str]:
    """Return the icon and the word for the state of an installation."""
    if one["revoked"]:
        return "revoked", "revoked"
    if one["status"] in ("stopping", "stopped"):
        return "stopped", str(one["status"])
    if not one["is_alive"]:
        return "lost", "lease lost"
    if one["desired_state"] != "running":
        return "paused" if one["desired_state"] == "paused" else "stopped", one["desired_state"]
    return ("live", "connected") if one["streams"] else ("queued", "no stream")


def _workers(one: Mapping[str, Any]) -> List[Dict[str, Any]]:
    """Return the installation's workers: what its heartbeat said, and the streams."""
    rows: Dict[str, Dict[str, Any]] = {}
    for worker in one["workers"] or ():
        rows[worker["worker_id"]] = {**worker, "stream": None}
    for stream in one["streams"]:
        row = rows.setdefault(stream["worker_id"], {"worker_id": stream["worker_id"]})
        row["stream"] = stream
    return list(rows.values())
