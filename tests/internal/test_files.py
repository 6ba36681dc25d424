"""Check which files are trusted, and what the error says of the others."""

from __future__ import annotations

import logging
import os
import pathlib
import stat
from typing import Any, Callable, List

import pytest

from sekuire._internal import filelock, files
from sekuire._internal.files import Guard
from sekuire.errors import ConfigurationError

from ..support.users import OTHER, give_to_another, in_mounts, is_root

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
    call: Callable[..., Any],
    mode: int,
    is_secret: bool,
    text: str,
    path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "getgroups", list)
    monkeypatch.setattr(os, "getegid", lambda: OTHER)
    path.chmod(mode)
    with pytest.raises(ConfigurationError, match=f"{text}; run: chmod 600") as caught:
        call(Guard("outbox", is_secret=is_secret), str(path))
    assert caught.value.option == "outbox"


@pytest.mark.parametrize("is_primary", [True, False])
@pytest.mark.parametrize(("mode", "is_secret", "what"), [(0o660, True, "read"), (0o664, False, "written")])
def test_permissions_of_a_group_of_this_process(
    mode: int,
    is_secret: bool,
    what: str,
    is_primary: bool,
    path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """They are accepted, as Kubernetes adds them at each mount, with one warning for all files of a directory."""
    group = os.stat(path).st_gid
    monkeypatch.setattr(os, "getgroups", lambda: [] if is_primary else [OTHER, group])
    monkeypatch.setattr(os, "getegid", lambda: group if is_primary else OTHER)
    other = path.with_name("other")
    other.touch()
    guard = Guard("path", is_secret=is_secret)
    for one in (path, path, other):
        one.chmod(mode)
        guard.check(str(one))
        guard.open(str(one)).close()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"can be {what} by the group {group}" in record.getMessage()
    assert f"chmod 600 {path}" in record.getMessage()
    # What is open to everybody is refused whatever its group.
    path.chmod(mode | (0o004 if is_secret else 0o002))
    with pytest.raises(ConfigurationError, match="by others"):
        guard.check(str(path))


@pytest.mark.parametrize("follows_links", [True, False])
def test_a_file_is_made_private(follows_links: bool, path: pathlib.Path) -> None:
    """A new file is 0600 whatever the umask, and the permissions of a group are withdrawn."""
    guard = Guard("outbox", follows_links=follows_links)
    new = path.with_name("new")
    assert guard.make_private(str(new)) is None
    with pytest.raises(FileNotFoundError):
        guard.make_private(str(path.with_name("missing") / "file"), create=True)
    previous = os.umask(0)
    try:
        found = guard.make_private(str(new), create=True)
    finally:
        os.umask(previous)
    status = os.stat(new)
    assert found == (status.st_dev, status.st_ino)
    assert stat.S_IMODE(status.st_mode) == 0o600
    path.chmod(0o660)
    assert guard.make_private(str(path), create=True) is not None
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_bytes() == b"content"


def test_a_file_that_others_may_read(path: pathlib.Path) -> None:
    path.chmod(0o644)
    Guard("path", is_secret=False).check(str(path))


@pytest.mark.parametrize("call", [Guard.check, Guard.open, Guard.make_private])
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
    with pytest.raises(ConfigurationError, match="can be read by others"):
        Guard("path").make_private(str(path))


@pytest.mark.parametrize("leads_to", ["file", "nothing", "link"])
def test_a_link_of_another_user(leads_to: str, path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever made the link has chosen the file: neither read it nor make it there."""
    target, link = path.with_name("target"), path.with_name("link")
    if leads_to == "link":
        target.symlink_to(path)
    link.symlink_to({"file": path, "nothing": path.with_name("none"), "link": target}[leads_to])
    give_to_another(target if leads_to == "link" else link, monkeypatch)
    for call in (Guard.check, Guard.open, lambda guard, name: guard.make_private(name, create=True)):
        with pytest.raises(ConfigurationError, match=r"is a symbolic link of another user \(uid \d+\); remove it"):
            call(Guard("path", is_secret=False, trusts_root=True), str(link))
    assert not path.with_name("none").exists()


def test_links_in_a_circle(path: pathlib.Path) -> None:
    path.with_name("a").symlink_to(path.with_name("b"))
    path.with_name("b").symlink_to(path.with_name("a"))
    Guard("path").check(str(path.with_name("a")))
    with pytest.raises(OSError):
        Guard("path").open(str(path.with_name("a")))


def test_another_users_file(path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only root's file may count as one's own."""
    owner = os.stat(path).st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(ConfigurationError, match=r"belongs to another user \(uid \d+\); remove it, or .* chown it"):
        Guard("path").check(str(path))
    if owner == 0:
        Guard("path", trusts_root=True).check(str(path))


# -- mounts -----------------------------------------------------------------------------------------------------------


def test_a_file_that_is_mounted_alone(tmp_path: pathlib.Path) -> None:
    """A bind mount of a file is found, whatever its name, in a file system of its own or not; no other file is."""
    (tmp_path / "at home").write_text("")
    names = ["plain", "with a space", "with\\040 a backslash", "over\nlines", "ümlaut"]
    for name in names:
        (tmp_path / name).write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "plain")
    script = """
import subprocess, sys
from sekuire._internal.files import is_mounted_alone
folder, *names = sys.argv[1:]
for name in names:
    assert not is_mounted_alone(f"{folder}/{name}"), name
    subprocess.run(["mount", "--bind", f"{folder}/at home", f"{folder}/{name}"], check=True)
    assert is_mounted_alone(f"{folder}/{name}"), name
assert is_mounted_alone(f"{folder}/link")
assert not is_mounted_alone(f"{folder}/at home")
assert not is_mounted_alone(f"{folder}/missing")
"""
    in_mounts(script, str(tmp_path), *names)


def test_without_a_list_of_mounts(path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system gives no such list, a file of another file system than its directory's is mounted alone."""
    asked: List[str] = []
    monkeypatch.setattr("builtins.open", lambda *args: os.fdopen(os.open(os.devnull + "-missing", os.O_RDONLY)))
    monkeypatch.setattr(os.path, "ismount", lambda name: not asked.append(name))
    assert files.is_mounted_alone(str(path))
    assert asked == [os.path.realpath(path)]


@pytest.mark.skipif(not is_root, reason="only root can give a file away")
def test_a_read_only_mount(tmp_path: pathlib.Path) -> None:
    """What is on one is root's choice, so its owner and mode do not matter to who trusts root; a FIFO is refused."""
    script = """
import os, subprocess, sys
from sekuire._internal.files import Guard
from sekuire.errors import ConfigurationError
folder = sys.argv[1]
subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], check=True)
open(folder + "/seed", "w").close()
os.mkfifo(folder + "/fifo")
os.chmod(folder + "/seed", 0o666)
os.chown(folder + "/seed", 1234, 1234)
trusting = Guard("path", is_secret=False, trusts_root=True)
def refuses(guard, name):
    try:
        guard.open(f"{folder}/{name}").close()
    except ConfigurationError as error:
        return error.problem
    return None
assert "belongs to another user" in refuses(trusting, "seed")
subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
assert refuses(trusting, "seed") is None
assert "belongs to another user" in refuses(Guard("path"), "seed")
assert "is not a regular file" in refuses(trusting, "fifo")
"""
    in_mounts(script, str(tmp_path))


# -- lock files -------------------------------------------------------------------------------------------------------


def test_a_lock_file_that_cannot_be_trusted(tmp_path: pathlib.Path) -> None:
    """A link must not choose which file is made, and a FIFO is not waited for."""
    link, fifo = tmp_path / "link.lock", tmp_path / "fifo.lock"
    link.symlink_to(tmp_path / "none")
    os.mkfifo(fifo)
    with pytest.raises(OSError, match="it is a symbolic link"):
        filelock.open_lock(str(link))
    with pytest.raises(OSError, match="it is not a regular file"):
        filelock.open_lock(str(fifo))
    assert not (tmp_path / "none").exists()


def test_a_lock_file_of_another_user(path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its owner could hold up or mislead all who lock it. Root's is accepted."""
    os.close(filelock.open_lock(str(path)))
    give_to_another(path, monkeypatch)
    with pytest.raises(OSError, match="it belongs to another user"):
        filelock.open_lock(str(path))
    if is_root:
        os.chown(path, 0, -1)
        monkeypatch.setattr(os, "geteuid", lambda: OTHER)
        os.close(filelock.open_lock(str(path)))


def test_a_lock_file_that_was_deleted(path: pathlib.Path) -> None:
    descriptor = filelock.open_lock(str(path))
    assert filelock.is_at(descriptor, str(path))
    path.unlink()
    assert not filelock.is_at(descriptor, str(path))
    path.touch()
    assert not filelock.is_at(descriptor, str(path))
    os.close(descriptor)
