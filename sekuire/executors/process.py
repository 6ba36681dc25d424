"""Run calls in a pool of processes. A process that exits, or is killed, costs only the call that it ran."""

# Threads: any thread may call ProcessExecutor's methods. `sekuire-process-N`, one thread for each process, gives it its
# calls and receives the results. `_condition` guards the queue and the lists, and is never held over I/O.

from __future__ import annotations

import contextlib
import functools
import itertools
import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections import deque
from concurrent.futures import BrokenExecutor, Executor, Future
from multiprocessing.connection import Connection, wait
from typing import Any, Callable, Deque, Dict, List, Optional, Set, Tuple

from .._internal import threads as thread_tools
from .._internal.checks import check_whole
from .._internal.logs import get_logger
from .._internal.signals import DRAINING
from ..errors import ConfigurationError
from .main_module import missing_in_processes

__all__ = ["ProcessDied", "ProcessExecutor"]

log = get_logger("sekuire.executors")

#: Seconds between two checks that a silent process still runs.
_CHECK_INTERVAL = 1.0
#: Seconds that an idle process has to end, and a killed one to disappear.
_END_TIME = 2.0
#: Seconds that idle processes may take to end when the interpreter does.
_LEAVE_TIME = 1.0

# The first byte of what a process sends: ready for calls, a call has begun, a message of the call, a question of the
# call, its result, its exception.
_READY, _BEGUN, _MESSAGE, _QUESTION, _RESULT, _ERROR = b"!", b"b", b"m", b"q", b"r", b"e"
# The first byte of an answer to a question. A call begins with the first byte of a pickle.
_ANSWER = b"a"


def unpicklable(value: Any) -> str:
    """Return why ``value`` cannot be pickled, an empty text if it can."""
    try:
        pickle.dumps(value)
    except Exception as error:  # noqa: BLE001
        return f"{type(error).__name__}: {error}"
    return ""


class ProcessDied(BrokenExecutor):
    """Report that the process of a call ended before the call did. The call may have begun. The pool goes on."""


class _DiedIdle(Exception):
    """Report that a process had ended before it received a call. Nothing of the call has run."""


