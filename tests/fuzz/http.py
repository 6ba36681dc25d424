"""Attack a local platform over HTTP, with requests made from a seed: ``tox -e fuzz -- --runs 0 --requests 20000``.

A request is built from the contract and then made wrong: odd values in its JSON, other headers and credentials, another
framing, replaced bytes, a cut. Nothing here needs atheris: the suite runs a short attack.
"""

from __future__ import annotations

import collections
import contextlib
import json
import logging
import os
import random
import socket
import sys
import threading
import time
from typing import Any, Callable, Counter, Dict, Iterator, List, NamedTuple, Optional, Tuple

from sekuire.local import LocalPlatform
from sekuire.wire.protocol import API_PREFIX, DEFAULT_ENDPOINTS, approval_digest, approval_id

from ..contract.client import Client
from ..support.waiting import GUARD

#: Threads of the platform: its limit for requests, beside those of streams.
MAX_STREAMS = 8
MAX_THREADS = MAX_STREAMS + 32 + 4
#: What the kept requests, tasks and heartbeats may need.
MAX_MEMORY = 64 * 1024 * 1024
#: A new installation after so many requests: commands and revocations use one up.
REQUESTS_OF_AN_INSTALLATION = 100

_ODD: Tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**400, -(10**30), 1.5, 1e308, -0.0, "", "x", "\x00", "\n", "..", "é",
    "\U0001f600", "x" * 300, "x" * 70_000, [], {}, [[]], {"a": {}}, ["x"], [None], {"": ""}, "running", "paused",
    "completed", "failed", "terminate", "2026-03-01T12:00:00Z", "0001-01-01T00:00:00+14:00",
    "9999-12-31T23:59:59-14:00",
)  # fmt: skip
#: What json.dumps() does not write.
_RAW = (
    b"NaN", b"-Infinity", b"1e999", b"-1e999", b'"\\ud800"', b'"\\udc00x"', b"9" * 5000, b"[" * 3000 + b"]" * 3000,
    b'{"a":' * 900 + b"1" + b"}" * 900, b'{"a":1,"a":2}', b'"\xff"', b'"\xed\xa0\x80"', b"\xef\xbb\xbf1", b"01",
    b"'x'", b"",
)  # fmt: skip
_IDS = (
    "i", "..", ".", "%2e%2e", "%2F", "%00", "%0a", "%ff", "%ed%a0%80", "%", "%zz", "x" * 300,
    "\xe9", "a%E2%80%A8b", "~", ";", "a;b=c", "a:b@c", "[", "[::1", "'%20OR%201=1--",
)  # fmt: skip
_QUERIES = (
    "", "?", "?limit=1", "?limit=0", "?limit=-1", "?limit=000000001" + "9" * 5000, "?limit=%D9%A3", "?limit=1e3",
    "?before=x", "?after=" + "9" * 18, "?after=" + "9" * 30, "?status=queued&status=x", "?status[]=queued",
    "?capability=%ff", "?capability=%00", "?ids=" + "a," * 200, "?worker_id=w&max_in_flight=1",
    "?worker_id=w&max_in_flight=-1", "?worker_id=%00", "?capabilities=a,%2C,b", "?worker_id=w&capabilities=%ff%fe",
    "?event_type=x", "?severity=info&limit=5", "?" + "&" * 500, "?=&=", "?a=" + "b" * 9000,
    "?worker_id=w&agent_id=other", "?worker_id=w&installation_id=..", "??", "?%",
)  # fmt: skip
_HEADERS = (
    "Host: evil.example", "Host:", "Host : x", "Origin: http://evil.example", "Origin: null", "Expect: 100-continue",
    "Expect: 200-ok", "Content-Length: -1", "Content-Length: +5", "Content-Length: 5, 5", "Content-Length: 1_0",
    "Content-Length: 0x5", "Content-Length: " + "9" * 30, "Content-Length: " + "9" * 6000, "Content-Length: 99999999",
    "Content-Length: \u0665", "Transfer-Encoding: chunked", "Transfer-Encoding: gzip, chunked",
    "Transfer-Encoding: \x0bchunked", "Transfer-Encoding: identity", "transfer-encoding:chunked", "Connection: close",
    "Connection: keep-alive, close", "Connection: upgrade", "Upgrade: h2c", "X_API_KEY: x", "X-API-Key: \xff\xfe",
    "Authorization: Bearer", "Authorization: Bearer \xff", "Authorization: Basic eDp5", " folded: x", "\tfolded",
    "no colon", ": empty", "A" * 200 + ": x", "X-Big: " + "x" * 66_000, "X-Nul: a\x00b", "X-CR: a\rb",
    "Idempotency-Key: k", "Idempotency-Key: \xe9", "Idempotency-Key:", "Last-Event-ID: 1", "Last-Event-ID: -1",
    "Last-Event-ID: " + "9" * 40, "Content-Type: text/plain; charset=utf-16", "Accept-Encoding: gzip;q=x",
    "Cookie: a=b; ;",
)  # fmt: skip
_LINES = (
    "GET / HTTP/1.1", "GET /", "GET", "", "\x00", "GET / HTTP/0.9", "GET / HTTP/2.0", "PRI * HTTP/2.0",
    "GET / HTTP/1.1 x", "get / HTTP/1.1", "GET  / HTTP/1.1", "GET http://127.0.0.1/ HTTP/1.1", "GET //[ HTTP/1.1",
    "GET //evil.example/x HTTP/1.1", "OPTIONS * HTTP/1.1", "CONNECT a:1 HTTP/1.1", "TRACE / HTTP/1.1",
    "GET /#x HTTP/1.1", "GET /\xff HTTP/1.1", "GET /%ff HTTP/1.1", "GET / HTTP/1.01", "GET / HTTP/-1.1",
    "GET / HTTP/1.1\r", "\r\n\r\nGET / HTTP/1.1", "GET /" + "x" * 70_000 + " HTTP/1.1", "\x16\x03\x01\x02\x00\x01",
    "BREW /api/v1/tasks HTTP/1.1", "GET /a?b HTTP/1.0", "HEAD /api/v1/tasks HTTP/1.1", "A" * 40 + " / HTTP/1.1",
)  # fmt: skip
_CHUNKS = (
    b"ffffffffffffffff\r\n{}\r\n0\r\n\r\n", b"zz\r\n{}\r\n0\r\n\r\n", b"-2\r\n{}\r\n0\r\n\r\n",
    b"0x2\r\n{}\r\n0\r\n\r\n", b"2\n{}\n0\n\n", b"2\r\n{}0\r\n\r\n", b"2;a=b\r\n{}\r\n0\r\nT: x\r\n\r\n",
    b"2" + b";x" * 3000 + b"\r\n{}\r\n0\r\n\r\n", b"3\r\n{}\r\n0\r\n\r\n", b"0\r\n" + b"T: x\r\n" * 100 + b"\r\n",
    b"\r\n", b"1_0\r\n{}\r\n0\r\n\r\n", b"7fffffff\r\n{}", b"2 \r\n{}\r\n0\r\n\r\n",
)  # fmt: skip


