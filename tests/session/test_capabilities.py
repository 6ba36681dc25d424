"""What the workers of an installation can do is published: at each start and stop, and until it has arrived."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any, Callable, List

import pytest

from sekuire import SekuireSDK, TaskContext, Worker

from ..conftest import AGENT
from ..support.scripted import Scripted
from ..support.waiting import GUARD, until

Make = Callable[..., Worker]


@dataclasses.dataclass
class Order:
    number: int


def order(ctx: TaskContext, input: Order) -> str:
    """Place an order."""
    return str(input.number)


def published(platform: Any) -> List[Any]:
    [installation] = platform.installations()
    info: List[Any] = installation["capability_info"]
    return info


def test_a_start_and_a_stop(platform: Any, worker_of: Make) -> None:
    """The platform has the schemas while the worker runs, and nothing when it has stopped."""
    worker = worker_of(platform, capabilities=["later"])
    worker.on_task("order", order)
    with worker:
        until(lambda: published(platform) != [], GUARD)
        assert published(platform) == sorted(worker.capability_info(), key=lambda one: str(one["name"]))
        assert published(platform)[1]["input_schema"]["required"] == ["number"]
    assert published(platform) == []


def test_two_workers_of_an_installation(platform: Any) -> None:
    """Their union is published, and of two that share a name the one that says more."""
    options = {"api_base_url": platform.url, "agent_id": AGENT, "heartbeat_interval": 0.2}
    with SekuireSDK(install_token=platform.create_install_token(AGENT), **options) as sdk:
        one, two = sdk.create_task_worker(capabilities=["order"]), sdk.create_task_worker()
        one.on_task("plain", lambda ctx, input: None)
        two.on_task("order", order)
        with one:
            until(lambda: published(platform) == [{"name": "order"}, {"name": "plain"}], GUARD)
            with two:
                until(lambda: "input_schema" in published(platform)[0], GUARD)
                assert [info["name"] for info in published(platform)] == ["order", "plain"]
            until(lambda: published(platform) == [{"name": "order"}, {"name": "plain"}], GUARD)


def test_a_transient_failure(scripted: Scripted, worker_of: Make) -> None:
    """It is sent again, the same; a worker whose platform has it sends it no more."""
    answers: List[Any] = [(503, {"error": "x"}), (502, b"<html>"), (200, b"")]
    done = threading.Event()

    def answer(request: Any) -> Any:
        if len(answers) == 1:
            done.set()
        return answers.pop(0) if answers else (200, {})

    scripted.on["capabilities"] = answer
    worker = worker_of(scripted)
    worker.on_task("order", order)
    with worker:
        assert done.wait(GUARD)
        scripted.end()
        until(lambda: scripted.count("stream") >= 2, GUARD)
    bodies = [one.json for one in scripted.of("capabilities")]
    assert bodies[0]["capabilities"][0]["description"] == "Place an order."
    assert bodies[1:3] == bodies[:1] * 2
    assert bodies[3:] == [{"capabilities": []}]


@pytest.mark.parametrize("status", [404, 405, 501])
def test_a_platform_without_it(scripted: Scripted, worker_of: Make, status: int, caplog: Any) -> None:
    """It is asked once, and nothing above debug is said."""
    scripted.on["capabilities"] = lambda request: (status, {"error": "not_found"})
    worker = worker_of(scripted)
    worker.on_task("order", order)
    with worker:
        until(lambda: not worker.installation.auth.support.is_offered("capabilities"), GUARD)
    assert scripted.count("capabilities") == 1
    assert "were not published" not in "".join(one.getMessage() for one in caplog.records if one.levelname != "DEBUG")


def test_a_refusal(scripted: Scripted, worker_of: Make) -> None:
    """What the platform refuses is not sent again."""
    refused = threading.Event()

    def refuse(request: Any) -> Any:
        refused.set()
        return 422, {"error": "invalid"}

    scripted.on["capabilities"] = refuse
    worker = worker_of(scripted)
    worker.on_task("order", order)
    with worker:
        assert refused.wait(GUARD)
        scripted.send("task", {"task_id": "t1", "capability": "order", "input": {"number": 1}})
        scripted.wait_for("complete")
    assert scripted.count("capabilities") == 1
