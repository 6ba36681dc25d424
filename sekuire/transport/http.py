"""Make HTTP calls within bounds: by ``requests``, without redirects, netrc, cookies or unbounded waits."""

from __future__ import annotations

import http.client
import itertools
import os
import secrets
from datetime import datetime, timezone
from http.cookiejar import DefaultCookiePolicy
from typing import Any, Callable, Dict, Mapping, Optional, Tuple, Union, cast
from urllib.parse import urlsplit

import attrs
import requests
import requests.adapters
import requests.structures
import urllib3

from .._internal import fork
from .._internal.clock import time
from .._internal.logs import get_logger
from .._internal.scrub import scrub_bytes
from .._internal.values import Value
from ..config import ConnectionConfig, is_loopback
from ..errors import ConfigurationError
from ..secret import Secret, without_frames
from ..wire import protocol
from .answers import ClosedBeforeAnswerError
from .body import read_body
from .connections import Adapter
from .echoes import is_shown, without
from .kept import Answer, Kept, Lane, is_plain_target
from .problems import ProxyFaultError, causes, close_half_wrapped, describe
from .proxies import choose

log = get_logger("sekuire.http")

#: Most bytes of a decoded answer to a call.
MAX_ANSWER = 1024 * 1024

#: Returns one header when the request is built, so that no frame outside this module holds the plain text.
Credential = Callable[[], Tuple[str, str]]
Body = Union[bytes, Callable[[], bytes], None]
#: Most bytes of an answer, the seconds that one read may take, and when all must be done (``time.monotonic()``).
_Limits = Tuple[int, float, float]


@attrs.frozen(slots=True, eq=False, repr=False)
class Reply(Value):
    """Hold the answer to a call. ``sent_at`` (monotonic) and ``sent_wall`` (``time.time()``) say when it began."""

    status: int
    headers: Mapping[str, str] = attrs.field(repr=False)
    body: bytes = attrs.field(repr=False)
    sent_at: float
    sent_wall: float

    @property
    def now(self) -> datetime:
        """Return the time by our clock when the request was sent."""
        return datetime.fromtimestamp(self.sent_wall, timezone.utc)

    @property
    def date(self) -> Optional[str]:
        """Return the platform's ``Date`` header."""
        return self.headers.get("Date")

    @property
    def is_success(self) -> bool:
        return 200 <= self.status < 300

    def retry_after(self) -> Optional[float]:
        """Return the seconds of ``Retry-After``, or None."""
        return protocol.retry_after(self.headers.get("Retry-After"), protocol.utc_now(), self.date)

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


