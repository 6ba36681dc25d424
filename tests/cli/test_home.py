"""Where sekuire dev keeps its keys, tokens and tasks, and the .env that it writes."""

from __future__ import annotations

import os
import pathlib
import signal
import sqlite3
import stat
from pathlib import Path
from typing import Dict, List

import pytest

from sekuire import envfile
from sekuire.cli.exits import CommandError
from sekuire.cli.home import Home, write_env_file
from sekuire.local import LocalPlatform

from ..contract.client import Client
from ..support.users import give_to_another
from .conftest import POSIX_ONLY, Call, Process, Run
from .test_dev import exported


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture(autouse=True)
def _own_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def stop(process: Process) -> str:
    process.signal(signal.SIGTERM)
    code, _, err = process.end()
    assert code == 0
    return err


@pytest.mark.slow
@POSIX_ONLY
def test_the_same_keys_after_a_restart(run: Run, tmp_path: Path) -> None:
    """Keys, tokens and tasks are in .sekuire/, for this user only; .env holds the variables; a restart, after a kill
    too, prints the same."""
    old = os.umask(0)
    try:
        process = run("dev", "--port", "0")
        first = exported(process)
    finally:
        os.umask(old)
    process.line("stderr", "wrote .env with these variables")
    task = Client(first["SEKUIRE_API_URL"], first["SEKUIRE_API_KEY"]).submit("my-agent", "echo", 5)
    home = tmp_path / ".sekuire"
    assert mode(home) == 0o700
    assert (home / ".gitignore").read_text() == "*\n"
    assert {path.name: mode(path) for path in home.iterdir() if mode(path) != 0o600} == {}
    assert mode(tmp_path / ".env") == 0o600
    assert envfile.parse((tmp_path / ".env").read_text(), ".env") == first
    process.signal(signal.SIGKILL)
    process.end()
    port = first["SEKUIRE_API_URL"].rpartition(":")[2]
    again = run("dev", "--port", port)
    assert exported(again) == first
    again.line("stderr", ".env holds these variables")
    assert Client(first["SEKUIRE_API_URL"], first["SEKUIRE_API_KEY"]).task(task)["input"] == 5
    assert mode(home / "dev.db") == 0o600
    stop(again)
    # Other keys, no tasks. The .env stays: it is the user's.
    reset = run("dev", "--port", "0", "--reset")
    third = exported(reset)
    reset.line("stderr", "was deleted: new keys and tokens, no tasks")
    reset.line("stderr", ".env differs in SEKUIRE_API_URL, SEKUIRE_INSTALL_TOKEN, SEKUIRE_API_KEY")
    assert {name for name in first if first[name] == third[name]} == {"SEKUIRE_AGENT_ID"}
    answer = Client(third["SEKUIRE_API_URL"], third["SEKUIRE_API_KEY"]).admin("GET", f"/tasks/{task}")
    assert answer.status == 404
    stop(reset)
    assert envfile.parse((tmp_path / ".env").read_text(), ".env") == first


@pytest.mark.slow
@POSIX_ONLY
def test_in_memory(run: Run, tmp_path: Path) -> None:
    """--ephemeral leaves nothing behind."""
    keys = set()
    for _ in range(2):
        process = run("dev", "--port", "0", "--ephemeral")
        keys.add(exported(process)["SEKUIRE_API_KEY"])
        stop(process)
    assert len(keys) == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@POSIX_ONLY
@pytest.mark.parametrize("args", [[], ["--db", "platform.db"]])
def test_one_process_at_a_time(run: Run, call: Call, args: List[str]) -> None:
    """The second one names the first by its process and its address, and --reset waits for nothing."""
    process = run("dev", "--port", "0", *args)
    url = exported(process)["SEKUIRE_API_URL"]
    path = args[-1] if args else ".sekuire/dev.db"
    for more in ([], ["--reset"]):
        code, _, err = call("dev", "--port", "0", *args, *more)
        assert code == 2
        assert f"another sekuire dev uses {path} (process {process.popen.pid}, {url}); stop it, or give --db" in err
    process.signal(signal.SIGKILL)
    process.end()
    # The lock has gone with its process, whatever its file says.
    third = run("dev", "--port", "0", *args)
    exported(third)
    stop(third)


