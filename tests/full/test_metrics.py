"""The metrics as Prometheus' own programs read them, and health under greenlets and pre-forking servers."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys
from typing import Any, Callable, Iterator

import pytest

from sekuire import Worker
from sekuire.errors import TaskError
from sekuire.local import LocalPlatform

from ..conftest import AGENT
from ..docs.markdown import blocks
from ..health.asking import ask, ask_json, free_port
from ..support.waiting import GUARD, until
from .test_greenlets import PATCH

pytestmark = pytest.mark.full

Make = Callable[..., Worker]


def program(name: str) -> str:
    found = shutil.which(name)
    assert found is not None, f"{name} is missing; .ci/services installs it"
    return found


def need(package: str) -> None:
    """Skip the test where a package is missing. Do not import it: eventlet would warn of each later fork."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")


@pytest.fixture
def worker(platform: LocalPlatform, worker_of: Make) -> Iterator[Worker]:
    made = worker_of(platform, health=("127.0.0.1", 0))

    @made.on_task("fail")
    def fail(ctx: Any, input: Any) -> Any:
        raise TaskError("no_text", "as asked")

    made.on_task("copy", lambda ctx, input: input)
    with made:
        assert made.wait_until_connected(GUARD)
        for capability in ("copy", "copy", "fail"):
            platform.wait(platform.submit(capability, 1, agent_id=AGENT), GUARD)
        until(lambda: made.stats().undelivered == 0 and made.health().heartbeat_age is not None)
        yield made


def test_promtool(worker: Worker) -> None:
    """`promtool check metrics` has nothing to say."""
    assert worker.health_address is not None
    text = ask(worker.health_address, "/metrics")[1]
    done = subprocess.run(
        [program("promtool"), "check", "metrics"], input=text, capture_output=True, timeout=GUARD, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_a_scrape(worker: Worker, tmp_path: pathlib.Path) -> None:
    """Prometheus with the documentation's configuration finds the tasks."""
    assert worker.health_address is not None
    (example,) = [one.text for one in blocks("docs/observability.md") if "scrape_configs" in one.text]
    target = "{}:{}".format(*worker.health_address)
    config = example.replace('"worker-1:8080", "worker-2:8080"', f'"{target}"').replace("15s", "1s")
    assert target in config
    (tmp_path / "prometheus.yml").write_text(config)
    port = free_port()
    with open(tmp_path / "log", "wb") as log:
        prometheus = subprocess.Popen(
            [
                program("prometheus"),
                f"--config.file={tmp_path / 'prometheus.yml'}",
                f"--storage.tsdb.path={tmp_path / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log,
            stderr=log,
        )
    try:

        def found() -> Any:
            with contextlib.suppress(OSError, ValueError):
                query = "/api/v1/query?query=sekuire_tasks_finished_total"
                answer = json.loads(ask(("127.0.0.1", port), query)[1])
                return {one["metric"].get("code", ""): one["value"][1] for one in answer["data"]["result"]}
            return None

        # An empty label is none.
        until(lambda: prometheus.poll() is not None or found() == {"": "2", "other": "1"}, pause=0.2)
        assert prometheus.poll() is None, (tmp_path / "log").read_text()
    finally:
        prometheus.kill()
        prometheus.wait()


UNDER_GREENLETS = """
import http.client, json

def ask(path):
    connection = http.client.HTTPConnection(*worker.health_address)
    connection.request("GET", path)
    answer = connection.getresponse()
    return answer.status, answer.read()

worker = create_worker(
    api_base_url="http://127.0.0.1:9", agent_id="a", install_token="skt_x", health="0", start_timeout=0.0
)
worker.on_task("nap", lambda ctx, input: time.sleep(input))
worker.start()
assert ask("/livez")[0] == 200
assert ask("/readyz") == (503, b'{"ready": false, "reasons": ["stream closed"], "notes": []}\\n')
assert b"sekuire_tasks_running" in ask("/metrics")[1]
worker.stop()
assert worker.health_address is None
"""


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("library", ["gevent", "eventlet"])
def test_under_greenlets(library: str, order: str) -> None:
    """The server is one greenlet more, whether the program patches before or after it imports the library."""
    need(library)
    done = subprocess.run(
        [sys.executable, "-c", PATCH + UNDER_GREENLETS, library, order], capture_output=True, timeout=GUARD, check=False
    )
    assert done.returncode == 0, done.stderr.decode()


APPLICATION = """
import os
from sekuire import create_worker

def post_worker_init(server_worker):
    # Each process has a port of its own.
    worker = create_worker(
        api_base_url=os.environ["PLATFORM"], agent_id="agent-1", install_token=os.environ["TOKEN"],
        health=("127.0.0.1", 0),
    )
    worker.on_task("copy", lambda ctx, input: input)
    worker.start()
    with open(f"port-{os.getpid()}.tmp", "w") as file:
        file.write(str(worker.health_address[1]))
    os.rename(f"port-{os.getpid()}.tmp", f"port-{os.getpid()}")

def app(environ, start_response):
    start_response("200 OK", [])
    return [b"web"]
"""


@pytest.mark.parametrize("kind", ["sync", "gevent"])
def test_under_gunicorn(platform: LocalPlatform, tmp_path: pathlib.Path, kind: str) -> None:
    """Each of its processes shows its own worker, beside the requests of the web."""
    need("gunicorn")
    if kind != "sync":
        need(kind)
    (tmp_path / "site_app.py").write_text(APPLICATION)
    (tmp_path / "gunicorn.conf.py").write_text("from site_app import post_worker_init\n")
    port = free_port()
    environ = {"PLATFORM": platform.url, "TOKEN": platform.create_install_token(AGENT, max_uses=2), "PYTHONPATH": "."}
    with open(tmp_path / "log", "wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "gunicorn", "-w", "2", "-k", kind, "-b", f"127.0.0.1:{port}", "site_app:app"],
            cwd=tmp_path, env={**os.environ, **environ}, stdout=log, stderr=log,
        )  # fmt: skip
    try:
        until(lambda: len(list(tmp_path.glob("port-*[0-9]"))) == 2 or server.poll() is not None)
        assert server.poll() is None, (tmp_path / "log").read_text()
        for file in tmp_path.glob("port-*[0-9]"):
            where = ("127.0.0.1", int(file.read_text()))
            until(lambda where=where: ask(where, "/readyz")[0] == 200)
            assert ask_json(where, "/status")[1]["pid"] == int(file.name.partition("-")[2])
        assert ask(("127.0.0.1", port), "/") == (200, b"web")
    finally:
        server.terminate()
        assert server.wait(GUARD) == 0
    assert "Traceback" not in (tmp_path / "log").read_text()
