"""Check which files are trusted, and what the error says of the others."""

from __future__ import annotations

import os
import pathlib
from typing import Any, Callable

import pytest

from sekuire._internal.files import Guard
from sekuire.errors import ConfigurationError

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs owners and modes")


@pytest.fixture
def path(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "file"
    path.write_bytes(b"content")
    path.chmod(0o600)
    return path


def test_a_private_file(path: pathlib.Path) -> None:
    guard = Guard("path")
    guard.check(str(path))
    with guard.open(str(path)) as file:
        assert file.read() == b"content"


def test_no_file(tmp_path: pathlib.Path) -> None:
    """What is not there is nothing to refuse, and cannot be opened."""
    guard = Guard("path")
    guard.check(str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError):
        guard.open(str(tmp_path / "none"))


@pytest.mark.parametrize("call", [Guard.check, Guard.open])
@pytest.mark.parametrize(
    ("mode", "is_secret", "text"),
    [(0o640, True, "can be read by others"), (0o604, True, "can be read by others"),
     (0o620, False, "can be written by others"), (0o602, False, "can be written by others")],
)  # fmt: skip
def test_a_file_that_is_open_to_others(
    call: Callable[..., Any], mode: int, is_secret: bool, text: str, path: pathlib.Path
) -> None:
    path.chmod(mode)
    with pytest.raises(ConfigurationError, match=f"{text}; run: chmod 600") as caught:
        call(Guard("outbox", is_secret=is_secret), str(path))
    assert caught.value.option == "outbox"


def test_a_file_that_others_may_read(path: pathlib.Path) -> None:
    path.chmod(0o644)
    Guard("path", is_secret=False).check(str(path))


@pytest.mark.parametrize("call", [Guard.check, Guard.open])
def test_what_is_not_a_file(call: Callable[..., Any], tmp_path: pathlib.Path) -> None:
    """A FIFO is refused, without a wait for its writer. So are directories and devices."""
    os.mkfifo(tmp_path / "fifo", 0o600)
    for path in (str(tmp_path / "fifo"), str(tmp_path), os.devnull):
        with pytest.raises(ConfigurationError, match="is not a regular file; name another path"):
            call(Guard("path"), path)


@pytest.mark.parametrize("call", [Guard.check, Guard.open])
def test_a_link(call: Callable[..., Any], path: pathlib.Path) -> None:
    """A link is followed, or refused."""
    link = path.with_name("link")
    link.symlink_to(path)
    Guard("path").open(str(link)).close()
    with pytest.raises(ConfigurationError, match="is a symbolic link; name the file that it leads to"):
        call(Guard("path", follows_links=False), str(link))


def test_a_link_that_leads_to_a_fifo(tmp_path: pathlib.Path) -> None:
    os.mkfifo(tmp_path / "fifo", 0o600)
    (tmp_path / "link").symlink_to(tmp_path / "fifo")
    with pytest.raises(ConfigurationError, match="is not a regular file"):
        Guard("path").open(str(tmp_path / "link"))


def test_a_file_that_takes_the_place_of_another(path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was opened is looked at, not only what was there before."""
    monkeypatch.setattr(Guard, "check", lambda guard, path: None)
    path.chmod(0o644)
    with pytest.raises(ConfigurationError, match="can be read by others"):
        Guard("path").open(str(path))


def test_another_users_file(path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only root's file may count as one's own."""
    owner = os.stat(path).st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(ConfigurationError, match="belongs to another user; chown it"):
        Guard("path").check(str(path))
    if owner == 0:
        Guard("path", trusts_root=True).check(str(path))
