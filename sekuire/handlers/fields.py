"""The fields of the classes that inputs are built of: their types resolved, whichever way a class is written."""

from __future__ import annotations

import dataclasses
import sys
import types
import typing
from typing import Any, Dict, List, Optional, Sequence

import attrs

from ..errors import ConfigurationError


def resolved(owner: Any, name: str, hint: Any) -> Any:
    """The annotation of a field, its names looked up in the module of the class, and the class itself."""
    names = {owner.__name__: owner, **vars(owner)}
    names.update((one.__name__, one) for one in getattr(owner, "__type_params__", ()))
    module = getattr(sys.modules.get(owner.__module__), "__dict__", {})
    found = hint
    try:
        # The module first, as typing does: a field may be called as its class is.
        while True:
            holder = type(owner.__name__, (), {"__annotations__": {name: found}})
            found = typing.get_type_hints(holder, names, module, include_extras=True)[name]
            following = _with_references(found)
            if following is found:
                return found
            found = following
    except Exception as error:  # noqa: BLE001  # The annotation is code.
        problem = f"{type(error).__name__}: {error}"
    raise ConfigurationError(
        f"the annotation {getattr(hint, '__forward_arg__', hint)!r} of {owner.__qualname__}.{name} cannot be resolved "
        f"({problem}); define or import it at the top level of the class's module, above the handler"
    )


def _with_references(hint: Any) -> Any:
    """``hint`` with strings in it, as in ``list["Item"]``, made references: Python does that itself from 3.11 on."""
    arguments = getattr(hint, "__args__", ())
    is_builtin = isinstance(hint, types.GenericAlias)
    made = [
        typing.ForwardRef(one) if is_builtin and isinstance(one, str) else _with_references(one) for one in arguments
    ]
    if all(one is other for one, other in zip(made, arguments)):
        return hint
    origin: Any = typing.get_origin(hint)
    return types.GenericAlias(origin, tuple(made)) if is_builtin else hint.copy_with(tuple(made))


def owner_of(cl: Any, name: str) -> Any:
    """The class among the bases of ``cl`` that annotates ``name``."""
    return next((base for base in cl.__mro__ if name in vars(base).get("__annotations__", {})), cl)


def hints_of(cl: Any, names: Sequence[str]) -> Dict[str, Any]:
    owners = {name: owner_of(cl, name) for name in names}
    return {name: resolved(owner, name, vars(owner)["__annotations__"][name]) for name, owner in owners.items()}


def bound_of(cl: Any, outer: Optional[Dict[Any, Any]] = None) -> Dict[Any, Dict[Any, Any]]:
    """What stands for the type variables of a class and of each of its bases."""
    origin = origin_of(cl)
    arguments = [filled(one, outer or {}) for one in typing.get_args(cl)]
    own = dict(zip(getattr(origin, "__parameters__", ()), arguments))
    bound = {origin: own}
    for base in vars(origin).get("__orig_bases__", origin.__bases__):
        bound.update(bound_of(base, own))
    return bound


def filled(hint: Any, bound: Dict[Any, Any]) -> Any:
    """``hint`` with what stands for its type variables."""
    if isinstance(hint, typing.TypeVar):
        return bound.get(hint, hint)
    parameters = getattr(hint, "__parameters__", ()) if typing.get_origin(hint) else ()
    return hint[tuple(bound.get(one, one) for one in parameters)] if bound and parameters else hint


def fields_of(cl: Any) -> List[attrs.Attribute[Any]]:
    """The fields of an attrs class or a dataclass, as attrs describes them, their types resolved."""
    origin, bound = origin_of(cl), bound_of(cl)
    fields = []
    for field in attrs.fields(origin if attrs.has(origin) else _as_attrs(origin)):
        owner = owner_of(origin, field.name)
        # None may be the annotation, or stand for none.
        is_annotated = field.type is not None or field.name in vars(owner).get("__annotations__", {})
        hint = resolved(owner, field.name, field.type) if is_annotated else Any
        fields.append(field.evolve(type=filled(hint, bound.get(owner, {}))))
    return fields


def _as_attrs(cl: Any) -> Any:
    """An attrs class with the fields of a dataclass: nothing of the dataclass itself is touched."""
    fields = {}
    for field in dataclasses.fields(cl):
        default: Any = attrs.NOTHING
        if field.default is not dataclasses.MISSING:
            default = field.default
        elif field.default_factory is not dataclasses.MISSING:
            default = attrs.Factory(field.default_factory)
        hint: Any = field.type
        fields[field.name] = attrs.field(default=default, init=field.init, kw_only=True, type=hint, alias=field.name)
    return attrs.make_class(cl.__name__, fields, init=False, repr=False, eq=False)


def origin_of(annotation: Any) -> Any:
    return typing.get_origin(annotation) or annotation
