"""Test handlers and submissions without a platform, and workers on a local one, without sleeping."""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import itertools
import threading
import weakref
from concurrent.futures import Executor, Future
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any, Callable, Dict, Iterator, List, Mapping, Optional, Tuple, Type, Union

import attrs

from ._internal.threads import Deadline, Timer
from .approvals import ApprovalRequest
from .calls.link import in_place_of_platform
from .calls.recorded import Recorded, SubmittedTask
from .config import WorkerConfig
from .errors import ConfigurationError, TaskFailed
from .handlers.context import TaskContext
from .handlers.invoke import Handler, asked_for, call, keywords_of, structure_of, with_structure
from .handlers.registry import TaskRegistry
from .handlers.resources import Injection
from .wire import protocol
from .wire.models import Completion, Failure, Task
from .worker.approvals import Approvals
from .worker.dispatch import Dispatcher
from .worker.questions import Questions
from .worker.release import Release
from .worker.results import encode
from .worker.sink import Accepted, SingleResult
from .worker.worker import Worker, create_worker

if TYPE_CHECKING:
    from .local import LocalPlatform

__all__ = ["AGENT", "SubmittedTask", "TaskResult", "Workbench", "run_task", "submitted", "wait_idle"]

#: The agent of a :class:`Workbench`'s workers, unless one is given.
AGENT = "test-agent"

#: Seconds between two looks at a state that nothing announces.
_LOOK = 0.005
#: The fields of a task that ``run_task`` accepts as ``context``.
_FIELDS = tuple(field.name for field in attrs.fields(Task) if field.name not in ("capability", "input"))
_numbers = itertools.count(1)
_OWN: Any = object()
#: The platform of each worker that a Workbench has made.
_platforms: weakref.WeakKeyDictionary[Worker, LocalPlatform] = weakref.WeakKeyDictionary()


@attrs.frozen(kw_only=True, slots=True)
class TaskResult:
    """Hold a task's result as its requester would get it, and what else a test wants to see. ::

        result = run_task(tasks, "shorten", {"text": "A long story"})
        print(result.status, result.output)  # completed {'text': 'A long story'}

    ``status`` is ``"completed"`` or ``"failed"``. ``output`` is what the platform would read from the JSON. ``value``
    is the same, and raises if the task failed. ``error`` has a ``code``, ``message``, ``retryable`` and ``details``.
    ``progress`` lists the fractions that the handler reported, each with its message. ``approvals`` lists what was
    asked for (:class:`sekuire.approvals.ApprovalRequest`). ``exception`` is what the handler or its middleware raised,
    or None.
    """

    status: str
    output: Any = None
    error: Optional[Failure] = None
    progress: Tuple[Tuple[float, Optional[str]], ...] = ()
    approvals: Tuple[ApprovalRequest, ...] = ()
    execution_time_ms: int = 0
    exception: Optional[BaseException] = attrs.field(default=None, eq=False)

    @property
    def value(self) -> Any:
        """The output of a completed task. ::

            assert run_task(tasks, "shorten", {"text": "A long story"}).value == {"text": "A long story"}

        :raises TaskFailed: the task failed. The cause is what the handler raised, if it raised something.
        """
        if self.error is None:
            return self.output
        error = self.error
        raise TaskFailed(error.code, error.message, error.details, error.retryable) from self.exception


