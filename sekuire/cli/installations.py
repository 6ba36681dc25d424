"""List installations, and pause, resume, terminate and revoke them: ``sekuire installations``."""

from __future__ import annotations

import argparse
from typing import Any, Dict, List

from ..client import SekuireClient
from . import terminal
from .access import add_action, each, run_action, seconds
from .describe import ago, as_json, print_table, text_of
from .exits import OK
from .results import note

DESCRIPTION = """\
List the installations of agents, pause and resume them, terminate their
workers, and revoke their credentials. It needs the API key, from
SEKUIRE_API_KEY or a file."""
EPILOG = """\
examples:
  sekuire installations list
  sekuire installations pause inst_3b0c950a9910 --reason "database upgrade"
  sekuire installations revoke inst_3b0c950a9910 --shutdown-timeout 10

Exit codes: 0 fine; 1 refused, or the platform is unreachable; 2 wrong usage or
configuration; 130 interrupted."""
LOG_LEVEL = "warning"

_ACTIONS = {
    "pause": ("have workers accept no new tasks until resume; running ones go on", "asked to pause"),
    "resume": ("undo pause", "asked to resume"),
    "terminate": ("have workers cancel what runs and stop", "asked to terminate"),
    "revoke": ("stop workers, and refuse their credentials from now on", "revoked"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(title="actions", dest="action", metavar="ACTION", required=True)

    listed = add_action(actions, "list", _list, "list installations, the newest first")
    listed.add_argument("--json", action="store_true", help="print JSON, with everything that the platform says")
    listed.add_argument("--agent-id", metavar="ID", help="only installations of this agent")
    listed.add_argument("--all", action="store_true", help="also those that have stopped or are revoked")
    for name, (text, _) in _ACTIONS.items():
        one = add_action(actions, name, _command, text)
        one.add_argument("ids", metavar="ID", nargs="+", help="an installation's id")
        one.add_argument("--reason", metavar="TEXT", help="why; the workers log it")
        if name == "revoke":
            one.add_argument(
                "--shutdown-timeout",
                type=seconds,
                metavar="SECONDS",
                help="how long running handlers may go on and report (default: the platform's)",
            )


run = run_action


def _list(args: argparse.Namespace, client: SekuireClient) -> int:
    every = [one for one in client.installations() if args.agent_id in (None, one.get("agent_id"))]
    every.reverse()
    found = [one for one in every if args.all or _state(one) not in ("stopped", "revoked")]
    if args.json:
        terminal.say(as_json({"installations": found}, indent=2))
        return OK
    rows = [
        (
            text_of(one.get("installation_id")),
            _state(one),
            ago(one.get("last_heartbeat_at") or one.get("created_at")),
            f"{text_of(one.get('agent_id'))}: {_accepts(one)}",
        )
        for one in found
    ]
    if rows:
        print_table(("INSTALLATION", "STATE", "SEEN", "AGENT"), rows, [row[1] for row in rows])
    hidden = len(every) - len(found)
    if hidden:
        note(args, f"{hidden} more, stopped or revoked: --all shows {'it' if hidden == 1 else 'them'}")
    elif not rows:
        note(args, "no installations yet; one is made when a worker logs in: sekuire worker MODULE:NAME")
    return OK


def _state(one: Dict[str, Any]) -> str:
    """Return the state of an installation in one word."""
    if one.get("revoked") is True:
        return "revoked"
    desired, status = one.get("desired_state"), one.get("status")
    if desired in ("paused", "terminated") and status not in ("stopped",):
        return str(desired)
    return "running" if status in ("healthy", None) else text_of(status)


def _accepts(one: Dict[str, Any]) -> str:
    """Return how many workers it has, and what they accept."""
    found = one.get("workers")
    workers = [worker for worker in found if isinstance(worker, dict)] if isinstance(found, list) else []
    count = len(workers)
    # Those of a heartbeat. An installation may have logged in before its workers had handlers.
    listed = [name for worker in workers for name in worker.get("capabilities") or ()] or one.get("capabilities") or ()
    names: List[str] = sorted({text_of(name) for name in listed if isinstance(name, str)})
    if not count:
        return "no worker"
    return f"{count} worker{'' if count == 1 else 's'}, {', '.join(names) if names else 'every capability'}"


def _command(args: argparse.Namespace, client: SekuireClient) -> int:
    def act(installation_id: str) -> str:
        if args.action == "revoke":
            client.revoke(installation_id, args.reason, shutdown_timeout=args.shutdown_timeout)
        else:
            getattr(client, args.action)(installation_id, args.reason)
        return f"{installation_id} {_ACTIONS[args.action][1]}"

    return each(f"installations {args.action}", args.ids, act)
