"""A seeded scenario: tasks, faults and kills, and the evidence they leave behind."""

from __future__ import annotations

import functools
import heapq
import itertools
import os
import random
import time
from typing import Any, Callable, Counter, Dict, FrozenSet, Iterator, List, NamedTuple, Optional, Set, Tuple

from .invariants import (
    FIRST_TWIN,
    FORBIDDEN,
    End,
    Evidence,
    Process,
    Verdict,
    count_tasks,
    judge,
    read_outbox,
    read_runs,
    read_tasks,
)
from .process import Child, Ended, Message
from .proxy import GONE, FaultProxy
from .worker_process import has_outbox

AGENT = "chaos-agent"
KILLS = ("kill-worker", "kill-platform", "kill-worker-in-report")
#: What happens between two kills.
TROUBLES = ("pause", "pause-lost", "expire-tokens", "drop-streams", "outage", "restart-worker", "drop-streams")
#: Kind → the troubles that it adds. Interim answers and pages are faults of calls and streams too.
KINDS: Dict[str, Tuple[str, ...]] = {
    "interim": (),
    "pages": ("new-policy", "lapse"),
    "silence": ("failover",),
    "twins": ("kill-twin",),
}

#: Seconds for a process to begin, to answer, to stop.
_PATIENCE = 180.0
_SUBMIT_BATCH = 100
#: Seconds without any trouble in which every task must come to its end.
_STUCK = 30.0
#: Violations that happen while it runs after which it ends early.
_MOST_PROBLEMS = 20
_TICK = 0.02
#: Seconds of a lease where pages may end one, and of the library's grace, with a margin for a slow machine.
_SHORT_LEASE = 3.0
_GRACE = 10.0
_MARGIN = 3.0
#: Seconds for which every heartbeat gets a page: a handler that begins in the last of them is past its lease.
_LAPSE = _SHORT_LEASE + _GRACE + _MARGIN + 4.0
#: Lapses in one run: in each of them little else happens.
_MOST_LAPSES = 3
#: Seconds after a failover within which a heartbeat must have come through.
_FAILOVER = 15.0
#: Heartbeats that may be lost on old connections after it: the first timeout must empty the pool.
_LOST_BEATS = 2
#: Seconds to wait for a moment without a task before it.
_IDLE = 5.0


