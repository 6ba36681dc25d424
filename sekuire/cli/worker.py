"""Run the handlers of the user's own module as a process that stops in order: ``sekuire worker``."""

from __future__ import annotations

import argparse
import difflib
import importlib
import inspect
import logging
import os
import sys
import traceback
from types import ModuleType, TracebackType
from typing import Any, Dict, Optional, Tuple

from ..config import (
    CREDENTIALS_FILE_VARIABLE,
    ENVIRONMENT,
    file_in_use,
    shown_address,
    source_of,
    variable,
    with_source,
)
from ..errors import ConfigurationError, SekuireError
from ..handlers.registry import TaskRegistry
from ..sdk import SekuireSDK
from ..service import runner
from ..service.arguments import IDLE_WITH_RELOAD, add_worker_arguments
from ..service.reloader import Reloader
from ..worker.worker import Worker
from . import terminal
from .exits import CommandError, lines_of_process, report
from .options import add_env_file

DESCRIPTION = """\
Import MODULE, with the current directory first on the path, and run its NAME: a sekuire.TaskRegistry, whose worker is
made from the SEKUIRE_... variables; a sekuire.Worker; or a function without arguments that returns one of these.
SIGTERM and Ctrl-C let running tasks end, give waiting ones back and send the last heartbeat; a second signal, a second
or more after the first, ends the process."""
EPILOG = """\
example:  sekuire worker summarizer:tasks          (summarizer.py holds tasks = TaskRegistry() and its handlers)
          sekuire worker summarizer:tasks --reload (while you write summarizer.py)

Exit codes: 0 stopped by SIGTERM, by the platform (terminated, revoked) or by itself (idle); 1 the platform refused it,
or it failed; 2 the module or the configuration is wrong; 130 stopped by Ctrl-C;
128 + its number (130, 143) ended by a second signal."""
LOG_LEVEL = "info"

_WANTED = "a sekuire.TaskRegistry or a sekuire.Worker"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="MODULE:NAME", help="such as summarizer:tasks or package.agents:make_worker")
    add_worker_arguments(parser)
    add_env_file(parser)
    parser.add_argument(
        "--reload-dir",
        action="append",
        metavar="DIR",
        help="watch this directory and what is below it instead of the current one; may be repeated",
    )


def run(args: argparse.Namespace) -> int:
    if args.reload:
        if args.stop_when_idle is not None:
            raise CommandError(IDLE_WITH_RELOAD)
        return _reload(args)
    if args.reload_dir:
        raise CommandError("--reload-dir goes with --reload")

    def make() -> Worker:
        worker = find(args.target, args.max_workers)
        _set_address(worker, args.http)
        if args.stop_when_idle is not None:
            worker.reconfigure(stop_when_idle=args.stop_when_idle)
        return worker

    return runner.run(make, lambda error: report("worker", error), args.liveness_file)


def _set_address(worker: Worker, given: Optional[Tuple[str, int]]) -> None:
    """Show the worker where the option says or, if its module does not say it, the variable."""
    if given is None and worker.config.health is None:
        name = ENVIRONMENT["health"]
        text = variable(name, "health")
        if text is None:
            return
        try:
            worker.reconfigure(health=text)
            return
        except ConfigurationError as error:
            found = error
        raise with_source(found, {"health": source_of(name)})
    if given is not None:
        worker.reconfigure(health=given)


def _reload(args: argparse.Namespace) -> int:
    # Checks the form only: the child reports what the module holds, after each save.
    _split(args.target)
    command = [sys.executable, "-m", "sekuire", "worker", args.target]
    if args.max_workers is not None:
        command += ["--max-workers", str(args.max_workers)]
    if args.http is not None:
        command += ["--http", shown_address(args.http)]
    if args.liveness_file is not None:
        command += ["--liveness-file", args.liveness_file]
    if args.env_file is not None:
        command += ["--env-file", args.env_file]
    command += ["--verbose"] * getattr(args, "verbose", 0)
    if getattr(args, "quiet", False):
        command.append("--quiet")
    if hasattr(args, "log_level"):
        command += ["--log-level", args.log_level]
    if hasattr(args, "log_format"):
        command += ["--log-format", args.log_format]
    file = file_in_use()
    for name in () if file is None else file.values:
        # The child reads the file itself, and so knows what comes from it. The reloader needs to know the one.
        if name != CREDENTIALS_FILE_VARIABLE:
            os.environ.pop(name, None)
    paths = args.reload_dir or [os.getcwd()]
    return Reloader(command, paths, say=lambda line: terminal.note(f"reload: {line}")).run()


# -- finding ----------------------------------------------------------------------------------------------------------


def find(target: str, max_workers: Optional[int] = None) -> Worker:
    """Return the worker that ``target`` names, not yet started.

    :raises CommandError: there is no such worker; the text says why.
    :raises SekuireError: the user's module raised it.
    """
    name, attribute = _split(target)
    module = _import(name)
    found: Any = module
    for part in attribute.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            break
    else:
        return _worker_of(_made(target, found, max_workers), target, max_workers)
    raise CommandError(f"the module {name!r} has no {attribute!r}; {_candidates(module, attribute)}")


def _split(target: str) -> Tuple[str, str]:
    """Return the module's name and the attribute.

    :raises CommandError: ``target`` is not of this form.
    """
    name, _, attribute = target.partition(":")
    if not name or not attribute:
        raise CommandError(f"{target!r} is not of the form MODULE:NAME, such as summarizer:tasks")
    if name.endswith(".py") or "/" in name or "\\" in name:
        dotted = (name[:-3] if name.endswith(".py") else name).replace("\\", ".").replace("/", ".").strip(".")
        raise CommandError(f"{name!r} is a file; name the module, such as {dotted}:{attribute}")
    return name, attribute


