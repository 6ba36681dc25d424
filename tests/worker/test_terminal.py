"""What a person sees: programs in a terminal of 80 columns, and the same at the end of a pipe."""

from __future__ import annotations

import http.server
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Tuple

import pytest

from sekuire.local import LocalPlatform

from ..support.terminal import Terminal, clean_environ
from ..support.waiting import GUARD, until

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name != "posix", reason="a terminal of POSIX")]

AGENT = "my-agent"
#: A port that nothing listens on: "discard", which no system serves any more.
NOWHERE = "http://127.0.0.1:9"

WORKER = """
import os, threading, time
from sekuire import TaskError, create_worker

worker = create_worker(
    agent_id="my-agent", install_token=os.environ["TOKEN"], api_base_url=os.environ["URL"], reconnect_max=1
)

@worker.on_task("copy")
def copy(ctx, input):
    ctx.logger.info("copying")
    print("printed", flush=False)
    if "text" not in input:
        raise TaskError("no_text", "the input needs a text")
    return input

@worker.on_task("divide")
def divide(ctx, input):
    return 1 / input["by"]

@worker.on_task("wait")
def wait(ctx, input):
    ctx.report_progress(0.5)
    while not os.path.exists("go"):
        time.sleep(0.01)
"""
MAIN = """
if __name__ == "__main__":
    worker.start(block=True)
"""
SDK = """
from sekuire import SekuireSDK

with SekuireSDK.from_env({options}) as sdk:
    worker = sdk.create_task_worker(reconnect_max=1)
    worker.on_task("copy", lambda ctx, input: input)
    worker.start({block})
    {after}
"""


def sdk(options: str = "", block: str = "block=True", after: str = "") -> str:
    return SDK.format(options=options, block=block, after=after)


Show = Callable[..., Terminal]


@pytest.fixture
def show(tmp_path: Path) -> Iterator[Show]:
    """Run a program, or the command line, in a terminal."""
    shown: List[Terminal] = []

    def run(text: str, variables: Dict[str, str], *args: str) -> Terminal:
        (tmp_path / "jobs.py").write_text(textwrap.dedent(text), encoding="utf-8")
        shown.append(Terminal(args or ("jobs.py",), tmp_path, variables))
        return shown[-1]

    yield run
    for one in shown:
        one.close()


@pytest.fixture
def platform() -> Iterator[LocalPlatform]:
    with LocalPlatform() as platform:
        yield platform


def variables(platform: LocalPlatform, **more: str) -> Dict[str, str]:
    token = platform.create_install_token(AGENT)
    return of(platform.url, token, **more)


def of(url: str, token: str, **more: str) -> Dict[str, str]:
    return {
        "URL": url,
        "TOKEN": token,
        "SEKUIRE_API_URL": url,
        "SEKUIRE_INSTALL_TOKEN": token,
        "SEKUIRE_AGENT_ID": AGENT,
        **more,
    }


def masked(lines: List[str]) -> List[str]:
    """The lines without what differs from run to run."""
    text = "\n".join(lines)
    text = re.sub(r"127\.0\.0\.1:\d+", "HOST", text)
    text = re.sub(r"inst_[0-9a-f]+", "INST", text)
    text = re.sub(r"task_[0-9a-f]+", "TASK", text)
    text = re.sub(r"\d+ ms", "N ms", text)
    return re.sub(r"\d+\.\d s\b", "N s", text).split("\n")


CONNECTED = (
    "connected to http://HOST as my-agent, installation INST: copy, divide, wait; 8 threads; no policy is enforced"
)


def work(platform: LocalPlatform) -> None:
    """Have one task of each end done."""
    for capability, input in (("copy", {"text": "x"}), ("copy", {}), ("divide", {"by": 0})):
        platform.wait(platform.submit(capability, input, AGENT), GUARD)


# -- a day ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("args", [(), ("-m", "sekuire", "worker", "jobs:worker")], ids=["script", "command"])
def test_a_day(args: Tuple[str, ...], show: Show, platform: LocalPlatform, tmp_path: Path) -> None:
    """Connected, each task's end, what the stop waits for, the end: a line each, and nothing twice."""
    terminal = show(WORKER + MAIN, variables(platform), *args)
    terminal.line("connected to")
    work(platform)
    terminal.line("ZeroDivisionError: division by zero")
    task_id = platform.submit("wait", {}, AGENT)
    until(lambda: platform.progress(task_id))
    terminal.interrupt()
    terminal.line("stopping")
    (tmp_path / "go").touch()
    assert terminal.end() == (130 if args else 0)
    lines = masked(terminal.lines)
    begin = lines.index("Traceback (most recent call last):")
    # It begins with the handler.
    assert "jobs.py" in lines[begin + 1]
    end = lines.index("ZeroDivisionError: division by zero") + 1
    assert lines[:begin] == [
        CONNECTED,
        "[TASK] copying",
        "printed",
        "[TASK] copy completed in N ms",
        "[TASK] copying",
        "printed",
        "[TASK] copy failed no_text: the input needs a text",
        "[TASK] divide failed handler_error: ZeroDivisionError: division by zero",
    ]
    assert lines[end:] == [
        "stopping (Ctrl-C); waiting at most 30 s for 1 task: wait TASK; Ctrl-C again ends the process",
        "[TASK] wait completed in N ms",
        "the worker has stopped (Ctrl-C)",
    ]


