"""sekuire demo: the whole path of a task, shown."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any, Dict, List, Tuple

import pytest
from rich.cells import cell_len

from sekuire.cli import demo
from sekuire.cli.demo import Piece, summarize
from sekuire.local import LocalPlatform

from ..support.waiting import GUARD
from .conftest import POSIX_ONLY, Call, Run, clean_environ

TEXT = """# A title

First paragraph, with two sentences. This is the second.

Second paragraph,
on two lines.
   \t
---

- a list
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "notes.md"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.mark.slow
def test_a_file(run: Run, file: Path) -> None:
    """Its paragraphs are summarized; table, pause, resume, terminate and summary are shown; all in far under 20 s."""
    begun = time.monotonic()
    code, out, err = run("demo", file.name).end()
    assert time.monotonic() - begun < 20
    assert code == 0
    lines = out.splitlines()
    assert lines[0] == "4 paragraphs"
    assert re.search(r"^1  notes.md:1 +\d+\.\d  A title$", out, re.M)
    assert re.search(r"^2  notes.md:3 +\d+\.\d  First paragraph, with two sentences\.$", out, re.M)
    assert re.search(r"^3  notes.md:5 +\d+\.\d  Second paragraph, on two lines\.$", out, re.M)
    assert re.search(r"^4  notes.md:10 +\d+\.\d  a list$", out, re.M)
    assert "pause: the next task is rejected, worker_paused" in out
    assert "resume: the next task is completed" in out
    assert "terminate: the worker has stopped (terminated: the demo is over)" in out
    assert re.search(r"^tasks      4$", out, re.M)
    assert re.search(r"^failures   0$", out, re.M)
    assert re.search(r"^latency    p50 \d+\.\d ms, p95 \d+\.\d ms$", out, re.M)
    assert re.search(r"^rate       \d+ tasks/s$", out, re.M)
    steps = [f"summarizing: {number} of 4 ({25 * number} %)" for number in range(5)]
    assert err.splitlines()[0] == steps[0]
    assert err.splitlines()[-1] == steps[-1]
    assert set(err.splitlines()) <= set(steps)


@pytest.mark.slow
def test_without_a_file(run: Run) -> None:
    """The standard library's docstrings, bounded; the table is bounded too."""
    code, out, err = run("demo", "--limit", "20").end()
    assert code == 0
    assert re.match(r"\d{3} docstrings of the standard library, of which the first 20\n", out)
    assert "… and 8 more" in out
    assert "tasks      20" in out
    assert "20 of 20 (100 %)" in err


@pytest.mark.slow
def test_no_module_is_imported_for_its_docstring() -> None:
    """The docstrings are read from the sources: `this` and `antigravity` have effects."""
    before = set(sys.modules)
    pieces = demo._docstrings()
    assert {"argparse", "threading"} <= {piece.source for piece in pieces}
    assert not {"this", "antigravity"} & (set(sys.modules) - before)


