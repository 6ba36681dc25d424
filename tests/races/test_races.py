"""Races inside the packages: credentials, outbox, reporter, dispatcher and drain. A long run: ``SEKUIRE_RACES=50``."""

from __future__ import annotations

import functools
import logging
import os
import pathlib
import random
import sqlite3
import threading
import time
from collections import Counter
from typing import Any, Callable, Dict, List, Optional, Set

import pytest

from sekuire._internal.threads import Deadline, Timer
from sekuire.config import WorkerConfig
from sekuire.credentials import RuntimeCredentialsStore, Snapshot
from sekuire.credentials.store import Renewed
from sekuire.errors import AuthenticationError
from sekuire.handlers.context import TaskContext
from sekuire.handlers.registry import TaskRegistry
from sekuire.wire.models import Grant, RuntimeCredentials, Task
from sekuire.worker import dispatch, release, report
from sekuire.worker.announcer import Announcer
from sekuire.worker.dispatch import Dispatcher
from sekuire.worker.life import Life
from sekuire.worker.outbox import Outbox, Stored, open_outbox
from sekuire.worker.report import Reporter

from ..support.builders import completion_of
from ..support.waiting import GUARD, until
from ..worker.test_states import Platform, Wire

#: How often each race is run.
ROUNDS = int(os.environ.get("SEKUIRE_RACES") or 1)

pytestmark = [pytest.mark.usefixtures("fast_switch"), pytest.mark.timeout(0 if ROUNDS > 1 else 600)]


@pytest.fixture(autouse=True)
def quick_and_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (report, release):
        monkeypatch.setattr(module, "full_jitter", lambda tries, first, longest: 0.001)
    monkeypatch.setattr(report, "REFUSED_PAUSE", 0.002)
    monkeypatch.setattr(dispatch, "_LOOK_AGAIN", 0.002)
    for name in ("report", "dispatch", "task", "credentials"):
        monkeypatch.setattr(logging.getLogger(f"sekuire.{name}"), "disabled", True)


class Lease:
    held = True

    def is_held(self) -> bool:
        return self.held


def together(*actions: Callable[[], None]) -> None:
    """Run all at once, each in a thread; what one raises is raised here."""
    barrier = threading.Barrier(len(actions))
    problems: List[BaseException] = []

    def run(action: Callable[[], None]) -> None:
        try:
            barrier.wait(GUARD)
            action()
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=run, args=(action,), daemon=True) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(GUARD)
    assert not any(thread.is_alive() for thread in threads), "a thread is stuck"
    if problems:
        raise problems[0]


# -- credentials ------------------------------------------------------------------------------------------------------


class Issuer:
    """A platform that rotates: each refresh token can be used once, and only the newest."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.number = 0
        self.refreshes = 0
        self.wrong: List[str] = []

    def credentials(self) -> RuntimeCredentials:
        return RuntimeCredentials(
            installation_id="i", runtime_token=f"rt-{self.number}", refresh_token=f"rf-{self.number}"
        )

    def refresh(self, snapshot: Snapshot) -> Renewed:
        with self.lock:
            token = snapshot.credentials.refresh_token
            assert token is not None
            if token.reveal() != f"rf-{self.number}":
                self.wrong.append(token.reveal())
            self.number += 1
            self.refreshes += 1
            return self.renewed(self.credentials())

    def beat(self, number: int) -> Renewed:
        return self.renewed(RuntimeCredentials(runtime_token=f"beat-{number}"))

    @staticmethod
    def renewed(credentials: RuntimeCredentials) -> Renewed:
        grant = Grant(credentials=credentials, lifetime=3600.0)
        return Renewed(grant=grant, sent_at=time.monotonic(), sent_wall=time.time())


@pytest.mark.parametrize("kept", [False, True], ids=["memory", "file"])
def test_rotation_beside_heartbeats(kept: bool, tmp_path: pathlib.Path) -> None:
    """64 threads refused together cause at most one refresh; no heartbeat's token brings an old refresh token back."""
    issuer = Issuer()
    store = RuntimeCredentialsStore(issuer.credentials(), path=tmp_path / "c.json" if kept else None)
    for number in range((5 if kept else 10) * ROUNDS):
        used, refreshes = store.generation, issuer.refreshes
        seen: List[Snapshot] = []

        def refused(used: int = used, seen: List[Snapshot] = seen) -> None:
            seen.append(store.renew(used, issuer.refresh, Deadline(GUARD)))

        def beat(number: int = number, used: int = used) -> None:
            store.offer(used, issuer.beat(number))
            generation = store.generation
            store.offer(generation, issuer.beat(number))
            store.reload()

        beats = [beat] * 4 if number % 2 else []
        together(*[refused] * 64, *beats)
        # With heartbeats one may bring a token first, and then nothing is refreshed.
        assert issuer.refreshes - refreshes in ((0, 1) if beats else (1,))
        assert all(snapshot.generation > used for snapshot in seen)
        assert store.current.refresh_token == issuer.credentials().refresh_token
        if kept:
            assert RuntimeCredentialsStore(path=tmp_path / "c.json").current == store.current
    assert issuer.wrong == []


