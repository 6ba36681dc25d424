"""Get a runtime token by the login methods, in their order, and remember which of them are refused."""

# Threads: any thread may call a TokenProvider, whose calls run on `sekuire-token-provider`. A Login renews inside
# `RuntimeCredentialsStore.renew`, so one thread at a time does, under the store's write lock.

from __future__ import annotations

import functools
import threading
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import attrs

from .._internal.clock import time
from .._internal.logs import get_logger
from .._internal.single_flight import SingleFlight
from .._internal.threads import Deadline
from ..config import AgentConfig
from ..errors import APIError, AuthenticationError, ConfigurationError, PlanLimitError, TransportError
from ..secret import Secret, as_secret
from ..transport.http import Credential, HttpClient, Reply
from ..transport.reach import Reach
from ..transport.retry import call
from ..wire import protocol
from ..wire.models import Grant, RuntimeCredentials
from ..wire.verdict import NotThePlatform, Refused, Retry, Settled, verdict
from .store import Renewed, RuntimeCredentialsStore, Snapshot, fingerprint

log = get_logger("sekuire.credentials")

#: Seconds a call of ``token_provider`` may take.
PROVIDER_TIMEOUT = 10.0
#: Seconds a renewal may take, all its retries together.
RENEWAL_TIMEOUT = 30.0

#: Fingerprints of refused secrets that are remembered.
_MOST_REFUSED = 8
#: What the advice for a used-up install token names, in the platform's words or in ours.
_ADVICE = "SEKUIRE_CREDENTIALS_FILE"
_CHECK_URL = "is api_base_url right, or is an endpoints= override needed?"


_BY_PLATFORM = "the platform refused "


class _MethodRefused(Exception):
    """Report that the platform refused one login method. The next one is tried."""

    def __init__(
        self,
        message: str,
        status: Optional[int] = None,
        code: Optional[str] = None,
        *,
        what: str = "",
        problem: str = "",
    ) -> None:
        super().__init__(message)
        #: The credential, and what the platform said of it.
        self.what = what
        self.problem = problem
        self.message = message
        self.status = status
        self.code = code


