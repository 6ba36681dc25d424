"""Inputs built from JSON for their annotation, mismatches with their place, and results that JSON has no form for."""

from __future__ import annotations

import collections.abc
import contextlib
import dataclasses
import datetime as dt
import decimal
import enum
import functools
import json
import logging
import pathlib
import string
import subprocess
import sys
import types
import typing
import uuid
from typing import Any, Callable, Dict, List, Literal, Mapping, MutableMapping, Optional, Sequence, Set, Tuple, Union

import annotated_types as at
import attrs
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic_core import PydanticCustomError
from typing_extensions import Annotated, NotRequired, TypedDict

from sekuire import TaskContext, TaskError, TaskRegistry, Worker
from sekuire.errors import ConfigurationError
from sekuire.handlers.invoke import Handler, asked_for
from sekuire.handlers.invoke import structure_of as structure_of_annotation
from sekuire.wire.jsonform import to_json

from ..support import forward
from ..support.builders import context_of
from ..support.waiting import GUARD

if typing.TYPE_CHECKING:
    from sekuire.worker import Worker as OnlyForCheckers

Make = Callable[..., Worker]
SECRET = "hunter2-do-not-show"


class Colour(str, enum.Enum):
    RED = "red"
    BLUE = "blue"


class Level(enum.IntEnum):
    LOW = 1


class Shape(enum.Enum):
    ROUND = "round"


@attrs.frozen
class Item:
    sku: str
    count: int = attrs.field(default=1, validator=attrs.validators.in_([1, 2, 3]))


@dataclasses.dataclass
class Order:
    items: List[Item]
    at: Optional[dt.datetime] = None
    price: float = 0.0
    colour: Colour = Colour.RED
    before: Optional[Order] = None
    notes: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.items) > 3:
            raise ValueError("an order has at most 3 items")


@dataclasses.dataclass
class InitVars:
    count: int
    scale: dataclasses.InitVar[int]


class Address(TypedDict):
    street: str
    number: NotRequired[int]


class Person(pydantic.BaseModel):
    name: str = pydantic.Field(alias="fullName")
    born: Optional[dt.date] = None
    address: Optional[Address] = None


class Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True)

    count: int
    at: dt.datetime


@pydantic.dataclasses.dataclass
class Point:
    x: int


@attrs.frozen
class Left:
    left: int


@attrs.frozen
class Right:
    right: int


@dataclasses.dataclass
class Cat:
    kind: Literal["cat"]
    lives: int = 9


@dataclasses.dataclass
class Dog:
    kind: Literal["dog"]
    lives: int = 1


@dataclasses.dataclass
class Cow:
    kind: Literal["cow"] = dataclasses.field(default="cow", init=False)


@dataclasses.dataclass
class Puppy:
    kind: Annotated[Literal["dog"], "the same tag"]
    weeks: int


class Pair(typing.NamedTuple):
    left: int
    right: Optional[Pair]


class Tree(TypedDict):
    name: str
    children: List[Tree]


T = typing.TypeVar("T")


@dataclasses.dataclass
class Page(typing.Generic[T]):
    items: List[T]
    following: Optional[Page[T]] = None


@dataclasses.dataclass
class Rows(Page[List[T]], typing.Generic[T]):
    first: Optional[T] = None


@attrs.define
class Untyped:
    anything: Any = attrs.field()
    more = attrs.field(default=None)


class PetCat(pydantic.BaseModel):
    kind: Literal["cat"]
    lives: int
    cat: Any = None


class PetDog(pydantic.BaseModel):
    kind: Literal["dog"]
    lives: int


class Owner(pydantic.BaseModel):
    number: Union[int, List[int], None] = None
    pet: Annotated[Union[PetCat, PetDog, None], pydantic.Field(discriminator="kind")] = None
    other: Union[PetCat, PetDog, None] = None
    by_name: Dict[str, Union[int, List[int]]] = {}
    id: Optional[uuid.UUID] = None
    size: pydantic.ByteSize = pydantic.ByteSize(0)
    odd: Annotated[str, pydantic.AfterValidator(int)] = "1"
    own: str = ""

    @pydantic.field_validator("own")
    @classmethod
    def check_own(cls, value: str) -> str:
        if value == "email":
            text = "value is not a valid email address: {reason}"
            raise PydanticCustomError("value_error", text, {"reason": SECRET})
        raise ValueError("a text of mine")


class StrictOwner(Owner):
    model_config = pydantic.ConfigDict(strict=True)


UTC = dt.timezone.utc
ID = "12345678-1234-5678-1234-567812345678"

