"""Log without depending on the program's logging setup.

A program installs filters, handlers, formatters and record factories, and any of them may raise: a filter that reads
``flask.request`` outside a request does. Such an error must not cost a result, a thread or a stop. All modules of the
library log through :func:`get_logger`. ``ctx.logger`` is the exception: it belongs to the handler's author, who sees
what his own log call raises.
"""

# Threads: any thread may log. There is no lock; `_said` relies on dict.setdefault() being atomic, and `_names` is
# filled by imports.

from __future__ import annotations

import logging
import math
import os
import sys
from types import FrameType, TracebackType
from typing import Dict, List, Mapping, Optional, Set, Tuple, Type, Union

from .clock import time
from .greenlets import is_main_thread, is_thrown
from .scrub import scrub
from .speech import HANDLERS, NOBODY, PERSON, audience, print_record

_Raised = Tuple[Type[BaseException], BaseException, Optional[TracebackType]]
_ExcInfo = Union[None, bool, BaseException, _Raised, Tuple[None, None, None]]

#: Most kinds of errors that a process reports on stderr: an exception class may be made for each call.
_MOST_SAID = 100
#: Most exceptions of one chain that are looked at.
_MOST_CAUSES = 20
_LOGGING_FILE = logging.info.__code__.co_filename
_said: Dict[Tuple[int, str], object] = {}
_formatter = logging.Formatter()
#: The names of the library's loggers.
_names: Set[str] = {"sekuire"}


class Log:
    """Log like a :class:`logging.Logger`, and never raise.

    ``extra`` is set on the finished record. It cannot collide with attributes that a record factory has set.
    """

    __slots__ = ("_logger", "name")

    def __init__(self, name: str) -> None:
        self.name = name
        self._logger = logging.getLogger(name)
        _names.add(name)

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

    def say(
        self,
        level: int,
        message: str,
        *args: object,
        exc_info: _ExcInfo = None,
        extra: Optional[Mapping[str, object]] = None,
    ) -> None:
        """Log a line that a person at the terminal wants to see. Without handlers it is printed (:mod:`.speech`)."""
        self._log(level, message, args, exc_info, extra, True)

    def is_printed(self, level: int) -> bool:
        """Return True if a line of ``level`` is printed for a person now, because no handler gets it."""
        return audience(self._logger, level) == PERSON

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
        is_for_people: bool = False,
    ) -> None:
        try:
            logger = self._logger
            if is_for_people:
                whose = audience(logger, level)
            elif logger.isEnabledFor(level):
                # Where nobody else gets a warning, logging.lastResort prints it.
                whose = audience(logger, level) or HANDLERS
            else:
                return
            if whose is NOBODY:
                return
            record = make_record(logger, level, message, args, sys._getframe(2), exc_info=exc_info)
            if extra is not None:
                record.__dict__.update(extra)
            if record.exc_info or level >= logging.WARNING:
                # It may quote what a handler raised or a server said.
                scrub_record(record)
            if whose is PERSON:
                print_record(logger, record)
            else:
                logger.handle(record)
        except Exception as error:  # noqa: BLE001
            _report(error)
        except BaseException as error:
            # In the main thread it may be Ctrl-C, or the sys.exit() of a signal handler that ran just then. A log call
            # is also where gevent.kill() or a gevent.Timeout may reach a greenlet.
            if is_main_thread() or is_thrown(error):
                raise
            _report(error)


