"""Log in JSON, and with the ids of the task that is being handled, also by :mod:`logging.config`. ::

    import logging.config

    logging.config.dictConfig({
        "version": 1,
        "disable_existing_loggers": False,
        "filters": {"task": {"()": "sekuire.logging.TaskFilter"}},
        "formatters": {"json": {"()": "sekuire.logging.JsonFormatter"}},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "json", "filters": ["task"]}},
        "root": {"level": "INFO", "handlers": ["stderr"]},
    })

Importing this module changes nothing.
"""

# Threads: any thread may log. There is no lock: the current task is a context variable, and the owner of a thread is
# kept by the thread.

from __future__ import annotations

import datetime as dt
import json
import logging
from typing import Any, Dict, Mapping, Optional

from . import config
from ._internal.speech import speech
from ._internal.threads import owner_of_thread
from .handlers.context import control_of, current_task

__all__ = ["JsonFormatter", "TaskFilter", "task_ids"]

#: The ids that a record may carry, in the order of the line.
IDS = ("task_id", "capability", "trace_id", "worker_id", "installation_id")

#: Attributes that Python gives to every record.
_OF_EVERY_RECORD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "exc_text"}
#: The keys of a line, which an attribute of the program's own does not replace.
_OWN_KEYS = frozenset(("ts", "level", "logger", "message", *IDS, "exception", "stack"))


class TaskFilter(logging.Filter):
    """Put the ids of the current task on every record, of any logger: attach it to a handler. It refuses no record.

    >>> import logging
    >>> from sekuire.logging import TaskFilter
    >>> handler = logging.StreamHandler()
    >>> handler.addFilter(TaskFilter(missing="-"))
    >>> handler.setFormatter(logging.Formatter("%(levelname)s %(task_id)s %(message)s"))

    The attributes are ``task_id``, ``capability``, ``trace_id``, ``worker_id`` and ``installation_id``. One that the
    record has already stays. The current task is that of the handler, and of what the handler calls: in its thread, in
    its coroutine, and in ``asyncio.to_thread()``. A thread that the handler starts itself has it if it runs in a copy
    of the context (:func:`contextvars.copy_context`). Threads of the library know their worker.

    :param missing: the value of an id that is not known.
    """

    def __init__(self, missing: Optional[str] = None) -> None:
        super().__init__()
        self._missing = missing

    def filter(self, record: logging.LogRecord) -> bool:
        """Set the ids on ``record``. Return True."""
        found = _ids_for(record)
        for name in IDS:
            if getattr(record, name, None) is None:
                setattr(record, name, found.get(name, self._missing))
        return True


class JsonFormatter(logging.Formatter):
    """Make one line of JSON from each record, whatever it holds: it never raises.

    >>> import io, logging
    >>> from sekuire.logging import JsonFormatter
    >>> handler = logging.StreamHandler(io.StringIO())
    >>> handler.setFormatter(JsonFormatter())

    Keys are ``ts`` (RFC 3339, UTC), ``level``, ``logger``, ``message``; the ids of :class:`TaskFilter` that are known;
    what the program has given as ``extra``; ``exception`` and ``stack``, if there are any. It finds the ids without the
    filter too, if it runs in the thread that logs. With a :class:`logging.handlers.QueueHandler` give that the filter.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, in ASCII, without the line's end."""
        try:
            fields = self._fields_of(record)
        except Exception as error:  # noqa: BLE001  # A record may be of any class.
            fields = {"message": f"(a record that cannot be read: {type(error).__name__})"}
        return "{" + ", ".join(f"{_encoded(str(key))}: {_encoded(value)}" for key, value in fields.items()) + "}"

    def _fields_of(self, record: logging.LogRecord) -> Dict[str, Any]:
        fields: Dict[str, Any] = {
            "ts": _time_of(record.created),
            "level": record.levelname,
            "logger": record.name,
            "message": _message_of(record),
        }
        found = _ids_for(record)
        for name in IDS:
            value = getattr(record, name, None)
            if value is None:
                value = found.get(name)
            if value is not None:
                fields[name] = value
        for name, value in vars(record).items():
            if name not in _OF_EVERY_RECORD and name not in _OWN_KEYS:
                fields[name] = value
        exception = self._exception_of(record)
        if exception:
            fields["exception"] = exception
        if record.stack_info:
            fields["stack"] = record.stack_info
        return fields

    def _exception_of(self, record: logging.LogRecord) -> str:
        if record.exc_text or not record.exc_info:
            return record.exc_text or ""
        if isinstance(record.exc_info, tuple) and record.exc_info[0] is None:
            return ""
        try:
            return self.formatException(record.exc_info)
        except Exception:  # noqa: BLE001  # An exception whose text cannot be made, or another value.
            return _text_of(record.exc_info)


