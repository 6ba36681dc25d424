"""What every answer means for every endpoint: whose it is, and what follows."""

from __future__ import annotations

import itertools
from typing import Any, Dict, Mapping, Optional, Type

import pytest

from sekuire.errors import (
    APIError,
    AuthenticationError,
    PlanLimitError,
    RevokedError,
    TransportError,
)
from sekuire.wire import protocol
from sekuire.wire.verdict import (
    Dropped,
    Later,
    NotThePlatform,
    Refused,
    Retry,
    Revoked,
    Settled,
    Substitute,
    Support,
    Unauthorized,
    Unsupported,
    verdict,
)

JSON, HTML, STREAM, NONE = "application/json", "text/html; charset=utf-8", "text/event-stream", None
LOGINS = ("bootstrap", "recover", "refresh")
OPTIONAL = ("release", "progress", "logs", "capabilities", "cancel", "approvals")
EMPTY_ALLOWED = ("complete", "release", "progress", "logs", "heartbeat", "capabilities", "cancel", "revoke", "commands")
ENDPOINTS = ("complete", "heartbeat", "policy", "task_stream", "tasks", *LOGINS, *OPTIONAL)
STATUSES = (
    200, 201, 202, 204, 299, 300, 301, 302, 303, 304, 307, 308, 400, 401, 402, 403, 404, 405, 408, 409, 410, 413, 415,
    418, 421, 422, 425, 429, 431, 451, 499, 500, 501, 502, 503, 504, 511, 520, 599,
)  # fmt: skip
ERROR_FORMS = (
    b'{"error": "x"}',
    b'{"error": "x", "message": "y", "code": "Z"}',
    b'{"error": {"code": "X", "message": "y"}}',
    b'{"error": {"message": "y"}}',
)
FOREIGN_FORMS = (
    b"<html><body>Not found</body></html>", b"", b"null", b"[]", b'"error"', b"\xff\xfe", b'{"error": ""}',
    b'{"error": null}', b'{"error": {}}', b'{"error": 404}', b'{"detail": "x"}', b'{"message": "no Route matched"}',
    b'{"code": 404}', b'{"error": "x"', b'{"status": "down"}',
)  # fmt: skip


class Answer:
    """An answer as the transport gives it."""

    def __init__(self, status: int, body: bytes, kind: Optional[str] = JSON, **headers: str) -> None:
        self.status = status
        self.body = body
        found: Dict[str, str] = {"Content-Length": str(len(body)), **headers}
        if kind is not None:
            found["Content-Type"] = kind
        self.headers: Mapping[str, str] = {name: value for name, value in found.items() if value}

    def retry_after(self) -> Optional[float]:
        value = self.headers.get("Retry-After")
        return float(value) if value else None


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_another_servers_answer_is_never_a_verdict(endpoint: str) -> None:
    """Over every status, content type and body form: it is retried, and at most said to be unsupported or a 401."""
    for status, kind, body in itertools.product(STATUSES, (JSON, HTML, NONE), FOREIGN_FORMS):
        if 200 <= status < 300 and body.startswith(b'{"') and body.endswith(b"}"):
            continue  # A JSON object is the form of a success.
        if endpoint == "task_stream" and status == 204:
            continue
        found = verdict(endpoint, Answer(status, body, kind, **{"Retry-After": "7"}))
        if body == b"" and 200 <= status < 300 and endpoint in EMPTY_ALLOWED:
            assert isinstance(found, Settled)
        elif status == 401 and endpoint not in LOGINS:
            assert isinstance(found, Unauthorized)
            assert found.is_foreign
        elif status in (404, 405, 501) and endpoint in OPTIONAL:
            assert isinstance(found, Unsupported)
            assert found.is_foreign
        else:
            assert isinstance(found, NotThePlatform), (status, kind, body, found)
            assert found.delay == 7.0
            assert isinstance(found.error, TransportError)
            assert found.error.retryable
            assert found.error.retry_after == 7.0
            is_login_or_stream = endpoint in (*LOGINS, "task_stream")
            assert found.is_fatal_at_first == (
                is_login_or_stream and status not in (401, 408, 425, 429) and status < 500
            )


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_a_redirect_is_never_a_verdict(endpoint: str) -> None:
    """Every 3xx comes from something in between, whatever its body."""
    for status, body in itertools.product(range(300, 400), (*ERROR_FORMS, b"{}", b"")):
        assert isinstance(verdict(endpoint, Answer(status, body)), NotThePlatform)


