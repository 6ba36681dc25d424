"""Define every error that the library raises, below one root.

Facts are attributes, so that code can branch on them. The text is for people. No error keeps a request, a response or a
token: tests/test_canary.py checks that.
"""

from __future__ import annotations

from typing import Any, Mapping, Optional, Tuple

__all__ = [
    "APIError",
    "ApprovalDenied",
    "ApprovalExpired",
    "AuthenticationError",
    "ConfigurationError",
    "PlanLimitError",
    "PolicyIntegrityError",
    "PolicyUnavailableError",
    "PolicyViolationError",
    "RevokedError",
    "SekuireError",
    "StreamError",
    "TaskCancelled",
    "TaskError",
    "TaskFailed",
    "TaskTimeout",
    "TransportError",
]


class SekuireError(Exception):
    """Catch every error of this library by this class. ::

        try:
            worker = create_worker(agent_id="support-agent", max_workers=0)
        except SekuireError as error:
            print(error)  # max_workers: must be a whole number, 1 or more, got 0

    Its subclasses say more.
    """


class ConfigurationError(SekuireError):
    """Report an option that is wrong or missing. ::

        try:
            worker = create_worker(agent_id="support-agent", heartbeat_intervall=5)
        except ConfigurationError as error:
            print(error.option)  # heartbeat_intervall
            print(error.problem)  # unknown option of WorkerConfig; did you mean 'heartbeat_interval'?

    ``source`` says where the value came from, such as an environment variable; None for an argument.
    """

    def __init__(self, problem: str, option: Optional[str] = None, source: Optional[str] = None) -> None:
        super().__init__(problem, option, source)
        self.problem = problem
        self.option = option
        self.source = source

    def __str__(self) -> str:
        where = self.option or ""
        if self.source:
            where = f"{where} (from {self.source})" if where else self.source
        return f"{where}: {self.problem}" if where else self.problem


class AuthenticationError(SekuireError):
    """Report that the platform refused the credentials, or that no login method is left. ::

        try:
            worker.start()
        except AuthenticationError as error:
            print(error.code)  # such as invalid_token

    ``status`` and ``code`` are the platform's, or None.
    """

    def __init__(self, message: str, status: Optional[int] = None, code: Optional[str] = None) -> None:
        super().__init__(message, status, code)
        self.message = message
        self.status = status
        self.code = code

    def __str__(self) -> str:
        return self.message


class TransportError(SekuireError):
    """Report that no usable answer came over the network.

    ``retryable`` is False if a retry cannot help, as with a certificate that is not trusted.
    """

    def __init__(self, message: str, retryable: bool = True, retry_after: Optional[float] = None) -> None:
        super().__init__(message, retryable, retry_after)
        self.message = message
        self.retryable = retryable
        #: Seconds to wait before a retry, or None: the ``Retry-After`` of an answer that was not the platform's.
        self.retry_after = retry_after or None
        #: True if kept connections were found dead during the call. The next call makes a new one.
        self.was_stale = False
        #: False if nothing was sent, because no connection could be made.
        self.was_sent = True
        #: True if the answer has more bytes than the caller accepts.
        self.is_too_large = False

    def __str__(self) -> str:
        return self.message


class APIError(SekuireError):
    """Report an error that the platform answered: its ``status``, ``code``, ``message`` and ``details``."""

    def __init__(
        self,
        status: int,
        code: Optional[str] = None,
        message: str = "",
        retry_after: Optional[float] = None,
        details: Optional[Mapping[str, Any]] = None,
    ) -> None:
        super().__init__(status, code, message, retry_after, details)
        self.status = status
        self.code = code
        self.message = message
        #: Seconds the platform asked to wait (``Retry-After``), or None.
        self.retry_after = retry_after
        self.details = details

    def __str__(self) -> str:
        label = f"HTTP {self.status}" + (f" {self.code}" if self.code else "")
        return f"{label}: {self.message}" if self.message else label