FITS: List[Tuple[Any, Any, Any]] = [
    (str, "x", "x"),
    (int, 5, 5),
    (float, 5, 5.0),
    (float, 0.5, 0.5),
    (bool, True, True),
    (None, None, None),
    (Any, {"x": 1}, {"x": 1}),
    (dt.datetime, "2024-02-29T12:00:00+02:00", dt.datetime(2024, 2, 29, 10, tzinfo=UTC)),
    (dt.datetime, "2024-02-29T12:00:00.5Z", dt.datetime(2024, 2, 29, 12, 0, 0, 500000, UTC)),
    (dt.date, "2024-02-29", dt.date(2024, 2, 29)),
    (dt.time, "23:59:59", dt.time(23, 59, 59)),
    (uuid.UUID, ID, uuid.UUID(ID)),
    (decimal.Decimal, "1.10", decimal.Decimal("1.10")),
    (decimal.Decimal, 1.1, decimal.Decimal("1.1")),
    (pathlib.Path, "a/b", pathlib.Path("a/b")),
    (Colour, "red", Colour.RED),
    (Level, 1, Level.LOW),
    (Shape, "round", Shape.ROUND),
    (Literal["a", 1], 1, 1),
    (List[int], [1, 2], [1, 2]),
    (Sequence[int], [1], [1]),
    (Set[str], ["a", "a"], {"a"}),
    (typing.FrozenSet[str], ["a"], frozenset("a")),
    (Tuple[int, ...], [1, 2], (1, 2)),
    (Tuple[int, str], [1, "a"], (1, "a")),
    (Dict[str, int], {"a": 1}, {"a": 1}),
    (Mapping[uuid.UUID, Item], {ID: {"sku": "a"}}, {uuid.UUID(ID): Item("a")}),
    (Item, {"sku": "a", "unknown": 1}, Item("a")),
    (Annotated[Item, "a note"], {"sku": "a"}, Item("a")),
    (Annotated[Address, "a note"], {"street": "s", "number": 1}, {"street": "s", "number": 1}),
    (Optional[Item], None, None),
    (Optional[Item], {"sku": "a"}, Item("a")),
    (List[Item], [{"sku": "a"}], [Item("a")]),
    (Union[int, str, Item], "x", "x"),
    (Union[int, str, Item], {"sku": "a"}, Item("a")),
    (Union[Left, Right, str], {"right": 1}, Right(1)),
    (Union[Left, Right, str], "x", "x"),
    (Union[Cat, Dog], {"kind": "dog"}, Dog("dog")),
    (Union[Cat, Cow], {"kind": "cow"}, Cow()),
    (Union[Cat, Dog, Puppy], {"kind": "dog", "weeks": 7}, Puppy("dog", 7)),
    (Union[Cat, Dog, Puppy], {"kind": "dog", "lives": 7}, Dog("dog", 7)),
    (Union[Cat, Dog, Puppy], {"kind": "cat", "weeks": 7}, Cat("cat")),
    (Pair, [1, [2, None]], Pair(1, Pair(2, None))),
    (Tree, {"name": "a", "children": [{"name": "b", "children": []}]},
     {"name": "a", "children": [{"name": "b", "children": []}]}),
    (Page[int], {"items": [1], "following": {"items": [2]}}, Page([1], Page([2]))),
    (Rows[int], {"items": [[1]], "first": 1}, Rows([[1]], first=1)),
    (Untyped, {"anything": [1], "more": {"x": 1}}, Untyped([1], {"x": 1})),
    (Set[Item], [{"sku": "a"}], {Item("a")}),
    (collections.abc.Set[Tuple[int, ...]], [[1]], frozenset({(1,)})),
    (forward.Order, {"items": [{"sku": "a", "date": 1}], "more": [{"sku": "b"}], "later": {"items": []}},
     forward.Order([forward.Item("a", 1)], [forward.Item("b")], forward.Order([]))),
    (forward.Node, {"kids": [{"item": {"sku": "a"}}]}, forward.Node(kids=[forward.Node(item=forward.Item("a"))])),
    (forward.Pair, [{"sku": "a"}, [[{"sku": "b"}, []]]],
     forward.Pair(forward.Item("a"), (forward.Pair(forward.Item("b"), ()),))),
    (forward.Tree, {"item": {"sku": "a"}, "kids": [{"item": {"sku": "b"}, "kids": []}]},
     {"item": forward.Item("a"), "kids": [{"item": forward.Item("b"), "kids": []}]}),
    (Union[forward.Node, forward.Item], {"sku": "a"}, forward.Item("a")),
    (Order, {"items": [], "before": {"items": [{"sku": "a"}]}}, Order([], before=Order([Item("a")]))),
    (Order, {"items": [], "colour": "blue", "price": 2}, Order([], price=2.0, colour=Colour.BLUE)),
    (Address, {"street": "s", "unknown": 1}, {"street": "s"}),
    (Person, {"fullName": "Ada", "born": "1815-12-10"}, Person(fullName="Ada", born=dt.date(1815, 12, 10))),
    (List[Person], [{"fullName": "Ada"}], [Person(fullName="Ada")]),
    (Strict, {"count": 1, "at": "2024-01-01T00:00:00Z"}, Strict(count=1, at=dt.datetime(2024, 1, 1, tzinfo=UTC))),
    (Point, {"x": 1}, Point(x=1)),
]  # fmt: skip

