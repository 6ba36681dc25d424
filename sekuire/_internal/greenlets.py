"""Know whether gevent or eventlet has replaced the threads of this process, and what that changes.

Their ``monkey.patch_all()`` and ``monkey_patch()`` put greenlets in the place of threads. All of them share one thread
of the system, and each runs until it waits. The other modules read ``threading``, ``socket``, ``queue`` and ``time``
when they use them, and keep no state in a ``threading.local``, so it does not matter whether a program patches before
or after it imports the library.
"""

# Threads: any thread may call anything. There is no state.

from __future__ import annotations

import sys
import threading
from typing import Any, Optional, Tuple

#: Where each library keeps what it throws into a greenlet to end it, or to end a wait.
_THROWN = (
    ("greenlet", "GreenletExit"),
    ("gevent.timeout", "Timeout"),
    ("eventlet.timeout", "Timeout"),
)


def patched_by() -> Optional[str]:
    """Return the name of the library that has put greenlets in the place of threads: "gevent", "eventlet" or None."""
    gevent: Any = sys.modules.get("gevent.monkey")
    if gevent is not None and gevent.is_module_patched("threading"):
        return "gevent"
    eventlet: Any = sys.modules.get("eventlet.patcher")
    if eventlet is not None and eventlet.is_monkey_patched("thread"):
        return "eventlet"
    return None


def is_main_thread() -> bool:
    """Return True on the main thread of the program."""
    current, main = threading.current_thread(), threading.main_thread()
    # eventlet loads a second copy of `threading`, whose object of the main thread is another one, of another class.
    return current is main or type(current).__name__ == type(main).__name__ == "_MainThread"


def is_thrown(error: BaseException) -> bool:
    """Return True if ``error`` was thrown into this greenlet, to end it or its wait. It must reach who handles it."""
    return isinstance(error, _thrown())


def _thrown() -> Tuple[type, ...]:
    found = (getattr(sys.modules.get(module), name, None) for module, name in _THROWN)
    return tuple(one for one in found if isinstance(one, type))