def test_refusals_of_some_beside_the_success_of_others(tmp_path: pathlib.Path) -> None:
    """Threads with different ways on one store: who has one that works gets through, in one renewal at a time."""
    for _ in range(10 * ROUNDS):
        store = RuntimeCredentialsStore(RuntimeCredentials(installation_id="i", runtime_token="rt-0"))
        used = store.generation
        flying, tries, most = [0], Counter(), [0]  # type: ignore[var-annotated]
        ends: List[str] = []

        def act(who: str, works: bool, flying: Any = flying, tries: Any = tries, most: Any = most) -> Renewed:
            flying[0] += 1
            most[0] = max(most[0], flying[0])
            tries[who] += 1
            time.sleep(0)
            flying[0] -= 1
            if not works:
                raise AuthenticationError("refused", 401)
            return Issuer.renewed(RuntimeCredentials(installation_id="i", runtime_token="rt-1"))

        def call(who: str, works: bool, store: Any = store, used: int = used, ends: Any = ends, act: Any = act) -> None:
            try:
                store.renew(used, lambda snapshot: act(who, works), Deadline(GUARD), who)
                ends.append(who)
            except AuthenticationError:
                assert not works

        poor = [functools.partial(call, f"poor-{number}", False) for number in range(3)] * 5
        together(*poor, *[functools.partial(call, "rich", True)] * 10)
        assert most == [1]
        assert tries["rich"] == 1
        assert ends.count("rich") == 10


def test_two_stores_of_one_file(tmp_path: pathlib.Path) -> None:
    """Two stores on one file, as two processes have, never use a refresh token that the other has used."""
    issuer = Issuer()
    path = tmp_path / "c.json"
    stores = [RuntimeCredentialsStore(path=path) for _ in range(2)]
    stores[0].update(issuer.credentials())
    stores[1].reload()

    def refused(store: RuntimeCredentialsStore) -> None:
        store.renew(store.generation, issuer.refresh, Deadline(GUARD))

    for _ in range(4 * ROUNDS):
        together(*[functools.partial(refused, store) for store in stores for _ in range(8)])
    assert issuer.wrong == []
    for store in stores:
        store.reload()
        assert store.current.refresh_token == issuer.credentials().refresh_token


# -- the outbox -------------------------------------------------------------------------------------------------------


def test_workers_on_one_outbox(tmp_path: pathlib.Path) -> None:
    """Puts, removals and claims of two workers at once: no result is lost, and none is given to two."""
    for number in range(4 * ROUNDS):
        share_an_outbox(str(tmp_path / f"{number}.db"))


