"""The wire contract: every decoder against any input, every encoder against what the contract says."""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import json
import math
from email.utils import format_datetime
from typing import Any, Callable, Dict, List, Optional, Tuple
from urllib.parse import unquote

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from sekuire.errors import APIError, ConfigurationError, PlanLimitError
from sekuire.secret import Secret
from sekuire.wire import protocol
from sekuire.wire.models import (
    Approval,
    Command,
    Connected,
    Failure,
    HeartbeatReply,
    RuntimeCredentials,
    WorkerReport,
)
from sekuire.wire.protocol import Endpoints, Malformed, MalformedTask

from ..support.builders import completion_of

UTC = dt.timezone.utc
NOW = dt.datetime(2026, 3, 1, 12, tzinfo=UTC)
DATE = format_datetime(NOW, usegmt=True)
DAY = 24 * 3600.0

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(10**40), 10**40),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(),
)
JSON = st.recursive(
    SCALARS, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(), inner, max_size=3))
)


def objects(*names: str, **strategies: st.SearchStrategy[Any]) -> st.SearchStrategy[Dict[str, Any]]:
    """Objects that have some of these fields, with values of any type."""
    fields = dict.fromkeys(names, JSON)
    fields.update(strategies)
    return st.fixed_dictionaries({}, optional=fields)


TIMES = st.one_of(JSON, st.datetimes().map(lambda value: value.isoformat() + "Z"), st.just("2026-03-01T13:00:00Z"))
TASKS = objects(
    "input", "tool", "target_tool", "workspace_id", "requester_agent_id", "requester_id", "parent_task_id",
    "workflow_id", "trace_id",
    task_id=st.one_of(st.just("t-1"), JSON), id=st.one_of(st.just("t-2"), JSON),
    capability=st.one_of(st.just("c"), JSON), target_capability=st.one_of(st.just("d"), JSON),
    attempt=st.one_of(st.just(2), JSON), timeout_ms=st.one_of(st.just(1500), JSON),
)  # fmt: skip
GRANTS = objects(
    "workspace_id", "heartbeat_interval_seconds",
    installation_id=st.one_of(st.just("i"), JSON), runtime_token=st.one_of(st.just("skr"), JSON),
    refresh_token=st.one_of(st.just("skf"), JSON), expires_at=TIMES, lease_expires_at=TIMES,
)  # fmt: skip
HEARTBEATS = objects(
    "heartbeat_interval_seconds", "active_policy_hash", "revoked", "reason", "shutdown_timeout_ms", "desired_state",
    refreshed_token=st.one_of(st.just("skr"), JSON), lease_expires_at=TIMES, refreshed_token_expires_at=TIMES,
)  # fmt: skip
DATES = st.one_of(st.none(), st.text(), st.just(DATE))


# -- any input --------------------------------------------------------------------------------------------------------


@given(st.one_of(TASKS, JSON).map(json.dumps) | st.text())
@example('{"task_id": "t-1", "capability": "c", "input": ' + "[" * 3000 + "]" * 3000 + "}")
def test_any_task_is_read_or_malformed(text: str) -> None:
    """Whatever a task event holds, it becomes a task or a MalformedTask, and an id that is told can be answered."""
    problem = None
    try:
        task = protocol.decode_task(text)
    except MalformedTask as error:
        problem = error
    if problem is not None:
        assert str(problem)
        assert problem.attempt >= 1
        assert problem.task_id is None or protocol.encode_id(problem.task_id)
        return
    assert protocol.is_id(task.task_id)
    assert task.capability
    assert task.attempt >= 1
    assert task.timeout is None or 0 < task.timeout <= protocol.MAX_DURATION


@given(st.one_of(TASKS, JSON).map(json.dumps) | st.text())
def test_any_untyped_message_is_a_task_or_nothing(text: str) -> None:
    """An untyped message becomes a task, a MalformedTask or None."""
    try:
        task = protocol.decode_untyped_task(text)
    except MalformedTask:
        return
    if task is not None:
        assert protocol.decode_task(text) == task


@given(st.one_of(objects("type", "reason", "command_id", "shutdown_timeout_ms"), JSON).map(json.dumps) | st.text())
def test_any_command_is_read_or_malformed(text: str) -> None:
    """Whatever a command event holds, it becomes a known command or is Malformed."""
    try:
        command = protocol.decode_command(text)
    except Malformed:
        return
    assert command.type in protocol.COMMANDS


@given(
    st.one_of(objects("installation_id", "heartbeat_interval_seconds", "desired_state"), JSON).map(json.dumps)
    | st.text()
)
def test_any_connected_event_is_read(text: str) -> None:
    """A connected event never fails: its fields are optional."""
    connected = protocol.decode_connected(text)
    assert connected.desired_state in (None, "running", "paused", "terminated")
    assert connected.heartbeat_interval is None or connected.heartbeat_interval > 0


@given(st.one_of(GRANTS, JSON), DATES, st.sampled_from([None, RuntimeCredentials(installation_id="old")]))
def test_any_grant_is_read_or_malformed(payload: Any, date: Optional[str], previous: Any) -> None:
    """Whatever a bootstrap answers, it becomes a usable grant or is Malformed."""
    try:
        grant = protocol.decode_grant(payload, date, NOW, previous)
    except Malformed:
        return
    assert grant.credentials.runtime_token is not None
    assert protocol.is_id(grant.credentials.installation_id)
    assert grant.lifetime is None or 0 < grant.lifetime <= protocol.MAX_TOKEN_LIFETIME


@given(st.one_of(HEARTBEATS, JSON), DATES)
def test_any_heartbeat_answer_is_read(payload: Any, date: Optional[str]) -> None:
    """A heartbeat's answer never fails: a field of a wrong type counts as absent."""
    reply = protocol.decode_heartbeat(payload, date, NOW)
    assert reply.revoked in (True, False)
    assert reply.desired_state in (None, "running", "paused", "terminated")


@given(
    st.sampled_from([300, 400, 401, 402, 403, 404, 409, 429, 500, 503]),
    st.one_of(objects("error", "message", "code", "required_plan", "upgrade_url", "current_usage"), JSON).map(
        lambda value: json.dumps(value).encode()
    )
    | st.binary(),
)
def test_any_error_is_read(status: int, body: bytes) -> None:
    """Whatever an error answer holds, it becomes an APIError of one printable line."""
    error = protocol.decode_error(status, body, 2.0)
    assert type(error) is (PlanLimitError if status == 402 else APIError)
    assert (error.status, error.retry_after) == (status, 2.0)
    assert str(error).isprintable()
    assert len(error.message) <= 500


@given(st.binary())
def test_any_body_is_json_or_malformed(body: bytes) -> None:
    """A body is decoded as JSON or is Malformed."""
    with contextlib.suppress(Malformed):
        protocol.decode_body(body)


@given(JSON)
def test_json_survives(value: Any) -> None:
    """What is encoded is decoded to the same value; what has no JSON form in UTF-8 raises a ValueError."""
    try:
        data = protocol.encode_json(value)
    except UnicodeEncodeError:
        assert "\\ud" in json.dumps(value)
        return
    assert protocol.decode_body(data) == value


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1: {2: float("-inf")}}, "\ud800", {"\udfff": 1}])
def test_what_is_not_json_is_not_encoded(value: Any) -> None:
    """NaN, infinities and lone surrogates are refused."""
    with pytest.raises(ValueError):
        protocol.encode_json(value)