class PlanLimitError(APIError):
    """Report that the workspace's plan does not allow this. ::

        try:
            worker.start()
        except PlanLimitError as error:
            print(f"needs {error.required_plan}: {error.upgrade_url}")

    The text names both, where the platform gave them.
    """

    @property
    def required_plan(self) -> Optional[str]:
        """Return the plan that the request needs, or None if the platform names none."""
        return _text((self.details or {}).get("required_plan"))

    @property
    def upgrade_url(self) -> Optional[str]:
        """Return the page where the plan can be changed, or None if the platform names none."""
        return _text((self.details or {}).get("upgrade_url"))

    @property
    def current_usage(self) -> Any:
        """Return what the platform says of the usage so far, or None."""
        return (self.details or {}).get("current_usage")

    def __str__(self) -> str:
        text = super().__str__()
        if self.required_plan:
            text += f" (needs the plan {self.required_plan!r})"
        if self.upgrade_url:
            text += f" (upgrade: {self.upgrade_url})"
        return text


class StreamError(SekuireError):
    """Report that the task stream cannot be used, and that a retry would not help."""


class RevokedError(SekuireError):
    """Report that the installation was revoked. ``reason`` is the platform's."""

    def __init__(self, reason: Optional[str] = None, shutdown_timeout: Optional[float] = None) -> None:
        super().__init__(reason, shutdown_timeout)
        self.reason = reason
        #: Seconds that the platform gives running handlers to finish, or None.
        self.shutdown_timeout = shutdown_timeout

    def __str__(self) -> str:
        text = "the installation was revoked"
        if self.reason and self.reason.startswith(text):
            return self.reason
        return text + (f": {self.reason}" if self.reason else "")


class TaskError(SekuireError):
    """Raise it in a handler to fail the task with a code of your own. ::

        @worker.on_task("refund")
        def refund(ctx, input):
            if input["amount"] > 100:
                raise TaskError("amount_too_large", "refunds end at 100 EUR", details={"limit": 100})

    The platform sends a ``retryable`` task again.
    """

    def __init__(
        self, code: str, message: str = "", retryable: bool = False, details: Optional[Mapping[str, Any]] = None
    ) -> None:
        super().__init__(code, message, retryable, details)
        self.code = code
        self.message = message
        self.retryable = retryable
        self.details = details

    def __str__(self) -> str:
        return f"{self.code}: {self.message}" if self.message else self.code


class ApprovalDenied(TaskError):
    """Report that a person has denied what was asked for, or that nobody could be asked. ::

        @worker.on_task("refund")
        def refund(ctx, input):
            try:
                ctx.require_approval("refund", {"amount": input["amount"]})
            except ApprovalDenied as error:
                return {"refunded": False, "because": error.reason}

    A handler that does not catch it fails its task with ``approval_denied``. ``details`` has what is known of the
    request: ``kind``, ``name``, ``approval_id``, ``decided_by`` and ``reason``.
    """

    def __init__(self, message: str = "", details: Optional[Mapping[str, Any]] = None) -> None:
        super().__init__("approval_denied", message, False, details)

    def __reduce__(self) -> Tuple[Any, ...]:
        return type(self), (self.message, self.details)

    @property
    def reason(self) -> Optional[str]:
        """Return the reason that the person gave, None without one."""
        return (self.details or {}).get("reason")

    @property
    def decided_by(self) -> Optional[str]:
        """Return who says to have decided, None if that is not known."""
        return (self.details or {}).get("decided_by")


class ApprovalExpired(TaskError):
    """Report that nobody decided in time, which counts as denied. ::

        @worker.on_task("remind")
        def remind(ctx, input):
            try:
                ctx.require_approval("remind", input, timeout=60.0)
            except ApprovalExpired:
                return {"sent": False}

    A handler that does not catch it fails its task with ``approval_expired``, which is retryable.
    """

    def __init__(self, message: str = "", details: Optional[Mapping[str, Any]] = None) -> None:
        super().__init__("approval_expired", message, True, details)

    def __reduce__(self) -> Tuple[Any, ...]:
        return type(self), (self.message, self.details)


