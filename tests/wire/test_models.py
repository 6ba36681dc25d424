"""The values: frozen, checked where a user makes them, silent about tokens."""

from __future__ import annotations

import datetime as dt
import pickle
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sekuire.errors import ConfigurationError
from sekuire.secret import Secret
from sekuire.wire.models import (
    BeaconStatus,
    Command,
    Completion,
    Grant,
    HeartbeatReply,
    RuntimeCredentials,
    Task,
    WorkerStats,
    is_id,
)

RUNTIME, REFRESH = "skr_runtime_text", "skf_refresh_text"


def full() -> RuntimeCredentials:
    return RuntimeCredentials(
        installation_id="inst-1",
        runtime_token=RUNTIME,
        refresh_token=REFRESH,
        expires_at=dt.datetime(2030, 1, 1, 12, tzinfo=dt.timezone(dt.timedelta(hours=2))),
        workspace_id="ws-1",
    )


def test_credentials_hold_secrets() -> None:
    """Tokens given as str become secrets, and the end of the token is told in UTC."""
    credentials = full()
    assert credentials.runtime_token == Secret(RUNTIME)
    assert credentials.refresh_token == Secret(REFRESH)
    assert credentials.expires_at == dt.datetime(2030, 1, 1, 10, tzinfo=dt.timezone.utc)
    assert credentials.expires_at is not None
    assert credentials.expires_at.tzinfo is dt.timezone.utc
    assert attrs.evolve(credentials, runtime_token=Secret("other")).runtime_token == Secret("other")


def test_credentials_show_no_token() -> None:
    """No form of the credentials shows a token, and pickling is refused."""
    for value in (full(), Grant(credentials=full()), HeartbeatReply(refreshed_token=Secret(RUNTIME))):
        for text in (repr(value), str(value), f"{value}", repr(attrs.asdict(value, recurse=False))):
            assert RUNTIME not in text
            assert REFRESH not in text
        with pytest.raises(TypeError):
            pickle.dumps(value)


def test_a_heartbeat_reply_hides_its_raw_form() -> None:
    """The decoded JSON kept for a policy gateway is not shown: it may carry a token."""
    assert RUNTIME not in repr(HeartbeatReply(raw={"refreshed_token": RUNTIME}))


def test_credentials_as_environment() -> None:
    """to_env() gives the plain variables, absent values left out."""
    assert full().to_env() == {
        "SEKUIRE_INSTALLATION_ID": "inst-1",
        "SEKUIRE_RUNTIME_TOKEN": RUNTIME,
        "SEKUIRE_REFRESH_TOKEN": REFRESH,
        "SEKUIRE_WORKSPACE_ID": "ws-1",
    }
    assert RuntimeCredentials().to_env() == {}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("runtime_token", f"{RUNTIME}\n"),
        ("refresh_token", f" {REFRESH}"),
        ("runtime_token", ""),
        ("refresh_token", 7),
        ("installation_id", ""),
        ("installation_id", 7),
        ("installation_id", ".."),
        ("installation_id", "a\nb"),
        ("installation_id", "x" * 257),
        ("workspace_id", "."),
        ("workspace_id", 7),
        ("expires_at", dt.datetime(2030, 1, 1)),
        ("expires_at", "2030-01-01T00:00:00Z"),
        ("expires_at", dt.datetime.min.replace(tzinfo=dt.timezone(dt.timedelta(hours=1)))),
    ],
)
def test_wrong_credentials_are_named(field: str, value: Any) -> None:
    """A wrong value is refused with its field's name, and a token is not quoted."""
    with pytest.raises(ConfigurationError) as caught:
        RuntimeCredentials(**{field: value})
    assert caught.value.option == field
    assert RUNTIME not in str(caught.value)
    assert REFRESH not in str(caught.value)


@pytest.mark.parametrize(
    "value",
    [
        Task(task_id="t", capability="c"),
        Command(type="pause"),
        Completion(task_id="t", attempt=1),
        WorkerStats(),
        BeaconStatus(),
        RuntimeCredentials(),
    ],
    ids=lambda value: type(value).__name__,
)
def test_values_are_frozen(value: Any) -> None:
    """A value cannot be changed, and has no place for anything else."""
    name = attrs.fields(type(value))[0].name
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        setattr(value, name, "other")
    with pytest.raises((attrs.exceptions.FrozenInstanceError, AttributeError)):
        value.unknown = 1


@given(st.one_of(st.text(), st.text(st.characters()), st.none(), st.integers(), st.binary()))
def test_an_id_can_stand_in_a_path(value: Any) -> None:
    """What counts as an id is a short str without control characters that is no path segment of special meaning."""
    if is_id(value):
        assert 1 <= len(value.encode()) <= 256
        assert value not in (".", "..")
        assert not any(ord(c) < 32 or ord(c) == 127 for c in value)
    elif isinstance(value, str):
        odd = any(ord(c) < 32 or 127 <= ord(c) < 160 or 0xD800 <= ord(c) < 0xE000 for c in value)
        assert not value or value in (".", "..") or odd or len(value.encode()) > 256


def test_ids_are_measured_in_bytes() -> None:
    """256 bytes are the limit, whatever the characters."""
    assert is_id("x" * 256)
    assert not is_id("x" * 257)
    assert is_id("é" * 128)
    assert not is_id("é" * 129)