class Outcome(NamedTuple):
    """What an attack showed."""

    requests: int
    seconds: float
    #: How many answers had each status; 0 is a connection that ended without one.
    statuses: Dict[int, int]
    #: What the platform logged as an error or with a traceback, and what its threads raised.
    problems: List[str]
    #: The seed's number of each request that was not answered in time or with a 500.
    suspects: List[int]
    most_threads: int
    #: Growth since the first tenth of the requests: bytes of memory (0 where that cannot be read), open descriptors.
    memory: int
    descriptors: int

    @property
    def is_fine(self) -> bool:
        """True if nothing failed, and nothing grew beyond what tasks and records that are kept explain."""
        return (
            not self.suspects
            and not self.problems
            and self.most_threads <= MAX_THREADS
            and self.memory < MAX_MEMORY
            and self.descriptors < 20
        )

    def __str__(self) -> str:
        statuses = ", ".join(f"{status or 'none'} {count:,}" for status, count in sorted(self.statuses.items()))
        return (
            f"{self.requests:,} requests in {self.seconds:.0f} s; answers: {statuses}; "
            f"{len(self.suspects)} with a 500 or without an end {self.suspects[:5]}, "
            f"{len(self.problems)} errors or tracebacks; at most {self.most_threads} threads; "
            f"memory {self.memory / 1048576:+.1f} MiB, {self.descriptors:+d} descriptors"
        )


