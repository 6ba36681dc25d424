"""Hand out the runtime token of an agent, and keep it fresh: one renewal for all who need it."""

# Threads: any thread may call anything. State that threads share lives in the store. `_lock` guards the flag of the
# background renewal and is never held over I/O. A background renewal runs on `sekuire-refresh`, a daemon thread that
# ends with it (at most 30 s).

from __future__ import annotations

import random
import threading
import time
from typing import Any, Callable, Mapping, Optional, Sequence, Tuple

from .._internal import fork
from .._internal.logs import get_logger
from .._internal.threads import Deadline, spawn
from ..config import AgentConfig
from ..errors import ConfigurationError, RevokedError, SekuireError, TransportError
from ..secret import Secret
from ..transport.http import HttpClient, Reply, make_idempotency_key
from ..transport.retry import Interrupted
from ..wire import protocol
from ..wire.models import Grant, HeartbeatReply, RuntimeCredentials
from ..wire.verdict import Revoked, Settled, Support, Unauthorized, verdict
from .login import RENEWAL_TIMEOUT, Login, TokenProvider, bearer_of
from .store import Renewed, RuntimeCredentialsStore, Snapshot, fingerprint

log = get_logger("sekuire.credentials")

#: Seconds after a failed early renewal before the next, plus up to a fifth of it.
RENEWAL_PAUSE = 30.0

#: Stands for whatever is asked with the runtime token: a 401 and a revocation mean the same to all endpoints.
_ANY = "heartbeat"

# A token is renewed early (advisory: in the background, while the present one is used) when less is left of it than
# the first share of its lifetime, and before use (mandatory: the caller waits) when less is left than the second.
_EARLY_SHARE, _EARLY_MOST = 0.2, 300.0
_BEFORE_USE_SHARE, _BEFORE_USE_MOST = 0.1, 60.0


