"""The JSON Schemas of inputs and results: what is accepted validates, what is refused does not."""

from __future__ import annotations

import dataclasses
import datetime as dt
import decimal
import enum
import json
import pathlib
import uuid
from typing import Annotated, Any, Dict, List, Literal, NamedTuple, Optional, Set, Tuple, Union

import attrs
import jsonschema
import pydantic
import pytest
from annotated_types import Ge, Gt, Interval, Le, Len, MaxLen, MinLen, MultipleOf
from hypothesis import given, settings
from hypothesis import strategies as st
from typing_extensions import NotRequired, TypedDict

from sekuire import TaskContext, create_worker
from sekuire.errors import ConfigurationError
from sekuire.handlers import inputs, schemas
from sekuire.handlers.capabilities import MAX_SCHEMA
from sekuire.handlers.mismatch import Mismatch


class Color(enum.Enum):
    RED = "red"
    TWO = 2


@dataclasses.dataclass
class Line:
    sku: str
    count: Annotated[int, Gt(0), Le(99)] = 1


@attrs.define
class Order:
    lines: Annotated[List[Line], MinLen(1)]
    color: Color = Color.RED
    note: Optional[Annotated[str, MaxLen(5)]] = None
    inner: Optional[Order] = None
    secret: str = attrs.field(init=False, default="s")


class Options(TypedDict):
    speed: Literal["fast", "slow", 3]
    deep: NotRequired[bool]


class Pair(NamedTuple):
    name: str
    size: float


def accepts(annotation: Any, value: Any) -> bool:
    try:
        inputs.structure_of(annotation)(value)
    except Mismatch:
        return False
    return True


def validates(schema: Dict[str, Any], value: Any) -> bool:
    jsonschema.Draft202012Validator.check_schema(schema)
    return bool(jsonschema.Draft202012Validator(schema).is_valid(value))


