"""Every snippet of README.md, CONTRIBUTING.md and docs/ runs, in the order of its page.

Python blocks run in this process, one namespace for each page, with the environment of a local platform; one that
blocks in ``start(block=True)`` is given a task and terminated. Shell blocks run in a directory of the page's own; a
server or a worker runs on in the background until the page ends. Blocks marked as a file are saved there.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from typing import Any, Dict, Iterator, List, Optional

import pytest

from sekuire.local import LocalPlatform

from ..support.waiting import GUARD, until
from .markdown import PAGES, ROOT, Block, blocks

#: Blocks that do not run here, and why; the page says the same, in a comment before the block.
NOT_RUN = {
    "docs/deploying.md: cp -r deploy my-agent && cd my-agent    # jobs.py and requirements.txt are yours": (
        "it needs an engine"
    ),
    "docs/deploying.md: docker compose up --build": "it needs an engine",
    "docs/deploying.md: kubectl create secret generic my-agent --from-literal=install-token=skt_…": (
        "it needs a cluster"
    ),
    "docs/deploying.md: python3 -m venv /opt/agent && /opt/agent/bin/pip install --find-links wheels"
    " 'sekuire[metrics,policy]'": "it needs root",
    "docs/deploying.md: cp deploy/prometheus/alerts.yml /etc/prometheus/rules/": "it needs a Prometheus",
    "docs/observability.md: pip install '.[opentelemetry]' opentelemetry-distro opentelemetry-exporter-otlp": (
        "they are installed here already"
    ),
    "docs/troubleshooting.md: sekuire doctor": "what it prints depends on the machine",
    "docs/index.md: pip install '.[local]'    # from a clone: the package is not on PyPI yet": (
        "the page is not in a clone"
    ),
    "docs/index.md: from sekuire import SekuireClient": "it needs the worker and the platform of the other tabs",
    "docs/cli.md: sekuire dev -- python hello.py": "the page has a platform with the same state already",
    "docs/testing.md: pip install '.[testing]'    # from a clone": "the documentation's tests have it installed",
    "README.md: python3 -m venv .venv && .venv/bin/pip install '.[local]' && .venv/bin/sekuire demo README.md": "ci",
    "README.md: python3 -m venv .venv && .venv/bin/pip install tox && .venv/bin/tox -e py": "ci",
    "CONTRIBUTING.md: python3 -m venv .venv": "it needs the network, and .ci/run has done it",
    "docs/tutorial.md: python3 -m venv .venv": (".ci/run installs the package this way; here it is installed already"),
    "docs/reliability.md: tox -e chaos -- --tasks 100000 --faults 0.05 --kill-every 5": "the long runs take minutes",
    "docs/executors.md: from distributed import Client": (
        "it needs a cluster; tests/full/test_dask.py runs the same on one of two processes"
    ),
    "docs/handlers.md: pip install '.[typed]'": "it is installed here already",
    "docs/performance.md: tox -e bench-parts": "measuring takes minutes, and .ci/run does a short round of it",
    "docs/scaling.md: tox -e fleet -- --plot docs/_static/fleet.svg": (
        "it takes a minute; tests/test_fleet.py runs a small fleet"
    ),
    "docs/performance.md: tox -e bench-plots": "measuring takes minutes",
    "docs/scaling.md: tox -e bench-scaling": "measuring takes minutes, and .ci/run does a short round of it",
    "docs/performance.md: tox -e bench": "measuring takes minutes, and .ci/run does a short round of it",
    "docs/performance.md: tox -e bench-gateway": "measuring takes minutes, and .ci/run does a short round of it",
    "docs/performance.md: tox -e bench-local": "measuring takes minutes, and .ci/run does a short round of it",
    "docs/performance.md: tox -e bench-submits": "measuring takes minutes, and .ci/run does a short round of it",
    "docs/performance.md: tox -e bench-policy": "measuring takes minutes, and .ci/run does a short round of it",
    "docs/performance.md: tox -e peers": "measuring takes minutes, and .ci/run does a short round of it",
}

#: Command lines that run until they are stopped, by how they begin, and the signal for it.
BACKGROUND = {
    "sekuire dev": signal.SIGINT,
    "sekuire worker": signal.SIGTERM,
    "django-admin run_sekuire_worker": signal.SIGTERM,
    "flask --app shop:create_app sekuire worker": signal.SIGTERM,
}

#: Blocks that are not code. A directive of the documentation's builder is in braces.
NO_CODE = (
    "text",
    "ini",
    "yaml",
    "typescript",
)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_snippets_of_a_page_run(page: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader who copies the page's snippets, from its top to its end, sees what the page says."""
    found = [block for block in blocks(page) if reason_not_to_run(block) is None]
    for name in [name for name in os.environ if name.startswith("SEKUIRE_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    # As for a script of that directory: the page's files can be imported.
    monkeypatch.syspath_prepend(tmp_path)
    if any(block.language == "sh" for block in found) and os.name != "posix":
        pytest.skip("shell snippets need a POSIX shell")
    with contextlib.closing(Reader(tmp_path, monkeypatch)) as reader, logging_as_before():
        for block in found:
            reader.read(block)
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


def test_blocks_that_do_not_run_are_known() -> None:
    """A block is left out only where page and test agree on it, with the same reason."""
    left_out = {}
    for page in PAGES:
        for block in blocks(page):
            reason = reason_not_to_run(block)
            if reason is not None:
                left_out[block.name] = reason
    assert left_out == NOT_RUN


def reason_not_to_run(block: Block) -> Optional[str]:
    return "ci" if "ci" in block.marks else block.marks.get("not run")


@contextlib.contextmanager
def logging_as_before() -> Iterator[None]:
    loggers = [logging.getLogger(), logging.getLogger("sekuire")]
    before = [(logger, logger.handlers[:], logger.level) for logger in loggers]
    yield
    for logger, handlers, level in before:
        logger.handlers[:] = handlers
        logger.setLevel(level)


class Reader:
    """Does what a page says, block by block."""

    def __init__(self, directory: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._directory = directory
        self._monkeypatch = monkeypatch
        self._namespace: Dict[str, Any] = {"__name__": "__main__"}
        self._printed = ""
        self._environment = dict(os.environ)
        # The commands of the interpreter that runs the tests come first.
        bin_directory = os.path.dirname(sys.executable)
        self._environment["PATH"] = bin_directory + os.pathsep + self._environment.get("PATH", "")
        self._background: List[Background] = []

    def read(self, block: Block) -> None:
        if "file" in block.marks:
            path = self._directory / block.marks["file"]
            path.parent.mkdir(exist_ok=True)
            path.write_text(block.text, encoding="utf-8")
            if block.language == "python":
                compile(block.text, block.name, "exec")
        elif "output" in block.marks:
            assert self._printed == block.text, block.name
        elif block.language == "python":
            self._python(block)
        elif block.language == "sh":
            for line in block.text.splitlines():
                self._shell(block, line)
        elif block.language == "json":
            json.loads(block.text)
        else:
            is_code = block.language not in NO_CODE and not block.language.startswith("{")
            assert not is_code, f"{block.name}: what is {block.language!r}?"

    def close(self) -> None:
        """End what runs in the background, workers before the platform."""
        problems = [one.end() for one in reversed(self._background)]
        assert [problem for problem in problems if problem] == []

    # -- Python --

    def _python(self, block: Block) -> None:
        # Lines are numbered as in the page.
        code = compile("\n" * block.line + block.text, str(ROOT / block.page), "exec", dont_inherit=True)
        printed = io.StringIO()
        with LocalPlatform() as platform, contextlib.redirect_stdout(printed):
            for name, value in {
                "SEKUIRE_API_URL": platform.url,
                "SEKUIRE_AGENT_ID": "my-agent",
                "SEKUIRE_INSTALL_TOKEN": platform.create_install_token("my-agent"),
                "SEKUIRE_API_KEY": platform.api_key,
            }.items():
                self._monkeypatch.setenv(name, value)
            if "block=True" in block.text:
                attendant = Attendant(platform)
                attendant.start()
                exec(code, self._namespace)
                attendant.check()
            else:
                exec(code, self._namespace)
        self._printed = printed.getvalue()

    # -- shell --

    def _shell(self, block: Block, line: str) -> None:
        if line.startswith("export "):
            name, _, value = line[len("export ") :].partition("=")
            self._environment[name] = "".join(shlex.split(value))
            return
        for beginning, number in BACKGROUND.items():
            if line.startswith(beginning):
                self._background.append(Background(line, number, self._directory, self._environment))
                return
        wanted = int(block.marks.get("exit code", "0"))
        ran = subprocess.run(
            shlex.split(line),
            cwd=self._directory,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=GUARD,
            check=False,
        )
        background = "".join(one.said() for one in self._background)
        assert ran.returncode == wanted, f"{block.page}: {line}\n{ran.stdout}\n{background}"
        self._printed = ran.stdout


class Background:
    """A program that runs until the page ends. Of ``sekuire dev`` the printed variables go into the environment."""

    def __init__(self, line: str, number: signal.Signals, directory: pathlib.Path, environment: Dict[str, str]) -> None:
        self._line = line
        self._signal = number
        arguments = shlex.split(line)
        is_platform = line.startswith("sekuire dev")
        if is_platform and "--port" not in arguments:
            # The port that the page speaks of may be in use on this machine.
            arguments += ["--port", "0"]
        arguments[0] = shutil.which(arguments[0], path=environment["PATH"]) or arguments[0]
        self._errors = open(directory / f"stderr-{number.name}-{id(self)}", "w+", encoding="utf-8")  # noqa: SIM115
        self._process = subprocess.Popen(
            arguments,
            cwd=directory,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if is_platform else self._errors,
            stderr=self._errors,
            text=True,
        )
        if is_platform:
            assert self._process.stdout is not None
            for _ in range(6 if "--policy" in arguments else 4):
                export = self._process.stdout.readline()
                assert export.startswith("export "), f"{line}: {export!r}\n{self.said()}"
                name, _, value = export[len("export ") :].strip().partition("=")
                environment[name] = "".join(shlex.split(value))

    def said(self) -> str:
        self._errors.flush()
        return f"--- {self._line}\n" + pathlib.Path(self._errors.name).read_text(encoding="utf-8")

    def end(self) -> str:
        """Stop it as its user would; what was wrong with that, or nothing."""
        if self._line.startswith("sekuire worker"):
            # Before that it may not have come to its signal handlers.
            until(lambda: "connected to" in self.said() or self._process.poll() is not None)
        is_alive = self._process.poll() is None
        if is_alive:
            self._process.send_signal(self._signal)
        try:
            code = self._process.wait(GUARD)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        said = self.said()
        self._errors.close()
        return "" if is_alive and code == 0 else f"{'ended' if is_alive else 'died'} with {code}: {said}"


class Attendant(threading.Thread):
    """Gives a worker that blocks its thread one task of each capability, then terminates it."""

    def __init__(self, platform: LocalPlatform) -> None:
        super().__init__(name="attendant", daemon=True)
        self._platform = platform
        self._tasks: List[Any] = []

    def run(self) -> None:
        stream = until(self._platform.streams)[0]
        try:
            for capability in stream["capabilities"]:
                task_id = self._platform.submit(capability, {"text": "a text"})
                self._tasks.append(self._platform.wait(task_id, GUARD))
        finally:
            self._platform.command(stream["installation_id"], "terminate", "all was seen")

    def check(self) -> None:
        self.join(GUARD)
        assert [task["status"] for task in self._tasks] == ["completed"] * len(self._tasks) != []
        assert self._tasks[0]["output"] == {"summary": "a text"}
