"""Define the values that travel between the packages: frozen, without behaviour, without I/O."""

from __future__ import annotations

import contextlib
import datetime as dt
from typing import TYPE_CHECKING, Any, Dict, Mapping, Optional, Tuple

import attrs

from ..errors import ConfigurationError
from ..secret import Secret, check_secret, to_secret

if TYPE_CHECKING:
    from typing_extensions import TypeGuard

__all__ = [
    "BeaconStatus",
    "Command",
    "Completion",
    "Connected",
    "Failure",
    "Grant",
    "HeartbeatReply",
    "RuntimeCredentials",
    "Task",
    "WorkerReport",
    "WorkerStats",
    "is_id",
]

#: Longest id, in bytes of UTF-8.
MAX_ID_BYTES = 256


@attrs.frozen(kw_only=True, slots=True)
class Task:
    """Hold one unit of work as the platform sent it (docs/protocol.md, "Tasks"); ``timeout`` in seconds.

    ``size`` is the number of characters of the JSON that it came in, or 0 if it came otherwise.
    """

    task_id: str
    capability: str
    input: Any = None
    attempt: int = 1
    tool: Optional[str] = None
    workspace_id: Optional[str] = None
    requester_id: Optional[str] = None
    parent_task_id: Optional[str] = None
    workflow_id: Optional[str] = None
    trace_id: Optional[str] = None
    timeout: Optional[float] = None
    size: int = attrs.field(default=0, eq=False, repr=False)


@attrs.frozen(kw_only=True, slots=True)
class Command:
    """Hold an order of the platform: ``type`` is ``"pause"``, ``"resume"`` or ``"terminate"``; times in seconds."""

    type: str
    reason: Optional[str] = None
    command_id: Optional[str] = None
    shutdown_timeout: Optional[float] = None


@attrs.frozen(kw_only=True, slots=True)
class Connected:
    """Hold the stream's first event; ``heartbeat_interval`` in seconds."""

    installation_id: Optional[str] = None
    heartbeat_interval: Optional[float] = None
    desired_state: Optional[str] = None
    #: Field → why its value is not used.
    ignored: Mapping[str, str] = attrs.field(factory=dict, eq=False)


@attrs.frozen(kw_only=True, slots=True)
class Failure:
    """Say why a task failed: a code (docs/protocol.md, or the handler's), a message, and advice to the requester."""

    code: str
    message: str = ""
    retryable: bool = False
    details: Optional[Mapping[str, Any]] = None


@attrs.frozen(kw_only=True, slots=True)
class Completion:
    """Hold the one result of a task: its ``failure`` if that is not None, or else its ``output``."""

    task_id: str
    attempt: int
    output: Any = None
    failure: Optional[Failure] = None
    execution_time_ms: int = 0


@attrs.frozen(kw_only=True, slots=True)
class WorkerReport:
    """Hold what one worker says of itself in a heartbeat."""

    worker_id: str
    status: str
    active_tasks: int
    capabilities: Tuple[str, ...] = ()


@attrs.frozen(kw_only=True, slots=True)
class HeartbeatReply:
    """Hold the platform's answer to a heartbeat. Every field is optional; lifetimes and intervals are in seconds.

    A ``lease_lifetime`` of 0 means that the platform has ended the lease, None that the answer says nothing about it.
    """

    lease_expires_at: Optional[dt.datetime] = None
    lease_lifetime: Optional[float] = None
    heartbeat_interval: Optional[float] = None
    refreshed_token: Optional[Secret] = None
    refreshed_token_expires_at: Optional[dt.datetime] = None
    refreshed_token_lifetime: Optional[float] = None
    active_policy_hash: Optional[str] = None
    revoked: bool = False
    reason: Optional[str] = None
    shutdown_timeout: Optional[float] = None
    desired_state: Optional[str] = None
    #: The decoded JSON as it came, for a policy gateway of the user's own.
    raw: Mapping[str, Any] = attrs.field(factory=dict, repr=False)
    #: Field → why its value is not used.
    ignored: Mapping[str, str] = attrs.field(factory=dict, eq=False)


def _aware(value: Optional[dt.datetime]) -> Optional[dt.datetime]:
    if value is None:
        return None
    if isinstance(value, dt.datetime) and value.utcoffset() is not None:
        with contextlib.suppress(OverflowError):
            return value.astimezone(dt.timezone.utc)
    raise ConfigurationError("must be an aware datetime, such as datetime.now(timezone.utc)", "expires_at")


