"""One soak run: load, trouble, measuring, and what came of it."""

from __future__ import annotations

import collections
import contextlib
import os
import random
import time
from typing import Any, Callable, Deque, Dict, Iterator, List, Tuple

import attrs

from benchmarks import payloads
from benchmarks.process import Child as BenchmarkChild
from sekuire.local import LocalPlatform

from ..chaos.process import Child
from .measure import Held, growth, left, verdict

AGENT = "soak"
#: Results that a worker remembers (``sekuire.worker.results.MEMORY``); before so many, what is remembered grows by
#: design.
REMEMBERED = 10_000
#: Tasks submitted and not finished, at most.
IN_FLIGHT = 48

#: Capabilities of the load and how often each is drawn.
SHAPES = {
    "small": 60, "echo": 15, "async": 5, "progress": 3, "fail": 4, "flaky": 2, "crash": 3, "late": 2, "odd": 2,
    "narrow": 3, "large": 1,
}  # fmt: skip

Say = Callable[[str], None]


@attrs.frozen(kw_only=True)
class Plan:
    """What to run: for ``seconds``, or ``tasks`` many (0: whatever the time allows).

    ``trouble`` is the mean time in seconds between two troubles (0: none). ``warm_up`` is how many tasks are done
    before the start is measured. With ``quick``, the fast platform of the benchmarks serves the tasks: many more of
    them, all of one shape, without trouble.
    """

    seconds: float
    tasks: int = 0
    seed: int = 1
    max_workers: int = 8
    warm_up: int = REMEMBERED + 1000
    trouble: float = 1.0
    sample_every: float = 10.0
    quick: bool = False
    outbox: bool = True


@attrs.define
class Figures:
    """What a run gave."""

    plan: Plan
    tasks: int = 0
    seconds: float = 0.0
    is_warm: bool = False
    start: Any = None
    end: Any = None
    samples: List[Tuple[int, float, Held]] = attrs.field(factory=list)
    outcomes: Dict[str, int] = attrs.field(factory=dict)
    troubles: Dict[str, int] = attrs.field(factory=dict)
    stats: Dict[str, int] = attrs.field(factory=dict)
    problems: List[str] = attrs.field(factory=list)

    def lines(self) -> Iterator[str]:
        yield f"tasks: {self.tasks} in {self.seconds:.0f} s ({_counts(self.outcomes)})"
        yield f"troubles: {_counts(self.troubles)}"
        yield f"worker: {_counts({name: count for name, count in self.stats.items() if count})}"
        yield f"{'':24}{'start':>10}{'end':>10}"
        for name, of in (
            ("threads", lambda held: len(held.threads)),
            ("descriptors", lambda held: held.descriptors),
            ("resident memory, KiB", lambda held: held.rss_kib),
            ("allocated blocks", lambda held: held.blocks),
            ("objects", lambda held: held.objects),
        ):
            yield f"{name:24}{of(self.start):>10}{of(self.end):>10}"
        yield "threads at the end: " + _counts(self.end.groups())
        yield "objects by type, where they became more:"
        for name, before, after in growth(self.start, self.end):
            yield f"  {name:48}{before:>9} -> {after}"
        if self.samples:
            yield "over time (tasks done, seconds, KiB, objects, threads, descriptors):"
        for done, seconds, held in self.samples:
            counts = f"{held.rss_kib:>9}{held.objects:>9}{len(held.threads):>5}{held.descriptors:>5}"
            yield f"  {done:>9}{seconds:>8.0f}{counts}"
        if not self.is_warm:
            yield f"memory is not judged: the start was measured before {REMEMBERED} tasks had filled what fills once"
        for problem in self.problems:
            yield f"WRONG: {problem}"
        yield "verdict: " + ("growth or leftovers" if self.problems else "flat, and nothing left behind")


def run(plan: Plan, directory: str, say: Say = lambda text: None) -> Figures:
    """Run ``plan``; scratch files go to ``directory``."""
    figures = Figures(plan=plan)
    with contextlib.ExitStack() as stack:
        load: Any = stack.enter_context(_Quick(plan) if plan.quick else _Varied(plan, directory))
        options = {**load.options, "agent_id": AGENT, "max_workers": plan.max_workers}
        if plan.outbox:
            options["outbox"] = os.path.join(directory, "outbox.db")
        settings = {"options": options, "capabilities": load.capabilities}
        worker = Child("tests.soak.worker_process", settings, os.path.join(directory, "worker.log"))
        stack.callback(worker.kill)
        assert (worker.hear(60.0) or {}).get("started"), worker.last_words()
        _work(plan, figures, load, worker, say)
        answer = worker.ask("stop", timeout=60.0)
        figures.problems += left(Held.of(answer["before"]), Held.of(answer["after"]))
        figures.stats = answer["stats"]
        assert worker.wait(30.0) == 0, worker.last_words()
    figures.outcomes = dict(load.outcomes)
    figures.troubles = dict(load.troubles)
    return figures


