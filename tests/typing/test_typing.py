"""User code under mypy --strict and pyright: what is right passes, and each mistake is an error on its line."""

from __future__ import annotations

import inspect
import json
import os
import pathlib
import re
import subprocess
import sys
from typing import Any, Callable, Dict, List, Tuple

import attrs
import pytest

from sekuire import Beacon, PolicyClient, SekuireSDK, create_worker
from sekuire.config import DECIDED_BY_SDK, BeaconConfig, PolicyClientConfig, SDKConfig, WorkerConfig

from ..support.waiting import GUARD

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
SAMPLES = ("right.py", "wrong.py", "options.py")

#: A file, a line and the code of the error there.
Found = List[Tuple[str, int, str]]


def wanted(*names: str, checker: int = 1) -> Found:
    """Return the errors that the comments of the samples name, for mypy (1) or pyright (2)."""
    marks: Found = []
    for name in names:
        for number, line in enumerate((HERE / name).read_text(encoding="utf-8").splitlines(), 1):
            marked = re.search(r"# E: ([a-z-]+)(?: (report\w+))?$", line)
            if marked:
                marks.append((name, number, marked.group(checker)))
    return sorted(marks)


@pytest.mark.slow
def test_user_code_is_checked() -> None:
    """mypy finds in the samples exactly the errors that their comments say, and in the right one none."""
    # The library as one that is installed: what it imports is not the user's to answer for.
    ran = subprocess.run(
        [
            sys.executable, "-m", "mypy", "--strict", "--config-file=", "--follow-imports=silent", "--no-error-summary",
            "--hide-error-context", *(str(HERE / name) for name in SAMPLES),
        ],
        cwd=ROOT, capture_output=True, text=True, timeout=GUARD, check=False,
    )  # fmt: skip
    found = []
    for line in ran.stdout.splitlines():
        error = re.match(r"(?:.*[/\\])?(\w+\.py):(\d+): error: .*\[([a-z-]+)\]$", line)
        if error:
            found.append((error.group(1), int(error.group(2)), error.group(3)))
    assert sorted(found) == wanted(*SAMPLES), ran.stdout + ran.stderr
    assert len(found) > 50


@pytest.mark.slow
def test_options_under_pyright() -> None:
    """pyright finds in the sample of options exactly the errors that its comments say."""
    pytest.importorskip("pyright")
    ran = subprocess.run(
        [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, str(HERE / "options.py")],
        cwd=ROOT, capture_output=True, text=True, timeout=GUARD, check=False,
        # It would ask for its newest version.
        env={**os.environ, "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"},
    )  # fmt: skip
    assert ran.stdout.startswith("{"), ran.stdout + ran.stderr
    found = [
        (pathlib.Path(one["file"]).name, one["range"]["start"]["line"] + 1, one.get("rule", one["message"]))
        for one in json.loads(ran.stdout)["generalDiagnostics"]
    ]
    assert sorted(found) == wanted("options.py", checker=2), ran.stdout
    assert len(found) > 30


@pytest.mark.parametrize(
    ("function", "config", "left_out"),
    [
        (create_worker, WorkerConfig, ()),
        (Beacon, BeaconConfig, ()),
        (SekuireSDK, SDKConfig, ()),
        (SekuireSDK.from_env, SDKConfig, ()),
        (SekuireSDK.create_task_worker, WorkerConfig, DECIDED_BY_SDK),
        (PolicyClient, PolicyClientConfig, ()),
    ],
)
def test_signatures_list_the_options(function: Callable[..., Any], config: Any, left_out: Tuple[str, ...]) -> None:
    """inspect.signature() shows every option with its default, as help() and interactive shells do."""
    shown: Dict[str, Any] = {
        name: parameter.default for name, parameter in inspect.signature(function).parameters.items() if name != "self"
    }
    declared = {
        field.alias: inspect.Parameter.empty if field.default is attrs.NOTHING else field.default
        for field in attrs.fields(config)
        if field.init and field.alias not in left_out
    }
    if function == SekuireSDK.from_env:
        declared.update(agent_id=None, env_file=None)
    assert shown == declared


def test_what_the_sdk_decides() -> None:
    """The sample has a line for every option that create_task_worker() leaves out."""
    text = (HERE / "options.py").read_text(encoding="utf-8")
    assert set(re.findall(r"^sdk\.create_task_worker\((\w+)=.*call-arg", text, flags=re.MULTILINE)) == {
        *DECIDED_BY_SDK,
        "heartbeat_intervall",
    }
