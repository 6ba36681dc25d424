"""Make HTTP calls within bounds: by ``requests``, without redirects, netrc, cookies or unbounded waits."""

from __future__ import annotations

import http.client
import itertools
import os
import secrets
import socket
import ssl
import time
import traceback
from datetime import datetime, timezone
from http.cookiejar import DefaultCookiePolicy
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple, Union, cast
from urllib.parse import urlsplit

import attrs
import requests
import requests.adapters
import requests.structures
import requests.utils
import urllib3
import urllib3.exceptions

from .._internal import fork
from .._internal.logs import get_logger
from ..config import ConnectionConfig, is_loopback
from ..errors import ConfigurationError, TransportError
from ..secret import Secret
from ..wire import protocol
from .answers import ClosedBeforeAnswerError
from .body import BodyError, read_body
from .connections import Adapter
from .echoes import is_shown, without
from .kept import Answer, Kept, Lane, is_plain_target

log = get_logger("sekuire.http")

#: Most bytes of a decoded answer to a call.
MAX_ANSWER = 1024 * 1024

#: Returns one header when the request is built, so that no frame outside this module holds the plain text.
Credential = Callable[[], Tuple[str, str]]
Body = Union[bytes, Callable[[], bytes], None]


@attrs.frozen(slots=True)
class Reply:
    """The answer to a call. ``sent_at`` (monotonic) and ``sent_wall`` (``time.time()``) are when the request began."""

    status: int
    headers: Mapping[str, str]
    body: bytes = attrs.field(repr=False)
    sent_at: float
    sent_wall: float

    @property
    def now(self) -> datetime:
        """The time by our clock when the request was sent."""
        return datetime.fromtimestamp(self.sent_wall, timezone.utc)

    @property
    def date(self) -> Optional[str]:
        """The platform's ``Date`` header."""
        return self.headers.get("Date")

    @property
    def is_success(self) -> bool:
        return 200 <= self.status < 300

    def retry_after(self) -> Optional[float]:
        """Return the seconds of ``Retry-After``, or None."""
        return protocol.retry_after(self.headers.get("Retry-After"), datetime.now(timezone.utc), self.date)

    def check(self) -> Reply:
        """Return this reply if its status is 2xx.

        :raises APIError: the error that the answer means (:func:`sekuire.wire.protocol.decode_error`).
        """
        if self.is_success:
            return self
        error = protocol.decode_error(self.status, self.body, self.retry_after())
        if 300 <= self.status < 400:
            error.message = "the platform answered with a redirect, which is not followed; check api_base_url"
        raise error

    def without(self, secret: Secret) -> Reply:
        """Return this reply. If it is quoted in errors and echoes ``secret``, return a copy without it."""
        if not is_shown(self.status, self.body):
            return self
        return attrs.evolve(self, body=without(secret.reveal(), self.body))

    def json(self) -> Any:
        """Return the decoded body.

        :raises sekuire.wire.protocol.Malformed: it is not JSON.
        """
        return protocol.decode_body(self.body)


class _Session(requests.Session):
    """Follow no redirect.

    Even with ``allow_redirects=False`` requests reads the whole body of a redirect to prepare the next request.
    """

    def get_redirect_target(self, resp: requests.Response) -> None:
        return None


def _environment_bundle() -> Optional[str]:
    for variable in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        path = os.environ.get(variable)
        if path:
            if not os.path.exists(path):
                raise ConfigurationError(f"no such file: {path!r}", "verify", f"environment variable {variable}")
            return path
    return None


