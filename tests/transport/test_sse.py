"""The event stream parser: the standard's algorithm, any chunking, bounded memory, linear cost."""

from __future__ import annotations

import logging
import tracemalloc
from typing import Any, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple

import pytest
import sseclient
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sekuire.transport import sse
from sekuire.transport.sse import MAX_RETRY_MS, EventStream

from ..conformance.reference import BOM, Facts, reference, without_large_events

KIB = 1024
MIB = 1024 * 1024


def facts(stream: EventStream) -> Facts:
    """Read ``stream`` to its end: its events as (type, data, id), its retry and its last event id."""
    events = [(event.event, event.data, event.id) for event in stream.events()]
    return events, stream.retry, stream.last_event_id


def parse(*chunks: bytes, **options: Any) -> Facts:
    return facts(EventStream(chunks, **options))


def data_of(*chunks: bytes, **options: Any) -> List[str]:
    return [data for _, data, _ in parse(*chunks, **options)[0]]


PIECES = [
    *(b"data: ", b"data:", b"data", b"id: ", b"id", b"event:", b"event", b"retry:", b"retry", b"da", b"dataid"),
    *(b"\n", b"\n", b"\n\n", b"\r", b"\r\n", b"\r\n\r\n", b":", b": ", b" ", b"\0", b"1", b"20", b"x", b"y" * 9),
    *(BOM, "€".encode(), "😀".encode(), b"\xff", b"\xe2\x82", b"\xed\xa0\x80", "\u2028\x85\x0b".encode()),
]
FIELDS = [b"data:", b"data: ", b"data", b"id:", b"id: ", b"id", b"event: ", b"retry: ", b"retry:", b":", b"idle: ", b""]
VALUES = [b"", b"1", b"23", b"4567", b"x" * 9, b"y" * 20, b"\0", "€".encode()]
ENDS = [b"\n", b"\r", b"\r\n", b"\n\n", b"\r\n\r\n"]
lines = st.tuples(*map(st.sampled_from, (FIELDS, VALUES, ENDS))).map(b"".join)
streams = st.one_of(
    st.lists(lines, max_size=12).map(b"".join),
    st.lists(st.sampled_from(PIECES), max_size=40).map(b"".join),
    st.binary(max_size=60),
)


