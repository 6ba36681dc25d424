"""Find the project's handlers, and run each with clean connections and the project's language and time zone."""

from __future__ import annotations

from importlib import import_module
from typing import Any, List

from django.apps import AppConfig, apps
from django.conf import settings
from django.db import close_old_connections, reset_queries
from django.utils import timezone, translation
from django.utils.module_loading import module_has_submodule

from ...errors import ConfigurationError
from ...handlers.context import TaskContext
from ...handlers.invoke import CallNext
from ...handlers.registry import TaskRegistry

__all__ = ["around", "discover", "load", "middleware", "task", "tasks"]

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
    """Raised when a module calls ``sys.exit()``, which must not end the process as if nothing were wrong."""


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
    was left broken by a handler. The others stay open for this thread's next task.
    """
    reset_queries()
    close_old_connections()
    try:
        # A handler that activates another language or zone does so for its own task only, as in a request.
        with translation.override(settings.LANGUAGE_CODE), timezone.override(None):
            return call_next(input)
    finally:
        close_old_connections()