MISMATCHES: List[Tuple[Any, Any, List[str]]] = [
    (str, 5, ["input: expected a string, got an integer"]),
    (int, "5", ["input: expected an integer, got a string"]),
    (int, True, ["input: expected an integer, got a boolean"]),
    (int, 1.0, ["input: expected an integer, got a number"]),
    (float, "1", ["input: expected a number, got a string"]),
    (float, False, ["input: expected a number, got a boolean"]),
    (float, 10**400, ["input: expected a number, got another integer"]),
    (bool, 0, ["input: expected a boolean, got an integer"]),
    (dt.datetime, "2024-02-29T12:00:00", ["input: expected a string with a date, a time and its offset (RFC 3339), got another string"]),  # noqa: E501
    (dt.date, "29.2.", ["input: expected a string with a date, such as 2024-12-31, got another string"]),
    (uuid.UUID, SECRET, ["input: expected a string with a UUID, got another string"]),
    (decimal.Decimal, "NaN", ["input: expected a number, or a string with one, got another string"]),
    (decimal.Decimal, True, ["input: expected a number, or a string with one, got a boolean"]),
    (Colour, SECRET, ['input: expected one of "red", "blue", got another string']),
    (Level, True, ["input: expected one of 1, got another boolean"]),
    (Shape, None, ['input: expected one of "round", got null']),
    (Literal["a", 1], True, ['input: expected one of "a", 1, got another boolean']),
    (Literal["a"], ["a"], ['input: expected one of "a", got another array']),
    (List[int], SECRET, ["input: expected an array, got a string"]),
    (List[int], [1, "x", None], ["input[1]: expected an integer, got a string",
                                 "input[2]: expected an integer, got null"]),
    (Set[str], SECRET, ["input: expected an array, got a string"]),
    (Tuple[int, str], [1], ["input: expected an array of 2, got one of 1"]),
    (Tuple[int, str], {}, ["input: expected an array, got an object"]),
    (Tuple[int, str], [1, 2], ["input[1]: expected a string, got an integer"]),
    (Dict[str, int], {"a b": "x", "c": 1}, ["input['a b']: expected an integer, got a string"]),
    (Dict[str, int], [], ["input: expected an object, got an array"]),
    (Dict[Colour, int], {"green": 1}, ['input.green: expected one of "red", "blue", got another string']),
    (Item, SECRET, ["input: expected an object, got a string"]),
    (Item, {}, ["input.sku: is missing"]),
    (Item, {"sku": "a", "count": 9}, ["input.count: is refused by its validator"]),
    (Optional[Item], 5, ["input: expected an object, got an integer"]),
    (Optional[Item], {"sku": 5}, ["input.sku: expected a string, got an integer"]),
    (Union[int, str], None, ["input: expected an integer or a string, got null"]),
    (Union[Left, Right, str], {}, ["input: expected an object with the fields of Left or Right or a string, got an object"]),  # noqa: E501
    (Union[Left, Right, str], 5, ["input: expected an object or a string, got an integer"]),
    (Union[Left, Right, str], {"left": SECRET}, ["input.left: expected an integer, got a string"]),
    (Order, {"items": [{"sku": "a"}, {"count": SECRET}], "price": True, "before": {"items": None}},
     ["input.items[1].sku: is missing", "input.items[1].count: expected an integer, got a string",
      "input.price: expected a number, got a boolean", "input.before.items: expected an array, got null"]),
    (Order, {"items": [{"sku": "a"}] * 4}, ["input: is refused: an order has at most 3 items"]),
    (Address, {"number": SECRET}, ["input.street: is missing", "input.number: expected an integer, got a string"]),
    (Address, SECRET, ["input: expected an object, got a string"]),
    (Person, {}, ["input.fullName: Field required"]),
    (Person, {"fullName": "A", "address": {"street": None}},
     ["input.address.street: Input should be a valid string"]),
    (List[Person], [{"fullName": 5}], ["input[0].fullName: Input should be a valid string"]),
    (Union[Cat, Dog], {"kind": SECRET}, ["input: expected an object with the fields of Cat or Dog, got another one"]),
    (Union[Cat, Dog], {"kind": ["cat"]}, ["input: expected an object with the fields of Cat or Dog, got another one"]),
    (Union[Cat, Dog], {"kind": "cat", "lives": SECRET}, ["input.lives: expected an integer, got a string"]),
    (Pair, [1], ["input: expected an array of 2, got one of 1"]),
    (Pair, [1, ["x", None]], ["input[1][0]: expected an integer, got a string"]),
    (Tree, {"name": "a", "children": [{"name": "b"}]}, ["input.children[0].children: is missing"]),
    (Page[int], {"items": [], "following": {"items": [SECRET]}},
     ["input.following.items[0]: expected an integer, got a string"]),
    (forward.Node, {"kids": [{"kids": [{"item": SECRET}]}]},
     ["input.kids[0].kids[0].item: expected an object, got a string"]),
    (Owner, {"number": SECRET},
     ["input.number: Input should be a valid integer, unable to parse string as an integer",
      "input.number: Input should be a valid list"]),
    (Owner, {"pet": {"kind": SECRET, "lives": 9}},
     ["input.pet: Input tag found using 'kind' does not match any of the expected tags: 'cat', 'dog'"]),
    (Owner, {"pet": {"kind": "cat"}}, ["input.pet.lives: Field required"]),
    (Owner, {"pet": {"kind": "cat", "lives": [SECRET], "cat": {"lives": SECRET}}},
     ["input.pet.lives: Input should be a valid integer"]),
    (Owner, {"other": {"kind": "cat", "lives": [SECRET]}},
     ["input.other.lives: Input should be a valid integer", "input.other.kind: Input should be 'dog'"]),
    (Owner, {"by_name": {"int": {}}},
     ["input.by_name.int: Input should be a valid integer", "input.by_name.int: Input should be a valid list"]),
    (Owner, {"id": SECRET}, ["input.id: Input should be a valid UUID"]),
    (Owner, {"size": "1 hunter"}, ["input.size: could not interpret byte unit"]),
    (Owner, {"odd": SECRET}, ["input.odd: is refused (ValueError)"]),
    (Owner, {"own": "email"}, ["input.own: value is not a valid email address"]),
    (Owner, {"own": SECRET}, ["input.own: Value error, a text of mine"]),
    (List[StrictOwner], [{"number": {}, "pet": {"kind": "cat", "lives": SECRET, "cat": {"lives": 1}}}],
     ["input[0].number: Input should be a valid integer", "input[0].number: Input should be a valid array",
      "input[0].pet.lives: Input should be a valid integer, unable to parse string as an integer"]),
    (Strict, {"count": "1", "at": "2024-01-01T00:00:00Z"}, ["input.count: Input should be a valid integer"]),
]  # fmt: skip


def structure_of(function: Handler) -> Any:
    return structure_of_annotation(asked_for(function))


