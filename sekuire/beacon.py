"""Keep one installation's lease alive, and report its status."""

from __future__ import annotations

import logging
import os
import threading
from types import TracebackType
from typing import Any, Dict, Optional, Type, TypeVar

import attrs

from ._internal.checks import check_number
from ._internal.logs import enable_loggers, get_logger
from ._internal.raising import raises_here
from ._internal.threads import CallbackThread, Deadline, at_exit, check_process, check_starter, forget_exit, is_owned_by
from .config import BeaconConfig, from_options, method_of_options
from .errors import (
    AuthenticationError,
    ConfigurationError,
    PlanLimitError,
    RevokedError,
    SekuireError,
    TransportError,
)
from .session.installation import Installation
from .transport.reach import duration
from .transport.retry import Backoff
from .wire.models import BeaconStatus, HeartbeatReply, RuntimeCredentials, WorkerReport

log = get_logger("sekuire.beacon")

_Self = TypeVar("_Self", bound="LeaseKeeper")

#: Seconds :meth:`Beacon.start` waits for the first verdict, and :meth:`Beacon.stop` for the end.
START_TIMEOUT = 10.0
STOP_TIMEOUT = 5.0
#: Seconds the last heartbeat of an ending process may take.
LAST_BEAT = 2.0


# Threads: any thread may call the public methods. `sekuire-heartbeat` logs in, beats and changes the status;
# `sekuire-callback` runs `on_status_change`. `_lock` guards the status and `_is_started`, `_is_stopped`; it is not held
# over I/O or a callback.


