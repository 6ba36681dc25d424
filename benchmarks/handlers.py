"""Handlers that do nothing, in each of the forms that are measured; at the top level, for processes to import."""

from __future__ import annotations

import dataclasses
from typing import Any, Dict, List, Optional

import pydantic
from typing_extensions import TypedDict

from sekuire import TaskContext

from . import payloads

_RESULT = payloads.result()


@dataclasses.dataclass
class Customer:
    id: int
    name: str
    country: str
    verified: bool


@dataclasses.dataclass
class Line:
    sku: str
    quantity: int
    price: float
    gift: bool


@dataclasses.dataclass
class Order:
    sent_ns: int
    order_id: str
    customer: Customer
    lines: List[Line]
    note: str
    discount: Optional[float] = None


class CustomerDict(TypedDict):
    id: int
    name: str
    country: str
    verified: bool


class LineDict(TypedDict):
    sku: str
    quantity: int
    price: float
    gift: bool


class OrderDict(TypedDict):
    sent_ns: int
    order_id: str
    customer: CustomerDict
    lines: List[LineDict]
    note: str
    discount: Optional[float]


class CustomerModel(pydantic.BaseModel):
    id: int
    name: str
    country: str
    verified: bool


class LineModel(pydantic.BaseModel):
    sku: str
    quantity: int
    price: float
    gift: bool


class OrderModel(pydantic.BaseModel):
    sent_ns: int
    order_id: str
    customer: CustomerModel
    lines: List[LineModel]
    note: str
    discount: Optional[float] = None


@dataclasses.dataclass
class Result:
    accepted: bool
    score: float
    order_id: str
    note: str


def plain(ctx: TaskContext, input: Dict[str, Any]) -> Dict[str, Any]:
    return _RESULT


def sharing(ctx: TaskContext, input: Dict[str, Any], *, shared: int) -> Dict[str, Any]:
    return _RESULT


async def later(ctx: TaskContext, input: Dict[str, Any]) -> Dict[str, Any]:
    return _RESULT


def dataclass_in(ctx: TaskContext, input: Order) -> Dict[str, Any]:
    return _RESULT


def typed_dict_in(ctx: TaskContext, input: OrderDict) -> Dict[str, Any]:
    return _RESULT


def pydantic_in(ctx: TaskContext, input: OrderModel) -> Dict[str, Any]:
    return _RESULT


def dataclass_out(ctx: TaskContext, input: Dict[str, Any]) -> Result:
    return Result(**_RESULT)