def handler_of(annotation: Any) -> Any:
    def handler(ctx: Any, input: Any) -> Any:
        return input

    handler.__annotations__["input"] = annotation
    return handler


def built(annotation: Any, value: Any) -> Any:
    structure = structure_of(handler_of(annotation))
    return value if structure is None else structure(value)


@pytest.mark.parametrize(("annotation", "value", "wanted"), FITS)
def test_what_fits(annotation: Any, value: Any, wanted: Any) -> None:
    """Each kind of annotation is built from the JSON that it describes."""
    found = built(annotation, value)
    assert found == wanted
    assert type(found) is type(wanted)


@pytest.mark.parametrize(("annotation", "value", "wanted"), MISMATCHES)
def test_what_does_not_fit(annotation: Any, value: Any, wanted: List[str]) -> None:
    """Each mismatch names its path and what was expected. It quotes no value of the input."""
    from sekuire.handlers.mismatch import Mismatch

    with pytest.raises(Mismatch) as caught:
        built(annotation, value)
    problems = caught.value.details()["problems"]
    assert [f"{one['path']}: {one['problem']}" for one in problems] == wanted
    assert str(caught.value) == wanted[0] + (f" (and {len(wanted) - 1} more)" if len(wanted) > 1 else "")
    assert SECRET not in str(caught.value) + json.dumps(problems)
    assert caught.value.__context__ is None


VALIDATORS = attrs.validators
REFUSING: List[Tuple[Any, Any]] = [
    (str, VALIDATORS.gt("z")),
    (str, VALIDATORS.in_(["a"])),
    (str, VALIDATORS.instance_of(int)),
    (str, VALIDATORS.is_callable()),
    (str, VALIDATORS.matches_re("a+")),
    (str, VALIDATORS.max_len(2)),
    (str, VALIDATORS.min_len(99)),
    (str, VALIDATORS.not_(VALIDATORS.in_([SECRET]))),
    (str, VALIDATORS.not_(VALIDATORS.instance_of(str), msg="{value}")),
    (str, VALIDATORS.and_(VALIDATORS.max_len(99), VALIDATORS.in_(["b"]))),
    (str, VALIDATORS.optional(VALIDATORS.in_(["b"]))),
    (str, VALIDATORS.lt(5)),
    (List[str], VALIDATORS.deep_iterable(VALIDATORS.in_(["a"]))),
    (Dict[str, str], VALIDATORS.deep_mapping(VALIDATORS.in_([SECRET]), VALIDATORS.in_(["b"]))),
]
if hasattr(VALIDATORS, "or_"):  # From attrs 24.1 on.
    REFUSING.append((str, VALIDATORS.or_(VALIDATORS.in_(["a"]), VALIDATORS.in_(["b"]))))


@pytest.mark.parametrize(("annotation", "validator"), REFUSING)
def test_validators_of_attrs(annotation: Any, validator: Any) -> None:
    """What attrs itself refuses names its field, without attrs' text, which quotes the value."""
    from sekuire.handlers.mismatch import Mismatch

    checked = attrs.make_class(
        "Checked", {"other": attrs.field(), "_field": attrs.field(type=annotation, validator=validator)}
    )
    value = {str: SECRET, List[str]: [SECRET], Dict[str, str]: {SECRET: SECRET}}[annotation]
    with pytest.raises(Mismatch) as caught:
        built(List[checked], [{"other": 1, "_field": value}])  # type: ignore[valid-type]
    assert caught.value.problems == [((0, "_field"), "is refused by its validator")]


def test_checks_of_ones_own() -> None:
    """The text of one's own check is passed on, with the field where attrs knows it; that of a builtin is not."""
    from sekuire.handlers.mismatch import Mismatch

    @attrs.define
    class Checked:
        even: int = attrs.field(default=0)
        number: str = attrs.field(default="0", converter=int)  # type: ignore[assignment]
        flag: str = attrs.field(default="no", converter=attrs.converters.to_bool)

        @even.validator
        def check(self, attribute: Any, value: int) -> None:
            if value % 2:
                raise ValueError("an odd number")

    for value, wanted in (
        ({"even": 1}, "input.even: is refused: an odd number"),
        ({"number": SECRET}, "input: is refused (ValueError)"),
        ({"flag": SECRET}, "input: is refused (ValueError)"),
    ):
        with pytest.raises(Mismatch) as caught:
            built(Checked, value)
        assert str(caught.value) == wanted


def test_the_texts_of_pydantic() -> None:
    """Each text of pydantic that is filled in from the input, not from the model, is replaced by another one."""
    from pydantic_core._pydantic_core import list_all_errors

    from sekuire.handlers.inputs import SAFE_TEXTS

    of_the_model = {
        "actual_length", "attribute", "class", "class_name", "decimal_places", "discriminator", "expected",
        "expected_plural", "expected_schemes", "expected_tags", "expected_version", "field_type", "ge", "gt", "le",
        "lt", "max_digits", "max_length", "method_name", "min_length", "multiple_of", "pattern", "whole_digits",
    }  # fmt: skip
    # Their texts are fixed ones: what is wrong with a date, a URL or JSON, and where.
    harmless = {
        "assertion_error", "date_from_datetime_parsing", "date_parsing", "datetime_from_date_parsing",
        "datetime_parsing", "json_invalid", "time_delta_parsing", "time_parsing", "url_parsing", "url_syntax_violation",
        "value_error",
    }  # fmt: skip
    for error in list_all_errors():
        named = {name for _, name, _, _ in string.Formatter().parse(error["message_template_python"]) if name}
        assert named <= of_the_model or error["type"] in {*SAFE_TEXTS, *harmless}, error