def task_ids() -> Dict[str, str]:
    """Return the ids of the current task that are known, as :class:`TaskFilter` finds them; none outside of a task.

    >>> from sekuire.logging import task_ids
    >>> def add_ids(event, hint):  # For sentry_sdk.init(before_send=add_ids), as an example.
    ...     event.setdefault("tags", {}).update(task_ids())
    ...     return event
    """
    found = _known_ids()
    return {name: str(found[name]) for name in IDS if found.get(name) is not None}


def json_line(level: int, logger: str, message: str, exception: str = "") -> str:
    """Return the JSON line for a message that is not logged. ``exception`` is the text of its traceback."""
    record = logging.LogRecord(logger, level, "", 0, message, None, None)
    record.exc_text = exception
    return _formatter.format(record)


def print_as(log_format: Optional[str]) -> None:
    """Give the lines that this library prints by itself the form of the option, or of ``SEKUIRE_LOG_FORMAT``.

    It is for all of the process. None, where the variable is not set either, changes nothing.

    :raises ConfigurationError: the variable holds another format.
    """
    if config.log_format(log_format) == "json":
        speech.formatter = _formatter
    elif log_format is not None:
        speech.formatter = None


def ids_of(owner: Any) -> Mapping[str, Optional[str]]:
    """Return the ids of the Worker or the Beacon ``owner``, or ``owner`` itself if it is a mapping of ids."""
    if isinstance(owner, Mapping):
        return owner
    store = getattr(getattr(owner, "installation", None), "store", None)
    return {
        "worker_id": getattr(owner, "worker_id", None),
        "installation_id": None if store is None else store.current.installation_id,
    }


def _known_ids() -> Dict[str, Optional[str]]:
    """Return the ids of the current task and of its worker, or else of the object that owns this thread."""
    found: Dict[str, Optional[str]] = {}
    context = current_task.get()
    owner = owner_of_thread() if context is None else control_of(context).owner or owner_of_thread()
    if owner is not None:
        found.update(ids_of(owner))
    if context is not None:
        found.update(task_id=context.task_id, capability=context.capability, trace_id=context.trace_id)
    return found


def _ids_for(record: logging.LogRecord) -> Dict[str, Optional[str]]:
    """Return what is known here about the ids of ``record``."""
    found = _known_ids()
    named = _named_in(record)
    if named is not None and named != found.get("task_id"):
        # A thread of the library speaks of another task than the one that it runs.
        found.update(task_id=named, capability=None, trace_id=None)
    return found


def _named_in(record: logging.LogRecord) -> Optional[str]:
    """Return the task that a line of this library is about: such a line begins with its id, in brackets."""
    name, message, args = record.name, record.msg, record.args
    is_ours = isinstance(name, str) and name.startswith("sekuire.")
    is_about = is_ours and isinstance(message, str) and message.startswith("[%s] ")
    return args[0] if is_about and isinstance(args, tuple) and args and isinstance(args[0], str) else None


def _message_of(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except Exception:  # noqa: BLE001  # Arguments that do not fit the message, or raise.
        return f"{_text_of(record.msg)} {_text_of(record.args)}"


def _time_of(created: Any) -> str:
    try:
        moment = dt.datetime.fromtimestamp(created, dt.timezone.utc)
    except (TypeError, ValueError, OverflowError, OSError):
        moment = dt.datetime.now(dt.timezone.utc)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _encoded(value: Any) -> str:
    """Return ``value`` as JSON in ASCII, or its text if it has no JSON form."""
    try:
        text = json.dumps(value, allow_nan=False, default=_text_of)
        if "\\ud" in text:
            # It may hold half of a pair of surrogates, which strict readers refuse.
            plain = json.dumps(value, ensure_ascii=False, allow_nan=False, default=_text_of)
            text = json.dumps(json.loads(plain.encode("utf-8", "replace")))
    except Exception:  # noqa: BLE001  # NaN, keys of another type, a value that contains itself.
        return json.dumps(_text_of(value).encode("utf-8", "replace").decode())
    return text


def _text_of(value: Any) -> str:
    try:
        return str(value)
    except Exception as error:  # noqa: BLE001
        return f"({type(value).__name__}: its text cannot be made: {type(error).__name__})"


_formatter = JsonFormatter()
