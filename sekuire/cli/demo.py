"""Show the whole path of a task on the user's own text: ``sekuire demo``."""

from __future__ import annotations

import argparse
import ast
import codecs
import contextlib
import datetime as dt
import math
import os
import signal
import sysconfig
import time
import warnings
from types import FrameType
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import attrs

from .._internal.greenlets import is_main_thread
from ..config import ConnectionConfig
from ..errors import SekuireError
from ..handlers.context import TaskContext
from ..sdk import SekuireSDK
from ..secret import Secret
from ..transport.http import HttpClient
from ..wire import protocol
from ..worker.worker import Worker
from . import terminal
from .exits import FAILED, INTERRUPTED, OK, CommandError, complain
from .options import key_header, local_platform

DESCRIPTION = """\
Start a local platform in this process, connect an agent to it, and have a worker summarize the paragraphs of the
given files (without a file: the docstrings of the standard library's modules). Then pause the worker, resume it and
terminate it. Nothing leaves this machine, and nothing is left behind."""
EPILOG = "Exit codes: 0 fine, 1 something failed, 2 a file cannot be used, 130 interrupted."
LOG_LEVEL = "warning"

AGENT = "demo-agent"
CAPABILITY = "summarize"

_MOST_FILE = 32 * 1024 * 1024
#: Characters after which a paragraph is split.
_LONGEST = 100_000
_SUMMARY = 140
#: Rows of the table, the longest text of a source in it, and the least width at which it has each column.
_ROWS = 12
_LONGEST_SOURCE = 24
_LEAST_COLUMNS = (0, 56, 20, 0)
#: Seconds without any result after which the demo gives up.
_PATIENCE = 30.0
_SLICE = 0.1


@attrs.frozen(slots=True)
class Piece:
    """Hold a text to summarize, and where it comes from."""

    source: str
    text: str = attrs.field(repr=False)


@attrs.frozen(slots=True)
class Result:
    """Hold the summary of a piece, or why it has none. The times are the platform's."""

    source: str
    text: str
    is_good: bool
    begun: dt.datetime
    ended: dt.datetime

    @property
    def milliseconds(self) -> float:
        return (self.ended - self.begun).total_seconds() * 1000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="*", metavar="FILE", help="text files, UTF-8")
    parser.add_argument("--limit", type=_limit, default=500, metavar="N", help="submit at most N tasks (default 500)")


def _limit(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text[:9]) <= 100_000:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 to 100000, got {text!r}")
    return int(text)


def run(args: argparse.Namespace) -> int:
    platform_class = local_platform()
    pieces = _paragraphs(args.files) if args.files else _docstrings()
    what = "paragraphs" if args.files else "docstrings of the standard library"
    terminal.say(f"{len(pieces)} {what}" + (f", of which the first {args.limit}" if len(pieces) > args.limit else ""))
    pieces = pieces[: args.limit]
    interrupts = Interrupts()
    with interrupts, contextlib.ExitStack() as stack:
        platform = stack.enter_context(platform_class())
        token = platform.create_install_token(AGENT)
        sdk = SekuireSDK(AGENT, api_base_url=platform.url, install_token=token, heartbeat_interval=1.0)
        stack.callback(sdk.shutdown, 3.0)
        show = _Show(platform, sdk, interrupts)
        stack.callback(show.close)
        try:
            problems = show.play(pieces)
        except SekuireError as error:
            problems = [str(error)]
    if problems:
        complain("demo", *problems[:5])
    return FAILED if problems else OK


class Interrupts:
    """Turn SIGINT into a flag that is checked between two steps, so that each step ends. The second SIGINT ends the
    process. Use it as a context manager on the main thread; on another thread it does nothing."""

    def __init__(self) -> None:
        self._is_set = False
        self._previous: Any = None

    def __enter__(self) -> Interrupts:
        if is_main_thread():
            self._previous = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def check(self) -> None:
        """Raise KeyboardInterrupt if SIGINT has come."""
        if self._is_set:
            raise KeyboardInterrupt

    def _note(self, number: int, frame: Optional[FrameType]) -> None:
        if self._is_set:
            os._exit(INTERRUPTED)
        self._is_set = True


