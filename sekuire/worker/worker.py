"""Build a worker from its parts, register handlers, start it, stop it, and say how it is."""

from __future__ import annotations

import contextlib
import os
from types import TracebackType
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Tuple, Type

import attrs

from .._internal.ending import FLUSH_TIME, end_process
from .._internal.greenlets import is_main_thread
from .._internal.logs import enable_loggers, get_logger
from .._internal.raising import raises_here
from .._internal.signals import DrainSignals, name_of
from .._internal.threads import Timer, at_exit, check_process, check_starter, is_in_executor, is_owned_by
from .._internal.unstarted import Made
from ..audit.log import AuditLog
from ..config import HealthAddress, WorkerConfig, from_options, function_of_options, keep_quiet
from ..errors import ConfigurationError
from ..handlers.registry import Carrier, TaskRegistry
from ..logging import print_as
from ..session.installation import Installation
from ..wire.models import Task, WorkerHealth, WorkerStats
from .announcer import Announcer
from .answers import WorkerAudit
from .approvals import Approvals
from .control import Control
from .dispatch import Dispatcher
from .idle import IdleWatch
from .life import Life, Phase
from .profile import Profile
from .questions import Questions
from .records import PushedSink
from .registration import Registration
from .report import Reporter
from .resources import WorkerResources
from .shutdown import LAST_BEAT, Shutdown
from .sink import NotReadyError
from .start_checks import check_start, warn_of_unhandled
from .stream import TaskStream
from .vitals import Vitals

if TYPE_CHECKING:
    from .outbox import Outbox

log = get_logger("sekuire.worker")


#: Connections that may be kept open, at least: a cap, which costs nothing while they are not needed.
POOL_SIZE = 256
#: Seconds between two looks at the signals that came.
_SIGNAL_SLICE = 0.25


