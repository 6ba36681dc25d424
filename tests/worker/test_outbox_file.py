"""The outbox: what is put is there after a crash, and nothing else is."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import shutil
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any, List, Optional, Tuple, Union

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sekuire.errors import ConfigurationError
from sekuire.wire import protocol
from sekuire.wire.models import is_id
from sekuire.worker import outbox as outbox_module
from sekuire.worker import outbox_file
from sekuire.worker.outbox import Outbox, Stored, open_outbox
from sekuire.worker.outbox_file import CompletionFile

from ..support.users import OTHER, give_to_another, in_mounts
from ..support.waiting import GUARD, until

URL, AGENT = "http://127.0.0.1:1", "agent"


def stored(task_id: str, head: bytes = b'{"task_id":"t"', attempt: int = 1) -> Stored:
    return Stored(task_id, attempt, False, head)


def write(path: Path, content: Union[bytes, bytearray]) -> None:
    """Make a file that only this user can read."""
    path.touch(0o600)
    path.write_bytes(content)


def database_of(outbox: Outbox) -> sqlite3.Connection:
    assert outbox.file.database is not None
    return outbox.file.database


def test_what_is_put_is_there_when_it_is_opened_again(tmp_path: Path) -> None:
    """A completion lasts until it is removed, with its attempt and its bytes, oldest first."""
    outbox = open_outbox(tmp_path / "outbox.db")
    assert outbox.put(URL, AGENT, "inst", stored("a", b"one", attempt=3))
    assert outbox.put(URL, AGENT, "inst", stored("b", b"two"))
    assert outbox.put(URL, AGENT, "inst", stored("c"))
    outbox.remove(URL, AGENT, "c", 1)
    outbox.close()
    outbox = open_outbox(tmp_path / "outbox.db")
    owner = object()
    assert outbox.claim(URL, AGENT, owner) == [Stored("a", 3, False, b"one"), Stored("b", 1, False, b"two")]
    assert outbox.owner_of(URL, AGENT, "a") is owner
    assert outbox.claim(URL, AGENT, object()) == []
    outbox.disown(owner)
    assert [one.task_id for one in outbox.claim(URL, AGENT, object())] == ["a", "b"]
    outbox.close()


def test_a_removal_that_waits_is_not_claimed(tmp_path: Path) -> None:
    """A result that was accepted while another worker starts is not given to that one, though its row is there yet."""
    outbox = open_outbox(tmp_path / "outbox.db")
    for task_id in ("a", "b"):
        outbox.put(URL, AGENT, None, stored(task_id), "first")
    outbox.take_lead()
    outbox.remove(URL, AGENT, "a", 1)
    claimed: List[Stored] = []
    thread = threading.Thread(target=lambda: claimed.extend(outbox.claim(URL, AGENT, "second")), daemon=True)
    thread.start()
    until(lambda: outbox.visitors)
    outbox.disown("first")
    outbox.lead()
    thread.join(GUARD)
    assert [one.task_id for one in claimed] == ["b"]
    outbox.close()
    outbox = open_outbox(tmp_path / "outbox.db")
    assert [one.task_id for one in outbox.claim(URL, AGENT, object())] == ["b"]
    outbox.close()


def test_results_for_another_platform_or_agent_stay(tmp_path: Path) -> None:
    """Rows belong to a platform and an agent; nobody else is given them."""
    outbox = open_outbox(tmp_path / "outbox.db")
    mine = object()
    outbox.put(URL, AGENT, None, stored("a"), mine)
    outbox.disown(mine)
    assert outbox.claim("http://127.0.0.1:2", AGENT, object()) == []
    assert outbox.claim(URL, "other", object()) == []
    assert [one.task_id for one in outbox.claim(URL, AGENT, object())] == ["a"]
    outbox.close()


def test_workers_of_one_process_share_it(tmp_path: Path) -> None:
    """The same path is the same outbox within a process, closed by its last user."""
    first, second = open_outbox(tmp_path / "outbox.db"), open_outbox(str(tmp_path / "outbox.db"))
    assert first is second
    first.close()
    assert second.put(URL, AGENT, None, stored("a"))
    second.close()
    third = open_outbox(tmp_path / "outbox.db")
    assert third is not first
    third.close()


class Opening:
    """An ``open_outbox`` on a thread of its own."""

    def __init__(self, path: Path) -> None:
        self.outbox: Optional[Outbox] = None
        self.error: Optional[BaseException] = None
        self.thread = threading.Thread(target=self._run, args=(path,), daemon=True)
        self.thread.start()

    def _run(self, path: Path) -> None:
        try:
            self.outbox = open_outbox(path)
        except BaseException as error:
            self.error = error

    def is_waiting(self) -> bool:
        return outbox_module.openers_waiting() == 1

    def finish(self) -> Outbox:
        self.thread.join(GUARD)
        assert self.error is None, self.error
        assert self.outbox is not None
        return self.outbox


def test_one_that_is_opened_while_it_closes(tmp_path: Path) -> None:
    """Who wants the file while its last user closes it waits for that, and finds what was put last."""
    outbox = open_outbox(tmp_path / "outbox.db")
    outbox.put(URL, AGENT, None, stored("a"))
    outbox.take_lead()
    closing = threading.Thread(target=outbox.close, daemon=True)
    closing.start()
    until(lambda: outbox.visitors)
    opening = Opening(tmp_path / "outbox.db")
    until(lambda: opening.error or opening.is_waiting())
    assert opening.error is None
    # The other files of the process are not held up.
    other = open_outbox(tmp_path / "other.db")
    other.close()
    outbox.lead()
    closing.join(GUARD)
    again = opening.finish()
    assert again is not outbox
    assert [one.task_id for one in again.claim(URL, AGENT, object())] == ["a"]
    again.close()


def test_a_close_that_does_not_end_is_not_waited_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wait for another thread is bounded, and its error says what it waited for."""
    outbox = open_outbox(tmp_path / "outbox.db")
    outbox.take_lead()
    closing = threading.Thread(target=outbox.close, daemon=True)
    closing.start()
    until(lambda: outbox.visitors)
    monkeypatch.setattr(outbox_module, "_TURN_TIMEOUT", 0.01)
    with pytest.raises(ConfigurationError, match="another thread of this process has been opening or closing it"):
        open_outbox(tmp_path / "outbox.db")
    outbox.lead()
    closing.join(GUARD)
    open_outbox(tmp_path / "outbox.db").close()


