"""Say how one worker is: its counts, its health, and what of them is shown over HTTP."""

from __future__ import annotations

from typing import TYPE_CHECKING, Dict, List, Mapping, Optional, Tuple

from .._internal.scrub import scrub
from .._internal.tally import Tally
from .._internal.threads import Deadline
from ..errors import ConfigurationError
from ..session.installation import Installation
from ..wire.models import WorkerHealth, WorkerStats
from .control import Control
from .dispatch import Dispatcher
from .life import Life, Phase
from .profile import Profile
from .questions import Questions
from .report import Reporter
from .stream import TaskStream

if TYPE_CHECKING:
    from ..health.board import Totals
    from ..health.meter import Meter


class Vitals:
    """Read how one worker is from its parts. With the option ``health``, show it over HTTP too.

    The worker calls :meth:`show` before its login and :meth:`close` at its end.
    """

    # Threads: any thread may call anything; `sekuire-health` reads. There is no lock: each value is read by itself, so
    # two of them may be of different moments.

    def __init__(
        self,
        profile: Profile,
        life: Life,
        installation: Installation,
        stream: TaskStream,
        control: Control,
        dispatcher: Dispatcher,
        reporter: Reporter,
        questions: Questions,
    ) -> None:
        self._profile = profile
        self._life = life
        self._installation = installation
        self._heartbeat = installation.heartbeat
        self.lease = installation.heartbeat.lease
        self.stream = stream
        self._control = control
        self._dispatcher = dispatcher
        self._reporter = reporter
        self._questions = questions
        #: Counts the ends of tasks, once they are shown.
        self._meter: Optional[Meter] = None

    def is_live(self) -> bool:
        """Return True unless a thread without which the worker cannot go on has ended. A platform has no part in it."""
        phase = self._life.phase
        return phase is not Phase.STOPPED and (phase is not Phase.RUNNING or not self.stream.has_ended())

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
            dropped=counts.dropped + self._reporter.results.dropped + self._control.unusable,
            undelivered=self._reporter.backlog,
            overdue=len(self._dispatcher.overdue_names()),
            reconnects=self.stream.reconnects,
            last_heartbeat_at=self._heartbeat.last_at,
            lease_expires_at=self.lease.expires_at,
        )

    def health(self) -> WorkerHealth:
        """Return how the worker is now."""
        reasons = self._reasons()
        approvals = self._questions.waiting
        error = self._life.error
        config = self._profile.config
        return WorkerHealth(
            agent_id=config.agent_id,
            worker_id=self._profile.worker_id,
            state=self._life.phase.value,
            live=self.is_live(),
            ready=not reasons,
            reasons=reasons,
            notes=(f"approvals waiting: {approvals}",) if approvals else (),
            approvals_waiting=approvals,
            installation_id=self._installation.store.current.installation_id,
            capabilities=self._profile.capabilities,
            max_workers=config.max_workers,
            policy=self._control.policy.describe(),
            lease_seconds_left=self.lease.seconds_left(),
            heartbeat_age=self.lease.beat_age(),
            error=None if error is None else scrub(str(error)),
            stats=self.stats(),
        )

    def _reasons(self) -> Tuple[str, ...]:
        """Return why a task that came now would not run."""
        found: List[str] = []
        is_stopping = self._life.phase is Phase.STOPPING
        if is_stopping:
            found.append("draining")
        if self._dispatcher.is_paused():
            found.append("paused")
        if not self._life.is_connected and not is_stopping:
            found.append("stream closed")
        if not self.lease.is_held():
            found.append("no lease")
        if self._control.policy.is_missing():
            found.append("policy missing")
        return tuple(found)

    # -- over HTTP --

    def show(self) -> None:
        """Show the worker where its option ``health`` says, unless it is shown already. Do nothing without the option.

        :raises ConfigurationError: the port is taken, or the address cannot be used.
        """
        address = self._profile.config.health
        if address is None or self._meter is not None:
            return
        from ..health import board, meter  # For those who want it.

        # First, so that it is there when the board asks; no task ends before the start.
        self._meter = self._dispatcher.answers.meter = meter.Meter(self._profile.capabilities)
        try:
            board.show(self, address)
        except BaseException:
            self._meter = self._dispatcher.answers.meter = None
            raise

    def begin_life(self) -> None:
        """Begin the worker's life. Show the worker first, so that a port that is taken costs no login.

        :raises ConfigurationError: as :meth:`show`, or the worker was started or stopped before.
        """
        if self._life.phase is Phase.NEW:
            self.show()
        try:
            self._life.start()
        except ConfigurationError:
            if self._life.phase is Phase.STOPPED:
                # A stop came at this moment.
                self.close()
            raise

    @property
    def address(self) -> Optional[Tuple[str, int]]:
        """Return where the worker is shown, None if it is not shown now."""
        if self._meter is None:
            return None
        from ..health import board

        return board.address_of(self)

    def close(self) -> None:
        """Show the worker no more. Return at once."""
        if self._meter is not None:
            from ..health import board

            board.hide(self)

    def join(self, deadline: Deadline) -> bool:
        """Wait for the end of the server's thread, if this was the last worker. Return True if it ended in time."""
        if self._meter is None:
            return True
        from ..health import board

        return board.join(deadline)

    def add_to(self, totals: Totals) -> None:
        """Add what the worker has counted since its start."""
        stats = self.stats()
        names = ("received", "released", "duplicates", "dropped", "reconnects")
        with self._dispatcher.records.lock:
            totals.add({name: getattr(stats, name) for name in names}, self._meter)

    def tallies(self) -> Mapping[str, Tally]:
        """Return what is counted for all workers of the installation, and of the policy gateway."""
        found: Dict[str, Tally] = {"refreshes": self._installation.auth.refreshes}
        denials = getattr(self._profile.config.policy_gateway, "denials", None)
        if isinstance(denials, Tally):
            found["denials"] = denials
        return found