class Worker(Registration):
    """Read an agent's task stream, run a handler for each task and report the results.

    ``worker.start(block=True)`` runs it until a signal or the platform stops it; a test can run one handler alone:

    >>> from sekuire import Worker, WorkerConfig
    >>> from sekuire.testing import run_task
    >>> worker = Worker(WorkerConfig(agent_id="greeter", install_token="skt-1"))
    >>> @worker.on_task("greet")
    ... def greet(ctx, input):
    ...     return "Hello, " + input["name"]
    >>> run_task(worker, "greet", {"name": "Ada"}).output
    'Hello, Ada'

    Any thread may call its methods, also that of a handler or a callback.

    :param config: the settings; :func:`create_worker` makes them from keyword arguments.
    :raises ConfigurationError: a setting is wrong, or there is nothing to authenticate with.
    """

    # Threads: `sekuire-stream` logs in, reads and decides; `sekuire-heartbeat` beats; `sekuire-task_N` run handlers and
    # send their first report; `sekuire-report-N` send the others; `sekuire-timer` ends tasks and watches the lease;
    # `sekuire-callback` runs the user's callbacks; `sekuire-shutdown` runs the stop. The Worker has no lock: what
    # changes is in its parts, its phase in `life.Life`.

    def __init__(
        self,
        config: WorkerConfig,
        *,
        _installation: Optional[Installation] = None,
        _audit: Optional[AuditLog] = None,
    ) -> None:
        if not isinstance(config, WorkerConfig):
            raise ConfigurationError(
                f"must be a WorkerConfig, got {type(config).__name__}; or use create_worker(...)", "config"
            )
        keep_quiet(config.quiet)
        print_as(config.log_format)
        import uuid  # Here, to keep `import sekuire` cheap: it looks at the machine when it is imported.

        self.pid = os.getpid()
        self.worker_id = uuid.uuid4().hex
        #: Warns at the end of the program if this is never started.
        self.made = Made(f"the Worker of agent {config.agent_id!r}")
        #: The settings. :meth:`reconfigure` replaces them.
        self.config = config
        #: The SekuireSDK that made this worker, if one did; set by it.
        self.sdk: Any = None
        self.audit = _audit
        #: The handlers and the middleware of this worker.
        self.handlers = TaskRegistry(_option="on_task")
        self._announcer = Announcer(self.worker_id, _audit, owner=self)
        self._life = Life(
            config.shutdown_timeout,
            self._announcer,
            owner=self,
            is_required=_installation is None or _installation.is_required,
        )
        #: The way to the platform, shared with the SDK if one made this worker.
        self.installation = _installation or Installation(
            config, pool_size=max(config.max_workers + 6, POOL_SIZE), token_provider=config.token_provider, owner=self
        )
        self._heartbeat = self.installation.heartbeat
        self._profile = Profile(config, self.worker_id, self.handlers)
        self._timer = Timer(owner=self)
        outbox: Optional[Outbox] = None
        # A process that runs handlers may import the module that makes this worker; it will not start it.
        if config.outbox is not None and not is_in_executor():
            from .outbox import open_outbox  # SQLite is for those who keep results on disk.

            outbox = open_outbox(config.outbox)
        self._reporter = Reporter(config, self.installation.auth, self.worker_id, self._life, outbox=outbox, owner=self)
        audit = None if _audit is None else WorkerAudit(_audit, self.worker_id)
        questions = Questions(config, self._reporter.sender, timer=self._timer, audit=audit, owner=self)
        self._dispatcher = Dispatcher(
            config,
            self.handlers,
            self._reporter,
            timer=self._timer,
            lease=self._heartbeat.lease,
            audit=audit,
            approvals=Approvals(config, questions),
            owner=self,
        )
        self._control = Control(
            config,
            self._life,
            self.installation,
            self._dispatcher,
            self._reporter,
            self._profile,
            self._timer,
            self._announcer,
        )
        self._stream = TaskStream(config, self.installation.auth, self._control, self._profile, self._life)
        #: The open resources of the worker's scope.
        self.shared = WorkerResources(self)
        #: Says how it is, also over HTTP.
        self.vitals = Vitals(
            self._profile,
            self._life,
            self.installation,
            self._stream,
            self._control,
            self._dispatcher,
            self._reporter,
            questions,
        )
        self._shutdown = Shutdown(
            self._life,
            self._stream,
            self._control,
            self._dispatcher,
            self._reporter,
            self.installation,
            (self._timer, self._announcer, self.vitals, questions),
            self.shared,
            outbox=outbox,
            is_shared=_installation is not None,
        )
        self._life.attach(self._shutdown)

    # -- life --

    @raises_here
    def start(self, block: bool = False) -> None:
        """Log in and begin to work.

        First it opens the resources of the worker. What the code of one raises is raised here, and the others are
        closed. Then it waits at most ``start_timeout`` seconds for the platform's first answer. A platform that cannot
        be reached is not an error: the login goes on in the background.

        :param block: return only when the worker has stopped: by :meth:`stop`, a ``terminate`` command, a revocation,
            ``stop_when_idle``, SIGINT, SIGTERM or SIGHUP (in the main thread, unless it was ignored). A further SIGINT
            or SIGTERM, at least 1 s after the first, ends the process with exit code 128 + its number.
        :raises AuthenticationError: the platform refused every login method.
        :raises ConfigurationError: there is no handler, or the worker was started or stopped before.
        :raises SekuireError: with ``block``, the error because of which the worker stopped.
        """
        self.made.forget()
        check_starter("Worker")
        enable_loggers()
        check_process(self.pid, "Worker")
        self._check_startable()
        problem = self.installation.problem
        if problem is not None:
            if block:
                raise problem
            # The program goes on, and so must its probes.
            self.vitals.show()
            log.warning("the worker does not start: %s", problem)
            return
        self.vitals.begin_life()
        try:
            # Before the signals are handled, so that each of them ends a resource that does not open.
            self.shared.open(self.handlers.opened)
        except BaseException:
            self._life.request_stop(0.0, reason="a resource could not be opened")
            self.wait(LAST_BEAT)
            raise
        signals = DrainSignals() if block and is_main_thread() else None
        self._life.is_awaited = True
        with signals or contextlib.nullcontext():
            try:
                # A stop may have come while resources were opened.
                if self._life.phase is Phase.RUNNING:
                    self._begin()
                if block:
                    _wait_for_end(self._life, self._dispatcher, signals)
                elif not is_owned_by(self):
                    self._life.wait_for_verdict(self.installation.start_time(self.config.start_timeout))
            except BaseException:
                # KeyboardInterrupt above all: whoever waits here is leaving, so the threads must not stay.
                self._life.request_stop(0.0)
                raise
        if self._life.error is None:
            # From now on an error is logged. Only then look again: one that came before that is raised.
            self._life.is_awaited = False
        error = self._life.error
        if error is not None:
            self.wait(self.config.shutdown_timeout)
            raise error

    def stop(self, timeout: Optional[float] = None) -> None:
        """Stop: give back what has not begun, let running handlers end, send reports, and end every thread.

        Any thread may call it, in any state and more than once. In one of the worker's own threads (a handler, a
        callback) it asks for the stop and returns.

        :param timeout: seconds for all of it (default ``shutdown_timeout``); running handlers are cancelled at its
            end, and answered ``worker_shutdown``.
        """
        self.request_stop(timeout)
        if not is_owned_by(self):
            # What follows the deadline (the last heartbeat, closing) has a limit of its own.
            self.wait(self._life.deadline.remaining() + LAST_BEAT + 1.0)

    def request_stop(self, timeout: Optional[float] = None) -> None:
        """Begin the stop as :meth:`stop` does, and return at once."""
        check_process(self.pid, "Worker")
        self.made.forget()
        self._life.request_stop(timeout)

    def wait(self, timeout: Optional[float] = None) -> bool:
        """Wait at most ``timeout`` seconds for the worker's end. Return True if it has stopped."""
        return self._life.wait(timeout)

    def wait_until_connected(self, timeout: Optional[float] = None) -> bool:
        """Wait at most ``timeout`` seconds for an open task stream. Return True if it is open."""
        return self._life.wait_until_connected(timeout)

    @raises_here
    def __enter__(self) -> Worker:
        self.start()
        return self

    def __exit__(
        self,
        kind: Optional[Type[BaseException]],
        error: Optional[BaseException],
        traceback: Optional[TracebackType],
    ) -> None:
        self.stop()

    # -- state --

    def is_running(self) -> bool:
        """Return True from the start until the worker has stopped, also while it drains."""
        return self._life.phase in (Phase.RUNNING, Phase.STOPPING)

    def is_alive(self) -> bool:
        """Return True if the worker drains, or runs and its stream's thread lives. For probes.

        The platform may be unreachable at that time.
        """
        return self._life.phase is not Phase.NEW and self.vitals.is_live()

    def is_connected(self) -> bool:
        """Return True if the task stream is open."""
        return self._life.is_connected

    def is_paused(self) -> bool:
        """Return True if a command, the platform's desired state or :meth:`pause` holds the worker."""
        return self._dispatcher.is_paused()

    @property
    def stop_reason(self) -> Optional[str]:
        """Return why it stopped or is stopping, None while it does neither."""
        return self._life.reason

    @property
    def capabilities(self) -> Tuple[str, ...]:
        """Return the declared capabilities and those with a handler."""
        return self._profile.capabilities

    def capability_info(self) -> List[Dict[str, Any]]:
        """Return each capability's name, description and JSON Schemas, as they are published to the platform.

        :raises ConfigurationError: a mistake in the declared resources.
        """
        self.handlers.injections(_carrier_of(self.config))
        return self._profile.describe()

    def pause(self, reason: Optional[str] = None) -> None:
        """Accept no tasks: each is answered ``worker_paused`` (retryable). Running ones go on."""
        if self._dispatcher.pause("local", reason):
            log.info("paused%s", f": {reason}" if reason else "")
            self._announcer.note_state("paused", reason)
            self._heartbeat.nudge()

    def resume(self) -> None:
        """Undo :meth:`pause`; a pause that the platform ordered stays."""
        if self._dispatcher.resume("local"):
            log.info("resumed%s", ", but the platform's pause holds" if self.is_paused() else "")
            self._announcer.note_state("resumed")
            self._heartbeat.nudge()

    def stats(self) -> WorkerStats:
        """Return the counts since the start and the state of the lease."""
        return self.vitals.stats()

    def health(self) -> WorkerHealth:
        """Return whether it lives and is ready for tasks, why not, and how its lease and its heartbeat are."""
        return self.vitals.health()

    @property
    def health_address(self) -> Optional[Tuple[str, int]]:
        """Return the host and the port where it is shown over HTTP, None if it is not shown now."""
        return self.vitals.address

    def __repr__(self) -> str:
        return f"<Worker {self.config.agent_id} {self.worker_id[:8]} {self._life.phase.value}>"

    # -- tasks that do not come from the platform --

    def push(self, task: Task, sink: PushedSink) -> None:
        """Run a task that did not come from the platform as one that did, and give its result to ``sink``.

        :raises NotReadyError: the worker is not started, has not been connected yet, or stayed behind at a fork.
        """
        if os.getpid() != self.pid:
            raise NotReadyError("the worker runs in another process; start one in each process that has the endpoint")
        if self._life.phase is Phase.NEW:
            raise NotReadyError("the worker is not started")
        # Until then it has no lease, and may be refused. Once it stops, the dispatcher knows what to answer.
        if self._life.phase is Phase.RUNNING and not self._life.was_connected:
            raise NotReadyError("the worker has not been connected to the platform yet")
        self._dispatcher.push(task, sink)

    def cancel_pushed(self, sink: PushedSink, reason: str) -> None:
        """Cancel a pushed task that has not ended."""
        self._dispatcher.answers.cancel(sink, reason)

    # -- starting --

    def reconfigure(
        self,
        *,
        max_workers: Optional[int] = None,
        stop_when_idle: Optional[float] = None,
        health: Optional[HealthAddress] = None,
    ) -> None:
        """Change options of a worker that has not started, as command lines do. None leaves an option as it is."""
        given = {"max_workers": max_workers, "stop_when_idle": stop_when_idle, "health": health}
        changes: Dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        if self._life.phase is not Phase.NEW:
            raise ConfigurationError("cannot be changed once the worker was started", ", ".join(changes))
        self.config = self._profile.config = attrs.evolve(self.config, **changes)
        self._dispatcher.resize(self.config)

    def _check_startable(self) -> None:
        check_start(self.config, self.handlers, self.installation)
        if self.sdk is not None:
            self.sdk.check_handlers()
        if self._life.phase is Phase.NEW:
            self.handlers.freeze(_carrier_of(self.config))

    def _begin(self) -> None:
        warn_of_unhandled(self.config, self.handlers)
        self.installation.declare(*self.capabilities)
        self._control.open()
        at_exit(self._shutdown)
        if self.audit is not None:
            self.audit.open()
            self._announcer.note_state("started")
        self._stream.start()
        self._reporter.watch(self._timer)
        if self.config.stop_when_idle is not None:
            IdleWatch(self.config.stop_when_idle, self._timer, self._life, self._control).start()


