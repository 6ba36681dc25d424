"""Share one installation between a Beacon and its Workers: HTTP, credentials, heartbeat."""

from __future__ import annotations

import threading
from typing import Callable, Optional, Tuple, Union

from .._internal import fork
from .._internal.clock import SYSTEM_CLOCK, Clock
from .._internal.greenlets import patched_by
from .._internal.threads import Deadline
from ..config import AgentConfig
from ..credentials import Authenticator, RuntimeCredentialsStore
from ..credentials.login import Login, TokenProvider
from ..errors import ConfigurationError
from ..secret import Secret
from ..transport.http import HttpClient
from . import platforms
from .capabilities import Publisher
from .heartbeat import Heartbeat


class Installation:
    """Hold what connects one agent to the platform. A Beacon makes one, or a Worker that runs without a Beacon.

    It owns no thread but the heartbeat's. Its owner sets ``stop``, which ends every wait of a login. ::

        installation = Installation(config, pool_size=10)
        installation.heartbeat.start()
        installation.close()

    :param pool_size: connections kept open, as many as threads that call.
    :param is_required: False if the agent goes on without a login.
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
        is_required: bool = True,
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
        self.is_required = is_required
        #: Why no login is possible: nothing is configured to log in with, and that is permitted.
        self.problem: Optional[ConfigurationError] = None
        #: How long the first start of a part may wait in all, from when its Beacon has been started.
        self.patience: Optional[Deadline] = None
        self.stop = threading.Event()
        self.http = HttpClient(config, pool_size=pool_size)
        self._names: Tuple[str, ...] = config.capabilities
        info = platforms.runtime_info()
        login = Login(
            config,
            self.http,
            store,
            stop=self.stop,
            runtime_info=info,
            token_provider=None if token_provider is None else TokenProvider(token_provider),
            api_key=api_key,
            workspace_id=workspace_id,
        )
        self.auth = Authenticator(login)
        self.publisher = Publisher(self.http, self.auth, self.stop, owner)
        self.heartbeat = Heartbeat(
            self.http,
            self.auth,
            platform=info["platform"],
            policy_gateway=config.policy_gateway,
            owner=owner,
            clock=clock,
        )
        self.heartbeat.capabilities = self._names
        fork.reset_in_child(self, Installation._stay_in_parent)
        if config.credentials_store is None:
            # A store may be filled later, by the Beacon that it is shared with.
            self._check_credentials()

    def _check_credentials(self) -> None:
        try:
            self.auth.require_credentials()
        except ConfigurationError as error:
            if self.is_required:
                raise
            # Without its traceback, whose frames hold an object that is not whole.
            self.problem = error.with_traceback(None)

    def start_time(self, timeout: float) -> float:
        """Return how many of ``timeout`` seconds a start may wait, if its Beacon has waited in vain before it."""
        if self.patience is None or self.heartbeat.last_at is not None:
            return timeout
        return min(timeout, self.patience.remaining())

    def _stay_in_parent(self) -> None:
        # A forked child has no threads of its parent, but copies of all greenlets, which would beat for the parent.
        if patched_by() is not None and self.heartbeat.is_beating():
            self.stop.set()
            self.heartbeat.end()
            self.auth.stay_in_parent()

    def declare(self, *names: str) -> None:
        """Add capabilities to those that bootstrap and heartbeats name."""
        self._names = tuple(dict.fromkeys((*self._names, *names)))
        self.auth.declare(self._names)
        self.heartbeat.capabilities = self._names

    def close(self) -> None:
        """End the waits of a login, and close the connections."""
        self.stop.set()
        self.http.close()
