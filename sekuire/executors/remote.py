"""Run handlers in other processes: of a process pool on this machine, or of a Dask cluster.

What is around a handler stays in the worker's process. The task's thread waits, inside the middleware, for what the
other process returns. That process builds the input for the handler's annotation, and calls the handler with a
:class:`RemoteTaskContext`.
"""

# Threads: in the worker's process the task's thread calls `_RemoteHandler`; any thread may cancel, which wakes it
# through `_Watch`. `sekuire-flag` removes the flag of a call that was taken back. In the other process one thread runs
# the handler.

from __future__ import annotations

import concurrent.futures
import datetime as dt
import functools
import json
import logging
import math
import os
import pickle
import threading
import weakref
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Tuple

import attrs

from .._internal import instrumentation, threads
from .._internal.clock import time
from .._internal.logs import get_logger
from ..config import WorkerConfig
from ..errors import (
    ApprovalDenied,
    ConfigurationError,
    PolicyUnavailableError,
    PolicyViolationError,
    TaskCancelled,
    TaskError,
)
from ..handlers.context import TaskContext, TaskControl, control_of, current_task
from ..handlers.invoke import Handler, asked_for, call, structure_of, where, with_structure
from ..handlers.outcome import unwrap
from ..handlers.registry import Carrier
from ..handlers.resources import Injection
from ..logging import ids_of
from ..wire.canonical import NotCanonical, canonical_json
from ..wire.models import Approval, Task
from .backends import WITHDRAWN, Backend, Flag, RemoteExecutor, backend_of, is_remote
from .process import ProcessDied, dump_error, load_error, send_message, send_question, wait_for_answer

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop, TimerHandle

__all__ = ["RemoteExecutor", "RemoteTaskContext", "carrier_of", "is_remote"]

log = get_logger("sekuire.remote")

#: Policies that a process remembers.
_MAX_ENFORCERS = 8
#: Seconds until the worker tries again to kill a process that it could not kill.
_KILL_RETRY = 0.5
_CANNOT_ASK = "nobody can be asked from a process of this executor; use ProcessExecutor, or threads"
#: Seconds between two reports of progress by one process.
_PROGRESS_PAUSE = 0.2


def carrier_of(config: WorkerConfig) -> Optional[Carrier]:
    """Return what sends handlers to the executor's processes, None if they run in threads of this process.

    :raises ConfigurationError: by the carrier, for a handler that cannot be sent there.
    """
    backend = backend_of(config.executor)
    if backend is None:
        return None
    if backend.size is not None and config.max_workers > backend.size:
        log.warning(
            "max_workers is %d, but the executor has %s processes: tasks beyond that wait in it while their time runs; "
            "give max_workers=%s", config.max_workers, backend.size, backend.size,
        )  # fmt: skip

    return _RemoteCarrier(backend)


class _RemoteCarrier:
    """Send handlers to the processes of one executor."""

    values: Optional[Mapping[str, Any]] = None

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.has_processes = backend.has_processes

    def carry(self, option: str, function: Handler, injection: Optional[Injection]) -> Handler:
        """Return what runs ``function`` in another process.

        :raises ConfigurationError: it, or a resource that it may ask for, cannot be sent there.
        """
        backend = self._backend
        if injection is not None:
            injection = injection.for_process(option, function)
        try:
            # The annotation is resolved here: in the other process a function may lack its module.
            sent = (function, asked_for(function), injection)
            code = backend.dumps(sent)
        except Exception as error:  # noqa: BLE001
            problem = (
                f"cannot be sent to another process ({type(error).__name__}: {error}); with this executor a handler "
                "must be a function at the top level of a module" + (", and so must resources" if injection else "")
            )
        else:
            missing = backend.missing(sent, code)
            if not missing:
                return _RemoteHandler(backend, code)
            problem = f"cannot run in another process: {missing}"
        raise ConfigurationError(f"{where(function)} {problem}", option)


# -- in the worker's process ------------------------------------------------------------------------------------------


