"""Classify what came back from the platform, for every endpoint (docs/protocol.md, "Whose answer is it?").

Everything that talks to the platform asks :func:`verdict` what an answer means, and reads no status itself. Pure: no
I/O, no state but that of :class:`Support`.

An answer is a verdict only in the platform's form. A success must be a JSON object, and an error a JSON object with
``error``, ``code`` or ``message``. Everything else comes from something in between, such as an ingress, a captive
portal or a maintenance page. It is :class:`NotThePlatform`, a kind of :class:`Retry`.
"""

from __future__ import annotations

import re
import threading
from typing import Any, Dict, FrozenSet, Mapping, Optional, Protocol, Tuple, Union

from ..errors import APIError, RevokedError, SekuireError, StreamError, TransportError
from . import protocol

__all__ = [
    "Dropped",
    "Later",
    "NotThePlatform",
    "Refused",
    "Retry",
    "Revoked",
    "Settled",
    "Substitute",
    "Support",
    "Unauthorized",
    "Unsupported",
    "Verdict",
    "verdict",
]

#: How many answers in a row that are not the platform's switch an optional endpoint off.
FOREIGN_ANSWERS = 3


class Answer(Protocol):
    """Describe what :func:`verdict` reads of an answer. It never reads the body of an open stream."""

    @property
    def status(self) -> int: ...

    @property
    def headers(self) -> Mapping[str, str]: ...

    @property
    def body(self) -> bytes: ...

    def retry_after(self) -> Optional[float]: ...


# Plain classes, because attrs takes longer to make them than this module takes to load.


class Settled:
    """Go on: the platform has done what was asked. For a policy with status 404: the workspace has none."""

    __slots__ = ()


class Failed:
    """Share ``error`` between all verdicts except :class:`Settled`. It says what came, and can be logged or raised."""

    __slots__ = ("error",)

    def __init__(self, error: SekuireError) -> None:
        self.error = error

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.error!r})"


class Retry(Failed):
    """Send the same again after a backoff, and not before ``delay`` seconds (``Retry-After``).

    ``is_fatal_at_first``: the answer ends a login or a stream that has never succeeded with this URL.
    """

    __slots__ = ("delay", "is_fatal_at_first")

    def __init__(self, error: SekuireError, delay: float = 0.0, is_fatal_at_first: bool = False) -> None:
        super().__init__(error)
        self.delay = delay
        self.is_fatal_at_first = is_fatal_at_first


class NotThePlatform(Retry):
    """Send the same again, because another server answered. Nothing else follows from its answer.

    ``says`` is what it answered, in a few words.
    """

    __slots__ = ("says",)

    def __init__(
        self, error: SekuireError, delay: float = 0.0, is_fatal_at_first: bool = False, says: str = ""
    ) -> None:
        super().__init__(error, delay, is_fatal_at_first)
        self.says = says

    def as_other_server(self, url: str) -> str:
        """Return the sentence for a first call that another server answered."""
        return f"that is another server: {url} answered {self.says or self.error}"


class Later(Failed):
    """Keep what was sent and try again slowly, because repeating is unlikely to help."""

    __slots__ = ()


class Substitute(Failed):
    """Send the failure ``code`` in place of what the platform refused (for audit events: send less)."""

    __slots__ = ("code",)

    def __init__(self, error: SekuireError, code: str = "") -> None:
        super().__init__(error)
        self.code = code


class Unsupported(Failed):
    """Do without this optional endpoint: the platform does not offer it. ``is_foreign``: another server says so."""

    __slots__ = ("is_foreign",)

    def __init__(self, error: SekuireError, is_foreign: bool = False) -> None:
        super().__init__(error)
        self.is_foreign = is_foreign


class Dropped(Failed):
    """Drop what was sent: the platform will not want it later. ``is_superseded``: another worker's result counts."""

    __slots__ = ("is_superseded",)

    def __init__(self, error: SekuireError, is_superseded: bool = False) -> None:
        super().__init__(error)
        self.is_superseded = is_superseded


