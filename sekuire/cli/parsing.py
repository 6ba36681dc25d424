"""Parse a command line. Of the commands' modules only the one that the command line names is loaded."""

from __future__ import annotations

import argparse
import importlib
import sys

from ..version import __version__
from .streams import flush_output, prepare

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Dict, Optional, Sequence

__all__ = ["COMMANDS", "parse"]

#: What ``sekuire --help`` says of each command. Its module has the same name.
COMMANDS: Dict[str, str] = {
    "demo": "show the whole path of a task, on a platform of its own",
    "dev": "run a local platform to develop against",
    "worker": "run the handlers of a module of yours",
    "status": "show the health of a worker on this machine; for probes too",
    "send": "submit a task, and wait for its result with --wait",
    "tasks": "list tasks, follow them, wait for them, cancel and retry them",
    "installations": "list an agent's installations, pause, resume, terminate and revoke them",
    "tokens": "make install tokens, with which agents log in",
    "approvals": "list what tasks ask a person for, and approve or deny it",
    "capabilities": "show a worker's capabilities, with the schemas of input and result",
    "policy": "see and verify the workspace's policy, and ask what it allows",
    "id": "calculate an agent's SekuireID",
    "doctor": "check the configuration, and say how to fix it",
}

LEVELS = ("debug", "info", "warning", "error")
FORMATS = ("text", "json")


def parse(argv: Optional[Sequence[str]]) -> argparse.Namespace:
    """Return the arguments of ``argv`` (None: this process's own), with ``run``, the command's function.

    :raises SystemExit: raised by argparse for ``--help``, ``--version`` and wrong usage.
    """
    prepare()
    try:
        args = _parser().parse_args(argv)
    except SystemExit:
        flush_output()
        raise
    # For a command that says how to continue it, and that may end the process if it is its own.
    args.argv = list(sys.argv[1:] if argv is None else argv)
    args.owns_process = argv is None
    return args


def _parser() -> argparse.ArgumentParser:
    common = logging_options()
    parser = argparse.ArgumentParser(
        prog="sekuire",
        description="Run AI agents' tasks under Sekuire's governance.",
        epilog="Exit codes: 0 fine, 1 failed, 2 wrong usage or configuration, 130 interrupted.",
        parents=[common],
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_ShowVersion, nargs=0, help="show the version and exit")
    # With `prog`, which argparse would format otherwise: its formatter imports what asks for the terminal's width.
    commands: Any = parser.add_subparsers(
        title="commands",
        dest="command",
        metavar="COMMAND",
        required=True,
        prog=parser.prog,
        parser_class=_CommandParser,
    )
    for name, text in COMMANDS.items():
        commands.add_parser(
            name,
            help=text,
            parents=[common],
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        ).name = name
    return parser


class _ShowVersion(argparse.Action):
    """Print the version. The action of argparse would wrap the line, with the same formatter."""

    def __call__(self, parser: argparse.ArgumentParser, *args: object) -> None:
        sys.stdout.write(f"sekuire {__version__}\n")
        parser.exit()


class _CommandParser(argparse.ArgumentParser):
    """Load the command's module, which has its arguments, when the command line names the command."""

    #: Empty for the parser of an action of a command.
    name = ""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self.name:
            module = importlib.import_module(f"{__package__}.{self.name}")
            self.name = ""
            self.description, self.epilog = module.DESCRIPTION, module.EPILOG
            module.add_arguments(self)
            self.set_defaults(run=module.run, default_level=module.LOG_LEVEL)
        return super().parse_known_args(args, namespace)


def logging_options() -> argparse.ArgumentParser:
    """Return a parent parser with the logging options. Options that are not given are not set."""
    parent = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    group = parent.add_argument_group("logging")
    group.add_argument(
        "-v", "--verbose", action="count", help="log all that the library does to stderr; -vv: other packages too"
    )
    group.add_argument("-q", "--quiet", action="store_true", help="print no lines on what happens, only errors")
    group.add_argument("--log-level", choices=LEVELS, type=str.lower, help="log to stderr from this level on")
    group.add_argument(
        "--log-format",
        choices=FORMATS,
        type=str.lower,
        help="what is on stderr: text, or one JSON object a line (default: SEKUIRE_LOG_FORMAT, or text)",
    )
    return parent
