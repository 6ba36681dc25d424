"""Measure how `sekuire/` is built: `python -m tests.tools.structure [REVISION ...]`.

Prints a table with a column for each revision of git that is named, and one for the working tree. What it counts:

- lines: of all files of the package, and of those outside `local/`.
- modules, packages: flat modules stand directly in `sekuire/`.
- largest class, most methods: outside `local/`, which is a program of its own. Properties count as methods.
- constructor parameters: of `__init__`, without `self` and without options. An option is a field of a class in
  `sekuire/config.py`, or a keyword-only parameter with a default.
- callables through constructors: parameters of `__init__` whose annotation is a `Callable` or an alias of one, in all;
  and those that are not options.
- private reach: lines with `other._name`, where `other` is not `self`, `cls` or `super()`, nor an imported module.
- modules of a task: the modules that run code between a task's submission and its accepted report, seen by a profile
  function in the worker's process. The platform runs in another.
- docstrings: of modules, classes and functions.
"""

from __future__ import annotations

import argparse
import ast
import io
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Dict, Iterator, List, NamedTuple, Optional, Set, Tuple, Union

Function = Union[ast.FunctionDef, ast.AsyncFunctionDef]
#: Documented names of every named tuple.
NAMEDTUPLE = ("_replace", "_asdict", "_fields", "_make")
PLATFORM = """
import sys
from sekuire.local import LocalPlatform
with LocalPlatform() as platform:
    print(platform.url, platform.create_install_token("agent"), flush=True)
    for line in sys.stdin:
        task = platform.wait(platform.submit("greet", {}, "agent"), 60)
        print(task["status"], flush=True)
"""
TASK = """
import subprocess, sys, threading
platform = subprocess.Popen(
    [sys.executable, "-c", sys.argv[1]], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
)
def ask():
    print("go", file=platform.stdin, flush=True)
    return platform.stdout.readline()
url, token = platform.stdout.readline().split()
seen, counting = set(), False
def profile(frame, event, arg):
    if counting and event == "call":
        name = frame.f_globals.get("__name__", "")
        if name.partition(".")[0] == "sekuire" and not name.startswith("sekuire.local"):
            seen.add(name)
threading.setprofile(profile)
import sekuire
worker = sekuire.create_worker(
    api_base_url=url, agent_id="agent", install_token=token, heartbeat_interval=3600.0, max_workers=1
)
worker.on_task("greet", lambda ctx, input: "hello")
with worker:
    assert ask() == "completed\\n"
    counting = True
    assert ask() == "completed\\n"
    counting = False
platform.stdin.close()
platform.wait(60)
print(*sorted(seen))
"""


class Biggest(NamedTuple):
    """The largest number found, and where."""

    number: int = 0
    where: str = ""

    def __str__(self) -> str:
        return f"{self.number} ({self.where})" if self.where else str(self.number)


def is_in_local(path: Path) -> bool:
    return "local" in path.parts


