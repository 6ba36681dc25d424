"""Processes: signals, the end of the interpreter, fork."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any, Callable, Iterator, List

import pytest

from sekuire._internal.signals import SECOND_AFTER

from ..conftest import AGENT
from ..support.scripted import Blackhole, Scripted
from ..support.waiting import GUARD, until

posix = pytest.mark.skipif(os.name != "posix", reason="sends POSIX signals")
# Each runs a program.
pytestmark = pytest.mark.slow

PRELUDE = """
import logging, os, signal, sys, threading, time
from sekuire import create_worker
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s %(message)s")
url, token = sys.argv[1:3]
worker = create_worker(api_base_url=url, agent_id="agent-1", install_token=token, heartbeat_interval=0.2,
                       max_workers=1, shutdown_timeout=30.0, reconnect_min=0.01, reconnect_max=0.05)
begun = threading.Event()

@worker.on_task("echo")
def echo(ctx, input):
    begun.set()
    print("begun", flush=True)
    while not os.path.exists(input["until"]):
        if ctx.wait_cancelled(0.01):
            print("cancelled:", ctx.cancel_reason, flush=True)
            return "cancelled"
    return "finished"

@worker.on_task("hang")
def hang(ctx, input):
    print("begun", flush=True)
    threading.Event().wait()
"""


class Process:
    """A Python process; what it prints is read as it comes."""

    def __init__(self, script: str, *args: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-u", "-W", "error", "-c", PRELUDE + script, *args],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # As in a terminal: the tests themselves may run under nohup, whose ignored signal a child inherits.
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # noqa: PLW1509
        )
        self.lines: List[str] = []
        self._condition = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def expect(self, text: str) -> str:
        """The first line that holds ``text``, once there is one."""

        def found() -> List[str]:
            return [line for line in self.lines if text in line]

        with self._condition:
            assert self._condition.wait_for(found, GUARD), f"no {text!r} in {self.lines}"
            return found()[0]

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def wait(self, timeout: float = GUARD) -> int:
        code = self._process.wait(timeout)
        self._reader.join(GUARD)
        return code

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait(GUARD)
        self._reader.join(GUARD)
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with self._condition:
                self.lines.append(line.rstrip())
                self._condition.notify_all()


@pytest.fixture
def run() -> Iterator[Callable[..., Process]]:
    made: List[Process] = []

    def run(script: str, *args: str) -> Process:
        process = Process(script, *args)
        made.append(process)
        return process

    yield run
    for process in made:
        process.close()


BLOCK = """
worker.start(block=True)
print("returned", flush=True)
"""


@posix
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_a_task(platform: Any, run: Callable[..., Process], tmp_path: Any, number: int) -> None:
    """It finishes the task, reports it, gives back what waited, sends the last heartbeat and exits 0."""
    script = """
def tell():
    while not worker.stats().waiting:
        time.sleep(0.01)
    print("one waits", flush=True)