@pytest.mark.parametrize("endpoint", [name for name in ENDPOINTS if name != "task_stream"])
@pytest.mark.parametrize("kind", [JSON, HTML, NONE])
def test_a_json_object_is_a_success(endpoint: str, kind: Optional[str]) -> None:
    """Any 2xx whose body is a JSON object, whatever content type it claims."""
    for status in (200, 201, 202, 299):
        assert isinstance(verdict(endpoint, Answer(status, b'{"x": 1}', kind)), Settled)


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_a_success_without_a_body(endpoint: str) -> None:
    """It counts where the contract says so, and never where the connection may have ended within the headers."""
    whole = verdict(endpoint, Answer(200, b""))
    cut = verdict(endpoint, Answer(200, b"", None, **{"Content-Length": ""}))
    assert isinstance(whole, Settled if endpoint in EMPTY_ALLOWED else NotThePlatform)
    assert isinstance(cut, NotThePlatform)
    if endpoint in EMPTY_ALLOWED:
        assert isinstance(verdict(endpoint, Answer(204, b"", None, **{"Content-Length": ""})), Settled)


@pytest.mark.parametrize("endpoint", ENDPOINTS)
@pytest.mark.parametrize("body", ERROR_FORMS)
def test_passing_errors_of_the_platform(endpoint: str, body: bytes) -> None:
    """408, 425, 429 and 5xx are retried, not before Retry-After; 501 of an optional endpoint says it is not there."""
    for status in (408, 425, 429, 500, 501, 502, 503, 504, 599):
        found = verdict(endpoint, Answer(status, body, **{"Retry-After": "3"}))
        if status == 501 and endpoint in OPTIONAL:
            assert isinstance(found, Unsupported)
            assert not found.is_foreign
            continue
        assert type(found) is Retry
        assert found.delay == 3.0
        assert isinstance(found.error, APIError)
        assert found.error.status == status
        assert not found.is_fatal_at_first


#: What the platform's own refusals mean: endpoint → status → verdict, and an attribute that it must have.
REFUSALS: Dict[str, Dict[int, Any]] = {
    "complete": {
        400: Substitute, 401: Unauthorized, 402: Later, 403: Later, 404: Dropped, 405: Later, 409: Settled,
        410: Dropped, 413: Substitute, 418: Later, 422: Substitute,
    },
    "release": {401: Unauthorized, 403: Dropped, 404: Unsupported, 405: Unsupported, 409: Dropped, 410: Dropped},
    "progress": {401: Unauthorized, 403: Dropped, 404: Unsupported, 405: Unsupported, 409: Dropped, 422: Dropped},
    "logs": {401: Unauthorized, 403: Dropped, 404: Unsupported, 413: Substitute, 422: Dropped},
    "heartbeat": {401: Unauthorized, 403: Refused, 404: Refused, 409: Refused},
    "bootstrap": {400: Refused, 401: Refused, 402: Refused, 403: Refused, 404: Refused, 409: Refused, 410: Refused},
    "recover": {400: Refused, 401: Refused, 403: Refused, 404: Refused, 418: Refused},
    "refresh": {400: Refused, 401: Refused, 403: Refused, 404: Refused, 410: Refused, 418: Refused},
    "task_stream": {401: Unauthorized, 402: Refused, 403: Refused, 404: Retry, 405: Retry, 409: Refused},
    "policy": {401: Unauthorized, 403: Refused, 404: Settled, 410: Refused},
    "tasks": {400: Refused, 401: Unauthorized, 404: Refused, 422: Refused},
    "capabilities": {401: Unauthorized, 404: Unsupported, 405: Unsupported, 422: Dropped},
}  # fmt: skip


@pytest.mark.parametrize(
    ("endpoint", "status", "kind"),
    [(endpoint, status, kind) for endpoint, rules in REFUSALS.items() for status, kind in rules.items()],
)
def test_what_the_platform_refuses(endpoint: str, status: int, kind: Type[Any]) -> None:
    """The platform's own answer is a verdict, whatever content type it claims."""
    bodies = [b'{"error": "x", "message": "y"}', b'{"error": {"message": "y"}}']
    if (endpoint, status) != ("policy", 404):
        bodies.append(b'{"error": "x"}')
    for body, content_type in itertools.product(bodies, (JSON, HTML, NONE)):
        found = verdict(endpoint, Answer(status, body, content_type))
        assert type(found) is kind
        if isinstance(found, Unsupported):
            assert not found.is_foreign


