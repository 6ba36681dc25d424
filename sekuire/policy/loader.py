"""Keep the policy in force the active one: load it at once, or in the background."""

from __future__ import annotations

import itertools
import logging
import math
import random
import threading
from typing import Optional

from .._internal import fork
from .._internal.clock import time
from .._internal.logs import get_logger
from .._internal.threads import Deadline, join_all, spawn
from ..errors import ConfigurationError, PolicyIntegrityError, PolicyUnavailableError, SekuireError
from ..transport.retry import Backoff
from .client import PolicyFetcher
from .document import Policy
from .in_force import PolicyInForce
from .source import Workspace

__all__ = ["Loader"]

log = get_logger("sekuire.policy")

#: Seconds between tries while the active policy is not available: full jitter, doubling up to the second number.
_RETRY_MIN, _RETRY_MAX = 0.5, 30.0
#: Fewest seconds after which a policy is loaded again only because its time is over.
_LEAST_TTL = 1.0
#: Seconds between two looks at what may end the wait for a first answer.
_SLICE = 0.1


class Loader:
    """Load a workspace's policy and have it adopted.

    :param client: fetches and verifies.
    :param workspace: names the workspace.
    :param in_force: adopts what was loaded.
    """

    # Threads: any thread may call anything. `sekuire-policy` loads in the background: it is started when there is
    # something to load, ends when that is done, and belongs to this object. `_lock` guards that thread's state.
    # `_answered` guards whether there was an answer. Neither is held over I/O or a callback.

    def __init__(self, client: PolicyFetcher, workspace: Workspace, in_force: PolicyInForce) -> None:
        self._client = client
        self._workspace = workspace
        self._in_force = in_force
        #: ``time.monotonic()`` after which the policy is loaded again.
        self.due = math.inf
        #: True once there was an answer, or a failure to get one.
        self.is_tried = False
        self.is_closed = False
        self.backoff = Backoff(_RETRY_MIN, _RETRY_MAX)
        self._lock = threading.Lock()
        self._answered = threading.Condition()
        self._problem: Optional[str] = None
        self._stop = threading.Event()
        self._thread: Optional[threading.Thread] = None
        self._is_wanted = False
        #: The hash that the last heartbeat named.
        self._named: Optional[str] = None
        self._not_before = 0.0
        #: The numbers of the questions, in their order.
        self._numbers = itertools.count(1)
        fork.reset_in_child(self, Loader.reset_in_child)

    # -- on the caller's thread --

    def load(self) -> Optional[Policy]:
        """Ask the platform now. Return the policy in force then, or None if the workspace has none.

        :raises SekuireError: as :meth:`PolicyClient.fetch_active_policy`. The last good policy stays in force.
        """
        workspace_id = self._workspace.workspace_id
        if workspace_id is None:
            raise ConfigurationError(
                "is not known: the platform did not name it at the login; give workspace_id= (SEKUIRE_WORKSPACE_ID)",
                "workspace_id",
            )
        number = next(self._numbers)
        self._client.invalidate_cache(workspace_id)
        try:
            policy = self._client.fetch_active_policy(workspace_id)
            self._in_force.adopt(workspace_id, policy, number)
        except SekuireError as error:
            try:
                self._keep(workspace_id, error)
            finally:
                self.note(str(error))
            raise
        self.due = time.monotonic() + max(self._client.cache_ttl, _LEAST_TTL) * random.uniform(0.9, 1.0)
        self.note(None)
        return policy

    def wait(self, timeout: float, stop: Optional[threading.Event] = None) -> None:
        """Wait for the first answer, unless it came before. Without one let a stored policy decide.

        :param stop: ends the wait too.
        :raises PolicyUnavailableError: there is neither an answer nor a stored policy.
        """
        deadline = Deadline(timeout)
        if not self._in_force.standing.is_loaded:
            self.wake()
        with self._answered:
            while not self.is_tried and not (deadline.is_expired() or (stop is not None and stop.is_set())):
                if self._thread is None:
                    # Closed, or the interpreter is ending: nobody will load it.
                    break
                self._answered.wait(min(_SLICE, deadline.remaining()))
        denial = f"no policy could be loaded: {self._problem or f'no answer within {timeout:g} s'}"
        workspace_id = self._workspace.workspace_id
        if workspace_id is not None:
            self._in_force.fall_back(workspace_id, denial)
        if not self._in_force.standing.is_loaded:
            raise PolicyUnavailableError(denial)

    def compare(self, named: Optional[str]) -> None:
        """Load the policy in the background if a heartbeat names another one than that in force, or if it is due."""
        self._named = named
        if named is not None and named != self._in_force.hash:
            self.wake(is_new=True)
        elif not self._in_force.standing.is_loaded or time.monotonic() >= self.due:
            self.wake()

    def wake(self, *, may_wait: bool = True, is_new: bool = False) -> None:
        """Load the policy in the background.

        :param may_wait: False while a decision is made. It must not wait for the lock, and another one will ask again.
        :param is_new: True if a fetch in progress may be too old.
        """
        if not self._lock.acquire(blocking=may_wait):
            return
        try:
            self.due = math.inf
            if self._thread is not None or self.is_closed:
                self._is_wanted = self._is_wanted or is_new
                return
            self._is_wanted = True
            self._thread = spawn(self._run, "sekuire-policy")
            if self._thread is None:
                # Too many threads, or the interpreter is ending. The next decision or heartbeat tries again.
                self.due = time.monotonic() + _RETRY_MIN
        finally:
            self._lock.release()

    def note(self, problem: Optional[str]) -> None:
        """Note that there was an answer, or why there was none, and wake all who wait for it."""
        with self._answered:
            self._problem = problem
            self.is_tried = True
            self._answered.notify_all()

    def close(self) -> None:
        """Have the thread end. Load nothing in the background any more."""
        with self._lock:
            self.is_closed = True
        self._stop.set()

    def join(self, timeout: float) -> None:
        """Wait for the end of the thread."""
        with self._lock:
            thread = self._thread
        if thread is not None and join_all([thread], Deadline(timeout)):
            log.warning("still running after the gateway was closed: %s (it ends with its request)", thread.name)

    def _keep(self, workspace_id: str, error: SekuireError) -> None:
        """Go on with the last good policy, if there is one, and log why."""
        in_force = self._in_force
        in_force.fall_back(workspace_id, f"no policy could be loaded: {error}")
        is_grave = isinstance(error, PolicyIntegrityError) or not in_force.standing.is_loaded
        level = logging.ERROR if is_grave else logging.WARNING
        log.log(
            level if self._problem != str(error) else logging.DEBUG,
            "cannot load the policy of %s, %s: %s", workspace_id, in_force.describe(), error,
        )  # fmt: skip

    # -- on the thread --

    def _run(self) -> None:
        is_loaded = False
        while True:
            with self._lock:
                # While this thread was loading, a heartbeat may have named the very policy that has come.
                is_served = is_loaded and self._named == self._in_force.hash
                if self.is_closed or not self._is_wanted or is_served:
                    self._is_wanted = False
                    self._thread = None
                    return
                self._is_wanted = False
            if self._stop.wait(max(0.0, self._not_before - time.monotonic())):
                continue
            try:
                is_loaded = self._load_once()
            except Exception:
                log.exception("refreshing the policy failed in an unforeseen way")
                is_loaded = False
                self._try_again(None)

    def _load_once(self) -> bool:
        """Load the policy. Return True if there was an answer; else this thread tries again."""
        try:
            self.load()
        except SekuireError as error:
            self._try_again(getattr(error, "retry_after", None))
            return False
        self.backoff.reset()
        # What a heartbeat names may be ahead of what is served: do not ask again at once.
        self._not_before = time.monotonic() + _RETRY_MIN
        return True

    def _try_again(self, at_least: Optional[float]) -> None:
        self._not_before = time.monotonic() + max(0.1, self.backoff.next(at_least))
        with self._lock:
            self._is_wanted = True

    def reset_in_child(self) -> None:
        """Replace what a forked child cannot use of its parent."""
        # A forked child does not have the parent's thread. What that was loading, the child's next decision asks for.
        if self._thread is not None:
            self.due = 0.0
        self._lock = threading.Lock()
        self._answered = threading.Condition()
        self._thread = None
        if not self.is_closed:
            self._stop = threading.Event()
