"""Limit rates over a moving window: in this process, or in a store such as Redis that many processes share."""

from __future__ import annotations

import os
import threading
from collections import deque
from typing import Any, Deque, Dict, List, NamedTuple, Optional, Tuple, Union

from .._internal import checks, fork
from .._internal.clock import time
from .._internal.logs import get_logger
from ..errors import ConfigurationError, PolicyUnavailableError
from ..secret import HiddenUrls, Secret, discreet, hide
from .document import MAX_INTEGER, Rate

__all__ = ["KINDS", "Excess", "RateLimiter"]

log = get_logger("sekuire.policy")

KINDS = ("requests", "tokens")

#: How many steps a window has. What is counted within one step is kept as one entry.
_STEPS = 6000
#: Most units of a shared window of tokens. A store keeps one entry for each unit, and what is counted at once must fit
#: into one call of a script. Higher limits are therefore counted in larger units.
MAX_UNITS = 5000
#: Seconds to connect to a shared store, and to wait for an answer.
STORE_TIMEOUT = 2.0


class Excess(NamedTuple):
    """Name a limit that would be exceeded: ``window`` is ``"minute"`` or ``"hour"``.

    ``retry_after`` is the number of seconds until it may admit what was refused, or None if it never will.
    """

    window: str
    limit: int
    retry_after: Optional[float]


#: Names that the documentation uses too → what is counted.
_ALIASES = {"request": "requests", "token": "tokens"}


def check_request(kind: str, amount: object) -> str:
    """Check what is to be counted. Return its kind: ``"requests"`` or ``"tokens"``.

    :raises ConfigurationError: an unknown kind, or an amount that is not a whole number of 0 or more.
    """
    kind = _ALIASES.get(kind, kind) if isinstance(kind, str) else kind
    if kind not in KINDS:
        raise ConfigurationError(f"must be one of {', '.join(KINDS)}, got {kind!r}", "kind")
    if type(amount) is not int or not 0 <= amount <= MAX_INTEGER:
        checks.check_whole("amount", amount, least=0)
        if amount > MAX_INTEGER:  # type: ignore[operator]
            raise ConfigurationError("must be a whole number, 0 or more, got one beyond 2^53", "amount")
    return kind


