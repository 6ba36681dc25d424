"""sekuire worker: a module's worker as a process."""

from __future__ import annotations

import signal
import textwrap
import time
from pathlib import Path
from typing import Any, Callable, Dict

import pytest

from sekuire import create_worker
from sekuire._internal.signals import DRAINING, SECOND_AFTER
from sekuire.errors import ConfigurationError
from sekuire.local import LocalPlatform
from sekuire.service import runner

from ..support.waiting import GUARD, until
from .conftest import AGENT, POSIX_ONLY, Call, Process, Run, variables

#: A worker whose handler reports by its progress that it runs, and ends when a file exists.
BASE = """
import os, time
from sekuire import SekuireSDK, TaskRegistry, Worker, create_worker
OPTIONS = dict(api_base_url=os.environ.get("SEKUIRE_API_URL", "http://127.0.0.1:9"), agent_id="cli-agent",
               install_token=os.environ.get("SEKUIRE_INSTALL_TOKEN", "skt_x"), heartbeat_interval=0.2)

def slow(ctx, input):
    ctx.report_progress(0.5)
    while not os.path.exists("go"):
        time.sleep(0.01)
    return {"answer": input["n"], "pid": os.getpid()}

def deaf(ctx, input):
    ctx.report_progress(0.5)
    while True:
        time.sleep(0.01)

def wait(ctx, input):
    ctx.report_progress(0.5)
    ctx.wait_cancelled(60)
    return {"cancelled": ctx.cancel_reason}
"""
PLAIN = """
worker = create_worker(**OPTIONS)
worker.on_task("slow", slow)
worker.on_task("wait", wait)
"""
#: Tells by a file that a task waits for a thread; the platform cannot see that.
WATCH = """
import threading

def watch():
    while not worker.stats().waiting:
        time.sleep(0.01)
    open("waits", "w").close()

threading.Thread(target=watch, daemon=True).start()
"""
FACTORY = """
def make(max_workers=1):
    worker = create_worker(max_workers=max_workers, **OPTIONS)
    worker.on_task("slow", slow)
    return worker
"""

Write = Callable[..., None]


@pytest.fixture
def module(tmp_path: Path, request: pytest.FixtureRequest) -> Write:
    """Write the user's module ``tasks.py``."""

    def write(*parts: str, name: str = "tasks.py") -> None:
        (tmp_path / name).write_text("".join(textwrap.dedent(part) for part in parts), encoding="utf-8")

    return write


def begin(process: Process, platform: LocalPlatform, capability: str, **fields: Any) -> str:
    """Submit a task and wait until its handler runs; its id."""
    process.line("stderr", "connected to")
    task_id = platform.submit(capability, {"n": 7}, agent_id=AGENT, **fields)
    until(lambda: platform.progress(task_id))
    return task_id


def last_status(platform: LocalPlatform) -> Any:
    (installation,) = platform.installations()
    return platform.heartbeats(installation["installation_id"])[-1]["status"]


