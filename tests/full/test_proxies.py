"""A worker behind real proxies: nginx, haproxy, squid."""

from __future__ import annotations

import collections
import contextlib
import logging
import pathlib
import threading
from typing import Any, Callable, Counter, Iterator, List

import pytest

from sekuire.local import LocalPlatform

from ..conftest import AGENT
from ..support.servers import Certificates
from ..support.waiting import GUARD, client_threads, until
from .proxies import Nginx, haproxy, squid

pytestmark = pytest.mark.full

Make = Callable[..., Any]
TASKS = 50


@pytest.fixture
def platform(make_platform: Callable[..., LocalPlatform]) -> LocalPlatform:
    """A platform that answers to its proxies' Host, and gives soon again what a cut stream has lost."""
    return make_platform(allowed_hosts=["127.0.0.1", "localhost"], redelivery_delay=0.5)


@pytest.fixture
def runs() -> Counter[int]:
    return collections.Counter()


@pytest.fixture
def worker_at(worker_of: Make, platform: LocalPlatform, runs: Counter[int]) -> Make:
    """A started worker that reaches the platform by ``url`` and counts its runs."""
    lock = threading.Lock()

    def start(url: str, **options: Any) -> Any:
        worker = worker_of(url, install_token=platform.create_install_token(AGENT), reconnect_max=1.0, **options)

        def work(ctx: Any, number: int) -> int:
            with lock:
                runs[number] += 1
            return 2 * number

        worker.on_task("work", work)
        worker.start()
        return worker

    return start


def port_of(platform: LocalPlatform) -> int:
    return int(platform.url.rpartition(":")[2])


def submit(platform: LocalPlatform, first: int, count: int = TASKS) -> List[str]:
    return [platform.submit("work", number, agent_id=AGENT) for number in range(first, first + count)]


def check_delivered(platform: LocalPlatform, runs: Counter[int], tasks: List[str]) -> None:
    """Every task is completed with its own result, and each number ran once."""
    outputs = [platform.wait(task_id, timeout=GUARD).get("output") for task_id in tasks]
    assert outputs == [2 * number for number in range(len(tasks))]
    assert runs == collections.Counter(range(len(tasks)))


def check_command(platform: LocalPlatform, worker: Any) -> None:
    """A pause and a resume arrive through the stream."""
    installation = platform.installations()[0]["installation_id"]
    platform.command(installation, "pause", "because")
    until(worker.is_paused)
    platform.command(installation, "resume")
    until(lambda: not worker.is_paused())


@contextlib.contextmanager
def nginx_for(platform: LocalPlatform, directory: pathlib.Path, **options: Any) -> Iterator[Nginx]:
    with contextlib.closing(Nginx(directory, port_of(platform), **options)) as proxy:
        yield proxy


def test_nginx(platform: LocalPlatform, worker_at: Make, runs: Counter[int], tmp_path: pathlib.Path) -> None:
    """Tasks and commands pass; a reload in the middle, which ends the old streams, loses nothing."""
    with nginx_for(platform, tmp_path, buffering=False) as proxy:
        worker = worker_at(proxy.url)
        tasks = submit(platform, 0)
        check_delivered(platform, runs, tasks)
        check_command(platform, worker)
        reconnects = worker.stats().reconnects
        proxy.reload()
        tasks += submit(platform, len(tasks))
        until(lambda: worker.stats().reconnects > reconnects)
        tasks += submit(platform, len(tasks))
        check_delivered(platform, runs, tasks)
        worker.stop()
    assert worker.stats().undelivered == 0


def test_nginx_that_buffers(
    platform: LocalPlatform,
    worker_at: Make,
    runs: Counter[int],
    tmp_path: pathlib.Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A stream that is held back is named in the log, again and again with bounded means; nothing in it is lost."""
    with nginx_for(platform, tmp_path, buffering=True) as proxy:
        worker = worker_at(proxy.url, read_timeout=1.0, stream_idle_timeout=1.0, start_timeout=0.1)
        tasks = submit(platform, 0)

        def complaints() -> int:
            return sum(
                record.name.startswith("sekuire") and record.levelno >= logging.WARNING and proxy_is_named(record)
                for record in caplog.records
            )

        until(lambda: complaints() >= 1)
        threads = len(client_threads())
        until(lambda: platform.count("task_stream") >= 4)
        assert len(client_threads()) <= threads + 1
        # Heartbeats and the rest are not held back.
        assert worker.is_alive()
        assert platform.count("heartbeat", 200) > 0
        proxy.configure(buffering=False)
        proxy.reload()
        check_delivered(platform, runs, tasks)
        worker.stop()
    assert worker.stats().undelivered == 0


def proxy_is_named(record: logging.LogRecord) -> bool:
    text = record.getMessage()
    return "did not answer in time" in text or "was silent for" in text


def test_haproxy_with_limits_of_ten_seconds(
    platform: LocalPlatform, worker_at: Make, runs: Counter[int], tmp_path: pathlib.Path
) -> None:
    """An idle stream is cut by the proxy before the platform's comment comes (15 s); the worker comes back."""
    with haproxy(tmp_path, port_of(platform)) as proxy:
        worker = worker_at(proxy.url, heartbeat_interval=12.0)
        tasks = submit(platform, 0)
        check_delivered(platform, runs, tasks)
        check_command(platform, worker)
        check_delivered(platform, runs, tasks)
        reconnects = worker.stats().reconnects
        # Longer than every limit: the stream and the kept connections of calls have ended.
        until(lambda: worker.stats().reconnects > reconnects)
        until(worker.is_connected)
        tasks += submit(platform, len(tasks))
        check_delivered(platform, runs, tasks)
        check_command(platform, worker)
        check_delivered(platform, runs, tasks)
        worker.stop()
    assert worker.stats().undelivered == 0


def test_squid(platform: LocalPlatform, worker_at: Make, runs: Counter[int], tmp_path: pathlib.Path) -> None:
    """The same through a forward proxy, which sees every request."""
    with squid(tmp_path) as proxy:
        worker = worker_at(platform.url, proxies={"http": proxy.url})
        tasks = submit(platform, 0)
        check_delivered(platform, runs, tasks)
        check_command(platform, worker)
        tasks += submit(platform, len(tasks))
        check_delivered(platform, runs, tasks)
        worker.stop()
    assert worker.stats().undelivered == 0


def test_squid_and_tls(platform: LocalPlatform, worker_at: Make, runs: Counter[int], tmp_path: pathlib.Path) -> None:
    """CONNECT through a forward proxy, to nginx with a certificate of a private authority."""
    certificates = Certificates(str(tmp_path))
    (tmp_path / "nginx").mkdir()
    (tmp_path / "squid").mkdir()
    with (
        squid(tmp_path / "squid") as proxy,
        nginx_for(platform, tmp_path / "nginx", buffering=False, certificate=certificates.server) as front,
    ):
        url = f"https://localhost:{front.port}"
        worker = worker_at(url, proxies={"https": proxy.url}, verify=certificates.ca)
        tasks = submit(platform, 0)
        check_delivered(platform, runs, tasks)
        check_command(platform, worker)
        reconnects = worker.stats().reconnects
        front.reload()
        until(lambda: worker.stats().reconnects > reconnects)
        tasks += submit(platform, len(tasks))
        check_delivered(platform, runs, tasks)
        worker.stop()
    assert worker.stats().undelivered == 0
