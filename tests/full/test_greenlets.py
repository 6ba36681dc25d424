"""Programs whose threads gevent or eventlet has replaced. Each runs in a process of its own."""

from __future__ import annotations

import contextlib
import pathlib
import signal
import subprocess
import sys
from typing import Any, Dict, Iterator, List

import pytest

from sekuire.local import LocalPlatform

from ..cli.conftest import clean_environ
from ..conftest import AGENT
from ..support.proxies import SocksProxy
from ..support.servers import run_python
from ..support.waiting import GUARD, until

pytestmark = pytest.mark.full

LIBRARIES = ("gevent", "eventlet")
ORDERS = ("before", "after")

#: Patch before or after the library is imported: arguments 1 and 2 of each program.
PATCH = """
import os, sys, time, warnings

warnings.simplefilter("ignore")

def patch(moment):
    if moment != sys.argv[2]:
        return
    if sys.argv[1] == "gevent":
        from gevent import monkey
        monkey.patch_all()
    else:
        import eventlet
        eventlet.monkey_patch()

patch("before")
import logging
import requests
import sekuire.client, sekuire.sdk
from sekuire import create_worker
patch("after")
logging.basicConfig(level=logging.INFO)
"""

WORKER = """
import threading

def nap(ctx, input):
    ctx.report_progress(0.5)
    time.sleep(input)
    return input

def spin(ctx, input):
    end = time.monotonic() + input
    while time.monotonic() < end:
        pass

def register(worker):
    worker.on_task("echo", lambda ctx, input: input)
    worker.on_task("nap", nap)
    worker.on_task("late", nap, timeout=0.2)
    worker.on_task("cancelled", lambda ctx, input: ctx.wait_cancelled(180.0))
    worker.on_task("spin", spin)

def until_gone(path):
    while os.path.exists(path):
        time.sleep(0.02)

options = {"heartbeat_interval": 0.5, "shutdown_timeout": 20.0}
ending = sys.argv[3]
if ending == "sdk":
    from sekuire import SekuireSDK
    sdk = SekuireSDK.from_env(heartbeat_interval=0.5)
    sdk.start()
    worker = sdk.create_task_worker(shutdown_timeout=20.0)
else:
    worker = create_worker(
        api_base_url=os.environ["SEKUIRE_API_URL"], agent_id=os.environ["SEKUIRE_AGENT_ID"],
        install_token=os.environ["SEKUIRE_INSTALL_TOKEN"], **options,
    )
register(worker)
if ending == "signal":
    worker.start(block=True)
else:
    worker.start()
    until_gone(sys.argv[4])
    if ending == "stop":
        worker.stop()
    elif ending == "sdk":
        sdk.shutdown()
if ending != "exit":
    # The main thread's stop has waited for everything.
    print("left", [one.name for one in threading.enumerate() if one.name.startswith("sekuire-")])
"""


@contextlib.contextmanager
def program(platform: LocalPlatform, directory: pathlib.Path, library: str, order: str, ending: str) -> Iterator[Any]:
    """A worker in a process that was patched. It ends when the file ``go-on`` is removed, or by a signal."""
    pytest.importorskip(library)
    go_on = directory / "go-on"
    go_on.touch()
    environ = clean_environ(
        SEKUIRE_API_URL=platform.url,
        SEKUIRE_AGENT_ID=AGENT,
        SEKUIRE_INSTALL_TOKEN=platform.create_install_token(AGENT),
    )
    with open(directory / "log", "w+", encoding="utf-8") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", PATCH + WORKER, library, order, ending, str(go_on)],
            env=environ, stdout=log, stderr=log,
        )  # fmt: skip
        try:
            until(lambda: platform.streams() or process.poll() is not None)
            yield process
            assert process.wait(GUARD) == 0
        except BaseException:
            print((directory / "log").read_text(encoding="utf-8"))
            raise
        finally:
            process.kill()
            process.wait()


def result(platform: LocalPlatform, task: str) -> Dict[str, Any]:
    found: Dict[str, Any] = platform.wait(task, timeout=GUARD)
    return found


def beats(platform: LocalPlatform) -> List[str]:
    (installation,) = platform.installations()
    return [beat["status"] for beat in platform.heartbeats(installation["installation_id"])]


