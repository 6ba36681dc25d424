"""What the tests of the long-lived objects share: waiting for what nobody announces, and a platform that misbehaves."""

from __future__ import annotations

import collections
import json
import re
import socket
import socketserver
import threading
from http.server import BaseHTTPRequestHandler
from typing import Any, Callable, Deque, Dict, List, Optional, Tuple, Union
from urllib.parse import parse_qs, urlsplit

from .waiting import GUARD

Answer = Union[Tuple[int, Any], Tuple[int, Any, Dict[str, str]], None]


class Request:
    """One request as the scripted platform got it."""

    def __init__(self, handler: BaseHTTPRequestHandler, name: str, body: bytes) -> None:
        self.handler = handler
        self.name = name
        self.path = urlsplit(handler.path).path
        self.query = {key: values[0] for key, values in parse_qs(urlsplit(handler.path).query).items()}
        self.headers = handler.headers
        self.raw = body

    @property
    def json(self) -> Any:
        return json.loads(self.raw)

    @property
    def task_id(self) -> str:
        return self.path.split("/")[-2]

    def write(self, data: bytes) -> None:
        self.handler.wfile.write(data)
        self.handler.wfile.flush()

    def head(self, status: int, *headers: str) -> None:
        """A status line and headers, as they are."""
        self.write("\r\n".join([f"HTTP/1.1 {status} X", *headers, "", ""]).encode())

    def reset(self) -> None:
        """End the connection with a RST."""
        sock = self.handler.connection
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.handler.close_connection = True
        # The file objects over it hold it open too.
        self.handler.rfile.close()
        self.handler.wfile.close()
        sock.close()


_NAMES = (
    (re.compile(r"/installations/bootstrap$"), "bootstrap"),
    (re.compile(r"/installations/recover$"), "recover"),
    (re.compile(r"/refresh$"), "refresh"),
    (re.compile(r"/heartbeat$"), "heartbeat"),
    (re.compile(r"/installations/[^/]+/capabilities$"), "capabilities"),
    (re.compile(r"/tasks/stream$"), "stream"),
    (re.compile(r"/complete$"), "complete"),
    (re.compile(r"/release$"), "release"),
    (re.compile(r"/tasks/[^/]+/approvals$"), "approvals"),
    (re.compile(r"/tasks/[^/]+/approvals/[^/]+$"), "approval"),
    (re.compile(r"/progress$"), "progress"),
    (re.compile(r"/workspaces/[^/]+/policy$"), "policy"),
    (re.compile(r"/logs$"), "logs"),
)

_END, _CUT, _RESET = object(), object(), object()


