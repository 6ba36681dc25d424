"""The adapters of executors that run handlers in other processes."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import pathlib
import pickle
from typing import Any, Optional

import pytest

from sekuire import ProcessExecutor, RemoteExecutor
from sekuire.executors.backends import Backend, DaskFlag, FileFlag, backend_of

SPAWN = multiprocessing.get_context("spawn")
#: An executor that is a Dask client's, as far as a backend can see.
LikeDask = type("ClientExecutor", (concurrent.futures.Executor,), {"__module__": "distributed.cfexecutor"})


def found(executor: concurrent.futures.Executor) -> Backend:
    backend = backend_of(executor)
    assert backend is not None
    return backend


def test_a_process_executor() -> None:
    """Its backend knows its size, when it kills, and whether each process begins with a function."""
    backend = found(ProcessExecutor(3, kill_after=1.5))
    assert (backend.size, backend.kill_after, backend.is_prepared()) == (3, 1.5, False)
    assert found(RemoteExecutor(ProcessExecutor(1, initializer=print))).is_prepared()
    assert isinstance(backend.make_flag(), FileFlag)
    assert not backend.kill(concurrent.futures.Future())


@pytest.mark.parametrize("initializer", [None, print])
def test_a_pool_of_the_standard_library(initializer: Any) -> None:
    """Its backend cannot kill one process. A call that has not begun can be taken back."""
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=SPAWN, initializer=initializer) as pool:
        backend = found(pool)
    assert (backend.size, backend.kill_after, backend.is_prepared()) == (None, None, initializer is not None)
    future: concurrent.futures.Future[Any] = concurrent.futures.Future()
    assert not backend.kill(future)
    assert backend.withdraw(future, backend.make_flag())
    assert pickle.loads(backend.dumps([1])) == [1]


def test_an_executor_that_is_marked() -> None:
    """RemoteExecutor marks any executor, also within another one. An unmarked one is of threads."""
    threads = concurrent.futures.ThreadPoolExecutor(1)
    assert backend_of(threads) is None
    backend = found(RemoteExecutor(RemoteExecutor(threads)))
    assert backend.submit(lambda data: data + b"!", b"x", print).result() == b"x!"
    threads.shutdown()


def test_an_executor_of_dask() -> None:
    """Dask cannot cancel a call, and its flag is an event of the scheduler, which is asked less often."""
    executor = LikeDask()
    executor._client = "client"
    backend = found(executor)
    flag: Any = backend.make_flag()
    # Its scheduler cannot be asked here.
    assert not backend.withdraw(concurrent.futures.Future(), flag)
    assert isinstance(flag, DaskFlag)
    assert not flag.is_near
    assert flag.step > FileFlag.step
    assert pickle.loads(pickle.dumps(flag)).step == flag.step


def test_a_flag_of_a_file(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason is read by whoever got the flag, and lowering it leaves no file behind."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    flag = FileFlag()
    there: FileFlag = pickle.loads(pickle.dumps(flag))
    reason: Optional[str] = there.read()
    assert reason is None
    flag.raise_("enough")
    assert there.read() == "enough"
    flag.lower()
    assert list(tmp_path.iterdir()) == []