def test_through_pipes(platform: LocalPlatform, tmp_path: Path) -> None:
    """A script that is not at a terminal writes what it wrote before; `sekuire worker` writes dated lines."""
    (tmp_path / "jobs.py").write_text(WORKER + MAIN, encoding="utf-8")
    seen = []
    for args in (["jobs.py"], ["-m", "sekuire", "worker", "jobs:worker"]):
        process = subprocess.Popen(
            [sys.executable, *args], cwd=str(tmp_path), env=clean_environ(**variables(platform)), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        work(platform)
        if len(args) > 1:
            assert process.stdout is not None
            # At once, although nothing flushes a pipe: the process runs.
            assert process.stdout.readline() == "printed\n"
        process.send_signal(signal.SIGTERM)
        seen.append(process.communicate(timeout=GUARD)[1])
        assert process.returncode == 0
    script, command = seen
    (line,) = [line for line in masked(script.splitlines()) if line.startswith("[")]
    assert line == "[TASK] divide failed handler_error: ZeroDivisionError: division by zero"
    assert "connected" not in script
    dated = [re.sub(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} ", "", line) for line in masked(command.splitlines())]
    assert dated[:3] == [
        f"INFO    sekuire.worker: {CONNECTED}",
        "INFO    sekuire.task: [TASK] copying",
        "INFO    sekuire.dispatch: [TASK] copy completed in N ms",
    ]
    assert "WARNING sekuire.dispatch: [TASK] copy failed no_text: the input needs a text" in dated
    assert dated[-1] == "INFO    sekuire.worker: the worker has stopped (SIGTERM)"


def test_a_program_with_logging(show: Show, platform: LocalPlatform) -> None:
    """Its handlers get each line once, and stderr gets none beside them, also under `sekuire worker`."""
    setup = "import logging, sys\nlogging.basicConfig(level='INFO', stream=sys.stdout, format='LOG %(message)s')\n"
    for args in ((), ("-m", "sekuire", "worker", "jobs:worker")):
        terminal = show(setup + WORKER + MAIN, variables(platform), *args)
        terminal.line("connected to")
        platform.wait(platform.submit("copy", {"text": "x"}, AGENT), GUARD)
        terminal.line("copy completed")
        terminal.interrupt()
        terminal.end()
        ours = [line for line in terminal.lines if "connected to" in line or "completed" in line or "stopped" in line]
        assert len(ours) == 3
        assert all(line.startswith("LOG ") for line in ours)


@pytest.mark.parametrize("way", ["option", "variable", "flag"])
def test_quiet(way: str, show: Show, platform: LocalPlatform) -> None:
    """It silences all of it; what handlers print and raise is shown."""
    text = WORKER.replace("reconnect_max=1", "reconnect_max=1, quiet=True") if way == "option" else WORKER
    more = {"SEKUIRE_QUIET": "1"} if way == "variable" else {}
    args = ("-m", "sekuire", "worker", "jobs:worker", "--quiet") if way == "flag" else ()
    terminal = show(text + MAIN, variables(platform, **more), *args)
    work(platform)
    terminal.line("ZeroDivisionError: division by zero")
    terminal.interrupt()
    terminal.end()
    lines = [line for line in masked(terminal.lines) if not line.startswith(" ")]
    assert lines[:3] == [
        "printed",
        "printed",
        "[TASK] divide failed handler_error: ZeroDivisionError: division by zero",
    ] or lines[0].startswith("printed")
    assert not any("connected" in line or "completed" in line or "stopped" in line for line in lines)


def test_verbose(show: Show, platform: LocalPlatform) -> None:
    """-v shows what the library does, -vv also what other packages do."""
    text = WORKER.replace("import os,", "import logging\nlogging.getLogger('urllib3').debug('theirs')\nimport os,")
    for flag, is_theirs_shown in (("-v", False), ("-vv", True)):
        terminal = show(text, variables(platform), "-m", "sekuire", "worker", "jobs:worker", flag)
        terminal.line("connected to")
        terminal.interrupt()
        terminal.end()
        assert "authenticated with the install token" in terminal.text
        assert ("theirs" in terminal.text) is is_theirs_shown


def test_a_denial(show: Show, platform: LocalPlatform) -> None:
    """It names the rule."""
    pytest.importorskip("blake3")
    platform.set_policy(platform.workspace_id, {"permissions": {"tools": {"blocked_tools": ["shell"]}}})
    terminal = show(sdk(), variables(platform))
    assert "; policy version 1" in terminal.line("connected to")
    platform.wait(platform.submit("copy", {}, AGENT, tool="shell"), GUARD)
    line = terminal.line("denied")
    assert re.search(r"^\[task_\w+\] copy denied by the policy: tool\.blocked: tool 'shell' is refused", line)


# -- the platform cannot be reached -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        WORKER + MAIN,
        sdk(),
        sdk("required=False"),
        "import os, time\nfrom sekuire import Beacon\n"
        "with Beacon('my-agent', install_token='x', api_base_url=os.environ['URL'], required=False):\n"
        "    time.sleep(600)\n",
    ],
    ids=["worker", "sdk", "not required", "beacon"],
)
def test_a_wrong_port(text: str, show: Show) -> None:
    """The first refused connection is said while the login goes on, and once."""
    terminal = show(text, of(NOWHERE, "skt"))
    line = terminal.line("cannot reach")
    assert line == (
        "cannot reach 127.0.0.1:9: Connection refused (does the platform run, and is the URL right?); retrying"
    )
    assert terminal.popen.poll() is None
    terminal.interrupt()
    terminal.end()
    assert terminal.text.count("127.0.0.1:9") == 1


