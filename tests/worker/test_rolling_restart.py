"""Four worker processes of one agent are replaced one after the other under load, as Kubernetes does it."""

from __future__ import annotations

import http.client
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from typing import Any, Dict, Iterator, List, Optional

import pytest

from sekuire import SekuireClient
from sekuire.local import LocalPlatform

from ..cli.conftest import POSIX_ONLY, clean_environ
from ..conftest import AGENT
from ..support.servers import free_port
from ..support.waiting import GUARD, until

pytestmark = [pytest.mark.slow, POSIX_ONLY]

REPLICAS = 4
#: Notes each run of a task in a file of its own, at its beginning.
JOBS = """
import os, time
from sekuire import TaskRegistry

tasks = TaskRegistry()


@tasks.task("work")
def work(ctx, input):
    with open(os.path.join("runs", ctx.task_id), "a") as file:
        file.write(f"{os.getpid()}\\n")
    time.sleep(input["seconds"])
    return input["number"]
"""


class Replica:
    """One pod: a worker process with a port for probes, and a directory for its credentials and its outbox."""

    def __init__(self, place: pathlib.Path, state: pathlib.Path, environ: Dict[str, str]) -> None:
        state.mkdir(exist_ok=True)
        self.port = free_port()
        self.was_draining = False
        self.log = place / f"worker-{self.port}.log"
        environ = {
            **environ,
            "SEKUIRE_CREDENTIALS_FILE": str(state / "credentials.json"),
            "SEKUIRE_OUTBOX": str(state / "outbox.db"),
            "SEKUIRE_WORKER_HTTP": f"127.0.0.1:{self.port}",
        }
        command = [sys.executable, "-m", "sekuire", "worker", "--max-workers", "4", "jobs:tasks"]
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(command, cwd=place, env=environ, stdout=log, stderr=log)

    def probe(self, path: str) -> Optional[Any]:
        """Return the status and the body, as the kubelet sees them; None if nothing answers."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5.0)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        except OSError:
            return None
        finally:
            connection.close()

    def is_ready(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        found = self.probe("/readyz")
        return found is not None and found[0] == 200

    def terminate(self) -> None:
        """End it as the kubelet does: SIGTERM, and its probes go on until it has ended."""
        self.process.send_signal(signal.SIGTERM)
        end = time.monotonic() + GUARD
        while self.process.poll() is None and time.monotonic() < end:
            ready, live = self.probe("/readyz"), self.probe("/livez")
            if ready is not None and "draining" in ready[1]["reasons"]:
                assert ready[0] == 503
                self.was_draining = True
            # One that drains must not be killed for it.
            assert live is None or live[0] == 200
            time.sleep(0.02)
        assert self.process.wait(0) == 0, self.log.read_text()

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


class Load:
    """Submit tasks until it is stopped, some for each thread of each worker."""

    def __init__(self, client: SekuireClient) -> None:
        self._client = client
        self._is_over = threading.Event()
        self.numbers: Dict[str, int] = {}
        self._thread = threading.Thread(target=self._submit)
        self._thread.start()

    def _submit(self) -> None:
        number = 0
        while not self._is_over.wait(0.015):
            handle = self._client.submit("work", {"number": number, "seconds": 0.05 + number % 7 * 0.04})
            self.numbers[handle.id] = number
            number += 1

    def stop(self) -> None:
        self._is_over.set()
        self._thread.join()


@pytest.fixture
def replicas() -> Iterator[List[Replica]]:
    found: List[Replica] = []
    yield found
    for one in found:
        one.kill()


@pytest.mark.parametrize("kind", ["deployment", "statefulset"])
def test_nothing_is_lost_and_nothing_runs_twice(
    make_platform: Any, tmp_path: pathlib.Path, replicas: List[Replica], kind: str
) -> None:
    """Each task that was submitted in that time is completed, and its handler has begun once."""
    platform: LocalPlatform = make_platform()
    (tmp_path / "runs").mkdir()
    (tmp_path / "jobs.py").write_text(JOBS)
    environ = clean_environ(
        SEKUIRE_API_URL=platform.url,
        SEKUIRE_AGENT_ID=AGENT,
        # A Deployment's pods keep nothing, so each that ever starts needs a use of the token.
        SEKUIRE_INSTALL_TOKEN=platform.create_install_token(
            AGENT, max_uses=2 * REPLICAS if kind == "deployment" else REPLICAS
        ),
    )

    def start(name: str) -> Replica:
        replica = Replica(tmp_path, tmp_path / name, environ)
        replicas.append(replica)
        return replica

    old = [start(f"state-{number}") for number in range(REPLICAS)]
    until(lambda: all(one.is_ready() for one in old))
    client = SekuireClient(api_base_url=platform.url, api_key=platform.api_key, agent_id=AGENT)
    with client:
        load = Load(client)
        try:
            until(lambda: len(os.listdir(tmp_path / "runs")) >= 2 * REPLICAS)
            for number, one in enumerate(old):
                if kind == "deployment":
                    # maxSurge 1, maxUnavailable 0: first the new one.
                    new = start(f"new-{number}")
                    until(new.is_ready)
                    one.terminate()
                else:
                    # First the old one: the new one takes its installation and its outbox over.
                    one.terminate()
                    new = start(f"state-{number}")
                    until(new.is_ready)
            # The last one has tasks too.
            until(lambda: set(pids_of(tmp_path)) == {one.process.pid for one in replicas}, pause=0.1)
        finally:
            load.stop()
        results = {task_id: client.handle(task_id).result(GUARD) for task_id in load.numbers}
    assert len(results) >= 20 * REPLICAS
    # Nothing is lost, and each has its own result …
    assert results == load.numbers
    # … and nothing ran twice.
    runs = {path.name: path.read_text().split() for path in (tmp_path / "runs").iterdir()}
    assert set(runs) == set(results)
    assert {task_id: pids for task_id, pids in runs.items() if len(pids) != 1} == {}
    assert all(one.was_draining for one in old)
    assert len(platform.installations()) == (2 * REPLICAS if kind == "deployment" else REPLICAS)


def pids_of(place: pathlib.Path) -> List[int]:
    """The process of each run, by what its handler has noted."""
    return [int(line) for path in (place / "runs").iterdir() for line in path.read_text().splitlines()]
