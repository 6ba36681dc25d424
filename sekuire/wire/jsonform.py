"""Turn results that JSON lacks into JSON, and say where one has no JSON form.

Accepted are classes with fields, dates, UUIDs, enums, decimals, sets, numbers, dates and arrays of numpy, and the times
of pandas. None of the packages named here is imported: where nothing has loaded it, no value is of its classes.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import decimal
import enum
import inspect
import json
import math
import pathlib
import sys
import uuid
from collections.abc import Mapping
from typing import Any, Callable, FrozenSet, Optional

import attrs

_TEXTS = (uuid.UUID, decimal.Decimal, pathlib.PurePath)
_TIMES = (dt.date, dt.time)  # A datetime is a date.
_ARRAYS = (list, tuple, set, frozenset)

#: Characters of a key or of a path in the description of a problem.
_MAX_KEY, _MAX_PATH = 60, 300


#: Returns what to send in place of a value without a JSON form, or raises TypeError.
Encoder = Callable[[Any], Any]


def to_json(value: Any, encoder: Optional[Encoder] = None) -> Any:
    """Return ``value`` with everything replaced that JSON lacks, keys of mappings included.

    An instance of an attrs class or a dataclass becomes an object of its fields. A pydantic model becomes what
    ``model_dump(mode="json", by_alias=True)`` returns, and an enum's member its value. A date or time becomes its
    ISO 8601 text; a UUID, a ``Decimal`` or a path becomes its text. A set becomes an array without an order. A number
    of numpy becomes a number, its date a text and its array an array. A missing value of numpy or pandas (``NaT``,
    ``NA``) becomes null.

    :param encoder: asked for values that have none of these forms. What it returns is replaced likewise.
    :raises TypeError: a value has none of these forms, and ``encoder`` does not know it either.
    """
    if _is_plain(value):
        return value
    if isinstance(value, Mapping):
        return {_key(key): to_json(one, encoder) for key, one in value.items()}
    if isinstance(value, _ARRAYS):
        return [to_json(one, encoder) for one in value]
    return to_json(_replaced(value, encoder), encoder)


def problem_of(value: Any, path: str, encoder: Optional[Encoder] = None) -> Optional[str]:
    """Return where ``value`` has no JSON form and what to do, such as ``output.rows[0].when is bytes; ...``.

    None if it has one. It is for a value that an encoder has refused, and takes longer than that encoder did.
    """
    try:
        return _problem_of(value, path, frozenset(), encoder)
    except RecursionError:
        return f"{path} is nested too deep"


def _is_plain(value: Any) -> bool:
    return value is None or (isinstance(value, (str, int, float)) and not isinstance(value, enum.Enum))


def _replaced(value: Any, encoder: Optional[Encoder]) -> Any:
    """Return ``value`` with its own class replaced, by ``encoder`` if it has no form of ours."""
    try:
        return _simpler(value)
    except _NoForm:
        if encoder is None:
            raise
    return encoder(value)


class _NoForm(TypeError):
    """Report an object that has no JSON form of ours."""


def _simpler(value: Any) -> Any:
    """Return ``value`` with its own class replaced; what it holds is not replaced yet."""
    if isinstance(value, enum.Enum):
        return value.value
    pandas: Any = sys.modules.get("pandas")
    if pandas is not None and any(value is getattr(pandas, name, pandas) for name in ("NaT", "NA")):
        return None
    if isinstance(value, _TIMES):
        return value.isoformat()
    if isinstance(value, _TEXTS):
        return str(value)
    kind = type(value)
    if hasattr(kind, "__pydantic_serializer__") and hasattr(kind, "model_dump"):
        return value.model_dump(mode="json", by_alias=True)
    if attrs.has(kind):
        return {field.name: getattr(value, field.name) for field in attrs.fields(kind)}
    if dataclasses.is_dataclass(kind):  # A class itself has no form, as it holds no values.
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, (numpy.generic, numpy.ndarray)):
        simpler = _of_numpy(numpy, value)
        if not isinstance(simpler, (numpy.generic, numpy.ndarray)):  # A longdouble stays what it is.
            return simpler
    raise _NoForm(f"an object of type {kind.__name__} has no JSON form")


def _of_numpy(numpy: Any, value: Any) -> Any:
    """Return a number or a date of numpy as Python's, and an array as a list."""
    if value.dtype.kind == "M" and value.ndim:
        return [one if one is None else _of_numpy(numpy, one) for one in value]
    simpler = value.tolist()
    if value.dtype.kind == "M" and isinstance(simpler, int):
        # Nanoseconds, which Python's classes lack, or a year that they lack: numpy returns a bare number.
        short = value.astype("datetime64[us]")
        return short.tolist() if short == value and not isinstance(short.tolist(), int) else str(value)
    return value if value.dtype.kind == "m" else simpler


def _key(key: Any) -> Any:
    if _is_plain(key):
        return key
    if isinstance(key, (enum.Enum, *_TIMES, *_TEXTS)):
        return to_json(key)
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None and isinstance(key, numpy.generic):
        return _key(_simpler(key))
    raise TypeError(f"a key of type {type(key).__name__} has no JSON form")