def _carrier_of(config: WorkerConfig) -> Optional[Carrier]:
    if config.executor is None:
        return None
    from ..executors.remote import carrier_of  # Only here: it loads what most workers never need.

    return carrier_of(config)


def _wait_for_end(life: Life, dispatcher: Dispatcher, signals: Optional[DrainSignals]) -> None:
    """Wait until the worker has stopped. The first signal stops it, a later one ends the process."""
    if signals is None:
        life.wait()
        return
    while not life.wait(0):
        come = signals.get(_SIGNAL_SLICE)
        if come is None:
            continue
        if come.must_end:
            names = dispatcher.running_names()
            rest = f" without waiting for {', '.join(names)}" if names else ""
            log.warning("ending the process (%s)%s", name_of(come.number), rest)
            life.is_cut_short = True
            life.request_stop(0.0)
            life.wait(FLUSH_TIME)
            end_process(128 + come.number)
        if come.is_first:
            life.request_stop(reason=f"signal {come.number}")


@function_of_options(WorkerConfig)
def create_worker(options: Dict[str, Any]) -> Worker:
    """Return a :class:`Worker` with the given options of :class:`~sekuire.WorkerConfig`.

    >>> from sekuire import create_worker
    >>> worker = create_worker(agent_id="greeter", install_token="skt-1", max_workers=4)
    >>> worker.on_task("greet", lambda ctx, input: "Hello, " + input["name"])
    <function <lambda> at ...>
    >>> worker.capabilities
    ('greet',)

    :raises ConfigurationError: an option is unknown or has a wrong value. The message names it.
    """
    return Worker(from_options(WorkerConfig, options))
