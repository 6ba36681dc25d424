"""The lines for people: who gets them, decided at each line, and what they look like."""

from __future__ import annotations

import io
import logging
import traceback
import types
from typing import Any, Iterator, List, Tuple

import pytest

from sekuire._internal import speech as speech_module
from sekuire._internal.logs import get_logger
from sekuire._internal.raising import raises_here
from sekuire._internal.speech import HANDLERS, NOBODY, PERSON, audience, speech
from sekuire.config import keep_quiet
from sekuire.errors import APIError, AuthenticationError, ConfigurationError, SekuireError, TransportError
from sekuire.handlers.context import TaskContext
from sekuire.transport.reach import Reach, duration
from sekuire.wire.models import Task

NAME = "sekuire.test_speech"


class Stderr(io.StringIO):
    def __init__(self, *, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


class Records(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.seen: List[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.seen.append(record.getMessage())


class Handlers(List[logging.Handler]):
    """Root's handlers, without those that pytest adds to each phase of a test."""

    def append(self, handler: logging.Handler) -> None:
        if not type(handler).__module__.startswith("_pytest"):
            super().append(handler)


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A program without logging: neither pytest's handlers nor what other tests have set."""
    monkeypatch.setattr(logging.root, "handlers", Handlers())
    monkeypatch.setattr(logging.root, "level", logging.WARNING)
    logging.root.manager._clear_cache()  # type: ignore[attr-defined]
    for name, value in (("is_quiet", False), ("is_worker", False), ("formatter", None)):
        monkeypatch.setattr(speech, name, value)
    monkeypatch.delenv("SEKUIRE_QUIET", raising=False)
    yield
    logging.root.manager._clear_cache()  # type: ignore[attr-defined]


def standing_for_stderr(monkeypatch: pytest.MonkeyPatch, stderr: Any) -> Any:
    """pytest sets sys.stderr at the beginning of each phase, so it is replaced where it is used."""
    monkeypatch.setattr(speech_module, "sys", types.SimpleNamespace(stderr=stderr))
    last = logging.StreamHandler(stderr)
    last.setLevel(logging.WARNING)
    monkeypatch.setattr(logging, "lastResort", last)
    return stderr


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Stderr:
    stderr: Stderr = standing_for_stderr(monkeypatch, Stderr(terminal=True))
    return stderr


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Stderr:
    stderr: Stderr = standing_for_stderr(monkeypatch, Stderr(terminal=False))
    return stderr


def test_on_a_terminal(terminal: Stderr) -> None:
    """Lines for people are printed bare; so are warnings, which logging.lastResort would print else."""
    log = get_logger(NAME)
    log.say(logging.INFO, "connected to %s", "x")
    log.say(logging.WARNING, "lost")
    log.info("a detail")
    log.warning("look at %s", "it")
    assert terminal.getvalue() == "connected to x\nlost\nlook at it\n"


def test_without_a_terminal(pipe: Stderr) -> None:
    """Nothing but what Python prints by itself: warnings that are not lines for people."""
    log = get_logger(NAME)
    log.say(logging.INFO, "connected")
    log.say(logging.WARNING, "task failed")
    log.warning("look at it")
    assert pipe.getvalue() == "look at it\n"


def test_in_a_worker_process(pipe: Stderr) -> None:
    """`sekuire worker` prints without a terminal too, with time and level."""
    speech.is_worker = True
    get_logger(NAME).say(logging.INFO, "connected")
    (line,) = pipe.getvalue().splitlines()
    assert line.endswith(f" INFO    {NAME}: connected")
    assert line[:4].isdigit()


@pytest.mark.parametrize("name", ["", "sekuire", NAME])
def test_a_handler_of_the_program(name: str, terminal: Stderr) -> None:
    """It gets each line from the moment it is there, and stderr none. Nothing comes twice."""
    log = get_logger(NAME)
    logger = logging.getLogger(name)
    handler = Records()
    log.say(logging.WARNING, "first")
    logger.addHandler(handler)
    try:
        log.say(logging.WARNING, "second")
        log.say(logging.INFO, "not enabled")
        log.warning("third")
    finally:
        logger.removeHandler(handler)
    log.say(logging.WARNING, "fourth")
    assert handler.seen == ["second", "third"]
    assert terminal.getvalue() == "first\nfourth\n"


def test_no_propagation(terminal: Stderr) -> None:
    """If root has a handler and the library's logger does not pass lines on, the program wants none."""
    logger = logging.getLogger("sekuire")
    logging.root.addHandler(Records())
    logger.propagate = False
    try:
        get_logger(NAME).say(logging.WARNING, "task failed")
    finally:
        logger.propagate = True
    assert terminal.getvalue() == ""


def test_no_handler_is_added(terminal: Stderr) -> None:
    """A later basicConfig() finds the loggers as Python made them."""
    get_logger(NAME).say(logging.INFO, "connected")
    assert terminal.getvalue()
    assert [logging.root.handlers, logging.getLogger("sekuire").handlers] == [[], []]


def test_quiet(terminal: Stderr, monkeypatch: pytest.MonkeyPatch) -> None:
    """It silences the lines for people; other warnings come as Python prints them."""
    keep_quiet(None)
    assert not speech.is_quiet
    monkeypatch.setenv("SEKUIRE_QUIET", "yes")
    keep_quiet(False)
    assert not speech.is_quiet
    keep_quiet(None)
    log = get_logger(NAME)
    log.say(logging.WARNING, "task failed")
    log.warning("look at it")
    assert terminal.getvalue() == "look at it\n"
    monkeypatch.setenv("SEKUIRE_QUIET", "maybe")
    with pytest.raises(ConfigurationError, match="SEKUIRE_QUIET"):
        keep_quiet(None)


def test_levels_of_the_program(terminal: Stderr) -> None:
    """A level that the program sets counts, and so does logging.disable(). Root's own does not."""
    logger = logging.getLogger("sekuire")
    log = get_logger(NAME)
    logger.setLevel(logging.ERROR)
    log.say(logging.WARNING, "one")
    logger.setLevel(logging.DEBUG)
    log.debug("two")
    logger.setLevel(logging.NOTSET)
    logging.disable(logging.INFO)
    log.say(logging.INFO, "three")
    logging.disable(logging.NOTSET)
    logging.root.setLevel(logging.ERROR)
    log.say(logging.INFO, "four")
    assert terminal.getvalue() == "two\nfour\n"


def test_filters(terminal: Stderr, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A filter of the program may refuse a line. One that raises costs the line, and nothing else."""
    monkeypatch.setattr("sekuire._internal.logs._said", {})
    logger = logging.getLogger(NAME)

    def refuse(record: logging.LogRecord) -> bool:
        if record.getMessage() == "bad":
            raise KeyError
        return record.getMessage() != "no"

    logger.addFilter(refuse)
    try:
        for message in ("no", "bad", "yes"):
            get_logger(NAME).say(logging.INFO, message)
    finally:
        logger.removeFilter(refuse)
    assert terminal.getvalue() == "yes\n"
    assert capsys.readouterr().err.startswith("sekuire: a log line of the library is lost")


def test_one_line(terminal: Stderr) -> None:
    """What a platform or a handler says neither forges a line nor steers the terminal."""
    get_logger(NAME).say(logging.INFO, "[%s] failed", "t\n\x1b[2J\x9b1mconnected")
    assert terminal.getvalue() == "[t  [2J 1mconnected] failed\n"


def test_a_stderr_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """No stderr, a closed one and one that cannot be written cost the line."""
    speech.is_worker = True
    closed = io.StringIO()
    closed.close()
    for stderr in (None, closed):
        standing_for_stderr(monkeypatch, stderr)
        get_logger(NAME).say(logging.INFO, "connected")


def test_the_handlers_own_logger(terminal: Stderr) -> None:
    """ctx.logger prints as the library does, with the task's id."""
    context = TaskContext(Task(task_id="t%1", capability="copy"))
    context.logger.info("page %d", 3)
    context.logger.debug("a detail")
    assert terminal.getvalue() == "[t%1] page 3\n"


def test_nobody_listens(pipe: Stderr) -> None:
    """Without a listener no record is made: a task's end costs a question."""
    made: List[Tuple[object, ...]] = []
    factory = logging.getLogRecordFactory()
    logging.setLogRecordFactory(lambda *args, **kwargs: made.append(args) or factory(*args, **kwargs))  # type: ignore[func-returns-value]
    try:
        get_logger(NAME).say(logging.INFO, "[%s] done", "t")
    finally:
        logging.setLogRecordFactory(factory)
    assert made == []
    assert audience(logging.getLogger(NAME), logging.INFO) == NOBODY
    assert (HANDLERS, PERSON) != (NOBODY, NOBODY)


# -- an outage --------------------------------------------------------------------------------------------------------


def refused() -> TransportError:
    error = TransportError("cannot reach h:1: Connection refused")
    error.was_sent = False
    return error


def test_an_outage_is_said_once(terminal: Stderr) -> None:
    """Whoever notices it first says it; whoever comes back last says that it is over."""
    reach = Reach("http://h:1")
    stream, beacon = object(), object()
    reach.note(refused())
    reach.fail(stream, refused())
    reach.fail(beacon, APIError(503))
    (line,) = terminal.getvalue().splitlines()
    assert line == ("cannot reach h:1: Connection refused (does the platform run, and is the URL right?); retrying")
    assert reach.restore(beacon) is None
    # The first time the caller says that it is connected.
    assert reach.restore(stream) is None
    (last,) = terminal.getvalue().splitlines()[1:]
    assert last.startswith("reconnected to http://h:1 after 0.")


def test_the_first_connection(terminal: Stderr) -> None:
    """Its line is the caller's, who is given how long it took."""
    reach = Reach("http://h:1")
    assert reach.restore(reach) is None
    other = Reach("http://h:1")
    other.note(refused())
    other.log_in()
    assert other.restore(other) is not None
    assert len(terminal.getvalue().splitlines()) == 1


def test_a_later_outage(terminal: Stderr) -> None:
    """Each outage is two lines. A login that ends one which nobody else has noticed says so."""
    reach = Reach("http://h:1")
    reach.restore(reach)
    for _ in range(2):
        reach.fail(reach, TransportError("h:1 did not answer in time"))
        assert reach.is_lost
        assert reach.restore(reach) is None
    reach.note(refused())
    reach.log_in()
    reach.fail(reach, refused())
    reach.leave(reach)
    assert not reach.is_lost
    lines = [line.partition(" after ")[0] for line in terminal.getvalue().splitlines()]
    lost, back = (
        "lost the connection to http://h:1 (h:1 did not answer in time); reconnecting",
        "reconnected to http://h:1",
    )
    again = "lost the connection to http://h:1 (cannot reach h:1: Connection refused); reconnecting"
    assert lines == [lost, back, lost, back, again, back, again]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (3.21, "3.2 s"), (60, "1 min 0 s"), (249.7, "4 min 10 s")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


# -- errors -----------------------------------------------------------------------------------------------------------


def test_an_error_is_raised_from_one_frame() -> None:
    """The user sees his own line and the function that he called, and no cause."""

    def deeper() -> None:
        raise AuthenticationError("no") from ValueError("inner")

    @raises_here
    def start() -> None:
        deeper()

    with pytest.raises(SekuireError) as caught:
        start()
    error = caught.value
    assert [frame.name for frame in traceback.extract_tb(error.__traceback__)] == [
        "test_an_error_is_raised_from_one_frame",
        "start",
    ]
    assert (error.__cause__, error.__context__) == (None, None)
