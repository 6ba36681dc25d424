"""List tasks, show, follow and await them, cancel and retry them: ``sekuire tasks``."""

from __future__ import annotations

import argparse
import functools
import time
from typing import Any, Dict, List, NoReturn, Optional, Sequence, Tuple

from ..client import SekuireClient
from ..errors import APIError, SekuireError
from ..wire import protocol
from ..wire.protocol import parse_time
from . import terminal
from .access import add_action, each, options_given, run_action, seconds, whole
from .describe import ago, as_json, error_of, fit, print_table, state_of, text_of
from .exits import FAILED, INTERRUPTED, OK, complain
from .results import ProgressBar, continue_with, note, outcome_of, wait_and_print

DESCRIPTION = """\
List the tasks of a platform, show one, follow them as they run, wait for
results, cancel tasks, and retry failed ones. It needs the API key, from
SEKUIRE_API_KEY or a file."""
EPILOG = """\
examples:
  sekuire tasks list --status failed
  sekuire tasks watch
  sekuire tasks wait task_1c1dc6795cc5
  sekuire tasks retry task_1c1dc6795cc5 task_fc77ca8097f4

Exit codes: 0 fine; 1 refused, failed, or not ended in time; 2 wrong usage or
configuration; 130 interrupted (tasks go on)."""
LOG_LEVEL = "warning"

#: Tasks that the list shows unless a number is given, and that the watch looks at.
_SHOWN, _WATCHED = 20, 100
#: Seconds between two looks.
_PAUSE = 1.0
#: Seconds for which the platform may be unreachable while a watch goes on.
_PATIENCE = 60.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(title="actions", dest="action", metavar="ACTION", required=True)

    add = functools.partial(add_action, actions)
    listed = add("list", _list, "list tasks, the newest first", has_json=True)
    shown = add("show", _show, "show one task, with its input, its output and what happened to it", has_json=True)
    watched = add("watch", _watch, "follow one task to its end, or all tasks until Ctrl-C", has_json=True)
    awaited = add("wait", _wait, "wait for results and print them as JSON, of several tasks one a line")
    cancelled = add("cancel", _cancel, "cancel tasks that wait or run")
    retried = add("retry", _retry, "queue failed tasks again")
    shown.add_argument("id", metavar="ID", help="the task's id")
    watched.add_argument("id", metavar="ID", nargs="?", help="the task's id (default: all tasks)")
    for one in (awaited, cancelled, retried):
        one.add_argument("ids", metavar="ID", nargs="+", help="a task's id")
    for one in (listed, watched):
        one.add_argument("--status", choices=protocol.TASK_STATES, help="only tasks in this state")
        one.add_argument("--capability", metavar="NAME", help="only tasks of this capability")
        one.add_argument("--agent-id", metavar="ID", help="only tasks of this agent")
    listed.add_argument("--limit", type=whole, default=_SHOWN, metavar="N", help=f"at most so many ({_SHOWN})")
    awaited.add_argument(
        "--timeout",
        type=seconds,
        default=float("inf"),
        metavar="SECONDS",
        help="wait no longer than that, such as 90 or 10m (default: without limit)",
    )
    cancelled.add_argument("--reason", metavar="TEXT", help="why; the handler sees it as ctx.cancel_reason")


run = run_action


# -- looking ----------------------------------------------------------------------------------------------------------


def _filters(args: argparse.Namespace) -> Dict[str, Optional[str]]:
    return {"status": args.status, "capability": args.capability, "agent_id": args.agent_id}


def _list(args: argparse.Namespace, client: SekuireClient) -> int:
    # One more than is shown, to know whether there are more.
    found = list(client.tasks(**_filters(args), limit=args.limit + 1))
    tasks, is_cut = found[: args.limit], len(found) > args.limit
    if args.json:
        terminal.say(as_json({"tasks": tasks}, indent=2))
        return OK
    if tasks:
        rows = [
            (text_of(one.get("task_id")), state_of(one), ago(one.get("created_at")), _summary(one)) for one in tasks
        ]
        print_table(("TASK", "STATE", "CREATED", "CAPABILITY"), rows, [row[1] for row in rows])
    _note_on_list(args, len(tasks), is_cut)
    return OK


def _note_on_list(args: argparse.Namespace, count: int, is_cut: bool) -> None:
    if is_cut:
        note(args, f"the newest {count}; --limit N shows more")
    elif not count and any(_filters(args).values()):
        note(args, "no such tasks; leave out a filter to see more")
    elif not count:
        note(args, "no tasks yet; submit one: sekuire send CAPABILITY JSON")


