"""What is fuzzed: each decoder of bytes from outside, with what must be true of whatever it makes of them.

An input's first byte names the target, the rest is the target's. Nothing here needs atheris, so that the suite runs the
targets too.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import logging
import math
import os
import sqlite3
import tempfile
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple
from urllib.parse import unquote

from sekuire.credentials import RuntimeCredentialsStore
from sekuire.credentials.file import CredentialsFile, _decode, _encode
from sekuire.errors import APIError, ConfigurationError, PlanLimitError
from sekuire.transport.body import BodyError, read_body
from sekuire.transport.http import Reply
from sekuire.transport.sse import MAX_RETRY_MS, EventStream
from sekuire.wire import protocol
from sekuire.wire.models import Completion
from sekuire.wire.protocol import Malformed, MalformedTask
from sekuire.wire.verdict import verdict
from sekuire.worker.outbox import Outbox, open_outbox

from ..conformance.reference import Facts, reference, without_large_events

NOW = dt.datetime(2026, 3, 1, 12, tzinfo=dt.timezone.utc)
STATES = (None, "running", "paused", "terminated")
STATUSES = (300, 400, 401, 402, 403, 404, 409, 410, 413, 422, 429, 500, 503)
ENCODINGS = (None, "identity", "gzip", "deflate", "x-gzip", "br")
#: The target of each first byte; the order is what the kept inputs rely on, so new ones go to the end.
NAMES = (
    "stream", "task", "untyped", "command", "connected", "error", "grant", "heartbeat", "header", "body", "file", "row",
)  # fmt: skip


def run(data: bytes) -> None:
    """Give one input to its target; whatever is not as it must be raises."""
    if data:
        with _watched_log():
            TARGETS[NAMES[data[0] % len(NAMES)]](data[1:])


def pieces_of(data: bytes) -> Tuple[bytes, List[bytes]]:
    """A payload, and the same in pieces: a count, so many sizes (the last repeats), then the payload itself."""
    count = data[0] % 16 if data else 0
    sizes, payload = data[1 : 1 + count], data[1 + count :]
    pieces, at, number = [], 0, 0
    while at < len(payload):
        size = (sizes[min(number, len(sizes) - 1)] if sizes else 0) or len(payload)
        pieces.append(payload[at : at + size])
        at += size
        number += 1
    return payload, pieces


# -- the stream and its events ----------------------------------------------------------------------------------------


def stream(data: bytes) -> None:
    limit = (data[0] if data else 0) or 1 << 20
    payload, pieces = pieces_of(data[1:])
    taken = EventStream(pieces, max_event_bytes=limit)
    events = list(taken.events())
    found: Facts = [(one.event, one.data, one.id) for one in events], taken.retry, taken.last_event_id
    small, skipped = without_large_events(payload, limit)
    assert taken.oversized == skipped
    assert found == reference(small)
    assert taken.retry is None or 0 <= taken.retry <= MAX_RETRY_MS
    value = protocol.event_id_header(taken.last_event_id)
    assert value is None or not any(byte < 32 or byte == 127 for byte in value)
    for event in events:
        decode = _EVENTS.get(event.event)
        if decode is not None:
            decode(event.data.encode())


def task(data: bytes) -> None:
    text = data.decode("utf-8", "replace")
    try:
        # One that is pushed may have no id, and anybody may send it.
        _check_task(protocol.decode_pushed_task(text, "new"))
    except Malformed as error:
        _check_text(error)
    try:
        found = protocol.decode_task(text)
    except MalformedTask as error:
        _check_malformed(error)
        return
    _check_task(found)
    assert found == protocol.decode_pushed_task(text, "new")


def untyped(data: bytes) -> None:
    text = data.decode("utf-8", "replace")
    try:
        found = protocol.decode_untyped_task(text)
    except MalformedTask as error:
        _check_malformed(error)
        return
    if found is not None:
        _check_task(found)
        assert found == protocol.decode_task(text)


def command(data: bytes) -> None:
    try:
        found = protocol.decode_command(data.decode("utf-8", "replace"))
    except Malformed as error:
        _check_text(error)
        return
    assert found.type in protocol.COMMANDS
    assert found.reason is None or (found.reason.isprintable() and len(found.reason) <= 500)
    assert found.command_id is None or protocol.is_id(found.command_id)
    _check_seconds(found.shutdown_timeout)


def connected(data: bytes) -> None:
    found = protocol.decode_connected(data.decode("utf-8", "replace"))
    assert found.desired_state in STATES
    assert found.installation_id is None or protocol.encode_id(found.installation_id)
    _check_interval(found.heartbeat_interval)


def _check_text(error: Exception) -> None:
    assert str(error)
    assert str(error).isprintable()


def _check_malformed(error: MalformedTask) -> None:
    _check_text(error)
    assert 1 <= error.attempt < 2**31
    if error.task_id is not None:
        _check_id(error.task_id)


def _check_task(found: Any) -> None:
    _check_id(found.task_id)
    assert protocol.is_id(found.capability)
    assert 1 <= found.attempt < 2**31
    assert found.timeout is None or 0 < found.timeout <= protocol.MAX_DURATION
    for text in (found.tool, found.workspace_id, found.requester_id, found.trace_id):
        assert text is None or isinstance(text, str)
    try:
        head = protocol.completion_head(Completion(task_id=found.task_id, attempt=found.attempt, output=found.input))
    except (ValueError, RecursionError):
        return  # A lone surrogate in it, or a depth that can be read but not written.
    body = json.loads(head + protocol.completion_tail(found.attempt, "w"))
    assert (body["task_id"], body["attempt"], body["output"]) == (found.task_id, found.attempt, found.input)


def _check_id(value: str) -> None:
    path = protocol.Endpoints().path("complete", task_id=value)
    assert path.isascii()
    assert path.isprintable()
    assert path.count("/") == 5
    assert unquote(path.split("/")[4]) == value
    key = protocol.completion_key(value, 1)
    assert key.isascii()
    assert key.isprintable()


def _check_seconds(value: Optional[float]) -> None:
    assert value is None or 0 <= value <= protocol.MAX_DURATION


def _check_lifetimes(token: Optional[float], lease: Optional[float]) -> None:
    assert token is None or 0 < token <= protocol.MAX_TOKEN_LIFETIME
    assert lease is None or 0 <= lease < math.inf


def _check_interval(value: Optional[float]) -> None:
    assert value is None or 0 < value <= 24 * 3600


_EVENTS: Dict[str, Callable[[bytes], None]] = {
    "task": task,
    "message": untyped,
    "command": command,
    "connected": connected,
}


# -- answers ----------------------------------------------------------------------------------------------------------


def error(data: bytes) -> None:
    status = STATUSES[data[0] % len(STATUSES)] if data else 500
    header, _, body = data[1:].partition(b"\n")
    reply = Reply(status, {"Retry-After": header.decode("latin-1")}, body, 0.0, 0.0)
    for endpoint in ("complete", "refresh", "task_stream", "policy"):
        assert verdict(endpoint, reply) is not None
    raised: Optional[APIError] = None
    try:
        reply.check()
    except APIError as problem:
        raised = problem
    assert type(raised) is (PlanLimitError if status == 402 else APIError)
    assert raised is not None
    assert raised.status == status
    assert str(raised).isprintable()
    assert len(raised.message) <= 500
    assert raised.retry_after is None or 0 < raised.retry_after <= protocol.MAX_RETRY_AFTER
    if protocol.is_revoked(raised):
        revoked = protocol.revocation(raised)
        assert str(revoked).isprintable()
        _check_seconds(revoked.shutdown_timeout)


def _payload(data: bytes) -> Tuple[Optional[str], Any]:
    header, _, body = data.partition(b"\n")
    try:
        return header.decode("latin-1") or None, protocol.decode_body(body)
    except Malformed as problem:
        _check_text(problem)
        return None, None


def grant(data: bytes) -> None:
    date, payload = _payload(data)
    try:
        found = protocol.decode_grant(payload, date, NOW, None)
    except Malformed as problem:
        _check_text(problem)
        return
    credentials = found.credentials
    assert credentials.runtime_token is not None
    assert credentials.installation_id is not None
    _check_id(credentials.installation_id)
    for _, value in (protocol.bearer(credentials.runtime_token), protocol.api_key_header(credentials.runtime_token)):
        assert value.isascii()
        assert value.isprintable()
        assert value == value.strip()
    _check_lifetimes(found.lifetime, found.lease_lifetime)
    _check_interval(found.heartbeat_interval)
    assert protocol.decode_grant({"runtime_token": "t"}, date, NOW, credentials).credentials.refresh_token == (
        credentials.refresh_token
    )


def heartbeat(data: bytes) -> None:
    date, payload = _payload(data)
    found = protocol.decode_heartbeat(payload, date, NOW)
    assert found.revoked in (True, False)
    assert found.desired_state in STATES
    assert found.reason is None or (found.reason.isprintable() and len(found.reason) <= 500)
    _check_lifetimes(found.refreshed_token_lifetime, found.lease_lifetime)
    assert all(reason.isprintable() for reason in found.ignored.values())
    _check_interval(found.heartbeat_interval)
    _check_seconds(found.shutdown_timeout)
    if found.refreshed_token is not None:
        assert found.refreshed_token.reveal() not in repr(found)


def header(data: bytes) -> None:
    text = data.decode("latin-1")
    seconds = protocol.retry_after(text, NOW)
    assert seconds is None or 0 < seconds <= protocol.MAX_RETRY_AFTER
    date = protocol.parse_http_date(text)
    time = protocol.parse_time(data.decode("utf-8", "replace"))
    for found in (date, time):
        if found is not None:
            assert found.utcoffset() == dt.timedelta(0)
            assert protocol.parse_time(protocol.format_time(found)) == found
            _, lease = protocol.lease_lifetime(protocol.format_time(found), text, NOW, {})
            _check_lifetimes(protocol.token_lifetime(found, text, NOW), lease)


class _Source:
    """What ``read_body`` needs of an http.client response."""

    def __init__(self, pieces: List[bytes], length: Optional[int]) -> None:
        self._pieces = list(pieces)
        self.length = length
        self.fp = None

    def read1(self, size: int) -> bytes:
        piece = self._pieces.pop(0) if self._pieces else b""
        if self.length is not None:
            # http.client never gives more than the length.
            piece = piece[: self.length]
            self.length -= len(piece)
        return piece

    def close(self) -> None: ...


class _Raw:
    def __init__(self, pieces: List[bytes], encoding: Optional[str], length: Optional[int]) -> None:
        self.headers = {} if encoding is None else {"Content-Encoding": encoding}
        self._fp = _Source(pieces, length)


def body(data: bytes) -> None:
    encoding = ENCODINGS[data[0] % len(ENCODINGS)] if data else None
    length = None if len(data) < 2 or data[1] == 255 else data[1]
    payload, pieces = pieces_of(data[2:])
    results = []
    for parts in (pieces, [payload] if payload else []):
        try:
            results.append(read_body(_Raw(parts, encoding, length), 1 << 20, math.inf))
        except BodyError as problem:
            _check_text(problem)
            results.append(None)
    assert results[0] == results[1]
    assert results[0] is None or len(results[0]) <= 1 << 20


# -- files ------------------------------------------------------------------------------------------------------------


class _Files:
    """One credentials file and one outbox, made with the first input that needs them."""

    def __init__(self) -> None:
        self.directory = ""
        self.outbox: Optional[Outbox] = None
        self.database: Optional[sqlite3.Connection] = None

    def path(self, name: str) -> str:
        if not self.directory:
            self.directory = tempfile.mkdtemp(prefix="sekuire-fuzz-")
        return os.path.join(self.directory, name)

    def opened(self) -> Tuple[Outbox, sqlite3.Connection]:
        if self.outbox is None or self.database is None:
            path = self.path("outbox.db")
            self.outbox = open_outbox(path)
            self.database = sqlite3.connect(path, isolation_level=None)
            self.database.execute("PRAGMA synchronous = OFF")
        return self.outbox, self.database

    def close(self) -> None:
        if self.database is not None:
            self.database.close()
        if self.outbox is not None:
            self.outbox.close()
        if self.directory:
            for name in os.listdir(self.directory):
                os.unlink(os.path.join(self.directory, name))
            os.rmdir(self.directory)
        self.__init__()  # type: ignore[misc]


FILES = _Files()


def file(data: bytes) -> None:
    path = FILES.path("credentials.json")
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as opened:
        opened.write(data)
    try:
        stored = CredentialsFile(path).load()
        store = RuntimeCredentialsStore(path=path)
    except ConfigurationError as problem:
        _check_text(problem)
        return
    left = store.snapshot.time_left()
    assert left is None or left >= 0
    for secret in store.secrets:
        # A short one may be part of a word by chance.
        assert len(secret.reveal()) < 8 or secret.reveal() not in repr((stored, store, store.snapshot))
    if store.current.installation_id is not None:
        _check_id(store.current.installation_id)
    if stored is not None:
        assert _decode(_encode(stored)) == stored


def row(data: bytes) -> None:
    outbox, database = FILES.opened()
    values = _values(data, 4)
    database.execute(
        "INSERT OR REPLACE INTO completion VALUES ('u', 'a', ?, NULL, ?, ?, ?, 1.0)",
        [b"" if value is None else value for value in values],
    )
    owner = object()
    try:
        for stored in outbox.claim("u", "a", owner):
            _check_id(stored.task_id)
            assert 1 <= stored.attempt < 2**31
            assert stored.substituted in (True, False)
            assert isinstance(protocol.failure_code(stored.head), (str, type(None)))
            assert isinstance(stored.head, bytes)
    finally:
        outbox.disown(owner)
        database.execute("DELETE FROM completion")


def _values(data: bytes, count: int) -> List[Any]:
    """SQLite values of any type: a byte for the type, one for the length, then so many bytes; the last takes all."""
    values: List[Any] = []
    for number in range(count):
        kind, length, rest = data[0:1], data[1] if len(data) > 1 else 0, data[2:]
        raw, data = (rest, b"") if number == count - 1 else (rest[:length], rest[length:])
        tag = kind[0] % 5 if kind else 0
        if tag == 0:
            values.append(raw)
        elif tag == 1:
            values.append(raw.decode("utf-8", "replace"))
        elif tag == 2:
            values.append(int.from_bytes(raw[:8], "big", signed=True))
        elif tag == 3:
            values.append(len(raw) / 3)
        else:
            values.append(None)
    return values


# -- the log ----------------------------------------------------------------------------------------------------------


class _OneLine(logging.Handler):
    """Nothing from outside may begin a line of its own in the log."""

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        assert not any(ord(c) < 32 or 127 <= ord(c) < 160 or c in "\u2028\u2029" for c in message), message


@contextlib.contextmanager
def _watched_log() -> Iterator[None]:
    handler = _OneLine()
    logger = logging.getLogger("sekuire")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


TARGETS: Dict[str, Callable[[bytes], None]] = {name: globals()[name] for name in NAMES}
