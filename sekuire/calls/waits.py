"""Wait for tasks: for one by a long poll, for several by one poll that they share."""

from __future__ import annotations

import copy
import threading
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Tuple

from .._internal import fork
from .._internal.checks import is_number
from .._internal.clock import time
from .._internal.threads import LONG_WAIT, Deadline
from ..errors import SekuireError, TransportError
from ..transport.retry import RETRY_MAX, RETRY_MIN, full_jitter
from ..wire import protocol
from .link import Again, Link

__all__ = ["Awaited", "ProgressCallback", "TaskProgress", "Waits", "progress_of"]

#: Called with a task's progress by the thread that waits for the task.
ProgressCallback = Callable[["TaskProgress"], object]

#: Seconds before the first shared look for several tasks, and between two looks at most.
_FIRST_LOOK, _LONGEST_PAUSE = 0.05, 1.0
#: Seconds of one question for a task whose progress somebody wants to see.
_PROGRESS_LOOK = 1.0
#: Seconds for which the platform may be unreachable before a wait ends with the error.
_PATIENCE = 60.0


class TaskProgress(NamedTuple):
    """Hold how far a task is: ``fraction`` from 0 to 1, and the handler's ``message``, or None."""

    fraction: float
    message: Optional[str] = None


class Awaited:
    """Describe a task that threads wait for."""

    __slots__ = ("error", "is_asked", "problem", "task", "threads")

    def __init__(self) -> None:
        #: The task's newest known state, with its output only where ``"output"`` is in it.
        self.task: Dict[str, Any] = {}
        #: Why the platform could not be asked last, None if it was.
        self.problem: Optional[str] = None
        #: Why waiting is useless.
        self.error: Optional[SekuireError] = None
        #: Threads that wait for it. One of them may ask for it alone now.
        self.threads = 0
        self.is_asked = False

    def is_over(self, deadline: Optional[Deadline]) -> bool:
        """Return True if whoever waits until ``deadline`` has nothing more to wait for."""
        is_final = self.task.get("status") in protocol.FINAL_STATES
        return is_final or self.error is not None or (deadline is not None and deadline.is_expired())


