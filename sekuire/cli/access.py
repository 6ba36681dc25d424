"""Open a client of the platform for a command, and describe what is wrong with its key."""

from __future__ import annotations

import argparse
import contextlib
from typing import Any, Callable, Iterator, List, Optional, Sequence

import attrs

from ..client import SekuireClient
from ..config import ENVIRONMENT, ConnectionConfig, variable
from ..errors import APIError
from ..wire import protocol
from . import terminal
from .exits import FAILED, OK, CommandError, complain
from .options import add_connection, api_key, connection
from .parsing import logging_options

__all__ = [
    "RETRY_FOR", "add_access", "add_action", "agent_of", "client_for", "each", "options_given", "run_action", "seconds",
    "whole",
]  # fmt: skip

#: Seconds for which a call is sent again: somebody waits at the terminal.
RETRY_FOR = 5.0
#: Most bytes of a task: with the largest input of ``sekuire send`` and the largest result that a worker sends.
_MOST_OF_A_TASK = 64 * 1024 * 1024


def add_access(parser: argparse.ArgumentParser) -> None:
    """Add the options that say where the platform is, and which key it gets."""
    parser.add_argument("--api-key-file", metavar="PATH", help="a file with the API key (default: SEKUIRE_API_KEY)")
    add_connection(parser)


def add_action(
    actions: Any,
    name: str,
    act: Callable[[argparse.Namespace, SekuireClient], int],
    text: str,
    *,
    has_json: bool = False,
    allow_abbrev: bool = False,
) -> argparse.ArgumentParser:
    """Add an action to a command whose ``run`` is :func:`run_action`, and return its parser.

    :param act: what the action does.
    :param text: what it does, in a few words, for the help.
    """
    one: argparse.ArgumentParser = actions.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        parents=[logging_options()],
        allow_abbrev=allow_abbrev,
    )
    if has_json:
        one.add_argument("--json", action="store_true", help="print JSON, with everything that the platform says")
    add_access(one)
    one.set_defaults(act=act)
    return one


def run_action(args: argparse.Namespace) -> int:
    """Do what an action of :func:`add_action` does, with a client."""
    with client_for(args) as client:
        code: int = args.act(args, client)
    return code


@contextlib.contextmanager
def client_for(
    args: argparse.Namespace, *, agent_id: Optional[str] = None, retry_for: Optional[float] = None
) -> Iterator[SekuireClient]:
    """Return a context with a client by the options of the command line.

    :param retry_for: seconds for which a call is sent again; None: :data:`RETRY_FOR`.
    :raises CommandError: the platform refuses the key.
    """
    config = connection(args)
    key, source = api_key(args.api_key_file)
    shared = {field.name: getattr(config, field.name) for field in attrs.fields(ConnectionConfig)}
    try:
        with SekuireClient(
            api_key=key,
            agent_id=agent_id,
            retry_for=RETRY_FOR if retry_for is None else retry_for,
            max_result_bytes=_MOST_OF_A_TASK,
            **shared,
        ) as client:
            yield client
        return
    except APIError as error:
        refusal = error
    if refusal.status in (401, 403):
        raise CommandError(f"the platform refused the API key from {source}: {refusal}", code=FAILED)
    raise refusal


def agent_of(args: argparse.Namespace, question: str) -> str:
    """Return the agent that ``--agent-id`` or the environment names.

    :raises CommandError: neither does, or it is not an id.
    """
    agent_id: Optional[str] = args.agent_id or variable(ENVIRONMENT["agent_id"])
    if not agent_id:
        raise CommandError(f"{question} give --agent-id, or set SEKUIRE_AGENT_ID")
    if not protocol.is_id(agent_id):
        source = "--agent-id" if args.agent_id else "SEKUIRE_AGENT_ID"
        raise CommandError(f"{source}: must be at most 256 bytes without control characters, got {agent_id!r}")
    return agent_id


def each(command: str, ids: Sequence[str], act: Callable[[str], str], *, passed: Sequence[int] = (401, 403)) -> int:
    """Do something with each id, and print a line about it. Go on after one that is refused.

    :param act: returns the line.
    :param passed: statuses of refusals that hold for all, which are raised.
    """
    code = OK
    for one in dict.fromkeys(ids):
        try:
            terminal.say(act(one))
        except APIError as error:
            if error.status in passed or protocol.is_transient(error.status):
                raise
            complain(command, f"{one}: {error}")
            code = FAILED
    return code


def options_given(args: argparse.Namespace) -> List[str]:
    """Return the options of this command line that another command needs to ask the same platform."""
    found: List[str] = []
    for name in ("env_file", "url", "api_key_file"):
        value = getattr(args, name, None)
        if value is not None:
            found += [f"--{name.replace('_', '-')}", value]
    return [*found, "--allow-insecure-http"] if getattr(args, "allow_insecure_http", False) else found


def seconds(text: str) -> float:
    """Return a number of seconds, for argparse: such as 90, 1.5, 10m, 2h or 1d."""
    units = {"s": 1, "m": 60, "h": 3600, "d": 24 * 3600}
    number, unit = (text[:-1], units[text[-1]]) if text[-1:] in units else (text, 1)
    try:
        found = float(number) * unit
    except ValueError:
        found = -1.0
    if not 0 <= found <= protocol.MAX_DURATION:
        raise argparse.ArgumentTypeError(f"must be seconds up to 30 days, such as 90, 10m, 2h or 1d, got {text!r}")
    return found


def whole(text: str) -> int:
    """Return a whole number of 1 or more, for argparse."""
    if not text.isascii() or not text.isdigit() or not 1 <= int(text[:12]) < 2**31:
        raise argparse.ArgumentTypeError(f"must be a whole number, 1 or more, got {text!r}")
    return int(text)
