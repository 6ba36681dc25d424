"""Build images by buildah, without a daemon and without a registry, on a base of this machine's own Python."""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
from typing import Any, List

from ..support.waiting import GUARD

#: Programs that a Dockerfile's RUN may use.
_PROGRAMS = ("sh", "install", "env", "cat", "id")


class Buildah:
    """Run buildah with images and containers in a directory of its own."""

    def __init__(self, directory: pathlib.Path) -> None:
        self._root = directory / "storage"
        self._run_root = directory / "run"
        # vfs copies all files for each step, and works everywhere.
        self._driver = "overlay"
        if self("from", "scratch", check=False).returncode:
            shutil.rmtree(self._root, ignore_errors=True)
            self._driver = "vfs"

    def __call__(self, *arguments: str, check: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
        run = subprocess.run(
            self.command(*arguments), capture_output=True, text=True, timeout=4 * GUARD, check=False, **options
        )
        assert run.returncode == 0 or not check, run.stdout + run.stderr
        return run

    def command(self, *arguments: str) -> List[str]:
        """The whole command line."""
        place = ["--root", str(self._root), "--runroot", str(self._run_root), "--storage-driver", self._driver]
        return ["buildah", *place, *arguments]


def make_base(buildah: Buildah, directory: pathlib.Path, name: str) -> None:
    """Make an image with this Python, its standard library and a shell, and nothing else."""
    root = directory / "base"
    for folder in ("etc", "tmp", "var/lib", "srv", "opt", "proc", "sys", "dev"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    (root / "tmp").chmod(0o1777)
    (root / "etc/passwd").write_text("root:x:0:0:root:/:/bin/sh\n")
    (root / "etc/group").write_text("root:x:0:\n")
    # Nothing comes from a registry: all wheels are in the build's directory.
    (root / "etc/pip.conf").write_text("[global]\nno-index = true\n")
    python = pathlib.Path(os.path.realpath(sys.executable))
    library = pathlib.Path(sysconfig.get_path("stdlib", vars={"installed_base": sys.base_prefix}))
    _copy(root, python)
    shutil.copytree(
        library, root / str(library)[1:], symlinks=True,
        ignore=shutil.ignore_patterns("site-packages", "dist-packages", "test", "tests", "__pycache__", "config-*"),
    )  # fmt: skip
    (root / "usr/bin").mkdir(parents=True, exist_ok=True)
    (root / "usr/bin/python3").unlink(missing_ok=True)
    (root / "usr/bin/python3").symlink_to(python)
    (root / "bin").mkdir(exist_ok=True)
    for program in _PROGRAMS:
        found = shutil.which(program)
        assert found, program
        _copy(root, pathlib.Path(os.path.realpath(found)))
        target = root / "bin" / program
        if not target.exists():
            target.symlink_to(os.path.realpath(found))
    for module in (root / str(library)[1:] / "lib-dynload").glob("*.so"):
        _copy_libraries(root, library / "lib-dynload" / module.name)
    container = buildah("from", "scratch").stdout.strip()
    buildah("add", container, str(root), "/")
    buildah("config", "--env", "PATH=/usr/bin:/bin", container)
    buildah("commit", "--rm", container, name)


def _copy(root: pathlib.Path, program: pathlib.Path) -> None:
    target = root / str(program)[1:]
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(program, target)
    _copy_libraries(root, program)


def _copy_libraries(root: pathlib.Path, program: pathlib.Path) -> None:
    listed = subprocess.run(["ldd", str(program)], capture_output=True, text=True, check=False).stdout
    for found in re.findall(r"(?:=> )?(/\S+) \(0x", listed):
        target = root / found[1:]
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(os.path.realpath(found), target)