def share_an_outbox(path: str) -> None:
    outbox = open_outbox(path)
    left = [Stored(f"left-{one}", 1, False, b"{") for one in range(40)]
    for one in left:
        outbox.put("u", "a", None, one, None)
    outbox.disown(None)
    claimed: Dict[str, List[Stored]] = {"x": [], "y": []}

    def work(owner: str, name: int) -> None:
        for turn in range(12):
            task_id = f"{owner}-{name}-{turn}"
            assert outbox.put("u", "a", "i", Stored(task_id, turn + 1, False, b"{"), owner)
            assert outbox.owner_of("u", "a", task_id) == owner
            if turn % 3 == 0:
                assert outbox.put("u", "a", "i", Stored(task_id, turn + 2, True, b"[}"), owner)
            if turn % 2:
                outbox.remove("u", "a", task_id, turn + 2)
                assert outbox.owner_of("u", "a", task_id) is None

    def claim(owner: str) -> None:
        for _ in range(10):
            claimed[owner] += outbox.claim("u", "a", owner)

    works = [functools.partial(work, owner, name) for owner in "xy" for name in range(4)]
    together(*works, *[functools.partial(claim, owner) for owner in "xy"])
    # Nobody was given what has an owner already, and what had none went to one of the two, once.
    assert Counter(one.task_id for one in claimed["x"] + claimed["y"]) == Counter(one.task_id for one in left)
    outbox.close()
    database = sqlite3.connect(path)
    rows = dict(database.execute("SELECT task_id, attempt FROM completion"))
    database.close()
    wanted = {f"{o}-{n}-{t}": t + 1 + (t % 3 == 0) for o in "xy" for n in range(4) for t in range(0, 12, 2)}
    assert rows == {**wanted, **{one.task_id: 1 for one in left}}


def test_an_outbox_that_is_opened_and_closed_all_the_time(tmp_path: pathlib.Path) -> None:
    """Threads of one process that open and close the same file are never told that another uses it."""
    path = tmp_path / "outbox.db"

    def work(name: int) -> None:
        for turn in range(15 * ROUNDS):
            outbox = open_outbox(path)
            assert outbox.put("u", "a", None, Stored(f"{name}-{turn}", 1, False, b"{"), name)
            outbox.disown(name)
            outbox.close()

    together(*[functools.partial(work, name) for name in range(4)])
    outbox = open_outbox(path)
    assert len(outbox.claim("u", "a", object())) == 4 * 15 * ROUNDS
    outbox.close()


# -- the reporter -----------------------------------------------------------------------------------------------------


def config_of(**options: Any) -> WorkerConfig:
    return WorkerConfig(
        **{"agent_id": "a", "install_token": "t", "api_base_url": "http://127.0.0.1:9", "max_workers": 4, **options}
    )


def reporter_of(platform: Platform, outbox: Optional[Outbox] = None) -> Reporter:
    wire: Any = Wire(platform)
    return Reporter(config_of(), wire, "w", Life(1.0, Announcer()), outbox=outbox)


@pytest.mark.parametrize("kept", [False, True], ids=["memory", "outbox"])
def test_one_result_per_task(kept: bool, tmp_path: pathlib.Path) -> None:
    """Many threads with a result for the same tasks, beside repetitions: one is taken, and told once."""
    for number in range(4 * ROUNDS):
        tell_once(open_outbox(tmp_path / f"{number}.db") if kept else None)


def tell_once(outbox: Optional[Outbox]) -> None:
    platform = Platform()
    platform.is_lenient = True
    reporter = reporter_of(platform, outbox)
    ids = [f"t{one}" for one in range(40)]
    taken: List[str] = []
    for task_id in ids:
        platform.attempts[task_id] = 1
        platform.tries[task_id] = 0

    def finish(way: int) -> None:
        for task_id in ids:
            result = reporter.accept(completion_of(task_id, output=way))
            if result is not None:
                taken.append(task_id)
                (reporter.post if way % 2 else reporter.enqueue)(result)
            assert reporter.redelivered(task_id, 1)

    def repeat() -> None:
        for attempt in (2, 3):
            for task_id in ids:
                reporter.redelivered(task_id, attempt)

    def flap() -> None:
        for mode in ("down", "up") * 5:
            platform.mode = mode
            time.sleep(0.001)

    together(*[functools.partial(finish, way) for way in range(6)], repeat, repeat, flap)
    platform.mode = "up"
    assert reporter.flush(Deadline(GUARD))
    assert sorted(taken) == sorted(ids)
    assert {task_id: len(bodies) for task_id, bodies in platform.told.items()} == dict.fromkeys(ids, 1)
    assert (reporter.undelivered(), reporter.results.dropped) == ([], 0)
    assert reporter.close(Deadline(GUARD)) == []
    if outbox is not None:
        assert outbox.claim("http://127.0.0.1:9", "a", object()) == []
        outbox.close()
    assert platform.problems == []


