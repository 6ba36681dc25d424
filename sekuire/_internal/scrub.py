"""Remove secrets from texts that leave the process: tokens in every usual encoding, and passwords within URLs.

What is removed is found by the texts of all :class:`~sekuire.secret.Secret` objects of the process, whoever made them.
A short secret would be found by chance: one of fewer than 8 characters is looked for as a whole word only, and one of
fewer than 4 not at all.
"""

from __future__ import annotations

import base64
import bisect
import json
import re
import sys
from typing import Any, Collection, Dict, Iterable, Iterator, List, Set, Tuple

from ..secret import living

__all__ = ["scrub", "scrub_bytes", "scrub_json", "without"]

_MASK = b"***"
#: Shortest secret that is looked for within words and in Base64, and shortest that is looked for as a word.
_SHORTEST, _SHORTEST_WORD = 8, 4
#: Shortest secret of which the first half is removed too. Programs cut long texts.
_SHORTEST_CUT = 32

_NAMED = {b"amp": b"&", b"lt": b"<", b"gt": b">", b"quot": b'"', b"apos": b"'"}
#: One character as JSON, repr(), a URL or HTML may write it. JSON within JSON has several backslashes; each run of them
#: is looked at once.
_ESCAPE = re.compile(
    rb"(?<!\\)\\+(?:(?:u00|x)([0-9a-f]{2})|([^u\\]))|%([0-9a-f]{2})|&#x0*([0-9a-f]{2});|&#0*([0-9]{2,3});"
    rb"|&(amp|lt|gt|quot|apos);",
    re.IGNORECASE,
)
_USERINFO = re.compile(rb"(?<=://)[^\s/?#@:\"'<>\\]{0,256}:[^\s/?#@\"'<>\\]{1,1024}(?=@)")
#: What may be Base64 or hex of a secret.
_RUN = re.compile(rb"[A-Za-z0-9+/_-]{10,}")
_BASE64 = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/_-")

_Span = Tuple[int, int]


def scrub(text: str) -> str:
    """Return ``text`` without the secrets of this process and the passwords within URLs."""
    data = text.encode("utf-8", "surrogatepass")
    clean = scrub_bytes(data)
    return text if clean is data else clean.decode("utf-8", "surrogatepass")


def scrub_bytes(data: bytes) -> bytes:
    """Do the same as :func:`scrub` for bytes, such as JSON. Return ``data`` itself if there is nothing to remove."""
    texts = {secret.reveal() for secret in living()}
    spans = [match.span() for match in _USERINFO.finditer(data)] if b"://" in data else []
    for text in texts:
        if _SHORTEST_WORD <= len(text) < _SHORTEST:
            word = text.encode("utf-8", "surrogatepass")
            spans += [span for span in _each(word, data) if _is_word(data, span)]
    return _cut(data, [*spans, *_find({text for text in texts if len(text) >= _SHORTEST}, data)])


def scrub_json(data: bytes) -> bytes:
    """Do the same for one JSON object. What is returned is JSON too, and no object in it has a key twice."""
    clean = scrub_bytes(data)
    if clean is data:
        return data
    try:
        value = json.loads(clean, object_pairs_hook=_with_own_keys)
        return json.dumps(value, separators=(",", ":")).encode()
    except (ValueError, RecursionError):
        # A secret that looks like a piece of JSON.
        return b'{"omitted":"it held a secret"}'


def _with_own_keys(pairs: List[Tuple[str, Any]]) -> Dict[str, Any]:
    """Return an object. Keys that differed by their secrets alone are numbered: many platforms refuse a key twice."""
    found: Dict[str, Any] = {}
    for key, value in pairs:
        name, number = key, 1
        while name in found:
            number += 1
            name = f"{key} ({number})"
        found[name] = value
    return found


def without(token: str, content: bytes) -> bytes:
    """Return ``content``, the answer to a request that held ``token``, without it.

    A token of one or two characters stays: it hides nothing, and its removal could change the form of an answer.
    """
    return content if len(token) < 3 else _cut(content, list(_find({token}, content)))


def _cut(data: bytes, spans: List[_Span]) -> bytes:
    """Return ``data`` with a mask in the place of each span. Spans may overlap."""
    if not spans:
        return data
    pieces = []
    done = 0
    for begin, end in sorted(spans):
        # If the span begins with the second half of an escape, the first goes too, so that JSON stays JSON.
        before = data[max(0, begin - 64) : begin]
        begin -= (len(before) - len(before.rstrip(b"\\"))) % 2
        if begin >= done:
            pieces += [data[done:begin], _MASK]
        done = max(done, end)
    return b"".join((*pieces, data[done:]))


