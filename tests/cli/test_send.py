"""sekuire send: a task from the command line."""

from __future__ import annotations

import datetime as dt
import io
import json
import signal
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Dict, Iterator, List

import pytest

from sekuire import TaskError, create_worker
from sekuire.calls import waits
from sekuire.cli import access
from sekuire.local import LocalPlatform

from ..support.waiting import until
from .conftest import AGENT, POSIX_ONLY, Call, Run


@pytest.fixture
def worker(platform: LocalPlatform) -> Iterator[None]:
    """A worker that echoes, fails, and waits."""
    worker = create_worker(
        api_base_url=platform.url, agent_id=AGENT, install_token=platform.create_install_token(AGENT)
    )

    def fail(ctx: Any, input: Any) -> None:
        raise TaskError("no_luck", "not today", retryable=True, details={"tomorrow": "é"})

    worker.on_task("echo", lambda ctx, input: {"got": input, "trace": ctx.trace_id})
    worker.on_task("fail", fail)
    with worker:
        assert worker.wait_until_connected(10)
        yield


def test_it_prints_the_id(run: Run, platform: LocalPlatform, environ: Dict[str, str]) -> None:
    """Without --wait: the id of the queued task, and nothing else."""
    code, out, err = run(
        "send", "echo", '{"n": 1}', "--timeout-ms", "500", "--max-attempts", "3", "--trace-id", "t1", env=environ
    ).end()
    assert (code, err) == (0, "")
    task = platform.task(out.strip())
    assert (task["agent_id"], task["capability"], task["input"]) == (AGENT, "echo", {"n": 1})
    assert (task["timeout_ms"], task["max_attempts"], task["trace_id"]) == (500, 3, "t1")


def test_when_it_may_begin(call: Call, platform: LocalPlatform, environ: Dict[str, str]) -> None:
    """--delay and --expires-in take units; a key gets the same task."""
    args = ("send", "echo", "1", "--delay", "1.5h", "--expires-in", "2d", "--idempotency-key", "order-7")
    code, out, _ = call(*args, env=environ)
    assert code == 0
    task = platform.task(out.strip())
    created, available = (dt.datetime.fromisoformat(task[name][:-1]) for name in ("created_at", "available_at"))
    assert available - created == dt.timedelta(hours=1.5)
    assert call(*args)[1] == out
    assert call("send", "echo", "2", "--idempotency-key", "order-7")[0] == 1
    code, out, err = call("send", "echo", "1", "--expires-in", "0.05", "--wait", "30")
    assert (code, out) == (1, "")
    assert "the task failed: expired: " in err


@pytest.mark.slow
@pytest.mark.parametrize("is_quiet", [False, True])
def test_what_it_shows_while_it_waits(
    run: Run, platform: LocalPlatform, environ: Dict[str, str], is_quiet: bool
) -> None:
    """A question while nobody takes the task, then the handler's progress."""
    process = run("send", "count", "{}", "--wait", *(["--quiet"] if is_quiet else []), env=environ)
    if is_quiet:
        until(lambda: platform.count("tasks"))
    else:
        line = process.line("stderr", "the task still waits")
        assert line == f"the task still waits; is a worker running for agent '{AGENT}' with the capability 'count'?\n"
    worker = create_worker(
        api_base_url=platform.url, agent_id=AGENT, install_token=platform.create_install_token(AGENT), quiet=True
    )
    seen = threading.Event()

    @worker.on_task("count")
    def count(ctx: Any, input: Any) -> str:
        ctx.report_progress(0.5, "page 2\x1b[2J of 4")
        seen.wait(30.0)
        return "counted"

    with worker:
        if not is_quiet:
            assert process.line("stderr", "page 2") == "page 2 [2J of 4: 50 %\n"
        seen.set()
        code, out, err = process.end()
    assert (code, out) == (0, '"counted"\n')
    assert err == "" if is_quiet else "task task_" in err


@pytest.mark.parametrize("flag", ["--wait", "--wait=30"])
def test_it_waits_for_the_result(run: Run, environ: Dict[str, str], worker: None, flag: str) -> None:
    """With --wait: the output as JSON on stdout, the id on stderr."""
    code, out, err = run("send", "echo", '{"text": "é"}', "--trace-id", "t1", flag, env=environ).end()
    assert code == 0
    assert json.loads(out) == {"got": {"text": "é"}, "trace": "t1"}
    assert "é" in out
    assert err.startswith("task task_")


