"""Many submissions by one client through the misbehaving proxy: each must be one task, whatever happens on the way."""

from __future__ import annotations

import json
import os
import random
import sqlite3
import threading
import time
from typing import Any, Callable, Counter, Dict, Iterator, List, NamedTuple, Optional

from sekuire import SekuireClient

from .process import Child, Ended
from .proxy import FaultProxy

AGENT = "chaos-agent"

#: Seconds for the platform to begin.
_PATIENCE = 180.0
#: Seconds between two lines about how far it is.
_EVERY = 10.0


class SubmitPlan(NamedTuple):
    """What is to happen.

    :param faults: share of all calls that meet a fault; as many more get a page, and interim answers.
    :param kill_every: seconds between two kills of the platform; 0 kills it never.
    :param max_in_flight: submissions that are sent at once.
    """

    seed: int = 0
    submits: int = 300
    faults: float = 0.05
    kill_every: float = 0.0
    max_in_flight: int = 128


class SubmitFigures(NamedTuple):
    """What has happened, and what was found in the platform's database."""

    plan: SubmitPlan
    submitted: int
    tasks: int
    calls: int
    injected: Dict[str, int]
    pages: int
    kills: int
    seconds: float
    violations: List[str]

    def lines(self) -> Iterator[str]:
        """Yield the figures as lines of text."""
        counted = ", ".join(f"{name} {number}" for name, number in sorted(self.injected.items())) or "none"
        yield f"seed               {self.plan.seed}"
        yield f"submitted          {self.submitted}"
        yield f"tasks              {self.tasks}"
        yield f"requests           {self.calls}"
        yield f"faults injected    {sum(self.injected.values())}: {counted}"
        yield f"pages              {self.pages}"
        yield f"kills              {self.kills} of the platform"
        yield f"wall time          {self.seconds:.1f} s ({self.submitted / self.seconds:.0f} submits/s)"
        yield f"violations         {len(self.violations)}"
        for violation in self.violations[:50]:
            yield f"  {violation}"


class Killer:
    """Run the platform behind a proxy, and kill it again and again."""

    # Threads: one of its own kills and starts; `_child` is its until it has ended.

    def __init__(self, plan: SubmitPlan, directory: str, proxy: FaultProxy) -> None:
        self.path = os.path.join(directory, "platform.db")
        self.kills = 0
        self.problem: Optional[str] = None
        self._plan = plan
        self._log = os.path.join(directory, "platform.log")
        self._proxy = proxy
        self._dice = random.Random(f"kills/{plan.seed}")
        self._is_ended = threading.Event()
        self._child = self._start()
        self.api_key: str = self._child.ask("api_key")["key"]
        self._thread = threading.Thread(target=self._run, name="chaos-killer", daemon=True)
        if plan.kill_every:
            self._thread.start()

    def end(self) -> None:
        """End the platform. Its database can be read afterwards."""
        self._is_ended.set()
        if self._thread.is_alive():
            self._thread.join()
        self._child.kill()

    def _start(self) -> Child:
        child = Child("platform_process", {"path": self.path, "options": {}}, self._log)
        hello = child.hear(_PATIENCE)
        if hello is None:
            raise Ended(f"the platform does not start\n{child.last_words()}")
        self._proxy.target = hello["port"]
        return child

    def _run(self) -> None:
        try:
            while not self._is_ended.wait(self._dice.uniform(0.5, 1.5) * self._plan.kill_every):
                self._child.kill()
                self.kills += 1
                self._is_ended.wait(self._dice.uniform(0.0, 0.7))
                self._child = self._start()
        except Ended as error:
            self.problem = str(error)


def run_submits(plan: SubmitPlan, directory: str, *, say: Callable[[str], object] = lambda text: None) -> SubmitFigures:
    """Submit through the proxy, and compare what the client was answered with what the platform holds."""
    began = said = time.monotonic()
    handles: List[str] = []
    violations: List[str] = []
    with FaultProxy(1, plan.seed) as proxy:
        killer = Killer(plan, directory, proxy)
        proxy.set_faults(plan.faults, 0.0, pages=plan.faults, interim=plan.faults)
        # Submissions are many: as many pages as other faults.
        proxy.page_rates = {"tasks": plan.faults}
        try:
            for handle in submit(plan, proxy.url, killer.api_key):
                handles.append(handle)
                if time.monotonic() > said + _EVERY:
                    said = time.monotonic()
                    say(f"{len(handles)} of {plan.submits} submitted, {said - began:.0f} s")
        except Exception as error:  # The verdict names it.
            violations.append(f"submission {len(handles)} failed: {type(error).__name__}: {error}")
        finally:
            seconds = time.monotonic() - began
            killer.end()
    if killer.problem is not None:
        violations.append(f"the platform ended by itself: {killer.problem}")
    tasks = inputs_of(killer.path)
    violations += judge_submits(plan.submits, handles, tasks)
    return SubmitFigures(
        plan, len(handles), len(tasks), proxy.calls, dict(proxy.injected), sum(proxy.pages.values()),
        killer.kills, seconds, violations,
    )  # fmt: skip


def submit(plan: SubmitPlan, url: str, api_key: str) -> Iterator[str]:
    """Submit tasks whose inputs are their numbers. Yield their ids in this order."""
    items: Iterator[Dict[str, Any]] = ({"capability": "count", "input": n} for n in range(plan.submits))
    with SekuireClient(api_base_url=url, api_key=api_key, agent_id=AGENT, read_timeout=5.0, retry_for=300.0) as client:
        for handle in client.submit_many(items, max_in_flight=plan.max_in_flight):
            yield handle.id


def inputs_of(path: str) -> Dict[str, int]:
    """Return the input of each task of a platform's database. The platform must not run."""
    database = sqlite3.connect(path)
    try:
        return {
            task_id: json.loads(data)["input"] for task_id, data in database.execute("SELECT task_id, data FROM tasks")
        }
    finally:
        database.close()


def judge_submits(wanted: int, handles: List[str], tasks: Dict[str, int]) -> List[str]:
    """Return what is wrong: each submission must be one task, and its handle must lead to it."""
    found = [f"{len(handles)} of {wanted} submissions were answered"] if len(handles) != wanted else []
    found += [f"there are {len(tasks)} tasks of {wanted} submissions"] if len(tasks) != wanted else []
    for number, many in sorted(Counter(tasks.values()).items()):
        if many > 1:
            found.append(f"submission {number} became {many} tasks")
    for number, task_id in enumerate(handles):
        if tasks.get(task_id) != number:
            found.append(f"the handle of submission {number} leads to {task_id}, which holds {tasks.get(task_id)}")
    return found
