"""A task's states from its arrival to its delivery: the real Dispatcher, Reporter and Outbox, driven in any order.

*received → rejected | waiting → released | running → finished → delivered | dropped.* The platform is a model behind
``Authenticator.request``; a few examples talk to it over HTTP. A long run: ``SEKUIRE_STATES=2000 pytest
tests/worker/test_states.py -n 0``.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import pathlib
import sqlite3
import tempfile
import threading
import time
from collections import Counter
from typing import Any, Callable, Dict, List, Optional, Set, Tuple

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from sekuire._internal.threads import Deadline, Timer
from sekuire.config import WorkerConfig
from sekuire.errors import RevokedError, TransportError
from sekuire.handlers.context import TaskContext
from sekuire.handlers.registry import TaskRegistry
from sekuire.session.installation import Installation
from sekuire.transport.http import Reply
from sekuire.wire.models import RuntimeCredentials, Task
from sekuire.wire.verdict import Support
from sekuire.worker import answers, dispatch, life, records, release, report, results, running
from sekuire.worker.announcer import Announcer
from sekuire.worker.dispatch import Dispatcher
from sekuire.worker.outbox import open_outbox
from sekuire.worker.report import Reporter

from ..support import waiting
from ..support.builders import completion_of, config_of
from ..support.scripted import Request, Scripted
from ..support.waiting import GUARD

WORKERS, QUEUE, BACKLOG = 2, 3, 4
#: Examples of a long run; unset in the suite.
LONG = int(os.environ.get("SEKUIRE_STATES") or 0)

#: What the platform does with a completion before it takes it as usual.
FATES: Dict[str, Tuple[Any, ...]] = {
    "taken": (),
    "late": (503, "reset", 429),
    "lost": ("lost",),
    "told before": (409,),
    "forgotten": (404,),
    "too large": (413,),
    "refused": (400,),
    "refused twice": (422, 400, 403),
    "unauthorized": (401, 401),
}
#: What it does with all of them.
MODES = {"up": None, "down": "reset", "overloaded": 503, "forbidden": 403, "revoked": "revoked"}

until = functools.partial(waiting.until, pause=0.0005)

Arrival = Tuple[str, str, str, int]
SOURCES = ["command", "desired_state", "local"]
#: What happens next, as often as it is named here; a number, a choice and a task go with it.
HAPPENINGS = [
    *["deliver"] * 14, *["repeat"] * 5, *["finish"] * 6, *["platform"] * 3, *["lease"] * 2, *["resume"] * 4,
    *["restart"] * 3, *["pause"] * 3, "close", "abandon", "kill",
]  # fmt: skip
Step = Tuple[str, int, bool, Arrival]
STEPS = st.tuples(
    st.sampled_from(HAPPENINGS),
    st.integers(0, 11),
    st.booleans(),
    st.tuples(
        st.sampled_from(["wide", "wide", "wide", "narrow", "narrow", "none"]),
        st.sampled_from(["", "", "fail", "odd", "hang", "hang"]),
        st.sampled_from([*["taken"] * 6, *sorted(FATES)]),
        st.integers(0, 2),
    ),
)


class Platform:
    """What the platform knows of each task, by the contract; any thread may ask it."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.mode = "up"
        self.fates: Dict[str, List[Any]] = {}
        self.attempts: Dict[str, int] = {}
        #: Under which of them the newest delivery came.
        self.delivered: Counter[str] = Counter()
        #: Tasks that a retryable failure puts back into the queue, this many times.
        self.tries: Dict[str, int] = {}
        self.done: Dict[str, Dict[str, Any]] = {}
        #: Tasks whose newest delivery has its last word: taken, refused as known, or forgotten; and those given back.
        self.answered: Set[str] = set()
        self.released: Set[str] = set()
        self.forgotten: Counter[str] = Counter()
        #: The newest try of each that ended in a failure which the platform tries again.
        self.failed: Counter[str] = Counter()
        self.requeued: Counter[str] = Counter()
        self.told: Dict[str, List[Dict[str, Any]]] = {}
        self.keys: Dict[str, bytes] = {}
        self.releases_supported = True
        self.problems: List[str] = []
        #: Whether repetitions come while reports are under way, so that one may follow the last word.
        self.is_lenient = False

    def complete(self, body: Dict[str, Any], key: str, raw: bytes) -> Any:
        """A status, or ``"reset"`` or ``"revoked"``."""
        with self.lock:
            task_id, attempt = body["task_id"], body["attempt"]
            self.check(self.keys.setdefault(key, raw) == raw, f"two results under one key: {key} {raw!r}")
            self.check(key in (f"{task_id}:{attempt}", f"{task_id}:{attempt}:2"), f"a wrong key: {key}")
            self.check(self.is_lenient or task_id not in self.answered, f"a report after the last word: {raw!r}")
            # A failure to be tried again that was on its way when the next try came is no last word to that one.
            is_overtaken = (
                body["status"] == "failed" and body["error"]["retryable"] and attempt < self.delivered[task_id]
            )
            answer = MODES[self.mode]
            if answer is None and self.fates.get(task_id):
                answer = self.fates[task_id].pop(0)
            if answer in (404, 409):
                self.forgotten[task_id] += answer == 404
                self.done.setdefault(task_id, {})
                if answer == 404 or not is_overtaken:
                    self.answered.add(task_id)
            if answer not in (None, "lost"):
                return answer
            taken = self._take(task_id, attempt, body)
            if answer == "lost":
                return "reset"
            if not is_overtaken:
                self.answered.add(task_id)
            return 200 if taken else 409

    def check(self, is_true: bool, problem: str) -> None:
        """Note what must not be; raised in a thread of the library it would only be logged."""
        if not is_true:
            self.problems.append(problem)

    def _take(self, task_id: str, attempt: int, body: Dict[str, Any]) -> bool:
        # The first completion of any attempt wins; one of a try that has failed already is none.
        if task_id in self.done or attempt <= self.failed[task_id]:
            return False
        self.told.setdefault(task_id, []).append(body)
        if body["status"] == "failed" and body["error"]["retryable"] and self.tries[task_id]:
            self.tries[task_id] -= 1
            self.requeued[task_id] += 1
            self.failed[task_id] = max(attempt, self.attempts[task_id])
            self.attempts[task_id] = self.failed[task_id] + 1
        else:
            self.done[task_id] = body
        return True

    def release(self, task_id: str) -> int:
        with self.lock:
            if not self.releases_supported:
                return 501
            self.released.add(task_id)
            return 200


