"""Say what happens on a local platform, in one line each."""

# Threads: main thread only.

from __future__ import annotations

import json
import math
import time
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Mapping, Set, Tuple

from ..wire.protocol import parse_time
from . import terminal
from .describe import duration

if TYPE_CHECKING:
    from ..local import LocalPlatform
    from ..local.record import Happening

__all__ = ["Narrator", "line_of_event", "line_of_happening"]

_LONGEST = 300
#: So many characters of a request's id are shown, and are enough to name it.
SHORT_ID = 12
#: Seconds in which the same refusal is not shown again.
_QUIET = 60.0
#: Codes of failures that are denials.
_DENIED = ("policy_denied", "rate_limited", "policy_unavailable")
#: Statuses by which a client or its credentials are refused. Others belong to what it asked for.
_REFUSALS = (401, 403, 421)
_LOGINS = ("bootstrap", "recover", "refresh")
_MOST_REMEMBERED = 10_000
#: Seconds in which a worker that stops in order has said so, after its stream has ended.
_PATIENCE = 1.0


class Narrator:
    """Write a line for each connect, task, failure and denial since the last call.

    :param shows_logs: write a line for every audit event, too.
    """

    def __init__(self, platform: LocalPlatform, *, shows_logs: bool = False) -> None:
        self._platform = platform
        self._shows_logs = shows_logs
        self._last = 0
        known = platform.logs_after(0)
        self._last_log = known[-1][0] if known else 0
        #: When each refusal may be shown again, by the monotonic clock.
        self._refusals: Dict[str, float] = {}
        #: Agents and capabilities for which a task that waits has been shown, until a worker connects.
        self._waiting: Set[Tuple[str, str]] = set()
        #: Until when a worker that has disconnected may still report that it stops: number of the line, time.
        self._patience = (0, math.inf)
        #: Tasks whose denial has been shown.
        self._denied: Set[str] = set()

    def look(self, *, is_last: bool = False) -> None:
        """Write what is new. Leave nothing for later if it ``is_last``."""
        for happening in self._platform.happenings_after(self._last):
            if not is_last and self._may_change(happening):
                break
            self._last = happening.number
            if self._is_worth_a_line(happening):
                terminal.note(line_of_happening(happening))
        for number, event in self._platform.logs_after(self._last_log):
            self._last_log = number
            if self._shows_logs:
                terminal.note(line_of_event(event))
            elif event["event_type"] == "policy_violation":
                self._show_denial(event["event_data"])

    def _may_change(self, happening: Happening) -> bool:
        if happening.kind != "disconnect" or _is_in_order(happening.fields):
            return False
        if self._patience[0] != happening.number:
            self._patience = happening.number, time.monotonic() + _PATIENCE
        return time.monotonic() < self._patience[1]

    def _is_worth_a_line(self, happening: Happening) -> bool:
        fields = happening.fields
        if happening.kind == "connect":
            self._waiting = {pair for pair in self._waiting if pair[0] != fields["agent_id"]}
        elif happening.kind == "waiting":
            pair = (fields["agent_id"], fields["capability"])
            is_known = pair in self._waiting
            self._waiting.add(pair)
            return not is_known
        elif happening.kind == "end" and (fields["error"] or {}).get("code") in _DENIED:
            is_known = fields["task_id"] in self._denied
            self._remember(fields["task_id"])
            return not is_known
        elif happening.kind == "refused":
            return _is_failure(fields) and self._is_new(_cause(fields))
        return True

    def _is_new(self, refusal: str) -> bool:
        now = time.monotonic()
        is_new = now >= self._refusals.get(refusal, -math.inf)
        if is_new:
            self._refusals[refusal] = now + _QUIET
        return is_new

    def _show_denial(self, data: Mapping[str, Any]) -> None:
        task_id = data.get("task_id")
        if isinstance(task_id, str):
            # The task that failed with it has had its line.
            if task_id in self._denied:
                return
            self._remember(task_id)
        where = f"[{task_id}] " if task_id else ""
        what = " ".join(str(data[name]) for name in ("kind", "target") if data.get(name)) or "something"
        verb = "would be denied" if data.get("allowed") is True else "denied"
        terminal.note(_cut(f"{where}{what} {verb} by the policy: {data.get('rule')}: {data.get('reason')}"))

    def _remember(self, task_id: str) -> None:
        if len(self._denied) >= _MOST_REMEMBERED:
            self._denied.clear()
        self._denied.add(task_id)


def _is_failure(fields: Mapping[str, Any]) -> bool:
    """Return True if a person would want to know of a refused request."""
    if fields["endpoint"] in _LOGINS:
        return True
    # Who sends no credential only asks whether a platform is here. An expired token is renewed.
    return fields["status"] in _REFUSALS and fields["has_credential"] and fields["code"] != "TOKEN_EXPIRED"


