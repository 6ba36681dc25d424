"""The input that a handler's annotation asks for, built from JSON: cattrs for classes, pydantic for its own models.

Both, and this module, are imported when the first handler needs them. What is built how is settled when a handler is
registered.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import datetime as dt
import decimal
import enum
import functools
import importlib.util
import json
import pathlib
import types
import typing
import uuid
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple, Type, Union

import attrs

from . import protocol
from .errors import ConfigurationError

__all__ = ["Mismatch", "structure_of"]

#: Builds a handler's input from JSON; raises :class:`Mismatch`.
Structure = Callable[[Any], Any]
Path = Tuple[Union[str, int], ...]

#: Mismatches that are told of one input, and characters of a name or a validator's text.
MAX_PROBLEMS = 10
_MAX_NAME, _MAX_TEXT = 60, 200

_MAPPINGS = (dict, collections.abc.Mapping, collections.abc.MutableMapping)
_LISTS = (
    list, collections.abc.Sequence, collections.abc.MutableSequence, collections.abc.Collection,
    collections.abc.Iterable,
)  # fmt: skip
_SETS = (set, frozenset, collections.abc.Set, collections.abc.MutableSet)
_LITERAL: Any = typing.Literal
_UNIONS = (Union, getattr(types, "UnionType", Union))


class Mismatch(Exception):
    """An input is not what the annotation says; ``problems`` are pairs of a path in it and what is wrong there."""

    def __init__(self, problems: Sequence[Tuple[Path, str]]) -> None:
        super().__init__(problems)
        self.problems = problems

    def details(self) -> Dict[str, Any]:
        """For a failure's ``details``."""
        shown = self.problems[:MAX_PROBLEMS]
        return {"problems": [{"path": _text_of(path), "problem": problem} for path, problem in shown]}

    def __str__(self) -> str:
        path, problem = self.problems[0]
        more = len(self.problems) - 1
        return f"{_text_of(path)}: {problem}" + (f" (and {more} more)" if more else "")


def structure_of(annotation: Any) -> Structure:
    """What builds an input of this (resolved) annotation.

    :raises ConfigurationError: it cannot be built, or needs an extra that is not installed.
    """
    if _is_pydantic(annotation):
        return functools.partial(_call, _guarded(_pydantic_hook, annotation))
    hook = _guarded(_converter().get_structure_hook, annotation)
    return functools.partial(_call, lambda value: hook(value, annotation))


def _call(hook: Structure, value: Any) -> Any:
    problems: List[Tuple[Path, str]]
    try:
        return hook(value)
    except Exception as error:  # noqa: BLE001  # Of cattrs, or of the class's own code.
        problems = list(_problems(error))
    # Raised out here: as its context, the library's error would keep the input in its frames.
    raise Mismatch(problems)


def _guarded(make: Callable[[Any], Any], annotation: Any) -> Any:
    try:
        return make(annotation)
    except ConfigurationError as error:
        problem = error.problem
    except Exception as error:  # noqa: BLE001
        problem = f"{type(error).__name__}: {error}"
    raise ConfigurationError(f"{_name(annotation)} cannot be built from JSON: {problem}")


def _is_pydantic(annotation: Any) -> bool:
    return isinstance(annotation, type) and hasattr(annotation, "__pydantic_validator__")


def _name(annotation: Any) -> str:
    return annotation.__qualname__ if isinstance(annotation, type) else str(annotation)


# -- what is wrong, and where -----------------------------------------------------------------------------------------


def _expected(what: str, value: Any) -> Mismatch:
    return Mismatch([((), f"expected {what}, got {_kind(value)}")])


def _kind(value: Any) -> str:
    """What ``value`` is, never what it says: it may be a secret in the wrong place."""
    if value is None:
        return "null"
    for kind, name in (
        (bool, "a boolean"), (int, "an integer"), (float, "a number"), (str, "a string"), (list, "an array"),
        (dict, "an object"),
    ):  # fmt: skip
        if isinstance(value, kind):
            return name
    return f"a {type(value).__name__}"


def _problems(error: BaseException) -> Iterator[Tuple[Path, str]]:
    """The mismatches that an error of a hook, of cattrs or of a class's own code stands for."""
    if isinstance(error, Mismatch):
        yield from error.problems
        return
    inner = getattr(error, "exceptions", None)
    if not isinstance(inner, (tuple, list)):
        yield (), _said(error)
        return
    for one in inner:
        names = [note.name for note in getattr(one, "__notes__", ()) if hasattr(note, "name")]
        if not names:
            yield from _problems(one)
        elif isinstance(one, KeyError) and one.args == (names[-1],):
            yield (names[-1],), "is missing"
        else:
            for path, problem in _problems(one):
                yield (names[-1], *path), problem


