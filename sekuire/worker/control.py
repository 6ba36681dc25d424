"""Carry out what the platform orders: commands, the desired state, a revocation. No threads of its own."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from typing import Callable, Dict, NamedTuple, Optional

from .._internal.clock import time
from .._internal.logs import SparseLog, get_logger
from .._internal.threads import Deadline, Timer
from ..config import WorkerConfig
from ..errors import RevokedError, SekuireError
from ..session.installation import Installation
from ..transport.reach import duration
from ..wire import protocol
from ..wire.models import Approval, Cancel, Command, Connected, HeartbeatReply, Task, WorkerReport
from .announcer import Announcer
from .dispatch import Dispatcher
from .idle import Activity
from .lease_watch import LeaseWatch
from .life import Life, Phase
from .policy_watch import PolicyWatch
from .profile import Profile
from .report import Reporter

log = get_logger("sekuire.worker")

#: Desired state → the command with the same effect.
_COMMAND_FOR = {"running": "resume", "paused": "pause", "terminated": "terminate"}
#: Command ids remembered, so that a replayed command is carried out once.
_COMMANDS_SEEN = 1000
#: Seconds the stream waits, before it is first opened, for what the outbox holds to be sent.
_RESTORE_TIMEOUT = 30.0


class Control:
    """Listen to one worker's stream and heartbeat, and act on its dispatcher and its life.

    A command that it carries out is a row of ``_COMMANDS``: the function, the state that follows, and the severity of
    the audit event.
    """

    # Threads: the stream's thread and the heartbeat's thread call it. `_lock` orders the two where they change the same
    # state (the pause that a command and the desired state both speak of). It is not held over a callback. The locks of
    # the dispatcher and of the life are taken below it. Only the stream's thread writes `is_taking` and `unusable`.

    def __init__(
        self,
        config: WorkerConfig,
        life: Life,
        installation: Installation,
        dispatcher: Dispatcher,
        reporter: Reporter,
        profile: Profile,
        timer: Timer,
        announcer: Announcer,
    ) -> None:
        self.announcer = announcer
        #: The stream's thread has a task in hand, which may wait for room or for the lease.
        self.is_taking = False
        #: Events that were skipped: too large, or not understood.
        self.unusable = 0
        self._config = config
        self._life = life
        self._store = installation.store
        self._publisher = installation.publisher
        self._heartbeat = installation.heartbeat
        self._dispatcher = dispatcher
        self._reporter = reporter
        self._profile = profile
        self._lease = LeaseWatch(installation.heartbeat, dispatcher, timer, announcer)
        #: What decides over the worker's tasks.
        self.policy = PolicyWatch(config, dispatcher, life.stop_event)
        self._unknown_log = SparseLog(log.name)
        self._lock = threading.Lock()
        self._seen: OrderedDict[str, None] = OrderedDict()
        self._last_command_at = self._last_desired_at = 0.0
        self._is_restored = False

    @property
    def worker_id(self) -> str:
        """Return the worker's id."""
        return self._profile.worker_id

    def open(self) -> None:
        """Listen to the policy gateway."""
        self.policy.open()

    def close(self) -> None:
        """Listen to the policy gateway no more."""
        self.policy.close()

    def activity(self) -> Activity:
        """Return what the worker has to do now."""
        # Without an outbox unsent results would be lost; with one the next process sends them.
        unsent = self._config.outbox is None and self._reporter.backlog > 0
        return Activity(
            self._dispatcher.counts.received,
            is_working=self._dispatcher.running > 0 or unsent,
            is_waiting=self._dispatcher.waiting > 0 or self.is_taking,
            is_fed=self._life.is_connected and self._heartbeat.lease.is_held(),
        )

    # -- the stream's thread --

    def on_login(self) -> None:
        """Begin to beat, load the policy, and send what an earlier process left in the outbox."""
        self._heartbeat.attach(self)
        self._heartbeat.start()
        self._lease.renew()
        self.policy.load()
        if not self._is_restored:
            self._is_restored = True
            self._reporter.restore(Deadline(_RESTORE_TIMEOUT))

    def on_connected(self, connected: Connected, as_of: float) -> None:
        """Apply what the stream's first event says of the installation, the heartbeat and the desired state."""
        if connected.installation_id and self._store.current.installation_id is None:
            self._store.adopt_installation(connected.installation_id)
            self._heartbeat.nudge()
        if self._store.current.installation_id is not None and not self._publisher.has(self.worker_id):
            self._publisher.add(self.worker_id, self._profile.describe())
        self._heartbeat.note_ignored(connected.ignored)
        self._heartbeat.note_interval(connected.heartbeat_interval)
        self._apply_desired(connected.desired_state, None, as_of)

    def on_first_open(self, url: str, after: Optional[float]) -> None:
        """Say that the worker is connected, and what it works with."""
        installation_id = self._store.current.installation_id
        log.say(
            logging.INFO, "connected to %s as %s%s: %s; %d threads; %s%s", url, self._config.agent_id,
            f", installation {installation_id}" if installation_id else "", self._profile.names(),
            self._profile.config.max_workers, self.policy.describe(),
            "" if after is None else f" (after {duration(after)})",
        )  # fmt: skip

    def on_task(self, task: Task) -> None:
        """Hand a task to the dispatcher."""
        self.is_taking = True
        self._dispatcher.submit(task)
        self.is_taking = False

    def on_malformed_task(self, error: protocol.MalformedTask) -> None:
        """Have a task that cannot be read answered."""
        self.is_taking = True
        self._dispatcher.answer_malformed(error)
        self.is_taking = False

    def on_cancel(self, cancel: Cancel) -> None:
        """Cancel one task. The task may have ended, or never have come."""
        self._dispatcher.answers.cancel(cancel.task_id, cancel.reason)

    def on_approval(self, approval: Approval) -> None:
        """Pass the decision on a request for approval on."""
        if self._dispatcher.approvals is not None:
            self._dispatcher.approvals.questions.note(approval)

    def on_reopen(self) -> None:
        """Look for decisions, whose events may have been lost with the stream."""
        if self._dispatcher.approvals is not None:
            self._dispatcher.approvals.questions.look_now()

    def on_unusable_event(self) -> None:
        """Count an event that was skipped."""
        self.unusable += 1

    def on_command(self, command: Command) -> None:
        """Carry out a command, once, and announce it. One of an unknown type is logged and counted."""
        known = _COMMANDS.get(command.type)
        if known is None:
            self._unknown_log.error(
                "the platform sent a command of the unknown type %r; it is ignored", command.type[:80]
            )
            self.unusable += 1
            return
        with self._lock:
            if command.command_id is not None:
                if command.command_id in self._seen:
                    return
                self._seen[command.command_id] = None
                if len(self._seen) > _COMMANDS_SEEN:
                    self._seen.popitem(last=False)
            self._last_command_at = time.monotonic()
            log.info("command %s%s", command.type, f": {command.reason}" if command.reason else "")
            finish = known.apply(self, command)
        # Before a termination begins, so that no event of its end comes earlier.
        self.announcer.note_state(known.state_after, command.reason, known.severity)
        if finish is not None:
            finish()
        self.announcer.announce(command)
        self._heartbeat.nudge()

    # -- the heartbeat's thread --

    def heartbeat_status(self) -> str:
        """Return the worker's state, as heartbeats name it."""
        phase = self._life.phase
        if phase in (Phase.STOPPING, Phase.STOPPED):
            return str(phase.value)
        return "paused" if self._dispatcher.is_paused() else "healthy"

    def heartbeat_report(self) -> Optional[WorkerReport]:
        """Return the worker's part of a heartbeat."""
        return self._profile.report(self.heartbeat_status(), self._dispatcher.running)

    def heartbeat_interval(self) -> float:
        """Return the wanted seconds between two heartbeats."""
        return self._config.heartbeat_interval

    def on_lease(self) -> None:
        """Watch the new lease. Any thread."""
        self._lease.renew()

    def on_heartbeat(self, reply: HeartbeatReply, sent_at: float) -> None:
        """Apply the platform's answer to the heartbeat that was sent at ``sent_at``."""
        if reply.revoked:
            self._life.revoke(RevokedError(reply.reason, reply.shutdown_timeout))
            return
        self._apply_desired(reply.desired_state, reply.shutdown_timeout, sent_at)
        for task_id in reply.cancel_tasks:
            # Most of them were cancelled by the event of the stream, which may be lost.
            self._dispatcher.answers.cancel(task_id)
        if reply.active_policy_hash:
            self.policy.note_active_policy()
        self._lease.note_beat()

    def on_heartbeat_problem(self, error: SekuireError) -> bool:
        """Note a missed beat. It shows in the lease; nothing else follows from it."""
        self._lease.note_beat()
        return False

    # -- applying --

    def _apply_desired(self, desired: Optional[str], timeout: Optional[float], as_of: float) -> None:
        """Repeat the effect of a command that was lost: commands are edges, the desired state is the level."""
        if desired not in _COMMAND_FOR:
            return
        reason = "the platform's desired state"
        with self._lock:
            if as_of < max(self._last_command_at, self._last_desired_at):
                # It may be older than the newest command, or than what the other connection has said since. The next
                # one will be newer.
                return
            self._last_desired_at = as_of
            if desired == "paused":
                changed = not self._dispatcher.is_paused_by("command")
                changed = changed and self._dispatcher.pause("desired_state", reason)
            elif desired == "running":
                changed = self._dispatcher.resume("command", "desired_state")
            else:
                changed = self._life.claim_termination()
        if not changed:
            return
        log.info("the platform's desired state is now %s", desired)
        kind = _COMMAND_FOR[desired]
        known = _COMMANDS[kind]
        self.announcer.note_state(known.state_after, reason, known.severity)
        if desired == "terminated":
            self._life.terminate(timeout, "terminated: " + reason)
        self.announcer.announce(Command(type=kind, reason=reason, shutdown_timeout=timeout))

    def _pause(self, command: Command) -> None:
        self._dispatcher.pause("command", command.reason)

    def _resume(self, command: Command) -> None:
        self._dispatcher.resume("command", "desired_state")

    def _terminate(self, command: Command) -> Callable[[], None]:
        self._life.claim_termination()
        reason = "terminated" + (f": {command.reason}" if command.reason else "")
        return lambda: self._life.terminate(command.shutdown_timeout, reason)


class _Kind(NamedTuple):
    """Describe one type of command.

    ``apply`` is called under the lock. What it returns is called without it, once the change is announced.
    ``state_after`` and ``severity`` are those of the audit event.
    """

    apply: Callable[[Control, Command], Optional[Callable[[], None]]]
    state_after: str
    severity: str = "info"


_COMMANDS: Dict[str, _Kind] = {
    "pause": _Kind(Control._pause, "paused"),
    "resume": _Kind(Control._resume, "resumed"),
    "terminate": _Kind(Control._terminate, "terminated"),
}
