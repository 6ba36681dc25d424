"""Classes that refer to what is defined below them, without ``from __future__ import annotations``."""

import dataclasses
import typing
from typing import Dict, List, Optional, Tuple

import attrs


@dataclasses.dataclass
class Order:
    items: List["Item"]
    more: Optional[list["Item"]] = None
    later: "Optional[Order]" = None


@attrs.define
class Node:
    item: Optional["Item"] = None
    kids: List["Node"] = attrs.field(factory=list)
    by_name: Dict[str, "Node"] = attrs.field(factory=dict)


class Pair(typing.NamedTuple):
    item: "Item"
    kids: Tuple["Pair", ...]


class Tree(typing.TypedDict):
    item: "Item"
    kids: List["Tree"]


@dataclasses.dataclass
class Item:
    sku: str
    # Called as its class is.
    date: Optional["date"] = None


date = int


@dataclasses.dataclass
class Lost:
    count: int
    items: List["Nowhere"]  # type: ignore[name-defined]  # noqa: F821


@attrs.define
class LostNode:
    item: Optional["Nowhere"]  # type: ignore[name-defined]  # noqa: F821


class LostPair(typing.NamedTuple):
    count: int
    items: "List[Nowhere]"  # type: ignore[name-defined]  # noqa: F821


class LostDict(typing.TypedDict):
    item: "Nowhere"  # type: ignore[name-defined]  # noqa: F821
