"""Replace the locks, threads and sockets that a forked child inherits.

A child has only the thread that forked. A lock that another thread of the parent held is never released in the child,
a thread that the parent started does not run there, and a socket is shared with the parent.
"""

# Threads: any thread may register. The functions run in the child, on its only thread, before fork() returns there.

from __future__ import annotations

import os
import weakref
from typing import Any, Callable, List, TypeVar

from .logs import get_logger

log = get_logger("sekuire.lifecycle")

_T = TypeVar("_T")

_functions: List[Callable[[], object]] = []
_objects: weakref.WeakKeyDictionary[Any, Callable[[Any], object]] = weakref.WeakKeyDictionary()


def reset_in_child(instance: _T, reset: Callable[[_T], object]) -> None:
    """Call ``reset(instance)`` in each forked child, as long as ``instance`` lives.

    Replace the locks of an object like this::

        class Store:
            def __init__(self) -> None:
                self._lock = threading.Lock()
                fork.reset_in_child(self, Store._reset)

            def _reset(self) -> None:
                self._lock = threading.Lock()

    :param reset: a function of the class, not a bound method, which would keep the object alive.
    """
    _objects[instance] = reset


def call_in_child(function: Callable[[], object]) -> None:
    """Call ``function()`` in each forked child, before the objects are reset. For the state of a module."""
    _functions.append(function)


def _after_fork() -> None:
    for function in list(_functions):
        _call(function)
    for instance, reset in list(_objects.items()):
        _call(reset, instance)


def _call(function: Callable[..., object], *args: object) -> None:
    try:
        function(*args)
    except Exception:
        # Without this, one object would leave all later ones with the locks of the parent.
        log.exception("cannot reset %r after a fork", function)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