@pytest.mark.parametrize("ending", ["stop", "sdk", "signal", "exit"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("library", LIBRARIES)
def test_a_worker(platform: LocalPlatform, tmp_path: pathlib.Path, library: str, order: str, ending: str) -> None:
    """Tasks run side by side, time out, and are drained; beats go on meanwhile, and the last one says "stopped"."""
    with program(platform, tmp_path, library, order, ending) as process:
        tasks = [platform.submit("echo", number, agent_id=AGENT) for number in range(5)]
        assert [result(platform, task)["output"] for task in tasks] == list(range(5))
        # Each needs a thread of its own, and none ends before the time limit of the other has passed.
        tasks = [platform.submit("nap", 1.0, agent_id=AGENT) for _ in range(4)]
        late = platform.submit("late", 1.0, agent_id=AGENT)
        assert result(platform, late)["error"]["code"] == "timeout"
        assert [result(platform, task)["output"] for task in tasks] == [1.0] * 4
        count = len(beats(platform))
        until(lambda: len(beats(platform)) > count)
        last = platform.submit("nap", 1.0, agent_id=AGENT)
        if ending != "exit":
            # A task that is only assigned may still be on its way, and would go back to the queue.
            until(lambda: platform.task(last).get("progress"))
        if ending == "signal":
            process.send_signal(signal.SIGTERM)
        else:
            (tmp_path / "go-on").unlink()
    if ending != "exit":
        assert result(platform, last)["output"] == 1.0
        assert "left []" in (tmp_path / "log").read_text(encoding="utf-8")
    assert beats(platform)[-1] == "stopped"


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_handler_that_computes(platform: LocalPlatform, tmp_path: pathlib.Path, library: str) -> None:
    """It stops every other greenlet, the heartbeat's too, and the log says so; beats go on afterwards."""
    with program(platform, tmp_path, library, "before", "stop"):
        warning = f"under {library} a greenlet that computes or blocks stops all others"

        def spin() -> bool:
            # A beat that is just being sent when it begins is late too, but waits for no time of its own.
            result(platform, platform.submit("spin", 6.0, agent_id=AGENT))
            count = len(beats(platform))
            until(lambda: len(beats(platform)) > count)
            return warning in (tmp_path / "log").read_text(encoding="utf-8")

        until(spin)
        (tmp_path / "go-on").unlink()


@pytest.mark.parametrize("library", LIBRARIES)
def test_what_cannot_work_is_refused(library: str) -> None:
    """Async handlers, and executors that would hang, are refused at the start with what to do instead."""
    pytest.importorskip(library)
    script = """
from concurrent.futures import ThreadPoolExecutor
from sekuire import ProcessExecutor
from sekuire.errors import ConfigurationError

async def wait(ctx, input):
    pass

executors = [None, ThreadPoolExecutor(1)]
if sys.argv[1] == "gevent":
    import gevent.threadpool
    executors += [ProcessExecutor(1), gevent.threadpool.ThreadPoolExecutor(1)]
for executor in executors:
    worker = create_worker(agent_id="a", install_token="t", executor=executor)
    worker.on_task("wait", wait)
    try:
        worker.start()
    except ConfigurationError as error:
        print(error)
"""
    said = run_python(PATCH + script, library, "before").stdout.splitlines()
    assert len(said) == (4 if library == "gevent" else 2)
    assert all(f"cannot run under {library}" in line and "'wait'" in line for line in said[:2])
    assert all("executor: " in line and "docs/gevent.md" in line for line in said[2:])


@pytest.mark.parametrize("library", LIBRARIES)
def test_what_is_thrown_into_a_greenlet(library: str) -> None:
    """A kill or a time limit that reaches a log call of the library ends the greenlet, or its wait."""
    pytest.importorskip(library)
    script = """
import greenlet
from sekuire._internal.logs import get_logger
from sekuire._internal.threads import CallbackThread, Deadline, PeriodicThread

if sys.argv[1] == "gevent":
    from gevent import Timeout, kill, sleep, spawn
else:
    from eventlet import Timeout, kill, sleep, spawn

class Waiting(logging.Handler):
    def emit(self, record):
        sleep(180)

logging.getLogger("sekuire.x").addHandler(Waiting())
ends = []

def log(name):
    try:
        get_logger("sekuire.x").error("x")
    except BaseException as error:
        ends.append(type(error).__name__)
    else:
        ends.append("went on")

one = spawn(log, "x")
sleep(0.01)
kill(one)
with Timeout(0.01, False):
    log("x")
print(ends)

class Work:
    def beat(self):
        raise greenlet.GreenletExit
    def interval(self):
        return 3600.0

periodic = PeriodicThread("sekuire-x", Work())
periodic.start()
print(periodic.join(Deadline(180.0)))
"""
    said = run_python(PATCH + script, library, "before").stdout.splitlines()
    assert said == ["['GreenletExit', 'Timeout']", "True"]


@pytest.mark.parametrize("library", LIBRARIES)
def test_tls_that_was_patched_too_late(library: str) -> None:
    """requests keeps the class that the patch replaces, and fails without an end in it. The error says what to do."""
    pytest.importorskip(library)
    script = """
import socket
from sekuire.config import ConnectionConfig
from sekuire.errors import TransportError
from sekuire.transport.http import HttpClient

server = socket.create_server(("127.0.0.1", 0))
one = HttpClient(ConnectionConfig(api_base_url="https://127.0.0.1:%d" % server.getsockname()[1], read_timeout=1.0))
try:
    one.request("POST", "/x", body=b"{}")
except TransportError as error:
    print(error.retryable, error)
"""
    late = run_python(PATCH + script, library, "after").stdout
    assert late.startswith("False")
    assert f"{library} has patched ssl after requests was imported" in late
    assert "patched" not in run_python(PATCH + script, library, "before").stdout


@pytest.mark.parametrize("order", ORDERS)
def test_a_fork_under_gevent(platform: LocalPlatform, order: str) -> None:
    """As under gunicorn's preload: the parent's objects say in the child what to do; a new worker works there."""
    pytest.importorskip("gevent")
    script = """
def make(name):
    worker = create_worker(api_base_url=sys.argv[3], agent_id=name, heartbeat_interval=0.5,
        install_token=sys.argv[4 + "ab".index(name)])
    worker.on_task("stop", lambda ctx, input: worker.request_stop())
    worker.on_task("name", lambda ctx, input: name)
    return worker

parent = make("a")
parent.start()
child = os.fork()
if child == 0:
    code = 1
    try:
        try:
            parent.stop()
        except Exception as error:
            assert "after fork() make a new Worker in the child" in str(error), error
            assert "post_worker_init" in str(error), error
            make("b").start(block=True)
            code = 0
    finally:
        os._exit(code)
print(os.waitpid(child, 0)[1])
parent.wait()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", PATCH + script, "gevent", order, platform.url,
         platform.create_install_token("a"), platform.create_install_token("b")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        for name in "ab":
            assert result(platform, platform.submit("name", None, name))["output"] == name
        assert len(platform.streams()) == 2
        parent, child = platform.installations()

        def count(one: Any) -> int:
            return len(platform.heartbeats(one["installation_id"]))

        # The copies of the parent's greenlets in the child must not speak for the parent.
        before = (count(parent), count(child))
        until(lambda: count(parent) > before[0] + 4 and count(child) > before[1] + 4)
        said = [beat["status"] for beat in platform.heartbeats(parent["installation_id"])]
        assert set(said) == {"healthy"}, said
        for name in "ba":
            result(platform, platform.submit("stop", None, name))
        output, log = process.communicate(timeout=GUARD)
        assert output == "0\n"
        assert "the worker stops" not in log
        assert process.returncode == 0
    finally:
        process.kill()
        process.wait()


PROXIED = """
url, token, proxy = sys.argv[3:]
worker = create_worker(api_base_url=url, agent_id="agent-1", install_token=token, proxies={"all": proxy})
worker.on_task("echo", lambda ctx, input: input)
worker.start()
assert worker.wait_until_connected(180.0)
while worker.stats().completed < 3 or worker.stats().undelivered:
    time.sleep(0.02)
worker.stop()
"""


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_socks_proxy(platform: LocalPlatform, library: str) -> None:
    """It works also if PySocks was imported before the library replaced the sockets."""
    pytest.importorskip(library)
    pytest.importorskip("socks")
    with SocksProxy(int(platform.url.rpartition(":")[2])) as proxy:
        tasks = [platform.submit("echo", number, agent_id=AGENT) for number in range(3)]
        run_python(
            "import socks\n" + PATCH + PROXIED, library, "before", platform.url,
            platform.create_install_token(AGENT), proxy.url_of("socks5h"),
        )  # fmt: skip
    assert [result(platform, task)["output"] for task in tasks] == [0, 1, 2]
