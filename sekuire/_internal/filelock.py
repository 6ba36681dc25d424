"""An advisory lock on a file, the same on POSIX and Windows, taken without waiting."""

from __future__ import annotations

import errno
import os

_HELD_ELSEWHERE = (errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK, errno.EDEADLK)

if os.name == "posix":
    import fcntl

    def try_lock(descriptor: int) -> bool:
        """Lock an open file; False where another holder (in this process too) has it.

        :raises OSError: the file system offers no locks.
        """
        # flock, not lockf: the latter does not exclude two users within one process.
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _HELD_ELSEWHERE:
                return False
            raise
        return True

    def unlock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_UN)

else:  # pragma: no cover  # Windows
    import msvcrt

    def try_lock(descriptor: int) -> bool:
        """Lock an open file; False where another holder (in this process too) has it."""
        try:
            os.lseek(descriptor, 0, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
        except OSError as error:
            if error.errno in _HELD_ELSEWHERE:
                return False
            raise
        return True

    def unlock(descriptor: int) -> None:
        os.lseek(descriptor, 0, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_UNLCK, 1)  # type: ignore[attr-defined,unused-ignore]


def open_lock(path: str) -> int:
    """A descriptor of the lock file at ``path``, made where there is none; nobody else may read it.

    :raises OSError: it cannot be opened.
    """
    return os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o600)
