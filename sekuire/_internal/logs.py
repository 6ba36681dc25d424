"""Log without depending on the program's logging setup.

A program installs filters, handlers, formatters and record factories, and any of them may raise: a filter that reads
``flask.request`` outside a request does. Such an error must not cost a result, a thread or a stop. All modules of the
library log through :func:`get_logger`. ``ctx.logger`` is the exception: it belongs to the handler's author, who sees
what his own log call raises.
"""

# Threads: any thread may log. There is no lock; `_said` relies on dict.setdefault() being atomic.

from __future__ import annotations

import logging
import os
import sys
import threading
from types import FrameType, TracebackType
from typing import Dict, Mapping, Optional, Tuple, Type, Union

_Raised = Tuple[Type[BaseException], BaseException, Optional[TracebackType]]
_ExcInfo = Union[None, bool, BaseException, _Raised, Tuple[None, None, None]]

#: Most kinds of errors that a process reports on stderr: an exception class may be made for each call.
_MOST_SAID = 100
_LOGGING_FILE = logging.info.__code__.co_filename
_said: Dict[Tuple[int, str], object] = {}


class Log:
    """Log like a :class:`logging.Logger`, and never raise.

    ``extra`` is set on the finished record. It cannot collide with attributes that a record factory has set.
    """

    __slots__ = ("_logger", "name")

    def __init__(self, name: str) -> None:
        self.name = name
        self._logger = logging.getLogger(name)

    # Each method calls _log() itself, and not another method, because _log() counts the frames up to the caller.

    def debug(
        self, message: str, *args: object, exc_info: _ExcInfo = None, extra: Optional[Mapping[str, object]] = None
    ) -> None:
        self._log(logging.DEBUG, message, args, exc_info, extra)

    def info(
        self, message: str, *args: object, exc_info: _ExcInfo = None, extra: Optional[Mapping[str, object]] = None
    ) -> None:
        self._log(logging.INFO, message, args, exc_info, extra)

    def warning(
        self, message: str, *args: object, exc_info: _ExcInfo = None, extra: Optional[Mapping[str, object]] = None
    ) -> None:
        self._log(logging.WARNING, message, args, exc_info, extra)

    def error(
        self, message: str, *args: object, exc_info: _ExcInfo = None, extra: Optional[Mapping[str, object]] = None
    ) -> None:
        self._log(logging.ERROR, message, args, exc_info, extra)

    def exception(
        self, message: str, *args: object, exc_info: _ExcInfo = True, extra: Optional[Mapping[str, object]] = None
    ) -> None:
        self._log(logging.ERROR, message, args, exc_info, extra)

    def log(
        self,
        level: int,
        message: str,
        *args: object,
        exc_info: _ExcInfo = None,
        extra: Optional[Mapping[str, object]] = None,
    ) -> None:
        self._log(level, message, args, exc_info, extra)

    def isEnabledFor(self, level: int) -> bool:  # The name of logging.Logger.
        """Return True if a record of ``level`` would be logged."""
        try:
            return self._logger.isEnabledFor(level)
        except Exception as error:  # noqa: BLE001  # A program may set a Logger class of its own.
            _report(error)
            return False

    def _log(
        self,
        level: int,
        message: str,
        args: Tuple[object, ...],
        exc_info: _ExcInfo,
        extra: Optional[Mapping[str, object]],
    ) -> None:
        try:
            if self._logger.isEnabledFor(level):
                record = make_record(self._logger, level, message, args, sys._getframe(2), exc_info=exc_info)
                if extra is not None:
                    record.__dict__.update(extra)
                self._logger.handle(record)
        except Exception as error:  # noqa: BLE001
            _report(error)
        except BaseException as error:
            # In the main thread it may be Ctrl-C, or the sys.exit() of a signal handler that ran just then.
            if threading.current_thread() is threading.main_thread():
                raise
            _report(error)


def get_logger(name: str) -> Log:
    """Return the library's logger of that name."""
    return Log(name)


def make_record(
    logger: logging.Logger,
    level: int,
    message: object,
    args: Tuple[object, ...],
    frame: FrameType,
    *,
    exc_info: _ExcInfo = None,
    extra: Optional[Mapping[str, object]] = None,
    stack_info: Optional[str] = None,
) -> logging.LogRecord:
    """Return a record for the line that ``frame`` executes, as :meth:`logging.Logger.log` makes it.

    :raises KeyError: ``extra`` names an attribute that the record has.
    """
    if isinstance(exc_info, BaseException):
        exc_info = (type(exc_info), exc_info, exc_info.__traceback__)
    elif not isinstance(exc_info, tuple):
        exc_info = sys.exc_info() if exc_info else None
    code = frame.f_code
    return logger.makeRecord(
        logger.name, level, code.co_filename, frame.f_lineno, message, args, exc_info, code.co_name,
        None if extra is None else dict(extra), stack_info,
    )  # fmt: skip


def _place_of(traceback: Optional[TracebackType]) -> str:
    """Return where the code of the program that logging has called was left."""
    place = ""
    is_inside = False
    while traceback is not None:
        code = traceback.tb_frame.f_code
        is_logging = code.co_filename == _LOGGING_FILE
        if is_inside and not is_logging:
            return f" at {code.co_filename}:{traceback.tb_lineno} in {code.co_name}"
        is_inside = is_inside or is_logging
        place = f" at {code.co_filename}:{traceback.tb_lineno} in {code.co_name}"
        traceback = traceback.tb_next
    return place


def _report(error: BaseException) -> None:
    """Write one line on stderr for each kind of error and process."""
    try:
        kind = f"{type(error).__module__}.{type(error).__qualname__}".replace("builtins.", "", 1)
        mine = object()
        # A forked child reports again: it may have been given another stderr.
        if len(_said) >= _MOST_SAID or _said.setdefault((os.getpid(), kind), mine) is not mine:
            return
        # Only the place: the error's text may quote what was logged.
        line = (
            f"sekuire: a log line of the library is lost, because a filter, handler, formatter or record factory of "
            f"this program raised {kind}{_place_of(error.__traceback__)} (shown once; fix it there)"
        )
        if sys.stderr is not None:
            sys.stderr.write(" ".join(line.split()) + "\n")
            sys.stderr.flush()
    except Exception:  # noqa: BLE001  # A closed stderr, or one that logs what is written to it.
        return
    except BaseException:
        if threading.current_thread() is threading.main_thread():
            raise