# -- the texts --------------------------------------------------------------------------------------------------------


def _paragraphs(paths: Sequence[str]) -> List[Piece]:
    pieces: List[Piece] = []
    problems: List[str] = []
    for path in paths:
        try:
            pieces += _split(os.path.basename(path), _read(path))
        except CommandError as error:
            problems += [f"{path}: {line}" for line in error.lines]
    if problems:
        more = [f"and {len(problems) - 5} more files"] if len(problems) > 5 else []
        raise CommandError(*problems[:5], *more)
    return pieces


def _read(path: str) -> str:
    """Return the text of a file.

    :raises CommandError: the file cannot be used; the text does not name the path.
    """
    if os.path.isdir(path):
        raise CommandError("is a directory; name the files in it")
    try:
        with open(path, "rb") as file:
            data = file.read(_MOST_FILE + 1)
    except FileNotFoundError:
        problem = "there is no such file"
    except (OSError, ValueError) as error:
        problem = f"cannot be read: {getattr(error, 'strerror', None) or error}"
    else:
        return _decode(data)
    raise CommandError(problem)


def _decode(data: bytes) -> str:
    if len(data) > _MOST_FILE:
        raise CommandError(f"is larger than {_MOST_FILE // 1024 // 1024} MiB, too much for a demo")
    encoding = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    text: Optional[str] = None
    with contextlib.suppress(UnicodeDecodeError):
        text = data.decode(encoding)
    if text is None or "\0" in text:
        raise CommandError("is not a text file in UTF-8; the demo summarizes text")
    if not any(character.isalnum() for character in text):
        raise CommandError("is empty: there is no text to summarize")
    return text


def _split(name: str, text: str) -> List[Piece]:
    """Return the paragraphs of a text, which blank lines separate, each with the number of its first line."""
    pieces: List[Piece] = []
    lines: List[str] = []
    begun = 1
    for number, line in enumerate([*text.replace("\r\n", "\n").replace("\r", "\n").split("\n"), ""], start=1):
        if line.strip():
            begun = begun if lines else number
            lines.append(line)
            continue
        paragraph = "\n".join(lines)
        lines = []
        if any(character.isalnum() for character in paragraph):
            parts = [paragraph[start : start + _LONGEST] for start in range(0, len(paragraph), _LONGEST)]
            pieces += [Piece(f"{name}:{begun}", part) for part in parts]
    return pieces


def _docstrings() -> List[Piece]:
    """Return the docstrings of the standard library's modules, read from the sources: some imports have effects."""
    folder = sysconfig.get_paths()["stdlib"]
    pieces = []
    try:
        names = sorted(name for name in os.listdir(folder) if name.endswith(".py"))
    except OSError:
        names = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names:
            try:
                with open(os.path.join(folder, name), "rb") as file:
                    docstring = ast.get_docstring(ast.parse(file.read(_MOST_FILE)))
            except (OSError, ValueError, SyntaxError, RecursionError):
                continue
            if docstring and docstring.strip():
                pieces.append(Piece(name[:-3], docstring[:_LONGEST]))
    if not pieces:
        raise CommandError(f"there are no sources of the standard library in {folder}; name a file to summarize")
    return pieces


# -- the show ---------------------------------------------------------------------------------------------------------


def summarize(ctx: TaskContext, input: Any) -> Dict[str, Any]:
    """Return the first sentence, cut to 140 characters, and the number of words. This is the demo's handler."""
    text = terminal.clean(input["text"]).lstrip("#*->= ")
    sentence = text
    for mark in (". ", "! ", "? "):
        sentence = sentence.partition(mark)[0] + (mark[0] if mark in sentence else "")
    if len(sentence) > _SUMMARY:
        sentence = sentence[: _SUMMARY - 3].rpartition(" ")[0] or sentence[: _SUMMARY - 3]
        sentence += "..."
    return {"summary": sentence, "words": len(text.split())}


