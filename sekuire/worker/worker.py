"""The Worker: wires stream, dispatch, reports and heartbeat together, owns their threads, defines the stop order."""

from __future__ import annotations

import contextlib
import os
import threading
from types import TracebackType
from typing import TYPE_CHECKING, Any, Callable, List, Optional, Tuple, Type, TypeVar, Union, overload

import attrs

from .._internal.logs import get_logger
from .._internal.signals import SignalQueue
from .._internal.threads import (
    CallbackThread,
    Deadline,
    Timer,
    at_exit,
    check_process,
    check_starter,
    forget_exit,
    is_in_executor,
    is_owned_by,
    join_all,
    owned_by,
)
from ..audit.log import AuditLog
from ..config import WorkerConfig, from_options
from ..errors import ConfigurationError, RevokedError, SekuireError, TransportError
from ..handlers.invoke import Handler, Middleware
from ..handlers.registry import Carrier, TaskRegistry
from ..session.installation import Installation
from ..wire import protocol
from ..wire.models import Command, WorkerReport, WorkerStats
from .answers import WorkerAudit
from .control import Control
from .dispatch import Dispatcher
from .idle import Activity, IdleWatch
from .report import Reporter
from .stream import TaskStream

if TYPE_CHECKING:
    from .outbox import Outbox

log = get_logger("sekuire.worker")

_H = TypeVar("_H", bound=Handler)
_M = TypeVar("_M", bound=Middleware)
CommandCallback = Callable[[Command], object]
_C = TypeVar("_C", bound=CommandCallback)

#: Seconds of a stop kept for the reports after the drain: this share of it, and at most so many.
_FLUSH_SHARE, _FLUSH_MOST = 0.2, 2.0
#: Seconds the reports get even when the time to stop is over: as long as the platform needs, and at most this.
_FLUSH_LEAST = 1.0
#: Seconds the last heartbeat may take.
_LAST_BEAT = 2.0
#: Seconds a stop waits for the stream's thread; one in a DNS look-up or a connect is left to end by itself.
_STREAM_PATIENCE = 0.5
#: Seconds the stream waits, before it is first opened, for what the outbox holds to be sent.
_RESTORE_TIMEOUT = 30.0
#: Connections that may be kept open, at least: a cap, which costs nothing while they are not needed.
POOL_SIZE = 256
#: Seconds between two looks at the signals that came.
_SIGNAL_SLICE = 0.25


