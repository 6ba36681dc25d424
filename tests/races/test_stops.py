"""Every stop from every state. The suite takes a third of the pairs; ``SEKUIRE_RACES=1`` takes all."""

from __future__ import annotations

import os
import threading
from typing import Any, Callable, Dict, Iterator, List, Tuple

import pytest

from sekuire import TaskContext, Worker
from sekuire.errors import SekuireError

from ..support.scripted import Request, Scripted
from ..support.waiting import GUARD, client_threads, until

Make = Callable[..., Worker]

pytestmark = pytest.mark.usefixtures("fast_switch")


class World:
    """A platform and a worker that is brought into a state and then stopped."""

    def __init__(self, scripted: Scripted, make: Make) -> None:
        self.scripted = scripted
        self.go = threading.Event()
        self.begun = threading.Event()
        self.heard = threading.Event()
        self.threads: List[threading.Thread] = []
        self.sent: List[str] = []
        self.answer: Dict[str, Any] = {}
        scripted.on["heartbeat"] = lambda request: (200, dict(self.answer))
        self.worker = make(
            scripted,
            max_workers=1,
            max_queued=2,
            start_timeout=0.01,
            heartbeat_interval=0.02,
            shutdown_timeout=0.5,
            read_timeout=GUARD,
        )
        self.in_handler: Callable[[], None] = lambda: None
        self.in_callback: Callable[[], None] = self.heard.set

        @self.worker.on_task("echo")
        def handler(ctx: TaskContext, input: Any) -> str:
            self.begun.set()
            while not (self.go.is_set() or ctx.wait_cancelled(0.002)):
                pass
            self.in_handler()
            return "done"

        self.worker.on_command(lambda command: self.in_callback())

    def hold(self, name: str) -> None:
        """Answer a request only at the end of the test, and nothing then."""
        reached = threading.Event()

        def wait(request: Request) -> None:
            reached.set()
            assert self.go.wait(3 * GUARD)

        self.scripted.on[name] = wait
        self.worker.start()
        assert reached.wait(GUARD)

    def connect(self) -> None:
        self.worker.start()
        assert self.worker.wait_until_connected(GUARD)

    def task(self) -> None:
        self.sent.append(f"t{len(self.sent)}")
        self.scripted.task(self.sent[-1])

    def run(self) -> None:
        self.connect()
        self.task()
        assert self.begun.wait(GUARD)

    def apart(self, action: Callable[[], object]) -> None:
        thread = threading.Thread(target=action, daemon=True)
        self.threads.append(thread)
        thread.start()

    def is_stopping(self) -> bool:
        return self.worker.stop_reason is not None


# -- the states -------------------------------------------------------------------------------------------------------


def new(world: World) -> None: ...


def logging_in(world: World) -> None:
    world.hold("bootstrap")


def connecting(world: World) -> None:
    world.hold("stream")


def idle(world: World) -> None:
    world.connect()


def running(world: World) -> None:
    world.run()


def waiting(world: World) -> None:
    world.run()
    world.task()
    world.task()
    until(lambda: world.worker.stats().waiting == 2)


def paused(world: World) -> None:
    world.run()
    world.worker.pause("for the test")
    world.task()


def backing_off(world: World) -> None:
    world.scripted.on["stream"] = lambda request: (503, {}, {"Retry-After": "300"})
    world.worker.start()
    world.scripted.wait_for("stream")


def draining(world: World) -> None:
    waiting(world)
    world.apart(lambda: world.worker.stop(0.5))
    until(world.is_stopping)


def terminated(world: World) -> None:
    waiting(world)
    world.scripted.command("terminate")
    until(world.is_stopping)


def revoked(world: World) -> None:
    waiting(world)
    world.answer = {"revoked": True, "reason": "over", "shutdown_timeout_ms": 500}
    until(world.is_stopping)


def stopped(world: World) -> None:
    world.connect()
    world.worker.stop()


