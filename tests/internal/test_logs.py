"""The library's log calls: they never raise, name the line that logs, and collide with no attribute."""

from __future__ import annotations

import ast
import logging
import pathlib
import re
import subprocess
import sys
import textwrap
import threading
import types
from typing import Any, Callable, Iterator, List, Tuple

import pytest

import sekuire
from sekuire import TaskContext
from sekuire._internal import logs
from sekuire._internal.logs import SparseLog, get_logger
from sekuire.secret import Secret
from sekuire.wire.models import Task

from ..support.waiting import GUARD

NAME = "sekuire.test_logs"
ROOT = pathlib.Path(sekuire.__file__).parent

METHODS = ("debug", "info", "warning", "error", "exception", "critical", "log")

#: Where a standard logger is right, and why.
STANDARD_LOGGERS = {
    "_internal/logs.py": "it is the helper",
    "handlers/context.py": "ctx.logger belongs to the handler's author",
    "cli/terminal.py": "the command line attaches its handler to the root logger",
}


class Records(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.seen: List[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.seen.append(record)


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch) -> Iterator[List[logging.LogRecord]]:
    """All records of the library; what was said on stderr before counts as not said."""
    monkeypatch.setattr(logs, "_said", {})
    handler = Records()
    logger = logging.getLogger("sekuire")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield handler.seen
    logger.removeHandler(handler)
    logger.setLevel(level)


@pytest.fixture
def factory() -> Iterator[Callable[[Callable[[logging.LogRecord], None]], None]]:
    """Have every record changed by a function as soon as it is made."""
    old = logging.getLogRecordFactory()

    def install(change: Callable[[logging.LogRecord], None]) -> None:
        def make(*args: Any, **kwargs: Any) -> logging.LogRecord:
            record = old(*args, **kwargs)
            change(record)
            return record

        logging.setLogRecordFactory(make)

    yield install
    logging.setLogRecordFactory(old)


def context_of(task_id: str = "t-1") -> TaskContext:
    return TaskContext(Task(task_id=task_id, capability="echo"))


# -- the source -------------------------------------------------------------------------------------------------------


def standard_logging(tree: ast.AST) -> Iterator[Tuple[int, str]]:
    """The lines of a module that make a standard logger, or log through one, and what they do."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "logging":
            for name in node.names:
                if name.name in ("getLogger", *METHODS):
                    yield node.lineno, f"from logging import {name.name}"
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        called, owner = node.func.attr, node.func.value
        if isinstance(owner, ast.Name) and owner.id == "logging":
            if called in ("getLogger", *METHODS):
                yield node.lineno, f"logging.{called}()"
        elif isinstance(owner, ast.Attribute) and owner.attr == "logger" and called in METHODS:
            yield node.lineno, f"….logger.{called}()"


def test_the_library_logs_through_the_helper() -> None:
    """No module makes a standard logger, or logs through a handler's, but those that have a reason to."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        uses = list(standard_logging(ast.parse(path.read_text(encoding="utf-8"))))
        if uses:
            found[path.relative_to(ROOT).as_posix()] = uses
    assert set(found) == set(STANDARD_LOGGERS), found


@pytest.mark.parametrize(
    "source",
    ["import logging\nlog = logging.getLogger('x')", "from logging import getLogger", "logging.error('x')",
     "context.logger.warning('x')"],
)  # fmt: skip
def test_the_search_finds_each_form(source: str) -> None:
    assert list(standard_logging(ast.parse(source)))


# -- the helper -------------------------------------------------------------------------------------------------------


LIFE = """
import logging, sys
from logging.config import dictConfig, fileConfig
from sekuire import Beacon, SekuireSDK, TaskRegistry, create_worker
from sekuire.local import LocalPlatform
from sekuire.testing import AGENT

tasks = TaskRegistry()
tasks.task("speak", lambda ctx, input: ctx.logger.info("the handler speaks"))
with LocalPlatform() as platform:
    options = {"api_base_url": platform.url, "agent_id": AGENT, "install_token": platform.create_install_token(AGENT)}
    worker = create_worker(**options)
    worker.include(tasks)
    # As the documentation of Flask has it, after the library was imported.
    if sys.argv[1] == "dict":
        handler = {"class": "logging.StreamHandler", "formatter": "f"}
        dictConfig({
            "version": 1, "formatters": {"f": {"format": "%(name)s: %(message)s"}},
            "handlers": {"o": handler}, "root": {"level": "INFO", "handlers": ["o"]},
        })
    else:
        fileConfig(sys.argv[2])
    assert logging.getLogger("sekuire.task").disabled
    if sys.argv[1] == "beacon":
        with Beacon(**options):
            pass
    elif sys.argv[1] == "sdk":
        with SekuireSDK(**options, auto_heartbeat=False):
            pass
    else:
        with worker:
            platform.wait(platform.submit("speak", None), timeout=60)
    names = [name for name in logging.Logger.manager.loggerDict if name.startswith("sekuire")]
    print([name for name in names if logging.getLogger(name).disabled])
"""

FILE = """
[loggers]
keys=root
[handlers]
keys=o
[formatters]
keys=f
[logger_root]
level=INFO
handlers=o
[handler_o]
class=StreamHandler
args=()
formatter=f
[formatter_f]
format=%(name)s: %(message)s
"""


@pytest.mark.parametrize("how", ["dict", "file", "beacon", "sdk"])
def test_loggers_that_a_configuration_disabled(how: str, tmp_path: pathlib.Path) -> None:
    """Each start() switches the library's loggers on again, those of its children included, and says so."""
    (tmp_path / "life.py").write_text(LIFE)
    (tmp_path / "logging.ini").write_text(FILE)
    done = subprocess.run(
        [sys.executable, "life.py", how, "logging.ini"],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=GUARD,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"
    assert "sekuire.lifecycle: the loggers " in done.stderr
    assert (
        "sekuire.worker were disabled, as logging.config does unless disable_existing_loggers is False" in done.stderr
    )
    if how in ("dict", "file"):
        assert re.search(r"^sekuire\.task: \[.+\] the handler speaks$", done.stderr, re.MULTILINE)


def test_a_logger_class_that_cannot_be_enabled(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a program's own Logger class raises costs one line on stderr."""

    class Guarded(logging.Logger):
        @property
        def disabled(self) -> bool:  # type: ignore[override]
            if is_broken:
                raise RuntimeError
            return False

        @disabled.setter
        def disabled(self, value: bool) -> None: ...

    is_broken = True
    monkeypatch.setattr(logs, "_said", {})
    monkeypatch.setattr(logs, "_names", {NAME})
    monkeypatch.setitem(logging.Logger.manager.loggerDict, NAME, Guarded(NAME))
    logs.enable_loggers()
    is_broken = False  # pytest looks at all loggers.
    assert (
        "a filter, handler, formatter or record factory of this program raised RuntimeError" in capsys.readouterr().err
    )


def test_a_record_names_the_line_that_logs(records: List[logging.LogRecord]) -> None:
    """Function, line, level and message of each method's record are the caller's."""
    log = get_logger(NAME)
    log.debug("one %d", 1)
    log.info("two")
    log.warning("three %s", "x")
    log.error("four")
    log.log(logging.CRITICAL, "five")
    try:
        raise ValueError("x")
    except ValueError as error:
        log.exception("six")
        log.error("seven", exc_info=error)
        log.error("eight", exc_info=True)  # noqa: G201
    first = records[0].lineno
    assert [record.lineno - first for record in records] == [0, 1, 2, 3, 4, 8, 9, 10]
    assert {record.funcName for record in records} == {"test_a_record_names_the_line_that_logs"}
    assert {record.filename for record in records} == {"test_logs.py"}
    assert {record.name for record in records} == {NAME} == {log.name}
    assert [record.getMessage() for record in records[:3]] == ["one 1", "two", "three x"]
    assert [record.levelname for record in records[:6]] == ["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL", "ERROR"]
    assert [record.exc_info is not None for record in records] == [False] * 5 + [True] * 3
    assert all(record.exc_info[0] is ValueError for record in records if record.exc_info)


def test_a_level_that_is_off_makes_no_record(records: List[logging.LogRecord]) -> None:
    """Nothing is made below the level, and isEnabledFor() says so."""
    log = get_logger(NAME)
    logging.getLogger(NAME).setLevel(logging.ERROR)
    try:
        log.warning("quiet")
        assert (log.isEnabledFor(logging.WARNING), log.isEnabledFor(logging.ERROR)) == (False, True)
    finally:
        logging.getLogger(NAME).setLevel(logging.NOTSET)
    assert records == []


def test_extra_overrides_what_a_record_factory_sets(records: List[logging.LogRecord], factory: Any) -> None:
    """Attributes under the names of ours do not raise, and ours win; an author's own ``extra`` wins over ours."""
    factory(lambda record: record.__dict__.update(task_id="-", capability="-"))
    get_logger(NAME).error("x", extra={"task_id": "t-1", "capability": "echo"})
    context_of().logger.error("x")
    context_of().logger.info("x", extra={"colour": "red"})
    assert [(record.task_id, record.capability) for record in records] == [("t-1", "echo")] * 3  # type: ignore[attr-defined]
    assert records[2].colour == "red"  # type: ignore[attr-defined]
    logging.setLogRecordFactory(logging.LogRecord)
    context_of().logger.info("x", extra={"task_id": "mine"})
    assert records[3].task_id == "mine"  # type: ignore[attr-defined]


class Mischief(Exception):
    pass


class Abort(BaseException):
    pass


@pytest.mark.parametrize("error", [Mischief("secret-text"), SystemExit(3), Abort(), MemoryError(), RecursionError()])
def test_nothing_that_logging_raises_gets_out(
    error: BaseException, records: List[logging.LogRecord], capsys: pytest.CaptureFixture[str]
) -> None:
    """What a filter raises ends in one line on stderr, which names its type and place, and not its text."""

    def refuse(record: logging.LogRecord) -> bool:
        raise error

    logger = logging.getLogger(NAME)
    logger.addFilter(refuse)
    problems: List[BaseException] = []

    def log() -> None:
        try:
            for _ in range(3):
                get_logger(NAME).error("x")
        except BaseException as problem:
            problems.append(problem)

    try:
        thread = threading.Thread(target=log)
        thread.start()
        thread.join()
    finally:
        logger.removeFilter(refuse)
    assert problems == []
    said = capsys.readouterr().err
    assert said.count("\n") == 1, said
    assert type(error).__name__ in said
    assert f"{__file__}:" in said
    assert "in refuse" in said
    assert "secret-text" not in said


def test_an_exit_in_the_main_thread_gets_out(records: List[logging.LogRecord]) -> None:
    """A signal's handler that calls sys.exit() may run inside a log call of the main thread: the program must end."""

    def leave(record: logging.LogRecord) -> bool:
        raise SystemExit(3)

    logger = logging.getLogger(NAME)
    logger.addFilter(leave)
    try:
        with pytest.raises(SystemExit):
            get_logger(NAME).error("x")
    finally:
        logger.removeFilter(leave)


def test_what_is_thrown_into_a_greenlet_gets_out(
    records: List[logging.LogRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill that reaches a greenlet in a log call ends it, in any thread."""
    monkeypatch.setitem(sys.modules, "greenlet", types.SimpleNamespace(GreenletExit=Abort))
    problems: List[BaseException] = []

    def kill(record: logging.LogRecord) -> bool:
        raise Abort

    def log() -> None:
        try:
            get_logger(NAME).error("x")
        except BaseException as problem:
            problems.append(problem)

    logger = logging.getLogger(NAME)
    logger.addFilter(kill)
    try:
        thread = threading.Thread(target=log)
        thread.start()
        thread.join()
    finally:
        logger.removeFilter(kill)
    assert [type(one) for one in problems] == [Abort]


class NoOutput:
    def write(self, text: str) -> int:
        raise ValueError("I/O operation on closed file")

    def flush(self) -> None:
        raise ValueError("I/O operation on closed file")


class LoggingOutput:
    """A stderr that logs what is written to it, as some programs have it."""

    def write(self, text: str) -> int:
        logging.getLogger(NAME).error("%s", text)
        return len(text)

    def flush(self) -> None:
        pass


@pytest.mark.parametrize("stderr", [None, NoOutput(), LoggingOutput()], ids=["none", "closed", "logging"])
def test_without_a_stderr(stderr: Any, records: List[logging.LogRecord], monkeypatch: pytest.MonkeyPatch) -> None:
    """A stderr that is missing, closed, or leads back to the log does not make a log call raise either."""

    def refuse(record: logging.LogRecord) -> bool:
        raise Mischief

    logger = logging.getLogger(NAME)
    logger.addFilter(refuse)
    monkeypatch.setattr(sys, "stderr", stderr)
    try:
        get_logger(NAME).error("x")
    finally:
        logger.removeFilter(refuse)
    assert logs._said


def test_kinds_are_bounded(records: List[logging.LogRecord], capsys: pytest.CaptureFixture[str]) -> None:
    """Each kind of error is reported once, and a class made for each call does not fill stderr."""

    def refuse(record: logging.LogRecord) -> bool:
        raise type(f"Kind{record.args}", (Exception,), {})

    logger = logging.getLogger(NAME)
    logger.addFilter(refuse)
    try:
        for number in range(1000):
            get_logger(NAME).error("%d", number)
    finally:
        logger.removeFilter(refuse)
    assert 1 < capsys.readouterr().err.count("\n") <= 100


def test_a_forked_child_reports_for_itself(tmp_path: pathlib.Path) -> None:
    """The line is written once in each process."""
    if not hasattr(__import__("os"), "fork"):
        pytest.skip("needs fork()")
    program = textwrap.dedent(
        """
        import logging, os
        from sekuire._internal.logs import get_logger

        def refuse(record):
            raise ValueError

        logging.getLogger("sekuire").addHandler(logging.NullHandler())
        logging.getLogger("sekuire.x").addFilter(refuse)
        log = get_logger("sekuire.x")
        log.error("x")
        child = os.fork()
        log.error("x")
        if child == 0:
            os._exit(0)
        os.waitpid(child, 0)
        log.error("x")
        """
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=GUARD, check=True)
    assert done.stderr.count("ValueError") == 2, done.stderr


# -- ctx.logger -------------------------------------------------------------------------------------------------------


def test_a_context_logger(records: List[logging.LogRecord]) -> None:
    """Its records name the handler's line, carry the task's id, and take what a standard logger takes."""
    logger = context_of("t%d").logger
    logger.info("one %d", 1)
    logger.warning("two")
    logger.error("100 %")

    def helper() -> None:
        logger.info("four", stacklevel=2)

    helper()
    try:
        raise ValueError("x")
    except ValueError:
        logger.exception("five")
    logger.info("six", stack_info=True)
    logger.log(logging.INFO, "seven")
    first = records[0].lineno
    assert [record.lineno - first for record in records] == [0, 1, 2, 7, 11, 12, 13]
    assert {record.funcName for record in records} == {"test_a_context_logger"}
    assert {record.pathname for record in records} == {__file__}
    assert [record.getMessage() for record in records[:3]] == ["[t%d] one 1", "[t%d] two", "[t%d] 100 %"]
    assert {record.task_id for record in records} == {"t%d"}  # type: ignore[attr-defined]
    assert records[4].exc_info
    assert "test_a_context_logger" in str(records[5].stack_info)


def test_what_logging_raises_reaches_the_author(records: List[logging.LogRecord]) -> None:
    """A handler's own log call is the author's: it raises as that of a standard logger does."""

    def refuse(record: logging.LogRecord) -> bool:
        raise Mischief

    logger = logging.getLogger("sekuire.task")
    logger.addFilter(refuse)
    try:
        with pytest.raises(Mischief):
            context_of().logger.info("x")
    finally:
        logger.removeFilter(refuse)
    with pytest.raises(KeyError):
        context_of().logger.info("x", extra={"message": "x"})


def test_errors_that_a_platform_causes(caplog: pytest.LogCaptureFixture) -> None:
    """Some are logged; the last one says that more are counted, and the next one how many were."""
    log = SparseLog("sekuire.test", most=2, seconds=1000.0)
    for number in range(500):
        log.error("error %d", number)
    log = SparseLog("sekuire.test", most=2, seconds=0.0)
    log._left_out = 7
    log.error("error %d", 500)
    assert [record.getMessage() for record in caplog.records] == [
        "error 0",
        "error 1; further ones are only counted for 1000 s",
        "error 500 (7 such errors before it were not logged)",
    ]
    assert {record.funcName for record in caplog.records} == {"test_errors_that_a_platform_causes"}


# -- secrets in the lines of others -----------------------------------------------------------------------------------

TOKEN = "skt_in-the-log-of-another"


@pytest.fixture
def other() -> Iterator[Tuple[logging.Logger, List[logging.LogRecord]]]:
    """A logger below another package's, and what a handler of the root logger gets."""
    secret = Secret(TOKEN)
    logger = logging.getLogger("other_package.module")
    logs.scrub_loggers("other_package")
    handler = Records()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logging.root.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield logger, handler.seen
    logging.root.removeHandler(handler)
    logger.setLevel(logging.NOTSET)
    assert secret.reveal() == TOKEN


def test_a_line_of_another_library(other: Any) -> None:
    """Its message loses the secret, once however often it is asked for; a line without one is as it was."""
    logger, seen = other
    for _ in range(3):
        logs.scrub_loggers("other_package")
    logger.debug("sent %r to %s", {"Authorization": f"Bearer {TOKEN}"}, "host")
    logger.debug("sent %d to %s, 100 %%", 5, "host")
    assert [record.getMessage() for record in seen] == [
        "sent {'Authorization': 'Bearer ***'} to host",
        "sent 5 to host, 100 %",
    ]
    assert seen[0].args is None
    assert seen[1].args == (5, "host")
    assert logger.filters == [logs.scrub_record]


def test_an_exception_of_another_library(other: Any) -> None:
    """Its text is masked, and what it came from too. One that cannot be masked is kept as text only."""
    logger, seen = other
    for error in (ValueError(f"refused: {TOKEN}"), ValueError("refused"), Stubborn()):
        try:
            raise error from KeyError(TOKEN) if isinstance(error, Stubborn) or TOKEN in str(error) else None
        except ValueError:
            logger.warning("it failed", exc_info=True)
    masked, free, stubborn = seen
    assert masked.exc_info is not None
    assert "ValueError: refused: ***" in logging.Formatter().format(masked)
    assert TOKEN not in repr((masked.exc_info[1], masked.exc_info[1].__cause__))  # type: ignore[union-attr]
    assert free.exc_info is not None
    assert str(free.exc_info[1]) == "refused"
    assert stubborn.exc_info is None
    assert "Stubborn: ***" in logging.Formatter().format(stubborn)
    assert TOKEN not in logging.Formatter().format(stubborn)


class Stubborn(ValueError):
    def __str__(self) -> str:
        return TOKEN


@pytest.mark.parametrize("message", ["%d", "%s %s", "%s"])
def test_a_line_that_does_not_fit_its_arguments(message: str) -> None:
    """The filter raises nothing of its own, and leaves the line to the program's handlers."""
    record = logging.LogRecord("other", logging.WARNING, "x.py", 1, message, (Unprintable(),), None)
    assert logs.scrub_record(record)
    assert record.msg == message


class Unprintable:
    def __str__(self) -> str:
        raise RuntimeError("no")


def test_it_costs_nothing_while_nothing_is_logged(other: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Below the logger's level no filter is asked."""
    logger, _ = other
    calls: List[str] = []

    def scrubbed(text: str) -> str:
        calls.append(text)
        return text

    monkeypatch.setattr(logs, "scrub", scrubbed)
    logger.setLevel(logging.INFO)
    logger.debug("not logged")
    logger.info("logged")
    assert calls == ["logged"]


def test_warnings_of_our_own(records: List[logging.LogRecord]) -> None:
    """A warning or a logged exception of the library may quote what a server or a handler says."""
    secret = Secret(TOKEN)
    log = get_logger(NAME)
    log.warning("the server says %s", TOKEN)
    try:
        raise ValueError(secret.reveal())
    except ValueError:
        log.debug("it failed", exc_info=True)
    assert records[0].getMessage() == "the server says ***"
    assert "ValueError: ***" in logging.Formatter().format(records[1])
