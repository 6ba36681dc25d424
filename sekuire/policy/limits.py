"""Rate limits over a moving window: in this process, or shared by many through a store such as Redis."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections import deque
from typing import Any, Callable, Deque, Dict, List, NamedTuple, Optional, Tuple

from .._internal.logs import get_logger
from ..errors import ConfigurationError, PolicyUnavailableError
from .document import MAX_INTEGER, Rate

__all__ = ["KINDS", "Excess", "RateLimiter"]

log = get_logger("sekuire.policy")

KINDS = ("requests", "tokens")
#: The windows of a rate, shortest first, in seconds.
WINDOWS = (("minute", 60), ("hour", 3600))

#: How much of its length a window is remembered by: what falls into one such step is kept as one entry.
_STEPS = 6000
#: Units that a shared window of tokens has at most. A store keeps one entry for each unit, and what is counted at once
#: must fit into one call of a script, so that higher limits are counted in larger units.
MAX_UNITS = 5000
#: Seconds to connect to a shared store, and to wait for an answer.
STORE_TIMEOUT = 2.0


class Excess(NamedTuple):
    """A limit that would be exceeded: ``window`` is ``"minute"`` or ``"hour"``.

    ``retry_after`` is seconds until it may admit what was refused; None where it never will.
    """

    window: str
    limit: int
    retry_after: Optional[float]


def check_request(kind: object, amount: object) -> None:
    """:raises ConfigurationError: an unknown kind, or an amount that is no whole number of 0 or more."""
    if kind not in KINDS:
        raise ConfigurationError(f"must be one of {', '.join(KINDS)}, got {kind!r}", "kind")
    if not isinstance(amount, int) or isinstance(amount, bool) or not 0 <= amount <= MAX_INTEGER:
        # Python refuses to write integers of more than 4,300 digits.
        found = repr(amount) if not isinstance(amount, int) or abs(amount) <= MAX_INTEGER else "one beyond 2^53"
        raise ConfigurationError(f"must be a whole number, 0 or more, got {found[:100]}", "amount")


class RateLimiter:
    """Counts requests and tokens over the last minute and the last hour.

    Without ``storage_uri`` it counts in this process, exactly. With one, for example ``"redis://localhost:6379/0"``,
    all processes that name the same store and ``namespace`` share their counts; the store is one of those that the
    package ``limits`` supports for a moving window, and the clocks of the machines must agree. Tokens of a shared limit
    above 5,000 are counted in units, powers of two of which it has 2,500 to 5,000, rounded up: never too little.
    Where a policy changes such a limit to one of other units, what this process has counted before goes on counting.

    Any thread may call; close a shared one at the end. ``_lock`` guards what is counted, or noted, in memory; it is
    never held over I/O.

    :param namespace: whose limits these are, normally the workspace's id.
    :raises ConfigurationError: the store's URI cannot be used, or the extra is not installed.
    """

    def __init__(
        self, storage_uri: Optional[str] = None, *, namespace: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        if not isinstance(namespace, str) or not namespace:
            raise ConfigurationError("must be a non-empty str, such as the workspace's id", "namespace")
        self._namespace = namespace
        self._clock = clock
        self._lock = threading.Lock()
        self._windows: Dict[Tuple[str, str], _Window] = {}
        #: (kind, window) → unit → when this process has last counted in it, in a shared store.
        self._units: Dict[Tuple[str, str], Dict[int, float]] = {}
        self._store: Any = None if storage_uri in (None, "memory://") else _open_store(storage_uri)
        # For a copy in another process. It may hold a password: it is shown nowhere.
        self._storage_uri = storage_uri
        #: The process whose counts are in memory: each fork of it would have all that is left of a limit for itself.
        self._pid = os.getpid()
        _limiters.add(self)

    @property
    def namespace(self) -> str:
        return self._namespace

    def __reduce__(self) -> Tuple[Any, ...]:
        return (_reopen, (self._storage_uri, self._namespace)) if self.is_shared else (_Elsewhere, (self._namespace,))

    @property
    def is_shared(self) -> bool:
        """Whether other processes can share these counts."""
        return self._store is not None

    def renamed(self, namespace: str) -> RateLimiter:
        """Return a limiter for another namespace that counts in the same store, or in the same process."""
        other = RateLimiter(self._storage_uri, namespace=namespace, clock=self._clock)
        other._pid = self._pid
        return other

    def close(self) -> None:
        """Close the connections to a shared store. A later question opens them again."""
        close = getattr(getattr(self._store, "storage", None), "close", None)
        if close is not None:
            try:
                close()
            except Exception as error:  # noqa: BLE001
                log.debug("closing the store of the rate limits failed (%s)", type(error).__name__)

    def hit(self, kind: str, rate: Rate, amount: int = 1) -> Optional[Excess]:
        """Count ``amount`` if that exceeds neither limit of ``rate``; None if so, else the limit that forbids it.

        What is refused is not counted.

        :param kind: ``"requests"`` or ``"tokens"``.
        :raises ConfigurationError: an unknown kind, or an amount that is no whole number of 0 or more; or this is a
            fork of the process that made the limiter, and it does not count in a shared store.
        :raises PolicyUnavailableError: the shared store cannot be asked.
        """
        check_request(kind, amount)
        limits = [
            (window, seconds, limit)
            for (window, seconds), limit in zip(WINDOWS, (rate.max_per_minute, rate.max_per_hour))
            if limit is not None
        ]
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
            now = self._clock()
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
            # The longer window is only looked at before the shorter one counts, so that a refusal costs nothing.
            for name, seconds, limit in [*limits[1:], limits[0]]:
                key, units, cost = self._scale(kind, name, seconds, limit, amount)
                if cost > units:
                    # All that is left was taken in other units.
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
        """The store's key, its limit and what ``amount`` counts there."""
        # The limit is not in the key: what was counted goes on counting when a policy changes it. A power of two
        # stays the same for most changes, too.
        unit = 1 if kind != "tokens" or limit <= MAX_UNITS else 1 << (-(-limit // MAX_UNITS) - 1).bit_length()
        left = limit
        now = self._clock()
        with self._lock:
            used = self._units.setdefault((kind, window), {})
            used[unit] = now
            before = [other for other, at in used.items() if other != unit and now - at < seconds]
            if len(used) > len(before) + 1:
                self._units[kind, window] = {one: used[one] for one in (unit, *before)}
        for other in before:
            left -= other * self._store.get_moving_window(self._key(kind, window, other), MAX_UNITS, seconds)[1]
        # Rounding up must not make the whole limit at once too much.
        cost = min(-(-amount // unit), limit // unit)
        return self._key(kind, window, unit), max(left // unit, 0), cost

    def _key(self, kind: str, window: str, unit: int) -> str:
        return f"sekuire/{self._namespace}/{kind}/{window}/{unit}"

    def _wait(self, key: str, units: int, seconds: int) -> float:
        begun: float = self._store.get_moving_window(key, units, seconds)[0]
        return min(max(begun + seconds - time.time(), 0.001), float(seconds))


class _Elsewhere(RateLimiter):
    """The copy in another process of a limiter that counts in its own memory, where it cannot be asked."""

    def __init__(self, namespace: str) -> None:
        super().__init__(namespace=namespace)

    def hit(self, kind: str, rate: Rate, amount: int = 1) -> Optional[Excess]:
        check_request(kind, amount)
        if amount == 0 or (rate.max_per_minute is None and rate.max_per_hour is None):
            return None
        raise PolicyUnavailableError(
            "rate limits are counted in the memory of the worker's process, which this one cannot ask; count them in a "
            "store that both can reach (storage_uri)"
        )


_reopened: Dict[Tuple[str, str], RateLimiter] = {}


def _reopen(storage_uri: str, namespace: str) -> RateLimiter:
    # One for all policies of a process: each holds connections.
    limiter = _reopened.get((storage_uri, namespace))
    if limiter is None:
        limiter = _reopened[storage_uri, namespace] = RateLimiter(storage_uri, namespace=namespace)
    return limiter


class _Window:
    """What was counted in the last ``seconds``: entries of (first instant, last instant, amount), oldest first."""

    __slots__ = ("_entries", "_seconds", "_step", "_total")

    def __init__(self, seconds: int) -> None:
        self._seconds = seconds
        self._step = seconds / _STEPS
        self._entries: Deque[Tuple[float, float, int]] = deque()
        self._total = 0

    def wait(self, now: float, limit: int, amount: int) -> float:
        """Seconds until ``amount`` more do not exceed ``limit``; 0 where they do not now."""
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
        self._total += amount
        if self._entries:
            first, _, count = self._entries[-1]
            if now - first < self._step:
                # As if all of it had come last: it leaves the window a little late, never early.
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

_limiters: weakref.WeakSet[RateLimiter] = weakref.WeakSet()


def _after_fork() -> None:
    # A lock held by a thread of the parent at the moment of the fork would never be released in the child.
    for limiter in list(_limiters):
        limiter._lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