class Route:
    """Resolve once how the platform is reached: TLS, proxies, base URL. Immutable.

    requests must not read the environment: netrc would replace our header, and a CA bundle would override even
    ``verify=False``. So ``trust_env`` is off, and this class reads what is wanted of the environment.

    :raises ConfigurationError: the environment names a CA bundle that does not exist.
    """

    __slots__ = ("base", "cert", "host", "proxies", "verify")

    def __init__(self, config: ConnectionConfig) -> None:
        parts = urlsplit(config.api_base_url)
        self.base = config.api_base_url
        self.host = parts.netloc
        self.cert = config.client_cert
        self.verify: Union[bool, str] = config.verify
        if config.verify is True:
            self.verify = _environment_bundle() or True
        elif config.verify is False:
            log.warning("TLS certificates of %s are not verified (verify=False)", self.host)
        if config.proxies is not None:
            self.proxies = dict(config.proxies)
        elif is_loopback(parts.hostname or ""):
            self.proxies = {}
        else:
            self.proxies = dict(requests.utils.get_environ_proxies(self.base))
        if parts.scheme == "http" and not is_loopback(parts.hostname or ""):
            log.warning("tokens travel to %s unencrypted (allow_insecure_http=True)", self.host)

    def session(self, adapter: requests.adapters.HTTPAdapter) -> requests.Session:
        """Return a session that reads nothing from the environment and keeps no cookies."""
        session = _Session()
        session.trust_env = False
        session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
        session.adapters.clear()
        session.mount("https://", adapter)
        session.mount("http://", adapter)
        return session

    def send(
        self,
        session: requests.Session,
        method: str,
        path: str,
        headers: Mapping[str, str],
        body: Optional[bytes],
        timeout: urllib3.Timeout,
    ) -> requests.Response:
        """Send a request. Return as soon as the headers of the answer are there."""
        prepared = requests.PreparedRequest()
        prepared.method = method
        prepared.url = self.base + path
        prepared.headers = requests.structures.CaseInsensitiveDict(headers)
        prepared.body = body
        prepared.hooks = {"response": []}
        try:
            return session.send(
                prepared,
                stream=True,
                timeout=cast(Any, timeout),
                verify=self.verify,
                cert=self.cert,
                proxies=self.proxies,
                allow_redirects=False,
            )
        except Exception as error:
            _close_half_wrapped(error)
            raise