threading.Thread(target=tell, daemon=True).start()
"""
    process = run(script + BLOCK, platform.url, platform.create_install_token(AGENT))
    marker = tmp_path / "go"
    running = platform.submit("echo", {"until": str(marker)}, AGENT)
    process.expect("begun")
    waiting = platform.submit("echo", {"until": str(marker)}, AGENT)
    process.expect("one waits")
    process.signal(number)
    until(lambda: platform.task(waiting)["status"] == "queued")
    assert platform.task(running)["status"] == "assigned"
    marker.touch()
    assert process.wait() == 0
    assert platform.task(running)["output"] == "finished"
    assert platform.count("release", 200) == 1
    assert platform.installations()[0]["status"] == "stopped"
    process.expect("returned")
    process.expect(f"stopping ({signal.Signals(number).name})")


ATEXIT = """
import atexit
atexit.register(lambda: print("atexit in", threading.current_thread().name, flush=True))
"""


def drained(process: Process, platform: Any, number: int) -> str:
    """Begin a task that never ends, send the first signal, and wait until a later one may end the process."""
    task_id: str = platform.submit("hang", {}, AGENT)
    process.expect("begun")
    process.signal(number)
    process.expect(f"stopping ({signal.Signals(number).name})")
    time.sleep(SECOND_AFTER)
    return task_id


@posix
@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_the_process(platform: Any, run: Callable[..., Process], first: int, second: int) -> None:
    """The task is answered worker_shutdown, atexit functions run once, and the exit code names the signal."""
    process = run(ATEXIT + BLOCK, platform.url, platform.create_install_token(AGENT))
    task_id = drained(process, platform, first)
    process.signal(second)
    assert process.wait() == 128 + second
    process.expect(f"ending the process ({signal.Signals(second).name})")
    assert [line for line in process.lines if "atexit" in line] == ["atexit in MainThread"]
    assert "returned" not in process.lines
    assert platform.task(task_id)["error"]["code"] == "worker_shutdown"
    assert platform.installations()[0]["status"] == "stopped"


@posix
def test_an_atexit_function_that_hangs(platform: Any, run: Callable[..., Process]) -> None:
    """The process ends without it, with the same exit code."""
    hang = "import atexit\natexit.register(threading.Event().wait)\n"
    process = run(hang + BLOCK, platform.url, platform.create_install_token(AGENT))
    drained(process, platform, signal.SIGTERM)
    process.signal(signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM


@posix
def test_signals_that_change_nothing(platform: Any, run: Callable[..., Process], tmp_path: Any) -> None:
    """Several signals for one stop, and SIGHUP at any time, leave the drain alone."""
    process = run(BLOCK, platform.url, platform.create_install_token(AGENT))
    marker = tmp_path / "go"
    task_id = platform.submit("echo", {"until": str(marker)}, AGENT)
    process.expect("begun")
    process.signal(signal.SIGHUP)
    process.expect("stopping (SIGHUP)")
    process.signal(signal.SIGTERM)
    time.sleep(SECOND_AFTER)
    process.signal(signal.SIGHUP)
    time.sleep(0.5)
    marker.touch()
    assert process.wait() == 0
    assert platform.task(task_id)["output"] == "finished"
    assert not any("ending the process" in line for line in process.lines)


@posix
@pytest.mark.parametrize("is_nested", [False, True])
def test_a_child_that_a_handler_forks(
    platform: Any, run: Callable[..., Process], tmp_path: Any, is_nested: bool
) -> None:
    """A forked child has the signal handlers that the program had before start(): terminate() ends it."""
    script = """
import contextlib, multiprocessing, warnings
from sekuire._internal.signals import DrainSignals
warnings.filterwarnings("ignore", category=DeprecationWarning)

def sleep(writer):
    writer.send(True)
    time.sleep(600)

@worker.on_task("children")
def children(ctx, input):
    codes = []
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        reader, writer = multiprocessing.Pipe(False)
        child = multiprocessing.get_context("fork").Process(target=sleep, args=(writer,))
        child.start()
        # A signal that comes while Python begins in the child is lost.
        assert reader.recv()
        os.kill(child.pid, number)
        child.join()
        codes.append(child.exitcode)
    return codes

with DrainSignals() if sys.argv[3] == "True" else contextlib.nullcontext():
    worker.start(block=True)
print("returned", flush=True)
"""
    process = run(script, platform.url, platform.create_install_token(AGENT), str(is_nested))
    ended = platform.wait(platform.submit("children", None, AGENT), GUARD)
    assert ended["output"] == [-signal.SIGTERM, -signal.SIGHUP, -signal.SIGUSR1]
    process.signal(signal.SIGTERM)
    assert process.wait() == 0
    process.expect("returned")


@posix
def test_ignored_signals_stay_ignored(platform: Any, run: Callable[..., Process], tmp_path: Any) -> None:
    """As under nohup and in a shell's background jobs: a closed terminal and a Ctrl-C do not reach the worker."""
    ignore = """
for number in (signal.SIGHUP, signal.SIGINT):
    signal.signal(number, signal.SIG_IGN)
"""
    process = run(ignore + BLOCK, platform.url, platform.create_install_token(AGENT))
    marker = tmp_path / "go"
    task_id = platform.submit("echo", {"until": str(marker)}, AGENT)
    process.expect("begun")
    process.signal(signal.SIGHUP)
    process.signal(signal.SIGINT)
    marker.touch()
    assert platform.wait(task_id, GUARD)["output"] == "finished"
    assert platform.installations()[0]["status"] == "healthy"
    process.signal(signal.SIGTERM)
    assert process.wait() == 0
    assert [line for line in process.lines if "INFO sekuire.worker stopping" in line] == [
        "INFO sekuire.worker stopping (SIGTERM)"
    ]