class Wire:
    """``Authenticator`` as a reporter sees it, until the process that it belongs to is killed."""

    def __init__(self, platform: Platform) -> None:
        self.platform = platform
        self.store: Any = self
        self.current = RuntimeCredentials(installation_id="inst-1", runtime_token="rt-1")
        self.support = Support()
        self._condition = threading.Condition()
        self._is_dead = False
        self._in_flight = 0

    def kill(self) -> None:
        """What is on its way arrives; nothing is sent any more."""
        with self._condition:
            self._is_dead = True
            assert self._condition.wait_for(lambda: not self._in_flight, GUARD)

    def request(self, *args: Any, **options: Any) -> Any:
        with self._condition:
            if self._is_dead:
                raise TransportError("dead")
            self._in_flight += 1
        try:
            return self.send(*args, **options)
        finally:
            with self._condition:
                self._in_flight -= 1
                self._condition.notify_all()

    def send(
        self,
        method: str,
        path: Callable[[Any], str],
        *,
        body: bytes,
        idempotency_key: Optional[str],
        deadline: Deadline,
    ) -> Any:
        where = path(None).split("/")
        if where[-1] == "release":
            status: Any = self.platform.release(where[-2])
        else:
            self.platform.check(where[-1] == "complete", f"a wrong path: {where}")
            status = self.platform.complete(json.loads(body), idempotency_key or "", body)
        if status == "reset":
            raise TransportError("reset")
        if status == "revoked":
            raise RevokedError("over", 1.0)
        return Reply(status, {}, b"{}" if status < 400 else b'{"error": "x"}', 0.0, 0.0), None

    def revoke(self, error: RevokedError) -> None:
        """Nothing follows from a revocation where no worker is."""

    def close(self) -> None: ...


