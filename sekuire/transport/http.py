"""One bounded HTTP exchange: a ``requests.Session`` without redirects, netrc, cookies or unbounded waits."""

from __future__ import annotations

import http.client
import logging
import os
import socket
import time
from datetime import datetime, timezone
from http.cookiejar import DefaultCookiePolicy
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple, Union
from urllib.parse import urlsplit

import attrs
import requests
import requests.adapters
import requests.structures
import requests.utils
import urllib3.exceptions

from .. import protocol
from ..config import ConnectionConfig, is_loopback
from ..errors import TransportError
from .body import BodyError, read_body

log = logging.getLogger("sekuire.http")

#: Most bytes of a decoded answer to a call.
MAX_ANSWER = 1024 * 1024

#: Gives one header when the request is built, so that no frame outside this module holds the plain text.
Credential = Callable[[], Tuple[str, str]]
Body = Union[bytes, Callable[[], bytes], None]


@attrs.frozen(slots=True)
class Reply:
    """An answer: ``sent_at`` is ``time.monotonic()`` and ``sent_wall`` ``time.time()`` of the request's start."""

    status: int
    headers: Mapping[str, str]
    body: bytes = attrs.field(repr=False)
    sent_at: float
    sent_wall: float

    @property
    def now(self) -> datetime:
        """Our clock when the request was sent."""
        return datetime.fromtimestamp(self.sent_wall, timezone.utc)

    @property
    def date(self) -> Optional[str]:
        return self.headers.get("Date")

    @property
    def is_success(self) -> bool:
        return 200 <= self.status < 300

    def retry_after(self) -> Optional[float]:
        """Seconds of ``Retry-After``, or None."""
        return protocol.retry_after(self.headers.get("Retry-After"), datetime.now(timezone.utc))

    def check(self) -> Reply:
        """This reply, if its status is 2xx.

        :raises APIError: the error the answer means (:func:`sekuire.protocol.decode_error`).
        """
        if self.is_success:
            return self
        error = protocol.decode_error(self.status, self.body, self.retry_after())
        if 300 <= self.status < 400:
            error.message = "the platform answered with a redirect, which is not followed; check api_base_url"
        raise error

    def json(self) -> Any:
        """:raises sekuire.protocol.Malformed: the body is not JSON."""
        return protocol.decode_body(self.body)


class Route:
    """The way to the platform, resolved once: TLS, proxies, base URL. Immutable.

    With ``trust_env`` off, requests leaves netrc alone, which would replace our header, and the environment's CA
    bundle, which would override even ``verify=False``; what is wanted of the environment is read here.
    """

    __slots__ = ("base", "cert", "host", "proxies", "verify")

    def __init__(self, config: ConnectionConfig) -> None:
        parts = urlsplit(config.api_base_url)
        self.base = config.api_base_url
        self.host = parts.netloc
        self.cert = config.client_cert
        self.verify: Union[bool, str] = config.verify
        if config.verify is True:
            bundle = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE")
            if bundle:
                self.verify = bundle
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
        """A session that takes nothing from the environment and keeps no cookies."""
        session = requests.Session()
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
        timeout: Tuple[float, float],
    ) -> requests.Response:
        """Send, and return as soon as the answer's headers are there."""
        prepared = requests.PreparedRequest()
        prepared.method = method
        prepared.url = self.base + path
        prepared.headers = requests.structures.CaseInsensitiveDict(headers)
        prepared.body = body
        prepared.hooks = {"response": []}
        return session.send(
            prepared,
            stream=True,
            timeout=timeout,
            verify=self.verify,
            cert=self.cert,
            proxies=self.proxies,
            allow_redirects=False,
        )


