"""Say what is wrong in an input that does not fit its annotation, and where, without the value itself."""

from __future__ import annotations

import traceback
import types
from typing import Any, Dict, Iterator, Sequence, Tuple, Union

import attrs

__all__ = ["Mismatch"]

Path = Tuple[Union[str, int], ...]

#: Problems that are reported of one input, and characters of a name or a validator's text.
MAX_PROBLEMS = 10
MAX_NAME, MAX_TEXT = 60, 200


class Mismatch(Exception):
    """Report that an input does not fit its annotation.

    ``problems`` are pairs of a path in the input and what is wrong there.
    """

    def __init__(self, problems: Sequence[Tuple[Path, str]]) -> None:
        super().__init__(problems)
        self.problems = problems

    def details(self) -> Dict[str, Any]:
        """Return the ``details`` of the task's failure."""
        shown = self.problems[:MAX_PROBLEMS]
        return {"problems": [{"path": _text_of(path), "problem": problem} for path, problem in shown]}

    def __str__(self) -> str:
        path, problem = self.problems[0]
        more = len(self.problems) - 1
        return f"{_text_of(path)}: {problem}" + (f" (and {more} more)" if more else "")


def expected(what: str, value: Any) -> Mismatch:
    """Return the mismatch of a value of another kind."""
    return Mismatch([((), f"expected {what}, got {kind_of(value)}")])


def kind_of(value: Any) -> str:
    """Name the kind of ``value``, never the value: it may be a secret in the wrong place."""
    if value is None:
        return "null"
    for kind, name in (
        (bool, "a boolean"), (int, "an integer"), (float, "a number"), (str, "a string"), (list, "an array"),
        (dict, "an object"),
    ):  # fmt: skip
        if isinstance(value, kind):
            return name
    return f"a {type(value).__name__}"


def problems_of(error: BaseException) -> Iterator[Tuple[Path, str]]:
    """Yield the problems in an error of a hook, of cattrs or of a class's own code.

    ``cattrs.transform_error`` writes a path as text and does not cut names, so it cannot be used.
    """
    if isinstance(error, Mismatch):
        yield from error.problems
        return
    inner = getattr(error, "exceptions", None)
    if not isinstance(inner, (tuple, list)):
        yield _problem_of(error)
        return
    for one in inner:
        names = [note.name for note in getattr(one, "__notes__", ()) if hasattr(note, "name")]
        if not names:
            yield from problems_of(one)
        elif isinstance(one, KeyError) and one.args == (names[-1],):
            yield (names[-1],), "is missing"
        else:
            for path, problem in problems_of(one):
                yield (names[-1], *path), problem


def _problem_of(error: BaseException) -> Tuple[Path, str]:
    """Return the field and the text of an error that a class's own check raised."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    path: Path = next(((field.name,) for frame in frames for field in _fields_given_to(frame)), ())
    text = str(error.args[0]) if error.args else ""
    if frames and _is_of_library(frames[-1]):
        # The validators and converters of attrs quote the value, as do builtins that are used as such.
        if path:
            return path, "is refused by its validator"
        text = ""
    return path, f"is refused: {text[:MAX_TEXT]}" if text else f"is refused ({type(error).__name__})"


def _fields_given_to(frame: types.FrameType) -> Iterator[attrs.Attribute[Any]]:
    """Yield the fields among the arguments of a function that was called. attrs passes a validator its field."""
    code = frame.f_code
    for name in code.co_varnames[: code.co_argcount]:
        value = frame.f_locals.get(name)
        if isinstance(value, attrs.Attribute):
            yield value


def _is_of_library(frame: types.FrameType) -> bool:
    package = str(frame.f_globals.get("__name__")).partition(".")[0]
    return package in ("attr", "cattrs", "pydantic") or frame.f_code.co_filename.startswith("<attrs generated")


def _text_of(path: Path) -> str:
    text = "input"
    for one in path:
        if isinstance(one, int):
            text += f"[{one}]"
        else:
            shown = one[:MAX_NAME]
            text += f".{shown}" if shown.isidentifier() else f"[{shown!r}]"
    return text
