"""Command installations, and make install tokens."""

from __future__ import annotations

from typing import Any, Dict, List, Optional

from .._internal.checks import check_number, check_whole
from ..config import ClientConfig
from ..errors import SekuireError
from ..transport.http import MAX_ANSWER
from ..wire import protocol
from .deciding import Deciding
from .link import Caller, Link, list_of
from .submission import check_id, check_reason

__all__ = ["Administration"]


class Administration(Deciding):
    """Do what an administrator does with installations, over one link. A client is one."""

    def _set_up(self, config: ClientConfig, call: Caller) -> None:
        self.config = config
        self._link = Link(call, config.retry_for, config.api_base_url)
        self._path = config.endpoints.path

    def installations(self) -> List[Dict[str, Any]]:
        """Return every installation as the platform describes it, oldest first."""
        limit = self.config.max_result_bytes + MAX_ANSWER
        page = self._link.ask("installations", "GET", self._path("installations"), max_bytes=limit)
        return list_of(page, "installations")

    def pause(self, installation_id: str, reason: Optional[str] = None) -> None:
        """Pause an installation: its workers accept no tasks until :meth:`resume`. Running ones go on."""
        self._command(installation_id, "pause", reason)

    def resume(self, installation_id: str, reason: Optional[str] = None) -> None:
        """Undo :meth:`pause`."""
        self._command(installation_id, "resume", reason)

    def terminate(self, installation_id: str, reason: Optional[str] = None) -> None:
        """Have the workers of an installation cancel what runs and stop."""
        self._command(installation_id, "terminate", reason)

    def revoke(
        self, installation_id: str, reason: Optional[str] = None, *, shutdown_timeout: Optional[float] = None
    ) -> None:
        """Revoke an installation: its workers stop, and its credentials are no longer accepted.

        :param shutdown_timeout: seconds in which running handlers may finish and report. None: the platform's default.
        """
        check_id("installation_id", installation_id)
        check_number("shutdown_timeout", shutdown_timeout, zero=True, most=protocol.MAX_DURATION, or_none=True)
        milliseconds = None if shutdown_timeout is None else round(shutdown_timeout * 1000)
        body = protocol.reason_body(check_reason(reason), shutdown_timeout_ms=milliseconds)
        self._link.ask("revoke", "POST", self._path("revoke", installation_id=installation_id), body)

    def create_install_token(self, agent_id: Optional[str] = None, max_uses: int = 1) -> str:
        """Return an install token with which ``max_uses`` installations of an agent can log in.

        :param agent_id: None: the client's own agent.
        """
        agent_id = self.config.agent_id if agent_id is None else agent_id
        check_id("agent_id", agent_id)
        check_whole("max_uses", max_uses)
        body = protocol.install_token_body(str(agent_id), max_uses)
        token = self._link.ask("install_tokens", "POST", self._path("install_tokens"), body).get("install_token")
        if not isinstance(token, str) or not token:
            raise SekuireError("the platform's answer names no install_token; is the URL a Sekuire platform's?")
        return token

    def _command(self, installation_id: str, kind: str, reason: Optional[str]) -> None:
        check_id("installation_id", installation_id)
        body = protocol.reason_body(check_reason(reason), type=kind)
        self._link.ask("commands", "POST", self._path("commands", installation_id=installation_id), body)
