"""What a platform on disk keeps for the next start: its keys, an install token, and what is left of the others."""

from __future__ import annotations

import pathlib
from typing import Any, Dict, List, Optional

import pytest

from sekuire import RuntimeCredentialsStore, SekuireSDK
from sekuire.errors import ConfigurationError
from sekuire.local import LocalPlatform
from sekuire.local.store import erase

AGENT = "a"


def log_in(platform: LocalPlatform, token: str, **options: Any) -> None:
    with SekuireSDK(AGENT, api_base_url=platform.url, install_token=token, **options) as sdk:
        assert sdk.is_connected()


def test_an_install_token_that_stays(tmp_path: pathlib.Path) -> None:
    """It is the same after a restart, with all its uses again; each agent has its own."""
    path = tmp_path / "platform.db"
    tokens: List[str] = []
    for _ in range(3):
        with LocalPlatform(path) as platform:
            token = platform.reuse_install_token(AGENT)
            log_in(platform, token)
            tokens += [token, platform.reuse_install_token("b")]
    assert tokens[:2] * 3 == tokens
    assert tokens[0] != tokens[1]


@pytest.mark.parametrize(("agent_id", "max_uses"), [("", 1), (AGENT, 0), (AGENT, True)])
def test_a_wrong_token(agent_id: str, max_uses: int) -> None:
    with pytest.raises(ConfigurationError):
        LocalPlatform().reuse_install_token(agent_id, max_uses)


@pytest.mark.parametrize(
    ("uses", "has_file", "is_on_disk", "warns"),
    [(1, False, True, True), (1, True, True, False), (2, False, True, False), (1, False, False, False)],
)
def test_a_token_that_is_used_up(
    tmp_path: pathlib.Path,
    caplog: pytest.LogCaptureFixture,
    uses: int,
    has_file: bool,
    is_on_disk: bool,
    warns: bool,
) -> None:
    """The client warns if a restart will need another token, as far as the platform says."""
    options: Dict[str, Optional[RuntimeCredentialsStore]] = {}
    if has_file:
        options["credentials_store"] = RuntimeCredentialsStore(path=tmp_path / "credentials.json")
    with LocalPlatform(tmp_path / "platform.db" if is_on_disk else None) as platform:
        log_in(platform, platform.create_install_token(AGENT, uses), **options)
    lines = [record.getMessage() for record in caplog.records if "a restart needs another token" in record.getMessage()]
    assert len(lines) == warns
    assert all("SEKUIRE_CREDENTIALS_FILE" in line for line in lines)


def test_erase(tmp_path: pathlib.Path) -> None:
    """It deletes the database of a platform that has ended, also one that was killed before its first checkpoint."""
    path = tmp_path / "platform.db"
    assert not erase(str(path))
    LocalPlatform(path).stop()
    with LocalPlatform(path) as platform:
        key = platform.api_key
        with pytest.raises(ConfigurationError, match="is in use"):
            erase(str(path))
    assert erase(str(path))
    assert [one.name for one in tmp_path.iterdir() if one.name.startswith("platform.db")] == []
    with LocalPlatform(path) as platform:
        assert platform.api_key != key


def test_what_happened_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last ones are kept, with their numbers."""
    monkeypatch.setattr("sekuire.local.record.MAX_ENTRIES", 3)
    platform = LocalPlatform()
    ids = [platform.submit("x", 1, AGENT) for _ in range(5)]
    found = platform.happenings_after(0)
    assert [(one.number, one.fields["task_id"]) for one in found] == [(n, ids[n - 1]) for n in (3, 4, 5)]
    assert [one.number for one in platform.happenings_after(4)] == [5]
    assert platform.happenings_after(5) == []
