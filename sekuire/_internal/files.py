"""Check a file before it is trusted, and replace it as a whole: a crash leaves either the old or the new content."""

# Threads: any thread may call anything. `_warned` only grows, and a warning too many does no harm.

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from typing import BinaryIO, Iterator, Optional, Set, Tuple

import attrs

from ..errors import ConfigurationError
from .logs import get_logger

log = get_logger("sekuire.files")

#: Symbolic links that are followed, one after the other; Linux follows as many.
_MOST_LINKS = 40
#: Options and directories for which a warning about group permissions has been logged.
_warned: Set[Tuple[str, str]] = set()


@attrs.frozen
class Guard:
    """Refuse a file whose content this process must not trust.

    It must be a regular file of this user, or of root if ``trusts_root``, and closed to others. Permissions of a group
    of this process are accepted with one warning, because Kubernetes' ``fsGroup`` adds them at each mount. ::

        guard = Guard("path")
        with guard.open(path) as file:
            content = file.read()
    """

    #: The option that names the file, for errors.
    option: str
    #: Others may not read it either. Otherwise they may not write it.
    is_secret: bool = True
    #: The file may belong to root. On a read-only mount, which only root can make, owner and mode do not matter.
    trusts_root: bool = False
    #: A symbolic link of this user or of root is followed. Otherwise every link is refused.
    follows_links: bool = True

    def check(self, path: str) -> None:
        """Check the file at ``path``, if there is one, and the links that lead to it.

        :raises ConfigurationError: it cannot be trusted.
        """
        if self.follows_links and os.name == "posix":
            for link, owner in _links(path):
                if owner not in (0, os.geteuid()):
                    raise ConfigurationError(
                        f"{link!r} is a symbolic link of another user (uid {owner}); remove it, or name the file that "
                        "it leads to",
                        self.option,
                    )
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
        return os.fdopen(self._open(path, os.O_RDONLY), "rb")

    def make_private(self, path: str, *, create: bool = False) -> Optional[Tuple[int, int]]:
        """Check the file at ``path`` and withdraw the permissions of its group, where the file system can.

        :param create: make the file if there is none, for this user only.
        :returns: device and inode of the file. None if there is no file.
        :raises ConfigurationError: it cannot be trusted.
        :raises OSError: it cannot be opened for writing.
        """
        try:
            descriptor = self._open(path, os.O_RDWR | (os.O_CREAT if create else 0))
        except FileNotFoundError:
            if create:
                raise
            return None
        try:
            status = os.fstat(descriptor)
            if os.name == "posix" and stat.S_IMODE(status.st_mode) & 0o077:
                with contextlib.suppress(OSError):
                    os.fchmod(descriptor, 0o600)
        finally:
            os.close(descriptor)
        return status.st_dev, status.st_ino

    def _open(self, path: str, flags: int) -> int:
        # Before it is opened, because that alone can have an effect on a device.
        self.check(path)
        flags |= getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
        if not self.follows_links:
            flags |= getattr(os, "O_NOFOLLOW", 0)
        descriptor = os.open(path, flags, 0o600)
        try:
            # Again, because another file may have taken its place.
            self._check(path, os.fstat(descriptor))
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _check(self, path: str, status: os.stat_result) -> None:
        problem = self._find_problem(path, status)
        if problem is not None:
            raise ConfigurationError(problem, self.option)

    def _find_problem(self, path: str, status: os.stat_result) -> Optional[str]:
        if stat.S_ISLNK(status.st_mode):
            return f"{path!r} is a symbolic link; name the file that it leads to"
        if not stat.S_ISREG(status.st_mode):
            return f"{path!r} is not a regular file; name another path"
        if os.name != "posix" or (self.trusts_root and _is_mounted_read_only(path)):
            return None
        if status.st_uid != os.geteuid() and not (self.trusts_root and status.st_uid == 0):
            return (
                f"{path!r} belongs to another user (uid {status.st_uid}); remove it, or if you trust what is in it, "
                "chown it to the one that runs this"
            )
        mode = stat.S_IMODE(status.st_mode)
        of_group, of_others = (0o070, 0o007) if self.is_secret else (0o020, 0o002)
        if mode & of_others or (mode & of_group and status.st_gid not in (os.getegid(), *os.getgroups())):
            return f"{path!r} can be {'read' if self.is_secret else 'written'} by others; run: chmod 600 {path}"
        if mode & of_group:
            self._warn_of_group(path, status.st_gid)
        return None

    def _warn_of_group(self, path: str, group: int) -> None:
        place = self.option, os.path.dirname(path)
        if place not in _warned:
            _warned.add(place)
            log.warning(
                "%s can be %s by the group %d, as in a Kubernetes volume with fsGroup; it is used, because this "
                "process is in that group: make sure that nobody else is, or run: chmod 600 %s",
                path, "read" if self.is_secret else "written", group, path,
            )  # fmt: skip


def _links(path: str) -> Iterator[Tuple[str, int]]:
    """Yield each symbolic link on the way from ``path`` to its file, with its owner."""
    for _ in range(_MOST_LINKS):
        try:
            status = os.lstat(path)
            if not stat.S_ISLNK(status.st_mode):
                return
            target = os.readlink(path)
        except OSError:
            return
        yield path, status.st_uid
        path = os.path.join(os.path.dirname(path), target)


def _is_mounted_read_only(path: str) -> bool:
    try:
        return bool(os.statvfs(path).f_flag & os.ST_RDONLY)
    except OSError:
        return False


def is_mounted_alone(path: str) -> bool:
    """Return True if the file at ``path`` is a mount of its own, as ``docker run -v FILE:FILE`` makes it.

    Such a file cannot be replaced, and a file beside it is not in the same mount.
    """
    target = os.path.realpath(path)
    try:
        with open("/proc/self/mountinfo", "rb") as file:
            places = [line.split(b" ")[4] for line in file]
    except (OSError, IndexError):
        return os.path.ismount(target)
    # The kernel writes a character that would split the line as its octal code.
    name = os.fsencode(target).replace(b"\\", b"\\134")
    for character in b" \t\n":
        name = name.replace(bytes([character]), b"\\%03o" % character)
    return name in places


def replace(path: str, data: bytes) -> None:
    """Replace the content of the file at ``path``, or of the file that a link there names. Only its owner can read it.

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
