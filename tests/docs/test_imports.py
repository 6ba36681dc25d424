"""Names are imported from where the documentation says, and a package loads its modules only when they are used."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys

import pytest

from ..support.waiting import GUARD
from .markdown import PAGES, read

#: Import paths that are promised beside those that docs/reference/ lists.
PROMISED = [
    "sekuire.worker.Worker", "sekuire.worker.create_worker",
    "sekuire.executors.ProcessExecutor", "sekuire.executors.RemoteExecutor", "sekuire.executors.RemoteTaskContext",
    "sekuire.handlers.TaskContext", "sekuire.handlers.TaskRegistry", "sekuire.handlers.Handler",
]  # fmt: skip
LISTED = [
    path
    for page in PAGES
    if page.startswith("docs/reference/")
    for path in re.findall(r"^\.\. auto(?:class|function|data):: (sekuire\.[\w.]+)", read(page), re.M)
]


@pytest.mark.parametrize("path", sorted({*PROMISED, *LISTED}))
def test_a_documented_name_can_be_imported(path: str) -> None:
    """``from package import name`` finds each name that the reference lists or that was promised."""
    module, _, name = path.rpartition(".")
    assert getattr(importlib.import_module(module), name) is not None


def test_a_package_loads_its_modules_late() -> None:
    """Importing the packages that re-export names loads no other module of theirs, and unknown names are refused."""
    code = (
        "import json, sys\n"
        "import sekuire.audit, sekuire.executors, sekuire.handlers, sekuire.policy, sekuire.worker\n"
        "print(json.dumps(sorted(name for name in sys.modules if name.startswith('sekuire'))))\n"
        "for package in (sekuire.audit, sekuire.executors, sekuire.handlers, sekuire.policy, sekuire.worker):\n"
        "    assert set(package.__all__) <= set(dir(package))\n"
        "    assert not hasattr(package, 'Nothing')\n"
    )
    shown = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, timeout=GUARD).stdout
    assert json.loads(shown) == [
        "sekuire", "sekuire._internal", "sekuire._internal.lazy", "sekuire.audit", "sekuire.executors",
        "sekuire.handlers", "sekuire.policy", "sekuire.version", "sekuire.worker",
    ]  # fmt: skip