class HttpClient:
    """Call the platform, from any number of threads at once.

    requests makes the first call over a connection. Then the connection is kept, and the next calls go over it directly
    (:mod:`~sekuire.transport.kept`), under the same rules. ::

        http = HttpClient(ConnectionConfig(api_base_url="https://api.sekuire.ai"))
        reply = http.request("GET", "/healthz", timeout=5.0)
        http.close()

    :param pool_size: connections kept open, as many as threads that call.
    """

    def __init__(self, config: ConnectionConfig, *, pool_size: int = 10) -> None:
        self.route = Route(config)
        self.endpoints = config.endpoints
        self._connect_timeout = config.connect_timeout
        self._read_timeout = config.read_timeout
        self._pool_size = pool_size
        self._open()
        fork.reset_in_child(self, HttpClient._open)
        self._prefix = urlsplit(self.route.base).path
        self._headers = {
            "User-Agent": protocol.USER_AGENT,
            "Accept": protocol.JSON_TYPE,
            "Accept-Encoding": "identity",
            "Connection": "keep-alive",
        }
        self._fixed_head = "".join(f"\r\n{name}: {value}" for name, value in self._headers.items())

    def request(
        self,
        method: str,
        path: str,
        *,
        body: Body = None,
        credential: Optional[Credential] = None,
        idempotency_key: Optional[str] = None,
        timeout: Optional[float] = None,
    ) -> Reply:
        """Make one call. Return the answer, whatever its status.

        If a kept connection is closed or reset before any byte of an answer, the request is sent once more over a new
        connection, within the same time.

        :param path: appended to the base URL. It begins with ``/``.
        :param body: JSON, or a function that builds it if it holds a token.
        :param idempotency_key: by default a POST gets one of its own.
        :param timeout: seconds for the whole exchange (default: connect and read timeout together).
        :raises TransportError: no whole answer came. It is a new error, so that it refers to no request.
        """
        outcome = self._exchange(method, path, body, credential, idempotency_key, timeout)
        if isinstance(outcome, Reply):
            return outcome
        raise outcome

    def close(self) -> None:
        """Close the connections. Those of calls in progress are closed when the calls end."""
        self._lane.close()
        self._session.close()

    def _open(self) -> None:
        """Begin without connections. A forked child uses none of its parent's, nor the locks of their pools."""
        self._lane = Lane(self._pool_size)
        self._session = self.route.session(Adapter(self._pool_size, lane=self._lane))

    def _exchange(
        self,
        method: str,
        path: str,
        body: Body,
        credential: Optional[Credential],
        idempotency_key: Optional[str],
        timeout: Optional[float],
    ) -> Union[Reply, TransportError]:
        # Errors are returned. A traceback would keep this frame, and with it the header with the token.
        extra: Dict[str, str] = {}
        value = ""
        if credential is not None:
            name, value = credential()
            extra[name] = value
        if idempotency_key is None and method == "POST":
            idempotency_key = make_idempotency_key()
        if idempotency_key is not None:
            extra["Idempotency-Key"] = idempotency_key
        data = body() if callable(body) else body
        if data is not None:
            extra["Content-Type"] = protocol.JSON_TYPE
            extra["Content-Length"] = str(len(data))
        elif method not in ("GET", "HEAD"):
            extra["Content-Length"] = "0"
        sent_wall = time.time()
        sent_at = time.monotonic()
        end = sent_at + (timeout if timeout is not None else self._connect_timeout + self._read_timeout)
        answer: Optional[Answer] = None
        try:
            kept = self._lane.take()
            if kept is not None and is_plain_target(target := self._prefix + path) and _are_plain(extra):
                answer = self._send_over(kept, method, target, extra, data or b"", end)
            elif kept is not None:
                self._lane.keep(kept)
            if answer is None:
                answer = self._send_new(method, path, extra, data, end)
        except Exception as error:  # noqa: BLE001
            problem = describe(error, self.route.host)
            problem.was_stale = self._lane.emptied_at >= sent_at
            return problem
        status, headers, content = answer
        if credential is not None and is_shown(status, content):
            content = without_header(value, content)
        return Reply(status, headers, content, sent_at, sent_wall)

    def _send_over(
        self, kept: Kept, method: str, target: str, extra: Mapping[str, str], data: bytes, end: float
    ) -> Optional[Answer]:
        """Make the call over a kept connection. Return None if it must be made once more, over a new one."""
        lines = "".join([f"\r\n{name}: {value}" for name, value in extra.items()])
        head = f"{method} {target} HTTP/1.1\r\nHost: {kept.host}{self._fixed_head}{lines}\r\n\r\n".encode("ascii")
        is_reusable = False
        try:
            answer, is_reusable = kept.exchange(
                method, head, data, limit=MAX_ANSWER, patience=self._read_timeout, end=end
            )
        except (OSError, http.client.HTTPException) as error:
            self._lane.empty()
            if not isinstance(error, ClosedBeforeAnswerError) or time.monotonic() >= end:
                raise
            return None
        finally:
            if is_reusable:
                self._lane.keep(kept)
            else:
                kept.close()
        return answer

    def _send_new(self, method: str, path: str, extra: Mapping[str, str], data: Optional[bytes], end: float) -> Answer:
        """Make the call by requests, over a new connection."""
        headers = {**self._headers, **extra}
        try:
            return self._send_by_requests(method, path, headers, data, end)
        except Exception as error:
            # Behind a proxy, urllib3's pool keeps connections. It has dropped them now, so the next one is new.
            was_closed = any(isinstance(one, ClosedBeforeAnswerError) for one in _causes(error))
            if not was_closed or time.monotonic() >= end:
                raise
        return self._send_by_requests(method, path, headers, data, end)

    def _send_by_requests(
        self, method: str, path: str, headers: Mapping[str, str], data: Optional[bytes], end: float
    ) -> Answer:
        left = max(end - time.monotonic(), 0.001)
        limits = urllib3.Timeout(total=left, connect=self._connect_timeout, read=self._read_timeout)
        response = self.route.send(self._session, method, path, headers, data, limits)
        is_reusable = False
        try:
            content = read_body(response.raw, MAX_ANSWER, end)
            is_reusable = getattr(response.raw._fp, "is_in_step", True)
        finally:
            if not is_reusable:
                response.close()
            elif not self._lane.adopt(response.raw, self._read_timeout):
                response.raw.release_conn()
        return Answer(response.status_code, response.headers, content)


class _Keys:
    """Make idempotency keys: a random prefix for each process, and a number."""

    def __init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        """Begin with another prefix, in a forked child too."""
        self._prefix = secrets.token_hex(8)
        self._numbers = itertools.count(1)

    def make(self) -> str:
        return f"{self._prefix}-{next(self._numbers):x}"


_keys = _Keys()
fork.reset_in_child(_keys, _Keys.renew)


def make_idempotency_key() -> str:
    """Return an ``Idempotency-Key`` that no other call has, in this process or another."""
    return _keys.make()


def _are_plain(headers: Mapping[str, str]) -> bool:
    """Return True if no value of ``headers`` could end its line. Others are left to requests, which refuses them."""
    values = "".join(headers.values())
    return values.isascii() and values.isprintable()


