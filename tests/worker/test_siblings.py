"""Several workers of one agent share its tasks."""

from __future__ import annotations

import threading

from sekuire import create_worker
from sekuire.local import LocalPlatform


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
        installation = first._installation.store.current.installation_id
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
