"""Read ``settings.SEKUIRE`` and make workers from it."""

from __future__ import annotations

from typing import Any, Mapping

from django.conf import settings

from ..._internal.logs import enable_loggers, get_logger
from ...errors import ConfigurationError
from ...sdk import SekuireSDK
from ...worker.worker import Worker
from ..settings import Settings
from . import handlers

log = get_logger("sekuire.contrib.django")

NAME = "SEKUIRE"
#: The warning about an executor whose processes have no initializer, and what to do.
ELSEWHERE = "handlers run in other processes, where Django is not set up and the middleware of this app does not run"
PREPARE = "give the executor initializer=django.setup; the page on Django says what such a handler must do itself"


def read() -> Settings:
    """Return the settings.

    :raises ConfigurationError: ``SEKUIRE`` is not a dict, or has an unknown key.
    """
    values: Any = getattr(settings, NAME, {})
    if not isinstance(values, Mapping) or not all(isinstance(key, str) for key in values):
        raise ConfigurationError('must be a dict, such as {"AGENT_ID": "my-agent"}', f"settings.{NAME}")
    return Settings(values, lambda key: f"settings.{NAME}[{key!r}]")


def make_worker(sdk: SekuireSDK, **options: Any) -> Worker:
    """Return a worker for all handlers of the project, not yet started. ``options`` win over the settings.

    :raises ConfigurationError: a setting is wrong, or a handler cannot be declared.
    """
    handlers.discover()
    enable_loggers()  # LOGGING may have disabled those of modules that the settings import.
    found = read()
    worker = found.worker(sdk, **options)
    if found.runs_elsewhere(**options):
        log.warning("%s; %s", ELSEWHERE, PREPARE)
    worker.middleware(handlers.around)
    worker.include(handlers.tasks)
    return worker