@posix
def test_a_signal_during_a_login_that_hangs(blackhole: Blackhole, run: Callable[..., Process]) -> None:
    """While a login waits for an answer a signal ends the process at once."""
    process = run(BLOCK, blackhole.url, "skt")
    with blackhole.accept() as sock:
        sock.recv(1)
        process.signal(signal.SIGTERM)
        # The login itself would take 10 s.
        assert process.wait(5.0) == 0
    process.expect("returned")


@posix
def test_a_signal_during_a_connect(blackhole: Blackhole, run: Callable[..., Process]) -> None:
    """While the stream's connection is being made a signal ends the process at once."""
    script = (
        """
worker = create_worker(api_base_url=url, agent_id="agent-1", runtime_token="rt")
worker.on_task("echo", echo)
"""
        + BLOCK
    )
    process = run(script, blackhole.url, "skt")
    with blackhole.accept() as sock:
        sock.recv(1)
        process.signal(signal.SIGTERM)
        assert process.wait(5.0) == 0


@posix
def test_a_signal_during_a_backoff(scripted: Scripted, run: Callable[..., Process]) -> None:
    """While the worker waits to connect anew a signal ends the process at once."""
    scripted.on["stream"] = lambda request: (503, {}, {"Retry-After": "300"})
    process = run(BLOCK, scripted.url, "skt")
    process.expect("; retrying")
    process.signal(signal.SIGTERM)
    assert process.wait(5.0) == 0
    assert scripted.count("stream") == 1


@posix
def test_previous_signal_handlers_are_restored(scripted: Scripted, run: Callable[..., Process]) -> None:
    """After start(block=True) the signals do what they did before, also when it raises."""
    script = """
heard = []
signal.signal(signal.SIGTERM, lambda *args: heard.append("mine"))
before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
threading.Thread(target=lambda: (worker.wait_until_connected(20), os.kill(os.getpid(), signal.SIGTERM))).start()
worker.start(block=True)
assert {number: signal.getsignal(number) for number in before} == before
assert heard == []
os.kill(os.getpid(), signal.SIGTERM)
assert heard == ["mine"]
try:
    worker.start(block=True)
except Exception as error:
    print("again:", error)
assert {number: signal.getsignal(number) for number in before} == before
print("restored", flush=True)
"""
    process = run(script, scripted.url, "skt")
    assert process.wait() == 0, process.lines
    assert process.lines[-1] == "restored"
    process.expect("again: Worker.start: this worker is stopped")


def test_the_interpreter_ends_without_a_stop(platform: Any, run: Callable[..., Process], tmp_path: Any) -> None:
    """A script that ends while a worker runs: one warning, contexts cancelled, the result and a last heartbeat sent."""
    script = """
worker.start()
begun.wait()
while not worker.stats().last_heartbeat_at:
    time.sleep(0.01)
print("the end", flush=True)
"""
    token = platform.create_install_token(AGENT)
    task_id = platform.submit("echo", {"until": str(tmp_path / "never")}, AGENT)
    process = run(script, platform.url, token)
    assert process.wait() == 0
    warnings = [line for line in process.lines if "start(block=True)" in line]
    assert len(warnings) == 1
    assert "wait()" in warnings[0]
    process.expect("cancelled: the program ends")
    assert platform.task(task_id)["output"] == "cancelled"
    assert platform.installations()[0]["status"] == "stopped"
    assert "Traceback" not in " ".join(process.lines)


@pytest.mark.parametrize(
    "end",
    [
        # Python refuses it from some moment of the program's end on.
        'await asyncio.get_running_loop().getaddrinfo("127.0.0.1", 80)',
        'raise ValueError("the connections are closed")',
        "sys.exit(1)",
        "ctx.raise_if_cancelled()",
    ],
)
def test_a_handler_fails_because_the_program_ends(platform: Any, run: Callable[..., Process], end: str) -> None:
    """It is answered worker_shutdown, retryable, whatever it meets when its program goes away."""
    script = f"""
import asyncio
worker = create_worker(api_base_url=url, agent_id="agent-1", install_token=token)

@worker.on_task("resolve")
async def resolve(ctx, input):
    begun.set()
    try:
        await asyncio.sleep(100)
    except asyncio.CancelledError:
        while True:
            {end}
            await asyncio.sleep(0.01)

worker.start()
begun.wait()
"""
    task_id = platform.submit("resolve", None, AGENT)
    process = run(script, platform.url, platform.create_install_token(AGENT))
    assert process.wait() == 0, process.lines
    error = platform.task(task_id)["error"]
    assert (error["code"], error["retryable"]) == ("worker_shutdown", True)


