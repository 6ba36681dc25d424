"""Keep the instrumentation of this process: what watches submissions, policy checks and handlers, if anything does.

``sekuire.contrib.opentelemetry.instrument()`` installs one. Without one the watched code pays for one comparison.
"""

# Threads: any thread reads `current`; whoever installs an instrumentation writes it, before the work begins.

from __future__ import annotations

from contextvars import Context
from typing import Any, Callable, Mapping, Optional, Protocol, TypeVar

from .logs import get_logger

__all__ = ["Instrumentation", "Submitting", "TaskSpan", "current", "install", "load_remote"]

log = get_logger("sekuire.tracing")

_T = TypeVar("_T")


class Submitting(Protocol):
    """Watch the submission of one task."""

    #: What the task carries as its ``trace_id``, unless its submitter has given one.
    trace_id: Optional[str]

    def run(self, send: Callable[[], _T]) -> _T:
        """Return what ``send()`` returns, a handle with the task's ``id``, or raise what it raises."""


class TaskSpan(Protocol):
    """Watch one run of a handler, or one policy check."""

    def note_error(self, error: BaseException) -> None:
        """Note what the handler has raised."""

    def end(self, failure: Any, policy: Any = None) -> None:
        """Note the end, with the task's :class:`~sekuire.wire.models.Failure` if it has one.

        :param policy: of a policy check, the enforcer that decided.
        """


class Remote(Protocol):
    """Watch a handler in another process. It can be pickled."""

    def run(self, context: Any, function: Callable[[], _T]) -> _T:
        """Return what ``function()``, which runs the handler, returns."""


class Instrumentation(Protocol):
    """Watch what this process does for tasks. No method raises; each may return None, which watches nothing."""

    def begin_submit(
        self, capability: str, agent_id: Optional[str], fields: Mapping[str, Any], url: str
    ) -> Optional[Submitting]:
        """Begin to watch a submission."""

    def begin_task(self, space: Context, context: Any, name: str) -> Optional[TaskSpan]:
        """Begin to watch a handler that will run in ``space``, for a :class:`~sekuire.TaskContext`.

        :param name: what the handler is registered for, a capability or ``"*"``.
        """

    def begin_check(self, context: Any) -> Optional[TaskSpan]:
        """Begin to watch a policy check for a :class:`~sekuire.TaskContext`."""

    def remote(self) -> Optional[Remote]:
        """Return what watches the handler that runs now, once it is in another process."""


#: What watches. Read it as ``instrumentation.current``: it changes.
current: Optional[Instrumentation] = None


def install(instrumentation: Optional[Instrumentation]) -> None:
    """Have ``instrumentation`` watch from now on, None: nothing."""
    global current
    current = instrumentation


def dump_remote() -> Optional[bytes]:
    """Return what watches the running handler in another process, pickled; None without an instrumentation."""
    remote = None if current is None else current.remote()
    if remote is None:
        return None
    import pickle  # Here, because few workers run handlers in other processes.

    return pickle.dumps(remote)


def load_remote(data: Optional[bytes]) -> Optional[Remote]:
    """Return what :func:`dump_remote` has pickled, None if it cannot be loaded here."""
    if data is None:
        return None
    import pickle

    try:
        remote: Remote = pickle.loads(data)
    except Exception as error:  # noqa: BLE001  # The other process may lack OpenTelemetry.
        log.debug("the trace ends here (%s: %s)", type(error).__name__, error)
        return None
    return remote
