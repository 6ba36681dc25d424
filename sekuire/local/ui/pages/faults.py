"""Switch injected faults on and off, and show what they have hit."""

from __future__ import annotations

from typing import Any, Mapping

import flask

from ....errors import ConfigurationError
from ...fault_terms import EXAMPLES
from ...store import Refusal
from ..desk import Desk
from ..rendering import Region, done, render

__all__ = ["add"]

#: What each kind does, in a few words.
_TEXTS = {
    "latency": "delays requests",
    "error": "answers with an error",
    "reset": "resets the connection (TCP RST)",
    "half_answer": "cuts the answer in the middle",
    "page": "answers with an HTML page, as a proxy does",
    "interim": "sends an interim answer (1xx) first",
    "cut_streams": "cuts every open stream",
    "stall_streams": "sends nothing on the streams for a while",
    "expire_tokens": "expires the runtime tokens",
    "outage": "makes the platform unreachable; not this page",
}


def add(app: flask.Flask, desk: Desk) -> None:
    """Add the routes of the page."""

    def show() -> flask.Response:
        def standing() -> Mapping[str, Any]:
            return {"faults": desk.faults.standing, "seed": desk.faults.seed}

        def kinds() -> Mapping[str, Any]:
            injected = desk.faults.injected
            return {"kinds": [(kind, text, EXAMPLES[kind], injected[kind]) for kind, text in _TEXTS.items()]}

        return render(
            "faults", "Faults", {"standing": Region(["faults"], standing, every=2), "kinds": Region(["faults"], kinds)}
        )

    def switch_on() -> flask.Response:
        text = flask.request.form.get("fault", "").strip()
        problem = ""
        try:
            fault = desk.faults.add(text)
        except ConfigurationError as error:
            problem = error.problem
        if problem:
            raise Refusal(400, "INVALID_FAULT", problem)
        desk.signals.nudge("faults")
        return done(f"Switched on: {fault}", "/ui/faults")

    def switch_off() -> flask.Response:
        wanted = flask.request.form.get("fault", "")
        ended = [fault for fault in desk.faults.standing if wanted in ("", str(fault))]
        problem = ""
        for fault in ended:
            try:
                fault.remove()
            except ConfigurationError as error:
                problem = error.problem
        if problem:
            raise Refusal(409, "NOT_ENDED", problem)
        desk.signals.nudge("faults")
        return done("Switched off" if ended else "It has ended already", "/ui/faults")

    app.add_url_rule("/ui/faults", "faults", show)
    app.add_url_rule("/ui/faults/on", "faults_on", switch_on, methods=["POST"])
    app.add_url_rule("/ui/faults/off", "faults_off", switch_off, methods=["POST"])
