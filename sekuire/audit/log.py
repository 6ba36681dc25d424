"""Note audit events: those of the user, and those of the library."""

from __future__ import annotations

import os
from typing import Any, Dict, Mapping, Optional, Tuple, Union

from .._internal.clock import time
from .._internal.threads import Deadline, check_process
from ..config import SDKConfig
from ..errors import ConfigurationError
from ..wire import protocol
from ..wire.models import Completion, Task
from .buffer import AuditStats, Buffer, Event, encode
from .sender import Connection, Sender

__all__ = ["AuditLog", "check_event_type"]

#: Longest message of a log record or an exception in an event, in characters.
MAX_TEXT = 2000
#: Longest id or name in an event of the library's own, in characters.
_MAX_ID = 256
#: The bytes that count for an event besides its data, and those that count for an event of the library's own.
_HEAD, _OWN = 300, 600

_TYPES = frozenset(protocol.EVENT_TYPES)
_SEVERITIES = frozenset(protocol.SEVERITIES)
#: Codes of failed tasks that mean that something is broken. The others are decisions.
_BROKEN = frozenset(("handler_error", "timeout", "result_not_serializable", "result_too_large"))


class AuditLog:
    """Keep the audit events of one :class:`~sekuire.SekuireSDK`, as its attribute ``audit``. ::

        sdk.audit.log("model_call", {"model": "large-1", "tokens": 1234})
        sdk.audit.flush(timeout=10)
        print(sdk.audit.stats().delivered)

    Events go to the platform in batches: 50 events, or what has come in 10 s. What cannot be delivered is kept and
    tried again, at most 10,000 events and 8 MiB. Beyond that the oldest are dropped, counted and with one warning. A
    batch carries an ``Idempotency-Key``, so that no event is accepted twice. A platform that offers no audit log (404,
    405, 501) switches this off.

    Any thread may call anything.

    :param connection: the installation whose login is used.
    """

    # Threads: noting takes the buffer's lock for an append, never over I/O or a log line. The sender has the thread.

    def __init__(self, config: SDKConfig, connection: Connection) -> None:
        #: Random, and the same for all events of this object.
        self.session_id = os.urandom(16).hex()
        self.buffer = Buffer(self.session_id)
        self.sender = Sender(config, connection, self.session_id, self.buffer)
        self.pid = self.sender.pid

    @property
    def is_enabled(self) -> bool:
        """Return False if an option, or the platform's answer, has switched the audit log off."""
        return self.sender.is_enabled

    def disable(self) -> None:
        """Note nothing more. For an agent that cannot log in; call it before the first event."""
        self.sender.is_enabled = False

    # -- what users call --

    def log(self, event_type: str, data: Any = None, severity: str = "info") -> None:
        """Note one event; the same as :meth:`sekuire.SekuireSDK.log`."""
        _check("event_type", event_type, _TYPES, protocol.EVENT_TYPES)
        _check("severity", severity, _SEVERITIES, protocol.SEVERITIES)
        check_process(self.pid, "SekuireSDK")
        if not self.sender.is_enabled:
            return
        encoded, is_whole = encode(data if isinstance(data, Mapping) else _wrapped(data))
        self._note(event_type, severity, encoded, len(encoded) + _HEAD, not is_whole)

    def policy(
        self, decision: Any, kind: Optional[str] = None, target: Optional[str] = None, *, task_id: Optional[str] = None
    ) -> None:
        """Note a decision of the policy. Never block, never raise.

        This is for policy gateways and enforcers. It fits an enforcer's ``on_violation``:
        ``PolicyEnforcer(policy, on_violation=sdk.audit.policy)``. A decision with a ``rule`` becomes a
        ``policy_violation``. One that has no rule becomes a ``policy_check``.

        :param decision: a ``Decision``, a :class:`~sekuire.errors.PolicyViolationError`, or another object with
            ``rule`` and ``reason``, and ``allowed`` if that is known.
        :param kind: what was asked about, such as ``"tool"`` or ``"network"``. The default is the beginning of the
            rule's id.
        :param target: its name, such as the tool's name or the domain.
        """
        rule = getattr(decision, "rule", None)
        data: Dict[str, Any] = {"kind": kind or str(rule or "").partition(".")[0] or None, "target": target}
        data.update({"rule": rule, "reason": getattr(decision, "reason", None), "task_id": task_id})
        data = {name: str(value)[:MAX_TEXT] for name, value in data.items() if value}
        is_allowed = getattr(decision, "allowed", None)
        if is_allowed is not None:
            data["allowed"] = bool(is_allowed)
        if rule is None:
            self._note("policy_check", "info", data, _OWN)
        else:
            self._note("policy_violation", "warn", data, _OWN + MAX_TEXT)

    def flush(self, timeout: float = 10.0) -> bool:
        """Send what has been noted until now, without waiting for a batch to fill. Return True once it is settled.

        :param timeout: seconds to wait at most. Returns False also if the SDK has not been started.
        """
        return self.sender.flush(Deadline(timeout))

    def stats(self) -> AuditStats:
        """Return what became of the events so far."""
        return self.buffer.stats()

    def __repr__(self) -> str:
        state = f"{self.buffer.waiting()} wait"
        if not self.is_enabled or self.sender.is_closing:
            state = "closed" if self.is_enabled else "off"
        return f"<AuditLog {self.session_id[:8]} {state}>"

    # -- what the library notes by itself --

    def passed(self, task: Task) -> None:
        """Note that the policy let a task begin. Never block, never raise."""
        target, task_id = task.capability[:_MAX_ID], task.task_id[:_MAX_ID]
        data = {"kind": "capability", "target": target, "task_id": task_id, "allowed": True}
        self._note("policy_check", "info", data, _OWN)

    def approval(
        self,
        task: Task,
        subject: Tuple[str, str],
        approval_id: str,
        state: str,
        claims: Mapping[str, Optional[str]],
    ) -> None:
        """Note a request for approval, or what became of it. Never block, never raise.

        :param subject: its kind and name.
        :param state: ``"requested"``, ``"approved"``, ``"denied"``, ``"expired"`` or ``"refused"``.
        :param claims: who decided and why, as the platform says.
        """
        kind, target = subject
        data: Dict[str, Any] = {
            "kind": "approval",
            "subject": kind,
            "target": target[:_MAX_ID],
            "task_id": task.task_id[:_MAX_ID],
            "approval_id": approval_id,
            "status": state,
        }
        if state != "requested":
            data["allowed"] = state == "approved"
        data.update((name, value[:MAX_TEXT]) for name, value in claims.items() if value)
        severity = "info" if state in ("requested", "approved") else "warn"
        self._note("policy_check", severity, data, _OWN + (MAX_TEXT if claims else 0))

    def task(self, worker_id: str, task: Task, completion: Completion, report: Any) -> None:
        """Note the result of a task.

        :param report: its ``code`` is the failure's code as the requester gets it, or None for an output.
        """
        code = report.code
        data: Dict[str, Any] = {
            # The requester chooses some of these. Cut, they cannot fill the buffer.
            "task_id": task.task_id[:_MAX_ID],
            "capability": task.capability[:_MAX_ID],
            "status": "completed" if code is None else "failed",
            "execution_time_ms": completion.execution_time_ms,
            "attempt": completion.attempt,
            "worker_id": worker_id,
        }
        if task.trace_id is not None:
            data["trace_id"] = task.trace_id[:_MAX_ID]
        severity = "info"
        if code is not None:
            data["error_code"] = code
            severity = "error" if code in _BROKEN else "warn"
        self._note("tool_execution", severity, data, _OWN if task.trace_id is None else _OWN + _MAX_ID)

    def health(self, state: str, severity: str = "info", **facts: Optional[str]) -> None:
        """Note the new state of the installation, or of one of its workers."""
        data: Dict[str, Any] = {"state": state}
        data.update((name, value[:MAX_TEXT]) for name, value in facts.items() if value)
        self._note("health", severity, data, _OWN)

    def _note(
        self,
        event_type: str,
        severity: str,
        data: Union[bytes, Mapping[str, Any]],
        size: int,
        is_replaced: bool = False,
    ) -> None:
        if self.sender.is_enabled:
            event = Event(time.monotonic(), time.time(), event_type, severity, data, size)
            if self.buffer.note(event, is_replaced):
                self.sender.wake()

    # -- life --

    def open(self, *, may_log_in: bool = False) -> None:
        """Send events from now on, as soon as there is a runtime token.

        :param may_log_in: True if this may log in, because neither a Beacon nor a Worker does.
        """
        self.sender.open(may_log_in=may_log_in)

    def close(self, deadline: Deadline) -> bool:
        """Send what is left and end the thread, until ``deadline``. Return True if nothing was lost. Idempotent."""
        return self.sender.close(deadline)


def check_event_type(event_type: object) -> None:
    """Check that the protocol knows ``event_type``.

    :raises ConfigurationError: it does not.
    """
    _check("event_type", event_type, _TYPES, protocol.EVENT_TYPES)


def _check(option: str, value: Any, known: frozenset[str], shown: Tuple[str, ...]) -> None:
    if isinstance(value, str) and value in known:
        return
    import difflib  # Only for an error.

    close = difflib.get_close_matches(value, shown, n=1) if isinstance(value, str) else []
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise ConfigurationError(f"must be one of {', '.join(shown)}, got {value!r}{hint}", option)


def _wrapped(data: Any) -> Dict[str, Any]:
    return {} if data is None else {"value": data}