class Unauthorized(Failed):
    """Renew the refused credentials. Then send again, not before ``delay`` seconds have passed.

    ``is_foreign``: another server refused them. That is never final, however often it happens.
    """

    __slots__ = ("delay", "is_foreign")

    def __init__(self, error: SekuireError, is_foreign: bool = False, delay: float = 0.0) -> None:
        super().__init__(error)
        self.is_foreign = is_foreign
        self.delay = delay


class Refused(Failed):
    """Give up: the platform refused, and repeating cannot help. ``is_final``: the credentials sent are invalid."""

    __slots__ = ("is_final",)

    def __init__(self, error: SekuireError, is_final: bool = False) -> None:
        super().__init__(error)
        self.is_final = is_final


class Revoked(Failed):
    """Stop everything: the installation is revoked. ``error`` is a :class:`~sekuire.errors.RevokedError`."""

    __slots__ = ()

    error: RevokedError

    def __init__(self, error: RevokedError) -> None:
        super().__init__(error)


Verdict = Union[Settled, Retry, NotThePlatform, Later, Substitute, Unsupported, Dropped, Unauthorized, Refused, Revoked]

SETTLED = Settled()

#: Endpoints for which a success may have no body.
_MAY_BE_EMPTY: FrozenSet[str] = frozenset(
    ("complete", "release", "progress", "logs", "heartbeat", "capabilities", "cancel", "revoke", "commands")
)
#: Endpoints that a platform need not have, and the statuses that say so.
_OPTIONAL: FrozenSet[str] = frozenset(("release", "progress", "logs", "capabilities", "cancel", "approvals"))
_NOT_THERE = (404, 405, 501)
#: The code of a 404 that is about one task, not about the endpoint.
_UNKNOWN_TASK = "TASK_NOT_FOUND"
#: Endpoints that log in, and the statuses that say that the credentials given are invalid.
_LOGINS: FrozenSet[str] = frozenset(("bootstrap", "recover", "refresh"))
_INVALID = (400, 401, 403, 404, 409, 410)
#: Statuses that never end a first login or stream, whoever answers so.
_NEVER_FATAL = (401, 408, 425, 429)
#: Endpoints that a foreign first answer may end.
_FIRST: FrozenSet[str] = _LOGINS | {"task_stream"}

#: What frameworks add to the error of a path that they do not know: NestJS, Fastify, Spring Boot and others.
_OF_FRAMEWORKS = frozenset(
    ("statusCode", "status_code", "status", "path", "url", "method", "timestamp", "instance", "trace", "stack")
)

_REVOKED = re.compile(rb'"revoked"\s*:\s*true\b')


def verdict(endpoint: str, outcome: Union[Answer, BaseException]) -> Verdict:
    """Return what an answer, or the error in place of one, means for ``endpoint``.

    ``endpoint`` is a name of :data:`sekuire.wire.protocol.DEFAULT_ENDPOINTS`. ::

        found = verdict("complete", reply)
        if isinstance(found, Settled): ...

    docs/protocol.md, "Whose answer is it?" and the section of each endpoint.
    """
    if isinstance(outcome, BaseException):
        return _of_error(outcome)
    status = outcome.status
    if 200 <= status < 300:
        return _of_success(endpoint, status, outcome)
    if 300 <= status < 400:
        return _foreign(endpoint, outcome)
    payload = _object(outcome.body)
    if payload is None:
        return _of_page(endpoint, status, outcome)
    error = protocol.decode_error(status, outcome.body, outcome.retry_after())
    if protocol.is_revoked(error):
        return Revoked(protocol.revocation(error))
    if not _is_error(payload):
        return _of_page(endpoint, status, outcome)
    if endpoint == "policy" and status == 404:
        return SETTLED if _says_no_policy(payload) else Retry(error, error.retry_after or 0.0)
    if endpoint in _OPTIONAL and status in _NOT_THERE and error.code != _UNKNOWN_TASK:
        return Unsupported(error)
    if protocol.is_transient(status):
        return Retry(error, error.retry_after or 0.0)
    return _of_refusal(endpoint, status, error)


