"""Submit tasks when a transaction is committed, and not when it is rolled back."""

from __future__ import annotations

import threading
from typing import Any, Optional

from django.core.signals import setting_changed
from django.db import transaction

from ...calls.submission import Submission
from ...client import SekuireClient, TaskHandle
from ...errors import SekuireError
from ..settings import Settings
from . import conf

__all__ = ["OnCommitHandle", "submit_on_commit"]

_lock = threading.Lock()
_client: Optional[SekuireClient] = None


def submit_on_commit(
    capability: str,
    input: Any,
    *,
    agent_id: Optional[str] = None,
    using: Optional[str] = None,
    robust: bool = False,
    **fields: Any,
) -> OnCommitHandle:
    """Submit a task with the API key once the running transaction is committed, or now if there is no transaction.

    The thread that commits submits the task after the commit, and tries again for up to 5 seconds. If that fails, the
    data is committed and the error is raised from the block. With ``robust=True`` Django logs the error, and the other
    functions that wait for the commit still run. The input is written as JSON now; changes to it after this call have
    no effect.

    The handle that is returned has its ``idempotency_key`` at once. The platform gives the task its id, so the handle
    follows the task from the commit on.

    :param agent_id: the agent that gets the task; the default is the settings' agent.
    :param using: the database whose transaction counts.
    :param fields: the others of :meth:`SekuireClient.submit() <sekuire.SekuireClient.submit>`, such as ``delay``,
        ``timeout`` or ``idempotency_key``.
    :raises ConfigurationError: the API key or the agent is missing, or the task is invalid; raised before the commit.
    """
    settings = conf.read()
    client = _shared(settings)
    agent_id = settings.agent_id() if agent_id is None else agent_id
    submission = client.prepare(capability, input, agent_id=agent_id, **fields)
    outcome = _Outcome()
    # Its method, because Django logs the __qualname__ of what fails.
    transaction.on_commit(_Sending(client, submission, outcome).send, using=using, robust=robust)
    return OnCommitHandle(client, submission.key, outcome)


class _Outcome:
    """Say what became of a submission that waits for a commit."""

    task_id: Optional[str] = None
    #: Why it could not be sent.
    problem: Optional[str] = None
    #: Django has dropped it, or is done with it.
    is_dropped = False


class OnCommitHandle(TaskHandle):
    """Follow a task that is submitted when a transaction is committed. :func:`submit_on_commit` returns one. ::

        with transaction.atomic():
            order = Order.objects.create(...)
            handle = submit_on_commit("confirm_order", {"order_id": order.pk})
            order.key = handle.idempotency_key  # Known now. The task has its id after the commit.
            order.save()
        print(handle.id, handle.status())

    Before the commit, after a rollback and after a failed submission, ``id`` and every method raise
    :class:`~sekuire.errors.SekuireError`, which says which of them it is.
    """

    __slots__ = ("_outcome", "idempotency_key")

    def __init__(self, client: SekuireClient, key: str, outcome: _Outcome) -> None:
        super().__init__(client, "")
        #: The key under which it is submitted. For 24 hours a submission under this key gets the same task.
        self.idempotency_key = key
        self._outcome = outcome

    @property
    def id(self) -> str:
        """Return the task's id, once the transaction is committed.

        :raises SekuireError: the task has not been submitted.
        """
        outcome, key = self._outcome, self.idempotency_key
        if outcome.task_id is not None:
            return outcome.task_id
        if outcome.problem is not None:
            raise SekuireError(f"the task with the key {key} was not submitted after the commit: {outcome.problem}")
        if outcome.is_dropped:
            raise SekuireError(f"the task with the key {key} was not submitted: its transaction was rolled back")
        raise SekuireError(
            f"the task with the key {key} is not submitted before its transaction is committed; use the handle after "
            "the atomic() block"
        )

    def __repr__(self) -> str:
        return f"<OnCommitHandle {self._outcome.task_id or 'without a task'}, key {self.idempotency_key}>"


class _Sending:
    """Send one submission when the transaction is committed.

    Django drops what waits for a commit when it rolls back, and says nothing. So this notes its own end.
    """

    def __init__(self, client: SekuireClient, submission: Submission, outcome: _Outcome) -> None:
        self._client = client
        self._submission = submission
        self._outcome = outcome

    def send(self) -> None:
        try:
            self._outcome.task_id = self._client.send(self._submission).id
        except BaseException as error:
            self._outcome.problem = str(error) or type(error).__name__
            raise

    def __del__(self) -> None:
        self._outcome.is_dropped = True


def _shared(settings: Settings) -> SekuireClient:
    """Return the process's client, which keeps its connections open. A forked child opens its own."""
    global _client
    with _lock:
        if _client is None:
            _client = settings.client()
        return _client


def _forget(*, setting: str, **kwargs: Any) -> None:
    global _client
    if setting == conf.NAME:
        with _lock:
            old, _client = _client, None
        if old is not None:
            old.close()


setting_changed.connect(_forget)
