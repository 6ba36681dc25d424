"""Accept tasks that others push, run them as the platform's, and keep their results for those who pushed them."""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import threading
from collections import OrderedDict
from typing import Callable, Dict, NamedTuple, Optional, Protocol, Tuple

import attrs

from .._internal import fork
from .._internal.clock import time
from .._internal.scrub import scrub
from ..config import WorkerConfig
from ..errors import SekuireError
from ..handlers.context import TaskContext
from ..wire import protocol
from ..wire.models import Completion, Failure, Task
from .records import REJECTED, WAITING, PushedSink, Record
from .release import Release
from .results import encode
from .sink import Accepted, NotReadyError, SingleResult

#: Seconds for which a result is kept, and within which a task has to begin.
KEEP = BEGIN_WITHIN = 3600.0
#: Most results that are kept, and most bytes of them. The oldest go first.
KEPT, KEPT_BYTES = 10_000, 64 * 1024 * 1024
#: What a pushed id may be: it stands in a path, in log lines and in the id that the handler sees.
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._~:@-]{0,199}")
#: How the ids begin that the handlers of pushed tasks see.
_PREFIX = "pushed"


class PushRefused(SekuireError):
    """Report a push that began nothing, and why: ``failure``."""

    def __init__(self, code: str, message: str, *, retryable: bool = False) -> None:
        super().__init__(f"{code}: {message}")
        self.failure = Failure(code=code, message=message, retryable=retryable)


class Runs(Protocol):
    """Run pushed tasks: the Worker."""

    config: WorkerConfig

    def push(self, task: Task, sink: PushedSink) -> None:
        """Run a task and give its result to ``sink``."""

    def cancel_pushed(self, sink: PushedSink, reason: str) -> None:
        """Cancel a task that has not ended."""


#: Who pushed, and the id.
Key = Tuple[str, str]


class _Result(NamedTuple):
    """Hold an encoded result, as :class:`~sekuire.worker.sink.Accepted`."""

    body: bytes
    code: Optional[str]


class PushedTask(SingleResult):
    """Track one pushed task, and accept its result.

    ``id`` is the pusher's name for it. The handler sees a longer one, which no other pusher's task has.

    :param config: of the Worker. None where there is none, so that the task can only be refused.
    :param on_end: called once it has its result.
    """

    # Threads: those of the pusher's requests wait for `done`; those of the worker call the methods of a sink. `_lock`
    # guards the result, which is set once.

    def __init__(
        self, key: Key, digest: Optional[bytes], config: Optional[WorkerConfig], on_end: Callable[[PushedTask], None]
    ) -> None:
        self.key = key
        self.id = key[1]
        #: Of the push. None if the id was made here: nobody can push it again.
        self.digest = digest
        self.done = threading.Event()
        self.record: Optional[Record] = None
        #: When it came, and when it ended.
        self.since = time.monotonic()
        self.ended_at = 0.0
        #: Why nothing of it was run, if that is how it ended.
        self.refusal: Optional[Failure] = None
        self._lock = threading.Lock()
        self._on_end = on_end
        self._max_bytes = 0 if config is None else config.max_result_bytes
        self._result_encoder = None if config is None else config.result_encoder
        self._result: Optional[_Result] = None
        self._progress: Optional[bytes] = None

    def accept(self, completion: Completion) -> Optional[Accepted]:
        head, code = encode(
            attrs.evolve(completion, task_id=self.id), self._max_bytes, self._result_encoder, completion.task_id
        )
        record = self.record
        # Once its handler was called a failure is a result, whatever its code.
        is_begun = record is not None and record.state is not REJECTED and record.began is not None
        return self._end(_Result(head + b"}", code), None if is_begun else completion.failure)

    def release(self, release: Release, delay: float = 0.0) -> None:
        self.refuse(protocol.failure("worker_shutdown", "the worker stops, lost its lease or has no room"))
        if release.begin():
            release.end(is_released=True)

    def progress(self, context: TaskContext, fraction: float, message: Optional[str]) -> None:
        self._progress = protocol.progress_body(fraction, None if message is None else scrub(message))

    def refuse(self, failure: Failure) -> None:
        """End it, because nothing of it is run."""
        completion = Completion(task_id=self.id, attempt=1, failure=failure)
        self._end(_Result(protocol.completion_head(completion) + b"}", failure.code), failure)

    def _end(self, result: _Result, refusal: Optional[Failure]) -> Optional[Accepted]:
        with self._lock:
            if self._result is not None:
                return None
            self._result = result
            self.refusal = refusal
            self.ended_at = time.monotonic()
            # It holds the input.
            self.record = None
        self._on_end(self)
        self.done.set()
        return result

    @property
    def is_named(self) -> bool:
        """Return True if the pusher has named the task."""
        return self.digest is not None

    @property
    def size(self) -> int:
        """Return the bytes of its result."""
        return 0 if self._result is None else len(self._result.body)

    @property
    def is_waiting(self) -> bool:
        """Return True if it has not begun."""
        record = self.record
        return record is not None and record.state is WAITING

    def body(self) -> bytes:
        """Return what is known of it as JSON: its result, or else its state and progress."""
        # In this order: a task that ends loses its record after it has got its result.
        is_waiting, progress, result = self.is_waiting, self._progress, self._result
        if result is not None:
            return result.body
        shown = protocol.encode_json({"task_id": self.id, "status": "queued" if is_waiting else "assigned"})
        return shown if progress is None else shown[:-1] + b',"progress":' + progress + b"}"


