"""The event stream parser against the public cases and the WHATWG standard itself, each cut in every way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Dict, Iterator, List, Sequence, Tuple

import pytest

from sekuire.transport.sse import EventStream

DATA = Path(__file__).parent / "data"
FILES = ("sse-wpt.json", "sse-launchdarkly.json", "sse-whatwg.json")
BOM = b"\xef\xbb\xbf"
LINE_ENDS = b"\r\n"
#: Up to this length a stream is split at every position; beyond it, around the bytes that mean something.
SPLIT_EVERYWHERE = 4096

Case = Dict[str, Any]


def load() -> Iterator[Case]:
    for name in FILES:
        yield from json.loads((DATA / name).read_text(encoding="utf-8"))["cases"]


CASES = list(load())
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])


def stream_of(case: Case) -> bytes:
    parts = [case["bytes"]] if isinstance(case["bytes"], str) else case["bytes"]
    return "".join(part if isinstance(part, str) else part[0] * part[1] for part in parts).encode("latin-1")


def expected(case: Case) -> Tuple[List[List[str]], Any, str]:
    return case["events"], case["retry"], case["last_event_id"]


def parse(chunks: Sequence[bytes]) -> Tuple[List[List[str]], Any, str]:
    stream = EventStream(chunks)
    events = [[event.event, event.data, event.id] for event in stream.events()]
    assert stream.oversized == 0
    return events, stream.retry, stream.last_event_id


def cut(stream: bytes, places: Sequence[int]) -> List[bytes]:
    edges = [0, *places, len(stream)]
    return [stream[a:b] for a, b in zip(edges, edges[1:])]


def is_continuation(byte: int) -> bool:
    return byte & 0xC0 == 0x80


def split_places(stream: bytes) -> List[int]:
    """Every position; of a long stream those around each CR, LF and byte of a BOM or another multibyte character."""
    if len(stream) <= SPLIT_EVERYWHERE:
        return list(range(len(stream) + 1))
    marked = [at for at, byte in enumerate(stream) if byte in LINE_ENDS or byte >= 0x80]
    return sorted({place for at in marked for place in (at - 1, at, at + 1, at + 2) if 0 <= place <= len(stream)})


@each_case
def test_whole(case: Case) -> None:
    """A stream that arrives in one piece gives the source's events, retry and last event id."""
    assert parse([stream_of(case)]) == expected(case)


@each_case
def test_byte_by_byte(case: Case) -> None:
    """A stream that arrives byte by byte gives the same."""
    stream = stream_of(case)
    assert parse(cut(stream, range(1, len(stream)))) == expected(case)


@each_case
def test_split_in_two(case: Case) -> None:
    """A stream that arrives in two pieces gives the same, wherever it is split."""
    stream = stream_of(case)
    for place in split_places(stream):
        assert parse(cut(stream, [place])) == expected(case), f"split at {place}"


@each_case
def test_cut_at_every_boundary(case: Case) -> None:
    """A stream cut after every line end, inside every CRLF, or inside every multibyte character gives the same."""
    stream = stream_of(case)
    inner = range(1, len(stream))
    assert parse(cut(stream, [at for at in inner if stream[at - 1] in LINE_ENDS])) == expected(case)
    assert parse(cut(stream, [at for at in inner if stream[at - 1 : at + 1] == b"\r\n"])) == expected(case)
    assert parse(cut(stream, [at for at in inner if is_continuation(stream[at])])) == expected(case)


@pytest.mark.parametrize("case", [case for case in CASES if "chunks" in case], ids=lambda case: case["name"])
def test_own_chunks(case: Case) -> None:
    """A stream cut as its source cuts it gives the source's events."""
    stream = stream_of(case)
    sizes = case["chunks"]
    assert sum(sizes) == len(stream)
    assert parse(cut(stream, [sum(sizes[:n]) for n in range(1, len(sizes))])) == expected(case)


def test_every_case_is_there() -> None:
    """The data files hold all cases, each named once and with its source."""
    names = [case["name"] for case in CASES]
    assert len(set(names)) == len(names)
    assert all(case["source"] for case in CASES)
    kinds = [name.partition("/")[0] for name in names]
    assert {kind: kinds.count(kind) for kind in kinds} == {"wpt": 26, "ld": 51, "whatwg": 50}


def test_some_split_falls_inside_everything_that_can_be_split() -> None:
    """The cases hold a BOM, every kind of line end and multibyte characters, so that the splits mean something."""
    everything = [stream_of(case) for case in CASES]
    for needed in (BOM, b"\r\n\r\n", b"\r\r", b"\n\n", b"\n\r\n", b"\r\n\r", "…".encode(), b"\xf0\x9f\x98\x80"):
        assert any(needed in stream for stream in everything), needed
    assert any(len(stream) > SPLIT_EVERYWHERE for stream in everything)
