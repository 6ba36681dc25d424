"""The inputs that fuzzing begins with: the public event stream cases, and one or more of every body and file."""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from pathlib import Path
from typing import Iterator, List, Tuple

from ..conformance.test_sse import load, stream_of
from .targets import ENCODINGS, NAMES, STATUSES

#: Longest seed; a few of the public cases are megabytes long, which would slow every round down.
MAX_SEED = 4096

_DATE = b"Sun, 01 Mar 2026 12:00:00 GMT"
_TASK = {
    "task_id": "t-1", "capability": "c", "input": {"a": [1, "x", None]}, "attempt": 2, "tool": "x", "timeout_ms": 1500,
    "workspace_id": "w", "requester_agent_id": "r", "parent_task_id": "p", "workflow_id": "f", "trace_id": "tr",
}  # fmt: skip
_GRANT = {
    "installation_id": "i", "runtime_token": "skr_1", "refresh_token": "skf_1", "workspace_id": "w",
    "expires_at": "2026-03-01T13:00:00Z", "lease_expires_at": "2026-03-01T12:01:00.5+02:00",
    "heartbeat_interval_seconds": 7,
}  # fmt: skip
_HEARTBEAT = {
    "lease_expires_at": "2026-03-01T12:01:00Z", "heartbeat_interval_seconds": 5, "refreshed_token": "skr_2",
    "refreshed_token_expires_at": "2026-03-01T13:00:00Z", "active_policy_hash": "abc", "revoked": True,
    "reason": "a\nb", "shutdown_timeout_ms": 1000, "desired_state": "paused",
}  # fmt: skip
_FILE = {
    "format": 1, "revision": 3, "seeds": ["s"], "installation_id": "i", "workspace_id": "w", "runtime_token": "skr_1",
    "refresh_token": "skf_1", "expires_at": "2030-01-01T00:00:00.000000Z", "ends_at": 1900000000.25, "lifetime": 3600.0,
}  # fmt: skip


def of(name: str, payload: bytes) -> bytes:
    """``payload`` as an input of the target ``name``."""
    return bytes([NAMES.index(name)]) + payload


def seeds() -> Iterator[bytes]:
    """Every seed, each once."""
    seen = set()
    for seed in _all():
        if len(seed) <= MAX_SEED and seed not in seen:
            seen.add(seed)
            yield seed


def write(directory: Path) -> int:
    """Write each seed to a file of its own, named by its hash; how many there are."""
    every = list(seeds())
    for seed in every:
        (directory / hashlib.sha256(seed).hexdigest()[:16]).write_bytes(seed)
    return len(every)


def _all() -> Iterator[bytes]:
    for case in load():
        content = stream_of(case)
        for limit, cuts in ((0, b"\0"), (0, b"\1\1"), (0, b"\2\3\5"), (9, b"\1\2")):
            yield of("stream", bytes([limit]) + cuts + content)
    events: List[Tuple[str, str]] = [
        ("task", json.dumps(_TASK)),
        ("message", json.dumps(_TASK)),
        ("command", '{"type": "pause", "reason": "x", "command_id": "c", "shutdown_timeout_ms": 5}'),
        ("connected", '{"installation_id": "i", "heartbeat_interval_seconds": 5, "desired_state": "paused"}'),
        ("ping", "{}"),
    ]
    for kind, data in events:
        yield of("stream", b"\0\0" + f"id: 1\nevent: {kind}\ndata: {data}\nretry: 10\n\n".encode())
        name = {"message": "untyped", "ping": "header"}.get(kind, kind)
        yield of(name, data.encode())
    odd = [
        b'{"id": "t", "target_capability": "d", "target_tool": "y", "requester_id": "s", "input": NaN}',
        b'{"task_id": "t", "capability": "c\\nx", "input": "\\ud800"}',
        b'{"task_id": "a/../b?c#d%2e", "capability": "c", "input": ' + b"[" * 1000 + b"]" * 1000 + b"}",
        b'{"task_id": "a", "task_id": "b", "capability": "c", "input": 1e999, "attempt": 2147483648}',
        b'{"task_id": "t", "capability": "c", "input": ' + b"9" * 4400 + b"}",
        b"[Infinity, -Infinity, NaN, 1e400, -0, true, null]",
        b"\xef\xbb\xbf{}",
        b'"\xff\xfe"',
    ]
    for payload in odd:
        for name in ("task", "untyped", "command", "connected"):
            yield of(name, payload)
    errors = [
        b'{"error": "conflict", "message": "taken", "code": "TAKEN"}',
        b'{"code": "INSTALLATION_REVOKED", "message": "x\\ny", "shutdown_timeout_ms": 5000}',
        b'{"error": "plan", "required_plan": "pro", "upgrade_url": "https://x", "current_usage": {"agents": 3}}',
        b"<html>Bad\ngateway</html>",
        b"",
        *odd,
    ]
    for number in range(len(STATUSES)):
        for payload in errors:
            yield of("error", bytes([number]) + b"120\n" + payload)
    for payload in (*odd, json.dumps(_GRANT).encode(), json.dumps(_HEARTBEAT).encode()):
        for date in (b"", _DATE):
            yield of("grant", date + b"\n" + payload)
            yield of("heartbeat", date + b"\n" + payload)
    headers = [
        _DATE, b"0", b"120", b" 7 ", b"-5", b"1.5", b"9" * 400, b"Fri, 31 Dec 9999 23:59:59 -1400",
        b"Mon, 01 Jan 0001 00:00:00 +1400", b"Sunday, 06-Nov-94 08:49:37 GMT", b"Sun Nov  6 08:49:37 1994",
        b"2026-03-01T12:00:00.123456789Z", b"2026-03-01t12:00:00+23:59", b"0001-01-01T00:00:00+14:00",
    ]  # fmt: skip
    for value in headers:
        yield of("header", value)
    plain = json.dumps(_GRANT).encode()
    for number, encoding in enumerate(ENCODINGS):
        packed = zlib.compress(plain) if encoding == "deflate" else plain if not number % 5 else gzip.compress(plain)
        for content in (packed, packed[:-3], packed + packed, packed + b"x", plain, b"", gzip.compress(b"x" * 300_000)):
            for length in (255, min(len(content), 254), 7):
                for cuts in (b"\0", b"\1\1", b"\2\3\5"):
                    yield of("body", bytes([number, length]) + cuts + content)
    for payload in (json.dumps(_FILE).encode(), b" ", b"", b'{"format": 2, "revision": 1}', b"null", *odd):
        yield of("file", payload)
    head = b'{"task_id":"t","status":"failed","error":{"code":"x","message":"","retryable":true},"execution_time_ms":1'
    for task_id in (b"\1\3t-1", b"\0\3t-1", b"\1\0", b"\2\4\0\0\0\1"):
        for attempt in (b"\2\1\1", b"\2\0", b"\1\1x", b"\3\1x", b"\2\x08\x7f\xff\xff\xff\xff\xff\xff\xff"):
            for content in (b"\0\0" + head, b"\1\0" + head, b"\0\0", b"\0\0{", b"\4\0", b"\0\0\xff"):
                yield of("row", task_id + attempt + b"\2\1\0" + content)
