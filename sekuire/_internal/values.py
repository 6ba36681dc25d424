"""Show and compare attrs classes by their fields, with one method for all of them.

attrs compiles ``__repr__``, ``__eq__`` and ``__hash__`` for each class when it is imported, which takes more than half
of the time in which it makes one. A class that derives from :class:`Shown` or :class:`Value` and is declared with
``repr=False`` and ``eq=False`` needs none of them. They are slower by microseconds, and not called for a task.
"""

from __future__ import annotations

from typing import Any, Tuple


class Shown:
    """Show an attrs class as attrs does, without the fields that are declared with ``repr=False``."""

    __slots__ = ()

    def __repr__(self) -> str:
        shown = []
        for field in self.__attrs_attrs__:  # type: ignore[attr-defined]
            if field.repr:
                show = repr if field.repr is True else field.repr
                shown.append(f"{field.name}={show(getattr(self, field.name))}")
        return f"{type(self).__qualname__.rpartition('>.')[2]}({', '.join(shown)})"


class Value(Shown):
    """Compare an attrs class as attrs does, without the fields that are declared with ``eq=False``."""

    __slots__ = ()

    def __eq__(self, other: object) -> Any:
        return _compared(self) == _compared(other) if type(other) is type(self) else NotImplemented

    def __hash__(self) -> int:
        return hash((type(self), _compared(self)))


def _compared(value: Any) -> Tuple[object, ...]:
    return tuple(getattr(value, field.name) for field in value.__attrs_attrs__ if field.eq)
