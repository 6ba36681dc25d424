"""Build a worker from its parts, register handlers, start it, stop it, and say how it is."""

from __future__ import annotations

import contextlib
import os
import threading
from types import TracebackType
from typing import TYPE_CHECKING, Any, Callable, Dict, Optional, Tuple, Type, TypeVar, Union, overload

import attrs

from .._internal.logs import get_logger
from .._internal.signals import SignalQueue
from .._internal.threads import Timer, at_exit, check_process, check_starter, is_in_executor, is_owned_by
from ..audit.log import AuditLog
from ..config import WorkerConfig, from_options, function_of_options
from ..errors import ConfigurationError
from ..handlers.invoke import Handler, Middleware
from ..handlers.registry import Carrier, TaskRegistry
from ..session.installation import Installation
from ..wire.models import Command, WorkerStats
from .announcer import Announcer
from .answers import WorkerAudit
from .control import Control
from .dispatch import Dispatcher
from .idle import IdleWatch
from .life import Life, Phase
from .profile import Profile
from .report import Reporter
from .shutdown import LAST_BEAT, Shutdown
from .stream import TaskStream

if TYPE_CHECKING:
    from .outbox import Outbox

log = get_logger("sekuire.worker")

_H = TypeVar("_H", bound=Handler)
_M = TypeVar("_M", bound=Middleware)
CommandCallback = Callable[[Command], object]
_C = TypeVar("_C", bound=CommandCallback)

#: Connections that may be kept open, at least: a cap, which costs nothing while they are not needed.
POOL_SIZE = 256
#: Seconds between two looks at the signals that came.
_SIGNAL_SLICE = 0.25


