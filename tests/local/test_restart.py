"""What a database on disk keeps, over a proper end and over a kill."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest

from sekuire.errors import ConfigurationError
from sekuire.local import LocalPlatform

from ..contract.client import Client, Installation
from .conftest import client_of

Make = Callable[..., LocalPlatform]

SERVE = """
import json, sys
from sekuire.local import LocalPlatform
with LocalPlatform(sys.argv[1], port=int(sys.argv[2]), redelivery_delay=0.2) as platform:
    print(json.dumps([platform.url, platform.api_key]), flush=True)
    sys.stdin.read()
"""


class Process:
    """A platform in a process of its own."""

    def __init__(self, path: Path, port: int = 0) -> None:
        self._popen = subprocess.Popen(
            [sys.executable, "-c", SERVE, str(path), str(port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._popen.stdout is not None
        self.url, self.api_key = json.loads(self._popen.stdout.readline())
        self.port = int(self.url.rpartition(":")[2])
        self.client = Client(self.url, self.api_key)

    def kill(self) -> None:
        self._popen.kill()
        self._popen.communicate()


@pytest.fixture
def run() -> Iterator[Callable[..., Process]]:
    made = []

    def run(*args: Any) -> Process:
        process = Process(*args)
        made.append(process)
        return process

    yield run
    for process in made:
        process.kill()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "platform.db"


def test_everything_survives_a_kill(run: Callable[..., Process], path: Path) -> None:
    """After SIGKILL and a restart there are the same key, tokens and tasks; what was running comes again."""
    first = run(path)
    installation = first.client.install()
    with installation.stream() as stream:
        done, running = installation.submit(input=1), installation.submit(input=2)
        stream.next("task")
        stream.next("task")
        assert installation.complete(done, output="kept").status == 200
        installation.command("pause")
        installation.command("resume", reason="later")
        first.kill()
    second = run(path, first.port)
    assert second.api_key == first.api_key
    client = second.client
    assert client.task(done)["output"] == "kept"
    revived = Installation(client, installation.agent_id, installation.grant)
    assert revived.complete(done, output="kept").status == 200, "the same completion again"
    with revived.stream(last_event_id="1") as stream:
        assert stream.next("command")["reason"] == "later", "ids of events go on"
        task = stream.next("task")
        assert (task["task_id"], task["attempt"], task["input"]) == (running, 1, 2)
        assert revived.refresh(installation.grant["refresh_token"]).status == 200


def test_another_worker_gets_the_tasks_of_before_the_kill(run: Callable[..., Process], path: Path) -> None:
    """A worker that does not come back after a restart loses its tasks to another."""
    first = run(path)
    installation = first.client.install()
    with installation.stream("gone") as stream:
        task_id = installation.submit()
        stream.next("task")
        first.kill()
    second = run(path)
    with Installation(second.client, installation.agent_id, installation.grant).stream("heir") as stream:
        task = stream.next("task")
    assert (task["task_id"], task["attempt"]) == (task_id, 2)


def test_answers_are_repeated_after_a_restart(make: Make, path: Path) -> None:
    """The answer of a bootstrap that got lost in a restart is given again to the same key."""
    platform = make(path=path)
    token = platform.create_install_token("a")
    lost = client_of(platform).bootstrap("a", token, "key")
    platform.stop()
    platform = make(path=path)
    assert client_of(platform).bootstrap("a", token, "key").body == lost.body


def test_ids_of_events_go_on(make: Make, path: Path) -> None:
    """Ids of events rise over a restart."""
    ids = []
    for _ in range(2):
        platform = make(path=str(path))
        installation = client_of(platform).install()
        with installation.stream() as stream:
            platform.command(installation.id, "pause")
            ids.append(int(stream.next().id))
        platform.stop()
    assert ids[0] < ids[1]


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX")
def test_the_file_is_its_owners(make: Make, path: Path) -> None:
    """The database and its journal are readable by their owner only."""
    make(path=path).submit("c", {}, agent_id="a")
    for name in (path, Path(f"{path}-wal")):
        assert stat.S_IMODE(name.stat().st_mode) == 0o600


def test_secrets_are_not_in_the_file(make: Make, path: Path) -> None:
    """Beyond the window of repeated answers no token can be read from the file."""
    platform = make(path=path, idempotency_window=0.0)
    installation = client_of(platform).install()
    second = installation.refresh(installation.grant["refresh_token"]).body
    token = platform.create_install_token("a")
    platform.stop()
    content = path.read_bytes()
    for secret in (installation.token, installation.grant["refresh_token"], second["refresh_token"], token):
        assert secret.encode() not in content
    assert platform.api_key.encode() in content, "made for printing, and kept"


@pytest.mark.slow
def test_one_platform_per_file(make: Make, path: Path) -> None:
    """A second platform on the same file is refused while the first runs, and welcome afterwards."""
    first = make(path=path)
    with pytest.raises(ConfigurationError, match="in use") as caught:
        LocalPlatform(path)
    assert caught.value.option == "path"
    first.stop()
    make(path=path)


def test_a_stopped_platform_says_so(path: Path) -> None:
    """Questions to a stopped platform with a file are answered with what to do."""
    platform = LocalPlatform(path)
    with platform:
        pass
    with pytest.raises(ConfigurationError, match=r"call start\(\)"):
        platform.installations()


def test_unusable_paths_are_explained(tmp_path: Path) -> None:
    """A path that cannot be used is refused at construction, with the reason and the way out."""
    text = tmp_path / "text"
    text.write_text("this is not a database, but long enough to look at" * 50)
    other = tmp_path / "other.db"
    db = sqlite3.connect(other)
    db.execute("CREATE TABLE theirs (x)")
    db.commit()
    db.close()
    old = tmp_path / "old.db"
    with LocalPlatform(old):
        pass
    db = sqlite3.connect(old)
    db.execute("PRAGMA user_version = 99")
    db.close()
    for path, match in (
        (tmp_path, "is a directory"),
        (tmp_path / "none" / "x.db", "does not exist"),
        (text, "is not an SQLite database"),
        (other, "another program"),
        (old, "schema 99"),
    ):
        with pytest.raises(ConfigurationError, match=match) as caught:
            LocalPlatform(path)
        assert caught.value.option == "path"
        assert str(path) in str(caught.value)
    assert text.read_text().startswith("this is not"), "left as it was"


def test_an_empty_file_will_do(path: Path) -> None:
    """A file of no bytes, as tempfile makes it, becomes a database."""
    path.touch()
    with LocalPlatform(path) as platform:
        platform.submit("c", {}, agent_id="a")


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_kill_in_the_middle_of_completions_loses_none(run: Callable[..., Process], path: Path) -> None:
    """Whatever was answered 200 before a kill is there after it."""
    first = run(path)
    installation = first.client.install()
    accepted = []
    with installation.stream(max_in_flight=200) as stream:
        for _ in range(100):
            installation.submit()
        for n in range(100):
            task_id = stream.next("task")["task_id"]
            if installation.complete(task_id, output=n).status == 200:
                accepted.append(task_id)
            if n == 60:
                break
        first.kill()
    second = run(path)
    assert {second.client.task(task_id)["status"] for task_id in accepted} == {"completed"}
    assert len(accepted) == 61


def test_a_file_without_the_newer_tables(tmp_path: Path) -> None:
    """A file that an earlier version of the same schema has made gets what it lacks, and keys outlive a restart."""
    path = tmp_path / "earlier.db"
    with LocalPlatform(path):
        pass
    db = sqlite3.connect(path)
    db.execute("DROP TABLE submissions")
    db.commit()
    db.close()
    body = {"agent_id": "a", "capability": "c", "input": {}}
    ids = []
    for status in (201, 200):
        with LocalPlatform(path) as platform:
            headers = {"X-API-Key": platform.api_key, "Idempotency-Key": "k"}
            answer = client_of(platform).call("POST", "/tasks", body, headers)
            assert answer.status == status
            ids.append(answer.body["task_id"])
    assert ids[0] == ids[1]
