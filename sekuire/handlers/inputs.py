"""Build a handler's input from JSON for its annotation: cattrs builds classes, pydantic builds its own models.

Both, and this module, are imported when the first handler needs them. The choice between them is made when a handler
is registered.
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
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Set, Tuple, Union

import attrs

from ..errors import ConfigurationError
from ..wire import protocol
from .constraints import ConstraintError, constrained, is_field_of_pydantic
from .fields import bare, bound_of, fields_of, hints_of, origin_of, owner_of
from .mismatch import MAX_PROBLEMS, MAX_TEXT, Mismatch, Path, expected, kind_of, problems_of

__all__ = ["structure_of"]

#: Build a value from JSON, or raise :class:`Mismatch`.
Structure = Callable[[Any], Any]

#: Readings of the path of one of pydantic's errors that are followed at once.
_MAX_READINGS = 20

_MAPPINGS = (dict, collections.abc.Mapping, collections.abc.MutableMapping)
_LISTS = (
    list, collections.abc.Sequence, collections.abc.MutableSequence, collections.abc.Collection,
    collections.abc.Iterable,
)  # fmt: skip
SETS = (set, frozenset, collections.abc.Set, collections.abc.MutableSet)
_LITERAL: Any = typing.Literal
UNIONS = (Union, getattr(types, "UnionType", Union))
#: Stand for a field that an object does not have.
_MISSING: Any = object()


def structure_of(annotation: Any) -> Structure:
    """Return the function that builds an input of this (resolved) annotation.

    :raises ConfigurationError: it cannot be built, or needs an extra that is not installed.
    """
    problem = ""
    try:
        if _is_pydantic(annotation):
            return functools.partial(_call, _pydantic(annotation))
        return functools.partial(_call, _hook_of(_converter(), annotation))
    except ConfigurationError as error:
        problem = error.problem
    except Exception as error:  # noqa: BLE001
        problem = f"{type(error).__name__}: {error}"
    # The converter may hold hooks that refer to the one that was not made.
    _converter.cache_clear()
    raise ConfigurationError(f"{_name(annotation)} cannot be built from JSON: {problem}")


def _call(hook: Structure, value: Any) -> Any:
    problems: List[Tuple[Path, str]]
    try:
        return hook(value)
    except Exception as error:  # noqa: BLE001  # Of cattrs, or of the class's own code.
        problems = list(problems_of(error))
    # Raised after `except`: the library's error, as its context, would keep the input in its frames.
    raise Mismatch(problems)


def _is_pydantic(annotation: Any) -> bool:
    return isinstance(annotation, type) and hasattr(annotation, "__pydantic_validator__")


def _name(annotation: Any) -> str:
    return annotation.__qualname__ if isinstance(annotation, type) else str(annotation)


# -- pydantic ---------------------------------------------------------------------------------------------------------


#: Type of pydantic's error → a text that quotes nothing, for those whose own text quotes the input.
SAFE_TEXTS = {
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


def _pydantic(cls: Any) -> Structure:
    """Return a function that lets pydantic build one of its models or dataclasses."""
    from pydantic import TypeAdapter, ValidationError

    adapter = TypeAdapter(cls)
    config = getattr(cls, "model_config", None) or getattr(cls, "__pydantic_config__", None) or {}
    # A strict model accepts a date in JSON, but not as a str of Python.
    is_strict = bool(config.get("strict"))

    def structure(value: Any) -> Any:
        try:
            if is_strict:
                return adapter.validate_json(json.dumps(value))
            return adapter.validate_python(value)
        except ValidationError as error:
            problems = [(_path_in(value, one), _text_of(one)[:MAX_TEXT]) for one in error.errors()]
        raise Mismatch(list(dict.fromkeys(problems)))

    return structure


def schema_of_pydantic(cls: Any, *, is_input: bool) -> Dict[str, Any]:
    """Return pydantic's own JSON Schema of one of its models or dataclasses."""
    from pydantic import TypeAdapter

    mode: Any = "validation" if is_input else "serialization"
    return TypeAdapter(cls).json_schema(mode=mode)


