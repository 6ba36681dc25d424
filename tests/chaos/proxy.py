"""A proxy that misbehaves on purpose: it forwards HTTP to the platform and injects faults drawn from a seed."""

from __future__ import annotations

import collections
import contextlib
import datetime
import json
import random
import re
import selectors
import socket
import struct
import threading
import time
from typing import Collection, Counter, Dict, List, Mapping, NamedTuple, Optional, Set, Tuple

from .pages import ENDPOINTS, Page, draw_interim, draw_page, endpoint_of

#: Fault → its weight among the faults of calls.
CALL_FAULTS: Mapping[str, float] = {
    "latency": 3,
    "error-500": 2,
    "error-503": 2,
    "error-503-retry-after": 1,
    "bad-gateway-after": 2,
    "reset-before": 2,
    "reset-in-request": 2,
    "reset-after-request": 3,
    "reset-in-answer": 2,
    "half-answer": 2,
    "stall": 1,
    "stall-in-answer": 1,
    "throttle": 1,
    "duplicate": 2,
}
#: Fault → its weight among the faults of streams.
STREAM_FAULTS: Mapping[str, float] = {
    "stream-503": 1,
    "stream-reset-before": 1,
    "stream-half-head": 1,
    "stream-cut": 4,
    "stream-reset": 4,
    "stream-stall": 1,
    "stream-pause": 2,
    "stream-dribble": 2,
    "stream-buffer": 2,
}
#: A lie told to a completion, with a rate of its own: "no such task".
GONE = "gone"
#: Answers of something in between: in place of the platform's, before or after it has acted.
PAGES = ("page", "page-after")
#: Endpoint → how often it gets pages, compared with completions; ten times where it is not here.
_OFTEN: Mapping[str, float] = {"complete": 1.0, "heartbeat": 5.0, "progress": 5.0, "release": 5.0, "stream": 5.0}
#: Interim answers before the real one.
INTERIM = "interim"

_STREAM_PATH = "/api/v1/tasks/stream"
_COMPLETION = re.compile(r"/api/v1/tasks/([^/?]+)/complete$")
_GIVEN = re.compile(rb'"task_id":"([^"]+)"')
_RUN = re.compile(rb'"run":"([^"]+)"')
_WORKER = re.compile(rb'"worker_id":"([^"]+)"')
_ATTEMPT = re.compile(rb'"attempt":([0-9]+)')
_HEARTBEAT = re.compile(r"/api/v1/installations/([^/?]+)/heartbeat\Z")
_WORKER_IN_QUERY = re.compile(r"[?&]worker_id=([^&]+)")
_LONGEST_ID = 300
_PATIENCE = 30.0
#: Seconds within which a client still waits for its answer.
_SURELY_READ = 0.4
#: Seconds after which a client has read the head of its stream.
_SURELY_OPEN = 1.0


class Rule(NamedTuple):
    """Which faults the paths that begin with ``prefix`` get, and how often (0 to 1)."""

    prefix: str
    rate: float
    weights: Mapping[str, float]


class Seen(NamedTuple):
    """What passed, in this order: a task ``given``, a result ``posted``, its answer ``accepted`` or ``dropped``.

    An answer is noted after all of it was sent, the others before. ``at`` is the monotonic time of the first and third.
    """

    kind: str
    task_id: str
    key: str = ""
    worker_id: str = ""
    run: str = ""
    attempt: int = 0
    at: float = 0.0


class Beat(NamedTuple):
    """A heartbeat whose answer is forwarded: when, whose, and when its lease ends (both by the wall clock)."""

    at: float
    installation_id: str
    ends: Optional[float]


class _Gone(Exception):
    """One of the two sides has ended the connection, or a fault has."""


