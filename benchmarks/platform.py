"""A platform so cheap that what is measured is its client: one process, one thread, HTTP written by hand.

It keeps the part of the contract that a worker meets: bootstrap, refresh, heartbeat, the task stream, completions.
For who submits tasks it takes them and says how far they are; no worker gets them.
It holds no database and forgets everything at its end; the real local platform is ``sekuire.local``.

On standard input it takes JSON lines, and answers each with one:

``{"op": "feed", "tasks": N | "seconds": S, "rate": R?, "capability": C?}``
    sends tasks as fast as the streams' ``max_in_flight`` allows, or ``rate`` a second; answers when all are completed;
    with ``"early": true`` also where no stream is open yet
``{"op": "hold"}``, ``{"op": "let_go"}``
    from now on submitted tasks are open; completes all of them, and those that are submitted later at once
``{"op": "usage"}``
    its clock and its CPU time, the open streams and all counts
"""

from __future__ import annotations

import argparse
import json
import os
import re
import selectors
import socket
import sys
import time
from email.utils import formatdate
from typing import Any, Callable, Dict, List, Optional, Tuple
from urllib.parse import parse_qs

from . import payloads
from .process import Message, say, usage

_READ = 256 * 1024
_COMMENT_NS = 10 * 10**9
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_BEARER = re.compile(rb"\r\nauthorization: *bearer " + re.escape(payloads.RUNTIME_TOKEN.encode()), re.IGNORECASE)
_KEY = re.compile(rb"\r\nx-api-key: *" + re.escape(payloads.API_KEY.encode()), re.IGNORECASE)
_WAIT = re.compile(rb"(?:^|&)wait_ms=(\d+)")
_IDS = re.compile(rb"(?:^|&)ids=([^&]+)")
_PREFIX = b"/api/v1"
_ACCEPTED = b'{"status":"accepted"}'
_REASONS = {
    200: b"OK",
    201: b"Created",
    202: b"Accepted",
    400: b"Bad Request",
    401: b"Unauthorized",
    404: b"Not Found",
    409: b"Conflict",
    411: b"Length Required",
}


class _Connection:
    """One client's socket, with what has come and what could not be sent yet."""

    __slots__ = ("inbox", "max_in_flight", "outbox", "socket", "unfinished")

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self.inbox = bytearray()
        self.outbox = bytearray()
        #: 0 until the connection has become a task stream.
        self.max_in_flight = 0
        self.unfinished = 0


class _Feed:
    """One order to send tasks, and its counts."""

    def __init__(self, order: Message) -> None:
        now = time.monotonic_ns()
        self.remaining = int(order["tasks"]) if "tasks" in order else sys.maxsize
        self.until_ns = now + int(order["seconds"] * 1e9) if "seconds" in order else sys.maxsize
        self.interval_ns = int(1e9 / order["rate"]) if "rate" in order else 0
        self.due_ns = now
        self.template = payloads.event_template(order.get("capability", payloads.CAPABILITY))
        self.before = usage()
        self.sent = 0
        self.completed = 0
        self.failed = 0

    def report(self) -> Message:
        after = usage()
        wall_ns = after["wall_ns"] - self.before["wall_ns"]
        return {
            "sent": self.sent,
            "completed": self.completed,
            "failed": self.failed,
            "seconds": wall_ns / 1e9,
            "cpu_seconds": (after["cpu_ns"] - self.before["cpu_ns"]) / 1e9,
        }