def test_many_mismatches_are_cut() -> None:
    """A long list of wrong elements gives a short list of problems, with short names."""
    from sekuire.handlers.mismatch import Mismatch

    for annotation, value in ((List[int], ["x"] * 1000), (Dict[str, int], {f"{n}" * 1000: "x" for n in range(1000)})):
        with pytest.raises(Mismatch) as caught:
            built(annotation, value)
        assert len(json.dumps(caught.value.details())) < 2000


# -- constraints ------------------------------------------------------------------------------------------------------


class Gt0:
    """A constraint of nobody's package: the attribute's name is what counts."""

    gt = 0


class OwnPredicate(at.Predicate):
    """A predicate of the user's own."""


class OwnMetadata(at.BaseMetadata):
    """Metadata of the user's own, which nothing here knows."""

    def __repr__(self) -> str:
        return "OwnMetadata of mine"


class Meta:
    """What msgspec calls so: limits and notes in one object."""

    __module__ = "msgspec"
    __slots__ = ("gt", "pattern", "title")

    def __init__(self, **given: Any) -> None:
        self.gt, self.pattern, self.title = (given.get(name) for name in self.__slots__)


@dataclasses.dataclass
class Limits:
    count: Annotated[int, pydantic.Field(gt=0, description="a note")]
    tags: Annotated[List[Annotated[str, at.MinLen(2)]], at.Len(1, 2)] = dataclasses.field(
        default_factory=lambda: ["ab"]
    )
    some: Optional[Annotated[int, at.Lt(3)]] = None
    more: Annotated[Optional[int], at.Interval(gt=1, le=5)] = None


@attrs.frozen
class Dozens:
    count: Annotated[int, at.MultipleOf(12)]


class Sized(TypedDict):
    name: Annotated[str, at.MaxLen(3)]
    size: NotRequired[Annotated[float, at.Ge(0.5)]]


class Ranked(typing.NamedTuple):
    rank: Annotated[int, at.Le(3)]


Rank = typing.NewType("Rank", Annotated[int, Gt0()])  # type: ignore[valid-newtype]
NEW_YEAR = dt.datetime(2024, 1, 1, tzinfo=UTC)

KEPT: List[Tuple[Any, Any, Any]] = [
    (Limits, {"count": 1, "tags": ["ab"], "some": 2, "more": 5}, Limits(1, ["ab"], 2, 5)),
    (Limits, {"count": 1, "some": None, "more": None}, Limits(1)),
    (Dozens, {"count": 24}, Dozens(24)),
    (Sized, {"name": "abc", "size": 0.5}, {"name": "abc", "size": 0.5}),
    (Ranked, [3], Ranked(3)),
    (Rank, 1, 1),
    (Annotated[float, at.MultipleOf(0.1)], 0.3, 0.3),
    (Annotated[decimal.Decimal, at.Gt(0)], "0.1", decimal.Decimal("0.1")),
    (Annotated[dt.datetime, at.Ge(NEW_YEAR), at.Timezone(...)], "2024-01-01T00:00:00Z", NEW_YEAR),
    (Annotated[float, at.Unit("m"), "a note", int], 1, 1.0),
    (Annotated[str, at.Predicate(str.islower)], "a", "a"),
    (Annotated[str, Meta(title="a note")], "a", "a"),
    (Annotated[str, pydantic.StringConstraints(min_length=1)], "a", "a"),
    (Annotated[Dict[str, Any], at.MaxLen(1)], {"a": 1}, {"a": 1}),
    (Annotated[Any, at.Gt(0)], 1, 1),
    (Union[Annotated[int, at.Gt(0)], str], "x", "x"),
    (pydantic.conint(gt=3), 4, 4),
]

BROKEN: List[Tuple[Any, Any, List[str]]] = [
    (Limits, {"count": 0, "tags": [], "some": 3, "more": 1},
     ["input.count: must be greater than 0", "input.tags: must have a length of 1 or more",
      "input.some: must be less than 3", "input.more: must be greater than 1"]),
    (Limits, {"count": 1, "tags": ["ab", SECRET, "x"], "more": 6},
     ["input.tags[2]: must have a length of 2 or more", "input.more: must be 5 or less"]),
    (Dozens, {"count": 13}, ["input.count: must be a multiple of 12"]),
    (Sized, {"name": SECRET, "size": 0},
     ["input.name: must have a length of 3 or less", "input.size: must be 0.5 or more"]),
    (Annotated[int, Meta(gt=0)], 0, ["input: must be greater than 0"]),
    (Ranked, [4], ["input[0]: must be 3 or less"]),
    (Rank, 0, ["input: must be greater than 0"]),
    (Annotated[float, at.MultipleOf(0.1)], 0.35, ["input: must be a multiple of 0.1"]),
    (Annotated[dt.datetime, at.Ge(NEW_YEAR)], "2023-01-01T00:00:00Z",
     ["input: must be 2024-01-01T00:00:00+00:00 or more"]),
    (Annotated[str, at.Predicate(str.islower)], SECRET.upper(), ["input: is refused by the predicate str.islower"]),
    (Annotated[str, OwnPredicate(str.islower)], "A", ["input: is refused by the predicate str.islower"]),
    (Annotated[str, at.Predicate(int)], SECRET, ["input: is refused by the predicate int"]),
    (Annotated[Dict[str, Any], at.MaxLen(1)], {"a": 1, "b": 2}, ["input: must have a length of 1 or less"]),
    (Dict[Annotated[str, at.MinLen(2)], int], {"a": 1}, ["input.a: must have a length of 2 or more"]),
    (Annotated[Any, at.Gt(0)], SECRET, ["input: must be greater than 0, got a string"]),
    (Annotated[int, at.Gt(0), at.MultipleOf(2)], -1,
     ["input: must be greater than 0", "input: must be a multiple of 2"]),
    (Union[Annotated[int, at.Gt(0)], str], 0,
     ["input: must be greater than 0", "input: expected a string, got an integer"]),
]  # fmt: skip


