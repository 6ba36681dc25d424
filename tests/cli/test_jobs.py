"""sekuire send --jsonl and --csv: a task for each line of a file, however often the job is interrupted."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import signal
import stat
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any, Dict, Iterator, List

import pytest

from sekuire import SekuireClient, TaskError, create_worker
from sekuire.cli import bulk
from sekuire.local import LocalPlatform

from ..support.terminal import Terminal
from ..support.waiting import GUARD, until
from .conftest import AGENT, POSIX_ONLY, Call, Run


@pytest.fixture
def worker(platform: LocalPlatform) -> Iterator[None]:
    worker = create_worker(
        api_base_url=platform.url, agent_id=AGENT, install_token=platform.create_install_token(AGENT), quiet=True
    )

    @worker.on_task("echo")
    def echo(ctx: Any, input: Any) -> Any:
        if isinstance(input, dict) and input.get("n") == 2:
            raise TaskError("no_luck", "not today")
        return input

    with worker:
        assert worker.wait_until_connected(GUARD)
        yield


@dataclasses.dataclass
class Order:
    n: int


def lines_of(count: int) -> str:
    return "".join(json.dumps({"n": number}) + "\n" for number in range(count))


def submitted(client: SekuireClient) -> List[str]:
    """The inputs of all tasks of the platform, as JSON."""
    return sorted(json.dumps(client.task(one["task_id"])["input"]) for one in client.tasks())


def objects(out: str) -> List[Dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


# -- a job that goes well ---------------------------------------------------------------------------------------------


def test_jsonl(call: Call, environ: Dict[str, str], client: SekuireClient, tmp_path: Path) -> None:
    """An object for each line, with its number; empty lines are counted and not sent; a BOM and CR do no harm."""
    data = b'\xef\xbb\xbf{"a": 1}\r\n\n"text"\n   \nnull\n[1, "\xc3\xa9"]'
    (tmp_path / "some.jsonl").write_bytes(data)
    code, out, err = call(
        "send", "echo", "some.jsonl", "--jsonl", "--delay", "1h", "--expires-in", "2h", "--trace-id", "t", env=environ
    )
    assert code == 0
    assert err.splitlines()[-1] == "job 'some.jsonl': 4 submitted"
    found = objects(out)
    assert [one["line"] for one in found] == [1, 3, 5, 6]
    assert [client.task(one["task_id"])["input"] for one in found] == [{"a": 1}, "text", None, [1, "é"]]
    task = client.task(found[0]["task_id"])
    assert (task["agent_id"], task["capability"], task["trace_id"]) == (AGENT, "echo", "t")
    assert task["available_at"] > task["created_at"]


@pytest.mark.parametrize("argument", ["some.csv", "@some.csv"])
def test_csv(call: Call, environ: Dict[str, str], client: SekuireClient, tmp_path: Path, argument: str) -> None:
    """Each row is an object of texts; cells may have commas, quotes and line ends."""
    (tmp_path / "some.csv").write_bytes(b'\xef\xbb\xbfid, name\r\n1,"a,\r\nb ""c"""\r\n\r\n2,\xc3\xa9\r\n')
    code, out, _ = call("send", "echo", argument, "--csv", env=environ)
    assert code == 0
    found = objects(out)
    assert [one["line"] for one in found] == [2, 5]
    inputs = [client.task(one["task_id"])["input"] for one in found]
    assert inputs == [{"id": "1", "name": 'a,\r\nb "c"'}, {"id": "2", "name": "é"}]


@pytest.mark.parametrize(("option", "between"), [(";", ";"), ("tab", "\t"), ("|", "|")])
def test_other_delimiters(
    call: Call, environ: Dict[str, str], client: SekuireClient, tmp_path: Path, option: str, between: str
) -> None:
    (tmp_path / "some.csv").write_text(f"a{between}b\n1{between}2,5\n")
    assert call("send", "echo", "some.csv", "--csv", "--delimiter", option, env=environ)[0] == 0
    assert submitted(client) == ['{"a": "1", "b": "2,5"}']


