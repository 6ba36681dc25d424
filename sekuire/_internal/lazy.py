"""Load a package's public names when they are first used (PEP 562)."""

from __future__ import annotations

import importlib
import sys
from typing import Any, Callable, List, Mapping, Tuple


def names_of(package: str, homes: Mapping[str, str]) -> Tuple[Callable[[str], Any], Callable[[], List[str]]]:
    """Return the ``__getattr__`` and the ``__dir__`` of a package that re-exports names of its modules.

    :param homes: each public name, and the module of the package that defines it.
    """

    def load(name: str) -> Any:
        home = homes.get(name)
        if home is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{package}.{home}"), name)
        # The next access finds the name without this function.
        setattr(sys.modules[package], name, value)
        return value

    def list_names() -> List[str]:
        return sorted({*vars(sys.modules[package]), *homes})

    return load, list_names
