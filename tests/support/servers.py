"""Small real servers that do as they are told, well or badly, and helpers to look at what is left behind."""

from __future__ import annotations

import contextlib
import gc
import http.server
import json
import os
import socket
import ssl
import subprocess
import sys
import textwrap
import threading
import traceback
import types
from typing import Any, Callable, Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

from .waiting import GUARD


class Request(NamedTuple):
    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes
    connection: int

    def json(self) -> Any:
        return json.loads(self.body)


class Answer(NamedTuple):
    status: int = 200
    body: Union[bytes, Any] = b""
    headers: Sequence[Tuple[str, str]] = ()

    def data(self) -> bytes:
        return self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()


class WebServer:
    """HTTP/1.1 with keep-alive. ``answer(request)`` gives an :class:`Answer`; ``requests`` remembers what came."""

    def __init__(self, answer: Callable[[Request], Answer], context: Optional[ssl.SSLContext] = None) -> None:
        self.requests: List[Request] = []
        self.connections = 0
        self._lock = threading.Lock()
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = GUARD

            def setup(self) -> None:
                with server._lock:
                    server.connections += 1
                    self.number = server.connections
                super().setup()

            def handle(self) -> None:
                with contextlib.suppress(OSError):
                    super().handle()

            def reply(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                request = Request(self.command, self.path, self.headers, body, self.number)
                with server._lock:
                    server.requests.append(request)
                result = answer(request)
                self.send_response(result.status)
                names = [name.lower() for name, _ in result.headers]
                for name, value in result.headers:
                    self.send_header(name, value)
                if "content-length" not in names and "transfer-encoding" not in names:
                    self.send_header("Content-Length", str(len(result.data())))
                self.end_headers()
                self.wfile.write(result.data())

            do_GET = do_POST = do_PUT = reply

            def log_message(self, *args: Any) -> None:
                pass

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 256

            def finish_request(self, request: Any, address: Any) -> None:
                # The handshake on the connection's own thread, so that a failed one harms nobody else.
                if context is None:
                    super().finish_request(request, address)
                    return
                try:
                    with context.wrap_socket(request, server_side=True) as wrapped:
                        super().finish_request(wrapped, address)
                except OSError as error:
                    # ssl leaves a socket open that is reset while it is wrapped.
                    for frame, _ in traceback.walk_tb(error.__traceback__):
                        wrapped = frame.f_locals.get("self")
                        if isinstance(wrapped, ssl.SSLSocket):
                            wrapped.close()

            def handle_error(self, request: Any, address: Any) -> None:
                pass

        self._server = Server(("127.0.0.1", 0), Handler)
        self.port: int = self._server.server_port
        self._scheme = "http" if context is None else "https"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"{self._scheme}://127.0.0.1:{self.port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(GUARD)

    def __enter__(self) -> WebServer:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()


class RawServer:
    """Each connection is given to ``talk(socket, number)``, on a thread of its own; numbers count from 0."""

    def __init__(self, talk: Callable[[socket.socket, int], None]) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.accepted = 0
        self.ended = threading.Event()
        self._talk = talk
        self._open: List[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            sock.settimeout(GUARD)
            self._open.append(sock)
            number = self.accepted
            self.accepted += 1
            threading.Thread(target=self._serve, args=(sock, number), daemon=True).start()

    def _serve(self, sock: socket.socket, number: int) -> None:
        with contextlib.suppress(OSError), sock:
            self._talk(sock, number)

    def close(self) -> None:
        self.ended.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for sock in self._open:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> RawServer:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()


def read_request(sock: socket.socket) -> bytes:
    """One request, headers and body, from a raw connection."""
    data = b""
    while b"\r\n\r\n" not in data:
        piece = sock.recv(65536)
        if not piece:
            return data
        data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    length = 0
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            length = int(value)
    while len(body) < length:
        body += sock.recv(65536)
    return head + b"\r\n\r\n" + body


def free_port() -> int:
    """A port on which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


@contextlib.contextmanager
def refusing_url() -> Iterator[str]:
    """A URL that refuses connections, and stays that way: the port is bound, but nobody listens."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"


def run_python(script: str, *args: str, forks: bool = False) -> subprocess.CompletedProcess[str]:
    """``script`` in a Python of its own.

    :param forks: it forks while threads run: a coverage measurement, whose locks do not survive that, is left out.
    """
    environ = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if forks:
        environ = {name: value for name, value in environ.items() if not name.startswith("COVERAGE_")}
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(script), *args],
        check=False,
        capture_output=True,
        text=True,
        timeout=GUARD,
        env=environ,
    )
    assert result.returncode == 0, result.stderr
    return result


# -- what an error leaves behind --------------------------------------------------------------------------------------


