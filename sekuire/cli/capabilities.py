"""Show what a worker can do, with the schemas of its inputs and results: ``sekuire capabilities``."""

from __future__ import annotations

import argparse
import json
from typing import Any, Dict, Iterator

from .._internal.unstarted import forget_all
from . import terminal
from .exits import OK
from .worker import find

DESCRIPTION = """\
Show the capabilities of a worker, with the first line of each handler's docstring, and the fields of its input and its
result. The worker is not started."""
EPILOG = """\
example:  sekuire capabilities tasks:worker --json

Exit codes: 0 shown; 1 the module failed; 2 the module or its declarations are wrong."""
LOG_LEVEL = "warning"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="MODULE:NAME", help="the worker, or a function that returns one")
    parser.add_argument("--json", action="store_true", help="print all, the JSON Schemas included, as JSON")


def run(args: argparse.Namespace) -> int:
    worker = find(args.target)
    try:
        found = worker.capability_info()
    finally:
        worker.stop(0)
        if worker.sdk is not None:
            # The function that made the worker may have started it.
            worker.sdk.shutdown(0)
        # Others that the module makes are not meant to start here either.
        forget_all()
    if args.json:
        terminal.say(json.dumps({"capabilities": found}, indent=2, ensure_ascii=False))
        return OK
    for one in found:
        terminal.say(one["name"] + (f": {one['description']}" if "description" in one else ""))
        for key, title in (("input_schema", "input"), ("output_schema", "result")):
            if key in one:
                for line in _lines(title, one[key]):
                    terminal.say(f"  {line}")
    return OK


def _lines(title: str, schema: Dict[str, Any]) -> Iterator[str]:
    """Yield a line for the schema, and one for each field of an object."""
    definitions = schema.get("$defs", {})
    yield f"{title}: {_kind(schema)}"
    whole = definitions.get(schema.get("$ref", "").rpartition("/")[2], schema)
    required = whole.get("required", ())
    for name, one in whole.get("properties", {}).items():
        yield f"  {name}: {_kind(one)}{'' if name in required else ', optional'}"


def _kind(schema: Dict[str, Any]) -> str:
    """Describe a schema in a few words."""
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    if "enum" in schema:
        return "one of " + ", ".join(json.dumps(one, ensure_ascii=False) for one in schema["enum"])
    if "anyOf" in schema:
        return " or ".join(_kind(one) for one in schema["anyOf"])
    kind = schema.get("type", "anything")
    if kind == "array" and "items" in schema:
        return f"array of {_kind(schema['items'])}"
    if kind == "object" and "title" in schema:
        return str(schema["title"])
    return " or ".join(kind) if isinstance(kind, list) else str(kind)