# -- JSON -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "is not valid JSON"),
        ("{", "is not valid JSON"),
        ("{} {}", "is not valid JSON"),
        ("[NaN]", "NaN is not JSON"),
        ("[1, -Infinity]", "-Infinity is not JSON"),
        ("[" * 100_000 + "]" * 100_000, "nested too deep"),
        ("9" * 5000, "too many digits"),
    ],
)
def test_bad_json_says_why(text: str, problem: str) -> None:
    """Text that is not JSON is Malformed, with the reason and without quoting it."""
    with pytest.raises(Malformed, match=problem) as caught:
        protocol.decode_json(text)
    assert caught.value.__context__ is None


def test_a_byte_order_mark_is_no_harm() -> None:
    """A body may begin with a byte order mark."""
    assert protocol.decode_body(b"\xef\xbb\xbf{}") == {}


def test_a_body_that_is_no_utf8_is_malformed() -> None:
    """A body in another encoding is Malformed."""
    with pytest.raises(Malformed):
        protocol.decode_body('"é"'.encode("latin-1"))


# -- paths ------------------------------------------------------------------------------------------------------------


def test_paths_carry_encoded_ids() -> None:
    """Ids are percent-encoded, slashes and percent signs included, so that no id can leave its segment."""
    endpoints = Endpoints()
    assert endpoints.path("bootstrap") == "/api/v1/installations/bootstrap"
    assert endpoints.path("complete", task_id="a/../b?c#d%2e é") == (
        "/api/v1/tasks/a%2F..%2Fb%3Fc%23d%252e%20%C3%A9/complete"
    )


@given(st.text())
def test_any_id_is_encoded_reversibly_or_malformed(value: str) -> None:
    """An id is encoded so that decoding gives it back, or is Malformed."""
    try:
        encoded = protocol.encode_id(value)
    except Malformed:
        assert not protocol.is_id(value)
        return
    assert unquote(encoded) == value
    assert not set("/?#& ") & set(encoded)
    assert encoded.isascii()


@given(st.text(min_size=1, max_size=300), st.sampled_from(sorted(protocol.DEFAULT_ENDPOINTS)))
def test_any_id_stays_in_its_segment(value: str, name: str) -> None:
    """Whatever an id holds, a path with it has the segments of its template, and the id comes back out of it."""
    template = protocol.DEFAULT_ENDPOINTS[name]
    keys = [segment[1:-1] for segment in template.split("/") if segment.startswith("{")]
    if not protocol.is_id(value):
        for key in keys:
            with pytest.raises(Malformed):
                Endpoints().path(name, **{key: value})
        return
    path = Endpoints().path(name, **dict.fromkeys(keys, value))
    assert path.isascii()
    assert path.isprintable()
    wanted = [value if segment.startswith("{") else segment for segment in template.split("/")]
    assert [unquote(segment) for segment in path.split("/")] == wanted


@pytest.mark.parametrize("value", ["", ".", "..", "a\nb", "x" * 257, "\x7f", "\x85", "\ud800", "a\u2028b", "a\u2029b"])
def test_bad_ids_are_malformed(value: str) -> None:
    """Empty, special, long and controlling ids are Malformed."""
    with pytest.raises(Malformed):
        Endpoints().path("task", task_id=value)


def test_overrides_replace_paths() -> None:
    """An override replaces its path and no other, and its placeholder is filled in."""
    endpoints = Endpoints({"refresh": "/v2/{installation_id}/renew", "bootstrap": "/enrol"})
    assert endpoints.path("refresh", installation_id="a b") == "/v2/a%20b/renew"
    assert endpoints.path("bootstrap") == "/enrol"
    assert endpoints.path("logs") == "/api/v1/logs"
    assert Endpoints().path("bootstrap") == "/api/v1/installations/bootstrap"


@pytest.mark.parametrize(
    ("name", "path", "hint"),
    [
        ("bootstrapp", "/x", "known are approval"),
        ("bootstrap", "x", "begins with one '/'"),
        ("bootstrap", "//evil.test/x", "begins with one '/'"),
        ("bootstrap", "https://evil.test/x", "begins with one '/'"),
        ("bootstrap", "/x?y=1", "without host, query"),
        ("bootstrap", "/x#y", "without host, query"),
        ("bootstrap", "/x\\y", "without host, query"),
        ("bootstrap", "/x y", "spaces"),
        ("bootstrap", "/x\r\nHost: evil", "spaces"),
        ("bootstrap", "/é", "begins with one '/'"),
        ("bootstrap", "/a/../b", "'..' segments"),
        ("bootstrap", "/a/./b", "'..' segments"),
        ("bootstrap", "/{task_id}", "placeholders: none"),
        ("bootstrap", "/{installation_id}/{installation_id}", "placeholders: none"),
        ("bootstrap", "/{{x}}", "plain placeholder"),
        ("bootstrap", None, "begins with one '/'"),
        ("bootstrap", 5, "begins with one '/'"),
        ("refresh", "/x", r"placeholders: {installation_id}"),
        ("refresh", "/{installation_id}/{installation_id}", r"placeholders: {installation_id}"),
        ("refresh", "/{task_id}", r"placeholders: {installation_id}"),
        ("refresh", "/{installation_id!r}", "plain placeholder"),
        ("refresh", "/{installation_id:>9}", "plain placeholder"),
        ("refresh", "/{installation_id.__class__}", "plain placeholder"),
        ("refresh", "/{installation_id[0]}", "plain placeholder"),
        ("refresh", "/{}", "plain placeholder"),
        ("refresh", "/{installation_id", "plain placeholder"),
        ("refresh", "/installation_id}", "plain placeholder"),
        ("refresh", "/{{installation_id}}", "plain placeholder"),
    ],
)
def test_wrong_overrides_are_refused(name: str, path: Any, hint: str) -> None:
    """A wrong override is a ConfigurationError that names the endpoint and says how it must look."""
    with pytest.raises(ConfigurationError, match=hint) as caught:
        Endpoints({name: path})
    assert caught.value.option == f"endpoints[{name!r}]"


@pytest.mark.parametrize("value", [5, ["bootstrap"], "/x"])
def test_overrides_are_a_mapping(value: Any) -> None:
    """Anything but a mapping is refused."""
    with pytest.raises(ConfigurationError, match="must map endpoint names"):
        Endpoints(value)


@given(st.text(), st.sampled_from(sorted(protocol.DEFAULT_ENDPOINTS)))
def test_any_override_is_taken_or_refused(path: str, name: str) -> None:
    """Any override is a ConfigurationError or gives a path on the same host."""
    try:
        endpoints = Endpoints({name: path})
    except ConfigurationError:
        return
    assert endpoints.path(name).startswith("/")
    assert not endpoints.path(name).startswith("//")


def test_the_stream_query() -> None:
    """The query of the stream names who asks, how much it takes, and its capabilities with commas between them."""
    query = protocol.stream_query("a&b", "i 1", "w", 4, ["x y", "z&q"])
    assert query == "agent_id=a%26b&installation_id=i%201&worker_id=w&max_in_flight=4&capabilities=x%20y,z%26q"
    assert protocol.stream_query("a", None, "w", 1, []) == "agent_id=a&worker_id=w&max_in_flight=1"


