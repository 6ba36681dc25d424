"""Describe capabilities for the platform: name, description, and the schemas of input and result."""

from __future__ import annotations

import inspect
import json
from typing import Any, Dict, Iterable, List, Optional, Tuple

from .._internal.logs import get_logger
from ..errors import ConfigurationError
from ..wire.protocol import MAX_SCHEMA
from .invoke import Handler, asked_for, returned_by

__all__ = ["describe"]

log = get_logger("sekuire.worker")

#: Characters of a description.
_MAX_DESCRIPTION = 500


def describe(capabilities: Iterable[Tuple[str, Optional[Handler]]]) -> List[Dict[str, Any]]:
    """Return what is known of each capability: ``name``, ``description``, ``input_schema``, ``output_schema``.

    What is not known is left out.

    :param capabilities: names with their handlers, None where there is none.
    """
    return [_described(name, handler) for name, handler in capabilities]


def _described(name: str, handler: Optional[Handler]) -> Dict[str, Any]:
    found: Dict[str, Any] = {"name": name}
    if handler is None:
        return found
    description = _first_line(handler)
    if description:
        found["description"] = description
    for key, annotation in (("input_schema", asked_for(handler)), ("output_schema", _returned(handler))):
        if annotation is None:
            continue
        from . import schemas  # Only for handlers with annotations.

        make = schemas.input_schema if key == "input_schema" else schemas.output_schema
        try:
            _add(found, key, make(annotation))
        except Exception as error:  # noqa: BLE001  # It may be of any class, and its schema is only a help.
            log.debug("%s has no %s (%s: %s)", name, key, type(error).__name__, error)
    return found


def _add(found: Dict[str, Any], key: str, schema: Dict[str, Any]) -> None:
    if not schema:
        return
    size = len(json.dumps(schema).encode())
    if size > MAX_SCHEMA:
        log.warning("the %s of %s has %d bytes, more than the %d that are published; it is left out",
                    key, found["name"], size, MAX_SCHEMA)  # fmt: skip
        return
    found[key] = schema


def _first_line(handler: Handler) -> str:
    # An object has the docstring of its class, which describes something else.
    text = inspect.getdoc(handler if inspect.isroutine(handler) else type(handler).__call__) or ""
    return text.strip().partition("\n")[0].strip()[:_MAX_DESCRIPTION] if not _is_builtin(handler) else ""


def _is_builtin(handler: Handler) -> bool:
    return not inspect.isroutine(handler) and not hasattr(type(handler).__call__, "__code__")


def _returned(handler: Handler) -> Any:
    try:
        return returned_by(handler)
    except ConfigurationError as error:
        # Nothing depends on it.
        log.debug("%s", error)
        return None
