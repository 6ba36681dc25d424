"""Run the ``sekuire`` command: parse the command line, run one command and return an exit code.

Exit codes: 0 fine, 1 failed, 2 wrong usage or configuration, 130 interrupted. Results go to stdout. Progress, logs and
errors go to stderr. A user's mistake is reported in a line or two, without a traceback.

This module imports nothing else at its top. What a command needs is imported while :func:`main` handles Ctrl-C.
"""

from __future__ import annotations

TYPE_CHECKING = False  # typing itself takes as long to import as the rest of this package.
if TYPE_CHECKING:
    import argparse
    from types import FrameType
    from typing import Any, Optional, Sequence

__all__ = ["main"]


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command line ``argv`` (None: this process's own) and return the exit code.

    :raises SystemExit: raised by argparse for ``--help``, ``--version`` and wrong usage.
    """
    try:
        args = _read(argv)
        return _run(args)
    except KeyboardInterrupt:
        from .exits import INTERRUPTED, complain

        complain("", "interrupted")
        return INTERRUPTED


def _read(argv: Optional[Sequence[str]]) -> argparse.Namespace:
    """Return the arguments of the command, whose module is loaded then."""
    # A program that calls main() may have more to do at Ctrl-C than to end.
    before = _end_at_once() if argv is None else None
    try:
        from .parsing import parse

        args = parse(argv)
        from . import options, terminal  # noqa: F401  # What _run() needs.
    finally:
        _restore(before)
    return args


def _run(args: argparse.Namespace) -> int:
    from ..errors import SekuireError
    from . import terminal
    from .exits import FAILED, INTERRUPTED, CommandError, complain, report
    from .options import env_file, logs
    from .streams import flush_output

    try:
        context = logs(args)
    except SekuireError as error:
        return report(args.command, error)
    with context:
        try:
            with env_file(args):
                code: int = args.run(args)
        except (CommandError, SekuireError) as error:
            code = report(args.command, error)
        except KeyboardInterrupt:
            complain(args.command, "interrupted")
            code = INTERRUPTED
        except terminal.OutputClosed:
            code = FAILED
        finally:
            flush_output()
    return code


# -- Ctrl-C during the start ------------------------------------------------------------------------------------------


def _end_at_once() -> Any:
    """End the process at Ctrl-C. Return what handled it before, None if nothing was changed.

    A KeyboardInterrupt in the middle of an import may be shown with a traceback and ignored: Python calls code of its
    own there that cannot pass it on.
    """
    import signal

    before = signal.getsignal(signal.SIGINT)
    # Where it is ignored (nohup, a background job) it stays ignored. Another handler belongs to the calling program.
    if before is not signal.default_int_handler:
        return None
    try:
        signal.signal(signal.SIGINT, _end)
    except ValueError:
        return None  # This is not the main thread.
    return before


def _restore(before: Any) -> None:
    if before is not None:
        import signal

        signal.signal(signal.SIGINT, before)


def _end(number: int, frame: Optional[FrameType]) -> None:
    import os

    try:
        # Not by sys.stderr, which the signal may have interrupted.
        os.write(2, b"sekuire: error: interrupted\n")
    except OSError:
        pass
    os._exit(130)