@given(st.text(), st.none() | st.text(), st.text(), st.integers(1, 10**6), st.lists(st.text(min_size=1), max_size=4))
def test_any_stream_query_can_be_read_back(
    agent_id: str, installation_id: Optional[str], worker_id: str, most: int, capabilities: List[str]
) -> None:
    """Whatever the names hold, the query is printable ASCII, and a server reads them back out of it."""
    try:
        query = protocol.stream_query(agent_id, installation_id, worker_id, most, capabilities)
    except UnicodeEncodeError:
        # A lone surrogate; no setting may hold one.
        assert not all(map(_is_utf8, [agent_id, installation_id or "", worker_id, *capabilities]))
        return
    assert query.isascii()
    assert query.isprintable()
    assert " " not in query
    found = dict(pair.split("=", 1) for pair in query.split("&"))
    names = found.pop("capabilities", None)
    wanted = {"agent_id": agent_id, "worker_id": worker_id, "max_in_flight": str(most)}
    if installation_id:
        wanted["installation_id"] = installation_id
    assert {key: unquote(value) for key, value in found.items()} == wanted
    assert [unquote(name) for name in names.split(",")] == capabilities if names is not None else not capabilities


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# -- headers and keys -------------------------------------------------------------------------------------------------


def test_headers_of_credentials() -> None:
    """A runtime token is a bearer token; an API key has a header of its own."""
    assert protocol.bearer(Secret("t")) == ("Authorization", "Bearer t")
    assert protocol.api_key_header(Secret("k")) == ("X-API-Key", "k")


def test_idempotency_keys() -> None:
    """The key is the hash of endpoint, credential, agent and holder, and differs when any of them does."""
    key = protocol.idempotency_key("refresh", Secret("token"), "agent", "holder")
    assert key == hashlib.sha256(b"refresh\ntoken\nagent\nholder").hexdigest()
    others = {
        protocol.idempotency_key("recover", Secret("token"), "agent", "holder"),
        protocol.idempotency_key("refresh", Secret("token2"), "agent", "holder"),
        protocol.idempotency_key("refresh", Secret("token"), "agent2", "holder"),
        protocol.idempotency_key("refresh", Secret("token"), "agent", "holder2"),
    }
    assert len(others | {key}) == 5
    assert "token" not in key


def test_an_end_has_passed_by_the_answers_own_clock() -> None:
    """Only the answer's Date says that a time in it has passed; one that is years ago is not meant as a time."""
    date = "Fri, 01 Jan 2027 00:00:00 GMT"
    end = dt.datetime(2027, 1, 1, tzinfo=dt.timezone.utc)
    second, most = dt.timedelta(seconds=1), dt.timedelta(seconds=protocol.MAX_TOKEN_LIFETIME)
    steps = (second, second * 0, -second, -most, -most - second)
    found = [protocol.has_ended(end + step, date) for step in steps]
    assert found == [False, True, True, True, False]
    assert not protocol.has_ended(dt.datetime(1, 1, 1, tzinfo=dt.timezone.utc), date)
    for missing in (None, "", "yesterday"):
        assert not protocol.has_ended(end - second, missing)
    assert not protocol.has_ended(None, date)


def test_completion_keys() -> None:
    """A completion's key is its task and attempt, with a suffix for a substituted one."""
    assert protocol.completion_key("t/1", 2) == "t%2F1:2"
    assert protocol.completion_key("t", 2, substituted=True) == "t:2:2"


@given(st.text(), st.integers(1, 2**31 - 1), st.booleans())
def test_no_header_holds_a_control_character(text: str, attempt: int, substituted: bool) -> None:
    """Whatever a platform sends as an id or a token, what goes into a header of ours is one line of it."""
    values: List[bytes] = []
    with contextlib.suppress(Malformed):
        values.append(protocol.completion_key(text, attempt, substituted).encode("ascii"))
    with contextlib.suppress(ConfigurationError):
        values += [
            value.encode("ascii") for _, value in (protocol.bearer(Secret(text)), protocol.api_key_header(Secret(text)))
        ]
    if _is_utf8(text):
        event_id = protocol.event_id_header(text)
        assert event_id is None or event_id.decode() == text
        values.append(event_id or b"")
    assert not any(byte < 32 or byte == 127 for value in values for byte in value)


def test_event_ids_that_are_sent_back() -> None:
    """An event id goes back as UTF-8; none, a long one, and one with control characters do not."""
    assert protocol.event_id_header("ev 1é") == "ev 1é".encode()
    assert protocol.event_id_header("x" * 4096) == b"x" * 4096
    for event_id in ("", "x" * 4097, "é" * 2049, "a\x00", "a\tb", "\x7f"):
        assert protocol.event_id_header(event_id) is None


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, None),
        ("", None),
        ("0", None),
        ("1", 1.0),
        (" 120 ", 120.0),
        ("301", 300.0),
        ("9" * 400, 300.0),
        ("-5", None),
        ("1.5", None),
        ("soon", None),
        ("\u0663", None),
        (format_datetime(NOW + dt.timedelta(seconds=90), usegmt=True), 90.0),
        (format_datetime(NOW - dt.timedelta(seconds=90), usegmt=True), None),
        (format_datetime(NOW + dt.timedelta(days=900), usegmt=True), 300.0),
        ("Sun, 01 Mar 2026 12:00:30 +0000", 30.0),
        ("Sun, 01 Mar 2026 12:00:30 -0000", 30.0),
        ("Fri, 31 Dec 9999 23:59:59 -1400", None),
        ("Mon, 01 Jan 0001 00:00:00 +1400", None),
        ("Mon, 99 Foo 2026 99:99:99 GMT", None),
    ],
)
def test_retry_after_in_both_forms(header: Optional[str], seconds: Optional[float]) -> None:
    """Retry-After is read as seconds or as a date; negative and unreadable values are ignored, long ones cut."""
    assert protocol.retry_after(header, NOW) == seconds


@pytest.mark.parametrize("skew", [-(10**8), -3600, 0, 3600])
def test_a_date_in_retry_after_counts_by_the_answers_date(skew: int) -> None:
    """The platform's clock decides, wherever ours stands; without a readable Date it is ours."""
    theirs = NOW + dt.timedelta(seconds=skew)
    header = format_datetime(theirs + dt.timedelta(seconds=4), usegmt=True)
    assert protocol.retry_after(header, NOW, format_datetime(theirs, usegmt=True)) == 4.0
    assert protocol.retry_after("7", NOW, format_datetime(theirs, usegmt=True)) == 7.0
    if skew == 0:
        assert [protocol.retry_after(header, NOW, date) for date in (None, "", "today")] == [4.0] * 3


@given(st.text())
def test_any_header_is_read(text: str) -> None:
    """No value of Retry-After or Date raises anything."""
    seconds = protocol.retry_after(text, NOW)
    assert seconds is None or 0 < seconds <= 300
    parsed = protocol.parse_http_date(text)
    assert parsed is None or parsed.tzinfo is UTC


# -- times ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2026-03-01T12:00:00Z", NOW),
        ("2026-03-01t12:00:00z", NOW),
        ("2026-03-01 12:00:00Z", NOW),
        ("2026-03-01T14:00:00+02:00", NOW),
        ("2026-03-01T12:00:00.5Z", NOW + dt.timedelta(milliseconds=500)),
        ("2026-03-01T12:00:00.123456789Z", NOW + dt.timedelta(microseconds=123456)),
        ("2026-03-01T12:00:00", None),
        ("2026-03-01", None),
        ("2026-02-30T12:00:00Z", None),
        ("0001-01-01T00:00:00+14:00", None),
        ("2026-03-01T12:00:00+99:99", None),
        ("2026-03-01T12:00:00Z\n", None),
        (1772366400, None),
        (None, None),
    ],
)
def test_times_of_the_wire(text: Any, expected: Optional[dt.datetime]) -> None:
    """An RFC 3339 instant is read as aware UTC; anything else is None."""
    assert protocol.parse_time(text) == expected


