"""sekuire worker --reload: new code after each save, and nothing lost between."""

from __future__ import annotations

import importlib.machinery
import os
import re
import signal
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

import pytest

from sekuire._internal.signals import SECOND_AFTER
from sekuire.local import LocalPlatform
from sekuire.service.reloader import program

from ..support.waiting import GUARD, until
from .conftest import AGENT, POSIX_ONLY, Call, Process, Run, variables

pytest.importorskip("watchfiles")
pytestmark = [POSIX_ONLY, pytest.mark.slow]

#: A worker from the environment alone; the second part differs from save to save.
MODULE = """
import os, time
from sekuire import SekuireSDK

def make_worker():
    sdk = SekuireSDK.from_env(heartbeat_interval=0.2)
    sdk.start()
    worker = sdk.create_task_worker()
    worker.on_task("answer", answer)
    return worker

def answer(ctx, input):
    ctx.report_progress(0.5)
    while input and not os.path.exists(input["until"]):
        time.sleep(0.01)
    return {version!r}
"""


@pytest.fixture
def save(tmp_path: Path) -> Callable[[str], None]:
    """Write the user's module in one step, as an editor does."""

    def write(text: str) -> None:
        part = tmp_path / "tasks.py.part"
        part.write_text(text, encoding="utf-8")
        part.replace(tmp_path / "tasks.py")

    return write


@pytest.fixture
def environment(platform: LocalPlatform, tmp_path: Path) -> Dict[str, str]:
    """An agent whose install token can be used once, and a folder for temporary files that can be looked into."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    return variables(platform, TMPDIR=str(folder), PYTHONDONTWRITEBYTECODE="1")


def begin(run: Run, environment: Dict[str, str], *args: str) -> Process:
    process = run("worker", "tasks:make_worker", "--reload", "-v", *args, env=environment)
    process.line("stderr", "connected to")
    return process


def answer(platform: LocalPlatform, input: Any = None) -> Any:
    return platform.wait(platform.submit("answer", input, agent_id=AGENT), timeout=GUARD)["output"]


def children(process: Process) -> List[int]:
    """Processes that ``process`` has started and that have not ended."""
    text = Path(f"/proc/{process.popen.pid}/task/{process.popen.pid}/children").read_text()
    return [int(number) for number in text.split()]


needs_proc = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")


@needs_proc
def test_a_save_drains_and_restarts(
    run: Run, save: Callable[[str], None], platform: LocalPlatform, environment: Dict[str, str], tmp_path: Path
) -> None:
    """The running task ends with the old code, the next one runs the new, and all is one installation."""
    save(MODULE.replace("{version!r}", "'one'"))
    process = begin(run, environment)
    (first,) = children(process)
    running = platform.submit("answer", {"until": "go"}, agent_id=AGENT)
    until(lambda: platform.progress(running))
    save(MODULE.replace("{version!r}", "'two'"))
    process.line("stderr", "tasks.py changed; draining")
    process.line("stderr", "stopping (SIGTERM)")
    assert platform.task(running)["status"] == "assigned"
    (tmp_path / "go").touch()
    assert platform.wait(running, timeout=GUARD)["output"] == "one"
    # Until the old one has begun to drain, it may still take a task.
    until(lambda: answer(platform) == "two")
    (second,) = children(process)
    assert second != first
    assert len(platform.installations()) == 1
    process.signal(signal.SIGTERM)
    code, out, _ = process.end()
    assert (code, out) == (0, "")
    assert platform.heartbeats(platform.installations()[0]["installation_id"])[-1]["status"] == "stopped"
    assert list((tmp_path / "temporary").iterdir()) == []


def test_a_syntax_error_waits_for_the_next_save(
    run: Run, save: Callable[[str], None], platform: LocalPlatform, environment: Dict[str, str]
) -> None:
    """It is shown once, nothing is restarted until the next save, and the fixed file runs."""
    save(MODULE.replace("{version!r}", "'one'"))
    process = begin(run, environment)
    save("def broken(:\n")
    process.line("stderr", "SyntaxError")
    process.line("stderr", "the worker has ended (exit code 2); it starts again when a file is saved")
    save(MODULE.replace("{version!r}", "'mended'"))
    process.line("stderr", "tasks.py changed; restarting")
    assert answer(platform) == "mended"
    process.signal(signal.SIGTERM)
    code, _, err = process.end()
    assert code == 0
    assert err.count("error: importing 'tasks' failed") == 1


@needs_proc
def test_ctrl_c(
    run: Run, save: Callable[[str], None], platform: LocalPlatform, environment: Dict[str, str], tmp_path: Path
) -> None:
    """The child drains; a second Ctrl-C ends it. No process and no file stays."""
    save(MODULE.replace("{version!r}", "'one'"))
    process = begin(run, environment)
    (child,) = children(process)
    running = platform.submit("answer", {"until": "never"}, agent_id=AGENT)
    until(lambda: platform.progress(running))
    process.signal(signal.SIGINT)
    process.line("stderr", "stopping (SIGTERM)")
    time.sleep(SECOND_AFTER)
    process.signal(signal.SIGINT)
    process.line("stderr", "ending the process (SIGTERM)")
    code, _, err = process.end()
    assert code == 130
    assert "Traceback" not in err
    assert platform.task(running)["error"]["code"] == "worker_shutdown"
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
    assert list((tmp_path / "temporary").iterdir()) == []


@needs_proc
def test_the_death_of_the_reloader(
    run: Run, save: Callable[[str], None], platform: LocalPlatform, environment: Dict[str, str], tmp_path: Path
) -> None:
    """The child, which no reloader could end, drains by itself."""
    save(MODULE.replace("{version!r}", "'one'"))
    process = begin(run, environment)
    (child,) = children(process)
    running = platform.submit("answer", {"until": "go"}, agent_id=AGENT)
    until(lambda: platform.progress(running))
    process.signal(signal.SIGKILL)
    process.line("stderr", "stopping (SIGTERM)")
    (tmp_path / "go").touch()
    assert platform.wait(running, timeout=GUARD)["output"] == "one"
    process.end()
    until(lambda: is_gone(child))
    assert platform.heartbeats(platform.installations()[0]["installation_id"])[-1]["status"] == "stopped"


def is_gone(pid: int) -> bool:
    """Return True if the process has ended, even if its exit code was not collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_no_reloader_inside_a_reloader(call: Call, save: Callable[[str], None]) -> None:
    """It would be the first of an endless chain."""
    save(MODULE)
    code, _, err = call("worker", "tasks:make_worker", "--reload", env={"SEKUIRE_RELOADER": "7"})
    assert code == 2
    assert "this process was started by a reloader, that of process 7" in err


