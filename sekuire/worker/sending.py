"""Send one request about a task and classify the answer."""

from __future__ import annotations

from typing import Optional, Protocol, Tuple

from .._internal.threads import Deadline
from ..config import WorkerConfig
from ..credentials import Authenticator, Snapshot
from ..errors import RevokedError, SekuireError
from ..wire.verdict import Revoked, Verdict, verdict


class Revocable(Protocol):
    """End with the installation when it is revoked: the worker's life."""

    def revoke(self, error: RevokedError) -> None:
        """Begin to stop, because the installation is revoked. Must not block."""


class Sender:
    """Send completions, releases, progress and requests for approval of one worker, each once.

    Any thread may call :meth:`ask`. No state of its own.

    :param life: what ends when an answer carries the kill switch. It is called without a lock.
    """

    def __init__(self, config: WorkerConfig, auth: Authenticator, worker_id: str, life: Revocable) -> None:
        self.worker_id = worker_id
        #: Which optional endpoints the platform offers.
        self.support = auth.support
        self._auth = auth
        self._life = life
        self._endpoints = config.endpoints
        self._timeout = config.connect_timeout + config.read_timeout

    @property
    def installation_id(self) -> Optional[str]:
        """Return the installation in whose name this sends now."""
        return self._auth.store.current.installation_id

    def ask(self, endpoint: str, task_id: str, body: bytes, key: Optional[str] = None) -> Verdict:
        """Send ``body`` once and return what the answer means. A revocation has been passed on by then."""
        return self.exchange("POST", endpoint, task_id, body=body, key=key)[0]

    def exchange(
        self,
        method: str,
        endpoint: str,
        task_id: str,
        *,
        body: Optional[bytes] = None,
        key: Optional[str] = None,
        **ids: str,
    ) -> Tuple[Verdict, bytes]:
        """Make one request, as :meth:`ask` does. Return what the answer means, and its body.

        :param ids: further ids in the path.
        """
        path = self._endpoints.path(endpoint, task_id=task_id, **ids)

        def path_of(snapshot: Snapshot) -> str:
            return path

        found: Verdict
        answer = b""
        try:
            reply, _ = self._auth.request(
                method, path_of, body=body, idempotency_key=key, deadline=Deadline(self._timeout)
            )
            found, answer = verdict(endpoint, reply), reply.body
        except SekuireError as error:
            found = verdict(endpoint, error)
        if isinstance(found, Revoked):
            self._life.revoke(found.error)
        return found, answer