def _find(texts: Set[str], data: bytes) -> Iterator[_Span]:
    """Yield where ``data`` holds one of ``texts``, as it is or encoded."""
    tokens = [text.encode("utf-8", "surrogatepass") for text in texts]
    yield from _find_in(data, [(token, (token.lower(),)) for token in tokens])
    if not tokens or _ESCAPE.search(data) is None:
        return
    plain, marks = _unescape(data)
    # Backslashes are left out on both sides: how many there are depends on how often the text was escaped. The second,
    # because a token may hold what looks like an escape, and is one where others are.
    wanted = [(one, {one.lower().replace(b"\\", b""), _unescape(one.lower())[0]}) for one in tokens]
    for begin, end in _find_in(plain, wanted):
        yield _place(marks, begin), _place(marks, end)


def _find_in(data: bytes, tokens: Iterable[Tuple[bytes, Collection[bytes]]]) -> Iterator[_Span]:
    """Yield where ``data`` holds a token. Each comes with what to look for in any case, and is looked for in Base64."""
    folded = data.lower()
    # Most texts have no run as long as the Base64 of a token.
    longest = max((match.end() - match.start() for match in _RUN.finditer(data)), default=0)
    for token, wanted in tokens:
        for one in wanted:
            if len(one) >= 3:
                yield from _each(one, folded)
            if len(one) >= _SHORTEST_CUT:
                yield from _beginnings(one, folded)
        if _SHORTEST <= len(token) < longest:
            yield from _each(token.hex().encode(), folded)
            for core in _cores(token):
                for begin, end in _each(core, data):
                    yield begin, _end_of_base64(data, end)


def _each(wanted: bytes, data: bytes) -> Iterator[_Span]:
    begin = data.find(wanted)
    while begin >= 0:
        end = begin + len(wanted)
        yield begin, end
        begin = data.find(wanted, end)


def _is_word(data: bytes, span: _Span) -> bool:
    begin, end = span
    return not (data[max(0, begin - 1) : begin].isalnum() or data[end : end + 1].isalnum())


def _beginnings(wanted: bytes, data: bytes) -> Iterator[_Span]:
    """Yield where a half or more of ``wanted`` stands."""
    for begin, end in _each(wanted[: len(wanted) // 2], data):
        most = begin + len(wanted)
        while end < min(most, len(data)) and data[end] == wanted[end - begin]:
            end += 1
        yield begin, end


def _cores(token: bytes) -> Set[bytes]:
    """Return what the Base64 of any text that holds ``token`` has in it, for each place that the token may have.

    The character at either end may also depend on what stands beside the token. It is left out.
    """
    cores = set()
    for before in range(3):
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            whole = encode(b"\0" * before + token)
            first = (0, 2, 3)[before]
            last = (len(token) + before) * 8 // 6
            cores.add(whole[first:last])
    return cores


def _end_of_base64(data: bytes, end: int) -> int:
    """Return ``end``, or more if the next character of Base64 holds the rest of the token's bits."""
    if end < len(data) and data[end] in _BASE64:
        end += 1
    while data[end : end + 1] == b"=":
        end += 1
    return end


def _unescape(content: bytes) -> Tuple[bytes, List[_Span]]:
    """Return ``content`` with each escape as its character, and where each piece begins there and in ``content``.

    Backslashes are left out.
    """
    plain = bytearray()
    marks = [(0, 0)]
    done = 0
    for match in _ESCAPE.finditer(content):
        plain += content[done : match.start()]
        marks.append((len(plain), match.start()))
        code, character, percent, hexadecimal, decimal, name = match.groups()
        digits = code or percent or hexadecimal
        if digits is not None:
            plain += bytes((int(digits, 16),)).replace(b"\\", b"")
        elif decimal is not None:
            plain += bytes((min(int(decimal), 255),)).replace(b"\\", b"")
        else:
            plain += character if name is None else _NAMED[name.lower()]
        done = match.end()
        marks.append((len(plain), done))
    return bytes(plain + content[done:]), marks


def _place(marks: List[_Span], index: int) -> int:
    """Return where in the content the byte ``index`` of the unescaped content begins."""
    before, begin = marks[bisect.bisect_right(marks, (index, sys.maxsize)) - 1]
    return begin + index - before
