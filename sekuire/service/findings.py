"""Hold what a check of the configuration finds: a line with its remedy for people, an object for programs."""

from __future__ import annotations

from typing import Any, Callable, Dict, List, Optional

import attrs

from ..errors import ConfigurationError
from ..wire.protocol import one_line
from .exit_codes import FAILED, OK, USAGE

#: The states of a finding.
GOOD, WARNING, WRONG, SKIPPED = "ok", "warning", "WRONG", "skipped"


@attrs.frozen
class Finding:
    """Say what is good, odd or wrong, and how to fix it."""

    state: str
    what: str
    text: str
    fix: str

    def lines(self, label: Optional[str] = None) -> List[str]:
        """Return the finding as one or two lines without control characters.

        :param label: the state in eight columns, in a colour for example.
        """
        found = [f"{label or self.state.ljust(8)} {one_line(self.what)}: {one_line(self.text)}"]
        return [*found, f"         -> {one_line(self.fix)}"] if self.fix else found


class Findings:
    """Collect findings, and show each at once: what comes next may wait for the network."""

    def __init__(self, show: Callable[[Finding], object]) -> None:
        self._show = show
        self._found: List[Finding] = []
        #: A setting is wrong. What is wrong only at the platform does not count.
        self.is_usage = False

    def add(self, state: str, what: str, text: str, fix: str = "") -> None:
        """Note a finding. ``fix`` is what to do."""
        finding = Finding(state, what, text, fix)
        self._found.append(finding)
        self._show(finding)

    def refuse(self, what: str, problem: str, fix: str = "") -> None:
        """Note that something is wrong by the text of an error, which says after its first "; " how to fix it."""
        text, _, remedy = problem.partition("; ")
        self.add(WRONG, what, text, remedy or fix or "correct it, or remove it")

    def catching(self, what: str) -> _Catching:
        """Return a context that notes a configuration error as a finding."""
        return _Catching(self, what)

    def count(self, state: str) -> int:
        """Return how many findings have this state."""
        return sum(one.state == state for one in self._found)

    @property
    def is_wrong(self) -> bool:
        """True if anything is wrong."""
        return self.count(WRONG) > 0

    @property
    def exit_code(self) -> int:
        """0 all is well (there may be warnings), 1 the platform cannot be used, 2 a setting is wrong."""
        if self.is_usage:
            return USAGE
        return FAILED if self.is_wrong else OK

    def verdict(self) -> str:
        """Return the sum of it."""
        wrong, warnings = self.count(WRONG), self.count(WARNING)
        if wrong:
            return f"{wrong} wrong, {warnings} to look at"
        return f"nothing wrong, {warnings} to look at" if warnings else "all is well"

    def as_json(self) -> Dict[str, Any]:
        """Return all of it as a JSON object. States are in lower case there."""
        found = [
            {
                "state": one.state.lower(),
                "what": one_line(one.what),
                "text": one_line(one.text),
                "fix": one_line(one.fix) or None,
            }
            for one in self._found
        ]
        return {
            "verdict": self.verdict(),
            "exit_code": self.exit_code,
            "wrong": self.count(WRONG),
            "warnings": self.count(WARNING),
            "findings": found,
        }


class _Catching:
    def __init__(self, findings: Findings, what: str) -> None:
        self._findings = findings
        self._what = what

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: object, error: Optional[BaseException], tb: object) -> bool:
        if isinstance(error, ConfigurationError):
            self._findings.refuse(self._what, str(error))
        return isinstance(error, ConfigurationError)