def _said(error: BaseException) -> str:
    """The text of an error that a class's own check raised."""
    text = str(error.args[0]) if error.args else ""
    if len(error.args) > 1 and isinstance(error.args[1], attrs.Attribute):
        # The validators of attrs quote the value.
        text = text.split(" (got ")[0].replace(repr(error.args[-1]), "it")
    return f"is refused: {text[:_MAX_TEXT]}" if text else f"is refused ({type(error).__name__})"


def _text_of(path: Path) -> str:
    text = "input"
    for one in path:
        if isinstance(one, int):
            text += f"[{one}]"
        else:
            shown = one[:_MAX_NAME]
            text += f".{shown}" if shown.isidentifier() else f"[{shown!r}]"
    return text


# -- pydantic ---------------------------------------------------------------------------------------------------------


def _pydantic_hook(cls: Any) -> Structure:
    from pydantic import TypeAdapter, ValidationError

    adapter = TypeAdapter(cls)
    config = getattr(cls, "model_config", None) or getattr(cls, "__pydantic_config__", None) or {}
    # A strict model takes a date from JSON, but not from a str of Python.
    is_strict = bool(config.get("strict"))

    def structure(value: Any) -> Any:
        try:
            if is_strict:
                return adapter.validate_json(json.dumps(value))
            return adapter.validate_python(value)
        except ValidationError as error:
            problems = [(tuple(one["loc"]), one["msg"][:_MAX_TEXT]) for one in error.errors()]
        raise Mismatch(problems)

    return structure


# -- cattrs -----------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def _converter() -> Any:
    if importlib.util.find_spec("cattrs") is None:
        raise ConfigurationError("a typed input needs an extra: pip install 'sekuire[typed]'")
    return _make_converter()


def _make_converter() -> Any:
    from cattrs import Converter

    class StrictConverter(Converter):
        """cattrs, but for values: a mismatch is never converted away."""

        def gen_structure_attrs_fromdict(self, cl: Any) -> Any:
            return _of_object(cl, super().gen_structure_attrs_fromdict(cl))

        def get_structure_hook(self, type: Any, cache_result: bool = True) -> Any:
            # cattrs has a hook for it, which would make bytes of anything.
            return _unsupported(type) if type is bytes else super().get_structure_hook(type, cache_result)

    converter = StrictConverter(structure_fallback_factory=_unsupported)
    for kind, structure in _SCALARS.items():
        converter.register_structure_hook(kind, structure)
    converter.register_structure_hook(enum.Enum, lambda value, cl: _enum(cl)(value, cl))
    for predicate, factory in (
        (lambda cl: _is_typed_dict(_origin(cl)), functools.partial(_typed_dict, converter)),
        (lambda cl: cl in (None, type(None)), _null),
        (lambda cl: _origin(cl) is _LITERAL, _literal),
        (lambda cl: _origin(cl) in _LISTS, functools.partial(_array, converter)),
        (lambda cl: _origin(cl) in _SETS, functools.partial(_set, converter)),
        (lambda cl: _origin(cl) is tuple, functools.partial(_tuple, converter)),
        (lambda cl: _origin(cl) in _MAPPINGS, functools.partial(_mapping, converter)),
        (lambda cl: typing.get_origin(cl) in _UNIONS, functools.partial(_union, converter)),
        (_is_pydantic, lambda cl: _without_type(_pydantic_hook(cl))),
    ):
        converter.register_structure_hook_factory(predicate, factory)
    return converter


def _origin(annotation: Any) -> Any:
    return typing.get_origin(annotation) or annotation


def _without_type(structure: Structure) -> Any:
    return lambda value, cl: structure(value)


def _unsupported(cl: Any) -> Any:
    raise ConfigurationError(
        f"{_name(cl)} has no form in JSON; use attrs classes, dataclasses, TypedDicts, pydantic models, str, int, "
        "float, bool, None, datetime, date, time, UUID, Decimal, Path, enums, Literal, and lists, sets, tuples, "
        "mappings and unions of these"
    )


def _of_object(cl: Any, hook: Any) -> Any:
    def structure(value: Any, cl: Any = cl) -> Any:
        if not isinstance(value, dict):
            raise _expected("an object", value)
        return hook(value, cl)

    return structure


