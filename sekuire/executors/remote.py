"""Handlers in other processes: of a process pool on this machine, or of a Dask cluster.

What is around a handler stays here: the task's thread waits, within the middleware, for what the other process
returns. There, the input is built for the handler's annotation and the handler is called with a
:class:`RemoteTaskContext`.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import datetime as dt
import importlib
import logging
import math
import os
import pickle
import secrets
import tempfile
import threading
import time
import weakref
from concurrent.futures import Executor, Future
from typing import Any, Callable, Dict, List, Optional, Protocol, Tuple

import attrs

from .._internal import threads
from .._internal.logs import get_logger
from ..config import WorkerConfig
from ..errors import ConfigurationError, PolicyUnavailableError, PolicyViolationError, TaskCancelled, TaskError
from ..handlers.context import TaskContext
from ..handlers.invoke import Handler, asked_for, call, structure_of, where, with_structure
from ..handlers.registry import Carrier
from ..wire.models import Task
from .process import ProcessDied, ProcessExecutor, dump_error, load_error, tell

__all__ = ["RemoteExecutor", "RemoteTaskContext", "carrier_of", "is_remote"]

log = get_logger("sekuire.remote")

#: Seconds between two looks at whether the task was cancelled, where nothing announces it.
_STEP = 0.05
#: The same where a look is a call over the network.
_FAR_STEP = 0.25
#: Policies that a process remembers.
_ENFORCERS = 8
#: Seconds until a process that could not be killed is tried again.
_LOOK_AGAIN = 0.5
#: Seconds between two reports of progress by one process.
_PROGRESS_PAUSE = 0.2


class RemoteExecutor(Executor):
    """Tells a worker that ``executor`` runs calls in other processes, where the worker cannot see it by itself.

    It knows ``ProcessExecutor``, ``ProcessPoolExecutor`` and Dask's; any other executor is taken for one of threads.
    """

    def __init__(self, executor: Executor) -> None:
        if not isinstance(executor, Executor):
            raise ConfigurationError(
                f"must be a concurrent.futures.Executor, got {type(executor).__name__}", "RemoteExecutor"
            )
        self._executor = executor
        # What the worker's settings look at: a wrapped pool must not fork either.
        self._mp_context = getattr(executor, "_mp_context", None)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        return self._executor.submit(fn, *args, **kwargs)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._executor.shutdown(wait, cancel_futures=cancel_futures)


def is_remote(executor: Optional[Executor]) -> bool:
    """Whether ``executor`` runs calls in other processes."""
    return isinstance(executor, (ProcessExecutor, RemoteExecutor, concurrent.futures.ProcessPoolExecutor)) or _is_dask(
        executor
    )


def _is_dask(executor: Optional[Executor]) -> bool:
    return type(executor).__module__.startswith("distributed.")


def carrier_of(config: WorkerConfig) -> Optional[Carrier]:
    """What carries handlers to the executor's processes; None where they run in threads of this one.

    :raises ConfigurationError: in what it returns: a handler that cannot be sent there.
    """
    executor = config.executor
    if executor is None or not is_remote(executor):
        return None
    while isinstance(executor, RemoteExecutor):
        executor = executor._executor
    size = getattr(executor, "max_workers", None)
    if isinstance(executor, ProcessExecutor) and config.max_workers > executor.max_workers:
        log.warning(
            "max_workers is %d, but the executor has %s processes: tasks beyond that wait in it while their time runs; "
            "give max_workers=%s", config.max_workers, size, size,
        )  # fmt: skip
    dumps = _dask_dumps() if _is_dask(executor) else pickle.dumps

    def carry(option: str, function: Handler) -> Handler:
        try:
            # What it asks for is resolved here: there, a function that was sent along may lack its module.
            code = dumps((function, asked_for(function)))
        except Exception as error:  # noqa: BLE001
            problem = f"{type(error).__name__}: {error}"
        else:
            return _Remote(executor, code, dumps)
        raise ConfigurationError(
            f"{where(function)} cannot be sent to another process ({problem}); with this executor a handler must be "
            "a function at the top level of a module", option,
        )  # fmt: skip

    return carry


def _dask_dumps() -> Callable[[Any], bytes]:
    # What Dask itself sends functions with; it takes those of the main module along.
    dumps: Callable[[Any], bytes] = importlib.import_module("cloudpickle").dumps
    return dumps


# -- here -------------------------------------------------------------------------------------------------------------


class _Remote:
    """A handler that has its work done in another process, and waits for it; called by the task's thread."""

    def __init__(self, executor: Executor, code: bytes, dumps: Callable[[Any], bytes]) -> None:
        self._executor = executor
        self._code = code
        self._dumps = dumps
        self._is_dask = _is_dask(executor)
        self._kill_after = getattr(executor, "kill_after", None)

    def __call__(self, context: TaskContext, input: Any) -> Any:
        flag: _Flag = _DaskFlag(self._executor) if self._is_dask else _FileFlag()
        remote = RemoteTaskContext._of(context, flag)
        try:
            data = self._dumps((self._code, remote, input))
        except Exception as error:  # noqa: BLE001
            problem = f"{type(error).__name__}: {error}"
        else:
            return self._run(context, flag, data)
        raise TaskError("handler_error", f"the input cannot be sent to the handler's process ({problem})")

    def _run(self, context: TaskContext, flag: _Flag, data: bytes) -> Any:
        watch = _Watch()
        try:
            future = self._submit(context, data)
        except Exception as error:  # noqa: BLE001  # Broken, or shut down; each executor has its own way.
            problem = f"{type(error).__name__}: {error}"
        else:
            future.add_done_callback(watch.note_end)
            context._watch(watch.note_cancel)
            try:
                self._wait(context, flag, future, watch)
            finally:
                flag.lower()
            return self._outcome(context, future, watch.is_answered)
        log.error("[%s] the executor takes no more work (%s)", context.task_id, problem)
        raise TaskError("worker_shutdown", "the worker's executor takes no more work", retryable=True)

    def _submit(self, context: TaskContext, data: bytes) -> Future[Any]:
        if isinstance(self._executor, ProcessExecutor):
            return self._executor.submit_call(
                run_remote, (data,), on_message=lambda told: context.report_progress(*told)
            )
        return self._executor.submit(run_remote, data)

    def _wait(self, context: TaskContext, flag: _Flag, future: Future[Any], watch: _Watch) -> None:
        """Until the call has ended; on the way, pass a cancellation on."""
        raised = False
        kill_at: Optional[float] = None
        while not future.done():
            watch.wait(None if kill_at in (None, math.inf) else kill_at - time.monotonic())
            if watch.is_cancelled and not raised:
                raised = True
                # Dask would forget a call that runs, and say that it had not begun.
                if self._is_dask or not future.cancel():
                    flag.raise_(context.cancel_reason or "cancelled")
            if watch.is_answered and kill_at is None and self._kill_after is not None:
                kill_at = time.monotonic() + self._kill_after
            if kill_at is not None and time.monotonic() >= kill_at and not future.done():
                # One that is still being started cannot be killed yet.
                kill_at = math.inf if self._kill(context, future) else time.monotonic() + _LOOK_AGAIN

    def _kill(self, context: TaskContext, future: Future[Any]) -> bool:
        if not isinstance(self._executor, ProcessExecutor) or not self._executor.kill(future):
            return False
        log.warning(
            "[%s] the handler has not ended %.1f s after its task was answered; its process is killed",
            context.task_id, self._kill_after,
        )  # fmt: skip
        return True

    def _outcome(self, context: TaskContext, future: Future[Any], is_answered: bool) -> Any:
        try:
            data = future.result()
        except concurrent.futures.CancelledError:
            if context.is_cancelled():
                raise _unbegun(context) from None
            problem = "the executor has given the call up"
        except ProcessDied as error:
            problem = str(error)
        except BaseException as error:  # noqa: BLE001
            # run_remote() raises nothing: whatever comes is of the executor, and the handler may have begun.
            problem = f"{type(error).__name__}: {error}"
        else:
            kind, value, violations = pickle.loads(data)
            repeat = getattr(context.policy, "repeat", None)
            if repeat is not None:
                for facts in violations:
                    repeat(PolicyViolationError(*facts))
            if kind == "returned":
                return pickle.loads(value)
            raise load_error(value)
        log.log(
            logging.INFO if is_answered else logging.ERROR,
            "[%s] the handler's process was lost: %s", context.task_id, problem,
        )  # fmt: skip
        raise TaskError("handler_error", f"the handler's process was lost: {problem}", retryable=True)