def test_a_failed_task(call: Call, environ: Dict[str, str], worker: None) -> None:
    """Exit 1, with code, message, advice and details on stderr, and nothing on stdout."""
    code, out, err = call("send", "fail", "null", "--wait", env=environ)
    assert (code, out) == (1, "")
    # The worker is in this process, and its lines are among them.
    assert [line for line in err.splitlines() if line.startswith("sekuire")] == [
        "sekuire send: error: the task failed: no_luck: not today (trying again may help)",
        'sekuire send: error: details: {"tomorrow": "é"}',
    ]


def test_nobody_takes_it(call: Call, environ: Dict[str, str]) -> None:
    """After the time given, exit 1 with the task's state and a question that helps."""
    code, out, err = call("send", "echo", "{}", "--wait", "0.2", env=environ)
    assert (code, out) == (1, "")
    assert f"is still queued after 0.2 s; is a worker running for agent '{AGENT}' with the capability 'echo'?" in err


@POSIX_ONLY
def test_ctrl_c_while_it_waits(run: Run, platform: LocalPlatform, environ: Dict[str, str]) -> None:
    """Exit 130; the task goes on."""
    process = run("send", "echo", "{}", "--wait", env=environ)
    task_id = process.line("stderr", "task task_").split()[1]
    process.signal(signal.SIGINT)
    code, out, err = process.end()
    assert (code, out) == (130, "")
    # Not always the last: an interrupt in the middle of an exchange leaves its socket to the collector, which tells it.
    assert "sekuire send: error: interrupted" in err.splitlines()
    # In the making of http.client's answer it leaves one without attributes, of which the collector tells too.
    assert "KeyboardInterrupt" not in err
    assert f"the task goes on; to continue, run: sekuire tasks wait {task_id}\n" in err
    assert platform.task(task_id)["status"] == "queued"


@pytest.mark.parametrize("data", [b'{"n": 1}', b'\xef\xbb\xbf{"n": 1}', b'\n [1, "\xc3\xa9"]\n', b"null", b'"text"'])
@pytest.mark.parametrize("origin", ["-", "@in put.json", "argument"])
def test_where_the_input_comes_from(
    call: Call, platform: LocalPlatform, environ: Dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    data: bytes, origin: str,
) -> None:  # fmt: skip
    """An argument, a file, or stdin; any JSON."""
    (tmp_path / "in put.json").write_bytes(data)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))
    argument = data.decode("utf-8-sig") if origin == "argument" else origin
    code, out, _ = call("send", "echo", argument, env=environ)
    assert code == 0
    assert platform.task(out.strip())["input"] == json.loads(data.decode("utf-8-sig"))