@given(st.datetimes(min_value=dt.datetime(1, 1, 3), max_value=dt.datetime(9999, 12, 29)), st.integers(-1439, 1439))
def test_times_survive(value: dt.datetime, offset: int) -> None:
    """A formatted instant is read back to the same instant."""
    instant = value.replace(tzinfo=dt.timezone(dt.timedelta(minutes=offset)))
    assert protocol.parse_time(protocol.format_time(instant)) == instant


@given(st.one_of(JSON, st.text()))
def test_any_time_is_read(value: Any) -> None:
    """No value of a time raises anything."""
    found = protocol.parse_time(value)
    assert found is None or found.tzinfo is UTC


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(3600, 3600.0), (1, 1.0), (0, None), (-5, None), (400 * DAY, 400 * DAY), (400 * DAY + 1, None)],
)
def test_a_tokens_lifetime_counts_from_the_answers_date(seconds: float, expected: Optional[float]) -> None:
    """A lifetime is the end minus the answer's Date, however wrong our clock; nothing, past and absurd mean unknown."""
    end = NOW + dt.timedelta(seconds=seconds)
    assert protocol.token_lifetime(end, DATE, NOW + dt.timedelta(days=900)) == expected
    assert protocol.token_lifetime(end, None, NOW) == expected
    assert protocol.token_lifetime(end, "not a date", NOW) == expected
    assert protocol.token_lifetime(None, DATE, NOW) is None


@pytest.mark.parametrize(
    ("seconds", "dated", "undated"),
    [(60, 60.0, 60.0), (900 * DAY, 900 * DAY, 900 * DAY), (0, 0.0, None), (-5, 0.0, None), (-900 * DAY, 0.0, None)],
)
def test_a_lease_that_has_ended(seconds: float, dated: float, undated: Optional[float]) -> None:
    """An end at or before the answer's Date ends the lease; without a Date it is not used, and that is said."""
    end = NOW + dt.timedelta(seconds=seconds)
    ignored: Dict[str, str] = {}
    ours = NOW + dt.timedelta(days=2000)
    assert protocol.lease_lifetime(end.isoformat(), DATE, ours, ignored) == (end, dated)
    assert ignored == {}
    for date in (None, "not a date"):
        found, lifetime = protocol.lease_lifetime(end.isoformat(), date, NOW, ignored)
        assert (found, lifetime) == ((None if undated is None else end), undated)
    assert list(ignored) == ([] if undated is not None else ["lease_expires_at"])


@pytest.mark.parametrize("value", [12345, "yesterday", "2026-03-01 12:00", {}, ["2026-03-01T12:01:00Z"], True, ""])
def test_a_lease_that_is_not_a_time(value: Any) -> None:
    """A lease's end that cannot be read says nothing, and that is said; none at all is not worth a word."""
    ignored: Dict[str, str] = {}
    assert protocol.lease_lifetime(value, DATE, NOW, ignored) == (None, None)
    assert list(ignored) == ["lease_expires_at"]
    ignored.clear()
    assert protocol.lease_lifetime(None, DATE, NOW, ignored) == (None, None)
    assert ignored == {}


@given(
    st.one_of(st.none(), st.datetimes(timezones=st.just(UTC))), st.one_of(DATES, st.text()),
    st.datetimes(timezones=st.just(UTC)),
)  # fmt: skip
def test_any_lifetime_is_usable_or_unknown(end: Optional[dt.datetime], date: Optional[str], now: dt.datetime) -> None:
    """However wrong the clocks are, a lifetime is one that a platform can mean, or unknown."""
    seconds = protocol.token_lifetime(end, date, now)
    assert seconds is None or 0 < seconds <= protocol.MAX_TOKEN_LIFETIME
    _, seconds = protocol.lease_lifetime(None if end is None else end.isoformat(), date, now, {})
    assert seconds is None or 0 <= seconds < math.inf


# -- tasks ------------------------------------------------------------------------------------------------------------


def task(**fields: Any) -> str:
    return json.dumps({"task_id": "t-1", "capability": "c", **fields})


def test_a_whole_task() -> None:
    """Every field of a task is read, and unknown ones are ignored."""
    found = protocol.decode_task(
        task(
            input={"a": 1}, attempt=3, tool="x", workspace_id="w", requester_agent_id="r", parent_task_id="p",
            workflow_id="f", trace_id="tr", timeout_ms=1500, unknown={"x": 1},
        )
    )  # fmt: skip
    assert (found.task_id, found.capability, found.input, found.attempt) == ("t-1", "c", {"a": 1}, 3)
    assert (found.tool, found.workspace_id, found.requester_id) == ("x", "w", "r")
    assert (found.parent_task_id, found.workflow_id, found.trace_id, found.timeout) == ("p", "f", "tr", 1.5)


def test_aliases_of_a_task() -> None:
    """The second names are accepted, and the first ones win; null counts as absent."""
    second = {"id": "t-2", "target_capability": "d", "target_tool": "y", "requester_id": "s"}
    found = protocol.decode_task(json.dumps(second))
    assert (found.task_id, found.capability, found.tool, found.requester_id) == ("t-2", "d", "y", "s")
    first = {"task_id": "t-1", "capability": "c", "tool": "x", "requester_agent_id": "r"}
    found = protocol.decode_task(json.dumps({**second, **first}))
    assert (found.task_id, found.capability, found.tool, found.requester_id) == ("t-1", "c", "x", "r")
    found = protocol.decode_task(json.dumps({**dict.fromkeys(first), **second}))
    assert (found.task_id, found.capability, found.tool, found.requester_id) == ("t-2", "d", "y", "s")


def test_a_task_of_a_tool() -> None:
    """A task without a capability is run by the handler of its tool's name."""
    for name in ("tool", "target_tool"):
        found = protocol.decode_task(task(capability=None, **{name: "search"}))
        assert (found.capability, found.tool) == ("search", "search")
    found = protocol.decode_task(task(capability=None, tool="x", target_tool="y", type="z"))
    assert (found.capability, found.tool) == ("x", "x")


CONTEXT = {"skill": "plan", "workspace_id": "ws", "requester_id": "r"}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"type": "plan"}, ("plan", None, None)),
        ({"context": CONTEXT}, ("plan", "ws", "r")),
        ({"type": "own", "context": CONTEXT}, ("own", "ws", "r")),
        ({"tool": "own", "type": "t", "context": CONTEXT}, ("own", "ws", "r")),
        ({"capability": "own", "workspace_id": "mine", "context": CONTEXT}, ("own", "mine", "r")),
        ({"capability": "own", "requester_agent_id": "me", "context": CONTEXT}, ("own", "ws", "me")),
        ({"capability": "own", "requester_id": "me", "context": CONTEXT}, ("own", "ws", "me")),
        ({"capability": "own", "context": "text"}, ("own", None, None)),
        ({"capability": "own", "context": {}}, ("own", None, None)),
    ],
)
def test_the_pushed_form_of_a_task(fields: Dict[str, Any], expected: Tuple[Any, ...]) -> None:
    """``type`` and ``context`` fill in what the task itself does not say."""
    found = protocol.decode_task(task(**{"capability": None, **fields}))
    assert (found.capability, found.workspace_id, found.requester_id) == expected