def attack(requests: int, seed: int, on_progress: Optional[Callable[[int], None]] = None) -> Outcome:
    """Send so many requests to a platform of its own, and return what came of them."""
    statuses: Counter[int] = collections.Counter()
    suspects: List[int] = []
    most_threads = 0
    began = time.monotonic()
    options: Dict[str, Any] = {"max_streams": MAX_STREAMS, "head_timeout": 2.0, "body_timeout": 2.0}
    with _problems() as problems, LocalPlatform(**options) as platform:
        ground = Ground(platform)
        before = (0, 0)
        for number in range(requests):
            if number % REQUESTS_OF_AN_INSTALLATION == 0:
                ground.renew()
            rng = random.Random(f"{seed}:{number}")
            found = _send(ground, rng)
            statuses.update(found or [0])
            if 500 in found or -1 in found:
                suspects.append(number)
            most_threads = max(most_threads, _threads())
            if number == requests // 10:
                before = _memory(), _descriptors()
            if on_progress is not None and number % 1000 == 999:
                on_progress(number + 1)
        _settle(before[1])
        after = _memory(), _descriptors()
        assert ground.client.admin("GET", "/installations").status == 200
    seconds = time.monotonic() - began
    return Outcome(
        requests, seconds, dict(statuses), problems, suspects, most_threads, after[0] - before[0], after[1] - before[1]
    )


class Ground:
    """What requests refer to: credentials that are accepted, ids that exist."""

    def __init__(self, platform: LocalPlatform) -> None:
        self.client = Client(platform.url, platform.api_key)
        self.renew()

    def renew(self) -> None:
        installation = self.client.install("agent")
        self.token = installation.token
        self.ids = {"installation_id": installation.id, "workspace_id": "ws_local"}
        self.ids["task_id"] = self.client.submit("agent")
        self.ids["approval_id"] = self.question()["approval_id"]
        self.install_token = self.client.install_token("agent", 1000)
        self.refresh_token: str = installation.grant["refresh_token"]

    def question(self) -> Dict[str, Any]:
        """A request for approval, for the task."""
        task_id, details = self.ids["task_id"], {"amount": 5, "why": ["x"]}
        digest = approval_digest(task_id, "action", "pay", details)
        return {
            "approval_id": approval_id(task_id, digest, 1), "attempt": 1, "worker_id": "w", "digest": digest,
            "subject": {"kind": "action", "name": "pay"}, "details": details, "timeout_ms": 60_000,
        }  # fmt: skip

    def calls(self) -> List[Tuple[str, str, str, Dict[str, Any]]]:
        """Every call of the contract, so that it is accepted: method, endpoint, credential, body."""
        return [
            ("POST", "bootstrap", "", {
                "install_token": self.install_token, "agent_id": "agent", "capabilities": ["c"],
                "runtime_info": {"pid": 1},
            }),
            ("POST", "recover", "key", {"agent_id": "agent", "workspace_id": "ws_local", "runtime_info": {"pid": 1}}),
            ("POST", "refresh", "", {"refresh_token": self.refresh_token}),
            ("POST", "heartbeat", "token", {
                "status": "healthy", "uptime_seconds": 1, "platform": {"type": "bare_metal"}, "capabilities": ["c"],
                "workers": [{"worker_id": "w", "status": "healthy", "active_tasks": 0, "capabilities": []}],
            }),
            ("POST", "revoke", "key", {"reason": "x", "shutdown_timeout_ms": 5}),
            ("POST", "commands", "key", {"type": "pause", "reason": "x", "shutdown_timeout_ms": 5}),
            ("GET", "installations", "key", {}),
            ("POST", "install_tokens", "key", {"agent_id": "agent", "max_uses": 2}),
            ("POST", "tasks", "key", {
                "agent_id": "agent", "capability": "c", "input": {"a": [1]}, "timeout_ms": 5, "max_attempts": 2,
                "tool": "t",
            }),
            ("GET", "tasks", "key", {}),
            ("GET", "task", "key", {}),
            ("GET", "task_stream", "token", {}),
            ("POST", "complete", "token", {
                "task_id": self.ids["task_id"], "status": "completed", "output": {}, "execution_time_ms": 1,
                "attempt": 1,
            }),
            ("POST", "complete", "token", {
                "status": "failed", "error": {"code": "x", "message": "", "retryable": True}, "worker_id": "w",
            }),
            ("POST", "release", "token", {"attempt": 1, "worker_id": "w"}),
            ("POST", "progress", "token", {"progress": 0.5, "message": "x"}),
            ("POST", "approvals", "token", self.question()),
            ("GET", "approval", "token", {}),
            ("GET", "approval_list", "key", {}),
            ("POST", "decision", "key", {"decision": "approved", "reason": "x", "decided_by": "y"}),
            ("GET", "policy", "token", {}),
            ("PUT", "policy", "key", {"content": {"permissions": {"tools": {"allowed_tools": ["a"]}}}}),
            ("POST", "logs", "token", {"events": [{
                "sekuire_id": "s", "session_id": "s", "environment": "e", "event_type": "health", "severity": "info",
                "event_timestamp": "2026-03-01T12:00:00Z", "event_data": {},
            }]}),
            ("GET", "logs", "key", {}),
        ]  # fmt: skip