def _import(name: str) -> ModuleType:
    folder = os.getcwd()
    if sys.path[:1] != [folder]:
        sys.path.insert(0, folder)
    problem: Tuple[str, ...]
    try:
        return importlib.import_module(name)
    except (SekuireError, CommandError):
        raise
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            problem = (_missing(name, error.name, folder),)
        else:
            problem = _trace(error, f"importing {name!r} failed")
    except SystemExit as error:
        problem = (
            f"importing {name!r} ended with sys.exit({'' if error.code is None else error.code}); what a script does "
            "belongs under: if __name__ == '__main__':",
        )
    except Exception as error:  # noqa: BLE001  # Whatever the user's module raises.
        problem = _trace(error, f"importing {name!r} failed")
    raise CommandError(*problem)


def _missing(name: str, missing: str, folder: str) -> str:
    modules = [os.path.splitext(one)[0] for one in os.listdir(folder) if one.endswith(".py") or "." not in one]
    close = difflib.get_close_matches(missing, modules, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"start it in the directory that holds {missing}.py"
    return f"there is no module {missing!r} in {folder} or on the path; {hint}"


def _trace(error: BaseException, what: str) -> Tuple[str, ...]:
    """Print the user's own part of the traceback, and return the line to write below it."""
    tb = error.__traceback__
    while tb is not None and _is_ours(tb):
        tb = tb.tb_next
    # Not through the log, which may hide it: the traceback must be seen at every level.
    try:
        shown = "".join(traceback.format_exception(type(error), error, tb))
        sys.stderr.write(lines_of_process.made(logging.ERROR, what, shown))
    except (OSError, ValueError, AttributeError):
        pass
    return (f"{what}: {type(error).__name__}: {error}",)


def _is_ours(tb: TracebackType) -> bool:
    name = tb.tb_frame.f_code.co_filename
    return name == __file__ or "importlib" in name


def _made(target: str, found: Any, max_workers: Optional[int]) -> Any:
    """Return ``found``, or what it returns if it is a function."""
    if isinstance(found, (Worker, TaskRegistry)):
        return found
    if isinstance(found, SekuireSDK):
        raise CommandError(f"{target} is a SekuireSDK; name a TaskRegistry, or a worker of its create_task_worker(...)")
    if inspect.isclass(found) or not callable(found):
        what = f"the class {found.__name__}" if inspect.isclass(found) else f"a {type(found).__name__}"
        raise CommandError(f"{target} is {what}; it must be {_WANTED}, or a function that returns one")
    if inspect.iscoroutinefunction(found):
        raise CommandError(f"{target} is an async function; make it a plain one that returns {_WANTED}")
    try:
        parameters = inspect.signature(found).parameters
    except (TypeError, ValueError):
        parameters = {}  # type: ignore[assignment]  # A callable without a signature: try it.
    options = {"max_workers": max_workers} if max_workers is not None and "max_workers" in parameters else {}
    needed = [
        one.name
        for one in parameters.values()
        if one.default is one.empty
        and one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)
        and one.name not in options
    ]
    if needed == ["max_workers"]:
        raise CommandError(f"{target} needs max_workers; give --max-workers N")
    if needed:
        raise CommandError(f"{target} needs arguments ({', '.join(needed)}); it is called without any")
    try:
        return found(**options)
    except (SekuireError, CommandError):
        raise
    except Exception as error:  # noqa: BLE001  # Whatever the user's function raises.
        problem = _trace(error, f"{target} failed")
    raise CommandError(*problem)


def _worker_of(worker: Any, target: str, max_workers: Optional[int]) -> Worker:
    """Return the worker that ``target`` is, or a new one with the handlers of the registry that it is."""
    if isinstance(worker, TaskRegistry):
        if worker.is_empty():
            raise CommandError(f'{target} has no handlers; declare one with @{target.rpartition(":")[2]}.task("name")')
        options: Dict[str, Any] = {} if max_workers is None else {"max_workers": max_workers}
        made = SekuireSDK.from_env().create_task_worker(**options)
        made.include(worker)
        return made
    if not isinstance(worker, Worker):
        raise CommandError(f"{target} returned a {type(worker).__name__}; it must return {_WANTED}")
    is_running = worker.is_running()
    if is_running or worker.wait(0):
        if is_running:
            worker.stop(0)
        raise CommandError(
            f"{target} was already started by its module; put worker.start(...) under: if __name__ == '__main__':"
        )
    if max_workers is not None:
        worker.reconfigure(max_workers=max_workers)
    return worker


def _candidates(module: ModuleType, attribute: str) -> str:
    """Name the registries, workers and functions in ``module`` that could be meant: similar names, or all."""
    workers = [name for name, value in vars(module).items() if isinstance(value, (TaskRegistry, Worker))]
    factories = [name for name, value in vars(module).items() if _is_factory(module, value)]
    names = difflib.get_close_matches(attribute, workers + factories) or workers + factories
    if names:
        return f"did you mean {' or '.join(f'{module.__name__}:{name}' for name in names[:5])}?"
    return "it must hold a registry, tasks = TaskRegistry(), or a worker, worker = create_worker(...)"


def _is_factory(module: ModuleType, value: Any) -> bool:
    if not inspect.isfunction(value) or value.__module__ != module.__name__:
        return False
    return all(
        one.default is not one.empty or one.kind in (one.VAR_POSITIONAL, one.VAR_KEYWORD)
        for one in inspect.signature(value).parameters.values()
    )
