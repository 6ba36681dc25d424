"""Find the project's handlers, and run each with clean connections and the project's language and time zone."""

# Threads: a plain handler uses the ORM in its own thread (`sekuire-task_N`). The ORM of an async handler runs in one
# further thread of its task, in which asgiref runs all that `sync_to_async` is given, or in those of
# `asyncio.to_thread`. All of them end before around() does. `_made` belongs to one task: its threads append to it, and
# its handler's thread reads it when they have ended.

from __future__ import annotations

import contextlib
import contextvars
import threading
from importlib import import_module
from typing import Any, Iterator, List, Optional, Tuple

from asgiref.sync import SyncToAsync, ThreadSensitiveContext
from django.apps import AppConfig, apps
from django.conf import settings
from django.db import close_old_connections, reset_queries
from django.db.backends.signals import connection_created
from django.utils import timezone, translation
from django.utils.module_loading import module_has_submodule

from ..._internal.logs import get_logger
from ...errors import ConfigurationError
from ...handlers.context import TaskContext
from ...handlers.invoke import CallNext
from ...handlers.registry import TaskRegistry

__all__ = ["around", "discover", "load", "middleware", "task", "tasks"]

log = get_logger("sekuire.contrib.django")

#: The connections that were opened for the running task, each with the thread that opened it.
_made: contextvars.ContextVar[Optional[List[Tuple[Any, threading.Thread]]]] = contextvars.ContextVar(
    "sekuire_django_connections", default=None
)

#: The name of the module with handlers in each installed app.
MODULE = "sekuire_tasks"

#: All handlers of the project, whichever app declares them.
tasks = TaskRegistry()
task = tasks.task
middleware = tasks.middleware


def discover() -> List[str]:
    """Import ``sekuire_tasks.py`` of every installed app, and return the capabilities that are declared.

    A second call imports nothing. It raises what a module raises; for ``sys.exit()`` see :func:`load`.
    """
    for app in apps.get_app_configs():
        load(app)
    return tasks.names


class Exited(ConfigurationError):
    """Report that a module called ``sys.exit()``, which must not end the process as if nothing were wrong."""


def load(app: AppConfig) -> None:
    """Import ``sekuire_tasks.py`` of an app, if it has one.

    :raises Exited: the module called ``sys.exit()``.
    """
    name = f"{app.name}.{MODULE}"
    try:
        import_module(name)
        return
    except SystemExit as error:
        problem = f"ended with sys.exit({'' if error.code is None else error.code}) when it was imported"
        cause = error
    except ModuleNotFoundError:
        if module_has_submodule(app.module, MODULE):
            raise
        return
    raise Exited(f"{problem}; what a script does belongs under: if __name__ == '__main__':", name) from cause


def around(ctx: TaskContext, input: Any, call_next: CallNext) -> Any:
    """Begin and end a task as Django begins and ends a request. This is the middleware of the bridge.

    It closes a connection (or returns it to its pool) that is older than ``CONN_MAX_AGE``, fails its health check or
    was left broken by a handler. The others stay open for this thread's next task. Those of threads that ended with an
    async handler are closed.
    """
    reset_queries()
    close_old_connections()
    made: List[Tuple[Any, threading.Thread]] = []
    token = _made.set(made)
    try:
        # A handler that activates another language or zone does so for its own task only, as in a request.
        with _own_thread(), translation.override(settings.LANGUAGE_CODE), timezone.override(None):
            return call_next(input)
    finally:
        _made.reset(token)
        close_old_connections()
        for connection, thread in made:
            # A thread that is alive is this one, or one of a pool of the project's own, whose other users may need the
            # connection at this moment.
            if not thread.is_alive():
                _close(connection)


@contextlib.contextmanager
def _own_thread() -> Iterator[None]:
    """Have asgiref run what a task gives to ``sync_to_async`` in a thread of its own, which ends with the block.

    Without it asgiref runs the database work of all async handlers in one thread, on one connection. They would wait
    for each other and be in each other's transactions.
    """
    # As `async with ThreadSensitiveContext()` does it, which Django has around a request. That needs a loop, and ends
    # before the loop does, whose last tasks may use the ORM.
    own = ThreadSensitiveContext()
    token = SyncToAsync.thread_sensitive_context.set(own)
    try:
        yield
    finally:
        SyncToAsync.thread_sensitive_context.reset(token)
        executor = SyncToAsync.context_to_thread_executor.pop(own, None)
        if executor is not None:
            executor.shutdown()


def _note_connection(*, connection: Any, **kwargs: Any) -> None:
    made = _made.get()
    if made is not None:
        made.append((connection, threading.current_thread()))


def _close(connection: Any) -> None:
    """Close the connection of a thread that has ended, with the transaction that is open in it."""
    connection.inc_thread_sharing()
    try:
        connection.close()
    except Exception as error:  # noqa: BLE001  # It may be broken. The handler's result does not depend on it.
        log.warning("cannot close a connection to the database %r (%s)", connection.alias, type(error).__name__)
    finally:
        connection.dec_thread_sharing()


connection_created.connect(_note_connection, dispatch_uid="sekuire.contrib.django")
