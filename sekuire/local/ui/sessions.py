"""Let a person into the dashboard: a one-time code becomes a cookie, and every form carries a token."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import threading
from typing import Dict, Optional

from ..._internal.clock import time
from ..store import Store, hash_of

__all__ = ["CODE_SECONDS", "SESSION_SECONDS", "Sessions"]

#: Seconds in which a link can be used, and after which a person must use another one.
CODE_SECONDS = 600.0
SESSION_SECONDS = 30 * 24 * 3600.0
#: Links that wait for their use. The oldest is dropped.
_MOST_CODES = 100


class Sessions:
    """Make codes and sessions, and check them. Only hashes of them are kept.

    The codes are in memory. The sessions are in the database, so that an open page goes on after a restart.
    """

    # Threads: HTTP threads and users' threads call it. `_lock` guards the codes. Nothing else is called under it.

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        #: Hash → until when, on the monotonic clock.
        self._codes: Dict[str, float] = {}

    def make_code(self) -> str:
        code = secrets.token_urlsafe(18)
        with self._lock:
            self._codes[hash_of(code)] = time.monotonic() + CODE_SECONDS
            while len(self._codes) > _MOST_CODES:
                del self._codes[next(iter(self._codes))]
        return code

    def redeem(self, code: str) -> Optional[str]:
        """Return a new session's secret for a code that is used for the first time and in time, else None."""
        with self._lock:
            end = self._codes.pop(hash_of(code), None)
        if end is None or time.monotonic() >= end:
            return None
        secret = secrets.token_urlsafe(32)
        self._store.open_session(hash_of(secret), SESSION_SECONDS)
        return secret

    def is_open(self, secret: Optional[str]) -> bool:
        return bool(secret) and self._store.is_session(hash_of(str(secret)))

    def close(self, secret: str) -> None:
        self._store.close_session(hash_of(secret))

    @staticmethod
    def form_token(secret: str) -> str:
        """Return the token that the forms of a session's pages carry. Another site cannot read or guess it."""
        return hmac.new(secret.encode(), b"form", hashlib.sha256).hexdigest()

    def is_form_token(self, secret: str, token: str) -> bool:
        return hmac.compare_digest(self.form_token(secret).encode(), token.encode("utf-8", "replace"))
