"""Bodies: decoded as they arrive, within bounds, whatever their pieces."""

from __future__ import annotations

import gzip
import io
import math
import os
import socket
import time
import tracemalloc
import zlib
from typing import Any, Dict, List, Optional

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sekuire.transport import answers
from sekuire.transport.body import BodyError, arriving, limit_reads, read_body, socket_of

MIB = 1024 * 1024


class Source:
    """What ``arriving`` needs of an http.client response: ``read1``, ``length``, ``close``."""

    def __init__(self, pieces: List[bytes], length: Optional[int] = None) -> None:
        self._pieces = list(pieces)
        self.length = length
        self.is_closed = False
        self.fp: Any = None

    def read1(self, size: int) -> bytes:
        piece = self._pieces.pop(0) if self._pieces else b""
        if self.length is not None:
            self.length -= len(piece)
        return piece

    def close(self) -> None:
        self.is_closed = True


class Raw:
    def __init__(self, pieces: List[bytes], length: Optional[int] = None, encoding: Optional[str] = None) -> None:
        self.headers: Dict[str, str] = {} if encoding is None else {"Content-Encoding": encoding}
        self._fp = Source(pieces, length)


def whole(*pieces: bytes, encoding: Optional[str] = None, length: Optional[int] = None, limit: int = 64 * MIB) -> bytes:
    return read_body(Raw(list(pieces), length, encoding), limit, math.inf)


def split(data: bytes, cuts: List[int]) -> List[bytes]:
    edges = sorted({cut % (len(data) + 1) for cut in cuts} | {0, len(data)})
    return [data[low:high] for low, high in zip(edges, edges[1:])]


@given(
    st.binary(), st.lists(st.integers(0, 10**6)), st.sampled_from([None, "", "identity", "gzip", "X-GZIP", "deflate"])
)
def test_any_body_in_any_pieces(data: bytes, cuts: List[int], encoding: Optional[str]) -> None:
    """A body is the same whatever pieces it came in, plain or compressed."""
    kind = (encoding or "").lower()
    sent = gzip.compress(data) if "gzip" in kind else zlib.compress(data) if kind == "deflate" else data
    assert whole(*split(sent, cuts), encoding=encoding, length=len(sent)) == data
    assert whole(*split(sent, cuts), encoding=encoding) == data


@given(
    st.binary(min_size=1),
    st.lists(st.integers(0, 10**6)),
    st.sampled_from(["identity", "gzip", "deflate"]),
    st.integers(0, 10**6),
    st.integers(0, 255),
)
def test_no_damaged_body_is_taken_for_whole(data: bytes, cuts: List[int], encoding: str, place: int, flip: int) -> None:
    """A body that is cut anywhere, or has a byte changed, is a BodyError or the body itself, never a third thing."""
    packed = {"identity": data, "gzip": gzip.compress(data), "deflate": zlib.compress(data)}[encoding]
    short = packed[: place % len(packed)]
    with pytest.raises(BodyError):
        whole(*split(short, cuts), encoding=encoding, length=len(packed))
    if encoding == "identity":
        return
    if short:
        with pytest.raises(BodyError):
            whole(*split(short, cuts), encoding=encoding)
    at = place % len(packed)
    wrong = packed[:at] + bytes([packed[at] ^ flip]) + packed[at + 1 :]
    results = []
    for pieces in (split(wrong, cuts), [wrong]):
        try:
            results.append(whole(*pieces, encoding=encoding))
        except BodyError:
            results.append(None)
    assert results[0] == results[1]
    # Of a changed name or time in gzip's header no checksum tells.
    assert results[0] in (None, data)


def test_pieces_are_given_as_they_come() -> None:
    """Each piece is given before the next is read, and the source is closed after the last."""
    raw = Raw([b"one", b"two"], 6)
    pieces = arriving(raw)
    assert next(pieces) == b"one"
    assert raw._fp.length == 3
    assert next(pieces) == b"two"
    assert next(pieces, None) is None
    assert raw._fp.is_closed


def test_members_and_empty_bodies() -> None:
    """Several gzip members follow each other; a body without a byte is empty, compressed or not."""
    assert whole(gzip.compress(b"one") + gzip.compress(b"two"), encoding="gzip") == b"onetwo"
    assert whole(encoding="gzip") == b""
    assert whole(length=0) == b""


@pytest.mark.parametrize("size", [262_145, 262_166, 262_400])
def test_no_output_stays_behind(size: int) -> None:
    """Wherever the input stops, all output that it makes is given, also what is one step and a little more."""
    packed = zlib.compress(b"x" * size, 9)
    for end in range(len(packed) - 40, len(packed)):
        got = b""
        with pytest.raises(BodyError, match="middle of its compressed data"):
            for piece in arriving(Raw([packed[:end]], None, "deflate")):
                got += piece
        assert got == zlib.decompressobj().decompress(packed[:end])


