"""Parse the head of an HTTP request, strictly, without a socket.

What two programs could read differently is refused: a second ``Host``, a length beside a transfer coding, a folded
line, a space before a colon. Such differences are what request smuggling is made of.
"""

from __future__ import annotations

import re
from typing import Dict, NamedTuple

__all__ = ["BadRequest", "Head", "parse_head"]

#: Largest head that is accepted: the request line and all headers.
MAX_HEAD = 64 * 1024
MAX_HEADERS = 100

#: The end of a head. Bare line feeds are found too, so that they are refused at once instead of waited on.
END_OF_HEAD = re.compile(rb"\n\r?\n")
REQUEST_LINE = re.compile(rb"([A-Z]{1,32}) (/[!\"$-~]*) HTTP/1\.([01])")
_VERSION = re.compile(rb"[A-Z]+ \S+ HTTP/\d+(?:\.\d+)?")
_HEADER = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):[ \t]*([^\x00-\x08\x0a-\x1f\x7f]*)")
#: Headers that have one value: a second line would be read differently by different programs.
_SINGLE = frozenset(
    (
        b"Authorization",
        b"Content-Length",
        b"Content-Type",
        b"Expect",
        b"Host",
        b"Idempotency-Key",
        b"Last-Event-Id",
        b"Origin",
        b"Transfer-Encoding",
        b"X-Api-Key",
    )
)


class BadRequest(Exception):
    """Raised for a head that is refused, with the status of the answer and a sentence for people."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(status, message)
        self.status = status
        self.message = message


class Head(NamedTuple):
    """Hold what a request's head says."""

    method: bytes
    #: The path is still percent-encoded.
    target: bytes
    path: bytes
    query: bytes
    #: The second number of the version: 1 for HTTP/1.1, 0 for HTTP/1.0.
    minor: int
    #: Values by name, in the form ``Content-Type``. A name with an underscore is left out: WSGI could not tell it from
    #: one with a hyphen.
    headers: Dict[bytes, bytes]
    #: The length of the body in bytes. 0 if there is none, or if it is chunked.
    length: int
    is_chunked: bool
    #: True if the client waits for an interim answer before it sends the body.
    expects_continue: bool
    #: True if the client may send another request on the connection.
    keeps_alive: bool


def parse_head(raw: bytes) -> Head:
    """Return what a head says. ``raw`` is all of it, from the request line to the empty line.

    :raises BadRequest: it is malformed, ambiguous or too large.
    """
    if len(raw) > MAX_HEAD:
        raise BadRequest(413, f"the head of the request is larger than {MAX_HEAD // 1024} KiB")
    if not raw.endswith(b"\r\n\r\n"):
        raise BadRequest(400, "the request ended early, or its lines do not end in CRLF")
    first, *lines = raw[:-4].split(b"\r\n")
    method, target, minor = _request_line(first)
    if len(lines) > MAX_HEADERS:
        raise BadRequest(413, f"the request has more than {MAX_HEADERS} headers")
    headers: Dict[bytes, bytes] = {}
    for line in lines:
        match = _HEADER.fullmatch(line)
        if match is None:
            raise BadRequest(400, "a header is malformed")
        name = match[1].title()
        value = match[2].rstrip(b" \t")
        if name in headers:
            if name in _SINGLE:
                raise BadRequest(400, f"the request has two {name.decode()} headers")
            headers[name] += b", " + value
        elif b"_" not in name:
            headers[name] = value
    if b"Host" not in headers and minor:
        raise BadRequest(400, "the Host header is missing")
    path, _, query = target.partition(b"?")
    is_chunked = _is_chunked(headers, minor)
    options = {option.strip().lower() for option in headers.get(b"Connection", b"").split(b",")}
    return Head(
        method,
        target,
        path,
        query,
        minor,
        headers,
        0 if is_chunked else _length(headers),
        is_chunked,
        _expects_continue(headers, minor),
        b"close" not in options and (bool(minor) or b"keep-alive" in options),
    )


def _request_line(line: bytes) -> tuple[bytes, bytes, int]:
    match = REQUEST_LINE.fullmatch(line)
    if match is not None:
        return match[1], match[2], int(match[3])
    if _VERSION.fullmatch(line) and not line.endswith((b" HTTP/1.1", b" HTTP/1.0")):
        raise BadRequest(400, "the platform speaks HTTP/1.1 and HTTP/1.0")
    raise BadRequest(400, "the request line is malformed; expected: METHOD /path HTTP/1.1")


def _is_chunked(headers: Dict[bytes, bytes], minor: int) -> bool:
    coding = headers.get(b"Transfer-Encoding")
    if coding is None:
        return False
    if b"Content-Length" in headers:
        raise BadRequest(400, "the request has a Content-Length and a Transfer-Encoding")
    if coding.lower() != b"chunked" or not minor:
        raise BadRequest(400, "the only Transfer-Encoding is chunked, in HTTP/1.1")
    return True


def _length(headers: Dict[bytes, bytes]) -> int:
    text = headers.get(b"Content-Length", b"0")
    if not text.isdigit():
        raise BadRequest(400, "the Content-Length is not a number from 0")
    if len(text) > 18:
        raise BadRequest(413, "the Content-Length is too large")
    return int(text)


def _expects_continue(headers: Dict[bytes, bytes], minor: int) -> bool:
    expected = headers.get(b"Expect")
    if expected is None or not minor:
        return False
    if expected.lower() != b"100-continue":
        raise BadRequest(417, "the only expectation that can be met is 100-continue")
    return True