class Scripted:
    """A platform whose every answer a test can set, over real sockets.

    ``on[name]`` is called with each :class:`Request` to that endpoint and returns ``(status, body[, headers])``, or
    None where it has answered by itself or wants the connection closed. Without one the answer is what the contract
    says. ``requests[name]`` holds all that came. What is sent goes out on the newest stream.
    """

    def __init__(self) -> None:
        self.on: Dict[str, Callable[[Request], Answer]] = {}
        self.requests: Dict[str, List[Request]] = {}
        self._events: Deque[Any] = collections.deque()
        self._newest = 0
        self.connected: Dict[str, Any] = {}
        self._condition = threading.Condition()
        self._closing = False
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = 30
            disable_nagle_algorithm = True

            def log_message(self, *args: Any) -> None:
                pass

            def do_GET(self) -> None:
                outer._serve(self)

            do_POST = do_GET

        class Server(socketserver.ThreadingTCPServer):
            allow_reuse_address = True
            daemon_threads = True
            block_on_close = False
            request_queue_size = 128

            def handle_error(self, request: Any, address: Any) -> None:
                pass

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), name="scripted", daemon=True)
        self._thread.start()

    def close(self) -> None:
        with self._condition:
            self._closing = True
            self._condition.notify_all()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    # -- what a test says --

    def send(self, event: str, data: Any, event_id: Optional[str] = None) -> None:
        text = data if isinstance(data, str) else json.dumps(data)
        head = f"id: {event_id}\n" if event_id is not None else ""
        self.raw(f"{head}event: {event}\ndata: {text}\n\n".encode())

    def task(self, task_id: str, capability: str = "echo", input: Any = None, **fields: Any) -> None:
        self.send("task", {"task_id": task_id, "capability": capability, "input": input or {}, **fields})

    def command(self, kind: str, **fields: Any) -> None:
        self.send("command", {"type": kind, **fields})

    def raw(self, data: bytes) -> None:
        """Bytes for the open stream, as they are."""
        self._put(data)

    def end(self) -> None:
        """End the open stream's answer properly."""
        self._put(_END)

    def cut(self) -> None:
        """End the open stream in the middle of its answer, with a FIN."""
        self._put(_CUT)

    def rst(self) -> None:
        """End the open stream with a RST."""
        self._put(_RESET)

    # -- what a test asks --

    def of(self, name: str) -> List[Request]:
        with self._condition:
            return list(self.requests.get(name, ()))

    def count(self, name: str) -> int:
        return len(self.of(name))

    def wait_for(self, name: str, count: int = 1) -> List[Request]:
        """The requests to an endpoint, once there are so many."""
        with self._condition:
            assert self._condition.wait_for(lambda: len(self.requests.get(name, ())) >= count, GUARD), (
                f"{name}: {len(self.requests.get(name, ()))} of {count} requests came"
            )
            return list(self.requests[name])

    def completion(self, task_id: str) -> Any:
        """The body of a task's completion, once there is one."""
        with self._condition:

            def found() -> Any:
                return next((r for r in self.requests.get("complete", ()) if r.task_id == task_id), None)

            assert self._condition.wait_for(lambda: found() is not None, GUARD), f"no completion of {task_id}"
            return found().json

    def completions(self, task_id: str) -> List[Request]:
        return [request for request in self.of("complete") if request.task_id == task_id]

    # -- inside --

    def _serve(self, handler: BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        path = urlsplit(handler.path).path
        name = next((name for pattern, name in _NAMES if pattern.search(path)), "unknown")
        request = Request(handler, name, body)
        with self._condition:
            self.requests.setdefault(name, []).append(request)
            self._condition.notify_all()
        act = self.on.get(name)
        if act is None:
            act = self.stream if name == "stream" else self._usual
        answer = act(request)
        if answer is None:
            handler.close_connection = True
            return
        status, payload, *more = answer
        # An empty object is an error in the shape of the contract; a test of another shape gives it, or bytes.
        payload = {"error": "x"} if payload == {} and status >= 400 else payload
        data = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
        headers = {"Content-Type": "application/json", **(more[0] if more else {})}
        lines = [f"{key}: {value}" for key, value in headers.items()]
        request.head(status, *lines, f"Content-Length: {len(data)}")
        request.write(data)

    def _usual(self, request: Request) -> Answer:
        if request.name in ("bootstrap", "recover"):
            return 201, grant()
        if request.name == "refresh":
            return 200, grant("rt-refreshed")
        if request.name in ("policy", "capabilities", "unknown"):
            return 404, {"error": "not_found", "message": "no such path"}
        return 200, {}

    def stream(self, request: Request) -> None:
        """An open stream that sends what the test says."""
        with self._condition:
            self._newest += 1
            number = self._newest
            self._condition.notify_all()
        request.head(200, "Content-Type: text/event-stream", "Transfer-Encoding: chunked", "Connection: close")
        self._chunk(request, b"event: connected\ndata: " + json.dumps(self.connected).encode() + b"\n\n")
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._events or self._closing or number != self._newest)
                if self._closing or number != self._newest:
                    return
                item = self._events.popleft()
            if item is _RESET:
                request.reset()
            elif item is _END:
                request.write(b"0\r\n\r\n")
            if item in (_END, _CUT, _RESET):
                return
            self._chunk(request, item)

    def _put(self, item: Any) -> None:
        with self._condition:
            self._events.append(item)
            self._condition.notify_all()

    @staticmethod
    def _chunk(request: Request, data: bytes) -> None:
        request.write(b"%x\r\n%s\r\n" % (len(data), data))


def grant(token: str = "rt-1", **fields: Any) -> Dict[str, Any]:
    """The answer of a bootstrap."""
    base = {"installation_id": "inst-1", "runtime_token": token, "refresh_token": "rf-1", "workspace_id": "ws"}
    return {**base, **fields}


class Blackhole:
    """A listening socket that takes connections (in its backlog) and never answers."""

    def __init__(self) -> None:
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self._socket.listen(16)
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"

    def accept(self) -> socket.socket:
        self._socket.settimeout(GUARD)
        return self._socket.accept()[0]

    def close(self) -> None:
        self._socket.close()