# -- the stops --------------------------------------------------------------------------------------------------------


def stop(world: World) -> None:
    world.worker.stop()


def stop_at_once(world: World) -> None:
    world.worker.stop(0)


def stop_twice_at_once(world: World) -> None:
    world.apart(world.worker.stop)
    world.apart(lambda: world.worker.stop(0.2))


def stop_then_hurry(world: World) -> None:
    world.apart(lambda: world.worker.stop(GUARD))
    world.worker.stop(0)


def terminate(world: World) -> None:
    """By both ways; where neither reaches the worker any more, or yet, it is stopped."""
    world.answer = {"desired_state": "terminated"}
    if world.worker.is_connected():
        world.scripted.command("terminate", shutdown_timeout_ms=300)
    _unless_told(world)


def revoke(world: World) -> None:
    world.answer = {"revoked": True, "reason": "over", "shutdown_timeout_ms": 300}
    _unless_told(world)


def stop_in_a_handler(world: World) -> None:
    world.in_handler = world.worker.stop
    world.go.set()
    _unless_told(world)


def stop_in_a_callback(world: World) -> None:
    def callback() -> None:
        world.worker.stop()
        world.heard.set()

    world.in_callback = callback
    if world.worker.is_connected():
        world.scripted.command("pause")
    _unless_told(world)


def _unless_told(world: World) -> None:
    """Wait for the worker to hear of it where it can; else stop it, as its user would."""
    if world.worker.is_connected() and world.worker.stop_reason is None:
        world.go.set() if world.in_handler == world.worker.stop else None
        if world.begun.is_set() or world.in_handler != world.worker.stop:
            until(world.is_stopping)
    if world.worker.stop_reason is None:
        world.worker.stop()


STATES = (
    new,
    logging_in,
    connecting,
    idle,
    running,
    waiting,
    paused,
    backing_off,
    draining,
    terminated,
    revoked,
    stopped,
)
STOPS = (
    stop, stop_at_once, stop_twice_at_once, stop_then_hurry, terminate, revoke, stop_in_a_handler, stop_in_a_callback,
)  # fmt: skip
Pair = Tuple[Callable[[World], None], Callable[[World], None]]


def pairs() -> Iterator[Pair]:
    for at, state in enumerate(STATES):
        for number, way in enumerate(STOPS):
            if os.environ.get("SEKUIRE_RACES") or (at + number) % 3 == 0:
                yield state, way


@pytest.mark.parametrize(
    ("state", "way"), [pytest.param(*pair, id=f"{pair[0].__name__}-{pair[1].__name__}") for pair in pairs()]
)
def test_every_stop_from_every_state(
    state: Callable[[World], None], way: Callable[[World], None], scripted: Scripted, worker_of: Make
) -> None:
    """It ends, in its time, with each task answered or given back once, no thread left, and no second start."""
    before = client_threads()
    world = World(scripted, worker_of)
    worker = world.worker
    try:
        state(world)
        way(world)
        assert worker.wait(GUARD)
    finally:
        world.go.set()
    for thread in world.threads:
        thread.join(GUARD)
        assert not thread.is_alive()
    assert not worker.is_running()
    assert not worker.is_connected()
    worker.stop()
    with pytest.raises(SekuireError, match="this worker is stopped"):
        worker.start()
    until(lambda: set(client_threads()) <= set(before))
    stats = worker.stats()
    assert (stats.running, stats.waiting, stats.overdue) == (0, 0, 0)
    assert stats.received == stats.completed + stats.failed + stats.rejected + stats.released + stats.duplicates
    told = [request.task_id for name in ("complete", "release") for request in scripted.of(name)]
    assert len(told) == len(set(told)), "a task was told of twice"
    assert len(told) == stats.received
    statuses = [request.json["status"] for request in scripted.of("heartbeat")]
    assert statuses.count("stopped") <= 1
    if statuses and stats.last_heartbeat_at is not None:
        assert statuses[-1] == "stopped"
