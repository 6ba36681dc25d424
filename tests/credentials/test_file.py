"""The credentials file: private, replaced whole, locked, and never a reason to stop."""

from __future__ import annotations

import datetime as dt
import json
import logging
import os
import pathlib
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
from typing import Any, Iterator, List

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sekuire._internal.threads import Deadline
from sekuire.credentials import RuntimeCredentialsStore
from sekuire.credentials import file as file_module
from sekuire.credentials.file import CredentialsFile, Stored
from sekuire.errors import ConfigurationError, TransportError
from sekuire.wire.models import RuntimeCredentials, is_id

from ..support.servers import run_python
from ..support.users import OTHER, give_to_another, in_mounts, is_root
from ..support.waiting import GUARD, until

posix = pytest.mark.skipif(os.name != "posix", reason="about POSIX permissions")


def stored(number: int = 1, **fields: Any) -> Stored:
    return Stored(
        credentials=RuntimeCredentials(
            installation_id="inst-1",
            runtime_token=f"skr_{number}",
            refresh_token=f"skf_{number}",
            workspace_id="ws-1",
            expires_at=dt.datetime(2030, 1, 1, tzinfo=dt.timezone.utc),
        ),
        revision=number,
        **fields,
    )


def write(path: pathlib.Path, text: str, mode: int = 0o600) -> None:
    path.write_text(text)
    path.chmod(mode)


@pytest.fixture
def path(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "credentials.json"


# -- content ----------------------------------------------------------------------------------------------------------


def test_what_is_saved_is_loaded(path: pathlib.Path) -> None:
    """What was saved is loaded again, whole."""
    file = CredentialsFile(path)
    assert file.load() is None
    value = stored(lifetime=3600.0, ends_at=1_900_000_000.25, seeds=("a", "b"))
    assert file.save(value)
    assert CredentialsFile(str(path)).load() == value
    empty = Stored(credentials=RuntimeCredentials(), revision=2)
    assert file.save(empty)
    assert file.load() == empty


def test_an_empty_file_is_none(path: pathlib.Path) -> None:
    """An empty file, such as one made beforehand to have its rights, holds nothing yet."""
    write(path, " \n")
    file = CredentialsFile(path)
    assert file.load() is None
    assert file.save(stored())
    assert file.load() == stored()


@pytest.mark.parametrize(
    "text",
    [
        "not json",
        "[]",
        '"x"',
        "{}",
        '{"format": 2, "revision": 1}',
        '{"format": 1}',
        '{"format": 1, "revision": "x"}',
        '{"format": 1, "revision": 1e999}',
        '{"format": 1, "revision": 1, "runtime_token": "a b"}',
        '{"format": 1, "revision": 1, "installation_id": ".."}',
        '{"format": 1, "revision": 1, "ends_at": "soon"}',
        '{"format": 1, "revision": 1, "ends_at": NaN}',
        '{"format": 1, "revision": 1, "seeds": 5}',
        "[" * 100_000,
    ],
)
def test_a_file_of_another_kind(path: pathlib.Path, text: str) -> None:
    """A file that is not ours is refused, named, and left as it is."""
    write(path, text)
    with pytest.raises(ConfigurationError, match="is not a credentials file of this library") as caught:
        CredentialsFile(path).load()
    assert str(path) in str(caught.value)
    assert path.read_text() == text


def test_a_file_that_is_no_text(path: pathlib.Path) -> None:
    """A file that is not UTF-8 is refused."""
    path.write_bytes(b"\xff\xfe\x00")
    path.chmod(0o600)
    with pytest.raises(ConfigurationError, match="not UTF-8"):
        CredentialsFile(path).load()


@pytest.mark.slow
@given(st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | st.text(), st.lists))
def test_any_content_is_decoded_or_refused(value: Any) -> None:
    """Whatever the fields of a file hold, they are read or refused."""
    for name in ("revision", "ends_at", "lifetime", "seeds", "installation_id", "runtime_token", "expires_at"):
        file_module._decode(json.dumps({"format": 1, "revision": 1, name: value}))


IDS = st.none() | st.text(min_size=1, max_size=60).filter(is_id)
TOKENS = st.none() | st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1)
ENDS = st.none() | st.datetimes(dt.datetime(1, 1, 3), dt.datetime(9999, 12, 29), timezones=st.just(dt.timezone.utc))
SECONDS = st.none() | st.floats(allow_nan=False, allow_infinity=False)


