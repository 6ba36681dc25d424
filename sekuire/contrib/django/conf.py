"""``settings.SEKUIRE`` as the library's settings."""

from __future__ import annotations

from typing import Any, Mapping

from django.conf import settings

from ...errors import ConfigurationError
from ...sdk import SekuireSDK
from ...worker import Worker
from ..settings import Settings
from . import handlers

NAME = "SEKUIRE"


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
    worker.middleware(handlers.around)
    worker.include(handlers.tasks)
    return worker