def run_task(
    worker: Union[Worker, TaskRegistry],
    capability: str,
    input: Any = None,
    *,
    policy_gateway: Any = _OWN,
    resources: Optional[Mapping[str, Any]] = None,
    approve: Union[bool, Callable[[ApprovalRequest], object]] = False,
    **context: Any,
) -> TaskResult:
    """Run one handler as a worker would, but without the network, and return its result. ::

        result = run_task(tasks, "shorten", {"text": "A long story"}, timeout=5.0)
        assert result.output == {"text": "A long story"}

    The task passes the handler look-up, policy gateway, typed input, middleware, timeout, mapping of exceptions and
    JSON encoding. There is no login and no lease, and nothing is sent. The worker need not be started and does not
    change. The handler runs in the calling thread, so that a test's transaction, a debugger and Ctrl-C reach it. Within
    a running event loop it runs in a thread of its own. A handler that outlives its timeout blocks the caller until it
    returns; the result is then ``timeout``.

    :param worker: a Worker, or a :class:`~sekuire.TaskRegistry`, which needs no credentials.
    :param input: the task's input; it must have a JSON form.
    :param policy_gateway: used in place of the worker's. None: no gateway.
    :param resources: values that replace resources, ``{"db": fake}``. Others that the handler uses are opened for this
        run and closed at its end, whatever their scope.
    :param approve: decides on each request for approval, of the handler and of the policy: True, or a function that
        returns True. Anything else denies.
    :param context: further fields of the task, such as ``trace_id``, ``workspace_id``, ``attempt`` or ``timeout``
        (seconds).
    :raises ConfigurationError: an argument is wrong, such as a capability without a handler, an unknown field or an
        input without a JSON form.
    """
    if isinstance(worker, Worker):
        config, handlers = worker.config, worker.handlers
        worker.made.forget()
    elif isinstance(worker, TaskRegistry):
        config, handlers = WorkerConfig(agent_id=AGENT), worker
    else:
        raise ConfigurationError(f"must be a Worker or a TaskRegistry, got {type(worker).__name__}", "worker")
    if not isinstance(approve, bool) and not callable(approve):
        raise ConfigurationError(f"must be True, False or a function, got {approve!r}", "approve")
    task = _task(capability, input, context)
    _check_known(handlers, capability)
    config = attrs.evolve(
        config,
        executor=_Inline() if not _is_in_loop() else None,
        policy_gateway=config.policy_gateway if policy_gateway is _OWN else policy_gateway,
    )
    sink = _Sink(config.max_result_bytes, config.result_encoder)
    config = attrs.evolve(config, approval_handler=sink.decider(approve))
    registry = handlers.copy_for(capability)
    registry.freeze(_Alone(registry, resources))
    for entry in registry:
        entry.call = sink.watch(entry.call)
    timer = Timer()
    approvals = Approvals(config, Questions(config, None, timer=timer))
    dispatcher = Dispatcher(config, registry, sink, timer=timer, lease=_Lease(), approvals=approvals)
    try:
        dispatcher.submit(task)
        sink.done.wait()
    finally:
        timer.close()
        patience = Deadline(10.0)
        dispatcher.end_pool(patience)
        timer.join(patience)
    if isinstance(sink.exception, KeyboardInterrupt):
        raise sink.exception
    return sink.result()


@contextlib.contextmanager
def submitted(
    run: Union[Worker, TaskRegistry, Mapping[str, Handler], None] = None,
) -> Iterator[List[SubmittedTask]]:
    """Record every task that this process submits, in place of a platform. ::

        with submitted() as tasks:
            order_a_summary()
        assert [task.capability for task in tasks] == ["summarize"]

    It catches the submissions of every :class:`~sekuire.SekuireClient`, in every thread: ``submit``, ``submit_many``
    and ``call``, of ``sdk.client()`` too, ``submit_on_commit`` of Django (at the commit) and ``submit`` of the Flask
    extension. Nothing is sent. A client still needs its settings, whatever their values. Handles work: a recorded task
    is ``"queued"``, and waiting for it is an error instead of a wait without end. Calls about anything but tasks go to
    the platform.

    :param run: run each task at its submission, as :func:`run_task` does, in the thread that submits it: by a Worker, a
        :class:`~sekuire.TaskRegistry`, or a mapping from a capability to its handler. Handles have results then. A task
        with ``max_attempts`` is tried again. ``delay`` is not waited for. A capability without a handler is only
        recorded.
    :raises ConfigurationError: ``run`` is none of these.
    """
    source = TaskRegistry()
    if run is not None:
        _check_source(run, "run")
    if isinstance(run, (Worker, TaskRegistry)):
        handlers = run.handlers if isinstance(run, Worker) else run
    else:
        handlers = source
        for name, handler in (run or {}).items():
            source.task(name, handler)

    def run_one(task: SubmittedTask) -> Optional[TaskResult]:
        if handlers.find(task.capability) is None:
            return None
        return run_task(
            run if isinstance(run, Worker) else handlers,
            task.capability,
            task.input,
            task_id=task.task_id,
            attempt=task.attempt,
            timeout=task.timeout,
            workspace_id=task.workspace_id,
            trace_id=task.trace_id,
        )

    tasks: List[SubmittedTask] = []
    hint = "give run= a registry, or a mapping, with a handler for it"
    with in_place_of_platform(Recorded(tasks, run_one, hint)):
        yield tasks