class ProcessExecutor(Executor):
    """Run calls in processes of its own, for handlers that compute.

    >>> from sekuire import ProcessExecutor
    >>> with ProcessExecutor(max_workers=2) as executor:
    ...     executor.submit(pow, 2, 10).result()
    1024

    A worker runs its handlers there with ``create_worker(executor=executor, ...)``.

    It differs from ``concurrent.futures.ProcessPoolExecutor`` when a process is lost. The one call of that process ends
    with :class:`ProcessDied`. The other calls run on, and a new process replaces it. A call can be killed with its
    process, as happens to a handler that ignores the end of its time. No process outlives this one.

    Processes are made by spawn on first need. Any thread may call the methods. :meth:`shutdown`, or the end of a
    ``with`` block, ends processes and threads.

    :param max_workers: the most processes. None: as many as this machine has processors.
    :param initializer: called with ``initargs`` in each new process before its first call.
    :param max_tasks_per_child: calls after which a new process replaces a process. None: never.
    :param kill_after: seconds from the answer of a task whose handler still runs (its time has passed, or the worker
        stopped) until its process is killed. None: never.
    :raises ConfigurationError: a wrong value.
    """

    def __init__(
        self,
        max_workers: Optional[int] = None,
        *,
        initializer: Optional[Callable[..., object]] = None,
        initargs: Tuple[Any, ...] = (),
        max_tasks_per_child: Optional[int] = None,
        kill_after: Optional[float] = 5.0,
    ) -> None:
        check_whole("max_workers", max_workers, or_none=True)
        check_whole("max_tasks_per_child", max_tasks_per_child, or_none=True)
        if initializer is not None and not callable(initializer):
            raise ConfigurationError(f"must be callable, got {type(initializer).__name__}", "initializer")
        if not isinstance(initargs, (tuple, list)):
            raise ConfigurationError(
                f"must be a tuple of arguments, such as ({initargs!r},), got {type(initargs).__name__}", "initargs"
            )
        problem = unpicklable((initializer, initargs))
        if problem:
            raise ConfigurationError(f"it and initargs must be picklable ({problem})", "initializer")
        missing = missing_in_processes((initializer, initargs), pickle.dumps((initializer, initargs)))
        if missing:
            raise ConfigurationError(f"cannot run in another process: {missing}", "initializer")
        if kill_after is not None and (
            isinstance(kill_after, bool) or not isinstance(kill_after, (int, float)) or not kill_after >= 0
        ):
            raise ConfigurationError(
                f"must be a number of seconds, 0 or more, or None, got {kill_after!r}", "kill_after"
            )
        self.pid = os.getpid()
        self.max_workers = max_workers or os.cpu_count() or 1
        self.kill_after = kill_after
        self.initializer = initializer
        # What each new process calls before its first call.
        self._preparation = (initializer, tuple(initargs))
        self._calls_of_one = max_tasks_per_child
        self._condition = threading.Condition()
        self._queue: Deque[_Call] = deque()
        self._running: Dict[Future[Any], _Child] = {}
        self._children: Set[_Child] = set()
        self._threads: List[threading.Thread] = []
        self._made = 0
        self._idle = 0
        self._closed = False
        self._killed = False

    # -- the interface of an executor --

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Run ``fn(*args, **kwargs)`` in a process. Function, arguments and result must be picklable.

        :raises RuntimeError: after :meth:`shutdown`.
        """
        return self.submit_call(fn, args, kwargs)

    def submit_call(
        self,
        fn: Callable[..., Any],
        args: Tuple[Any, ...],
        kwargs: Optional[Dict[str, Any]] = None,
        on_message: Optional[Callable[[Any], object]] = None,
        on_question: Optional[Callable[[Any, Callable[[Any], None]], object]] = None,
    ) -> Future[Any]:
        """Submit a call, as :meth:`submit` does, and receive what it passes to :func:`send_message`.

        :param on_message: called with each message in one of the pool's threads.
        :param on_question: called there with each question (:func:`send_question`), and with what answers it. The
            answer may be given later, by any thread. After the end of the call it is dropped.
        """
        thread_tools.check_process(self.pid, "ProcessExecutor")
        call = _Call()
        call.on_message = on_message
        call.on_question = on_question
        try:
            call.data = pickle.dumps((fn, args, kwargs or {}))
        except Exception as error:  # noqa: BLE001  # Other executors report it by the future, too.
            call.future.set_exception(error)
            return call.future
        with self._condition:
            if self._closed:
                raise RuntimeError("cannot schedule new futures after shutdown")
            if not self._made:
                thread_tools.at_exit(self)
            self._queue.append(call)
            if self._idle < len(self._queue) and len(self._threads) < self.max_workers:
                self._made += 1
                name = f"sekuire-process-{self._made}"
                thread = threading.Thread(target=self._serve, args=(name,), name=name, daemon=True)
                self._threads.append(thread)
                try:
                    thread.start()
                except RuntimeError:
                    # The system starts no more threads now. Those that run serve the call, if there are any.
                    self._threads.remove(thread)
                    if not self._threads:
                        self._queue.remove(call)
                        raise
            self._condition.notify()
        return call.future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Accept no more calls, and end the processes when the accepted calls are done.

        :param wait: return only when they have ended.
        :param cancel_futures: cancel the calls that have not begun.
        """
        with self._condition:
            self._closed = True
            dropped = list(self._queue) if cancel_futures else []
            if cancel_futures:
                self._queue.clear()
            threads = list(self._threads)
            self._condition.notify_all()
        for call in dropped:
            call.future.cancel()
        if wait:
            for thread in threads:
                while thread.is_alive() and thread is not threading.current_thread():
                    thread.join(thread_tools.LONG_WAIT)
        thread_tools.forget_exit(self)

    # -- beyond it --

    def kill(self, future: Future[Any]) -> bool:
        """Kill the process that runs the call of ``future``. Return True if there is one.

        The call ends with :class:`ProcessDied`.
        """
        with self._condition:
            child = self._running.get(future)
        if child is None:
            return False
        child.kill()
        return True

    def kill_workers(self) -> None:
        """Kill every process and accept no more calls. Calls that run or wait end with an error."""
        with self._condition:
            self._closed = self._killed = True
            calls = list(self._queue)
            self._queue.clear()
            children = list(self._children)
            self._condition.notify_all()
        for call in calls:
            call.future.cancel()
        for child in children:
            child.kill()

    def leave(self) -> None:
        """End the processes, because the interpreter ends.

        Those that run a call are killed. The others end by themselves, in at most a second: they may have spans or
        logs to send.
        """
        with self._condition:
            self._closed = True
            calls = list(self._queue)
            self._queue.clear()
            idle = {child for child in self._children if child.is_ready()} - set(self._running.values())
            busy = self._children - idle
            threads = list(self._threads)
            self._condition.notify_all()
        for call in calls:
            call.future.cancel()
        for child in busy:
            child.kill()
        deadline = thread_tools.Deadline(_LEAVE_TIME)
        for thread in threads if idle else ():
            thread.join(deadline.remaining())
        self.kill_workers()

    def __repr__(self) -> str:
        return f"<ProcessExecutor of {self.max_workers}, {len(self._children)} running>"

    # -- inside (the pool's threads) --

    def _serve(self, name: str) -> None:
        child: Optional[_Child] = None
        try:
            while True:
                call = self._next()
                if call is None:
                    return
                if call.future.cancelled():
                    continue
                if child is not None and (child.calls == self._calls_of_one or not child.is_alive()):
                    self._end(child)
                    child = None
                outcome = ProcessDied("no process could be started for the call")
                is_begun = False
                try:
                    if child is None:
                        child = self._make(name)
                    # While its process is being made, the call can be cancelled.
                    child.wait_ready()
                    is_begun = True
                    if not call.future.set_running_or_notify_cancel():
                        continue
                    try:
                        self._give(call, child)
                    except _DiedIdle:
                        self._end(child)
                        child = self._make(name)
                        self._give(call, child)
                except ProcessDied as died:
                    outcome = died
                except BaseException as error:  # Whatever it is, somebody waits for the call.
                    log.exception("%s: cannot start a process, or cannot reach it", name)
                    outcome = ProcessDied(f"its process could not be used ({type(error).__name__})")
                else:
                    continue
                if child is not None:
                    self._end(child)
                    child = None
                if is_begun or call.future.set_running_or_notify_cancel():
                    call.future.set_exception(outcome)
        finally:
            if child is not None:
                self._end(child)
            with self._condition:
                self._threads.remove(threading.current_thread())

    def _next(self) -> Optional[_Call]:
        with self._condition:
            self._idle += 1
            while not self._queue and not self._closed:
                self._condition.wait(thread_tools.LONG_WAIT)
            self._idle -= 1
            return self._queue.popleft() if self._queue else None

    def _make(self, name: str) -> _Child:
        child = _Child(name, self._preparation)
        with self._condition:
            self._children.add(child)
            is_late = self._killed
        if is_late:
            child.kill()
        return child

    def _give(self, call: _Call, child: _Child) -> None:
        """Run one call in ``child`` and settle its future.

        :raises ProcessDied: the process ended first.
        """
        with self._condition:
            self._running[call.future] = child
        try:
            kind, data = child.run(call)
        finally:
            with self._condition:
                del self._running[call.future]
        if kind == _RESULT:
            try:
                result = pickle.loads(data)
            except BaseException as error:  # noqa: BLE001  # Its modules may be missing here, or it calls sys.exit().
                call.future.set_exception(error)
            else:
                call.future.set_result(result)
        else:
            call.future.set_exception(load_error(data))

    def _end(self, child: _Child) -> None:
        with self._condition:
            self._children.discard(child)
        child.end()


