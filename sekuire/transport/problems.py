"""Say what an error of a connection means: at the platform, or at the proxy in front of it."""

from __future__ import annotations

import http.client
import socket
import ssl
import traceback
from typing import List, Optional, Sequence

import requests
import requests.exceptions
import urllib3.exceptions

from .._internal.greenlets import patched_by
from ..errors import TransportError
from ..wire import protocol
from .answers import CLOSED
from .body import BodyError, TooLargeError
from .proxies import Proxy

#: OpenSSL's reasons for bytes that are not TLS.
_NO_TLS = ("WRONG_VERSION_NUMBER", "UNKNOWN_PROTOCOL", "HTTP_REQUEST", "HTTPS_PROXY_REQUEST", "RECORD_LAYER_FAILURE")
#: OpenSSL's reasons for a client without a certificate, or with one that the server does not know.
_CLIENT_CERTIFICATE = (
    "CERTIFICATE_REQUIRED", "ALERT_UNKNOWN_CA", "ALERT_BAD_CERTIFICATE", "ALERT_CERTIFICATE_UNKNOWN",
    "ALERT_CERTIFICATE_EXPIRED", "ALERT_CERTIFICATE_REVOKED",
)  # fmt: skip
# X509_V_ERR_… of OpenSSL.
_NOT_YET_VALID, _EXPIRED = (9,), (10,)
_NO_ISSUER = (2, 18, 19, 20, 21)
_OTHER_NAME = (62, 64)

#: What squid says of a target, with an error code of Linux, and what RFC 9209 lets any proxy say of it
#: (``Proxy-Status: name; error=dns_error``).
_NAME_ERRORS = ("err_dns_fail", "dns_error", "dns_timeout")
_REFUSALS = ("connection_refused", "err_connect_fail 111")


class ProxyFaultError(OSError):
    """Report what failed at the proxy, from below urllib3. ``args[0]`` says what it was, and how to fix it."""

    is_retryable = True

    def __init__(self, text: str, is_retryable: bool = True) -> None:
        super().__init__(text)
        self.is_retryable = is_retryable

    @classmethod
    def login(cls, proxy: Proxy) -> ProxyFaultError:
        """Return the error of a proxy that asks for a user and a password, or rejects them."""
        code = "" if proxy.is_socks else " (407)"
        if proxy.has_login:
            return cls(f"the proxy {proxy} rejected its user and password{code}; check them in {proxy.source}")
        return cls(
            f"the proxy {proxy} asks for a user and a password{code}; write them into {proxy.source}: "
            f"{proxy.scheme}://USER:PASSWORD@HOST:PORT"
        )

    @classmethod
    def forbidden(cls, proxy: Proxy, target: str, code: str) -> ProxyFaultError:
        return cls(
            f"the proxy {proxy} does not allow connections to {target} ({code}); have them allowed there, or list the "
            "host in NO_PROXY if it can be reached directly"
        )

    @classmethod
    def target_refused(cls, proxy: Proxy, target: str) -> ProxyFaultError:
        return cls(
            f"the proxy {proxy} was refused a connection to {target}; check api_base_url, and that the platform runs"
        )

    @classmethod
    def target_unknown(cls, proxy: Proxy, target: str) -> ProxyFaultError:
        return cls(f"the proxy {proxy} cannot resolve the name of {target}; check api_base_url, and the proxy's DNS")

    @classmethod
    def unreachable(cls, proxy: Proxy, target: str, words: str) -> ProxyFaultError:
        return cls(
            f"the proxy {proxy} cannot connect to {target} ({words}); check api_base_url, and that the proxy can "
            "resolve and reach it"
        )


def at_connect(proxy: Proxy, error: Exception) -> ProxyFaultError:
    """Return what it means that no connection to the proxy could be made."""
    if isinstance(error, socket.gaierror):
        return ProxyFaultError(
            f"the name of the proxy {proxy} cannot be resolved ({error.strerror}); check it in {proxy.source}"
        )
    if isinstance(error, socket.timeout):
        return ProxyFaultError(
            f"connecting to the proxy {proxy} timed out; check its address in {proxy.source}, and the network"
        )
    if isinstance(error, ConnectionRefusedError):
        return ProxyFaultError(
            f"the proxy {proxy} refuses connections; check that it runs, and its address in {proxy.source}"
        )
    words = getattr(error, "strerror", None) or type(error).__name__
    return ProxyFaultError(f"the proxy {proxy} cannot be reached ({words}); check its address in {proxy.source}")