class Plan(NamedTuple):
    """What is to happen; the same plan makes the same scenario, but for the timing of threads and processes.

    :param faults: share of all calls that meet a fault; a connection of the stream meets one ten times as often.
    :param kill_every: seconds between two kills, of the worker and of the platform; 0 kills nobody by the clock.
    :param at: troubles that come when this share of all tasks is done, such as ``((0.3, "kill-worker"),)``.
    :param limit: seconds after which no more tasks are submitted.
    :param settle: seconds that may pass until all submitted tasks are done.
    :param kinds: what there is besides faulty calls, faulty streams and kills, of :data:`KINDS`.
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
    kinds: Tuple[str, ...] = tuple(KINDS)


class Figures(NamedTuple):
    """What has happened, and the verdict."""

    plan: Plan
    tasks: int
    with_outbox: bool
    calls: int
    connections: int
    unreached: int
    injected: Dict[str, int]
    pages: Dict[Tuple[str, str], int]
    happened: Dict[str, int]
    failed: Dict[str, int]
    duplicates: int
    installations: int
    seconds: float
    verdict: Verdict

    @property
    def violations(self) -> List[str]:
        return self.verdict.violations

    def pages_by(self, which: int) -> Dict[str, int]:
        """The pages by endpoint (0) or by kind (1)."""
        found: Counter[str] = Counter()
        for key, number in self.pages.items():
            found[key[which]] += number
        return dict(found)

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
        if self.pages:
            yield f"pages by endpoint  {_counted(self.pages_by(0))}"
            yield f"pages by kind      {_counted(self.pages_by(1))}"
        yield f"troubles           {_counted(self.happened)}"
        yield f"runs               {verdict.runs}"
        yield f"  tried again      {verdict.retries} (retryable failures)"
        by_other = f"{verdict.extra_by_drop} by an answered 404, {verdict.extra_by_move} by the other replica"
        yield f"  extra, explained {verdict.extra_by_kill} by a kill, {by_other}"
        yield f"  extra            {verdict.extra_unexplained}"
        yield f"duplicates met     {self.duplicates}"
        yield f"installations      {self.installations}"
        yield f"lost               {verdict.lost}"
        yield f"double accepts     {verdict.double_accepts}"
        yield f"begun past a lease {verdict.past_lease}"
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
        self._twin: Optional[Child] = None
        self._twins = 0
        self._starts: Dict[int, Process] = {}
        self._policy: Tuple[Optional[str], Optional[str]] = (None, None)
        # Until when nothing else may happen: a lapse or a failover is looked at alone.
        self._quiet_until = 0.0
        self._is_holding = False
        self._next_batch = 0.0
        self._troubles = TROUBLES + tuple(one for kind in plan.kinds for one in KINDS[kind])
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
            for child in (self._worker, self._twin, stopping, self._platform):
                if child is not None:
                    child.kill()
            self._proxy.close()
        return self._figures(time.monotonic() - started)

    def _begin(self) -> None:
        self._start_platform()
        assert self._platform is not None
        kinds = self._plan.kinds
        max_uses = 1_000_000 if "twins" in kinds else 1
        self._token = self._platform.ask("install_token", agent_id=AGENT, max_uses=max_uses)["token"]
        if "pages" in kinds:
            self._set_policy()
            answer = self._platform.ask("policy_key")
            self._policy = (answer["workspace_id"], answer["key"])
        faults = self._plan.faults
        gone = 0.0 if GONE in self._plan.without else faults / 50
        self._proxy.set_faults(
            faults,
            min(1.0, 10 * faults),
            gone,
            pages=faults if "pages" in kinds else 0.0,
            interim=faults if "interim" in kinds else 0.0,
            without=self._plan.without,
        )
        self._start_worker()
        if "twins" in kinds:
            self._start_twin()
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
            if self._made < self._plan.tasks and self._may_submit():
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
            if not self._is_quiet() or not self._has_replicas():
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
        if self._twin is not None:
            self._stop_twin(self._twin)
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
                processes=self._starts,
                beats=self._proxy.beats,
                grace=_GRACE + _MARGIN if "pages" in self._plan.kinds else None,
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
            pages=dict(self._proxy.pages),
            happened=dict(self._happened),
            failed=dict(failed),
            duplicates=self._duplicates,
            installations=len({one.installation_id for one in self._starts.values() if one.installation_id}),
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
        if self._twin is not None:
            self._check_twin(self._twin)
        if self._stopping is not None:
            self._look_at_stopping(self._stopping)
        if self._platform is not None:
            count = self._platform.ask("count")
            self._unfinished = count["waiting"] + count["given"]
        done = self._made - self._unfinished
        while self._at and done >= self._at[0][0] * self._plan.tasks and self._is_calm() and self._is_quiet():
            self._do(self._at.pop(0)[1])

    def _is_calm(self) -> bool:
        are_there = self._worker is not None and self._platform is not None and self._has_replicas()
        return are_there and not self._due

    def _has_replicas(self) -> bool:
        """Return True once both replicas have logged in, where there are two."""
        numbers = (self._processes, self._twin_process) if "twins" in self._plan.kinds else ()
        return all(self._starts[number].installation_id is not None for number in numbers)

    def _is_quiet(self) -> bool:
        return time.monotonic() >= self._quiet_until

    def _may_submit(self) -> bool:
        if not self._proxy.has_lapse:
            return self._unfinished < self._plan.backlog and not self._is_holding
        # Some tasks must come after the lease has ended.
        now = time.monotonic()
        if now < self._next_batch:
            return False
        self._next_batch = now + _LAPSE / 80
        return True

    def _submit(self) -> None:
        if self._platform is not None:
            batch = self._batch()
            self._submitted.update(self._platform.ask("submit", tasks=batch)["ids"])
            self._unfinished += len(batch)

    def _batch(self) -> List[Message]:
        size = min(2 if self._proxy.has_lapse else _SUBMIT_BATCH, self._plan.tasks - self._made)
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
        if "pages" in self._plan.kinds and dice.random() < 0.05:
            task["capability"] = FORBIDDEN
        if mode == "flaky" or dice.random() < 0.8:
            task["max_attempts"] = 100
        return task

    # -- troubles -----------------------------------------------------------------------------------------------------

    def _later(self, delay: float, function: Callable[[], None]) -> None:
        heapq.heappush(self._due, (time.monotonic() + delay, next(self._numbers), function))

    def _kill_by_the_clock(self) -> None:
        if not self._is_settling:
            if self._is_quiet():
                self._do(next(self._kills))
            self._later(self._dice.uniform(0.7, 1.3) * self._plan.kill_every, self._kill_by_the_clock)

    def _trouble_by_the_clock(self) -> None:
        if not self._is_settling:
            if self._is_quiet():
                self._do(self._dice.choice(self._troubles))
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
        elif trouble == "new-policy" and platform is not None:
            self._set_policy()
        elif trouble == "lapse" and worker is not None and self._happened["lapse"] < _MOST_LAPSES:
            self._quiet_until = time.monotonic() + _LAPSE
            self._proxy.has_lapse = True
            self._later(_LAPSE, self._end_lapse)
        elif trouble == "failover" and worker is not None and platform is not None:
            self._quiet_until = time.monotonic() + _IDLE + _FAILOVER
            self._is_holding = True
            self._fail_over(self._processes, time.monotonic() + _IDLE)
        elif trouble == "kill-twin" and self._twin is not None:
            self._kill_twin(self._twin)
        else:
            return
        self._happened[trouble] += 1

    def _resume(self) -> None:
        if self._platform is None:
            self._later(0.1, self._resume)
        else:
            self._platform.ask("command", type="resume", lose=self._dice.random() < 0.3)

    def _set_policy(self) -> None:
        """Set the policy, or its next version; each denies the same capability."""
        assert self._platform is not None
        denied = [FORBIDDEN, f"unused-{self._dice.randrange(10**6)}"]
        self._platform.ask("policy", content={"agent": {"capabilities": {"denied_capabilities": denied}}})

    def _end_lapse(self) -> None:
        self._proxy.has_lapse = False

    def _fail_over(self, process: int, end: float) -> None:
        """Have a failover once the worker is idle: then all its connections are kept, and die together."""
        if self._unfinished and time.monotonic() < end:
            self._later(_TICK, functools.partial(self._fail_over, process, end))
            return
        self._proxy.silence()
        self._later(0.2, functools.partial(self._look_after_failover, process, time.time()))

    def _look_after_failover(self, process: int, since: float) -> None:
        """Look for a heartbeat on a new connection; then other troubles may come."""
        self._is_holding = False
        if process != self._processes or self._worker is None or self._platform is None:
            self._quiet_until = 0.0
            return
        mine = self._starts[process].installation_id
        if mine is None or any(beat.at > since and beat.installation_id == mine for beat in self._proxy.beats[-50:]):
            self._quiet_until = 0.0
            lost = sum(at > since and f"/{mine}/heartbeat" in path for at, path in self._proxy.lost)
            if lost > _LOST_BEATS:
                self._problems.append(
                    f"after a failover {lost} heartbeats of worker process {process} were sent on old connections"
                )
        elif time.time() - since > _FAILOVER:
            self._problems.append(f"no heartbeat of worker process {process} in {_FAILOVER:g} s after a failover")
            self._quiet_until = 0.0
        else:
            self._later(0.2, functools.partial(self._look_after_failover, process, since))

    # -- the processes ------------------------------------------------------------------------------------------------

    def _start_platform(self) -> None:
        options = {
            "lease_seconds": _SHORT_LEASE if "pages" in self._plan.kinds else 10.0,
            "heartbeat_interval": 0.5,
            "token_lifetime": 20.0,
            "keepalive_interval": 1.0,
            "redelivery_delay": 0.5,
            # Mostly after the answer to the failure was surely read.
            "retry_delay": 0.6,
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
        self._worker = self._start(self._processes, self._path("credentials.json"), self._outbox, "worker.log")

    def _start(self, process: int, credentials: Optional[str], outbox: Optional[str], log: str) -> Child:
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
        workspace_id, key = self._policy
        settings = {
            "process": process,
            "options": options,
            "outbox": outbox,
            "credentials": credentials,
            "runs": self._path("runs.log"),
            "workspace_id": workspace_id,
            "policy_key": key,
        }
        self._starts[process] = Process(time.time(), has_file=credentials is not None)
        return Child("worker_process", settings, self._path(log))

    def _note(self, process: int, message: Message) -> None:
        """Keep what a worker's process says without being asked."""
        if message.get("installation"):
            self._starts[process] = self._starts[process]._replace(installation_id=message["installation"])

    # -- the second replica, with the same install token --

    def _start_twin(self) -> None:
        """Start it: with a credentials file and an outbox of its own, or, with every other seed, with neither."""
        process = FIRST_TWIN + self._twins
        self._twins += 1
        has_file = self._plan.seed % 2 == 0
        credentials = self._path("twin-credentials.json") if has_file else None
        self._twin = self._start(process, credentials, self._twin_outbox, "twin.log")

    @property
    def _twin_process(self) -> int:
        return FIRST_TWIN + self._twins - 1

    @property
    def _twin_outbox(self) -> Optional[str]:
        return self._path("twin-outbox.db") if self._with_outbox and self._plan.seed % 2 == 0 else None

    def _kill_twin(self, twin: Child) -> None:
        twin.kill()
        self._twin = None
        outbox = self._twin_outbox
        self._ends[self._twin_process] = End(True, time.time(), read_outbox(outbox), has_outbox=outbox is not None)
        self._later(self._dice.uniform(0.0, 0.7), self._start_twin)

    def _check_twin(self, twin: Child) -> None:
        try:
            while (message := twin.hear(0.0)) is not None:
                self._note(self._twin_process, message)
        except Ended as error:
            self._problems.append(f"the second replica ended by itself: {error}")
            if len(self._problems) > _MOST_PROBLEMS:
                raise
            self._kill_twin(twin)

    def _stop_twin(self, twin: Child) -> None:
        name = f"worker process {self._twin_process}"
        self._twin = None
        outbox = self._twin_outbox
        try:
            left = twin.ask("stop", _PATIENCE)
        except Ended as error:
            twin.kill()
            self._problems.append(f"{name} has not stopped: {error}")
            self._ends[self._twin_process] = End(True, time.time(), read_outbox(outbox), has_outbox=outbox is not None)
            return
        code = twin.wait(_PATIENCE)
        twin.kill()
        if code != 0:
            self._problems.append(f"{name} ended with {code} after an orderly stop")
        in_outbox, undelivered = read_outbox(outbox), frozenset(left["undelivered"])
        self._ends[self._twin_process] = End(False, time.time(), in_outbox, undelivered, outbox is not None)
        self._note_left(name, left, undelivered - in_outbox if outbox is not None else frozenset())

    # -- killing, stopping, looking --

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
            while (message := worker.hear(0.0)) is not None:
                self._note(self._processes, message)
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
                if left is not None:
                    self._note(process, left)
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
