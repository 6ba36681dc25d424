"""Small proxies: HTTP with CONNECT, with or without TLS, and SOCKS. Whatever they are asked for leads to one port."""

from __future__ import annotations

import base64
import contextlib
import select
import socket
import ssl
import struct
from typing import IO, List, Optional, Tuple

from .servers import RawServer, read_request
from .waiting import GUARD


def pump(one: socket.socket, other: socket.socket) -> None:
    """Copy what comes from each to the other, until one ends."""
    # On one thread: OpenSSL does not allow a read and a write of one connection at the same time.
    while True:
        ready = [sock for sock in (one, other) if isinstance(sock, ssl.SSLSocket) and sock.pending()]
        for source in ready or select.select([one, other], [], [], GUARD)[0]:
            data = source.recv(65536)
            if not data:
                return
            (other if source is one else one).sendall(data)


class ConnectProxy(RawServer):
    """An HTTP proxy. ``heads`` are the requests that came.

    :param port: where each CONNECT leads to.
    :param context: TLS with the client.
    :param login: ``USER:PASSWORD``, which is asked for.
    :param answer: what is sent instead of an answer to CONNECT; then the connection is closed.
    """

    def __init__(
        self,
        port: int,
        *,
        context: Optional[ssl.SSLContext] = None,
        login: Optional[str] = None,
        answer: Optional[bytes] = None,
    ) -> None:
        self.heads: List[bytes] = []
        self.certificates: List[object] = []
        self._target = port
        self._context = context
        self._login = login
        self._answer = answer
        super().__init__(self._proxy)

    @property
    def url(self) -> str:
        return f"{'http' if self._context is None else 'https'}://127.0.0.1:{self.port}"

    def _proxy(self, client: socket.socket, number: int) -> None:
        if self._context is not None:
            wrapped = self._context.wrap_socket(client, server_side=True)
            self.certificates.append(wrapped.getpeercert())
            client = wrapped
        with client:
            if self._context is None and client.recv(1, socket.MSG_PEEK) == b"\x16":
                # TLS, which an HTTP server takes for a bad request.
                client.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                return
            head = read_request(client)
            self.heads.append(head)
            if self._login is not None and f"Basic {encoded(self._login)}".encode() not in head:
                client.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")
            elif self._answer is not None:
                client.sendall(self._answer)
            else:
                with socket.create_connection(("127.0.0.1", self._target)) as server:
                    if head.startswith(b"CONNECT "):
                        client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
                    else:
                        server.sendall(head)
                    pump(client, server)


def encoded(login: str) -> str:
    return base64.b64encode(login.encode()).decode()


class SocksProxy(RawServer):
    """A SOCKS proxy of version 4, 4a or 5. ``targets`` are the hosts and ports that were asked for.

    :param login: user and password of version 5, which are asked for.
    :param code: what is answered instead of a connection, in the words of the version.
    """

    def __init__(self, port: int, *, login: Optional[Tuple[str, str]] = None, code: Optional[int] = None) -> None:
        self.targets: List[Tuple[str, int]] = []
        self._target = port
        self._login = login
        self._code = code
        super().__init__(self._proxy)

    def url_of(self, scheme: str, login: str = "") -> str:
        return f"{scheme}://{login}127.0.0.1:{self.port}"

    def _proxy(self, client: socket.socket, number: int) -> None:
        # A client that leaves in the middle has sent too little to read.
        with client.makefile("rb") as file, contextlib.suppress(IndexError, struct.error):
            self._talk_to(client, file)

    def _talk_to(self, client: socket.socket, file: IO[bytes]) -> None:
        version = file.read(1)
        if version == b"\x05":
            methods = file.read(file.read(1)[0])
            wanted = 0 if self._login is None else 2
            if wanted not in methods:
                client.sendall(b"\x05\xff")
                return
            client.sendall(bytes((5, wanted)))
            if self._login is not None:
                file.read(1)
                login = tuple(file.read(file.read(1)[0]).decode() for _ in range(2))
                client.sendall(b"\x01\x00" if login == self._login else b"\x01\x01")
                if login != self._login:
                    return
            kind = file.read(4)[3]
            if kind == 3:
                host = file.read(file.read(1)[0]).decode()
            else:
                family = socket.AF_INET if kind == 1 else socket.AF_INET6
                host = socket.inet_ntop(family, file.read(4 if kind == 1 else 16))
            (port,) = struct.unpack(">H", file.read(2))
            answer = bytes((5, self._code or 0, 0, 1, 0, 0, 0, 0, 0, 0))
        elif version == b"\x04":
            _, port, address = struct.unpack(">BH4s", file.read(7))
            self._until_zero(file)
            host = self._until_zero(file) if address[:3] == b"\0\0\0" else socket.inet_ntoa(address)
            answer = bytes((0, self._code or 0x5A, 0, 0, 0, 0, 0, 0))
        else:
            return
        self.targets.append((host, port))
        if self._code is not None:
            client.sendall(answer)
            return
        with socket.create_connection(("127.0.0.1", self._target)) as server:
            client.sendall(answer)
            pump(client, server)

    @staticmethod
    def _until_zero(file: IO[bytes]) -> str:
        text = b""
        while (piece := file.read(1)) not in (b"\0", b""):
            text += piece
        return text.decode()
