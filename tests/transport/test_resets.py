"""A peer that resets a connection before TLS has begun: no socket is left open for the garbage collector."""

from __future__ import annotations

import gc
import select
import socket
import ssl
import struct
import threading
import warnings
from typing import Any, Callable

import pytest

from sekuire.config import ConnectionConfig
from sekuire.errors import TransportError
from sekuire.transport.http import HttpClient
from sekuire.transport.live import LiveClient

from ..support.servers import RawServer
from ..support.waiting import GUARD


def call(config: ConnectionConfig) -> None:
    client = HttpClient(config)
    try:
        client.request("GET", "/x")
    finally:
        client.close()


def listen(config: ConnectionConfig) -> None:
    client = LiveClient(config)
    try:
        client.open("/x", credential=None, headers={})
    finally:
        client.close()


@pytest.mark.skipif(not hasattr(select, "poll"), reason="needs poll()")
@pytest.mark.parametrize("use", [call, listen])
def test_a_reset_before_the_handshake(use: Callable[[ConnectionConfig], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's ssl module leaves its socket open then; the library closes it."""
    connected = threading.Event()
    wrap = ssl.SSLContext.wrap_socket
    resets = []

    def reset(sock: socket.socket, number: int) -> None:
        assert connected.wait(GUARD)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()

    def wrap_late(self: ssl.SSLContext, sock: socket.socket, *args: Any, **kwargs: Any) -> ssl.SSLSocket:
        connected.set()
        poll = select.poll()
        poll.register(sock, 0)
        assert poll.poll(GUARD * 1000)
        resets.append(sock.gettimeout())
        return wrap(self, sock, *args, **kwargs)

    monkeypatch.setattr(ssl.SSLContext, "wrap_socket", wrap_late)
    with RawServer(reset) as server:
        config = ConnectionConfig(api_base_url=server.url.replace("http:", "https:"), proxies={})
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always", ResourceWarning)
            with pytest.raises(TransportError, match="reset"):
                use(config)
            gc.collect()
    assert resets
    assert [str(one.message) for one in found] == []