def without_header(header: str, content: bytes) -> bytes:
    """Return ``content``, which goes into errors and logs, without the token of ``header``."""
    return without(header.rpartition(" ")[2], content)


def describe(error: BaseException, host: str) -> TransportError:
    """Return a :class:`TransportError` that says what ``error`` means. It refers to no request and no header."""
    chain = list(_causes(error))
    kinds = tuple(type(one) for one in chain)

    def is_any(*types: type) -> bool:
        return any(issubclass(kind, types) for kind in kinds)

    if isinstance(error, BodyError):
        return TransportError(f"{host}: {error}")
    if is_any(ssl.SSLEOFError, ssl.SSLZeroReturnError):
        # The platform has not refused a certificate or a version. The connection ended, as it does when it restarts.
        return TransportError(f"the TLS connection to {host} broke")
    if is_any(requests.exceptions.SSLError, urllib3.exceptions.SSLError, ssl.SSLError):
        return TransportError(f"TLS with {host} failed: {_tls_problem(chain)}", retryable=False)
    if is_any(requests.exceptions.ProxyError, urllib3.exceptions.ProxyError):
        return TransportError(f"cannot reach {host} through the proxy")
    # In some versions of urllib3 a refused connection is a kind of ConnectTimeoutError.
    is_refused = is_any(urllib3.exceptions.NewConnectionError)
    if not is_refused and is_any(requests.exceptions.ConnectTimeout, urllib3.exceptions.ConnectTimeoutError):
        return TransportError(f"connecting to {host} timed out")
    if not is_refused and is_any(requests.exceptions.Timeout, urllib3.exceptions.TimeoutError, socket.timeout):
        return TransportError(f"{host} did not answer in time")
    if is_any(*_UNSENDABLE):
        return TransportError(f"a request to {host} could not be built ({type(error).__name__})", retryable=False)
    system = next((one for one in chain if isinstance(one, OSError) and one.errno and one.strerror), None)
    if system is not None:
        return TransportError(f"cannot reach {host}: {system.strerror}")
    if is_any(http.client.HTTPException, urllib3.exceptions.HTTPError, requests.exceptions.RequestException, OSError):
        return TransportError(f"the connection to {host} broke ({kinds[-1].__name__})")
    return TransportError(f"a request to {host} failed ({type(error).__name__})", retryable=False)


def _close_half_wrapped(error: BaseException) -> None:
    """Close the socket that the ssl module leaves open when the peer resets a connection before it is wrapped.

    The constructor of ``ssl.SSLSocket`` owns the connection by then, and raises without closing it. Only the frames of
    the error refer to that socket.
    """
    for one in _causes(error):
        for frame, _ in traceback.walk_tb(one.__traceback__):
            # The variables of other frames are not read: they may be secrets, and reading them would keep them.
            if frame.f_globals is vars(ssl):
                wrapped = frame.f_locals.get("self")
                if isinstance(wrapped, ssl.SSLSocket):
                    wrapped.close()


def _tls_problem(chain: List[BaseException]) -> str:
    for one in chain:
        # urllib3 1 checks the host's name itself, and has its own error class for that.
        if isinstance(one, ssl.SSLCertVerificationError) or type(one).__name__ == "CertificateError":
            text = protocol.one_line(getattr(one, "verify_message", "") or str(one))[:200]
            return f"{text}; if a CA of your own issued its certificate, name that CA's file with verify="
    reason = next((one for one in chain if isinstance(one, ssl.SSLError)), None)
    text = (reason.reason or str(reason)).replace("_", " ") if reason is not None else ""
    return protocol.one_line(text)[:200] or "the handshake failed"


_UNSENDABLE = (
    requests.exceptions.InvalidURL,
    requests.exceptions.InvalidHeader,
    requests.exceptions.InvalidSchema,
    requests.exceptions.MissingSchema,
    urllib3.exceptions.LocationParseError,
)


def _causes(error: BaseException) -> List[BaseException]:
    """Return ``error`` and all that it was made from: causes, contexts, ``reason`` and arguments."""
    seen: List[BaseException] = []
    pending = [error]
    while pending and len(seen) < 20:
        one = pending.pop(0)
        if any(one is other for other in seen):
            continue
        seen.append(one)
        related = [one.__cause__, one.__context__, getattr(one, "reason", None), *one.args]
        pending += [other for other in related if isinstance(other, BaseException)]
    return seen
