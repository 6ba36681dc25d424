"""See the requests for approval, and decide them."""

from __future__ import annotations

from typing import Any, Callable, Dict, Iterator, Optional

from .._internal.checks import check_whole
from ..config import ClientConfig
from ..errors import ConfigurationError
from ..transport.http import MAX_ANSWER
from ..wire import protocol
from .link import PAGE, Link
from .submission import check_id, check_reason

__all__ = ["Deciding"]


class Deciding:
    """Decide what agents ask for, over one link. A client is one."""

    config: ClientConfig
    _link: Link
    _path: Callable[..., str]
    #: True if it acts with an agent's own token, which must not decide what the agent asks for.
    _is_agent = False

    def approvals(self, status: Optional[str] = None, *, limit: Optional[int] = None) -> Iterator[Dict[str, Any]]:
        """Yield requests for approval, newest first, each as the platform describes it. ::

            for request in client.approvals("pending"):
                print(request["approval_id"], request["subject"], request["details"])

        Further pages are asked for as they are needed.

        :param status: only those that are ``"pending"``, ``"approved"``, ``"denied"`` or ``"expired"``.
        :param limit: so many at most; None: all.
        :raises ConfigurationError: this is the client of an agent, which may not see them.
        :raises APIError: the platform has no approvals (404).
        """
        self._check_may_decide("approvals")
        if status is not None and status not in protocol.APPROVAL_STATES:
            raise ConfigurationError(f"must be one of {', '.join(protocol.APPROVAL_STATES)}, got {status!r}", "status")
        check_whole("limit", limit, or_none=True)
        most = PAGE * protocol.MAX_DETAILS * 2 + MAX_ANSWER
        path = self._path("approval_list")
        return self._link.pages("approval_list", path, "approvals", {"status": status}, limit, most)

    def approve(
        self, approval_id: str, reason: Optional[str] = None, *, decided_by: Optional[str] = None
    ) -> Dict[str, Any]:
        """Approve what a task asks for, and return the request. The task goes on.

        :param reason: why, for whoever reads the log.
        :param decided_by: who decides, for the same. Nothing proves it; the platform records the key.
        :raises ConfigurationError: this is the client of an agent, which may not decide.
        :raises APIError: somebody has decided already (409), it has expired or its task has ended (410), or the
            platform does not know it (404).
        """
        return self._decide("approve", approval_id, "approved", reason, decided_by)

    def deny(
        self, approval_id: str, reason: Optional[str] = None, *, decided_by: Optional[str] = None
    ) -> Dict[str, Any]:
        """Deny what a task asks for, and return the request.

        The task fails with ``approval_denied``, unless its handler catches that. It raises what :meth:`approve` raises.
        """
        return self._decide("deny", approval_id, "denied", reason, decided_by)

    def _decide(
        self, method: str, approval_id: str, decision: str, reason: Optional[str], decided_by: Optional[str]
    ) -> Dict[str, Any]:
        self._check_may_decide(method)
        check_id("approval_id", approval_id)
        if decided_by is not None and not isinstance(decided_by, str):
            raise ConfigurationError(f"must be a str, got {type(decided_by).__name__}", "decided_by")
        body = protocol.decision_body(decision, check_reason(reason), decided_by)
        path = self._path("decision", approval_id=approval_id)
        return self._link.ask("decision", "POST", path, body, max_bytes=protocol.MAX_DETAILS * 2 + MAX_ANSWER)

    def _check_may_decide(self, method: str) -> None:
        if self._is_agent:
            raise ConfigurationError(
                f"{method}() needs an API key: an agent must not decide what it asks for. Use SekuireClient.from_env() "
                "in a program of the people who decide, and give agents no such key"
            )
