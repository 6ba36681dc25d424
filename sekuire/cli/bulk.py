"""Submit each line of a file as a task, and collect the results: ``sekuire send --jsonl`` and ``--csv``."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import queue
import secrets
import signal
import threading
import time
from collections import deque
from typing import Any, Callable, Deque, Dict, Iterator, List, Optional, Tuple, Union

from .._internal.ending import end_process
from .._internal.threads import Deadline, join_all, spawn
from ..client import SekuireClient, TaskHandle
from ..errors import APIError, SekuireError
from ..wire import protocol
from . import terminal
from .check import InputCheck
from .describe import as_json
from .exits import FAILED, INTERRUPTED, OK, CommandError, complain, report
from .jobs import Job
from .lines import Line, Source
from .results import continue_with, note, outcome_of

__all__ = ["RETRY_FOR", "run_job"]

#: Seconds for which a submission is sent again: nobody may sit at the terminal.
RETRY_FOR = 60.0
#: Submissions that are sent at once, and results that are waited for at once.
_SUBMITTERS, _COLLECTORS = 16, 16
#: Tasks that have been submitted and whose results have not been collected, and results that wait to be printed.
_MOST_OPEN, _MOST_WAITING = 10_000, 100
#: Problems of a file that are shown.
_MOST_PROBLEMS = 5
#: Seconds between two looks at whether the job ends, while a queue is full; seconds to wait for threads at its end.
_LOOK, _LAST = 0.2, 1.0

#: What can become of a line, as it is counted.
_COUNTED = ("completed", "failed", "refused", "unknown", "open", "submitted")
#: A line's outcome for stdout, an error that ends the job, or the end of a thread.
Outcome = Union[Dict[str, Any], BaseException, None]


def run_job(
    args: argparse.Namespace,
    client: SekuireClient,
    agent_id: str,
    fields: Dict[str, Any],
    seconds: Optional[float],
) -> int:
    """Submit each line of the file as a task of ``capability``. Print a JSON object for each line.

    :param fields: of every task, by the names of ``SekuireClient.submit``.
    :param seconds: how long to wait for the result of each task. None: not at all.
    """
    path = None if args.json == "-" else args.json[1:] if args.json.startswith("@") else args.json
    delimiter = args.delimiter if args.csv else None
    facts = {"url": client.config.api_base_url, "agent_id": agent_id, "capability": args.capability}
    job = Job(_name_of(path) if args.job is None else args.job, facts, args.job_dir)
    check = InputCheck(client, args.capability, agent_id) if args.check else None
    with Source(path, delimiter, args.key_field) as source:
        made = _Items(args.capability, source, job, fields, client, check)
        total = made.check_all() if source.can_read_again() else None
        if total == 0:
            raise CommandError(f"{source.name} has no lines; nothing was submitted")
        before = job.begin(again=args.again)
        if before:
            note(args, before)
        if path is None and args.job is None:
            note(args, f"job {job.name}: with --job {job.name} and the same input it can be continued")
        return _Run(args, client, made, seconds, job, total).run()


def _name_of(path: Optional[str]) -> str:
    # What comes from a pipe has no name, and two runs are two jobs.
    return f"stdin-{secrets.token_hex(4)}" if path is None else os.path.basename(path)


class _Items:
    """Make a task of each line of the source."""

    def __init__(
        self,
        capability: str,
        source: Source,
        job: Job,
        fields: Dict[str, Any],
        client: SekuireClient,
        check: Optional[InputCheck],
    ) -> None:
        self.source = source
        self._capability = capability
        self._job = job
        self._fields = fields
        self._client = client
        self._check = check
        self._is_checked = False

    def check_all(self) -> int:
        """Check every line before any is sent. Return how many there are.

        :raises CommandError: some are wrong; the error has their numbers.
        """
        count = 0
        problems: List[str] = []
        try:
            for line in self.source.lines():
                count += 1
                problems += self._problems_of(line)
                if len(problems) > _MOST_PROBLEMS:
                    break
        except CommandError as error:
            # What a reader finds wrong it cannot read past.
            problems += error.lines
        if problems:
            *most, last = problems[:_MOST_PROBLEMS]
            raise CommandError(*most, f"{last}; nothing was submitted")
        self._is_checked = True
        return count

    def _problems_of(self, line: Line) -> List[str]:
        place = f"{self.source.name}, line {line.number}"
        found: List[str] = [] if self._check is None else self._check.problems_of(line.input)[:1]
        try:
            self._client.prepare(**self._item_of(line))
        except SekuireError as error:
            found = [str(error)]
        return [f"{place}: {problem}" for problem in found]

    def _item_of(self, line: Line) -> Dict[str, Any]:
        if self.source.has_key_field:
            key = self._job.key(b"key", self.source.key_of(line))
        else:
            key = self._job.key(b"%d" % line.number, line.raw)
        return {"capability": self._capability, "input": line.input, "idempotency_key": key, **self._fields}

    def each(self, begin: Callable[[int], object]) -> Iterator[Dict[str, Any]]:
        """Yield the arguments of ``SekuireClient.submit`` for each line.

        :param begin: called with the number of each line before it is yielded.
        """
        for line in self.source.lines():
            problems = [] if self._is_checked else self._problems_of(line)
            if problems:
                raise CommandError(*problems)
            begin(line.number)
            yield self._item_of(line)


class _Run:
    """Submit the lines of a job, collect results while that goes on, and print them."""

    # Threads: `run` (main thread) prints. `_submit` reads the lines and submits. Where results are wanted, `_collect`
    # runs on several threads. They pass what they have through two bounded queues. `_stop` ends them.

    def __init__(
        self,
        args: argparse.Namespace,
        client: SekuireClient,
        items: _Items,
        seconds: Optional[float],
        job: Job,
        total: Optional[int],
    ) -> None:
        self._args = args
        self._client = client
        self._items = items
        self._seconds = seconds
        self._job = job
        self._total = total
        self._stop = threading.Event()
        #: Submitted tasks, by the number of their line and when they were submitted. None ends a collector.
        self._open: queue.Queue[Optional[Tuple[int, TaskHandle, float]]] = queue.Queue(_MOST_OPEN)
        self._outcomes: queue.Queue[Outcome] = queue.Queue(_MOST_WAITING)
        #: Lines that are being submitted. Used by the thread of `_submit` alone.
        self._begun: Deque[int] = deque()
        #: Of the lines that were printed.
        self._counts: Dict[str, int] = dict.fromkeys(_COUNTED, 0)
        self._done = 0
        #: Lines that the platform has accepted. Changed by the thread of `_submit` alone.
        self._submitted = 0
        #: The first one submits.
        self._threads: List[threading.Thread] = []
        self._is_nameless = args.json == "-" and args.job is None

    def run(self) -> int:
        """Run the job to its end, or to what stops it, and return the exit code."""
        code = OK
        is_done = False
        try:
            self._print_all()
            is_done = True
        except KeyboardInterrupt:
            if self._args.owns_process:
                # A second one ends it at once.
                signal.signal(signal.SIGINT, lambda number, frame: os._exit(INTERRUPTED))
            complain("send", "interrupted")
            code = INTERRUPTED
        except (CommandError, SekuireError) as error:
            if isinstance(error, APIError) and error.status in (401, 403):
                raise
            code = report("send", error)
        finally:
            self._stop.set()
            self._client.close()
        if is_done and not self._done:
            raise CommandError(f"{self._items.source.name} has no lines; nothing was submitted")
        note(self._args, self._summary())
        if not is_done:
            terminal.note(self._advice())
            self._leave(code)
            return code
        if self._is_nameless:
            self._job.forget()
        return FAILED if any(self._counts[name] for name in ("failed", "refused", "unknown", "open")) else OK

    def _print_all(self) -> None:
        collectors = 0 if self._seconds is None else _COLLECTORS
        started = [spawn(self._submit, "sekuire-job-submit", collectors)]
        started += [spawn(self._collect, f"sekuire-job-collect-{number}") for number in range(collectors)]
        self._threads = [thread for thread in started if thread is not None]
        if len(self._threads) < len(started):
            raise CommandError("cannot start threads; the system has too many", code=FAILED)
        running = max(1, collectors)
        with self._bar() as bar:
            while running:
                outcome = self._outcomes.get()
                if outcome is None:
                    running -= 1
                elif isinstance(outcome, BaseException):
                    raise outcome
                else:
                    self._print(outcome)
                    if bar is not None:
                        bar.update(self._done)
        join_all(self._threads, Deadline(_LAST))

    @contextlib.contextmanager
    def _bar(self) -> Iterator[Optional[terminal.Progress]]:
        if getattr(self._args, "quiet", False):
            yield None
            return
        with terminal.Progress(self._job.name[:24], self._total) as bar:
            yield bar

    def _print(self, outcome: Dict[str, Any]) -> None:
        terminal.say(as_json(outcome))
        self._done += 1
        status = outcome.get("status", "submitted")
        self._counts[status if status in self._counts else "open"] += 1

    def _leave(self, code: int) -> None:
        """End the process if requests still wait for an answer, which the interpreter would wait for at its end."""
        join_all(self._threads[:1], Deadline(_LAST))
        if self._threads and self._threads[0].is_alive() and self._args.owns_process:
            end_process(code)

    # -- what is said at the end --

    def _summary(self) -> str:
        """Return how many lines ended how."""
        found = dict(self._counts)
        labels = {"open": "not ended in time"}
        if self._seconds is None:
            found["submitted"] = self._submitted
        else:
            found["submitted"] = self._submitted + found["refused"] - self._done
            labels["submitted"] = "more submitted"
        parts = [f"{count:,} {labels.get(name, name)}" for name, count in found.items() if count > 0]
        return f"job {self._job.name!r}: {', '.join(parts) or 'nothing submitted'}"

    def _advice(self) -> str:
        """Return how to continue. The command of this run, but ``--again``, which would begin once more."""
        command = [part for part in self._args.argv if part != "--again"]
        is_piped = self._args.json == "-"
        if self._is_nameless:
            command += ["--job", self._job.name]
        advice = "tasks that were submitted go on; " + continue_with("sekuire", *command)
        return f"{advice} (with the same input)" if is_piped else advice

    # -- threads --

    def _put(self, target: queue.Queue[Any], what: Any) -> None:
        """Put something into a queue, unless the job ends first."""
        while not self._stop.is_set():
            try:
                target.put(what, timeout=_LOOK)
            except queue.Full:
                continue
            return

    def _submit(self, collectors: int) -> None:
        try:
            items = self._items.each(self._begun.append)
            for handle in self._client.submit_many(items, max_in_flight=_SUBMITTERS, on_error=self._refused):
                number = self._begun.popleft()
                self._submitted += 1
                if collectors:
                    self._put(self._open, (number, handle, time.monotonic()))
                else:
                    self._put(self._outcomes, {"line": number, "task_id": handle.id})
                if self._stop.is_set():
                    return
        except BaseException as error:  # noqa: BLE001  # The main thread raises it.
            self._put(self._outcomes, error)
            return
        for _ in range(collectors):
            self._put(self._open, None)
        if not collectors:
            self._put(self._outcomes, None)

    def _refused(self, index: int, error: SekuireError) -> None:
        """Note that one line was refused. End the job for what concerns all of them."""
        number = self._begun.popleft()
        if not isinstance(error, APIError) or error.status in (401, 402, 403) or protocol.is_transient(error.status):
            raise error
        problem = {"code": error.code or f"HTTP {error.status}", "message": error.message}
        self._put(self._outcomes, {"line": number, "status": "refused", "error": problem})

    def _collect(self) -> None:
        try:
            while not self._stop.is_set():
                try:
                    found = self._open.get(timeout=_LOOK)
                except queue.Empty:
                    continue
                if found is None:
                    break
                self._put(self._outcomes, self._outcome_of(*found))
        except BaseException as error:  # noqa: BLE001  # The main thread raises it.
            self._put(self._outcomes, error)
            return
        self._put(self._outcomes, None)

    def _outcome_of(self, number: int, handle: TaskHandle, since: float) -> Dict[str, Any]:
        seconds = self._seconds
        timeout = None if seconds is None or math.isinf(seconds) else max(0.0, since + seconds - time.monotonic())
        return {"line": number, **outcome_of(handle, timeout)}
