"""A seeded scenario: tasks, faults and kills, and the evidence they leave behind."""

from __future__ import annotations

import heapq
import itertools
import os
import random
import time
from typing import Any, Callable, Counter, Dict, FrozenSet, Iterator, List, NamedTuple, Optional, Set, Tuple

from .invariants import End, Evidence, Verdict, count_tasks, judge, read_outbox, read_runs, read_tasks
from .process import Child, Ended, Message
from .proxy import GONE, FaultProxy
from .worker_process import has_outbox

AGENT = "chaos-agent"
KILLS = ("kill-worker", "kill-platform", "kill-worker-in-report")
#: What happens between two kills.
TROUBLES = ("pause", "pause-lost", "expire-tokens", "drop-streams", "outage", "restart-worker", "drop-streams")

#: Seconds for a process to begin, to answer, to stop.
_PATIENCE = 60.0
_SUBMIT_BATCH = 100
#: Seconds without any trouble in which every task must come to its end.
_STUCK = 30.0
#: Violations that happen while it runs after which it ends early.
_MOST_PROBLEMS = 20
_TICK = 0.02


class Plan(NamedTuple):
    """What is to happen; the same plan makes the same scenario, but for the timing of threads and processes.

    :param faults: share of all calls that meet a fault; a connection of the stream meets one ten times as often.
    :param kill_every: seconds between two kills, of the worker and of the platform; 0 kills nobody by the clock.
    :param at: troubles that come when this share of all tasks is done, such as ``((0.3, "kill-worker"),)``.
    :param limit: seconds after which no more tasks are submitted.
    :param settle: seconds that may pass until all submitted tasks are done.
    :param without: kinds of faults that are left out, to look for what else there is.
    :param backlog: undone tasks at which the submission waits.
    """

    seed: int = 0
    tasks: int = 300
    faults: float = 0.05
    kill_every: float = 0.0
    at: Tuple[Tuple[float, str], ...] = ()
    limit: float = 600.0
    settle: float = 120.0
    backlog: int = 500
    outbox: Optional[bool] = None
    max_workers: int = 8
    without: Tuple[str, ...] = ()


class Figures(NamedTuple):
    """What has happened, and the verdict."""

    plan: Plan
    tasks: int
    with_outbox: bool
    calls: int
    connections: int
    unreached: int
    injected: Dict[str, int]
    happened: Dict[str, int]
    failed: Dict[str, int]
    duplicates: int
    seconds: float
    verdict: Verdict

    @property
    def violations(self) -> List[str]:
        return self.verdict.violations

    def lines(self) -> Iterator[str]:
        """The figures as lines of text."""
        verdict = self.verdict
        total = sum(self.injected.values())
        yield f"seed               {self.plan.seed}"
        yield f"outbox             {'yes' if self.with_outbox else 'no'}"
        yield f"tasks              {self.tasks}" + (
            f" of {self.plan.tasks} (the time was over)" if self.tasks < self.plan.tasks else ""
        )
        yield f"failed as they may {_counted(self.failed)}"
        yield f"requests           {self.calls} on {self.connections} connections, {self.unreached} met no platform"
        yield f"faults injected    {total}: {_counted(self.injected)}"
        yield f"troubles           {_counted(self.happened)}"
        yield f"runs               {verdict.runs}"
        yield f"  tried again      {verdict.retries} (retryable failures)"
        yield f"  extra, explained {verdict.extra_by_kill} by a kill, {verdict.extra_by_drop} by an answered 404"
        yield f"  extra            {verdict.extra_unexplained}"
        yield f"duplicates met     {self.duplicates}"
        yield f"lost               {verdict.lost}"
        yield f"double accepts     {verdict.double_accepts}"
        yield f"wall time          {self.seconds:.1f} s ({self.tasks / self.seconds:.0f} tasks/s)"
        yield f"violations         {len(verdict.violations)}"
        for violation in verdict.violations[:50]:
            yield f"  {violation}"


