"""Private files that are replaced whole: after a crash there is the old one or the new one, never a part."""

from __future__ import annotations

import contextlib
import os
import tempfile


def replace(path: str, data: bytes) -> None:
    """Make ``data`` the content of the file at ``path`` (or where a link there leads), readable by its owner only.

    :raises OSError: it cannot be written; what was there stays.
    """
    target = os.path.realpath(path)
    directory = os.path.dirname(target)
    # mkstemp makes it 0600 whatever the umask, so that nobody else can read it, not for a moment.
    descriptor, temporary = tempfile.mkstemp(prefix=".sekuire-", suffix=".tmp", dir=directory)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    _sync_directory(directory)


if os.name == "posix":

    def _sync_directory(directory: str) -> None:
        # Some file systems refuse to open or sync a directory; the replace itself has happened.
        with contextlib.suppress(OSError):
            descriptor = os.open(directory, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

else:  # pragma: no cover  # Windows

    def _sync_directory(directory: str) -> None:
        """Windows has no such thing; the replace is as durable as it gets."""
