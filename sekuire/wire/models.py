"""Define the values that travel between the packages: frozen, without behaviour, without I/O."""

from __future__ import annotations

import contextlib
import datetime as dt
from typing import TYPE_CHECKING, Any, Dict, Mapping, Optional, Tuple

import attrs

from .._internal.values import Value
from ..errors import ConfigurationError
from ..secret import Secret, check_secret, discreet_class, to_secret

if TYPE_CHECKING:
    from typing_extensions import TypeGuard

__all__ = [
    "Approval",
    "BeaconStatus",
    "Cancel",
    "Command",
    "Completion",
    "Connected",
    "Failure",
    "Grant",
    "HeartbeatReply",
    "RuntimeCredentials",
    "Task",
    "WorkerHealth",
    "WorkerReport",
    "WorkerStats",
    "is_id",
]

#: Longest id, in bytes of UTF-8.
MAX_ID_BYTES = 256


@attrs.frozen(kw_only=True, slots=True, eq=False, repr=False)
class Task(Value):
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


@attrs.frozen(kw_only=True, slots=True, eq=False, repr=False)
class Command(Value):
    """Hold an order of the platform: ``type`` is ``"pause"``, ``"resume"`` or ``"terminate"``; times in seconds."""

    type: str
    reason: Optional[str] = None
    command_id: Optional[str] = None
    shutdown_timeout: Optional[float] = None


@attrs.frozen(kw_only=True, slots=True, eq=False, repr=False)
class Cancel(Value):
    """Hold the wish to end one task, and why."""

    task_id: str
    reason: Optional[str] = None


@attrs.frozen(kw_only=True, slots=True, eq=False, repr=False)
class Approval(Value):
    """Hold the state of a request for approval: ``"pending"``, ``"approved"``, ``"denied"`` or ``"expired"``.

    ``decided_by`` is a claim of whoever decided. Everything but ``status`` may be absent from an answer.
    """

    status: str
    approval_id: Optional[str] = None
    task_id: Optional[str] = None
    decided_by: Optional[str] = None
    reason: Optional[str] = None
    digest: Optional[str] = None
    expires_at: Optional[dt.datetime] = None


@attrs.frozen(kw_only=True, slots=True, eq=False, repr=False)
class Connected(Value):
    """Hold the stream's first event; ``heartbeat_interval`` in seconds."""

    installation_id: Optional[str] = None
    heartbeat_interval: Optional[float] = None
    desired_state: Optional[str] = None
    #: Field → why its value is not used.
    ignored: Mapping[str, str] = attrs.field(factory=dict, eq=False)


@attrs.frozen(kw_only=True, slots=True, eq=False, repr=False)
class Failure(Value):
    """Say why a task failed: a code (docs/protocol.md, or the handler's), a message, and advice to the requester."""

    code: str
    message: str = ""
    retryable: bool = False
    details: Optional[Mapping[str, Any]] = None
    #: A line of the log says it, with more than this does.
    is_logged: bool = attrs.field(default=False, eq=False, repr=False)

    def as_logged(self) -> Failure:
        """Return a copy that no further line of the log repeats."""
        return attrs.evolve(self, is_logged=True)


@attrs.frozen(kw_only=True, slots=True, eq=False, repr=False)
class Completion(Value):
    """Hold the one result of a task: its ``failure`` if that is not None, or else its ``output``.

    ``capability`` is for error texts. It is not sent.
    """

    task_id: str
    attempt: int
    output: Any = attrs.field(default=None, repr=False)
    failure: Optional[Failure] = None
    execution_time_ms: int = 0
    capability: str = ""


@attrs.frozen(kw_only=True, slots=True, eq=False, repr=False)
class WorkerReport(Value):
    """Hold what one worker says of itself in a heartbeat."""

    worker_id: str
    status: str
    active_tasks: int
    capabilities: Tuple[str, ...] = ()


@attrs.frozen(kw_only=True, slots=True, eq=False, repr=False)
class HeartbeatReply(Value):
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
    #: Tasks that were cancelled and have no result.
    cancel_tasks: Tuple[str, ...] = ()
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