class _RemoteHandler:
    """Have a handler run in another process, and wait for it. The task's thread calls it."""

    def __init__(self, backend: Backend, code: bytes) -> None:
        self._backend = backend
        self._code = code

    def __call__(self, context: TaskContext, input: Any) -> Any:
        control = control_of(context)
        if control.is_wanted_back or context.is_cancelled():
            control.is_withdrawn = True
            raise _NotBegun(context.cancel_reason or WITHDRAWN)
        flag = self._backend.make_flag()
        try:
            data = self._backend.dumps((self._code, RemoteTaskContext(RemoteControl.of(context, flag)), input))
        except Exception as error:  # noqa: BLE001
            problem = f"{type(error).__name__}: {error}"
        else:
            return self._run(context, flag, data)
        raise TaskError("handler_error", f"the input cannot be sent to the handler's process ({problem})")

    def _run(self, context: TaskContext, flag: Flag, data: bytes) -> Any:
        watch = _Watch()
        try:
            future = self._backend.submit(run_remote, data, _Parent(context))
        except Exception as error:  # noqa: BLE001  # Broken, or shut down: each executor has its own error.
            problem = f"{type(error).__name__}: {error}"
        else:
            future.add_done_callback(watch.note_end)
            control = control_of(context)
            control.watch(watch.note_cancel, watch.note_withdrawal)
            try:
                self._wait(context, flag, future, watch)
            finally:
                # A call that was taken back may be in the executor yet, and must not find the flag gone.
                if control.is_withdrawn and not future.done():
                    # Not by the thread that calls back: it may be the one that carries Dask's calls.
                    future.add_done_callback(lambda _: threads.spawn(flag.lower, "sekuire-flag"))
                else:
                    flag.lower()
            if control.is_withdrawn:
                raise _NotBegun(context.cancel_reason or WITHDRAWN)
            return self._result(context, future, watch.is_answered)
        log.error("[%s] the executor accepts no more work (%s)", context.task_id, problem)
        raise TaskError("worker_shutdown", "the worker's executor accepts no more work", retryable=True)

    def _wait(self, context: TaskContext, flag: Flag, future: Future[Any], watch: _Watch) -> None:
        """Wait until the call has ended. Pass a cancellation on, and kill a process that ignores it.

        A call that has not begun is taken back instead, also where the task is only wanted back.
        """
        control = control_of(context)
        may_wait = True
        is_passed_on = False
        kill_after = self._backend.kill_after
        kill_at: Optional[float] = None
        while not future.done():
            watch.wait(None if kill_at in (None, math.inf) else kill_at - time.monotonic())
            if may_wait and (watch.is_cancelled or control.is_wanted_back):
                may_wait = False
                if self._backend.withdraw(future, flag):
                    control.is_withdrawn = True
                    return
            if watch.is_cancelled and not is_passed_on:
                is_passed_on = True
                flag.raise_(context.cancel_reason or "cancelled")
            if (watch.is_answered or control.is_called_off) and kill_at is None and kill_after is not None:
                kill_at = time.monotonic() + kill_after
            if kill_at is not None and time.monotonic() >= kill_at and not future.done():
                # A process that is still being started cannot be killed yet.
                kill_at = math.inf if self._kill(context, future) else time.monotonic() + _KILL_RETRY

    def _kill(self, context: TaskContext, future: Future[Any]) -> bool:
        if not self._backend.kill(future):
            return False
        log.warning(
            "[%s] the handler has not ended %.1f s after its task was %s; its process is killed",
            context.task_id, self._backend.kill_after,
            "cancelled" if control_of(context).is_called_off else "answered",
        )  # fmt: skip
        return True

    def _result(self, context: TaskContext, future: Future[Any], is_answered: bool) -> Any:
        """Return what the handler returned, or raise what it raised."""
        try:
            data = future.result()
        except concurrent.futures.CancelledError:
            problem = "the executor has given the call up"
        except ProcessDied as error:
            problem = str(error)
        except BaseException as error:  # noqa: BLE001
            # run_remote() raises nothing. This is the executor's own error, and the handler may have begun.
            problem = f"{type(error).__name__}: {error}"
        else:
            kind, value, violations = pickle.loads(data)
            repeat = getattr(context.policy, "repeat", None)
            if repeat is not None:
                for facts in violations:
                    repeat(PolicyViolationError(*facts))
            if kind == "returned":
                return pickle.loads(value)
            failed = load_error(value)
            if isinstance(failed, _NotBegun):
                control_of(context).is_withdrawn = True
            if isinstance(failed, (TaskCancelled, _NotBegun)) and failed.reason == "timeout":
                # The other process saw the end of the task's time before the worker's timer did.
                raise TaskError("timeout", "the task's time was over before its handler ended", retryable=True)
            if isinstance(failed, KeyboardInterrupt):
                # Ctrl-C reaches each process of its terminal, and pools of other libraries do not ignore it.
                raise TaskError("worker_shutdown", "Ctrl-C ended the task in its process", retryable=True)
            raise failed
        if control_of(context).is_called_off:
            raise TaskCancelled(context.cancel_reason or "cancelled")
        if threads.is_leaving():
            raise TaskError("worker_shutdown", "the program ended before the task did", retryable=True)
        log.log(
            logging.INFO if is_answered else logging.ERROR,
            "[%s] the handler's process was lost: %s", context.task_id, problem,
        )  # fmt: skip
        raise TaskError("handler_error", f"the handler's process was lost: {problem}", retryable=True)