# Not whole numbers with a point, nor integers beyond a float: JSON Schema counts both as what Python does not.
PARTS = st.sampled_from([0.5, -2.25, 1e-3, 99.5])
SCALARS = st.none() | st.booleans() | st.integers(-(10**6), 10**6) | PARTS | st.text(max_size=8)
NAMES = st.sampled_from(
    ["sku", "count", "lines", "color", "note", "inner", "speed", "deep", "name", "size", "red", "fast", "x"]
)
ANYTHING = st.recursive(
    SCALARS | st.sampled_from(["red", 2, "fast", 3]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=8,
)
LINES = st.fixed_dictionaries(
    {"sku": st.text(max_size=3)}, optional={"count": st.sampled_from([-1, 0, 1, 99, 100]), "x": SCALARS}
)
ORDERS = st.recursive(
    st.fixed_dictionaries(
        {"lines": st.lists(LINES, max_size=2)},
        optional={"color": SCALARS | st.sampled_from(["red", 2]), "note": st.none() | st.text(max_size=7)},
    ),
    lambda inner: st.fixed_dictionaries({"lines": st.lists(LINES, min_size=1, max_size=2), "inner": inner}),
    max_leaves=3,
)
#: A kind of annotation, and values of which many fit it.
KINDS: List[Tuple[Any, Any]] = [
    (int, st.integers(-5, 5)),
    (float, PARTS | st.integers(-5, 5)),
    (str, st.text(max_size=3)),
    (bool, st.booleans()),
    (type(None), st.none()),
    (Color, st.sampled_from(["red", 2, "two"])),
    (Literal["a", 1, True, None], st.sampled_from(["a", 1, True, False, None, 0])),
    (Line, LINES),
    (Order, ORDERS),
    (Options, st.fixed_dictionaries({"speed": st.sampled_from(["fast", 3, "x"])}, optional={"deep": SCALARS})),
    (Pair, st.tuples(st.text(max_size=2), PARTS).map(list)),
    (Annotated[int, Interval(ge=2, lt=5)], st.integers(0, 7)),
    (Annotated[int, Ge(2), Ge(4), MultipleOf(3)], st.integers(0, 12)),
    (Annotated[str, Len(1, 2)], st.text(max_size=4)),
    (Annotated[Dict[str, int], MaxLen(1)], st.dictionaries(NAMES, st.integers(), max_size=2)),
    (Annotated[Optional[int], Gt(3)], st.sampled_from([None, 2, 3, 4])),
    (Annotated[Union[str, List[int]], MinLen(2)], st.text(max_size=3) | st.lists(st.integers(), max_size=3)),
    (Dict[Color, int], st.dictionaries(st.sampled_from(["red", "blue"]), st.integers(0, 2), max_size=2)),
    (Any, ANYTHING),
]


@st.composite
def typed_values(draw: Any) -> Tuple[Any, Any]:
    """An annotation and a value, which may fit it or not."""
    annotation, values = draw(st.sampled_from(KINDS))
    for _ in range(draw(st.integers(0, 2))):
        other, others = draw(st.sampled_from(KINDS))
        # Hashed by value, `List[Literal[1]]` would be `List[Literal[True]]`: the annotations here are few and distinct.
        around = draw(st.sampled_from(["list", "dict", "tuple", "many", "optional", "union"]))
        if around == "list":
            annotation, values = List[annotation], st.lists(values, max_size=3)
        elif around == "dict":
            annotation, values = Dict[str, annotation], st.dictionaries(NAMES, values, max_size=3)
        elif around == "tuple":
            annotation, values = Tuple[annotation, other], st.tuples(values, others).map(list)
        elif around == "many":
            annotation, values = Tuple[annotation, ...], st.lists(values, max_size=3)
        elif around == "optional":
            annotation, values = Optional[annotation], st.none() | values
        elif other not in (Line, Order, Any) and annotation is not Any:
            # Of two classes an input chooses one by its fields.
            annotation, values = Union[annotation, other], values | others
    # Drawn in two steps: each kind of anything would count as much as all that may fit.
    return annotation, draw(values if draw(st.integers(0, 3)) else ANYTHING)


@settings(max_examples=600, deadline=None)
@given(typed_values())
def test_inputs_and_schemas_agree(drawn: Tuple[Any, Any]) -> None:
    """An accepted input validates, a refused one does not."""
    annotation, value = drawn
    assert validates(schemas.input_schema(annotation), value) is accepts(annotation, value)


def test_every_kind_has_a_schema() -> None:
    """The walk of the schemas has a step for each step of the walk that builds inputs."""
    assert {make for _, make in inputs.KINDS} == set(schemas._MAKERS)


@pytest.mark.parametrize(
    ("annotation", "schema", "value"),
    [
        (dt.datetime, {"type": "string", "format": "date-time"}, "2026-01-01T00:00:00Z"),
        (dt.date, {"type": "string", "format": "date"}, "2026-01-01"),
        (dt.time, {"type": "string", "format": "time"}, "23:59:59"),
        (uuid.UUID, {"type": "string", "format": "uuid"}, "12345678-1234-5678-1234-567812345678"),
        (pathlib.Path, {"type": "string"}, "/tmp/x"),
        (decimal.Decimal, {"type": ["number", "string"]}, "1.50"),
        (Set[int], {"type": "array", "items": {"type": "integer"}}, [1, 1]),
        (Annotated[Set[int], Len(1, 1)], {"type": "array", "items": {"type": "integer"}, "minItems": 1,
                                          "minLength": 1, "minProperties": 1, "maxLength": 1, "maxProperties": 1},
         [1, 1]),
        (Annotated[float, MultipleOf(0.1)], {"type": "number"}, 0.3),
        (Annotated[dt.date, Gt(dt.date(2020, 1, 1))], {"type": "string", "format": "date"}, "2026-01-01"),
    ],
)  # fmt: skip
def test_what_json_schema_cannot_say(annotation: Any, schema: Dict[str, Any], value: Any) -> None:
    """Where the two differ, the schema accepts more, never less."""
    assert schemas.input_schema(annotation) == schema
    assert accepts(annotation, value)
    assert validates(schema, value)


def test_definitions() -> None:
    """A class that holds itself is referred to, one that is used once at the top stands there, names are apart."""
    found = schemas.input_schema(Order)
    assert found["$ref"] == "#/$defs/Order"
    assert set(found["$defs"]) == {"Order", "Line"}
    assert found["$defs"]["Order"]["required"] == ["lines"]
    assert "secret" not in found["$defs"]["Order"]["properties"]
    assert schemas.input_schema(Line) == {
        "type": "object", "title": "Line", "required": ["sku"],
        "properties": {
            "sku": {"type": "string"},
            "count": {"type": "integer", "exclusiveMinimum": 0, "maximum": 99},
        },
    }  # fmt: skip
    first = dataclasses.make_dataclass("Same", [("a", int)])
    second = dataclasses.make_dataclass("Same", [("b", int)])
    found = schemas.input_schema(Tuple[first, second])  # type: ignore[valid-type]
    assert [one["$ref"] for one in found["prefixItems"]] == ["#/$defs/Same", "#/$defs/Same2"]


def test_results() -> None:
    """All fields are there in a result, and values are as they become in JSON."""
    found = schemas.output_schema(Order)["$defs"]["Order"]
    assert found["required"] == ["lines", "color", "note", "inner", "secret"]
    assert schemas.output_schema(Dict[int, decimal.Decimal]) == {
        "type": "object", "additionalProperties": {"type": "string"},
    }  # fmt: skip
    assert schemas.output_schema(object) == {}
    assert schemas.output_schema(Annotated[int, Gt(3)]) == {"type": "integer"}


def test_pydantic_describes_its_models() -> None:
    """Its own schema is used, alone and inside of others."""

    class Item(pydantic.BaseModel):
        size: int = pydantic.Field(gt=0)

    found = schemas.input_schema(List[Item])
    assert validates(found, [{"size": 1}])
    assert not validates(found, [{"size": 0}])
    assert "size" in schemas.output_schema(Item)["properties"]


def test_what_a_worker_can_do() -> None:
    """Names, the first line of each docstring, and schemas; what is not known is left out."""
    worker = create_worker(agent_id="a", install_token="skt-1", capabilities=["later"])

    @worker.on_task("order")
    async def order(ctx: TaskContext, input: Order) -> List[Line]:
        """Place an order.

        More of it.
        """
        return input.lines

    @worker.on_task("plain")
    def plain(ctx: TaskContext, input: Dict[str, Any]) -> None: ...

    class Callable:
        """Not what it does."""

        def __call__(self, ctx: Any, input: Any) -> Any: ...

    worker.on_task("object", Callable())
    worker.on_task("odd", odd)
    worker.on_task("*", lambda ctx, input: None)
    found = {one.pop("name"): one for one in worker.capability_info()}
    assert list(found) == ["later", "order", "plain", "object", "odd"]
    assert found["later"] == found["object"] == found["odd"] == {}
    assert found["order"]["description"] == "Place an order."
    assert found["order"]["input_schema"] == schemas.input_schema(Order)
    assert found["order"]["output_schema"]["items"] == {"$ref": "#/$defs/Line"}
    assert found["plain"] == {"output_schema": {"type": "null"}}
    json.dumps(found)

    @worker.on_task("wrong")
    def wrong(ctx: TaskContext, input: Any, *, db: int) -> None: ...

    with pytest.raises(ConfigurationError, match="asks for 'db'"):
        worker.capability_info()


def odd(ctx: Any, input: Any) -> NoSuchName: ...  # type: ignore[name-defined]  # noqa: F821


def test_a_schema_that_is_too_large(caplog: pytest.LogCaptureFixture) -> None:
    """It is left out, with a warning that names it."""
    names = [(f"a_field_with_a_long_name_{number}", int) for number in range(MAX_SCHEMA // 40)]
    large = dataclasses.make_dataclass("Large", names)

    def handler(ctx: Any, input: Any) -> None:
        """Be large."""

    handler.__annotations__["input"] = large
    worker = create_worker(agent_id="a", install_token="skt-1")
    worker.on_task("large", handler)
    assert "input_schema" not in worker.capability_info()[0]
    assert "the input_schema of large has" in caplog.text
