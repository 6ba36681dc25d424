"""Ask the platform for a policy: with a client's own credentials, or with those of an installation."""

from __future__ import annotations

import functools
from typing import Iterator, Optional, Protocol

from .._internal.threads import Deadline
from ..config import PolicyClientConfig
from ..credentials import Authenticator
from ..credentials.login import TokenProvider, bearer_of
from ..errors import TransportError
from ..transport.http import Credential, HttpClient, Reply
from ..wire import protocol

__all__ = ["ClientSource", "InstallationSource", "Source", "Workspace"]


class Source(Protocol):
    """Send a GET with the credentials that are available. Any thread may call anything."""

    def get(self, path: str, deadline: Deadline) -> Reply:
        """Return the answer, whatever its status.

        :raises SekuireError: there are no credentials, or no answer came.
        """

    def close(self) -> None:
        """Close the connections."""


class ClientSource:
    """Ask over connections of its own, with each of a client's login methods until one is accepted."""

    def __init__(self, config: PolicyClientConfig) -> None:
        self._http = HttpClient(config, pool_size=2)
        self._provider = None if config.token_provider is None else TokenProvider(config.token_provider)
        self._store = config.credentials_store
        self._api_key = config.api_key

    def get(self, path: str, deadline: Deadline) -> Reply:
        """Return the first answer that does not refuse the credentials, or else the last answer."""
        reply: Optional[Reply] = None
        for credential in self._credentials():
            timeout = max(deadline.remaining(), 0.001)
            reply = self._http.request("GET", path, credential=credential, timeout=timeout)
            if reply.status != 401:
                break
        if reply is None:
            raise TransportError("the credentials_store holds no runtime token yet; waiting for one")
        return reply

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def _credentials(self) -> Iterator[Credential]:
        """Yield what to try. The caller asks for the next one only after a 401."""
        if self._provider is not None:
            first = self._provider.ask()
            yield functools.partial(protocol.bearer, first)
            second = self._provider.ask()
            if second != first:
                yield functools.partial(protocol.bearer, second)
        if self._store is not None:
            snapshot = self._store.snapshot
            bearer = bearer_of(snapshot)
            if bearer is not None:
                yield bearer
            # It was refused, or there was none. The owner of the store may have renewed it since.
            self._store.reload()
            newer = self._store.snapshot
            bearer = bearer_of(newer)
            if bearer is not None and newer.generation != snapshot.generation:
                yield bearer
        if self._api_key is not None:
            yield functools.partial(protocol.api_key_header, self._api_key)


class Workspace:
    """Name the workspace whose policy counts."""

    def __init__(self, workspace_id: Optional[str]) -> None:
        self._given = workspace_id

    @property
    def workspace_id(self) -> Optional[str]:
        """Return the workspace's id, or None while nobody has named it."""
        return self._given


class InstallationSource(Workspace):
    """Ask with an installation's connections and credentials. Its login names the workspace, unless one was given.

    :meth:`attach` names the installation, which is made later than the gateway that asks.
    """

    def __init__(self, workspace_id: Optional[str]) -> None:
        super().__init__(workspace_id)
        self._auth: Optional[Authenticator] = None

    def attach(self, auth: Authenticator) -> None:
        """Use the credentials of ``auth`` from now on."""
        self._auth = auth

    @property
    def workspace_id(self) -> Optional[str]:
        if self._given is not None or self._auth is None:
            return self._given
        return self._auth.store.current.workspace_id

    def get(self, path: str, deadline: Deadline) -> Reply:
        """Return the platform's answer."""
        if self._auth is None:
            raise TransportError("the installation is not there yet")
        return self._auth.request("GET", lambda snapshot: path, deadline=deadline)[0]

    def close(self) -> None:
        """Do nothing: the installation closes its connections."""