@pytest.mark.parametrize(("annotation", "value", "wanted"), KEPT)
def test_constraints_that_are_kept(annotation: Any, value: Any, wanted: Any) -> None:
    """A value that keeps to the constraints of Annotated is built. None keeps to those of an Optional."""
    assert built(annotation, value) == wanted


@pytest.mark.parametrize(("annotation", "value", "wanted"), BROKEN)
def test_constraints_that_are_broken(annotation: Any, value: Any, wanted: List[str]) -> None:
    """A value that breaks a constraint is a mismatch that names the bound and not the value, wherever it stands."""
    from sekuire.handlers.mismatch import Mismatch

    with pytest.raises(Mismatch) as caught:
        built(annotation, value)
    problems = caught.value.details()["problems"]
    assert [f"{one['path']}: {one['problem']}" for one in problems] == wanted
    assert SECRET not in str(caught.value) + json.dumps(problems)


@dataclasses.dataclass
class Patterned:
    code: Annotated[str, pydantic.Field(pattern="^x", min_length=1)]


@dataclasses.dataclass
class Unannotated:
    count: int = pydantic.Field(default=1, gt=0)


@pytest.mark.parametrize(
    ("annotation", "texts"),
    [
        (List[Patterned], ["Patterned.code: the constraint pattern='^x' of Annotated is not supported outside of a "
                           "pydantic model; use a pydantic model, or check the value"]),
        (Unannotated, ["Field(...) of Unannotated.count has no effect as a default",
                       "write Annotated[..., Field(...)]"]),
        (Annotated[str, at.Gt(0)], ["the constraint Gt(gt=0)", "str and int do not go together"]),
        (Annotated[int, at.MinLen(1)], ["the constraint MinLen(min_length=1)", "int has no length"]),
        (Annotated[str, at.MinLen("1")], ["a length is a whole number"]),
        (Annotated[Item, at.Gt(0)], ["Item has no order"]),
        (Annotated[List[int], at.Gt(0)], ["list and int do not go together"]),
        (Annotated[dt.datetime, at.Gt(dt.datetime(2024, 1, 1))], ["can't compare offset-naive and offset-aware"]),
        (Annotated[dt.datetime, at.Timezone(None)], ["the constraint Timezone(tz=None) of Annotated is not supported"]),
        (Annotated[int, at.Gt], ["the constraint Gt of Annotated is a class; write Gt(...)"]),
        (Annotated[int, pydantic.Field(alias="x")], ["Field(alias=...) of Annotated has no effect outside"]),
        (Annotated[int, pydantic.Field(default=1)], ["Field(default=...) of Annotated has no effect outside"]),
        (Annotated[str, pydantic.AfterValidator(str.upper)], ["the constraint AfterValidator(", "is not supported"]),
        (Annotated[str, pydantic.StringConstraints(to_upper=True)], ["the constraint to_upper=True"]),
        (Annotated[int, VALIDATORS.gt(3)], ["has no effect; write attrs.field(validator=...)"]),
        (Annotated[str, Meta(pattern="x")], ["Meta(...) of Annotated is not supported; use a pydantic model"]),
        (Annotated[int, OwnMetadata()], ["the constraint OwnMetadata of mine of Annotated is not supported"]),
        (Dict[Annotated[int, at.Gt(0)], int], ["the keys of an object are strings in JSON, never int"]),
    ],
)  # fmt: skip
def test_constraints_that_are_refused(annotation: Any, texts: List[str]) -> None:
    """A constraint that cannot be checked is refused at registration: parameter, constraint, and what to do."""
    with pytest.raises(ConfigurationError) as caught:
        TaskRegistry().task("echo", handler_of(annotation))
    assert ", parameter 'input': " in str(caught.value)
    for text in texts:
        assert text in str(caught.value)
    assert caught.value.__context__ is None


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.sampled_from(["items", "sku", "at"]), inner),
    max_leaves=10,
)


@given(st.sampled_from([annotation for annotation, _, _ in FITS + KEPT]), json_values)
def test_any_json_fits_or_not(annotation: Any, value: Any) -> None:
    """Whatever JSON comes, it is built or it is a mismatch; nothing else is raised."""
    from sekuire.handlers.mismatch import Mismatch

    with contextlib.suppress(Mismatch):
        built(annotation, value)


# -- which annotations are looked at ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "annotation",
    [
        Any, object, dict, Dict, Mapping, MutableMapping, Dict[str, Any], Mapping[str, Any], Mapping[str, object],
        collections.abc.Mapping, "dict", "Dict[str, Any]",
    ],
)  # fmt: skip
def test_json_as_it_comes(annotation: Any) -> None:
    """Handlers that ask for plain JSON are called themselves."""
    assert structure_of(handler_of(annotation)) is None
    tasks = TaskRegistry()
    function = handler_of(annotation)
    tasks.task("echo", function)
    tasks.freeze()
    entry = tasks.find("echo")
    assert entry is not None
    assert entry.call is function


