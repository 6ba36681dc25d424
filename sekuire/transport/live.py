"""Read an answer as it arrives, and let another thread end it at once."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import Any, Dict, Iterator, Mapping, Optional, Union

import requests
import urllib3

from .._internal.clock import time
from .._internal.scrub import scrub_bytes
from ..config import ConnectionConfig
from ..errors import TransportError
from ..secret import without_frames
from ..wire import protocol
from .body import BodyError, arriving, limit_reads, read_body, socket_of
from .connections import Adapter, leave_to_parent
from .http import Credential, Route, without_header
from .problems import describe

#: Most bytes read of an answer that is an error, not a stream.
_MAX_ERROR = 65536


class Waker:
    """End a blocked read, handshake or wait for headers from another thread, within milliseconds.

    Closing a response does not wake its reader, but a shutdown of the socket does. So this keeps a ``dup()`` of the
    socket, which any thread may shut down while only the reader closes the original.
    """

    # Threads: the connecting thread attaches, any thread wakes. `_lock` guards the dup and the flag. The shutdown does
    # not block.

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._dup: Optional[socket.socket] = None
        self._woken = False

    def attach(self, sock: socket.socket) -> None:
        """Note a new socket. After :meth:`wake` it is ended at once."""
        copy = sock.dup()
        leave_to_parent(copy)
        with self._lock:
            old, self._dup = self._dup, copy
            woken = self._woken
        if old is not None:
            old.close()
        if woken:
            self.wake()

    def wake(self) -> None:
        """End the present connection, and every later one."""
        with self._lock:
            self._woken = True
            dup, self._dup = self._dup, None
        if dup is not None:
            with contextlib.suppress(OSError):
                dup.shutdown(socket.SHUT_RDWR)
            dup.close()

    def detach(self) -> None:
        """Forget the socket. The reader calls this when it has finished with the connection."""
        with self._lock:
            dup, self._dup = self._dup, None
        if dup is not None:
            dup.close()


class LiveAnswer:
    """Hold the headers of an answer, and read its bytes as they come. Only the reading thread uses it."""

    def __init__(
        self,
        response: requests.Response,
        waker: Waker,
        host: str,
        patience: float,
        credential: Optional[Credential] = None,
    ) -> None:
        # Not the response itself, which refers to its request and so to the token.
        self._raw = response.raw
        self._waker = waker
        self._patience = patience
        self._credential = credential
        self._host = host
        self._error_body: Optional[bytes] = None
        self.status: int = response.status_code
        self.headers: Mapping[str, str] = response.headers

    def chunks(self, idle_timeout: float) -> Iterator[bytes]:
        """Yield the pieces of the body, each as soon as it comes.

        :param idle_timeout: seconds without a byte after which the connection counts as dead.
        :raises TransportError: the connection broke or was silent for too long, or the body cannot be decoded.
        """
        limit_reads(socket_of(self._raw), idle_timeout)
        pieces = arriving(self._raw)
        while True:
            problem: Optional[TransportError] = None
            piece: Optional[bytes] = None
            try:
                piece = next(pieces, None)
            except BodyError as error:
                problem = TransportError(f"{self._host}: {error}")
            except socket.timeout:  # Not TimeoutError before Python 3.10.
                problem = TransportError(f"{self._host} was silent for {idle_timeout:g} s")
            except Exception as error:  # noqa: BLE001
                problem = describe(error, self._host)
            if problem is not None:
                raise problem
            if piece is None:
                return
            yield piece

    @property
    def body(self) -> bytes:
        """Return the body of an answer that is not a stream, at most 64 KiB. Empty if it cannot be read in time."""
        if self._error_body is None:
            self._error_body = self._read_error()
        return self._error_body

    def retry_after(self) -> Optional[float]:
        """Return the seconds of ``Retry-After``, or None."""
        headers = self.headers
        return protocol.retry_after(headers.get("Retry-After"), protocol.utc_now(), headers.get("Date"))

    def _read_error(self) -> bytes:
        try:
            content = read_body(self._raw, _MAX_ERROR, time.monotonic() + self._patience)
        except Exception:  # noqa: BLE001
            return b""
        return scrub_bytes(content if self._credential is None else without_header(self._credential()[1], content))

    def close(self) -> None:
        """Close the connection."""
        # A frame of an error may hold this object, and what another server says may hold a token.
        self._error_body = b""
        self._raw.close()
        self._raw.release_conn()
        self._waker.detach()


class LiveClient:
    """Open one stream after the other, over a session of its own.

    Only the stream's thread uses it, but any thread may call ``wake``. ::

        live = LiveClient(config)
        answer = live.open("/api/v1/tasks/stream", credential=None, headers={})
        for piece in answer.chunks(60.0):
            print(piece)
    """

    def __init__(self, config: ConnectionConfig) -> None:
        self.route = Route(config)
        self.endpoints = config.endpoints
        self._waker = Waker()
        self._timeouts = (config.connect_timeout, config.read_timeout)
        self._session = self.route.session(Adapter(1, proxy=self.route.proxy, watcher=self._waker))

    def open(
        self, path: str, *, credential: Optional[Credential], headers: Mapping[str, Union[str, bytes]]
    ) -> LiveAnswer:
        """Request a stream. Return its answer as soon as the headers have come.

        :raises TransportError: no answer came.
        """
        outcome = self._open(path, credential, headers)
        if isinstance(outcome, LiveAnswer):
            return outcome
        raise outcome

    def wake(self) -> None:
        """End the stream that is open, and every later one."""
        self._waker.wake()

    def close(self) -> None:
        """Close the session. The stream's thread calls this last."""
        self._session.close()
        self._waker.detach()

    def _open(
        self, path: str, credential: Optional[Credential], extra: Mapping[str, Union[str, bytes]]
    ) -> Union[LiveAnswer, BaseException]:
        # Returned, not raised: see HttpClient._exchange.
        try:
            return self._request(path, credential, extra)
        except Exception as error:  # noqa: BLE001
            problem: BaseException = describe(error, self.route.host)
        except BaseException as error:  # noqa: BLE001
            problem = without_frames(error)
        self._waker.detach()
        return problem

    def _request(
        self, path: str, credential: Optional[Credential], extra: Mapping[str, Union[str, bytes]]
    ) -> LiveAnswer:
        headers: Dict[str, Any] = {
            "User-Agent": protocol.USER_AGENT,
            "Accept": protocol.STREAM_TYPE,
            # A compressing proxy would hold events back until it has a block's worth.
            "Accept-Encoding": "identity",
            "Cache-Control": "no-cache",
            **extra,
        }
        if credential is not None:
            name, value = credential()
            headers[name] = value
        timeout = urllib3.Timeout(connect=self._timeouts[0], read=self._timeouts[1])
        response = self.route.send(self._session, "GET", path, headers, None, timeout)
        return LiveAnswer(response, self._waker, self.route.host, self._timeouts[1], credential)