class LeaseKeeper:
    """Log an installation in and beat for it until it is stopped.

    :class:`Beacon` is one that a user makes from options. A :class:`~sekuire.SekuireSDK` makes one for itself and its
    Workers.

    :param pool_size: how many connections may be kept open.
    """

    #: Whether the first heartbeat that is accepted is said. A Worker says for itself that it is connected.
    says_connected = False

    def __init__(self, config: BeaconConfig, pool_size: int = 2) -> None:
        self.pid = os.getpid()
        self.config = config
        self._on_status_change = config.on_status_change
        self.installation = Installation(
            config,
            pool_size=pool_size,
            api_key=config.api_key,
            workspace_id=config.workspace_id,
            is_required=config.required,
            owner=self,
        )
        self._reach = self.installation.auth.reach
        self._lock = threading.Lock()
        self._status = BeaconStatus()
        self._backoff = Backoff(0.5, config.heartbeat_interval)
        self._pause = 0.5
        self._verdict = threading.Event()
        self._refusal: Optional[SekuireError] = None
        self._is_started = False
        #: The caller of start() waits, and gets a refusal.
        self._is_awaited = False
        self._is_stopped = False
        self._ended = threading.Event()
        self._callbacks = CallbackThread(owner=self)

    # -- life --

    @raises_here
    def start(self, timeout: float = START_TIMEOUT) -> None:
        """Log in and begin to beat.

        It waits at most ``timeout`` seconds (default 10) for the platform's first verdict. Without a verdict it
        returns, and the login goes on in the background. With ``required=False`` it also returns if the login is
        refused: the state is then *degraded*, and the login is tried again.

        :raises AuthenticationError: the platform refused every login method.
        :raises RevokedError: the installation is revoked.
        :raises ConfigurationError: the Beacon was started or stopped before, or ``timeout`` is not a number of seconds.
        """
        check_number("timeout", timeout, zero=True)
        check_starter("Beacon")
        enable_loggers()
        check_process(self.pid, "Beacon")
        with self._lock:
            if self._is_started or self._is_stopped:
                raise ConfigurationError("a Beacon starts once; make a new one", "Beacon.start")
            self._is_started = True
        try:
            self.installation.patience = Deadline(timeout)
            problem = self.installation.problem
            if problem is not None:
                log.warning("the agent goes on without the platform: %s", problem)
                self._change("degraded", str(problem))
                return
            self._change("connecting", None)
            at_exit(self)
            self.installation.heartbeat.attach(self)
            self._is_awaited = True
            self.installation.heartbeat.start()
            self._verdict.wait(timeout)
            # From now on a refusal is logged. Only then look: one that came before is raised.
            self._is_awaited = False
        except BaseException:
            self.stop(0)
            raise
        refusal = self._refusal
        if refusal is not None and (self.config.required or isinstance(refusal, RevokedError)):
            self.stop(STOP_TIMEOUT)
            raise refusal

    def stop(self, timeout: Optional[float] = None) -> None:
        """Send the last heartbeat (``stopped``) and end the threads, within ``timeout`` seconds (default 5).

        Calling it again is harmless. A callback of this Beacon may call it: it does not wait for that callback.
        """
        check_process(self.pid, "Beacon")
        deadline = Deadline(STOP_TIMEOUT if timeout is None else timeout)
        is_first = False
        try:
            with self._lock:
                is_first = not self._is_stopped
                self._is_stopped = True
            if is_first:
                self._shut_down(deadline)
        except BaseException:
            if is_first:
                # An interrupt: the next stop() continues.
                self._is_stopped = False
            raise
        finally:
            if is_first:
                self._ended.set()
        if not is_first and not is_owned_by(self):
            self._ended.wait(deadline.remaining())

    def _shut_down(self, deadline: Deadline) -> None:
        heartbeat = self.installation.heartbeat
        if self._is_started:
            self.installation.stop.set()
            heartbeat.detach(self)
            if is_owned_by(self):
                heartbeat.end()
            else:
                heartbeat.stop(deadline.earlier(min(LAST_BEAT, deadline.remaining() / 2)))
            if self._status.state != "revoked" and heartbeat.is_expected:
                heartbeat.beat_now("stopped", max(min(LAST_BEAT, deadline.remaining()), 0.25))
        self._reach.leave(self)
        if self._status.state != "revoked":
            self._change("stopped", self._status.error)
        self._verdict.set()
        self._callbacks.close()
        self._callbacks.join(deadline)
        self.installation.close()
        forget_exit(self)

    def leave(self) -> None:
        """Send one last heartbeat from the calling thread, because the interpreter ends."""
        heartbeat = self.installation.heartbeat
        if self._is_started and not self._is_stopped and heartbeat.is_expected:
            self._is_stopped = True
            self.installation.stop.set()
            heartbeat.end()
            heartbeat.beat_now("stopped", LAST_BEAT)

    @raises_here
    def __enter__(self: _Self) -> _Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: Optional[Type[BaseException]],
        error: Optional[BaseException],
        traceback: Optional[TracebackType],
    ) -> None:
        self.stop()

    # -- where it stands --

    @property
    def status(self) -> BeaconStatus:
        """Return the state, the last heartbeat, the end of the lease and the last problem."""
        return self._status

    @property
    def installation_credentials(self) -> RuntimeCredentials:
        """Return the current credentials. Their ``to_env()`` gives them as environment variables."""
        return self.installation.store.current

    def is_connected(self) -> bool:
        """Return True if the platform accepted the last heartbeat."""
        return self._status.state == "connected"

    def __repr__(self) -> str:
        return f"<Beacon {self.config.agent_id} {self._status.state}>"

    # -- the heartbeat's thread --

    def heartbeat_status(self) -> str:
        return "healthy"

    def heartbeat_report(self) -> Optional[WorkerReport]:
        return None

    def heartbeat_interval(self) -> float:
        """Return the seconds to the next beat: the interval, or a backoff up to it while not connected."""
        if self._status.state == "connected":
            return self.config.heartbeat_interval
        return min(self._pause, self.config.heartbeat_interval)

    def on_lease(self) -> None:
        """Do nothing: the next change of status reports the lease's end."""

    def on_heartbeat(self, reply: HeartbeatReply, sent_at: float) -> None:
        if reply.revoked:
            error = RevokedError(reply.reason, reply.shutdown_timeout)
            if self._status.state == "connecting":
                self._refusal = error
            if self._status.state != "revoked":
                log.error("%s", error)
            self._change("revoked", str(error))
            if self.installation.heartbeat.detach(self):
                self.installation.heartbeat.end()
        else:
            self._backoff.reset()
            is_first = self._status.last_heartbeat_at is None
            self._change("connected", None)
            after = self._reach.restore(self)
            if is_first and (self.says_connected or after is not None):
                self._say_connected(after)
        self._verdict.set()

    def on_heartbeat_problem(self, error: SekuireError) -> bool:
        self._pause = max(0.1, self._backoff.next())
        is_refusal = isinstance(error, (AuthenticationError, PlanLimitError, ConfigurationError))
        is_refused = is_refusal and self._status.last_heartbeat_at is None
        was_degraded = self._status.state in ("degraded", "revoked", "stopped")
        self._change("degraded", str(error))
        if is_refused:
            self._refusal = error
        is_raised = is_refused and self._is_awaited and self.config.required
        if is_raised or was_degraded:
            pass
        elif isinstance(error, TransportError):
            self._reach.fail(self, error)
        elif is_refused:
            self._reach.fail(self, error, "the agent goes on without the platform")
        else:
            log.warning("the platform does not accept heartbeats (%s); the agent goes on, retrying", error)
        if is_refused:
            self._verdict.set()
        return True

    def _say_connected(self, after: Optional[float]) -> None:
        installation_id = self._status.installation_id
        log.say(
            logging.INFO, "connected to %s as %s%s%s", self.config.api_base_url, self.config.agent_id,
            f", installation {installation_id}" if installation_id else "",
            "" if after is None else f" (after {duration(after)})",
        )  # fmt: skip

    def on_change(self, status: BeaconStatus) -> None:
        """Do nothing: a subclass may look at each new state here. It must not block."""

    def _change(self, state: str, error: Optional[str]) -> None:
        heartbeat = self.installation.heartbeat
        with self._lock:
            old = self._status
            if old.state in ("revoked", "stopped") and state not in ("revoked", "stopped"):
                return
            self._status = attrs.evolve(
                old,
                state=state,
                error=error,
                installation_id=self.installation.store.current.installation_id,
                last_heartbeat_at=heartbeat.last_at,
                lease_expires_at=heartbeat.lease.expires_at,
            )
            status = self._status
            is_news = status.state != old.state
        callback = self._on_status_change
        if is_news:
            self.on_change(status)
        if is_news and callback is not None:
            self._callbacks.post(callback, status)


class Beacon(LeaseKeeper):
    """Log an installation in and beat for it until it is stopped. ::

        with Beacon("support-agent", install_token="skt_install_...") as beacon:
            print(beacon.status.state)  # connected

    It tries these login methods, in this order: the runtime token with its ``installation_id``, which the first
    heartbeat proves; ``refresh_token``; ``install_token``; recovery with ``api_key``. While the platform cannot be
    reached the state is *degraded*: the agent goes on, and the Beacon reconnects by itself.

    Any thread may call its methods.

    :param agent_id: who the agent is.
    :param heartbeat_interval: seconds between beats, at most. The platform may ask for less.
    :param on_status_change: called with the new :class:`BeaconStatus` after each change of state.
    :param credentials_store: shared with a :class:`~sekuire.Worker` to keep both in step.
    :param required: False: go on without the platform. A login that is refused or not possible makes the state
        *degraded*, and :meth:`start` raises nothing. A revocation is raised all the same.
    :raises ConfigurationError: an option is unknown or wrong, or there is nothing to authenticate with.
    """

    says_connected = True

    @method_of_options(BeaconConfig)
    def __init__(self, options: Dict[str, Any]) -> None:
        super().__init__(from_options(BeaconConfig, options))
