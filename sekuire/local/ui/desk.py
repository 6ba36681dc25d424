"""Hold what the dashboard's pages work with: the platform's parts, and the platform's actions under one roof."""

from __future__ import annotations

from typing import Any, Dict, List, Mapping, Optional, Tuple

import attrs

from ..approvals import Approvals, Decision
from ..faults import Faults
from ..fields import check_submission
from ..record import Record
from ..store import Refusal, Settings, Store, check_id
from ..streams import Hub
from .figures import Figures
from .queries import Queries
from .sessions import Sessions
from .signals import Signals

__all__ = ["Desk"]

#: Installations that pages look at. Each restart of a worker without a file of credentials makes one.
MOST_INSTALLATIONS = 200


@attrs.define(kw_only=True)
class Desk:
    """Hold the parts that pages read from and act on. The actions raise :class:`~sekuire.local.store.Refusal`."""

    store: Store
    hub: Hub
    approvals: Approvals
    record: Record
    settings: Settings
    faults: Faults
    queries: Queries
    figures: Figures
    sessions: Sessions
    signals: Signals
    #: The platform's address, as clients name it.
    url: str = ""

    def submit(self, agent_id: str, body: Mapping[str, Any]) -> str:
        """Queue a task as ``POST /tasks`` does, and return its id."""
        check_id(agent_id, "agent_id")
        task = check_submission(body)
        task_id = self.store.submit(agent_id, task)
        self.hub.queued(agent_id, task.capability, task.delay, task.expires_in, task_id)
        self.signals.nudge("tasks")
        return task_id

    def cancel(self, task_id: str, reason: Optional[str] = None) -> None:
        self.hub.cancel(task_id, reason)
        self.signals.nudge("tasks")

    def retry(self, task_id: str) -> None:
        agent_id, capability, delay = self.store.retry(task_id, None)
        if delay is not None:
            self.hub.queued(agent_id, capability, delay, None)
        self.signals.nudge("tasks")

    def decide(self, approval_id: str, decision: str, reason: Optional[str]) -> Dict[str, Any]:
        """Decide a request for approval, as ``POST /approvals/{approval_id}/decision`` does."""
        approval = self.approvals.decide(approval_id, Decision(decision, "dashboard", reason, "the dashboard"))
        self.signals.nudge("approvals", "tasks")
        return approval

    def installations(self) -> List[Dict[str, Any]]:
        """Return the newest installations, oldest first."""
        return self.store.installations(MOST_INSTALLATIONS)

    def command(self, installation_id: str, kind: str, reason: Optional[str]) -> None:
        self.hub.command(installation_id, kind, reason, None)
        self.signals.nudge("workers")

    def revoke(self, installation_id: str, reason: Optional[str]) -> None:
        self.hub.revoke(installation_id, reason, None)
        self.signals.nudge("workers")

    def each(self, action: Any, task_ids: List[str]) -> Tuple[int, List[str]]:
        """Do one action to several tasks. Return how many it was done to, and why not to others."""
        done, problems = 0, []
        for task_id in task_ids:
            try:
                action(task_id)
                done += 1
            except Refusal as refusal:
                problems.append(refusal.message)
        return done, list(dict.fromkeys(problems))
