"""Let a person decide where the platform offers no approvals: the option ``approval_handler``. ::

    from sekuire import create_worker
    from sekuire.approvals import ask_on_terminal

    worker = create_worker(agent_id="billing", approval_handler=ask_on_terminal)

docs/approvals.md has the whole picture.
"""

# Threads: `sekuire-approval-N` call the handler. `_terminal` lets one question at a time use the terminal, and is held
# while a person reads and types: that is its purpose.

from __future__ import annotations

import json
import sys
import threading
from typing import Any, List

import attrs

from ._internal.clock import time
from .wire.models import Approval

__all__ = ["Approval", "ApprovalRequest", "ask_on_terminal"]

_terminal = threading.Lock()
#: Most characters of a line on the terminal, and most lines of details.
_MOST_CHARACTERS, _MOST_LINES = 500, 40
#: What a person types to approve.
_YES = ("y", "yes")


@attrs.frozen(kw_only=True, slots=True)
class ApprovalRequest:
    """Hold what an ``approval_handler`` has to decide. ::

        def decide(request: ApprovalRequest) -> bool:
            return request.name == "refund" and request.details["amount"] <= 100

    ``kind`` is ``"action"`` (a handler asks), ``"tool"`` or ``"capability"`` (the policy asks). ``details`` is JSON,
    without the secrets of this process. ``timeout`` is the number of seconds until the request expires.
    """

    approval_id: str
    task_id: str
    kind: str
    name: str
    details: Any = None
    timeout: float = 300.0


def ask_on_terminal(request: ApprovalRequest) -> bool:
    """Ask on the terminal of this process. Return True only if somebody types ``yes`` or ``y``. ::

        worker = create_worker(agent_id="billing", approval_handler=ask_on_terminal)

    One question is asked at a time. Whatever the details hold is shown escaped, so that it cannot move the cursor. If
    standard input or standard error is not a terminal, the request is denied. An answer that comes after the request
    has expired is ignored.
    """
    end = time.monotonic() + request.timeout
    if not _is_terminal():
        return False
    if not _terminal.acquire(timeout=min(max(0.0, request.timeout), threading.TIMEOUT_MAX)):
        return False
    try:
        left = end - time.monotonic()
        if left <= 0:
            return False
        for line in _question(request, left):
            print(line, file=sys.stderr)
        print("approve? [y/N] ", end="", file=sys.stderr, flush=True)
        answer = sys.stdin.readline().strip().lower()
        if time.monotonic() >= end:
            print("too late: the request has expired", file=sys.stderr, flush=True)
            return False
        return answer in _YES
    finally:
        _terminal.release()


def _is_terminal() -> bool:
    try:
        return sys.stdin.isatty() and sys.stderr.isatty()
    except (AttributeError, ValueError):  # Without a terminal there may be no stream, or a closed one.
        return False


def _question(request: ApprovalRequest, left: float) -> List[str]:
    """Return the lines of the question."""
    lines = [f"task {_shown(request.task_id)} asks for approval of {request.kind} {_shown(request.name)}"]
    if request.details is not None:
        # Only ASCII: what looks like another text, or is written from the right, must not deceive who decides.
        text = json.dumps(request.details, indent=2)
        details = text.split("\n")
        lines += [f"  {_shown(line)}" for line in details[:_MOST_LINES]]
        if len(details) > _MOST_LINES:
            lines.append(f"  ... {len(details) - _MOST_LINES} more lines: nothing of them is shown")
    lines.append(f"it expires in {left:.0f} s")
    return lines


def _shown(text: str) -> str:
    """Return ``text`` with everything escaped that is not a plain character, and not too long."""
    escaped = "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)
    more = len(escaped) - _MOST_CHARACTERS
    return escaped if more <= 0 else f"{escaped[:_MOST_CHARACTERS]}... ({more} more characters)"
