"""What the platform orders and what follows: commands, desired state, lease, revocation. No threads of its own."""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict
from typing import Callable, Dict, List, Optional, Tuple

from .._internal.logs import get_logger
from .._internal.threads import LOOK_AGAIN, CallbackThread, Timer
from ..config import WorkerConfig
from ..errors import PolicyUnavailableError, RevokedError, SekuireError, TransportError
from ..session.installation import Installation
from ..wire import protocol
from ..wire.models import Command, Connected, HeartbeatReply, Task, WorkerReport
from .dispatch import Dispatcher

log = get_logger("sekuire.worker")

#: Desired state → the command that it makes good.
_COMMAND_FOR = {"running": "resume", "paused": "pause", "terminated": "terminate"}
#: Command ids remembered, so that a replayed command is carried out once.
_COMMANDS_SEEN = 1000
_NO_WORKSPACE = (
    "the workspace is not known: the platform has not told it at the login; give workspace_id= (SEKUIRE_WORKSPACE_ID)"
)
_NO_GATEWAY = (
    "this worker has no policy_gateway; run pip install 'sekuire[policy]' and use SekuireSDK, which makes one, or give "
    "policy_gateway=PolicyGateway(PolicyClient(...), workspace_id)"
)


class Control:
    """Listens to one worker's stream and heartbeat, and acts on its dispatcher.

    The stream's thread and the heartbeat's thread call it; ``_lock`` orders the two where they change the same state
    (the pause that a command and the desired state both speak of) and is not held over a callback. The dispatcher's
    lock is taken below it. ``_lease_lock`` guards the watch over the lease (``_lease_timer``, ``_asked_at`` and
    ``_lost``); any thread may bring a new lease. ``is_taking``: the stream's thread has a task in hand, which may wait
    for room or for the lease; only that thread writes it.

    :param restore: delivers what an earlier process left; called once, after the login and before the first stream.
    :param note: told of what changes the worker's health: state, reason, severity; it must not block.
    :param set_connected: told of the stream's state and whether this is the login's first verdict.
    :param terminate: begins a stop with a timeout in seconds (None: the worker's own) and a reason.
    :param stop: set when the worker stops; ends the wait for a policy.
    """

    def __init__(
        self,
        config: WorkerConfig,
        installation: Installation,
        dispatcher: Dispatcher,
        timer: Timer,
        callbacks: CallbackThread,
        *,
        report: Callable[[], WorkerReport],
        restore: Callable[[], None],
        set_connected: Callable[[bool, bool], None],
        terminate: Callable[[Optional[float], str], None],
        revoke: Callable[[RevokedError], None],
        stop: threading.Event,
        note: Optional[Callable[[str, Optional[str], str], None]] = None,
    ) -> None:
        self.command_callbacks: List[Callable[[Command], object]] = []
        self.was_connected = False
        self.is_taking = False
        self.unusable = 0
        self._config = config
        self._store = installation.store
        self._heartbeat = installation.heartbeat
        self._dispatcher = dispatcher
        self._timer = timer
        self._callbacks = callbacks
        self._report = report
        self._restore = restore
        self._is_restored = False
        self._set_connected = set_connected
        self._terminate = terminate
        self._revoke = revoke
        self._note = note
        self._lock = threading.Lock()
        self._lease_lock = threading.Lock()
        self._seen: OrderedDict[str, None] = OrderedDict()
        self._last_command_at = self._last_desired_at = 0.0
        self._was_terminated = False
        self._lease_timer: Optional[int] = None
        self._warned_policy = False
        self._is_policy_loaded = False
        self._stop = stop
        #: The limit of the lease that counts as lost.
        self._lost: Optional[float] = None
        #: When one more heartbeat was asked for, because the lease looks ended (monotonic); else None.
        self._asked_at: Optional[float] = None

    # -- the stream's thread --

    def on_login(self) -> None:
        self._heartbeat.attach(self)
        self._heartbeat.start()
        self.on_lease()
        self._load_policy()
        if not self._is_restored:
            self._is_restored = True
            self._restore()

    def on_open(self) -> None:
        log.info("the task stream is open")
        self.was_connected = True
        self._set_connected(True, True)

    def on_lost(self, error: Optional[SekuireError]) -> None:
        # An answer is a verdict, even a bad one; silence is not.
        self._set_connected(False, error is not None and not isinstance(error, TransportError))

    def on_connected(self, connected: Connected, as_of: float) -> None:
        if connected.installation_id and self._store.current.installation_id is None:
            self._store.adopt_installation(connected.installation_id)
            self._heartbeat.nudge()
        self._heartbeat.note_ignored(connected.ignored)
        self._heartbeat.note_interval(connected.heartbeat_interval)
        self._apply_desired(connected.desired_state, None, as_of)

    def on_task(self, task: Task) -> None:
        self.is_taking = True
        self._dispatcher.submit(task)
        self.is_taking = False

    def on_malformed_task(self, error: protocol.MalformedTask) -> None:
        self.is_taking = True
        self._dispatcher.answer_malformed(error)
        self.is_taking = False

    def on_unusable_event(self) -> None:
        self.unusable += 1

    def on_command(self, command: Command) -> None:
        known = _COMMANDS.get(command.type)
        if known is None:
            log.error("the platform sent a command of the unknown type %r; it is ignored", command.type[:80])
            self.unusable += 1
            return
        apply, _ = known
        with self._lock:
            if command.command_id is not None:
                if command.command_id in self._seen:
                    return
                self._seen[command.command_id] = None
                if len(self._seen) > _COMMANDS_SEEN:
                    self._seen.popitem(last=False)
            self._last_command_at = time.monotonic()
            log.info("command %s%s", command.type, f": {command.reason}" if command.reason else "")
            follow = apply(self, command)
        self._note_command(command.type, command.reason)
        if follow is not None:
            follow()
        self.tell(command)
        self._heartbeat.nudge()

    # -- the heartbeat's thread --

    def heartbeat_status(self) -> str:
        return self._report().status

    def heartbeat_report(self) -> Optional[WorkerReport]:
        return self._report()

    def heartbeat_interval(self) -> float:
        return self._config.heartbeat_interval

    def on_lease(self) -> None:
        """Have the timer watch the lease, and what waits for one begin. Any thread."""
        if self._heartbeat.lease.limit < math.inf:
            with self._lease_lock:
                self._look_again(min(max(0.0, self._heartbeat.lease.time_left()), LOOK_AGAIN))
        if self._dispatcher.waiting:
            # What came while there was no lease begins. Not on this thread, which must go on.
            self._timer.call_at(0.0, self._dispatcher.start_waiting)

    def on_heartbeat(self, reply: HeartbeatReply, sent_at: float) -> None:
        if reply.revoked:
            self._revoke(RevokedError(reply.reason, reply.shutdown_timeout))
            return
        self._apply_desired(reply.desired_state, reply.shutdown_timeout, sent_at)
        if reply.active_policy_hash and not self._warned_policy:
            self._miss_policy()
        self._note_try()

    def on_heartbeat_problem(self, error: SekuireError) -> None:
        """Note a missed beat. It shows in the lease; nothing else follows from it."""
        self._note_try()

    def _note_try(self) -> None:
        with self._lease_lock:
            if self._asked_at is not None:
                self._look_again(0.0)

    # -- any thread --

    def note_revocation(self, error: RevokedError) -> Optional[Command]:
        """Note that the installation is revoked. Return the command that this is, unless the worker was terminated."""
        with self._lock:
            is_news = not self._was_terminated
            self._was_terminated = True
        if not is_news:
            return None
        self._note_command("terminate", error.reason)
        return Command(type="terminate", reason=error.reason, shutdown_timeout=error.shutdown_timeout)

    def tell(self, command: Command) -> None:
        """Have the user's callbacks called with a command that took effect."""
        for callback in self.command_callbacks:
            self._callbacks.post(callback, command)

    # -- inside --

    def _apply_desired(self, desired: Optional[str], timeout: Optional[float], as_of: float) -> None:
        """Make good what a lost command left: the level behind the commands' edges."""
        reason = "the platform's desired state"
        with self._lock:
            if desired not in _COMMAND_FOR or as_of < max(self._last_command_at, self._last_desired_at):
                # Perhaps said before the newest command, or before what the other connection has told meanwhile; the
                # next one will know of it.
                return
            self._last_desired_at = as_of
            if desired == "paused":
                changed = not self._dispatcher.is_paused_by("command")
                changed = changed and self._dispatcher.pause("desired_state", reason)
            elif desired == "running":
                changed = self._dispatcher.resume("command", "desired_state")
            else:
                changed = not self._was_terminated
                self._was_terminated = True
        if not changed:
            return
        log.info("the platform's desired state is now %s", desired)
        self._note_command(_COMMAND_FOR[desired], reason)
        if desired == "terminated":
            self._terminate(timeout, "terminated: " + reason)
        self.tell(Command(type=_COMMAND_FOR[desired], reason=reason, shutdown_timeout=timeout))

    def _apply_pause(self, command: Command) -> None:
        self._dispatcher.pause("command", command.reason)

    def _apply_resume(self, command: Command) -> None:
        self._dispatcher.resume("command", "desired_state")

    def _apply_terminate(self, command: Command) -> Callable[[], None]:
        self._was_terminated = True
        reason = "terminated" + (f": {command.reason}" if command.reason else "")
        return lambda: self._terminate(command.shutdown_timeout, reason)

    def _note_command(self, kind: str, reason: Optional[str]) -> None:
        # Before a termination begins, so that nothing of its end is noted earlier.
        if self._note is not None:
            _, state_after = _COMMANDS[kind]
            self._note(state_after, reason, "info")

    def _look_again(self, delay: float) -> None:
        """Have the timer look at the lease in ``delay`` seconds, in place of an earlier order. Needs the lease lock."""
        old = self._lease_timer
        self._lease_timer = self._timer.call_at(time.monotonic() + delay, self._look_at_lease)
        if old is not None:
            self._timer.cancel(old)

    def _look_at_lease(self) -> None:
        """Cancel what runs if the lease has ended and one more heartbeat brought no new one. The timer's thread.

        The lease counts a suspend and, on some systems, a step of the wall clock. The platform may know of neither, or
        would prolong the lease if it were asked: it is asked first.
        """
        lease = self._heartbeat.lease
        # A beat that was sent before a suspend may hold the heartbeat's thread for its whole time.
        patience = 2 * self._heartbeat.beat_limit()
        must_ask = is_lost = False
        with self._lease_lock:
            now, limit, left = time.monotonic(), lease.limit, lease.time_left()
            if left > 0:
                self._asked_at = None
                # Not until its end: the timer's waits do not count a suspend.
                self._look_again(min(left, LOOK_AGAIN))
            elif limit == self._lost:
                self._asked_at = None
            elif self._asked_at is None:
                must_ask = True
                self._asked_at = now
                self._look_again(patience)
            elif self._heartbeat.has_tried_since(self._asked_at) or now >= self._asked_at + patience:
                is_lost = True
                self._asked_at, self._lost = None, limit
            else:
                self._look_again(self._asked_at + patience - now)
        if must_ask:
            self._heartbeat.nudge()
        if is_lost:
            log.error("the lease has ended without a heartbeat; no task begins and running ones are cancelled until "
                      "the platform renews it")  # fmt: skip
            self._dispatcher.lose_lease()
            if self._note is not None:
                self._note("lease lost", None, "error")

    def _load_policy(self) -> None:
        """Have the gateway load its policy, where it can, before the first task comes.

        :raises SekuireError: with ``policy_required``, that there is none; else its tasks are denied until there is.
        """
        if self._config.policy_required:
            require = getattr(self._config.policy_gateway, "require_policy", None)
            if require is not None:
                require()
        load = getattr(self._config.policy_gateway, "ensure_loaded", None)
        if load is None or self._is_policy_loaded:
            return
        problem: Optional[SekuireError] = None
        try:
            load(stop=self._stop)
        except PolicyUnavailableError as error:
            problem = error
        if self._stop.is_set():
            return
        self._is_policy_loaded = True
        if self._config.policy_required and problem is None and self._has_no_policy():
            problem = PolicyUnavailableError("the workspace has no policy" if self._is_enforced() else _NO_WORKSPACE)
        if self._config.policy_required and problem is not None:
            raise PolicyUnavailableError(f"policy_required=True, and {problem}")

    def _has_no_policy(self) -> bool:
        return getattr(self._config.policy_gateway, "policy", None) is None

    def _is_enforced(self) -> bool:
        """Whether something asks the workspace's policy; a gateway of the user's own is taken to."""
        gateway = self._config.policy_gateway
        return gateway is not None and getattr(gateway, "is_active", True) is True

    def _miss_policy(self) -> None:
        if self._is_enforced():
            return
        self._warned_policy = True
        problem = _NO_GATEWAY if self._config.policy_gateway is None else _NO_WORKSPACE
        log.error("the platform names an active policy, and nothing enforces it: %s", problem)


#: Command → what applies it, under the lock, and the state it brings a worker into, as audit events name it. What a
#: function returns is called without the lock, once the change is noted.
_COMMANDS: Dict[str, Tuple[Callable[[Control, Command], Optional[Callable[[], None]]], str]] = {
    "pause": (Control._apply_pause, "paused"),
    "resume": (Control._apply_resume, "resumed"),
    "terminate": (Control._apply_terminate, "terminated"),
}