class Login:
    """Get a runtime token, by the first login method that works.

    The methods, in their order, are ``token_provider``; ``installation_id`` with ``refresh_token``; the install token;
    and, where an ``api_key`` was given, recovery with it. The tokens of ``config`` are put into ``store``. ::

        login = Login(config, http, store, stop=threading.Event(), runtime_info={})
        store.renew(store.generation, lambda snapshot: login.renew(snapshot, deadline), deadline)

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
        #: What a bootstrap says the agent can do.
        self.capabilities: Sequence[str] = config.capabilities
        #: Called by the renewing thread with every grant and when its request was sent (monotonic).
        self.on_grant: Callable[[Grant, float], None] = lambda grant, sent_at: None
        self.store = store
        self.http = http
        #: Ends every wait of a login when it is set.
        self.stop = stop
        #: Says that the platform cannot be reached, once for all that share this login.
        self.reach = Reach(http.route.base)
        self._agent_id = config.agent_id
        self._install_token = config.install_token
        self._installation_id = config.installation_id
        self._runtime_info = runtime_info
        self.token_provider = token_provider
        self._api_key = api_key
        self._workspace_id = workspace_id
        self._has_logged_in = False
        #: False while a token is renewed that still works: then a failure is not an outage.
        self._is_waited_for = True
        #: The runtime token that the platform itself refused last. Written by any thread, without a lock.
        self._rejected: Optional[Secret] = None
        #: Fingerprints of secrets that the platform has refused permanently.
        self._refused: List[str] = []
        #: Fingerprints of secrets whose grant was of no use, with the generation that it was to replace. They are not
        #: used again while nothing has changed.
        self._useless: Dict[str, int] = {}
        #: What the last attempt was refused with, for those who ask when nothing is left to try.
        self._last_refusal: Optional[Tuple[str, Optional[int], Optional[str]]] = None
        store.seed(
            RuntimeCredentials(
                installation_id=config.installation_id,
                runtime_token=config.runtime_token,
                refresh_token=config.refresh_token,
                workspace_id=workspace_id,
            ),
            fingerprint(config.install_token.reveal()) if config.install_token else None,
            config.agent_id,
        )

    def is_possible(self) -> bool:
        """Return True if there is anything to log in with."""
        current = self.store.current
        has_refresh = current.installation_id is not None and current.refresh_token is not None
        return bool(has_refresh or self._install_token or self.token_provider or self._api_key)

    def can_renew_early(self, snapshot: Snapshot) -> bool:
        """Return True if a token that still works can be renewed without spending anything."""
        return self.token_provider is not None or self._can_refresh(snapshot)

    def note_rejected(self, token: Optional[Secret]) -> None:
        """Note that the platform itself refused ``token``. Any thread."""
        self._rejected = token

    def renew_early(self, snapshot: Snapshot, deadline: Deadline) -> Renewed:
        """Renew a token that still works, by the methods that spend nothing.

        :raises AuthenticationError: the platform refused.
        """
        problem: Optional[AuthenticationError] = None
        self._forget_useless(snapshot)
        self._is_waited_for = False
        if not self.can_renew_early(snapshot):
            # Another thread's renewal, which this one has waited for, was refused with the refresh token.
            raise AuthenticationError("the refresh token has been refused before")
        try:
            if self.token_provider:
                return self._provide(snapshot)
            # A refresh rotates the refresh token. While there is time, it waits until the new one can be stored.
            return self._refresh(snapshot, deadline, is_spending=True)
        except _MethodRefused as refusal:
            problem = AuthenticationError(refusal.message, refusal.status, refusal.code)
        raise problem

    def renew(self, snapshot: Snapshot, deadline: Deadline) -> Renewed:
        """Get a token by the first method that works.

        :raises AuthenticationError: the platform refused every method.
        :raises TransportError: a method failed in a way that may pass, and ``deadline`` came.
        """
        refusals: List[_MethodRefused] = []
        self._forget_useless(snapshot)
        self._is_waited_for = True
        for method in self._methods(snapshot, deadline):
            try:
                renewed = method()
            except _MethodRefused as refusal:
                refusals.append(refusal)
            else:
                # If none works, the error that is raised names them all.
                for one in refusals:
                    log.warning("%s; another login method was accepted", one.message)
                self.reach.log_in()
                return renewed
        token = snapshot.credentials.runtime_token
        if token is not None and token != self._rejected and snapshot.time_left() != 0:
            # Whatever came of the renewal, the platform has not refused the token.
            raise TransportError("another server answered 401, and there is nothing to renew the runtime token with")
        if not refusals:
            message = "the platform refused the runtime token, and nothing else was given to authenticate with"
            if token is not None and not self._useless and self._last_refusal is None:
                raise AuthenticationError(message, 401)
            if token is None and not self._refused and not self._useless:
                raise TransportError("the credentials_store holds no credentials yet; waiting for them")
            before, status, code = self._last_refusal or ("the platform refuses the credentials", 401, None)
            raise AuthenticationError(before, status, code)
        last = refusals[-1]
        self._last_refusal = _joined(refusals), last.status, last.code
        raise AuthenticationError(*self._last_refusal)

    # -- which methods are left --

    def _methods(self, snapshot: Snapshot, deadline: Deadline) -> List[Callable[[], Renewed]]:
        methods: List[Callable[[], Renewed]] = []
        if self.token_provider is not None:
            methods.append(lambda: self._provide(snapshot))
        if self._can_refresh(snapshot):
            methods.append(lambda: self._refresh(snapshot, deadline))
        if self._install_token is not None and not self._is_refused(self._install_token):
            methods.append(lambda: self._bootstrap(deadline))
        if self._api_key is not None and not self._is_refused(self._api_key):
            methods.append(lambda: self._recover(snapshot, deadline))
        return methods

    def _can_refresh(self, snapshot: Snapshot) -> bool:
        token = snapshot.credentials.refresh_token
        return snapshot.credentials.installation_id is not None and token is not None and not self._is_refused(token)

    def _is_refused(self, secret: Secret) -> bool:
        mark = fingerprint(secret.reveal())
        return mark in self._refused or mark in self._useless

    def _forget_useless(self, snapshot: Snapshot) -> None:
        self._useless = {mark: used for mark, used in self._useless.items() if used == snapshot.generation}

    # -- the methods --

    def _provide(self, snapshot: Snapshot) -> Renewed:
        assert self.token_provider is not None
        token = self.token_provider.ask()
        if token == self._rejected:
            raise _MethodRefused("token_provider gave the same token that the platform refused")
        credentials = attrs.evolve(snapshot.credentials, runtime_token=token, expires_at=None)
        return Renewed(grant=Grant(credentials=credentials), sent_at=time.monotonic(), sent_wall=time.time())

    def _refresh(self, snapshot: Snapshot, deadline: Deadline, *, is_spending: bool = False) -> Renewed:
        credentials = snapshot.credentials
        assert credentials.installation_id is not None
        assert credentials.refresh_token is not None
        path = self.http.endpoints.path("refresh", installation_id=credentials.installation_id)
        secret = credentials.refresh_token
        body = functools.partial(protocol.refresh_body, secret)
        return self._post(
            "refresh", "the refresh token", path, secret, body, credentials, deadline, is_spending=is_spending
        )

    def _bootstrap(self, deadline: Deadline) -> Renewed:
        secret = self._install_token
        assert secret is not None
        if self.store.is_read_only:
            raise _MethodRefused(
                "the install token is not used, because the credentials file cannot be written and a restart would "
                "need another token; give a file that can be written, or no file"
            )
        body = functools.partial(protocol.bootstrap_body, secret, self._agent_id, self.capabilities, self._runtime_info)
        endpoints = self.http.endpoints
        if endpoints.bootstrap_names_installation:
            path = endpoints.path("bootstrap", installation_id=self._installation_id or "")
        else:
            path = endpoints.path("bootstrap")
        return self._post("bootstrap", "the install token", path, secret, body, None, deadline, is_spending=True)

    def _recover(self, snapshot: Snapshot, deadline: Deadline) -> Renewed:
        secret = self._api_key
        assert secret is not None
        workspace_id = self._workspace_id or snapshot.credentials.workspace_id
        body = functools.partial(protocol.recover_body, self._agent_id, workspace_id, self._runtime_info)
        path = self.http.endpoints.path("recover")
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
        *,
        is_spending: bool = False,
    ) -> Renewed:
        holder = self.store.holder(before_spending=what if is_spending else None)
        key = protocol.idempotency_key(endpoint, secret, self._agent_id, holder)

        def attempt() -> Union[Renewed, Exception]:
            timeout = max(deadline.remaining(), 0.001)
            outcome: Union[Renewed, Exception]
            try:
                # The same key at every try: a lost answer is repeated, not spent.
                reply = self.http.request(
                    "POST", path, body=body, credential=credential, idempotency_key=key, timeout=timeout
                )
            except TransportError as error:
                outcome = error
            else:
                # Frameworks that validate bodies quote them in their errors.
                outcome = self._read_answer(
                    endpoint, what, secret, previous, reply.without(secret), self.http.route.base + path
                )
            if isinstance(outcome, TransportError):
                if outcome.retryable and self._is_waited_for:
                    # At once: the tries may go on for half a minute.
                    self.reach.note(outcome)
                raise outcome
            return outcome

        renewed = call(attempt, stop=self.stop, deadline=deadline)
        if isinstance(renewed, Exception):
            raise renewed
        self._has_logged_in = True
        log.info("authenticated with %s as installation %s", what, renewed.grant.credentials.installation_id)
        if renewed.grant.install_token_uses_left == 0 and not self.store.has_file:
            log.warning(
                "the install token is used up, and the credentials are in memory only: a restart needs another token; "
                "set SEKUIRE_CREDENTIALS_FILE, or give credentials_store a RuntimeCredentialsStore with a path"
            )
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
        """Return what a login's answer brought, or the error it means. After a :class:`TransportError`, retry.

        The error is returned, because a traceback would keep this frame, and with it the tokens of the answer.
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
                if isinstance(found, NotThePlatform):
                    return _fatal(found.as_other_server(url), reply.status)
                return _fatal(f"{url} cannot be logged in to: {found.error}", reply.status)
            return TransportError(problem, retry_after=found.delay)
        if isinstance(found, Refused) and not isinstance(found.error, PlanLimitError):
            return self._refuse(what, secret, found, reply.status)
        return found.error

    def _has_answered(self) -> bool:
        """Return True if the platform is known to be at this URL, because it has granted credentials before."""
        current = self.store.current
        return self._has_logged_in or (current.installation_id is not None and current.refresh_token is not None)

    def _refuse_useless(
        self, what: str, secret: Secret, renewed: Renewed, date: Optional[str]
    ) -> Optional[_MethodRefused]:
        """Return a refusal if the token that was granted has expired, or is the one that the platform refused."""
        credentials = renewed.grant.credentials
        if credentials.runtime_token == self._rejected:
            problem = f"the answer to {what} repeats the runtime token that the platform has refused"
        elif protocol.has_ended(credentials.expires_at, date):
            problem = f"the answer to {what} brought a runtime token that has expired already"
        else:
            return None
        self._useless[fingerprint(secret.reveal())] = self.store.generation
        return _MethodRefused(problem)

    def _refuse(self, what: str, secret: Secret, found: Refused, status: int) -> _MethodRefused:
        if found.is_final:
            self._refused = [*self._refused, fingerprint(secret.reveal())][-_MOST_REFUSED:]
        hint = ""
        code = found.error.code if isinstance(found.error, APIError) else None
        if code == protocol.CODE_WRONG_AGENT:
            hint = f"; here agent_id is {self._agent_id!r}"
        elif code == protocol.CODE_UNKNOWN_INSTALL_TOKEN:
            hint = "; make a new one, and set SEKUIRE_CREDENTIALS_FILE so that restarts need none"
        elif what == "the install token" and status in (401, 409, 410) and _ADVICE not in str(found.error):
            hint = (
                "; an install token works once: set SEKUIRE_CREDENTIALS_FILE so that a restart needs none, use one "
                "token per replica, or make it with max_uses"
            )
        elif status == 404:
            hint = f"; {_CHECK_URL}"
        problem = str(found.error)
        return _MethodRefused(f"{_BY_PLATFORM}{what}: {problem}{hint}", status, code, what=what, problem=problem)