class PushedTasks:
    """Accept pushed tasks, at most ``max_open`` at once, and keep their results for an hour. ::

        pushed = PushedTasks(lambda: worker, max_open=100)
        task = pushed.push('{"task_id": "7", "capability": "greet", "input": {"name": "Ada"}}')
        pushed.wait(task, 10.0)
        print(task.body())

    A task is known by its pusher and its id. The same push again is the same task. Nothing here reaches what the worker
    keeps of the platform's tasks: each pushed task is its own sink, and the key of its own record.

    :param worker_of: returns the worker that runs what is pushed, None while there is none.
    """

    # Threads: any thread may call anything. `_lock` guards the tables. It is never held over a call of the worker, the
    # threads of which call `_note_end`.

    def __init__(self, worker_of: Callable[[], Optional[Runs]], *, max_open: int) -> None:
        self._worker_of = worker_of
        self._max_open = max_open
        self._reset()
        # The worker's threads stay in the parent: what is open there never ends in the child.
        fork.reset_in_child(self, PushedTasks._reset)

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._open: Dict[Key, PushedTask] = {}
        #: In the order of their ends.
        self._ended: OrderedDict[Key, PushedTask] = OrderedDict()
        self._kept_bytes = 0
        self._waiting = 0

    def push(self, text: str, pusher: str = "") -> PushedTask:
        """Begin a task, or return the one that the same push has begun.

        :param text: the task as JSON, in the form of a task of the stream or in the pushed form.
        :param pusher: who pushes; each has ids of its own. An empty text for whoever knows the shared secret.
        :raises Malformed: the text is not a task.
        :raises PushRefused: nothing was begun: ``id_reused``, ``too_many_tasks``.
        """
        new_id = secrets.token_hex(16)
        task = protocol.decode_pushed_task(text, new_id)
        if not _ID.fullmatch(task.task_id):
            raise protocol.Malformed(
                "task_id must be 1 to 200 of the characters A-Z a-z 0-9 . _ ~ : @ - and begin with a letter or digit"
            )
        key = pusher, task.task_id
        digest = None if task.task_id == new_id else _digest_of(task)
        names = (_PREFIX, pusher, task.task_id) if pusher else (_PREFIX, task.task_id)
        task = attrs.evolve(task, task_id=":".join(names), attempt=1, requester_id=pusher or task.requester_id)
        worker = self._worker_of()
        self._end_late(worker)
        with self._lock:
            self._drop_old()
            known = self._open.get(key) or self._ended.get(key)
            if known is not None and known.refusal is None:
                if known.digest != digest:
                    raise PushRefused("id_reused", f"the id {key[1]} is that of another task; each task needs its own")
                return known
            if len(self._open) >= self._max_open:
                raise PushRefused("too_many_tasks", f"{self._max_open} pushed tasks have not ended yet", retryable=True)
            new = PushedTask(key, digest, None if worker is None else worker.config, self._note_end)
            self._forget(key)
            self._open[key] = new
        self._begin(worker, task, new)
        return new

    def find(self, task_id: str, pusher: str = "") -> Optional[PushedTask]:
        """Return the pusher's task with this id, None if there is none, or none any more."""
        self._end_late(self._worker_of())
        with self._lock:
            self._drop_old()
            return self._open.get((pusher, task_id)) or self._ended.get((pusher, task_id))

    def note_answered(self, task: PushedTask) -> None:
        """Forget a task whose pusher has its result and does not know its id."""
        if not task.is_named:
            with self._lock:
                self._forget(task.key)

    def wait(self, task: PushedTask, seconds: float) -> bool:
        """Wait until a task has ended. Return False if it has not after ``seconds``.

        At most ``max_open`` threads wait. A further one does not.
        """
        with self._lock:
            may_wait = self._waiting < self._max_open
            self._waiting += may_wait
        if not may_wait:
            return task.done.is_set()
        try:
            return task.done.wait(seconds)
        finally:
            with self._lock:
                self._waiting -= 1

    @staticmethod
    def _begin(worker: Optional[Runs], task: Task, new: PushedTask) -> None:
        try:
            if worker is None:
                raise NotReadyError("there is no worker yet")
            worker.push(task, new)
        except NotReadyError as error:
            new.refuse(Failure(code="worker_not_ready", message=str(error), retryable=True))
        except BaseException:
            # Whoever waits for it must not wait in vain.
            new.refuse(Failure(code="handler_error", message="the worker failed"))
            raise

    def _end_late(self, worker: Optional[Runs]) -> None:
        """Cancel what has waited too long: it must not hold its place while the lease is lost, for example."""
        before = time.monotonic() - BEGIN_WITHIN
        with self._lock:
            late = [one for one in self._open.values() if one.since < before and one.is_waiting]
        for one in late:
            if worker is not None:
                worker.cancel_pushed(one, f"it has not begun within {BEGIN_WITHIN:g} s")

    def _note_end(self, task: PushedTask) -> None:
        """Keep a task that has its result. Any thread of the worker's."""
        key = task.key
        with self._lock:
            if self._open.get(key) is not task:
                # Since a fork.
                return
            del self._open[key]
            self._ended[key] = task
            self._kept_bytes += task.size
            self._drop_old()

    def _drop_old(self) -> None:
        """Drop what was kept long enough, and the oldest of too much. Needs the lock."""
        ended = self._ended
        while ended:
            key, oldest = next(iter(ended.items()))
            is_much = len(ended) > KEPT or self._kept_bytes > KEPT_BYTES
            if not is_much and time.monotonic() - oldest.ended_at < KEEP:
                return
            self._forget(key)

    def _forget(self, key: Key) -> None:
        found = self._ended.pop(key, None)
        if found is not None:
            self._kept_bytes -= found.size


def _digest_of(task: Task) -> bytes:
    """Return what is the same for two pushes of the same task, however their JSON is written."""
    values = attrs.asdict(attrs.evolve(task, attempt=1, size=0), recurse=False)
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).digest()
