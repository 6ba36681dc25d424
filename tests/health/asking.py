"""Ask a health server, by HTTP as a probe does it or byte by byte."""

from __future__ import annotations

import http.client
import json
import re
import socket
from typing import Any, Dict, Mapping, Tuple

from ..support.waiting import GUARD

Address = Tuple[str, int]


def ask(address: Address, path: str, method: str = "GET", headers: Mapping[str, str] = {}) -> Tuple[int, bytes]:
    """Return the status and the body of an answer."""
    connection = http.client.HTTPConnection(*address, timeout=GUARD)
    try:
        connection.request(method, path, headers=dict(headers))
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def ask_json(address: Address, path: str, headers: Mapping[str, str] = {}) -> Tuple[int, Any]:
    """Return the status of an answer and its JSON."""
    status, body = ask(address, path, headers=headers)
    return status, json.loads(body)


def free_port() -> int:
    """Return a port of this machine that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def raw(address: Address, request: bytes) -> bytes:
    """Send bytes and return all that comes until the server closes the connection."""
    with socket.create_connection(address, timeout=GUARD) as connection:
        connection.sendall(request)
        found = b""
        while True:
            try:
                data = connection.recv(65536)
            except ConnectionResetError:
                return found
            if not data:
                return found
            found += data


_SAMPLE = re.compile(r"^(\w+)(?:\{(.*)\})? (\S+)$")


def samples(text: str) -> Dict[str, Dict[str, float]]:
    """Return the samples of a Prometheus text: name → labels as written → value."""
    found: Dict[str, Dict[str, float]] = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            match = _SAMPLE.match(line)
            assert match is not None, line
            found.setdefault(match[1], {})[match[2] or ""] = float(match[3])
    return found
