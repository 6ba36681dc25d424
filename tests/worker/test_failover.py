"""A failover that nobody announces: connections that were open stay silent, without FIN or RST; new ones work."""

from __future__ import annotations

import contextlib
import datetime as dt
import socket
import threading
from typing import Any, List, Set
from urllib.parse import urlsplit

import pytest

from sekuire import TaskContext, create_worker
from sekuire.wire import protocol

from ..conftest import AGENT
from ..support.scripted import Request, Scripted
from ..support.servers import RawServer
from ..support.waiting import GUARD, until


class Balancer(RawServer):
    """A TCP proxy whose open connections fall silent at :meth:`fail_over`: it reads them and passes nothing on."""

    def __init__(self, url: str) -> None:
        self._target = (urlsplit(url).hostname or "", urlsplit(url).port or 0)
        self._lock = threading.Lock()
        self._live: Set[int] = set()
        self.lost: List[bytes] = []
        super().__init__(self._relay)

    def fail_over(self) -> None:
        with self._lock:
            self._live.clear()

    def lost_requests(self, name: bytes) -> int:
        """How many requests to an endpoint went into connections that are silent."""
        with self._lock:
            return sum(name in data.partition(b"\r\n")[0] for data in self.lost)

    def _relay(self, client: socket.socket, number: int) -> None:
        with self._lock:
            self._live.add(number)
        with client, socket.create_connection(self._target) as server:
            client.settimeout(None)
            server.settimeout(None)
            back = threading.Thread(target=self._pass, args=(server, client, number), daemon=True)
            back.start()
            self._pass(client, server, number, is_request=True)
            back.join(GUARD)

    def _pass(self, source: socket.socket, target: socket.socket, number: int, is_request: bool = False) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                with self._lock:
                    is_live = number in self._live
                    if not is_live and is_request:
                        self.lost.append(data)
                if is_live:
                    target.sendall(data)
        if is_request:
            # The client has closed it. A silent connection is never closed from the other side.
            with contextlib.suppress(OSError):
                target.shutdown(socket.SHUT_RDWR)


@pytest.mark.slow
@pytest.mark.parametrize("threads", [8, 16])
def test_a_failover_that_leaves_connections_silent(scripted: Scripted, threads: int) -> None:
    """One heartbeat is lost, the next goes over a new connection, and no running task is cancelled."""
    together = threading.Barrier(threads)
    go_on = threading.Event()

    def complete(request: Request) -> Any:
        # All at once, so that each completion has a connection of its own, which is kept.
        together.wait(GUARD)
        return 200, {}

    def heartbeat(request: Request) -> Any:
        end = dt.datetime.now(dt.timezone.utc) + dt.timedelta(seconds=GUARD)
        return 200, {"lease_expires_at": protocol.format_time(end)}

    scripted.on["complete"] = complete
    scripted.on["heartbeat"] = heartbeat
    balancer = Balancer(scripted.url)
    worker = create_worker(
        api_base_url=balancer.url, agent_id=AGENT, install_token="skt_x", heartbeat_interval=600.0, max_workers=threads
    )
    running = threading.Semaphore(0)

    @worker.on_task("echo")
    def echo(ctx: TaskContext, input: Any) -> bool:
        if input.get("wait"):
            running.release()
            go_on.wait(GUARD)
        return ctx.is_cancelled()

    try:
        with worker:
            assert worker.wait_until_connected(GUARD)
            for number in range(threads):
                scripted.task(f"short-{number}")
            scripted.wait_for("complete", threads)
            until(lambda: worker.stats().completed == threads and worker.stats().undelivered == 0)
            for number in range(threads):
                scripted.task(f"long-{number}", input={"wait": True})
            for _ in range(threads):
                assert running.acquire(timeout=GUARD)
            balancer.fail_over()
            before = scripted.count("heartbeat")
            # It asks for a beat, which is lost. The next one does not wait for the interval.
            worker.pause()
            scripted.wait_for("heartbeat", before + 1)
            # With each kept connection tried in turn there would be as many as there are threads.
            assert balancer.lost_requests(b"/heartbeat") <= 1
            go_on.set()
            for number in range(threads):
                assert scripted.completion(f"long-{number}")["output"] is False
            assert balancer.lost_requests(b"/complete") == 0
            until(lambda: worker.stats().undelivered == 0)
    finally:
        go_on.set()
        balancer.close()
