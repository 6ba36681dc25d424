"""Keep credentials on disk: one private JSON file, replaced whole, under a lock that other processes honour."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
from typing import Any, Dict, Iterator, Optional, Tuple, Union

import attrs

from .._internal import filelock, files
from .._internal.logs import get_logger
from .._internal.threads import Deadline
from .._internal.values import Value
from ..errors import ConfigurationError, TransportError
from ..wire.models import RuntimeCredentials
from ..wire.protocol import format_time, parse_time

log = get_logger("sekuire.credentials")

_FORMAT = 1
#: Characters of a holder: 128 bits in hexadecimal.
_HOLDER_LENGTH = 32
_POLL = 0.02
_POSIX = os.name == "posix"
_GUARD = files.Guard("path")
#: For a file that is only read: a mounted secret, whose owner and mode the cluster chooses.
_SEED_GUARD = files.Guard("path", is_secret=False, trusts_root=True)


@attrs.frozen(kw_only=True, slots=True, eq=False, repr=False)
class Stored(Value):
    """Hold the content of the file.

    ``revision`` counts writes. ``ends_at`` is the end of the runtime token by this machine's clock (``time.time()``),
    so that a skewed clock does not matter. ``lifetime`` counts the seconds that the token had when it was obtained.
    ``seeds`` are the hashes of the settings that the credentials grew from. ``agent_id`` says whose they are.
    """

    credentials: RuntimeCredentials
    revision: int
    lifetime: Optional[float] = None
    ends_at: Optional[float] = None
    seeds: Tuple[str, ...] = ()
    agent_id: Optional[str] = None


class CredentialsFile:
    """Read and write one file of credentials.

    ::

        file = CredentialsFile("/var/lib/agent/credentials.json")
        with file.lock(Deadline(10.0)):
            file.save(Stored(credentials=credentials, revision=1))

    Beside it are ``PATH.lock`` and ``PATH.holder``, the random value that makes the logins of all who share the file
    those of one installation. If ``PATH`` is a link, they are beside the file that it leads to.

    :raises ConfigurationError: the directory is missing, the file is not private to this user, or it is mounted alone.
    """

    # Threads: any thread may call anything. Every write happens inside lock().

    def __init__(self, path: Union[str, os.PathLike[str]]) -> None:
        if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
            raise ConfigurationError(f"must be a path, got {path!r}", "path")
        self.path = os.path.abspath(os.fspath(path))
        # Beside the file itself, not beside a link to it: this is the directory in which the file is replaced.
        target = os.path.realpath(self.path)
        self._lock_path = target + ".lock"
        self._holder_path = target + ".holder"
        self._warned_write = False
        self._warned_lock = False
        directory = os.path.dirname(self.path)
        if not os.path.isdir(directory):
            raise ConfigurationError(f"the directory {directory!r} does not exist; make it first", "path")
        if os.path.isdir(self.path):
            raise ConfigurationError(f"{self.path!r} is a directory; name a file in it", "path")
        self.read_only = self._is_read_only()
        if self.read_only:
            _SEED_GUARD.check(self.path)
            log.warning(
                "credentials file %s cannot be written: it is read once, and rotated tokens cannot be kept", self.path
            )
            return
        if files.is_mounted_alone(target):
            raise ConfigurationError(
                f"{self.path!r} is mounted as a single file, which cannot be replaced, so rotated tokens could not be "
                "kept; mount the directory that it is in",
                "path",
            )
        for path_ in (self.path, self._lock_path, self._holder_path):
            _GUARD.check(path_)

    def load(self) -> Optional[Stored]:
        """Return what is in the file. Return None if there is no file, or an empty one.

        :raises ConfigurationError: it cannot be read or trusted, or is not a credentials file.
        """
        try:
            with (_SEED_GUARD if self.read_only else _GUARD).open(self.path) as file:
                text = file.read().decode("utf-8")
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            problem = f"cannot read {self.path!r}: {getattr(error, 'strerror', None) or 'it is not UTF-8 text'}"
        else:
            if not text.strip():
                return None
            stored = _decode(text)
            if stored is not None:
                return stored
            problem = f"{self.path!r} is not a credentials file of this library; move it away or name another path"
        raise ConfigurationError(problem, "path")

    def save(self, stored: Stored) -> bool:
        """Replace the file's content so that it is either the old or the new one, also after a crash.

        :returns: True if it is on disk. If not, because the disk is full or read-only, one warning is logged and the
            credentials stay in memory.
        """
        if self.read_only:
            return False
        try:
            files.replace(self.path, _encode(stored).encode())
        except OSError as error:
            problem = error.strerror or type(error).__name__
        else:
            self._warned_write = False
            return True
        if not self._warned_write:
            self._warned_write = True
            log.warning(
                "cannot write the credentials file %s (%s): rotated tokens are kept in memory only, and a restart "
                "will need an install token; the next change is written again",
                self.path,
                problem,
            )
        return False

    def holder(self, proposed: str, *, before_spending: Optional[str] = None) -> str:
        """Return the holder that is kept beside the file, or ``proposed``, which is written if there is none.

        Needs :meth:`lock`.

        :param before_spending: what a login uses up next. Both files are then written in any case, as a proof.
        :raises TransportError: one of them cannot be written, and a token would be used up.
        :raises ConfigurationError: one of them is not private to this user.
        """
        found = proposed
        try:
            kept = _read_holder(self._holder_path, _GUARD)
            found = kept or proposed
            if kept is None or before_spending is not None:
                files.replace(self._holder_path, f"{found}\n".encode())
            if before_spending is not None:
                self._write_again()
            return found
        except OSError as error:
            problem = error.strerror or type(error).__name__
            is_mounted = error.errno == errno.EBUSY
        if before_spending is None:
            return found
        remedy = "free some space, or give a path that can be written"
        if is_mounted:
            remedy = "if the file is mounted, mount the directory that it is in"
        raise TransportError(
            f"cannot replace the credentials file {self.path} ({problem}): {before_spending} is not used, because the "
            f"credentials that it brings could not be stored; {remedy}"
        )

    def _write_again(self) -> None:
        """Replace the file by one with the same content, if there is a file."""
        try:
            with _GUARD.open(self.path) as file:
                content = file.read()
        except FileNotFoundError:
            return
        files.replace(self.path, content)

    @contextlib.contextmanager
    def lock(self, deadline: Deadline) -> Iterator[None]:
        """Lock the file against other processes, and against other stores of this one.

        :raises TransportError: another holds the lock until ``deadline``.
        """
        if self.read_only:
            yield
            return
        descriptor = self._take_lock(deadline)
        try:
            yield
        finally:
            if descriptor is not None:
                filelock.unlock(descriptor)
                os.close(descriptor)

    def _take_lock(self, deadline: Deadline) -> Optional[int]:
        """Return the locked descriptor. Return None, after one warning, if the file cannot be locked at all."""
        while True:
            try:
                descriptor = filelock.open_lock(self._lock_path)
            except OSError as error:
                self._warn_unlocked(error)
                return None
            is_locked = False
            try:
                is_locked = self._acquire(descriptor, deadline)
                if not is_locked:
                    return None
                if filelock.is_at(descriptor, self._lock_path):
                    return descriptor
                # Who held it has deleted it, or a cleaner has: another process may have locked a new one.
                is_locked = False
            finally:
                if not is_locked:
                    os.close(descriptor)

    def _acquire(self, descriptor: int, deadline: Deadline) -> bool:
        try:
            if filelock.lock(descriptor, deadline, _POLL):
                return True
        except OSError as error:
            self._warn_unlocked(error)
            return False
        raise TransportError(f"another process holds the lock of the credentials file ({self._lock_path})")

    def _warn_unlocked(self, error: OSError) -> None:
        if not self._warned_lock:
            self._warned_lock = True
            log.warning("cannot lock %s (%s): do not share it between processes", self._lock_path, error.strerror)

    def _is_read_only(self) -> bool:
        directory = os.path.dirname(os.path.realpath(self.path))
        if not os.path.exists(self.path):
            if not _can_write(directory):
                raise ConfigurationError(f"{directory!r} cannot be written, and {self.path!r} does not exist", "path")
            return False
        if not _can_write(self.path) or not _can_write(directory):
            return True
        # A mounted Kubernetes secret: a symlink owned by root, which the kubelet swaps; never write through it.
        return _POSIX and os.path.islink(self.path) and os.lstat(self.path).st_uid != os.geteuid()


def _read_holder(path: str, guard: files.Guard) -> Optional[str]:
    """Return the holder in the file at ``path``. Return None if there is none, or it is damaged.

    :raises ConfigurationError: the file cannot be trusted.
    """
    try:
        with guard.open(path) as file:
            text = file.read(_HOLDER_LENGTH + 2).decode("ascii").rstrip("\r\n")
    except (OSError, UnicodeDecodeError):
        return None
    return text if len(text) == _HOLDER_LENGTH and text.isalnum() else None


def _can_write(path: str) -> bool:
    return os.access(path, os.W_OK, effective_ids=os.access in os.supports_effective_ids)


def _encode(stored: Stored) -> str:
    credentials = stored.credentials
    return json.dumps(
        {
            "format": _FORMAT,
            "revision": stored.revision,
            "seeds": list(stored.seeds),
            "agent_id": stored.agent_id,
            "installation_id": credentials.installation_id,
            "workspace_id": credentials.workspace_id,
            "runtime_token": credentials.runtime_token.reveal() if credentials.runtime_token else None,
            "refresh_token": credentials.refresh_token.reveal() if credentials.refresh_token else None,
            "expires_at": format_time(credentials.expires_at) if credentials.expires_at else None,
            "ends_at": stored.ends_at,
            "lifetime": stored.lifetime,
        },
        indent=1,
    )


def _decode(text: str) -> Optional[Stored]:
    try:
        payload: Dict[str, Any] = json.loads(text)
        if payload["format"] != _FORMAT:
            return None
        return Stored(
            credentials=RuntimeCredentials(
                installation_id=payload.get("installation_id"),
                workspace_id=payload.get("workspace_id"),
                runtime_token=payload.get("runtime_token"),
                refresh_token=payload.get("refresh_token"),
                expires_at=parse_time(payload.get("expires_at")),
            ),
            revision=int(payload["revision"]),
            lifetime=_seconds(payload.get("lifetime")),
            ends_at=_seconds(payload.get("ends_at")),
            seeds=tuple(str(seed) for seed in payload.get("seeds") or ()),
            agent_id=None if payload.get("agent_id") is None else str(payload["agent_id"]),
        )
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError, ConfigurationError):
        return None


def _seconds(value: Any) -> Optional[float]:
    number = None if value is None else float(value)
    if number is not None and not math.isfinite(number):
        raise ValueError
    return number