def _text_of(error: Any) -> str:
    context = error.get("ctx", {})
    if error["type"] in SAFE_TEXTS:
        return SAFE_TEXTS[error["type"]].format_map(context)
    text: str = error["msg"]
    if error["type"] == "value_error":
        raised = context.get("error")
        if "reason" in context:
            # The error of an email address, which the reason quotes.
            return text.partition(":")[0]
        if isinstance(raised, Exception) and raised.__traceback__ is None:
            # The error of a builtin that is used as a check, such as int. Its text quotes the value.
            return f"is refused ({type(raised).__name__})"
    return text


def _path_in(value: Any, error: Any) -> Path:
    """Return the path of pydantic's error in ``value``, without the names of a union's members."""
    location, target = error["loc"], error["input"]
    missing: Path = ()
    if error["type"].startswith("missing"):
        location, missing = location[:-1], location[-1:]
    # Follow each reading: a name may be a key in one place, and a member of a union in another.
    readings: List[Tuple[Any, Path]] = [(value, ())]
    for one in location:
        following: List[Tuple[Any, Path]] = []
        for inner, path in readings:
            if one in inner if isinstance(inner, dict) else _is_index(one, inner):
                following.append((inner[one], (*path, one)))
            following.append((inner, path))
        readings = following[:_MAX_READINGS]
    fitting = (
        [path for inner, path in readings if inner is target]
        # The input of a strict model was read from text: its objects are equal, not the same.
        or [path for inner, path in readings if type(inner) is type(target) and inner == target]
        or [max((path for _, path in readings), key=len)]
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
        """Build classes as cattrs does, and values without any conversion."""

        def gen_structure_attrs_fromdict(self, cl: Any) -> Any:
            return _object(self, cl)

        def get_structure_hook(self, type: Any, cache_result: bool = True) -> Any:
            if type is bytes:
                # The hook of cattrs would make bytes of anything.
                return _unsupported(type)
            made = being_made.__dict__.setdefault("types", set())
            if type in made:
                # The type holds itself. Its hook is looked up when there is a value to build.
                return lambda value, cl: self.get_structure_hook(type)(value, type)
            made.add(type)
            try:
                return super().get_structure_hook(type, cache_result)
            finally:
                made.discard(type)

    converter = StrictConverter(structure_fallback_factory=_unsupported)
    for kind, structure in _SCALARS.items():
        converter.register_structure_hook(kind, structure)
    converter.register_structure_hook(enum.Enum, lambda value, cl: _enum(cl)(value))
    for predicate, make in KINDS:
        converter.register_structure_hook_factory(predicate, functools.partial(_without_type, converter, make))
    return converter


def _without_type(converter: Any, make: Callable[[Any, Any], Structure], cl: Any) -> Any:
    """Return a structure as a hook of cattrs, which is called with a type that the structure does not need."""
    structure = make(converter, cl)
    hook: Any = lambda value, cl: structure(value)  # noqa: E731
    hook.structure = structure
    return hook


def _hook_of(converter: Any, annotation: Any) -> Structure:
    hook = converter.get_structure_hook(annotation)
    structure: Optional[Structure] = getattr(hook, "structure", None)
    return structure or (lambda value: hook(value, annotation))


def _unsupported(cl: Any) -> Any:
    raise ConfigurationError(
        f"{_name(cl)} has no form in JSON; use attrs classes, dataclasses, TypedDicts, pydantic models, str, int, "
        "float, bool, None, datetime, date, time, UUID, Decimal, Path, enums, Literal, and lists, sets, tuples, "
        "mappings and unions of these"
    )


def _object(converter: Any, cl: Any) -> Any:
    """Return cattrs' hook for an attrs class or a dataclass."""
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
    for field in fields:
        if is_field_of_pydantic(field.default):
            raise ConfigurationError(
                f"Field(...) of {_name(origin)}.{field.name} has no effect as a default outside of a pydantic model; "
                "write Annotated[..., Field(...)], or use a pydantic dataclass"
            )
    variables = {one.__name__: value for one, value in bound_of(cl)[origin].items()}
    _check_constraints(converter, origin, {field.name: field.type for field in fields if field.init})
    hook: Any = make_dict_structure_fn_from_attrs(fields, origin, converter, variables)

    def structure(value: Any, cl: Any = cl) -> Any:
        return hook(_checked(value, dict, "an object"), cl)

    return structure


def _check_constraints(converter: Any, owner: Any, hints: Dict[str, Any]) -> None:
    """Name the field in the error about a constraint that cannot be checked."""
    for name, hint in hints.items():
        try:
            converter.get_structure_hook(hint)
            continue
        except ConstraintError as error:
            problem = error.problem
        except Exception:  # noqa: BLE001  # It is raised again when the class is built.
            continue
        raise ConfigurationError(f"{_name(owner)}.{name}: {problem}")


def _demanded(cl: Any) -> List[str]:
    """Return the names of the arguments that a call of ``cl`` needs, as far as its signature says."""
    try:
        parameters = inspect.signature(cl).parameters.values()
    except (TypeError, ValueError):
        return []
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [one.name for one in parameters if one.default is one.empty and one.kind in kinds]


# -- the kinds of annotations -----------------------------------------------------------------------------------------


def _checked(value: Any, kind: type, what: str) -> Any:
    if not isinstance(value, kind):
        raise expected(what, value)
    return value


def _scalar(what: str, kinds: Tuple[type, ...], build: Optional[Callable[[Any], Any]] = None) -> Any:
    def structure(value: Any, cl: Any) -> Any:
        if isinstance(cl, type) and issubclass(cl, enum.Enum):
            return _enum(cl)(value)
        if not isinstance(value, kinds) or isinstance(value, bool) is not (bool in kinds):
            raise expected(what, value)
        try:
            built = value if build is None else build(value)
        except (ValueError, ArithmeticError):
            built = None
        if built is None:
            raise Mismatch([((), f"expected {what}, got {_another(value)}")])
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


def _another(value: Any) -> str:
    kind = kind_of(value)
    return f"another {kind.split(' ', 1)[1]}" if kind.startswith("a") else kind


def make_null(converter: Any, cl: Any) -> Structure:
    return lambda value: _checked(value, type(None), "null")


@functools.cache
def _enum(cl: Any) -> Structure:
    return _choice([(member.value, member) for member in cl])


def make_literal(converter: Any, cl: Any) -> Structure:
    return _choice([(_json_of(one), one) for one in typing.get_args(cl)])


def _json_of(one: Any) -> Any:
    return one.value if isinstance(one, enum.Enum) else one


def _choice(choices: List[Tuple[Any, Any]]) -> Structure:
    """Return a function that returns the member of an enum or a ``Literal`` for a JSON value."""
    # By type and value: True equals 1.
    found = {(type(plain), plain): one for plain, one in choices}
    wanted = f"one of {', '.join(json.dumps(plain, default=str) for plain, _ in choices)}"

    def structure(value: Any) -> Any:
        try:
            return found[type(value), value]
        except (KeyError, TypeError):
            pass
        raise Mismatch([((), f"expected {wanted}, got {_another(value)}")])

    return structure


def _each(pairs: Iterator[Tuple[Union[str, int], Any]], hook: Structure) -> List[Any]:
    """Return what ``hook`` builds of each value. The keys of ``pairs`` are the values' places in the path.

    It ends at the tenth problem, where cattrs would keep an error for each of a million wrong elements.
    """
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


def make_array(converter: Any, cl: Any) -> Structure:
    hook = _hook_of(converter, _arguments(cl, 1)[0])
    return lambda value: _each(enumerate(_checked(value, list, "an array")), hook)


def make_set(converter: Any, cl: Any) -> Structure:
    array = make_array(converter, cl)
    element = _unhashable(_arguments(cl, 1)[0])
    if element is not None:
        raise ConfigurationError(f"a set cannot hold {_name(element)}, which is not hashable")
    make: Any = frozenset if origin_of(cl) in (frozenset, collections.abc.Set) else set
    return lambda value: make(array(value))


def _unhashable(annotation: Any) -> Any:
    """Return the part of ``annotation`` that a set cannot hold, None if it can hold all."""
    annotation = bare(annotation)
    origin = origin_of(annotation)
    if origin is tuple or origin in UNIONS:
        return next((one for one in map(_unhashable, typing.get_args(annotation)) if one is not None), None)
    has_no_hash = isinstance(origin, type) and getattr(origin, "__hash__", None) is None
    # Lists are built for abstract sequences, which have a hash, and frozensets for abstract sets, which have none.
    return annotation if origin in _LISTS or (has_no_hash and origin is not collections.abc.Set) else None


def make_tuple(converter: Any, cl: Any) -> Structure:
    arguments = _arguments(cl, 1)
    if not typing.get_args(cl) or arguments[-1] is Ellipsis:
        array = make_array(converter, List[arguments[0]])  # type: ignore[valid-type]
        return lambda value: tuple(array(value))
    hooks = [_hook_of(converter, one) for one in arguments]

    def structure(value: Any) -> Any:
        if len(_checked(value, list, "an array")) != len(hooks):
            raise Mismatch([((), f"expected an array of {len(hooks)}, got one of {len(value)}")])
        return tuple(_each(enumerate(zip(hooks, value)), lambda pair: pair[0](pair[1])))

    return structure


def _is_named_tuple(cl: Any) -> bool:
    names = getattr(cl, "_fields", ()) if isinstance(cl, type) and issubclass(cl, tuple) else ()
    return bool(names) and all(name in vars(owner_of(cl, name)).get("__annotations__", {}) for name in names)


def make_named_tuple(converter: Any, cl: Any) -> Structure:
    hints = hints_of(cl, cl._fields)
    _check_constraints(converter, cl, hints)
    array = make_tuple(converter, Tuple[tuple(hints.values())])
    return lambda value: cl(*array(value))


def make_mapping(converter: Any, cl: Any) -> Structure:
    key_type, value_type = _arguments(cl, 2)
    key_of, value_of = _hook_of(converter, key_type), _hook_of(converter, value_type)
    if bare(key_type) in (int, float, bool):
        raise ConfigurationError(f"the keys of an object are strings in JSON, never {_name(bare(key_type))}")

    def structure(value: Any) -> Any:
        keys = _each(((key, key) for key in _checked(value, dict, "an object")), key_of)
        return dict(zip(keys, _each(iter(value.items()), value_of)))

    return structure


def _is_typed_dict(cl: Any) -> bool:
    return isinstance(cl, type) and issubclass(cl, dict) and hasattr(cl, "__required_keys__")


def _qualifier_of(hint: Any) -> str:
    return str(getattr(origin_of(hint), "_name", ""))


def keys_of(cl: Any) -> Tuple[Dict[str, Any], Set[str]]:
    """Return the types of a TypedDict's keys, and the keys that it requires."""
    hints, required = hints_of(cl, list(cl.__annotations__)), set(cl.__required_keys__)
    for name, hint in hints.items():
        # Read here: where annotations are strings, Python itself decides for every key by __total__.
        while _qualifier_of(hint) in ("Required", "NotRequired", "ReadOnly"):
            if _qualifier_of(hint) == "Required":
                required.add(name)
            elif _qualifier_of(hint) == "NotRequired":
                required.discard(name)
            hint = hints[name] = typing.get_args(hint)[0]
    return hints, required


def make_typed_dict(converter: Any, cl: Any) -> Structure:
    cl = origin_of(cl)
    hints, required = keys_of(cl)
    _check_constraints(converter, cl, hints)
    hooks = {name: _hook_of(converter, hint) for name, hint in hints.items()}

    def field(pair: Tuple[Structure, Any]) -> Any:
        if pair[1] is _MISSING:
            raise Mismatch([((), "is missing")])
        return pair[0](pair[1])

    def structure(value: Any) -> Any:
        _checked(value, dict, "an object")
        names = [name for name in hooks if name in value or name in required]
        return dict(zip(names, _each(((one, (hooks[one], value.get(one, _MISSING))) for one in names), field)))

    return structure


def make_union(converter: Any, cl: Any) -> Structure:
    members = typing.get_args(cl)
    others = [one for one in members if one is not type(None)]
    classes = [one for one in others if is_class(one)]
    hooks: List[Structure] = []
    if len(classes) > 1:
        hooks.append(_one_class_of(_chooser(classes), {one: _hook_of(converter, one) for one in classes}))
        others = [one for one in others if one not in classes]
    hooks += [_hook_of(converter, one) for one in others]

    def structure(value: Any) -> Any:
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
    """Join the problems of a union's members into one, if none of them got beyond the value's kind."""
    wanted, got = [], set()
    for path, problem in problems:
        expected, comma, rest = problem.partition(", got ")
        if path or not comma or not expected.startswith("expected "):
            return [one for one in problems if one[0]] or problems
        wanted.append(expected[len("expected ") :])
        got.add(rest)
    return [((), f"expected {' or '.join(dict.fromkeys(wanted))}, got {min(got, key=len)}")]


def is_class(annotation: Any) -> bool:
    origin = origin_of(annotation)
    return (attrs.has(origin) or dataclasses.is_dataclass(origin)) and not _is_pydantic(annotation)


def _chooser(classes: Sequence[Any]) -> Callable[[Any], Any]:
    """Return a function that chooses one of ``classes`` for an object.

    A field that all of them have, with different ``Literal`` values, decides. Without one, required fields decide that
    the other classes lack. cattrs can do it as well, but decides some unions only when there is a value to build.
    """
    fields = {cl: {field.name: field for field in fields_of(cl)} for cl in classes}
    tags = [(name, _by_tag(name, fields)) for name in fields[classes[0]] if all(name in fields[cl] for cl in classes)]
    usable = [(name, groups) for name, groups in tags if groups]
    if usable:
        tag, groups = min(usable, key=lambda one: max(map(len, one[1].values())))
        by_value = {value: _chooser(group) if len(group) > 1 else group[0] for value, group in groups.items()}

        def choose(value: Any) -> Any:
            found = by_value[type(value[tag]), value[tag]]
            return found if found in fields else found(value)

        return choose

    by_field: Dict[str, Any] = {}
    fallback: Any = None
    # Classes with most fields first: the later ones have fewer others to differ from.
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


def _by_tag(name: str, fields: Dict[Any, Dict[str, attrs.Attribute[Any]]]) -> Dict[Any, List[Any]]:
    """Return the classes for each ``Literal`` value of a field. Return none if the field does not decide."""
    groups: Dict[Any, List[Any]] = {}
    for cl, own in fields.items():
        hint = bare(own[name].type)
        if origin_of(hint) is not _LITERAL:
            return {}
        for plain in map(_json_of, typing.get_args(hint)):
            groups.setdefault((type(plain), plain), []).append(cl)
    return groups if all(len(group) < len(fields) for group in groups.values()) else {}


def _one_class_of(choose: Callable[[Any], Any], by_class: Dict[Any, Structure]) -> Structure:
    def structure(value: Any) -> Any:
        _checked(value, dict, "an object")
        try:
            found = choose(value)
        except Exception:  # noqa: BLE001  # The field that decides is missing, or has another value.
            found = None
        if found is None:
            names = " or ".join(_name(one) for one in by_class)
            raise Mismatch([((), f"expected an object with the fields of {names}, got another one")])
        return by_class[found](value)

    return structure


def make_constrained(converter: Any, cl: Any) -> Structure:
    return constrained(cl, _hook_of(converter, cl.__origin__))


def make_pydantic(converter: Any, cl: Any) -> Structure:
    return _pydantic(cl)


def is_union(annotation: Any) -> bool:
    """Return True for ``Union[...]`` and ``A | B``."""
    return typing.get_origin(annotation) in UNIONS


#: Which annotations are of a kind, and what makes their structure. The last one that fits counts.
KINDS: Tuple[Tuple[Callable[[Any], bool], Callable[[Any, Any], Structure]], ...] = (
    (lambda cl: _is_typed_dict(origin_of(cl)), make_typed_dict),
    (lambda cl: hasattr(cl, "__metadata__"), make_constrained),
    (lambda cl: cl in (None, type(None)), make_null),
    (lambda cl: origin_of(cl) is _LITERAL, make_literal),
    (lambda cl: origin_of(cl) in _LISTS, make_array),
    (lambda cl: origin_of(cl) in SETS, make_set),
    (lambda cl: origin_of(cl) is tuple, make_tuple),
    (_is_named_tuple, make_named_tuple),
    (lambda cl: origin_of(cl) in _MAPPINGS, make_mapping),
    (is_union, make_union),
    (_is_pydantic, make_pydantic),
)