def _joined(refusals: Sequence[_MethodRefused]) -> str:
    """Return one sentence for all refusals of a login. What to do about it is said once, for the last method."""
    *others, last = refusals
    if not others or not all(one.problem for one in refusals):
        return "; ".join(one.message for one in refusals)
    # Not each platform's sentence: as a rule all are refused for one cause, and the last one names it.
    named = ", ".join(f"{one.what} ({one.problem.partition('; ')[0]})" for one in others)
    return f"{_BY_PLATFORM}{named} and {last.message[len(_BY_PLATFORM) :]}"


def _fatal(problem: str, status: int) -> AuthenticationError:
    return AuthenticationError(f"{problem}; {_CHECK_URL}", status)


class TokenProvider:
    """Ask a user's ``token_provider`` for a token: one call at a time, whose answer all threads share.

    The call runs on ``sekuire-token-provider``, because it may hang. The thread ends when the provider returns.
    """

    def __init__(self, token_provider: Callable[[], Union[str, Secret]]) -> None:
        self._token_provider = token_provider
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
            return as_secret(self._token_provider(), "token_provider")
        except ConfigurationError as error:
            problem = f"its result {error.problem}"
        except BaseException as error:  # noqa: BLE001
            # Only the type: a user's exception may quote the token.
            problem = type(error).__name__
            log.warning("token_provider raised %s", problem)
        raise TransportError(f"token_provider failed: {problem}")


def bearer_of(snapshot: Snapshot) -> Optional[Credential]:
    """Return a function that builds the header of a snapshot's runtime token. Return None if it has no token."""
    token = snapshot.credentials.runtime_token
    return None if token is None else functools.partial(protocol.bearer, token)


def _renewed_by(reply: Reply, previous: Optional[RuntimeCredentials]) -> Renewed:
    """Return what an answer brought. A function of its own, so that no frame of an error keeps the plain tokens."""
    grant = protocol.decode_grant(reply.json(), reply.date, reply.now, previous)
    return Renewed(grant=grant, sent_at=reply.sent_at, sent_wall=reply.sent_wall)
