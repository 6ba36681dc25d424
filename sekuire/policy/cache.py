"""Keep policies on disk: the last good one of each workspace, and what an older one is recognised by."""

from __future__ import annotations

import contextlib
import json
import os
from typing import Any, Dict, Iterator, List, Optional, Tuple, Union

import attrs

from .._internal import filelock, files
from .._internal.checks import is_number, is_whole
from .._internal.clock import time
from .._internal.logs import get_logger
from .._internal.threads import Deadline
from ..errors import ConfigurationError

log = get_logger("sekuire.policy")

_FORMAT = 1
#: Seconds that a writer waits for another one, and seconds between two looks.
_LOCK_TIMEOUT, _POLL = 1.0, 0.01
# A policy is not secret, but whoever can write the file could bring an older one back.
_GUARD = files.Guard("path", is_secret=False, trusts_root=True)
#: How many replaced hashes of a workspace are remembered.
MOST_REPLACED = 100


@attrs.frozen(slots=True)
class Stored:
    """Hold what the file has of one workspace.

    ``version`` is the highest version ever seen (-1: none). ``body`` is the last good policy, not verified yet, and
    ``hash`` its hash. Where versions are not proved, ``replaced`` are the hashes of the policies before it, the newest
    last, and ``asked_at`` is the time (``time.time()``) of the question that it answered.
    """

    version: int = -1
    body: Optional[bytes] = None
    hash: str = ""
    replaced: Tuple[str, ...] = ()
    asked_at: float = 0.0

    @property
    def is_there(self) -> bool:
        """Return True if a policy was ever seen."""
        return self.version >= 0 or bool(self.hash or self.replaced)


def with_replaced(replaced: Tuple[str, ...], *hashes: str) -> Tuple[str, ...]:
    """Return ``replaced`` with ``hashes`` as the newest, without the oldest beyond :data:`MOST_REPLACED`."""
    kept = [one for one in replaced if one not in hashes]
    return (*kept, *dict.fromkeys(one for one in hashes if one))[-MOST_REPLACED:]


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

    def load(self, workspace_id: str) -> Stored:
        """Return what the file has of a workspace."""
        return _stored(self._read().get(workspace_id))

    def has_any(self) -> bool:
        """Return True if a policy of any workspace was ever seen."""
        return any(_stored(entry).is_there for entry in self._read().values())

    def save(self, workspace_id: str, version: int, body: bytes, digest: str) -> None:
        """Keep a policy, unless another process has kept a newer one."""
        with self._writing():
            entries = self._read()
            known = _stored(entries.get(workspace_id))
            if known.version <= version:
                entries[workspace_id] = _entry(attrs.evolve(known, version=version, body=body, hash=digest))
                self._write(entries)

    def save_replacing(
        self, workspace_id: str, body: bytes, digest: str, replaced: Tuple[str, ...], asked_at: float
    ) -> Optional[Tuple[str, ...]]:
        """Keep a policy whose version is not proved, and remember what it replaces.

        :param replaced: hashes that this process knows to be replaced, and has not kept yet.
        :param asked_at: ``time.time()`` of the question. The answer to a later one, of another process, stays.
        :returns: all hashes that are replaced, or None if the file cannot be written.
        """
        with self._writing():
            entries = self._read()
            known = _stored(entries.get(workspace_id))
            is_late = asked_at < known.asked_at <= time.time() or digest in known.replaced
            found = with_replaced(known.replaced, *replaced)
            if is_late:
                found = tuple(one for one in found if one != known.hash)
                new = attrs.evolve(known, replaced=found)
            else:
                found = tuple(one for one in with_replaced(found, known.hash) if one != digest)
                new = attrs.evolve(known, body=body, hash=digest, replaced=found, asked_at=asked_at)
            entries[workspace_id] = _entry(new)
            return found if self._write(entries) else None

    def accept(self, digest: str, workspace_id: Optional[str] = None) -> List[str]:
        """Let a policy return that was replaced. Return the workspaces in which it was.

        :param workspace_id: only in this one.
        :raises ConfigurationError: the file cannot be written.
        """
        with self._writing():
            entries = self._read()
            found = []
            for name in entries if workspace_id is None else [workspace_id]:
                known = _stored(entries.get(name))
                if digest in known.replaced:
                    found.append(name)
                    kept = tuple(one for one in known.replaced if one != digest)
                    entries[name] = _entry(attrs.evolve(known, replaced=kept))
            if found and not self._write(entries):
                raise ConfigurationError(f"{self.path!r} cannot be written", "path")
            return found

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

    def _write(self, entries: Dict[str, Any]) -> bool:
        """Replace the file. Return True if it was written; else log a warning, once."""
        try:
            files.replace(self.path, json.dumps({"format": _FORMAT, "policies": entries}, indent=1).encode())
        except OSError as error:
            problem = error.strerror or type(error).__name__
        else:
            self._warned = False
            return True
        if not self._warned:
            self._warned = True
            log.warning(
                "cannot write the policy cache %s (%s): a restart during an outage will find no policy, or an old one",
                self.path, problem,
            )  # fmt: skip
        return False

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


def _stored(entry: Any) -> Stored:
    """Return an entry of the file. What has another type counts as not there."""
    if not isinstance(entry, dict):
        return Stored()
    version, text, digest = entry.get("version"), entry.get("policy"), entry.get("hash")
    replaced, asked_at = entry.get("replaced"), entry.get("asked_at")
    return Stored(
        version=version if is_whole(version) and version >= 0 else -1,
        body=text.encode("utf-8", "replace") if isinstance(text, str) else None,
        hash=digest if isinstance(digest, str) else "",
        replaced=tuple(one for one in replaced if isinstance(one, str)) if isinstance(replaced, list) else (),
        asked_at=float(asked_at) if is_number(asked_at) else 0.0,
    )


def _entry(stored: Stored) -> Dict[str, Any]:
    """Return what the file holds of one workspace."""
    body = stored.body
    entry: Dict[str, Any] = {
        "version": stored.version,
        "hash": stored.hash,
        "policy": None if body is None else body.decode("utf-8", "replace"),
        "replaced": list(stored.replaced),
        "asked_at": stored.asked_at,
    }
    return {name: value for name, value in entry.items() if value not in (None, "", [])}