@given(
    st.builds(
        Stored,
        credentials=st.builds(
            RuntimeCredentials,
            installation_id=IDS,
            workspace_id=IDS,
            runtime_token=TOKENS,
            refresh_token=TOKENS,
            expires_at=ENDS,
        ),
        revision=st.integers(0, 2**53),
        lifetime=SECONDS,
        ends_at=SECONDS,
        seeds=st.lists(st.text()).map(tuple),
    )
)
def test_any_content_survives(value: Stored) -> None:
    """Whatever credentials there are, what is written is read back whole."""
    text = file_module._encode(value)
    assert text.isascii()
    assert file_module._decode(text) == value


@posix
@given(
    st.binary()
    | st.text().map(lambda text: json.dumps({"format": 1, "revision": 1, "runtime_token": text}).encode())
    | st.integers(0, 400).map(lambda at: file_module._encode(stored()).encode()[:at])
)
@example(b"[" * 100_000)
@example(b'{"format": 1, "revision": NaN}')
@example(b'{"format": 1, "revision": ' + b"9" * 5000 + b"}")
@example(b'{"format": 1, "revision": 1, "ends_at": 1e999}')
@example(b'{"format": 1, "revision": 1, "installation_id": "\\ud800"}')
def test_any_file_is_read_or_refused(content: bytes) -> None:
    """Any bytes in the file, also a file cut short, are credentials, nothing, or an error that quotes no token."""
    with tempfile.TemporaryDirectory() as directory:
        path = pathlib.Path(directory, "credentials.json")
        path.write_bytes(content)
        path.chmod(0o600)
        problem = None
        try:
            RuntimeCredentialsStore(path=path)
        except ConfigurationError as error:
            problem = error
        if problem is not None:
            assert "skr_" not in str(problem)
            assert "skr_" not in repr(problem.__context__)
            # What cannot be read is never replaced.
            assert path.read_bytes() == content


# -- rights -----------------------------------------------------------------------------------------------------------


@posix
def test_the_file_is_private(path: pathlib.Path) -> None:
    """The file, its lock and what it is made from are readable by this user only, whatever the umask."""
    previous = os.umask(0)
    try:
        file = CredentialsFile(path)
        with file.lock(Deadline(GUARD)):
            assert file.save(stored())
            file.holder("0" * 32)
    finally:
        os.umask(previous)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.with_name("credentials.json.lock").stat().st_mode) == 0o600
    assert stat.S_IMODE(path.with_name("credentials.json.holder").stat().st_mode) == 0o600
    assert sorted(os.listdir(path.parent)) == [
        "credentials.json",
        "credentials.json.holder",
        "credentials.json.lock",
    ]