class HttpWire(Wire):
    """The same over HTTP: a real Authenticator, and the platform behind a server."""

    def __init__(self, platform: Platform, server: Scripted, config: WorkerConfig) -> None:
        super().__init__(platform)
        self.installation = Installation(config, pool_size=8)
        self.store = self.installation.store
        self.support = self.installation.auth.support
        self.send = self.installation.auth.request  # type: ignore[method-assign]

        def complete(request: Request) -> Any:
            status = platform.complete(request.json, request.headers["Idempotency-Key"], request.raw)
            if status == "reset":
                return None
            if status == "revoked":
                return 403, {"code": "INSTALLATION_REVOKED", "message": "over"}
            return status, {}

        server.on["complete"] = complete
        server.on["release"] = lambda request: (platform.release(request.task_id), {})

    def close(self) -> None:
        self.installation.close()


class Handlers:
    """Handlers that wait to be let go, and tell which of them are inside."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.gates: Dict[str, List[threading.Event]] = {}
        self._inside: Counter[str] = Counter()
        self.runs: Counter[str] = Counter()

    def __call__(self, ctx: TaskContext, input: Any) -> str:
        gate = threading.Event()
        with self.lock:
            self.runs[ctx.task_id] += 1
            self._inside[ctx.task_id] += 1
            self.gates.setdefault(ctx.task_id, []).append(gate)
        assert gate.wait(3 * GUARD)
        with self.lock:
            self._inside[ctx.task_id] -= 1
        if input == "fail":
            raise ValueError("failed")
        if input == "odd":
            return object()  # type: ignore[return-value]
        ctx.raise_if_cancelled()
        return "done"

    @property
    def inside(self) -> Counter[str]:
        with self.lock:
            return Counter(self._inside)

    def let_go(self, task_id: str) -> None:
        """Let every run of this task end, and wait until it has."""
        with self.lock:
            for gate in self.gates.pop(task_id, []):
                gate.set()
        # Else the machine would take what was before for what came of it.
        until(lambda: not self._inside[task_id] or task_id in self.gates)

    def let_all_go(self) -> None:
        for task_id in list(self.gates):
            self.let_go(task_id)


class Life:
    """One process: its dispatcher and reporter, and the outbox through which it may be cut off."""

    def __init__(self, platform: Platform, handlers: Handlers, machine: TaskStates) -> None:
        self.machine = machine
        config = WorkerConfig(
            agent_id="agent-1",
            install_token="skt-1",
            max_workers=WORKERS,
            max_waiting_bytes=QUEUE * dispatch.WAITING_COST,
            api_base_url=machine.url(),
            max_result_bytes=1000,
        )
        self.wire = machine.wire(platform, config)
        self.life = life.Life(1.0, Announcer())
        self.life.start()
        self.life.attach(self)
        self.disk = Disk(machine.path) if machine.path else None
        self.reporter = Reporter(
            config,
            self.wire,
            "worker-1",
            self.life,
            outbox=self.disk,  # type: ignore[arg-type]
        )
        registry = TaskRegistry()
        registry.add("wide", handlers)
        registry.add("narrow", handlers, None, 1)
        self.timer = Timer()
        self.dispatcher = Dispatcher(config, registry, self.reporter, timer=self.timer, lease=self)
        self.closed: Optional[str] = None
        #: Tasks given to its dispatcher.
        self.submissions = 0
        #: Answers 404 that this life's reporter was given.
        self.forgotten_before = sum(platform.forgotten.values())

    def is_held(self) -> bool:
        """The lease."""
        return self.machine.lease

    def begin(self) -> None:
        """Only a revocation begins the stop of this life."""
        self.close(terminated=self.life.is_terminated)

    def hurry(self) -> None: ...

    def close_unstarted(self) -> None: ...

    def close(self, terminated: bool) -> None:
        if terminated or self.closed is None:
            self.closed = "terminated" if terminated else "stopped"
        self.dispatcher.close(terminated)
        if terminated:
            self.dispatcher.cancel_running("terminated")

    def end(self) -> None:
        self.dispatcher.end_pool(Deadline(GUARD))
        assert self.reporter.close(Deadline(GUARD)) == []
        self.timer.close()
        assert self.timer.join(Deadline(GUARD))
        if self.disk is not None:
            self.disk.close(self.reporter)
        self.wire.close()


class Disk:
    """The real outbox, until the process is killed."""

    def __init__(self, path: str) -> None:
        self._outbox = open_outbox(path)
        self.is_dead = False

    @property
    def epoch(self) -> int:
        return self._outbox.epoch

    def verify(self) -> None:
        if not self.is_dead:
            self._outbox.verify()

    def put(self, *args: Any) -> bool:
        return not self.is_dead and self._outbox.put(*args)

    def put_all(self, *args: Any) -> bool:
        return not self.is_dead and self._outbox.put_all(*args)

    def remove(self, *args: Any) -> None:
        if not self.is_dead:
            self._outbox.remove(*args)

    def owner_of(self, *args: Any) -> object:
        return self._outbox.owner_of(*args)

    def claim(self, *args: Any, owner: object) -> Any:
        return self._outbox.claim(*args, owner=owner)

    def disown(self, owner: object) -> None:
        self._outbox.disown(owner)

    def close(self, owner: object) -> None:
        self._outbox.disown(owner)
        self._outbox.close()


class TaskStates(RuleBasedStateMachine):
    """Arrivals, repetitions, ends, timeouts, pauses, leases, refusals, outages, kills, stops: in any order.

    What is drawn must not depend on what threads do, so there is one rule, and a step that makes no sense does nothing.
    """

    def url(self) -> str:
        return "http://127.0.0.1:9"

    def wire(self, platform: Platform, config: WorkerConfig) -> Any:
        return Wire(platform)

    @initialize(releases=st.booleans(), outbox=st.booleans())
    def begin(self, releases: bool, outbox: bool) -> None:
        self.directory = tempfile.TemporaryDirectory() if outbox else None
        #: The outbox's file; None without one.
        self.path = os.path.join(self.directory.name, "outbox.db") if self.directory else None
        self.platform, self.handlers = Platform(), Handlers()
        self.platform.releases_supported = releases
        self.lease = True
        self.inputs: Dict[str, str] = {}
        self.kinds: Dict[str, str] = {}
        #: Tasks that went down with a process, and how often each may have run for that reason.
        self.gone: Set[str] = set()
        self.may_rerun: Counter[str] = Counter()
        self.submitter: Optional[threading.Thread] = None
        self.submitted = ""
        self.life = Life(self.platform, self.handlers, self)

    # -- what may happen --

    @rule(step=STEPS)
    def do(self, step: Step) -> None:
        name, number, flag, arrival = step
        if name == "deliver":
            self.deliver(arrival)
        elif name == "repeat" and self.inputs:
            # The youngest are the ones of which something is still open.
            self.repeat(list(self.inputs)[-1 - number % len(self.inputs)], elsewhere=flag)
        elif name == "finish":
            self.finish(number)
        elif name == "pause":
            self.life.dispatcher.pause(SOURCES[number % 3])
            self.rest()
            # What the stream's thread had in hand may have to wait for its answer.
            assert self.life.dispatcher.waiting == len(self.life.dispatcher.records.refused) <= 1
        elif name == "resume":
            self.life.dispatcher.resume(*(SOURCES if flag else [SOURCES[number % 3]]))
        elif name == "platform":
            self.platform.mode = "up" if flag else list(MODES)[number % len(MODES)]
        elif name == "lease":
            self.lease_is(flag or number % 2 == 0)
        elif name == "close" and number < 4:
            self.life.close(terminated=flag)
            self.rest()
            assert self.life.dispatcher.waiting == 0
        elif name == "abandon" and self.life.closed:
            self.life.dispatcher.abandon("shutdown")
            self.rest()
            assert self.life.dispatcher.running == 0
        elif name == "restart" and self.life.closed:
            self.restart()
        elif name == "kill" and number < 4:
            self.begin_anew()
        self.rest()

    def deliver(self, arrival: Arrival) -> None:
        if self.submitter is None:
            task_id = f"t{len(self.inputs)}"
            self.kinds[task_id], self.inputs[task_id], fate, tries = arrival
            self.platform.attempts[task_id] = self.platform.delivered[task_id] = 1
            self.platform.tries[task_id] = tries
            self.platform.fates[task_id] = list(FATES[fate])
            self.submit(task_id)

    def repeat(self, task_id: str, elsewhere: bool) -> None:
        if self.submitter is not None:
            return
        with self.platform.lock:
            if elsewhere and task_id not in self.platform.done:
                # It was given to another worker meanwhile.
                self.platform.attempts[task_id] += 1
            self.platform.delivered[task_id] = self.platform.attempts[task_id]
            self.platform.answered.discard(task_id)
            self.platform.released.discard(task_id)
        self.gone.discard(task_id)
        self.submit(task_id)

    def submit(self, task_id: str) -> None:
        timeout = 0.002 if self.inputs[task_id] == "hang" else None
        attempt = self.platform.delivered[task_id]
        task = Task(
            task_id=task_id,
            capability=self.kinds[task_id],
            input=self.inputs[task_id],
            attempt=attempt,
            timeout=timeout,
        )
        self.submitted = task_id
        self.life.submissions += 1
        self.submitter = threading.Thread(target=self.life.dispatcher.submit, args=(task,), daemon=True)
        self.submitter.start()
        self.rest()

    def finish(self, number: int) -> None:
        inside = sorted(+self.handlers.inside)
        if inside:
            self.handlers.let_go(inside[number % len(inside)])

    def lease_is(self, held: bool) -> None:
        self.lease = held
        if held:
            self.life.dispatcher.start_waiting()
        else:
            self.life.dispatcher.lose_lease()

    def restart(self) -> None:
        """The next process after a stop in order: what runs is answered, what can be sent is sent."""
        self.life.dispatcher.abandon("shutdown")
        self.rest()
        held = set(self.life.reporter.undelivered())
        assert self.life.reporter.flush(Deadline(0.05)) == (not held)
        assert set(self.life.reporter.undelivered()) == held
        self.begin_anew()

    def begin_anew(self) -> None:
        """The next process after a kill; with an outbox it delivers what this one left, and does not run it again."""
        self.life.wire.kill()
        held = set(self.life.reporter.undelivered())
        kept = held if self.path else set()
        self.gone |= self.elsewhere()[0] | (held - kept)
        if self.submitter is not None:
            self.gone.add(self.submitted)
        self.may_rerun.update(set(self.inputs) - kept)
        # A failure to be tried again that is on disk under an attempt before the newest delivery, which came after the
        # last sending, is no answer to that one: it goes down with the process.
        overtaken = {
            task_id
            for task_id, one in self.life.reporter.results.held.items()
            if not one.is_final and (one.stored or (0,))[0] < self.platform.delivered[task_id]
        }
        self.gone |= overtaken
        self.may_rerun.update(overtaken & kept)
        keys = self.platform.keys.items()
        self.platform.keys = {key: raw for key, raw in keys if key.split(":")[0] in kept}
        self.bury()
        self.life = Life(self.platform, self.handlers, self)
        if self.path:
            assert self.life.reporter.restore(Deadline(GUARD)) == len(kept)
        self.rest()

    def bury(self) -> None:
        """End a life whose process was killed: what its threads still do must reach neither platform nor disk."""
        life = self.life
        if life.disk is not None:
            life.disk.is_dead = True
        life.dispatcher.close(False)
        if self.submitter is not None:
            self.submitter.join(GUARD)
            self.submitter = None
        self.handlers.let_all_go()
        assert life.dispatcher.drain(Deadline(GUARD))
        until(lambda: not +self.handlers.inside)
        life.end()

    # -- what is true at rest --

    def rest(self) -> None:
        """Wait until no thread has anything to do that it could; one that is stuck fails here."""
        end = time.monotonic() + GUARD
        while True:
            problem = self.unrest()
            if not problem:
                return
            assert time.monotonic() < end, problem
            time.sleep(0.0003)

    def elsewhere(self) -> Tuple[Set[str], Counter[str]]:
        """Tasks that are neither with the reporter nor with the platform; and how many handlers of each run in time."""
        platform = self.platform
        with platform.lock:
            away = platform.answered | platform.released | self.gone | set(self.life.reporter.undelivered())
        if self.submitter is not None and self.submitter.is_alive():
            away.add(self.submitted)
        late = Counter(name.split()[1] for name in self.life.dispatcher.overdue_names())
        return set(self.inputs) - away, self.handlers.inside - late

    def unrest(self) -> str:
        """Why the machine is not at rest; empty where it is, and was while it was looked at."""
        before = self.picture()
        problem = self.motion()
        return problem or ("" if self.picture() == before else "something changed meanwhile")

    def picture(self) -> Tuple[Any, ...]:
        dispatcher, counts = self.life.dispatcher, self.life.dispatcher.counts
        is_submitting = self.submitter is not None and self.submitter.is_alive()
        ended = counts.completed + counts.failed + counts.rejected + counts.released
        return dispatcher.running, dispatcher.waiting, counts.received, counts.duplicates, ended, is_submitting

    def motion(self) -> str:
        life, platform = self.life, self.platform
        dispatcher = life.dispatcher
        if self.submitter is not None and not self.submitter.is_alive():
            self.submitter = None
        if dispatcher.counts.received < life.submissions:
            return f"the stream's thread has not come to {self.submitted}"
        here, running = self.elsewhere()
        held = set(life.reporter.undelivered())
        if dispatcher.running + dispatcher.waiting != len(here):
            return f"{dispatcher.running} running and {dispatcher.waiting} waiting, but without a state: {here}"
        if set(running) - here or sum(running.values()) != dispatcher.running:
            return f"{dispatcher.running} running, but inside {running}, of {here}"
        if held & (platform.answered | platform.released):
            return f"held and settled: {held & (platform.answered | platform.released)}"
        if held and platform.mode == "up":
            return f"not delivered: {held}"
        if any(self.inputs[task_id] == "hang" for task_id in running):
            return f"not timed out: {running}"
        waiting = here - set(running)
        overdue = len(dispatcher.overdue_names())
        if sum(self.handlers.inside.values()) != dispatcher.running + overdue:
            return f"{dispatcher.running} running and {overdue} late, but inside {self.handlers.inside}"
        free = WORKERS - dispatcher.running - max(0, overdue - WORKERS)
        narrow = any(self.kinds[task_id] == "narrow" for task_id in running)
        has_room = life.reporter.has_room()
        able = {task_id for task_id in waiting if self.kinds[task_id] != "narrow" or not narrow}
        if free and able and has_room and self.lease:
            return f"{free} threads are free, but these wait: {able}"
        known = list(dispatcher.records.known.values())
        refused = {record.task.task_id for record in known if record.refusal is not None}
        # An answer takes room too.
        if refused and has_room:
            return f"not answered although there is room: {refused}"
        if self.submitter is not None:
            if self.submitted in held | platform.answered | platform.released:
                return f"{self.submitted} is answered, but the stream's thread is not free"
            if life.closed or dispatcher.waiting < QUEUE:
                return f"{self.submitted} is not taken although there is room"
            if platform.releases_supported:
                return f"{self.submitted} is not given back"
        if platform.mode == "revoked" and held and life.closed != "terminated":
            return "a revocation is not heard"
        if self.path:
            database = sqlite3.connect(f"file:{self.path}?mode=ro", uri=True, isolation_level=None)
            rows = {task_id for (task_id,) in database.execute("SELECT task_id FROM completion")}
            database.close()
            if rows != held:
                return f"on disk {rows}, held {held}"
        return ""

    @invariant()
    def nothing_forbidden_happened(self) -> None:
        assert self.platform.problems == []

    @invariant()
    def counts_add_up(self) -> None:
        dispatcher, counts = self.life.dispatcher, self.life.dispatcher.counts

        def is_sum() -> bool:
            ended = counts.completed + counts.failed + counts.rejected + counts.released
            is_submitting = self.submitter is not None and self.submitter.is_alive()
            return (
                counts.received == ended + counts.duplicates + dispatcher.running + dispatcher.waiting + is_submitting
            )

        # The stream's thread may still be on its way out of a submit().
        until(is_sum)
        assert self.life.reporter.backlog == len(self.life.reporter.undelivered())
        assert self.life.reporter.results.dropped == sum(self.platform.forgotten.values()) - self.life.forgotten_before

    @invariant()
    def limits_hold(self) -> None:
        assert 0 <= self.life.dispatcher.running <= WORKERS
        assert 0 <= self.life.dispatcher.waiting <= QUEUE
        assert self.life.dispatcher.waiting_bytes == self.life.dispatcher.waiting * dispatch.WAITING_COST
        assert sum(self.handlers.inside.values()) <= 2 * WORKERS

    @invariant()
    def no_handler_runs_twice(self) -> None:
        """Once; and once more for each try that the platform asked for, and each process that ended without a word."""
        for task_id, runs in self.handlers.runs.items():
            again = self.platform.requeued[task_id] + self.platform.forgotten[task_id] + self.may_rerun[task_id]
            assert runs <= 1 + again, (task_id, runs)

    @invariant()
    def each_result_is_its_tasks(self) -> None:
        """What the platform took is what the handler did, or says why it did not."""
        for task_id, bodies in self.platform.told.items():
            assert len(bodies) <= 1 + self.platform.requeued[task_id]
            for body in bodies:
                if body["status"] == "completed":
                    assert self.inputs[task_id] in ("", "hang")
                    assert body["output"] == "done"
                    assert self.handlers.runs[task_id]
                elif body["error"]["code"] == "handler_error":
                    assert self.inputs[task_id] == "fail"
                elif body["error"]["code"] == "timeout":
                    assert self.inputs[task_id] == "hang"

    def teardown(self) -> None:
        if not hasattr(self, "life"):
            return
        try:
            self.stop()
        finally:
            self.handlers.let_all_go()
            if self.directory is not None:
                self.directory.cleanup()

    def stop(self) -> None:
        """After the drain and the flush nothing is left, and each task has its word."""
        self.platform.mode = "up"
        self.life.close(terminated=False)
        self.rest()
        self.handlers.let_all_go()
        assert self.life.dispatcher.drain(Deadline(GUARD))
        # First, because a flush does not wait a second time for what is refused.
        self.rest()
        assert self.life.reporter.flush(Deadline(GUARD))
        assert self.life.reporter.undelivered() == []
        here, running = self.elsewhere()
        assert (here, +running) == (set(), Counter())
        until(lambda: self.life.dispatcher.overdue_names() == [])
        for task_id in self.platform.answered:
            assert task_id in self.platform.done or self.platform.told.get(task_id)
        self.life.end()
        self.nothing_forbidden_happened()
        self.counts_add_up()
        self.no_handler_runs_twice()
        self.each_result_is_its_tasks()


class TaskStatesOverHttp(TaskStates):
    """The same with a real Authenticator and real answers, resets and refreshes on the way."""

    server: Optional[Scripted] = None

    def url(self) -> str:
        if self.server is None:
            self.server = Scripted()
        return self.server.url

    def wire(self, platform: Platform, config: WorkerConfig) -> Any:
        assert self.server is not None
        return HttpWire(platform, self.server, config)

    def teardown(self) -> None:
        try:
            super().teardown()
        finally:
            if self.server is not None:
                self.server.close()


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing waits for a time: what is tried again is tried at once."""
    for module in (report, release):
        monkeypatch.setattr(module, "full_jitter", lambda tries, first, longest: 0.001)
    monkeypatch.setattr(report, "REFUSED_PAUSE", 0.002)
    monkeypatch.setattr(results, "BACKLOG", BACKLOG)
    monkeypatch.setattr(dispatch, "_LOOK_AGAIN", 0.002)
    monkeypatch.setattr(dispatch, "RELEASE_PAUSE", 0.001)
    # Outages and kills by the thousand would fill the log.
    monkeypatch.setattr(logging.getLogger("sekuire"), "disabled", True)
    for name in ("report", "dispatch", "task", "outbox", "credentials", "http"):
        monkeypatch.setattr(logging.getLogger(f"sekuire.{name}"), "disabled", True)