def _counted(counts: Dict[str, int]) -> str:
    return ", ".join(f"{name} {number}" for name, number in sorted(counts.items())) or "none"


class _Stopping(NamedTuple):
    """A worker's process that was told to stop: which, the number of that question, and when to lose patience."""

    child: Child
    process: int
    number: int
    end: float


class Scenario:
    """Runs a plan in ``directory``. One thread, besides the proxy's; no process outlives :meth:`run`."""

    def __init__(self, plan: Plan, directory: str, *, say: Callable[[str], object] = lambda text: None) -> None:
        self._plan = plan
        self._directory = directory
        self._say = say
        self._dice = random.Random(plan.seed)
        self._with_outbox = has_outbox() if plan.outbox is None else plan.outbox
        self._platform: Optional[Child] = None
        self._worker: Optional[Child] = None
        self._proxy = FaultProxy(1, plan.seed)
        self._token = ""
        self._processes = 0
        self._ends: Dict[int, End] = {}
        self._submitted: Set[str] = set()
        self._made = 0
        self._unfinished = 0
        self._due: List[Tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._happened: Counter[str] = Counter()
        self._problems: List[str] = []
        self._duplicates = 0
        self._is_settling = False
        self._is_ending = False
        self._is_stuck = False
        self._stopping: Optional[_Stopping] = None
        self._at = sorted(plan.at)
        self._kills = itertools.cycle(self._dice.sample(KILLS, len(KILLS)))

    # -- the run ------------------------------------------------------------------------------------------------------

    def run(self) -> Figures:
        """Let it happen, and judge."""
        started = time.monotonic()
        try:
            self._begin()
            self._work(started + self._plan.limit)
            self._settle()
            self._end()
        except Ended as error:
            self._problems.append(f"a process ended by itself, or hangs: {error}")
        finally:
            stopping = self._stopping.child if self._stopping is not None else None
            for child in (self._worker, stopping, self._platform):
                if child is not None:
                    child.kill()
            self._proxy.close()
        return self._figures(time.monotonic() - started)

    def _begin(self) -> None:
        self._start_platform()
        assert self._platform is not None
        self._token = self._platform.ask("install_token", agent_id=AGENT)["token"]
        faults = self._plan.faults
        gone = 0.0 if GONE in self._plan.without else faults / 50
        self._proxy.set_faults(faults, min(1.0, 10 * faults), gone, without=self._plan.without)
        self._start_worker()
        if self._plan.kill_every:
            self._later(self._dice.uniform(0.5, 1.0) * self._plan.kill_every, self._kill_by_the_clock)
            self._later(self._dice.uniform(0.1, 0.6) * self._plan.kill_every, self._trouble_by_the_clock)

    def _work(self, end: float) -> None:
        told = time.monotonic()
        by_the_clock = self._plan.kill_every > 0
        while time.monotonic() < end and (
            self._made < self._plan.tasks or self._at or (by_the_clock and self._unfinished)
        ):
            self._look()
            if self._made < self._plan.tasks and self._unfinished < self._plan.backlog:
                self._submit()
            if time.monotonic() > told + 10.0:
                told = time.monotonic()
                self._say(f"{self._made} tasks submitted, {self._unfinished} not done, {_counted(self._happened)}")

    def _settle(self) -> None:
        """No more troubles: what has been submitted must come to its end, under faults of calls still."""
        self._is_settling = True
        self._at = []
        self._proxy.gone_rate = 0.0
        end = time.monotonic() + self._plan.settle
        patience = min(_STUCK, self._plan.settle / 2)
        since: Dict[Tuple[str, int], float] = {}
        while time.monotonic() < end:
            self._look()
            if self._due or self._stopping is not None or self._worker is None or self._platform is None:
                continue
            if not self._unfinished:
                return
            # What was answered with a lie is done when it is given again, which needs a new stream; all else must be
            # done without that.
            now = time.monotonic()
            given = {(one, attempt) for one, attempt in self._platform.ask("given")["tasks"]}
            since = {one: since.get(one, now) for one in given if one[0] not in self._proxy.gone}
            stuck = sorted(one for one in since if now - since[one] > patience)
            if stuck and not self._is_stuck:
                self._is_stuck = True
                self._problems.append(f"{len(stuck)} tasks are stuck until the stream is opened anew: {stuck[:5]}")
            if not since or self._is_stuck:
                self._platform.ask("drop_streams")
                self._pause(1.0)

    def _pause(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self._look()

    def _end(self) -> None:
        self._is_ending = True
        if self._worker is not None:
            self._stop_worker()
        while self._stopping is not None:
            time.sleep(_TICK)
            self._look_at_stopping(self._stopping)
        left = read_outbox(self._outbox)
        if left and not self._unfinished:
            self._problems.append(f"the outbox holds results that were accepted: {sorted(left)[:5]}")
        if self._platform is not None:
            self._platform.ask("stop")
            code = self._platform.wait(_PATIENCE)
            if code != 0:
                self._problems.append(f"the platform's process ended with {code}")

    def _figures(self, seconds: float) -> Figures:
        tasks = read_tasks(self._path("platform.db")) if os.path.exists(self._path("platform.db")) else {}
        verdict = judge(
            Evidence(
                with_outbox=self._with_outbox,
                submitted=self._submitted,
                tasks=tasks,
                runs=read_runs(self._path("runs.log")),
                seen=self._proxy.seen,
                ends=self._ends,
            )
        )
        verdict.violations[:0] = self._problems
        failed = Counter(str(row.code) for row in tasks.values() if row.status == "failed")
        return Figures(
            plan=self._plan,
            tasks=len(tasks),
            with_outbox=self._with_outbox,
            calls=self._proxy.calls,
            connections=self._proxy.connections,
            unreached=self._proxy.unreached,
            injected=dict(self._proxy.injected),
            happened=dict(self._happened),
            failed=dict(failed),
            duplicates=self._duplicates,
            seconds=seconds,
            verdict=verdict,
        )

    # -- one turn -----------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        """Wait a moment, do what is due, and count what is not done."""
        time.sleep(_TICK)
        while self._due and self._due[0][0] <= time.monotonic():
            heapq.heappop(self._due)[2]()
        worker = self._worker
        if worker is not None:
            self._check_alive(worker)
        if self._stopping is not None:
            self._look_at_stopping(self._stopping)
        if self._platform is not None:
            count = self._platform.ask("count")
            self._unfinished = count["waiting"] + count["given"]
        done = self._made - self._unfinished
        while self._at and done >= self._at[0][0] * self._plan.tasks and self._is_calm():
            self._do(self._at.pop(0)[1])

    def _is_calm(self) -> bool:
        return self._worker is not None and self._platform is not None and not self._due

    def _submit(self) -> None:
        if self._platform is not None:
            batch = self._batch()
            self._submitted.update(self._platform.ask("submit", tasks=batch)["ids"])
            self._unfinished += len(batch)

    def _batch(self) -> List[Message]:
        size = min(_SUBMIT_BATCH, self._plan.tasks - self._made)
        self._made += size
        return [self._task() for _ in range(size)]

    def _task(self) -> Message:
        dice = self._dice
        mode = dice.choices(("plain", "fail", "flaky", "progress"), (93, 2, 3, 2))[0]
        length = dice.choices((0, dice.randrange(1, 30), dice.randrange(100, 400)), (90, 9, 1))[0]
        size = dice.choices((10, dice.randrange(1000), dice.randrange(20_000, 80_000)), (90, 9, 1))[0]
        task: Message = {
            "agent_id": AGENT,
            "capability": dice.choices(("work", "work.async"), (9, 1))[0],
            "input": {"mode": mode, "ms": length, "bytes": size, "text": "y" * (size // 2)},
        }
        if mode == "flaky" or dice.random() < 0.8:
            task["max_attempts"] = 100
        return task

    # -- troubles -----------------------------------------------------------------------------------------------------

    def _later(self, delay: float, function: Callable[[], None]) -> None:
        heapq.heappush(self._due, (time.monotonic() + delay, next(self._numbers), function))

    def _kill_by_the_clock(self) -> None:
        if not self._is_settling:
            self._do(next(self._kills))
            self._later(self._dice.uniform(0.7, 1.3) * self._plan.kill_every, self._kill_by_the_clock)

    def _trouble_by_the_clock(self) -> None:
        if not self._is_settling:
            self._do(self._dice.choice(TROUBLES))
            self._later(self._dice.uniform(0.3, 0.9) * self._plan.kill_every, self._trouble_by_the_clock)

    def _do(self, trouble: str) -> None:
        """One trouble; one that needs a process that is away just now is left out."""
        worker, platform = self._worker, self._platform
        if trouble == "outage":
            self._proxy.refuse()
            self._later(self._dice.uniform(0.1, 1.0), self._proxy.listen)
        elif trouble == "kill-worker" and worker is not None:
            self._kill_worker(worker)
        elif trouble == "kill-worker-in-report" and worker is not None:
            # Its results are sent and do not arrive: now they must be in the outbox.
            self._proxy.swallowing = True
            self._later(self._dice.uniform(0.02, 0.3), self._kill_in_report)
        elif trouble == "restart-worker" and worker is not None:
            self._stop_worker()
        elif trouble == "kill-platform" and platform is not None:
            self._kill_platform(platform)
        elif trouble in ("pause", "pause-lost") and platform is not None:
            platform.ask("command", type="pause", lose=trouble == "pause-lost")
            self._later(self._dice.uniform(0.1, 1.0), self._resume)
        elif trouble == "expire-tokens" and platform is not None:
            platform.ask("expire_tokens")
        elif trouble == "drop-streams" and platform is not None:
            platform.ask("drop_streams")
        else:
            return
        self._happened[trouble] += 1

    def _resume(self) -> None:
        if self._platform is None:
            self._later(0.1, self._resume)
        else:
            self._platform.ask("command", type="resume", lose=self._dice.random() < 0.3)

    # -- the processes ------------------------------------------------------------------------------------------------

    def _start_platform(self) -> None:
        options = {
            "lease_seconds": 10.0,
            "heartbeat_interval": 0.5,
            "token_lifetime": 20.0,
            "keepalive_interval": 1.0,
            "redelivery_delay": 0.5,
            "retry_delay": 0.05,
        }
        platform = Child(
            "platform_process", {"path": self._path("platform.db"), "options": options}, self._path("platform.log")
        )
        self._platform = platform
        hello = platform.hear(_PATIENCE)
        if hello is None:
            raise Ended(f"the platform does not start\n{platform.last_words()}")
        # Its port changes with every start, so that runs beside each other never meet; the proxy's does not.
        self._proxy.target = hello["port"]

    def _start_worker(self) -> None:
        self._processes += 1
        options = {
            "api_base_url": self._proxy.url,
            "agent_id": AGENT,
            "install_token": self._token,
            "max_workers": self._plan.max_workers,
            "heartbeat_interval": 0.5,
            "connect_timeout": 1.0,
            "read_timeout": 1.0,
            "start_timeout": 0.0,
            "shutdown_timeout": 20.0,
            "stream_idle_timeout": 3.0,
            "reconnect_min": 0.05,
            "reconnect_max": 0.5,
        }
        settings = {
            "process": self._processes,
            "options": options,
            "outbox": self._outbox,
            "credentials": self._path("credentials.json"),
            "runs": self._path("runs.log"),
        }
        self._worker = Child("worker_process", settings, self._path("worker.log"))

    def _kill_worker(self, worker: Child) -> None:
        worker.kill()
        self._worker = None
        self._ends[self._processes] = End(True, time.time(), read_outbox(self._outbox))
        self._later(self._dice.uniform(0.0, 0.7), self._start_worker)

    def _kill_in_report(self) -> None:
        self._proxy.swallowing = False
        if self._worker is not None:
            self._kill_worker(self._worker)

    def _kill_platform(self, platform: Child) -> None:
        # In the middle of a submission, of which nobody will know how much was taken.
        if self._made < self._plan.tasks:
            platform.say("submit", tasks=self._batch())
            time.sleep(self._dice.uniform(0.0, 0.02))
        platform.kill()
        self._made = count_tasks(self._path("platform.db"))
        self._platform = None
        self._later(self._dice.uniform(0.0, 0.7), self._start_platform)

    def _check_alive(self, worker: Child) -> None:
        """A worker that ends by itself is a violation; another one goes on, to find what else there is."""
        try:
            while worker.hear(0.0) is not None:
                pass
        except Ended as error:
            self._problems.append(f"worker process {self._processes} ended by itself: {error}")
            if len(self._problems) > _MOST_PROBLEMS:
                raise
            self._kill_worker(worker)

    def _stop_worker(self) -> None:
        """Begin to stop it in order, as far as the platform lets it; :meth:`_look` sees the end."""
        worker, self._worker = self._worker, None
        assert worker is not None
        self._stopping = _Stopping(worker, self._processes, worker.say("stop"), time.monotonic() + _PATIENCE)

    def _look_at_stopping(self, stopping: _Stopping) -> None:
        worker, process, number, end = stopping
        left: Optional[Message] = None
        problem = ""
        try:
            while left is None or left.get("number") != number:
                left = worker.hear(0.0)
                if left is None and time.monotonic() < end:
                    return
                if left is None:
                    problem = f"has not stopped in {_PATIENCE:g} s"
                    break
        except Ended as error:
            problem = f"ended while it stopped: {error}"
        code = worker.wait(_PATIENCE) if left is not None else None
        worker.kill()
        self._stopping = None
        if left is not None and code != 0:
            problem = f"ended with {code} after an orderly stop"
        if problem:
            self._problems.append(f"worker process {process} {problem}")
        in_outbox = read_outbox(self._outbox)
        undelivered = frozenset(left["undelivered"]) if left is not None else frozenset()
        self._ends[process] = End(left is None, time.time(), in_outbox, undelivered)
        if left is not None:
            self._note_left(f"worker process {process}", left, undelivered - in_outbox)
        if not self._is_ending:
            self._start_worker()

    def _note_left(self, name: str, left: Message, missing: FrozenSet[str]) -> None:
        """Count what a worker that has stopped left in its process; ``missing`` is not in its outbox either."""
        self._duplicates += left["duplicates"]
        for what in ("threads", "locks"):
            if left[what]:
                self._problems.append(f"{name} left {what} behind: {left[what]}")
        if left["descriptors"] > 0:
            self._problems.append(f"{name} left {left['descriptors']} file descriptors open")
        if left["running"] or left["waiting"]:
            self._problems.append(f"{name} stopped with {left['running']} running, {left['waiting']} waiting tasks")
        if self._with_outbox and missing:
            self._problems.append(f"{name} left results that are neither delivered nor in its outbox: "
                                  f"{sorted(missing)[:5]}")  # fmt: skip

    @property
    def _outbox(self) -> Optional[str]:
        return self._path("outbox.db") if self._with_outbox else None

    def _path(self, name: str) -> str:
        return os.path.join(self._directory, name)


def run(plan: Plan, directory: str, **options: Any) -> Figures:
    """Run a plan in ``directory``, which is left as it is for who wants to look."""
    return Scenario(plan, directory, **options).run()