@discreet_class
@attrs.frozen(kw_only=True, slots=True, eq=False, repr=False)
class RuntimeCredentials(Value):
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

    def __bool__(self) -> bool:
        """Return True if they name an installation. ``if sdk.installation_credentials:`` asks whether there is one."""
        return self.installation_id is not None

    def to_env(self) -> Dict[str, str]:
        """Return the ``SEKUIRE_...`` variables as plain strings, without those that have no value."""
        values = {
            "SEKUIRE_INSTALLATION_ID": self.installation_id,
            "SEKUIRE_RUNTIME_TOKEN": self.runtime_token.reveal() if self.runtime_token else None,
            "SEKUIRE_REFRESH_TOKEN": self.refresh_token.reveal() if self.refresh_token else None,
            "SEKUIRE_WORKSPACE_ID": self.workspace_id,
        }
        return {name: value for name, value in values.items() if value is not None}


@attrs.frozen(kw_only=True, slots=True, eq=False, repr=False)
class Grant(Value):
    """Hold the answer of bootstrap, recover or refresh; lifetimes in seconds, None if unknown.

    A ``lease_lifetime`` of 0 means that the platform has ended the lease, None that the answer says nothing about it.
    """

    credentials: RuntimeCredentials
    lifetime: Optional[float] = None
    lease_lifetime: Optional[float] = None
    lease_expires_at: Optional[dt.datetime] = None
    heartbeat_interval: Optional[float] = None
    #: How many more installations the install token can make, if the platform says so.
    install_token_uses_left: Optional[int] = None
    #: Field → why its value is not used.
    ignored: Mapping[str, str] = attrs.field(factory=dict, eq=False)


@attrs.frozen(kw_only=True, slots=True, eq=False, repr=False)
class WorkerStats(Value):
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


@attrs.frozen(kw_only=True, slots=True, eq=False, repr=False)
class WorkerHealth(Value):
    """Say how one worker is, at one moment. ::

        health = worker.health()
        if not health.ready:
            print(", ".join(health.reasons))  # paused, no lease

    ``live`` is False if the worker's own threads have failed, so that only a restart helps. The platform has no part in
    it. ``ready`` is True if a task that came now would run. If not, ``reasons`` holds at least one of ``"draining"``,
    ``"paused"``, ``"stream closed"``, ``"no lease"`` and ``"policy missing"``. ``notes`` holds what is worth a look and
    keeps nothing from running.

    ``state`` is ``"new"``, ``"running"``, ``"stopping"`` or ``"stopped"``. ``lease_seconds_left`` is negative after the
    lease's end, and None if the platform has sent no lease. ``heartbeat_age`` is the number of seconds since the last
    heartbeat that the platform accepted, None before the first. ``error`` is the text of the error because of which the
    worker stops.
    """

    agent_id: str
    worker_id: str
    state: str = "new"
    live: bool = True
    ready: bool = False
    reasons: Tuple[str, ...] = ()
    notes: Tuple[str, ...] = ()
    installation_id: Optional[str] = None
    capabilities: Tuple[str, ...] = ()
    max_workers: int = 0
    policy: str = ""
    approvals_waiting: int = 0
    lease_seconds_left: Optional[float] = None
    heartbeat_age: Optional[float] = None
    error: Optional[str] = None
    stats: WorkerStats = WorkerStats()


@attrs.frozen(kw_only=True, slots=True, eq=False, repr=False)
class BeaconStatus(Value):
    """Hold the state of a Beacon.

    ``state`` is ``"new"``, ``"connecting"``, ``"connected"``, ``"degraded"`` (the platform is unreachable or refuses;
    the agent runs on), ``"revoked"`` or ``"stopped"``. ``error`` is the text of the last problem, or None.
    """

    state: str = "new"
    installation_id: Optional[str] = None
    last_heartbeat_at: Optional[dt.datetime] = None
    lease_expires_at: Optional[dt.datetime] = None
    error: Optional[str] = None
