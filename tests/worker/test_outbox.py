"""The outbox in a worker's life: results survive a kill, and no handler runs twice for them."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Callable, Iterator, List

import pytest

from sekuire import RuntimeCredentialsStore, SekuireSDK, TaskError, Worker
from sekuire._internal import delivery
from sekuire.worker import outbox as outbox_module
from sekuire.worker import outbox_file, report
from sekuire.worker.outbox import Outbox, Stored, open_outbox

from ..conftest import AGENT
from ..support.builders import task_of
from ..support.scripted import Scripted
from ..support.waiting import GUARD, until

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


@pytest.fixture
def opened_outbox(tmp_path: Path) -> Iterator[Callable[[], Outbox]]:
    """Return the outbox of the test's worker, which every call of open_outbox with its path returns."""
    with contextlib.ExitStack() as stack:
        yield lambda: stack.enter_context(contextlib.closing(open_outbox(tmp_path / "outbox.db")))


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


@pytest.mark.slow
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
        opened: List[Outbox] = []

        def noted(path: Any) -> Outbox:
            opened.append(open_outbox(path))
            return opened[-1]

        monkeypatch.setattr(outbox_module, "open_outbox", noted)
        sdk.create_task_worker()
        sdk.create_task_worker()
        first, second = opened
        assert first is second
    assert (tmp_path / "outbox.db").exists()


@pytest.mark.slow
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


# -- kill -9 at each stage --

#: Where the first process is killed: a line that makes it happen, and how often the handler may run then.
STAGES = {
    "in the handler": ("", 2),
    "before the result is on disk": ("before(Outbox, 'put')", 2),
    "when the result is on disk": ("after(Outbox, 'put')", 1),
    "before the POST": ("before(HttpClient, 'request', '/complete')", 1),
    "after the POST": ("after(HttpClient, 'request', '/complete')", 1),
    "before the result leaves the disk": ("before(Outbox, 'remove')", 1),
    "when the result has left the disk": ("after(Outbox, 'remove')", 1),
}

KILLER = """
import os, signal
from sekuire.worker.outbox import Outbox
from sekuire.transport.http import HttpClient

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def before(owner, name, path=""):
    real = getattr(owner, name)
    def call(*args, **options):
        if path in str(args):
            die()
        return real(*args, **options)
    setattr(owner, name, call)

def after(owner, name, path=""):
    real = getattr(owner, name)
    def call(*args, **options):
        result = real(*args, **options)
        if path in str(args):
            die()
        return result
    setattr(owner, name, call)
"""


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_kill_at_each_stage(make_platform: Callable[..., Any], tmp_path: Path, stage: str) -> None:
    """Killed at any stage of a task, the next process ends it: one accepted result, one run once it was on disk."""
    line, most_runs = STAGES[stage]
    platform = make_platform(path=tmp_path / "platform.db", redelivery_delay=0.0)
    token = platform.create_install_token(AGENT)
    script = SCRIPT if line else SCRIPT.replace('return {"done"', 'os.kill(os.getpid(), 9)\n    return {"done"')
    (tmp_path / "go-on").touch()
    task_id = platform.submit("work", {"number": 7}, agent_id=AGENT)
    arguments = [platform.url, token, str(tmp_path)]
    with subprocess.Popen([sys.executable, "-c", KILLER + line + script, *arguments]) as first:
        try:
            assert first.wait(60) == -signal.SIGKILL
        finally:
            first.kill()
    with subprocess.Popen([sys.executable, "-c", SCRIPT, *arguments]) as second:
        try:
            assert platform.wait(task_id, GUARD)["output"] == {"done": 7}
            until(lambda: stored(tmp_path) == [] and platform.streams())
        finally:
            second.terminate()
    assert second.returncode == 0
    assert len((tmp_path / "runs").read_text().split()) == most_runs
    accepted = {body["output"]["done"] for status, body in platform.completions(task_id) if status == 200}
    assert accepted == {7}