class Worker:
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
        import uuid  # Here, to keep `import sekuire` cheap: it looks at the machine when it is imported.

        self.pid = os.getpid()
        self.worker_id = uuid.uuid4().hex
        #: The settings. :meth:`reconfigure` replaces them.
        self.config = config
        #: The SekuireSDK that made this worker, if one did; set by it.
        self.sdk: Any = None
        self.audit = _audit
        #: The handlers and the middleware of this worker.
        self.handlers = TaskRegistry(_option="on_task")
        self._announcer = Announcer(self.worker_id, _audit, owner=self)
        self._life = Life(config.shutdown_timeout, self._announcer, owner=self)
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
        self._dispatcher = Dispatcher(
            config,
            self.handlers,
            self._reporter,
            timer=self._timer,
            lease=self._heartbeat.lease,
            scrubber=self.installation,
            audit=None if _audit is None else WorkerAudit(_audit, self.worker_id),
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
        self._shutdown = Shutdown(
            self._life,
            self._stream,
            self._control,
            self._dispatcher,
            self._reporter,
            self.installation,
            (self._timer, self._announcer),
            outbox=outbox,
            is_shared=_installation is not None,
        )
        self._life.attach(self._shutdown)

    # -- registering --

    @overload
    def on_task(
        self, name: str, handler: _H, *, timeout: Optional[float] = None, max_concurrency: Optional[int] = None
    ) -> _H: ...

    @overload
    def on_task(
        self, name: str, handler: None = None, *, timeout: Optional[float] = None, max_concurrency: Optional[int] = None
    ) -> Callable[[_H], _H]: ...

    def on_task(
        self,
        name: str,
        handler: Optional[_H] = None,
        *,
        timeout: Optional[float] = None,
        max_concurrency: Optional[int] = None,
    ) -> Union[_H, Callable[[_H], _H]]:
        """Register ``handler(ctx, input)`` for a capability: ``@worker.on_task("x")`` or ``on_task("x", handler)``.

        :param name: the capability, or ``"*"`` for each one that has no handler.
        :param timeout: seconds its run may take.
        :param max_concurrency: how many of its runs may go on at once.
        :raises ConfigurationError: an argument is wrong, the name is in use, or the worker has started.
        """
        if handler is None:
            return self.handlers.task(name, timeout=timeout, max_concurrency=max_concurrency)
        return self.handlers.task(name, handler, timeout=timeout, max_concurrency=max_concurrency)

    def include(self, registry: TaskRegistry) -> None:
        """Add every handler of ``registry``, with its middleware around them. This freezes the registry.

        :raises ConfigurationError: a name is in use (both places are named, and nothing is added), or the worker has
            started.
        """
        self.handlers.include(registry)

    def middleware(self, function: _M) -> _M:
        """Put ``function(ctx, input, call_next)`` around every handler of this worker; also ``@worker.middleware``.

        It runs in the handler's thread, within the task's time, after the lease and the policy have allowed the task.
        The first one registered is outermost. Middleware of included registries is inside.

        ``call_next(input)`` runs what is inside, once, and returns its output (of an async handler, the awaited one) or
        raises its error. The middleware's own output or error takes the place of that. Without a call of ``call_next``
        the handler does not run.

        :raises ConfigurationError: the function cannot be called so, is async, or the worker has started.
        """
        return self.handlers.middleware(function)

    def on_command(self, callback: _C) -> _C:
        """Call ``callback(command)`` after each command took effect: in order, on a thread for callbacks only.

        A revocation of the installation comes as a ``terminate`` with its reason. If a command was lost and the
        platform's desired state repeats it, it comes without ``command_id``.
        """
        if not callable(callback):
            raise ConfigurationError(f"must be callable, got {type(callback).__name__}", "on_command")
        self._announcer.add_callback(callback)
        return callback

    # -- life --

    def start(self, block: bool = False) -> None:
        """Log in and begin to work.

        It waits at most ``start_timeout`` seconds for the platform's first answer. A platform that cannot be reached is
        not an error: the login goes on in the background.

        :param block: return only when the worker has stopped: by :meth:`stop`, a ``terminate`` command, a revocation,
            ``stop_when_idle``, SIGINT or SIGTERM (in the main thread; a second one stops at once).
        :raises AuthenticationError: the platform refused every login method.
        :raises ConfigurationError: there is no handler, or the worker was started or stopped before.
        :raises SekuireError: with ``block``, the error because of which the worker stopped.
        """
        check_starter("Worker")
        check_process(self.pid, "Worker")
        self._check_startable()
        signals = SignalQueue() if block and threading.current_thread() is threading.main_thread() else None
        with signals or contextlib.nullcontext():
            self._life.start()
            try:
                self._begin()
                if block:
                    _wait_for_end(self._life, signals)
                elif not is_owned_by(self):
                    self._life.wait_for_verdict(self.config.start_timeout)
            except BaseException:
                # KeyboardInterrupt above all: whoever waits here is leaving, so the threads must not stay.
                self._life.request_stop(0.0)
                raise
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
        self._life.request_stop(timeout)

    def wait(self, timeout: Optional[float] = None) -> bool:
        """Wait at most ``timeout`` seconds for the worker's end. Return True if it has stopped."""
        return self._life.wait(timeout)

    def wait_until_connected(self, timeout: Optional[float] = None) -> bool:
        """Wait at most ``timeout`` seconds for an open task stream. Return True if it is open."""
        return self._life.wait_until_connected(timeout)

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
        phase = self._life.phase
        return phase is Phase.STOPPING or (phase is Phase.RUNNING and self._stream.is_alive())

    def is_connected(self) -> bool:
        """Return True if the task stream is open."""
        return self._life.is_connected

    def is_paused(self) -> bool:
        """Return True if a command, the platform's desired state or :meth:`pause` holds the worker."""
        return self._dispatcher.is_paused()

    @property
    def stop_reason(self) -> Optional[str]:
        """Why it stopped or is stopping; None while it does neither."""
        return self._life.reason

    @property
    def capabilities(self) -> Tuple[str, ...]:
        """The declared capabilities and those with a handler."""
        return self._profile.capabilities

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
        counts = self._dispatcher.counts
        return WorkerStats(
            received=counts.received,
            waiting=self._dispatcher.waiting,
            running=self._dispatcher.running,
            completed=counts.completed,
            failed=counts.failed,
            rejected=counts.rejected,
            released=counts.released,
            duplicates=counts.duplicates,
            dropped=counts.dropped + self._reporter.dropped + self._control.unusable,
            undelivered=self._reporter.backlog,
            overdue=len(self._dispatcher.overdue_names()),
            reconnects=self._stream.reconnects,
            last_heartbeat_at=self._heartbeat.last_at,
            lease_expires_at=self._heartbeat.lease.expires_at,
        )

    def __repr__(self) -> str:
        return f"<Worker {self.config.agent_id} {self.worker_id[:8]} {self._life.phase.value}>"

    # -- starting --

    def reconfigure(self, *, max_workers: Optional[int] = None, stop_when_idle: Optional[float] = None) -> None:
        """Change options of a worker that has not started, as command lines do. None leaves an option as it is."""
        given = {"max_workers": max_workers, "stop_when_idle": stop_when_idle}
        changes: Dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        if self._life.phase is not Phase.NEW:
            raise ConfigurationError("cannot be changed once the worker was started", ", ".join(changes))
        self.config = self._profile.config = attrs.evolve(self.config, **changes)
        self._dispatcher.resize(self.config)

    def _check_startable(self) -> None:
        if self.handlers.is_empty():
            raise ConfigurationError("no handler is registered; use @worker.on_task('name') before start()", "on_task")
        if self.config.credentials_store is None:
            self.installation.auth.require_credentials()
        if self.config.policy_required and self.config.policy_gateway is None:
            raise ConfigurationError(
                "is True, and there is no policy_gateway that could load a policy; use SekuireSDK with the extra (pip "
                "install 'sekuire[policy]'), or give policy_gateway=PolicyGateway(...)",
                "policy_required",
            )
        if self._life.phase is Phase.NEW:
            self.handlers.freeze(_carrier_of(self.config))

    def _begin(self) -> None:
        if not self.handlers.has_catch_all:
            unhandled = [name for name in self.config.capabilities if self.handlers.find(name) is None]
            if unhandled:
                log.warning("no handler for %s; their tasks will fail (unknown_capability)", ", ".join(unhandled))
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


def _wait_for_end(life: Life, signals: Optional[SignalQueue]) -> None:
    """Wait until the worker has stopped, and stop it on the first signal; on a second one at once."""
    if signals is None:
        life.wait()
        return
    while not life.wait(0):
        number = signals.get(_SIGNAL_SLICE)
        if number is None:
            continue
        if life.phase is Phase.STOPPING:
            log.warning("a second signal: stopping at once")
            life.request_stop(0.0)
        else:
            log.info("signal %d: stopping; another one stops at once", number)
            life.request_stop(reason=f"signal {number}")


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
