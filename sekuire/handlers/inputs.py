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
import inspect
import json
import pathlib
import threading
import types
import typing
import uuid
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Set, Tuple, Type, Union

import attrs

from ..errors import ConfigurationError
from ..wire import protocol
from .fields import bound_of, fields_of, hints_of, origin_of, owner_of
from .mismatch import MAX_PROBLEMS, MAX_TEXT, Mismatch, Path, expected, kind_of, problems_of

__all__ = ["structure_of"]

#: Builds a handler's input from JSON; raises :class:`Mismatch`.
Structure = Callable[[Any], Any]

#: Ways in which the place of one of pydantic's errors is read.
_MAX_WAYS = 20

_MAPPINGS = (dict, collections.abc.Mapping, collections.abc.MutableMapping)
_LISTS = (
    list, collections.abc.Sequence, collections.abc.MutableSequence, collections.abc.Collection,
    collections.abc.Iterable,
)  # fmt: skip
_SETS = (set, frozenset, collections.abc.Set, collections.abc.MutableSet)
_LITERAL: Any = typing.Literal
_FINAL: Any = typing.Final
_UNIONS = (Union, getattr(types, "UnionType", Union))


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
        problems = list(problems_of(error))
    # Raised out here: as its context, the library's error would keep the input in its frames.
    raise Mismatch(problems)


def _guarded(make: Callable[[Any], Any], annotation: Any) -> Any:
    try:
        return make(annotation)
    except ConfigurationError as error:
        problem = error.problem
    except Exception as error:  # noqa: BLE001
        problem = f"{type(error).__name__}: {error}"
    # It may hold hooks that refer to the one that was not made.
    _converter.cache_clear()
    raise ConfigurationError(f"{_name(annotation)} cannot be built from JSON: {problem}")


def _is_pydantic(annotation: Any) -> bool:
    return isinstance(annotation, type) and hasattr(annotation, "__pydantic_validator__")


def _name(annotation: Any) -> str:
    return annotation.__qualname__ if isinstance(annotation, type) else str(annotation)


# -- pydantic ---------------------------------------------------------------------------------------------------------


#: What is said instead of the texts that hold parts of the input.
_QUOTING = {
    "byte_size_unit": "could not interpret byte unit",
    "bytes_invalid_encoding": "Data should be in a valid encoding",
    "datetime_object_invalid": "Invalid datetime object",
    "get_attribute_error": "Error extracting attribute",
    "import_error": "Invalid python path",
    "iteration_error": "Error iterating over object",
    "mapping_type": "Input should be a valid mapping",
    "timezone_offset": "Timezone offset of {tz_expected} required",
    "union_tag_invalid": "Input tag found using {discriminator} does not match any of the expected tags: "
    "{expected_tags}",
    "uuid_parsing": "Input should be a valid UUID",
    "zoneinfo_str": "invalid timezone",
}


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
            problems = [(_path_in(value, one), _text_by_pydantic(one)[:MAX_TEXT]) for one in error.errors()]
        raise Mismatch(list(dict.fromkeys(problems)))

    return structure


def _text_by_pydantic(error: Any) -> str:
    context = error.get("ctx", {})
    if error["type"] in _QUOTING:
        return _QUOTING[error["type"]].format_map(context)
    text: str = error["msg"]
    if error["type"] == "value_error":
        raised = context.get("error")
        if "reason" in context:
            # Of an email address; the reason quotes it.
            return text.partition(":")[0]
        if isinstance(raised, Exception) and raised.__traceback__ is None:
            # Of a builtin that is used as a check, such as int; its text quotes the value.
            return f"is refused ({type(raised).__name__})"
    return text


def _path_in(value: Any, error: Any) -> Path:
    """The path of pydantic's error in ``value``: without the names of a union's members, which are not in there."""
    location, target = error["loc"], error["input"]
    missing: Path = ()
    if error["type"].startswith("missing"):
        location, missing = location[:-1], location[-1:]
    # Each way of reading it so far: a name may be a key in one place, and a member of a union in another.
    ways: List[Tuple[Any, Path]] = [(value, ())]
    for one in location:
        following: List[Tuple[Any, Path]] = []
        for inner, path in ways:
            if one in inner if isinstance(inner, dict) else _is_index(one, inner):
                following.append((inner[one], (*path, one)))
            following.append((inner, path))
        ways = following[:_MAX_WAYS]
    fitting = (
        [path for inner, path in ways if inner is target]
        # A strict model's input was read from text: other objects, of the same value.
        or [path for inner, path in ways if type(inner) is type(target) and inner == target]
        or [max((path for _, path in ways), key=len)]
    )
    return fitting[0] + missing


