"""The worker's stream over bad roads: through proxies, in odd pieces, compressed, over TLS, and gone without a word."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import threading
import zlib
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, List, Optional
from urllib.parse import urlsplit

import pytest

from sekuire import TaskContext, Worker

from ..conftest import AGENT
from ..support.scripted import Request, Scripted
from ..support.servers import Certificates, RawServer
from ..support.waiting import GUARD, until

Make = Callable[..., Worker]
#: What becomes of the bytes of a stream: given each piece, and None at the end, it gives the pieces to pass on.
Road = Callable[[Optional[bytes]], Iterable[bytes]]


class Relay(RawServer):
    """A proxy in front of a platform: the bytes of a task stream's answer go through ``road()``, a new one for each.

    :param context: what makes it speak TLS with its client.
    """

    def __init__(self, url: str, road: Callable[[], Road], context: Optional[ssl.SSLContext] = None) -> None:
        self._target = (urlsplit(url).hostname or "", urlsplit(url).port or 0)
        self._road = road
        self._context = context
        super().__init__(self._relay)

    @property
    def url(self) -> str:
        return super().url if self._context is None else f"https://127.0.0.1:{self.port}"

    def _relay(self, client: socket.socket, number: int) -> None:
        if self._context is not None:
            client = self._context.wrap_socket(client, server_side=True)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with client, socket.create_connection(self._target) as server:
            server.settimeout(None)
            client.settimeout(None)
            first = client.recv(65536)
            server.sendall(first)
            back = threading.Thread(target=self._forth, args=(client, server), daemon=True)
            back.start()
            road: Road = (
                self._road() if b"/tasks/stream?" in first.partition(b"\r\n")[0] else lambda piece: [piece or b""]
            )
            with contextlib.suppress(OSError):
                self._back(server, client, road)
            for sock in (client, server):
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
            back.join(GUARD)

    @staticmethod
    def _forth(client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                data = client.recv(65536)
                if not data:
                    break
                server.sendall(data)
            server.shutdown(socket.SHUT_RDWR)

    @staticmethod
    def _back(server: socket.socket, client: socket.socket, road: Road) -> None:
        while True:
            data = server.recv(65536)
            for piece in road(data or None):
                if piece:
                    client.sendall(piece)
            if not data:
                return


@pytest.fixture
def platform(make_platform: Callable[..., Any]) -> Any:
    """A local platform that answers under the relay's address too."""
    return make_platform(allowed_hosts=["127.0.0.1"])