def at_tls(proxy: Proxy, error: Exception) -> ProxyFaultError:
    """Return what it means that TLS with the proxy failed."""
    chain = causes(error)
    if _is_any(chain, socket.timeout):
        return ProxyFaultError(
            f"the proxy {proxy} did not answer in TLS in time; check in {proxy.source} that it is an HTTPS proxy"
        )
    is_tls = _is_any(chain, *_TLS_ERRORS) or any(_is_about_name(one) for one in chain)
    if _is_any(chain, *CLOSED) or not is_tls:
        return ProxyFaultError(
            f"the proxy {proxy} broke the TLS connection; check in {proxy.source} that it is an HTTPS proxy"
        )
    problem = tls_problem(
        chain, f"the proxy {proxy}", f"write http:// in {proxy.source}", f"the host in {proxy.source}"
    )
    return ProxyFaultError(f"TLS with the proxy {proxy} failed: {problem}", is_retryable=False)


def at_tunnel(proxy: Proxy, target: str, status: int, headers: http.client.HTTPMessage) -> ProxyFaultError:
    """Return what it means that the proxy answered ``status`` when it was asked to connect to ``target``."""
    if status == 407:
        return ProxyFaultError.login(proxy)
    if status in (401, 403):
        return ProxyFaultError.forbidden(proxy, target, str(status))
    details = " ".join([headers.get("X-Squid-Error") or "", headers.get("Proxy-Status") or ""]).lower()
    if any(word in details for word in _NAME_ERRORS):
        return ProxyFaultError.target_unknown(proxy, target)
    if any(word in details for word in _REFUSALS):
        return ProxyFaultError.target_refused(proxy, target)
    if status >= 500 and status != 501:
        return ProxyFaultError.unreachable(proxy, target, str(status))
    return ProxyFaultError(
        f"the proxy {proxy} did not accept CONNECT to {target} ({status}); check in {proxy.source} that it is an "
        "HTTP proxy, and that it may connect to this port"
    )


def at_answer(proxy: Proxy, target: str, error: Exception) -> Optional[ProxyFaultError]:
    """Return what it means that the proxy's answer could not be read. None: nothing of its own."""
    if isinstance(error, socket.timeout):
        return ProxyFaultError(
            f"the proxy {proxy} did not connect to {target} in time; check that it can resolve and reach it"
        )
    if not isinstance(error, (http.client.HTTPException, *CLOSED)):
        return None
    what = "closed the connection without an answer" if isinstance(error, CLOSED) else "did not answer in HTTP"
    return ProxyFaultError(
        f"the proxy {proxy} {what}; check the scheme in {proxy.source}: http:// or https:// for an HTTP proxy without "
        "or with TLS, socks5h:// for a SOCKS proxy"
    )


#: No connection was made.
_BEFORE_SENDING = (
    urllib3.exceptions.NewConnectionError, urllib3.exceptions.ConnectTimeoutError, requests.exceptions.ConnectTimeout,
)  # fmt: skip
_TLS_ERRORS = (requests.exceptions.SSLError, urllib3.exceptions.SSLError, ssl.SSLError, ssl.CertificateError)


def describe(error: BaseException, host: str) -> TransportError:
    """Return a :class:`TransportError` that says what ``error`` means. It refers to no request and no header."""
    chain = causes(error)
    problem = _describe(error, chain, host)
    problem.was_sent = not _is_any(chain, *_BEFORE_SENDING)
    return problem