class Authenticator:
    """Hand out, renew and replace the runtime token of one agent. Shared by all its threads.

    ::

        auth = Authenticator(config, http, store, stop=threading.Event(), runtime_info={})
        reply, used = auth.request("GET", lambda snapshot: "/api/v1/tasks", deadline=Deadline(10.0))

    The runtime token comes from the settings, from ``token_provider`` or from the store. A new one comes by the login
    methods of :class:`~sekuire.credentials.login.Login`.

    :param stop: ends every wait of a login when it is set.
    """

    def __init__(
        self,
        config: AgentConfig,
        http: HttpClient,
        store: RuntimeCredentialsStore,
        *,
        stop: threading.Event,
        runtime_info: Mapping[str, Any],
        token_provider: Optional[TokenProvider] = None,
        api_key: Optional[Secret] = None,
        workspace_id: Optional[str] = None,
    ) -> None:
        self.store = store
        #: Which optional endpoints this platform offers, for all that share the installation.
        self.support = Support()
        #: The login methods.
        self.login = Login(
            config,
            http,
            store,
            stop=stop,
            runtime_info=runtime_info,
            token_provider=token_provider,
            api_key=api_key,
            workspace_id=workspace_id,
        )
        self._http = http
        self._stop = stop
        self._lock = threading.Lock()
        #: True while a renewal runs in the background.
        self.is_renewing = False
        self._next_try = 0.0
        #: Called with the kill switch that an answer carries, by the thread that got it. It must not block.
        self.on_revoked: Callable[[RevokedError], None] = lambda error: None
        fork.reset_in_child(self, Authenticator._reset)
        store.seed(
            RuntimeCredentials(
                installation_id=config.installation_id,
                runtime_token=config.runtime_token,
                refresh_token=config.refresh_token,
                workspace_id=workspace_id,
            ),
            fingerprint(config.install_token.reveal()) if config.install_token else None,
        )

    def require_credentials(self) -> None:
        """Check that something is configured to authenticate with.

        :raises ConfigurationError: nothing is.
        """
        if not (self.store.current.runtime_token or self.login.is_possible()):
            raise ConfigurationError(
                "no credentials: give install_token (SEKUIRE_INSTALL_TOKEN), runtime_token (SEKUIRE_RUNTIME_TOKEN), "
                "installation_id with refresh_token (SEKUIRE_INSTALLATION_ID, SEKUIRE_REFRESH_TOKEN), token_provider, "
                "or a credentials_store that holds some"
            )

    def declare(self, capabilities: Sequence[str]) -> None:
        """Set what a bootstrap says the agent can do."""
        self.login.capabilities = tuple(capabilities)

    # -- handing out --

    def snapshot(self, deadline: Deadline) -> Snapshot:
        """Return credentials whose runtime token is not known to have expired. Renew the token if that is due.

        :raises AuthenticationError: no login method is left.
        :raises TransportError: the platform could not be reached in time, and there is no live token.
        :raises RevokedError: the installation was revoked.
        """
        snapshot = self.store.snapshot
        left = snapshot.time_left()
        if snapshot.credentials.runtime_token is not None:
            if left is None or is_fresh(snapshot, left):
                return snapshot
            if left > 0:
                return self._renew_early(snapshot, left, deadline)
        return self._renew(snapshot.generation, deadline)

    def rejected(self, generation: int, deadline: Deadline, *, is_foreign: bool = False) -> Snapshot:
        """Return credentials to use instead of those of ``generation``, which were answered with 401.

        Threads that were refused together cause one renewal. Where the platform refuses at once what it grants, the
        renewal waits. One that would have to wait past ``deadline`` is not begun. Errors as :meth:`snapshot`.

        :param is_foreign: another server sent the 401. It starts a renewal, and says nothing of the token.
        """
        snapshot = self.store.snapshot
        if not is_foreign and snapshot.generation == generation:
            self.login.note_rejected(snapshot.credentials.runtime_token)
        delay = self.store.reject(generation)
        if delay > 0:
            if delay >= deadline.remaining():
                raise TransportError(
                    f"every token that was granted was refused at its first use; the next login is in {delay:.1f} s",
                    retry_after=delay,
                )
            if self._stop.wait(delay):
                raise Interrupted("stopped while waiting to log in again")
        return self._renew(generation, deadline)

    def request(
        self,
        method: str,
        path: Callable[[Snapshot], str],
        *,
        body: Optional[bytes] = None,
        idempotency_key: Optional[str] = None,
        deadline: Deadline,
    ) -> Tuple[Reply, Snapshot]:
        """Make a call with the runtime token. After a 401, renew the token and make the call once more.

        :returns: the reply, whatever its status, and the credentials that the call was made with.
        :raises RevokedError: the answer carries the kill switch.
        """
        if idempotency_key is None and method == "POST":
            # Here, so that the replay has the same one.
            idempotency_key = make_idempotency_key()
        snapshot = self.snapshot(deadline)
        reply = self._send(method, path, body, idempotency_key, deadline, snapshot)
        if not reply.is_success or protocol.may_revoke(reply.body):
            found = verdict(_ANY, reply)
            if isinstance(found, Unauthorized):
                snapshot = self.rejected(snapshot.generation, deadline, is_foreign=found.is_foreign)
                reply = self._send(method, path, body, idempotency_key, deadline, snapshot)
                found = verdict(_ANY, reply)
            if isinstance(found, Revoked):
                self.on_revoked(found.error)
                raise found.error
        if reply.is_success and self.store.proven < snapshot.generation and isinstance(verdict(_ANY, reply), Settled):
            self.store.prove(snapshot.generation)
        return reply, snapshot

    def accept_heartbeat(self, reply: HeartbeatReply, used: int, sent_at: float, sent_wall: float) -> None:
        """Store the fresh token that a heartbeat's answer may carry."""
        if reply.refreshed_token is None:
            return
        credentials = RuntimeCredentials(
            runtime_token=reply.refreshed_token, expires_at=reply.refreshed_token_expires_at
        )
        grant = Grant(credentials=credentials, lifetime=reply.refreshed_token_lifetime)
        if self.store.offer(used, Renewed(grant=grant, sent_at=sent_at, sent_wall=sent_wall)):
            log.debug("the heartbeat brought a fresh runtime token")

    # -- renewing --

    def _send(
        self,
        method: str,
        path: Callable[[Snapshot], str],
        body: Optional[bytes],
        idempotency_key: Optional[str],
        deadline: Deadline,
        snapshot: Snapshot,
    ) -> Reply:
        return self._http.request(
            method,
            path(snapshot),
            body=body,
            credential=bearer_of(snapshot),
            idempotency_key=idempotency_key,
            timeout=max(deadline.remaining(), 0.001),
        )

    def _renew_early(self, snapshot: Snapshot, left: float, deadline: Deadline) -> Snapshot:
        """Renew a token that still works. If that fails, return the present one, unless it has expired by then."""
        if not self.login.can_renew_early(snapshot) or time.monotonic() < self._next_try:
            return snapshot
        if left > min((snapshot.lifetime or 0.0) * _BEFORE_USE_SHARE, _BEFORE_USE_MOST):
            self._renew_in_background(snapshot.generation)
            return snapshot
        try:
            return self._try_early(snapshot.generation, deadline)
        except RevokedError:
            raise
        except SekuireError as error:
            problem = error
        snapshot = self.store.snapshot
        if snapshot.credentials.runtime_token is None or snapshot.time_left() == 0:
            # The try took all that was left. An expired token is never handed out, and the refusal of one method says
            # nothing of the others.
            return self._renew(snapshot.generation, deadline)
        self._postpone(problem)
        return snapshot

    def _renew_in_background(self, generation: int) -> None:
        with self._lock:
            if self.is_renewing:
                return
            self.is_renewing = True
        is_started = False
        try:
            # If no thread can be started, the token still lives, and the next caller tries again.
            is_started = spawn(self._run_renewal, "sekuire-refresh", generation) is not None
        finally:
            if not is_started:
                self.is_renewing = False

    def _run_renewal(self, generation: int) -> None:
        try:
            self._try_early(generation, Deadline(RENEWAL_TIMEOUT))
        except RevokedError as error:
            self.on_revoked(error)
        except SekuireError as error:
            self._postpone(error)
        except Exception:
            self._postpone(None)
            log.exception("renewing the runtime token failed")
        finally:
            self.is_renewing = False

    def _postpone(self, error: Optional[SekuireError]) -> None:
        """Begin no further early renewal for a while."""
        self._next_try = time.monotonic() + RENEWAL_PAUSE * random.uniform(1.0, 1.2)
        if error is not None:
            log.warning("renewing the runtime token failed, the present one still works: %s", error)

    def _renew(self, generation: int, deadline: Deadline) -> Snapshot:
        return self.store.renew(
            generation,
            lambda snapshot: self.login.renew(snapshot, deadline),
            deadline,
            (self, "every method"),
        )

    def _reset(self) -> None:
        """Make this the authenticator of a forked child, in which no renewal runs."""
        self.support = Support()
        self._lock = threading.Lock()
        self.is_renewing = False

    def _try_early(self, generation: int, deadline: Deadline) -> Snapshot:
        return self.store.renew(
            generation,
            lambda snapshot: self.login.renew_early(snapshot, deadline),
            deadline,
            (self, "early"),
        )


def is_fresh(snapshot: Snapshot, left: float) -> bool:
    """Return True if so much is left of the runtime token, in seconds, that no renewal is due."""
    return left > min((snapshot.lifetime or 0.0) * _EARLY_SHARE, _EARLY_MOST) * (1.0 - snapshot.jitter)