class HttpClient:
    """Calls to the platform, from any number of threads at once; the pool below is requests' own and thread-safe.

    :param pool_size: connections kept open, as many as threads that call.
    """

    def __init__(self, config: ConnectionConfig, *, pool_size: int = 10) -> None:
        self.route = Route(config)
        self.endpoints = config.endpoints
        self._connect_timeout = config.connect_timeout
        self._read_timeout = config.read_timeout
        self._session = self.route.session(
            requests.adapters.HTTPAdapter(pool_connections=1, pool_maxsize=pool_size, max_retries=0)
        )
        self._headers = {
            "User-Agent": protocol.USER_AGENT,
            "Accept": protocol.JSON_TYPE,
            "Accept-Encoding": "identity",
            "Connection": "keep-alive",
        }

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
        """One exchange; any status is a reply.

        :param path: appended to the base URL; begins with ``/``.
        :param body: JSON, or a function that builds it where it holds a token.
        :param timeout: seconds for the whole exchange (default: connect and read timeout together).
        :raises TransportError: no whole answer came; made anew, so that it refers to no request.
        """
        outcome = self._exchange(method, path, body, credential, idempotency_key, timeout)
        if isinstance(outcome, Reply):
            return outcome
        raise outcome

    def close(self) -> None:
        self._session.close()

    def _exchange(
        self,
        method: str,
        path: str,
        body: Body,
        credential: Optional[Credential],
        idempotency_key: Optional[str],
        timeout: Optional[float],
    ) -> Union[Reply, TransportError]:
        # Errors are returned: raised from here, their traceback would keep this frame and with it the token's header.
        headers: Dict[str, str] = dict(self._headers)
        if credential is not None:
            name, value = credential()
            headers[name] = value
        if idempotency_key is not None:
            headers["Idempotency-Key"] = idempotency_key
        data = body() if callable(body) else body
        if data is not None:
            headers["Content-Type"] = protocol.JSON_TYPE
            headers["Content-Length"] = str(len(data))
        elif method not in ("GET", "HEAD"):
            headers["Content-Length"] = "0"
        sent_wall = time.time()
        sent_at = time.monotonic()
        total = timeout if timeout is not None else self._connect_timeout + self._read_timeout
        end = sent_at + total
        limits = (min(self._connect_timeout, total), min(self._read_timeout, total))
        try:
            response = self.route.send(self._session, method, path, headers, data, limits)
        except Exception as error:  # noqa: BLE001
            return describe(error, self.route.host)
        try:
            # One read may still take the read timeout: the last piece is what can run past the end.
            content = read_body(response.raw, MAX_ANSWER, lambda: time.monotonic() > end)
            response.raw.release_conn()
        except Exception as error:  # noqa: BLE001
            response.close()
            return describe(error, self.route.host)
        return Reply(response.status_code, response.headers, content, sent_at, sent_wall)


def describe(error: BaseException, host: str) -> TransportError:
    """A :class:`TransportError` that tells what ``error`` means, holding nothing of its request or its headers."""
    chain = list(_causes(error))
    kinds = tuple(type(one) for one in chain)

    def is_any(*types: type) -> bool:
        return any(issubclass(kind, types) for kind in kinds)

    if isinstance(error, BodyError):
        return TransportError(f"{host}: {error}")
    if is_any(requests.exceptions.SSLError, urllib3.exceptions.SSLError):
        reason = next((one for one in chain if hasattr(one, "verify_message") or hasattr(one, "reason")), None)
        text = getattr(reason, "verify_message", None) or getattr(reason, "reason", None) or "handshake failed"
        return TransportError(f"TLS with {host} failed: {protocol.one_line(str(text))[:200]}", retryable=False)
    if is_any(requests.exceptions.ProxyError, urllib3.exceptions.ProxyError):
        return TransportError(f"cannot reach {host} through the proxy")
    if is_any(requests.exceptions.ConnectTimeout, urllib3.exceptions.ConnectTimeoutError):
        return TransportError(f"connecting to {host} timed out")
    if is_any(requests.exceptions.Timeout, urllib3.exceptions.TimeoutError, socket.timeout):  # noqa: UP041
        return TransportError(f"{host} did not answer in time")
    if is_any(*_UNSENDABLE):
        return TransportError(f"a request to {host} could not be built ({type(error).__name__})", retryable=False)
    system = next((one for one in chain if isinstance(one, OSError) and one.errno and one.strerror), None)
    if system is not None:
        return TransportError(f"cannot reach {host}: {system.strerror}")
    if any("NameResolution" in kind.__name__ or kind.__name__ == "gaierror" for kind in kinds):
        return TransportError(f"cannot reach {host}: its name cannot be resolved")
    if is_any(http.client.HTTPException, urllib3.exceptions.HTTPError, requests.exceptions.RequestException, OSError):
        return TransportError(f"the connection to {host} broke ({kinds[-1].__name__})")
    return TransportError(f"a request to {host} failed ({type(error).__name__})", retryable=False)


_UNSENDABLE = (
    requests.exceptions.InvalidURL,
    requests.exceptions.InvalidHeader,
    requests.exceptions.InvalidSchema,
    requests.exceptions.MissingSchema,
    urllib3.exceptions.LocationParseError,
)


def _causes(error: BaseException) -> List[BaseException]:
    """``error`` and all that it was made from: causes, contexts, ``reason`` and arguments."""
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