@pytest.mark.parametrize("fails", [False, True])
def test_one_that_is_opened_by_two_threads(fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one thread opens the file another waits for it, and tries by itself if that failed; no other path waits."""
    entered, release = threading.Event(), threading.Event()
    real = CompletionFile.open

    def slow(file: CompletionFile) -> Any:
        if file.path.endswith("outbox.db") and not entered.is_set():
            entered.set()
            assert release.wait(GUARD)
            if fails:
                raise OSError(5, "no luck")
        return real(file)

    monkeypatch.setattr(CompletionFile, "open", slow)
    first = Opening(tmp_path / "outbox.db")
    assert entered.wait(GUARD)
    other = Opening(tmp_path / "other.db")
    other.finish().close()
    second = Opening(tmp_path / "outbox.db")
    until(second.is_waiting)
    release.set()
    outbox = second.finish()
    first.thread.join(GUARD)
    if fails:
        assert isinstance(first.error, ConfigurationError)
        assert "no luck" in str(first.error)
    else:
        assert first.outbox is outbox
        outbox.close()
    assert outbox.put(URL, AGENT, None, stored("a"))
    outbox.close()
    open_outbox(tmp_path / "outbox.db").close()


def test_a_close_too_many_harms_nobody(tmp_path: Path) -> None:
    """Closing what is closed already does nothing, neither to who has opened the file anew nor to a descriptor."""
    outbox = open_outbox(tmp_path / "outbox.db")
    outbox.close()
    again = open_outbox(tmp_path / "outbox.db")
    outbox.close()
    assert open_outbox(tmp_path / "outbox.db") is again
    again.close()
    assert again.put(URL, AGENT, None, stored("a"))
    again.close()


def test_a_close_that_fails_lets_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever ends a close, the file can be opened anew."""
    outbox = open_outbox(tmp_path / "outbox.db")

    def fail() -> None:
        raise MemoryError

    monkeypatch.setattr(outbox, "write_queued", fail)
    with pytest.raises(MemoryError):
        outbox.close()
    again = open_outbox(tmp_path / "outbox.db")
    assert again.put(URL, AGENT, None, stored("a"))
    again.close()


@pytest.mark.parametrize("has_turn", [False, True])
def test_an_interrupted_wait_for_a_turn_holds_up_no_other(
    has_turn: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread that waits for its turn at the database and is interrupted takes none, or hands it on."""
    outbox = open_outbox(tmp_path / "outbox.db")
    outbox.take_lead()

    def interrupt(ticket: Any) -> None:
        if has_turn:
            outbox.lead()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(outbox_module.Ticket, "wait", interrupt)
        with pytest.raises(KeyboardInterrupt):
            outbox.claim(URL, AGENT, object())
    if not has_turn:
        outbox.lead()
    assert outbox.visitors == []
    putting = threading.Thread(target=outbox.put, args=(URL, AGENT, None, stored("a")), daemon=True)
    putting.start()
    putting.join(GUARD)
    assert not putting.is_alive()
    outbox.close()


def test_another_process_is_refused(tmp_path: Path) -> None:
    """A second process on the same file gets an error that says so."""
    outbox = open_outbox(tmp_path / "outbox.db")
    script = "import sys; from sekuire.worker.outbox import open_outbox; open_outbox(sys.argv[1])"
    command = [sys.executable, "-c", script, str(tmp_path / "outbox.db")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=GUARD, check=False)
    outbox.close()
    assert run.returncode != 0
    assert "another process uses it" in run.stderr


def test_it_is_private(tmp_path: Path) -> None:
    """Results may be private: no other user can read the file or what SQLite keeps beside it."""
    outbox = open_outbox(tmp_path / "outbox.db")
    outbox.put(URL, AGENT, None, stored("a"))
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) & 0o077 for path in tmp_path.iterdir()}
    outbox.close()
    assert len(modes) >= 3
    assert set(modes.values()) == {0}


@pytest.mark.parametrize("content", [b"no database at all, but long enough to be looked at " * 40, b"torn"])
def test_a_corrupt_file_is_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes) -> None:
    """A file that cannot be read is renamed, never deleted, and its new name is told."""
    path = tmp_path / "outbox.db"
    write(path, content)
    with caplog.at_level(logging.ERROR):
        outbox = open_outbox(path)
    assert outbox.put(URL, AGENT, None, stored("a"))
    outbox.close()
    (aside,) = [one for one in tmp_path.iterdir() if ".corrupt-" in one.name]
    assert aside.read_bytes() == content
    assert str(aside) in caplog.text


def test_a_damaged_page_is_noticed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A database whose pages are overwritten is set aside, with what it holds."""
    path = tmp_path / "outbox.db"
    outbox = open_outbox(path)
    for number in range(200):
        outbox.put(URL, AGENT, None, stored(f"t{number}", b"x" * 500))
    outbox.close()
    data = bytearray(path.read_bytes())
    data[4096 * 3 : 4096 * 9] = os.urandom(4096 * 6)
    path.write_bytes(data)
    outbox = open_outbox(path)
    assert outbox.claim(URL, AGENT, object()) == []
    outbox.close()
    assert "was set aside" in caplog.text


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.builds(
            Stored,
            st.text(min_size=1, max_size=60).filter(is_id),
            st.integers(1, 2**31 - 1),
            st.booleans(),
            st.binary(max_size=200),
        ),
        max_size=5,
        unique_by=lambda one: one.task_id,
    )
)
def test_any_result_survives(results: List[Stored]) -> None:
    """Whatever a result holds, it comes back as it was, in the order in which results were put."""
    with tempfile.TemporaryDirectory() as directory:
        for turn in range(2):
            outbox = open_outbox(os.path.join(directory, "outbox.db"))
            for one in results if not turn else ():
                assert outbox.put(URL, AGENT, None, one)
            outbox.disown(None)
            assert outbox.claim(URL, AGENT, object()) == results
            outbox.close()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10**9), st.binary(min_size=1, max_size=40)), min_size=1, max_size=4))