def drive(machine: Any, examples: int, steps: int) -> None:
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        machine,
        settings=settings(
            max_examples=LONG or examples,
            stateful_step_count=2 * steps if LONG else steps,
            deadline=None,
            # The same examples each time in the suite; new ones in each long run, which prints what to do again.
            derandomize=not LONG,
            database=None,
            print_blob=bool(LONG),
            # No shrinking: each failing try waits for its guard.
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )


#: Edges that need a policy, a failure or a stop at one moment; they have tests of their own.
RARE = {
    *((records.STARTING, records.SENT), *((records.SENT, to) for to in records.SENT.edges)),
    (records.STARTING, records.REJECTED),
    (records.STARTING, records.RELEASED),
    (records.STARTING, records.FINISHED),
    (results.PLANNED, results.HELD),
    (results.SENDING, results.HELD),
    # There is no policy here that wants an approval: test_approvals.py drives each of these.
    *((records.STARTING, records.ASKING), *((records.ASKING, to) for to in records.ASKING.edges)),
}


def watch_moves(monkeypatch: pytest.MonkeyPatch) -> Set[Tuple[Any, Any]]:
    """The edges that tasks and reports take from now on, as pairs of states."""
    seen: Set[Tuple[Any, Any]] = set()
    for home, users in ((records, (records, dispatch, running, answers)), (results, (results, report))):

        def note(one: Any, to: Any, move: Callable[[Any, Any], None] = home.move) -> None:
            seen.add((one.state, to))
            move(one, to)

        for user in users:
            monkeypatch.setattr(user, "move", note)
    return seen