@pytest.mark.parametrize(
    "fields", [{}, {"context": {"skill": 5}}, {"type": ""}, {"context": {**CONTEXT, "workspace_id": 5}}]
)
def test_a_pushed_form_that_is_malformed(fields: Dict[str, Any]) -> None:
    """A task that names no capability anywhere, or holds another type, is malformed."""
    with pytest.raises(protocol.MalformedTask):
        protocol.decode_task(task(**{"capability": None, **fields}))


def test_what_a_task_may_leave_out() -> None:
    """A task without attempt is the first one, without input it has an empty one; null fields count as absent."""
    for extra in ({}, {"attempt": None, "timeout_ms": None, "tool": None, "trace_id": None}):
        found = protocol.decode_task(task(**extra))
        assert (found.attempt, found.input, found.timeout, found.tool) == (1, {}, None, None)
    assert protocol.decode_task(task(input=None)).input is None
    assert protocol.decode_task(task(input=[1, "x"])).input == [1, "x"]


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"capability": None}, "capability"),
        ({"capability": ""}, "capability"),
        ({"capability": 5}, "capability"),
        ({"capability": "c\n2026-01-01 ERROR forged"}, "capability"),
        ({"capability": "c\u2028forged"}, "capability"),
        ({"capability": "\ud800"}, "capability"),
        ({"capability": "x" * 257}, "capability"),
        ({"attempt": 0}, "attempt"),
        ({"attempt": 1.0}, "attempt"),
        ({"attempt": True}, "attempt"),
        ({"attempt": 2**31}, "attempt"),
        ({"attempt": "1"}, "attempt"),
        ({"timeout_ms": 0}, "timeout_ms"),
        ({"timeout_ms": -1}, "timeout_ms"),
        ({"timeout_ms": "10"}, "timeout_ms"),
        ({"timeout_ms": 10**30}, "timeout_ms"),
        ({"tool": 1}, "tool"),
        ({"workspace_id": []}, "workspace_id"),
        ({"requester_agent_id": {}}, "requester_agent_id"),
        ({"trace_id": 7}, "trace_id"),
    ],
)
def test_a_malformed_task_with_an_id_can_be_answered(fields: Dict[str, Any], problem: str) -> None:
    """A task with a wrong field is malformed, names the field and keeps its id."""
    with pytest.raises(MalformedTask, match=problem) as caught:
        protocol.decode_task(task(**fields))
    assert caught.value.task_id == "t-1"


@pytest.mark.parametrize("task_id", [None, "", 5, ".", "a\nb", "x" * 300, "\ud800", ["t"]])
def test_a_task_without_a_usable_id(task_id: Any) -> None:
    """A task whose id cannot be used has none to be answered with."""
    with pytest.raises(MalformedTask) as caught:
        protocol.decode_task(task(task_id=task_id))
    assert caught.value.task_id is None


@pytest.mark.parametrize(
    ("field", "problem"),
    [
        ("NaN", "NaN is not JSON"),
        ("-Infinity", "-Infinity is not JSON"),
        pytest.param("[" * 100_000 + "]" * 100_000, "nested too deep", marks=pytest.mark.slow),
        pytest.param('{"a":' * 100_000 + "1" + "}" * 100_000, "nested too deep", marks=pytest.mark.slow),
        ("9" * 5000, "too many digits"),
    ],
    ids=["nan", "infinity", "lists", "objects", "digits"],
)
@pytest.mark.parametrize("untyped", [False, True])
def test_a_task_that_cannot_be_decoded_is_answered(field: str, problem: str, untyped: bool) -> None:
    """A task that Python cannot decode still tells its id and attempt, wherever they stand."""
    decode: Callable[[str], Any] = protocol.decode_untyped_task if untyped else protocol.decode_task
    inner = '{"task_id": "inner", "attempt": 9}'
    for text in (
        f'{{"task_id": "t\\u002d1", "attempt": 4, "x": {inner}, "input": {field}}}',
        f'{{"input": {field}, "x": [{inner}], "attempt": 4, "task_id": "t-1"}}',
        f'{{"id": "t-1", "s": "}}{{ \\" , :", "input": {field}, "attempt": 4}}',
    ):
        with pytest.raises(MalformedTask, match=problem) as caught:
            decode(text)
        assert (caught.value.task_id, caught.value.attempt) == ("t-1", 4)
        assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        '{"task_id": "t-1"',
        '["task_id", "t-1"]',
        '{"task_id": "t-1"} {"task_id": "t-2"}',
        '{"task_id": "t-1"]}',
        '{"task_id": 5, "input": NaN}',
        '{"task_id": nonsense, "input": NaN}',
        '{task_id: "t-1", "input": NaN}',
        '{"task_id"; "t-1"}}',
        '{"task_id": "' + "x" * 5000 + '", "input": NaN}',
        '{"other": "t-1", "input": NaN}',
        '{"x": {"task_id": "t-1"}, "input": NaN}',
    ],
)
def test_broken_text_has_no_id(text: str) -> None:
    """Text that is no whole object, or names no id of its own, is malformed without one."""
    with pytest.raises(MalformedTask) as caught:
        protocol.decode_task(text)
    assert caught.value.task_id is None


def test_broken_text_is_read_in_linear_time() -> None:
    """Megabytes of quotes that never close take no longer than they should."""
    with pytest.raises(MalformedTask):
        protocol.decode_task('{"task_id": "t-1", "x": "' + '\\"' * 2_000_000)


def test_odd_but_valid_tasks() -> None:
    """Lone surrogates and duplicate keys in a task are no reason to refuse it; the last of two keys counts."""
    assert protocol.decode_task('{"task_id": "t", "capability": "c", "input": "\\ud800"}').input == "\ud800"
    found = protocol.decode_task('{"task_id": "a", "task_id": "b", "capability": "c", "input": 1, "input": 2}')
    assert (found.task_id, found.input) == ("b", 2)
    assert protocol.decode_task(task(input=10**4000)).input == 10**4000


@pytest.mark.parametrize("large", ["x" * 10_000_000, "\\u0041" * 1_700_000], ids=["plain", "escaped"])
def test_large_strings(large: str) -> None:
    """A string of 10 MB is taken where any string is, and is malformed, unquoted, where an id or a name is."""
    found = protocol.decode_task(f'{{"task_id": "t", "capability": "c", "input": "{large}", "trace_id": "{large}"}}')
    assert len(found.input) == len(found.trace_id or "") > 1_000_000
    for field in ("task_id", "capability", "attempt", "timeout_ms"):
        fields = {"task_id": '"t"', "capability": '"c"', field: f'"{large}"'}
        with pytest.raises(MalformedTask) as caught:
            protocol.decode_task("{" + ",".join(f'"{key}":{value}' for key, value in fields.items()) + "}")
        assert len(str(caught.value)) < 200
        assert caught.value.task_id == (None if field == "task_id" else "t")
    command = protocol.decode_command(f'{{"type": "pause", "reason": "{large}", "command_id": "{large}"}}')
    assert (len(command.reason or ""), command.command_id) == (500, None)
    error = protocol.decode_error(500, f'{{"message": "{large}", "code": "{large}"}}'.encode())
    assert len(str(error)) < 1100
    reply = protocol.decode_heartbeat({"reason": "x" * 10_000_000, "desired_state": "x" * 10_000_000}, None, NOW)
    assert (len(reply.reason or ""), reply.desired_state) == (500, None)