def test_what_a_refusal_carries() -> None:
    """The code that replaces a result, whether a login's credentials are dead, who was first, and the plan's limits."""
    error = b'{"error": "x"}'
    assert [verdict("complete", Answer(status, error)).code for status in (400, 413, 422)] == [  # type: ignore[union-attr]
        "result_rejected",
        "result_too_large",
        "result_rejected",
    ]
    for status in (400, 401, 403, 404, 409, 410):
        assert getattr(verdict("refresh", Answer(status, error)), "is_final", None) is True
    for status in (402, 418, 451):
        assert getattr(verdict("refresh", Answer(status, error)), "is_final", None) is False
    assert getattr(verdict("progress", Answer(409, error)), "is_superseded", None) is True
    assert getattr(verdict("release", Answer(403, error)), "is_superseded", None) is False
    limit = verdict("bootstrap", Answer(402, error))
    assert isinstance(limit, Refused)
    assert isinstance(limit.error, PlanLimitError)
    unknown = b'{"error": "x", "code": "TASK_NOT_FOUND"}'
    assert isinstance(verdict("release", Answer(404, unknown)), Dropped)
    gone = verdict("task_stream", Answer(404, error))
    assert isinstance(gone, Retry)
    assert gone.is_fatal_at_first


@pytest.mark.parametrize(
    "body", [b'{"error": "x", "code": "INSTALLATION_REVOKED"}', b'{"code": "INSTALLATION_REVOKED"}']
)
@pytest.mark.parametrize("endpoint", [name for name in ENDPOINTS if name != "task_stream"])
def test_the_kill_switch_at_any_status(endpoint: str, body: bytes) -> None:
    """The code is read before the status, on every endpoint."""
    for status in STATUSES:
        if not 300 <= status < 400:
            assert isinstance(verdict(endpoint, Answer(status, body)), Revoked), status


def test_a_revocation_says_why() -> None:
    body = b'{"error": {"code": "INSTALLATION_REVOKED", "message": "stolen"}, "shutdown_timeout_ms": 1500}'
    found = verdict("task_stream", Answer(403, body))
    assert isinstance(found, Revoked)
    assert (found.error.reason, found.error.shutdown_timeout) == ("stolen", 1.5)


@pytest.mark.parametrize("text", [b'{"revoked":true', b'{"revoked" :\n true, x}', b'{"a": NaN, "revoked": true}'])
def test_an_unreadable_revocation_fails_closed(text: bytes) -> None:
    """A 2xx of JSON's type that cannot be read and says `revoked: true`; another type says nothing."""
    assert isinstance(verdict("heartbeat", Answer(200, text)), Revoked)
    assert isinstance(verdict("heartbeat", Answer(200, text, HTML)), NotThePlatform)
    assert isinstance(verdict("heartbeat", Answer(502, text)), NotThePlatform)
    assert isinstance(verdict("heartbeat", Answer(200, b'{"revoked": false')), NotThePlatform)


def test_the_stream() -> None:
    """200 of its type is the stream, whose body is not read; 204 says not to come back."""

    class Open(Answer):
        @property
        def body(self) -> bytes:  # type: ignore[override]
            raise AssertionError("the body of an open stream was read")

        @body.setter
        def body(self, value: bytes) -> None: ...

    assert isinstance(verdict("task_stream", Open(200, b"", "Text/Event-Stream; charset=utf-8")), Settled)
    gone = verdict("task_stream", Answer(204, b""))
    assert isinstance(gone, Refused)
    for status, kind in ((200, HTML), (200, JSON), (201, STREAM), (206, STREAM)):
        found = verdict("task_stream", Answer(status, b"{}", kind))
        assert isinstance(found, NotThePlatform)
        assert found.is_fatal_at_first


@pytest.mark.parametrize("code", ["NOT_FOUND", "INSTALLATION_NOT_FOUND", 7])
def test_a_404_that_is_not_about_the_policy(code: Any) -> None:
    """It is an outage: only POLICY_NOT_FOUND, or no code, says that a workspace has no policy."""
    body = protocol.encode_json({"error": "x", "code": code})
    assert type(verdict("policy", Answer(404, body))) is Retry
    assert isinstance(verdict("policy", Answer(404, b'{"error": "x", "code": "POLICY_NOT_FOUND"}')), Settled)
    assert isinstance(verdict("policy", Answer(404, b'{"error": {"code": "POLICY_NOT_FOUND"}}')), Settled)
    nested = protocol.encode_json({"error": {"code": code, "message": "y"}})
    assert type(verdict("policy", Answer(404, nested))) is Retry