class _Peer:
    """One side of a connection, read by head and body."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._buffer = b""
        sock.settimeout(_PATIENCE)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def head(self) -> bytes:
        """Bytes up to and with the empty line."""
        while True:
            end = self._buffer.find(b"\r\n\r\n")
            if end >= 0:
                head, self._buffer = self._buffer[: end + 4], self._buffer[end + 4 :]
                return head
            self._more()

    def exactly(self, size: int) -> bytes:
        while len(self._buffer) < size:
            self._more()
        data, self._buffer = self._buffer[:size], self._buffer[size:]
        return data

    def rest(self) -> bytes:
        """What has been read and not been asked for."""
        data, self._buffer = self._buffer, b""
        return data

    def is_stale(self) -> bool:
        """Whether an idle connection has been closed by the other side."""
        self.sock.setblocking(False)
        try:
            return self.sock.recv(1, socket.MSG_PEEK) == b""
        except (BlockingIOError, InterruptedError):
            return False
        except OSError:
            return True
        finally:
            self.sock.settimeout(_PATIENCE)

    def reset(self) -> None:
        """Close with RST instead of FIN."""
        with contextlib.suppress(OSError):
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def _more(self) -> None:
        piece = self.sock.recv(65536)
        if not piece:
            raise _Gone
        self._buffer += piece


class _Head:
    """What the proxy needs of a request's or an answer's head."""

    def __init__(self, raw: bytes) -> None:
        lines = raw.decode("latin-1").split("\r\n")
        self.first = lines[0].split(" ", 2)
        self.fields: Dict[str, str] = {}
        for line in lines[1:]:
            name, _, value = line.partition(":")
            self.fields[name.lower()] = value.strip()

    @property
    def length(self) -> int:
        return int(self.fields.get("content-length") or 0)


def _answer(status: int, reason: str, *headers: str, code: str = "INJECTED") -> bytes:
    body = f'{{"error":"injected","message":"a fault of the proxy","code":"{code}"}}'.encode()
    lines = [f"HTTP/1.1 {status} {reason}", "Content-Type: application/json", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


class FaultProxy:
    """Forwards connections to ``target`` on 127.0.0.1, one thread each, and misbehaves by its rules.

    The faults of a connection are drawn from ``Random(seed, its number)``, so that a repetition with the same order of
    connections meets the same faults. Any thread may change ``target``, ``rules`` and ``gone_rate``; ``_lock`` guards
    the listener and the set of connections.
    """

    def __init__(self, target: int, seed: object = 0, *, longest_stall: float = 1.5) -> None:
        self.target = target
        self.rules: List[Rule] = []
        self.gone_rate = 0.0
        #: Endpoint → the share of its requests that get a page, and of all answers that follow interim ones.
        self.page_rates: Mapping[str, float] = {}
        self.interim_rate = 0.0
        #: True while every heartbeat gets a page.
        self.has_lapse = False
        #: Kind of page by endpoint → how often it was sent.
        self.pages: Counter[Tuple[str, str]] = collections.Counter()
        self.beats: List[Beat] = []
        #: When and for which path a request was sent on a connection that had gone silent before.
        self.lost: List[Tuple[float, str]] = []
        #: The workers whose stream has been open.
        self.connected: Set[str] = set()
        #: While true, calls are read and neither forwarded nor answered, as by a network that loses every packet.
        self.swallowing = False
        self.injected: Counter[str] = collections.Counter()
        self.calls = 0
        self.connections = 0
        #: Requests that came while the platform was away.
        self.unreached = 0
        #: Tasks whose completion was answered with a lie.
        self.gone: Set[str] = set()
        self.seen: List[Seen] = []
        self._seed = seed
        self._longest_stall = longest_stall
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._open: Dict[int, _Connection] = {}
        self._threads: List[threading.Thread] = []
        # Holds the port while nobody listens, so that an outage refuses connections and nobody else takes the port.
        self._guard = _bound(0)
        self.port: int = self._guard.getsockname()[1]
        self._listener: Optional[socket.socket] = None
        self.listen()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def set_faults(
        self,
        calls: float,
        stream: float,
        gone: float = 0.0,
        *,
        pages: float = 0.0,
        interim: float = 0.0,
        without: Collection[str] = (),
    ) -> None:
        """Set the rates for calls, for connections of the stream, of lies about completions, of pages and of interim
        answers; 0 forwards faithfully.

        Endpoints that are seldom called get more pages than completions.
        """
        self.gone_rate = gone
        self.page_rates = {name: min(0.5, _OFTEN.get(name, 10.0) * pages) for name in ENDPOINTS} if pages else {}
        self.interim_rate = interim
        self.rules = [
            Rule(prefix, rate, {fault: weight for fault, weight in weights.items() if fault not in without})
            for prefix, rate, weights in ((_STREAM_PATH, stream, STREAM_FAULTS), ("/", calls, CALL_FAULTS))
        ]

    # -- outages ------------------------------------------------------------------------------------------------------

    def listen(self) -> None:
        """Take connections (again)."""
        with self._lock:
            if self._listener is not None or self._ended.is_set():
                return
            self._listener = listener = _bound(self.port)
            listener.listen(256)
            self._start(self._accept, listener)

    def refuse(self) -> None:
        """Begin an outage: every connection is reset and new ones are refused, until :meth:`listen`."""
        self._stop_listening()
        self.injected["outage"] += 1
        for connection in self._now_open():
            connection.cut()

    @property
    def is_listening(self) -> bool:
        with self._lock:
            return self._listener is not None

    def silence(self) -> int:
        """Fail over: every open connection goes silent without an end, new ones work. Return how many were open.

        What comes on a silent connection is read and lost. Some of those to the platform end at once, others stay
        until the client gives its side up.
        """
        connections = self._now_open()
        for connection in connections:
            connection.silent = True
        self.injected["silence"] += 1
        return len(connections)

    def close(self) -> None:
        self._ended.set()
        self._stop_listening()
        for connection in self._now_open():
            connection.cut()
        for thread in self._threads:
            thread.join(_PATIENCE)
        self._guard.close()

    def __enter__(self) -> FaultProxy:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()

    def _stop_listening(self) -> None:
        with self._lock:
            listener, self._listener = self._listener, None
        if listener is not None:
            # Closing alone would leave the thread in accept().
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()

    def _now_open(self) -> List[_Connection]:
        with self._lock:
            return list(self._open.values())

    def _start(self, function: object, *args: object) -> None:
        thread = threading.Thread(target=function, args=args, name="chaos-proxy", daemon=True)  # type: ignore[arg-type]
        self._threads = [one for one in self._threads if one.is_alive()]
        self._threads.append(thread)
        thread.start()

    def _accept(self, listener: socket.socket) -> None:
        while not self._ended.is_set():
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            with self._lock:
                if self._listener is not listener:
                    sock.close()
                    return
                self.connections += 1
                connection = _Connection(self, sock, random.Random(f"{self._seed}/{self.connections}"))
                self._open[id(connection)] = connection
                self._start(self._serve, connection)

    def _serve(self, connection: _Connection) -> None:
        try:
            connection.run()
        except (OSError, ValueError, _Gone):
            pass
        finally:
            connection.close()
            with self._lock:
                self._open.pop(id(connection), None)

    # -- used by connections ------------------------------------------------------------------------------------------

    def draw(self, dice: random.Random, path: str, is_completion: bool) -> Optional[str]:
        """The fault of a request, if it gets one; counted."""
        fault: Optional[str] = None
        page_rate = self.page_rates.get(endpoint_of(path) or "", 0.0) if self.page_rates else 0.0
        if self.has_lapse and endpoint_of(path) == "heartbeat":
            page_rate = 1.0
        if is_completion and dice.random() < self.gone_rate:
            fault = GONE
        elif page_rate and dice.random() < page_rate:
            fault = PAGES[dice.random() < 0.3]
        else:
            rule = next((rule for rule in self.rules if path.startswith(rule.prefix)), None)
            if rule is not None and dice.random() < rule.rate:
                fault = dice.choices(list(rule.weights), list(rule.weights.values()))[0]
        if fault is not None:
            self.injected[fault] += 1
        return fault

    def draw_page(self, dice: random.Random, path: str, is_proven: bool) -> Page:
        """The page that a request gets; counted."""
        endpoint = endpoint_of(path) or ""
        page = draw_page(dice, endpoint, is_proven=is_proven)
        self.pages[endpoint, page.name] += 1
        return page

    def is_proven(self, path: str, worker_id: str = "") -> bool:
        """Return True if this endpoint has answered before, so that a client knows the platform's address."""
        endpoint = endpoint_of(path)
        if endpoint == "stream":
            return worker_id in self.connected
        return endpoint != "bootstrap"

    def draw_interim(self, dice: random.Random) -> bytes:
        """What comes before an answer's head, mostly nothing."""
        if not self.interim_rate or dice.random() >= self.interim_rate:
            return b""
        self.injected[INTERIM] += 1
        return draw_interim(dice)

    @property
    def is_ended(self) -> bool:
        return self._ended.is_set()

    def sleep(self, seconds: float) -> None:
        self._ended.wait(seconds)

    def stall(self, dice: random.Random) -> None:
        self.sleep(dice.uniform(0.1, self._longest_stall))


