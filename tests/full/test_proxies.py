"""A worker behind real proxies: nginx, haproxy, squid, microsocks, and stunnel before squid."""

from __future__ import annotations

import collections
import contextlib
import logging
import pathlib
import threading
import time
from typing import Any, Callable, Counter, Iterator, List

import pytest

from sekuire.config import ConnectionConfig
from sekuire.errors import TransportError
from sekuire.local import LocalPlatform
from sekuire.transport.http import HttpClient

from ..conftest import AGENT
from ..support.servers import Certificates
from ..support.waiting import GUARD, client_threads, until
from .proxies import Nginx, haproxy, microsocks, squid, stunnel

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


def check_through_a_reload(platform: LocalPlatform, runs: Counter[int], worker: Any, front: Nginx) -> None:
    """Tasks and a command arrive, and tasks do so after ``front`` is reloaded and the stream is opened again."""
    tasks = submit(platform, 0)
    check_delivered(platform, runs, tasks)
    check_command(platform, worker)
    reconnects = worker.stats().reconnects
    front.reload()
    until(lambda: worker.stats().reconnects > reconnects)
    tasks += submit(platform, len(tasks))
    check_delivered(platform, runs, tasks)


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
        check_through_a_reload(platform, runs, worker, front)
        worker.stop()
    assert worker.stats().undelivered == 0


LOGIN = "worker:hunter2/x"
IN_URL = "worker:hunter2%2Fx@"


def problem(url: str, proxy: str) -> str:
    """What is said of a call through ``proxy``, which does not show its password."""
    http = HttpClient(ConnectionConfig(api_base_url=url, proxies={"https": proxy}))
    with pytest.raises(TransportError) as caught:
        http.request("GET", "/x")
    http.close()
    assert "hunter2" not in str(caught.value)
    return str(caught.value)


def test_microsocks(platform: LocalPlatform, worker_at: Make, runs: Counter[int], tmp_path: pathlib.Path) -> None:
    """Calls and the stream through a SOCKS5 proxy, without TLS."""
    with microsocks(tmp_path) as proxy:
        worker = worker_at(platform.url, proxies={"http": proxy.url.replace("http", "socks5")})
        tasks = submit(platform, 0)
        check_delivered(platform, runs, tasks)
        check_command(platform, worker)
        worker.stop()
    assert worker.stats().undelivered == 0


def test_microsocks_and_tls(
    platform: LocalPlatform, worker_at: Make, runs: Counter[int], tmp_path: pathlib.Path
) -> None:
    """A SOCKS5 proxy with a password, which resolves the name, before nginx with TLS."""
    certificates = Certificates(str(tmp_path))
    (tmp_path / "nginx").mkdir()
    with (
        microsocks(tmp_path, login=LOGIN) as proxy,
        nginx_for(platform, tmp_path / "nginx", buffering=False, certificate=certificates.server) as front,
    ):
        address = f"socks5h://{IN_URL}127.0.0.1:{proxy.port}"
        worker = worker_at(f"https://localhost:{front.port}", proxies={"https": address}, verify=certificates.ca)
        check_through_a_reload(platform, runs, worker, front)
        worker.stop()
    assert worker.stats().undelivered == 0


def test_what_microsocks_says(tmp_path: pathlib.Path) -> None:
    """A missing and a wrong password, a refusal and an unknown name are said in words."""
    with microsocks(tmp_path, login=LOGIN) as proxy:
        url = f"socks5h://127.0.0.1:{proxy.port}"
        assert "asks for a user and a password" in problem("https://platform.invalid", url)
        wrong = url.replace("//", "//worker:hunter2@")
        assert "rejected its user and password" in problem("https://platform.invalid", wrong)
        right = url.replace("//", f"//{IN_URL}")
        assert "was refused a connection to 127.0.0.1:1;" in problem("https://127.0.0.1:1", right)
        assert "cannot connect to platform.invalid:443 (" in problem("https://platform.invalid", right)
        assert "socks5h:// for a SOCKS proxy" in problem("https://platform.invalid", proxy.url)


def test_stunnel_before_squid(
    platform: LocalPlatform, worker_at: Make, runs: Counter[int], tmp_path: pathlib.Path
) -> None:
    """An HTTPS proxy: TLS to nginx within TLS to the proxy. The stream stays open past the read timeout."""
    certificates = Certificates(str(tmp_path))
    for name in ("nginx", "squid"):
        (tmp_path / name).mkdir()
    with (
        squid(tmp_path / "squid") as inner,
        stunnel(tmp_path, inner.port, certificates.server) as proxy,
        nginx_for(platform, tmp_path / "nginx", buffering=False, certificate=certificates.server) as front,
    ):
        address = f"https://localhost:{proxy.port}"
        options = {"proxies": {"https": address}, "verify": certificates.ca, "read_timeout": 4.0}
        worker = worker_at(f"https://localhost:{front.port}", **options)
        tasks = submit(platform, 0)
        check_delivered(platform, runs, tasks)
        check_command(platform, worker)
        heartbeats = platform.count("heartbeat", 200)
        # Longer than the read timeout; the platform's comments come every 15 s.
        time.sleep(6.0)
        assert worker.stats().reconnects == 0
        assert platform.count("heartbeat", 200) >= heartbeats
        front.reload()
        until(lambda: worker.stats().reconnects > 0)
        tasks += submit(platform, len(tasks))
        check_delivered(platform, runs, tasks)
        worker.stop()
        assert "does not speak TLS" in problem("https://platform.invalid", f"https://127.0.0.1:{inner.port}")
        assert "https:// for an HTTP proxy" in problem("https://platform.invalid", proxy.url)
        assert "with the proxy" in problem("https://platform.invalid", address)
    assert worker.stats().undelivered == 0


def test_what_squid_says(tmp_path: pathlib.Path) -> None:
    """A missing and a wrong password (407), a rule (403), a refusal and an unknown name are said in words."""
    with squid(tmp_path, login=LOGIN) as proxy:
        right = proxy.url.replace("//", f"//{IN_URL}")
        assert "asks for a user and a password (407)" in problem("https://platform.invalid", proxy.url)
        wrong = proxy.url.replace("//", "//worker:hunter2@")
        assert "rejected its user and password (407)" in problem("https://platform.invalid", wrong)
        assert "does not allow connections to forbidden.invalid:443 (403)" in problem(
            "https://forbidden.invalid", right
        )
        assert "was refused a connection to 127.0.0.1:1;" in problem("https://127.0.0.1:1", right)
        # Which of the two depends on squid's version.
        unknown = problem("https://platform.invalid", right)
        assert "cannot resolve the name of" in unknown or "that the proxy can resolve and reach it" in unknown
        # It waits for the end of a line.
        assert "check that it is a SOCKS proxy" in problem(
            "https://platform.invalid", f"socks4a://127.0.0.1:{proxy.port}"
        )