@pytest.mark.parametrize("wait", ["--wait", "--wait=60"])
def test_results(call: Call, environ: Dict[str, str], worker: None, tmp_path: Path, wait: str) -> None:
    """With --wait: each line's output or error; a failed task makes the exit code 1."""
    (tmp_path / "some.jsonl").write_text(lines_of(5))
    code, out, err = call("send", "echo", "some.jsonl", "--jsonl", wait, env=environ)
    assert code == 1
    found = {one.pop("line"): one for one in objects(out)}
    assert sorted(found) == [1, 2, 3, 4, 5]
    assert found[1] == {"task_id": found[1]["task_id"], "status": "completed", "output": {"n": 0}}
    error = {"code": "no_luck", "message": "not today", "retryable": False}
    assert found[3] == {"task_id": found[3]["task_id"], "status": "failed", "error": error}
    assert err.splitlines()[-1] == "job 'some.jsonl': 4 completed, 1 failed"
    assert "some.jsonl: 5 of 5 (100 %)" in err
    (tmp_path / "good.jsonl").write_text("1\n")
    code, _, err = call("send", "echo", "good.jsonl", "--jsonl", wait, "--quiet")
    assert (code, err) == (0, "")


def test_results_that_do_not_come(call: Call, environ: Dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "some.jsonl").write_text("1\n2\n")
    code, out, err = call("send", "echo", "some.jsonl", "--jsonl", "--wait", "0.1", env=environ)
    assert (code, {one["status"] for one in objects(out)}) == (1, {"queued"})
    assert err.splitlines()[-1] == "job 'some.jsonl': 2 not ended in time"


