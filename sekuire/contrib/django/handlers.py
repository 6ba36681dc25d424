"""The project's handlers, and what is around each of them in a worker: clean connections, language and time zone."""

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

#: The module that is looked for in each installed app.
MODULE = "sekuire_tasks"

#: All handlers of the project, whichever app declares them.
tasks = TaskRegistry()
task = tasks.task
middleware = tasks.middleware


def discover() -> List[str]:
    """Import ``sekuire_tasks.py`` of every installed app; the capabilities that are declared then.

    A second call imports nothing. What a module raises passes, but for an exit: see :func:`load`.
    """
    for app in apps.get_app_configs():
        load(app)
    return tasks.names


class Exited(ConfigurationError):
    """The module ended with ``sys.exit()``, which must not end the process as if all were well."""


def load(app: AppConfig) -> None:
    """Import ``sekuire_tasks.py`` of one app, if it has one.

    :raises Exited: it ended with ``sys.exit()``.
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
    """The middleware of the bridge: a task begins and ends as a request does.

    A connection that is older than ``CONN_MAX_AGE``, that fails its health check or that a handler left broken is
    closed, or given back to its pool; the others stay open for this thread's next task.
    """
    reset_queries()
    close_old_connections()
    try:
        # As in a request: a handler that activates another language or zone does so for its own task only.
        with translation.override(settings.LANGUAGE_CODE), timezone.override(None):
            return call_next(input)
    finally:
        close_old_connections()