class _Parent:
    """Do in the worker's process what a handler in another process asks for."""

    def __init__(self, context: TaskContext) -> None:
        self._context = context

    def on_progress(self, report: Tuple[float, Optional[str]]) -> None:
        self._context.report_progress(*report)

    def on_question(self, question: _Ask, answer: Callable[[Any], None]) -> None:
        """Have a person asked, and send the decision to the handler's process."""

        def done(approval: Optional[Approval], error: Optional[BaseException]) -> None:
            answer(approval if error is None else dump_error(error))

        asker: Any = control_of(self._context).asker
        if asker is None:
            done(None, ApprovalDenied(_CANNOT_ASK))
        else:
            asker.ask_later(self._context, question.subject(), question.policy, done)


class _NotBegun(TaskError):
    """Fail a task that was cancelled while it waited in the executor."""

    def __init__(self, reason: str) -> None:
        code = "worker_terminated" if reason == "terminated" else "worker_shutdown"
        super().__init__(code, f"cancelled before the task began ({reason})", retryable=True)
        self.reason = reason

    def __reduce__(self) -> Tuple[Any, ...]:
        return _NotBegun, (self.reason,)


class _Watch:
    """Wake a task's thread at the end of its call, and at a cancellation."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self.is_cancelled = False
        self.is_answered = False

    def note_end(self, future: Future[Any]) -> None:
        self._event.set()

    def note_cancel(self, answered: bool) -> None:
        self.is_answered = self.is_answered or answered
        self.is_cancelled = True
        self._event.set()

    def note_withdrawal(self) -> None:
        self._event.set()

    def wait(self, timeout: Optional[float]) -> None:
        self._event.wait(timeout if timeout is None else max(0.0, timeout))
        self._event.clear()


# -- in the other process ---------------------------------------------------------------------------------------------


class _Ask(NamedTuple):
    """Carry a request for approval to the worker's process.

    ``details`` is JSON. ``policy`` is None if the handler asks, not a policy. Else it says if that is the gateway's
    policy, and its hash.
    """

    kind: str
    name: str
    details: bytes
    timeout: float
    policy: Optional[Tuple[bool, Optional[str]]]

    def subject(self) -> Tuple[str, str, Any, float]:
        return self.kind, self.name, json.loads(self.details), self.timeout


class _RemoteAsker:
    """Ask through the worker's process."""

    def ask(
        self, context: TaskContext, kind: str, name: str, details: Any, timeout: float, enforcer: Any = None
    ) -> Optional[Approval]:
        """Ask, and wait for the decision: :meth:`sekuire.handlers.context.Asker.ask`."""
        control: Any = control_of(context)
        number = self._send(control, kind, name, details, timeout, enforcer)
        while True:
            answer = wait_for_answer(number, control.flag.step, lambda: bool(control.is_ended))
            if answer is not None:
                return _approval_in(answer[0])
            self._check(context)

    async def ask_async(self, context: TaskContext, kind: str, name: str, details: Any, timeout: float) -> Approval:
        """Ask, and let the loop go on until there is a decision."""
        import asyncio  # Only for async handlers.

        control: Any = control_of(context)
        number = self._send(control, kind, name, details, timeout, None)
        while True:
            answer = wait_for_answer(number, 0.0, lambda: bool(control.is_ended))
            if answer is not None:
                approval = _approval_in(answer[0])
                assert approval is not None
                return approval
            self._check(context)
            await asyncio.sleep(control.flag.step)

    @staticmethod
    def _send(control: Any, kind: str, name: str, details: Any, timeout: float, enforcer: Any) -> int:
        problem = _CANNOT_ASK
        try:
            plain = canonical_json(details)
        except Exception as error:  # noqa: BLE001  # It may be a class with code of its own.
            text = str(error) if isinstance(error, NotCanonical) else type(error).__name__
            problem = f"nobody was asked for {kind} {name!r}: the details cannot be shown: {text}"
        else:
            policy = None
            if enforcer is not None:
                policy = (enforcer is control.policy, getattr(enforcer.policy, "hash", None))
            number = None
            if not control.is_ended:
                number = send_question(_Ask(kind, name, plain, timeout, policy))
            if number is not None:
                return number
        raise ApprovalDenied(problem, {"kind": kind, "name": name})

    @staticmethod
    def _check(context: TaskContext) -> None:
        context.raise_if_cancelled()
        if getattr(control_of(context), "is_ended", False):
            raise ApprovalDenied("nobody can be asked: the handler has ended")