def _is_index(one: Any, value: Any) -> bool:
    return isinstance(value, list) and isinstance(one, int) and one < len(value)


# -- cattrs -----------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def _converter() -> Any:
    if importlib.util.find_spec("cattrs") is None:
        raise ConfigurationError("a typed input needs an extra: pip install 'sekuire[typed]'")
    return _make_converter()


def _make_converter() -> Any:
    from cattrs import Converter

    being_made = threading.local()

    class StrictConverter(Converter):
        """cattrs, but for values: a mismatch is never converted away."""

        def gen_structure_attrs_fromdict(self, cl: Any) -> Any:
            return _of_object(cl, _object(self, cl))

        def get_structure_hook(self, type: Any, cache_result: bool = True) -> Any:
            if type is bytes:
                # cattrs has a hook for it, which would make bytes of anything.
                return _unsupported(type)
            made = being_made.__dict__.setdefault("types", set())
            if type in made:
                # It holds itself: looked up when there is a value to build.
                return lambda value, cl: self.get_structure_hook(type)(value, type)
            made.add(type)
            try:
                return super().get_structure_hook(type, cache_result)
            finally:
                made.discard(type)

    converter = StrictConverter(structure_fallback_factory=_unsupported)
    for kind, structure in _SCALARS.items():
        converter.register_structure_hook(kind, structure)
    converter.register_structure_hook(enum.Enum, lambda value, cl: _enum(cl)(value, cl))
    for predicate, factory in (
        (lambda cl: _is_typed_dict(origin_of(cl)), functools.partial(_typed_dict, converter)),
        # That of cattrs takes a TypedDict in it for one of its own.
        (lambda cl: hasattr(cl, "__metadata__"), lambda cl: _without_type(_hook_of(converter, cl.__origin__))),
        (lambda cl: cl in (None, type(None)), _null),
        (lambda cl: origin_of(cl) is _LITERAL, _literal),
        (lambda cl: origin_of(cl) in _LISTS, functools.partial(_array, converter)),
        (lambda cl: origin_of(cl) in _SETS, functools.partial(_set, converter)),
        (lambda cl: origin_of(cl) is tuple, functools.partial(_tuple, converter)),
        (_is_named_tuple, functools.partial(_named_tuple, converter)),
        (lambda cl: origin_of(cl) in _MAPPINGS, functools.partial(_mapping, converter)),
        (lambda cl: typing.get_origin(cl) in _UNIONS, functools.partial(_union, converter)),
        (_is_pydantic, lambda cl: _without_type(_pydantic_hook(cl))),
    ):
        converter.register_structure_hook_factory(predicate, factory)
    return converter


def _without_type(structure: Structure) -> Any:
    return lambda value, cl: structure(value)


def _unsupported(cl: Any) -> Any:
    raise ConfigurationError(
        f"{_name(cl)} has no form in JSON; use attrs classes, dataclasses, TypedDicts, pydantic models, str, int, "
        "float, bool, None, datetime, date, time, UUID, Decimal, Path, enums, Literal, and lists, sets, tuples, "
        "mappings and unions of these"
    )


def _object(converter: Any, cl: Any) -> Any:
    from cattrs.gen import make_dict_structure_fn_from_attrs

    origin = origin_of(cl)
    fields = fields_of(cl)
    given = {field.alias for field in fields if field.init}
    for name in _demanded(origin):
        if name not in given:
            raise ConfigurationError(
                f"{_name(origin)} cannot be made without {name!r}, which no field of the JSON gives (an InitVar?); "
                "give it a default"
            )
    variables = {one.__name__: value for one, value in bound_of(cl)[origin].items()}
    return make_dict_structure_fn_from_attrs(fields, origin, converter, variables)


def _demanded(cl: Any) -> List[str]:
    """What a call of ``cl`` must name, as far as its signature says."""
    try:
        parameters = inspect.signature(cl).parameters.values()
    except (TypeError, ValueError):
        return []
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [one.name for one in parameters if one.default is one.empty and one.kind in kinds]


def _of_object(cl: Any, hook: Any) -> Any:
    def structure(value: Any, cl: Any = cl) -> Any:
        if not isinstance(value, dict):
            raise expected("an object", value)
        return hook(value, cl)

    return structure


