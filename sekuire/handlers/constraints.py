"""Check the constraints of ``Annotated``: those of annotated_types, and what pydantic and msgspec write in their place.

They are recognised by the names of their attributes (``gt``, ``max_length``, ...), so that none of these packages is
needed. A constraint that cannot be checked is refused when the handler is registered. Other metadata is a note,
which nothing checks.
"""

from __future__ import annotations

import datetime as dt
import decimal
import enum
import json
import operator
import typing
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Set, Tuple

from ..errors import ConfigurationError
from .fields import bare, origin_of
from .mismatch import Mismatch, kind_of

#: Return True if a value keeps to a bound.
Check = Callable[[Any, Any], bool]


def _is_multiple(value: Any, factor: Any) -> bool:
    rest = abs(value % factor)
    if not isinstance(value, float) and not isinstance(factor, float):
        return bool(rest == 0)
    # 0.3 is a multiple of 0.1, although both are a little off.
    return bool(min(rest, abs(abs(factor) - rest)) <= abs(value) / 1e9)


#: Attribute of a constraint → what it checks, how it is said, and the method that a type needs for it.
_CHECKS: Dict[str, Tuple[Check, str, str]] = {
    "gt": (operator.gt, "must be greater than {}", "__gt__"),
    "ge": (operator.ge, "must be {} or more", "__ge__"),
    "lt": (operator.lt, "must be less than {}", "__lt__"),
    "le": (operator.le, "must be {} or less", "__le__"),
    "multiple_of": (_is_multiple, "must be a multiple of {}", "__mod__"),
    "min_length": (lambda value, bound: len(value) >= bound, "must have a length of {} or more", "__len__"),
    "max_length": (lambda value, bound: len(value) <= bound, "must have a length of {} or less", "__len__"),
}

#: Attributes of pydantic's ``Field`` that have no effect outside of a model.
_FIELD_ATTRIBUTES = ("alias", "validation_alias", "default_factory")
#: Packages whose metadata is a constraint, also where it is not known here.
_PACKAGES = {"annotated_types", "pydantic", "pydantic_core", "msgspec"}
#: Metadata of these packages that says nothing about a value, or that every input keeps to.
_NOTES = ("DocInfo", "Examples", "FailFast", "Strict", "Unit", "WithJsonSchema")
#: A value of each type that is compared, to try a bound on.
_SAMPLES: Dict[Any, Any] = {
    str: "", int: 1, float: 1.0, bool: True, decimal.Decimal: decimal.Decimal(1), dt.date: dt.date.min,
    dt.datetime: dt.datetime.min.replace(tzinfo=dt.timezone.utc), dt.time: dt.time.min, list: [], dict: {},
    tuple: (), set: set(), frozenset: frozenset(),
}  # fmt: skip


class ConstraintError(ConfigurationError):
    """Report a constraint that cannot be checked, without the place of its annotation."""


