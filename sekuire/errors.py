"""Every error the library raises, below one root.

Facts are attributes, so that code can branch on them; the text is for people. No error keeps a request, a response or
a token: see the canary tests.
"""

from __future__ import annotations

from typing import Any, Mapping, Optional

__all__ = [
    "APIError",
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
    "TransportError",
]


class SekuireError(Exception):
    """Root of every error this library raises."""


class ConfigurationError(SekuireError):
    """A setting is wrong or missing: ``option`` names it, ``source`` says where it came from."""

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
    """The platform refused the credentials, or none are left to try; ``status`` and ``code`` are the platform's."""

    def __init__(self, message: str, status: Optional[int] = None, code: Optional[str] = None) -> None:
        super().__init__(message, status, code)
        self.message = message
        self.status = status
        self.code = code

    def __str__(self) -> str:
        return self.message


class TransportError(SekuireError):
    """No usable answer came over the network; ``retryable`` is false where trying again cannot help (TLS)."""

    def __init__(self, message: str, retryable: bool = True, retry_after: Optional[float] = None) -> None:
        super().__init__(message, retryable, retry_after)
        self.message = message
        self.retryable = retryable
        #: Seconds to wait before the next try (``Retry-After`` of an answer that was not the platform's), or None.
        self.retry_after = retry_after or None
        #: Kept connections were found dead during the call; the next call makes a new one.
        self.was_stale = False

    def __str__(self) -> str:
        return self.message


class APIError(SekuireError):
    """The platform answered with an error; ``status``, ``code`` and ``message`` are what it said."""

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
    """The workspace's plan does not allow this; ``required_plan`` and ``upgrade_url`` say what would."""

    @property
    def required_plan(self) -> Optional[str]:
        return _text((self.details or {}).get("required_plan"))

    @property
    def upgrade_url(self) -> Optional[str]:
        return _text((self.details or {}).get("upgrade_url"))

    @property
    def current_usage(self) -> Any:
        return (self.details or {}).get("current_usage")

    def __str__(self) -> str:
        text = super().__str__()
        if self.required_plan:
            text += f" (needs the plan {self.required_plan!r})"
        if self.upgrade_url:
            text += f" (upgrade: {self.upgrade_url})"
        return text


class StreamError(SekuireError):
    """The task stream cannot be used and trying again would not help."""


class RevokedError(SekuireError):
    """The installation was revoked; ``reason`` is the platform's."""

    def __init__(self, reason: Optional[str] = None, shutdown_timeout: Optional[float] = None) -> None:
        super().__init__(reason, shutdown_timeout)
        self.reason = reason
        #: Seconds the platform gives running work to end, or None.
        self.shutdown_timeout = shutdown_timeout

    def __str__(self) -> str:
        text = "the installation was revoked"
        if self.reason and self.reason.startswith(text):
            return self.reason
        return text + (f": {self.reason}" if self.reason else "")


class TaskError(SekuireError):
    """Raised by a handler to fail its task with a code of its own."""

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


class TaskCancelled(SekuireError):
    """The task's context was cancelled; ``reason`` says by what."""

    def __init__(self, reason: str = "cancelled") -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return self.reason


class PolicyViolationError(SekuireError):
    """The policy forbids this; ``rule`` is the rule's id (protocol.md, "Policy") and ``reason`` a sentence."""

    def __init__(self, rule: str, reason: str, retry_after: Optional[float] = None) -> None:
        super().__init__(rule, reason, retry_after)
        self.rule = rule
        self.reason = reason
        #: Seconds until a rate limit admits the next request, or None.
        self.retry_after = retry_after
        #: What was asked about, such as a tool's name; None where it is unknown, or no single thing.
        self.target: Optional[str] = None
        #: Whether it was allowed all the same, by ``warn_only``.
        self.allowed = False

    def __str__(self) -> str:
        return f"{self.rule}: {self.reason}"


class PolicyIntegrityError(SekuireError):
    """A policy's hash, signature, key, version, workspace or content is not what it must be.

    ``expected`` and ``found`` are texts, or None where one of them cannot be said in a few words.
    """

    def __init__(self, message: str, expected: Optional[str] = None, found: Optional[str] = None) -> None:
        super().__init__(message, expected, found)
        self.message = message
        self.expected = expected
        self.found = found

    def __str__(self) -> str:
        return self.message


class PolicyUnavailableError(SekuireError):
    """No policy could be loaded, and without one nothing is allowed."""


def _text(value: Any) -> Optional[str]:
    # A plan's name or a URL with control characters in it is neither, and could forge a line of a log.
    return value if isinstance(value, str) and value.isprintable() else None
