"""The ways of authenticating, in their order, and keeping the token fresh: one renewal for all who need it."""

from __future__ import annotations

import functools
import random
import threading
import time
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import attrs

from .._internal.logs import get_logger
from .._internal.single_flight import SingleFlight
from .._internal.threads import Deadline, spawn
from ..config import AgentConfig
from ..errors import (
    APIError,
    AuthenticationError,
    ConfigurationError,
    PlanLimitError,
    RevokedError,
    SekuireError,
    TransportError,
)
from ..secret import Secret, as_secret
from ..transport.http import Credential, HttpClient, Reply, make_idempotency_key
from ..transport.retry import Interrupted, call
from ..wire import protocol
from ..wire.models import Grant, HeartbeatReply, RuntimeCredentials
from ..wire.verdict import Refused, Retry, Revoked, Settled, Support, Unauthorized, verdict
from .store import Renewed, RuntimeCredentialsStore, Snapshot, fingerprint

log = get_logger("sekuire.credentials")

#: Seconds a call of ``token_provider`` may take.
PROVIDER_TIMEOUT = 10.0
#: Seconds a renewal may take, all its retries together.
RENEWAL_TIMEOUT = 30.0
#: Seconds after a failed early renewal before the next, plus up to a fifth of it.
RENEWAL_PAUSE = 30.0

#: Stands for whatever is asked with the runtime token: a 401 and a revocation mean the same to all endpoints.
_ANY = "heartbeat"

_EARLY_SHARE, _EARLY_MOST = 0.2, 300.0
_LATE_SHARE, _LATE_MOST = 0.1, 60.0


class _Refused(Exception):
    """One way of authenticating is closed for good; the next is tried."""

    def __init__(self, message: str, status: Optional[int] = None, code: Optional[str] = None) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.code = code


