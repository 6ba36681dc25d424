"""Keep policies on disk: the last good one of each workspace, as it came, and the highest version ever seen."""

from __future__ import annotations

import contextlib
import json
import os
from typing import Any, Dict, Iterator, Optional, Tuple, Union

from .._internal import filelock, files
from .._internal.checks import is_whole
from .._internal.logs import get_logger
from .._internal.threads import Deadline
from ..errors import ConfigurationError

log = get_logger("sekuire.policy")

_FORMAT = 1
#: Seconds that a writer waits for another one, and seconds between two looks.
_LOCK_TIMEOUT, _POLL = 1.0, 0.01
# A policy is no secret, but whoever can write the file could bring an older one back.
_GUARD = files.Guard("path", is_secret=False, trusts_root=True)


class PolicyCache:
    """Keep policies in one file. Nothing in it is trusted: whoever reads a policy from it verifies it again.

    A policy is not secret. But whoever can write the file can bring an older one back, or without a pinned key one of
    their own. A file that belongs to another user, or that others may write, is refused.

    :raises ConfigurationError: the path cannot be used; the text says why and what to do.
    """

    # Threads: any thread may call anything. A lock on `PATH.lock` orders writers, those of other processes too, and the
    # file is replaced as a whole.

    def __init__(self, path: Union[str, os.PathLike[str]]) -> None:
        self.path = os.path.abspath(os.fspath(path))
        self._warned = False
        directory = os.path.dirname(self.path)
        if not os.path.isdir(directory):
            raise ConfigurationError(f"the directory {directory!r} does not exist; make it first", "path")
        if os.path.isdir(self.path):
            raise ConfigurationError(f"{self.path!r} is a directory; name a file in it", "path")
        _GUARD.check(self.path)

    def load(self, workspace_id: str) -> Tuple[int, Optional[bytes]]:
        """Return the highest version seen (-1: none) and the last good policy's body, which is not verified yet."""
        return _entry(self._read().get(workspace_id))

    def highest_version(self) -> int:
        """Return the highest version seen of any workspace (-1: none)."""
        return max((_entry(entry)[0] for entry in self._read().values()), default=-1)

    def save(self, workspace_id: str, version: int, body: bytes) -> None:
        """Keep a policy, unless another process has kept a newer one."""
        with self._writing():
            entries = self._read()
            if _entry(entries.get(workspace_id))[0] <= version:
                entries[workspace_id] = {"version": version, "policy": body.decode("utf-8", "replace")}
                self._write(entries)

    def forget(self, workspace_id: str) -> None:
        """Remove the policy of a workspace that has none any more."""
        with self._writing():
            entries = self._read()
            if entries.pop(workspace_id, None) is not None:
                self._write(entries)

    # -- inside --

    def _read(self) -> Dict[str, Any]:
        problem = ""
        payload: Any = None
        try:
            with _GUARD.open(self.path) as file:
                payload = json.loads(file.read().decode("utf-8"))
        except FileNotFoundError:
            return {}
        except ConfigurationError as error:
            problem = error.problem
        except (OSError, ValueError, RecursionError) as error:
            problem = getattr(error, "strerror", None) or "it is not JSON"
        if isinstance(payload, dict) and payload.get("format") == _FORMAT and isinstance(payload.get("policies"), dict):
            return dict(payload["policies"])
        log.error("the policy cache %s is not used: %s", self.path, problem or "it is not a file of this library")
        return {}

    def _write(self, entries: Dict[str, Any]) -> None:
        try:
            files.replace(self.path, json.dumps({"format": _FORMAT, "policies": entries}, indent=1).encode())
        except OSError as error:
            problem = error.strerror or type(error).__name__
        else:
            self._warned = False
            return
        if not self._warned:
            self._warned = True
            log.warning(
                "cannot write the policy cache %s (%s): a restart during an outage will find no policy, or an old one",
                self.path, problem,
            )  # fmt: skip

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        descriptor = self._lock()
        try:
            yield
        finally:
            if descriptor is not None:
                filelock.unlock(descriptor)
                os.close(descriptor)

    def _lock(self) -> Optional[int]:
        """Return the locked descriptor, or None if there is no lock. Without one the policy is written all the same."""
        deadline = Deadline(_LOCK_TIMEOUT)
        try:
            descriptor = filelock.open_lock(self.path + ".lock")
        except OSError:
            return None
        try:
            if filelock.lock(descriptor, deadline, _POLL):
                return descriptor
        except OSError:
            pass
        os.close(descriptor)
        return None


def _entry(entry: Any) -> Tuple[int, Optional[bytes]]:
    if not isinstance(entry, dict):
        return -1, None
    version, text = entry.get("version"), entry.get("policy")
    known = version if is_whole(version) and version >= 0 else -1
    return known, text.encode("utf-8", "replace") if isinstance(text, str) else None