def test_any_damage_is_survived(damage: List[Tuple[int, bytes]]) -> None:
    """Whatever bytes of the file are overwritten, it opens or is set aside; what it gives can be sent; it works on."""
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "outbox.db")
        data = bytearray(_filled())
        for place, content in damage:
            at = place % len(data)
            data[at : at + len(content)] = content
        write(Path(path), data)
        problem = ""
        try:
            outbox = open_outbox(path)
        except ConfigurationError as error:
            problem = str(error)
        if problem:
            # Its mark was hit: it may as well be another program's.
            assert "another program's" in problem or "cannot open" in problem
            assert Path(path).read_bytes() == data
            return
        for one in outbox.claim(URL, AGENT, object()):
            assert protocol.completion_key(one.task_id, one.attempt)
            assert isinstance(one.head, bytes)
        outbox.put(URL, AGENT, None, stored("new"))
        outbox.remove(URL, AGENT, "new", 1)
        outbox.close()


@functools.lru_cache
def _filled() -> bytes:
    with tempfile.TemporaryDirectory() as directory:
        outbox = open_outbox(os.path.join(directory, "outbox.db"))
        for number in range(20):
            outbox.put(URL, AGENT, "inst", stored(f"task-{number}", b'{"task_id":"t","output":"' + b"x" * 300))
        outbox.close()
        return Path(directory, "outbox.db").read_bytes()


@pytest.mark.parametrize(
    ("task_id", "attempt"),
    [
        ("CAST(X'74ff' AS TEXT)", 1),
        ("''", 1),
        ("'..'", 1),
        ("'a' || char(10)", 1),
        ("'t'", 0),
        ("'t'", "'x'"),
        ("'t'", 1.5),
    ],
)
def test_a_damaged_row_holds_up_no_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, task_id: str, attempt: object
) -> None:
    """A row that cannot be sent stays where it is, named in one log line; the others are delivered."""
    outbox = open_outbox(tmp_path / "outbox.db")
    outbox.file.database.execute(
        f"INSERT INTO completion VALUES ('{URL}', '{AGENT}', {task_id}, NULL, {attempt}, 0, X'7b', 1.0)"
    )
    outbox.put(URL, AGENT, None, stored("good"))
    outbox.disown(None)
    assert [one.task_id for one in outbox.claim(URL, AGENT, object())] == ["good"]
    (count,) = outbox.file.database.execute("SELECT count(*) FROM completion").fetchone()
    outbox.close()
    (record,) = [record for record in caplog.records if "damaged row" in record.message]
    assert record.message.isprintable()
    assert count == 2