def test_the_program_ends_before_the_first_heartbeat_is_answered(
    scripted: Scripted, run: Callable[..., Process]
) -> None:
    """A last one is tried all the same: the platform may have noted the first."""
    over = threading.Event()

    def heartbeat(request: Any) -> Any:
        if request.json["status"] != "stopped":
            over.wait(GUARD)
        return 200, {}

    scripted.on["heartbeat"] = heartbeat
    script = """
worker.start()
worker.wait_until_connected()
"""
    process = run(script, scripted.url, "skt")
    assert process.wait() == 0
    assert [request.json["status"] for request in scripted.of("heartbeat")] == ["healthy", "stopped"]
    over.set()


def test_a_stop_at_the_interpreters_end(scripted: Scripted, run: Callable[..., Process]) -> None:
    """A user's own stop() in an atexit function, which comes after the worker has left, waits for nothing."""
    script = """
import atexit
worker = create_worker(api_base_url=url, agent_id="agent-1", install_token=token, shutdown_timeout=100_000.0)
worker.on_task("echo", echo)
atexit.register(lambda: print("stopped", worker.wait(0), worker.is_running(), worker.stop_reason, flush=True))
atexit.register(worker.stop)
worker.start()
worker.wait_until_connected(20)
print("the end", flush=True)
"""
    process = run(script, scripted.url, "skt")
    process.expect("the end")
    process.expect("stopped True False the program ends")
    assert process.wait() == 0


def test_a_silent_platform_does_not_keep_the_interpreter(scripted: Scripted, run: Callable[..., Process]) -> None:
    """At the interpreter's end the last heartbeat is given up after a moment."""
    over = threading.Event()

    def heartbeat(request: Any) -> Any:
        return (200, {}) if request.json["status"] != "stopped" else over.wait(GUARD) and None

    scripted.on["heartbeat"] = heartbeat
    script = """
worker.start()
while not worker.stats().last_heartbeat_at:
    time.sleep(0.01)
print("the end", flush=True)
"""
    process = run(script, scripted.url, "skt")
    process.expect("the end")
    assert process.wait() == 0
    assert scripted.wait_for("heartbeat")[-1].json["status"] == "stopped"
    over.set()


@pytest.mark.parametrize("beats", ["True", "False"])
def test_the_interpreter_ends_with_an_sdk(scripted: Scripted, run: Callable[..., Process], beats: str) -> None:
    """A script that ends without shutdown(): one warning for its worker, one last heartbeat for its installation."""
    script = f"""
from sekuire import SekuireSDK
sdk = SekuireSDK("agent-1", api_base_url=url, install_token=token, auto_heartbeat={beats})
sdk.start()
mine = sdk.create_task_worker(heartbeat_interval=0.2)
mine.on_task("echo", echo)
mine.start()
while not mine.stats().last_heartbeat_at:
    time.sleep(0.01)
"""
    process = run(script, scripted.url, "skt")
    assert process.wait() == 0
    assert sum("start(block=True)" in line for line in process.lines) == 1
    assert sum(request.json["status"] == "stopped" for request in scripted.of("heartbeat")) == 1
    assert "Traceback" not in " ".join(process.lines)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork()")
def test_fork_after_start(scripted: Scripted, run: Callable[..., Process]) -> None:
    """A child made by fork() is told that the worker stayed with its parent; its end does nothing to the parent's."""
    script = """
worker.start()
child = os.fork()
if child == 0:
    for call in (worker.start, worker.stop):
        try:
            call()
        except Exception as error:
            # One write: a print() is several here, and a thread of the parent may log between them.
            sys.stdout.write(f"{type(error).__name__} {error}\\n")
    sys.exit(0)
assert os.waitpid(child, 0)[1] == 0
print("running:", worker.is_running(), worker.is_connected(), flush=True)
worker.stop()
"""
    process = run(script, scripted.url, "skt")
    assert process.wait() == 0, process.lines
    errors = [line for line in process.lines if line.startswith("SekuireError this Worker was started in process")]
    assert len(errors) == 2
    assert "make a new Worker in the child" in errors[0]
    process.expect("running: True True")
    assert sum(request.json["status"] == "stopped" for request in scripted.of("heartbeat")) == 1
    assert not any("the program ends" in line for line in process.lines)
