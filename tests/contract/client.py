"""A client made of nothing but the standard library, so that these tests share no code with what they test."""

from __future__ import annotations

import http.client
import json
import secrets
from typing import Any, Dict, List, NamedTuple, Optional, Tuple
from urllib.parse import quote, urlencode, urlsplit

from ..support.waiting import GUARD

API = "/api/v1"


class Answer(NamedTuple):
    status: int
    headers: http.client.HTTPMessage
    body: Any

    @property
    def code(self) -> Any:
        return self.body.get("code")


class Event(NamedTuple):
    name: str
    data: Any
    id: Optional[str]


class Stream:
    """One open event stream, read line by line. ``None`` from :meth:`next` is its end."""

    def __init__(self, connection: http.client.HTTPConnection, response: http.client.HTTPResponse) -> None:
        self._connection = connection
        self._response = response
        self.headers = response.headers
        self.connected = self.next("connected")

    def line(self) -> Optional[str]:
        try:
            line = self._response.readline()
        except (http.client.IncompleteRead, ConnectionError):
            return None
        return line.decode() if line else None

    def next(self, *expected: str) -> Any:
        """The next event, comments skipped; with names, its data, and it must have one of them."""
        name, data, event_id = "message", "", None
        while True:
            line = self.line()
            if line is None:
                assert not expected, f"the stream ended, expected {expected}"
                return None
            line = line.rstrip("\n")
            field, _, value = line.partition(": ")
            if field == "event":
                name = value
            elif field == "data":
                data = value
            elif field == "id":
                event_id = value
            elif not line and data:
                event = Event(name, json.loads(data), event_id)
                if expected:
                    assert event.name in expected, event
                    return event.data
                return event

    def close(self) -> None:
        self._response.close()
        self._connection.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()


class Client:
    """Requests to one platform, each on a connection of its own."""

    def __init__(self, url: str, api_key: str, timeout: float = GUARD) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None
        self.address: Tuple[str, int] = (parts.hostname, parts.port or 80)
        self.api_key = api_key
        self.timeout = timeout

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(*self.address, timeout=self.timeout)

    def call(
        self, method: str, path: str, body: Any = None, headers: Optional[Dict[str, str]] = None, raw: bytes = b""
    ) -> Answer:
        connection = self.connect()
        try:
            payload = raw if body is None else json.dumps(body).encode()
            connection.request(
                method, API + path, payload or None, {"Content-Type": "application/json", **(headers or {})}
            )
            response = connection.getresponse()
            text = response.read()
            return Answer(response.status, response.headers, json.loads(text) if text else None)
        finally:
            connection.close()

    def admin(self, method: str, path: str, body: Any = None) -> Answer:
        return self.call(method, path, body, {"X-API-Key": self.api_key})

    def submit(self, agent_id: str, capability: str = "work", input: Any = None, **fields: Any) -> str:
        body = {"agent_id": agent_id, "capability": capability, "input": {} if input is None else input, **fields}
        answer = self.admin("POST", "/tasks", body)
        assert answer.status == 201, answer
        task_id: str = answer.body["task_id"]
        return task_id

    def task(self, task_id: str) -> Dict[str, Any]:
        answer = self.admin("GET", f"/tasks/{task_id}")
        assert answer.status == 200, answer
        task: Dict[str, Any] = answer.body
        return task

    def install_token(self, agent_id: str, max_uses: int = 1) -> str:
        answer = self.admin("POST", "/install-tokens", {"agent_id": agent_id, "max_uses": max_uses})
        assert answer.status == 201, answer
        token: str = answer.body["install_token"]
        return token

    def bootstrap(self, agent_id: str, token: str, key: Optional[str] = None) -> Answer:
        body = {
            "install_token": token,
            "agent_id": agent_id,
            "capabilities": ["work"],
            "runtime_info": {"hostname": "here", "pid": 1, "platform": {}},
        }
        return self.call("POST", "/installations/bootstrap", body, {"Idempotency-Key": key or secrets.token_hex(16)})

    def install(self, agent_id: Optional[str] = None) -> Installation:
        """A new installation, of a new agent where none is named: tests must not see each other's tasks."""
        agent_id = agent_id or f"agent-{secrets.token_hex(6)}"
        answer = self.bootstrap(agent_id, self.install_token(agent_id))
        assert answer.status == 201, answer
        return Installation(self, agent_id, answer.body)