class _Show:
    """Run the demo's steps in order, on the main thread."""

    def __init__(self, platform: Any, sdk: SekuireSDK, interrupts: Interrupts) -> None:
        self._platform = platform
        self._sdk = sdk
        self._interrupts = interrupts
        self._http = HttpClient(ConnectionConfig(api_base_url=platform.url), pool_size=1)
        self._key = key_header(Secret(platform.api_key))
        self.close = self._http.close

    def play(self, pieces: Sequence[Piece]) -> List[str]:
        """Run all steps and return the problems, as sentences."""
        worker, installation_id = self._connect()
        results = self._summarize_all(worker, pieces)
        terminal.say()
        for line in _table(results, terminal.columns() if terminal.draws_tables() else None):
            terminal.say(line)
        terminal.say()
        self._pause_and_resume(worker, installation_id)
        self._terminate(worker, installation_id)
        terminal.say()
        for line in _summary(results):
            terminal.say(line)
        bad = sum(not one.is_good for one in results)
        return [f"{bad} of {len(results)} tasks failed; see the table"] if bad else []

    def _connect(self) -> Tuple[Worker, str]:
        self._sdk.start()
        worker = self._sdk.create_task_worker(capabilities=[CAPABILITY], heartbeat_interval=1.0)
        worker.on_task(CAPABILITY, summarize)
        worker.start()
        self._until(worker.is_connected, "the worker's stream was not opened")
        installation_id = self._sdk.installation_credentials.installation_id
        assert installation_id is not None
        terminal.say(f"a local platform runs on {self._platform.url}")
        terminal.say(
            f"{AGENT} is {self._sdk.beacon_status.state} as {installation_id}, its worker accepts {CAPABILITY!r}"
        )
        return worker, installation_id

    def _submit(self, piece: Piece) -> str:
        """Submit a task over HTTP, as any program would, and return its id."""
        self._interrupts.check()
        fields = {"text": piece.text, "source": piece.source}
        reply = self._http.request(
            "POST",
            self._http.endpoints.path("tasks"),
            body=protocol.submit_body(CAPABILITY, fields, AGENT, {}),
            credential=self._key,
        )
        return str(reply.check().json()["task_id"])

    def _summarize_all(self, worker: Worker, pieces: Sequence[Piece]) -> List[Result]:
        with terminal.Progress("summarizing", len(pieces)) as progress:

            def look() -> None:
                stats = worker.stats()
                progress.update(stats.completed + stats.failed + stats.rejected)

            ids = []
            for piece in pieces:
                ids.append(self._submit(piece))
                look()
            results = []
            for piece, task_id in zip(pieces, ids):
                results.append(_result(piece, self._wait(task_id, look)))
                progress.update(len(results))
        return results

    def _wait(self, task_id: str, look: Callable[[], None] = lambda: None) -> Dict[str, Any]:
        """Return the task once it has ended.

        :raises CommandError: it has not ended within the limit.
        """
        end = time.monotonic() + _PATIENCE
        while time.monotonic() < end:
            self._interrupts.check()
            look()
            try:
                task: Dict[str, Any] = self._platform.wait(task_id, _SLICE)
            except TimeoutError:
                continue
            return task
        raise CommandError(f"task {task_id} had no result after {_PATIENCE:.0f} s; run again with -v", code=FAILED)

    def _pause_and_resume(self, worker: Worker, installation_id: str) -> None:
        self._platform.command(installation_id, "pause", "the demo shows a pause")
        self._until(worker.is_paused, "the worker did not obey the pause command")
        task = self._wait(self._submit(Piece("pause", "This task comes while the worker is paused.")))
        error = task.get("error") or {}
        if task["status"] != "failed" or error.get("code") != "worker_paused":
            raise CommandError(f"a paused worker did not reject a task: it is {task['status']}", code=FAILED)
        terminal.say(f"pause: the next task is rejected, {error['code']} ({error['message']})")
        self._platform.command(installation_id, "resume")
        self._until(lambda: not worker.is_paused(), "the worker did not obey the resume command")
        task = self._wait(self._submit(Piece("resume", "This task comes after the pause.")))
        if task["status"] != "completed":
            raise CommandError(f"a resumed worker did not complete a task: it is {task['status']}", code=FAILED)
        terminal.say("resume: the next task is completed")

    def _terminate(self, worker: Worker, installation_id: str) -> None:
        self._platform.command(installation_id, "terminate", "the demo is over")
        self._until(lambda: worker.wait(0), "the worker did not obey the terminate command")
        terminal.say(f"terminate: the worker has stopped ({worker.stop_reason})")

    def _until(self, condition: Callable[[], bool], otherwise: str) -> None:
        end = time.monotonic() + _PATIENCE
        while not condition():
            self._interrupts.check()
            if time.monotonic() > end:
                raise CommandError(f"{otherwise} within {_PATIENCE:.0f} s; run again with -v", code=FAILED)
            time.sleep(0.005)


