"""Write JSON in the one form that RFC 8785 (JSON Canonicalization Scheme) gives each value.

It needs no package, so that every worker can compute the digest of an approval. The policy package has its own, which
tells a user where in a policy the wrong value stands.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from json import JSONEncoder
from typing import Any, Callable, List

__all__ = ["MAX_DEPTH", "NotCanonical", "canonical_json", "number_form"]

#: How deep a value may be nested.
MAX_DEPTH = 64
#: Largest integer that every reader of JSON reads exactly.
_MAX_INTEGER = 2**53 - 1

# The standard library escapes exactly what the RFC does (section 3.2.2.2), in the same way.
_quote: Callable[[str], str] = JSONEncoder(ensure_ascii=False).encode


class NotCanonical(ValueError):
    """Report a value that has no canonical form. The text names its kind, and never the value itself."""


def canonical_json(value: Any) -> bytes:
    """Return ``value`` in the form of RFC 8785, as UTF-8. ::

        canonical_json({"b": 1.0, "a": [True, None]})  # b'{"a":[true,null],"b":1}'

    :raises NotCanonical: it holds a number that is not finite, an integer beyond 2**53 - 1, a lone surrogate, a key
        that is not a string, a type that JSON lacks, or more than 64 levels.
    """
    parts: List[str] = []
    _write(value, parts.append, 0)
    return "".join(parts).encode()


def number_form(number: float) -> str:
    """Return a finite number as ECMAScript writes it (section 3.2.2.3 of the RFC)."""
    if number == 0:
        return "0"  # -0.0 too.
    # Both languages write the shortest digits that give this number again, and differ in where they put the point.
    mantissa, _, power = float.__repr__(abs(number)).partition("e")
    whole, _, fraction = mantissa.partition(".")
    digits = whole + fraction
    # The number is 0.DIGITS times ten to the power of `point`.
    point = len(whole) + int(power or 0)
    significant = digits.lstrip("0")
    point -= len(digits) - len(significant)
    significant = significant.rstrip("0")
    length = len(significant)
    if length <= point <= 21:
        text = significant + "0" * (point - length)
    elif 0 < point <= 21:
        text = f"{significant[:point]}.{significant[point:]}"
    elif -6 < point <= 0:
        text = f"0.{'0' * -point}{significant}"
    else:
        more = f".{significant[1:]}" if length > 1 else ""
        text = f"{significant[0]}{more}e{point - 1:+d}"
    return f"-{text}" if number < 0 else text


def _write(value: Any, write: Callable[[str], object], depth: int) -> None:
    if depth > MAX_DEPTH:
        raise NotCanonical(f"it is nested deeper than {MAX_DEPTH} levels")
    if value is None:
        write("null")
    elif isinstance(value, bool):
        write("true" if value else "false")
    elif isinstance(value, str):
        write(_text(value))
    elif isinstance(value, int):
        if not -_MAX_INTEGER <= value <= _MAX_INTEGER:
            raise NotCanonical("it holds an integer beyond 2**53 - 1, which not every reader reads exactly")
        write(int.__repr__(value))
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise NotCanonical("it holds a number that is not finite")
        write(number_form(value))
    elif isinstance(value, (list, tuple)):
        write("[")
        for index, item in enumerate(value):
            if index:
                write(",")
            _write(item, write, depth + 1)
        write("]")
    elif isinstance(value, Mapping):
        _write_object(value, write, depth)
    else:
        raise NotCanonical(f"it holds a {type(value).__name__}, which JSON does not have")


def _write_object(value: Mapping[Any, Any], write: Callable[[str], object], depth: int) -> None:
    keys = list(value)
    if not all(isinstance(key, str) for key in keys):
        raise NotCanonical("it has a key that is not a string")
    names = {key: _text(key) for key in keys}
    write("{")
    # In the order of their UTF-16 code units, which differs from that of their characters beyond U+FFFF.
    for index, key in enumerate(sorted(keys, key=lambda key: str(key).encode("utf-16-be"))):
        write(f",{names[key]}:" if index else f"{names[key]}:")
        _write(value[key], write, depth + 1)
    write("}")


def _text(value: str) -> str:
    text = _quote(str.__str__(value))
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            pass
        else:
            return text
        raise NotCanonical("it holds a lone surrogate, which is not a character")
    return text
