"""Processes around a worker: multiprocessing in handlers, objects over fork, spawn, and handlers that break things."""

from __future__ import annotations

import multiprocessing
import os
import threading
from typing import Any, Callable

import pytest

from sekuire import TaskContext, Worker

from ..conftest import AGENT
from ..support.scripted import Scripted
from ..support.servers import run_python
from ..support.waiting import GUARD, until

Make = Callable[..., Worker]

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork()")

PRELUDE = """
import logging, multiprocessing, os, sys, threading, time, warnings
from sekuire import Beacon, RuntimeCredentialsStore, SekuireSDK, create_worker
from sekuire.local import LocalPlatform
# What this test is about: Python 3.12 and later warn of a fork while threads run.
warnings.filterwarnings("ignore", category=DeprecationWarning)
folder = sys.argv[1]
"""


@needs_fork
def test_a_handler_that_forks(tmp_path: Any) -> None:
    """Handlers that use multiprocessing with fork, at once, get their results; the children leave the worker alone."""
    script = """
def square(number):
    return number * number

def main():
    context = multiprocessing.get_context("fork")
    with LocalPlatform() as platform:
        worker = create_worker(
            api_base_url=platform.url, agent_id="a", install_token=platform.create_install_token("a"),
            outbox=folder + "/outbox.db", heartbeat_interval=0.2,
            credentials_store=RuntimeCredentialsStore(path=folder + "/credentials.json"),
        )
        worker.on_task("work", lambda ctx, input: square_in_child(input))

        def square_in_child(number):
            receiver, sender = context.Pipe(False)
            child = context.Process(target=lambda: sender.send(square(number)))
            child.start()
            sender.close()
            result = receiver.recv()
            child.join(60)
            # Where another thread's start() reaped it in this moment, multiprocessing says None for an instant.
            while child.exitcode is None:
                time.sleep(0.001)
            assert child.exitcode == 0, child.exitcode
            return result

        with worker:
            ids = [platform.submit("work", number) for number in range(24)]
            assert [platform.wait(one, 60)["output"] for one in ids] == [number * number for number in range(24)]
            platform.drop_streams()
            assert platform.wait(platform.submit("work", 7), 60)["output"] == 49
        (installation,) = platform.installations()
        assert installation["status"] == "stopped"
    assert not [one.name for one in threading.enumerate() if one.name.startswith("sekuire-")]

main()
print("fine")
"""
    assert "fine" in run_python(PRELUDE + script, str(tmp_path), forks=True).stdout


@needs_fork
def test_objects_made_before_a_fork(tmp_path: Any) -> None:
    """As under gunicorn's preload: a Worker, Beacon or SDK of the parent says so in the child; new ones work there."""
    script = """
def main():
    with LocalPlatform() as platform:
        options = dict(api_base_url=platform.url, agent_id="a")
        beacon = Beacon("a", api_base_url=platform.url, install_token=platform.create_install_token("a"))
        sdk = SekuireSDK("a", api_base_url=platform.url, install_token=platform.create_install_token("a"))
        worker = create_worker(install_token=platform.create_install_token("a"), **options)
        worker.on_task("work", lambda ctx, input: "parent")
        children = []
        for name in ("b", "c"):
            token = platform.create_install_token(name)
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    for call in (worker.start, worker.stop, beacon.start, beacon.stop, sdk.start, sdk.shutdown):
                        try:
                            call()
                        except Exception as error:
                            assert "in the child" in str(error), error
                        else:
                            raise AssertionError(call)
                    own = create_worker(api_base_url=platform.url, agent_id=name, install_token=token)
                    own.on_task("work", lambda ctx, input: own.stop() or name)
                    own.start(block=True)
                    code = 0
                finally:
                    os._exit(code)
            children.append(child)
        for name, child in zip("bc", children):
            assert platform.wait(platform.submit("work", None, name), 60)["output"] == name
            assert os.waitpid(child, 0)[1] == 0
        with worker:
            assert platform.wait(platform.submit("work", None, "a"), 60)["output"] == "parent"
        sdk.shutdown()
        beacon.stop()

main()
print("fine")
"""
    assert "fine" in run_python(PRELUDE + script, str(tmp_path), forks=True).stdout


def work_in_a_process(url: str, token: str) -> None:
    """What a spawned process does: a worker of its own, until it is terminated by command."""
    from sekuire import create_worker

    worker = create_worker(api_base_url=url, agent_id=AGENT, install_token=token, heartbeat_interval=0.2)
    worker.on_task("work", lambda ctx, input: os.getpid())
    worker.start(block=True)


def test_a_spawned_process(platform: Any) -> None:
    """A worker in a process made by multiprocessing with spawn works and ends with the platform's terminate."""
    context = multiprocessing.get_context("spawn")
    child = context.Process(target=work_in_a_process, args=(platform.url, platform.create_install_token(AGENT)))
    child.start()
    try:
        assert platform.wait(platform.submit("work", None, AGENT), 60)["output"] == child.pid
        platform.command(platform.installations()[0]["installation_id"], "terminate")
        child.join(GUARD)
        assert child.exitcode == 0
    finally:
        child.kill()
        child.join()


def test_a_handler_that_spawns(platform: Any, worker_of: Make) -> None:
    """A handler may use processes that are spawned; the worker's own state is not carried over."""
    context = multiprocessing.get_context("spawn")
    worker = worker_of(platform)

    @worker.on_task("work")
    def work(ctx: TaskContext, input: Any) -> Any:
        with context.Pool(1) as pool:
            return pool.apply(pow, (input, 2))

    with worker:
        assert platform.wait(platform.submit("work", 12, AGENT), 60)["output"] == 144


def test_real_exhaustion_of_memory(scripted: Scripted, worker_of: Make) -> None:
    """A handler that asks for more memory than there is fails its task; the worker goes on."""
    worker = worker_of(scripted, max_workers=1)
    worker.on_task("greedy", lambda ctx, input: bytearray(1 << 62))
    worker.on_task("echo", lambda ctx, input: "fine")
    with worker:
        scripted.task("t1", "greedy")
        assert scripted.completion("t1")["error"]["message"].startswith("MemoryError")
        scripted.task("t2")
        assert scripted.completion("t2")["output"] == "fine"


def test_a_handler_that_raises_what_ends_programs(scripted: Scripted, worker_of: Make) -> None:
    """Neither a SystemExit nor a KeyboardInterrupt of a handler ends the worker's thread, its pool or the process."""
    threads = []

    def handler(ctx: TaskContext, input: Any) -> None:
        threads.append(threading.current_thread().name)
        raise (SystemExit if len(threads) % 2 else KeyboardInterrupt)

    worker = worker_of(scripted, max_workers=1)
    worker.on_task("echo", handler)
    with worker:
        for number in range(6):
            scripted.task(f"t{number}")
            assert scripted.completion(f"t{number}")["error"]["code"] == "handler_error"
        until(lambda: worker.stats().failed == 6)
    assert len(set(threads)) == 1
