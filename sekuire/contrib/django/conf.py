"""``settings.SEKUIRE`` as the library's settings."""

from __future__ import annotations

from typing import Any, Mapping

from django.conf import settings

from ..._internal.logs import get_logger
from ...errors import ConfigurationError
from ...sdk import SekuireSDK
from ...worker.worker import Worker
from ..settings import Settings, is_unprepared
from . import handlers

log = get_logger("sekuire.contrib.django")

NAME = "SEKUIRE"
#: What is said of an executor of other processes that have no initializer, and what to do.
ELSEWHERE = "handlers run in other processes, where Django is not set up and what is around a handler here is missing"
PREPARE = "give the executor initializer=django.setup; the page on Django says what a handler there has to do itself"


def read() -> Settings:
    """The settings.

    :raises ConfigurationError: ``SEKUIRE`` is no dict, or holds a key that is no setting.
    """
    values: Any = getattr(settings, NAME, {})
    if not isinstance(values, Mapping) or not all(isinstance(key, str) for key in values):
        raise ConfigurationError('must be a dict, such as {"AGENT_ID": "my-agent"}', f"settings.{NAME}")
    return Settings(values, lambda key: f"settings.{NAME}[{key!r}]")


def make_worker(sdk: SekuireSDK, **options: Any) -> Worker:
    """A worker for all handlers of the project, not yet started; ``options`` win over the settings.

    :raises ConfigurationError: a wrong setting, or a handler that cannot be declared.
    """
    handlers.discover()
    worker = read().worker(sdk, **options)
    if is_unprepared(worker.config.executor):
        log.warning("%s; %s", ELSEWHERE, PREPARE)
    worker.middleware(handlers.around)
    worker.include(handlers.tasks)
    return worker