def _cause(fields: Mapping[str, Any]) -> str:
    """Return what makes two refusals the same for a reader: one worker is refused at many endpoints."""
    if fields["endpoint"] in _LOGINS:
        return f"login {fields['message'].rpartition('; ')[2]}"
    return f"request {fields['code']}"


def line_of_happening(happening: Happening) -> str:
    """Return what happened as one line, without what could steer a terminal."""
    return _cut(_TEXTS[happening.kind](happening.fields))


def _cut(text: str) -> str:
    text = terminal.clean(text)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def _login(fields: Mapping[str, Any]) -> str:
    return f"{fields['agent_id']} logged in as {fields['installation_id']}"


def _connect(fields: Mapping[str, Any]) -> str:
    names = fields["capabilities"]
    accepts = "every capability" if names is None else ", ".join(sorted(names))
    state = "" if fields["state"] == "running" else f"; it is {fields['state']}"
    return f"{fields['agent_id']} connected as {fields['installation_id']}, accepts {accepts}{state}"


def _is_in_order(fields: Mapping[str, Any]) -> bool:
    return fields["reported"] in ("stopping", "stopped")


def _disconnect(fields: Mapping[str, Any]) -> str:
    left = fields["in_flight"]
    tasks = f"{left} task{'s' if left > 1 else ''}"
    if _is_in_order(fields):
        return f"{fields['agent_id']} " + (f"is stopping, {tasks} running" if left else "stopped")
    return f"{fields['agent_id']} disconnected" + (f" with {tasks} running" if left else "")


def _waiting(fields: Mapping[str, Any]) -> str:
    return f"[{fields['task_id']}] {fields['capability']} waits: no connected worker of {fields['agent_id']} accepts it"


def _end(fields: Mapping[str, Any]) -> str:
    head = f"[{fields['task_id']}] {fields['capability']}"
    error = fields["error"]
    if error is None:
        milliseconds = fields["milliseconds"]
        return f"{head} completed" + ("" if milliseconds is None else f" in {milliseconds:.0f} ms")
    code, message = error.get("code"), error.get("message")
    if code in _DENIED:
        details = error.get("details")
        rule = details.get("rule") if isinstance(details, dict) else None
        named = "" if not rule or str(rule) in str(message) else f"{rule}: "
        return f"{head} denied by the policy: {named}{message}"
    again = "" if fields["retry_in"] is None else f"; attempt {fields['attempt']}, the next in {fields['retry_in']:g} s"
    return f"{head} failed {code}: {message}{again}"


def _command(fields: Mapping[str, Any]) -> str:
    reason = f": {fields['reason']}" if fields["reason"] else ""
    return f"[{fields['installation_id']}] {fields['type']} sent{reason}"


def _refused(fields: Mapping[str, Any]) -> str:
    endpoint = fields["endpoint"]
    what = "a login" if endpoint in _LOGINS else f"a request ({endpoint})" if endpoint else "a request"
    return f"{what} was refused: {fields['code']}: {fields['message']}"


def _approval(fields: Mapping[str, Any]) -> str:
    return (
        f"[{fields['task_id']}] approval wanted: {fields['subject']['kind']} {fields['subject']['name']};"
        f" sekuire approvals approve {fields['approval_id'][:SHORT_ID]} (or deny), within {duration(fields['timeout'])}"
    )


def _decision(fields: Mapping[str, Any]) -> str:
    head = f"[{fields['task_id']}] {fields['subject']['kind']} {fields['subject']['name']}"
    if fields["decision"] == "expired":
        return f"{head}: nobody answered the request for approval in time"
    by = f" by {fields['decided_by']}" if fields["decided_by"] else ""
    return f"{head} {fields['decision']}{by}" + (f": {fields['reason']}" if fields["reason"] else "")


_TEXTS: Dict[str, Callable[[Mapping[str, Any]], str]] = {
    "login": _login,
    "connect": _connect,
    "disconnect": _disconnect,
    "waiting": _waiting,
    "end": _end,
    "command": _command,
    "approval": _approval,
    "decision": _decision,
    "refused": _refused,
}


def line_of_event(event: Mapping[str, Any]) -> str:
    """Return an audit event as one line. Escape what could steer a terminal."""
    when = parse_time(event["event_timestamp"])
    at = event["event_timestamp"] if when is None else when.astimezone().strftime("%H:%M:%S")
    data = event["event_data"]
    values: List[str] = [f"{name}={_value(value)}" for name, value in data.items() if value is not None]
    text = f"log {at} {event['severity']} {event['event_type']} of {event['sekuire_id']}: {' '.join(values)}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _value(value: Any) -> str:
    if isinstance(value, str) and value and value.isprintable() and not set(value) & set(" \"'=\\"):
        return value
    return json.dumps(value, ensure_ascii=False)