def test_a_new_installation_delivers_what_an_earlier_one_left(
    make_platform: Callable[..., Any], worker_of: Callable[..., Worker], tmp_path: Path
) -> None:
    """A result that the platform refuses to a new installation is sent again at once when the task is given to it."""
    platform = make_platform(path=tmp_path / "platform.db", redelivery_delay=0.5)
    runs: List[str] = []

    def worker() -> Worker:
        made = worker_of(platform, outbox=tmp_path / "outbox.db", shutdown_timeout=1.0)

        @made.on_task("work")
        def work(ctx: Any, input: Any) -> str:
            runs.append(ctx.task_id)
            platform.stop()
            return "done"

        return made

    first = worker()
    first.start()
    task_id = platform.submit("work", {}, agent_id=AGENT)
    until(lambda: stored(tmp_path) == [task_id])
    first.stop()
    platform.start()
    with worker():
        assert platform.wait(task_id, GUARD)["output"] == "done"
    assert runs == [task_id]
    assert [status for status, _ in platform.completions(task_id)][-1] == 200


def test_a_sibling_delivers_the_next_try_too(
    scripted: Scripted, worker_of: Callable[..., Worker], tmp_path: Path
) -> None:
    """A new try that comes to one worker while another delivers the failure before it gets that failure too."""
    go, sent = threading.Event(), threading.Event()

    def complete(request: Any) -> Any:
        sent.set()
        return (200, {}) if go.wait(GUARD) else (500, {})

    scripted.on["complete"] = complete
    options = {"outbox": tmp_path / "outbox.db", "heartbeat_interval": 30.0}
    first, second = worker_of(scripted, **options), worker_of(scripted, **options)

    def work(ctx: Any, input: Any) -> None:
        raise TaskError("busy", retryable=True)

    first.on_task("work", work)
    with first:
        scripted.task("t1", "work")
        assert sent.wait(GUARD)
        second._dispatcher.submit(task_of("t1", "work", attempt=2))
        assert second.stats().duplicates == 1
        go.set()
        until(lambda: [request.json["attempt"] for request in scripted.completions("t1")] == [1, 2])
        until(lambda: first.stats().undelivered == 0)


# -- a full disk --


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 400 KiB."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(path)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs the right to mount; test_a_limit_on_the_size_of_files needs none")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


def fill(disk: Path) -> Path:
    filler = disk / "filler"
    with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
        while True:
            file.write(b"x" * 1024)
    return filler


