"""Submit tasks to agents with an API key."""

from __future__ import annotations

import functools
from typing import Any, Callable, Dict, Mapping

from ._internal.checks import check_number, check_whole
from .config import ConnectionConfig, check_capability
from .errors import ConfigurationError, SekuireError, TransportError
from .secret import Secret
from .transport.http import HttpClient
from .wire import protocol


class TaskSubmitter:
    """Submit tasks to agents. Any thread may call it; it has no thread and no lock of its own.

    :param api_key: the platform's key, ``sk_live_...``.
    :param pool_size: how many connections stay open; as many as there are threads that submit.
    """

    def __init__(self, config: ConnectionConfig, api_key: Secret, *, pool_size: int = 10) -> None:
        self.http = HttpClient(config, pool_size=pool_size)
        self.credential = functools.partial(protocol.api_key_header, api_key)

    def submit(self, capability: str, input: Any, agent_id: str, **fields: Any) -> str:
        """Submit a task and return its id, as :meth:`prepare` and :meth:`send` do."""
        return self.send(self.prepare(capability, input, agent_id, **fields))

    @staticmethod
    def prepare(capability: str, input: Any, agent_id: str, **fields: Any) -> bytes:
        """Return a task's body, for :meth:`send`.

        :param fields: ``workspace_id``, ``trace_id``, ``timeout_ms`` (milliseconds), ``max_attempts``. A field that is
            None is left out.
        :raises ConfigurationError: a capability, agent or field is wrong, or the input has no JSON form.
        """
        return _body(capability, input, agent_id, fields)

    def send(self, body: bytes) -> str:
        """Submit a task and return its id.

        It is not retried, because that could make a second task. Only a request that a kept connection lost is sent
        again, under the same ``Idempotency-Key``.

        :raises TransportError: no answer came. The task may have been submitted.
        :raises APIError: the platform refused the task. After a 5xx it may have been submitted all the same.
        """
        problem = ""
        try:
            reply = self.http.request("POST", self.http.endpoints.path("tasks"), body=body, credential=self.credential)
        except TransportError as error:
            problem = str(error)
        if problem:
            raise TransportError(f"{problem}; whether the task was submitted is not known")
        reply.check()
        task_id = None
        try:
            task = reply.json()
            task_id = task.get("task_id") or task.get("id")
        except (protocol.Malformed, AttributeError):
            pass
        if not protocol.is_id(task_id):
            raise SekuireError("the platform's answer names no task_id; is the URL a Sekuire platform's?")
        return task_id

    def close(self) -> None:
        self.http.close()


def _body(capability: str, input: Any, agent_id: str, fields: Mapping[str, Any]) -> bytes:
    check_capability(capability, "capability")
    _check_id("agent_id", agent_id)
    for name in fields:
        if name not in FIELDS:
            raise ConfigurationError(f"unknown field of a task; known are {', '.join(FIELDS)}", name)
    fields = {name: value for name, value in fields.items() if value is not None}
    for name, value in fields.items():
        # The platform would refuse it too, but later, when the caller may have committed its transaction.
        _CHECKS[name](name, value)
    try:
        return protocol.submit_body(capability, input, agent_id, fields)
    except (ValueError, TypeError, RecursionError, OverflowError) as error:
        problem = f"{type(error).__name__}: {error}"
    raise ConfigurationError(f"the task cannot be written as JSON: {problem}")


def _check_id(name: str, value: Any) -> None:
    if not protocol.is_id(value):
        raise ConfigurationError(
            f"must be a non-empty str of at most 256 bytes without control characters, got {value!r}", name
        )


_CHECKS: Dict[str, Callable[[str, Any], None]] = {
    "workspace_id": _check_id,
    "trace_id": _check_id,
    "timeout_ms": functools.partial(check_number, of="milliseconds"),
    "max_attempts": check_whole,
}
#: Fields of a task that its submitter may give (docs/protocol.md, "Platform side").
FIELDS = tuple(_CHECKS)