def test_where_the_annotation_is_found() -> None:
    """The second positional parameter counts, whatever it is called and whatever the handler is."""

    def by_name(ctx: OnlyForCheckers, payload: Item) -> None: ...

    class Service:
        def method(self, ctx: Any, input: Item) -> None: ...

        def __call__(self, ctx: Any, input: Item) -> None: ...

    def prefixed(prefix: str, ctx: Any, input: Item) -> None: ...

    @functools.wraps(by_name)
    def wrapped(*args: Any) -> None: ...

    async def later(ctx: Any, input: Item) -> None: ...

    for function in (
        by_name, Service().method, Service(), functools.partial(prefixed, "x"), wrapped, later,
    ):  # fmt: skip
        structure = structure_of(function)
        assert structure is not None
        assert structure({"sku": "a"}) == Item("a")

    def collecting(*args: Item) -> None: ...

    for other in (print, int, lambda ctx, input: None, collecting):
        assert structure_of(other) is None


@pytest.mark.parametrize(
    ("annotation", "text"),
    [
        ("NoSuchClass", "'NoSuchClass' of 'input' cannot be resolved (NameError: name 'NoSuchClass' is not defined)"),
        (List["NoSuchClass"], "cannot be resolved"),  # type: ignore[name-defined]  # noqa: F821
        ("1 +", "cannot be resolved"),
        (complex, "complex cannot be built from JSON"),
        (List[bytes], "bytes has no form in JSON"),
        (Dict[int, str], "the keys of an object are strings in JSON, never int"),
        (types.SimpleNamespace, "SimpleNamespace has no form in JSON"),
        (forward.Lost, "the annotation typing.List[ForwardRef('Nowhere')] of Lost.items cannot be resolved (NameError"),
        (List[forward.LostDict], "the annotation 'Nowhere' of LostDict.item cannot be resolved"),
        (forward.LostPair, "of LostPair.items cannot be resolved (NameError: name 'Nowhere' is not defined)"),
        (Union[forward.LostNode, Item], "of LostNode.item cannot be resolved"),
        (Page, "Missing type for generic argument T"),
        (InitVars, "InitVars cannot be made without 'scale', which no field of the JSON gives (an InitVar?)"),
        (Set[Order], "a set cannot hold Order, which is not hashable"),
        (typing.FrozenSet[Annotated[Address, ""]], "a set cannot hold Address, which is not hashable"),
        (Set[Optional[List[int]]], "a set cannot hold typing.List[int], which is not hashable"),
        (Set[Tuple[int, Dict[str, int]]], "a set cannot hold typing.Dict[str, int], which is not hashable"),
    ],
)  # fmt: skip
def test_annotations_that_cannot_be_built(annotation: Any, text: str) -> None:
    """An annotation that is unknown, or has no JSON form, is refused at registration with the handler's place."""
    tasks = TaskRegistry()
    with pytest.raises(ConfigurationError) as caught:
        tasks.task("echo", handler_of(annotation))
    assert str(caught.value).startswith(f"task('echo'): handler_of.<locals>.handler ({__file__}:")
    assert text in str(caught.value)
    assert caught.value.__context__ is None


def test_classes_that_cannot_be_told_apart() -> None:
    """A union of classes without a field of their own is refused at registration."""

    @attrs.frozen
    class Same:
        left: int

    with pytest.raises(ConfigurationError, match=r"cannot be built from JSON: Left and .*Same cannot be told apart"):
        TaskRegistry().task("echo", handler_of(Union[Left, Same]))
    with pytest.raises(ConfigurationError, match="cannot be told apart"):
        TaskRegistry().task("echo", handler_of(Union[Cat, Dog, Same, Left]))


def test_a_refused_class_stays_refused() -> None:
    """What was made on the way to a refusal is not used later."""

    @attrs.define
    class Node:
        kids: List[Node]
        data: bytes

    for _ in range(2):
        for annotation in (Node, List[Node]):
            with pytest.raises(ConfigurationError, match="bytes has no form in JSON"):
                TaskRegistry().task("echo", handler_of(annotation))


def test_classes_are_left_as_they_are() -> None:
    """Resolving the annotations of a dataclass or a named tuple changes nothing in it."""
    built(forward.Order, {"items": []})
    assert dataclasses.fields(forward.Order)[0].type == List["Item"]  # type: ignore[name-defined]
    assert forward.Pair.__annotations__["item"] == typing.ForwardRef("Item")


def test_a_default_for_what_json_does_not_give() -> None:
    """An InitVar with a default is the code's own matter, and a name that only it needs is not looked up."""

    @dataclasses.dataclass
    class Scaled:
        count: int
        scale: dataclasses.InitVar[OnlyForCheckers] = 2  # type: ignore[assignment]
        kept: typing.ClassVar[OnlyForCheckers]

        def __post_init__(self, scale: Any) -> None:
            self.count *= scale

    assert built(Scaled, {"count": 3, "scale": 5}) == Scaled(3)


def test_without_the_extra(tmp_path: pathlib.Path) -> None:
    """Without cattrs a typed input is refused with the extra's name; plain handlers and pydantic models are not."""
    code = """if True:
        import importlib.util, attrs, pydantic, sys
        find = importlib.util.find_spec
        importlib.util.find_spec = lambda name, *more: None if name == "cattrs" else find(name, *more)
        from sekuire import TaskRegistry, errors

        @attrs.define
        class Item:
            sku: str

        class Model(pydantic.BaseModel):
            sku: str

        def typed(ctx, input: Item): ...
        def plain(ctx, input: dict): ...
        def model(ctx, input: Model): ...

        tasks = TaskRegistry()
        tasks.task("plain", plain)
        print("sekuire.handlers.inputs" in sys.modules)
        tasks.task("model", model)
        try:
            tasks.task("typed", typed)
        except errors.ConfigurationError as error:
            print(error)
    """
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=GUARD, check=False
    )
    assert ran.returncode == 0, ran.stderr
    first, second = ran.stdout.splitlines()
    assert first == "False"
    assert second.startswith("task('typed'): typed (<string>:")
    assert second.endswith("a typed input needs an extra: pip install 'sekuire[typed]'")


