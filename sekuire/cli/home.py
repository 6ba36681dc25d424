"""Keep the state of ``sekuire dev`` in a private directory or file, which one process uses at a time."""

# Threads: main thread only.

from __future__ import annotations

import contextlib
import json
import os
import stat
from types import TracebackType
from typing import Mapping, Optional, Type

from .. import envfile
from .._internal import filelock, files
from ..errors import ConfigurationError
from .exits import CommandError

__all__ = ["DIRECTORY", "Home", "make_directory", "write_env_file"]

DIRECTORY = ".sekuire"
_DATABASE = "dev.db"
_ELSEWHERE = "give --db PATH, or --ephemeral to keep nothing"
_POSIX = os.name == "posix"
#: A lock file is opened again if another process has deleted it in between.
_TRIES = 3
_LONGEST_NOTE = 4096


class Home:
    """Hold the database's file, locked, from entering it to leaving it.

    :param path: the file. None: one in the directory ``.sekuire``, which is made.
    :raises CommandError: it cannot be trusted or used, or another process uses it.
    """

    def __init__(self, path: Optional[str]) -> None:
        self.path = os.path.join(DIRECTORY, _DATABASE) if path is None else path
        self._is_ours = path is None
        self._lock_path = f"{self.path}.lock"
        self._lock: Optional[int] = None

    def __enter__(self) -> Home:
        if self._is_ours:
            make_directory(DIRECTORY, _ELSEWHERE)
            guard = files.Guard("--db", is_secret=False, follows_links=False)
            for name in (self.path, f"{self.path}-wal", self._lock_path):
                try:
                    guard.check(name)
                except ConfigurationError as error:
                    problem = error.problem
                else:
                    continue
                raise CommandError(f"{problem}; or {_ELSEWHERE}")
        if os.path.isdir(os.path.dirname(os.path.abspath(self.path))) and not os.path.isdir(self.path):
            # Else opening the database says what is wrong.
            self._lock = self._take_lock()
        return self

    def __exit__(
        self,
        kind: Optional[Type[BaseException]],
        error: Optional[BaseException],
        traceback: Optional[TracebackType],
    ) -> None:
        if self._lock is not None:
            with contextlib.suppress(OSError):
                os.ftruncate(self._lock, 0)
            os.close(self._lock)
            self._lock = None

    def publish(self, url: str) -> None:
        """Write who holds the lock into its file, for another process to read."""
        if self._lock is not None:
            with contextlib.suppress(OSError):
                os.ftruncate(self._lock, 0)
                os.lseek(self._lock, 0, os.SEEK_SET)
                # Windows locks the first byte against reading.
                os.write(self._lock, b" " + json.dumps({"pid": os.getpid(), "url": url}).encode())

    def _take_lock(self) -> Optional[int]:
        """Return the locked file. Return None where there are no locks: SQLite's own remains.

        :raises CommandError: another process holds it.
        """
        problem = ""
        for _ in range(_TRIES):
            try:
                descriptor = filelock.open_lock(self._lock_path)
            except OSError as error:
                problem = f"cannot open {self._lock_path} ({error.strerror}); {_ELSEWHERE}"
                break
            is_kept = False
            try:
                if not filelock.try_lock(descriptor):
                    problem = (
                        f"another sekuire dev uses {self.path}{_holder(self._lock_path)}; stop it, or {_ELSEWHERE}"
                    )
                    break
                is_kept = filelock.is_at(descriptor, self._lock_path)
                if is_kept:
                    return descriptor
            except OSError:
                return None
            finally:
                if not is_kept:
                    os.close(descriptor)
        raise CommandError(problem or f"cannot lock {self._lock_path}: it is deleted again and again; {_ELSEWHERE}")


def _holder(lock_path: str) -> str:
    """Return who holds the lock, in words, or nothing."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        with open(lock_path, "rb") as file:
            file.seek(1)
            note = json.loads(file.read(_LONGEST_NOTE))
        return f" (process {int(note['pid'])}, {str(note['url'])[:200]})"
    return ""


def make_directory(path: str, advice: str) -> None:
    """Make a directory for this user only, which version control ignores, or check the one that is there.

    :param advice: what to do instead, for the error.
    :raises CommandError: it cannot be made or trusted.
    """
    problem = ""
    try:
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o700)
        problem = _directory_problem(path)
        if not problem:
            with contextlib.suppress(FileExistsError):
                ignore = os.open(os.path.join(path, ".gitignore"), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
                with os.fdopen(ignore, "w", encoding="ascii") as file:
                    file.write("*\n")
    except OSError as error:
        problem = f"cannot be used: {error.strerror}"
    if problem:
        raise CommandError(f"the directory {path!r} {problem}; {advice}")


def _directory_problem(path: str) -> str:
    status = os.lstat(path)
    if stat.S_ISLNK(status.st_mode):
        return "is a symbolic link; remove it"
    if not stat.S_ISDIR(status.st_mode):
        return "is not a directory; move the file away"
    if not _POSIX:
        return ""
    # The directory itself from here on: another could take the place of the one at the path.
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if status.st_uid != os.geteuid():
            return f"belongs to another user (uid {status.st_uid})"
        if stat.S_IMODE(status.st_mode) & 0o077:
            os.fchmod(descriptor, 0o700)
    finally:
        os.close(descriptor)
    return ""


def write_env_file(path: str, variables: Mapping[str, str]) -> str:
    """Write the variables into a file of this user only if there is none, and say in a line what became of it.

    A file that is there is never changed.
    """
    text = "# Written by sekuire dev. The sekuire commands read it; keep it out of version control.\n"
    text += "".join(f"{envfile.format_line(name, value)}\n" for name, value in variables.items())
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0)
    try:
        descriptor = os.open(path, flags, 0o600)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8", newline="\n") as file:
                file.write(text)
        except BaseException:
            os.unlink(path)
            raise
    except FileExistsError:
        return _compare(path, variables)
    except OSError as error:
        return f"cannot write {path}: {error.strerror}"
    return f"wrote {path} with these variables; sekuire commands in this directory read it"


def _compare(path: str, variables: Mapping[str, str]) -> str:
    """Say whether a file that is there holds the variables of this platform."""
    if not os.path.isfile(path):
        return f"{path} is not a file, so the variables are not in it"
    try:
        with open(path, encoding="utf-8-sig") as file:
            found = envfile.parse(file.read(1024 * 1024), path)
    except (OSError, UnicodeDecodeError):
        return f"{path} cannot be read, and stays as it is"
    except ConfigurationError as error:
        return f"{error.problem}; the file stays as it is"
    differing = [name for name, value in variables.items() if found.get(name) != value]
    if not differing:
        return f"{path} holds these variables"
    if not found:
        return f"{path} is there without these variables, and stays as it is; paste them into it or into the shell"
    return f"{path} differs in {', '.join(differing)}, and stays as it is; remove it to have it written again"