class _Connection:
    """One client's connection and, while it is of use, one to the platform. All but ``cut`` is its thread's."""

    def __init__(self, proxy: FaultProxy, sock: socket.socket, dice: random.Random) -> None:
        self._proxy = proxy
        self._client = _Peer(sock)
        self._upstream: Optional[_Peer] = None
        self._dice = dice
        #: True after a failover; any thread sets it.
        self.silent = False

    def run(self) -> None:
        while True:
            raw = self._client.head()
            head = _Head(raw)
            raw += self._client.exactly(head.length)
            if self.silent:
                self._proxy.lost.append((time.time(), head.first[1]))
            self._check_silent()
            self._proxy.calls += 1
            if head.first[1].partition("?")[0] == _STREAM_PATH:
                worker = _WORKER_IN_QUERY.search(head.first[1])
                self._stream(raw, worker.group(1) if worker else "")
                return
            self._call(head, raw)

    def cut(self) -> None:
        """End both sides with RST; from any thread."""
        for peer in (self._client, self._upstream):
            if peer is not None:
                with contextlib.suppress(OSError):
                    peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                # The thread that reads wakes and closes.
                with contextlib.suppress(OSError):
                    peer.sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._client.sock.close()
        self._hang_up()

    def _send(self, data: bytes) -> None:
        """Send to the client, unless this connection has gone silent."""
        self._check_silent()
        self._client.sock.sendall(data)

    def _reset(self) -> None:
        self._check_silent()
        self._client.reset()

    def _check_silent(self) -> None:
        """On a silent connection: read and lose what comes until the client gives it up, and then end."""
        if not self.silent:
            return
        if self._dice.random() < 0.5:
            self._hang_up()
        sock = self._client.sock
        sock.settimeout(0.2)
        end = time.monotonic() + 4 * _PATIENCE
        while not self._proxy.is_ended and time.monotonic() < end:
            try:
                if not sock.recv(65536):
                    break
            except socket.timeout:
                continue
        raise _Gone

    # -- calls --------------------------------------------------------------------------------------------------------

    def _call(self, head: _Head, raw: bytes) -> None:
        proxy, dice = self._proxy, self._dice
        came = time.monotonic()
        path = head.first[1].partition("?")[0]
        match = _COMPLETION.match(path)
        posted: Optional[Seen] = None
        if match:
            key = head.fields.get("idempotency-key", "")
            attempt = int(_found(_ATTEMPT, raw) or 0)
            posted = Seen("posted", match.group(1), key, _found(_WORKER, raw), _found(_RUN, raw), attempt)
            proxy.seen.append(posted)
        fault = proxy.draw(dice, path, posted is not None)
        if proxy.swallowing:
            proxy.injected["swallowed"] += 1
            proxy.sleep(1.0)
            raise _Gone
        if fault == "reset-before":
            self._reset()
            raise _Gone
        interim = proxy.draw_interim(dice)
        if fault == "page":
            self._send_page(path, interim)
            return
        if fault in _INSTEAD:
            self._send(interim + _INSTEAD[fault])
            if fault == GONE and posted is not None:
                proxy.gone.add(posted.task_id)
                proxy.seen.append(posted._replace(kind="dropped"))
            return
        if fault == "latency":
            proxy.sleep(dice.uniform(0.005, 0.15))
        upstream = self._dial()
        if fault == "reset-in-request":
            upstream.sock.sendall(raw[: dice.randrange(1, len(raw))])
            self._reset()
            upstream.reset()
            raise _Gone
        upstream.sock.sendall(raw)
        if fault == "reset-after-request":
            self._reset()
        status, answer = self._read_answer(upstream)
        if fault == "reset-after-request":
            raise _Gone
        if fault == "duplicate":
            self._dial().sock.sendall(raw)
            status, answer = self._read_answer(upstream)
        if fault == "page-after":
            self._send_page(path, interim)
            return
        if interim:
            # Early, as a proxy sends it, or together with the answer.
            self._send(interim)
            proxy.sleep(dice.choice((0.0, 0.02)))
        if 200 <= status < 300:
            self._note_beat(path, answer)
        self._answer(answer, fault)
        if posted is not None and fault != "bad-gateway-after" and time.monotonic() - came < _SURELY_READ:
            if status in (404, 410):
                proxy.seen.append(posted._replace(kind="dropped"))
            elif 200 <= status < 300:
                proxy.seen.append(posted._replace(kind="accepted", at=time.monotonic()))

    def _send_page(self, path: str, interim: bytes, worker_id: str = "") -> None:
        page = self._proxy.draw_page(self._dice, path, self._proxy.is_proven(path, worker_id))
        self._send(interim + page.data)
        if page.is_last:
            raise _Gone

    def _note_beat(self, path: str, answer: bytes) -> None:
        match = _HEARTBEAT.match(path)
        if match:
            ends = json.loads(answer.partition(b"\r\n\r\n")[2]).get("lease_expires_at")
            at = None if ends is None else datetime.datetime.fromisoformat(ends.replace("Z", "+00:00")).timestamp()
            self._proxy.beats.append(Beat(time.time(), match.group(1), at))

    def _answer(self, answer: bytes, fault: Optional[str]) -> None:
        dice = self._dice
        cut = dice.randrange(1, len(answer))
        if fault in ("reset-in-answer", "half-answer"):
            self._send(answer[:cut])
            if fault == "reset-in-answer":
                self._reset()
            raise _Gone
        if fault == "bad-gateway-after":
            self._send(_answer(502, "Bad Gateway"))
        elif fault == "stall":
            self._proxy.stall(dice)
            self._send(answer)
        elif fault == "stall-in-answer":
            self._send(answer[:cut])
            self._proxy.stall(dice)
            self._send(answer[cut:])
        elif fault == "throttle":
            size = len(answer) // 20 + 1
            for start in range(0, len(answer), size):
                self._send(answer[start : start + size])
                self._proxy.sleep(0.01)
        else:
            self._send(answer)

    def _read_answer(self, upstream: _Peer) -> Tuple[int, bytes]:
        raw = upstream.head()
        head = _Head(raw)
        raw += upstream.exactly(head.length)
        if head.fields.get("connection", "").lower() == "close":
            self._hang_up()
        return int(head.first[1]), raw

    def _dial(self) -> _Peer:
        """The connection to the platform; where there is none, the client's ends too."""
        if self._upstream is not None and self._upstream.is_stale():
            self._hang_up()
        if self._upstream is None:
            try:
                self._upstream = _Peer(socket.create_connection(("127.0.0.1", self._proxy.target), 5.0))
            except OSError:
                self._proxy.unreached += 1
                if self._dice.random() < 0.5:
                    self._send(_answer(502, "Bad Gateway", "Connection: close"))
                else:
                    self._reset()
                raise
        return self._upstream

    def _hang_up(self) -> None:
        upstream, self._upstream = self._upstream, None
        if upstream is not None:
            upstream.sock.close()

    # -- the stream ---------------------------------------------------------------------------------------------------

    def _stream(self, raw: bytes, worker_id: str) -> None:
        proxy, dice = self._proxy, self._dice
        fault = proxy.draw(dice, _STREAM_PATH, False)
        interim = proxy.draw_interim(dice)
        if fault in PAGES:
            self._send_page(_STREAM_PATH, interim, worker_id)
            return
        if fault == "stream-503":
            self._send(_answer(503, "Service Unavailable", "Connection: close"))
            return
        if fault == "stream-reset-before":
            self._reset()
            return
        upstream = self._dial()
        upstream.sock.sendall(raw)
        head = upstream.head()
        if fault == "stream-half-head":
            self._send(head[: dice.randrange(1, len(head))])
            return
        self._send(interim + head)
        # Small numbers of bytes as likely as large ones: a cut may hit the first event or the thousandth.
        self._pump(upstream, fault, int(2.0 ** dice.uniform(0.0, 18.0)), worker_id)

    def _pump(self, upstream: _Peer, fault: Optional[str], after: int, worker_id: str) -> None:
        """Forward events until a side ends; ``fault`` happens when ``after`` bytes have passed."""
        client = self._client
        opened = time.monotonic()
        passed = 0
        known = b""
        data = upstream.rest()
        with selectors.DefaultSelector() as selector:
            selector.register(client.sock, selectors.EVENT_READ)
            selector.register(upstream.sock, selectors.EVENT_READ)
            while True:
                if data:
                    known = self._note_given(known + data)
                    if fault is not None and passed + len(data) >= after:
                        self._send(data[: after - passed])
                        data = data[after - passed :]
                        self._break(fault, upstream, data)
                        fault = None
                    else:
                        self._send(data)
                    passed += len(data)
                ready = {key.fileobj for key, _ in selector.select(_PATIENCE)}
                self._check_silent()
                if time.monotonic() - opened > _SURELY_OPEN:
                    self._proxy.connected.add(worker_id)
                if client.sock in ready and not client.sock.recv(65536):
                    return
                data = b""
                if upstream.sock in ready:
                    data = upstream.sock.recv(262144)
                    if not data:
                        return

    def _break(self, fault: str, upstream: _Peer, data: bytes) -> None:
        """Have the fault of a stream; ``data`` has not been forwarded yet."""
        if fault in ("stream-cut", "stream-reset"):
            if fault == "stream-reset":
                self._reset()
            raise _Gone
        if fault == "stream-stall":
            # As of a half-open connection: nothing comes, and then it breaks.
            self._proxy.stall(self._dice)
            self._reset()
            raise _Gone
        if fault == "stream-dribble":
            for start in range(min(len(data), 300)):
                self._send(data[start : start + 1])
                self._proxy.sleep(0.001)
            self._send(data[300:])
        elif fault == "stream-pause":
            self._proxy.stall(self._dice)
            self._send(data)
        else:
            # A proxy that buffers: what comes within a while is sent in one piece.
            self._proxy.sleep(0.3)
            self._send(data)

    def _note_given(self, text: bytes) -> bytes:
        """Note the tasks in ``text``; the end that may hold the beginning of another one."""
        end = 0
        for match in _GIVEN.finditer(text):
            self._proxy.seen.append(Seen("given", match.group(1).decode(), at=time.monotonic()))
            end = match.end()
        return text[max(end, len(text) - _LONGEST_ID) :]


_INSTEAD = {
    "error-500": _answer(500, "Internal Server Error"),
    "error-503": _answer(503, "Service Unavailable"),
    "error-503-retry-after": _answer(503, "Service Unavailable", "Retry-After: 1"),
    GONE: _answer(404, "Not Found", code="TASK_NOT_FOUND"),
}


def _found(pattern: re.Pattern[bytes], text: bytes) -> str:
    match = pattern.search(text)
    return match.group(1).decode() if match else ""


def _bound(port: int) -> socket.socket:
    sock = socket.socket()
    try:
        # Two sockets may share the port as long as not both listen.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", port))
    except BaseException:
        sock.close()
        raise
    return sock
