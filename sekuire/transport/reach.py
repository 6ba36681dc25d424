"""Say once that the platform cannot be reached, and once that it can be again, whoever notices it."""

from __future__ import annotations

import logging
import threading
from typing import Optional, Set

from .._internal import fork
from .._internal.clock import time
from .._internal.logs import get_logger
from ..errors import SekuireError, TransportError

log = get_logger("sekuire.http")

_CHECK = " (does the platform run, and is the URL right?)"


class Reach:
    """Track whether the platform can be reached, for all that share one installation. ::

        reach = Reach("http://127.0.0.1:9300")
        reach.fail(stream, TransportError("cannot reach 127.0.0.1:9300: Connection refused"))  # one line
        reach.fail(beacon, TransportError("127.0.0.1:9300 did not answer in time"))  # none: the same outage
        reach.restore(beacon)
        reach.restore(stream)  # one line: the outage is over, and took so long

    :param url: the platform's, for the lines.
    """

    # Threads: any thread may call anything. `_lock` guards all fields. It is not held while a line is logged.

    def __init__(self, url: str) -> None:
        self._url = url
        self._lock = threading.Lock()
        #: Who cannot do its work now.
        self._failing: Set[int] = set()
        #: When the outage began that has been said (monotonic), or None.
        self._since: Optional[float] = None
        self._was_reached = False
        fork.reset_in_child(self, Reach._reset)

    @property
    def is_lost(self) -> bool:
        """Return True during an outage that has been said."""
        return self._since is not None

    def note(self, error: SekuireError, what: str = "") -> None:
        """Say why the platform cannot be used, unless that has been said. Whoever tries goes on trying.

        :param what: what follows from it.
        """
        with self._lock:
            if self._since is not None:
                return
            self._since = time.monotonic()
            was_reached = self._was_reached
        if was_reached:
            log.say(logging.WARNING, "lost the connection to %s (%s); reconnecting", self._url, error)
        elif what:
            log.say(logging.WARNING, "%s: %s", what, error)
        else:
            is_unreached = isinstance(error, TransportError) and not error.was_sent
            log.say(logging.WARNING, "%s%s; retrying", error, _CHECK if is_unreached else "")

    def fail(self, who: object, error: SekuireError, what: str = "") -> None:
        """Note that ``who`` cannot do its work, and say why as :meth:`note` does."""
        with self._lock:
            self._failing.add(id(who))
        self.note(error, what)

    def restore(self, who: object) -> Optional[float]:
        """Note that ``who`` does its work, and say it if that ends an outage.

        Return how long it took if it was the first: then nothing is said, because the caller says that it is connected.
        """
        with self._lock:
            self._failing.discard(id(who))
            was_reached, self._was_reached = self._was_reached, True
            since = self._since
            if since is None or self._failing:
                return None
            self._since = None
        seconds = time.monotonic() - since
        if not was_reached:
            return seconds
        log.say(logging.INFO, "reconnected to %s after %s", self._url, duration(seconds))
        return None

    def log_in(self) -> None:
        """Note that a login succeeded. What noticed no failure of its own says nothing of the end of the outage."""
        with self._lock:
            since = self._since
            if since is None or self._failing or not self._was_reached:
                return
            self._since = None
        log.say(logging.INFO, "reconnected to %s after %s", self._url, duration(time.monotonic() - since))

    def leave(self, who: object) -> None:
        """Note that ``who`` has ended, whether it could do its work or not."""
        with self._lock:
            self._failing.discard(id(who))
            if not self._failing:
                self._since = None

    def _reset(self) -> None:
        self._lock = threading.Lock()


def duration(seconds: float) -> str:
    """Return a duration as a person reads it, such as ``3.2 s`` or ``4 min 10 s``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"