class Authenticator:
    """Gets, renews and hands out the runtime token of one agent. Shared by all its threads.

    Any thread may call anything. State that threads share lives in the store; ``_lock`` guards the few flags here and
    is never held over I/O. Background renewals run on ``sekuire-refresh``, a daemon thread that ends with the renewal
    (at most 30 s); a ``token_provider`` runs on ``sekuire-token-provider``, which ends when the provider returns.

    The order is: a runtime token (given, from ``token_provider``, or in the store); ``installation_id`` and
    ``refresh_token``; the install token; and, where an ``api_key`` was given, recovery with it.
    """

    def __init__(
        self,
        config: AgentConfig,
        http: HttpClient,
        store: RuntimeCredentialsStore,
        *,
        stop: threading.Event,
        runtime_info: Mapping[str, Any],
        token_provider: Optional[Callable[[], Union[str, Secret]]] = None,
        api_key: Optional[Secret] = None,
        workspace_id: Optional[str] = None,
    ) -> None:
        self.store = store
        #: Which optional endpoints this platform offers, for all that share the installation.
        self.support = Support()
        self._http = http
        self._stop = stop
        self._agent_id = config.agent_id
        self._capabilities: Sequence[str] = config.capabilities
        self._install_token = config.install_token
        self._runtime_info = runtime_info
        self._provider = None if token_provider is None else TokenProvider(token_provider)
        self._api_key = api_key
        self._workspace_id = workspace_id
        self._lock = threading.Lock()
        self._refreshing = False
        self._next_try = 0.0
        self._dead: List[str] = []
        #: The runtime token that the platform itself refused last. Written by any thread, without the lock.
        self._rejected: Optional[Secret] = None
        self._has_logged_in = False
        #: Credentials whose grant was of no use, with the generation that it was to replace: they are not used again
        #: while nothing has changed. Used with the store's write lock.
        self._useless: Dict[str, int] = {}
        #: What the last attempt was refused with, for those who ask when nothing is left to try.
        self._refusal: Optional[Tuple[str, Optional[int], Optional[str]]] = None
        #: Told of every grant and when its request was sent (monotonic); called by the renewing thread.
        self.on_grant: Callable[[Grant, float], None] = lambda grant, sent_at: None
        #: Called with the kill switch that an answer carries, by the thread that got it; it must not block.
        self.on_revoked: Callable[[RevokedError], None] = lambda error: None
        store.seed(
            RuntimeCredentials(
                installation_id=config.installation_id,
                runtime_token=config.runtime_token,
                refresh_token=config.refresh_token,
                workspace_id=workspace_id,
            ),
            fingerprint(config.install_token.reveal()) if config.install_token else None,
        )

    def require_a_way(self) -> None:
        """:raises ConfigurationError: nothing is configured that could authenticate."""
        current = self.store.current
        recoverable = current.installation_id is not None and current.refresh_token is not None
        if not (current.runtime_token or recoverable or self._install_token or self._provider or self._api_key):
            raise ConfigurationError(
                "no credentials: give install_token (SEKUIRE_INSTALL_TOKEN), runtime_token (SEKUIRE_RUNTIME_TOKEN), "
                "installation_id with refresh_token (SEKUIRE_INSTALLATION_ID, SEKUIRE_REFRESH_TOKEN), token_provider, "
                "or a credentials_store that holds some"
            )

    def declare(self, capabilities: Sequence[str]) -> None:
        """What a bootstrap says the agent can do."""
        self._capabilities = tuple(capabilities)

    # -- handing out --

    def snapshot(self, deadline: Deadline) -> Snapshot:
        """Credentials with a runtime token that is not known to have expired, renewed where that is due.

        :raises AuthenticationError: no way of authenticating is left.
        :raises TransportError: the platform could not be reached in time, and there is no live token.
        :raises RevokedError: the installation was revoked.
        """
        snapshot = self.store.snapshot
        left = snapshot.time_left()
        if snapshot.credentials.runtime_token is not None:
            if left is None or self._is_fresh(snapshot, left):
                return snapshot
            if left > 0:
                return self._renew_early(snapshot, left, deadline)
        return self._renew(snapshot.generation, deadline)

    def rejected(self, generation: int, deadline: Deadline, *, is_foreign: bool = False) -> Snapshot:
        """Return credentials to use instead of those of ``generation``, which were answered with 401.

        Threads that were refused together cause one renewal. Where the platform refuses at once what it grants, the
        renewal waits; past ``deadline`` it is not begun. Errors as :meth:`snapshot`.

        :param is_foreign: another server sent the 401: it starts a renewal, and condemns nothing.
        """
        snapshot = self.store.snapshot
        if not is_foreign and snapshot.generation == generation:
            self._rejected = snapshot.credentials.runtime_token
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
        body: Union[bytes, None] = None,
        idempotency_key: Optional[str] = None,
        deadline: Deadline,
    ) -> Tuple[Reply, Snapshot]:
        """One call with the runtime token; a 401 is answered by one renewal and one replay.

        :returns: the reply, whatever its status, and the credentials it was made with.
        :raises RevokedError: the answer carries the kill switch.
        """
        if idempotency_key is None and method == "POST":
            # Here, so that the replay has the same one.
            idempotency_key = make_idempotency_key()
        snapshot = self.snapshot(deadline)
        reply = self._send(method, path, body, idempotency_key, deadline, snapshot)
        if not reply.is_success:
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
        """Take the fresh token that a heartbeat's answer may carry."""
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

    def _is_fresh(self, snapshot: Snapshot, left: float) -> bool:
        lifetime = snapshot.lifetime or 0.0
        return left > min(lifetime * _EARLY_SHARE, _EARLY_MOST) * (1.0 - snapshot.jitter)

    def _renew_early(self, snapshot: Snapshot, left: float, deadline: Deadline) -> Snapshot:
        """Renew a token that still works; where that fails, serve it, unless it has ended meanwhile."""
        if not (self._provider or self._can_refresh(snapshot)) or time.monotonic() < self._next_try:
            return snapshot
        if left > min((snapshot.lifetime or 0.0) * _LATE_SHARE, _LATE_MOST):
            self._renew_in_background(snapshot.generation)
            return snapshot
        try:
            return self._try_gently(snapshot.generation, deadline)
        except RevokedError:
            raise
        except SekuireError as error:
            problem = error
        snapshot = self.store.snapshot
        if snapshot.credentials.runtime_token is None or snapshot.time_left() == 0:
            # The try took all that was left. An expired token is never handed out; and that this one way is closed says
            # nothing of the others.
            return self._renew(snapshot.generation, deadline)
        self._postpone(problem)
        return snapshot

    def _renew_in_background(self, generation: int) -> None:
        with self._lock:
            if self._refreshing:
                return
            self._refreshing = True
        is_started = False
        try:
            # Where no thread can be started, the token still lives, and the next caller tries again.
            is_started = spawn(self._background, "sekuire-refresh", generation) is not None
        finally:
            if not is_started:
                self._refreshing = False

    def _background(self, generation: int) -> None:
        try:
            self._try_gently(generation, Deadline(RENEWAL_TIMEOUT))
        except RevokedError as error:
            self.on_revoked(error)
        except SekuireError as error:
            self._postpone(error)
        except Exception:
            self._postpone(None)
            log.exception("renewing the runtime token failed")
        finally:
            self._refreshing = False

    def _postpone(self, error: Optional[SekuireError]) -> None:
        self._next_try = time.monotonic() + RENEWAL_PAUSE * random.uniform(1.0, 1.2)
        if error is not None:
            log.warning("renewing the runtime token failed, the present one still works: %s", error)

    def _renew(self, generation: int, deadline: Deadline) -> Snapshot:
        return self.store.renew(
            generation, lambda snapshot: self._try_all(snapshot, deadline), deadline, (self, "every way")
        )

    def _try_gently(self, generation: int, deadline: Deadline) -> Snapshot:
        return self.store.renew(
            generation, lambda snapshot: self._renew_gently(snapshot, deadline), deadline, (self, "gently")
        )

    def _renew_gently(self, snapshot: Snapshot, deadline: Deadline) -> Renewed:
        """Renewal of a token that still works: only what costs nothing that could not be had again."""
        problem: Optional[AuthenticationError] = None
        self._forget_useless(snapshot)
        if self._provider is None and not self._can_refresh(snapshot):
            # Another's renewal, which this one has waited for, was refused with it.
            raise AuthenticationError("the refresh token has been refused before")
        try:
            return self._provide(snapshot) if self._provider else self._refresh(snapshot, deadline)
        except _Refused as refusal:
            problem = AuthenticationError(refusal.message, refusal.status, refusal.code)
        raise problem

    def _try_all(self, snapshot: Snapshot, deadline: Deadline) -> Renewed:
        refusals: List[_Refused] = []
        self._forget_useless(snapshot)
        for way in self._ways(snapshot, deadline):
            try:
                return way()
            except _Refused as refusal:
                log.warning("%s", refusal.message)
                refusals.append(refusal)
        token = snapshot.credentials.runtime_token
        if token is not None and token != self._rejected and snapshot.time_left() != 0:
            # Whatever became of the renewal, the platform has not refused the token.
            raise TransportError("another server answered 401, and there is nothing to renew the runtime token with")
        if not refusals:
            message = "the platform refused the runtime token, and nothing else was given to authenticate with"
            if token is not None and not self._useless:
                raise AuthenticationError(message, 401)
            if token is None and not self._dead and not self._useless:
                raise TransportError("the credentials_store holds no credentials yet; waiting for them")
            before, status, code = self._refusal or ("the platform refuses them", 401, None)
            raise AuthenticationError(f"every way of authenticating has been refused before: {before}", status, code)
        last = refusals[-1]
        self._refusal = "; ".join(refusal.message for refusal in refusals), last.status, last.code
        raise AuthenticationError(*self._refusal)

    def _ways(self, snapshot: Snapshot, deadline: Deadline) -> List[Callable[[], Renewed]]:
        ways: List[Callable[[], Renewed]] = []
        if self._provider is not None:
            ways.append(lambda: self._provide(snapshot))
        if self._can_refresh(snapshot):
            ways.append(lambda: self._refresh(snapshot, deadline))
        if self._install_token is not None and not self._is_dead(self._install_token):
            ways.append(lambda: self._bootstrap(deadline))
        if self._api_key is not None and not self._is_dead(self._api_key):
            ways.append(lambda: self._recover(snapshot, deadline))
        return ways

    def _can_refresh(self, snapshot: Snapshot) -> bool:
        token = snapshot.credentials.refresh_token
        return snapshot.credentials.installation_id is not None and token is not None and not self._is_dead(token)

    def _is_dead(self, secret: Secret) -> bool:
        mark = fingerprint(secret.reveal())
        return mark in self._dead or mark in self._useless

    def _forget_useless(self, snapshot: Snapshot) -> None:
        self._useless = {mark: used for mark, used in self._useless.items() if used == snapshot.generation}

    def _bury(self, secret: Secret) -> None:
        self._dead = [*self._dead[-7:], fingerprint(secret.reveal())]

    # -- the ways --

    def _provide(self, snapshot: Snapshot) -> Renewed:
        assert self._provider is not None
        token = self._provider.ask()
        if token == self._rejected:
            raise _Refused("token_provider gave the same token that the platform refused")
        credentials = attrs.evolve(snapshot.credentials, runtime_token=token, expires_at=None)
        return Renewed(grant=Grant(credentials=credentials), sent_at=time.monotonic(), sent_wall=time.time())

    def _refresh(self, snapshot: Snapshot, deadline: Deadline) -> Renewed:
        credentials = snapshot.credentials
        assert credentials.installation_id is not None
        assert credentials.refresh_token is not None
        path = self._http.endpoints.path("refresh", installation_id=credentials.installation_id)
        secret = credentials.refresh_token
        body = functools.partial(protocol.refresh_body, secret)
        return self._post("refresh", "the refresh token", path, secret, body, credentials, deadline)

    def _bootstrap(self, deadline: Deadline) -> Renewed:
        secret = self._install_token
        assert secret is not None
        body = functools.partial(
            protocol.bootstrap_body, secret, self._agent_id, self._capabilities, self._runtime_info
        )
        path = self._http.endpoints.path("bootstrap")
        return self._post("bootstrap", "the install token", path, secret, body, None, deadline)

    def _recover(self, snapshot: Snapshot, deadline: Deadline) -> Renewed:
        secret = self._api_key
        assert secret is not None
        workspace_id = self._workspace_id or snapshot.credentials.workspace_id
        body = functools.partial(protocol.recover_body, self._agent_id, workspace_id, self._runtime_info)
        path = self._http.endpoints.path("recover")
        header = functools.partial(protocol.api_key_header, secret)
        return self._post("recover", "the API key", path, secret, body, None, deadline, header)

    def _post(
        self,
        endpoint: str,
        what: str,
        path: str,
        secret: Secret,
        body: Callable[[], bytes],
        previous: Optional[RuntimeCredentials],
        deadline: Deadline,
        credential: Optional[Credential] = None,
    ) -> Renewed:
        holder = self.store.holder(before_spending=endpoint == "bootstrap")
        key = protocol.idempotency_key(endpoint, secret, self._agent_id, holder)

        def attempt() -> Union[Renewed, Exception]:
            timeout = max(deadline.remaining(), 0.001)
            # The same key at every try: a lost answer is repeated, not spent.
            outcome = self._read_answer(
                endpoint,
                what,
                secret,
                previous,
                # Frameworks that validate bodies quote them in their errors.
                self._http.request(
                    "POST", path, body=body, credential=credential, idempotency_key=key, timeout=timeout
                ).without(secret),
                self._http.route.base + path,
            )
            if isinstance(outcome, TransportError):
                raise outcome
            return outcome

        renewed = call(attempt, stop=self._stop, deadline=deadline)
        if isinstance(renewed, Exception):
            raise renewed
        self._has_logged_in = True
        log.info("authenticated with %s as installation %s", what, renewed.grant.credentials.installation_id)
        self.on_grant(renewed.grant, renewed.sent_at)
        return renewed

    def _read_answer(
        self,
        endpoint: str,
        what: str,
        secret: Secret,
        previous: Optional[RuntimeCredentials],
        reply: Reply,
        url: str,
    ) -> Union[Renewed, Exception]:
        """Return what a login's answer brought, or the error it means: a :class:`TransportError` may be tried again.

        Returned, not raised: the traceback would keep this frame, and with it the tokens of the answer.
        """
        found = verdict(endpoint, reply)
        if isinstance(found, Settled):
            try:
                renewed = _renewed_by(reply, previous)
            except protocol.Malformed as error:
                problem = f"{url} did not answer as the contract says ({error})"
                return TransportError(problem) if self._has_answered() else _fatal(problem, reply.status)
            return self._refuse_useless(what, secret, renewed, reply.date) or renewed
        if isinstance(found, Retry):
            problem = f"authenticating with {what} failed for now: {url}: {found.error}"
            if found.is_fatal_at_first and not self._has_answered():
                return _fatal(f"{url} cannot be logged in to: {found.error}", reply.status)
            return TransportError(problem, retry_after=found.delay)
        if isinstance(found, Refused) and not isinstance(found.error, PlanLimitError):
            return self._refuse(what, secret, found, reply.status)
        return found.error

    def _has_answered(self) -> bool:
        """Return True if the platform is known to be at this URL, because it has granted credentials before."""
        current = self.store.current
        return self._has_logged_in or (current.installation_id is not None and current.refresh_token is not None)

    def _refuse_useless(self, what: str, secret: Secret, renewed: Renewed, date: Optional[str]) -> Optional[_Refused]:
        """Return a refusal if the token that was granted has expired, or is the one that the platform refused."""
        credentials = renewed.grant.credentials
        if credentials.runtime_token == self._rejected:
            problem = f"the answer to {what} repeats the runtime token that the platform has refused"
        elif protocol.has_ended(credentials.expires_at, date):
            problem = f"the answer to {what} brought a runtime token that has expired already"
        else:
            return None
        self._useless[fingerprint(secret.reveal())] = self.store.generation
        return _Refused(problem)

    def _refuse(self, what: str, secret: Secret, found: Refused, status: int) -> _Refused:
        if found.is_final:
            self._bury(secret)
        hint = ""
        if what == "the install token" and status in (401, 409, 410):
            hint = (
                "; an install token works once: set SEKUIRE_CREDENTIALS_FILE so that a restart needs none, use one "
                "token per replica, or make it with max_uses"
            )
        elif status == 404:
            hint = "; is api_base_url right, or is an endpoints= override needed?"
        code = found.error.code if isinstance(found.error, APIError) else None
        return _Refused(f"the platform refused {what}: {found.error}{hint}", status, code)


