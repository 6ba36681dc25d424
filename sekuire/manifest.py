"""Read an agent's manifest, ``sekuire.yml``: who it is, what it is made of, and what it may do.

It needs the extra: ``pip install 'sekuire[manifest]'``. The file is read with PyYAML's safe loader, which makes nothing
but texts, numbers, lists and mappings. Its size, its depth and what its aliases expand to are bounded.
"""

from __future__ import annotations

import difflib
import json
import os
import pathlib
from typing import Any, Dict, Iterator, List, Mapping, Optional, Tuple, Type, Union

import attrs

from .config import check_capability
from .errors import ConfigurationError
from .identity import sekuire_id
from .wire import protocol

__all__ = ["Identity", "Manifest", "read_manifest"]

#: Most bytes of a manifest, and of each file that it names.
MAX_BYTES = 1024 * 1024
#: How deep it may be nested, and how many values it may have, those of its aliases counted at each use.
MAX_DEPTH, MAX_VALUES = 32, 20_000

#: Each section that is read, with its keys. None: its keys are checked as those of a policy.
_SECTIONS: Mapping[str, Optional[Tuple[str, ...]]] = {
    "project": ("name", "sekuire_id"),
    "identity": ("model", "system_prompt_path", "tools_path"),
    "capabilities": ("provides",),
    "permissions": None,
    "rate_limits": None,
}
#: Known keys of a published manifest that are for other programs. A name close to one of them is not a mistake.
_OTHERS = ("agent", "compliance", "deployment", "description", "env", "metadata", "toolkits", "version", "workspace")


@attrs.frozen(kw_only=True)
class Identity:
    """Hold what a SekuireID is calculated from."""

    model: str
    system_prompt: str
    tools: Any = None

    def sekuire_id(self) -> str:
        """Return the id.

        :raises ConfigurationError: as :func:`sekuire.identity.sekuire_id`.
        """
        return sekuire_id(model=self.model, system_prompt=self.system_prompt, tools=self.tools)


@attrs.frozen(kw_only=True)
class Manifest:
    """Hold what of a manifest is used. ::

        manifest = read_manifest("sekuire.yml")
        print(manifest.name, manifest.capabilities)

    ``rules`` is the content of a policy, from ``permissions`` and ``rate_limits``; it is empty if the manifest has
    neither. ``warnings`` name keys that were probably meant to be others.
    """

    path: str
    name: Optional[str] = None
    sekuire_id: Optional[str] = None
    identity: Optional[Identity] = None
    capabilities: Tuple[str, ...] = ()
    rules: Mapping[str, Any] = attrs.field(factory=dict)
    warnings: Tuple[str, ...] = ()

    def agent_id(self) -> str:
        """Return ``project.sekuire_id``, or else the id that ``identity`` gives.

        :raises ConfigurationError: the manifest has neither, or the id cannot be calculated.
        """
        if self.sekuire_id is not None:
            return self.sekuire_id
        if self.identity is not None:
            return self.identity.sekuire_id()
        raise ConfigurationError(
            "is required: set SEKUIRE_AGENT_ID, or give the manifest project.sekuire_id or an identity",
            "agent_id",
            self.path,
        )


class _Wrong(Exception):
    """Raised inside this module: what is wrong, and at which key or line."""

    def __init__(self, where: str, problem: str) -> None:
        super().__init__(where, problem)
        self.where = where
        self.problem = problem


def read_manifest(path: Union[str, os.PathLike[str]]) -> Manifest:
    """Return the manifest in a file. Paths in it begin at its directory.

    :raises ConfigurationError: the file or one that it names cannot be read, a value is wrong, or the extra is not
        installed. The error names the file and the key.
    """
    shown = os.fspath(path)
    try:
        payload = _load(_read_file(pathlib.Path(path), ""))
        return _build(shown, payload, pathlib.Path(path).parent)
    except _Wrong as error:
        where, problem = error.where, error.problem
    except ConfigurationError as error:
        where, problem = error.option or "", error.problem
    raise ConfigurationError(problem, where or None, shown)


def _read_file(path: pathlib.Path, where: str) -> str:
    problem = ""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) <= MAX_BYTES:
            return data.decode("utf-8-sig")
        problem = f"is larger than {MAX_BYTES // 1024 // 1024} MiB"
    except UnicodeDecodeError:
        problem = "is not text in UTF-8"
    except (OSError, ValueError) as error:
        problem = f"cannot be read: {getattr(error, 'strerror', None) or error}"
    raise _Wrong(where, f"the file {os.fspath(path)!r} {problem}" if where else f"the file {problem}")


def _load(text: str) -> Any:
    """Return the value in a YAML document."""
    try:
        import yaml
    except ImportError:
        yaml = None  # type: ignore[assignment]
    if yaml is None:
        raise ConfigurationError("manifests need the package 'PyYAML': pip install 'sekuire[manifest]'")
    problem = ""
    try:
        payload = yaml.load(text, Loader=_strict_loader())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = "" if mark is None else f" (line {mark.line + 1}, column {mark.column + 1})"
        problem = f"is not YAML as it should be: {error.problem or error.context}{place}"
    except (yaml.YAMLError, ValueError) as error:
        problem = f"is not YAML as it should be: {protocol.one_line(str(error))[:200]}"
    except RecursionError:
        problem = f"is nested deeper than {MAX_DEPTH} levels"
    if problem:
        raise _Wrong("", f"the file {problem}")
    _check_size(payload)
    return payload