def _approval_in(answer: Any) -> Optional[Approval]:
    """Return the approval, or raise the error, that the worker's process has answered."""
    if not isinstance(answer, bytes):
        approval: Optional[Approval] = answer
        return approval
    error = load_error(answer)
    error.__cause__ = None
    raise error


class RemoteControl(TaskControl):
    """Hold what a :class:`RemoteTaskContext` needs in the other process. It can be pickled."""

    __slots__ = (
        "_enforcer",
        "_look",
        "_looked_at",
        "_reported_at",
        "ends_at",
        "flag",
        "home",
        "is_ended",
        "span",
        "violations",
    )

    def __init__(
        self,
        task: Task,
        ends_at: Optional[float],
        flag: Flag,
        home: int,
        enforcer: Optional[bytes] = None,
        ids: Optional[Mapping[str, Optional[str]]] = None,
        span: Optional[bytes] = None,
    ) -> None:
        super().__init__(task, None if ends_at is None else time.monotonic() + ends_at - time.time())
        #: What watches the handler there, pickled. None if nothing does.
        self.span = span
        self.owner = ids
        self.asker = _RemoteAsker()
        #: When the task's time ends, on the clock of ``time.time()``.
        self.ends_at = ends_at
        self.flag = flag
        #: The id of the worker's process.
        self.home = home
        #: What the policy has refused, for the enforcer of the worker's process.
        self.violations: List[PolicyViolationError] = []
        #: The handler has ended: what a thread reports that it left behind would count for the process's next task.
        self.is_ended = False
        # The pickled enforcer: None without one, empty if it cannot be pickled.
        self._enforcer = enforcer
        self._looked_at = -1.0
        #: The next look of a loop at the flag.
        self._look: Optional[TimerHandle] = None
        self._reported_at = -1.0

    @classmethod
    def of(cls, context: TaskContext, flag: Flag) -> RemoteControl:
        """Make the control for the other process from the context in the worker's."""
        task = attrs.evolve(control_of(context).task, input=None, attempt=context.attempt)
        left = context.remaining()
        ends_at = None if left is None else time.time() + left
        ids = ids_of(control_of(context).owner)
        return cls(task, ends_at, flag, os.getpid(), _pack(context.policy), ids, instrumentation.dump_remote())

    def __reduce__(self) -> Tuple[Any, ...]:
        return type(self), (self.task, self.ends_at, self.flag, self.home, self._enforcer, self.owner, self.span)

    def reason(self) -> Optional[str]:
        """Return why the task was cancelled. Look at the flag if that is due."""
        if self._reason is None:
            if self.end is not None and time.monotonic() >= self.end:
                self._reason = "timeout"
            elif self.flag.is_near or time.monotonic() - self._looked_at >= self.flag.step:
                self._looked_at = time.monotonic()
                self._reason = self.flag.read()
        return self._reason

    def wait(self, timeout: Optional[float]) -> bool:
        """Wait for a cancellation by looking at the flag again and again."""
        end = None if timeout is None else time.monotonic() + timeout
        while self.reason() is None:
            left = self.flag.step if end is None else min(self.flag.step, end - time.monotonic())
            if left <= 0:
                return False
            time.sleep(left)
        return True

    def attach_loop(self, loop: AbstractEventLoop, cancel: Callable[[], object]) -> None:
        """Have ``loop`` look at the flag again and again, and call ``cancel()`` when the task is cancelled."""

        def look() -> None:
            if self.reason() is not None:
                cancel()
            elif not self.is_ended:
                self._look = loop.call_later(self.flag.step, look)

        look()

    def detach_loop(self) -> None:
        """Undo :meth:`attach_loop`."""
        if self._look is not None:
            self._look.cancel()

    def ask_policy(self) -> Any:
        """Return a copy of the worker's enforcer, whose refusals are kept in ``violations``."""
        if self.policy is None and self._enforcer is not None:
            enforcer = _unpack(self._enforcer)
            reporting_to = getattr(enforcer, "reporting_to", None)
            self.policy = enforcer if reporting_to is None else reporting_to(self.violations.append)
        return self.policy

    def report(self, context: TaskContext, fraction: float, message: Optional[str]) -> None:
        """Send a report of progress to the worker's process, unless one was sent just now or the handler has ended."""
        now = time.monotonic()
        if not self.is_ended and now - self._reported_at >= _PROGRESS_PAUSE:
            self._reported_at = now
            send_message((fraction, message))


