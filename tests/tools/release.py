"""Build what a release consists of and check it: ``tox -e release``.

It builds the source distribution and the wheel twice, from copies whose files have other times and permissions, and
demands the same bytes. Then it runs ``twine check --strict``, lists the wheel, installs it on every interpreter of
:data:`INTERPRETERS` that is there and has it complete a task, and writes an SBOM (CycloneDX) of what the installed
library consists of. All of it is left in ``dist/``.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from typing import Dict, List, Optional, Sequence

ROOT = pathlib.Path(__file__).resolve().parents[2]
INTERPRETERS = ("3.9", "3.10", "3.11", "3.12", "3.13", "3.14")
#: What a first user does, in one process: install, connect, complete a task. It needs the extra `local`.
FIRST_TASK = """if True:
    from sekuire import SekuireClient, create_worker
    from sekuire.local import LocalPlatform
    with LocalPlatform() as platform:
        token = platform.create_install_token("a")
        worker = create_worker(api_base_url=platform.url, agent_id="a", install_token=token)
        worker.on_task("echo", lambda ctx, input: input)
        with worker, SekuireClient(api_base_url=platform.url, api_key=platform.api_key, agent_id="a") as client:
            print(client.call("echo", {"text": "done"})["text"])
"""


class Problem(Exception):
    """Say what is wrong with the release."""


def run(command: Sequence[str], directory: pathlib.Path, **variables: str) -> str:
    """Run a command and return its output.

    :raises Problem: it failed.
    """
    # The environment of tox must not reach other interpreters.
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run(
        command, cwd=directory, env={**environ, **variables}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise Problem(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


# -- building ---------------------------------------------------------------------------------------------------------


#: What a tree without git may hold and no release does.
_LEFT_OUT = ("__pycache__", "build", "dist", "_build", "htmlcov", "node_modules")


def moment_of(root: pathlib.Path) -> int:
    """Return the time that all files of the release carry: SOURCE_DATE_EPOCH, or that of the last commit."""
    given = os.environ.get("SOURCE_DATE_EPOCH")
    if given:
        return int(given)
    try:
        return int(run(["git", "log", "-1", "--format=%ct"], root))
    except (OSError, Problem):
        return int((root / "CHANGELOG.md").stat().st_mtime)


def files_of(root: pathlib.Path) -> List[str]:
    """Return the files that git knows. In a tree without git, all but those that are made by tools."""
    try:
        return [name for name in run(["git", "ls-files", "-z"], root).split("\0") if name]
    except (OSError, Problem):
        found = (path.relative_to(root) for path in sorted(root.rglob("*")) if path.is_file())
        return [
            str(path)
            for path in found
            if (not path.parts[0].startswith(".") or path.parts[0] == ".ci")
            and not any(part in _LEFT_OUT or part.endswith(".egg-info") for part in path.parts)
        ]


def copy_tracked(root: pathlib.Path, target: pathlib.Path, umask: int) -> None:
    """Copy the files of a release, as a clone with that umask has them."""
    for name in files_of(root):
        source = root / name
        if not source.is_file():
            continue
        copy = target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, copy)
        copy.chmod((0o777 if os.access(source, os.X_OK) else 0o666) & ~umask)


def normal_sdist(data: bytes, moment: int) -> bytes:
    """Return a source distribution with its files in order, without users, and with one time and two modes."""
    packed = io.BytesIO()
    with (
        tarfile.open(fileobj=io.BytesIO(data)) as source,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as target,
    ):
        for member in sorted(source.getmembers(), key=lambda one: one.name):
            info = tarfile.TarInfo(member.name)
            info.type, info.size, info.mtime = member.type, member.size, moment
            info.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
            target.addfile(info, source.extractfile(member) if member.isfile() else None)
    return gzip.compress(packed.getvalue(), mtime=moment)


def normal_wheel(data: bytes, moment: int) -> bytes:
    """Return a wheel whose files have one mode. Their order and time are setuptools' already."""
    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for member in source.infolist():
            info = zipfile.ZipInfo(member.filename, member.date_time)
            info.compress_type = zipfile.ZIP_DEFLATED
            info.external_attr = 0o100644 << 16
            target.writestr(info, source.read(member))
    return packed.getvalue()


