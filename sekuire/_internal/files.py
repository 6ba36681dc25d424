"""Trust a file only after a look at it, and replace it whole: after a crash there is the old one or the new one."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from typing import BinaryIO, Optional

import attrs

from ..errors import ConfigurationError


@attrs.frozen
class Guard:
    """Say what a file must be before this process believes what is in it.

    It must be a regular file of this user, or of root if ``trusts_root``, and closed to others. ::

        guard = Guard("path")
        with guard.open(path) as file:
            content = file.read()
    """

    #: The option that names the file, for errors.
    option: str
    #: Others may not read it either. Otherwise they may not write it.
    is_secret: bool = True
    trusts_root: bool = False
    #: A symbolic link is followed. Otherwise it is refused.
    follows_links: bool = True

    def check(self, path: str) -> None:
        """Check the file at ``path``, if there is one.

        :raises ConfigurationError: it cannot be trusted.
        """
        try:
            status = os.stat(path, follow_symlinks=self.follows_links)
        except OSError:
            return
        self._check(path, status)

    def open(self, path: str) -> BinaryIO:
        """Open the file at ``path`` for reading. A FIFO in its place does not block this.

        :raises ConfigurationError: it cannot be trusted.
        :raises OSError: it cannot be opened.
        """
        # Before it is opened, because that alone can have an effect on a device.
        self.check(path)
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
        if not self.follows_links:
            flags |= getattr(os, "O_NOFOLLOW", 0)
        file = os.fdopen(os.open(path, flags), "rb")
        try:
            # Again, because another file may have taken its place.
            self._check(path, os.fstat(file.fileno()))
        except BaseException:
            file.close()
            raise
        return file

    def _check(self, path: str, status: os.stat_result) -> None:
        problem = self._find_problem(path, status)
        if problem is not None:
            raise ConfigurationError(problem, self.option)

    def _find_problem(self, path: str, status: os.stat_result) -> Optional[str]:
        if stat.S_ISLNK(status.st_mode):
            return f"{path!r} is a symbolic link; name the file that it leads to"
        if not stat.S_ISREG(status.st_mode):
            return f"{path!r} is not a regular file; name another path"
        if os.name != "posix":
            return None
        if status.st_uid != os.geteuid() and not (self.trusts_root and status.st_uid == 0):
            return f"{path!r} belongs to another user; chown it to the one that runs this"
        mode = stat.S_IMODE(status.st_mode)
        if mode & (0o077 if self.is_secret else 0o022):
            return f"{path!r} can be {'read' if self.is_secret else 'written'} by others; run: chmod 600 {path}"
        return None


def replace(path: str, data: bytes) -> None:
    """Replace the content of the file at ``path``, or of where a link there leads. Only its owner can read it.

    :raises OSError: it cannot be written. What was there stays.
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
        """Do nothing. Windows cannot sync a directory."""