def _unbegun(context: TaskContext) -> TaskError:
    """The failure of a task that was cancelled while it waited in the executor."""
    reason = context.cancel_reason or "cancelled"
    code = "worker_terminated" if reason == "terminated" else "worker_shutdown"
    return TaskError(code, f"cancelled before the task began ({reason})", retryable=True)


class _Watch:
    """What a task's thread waits for: the end of its call, or a cancellation."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self.is_cancelled = False
        self.is_answered = False

    def note_end(self, future: Future[Any]) -> None:
        self._event.set()

    def note_cancel(self, answered: bool) -> None:
        self.is_answered = self.is_answered or answered
        self.is_cancelled = True
        self._event.set()

    def wait(self, timeout: Optional[float]) -> None:
        self._event.wait(timeout if timeout is None else max(0.0, timeout))
        self._event.clear()


# -- cancellation on its way to the other process ---------------------------------------------------------------------


class _Flag(Protocol):
    """Raised here, seen there. ``raise_`` and ``lower`` are called by the task's thread; the rest in the process."""

    step: float

    def raise_(self, reason: str) -> None: ...

    def lower(self) -> None: ...

    def begin(self) -> bool: ...

    def read(self) -> Optional[str]: ...


class _FileFlag:
    """A file that exists once the task is cancelled, with the reason in it; of a task that is not, there is nothing.

    Its name cannot be guessed, so that no other user can put it there. It tells of the worker's death, too.
    """

    step = _STEP

    def __init__(self) -> None:
        self._path = os.path.join(tempfile.gettempdir(), f"sekuire-{secrets.token_hex(16)}")
        self._pid = os.getpid()
        self._is_raised = False
        self._is_child = False

    def raise_(self, reason: str) -> None:
        try:
            handle = os.open(f"{self._path}.new", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with open(handle, "w", encoding="utf-8") as file:
                file.write(reason)
            self._is_raised = True
            os.replace(f"{self._path}.new", self._path)
        except OSError as error:
            log.error("a handler in another process cannot be told of its cancellation (%s)", error)

    def lower(self) -> None:
        if self._is_raised:
            for path in (self._path, f"{self._path}.new"):
                with contextlib.suppress(OSError):
                    os.unlink(path)

    def begin(self) -> bool:
        # A process of a pool is the worker's child; one of a fork server is not, and cannot look at its parent.
        self._is_child = os.getppid() == self._pid
        return True

    def read(self) -> Optional[str]:
        try:
            with open(self._path, encoding="utf-8") as file:
                return file.read() or "cancelled"
        except OSError:
            return "the worker died" if self._is_child and os.getppid() != self._pid else None


class _DaskFlag:
    """Two events of Dask's scheduler: the task is cancelled; a worker of the cluster has begun it.

    The second because Dask gives the call of a worker that died to another one, and a task runs once.
    """

    step = _FAR_STEP

    def __init__(self, executor: Any) -> None:
        self._name = f"sekuire-{secrets.token_hex(16)}"
        self._client = executor._client
        self._is_raised = False

    def __getstate__(self) -> str:
        return self._name

    def __setstate__(self, name: str) -> None:
        self._name = name
        self._client = None
        self._is_raised = False

    def raise_(self, reason: str) -> None:
        self._is_raised = True
        self._quietly("cancelled", "set")

    def lower(self) -> None:
        self._quietly("begun", "clear")
        if self._is_raised:
            self._quietly("cancelled", "clear")

    def begin(self) -> bool:
        begun = self._event("begun")
        if begun.is_set():
            return False
        begun.set()
        return True

    def read(self) -> Optional[str]:
        return "cancelled" if self._event("cancelled").is_set() else None

    def _event(self, what: str) -> Any:
        return importlib.import_module("distributed").Event(f"{self._name}-{what}", client=self._client)

    def _quietly(self, what: str, method: str) -> None:
        try:
            getattr(self._event(what), method)()
        except Exception as error:  # noqa: BLE001  # The cluster may be gone.
            log.warning("Dask's scheduler could not be told that a task %s (%s: %s)", what, type(error).__name__, error)


# -- there ------------------------------------------------------------------------------------------------------------


class RemoteTaskContext(TaskContext):
    """The :class:`TaskContext` of a handler that runs in another process than its worker; it can be pickled.

    All of it is as there, but: ``attempt`` is the one at the beginning; the deadline is kept by the clock of this
    machine; a cancellation is seen a moment later, by asking for it; :meth:`report_progress` reaches the platform from
    a ``ProcessExecutor``, and is dropped elsewhere. One thread at a time may use it.
    """

    __slots__ = ("_end", "_enforcer", "_flag", "_home", "_looked_at", "_told_at", "_violations")

    def __init__(
        self, task: Task, end: Optional[float], flag: _Flag, home: int, enforcer: Optional[bytes] = None
    ) -> None:
        left = None if end is None else end - time.time()
        super().__init__(task, deadline=None if left is None else time.monotonic() + left)
        self._end = end
        self._flag = flag
        self._home = home
        #: The pickled enforcer: None where there is none, empty where it cannot be pickled.
        self._enforcer = enforcer
        self._violations: List[PolicyViolationError] = []
        self._looked_at = -1.0
        self._told_at = -1.0

    @classmethod
    def _of(cls, context: TaskContext, flag: _Flag) -> RemoteTaskContext:
        task = attrs.evolve(context._task, input=None, attempt=context.attempt)
        left = context.remaining()
        end = None if left is None else time.time() + left
        return cls(task, end, flag, os.getpid(), _pack(context.policy))

    def __reduce__(self) -> Tuple[Any, ...]:
        return RemoteTaskContext, (self._task, self._end, self._flag, self._home, self._enforcer)

    @property
    def deadline(self) -> Optional[dt.datetime]:
        """When the task's time ends, as an aware UTC datetime; None without a limit."""
        return None if self._end is None else dt.datetime.fromtimestamp(self._end, dt.timezone.utc)

    def is_cancelled(self) -> bool:
        return self.cancel_reason is not None

    @property
    def cancel_reason(self) -> Optional[str]:
        """Why, as for :class:`TaskContext`, and ``"the worker died"``; on a Dask cluster ``"cancelled"``."""
        if self._reason is None:
            if self._deadline is not None and time.monotonic() >= self._deadline:
                self._reason = "timeout"
            elif self._flag.step <= _STEP or time.monotonic() - self._looked_at >= self._flag.step:
                self._looked_at = time.monotonic()
                self._reason = self._flag.read()
        return self._reason

    def raise_if_cancelled(self) -> None:
        """:raises TaskCancelled: the task was cancelled. A handler that lets it pass ends its task ``cancelled``."""
        reason = self.cancel_reason
        if reason is not None:
            raise TaskCancelled(reason)

    def wait_cancelled(self, timeout: Optional[float] = None) -> bool:
        """Wait up to ``timeout`` seconds for a cancellation, looking for it every 0.05 s (on Dask: 0.25 s)."""
        end = None if timeout is None else time.monotonic() + timeout
        while not self.is_cancelled():
            left = self._flag.step if end is None else min(self._flag.step, end - time.monotonic())
            if left <= 0:
                return False
            time.sleep(left)
        return True

    @property
    def policy(self) -> Any:
        """A copy of the enforcer that let this task begin; None where no policy gateway was asked.

        What it refuses is told to the worker's when the handler ends. Rate limits can be asked only where they are
        counted in a shared store.

        :raises PolicyUnavailableError: the gateway's enforcer cannot be pickled.
        """
        if self._policy is None and self._enforcer is not None:
            enforcer = _unpack(self._enforcer)
            reporting_to = getattr(enforcer, "reporting_to", None)
            self._policy = enforcer if reporting_to is None else reporting_to(self._violations.append)
        return self._policy

    def _tell(self, context: TaskContext, fraction: float, message: Optional[str]) -> None:
        now = time.monotonic()
        if now - self._told_at >= _PROGRESS_PAUSE:
            self._told_at = now
            tell((fraction, message))

    def __repr__(self) -> str:
        return f"<RemoteTaskContext {self.task_id} {self.capability} attempt {self._attempt}>"


_loaded: Dict[bytes, Handler] = {}
_packed: weakref.WeakKeyDictionary[Any, bytes] = weakref.WeakKeyDictionary()
_unpacked: Dict[bytes, Any] = {}


def _pack(enforcer: Any) -> Optional[bytes]:
    """An enforcer for another process, pickled once for all tasks that it lets begin; empty where it cannot be."""
    if enforcer is None:
        return None
    try:
        data = _packed.get(enforcer)
        if data is None:
            data = _packed[enforcer] = pickle.dumps(enforcer)
    except Exception as error:  # noqa: BLE001  # One of a gateway of the user's own.
        log.debug("the policy's enforcer cannot be pickled (%s: %s)", type(error).__name__, error)
        return b""
    return data


def _unpack(data: bytes) -> Any:
    if not data:
        raise PolicyUnavailableError("the policy gateway's enforcer cannot be sent to the handler's process")
    enforcer = _unpacked.get(data)
    if enforcer is None:
        if len(_unpacked) >= _ENFORCERS:
            _unpacked.clear()
        enforcer = _unpacked[data] = pickle.loads(data)
    return enforcer


def run_remote(data: bytes) -> bytes:
    """In the other process: run one task's handler; what it came to, for the one that waits. Raises nothing."""
    violations: List[PolicyViolationError] = []
    try:
        code, context, input = pickle.loads(data)
        violations = context._violations
        if context._home != os.getpid():  # A cluster of threads is in the worker's own process.
            threads.enter_executor()
        if not context._flag.begin():
            raise TaskError("handler_error", "the handler's process was lost, and a task is not run twice", True)
        if context.is_cancelled():
            raise _unbegun(context)
        function = _loaded.get(code)
        if function is None:
            loaded, annotation = pickle.loads(code)
            function = _loaded[code] = with_structure(loaded, structure_of(annotation))
        context._progress = context._tell
        result = call(function, context, input)
        try:
            return pickle.dumps(("returned", pickle.dumps(result), _facts_of(violations)))
        except Exception as error:  # noqa: BLE001
            problem = f"{type(error).__name__}: {error}"
        raise TaskError(
            "result_not_serializable", f"the handler's result cannot be sent back by its process ({problem})"
        )
    except BaseException as error:  # noqa: BLE001
        return pickle.dumps(("raised", dump_error(error), _facts_of(violations)))


def _facts_of(violations: List[PolicyViolationError]) -> List[Tuple[Any, ...]]:
    return [(one.rule, one.reason, one.retry_after) for one in violations]