def _of_error(error: BaseException) -> Verdict:
    if isinstance(error, RevokedError):
        return Revoked(error)
    if isinstance(error, TransportError):
        return Retry(error, error.retry_after or 0.0) if error.retryable else Later(error)
    if isinstance(error, SekuireError):
        return Later(error)
    # Unforeseen: name the type alone, because the text may quote what was sent.
    return Retry(TransportError(f"sending failed in an unforeseen way ({type(error).__name__})"))


def _of_success(endpoint: str, status: int, answer: Answer) -> Verdict:
    if endpoint == "task_stream":
        if status == 200 and _content_type(answer) == protocol.STREAM_TYPE:
            return SETTLED
        if status == 204:
            return Refused(StreamError("204, which means: do not connect again"))
        return _foreign(endpoint, answer)
    body = answer.body
    if body == b"{}":
        # The usual answer to a completion, without a decoder.
        return SETTLED
    if not body and endpoint in _MAY_BE_EMPTY and (status == 204 or _is_framed(answer.headers)):
        return SETTLED
    payload = _object(body)
    if payload is None:
        if _content_type(answer) == protocol.JSON_TYPE and _REVOKED.search(body):
            # It cannot be read, and it mentions a revocation: fail closed.
            return Revoked(RevokedError("an unreadable answer of the platform says so"))
        return _foreign(endpoint, answer)
    if payload.get("code") == protocol.CODE_REVOKED:
        return Revoked(protocol.revocation(protocol.decode_error(status, body)))
    return SETTLED


def _of_page(endpoint: str, status: int, answer: Answer) -> Verdict:
    """Classify an error that is not in the platform's form."""
    foreign = _foreign(endpoint, answer)
    if status == 401 and endpoint not in _LOGINS:
        return Unauthorized(foreign.error, is_foreign=True, delay=foreign.delay)
    if endpoint in _OPTIONAL and status in _NOT_THERE:
        return Unsupported(foreign.error, is_foreign=True)
    return foreign


def _of_refusal(endpoint: str, status: int, error: APIError) -> Verdict:
    """Classify an error of the platform that is neither passing nor about an endpoint that is missing."""
    if endpoint in _LOGINS:
        return Refused(error, is_final=status in _INVALID)
    if status == 401:
        return Unauthorized(error, delay=error.retry_after or 0.0)
    if endpoint == "complete":
        if status == 409:
            return SETTLED
        if status in (404, 410):
            return Dropped(error)
        if status in (400, 413, 422):
            return Substitute(error, "result_too_large" if status == 413 else "result_rejected")
        return Later(error)
    if endpoint == "logs" and status == 413:
        return Substitute(error, "too_large")
    if endpoint in _OPTIONAL:
        return Dropped(error, is_superseded=status == 409)
    if endpoint == "task_stream" and status in (404, 405):
        return Retry(error, is_fatal_at_first=True)
    return Refused(error)


def _foreign(endpoint: str, answer: Answer) -> NotThePlatform:
    status = answer.status
    delay = answer.retry_after() or 0.0
    is_fatal = endpoint in _FIRST and status not in _NEVER_FATAL and status < 500
    if _may_be_cut(answer):
        return NotThePlatform(TransportError("the answer ended early", retry_after=delay), delay)
    what = f"{status}, {protocol.one_line(_content_type(answer))[:80] or 'no content type'}"
    words = _words(answer)
    return NotThePlatform(
        TransportError(f"another server answered ({what}): {words}", retry_after=delay),
        delay,
        is_fatal_at_first=is_fatal,
        says=f"{what}: {words}",
    )


