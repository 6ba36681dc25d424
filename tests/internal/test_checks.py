"""Check the checks of numbers: what they accept, and what they say."""

from __future__ import annotations

import math
from typing import Any

import pytest

from sekuire._internal.checks import check_number, check_whole, is_number, is_whole
from sekuire.errors import ConfigurationError


@pytest.mark.parametrize("value", [True, "4", None, math.nan, math.inf, -math.inf, 1j, b"1"])
def test_what_is_not_a_number(value: Any) -> None:
    assert not is_number(value)
    assert not is_whole(value)


def test_numbers() -> None:
    assert all(is_number(value) for value in (0, -1.5, 10**400))
    assert is_whole(0)
    assert not is_whole(1.0)


@pytest.mark.parametrize(
    ("value", "options", "text"),
    [
        (0, {}, "must be a whole number, 1 or more, got 0"),
        (None, {}, "must be a whole number, 1 or more, got None"),
        (1.0, {}, "must be a whole number, 1 or more, got 1.0"),
        (-1, {"least": 0, "or_none": True}, "must be a whole number, 0 or more, or None, got -1"),
        (True, {"subject": "max_concurrency "}, "max_concurrency must be a whole number, 1 or more, got True"),
    ],
)
def test_a_wrong_whole_number(value: Any, options: Any, text: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        check_whole("size", value, **options)
    assert (caught.value.option, caught.value.problem) == ("size", text)


def test_a_huge_number() -> None:
    """An integer that Python refuses to write is not written."""
    with pytest.raises(ConfigurationError, match=r"must be a whole number, 1 or more, got one beyond 2\^53"):
        check_whole("size", -(10**5000))


@pytest.mark.parametrize(
    ("value", "options", "text"),
    [
        (0, {}, "must be a number of seconds above 0, got 0"),
        (math.inf, {}, "must be a number of seconds above 0, got inf"),
        (6, {"most": 5}, "must be a number of seconds above 0, got 6"),
        (-0.5, {"zero": True}, "must be a number of seconds, 0 or more, got -0.5"),
        ("1", {"of": "milliseconds"}, "must be a number of milliseconds above 0, got '1'"),
        (False, {"zero": True, "or_none": True}, "must be a number of seconds, 0 or more, or None, got False"),
    ],
)
def test_a_wrong_number(value: Any, options: Any, text: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        check_number("timeout", value, **options)
    assert (caught.value.option, caught.value.problem) == ("timeout", text)


def test_what_is_accepted() -> None:
    check_whole("size", 1)
    check_whole("size", 10**30)
    check_whole("size", None, or_none=True)
    check_number("timeout", 0.001)
    check_number("timeout", 0, zero=True)
    check_number("timeout", 5, most=5)
    check_number("timeout", None, or_none=True)