# -- dispatch and drain -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["drain", "abandon", "terminate"])
def test_a_storm_that_ends_at_any_moment(end: str) -> None:
    """Arrivals, repetitions, pauses, timeouts, outages, a stop among them: each task is answered or given back."""
    for number in range(4 * ROUNDS):
        storm(end, random.Random(number))


def storm(end: str, chance: random.Random) -> None:
    platform = Platform()
    platform.is_lenient = True
    reporter = reporter_of(platform)
    timer, registry = Timer(), TaskRegistry()
    runs: Counter[str] = Counter()
    lock = threading.Lock()
    lease = Lease()

    def handle(ctx: TaskContext, input: Any) -> str:
        with lock:
            runs[ctx.task_id] += 1
        if input["wait"]:
            ctx.wait_cancelled(input["wait"])
        ctx.raise_if_cancelled()
        return "done"

    registry.add("wide", handle)
    registry.add("narrow", handle, None, 1)
    dispatcher = Dispatcher(config_of(max_queued=5), registry, reporter, timer=timer, lease=lease)
    count = 150
    over = threading.Event()
    submitted: Set[str] = set()
    stop_after = chance.randrange(20, count)
    tasks = []
    for one in range(count):
        platform.attempts[f"t{one}"], platform.tries[f"t{one}"] = 1, 0
        wait = chance.choice([0, 0, 0.001, 0.003])
        tasks.append(
            Task(
                task_id=f"t{one}",
                capability=chance.choice(["wide", "wide", "narrow", "none"]),
                input={"wait": wait},
                timeout=chance.choice([None, 0.001, 0.002]),
            )
        )
    reached = threading.Event()

    def stream() -> None:
        for at, task in enumerate(tasks):
            submitted.add(task.task_id)
            dispatcher.submit(task)
            if at % 3 == 0:
                dispatcher.submit(task)
            if at == stop_after:
                reached.set()
        over.set()

    def toggle(source: str) -> None:
        while not over.is_set():
            dispatcher.pause(source)
            dispatcher.resume(source)
            time.sleep(0.002)

    def shake() -> None:
        while not over.is_set():
            lease.held = not lease.held
            if not lease.held:
                dispatcher.cancel_running("lease lost")
            platform.mode = "down" if platform.mode == "up" else "up"
            dispatcher.overdue_names()
            time.sleep(0.001)

    def stop() -> None:
        assert reached.wait(GUARD)
        dispatcher.close(end == "terminate")
        if end == "terminate":
            dispatcher.cancel_running("terminated")
        if end == "abandon":
            dispatcher.abandon("shutdown")

    together(stream, lambda: toggle("command"), lambda: toggle("local"), shake, stop)
    platform.mode, lease.held = "up", True
    if end == "abandon":
        dispatcher.abandon("shutdown")
    assert dispatcher.drain(Deadline(GUARD))
    assert reporter.flush(Deadline(GUARD))
    until(lambda: dispatcher.overdue_names() == [])
    dispatcher.end_pool(Deadline(GUARD))
    timer.close()
    assert timer.join(Deadline(GUARD))
    assert reporter.close(Deadline(GUARD)) == []
    counts = dispatcher.counts
    assert (dispatcher.running, dispatcher.waiting, reporter.undelivered()) == (0, 0, [])
    assert counts.received == (counts.completed + counts.failed + counts.rejected + counts.released + counts.duplicates)
    answered = {task_id for task_id, bodies in platform.told.items() if bodies}
    # One that was given back may be delivered again, and then be answered.
    assert answered | platform.released == submitted
    assert all(len(bodies) == 1 for bodies in platform.told.values())
    assert max(runs.values(), default=0) <= 1
    assert set(runs) <= answered
    assert platform.problems == []
