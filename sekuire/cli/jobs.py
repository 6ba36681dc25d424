"""Remember when a job of many tasks began, so that it can be continued without a task too many."""

# Threads: main thread only, but for `key`, which reads what no longer changes.

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import json
import os
from typing import Any, Dict, Optional

from .._internal import files
from ..errors import ConfigurationError
from ..wire.protocol import format_time, parse_time
from .describe import duration
from .exits import CommandError
from .home import DIRECTORY, make_directory

__all__ = ["Job"]

#: Seconds for which the platform knows the key of a submission, less some for the time that continuing takes.
_MARGIN = 600
_KEY_LIFETIME = 24 * 3600 - _MARGIN
_LONGEST_NAME, _LONGEST_STATE = 200, 65536
_ELSEWHERE = "give --job-dir DIR"


class Job:
    """Hold a job's name and when it began, in a private file of ``.sekuire/jobs`` or of another directory.

    The platform knows a submission's key for 24 hours. Until then a line that is sent again gets the same task.

    :param name: what the user calls it.
    :param facts: what must be the same when it is continued: ``url``, ``agent_id``, ``capability``.
    """

    def __init__(self, name: str, facts: Dict[str, str], directory: Optional[str]) -> None:
        if not name.strip() or len(name) > _LONGEST_NAME or not name.isprintable():
            raise CommandError(f"--job: must be 1 to {_LONGEST_NAME} printable characters, got {name!r:.100}")
        self.name = name
        self._facts = facts
        self._directory = os.path.join(DIRECTORY, "jobs") if directory is None else directory
        self._is_ours = directory is None
        # Another platform knows nothing of this one's keys.
        place = hashlib.sha256(f"{facts['url']}\0{name}".encode("utf-8", "surrogatepass")).hexdigest()[:32]
        self.path = os.path.join(self._directory, f"{place}.json")
        self._run = 1
        self._began_at = dt.datetime.now(dt.timezone.utc)

    def begin(self, *, again: bool) -> str:
        """Begin the job, or continue it. Return a sentence about it if it was begun before.

        :param again: begin it once more: every line makes a new task.
        :raises CommandError: it cannot be continued, or its file cannot be used.
        """
        if self._is_ours:
            make_directory(DIRECTORY, _ELSEWHERE)
        if self._is_ours or not os.path.isdir(self._directory):
            make_directory(self._directory, _ELSEWHERE)
        found = self._read()
        if found is None:
            self._write()
            return ""
        before: dt.datetime = found["began_at"]
        age = (self._began_at - before).total_seconds()
        if again:
            self._run = found["run"] + 1
            self._write()
            return f"job {self.name!r} begins once more: every line makes a new task"
        self._check_facts(found)
        if age > _KEY_LIFETIME:
            raise CommandError(
                f"job {self.name!r} began {duration(age)} ago, and the platform knows a line for 24 hours only: lines "
                "that were sent would make a second task; give --again to send every line again, or --job NAME for "
                "another job"
            )
        if age < -_MARGIN:
            raise CommandError(
                f"job {self.name!r} began at {format_time(before)}, which is still to come: the clock was changed, and "
                "whether the platform still knows its lines cannot be said; set the clock, or give --again to send "
                "every line again, or --job NAME for another job"
            )
        self._run, self._began_at = found["run"], before
        return (
            f"job {self.name!r} began {duration(max(age, 0.0))} ago and goes on: a line that was sent keeps its task "
            "(--again makes new ones)"
        )

    def key(self, *parts: bytes) -> str:
        """Return the idempotency key of a line: SHA-256 of the job and of what identifies the line in it."""
        name = self.name if self._run == 1 else f"{self.name}\0run {self._run}"
        return hashlib.sha256(b"\0".join((name.encode("utf-8", "surrogatepass"), *parts))).hexdigest()

    # -- its file --

    def _check_facts(self, found: Dict[str, Any]) -> None:
        for name, label in (("capability", "the capability"), ("agent_id", "the agent")):
            if found.get(name) != self._facts[name]:
                raise CommandError(
                    f"job {self.name!r} was begun for {label} {found.get(name)!r}, not {self._facts[name]!r}; give "
                    "--job NAME for another job"
                )

    def _read(self) -> Optional[Dict[str, Any]]:
        """Return what the file holds, None if there is none."""
        problem = ""
        try:
            with files.Guard("--job-dir", follows_links=False).open(self.path) as file:
                found = json.loads(file.read(_LONGEST_STATE))
            began_at = parse_time(found["began_at"])
            if began_at is not None and isinstance(found["run"], int):
                return {**found, "began_at": began_at}
            problem = "it is damaged"
        except FileNotFoundError:
            return None
        except ConfigurationError as error:
            raise CommandError(error.problem) from None
        except OSError as error:
            problem = error.strerror or type(error).__name__
        except (ValueError, KeyError, TypeError):
            problem = "it is damaged"
        raise CommandError(
            f"cannot read when job {self.name!r} began from {self.path}: {problem}; remove the file if its lines may "
            "make new tasks, or give --job NAME for another job"
        )

    def _write(self) -> None:
        state = {"job": self.name, **self._facts, "run": self._run, "began_at": format_time(self._began_at)}
        problem = ""
        try:
            files.replace(self.path, json.dumps(state, indent=1).encode())
        except OSError as error:
            problem = error.strerror or type(error).__name__
        if problem:
            raise CommandError(f"cannot write when the job began to {self.path}: {problem}; {_ELSEWHERE}")

    def forget(self) -> None:
        """Remove the file of a job that nobody can continue, because it is complete and its name is of chance."""
        with contextlib.suppress(OSError):
            os.unlink(self.path)