class Installation:
    """One installation and what its worker sends."""

    def __init__(self, client: Client, agent_id: str, grant: Dict[str, Any]) -> None:
        self.client = client
        self.agent_id = agent_id
        self.grant = grant
        self.id: str = grant["installation_id"]
        self.token: str = grant["runtime_token"]

    def call(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.client.call(method, path, body, {"Authorization": f"Bearer {self.token}", **names})

    def refresh(self, refresh_token: str, key: Optional[str] = None) -> Answer:
        return self.client.call(
            "POST",
            f"/installations/{self.id}/refresh",
            {"refresh_token": refresh_token},
            {"Idempotency-Key": key or secrets.token_hex(16)},
        )

    def heartbeat(self, status: str = "healthy", **fields: Any) -> Answer:
        body = {"status": status, "uptime_seconds": 1, "platform": {"type": "bare_metal"}, **fields}
        return self.call("POST", f"/installations/{self.id}/heartbeat", body)

    def command(self, kind: str, **fields: Any) -> Answer:
        return self.client.admin("POST", f"/installations/{self.id}/commands", {"type": kind, **fields})

    def revoke(self, **fields: Any) -> Answer:
        return self.client.admin("POST", f"/installations/{self.id}/revoke", fields)

    def submit(self, capability: str = "work", input: Any = None, **fields: Any) -> str:
        return self.client.submit(self.agent_id, capability, input, **fields)

    def open(
        self,
        worker_id: str = "w1",
        max_in_flight: int = 10,
        capabilities: Optional[List[str]] = None,
        last_event_id: Optional[str] = None,
    ) -> Tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        query = urlencode({"agent_id": self.agent_id, "worker_id": worker_id, "max_in_flight": max_in_flight})
        query += f"&installation_id={self.id}"
        if capabilities:
            query += "&capabilities=" + ",".join(quote(name, safe="") for name in capabilities)
        headers = {"Authorization": f"Bearer {self.token}", "Accept": "text/event-stream"}
        if last_event_id is not None:
            headers["Last-Event-ID"] = last_event_id
        connection = self.client.connect()
        try:
            connection.request("GET", f"{API}/tasks/stream?{query}", headers=headers)
            return connection, connection.getresponse()
        except BaseException:
            connection.close()
            raise

    def stream(self, worker_id: str = "w1", **options: Any) -> Stream:
        connection, response = self.open(worker_id, **options)
        if response.status != 200:
            body = response.read()
            connection.close()
            raise AssertionError((response.status, body))
        return Stream(connection, response)

    def refused(self, worker_id: str = "w1", **options: Any) -> Answer:
        """The answer to a stream that is not opened."""
        connection, response = self.open(worker_id, **options)
        try:
            assert response.status != 200, "the stream was opened"
            return Answer(response.status, response.headers, json.loads(response.read()))
        finally:
            connection.close()

    def complete(
        self, task: str, attempt: Any = 1, output: Any = None, key: Optional[str] = None, **fields: Any
    ) -> Answer:
        body = {
            "task_id": task,
            "status": "completed",
            "output": output,
            "execution_time_ms": 1,
            "attempt": attempt,
            **fields,
        }
        return self.call("POST", f"/tasks/{task}/complete", body, Idempotency_Key=key or f"{task}:{attempt}")

    def fail(self, task_id: str, attempt: int = 1, retryable: bool = True, code: str = "handler_error") -> Answer:
        body = {
            "task_id": task_id,
            "status": "failed",
            "error": {"code": code, "message": "no", "retryable": retryable},
            "execution_time_ms": 1,
            "attempt": attempt,
        }
        return self.call("POST", f"/tasks/{task_id}/complete", body, Idempotency_Key=f"{task_id}:{attempt}")

    def release(self, task_id: str, worker_id: str = "w1", attempt: int = 1) -> Answer:
        return self.call("POST", f"/tasks/{task_id}/release", {"attempt": attempt, "worker_id": worker_id})


def audit_event(**fields: Any) -> Dict[str, Any]:
    """An audit event as the contract has it, with ``fields`` instead."""
    return {
        "sekuire_id": "agent-1",
        "session_id": "s-1",
        "environment": "test",
        "event_type": "health",
        "severity": "info",
        "event_timestamp": "2030-01-01T00:00:00.000001Z",
        "event_data": {"n": 1},
        **fields,
    }