# -- the kinds of annotations -----------------------------------------------------------------------------------------


def _scalar(what: str, kinds: Tuple[type, ...], build: Optional[Callable[[Any], Any]] = None) -> Any:
    def structure(value: Any, cl: Any) -> Any:
        if _is_enum(cl):
            return _enum(cl)(value, cl)
        if not isinstance(value, kinds) or isinstance(value, bool) is not (bool in kinds):
            raise expected(what, value)
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
            raise expected("null", value)

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
    plain = _literal_values(cl)

    def structure(value: Any, cl: Any) -> Any:
        try:
            return plain[type(value), value]
        except (KeyError, TypeError):
            pass
        shown = [one.value if isinstance(one, enum.Enum) else one for one in values]
        raise Mismatch([((), f"expected {_one_of(shown)}, got {_other(value)}")])

    return structure


def _literal_values(cl: Any) -> Dict[Tuple[type, Any], Any]:
    """The values of a ``Literal`` by what JSON has for them."""
    values = typing.get_args(cl)
    plain = {(type(one), one): one for one in values}
    plain.update({(type(one.value), one.value): one for one in values if isinstance(one, enum.Enum)})
    return plain


def _other(value: Any) -> str:
    kind = kind_of(value)
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
            problems += [((key, *path), problem) for path, problem in problems_of(error)]
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
            raise expected("an array", value)
        return _each(enumerate(value), hook)

    return structure


def _set(converter: Any, cl: Any) -> Any:
    array = _array(converter, cl)
    element = _unhashable(_arguments(cl, 1)[0])
    if element is not None:
        raise ConfigurationError(f"a set cannot hold {_name(element)}, which is not hashable")
    make = frozenset if origin_of(cl) in (frozenset, collections.abc.Set) else set

    def structure(value: Any, cl: Any) -> Any:
        return make(array(value, cl))

    return structure


def _unhashable(annotation: Any) -> Any:
    """What in ``annotation`` no set can hold; None if there is nothing."""
    annotation = _bare(annotation)
    origin = origin_of(annotation)
    if origin is tuple or origin in _UNIONS:
        return next((one for one in map(_unhashable, typing.get_args(annotation)) if one is not None), None)
    has_no_hash = isinstance(origin, type) and getattr(origin, "__hash__", None) is None
    # Lists are built for abstract sequences, which have a hash, and frozensets for abstract sets, which have none.
    return annotation if origin in _LISTS or (has_no_hash and origin is not collections.abc.Set) else None


def _bare(annotation: Any) -> Any:
    """``annotation`` without ``Annotated``, ``Final`` and ``NewType``."""
    while True:
        if hasattr(annotation, "__supertype__"):
            annotation = annotation.__supertype__
        elif hasattr(annotation, "__metadata__") or typing.get_origin(annotation) is _FINAL:
            annotation = typing.get_args(annotation)[0]
        else:
            return annotation


def _tuple(converter: Any, cl: Any) -> Any:
    arguments = _arguments(cl, 1)
    if not typing.get_args(cl) or arguments[-1] is Ellipsis:
        array = _array(converter, List[arguments[0]])  # type: ignore[valid-type]
        return lambda value, cl: tuple(array(value, cl))
    hooks = [_hook_of(converter, one) for one in arguments]

    def structure(value: Any, cl: Any) -> Any:
        if not isinstance(value, list):
            raise expected("an array", value)
        if len(value) != len(hooks):
            raise Mismatch([((), f"expected an array of {len(hooks)}, got one of {len(value)}")])
        return tuple(_each(enumerate(zip(hooks, value)), lambda pair: pair[0](pair[1])))

    return structure


def _is_named_tuple(cl: Any) -> bool:
    names = getattr(cl, "_fields", ()) if isinstance(cl, type) and issubclass(cl, tuple) else ()
    return bool(names) and all(name in vars(owner_of(cl, name)).get("__annotations__", {}) for name in names)


def _named_tuple(converter: Any, cl: Any) -> Any:
    array = _tuple(converter, Tuple[tuple(hints_of(cl, cl._fields).values())])
    return lambda value, _: cl(*array(value, cl))


