"""The console handler for approvals, on a real pseudo-terminal."""

from __future__ import annotations

import io
import os
import sys
import threading
import time
import types
from typing import Any, Iterator, List

import pytest

from sekuire.approvals import ApprovalRequest, ask_on_terminal

from .support.waiting import GUARD, until

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")


class Person:
    """Sees what the terminal shows, and types."""

    def __init__(self, master: int) -> None:
        self._master = master
        self.seen = ""
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self._master, 4096)
            except OSError:
                return
            if not data:
                return
            self.seen += data.decode()

    def leave(self) -> None:
        self._thread.join(GUARD)

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def see(self, text: str, times: int = 1) -> None:
        until(lambda: self.seen.count(text) >= times)


@pytest.fixture
def person(monkeypatch: pytest.MonkeyPatch) -> Iterator[Person]:
    import pty

    master, slave = pty.openpty()
    with os.fdopen(slave, "r") as stdin, os.fdopen(os.dup(slave), "w") as stderr:
        # Not in `sys` itself: pytest puts its own streams there between setup and test.
        monkeypatch.setattr("sekuire.approvals.sys", types.SimpleNamespace(stdin=stdin, stderr=stderr))
        person = Person(master)
        yield person
    # It sees the end now. Only then: the next terminal may get the same number.
    person.leave()
    os.close(master)


def request_of(**fields: Any) -> ApprovalRequest:
    return ApprovalRequest(**{"approval_id": "a", "task_id": "t-1", "kind": "action", "name": "pay", **fields})


def ask(request: ApprovalRequest, answers: List[bool]) -> threading.Thread:
    thread = threading.Thread(target=lambda: answers.append(ask_on_terminal(request)))
    thread.start()
    return thread


@pytest.mark.parametrize(
    ("typed", "approves"),
    [("yes\n", True), (" Y \n", True), ("\n", False), ("no\n", False), ("yes please\n", False), ("\x04", False)],
)
def test_what_is_typed(person: Person, typed: str, approves: bool) -> None:
    """Only yes approves; an empty line and the end of the input deny."""
    answers: List[bool] = []
    thread = ask(request_of(details={"amount": 500}), answers)
    person.see("approve? [y/N] ")
    person.type(typed)
    thread.join(GUARD)
    assert answers == [approves]
    assert "task t-1 asks for approval of action pay" in person.seen
    assert '"amount": 500' in person.seen


def test_nothing_moves_the_cursor(person: Person) -> None:
    """What a requester has chosen is shown escaped: control characters, and text that runs from the right."""
    answers: List[bool] = []
    details = {"to\x1b[2J": "a\rb\x07", "rtl": "\u202e500", "long": "x" * 5000, **{f"k{n}": n for n in range(60)}}
    thread = ask(request_of(name="pay\x1b[1A\nall", task_id="t\u202e", details=details), answers)
    person.see("approve? [y/N] ")
    person.type("\n")
    thread.join(GUARD)
    shown = person.seen.replace("\r\n", "\n")
    assert all(one.isprintable() or one == "\n" for one in shown)
    assert "pay\\x1b[1A\\nall" in shown
    assert "\\u202e500" in shown
    assert "more characters" in shown
    assert "more lines" in shown


def test_one_question_at_a_time(person: Person) -> None:
    """The second is asked once the first is answered."""
    answers: List[bool] = []
    threads = [ask(request_of(task_id=f"t-{n}"), answers) for n in range(2)]
    person.see("approve? ")
    time.sleep(0.1)
    assert person.seen.count("approve? ") == 1
    person.type("y\n")
    person.see("approve? ", 2)
    person.type("n\n")
    for thread in threads:
        thread.join(GUARD)
    assert answers == [True, False]


def test_an_answer_that_comes_too_late(person: Person) -> None:
    """It approves nothing; a request that expires before its turn is not shown."""
    answers: List[bool] = []
    thread = ask(request_of(timeout=0.05), answers)
    person.see("approve? ")
    late = ask(request_of(task_id="late", timeout=0.05), answers)
    late.join(GUARD)
    person.type("yes\n")
    thread.join(GUARD)
    assert answers == [False, False]
    assert "late asks" not in person.seen
    person.see("too late")


def test_no_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Denied, and nothing is printed."""
    for stdin in (io.StringIO("yes\n"), None):
        monkeypatch.setattr(sys, "stdin", stdin)
        assert ask_on_terminal(request_of()) is False
    assert capsys.readouterr().err == ""