def test_a_platform_of_the_same_file(call: Call) -> None:
    """A LocalPlatform in a program of the user counts too, also for --reset."""
    with LocalPlatform("platform.db"):
        for more in ([], ["--reset"]):
            code, _, err = call("dev", "--port", "0", "--db", "platform.db", *more)
            assert code == 2
            assert "--db: platform.db: is in use" in err
    assert pathlib.Path("platform.db").exists()


@pytest.mark.parametrize("content", ["database", "text"])
def test_reset_deletes_nothing_of_others(call: Call, content: str) -> None:
    """--reset refuses a file that no local platform has made."""
    path = pathlib.Path("platform.db")
    if content == "database":
        db = sqlite3.connect(path)
        db.execute("CREATE TABLE customers (name TEXT)")
        db.close()
    else:
        path.write_text("my diary, which is long enough to be no empty file\n" * 50)
    before = path.read_bytes()
    code, _, err = call("dev", "--port", "0", "--db", "platform.db", "--reset")
    assert code == 2
    assert "--db: platform.db: is " in err
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("args", "problem"),
    [
        (["--ephemeral", "--db", "x.db"], "--ephemeral keeps nothing, so it does not go with --db"),
        (["--ephemeral", "--reset"], "--ephemeral keeps nothing, so it does not go with --reset"),
    ],
)
def test_options_that_contradict(call: Call, args: List[str], problem: str) -> None:
    code, _, err = call("dev", *args)
    assert code == 2
    assert problem in err


@POSIX_ONLY
@pytest.mark.parametrize("what", ["link", "file", "another's", "another's database", "linked database", "FIFO"])
def test_what_cannot_be_trusted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, what: str) -> None:
    """Another's directory, a link, or another's file in it is refused, and not written to."""
    home = tmp_path / ".sekuire"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    database = home / "dev.db"
    if what == "link":
        home.symlink_to(elsewhere)
    elif what == "file":
        home.write_text("")
    else:
        home.mkdir()
    if what == "another's":
        give_to_another(home, monkeypatch)
    elif what == "another's database":
        database.write_text("")
        give_to_another(database, monkeypatch)
    elif what == "linked database":
        database.symlink_to(elsewhere / "dev.db")
    elif what == "FIFO":
        os.mkfifo(database)
    with pytest.raises(CommandError) as caught, Home(None):
        pass
    [problem] = caught.value.lines
    assert ".sekuire" in problem
    assert "give --db PATH, or --ephemeral to keep nothing" in problem
    assert list(elsewhere.iterdir()) == []


@POSIX_ONLY
def test_an_open_directory_is_closed(tmp_path: Path) -> None:
    """One of this user that others may read, from an unpacked archive for example, becomes private."""
    home = tmp_path / ".sekuire"
    home.mkdir()
    home.chmod(0o777)
    with Home(None):
        assert mode(home) == 0o700


def variables(**more: str) -> Dict[str, str]:
    return {"SEKUIRE_API_URL": "http://127.0.0.1:1", "SEKUIRE_AGENT_ID": "it's me", **more}


def test_the_file_of_variables(tmp_path: Path) -> None:
    """It is made only if there is none. What is there is compared, and never changed."""
    path = tmp_path / ".env"
    assert write_env_file(".env", variables()).startswith("wrote .env")
    assert envfile.parse(path.read_text(), ".env") == variables()
    assert write_env_file(".env", variables()) == ".env holds these variables"
    before = path.read_bytes()
    said = write_env_file(".env", variables(SEKUIRE_API_KEY="new"))
    assert said == ".env differs in SEKUIRE_API_KEY, and stays as it is; remove it to have it written again"
    assert path.read_bytes() == before
    path.write_text("OTHER=1\n")
    assert "without these variables, and stays as it is" in write_env_file(".env", variables())
    path.write_text("SEKUIRE_A\n")
    assert write_env_file(".env", variables()) == ".env, line 1: must be NAME=VALUE; the file stays as it is"
    path.write_bytes(b"SEKUIRE_A=\xff\n")
    assert write_env_file(".env", variables()) == ".env cannot be read, and stays as it is"
    path.unlink()
    path.mkdir()
    assert write_env_file(".env", variables()) == ".env is not a file, so the variables are not in it"
    assert write_env_file("missing/.env", variables()) == "cannot write missing/.env: No such file or directory"


@POSIX_ONLY
def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / ".env").symlink_to(tmp_path / "target")
    write_env_file(".env", variables())
    assert not (tmp_path / "target").exists()
