"""Reading an answer's bytes as they arrive, undoing its content encoding, within bounds."""

from __future__ import annotations

import zlib
from typing import Any, Iterator, Optional

#: Most bytes taken from the socket in one read.
READ_SIZE = 65536
#: Most bytes that one step of decompression may yield, so that a bomb is met in pieces.
_INFLATE_STEP = 262144


class BodyError(Exception):
    """A body cannot be read; the text says why and quotes nothing of it."""


def arriving(raw: Any) -> Iterator[bytes]:
    """The decoded bytes of ``raw`` (a urllib3 response), each piece as soon as it has come.

    Iterating a response waits until a buffer is full where the answer is not chunked; ``read1`` of the http.client
    response below it does not. It knows nothing of content encodings, so those are undone here.

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
        if source.length == 0:
            break
    if source.length:
        raise BodyError(f"the answer ended {source.length} bytes early")
    source.close()


def read_body(raw: Any, limit: int, expired: Any) -> bytes:
    """The whole body, at most ``limit`` bytes decoded; ``expired()`` is asked after each piece.

    :raises BodyError: as :func:`arriving`, or too large, or too slow.
    """
    pieces = []
    size = 0
    for piece in arriving(raw):
        size += len(piece)
        if size > limit:
            raise BodyError(f"the answer is larger than {limit} bytes")
        pieces.append(piece)
        if expired():
            raise BodyError("the answer did not arrive whole in time")
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _inflater(encoding: Optional[str]) -> Optional[_Inflater]:
    name = (encoding or "identity").strip().lower()
    if name in ("", "identity"):
        return None
    if name in ("gzip", "x-gzip", "deflate"):
        return _Inflater()
    raise BodyError(f"the answer has the content encoding {name[:40]!r}, which was not asked for")


class _Inflater:
    """gzip and zlib, member after member, in bounded steps."""

    def __init__(self) -> None:
        self._object = self._new()

    @staticmethod
    def _new() -> Any:
        return zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)

    def feed(self, data: bytes) -> Iterator[bytes]:
        problem = False
        while data and not problem:
            if self._object.eof:
                self._object = self._new()
            try:
                piece = self._object.decompress(data, _INFLATE_STEP)
            except zlib.error:
                problem = True
                continue
            data = self._object.unused_data if self._object.eof else self._object.unconsumed_tail
            if piece:
                yield piece
        if problem:
            raise BodyError("the answer is not compressed as its header says")
