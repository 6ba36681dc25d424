"""Warn at the end of the program of what was made and never started."""

# Threads: any thread may make and start. `_lock` guards `_names`. The warning is logged by the thread that ends the
# program.

from __future__ import annotations

import itertools
import os
import sys
import threading
from typing import Dict

from . import fork
from .logs import get_logger
from .threads import at_exit, is_in_executor

log = get_logger("sekuire.worker")

#: Most objects that are remembered. A program that makes more and starts none is warned of these.
_MOST = 20

_numbers = itertools.count()
_names: Dict[int, str] = {}
_lock = threading.Lock()


class Made:
    """Stand for one object that is to be started. ::

        made = Made("Worker of the agent 'greeter'")
        made.forget()  # It is started, or stopped, or used in another way.

    It does not refer to the object, and the warning comes although the object may be gone by then.
    """

    __slots__ = ("_number",)

    def __init__(self, name: str) -> None:
        self._number = next(_numbers)
        if is_in_executor():
            # It imports the module that makes workers, and starts none.
            return
        with _lock:
            if len(_names) >= _MOST:
                return
            _names[self._number] = name
        at_exit(_warner)

    def forget(self) -> None:
        """Do not warn of it."""
        with _lock:
            _names.pop(self._number, None)


def forget_all() -> None:
    """Warn of nothing that has been made until now."""
    with _lock:
        _names.clear()


class _Warner:
    """Warn when the interpreter ends."""

    def __init__(self) -> None:
        self.pid = os.getpid()

    def leave(self) -> None:
        with _lock:
            names = list(_names.values())
            _names.clear()
        # A program that ends by an error, and an interactive one, know why nothing was started.
        if names and not hasattr(sys, "last_type") and not hasattr(sys, "ps1"):
            log.warning("made and never started: %s; call start()", ", ".join(dict.fromkeys(names)))


_warner = _Warner()


def _reset() -> None:
    # What the parent made, the parent starts.
    global _lock
    _lock = threading.Lock()
    _names.clear()
    _warner.pid = os.getpid()


fork.call_in_child(_reset)
