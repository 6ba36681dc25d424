"""Watch the policy: load it before the first task, and cancel what a new one forbids."""

from __future__ import annotations

import threading
from typing import Callable, Optional

from .._internal.logs import get_logger
from ..config import WorkerConfig
from ..errors import PolicyUnavailableError, SekuireError
from .dispatch import Dispatcher

log = get_logger("sekuire.worker")

_NO_WORKSPACE = "the workspace is not known: the login did not name it; give workspace_id= (SEKUIRE_WORKSPACE_ID)"
_NO_GATEWAY = (
    "this worker has no policy_gateway; run pip install 'sekuire[policy]' and use SekuireSDK, which makes one, or give "
    "policy_gateway=PolicyGateway(PolicyClient(...), workspace_id)"
)


class PolicyWatch:
    """Connect one worker to its policy gateway.

    A gateway of the user's own may lack every method that is used here: each is looked up first.

    :param stop_event: ends the wait for a policy when it is set.
    """

    # Threads: load() runs on the stream's thread and may block there; note_active_policy() runs on the heartbeat's; the
    # gateway calls its listener on a thread of its own. No locks: each field has one writer.

    def __init__(self, config: WorkerConfig, dispatcher: Dispatcher, stop_event: threading.Event) -> None:
        self._gateway = config.policy_gateway
        self._is_required = config.policy_required
        self._dispatcher = dispatcher
        self._stop_event = stop_event
        self._is_loaded = False
        self._has_warned = False

    def open(self) -> None:
        """Listen to changes of the policy."""
        self._change_listener("add_listener")

    def close(self) -> None:
        """Listen no more."""
        self._change_listener("remove_listener")

    def _change_listener(self, method: str) -> None:
        change = getattr(self._gateway, method, None)
        if change is not None:
            change(self._on_change)

    def _on_change(self, is_allowed: Callable[..., bool]) -> None:
        self._dispatcher.cancel_denied(is_allowed, "policy changed")

    def load(self) -> None:
        """Have the gateway load its policy, if it can, before the first task comes.

        :raises SekuireError: there is none, and ``policy_required`` is set. Without that, tasks are denied until there
            is one.
        """
        if self._is_required:
            require = getattr(self._gateway, "require_policy", None)
            if require is not None:
                require()
        load = getattr(self._gateway, "ensure_loaded", None)
        if load is None or self._is_loaded:
            return
        problem: Optional[SekuireError] = None
        try:
            load(stop=self._stop_event)
        except PolicyUnavailableError as error:
            problem = error
        if self._stop_event.is_set():
            return
        self._is_loaded = True
        if not self._is_required:
            return
        if problem is None and getattr(self._gateway, "policy", None) is None:
            problem = PolicyUnavailableError("the workspace has no policy" if self._is_enforced() else _NO_WORKSPACE)
        if problem is not None:
            raise PolicyUnavailableError(f"policy_required=True, and {problem}")

    def describe(self) -> str:
        """Return what decides over tasks now, as a line of a log names it."""
        if self._gateway is None:
            return "no policy is enforced"
        if not self._is_enforced():
            return "no policy is enforced (the workspace is not known)"
        in_force = getattr(self._gateway, "in_force", None)
        if in_force is None:
            return f"policy by {type(self._gateway).__name__}"
        standing = in_force.standing
        if standing.policy is not None:
            return f"policy version {standing.policy.version}"
        return "no policy, everything is allowed" if standing.is_loaded else f"no policy, {in_force.describe()}"

    def is_missing(self) -> bool:
        """Return True if the gateway denies every task because it has loaded no policy."""
        is_policy_missing = getattr(self._gateway, "is_policy_missing", None)
        return is_policy_missing is not None and bool(is_policy_missing())

    def note_active_policy(self) -> None:
        """Log an error, once, if the platform names an active policy that nothing here enforces."""
        if self._has_warned or self._is_enforced():
            return
        self._has_warned = True
        problem = _NO_GATEWAY if self._gateway is None else _NO_WORKSPACE
        log.error("the platform names an active policy, and nothing enforces it: %s", problem)

    def _is_enforced(self) -> bool:
        """Return True if a gateway asks the workspace's policy; one of the user's own is assumed to."""
        return self._gateway is not None and getattr(self._gateway, "is_active", True) is True
