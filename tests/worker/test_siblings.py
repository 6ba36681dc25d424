"""Several workers of one agent share its tasks."""

from __future__ import annotations

import threading
from typing import Any, Callable, List, Tuple

import pytest

from sekuire import RuntimeCredentials, RuntimeCredentialsStore, TaskContext, Worker, create_worker
from sekuire._internal.single_flight import Flight
from sekuire._internal.threads import is_owned_by
from sekuire.errors import AuthenticationError, SekuireError
from sekuire.local import LocalPlatform

from ..support.scripted import Scripted
from ..support.waiting import GUARD, until


def test_a_draining_worker_keeps_what_it_runs() -> None:
    """A task that runs when its worker stops is not given to a sibling, however long the drain takes."""
    began, go_on = threading.Event(), threading.Event()
    runs = []
    with LocalPlatform(redelivery_delay=0.2) as platform:

        def build(name: str):  # type: ignore[no-untyped-def]
            worker = create_worker(
                api_base_url=platform.url,
                agent_id="agent",
                install_token=platform.create_install_token("agent"),
                heartbeat_interval=0.2,
            )

            @worker.on_task("work")
            def work(ctx, input):  # type: ignore[no-untyped-def]
                runs.append(name)
                began.set()
                assert go_on.wait(60)
                return name

            return worker

        first = build("first")
        first.start()
        task_id = platform.submit("work", {}, agent_id="agent")
        assert began.wait(30)
        second = build("second")
        second.start()
        stopper = threading.Thread(target=first.stop)
        stopper.start()
        # Several times the delay after which a vanished worker's tasks are given away, counted in its heartbeats.
        installation = first.installation.store.current.installation_id
        seen = len(platform.heartbeats(installation))
        guard = threading.Event()
        while len(platform.heartbeats(installation)) < seen + 6:
            assert not guard.wait(0.05)
        assert runs == ["first"]
        go_on.set()
        stopper.join(30)
        assert platform.wait(task_id, 30)["output"] == "first"
        assert runs == ["first"]
        second.stop()


def test_a_sibling_with_other_ways_outlives_a_refusal(
    scripted: Scripted, worker_of: Callable[..., Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workers share a store: the refusal that ends the one without an install token does not end the other."""
    entered, release = threading.Event(), threading.Event()
    given = RuntimeCredentials(installation_id="inst-1", runtime_token="rt-dead", refresh_token="rf-dead")
    store = RuntimeCredentialsStore(given)

    def refresh(request: Any) -> Any:
        entered.set()
        assert release.wait(GUARD)
        return 401, {"error": "dead"}

    def stream(request: Any) -> Any:
        if request.headers["Authorization"].endswith("rt-dead"):
            return 401, {"error": "expired"}
        return scripted.stream(request)

    # Heartbeats are taken, so that the streams alone renew.
    scripted.on.update(refresh=refresh, stream=stream)
    poor = worker_of(scripted, credentials_store=store)
    rich = worker_of(scripted, credentials_store=store, install_token="skt-1")
    problems: List[BaseException] = []
    joined = threading.Event()
    wait = Flight.wait

    def noted(flight: Flight[Any], seconds: float) -> bool:
        if is_owned_by(rich):
            joined.set()
        return wait(flight, seconds)

    monkeypatch.setattr(Flight, "wait", noted)

    def start(worker: Worker) -> None:
        worker.on_task("work", lambda ctx, input: "done")
        try:
            worker.start()
        except SekuireError as error:
            problems.append(error)

    threads = [threading.Thread(target=start, args=(worker,), daemon=True) for worker in (poor, rich)]
    threads[0].start()
    assert entered.wait(GUARD)
    threads[1].start()

    assert joined.wait(GUARD)
    release.set()
    for thread in threads:
        thread.join(GUARD)
    assert [type(error) for error in problems] == [AuthenticationError]
    assert rich.is_connected()
    scripted.task("t1", "work")
    assert scripted.completion("t1")["output"] == "done"
    assert scripted.count("bootstrap") == 1


def worker_on(platform: LocalPlatform, name: str, runs: List[Tuple[str, Any]], **options: Any) -> Worker:
    """A worker of an installation of its own, that notes what it runs and holds tasks whose input is ``"hold"``."""
    worker = create_worker(
        api_base_url=platform.url,
        agent_id="agent",
        install_token=platform.create_install_token("agent"),
        heartbeat_interval=0.1,
        **options,
    )

    @worker.on_task("work")
    def work(ctx: TaskContext, input: Any) -> str:
        runs.append((name, input))
        if input == "hold":
            ctx.wait_cancelled(60)
        return name

    return worker


def test_a_paused_worker_leaves_its_share_to_a_sibling(platform: Any) -> None:
    """Once the platform knows that a worker is paused, its sibling gets all tasks; resumed, it gets some again."""
    runs: List[Tuple[str, Any]] = []
    first, second = worker_on(platform, "first", runs), worker_on(platform, "second", runs)
    with first, second:
        first.pause("for lunch")
        installation = first.installation.store.current.installation_id
        until(lambda: platform.heartbeats(installation)[-1]["status"] == "paused")
        for number in range(20):
            task = platform.wait(platform.submit("work", number, "agent"), GUARD)
            assert task["output"] == "second"
        assert first.stats().rejected == 0
        first.resume()
        until(lambda: platform.wait(platform.submit("work", "again", "agent"), GUARD)["output"] == "first")


def test_a_full_worker_leaves_the_rest_to_a_sibling(platform: Any) -> None:
    """Tasks above what a worker takes are not stuck behind it: its sibling runs them."""
    runs: List[Tuple[str, Any]] = []
    first = worker_on(platform, "first", runs, max_workers=1, max_queued=0)
    second = worker_on(platform, "second", runs)
    with first:
        held = platform.submit("work", "hold", "agent")
        until(lambda: runs == [("first", "hold")])
        with second:
            for number in range(20):
                assert platform.wait(platform.submit("work", number, "agent"), GUARD)["output"] == "second"
        assert platform.task(held)["status"] == "assigned"
        first.stop(0.1)


def test_a_drained_worker_gives_its_queue_to_a_sibling(platform: Any) -> None:
    """What a worker that stops has not begun is run by its sibling; nothing is lost and nothing runs twice."""
    runs: List[Tuple[str, Any]] = []
    first = worker_on(platform, "first", runs, max_workers=1, max_queued=10)
    second = worker_on(platform, "second", runs)
    with first:
        held = platform.submit("work", "hold", "agent")
        until(lambda: runs == [("first", "hold")])
        ids = [platform.submit("work", number, "agent") for number in range(5)]
        until(lambda: first.stats().waiting == 5)
        with second:
            first.stop(0.5)
            for task_id in ids:
                assert platform.wait(task_id, GUARD)["output"] == "second"
        assert platform.wait(held, GUARD)["error"]["code"] == "worker_shutdown"
    assert sorted(runs, key=str) == sorted([("first", "hold"), *(("second", n) for n in range(5))], key=str)
