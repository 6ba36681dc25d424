"""Submit a task to an agent, and wait for its result if asked to: ``sekuire send``."""

from __future__ import annotations

import argparse
import json
import math
import time
from typing import Any, Callable, Dict, NoReturn, Optional, TypeVar

from ..client import TaskSubmitter
from ..config import ENVIRONMENT, check_capability, variable
from ..errors import APIError, SekuireError
from ..transport.http import Reply
from ..transport.retry import is_retryable
from ..wire import protocol
from . import terminal
from .exits import FAILED, OK, CommandError, complain
from .options import add_connection, api_key, connection, read_input

_T = TypeVar("_T")

HELP = "submit a task, and wait for its result with --wait"
DESCRIPTION = """\
Submit a task to an agent and print its id; with --wait, print its output as JSON when it is completed. The API key is
taken from SEKUIRE_API_KEY or a file, not from the command line, which other users of the machine can read."""
EPILOG = """\
example:  sekuire send summarize '{"text": "Once upon a time"}' --wait 30

Exit codes: 0 submitted, or completed with --wait; 1 refused, failed or not ended in time; 2 wrong usage or
configuration; 130 interrupted (the task goes on)."""
LOG_LEVEL = "warning"

_FIRST_POLL, _LONGEST_POLL = 0.05, 1.0
#: Seconds for which the platform may be unreachable before the wait for a result ends.
_PATIENCE = 60.0
#: MiB.
_LONGEST_INPUT = 32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("capability", metavar="CAPABILITY", help="what is to be done, such as summarize")
    parser.add_argument("json", metavar="JSON", help="the input: JSON text, @FILE, or - for stdin")
    parser.add_argument(
        "--wait",
        nargs="?",
        type=_wait,
        const=math.inf,
        metavar="SECONDS",
        help="wait for the result, without limit or so many seconds; write it last, or --wait=SECONDS",
    )
    parser.add_argument("--agent-id", metavar="ID", help="the agent that gets the task (default: SEKUIRE_AGENT_ID)")
    parser.add_argument("--api-key-file", metavar="PATH", help="a file with the API key (default: SEKUIRE_API_KEY)")
    add_connection(parser)
    parser.add_argument("--timeout-ms", type=_count, metavar="MS", help="how long the task's handler may run")
    parser.add_argument("--max-attempts", type=_count, metavar="N", help="how often to try when it fails retryably")
    parser.add_argument("--trace-id", metavar="ID", help="an id that travels with the task, to find it in traces")


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


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text[:12]) < 2**31:
        raise argparse.ArgumentTypeError(f"must be a whole number, 1 or more, got {text!r}")
    return int(text)


def run(args: argparse.Namespace) -> int:
    capability = check_capability(args.capability, "CAPABILITY")
    value = _parse(*_input(args.json))
    agent_id = args.agent_id or variable(ENVIRONMENT["agent_id"])
    if not agent_id:
        raise CommandError("whose task is it? give --agent-id, or set SEKUIRE_AGENT_ID")
    if not protocol.is_id(agent_id):
        source = "--agent-id" if args.agent_id else "SEKUIRE_AGENT_ID"
        raise CommandError(f"{source}: must be at most 256 bytes without control characters, got {agent_id!r}")
    config = connection(args)
    key, key_source = api_key(args.api_key_file)
    fields = {name: getattr(args, name) for name in ("timeout_ms", "max_attempts", "trace_id")}
    submitter = TaskSubmitter(config, key, pool_size=1)
    try:
        client = _Client(submitter, key_source)
        task_id = client.submit(
            capability, value, agent_id, {name: one for name, one in fields.items() if one is not None}
        )
        if args.wait is None:
            terminal.say(task_id)
            return OK
        terminal.note(f"task {task_id}")
        return _show(client.wait(task_id, args.wait, f"agent {agent_id!r} with the capability {capability!r}"))
    finally:
        submitter.close()


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


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _parse(text: str, where: str) -> Any:
    hint = """; in a shell, quote the whole: '{"text": "hello"}'""" if where == "JSON" else ""
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        problem = f"line {error.lineno}, column {error.colno}: {error.msg}{hint}"
    except RecursionError:
        problem = "is nested too deep"
    except ValueError as error:
        problem = str(error)
    raise CommandError(f"{where}: {problem}")


# -- the platform -----------------------------------------------------------------------------------------------------


class _Client:
    """Submit a task and ask for its result, with an API key."""

    def __init__(self, submitter: TaskSubmitter, key_source: str) -> None:
        self._submitter = submitter
        self._http = submitter.http
        self._key_source = key_source

    def submit(self, capability: str, value: Any, agent_id: str, fields: Dict[str, Any]) -> str:
        """Submit a task and return its id."""
        try:
            return self._naming_the_key(lambda: self._submitter.submit(capability, value, agent_id, **fields))
        except APIError as error:
            problem = error
        if problem.status < 500:
            raise problem
        # What failed may have done so after the task was queued.
        raise CommandError(f"{problem}; whether the task was submitted is not known", code=FAILED)

    def wait(self, task_id: str, seconds: float, whose: str) -> Dict[str, Any]:
        """Ask for the task until it has ended, and return it.

        :raises CommandError: the task has not ended in time.
        :raises SekuireError: the platform has been unreachable for a minute, or refuses to answer.
        """
        end = time.monotonic() + seconds
        lost_since: Optional[float] = None
        path = self._http.endpoints.path("task", task_id=task_id)
        pause = _FIRST_POLL
        status = "submitted"
        while True:
            now = time.monotonic()
            try:
                task = _task(self._ask(path))
            except SekuireError as error:
                lost_since = now if lost_since is None else lost_since
                if not is_retryable(error) or now - lost_since > _PATIENCE:
                    raise
            else:
                lost_since = None
                status = str(task.get("status"))
                if status in ("completed", "failed"):
                    return task
            left = end - time.monotonic()
            if left <= 0:
                break
            time.sleep(min(pause, left))
            pause = min(pause * 1.5, _LONGEST_POLL)
        hint = f"; is a worker running for {whose}?" if status == "queued" else ""
        raise CommandError(f"task {task_id} is still {status} after {seconds:g} s{hint}", code=FAILED)

    def _ask(self, path: str) -> Reply:
        return self._naming_the_key(
            lambda: self._http.request("GET", path, credential=self._submitter.credential).check()
        )

    def _naming_the_key(self, call: Callable[[], _T]) -> _T:
        """Return the result of ``call``. Name the origin of an API key that is refused."""
        try:
            return call()
        except APIError as error:
            refusal = error
        if refusal.status in (401, 403):
            raise CommandError(f"the platform refused the API key from {self._key_source}: {refusal}", code=FAILED)
        raise refusal


def _task(reply: Reply) -> Dict[str, Any]:
    try:
        task = reply.json()
    except protocol.Malformed:
        task = None
    if not isinstance(task, dict):
        raise CommandError("the platform's answer is not a task; is the URL a Sekuire platform's?", code=FAILED)
    return task


def _show(task: Dict[str, Any]) -> int:
    if task["status"] == "completed":
        terminal.say(json.dumps(task.get("output"), indent=2, ensure_ascii=False))
        return OK
    error = task.get("error")
    error = error if isinstance(error, dict) else {}
    advice = " (trying again may help)" if error.get("retryable") is True else ""
    lines = [f"the task failed: {error.get('code')}: {error.get('message')}{advice}"]
    if error.get("details"):
        lines.append(f"details: {json.dumps(error['details'], ensure_ascii=False)}")
    complain("send", *lines)
    return FAILED
