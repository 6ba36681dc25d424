"""The deploy kit, by the tools that read its files: linters, schemas, systemd, Prometheus, buildah."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
from typing import Any, Dict, Iterator, List, Set

import pytest
import yaml

from sekuire.local import LocalPlatform

from ..cli.conftest import clean_environ
from ..conftest import AGENT
from ..docs.markdown import ROOT
from ..support.servers import free_port
from ..support.waiting import GUARD, until
from .images import Buildah, make_base

pytestmark = pytest.mark.full

DEPLOY = ROOT / "deploy"


def run(*command: str, check: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
    path = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"] + os.pathsep + "/usr/sbin"
    program = shutil.which(command[0], path=path)
    assert program, f"{command[0]} is missing: .ci/services or tox -e full installs it"
    done = subprocess.run(
        [program, *command[1:]], capture_output=True, text=True, timeout=4 * GUARD, check=False, **options
    )
    assert done.returncode == 0 or not check, done.stdout + done.stderr
    return done


# -- each file by its own tool ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Dockerfile", "platform.Dockerfile"])
def test_the_dockerfiles_are_clean(name: str) -> None:
    """hadolint has nothing to say, not even style."""
    assert run("hadolint", "--failure-threshold", "style", str(DEPLOY / name)).stdout == ""


def test_a_linter_that_sees_something(tmp_path: pathlib.Path) -> None:
    """It is not silent about what it should refuse."""
    text = (DEPLOY / "Dockerfile").read_text().replace('ENTRYPOINT ["sekuire", "worker"]', "ENTRYPOINT sekuire worker")
    (tmp_path / "Dockerfile").write_text(text)
    assert "DL3025" in run("hadolint", str(tmp_path / "Dockerfile"), check=False).stdout


@pytest.mark.parametrize("name", ["deployment.yaml", "statefulset.yaml", "secret.yaml"])
@pytest.mark.parametrize("version", ["1.29", "1.34"])
def test_the_kubernetes_files_fit_its_schemas(name: str, version: str, tmp_path: pathlib.Path) -> None:
    """Strictly: an unknown field, which Kubernetes would ignore, is an error."""
    path = DEPLOY / "kubernetes" / name
    run("kubernetes-validate", "--strict", "-k", version, str(path))
    wrong = tmp_path / name
    wrong.write_text(path.read_text().replace("metadata:", "metadate: {}\nmetadata:", 1))
    assert run("kubernetes-validate", "--strict", "-k", version, str(wrong), check=False).returncode != 0


def test_the_compose_file_is_read() -> None:
    """Compose itself reads it, without an engine."""
    found = json.loads(run("docker-compose", "-f", str(DEPLOY / "compose.yaml"), "config", "--format", "json").stdout)
    assert set(found["services"]) == {"platform", "worker-1", "worker-2"}
    for service in found["services"].values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]


def test_the_systemd_unit_is_read(tmp_path: pathlib.Path) -> None:
    """systemd understands every line, and finds little to protect."""
    text = (DEPLOY / "systemd/sekuire-worker@.service").read_text()
    (tmp_path / "sekuire").write_text("#!/bin/sh\n")
    (tmp_path / "sekuire").chmod(0o755)
    unit = tmp_path / "sekuire-worker@1.service"
    unit.write_text(text.replace("/opt/agent/bin/sekuire", str(tmp_path / "sekuire")))
    verified = run("systemd-analyze", "verify", "--man=no", str(unit))
    assert (verified.stdout, verified.stderr) == ("", "")
    run("systemd-analyze", "security", "--offline=true", "--threshold=20", "--no-pager", str(unit))
    unit.write_text(unit.read_text().replace("WatchdogSec=30", "WatchdogSec=often"))
    assert "Failed to parse sec value" in run("systemd-analyze", "verify", "--man=no", str(unit), check=False).stderr


def test_the_alerts_are_rules() -> None:
    """promtool reads them, and its unit tests say when each important one fires and when not."""
    directory = DEPLOY / "prometheus"
    assert "SUCCESS: 11 rules found" in run("promtool", "check", "rules", "alerts.yml", cwd=directory).stdout
    run("promtool", "test", "rules", "alerts_test.yml", cwd=directory)


def test_the_dashboards_queries_are_read(tmp_path: pathlib.Path) -> None:
    """Each query of the dashboard is one that Prometheus can parse."""
    found = json.loads((DEPLOY / "grafana/dashboard.json").read_text())
    queries = [target["expr"] for panel in found["panels"] for target in panel["targets"]]
    rules = [
        {"record": f"panel:{number}", "expr": expr.replace("$__rate_interval", "5m").replace("$agent", ".*")}
        for number, expr in enumerate(queries)
    ]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    assert (
        f"SUCCESS: {len(queries)} rules found" in run("promtool", "check", "rules", str(tmp_path / "rules.yml")).stdout
    )


# -- the image --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Buildah]:
    """The kit's images, built from this checkout's wheel."""
    directory = tmp_path_factory.mktemp("image")
    source, context = directory / "source", directory / "context"
    shutil.copytree(DEPLOY, context)
    source.mkdir()
    shutil.copytree(ROOT / "sekuire", source / "sekuire", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE", "pytest_sekuire.py"):
        shutil.copy(ROOT / name, source)
    wheels = ["pip", "wheel", "--quiet", "--wheel-dir", str(context / "wheels"), f"{source}[metrics,policy,local]"]
    run(sys.executable, "-m", *wheels)
    buildah = Buildah(directory)
    make_base(buildah, directory, "localhost/python:base")
    for name, file in (("my-agent", "Dockerfile"), ("my-platform", "platform.Dockerfile")):
        buildah(
            "bud", "--isolation", "chroot", "--format", "docker", "--build-arg", "PYTHON_IMAGE=localhost/python:base",
            "-f", str(context / file), "-t", f"localhost/{name}", str(context),
        )  # fmt: skip
    yield buildah
    buildah("rm", "--all")
    shutil.rmtree(directory, ignore_errors=True)


def files_of(root: pathlib.Path) -> Set[str]:
    """What is in a container, but for what may be written, and for what buildah itself puts there."""
    may = re.compile(r"^(tmp|run|proc|sys|dev|etc/(hosts|hostname|resolv\.conf))(/|$)")
    found = (str(path.relative_to(root)) for path in root.rglob("*"))
    return {f"{name} {os.lstat(root / name).st_mtime_ns}" for name in found if not may.match(name)}


def test_the_image_says_what_it_is(image: Buildah) -> None:
    """A user that is not root, programs in the exec form, a health check, SIGTERM."""
    found = json.loads(image("inspect", "--type", "image", "localhost/my-agent").stdout)["Docker"]["config"]
    assert found["User"] == "10001:10001"
    assert found["Entrypoint"] == ["sekuire", "worker"]
    assert found["Cmd"] == ["jobs:tasks"]
    assert found["Healthcheck"]["Test"] == ["CMD", "sekuire", "status", "--live"]
    assert found["StopSignal"] == "SIGTERM"
    assert list(found["Volumes"]) == ["/var/lib/agent"]


class Pod:
    """A container of the agent's image, whose worker can be run once and again.

    :param state: its volume, which is made as Kubernetes makes it for ``fsGroup``.
    """

    def __init__(self, image: Buildah, platform: LocalPlatform, state: pathlib.Path) -> None:
        self.state = state
        state.mkdir()
        os.chown(state, 0, 10001)
        state.chmod(0o2770)
        self._image = image
        self._platform = platform
        self.container = image("from", "localhost/my-agent").stdout.strip()
        self.root = pathlib.Path(image("mount", self.container).stdout.strip())
        self._address = f"0.0.0.0:{free_port()}"
        variables: Dict[str, str] = {
            "SEKUIRE_API_URL": platform.url,
            "SEKUIRE_AGENT_ID": AGENT,
            "SEKUIRE_INSTALL_TOKEN": platform.create_install_token(AGENT),
            "SEKUIRE_WORKER_HTTP": self._address,
        }
        inside = [word for name, value in variables.items() for word in ("--env", f"{name}={value}")]
        inside += ["--volume", f"{state}:/var/lib/agent"]
        self._run = ["run", "--isolation", "chroot", *inside, self.container, "--", "sekuire"]

    def status(self, *options: str) -> subprocess.CompletedProcess[str]:
        """What a health check inside says."""
        return self._image(*self._run, "status", *options, check=False)

    def _terminate(self) -> None:
        """Send SIGTERM to the worker, as an engine does to process 1."""
        mark = f"SEKUIRE_WORKER_HTTP={self._address}".encode()
        for process in pathlib.Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if b"/opt/agent/bin/sekuire" in (process / "cmdline").read_bytes() and mark in (
                    process / "environ"
                ).read_bytes().split(b"\0"):
                    os.kill(int(process.name), signal.SIGTERM)

    def work(self) -> str:
        """Run the worker until it has done a task. Return its log."""
        command = self._image.command(*self._run, "worker", "jobs:tasks")
        worker = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        try:
            until(lambda: worker.poll() is not None or self.status("--live").returncode == 0, pause=0.2)
            assert worker.poll() is None, worker.communicate()[0]
            task_id = self._platform.submit("greet", {"name": "Ada"}, agent_id=AGENT)
            assert self._platform.wait(task_id, GUARD)["output"] == {"greeting": "Hello, Ada!"}
            self._terminate()
            return worker.communicate(timeout=GUARD)[0].decode()
        finally:
            if worker.poll() is None:
                worker.kill()
                worker.communicate()


def test_the_image_runs(image: Buildah, platform: LocalPlatform, tmp_path: pathlib.Path) -> None:
    """A worker of it does a task as its own user, answers its health check, and writes nowhere else.

    Then the files in its volume are as Kubernetes leaves them with ``fsGroup`` when it mounts the volume again. The
    installation in it is used: the install token is used up.
    """
    pod = Pod(image, platform, tmp_path / "state")
    before = files_of(pod.root)
    assert "connected to" in pod.work()
    assert files_of(pod.root) == before
    kept = {path.name: path for path in pod.state.iterdir()}
    assert {"credentials.json", "outbox.db"} <= set(kept)
    assert {(path.stat().st_uid, path.stat().st_mode & 0o077) for path in kept.values()} == {(10001, 0)}
    # Without a worker the health check fails.
    assert pod.status().returncode == 1

    for path in kept.values():
        path.chmod(0o660)
    log = pod.work()
    assert log.count("credentials.json can be read by the group 10001") == 1
    assert len(platform.installations()) == 1


# -- compose, without its engine --------------------------------------------------------------------------------------


@contextlib.contextmanager
def running(command: List[str], environ: Dict[str, str], directory: pathlib.Path, name: str) -> Iterator[Any]:
    with open(directory / f"{name}.log", "ab") as log:
        process = subprocess.Popen(
            command, cwd=directory, env=environ, stdout=log, stderr=log, stdin=subprocess.DEVNULL
        )
    try:
        yield process
        process.terminate()
        assert process.wait(GUARD) == 0, (directory / f"{name}.log").read_text()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def test_the_composed_processes_find_each_other(tmp_path: pathlib.Path) -> None:
    """The commands and variables of compose.yaml: platform, two workers, a task; and the same after a restart."""
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    port = str(free_port())
    shutil.copy(DEPLOY / "jobs.py", tmp_path)
    sekuire = [sys.executable, "-m", "sekuire"]
    command = [*sekuire, "worker"]
    command += [word.replace("/var/lib/platform", str(tmp_path)) for word in services["worker-1"]["command"]]

    def of(name: str) -> Dict[str, str]:
        given = services[name]["environment"]
        assert set(given) == {"SEKUIRE_API_URL", "SEKUIRE_WORKER_HTTP"}
        (tmp_path / name).mkdir(exist_ok=True)
        return clean_environ(
            SEKUIRE_API_URL=given["SEKUIRE_API_URL"].replace("9300", port),
            SEKUIRE_WORKER_HTTP=f"127.0.0.1:{free_port()}",
            SEKUIRE_CREDENTIALS_FILE=str(tmp_path / name / "credentials.json"),
            SEKUIRE_OUTBOX=str(tmp_path / name / "outbox.db"),
        )

    for time in (1, 2):
        dev = [*sekuire, "dev", "--host", "0.0.0.0", "--port", port]
        with contextlib.ExitStack() as stack:
            stack.enter_context(running(dev, clean_environ(), tmp_path, "dev"))
            until(lambda: said(tmp_path / "dev.log", "the local platform runs on") == time)  # noqa: B023
            for name in ("worker-1", "worker-2"):
                stack.enter_context(running(command, of(name), tmp_path, name))
            until(lambda: said(tmp_path / "worker-1.log", "connected to") == time)  # noqa: B023
            until(lambda: said(tmp_path / "worker-2.log", "connected to") == time)  # noqa: B023
            sent = run(*sekuire, "send", "greet", '{"name": "Ada"}', "--wait", "60", cwd=tmp_path, env=clean_environ())
            assert "Hello, Ada!" in sent.stdout


def said(path: pathlib.Path, text: str) -> int:
    return path.read_text().count(text)
