"""Handlers of the main module that other processes cannot import."""

from __future__ import annotations

import json
import os
import pathlib
import pickle
import subprocess
import sys
from typing import Any, Dict, List, Optional, Sequence

import pytest

from sekuire import ProcessExecutor
from sekuire.executors.main_module import missing_in_processes

from ..support.waiting import GUARD

#: What each executor says of a handler, and what ProcessExecutor says of the handler as its initializer.
CHECK = """
def check(handler):
    import concurrent.futures, json, multiprocessing
    from sekuire import ProcessExecutor, RemoteExecutor, create_worker
    from sekuire.errors import ConfigurationError
    pools = [
        ProcessExecutor(1),
        concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")),
        RemoteExecutor(concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))),
    ]
    said = []
    for pool in pools:
        worker = create_worker(agent_id="a", install_token="skt-1", executor=pool, max_workers=1)
        worker.on_task("echo", handler)
        try:
            worker._check_startable()
        except ConfigurationError as error:
            said.append(str(error))
    try:
        ProcessExecutor(1, initializer=handler)
    except ConfigurationError as error:
        said.append(str(error))
    print(json.dumps(said))
"""
HANDLER = "def echo(ctx, input):\n    return input\n"
CALL = "check(echo)\n"


def say(arguments: Sequence[str], tmp_path: pathlib.Path, stdin: Optional[str] = None) -> List[str]:
    (tmp_path / "checker.py").write_text(CHECK)
    variables: Dict[str, Any] = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path[1:]])}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=tmp_path, input=stdin, capture_output=True, text=True, check=False, timeout=GUARD, env=variables,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # An interpreter's prompts may stand before it, and after it.
    answer = next(line for line in reversed(done.stdout.splitlines()) if "[" in line)
    found: List[str] = json.loads(answer[answer.index("[") :])
    return found


def indented(text: str) -> str:
    return "".join(f"    {line}\n" for line in text.splitlines())


def test_from_the_command_line(tmp_path: pathlib.Path) -> None:
    """`python -c` has no file that a process could import."""
    found = say(["-c", f"from checker import check\n{HANDLER}{CALL}"], tmp_path)
    assert len(found) == 4
    for one in found[:3]:
        assert one.startswith("on_task('echo'): echo (")
    assert found[3].startswith("initializer: cannot run in another process: echo is defined in __main__ without a file")
    for one in found:
        assert one.endswith("; move it to a module and import it from there")


@pytest.mark.parametrize("arguments", [[], ["-"], ["-i"], ["-i", "checker.py"]])
def test_from_stdin(tmp_path: pathlib.Path, arguments: List[str]) -> None:
    """So it is with what is piped into Python, and with what is typed."""
    found = say(arguments, tmp_path, f"from checker import check\n{HANDLER}\n{CALL}")
    assert len(found) == 4
    assert "echo is defined in __main__ without a file" in found[0]


def test_typed_after_a_script(tmp_path: pathlib.Path) -> None:
    """A program that opens an interpreter has a file, in which the typed function is missing."""
    (tmp_path / "script.py").write_text("import code\nfrom checker import check\ncode.interact(local=globals())\n")
    found = say(["script.py"], tmp_path, f"{HANDLER}\n{CALL}")
    assert len(found) == 4
    assert "echo was typed into an interpreter; move it to a module" in found[0]


def test_the_main_module_of_a_package(tmp_path: pathlib.Path) -> None:
    """Processes do not import a package's __main__.py."""
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").touch()
    (tmp_path / "package" / "__main__.py").write_text(f"from checker import check\n{HANDLER}{CALL}")
    found = say(["-m", "package"], tmp_path)
    assert len(found) == 4
    assert "__main__.py, which other processes do not import" in found[0]


@pytest.mark.parametrize(
    "guard",
    [
        "if __name__ == '__main__':",
        'if "__main__" == __name__:',
        "import sys\nif sys.argv and __name__ == '__main__':",
        "if __name__ == 'other':\n    pass\nelif __name__ == '__main__':",
    ],
)
@pytest.mark.parametrize(
    "handler", [HANDLER, f"async {HANDLER}", "with open('x', 'w') as file:\n    def echo(ctx, input): ...\n"]
)
def test_under_the_guard(tmp_path: pathlib.Path, guard: str, handler: str) -> None:
    """What is under the guard is not there in other processes."""
    (tmp_path / "script.py").write_text(f"from checker import check\n{guard}\n{indented(handler + CALL)}")
    found = say(["script.py"], tmp_path)
    assert len(found) == 4
    assert "echo is defined under `if __name__ == '__main__':` in " in found[0]
    assert found[0].endswith("script.py, which other processes skip; move it above that line, or to a module")


def test_what_the_handler_needs(tmp_path: pathlib.Path) -> None:
    """A class in the annotation, or a function within a partial, has to be there too."""
    script = f"""
import functools
from checker import check

{HANDLER}

def bind(extra, ctx, input): ...

if __name__ == "__main__":
    class Extra: ...
    check(functools.partial(bind, Extra))
"""
    (tmp_path / "script.py").write_text(script)
    assert "Extra is defined under" in say(["script.py"], tmp_path)[0]


@pytest.mark.parametrize(
    "text",
    [
        f"{HANDLER}if __name__ == '__main__':\n    {CALL}",
        f"if __name__ == '__main__':\n{indented(HANDLER)}else:\n{indented(HANDLER)}{CALL}",
        f"if __name__ != '__main__':\n    pass\nelse:\n{indented(HANDLER)}{CALL}",
        f"try:\n    import nothing\nexcept ImportError:\n{indented(HANDLER)}{CALL}",
        f"for _ in range(1):\n{indented(HANDLER)}{CALL}",
        f"exec({HANDLER!r})\n{CALL}",
        f"{HANDLER}first = echo\nif __name__ == '__main__':\n    echo = first\n    {CALL}",
    ],
)
def test_what_may_be_there(tmp_path: pathlib.Path, text: str) -> None:
    """What is defined elsewhere, or in a way that is not recognised, is not refused."""
    (tmp_path / "script.py").write_text(f"from checker import check\n{text}")
    assert say(["script.py"], tmp_path) == []


def test_a_file_that_cannot_be_read(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a compiled or damaged file nothing is known."""
    (tmp_path / "main.pyc").write_bytes(b"\0\xff")
    main = sys.modules["__main__"]
    monkeypatch.setattr(main, "__file__", str(tmp_path / "main.pyc"), raising=False)
    monkeypatch.setattr(main, "__spec__", None)

    def local() -> None: ...

    local.__module__, local.__qualname__ = "__main__", "local"
    monkeypatch.setattr(main, "local", local, raising=False)
    assert missing_in_processes(local, pickle.dumps(local)) == ""


def test_what_is_imported_is_fine() -> None:
    """Nothing of another module is refused."""
    for value in ((say, ProcessExecutor, 1, None), "the text __main__"):
        assert missing_in_processes(value, pickle.dumps(value)) == ""