class SparseLog(Log):
    """Log at most ``most`` errors in ``seconds``: a platform may cause them as fast as it can send.

    The line after the next pause says how many were left out. ::

        log = SparseLog("sekuire.dispatch")
        for event in unreadable:
            log.error("an event cannot be read: %s", event)
    """

    # Threads: any thread may log. A race between two costs or adds a line, so there is no lock.

    __slots__ = ("_left_out", "_lines", "_most", "_seconds", "_since")

    def __init__(self, name: str, most: int = 10, seconds: float = 60.0) -> None:
        super().__init__(name)
        self._most = most
        self._seconds = seconds
        self._since = -math.inf
        self._lines = self._left_out = 0

    def error(
        self, message: str, *args: object, exc_info: _ExcInfo = None, extra: Optional[Mapping[str, object]] = None
    ) -> None:
        now = time.monotonic()
        if now - self._since >= self._seconds:
            self._since, self._lines = now, 0
        self._lines += 1
        if self._lines > self._most:
            self._left_out += 1
            return
        if self._left_out:
            message, args = f"{message} (%d such errors before it were not logged)", (*args, self._left_out)
            self._left_out = 0
        if self._lines == self._most:
            message, args = f"{message}; further ones are only counted for %d s", (*args, self._seconds)
        self._log(logging.ERROR, message, args, exc_info, extra)


def get_logger(name: str) -> Log:
    """Return the library's logger of that name."""
    return Log(name)


def scrub_record(record: logging.LogRecord) -> bool:
    """Remove the secrets of this process from a record. Return True: it is a filter, and lets each record pass.

    If the text of a logged exception holds one, it is masked in the exception itself: other tools read that too. Where
    that does not help, the record keeps the text without the secret, and not the exception.
    """
    try:
        message = record.getMessage()
        clean = scrub(message)
        if clean != message:
            record.msg, record.args = clean, None
        if record.exc_info and record.exc_info[1] is not None:
            text = _formatter.formatException(record.exc_info)
            if scrub(text) != text:
                _mask(record.exc_info[1])
                text = _formatter.formatException(record.exc_info)
                clean = scrub(text)
                record.exc_text = clean
                if clean != text:
                    record.exc_info = None
    except Exception:  # noqa: BLE001  # Arguments that do not fit: the program's handlers report them.
        pass
    return True


def _mask(error: BaseException) -> None:
    """Remove secrets from the texts that an exception holds, and from those that it came from."""
    pending: List[Optional[BaseException]] = [error]
    seen: List[BaseException] = []
    while pending and len(seen) < _MOST_CAUSES:
        one = pending.pop()
        if one is None or any(one is other for other in seen):
            continue
        seen.append(one)
        pending += [one.__cause__, one.__context__, *getattr(one, "exceptions", ())]
        one.args = tuple(scrub(value) if isinstance(value, str) else value for value in one.args)
        for name, value in list(vars(one).items()):
            if isinstance(value, str):
                vars(one)[name] = scrub(value)


def scrub_loggers(*packages: str) -> None:
    """Remove the secrets of this process from what the loggers of other packages log, as far as they exist by now.

    A logger's filters see no record of the loggers below it, so each of them gets the filter. It costs nothing for a
    record that is not logged.
    """
    prefixes = tuple(f"{package}." for package in packages)
    for name, logger in logging.root.manager.loggerDict.copy().items():
        if isinstance(logger, logging.Logger) and (name in packages or name.startswith(prefixes)):
            # addFilter() does nothing for a filter that is there.
            logger.addFilter(scrub_record)


def enable_loggers() -> None:
    """Switch on those of the library's loggers that are disabled, and say so in the log. Each ``start()`` calls it.

    ``logging.config`` disables every logger that exists already and that the configuration does not name, unless
    ``disable_existing_loggers`` is False. A program that logs by root's handlers hardly means the library by it.
    """
    disabled = []
    for name in sorted(_names):
        try:
            logger = logging.getLogger(name)
            if logger.disabled:
                logger.disabled = False
                disabled.append(name)
        except Exception as error:  # noqa: BLE001  # A program may set a Logger class of its own.
            _report(error)
    if disabled:
        _log.info(
            "the loggers %s were disabled, as logging.config does unless disable_existing_loggers is False; they log "
            "again (to silence them set a level)", ", ".join(disabled),
        )  # fmt: skip


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
    """Return the place in the program's own code, called by logging, where the error was raised."""
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
    except BaseException as problem:
        if is_main_thread() or is_thrown(problem):
            raise


_log = get_logger("sekuire.lifecycle")