def request_of(ground: Ground, rng: random.Random) -> bytes:
    """Build one request, which may be several in a row or a part of one."""
    data = b"".join(_one(ground, rng) for _ in range(rng.choice((1, 1, 1, 1, 2, 5))))
    if rng.random() < 0.2:
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(data) + 1)
            replaced = bytes(rng.choice(b'\x00\r\n \t:;,/%#?"{}[]0-9\xff\x80') for _ in range(rng.randint(0, 3)))
            data = data[:at] + replaced + data[at + rng.randint(0, 3) :]
    if rng.random() < 0.1:
        data = data[: rng.randrange(len(data) + 1)]
    return data


def _one(ground: Ground, rng: random.Random) -> bytes:
    host, port = ground.client.address
    method, endpoint, credential, content = rng.choice(ground.calls())
    if rng.random() < 0.1:
        method = rng.choice(("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"))
    query = "?worker_id=w&max_in_flight=2" if endpoint == "task_stream" and rng.random() < 0.7 else ""
    line = f"{method} {_target(ground, DEFAULT_ENDPOINTS[endpoint], query, rng)} HTTP/1.1"
    if rng.random() < 0.08:
        line = rng.choice(_LINES)
    lines = [line, f"Host: {host}:{port}"]
    if rng.random() < 0.1:
        credential = rng.choice(("", "key", "token", "wrong"))
    lines += {
        "": [],
        "key": [f"X-API-Key: {ground.client.api_key}"],
        "token": [f"Authorization: Bearer {ground.token}"],
        "wrong": ["X-API-Key: sk_live_x"],
    }[credential]
    body = _body(content, rng) if content or rng.random() < 0.1 else b""
    kind = rng.random()
    if kind < 0.1:
        lines.append("Transfer-Encoding: chunked")
        body = rng.choice(_CHUNKS) if rng.random() < 0.6 else b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    elif kind < 0.95:
        lines.append(f"Content-Length: {len(body) + (rng.choice((-1, 1, 100)) if kind > 0.9 else 0)}")
    while rng.random() < 0.25:
        lines.insert(rng.randint(1, len(lines)), rng.choice(_HEADERS))
    if rng.random() < 0.02:
        lines += [f"X-{number}: x" for number in range(300)]
    return "\r\n".join([*lines, "", ""]).encode("utf-8" if rng.random() < 0.3 else "latin-1", "replace") + body