class Worker:
    """Reads an agent's task stream, runs its handlers and reports their results.

    Any thread may call its public methods, a handler's or a callback's too. Threads: ``sekuire-stream`` logs in, reads
    and decides; ``sekuire-heartbeat`` beats; ``sekuire-task_N`` run handlers and send their first report;
    ``sekuire-report-N`` send the others; ``sekuire-timer`` ends tasks and watches the lease; ``sekuire-callback`` runs
    the user's callbacks; ``sekuire-shutdown`` runs the stop. ``_state`` guards the life's state and the connection
    flag; it is never held over I/O, a callback or another room's lock. ``_shutdown_lock`` is for starting
    ``sekuire-shutdown`` once.

    :param config: the settings; :func:`create_worker` makes them from keyword arguments.
    :raises ConfigurationError: a wrong setting, or nothing to authenticate with.
    """

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
        self._config = config
        self._owns_installation = _installation is None
        self._installation = _installation or Installation(
            config, pool_size=max(config.max_workers + 6, POOL_SIZE), token_provider=config.token_provider, owner=self
        )
        #: The SekuireSDK that made this worker, if one did; set by it.
        self._sdk: Any = None
        self._audit = _audit
        #: The LocalPlatform of a test's Workbench, if it made this worker; set by it.
        self._platform: Any = None
        self._auth = self._installation.auth
        self._heartbeat = self._installation.heartbeat
        self._registry = TaskRegistry(_option="on_task")
        self._stop = threading.Event()
        self._state = threading.Condition()
        self._phase = "new"
        self._connected = False
        self._verdict = False
        self._error: Optional[SekuireError] = None
        self._deadline = Deadline(0)
        self._is_terminated = False
        #: Set where the stop needs no thread (any more): the interpreter is ending.
        self._is_leaving = False
        self._is_revoked = False
        self._stop_reason: Optional[str] = None
        self._timer = Timer(owner=self)
        self._callbacks = CallbackThread(owner=self)
        self._outbox: Optional[Outbox] = None
        # A process that runs handlers may import the module that makes this worker; it will not start it.
        if config.outbox is not None and not is_in_executor():
            from .outbox import open_outbox  # SQLite is for those who keep results on disk.

            self._outbox = open_outbox(config.outbox)
        self._reporter = Reporter(
            config, self._auth, self.worker_id, _Revocation(self), outbox=self._outbox, owner=self
        )
        self._dispatcher = Dispatcher(
            config,
            self._registry,
            self._reporter,
            timer=self._timer,
            lease=self._heartbeat.lease,
            scrub=self._installation.scrub,
            audit=None if _audit is None else WorkerAudit(_audit, self.worker_id),
            owner=self,
        )
        self._control = Control(
            config,
            self._installation,
            self._dispatcher,
            self._timer,
            self._callbacks,
            report=self._describe,
            restore=self._restore,
            set_connected=self._set_connected,
            terminate=self._terminate,
            revoke=self._revoke,
            stop=self._stop,
            note=None if _audit is None else self._note_state,
        )
        self._stream = TaskStream(config, self._auth, self._control, query=self._query, stop=self._stop)
        self._stream_thread = threading.Thread(target=self._run_stream, name="sekuire-stream", daemon=True)
        self._shutdown_lock = threading.Lock()
        self._shutdown_thread = threading.Thread(target=self._shut_down, name="sekuire-shutdown", daemon=True)

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
        """Register ``handler(ctx, input)`` for a capability; as ``@worker.on_task("x")`` or ``on_task("x", f)``.

        :param name: the capability, or ``"*"`` for every one without a handler of its own.
        :param timeout: seconds its run may take.
        :param max_concurrency: how many of its runs may go on at once.
        :raises ConfigurationError: a wrong argument, a name taken, or a worker that has started.
        """
        if handler is None:
            return self._registry.task(name, timeout=timeout, max_concurrency=max_concurrency)
        return self._registry.task(name, handler, timeout=timeout, max_concurrency=max_concurrency)

    def include(self, registry: TaskRegistry) -> None:
        """Take over every handler of ``registry``, with its middleware around them; the registry is frozen by it.

        :raises ConfigurationError: a name that is taken (both places are named; nothing is taken over then), or a
            worker that has started.
        """
        self._registry.include(registry)

    def middleware(self, function: _M) -> _M:
        """Put ``function(ctx, input, call_next)`` around every handler of this worker; also ``@worker.middleware``.

        It runs in the handler's thread, within the task's time, after lease and policy have allowed the task. The
        first one registered is outermost; that of included registries is inside. ``call_next(input)`` runs what is
        inside it, once, and returns the output (of an async handler: awaited) or raises; what the middleware returns
        or raises takes its place. Without a call of ``call_next`` the handler does not run.

        :raises ConfigurationError: it cannot be called so, is async, or the worker has started.
        """
        return self._registry.middleware(function)

    def on_command(self, callback: _C) -> _C:
        """Have ``callback(command)`` called after each command took effect, in order, on a thread of their own.

        A revocation of the installation comes as a ``terminate`` with its reason. A change whose command was lost, and
        which the platform's desired state made good, comes as a command without ``command_id``.
        """
        if not callable(callback):
            raise ConfigurationError(f"must be callable, got {type(callback).__name__}", "on_command")
        self._control.command_callbacks.append(callback)
        return callback

    # -- life --

    def start(self, block: bool = False) -> None:
        """Log in and begin to work.

        Waits for the login's first verdict, at most ``start_timeout`` seconds; a platform that cannot be reached is no
        error, the login goes on in the background.

        :param block: return only when the worker has stopped: by :meth:`stop`, a ``terminate`` command, a revocation,
            ``stop_when_idle``, SIGINT or SIGTERM (in the main thread; a second one stops at once).
        :raises AuthenticationError: the platform refused every way of authenticating.
        :raises ConfigurationError: no handler, or a worker that was started or stopped before.
        :raises SekuireError: with ``block``, the error because of which the worker stopped.
        """
        check_starter("Worker")
        check_process(self.pid, "Worker")
        self._check_startable()
        signals = SignalQueue() if block and threading.current_thread() is threading.main_thread() else None
        with signals or contextlib.nullcontext():
            self._take_start()
            try:
                self._begin()
                if block:
                    self._wait_for_end(signals)
                else:
                    self._wait_for_verdict()
            except BaseException:
                # KeyboardInterrupt above all: whoever waits here is leaving, so the threads must not stay.
                self._request_stop(0.0)
                raise
        if self._error is not None:
            self.wait(self._config.shutdown_timeout)
            raise self._error

    def stop(self, timeout: Optional[float] = None) -> None:
        """Stop: give back what has not begun, let running handlers end, send reports, and end every thread.

        Idempotent, from any thread and in any state; from one of the worker's own threads (a handler, a callback) it
        asks for the stop and returns.

        :param timeout: seconds for all of it (default ``shutdown_timeout``); running handlers are cancelled at its
            end, and answered ``worker_shutdown``.
        """
        check_process(self.pid, "Worker")
        self._request_stop(timeout)
        if not is_owned_by(self):
            # What follows the deadline (the last heartbeat, closing) is bounded by itself.
            self.wait(self._deadline.remaining() + _LAST_BEAT + 1.0)

    def wait(self, timeout: Optional[float] = None) -> bool:
        """Wait until the worker has stopped, at most ``timeout`` seconds; whether it has."""
        return self._wait_until(lambda: self._phase == "stopped", timeout)

    def wait_until_connected(self, timeout: Optional[float] = None) -> bool:
        """Wait until the task stream is open, at most ``timeout`` seconds; whether it is."""
        self._wait_until(lambda: self._connected or self._phase == "stopped", timeout)
        return self._connected

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

    def leave(self) -> None:
        """The interpreter ends while this runs: cancel what runs, say so, beat a last time. Starts no thread."""
        with self._state:
            if self._phase != "running":
                return
            self._phase = "stopping"
            self._stop_reason = "the program ends"
            self._is_leaving = True
        log.warning(
            "the program ends while a Worker runs; its tasks are cancelled. Use start(block=True), or wait(), to keep "
            "it running, and stop() to end it in order"
        )
        self._stop.set()
        self._stream.wake()
        # Each guarded, so that the next always runs.
        for step in (self._close_intake, self._cancel_at_exit, self._beat_at_exit):
            try:
                step()
            except Exception:
                log.exception("the program ends: a step failed (%s); going on", step.__name__)
        # Nothing follows: a stop() of the user's own, in an atexit function, must not wait for more.
        with self._state:
            self._phase = "stopped"
            self._connected = False
            self._state.notify_all()

    def _cancel_at_exit(self) -> None:
        self._dispatcher.cancel_running("the program ends")

    def _beat_at_exit(self) -> None:
        if self._heartbeat.detach(self._control):
            self._installation.stop.set()
            self._heartbeat.end()
            if self._heartbeat.last_at is not None:
                self._heartbeat.beat_now("stopped", _LAST_BEAT)

    # -- state --

    def is_running(self) -> bool:
        """Whether it was started and has not stopped; true while it drains."""
        return self._phase in ("running", "stopping")

    def is_alive(self) -> bool:
        """Whether it runs and its stream's thread lives, or it drains; for probes. The platform may be out of reach."""
        return self._phase == "stopping" or (self._phase == "running" and self._stream_thread.is_alive())

    def is_connected(self) -> bool:
        """Whether the task stream is open."""
        return self._connected

    def is_paused(self) -> bool:
        """Whether a command, the platform's desired state, or :meth:`pause` holds it."""
        return self._dispatcher.is_paused()

    @property
    def stop_reason(self) -> Optional[str]:
        """Why it stopped or is stopping; None while it does neither."""
        return self._stop_reason

    @property
    def capabilities(self) -> Tuple[str, ...]:
        """The declared capabilities and those with a handler."""
        return tuple(dict.fromkeys((*self._config.capabilities, *self._registry.names)))

    def pause(self, reason: Optional[str] = None) -> None:
        """Take no tasks: each is answered ``worker_paused`` (retryable); running ones go on."""
        if self._dispatcher.pause("local", reason):
            log.info("paused%s", f": {reason}" if reason else "")
            self._note_state("paused", reason)
            self._heartbeat.nudge()

    def resume(self) -> None:
        """Undo :meth:`pause`; a pause that the platform ordered stays."""
        if self._dispatcher.resume("local"):
            log.info("resumed%s", ", but the platform's pause holds" if self.is_paused() else "")
            self._note_state("resumed")
            self._heartbeat.nudge()

    def stats(self) -> WorkerStats:
        """Counts since the start and the state of the lease."""
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
        if not hasattr(self, "_phase"):
            return "<Worker (not set up)>"
        return f"<Worker {self._config.agent_id} {self.worker_id[:8]} {self._phase}>"

    # -- starting --

    def _reconfigure(self, **options: Any) -> None:
        """Change options of a worker that has not started, as command lines do: ``max_workers``, ``stop_when_idle``."""
        with self._state:
            if self._phase != "new":
                raise ConfigurationError("cannot be changed once the worker was started", ", ".join(options))
            self._config = attrs.evolve(self._config, **options)
        self._dispatcher.resize(self._config)

    def _check_startable(self) -> None:
        if self._registry.is_empty():
            raise ConfigurationError("no handler is registered; use @worker.on_task('name') before start()", "on_task")
        if self._config.credentials_store is None:
            self._auth.require_a_way()
        if self._config.policy_required and self._config.policy_gateway is None:
            raise ConfigurationError(
                "is True, and there is no policy_gateway that could load a policy; use SekuireSDK with the extra (pip "
                "install 'sekuire[policy]'), or give policy_gateway=PolicyGateway(...)",
                "policy_required",
            )
        if self._phase == "new":
            self._registry.freeze(self._carrier())

    def _carrier(self) -> Optional[Carrier]:
        if self._config.executor is None:
            return None
        from ..executors.remote import carrier_of  # Only here: it loads what most workers never need.

        return carrier_of(self._config)

    def _take_start(self) -> None:
        with self._state:
            if self._phase != "new":
                raise ConfigurationError(
                    f"this worker is {self._phase}; a worker starts once, make a new one", "Worker.start"
                )
            self._phase = "running"

    def _begin(self) -> None:
        if not self._registry.has_catch_all:
            unhandled = [name for name in self._config.capabilities if self._registry.find(name) is None]
            if unhandled:
                log.warning("no handler for %s; their tasks will fail (unknown_capability)", ", ".join(unhandled))
        self._installation.declare(*self.capabilities)
        self._listen_to_gateway("add_listener")
        at_exit(self)
        if self._audit is not None:
            self._audit.open()
            self._note_state("started")
        self._stream_thread.start()
        self._reporter.watch(self._timer)
        if self._config.stop_when_idle is not None:
            IdleWatch(
                self._config.stop_when_idle,
                self._timer,
                self._activity,
                on_idle=self._stop_idle,
                on_away=self._stop_away,
            ).start()

    def _wait_for_verdict(self) -> None:
        if is_owned_by(self):
            return
        self._wait_until(lambda: self._verdict or self._phase == "stopped", self._config.start_timeout)

    def _wait_for_end(self, signals: Optional[SignalQueue]) -> None:
        while not self.wait(0 if signals else None):
            assert signals is not None
            number = signals.get(_SIGNAL_SLICE)
            if number is None:
                if self.wait(0):
                    return
                continue
            if self._phase == "stopping":
                log.warning("a second signal: stopping at once")
                self._request_stop(0.0)
            else:
                log.info("signal %d: stopping; another one stops at once", number)
                self._request_stop(None, reason=f"signal {number}")

    def _wait_until(self, is_reached: Callable[[], bool], timeout: Optional[float]) -> bool:
        deadline = None if timeout is None else Deadline(timeout)
        with self._state:
            while not is_reached():
                if deadline is not None and deadline.is_expired():
                    return False
                self._state.wait(0.5 if deadline is None else min(0.5, deadline.remaining()))
            return True

    # -- the stream's thread --

    def _run_stream(self) -> None:
        with owned_by(self):
            error: Optional[SekuireError] = None
            try:
                self._stream.run()
            except RevokedError as revoked:
                self._revoke(revoked)
            except SekuireError as fatal:
                error = fatal
            except Exception as unforeseen:
                log.exception("the stream's thread failed")
                error = SekuireError(f"the stream's thread failed ({type(unforeseen).__name__}); see the log")
            if error is not None:
                self._fail(error)

    def _listen_to_gateway(self, method: str) -> None:
        change = getattr(self._config.policy_gateway, method, None)
        if change is not None:
            change(self._on_new_policy)

    def _on_new_policy(self, is_allowed: Callable[..., bool]) -> None:
        self._dispatcher.cancel_denied(is_allowed, "policy changed")

    def _restore(self) -> None:
        self._reporter.restore(Deadline(_RESTORE_TIMEOUT))

    def _describe(self) -> WorkerReport:
        """What this worker says of itself in a heartbeat."""
        phase = self._phase
        status = "paused" if self.is_paused() else "healthy"
        if phase in ("stopping", "stopped"):
            status = phase
        return WorkerReport(
            worker_id=self.worker_id,
            status=status,
            active_tasks=self._dispatcher.running,
            capabilities=self.capabilities,
        )

    def _query(self, installation_id: Optional[str]) -> str:
        return protocol.stream_query(
            self._config.agent_id,
            installation_id,
            self.worker_id,
            self._config.max_workers + self._config.queue_size,
            () if self._registry.has_catch_all else self.capabilities,
        )

    def _note_state(self, state: str, reason: Optional[str] = None, severity: str = "info") -> None:
        if self._audit is not None:
            self._audit.health(state, severity, of="worker", worker_id=self.worker_id, reason=reason)

    def _set_connected(self, connected: bool, verdict: bool) -> None:
        with self._state:
            self._connected = connected
            self._verdict = self._verdict or verdict
            self._state.notify_all()

    # -- stopping --

    def _activity(self) -> Activity:
        running = self._dispatcher.running > 0
        # Results that the outbox keeps need no waiting for; without one they would be lost.
        unsent = self._outbox is None and self._reporter.backlog > 0
        return Activity(
            self._dispatcher.counts.received,
            is_working=running or unsent,
            is_waiting=self._dispatcher.waiting > 0 or self._control.is_taking,
            is_fed=self._connected and self._heartbeat.lease.is_held(),
        )

    def _stop_idle(self) -> None:
        self._request_stop(None, reason=f"idle for {self._config.stop_when_idle:g} s")

    def _stop_away(self) -> None:
        # Whoever waits for the work to be done must not take this for it.
        within = f"within stop_when_idle ({self._config.stop_when_idle:g} s)"
        if not self._control.was_connected:
            problem = f"there was no task stream {within}"
        elif not self._connected:
            problem = f"the task stream was lost and not open again {within}"
        else:
            problem = f"the lease was lost and not renewed {within}"
        self._fail(TransportError(problem))

    def _terminate(self, timeout: Optional[float], reason: str) -> None:
        self._request_stop(timeout, terminated=True, reason=reason)

    def _fail(self, error: SekuireError) -> None:
        """Something that trying again would not mend."""
        with self._state:
            if self._phase == "running" and self._error is None:
                self._error = error
        log.error("the worker stops: %s", error)
        self._request_stop(None, reason=str(error))

    def _revoke(self, error: RevokedError) -> None:
        with self._state:
            if self._phase not in ("running", "stopping") or self._is_revoked:
                return
            self._is_revoked = True
            if self._phase == "running" and not self._control.was_connected:
                # Refused at the door: whoever started it must hear of it.
                self._error = error
        log.error("the worker stops: %s", error)
        command = self._control.note_revocation(error)
        self._request_stop(error.shutdown_timeout, terminated=True, reason=str(error))
        if command is not None:
            self._control.tell(command)

    def _request_stop(
        self, timeout: Optional[float], *, terminated: bool = False, reason: Optional[str] = None
    ) -> None:
        """Begin the stop, or hurry one that has begun. Returns at once."""
        seconds = self._config.shutdown_timeout if timeout is None else max(0.0, timeout)
        with self._state:
            phase = self._phase
            if phase == "stopped":
                return
            if phase == "new":
                self._phase = "stopped"
            elif phase == "running":
                self._deadline = Deadline(seconds)
                self._stop_reason = reason or "stop()"
                # Last: whoever sees it, such as a second stop() after an interrupt of this one, sees the others too.
                self._phase = "stopping"
            elif timeout is not None:
                self._deadline.shorten(seconds)
            self._is_terminated = self._is_terminated or terminated
            self._state.notify_all()
        if phase == "new":
            self._close_unstarted()
        else:
            # Also where the stop was asked for before: an interrupt may have kept that call from beginning it.
            self._start_shutdown()
            if terminated and phase == "stopping":
                self._close_intake()
        self._dispatcher.wake()

    def _close_unstarted(self) -> None:
        self._stop.set()
        self._close_outbox()
        if self._owns_installation:
            self._installation.close()

    def _start_shutdown(self) -> None:
        """Begin the stop, once. All of it is done on a thread of its own, where no Ctrl-C gets in between."""
        must_run_here = False
        with self._shutdown_lock:
            if self._shutdown_thread.ident is None and not self._is_leaving:
                try:
                    self._shutdown_thread.start()
                except RuntimeError:
                    # No new thread any more: the interpreter is ending.
                    must_run_here = self._is_leaving = True
        if must_run_here:
            self._shut_down()

    def _shut_down(self) -> None:
        """The stop, step by step; one that fails does not keep the next from running.

        The stream goes first, so that nothing new comes; waiting tasks before running ones, so that another worker
        has them soon; reports after the drain, because the drain makes them; the last heartbeat after the reports,
        because until then the lease must hold.
        """
        with owned_by(self):
            steps: List[Callable[[], None]] = [
                self._end_waits,
                self._close_intake,
                self._end_stream,
                self._drain,
                self._flush,
                self._say_goodbye,
                self._close,
            ]
            for step in steps:
                try:
                    step()
                except Exception:
                    log.exception("stopping: a step failed (%s); going on", step.__name__)
        log.info("the worker has stopped (%s)", self._stop_reason)
        self._note_state("stopped", self._stop_reason, "info" if self._error is None else "error")
        with self._state:
            self._phase = "stopped"
            self._connected = False
            self._state.notify_all()

    def _end_waits(self) -> None:
        self._stop.set()
        if self._owns_installation:
            self._installation.stop.set()
        self._stream.wake()
        # The platform must hear soon that this is a drain: a worker whose stream ended without a word has vanished.
        self._heartbeat.nudge()

    def _close_intake(self) -> None:
        self._dispatcher.close(self._is_terminated)
        if self._is_terminated:
            self._dispatcher.cancel_running("terminated")

    def _end_stream(self) -> None:
        join_all([self._stream_thread], Deadline(min(_STREAM_PATIENCE, self._deadline.remaining() + 0.1)))

    def _drain(self) -> None:
        reserve = min(_FLUSH_MOST, self._deadline.remaining() * _FLUSH_SHARE)
        if not self._dispatcher.drain(self._deadline.earlier(reserve)):
            late = self._dispatcher.abandon("terminated" if self._is_terminated else "shutdown")
            log.warning("the time to stop is over and these handlers still run: %s", ", ".join(late) or "none")

    def _flush(self) -> None:
        # What the drain's end answered for has had no time yet.
        if self._reporter.flush(Deadline(max(_FLUSH_LEAST, self._deadline.remaining()))):
            return
        # What is in memory only goes to the disk before anything is said of it.
        lost = set(self._reporter.keep_all())
        ids = self._reporter.undelivered()
        if self._outbox is None:
            self._tell_undelivered(ids, "")
            return
        path = self._outbox.path
        self._tell_undelivered([one for one in ids if one not in lost], f"; they are in the outbox {path}")
        self._tell_undelivered([one for one in ids if one in lost], f" and are lost: the outbox {path} lacks them")

    @staticmethod
    def _tell_undelivered(ids: List[str], what_then: str) -> None:
        if ids:
            log.error(
                "the results of %d tasks were not delivered before the stop: %s%s%s",
                len(ids), ", ".join(ids[:20]), " ..." if len(ids) > 20 else "", what_then,
            )  # fmt: skip

    def _close_outbox(self) -> None:
        outbox, self._outbox = self._outbox, None
        if outbox is not None:
            outbox.close()

    def _say_goodbye(self) -> None:
        is_last = self._heartbeat.detach(self._control)
        if not is_last:
            self._heartbeat.nudge()
            return
        self._heartbeat.stop(Deadline(max(0.25, min(_LAST_BEAT, self._deadline.remaining()))))
        if self._heartbeat.last_at is not None:
            self._heartbeat.beat_now("stopped", max(0.25, min(_LAST_BEAT, self._deadline.remaining())))

    def _close(self) -> None:
        patience = Deadline(max(0.25, min(1.0, self._deadline.remaining())))
        self._listen_to_gateway("remove_listener")
        self._timer.close()
        self._callbacks.close()
        late = self._reporter.close(patience)
        self._close_outbox()
        self._dispatcher.end_pool(patience)
        self._timer.join(patience)
        self._callbacks.join(patience)
        if self._owns_installation:
            self._installation.close()
        forget_exit(self)
        late += self._dispatcher.overdue_names()
        if late:
            log.warning("still running after the stop: %s", ", ".join(late))


class _Revocation:
    """Hand a revocation to the worker."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def revoke(self, error: RevokedError) -> None:
        self._worker._revoke(error)


def create_worker(**options: Any) -> Worker:
    """A :class:`Worker` from the options of :class:`~sekuire.WorkerConfig`.

    :raises ConfigurationError: an unknown option, or a wrong value, naming it.
    """
    try:
        config = from_options(WorkerConfig, options)
    finally:
        # An error's frames must not hold plain tokens.
        options.clear()
    return Worker(config)
