"""Turn results that JSON lacks into JSON: classes, dates, UUIDs, enums, decimals, sets."""

from __future__ import annotations

import dataclasses
import datetime as dt
import decimal
import enum
import pathlib
import uuid
from collections.abc import Mapping
from typing import Any

import attrs

_TEXTS = (uuid.UUID, decimal.Decimal, pathlib.PurePath)
_TIMES = (dt.date, dt.time)  # A datetime is a date.


def to_json(value: Any) -> Any:
    """Return ``value`` with everything replaced that JSON lacks, keys of mappings included.

    An instance of an attrs class or a dataclass becomes an object of its fields. A pydantic model becomes what
    ``model_dump(mode="json", by_alias=True)`` returns, and an enum's member its value. A date or time becomes its
    ISO 8601 text; a UUID, a ``Decimal`` or a path becomes its text. A set becomes an array without an order.

    :raises TypeError: a value has none of these forms.
    """
    if value is None or (isinstance(value, (str, int, float)) and not isinstance(value, enum.Enum)):
        return value
    if isinstance(value, Mapping):
        return {_key(key): to_json(one) for key, one in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [to_json(one) for one in value]
    if isinstance(value, enum.Enum):
        return to_json(value.value)
    if isinstance(value, _TIMES):
        return value.isoformat()
    if isinstance(value, _TEXTS):
        return str(value)
    kind = type(value)
    if hasattr(kind, "__pydantic_serializer__") and hasattr(kind, "model_dump"):
        return value.model_dump(mode="json", by_alias=True)
    if attrs.has(kind):
        return {field.name: to_json(getattr(value, field.name)) for field in attrs.fields(kind)}
    if dataclasses.is_dataclass(kind):  # A class itself has no form, as it holds no values.
        return {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    raise TypeError(f"an object of type {kind.__name__} has no JSON form")


def _key(key: Any) -> Any:
    if key is None or (isinstance(key, (str, int, float)) and not isinstance(key, enum.Enum)):
        return key
    if isinstance(key, (enum.Enum, *_TIMES, *_TEXTS)):
        return to_json(key)
    raise TypeError(f"a key of type {type(key).__name__} has no JSON form")
