"""Make a form from the JSON Schema of a capability's input, read what was typed, and check it against the schema."""

from __future__ import annotations

import json
import math
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

import attrs
import jsonschema
import referencing

from ..fields import decode_object
from ..store import Refusal

__all__ = ["Field", "Problem", "fields_of", "problems_of", "read_fields", "read_json"]

#: How deep objects within objects become fields. Below it they are JSON.
_DEEPEST = 4
_MOST_FIELDS = 200
_MOST_PROBLEMS = 50
_MOST_REFERENCES = 20

Path = Tuple[Union[str, int], ...]


class Problem(NamedTuple):
    """Say what is wrong, and where in the input."""

    path: str
    text: str


@attrs.define
class Field:
    """Describe one field of a form. ``name`` is that of its control: ``f`` and the path in the input."""

    name: str
    path: str
    label: str
    #: ``group``, ``text``, ``long``, ``number``, ``check``, ``choice``, ``lines`` or ``json``.
    kind: str
    hint: str
    is_required: bool
    value: Any = ""
    choices: Sequence[str] = ()
    step: str = "any"
    low: Any = None
    high: Any = None
    fields: List[Field] = attrs.Factory(list)
    problem: str = ""


def fields_of(schema: Mapping[str, Any], value: Any = None) -> Optional[List[Field]]:
    """Return the fields for a schema, filled with a value. Return None if the input is not an object with names."""
    reader = _Reader(schema)
    plain = reader.plain(schema)
    if plain.get("type") != "object" or not isinstance(plain.get("properties"), dict) or not plain["properties"]:
        return None
    return reader.fields(plain, (), value if isinstance(value, dict) else {}, 0)


class _Reader:
    """Read one schema."""

    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root = root
        self._left = _MOST_FIELDS

    def plain(self, schema: Any) -> Mapping[str, Any]:
        """Follow references within the schema, and choose the type beside null."""
        for _ in range(_MOST_REFERENCES):
            if not isinstance(schema, dict):
                return {}
            reference = schema.get("$ref")
            options = schema.get("anyOf") or schema.get("oneOf")
            if isinstance(reference, str) and reference.startswith("#/"):
                more = {key: value for key, value in schema.items() if key != "$ref"}
                schema = {**_at(self._root, reference), **more}
            elif isinstance(schema.get("allOf"), list) and len(schema["allOf"]) == 1:
                more = {key: value for key, value in schema.items() if key != "allOf"}
                schema = {**_dict(schema["allOf"][0]), **more}
            elif isinstance(options, list):
                real = [one for one in options if _dict(one).get("type") != "null"]
                if len(real) != 1:
                    return {key: value for key, value in schema.items() if key not in ("anyOf", "oneOf", "type")}
                more = {key: value for key, value in schema.items() if key not in ("anyOf", "oneOf")}
                schema = {**_dict(real[0]), **more}
            else:
                kind = schema.get("type")
                if isinstance(kind, list):
                    real = [one for one in kind if one != "null"]
                    return {**schema, "type": real[0] if len(real) == 1 else None}
                return schema
        return {}

    def fields(self, schema: Mapping[str, Any], path: Path, value: Mapping[str, Any], depth: int) -> List[Field]:
        required = schema.get("required")
        names = required if isinstance(required, list) else []
        found = []
        for name, part in _dict(schema.get("properties")).items():
            if self._left <= 0:
                break
            self._left -= 1
            found.append(self._field(self.plain(part), (*path, name), name in names, value, depth))
        return found

    def _field(
        self, schema: Mapping[str, Any], path: Path, is_required: bool, values: Mapping[str, Any], depth: int
    ) -> Field:
        name = str(path[-1])
        is_given = name in values
        value = values.get(name, schema.get("default"))
        title = schema.get("title")
        field = Field(
            name=_name(path),
            path=_text(path),
            label=name,
            kind="json",
            hint=str(schema.get("description") or (title if isinstance(title, str) and title != name else "")),
            is_required=is_required,
            low=_number(schema.get("minimum")),
            high=_number(schema.get("maximum")),
        )
        kind, choices = schema.get("type"), schema.get("enum")
        if isinstance(choices, list) and choices and all(isinstance(one, str) for one in choices):
            field.kind, field.choices = "choice", choices
            field.value = value if isinstance(value, str) else ""
        elif kind == "string":
            long = schema.get("maxLength")
            field.value = value if isinstance(value, str) else ""
            field.kind = "long" if "\n" in field.value or (isinstance(long, int) and long > 200) else "text"
        elif kind in ("integer", "number"):
            field.kind, field.step = "number", "1" if kind == "integer" else "any"
            field.value = "" if value is None else json.dumps(value)
        elif kind == "boolean":
            field.kind, field.value = "check", value is True
        elif kind == "object" and _dict(schema.get("properties")) and depth < _DEEPEST:
            field.kind = "group"
            field.fields = self.fields(schema, path, _dict(value), depth + 1)
        elif kind == "array" and self.plain(schema.get("items")).get("type") == "string":
            field.kind = "lines"
            field.value = "\n".join(map(str, value)) if isinstance(value, list) else ""
        else:
            field.value = json.dumps(value, indent=2, ensure_ascii=False) if is_given or value is not None else ""
        return field


