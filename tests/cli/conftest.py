"""The command line as a person uses it: processes with real pipes, terminals and signals."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import pytest

from sekuire import SekuireClient
from sekuire.cli import main
from sekuire.local import LocalPlatform

from ..support.waiting import GUARD

AGENT = "cli-agent"
POSIX_ONLY = pytest.mark.skipif(os.name != "posix", reason="signals and terminals of POSIX")


def clean_environ(**variables: str) -> Dict[str, str]:
    """This process's environment without what would change a command's behaviour, and with ``variables``."""
    dropped = ("SEKUIRE_", "NO_COLOR", "COLUMNS", "PYTHONWARNINGS")
    environ = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    return {**environ, "PYTHONIOENCODING": "utf-8", "TERM": "xterm", **variables}


class Process:
    """``python -m sekuire ...``, or another ``program``, with its output collected line by line, to be waited for."""

    def __init__(
        self,
        args: Tuple[str, ...],
        cwd: Path,
        environ: Dict[str, str],
        program: Tuple[str, ...] = ("-m", "sekuire"),
        **options: Any,
    ) -> None:
        # -X dev: Python reports on stderr what is left open.
        self.popen = subprocess.Popen(
            [sys.executable, "-X", "dev", *program, *args],
            cwd=str(cwd),
            env=environ,
            **{"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
        )
        self._changed = threading.Condition()
        self._lines: Dict[str, List[str]] = {"stdout": [], "stderr": []}
        self._ended: Dict[str, bool] = {}
        self._threads = []
        for name in self._lines:
            pipe = getattr(self.popen, name)
            if pipe is not None:
                self._ended[name] = False
                self._threads.append(threading.Thread(target=self._read, args=(name, pipe), daemon=True))
        for thread in self._threads:
            thread.start()

    def _read(self, name: str, pipe: Any) -> None:
        with pipe:
            for line in pipe:
                with self._changed:
                    self._lines[name].append(line.decode("utf-8"))
                    self._changed.notify_all()
        with self._changed:
            self._ended[name] = True
            self._changed.notify_all()

    def line(self, name: str, part: str) -> str:
        """The first line of ``stdout`` or ``stderr`` that holds ``part``, once it is there."""
        found: List[str] = []

        def is_there() -> bool:
            found[:] = [line for line in self._lines[name] if part in line]
            return bool(found) or self._ended[name]

        with self._changed:
            assert self._changed.wait_for(is_there, GUARD), f"{part!r} did not come: {self._lines}"
        assert found, f"{part!r} did not come before the end: {self._lines}"
        return found[0]

    def signal(self, number: int) -> None:
        self.popen.send_signal(number)

    def end(self) -> Tuple[int, str, str]:
        """Exit code, stdout and stderr, once it has ended. No command ends with a traceback or a warning."""
        code = self.popen.wait(GUARD)
        for thread in self._threads:
            thread.join(GUARD)
        out, err = ("".join(self._lines[name]) for name in ("stdout", "stderr"))
        return code, out, err

    def kill(self) -> None:
        if self.popen.poll() is None:
            self.popen.kill()
        self.end()


Run = Callable[..., Process]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    """Start commands in ``tmp_path``; ``env`` adds variables, further options go to ``Popen``."""
    started: List[Process] = []

    def run(*args: str, env: Optional[Dict[str, str]] = None, **options: Any) -> Process:
        process = Process(args, tmp_path, clean_environ(**(env or {})), **options)
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()


Call = Callable[..., Tuple[int, str, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Call:
    """Run a command within this process, in ``tmp_path``: exit code, stdout, stderr."""
    for name in list(os.environ):
        if name.startswith("SEKUIRE_") or name in ("NO_COLOR", "COLUMNS"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def call(*args: str, env: Optional[Dict[str, str]] = None) -> Tuple[int, str, str]:
        for name, value in (env or {}).items():
            monkeypatch.setenv(name, value)
        capsys.readouterr()
        try:
            code = main(args)
        except SystemExit as error:
            code = error.code  # type: ignore[assignment]
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def platform() -> Iterator[LocalPlatform]:
    with LocalPlatform(retry_delay=0.05) as platform:
        yield platform


@pytest.fixture
def silent_url() -> Iterator[str]:
    """The address of a server that takes connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(16)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def variables(platform: LocalPlatform, **more: str) -> Dict[str, str]:
    """The environment of an agent of ``platform``."""
    return {
        "SEKUIRE_API_URL": platform.url,
        "SEKUIRE_AGENT_ID": AGENT,
        "SEKUIRE_INSTALL_TOKEN": platform.create_install_token(AGENT),
        **more,
    }


@pytest.fixture
def environ(platform: LocalPlatform) -> Dict[str, str]:
    """The environment of an agent of the platform, with the API key."""
    return variables(platform, SEKUIRE_API_KEY=platform.api_key)


@pytest.fixture
def client(platform: LocalPlatform) -> Iterator[SekuireClient]:
    """A client of the platform, for the agent."""
    with SekuireClient(api_base_url=platform.url, api_key=platform.api_key, agent_id=AGENT) as client:
        yield client
