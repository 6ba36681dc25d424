"""The pool of processes: what a call gives, what a lost process costs, and that nothing outlives the program."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import pathlib
import pickle
import signal
import subprocess
import sys
import threading
from typing import Any, Iterator, List

import pytest

from sekuire import ProcessExecutor
from sekuire.errors import ConfigurationError, SekuireError
from sekuire.executors import ProcessDied
from sekuire.executors.process import RemoteError, RemoteTraceback, dump_error, load_error, send_message

from ..support import elsewhere
from ..support.waiting import GUARD, until


@pytest.fixture(scope="module")
def shared() -> Iterator[ProcessExecutor]:
    """Two processes, made before the first test."""
    with ProcessExecutor(2) as executor:
        list(executor.map(elsewhere.square, range(2)))
        yield executor


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    # One whose parent has died may be a zombie until the system's first process has collected it.
    status = pathlib.Path(f"/proc/{pid}/stat")
    return status.exists() and ") Z " in status.read_text()


def pids_in(path: pathlib.Path) -> List[int]:
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def test_it_is_an_executor(shared: ProcessExecutor) -> None:
    """submit() and map() give results in other processes, with keyword arguments."""
    assert isinstance(shared, concurrent.futures.Executor)
    assert list(shared.map(elsewhere.square, range(20))) == [number * number for number in range(20)]
    assert shared.submit(elsewhere.square, number=3).result(GUARD) == 9
    assert shared.submit(os.getpid).result(GUARD) != os.getpid()
    assert repr(shared) == "<ProcessExecutor of 2, 2 running>"


def test_an_exception_comes_back(shared: ProcessExecutor) -> None:
    """What a call raises is raised here, with the other process's traceback as its cause; the process goes on."""
    error = shared.submit(elsewhere.fail_in, "here").exception(GUARD)
    assert isinstance(error, RuntimeError)
    assert str(error) == "here"
    assert isinstance(error.__cause__, RemoteTraceback)
    assert "in fail_in" in str(error.__cause__)


def test_an_exception_that_cannot_come_back(shared: ProcessExecutor) -> None:
    """One that pickle cannot bring back comes as one of the same name and text."""
    error = shared.submit(elsewhere.raise_odd).exception(GUARD)
    assert isinstance(error, RemoteError)
    assert (type(error).__name__, str(error)) == ("Odd", "1 and 2")


def test_what_cannot_be_pickled(shared: ProcessExecutor) -> None:
    """A function, an argument or a result that cannot travel ends its call alone, with pickle's error."""
    for future in (
        shared.submit(lambda: None),
        shared.submit(elsewhere.square, threading.Lock()),  # type: ignore[arg-type]
        shared.submit(elsewhere.Unpicklable),
    ):
        assert future.exception(GUARD) is not None
    assert shared.submit(elsewhere.square, 2).result(GUARD) == 4


def test_a_killed_process_costs_its_call(shared: ProcessExecutor, tmp_path: pathlib.Path) -> None:
    """Of two running calls, the one whose process is killed ends with ProcessDied; the other returns, and so do new."""
    let_go = tmp_path / "let go"
    let_go.touch()
    dies = shared.submit(elsewhere.write_pid_and_wait, str(tmp_path / "dies"), "")
    lives = shared.submit(elsewhere.write_pid_and_wait, str(tmp_path / "lives"), str(let_go))
    until(lambda: pids_in(tmp_path / "dies") and pids_in(tmp_path / "lives"))
    os.kill(pids_in(tmp_path / "dies")[0], signal.SIGKILL)
    error = dies.exception(GUARD)
    assert isinstance(error, ProcessDied)
    assert isinstance(error, concurrent.futures.BrokenExecutor)
    assert str(error) == "the process that ran the call was ended by SIGKILL"
    assert not lives.done()
    assert shared.submit(elsewhere.square, 2).result(GUARD) == 4
    let_go.unlink()
    assert lives.result(GUARD) == "let go"


def test_an_idle_process_that_dies_costs_nothing(shared: ProcessExecutor) -> None:
    """A process killed between two calls is replaced before the next one."""
    for pid in {shared.submit(os.getpid).result(GUARD) for _ in range(20)}:
        os.kill(pid, signal.SIGKILL)
        until(lambda: is_gone(pid))  # noqa: B023
    assert list(shared.map(elsewhere.square, range(4))) == [0, 1, 4, 9]


def test_a_result_that_does_not_load_here(shared: ProcessExecutor) -> None:
    """A result that was sent and cannot be built here ends its call with the reason."""
    assert isinstance(shared.submit(elsewhere.only_there, os.getpid()).exception(GUARD), RuntimeError)
    assert shared.submit(elsewhere.square, 2).result(GUARD) == 4


def test_what_ends_the_program_when_it_is_loaded(shared: ProcessExecutor, caplog: pytest.LogCaptureFixture) -> None:
    """A result, an error or a message whose class calls sys.exit() here: each call ends, and the pool goes on."""
    assert isinstance(shared.submit(elsewhere.exits_there).exception(GUARD), SystemExit)
    assert isinstance(shared.submit(elsewhere.raise_exiting).exception(GUARD), RemoteError)
    assert shared.submit_call(elsewhere.send_exit, (), None, print).result(GUARD) == "done"
    assert "a message of a call could not be used" in caplog.text
    assert list(shared.map(elsewhere.square, range(4))) == [0, 1, 4, 9]


