"""Share one installation between a Beacon and its Workers: HTTP, credentials, heartbeat."""

from __future__ import annotations

import threading
from typing import Callable, List, Optional, Tuple, Union

from .._internal.clock import SYSTEM_CLOCK, Clock
from ..config import AgentConfig
from ..credentials import Authenticator, RuntimeCredentialsStore
from ..credentials.login import TokenProvider
from ..errors import ConfigurationError
from ..secret import Secret
from ..transport.http import HttpClient
from ..wire import protocol
from . import platforms
from .heartbeat import Heartbeat


class Installation:
    """Hold what connects one agent to the platform. A Beacon makes one, or a Worker that runs without a Beacon.

    It owns no thread but the heartbeat's. Its owner sets ``stop``, which ends every wait of a login. ::

        installation = Installation(config, pool_size=10)
        installation.heartbeat.start()
        installation.close()

    :param pool_size: connections kept open, as many as threads that call.
    :param clock: measures the lease.
    :raises ConfigurationError: the store is of another type, or there is nothing to authenticate with.
    """

    def __init__(
        self,
        config: AgentConfig,
        *,
        pool_size: int,
        token_provider: Optional[Callable[[], Union[str, Secret]]] = None,
        api_key: Optional[Secret] = None,
        workspace_id: Optional[str] = None,
        owner: object = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        store = config.credentials_store
        if store is None:
            store = RuntimeCredentialsStore()
        elif not isinstance(store, RuntimeCredentialsStore):
            raise ConfigurationError(
                f"must be a RuntimeCredentialsStore, got {type(store).__name__}", "credentials_store"
            )
        self.config = config
        self.store = store
        self.stop = threading.Event()
        self.http = HttpClient(config, pool_size=pool_size)
        self._names: Tuple[str, ...] = config.capabilities
        info = platforms.runtime_info()
        self.auth = Authenticator(
            config,
            self.http,
            store,
            stop=self.stop,
            runtime_info=info,
            token_provider=None if token_provider is None else TokenProvider(token_provider),
            api_key=api_key,
            workspace_id=workspace_id,
        )
        self.heartbeat = Heartbeat(
            self.http,
            self.auth,
            platform=info["platform"],
            policy_gateway=config.policy_gateway,
            owner=owner,
            clock=clock,
        )
        self.heartbeat.capabilities = self._names
        self._secrets = (config.install_token, api_key)
        if config.credentials_store is None:
            # A store may be filled later, by the Beacon that it is shared with.
            self.auth.require_credentials()

    def declare(self, *names: str) -> None:
        """Add capabilities to those that bootstrap and heartbeats name."""
        self._names = tuple(dict.fromkeys((*self._names, *names)))
        self.auth.declare(self._names)
        self.heartbeat.capabilities = self._names

    def scrub(self, text: str) -> str:
        """Return ``text`` without the present tokens, and without those that they replaced lately."""
        for token in self._tokens():
            text = text.replace(token, "***")
        return text

    def scrub_json(self, data: bytes) -> bytes:
        """Do the same as :meth:`scrub` for JSON, in which a quote or a backslash of a token is escaped."""
        for token in self._tokens():
            data = data.replace(protocol.encode_json(token)[1:-1], b"***")
        return data

    def _tokens(self) -> List[str]:
        known = {secret.reveal() for secret in (*self.store.secrets, *self._secrets) if secret is not None}
        # The longest first: one may be the beginning of another.
        return sorted(known, key=len, reverse=True)

    def close(self) -> None:
        """End the waits of a login, and close the connections."""
        self.stop.set()
        self.http.close()
