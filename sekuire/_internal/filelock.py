"""Lock a file against other processes that lock it too, on POSIX and Windows."""

from __future__ import annotations

import errno
import os
import time

from .threads import Deadline

_HELD_ELSEWHERE = (errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK, errno.EDEADLK)

if os.name == "posix":
    import fcntl

    def try_lock(descriptor: int) -> bool:
        """Lock an open file. Return False if another holder has it, in this process too.

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
        """Unlock a file that :func:`try_lock` has locked."""
        fcntl.flock(descriptor, fcntl.LOCK_UN)

else:  # pragma: no cover  # Windows
    import msvcrt

    def try_lock(descriptor: int) -> bool:
        """Lock an open file. Return False if another holder has it, in this process too."""
        try:
            os.lseek(descriptor, 0, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
        except OSError as error:
            if error.errno in _HELD_ELSEWHERE:
                return False
            raise
        return True

    def unlock(descriptor: int) -> None:
        """Unlock a file that :func:`try_lock` has locked."""
        os.lseek(descriptor, 0, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_UNLCK, 1)  # type: ignore[attr-defined,unused-ignore]


def open_lock(path: str) -> int:
    """Open the lock file at ``path``. Create it if there is none, for this user only.

    :raises OSError: it cannot be opened.
    """
    return os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o600)


def lock(descriptor: int, deadline: Deadline, poll: float) -> bool:
    """Lock an open file, with a try every ``poll`` seconds. Return False if another holder has it until ``deadline``.

    :raises OSError: the file system offers no locks.
    """
    while not try_lock(descriptor):
        if deadline.is_expired():
            return False
        time.sleep(min(poll, deadline.remaining()))
    return True