def _summary(task: Dict[str, Any]) -> str:
    """Return a task's capability, with what is most worth knowing in its state."""
    capability = text_of(task.get("capability"))
    error = error_of(task)
    progress = _progress_of(task)
    return f"{capability}: {error}" if error else f"{capability} {progress}" if progress else capability


def _progress_of(task: Dict[str, Any]) -> str:
    found = task.get("progress")
    if task.get("status") in protocol.FINAL_STATES or not isinstance(found, dict):
        return ""
    share = found.get("progress")
    percent = f"{int(100 * share)} %" if isinstance(share, (int, float)) else ""
    return " ".join(filter(None, (percent, text_of(found.get("message"), ""))))


def _show(args: argparse.Namespace, client: SekuireClient) -> int:
    task = client.task(args.id)
    if args.json:
        terminal.say(as_json(task, indent=2))
        return OK
    rows: List[Tuple[str, str]] = [("task", text_of(task.get("task_id"), args.id)), ("state", state_of(task))]
    for name in ("capability", "agent_id", "workspace_id", "requester_agent_id", "trace_id"):
        if isinstance(task.get(name), str):
            rows.append((name.replace("_id", "").replace("_", " "), text_of(task[name])))
    rows.append(("attempt", f"{task.get('attempt', '-')} of at most {task.get('max_attempts', '?')}"))
    if state_of(task) == "delayed":
        rows.append(("may begin", ago(task.get("available_at"))))
    if _progress_of(task):
        rows.append(("progress", _progress_of(task)))
    if isinstance(task.get("execution_time_ms"), int):
        rows.append(("ran for", f"{task['execution_time_ms']} ms"))
    for line in terminal.plain_table(rows):
        terminal.say(line)
    terminal.say("what happened:")
    for line in terminal.plain_table([_event(one) for one in _timeline(task)] or [("nothing known", "")]):
        terminal.say(f"  {line}")
    parts = [("input", task.get("input"))]
    if task.get("status") == "completed":
        parts.append(("output", task.get("output")))
    elif isinstance(task.get("error"), dict):
        parts.append(("error", task["error"]))
    for name, value in parts:
        terminal.say(f"{name}:")
        for line in as_json(value, indent=2).splitlines():
            terminal.say(f"  {line}")
    return OK


def _timeline(task: Dict[str, Any]) -> List[Dict[str, Any]]:
    found = task.get("timeline")
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []


def _event(one: Dict[str, Any]) -> Tuple[str, str, str]:
    worker = f"by worker {text_of(one['worker_id'])}" if isinstance(one.get("worker_id"), str) else ""
    attempt = f"attempt {one['attempt']}" if one.get("attempt") else ""
    details = ", ".join(filter(None, (attempt, worker)))
    return text_of(one.get("state")), ago(one.get("at")), details


# -- following --------------------------------------------------------------------------------------------------------


def _watch(args: argparse.Namespace, client: SekuireClient) -> int:
    if args.id is None:
        try:
            _watch_all(args, client)
        except KeyboardInterrupt:
            return INTERRUPTED
    if any(_filters(args).values()):
        note(args, "one task is followed; the filters are for all tasks")
    try:
        return _watch_one(args, client)
    except KeyboardInterrupt:
        complain("tasks watch", "interrupted")
        note(args, continue_with("sekuire", "tasks", "watch", args.id, *options_given(args)))
        return INTERRUPTED


def _watch_one(args: argparse.Namespace, client: SekuireClient) -> int:
    handle = client.handle(args.id)
    seen = 0
    with ProgressBar(getattr(args, "quiet", False)) as bar:
        while True:
            task = client.task(args.id)
            timeline = _timeline(task)
            for one in timeline[seen:]:
                _say_event(args, task, one)
            seen = len(timeline)
            if task.get("status") in protocol.FINAL_STATES:
                break
            handle.wait(_PAUSE, on_progress=bar.show)
    if not args.json and task.get("status") == "failed":
        terminal.say(f"failed {error_of(task)}")
    return OK if task.get("status") == "completed" else FAILED


def _say_event(args: argparse.Namespace, task: Dict[str, Any], one: Dict[str, Any]) -> None:
    if args.json:
        terminal.say(as_json({"task_id": task.get("task_id"), **one}))
        return
    state, _, details = _event(one)
    terminal.say("  ".join(filter(None, (_clock(one.get("at")), state.ljust(9), details))).rstrip())


