"""Describe inputs and results by JSON Schema (draft 2020-12), by the walk over types that builds the inputs.

What a schema accepts may be more than the input accepts: a check in the class's own code has no form in JSON Schema. It
never accepts less. Pydantic describes its own models.
"""

from __future__ import annotations

import datetime as dt
import decimal
import enum
import json
import math
import pathlib
import typing
import uuid
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

import attrs

from . import inputs
from .constraints import bounds_of
from .fields import bare, fields_of, hints_of, origin_of

__all__ = ["input_schema", "output_schema"]

Schema = Dict[str, Any]

#: The kinds whose values, as inputs, are strings, with what is known of their form.
_STRINGS: Dict[Any, Schema] = {
    uuid.UUID: {"type": "string", "format": "uuid"},
    pathlib.PurePath: {"type": "string"},
    dt.time: {"type": "string", "format": "time"},
    dt.datetime: {"type": "string", "format": "date-time"},
    dt.date: {"type": "string", "format": "date"},
}
_SCALARS: Dict[Any, Schema] = {
    bool: {"type": "boolean"},
    int: {"type": "integer"},
    float: {"type": "number"},
    str: {"type": "string"},
    decimal.Decimal: {"type": ["number", "string"]},
    **_STRINGS,
}


def input_schema(annotation: Any) -> Schema:
    """Return the schema of a handler's input. Every input that is accepted validates against it."""
    return _Walk(is_input=True).whole(annotation)


def output_schema(annotation: Any) -> Schema:
    """Return the schema of a handler's result, as far as its annotation says; an empty one accepts everything."""
    return _Walk(is_input=False).whole(annotation)


class _Walk:
    """Walk over one annotation. Classes with a name are collected, and referred to."""

    def __init__(self, *, is_input: bool) -> None:
        self._is_input = is_input
        self._definitions: Dict[str, Schema] = {}
        self._names: Dict[Any, str] = {}
        #: How often each definition is referred to.
        self._uses: Dict[str, int] = {}

    def whole(self, annotation: Any) -> Schema:
        """Return the schema of ``annotation``, with all definitions that it needs."""
        found = self.schema(annotation)
        reference = found.get("$ref", "").rpartition("/")[2] if set(found) == {"$ref"} else ""
        if reference and self._uses.get(reference) == 1:
            found = self._definitions.pop(reference)
        return {**found, **({"$defs": self._definitions} if self._definitions else {})}

    def schema(self, annotation: Any) -> Schema:
        """Return the schema of one annotation."""
        if hasattr(annotation, "__metadata__"):
            return self._constrained(annotation)
        annotation = bare(annotation)
        if hasattr(annotation, "__metadata__"):
            return self._constrained(annotation)
        for fits, make in reversed(inputs.KINDS):
            if fits(annotation):
                return _MAKERS[make](self, annotation)
        origin = origin_of(annotation)
        if not isinstance(origin, type):
            return {}
        if issubclass(origin, enum.Enum):
            return _choice([member.value for member in origin])
        if inputs.is_class(annotation):
            return self._named(annotation, self._fields)
        for kind in origin.__mro__:
            if kind in _SCALARS:
                return dict(_SCALARS[kind]) if self._is_input or kind is not decimal.Decimal else {"type": "string"}
        return {}

    # -- classes --

    def _named(self, annotation: Any, make: Callable[[Any], Schema]) -> Schema:
        name = self._names.get(annotation)
        if name is None:
            plain = getattr(origin_of(annotation), "__name__", "Object")
            name, number = plain, 1
            while name in self._definitions:
                number += 1
                name = f"{plain}{number}"
            self._names[annotation] = name
            # Its place is taken first, because the class may hold itself.
            self._definitions[name] = {}
            self._definitions[name] = make(annotation)
        self._uses[name] = self._uses.get(name, 0) + 1
        return {"$ref": f"#/$defs/{name}"}

    def _fields(self, annotation: Any) -> Schema:
        fields = [field for field in fields_of(annotation) if field.init or not self._is_input]
        required = [field.name for field in fields if field.default is attrs.NOTHING or not self._is_input]
        return self._object(origin_of(annotation), {field.name: field.type for field in fields}, required)

    def _object(self, cl: Any, hints: Mapping[str, Any], required: Sequence[str]) -> Schema:
        found: Schema = {"type": "object", "title": cl.__name__}
        found["properties"] = {name: self.schema(hint) for name, hint in hints.items()}
        if required:
            found["required"] = list(required)
        return found

    def typed_dict(self, annotation: Any) -> Schema:
        def make(annotation: Any) -> Schema:
            hints, required = inputs.keys_of(origin_of(annotation))
            return self._object(origin_of(annotation), hints, [name for name in hints if name in required])

        return self._named(annotation, make)

    def pydantic(self, annotation: Any) -> Schema:
        def make(annotation: Any) -> Schema:
            found = inputs.schema_of_pydantic(annotation, is_input=self._is_input)
            for name, one in found.pop("$defs", {}).items():
                self._definitions.setdefault(name, one)
                self._uses[name] = self._uses.get(name, 0) + 1
            return found

        return self._named(annotation, make)

    # -- the rest --

    def null(self, annotation: Any) -> Schema:
        return {"type": "null"}

    def literal(self, annotation: Any) -> Schema:
        return _choice([one.value if isinstance(one, enum.Enum) else one for one in typing.get_args(annotation)])

    def array(self, annotation: Any) -> Schema:
        return self._array_of(*(typing.get_args(annotation) or (Any,))[:1])

    def tuple(self, annotation: Any) -> Schema:
        arguments = typing.get_args(annotation)
        if not arguments or arguments[-1] is Ellipsis:
            return self._array_of(arguments[0] if arguments else Any)
        return self._row(arguments)

    def named_tuple(self, annotation: Any) -> Schema:
        return self._row(list(hints_of(annotation, annotation._fields).values()))

    def mapping(self, annotation: Any) -> Schema:
        key, value = typing.get_args(annotation) or (Any, Any)
        found: Schema = {"type": "object"}
        keys, values = self.schema(key), self.schema(value)
        if self._is_input and keys not in ({}, {"type": "string"}):
            found["propertyNames"] = keys
        if values:
            found["additionalProperties"] = values
        return found

    def union(self, annotation: Any) -> Schema:
        return {"anyOf": [self.schema(one) for one in typing.get_args(annotation)]}

    def constrained(self, annotation: Any) -> Schema:
        return self._constrained(annotation)

    def _array_of(self, element: Any) -> Schema:
        items = self.schema(element)
        return {"type": "array", **({"items": items} if items else {})}

    def _row(self, elements: Sequence[Any]) -> Schema:
        count = len(elements)
        items = [self.schema(one) for one in elements]
        return {"type": "array", "prefixItems": items, "minItems": count, "maxItems": count}

    def _constrained(self, annotation: Any) -> Schema:
        target = annotation.__origin__
        found = self.schema(target)
        for key, bound in bounds_of(annotation) if self._is_input else ():
            for name, value in _keywords(key, bound, target):
                if name in found or "$ref" in found:
                    # Two bounds of one kind both hold.
                    found = {"allOf": [found, {name: value}]}
                else:
                    found = {**found, name: value}
        return found


