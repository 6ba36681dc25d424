"""Read the body of an answer as it arrives, undo its content encoding, and keep within bounds."""

from __future__ import annotations

import contextlib
import math
import socket
import zlib
from typing import Any, Iterator, Optional

from .._internal.clock import time

#: Most bytes taken from the socket in one read.
READ_SIZE = 65536
#: Most bytes that one step of decompression may yield, so that a bomb is met in pieces.
_INFLATE_STEP = 262144


class BodyError(Exception):
    """Report that a body cannot be read. The text says why, and quotes nothing of it."""


class TooLargeError(BodyError):
    """Report that a body has more bytes than are accepted."""


def arriving(raw: Any) -> Iterator[bytes]:
    """Yield the decoded bytes of ``raw`` (a urllib3 response), each piece as soon as it has come.

    If an answer is not chunked, an iteration over its response waits until a buffer is full. ``read1`` of the
    http.client response below it does not. It does not decode content encodings, so this function does.

    :raises BodyError: an unknown content encoding, or a body that ended before its Content-Length.
    """
    source = raw._fp
    inflate = _inflater(raw.headers.get("Content-Encoding"))
    while True:
        data = source.read1(READ_SIZE)
        if not data:
            break
        if inflate is None:
            yield data
        else:
            yield from inflate.feed(data)
        if getattr(source, "length", None) == 0:  # What a mock answers with has none.
            break
    left = getattr(source, "length", None)
    if left:
        raise BodyError(f"the answer ended {left} bytes early")
    if inflate is not None and not inflate.is_whole():
        raise BodyError("the answer ended in the middle of its compressed data")
    source.close()


def read_body(raw: Any, limit: int, end: float) -> bytes:
    """Return the whole body, at most ``limit`` bytes decoded, by ``end`` (``time.monotonic()``).

    No read waits for longer than what is left, so that a server that sends a byte now and then gets no more time.

    :raises BodyError: as :func:`arriving`, or the body is too large (:class:`TooLargeError`) or too slow.
    """
    sock = socket_of(raw)
    patience = (sock.gettimeout() if sock is not None else None) or math.inf
    pieces = []
    size = 0
    arrivals = arriving(raw)
    while True:
        left = end - time.monotonic()
        if left <= 0:
            raise BodyError("the answer did not arrive whole in time")
        limit_reads(sock, min(left, patience))
        piece = next(arrivals, None)
        if piece is None:
            break
        size += len(piece)
        if size > limit:
            raise TooLargeError(f"the answer is larger than {limit} bytes")
        pieces.append(piece)
    # Not every urllib3 sets it again before it sends the next request.
    limit_reads(sock, patience)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def limit_reads(sock: Optional[socket.socket], seconds: float) -> None:
    """Let no read of ``sock`` wait longer than ``seconds``."""
    if sock is not None and seconds < math.inf:
        # The socket of an answer that has been read whole may be closed.
        with contextlib.suppress(OSError):
            sock.settimeout(seconds)


def socket_of(raw: Any) -> Optional[Any]:
    """Return the socket below a response. http.client keeps it there after the connection object has dropped it."""
    buffered = getattr(getattr(raw, "_fp", None), "fp", None)
    sock = getattr(getattr(buffered, "raw", None), "_sock", None)
    # Not by its class: TLS within TLS does not use one of Python's, and gevent puts its own class under that name.
    return sock if hasattr(sock, "settimeout") and hasattr(sock, "gettimeout") else None


def _inflater(encoding: Optional[str]) -> Optional[_Inflater]:
    name = (encoding or "identity").strip().lower()
    if name in ("", "identity"):
        return None
    if name in ("gzip", "x-gzip", "deflate"):
        return _Inflater()
    raise BodyError(f"the answer has the content encoding {name[:40]!r}, which was not asked for")


class _Inflater:
    """Decompress gzip and zlib, member after member, in bounded steps."""

    def __init__(self) -> None:
        self._object = self._new()
        self._is_fed = False

    def is_whole(self) -> bool:
        """Return True if the data ended with a whole member, or was empty."""
        return not self._is_fed or bool(self._object.eof)

    @staticmethod
    def _new() -> Any:
        return zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield what ``data`` decompresses to, in pieces.

        :raises BodyError: it is not compressed data.
        """
        problem = False
        is_more = bool(data)
        self._is_fed = self._is_fed or is_more
        while is_more and not problem:
            if self._object.eof:
                self._object = self._new()
            try:
                piece = self._object.decompress(data, _INFLATE_STEP)
            except zlib.error:
                problem = True
                continue
            data = self._object.unused_data if self._object.eof else self._object.unconsumed_tail
            # A full step may leave output behind even if all input has been read.
            is_more = bool(data) or (len(piece) == _INFLATE_STEP and not self._object.eof)
            if piece:
                yield piece
        if problem:
            raise BodyError("the answer is not compressed as its header says")
