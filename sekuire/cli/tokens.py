"""Make install tokens: ``sekuire tokens``."""

from __future__ import annotations

import argparse

from . import terminal
from .access import add_access, agent_of, client_for, whole
from .describe import as_json
from .exits import OK
from .parsing import logging_options
from .results import note

DESCRIPTION = """\
Make an install token, with which an agent logs in for the first time. It needs
the API key, from SEKUIRE_API_KEY or a file."""
EPILOG = """\
example:  SEKUIRE_INSTALL_TOKEN=$(sekuire tokens create --agent-id writer) sekuire worker tasks:tasks

Exit codes: 0 made; 1 refused, or the platform is unreachable; 2 wrong usage or
configuration; 130 interrupted."""
LOG_LEVEL = "warning"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(title="actions", dest="action", metavar="ACTION", required=True)
    one = actions.add_parser(
        "create",
        help="make an install token and print it",
        description="Make an install token and print it. Nobody can read it again.",
        parents=[logging_options()],
        allow_abbrev=False,
    )
    one.add_argument("--json", action="store_true", help="print JSON")
    one.add_argument("--agent-id", metavar="ID", help="the agent that may log in with it (default: SEKUIRE_AGENT_ID)")
    one.add_argument("--max-uses", type=whole, default=1, metavar="N", help="how many installations it makes (1)")
    add_access(one)


def run(args: argparse.Namespace) -> int:
    agent_id = agent_of(args, "whose token is it?")
    with client_for(args, agent_id=agent_id) as client:
        token = client.create_install_token(max_uses=args.max_uses)
    if args.json:
        terminal.say(as_json({"install_token": token, "agent_id": agent_id, "max_uses": args.max_uses}))
        return OK
    terminal.say(token)
    uses = "once" if args.max_uses == 1 else f"{args.max_uses} times"
    note(args, f"an install token of {agent_id}, good {uses}; put it into SEKUIRE_INSTALL_TOKEN of its worker")
    return OK