def _clock(value: Any) -> str:
    instant = parse_time(value)
    return "--:--:--" if instant is None else instant.astimezone().strftime("%H:%M:%S")


def _watch_all(args: argparse.Namespace, client: SekuireClient) -> NoReturn:
    note(args, "following tasks; Ctrl-C ends it")
    #: The state of each task of the newest, by its id.
    seen: Dict[str, Tuple[Any, ...]] = {}
    is_first = True
    lost_at: Optional[float] = None
    while True:
        try:
            tasks = list(client.tasks(**_filters(args), limit=_WATCHED))
        except APIError as error:
            if not protocol.is_transient(error.status):
                raise
            lost_at = _bear(lost_at, error)
        except SekuireError as error:
            lost_at = _bear(lost_at, error)
        else:
            if lost_at is not None:
                note(args, "the platform answers again")
            lost_at = None
            _say_changes(args, tasks, seen, is_first)
            seen = {str(one.get("task_id")): _state(one) for one in tasks}
            is_first = False
        time.sleep(_PAUSE)


def _bear(lost_at: Optional[float], error: SekuireError) -> float:
    """Return since when the platform has been unreachable.

    :raises SekuireError: it has been so for too long.
    """
    now = time.monotonic()
    if lost_at is None:
        terminal.note(f"{error}; asking again")
        return now
    if now - lost_at > _PATIENCE:
        raise error
    return lost_at


def _state(task: Dict[str, Any]) -> Tuple[Any, ...]:
    return task.get("status"), task.get("attempt"), _progress_of(task)


def _say_changes(
    args: argparse.Namespace, tasks: Sequence[Dict[str, Any]], seen: Dict[str, Tuple[Any, ...]], is_first: bool
) -> None:
    """Print a line for each task that is new or has changed. At first only for those that have not ended."""
    shown = [one for one in reversed(tasks) if seen.get(str(one.get("task_id"))) != _state(one)]
    if is_first:
        shown = [one for one in shown if one.get("status") not in protocol.FINAL_STATES]
        if not tasks:
            note(args, "no tasks yet; submit one: sekuire send CAPABILITY JSON")
    for one in shown:
        if args.json:
            terminal.say(as_json(one))
            continue
        took = one.get("execution_time_ms")
        more = f" in {took} ms" if one.get("status") == "completed" and isinstance(took, int) else ""
        head = f"{_clock(one.get('updated_at'))} [{text_of(one.get('task_id'))}]"
        terminal.say(fit(f"{head} {state_of(one)}{more} {_summary(one)}"))


# -- waiting ----------------------------------------------------------------------------------------------------------


def _wait(args: argparse.Namespace, client: SekuireClient) -> int:
    if len(args.ids) == 1:
        return wait_and_print(args, client.handle(args.ids[0]), args.timeout)
    left = list(dict.fromkeys(args.ids))
    end = time.monotonic() + args.timeout
    code = OK
    try:
        while left:
            found, is_good = _result(client, left[0], end)
            terminal.say(as_json(found))
            code = code if is_good else FAILED
            del left[0]
    except KeyboardInterrupt:
        complain("tasks wait", "interrupted")
        terminal.note(continue_with("sekuire", "tasks", "wait", *left, *options_given(args)))
        return INTERRUPTED
    return code


def _result(client: SekuireClient, task_id: str, end: float) -> Tuple[Dict[str, Any], bool]:
    timeout = None if end == float("inf") else max(0.0, end - time.monotonic())
    try:
        found = outcome_of(client.handle(task_id), timeout)
    except APIError as error:
        if error.status != 404:
            raise
        return {"task_id": task_id, "error": {"code": error.code, "message": error.message}}, False
    return found, found["status"] == "completed"


# -- acting -----------------------------------------------------------------------------------------------------------


def _cancel(args: argparse.Namespace, client: SekuireClient) -> int:
    def act(task_id: str) -> str:
        client.cancel(task_id, args.reason)
        task = client.task(task_id)
        if task.get("status") not in protocol.FINAL_STATES:
            return f"{task_id} runs; its worker was asked to cancel it"
        if (task.get("error") or {}).get("code") == "cancelled":
            return f"{task_id} cancelled"
        # Its handler was done before, or made something else of the cancel.
        return f"{task_id} {state_of(task)} nevertheless"

    return each("tasks cancel", args.ids, act)


def _retry(args: argparse.Namespace, client: SekuireClient) -> int:
    def act(task_id: str) -> str:
        client.retry(task_id)
        return f"{task_id} queued again"

    return each("tasks retry", args.ids, act)