def test_a_full_disk(
    make_platform: Callable[..., Any],
    worker_of: Callable[..., Worker],
    small_disk: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """On a full disk results are delivered without the outbox, with one warning, and with it when there is room."""
    platform = make_platform(path=tmp_path / "platform.db")
    worker = worker_of(platform, outbox=small_disk / "outbox.db", shutdown_timeout=1.0)
    worker.on_task("work", lambda ctx, input: "y" * 50_000)
    down = threading.Event()

    @worker.on_task("last")
    def last(ctx: Any, input: Any) -> str:
        platform.stop()
        down.set()
        return "kept"

    with worker:
        filler = fill(small_disk)
        for _ in range(3):
            assert platform.wait(platform.submit("work", {}, AGENT), GUARD)["output"] == "y" * 50_000
        assert sum("cannot be written" in record.getMessage() for record in caplog.records) == 1
        filler.unlink()
        task_id = platform.submit("last", {}, AGENT)
        assert down.wait(GUARD)
        until(lambda: stored(small_disk) == [task_id])


def test_a_disk_that_is_full_at_the_start(
    make_platform: Callable[..., Any],
    worker_of: Callable[..., Worker],
    small_disk: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A worker whose disk is full when it starts delivers what its outbox holds, and works."""
    platform = make_platform(path=tmp_path / "platform.db", redelivery_delay=0.0)
    store = RuntimeCredentialsStore()

    def worker() -> Worker:
        made = worker_of(
            platform,
            outbox=small_disk / "outbox.db",
            shutdown_timeout=1.0,
            credentials_store=store,
            install_token=platform.create_install_token(AGENT),
        )

        @made.on_task("work")
        def work(ctx: Any, input: Any) -> str:
            if input == "first":
                platform.stop()
            return "done"

        return made

    first = worker()
    first.start()
    task_id = platform.submit("work", "first", AGENT)
    until(lambda: stored(small_disk) == [task_id])
    first.stop()
    platform.start()
    fill(small_disk)
    with worker():
        assert platform.wait(task_id, GUARD)["output"] == "done"
        assert platform.wait(platform.submit("work", "second", AGENT), GUARD)["output"] == "done"
    assert sum("cannot be written" in record.getMessage() for record in caplog.records) == 1


def test_a_next_try_while_the_last_result_leaves_the_disk(
    scripted: Scripted,
    worker_of: Callable[..., Worker],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    opened_outbox: Callable[[], Outbox],
) -> None:
    """A new try that waits for room while the failure before it is taken off the disk is run, not taken for known."""
    worker = worker_of(scripted, outbox=tmp_path / "outbox.db", max_workers=1, max_queued=0)
    runs: List[int] = []

    @worker.on_task("work")
    def work(ctx: Any, input: Any) -> str:
        runs.append(ctx.attempt)
        if ctx.attempt == 1:
            raise TaskError("busy", retryable=True)
        return "done"

    outbox = opened_outbox()
    remove = outbox.remove

    def slow_remove(*args: Any) -> None:
        if len(runs) == 1:
            scripted.task("t1", "work", attempt=2)
            # The handler's thread is here, so the task waits.
            until(lambda: worker.stats().waiting or worker.stats().duplicates)
        remove(*args)

    monkeypatch.setattr(outbox, "remove", slow_remove)
    with worker:
        scripted.task("t1", "work")
        until(lambda: [request.json["attempt"] for request in scripted.completions("t1")] == [1, 2])
        until(lambda: stored(tmp_path) == [])
    assert runs == [1, 2]


# -- a platform that takes calls and does not answer --


@pytest.fixture
def silent(scripted: Scripted) -> Iterator[threading.Event]:
    """The platform answers no result until this is set."""
    answer = threading.Event()
    scripted.on["complete"] = lambda request: (200, {}) if answer.wait(GUARD) else (500, {})
    yield answer
    answer.set()


def told(caplog: pytest.LogCaptureFixture) -> List[str]:
    """What the log says of undelivered results."""
    return [one.getMessage() for one in caplog.records if "were not delivered before the stop" in one.getMessage()]


def test_results_of_an_executor_do_not_wait_for_the_platform(
    scripted: Scripted, worker_of: Callable[..., Worker], tmp_path: Path, silent: threading.Event
) -> None:
    """What handlers gave in an executor's threads is on disk although every thread that sends waits for an answer."""
    ids = [f"t{number}" for number in range(10)]
    with concurrent.futures.ThreadPoolExecutor(len(ids)) as pool:
        # Nobody gives up waiting, and comes to the next one by that.
        worker = worker_of(
            scripted, outbox=tmp_path / "outbox.db", executor=pool, max_workers=len(ids), read_timeout=3 * GUARD
        )
        worker.on_task("work", lambda ctx, input: "precious")
        with worker:
            for task_id in ids:
                scripted.task(task_id, "work")
            until(lambda: worker.stats().undelivered == len(ids))
            until(lambda: stored(tmp_path) == ids)
            silent.set()
            until(lambda: worker.stats().undelivered == 0)
            until(lambda: stored(tmp_path) == [])


@pytest.mark.parametrize("kind", ["timeout", "refusal"])
def test_a_stop_keeps_what_was_never_sent(
    scripted: Scripted,
    worker_of: Callable[..., Worker],
    tmp_path: Path,
    silent: threading.Event,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    kind: str,
) -> None:
    """Answers in memory, behind others that are under way, are in the outbox when the stop says so; none is lost."""
    monkeypatch.setattr("sekuire.worker.shutdown._FLUSH_LEAST", 0.05)
    ids = [f"t{number}" for number in range(10)]
    worker = worker_of(scripted, outbox=tmp_path / "outbox.db", max_workers=len(ids))

    @worker.on_task("work", timeout=0.01)
    def work(ctx: Any, input: Any) -> None:
        ctx.wait_cancelled(GUARD)

    worker.start()
    for task_id in ids:
        scripted.task(task_id, "work" if kind == "timeout" else "unknown")
    until(lambda: worker.stats().undelivered == len(ids))
    scripted.wait_for("complete", delivery.MAX_THREADS)
    worker.stop(0)
    assert worker.wait(GUARD)
    assert stored(tmp_path) == ids
    (message,) = told(caplog)
    assert message.startswith("the results of 10 tasks were not delivered before the stop: ")
    assert message.endswith(f"; they are in the outbox {tmp_path / 'outbox.db'}")
    silent.set()
    second = worker_of(scripted, outbox=tmp_path / "outbox.db")
    second.on_task("work", work)
    with second:
        until(lambda: stored(tmp_path) == [])
    assert {request.task_id for request in scripted.of("complete")} == set(ids)


def test_a_stop_tells_what_the_outbox_lacks(
    scripted: Scripted,
    worker_of: Callable[..., Worker],
    tmp_path: Path,
    silent: threading.Event,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    opened_outbox: Callable[[], Outbox],
) -> None:
    """Results that the disk takes no more are not told to be there."""
    monkeypatch.setattr("sekuire.worker.shutdown._FLUSH_LEAST", 0.05)
    worker = worker_of(scripted, outbox=tmp_path / "outbox.db", max_workers=1)
    worker.on_task("work", lambda ctx, input: "precious")
    outbox = opened_outbox()
    worker.start()
    scripted.task("t1", "work")
    scripted.wait_for("complete")
    assert stored(tmp_path) == ["t1"]
    commit = outbox.file.commit
    monkeypatch.setattr(
        outbox.file, "commit", lambda puts, removals: "disk is full" if puts else commit(puts, removals)
    )
    scripted.task("t2", "unknown")
    until(lambda: worker.stats().undelivered == 2)
    worker.stop(0)
    assert worker.wait(GUARD)
    assert stored(tmp_path) == ["t1"]
    start, path = "the results of 1 tasks were not delivered before the stop: ", tmp_path / "outbox.db"
    assert told(caplog) == [
        f"{start}t1; they are in the outbox {path}",
        f"{start}t2 and are lost: the outbox {path} lacks them",
    ]


def test_a_result_that_is_accepted_while_a_stop_keeps_it(
    scripted: Scripted,
    worker_of: Callable[..., Worker],
    tmp_path: Path,
    silent: threading.Event,
    monkeypatch: pytest.MonkeyPatch,
    opened_outbox: Callable[[], Outbox],
) -> None:
    """The answer comes between the look at what is undelivered and the disk: no row stays behind."""
    worker = worker_of(scripted, outbox=tmp_path / "outbox.db")
    worker.on_task("work", lambda ctx, input: "precious")
    outbox, reporter = opened_outbox(), worker._reporter
    put, put_all = outbox.put, outbox.put_all
    # Not on disk before it is sent, as with a disk that was full then.
    monkeypatch.setattr(outbox, "put", lambda *args: False)

    def late(*args: Any) -> bool:
        silent.set()
        until(lambda: worker.stats().undelivered == 0)
        return put_all(*args)

    monkeypatch.setattr(outbox, "put_all", late)
    with worker:
        scripted.task("t1", "work")
        scripted.wait_for("complete")
        assert reporter.keep_all() == []
        assert stored(tmp_path) == []
        monkeypatch.setattr(outbox, "put", put)


def test_a_higher_attempt_while_a_stop_keeps_the_result(
    scripted: Scripted,
    worker_of: Callable[..., Worker],
    tmp_path: Path,
    silent: threading.Event,
    monkeypatch: pytest.MonkeyPatch,
    opened_outbox: Callable[[], Outbox],
) -> None:
    """An attempt that comes while the result is written is what the outbox has of it at the end."""
    worker = worker_of(scripted, outbox=tmp_path / "outbox.db")
    worker.on_task("work", lambda ctx, input: "precious")
    outbox, reporter = opened_outbox(), worker._reporter
    monkeypatch.setattr(outbox, "put", lambda *args: False)
    put_all = outbox.put_all
    seen: List[int] = []

    def raised(*args: Any) -> bool:
        seen.append(args[3][0].attempt)
        if len(seen) == 1:
            assert reporter.redelivered("t1", 7)
        return put_all(*args)

    monkeypatch.setattr(outbox, "put_all", raised)
    with worker:
        scripted.task("t1", "work")
        scripted.wait_for("complete")
        assert reporter.keep_all() == []
        assert seen == [1, 7]
        with contextlib.closing(sqlite3.connect(tmp_path / "outbox.db")) as database:
            assert database.execute("SELECT task_id, attempt FROM completion").fetchall() == [("t1", 7)]
        silent.set()


# -- a file that others delete, copy or hold --


@pytest.fixture
def quick_upkeep(monkeypatch: pytest.MonkeyPatch) -> None:
    """The outbox is looked at often."""
    monkeypatch.setattr(report, "SWEEP", 0.05)
    monkeypatch.setattr(report, "UPKEEP", 0.05)


def kept(folder: Path) -> List[str]:
    """The tasks in the outbox of this folder, read from a copy of the file alone."""
    copy = folder / "copy"
    copy.mkdir(exist_ok=True)
    if not (folder / "outbox.db").exists():
        return []
    shutil.copy(folder / "outbox.db", copy / "outbox.db")
    return stored(copy)


@pytest.mark.usefixtures("quick_upkeep")
@pytest.mark.skipif(os.name != "posix", reason="elsewhere an open file cannot be deleted")
def test_an_outbox_that_is_deleted_while_results_wait(
    scripted: Scripted, worker_of: Callable[..., Worker], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What is undelivered is written again, although no new result comes; the next process finds it."""
    scripted.on["complete"] = lambda request: (503, {})
    worker = worker_of(scripted, outbox=tmp_path / "outbox.db", shutdown_timeout=1.0)
    worker.on_task("work", lambda ctx, input: "precious")
    worker.start()
    for task_id in ("t1", "t2"):
        scripted.task(task_id, "work")
    until(lambda: kept(tmp_path) == ["t1", "t2"])
    for path in tmp_path.glob("outbox.db*"):
        path.unlink()
    until(lambda: kept(tmp_path) == ["t1", "t2"])
    # And if that happens right before the stop.
    scripted.task("t3", "work")
    until(lambda: kept(tmp_path) == ["t1", "t2", "t3"])
    for path in tmp_path.glob("outbox.db*"):
        path.unlink()
    worker.stop(1.0)
    assert stored(tmp_path) == ["t1", "t2", "t3"]
    assert "they are in the outbox" in caplog.text
    del scripted.on["complete"]
    second = worker_of(scripted, outbox=tmp_path / "outbox.db")
    second.on_task("work", lambda ctx, input: "again")
    with second:
        until(lambda: stored(tmp_path) == [])
    assert [one.json["output"] for one in scripted.completions("t3")][-1] == "precious"


@pytest.mark.usefixtures("quick_upkeep")
@pytest.mark.skipif(os.name != "posix", reason="elsewhere an open file cannot be replaced")
def test_an_outbox_that_is_replaced_by_a_backup(
    scripted: Scripted, worker_of: Callable[..., Worker], tmp_path: Path
) -> None:
    """What it holds is delivered, what was delivered already leaves it, and what is undelivered goes into it."""
    path = tmp_path / "outbox.db"
    scripted.on["complete"] = lambda request: (503, {})
    worker = worker_of(scripted, outbox=path, shutdown_timeout=1.0)
    worker.on_task("work", lambda ctx, input: input)
    with worker:
        for task_id in ("t1", "t2"):
            scripted.task(task_id, "work", "first")
        until(lambda: kept(tmp_path) == ["t1", "t2"])
        with contextlib.closing(sqlite3.connect(tmp_path / "copy" / "outbox.db")) as database, database:
            database.execute(
                "INSERT INTO completion SELECT api_url, agent_id, 'lost', installation_id, attempt, substituted, "
                "replace(body, 't1', 'lost'), stored_at FROM completion WHERE task_id = 't1'"
            )
        scripted.on["complete"] = lambda request: (200, {}) if request.task_id != "t3" else (503, {})
        until(lambda: stored(tmp_path) == [])
        scripted.task("t3", "work", "third")
        until(lambda: stored(tmp_path) == ["t3"])
        (tmp_path / "copy" / "outbox.db").chmod(0o600)
        os.replace(tmp_path / "copy" / "outbox.db", path)
        until(lambda: scripted.completions("lost"))
        until(lambda: stored(tmp_path) == ["t3"])
        assert worker.stats().undelivered == 1


@pytest.mark.usefixtures("quick_upkeep")
def test_an_outbox_that_another_program_holds(
    scripted: Scripted,
    worker_of: Callable[..., Worker],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Results are delivered without it, with one warning; when it is free, what is undelivered goes into it."""
    monkeypatch.setattr(outbox_file, "BUSY_WAIT", 0.1)
    worker = worker_of(scripted, outbox=tmp_path / "outbox.db", shutdown_timeout=1.0, max_workers=4)
    worker.on_task("work", lambda ctx, input: "precious")
    with worker:
        until(worker.is_connected)
        scripted.on["complete"] = lambda request: (503, {}) if request.task_id == "stays" else (200, {})
        with contextlib.closing(sqlite3.connect(tmp_path / "outbox.db", isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            for task_id in ("t1", "t2", "stays", "t3"):
                scripted.task(task_id, "work")
            for task_id in ("t1", "t2", "t3"):
                assert scripted.completion(task_id)["output"] == "precious"
            until(lambda: scripted.completions("stays"))
            assert stored(tmp_path) == []
            other.execute("ROLLBACK")
        until(lambda: stored(tmp_path) == ["stays"])
    assert sum("is locked" in one.getMessage() for one in caplog.records) == 1


@pytest.mark.usefixtures("quick_upkeep")
def test_an_outbox_that_another_program_holds_at_the_start(
    scripted: Scripted, worker_of: Callable[..., Worker], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker starts without it. What an earlier process left is delivered when it is free."""
    monkeypatch.setattr(outbox_file, "BUSY_WAIT", 0.1)
    scripted.on["complete"] = lambda request: (503, {})
    first = worker_of(scripted, outbox=tmp_path / "outbox.db", shutdown_timeout=0.5)
    first.on_task("work", lambda ctx, input: "precious")
    with first:
        scripted.task("t1", "work")
        until(lambda: stored(tmp_path) == ["t1"])
    del scripted.on["complete"]
    before = len(scripted.completions("t1"))
    with contextlib.closing(sqlite3.connect(tmp_path / "outbox.db", isolation_level=None)) as other:
        other.execute("PRAGMA locking_mode = EXCLUSIVE")
        other.execute("BEGIN EXCLUSIVE")
        worker = worker_of(scripted, outbox=tmp_path / "outbox.db")
        worker.on_task("work", lambda ctx, input: "again")
        worker.start()
        until(worker.is_connected)
        assert len(scripted.completions("t1")) == before
        other.execute("ROLLBACK")
    until(lambda: len(scripted.completions("t1")) > before)
    until(lambda: stored(tmp_path) == [])


@pytest.mark.usefixtures("quick_upkeep")
def test_what_an_earlier_process_left_waits_for_the_login(
    scripted: Scripted, worker_of: Callable[..., Worker], tmp_path: Path
) -> None:
    """A look at the file while the platform does not let the worker in claims nothing."""
    with contextlib.closing(open_outbox(tmp_path / "outbox.db")) as outbox:
        outbox.put(scripted.url, AGENT, None, Stored("t1", 1, False, b'{"task_id":"t1","status":"completed"'))
    scripted.on["bootstrap"] = lambda request: (503, {})
    worker = worker_of(scripted, outbox=tmp_path / "outbox.db", start_timeout=0.01)
    worker.on_task("work", lambda ctx, input: "again")
    with worker:
        scripted.wait_for("bootstrap", 3)
        assert worker.stats().undelivered == 0
        del scripted.on["bootstrap"]
        until(lambda: stored(tmp_path) == [])


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_a_copy_of_the_file_alone(make_platform: Callable[..., Any], tmp_path: Path) -> None:
    """A result that was not delivered is in the file itself: who has nothing else after a kill delivers it."""
    platform = make_platform(path=tmp_path / "platform.db", redelivery_delay=0.0)
    token = platform.create_install_token(AGENT)
    command = [sys.executable, "-c", SCRIPT, platform.url, token, str(tmp_path)]
    task_id = platform.submit("work", {"number": 1}, agent_id=AGENT)
    with subprocess.Popen(command) as first:
        try:
            until((tmp_path / "runs").exists)
            platform.stop()
            (tmp_path / "go-on").touch()
            until(lambda: kept(tmp_path) == [task_id])
        finally:
            first.kill()
    for suffix in ("-wal", "-shm", ".lock"):
        (tmp_path / f"outbox.db{suffix}").unlink()
    platform.start()
    with subprocess.Popen(command) as second:
        try:
            assert platform.wait(task_id, GUARD)["output"] == {"done": 1}
        finally:
            second.terminate()
    assert (tmp_path / "runs").read_text().split() == [task_id]