# -- what is printed --------------------------------------------------------------------------------------------------


def _result(piece: Piece, task: Dict[str, Any]) -> Result:
    is_good = task["status"] == "completed"
    if is_good:
        text = str(task["output"]["summary"])
    else:
        error = task["error"] or {}
        text = f"FAILED {error.get('code')}: {error.get('message')}"
    begun, ended = protocol.parse_time(task["created_at"]), protocol.parse_time(task["completed_at"])
    assert begun is not None
    assert ended is not None
    return Result(piece.source, text, is_good, begun, ended)


def _table(results: Sequence[Result], columns: Optional[int]) -> List[str]:
    """Return the first rows as a table, drawn at most ``columns`` wide or (None) plain.

    A narrow table has fewer columns, with the summary last.
    """
    shown = [index for index, least in enumerate(_LEAST_COLUMNS) if columns is None or columns >= least]
    rows = [["#", "SOURCE", "MS", "SUMMARY"]]
    for number, one in enumerate(results[:_ROWS], start=1):
        source = terminal.clean(one.source)[:_LONGEST_SOURCE]
        rows.append([str(number), source, f"{one.milliseconds:.1f}", terminal.clean(one.text)])
    for index in (0, 2):
        size = max(len(row[index]) for row in rows)
        for row in rows:
            row[index] = row[index].rjust(size)
    rows = [[row[index] for index in shown] for row in rows]
    colours = ["bold", *("" if one.is_good else "red" for one in results)]
    lines = terminal.plain_table(rows) if columns is None else terminal.drawn_table(rows, colours, columns)
    more = len(results) - _ROWS
    return [*lines, f"\N{HORIZONTAL ELLIPSIS} and {more} more"[:columns]] if more > 0 else lines


def _summary(results: Sequence[Result]) -> List[str]:
    latencies = sorted(one.milliseconds for one in results)
    seconds = (max(one.ended for one in results) - min(one.begun for one in results)).total_seconds()
    bad = sum(not one.is_good for one in results)
    rate = f"{len(results) / seconds:.0f} tasks/s" if seconds > 0 else "at once"
    return [
        f"tasks      {len(results)}",
        f"failures   {terminal.paint(str(bad), 'red' if bad else 'green')}",
        f"latency    p50 {_percentile(latencies, 0.5):.1f} ms, p95 {_percentile(latencies, 0.95):.1f} ms",
        f"rate       {rate}",
    ]


def _percentile(ordered: Sequence[float], share: float) -> float:
    """Return the nearest-rank percentile of sorted values."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]