class Waits:
    """Wait for tasks: for one task by a long poll, for several by one poll that they share.

    A thread that waits asks for itself while no other task is waited for. Otherwise one of the waiting threads asks
    for all of them, and the others sleep. When its own task has ended, another thread takes its place.
    """

    # Threads: any thread may wait. `_condition` guards all state and is never held over I/O. There is no thread of the
    # library's own: whoever waits asks.

    def __init__(self, link: Link, max_bytes: int, path_of: Callable[..., str]) -> None:
        self._link = link
        self._max_bytes = max_bytes
        self._path_of = path_of
        self._reset()
        fork.reset_in_child(self, Waits._reset)

    def _reset(self) -> None:
        self._condition = threading.Condition()
        self._awaited: Dict[str, Awaited] = {}
        #: True while a thread asks for all.
        self._is_shared = False
        self._pause = _FIRST_LOOK

    def look(self, task_id: str) -> Dict[str, Any]:
        """Return the task as it is now, with its output."""
        return self._link.ask("task", "GET", self._path_of("task", task_id=task_id), max_bytes=self._max_bytes)

    def wake(self) -> None:
        """Have every wait look if the client is closed."""
        with self._condition:
            self._condition.notify_all()

    def wait(self, task_id: str, timeout: Optional[float], on_progress: Optional[ProgressCallback]) -> Awaited:
        """Wait until the task has ended, for ``timeout`` seconds at most. Return what is known of it.

        :raises SekuireError: the platform does not know the task, or has been unreachable for a minute.
        """
        deadline = Deadline(timeout) if timeout is not None else None
        listener = Listener(on_progress)
        condition = self._condition
        with condition:
            awaited = self._awaited.setdefault(task_id, Awaited())
            awaited.threads += 1
            # A new task may end soon.
            self._pause = _FIRST_LOOK
            condition.notify_all()
        lookup = Lookup(self, task_id, awaited, deadline)
        try:
            while True:
                self._link.check_open()
                with condition:
                    error = awaited.error
                    role = self._role(awaited, deadline)
                listener.note(awaited.task)
                if error is not None:
                    # Other threads may raise it too, each with a traceback of its own.
                    raise copy.copy(error)
                if role == "done":
                    if not awaited.task:
                        # The time was too short for any other look.
                        lookup.ask_alone(0.0)
                    return awaited
                if role == "alone":
                    lookup.ask_alone(_PROGRESS_LOOK if on_progress is not None else protocol.MAX_WAIT_MS / 1000)
                elif role == "shared":
                    self._ask_for_all(lookup, on_progress is not None)
        finally:
            with condition:
                awaited.threads -= 1
                if not awaited.threads:
                    del self._awaited[task_id]
                condition.notify_all()

    def _role(self, awaited: Awaited, deadline: Optional[Deadline]) -> str:
        """Return what a waiting thread does next; sleep if others do it. Needs the lock."""
        if awaited.is_over(deadline):
            return "done"
        others_wait = len(self._awaited) > 1
        if not others_wait and not awaited.is_asked and not self._is_shared:
            awaited.is_asked = True
            return "alone"
        if others_wait and not self._is_shared:
            self._is_shared = True
            return "shared"
        self._condition.wait(LONG_WAIT if deadline is None else min(LONG_WAIT, deadline.remaining()))
        return "sleep"

    def sleep_alone(self, awaited: Awaited, seconds: float) -> None:
        """Sleep between two questions for one task; less if another is waited for."""
        with self._condition:
            if len(self._awaited) == 1:
                self._condition.wait(seconds)

    def asked_alone(
        self, awaited: Awaited, task: Optional[Dict[str, Any]], problem: Optional[SekuireError], is_lasting: bool
    ) -> None:
        """Note what a thread has learned that asked for its own task."""
        with self._condition:
            awaited.is_asked = False
            if task is not None:
                awaited.task = task
            awaited.problem = None if problem is None else str(problem)
            awaited.error = problem if is_lasting else None
            self._condition.notify_all()

    # -- asking for all (one thread at a time) --

    def _ask_for_all(self, own: Lookup, has_listener: bool) -> None:
        """Ask for all tasks that are waited for, until ``own`` needs it no more or is the only one.

        :param has_listener: end also when there is news of ``own``.
        """
        condition = self._condition
        lost_at: Optional[float] = None
        looked_at = time.monotonic()
        delay = 0.0
        seen = own.task()
        try:
            while True:
                with condition:
                    while True:
                        if self._link.closed.is_set() or own.is_over() or len(self._awaited) == 1:
                            return
                        if has_listener and own.task() is not seen:
                            return
                        # A new task makes the pause shorter.
                        left = looked_at + max(self._pause, delay) - time.monotonic()
                        if left <= 0:
                            break
                        condition.wait(left if own.deadline is None else min(left, own.deadline.remaining()))
                    # A task that a thread asks for alone has its answer as soon as it ends.
                    ids = [one for one, awaited in self._awaited.items() if not awaited.is_asked]
                    self._pause = min(2 * self._pause, _LONGEST_PAUSE)
                problem, delay = self._look_at(ids)
                looked_at = time.monotonic()
                lost_at = None if problem is None else (lost_at or looked_at)
                if problem is not None and lost_at is not None:
                    self._fail(ids, problem, is_lasting=looked_at - lost_at > _PATIENCE)
        finally:
            with condition:
                self._is_shared = False
                condition.notify_all()

    def _look_at(self, ids: List[str]) -> Tuple[Optional[SekuireError], float]:
        """Ask for these tasks. Return what was wrong, if that may pass, and the seconds to wait after it."""
        for start in range(0, len(ids), protocol.MAX_IDS):
            part = ids[start : start + protocol.MAX_IDS]
            try:
                path = self._path_of("tasks") + protocol.ids_query(part)
                found = self._link.ask_once("tasks", "GET", path, max_bytes=self._max_bytes)
            except Again as again:
                return again.problem, again.delay
            except SekuireError as error:
                if not (isinstance(error, TransportError) and error.is_too_large):
                    self._fail(part, error)
                    continue
                # Each of them alone may fit.
                found = {}
            tasks = found.get("tasks")
            known = (
                {one.get("task_id"): one for one in tasks if isinstance(one, dict)} if isinstance(tasks, list) else {}
            )
            with self._condition:
                is_news = False
                for task_id in part:
                    awaited = self._awaited.get(task_id)
                    if awaited is not None and task_id in known:
                        is_news = is_news or awaited.task != known[task_id]
                        awaited.task = known[task_id]
                        awaited.problem = None
                if is_news:
                    self._condition.notify_all()
            # An older platform does not know `ids`, a task may be unknown, and many errors may be large together.
            for task_id in part:
                if task_id not in known:
                    self._look_at_one(task_id)
        return None, 0.0

    def _look_at_one(self, task_id: str) -> None:
        task: Optional[Dict[str, Any]] = None
        problem: Optional[SekuireError] = None
        try:
            task = self.ask_for(task_id, 0.0)
        except Again:
            return
        except SekuireError as error:
            problem = error
        if problem is not None:
            self._fail([task_id], problem)
            return
        with self._condition:
            awaited = self._awaited.get(task_id)
            if awaited is not None and task is not None:
                awaited.task = task
                self._condition.notify_all()

    def _fail(self, ids: List[str], error: SekuireError, is_lasting: bool = True) -> None:
        with self._condition:
            for task_id in ids:
                awaited = self._awaited.get(task_id)
                if awaited is not None:
                    awaited.problem = str(error)
                    awaited.error = error if is_lasting else None
            self._condition.notify_all()

    # -- asking for one task --

    def ask_for(self, task_id: str, seconds: float) -> Dict[str, Any]:
        """Ask for a task, and let the platform wait ``seconds`` for its end."""
        path = self._path_of("task", task_id=task_id)
        query = protocol.query_of(wait_ms=int(seconds * 1000) or None)
        return self._link.ask_once("task", "GET", path + query, max_bytes=self._max_bytes, longer=seconds)


