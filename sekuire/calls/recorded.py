"""Record submitted tasks in place of a platform, and run them at once if a test wants that."""

from __future__ import annotations

import itertools
import json
import threading
from typing import Any, Callable, Dict, List, Optional, Protocol, Tuple
from urllib.parse import parse_qs, unquote, urlsplit

import attrs

from ..errors import APIError, SekuireError
from ..wire import protocol
from ..wire.models import Failure

__all__ = ["Recorded", "SubmittedTask"]


class Ran(Protocol):
    """Describe the end of a task that was run: :class:`sekuire.testing.TaskResult`."""

    @property
    def status(self) -> str: ...

    @property
    def output(self) -> Any: ...

    @property
    def error(self) -> Optional[Failure]: ...

    @property
    def progress(self) -> Tuple[Tuple[float, Optional[str]], ...]: ...


@attrs.define(kw_only=True)
class SubmittedTask:
    """Hold a task that the code under test has submitted. ::

        with submitted() as tasks:
            client.submit("summarize", {"text": "Once upon a time"}, timeout=5.0)
        assert (tasks[0].capability, tasks[0].timeout) == ("summarize", 5.0)

    ``input`` is what the platform would read from the JSON. The other fields are those of
    :meth:`SekuireClient.submit() <sekuire.SekuireClient.submit>`, None where they were not given; durations are in
    seconds. ``status`` is ``"queued"`` until the task was run or cancelled. ``result`` is what ``run_task`` has
    returned, None if it was not run.
    """

    task_id: str
    capability: str
    input: Any
    agent_id: str
    idempotency_key: str
    workspace_id: Optional[str] = None
    trace_id: Optional[str] = None
    timeout: Optional[float] = None
    delay: Optional[float] = None
    expires_in: Optional[float] = None
    max_attempts: Optional[int] = None
    attempt: int = 1
    status: str = "queued"
    result: Any = None