class Measure:
    """The measurements of one tree that holds the package."""

    def __init__(self, root: Path) -> None:
        self._root = root
        paths = sorted((root / "sekuire").rglob("*.py"))
        self._texts = {path.relative_to(root): path.read_text(encoding="utf-8") for path in paths}
        self._trees = {path: ast.parse(text) for path, text in self._texts.items()}
        self._options = self._fields_of_configs()
        self._aliases = {"Callable", *self._aliases_of_callables()}

    def rows(self) -> Dict[str, str]:
        """Return the name and the value of each measurement."""
        inits = list(self._constructors())
        callables = [(name, one) for name, init in inits for one in self._parameters(init) if self._is_callable(one)]
        own = [(name, one) for name, one in callables if not self._is_option(one, dict(inits)[name])]
        task = self.modules_of_a_task()
        lines = {path: text.count("\n") for path, text in self._texts.items()}
        return {
            "lines": f"{sum(lines.values())}",
            "lines outside local/": f"{sum(count for path, count in lines.items() if not is_in_local(path))}",
            "modules": f"{sum(path.name != '__init__.py' for path in self._trees)}",
            "flat modules": f"{sum(len(path.parts) == 2 and path.name != '__init__.py' for path in self._trees)}",
            "packages": f"{sum(len(path.parts) > 2 and path.name == '__init__.py' for path in self._trees)}",
            "largest class, in lines": str(self.largest_class()),
            "most methods in a class": str(self.most_methods()),
            "most constructor parameters": str(
                max((Biggest(sum(not self._is_option(one, init) for one in self._parameters(init)), name)
                     for name, init in inits), default=Biggest())
            ),
            "callables through constructors": f"{len(callables)}",
            "... that are not options": f"{len(own)}",
            "lines with private reach": f"{len(self.private_reach())}",
            "modules of a task": "-" if task is None else f"{len(task)}",
            "docstrings": f"{self.docstrings()}",
        }  # fmt: skip

    def largest_class(self) -> Biggest:
        sizes = [Biggest((node.end_lineno or 0) - node.lineno + 1, node.name) for _, node in self._classes()]
        return max(sizes, default=Biggest())

    def most_methods(self) -> Biggest:
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
        counts = [Biggest(sum(isinstance(one, kinds) for one in node.body), node.name) for _, node in self._classes()]
        return max(counts, default=Biggest())

    def private_reach(self) -> List[str]:
        """Return the places, as `path:line`, that use a private name of another object."""
        found: Set[Tuple[str, int]] = set()
        for path, tree in self._trees.items():
            modules = {
                (alias.asname or alias.name).partition(".")[0]
                for node in ast.walk(tree)
                if isinstance(node, (ast.Import, ast.ImportFrom))
                for alias in node.names
            }
            for node in ast.walk(tree):
                if not isinstance(node, ast.Attribute) or not node.attr.startswith("_") or node.attr.endswith("__"):
                    continue
                owner = node.value
                if isinstance(owner, ast.Call) and isinstance(owner.func, ast.Name) and owner.func.id == "cast":
                    # To a type checker it is another object.
                    owner = owner.args[1]
                if node.attr in NAMEDTUPLE or (isinstance(owner, ast.Name) and owner.id in {*modules, "self", "cls"}):
                    continue
                if isinstance(owner, ast.Call) and isinstance(owner.func, ast.Name) and owner.func.id == "super":
                    continue
                found.add((path.as_posix(), node.lineno))
        return [f"{path}:{line}" for path, line in sorted(found)]

    def docstrings(self) -> int:
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        nodes = (node for tree in self._trees.values() for node in ast.walk(tree))
        return sum(isinstance(node, kinds) and ast.get_docstring(node) is not None for node in nodes)

    def modules_of_a_task(self) -> Optional[List[str]]:
        """Return the modules that a task passes; None if the packages for a local platform are not installed."""
        command = [sys.executable, "-c", TASK, PLATFORM]
        done = subprocess.run(command, cwd=self._root, capture_output=True, text=True, timeout=300, check=False)
        if done.returncode != 0:
            print(done.stderr, file=sys.stderr)
            return None
        return done.stdout.split()

    def _classes(self) -> Iterator[Tuple[Path, ast.ClassDef]]:
        """Return the classes outside `local/`."""
        for path, tree in self._trees.items():
            if not is_in_local(path):
                yield from ((path, node) for node in ast.walk(tree) if isinstance(node, ast.ClassDef))

    def _constructors(self) -> Iterator[Tuple[str, Function]]:
        for path, node in self._classes():
            for one in node.body:
                if isinstance(one, ast.FunctionDef) and one.name == "__init__":
                    yield f"{path.with_suffix('').as_posix().replace('/', '.')}.{node.name}", one

    @staticmethod
    def _parameters(function: Function) -> List[ast.arg]:
        return [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs][1:]

    def _is_option(self, parameter: ast.arg, function: Function) -> bool:
        defaults = zip(function.args.kwonlyargs, function.args.kw_defaults)
        return parameter.arg in self._options or any(one is parameter and value is not None for one, value in defaults)

    def _is_callable(self, parameter: ast.arg) -> bool:
        annotation = parameter.annotation
        if annotation is None:
            return False
        names = {node.id for node in ast.walk(annotation) if isinstance(node, ast.Name)}
        return bool(names & self._aliases)

    def _fields_of_configs(self) -> Set[str]:
        tree = self._trees.get(Path("sekuire/config.py"), ast.Module([], []))
        return {
            one.target.id
            for node in ast.walk(tree)
            if isinstance(node, ast.ClassDef)
            for one in node.body
            if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name)
        }

    def _aliases_of_callables(self) -> Iterator[str]:
        for node in (node for tree in self._trees.values() for node in tree.body):
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Subscript):
                names = {one.id for one in ast.walk(node.value) if isinstance(one, ast.Name)}
                if "Callable" in names:
                    yield from (target.id for target in node.targets if isinstance(target, ast.Name))


def measure_revision(revision: str) -> Dict[str, str]:
    """Measure a revision of git in a directory of its own."""
    archive = subprocess.run(["git", "archive", revision, "sekuire"], capture_output=True, check=True).stdout
    with tempfile.TemporaryDirectory() as folder, tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(folder)
        return Measure(Path(folder)).rows()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.tools.structure", description="Measure the structure.")
    parser.add_argument("revisions", nargs="*", metavar="REVISION", help="revisions of git to measure beside the tree")
    parser.add_argument("--reach", action="store_true", help="list the lines that use a private name of another object")
    options = parser.parse_args()
    if options.reach:
        print(*Measure(Path()).private_reach(), sep="\n")
        return 0
    columns = {revision: measure_revision(revision) for revision in options.revisions}
    columns["working tree"] = Measure(Path()).rows()
    table = [["", *columns], *([name, *(rows[name] for rows in columns.values())] for name in columns["working tree"])]
    widths = [max(map(len, column)) for column in zip(*table)]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    return 0


if __name__ == "__main__":
    sys.exit(main())