def _scalar(what: str, kinds: Tuple[type, ...], build: Optional[Callable[[Any], Any]] = None) -> Any:
    def structure(value: Any, cl: Any) -> Any:
        if _is_enum(cl):
            return _enum(cl)(value, cl)
        if not isinstance(value, kinds) or isinstance(value, bool) is not (bool in kinds):
            raise _expected(what, value)
        try:
            built = value if build is None else build(value)
        except (ValueError, ArithmeticError):
            built = None
        if built is None:
            raise Mismatch([((), f"expected {what}, got {_other(value)}")])
        return built if not isinstance(cl, type) or isinstance(built, cl) else cl(built)

    return structure


def _finite(value: Any) -> decimal.Decimal:
    number = decimal.Decimal(str(value))
    if not number.is_finite():
        raise ValueError("not finite")
    return number


_SCALARS: Dict[Any, Any] = {
    str: _scalar("a string", (str,)),
    int: _scalar("an integer", (int,)),
    float: _scalar("a number", (int, float), float),
    bool: _scalar("a boolean", (bool,)),
    dt.datetime: _scalar("a string with a date, a time and its offset (RFC 3339)", (str,), protocol.parse_time),
    dt.date: _scalar("a string with a date, such as 2024-12-31", (str,), dt.date.fromisoformat),
    dt.time: _scalar("a string with a time, such as 23:59:59", (str,), dt.time.fromisoformat),
    uuid.UUID: _scalar("a string with a UUID", (str,), uuid.UUID),
    decimal.Decimal: _scalar("a number, or a string with one", (int, float, str), _finite),
    pathlib.Path: _scalar("a string with a path", (str,), pathlib.Path),
}


def _null(cl: Any) -> Any:
    def structure(value: Any, cl: Any) -> None:
        if value is not None:
            raise _expected("null", value)

    return structure


def _one_of(values: Sequence[Any]) -> str:
    return f"one of {', '.join(json.dumps(value, default=str) for value in values)}"


def _is_enum(cl: Any) -> bool:
    return isinstance(cl, type) and issubclass(cl, enum.Enum)


@functools.cache
def _enum(cl: Type[enum.Enum]) -> Any:
    members = {(type(member.value), member.value): member for member in cl}

    def structure(value: Any, cl: Any) -> Any:
        try:
            return members[type(value), value]
        except (KeyError, TypeError):
            pass
        raise Mismatch([((), f"expected {_one_of([member.value for member in cl])}, got {_other(value)}")])

    return structure


def _literal(cl: Any) -> Any:
    values = typing.get_args(cl)
    plain = {(type(one), one): one for one in values}
    plain.update({(type(one.value), one.value): one for one in values if isinstance(one, enum.Enum)})

    def structure(value: Any, cl: Any) -> Any:
        try:
            return plain[type(value), value]
        except (KeyError, TypeError):
            pass
        shown = [one.value if isinstance(one, enum.Enum) else one for one in values]
        raise Mismatch([((), f"expected {_one_of(shown)}, got {_other(value)}")])

    return structure


def _other(value: Any) -> str:
    kind = _kind(value)
    return f"another {kind.split(' ', 1)[1]}" if kind.startswith("a") else kind


def _hook_of(converter: Any, annotation: Any) -> Structure:
    hook = converter.get_structure_hook(annotation)
    return lambda value: hook(value, annotation)


def _each(pairs: Iterator[Tuple[Union[str, int], Any]], hook: Structure) -> List[Any]:
    """What ``hook`` makes of each value; the keys are their places in the path."""
    built, problems = [], []
    for key, value in pairs:
        try:
            built.append(hook(value))
        except Exception as error:  # noqa: BLE001
            problems += [((key, *path), problem) for path, problem in _problems(error)]
            if len(problems) >= MAX_PROBLEMS:
                break
    if problems:
        raise Mismatch(problems)
    return built


def _arguments(cl: Any, count: int) -> Tuple[Any, ...]:
    return tuple(typing.get_args(cl)) or (Any,) * count


def _array(converter: Any, cl: Any) -> Any:
    hook = _hook_of(converter, _arguments(cl, 1)[0])

    def structure(value: Any, cl: Any) -> Any:
        if not isinstance(value, list):
            raise _expected("an array", value)
        return _each(enumerate(value), hook)

    return structure


def _set(converter: Any, cl: Any) -> Any:
    array = _array(converter, cl)
    make = frozenset if _origin(cl) in (frozenset, collections.abc.Set) else set

    def structure(value: Any, cl: Any) -> Any:
        return make(array(value, cl))

    return structure