# -- where a value has no JSON form -----------------------------------------------------------------------------------


def _problem_of(value: Any, path: str, around: FrozenSet[int], encoder: Optional[Encoder]) -> Optional[str]:
    if _is_plain(value):
        return _problem_of_plain(value, path)
    if id(value) in around:
        return f"{path} contains itself"
    around |= {id(value)}
    if isinstance(value, Mapping):
        for key, one in value.items():
            problem = _problem_of_key(key, path) or _problem_of(one, path + _step(key), around, encoder)
            if problem:
                return problem
        return None
    if isinstance(value, _ARRAYS):
        for index, one in enumerate(value):
            problem = _problem_of(one, f"{path}[{index}]", around, encoder)
            if problem:
                return problem
        return None
    try:
        simpler = _simpler(value)
    except Exception as error:  # noqa: BLE001  # A model's own code runs here.
        if not isinstance(error, _NoForm):
            return f"{_cut(path)}, a {type(value).__name__}, cannot be turned into JSON ({type(error).__name__})"
        return _problem_of_unknown(value, path, around, encoder)
    return _problem_of(simpler, path, around, encoder)


def _problem_of_unknown(value: Any, path: str, around: FrozenSet[int], encoder: Optional[Encoder]) -> Optional[str]:
    """Return what is wrong with a value for which the user's encoder is asked."""
    problem = f"{_cut(path)} is {_kind_of(value)}"
    if encoder is None:
        return problem
    try:
        replaced = encoder(value)
    except TypeError:
        return f"{problem} (result_encoder does not know it)"
    except Exception as error:  # noqa: BLE001  # The user's own code.
        return f"{_cut(path)}, a {type(value).__name__}: result_encoder raised {type(error).__name__}"
    if replaced is value:
        return f"{_cut(path)}, a {type(value).__name__}: result_encoder returned it unchanged"
    return _problem_of(replaced, path, around, encoder)


def _problem_of_plain(value: Any, path: str) -> Optional[str]:
    if isinstance(value, float) and not math.isfinite(value):
        return f"{_cut(path)} is {float.__repr__(value)}, which JSON lacks; return None or a text in its place"
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return f"{_cut(path)} is a text with a lone surrogate; decode it with errors='replace'"
    except ValueError:
        return f"{_cut(path)} is an integer with too many digits; return it as a text in another base"
    return None


def _problem_of_key(key: Any, path: str) -> Optional[str]:
    try:
        plain = _key(key)
    except Exception:  # noqa: BLE001
        return f"{_cut(path)} has a key of type {type(key).__name__}; use texts as keys"
    problem = _problem_of_plain(plain, "")
    return None if problem is None else f"{_cut(path)} has a key that {problem.strip()}"


def _kind_of(value: Any) -> str:
    """Name the kind of a value without a JSON form, and say what to do. The value itself is not shown."""
    kind = type(value)
    hint = _hint(value)
    if hint:
        return f"a {kind.__name__}; return {hint}"
    if isinstance(value, type):
        name = value.__name__
        return f"the class {name} itself, not an instance of it; return {name}(...)"
    if isinstance(value, (bytes, bytearray, memoryview)):
        return f"{kind.__name__}; decode it, or return base64.b64encode(value).decode()"
    if inspect.iscoroutine(value):
        return "a coroutine that nothing awaits; return its awaited value"
    if inspect.isgenerator(value) or inspect.isasyncgen(value) or hasattr(kind, "__next__"):
        return f"a {kind.__name__}, which is read only once; return list(...) of it"
    if inspect.isroutine(value):
        return "a function; return what it returns"
    return f"of type {kind.__name__}; return dicts, lists, texts, numbers or instances of classes with fields"


#: Classes of other packages, and what a handler returns in their place: module, names, advice.
_HINTS = (
    ("datetime", ("timedelta",), "value.total_seconds()"),
    ("django.db.models", ("Model",), "django.forms.models.model_to_dict(value), or a dict of the fields you want"),
    ("django.db.models", ("QuerySet",), "list(value.values(...)) with the fields you want"),
    ("pandas", ("DataFrame",), "value.to_dict('records')"),
    ("pandas", ("Series", "Index"), "value.tolist()"),
)


def _hint(value: Any) -> str:
    """Return what to return in place of an object of a well-known package, or nothing."""
    for module, names, advice in _HINTS:
        classes = [getattr(sys.modules.get(module), name, None) for name in names]
        if any(isinstance(one, type) and isinstance(value, one) for one in classes):
            return advice
    return ""


def _step(key: Any) -> str:
    text = str(key)
    if isinstance(key, str) and text.isidentifier() and len(text) <= _MAX_KEY:
        return f".{text}"
    return f"[{text[:_MAX_KEY]!r}]" if isinstance(key, str) else f"[{text[:_MAX_KEY]}]"


def _cut(path: str) -> str:
    return path if len(path) <= _MAX_PATH else f"{path[:_MAX_PATH]}..."
