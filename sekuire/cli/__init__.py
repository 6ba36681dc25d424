"""Run the ``sekuire`` command: parse the command line, run one command and return an exit code.

Exit codes: 0 fine, 1 failed, 2 wrong usage or configuration, 130 interrupted. Results go to stdout. Progress, logs and
errors go to stderr. A user's mistake is reported in a line or two, without a traceback.
"""

from __future__ import annotations

import argparse
from typing import Optional, Sequence

from ..errors import SekuireError
from ..version import __version__
from . import demo, dev, doctor, policy, send, terminal, worker
from .exits import FAILED, INTERRUPTED, CommandError, complain, report
from .options import logging_options

__all__ = ["main"]


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command line ``argv`` (None: this process's own) and return the exit code.

    :raises SystemExit: raised by argparse for ``--help``, ``--version`` and wrong usage.
    """
    terminal.prepare()
    try:
        args = _parser().parse_args(argv)
    except SystemExit:
        terminal.flush_output()
        raise
    level = "debug" if getattr(args, "verbose", False) else getattr(args, "log_level", args.default_level)
    with terminal.logs(level.upper()):
        try:
            code: int = args.run(args)
        except (CommandError, SekuireError) as error:
            code = report(args.command, error)
        except KeyboardInterrupt:
            complain(args.command, "interrupted")
            code = INTERRUPTED
        except terminal.OutputClosed:
            code = FAILED
        finally:
            terminal.flush_output()
    return code


def _parser() -> argparse.ArgumentParser:
    common = logging_options()
    parser = argparse.ArgumentParser(
        prog="sekuire",
        description="Run AI agents' tasks under Sekuire's governance.",
        epilog="Exit codes: 0 fine, 1 failed, 2 wrong usage or configuration, 130 interrupted.",
        parents=[common],
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"sekuire {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    for module in (demo, dev, worker, send, policy, doctor):
        name = module.__name__.rpartition(".")[2]
        one = commands.add_parser(
            name,
            help=module.HELP,
            description=module.DESCRIPTION,
            epilog=module.EPILOG,
            parents=[common],
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(one)
        one.set_defaults(run=module.run, default_level=module.LOG_LEVEL)
    return parser