class Platform:
    """The listening socket, the loop, and the tasks on their way."""

    def __init__(self, host: str = "127.0.0.1", port: int = 0) -> None:
        self._selector = selectors.DefaultSelector()
        self._listener = socket.create_server((host, port), backlog=512)
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._streams: List[_Connection] = []
        self._in_flight: Dict[bytes, _Connection] = {}
        self._feed: Optional[_Feed] = None
        self._number = 0
        self._comment_ns = time.monotonic_ns() + _COMMENT_NS
        self._orders = bytearray()
        self._ended = False
        self._date_until = 0.0
        self._date = b""
        self._counts = {"heartbeats": 0, "conflicts": 0, "refused": 0, "lost_streams": 0, "connections": 0, "echoes": 0}
        self._counts.update({"submits": 0, "polls": 0, "most_waiting": 0})
        #: Submitted tasks with a number up to this are complete; None: all are.
        self._completed_up_to: Optional[int] = None
        #: Questions for a task that are answered when it is complete: whose, its number, and until when.
        self._waiting: List[Tuple[_Connection, int, int]] = []
        self._output = payloads.compact(payloads.result()).encode()
        self._routes: Dict[bytes, Callable[[], Tuple[int, Message]]] = {
            b"bootstrap": lambda: (201, self._grant()),
            b"recover": lambda: (201, self._grant()),
            b"refresh": lambda: (200, self._grant()),
            b"heartbeat": self._heartbeat,
            b"progress": lambda: (202, {}),
            b"logs": lambda: (202, {}),
        }

    @property
    def port(self) -> int:
        port: int = self._listener.getsockname()[1]
        return port

    def run(self) -> None:
        """Serve until standard input ends."""
        os.set_blocking(sys.stdin.fileno(), False)
        self._selector.register(sys.stdin.fileno(), selectors.EVENT_READ, self._order)
        select = self._selector.select
        try:
            while not self._ended:
                for key, _ in select(self._patience()):
                    if isinstance(key.data, _Connection):
                        self._serve(key.data)
                    else:
                        key.data()
                if self._feed is not None:
                    self._pump(self._feed)
                self._keep_alive()
                if self._waiting:
                    self._answer_waiting()
        finally:
            for key in list(self._selector.get_map().values()):
                if isinstance(key.data, _Connection):
                    key.data.socket.close()
            self._listener.close()
            self._selector.close()

    # -- tasks --------------------------------------------------------------------------------------------------------

    def _pump(self, feed: _Feed) -> None:
        now = time.monotonic_ns()
        if now >= feed.until_ns:
            feed.remaining = 0
        for stream in list(self._streams):
            room = min(stream.max_in_flight - stream.unfinished, feed.remaining)
            if feed.interval_ns:
                room = min(room, 1) if now >= feed.due_ns else 0
                feed.due_ns += feed.interval_ns * room
            if room > 0:
                self._send_tasks(feed, stream, room)
        if not feed.remaining and not self._in_flight:
            self._feed = None
            say(feed.report())

    def _send_tasks(self, feed: _Feed, stream: _Connection, count: int) -> None:
        events = []
        for number in range(self._number + 1, self._number + count + 1):
            self._in_flight[payloads.task_id(number).encode()] = stream
            events.append(feed.template % (number, number, time.monotonic_ns()))
        self._number += count
        stream.unfinished += count
        feed.sent += count
        feed.remaining -= count
        self._send_chunk(stream, b"".join(events))

    def _complete(self, task_id: bytes, body: bytes) -> Tuple[int, bytes]:
        try:
            report = json.loads(body)
            status = report["status"]
            sound = report["task_id"].encode() == task_id and status in ("completed", "failed")
        except (ValueError, KeyError, TypeError, AttributeError):
            sound = False
        if not sound:
            self._counts["refused"] += 1
            return 400, b'{"error":"bad_request","message":"the body is not a completion of this task"}'
        stream = self._in_flight.pop(task_id, None)
        if stream is None:
            self._counts["conflicts"] += 1
            return 409, b'{"error":"conflict","message":"no such task is waiting for its completion"}'
        stream.unfinished -= 1
        feed = self._feed
        if feed is not None:
            if status == "completed":
                feed.completed += 1
            else:
                feed.failed += 1
        return 200, _ACCEPTED

    def _patience(self) -> Optional[float]:
        """How long the loop may sleep."""
        ends = []
        if self._streams:
            ends.append(self._comment_ns)
        ends += [until_ns for _, _, until_ns in self._waiting]
        feed = self._feed
        if feed is not None and feed.remaining and self._streams:
            ends.append(feed.until_ns)
            if feed.interval_ns and any(stream.unfinished < stream.max_in_flight for stream in self._streams):
                ends.append(feed.due_ns)
        return max(0.0, (min(ends) - time.monotonic_ns()) / 1e9) if ends else None

    def _keep_alive(self) -> None:
        now = time.monotonic_ns()
        if now >= self._comment_ns:
            self._comment_ns = now + _COMMENT_NS
            for stream in list(self._streams):
                self._send_chunk(stream, b":\n\n")

    # -- submitted tasks ----------------------------------------------------------------------------------------------

    def _submit(self, body: bytes) -> Tuple[int, bytes]:
        task = json.loads(body)
        if not isinstance(task, dict) or not task.get("agent_id") or not task.get("capability"):
            return 400, b'{"error":"bad_request","message":"the body is not a task"}'
        self._counts["submits"] += 1
        task_id = payloads.task_id(self._counts["submits"]).encode()
        return 201, b'{"task_id":"%b","status":"queued","attempt":0,' % task_id + body[1:]

    def _ask(self, connection: _Connection, task_id: bytes, query: bytes) -> None:
        self._counts["polls"] += 1
        number = _number_of(task_id)
        wait = _WAIT.search(query)
        if wait is None or self._is_complete(number):
            self._answer(connection, 200, self._describe(number, self._output))
        else:
            self._waiting.append((connection, number, time.monotonic_ns() + int(wait.group(1)) * 10**6))
            self._counts["most_waiting"] = max(self._counts["most_waiting"], len(self._waiting))

    def _ask_for_many(self, query: bytes) -> bytes:
        self._counts["polls"] += 1
        ids = _IDS.search(query)
        found = [] if ids is None else [self._describe(_number_of(one)) for one in ids.group(1).split(b",")]
        return b'{"tasks":[' + b",".join(found) + b'],"next_before":null}'

    def _describe(self, number: int, output: Optional[bytes] = None) -> bytes:
        status = b"completed" if self._is_complete(number) else b"queued"
        rest = b',"output":' + output if output is not None else b""
        return b'{"task_id":"%b","status":"%b"%b}' % (payloads.task_id(number).encode(), status, rest)

    def _is_complete(self, number: int) -> bool:
        return self._completed_up_to is None or number <= self._completed_up_to

    def _answer_waiting(self) -> None:
        now = time.monotonic_ns()
        waiting, self._waiting = self._waiting, []
        for connection, number, until_ns in waiting:
            if self._is_complete(number) or now >= until_ns:
                self._answer(connection, 200, self._describe(number, self._output))
            else:
                self._waiting.append((connection, number, until_ns))

    # -- orders -------------------------------------------------------------------------------------------------------

    def _order(self) -> None:
        data = os.read(sys.stdin.fileno(), _READ)
        if not data:
            self._ended = True
            return
        self._orders += data
        while b"\n" in self._orders:
            line, _, self._orders = self._orders.partition(b"\n")
            order: Message = json.loads(line)
            if order["op"] == "usage":
                say({**usage(), **self._counts, "streams": len(self._streams), "in_flight": len(self._in_flight)})
            elif order["op"] in ("hold", "let_go"):
                self._completed_up_to = self._counts["submits"] if order["op"] == "hold" else None
                say({"submits": self._counts["submits"]})
            elif order["op"] != "feed":
                say({"error": f"no such order: {order['op']}"})
            elif not (self._streams or order.get("early")) or self._feed is not None or self._in_flight:
                say({"error": "cannot feed: no stream is open, or tasks are still on their way"})
            else:
                self._feed = _Feed(order)

    # -- HTTP ---------------------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError:
            return
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._counts["connections"] += 1
        self._selector.register(sock, selectors.EVENT_READ, _Connection(sock))

    def _serve(self, connection: _Connection) -> None:
        if connection.outbox:
            self._flush(connection)
        try:
            data = connection.socket.recv(_READ)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._drop(connection)
            return
        inbox = connection.inbox
        inbox += data
        while inbox:
            end = inbox.find(b"\r\n\r\n")
            if end < 0:
                return
            head = bytes(inbox[:end])
            method, target, _ = head.split(b" ", 2)
            match = _LENGTH.search(head)
            length = int(match.group(1)) if match else 0
            start = end + 4
            if len(inbox) < start + length:
                return
            body = bytes(inbox[start : start + length])
            del inbox[: start + length]
            if match is None and b"\r\ntransfer-encoding:" in head.lower():
                self._answer(connection, 411, b'{"error":"length_required"}')
                self._drop(connection)
                return
            self._handle(connection, method, target, head, body)

    def _handle(self, connection: _Connection, method: bytes, target: bytes, head: bytes, body: bytes) -> None:
        if target == b"/echo":
            self._counts["echoes"] += 1
            json.loads(body)
            self._answer(connection, 200, _ACCEPTED)
            return
        path, _, query = target.partition(b"?")
        authorised = _BEARER.search(head) is not None
        if path.startswith(_PREFIX + b"/tasks/") and method == b"POST" and path.endswith(b"/complete"):
            if authorised:
                self._answer(connection, *self._complete(path[len(_PREFIX) + 7 : -9], body))
                return
        elif path == _PREFIX + b"/tasks/stream" and method == b"GET":
            if authorised:
                self._open_stream(connection, query)
                return
        elif path == _PREFIX + b"/tasks" and _KEY.search(head) is not None:
            if method == b"POST":
                self._answer(connection, *self._submit(body))
            else:
                self._answer(connection, 200, self._ask_for_many(query))
            return
        elif path.startswith(_PREFIX + b"/tasks/") and method == b"GET" and _KEY.search(head) is not None:
            self._ask(connection, path[len(_PREFIX) + 7 :], query)
            return
        elif path.endswith(b"/policy") and method == b"GET" and authorised:
            self._answer(connection, 200, json.dumps(payloads.policy()).encode())
            return
        elif path.startswith(_PREFIX) and method == b"POST":
            name = path.rsplit(b"/", 1)[1]
            route = self._routes.get(name)
            if route is not None and (authorised or name in (b"bootstrap", b"recover", b"refresh")):
                status, message = route()
                self._answer(connection, status, json.dumps(message).encode())
                return
            authorised = authorised or route is None
        else:
            authorised = True
        if authorised:
            self._answer(connection, 404, b'{"error":"not_found","message":"this platform does not know that path"}')
        else:
            self._counts["refused"] += 1
            self._answer(connection, 401, b'{"error":"unauthorized","message":"no valid runtime token"}')

    def _open_stream(self, connection: _Connection, query: bytes) -> None:
        values = parse_qs(query.decode("ascii", "replace")).get("max_in_flight", ["1"])
        connection.max_in_flight = max(1, int(values[0])) if values[0].isdigit() else 1
        self._send(
            connection,
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nCache-Control: no-store\r\n"
            b"Transfer-Encoding: chunked\r\nDate: " + self._now() + b"\r\n\r\n",
        )
        self._streams.append(connection)
        hello = json.dumps({"installation_id": payloads.INSTALLATION_ID, "desired_state": "running"})
        self._send_chunk(connection, b"event: connected\ndata: " + hello.encode() + b"\n\n")

    def _grant(self) -> Message:
        return {
            "installation_id": payloads.INSTALLATION_ID,
            "runtime_token": payloads.RUNTIME_TOKEN,
            "refresh_token": "benchmark-refresh-token-0123456789abcdef",
            "expires_at": _in_an_hour(),
            "workspace_id": payloads.WORKSPACE_ID,
        }

    def _heartbeat(self) -> Tuple[int, Message]:
        self._counts["heartbeats"] += 1
        return 200, {"lease_expires_at": _in_an_hour(), "desired_state": "running", "revoked": False}

    def _answer(self, connection: _Connection, status: int, body: bytes) -> None:
        self._send(
            connection,
            b"HTTP/1.1 %d %b\r\nContent-Type: application/json\r\nContent-Length: %d\r\nDate: %b\r\n\r\n%b"
            % (status, _REASONS[status], len(body), self._now(), body),
        )

    def _now(self) -> bytes:
        now = time.time()
        if now >= self._date_until:
            self._date_until = now // 1 + 1
            self._date = formatdate(now, usegmt=True).encode()
        return self._date

    def _send_chunk(self, connection: _Connection, data: bytes) -> None:
        self._send(connection, b"%x\r\n%b\r\n" % (len(data), data))

    def _send(self, connection: _Connection, data: bytes) -> None:
        if not connection.outbox:
            try:
                sent = connection.socket.send(data)
            except BlockingIOError:
                sent = 0
            except OSError:
                # The read that reports the end comes next, and drops the connection.
                return
            if sent == len(data):
                return
            data = data[sent:]
            self._selector.modify(connection.socket, selectors.EVENT_READ | selectors.EVENT_WRITE, connection)
        connection.outbox += data

    def _flush(self, connection: _Connection) -> None:
        try:
            sent = connection.socket.send(connection.outbox)
        except OSError:
            return
        del connection.outbox[:sent]
        if not connection.outbox:
            self._selector.modify(connection.socket, selectors.EVENT_READ, connection)

    def _drop(self, connection: _Connection) -> None:
        self._selector.unregister(connection.socket)
        connection.socket.close()
        if not connection.max_in_flight:
            return
        self._streams.remove(connection)
        if connection.unfinished:
            self._counts["lost_streams"] += 1
        for task_id in [task_id for task_id, stream in self._in_flight.items() if stream is connection]:
            del self._in_flight[task_id]
        if self._feed is not None and not self._streams:
            self._feed = None
            say({"error": "the stream was closed while tasks were on their way"})


def _number_of(task_id: bytes) -> int:
    return int(task_id[-12:], 16)


def _in_an_hour() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 3600))


def main(arguments: Optional[List[str]] = None) -> None:
    """Listen, say where, and serve."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--port", type=int, default=0)
    options: Any = parser.parse_args(arguments)
    platform = Platform(port=options.port)
    say({"port": platform.port})
    try:
        platform.run()
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