@pytest.mark.parametrize(
    ("argument", "problem"),
    [
        ("{text: hi}", "JSON: line 1, column 2: Expecting property name enclosed in double quotes; in a shell, quote"),
        ('{"a": 1,\n "b": }', "JSON: line 2, column 7: Expecting value"),
        ("", "JSON: line 1, column 1: Expecting value"),
        ("NaN", "JSON: NaN is not JSON"),
        ("[" * 100_000, "JSON: is nested too deep"),
        ("1" * 5000, "JSON: "),
        ("1e999", "the task cannot be written as JSON"),
        ('"\udcff"', "the task cannot be written as JSON"),
        ("@missing.json", "cannot read the input from 'missing.json': No such file or directory"),
        ("@.", "cannot read the input from '.': "),
        ("@latin.json", "cannot read the input from 'latin.json': it is not UTF-8 text"),
        ("@bad.json", "bad.json: line 1, column 8: Expecting"),
        ("@large.json", "cannot read the input from 'large.json': it is larger than 32 MiB"),
    ],
)
def test_input_that_is_no_json(
    call: Call, environ: Dict[str, str], tmp_path: Path, argument: str, problem: str
) -> None:
    """Exit 2, with the place of the mistake."""
    (tmp_path / "latin.json").write_bytes(b'"\xe9"')
    (tmp_path / "bad.json").write_bytes(b'{"a": 1')
    with open(tmp_path / "large.json", "wb") as file:
        file.truncate(32 * 1024 * 1024 + 1)
    code, out, err = call("send", "echo", argument, env=environ)
    if argument == "1" * 5000 and sys.version_info < (3, 11):
        pytest.skip("large integers are parsed here")
    assert (code, out) == (2, "")
    assert err.startswith(f"sekuire send: error: {problem}")
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("args", "drop", "problem"),
    [
        (["echo", "{}"], "SEKUIRE_AGENT_ID", "whose task is it? give --agent-id, or set SEKUIRE_AGENT_ID"),
        (["echo", "{}"], "SEKUIRE_API_KEY", "no API key: set SEKUIRE_API_KEY, or give --api-key-file PATH"),
        (["a,b", "{}"], "", "CAPABILITY: 'a,b' cannot name a capability"),
        (["echo", "{}", "--agent-id", "a" * 300], "", "--agent-id: must be at most 256 bytes"),
        (["echo", "{}", "--url", "ftp://x"], "", "api_base_url (from --url): must begin with https://"),
        (["echo", "{}", "--url", "http://10.0.0.1"], "", "or give --allow-insecure-http (SEKUIRE_ALLOW_INSECURE"),
        (["echo", "{}", "--api-key-file", "missing"], "", "--api-key-file: cannot read 'missing': No such file"),
        (["echo", "{}", "--api-key-file", "binary"], "", "--api-key-file: cannot read 'binary': it is not text"),
        (["echo", "{}", "--api-key-file", "empty"], "", "--api-key-file empty: is empty"),
        (["echo", "{}", "--timeout-ms", "0"], "", "--timeout-ms: must be a whole number, 1 or more, got '0'"),
        (["--wait", "echo", "{}"], "", "write --wait after CAPABILITY and JSON, or --wait=SECONDS"),
        (["echo", "{}", "--wait=-1"], "", "'-1' is not a number of seconds"),
        (["echo", "{}", "--delay", "soon"], "", "--delay: must be seconds up to 30 days, such as 90, 10m, 2h or 1d"),
        (["echo", "{}", "--delay", "31d"], "", "--delay: must be seconds up to 30 days"),
        (["echo", "{}", "--expires-in=-1"], "", "--expires-in: must be seconds up to 30 days"),
        (["echo", "{}", "--expires-in", "0"], "", "--expires-in: must be more than 0"),
        (["echo", "{}", "--idempotency-key", "é"], "", "idempotency_key: must be a str of 1 to 256 printable ASCII"),
    ],
)
def test_wrong_usage(
    call: Call, environ: Dict[str, str], tmp_path: Path, args: List[str], drop: str, problem: str
) -> None:
    """Exit 2; the option, variable or file is named; nothing is submitted."""
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    code, out, err = call("send", *args, env={name: value for name, value in environ.items() if name != drop})
    assert (code, out) == (2, "")
    assert problem in err
    assert "Traceback" not in err


def test_a_wrong_url_names_the_variable(call: Call, environ: Dict[str, str]) -> None:
    code, _, err = call("send", "echo", "{}", env={**environ, "SEKUIRE_API_URL": "nonsense"})
    assert code == 2
    assert "api_base_url (from environment variable SEKUIRE_API_URL): must begin with https://" in err


def test_a_key_from_a_file(call: Call, platform: LocalPlatform, environ: Dict[str, str], tmp_path: Path) -> None:
    """The file wins over the variable; the newline at its end does no harm."""
    (tmp_path / "key").write_text(platform.api_key + "\n")
    code, _, _ = call("send", "echo", "{}", "--api-key-file", "key", env={**environ, "SEKUIRE_API_KEY": "sk_live_no"})
    assert code == 0


def test_a_refused_key(call: Call, environ: Dict[str, str]) -> None:
    """Exit 1, saying where the key came from, and never the key."""
    code, out, err = call("send", "echo", "{}", "-v", env={**environ, "SEKUIRE_API_KEY": "sk_live_canary"})
    assert (code, out) == (1, "")
    assert "the platform refused the API key from SEKUIRE_API_KEY: HTTP 401 INVALID_API_KEY" in err
    assert "canary" not in err


