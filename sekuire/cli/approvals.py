"""Show what tasks ask for, and approve or deny it: ``sekuire approvals``."""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import functools
import getpass
import json
from typing import Any, Dict, List, Optional

from ..client import SekuireClient
from ..wire import protocol
from . import terminal
from .access import add_action, run_action
from .describe import as_json, duration, fit, print_table, text_of
from .exits import FAILED, OK, CommandError
from .narrator import SHORT_ID
from .results import note

DESCRIPTION = """\
List what tasks ask a person for, and approve or deny it. It needs the API key, from SEKUIRE_API_KEY or a file. Agents
must not have that key: whoever has it can approve anything."""
EPILOG = """\
examples:
  sekuire approvals list
  sekuire approvals approve 3f2a91c4ab12 --reason "the customer called"
  sekuire approvals deny 3f2a91c4ab12

ID is the id of a request, or its beginning if no other that waits begins so.

Exit codes: 0 fine; 1 refused (somebody was first, or it has expired), or the platform is unreachable; 2 wrong usage or
configuration; 130 interrupted."""
LOG_LEVEL = "warning"

#: Characters of an id that name a request at least. With fewer a slip of the finger would often hit another one.
_LEAST = 4
#: How many requests are searched for one that is named and does not wait.
_MOST_SEARCHED = 500


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(title="actions", dest="action", metavar="ACTION", required=True)

    add = functools.partial(add_action, actions, has_json=True, allow_abbrev=True)
    listed = add("list", _list, "list the requests that wait, the one with the least time left first")
    listed.add_argument("--all", action="store_true", help="also those that are decided or have expired")
    listed.add_argument("--task-id", metavar="ID", help="only requests of this task")
    for name, act, text in (
        ("show", _show, "show everything about a request"),
        ("approve", _decide, "approve what a task asks for; it goes on"),
        ("deny", _decide, "deny what a task asks for"),
    ):
        one = add(name, act, text)
        one.add_argument("id", metavar="ID", help="the id of a request, or its beginning")
        if name != "show":
            one.add_argument("--reason", metavar="TEXT", help="why; the task and the log get it")
            one.add_argument("--by", metavar="NAME", help="who decides (default: the user's name); nothing proves it")


run = run_action


# -- looking ----------------------------------------------------------------------------------------------------------


def _list(args: argparse.Namespace, client: SekuireClient) -> int:
    found = [
        one for one in client.approvals(None if args.all else "pending") if args.task_id in (None, one.get("task_id"))
    ]
    if not args.all:
        found.sort(key=lambda one: text_of(one.get("expires_at")))
    if args.json:
        terminal.say(as_json({"approvals": found}, indent=2))
        return OK
    rows = [(_id_of(one)[:SHORT_ID], _left(one), f"{text_of(one.get('agent_id'))}: {_asked(one)}") for one in found]
    if rows:
        print_table(("APPROVAL", "LEFT", "AGENT"), rows, [_status(one) for one in found])
        if not args.all:
            note(args, "`show ID` shows one in full; `approve ID` and `deny ID` decide it")
    else:
        note(args, "no requests" if args.all else "nothing waits for an approval; --all shows what has been decided")
    return OK


def _show(args: argparse.Namespace, client: SekuireClient) -> int:
    one = _find(client, args.id)
    if args.json:
        terminal.say(as_json(one, indent=2))
        return OK
    rows: List[List[str]] = [["approval", _id_of(one)], ["state", _state(one)]]
    subject = one.get("subject")
    if isinstance(subject, dict):
        rows.append(["asks for", f"{text_of(subject.get('kind'))} {text_of(subject.get('name'))}"])
    for name in ("agent_id", "capability", "task_id", "attempt", "workspace_id", "policy_hash", "digest", "created_at"):
        value = one.get(name)
        if value is not None:
            rows.append([name.replace("_id", "").replace("_", " "), terminal.clean(str(value))])
    for line in terminal.plain_table(rows):
        terminal.say(line)
    terminal.say("details")
    for line in _escaped(one.get("details"), indent=2).split("\n"):
        terminal.say(f"  {line}")
    return OK


def _id_of(one: Dict[str, Any]) -> str:
    return text_of(one.get("approval_id"))


def _status(one: Dict[str, Any]) -> str:
    return text_of(one.get("status"))


def _left(one: Dict[str, Any]) -> str:
    """Return how much time is left to decide a request, or what became of it."""
    end = protocol.parse_time(one.get("expires_at"))
    if _status(one) != "pending" or end is None:
        return _status(one)
    return duration(max(0.0, (end - dt.datetime.now(dt.timezone.utc)).total_seconds()))


def _state(one: Dict[str, Any]) -> str:
    """Return a request's state in a few words."""
    status = _status(one)
    if status == "pending":
        return f"waits, {_left(one)} left"
    by = f" by {text_of(one['decided_by'])}" if one.get("decided_by") else ""
    key = f" (credential: {text_of(one['credential'])})" if one.get("credential") else ""
    reason = f": {text_of(one['reason'])}" if one.get("reason") else ""
    return f"{status}{by}{key}{reason}"


def _asked(one: Dict[str, Any]) -> str:
    """Return what a request asks for as one line."""
    subject = one.get("subject")
    subject = subject if isinstance(subject, dict) else {}
    what = f"{text_of(subject.get('kind'))} {text_of(subject.get('name'))}"
    details = one.get("details")
    return what if details is None else f"{what} {_escaped(details)}"


def _escaped(details: Any, indent: Optional[int] = None) -> str:
    """Return details as JSON in which nothing can steer the terminal or hide: what does not print is escaped."""
    text = as_json(details, indent=indent)
    return "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)


# -- deciding ---------------------------------------------------------------------------------------------------------


def _decide(args: argparse.Namespace, client: SekuireClient) -> int:
    approval_id = _id_of(_find(client, args.id))
    decide = client.approve if args.action == "approve" else client.deny
    decided = decide(approval_id, args.reason, decided_by=args.by or _user())
    if args.json:
        terminal.say(as_json(decided, indent=2))
    else:
        terminal.say(fit(f"{approval_id[:SHORT_ID]} {_status(decided)}: {_asked(decided)}"))
    return OK


def _find(client: SekuireClient, given: str) -> Dict[str, Any]:
    """Return the request whose id is ``given``, or begins so. One that waits comes before others.

    :raises CommandError: none or several do.
    """
    if len(given) < _LEAST:
        raise CommandError(f"give at least {_LEAST} characters of the id, got {given!r}; see sekuire approvals list")
    searches = ({"status": "pending"}, {"status": None, "limit": _MOST_SEARCHED})
    for search in searches:
        found = [one for one in client.approvals(**search) if _id_of(one).startswith(given)]
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(_id_of(one)[: max(SHORT_ID, len(given) + 4)] for one in found[:5])
            raise CommandError(f"{len(found)} requests begin with {given!r}: {names}; give more of the id", code=FAILED)
    raise CommandError(f"no request for approval begins with {given!r}; see sekuire approvals list --all", code=FAILED)


def _user() -> Optional[str]:
    # A container's user may have no name.
    with contextlib.suppress(Exception):
        return getpass.getuser()
    return None