@pytest.mark.parametrize(
    "body",
    [
        b'{"timestamp":"2026-11-25T01:00:00Z","status":404,"error":"Not Found","message":"","path":"/api/v1/x"}',
        b'{"status":404,"error":"Not Found"}',
        b'{"error":{"code":404,"message":"no"}}',
        b'{"statusCode":404,"message":"Cannot GET /api/v1/x","error":"Not Found"}',
        b'{"message":"Route GET:/api/v1/x not found","error":"Not Found","statusCode":404}',
        b'{"timestamp":1,"status":404,"error":"Not Found","message":"No message available","path":"/api/v1/x"}',
        b'{"error":{"message":"no such path","status":404}}',
        b'{"error":{"code":[],"message":"no"}}',
    ],
)
def test_a_404_of_a_framework(body: bytes) -> None:
    """It is an outage: without a code a message must be there too."""
    assert type(verdict("policy", Answer(404, body))) is Retry


def test_errors_in_place_of_an_answer() -> None:
    """A broken connection is retried, a refused login slowly; what nobody foresaw is retried and not quoted."""
    assert type(verdict("complete", TransportError("x"))) is Retry
    assert isinstance(verdict("complete", TransportError("x", retryable=False)), Later)
    assert isinstance(verdict("complete", AuthenticationError("x")), Later)
    assert verdict("complete", RevokedError("why")).error.reason == "why"  # type: ignore[union-attr]
    for error in (MemoryError("secret"), KeyError("secret"), SystemExit("secret")):
        found = verdict("complete", error)
        assert type(found) is Retry
        assert "secret" not in str(found.error)
        assert type(error).__name__ in str(found.error)


@pytest.mark.parametrize("endpoint", ["refresh", "task_stream", "complete"])
def test_an_answer_that_may_be_cut_ends_nothing(endpoint: str) -> None:
    """Without a length the end of the connection looks like the end of the answer."""
    for status, body, kind in itertools.product((200, 400, 404), (b"", b'{"error": "x'), (JSON, NONE)):
        found = verdict(endpoint, Answer(status, body, kind, **{"Content-Length": ""}))
        assert isinstance(found, NotThePlatform)
        assert not found.is_fatal_at_first
        assert str(found.error) == "the answer ended early"


def test_what_is_said_of_another_server() -> None:
    """Status, type and the page's words without its markup, in one line."""
    page = b"<html><style>p {color: red}</style><body>\n<h1>Sign in</h1> <p>to the\x1b network</p></body></html>"
    text = str(verdict("complete", Answer(200, page, HTML)).error)  # type: ignore[union-attr]
    assert text == "another server answered (200, text/html): it says 'Sign in to the network'"
    text = str(verdict("complete", Answer(302, page, HTML)).error)  # type: ignore[union-attr]
    assert text == "another server answered (302, text/html): a redirect, which is not followed"
    assert str(verdict("complete", Answer(404, b"", None)).error) == (  # type: ignore[union-attr]
        "another server answered (404, no content type): it is empty"
    )


def test_json_of_another_server_is_not_quoted_as_a_whole() -> None:
    """It may hold tokens; of an error its message is quoted, of anything else nothing."""
    body = b'{"runtime_token": "skr_1", "message": "a message"}'
    for status, said in ((200, "its JSON is not in the platform's form"), (403, "it says 'a message'")):
        text = str(verdict("task_stream", Answer(status, body)).error)  # type: ignore[union-attr]
        assert text == f"another server answered ({status}, application/json): {said}"
    for cut in (b' {"runtime_token": "skr_1', b'["skr_1"]'):
        assert "skr_1" not in str(verdict("complete", Answer(404, cut, HTML)).error)  # type: ignore[union-attr]


def test_support_is_switched_off_by_the_platform() -> None:
    """One answer in the platform's form is enough, and it is news once."""
    support = Support()
    found = verdict("release", Answer(404, b'{"error": "x"}'))
    assert support.is_offered("release")
    assert support.note("release", found)
    assert not support.note("release", found)
    assert not support.is_offered("release")
    assert support.is_offered("progress")


def test_support_is_switched_off_by_three_foreign_answers_in_a_row() -> None:
    """But only while another endpoint answers in the platform's form, and not if this one does in between."""
    page = verdict("release", Answer(404, b"<html>", HTML))
    fine = verdict("complete", Answer(200, b"{}"))
    broken = verdict("complete", TransportError("x"))
    support = Support()
    for _ in range(5):
        assert not support.note("release", page)
        support.note("complete", broken)
    support.note("complete", fine)
    assert support.note("release", page)
    support = Support()
    for _ in range(3):
        support.note("complete", fine)
        assert not support.note("release", page)
        assert not support.note("release", page)
        support.note("release", verdict("release", Answer(200, b"{}")))
    assert support.is_offered("release")