# -- through a worker -------------------------------------------------------------------------------------------------


def test_through_a_worker(platform: Any, worker_of: Make, caplog: pytest.LogCaptureFixture) -> None:
    """Typed handlers get their classes, and their results go out as JSON; a mismatch is invalid_task with its path."""
    worker = worker_of(platform)
    seen: List[Any] = []

    @worker.middleware
    def watch(ctx: TaskContext, input: Any, call_next: Any) -> Any:
        seen.append(input)
        return call_next(input)

    @worker.on_task("order")
    def order(ctx: TaskContext, input: Order) -> Order:
        return dataclasses.replace(input, at=dt.datetime(2024, 1, 1, tzinfo=UTC))

    @worker.on_task("person")
    async def person(ctx: TaskContext, input: Person) -> Any:
        return {"person": input, "born": input.born}

    sent = {"items": [{"sku": "a", "count": 2}]}
    with worker:
        output = platform.wait(platform.submit("order", sent), GUARD)["output"]
        assert output == {
            "items": [{"sku": "a", "count": 2}], "at": "2024-01-01T00:00:00+00:00", "price": 0.0, "colour": "red",
            "before": None, "notes": {},
        }  # fmt: skip
        assert seen == [sent]
        output = platform.wait(platform.submit("person", {"fullName": "Ada", "born": "1815-12-10"}), GUARD)["output"]
        assert output["person"] == {"fullName": "Ada", "born": "1815-12-10", "address": None}
        assert output["born"] == "1815-12-10"
        with caplog.at_level(logging.WARNING, "sekuire.task"):
            task = platform.wait(platform.submit("order", {"items": [{"sku": SECRET, "count": SECRET}]}), GUARD)
    assert task["error"] == {
        "code": "invalid_task",
        "message": "input.items[0].count: expected an integer, got a string",
        "retryable": False,
        "details": {
            "problems": [{"path": "input.items[0].count", "problem": "expected an integer, got a string"}]
        },
    }  # fmt: skip
    assert any("the input does not fit" in record.getMessage() for record in caplog.records)
    assert SECRET not in caplog.text


def test_a_task_error_may_carry_values(platform: Any, worker_of: Make) -> None:
    """The details of a TaskError are put into JSON as results are."""
    worker = worker_of(platform)

    @worker.on_task("echo")
    def handler(ctx: TaskContext, input: Any) -> None:
        raise TaskError("own", details={"item": Item("a")})

    with worker:
        error = platform.wait(platform.submit("echo", None), GUARD)["error"]
    assert error["details"] == {"item": {"sku": "a", "count": 1}}


# -- results ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (Item("a"), {"sku": "a", "count": 1}),
        ([{"x": (Item("a"), Left(1))}], [{"x": [{"sku": "a", "count": 1}, {"left": 1}]}]),
        (Person(fullName="Ada"), {"fullName": "Ada", "born": None, "address": None}),
        (Point(x=1), {"x": 1}),
        (types.MappingProxyType({"a": Left(1)}), {"a": {"left": 1}}),
        ({1}, [1]),
        (frozenset(), []),
        ([Colour.RED, Level.LOW, Shape.ROUND], ["red", 1, "round"]),
        ({Colour.RED: 1, Level.LOW: 2, uuid.UUID(ID): 3, None: 4}, {"red": 1, 1: 2, ID: 3, None: 4}),
        (dt.datetime(2024, 1, 1, tzinfo=UTC), "2024-01-01T00:00:00+00:00"),
        (dt.date(2024, 1, 1), "2024-01-01"),
        (dt.time(1, 2), "01:02:00"),
        (decimal.Decimal("1.10"), "1.10"),
        (pathlib.PurePosixPath("a/b"), "a/b"),
    ],
)  # fmt: skip
def test_the_json_form_of_results(value: Any, wanted: Any) -> None:
    """What JSON lacks becomes what the documentation says, at any depth."""
    found = to_json(value)
    assert found == wanted
    json.dumps(found)


@pytest.mark.parametrize("value", [b"x", object(), 1j, dt.timedelta(1), {(1, 2): 1}, {object(): 1}, Item, Cow, len])
def test_what_has_no_json_form(value: Any) -> None:
    """What has no agreed form is refused, not guessed."""
    with pytest.raises(TypeError, match="has no JSON form"):
        to_json([value])


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        ("numpy.int64(3)", 3),
        ("numpy.bool_(True)", True),
        ("numpy.float32(1.5)", 1.5),
        ("numpy.array([[1, 2], [3, 4]])", [[1, 2], [3, 4]]),
        ("{numpy.int64(1): [numpy.uint8(2)]}", {1: [2]}),
        ("numpy.datetime64('2024-01-01')", "2024-01-01"),
    ],
)
def test_the_json_form_of_numpy(value: str, wanted: Any) -> None:
    """Numbers and arrays of numpy are results like any other."""
    found = to_json(eval(value, {"numpy": pytest.importorskip("numpy")}))
    assert found == wanted
    json.dumps(found)


def test_a_context_is_no_input() -> None:
    """The built value replaces the input, and nothing else."""
    tasks = TaskRegistry()
    seen: List[Any] = []

    @tasks.task("echo")
    def handler(ctx: TaskContext, input: Item) -> None:
        seen.append((ctx.task_id, input))

    tasks.freeze()
    entry = tasks.find("echo")
    assert entry is not None
    entry.call(context_of(), {"sku": "a"})
    assert seen == [("t1", Item("a"))]
