"""What is built from this tree, and what importing the library brings."""

from __future__ import annotations

import email
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from typing import Dict, List, Set

import pytest

from sekuire.version import __version__

from .support.waiting import GUARD

ROOT = pathlib.Path(__file__).resolve().parents[1]

NOT_SOURCE = shutil.ignore_patterns(
    ".*", "__pycache__", "*.egg-info", "build", "dist", "_build", "htmlcov", "coverage.xml", "node_modules"
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A copy of the tree, because a build leaves its traces in it."""
    target = tmp_path_factory.mktemp("build") / "sekuire"
    shutil.copytree(ROOT, target, ignore=NOT_SOURCE)
    shutil.copytree(ROOT / ".ci", target / ".ci")
    return target


def build(source: pathlib.Path, kind: str, target: pathlib.Path) -> pathlib.Path:
    target.mkdir()
    code = f"import sys, setuptools.build_meta as b; print(b.build_{kind}(sys.argv[1]))"
    run([sys.executable, "-c", code, str(target)], source)
    (built,) = target.iterdir()
    return built


def run(command: List[str], directory: pathlib.Path) -> str:
    ran = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=GUARD, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


@pytest.fixture(scope="module")
def wheel(source: pathlib.Path) -> zipfile.ZipFile:
    return zipfile.ZipFile(build(source, "wheel", source.parent / "wheel"))


@pytest.fixture(scope="module")
def sdist(source: pathlib.Path) -> tarfile.TarFile:
    return tarfile.open(build(source, "sdist", source.parent / "sdist"))


def modules() -> Set[str]:
    return {str(path.relative_to(ROOT)).replace("\\", "/") for path in (ROOT / "sekuire").rglob("*.py")}


def files_of_the_dashboard() -> Set[str]:
    """Its templates, style sheets and scripts, without which it cannot be served."""
    folder = ROOT / "sekuire/local/ui"
    files = [*(folder / "static").rglob("*"), *(folder / "templates").rglob("*")]
    return {str(path.relative_to(ROOT)).replace("\\", "/") for path in files if path.is_file()}


@pytest.mark.slow
def test_wheel_holds_the_library_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    """Every module, the marker for type checkers, metadata; no tests, no benchmarks."""
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == modules() | files_of_the_dashboard() | {"sekuire/py.typed", "pytest_sekuire.py"}
    assert any(name.endswith("/LICENSE") for name in wheel.namelist())


EXTRAS = {
    "cli": {"jsonschema", "rich"},
    "local": {"sekuire[cli]", "flask", "werkzeug", "cheroot", "blake3", "cryptography", "rfc8785"},
    "testing": {"sekuire[local]", "pytest"},
    "socks": {"PySocks"},
    "reload": {"watchfiles"},
    "flask": {"flask", "werkzeug"},
    "django": {"django"},
    "typed": {"cattrs"},
    "dask": {"distributed"},
    "opentelemetry": {"opentelemetry-api"},
    "manifest": {"PyYAML"},
    "metrics": {"prometheus-client"},
    "policy": {"blake3", "cryptography", "idna", "limits[redis]", "rfc8785"},
}


def test_metadata(wheel: zipfile.ZipFile) -> None:
    """The core needs five packages; what more there is comes only with an extra."""
    folder = f"sekuire-{__version__}.dist-info"
    metadata = email.message_from_bytes(wheel.read(f"{folder}/METADATA"))
    assert metadata["Version"] == __version__
    assert metadata["Requires-Python"] == ">=3.9"
    assert "Apache-2.0" in (metadata["License-Expression"] or metadata["License"])
    needs = [one.replace(" ", "") for one in metadata.get_all("Requires-Dist")]
    core = {one.split(">")[0].split("!")[0].split(";")[0] for one in needs if "extra==" not in one}
    assert core == {"requests", "sseclient-py", "attrs", "tenacity", "urllib3"}
    extras: Dict[str, Set[str]] = {name: set() for name in metadata.get_all("Provides-Extra")}
    for one in needs:
        if "extra==" in one:
            # Versions of setuptools differ in the dash or underscore of a name.
            name = re.split("[><=!;]", one)[0].replace("prometheus_client", "prometheus-client")
            extras[one.split("extra==")[1].strip("\"'")].add(name)
    assert extras == EXTRAS
    entry_points = wheel.read(f"{folder}/entry_points.txt").decode()
    assert "[console_scripts]\nsekuire = sekuire.cli:main" in entry_points
    assert "[pytest11]\nsekuire = pytest_sekuire" in entry_points


@pytest.mark.slow
def test_sdist_is_complete(sdist: tarfile.TarFile) -> None:
    """Who has the sdist can read, test and build everything."""
    prefix = f"sekuire-{__version__}/"
    names = {name[len(prefix) :] for name in sdist.getnames() if name.startswith(prefix)}
    wanted = modules() | {"sekuire/py.typed", "LICENSE", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "setup.cfg"}
    wanted |= {
        "setup.py",
        "pytest_sekuire.py",
        "pyproject.toml",
        "tox.ini",
        ".ci/run",
        "docs/conf.py",
        "tests/test_packaging.py",
    }
    wanted |= {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")}
    wanted |= {
        str(path.relative_to(ROOT)).replace("\\", "/")
        for path in (ROOT / "tests").rglob("*")
        if path.suffix in (".py", ".json")
    }
    assert wanted - names == set()
    assert [name for name in names if "__pycache__" in name or name.endswith(".pyc")] == []


def test_import_is_light(tmp_path: pathlib.Path) -> None:
    """``import sekuire`` loads no web server and no command line, and starts no thread."""
    code = """if True:
        import sys, threading, sekuire
        print(*sorted({"flask", "cheroot", "werkzeug", "sqlite3", "argparse", "sekuire.local", "sekuire.cli",
                       "blake3", "cryptography", "rfc8785", "limits", "sekuire.policy"}
                      & set(sys.modules)), threading.active_count())
    """
    assert run([sys.executable, "-c", code], tmp_path).strip() in ("1", "sqlite3 1")


def test_the_local_platform_names_its_extra(tmp_path: pathlib.Path) -> None:
    """Without Flask and cheroot, importing the local platform says what to install."""
    code = """if True:
        import importlib.util
        find = importlib.util.find_spec
        importlib.util.find_spec = lambda name, *more: None if name in ("flask", "cheroot") else find(name, *more)
        import sekuire
        try:
            import sekuire.local
        except sekuire.SekuireError as error:
            print(error)
    """
    assert "pip install 'sekuire[local]'" in run([sys.executable, "-c", code], tmp_path)


@pytest.mark.slow
def test_module_and_script_are_the_same(tmp_path: pathlib.Path) -> None:
    """``python -m sekuire`` is the command ``sekuire``."""
    script = shutil.which("sekuire", path=str(pathlib.Path(sys.executable).parent))
    assert script, "the package is not installed for this interpreter"
    wanted = f"sekuire {__version__}\n"
    assert run([sys.executable, "-m", "sekuire", "--version"], tmp_path) == wanted
    assert run([script, "--version"], tmp_path) == wanted


def test_every_public_name_is_loaded_when_it_is_used() -> None:
    """Importing the package loads none of its modules; each name of ``__all__`` is there, and nothing is made up."""
    script = (
        "import sys, sekuire\n"
        "loaded = [name for name in sys.modules if name.startswith('sekuire.')]\n"
        "assert loaded == ['sekuire.version'], loaded\n"
        "assert 'requests' not in sys.modules\n"
        "assert set(sekuire.__all__) <= set(dir(sekuire))\n"
        "for name in sekuire.__all__:\n"
        "    assert getattr(sekuire, name) is getattr(sekuire, name) is vars(sekuire)[name]\n"
        "assert sekuire.errors.TaskError is sekuire.TaskError\n"
        "try:\n"
        "    sekuire.Wrong\n"
        "except AttributeError as error:\n"
        "    assert 'Wrong' in str(error)\n"
        "else:\n"
        "    raise AssertionError('no error')\n"
        "scope = {}\n"
        "exec('from sekuire import *', scope)\n"
        "assert set(sekuire.__all__) <= set(scope)\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=GUARD, check=False)
    assert run.returncode == 0, run.stderr