def wait_idle(
    worker: Worker, timeout: float = 10.0, *, platform: Optional[LocalPlatform] = None, audit: bool = True
) -> None:
    """Wait until no task waits or runs and every result is delivered.

    :param platform: also wait for its queued and assigned tasks of the worker's agent. A worker of a
        :class:`Workbench` knows its platform. Without one, tasks that the worker has not received do not count.
    :param audit: also deliver the audit events of the worker's SDK.
    :raises TimeoutError: something is left after ``timeout`` seconds; the text says what.
    """
    deadline = Deadline(timeout)
    platform = platform or _platforms.get(worker)
    pause = threading.Event()
    while True:
        left = _left(worker, platform)
        if not left:
            break
        if deadline.is_expired():
            raise TimeoutError(f"after {timeout:g} s there are still {', '.join(left)}")
        pause.wait(min(_LOOK, deadline.remaining()))
    if audit and worker.audit is not None and not worker.audit.flush(deadline.remaining()):
        raise TimeoutError(f"after {timeout:g} s there are still {worker.audit.stats().waiting} audit events to send")


class Workbench:
    """Start a local platform and workers for one test, and stop them at its end. ::

        with Workbench() as bench:
            worker = bench.worker(tasks)
            task_id = bench.platform.submit("shorten", {"text": "A long story"})
            wait_idle(worker)
            print(bench.platform.task(task_id)["status"])  # completed

    Where ``with`` does not fit use :meth:`close`, as in ``self.addCleanup(bench.close)`` of a ``unittest.TestCase``.
    The fixtures of the pytest plugin use this class. It needs the extra: ``pip install 'sekuire[testing]'``.

    :param options: options of the :class:`~sekuire.local.LocalPlatform`. By default it redelivers and retries sooner
        than it does elsewhere.
    """

    def __init__(self, **options: Any) -> None:
        from .local import LocalPlatform

        #: The platform, started.
        self.platform = LocalPlatform(**{"redelivery_delay": 0.2, "retry_delay": 0.05, **options})
        self._workers: List[Worker] = []
        self.platform.start()

    def worker(self, *handlers: Union[TaskRegistry, Mapping[str, Handler]], **options: Any) -> Worker:
        """Return a Worker of this platform. It is started if there are ``handlers``; else register and start it.

        :param handlers: registries to include, or mappings from a capability to its handler.
        :param options: options of :class:`~sekuire.WorkerConfig`. By default ``agent_id`` is ``test-agent``, a lost
            stream is reopened soon, and a stop lets handlers go on for 5 s.
        :raises ConfigurationError: an option or handler is wrong.
        """
        for source in handlers:
            _check_source(source)
        agent_id = options.get("agent_id", AGENT)
        logins = {"install_token", "runtime_token", "refresh_token", "token_provider", "credentials_store"}
        if not logins & set(options):
            options["install_token"] = self.platform.create_install_token(agent_id)
        worker = create_worker(
            **{
                "api_base_url": self.platform.url,
                "agent_id": agent_id,
                "reconnect_min": 0.01,
                "reconnect_max": 0.1,
                "shutdown_timeout": 5.0,
                **options,
            }
        )
        _platforms[worker] = self.platform
        self._workers.append(worker)
        for source in handlers:
            if isinstance(source, TaskRegistry):
                worker.include(source)
            else:
                for name, handler in source.items():
                    worker.on_task(name, handler)
        if handlers:
            worker.start()
        return worker

    def environment(self, agent_id: str = AGENT) -> Dict[str, str]:
        """Return the ``SEKUIRE_...`` variables with which ``SekuireSDK.from_env()`` finds this platform."""
        return {
            "SEKUIRE_API_URL": self.platform.url,
            "SEKUIRE_AGENT_ID": agent_id,
            "SEKUIRE_INSTALL_TOKEN": self.platform.create_install_token(agent_id, max_uses=1000),
            "SEKUIRE_API_KEY": self.platform.api_key,
        }

    def close(self) -> None:
        """Stop the workers, then the platform. Calling it again is harmless."""
        workers, self._workers = self._workers, []
        for worker in workers:
            worker.request_stop()
        for worker in workers:
            worker.stop()
        self.platform.stop()

    def __enter__(self) -> Workbench:
        return self

    def __exit__(
        self,
        kind: Optional[Type[BaseException]],
        error: Optional[BaseException],
        traceback: Optional[TracebackType],
    ) -> None:
        self.close()


