"""The dashboard's pages: each module adds the routes of one."""

from __future__ import annotations

from . import approvals, audit, faults, overview, policy, requests, submit, task, tasks, workers

__all__ = ["PAGES"]

PAGES = (
    overview.add,
    tasks.add,
    task.add,
    submit.add,
    workers.add,
    approvals.add,
    policy.add,
    audit.add,
    faults.add,
    requests.add,
)
