"""End the process while some of its threads do not end, without skipping what belongs to a proper end."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
from typing import Callable, List, NoReturn

from . import threads

#: Seconds that the last heartbeats and reports may take.
FLUSH_TIME = 3.0
#: Seconds that the program's ``atexit`` functions, and its output, may take.
ATEXIT_TIME = 2.0


def end_process(code: int) -> NoReturn:
    """End the process with ``code``: flush reports and logs, run the ``atexit`` functions once, and wait for no thread.

    The ``atexit`` functions run in the calling thread, which has to be the main thread. A watchdog ends the process
    after :data:`ATEXIT_TIME` seconds of them.
    """
    try:
        # On a thread with a limit: what leaves may wait for a platform that does not answer.
        leaving = threads.spawn(threads.leave_all, "sekuire-flush")
        if leaving is not None:
            leaving.join(FLUSH_TIME)
        # Without a watchdog a function that hangs would keep the process.
        if threads.spawn(_end_late, "sekuire-watchdog", code) is not None:
            # The interpreter's own end would first wait for the threads of running handlers.
            _quietly(atexit._run_exitfuncs)
            # A handler that hangs in a write holds the lock that a flush needs.
            for step in _flushes():
                _quietly(step)
    finally:
        os._exit(code)


def _flushes() -> List[Callable[[], object]]:
    # Once more: an atexit function may have logged after logging's own.
    steps: List[Callable[[], object]] = [logging.shutdown]
    return steps + [stream.flush for stream in (sys.stdout, sys.stderr) if stream is not None]


def _end_late(code: int) -> None:
    threading.Event().wait(ATEXIT_TIME)
    # Without a word: what hangs may hold the lock of the log, or of stderr.
    os._exit(code)


def _quietly(step: Callable[[], object]) -> None:
    try:
        step()
    except BaseException:  # noqa: BLE001  # atexit has printed it, and nothing is left to report another one to.
        pass