@pytest.mark.parametrize("size", [262_143, 262_144, 262_145, 524_288, 1_000_000])
def test_output_is_given_without_waiting_for_more_input(size: int) -> None:
    """All output of the input that has come is given, also where it exactly fills a step."""
    inflate = zlib.compressobj()
    data = inflate.compress(b"x" * size) + inflate.flush(zlib.Z_SYNC_FLUSH)
    pieces = arriving(Raw([data], None, "deflate"))
    got = b""
    while len(got) < size:
        got += next(pieces)
    assert got == b"x" * size


@pytest.mark.parametrize(
    ("pieces", "length", "encoding", "problem"),
    [
        ([b"abc"], 5, None, "ended 2 bytes early"),
        ([], 5, None, "ended 5 bytes early"),
        ([gzip.compress(b"abc")[:-9]], None, "gzip", "middle of its compressed data"),
        ([b"plain text"], None, "gzip", "not compressed as its header says"),
        ([gzip.compress(b"abc") + b"garbage"], None, "gzip", "not compressed as its header says"),
        ([b"abc"], None, "br", "content encoding 'br'"),
        ([b"abc"], None, "gzip, gzip", "content encoding"),
    ],
)
def test_broken_bodies(pieces: List[bytes], length: Optional[int], encoding: Optional[str], problem: str) -> None:
    """A body that is cut, mislabelled or of an unknown encoding is a BodyError that says so and quotes nothing."""
    with pytest.raises(BodyError, match=problem) as caught:
        whole(*pieces, length=length, encoding=encoding)
    assert "abc" not in str(caught.value)


def test_a_body_may_be_as_large_as_the_limit() -> None:
    """Exactly the limit is accepted, one byte more is not."""
    assert len(whole(b"x" * 100, limit=100)) == 100
    with pytest.raises(BodyError, match="larger than 100 bytes"):
        whole(b"x" * 60, b"x" * 41, limit=100)


def test_a_bomb_is_met_in_pieces() -> None:
    """A small compressed body that would fill the memory is refused long before it does."""
    bomb = gzip.compress(b"\0" * (256 * MIB))
    tracemalloc.start()
    try:
        with pytest.raises(BodyError, match="larger than"):
            whole(bomb, encoding="gzip", limit=MIB)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 16 * MIB


def test_the_time_is_looked_at_before_each_read() -> None:
    """A body that has not come whole when its time has passed is a BodyError."""
    with pytest.raises(BodyError, match="in time"):
        read_body(Raw([b"abc"]), MIB, time.monotonic())


@pytest.mark.parametrize(("patience", "left"), [(600.0, 300.0), (60.0, 60.0)])
def test_no_read_waits_beyond_the_end(patience: float, left: float) -> None:
    """A read waits for what is left of the time, at most for the read timeout, which is restored afterwards."""
    waits: List[Optional[float]] = []
    one, other = socket.socketpair()
    with one, other:
        one.settimeout(patience)
        raw = Raw([b"abc", b"def"])
        raw._fp.fp = one.makefile("rb")
        read1 = raw._fp.read1

        def read(size: int) -> bytes:
            waits.append(one.gettimeout())
            return read1(size)

        raw._fp.read1 = read  # type: ignore[method-assign]
        assert read_body(raw, MIB, time.monotonic() + 300) == b"abcdef"
        raw._fp.fp.close()
        assert one.gettimeout() == patience
    assert len(waits) == 3
    assert all(wait is not None and left - 60 < wait <= left for wait in waits)


def test_the_socket_below_a_response() -> None:
    """The socket of a response is found where there is one, and limiting a closed one does nothing."""
    one, other = socket.socketpair()
    with other:
        raw = Raw([])
        raw._fp.fp = one.makefile("rb")
        assert socket_of(raw) is one
        limit_reads(one, 5.0)
        assert one.gettimeout() == 5.0
        limit_reads(one, math.inf)
        assert one.gettimeout() == 5.0
        raw._fp.fp.close()
        one.close()
        limit_reads(one, 5.0)
    for nothing in (Raw([]), object()):
        assert socket_of(nothing) is None


def test_the_socket_of_tls_within_tls() -> None:
    """What urllib3 puts in place of a socket, behind an HTTPS proxy, is limited too: it is no socket by its class."""

    class Transport:
        timeout: Optional[float] = 3.0

        def gettimeout(self) -> Optional[float]:
            return self.timeout

        def settimeout(self, seconds: Optional[float]) -> None:
            self.timeout = seconds

        def makefile(self, mode: str, buffering: int) -> io.RawIOBase:
            return io.FileIO(os.devnull)

    sock = Transport()
    raw = Raw([])
    raw._fp.fp = answers.Source.over(sock).makefile("rb")  # type: ignore[assignment]
    found = socket_of(raw)
    assert found is sock
    limit_reads(found, 45.0)
    assert sock.timeout == 45.0
    raw._fp.fp.close()


def test_a_response_without_a_socket() -> None:
    """A response over something else has none, and nothing is limited."""
    raw = Raw([])
    raw._fp.fp = io.BufferedReader(io.BytesIO())  # type: ignore[arg-type]
    assert socket_of(raw) is None
    limit_reads(None, 1.0)