def test_a_standard_library_without_sources(call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where there is none to read, the user is asked for a file."""
    paths = {"stdlib": str(tmp_path)}
    monkeypatch.setattr(demo.sysconfig, "get_paths", lambda: paths)
    for paths["stdlib"] in (str(tmp_path), str(tmp_path / "missing")):
        code, out, err = call("demo")
        assert (code, out) == (2, "")
        assert "name a file to summarize" in err


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("missing.txt", None, "there is no such file"),
        (".", None, "is a directory"),
        ("nul\0.txt", None, "cannot be read"),
        ("binary.bin", b"\x7fELF\0\0\1text", "is not a text file"),
        ("latin.txt", "é".encode("latin-1"), "is not a text file"),
        ("empty.txt", b"", "is empty"),
        ("blank.txt", b" \n\n\t\n", "is empty"),
        ("rule.txt", b"---\n", "is empty"),
    ],
)
def test_files_that_cannot_be_used(call: Call, tmp_path: Path, name: str, content: Any, problem: str) -> None:
    """One line names the file and what is wrong with it; nothing is started; exit 2."""
    if content is not None:
        (tmp_path / name).write_bytes(content)
    code, out, err = call("demo", name)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert err.startswith(f"sekuire demo: error: {name.replace(chr(0), ' ')}: {problem}")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file(call: Call, file: Path) -> None:
    """The error gives the system's reason."""
    file.chmod(0)
    assert "Permission denied" in call("demo", file.name)[2]


def test_every_bad_file_is_named(call: Call, file: Path) -> None:
    """All problems at once, up to five, then a count."""
    names = [f"no{number}.txt" for number in range(7)]
    code, _, err = call("demo", names[0], file.name, *names[1:])
    assert code == 2
    assert [line.split(": ")[2] for line in err.splitlines()] == [*names[:5], "and 2 more files"]


def test_a_file_that_is_too_large(call: Call, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is a limit, so that a device that never ends does no harm."""
    monkeypatch.setattr(demo, "_MOST_FILE", 10)
    assert "too much for a demo" in call("demo", file.name)[2]


@pytest.mark.parametrize("limit", ["0", "-1", "x", "1e3", "100001"])
def test_a_wrong_limit(call: Call, limit: str) -> None:
    code, _, err = call("demo", f"--limit={limit}")
    assert code == 2
    assert "must be a whole number" in err


def test_paragraphs() -> None:
    """Runs of lines between blank ones, any line end, with the number of the line they begin at."""
    assert demo._split("f", "a\r\nb\r\n\r\n \r\nc\r\rd") == [Piece("f:1", "a\nb"), Piece("f:5", "c"), Piece("f:7", "d")]
    long = demo._split("f", "x" * 100_001)
    assert [len(piece.text) for piece in long] == [100_000, 1]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_byte_order_marks(encoding: str) -> None:
    """Files as Windows writes them are text too."""
    assert demo._decode("Grüße\n".encode(encoding)) == "Grüße\n"


@pytest.mark.parametrize(
    ("text", "summary"),
    [
        ("One. Two.", "One."),
        ("Really?  Yes! No.", "Really?"),
        ("## A   title\nand more", "A title and more"),
        ("word " * 100, "word " * 26 + "word..."),
        ("x" * 200, "x" * 137 + "..."),
        ("\x1b[31mred\x1b[0m", "[31mred [0m"),
    ],
)
def test_summaries(text: str, summary: str) -> None:
    """The first sentence, at most 140 characters, without control characters."""
    context: Any = None
    assert summarize(context, {"text": text})["summary"] == summary


def test_a_file_does_not_steer_the_terminal(call: Call, file: Path) -> None:
    """Escape sequences of a file, or of its name, are not passed on."""
    file.write_text("\x1b]0;title\x07 text \x9b31m \u202e drow\n", encoding="utf-8")
    code, out, _ = call("demo", file.name)
    assert code == 0
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", out)


# -- what goes wrong --------------------------------------------------------------------------------------------------


def test_a_failed_task_is_shown_and_counted(call: Call, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its row says why; the exit code is 1."""

    def fail(ctx: Any, input: Dict[str, Any]) -> Dict[str, Any]:
        if "list" in input["text"]:
            raise ValueError("no lists")
        return summarize(ctx, input)

    monkeypatch.setattr(demo, "summarize", fail)
    code, out, err = call("demo", file.name, "--log-level", "error")
    assert code == 1
    assert "FAILED handler_error: ValueError: no lists" in out
    assert "failures   1" in out
    assert "sekuire demo: error: 1 of 4 tasks failed; see the table" in err


@pytest.mark.parametrize("command", ["pause", "resume", "terminate"])
def test_a_command_that_is_lost(call: Call, file: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    """A worker that does not obey makes the demo fail, not hang."""
    send = LocalPlatform.command

    def lose(self: LocalPlatform, installation_id: str, type: str, reason: Any = None) -> Any:
        return None if type == command else send(self, installation_id, type, reason)

    monkeypatch.setattr(LocalPlatform, "command", lose)
    monkeypatch.setattr(demo, "_PATIENCE", 1.0)
    code, _, err = call("demo", file.name)
    assert code == 1
    assert f"the worker did not obey the {command} command" in err


def test_a_missing_rejection(call: Call, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo checks what it shows: a paused worker must reject."""
    from sekuire import Worker

    monkeypatch.setattr(LocalPlatform, "command", lambda *args: None)
    monkeypatch.setattr(Worker, "is_paused", lambda self: True)
    code, _, err = call("demo", file.name)
    assert code == 1
    assert "a paused worker did not reject a task: it is completed" in err


@pytest.mark.slow
def test_a_task_without_a_result(call: Call, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo gives up after a limit."""

    def hang(ctx: Any, input: Any) -> None:
        ctx.wait_cancelled(GUARD)

    monkeypatch.setattr(demo, "summarize", hang)
    monkeypatch.setattr(demo, "_PATIENCE", 0.5)
    code, _, err = call("demo", file.name, "--log-level", "error")
    assert code == 1
    assert "had no result after" in err


# -- Ctrl-C -----------------------------------------------------------------------------------------------------------


def _ignore_sigint() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@pytest.mark.slow
@POSIX_ONLY
@pytest.mark.parametrize("background", [False, True])
def test_ctrl_c(run: Run, tmp_path: Path, background: bool) -> None:
    """It stops everything and exits 130; also where a shell started it in the background, with SIGINT ignored."""
    (tmp_path / "long.txt").write_text("\n\n".join(f"Paragraph {number}." for number in range(20_000)))
    options: Dict[str, Any] = {"preexec_fn": _ignore_sigint} if background else {}
    process = run("demo", "long.txt", "--limit", "20000", **options)
    process.line("stderr", "summarizing: 0")
    process.line("stdout", "demo-agent is connected")
    process.signal(signal.SIGINT)
    code, out, err = process.end()
    assert code == 130
    assert err.splitlines()[-1] == "sekuire demo: error: interrupted"
    assert "Traceback" not in err
    assert "Warning" not in err
    assert "tasks  " not in out


def test_a_second_ctrl_c_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first is a flag, the second ends the process."""
    codes: List[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    interrupts = demo.Interrupts()
    with interrupts:
        interrupts.check()
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            interrupts.check()
        signal.raise_signal(signal.SIGINT)
    assert codes == [130]
    assert signal.getsignal(signal.SIGINT) is not interrupts._note


# -- terminals --------------------------------------------------------------------------------------------------------


def _on_terminal(args: List[str], cwd: Path, columns: int, **env: str) -> Tuple[int, str]:
    """Run a command on a pseudo-terminal; exit code and all it wrote."""
    import fcntl
    import pty
    import struct
    import subprocess
    import termios

    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-m", "sekuire", *args],
        cwd=str(cwd), env=clean_environ(**env), stdin=child, stdout=child, stderr=child,
    )  # fmt: skip
    os.close(child)
    written = b""
    try:
        while True:
            try:
                part = os.read(parent, 65536)
            except OSError:
                # Linux reports EIO once no process has the terminal open.
                break
            if not part:
                break
            written += part
        return process.wait(GUARD), written.decode()
    finally:
        os.close(parent)
        process.kill()
        process.wait()


def _screen_lines(written: str) -> List[str]:
    """Every state that a line of the terminal had, without colours."""
    text = re.sub("\x1b\\[[0-9;]*m", "", written).replace("\r\n", "\n")
    return [state for line in text.split("\n") for state in line.split("\r")]


@pytest.mark.slow
@POSIX_ONLY
def test_a_progress_bar_on_a_terminal(tmp_path: Path, file: Path) -> None:
    """A bar that grows in place, full at the end; colours; no line wider than the terminal."""
    code, written = _on_terminal(["demo", "notes.md"], tmp_path, 60)
    states = _screen_lines(written)
    assert code == 0
    bars = [state for state in states if state.startswith("summarizing ")]
    assert bars[0].endswith("0/4")
    assert bars[-1].endswith("4/4")
    assert "░" not in bars[-1]
    assert "\x1b[32m" in written
    assert max(cell_len(bar) for bar in bars) < 60


@pytest.mark.slow
@POSIX_ONLY
def test_no_color(tmp_path: Path, file: Path) -> None:
    """NO_COLOR keeps the bar and leaves out the colours."""
    code, written = _on_terminal(["demo", "notes.md"], tmp_path, 80, NO_COLOR="1")
    assert code == 0
    assert "\x1b" not in written
    assert "█" in written


@pytest.mark.slow
@POSIX_ONLY
def test_a_dumb_terminal(tmp_path: Path, file: Path) -> None:
    """No bar and no colours, but lines."""
    code, written = _on_terminal(["demo", "notes.md"], tmp_path, 80, TERM="dumb")
    assert code == 0
    assert "\x1b" not in written
    assert "\r" not in written.replace("\r\n", "")
    assert "summarizing: 4 of 4 (100 %)" in written


@pytest.mark.slow
@POSIX_ONLY
def test_log_lines_go_above_the_bar(tmp_path: Path, file: Path) -> None:
    """A log line never stands behind the bar."""
    code, written = _on_terminal(["demo", "notes.md", "-v"], tmp_path, 100)
    assert code == 0
    behind = [state for state in _screen_lines(written) if "█" in state and "DEBUG" in state]
    assert behind == []


@pytest.mark.slow
@POSIX_ONLY
@pytest.mark.parametrize("columns", [1, 8, 20, 40])
def test_a_narrow_terminal(tmp_path: Path, file: Path, columns: int) -> None:
    """The table and the bar fit however narrow it is."""
    code, written = _on_terminal(["demo", "notes.md"], tmp_path, columns)
    assert code == 0
    states = _screen_lines(written)
    bars = [state for state in states if "4/4" in state]
    assert all(cell_len(bar) < columns for bar in bars)


@pytest.mark.slow
def test_the_table_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """At every width, with wide characters too; columns go before the text does."""
    monkeypatch.setenv("NO_COLOR", "1")
    at = demo.dt.datetime(2025, 1, 1, tzinfo=demo.dt.timezone.utc)
    later = at + demo.dt.timedelta(milliseconds=12.5)
    results = [demo.Result(f"名前.md:{number}", "日本語の要約です" * 9, True, at, later) for number in range(30)]
    for columns in range(6, 160):
        lines = demo._table(results, columns)
        assert len(lines) == 14
        assert max(cell_len(line) for line in lines) <= columns, columns
    assert lines[0].split() == ["#", "SOURCE", "MS", "SUMMARY"]
    assert demo._table(results, 30)[0].split() == ["#", "MS", "SUMMARY"]
    assert demo._table(results, 15)[0].split() == ["#", "SUMMARY"]
    assert lines[-1] == "… and 18 more"


def test_the_plain_table() -> None:
    """It is whole: every column, and no text cut."""
    at = demo.dt.datetime(2025, 1, 1, tzinfo=demo.dt.timezone.utc)
    results = [demo.Result("a.md:1", "word " * 40, True, at, at + demo.dt.timedelta(milliseconds=12.5))]
    lines = demo._table(results, None)
    assert lines[0].split() == ["#", "SOURCE", "MS", "SUMMARY"]
    assert lines[1] == f"1  a.md:1  12.5  {'word ' * 39}word"
    slow = demo.Result("a.md:3", "late", True, at, at + demo.dt.timedelta(milliseconds=1234.5))
    lines = demo._table([*results * 9, slow], None)
    assert lines[1].startswith(" 1  a.md:1    12.5  word")
    assert lines[10] == "10  a.md:3  1234.5  late"


@pytest.mark.slow
@POSIX_ONLY
def test_a_terminal_without_rich(tmp_path: Path, file: Path) -> None:
    """The extra is missing: the rows are plain lines, and everything else is the same."""
    (tmp_path / "rich.py").write_text("raise ImportError('hidden')")
    code, written = _on_terminal(["demo", "notes.md"], tmp_path, 40, PYTHONPATH=str(tmp_path))
    assert code == 0
    assert re.search(r"^2  notes.md:3 +\d+\.\d  First paragraph, with two sentences\.\r$", written, re.M)
    assert re.search(r"^failures   \S*0", written, re.M)


@pytest.mark.slow
def test_rich_is_imported_on_a_terminal_only(run: Run, file: Path) -> None:
    """A command whose output is a pipe does not pay for it."""
    code = "import sys; from sekuire.cli import main; main(['demo', 'notes.md']); print('rich' in sys.modules)"
    assert run(program=("-c", code)).end()[1].splitlines()[-1] == "False"


def test_percentiles() -> None:
    """Nearest rank."""
    values = [float(number) for number in range(1, 101)]
    assert [demo._percentile(values, share) for share in (0.5, 0.95, 1.0)] == [50.0, 95.0, 100.0]
    assert demo._percentile([7.0], 0.5) == 7.0
