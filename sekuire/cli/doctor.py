"""Show whether an agent can work with this machine's configuration: ``sekuire doctor``."""

from __future__ import annotations

import argparse
import json
from typing import Optional

from ..config import ConnectionConfig
from ..errors import ConfigurationError
from ..secret import Secret
from ..service.doctor import Configuration, examine
from ..service.findings import GOOD, WARNING, WRONG, Finding, Findings
from . import terminal
from .exits import CommandError
from .options import add_connection, api_key, connection

DESCRIPTION = """\
Check, step by step, what an agent on this machine would find: the environment variables, the credentials file, the
network up to the platform, and whether the platform accepts the credentials. Nothing is used up: install and refresh
tokens are not sent. With a runtime token and an installation id one heartbeat is sent, as the agent itself would."""
EPILOG = "Exit codes: 0 all is well (there may be warnings), 1 the platform cannot be used, 2 a setting is wrong."
LOG_LEVEL = "error"

_COLOURS = {GOOD: "green", WARNING: "yellow", WRONG: "red"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print all findings as one JSON object")
    parser.add_argument("--api-key-file", metavar="PATH", help="a file with the API key (default: SEKUIRE_API_KEY)")
    add_connection(parser)


def run(args: argparse.Namespace) -> int:
    findings = Findings((lambda finding: None) if args.json else _show)
    examine(_CommandLine(args), findings)
    if args.json:
        terminal.say(json.dumps(findings.as_json(), indent=2))
    else:
        terminal.say()
        terminal.say(findings.verdict())
    return findings.exit_code


def _show(finding: Finding) -> None:
    colour = _COLOURS.get(finding.state)
    label = finding.state.ljust(8)
    for line in finding.lines(terminal.paint(label, colour) if colour else label):
        terminal.say(line)


class _CommandLine(Configuration):
    """The environment, under the options of the command line."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args

    def key_from_file(self) -> Optional[Secret]:
        if self._args.api_key_file is None:
            return None
        try:
            return api_key(self._args.api_key_file)[0]
        except CommandError as error:
            problem = "; ".join(error.lines)
        raise ConfigurationError(problem)

    def connection(self) -> ConnectionConfig:
        return connection(self._args)