@pytest.mark.parametrize(
    ("text", "is_task"),
    [
        ('{"task_id": "t", "capability": "c", "input": {}}', True),
        ('{"id": "t", "capability": "c", "input": null}', True),
        ('{"task_id": "t", "capability": "c"}', False),
        ('{"capability": "c", "input": {}}', False),
        ('{"message": "hello"}', False),
        ("[]", False),
        ("hello", False),
        ('{"hello": NaN}', False),
    ],
)
def test_untyped_messages(text: str, is_task: bool) -> None:
    """An untyped message with an id and an input is a task; any other is nothing."""
    assert (protocol.decode_untyped_task(text) is not None) is is_task


# -- commands and connected -------------------------------------------------------------------------------------------


def test_commands() -> None:
    """A command is read with its reason, id and time; unusable extras count as absent."""
    text = '{"type": "terminate", "reason": "over\\nforged", "command_id": "c-1", "shutdown_timeout_ms": 2500}'
    assert protocol.decode_command(text) == Command(
        type="terminate", reason="over forged", command_id="c-1", shutdown_timeout=2.5
    )
    assert protocol.decode_command(
        '{"type": "pause", "reason": 5, "command_id": "", "shutdown_timeout_ms": -1}'
    ) == Command(type="pause")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"type": "stop"}', '{"type": ["pause"]}', '{"type": {}}'])
def test_unknown_commands(text: str) -> None:
    """A command of no known type is Malformed."""
    with pytest.raises(Malformed):
        protocol.decode_command(text)


def test_connected() -> None:
    """The connected event gives what is usable of it."""
    text = '{"installation_id": "i", "heartbeat_interval_seconds": 5, "desired_state": "paused"}'
    assert protocol.decode_connected(text) == Connected(
        installation_id="i", heartbeat_interval=5.0, desired_state="paused"
    )
    for text in ("", "[]", '{"installation_id": 5, "heartbeat_interval_seconds": 0, "desired_state": "x"}'):
        assert protocol.decode_connected(text) == Connected()


@pytest.mark.parametrize(
    ("seconds", "expected"), [(1e-9, 0.5), (0.49, 0.5), (0.5, 0.5), (7, 7.0), (0, None), (-1, None)]
)
def test_the_interval_of_heartbeats_has_a_floor(seconds: float, expected: Optional[float]) -> None:
    """However short the interval that a platform names, beats have half a second between them."""
    fields = {"heartbeat_interval_seconds": seconds}
    assert protocol.decode_connected(json.dumps(fields)).heartbeat_interval == expected
    assert protocol.decode_heartbeat(fields, DATE, NOW).heartbeat_interval == expected
    grant = protocol.decode_grant({"runtime_token": "r", "installation_id": "i", **fields}, DATE, NOW, None)
    assert grant.heartbeat_interval == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (" paused ", "paused"), ("Paused", "paused"), ("PAUSE", "paused"), ("'paused'", "paused"),
        ("Terminated", "terminated"), ("terminate\n", "terminated"),
        ("Running", "running"), ("resume", "running"), ("resumed", "running"),
        (None, None),
    ],
)  # fmt: skip
def test_spellings_of_the_desired_state(value: Any, expected: Any) -> None:
    """A desired state is read in any spelling whose meaning is plain."""
    connected = protocol.decode_connected(json.dumps({"desired_state": value}))
    reply = protocol.decode_heartbeat({"desired_state": value}, DATE, NOW)
    assert (connected.desired_state, reply.desired_state) == (expected, expected)
    assert connected.ignored == reply.ignored == {}


@pytest.mark.parametrize("value", ["", "x\ny", "paused, please", 1, True, ["paused"], {"state": "paused"}])
def test_a_desired_state_that_is_not_plain(value: Any) -> None:
    """One whose meaning is not plain changes nothing, and that is said."""
    connected = protocol.decode_connected(json.dumps({"desired_state": value}))
    reply = protocol.decode_heartbeat({"desired_state": value}, DATE, NOW)
    for found in (connected, reply):
        assert found.desired_state is None
        assert list(found.ignored) == ["desired_state"]
        assert found.ignored["desired_state"].isprintable()


@pytest.mark.parametrize("value", [True, "true", "True", " TRUE ", '"true"', "yes", "on", "1", 1, 1.0])
def test_spellings_of_a_revocation(value: Any) -> None:
    """A revocation is read in any type and spelling whose meaning is plain."""
    reply = protocol.decode_heartbeat({"revoked": value}, DATE, NOW)
    assert reply.revoked
    assert reply.ignored == {}


@pytest.mark.parametrize("value", [False, None, "false", "False ", "", "0", "no", "off", 0, 0.0])
def test_spellings_of_no_revocation(value: Any) -> None:
    """The same for an installation that is not revoked."""
    reply = protocol.decode_heartbeat({"revoked": value}, DATE, NOW)
    assert not reply.revoked
    assert reply.ignored == {}


@pytest.mark.parametrize("value", ["maybe", "tru", 2, -1, 0.5, [], [True], {"revoked": True}])
def test_a_revocation_that_is_not_plain(value: Any) -> None:
    """One whose meaning is not plain revokes nothing, and that is said."""
    reply = protocol.decode_heartbeat({"revoked": value}, DATE, NOW)
    assert not reply.revoked
    assert list(reply.ignored) == ["revoked"]


@pytest.mark.parametrize("kind", ["Pause", " pause ", "PAUSE"])
def test_spellings_of_a_command(kind: str) -> None:
    """A command's type is read in any case, and with spaces around it."""
    assert protocol.decode_command(json.dumps({"type": kind})).type == "pause"


# -- answers ----------------------------------------------------------------------------------------------------------


def test_a_grant() -> None:
    """A grant is read whole, its lifetimes by the answer's clock."""
    payload = {
        "installation_id": "i",
        "runtime_token": "r",
        "refresh_token": "f",
        "workspace_id": "w",
        "expires_at": "2026-03-01T13:00:00Z",
        "lease_expires_at": "2026-03-01T12:01:00Z",
        "heartbeat_interval_seconds": 7,
    }
    grant = protocol.decode_grant(payload, DATE, NOW + dt.timedelta(hours=9), None)
    assert grant.credentials == RuntimeCredentials(
        installation_id="i",
        runtime_token="r",
        refresh_token="f",
        workspace_id="w",
        expires_at=NOW + dt.timedelta(hours=1),
    )
    assert (grant.lifetime, grant.lease_lifetime, grant.heartbeat_interval) == (3600.0, 60.0, 7.0)


@pytest.mark.parametrize("absent", [{}, {"installation_id": None, "refresh_token": None, "workspace_id": None}])
def test_a_refresh_keeps_what_its_answer_leaves_out(absent: Dict[str, Any]) -> None:
    """What an answer leaves out, or gives as null, is taken from the credentials it renews; but not their end."""
    previous = RuntimeCredentials(
        installation_id="i", runtime_token="old", refresh_token="f", workspace_id="w", expires_at=NOW
    )
    grant = protocol.decode_grant({"runtime_token": "new", **absent}, DATE, NOW, previous)
    assert grant.credentials == RuntimeCredentials(
        installation_id="i", runtime_token="new", refresh_token="f", workspace_id="w"
    )
    assert grant.lifetime is None
    rotated = protocol.decode_grant({"runtime_token": "new", "refresh_token": "g"}, DATE, NOW, previous)
    assert rotated.credentials.refresh_token == Secret("g")