def _tuple(converter: Any, cl: Any) -> Any:
    arguments = _arguments(cl, 1)
    if not typing.get_args(cl) or arguments[-1] is Ellipsis:
        array = _array(converter, List[arguments[0]])  # type: ignore[valid-type]
        return lambda value, cl: tuple(array(value, cl))
    hooks = [_hook_of(converter, one) for one in arguments]

    def structure(value: Any, cl: Any) -> Any:
        if not isinstance(value, list):
            raise _expected("an array", value)
        if len(value) != len(hooks):
            raise Mismatch([((), f"expected an array of {len(hooks)}, got one of {len(value)}")])
        return tuple(_each(enumerate(zip(hooks, value)), lambda pair: pair[0](pair[1])))

    return structure


def _mapping(converter: Any, cl: Any) -> Any:
    key_type, value_type = _arguments(cl, 2)
    key_of, value_of = _hook_of(converter, key_type), _hook_of(converter, value_type)
    if key_type in (int, float, bool):
        raise ConfigurationError(f"the keys of an object are strings in JSON, never {_name(key_type)}")

    def structure(value: Any, cl: Any) -> Any:
        if not isinstance(value, dict):
            raise _expected("an object", value)
        keys = _each(((key, key) for key in value), key_of)
        return dict(zip(keys, _each(iter(value.items()), value_of)))

    return structure


def _is_typed_dict(cl: Any) -> bool:
    return isinstance(cl, type) and issubclass(cl, dict) and hasattr(cl, "__required_keys__")


def _typed_dict(converter: Any, cl: Any) -> Any:
    cl = _origin(cl)
    hooks, required = {}, set()
    for name, hint in typing.get_type_hints(cl, include_extras=True).items():
        # Looked at here: where annotations are strings, Python itself takes every key for what __total__ says.
        is_required = name in cl.__required_keys__
        while getattr(_origin(hint), "_name", None) in ("Required", "NotRequired", "ReadOnly"):
            is_required = {"Required": True, "NotRequired": False}.get(_origin(hint)._name, is_required)
            hint = typing.get_args(hint)[0]
        hooks[name] = _hook_of(converter, hint)
        if is_required:
            required.add(name)

    def structure(value: Any, cl: Any) -> Any:
        if not isinstance(value, dict):
            raise _expected("an object", value)
        found: Dict[str, Any] = {}
        problems: List[Tuple[Path, str]] = []
        for name, hook in hooks.items():
            if name not in value:
                if name in required:
                    problems.append(((name,), "is missing"))
                continue
            try:
                found[name] = hook(value[name])
            except Exception as error:  # noqa: BLE001
                problems += [((name, *path), problem) for path, problem in _problems(error)]
        if problems:
            raise Mismatch(problems)
        return found

    return structure


def _union(converter: Any, cl: Any) -> Any:
    members = typing.get_args(cl)
    others = [one for one in members if one is not type(None)]
    classes = [one for one in others if _is_class(one)]
    hooks: List[Structure] = []
    if len(classes) > 1:
        # Their fields tell them apart; where they do not, this raises.
        from cattrs.disambiguators import create_default_dis_func

        tell = create_default_dis_func(converter, *classes)
        by_class = {one: _hook_of(converter, one) for one in classes}
        hooks.append(lambda value: _told(tell, by_class, value))
        others = [one for one in others if one not in classes]
    hooks += [_hook_of(converter, one) for one in others]

    def structure(value: Any, cl: Any) -> Any:
        if value is None and type(None) in members:
            return None
        problems: List[Tuple[Path, str]] = []
        for hook in hooks:
            try:
                return hook(value)
            except Exception as error:  # noqa: BLE001
                problems += _problems(error)
        raise Mismatch(_joined(problems))

    return structure


def _joined(problems: List[Tuple[Path, str]]) -> List[Tuple[Path, str]]:
    """One problem for all members of a union, where none of them got further than the value's kind."""
    wanted, got = [], set()
    for path, problem in problems:
        expected, comma, rest = problem.partition(", got ")
        if path or not comma or not expected.startswith("expected "):
            return [one for one in problems if one[0]] or problems
        wanted.append(expected[len("expected ") :])
        got.add(rest)
    return [((), f"expected {' or '.join(dict.fromkeys(wanted))}, got {min(got, key=len)}")]


def _is_class(annotation: Any) -> bool:
    origin = _origin(annotation)
    return (attrs.has(origin) or dataclasses.is_dataclass(origin)) and not _is_pydantic(annotation)


def _told(tell: Any, by_class: Dict[Any, Structure], value: Any) -> Any:
    if not isinstance(value, dict):
        raise _expected("an object", value)
    try:
        found = tell(value)
    except Exception:  # noqa: BLE001  # Of several kinds, by the way in which the classes are told apart.
        found = None
    if found is None:
        names = " or ".join(_name(one) for one in by_class)
        raise Mismatch([((), f"expected an object with the fields of {names}, got another one")])
    return by_class[found](value)