def read_fields(fields: Sequence[Field], form: Mapping[str, str]) -> Tuple[Dict[str, Any], List[Problem]]:
    """Return the input that was typed into the fields, which keep it, and what cannot be read."""
    value: Dict[str, Any] = {}
    problems: List[Problem] = []
    for field in fields:
        key = field.label
        text = form.get(field.name, "").replace("\r\n", "\n")
        if field.kind == "group":
            inner, wrong = read_fields(field.fields, form)
            problems += wrong
            if field.is_required or _is_typed(field, form):
                value[key] = inner
            continue
        if field.kind == "check":
            field.value = field.name in form
            if field.value or field.is_required:
                value[key] = field.value
            continue
        field.value = text
        if field.kind in ("text", "long", "choice"):
            # An empty text is a text only where one is needed.
            if text or (field.is_required and field.kind != "choice"):
                value[key] = text
        elif field.kind == "lines":
            lines = [line for line in text.split("\n") if line.strip()]
            if lines or field.is_required:
                value[key] = lines
        elif text.strip():
            try:
                value[key] = _decode(text)
            except Refusal as refusal:
                problems.append(Problem(field.path, refusal.message))
    return value, problems


def _is_typed(field: Field, form: Mapping[str, str]) -> bool:
    if field.kind == "group":
        return any(_is_typed(one, form) for one in field.fields)
    return bool(form.get(field.name, "").strip())


def read_json(text: str) -> Tuple[Any, Optional[str]]:
    """Return the value that a JSON text is, and what is wrong with the text."""
    try:
        return _decode(text), None
    except Refusal as refusal:
        return None, refusal.message


def _decode(text: str) -> Any:
    """Return any JSON value, by the rules for the bodies of requests.

    :raises Refusal: it is none; the message names the line.
    """
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        problem = f"not JSON: {error.msg} (line {error.lineno}, column {error.colno})"
    except (ValueError, RecursionError):
        problem = "not JSON that every program reads"
    else:
        return decode_object(f'{{"value":{text}}}'.encode("utf-8", "surrogatepass"))["value"]
    raise Refusal(400, "INVALID_JSON", problem)


def problems_of(schema: Mapping[str, Any], value: Any) -> List[Problem]:
    """Return what of a value does not fit a schema. A schema that cannot be used refuses nothing."""
    try:
        # With a registry of its own it fetches nothing that a schema refers to.
        validator = jsonschema.Draft202012Validator(schema, registry=referencing.Registry())
        errors = sorted(validator.iter_errors(value), key=lambda error: [str(one) for one in error.absolute_path])
    except Exception:  # noqa: BLE001  # Another program may publish anything as a schema.
        return []
    return [_problem(error) for error in errors[:_MOST_PROBLEMS]]


def _problem(error: Any) -> Problem:
    path = tuple(error.absolute_path)
    if error.validator == "required" and isinstance(error.instance, dict):
        missing = [name for name in error.validator_value if name not in error.instance]
        if missing:
            return Problem(_text((*path, missing[0])), "is needed")
    return Problem(_text(path), error.message[:300])


def mark(fields: Sequence[Field], problems: Sequence[Problem]) -> List[Problem]:
    """Put each problem beside its field, and return those that have none."""
    left = list(problems)
    for field in fields:
        if field.kind == "group":
            left = mark(field.fields, left)
        mine = [
            one for one in left if one.path == field.path or one.path.startswith((f"{field.path}.", f"{field.path}["))
        ]
        if mine:
            field.problem = "; ".join(one.text for one in mine)
            left = [one for one in left if one not in mine]
    return left


def _at(root: Mapping[str, Any], reference: str) -> Mapping[str, Any]:
    found: Any = root
    for part in reference[2:].split("/"):
        found = _dict(found).get(part.replace("~1", "/").replace("~0", "~"))
    return _dict(found)


def _dict(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> Optional[float]:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return value if is_number else None


def _name(path: Path) -> str:
    return "f" + "".join("/" + str(one).replace("~", "~0").replace("/", "~1") for one in path)


def _text(path: Path) -> str:
    text = ""
    for one in path:
        text += f"[{one}]" if isinstance(one, int) else (f".{one}" if text else str(one))
    return text
