"""Calculate the SekuireID of an agent from what it is made of (docs/protocol.md, "Identity"). ::

    from sekuire.identity import sekuire_id

    print(sekuire_id(model="gpt-4o", system_prompt="You are helpful.", tools=None))

It needs the extra: ``pip install 'sekuire[policy]'``.
"""

from __future__ import annotations

import json
from typing import Any

from .errors import ConfigurationError

__all__ = ["sekuire_id"]

#: How deep the tools may be nested.
_MAX_DEPTH = 64


def sekuire_id(*, model: str, system_prompt: str, tools: Any = None) -> str:
    """Return the SekuireID of an agent: 64 hex digits, the same for the same model, prompt and tools.

    >>> from sekuire.identity import sekuire_id
    >>> sekuire_id(model="gpt-4o", system_prompt="You are helpful.")[:16]
    '76ef25531c704d01'

    The name and the version of a project do not enter. Spaces and line ends around the prompt do not count.

    :param model: the model's name.
    :param system_prompt: the whole prompt.
    :param tools: the tools' definitions, as they stand in a JSON file. None counts as an empty list.
    :raises ConfigurationError: a value has another type, ``tools`` has no JSON form, or the extra is not installed.
    """
    for option, value in (("model", model), ("system_prompt", system_prompt)):
        if not isinstance(value, str):
            raise ConfigurationError(f"must be a str, got {type(value).__name__}", option)
    if not model.strip():
        raise ConfigurationError("must name a model, and is empty", "model")
    text = _canonical([] if tools is None else tools)
    return _digest(f"model:{model}|prompt:{_digest(system_prompt.strip(), 'system_prompt')}|tools:{text}", "model")


def _canonical(tools: Any) -> str:
    """Return the hash of the tools' compact JSON with sorted keys."""
    problem = ""
    try:
        _check_keys(tools)
        text = json.dumps(tools, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        return _digest(text, "tools")
    except ConfigurationError:
        raise
    except RecursionError:
        problem = "is nested too deep"
    except (TypeError, ValueError) as error:
        problem = str(error)
    raise ConfigurationError(f"has no JSON form: {problem}", "tools")


def _check_keys(value: Any) -> None:
    """Check that all keys are texts: json.dumps would write others as text, and two objects would be one."""
    waiting = [(value, 0)]
    while waiting:
        item, depth = waiting.pop()
        if depth > _MAX_DEPTH:
            raise ValueError(f"it is nested deeper than {_MAX_DEPTH} levels")
        if isinstance(item, dict):
            for key in item:
                if not isinstance(key, str):
                    raise TypeError(f"it has the key {key!r}, which is not a str")
            waiting.extend((inner, depth + 1) for inner in item.values())
        elif isinstance(item, (list, tuple)):
            waiting.extend((inner, depth + 1) for inner in item)


def _digest(text: str, option: str) -> str:
    problem = ""
    try:
        from blake3 import blake3

        return blake3(text.encode("utf-8")).hexdigest()
    except ImportError:
        problem = "needs the package 'blake3': pip install 'sekuire[policy]'"
        option = "sekuire_id"
    except UnicodeEncodeError:
        problem = "holds a lone surrogate, which is not a character"
    raise ConfigurationError(problem, option)