@pytest.mark.parametrize(
    ("spec", "start"),
    [
        ("flask.__main__", ["-m", "flask"]),
        ("tools.manage", ["-m", "tools.manage"]),
        ("__main__", ["manage.py"]),
        (None, ["manage.py"]),
    ],
)
def test_how_a_program_was_started(
    spec: Optional[str], start: List[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a module or as a file, with the interpreter's options; what pip makes on Windows is a program by itself."""
    main = types.ModuleType("__main__")
    main.__spec__ = None if spec is None else importlib.machinery.ModuleSpec(spec, None)
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.setattr(sys, "argv", ["manage.py", "--reload"])
    monkeypatch.setattr(sys, "warnoptions", ["error"])
    monkeypatch.setattr(sys, "_xoptions", {"dev": True, "utf8": "1"})
    assert program() == [sys.executable, "-Werror", "-Xdev", "-Xutf8=1", *start]
    if spec is None:
        (tmp_path / "tool.exe").touch()
        monkeypatch.setattr(sys, "argv", [str(tmp_path / "tool")])
        assert program() == [str(tmp_path / "tool.exe")]


def test_credentials_are_private_while_it_runs(
    run: Run, save: Callable[[str], None], platform: LocalPlatform, environment: Dict[str, str], tmp_path: Path
) -> None:
    """The children's credentials lie in a folder of this user alone; a file that the user named is left to him."""
    save(MODULE.replace("{version!r}", "'one'"))
    process = begin(run, environment)
    folder = tmp_path / "temporary"
    (made,) = folder.iterdir()
    assert made.stat().st_mode & 0o777 == 0o700
    until((made / "credentials.json").exists)
    assert (made / "credentials.json").stat().st_mode & 0o777 == 0o600
    process.signal(signal.SIGTERM)
    assert process.end()[0] == 0
    mine = tmp_path / "mine.json"
    # The first command has used its token up.
    again = {**environment, "SEKUIRE_INSTALL_TOKEN": platform.create_install_token(environment["SEKUIRE_AGENT_ID"])}
    process = begin(run, {**again, "SEKUIRE_CREDENTIALS_FILE": str(mine)})
    assert list(folder.iterdir()) == []
    process.signal(signal.SIGTERM)
    assert process.end()[0] == 0
    assert mine.exists()


def test_watches_the_directories_that_are_named(
    run: Run, save: Callable[[str], None], platform: LocalPlatform, environment: Dict[str, str], tmp_path: Path
) -> None:
    """A save elsewhere, or of a file that is not Python, restarts nothing."""
    (tmp_path / "library").mkdir()
    save(MODULE.replace("{version!r}", "'one'"))
    process = begin(run, environment, "--reload-dir", "library")
    save(MODULE.replace("{version!r}", "'two'"))
    (tmp_path / "library" / "notes.txt").write_text("no code")
    (tmp_path / "library" / "helper.py").write_text("X = 1")
    line = process.line("stderr", "changed; draining")
    assert re.search(r"reload: library.helper\.py changed", line)
    # Until the old one has begun to drain, it may still take a task.
    until(lambda: answer(platform) == "two")
    process.signal(signal.SIGTERM)
    assert process.end()[0] == 0


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("tasks:worker", "--reload", "--reload-dir", "nowhere"), "there is no directory 'nowhere' to watch"),
        (("tasks:worker", "--reload-dir", "."), "--reload-dir goes with --reload"),
        (("tasks.py", "--reload"), "is not of the form MODULE:NAME"),
    ],
)
def test_wrong_usage(call: Call, arguments: List[str], text: str) -> None:
    """It is reported before anything is started."""
    code, _, err = call("worker", *arguments)
    assert code == 2
    assert text in err


def test_without_the_extra(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the extra."""
    monkeypatch.setitem(sys.modules, "watchfiles", None)
    code, _, err = call("worker", "tasks:worker", "--reload")
    assert code == 2
    assert "pip install 'sekuire[reload]'" in err


def test_nothing_is_kept_where_the_extra_is_missing(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """No temporary folder is made before everything is known to be right."""
    monkeypatch.setitem(sys.modules, "watchfiles", None)
    monkeypatch.setattr(tempfile, "mkdtemp", lambda **options: pytest.fail("too early"))
    assert call("worker", "tasks:worker", "--reload")[0] == 2