def constrained(annotation: Any, build: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return ``build``, followed by a check of the constraints of ``annotation``.

    :raises ConstraintError: a constraint that cannot be checked.
    """
    target = annotation.__origin__
    made = [_check_of(one, target) for one in _flattened(annotation.__metadata__)]
    checks = [one for one in made if one is not None]
    if not checks:
        return build

    def built(value: Any) -> Any:
        found = build(value)
        if found is None:
            # A constraint on an Optional is one on its value.
            return None
        problems = [((), text) for text in (check(found) for check in checks) if text]
        if problems:
            raise Mismatch(problems)
        return found

    return built


def bounds_of(annotation: Any) -> Iterator[Tuple[str, Any]]:
    """Yield each bound of ``annotation``, with the name of its attribute, such as ``gt`` or ``max_length``."""
    for one in _flattened(annotation.__metadata__):
        if not isinstance(one, type):
            for key in _CHECKS:
                bound = getattr(one, key, None)
                if bound is not None and not callable(bound):
                    yield key, bound


def is_field_of_pydantic(value: Any) -> bool:
    """Return True if ``value`` is what pydantic's ``Field(...)`` returns."""
    return ("pydantic", "FieldInfo") in _classes_of(value)


def _flattened(metadata: Sequence[Any]) -> Iterator[Any]:
    """Yield each constraint and note, those of groups such as ``Interval`` and ``Field`` one by one."""
    for one in metadata:
        if is_field_of_pydantic(one):
            for name in _FIELD_ATTRIBUTES:
                if getattr(one, name, None) is not None:
                    raise _refusal(f"Field({name}=...)", "has no effect outside of a pydantic model")
            if not one.is_required():
                raise _refusal("Field(default=...)", "has no effect outside of a pydantic model", "write = value")
            yield from _flattened(one.metadata)
        elif getattr(one, "__is_annotated_types_grouped_metadata__", False) is True:
            yield from _flattened(list(one))
        else:
            yield one


def _check_of(one: Any, target: Any) -> Optional[Callable[[Any], str]]:
    """Return a function that says why a value breaks a constraint. Return None for a note."""
    name = type(one).__name__
    if isinstance(one, type):
        if one.__module__.partition(".")[0] in {*_PACKAGES, "attr"}:
            raise _refusal(one.__name__, "is a class", f"write {one.__name__}(...)")
        return None
    classes = _classes_of(one)
    packages = {package for package, _ in classes}
    found = {key: getattr(one, key, None) for key in _CHECKS}
    bounds = {key: bound for key, bound in found.items() if bound is not None and not callable(bound)}
    if ("annotated_types", "Predicate") in classes:
        return _predicate(one.func)
    if name in _NOTES or (name == "Timezone" and one.tz is ...):  # Every datetime has a time zone here.
        return None
    # pydantic and msgspec keep what annotated_types has no class for, such as a pattern, in one object.
    values = getattr(one, "__dict__", None) or {key: getattr(one, key, None) for key in ("pattern", "tz")}
    others = [f"{key}={value!r}" for key, value in values.items() if value and key not in (*_CHECKS, "strict")]
    if "attr" in packages and not bounds:
        raise _refusal(_shown(one), "has no effect", "write attrs.field(validator=...)")
    is_of_pydantic = name.startswith("_Pydantic")
    if packages & _PACKAGES and (others or not (bounds or is_of_pydantic or name == "Meta")):
        constraint = ", ".join(others) if is_of_pydantic else _shown(one)
        raise _refusal(constraint, f"is not supported{' outside of a pydantic model' * ('pydantic' in packages)}")
    return _bounded(one, bounds, target) if bounds else None


def _bounded(one: Any, bounds: Dict[str, Any], target: Any) -> Callable[[Any], str]:
    checks: List[Tuple[Check, Any, str]] = []
    for key, bound in bounds.items():
        check, text, method = _CHECKS[key]
        for kind in _kinds_of(target):
            problem = _problem_with(check, bound, method, kind)
            if problem:
                raise _refusal(_shown(one), f"cannot be checked: {problem}")
        checks.append((check, bound, text.format(_text_of(bound))))

    def checked(value: Any) -> str:
        for check, bound, text in checks:
            try:
                if check(value, bound):
                    continue
            except (TypeError, ValueError, ArithmeticError):
                return f"{text}, got {kind_of(value)}"
            return text
        return ""

    return checked


def _problem_with(check: Check, bound: Any, method: str, kind: Any) -> str:
    """Say why values of ``kind`` cannot be checked against ``bound``; nothing if they can."""
    name = getattr(kind, "__qualname__", str(kind))
    if method == "__len__" and (isinstance(bound, bool) or not isinstance(bound, int)):
        return f"a length is a whole number, not {_text_of(bound)}"
    if getattr(kind, method, None) is getattr(object, method, None):
        return f"{name} has no {'length' if method == '__len__' else 'order'}"
    if kind in _SAMPLES and method != "__len__":
        try:
            check(_SAMPLES[kind], bound)
        except Exception as error:  # noqa: BLE001
            return f"{name} and {type(bound).__name__} do not go together ({type(error).__name__}: {error})"
    return ""


def _kinds_of(annotation: Any) -> Iterator[Any]:
    """Yield the types that a value of ``annotation`` may have, as far as they are known."""
    origin = origin_of(bare(annotation))
    if origin is typing.Union or type(annotation).__name__ == "UnionType":
        for one in typing.get_args(bare(annotation)):
            yield from _kinds_of(one)
    elif origin is typing.Literal:
        yield from {type(one.value if isinstance(one, enum.Enum) else one) for one in typing.get_args(bare(annotation))}
    elif isinstance(origin, type) and origin not in (object, type(None), Any):
        yield origin


def _predicate(function: Callable[[Any], Any]) -> Callable[[Any], str]:
    name = getattr(function, "__qualname__", type(function).__qualname__)

    def checked(value: Any) -> str:
        try:
            is_fine = bool(function(value))
        except Exception:  # noqa: BLE001  # The user's code. Its text may quote the value.
            is_fine = False
        return "" if is_fine else f"is refused by the predicate {name}"

    return checked


def _refusal(constraint: str, problem: str, instead: str = "") -> ConstraintError:
    return ConstraintError(
        f"the constraint {constraint} of Annotated {problem}; "
        f"{instead or 'use a pydantic model, or check the value in __post_init__ or in the handler'}"
    )


def _shown(one: Any) -> str:
    text = repr(one)
    return text if len(text) <= 80 and " at 0x" not in text else f"{type(one).__name__}(...)"


def _text_of(bound: Any) -> str:
    if isinstance(bound, (str, int, float)) and not isinstance(bound, enum.Enum):
        return json.dumps(bound)
    return bound.isoformat() if isinstance(bound, (dt.date, dt.time)) else str(bound)


def _classes_of(value: Any) -> Set[Tuple[str, str]]:
    """Return the top package and the name of each class that ``value`` is an instance of."""
    return {(cl.__module__.partition(".")[0], cl.__name__) for cl in type(value).__mro__}