def test_a_refused_task(call: Call, environ: Dict[str, str]) -> None:
    """The error contains the platform's message."""
    code, _, err = call("send", "echo", "{}", "--max-attempts", "2000000000", env=environ)
    assert code == 1
    assert "HTTP 400 INVALID_REQUEST: max_attempts" in err


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The submission is sent again for a moment only."""
    monkeypatch.setattr(access, "RETRY_FOR", 0.3)


def test_nobody_answers(call: Call, environ: Dict[str, str], impatient: None) -> None:
    """A task that may or may not have been submitted: the error says so, and how to find out."""
    code, out, err = call("send", "echo", "{}", "--url", "http://127.0.0.1:9", env=environ)
    assert (code, out) == (1, "")
    assert "cannot reach 127.0.0.1:9: Connection refused; nothing was submitted" in err


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_submission_that_fails_on_the_way(
    call: Call, environ: Dict[str, str], platform: LocalPlatform, when: str
) -> None:
    """After a 5xx it is sent again under the same key, and there is one task."""
    fault = platform.faults.add(f"error:502,when={when},times=1,on=tasks")
    code, out, _ = call("send", "echo", "{}", env=environ)
    assert code == 0
    assert fault.injected == 1
    assert [one["task_id"] for one in platform._store.tasks(None, None, 10, None)[0]] == [out.strip()]


@pytest.mark.parametrize("text", ["error:503", "reset", "half-answer", "error:429,when=after", "latency:0.01"])
def test_waiting_under_faults(
    call: Call, environ: Dict[str, str], platform: LocalPlatform, worker: None, text: str
) -> None:
    """A task that was submitted is waited for through whatever happens on the way."""
    fault = platform.faults.add(f"{text}{',' if ':' in text else ':'}times=3,on=task")
    while not fault.is_over():
        code, out, _ = call("send", "echo", '{"n": 1}', "--wait", env=environ)
        assert (code, json.loads(out)["got"]) == (0, {"n": 1})
    assert fault.injected == 3


# -- a platform that misbehaves ---------------------------------------------------------------------------------------

Answers = Callable[[str], Any]


@pytest.fixture
def serve() -> Iterator[Callable[[Answers], str]]:
    """A server that answers each request with (status, body) of a function of its method."""
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    servers = []

    def start(answers: Answers) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                self.do_GET()

            def do_GET(self) -> None:
                status, body = answers(self.command)
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        servers.append((server, thread))
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server, thread in servers:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b"<html>", "that is another server"),
        (b"[]", "that is another server"),
        (b"{}", "is the URL a Sekuire platform's?"),
        (b'{"task_id": ".."}', "is the URL a Sekuire platform's?"),
    ],
)
def test_another_server(
    call: Call, environ: Dict[str, str], serve: Any, impatient: None, body: bytes, text: str
) -> None:
    """An answer that is not a task is reported as such."""
    code, out, err = call("send", "echo", "{}", "--url", serve(lambda method: (200, body)), env=environ)
    assert (code, out) == (1, "")
    assert text in err


def test_a_platform_that_stumbles(call: Call, environ: Dict[str, str], serve: Any) -> None:
    """While it waits, answers that may get better are asked for again."""
    answers = [(201, b'{"task_id": "t"}'), (503, b""), (429, b""), (200, b'{"status": "completed", "output": [1]}')]
    code, out, _ = call("send", "echo", "{}", "--wait", "--url", serve(lambda method: answers.pop(0)), env=environ)
    assert (code, json.loads(out)) == (0, [1])


@pytest.mark.parametrize(("status", "patience"), [(404, 60.0), (503, 0.1)])
def test_a_platform_that_forgets(
    call: Call, environ: Dict[str, str], serve: Any, monkeypatch: pytest.MonkeyPatch, status: int, patience: float
) -> None:
    """An answer that does not get better, at once or after a while, ends the waiting."""
    monkeypatch.setattr(waits, "_PATIENCE", patience)

    def answer(method: str) -> Any:
        return (
            (201, b'{"task_id": "t"}')
            if method == "POST"
            else (status, b'{"error": "gone", "code": "GONE", "message": "away"}')
        )

    code, _, err = call("send", "echo", "{}", "--wait", "--url", serve(answer), env=environ)
    assert code == 1
    assert f"HTTP {status} GONE: away" in err