# -- inside -----------------------------------------------------------------------------------------------------------


def _task(capability: str, input: Any, context: Mapping[str, Any]) -> Task:
    """Return the task as it would come over the wire."""
    unknown = sorted(set(context) - set(_FIELDS))
    if unknown:
        raise ConfigurationError(f"unknown field of a task; known are {', '.join(_FIELDS)}", unknown[0])
    fields = dict(context)
    timeout = fields.pop("timeout", None)
    if timeout is not None:
        if isinstance(timeout, bool) or not isinstance(timeout, (int, float)):
            raise ConfigurationError(f"must be a number of seconds, got {timeout!r}", "timeout")
        fields["timeout_ms"] = timeout * 1000.0
    problem = ""
    try:
        text = protocol.encode_json(
            {"task_id": f"test-task-{next(_numbers)}", "capability": capability, "input": input, **fields}
        ).decode()
    except (ValueError, TypeError, RecursionError, OverflowError) as error:
        problem = f"has no JSON form: {error}"
    if problem:
        raise ConfigurationError(problem, "input")
    try:
        return protocol.decode_task(text)
    except protocol.Malformed as error:
        problem = str(error)
    raise ConfigurationError(f"is not a task that a platform could send: {problem}", "run_task")


def _check_known(handlers: TaskRegistry, capability: str) -> None:
    """Raise ConfigurationError if no handler would run. A worker answers such a task; a test has a spelling mistake."""
    if handlers.find(capability) is not None:
        return
    names = handlers.names
    close = difflib.get_close_matches(capability, names, n=1)
    known = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(map(repr, names)) or 'no handlers'}"
    raise ConfigurationError(f"no handler for {capability!r}; {known}", "capability")


def _check_source(source: Any, option: str = "worker") -> None:
    """Raise ConfigurationError if there are no handlers in ``source``. In place of a worker it cannot be one."""
    if isinstance(source, (TaskRegistry, Mapping)) or (option != "worker" and isinstance(source, Worker)):
        return
    found = type(source).__name__
    if isinstance(source, ModuleType):
        found = f"the module {source.__name__}"
        names = [f"{source.__name__}.{name}" for name, value in vars(source).items() if isinstance(value, TaskRegistry)]
        if names:
            found += f"; did you mean {' or '.join(names)}?"
    raise ConfigurationError(
        f"must be a TaskRegistry, or a mapping from a capability to its handler, got {found}", option
    )


