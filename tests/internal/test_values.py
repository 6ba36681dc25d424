"""Test that Shown and Value do what attrs' own methods do."""

from __future__ import annotations

from typing import Any

import attrs
import pytest

from sekuire._internal.values import Value


@attrs.frozen(eq=False, repr=False)
class Ours(Value):
    a: int
    _b: Any = None
    c: str = attrs.field(default="", repr=False)
    d: str = attrs.field(default="", repr=str.upper)
    e: int = attrs.field(default=0, eq=False)


@attrs.frozen
class Theirs:
    a: int
    _b: Any = None
    c: str = attrs.field(default="", repr=False)
    d: str = attrs.field(default="", repr=str.upper)
    e: int = attrs.field(default=0, eq=False)


VALUES: Any = [(1,), (2,), (1, "x"), (1, None, "y"), (1, None, "", "z"), (1, None, "", "", 5)]


@pytest.mark.parametrize("one", VALUES)
def test_a_value_is_shown_compared_and_hashed_as_attrs_does(one: Any) -> None:
    assert repr(Ours(*one)) == repr(Theirs(*one)).replace("Theirs", "Ours")
    for other in VALUES:
        assert (Ours(*one) == Ours(*other)) is (Theirs(*one) == Theirs(*other))
        assert (Ours(*one) != Ours(*other)) is (Theirs(*one) != Theirs(*other))
        assert (hash(Ours(*one)) == hash(Ours(*other))) is (Theirs(*one) == Theirs(*other))
    assert Ours(1) != Theirs(1)  # type: ignore[comparison-overlap]


def test_a_derived_class_is_not_equal_to_its_base() -> None:
    @attrs.frozen(eq=False, repr=False)
    class Derived(Ours):
        pass

    assert Derived(1) != Ours(1)
    assert repr(Derived(1)).startswith("Derived(")