def test_a_result_that_is_too_large(
    call: Call, environ: Dict[str, str], tmp_path: Path, worker: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is an outcome of its line; the others go on, and the job can be completed."""
    monkeypatch.setattr("sekuire.cli.access._MOST_OF_A_TASK", 1000)
    (tmp_path / "some.jsonl").write_text(json.dumps({"n": "x" * 2_000_000}) + "\n" + '{"n": 1}\n')
    code, out, err = call("send", "echo", "some.jsonl", "--jsonl", "--wait", env=environ)
    found = {one["line"]: one for one in objects(out)}
    assert (code, found[2]["status"], found[1]["status"]) == (1, "completed", "unknown")
    assert found[1]["error"]["code"] == "not_read"
    assert "the answer is larger than" in found[1]["error"]["message"]
    assert err.splitlines()[-1] == "job 'some.jsonl': 1 completed, 1 unknown"
    code, out, _ = call("tasks", "wait", found[1]["task_id"], found[2]["task_id"])
    assert (code, [one["status"] for one in objects(out)]) == (1, ["unknown", "completed"])


@pytest.mark.slow
def test_stdin(run: Run, environ: Dict[str, str], client: SekuireClient, tmp_path: Path) -> None:
    """Two runs with the same input are two jobs, unless they are named; a named one keeps its tasks."""
    (tmp_path / "some").write_text(lines_of(3))

    def send(*args: str) -> List[str]:
        with open(tmp_path / "some", "rb") as file:
            process = run("send", "echo", *args, env=environ, stdin=file)
            code, out, _ = process.end()
        assert code == 0
        return [one["task_id"] for one in objects(out)]

    first, second = send("-", "--jsonl"), send("--jsonl", "-")
    third, fourth = send("-", "--jsonl", "--job", "mine"), send("-", "--jsonl", "--job", "mine")
    assert third == fourth
    assert len({*first, *second, *third}) == 9
    assert len(submitted(client)) == 9
    # A complete job of a pipe leaves nothing behind.
    assert len(list((tmp_path / ".sekuire" / "jobs").glob("*.json"))) == 1


def test_the_keys(
    call: Call, environ: Dict[str, str], platform: LocalPlatform, client: SekuireClient, tmp_path: Path
) -> None:
    """A key is SHA-256 of job, line number and line, so that another program can find the same task."""
    (tmp_path / "some.jsonl").write_text('{"n": 1}\n')
    task_id = objects(call("send", "echo", "some.jsonl", "--jsonl", "--job", "mine", env=environ)[1])[0]["task_id"]
    key = hashlib.sha256(b'mine\0001\0{"n": 1}').hexdigest()
    assert client.submit("echo", {"n": 1}, idempotency_key=key).id == task_id


def test_a_key_field(call: Call, environ: Dict[str, str], client: SekuireClient, tmp_path: Path) -> None:
    """Lines may change places and keep their tasks; a changed line is refused, and the others are sent."""
    path = tmp_path / "some.csv"
    path.write_text("id,name\n1,a\n2,b\n3,c\n")
    args = ("send", "echo", "some.csv", "--csv", "--key-field", "id")
    first = {client.task(one["task_id"])["input"]["id"]: one["task_id"] for one in objects(call(*args, env=environ)[1])}
    path.write_text("id,name\n3,c\n4,d\n1,changed\n2,b\n")
    code, out, err = call(*args)
    found = objects(out)
    assert code == 1
    assert [one["line"] for one in found] == [2, 3, 4, 5]
    assert [one.get("task_id") for one in (found[0], found[3])] == [first["3"], first["2"]]
    assert found[2]["status"] == "refused"
    assert found[2]["error"]["code"] == "IDEMPOTENCY_KEY_REUSED"
    assert err.splitlines()[-1] == "job 'some.csv': 1 refused, 3 submitted"
    assert len(submitted(client)) == 4


# -- wrong input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "data", "problem"),
    [
        (["--jsonl"], b"", "file has no lines; nothing was submitted"),
        (["--jsonl"], b"\n \n", "file has no lines; nothing was submitted"),
        (["--csv"], b"", "file has no lines; nothing was submitted"),
        (["--csv"], b"a,b\n", "file has no lines; nothing was submitted"),
        (["--jsonl"], b'{"a": 1}\n{"a": 2\n', "file, line 2: column 8: Expecting ',' delimiter"),
        (["--jsonl"], b'{"a": 1}\n\n{a: 2}\n', "file, line 3: column 2: Expecting property name"),
        (["--jsonl"], b'[\n{"a": 1}\n]', "file, line 1: column 2: Expecting value; JSON Lines have a whole value"),
        (["--jsonl"], b"1\nNaN\n", "file, line 2: NaN is not JSON"),
        (["--jsonl"], b"1\n1e999\n", "file, line 2: the task cannot be written as JSON"),
        (["--jsonl"], b'1\n"\\ud800"\n', "file, line 2: the task cannot be written as JSON"),
        (["--jsonl"], b"1\n" + b"[" * 100_000, "file, line 2: it is nested too deep"),
        (["--jsonl"], b'1\n"\xe9"\n', "file, line 2: byte 2 is not UTF-8 text"),
        (["--jsonl"], '{"a": 1}\n'.encode("utf-16"), "file, line 1: the file is UTF-16 text; save it as UTF-8"),
        (["--csv"], b'{"a": 1}\n{"a": 2}\n', "file, line 1: the header looks like JSON; of JSON Lines give --jsonl"),
        (["--csv"], b"a,,b\n1,2,3\n", "file, line 1: column 2 of the header has no name"),
        (["--csv"], b"a,b,a\n1,2,3\n", "file, line 1: the header has two columns 'a'"),
        (["--csv"], b"a;b\n1;2\n", "for columns by ';', give --delimiter ';'"),
        (["--csv"], b"a\tb\n1\t2\n", "for columns by tab, give --delimiter tab"),
        (["--csv"], b"a,b\n1,2\n1,2,3\n", "file, line 3: it has 3 cells, and the header has 2"),
        (["--csv"], b"a,b\n1,2\n1\n", "file, line 3: it has 1 cell, and the header has 2"),
        (["--csv"], b'a,b\n1,2\n1,"2\n3,4\n', 'file, line 3: a cell that begins with " has no end'),
        (["--csv"], b'a,b\n1,"2"3\n', "file, line 2: "),
        (["--csv"], b"a,b\n1,\xe9\n", "file, line 2: byte 3 is not UTF-8 text"),
        (["--csv"], b"a,b\r1,2\r", "file, line 1: a line ends in CR alone; save the file with LF or CRLF"),
        (["--csv", "--key-field", "id"], b"a,b\n1,2\n", "has no column 'id' (--key-field), but 'a', 'b'"),
        (["--csv", "--key-field", "a"], b"a,b\n1,2\n3,4\n1,5\n", "line 4: 'a' has the same value as in a line before"),
        (["--csv", "--key-field", "a"], b"a,b\n,2\n", "line 2: 'a' (--key-field) must be a text or a whole number"),
        (["--jsonl", "--key-field", "a"], b'{"a": 1}\n{"b": 1}\n', "file, line 2: it has no field 'a' (--key-field)"),
        (["--jsonl", "--key-field", "a"], b'{"a": 1}\n[1]\n', "file, line 2: it has no field 'a' (--key-field)"),
        (["--jsonl", "--key-field", "a"], b'{"a": true}\n', "line 1: 'a' (--key-field) must be a text or a whole"),
        (["--jsonl", "--key-field", "a"], b'{"a": 1}\n{"a": "1"}\n', "line 2: 'a' has the same value"),
        (["--jsonl", "--csv"], b"1\n", "give --jsonl or --csv, not both"),
        (["--jsonl", "--job", ""], b"1\n", "--job: must be 1 to 200 printable characters"),
        (["--jsonl", "--job", "a\nb"], b"1\n", "--job: must be 1 to 200 printable characters"),
        (["--jsonl", "--idempotency-key", "k"], b"1\n", "--idempotency-key is for one task"),
        (["--csv", "--delimiter", "::"], b"a\n1\n", "must be one character, or tab, got '::'"),
        (["--jsonl", "--expires-in", "0"], b"1\n", "--expires-in: must be more than 0"),
        (["--job", "mine"], b"1\n", "--job goes with --jsonl or --csv"),
        (["--again"], b"1\n", "--again goes with --jsonl or --csv"),
    ],
)  # fmt: skip
def test_wrong_input(
    call: Call, environ: Dict[str, str], client: SekuireClient, tmp_path: Path, args: List[str], data: bytes,
    problem: str,
) -> None:  # fmt: skip
    """Exit 2 and nothing is submitted, not even the good lines: the whole file is checked first."""
    (tmp_path / "file").write_bytes(data)
    code, out, err = call("send", "echo", "file", *args, env=environ)
    assert (code, out) == (2, "")
    assert problem in err
    assert "Traceback" not in err
    assert submitted(client) == []


@pytest.mark.parametrize("name", ["missing", "."])
def test_a_file_that_cannot_be_read(call: Call, environ: Dict[str, str], name: str) -> None:
    code, out, err = call("send", "echo", name, "--jsonl", env=environ)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert f"cannot read {name!r}: " in err


def test_a_csv_file_as_jsonl(call: Call, environ: Dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "some.csv").write_text("a,b\n1,2\n")
    code, _, err = call("send", "echo", "some.csv", "--jsonl", env=environ)
    assert (code, "line 1: column 1: Expecting value; of a CSV file give --csv; nothing was submitted" in err) == (
        2,
        True,
    )


def test_a_file_without_the_option(call: Call, environ: Dict[str, str], tmp_path: Path) -> None:
    """Whoever forgets the option is reminded of it."""
    (tmp_path / "some.csv").write_text("a,b\n1,2\n")
    code, _, err = call("send", "echo", "some.csv", env=environ)
    assert code == 2
    assert "some.csv is a file: give @some.csv for its JSON, or add --jsonl or --csv for a task for each line" in err


@pytest.mark.slow
@POSIX_ONLY
def test_a_wrong_line_of_a_pipe(run: Run, environ: Dict[str, str], client: SekuireClient) -> None:
    """What comes before it has been submitted by then: the error says how to go on, and going on loses nothing."""

    def send(data: bytes, *args: str) -> Any:
        reader, writer = os.pipe()
        process = run("send", "echo", "-", "--jsonl", *args, env=environ, stdin=reader)
        os.close(reader)
        with os.fdopen(writer, "wb") as pipe:
            pipe.write(data)
        return process.end()

    code, out, err = send(b"1\n2\n{\n4\n", "--job", "mine")
    assert (code, len(objects(out))) == (2, 2)
    assert "sekuire send: error: stdin, line 3: column 2" in err
    assert "to continue, run: sekuire send echo - --jsonl --job mine (with the same input)" in err
    code, out, _ = send(b"1\n2\n3\n4\n", "--job", "mine")
    assert (code, len(objects(out))) == (0, 4)
    assert submitted(client) == ["1", "2", "3", "4"]
    assert send(b"")[::2][0] == 2


def test_check(call: Call, environ: Dict[str, str], platform: LocalPlatform, tmp_path: Path) -> None:
    """With --check the inputs are checked against the published schema, before any is sent."""
    worker = create_worker(
        api_base_url=platform.url, agent_id=AGENT, install_token=platform.create_install_token(AGENT), quiet=True
    )

    @worker.on_task("order")
    def order(ctx: Any, input: Order) -> None:
        """Accept an order."""

    with worker:
        assert worker.wait_until_connected(GUARD)
        until(lambda: any("input_schema" in one for one in platform.installations()[0]["capability_info"]))
        (tmp_path / "some.jsonl").write_text('{"n": 1}\n{"n": "x"}\n{"m": 1}\n')
        code, out, err = call("send", "order", "some.jsonl", "--jsonl", "--check", env=environ)
    assert (code, out) == (2, "")
    assert "some.jsonl, line 2: input.n: 'x' is not of type 'integer'" in err
    assert "some.jsonl, line 3: input: 'n' is a required property" in err


# -- continuing -------------------------------------------------------------------------------------------------------


def test_again(call: Call, environ: Dict[str, str], client: SekuireClient, tmp_path: Path) -> None:
    """The same command keeps the tasks, --again makes new ones, and from then on the same command keeps those."""
    (tmp_path / "some.jsonl").write_text(lines_of(3))
    send = ("send", "echo", "some.jsonl", "--jsonl")
    first = call(*send, env=environ)[1]
    code, out, err = call(*send)
    assert (code, out) == (0, first)
    assert "job 'some.jsonl' began 0 s ago and goes on: a line that was sent keeps its task" in err
    code, out, err = call(*send, "--again")
    assert (code, out != first) == (0, True)
    assert "begins once more: every line makes a new task" in err
    assert call(*send)[1] == out
    assert len(submitted(client)) == 6


def age(tmp_path: Path, hours: float) -> None:
    """Have the job have begun so many hours sooner."""
    (path,) = (tmp_path / ".sekuire" / "jobs").glob("*.json")
    state = json.loads(path.read_text())
    began = time.gmtime(time.time() - hours * 3600)
    state["began_at"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", began)
    path.write_text(json.dumps(state))


def test_after_a_day(call: Call, environ: Dict[str, str], client: SekuireClient, tmp_path: Path) -> None:
    """The platform has forgotten the keys: it is refused, and --again says that it may happen."""
    (tmp_path / "some.jsonl").write_text(lines_of(2))
    send = ("send", "echo", "some.jsonl", "--jsonl")
    assert call(*send, env=environ)[0] == 0
    age(tmp_path, 23)
    assert call(*send)[0] == 0
    age(tmp_path, 25)
    code, out, err = call(*send)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert "job 'some.jsonl' began 25 h ago, and the platform knows a line for 24 hours only" in err
    assert "give --again" in err
    assert len(submitted(client)) == 2
    assert call(*send, "--again")[0] == 0
    assert len(submitted(client)) == 4
    # It is continued from its second beginning now.
    assert call(*send)[0] == 0
    assert len(submitted(client)) == 4


def test_a_job_of_the_future(call: Call, environ: Dict[str, str], client: SekuireClient, tmp_path: Path) -> None:
    """The clock was set back: how long the platform has known the keys cannot be said."""
    (tmp_path / "some.jsonl").write_text(lines_of(2))
    send = ("send", "echo", "some.jsonl", "--jsonl")
    assert call(*send, env=environ)[0] == 0
    age(tmp_path, -1)
    code, out, err = call(*send)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert "which is still to come: the clock was changed" in err
    assert len(submitted(client)) == 2
    assert call(*send, "--again")[0] == 0


def test_another_job_of_the_name(call: Call, environ: Dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "some.jsonl").write_text("1\n")
    assert call("send", "echo", "some.jsonl", "--jsonl", env=environ)[0] == 0
    for args, problem in (
        (("shout", "some.jsonl"), "for the capability 'echo', not 'shout'; give --job NAME"),
        (("echo", "some.jsonl", "--agent-id", "other"), f"for the agent {AGENT!r}, not 'other'; give --job NAME"),
    ):
        code, out, err = call("send", *args, "--jsonl")
        assert (code, out) == (2, "")
        assert problem in err
    assert call("send", "shout", "some.jsonl", "--jsonl", "--job", "shouting")[0] == 0


@POSIX_ONLY
def test_the_state_is_private(call: Call, environ: Dict[str, str], tmp_path: Path) -> None:
    """Directory and file belong to the user alone, and version control ignores them. Others' are refused."""
    (tmp_path / "some.jsonl").write_text("1\n")
    send = ("send", "echo", "some.jsonl", "--jsonl")
    assert call(*send, env=environ)[0] == 0
    (path,) = (tmp_path / ".sekuire" / "jobs").glob("*.json")
    assert [stat.S_IMODE(one.stat().st_mode) for one in (path, path.parent)] == [0o600, 0o700]
    assert (tmp_path / ".sekuire" / ".gitignore").read_text() == "*\n"
    assert environ["SEKUIRE_API_KEY"] not in path.read_text()
    path.chmod(0o666)
    code, _, err = call(*send)
    assert (code, "can be read by others; run: chmod 600" in err) == (2, True)
    path.chmod(0o600)
    path.write_text("{")
    code, _, err = call(*send)
    assert (code, "it is damaged; remove the file if its lines may make new tasks" in err) == (2, True)


@POSIX_ONLY
def test_where_the_state_is(call: Call, environ: Dict[str, str], tmp_path: Path) -> None:
    """--job-dir names another directory; a place that cannot be used is an error before anything is sent."""
    (tmp_path / "some.jsonl").write_text("1\n")
    assert call("send", "echo", "some.jsonl", "--jsonl", "--job-dir", "here", env=environ)[0] == 0
    assert len(list((tmp_path / "here").glob("*.json"))) == 1
    assert not (tmp_path / ".sekuire").exists()
    (tmp_path / ".sekuire").write_text("")
    code, out, err = call("send", "echo", "some.jsonl", "--jsonl")
    assert (code, out) == (2, "")
    assert "the directory '.sekuire' is not a directory; move the file away; give --job-dir DIR" in err


# -- interruptions ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@POSIX_ONLY
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("wait", [False, True])
@pytest.mark.parametrize("is_piped", [False, True])
def test_an_interrupted_job(
    run: Run, environ: Dict[str, str], client: SekuireClient, platform: LocalPlatform, worker: None, tmp_path: Path,
    number: signal.Signals, wait: bool, is_piped: bool,
) -> None:  # fmt: skip
    """Ctrl-C or a kill in the middle, and the same command again: exactly one task for each line."""
    count = 600
    path = tmp_path / "some.jsonl"
    path.write_text(lines_of(count))
    platform.faults.add("latency:0.01-0.03,on=tasks")
    args = ["send", "echo", "-" if is_piped else "some.jsonl", "--jsonl", *(["--wait"] if wait else [])]

    def start(*args: str) -> Any:
        if not is_piped:
            return run(*args, env=environ)
        with open(path, "rb") as file:
            return run(*args, env=environ, stdin=file)

    process = start(*args, *(["--job", "mine"] if is_piped else []))
    process.line("stdout", '"line": 20')
    process.signal(number)
    code, out, err = process.end()
    first = objects("".join(line for line in out.splitlines(True) if line.endswith("\n")))
    assert 0 < len(first) < count
    again = [*args, *(["--job", "mine"] if is_piped else [])]
    if number == signal.SIGINT:
        assert code == 130
        assert "sekuire send: error: interrupted" in err
        assert "Traceback" not in err
        command = process.line("stderr", "to continue, run: sekuire ").partition("sekuire ")[2].partition(" (")[0]
        assert command.split() == again
    code, out, _ = start(*again).end()
    # One handler fails.
    assert code == (1 if wait else 0)
    found = objects(out)
    assert sorted(one["line"] for one in found) == list(range(1, count + 1))
    task_of = {one["line"]: one["task_id"] for one in found}
    assert {one["line"]: one["task_id"] for one in first}.items() <= task_of.items()
    assert Counter(submitted(client)) == Counter(json.dumps({"n": number}) for number in range(count))


@pytest.mark.slow
@POSIX_ONLY
def test_a_job_without_a_name_is_continued(
    run: Run, environ: Dict[str, str], client: SekuireClient, platform: LocalPlatform, tmp_path: Path
) -> None:
    """The command that Ctrl-C prints has the name that the job was given."""
    path = tmp_path / "some.jsonl"
    path.write_text(lines_of(400))
    platform.faults.add("latency:0.01-0.03,on=tasks")
    with open(path, "rb") as file:
        process = run("send", "echo", "-", "--jsonl", "--again", env=environ, stdin=file)
    process.line("stdout", '"line": 20')
    process.signal(signal.SIGINT)
    process.end()
    line = process.line("stderr", "to continue, run: sekuire ")
    command = line.partition("sekuire ")[2].partition(" (")[0].split()
    assert command[:5] == ["send", "echo", "-", "--jsonl", "--job"]
    with open(path, "rb") as file:
        assert run(*command, env=environ, stdin=file).end()[0] == 0
    assert len(submitted(client)) == 400


@pytest.mark.slow
@POSIX_ONLY
def test_a_reader_that_leaves(run: Run, environ: Dict[str, str], client: SekuireClient, tmp_path: Path) -> None:
    """`| head`: it ends without a word, and the same command continues."""
    (tmp_path / "some.jsonl").write_text(lines_of(500))
    reader, writer = os.pipe()
    process = run("send", "echo", "some.jsonl", "--jsonl", env=environ, stdout=writer)
    os.close(writer)
    assert os.read(reader, 1) == b"{"
    os.close(reader)
    code, _, err = process.end()
    assert code == 1
    assert "error" not in err
    assert "Traceback" not in err
    assert len(submitted(client)) <= 500
    assert run("send", "echo", "some.jsonl", "--jsonl", env=environ).end()[0] == 0
    assert len(submitted(client)) == 500


@pytest.mark.parametrize("kind", ["error:503", "reset", "reset:when=after", "half-answer"])
def test_faults_on_the_way(
    call: Call, environ: Dict[str, str], platform: LocalPlatform, client: SekuireClient, tmp_path: Path, kind: str
) -> None:
    """What goes wrong on the way costs time, and makes no task twice."""
    (tmp_path / "some.jsonl").write_text(lines_of(60))
    platform.faults.add(f"{kind}{',' if ':' in kind else ':'}rate=0.2,on=tasks")
    assert call("send", "echo", "some.jsonl", "--jsonl", env=environ)[0] == 0
    platform.faults.clear()
    assert len(submitted(client)) == 60


def test_a_platform_that_goes_away(
    call: Call, environ: Dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job stops, says what is wrong, and how to continue."""
    monkeypatch.setattr(bulk, "RETRY_FOR", 0.2)
    (tmp_path / "some.jsonl").write_text(lines_of(3))
    code, out, err = call("send", "echo", "some.jsonl", "--jsonl", "--url", "http://127.0.0.1:9", env=environ)
    assert (code, out) == (1, "")
    assert "cannot reach 127.0.0.1:9" in err
    assert "job 'some.jsonl': nothing submitted" in err
    assert "to continue, run: sekuire send echo some.jsonl --jsonl --url http://127.0.0.1:9" in err


@pytest.mark.slow
@POSIX_ONLY
@pytest.mark.parametrize("wait", [(), ("--wait",)])
def test_ctrl_c_while_nobody_answers(
    run: Run, silent_url: str, environ: Dict[str, str], tmp_path: Path, wait: Any
) -> None:
    """Neither one Ctrl-C nor a second leaves a traceback, and the process does not wait for the platform."""
    (tmp_path / "some.jsonl").write_text(lines_of(3))
    process = run("send", "echo", "some.jsonl", "--jsonl", *wait, "--url", silent_url, env=environ)
    process.line("stderr", "0 of 3")
    time.sleep(0.5)
    process.signal(signal.SIGINT)
    process.line("stderr", "to continue, run:")
    began = time.monotonic()
    process.signal(signal.SIGINT)
    code, out, err = process.end()
    assert (code, out) == (130, "")
    assert "Traceback" not in err
    # A connection that waits for an answer does so for 13 seconds.
    assert time.monotonic() - began < 10


def test_a_refused_key(call: Call, environ: Dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "some.jsonl").write_text(lines_of(300))
    code, out, err = call("send", "echo", "some.jsonl", "--jsonl", env={**environ, "SEKUIRE_API_KEY": "sk_live_canary"})
    assert (code, out) == (1, "")
    assert "the platform refused the API key from SEKUIRE_API_KEY: HTTP 401 INVALID_API_KEY" in err
    assert "canary" not in err


# -- many lines -------------------------------------------------------------------------------------------------------

#: Runs a command line and prints on stderr how many MiB the process has had at most. The figure of getrusage() would be
#: that of this process, which has the platform: a child inherits it.
MEASURED = """
import sys
from sekuire.cli import main
code = main(sys.argv[1:])
with open("/proc/self/status") as file:
    print("peak", *[int(line.split()[1]) // 1024 for line in file if line.startswith("VmHWM")], file=sys.stderr)
sys.exit(code)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's /proc")
def test_ten_thousand_lines(run: Run, environ: Dict[str, str], worker: None, tmp_path: Path) -> None:
    """10,000 lines of 5 KB, and 2,000 with their results, in the memory that 50 need and a little more."""
    padding = "x" * 5000

    def peak(count: int, *args: str) -> int:
        name = f"some-{count}.jsonl"
        with open(tmp_path / name, "w") as file:
            for number in range(count):
                file.write(json.dumps({"id": number, "padding": padding}) + "\n")
        process = run("send", "echo", name, "--jsonl", *args, env=environ, program=("-c", MEASURED))
        code, out, err = process.end()
        assert code == 0, err[-2000:]
        assert sorted(one["line"] for one in objects(out)) == list(range(1, count + 1))
        return int(err.split("peak ")[1])

    few = peak(50)
    # The inputs are 50 MB. With 2,000 results, inputs and outputs are 20 MB.
    assert peak(10_000) < few + 15
    assert peak(2_000, "--wait") < few + 15


@pytest.mark.slow
@POSIX_ONLY
def test_progress_in_a_terminal(tmp_path: Path, environ: Dict[str, str], worker: None) -> None:
    """On a terminal a bar is drawn below the lines, which stay whole."""
    (tmp_path / "some.jsonl").write_text(lines_of(50))
    terminal = Terminal(["-m", "sekuire", "send", "echo", "some.jsonl", "--jsonl", "--wait"], tmp_path, environ)
    try:
        assert terminal.end() == 1
        assert "50/50" in terminal.text
        shown = [line.rpartition("\r")[2] for line in terminal.lines]
        assert len([line for line in shown if line.startswith("{")]) == 50
        assert shown[-1] == "job 'some.jsonl': 49 completed, 1 failed"
    finally:
        terminal.close()


def test_threads_end(call: Call, environ: Dict[str, str], worker: None, tmp_path: Path) -> None:
    """No thread of a job outlives it, in a program that calls main()."""
    (tmp_path / "some.jsonl").write_text(lines_of(20))
    call("send", "echo", "some.jsonl", "--jsonl", "--wait", env=environ)
    until(lambda: not [one for one in threading.enumerate() if one.name.startswith(("sekuire-job", "sekuire-submit"))])