def _is_in_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _left(worker: Worker, platform: Optional[LocalPlatform]) -> List[str]:
    left = []
    if platform is not None:
        # Before the worker's numbers: a task that leaves the platform in between is then counted there.
        agent_id = worker.config.agent_id
        for status in ("queued", "assigned"):
            tasks, _ = platform._store.tasks(status, None, 1000, None)
            left += [
                f"{status} task {one['task_id']} ({one['capability']})" for one in tasks if one["agent_id"] == agent_id
            ]
    stats = worker.stats()
    for name in ("waiting", "running", "undelivered"):
        count = getattr(stats, name)
        if count:
            left.append(f"{count} {name}")
    return left


class _Alone:
    """Have a handler run with resources of its own, or with values in their place."""

    has_processes = True

    def __init__(self, registry: TaskRegistry, values: Optional[Mapping[str, Any]]) -> None:
        if values is not None and not isinstance(values, Mapping):
            raise ConfigurationError(
                f"must be a mapping, such as {{'db': fake}}, got {type(values).__name__}", "resources"
            )
        self.values: Optional[Mapping[str, Any]] = {} if values is None else values
        names = {one.name for one in registry.resources}.union(*(keywords_of(entry.function) for entry in registry))
        for name in self.values or ():
            if name not in names:
                close = difflib.get_close_matches(name, names, n=1)
                known = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(sorted(names)) or 'none'}"
                raise ConfigurationError(f"no resource {name!r}; {known}", "resources")

    def carry(self, option: str, function: Handler, injection: Optional[Injection]) -> Handler:
        """Return the handler with its resources and its input."""
        inner = function if injection is None else injection.around_alone(function, self.values or {})
        return with_structure(inner, structure_of(asked_for(function)))


class _Inline(Executor):
    """Run each call at once, in the thread that submits it."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


class _Lease:
    """Stand for a lease that never ends."""

    def is_held(self) -> bool:
        return True


class _Sink(SingleResult):
    """Accept the one result of one task, as a Reporter would, and set ``done`` once it is complete."""

    def __init__(self, max_bytes: int, result_encoder: Optional[Callable[[Any], Any]]) -> None:
        self.done = threading.Event()
        self.exception: Optional[BaseException] = None
        self.code: Optional[str] = None
        self.on_room: Callable[[], None] = lambda: None
        self._max_bytes = max_bytes
        self._result_encoder = result_encoder
        self._head = b""
        self._progress: List[Tuple[float, Optional[str]]] = []
        self._approvals: List[ApprovalRequest] = []

    def decider(self, approve: Any) -> Callable[[ApprovalRequest], object]:
        """Return the function that decides on requests for approval, and notes them."""

        def decide(request: ApprovalRequest) -> object:
            self._approvals.append(request)
            return approve(request) if callable(approve) else approve

        return decide

    def watch(self, function: Handler) -> Handler:
        """Return ``function`` wrapped, so that what it raises is kept in ``exception``."""

        def run(context: TaskContext, input: Any) -> Any:
            try:
                return call(function, context, input)
            except BaseException as error:
                self.exception = error
                raise

        return run

    def result(self) -> TaskResult:
        body = protocol.decode_body(self._head + b"}")
        error = body.get("error")
        return TaskResult(
            status=body["status"],
            output=body.get("output"),
            error=None if error is None else Failure(**error),
            progress=tuple(self._progress),
            approvals=tuple(self._approvals),
            execution_time_ms=body["execution_time_ms"],
            exception=self.exception,
        )

    def accept(self, completion: Completion) -> Optional[Accepted]:
        self._head, self.code = encode(completion, self._max_bytes, self._result_encoder)
        return self

    def post(self, report: Any) -> None:
        self.done.set()

    def enqueue(self, report: Any) -> None:
        self.done.set()

    def release(self, release: Release, delay: float = 0.0) -> None:
        release.end(is_released=False, is_supported=False)

    def progress(self, context: TaskContext, fraction: float, message: Optional[str]) -> None:
        self._progress.append((fraction, message))