class Lookup:
    """Ask for the task that one thread waits for."""

    def __init__(self, waits: Waits, task_id: str, awaited: Awaited, deadline: Optional[Deadline]) -> None:
        self.deadline = deadline
        self._waits = waits
        self._task_id = task_id
        self._awaited = awaited
        self._lost_at: Optional[float] = None
        self._pause = _FIRST_LOOK
        self._tries = 0

    def task(self) -> Dict[str, Any]:
        """Return the newest known state of the task."""
        return self._awaited.task

    def is_over(self) -> bool:
        """Return True if the thread has nothing more to wait for."""
        return self._awaited.is_over(self.deadline)

    def ask_alone(self, longest: float) -> None:
        """Ask once, and let the platform wait up to ``longest`` seconds. Sleep after an answer that came at once."""
        seconds = longest if self.deadline is None else min(longest, self.deadline.remaining())
        task: Optional[Dict[str, Any]] = None
        problem: Optional[SekuireError] = None
        is_lasting = False
        began = time.monotonic()
        pause = 0.0
        try:
            task = self._waits.ask_for(self._task_id, seconds)
            self._lost_at = None
            self._tries = 0
            if time.monotonic() - began < seconds / 2:
                # A platform that does not wait, because it is older or stops, is asked at growing intervals.
                pause, self._pause = self._pause, min(2 * self._pause, _LONGEST_PAUSE)
        except Again as again:
            now = time.monotonic()
            self._lost_at = self._lost_at or now
            pause = max(full_jitter(self._tries, RETRY_MIN, RETRY_MAX), again.delay)
            self._tries += 1
            problem, is_lasting = again.problem, now - self._lost_at > _PATIENCE
        except SekuireError as refusal:
            problem, is_lasting = refusal, True
        finally:
            self._waits.asked_alone(self._awaited, task, problem, is_lasting)
        if pause and not self.is_over():
            self._waits.sleep_alone(
                self._awaited, pause if self.deadline is None else min(pause, self.deadline.remaining())
            )


class Listener:
    """Call a user's function when the progress of a task has changed."""

    def __init__(self, callback: Optional[ProgressCallback]) -> None:
        self._callback = callback
        self._last: Optional[TaskProgress] = None

    def note(self, task: Mapping[str, Any]) -> None:
        if self._callback is None:
            return
        progress = progress_of(task)
        if progress is not None and progress != self._last:
            self._last = progress
            self._callback(progress)


def progress_of(task: Mapping[str, Any]) -> Optional[TaskProgress]:
    found = task.get("progress")
    if not isinstance(found, dict) or not is_number(found.get("progress")):
        return None
    message = found.get("message")
    return TaskProgress(float(found["progress"]), message if isinstance(message, str) else None)