@pytest.fixture
def relay() -> Iterator[Callable[..., Relay]]:
    made: List[Relay] = []

    def make(*args: Any, **options: Any) -> Relay:
        made.append(Relay(*args, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


def plain() -> Road:
    return lambda piece: [piece] if piece else []


def byte_by_byte() -> Road:
    return lambda piece: [bytes([one]) for one in piece or b""]


def through(platform: Any, relay: Relay, worker_of: Make, **options: Any) -> Worker:
    return worker_of(relay.url, install_token=platform.create_install_token(AGENT), **options)


def runs_of(worker: Worker) -> List[str]:
    """Registers ``work``; the ids of the tasks it ran."""
    runs: List[str] = []

    @worker.on_task("work")
    def work(ctx: TaskContext, input: Any) -> Any:
        runs.append(ctx.task_id)
        return input

    return runs


def test_one_byte_at_a_time(platform: Any, relay: Callable[..., Relay], worker_of: Make) -> None:
    """A stream that arrives byte by byte brings every task, once."""
    worker = through(platform, relay(platform.url, byte_by_byte), worker_of)
    runs = runs_of(worker)
    with worker:
        ids = [platform.submit("work", {"number": number, "text": "é" * 50}, AGENT) for number in range(5)]
        for number, task_id in enumerate(ids):
            assert platform.wait(task_id, GUARD)["output"]["number"] == number
    assert sorted(runs) == sorted(ids)


def test_a_proxy_that_buffers(
    platform: Any, relay: Callable[..., Relay], worker_of: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """Behind a proxy that holds the stream back the silence is noticed and told; a task that comes late runs once."""
    helpful = threading.Event()

    def buffering() -> Road:
        held = bytearray()

        def road(piece: Optional[bytes]) -> Iterable[bytes]:
            held.extend(piece or b"")
            if not helpful.is_set() and piece and len(held) < 8192:
                return []
            out = bytes(held)
            held.clear()
            return [out]

        return road

    options = {"stream_idle_timeout": 0.2, "read_timeout": 0.5, "start_timeout": 0.05}
    worker = through(platform, relay(platform.url, buffering), worker_of, **options)
    runs = runs_of(worker)
    worker.start()
    until(lambda: any("did not answer in time" in r.getMessage() or "was silent for" in r.getMessage()
                      for r in caplog.records))  # fmt: skip
    task_id = platform.submit("work", 7, AGENT)
    helpful.set()
    assert platform.wait(task_id, GUARD)["output"] == 7
    worker.stop()
    assert runs == [task_id]


@pytest.mark.parametrize("tls", [False, True], ids=["http", "tls"])
def test_a_connection_that_is_dead_without_a_word(
    platform: Any, relay: Callable[..., Relay], worker_of: Make, certificates: Certificates, tls: bool
) -> None:
    """A half-open connection (no FIN, no RST) is given up for its silence; what was sent into it comes again."""
    roads: List[List[bool]] = []

    def mute() -> Road:
        dead: List[bool] = []
        roads.append(dead)
        return lambda piece: [] if dead else [piece or b""]

    options: Any = {"verify": certificates.ca} if tls else {}
    passage = relay(platform.url, mute, certificates.server_context() if tls else None)
    worker = through(platform, passage, worker_of, stream_idle_timeout=0.3, **options)
    runs = runs_of(worker)
    with worker:
        first = platform.submit("work", 1, AGENT)
        assert platform.wait(first, GUARD)["output"] == 1
        roads[0].append(True)
        second = platform.submit("work", 2, AGENT)
        assert platform.wait(second, GUARD)["output"] == 2
        assert worker.stats().reconnects >= 1
    assert runs == [first, second]


def test_a_stall_in_the_middle_of_an_event(platform: Any, relay: Callable[..., Relay], worker_of: Make) -> None:
    """Half an event is not taken for one; after the reconnect the whole one comes, and runs once."""
    stalled: List[bool] = []

    def stalling() -> Road:
        is_mine = not stalled
        stalled.append(False)

        def road(piece: Optional[bytes]) -> Iterable[bytes]:
            if is_mine and stalled[0]:
                return []
            if is_mine and piece and b"event: task" in piece:
                stalled[0] = True
                return [piece[: piece.index(b'"input"') + 20]]
            return [piece or b""]

        return road

    worker = through(platform, relay(platform.url, stalling), worker_of, stream_idle_timeout=0.3)
    runs = runs_of(worker)
    with worker:
        task_id = platform.submit("work", {"text": "z" * 500}, AGENT)
        assert platform.wait(task_id, GUARD)["output"] == {"text": "z" * 500}
    assert runs == [task_id]
    assert stalled[0]


def test_a_whole_life_over_tls(
    platform: Any, relay: Callable[..., Relay], worker_of: Make, certificates: Certificates
) -> None:
    """Login, stream, results and goodbye over TLS, with a CA of one's own and a client certificate."""
    passage = relay(platform.url, plain, certificates.server_context(client_ca=True))
    cert = (certificates.client, certificates.client_key)
    worker = through(platform, passage, worker_of, verify=certificates.ca, client_cert=cert)
    runs = runs_of(worker)
    with worker:
        task_id = platform.submit("work", "secret", AGENT)
        assert platform.wait(task_id, GUARD)["output"] == "secret"
        platform.drop_streams()
        again = platform.submit("work", "again", AGENT)
        assert platform.wait(again, GUARD)["output"] == "again"
    assert runs == [task_id, again]
    assert platform.installations()[0]["status"] == "stopped"


def test_tls_is_verified_by_default(
    platform: Any, relay: Callable[..., Relay], worker_of: Make, certificates: Certificates
) -> None:
    """Without a setting, a certificate that nobody known has issued is refused before anything is sent."""
    passage = relay(platform.url, plain, certificates.server_context())
    worker = through(platform, passage, worker_of, start_timeout=0.5)
    runs_of(worker)
    with pytest.raises(Exception, match="verify=") as caught:
        worker.start(block=True)
    assert "TLS with" in str(caught.value)
    assert platform.requests == []


# -- answers of a server that is not like ours --


def task_event(task_id: str, **fields: Any) -> bytes:
    return b"event: task\ndata: " + json.dumps({"task_id": task_id, "capability": "work", **fields}).encode() + b"\n\n"


@pytest.mark.parametrize("kind", ["plain", "gzip", "gzip chunked"])
def test_a_server_that_closes_and_one_that_compresses(scripted: Scripted, worker_of: Make, kind: str) -> None:
    """A stream without chunks ends with its connection, a compressed one is unpacked; each event comes at once."""
    handled = threading.Event()
    streams: List[int] = []

    def stream(request: Request) -> None:
        streams.append(len(streams))
        number = streams[-1]
        packer = zlib.compressobj(wbits=zlib.MAX_WBITS | 16) if "gzip" in kind else None
        headers = ["Content-Encoding: gzip"] if packer else []
        if "chunked" in kind:
            headers.append("Transfer-Encoding: chunked")
        request.head(200, "Content-Type: text/event-stream", "Connection: close", *headers)

        def send(data: bytes) -> None:
            if packer is not None:
                data = packer.compress(data) + packer.flush(zlib.Z_SYNC_FLUSH)
            request.write(b"%x\r\n%s\r\n" % (len(data), data) if "chunked" in kind else data)

        for part in range(2):
            handled.clear()
            send(task_event(f"t{number}-{part}"))
            # The next one is sent when this one has been answered: nothing may be held back.
            assert handled.wait(GUARD)

    def complete(request: Request) -> Any:
        handled.set()
        return 200, {}

    scripted.on["stream"], scripted.on["complete"] = stream, complete
    worker = worker_of(scripted)
    runs = runs_of(worker)
    with worker:
        until(lambda: len(runs) >= 6)
        assert worker.stats().reconnects >= 2
    assert runs[:6] == [f"t{number}-{part}" for number in range(3) for part in range(2)]


def test_an_event_of_ten_megabytes(scripted: Scripted, worker_of: Make) -> None:
    """An event of 10 MB, and a result as large, go through."""
    worker = worker_of(scripted)
    runs = runs_of(worker)
    text = "0123456789" * 1024 * 1024
    with worker:
        scripted.task("big", "work", input={"text": text})
        assert scripted.completion("big")["output"] == {"text": text}
    assert runs == ["big"]


def test_thousands_of_events_in_one_read(scripted: Scripted, worker_of: Make) -> None:
    """Thousands of events that arrive together are taken one by one, in order, within the bounds of the queue."""
    worker = worker_of(scripted, max_workers=1, max_queued=2)
    runs = runs_of(worker)
    parts: List[bytes] = []
    for number in range(6000):
        parts.append(b"event: ping\ndata: {}\n\n" if number % 20 else task_event(f"t{number}"))
    with worker:
        scripted.raw(b"".join(parts))
        until(lambda: worker.stats().completed == 300)
        assert worker.stats().received == 300
    assert runs == [f"t{number}" for number in range(0, 6000, 20)]


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    directory: Path = tmp_path_factory.mktemp("certificates")
    return Certificates(str(directory))