@pytest.mark.timeout(0 if LONG else 600)
def test_task_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each task is in one state, runs once, has one result; nothing is lost by an outage, a kill or a stop."""
    seen = watch_moves(monkeypatch)
    legal = {(one, to) for states in (records.State, results.State) for one in states for to in one.edges}
    # Other versions of hypothesis give other examples, and may need more of them to drive every edge.
    for examples in (25, 100, 400):
        drive(TaskStates, examples, 50)
        if legal - seen <= RARE:
            break
    assert legal - seen <= RARE


@pytest.mark.slow
@pytest.mark.timeout(0 if LONG else 600)
def test_task_states_over_http() -> None:
    """The same over real connections."""
    drive(TaskStatesOverHttp, 5, 25)


def test_a_raised_attempt_is_on_disk(tmp_path: pathlib.Path) -> None:
    """A result that is sent under a higher attempt is kept under it: no later process may send another one as that."""
    platform = Platform()
    platform.mode = "down"
    config = config_of()
    wire: Any = Wire(platform)
    outbox = open_outbox(tmp_path / "outbox.db")
    reporter = Reporter(config, wire, "worker-1", life.Life(1.0, Announcer()), outbox=outbox)
    result = reporter.accept(completion_of("t1", output=1))
    assert result is not None
    reporter.post(result)
    assert reporter.redelivered("t1", 3)
    until(lambda: "t1:3" in platform.keys)
    assert reporter.close(Deadline(GUARD)) == []
    assert [(one.task_id, one.attempt) for one in outbox.claim("http://127.0.0.1:9", "agent-1", object())] == [
        ("t1", 3)
    ]
    outbox.close()
