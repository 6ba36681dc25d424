"""Hand out the runtime token of an agent, and keep it fresh: one renewal for all who need it."""

# Threads: any thread may call anything. State that threads share lives in the store. `_lock` guards the flag of the
# background renewal and is never held over I/O. A background renewal runs on `sekuire-refresh`, a daemon thread that
# ends with it (at most 30 s).

from __future__ import annotations

import random
import threading
from typing import Callable, Optional, Sequence, Tuple

from .._internal import fork
from .._internal.clock import time
from .._internal.logs import get_logger
from .._internal.tally import Tally
from .._internal.threads import Deadline, spawn
from ..errors import ConfigurationError, RevokedError, SekuireError, TransportError
from ..transport.http import MAX_ANSWER, Reply, make_idempotency_key
from ..transport.retry import Interrupted
from ..wire import protocol
from ..wire.models import Grant, HeartbeatReply, RuntimeCredentials
from ..wire.verdict import Revoked, Settled, Support, Unauthorized, verdict
from .login import RENEWAL_TIMEOUT, Login, bearer_of
from .store import Renewed, Snapshot

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

        auth = Authenticator(Login(config, http, store, stop=threading.Event(), runtime_info={}))
        reply, used = auth.request("GET", lambda snapshot: "/api/v1/tasks", deadline=Deadline(10.0))

    The runtime token comes from the settings, from ``token_provider`` or from the store. A new one comes by the login
    methods of ``login``, whose store, connections and stop event this shares.
    """

    def __init__(self, login: Login) -> None:
        self.store = login.store
        #: Which optional endpoints this platform offers, for all that share the installation.
        self.support = Support()
        #: The login methods.
        self.login = login
        #: Says that the platform cannot be reached, once for all that share the installation.
        self.reach = login.reach
        self._http = login.http
        self._stop = login.stop
        self._lock = threading.Lock()
        #: True while a renewal runs in the background.
        self.is_renewing = False
        self._next_try = 0.0
        #: The runtime tokens that took the place of another one, by what brought them.
        self.refreshes = Tally()
        #: Called with the kill switch that an answer carries, by the thread that got it. It must not block.
        self.on_revoked: Callable[[RevokedError], None] = lambda error: None
        #: True in a forked child to which greenlets of the parent were copied. They must not speak for the parent.
        self._stays_in_parent = False
        fork.reset_in_child(self, Authenticator._reset)

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

    def stay_in_parent(self) -> None:
        """Refuse every call from now on, in a forked child."""
        self._stays_in_parent = True

    def snapshot(self, deadline: Deadline) -> Snapshot:
        """Return credentials whose runtime token is not known to have expired. Renew the token if that is due.

        :raises AuthenticationError: no login method is left.
        :raises TransportError: the platform could not be reached in time, and there is no live token.
        :raises RevokedError: the installation was revoked.
        :raises SekuireError: after :meth:`stay_in_parent`.
        """
        if self._stays_in_parent:
            raise SekuireError("this process was forked from the one that is logged in")
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

        Threads that were refused together cause one renewal. If the platform refuses what it has just granted, the
        renewal waits. One that would wait past ``deadline`` is not begun. It raises what :meth:`snapshot` raises.

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
                # The stop still sends results. It has the rest of the wait as their delay.
                raise Interrupted("stopped while waiting to log in again", retry_after=self.store.reject(generation))
        return self._renew(generation, deadline)

    def request(
        self,
        method: str,
        path: Callable[[Snapshot], str],
        *,
        body: Optional[bytes] = None,
        idempotency_key: Optional[str] = None,
        deadline: Deadline,
        max_bytes: int = MAX_ANSWER,
        longer: float = 0.0,
    ) -> Tuple[Reply, Snapshot]:
        """Make a call with the runtime token. After a 401, renew the token and make the call once more.

        :param max_bytes: most bytes of the answer.
        :param longer: seconds that the platform may take before it answers, beyond ``deadline``.
        :returns: the reply, whatever its status, and the credentials that the call was made with.
        :raises RevokedError: the answer carries the kill switch.
        """
        if idempotency_key is None and method == "POST":
            # Here, so that the replay has the same one.
            idempotency_key = make_idempotency_key()
        limits = (max_bytes, longer)
        snapshot = self.snapshot(deadline)
        reply = self._send(method, path, body, idempotency_key, deadline, snapshot, limits)
        if not reply.is_success or protocol.may_revoke(reply.body):
            found = verdict(_ANY, reply)
            if isinstance(found, Unauthorized):
                snapshot = self.rejected(snapshot.generation, deadline, is_foreign=found.is_foreign)
                reply = self._send(method, path, body, idempotency_key, deadline, snapshot, limits)
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
            self.refreshes.add("heartbeat")
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
        limits: Tuple[int, float],
    ) -> Reply:
        return self._http.request(
            method,
            path(snapshot),
            body=body,
            credential=bearer_of(snapshot),
            idempotency_key=idempotency_key,
            timeout=max(deadline.remaining(), 0.001),
            max_bytes=limits[0],
            longer=limits[1],
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
            lambda snapshot: self._count(snapshot, self.login.renew(snapshot, deadline)),
            deadline,
            (self, "every method"),
        )

    def _count(self, before: Snapshot, renewed: Renewed) -> Renewed:
        if before.credentials.runtime_token is not None:
            self.refreshes.add("login")
        return renewed

    def _reset(self) -> None:
        """Make this the authenticator of a forked child, in which no renewal runs."""
        self.support = Support()
        self._lock = threading.Lock()
        self.is_renewing = False

    def _try_early(self, generation: int, deadline: Deadline) -> Snapshot:
        return self.store.renew(
            generation,
            lambda snapshot: self._count(snapshot, self.login.renew_early(snapshot, deadline)),
            deadline,
            (self, "early"),
        )


def is_fresh(snapshot: Snapshot, left: float) -> bool:
    """Return True if no renewal is due while ``left`` seconds remain of the runtime token's lifetime."""
    return left > min((snapshot.lifetime or 0.0) * _EARLY_SHARE, _EARLY_MOST) * (1.0 - snapshot.jitter)
