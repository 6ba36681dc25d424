"""Find the fields of the classes that inputs are built of, with their types resolved."""

from __future__ import annotations

import dataclasses
import sys
import types
import typing
from typing import Any, Dict, List, Optional, Sequence

import attrs

from ..errors import ConfigurationError

_FINAL: Any = typing.Final


def resolved(owner: Any, name: str, hint: Any) -> Any:
    """Resolve the annotation of a field: look its names up in the module of the class, and in the class itself."""
    names = {owner.__name__: owner, **vars(owner)}
    names.update((one.__name__, one) for one in getattr(owner, "__type_params__", ()))
    module = getattr(sys.modules.get(owner.__module__), "__dict__", {})
    found = hint
    try:
        # The module comes first, as with typing: a field may have the name of its class.
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
    """Make references of the strings in ``hint``, as in ``list["Item"]``. Python does it itself from 3.11 on."""
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
    """Return the class among the bases of ``cl`` that annotates ``name``."""
    return next((base for base in cl.__mro__ if name in vars(base).get("__annotations__", {})), cl)


def hints_of(cl: Any, names: Sequence[str]) -> Dict[str, Any]:
    """Return the resolved annotations of the fields ``names``."""
    owners = {name: owner_of(cl, name) for name in names}
    return {name: resolved(owner, name, vars(owner)["__annotations__"][name]) for name, owner in owners.items()}


def bound_of(cl: Any, outer: Optional[Dict[Any, Any]] = None) -> Dict[Any, Dict[Any, Any]]:
    """Return, for a class and each of its bases, the types that replace its type variables.

    A class and its base may both use ``T`` for different types. cattrs would look at the name alone.
    """
    origin = origin_of(cl)
    arguments = [filled(one, outer or {}) for one in typing.get_args(cl)]
    own = dict(zip(getattr(origin, "__parameters__", ()), arguments))
    bound = {origin: own}
    for base in vars(origin).get("__orig_bases__", origin.__bases__):
        bound.update(bound_of(base, own))
    return bound


def filled(hint: Any, bound: Dict[Any, Any]) -> Any:
    """Replace the type variables of ``hint``."""
    if isinstance(hint, typing.TypeVar):
        return bound.get(hint, hint)
    parameters = getattr(hint, "__parameters__", ()) if typing.get_origin(hint) else ()
    return hint[tuple(bound.get(one, one) for one in parameters)] if bound and parameters else hint


def fields_of(cl: Any) -> List[attrs.Attribute[Any]]:
    """Return the fields of an attrs class or a dataclass as attrs describes them, their types resolved."""
    origin, bound = origin_of(cl), bound_of(cl)
    fields = []
    for field in attrs.fields(origin) if attrs.has(origin) else map(_as_attrs, dataclasses.fields(origin)):
        owner = owner_of(origin, field.name)
        # A type of None is an annotation, or the lack of one.
        is_annotated = field.type is not None or field.name in vars(owner).get("__annotations__", {})
        hint = resolved(owner, field.name, field.type) if is_annotated else Any
        fields.append(field.evolve(type=filled(hint, bound.get(owner, {}))))
    return fields


#: A field of attrs to copy: attrs gives its class no constructor for others.
_FIELD: attrs.Attribute[Any] = attrs.fields(attrs.make_class("_Template", ["name"])).name


def _as_attrs(field: dataclasses.Field[Any]) -> attrs.Attribute[Any]:
    """Describe a field of a dataclass as attrs does."""
    default: Any = attrs.NOTHING if field.default is dataclasses.MISSING else field.default
    if field.default_factory is not dataclasses.MISSING:
        default = attrs.Factory(field.default_factory)
    return _FIELD.evolve(name=field.name, alias=field.name, default=default, init=field.init, type=field.type)


def bare(annotation: Any) -> Any:
    """Return ``annotation`` without ``Annotated``, ``Final`` and ``NewType``."""
    while True:
        if hasattr(annotation, "__supertype__"):
            annotation = annotation.__supertype__
        elif hasattr(annotation, "__metadata__") or typing.get_origin(annotation) is _FINAL:
            annotation = typing.get_args(annotation)[0]
        else:
            return annotation


def origin_of(annotation: Any) -> Any:
    """Return the class of an annotation with arguments, any other annotation itself."""
    return typing.get_origin(annotation) or annotation