def test_an_outbox_that_cannot_be_read_does_not_stop_a_worker(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Where reading fails, nothing is claimed, the log says so, and results are kept on all the same."""
    outbox = open_outbox(tmp_path / "outbox.db")
    outbox.put(URL, AGENT, None, stored("a"))
    outbox.disown(None)
    outbox.file.database.execute("ALTER TABLE completion RENAME TO gone")
    assert outbox.claim(URL, AGENT, object()) == []
    assert "cannot be read (no such table" in caplog.text
    outbox.file.database.execute("ALTER TABLE gone RENAME TO completion")
    assert [one.task_id for one in outbox.claim(URL, AGENT, object())] == ["a"]
    outbox.close()


class _Interrupted:
    """A database whose next statement is interrupted in the middle of a transaction."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database
        self.is_armed = True

    def execute(self, statement: str, *values: object) -> object:
        if self.is_armed and statement.startswith("INSERT"):
            self.is_armed = False
            raise MemoryError
        return self._database.execute(statement, *values)

    def close(self) -> None:
        self._database.close()


def test_an_interrupted_writer_holds_up_no_other(tmp_path: Path) -> None:
    """Whatever ends the thread that writes for all, nobody waits for it, and the next transaction is a new one."""
    outbox = open_outbox(tmp_path / "outbox.db")
    outbox.file.database = _Interrupted(outbox.file.database)  # type: ignore[assignment]
    with pytest.raises(MemoryError):
        outbox.put(URL, AGENT, None, stored("a"))
    done = []
    thread = threading.Thread(target=lambda: done.append(outbox.put(URL, AGENT, None, stored("b"))), daemon=True)
    thread.start()
    thread.join(20)
    assert done == [True]
    outbox.disown(None)
    assert [one.task_id for one in outbox.claim(URL, AGENT, object())] == ["b"]
    outbox.close()


@pytest.mark.parametrize("name", [b"compl(\xff\non", b"a\n\x1b[31m\xc3b"])
def test_a_damaged_schema_is_noticed(tmp_path: Path, caplog: pytest.LogCaptureFixture, name: bytes) -> None:
    """A file whose names are damaged is set aside, although SQLite's message about it may be no text."""
    path = tmp_path / "outbox.db"
    write(path, _filled().replace(b"completion", name))
    outbox = open_outbox(path)
    assert outbox.put(URL, AGENT, None, stored("a"))
    outbox.close()
    (record,) = [record for record in caplog.records if "set aside" in record.message]
    assert record.message.isprintable()


def test_another_programs_database_is_refused(tmp_path: Path) -> None:
    """A database that is not ours is left alone."""
    path = tmp_path / "theirs.db"
    path.touch(0o600)
    database = sqlite3.connect(path)
    database.execute("CREATE TABLE theirs (x)")
    database.commit()
    database.close()
    before = path.read_bytes()
    with pytest.raises(ConfigurationError, match="another program's database"):
        open_outbox(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", ["", "missing/outbox.db", "."])
def test_a_path_that_cannot_be_used(tmp_path: Path, name: str) -> None:
    """A wrong path is an error that names the option, before anything is made."""
    with pytest.raises(ConfigurationError, match="outbox") as caught:
        open_outbox(str(tmp_path / name) if name else "")
    assert caught.value.option == "outbox"


def test_a_full_disk(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What cannot be written is told to the caller, and to the log once until writing works again."""
    outbox = open_outbox(tmp_path / "outbox.db")
    outbox.put(URL, AGENT, None, stored("small"))
    (pages,) = database_of(outbox).execute("PRAGMA page_count").fetchone()
    database_of(outbox).execute(f"PRAGMA max_page_count = {pages}").fetchall()
    for number in range(3):
        assert not outbox.put(URL, AGENT, None, stored(f"big{number}", b"x" * 100_000))
        assert outbox.owner_of(URL, AGENT, f"big{number}") is None
    assert sum("cannot be written" in record.getMessage() for record in caplog.records) == 1
    database_of(outbox).execute("PRAGMA max_page_count = 100000").fetchall()
    assert outbox.put(URL, AGENT, None, stored("big", b"x" * 100_000))
    outbox.close()


def test_nobody_waits_for_the_next_to_come(tmp_path: Path) -> None:
    """Threads that only put all get their answer: who has led hands on to who has come meanwhile."""
    outbox = open_outbox(tmp_path / "outbox.db")
    begin = threading.Barrier(8)
    done = []

    def work(name: int) -> None:
        for number in range(20):
            begin.wait(60)
            done.append(outbox.put(URL, AGENT, None, stored(f"{name}-{number}")))

    threads = [threading.Thread(target=work, args=(name,), daemon=True) for name in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert done == [True] * 160
    outbox.close()


def test_many_threads_lose_nothing(tmp_path: Path) -> None:
    """Changes of many threads share commits, and each is on disk when its call returns."""
    outbox = open_outbox(tmp_path / "outbox.db")
    reader = sqlite3.connect(tmp_path / "outbox.db", check_same_thread=False)
    lock = threading.Lock()
    missing = []

    def work(name: int) -> None:
        for number in range(30):
            task_id = f"{name}-{number}"
            assert outbox.put(URL, AGENT, None, stored(task_id))
            with lock:
                found = reader.execute("SELECT 1 FROM completion WHERE task_id = ?", (task_id,)).fetchone()
            if found is None:
                missing.append(task_id)
            if number % 2:
                outbox.remove(URL, AGENT, task_id, 1)

    threads = [threading.Thread(target=work, args=(name,)) for name in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    (left,) = reader.execute("SELECT count(*) FROM completion").fetchone()
    reader.close()
    outbox.close()
    assert missing == []
    assert left == 8 * 15


def test_many_are_put_as_one(tmp_path: Path) -> None:
    """All of them are on disk, beside what other threads put; they have an owner; a closed outbox takes none."""
    outbox = open_outbox(tmp_path / "outbox.db")
    owner = object()
    together = threading.Barrier(6)

    def put(way: int) -> None:
        together.wait(GUARD)
        for number in range(20):
            some = [Stored(f"{way}-{number}-{one}", 1, False, b"{") for one in range(70 if way % 2 else 1)]
            if way % 2:
                assert outbox.put_all("https://a", "agent", None, some, owner)
            else:
                assert outbox.put("https://a", "agent", None, some[0], owner)

    threads = [threading.Thread(target=put, args=(way,)) for way in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(GUARD)
    assert not any(thread.is_alive() for thread in threads)
    assert outbox.claim("https://a", "agent", object()) == []
    outbox.disown(owner)
    assert len(outbox.claim("https://a", "agent", object())) == 3 * 20 * 71
    outbox.close()
    assert not outbox.put_all("https://a", "agent", None, [Stored("late", 1, False, b"{")])


def test_many_that_cannot_be_written_have_no_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the disk does not take is told as such, and nobody owns it."""
    outbox = open_outbox(tmp_path / "outbox.db")
    monkeypatch.setattr(outbox.file, "commit", lambda puts, removals: "the disk is full" if puts else None)
    assert not outbox.put_all("https://a", "agent", None, [Stored("t1", 1, False, b"{")], object())
    assert outbox.owner_of("https://a", "agent", "t1") is None
    outbox.close()


def test_an_orphaned_child_does_not_keep_it(tmp_path: Path) -> None:
    """A forked child that outlives its killed parent does not hold the parent's outbox."""
    script = """
import os, signal, sys
from sekuire.worker.outbox import Stored, open_outbox
outbox = open_outbox(sys.argv[1])
outbox.put("http://127.0.0.1:1", "agent", None, Stored("a", 1, False, b"one"))
read, write = os.pipe()
if os.fork() == 0:
    outbox.close()
    os.write(write, b"x")
    sys.stdin.read()
    os._exit(0)
os.read(read, 1)
os.kill(os.getpid(), signal.SIGKILL)
"""
    command = [sys.executable, "-W", "ignore", "-c", script, str(tmp_path / "outbox.db")]
    # Its standard input ends with this test, and with it the child.
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        process.wait(60)
        outbox = open_outbox(tmp_path / "outbox.db")
        assert [one.task_id for one in outbox.claim(URL, AGENT, object())] == ["a"]
        outbox.close()


def test_a_child_begins_with_none(tmp_path: Path) -> None:
    """A forked child may open an outbox of its own, is refused its parent's, and its end harms the parent's nothing."""
    script = """
import os, sys
from sekuire.worker.outbox import Stored, open_outbox
parent = open_outbox(sys.argv[1])
parent.put("http://127.0.0.1:1", "agent", None, Stored("a", 1, False, b"one"))
child = os.fork()
if child == 0:
    own = open_outbox(sys.argv[1] + "-own")
    own.put("http://127.0.0.1:1", "agent", None, Stored("b", 1, False, b"two"))
    own.close()
    try:
        open_outbox(sys.argv[1])
    except Exception as error:
        print(error)
    parent.close()
    sys.exit(0)
assert os.waitpid(child, 0)[1] == 0
assert parent.put("http://127.0.0.1:1", "agent", None, Stored("c", 1, False, b"three"))
parent.close()
again = open_outbox(sys.argv[1])
assert [one.task_id for one in again.claim("http://127.0.0.1:1", "agent", object())] == ["a", "c"]
again.close()
"""
    command = [sys.executable, "-W", "ignore", "-c", script, str(tmp_path / "outbox.db")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=GUARD, check=False)
    assert run.returncode == 0, run.stderr
    assert "another process uses it" in run.stdout


def test_a_file_that_cannot_be_read_any_more(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What an earlier process left is not lost to a read error: it is told, and stays for the next process."""
    outbox = open_outbox(tmp_path / "outbox.db")
    mine = object()
    outbox.put(URL, AGENT, None, stored("a"), mine)
    outbox.disown(mine)
    database_of(outbox).execute("ALTER TABLE completion RENAME TO hidden")
    assert outbox.claim(URL, AGENT, object()) == []
    assert "cannot be read" in caplog.text
    database_of(outbox).execute("ALTER TABLE hidden RENAME TO completion")
    assert [one.task_id for one in outbox.claim(URL, AGENT, object())] == ["a"]
    outbox.close()


def test_a_limit_on_the_size_of_files(tmp_path: Path) -> None:
    """A real refusal of the kernel (RLIMIT_FSIZE) is told to the caller; what was there before stays."""
    script = """
import resource, sys
from sekuire.worker.outbox import Stored, open_outbox
outbox = open_outbox(sys.argv[1])
assert outbox.put("http://127.0.0.1:1", "agent", None, Stored("a", 1, False, b"one"))
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
for number in range(3):
    assert not outbox.put("http://127.0.0.1:1", "agent", None, Stored(f"big{number}", 1, False, b"x" * 300_000))
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert outbox.put("http://127.0.0.1:1", "agent", None, Stored("b", 1, False, b"x" * 300_000))
outbox.close()
"""
    command = [sys.executable, "-c", script, str(tmp_path / "outbox.db")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=GUARD, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("cannot be written") == 1
    outbox = open_outbox(tmp_path / "outbox.db")
    assert [one.task_id for one in outbox.claim(URL, AGENT, object())] == ["a", "b"]
    outbox.close()


def test_a_removal_leaves_the_next_try(tmp_path: Path) -> None:
    """What is removed is the accepted result, not that of a later attempt which has taken its place meanwhile."""
    outbox = open_outbox(tmp_path / "outbox.db")
    owner = object()
    outbox.put(URL, AGENT, None, stored("a", b"two", attempt=2), owner)
    outbox.remove(URL, AGENT, "a", 1)
    assert outbox.owner_of(URL, AGENT, "a") is owner
    outbox.disown(owner)
    assert [one.head for one in outbox.claim(URL, AGENT, owner)] == [b"two"]
    outbox.remove(URL, AGENT, "a", 2)
    assert outbox.owner_of(URL, AGENT, "a") is None
    assert outbox.claim(URL, AGENT, object()) == []
    outbox.close()


# -- whose files these are --------------------------------------------------------------------------------------------

posix = pytest.mark.skipif(os.name != "posix", reason="needs owners and modes")
BESIDE = ["", "-wal", "-shm", "-journal", ".lock"]


@posix
@pytest.mark.parametrize("suffix", BESIDE)
def test_a_file_of_another_user_is_refused(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has prepared the file, or one that SQLite believes beside it, could have results sent in our name."""
    path = tmp_path / "outbox.db"
    write(path, _filled())
    prepared = tmp_path / f"outbox.db{suffix}"
    prepared.touch(0o600)
    give_to_another(prepared, monkeypatch)
    before = path.read_bytes()
    with pytest.raises(ConfigurationError, match="belongs to another user") as caught:
        open_outbox(path)
    assert caught.value.option == "outbox"
    assert path.read_bytes() == before


@posix
@pytest.mark.parametrize("suffix", ["", "-wal", "-journal"])
def test_a_file_that_others_can_read_is_refused(tmp_path: Path, suffix: str) -> None:
    write(tmp_path / "outbox.db", _filled())
    open_to_all = tmp_path / f"outbox.db{suffix}"
    open_to_all.touch()
    open_to_all.chmod(0o604)
    with pytest.raises(ConfigurationError, match=f"can be read by others; run: chmod 600 {open_to_all}"):
        open_outbox(tmp_path / "outbox.db")


@posix
@pytest.mark.parametrize("suffix", BESIDE)
def test_a_fifo_is_not_waited_for(tmp_path: Path, suffix: str) -> None:
    os.mkfifo(tmp_path / f"outbox.db{suffix}", 0o600)
    with pytest.raises(ConfigurationError, match="is not a regular file"):
        open_outbox(tmp_path / "outbox.db")


@posix
def test_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link of this user leads to the outbox; another user's does not, nor any in place of the files beside it."""
    link = tmp_path / "link.db"
    link.symlink_to(tmp_path / "outbox.db")
    open_outbox(link).close()
    assert link.is_symlink()
    for suffix in ("-wal", ".lock"):
        beside = tmp_path / f"outbox.db{suffix}"
        beside.unlink(missing_ok=True)
        beside.symlink_to(tmp_path / "elsewhere")
        with pytest.raises(ConfigurationError, match="is a symbolic link"):
            open_outbox(link)
        beside.unlink()
    assert not (tmp_path / "elsewhere").exists()
    give_to_another(link, monkeypatch)
    with pytest.raises(ConfigurationError, match="is a symbolic link of another user"):
        open_outbox(link)


@posix
def test_a_volume_of_kubernetes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What fsGroup makes of the files is accepted with one warning, and they are private again."""
    write(tmp_path / "outbox.db", _filled())
    (tmp_path / "outbox.db.lock").touch()
    for path in tmp_path.iterdir():
        path.chmod(0o660)
    outbox = open_outbox(tmp_path / "outbox.db")
    assert outbox.put(URL, AGENT, None, stored("a"))
    modes = {one.name: stat.S_IMODE(one.stat().st_mode) for one in tmp_path.iterdir() if one.suffix != ".lock"}
    outbox.close()
    assert modes == {"outbox.db": 0o600, "outbox.db-wal": 0o600, "outbox.db-shm": 0o600}
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "fsGroup" in record.getMessage()


@posix
def test_another_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "outbox.db", b"")
    (tmp_path / "outbox.db").chmod(0o660)
    monkeypatch.setattr(os, "getgroups", list)
    monkeypatch.setattr(os, "getegid", lambda: OTHER)
    with pytest.raises(ConfigurationError, match="chmod 600"):
        open_outbox(tmp_path / "outbox.db")


def test_a_file_that_is_mounted_alone(tmp_path: Path) -> None:
    """SQLite keeps results in files beside it, which would not be in the mount."""
    script = """
import os, subprocess, sys
from sekuire.errors import ConfigurationError
from sekuire.worker.outbox import open_outbox
home, path = sys.argv[1] + "/home.db", sys.argv[1] + "/outbox.db"
for name in (home, path):
    os.close(os.open(name, os.O_CREAT, 0o600))
subprocess.run(["mount", "--bind", home, path], check=True)
try:
    open_outbox(path)
except ConfigurationError as error:
    print(error)
"""
    output = in_mounts(script, str(tmp_path))
    assert "is mounted as a single file" in output
    assert "-wal" in output
    assert "mount the directory" in output
    assert (tmp_path / "home.db").read_bytes() == b""


# -- files that others delete, replace or hold ------------------------------------------------------------------------


def ids_in(path: Path) -> List[str]:
    """The tasks in the file at this path, as another process would find them."""
    database = sqlite3.connect(path)
    try:
        return [row[0] for row in database.execute("SELECT task_id FROM completion ORDER BY task_id")]
    finally:
        database.close()


def warnings_of(caplog: pytest.LogCaptureFixture) -> List[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


posix_files = pytest.mark.skipif(os.name != "posix", reason="elsewhere an open file cannot be deleted")


@posix_files
@pytest.mark.parametrize("gone", [["", "-wal", "-shm", ".lock"], [""], ["-wal"], ["-shm"], [".lock"]])
def test_a_file_that_is_deleted_while_it_is_open(
    gone: List[str], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is opened again, with one warning; what was put before may be missing, which the epoch says."""
    monkeypatch.setattr(outbox_file, "_LOOK_PAUSE", 0.0)
    path = tmp_path / "outbox.db"
    outbox = open_outbox(path)
    assert outbox.put(URL, AGENT, None, stored("a"))
    epoch = outbox.epoch
    for suffix in gone:
        (tmp_path / f"outbox.db{suffix}").unlink()
    assert outbox.put(URL, AGENT, None, stored("b"))
    assert outbox.epoch == epoch + 1
    (warning,) = warnings_of(caplog)
    assert "was deleted or replaced by another program" in warning
    found = ids_in(path)
    # What was beside the file is not lost with what was beside it.
    assert found == (["b"] if "" in gone else ["a", "b"])
    assert outbox.put(URL, AGENT, None, stored("c"))
    assert outbox.epoch == epoch + 1
    with pytest.raises(ConfigurationError, match="another process uses it"):
        other = Outbox(str(path))
        other.file.open()
    outbox.close()
    assert ids_in(path) == [*found, "c"]


@posix_files
def test_a_file_that_is_deleted_at_any_moment_is_noticed_by_the_next_result(tmp_path: Path) -> None:
    """The database itself is looked at before each commit, not now and then."""
    outbox = open_outbox(tmp_path / "outbox.db")
    for number in range(3):
        assert outbox.put(URL, AGENT, None, stored(f"t{number}"))
        assert ids_in(tmp_path / "outbox.db") == [f"t{number}"]
        (tmp_path / "outbox.db").unlink()
    outbox.close()


@posix_files
def test_a_file_that_is_replaced_while_it_is_open(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A restored backup is used from then on. What it holds has no owner, and can be claimed."""
    path = tmp_path / "outbox.db"
    backup = tmp_path / "backup.db"
    write(backup, _filled())
    outbox = open_outbox(path)
    assert outbox.put(URL, AGENT, None, stored("a"), "mine")
    os.replace(backup, path)
    outbox.verify()
    assert outbox.put(URL, AGENT, None, stored("b"), "mine")
    claimed = [one.task_id for one in outbox.claim(URL, AGENT, "mine")]
    outbox.close()
    assert sorted(claimed) == sorted(f"task-{number}" for number in range(20))
    assert set(ids_in(path)) == {"b", *claimed}
    assert len(warnings_of(caplog)) == 1


@posix_files
@pytest.mark.parametrize("kind", ["others can read it", "a FIFO", "a link", "another program's"])
def test_a_file_that_is_replaced_by_one_that_cannot_be_trusted(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Results go on without the outbox, with one warning that says why, until there is a file that can be trusted."""
    path = tmp_path / "outbox.db"
    outbox = open_outbox(path)
    path.unlink()
    if kind == "others can read it":
        path.touch()
        path.chmod(0o644)
    elif kind == "a FIFO":
        os.mkfifo(path)
    elif kind == "a link":
        path.symlink_to(tmp_path / "elsewhere")
    else:
        path.touch(0o600)
        with contextlib.closing(sqlite3.connect(path)) as database:
            database.execute("CREATE TABLE theirs (x)")
    before = path.lstat()
    for number in range(3):
        assert not outbox.put(URL, AGENT, None, stored(f"t{number}"))
    assert len(warnings_of(caplog)) == 2
    assert "cannot be written" in warnings_of(caplog)[1]
    assert (path.lstat().st_mode, path.lstat().st_size) == (before.st_mode, before.st_size)
    path.unlink()
    assert outbox.put(URL, AGENT, None, stored("a"))
    outbox.close()
    assert ids_in(path) == ["a"]
    assert not (tmp_path / "elsewhere").exists()


@posix_files
def test_a_directory_that_is_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Results go on without the outbox until there is a directory again."""
    path = tmp_path / "inner" / "outbox.db"
    path.parent.mkdir()
    outbox = open_outbox(path)
    assert outbox.put(URL, AGENT, None, stored("a"))
    shutil.rmtree(path.parent)
    for number in range(3):
        assert not outbox.put(URL, AGENT, None, stored(f"t{number}"))
    assert len(warnings_of(caplog)) == 2
    path.parent.mkdir()
    assert outbox.put(URL, AGENT, None, stored("b"))
    outbox.close()
    assert ids_in(path) == ["b"]


@posix_files
def test_another_process_that_has_taken_the_place(tmp_path: Path) -> None:
    """Where the lock was deleted and another process has locked a new one, the file is that process's until it ends."""
    script = """
import sys
from sekuire.worker.outbox import Stored, open_outbox
outbox = open_outbox(sys.argv[1])
outbox.put("http://127.0.0.1:1", "agent", None, Stored("theirs", 1, False, b"{"))
print("open", flush=True)
sys.stdin.read()
outbox.close()
"""
    path = tmp_path / "outbox.db"
    outbox = open_outbox(path)
    for one in list(tmp_path.iterdir()):
        one.unlink()
    command = [sys.executable, "-c", script, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"open\n"
        assert not outbox.put(URL, AGENT, None, stored("a"))
        process.communicate()
    assert outbox.put(URL, AGENT, None, stored("b"))
    outbox.close()
    assert ids_in(path) == ["b", "theirs"]


def test_a_database_that_another_program_holds(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is waited for once, with one warning. Then nobody waits, until it is free; removals are made good."""
    path = tmp_path / "outbox.db"
    outbox = open_outbox(path)
    assert outbox.put(URL, AGENT, None, stored("old"))
    waits: List[str] = []
    monkeypatch.setattr(outbox_file, "BUSY_WAIT", 0.3)
    database_of(outbox).set_trace_callback(lambda text: waits.append(text) if "busy_timeout" in text else None)
    database_of(outbox).execute("PRAGMA busy_timeout = 300")
    with caplog.at_level(logging.INFO), contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        for _ in range(2):
            caplog.clear()
            other.execute("BEGIN IMMEDIATE")
            # With the whole wait at each one, this would take 15 minutes.
            for number in range(3000):
                assert not outbox.put(URL, AGENT, None, stored(f"t{number}"))
            outbox.remove(URL, AGENT, "old", 1)
            outbox.verify()
            assert ["is locked" in warning for warning in warnings_of(caplog)] == [True]
            other.execute("ROLLBACK")
            assert outbox.put(URL, AGENT, None, stored("new"))
            assert "can be written again" in caplog.text
            assert ids_in(path) == ["new"]
    outbox.close()
    assert waits == ["PRAGMA busy_timeout = 300", *["PRAGMA busy_timeout = 0", "PRAGMA busy_timeout = 300"] * 2]


def test_a_database_that_another_program_holds_at_the_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It opens later, and what an earlier process left can be claimed then."""
    monkeypatch.setattr(outbox_file, "BUSY_WAIT", 0.05)
    path = tmp_path / "outbox.db"
    write(path, _filled())
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("PRAGMA locking_mode = EXCLUSIVE")
        other.execute("BEGIN EXCLUSIVE")
        outbox = open_outbox(path)
        assert outbox.epoch == 0
        assert outbox.claim(URL, AGENT, "mine") == []
        assert not outbox.put(URL, AGENT, None, stored("a"))
        assert len(warnings_of(caplog)) == 1
        other.execute("ROLLBACK")
    outbox.verify()
    assert outbox.epoch == 1
    assert len(outbox.claim(URL, AGENT, "mine")) == 20
    outbox.close()


@pytest.mark.parametrize("how", ["verify", "close"])
def test_the_file_alone_holds_everything(how: str, tmp_path: Path) -> None:
    """What SQLite keeps beside the file is written into it, also while another program reads: a copy has it all."""
    path = tmp_path / "outbox.db"
    outbox = open_outbox(path)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as reader:
        assert outbox.put(URL, AGENT, None, stored("a"))
        reader.execute("SELECT * FROM completion").fetchall()
        getattr(outbox, how)()
        (tmp_path / "copy").mkdir()
        shutil.copy(path, tmp_path / "copy" / "outbox.db")
    outbox.close()
    assert ids_in(tmp_path / "copy" / "outbox.db") == ["a"]
