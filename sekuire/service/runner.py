"""Run a Worker as a process: signals, the SDK's shutdown, a liveness file, and an exit that does not hang."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
from typing import Callable, Iterator, List, NoReturn, Optional, Union

from .._internal import threads as thread_tools
from .._internal.signals import ENDING, TakenSignals
from .._internal.threads import Deadline, PeriodicThread, join_all
from ..errors import ConfigurationError, SekuireError
from ..worker.worker import Worker
from .exit_codes import INTERRUPTED, OK
from .reloader import end_with_reloader

#: Seconds that flushing may take while handlers still run, and that idle threads have to end.
_FLUSH_TIME = 3.0
_IDLE_TIME = 1.0
#: Seconds between two touches of the liveness file.
LIVENESS_INTERVAL = 5.0


def run(
    make: Callable[[], Worker],
    report: Callable[[SekuireError], int],
    liveness_file: Union[str, os.PathLike[str], None] = None,
) -> int:
    """Make a worker, run it until it has stopped, shut its SDK down, and return the exit code.

    SIGTERM and Ctrl-C end ``make``. Once the worker runs they drain it, and a second signal hurries the drain. The
    process ends here if a handler still runs then: the interpreter would wait for it without limit.

    :param make: makes the worker, for example by importing the user's module.
    :param report: reports the error that stopped the worker to the user, and returns its exit code.
    :param liveness_file: touched every 5 s while the worker is alive, and removed at its end; for a probe.
    :raises ConfigurationError: the liveness file cannot be written.
    """
    with _Signals() as signals:
        end_with_reloader()
        try:
            worker = make()
        except _Ended as ended:
            return ended.code
        with _liveness(worker, liveness_file):
            signals.leave_with = INTERRUPTED
            code = _serve(worker, report)
            signals.leave_with = code
        if _is_busy(worker):
            _leave_at_once(code)
    return code


class _Ended(BaseException):
    """Raised by SIGTERM before the worker runs. It is not an Exception, so that the user's module does not catch it."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class _Signals(TakenSignals):
    """Handle signals before and after the Worker runs. Before, they end the import; after, they end the process.

    The Worker replaces these handlers during ``start(block=True)`` and puts them back. Outside the main thread, where
    no handler can be set, this class sets none.
    """

    def __init__(self) -> None:
        #: The exit code for a signal after the worker ran; None before.
        self.leave_with: Optional[int] = None
        super().__init__(ENDING if threading.current_thread() is threading.main_thread() else ())

    def note(self, number: int) -> None:
        if self.leave_with is not None:
            os._exit(self.leave_with)
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            raise _Ended(OK)


def _serve(worker: Worker, report: Callable[[SekuireError], int]) -> int:
    """Run ``worker`` until it has stopped, shut its SDK down, and return the exit code."""
    try:
        worker.start(block=True)
        code = INTERRUPTED if worker.stop_reason == f"signal {int(signal.SIGINT)}" else OK
    except SekuireError as error:
        code = report(error)
    if worker.sdk is not None:
        # The SDK's Beacon keeps the lease while it sends heartbeats. Its last one reports that the agent has stopped.
        worker.sdk.shutdown()
    return code


def _is_busy(worker: Worker) -> bool:
    """Return True if handlers still run. The interpreter would wait for them without limit."""
    threads = [one for one in threading.enumerate() if one.name.startswith("sekuire-task")]
    return bool(join_all(threads, Deadline(_IDLE_TIME))) or bool(worker.stats().overdue)


def _leave_at_once(code: int) -> NoReturn:
    """End the process without waiting for its threads, after flushing logs and output."""
    # On a thread with a limit: a handler that hangs in a write to stdout holds the lock that a flush needs.
    thread = threading.Thread(target=_flush, name="sekuire-flush", daemon=True)
    thread.start()
    thread.join(_FLUSH_TIME)
    os._exit(code)


def _flush() -> None:
    steps: List[Callable[[], object]] = [thread_tools._leave, logging.shutdown]
    steps += [stream.flush for stream in (sys.stdout, sys.stderr) if stream is not None]
    for step in steps:
        try:
            step()
        except Exception:  # noqa: BLE001  # Nothing is left to report it to.
            pass


# -- the liveness file ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _liveness(worker: Worker, path: Union[str, os.PathLike[str], None]) -> Iterator[None]:
    """Touch the file regularly while the worker's own threads run.

    An unreachable platform does not matter: a restart would not fix it, and would lose the running tasks.
    """
    if path is None:
        yield
        return
    _touch(path)
    thread = PeriodicThread("sekuire-liveness", _Liveness(worker, path))
    thread.start()
    try:
        yield
    finally:
        thread.stop()
        thread.join(Deadline(_IDLE_TIME))
        with contextlib.suppress(OSError):
            os.remove(path)


class _Liveness:
    """Keep the file's time fresh. It runs on the thread of the liveness file."""

    def __init__(self, worker: Worker, path: Union[str, os.PathLike[str]]) -> None:
        self._worker = worker
        self._path = path

    def beat(self) -> None:
        _touch_if_alive(self._worker, self._path)

    def interval(self) -> float:
        return LIVENESS_INTERVAL


def _touch(path: Union[str, os.PathLike[str]]) -> None:
    problem = ""
    try:
        with open(path, "w", encoding="ascii") as file:
            file.write(f"{os.getpid()}\n")
    except OSError as error:
        problem = error.strerror or type(error).__name__
    if problem:
        raise ConfigurationError(f"cannot write {os.fspath(path)!r}: {problem}", "liveness_file")


def _touch_if_alive(worker: Worker, path: Union[str, os.PathLike[str]]) -> None:
    if worker.is_alive():
        with contextlib.suppress(ConfigurationError):
            _touch(path)