def _choice(values: Sequence[Any]) -> Schema:
    plain: List[Any] = []
    for one in values:
        try:
            plain.append(json.loads(json.dumps(one, allow_nan=False)))
        except (TypeError, ValueError, RecursionError):
            # No JSON is equal to it.
            continue
    return {"enum": plain}


_ORDERS = {"gt": "exclusiveMinimum", "ge": "minimum", "lt": "exclusiveMaximum", "le": "maximum"}


def _keywords(key: str, bound: Any, target: Any) -> List[Tuple[str, Any]]:
    """Return the keywords for one bound. Return none if JSON Schema would refuse what the bound accepts."""
    kinds = _kinds(target)
    if kinds is None or isinstance(bound, bool) or not isinstance(bound, (int, float)) or not math.isfinite(bound):
        return []
    if key in _ORDERS:
        return [(_ORDERS[key], bound)]
    if key == "multiple_of":
        # With parts, the two disagree on what is close enough.
        return [("multipleOf", abs(bound))] if kinds <= {int} and isinstance(bound, int) else []
    side = key[:3]
    found = [(f"{side}Length", bound)]
    # A set is counted without what its array repeats, and a TypedDict without unknown keys.
    if side == "min" or not any(isinstance(one, type) and issubclass(one, inputs.SETS) for one in kinds):
        found.append((f"{side}Items", bound))
    if side == "min" or not any(hasattr(one, "__required_keys__") for one in kinds):
        found.append((f"{side}Properties", bound))
    return found


def _kinds(annotation: Any) -> Optional[typing.Set[Any]]:
    """Return the classes that a value of ``annotation`` may be built of, None if that is not known."""
    annotation = bare(annotation)
    if inputs.is_union(annotation):
        found: typing.Set[Any] = set()
        for one in typing.get_args(annotation):
            inner = _kinds(one)
            if inner is None:
                return None
            found |= inner
        return found
    origin = origin_of(annotation)
    return {origin} if isinstance(origin, type) else None


#: What makes the structure of a kind of annotation → what makes its schema.
_MAKERS: Dict[Any, Callable[[_Walk, Any], Schema]] = {
    inputs.make_typed_dict: _Walk.typed_dict,
    inputs.make_constrained: _Walk.constrained,
    inputs.make_null: _Walk.null,
    inputs.make_literal: _Walk.literal,
    inputs.make_array: _Walk.array,
    inputs.make_set: _Walk.array,
    inputs.make_tuple: _Walk.tuple,
    inputs.make_named_tuple: _Walk.named_tuple,
    inputs.make_mapping: _Walk.mapping,
    inputs.make_union: _Walk.union,
    inputs.make_pydantic: _Walk.pydantic,
}
