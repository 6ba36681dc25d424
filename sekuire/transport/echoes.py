"""Remove a token from an answer that goes into errors and logs: some servers echo what they were sent."""

from __future__ import annotations

from .._internal.scrub import without

__all__ = ["is_shown", "without"]

#: What may stand before a JSON text.
_BEFORE_JSON = b"\xef\xbb\xbf \t\r\n"


def is_shown(status: int, content: bytes) -> bool:
    """Return True unless an answer is a success in JSON, which is never quoted and may have to hold a token."""
    return not (200 <= status < 300 and content.lstrip(_BEFORE_JSON)[:1] in (b"{", b"[", b""))