def _words(answer: Answer) -> str:
    """Return what a foreign answer says of itself. JSON is not quoted as a whole: it may hold tokens."""
    if 300 <= answer.status < 400:
        return "a redirect, which is not followed"
    text = protocol.page_text(answer.body)
    if text[:1] in ("{", "["):
        payload = (_object(answer.body) or {}) if answer.status >= 400 else {}
        named = next(
            (payload[name] for name in ("message", "detail", "title") if isinstance(payload.get(name), str)), ""
        )
        text = protocol.one_line(named)[:200]
        if not text:
            return "its JSON is not in the platform's form"
    return f"it says {text!r}" if text else "it is empty"


def _content_type(answer: Answer) -> str:
    return (answer.headers.get("Content-Type") or "").partition(";")[0].strip().lower()


def _is_framed(headers: Mapping[str, str]) -> bool:
    """Return True if the headers say where the body ends (RFC 9112, section 6.3)."""
    return "Content-Length" in headers or "Transfer-Encoding" in headers


def _may_be_cut(answer: Answer) -> bool:
    """Return True if this may be the platform's answer, cut within its headers or within a body without a length.

    http.client takes the end of a connection for the end of the headers, and of a body without a length.
    """
    if _is_framed(answer.headers) or _content_type(answer) not in ("", protocol.JSON_TYPE):
        return False
    try:
        protocol.decode_body(answer.body)
    except protocol.Malformed:
        return True
    return False


def _object(body: bytes) -> Optional[Mapping[str, Any]]:
    """Return the JSON object that ``body`` is, or None."""
    try:
        payload = protocol.decode_body(body)
    except protocol.Malformed:
        return None
    return payload if isinstance(payload, dict) else None


def _is_error(payload: Mapping[str, Any]) -> bool:
    """Return True if ``payload`` is an error in the platform's form."""
    error = payload.get("error")
    if isinstance(error, dict):
        return bool(error.get("code") or error.get("message"))
    return isinstance(error, str) and bool(error)


def _says_no_policy(payload: Mapping[str, Any]) -> bool:
    """Return True if the error of a 404 says that the workspace has no policy, which allows everything.

    Without a code it must be the contract's error whole, and nothing that frameworks say of an unknown path.
    """
    nested = payload.get("error")
    inner = nested if isinstance(nested, dict) else payload
    codes = [one for one in (inner.get("code"), payload.get("code")) if one is not None]
    if codes:
        return all(one == "POLICY_NOT_FOUND" for one in codes)
    message = inner.get("message")
    return isinstance(message, str) and bool(message) and not _OF_FRAMEWORKS.intersection((*inner, *payload))


class Support:
    """Remember which optional endpoints the platform offers. All that share an installation share one.

    An endpoint is switched off by an answer in the platform's form, or by three foreign ones in a row while another
    endpoint answers in the platform's form (docs/protocol.md, "Whose answer is it?", exception b). ::

        if support.is_offered("release"):
            found = verdict("release", reply)
            support.note("release", found)
    """

    # Threads: any thread may call anything. `_lock` guards the counts. It is taken only for what is not settled.

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._off: FrozenSet[str] = frozenset()
        #: Endpoint → foreign answers in a row, and how many answers the platform had given before the first of them.
        self._foreign: Dict[str, Tuple[int, int]] = {}
        #: How many answers in the platform's form came. Threads may lose a count to each other; none is needed exactly.
        self._answers = 0

    def is_offered(self, endpoint: str) -> bool:
        """Return True unless ``endpoint`` is switched off."""
        return endpoint not in self._off

    def note(self, endpoint: str, found: Verdict) -> bool:
        """Note a verdict. Return True if it switches ``endpoint`` off."""
        if not isinstance(found, (Unsupported, Retry, Later, Unauthorized)):
            self._answers += 1
            if self._foreign:
                with self._lock:
                    self._foreign.pop(endpoint, None)
            return False
        if not isinstance(found, Unsupported):
            return False
        with self._lock:
            if endpoint in self._off:
                return False
            if found.is_foreign:
                count, before = self._foreign.get(endpoint, (0, self._answers))
                self._foreign[endpoint] = (count + 1, before)
                if count + 1 < FOREIGN_ANSWERS or self._answers == before:
                    return False
            self._off |= {endpoint}
            return True