def _work(plan: Plan, figures: Figures, load: Any, worker: Child, say: Say) -> None:
    begun = time.monotonic()
    # What must be filled before the start is measured may take half of the time.
    load.work(lambda done: done >= plan.warm_up or (not plan.tasks and time.monotonic() - begun > plan.seconds / 2))
    figures.is_warm = load.done > REMEMBERED
    figures.start = Held.of(worker.ask("measure"))
    say(f"measured after {load.done} tasks and {time.monotonic() - begun:.0f} s")
    ends = begun + plan.seconds
    next_sample = time.monotonic() + plan.sample_every

    def is_over(done: int) -> bool:
        nonlocal next_sample
        now = time.monotonic()
        if now >= next_sample:
            next_sample = now + plan.sample_every
            held = Held.of(worker.ask("measure"))
            figures.samples.append((done, now - begun, held))
            say(f"{done} tasks, {now - begun:.0f} s, {held.rss_kib} KiB, {held.objects} objects")
        return done >= plan.tasks if plan.tasks else now >= ends

    load.work(is_over)
    figures.end = Held.of(worker.ask("measure"))
    figures.tasks = load.done
    figures.seconds = time.monotonic() - begun
    figures.problems += verdict(figures.start, figures.end, plan.max_workers, figures.is_warm)


class _Varied:
    """Tasks of several shapes and all kinds of trouble, on the local platform."""

    capabilities = list(SHAPES)

    def __init__(self, plan: Plan, directory: str) -> None:
        self.done = 0
        self.outcomes: Dict[str, int] = collections.Counter()
        self.troubles: Dict[str, int] = collections.Counter()
        self._plan = plan
        self._random = random.Random(plan.seed)
        self._platform = LocalPlatform(
            os.path.join(directory, "platform.db"),
            heartbeat_interval=1.0,
            token_lifetime=10.0,
            redelivery_delay=3600.0,
            retry_delay=0.05,
        )
        self._next_trouble = 0.0
        self._undo: Deque[Tuple[float, Callable[[], None]]] = collections.deque()

    def __enter__(self) -> _Varied:
        self._platform.start()
        self.options = {
            "api_base_url": self._platform.url,
            "install_token": self._platform.create_install_token(AGENT),
            "heartbeat_interval": 1.0,
            "reconnect_min": 0.02,
            "reconnect_max": 0.2,
        }
        return self

    def __exit__(self, *args: object) -> None:
        self._platform.stop()

    def work(self, is_over: Callable[[int], bool]) -> None:
        """Submit and wait until it is over, then until every task has its end."""
        waiting: Deque[str] = collections.deque()
        names, weights = zip(*SHAPES.items())
        while not is_over(self.done):
            while len(waiting) < IN_FLIGHT:
                name = self._random.choices(names, weights)[0]
                input = {"text": "y" * (100_000 if self._random.random() < 0.01 else 200)}
                waiting.append(self._platform.submit(name, input, AGENT, max_attempts=3 if name == "flaky" else 1))
            self._finish(waiting.popleft())
            self._stir()
        for task_id in waiting:
            self._finish(task_id)
        self._settle()

    def _finish(self, task_id: str) -> None:
        # A trouble that was begun must end, whatever waits for that.
        end = time.monotonic() + 120.0
        while True:
            self._stir(only_undo=True)
            try:
                task = self._platform.wait(task_id, 0.25)
            except TimeoutError:
                assert time.monotonic() < end, f"task {task_id} has no end: {self._platform.task(task_id)}"
            else:
                break
        self.done += 1
        self.outcomes["completed" if task["status"] == "completed" else task["error"]["code"]] += 1

    def _stir(self, only_undo: bool = False) -> None:
        now = time.monotonic()
        while self._undo and self._undo[0][0] <= now:
            self._undo.popleft()[1]()
        if only_undo or not self._plan.trouble or now < self._next_trouble or self._undo:
            return
        self._next_trouble = now + self._random.expovariate(1.0 / self._plan.trouble)
        trouble = self._random.choice(
            (self._cut, self._cut, self._expire, self._pause, self._lose_pause, self._restart)
        )
        self.troubles[trouble.__name__.strip("_").replace("_", " ")] += 1
        trouble()

    def _settle(self) -> None:
        while self._undo:
            self._undo.popleft()[1]()

    def _cut(self) -> None:
        self._platform.drop_streams()

    def _expire(self) -> None:
        self._platform.expire_tokens()

    def _pause(self) -> None:
        for installation in self._platform.installations():
            self._platform.command(installation["installation_id"], "pause", "for a moment")
        self._undo.append((time.monotonic() + 0.1, self._resume))

    def _resume(self) -> None:
        for installation in self._platform.installations():
            self._platform.command(installation["installation_id"], "resume")

    def _lose_pause(self) -> None:
        self._platform.hold_commands = True
        self._pause()
        self._platform.hold_commands = False

    def _restart(self) -> None:
        self._platform.stop()
        self._platform.start()


class _Quick:
    """Tasks of one shape, as many as go, on the benchmarks' platform."""

    capabilities = [payloads.CAPABILITY]

    def __init__(self, plan: Plan) -> None:
        self.done = 0
        self.outcomes: Dict[str, int] = collections.Counter()
        self.troubles: Dict[str, int] = {}
        self._child = BenchmarkChild("platform")

    def __enter__(self) -> _Quick:
        self._child.__enter__()
        self.options = {
            "api_base_url": f"http://127.0.0.1:{self._child.receive()['port']}",
            "runtime_token": payloads.RUNTIME_TOKEN,
            "installation_id": payloads.INSTALLATION_ID,
        }
        return self

    def __exit__(self, *args: Any) -> None:
        self._child.__exit__(*args)

    def work(self, is_over: Callable[[int], bool]) -> None:
        while not is_over(self.done):
            report = self._child.ask("feed", timeout=300.0, tasks=2000)
            self.done += report["completed"] + report["failed"]
            self.outcomes["completed"] += report["completed"]
            self.outcomes["failed"] += report["failed"]


def _counts(counts: Dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items(), key=lambda one: -one[1])) or "none"