def test_messages_beside_results() -> None:
    """A thread that a call leaves behind sends while later results are sent: all arrive whole."""
    with ProcessExecutor(1) as executor:
        for _ in range(20):
            call = executor.submit_call(elsewhere.send_beside_results, (200_000,), None, lambda message: None)
            assert call.result(GUARD) == b"r" * 200_000
        executor.kill_workers()


def test_messages_before_the_end(shared: ProcessExecutor, caplog: pytest.LogCaptureFixture) -> None:
    """The submitter of a call receives the messages that it sends. A receiver that fails harms nothing."""
    heard: List[Any] = []
    assert shared.submit_call(elsewhere.send_twice, (), None, heard.append).result(GUARD) is True
    assert heard == [1, 2]
    assert shared.submit_call(elsewhere.send_twice, (), None, lambda message: 1 // 0).result(GUARD) is True
    assert shared.submit(elsewhere.send_twice).result(GUARD) is True
    assert sum("a message of a call could not be used" in record.message for record in caplog.records) == 2
    assert send_message("nobody hears") is False


def test_a_machine_without_room(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """When no process can be made, calls end with an error, and the pool tries again with the next."""
    with ProcessExecutor(1) as executor:
        with monkeypatch.context() as patch:
            patch.setattr(multiprocessing.get_context("spawn").Process, "start", lambda self: os.open("/no such", 0))
            error = executor.submit(elsewhere.square, 2).exception(GUARD)
        assert isinstance(error, ProcessDied)
        assert str(error) == "its process could not be used (FileNotFoundError)"
        assert executor.submit(elsewhere.square, 2).result(GUARD) == 4


def test_errors_that_do_not_load() -> None:
    """An error that cannot be brought back at all keeps its name and its text, if it has one."""

    class Mute(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    error = load_error(pickle.dumps((b"not a pickle", "Name", "text", "trace")))
    assert (type(error).__name__, str(error), str(error.__cause__)) == ("Name", "text", '\n"""\ntrace"""')
    error = load_error(dump_error(Mute()))
    assert (type(error).__name__, str(error)) == ("Mute", "(its text cannot be made)")


def test_kill(shared: ProcessExecutor, tmp_path: pathlib.Path) -> None:
    """kill() ends a running call with its process, and leaves one that does not run alone."""
    future = shared.submit(elsewhere.write_pid_and_wait, str(tmp_path / "pid"), "")
    until(lambda: pids_in(tmp_path / "pid"))
    assert shared.kill(future)
    assert isinstance(future.exception(GUARD), ProcessDied)
    assert is_gone(pids_in(tmp_path / "pid")[0])
    assert not shared.kill(future)


def test_the_end_of_a_pool(tmp_path: pathlib.Path) -> None:
    """shutdown() lets calls end, drops those that wait if asked to, accepts no more, and ends every process."""
    executor = ProcessExecutor(1)
    let_go = tmp_path / "let go"
    let_go.touch()
    runs = executor.submit(elsewhere.write_pid_and_wait, str(tmp_path / "pid"), str(let_go))
    waits, cancelled = executor.submit(elsewhere.square, 2), executor.submit(elsewhere.square, 3)
    until(lambda: pids_in(tmp_path / "pid"))
    assert cancelled.cancel()
    executor.shutdown(wait=False)
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.submit(elsewhere.square, 2)
    assert not executor.kill(waits)
    let_go.unlink()
    executor.shutdown()
    assert (runs.result(0), waits.result(0)) == ("let go", 4)
    assert is_gone(pids_in(tmp_path / "pid")[0])


def test_waiting_calls_can_be_dropped(tmp_path: pathlib.Path) -> None:
    """shutdown(cancel_futures=True) cancels what has not begun."""
    executor = ProcessExecutor(1)
    let_go = tmp_path / "let go"
    let_go.touch()
    runs = executor.submit(elsewhere.write_pid_and_wait, str(tmp_path / "pid"), str(let_go))
    waits = executor.submit(elsewhere.square, 2)
    until(lambda: pids_in(tmp_path / "pid"))
    executor.shutdown(wait=False, cancel_futures=True)
    assert waits.cancelled()
    let_go.unlink()
    executor.shutdown()
    assert runs.result(0) == "let go"


def test_kill_workers(tmp_path: pathlib.Path) -> None:
    """kill_workers() ends running calls with ProcessDied and cancels those that wait."""
    executor = ProcessExecutor(1)
    runs = executor.submit(elsewhere.write_pid_and_wait, str(tmp_path / "pid"), "")
    waits = executor.submit(elsewhere.square, 2)
    until(lambda: pids_in(tmp_path / "pid"))
    executor.kill_workers()
    executor.shutdown(cancel_futures=True)
    assert isinstance(runs.exception(0), ProcessDied)
    assert waits.cancelled()


def test_processes_are_replaced_and_set_up(tmp_path: pathlib.Path) -> None:
    """The initializer runs in each process, and a process is replaced after its number of calls."""
    path = tmp_path / "log"
    with ProcessExecutor(1, initializer=elsewhere.note, initargs=(str(path),), max_tasks_per_child=2) as executor:
        pids = [executor.submit(os.getpid).result(GUARD) for _ in range(3)]
    assert pids[0] == pids[1] != pids[2]
    assert [int(line) for line in path.read_text().split()] == [pids[0], pids[2]]


def test_a_process_that_cannot_start(capfd: pytest.CaptureFixture[str]) -> None:
    """An initializer that fails ends the call with an error that says where to look."""
    with ProcessExecutor(1, initializer=elsewhere.fail_in, initargs=("set up",)) as executor:
        error = executor.submit(elsewhere.square, 2).exception(GUARD)
    assert str(error) == ("the process ended with exit code 1 before it could run the call; its error output says why")
    assert "RuntimeError: set up" in capfd.readouterr().err


def test_wrong_arguments() -> None:
    """Each wrong argument is refused, naming its option."""
    cases: List[Any] = [
        ({"max_workers": 0}, "max_workers: must be a whole number"),
        ({"max_workers": True}, "max_workers: must be a whole number"),
        ({"max_tasks_per_child": 1.5}, "max_tasks_per_child: must be a whole number"),
        ({"initializer": "x"}, "initializer: must be callable"),
        ({"initializer": print, "initargs": 3}, "initargs: must be a tuple of arguments, such as (3,), got int"),
        ({"initializer": print, "initargs": "abc"}, "initargs: must be a tuple of arguments, such as ('abc',), got"),
        ({"initializer": lambda: None}, "initializer: it and initargs must be picklable"),
        ({"kill_after": -1}, "kill_after: must be a number of seconds"),
        ({"kill_after": float("nan")}, "kill_after: must be a number of seconds"),
        ({"kill_after": "5"}, "kill_after: must be a number of seconds"),
    ]
    for options, text in cases:
        with pytest.raises(ConfigurationError) as caught:
            ProcessExecutor(**options)
        assert str(caught.value).startswith(text)
    assert ProcessExecutor().max_workers == os.cpu_count()


def test_not_after_a_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool belongs to the process that made it."""
    executor = ProcessExecutor(1)
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(SekuireError, match="was started in process"):
        executor.submit(elsewhere.square, 2)


@pytest.mark.parametrize("end", ["kill -9", "exit"])
def test_no_process_outlives_the_program(tmp_path: pathlib.Path, end: str) -> None:
    """When the program is killed, or ends while calls run, its processes end too, and the end does not wait."""
    path = tmp_path / "pids"
    code = f"""if True:
        import sys
        sys.path[:0] = {sys.path!r}
        from sekuire import ProcessExecutor
        from tests.support import elsewhere

        executor = ProcessExecutor(2)
        for _ in range(2):
            executor.submit(elsewhere.write_pid_and_wait, {str(path)!r}, "")
        sys.stdin.readline()
    """
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, cwd=tmp_path)
    assert process.stdin is not None
    try:
        until(lambda: len(pids_in(path)) == 2, 4 * GUARD)
        if end == "exit":
            process.stdin.write(b"\n")
            process.stdin.flush()
            assert process.wait(4 * GUARD) == 0
        else:
            process.kill()
            process.wait()
        for pid in pids_in(path):
            until(lambda: is_gone(pid))  # noqa: B023
    finally:
        process.kill()
        process.stdin.close()
        process.wait()


def test_an_idle_process_ends_by_itself(tmp_path: pathlib.Path) -> None:
    """When the program ends, a process that runs no call runs its own ``atexit`` functions: spans are sent there."""
    path = tmp_path / "ended"
    code = f"""if True:
        import sys
        sys.path[:0] = {sys.path!r}
        from sekuire import ProcessExecutor
        from tests.support import elsewhere

        ProcessExecutor(1).submit(elsewhere.write_at_exit, {str(path)!r}).result()
    """
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, timeout=4 * GUARD, check=True)
    assert path.read_text() == "ended"


def test_a_thread_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any the call is refused, and not kept; else it waits for one that is there. Later calls try again."""
    real = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        if thread.name.startswith("sekuire-process"):
            raise RuntimeError("can't start new thread")
        real(thread)

    with ProcessExecutor(2) as executor:
        monkeypatch.setattr(threading.Thread, "start", start)
        with pytest.raises(RuntimeError, match="can't start"):
            executor.submit(elsewhere.square, 2)
        monkeypatch.setattr(threading.Thread, "start", real)
        assert executor.submit(elsewhere.square, 3).result(GUARD) == 9
        monkeypatch.setattr(threading.Thread, "start", start)
        # One is busy or idle; a second one is not available.
        calls = [executor.submit(elsewhere.square, number) for number in range(4)]
        assert [call.result(GUARD) for call in calls] == [0, 1, 4, 9]
        monkeypatch.setattr(threading.Thread, "start", real)