@pytest.mark.parametrize("text", [WORKER + MAIN, sdk()], ids=["worker", "sdk"])
def test_an_outage(text: str, show: Show, tmp_path: Path) -> None:
    """One line when the connection is lost, and one when it is back, with how long it took."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    state = str(tmp_path / "platform.db")
    platform = LocalPlatform(state, port=port)
    platform.start()
    try:
        terminal = show(text, variables(platform))
        terminal.line("connected to")
        platform.stop()
        terminal.line("lost the connection")
        platform = LocalPlatform(state, port=port)
        platform.start()
        terminal.line("reconnected to")
        terminal.interrupt()
        terminal.end()
    finally:
        platform.stop()
    lines = [line for line in masked(terminal.lines) if "audit" not in line]
    begin = next(at for at, line in enumerate(lines) if line.startswith("connected to"))
    # A call that reaches the listener just before it closes is reset, a later one is refused.
    lines = [line.replace("Connection reset by peer", "Connection refused") for line in lines]
    assert lines[begin + 1 :] == [
        "lost the connection to http://HOST (cannot reach HOST: Connection refused); reconnecting",
        "reconnected to http://HOST after N s",
        "stopping (Ctrl-C)",
        "the worker has stopped (Ctrl-C)",
    ]


# -- one cause, one line ----------------------------------------------------------------------------------------------


class Page(http.server.BaseHTTPRequestHandler):
    """Another server: each request gets a page."""

    def do_POST(self) -> None:
        body = b"<!doctype html><html><head><title>Our shop</title></head><body><h1>Many things</h1></body></html>"
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def shop() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def sentence(terminal: Terminal, code: int = 1) -> str:
    """The one sentence of a program that ends by an error: its own line, one of the library's, and the error."""
    assert terminal.end() == code
    lines = terminal.lines
    assert lines[0] == "Traceback (most recent call last):", terminal.text
    files = [line for line in lines if line.startswith('  File "')]
    assert len(files) == 2, terminal.text
    assert "jobs.py" in files[0]
    assert [line for line in lines[1:] if not line.startswith(" ")] == lines[-1:]
    return lines[-1].partition(": ")[2]


@pytest.mark.parametrize("text", [WORKER + MAIN, sdk()], ids=["worker", "sdk"])
def test_a_refused_token(text: str, show: Show, platform: LocalPlatform) -> None:
    """One sentence, raised from one frame. A platform that was started again without its state says that."""
    assert sentence(show(text, of(platform.url, "skt_wrong"))) == (
        "the platform refused the install token: HTTP 401 INVALID_INSTALL_TOKEN: this platform has not made this "
        "install token; it belongs to another platform, or to an earlier start of this one; make a new one, and set "
        "SEKUIRE_CREDENTIALS_FILE so that restarts need none"
    )


