"""Submit tasks when a transaction is committed, and not when it is rolled back."""

from __future__ import annotations

import os
import threading
from typing import Any, Optional

from django.core.signals import setting_changed
from django.db import transaction

from ...client import TaskSubmitter
from ..settings import Settings
from . import conf

__all__ = ["submit_on_commit"]

_lock = threading.Lock()
_submitter: Optional[TaskSubmitter] = None
_pid = 0


def submit_on_commit(
    capability: str,
    input: Any,
    *,
    agent_id: Optional[str] = None,
    using: Optional[str] = None,
    robust: bool = False,
    **fields: Any,
) -> None:
    """Submit a task with the API key once the running transaction is committed, or now if there is no transaction.

    The thread that commits submits the task after the commit, in one try. If that fails, the data is committed and the
    error is raised from the block. With ``robust=True`` Django logs the error, and the other functions that wait for
    the commit still run. The input is written as JSON now; changes to it after this call have no effect.

    :param agent_id: the agent that gets the task; the default is the settings' agent.
    :param using: the database whose transaction counts.
    :param fields: ``workspace_id``, ``trace_id``, ``timeout_ms`` (milliseconds), ``max_attempts``.
    :raises ConfigurationError: the API key or the agent is missing, or the task is invalid; raised before the commit.
    """
    settings = conf.read()
    body = TaskSubmitter.prepare(capability, input, settings.agent_id() if agent_id is None else agent_id, **fields)
    submitter = _shared(settings)
    transaction.on_commit(lambda: submitter.send(body), using=using, robust=robust)


def _shared(settings: Settings) -> TaskSubmitter:
    """Return the process's submitter, which keeps its connections open."""
    global _submitter, _pid
    with _lock:
        # A child must not use its parent's sockets.
        if _submitter is None or _pid != os.getpid():
            _submitter, _pid = settings.submitter(), os.getpid()
        return _submitter


def _forget(*, setting: str, **kwargs: Any) -> None:
    global _submitter
    if setting == conf.NAME:
        with _lock:
            old, _submitter = _submitter, None
        if old is not None and _pid == os.getpid():
            old.close()


setting_changed.connect(_forget)
