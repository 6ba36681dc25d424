"""Lock a file against other processes that lock it too, on POSIX and Windows."""

from __future__ import annotations

import errno
import os
import stat
from typing import Optional

from .clock import time
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

    :raises OSError: it cannot be opened, or is not a regular file of this user or of root.
    """
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0)
    problem: Optional[str] = None
    try:
        # A FIFO in its place must not block this, and a link must not choose which file is made.
        descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0), 0o600)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        problem = "it is a symbolic link"
    else:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            problem = "it is not a regular file"
        elif os.name == "posix" and status.st_uid not in (0, os.geteuid()):
            problem = "it belongs to another user"
        if problem is not None:
            os.close(descriptor)
    if problem is not None:
        raise OSError(errno.EPERM, problem, path)
    return descriptor


def is_at(descriptor: int, path: str) -> bool:
    """Return True if the open file is the one at ``path``. A lock on one that was deleted excludes nobody."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except OSError:
        return False


def lock(descriptor: int, deadline: Deadline, poll: float) -> bool:
    """Lock an open file, with a try every ``poll`` seconds. Return False if another holder has it until ``deadline``.

    :raises OSError: the file system offers no locks.
    """
    while not try_lock(descriptor):
        if deadline.is_expired():
            return False
        time.sleep(min(poll, deadline.remaining()))
    return True
