"""Make audit events of the records of Python's logging."""

from __future__ import annotations

import logging
import os
from typing import Any, Dict, Union

from .._internal.threads import check_process
from ..errors import ConfigurationError
from .log import MAX_TEXT, AuditLog, check_event_type
from .sender import is_sending, log

__all__ = ["AuditHandler"]

_LEVELS = ((logging.ERROR, "error"), (logging.WARNING, "warn"), (logging.INFO, "info"))


class AuditHandler(logging.Handler):
    """Make audit events of the records of Python's logging. ::

        logging.getLogger("my_agent").addHandler(AuditHandler(sdk))

    An event holds the logger's name and the message. For an exception it has the type and the message, without
    traceback and variables. It has the task's id if the record carries one, as those of ``ctx.logger`` do. Levels
    become severities: ``debug``, ``info``, ``warn``, ``error``. Records about the sending of events make no new ones.
    A message goes to the platform as it is: attach this to loggers whose records hold no secrets.

    :param sdk: the :class:`~sekuire.SekuireSDK` that sends the events.
    :param level: records below it are left out.
    :param event_type: one of the protocol's.
    :raises ConfigurationError: ``sdk`` is not a SekuireSDK, or the type is unknown.
    """

    def __init__(self, sdk: Any, level: Union[int, str] = logging.WARNING, event_type: str = "health") -> None:
        super().__init__(level)
        if not isinstance(getattr(sdk, "audit", None), AuditLog):
            raise ConfigurationError(f"must be a SekuireSDK, got {type(sdk).__name__}", "sdk")
        check_event_type(event_type)
        self._audit: AuditLog = sdk.audit
        self._event_type = event_type
        #: True once it was reported that this process will never send.
        self._is_reported = False

    def emit(self, record: logging.LogRecord) -> None:
        """Note the record as an event. Never raise."""
        if is_sending() or record.name == log.name:
            return
        try:
            if self._audit.pid == os.getpid():
                self._audit.log(self._event_type, _fields_of(record), _severity_of(record.levelno))
            elif not self._is_reported:
                self._is_reported = True
                check_process(self._audit.pid, "SekuireSDK")
        except Exception:  # noqa: BLE001
            self.handleError(record)


def _severity_of(level: int) -> str:
    return next((name for least, name in _LEVELS if level >= least), "debug")


def _fields_of(record: logging.LogRecord) -> Dict[str, Any]:
    fields: Dict[str, Any] = {"logger": record.name, "message": record.getMessage()[:MAX_TEXT]}
    error = record.exc_info[1] if record.exc_info else None
    if error is not None:
        fields["exception"] = {"type": type(error).__name__, "message": str(error)[:MAX_TEXT]}
    for name in ("task_id", "capability"):
        value = getattr(record, name, None)
        if isinstance(value, str):
            fields[name] = value
    return fields