@st.composite
def chunked(draw: st.DrawFn) -> Tuple[bytes, List[bytes]]:
    """A stream, and the same in chunks, empty ones among them."""
    stream = draw(streams)
    places = sorted(draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    edges = [0, *places, len(stream)]
    return stream, [stream[a:b] for a, b in zip(edges, edges[1:])]


def single_bytes(stream: bytes) -> Iterator[bytes]:
    return (stream[at : at + 1] for at in range(len(stream)))


@settings(max_examples=500, deadline=None)
@given(chunked(), st.sampled_from(["", "before"]))
@example((b"data:1\r\n\r\ndata:2\r\n\r\n", [b"data:1\r\n\r", b"\ndata:2\r", b"", b"\n\r\n"]), "")
def test_agrees_with_the_standard(case: Tuple[bytes, List[bytes]], last_event_id: str) -> None:
    """Any bytes in any chunks give the events, the retry and the id that the standard's own algorithm gives."""
    stream, chunks = case
    wanted = reference(stream, last_event_id)
    assert parse(*chunks, last_event_id=last_event_id) == wanted
    assert parse(*single_bytes(stream), last_event_id=last_event_id) == wanted
    assert parse(stream, last_event_id=last_event_id) == wanted


@settings(max_examples=500, deadline=None)
@given(chunked(), st.integers(0, 40))
def test_skips_the_same_events_in_any_chunks(case: Tuple[bytes, List[bytes]], limit: int) -> None:
    """Which events are too large does not depend on how they arrive; the ids and retries in them always count."""
    stream, chunks = case
    small, skipped = without_large_events(stream, limit)
    wanted = reference(small)
    for way in ([stream], chunks, single_bytes(stream)):
        taken = EventStream(way, max_event_bytes=limit)
        assert facts(taken) == wanted
        assert taken.oversized == skipped


# -- single behaviours ------------------------------------------------------------------------------------------------


def test_is_an_sseclient() -> None:
    """The stream is an sseclient-py client and its events are sseclient-py's, with id, type and data set."""
    stream = EventStream([b"event: task\nid: 7\ndata: x\n\n"])
    (event,) = stream.events()
    assert isinstance(stream, sseclient.SSEClient)
    assert type(event) is sseclient.Event
    assert (event.id, event.event, event.data, event.retry) == ("7", "task", "x", None)


def test_last_event_id_of_the_connection_before() -> None:
    """The id given at the start is that of every event until the server sends another."""
    assert parse(b"data:1\n\nid:b\ndata:2\n\n", last_event_id="a")[0] == [("message", "1", "a"), ("message", "2", "b")]
    assert parse(b"data:1\n\n", last_event_id="a")[2] == "a"
    assert parse(b"id:b\ndata:1\n", last_event_id="a")[2] == "a"


@pytest.mark.parametrize("end", [b"\n", b"\r", b"\r\n"], ids=["LF", "CR", "CRLF"])
def test_events_come_before_the_next_chunk_is_asked_for(end: bytes) -> None:
    """An event is yielded as soon as its blank line has arrived, without a look at the next chunk."""
    asked = []

    def chunks() -> Iterator[bytes]:
        for number in range(3):
            asked.append(number)
            yield b"data: %d" % number + end + end
        raise AssertionError("asked for a chunk too many")

    events = EventStream(chunks()).events()
    assert asked == []
    for number in range(3):
        assert next(events).data == str(number)
        assert asked == list(range(number + 1))


def test_cr_at_the_end_of_a_chunk_ends_the_line() -> None:
    """A CR at a chunk's end dispatches at once, and the LF that begins the next chunk is part of the same line end."""

    def chunks() -> Iterator[bytes]:
        yield b"data: 1\r\n\r"
        seen.append("before the LF")
        yield b""
        yield b"\ndata: 2\r"
        yield b"\n"
        yield b"\r"
        seen.append("after the second")

    seen: List[str] = []
    for event in EventStream(chunks()).events():
        seen.append(event.data)
    assert seen == ["1", "before the LF", "2", "after the second"]


def test_all_events_of_a_chunk_come_one_at_a_time() -> None:
    """The id and the retry are those of the event in hand, not of later ones in the same chunk."""
    stream = EventStream([b"id:1\ndata:a\n\nretry:5\nid:2\ndata:b\n\n"])
    events = stream.events()
    assert (next(events).id, stream.last_event_id, stream.retry) == ("1", "1", None)
    assert (next(events).id, stream.last_event_id, stream.retry) == ("2", "2", 5)


def test_retry_takes_effect_at_once() -> None:
    """A retry line counts when it is complete, before its block is; an id only with its block."""
    seen = []

    def chunks() -> Iterator[bytes]:
        for chunk in (b"id: 7\nretry: 15", b"00", b"\n", b"retry: x\n", b"\n", b"retry: 20\r"):
            yield chunk
            seen.append((stream.retry, stream.last_event_id))

    stream = EventStream(chunks())
    assert list(stream.events()) == []
    assert seen == [(None, ""), (None, ""), (1500, ""), (1500, ""), (1500, "7"), (20, "7")]


@pytest.mark.parametrize(
    ("value", "retry"),
    [
        (b"0" * 10_000 + b"12", 12),
        (b"0" * 10_000, 0),
        (b"9" * 15, MAX_RETRY_MS),
        (b"1" + b"0" * 15, MAX_RETRY_MS),
        (b"1" * 100_000, MAX_RETRY_MS),
        (b"9" * 14, 10**14 - 1),
    ],
)
def test_huge_retry(value: bytes, retry: int) -> None:
    """A retry of any length is valid, and bounded instead of raising."""
    assert parse(b"retry: " + value + b"\n")[1] == retry


def test_errors_of_the_chunks_pass_through() -> None:
    """What reading raises reaches the caller after the events that arrived before it."""

    def chunks() -> Iterator[bytes]:
        yield b"data: 1\n\ndata: 2\n"
        raise ConnectionResetError

    events = EventStream(chunks()).events()
    assert next(events).data == "1"
    with pytest.raises(ConnectionResetError):
        next(events)


def test_close_closes_the_chunks() -> None:
    """Closing the stream closes chunks that have a close, and is harmless for those that have none."""

    class Chunks(List[bytes]):
        closed = 0

        def close(self) -> None:
            self.closed += 1

    chunks = Chunks([b"data: 1\n\n"])
    stream = EventStream(chunks)
    assert [event.data for event in stream.events()] == ["1"]
    assert chunks.closed == 0
    stream.close()
    assert chunks.closed == 1
    EventStream([b""]).close()


def test_logs_no_content(caplog: pytest.LogCaptureFixture) -> None:
    """Nothing of the stream is logged, at any level."""
    with caplog.at_level(logging.DEBUG):
        parse(b"data: hush\nhush: 1\nid: hush\n\n:hush\n" + b"data: hush\n" * 20 + b"\n", max_event_bytes=100)
    assert [record.levelname for record in caplog.records if record.name == "sekuire.stream"] == ["WARNING"]
    assert "hush" not in caplog.text


# -- large events -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", [b"\n", b"\r\n"], ids=["LF", "CRLF"])
def test_size_limit(end: bytes) -> None:
    """An event is as large as its lines, with one byte for each line's end: at the limit it is taken, above not."""
    event = b"id: 1" + end + b"data: 23" + end + end
    assert data_of(event, max_event_bytes=15) == ["23"]
    assert data_of(event, max_event_bytes=14) == []
    assert data_of(event * 3, max_event_bytes=15) == ["23"] * 3


def test_reading_goes_on_after_a_large_event(caplog: pytest.LogCaptureFixture) -> None:
    """Each event that is too large is counted, warned of once and skipped to its blank line; the others arrive."""
    large = [b"event: big\ndata: ", *[b"x" * 50] * 10, b"\nid: 7\ndata: y\nretry: 9\n", b"\n"]
    stream = EventStream([b"data: 1\n\n", *large, b"data: 2\n\n", *large, b"data: 3\n\n"], max_event_bytes=100)
    assert facts(stream) == ([("message", "1", ""), ("message", "2", "7"), ("message", "3", "7")], 9, "7")
    assert stream.oversized == 2
    assert [(record.name, record.levelname) for record in caplog.records] == [("sekuire.stream", "WARNING")] * 2
    assert "100 bytes" in caplog.text


def test_a_large_event_is_noticed_as_it_arrives() -> None:
    """An event without an end is counted as soon as it is too large."""
    seen = []

    def chunks() -> Iterator[bytes]:
        for _ in range(4):
            yield b"data: 6789"
            seen.append(stream.oversized)

    stream = EventStream(chunks(), max_event_bytes=25)
    assert list(stream.events()) == []
    assert seen == [0, 0, 1, 1]


@pytest.mark.parametrize("deliver", [lambda stream: [stream], single_bytes], ids=["whole", "bytes"])
@pytest.mark.parametrize(
    ("stream", "retry", "last_event_id"),
    [
        (b"id: 1\ndata: 0123456789\n\n", None, "1"),
        (b"data: 0123456789\nid: 2\nretry: 3\n\n", 3, "2"),
        (b"data: 01\nid: 34567\n\n", None, "34567"),
        (b"data: 01\nretry: 3\n\n", 3, "before"),
        (b"data: 0123456789\nid\n\n", None, ""),
        (b"data: 0123456789\nid: 2\n", None, "before"),
        (b"id: 0123456789\n\n", None, "before"),
        (b"data: 0123456789\nid: 0123456789\nretry: 0000001\n\n", None, "before"),
    ],
    ids=["before", "after", "id-across", "retry-across", "bare", "cut-off", "too-long", "too-long-after"],
)
def test_ids_in_a_large_event(deliver: Any, stream: bytes, retry: Optional[int], last_event_id: str) -> None:
    """In a skipped event ids and retries count, wherever they stand, but for lines that are too large themselves."""
    taken = EventStream(deliver(stream), max_event_bytes=12, last_event_id="before")
    assert facts(taken) == ([], retry, last_event_id)
    assert taken.oversized == 1


def test_comments_do_not_count() -> None:
    """However many comments stand before or within an event, it arrives."""
    comments = b": still here\n" * 100
    assert data_of(comments + b"data: 1\n" + comments + b"\n", max_event_bytes=8) == ["1"]
    assert data_of(*single_bytes(comments + b"data: 1\n" + comments + b"\n"), max_event_bytes=8) == ["1"]


def traced_peak(chunks: Iterable[bytes], limit: int) -> int:
    """The most memory (bytes) that reading ``chunks`` took beyond what there was before."""
    stream = EventStream(chunks, max_event_bytes=limit)
    tracemalloc.start()
    try:
        for _ in stream.events():
            pass
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def repeat(start: bytes, chunk: bytes, times: int, end: bytes = b"\n\n") -> Iterator[bytes]:
    yield start
    for _ in range(times):
        yield chunk
    yield end


X64 = b"x" * (64 * KIB)


@pytest.mark.parametrize(
    "chunks",
    [
        lambda: repeat(b":", X64, 256),
        lambda: repeat(b"data: ", X64, 256),
        lambda: repeat(b"data: 1\nid: ", X64, 256),
        lambda: repeat(b"retry: ", b"1" * (64 * KIB), 256),
        lambda: repeat(b"", X64, 256),
        lambda: repeat(b"", b"data: " + X64[: 32 * KIB] + b"\n", 256),
        lambda: repeat(b"", b"data: x\r\n" * 1000, 200),
        lambda: repeat(b"", b": " + X64[:1000] + b"\n", 2000),
        lambda: repeat(b"", b"event: " + X64 + b"\n", 256),
        lambda: repeat(b"", b"id: " + X64 + b"\n", 256),
    ],
    ids=["comment", "data", "id", "retry", "name", "lines", "short-lines", "comments", "types", "ids"],
)
def test_memory_is_bounded(chunks: Any) -> None:
    """Nothing that never ends fills memory: not a comment, a line of any field, an unknown one, nor many lines."""
    assert traced_peak(chunks(), 128 * KIB) < 1 * MIB


def test_short_lines_take_no_more_memory_than_their_bytes() -> None:
    """An event of many short lines, within the limit, takes about as much memory as it has bytes."""
    assert traced_peak(repeat(b"", b"data:xy\n" * 512, 64, b""), 1 * MIB) < 256 * KIB


def test_nothing_of_an_event_is_kept_while_waiting() -> None:
    """After a large event that came in pieces has been handed out, waiting for the next holds no memory of it."""
    held = []

    def length(event: sseclient.Event) -> int:
        return len(event.data)

    def chunks() -> Iterator[bytes]:
        yield from repeat(b"data: ", X64, 64)
        held.append(tracemalloc.get_traced_memory()[0])
        yield b":\n"

    tracemalloc.start()
    try:
        assert sum(map(length, EventStream(chunks()).events())) == 4 * MIB
    finally:
        tracemalloc.stop()
    assert max(held) < 256 * KIB


# -- cost -------------------------------------------------------------------------------------------------------------


class Meter:
    """Counts the bytes that are copied or searched, by way of bytes and bytearrays that report to it."""

    def __init__(self) -> None:
        self.work = 0
        self.bytes = self._metered(bytes)
        self.bytearray = self._metered(bytearray)

    def _metered(meter, base: Any) -> Any:
        def counted(name: str) -> Any:
            plain = getattr(base, name)

            def method(self: Any, *args: Any) -> Any:
                result = plain(self, *args)
                if type(result) is base:
                    result = metered(result)
                    meter.work -= len(result)  # this copy is the meter's own
                meter.work += meter._cost(name, self, args, result)
                return result

            return method

        names = ("find", "index", "count", "replace", "split", "splitlines", "partition", "join", "strip", "decode")
        names += ("startswith", "endswith", "__contains__", "__add__", "__getitem__")
        body: Dict[str, Any] = {name: counted(name) for name in names}
        if base is bytearray:
            body["__iadd__"] = counted("__iadd__")
            body["__delitem__"] = counted("__delitem__")

        def __init__(self: Any, *args: Any) -> None:
            if base is bytearray:
                bytearray.__init__(self, *args)
            meter.work += len(self)

        def __radd__(self: Any, other: Any) -> Any:
            return metered(base(other + base(self)))

        metered: Any = type(f"Metered{base.__name__}", (base,), {**body, "__init__": __init__, "__radd__": __radd__})
        return metered

    @staticmethod
    def _cost(name: str, of: Any, args: Sequence[Any], result: Any) -> int:
        """About how many bytes the call looked at or moved; every call is at least 1."""
        if name == "find":
            start = args[1] if len(args) > 1 else 0
            return 1 + (result if result >= 0 else len(of)) - start
        if name in ("startswith", "endswith") or (name == "__getitem__" and isinstance(args[0], int)):
            return 1
        if name == "__getitem__":
            return 1 + len(result)
        if name == "__iadd__":
            return 1 + len(args[0])
        if name == "__delitem__":
            return 1 + (len(of) if args[0].stop else 0)
        if name == "__add__":
            return 1 + len(result)
        return 1 + len(of)


@pytest.fixture
def meter(monkeypatch: pytest.MonkeyPatch) -> Meter:
    meter = Meter()
    monkeypatch.setattr(sse, "bytearray", meter.bytearray, raising=False)
    return meter


def in_pieces(stream: bytes, size: int) -> List[bytes]:
    return [stream[at : at + size] for at in range(0, len(stream), size)]


LINE = b"data: " + b"x" * 40_000 + b"\n\n"
LINES = b"data: x\n" * 5_000 + b"\n"
COMMENTS = b": ping\n" * 5_000 + b"data: x\n\n"
EVENTS = b"event: a\nid: 1\ndata: x\n\n" * 2_000


@pytest.mark.parametrize(
    "size",
    [pytest.param(1, marks=pytest.mark.slow), 7, 4096, 10**6],
    ids=["bytes", "sevens", "reads", "whole"],
)
@pytest.mark.parametrize(
    ("stream", "limit"),
    [
        (LINE, 10**6),
        (LINES, 10**6),
        (LINES.replace(b"\n", b"\r\n"), 10**6),
        (LINES.replace(b"\n", b"\r"), 10**6),
        (COMMENTS, 10**6),
        (b":" + LINE, 10**6),
        (EVENTS, 10**6),
        (LINE, 1_000),
        (LINES, 1_000),
        (b"id: " + LINE, 30_000),
        (b"id: 1\n" * 5_000 + b"\n", 1_000),
        (b"\n" * 40_000, 10**6),
        (b"\r" * 40_000, 10**6),
    ],
    ids=[
        *("line", "lines", "lines-crlf", "lines-cr", "comments", "long-comment", "events"),
        *("large-line", "large-lines", "large-id", "large-ids", "blank-lf", "blank-cr"),
    ],
)
def test_cost_is_linear(meter: Meter, stream: bytes, limit: int, size: int) -> None:
    """Each byte is looked at or moved a bounded number of times, whatever the stream and its pieces are."""
    chunks = [meter.bytes(piece) for piece in in_pieces(stream, size)]
    meter.work = 0
    facts(EventStream(chunks, max_event_bytes=limit))
    assert len(stream) <= meter.work <= 12 * len(stream)


def test_the_meter_sees_quadratic_cost(meter: Meter) -> None:
    """A parser that searches or joins its buffer anew for each chunk would exceed the bound of the test above."""
    searching, joining = Meter(), Meter()
    for its in (searching, joining):
        buffer = its.bytearray()
        for piece in in_pieces(LINE, 100):
            if its is searching:
                buffer += piece
                buffer.find(b"\n")
            else:
                buffer = buffer + piece
        assert its.work > 12 * len(LINE)


def test_a_large_line_is_copied_no_more_than_needed(meter: Meter) -> None:
    """A line that came whole is searched for CR and LF, cut out and decoded, once each; in pieces also gathered."""
    for size, times in ((10**6, 4), (4096, 5)):
        chunks = [b"\n", *map(meter.bytes, in_pieces(LINE, size))]  # the first chunk settles that there is no BOM
        meter.work = 0
        assert [len(event.data) for event in EventStream(chunks).events()] == [40_000]
        assert meter.work < (times + 0.5) * len(LINE)
