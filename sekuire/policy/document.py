"""Read a policy: decode it strictly, verify its hash and signature, and make its content read-only.

Pure; no I/O. What is refused here raises :class:`~sekuire.errors.PolicyIntegrityError` with what was expected and what
was found. Nothing of a refused policy is ever enforced.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import datetime as dt
import difflib
import json
import math
import re
import types
from typing import Any, Callable, Dict, Iterator, List, Mapping, NoReturn, Optional, Sequence, Tuple, Union

import attrs

from .._internal.checks import is_whole
from ..errors import ConfigurationError, PolicyIntegrityError
from ..wire import protocol
from . import matching

__all__ = [
    "Policy",
    "Rules",
    "canonical",
    "check_succession",
    "content_hash",
    "decode_policy",
    "parse_key",
    "read_rules",
    "signed_message",
    "thaw",
]

#: How deep a policy's objects and lists may be nested.
MAX_DEPTH = 64
#: How many unknown keys are named at most.
MAX_WARNINGS = 50
#: The largest integer up to which a double holds every integer (RFC 7493), and the highest version.
MAX_INTEGER = 2**53 - 1
#: Bytes of an Ed25519 public key and of a signature.
KEY_BYTES = 32
SIGNATURE_BYTES = 64

ORIGIN_PINNED = "pinned"
ORIGIN_CONTENT = "content"
ORIGIN_INTEGRITY = "integrity"
ORIGIN_UNSIGNED = "unsigned"


# -- what can be refused ----------------------------------------------------------------------------------------------


class _Wrong(ValueError):
    """Report inside this module that a document is wrong at ``path``."""

    def __init__(self, path: str, problem: str, expected: Optional[str] = None, found: Optional[str] = None) -> None:
        super().__init__(path, problem)
        self.path = path
        self.problem = problem
        self.expected = expected
        self.found = found

    def error(self) -> PolicyIntegrityError:
        """Return the error for the user."""
        where = f"{self.path}: " if self.path else ""
        return PolicyIntegrityError(f"{where}{self.problem}", expected=self.expected, found=self.found)


def _kind(value: object) -> str:
    """Return what JSON calls the type of ``value``."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, (int, float)):
        return "a number"
    if isinstance(value, str):
        return "a string"
    if isinstance(value, Mapping):
        return "an object"
    return "a list" if isinstance(value, (list, tuple)) else type(value).__name__