class _Call:
    __slots__ = ("data", "future", "on_message", "on_question")

    def __init__(self) -> None:
        self.data = b""
        self.on_message: Optional[Callable[[Any], object]] = None
        self.on_question: Optional[Callable[[Any, Callable[[Any], None]], object]] = None
        self.future: Future[Any] = Future()


class _Child:
    """Run calls in one process, through a pipe.

    Its own thread uses it; any thread may call :meth:`kill`, and answer a question.
    """

    # `_send_lock` guards the call that runs, and the order of what is sent to the process.

    def __init__(self, name: str, preparation: Tuple[Any, ...]) -> None:
        self.calls = 0
        self._call: Optional[_Call] = None
        self._send_lock = threading.Lock()
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        try:
            self._process = context.Process(target=_main, args=(theirs, *preparation), name=name, daemon=True)
            self._process.start()
        except BaseException:
            self._pipe.close()
            raise
        finally:
            theirs.close()
        self._is_ready = False

    def is_alive(self) -> bool:
        return self._process.is_alive()

    def is_ready(self) -> bool:
        """Return True if the process can run calls. It may be in the middle of one."""
        return self._is_ready

    def wait_ready(self) -> None:
        """Wait until the process can run calls.

        :raises ProcessDied: it ended first.
        """
        if not self._is_ready:
            self._receive()
            self._is_ready = True

    def run(self, call: _Call) -> Tuple[bytes, bytes]:
        """Run a call. Return the kind and the data of its result.

        :raises ProcessDied: the process ended first.
        """
        was_idle = self._is_ready
        self.wait_ready()
        self.calls += 1
        try:
            with self._send_lock:
                self._call = call
                self._pipe.send_bytes(call.data)
            # A thread that an earlier call has left behind may have sent messages since.
            while self._receive()[0] != _BEGUN:
                pass
        except (OSError, ProcessDied):
            if was_idle:
                raise _DiedIdle from None
            raise
        try:
            while True:
                kind, data = self._receive()
                if kind not in (_MESSAGE, _QUESTION):
                    return kind, data
                self._use_message(call, kind, data)
        finally:
            with self._send_lock:
                self._call = None

    def _use_message(self, call: _Call, kind: bytes, data: bytes) -> None:
        try:
            if kind == _QUESTION and call.on_question is not None:
                number, question = pickle.loads(data)
                call.on_question(question, functools.partial(self._answer, call, number))
            elif kind == _MESSAGE and call.on_message is not None:
                call.on_message(pickle.loads(data))
        except BaseException:
            log.exception("a message of a call could not be used")

    def _answer(self, call: _Call, number: int, answer: Any) -> None:
        """Send the answer to a question, unless its call has ended. Any thread."""
        data = _ANSWER + pickle.dumps((number, answer))
        with self._send_lock, contextlib.suppress(OSError):
            if self._call is call:
                self._pipe.send_bytes(data)

    def kill(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # Gone already, or closed.
            self._process.kill()

    def end(self) -> None:
        """Close the pipe, so that the process ends. Kill it if it does not."""
        with contextlib.suppress(OSError):
            self._pipe.close()
        self._process.join(_END_TIME)
        if self._process.is_alive():
            self._process.kill()
            self._process.join(_END_TIME)
        if not self._process.is_alive():
            self._process.close()

    def _receive(self) -> Tuple[bytes, bytes]:
        try:
            # A process that the handler has started may keep the pipe open after the child has ended. An open pipe
            # alone does not prove that the child runs.
            while not self._pipe.poll(_CHECK_INTERVAL):
                if not self._process.is_alive() and not self._pipe.poll(0):
                    raise EOFError
            message = self._pipe.recv_bytes()
        except (EOFError, OSError):
            message = b""
        if not message:
            raise ProcessDied(self._describe_end())
        return message[:1], message[1:]

    def _describe_end(self) -> str:
        """Say how the process ended, for an error."""
        self._process.join(_END_TIME)
        code = self._process.exitcode
        if code is None:
            how = "closed its pipe"
        elif code >= 0:
            how = f"ended with exit code {code}"
        else:
            known = {number.value: number.name for number in signal.Signals}
            how = f"was ended by {known.get(-code, f'signal {-code}')}"
        if not self._is_ready:
            return f"the process {how} before it could run the call; its error output says why"
        return f"the process that ran the call {how}"


# -- errors on their way between processes ----------------------------------------------------------------------------


class RemoteTraceback(Exception):
    """Carry the traceback of another process, as text. It is the cause of an exception that came from there."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f'\n"""\n{self.text}"""'


class RemoteError(Exception):
    """Replace an exception of another process that pickle cannot load. Its class has the original's name."""


def dump_error(error: BaseException) -> bytes:
    """Pickle ``error`` with its traceback, for :func:`load_error`. Raise nothing."""
    try:
        text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        shown = str(error)
    except BaseException:  # noqa: BLE001
        text, shown = "", "(its text cannot be made)"
    try:
        data = pickle.dumps(error)
        # An exception with a constructor of its own may be pickled, and yet fail to load.
        if type(pickle.loads(data)) is not type(error):
            data = b""
    except BaseException:  # noqa: BLE001
        data = b""
    return pickle.dumps((data, type(error).__name__, shown, text))


def load_error(dumped: bytes) -> BaseException:
    """Return the exception that :func:`dump_error` has pickled, or one with the same name and text."""
    data, name, shown, text = pickle.loads(dumped)
    error: Optional[BaseException] = None
    if data:
        try:
            error = pickle.loads(data)
        except BaseException:  # noqa: BLE001  # Its module may exist only there, or it calls sys.exit().
            error = None
    if not isinstance(error, BaseException):
        error = type(name, (RemoteError,), {})(shown)
    error.__cause__ = RemoteTraceback(text)
    return error


# -- in the process ---------------------------------------------------------------------------------------------------

_pipe: Optional[Connection[Any, Any]] = None
#: Held while something is sent: a thread that a call has left behind may send while the next call's result is sent.
_send_lock = threading.Lock()
#: Held while something is received: by the loop that waits for calls, or by the call that waits for an answer.
_receive_lock = threading.Lock()
#: Answers that came while another question of the same call was waited for. `_receive_lock` guards them.
_answers: Dict[int, Any] = {}
_numbers = itertools.count()


def send_message(message: Any) -> bool:
    """Send ``message`` from a process of a :class:`ProcessExecutor` to the submitter of its call.

    Return False in any other process.
    """
    if _pipe is None:
        return False
    data = _MESSAGE + pickle.dumps(message)
    with _send_lock:
        _pipe.send_bytes(data)
    return True


def send_question(question: Any) -> Optional[int]:
    """Send ``question`` as :func:`send_message` sends a message. Return its number for :func:`wait_for_answer`.

    Return None where it cannot be sent.
    """
    if _pipe is None:
        return None
    number = next(_numbers)
    data = _QUESTION + pickle.dumps((number, question))
    with _send_lock:
        _pipe.send_bytes(data)
    return number


def wait_for_answer(number: int, timeout: float, is_ended: Callable[[], bool]) -> Optional[Tuple[Any]]:
    """Return the answer to a question, in a tuple. None if none came within ``timeout`` seconds.

    :param is_ended: returns True once the call has ended, from before its result is sent. What comes then is not an
        answer, but the next call.
    """
    if _pipe is None or not _receive_lock.acquire(timeout=timeout):
        return None
    try:
        while number not in _answers:
            if is_ended() or not _pipe.poll(timeout) or is_ended():
                return None
            come, answer = pickle.loads(_pipe.recv_bytes()[1:])
            _answers[come] = answer
        return (_answers.pop(number),)
    finally:
        _receive_lock.release()


def _main(pipe: Connection[Any, Any], initializer: Optional[Callable[..., object]], initargs: Tuple[Any, ...]) -> None:
    """Run calls in a new process, one after the other, until the pipe or the parent ends."""
    global _pipe
    # What a terminal or a supervisor sends to the whole group is for the worker. It lets running tasks end first.
    for number in DRAINING:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, name="sekuire-parent", daemon=True).start()
    thread_tools.enter_executor()
    if initializer is not None:
        initializer(*initargs)
    pipe.send_bytes(_READY)
    _pipe = pipe
    while True:
        try:
            with _receive_lock:
                data = pipe.recv_bytes()
                _answers.clear()
            if data.startswith(_ANSWER):
                # To a question of a call that has ended since.
                continue
            with _send_lock:
                pipe.send_bytes(_BEGUN)
        except (EOFError, OSError):
            return
        answer = _run(data)
        try:
            with _send_lock:
                pipe.send_bytes(answer)
        except OSError:
            return


def _run(data: bytes) -> bytes:
    try:
        function, args, kwargs = pickle.loads(data)
        return _RESULT + pickle.dumps(function(*args, **kwargs))
    except BaseException as error:  # noqa: BLE001  # sys.exit() of a call must not end the process.
        return _ERROR + dump_error(error)


def _end_with_parent() -> None:
    """End this process when its parent has ended: nobody could receive a result."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