@pytest.mark.parametrize(
    ("payload", "problem"),
    [
        ([], "not a JSON object"),
        ({}, "no runtime_token"),
        ({"runtime_token": "r"}, "installation_id"),
        ({"runtime_token": "r", "installation_id": ".."}, "installation_id"),
        ({"runtime_token": "top secret", "installation_id": "i"}, "runtime_token is not a token"),
        ({"runtime_token": "top", "refresh_token": "top secret\n", "installation_id": "i"}, "refresh_token is not"),
    ],
)
def test_unusable_grants(payload: Any, problem: str) -> None:
    """A grant without token or id, or with a token that could not be sent, is Malformed and not quoted."""
    with pytest.raises(Malformed, match=problem) as caught:
        protocol.decode_grant(payload, DATE, NOW, None)
    assert "secret" not in str(caught.value)
    assert caught.value.__context__ is None


def test_a_heartbeats_answer() -> None:
    """A heartbeat's answer is read whole."""
    payload = {
        "lease_expires_at": "2026-03-01T12:01:00Z",
        "heartbeat_interval_seconds": 5,
        "refreshed_token": "new",
        "refreshed_token_expires_at": "2026-03-01T13:00:00Z",
        "active_policy_hash": "abc",
        "revoked": True,
        "reason": "leak",
        "shutdown_timeout_ms": 1000,
        "desired_state": "terminated",
    }
    reply = protocol.decode_heartbeat(payload, DATE, NOW)
    assert (reply.lease_lifetime, reply.heartbeat_interval, reply.refreshed_token) == (60.0, 5.0, Secret("new"))
    assert (reply.refreshed_token_lifetime, reply.active_policy_hash) == (3600.0, "abc")
    assert (reply.revoked, reply.reason, reply.shutdown_timeout, reply.desired_state) == (
        True, "leak", 1.0, "terminated",
    )  # fmt: skip
    assert reply.raw == payload


def test_a_useless_heartbeats_answer() -> None:
    """An answer of the wrong shape is an empty one: nothing in it is needed."""
    assert protocol.decode_heartbeat(["x"], DATE, NOW) == HeartbeatReply()
    odd = {"refreshed_token": "a b", "revoked": "maybe", "lease_expires_at": 5, "desired_state": ["running"]}
    assert protocol.decode_heartbeat(odd, DATE, NOW) == HeartbeatReply(raw=odd)


# -- errors -----------------------------------------------------------------------------------------------------------


def test_error_bodies() -> None:
    """Code and message come from the body; without a code its ``error`` is the code."""
    error = protocol.decode_error(409, b'{"error": "conflict", "message": "taken", "code": "TAKEN"}')
    assert (error.status, error.code, error.message) == (409, "TAKEN", "taken")
    error = protocol.decode_error(409, b'{"error": "conflict"}')
    assert (error.code, error.message) == ("conflict", "conflict")
    error = protocol.decode_error(500, b'{"code": 5, "message": ["x"]}')
    assert (error.code, error.message) == (None, "")


def test_a_plan_limit() -> None:
    """402 is a PlanLimitError with its facts."""
    body = b'{"error": "plan", "required_plan": "pro", "upgrade_url": "https://x.test", "current_usage": {"agents": 3}}'
    error = protocol.decode_error(402, body)
    assert isinstance(error, PlanLimitError)
    assert (error.required_plan, error.upgrade_url, error.current_usage) == ("pro", "https://x.test", {"agents": 3})


@pytest.mark.parametrize("body", [b"", b"<html>Bad\ngateway</html>", b"\xff\xfe", b"[1]", b'"text"', b"x" * 100_000])
def test_error_bodies_that_are_no_json(body: bytes) -> None:
    """A body that is not JSON gives its first 500 characters, on one line."""
    error = protocol.decode_error(502, body)
    assert error.code is None
    assert error.message == protocol.one_line(body[:2000].decode("utf-8", "replace"))[:500]
    assert "\n" not in str(error)


def test_errors_cannot_forge_log_lines() -> None:
    """Control characters in any part of an error become spaces."""
    forged = "x\n2026-01-01 ERROR forged\x1b[31m\u2028\x85"
    body = json.dumps({"code": forged, "message": forged, "upgrade_url": forged, "required_plan": forged}).encode()
    for status in (402, 500):
        text = str(protocol.decode_error(status, body))
        assert text.isprintable()
    assert str(protocol.decode_error(500, forged.encode())).isprintable()


def test_the_kill_switch_and_what_passes() -> None:
    """The code tells a revocation, whatever the status; 408, 425, 429 and 5xx pass, others do not."""
    assert protocol.is_revoked(protocol.decode_error(403, b'{"code": "INSTALLATION_REVOKED"}'))
    assert protocol.is_revoked(protocol.decode_error(410, b'{"code": "INSTALLATION_REVOKED"}'))
    assert not protocol.is_revoked(protocol.decode_error(410, b'{"code": "GONE"}'))
    passing = [status for status in range(300, 600) if protocol.is_transient(status)]
    assert passing == [408, 425, 429, *range(500, 600)]


# -- bodies -----------------------------------------------------------------------------------------------------------


def test_bodies_of_credentials() -> None:
    """Bootstrap, recover and refresh say who asks, with which SDK, and carry their token in the body."""
    info = {"hostname": "h", "pid": 1, "platform": {"type": "bare_metal"}}
    body = json.loads(protocol.bootstrap_body(Secret("skt"), "a", ("x",), info))
    assert body == {
        "install_token": "skt",
        "agent_id": "a",
        "capabilities": ["x"],
        "runtime_info": {**info, "sdk": protocol.SDK_INFO},
    }
    body = json.loads(protocol.recover_body("a", "w", info))
    assert body == {"agent_id": "a", "workspace_id": "w", "runtime_info": {**info, "sdk": protocol.SDK_INFO}}
    assert json.loads(protocol.refresh_body(Secret("skf"))) == {"refresh_token": "skf"}


def test_a_heartbeats_body() -> None:
    """A heartbeat tells status, whole seconds of uptime, platform, capabilities, workers, and the policy if there."""
    report = WorkerReport(worker_id="w", status="healthy", active_tasks=2, capabilities=("x",))
    body = json.loads(protocol.heartbeat_body("healthy", 1.9, {"type": "docker"}, ("x",), [report], "abc"))
    assert body == {
        "status": "healthy",
        "uptime_seconds": 1,
        "platform": {"type": "docker"},
        "capabilities": ["x"],
        "workers": [{"worker_id": "w", "status": "healthy", "active_tasks": 2, "capabilities": ["x"]}],
        "sdk": protocol.SDK_INFO,
        "policy_hash": "abc",
    }
    assert "policy_hash" not in json.loads(protocol.heartbeat_body("healthy", 1, {}, (), []))


def test_small_bodies() -> None:
    """Release, progress and submission carry their fields, an absent message left out."""
    assert json.loads(protocol.release_body(2, "w")) == {"attempt": 2, "worker_id": "w"}
    assert json.loads(protocol.progress_body(0.5, None)) == {"progress": 0.5}
    assert json.loads(protocol.progress_body(0.5, "half")) == {"progress": 0.5, "message": "half"}
    assert json.loads(protocol.submit_body("c", {"x": 1}, "a", {"trace_id": "t"})) == {
        "agent_id": "a", "capability": "c", "input": {"x": 1}, "trace_id": "t",
    }  # fmt: skip


