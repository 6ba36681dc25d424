"""Find what a new process cannot import, because it is in the main module.

A process that is made by spawn or a fork server imports the program's file again, under the name ``__mp_main__``. What
was typed into an interpreter has no file, and what is under ``if __name__ == "__main__":`` does not run there. Pickle
does not notice: it writes the name, and the process that looks for it fails with each call.
"""

from __future__ import annotations

import ast
import inspect
import io
import os
import pickle
import sys
import tokenize
from types import FunctionType
from typing import Any, Iterator, List, Optional, Sequence, Set, Tuple

__all__ = ["missing_in_processes"]

_GUARD = "if __name__ == '__main__':"
#: The beginnings of the file names that interpreters give to what is typed.
_TYPED = ("<stdin", "<console", "<input", "<python-input", "<ipython-input")


def missing_in_processes(value: Any, data: bytes) -> str:
    """Return what of ``value`` a new process cannot import, and what to do. An empty text if it can import all.

    :param data: ``value``, pickled.
    """
    if b"__main__" not in data:
        return ""
    found = _Finder.references(value)
    if not found:
        return ""
    path, problem = _file_of_main()
    if problem:
        return f"{found[0].__qualname__} is defined in {problem}; move it to a module and import it from there"
    for one in found:
        code = getattr(inspect.unwrap(one), "__code__", None)
        if code is not None and code.co_filename.startswith(_TYPED):
            return f"{one.__qualname__} was typed into an interpreter; move it to a module and import it from there"
    if path is None:
        return ""
    guarded = _guarded_names(path)
    for one in found:
        if one.__qualname__.partition(".")[0] in guarded:
            return (
                f"{one.__qualname__} is defined under `{_GUARD}` in {path}, which other processes skip; move it above "
                "that line, or to a module"
            )
    return ""


class _Finder(pickle.Pickler):
    """Collect the functions and classes of the main module that a pickle names."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO())
        self.found: List[Any] = []

    @classmethod
    def references(cls, value: Any) -> List[Any]:
        finder = cls()
        finder.dump(value)
        return finder.found

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, (FunctionType, type)) and value.__module__ == "__main__":
            self.found.append(value)
        return NotImplemented


def _file_of_main() -> Tuple[Optional[str], str]:
    """Return the path that a new process imports as its main module, and why it imports none: one of both.

    It follows ``multiprocessing.spawn``.
    """
    main = sys.modules["__main__"]
    path = getattr(main, "__file__", None)
    name = getattr(getattr(main, "__spec__", None), "name", None)
    if name is not None and name.rpartition(".")[2] == "__main__":
        return None, f"{path or name}, which other processes do not import"
    if path is None or not os.path.exists(path) or os.path.splitext(os.path.basename(path))[0] == "ipython":
        return None, "__main__ without a file (an interpreter, a notebook, stdin or python -c)"
    return path, ""


def _guarded_names(path: str) -> Set[str]:
    """Return the names that a file defines only where it is the main module."""
    try:
        with tokenize.open(path) as file:
            tree = ast.parse(file.read(), path)
    except (OSError, SyntaxError, ValueError):  # A compiled file, or an archive.
        return set()
    names = list(_names(tree.body, is_guarded=False))
    return {name for name, is_guarded in names if is_guarded} - {name for name, is_guarded in names if not is_guarded}


def _names(statements: Sequence[ast.AST], is_guarded: bool) -> Iterator[Tuple[str, bool]]:
    """Yield the names that statements bind, each with True if it is under the guard."""
    for one in statements:
        if isinstance(one, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield one.name, is_guarded
        elif isinstance(one, (ast.Import, ast.ImportFrom)):
            for alias in one.names:
                yield alias.asname or alias.name.partition(".")[0], is_guarded
        elif isinstance(one, ast.If) and _is_guard(one.test):
            yield from _names(one.body, True)
            yield from _names(one.orelse, is_guarded)
        elif isinstance(one, ast.expr):
            for part in ast.walk(one):
                if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
                    yield part.id, is_guarded
        else:
            # A loop, a branch, a try, a with or an assignment: what it binds, and what it holds.
            yield from _names(list(ast.iter_child_nodes(one)), is_guarded)


def _is_guard(test: ast.expr) -> bool:
    """Return True for ``__name__ == "__main__"``, alone or as a part of an ``and``."""
    if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And):
        return any(_is_guard(value) for value in test.values)
    if not isinstance(test, ast.Compare) or len(test.ops) != 1 or not isinstance(test.ops[0], ast.Eq):
        return False
    sides = (test.left, test.comparators[0])
    names = [side.id for side in sides if isinstance(side, ast.Name)]
    texts = [side.value for side in sides if isinstance(side, ast.Constant)]
    return names == ["__name__"] and texts == ["__main__"]
