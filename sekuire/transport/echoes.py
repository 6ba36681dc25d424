"""Remove a token from an answer that goes into errors and logs: some servers echo what they were sent."""

from __future__ import annotations

import bisect
import re
import sys
from typing import List, Tuple

_MASK = b"***"
#: What may stand before a JSON text.
_BEFORE_JSON = b"\xef\xbb\xbf \t\r\n"
_NAMED = {b"amp": b"&", b"lt": b"<", b"gt": b">", b"quot": b'"', b"apos": b"'"}
#: One character as JSON, a URL or HTML may write it. JSON within JSON has several backslashes.
_ESCAPE = re.compile(
    rb"\\+(?:u00([0-9a-f]{2})|([^u\\]))|%([0-9a-f]{2})|&#x0*([0-9a-f]{2});|&#0*([0-9]{2,3});|&(amp|lt|gt|quot|apos);",
    re.IGNORECASE,
)


def is_shown(status: int, content: bytes) -> bool:
    """Return True unless an answer is a success in JSON, which is never quoted and may have to hold a token."""
    return not (200 <= status < 300 and content.lstrip(_BEFORE_JSON)[:1] in (b"{", b"[", b""))


def without(token: str, content: bytes) -> bytes:
    """Return ``content`` without ``token``, also where JSON, a URL or HTML has escaped characters of it.

    A token of one or two characters stays: it hides nothing, and its removal could change the form of an answer.
    """
    wanted = token.encode()
    if len(wanted) < 3:
        return content
    content = content.replace(wanted, _MASK)
    # Backslashes are left out on both sides: how many there are depends on how often the text was escaped.
    wanted = wanted.replace(b"\\", b"")
    if wanted.isalnum() or len(wanted) < 3 or _ESCAPE.search(content) is None:
        return content
    plain, marks = _unescape(content)
    pieces = []
    done, begin = 0, plain.find(wanted)
    while begin >= 0:
        end = begin + len(wanted)
        pieces += [content[done : _place(marks, begin)], _MASK]
        done = _place(marks, end)
        begin = plain.find(wanted, end)
    return b"".join((*pieces, content[done:]))


def _unescape(content: bytes) -> Tuple[bytes, List[Tuple[int, int]]]:
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


def _place(marks: List[Tuple[int, int]], index: int) -> int:
    """Return where in the content the byte ``index`` of the unescaped content begins."""
    before, begin = marks[bisect.bisect_right(marks, (index, sys.maxsize)) - 1]
    return begin + index - before
