"""Wait for a task's result, show its progress, and print the result."""

from __future__ import annotations

import argparse
import math
import shlex
from types import TracebackType
from typing import Any, Dict, Optional, Type

from ..client import TaskHandle, TaskProgress
from ..errors import TaskFailed, TaskTimeout, TransportError
from . import terminal
from .access import options_given
from .describe import as_json
from .exits import FAILED, INTERRUPTED, OK, CommandError, complain

__all__ = ["ProgressBar", "continue_with", "note", "outcome_of", "result_of", "wait_and_print"]

#: Seconds after which a task that still waits is worth a question.
_PATIENCE = 3.0


def note(args: argparse.Namespace, text: str) -> None:
    """Write a line to stderr, unless ``--quiet`` was given."""
    if not getattr(args, "quiet", False):
        terminal.note(text)


def continue_with(*command: str) -> str:
    return f"to continue, run: {shlex.join(command)}"


class ProgressBar:
    """Show on stderr the progress that a task's handler reports, from its first report on."""

    def __init__(self, is_quiet: bool = False) -> None:
        self._is_quiet = is_quiet
        self._bar: Optional[terminal.Progress] = None

    def show(self, progress: TaskProgress) -> None:
        if self._is_quiet:
            return
        label = terminal.clean(progress.message or "")[:30] or "progress"
        percent = int(100 * progress.fraction)
        if self._bar is None:
            self._bar = terminal.Progress(label, 100, done=percent, is_percent=True)
            self._bar.__enter__()
        self._bar.update(percent, label)

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self,
        kind: Optional[Type[BaseException]],
        error: Optional[BaseException],
        traceback: Optional[TracebackType],
    ) -> None:
        if self._bar is not None:
            self._bar.__exit__(kind, error, traceback)


def wait_and_print(args: argparse.Namespace, handle: TaskHandle, seconds: float, whose: str = "") -> int:
    """Wait for the task's result and print it.

    :param whose: what may be missing while nobody takes the task: an agent with a capability.
    :raises CommandError: the task has not ended in time.
    """
    try:
        if args.command == "send":
            note(args, f"task {handle.id}")
        found = _wait(args, handle, seconds, whose)
    except KeyboardInterrupt:
        complain(_name_of(args), "interrupted")
        terminal.note("the task goes on; " + continue_with("sekuire", "tasks", "wait", handle.id, *options_given(args)))
        return INTERRUPTED
    if "error" not in found:
        terminal.say(as_json(found["output"], indent=2))
        return OK
    error = found["error"]
    advice = " (trying again may help)" if error["retryable"] else ""
    lines = [f"the task failed: {error['code']}: {error['message']}{advice}"]
    if error.get("details"):
        lines.append(f"details: {as_json(error['details'])}")
    complain(_name_of(args), *lines)
    return FAILED


def _name_of(args: argparse.Namespace) -> str:
    return " ".join(filter(None, (args.command, getattr(args, "action", None))))


def _wait(args: argparse.Namespace, handle: TaskHandle, seconds: float, whose: str) -> Dict[str, Any]:
    with ProgressBar(getattr(args, "quiet", False)) as bar:
        if whose and seconds > _PATIENCE and not handle.wait(_PATIENCE, on_progress=bar.show):
            seconds -= _PATIENCE
            if handle.status() == "queued":
                note(args, f"the task still waits; is a worker running for {whose}?")
                # Said once.
                whose = ""
        try:
            return result_of(handle, None if math.isinf(seconds) else seconds, bar)
        except TaskTimeout as error:
            late = error
    hint = f"; is a worker running for {whose}?" if whose and late.status == "queued" else ""
    problem = f"; {late.problem}" if late.problem else ""
    raise CommandError(
        f"task {handle.id} is still {late.status or 'submitted'} after {_given(args):g} s{hint}{problem}", code=FAILED
    )


def _given(args: argparse.Namespace) -> float:
    found: float = args.wait if args.command == "send" else args.timeout
    return found


def result_of(handle: TaskHandle, timeout: Optional[float], bar: Optional[ProgressBar] = None) -> Dict[str, Any]:
    """Wait for a task's end. Return its id and status with its ``output`` or its ``error``.

    :raises TaskTimeout: it has not ended in time.
    """
    try:
        output = handle.result(timeout, on_progress=None if bar is None else bar.show)
    except TaskFailed as failed:
        error: Dict[str, Any] = {"code": failed.code, "message": failed.message, "retryable": failed.retryable}
        if failed.details:
            error["details"] = failed.details
        return {"task_id": handle.id, "status": "failed", "error": error}
    return {"task_id": handle.id, "status": "completed", "output": output}


def outcome_of(handle: TaskHandle, timeout: Optional[float]) -> Dict[str, Any]:
    """Wait as :func:`result_of` does, for one of several tasks. Return also what is known of one without a result.

    Its ``status`` is ``unknown``, beside an ``error``, if the platform's answers could not be read.
    """
    try:
        return result_of(handle, timeout)
    except TaskTimeout as late:
        if late.status:
            return {"task_id": handle.id, "status": late.status}
        problem = late.problem or "the platform did not answer in time"
    except TransportError as error:
        if not error.is_too_large:
            raise
        problem = str(error)
    return {"task_id": handle.id, "status": "unknown", "error": {"code": "not_read", "message": problem}}