class RateLimiter:
    """Count requests and tokens over the last minute and the last hour. ::

        policy = Policy.from_content({"rate_limits": {"tokens": {"max_per_minute": 1000}}})
        enforcer = PolicyEnforcer(policy, limiter=RateLimiter(namespace="ws_1"))
        enforcer.enforce_rate_limit("tokens", 800)
        print(enforcer.check_rate_limit("tokens", 300).rule)  # rate_limit.tokens_per_minute

    Without ``storage_uri`` it counts in this process, exactly. With one, for example ``"redis://localhost:6379/0"``,
    all processes that name the same store and ``namespace`` share their counts. The store is one of those that the
    package ``limits`` supports for a moving window, and the clocks of the machines must agree.

    A shared limit of more than 5,000 tokens is counted in units. A unit is a power of two, such that the limit has
    2,500 to 5,000 of them, and what is counted is rounded up. If a policy changes such a limit to one of other units,
    what this process has counted before goes on counting.

    Any thread may call anything. Close a shared one at the end.

    :param namespace: whose limits these are, normally the workspace's id.
    :raises ConfigurationError: the store's URI cannot be used, or the extra is not installed.
    """

    # Threads: `_lock` guards what is counted or noted in memory, and is never held over I/O.

    @discreet
    def __init__(self, storage_uri: Union[str, Secret, None] = None, *, namespace: str) -> None:
        if not isinstance(namespace, str) or not namespace:
            raise ConfigurationError("must be a non-empty str, such as the workspace's id", "namespace")
        self._namespace = namespace
        self._lock = threading.Lock()
        self._windows: Dict[Tuple[str, str], _Window] = {}
        #: (kind, window) → unit → when this process last counted in it, in a shared store.
        self._units: Dict[Tuple[str, str], Dict[int, float]] = {}
        uri = storage_uri.reveal() if isinstance(storage_uri, Secret) else storage_uri
        self._store: Any = None if uri in (None, "memory://") else _open_store(uri)
        # For a copy in another process. It may hold a password, so it is never shown.
        self._storage_uri = None if uri is None else HiddenUrls({"": uri})
        #: The process whose counts are in memory. A fork of it would have all that is left of a limit for itself.
        self._pid = os.getpid()
        fork.reset_in_child(self, RateLimiter.reset_in_child)

    @property
    def namespace(self) -> str:
        """Return whose limits these are."""
        return self._namespace

    def __reduce__(self) -> Tuple[Any, ...]:
        return (
            (_reopen, (self._storage_uri[""], self._namespace))
            if self._storage_uri and self.is_shared
            else (_Elsewhere, (self._namespace,))
        )

    @property
    def is_shared(self) -> bool:
        """Return True if other processes can share these counts."""
        return self._store is not None

    def now(self) -> float:
        """Return the time by which rates in memory are counted, in seconds."""
        return time.monotonic()

    def rename(self, namespace: str) -> None:
        """Count for another namespace from now on."""
        self._namespace = namespace

    def close(self) -> None:
        """Close the connections to a shared store. A later question opens them again."""
        close = getattr(getattr(self._store, "storage", None), "close", None)
        if close is not None:
            try:
                close()
            except Exception as error:  # noqa: BLE001
                log.debug("closing the store of the rate limits failed (%s)", type(error).__name__)

    def hit(self, kind: str, rate: Rate, amount: int = 1) -> Optional[Excess]:
        """Count ``amount`` if it exceeds neither limit of ``rate``, and return None. Else return the limit it exceeds.

        What is refused is not counted.

        :param kind: ``"requests"`` or ``"tokens"``.
        :raises ConfigurationError: an unknown kind, or an amount that is not a whole number of 0 or more; or this is a
            fork of the process that made the limiter, and it does not count in a shared store.
        :raises PolicyUnavailableError: the shared store cannot be asked.
        """
        kind = check_request(kind, amount)
        #: Window, its seconds and its limit, shortest first.
        limits: List[Tuple[str, int, int]] = []
        if rate.max_per_minute is not None:
            limits.append(("minute", 60, rate.max_per_minute))
        if rate.max_per_hour is not None:
            limits.append(("hour", 3600, rate.max_per_hour))
        for window, _, limit in limits:
            if amount > limit:
                return Excess(window, limit, None)
        if not limits or amount == 0:
            return None
        if self._store is None:
            if self._pid != os.getpid():
                raise ConfigurationError(
                    f"rate limits are counted in the memory of process {self._pid}, from which this one was forked; "
                    "make the gateway (or the SDK, or the RateLimiter) after the fork, or count in shared storage "
                    "(storage_uri='redis://host:6379/0')",
                    _OPTION,
                )
            return self._hit_memory(kind, limits, amount)
        return self._hit_store(kind, limits, amount)

    def _hit_memory(self, kind: str, limits: List[Tuple[str, int, int]], amount: int) -> Optional[Excess]:
        with self._lock:
            now = self.now()
            windows = []
            for name, seconds, limit in limits:
                window = self._windows.get((kind, name))
                if window is None:
                    window = self._windows[kind, name] = _Window(seconds)
                wait = window.wait(now, limit, amount)
                if wait > 0:
                    return Excess(name, limit, wait)
                windows.append(window)
            for window in windows:
                window.add(now, amount)
        return None

    def _hit_store(self, kind: str, limits: List[Tuple[str, int, int]], amount: int) -> Optional[Excess]:
        problem = ""
        try:
            # Only look at the longer window before the shorter one counts, so that a refusal counts nothing.
            for name, seconds, limit in [*limits[1:], limits[0]]:
                key, units, cost = self._scale(kind, name, seconds, limit, amount)
                if cost > units:
                    # What was counted in other units has used all of the limit.
                    return Excess(name, limit, float(seconds))
                if name == limits[0][0]:
                    if not self._store.acquire_entry(key, units, seconds, cost):
                        return Excess(name, limit, self._wait(key, units, seconds))
                elif self._store.get_moving_window(key, units, seconds)[1] + cost > units:
                    return Excess(name, limit, self._wait(key, units, seconds))
            for name, seconds, limit in limits[1:]:
                key, units, cost = self._scale(kind, name, seconds, limit, amount)
                if cost > units or not self._store.acquire_entry(key, units, seconds, cost):
                    return Excess(name, limit, self._wait(key, max(units, 1), seconds))
        except Exception as error:  # noqa: BLE001
            # Its text may hold the URI, and with it a password.
            problem = type(error).__name__
        if problem:
            raise PolicyUnavailableError(f"the store of the rate limits cannot be asked ({problem})")
        return None

    def _scale(self, kind: str, window: str, seconds: int, limit: int, amount: int) -> Tuple[str, int, int]:
        """Return the store's key, its limit, and what ``amount`` counts there."""
        # The limit is not in the key: what was counted goes on counting when a policy changes the limit. A power of two
        # also stays the same for most changes.
        unit = 1 if kind != "tokens" or limit <= MAX_UNITS else 1 << (-(-limit // MAX_UNITS) - 1).bit_length()
        left = limit
        now = self.now()
        with self._lock:
            used = self._units.setdefault((kind, window), {})
            used[unit] = now
            before = [other for other, at in used.items() if other != unit and now - at < seconds]
            if len(used) > len(before) + 1:
                self._units[kind, window] = {one: used[one] for one in (unit, *before)}
        for other in before:
            left -= other * self._store.get_moving_window(self._key(kind, window, other), MAX_UNITS, seconds)[1]
        # Rounded up, the whole limit at once must still fit.
        cost = min(-(-amount // unit), limit // unit)
        return self._key(kind, window, unit), max(left // unit, 0), cost

    def _key(self, kind: str, window: str, unit: int) -> str:
        return f"sekuire/{self._namespace}/{kind}/{window}/{unit}"

    def _wait(self, key: str, units: int, seconds: int) -> float:
        begun: float = self._store.get_moving_window(key, units, seconds)[0]
        return min(max(begun + seconds - time.time(), 0.001), float(seconds))

    def reset_in_child(self) -> None:
        """Replace what a forked child cannot use of its parent."""
        self._lock = threading.Lock()


class _Elsewhere(RateLimiter):
    """Refuse to count. This is the copy, in another process, of a limiter that counts in its own memory."""

    def __init__(self, namespace: str) -> None:
        super().__init__(namespace=namespace)

    def hit(self, kind: str, rate: Rate, amount: int = 1) -> Optional[Excess]:
        kind = check_request(kind, amount)
        if amount == 0 or (rate.max_per_minute is None and rate.max_per_hour is None):
            return None
        raise PolicyUnavailableError(
            "rate limits are counted in the memory of the worker's process, which this one cannot ask; count them in a "
            "store that both can reach (storage_uri)"
        )


_reopened: Dict[Tuple[Secret, str], RateLimiter] = {}


def _reopen(storage_uri: str, namespace: str) -> RateLimiter:
    # All policies of a process share it, because it holds connections.
    uri = hide(storage_uri)
    limiter = _reopened.get((uri, namespace))
    if limiter is None:
        limiter = _reopened[uri, namespace] = RateLimiter(uri, namespace=namespace)
    return limiter


class _Window:
    """Hold what was counted in the last ``seconds``: entries of (first instant, last instant, amount), oldest first."""

    __slots__ = ("_entries", "_seconds", "_step", "_total")

    def __init__(self, seconds: int) -> None:
        self._seconds = seconds
        self._step = seconds / _STEPS
        self._entries: Deque[Tuple[float, float, int]] = deque()
        self._total = 0

    def wait(self, now: float, limit: int, amount: int) -> float:
        """Return the seconds until ``amount`` more do not exceed ``limit``, or 0 if they do not now."""
        entries = self._entries
        while entries and entries[0][1] <= now - self._seconds:
            self._total -= entries.popleft()[2]
        excess = self._total + amount - limit
        if excess <= 0:
            return 0.0
        for _, last, count in entries:
            excess -= count
            if excess <= 0:
                return max(last + self._seconds - now, 0.001)
        return float(self._seconds)

    def add(self, now: float, amount: int) -> None:
        """Count ``amount``."""
        self._total += amount
        if self._entries:
            first, _, count = self._entries[-1]
            if now - first < self._step:
                # Count all of it as if it had come last: it leaves the window a little late, never early.
                self._entries[-1] = (first, now, count + amount)
                return
        self._entries.append((now, now, amount))


def _open_store(uri: object) -> Any:
    if not isinstance(uri, str):
        raise ConfigurationError(f"must be a str such as 'redis://localhost:6379', got {type(uri).__name__}", _OPTION)
    scheme = uri.partition("://")[0]
    try:
        from limits.storage import storage_from_string
    except ImportError as error:
        name = (error.name or "").partition(".")[0]
        raise ConfigurationError(f"needs the package {name!r}: pip install 'sekuire[policy]'", _OPTION) from None
    options: Dict[str, Any] = {}
    if scheme.partition("+")[0] in ("redis", "rediss", "valkey", "valkeys"):
        options = {"socket_connect_timeout": STORE_TIMEOUT, "socket_timeout": STORE_TIMEOUT}
    problem = ""
    try:
        store: Any = storage_from_string(uri, **options)
        if hasattr(store, "acquire_entry") and not scheme.startswith("async"):
            return store
        problem = "it has no moving window that threads can use"
    except Exception as error:  # noqa: BLE001
        # Its text may hold the URI, and with it a password.
        problem = f"{type(error).__name__}; is the URI right, and the driver for its scheme installed?"
    raise ConfigurationError(f"no store for rate limits at {scheme!r}://...: {problem}", _OPTION)


_OPTION = "storage_uri"
