"""A policy gateway of a user's own, directed by a test."""

from __future__ import annotations

import threading
from typing import Any, List, Optional

from .waiting import GUARD


class FakeGateway:
    """Answer the worker's questions as a test says, and remember them.

    :param error: raised by each check of a capability.
    :param heartbeat_error: raised for each heartbeat's answer.
    :param policy: what the heartbeats say is in force; only its ``hash`` is read.
    :param is_slow: a check of a request waits for ``answer``; ``asked`` is set once it does.
    """

    def __init__(
        self,
        error: Optional[Exception] = None,
        *,
        heartbeat_error: Optional[Exception] = None,
        policy: Any = None,
        is_slow: bool = False,
    ) -> None:
        self.error = error
        self.heartbeat_error = heartbeat_error
        self.policy = policy
        self.is_slow = is_slow
        self.asked, self.answer = threading.Event(), threading.Event()
        #: "request", "heartbeat", or the name of a capability, as they came.
        self.calls: List[str] = []
        #: The answers to heartbeats.
        self.heard: List[Any] = []

    def check_request(self) -> None:
        self.calls.append("request")
        self.asked.set()
        if self.is_slow:
            assert self.answer.wait(GUARD)

    def check_capability(self, name: str) -> None:
        self.calls.append(name)
        if self.error is not None:
            raise self.error

    def on_heartbeat_response(self, response: Any) -> None:
        self.calls.append("heartbeat")
        self.heard.append(response)
        if self.heartbeat_error is not None:
            raise self.heartbeat_error