@settings(max_examples=200)
@given(
    output=JSON,
    task_id=st.text(min_size=1),
    attempt=st.integers(1, 2**31 - 1),
    worker_id=st.uuids().map(lambda value: value.hex),
    execution=st.integers(0, 10**9),
)
def test_a_result_is_one_json_object(output: Any, task_id: str, attempt: int, worker_id: str, execution: int) -> None:
    """Head and tail together are the completion's JSON object, whatever attempt is put in last."""
    assume("\\ud" not in json.dumps([output, task_id]))
    completion = completion_of(task_id, output=output, execution_time_ms=execution)
    head = protocol.completion_head(completion)
    assert protocol.execution_time_of(head) == execution
    assert json.loads(head + protocol.completion_tail(attempt, worker_id)) == {
        "task_id": task_id,
        "status": "completed",
        "output": output,
        "execution_time_ms": execution,
        "attempt": attempt,
        "worker_id": worker_id,
    }


@pytest.mark.parametrize("details", [None, {}, {"city": "Atlantis"}])
def test_a_failure_is_one_json_object(details: Optional[Dict[str, Any]]) -> None:
    """A failure carries code, message, advice and, where there are any, details."""
    failed = Failure(code="no_such_city", message="no", retryable=True, details=details)
    completion = completion_of("t", failure=failed, execution_time_ms=5)
    body = json.loads(protocol.completion_head(completion) + protocol.completion_tail(2, "w"))
    error: Dict[str, Any] = {"code": "no_such_city", "message": "no", "retryable": True}
    if details is not None:
        error["details"] = details
    assert body == {
        "task_id": "t", "status": "failed", "error": error, "execution_time_ms": 5, "attempt": 2, "worker_id": "w",
    }  # fmt: skip


@given(
    code=st.text(),
    message=st.text(),
    retryable=st.booleans(),
    details=st.none() | st.dictionaries(st.text(), JSON, max_size=3),
)
def test_any_failure_is_one_json_object(code: str, message: str, retryable: bool, details: Any) -> None:
    """A failure is read back as it was, and its head alone tells its code."""
    assume("\\ud" not in json.dumps([code, message, details]))
    failed = Failure(code=code, message=message, retryable=retryable, details=details)
    head = protocol.completion_head(completion_of("t", failure=failed))
    assert protocol.failure_code(head) == code
    error = json.loads(head + protocol.completion_tail(2, "w"))["error"]
    assert error.pop("details", None) == details
    assert error == {"code": code, "message": message, "retryable": retryable}


@given(st.binary() | JSON.map(lambda value: json.dumps(value).encode()[:-1]))
def test_any_head_is_looked_at(head: bytes) -> None:
    """Whatever a stored head holds, it is a failure or it is not."""
    assert isinstance(protocol.failure_code(head), (str, type(None)))


@pytest.mark.parametrize("output", [float("nan"), "\ud800", 1j, object(), {"x": {("a",): 1}}])
def test_a_result_without_a_json_form(output: Any) -> None:
    """A result that JSON cannot hold raises, before anything is sent."""
    with pytest.raises((ValueError, TypeError)):
        protocol.completion_head(completion_of("t", output=output))


def test_failures_of_our_own() -> None:
    """Each code of the contract is sent with its advice."""
    retryable = {code for code in protocol.RETRYABLE if protocol.failure(code, "x").retryable}
    assert retryable == {
        "worker_paused", "worker_terminated", "worker_shutdown", "policy_unavailable", "rate_limited", "timeout",
        "approval_expired",
    }  # fmt: skip


_JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=20,
)


@given(_JSON_VALUES)
def test_a_packed_value_comes_back_as_it_was(value: Any) -> None:
    """Any value that JSON gave is the same after it has waited as JSON: surrogates, infinity and -0.0 too."""
    packed = protocol.pack(value)
    assert packed is not None
    assert repr(protocol.unpack(packed)) == repr(value)


def test_a_value_too_deep_is_not_packed() -> None:
    """What the encoder cannot write stays as it is; nothing is raised."""
    value: Any = []
    for _ in range(100_000):
        value = [value]
    assert protocol.pack(value) is None
    while value:
        value = value.pop()


# -- approvals --------------------------------------------------------------------------------------------------------


def test_digest_and_id_of_an_approval() -> None:
    """Both are what the contract says, written here by hand; what is absent is null."""
    form = '{"details":{"a":1,"b":"\u20ac"},"policy_hash":null,"subject":{"kind":"tool","name":"pay"},"task_id":"t-1"}'
    digest = hashlib.sha256(form.encode()).hexdigest()
    assert protocol.approval_digest("t-1", "tool", "pay", {"b": "\u20ac", "a": 1.0}) == digest
    assert protocol.approval_digest("t-1", "tool", "pay", {"b": "\u20ac", "a": 1.0}, "h") != digest
    assert protocol.approval_id("t-1", digest, 2) == hashlib.sha256(f"t-1:{digest}:2".encode()).hexdigest()
    assert protocol.approval_digest("t", "tool", "x", None) == protocol.approval_digest("t", "tool", "x", None, None)


@pytest.mark.parametrize(
    ("details", "problem"),
    [
        ("a" * (protocol.MAX_DETAILS - 1), "65537 bytes"),
        ({"x": 2**53}, "integer beyond"),
        ({"x": float("nan")}, "not finite"),
        (["\ud800"], "lone surrogate"),
        (b"x", "a bytes"),
    ],
    ids=["long", "integer", "nan", "surrogate", "bytes"],
)
def test_details_that_no_approval_can_have(details: Any, problem: str) -> None:
    """Details that are too long or have no canonical form have no digest."""
    with pytest.raises(ValueError, match=problem):
        protocol.approval_digest("t", "action", "x", details)
    assert protocol.approval_digest("t", "action", "x", "a" * (protocol.MAX_DETAILS - 2))


def test_body_that_asks_for_an_approval() -> None:
    """It has the contract's fields, the time in milliseconds, and no policy where none was asked."""
    body = protocol.approval_body(
        "a-1", 2, "w", kind="tool", name="pay", details={"n": 1}, policy_hash=None, digest="d", timeout=1.5
    )
    expected = {
        "approval_id": "a-1", "attempt": 2, "worker_id": "w", "subject": {"kind": "tool", "name": "pay"},
        "details": {"n": 1}, "digest": "d", "timeout_ms": 1500,
    }  # fmt: skip
    assert json.loads(body) == expected
    body = protocol.approval_body(
        "a-1", 2, "w", kind="tool", name="pay", details={"n": 1}, policy_hash="h", digest="d", timeout=0.0
    )
    assert json.loads(body) == {**expected, "policy_hash": "h", "timeout_ms": 1}


def test_reading_an_approval() -> None:
    """An answer needs only a status, an event its ids too. Texts are cut to one line; a wrong one is absent."""
    found = protocol.parse_approval(
        json.dumps(
            {"approval_id": "a", "task_id": "t", "status": "Denied", "decided_by": "Ada\nB", "reason": 7, "digest": "d",
             "expires_at": "2026-03-01T12:00:00Z"}
        )
    )  # fmt: skip
    assert found == Approval(
        status="denied", approval_id="a", task_id="t", decided_by="Ada B", digest="d", expires_at=NOW
    )
    assert protocol.parse_approval({"status": "pending"}) == Approval(status="pending")


@pytest.mark.parametrize(
    "data",
    ["", "[]", "{}", '{"approval_id": "a", "task_id": "t", "status": "yes"}', '{"status": "approved"}',
     '{"approval_id": "..", "task_id": "t", "status": "approved"}', {}, [], None, {"status": True}],
)  # fmt: skip
def test_no_approval(data: Any) -> None:
    """What is not an approval is malformed. Nothing unreadable counts as approved."""
    with pytest.raises(Malformed):
        protocol.parse_approval(data)
