"""The outbox in a worker's life: results survive a kill, and no handler runs twice for them."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, List

from sekuire import SekuireSDK, Worker

from ..conftest import AGENT
from ..scripted import GUARD, until

SCRIPT = """
import os, sys, threading
from sekuire import RuntimeCredentialsStore, create_worker
url, token, folder = sys.argv[1:4]
worker = create_worker(api_base_url=url, agent_id="agent-1", install_token=token, heartbeat_interval=0.2,
                       credentials_store=RuntimeCredentialsStore(path=folder + "/credentials.json"),
                       outbox=folder + "/outbox.db", reconnect_min=0.01, reconnect_max=0.05)

@worker.on_task("work")
def work(ctx, input):
    with open(folder + "/runs", "a") as runs:
        runs.write(ctx.task_id + "\\n")
    while not os.path.exists(folder + "/go-on"):
        if ctx.wait_cancelled(0.01):
            break
    return {"done": input["number"]}

worker.start(block=True)
"""


def stored(folder: Path) -> List[str]:
    """The tasks whose completion is in the outbox."""
    if not (folder / "outbox.db").exists():
        return []
    database = sqlite3.connect(folder / "outbox.db")
    try:
        return [row[0] for row in database.execute("SELECT task_id FROM completion ORDER BY task_id")]
    except sqlite3.OperationalError:
        return []
    finally:
        database.close()


def test_results_survive_a_kill(make_platform: Callable[..., Any], tmp_path: Path) -> None:
    """A result made while the platform was away is delivered by the next process; its handler does not run again."""
    platform = make_platform(path=tmp_path / "platform.db", redelivery_delay=0.0)
    token = platform.create_install_token(AGENT)
    command = [sys.executable, "-c", SCRIPT, platform.url, token, str(tmp_path)]
    ids = [platform.submit("work", {"number": number}, agent_id=AGENT) for number in range(3)]
    runs = tmp_path / "runs"
    with subprocess.Popen(command) as first:
        try:
            until(lambda: runs.exists() and len(runs.read_text().split()) == 3)
            platform.stop()
            (tmp_path / "go-on").touch()
            until(lambda: stored(tmp_path) == sorted(ids))
        finally:
            first.kill()
    platform.start()
    with subprocess.Popen(command) as second:
        try:
            tasks = [platform.wait(task_id, GUARD) for task_id in ids]
            assert [task["output"] for task in tasks] == [{"done": number} for number in range(3)]
            until(lambda: stored(tmp_path) == [])
            # The platform gives the killed worker's tasks to the new one; each is answered from the outbox.
            assert sorted(runs.read_text().split()) == sorted(ids)
        finally:
            second.terminate()
    assert second.returncode == 0


def test_results_leave_the_outbox_when_they_are_accepted(
    platform: Any, worker_of: Callable[..., Worker], tmp_path: Path
) -> None:
    """What the platform has taken is not kept, whatever the result was."""
    worker = worker_of(platform, outbox=tmp_path / "outbox.db")
    worker.on_task("work", lambda ctx, input: 1 / input)
    worker.start()
    for value in (1, 0):
        platform.wait(platform.submit("work", value, agent_id=AGENT), GUARD)
    worker.stop()
    assert stored(tmp_path) == []


def test_what_cannot_be_delivered_is_told_to_be_in_the_outbox(
    platform: Any, worker_of: Callable[..., Worker], tmp_path: Path, caplog: Any
) -> None:
    """A stop that leaves results undelivered names the outbox that keeps them."""
    worker = worker_of(platform, outbox=tmp_path / "outbox.db")

    @worker.on_task("work")
    def work(ctx: Any, input: Any) -> str:
        platform.stop()
        return "done"

    worker.start()
    task_id = platform.submit("work", {}, agent_id=AGENT)
    until(lambda: stored(tmp_path) == [task_id])
    worker.stop(1.0)
    assert f"{task_id}; they are in the outbox {tmp_path / 'outbox.db'}" in caplog.text
    assert stored(tmp_path) == [task_id]


def test_the_sdk_takes_it_from_the_environment(platform: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """SEKUIRE_OUTBOX is the outbox of every worker of the SDK, and is shared by them."""
    monkeypatch.setenv("SEKUIRE_API_URL", platform.url)
    monkeypatch.setenv("SEKUIRE_AGENT_ID", AGENT)
    monkeypatch.setenv("SEKUIRE_INSTALL_TOKEN", platform.create_install_token(AGENT))
    monkeypatch.setenv("SEKUIRE_OUTBOX", str(tmp_path / "outbox.db"))
    with SekuireSDK.from_env() as sdk:
        first, second = sdk.create_task_worker(), sdk.create_task_worker()
        assert first._outbox is not None
        assert first._outbox is second._outbox
    assert (tmp_path / "outbox.db").exists()


def test_a_restored_failure_does_not_answer_a_new_try(make_platform: Callable[..., Any], tmp_path: Path) -> None:
    """A retryable failure from the outbox is delivered once; the platform's next try of the task runs."""
    platform = make_platform(path=tmp_path / "platform.db", redelivery_delay=0.0)
    token = platform.create_install_token(AGENT)
    script = SCRIPT.replace(
        'return {"done": input["number"]}',
        'if ctx.attempt == 1: raise TaskError("flaky", "again", retryable=True)\n    return "fine"',
    ).replace("import RuntimeCredentialsStore,", "import TaskError, RuntimeCredentialsStore,")
    command = [sys.executable, "-c", script, platform.url, token, str(tmp_path)]
    task_id = platform.submit("work", {}, agent_id=AGENT, max_attempts=5)
    runs = tmp_path / "runs"
    with subprocess.Popen(command) as first:
        try:
            until(lambda: runs.exists() and runs.read_text())
            platform.stop()
            (tmp_path / "go-on").touch()
            until(lambda: stored(tmp_path) == [task_id])
        finally:
            first.kill()
    platform.start()
    with subprocess.Popen(command) as second:
        try:
            assert platform.wait(task_id, GUARD)["output"] == "fine"
        finally:
            second.terminate()
    assert runs.read_text().split() == [task_id, task_id]
