"""Run a Worker as a process: signals, the SDK's shutdown, what supervisors watch, and an exit that does not hang."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
from typing import Callable, Iterator, Optional, Union

from .._internal.ending import end_process
from .._internal.greenlets import is_main_thread
from .._internal.signals import DRAINING, DrainSignals
from .._internal.speech import speech
from .._internal.threads import Deadline, PeriodicThread, join_all
from .._internal.unstarted import forget_all
from ..errors import ConfigurationError, SekuireError
from ..worker.worker import Worker
from .exit_codes import INTERRUPTED, OK
from .reloader import end_with_reloader
from .systemd import notified

#: Seconds that idle threads have to end.
_IDLE_TIME = 1.0
#: Seconds between two touches of the liveness file.
LIVENESS_INTERVAL = 5.0


def run(
    make: Callable[[], Worker],
    report: Callable[[SekuireError], int],
    liveness_file: Union[str, os.PathLike[str], None] = None,
) -> int:
    """Make a worker, start its SDK and run it until it has stopped, shut its SDK down, and return the exit code.

    SIGTERM, SIGHUP and Ctrl-C end ``make`` and the SDK's login. Once the worker runs they drain it, and a later SIGTERM
    or Ctrl-C ends the process. The process ends here too if a handler still runs after the drain: the interpreter would
    wait for it without limit. Either way the ``atexit`` functions run.

    :param make: makes the worker, for example by importing the user's module.
    :param report: reports the error that stopped the worker to the user, and returns its exit code.
    :param liveness_file: touched every 5 s while the worker is alive, and removed at its end; for a probe.
    :raises ConfigurationError: the liveness file cannot be written, or the port for health and metrics is taken.
    """
    with _spoken(), _Signals() as signals, contextlib.ExitStack() as shown:
        end_with_reloader()
        try:
            worker = make()
            shown.callback(worker.vitals.close)
            # Before the login, which may take a while and may use up an install token.
            worker.vitals.show()
            if worker.sdk is not None and not worker.sdk.is_started():
                worker.sdk.start()
        except _Ended as ended:
            return ended.code
        signals.worker = worker
        try:
            with _liveness(worker, liveness_file), notified(worker):
                code = _serve(worker, report)
                signals.is_over = True
                _shut_down(worker, signals)
            if _is_busy(worker):
                end_process(code)
        except _Ended as ended:
            end_process(ended.code)
    return code


@contextlib.contextmanager
def _spoken() -> Iterator[None]:
    """Print the library's lines on stderr, terminal or not, and what handlers print at once."""
    _print_at_once()
    speech.is_worker = True
    try:
        yield
    finally:
        speech.is_worker = False
        # This process runs one of the workers that the module may hold.
        forget_all()


def _print_at_once() -> None:
    """Write each line of stdout when it is printed, also to a pipe: what a handler prints belongs to its task."""
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        with contextlib.suppress(OSError, ValueError):
            reconfigure(line_buffering=True)


class _Ended(BaseException):
    """Raised by a signal that ends the process. It is not an Exception, so that the user's module does not catch it."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class _Signals(DrainSignals):
    """Handle signals before and after the Worker runs. After, a later one ends all.

    Before, they end the import, and a resource that does not open.

    The Worker replaces these handlers during ``start(block=True)`` and puts them back. What comes just before, it finds
    in the queue. Outside the main thread, where no handler can be set, this class sets none.
    """

    def __init__(self) -> None:
        #: The worker, once it is made.
        self.worker: Optional[Worker] = None
        #: The worker has stopped.
        self.is_over = False
        super().__init__(DRAINING if is_main_thread() else ())

    def note(self, number: int) -> None:
        if self.worker is None or self.worker.shared.is_opening:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            raise _Ended(OK)
        come = self.classify(number)
        if not self.is_over:
            self.put(come)
        elif come.must_end:
            raise _Ended(128 + number)


def _serve(worker: Worker, report: Callable[[SekuireError], int]) -> int:
    """Run ``worker`` until it has stopped, and return the exit code."""
    try:
        worker.start(block=True)
    except SekuireError as error:
        return report(error)
    return INTERRUPTED if worker.stop_reason == f"signal {int(signal.SIGINT)}" else OK


def _shut_down(worker: Worker, signals: _Signals) -> None:
    """Shut the worker's SDK down."""
    # What came while the Worker gave the signals back.
    come = signals.get(0.0)
    if come is not None and come.must_end:
        raise _Ended(128 + come.number)
    if worker.sdk is not None:
        # The SDK's Beacon keeps the lease while it sends heartbeats. Its last one reports that the agent has stopped.
        worker.sdk.shutdown()


def _is_busy(worker: Worker) -> bool:
    """Return True if handlers still run. The interpreter would wait for them without limit."""
    threads = [one for one in threading.enumerate() if one.name.startswith("sekuire-task")]
    return bool(join_all(threads, Deadline(_IDLE_TIME))) or bool(worker.stats().overdue)


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
    # Where the process ends without coming back here.
    atexit.register(_remove, path)
    thread = PeriodicThread("sekuire-liveness", _Liveness(worker, path))
    thread.start()
    try:
        yield
    finally:
        thread.stop()
        thread.join(Deadline(_IDLE_TIME))
        atexit.unregister(_remove)
        _remove(path)


def _remove(path: Union[str, os.PathLike[str]]) -> None:
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
