"""The canonical form of JSON (RFC 8785), against its published vectors and another implementation."""

from __future__ import annotations

import enum
import json
import pathlib
import struct
from typing import Any, Dict

import pytest
import rfc8785
from hypothesis import example, given
from hypothesis import strategies as st

from sekuire.wire.canonical import MAX_DEPTH, NotCanonical, canonical_json, number_form

VECTORS: Dict[str, Any] = json.loads(
    (pathlib.Path(__file__).resolve().parents[1] / "vectors" / "rfc8785.json").read_text(encoding="utf-8")
)
FINITE = st.floats(allow_nan=False, allow_infinity=False)
TEXTS = st.text(st.characters(exclude_categories=("Cs",)))
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**53) + 1, 2**53 - 1), FINITE, TEXTS),
    lambda inner: st.one_of(st.lists(inner), st.dictionaries(TEXTS, inner)),
)


def test_vectors_of_the_rfc() -> None:
    """The examples and numbers of RFC 8785, and the test data of its authors, have the forms that they print."""
    for case in VECTORS["cases"]:
        assert canonical_json(json.loads(case["input"])).decode() == case["canonical"], case["name"]
    for bits, form in VECTORS["numbers"]:
        (number,) = struct.unpack(">d", bytes.fromhex(bits))
        assert number_form(number) == form, bits
    for bits in VECTORS["no_numbers"]:
        (number,) = struct.unpack(">d", bytes.fromhex(bits))
        with pytest.raises(NotCanonical, match="not finite"):
            canonical_json(number)


@given(JSON)
@example({"\ufb33": 1, "\U0001f600": 2, "\u20ac": 3, "\r": 4, "1": 5, "\x80": 6})
def test_form_of_another_implementation(value: Any) -> None:
    """Every JSON value has the form that the package rfc8785 gives it."""
    assert canonical_json(value) == rfc8785.dumps(value)


@given(FINITE)
@example(-0.0)
@example(1e21)
@example(123456789012345680000.0)
@example(1e-6)
@example(1e-7)
@example(5e-324)
@example(1.7976931348623157e308)
def test_form_of_a_number(number: float) -> None:
    """Every finite number has the form of that package, and is the same number when it is read again."""
    form = number_form(number)
    assert form.encode() == rfc8785.dumps(number)
    assert float(form) == number


@given(JSON)
def test_form_is_one(value: Any) -> None:
    """What is read from a canonical form has the same form again."""
    form = canonical_json(value)
    try:
        again = canonical_json(json.loads(form))
    except NotCanonical:
        # 1e20 is written in digits, and Python reads it as an integer.
        again = canonical_json(json.loads(form, parse_int=float))
    assert again == form


class Level(enum.IntEnum):
    LOW = 1


class Name(str):
    def __str__(self) -> str:
        return "another"


def test_subclasses_of_json_types() -> None:
    """A value of a subclass has the form of its base, whatever its own text is."""
    assert canonical_json({Name("b"): Level.LOW, "a": Name("x")}) == b'{"a":"x","b":1}'
    assert canonical_json((1, (2,))) == b"[1,[2]]"


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("\ud800", "lone surrogate"),
        ({"\udfff": 1}, "lone surrogate"),
        ([2**53], "integer beyond"),
        ([-(2**53)], "integer beyond"),
        (float("nan"), "not finite"),
        ({"a": float("-inf")}, "not finite"),
        ({1: "a"}, "key that is not a string"),
        ({"a": b"secret"}, "a bytes"),
        ({"a": {1, 2}}, "a set"),
        (nested(MAX_DEPTH + 1), "nested deeper"),
        (nested(100_000), "nested deeper"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.isascii() else "",
)
def test_values_without_a_form(value: Any, problem: str) -> None:
    """A value that two readers could understand differently is refused, and not quoted."""
    with pytest.raises(NotCanonical, match=problem) as caught:
        canonical_json(value)
    assert "secret" not in str(caught.value)
    assert canonical_json(nested(MAX_DEPTH)) == b"[" * MAX_DEPTH + b"1" + b"]" * MAX_DEPTH