def build(root: pathlib.Path, work: pathlib.Path, umask: int) -> Dict[str, bytes]:
    """Return the two files of a release, by name, built from a copy of ``root``."""
    tree = work / "tree"
    copy_tracked(root, tree, umask)
    moment = moment_of(root)
    run([sys.executable, "-m", "build", "--outdir", str(work / "out")], tree, SOURCE_DATE_EPOCH=str(moment))
    found: Dict[str, bytes] = {}
    for path in sorted((work / "out").iterdir()):
        normal = normal_wheel if path.suffix == ".whl" else normal_sdist
        found[path.name] = normal(path.read_bytes(), moment)
    return found


def build_twice(root: pathlib.Path) -> Dict[str, bytes]:
    """Return the files of a release.

    :raises Problem: a second build has other bytes.
    """
    builds: List[Dict[str, bytes]] = []
    for umask in (0o022, 0o077):
        with tempfile.TemporaryDirectory() as work:
            builds.append(build(root, pathlib.Path(work), umask))
    first, second = builds
    differing = [name for name in sorted(first.keys() | second.keys()) if first.get(name) != second.get(name)]
    if differing:
        raise Problem(f"built twice, with other bytes: {', '.join(differing)}")
    return first


# -- checking ---------------------------------------------------------------------------------------------------------


def contents(wheel: bytes) -> List[str]:
    """Return a line for each directory of the wheel: its name, files and bytes."""
    sizes: Dict[str, List[int]] = {}
    with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
        for member in archive.infolist():
            sizes.setdefault(str(pathlib.PurePosixPath(member.filename).parent), []).append(member.file_size)
    width = max(map(len, sizes))
    return [f"{name:<{width}}  {len(found):4d} files  {sum(found):9,d} bytes" for name, found in sorted(sizes.items())]


def find_interpreter(version: str) -> Optional[str]:
    """Return the interpreter of a version, None if there is none. pyenv's commands exist without it."""
    found = shutil.which(f"python{version}")
    if found is not None and subprocess.run([found, "-c", ""], capture_output=True, check=False).returncode == 0:
        return found
    return None


def try_out(interpreter: str, wheel: pathlib.Path, work: pathlib.Path) -> pathlib.Path:
    """Install the wheel into a fresh environment and complete a task there. Return the environment's Python."""
    run([interpreter, "-m", "venv", str(work)], work.parent)
    python = work / "bin" / "python"
    pip = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    run([*pip, str(wheel)], work)
    # The core alone, first: nothing of it may need an extra.
    run([str(python), "-c", "from sekuire import *"], work)
    run([*pip, f"sekuire[local] @ {wheel.as_uri()}"], work)
    answer = run([str(python), "-c", FIRST_TASK], work).strip()
    if answer != "done":
        raise Problem(f"{interpreter}: the first task answered {answer!r}")
    return python


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.tools.release", description=__doc__)
    parser.add_argument("--output", type=pathlib.Path, default=ROOT / "dist", help="where the files go")
    parser.add_argument("--only", metavar="X.Y", help="try it out on this interpreter only")
    args = parser.parse_args(argv)
    output: pathlib.Path = args.output
    try:
        files = build_twice(ROOT)
        output.mkdir(exist_ok=True)
        for name, data in files.items():
            (output / name).write_bytes(data)
            print(f"{hashlib.sha256(data).hexdigest()}  {name}  {len(data):,} bytes, the same twice")
        paths = [str(output / name) for name in files]
        print(run([sys.executable, "-m", "twine", "check", "--strict", *paths], ROOT).strip())
        (wheel,) = (output / name for name in files if name.endswith(".whl"))
        print("\n".join(contents(wheel.read_bytes())))
        for version in [args.only] if args.only else INTERPRETERS:
            interpreter = find_interpreter(version)
            if interpreter is None:
                print(f"Python {version}: not installed here")
                continue
            with tempfile.TemporaryDirectory() as work:
                python = try_out(interpreter, wheel, pathlib.Path(work) / "venv")
                print(f"Python {version}: installed, and a task completed")
                if version == f"{sys.version_info[0]}.{sys.version_info[1]}":
                    target = output / "sekuire.cdx.json"
                    sbom = [sys.executable, "-m", "cyclonedx_py", "environment", "--output-reproducible"]
                    run([*sbom, str(python), "-o", str(target)], ROOT)
                    print(f"SBOM: {target.name}")
    except Problem as problem:
        print(f"release: {problem}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