def _fatal(problem: str, status: int) -> AuthenticationError:
    return AuthenticationError(f"{problem}; is api_base_url right, or is an endpoints= override needed?", status)


class TokenProvider:
    """A user's ``token_provider``, asked by any number of threads: one call at a time, whose answer all share.

    The call runs on ``sekuire-token-provider``, because it may hang. The thread ends when the provider returns.
    """

    def __init__(self, function: Callable[[], Union[str, Secret]]) -> None:
        self._function = function
        #: The call in progress.
        self.calls = SingleFlight[Secret]("call of token_provider")

    def ask(self) -> Secret:
        """Return the token that it gives now.

        :raises TransportError: it failed, did not return within 10 s, or no thread can be started to call it.
        """
        flight = self.calls.start(self._call, "sekuire-token-provider")
        if flight is None:
            raise TransportError("token_provider cannot be called now: no new thread can be started")
        if not flight.wait(PROVIDER_TIMEOUT):
            raise TransportError(f"token_provider did not return within {PROVIDER_TIMEOUT:g} s")
        return flight.result()

    def _call(self) -> Secret:
        try:
            return as_secret(self._function(), "token_provider")
        except ConfigurationError as error:
            problem = f"its result {error.problem}"
        except BaseException as error:  # noqa: BLE001
            # Only the type: a user's exception may quote the token.
            problem = type(error).__name__
            log.warning("token_provider raised %s", problem)
        raise TransportError(f"token_provider failed: {problem}")


def bearer_of(snapshot: Snapshot) -> Optional[Credential]:
    """The header of a snapshot's runtime token, built when the request is."""
    token = snapshot.credentials.runtime_token
    return None if token is None else functools.partial(protocol.bearer, token)


def _renewed_by(reply: Reply, previous: Optional[RuntimeCredentials]) -> Renewed:
    """What an answer brought; apart, so that no frame of an error keeps the answer's plain tokens."""
    grant = protocol.decode_grant(reply.json(), reply.date, reply.now, previous)
    return Renewed(grant=grant, sent_at=reply.sent_at, sent_wall=reply.sent_wall)
