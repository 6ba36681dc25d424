"""Parse ``text/event-stream``: bytes to events, apart from any connection.

It follows the WHATWG HTML standard, section 9.2.6 "Interpreting an event stream"
(https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation). Its cost is linear in
the bytes that arrive, in whatever pieces they arrive.
"""

from __future__ import annotations

from typing import Generator, Iterable, Iterator, Optional, Union

from sseclient import Event, SSEClient

from .._internal.logs import get_logger

__all__ = ["DEFAULT_MAX_EVENT_BYTES", "MAX_RETRY_MS", "Event", "EventStream"]

#: Size (bytes) beyond which an event is skipped.
DEFAULT_MAX_EVENT_BYTES = 16 * 1024 * 1024
#: The highest value of ``retry:`` (milliseconds). Longer ones count as this, because ``int()`` raises on thousands of
#: digits.
MAX_RETRY_MS = 10**15 - 1

_logger = get_logger("sekuire.stream")

_Bytes = Union[bytes, bytearray]

_BOM = b"\xef\xbb\xbf"
_LF, _COLON, _SPACE = b"\n: "
_DATA, _EVENT, _ID, _RETRY = b"data", b"event", b"id", b"retry"
#: The fields the standard knows, by their first byte: one look tells a comment or an unknown field.
_FIELDS = {name[0]: name for name in (_DATA, _EVENT, _ID, _RETRY)}