class Recorded:
    """Stand in for the platform wherever a client submits tasks or asks for them.

    Calls about anything else are left to the platform.

    :param tasks: what is submitted is appended to it.
    :param run: runs a task at its submission, and returns its end; None if it has no handler for it.
    :param hint: what to do for a task that would never end, for an error.
    """

    # Threads: any thread may submit. `_lock` guards all state, and is not held while a task runs.

    def __init__(self, tasks: List[SubmittedTask], run: Callable[[SubmittedTask], Optional[Ran]], hint: str) -> None:
        self._tasks = tasks
        self._run = run
        self._hint = hint
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._by_id: Dict[str, SubmittedTask] = {}
        self._by_key: Dict[str, Tuple[bytes, SubmittedTask]] = {}
        self._cancelled: Dict[str, Failure] = {}

    def answer(
        self, endpoint: str, method: str, path: str, body: Optional[bytes], key: Optional[str]
    ) -> Optional[Dict[str, Any]]:
        """Return what the platform would answer. None: the call is not about tasks."""
        if endpoint == "tasks" and method == "POST":
            return self._submit(body or b"", key or "")
        parts = urlsplit(path)
        query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        if endpoint == "tasks":
            return self._list(query)
        if endpoint not in ("task", "cancel", "retry"):
            return None
        task = self._find(parts.path)
        if endpoint == "task":
            if int(query.get("wait_ms", "0")) and task.status not in protocol.FINAL_STATES:
                raise self._endless(task)
            return self._describe(task)
        return self._cancel(task, body) if endpoint == "cancel" else self._retry(task)

    def _submit(self, body: bytes, key: str) -> Dict[str, Any]:
        given = json.loads(body)
        for name in ("timeout", "delay", "expires_in"):
            if f"{name}_ms" in given:
                given[name] = given.pop(f"{name}_ms") / 1000
        with self._lock:
            known = self._by_key.get(key)
            if known is not None:
                if known[0] != body:
                    raise APIError(422, "IDEMPOTENCY_KEY_REUSED", f"the key {key} is that of another task")
                return self._describe(known[1])
            task = SubmittedTask(task_id=f"submitted-{next(self._numbers)}", idempotency_key=key, **given)
            self._by_key[key] = body, task
            self._by_id[task.task_id] = task
            self._tasks.append(task)
        self._run_once(task, task.max_attempts or 1)
        return self._describe(task)

    def _run_once(self, task: SubmittedTask, attempts: int) -> None:
        """Run a task to its end, as often as the platform would. It stays queued if there is no handler for it."""
        while True:
            ran = self._run(task)
            if ran is None:
                return
            with self._lock:
                task.result = ran
                # The result of a task that was cancelled while it ran is what its handler made of that.
                is_cancelled = self._cancelled.pop(task.task_id, None) is not None
                if is_cancelled or ran.error is None or not ran.error.retryable or task.attempt >= attempts:
                    task.status = ran.status
                    return
                task.attempt += 1

    def _cancel(self, task: SubmittedTask, body: Optional[bytes]) -> Dict[str, Any]:
        with self._lock:
            if task.status in protocol.FINAL_STATES:
                raise APIError(409, "TASK_FINAL", f"the task {task.task_id} has ended already")
            task.status = "failed"
            reason = json.loads(body or b"{}").get("reason")
            text = "the task was cancelled" + (f": {reason}" if reason else "")
            self._cancelled[task.task_id] = Failure(code="cancelled", message=text)
        return {}

    def _retry(self, task: SubmittedTask) -> Dict[str, Any]:
        with self._lock:
            if task.status != "failed":
                raise APIError(409, "TASK_NOT_FAILED", f"the task {task.task_id} is {task.status}, not failed")
            task.status = "queued"
            task.attempt += 1
            self._cancelled.pop(task.task_id, None)
        self._run_once(task, task.attempt)
        return self._describe(task)

    def _list(self, query: Dict[str, str]) -> Dict[str, Any]:
        with self._lock:
            tasks = list(self._tasks)[::-1]
        if "ids" in query:
            # Asked for by threads that wait.
            wanted = query["ids"].split(",")
            tasks = [task for task in tasks if task.task_id in wanted]
            if tasks and not any(task.status in protocol.FINAL_STATES for task in tasks):
                raise self._endless(tasks[-1])
        for name in ("status", "capability", "agent_id"):
            tasks = [task for task in tasks if name not in query or getattr(task, name) == query[name]]
        ids = [task.task_id for task in tasks]
        before = query.get("before")
        start = ids.index(before) + 1 if before in ids else 0
        end = start + int(query.get("limit", len(tasks)))
        described = [self._describe(task) for task in tasks[start:end]]
        return {
            "tasks": [{k: v for k, v in one.items() if k not in ("input", "output")} for one in described],
            "next_before": ids[end - 1] if end < len(ids) else None,
        }

    def _find(self, path: str) -> SubmittedTask:
        names = [unquote(part) for part in path.split("/")]
        found = next((self._by_id[name] for name in names if name in self._by_id), None)
        if found is None:
            raise APIError(404, "TASK_NOT_FOUND", f"submitted() has recorded no such task ({path})")
        return found

    def _describe(self, task: SubmittedTask) -> Dict[str, Any]:
        shown = {
            name: getattr(task, name)
            for name in ("task_id", "agent_id", "capability", "input", "status", "attempt", "workspace_id", "trace_id")
        }
        ran: Optional[Ran] = task.result
        if ran is not None and ran.progress:
            fraction, message = ran.progress[-1]
            shown["progress"] = {"progress": fraction, "message": message}
        if task.status in protocol.FINAL_STATES:
            failure = self._cancelled.get(task.task_id) or (ran.error if ran is not None else None)
            shown["output"] = ran.output if ran is not None and failure is None else None
            if failure is not None:
                shown["error"] = {
                    "code": failure.code,
                    "message": failure.message,
                    "retryable": failure.retryable,
                    "details": failure.details,
                }
        return shown

    def _endless(self, task: SubmittedTask) -> SekuireError:
        return SekuireError(
            f"the task {task.task_id} ({task.capability}) was only recorded, by submitted(), and would never end; "
            + self._hint
        )