def is_id(value: object) -> TypeGuard[str]:
    """Return True if ``value`` can be an id: a str of 1 to 256 bytes, no control characters, not ``.`` or ``..``.

    The line and paragraph separators of Unicode count as control characters: they would split a line of a log.
    """
    if not isinstance(value, str) or not value or value in (".", ".."):
        return False
    if value.isascii():
        return len(value) <= MAX_ID_BYTES and value.isprintable()
    if any(ord(c) < 32 or 127 <= ord(c) < 160 or 0xD800 <= ord(c) < 0xE000 or c in "\u2028\u2029" for c in value):
        return False
    return len(value.encode()) <= MAX_ID_BYTES


@attrs.frozen(kw_only=True, slots=True)
class RuntimeCredentials:
    """Hold an installation's id, its runtime token, and the refresh token that renews it. ::

        credentials = RuntimeCredentials(installation_id="inst-1", runtime_token="skr_runtime_...")
        store = RuntimeCredentialsStore(credentials)
        print(store.current.to_env()["SEKUIRE_INSTALLATION_ID"])  # inst-1

    Tokens given as str become :class:`~sekuire.secret.Secret`. ``expires_at`` is when the runtime token ends, an aware
    datetime, or None if that is unknown.

    :raises ConfigurationError: a token is not visible ASCII, an id is not valid, or ``expires_at`` is naive.
    """

    installation_id: Optional[str] = attrs.field(default=None)
    runtime_token: Optional[Secret] = attrs.field(default=None, converter=to_secret, validator=check_secret)
    refresh_token: Optional[Secret] = attrs.field(default=None, converter=to_secret, validator=check_secret)
    expires_at: Optional[dt.datetime] = attrs.field(default=None, converter=_aware)
    workspace_id: Optional[str] = attrs.field(default=None)

    @installation_id.validator
    @workspace_id.validator
    def _check_id(self, attribute: Any, value: Optional[str]) -> None:
        # Both stand in URL paths, which another thread builds later.
        if value is not None and not is_id(value):
            raise ConfigurationError(
                "must be a non-empty str of at most 256 bytes without control characters", attribute.name
            )

    def to_env(self) -> Dict[str, str]:
        """Return the ``SEKUIRE_...`` variables as plain strings, without those that have no value."""
        values = {
            "SEKUIRE_INSTALLATION_ID": self.installation_id,
            "SEKUIRE_RUNTIME_TOKEN": self.runtime_token.reveal() if self.runtime_token else None,
            "SEKUIRE_REFRESH_TOKEN": self.refresh_token.reveal() if self.refresh_token else None,
            "SEKUIRE_WORKSPACE_ID": self.workspace_id,
        }
        return {name: value for name, value in values.items() if value is not None}


@attrs.frozen(kw_only=True, slots=True)
class Grant:
    """Hold the answer of bootstrap, recover or refresh; lifetimes in seconds, None if unknown.

    A ``lease_lifetime`` of 0 means that the platform has ended the lease, None that the answer says nothing about it.
    """

    credentials: RuntimeCredentials
    lifetime: Optional[float] = None
    lease_lifetime: Optional[float] = None
    lease_expires_at: Optional[dt.datetime] = None
    heartbeat_interval: Optional[float] = None
    #: Field → why its value is not used.
    ignored: Mapping[str, str] = attrs.field(factory=dict, eq=False)


@attrs.frozen(kw_only=True, slots=True)
class WorkerStats:
    """Count the tasks of one worker since its start, and say when its lease ends.

    ``received`` counts task events. ``waiting`` counts tasks that wait now for a thread, the lease, or results to be
    delivered, and ``running`` those that run now. ``rejected`` counts tasks answered without running (paused,
    terminated, unknown capability, invalid, denied), and ``released`` tasks given back before they began.
    ``duplicates`` counts deliveries of a task already known, and ``dropped`` events or results that could not be used
    or were not wanted any more. ``undelivered`` counts results that the platform has not accepted yet. ``overdue``
    counts handlers that still run after their task has ended.
    """

    received: int = 0
    waiting: int = 0
    running: int = 0
    completed: int = 0
    failed: int = 0
    rejected: int = 0
    released: int = 0
    duplicates: int = 0
    dropped: int = 0
    undelivered: int = 0
    overdue: int = 0
    reconnects: int = 0
    last_heartbeat_at: Optional[dt.datetime] = None
    lease_expires_at: Optional[dt.datetime] = None


@attrs.frozen(kw_only=True, slots=True)
class BeaconStatus:
    """Hold the state of a Beacon.

    ``state`` is ``"new"``, ``"connecting"``, ``"connected"``, ``"degraded"`` (the platform is unreachable or refuses;
    the agent runs on), ``"revoked"`` or ``"stopped"``. ``error`` is the text of the last problem, or None.
    """

    state: str = "new"
    installation_id: Optional[str] = None
    last_heartbeat_at: Optional[dt.datetime] = None
    lease_expires_at: Optional[dt.datetime] = None
    error: Optional[str] = None
