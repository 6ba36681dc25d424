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
from typing import Any, Callable, Optional, Protocol

from .._internal.logs import get_logger
from ..errors import ConfigurationError
from .process import ProcessExecutor

__all__ = ["Backend", "DaskFlag", "FileFlag", "Flag", "RemoteExecutor", "backend_of", "is_remote"]

log = get_logger("sekuire.remote")

#: Seconds between two looks at a flag that is a file.
_FILE_STEP = 0.05
#: Seconds between two looks at a flag that is a call over the network.
_NETWORK_STEP = 0.25


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


class Backend(Protocol):
    """Describe what an executor must do so that handlers can run in its processes."""

    #: Seconds from a task's answer until the process of its handler is killed. None: it is left alone.
    kill_after: Optional[float]
    #: How many calls run at once, if that is known.
    size: Optional[int]

    def submit(self, run: Callable[[bytes], bytes], data: bytes, on_progress: Callable[..., object]) -> Future[Any]:
        """Run ``run(data)`` in a process. Call ``on_progress`` with what that process reports, where it can."""

    def dumps(self, value: Any) -> bytes:
        """Pickle ``value`` for a process."""

    def cancel(self, future: Future[Any]) -> bool:
        """Take a call back that has not begun. Return False if it may have begun."""

    def kill(self, future: Future[Any]) -> bool:
        """Kill the process that runs a call. Return True if there was one."""

    def is_prepared(self) -> bool:
        """Return True if each process begins with a function of the user's."""

    def make_flag(self) -> Flag:
        """Make the flag by which a process sees that its task was cancelled."""


class _PoolBackend:
    """Adapt a ``ProcessPoolExecutor``, or a pool of another library that behaves as it does."""

    kill_after: Optional[float] = None
    size: Optional[int] = None

    def __init__(self, executor: Executor) -> None:
        self._executor = executor

    def submit(self, run: Callable[[bytes], bytes], data: bytes, on_progress: Callable[..., object]) -> Future[Any]:
        return self._executor.submit(run, data)

    def dumps(self, value: Any) -> bytes:
        return pickle.dumps(value)

    def cancel(self, future: Future[Any]) -> bool:
        return future.cancel()

    def kill(self, future: Future[Any]) -> bool:
        return False

    def is_prepared(self) -> bool:
        # The standard library's pool has this attribute. Of other pools nothing is known.
        return getattr(self._executor, "_initializer", None) is not None

    def make_flag(self) -> Flag:
        return FileFlag()


class _ProcessBackend(_PoolBackend):
    """Adapt a :class:`ProcessExecutor`, which reports progress and can kill one process."""

    def __init__(self, executor: ProcessExecutor) -> None:
        super().__init__(executor)
        self._processes = executor
        self.kill_after = executor.kill_after
        self.size = executor.max_workers

    def submit(self, run: Callable[[bytes], bytes], data: bytes, on_progress: Callable[..., object]) -> Future[Any]:
        return self._processes.submit_call(run, (data,), on_message=lambda report: on_progress(*report))

    def kill(self, future: Future[Any]) -> bool:
        return self._processes.kill(future)

    def is_prepared(self) -> bool:
        return self._processes.initializer is not None


class _DaskBackend(_PoolBackend):
    """Adapt the executor of a Dask client."""

    def dumps(self, value: Any) -> bytes:
        # Dask itself sends functions with it. It sends the code of the main module's functions along.
        data: bytes = importlib.import_module("cloudpickle").dumps(value)
        return data

    def cancel(self, future: Future[Any]) -> bool:
        # Dask would forget a call that runs, and say that it had not begun.
        return False

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
    if is_marked or isinstance(executor, concurrent.futures.ProcessPoolExecutor):
        return _PoolBackend(executor)
    return None


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

    def begin(self) -> bool:
        """Begin to read, in the process. Return False if another process has begun the task."""

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

    def begin(self) -> bool:
        # A process of a pool is the worker's child. One of a fork server is not, and cannot watch its parent.
        self._is_child = os.getppid() == self._pid
        return True

    def read(self) -> Optional[str]:
        try:
            with open(self._path, encoding="utf-8") as file:
                return file.read() or "cancelled"
        except OSError:
            return "the worker died" if self._is_child and os.getppid() != self._pid else None


class DaskFlag:
    """Carry a cancellation by an event of Dask's scheduler, and mark by a second one that the task has begun.

    Dask gives the call of a worker that died to another worker. The second event makes the task run only once.
    """

    step = _NETWORK_STEP
    is_near = False

    def __init__(self, client: Any) -> None:
        self._name = f"sekuire-{secrets.token_hex(16)}"
        self._client = client
        self._is_raised = False

    def __getstate__(self) -> str:
        return self._name

    def __setstate__(self, name: str) -> None:
        self._name = name
        self._client = None
        self._is_raised = False

    def raise_(self, reason: str) -> None:
        self._is_raised = True
        self._try("cancelled", "set")

    def lower(self) -> None:
        self._try("begun", "clear")
        if self._is_raised:
            self._try("cancelled", "clear")

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

    def _try(self, what: str, method: str) -> None:
        try:
            getattr(self._event(what), method)()
        except Exception as error:  # noqa: BLE001  # The cluster may be gone.
            log.warning(
                "cannot %s the event %r of Dask's scheduler (%s: %s)", method, what, type(error).__name__, error
            )
