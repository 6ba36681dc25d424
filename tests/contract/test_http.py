"""What holds for every answer."""

from __future__ import annotations

import json
from email.utils import parsedate_to_datetime

import pytest

from .client import API, Client, Installation


def test_answers_are_dated_json(client: Client) -> None:
    """Every answer names its type and carries a Date, from which clients count lifetimes."""
    answer = client.admin("GET", "/installations")
    assert answer.headers["Content-Type"].startswith("application/json")
    assert parsedate_to_datetime(answer.headers["Date"]).tzinfo is not None


def test_one_connection_serves_many_requests(client: Client) -> None:
    """A connection is kept alive over answers, errors included."""
    connection = client.connect()
    try:
        statuses = []
        for path in ("/installations", "/nothing", "/installations"):
            connection.request("GET", API + path, headers={"X-API-Key": client.api_key})
            response = connection.getresponse()
            response.read()
            statuses.append(response.status)
            assert connection.sock is not None
        assert statuses == [200, 404, 200]
    finally:
        connection.close()


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("GET", "/installations/bootstrap", 405),
        ("POST", "/tasks/stream", 405),
        ("DELETE", "/tasks", 405),
    ],
)
def test_errors_have_one_shape(client: Client, method: str, path: str, status: int) -> None:
    """An error is a JSON object with error, message and code, also for paths and methods that do not exist."""
    answer = client.admin(method, path)
    assert answer.status == status
    assert all(isinstance(answer.body[name], str) and answer.body[name] for name in ("error", "message", "code"))


@pytest.mark.parametrize("raw", [b"{", b"[1]", b'{"a": NaN}', b"\xff", b'"text"', b""])
def test_malformed_json_is_a_400(client: Client, raw: bytes) -> None:
    """A body that is not a JSON object is refused."""
    assert client.call("POST", "/installations/bootstrap", raw=raw).status == 400


def test_a_lone_surrogate_is_a_400(client: Client) -> None:
    """JSON that spells half a surrogate pair is refused, not stored and not a crash."""
    raw = b'{"agent_id": "a", "capability": "c", "input": "\\ud800"}'
    headers = {"X-API-Key": client.api_key}
    assert client.call("POST", "/tasks", headers=headers, raw=raw).status == 400


def test_a_body_over_the_limit_is_a_413(installation: Installation) -> None:
    """A completion too large for the platform gets a readable 413, so that the client can report that instead."""
    with installation.stream() as stream:
        task_id = installation.submit()
        stream.next("task")
        answer = installation.complete(task_id, output="x" * (33 * 1024 * 1024))
    assert answer.status == 413


def test_a_chunked_body_is_read(client: Client) -> None:
    """A body without a length is as good as one with it."""
    token = client.install_token("chunked-agent")
    body = json.dumps({"install_token": token, "agent_id": "chunked-agent"}).encode()
    connection = client.connect()
    try:
        connection.request(
            "POST",
            f"{API}/installations/bootstrap",
            iter([body[:10], body[10:]]),
            {"Content-Type": "application/json", "Transfer-Encoding": "chunked"},
            encode_chunked=True,
        )
        response = connection.getresponse()
        response.read()
        assert response.status == 201
    finally:
        connection.close()