class EventStream(SSEClient):
    """Parse the event stream of one connection: sseclient-py's client, with a parser that follows the standard.

    ::

        for event in EventStream(answer.chunks(60.0)).events():
            print(event.event, event.data)


    :param chunks: the stream's bytes, cut anywhere, read lazily. What it raises passes through.
    :param max_event_bytes: size (bytes) beyond which an event is skipped. Every line of its block counts, with one
        byte for the line's end. Comments do not count: they are never kept, so an idle stream may send any number.
    :param last_event_id: the id of the connection before. By the standard's text each stream begins with an empty
        one. Browsers keep the old one until the server sends another, and so does this.
    """

    def __init__(
        self,
        chunks: Iterable[bytes],
        *,
        max_event_bytes: int = DEFAULT_MAX_EVENT_BYTES,
        last_event_id: str = "",
    ) -> None:
        self._chunks = chunks
        self._source = iter(chunks)
        # The base class's constructor is left out: it logs what it is given, and a log call may raise. This is the
        # attribute that its close() needs.
        self._event_source = self._source
        self._max_event_bytes = max_event_bytes
        #: The standard's "last event ID string": an id counts once the blank line that ends its block has come.
        self.last_event_id = last_event_id
        #: Milliseconds of the last valid ``retry:`` line, at most :data:`MAX_RETRY_MS`; None if there was none.
        self.retry: Optional[int] = None
        #: How many events were skipped for their size. Their ``id:`` and ``retry:`` lines count all the same.
        self.oversized = 0

    def events(self) -> Generator[Event, None, None]:
        """Yield each event as soon as its blank line has arrived. Call this once.

        An event's ``id`` is the last event id at that moment ("" if none) and its ``event`` the type ("message" if
        none). Its ``retry`` stays None, because by the standard it applies to the stream (:attr:`retry`).
        """
        limit = self._max_event_bytes
        # The block so far. `data` is None while the standard's data buffer is empty: one empty `data` line makes an
        # event, no such line makes none. It stays bytes until it is complete: one decode per event, and many short
        # lines take no more memory than they have bytes.
        data: Optional[_Bytes] = None
        kind: _Bytes = b""
        last_id = self.last_event_id
        size = 0
        skipping = False
        # The line whose end has not come. It holds no LF, so only what comes after it is searched for one.
        rest = bytearray()

        for chunk in self._read():
            searched = len(rest)
            buffer: _Bytes = chunk
            if searched:
                rest += chunk
                buffer = rest
            pos = 0
            end = buffer.find(b"\n", searched)
            while end >= 0:
                if end == pos:
                    self.last_event_id = last_id
                    if data is not None:
                        yield Event(  # type: ignore[call-arg]  # sseclient's stub leaves __init__ out
                            last_id,
                            kind.decode("utf-8", "replace") if kind else "message",
                            data.decode("utf-8", "replace"),
                        )
                        data = None
                    kind = b""
                    size = 0
                    skipping = False
                elif buffer[pos] != _COLON:
                    size += end - pos + 1
                    if size > limit and not skipping:
                        skipping = True
                        data = None
                        self._skip()
                    field = _FIELDS.get(buffer[pos])
                    if field is not None and buffer.startswith(field, pos):
                        start = pos + len(field)
                        if buffer[start] == _COLON:
                            start += 2 if buffer[start + 1] == _SPACE else 1
                        elif start != end:
                            field = None  # a longer name that begins with a known one
                        if field is _DATA and not skipping:
                            if data is None:
                                data = buffer[start:end]
                            else:
                                if not isinstance(data, bytearray):
                                    data = bytearray(data)
                                data += b"\n"
                                data += buffer[start:end]
                        elif end - pos > limit:
                            pass  # such a line is given up when it comes in pieces, so it must not count when whole
                        elif field is _EVENT:
                            kind = buffer[start:end]
                        elif field is _ID:
                            value = buffer[start:end]
                            if b"\0" not in value:
                                last_id = value.decode("utf-8", "replace")
                        elif field is _RETRY:
                            self._set_retry(buffer[start:end])
                pos = end + 1
                end = buffer.find(b"\n", pos)

            length = len(buffer) - pos
            if not length:
                rest = bytearray()
            elif buffer[pos] == _COLON:
                rest = bytearray(b":")
            else:
                if size + length > limit and not skipping:
                    skipping = True
                    data = None
                    self._skip()
                if skipping and not self._may_count(buffer, pos, length):
                    rest = bytearray(b":")  # what is yet to come of this line is no more than a comment
                elif buffer is rest:
                    del rest[:pos]
                else:
                    rest = bytearray(buffer[pos:])
            # An event can be large and the next one far away, so keep nothing of it.
            buffer = b""

    def close(self) -> None:
        """Close the chunks, if they can be closed. It does not wake a reader that waits for the next one."""
        close = getattr(self._chunks, "close", None)
        if close is not None:
            close()

    def _read(self) -> Iterator[bytes]:
        """Yield the chunks as they arrive, without the BOM at the start, and with LF for every CR and CRLF."""
        head: Optional[bytes] = b""  # what may be the beginning of a BOM; None once that is settled
        after_cr = False
        for chunk in self._source:
            if head is not None:
                chunk = head + chunk
                if len(chunk) < len(_BOM) and _BOM.startswith(chunk):
                    head = chunk
                    continue
                if chunk.startswith(_BOM):
                    chunk = chunk[len(_BOM) :]
                head = None
            if after_cr and chunk:
                after_cr = False
                if chunk[0] == _LF:
                    chunk = chunk[1:]
            if b"\r" in chunk:
                # A CR ends its line at once: waiting for an LF that may follow would hold the event back.
                after_cr = chunk.endswith(b"\r")
                chunk = chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
            if chunk:
                yield chunk

    def _set_retry(self, value: _Bytes) -> None:
        if value.isdigit():  # of bytes: ASCII digits only, and at least one
            digits = value.lstrip(b"0") or b"0"
            self.retry = min(int(digits[:16]), MAX_RETRY_MS)

    def _skip(self) -> None:
        self.oversized += 1
        _logger.warning("an event of more than %d bytes was skipped", self._max_event_bytes)

    def _may_count(self, buffer: _Bytes, pos: int, length: int) -> bool:
        """Return True if the beginning of a line in a skipped event can become an ``id`` or ``retry`` line."""
        if length > self._max_event_bytes:
            return False
        return length < len(_RETRY) or buffer.startswith((_ID, _RETRY), pos)