def frames_of(error: BaseException) -> Iterator[types.FrameType]:
    """The frames of the library in an error's traceback and those of all that it refers to."""
    seen: List[BaseException] = []
    pending: List[Optional[BaseException]] = [error]
    while pending:
        one = pending.pop()
        if one is None or any(one is other for other in seen):
            continue
        seen.append(one)
        pending += [one.__cause__, one.__context__]
        trace = one.__traceback__
        while trace is not None:
            if "tests" not in os.path.relpath(trace.tb_frame.f_code.co_filename).split(os.sep):
                yield trace.tb_frame
            trace = trace.tb_next


def inside(value: Any, depth: int) -> Iterator[str]:
    """The repr of a value and of what its attributes, items and cells hold, ``depth`` levels down."""
    if isinstance(value, bytes):
        yield value.decode("latin-1")
    else:
        yield repr(value)
    if depth == 0 or isinstance(value, (type, types.ModuleType, types.FrameType)):
        return
    parts: List[Any] = []
    if isinstance(value, Mapping):
        parts += [*value.keys(), *value.values()]
    elif isinstance(value, (list, tuple, set, frozenset)):
        parts += value
    if isinstance(value, types.FunctionType):
        for cell in value.__closure__ or ():
            with contextlib.suppress(ValueError):
                parts.append(cell.cell_contents)
    parts += list(getattr(value, "__dict__", {}).values())
    for cls in type(value).__mro__:
        slots = cls.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            # Name-mangled slots are what a Secret hides its text in: not reachable without meaning to.
            if not name.startswith("__") and hasattr(value, name):
                parts.append(getattr(value, name))
    for part in parts:
        yield from inside(part, depth - 1)


def traces_of(error: BaseException, depth: int = 2) -> str:
    """All that a tool which shows tracebacks with their variables could show of the library's frames."""
    lines = [repr(error), str(error), repr(error.args), repr(vars(error))]
    for frame in frames_of(error):
        for name, value in list(frame.f_locals.items()):
            lines += [f"{frame.f_code.co_name}.{name} = {text}" for text in inside(value, depth)]
    return "\n".join(lines)


def assert_clean(error: BaseException, *tokens: str) -> None:
    """The error names no cause, and neither it nor a frame of the library holds one of ``tokens``."""
    assert error.__cause__ is None
    assert error.__context__ is None
    found = [line for line in traces_of(error).splitlines() for token in tokens if token in line]
    assert not found, found


def open_descriptors() -> int:
    """How many file descriptors this process has open."""
    gc.collect()
    if os.path.isdir("/proc/self/fd"):
        return len(os.listdir("/proc/self/fd"))
    count = 0
    for number in range(1024):
        with contextlib.suppress(OSError):
            os.fstat(number)
            count += 1
    return count


# -- TLS --------------------------------------------------------------------------------------------------------------


class Certificates:
    """A certificate authority, a server's and a client's certificate, made with the ``openssl`` program."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self.ca = self._path("ca.pem")
        self.server = self._path("server.pem")
        self.client = self._path("client.pem")
        self.client_key = self._path("client.key")
        self.self_signed = self._path("self.pem")
        names = "subjectAltName=DNS:localhost,IP:127.0.0.1"
        self._new("ca", "/CN=Test CA", "basicConstraints=critical,CA:TRUE", "keyUsage=critical,keyCertSign")
        self._new("self", "/CN=localhost", names)
        for name, extension in (("server", names), ("client", "subjectAltName=DNS:client")):
            self._run("req", "-new", *self._key(name), "-out", self._path(f"{name}.csr"), "-subj", f"/CN={name}")
            with open(self._path(f"{name}.ext"), "w") as file:
                file.write(extension)
            self._run(
                "x509", "-req", "-in", self._path(f"{name}.csr"), "-CA", self.ca, "-CAkey", self._path("ca.key"),
                "-CAcreateserial", "-days", "2", "-extfile", self._path(f"{name}.ext"),
                "-out", self._path(f"{name}.pem"),
            )  # fmt: skip

    def server_context(self, which: str = "server", client_ca: bool = False) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self._path(f"{which}.pem"), self._path(f"{which}.key"))
        if client_ca:
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(self.ca)
        return context

    def _path(self, name: str) -> str:
        return os.path.join(self._directory, name)

    def _key(self, name: str) -> List[str]:
        return ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", self._path(f"{name}.key")]

    def _new(self, name: str, subject: str, *extensions: str) -> None:
        added = [part for extension in extensions for part in ("-addext", extension)]
        output = self._path(f"{name}.pem")
        self._run("req", "-x509", *self._key(name), "-out", output, "-days", "2", "-subj", subject, *added)

    @staticmethod
    def _run(*args: str) -> None:
        subprocess.run(["openssl", *args], check=True, capture_output=True, timeout=GUARD)


def grant_of(number: int = 1, **fields: Any) -> Dict[str, Any]:
    """The answer to a bootstrap, with recognisable tokens."""
    return {
        "installation_id": "inst-1",
        "runtime_token": f"skr_runtime_{number}",
        "refresh_token": f"skf_refresh_{number}",
        "workspace_id": "ws-1",
        **fields,
    }