@POSIX_ONLY
@pytest.mark.parametrize(("number", "expected"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_in_the_middle_of_a_task(
    run: Run, module: Write, platform: LocalPlatform, tmp_path: Path, number: int, expected: int
) -> None:
    """The running task ends and is reported, the waiting one is given back, the last heartbeat is sent."""
    module(BASE, PLAIN, WATCH)
    process = run("worker", "tasks:worker", "--max-workers", "1", env=variables(platform))
    running = begin(process, platform, "slow")
    waiting = platform.submit("slow", {"n": 8}, agent_id=AGENT)
    until((tmp_path / "waits").exists)
    process.signal(number)
    process.line("stderr", f"stopping ({signal.Signals(number).name})")
    until(lambda: platform.task(waiting)["status"] == "queued")
    assert platform.task(running)["status"] == "assigned"
    (tmp_path / "go").touch()
    code, out, err = process.end()
    assert (code, out) == (expected, "")
    assert platform.task(running)["output"] == {"answer": 7, "pid": process.popen.pid}
    assert last_status(platform) == "stopped"
    assert "Traceback" not in err


@pytest.mark.slow
@POSIX_ONLY
def test_a_second_signal(run: Run, module: Write, platform: LocalPlatform, tmp_path: Path) -> None:
    """It ends the process although a handler never does; the task is answered first, and nothing is left behind."""
    module(BASE, "worker = create_worker(shutdown_timeout=300, **OPTIONS)\nworker.on_task('deaf', deaf)\n")
    process = run("worker", "tasks:worker", "--liveness-file=alive", env=variables(platform))
    task_id = begin(process, platform, "deaf")
    process.signal(signal.SIGTERM)
    process.line("stderr", "stopping (SIGTERM)")
    time.sleep(SECOND_AFTER)
    process.signal(signal.SIGTERM)
    code, _, err = process.end()
    assert code == 128 + signal.SIGTERM
    assert "ending the process (SIGTERM)" in err
    assert platform.task(task_id)["error"]["code"] == "worker_shutdown"
    assert not (tmp_path / "alive").exists()


@pytest.mark.slow
@POSIX_ONLY
def test_a_handler_that_never_ends(run: Run, module: Write, platform: LocalPlatform) -> None:
    """After shutdown_timeout the process ends although the handler's thread does not; what was printed is written."""
    module(
        BASE,
        """
        worker = create_worker(shutdown_timeout=0.5, **OPTIONS)
        worker.on_task("deaf", deaf)
        print("not yet flushed", end="")
        import atexit
        atexit.register(print, ", and atexit", end="")
        """,
    )
    process = run("worker", "tasks:worker", env=variables(platform))
    task_id = begin(process, platform, "deaf")
    process.signal(signal.SIGTERM)
    code, out, err = process.end()
    assert (code, out) == (0, "not yet flushed, and atexit")
    assert "still running after the stop: deaf" in err
    assert platform.task(task_id)["error"]["code"] == "worker_shutdown"
    assert last_status(platform) == "stopped"


@pytest.mark.slow
def test_terminate_by_command(run: Run, module: Write, platform: LocalPlatform) -> None:
    """The platform's terminate ends it with 0."""
    module(BASE, PLAIN)
    process = run("worker", "tasks:worker", env=variables(platform))
    task_id = begin(process, platform, "wait")
    platform.command(platform.installations()[0]["installation_id"], "terminate", "enough")
    code, _, err = process.end()
    assert code == 0
    assert "the worker has stopped (terminated: enough)" in err
    assert platform.task(task_id)["output"] == {"cancelled": "terminated"}


@pytest.mark.slow
def test_a_revocation(run: Run, module: Write, platform: LocalPlatform) -> None:
    """It ends the process in order, and the log says why; a start after it is refused."""
    module(BASE, PLAIN)
    process = run("worker", "tasks:worker", env=variables(platform))
    process.line("stderr", "connected to")
    platform.revoke(platform.installations()[0]["installation_id"], "leaked")
    code, _, err = process.end()
    assert code == 0
    assert "leaked" in err
    assert "Traceback" not in err


@pytest.mark.slow
@pytest.mark.parametrize("started", [True, False])
def test_the_sdk_of_the_worker_is_shut_down(run: Run, module: Write, platform: LocalPlatform, started: bool) -> None:
    """Whether the module starts its SDK or not, the last heartbeat says `stopped`; other workers of it stop too."""
    module(
        BASE,
        f"""
        sdk = SekuireSDK.from_env()
        if {started}:
            sdk.start()
        other = sdk.create_task_worker(capabilities=["wait"])
        other.on_task("wait", wait)
        other.start()

        def make():
            worker = sdk.create_task_worker(capabilities=["slow"])
            worker.on_task("slow", slow)
            return worker
        """,
    )
    process = run("worker", "tasks:make", env=variables(platform))
    until(lambda: len(platform.streams()) == 2)
    process.signal(signal.SIGTERM)
    code, _, err = process.end()
    assert code == 0
    assert err.count("the worker has stopped") == 2
    assert last_status(platform) == "stopped"
    assert "the program ends while" not in err


@pytest.mark.slow
@pytest.mark.parametrize(("target", "parts"), [("tasks:worker", PLAIN), ("tasks:make", FACTORY)])
def test_max_workers(run: Run, module: Write, platform: LocalPlatform, tmp_path: Path, target: str, parts: str) -> None:
    """--max-workers applies to a worker and to a function, and is sent to the platform."""
    module(BASE, parts)
    process = run("worker", target, "--max-workers", "3", env=variables(platform))
    process.line("stderr", "connected to")
    ids = [platform.submit("slow", {"n": number}, agent_id=AGENT) for number in range(5)]
    until(lambda: sum(bool(platform.progress(task_id)) for task_id in ids) == 3)
    (stream,) = platform.streams()
    assert stream["max_in_flight"] == 6
    assert sum(bool(platform.progress(task_id)) for task_id in ids) == 3
    (tmp_path / "go").touch()
    for task_id in ids:
        assert platform.wait(task_id, GUARD)["status"] == "completed"
    process.signal(signal.SIGTERM)
    assert process.end()[0] == 0


@pytest.mark.slow
@POSIX_ONLY
@pytest.mark.parametrize(("number", "expected"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_during_the_import(run: Run, module: Write, number: int, expected: int) -> None:
    """There is nothing to drain yet: it ends at once, without a traceback."""
    module("print('importing', flush=True)\nimport threading\nthreading.Event().wait(60)\n")
    process = run("worker", "tasks:worker")
    process.line("stdout", "importing")
    process.signal(number)
    code, _, err = process.end()
    assert code == expected
    assert "Traceback" not in err


@pytest.mark.slow
@POSIX_ONLY
@pytest.mark.parametrize(("number", "expected"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_while_a_resource_is_opened(
    run: Run, module: Write, platform: LocalPlatform, number: int, expected: int
) -> None:
    """One that does not open is left, what is open is closed, and the process ends without a traceback."""
    module(
        BASE,
        "import threading\n"
        "worker = create_worker(**OPTIONS)\nworker.on_task('slow', slow)\n"
        "@worker.resource\n"
        "def one():\n    yield 1\n    print('closed', flush=True)\n"
        "@worker.resource\n"
        "def two(*, one):\n    print('opening', flush=True)\n    threading.Event().wait(60)\n    yield 2\n",
    )
    process = run("worker", "tasks:worker", env=variables(platform))
    process.line("stdout", "opening")
    process.signal(number)
    code, out, err = process.end()
    assert (code, out) == (expected, "opening\nclosed\n")
    assert "Traceback" not in err


@pytest.mark.slow
@POSIX_ONLY
@pytest.mark.parametrize("where", ["silence", "nobody"])
def test_a_signal_while_it_logs_in(run: Run, module: Write, silent_url: str, where: str) -> None:
    """Neither a connect that hangs nor a backoff holds it up."""
    module(BASE, "worker = create_worker(**OPTIONS)\nworker.on_task('slow', slow)\nprint('made', flush=True)\n")
    url = silent_url if where == "silence" else "http://127.0.0.1:9"
    process = run("worker", "tasks:worker", "-vv", env={"SEKUIRE_API_URL": url, "SEKUIRE_INSTALL_TOKEN": "skt_x"})
    process.line("stdout", "made")
    process.line("stderr", "Starting new HTTP connection")
    process.signal(signal.SIGTERM)
    assert process.end()[0] == 0


@pytest.mark.slow
def test_a_refused_login_is_1(run: Run, module: Write, platform: LocalPlatform) -> None:
    """The platform's refusal is reported in a line."""
    module(BASE, PLAIN)
    process = run("worker", "tasks:worker", env={**variables(platform), "SEKUIRE_INSTALL_TOKEN": "skt_wrong"})
    code, out, err = process.end()
    assert (code, out) == (1, "")
    assert "sekuire worker: error: " in err.splitlines()[-1]
    assert "install token" in err.splitlines()[-1]
    assert "Traceback" not in err


REGISTRY = """
tasks = TaskRegistry()
tasks.task("slow", slow)

def registered():
    return tasks

def of_an_sdk():
    worker = SekuireSDK.from_env().create_task_worker()
    worker.include(tasks)
    return worker
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tasks", "registered", "of_an_sdk"])
def test_a_registry(run: Run, module: Write, platform: LocalPlatform, tmp_path: Path, name: str) -> None:
    """Its worker is made from the environment. The SDK is started, so that audit events come, and shut down."""
    module(BASE, REGISTRY)
    (tmp_path / "go").touch()
    process = run("worker", f"tasks:{name}", env=variables(platform))
    process.line("stderr", "connected to")
    task_id = platform.submit("slow", {"n": 7}, agent_id=AGENT)
    assert platform.wait(task_id, GUARD)["output"] == {"answer": 7, "pid": process.popen.pid}
    process.signal(signal.SIGTERM)
    assert process.end()[0] == 0
    assert [log["event_data"]["task_id"] for log in platform.logs("tool_execution")] == [task_id]
    assert last_status(platform) == "stopped"


def test_a_registry_needs_the_environment(call: Call, module: Write) -> None:
    """One line names the variable that is missing."""
    module(BASE, REGISTRY)
    code, out, err = call("worker", "tasks:tasks", "--max-workers", "3")
    _forget()
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert "set SEKUIRE_AGENT_ID" in err


# -- the user's module ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "problem"),
    [
        ("tasks", "'tasks' is not of the form MODULE:NAME, such as summarizer:tasks"),
        (":worker", "is not of the form"),
        ("tasks:", "is not of the form"),
        ("tasks.py:worker", "'tasks.py' is a file; name the module, such as tasks:worker"),
        ("./jobs/tasks.py:worker", "such as jobs.tasks:worker"),
        ("task:worker", "there is no module 'task' in "),
        ("task:worker", "did you mean 'tasks'?"),
        ("nowhere.at.all:worker", "there is no module 'nowhere' in "),
        ("tasks.sub:worker", "there is no module 'tasks.sub' in "),
        ("tasks:wroker", "the module 'tasks' has no 'wroker'; did you mean tasks:worker?"),
        ("tasks:xyz", "did you mean tasks:worker or tasks:empty or tasks:bare or tasks:make or tasks:later?"),
        ("tasks:worker.x", "the module 'tasks' has no 'worker.x'"),
        ("tasks:Worker", "tasks:Worker is the class Worker; it must be a sekuire.TaskRegistry or a sekuire.Worker"),
        ("tasks:OPTIONS", "tasks:OPTIONS is a dict; it must be"),
        ("tasks:sdk", "tasks:sdk is a SekuireSDK; name a TaskRegistry, or a worker of its create_task_worker"),
        ("tasks:slow", "tasks:slow needs arguments (ctx, input); it is called without any"),
        ("tasks:sized", "tasks:sized needs max_workers; give --max-workers N"),
        ("tasks:later", "tasks:later is an async function"),
        ("tasks:nothing", "tasks:nothing returned a NoneType; it must return a sekuire.TaskRegistry or"),
        ("tasks:bare", 'tasks:bare has no handlers; declare one with @bare.task("name")'),
        ("tasks:started", "tasks:started was already started by its module"),
        ("tasks:empty", "no handler is registered"),
        ("tasks:misconfigured", "max_workers: must be a whole number"),
    ],
)
def test_what_can_be_wrong_with_the_target(call: Call, module: Write, target: str, problem: str) -> None:
    """Exit 2, one line, no traceback."""
    module(
        BASE,
        PLAIN,
        FACTORY,
        """
        sdk = SekuireSDK("cli-agent", api_base_url=OPTIONS["api_base_url"], install_token="skt_x")
        def sized(max_workers): return worker
        async def later(): return worker
        def nothing(): return None
        def misconfigured(): return create_worker(max_workers=0, **OPTIONS)
        empty = create_worker(**OPTIONS)
        bare = TaskRegistry()

        def started():
            one = create_worker(start_timeout=0, **OPTIONS)
            one.on_task("slow", slow)
            one.start()
            return one
        """,
    )
    code, out, err = call("worker", target, "--log-level", "error")
    _forget()
    assert (code, out) == (2, "")
    assert problem in err
    assert len(err.splitlines()) == 1
    assert err.startswith("sekuire worker: error: ")


def _forget() -> None:
    import sys

    for name in ("tasks", "jobs"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("source", "shown", "last"),
    [
        (
            "import nowhere_at_all\n",
            "import nowhere_at_all",
            "importing 'tasks' failed: ModuleNotFoundError: No module named 'nowhere_at_all'",
        ),
        ("1 / 0\n", "1 / 0", "importing 'tasks' failed: ZeroDivisionError: division by zero"),
        ("def broken(:\n", "def broken(:", "importing 'tasks' failed: SyntaxError"),
        (
            "def worker():\n    raise ValueError('no luck')\n",
            "raise ValueError",
            "tasks:worker failed: ValueError: no luck",
        ),
    ],
)
def test_an_error_in_the_users_code(call: Call, module: Write, source: str, shown: str, last: str) -> None:
    """Its traceback is shown, from the user's own line on, and one line below it; exit 2."""
    module(source)
    code, out, err = call("worker", "tasks:worker")
    _forget()
    assert (code, out) == (2, "")
    assert shown in err
    assert err.splitlines()[-1].startswith(f"sekuire worker: error: {last}")
    assert "sekuire/cli" not in err
    assert "importlib" not in err


@pytest.mark.parametrize(
    ("source", "code", "problem"),
    [
        (
            "from sekuire import SekuireSDK\nsdk = SekuireSDK.from_env()\n",
            2,
            "agent_id: is required; set SEKUIRE_AGENT_ID",
        ),
        ("import sys\nsys.exit(3)\n", 2, "importing 'tasks' ended with sys.exit(3)"),
        ("from sekuire.errors import AuthenticationError\nraise AuthenticationError('refused')\n", 1, "error: refused"),
    ],
)
def test_an_error_that_needs_no_traceback(call: Call, module: Write, source: str, code: int, problem: str) -> None:
    """The library's own errors, raised while the module is imported, are reported in a line."""
    module(source)
    found, _, err = call("worker", "tasks:worker")
    _forget()
    assert found == code
    assert problem in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("count", ["0", "-1", "x", "1.5"])
def test_a_wrong_count(call: Call, count: str) -> None:
    code, _, err = call("worker", "tasks:worker", f"--max-workers={count}")
    assert code == 2
    assert "--max-workers: must be a whole number" in err


def test_a_package_and_a_dotted_name(run: Run, module: Write, platform: LocalPlatform, tmp_path: Path) -> None:
    """package.module:object.attribute is found; the current directory is on the path first."""
    (tmp_path / "jobs").mkdir()
    module("", name="jobs/__init__.py")
    module(BASE, PLAIN, "class Held:\n    worker = worker\n", name="jobs/tasks.py")
    process = run("worker", "jobs.tasks:Held.worker", env=variables(platform))
    process.line("stderr", "connected to")
    process.signal(signal.SIGTERM)
    assert process.end()[0] == 0


def test_a_started_worker_is_not_resized() -> None:
    """Its threads are counted out already."""
    worker = create_worker(agent_id=AGENT, install_token="skt_x")
    worker.stop()
    with pytest.raises(ConfigurationError, match="max_workers: cannot be changed once the worker was started"):
        worker.reconfigure(max_workers=2)


def test_signals_after_the_worker_ran() -> None:
    """While the SDK shuts down, the first signal changes nothing, and a later one ends the process."""
    before: Dict[int, Any] = {number: signal.getsignal(number) for number in DRAINING}
    with runner._Signals() as signals:
        signals.worker = create_worker(agent_id=AGENT, install_token="skt_x")
        signals.worker.stop()
        signals.is_over = True
        signal.raise_signal(signal.SIGTERM)
        time.sleep(SECOND_AFTER)
        with pytest.raises(runner._Ended) as ended:
            signal.raise_signal(signal.SIGTERM)
    assert ended.value.code == 128 + signal.SIGTERM
    assert {number: signal.getsignal(number) for number in DRAINING} == before


@pytest.mark.slow
def test_a_revoked_installation_is_not_started(run: Run, module: Write, platform: LocalPlatform) -> None:
    """A worker that comes back with credentials of a revoked installation fails with the reason."""
    module(
        BASE,
        """
        from sekuire import RuntimeCredentialsStore
        OPTIONS["credentials_store"] = RuntimeCredentialsStore(path="credentials.json")
        """,
        PLAIN,
    )
    environ = variables(platform)
    first = run("worker", "tasks:worker", env=environ)
    first.line("stderr", "connected to")
    platform.revoke(platform.installations()[0]["installation_id"], "leaked")
    assert first.end()[0] == 0
    code, _, err = run("worker", "tasks:worker", env=environ).end()
    assert code == 1
    last = err.splitlines()[-1]
    assert last.startswith("sekuire worker: error: the installation was revoked: ")
    assert last.endswith("leaked")


@pytest.mark.slow
def test_stops_when_idle(run: Run, module: Write, platform: LocalPlatform) -> None:
    """The queued task is worked off, and the process ends by itself with 0."""
    module(BASE, PLAIN, "open('go', 'w').close()\n")
    task_id = platform.submit("slow", {"n": 7}, agent_id=AGENT)
    process = run("worker", "tasks:worker", "--stop-when-idle", "3", env=variables(platform))
    code, _, err = process.end()
    assert code == 0
    assert platform.task(task_id)["output"]["answer"] == 7
    assert "the worker has stopped (idle for 3 s)" in err


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "soon"])
def test_an_idle_time_that_is_none(call: Call, text: str) -> None:
    """It is refused before the module is imported."""
    code, _, err = call("worker", "tasks:worker", f"--stop-when-idle={text}")
    assert code == 2
    assert "must be a number of seconds above 0" in err