class TaskCancelled(SekuireError):
    """Report that the task's context was cancelled. ::

        @worker.on_task("scan")
        def scan(ctx, input):
            for page in input["pages"]:
                ctx.raise_if_cancelled()  # raises TaskCancelled

    ``reason`` says why, such as ``"timeout"``.
    """

    def __init__(self, reason: str = "cancelled") -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return self.reason


class TaskFailed(SekuireError):
    """Report that a task that this program submitted has failed. ::

        try:
            client.call("refund", {"amount": 5}, expires_in=0.5)
        except TaskFailed as error:
            print(error.code)  # expired

    ``code``, ``message`` and ``details`` are the handler's, or the library's (docs/protocol.md). ``retryable`` is True
    if trying again may help.
    """

    def __init__(
        self,
        code: str,
        message: str = "",
        details: Optional[Mapping[str, Any]] = None,
        retryable: bool = False,
        task_id: Optional[str] = None,
    ) -> None:
        super().__init__(code, message, details, retryable, task_id)
        self.code = code
        self.message = message
        self.details = details
        self.retryable = retryable
        self.task_id = task_id

    def __str__(self) -> str:
        text = f"{self.code}: {self.message}" if self.message else self.code
        return f"the task {self.task_id} failed: {text}" if self.task_id else text


class TaskTimeout(SekuireError):
    """Report that the time to wait for a task has passed. The task goes on. ::

        try:
            client.call("report", {"year": 2026}, wait=0.5)
        except TaskTimeout as error:
            handle = client.handle(error.task_id)  # to ask later
            print(handle.status())  # queued

    ``status`` is the task's last known one, such as ``"queued"``, or None.
    """

    def __init__(self, task_id: str, status: Optional[str] = None, problem: Optional[str] = None) -> None:
        super().__init__(task_id, status, problem)
        self.task_id = task_id
        self.status = status
        #: Why the platform could not be asked last, or None.
        self.problem = problem

    def __str__(self) -> str:
        text = f"the task {self.task_id} has no result yet"
        if self.status:
            text += f" (it is {self.status})"
        return f"{text}; {self.problem}" if self.problem else text


class PolicyViolationError(SekuireError):
    """Report that the policy forbids this. ::

        try:
            enforcer.enforce_tool("shell")
        except PolicyViolationError as error:
            print(error.rule)  # tool.blocked
            print(error.reason)  # tool 'shell' is refused: 'shell' in permissions.tools.blocked_tools matches it

    ``rule`` is the rule's id (docs/protocol.md, "Policy"), and ``reason`` is a sentence.
    """

    def __init__(self, rule: str, reason: str, retry_after: Optional[float] = None) -> None:
        super().__init__(rule, reason, retry_after)
        self.rule = rule
        self.reason = reason
        #: Seconds until a rate limit allows the next request, or None.
        self.retry_after = retry_after
        #: What the check was about, such as a tool's name, or None.
        self.target: Optional[str] = None
        #: True if it was allowed all the same, by ``warn_only``.
        self.allowed = False

    def __str__(self) -> str:
        return f"{self.rule}: {self.reason}"


class PolicyIntegrityError(SekuireError):
    """Report a policy whose hash, signature, key, version, workspace or content is wrong.

    ``expected`` and ``found`` are short texts, or None.
    """

    def __init__(self, message: str, expected: Optional[str] = None, found: Optional[str] = None) -> None:
        super().__init__(message, expected, found)
        self.message = message
        self.expected = expected
        self.found = found

    def __str__(self) -> str:
        return self.message


class PolicyUnavailableError(SekuireError):
    """Report that no policy could be loaded. Without one nothing is allowed."""


def _text(value: Any) -> Optional[str]:
    # Control characters could forge a line of a log.
    return value if isinstance(value, str) and value.isprintable() else None
