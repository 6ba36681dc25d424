"""Keep one worker's reports in the outbox until the platform has settled them."""

from __future__ import annotations

from typing import List, Optional, Tuple, Union

from ..config import WorkerConfig
from ..wire import protocol
from .outbox import Outbox, Stored
from .results import Report, Results
from .sending import Sender


class Spool:
    """Store one worker's reports in the outbox that the process shares.

    Any thread may call anything. The lock of ``results`` guards the reports and is not held while the disk is written.

    :param owner: who delivers what is stored; the outbox gives it to nobody else.
    """

    def __init__(self, outbox: Outbox, config: WorkerConfig, sender: Sender, results: Results, owner: object) -> None:
        self._outbox = outbox
        self._origin: Tuple[str, str] = (config.api_base_url, config.agent_id)
        self._sender = sender
        self._results = results
        self._owner = owner

    def put(self, report: Report, attempt: int, is_substitute: bool, head: bytes) -> None:
        """Store a report in the form in which it is sent next. It is on disk when this returns."""
        # Under the attempt that it is sent with: the next process must not make another result of that one.
        stored = Stored(report.task_id, attempt, is_substitute, head)
        if self._outbox.put(*self._origin, self._sender.installation_id, stored, self._owner):
            report.stored = attempt, is_substitute

    def put_held(self) -> List[str]:
        """Store every held report that the outbox does not hold. Return the tasks of those that it cannot store."""
        while True:
            with self._results.lock:
                missing = [
                    (report, Stored(report.task_id, report.attempt, report.is_substitute, report.head))
                    for report in self._results.held.values()
                    if not report.is_stored
                ]
            many = [stored for _, stored in missing]
            if not many or not self._outbox.put_all(*self._origin, self._sender.installation_id, many, self._owner):
                break
            settled: List[Stored] = []
            with self._results.lock:
                for report, stored in missing:
                    if self._results.is_held(report):
                        # If a higher attempt came since, the next round replaces it.
                        report.stored = stored.attempt, stored.substituted
                    else:
                        # Settled while it was written, by a thread that did not know that it is there.
                        settled.append(stored)
            for stored in settled:
                self.remove(stored.task_id, stored.attempt)
        with self._results.lock:
            return [report.task_id for report in self._results.held.values() if not report.is_stored]

    def remove(self, task_id: str, attempt: int) -> None:
        """Remove what is stored of a task, if it is of ``attempt`` or an earlier one."""
        self._outbox.remove(*self._origin, task_id, attempt)

    def claim(self) -> List[Report]:
        """Return what an earlier process has left, as reports that this worker delivers from now on."""
        reports = []
        for stored in self._outbox.claim(*self._origin, owner=self._owner):
            report = Report(
                stored.task_id, stored.attempt, stored.head, is_final=not protocol.is_retryable_failure(stored.head)
            )
            report.stored = stored.attempt, stored.substituted
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