def _strict_loader() -> Type[Any]:
    import yaml

    class StrictLoader(yaml.SafeLoader):
        """Refuse a key that stands twice in one mapping, of which PyYAML would keep the last."""

        def construct_mapping(self, node: Any, deep: bool = False) -> Dict[Any, Any]:
            if isinstance(node, yaml.MappingNode):
                seen = set()
                for key, _ in node.value:
                    name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else None
                    if name is not None and name in seen:
                        raise yaml.constructor.ConstructorError(
                            None, None, f"the key {key.value[:80]!r} stands twice", key.start_mark
                        )
                    seen.add(name)
            return super().construct_mapping(node, deep=deep)

    return StrictLoader


def _check_size(payload: Any) -> None:
    """Check depth and number of values as a reader of the whole would meet them: aliases are followed at each use."""
    waiting: List[Tuple[Any, int]] = [(payload, 1)]
    count = 0
    while waiting:
        value, depth = waiting.pop()
        count += 1
        if depth > MAX_DEPTH:
            raise _Wrong("", f"the file is nested deeper than {MAX_DEPTH} levels")
        if count > MAX_VALUES:
            raise _Wrong("", f"the file has more than {MAX_VALUES} values, with its aliases")
        if isinstance(value, dict):
            waiting.extend((inner, depth + 1) for inner in value.values())
        elif isinstance(value, (list, tuple, set)):
            waiting.extend((inner, depth + 1) for inner in value)


# -- what it says -----------------------------------------------------------------------------------------------------


def _build(path: str, payload: Any, directory: pathlib.Path) -> Manifest:
    if not isinstance(payload, dict):
        raise _Wrong("", f"the file must hold a mapping such as 'project:', not {_kind(payload)}")
    project = _section(payload, "project")
    identity = _section(payload, "identity")
    capabilities = _section(payload, "capabilities")
    rules = {name: _section(payload, name) for name in ("permissions", "rate_limits") if payload.get(name) is not None}
    return Manifest(
        path=path,
        name=_text(project, "project.name"),
        sekuire_id=_id(project, "project.sekuire_id"),
        identity=_identity(identity, directory) if identity else None,
        capabilities=_names(capabilities.get("provides"), "capabilities.provides"),
        rules=rules,
        warnings=tuple(_near_misses(payload)),
    )


def _section(payload: Mapping[str, Any], name: str) -> Dict[str, Any]:
    value = payload.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise _Wrong(name, f"must be a mapping, got {_kind(value)}")
    return value


def _text(section: Mapping[str, Any], where: str) -> Optional[str]:
    value = section.get(where.partition(".")[2])
    if value is None:
        return None
    if not isinstance(value, str):
        raise _Wrong(where, f"must be a text, got {_kind(value)}; put it in quotes")
    if not value.strip() or not value.isprintable():
        raise _Wrong(where, "must be a text of printable characters on one line, and not empty")
    return value


def _id(section: Mapping[str, Any], where: str) -> Optional[str]:
    value = _text(section, where)
    if value is not None and not protocol.is_id(value):
        raise _Wrong(where, "must be an id of at most 256 bytes without control characters")
    return value


def _identity(section: Mapping[str, Any], directory: pathlib.Path) -> Identity:
    model = _text(section, "identity.model")
    prompt = _text(section, "identity.system_prompt_path")
    for name, value in (("model", model), ("system_prompt_path", prompt)):
        if value is None:
            raise _Wrong(f"identity.{name}", "is required where there is an identity")
    assert model is not None
    assert prompt is not None
    tools = _text(section, "identity.tools_path")
    return Identity(
        model=model,
        system_prompt=_read_file(directory / prompt, "identity.system_prompt_path"),
        tools=None if tools is None else _read_tools(directory / tools),
    )


def _read_tools(path: pathlib.Path) -> Any:
    where = "identity.tools_path"
    try:
        return json.loads(_read_file(path, where))
    except ValueError as error:
        problem = f"the file {os.fspath(path)!r} is not JSON: {error}"
    except RecursionError:
        problem = f"the file {os.fspath(path)!r} is nested too deep"
    raise _Wrong(where, problem)


def _names(value: Any, where: str) -> Tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        raise _Wrong(where, f"must be a list of names, got {_kind(value)}")
    for index, name in enumerate(value):
        if not isinstance(name, str):
            raise _Wrong(f"{where}[{index}]", f"must be a text, got {_kind(name)}; put it in quotes")
        check_capability(name, f"{where}[{index}]")
    return tuple(dict.fromkeys(value))


def _near_misses(payload: Mapping[Any, Any]) -> Iterator[str]:
    """Yield a warning for each key that was probably meant to be one that is read."""
    known = [*_SECTIONS, *_OTHERS]
    for key in list(payload)[:100]:
        name = str(key)[:100]
        close = [] if name in known else difflib.get_close_matches(name, known, n=1, cutoff=0.8)
        if close and close[0] in _SECTIONS:
            yield f"{name!r} is not read; did you mean {close[0]!r}?"
    for section, keys in _SECTIONS.items():
        inside = payload.get(section)
        if keys is None or not isinstance(inside, dict):
            continue
        for key in list(inside)[:100]:
            name = str(key)[:100]
            close = [] if name in keys else difflib.get_close_matches(name, keys, n=1, cutoff=0.75)
            if close:
                yield f"'{section}.{name}' is not read; did you mean '{section}.{close[0]}'?"


def _kind(value: object) -> str:
    """Return what YAML calls the type of ``value``."""
    if value is None:
        return "nothing"
    for kinds, name in ((bool, "true or false"), ((int, float), "a number"), (str, "a text"), (dict, "a mapping")):
        if isinstance(value, kinds):
            return name
    return "a list" if isinstance(value, list) else f"a {type(value).__name__}"
