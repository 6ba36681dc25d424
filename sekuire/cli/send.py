"""Submit a task to an agent, and wait for its result if asked to: ``sekuire send``."""

from __future__ import annotations

import argparse
import json
import math
import os
from typing import Any, Dict

from ..config import check_capability
from ..wire import protocol
from . import terminal
from .access import add_access, agent_of, client_for, seconds, whole
from .exits import OK, CommandError
from .options import read_input
from .results import wait_and_print

DESCRIPTION = """\
Submit a task to an agent and print its id; with --wait, print its output as
JSON when it is completed. With --jsonl or --csv, submit a task for each line
of a file, and print a JSON object for each. The API key is taken from
SEKUIRE_API_KEY or a file, not from the command line, which other users of the
machine can read."""
EPILOG = """\
examples:
  sekuire send summarize '{"text": "Once upon a time"}' --wait 30
  sekuire send invoice orders.csv --csv --wait > results.jsonl

A job that was interrupted is continued by the same command: lines that were
sent keep their tasks.

Exit codes: 0 submitted, or completed with --wait; 1 refused, failed or not
ended in time; 2 wrong usage or configuration; 130 interrupted (tasks go on)."""
LOG_LEVEL = "warning"

#: MiB.
_LONGEST_INPUT = 32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("capability", metavar="CAPABILITY", help="what is to be done, such as summarize")
    parser.add_argument(
        "json", metavar="JSON", help="the input: JSON text, @FILE, or - for stdin; with --jsonl and --csv: FILE, or -"
    )
    parser.add_argument(
        "--wait",
        nargs="?",
        type=_wait,
        const=math.inf,
        metavar="SECONDS",
        help="wait for the result, without limit or so many seconds; write it last, or --wait=SECONDS",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="send it only if it fits the schema that the agent's workers have published",
    )
    parser.add_argument("--agent-id", metavar="ID", help="the agent that gets the task (default: SEKUIRE_AGENT_ID)")
    add_access(parser)
    parser.add_argument(
        "--delay", type=seconds, metavar="SECONDS", help="begin it no sooner than in so many seconds, such as 90 or 10m"
    )
    parser.add_argument(
        "--expires-in", type=_some_seconds, metavar="SECONDS", help="let it fail (expired) if it has not begun by then"
    )
    parser.add_argument(
        "--idempotency-key", metavar="KEY", help="within 24 hours the same key gets the same task (default: a new key)"
    )
    parser.add_argument("--timeout-ms", type=whole, metavar="MS", help="how long the task's handler may run")
    parser.add_argument("--max-attempts", type=whole, metavar="N", help="how often to try when it fails retryably")
    parser.add_argument("--trace-id", metavar="ID", help="an id that travels with the task, to find it in traces")
    many = parser.add_argument_group("a task for each line of a file")
    many.add_argument("--jsonl", action="store_true", help="each line of FILE is an input, as JSON")
    many.add_argument(
        "--csv",
        action="store_true",
        help="each row of FILE is an input: an object of texts, named by the header",
    )
    many.add_argument("--delimiter", type=_delimiter, default=",", metavar="C", help="between CSV columns (,), or tab")
    many.add_argument("--job", metavar="NAME", help="what to call the job, to continue it (default: the file's name)")
    many.add_argument(
        "--key-field", metavar="NAME", help="the field that tells a line from all others (default: number and content)"
    )
    many.add_argument("--again", action="store_true", help="begin a job once more: each line makes a new task")
    many.add_argument("--job-dir", metavar="DIR", help="where to note when a job began (default: .sekuire/jobs)")


def _delimiter(text: str) -> str:
    found = {"tab": "\t", "\\t": "\t"}.get(text, text)
    if len(found) != 1 or found in '\r\n"':
        raise argparse.ArgumentTypeError(f"must be one character, or tab, got {text!r}")
    return found


def _wait(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not seconds >= 0:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number of seconds; write --wait after CAPABILITY and JSON, or --wait=SECONDS"
        )
    return seconds


def _some_seconds(text: str) -> float:
    found = seconds(text)
    if not found:
        raise argparse.ArgumentTypeError("must be more than 0")
    return found


def run(args: argparse.Namespace) -> int:
    capability = check_capability(args.capability, "CAPABILITY")
    if args.jsonl or args.csv:
        return _send_many(args, capability)
    for option in ("job", "key_field", "again", "job_dir"):
        if getattr(args, option) not in (None, False):
            raise CommandError(f"--{option.replace('_', '-')} goes with --jsonl or --csv")
    value = _parse(*_input(args.json))
    agent_id = agent_of(args, "whose task is it?")
    with client_for(args, agent_id=agent_id) as client:
        if args.check:
            from .check import check_input

            check_input(client, capability, value, agent_id)
        handle = client.submit(capability, value, idempotency_key=args.idempotency_key, **fields_of(args))
        if args.wait is None:
            terminal.say(handle.id)
            return OK
        return wait_and_print(args, handle, args.wait, f"agent {agent_id!r} with the capability {capability!r}")


def _send_many(args: argparse.Namespace, capability: str) -> int:
    from .bulk import RETRY_FOR, run_job

    if args.jsonl and args.csv:
        raise CommandError("give --jsonl or --csv, not both")
    if args.idempotency_key:
        raise CommandError("--idempotency-key is for one task; of a job each line has a key, or give --key-field NAME")
    agent_id = agent_of(args, "whose tasks are they?")
    with client_for(args, agent_id=agent_id, retry_for=RETRY_FOR) as client:
        return run_job(args, client, agent_id, fields_of(args), args.wait)


def fields_of(args: argparse.Namespace) -> Dict[str, Any]:
    """Return the fields of a task that options give, by the names of ``SekuireClient.submit``."""
    return {
        "timeout": None if args.timeout_ms is None else args.timeout_ms / 1000,
        "delay": args.delay,
        "expires_in": args.expires_in,
        "max_attempts": args.max_attempts,
        "trace_id": args.trace_id,
    }


# -- the input --------------------------------------------------------------------------------------------------------


def _input(argument: str) -> tuple[str, str]:
    """Return the JSON text and a name for its origin."""
    if argument != "-" and not argument.startswith("@"):
        return argument, "JSON"
    where = "stdin" if argument == "-" else argument[1:]
    data, problem = read_input(None if argument == "-" else where, _LONGEST_INPUT)
    try:
        if not problem:
            return data.decode("utf-8-sig"), where
    except UnicodeDecodeError:
        problem = "it is not UTF-8 text"
    raise CommandError(f"cannot read the input from {where!r}: {problem}")


def _is_file(text: str) -> bool:
    try:
        return os.path.isfile(text)
    except ValueError:  # A NUL.
        return False


def _parse(text: str, where: str) -> Any:
    hint = """; in a shell, quote the whole: '{"text": "hello"}'""" if where == "JSON" else ""
    if where == "JSON" and _is_file(text):
        hint = f"; {text} is a file: give @{text} for its JSON, or add --jsonl or --csv for a task for each line"
    try:
        return json.loads(text, parse_constant=protocol.refuse_constant)
    except json.JSONDecodeError as error:
        problem = f"line {error.lineno}, column {error.colno}: {error.msg}{hint}"
    except RecursionError:
        problem = "is nested too deep"
    except ValueError as error:
        problem = str(error)
    raise CommandError(f"{where}: {problem}")