def _describe(error: BaseException, chain: List[BaseException], host: str) -> TransportError:
    if isinstance(error, BodyError):
        unread = TransportError(f"{host}: {error}")
        unread.is_too_large = isinstance(error, TooLargeError)
        return unread
    fault = next((one for one in chain if isinstance(one, ProxyFaultError)), None)
    if fault is not None:
        return TransportError(f"cannot reach {host}: {fault}", retryable=fault.is_retryable)
    if _is_any(chain, ssl.SSLEOFError, ssl.SSLZeroReturnError):
        # The platform has not refused a certificate or a version. The connection ended, as it does when it restarts.
        return TransportError(f"the TLS connection to {host} broke")
    if _is_any(chain, *_TLS_ERRORS):
        problem = tls_problem(chain, host, "check the port, or use http://", "the host in api_base_url")
        return TransportError(f"TLS with {host} failed: {problem}", retryable=False)
    # In some versions of urllib3 a refused connection is a kind of ConnectTimeoutError.
    is_refused = _is_any(chain, urllib3.exceptions.NewConnectionError)
    if not is_refused and _is_any(chain, requests.exceptions.ConnectTimeout, urllib3.exceptions.ConnectTimeoutError):
        return TransportError(f"connecting to {host} timed out")
    if not is_refused and _is_any(chain, requests.exceptions.Timeout, urllib3.exceptions.TimeoutError, socket.timeout):
        return TransportError(f"{host} did not answer in time")
    if _is_any(chain, *_UNSENDABLE):
        return TransportError(f"a request to {host} could not be built ({type(error).__name__})", retryable=False)
    if _is_any(chain, requests.exceptions.ProxyError, urllib3.exceptions.ProxyError):
        return TransportError(f"cannot reach {host} through the proxy ({type(chain[-1]).__name__})")
    system = next((one for one in chain if isinstance(one, OSError) and one.errno and one.strerror), None)
    if system is not None:
        return TransportError(f"cannot reach {host}: {system.strerror}")
    if any(isinstance(one, http.client.BadStatusLine) and not isinstance(one, CLOSED) for one in chain):
        return TransportError(f"{host} did not answer in HTTP; if it expects TLS there, use https://")
    if _is_any(chain, http.client.IncompleteRead):
        return TransportError(f"the connection to {host} was closed in the middle of an answer")
    if _is_any(
        chain,
        http.client.HTTPException,
        urllib3.exceptions.HTTPError,
        requests.exceptions.RequestException,
        OSError,
    ):
        return TransportError(f"the connection to {host} broke ({type(chain[-1]).__name__})")
    library = patched_by()
    if library is not None and isinstance(error, RecursionError):
        return TransportError(
            f"TLS with {host} cannot work: {library} has patched ssl after requests was imported; "
            f"patch in the program's first lines, before any other import",
            retryable=False,
        )
    return TransportError(f"a request to {host} failed ({type(error).__name__})", retryable=False)


def close_half_wrapped(error: BaseException) -> None:
    """Close the socket that the ssl module leaves open when the peer resets a connection before it is wrapped.

    The constructor of ``ssl.SSLSocket`` owns the connection by then, and raises without closing it. Only the frames of
    the error refer to that socket.
    """
    for one in causes(error):
        for frame, _ in traceback.walk_tb(one.__traceback__):
            # The variables of other frames are not read: they may be secrets, and reading them would keep them.
            if frame.f_globals is vars(ssl):
                wrapped = frame.f_locals.get("self")
                if isinstance(wrapped, ssl.SSLSocket):
                    wrapped.close()


def tls_problem(chain: Sequence[BaseException], subject: str, without_tls: str, name: str) -> str:
    """Return what is wrong with TLS, and how to fix it.

    :param subject: who was spoken to.
    :param without_tls: what to do if it does not speak TLS.
    :param name: where its name is set.
    """
    for one in chain:
        code = getattr(one, "verify_code", None)
        is_name = _is_about_name(one)
        if isinstance(one, ssl.SSLCertVerificationError) or is_name:
            text = protocol.one_line(getattr(one, "verify_message", "") or str(one))[:200]
            return text + _advice(code, is_name, subject, name)
    reason = next((one for one in chain if isinstance(one, ssl.SSLError)), None)
    text = (reason.reason or str(reason)) if reason is not None else ""
    if any(word in text for word in _NO_TLS):
        return f"{subject} does not speak TLS on this port; {without_tls}"
    advice = ""
    if any(word in text for word in _CLIENT_CERTIFICATE):
        advice = "; it asks for a certificate of yours that it knows: check client_cert="
    return (protocol.one_line(text.replace("_", " "))[:200] or "the handshake failed") + advice


def _is_about_name(error: BaseException) -> bool:
    """Return True if ``error`` says that a certificate is for another host."""
    # urllib3 1 checks the host's name itself, and has its own error class for that.
    return type(error).__name__ == "CertificateError" or getattr(error, "verify_code", None) in _OTHER_NAME


def _advice(code: Optional[int], is_name: bool, subject: str, name: str) -> str:
    if is_name:
        return f"; check {name}: the certificate must name it"
    if code in _EXPIRED:
        return f"; have the certificate of {subject} renewed, or set the clock of this machine"
    if code in _NOT_YET_VALID:
        return "; set the clock of this machine"
    if code in _NO_ISSUER:
        return "; if a CA of your own issued its certificate, name that CA's file with verify= or REQUESTS_CA_BUNDLE"
    return ""


_UNSENDABLE = (
    requests.exceptions.InvalidURL,
    requests.exceptions.InvalidHeader,
    requests.exceptions.InvalidSchema,
    requests.exceptions.MissingSchema,
    urllib3.exceptions.LocationParseError,
)


def _is_any(chain: Sequence[BaseException], *kinds: type) -> bool:
    return any(isinstance(one, kinds) for one in chain)


def causes(error: BaseException) -> List[BaseException]:
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
