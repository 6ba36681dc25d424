"""Read the bytes of an answer below http.client: past interim answers, within a time limit, up to its end.

Every answer of the transport is read this way: the first over a new connection, later ones over a kept connection, and
the stream. A connection is *in step* if the next bytes on it can only belong to the next answer.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import math
import socket
import ssl
from typing import Any, Optional, Tuple, cast

from .._internal.clock import time
from .body import READ_SIZE

#: Most header lines of an interim answer, and most bytes of one: http.client's own limits.
_MAX_LINES, _MAX_LINE = 100, 65536

#: What a read or write over a connection raises that the other side has closed or reset.
CLOSED = (BrokenPipeError, ConnectionResetError, ConnectionAbortedError, ssl.SSLEOFError, ssl.SSLZeroReturnError)


class ClosedBeforeAnswerError(ConnectionResetError):
    """Report that a kept connection was closed or reset before any byte of this call's answer came."""


class Source(io.RawIOBase):
    """Read the bytes that a socket receives, beginning with those that were read already, in the place of the socket.

    One thread at a time uses it. ``_sock`` is where :func:`~sekuire.transport.body.socket_of` finds the socket.
    ``has_more`` says that bytes had come beyond the end of the answer, ``has_received`` that any byte came at all.

    :param patience: seconds that one read may take, or None for any number.
    :param end: when all must have been read (``time.monotonic()``), or None if only ``patience`` counts.
    :param held: a file over the socket, which keeps the socket open while http.client has closed its connection.
    """

    def __init__(
        self,
        sock: Any,
        *,
        patience: Optional[float],
        end: Optional[float],
        begun: bytes = b"",
        held: Optional[io.RawIOBase] = None,
    ) -> None:
        self._begun = memoryview(begun)
        self._sock = sock
        self._patience = patience
        self._end = end
        self._held = held
        self._is_ended = False
        self.has_received = bool(begun)
        self.has_more = False

    @classmethod
    def over(cls, sock: Any) -> Source:
        """Return the source of one answer of ``sock``. The head must come within the socket's time limit."""
        patience = sock.gettimeout()
        end = None if patience is None else time.monotonic() + patience
        return cls(sock, patience=patience, end=end, held=sock.makefile("rb", buffering=0))

    def makefile(self, mode: str) -> io.BufferedReader:
        return _Buffer(self, READ_SIZE)

    def limit_reads_only(self) -> None:
        """Limit each read from now on, no longer all of them together."""
        if self._end is not None:
            self._end = None
            with contextlib.suppress(OSError):
                self._sock.settimeout(self._patience)

    def note_rest(self, buffer: io.BufferedReader) -> None:
        """Note whether bytes lie beyond the end of the answer. From now on ``buffer`` gets no more."""
        self._is_ended = True
        self.has_more = bool(self._begun) or bool(buffer.peek(1)) or _has_decrypted(self._sock)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self._is_ended:
            return 0
        if self._begun:
            count = min(len(buffer), len(self._begun))
            buffer[:count] = self._begun[:count]
            self._begun = self._begun[count:]
            return count
        if self._end is not None:
            left = self._end - time.monotonic()
            if left <= 0:
                raise socket.timeout("timed out")
            self._sock.settimeout(min(left, math.inf if self._patience is None else self._patience))
        count = cast(int, self._sock.recv_into(buffer))
        self.has_received = self.has_received or count > 0
        return count

    def close(self) -> None:
        held, self._held = self._held, None
        if held is not None:
            held.close()
        super().close()


def _has_decrypted(sock: Any) -> bool:
    """Return True if TLS holds bytes that have left the socket and were not read yet."""
    pending = getattr(sock, "pending", None)
    with contextlib.suppress(OSError, ValueError):
        return pending is not None and pending() > 0
    return False


class _Buffer(io.BufferedReader):
    """Let http.client read a :class:`Source` as a file. It is closed as soon as the answer has been read."""

    def close(self) -> None:
        if not self.closed:
            cast(Source, self.raw).note_rest(self)
        super().close()


class FinalResponse(http.client.HTTPResponse):
    """Read past interim answers, of which http.client knows only 100 (RFC 9110, section 15.2)."""

    def __init__(self, source: Source, *args: Any, **options: Any) -> None:
        self.source = source
        super().__init__(cast(Any, source), *args, **options)

    @property
    def is_in_step(self) -> bool:
        """Return True if the connection is ready for the next answer, now that this one has been read whole."""
        return self.status >= 200 and not self.source.has_more

    def _read_status(self) -> Tuple[str, int, str]:
        while True:
            version, status, _ = cast(Any, super())._read_status()
            if not 100 <= status < 200 or status == http.client.SWITCHING_PROTOCOLS:
                # Not the server's own words, which error trackers record: they may quote the request.
                return version, status, http.client.responses.get(status, "")
            self._skip_head()

    def _skip_head(self) -> None:
        for _ in range(_MAX_LINES):
            line = self.fp.readline(_MAX_LINE + 1)
            if len(line) > _MAX_LINE:
                raise http.client.LineTooLong("header line")
            if line in (b"\r\n", b"\n", b""):
                return
        raise http.client.HTTPException(f"an interim answer has more than {_MAX_LINES} header lines")


class ConnectionResponse(FinalResponse):
    """Read an answer for an http.client connection. The head must come within the time limit of the socket."""

    def __init__(self, sock: Any, *args: Any, **options: Any) -> None:
        super().__init__(Source.over(sock), *args, **options)

    def begin(self) -> None:
        super().begin()
        self.source.limit_reads_only()