def _mapping(converter: Any, cl: Any) -> Any:
    key_type, value_type = _arguments(cl, 2)
    key_of, value_of = _hook_of(converter, key_type), _hook_of(converter, value_type)
    if key_type in (int, float, bool):
        raise ConfigurationError(f"the keys of an object are strings in JSON, never {_name(key_type)}")

    def structure(value: Any, cl: Any) -> Any:
        if not isinstance(value, dict):
            raise expected("an object", value)
        keys = _each(((key, key) for key in value), key_of)
        return dict(zip(keys, _each(iter(value.items()), value_of)))

    return structure


def _is_typed_dict(cl: Any) -> bool:
    return isinstance(cl, type) and issubclass(cl, dict) and hasattr(cl, "__required_keys__")


def _typed_dict(converter: Any, cl: Any) -> Any:
    cl = origin_of(cl)
    hooks, required = {}, set()
    for name, hint in hints_of(cl, list(cl.__annotations__)).items():
        # Looked at here: where annotations are strings, Python itself takes every key for what __total__ says.
        is_required = name in cl.__required_keys__
        while getattr(origin_of(hint), "_name", None) in ("Required", "NotRequired", "ReadOnly"):
            is_required = {"Required": True, "NotRequired": False}.get(origin_of(hint)._name, is_required)
            hint = typing.get_args(hint)[0]
        hooks[name] = _hook_of(converter, hint)
        if is_required:
            required.add(name)

    def structure(value: Any, cl: Any) -> Any:
        if not isinstance(value, dict):
            raise expected("an object", value)
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
                problems += [((name, *path), problem) for path, problem in problems_of(error)]
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
        tell = _teller(classes)
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
                problems += problems_of(error)
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
    origin = origin_of(annotation)
    return (attrs.has(origin) or dataclasses.is_dataclass(origin)) and not _is_pydantic(annotation)


def _teller(classes: Sequence[Any]) -> Callable[[Any], Any]:
    """What says which of ``classes`` an object is for.

    A field of all of them whose ``Literal`` differs tells them apart; else required fields that the others lack.
    """
    fields = {cl: {field.name: field for field in fields_of(cl)} for cl in classes}
    tags = [_by_tag(name, fields) for name in fields[classes[0]] if all(name in fields[cl] for cl in classes)]
    tellers = [(name, groups) for name, groups in tags if groups]
    if tellers:
        tag, groups = min(tellers, key=lambda one: max(map(len, one[1].values())))
        by_value = {value: _teller(group) if len(group) > 1 else group[0] for value, group in groups.items()}

        def by_tag(value: Any) -> Any:
            found = by_value[type(value[tag]), value[tag]]
            return found if found in fields else found(value)

        return by_tag

    by_field: Dict[str, Any] = {}
    fallback: Any = None
    # Those with most fields first: the later ones have less to be told from.
    for cl in sorted(classes, key=lambda cl: -len(fields[cl])):
        rest: Set[str] = set()
        rest.update(*(fields[one] for one in classes if one is not cl and one not in by_field.values()))
        required = [name for name, field in fields[cl].items() if field.init and field.default is attrs.NOTHING]
        own = next((name for name in required if name not in rest), None)
        if own is not None:
            by_field[own] = cl
        elif fallback is None:
            fallback = cl
        else:
            raise ConfigurationError(
                f"{_name(fallback)} and {_name(cl)} cannot be told apart: give each a required field that the other "
                "lacks, or both a field with different Literals"
            )
    return lambda value: next((cl for name, cl in by_field.items() if name in value), fallback)


def _by_tag(name: str, fields: Dict[Any, Dict[str, attrs.Attribute[Any]]]) -> Tuple[str, Dict[Any, List[Any]]]:
    """The classes for each value of a field; none where it is no ``Literal`` or does not tell them apart."""
    groups: Dict[Any, List[Any]] = {}
    for cl, own in fields.items():
        hint = _bare(own[name].type)
        if origin_of(hint) is not _LITERAL:
            return name, {}
        for value in _literal_values(hint):
            groups.setdefault(value, []).append(cl)
    return name, groups if all(len(group) < len(fields) for group in groups.values()) else {}


def _told(tell: Any, by_class: Dict[Any, Structure], value: Any) -> Any:
    if not isinstance(value, dict):
        raise expected("an object", value)
    try:
        found = tell(value)
    except Exception:  # noqa: BLE001  # Of several kinds, by the way in which the classes are told apart.
        found = None
    if found is None:
        names = " or ".join(_name(one) for one in by_class)
        raise Mismatch([((), f"expected an object with the fields of {names}, got another one")])
    return by_class[found](value)
