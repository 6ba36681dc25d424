"""Keep one worker's reports in the outbox until the platform has settled them."""

from __future__ import annotations

from typing import List, Optional, Protocol, Tuple, Union

from .._internal.delivery import Delivery
from ..config import WorkerConfig
from ..wire import protocol
from .outbox import Outbox, Stored
from .results import Report, Results
from .sending import Sender


class Owner(Protocol):
    """Deliver what is stored in the outbox: the reporter."""

    def enqueue(self, report: Report) -> None:
        """Have a report sent at once. Must not block."""


class Spool:
    """Store one worker's reports in the outbox that the process shares.

    Any thread may call anything. The lock of ``results`` guards the reports and is not held while the disk is written.

    :param delivery: the pool whose threads look at the outbox's file. It shares the lock of ``results``.
    :param owner: who delivers what is stored; the outbox gives it to nobody else.
    """

    def __init__(
        self, outbox: Outbox, config: WorkerConfig, sender: Sender, results: Results, delivery: Delivery, owner: Owner
    ) -> None:
        self._outbox = outbox
        self._origin: Tuple[str, str] = (config.api_base_url, config.agent_id)
        self._sender = sender
        self._results = results
        self._owner = owner
        #: The outbox's epoch at the last :meth:`claim`; None before the first one.
        self._claimed: Optional[int] = None
        self._delivery = delivery
        self._has_planned_upkeep = False

    def holds(self, report: Report, attempt: int, is_substitute: bool) -> bool:
        """Return True if the outbox holds a report in the form in which it is sent next."""
        return report.stored == (attempt, is_substitute, self._outbox.epoch)

    def put(self, report: Report, attempt: int, is_substitute: bool, head: bytes) -> None:
        """Store a report in the form in which it is sent next. It is on disk when this returns."""
        # Under the attempt that it is sent with: the next process must not make another result of that one.
        stored = Stored(report.task_id, attempt, is_substitute, head)
        # Before it is put: should the file be replaced at this moment, the report is put once more later.
        epoch = self._outbox.epoch
        if self._outbox.put(*self._origin, self._sender.installation_id, stored, self._owner):
            report.stored = attempt, is_substitute, epoch

    def put_held(self) -> List[str]:
        """Store every held report that the outbox does not hold. Return the tasks of those that it cannot store."""
        self._outbox.verify()
        while True:
            epoch = self._outbox.epoch
            with self._results.lock:
                missing = [
                    (report, Stored(report.task_id, report.attempt, report.is_substitute, report.head))
                    for report in self._results.held.values()
                    if not self.holds(report, report.attempt, report.is_substitute)
                ]
            many = [stored for _, stored in missing]
            if not many or not self._outbox.put_all(*self._origin, self._sender.installation_id, many, self._owner):
                break
            settled: List[Stored] = []
            with self._results.lock:
                for report, stored in missing:
                    if self._results.is_held(report):
                        # If a higher attempt came since, the next round replaces it.
                        report.stored = stored.attempt, stored.substituted, epoch
                    else:
                        # Settled while it was written, by a thread that did not know that it is there.
                        settled.append(stored)
            for stored in settled:
                self.remove(stored.task_id, stored.attempt)
        with self._results.lock:
            return [
                report.task_id
                for report in self._results.held.values()
                if not self.holds(report, report.attempt, report.is_substitute)
            ]

    def plan_upkeep(self, delay: float) -> None:
        """Have the pool look at the outbox's file in ``delay`` seconds, if it may lack a result or hold an older one.

        A file that was deleted, replaced, or could not be written is thereby given every held report again.
        """
        with self._results.lock:
            # An epoch of 0: it could not be opened yet.
            if self._has_planned_upkeep or not (self._results.held or not self._outbox.epoch or self._has_reopened()):
                return
            self._has_planned_upkeep = self._delivery.schedule(delay, self._keep_up, is_awaited=False) is not None

    def _keep_up(self) -> None:
        self._has_planned_upkeep = False
        self.put_held()
        if not self._has_reopened():
            return
        # The file may hold what an earlier process left.
        reports = self.claim()
        with self._results.lock:
            for report in reports:
                if self._results.add(report):
                    self._owner.enqueue(report)

    def _has_reopened(self) -> bool:
        """Return True if the file was opened since the last :meth:`claim`. The first one waits for the login."""
        return self._claimed is not None and self._claimed != self._outbox.epoch

    def remove(self, task_id: str, attempt: int) -> None:
        """Remove what is stored of a task, if it is of ``attempt`` or an earlier one."""
        self._outbox.remove(*self._origin, task_id, attempt)

    def claim(self) -> List[Report]:
        """Return what an earlier process has left, as reports that this worker delivers from now on."""
        reports = []
        epoch = self._claimed = self._outbox.epoch
        for stored in self._outbox.claim(*self._origin, owner=self._owner):
            with self._results.lock:
                if stored.task_id in self._results.held:
                    # It is put again, over what a file that was restored has of it.
                    continue
                is_known = self._results.has_result(stored.task_id)
            if is_known:
                self.remove(stored.task_id, stored.attempt)
                continue
            code = protocol.failure_code(stored.head)
            report = Report(stored.task_id, stored.attempt, stored.head, is_final=code is None, code=code)
            report.stored = stored.attempt, stored.substituted, epoch
            report.is_substitute = stored.substituted
            reports.append(report)
        return reports

    def find_other_owner(self, task_id: str) -> Union[object, None]:
        """Return the other worker of this process that delivers a result of this task; None if there is none."""
        owner: Optional[object] = self._outbox.owner_of(*self._origin, task_id)
        # What is stored in our own name, and not held any more, is on its way out.
        return None if owner is self._owner else owner

    def disown(self) -> None:
        """Let the next process deliver what is stored."""
        self._outbox.disown(self._owner)