def test_a_refused_token_of_the_command(show: Show, platform: LocalPlatform) -> None:
    """The command prints the sentence, and nothing else."""
    terminal = show(WORKER, of(platform.url, "skt_wrong"), "-m", "sekuire", "worker", "jobs:worker")
    assert terminal.end() == 1
    (line,) = terminal.lines
    assert line.startswith("sekuire worker: error: the platform refused the install token: HTTP 401")


def test_a_refusal_that_ends_nothing(show: Show, platform: LocalPlatform) -> None:
    """With required=False it is one line."""
    terminal = show(sdk("required=False", "", "import time; time.sleep(1)"), of(platform.url, "skt_wrong"))
    assert terminal.end() == 0
    assert terminal.text.count("INVALID_INSTALL_TOKEN") == 1
    assert terminal.lines[0].startswith(
        "the agent goes on without the platform: the platform refused the install token"
    )


def test_the_token_of_another_agent(show: Show, platform: LocalPlatform) -> None:
    """The error names both agents."""
    token = platform.create_install_token("other-agent")
    assert sentence(show(WORKER + MAIN, of(platform.url, token))) == (
        "the platform refused the install token: HTTP 403 WRONG_AGENT: the install token was made for the agent "
        "'other-agent'; here agent_id is 'my-agent'"
    )


def test_the_file_of_another_agent(show: Show, platform: LocalPlatform, tmp_path: Path) -> None:
    """The error names the file and both agents."""
    given = variables(platform, SEKUIRE_CREDENTIALS_FILE="credentials.json")
    first = show(sdk(), given)
    first.line("connected to")
    first.interrupt()
    first.end()
    path = tmp_path / "credentials.json"
    assert sentence(show(sdk(), {**given, "SEKUIRE_AGENT_ID": "other-agent"})) == (
        f"the credentials in {path} belong to the agent 'my-agent', and this one is 'other-agent'; give each agent "
        "credentials of its own, in a file of its own (HTTP 403 WRONG_AGENT: the runtime token belongs to the agent "
        "'my-agent')"
    )


def test_another_server(show: Show, shop: str) -> None:
    """It is named by the title of its page, and not by its HTML."""
    assert sentence(show(WORKER + MAIN, of(shop, "skt"))) == (
        f"that is another server: {shop}/api/v1/installations/bootstrap answered 200, text/html: it says 'Our shop'; "
        "is api_base_url right, or is an endpoints= override needed?"
    )


def test_https_to_a_port_without_tls(show: Show, platform: LocalPlatform) -> None:
    """The error says which scheme to use."""
    url = platform.url.replace("http://", "https://")
    text = sentence(show(WORKER + MAIN, of(url, "skt")))
    assert text.endswith("does not speak TLS on this port; check the port, or use http://")


def test_send(show: Show, shop: str, platform: LocalPlatform) -> None:
    """A refused connection has submitted nothing; a key of another platform and another server are said so."""
    cases = {
        NOWHERE: "cannot reach 127.0.0.1:9: Connection refused; nothing was submitted (does the platform run, and is "
        "the URL right?)",
        shop: f"that is another server: {shop} answered 200, text/html: it says 'Our shop'; nothing was submitted "
        "(does the platform run, and is the URL right?)",
        platform.url: "the platform refused the API key from SEKUIRE_API_KEY: HTTP 401 INVALID_API_KEY: this is not "
        "the platform's API key; it belongs to another platform, or to an earlier start of this one",
    }
    for url, text in cases.items():
        terminal = show("", of(url, "skt", SEKUIRE_API_KEY="sk_live_x"), "-m", "sekuire", "send", "copy", "{}")
        assert terminal.end() == 1
        assert terminal.lines == [f"sekuire send: error: {text}"]


# -- what was forgotten -----------------------------------------------------------------------------------------------


def test_a_worker_that_is_never_started(show: Show) -> None:
    """One line at the end names each. One that was started, stopped or used by a test is not named."""
    made = "from sekuire import create_worker\nfrom sekuire.testing import run_task\n"
    for name in ("a", "a", "b", "used", "stopped"):
        made += f"{name} = create_worker(agent_id={name!r}, install_token='x')\n"
    made += "used.on_task('copy', lambda ctx, input: input)\nrun_task(used, 'copy', {})\nstopped.stop()\n"
    terminal = show(made, {})
    assert terminal.end() == 0
    assert terminal.lines[1:] == [
        "made and never started: the Worker of agent 'a', the Worker of agent 'b'; call start()"
    ]


def test_a_program_that_ends_by_an_error(show: Show) -> None:
    """It knows why nothing was started."""
    terminal = show("from sekuire import create_worker\ncreate_worker(agent_id='a', install_token='x')\n1 / 0\n", {})
    assert terminal.end() == 1
    assert "never started" not in terminal.text
