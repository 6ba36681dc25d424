"""Speak to the executors that run handlers in other processes: one adapter for each kind.

:func:`backend_of` chooses the adapter. Nothing else asks which kind an executor is.
"""

# Threads: the thread of a task calls its backend and the methods `raise_` and `lower` of its flag. The process that
# runs the handler calls `begin` and `read`. Backends hold no state that changes.

from __future__ import annotations

import concurrent.futures
import contextlib
import importlib
import os
import pickle
import secrets
import tempfile
from concurrent.futures import Executor, Future
from typing import Any, Callable, Optional, Protocol, Tuple

from .._internal.logs import get_logger
from ..errors import ConfigurationError
from .main_module import missing_in_processes
from .process import ProcessExecutor

__all__ = ["Backend", "DaskFlag", "FileFlag", "Flag", "RemoteExecutor", "backend_of", "is_remote"]

log = get_logger("sekuire.remote")

#: Seconds between two looks at a flag that is a file.
_FILE_STEP = 0.05
#: Seconds between two looks at a flag that is a call over the network.
_NETWORK_STEP = 0.25
#: Why a task must not begin: the worker has taken it back, or another process has begun it.
WITHDRAWN, BEGUN_BEFORE = "withdrawn", "begun before"


class RemoteExecutor(Executor):
    """Mark ``executor`` as one that runs calls in other processes, where a worker cannot see it.

    >>> import concurrent.futures, multiprocessing
    >>> from sekuire import RemoteExecutor
    >>> pool = concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
    >>> with RemoteExecutor(pool) as executor:
    ...     executor.submit(pow, 2, 10).result()
    1024

    A worker recognises ``ProcessExecutor``, ``ProcessPoolExecutor`` and Dask's executor. It treats any other executor
    as one of threads.
    """

    def __init__(self, executor: Executor) -> None:
        if not isinstance(executor, Executor):
            raise ConfigurationError(
                f"must be a concurrent.futures.Executor, got {type(executor).__name__}", "RemoteExecutor"
            )
        #: The executor that was given.
        self.wrapped = executor
        # The check of the worker's options reads it: a wrapped pool must not fork either.
        self._mp_context = getattr(executor, "_mp_context", None)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Submit a call to the wrapped executor."""
        return self.wrapped.submit(fn, *args, **kwargs)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Shut the wrapped executor down."""
        self.wrapped.shutdown(wait, cancel_futures=cancel_futures)


class Listener(Protocol):
    """Receive what a handler in another process reports and asks, on a thread of the pool. No method may block."""

    def on_progress(self, report: Tuple[float, Optional[str]]) -> None:
        """Pass a report of progress on."""

    def on_question(self, question: Any, answer: Callable[[Any], None]) -> None:
        """Have ``answer`` called once with what answers ``question``, now or later."""


class Backend(Protocol):
    """Describe what an executor must do so that handlers can run in its processes."""

    #: Seconds from a task's answer until the process of its handler is killed. None: it is left alone.
    kill_after: Optional[float]
    #: How many calls run at once, if that is known.
    size: Optional[int]
    #: True if the executor has processes for this worker, which may keep resources until they end.
    has_processes: bool

    def submit(self, run: Callable[[bytes], bytes], data: bytes, listener: Listener) -> Future[Any]:
        """Run ``run(data)`` in a process. Pass on to ``listener`` what that process reports and asks, where it can."""

    def dumps(self, value: Any) -> bytes:
        """Pickle ``value`` for a process."""

    def missing(self, value: Any, data: bytes) -> str:
        """Return what of ``value``, pickled in ``data``, a process cannot import. An empty text if nothing is known."""

    def withdraw(self, future: Future[Any], flag: Flag) -> bool:
        """Take a call back that has not begun. Return False if it may have begun."""

    def kill(self, future: Future[Any]) -> bool:
        """Kill the process that runs a call. Return True if there was one."""

    def is_prepared(self) -> bool:
        """Return True if an initializer of the user prepares each process."""

    def make_flag(self) -> Flag:
        """Make the flag by which a process sees that its task was cancelled."""