def _show(value: object) -> str:
    """Return ``value`` for an error's text: quoted, on one line, cut."""
    text = ascii(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


@contextlib.contextmanager
def _extra() -> Iterator[None]:
    """Name the extra if an import of one of its packages fails.

    :raises ConfigurationError: it is not installed.
    """
    try:
        yield
    except ImportError as error:
        name = (error.name or "").partition(".")[0]
        raise ConfigurationError(f"policies need the package {name!r}: pip install 'sekuire[policy]'") from None


# -- canonical form, hash, signature ----------------------------------------------------------------------------------


def thaw(value: Any) -> Any:
    """Return a copy of ``value`` in plain dicts and lists, which ``json.dumps`` accepts."""
    if isinstance(value, Mapping):
        return {key: thaw(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [thaw(item) for item in value]
    return value


def canonical(value: Any) -> bytes:
    """Return ``value`` in the form of RFC 8785 (JSON Canonicalization Scheme).

    :raises ConfigurationError: the extra is not installed.
    :raises PolicyIntegrityError: ``value`` has no such form: a number that is not finite or too large for a
        double, a lone surrogate, a key that is not a string, a type that JSON lacks, or too deep a nesting.
    """
    with _extra():
        import rfc8785
    problem = ""
    try:
        check_value(value, "")
        return rfc8785.dumps(_doubles(value))
    except _Wrong as error:
        problem = error.problem if not error.path else f"{error.path}: {error.problem}"
    except (ValueError, RecursionError) as error:
        problem = str(error)
    raise PolicyIntegrityError(f"has no canonical form: {problem}")


def content_hash(content: Mapping[str, Any]) -> str:
    """Return the BLAKE3 hash of the content's canonical form, as 64 lower-case hex digits.

    :raises ConfigurationError: the extra is not installed.
    :raises PolicyIntegrityError: as :func:`canonical`.
    """
    with _extra():
        from blake3 import blake3
    return blake3(canonical(content)).hexdigest()


def signed_message(hash: str, policy_id: str, version: Union[int, str], workspace_id: str) -> bytes:
    """Return the bytes that a policy's signature covers: the RFC 8785 form of these four values."""
    return canonical({"hash": hash, "policy_id": policy_id, "version": version, "workspace_id": workspace_id})


def parse_key(text: str) -> bytes:
    """Return an Ed25519 public key of 32 bytes, read from hex or base64 (either alphabet, with or without padding).

    :raises ConfigurationError: ``text`` is neither, has another length, or is a point with which anyone could sign.
    """
    problem = _key_problem(text)
    if problem:
        raise ConfigurationError(problem, "trusted_policy_keys")
    key = _decode_binary(text, KEY_BYTES)
    if key is None:
        found = f"{len(text)} characters" if text else "nothing"
        raise ConfigurationError(
            f"an Ed25519 public key is {KEY_BYTES} bytes, as {2 * KEY_BYTES} hex digits or 44 characters of base64;"
            f" got {found}",
            "trusted_policy_keys",
        )
    if _is_weak(key):
        raise ConfigurationError(
            f"the key {key.hex()} is a point of small order, with which anyone could sign", "trusted_policy_keys"
        )
    return key


def _key_problem(text: object) -> str:
    if not isinstance(text, str):
        return f"a key must be a str in hex or base64, got {type(text).__name__}"
    if "-----BEGIN" in text:
        return "a key must be its 32 bytes in hex or base64, not PEM"
    return ""


def _decode_binary(text: str, size: int) -> Optional[bytes]:
    """Return ``size`` bytes read from hex or base64, or None if ``text`` is neither."""
    text = text.strip()
    if not text.isascii():
        return None
    if len(text) == 2 * size:
        try:
            return binascii.unhexlify(text)
        except ValueError:
            return None
    bare = text.rstrip("=").replace("-", "+").replace("_", "/")
    if len(bare) != -(-size * 4 // 3):
        return None
    try:
        value = base64.b64decode(bare + "=" * (-len(bare) % 4), validate=True)
    except ValueError:
        return None
    return value if len(value) == size else None


#: y coordinates of the points of order 1, 2, 4 and 8, with the sign bit cleared, also those not reduced modulo p.
#: Whoever pins such a "key" (a placeholder of zeros, for example) would trust signatures that need no private key.
_WEAK = frozenset(
    bytes.fromhex(text)
    for text in (
        "0000000000000000000000000000000000000000000000000000000000000000",
        "0100000000000000000000000000000000000000000000000000000000000000",
        "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
        "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
        "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    )
)


def _is_weak(key: bytes) -> bool:
    return key[:-1] + bytes([key[-1] & 0x7F]) in _WEAK


def _verifies(key: bytes, signature: bytes, message: bytes) -> bool:
    """Return True if ``signature`` over ``message`` was made with the private key of ``key``."""
    with _extra():
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


# -- strict JSON ------------------------------------------------------------------------------------------------------


def _pairs(pairs: List[Tuple[str, Any]]) -> Dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen = set()
        for key, _ in pairs:
            if key in seen:
                raise _Wrong("", f"the key {_show(key)} is there twice in one object")
            seen.add(key)
    return found


def _constant(name: str) -> NoReturn:
    raise _Wrong("", f"holds {name}, which is not JSON")


def _integer(text: str) -> Union[int, float]:
    # Python takes quadratic time for the digits of a number; no double has more than these.
    number = int(text) if len(text) <= 310 else None
    if number is not None and _is_double(number):
        return number if abs(number) <= MAX_INTEGER else float(number)
    raise _Wrong("", f"holds the integer {text[:20]}..., which is too large for a double")


def _is_double(number: int) -> bool:
    """Return True if ``number`` fits into a double. Beyond 2^53 the nearest one counts, as RFC 8785 has no others."""
    try:
        float(number)
    except OverflowError:
        return False
    return True


def _doubles(value: Any) -> Any:
    """Return a copy of ``value`` as :func:`thaw` does, with integers beyond 2^53 - 1 as doubles."""
    if isinstance(value, Mapping):
        return {key: _doubles(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_doubles(item) for item in value]
    if isinstance(value, int) and abs(value) > MAX_INTEGER:
        return float(value)
    return value


def _float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise _Wrong("", f"holds the number {text[:20]}, which is not finite")
    return number


_STRICT = json.JSONDecoder(
    object_pairs_hook=_pairs, parse_constant=_constant, parse_int=_integer, parse_float=_float, strict=True
)


def _decode(body: bytes) -> Any:
    problem = ""
    try:
        return _STRICT.decode(body.decode("utf-8"))
    except _Wrong:
        raise
    except UnicodeDecodeError:
        problem = "is not UTF-8"
    except RecursionError:
        problem = "is nested too deep"
    except json.JSONDecodeError as error:
        problem = f"is not JSON ({error.msg} at character {error.pos})"
    except ValueError:
        problem = "is not JSON"
    raise _Wrong("", f"the policy {problem}")


def read_document(body: bytes) -> Any:
    """Return the value in a file that is to become a policy, read as strictly as a policy. This needs no extra.

    :raises PolicyIntegrityError: it is not JSON in UTF-8, or an object in it has a key twice, for example.
    """
    wrong = None
    try:
        return _decode(body)
    except _Wrong as error:
        wrong = error.error()
    raise wrong


#: Where a value stands: the node of what holds it, and its key or index there. None for the whole.
_Node = Optional[Tuple[Any, Union[str, int]]]


def check_value(value: Any, path: str) -> None:
    """Check that ``value`` is JSON that every reader understands in the same way: see :func:`canonical`.

    :param path: what the whole is called in an error.
    :raises _Wrong: it is not; the error names the place.
    """
    # Iterative, because the depth itself is checked. A place is put into words only if it is wrong.
    waiting: List[Tuple[Any, _Node, int]] = [(value, None, 0)]
    while waiting:
        item, node, depth = waiting.pop()
        problem = ""
        if depth > MAX_DEPTH:
            problem = f"is nested deeper than {MAX_DEPTH} levels"
        elif isinstance(item, str):
            if not _is_unicode(item):
                problem = "holds a lone surrogate, which is not a character"
        elif item is None or isinstance(item, bool):
            continue
        elif isinstance(item, int):
            if not _is_double(item):
                problem = "is an integer too large for a double"
        elif isinstance(item, float):
            if not math.isfinite(item):
                problem = "is a number that is not finite"
        elif isinstance(item, Mapping):
            for key, inner in item.items():
                if not isinstance(key, str):
                    problem = f"has a key that is {_kind(key)}, not a string"
                elif not _is_unicode(key):
                    problem = "has a key with a lone surrogate, which is not a character"
                else:
                    waiting.append((inner, (node, key), depth + 1))
        elif isinstance(item, (list, tuple)):
            waiting.extend((inner, (node, index), depth + 1) for index, inner in enumerate(item))
        else:
            problem = f"is a {type(item).__name__}, which JSON does not have"
        if problem:
            raise _Wrong(_place(node, path), problem)


def _place(node: _Node, path: str) -> str:
    steps: List[Union[str, int]] = []
    while node is not None:
        node, step = node
        steps.append(step)
    for step in reversed(steps):
        path = f"{path}[{step}]" if isinstance(step, int) else _join(path, step)
    return _cut(path)


def _is_unicode(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _join(path: str, key: str) -> str:
    name = key if key.isidentifier() and key.isascii() and len(key) <= 60 else _show(key)
    return f"{path}.{name}" if path else name


def _cut(path: str) -> str:
    return path if len(path) <= 200 else f"{path[:197]}..."


# -- the content ------------------------------------------------------------------------------------------------------

Texts = Optional[Tuple[str, ...]]


def _flag(value: Any, path: str) -> bool:
    if isinstance(value, bool):
        return value
    raise _Wrong(path, f"must be true or false, not {_kind(value)}", "a boolean", _kind(value))


def _list_of(check: Callable[[str], str]) -> Callable[[Any, str], Tuple[str, ...]]:
    def read(value: Any, path: str) -> Tuple[str, ...]:
        if not isinstance(value, (list, tuple)):
            raise _Wrong(path, f"must be a list of strings, not {_kind(value)}", "a list", _kind(value))
        for index, item in enumerate(value):
            where = f"{path}[{index}]"
            if not isinstance(item, str):
                raise _Wrong(where, f"must be a string, not {_kind(item)}", "a string", _kind(item))
            problem = check(item)
            if problem:
                raise _Wrong(where, f"{_show(item)} {problem}", None, item)
        return tuple(value)

    return read


def _count(value: Any, path: str) -> int:
    # 60.0 has the canonical form 60, so that both must mean the same.
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if is_number and math.isfinite(value) and 0 <= value == int(value):
        return int(value)
    found = _show(value) if is_number else _kind(value)
    raise _Wrong(path, f"must be a whole number, 0 or more, not {found}", "a whole number", found)


_names = _list_of(matching.name_problem)
_domains = _list_of(matching.domain_problem)
_paths = _list_of(matching.path_problem)
_extensions = _list_of(matching.extension_problem)


def _field(read: Callable[[Any, str], Any], default: Any = None) -> Any:
    """Declare a field of a section. ``read(value, path)`` checks its value in a policy and converts it."""
    return attrs.field(default=default, metadata={"read": read})


@attrs.frozen(kw_only=True, slots=True)
class Network:
    """Hold the section ``permissions.network``."""

    enabled: bool = _field(_flag, True)
    require_tls: bool = _field(_flag, False)
    allowed_domains: Texts = _field(_domains)
    blocked_domains: Texts = _field(_domains)
    allowed_hosts: Texts = _field(_domains)
    blocked_hosts: Texts = _field(_domains)


@attrs.frozen(kw_only=True, slots=True)
class Filesystem:
    """Hold the section ``permissions.filesystem``."""

    enabled: bool = _field(_flag, True)
    allowed_paths: Texts = _field(_paths)
    blocked_paths: Texts = _field(_paths)
    allowed_extensions: Texts = _field(_extensions)


@attrs.frozen(kw_only=True, slots=True)
class Tools:
    """Hold the section ``permissions.tools``."""

    allowed_tools: Texts = _field(_names)
    blocked_tools: Texts = _field(_names)


@attrs.frozen(kw_only=True, slots=True)
class Api:
    """Hold the section ``permissions.api``."""

    allowed_services: Texts = _field(_names)
    blocked_services: Texts = _field(_names)


@attrs.frozen(kw_only=True, slots=True)
class Models:
    """Hold the section ``agent.models``."""

    allowed_models: Texts = _field(_names)
    denied_models: Texts = _field(_names)
    allowed_providers: Texts = _field(_names)


@attrs.frozen(kw_only=True, slots=True)
class Capabilities:
    """Hold the section ``agent.capabilities``."""

    allowed_tools: Texts = _field(_names)
    denied_tools: Texts = _field(_names)
    require_tool_approval: bool = _field(_flag, False)
    allowed_capabilities: Texts = _field(_names)
    denied_capabilities: Texts = _field(_names)
    require_approval: Texts = _field(_names)


@attrs.frozen(kw_only=True, slots=True)
class Rate:
    """Hold a section of ``rate_limits``: how much at most, in a minute and in an hour. None: no limit."""

    max_per_minute: Optional[int] = _field(_count)
    max_per_hour: Optional[int] = _field(_count)


@attrs.frozen(kw_only=True, slots=True)
class Rules:
    """Hold the enforced part of a policy's content, typed. A section that is absent is None."""

    network: Optional[Network] = None
    filesystem: Optional[Filesystem] = None
    tools: Tools = Tools()
    api: Api = Api()
    models: Models = Models()
    capabilities: Capabilities = Capabilities()
    requests: Rate = Rate()
    tokens: Rate = Rate()
    #: Sections that deny everything, each with the unknown key that may have been meant to block something.
    closed: Mapping[str, str] = attrs.field(factory=dict, hash=False)


#: Each part of a policy that is enforced: its sections, and the class that holds each of them.
_SCHEMA: Dict[str, Dict[str, Any]] = {
    "permissions": {"network": Network, "filesystem": Filesystem, "tools": Tools, "api": Api},
    "agent": {"models": Models, "capabilities": Capabilities},
    "rate_limits": {"requests": Rate, "tokens": Rate},
}


#: The parts of a policy's content. ``compliance`` is known, and not enforced by a client.
_PARTS = (*_SCHEMA, "compliance")


def read_rules(content: Mapping[str, Any]) -> Tuple[Rules, Tuple[str, ...]]:
    """Return the enforced part of ``content``, and a warning for each unknown key.

    :raises PolicyIntegrityError: an enforced part has another type or an entry that cannot be enforced; by path.
    """
    try:
        return _read(content)
    except _Wrong as error:
        wrong = error.error()
    raise wrong


def _read(content: Any) -> Tuple[Rules, Tuple[str, ...]]:
    if not isinstance(content, Mapping):
        raise _Wrong("content", f"must be an object, not {_kind(content)}", "an object", _kind(content))
    if content and not any(part in content for part in _PARTS):
        keys = ", ".join(_show(key) for key in list(content)[:3]) + (", ..." if len(content) > 3 else "")
        expected = f"one of {', '.join(_PARTS)}"
        raise _Wrong(
            "content", f"has {keys} and not {expected}: another format, which cannot be enforced", expected, keys
        )
    found: Dict[str, Any] = {}
    closed: Dict[str, str] = {}
    warnings: List[str] = []
    for part, sections in _SCHEMA.items():
        # A rate that is not counted denies nothing: an unknown key there is only a warning.
        around = () if part == "rate_limits" else tuple(sections)
        for name, value in _items(content, part, part, sections, warnings, closed, around):
            cls = sections[name]
            fields = attrs.fields_dict(cls)
            where = f"{part}.{name}"
            values = {}
            around_key = (name,) if around else ()
            for key, item in _items({name: value}, name, where, fields, warnings, closed, around_key):
                values[key] = fields[key].metadata["read"](item, f"{where}.{key}")
            found[name] = cls(**values)
    return Rules(**found, closed=closed), tuple(warnings)


def _near_misses(content: Mapping[str, Any]) -> Iterator[str]:
    """Yield a warning for each key beside the enforced parts that was probably meant to be one of them."""
    for key in list(content)[:MAX_WARNINGS]:
        close = difflib.get_close_matches(key[:100], _PARTS, n=1, cutoff=0.8)
        if close and key not in _PARTS:
            yield f"{_join('', key)} is not enforced; did you mean {close[0]!r}?"


def _items(
    holder: Mapping[str, Any],
    name: str,
    path: str,
    known: Mapping[str, Any],
    warnings: List[str],
    closed: Dict[str, str],
    around: Tuple[str, ...],
) -> Iterator[Tuple[str, Any]]:
    """Yield the known keys of the object ``holder[name]`` with their values. Add a warning for each unknown key.

    :param closed: gets the sections ``around`` where an unknown key holds a list that may block something.
    """
    value = holder.get(name)
    if value is None:
        return
    if not isinstance(value, Mapping):
        raise _Wrong(path, f"must be an object, not {_kind(value)}", "an object", _kind(value))
    for key, item in value.items():
        if key not in known:
            list_at = _find_list(item, _join(path, str(key)), str(key)) if around else None
            if list_at is not None:
                for section in around:
                    closed.setdefault(section, list_at)
            if len(warnings) >= MAX_WARNINGS:
                # A policy with thousands of unknown keys must not cost thousands of searches for likely names.
                continue
            close = difflib.get_close_matches(str(key)[:100], known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(known)}"
            effect = "not enforced"
            if list_at is not None:
                effect = f"may block something, so everything under {', '.join(around)} is denied (policy.unknown_key)"
            warnings.append(f"{_cut(_join(path, str(key)))} is unknown and {effect}{hint}")
        elif item is not None:
            yield key, item


_NOT_A_LETTER = re.compile(r"^[\W_]+")
_LIST_NAMES = ("allow", "block", "den", "deny")


def _find_list(value: Any, path: str, key: str) -> Optional[str]:
    """Return the path of a list in ``value`` whose key says that it allows or blocks something, or None.

    :param key: the unknown key that holds ``value``, at ``path``.
    """
    waiting = [(value, path, key)]
    while waiting:
        item, where, name = waiting.pop()
        if isinstance(item, (list, tuple)):
            # What stands before the first letter, such as a space or a byte order mark, hides nothing.
            if _NOT_A_LETTER.sub("", matching.fold_name(name)).startswith(_LIST_NAMES):
                return _cut(where)
            waiting.extend((one, where, "") for one in item)
        elif isinstance(item, Mapping):
            waiting.extend((one, _join(where, str(inner)), str(inner)) for inner, one in item.items())
    return None


# -- the policy -------------------------------------------------------------------------------------------------------


def _freeze(value: Any) -> Any:
    """Return a read-only copy of ``value``."""
    if isinstance(value, Mapping):
        return types.MappingProxyType({key: _freeze(item) for key, item in value.items()})
    if isinstance(value, (list, tuple)):
        return tuple(_freeze(item) for item in value)
    return value


def _restore(fields: Dict[str, Any]) -> Policy:
    return Policy(**fields)


@attrs.frozen(kw_only=True, slots=True)
class Policy:
    """Hold a workspace's policy that passed every check, or one made by :meth:`from_content`. ::

        policy = Policy.from_content({"permissions": {"tools": {"blocked_tools": ["shell"]}}})
        print(policy.version, policy.origin)  # 1 unsigned

    ``content`` is read-only down to its leaves (mapping proxies and tuples); :func:`thaw` copies it into dicts and
    lists. ``origin`` is what the signature proved: ``"pinned"`` (made by the owner of a pinned key), ``"integrity"``
    (whole, signed by a key that came with it) or ``"unsigned"`` (only the hash fits). ``raw`` is the answer's body as
    it came, so that a stored policy can be verified again. ``warnings`` are its unknown keys, by path, and remarks on
    its signature.

    With ``policy_signature="hash"`` there is a further origin, ``"content"``: the owner of a pinned key signed the
    content, and nothing proves id, version and workspace.
    """

    policy_id: str
    workspace_id: str
    version: int
    status: str = "active"
    hash: str
    content: Mapping[str, Any] = attrs.field(converter=_freeze, hash=False, repr=False)
    origin: str = ORIGIN_UNSIGNED
    signing_key_id: Optional[str] = None
    activated_at: Optional[dt.datetime] = None
    updated_at: Optional[dt.datetime] = None
    raw: bytes = attrs.field(default=b"", repr=False, eq=False)
    warnings: Tuple[str, ...] = ()

    def __reduce__(self) -> Tuple[Any, ...]:
        # Mapping proxies cannot be pickled; a handler's process gets a copy.
        fields = {field.name: getattr(self, field.name) for field in attrs.fields(Policy)}
        return _restore, ({**fields, "content": thaw(self.content)},)

    @classmethod
    def from_content(
        cls, content: Mapping[str, Any], *, workspace_id: str = "local", policy_id: str = "local", version: int = 1
    ) -> Policy:
        """Return an unsigned policy of your own, for trying an enforcer without a platform. This needs no extra.

        ``hash`` is the empty string if the extra is not installed.

        :raises PolicyIntegrityError: an enforced part has another type or an entry that cannot be enforced; by path.
        """
        wrong = None
        try:
            check_value(content, "content")
            _, warnings = _read(content)
        except _Wrong as error:
            wrong = error.error()
        if wrong is not None:
            raise wrong
        try:
            digest = content_hash(content)
        except ConfigurationError:
            digest = ""
        return cls(
            policy_id=policy_id,
            workspace_id=workspace_id,
            version=version,
            hash=digest,
            content=content,
            warnings=(*warnings, *_near_misses(content)),
        )


def decode_policy(
    body: bytes, *, workspace_id: str, trusted_keys: Sequence[bytes] = (), accepts_hash: bool = False
) -> Policy:
    """Return the policy in an answer's body, after every check of docs/protocol.md, "Policy".

    :param workspace_id: whose policy was asked for; another one is refused.
    :param trusted_keys: the pinned keys, 32 bytes each (:func:`parse_key`). With one pinned, one of them must have
        signed hash, id, version and workspace, and no enforced part may hold an unknown key.
    :param accepts_hash: accept a signature over the hash alone too, as ``policy_signature="hash"`` says.
    :raises PolicyIntegrityError: with what was expected and found.
    :raises ConfigurationError: the extra is not installed.
    """
    if not protocol.is_id(workspace_id):
        raise ConfigurationError(f"must be the id of a workspace, got {_show(workspace_id)}", "workspace_id")
    keys = tuple(trusted_keys)
    if any(not isinstance(key, bytes) or len(key) != KEY_BYTES for key in keys):
        raise ConfigurationError(f"must be keys of {KEY_BYTES} bytes, as parse_key() gives them", "trusted_keys")
    try:
        return _decode_policy(body, workspace_id, keys, accepts_hash)
    except _Wrong as error:
        wrong = error.error()
    raise wrong


def _decode_policy(body: bytes, workspace_id: str, trusted: Tuple[bytes, ...], accepts_hash: bool) -> Policy:
    payload = _decode(body)
    if not isinstance(payload, dict):
        raise _Wrong("", f"the policy must be an object, not {_kind(payload)}", "an object", _kind(payload))
    check_value(payload, "")
    policy_id = payload.get("policy_id")
    if not protocol.is_id(policy_id):
        raise _Wrong("policy_id", f"must be an id, not {_show(policy_id)}", "an id", _show(policy_id))
    if payload.get("workspace_id") != workspace_id:
        found = _show(payload.get("workspace_id"))
        raise _Wrong("workspace_id", f"is {found}, expected {workspace_id!r}", workspace_id, found)
    version = _version(payload.get("version"))
    status = payload.get("status", "active")
    if not isinstance(status, str) or status.lower() != "active":
        raise _Wrong("status", f"is {_show(status)}, and only an active policy is used", "active", _show(status))
    content = payload.get("content")
    if not isinstance(content, dict):
        raise _Wrong("content", f"must be an object, not {_kind(content)}", "an object", _kind(content))
    digest = _check_hash(payload.get("hash"), content)
    origin, notes = _check_signature(payload, digest, version, trusted, accepts_hash)
    _, warnings = _read(content)
    if warnings and trusted:
        more = f" (and {len(warnings) - 1} more)" if len(warnings) > 1 else ""
        raise _Wrong("", f"{warnings[0]}{more}; with a pinned key this is refused", None, warnings[0])
    key_id = payload.get("signing_key_id")
    return Policy(
        policy_id=policy_id,
        workspace_id=workspace_id,
        version=version,
        status=status,
        hash=digest,
        content=content,
        origin=origin,
        signing_key_id=key_id if isinstance(key_id, str) else None,
        activated_at=protocol.parse_time(payload.get("activated_at")),
        updated_at=protocol.parse_time(payload.get("updated_at")),
        raw=bytes(body),
        warnings=(*warnings, *_near_misses(content), *notes),
    )


def _version(value: Any) -> int:
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 16:
        value = int(value)
    if isinstance(value, float) and value == int(value):
        value = int(value)
    if not is_whole(value) or not 0 <= value <= MAX_INTEGER:
        raise _Wrong("version", f"must be a whole number, not {_show(value)}", "a whole number", _show(value))
    return value


def _check_hash(stated: Any, content: Mapping[str, Any]) -> str:
    if not isinstance(stated, str) or len(stated) != 64 or not set(stated) <= set("0123456789abcdef"):
        raise _Wrong("hash", f"must be 64 lower-case hex digits, not {_show(stated)}", None, _show(stated))
    found = content_hash(content)
    if found != stated:
        raise _Wrong("hash", f"the policy says {stated}, its content has {found}", stated, found)
    return stated


def _check_signature(
    payload: Mapping[str, Any], digest: str, version: int, trusted: Tuple[bytes, ...], accepts_hash: bool
) -> Tuple[str, Tuple[str, ...]]:
    """Return what the signature proves, and remarks on it."""
    text = payload.get("signature")
    if text is None:
        if trusted:
            raise _Wrong("signature", "the policy is not signed, and a key is pinned", "a signature", "none")
        return ORIGIN_UNSIGNED, ()
    signature = _decode_binary(text, SIGNATURE_BYTES) if isinstance(text, str) else None
    if signature is None:
        raise _Wrong(
            "signature", f"must be {SIGNATURE_BYTES} bytes in hex or base64, not {_show(text)}", None, _show(text)
        )
    keys, note = _candidates(payload.get("signing_public_key"), trusted)
    if not keys:
        return ORIGIN_UNSIGNED, (note,)
    # A version that is sent as a string may have been signed as one.
    for stated in dict.fromkeys((version, payload["version"])):
        message = signed_message(digest, payload["policy_id"], stated, payload["workspace_id"])
        if any(_verifies(key, signature, message) for key in keys):
            return (ORIGIN_PINNED if trusted else ORIGIN_INTEGRITY), ()
    names = " or ".join(key.hex() for key in keys)
    if not any(_verifies(key, signature, digest.encode("ascii")) for key in keys):
        raise _Wrong("signature", f"is not by the key {names}", f"a signature by {names}", "another")
    if accepts_hash:
        return (ORIGIN_CONTENT if trusted else ORIGIN_INTEGRITY), ()
    note = "covers the hash alone, not id, version and workspace"
    if trusted:
        raise _Wrong(
            "signature",
            f"{note}; where a platform signs so, set policy_signature='hash' (SEKUIRE_POLICY_SIGNATURE=hash)",
            "a signature over all",
            "over the hash",
        )
    return ORIGIN_INTEGRITY, (f"signature {note}",)


def _candidates(text: Any, trusted: Tuple[bytes, ...]) -> Tuple[Tuple[bytes, ...], str]:
    """Return the keys that may have signed. If no key can check the signature, return none, and say why."""
    if text is None:
        return trusted, "signature cannot be checked: no signing_public_key came with it, and no key is pinned"
    key = _decode_binary(text, KEY_BYTES) if isinstance(text, str) else None
    if key is None:
        raise _Wrong(
            "signing_public_key", f"must be {KEY_BYTES} bytes in hex or base64, not {_show(text)}", None, _show(text)
        )
    if trusted and key not in trusted:
        names = " or ".join(one.hex() for one in trusted)
        raise _Wrong("signing_public_key", f"is {key.hex()}, which is not pinned; pinned: {names}", names, key.hex())
    return (key,), ""


def check_succession(known: Policy, new: Policy) -> None:
    """Check that ``new`` may replace ``known``: the version must not go back.

    :raises PolicyIntegrityError: an older version, the same version with another hash, or another workspace.
    """
    if new.workspace_id != known.workspace_id:
        raise PolicyIntegrityError(
            f"workspace_id: is {new.workspace_id!r}, expected {known.workspace_id!r}",
            expected=known.workspace_id,
            found=new.workspace_id,
        )
    if new.version < known.version:
        raise PolicyIntegrityError(
            f"version: {new.version} is older than {known.version}, which is in force (a rollback?)",
            expected=f"{known.version} or later",
            found=str(new.version),
        )
    if new.version == known.version and new.hash != known.hash:
        raise PolicyIntegrityError(
            f"hash: version {new.version} has the hash {new.hash}, and had {known.hash} before",
            expected=known.hash,
            found=new.hash,
        )