class _UnmockedSession(_Session):
    """Send over the network also while requests-mock replaces these methods of the class above."""

    send = requests.Session.send
    get_adapter = requests.Session.get_adapter


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

    :raises ConfigurationError: the environment names a CA bundle that does not exist, or the proxy cannot be used.
    """

    __slots__ = ("_is_forwarded", "_scheme", "base", "cert", "host", "proxy", "proxy_reason", "verify")

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
        self._scheme = parts.scheme
        choice = choose(self.base, None if config.proxies is None else dict(config.proxies))
        #: The proxy in front of the platform, or None, and why.
        self.proxy, self.proxy_reason = choice.proxy, choice.reason
        # The proxy reads each request and answers itself where it must: there is no tunnel.
        self._is_forwarded = self.proxy is not None and parts.scheme == "http" and not self.proxy.is_socks
        if parts.scheme == "http" and not is_loopback(parts.hostname or ""):
            log.warning("tokens travel to %s unencrypted (allow_insecure_http=True)", self.host)

    def session(self, adapter: Adapter) -> requests.Session:
        """Return a session that reads nothing from the environment and keeps no cookies.

        No mock of requests comes between the library and a platform of this machine, which tests use for real.
        """
        is_local = is_loopback(urlsplit(self.base).hostname or "")
        session = _UnmockedSession() if is_local else _Session()
        if is_local:
            adapter.use_no_mocks()
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
            response = session.send(
                prepared,
                stream=True,
                timeout=cast(Any, timeout),
                verify=self.verify,
                cert=self.cert,
                proxies=self._proxies(),
                allow_redirects=False,
            )
        except Exception as error:
            close_half_wrapped(error)
            raise
        if response.status_code == 407 and self._is_forwarded and self.proxy is not None:
            response.close()
            raise ProxyFaultError.login(self.proxy)
        return response

    def _proxies(self) -> Dict[str, str]:
        """Return the proxy as requests wants it. Of a SOCKS proxy only our connections know."""
        if self.proxy is None or self.proxy.is_socks:
            return {}
        return {self._scheme: self.proxy.url.reveal()}


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
        self._fingerprint = config.device_fingerprint
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
        max_bytes: int = MAX_ANSWER,
        longer: float = 0.0,
    ) -> Reply:
        """Make one call. Return the answer, whatever its status.

        If a kept connection is closed or reset before any byte of an answer, the request is sent once more over a new
        connection, within the same time.

        :param path: appended to the base URL. It begins with ``/``.
        :param body: JSON, or a function that builds it if it holds a token.
        :param idempotency_key: by default a POST gets one of its own.
        :param timeout: seconds for the whole exchange (default: connect and read timeout together).
        :param max_bytes: most bytes of the decoded answer.
        :param longer: seconds that the platform may take before it answers, on top of these times.
        :raises TransportError: no whole answer came. It is a new error, so that it refers to no request.
        """
        outcome = self._exchange(method, path, body, credential, idempotency_key, timeout, (max_bytes, longer))
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
        self._session = self.route.session(Adapter(self._pool_size, proxy=self.route.proxy, lane=self._lane))

    def _exchange(
        self,
        method: str,
        path: str,
        body: Body,
        credential: Optional[Credential],
        idempotency_key: Optional[str],
        timeout: Optional[float],
        answer_limits: Tuple[int, float],
    ) -> Union[Reply, BaseException]:
        # Errors are returned. A traceback would keep the frames below, and with them the header with the token.
        sent_at = time.monotonic()
        max_bytes, longer = answer_limits
        end = sent_at + longer + (timeout if timeout is not None else self._connect_timeout + self._read_timeout)
        limits = (max_bytes, longer + self._read_timeout, end)
        try:
            return self._call(method, path, body, credential, idempotency_key, sent_at, limits)
        except Exception as error:  # noqa: BLE001
            problem = describe(error, self.route.host)
            problem.was_stale = self._lane.emptied_at >= sent_at
            # Over a kept connection it may have arrived. Behind a proxy the pool keeps connections too.
            problem.was_sent = problem.was_sent or problem.was_stale or self.route.proxy is not None
            return problem
        except BaseException as error:  # noqa: BLE001  # Ctrl-C, sys.exit() in a signal handler, a limit of gevent.
            return without_frames(error)

    def _call(
        self,
        method: str,
        path: str,
        body: Body,
        credential: Optional[Credential],
        idempotency_key: Optional[str],
        sent_at: float,
        limits: _Limits,
    ) -> Reply:
        extra: Dict[str, str] = {}
        value = ""
        if credential is not None:
            name, value = credential()
            extra[name] = value
            if self._fingerprint is not None and name == protocol.API_KEY_HEADER:
                extra[protocol.FINGERPRINT_HEADER] = self._fingerprint
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
        answer: Optional[Answer] = None
        kept = self._lane.take()
        if kept is not None and is_plain_target(target := self._prefix + path) and _are_plain(extra):
            answer = self._send_over(kept, method, target, extra, data or b"", limits)
        elif kept is not None:
            self._lane.keep(kept)
        if answer is None:
            answer = self._send_new(method, path, extra, data, limits)
        status, headers, content = answer
        if is_shown(status, content):
            # A proxy may quote its own password.
            content = scrub_bytes(without_header(value, content))
        return Reply(status, headers, content, sent_at, sent_wall)

    def _send_over(
        self, kept: Kept, method: str, target: str, extra: Mapping[str, str], data: bytes, limits: _Limits
    ) -> Optional[Answer]:
        """Make the call over a kept connection. Return None if it must be made once more, over a new one."""
        max_bytes, patience, end = limits
        lines = "".join([f"\r\n{name}: {value}" for name, value in extra.items()])
        head = f"{method} {target} HTTP/1.1\r\nHost: {kept.host}{self._fixed_head}{lines}\r\n\r\n".encode("ascii")
        is_reusable = False
        try:
            answer, is_reusable = kept.exchange(method, head, data, limit=max_bytes, patience=patience, end=end)
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

    def _send_new(
        self, method: str, path: str, extra: Mapping[str, str], data: Optional[bytes], limits: _Limits
    ) -> Answer:
        """Make the call by requests, over a new connection."""
        headers = {**self._headers, **extra}
        try:
            return self._send_by_requests(method, path, headers, data, limits)
        except Exception as error:
            # Behind a proxy, urllib3's pool keeps connections. It has dropped them now, so the next one is new.
            was_closed = any(isinstance(one, ClosedBeforeAnswerError) for one in causes(error))
            if not was_closed or time.monotonic() >= limits[2]:
                raise
        return self._send_by_requests(method, path, headers, data, limits)

    def _send_by_requests(
        self, method: str, path: str, headers: Mapping[str, str], data: Optional[bytes], limits: _Limits
    ) -> Answer:
        max_bytes, patience, end = limits
        left = max(end - time.monotonic(), 0.001)
        timeout = urllib3.Timeout(total=left, connect=self._connect_timeout, read=patience)
        response = self.route.send(self._session, method, path, headers, data, timeout)
        is_reusable = False
        try:
            content = read_body(response.raw, max_bytes, end)
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