@posix
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o666, 0o660])
def test_a_file_that_others_can_read(path: pathlib.Path, mode: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that others can read is refused with the command that fixes it, also when it becomes so later."""
    monkeypatch.setattr(os, "getgroups", list)
    monkeypatch.setattr(os, "getegid", lambda: OTHER)
    write(path, "", mode)
    with pytest.raises(ConfigurationError, match=f"chmod 600 {path}"):
        CredentialsFile(path)
    path.chmod(0o600)
    file = CredentialsFile(path)
    file.save(stored())
    path.chmod(mode)
    with pytest.raises(ConfigurationError, match="chmod 600"):
        file.load()


@posix
def test_a_file_of_a_kubernetes_volume(path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    """What fsGroup makes of the files at each mount is accepted with one warning; what is written is private again."""
    file = CredentialsFile(path)
    with file.lock(Deadline(GUARD)):
        assert file.save(stored())
        file.holder("0" * 32)
    for one in path.parent.iterdir():
        one.chmod(0o660)
    file = CredentialsFile(path)
    with file.lock(Deadline(GUARD)):
        assert file.load() == stored()
        assert file.holder("1" * 32) == "0" * 32
        assert file.save(stored(2))
    (record,) = caplog.records
    assert "fsGroup" in record.getMessage()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@posix
@pytest.mark.parametrize("suffix", ["", ".lock", ".holder"])
def test_a_file_of_another_user(path: pathlib.Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that belongs to another user is refused, and so is one beside it; the error says what to do."""
    write(path, "")
    if suffix:
        write(path.with_name(path.name + suffix), "0" * 32)
    give_to_another(path.with_name(path.name + suffix), monkeypatch)
    with pytest.raises(ConfigurationError, match="chown"):
        CredentialsFile(path)


@posix
def test_a_link_of_another_user(path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link that neither this user nor root has made is refused: it is not a mounted secret."""
    target = path.with_name("real.json")
    CredentialsFile(target).save(stored())
    path.symlink_to(target)
    give_to_another(path, monkeypatch)
    with pytest.raises(ConfigurationError, match="is a symbolic link of another user"):
        CredentialsFile(path)


def test_a_file_that_is_mounted_alone(tmp_path: pathlib.Path) -> None:
    """A file that cannot be replaced is refused with what to do; a read-only one is a seed."""
    script = """
import logging, os, subprocess, sys
from sekuire import RuntimeCredentials, RuntimeCredentialsStore
from sekuire.errors import ConfigurationError
logging.basicConfig(format="%(levelname)s %(message)s", stream=sys.stdout)
home, path = sys.argv[1] + "/home.json", sys.argv[1] + "/credentials.json"
RuntimeCredentialsStore(path=home).update(RuntimeCredentials(runtime_token="skr_home"))
open(path, "w").close()
os.chmod(path, 0o600)
subprocess.run(["mount", "--bind", home, path], check=True)
try:
    RuntimeCredentialsStore(path=path)
except ConfigurationError as error:
    print(error)
subprocess.run(["mount", "-o", "remount,bind,ro", path], check=True)
print(RuntimeCredentialsStore(path=path).current.runtime_token.reveal())
"""
    refusal, warning, token = in_mounts(script, str(tmp_path)).splitlines()
    assert "is mounted as a single file" in refusal
    assert "mount the directory" in refusal
    assert warning.startswith("WARNING credentials file")
    assert token == "skr_home"
    assert sorted(os.listdir(tmp_path)) == ["credentials.json", "home.json", "home.json.lock"]


@pytest.mark.parametrize("value", ["", 5, None, b""])
def test_a_path_that_is_none(value: Any) -> None:
    """A path must be one."""
    with pytest.raises(ConfigurationError) as caught:
        CredentialsFile(value)
    assert caught.value.option == "path"


def test_directories(tmp_path: pathlib.Path) -> None:
    """A missing directory, or a directory in the file's place, is refused with what to do."""
    with pytest.raises(ConfigurationError, match="make it first"):
        CredentialsFile(tmp_path / "missing" / "file")
    with pytest.raises(ConfigurationError, match="name a file in it"):
        CredentialsFile(tmp_path)


@posix
def test_a_link_of_ones_own_is_followed(tmp_path: pathlib.Path) -> None:
    """A symlink of this user stays a symlink: what it leads to is replaced."""
    target, link = tmp_path / "real.json", tmp_path / "link.json"
    write(target, "")
    link.symlink_to(target)
    file = CredentialsFile(link)
    assert not file.read_only
    assert file.save(stored())
    assert link.is_symlink()
    assert CredentialsFile(target).load() == stored()
    # Who writes the file through the link shares the installation with who writes it directly.
    assert file.holder("0" * 32) == CredentialsFile(target).holder("1" * 32, before_spending="the token") == "0" * 32


_MOUNTED = """
import logging, os, subprocess, sys
from sekuire import RuntimeCredentials, RuntimeCredentialsStore
from sekuire.errors import ConfigurationError
logging.basicConfig(format="%(levelname)s %(message)s", stream=sys.stdout)
folder = sys.argv[1]
os.mkdir(f"{folder}/..1")
RuntimeCredentialsStore(path=f"{folder}/..1/secret.json").update(RuntimeCredentials(runtime_token="skr_1"))
os.chmod(f"{folder}/..1/secret.json", 0o644)
os.chmod(f"{folder}/..1", 0o755)
os.symlink("..1", f"{folder}/..data")
os.symlink("..data/secret.json", f"{folder}/secret.json")
os.mkfifo(f"{folder}/fifo.json")
open(f"{folder}/foreign.json", "w").close()
os.chown(f"{folder}/foreign.json", 1234, 1234)
before = sorted(os.listdir(f"{folder}/..1"))
os.chmod(folder, 0o755)
os.setgid(65534); os.setuid(65534)
store = RuntimeCredentialsStore(path=f"{folder}/secret.json")
store.update(RuntimeCredentials(runtime_token="skr_memory"))
print(store.current.runtime_token.reveal())
print(RuntimeCredentialsStore(path=f"{folder}/secret.json").current.runtime_token.reveal())
for name in ("fifo.json", "foreign.json"):
    try:
        RuntimeCredentialsStore(path=f"{folder}/{name}")
    except ConfigurationError as error:
        print(error)
assert sorted(os.listdir(f"{folder}/..1")) == before
"""


@pytest.mark.skipif(not is_root, reason="only root can become another user")
def test_a_mounted_secret_is_a_seed(open_directory: pathlib.Path) -> None:
    """A link that root owns is read as another user, whatever its mode, never written, and warned of once.

    Root's FIFO in its place is not waited for, and the file of a third user is not believed.
    """
    lines = run_python(_MOUNTED, str(open_directory)).stdout.splitlines()
    assert [line for line in lines if line.startswith("skr")] == ["skr_memory", "skr_1"]
    warnings = [line for line in lines if line.startswith("WARNING")]
    # One for each store.
    assert len(warnings) == 2
    assert "rotated tokens cannot be kept" in warnings[0]
    fifo, foreign = lines[-2:]
    assert "is not a regular file" in fifo
    assert "belongs to another user" in foreign


_READ_ONLY = """
import os, sys
from sekuire.credentials.file import CredentialsFile
from sekuire.credentials import RuntimeCredentialsStore
from sekuire.errors import ConfigurationError
from sekuire.wire.models import RuntimeCredentials, is_id
directory = sys.argv[1]
if os.geteuid() == 0:
    os.chown(os.path.join(directory, "there.json"), 65534, 65534)
    os.chown(directory, 65534, 65534)
    os.setgid(65534); os.setuid(65534)
os.chmod(directory, 0o500)
store = RuntimeCredentialsStore(path=os.path.join(directory, "there.json"))
print(store.current.runtime_token.reveal())
store.update(RuntimeCredentials(runtime_token="skr_memory"))
print(store.current.runtime_token.reveal())
try:
    CredentialsFile(os.path.join(directory, "missing.json"))
except ConfigurationError as error:
    print(error)
print(sorted(os.listdir(directory)))
os.chmod(directory, 0o700)
"""


@pytest.fixture
def open_directory() -> Iterator[pathlib.Path]:
    """A directory that another user can reach; pytest's own are closed."""
    directory = pathlib.Path(tempfile.mkdtemp())
    yield directory
    shutil.rmtree(directory)


@posix
def test_a_directory_that_cannot_be_written(open_directory: pathlib.Path) -> None:
    """In a directory without the right to write, an existing file is a seed and a missing one is refused."""
    CredentialsFile(open_directory / "there.json").save(stored())
    lines = run_python(_READ_ONLY, str(open_directory)).stdout.split("\n")
    assert lines[:2] == ["skr_1", "skr_memory"]
    assert "cannot be written, and" in lines[2]
    assert lines[3] == "['there.json']"


def test_without_the_right_to_write(path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the right to write, a missing file is refused and an existing one only read."""
    monkeypatch.setattr(file_module, "_can_write", lambda where: False)
    with pytest.raises(ConfigurationError, match="cannot be written, and"):
        CredentialsFile(path)
    write(path, "")
    assert CredentialsFile(path).read_only


# -- writing ----------------------------------------------------------------------------------------------------------


_DISK_FULL = """
import logging, resource, sys
from sekuire.credentials import RuntimeCredentialsStore
from sekuire.wire.models import RuntimeCredentials, is_id
logging.basicConfig(format="%(levelname)s %(message)s", stream=sys.stdout)
path = sys.argv[1]
store = RuntimeCredentialsStore(path=path)
store.update(RuntimeCredentials(runtime_token="skr_before"))
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
for number in range(3):
    store.update(RuntimeCredentials(runtime_token=f"skr_full_{number}"))
    print("memory", store.current.runtime_token.reveal())
    print("disk", RuntimeCredentialsStore(path=path).current.runtime_token.reveal())
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
store.update(RuntimeCredentials(runtime_token="skr_after"))
print("disk", RuntimeCredentialsStore(path=path).current.runtime_token.reveal())
"""


@posix
def test_a_full_disk(path: pathlib.Path) -> None:
    """With a full disk credentials live on in memory, with one warning; the file stays whole, later writes go."""
    lines = run_python(_DISK_FULL, str(path)).stdout.strip().split("\n")
    warnings = [line for line in lines if line.startswith("WARNING")]
    assert len(warnings) == 1
    assert "kept in memory only" in warnings[0]
    assert [line for line in lines if line.startswith("memory")] == [f"memory skr_full_{n}" for n in range(3)]
    assert [line for line in lines if line.startswith("disk")] == ["disk skr_before"] * 3 + ["disk skr_after"]
    assert sorted(os.listdir(path.parent)) == ["credentials.json", "credentials.json.lock"]


def test_a_failed_write_warns_anew_after_a_good_one(path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    """A directory that disappears is warned of once, and once more after it was there again."""
    directory = path.parent / "inner"
    file = None
    for _ in range(2):
        directory.mkdir()
        file = file or CredentialsFile(directory / "file.json")
        assert file.save(stored())
        shutil.rmtree(directory)
        assert not file.save(stored())
        assert not file.save(stored())
    assert len(caplog.records) == 2


@pytest.mark.slow
def test_a_reader_never_sees_half_a_file(path: pathlib.Path) -> None:
    """While one thread writes again and again, readers without a lock see whole files only."""
    file = CredentialsFile(path)
    file.save(stored(1))
    done = threading.Event()
    problems: List[BaseException] = []
    seen: List[int] = []

    def read() -> None:
        reader = CredentialsFile(path)
        try:
            while not done.is_set():
                found = reader.load()
                assert found is not None
                assert found == stored(found.revision)
                seen.append(found.revision)
        except BaseException as error:
            problems.append(error)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for number in range(2, 300):
        assert file.save(stored(number))
    done.set()
    for reader in readers:
        reader.join(GUARD)
    assert problems == []
    assert len(set(seen)) > 1


# -- the lock ---------------------------------------------------------------------------------------------------------

_HOLD = """
import sys
from sekuire.credentials.file import CredentialsFile
from sekuire._internal.threads import Deadline
with CredentialsFile(sys.argv[1]).lock(Deadline(60)):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(path: pathlib.Path) -> Iterator["subprocess.Popen[str]"]:
    """Another process that holds the lock until its input is closed."""
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_another_process_holds_the_lock(path: pathlib.Path, holder: "subprocess.Popen[str]") -> None:
    """A lock held by another process is waited for until the deadline, then a TransportError names it."""
    file = CredentialsFile(path)
    with pytest.raises(TransportError, match=r"credentials\.json\.lock"):
        with file.lock(Deadline(0.05)):
            raise AssertionError("it was not locked")
    got = threading.Event()

    def wait() -> None:
        with file.lock(Deadline(GUARD)):
            got.set()

    thread = threading.Thread(target=wait)
    thread.start()
    assert not got.is_set()
    holder.kill()
    assert got.wait(GUARD)
    thread.join(GUARD)


def test_two_stores_of_one_process_exclude_each_other(path: pathlib.Path) -> None:
    """The lock excludes within a process too, and is given back by an error."""
    one, other = CredentialsFile(path), CredentialsFile(path)
    with pytest.raises(KeyError):
        with one.lock(Deadline(0)):
            with pytest.raises(TransportError):
                with other.lock(Deadline(0.01)):
                    raise AssertionError("it was not locked")
            raise KeyError
    with other.lock(Deadline(0)):
        pass


def test_a_lock_file_that_is_deleted_while_it_is_waited_for(
    path: pathlib.Path, holder: "subprocess.Popen[str]"
) -> None:
    """A lock on a deleted file excludes nobody: the one that is at its path is locked in its place."""
    lock = path.with_name("credentials.json.lock")
    file, other = CredentialsFile(path), CredentialsFile(path)
    got, release = threading.Event(), threading.Event()

    def wait() -> None:
        with file.lock(Deadline(GUARD)):
            got.set()
            release.wait(GUARD)

    thread = threading.Thread(target=wait)
    thread.start()
    # The thread has opened it, and polls.
    until(lambda: any(os.path.samefile(one, lock) for one in _opened()))
    lock.unlink()
    holder.kill()
    assert got.wait(GUARD)
    with pytest.raises(TransportError):
        with other.lock(Deadline(0.01)):
            raise AssertionError("it was not locked")
    release.set()
    thread.join(GUARD)


def _opened() -> List[str]:
    """What this process has open."""
    directory = "/proc/self/fd"
    if not os.path.isdir(directory):
        pytest.skip("needs /proc")
    return [one for one in (os.path.join(directory, number) for number in os.listdir(directory)) if os.path.exists(one)]


@pytest.mark.parametrize("broken", ["open_lock", "try_lock"])
def test_without_locks(
    broken: str, path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A file system without locks is warned of once, and used."""

    def fail(*args: Any) -> Any:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(file_module.filelock, broken, fail)
    file = CredentialsFile(path)
    for number in (1, 2):
        with file.lock(Deadline(0)):
            assert file.save(stored(number))
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "do not share it between processes" in caplog.text


@posix
def test_a_directory_that_cannot_be_synced(path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that does not open directories is no failure: the file has been replaced."""
    real = os.open

    def fail(name: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if os.path.isdir(name):
            raise PermissionError(13, "Permission denied")
        return real(name, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", fail)
    assert CredentialsFile(path).save(stored())