class _PoolBackend:
    """Adapt a pool of another library that behaves as a ``ProcessPoolExecutor`` does."""

    kill_after: Optional[float] = None
    size: Optional[int] = None
    has_processes = True

    def __init__(self, executor: Executor) -> None:
        self._executor = executor

    def submit(self, run: Callable[[bytes], bytes], data: bytes, listener: Listener) -> Future[Any]:
        return self._executor.submit(run, data)

    def dumps(self, value: Any) -> bytes:
        return pickle.dumps(value)

    def missing(self, value: Any, data: bytes) -> str:
        # A pool of another library may send the code along, or fork.
        is_known = isinstance(self._executor, (ProcessExecutor, concurrent.futures.ProcessPoolExecutor))
        return missing_in_processes(value, data) if is_known else ""

    def withdraw(self, future: Future[Any], flag: Flag) -> bool:
        return future.cancel() or flag.withdraw()

    def kill(self, future: Future[Any]) -> bool:
        return False

    def is_prepared(self) -> bool:
        # The standard library's pool has this attribute. Of other pools nothing is known.
        return getattr(self._executor, "_initializer", None) is not None

    def make_flag(self) -> Flag:
        return FileFlag()


class _LocalPoolBackend(_PoolBackend):
    """Adapt a ``ProcessPoolExecutor``, which is of this machine, and accepts calls that it cannot give back."""

    def make_flag(self) -> Flag:
        return ClaimedFlag()


class _ProcessBackend(_PoolBackend):
    """Adapt a :class:`ProcessExecutor`, which reports progress and can kill one process."""

    def __init__(self, executor: ProcessExecutor) -> None:
        super().__init__(executor)
        self._processes = executor
        self.kill_after = executor.kill_after
        self.size = executor.max_workers

    def submit(self, run: Callable[[bytes], bytes], data: bytes, listener: Listener) -> Future[Any]:
        return self._processes.submit_call(
            run, (data,), on_message=listener.on_progress, on_question=listener.on_question
        )

    def kill(self, future: Future[Any]) -> bool:
        return self._processes.kill(future)

    def is_prepared(self) -> bool:
        return self._processes.initializer is not None


class _DaskBackend(_PoolBackend):
    """Adapt the executor of a Dask client."""

    # A worker of Dask runs calls of others too, in several threads.
    has_processes = False

    def dumps(self, value: Any) -> bytes:
        # Dask itself sends functions with it. It sends the code of the main module's functions along.
        data: bytes = importlib.import_module("cloudpickle").dumps(value)
        return data

    def withdraw(self, future: Future[Any], flag: Flag) -> bool:
        # Not by cancel(): Dask would forget a call that runs, and say that it had not begun.
        return flag.withdraw()

    def make_flag(self) -> Flag:
        executor: Any = self._executor
        return DaskFlag(executor._client)  # Dask gives it no public name.


def backend_of(executor: Optional[Executor]) -> Optional[Backend]:
    """Return the adapter of an executor that runs calls in other processes, None for any other."""
    is_marked = False
    while isinstance(executor, RemoteExecutor):
        executor, is_marked = executor.wrapped, True
    if executor is None:
        return None
    if isinstance(executor, ProcessExecutor):
        return _ProcessBackend(executor)
    if type(executor).__module__.startswith("distributed."):
        return _DaskBackend(executor)
    if isinstance(executor, concurrent.futures.ProcessPoolExecutor):
        return _LocalPoolBackend(executor)
    return _PoolBackend(executor) if is_marked else None


def is_remote(executor: Optional[Executor]) -> bool:
    """Return True if ``executor`` runs calls in other processes."""
    return backend_of(executor) is not None


# -- cancellation on its way to the other process ---------------------------------------------------------------------


class Flag(Protocol):
    """Carry a cancellation to the process that runs the handler."""

    #: Seconds between two looks at the flag.
    step: float
    #: True if a look costs so little that every question of the handler may look.
    is_near: bool

    def raise_(self, reason: str) -> None:
        """Show the process that its task was cancelled."""

    def lower(self) -> None:
        """Remove what the flag has left behind."""

    def withdraw(self) -> bool:
        """Keep the task from beginning. Return False if it has begun, or may have."""

    def begin(self) -> str:
        """Begin to read, in the process. Return why the task must not begin, an empty text if it may."""

    def read(self) -> Optional[str]:
        """Return the reason of the cancellation, None if there is none."""