def _target(ground: Ground, path: str, query: str, rng: random.Random) -> str:
    for name, value in ground.ids.items():
        path = path.replace(f"{{{name}}}", rng.choice(_IDS) if rng.random() < 0.2 else value)
    if rng.random() < 0.03:
        path = rng.choice(
            ("/", "//", API_PREFIX, API_PREFIX + "//tasks", "/api/v2/tasks", path + "/", "/%2e%2e" + path)
        )
    return path + (rng.choice(_QUERIES) if rng.random() < 0.25 else query)


def _body(content: Dict[str, Any], rng: random.Random) -> bytes:
    body: Any = content
    for _ in range(rng.choice((0, 0, 1, 1, 2))):
        body = _changed(body, rng)
    body = json.dumps(body).encode()
    if rng.random() < 0.2:
        # In place of a value, or of everything.
        at = body.find(b": ", rng.randrange(max(1, len(body)))) + 2
        end = body.find(b",", at) if at > 1 else len(body)
        body = body[: at if at > 1 else 0] + rng.choice(_RAW) + body[end if end >= 0 else len(body) :]
    return bytes(body)


def _changed(value: Any, rng: random.Random) -> Any:
    """Return the value with one odd one somewhere in it."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        name = rng.choice(list(value))
        if rng.random() < 0.1:
            return {key: item for key, item in value.items() if key != name}
        return {**value, name: _changed(value[name], rng)}
    if isinstance(value, list) and value and rng.random() < 0.5:
        at = rng.randrange(len(value))
        return [*value[:at], _changed(value[at], rng), *value[at + 1 :]]
    return rng.choice(_ODD)


def _send(ground: Ground, rng: random.Random) -> List[int]:
    """Send one request, whole or in pieces, and return the status of each answer; -1 stands for one without an end."""
    data = request_of(ground, rng)
    pieces = [data]
    if rng.random() < 0.1:
        at = rng.randrange(len(data) + 1)
        pieces = [data[:at], data[at:]]
    received = b""
    with contextlib.suppress(OSError), socket.create_connection(ground.client.address, timeout=GUARD) as sock:
        try:
            for piece in pieces:
                sock.sendall(piece)
            if rng.random() < 0.02:
                # Gone without reading. The answer, if there is one, meets a reset.
                return []
            sock.shutdown(socket.SHUT_WR)
            while len(received) < 1 << 24:
                part = sock.recv(65536)
                if not part:
                    break
                received += part
                if b"\nevent: connected" in received:
                    # A stream, which has no end.
                    break
        except socket.timeout:
            return [-1]
    return [int(part[:3]) for part in received.split(b"HTTP/1.1 ")[1:] if part[:3].isdigit()]


@contextlib.contextmanager
def _problems() -> Iterator[List[str]]:
    """Collect what the platform logs as an error or with a traceback, and what its threads raise."""
    found: List[str] = []

    class Watch(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno >= logging.ERROR or record.exc_info:
                found.append(logging.Formatter().format(record))

    watch = Watch()
    logging.getLogger("sekuire").addHandler(watch)
    before, threading.excepthook = threading.excepthook, lambda args: found.append(repr(args))
    try:
        yield found
    finally:
        threading.excepthook = before
        logging.getLogger("sekuire").removeHandler(watch)


def _settle(descriptors: int) -> None:
    """Wait until the platform has closed the connections that were ended."""
    end = time.monotonic() + GUARD
    while _descriptors() > descriptors + 4 and time.monotonic() < end:
        time.sleep(0.05)


def _threads() -> int:
    return sum(thread.name.startswith("sekuire-local") for thread in threading.enumerate())


def _memory() -> int:
    if sys.platform != "linux":
        return 0
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0