class RemoteTaskContext(TaskContext):
    """Show a handler its task in another process than the worker's. It can be pickled.

    A handler needs no change to run there:

    >>> from sekuire import TaskContext, TaskRegistry
    >>> tasks = TaskRegistry()
    >>> @tasks.task("sum")
    ... def add(ctx: TaskContext, input: dict) -> int:  # A RemoteTaskContext in a process of a ProcessExecutor.
    ...     ctx.raise_if_cancelled()
    ...     return sum(input["numbers"])

    It differs from a :class:`TaskContext` in these points. ``attempt`` is the one at the beginning. The deadline is
    kept by the clock of this machine. A cancellation is seen a moment later: every question, and
    :meth:`wait_cancelled` every 0.05 s (on Dask: 0.25 s), looks for it. Its reason may be ``"the worker died"``, and
    on a Dask cluster is ``"cancelled"``. :meth:`report_progress` reaches the platform from a ``ProcessExecutor``, and
    does nothing elsewhere. :meth:`require_approval` asks through the worker from there; elsewhere nobody can be asked,
    and it is denied. :attr:`policy` is a copy of the enforcer; the worker's hears of what it refused when the
    handler ends. Rate limits can be asked only if they are counted in a shared store.

    One thread at a time may use it.
    """

    __slots__ = ("_remote",)

    def __init__(self, control: RemoteControl) -> None:
        self._control = self._remote = control
        self._logger = None

    def __reduce__(self) -> Tuple[Any, ...]:
        return RemoteTaskContext, (self._remote,)

    @property
    def deadline(self) -> Optional[dt.datetime]:
        """Return when the task's time ends, as an aware UTC datetime; None without a limit."""
        end = self._remote.ends_at
        return None if end is None else dt.datetime.fromtimestamp(end, dt.timezone.utc)

    @property
    def policy(self) -> Any:
        """Return a copy of the enforcer that let this task begin; None without a policy gateway.

        :raises PolicyUnavailableError: the gateway's enforcer cannot be pickled.
        """
        return self._remote.ask_policy()