class FileFlag:
    """Carry a cancellation by a file that holds its reason. A task that is not cancelled has no file.

    Nobody can guess the file's name, so no other user can make it. The flag also reports that the worker died.
    """

    step = _FILE_STEP
    is_near = True

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
            log.error("a handler in another process cannot be notified of its cancellation (%s)", error)

    def lower(self) -> None:
        if self._is_raised:
            for path in (self._path, f"{self._path}.new"):
                with contextlib.suppress(OSError):
                    os.unlink(path)

    def withdraw(self) -> bool:
        return False

    def begin(self) -> str:
        # A process of a pool is the worker's child. One of a fork server is not, and cannot watch its parent.
        self._is_child = os.getppid() == self._pid
        return ""

    def read(self) -> Optional[str]:
        try:
            with open(self._path, encoding="utf-8") as file:
                return file.read() or "cancelled"
        except OSError:
            return "the worker died" if self._is_child and os.getppid() != self._pid else None


class ClaimedFlag(FileFlag):
    """Decide by a second file, which either side makes first, if the task begins.

    A ``ProcessPoolExecutor`` hands calls to its processes before they can begin them, and cannot take those back.
    """

    def withdraw(self) -> bool:
        try:
            self._claim()
        except OSError:
            return False
        return True

    def begin(self) -> str:
        super().begin()
        try:
            self._claim()
        except FileExistsError:
            return WITHDRAWN
        except OSError as error:
            # The worker cannot make one either, so the task is not withdrawn.
            log.warning("a task cannot mark that it has begun (%s); a pause does not hold it", error)
        return ""

    def lower(self) -> None:
        super().lower()
        with contextlib.suppress(OSError):
            os.unlink(f"{self._path}.begun")

    def _claim(self) -> None:
        os.close(os.open(f"{self._path}.begun", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))


class DaskFlag:
    """Carry a cancellation by an event of Dask's scheduler, and mark by a second one that the task has begun.

    Dask gives the call of a worker that died to another worker. The second event makes the task run only once. A third
    one withdraws a task that has not begun. Each side sets its own event before it looks at the other's. So at least
    one of them sees that both are set, and the process decides.
    """

    step = _NETWORK_STEP
    is_near = False

    def __init__(self, client: Any) -> None:
        self._name = f"sekuire-{secrets.token_hex(16)}"
        self._client = client
        self._is_raised = self._is_withdrawn = False

    def __getstate__(self) -> str:
        return self._name

    def __setstate__(self, name: str) -> None:
        self._name = name
        self._client = None
        self._is_raised = self._is_withdrawn = False

    def raise_(self, reason: str) -> None:
        self._is_raised = True
        self._try("cancelled", "set")

    def lower(self) -> None:
        self._try("begun", "clear")
        if self._is_raised:
            self._try("cancelled", "clear")
        if self._is_withdrawn:
            self._try("withdrawn", "clear")

    def withdraw(self) -> bool:
        if self._try("begun", "is_set") is not False:
            return False
        self._is_withdrawn = True
        self._try("withdrawn", "set")
        return self._try("withdrawn", "is_set") is True and self._try("begun", "is_set") is False

    def begin(self) -> str:
        begun = self._event("begun")
        if begun.is_set():
            return BEGUN_BEFORE
        begun.set()
        return WITHDRAWN if self._event("withdrawn").is_set() else ""

    def read(self) -> Optional[str]:
        return "cancelled" if self._event("cancelled").is_set() else None

    def _event(self, what: str) -> Any:
        return importlib.import_module("distributed").Event(f"{self._name}-{what}", client=self._client)

    def _try(self, what: str, method: str) -> Any:
        """Return what the method returns, None if it fails."""
        try:
            return getattr(self._event(what), method)()
        except Exception as error:  # noqa: BLE001  # The cluster may be gone.
            log.warning(
                "cannot call %s of the event %r of Dask's scheduler (%s: %s)", method, what, type(error).__name__, error
            )
            return None