_loaded: Dict[bytes, Handler] = {}
_packed: weakref.WeakKeyDictionary[Any, bytes] = weakref.WeakKeyDictionary()
_unpacked: Dict[bytes, Any] = {}


def _pack(enforcer: Any) -> Optional[bytes]:
    """Pickle an enforcer, once for all tasks that it lets begin. Return an empty text if that fails."""
    if enforcer is None:
        return None
    try:
        data = _packed.get(enforcer)
        if data is None:
            data = _packed[enforcer] = pickle.dumps(enforcer)
    except Exception as error:  # noqa: BLE001  # The enforcer of a user's own gateway.
        log.debug("the policy's enforcer cannot be pickled (%s: %s)", type(error).__name__, error)
        return b""
    return data


def _unpack(data: bytes) -> Any:
    """Load an enforcer that :func:`_pack` has pickled, or find the one that was loaded before."""
    if not data:
        raise PolicyUnavailableError("the policy gateway's enforcer cannot be sent to the handler's process")
    enforcer = _unpacked.get(data)
    if enforcer is None:
        if len(_unpacked) >= _MAX_ENFORCERS:
            _unpacked.clear()
        enforcer = _unpacked[data] = pickle.loads(data)
    return enforcer


def run_remote(data: bytes) -> bytes:
    """Run one task's handler in the other process. Return its result or its error, pickled. Raise nothing."""
    violations: List[PolicyViolationError] = []
    try:
        code, context, input = pickle.loads(data)
        control: Any = control_of(context)
        violations = control.violations
        if control.home != os.getpid():  # A cluster of threads is in the worker's own process.
            threads.enter_executor()
        hindrance = control.flag.begin()
        if hindrance == WITHDRAWN:
            raise _NotBegun(WITHDRAWN)
        if hindrance:
            raise TaskError("handler_error", "the handler's process was lost, and a task is not run twice", True)
        if context.is_cancelled():
            raise _NotBegun(context.cancel_reason or "cancelled")
        function = _loaded.get(code)
        if function is None:
            loaded, annotation, injection = pickle.loads(code)
            inner = loaded if injection is None else injection.in_process(loaded)
            function = _loaded[code] = with_structure(inner, structure_of(annotation))
        token = current_task.set(context)
        span = instrumentation.load_remote(control.span)
        try:
            if span is None:
                result = call(function, context, input)
            else:
                result = span.run(context, functools.partial(call, function, context, input))
        finally:
            control.is_ended = True
            current_task.reset(token)
        try:
            return pickle.dumps(("returned", pickle.dumps(result), _facts_of(violations)))
        except Exception as error:  # noqa: BLE001
            problem = f"{type(error).__name__}: {error}"
        raise TaskError(
            "result_not_serializable", f"the handler's result cannot be sent back by its process ({problem})"
        )
    except BaseException as error:  # noqa: BLE001
        # Here, because a group may not be picklable, and the cause of an error is not pickled with it.
        return pickle.dumps(("raised", dump_error(unwrap(error)), _facts_of(violations)))


def _facts_of(violations: List[PolicyViolationError]) -> List[Tuple[Any, ...]]:
    return [(one.rule, one.reason, one.retry_after) for one in violations]
