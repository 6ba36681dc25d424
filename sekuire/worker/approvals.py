"""Ask people for approval: for a handler that waits, and for a task that has not begun."""

# Threads: any thread may ask. `_lock` guards the counts of what was asked. The steps of a request run in the thread of
# whoever waits, or in the one that ends its question.

from __future__ import annotations

import functools
import threading
from typing import TYPE_CHECKING, Any, Callable, Generator, Optional, Tuple

from .._internal.logs import get_logger
from .._internal.scrub import scrub, scrub_json
from .._internal.threads import Deadline
from ..config import WorkerConfig
from ..errors import ApprovalDenied, TaskCancelled
from ..handlers.context import APPROVAL_TIME, Asked, TaskContext, TaskControl, control_of
from ..secret import Secret
from ..wire import canonical, protocol
from ..wire.models import Approval
from .questions import ABANDONED, APPROVED, EXPIRED, MOST_SKIPPED, SKIPPED, Outcome, Question, Questions, stopping
from .records import Gate

if TYPE_CHECKING:
    from ..policy.enforcer import PolicyEnforcer

log = get_logger("sekuire.approvals")


class ApprovalNeeded(Exception):
    """Say that the policy lets a task begin only once a person approves."""

    def __init__(self, kind: str, name: str, policy_hash: Optional[str]) -> None:
        super().__init__(kind, name, policy_hash)
        self.kind = kind
        self.name = name
        self.policy_hash = policy_hash


class Gatekeeper:
    """Answer the policy before a task's handler begins: what was approved is, and the rest has to be asked for."""

    def ask(
        self, context: TaskContext, kind: str, name: str, details: Any, timeout: float, enforcer: Any = None
    ) -> Optional[Approval]:
        """Return None for what a person has approved.

        :raises ApprovalNeeded: nobody has.
        """
        policy_hash = _hash_of(enforcer)
        asked = control_of(context).asked
        if asked is None or (kind, name, policy_hash) not in asked.granted:
            raise ApprovalNeeded(kind, name, policy_hash)
        return None

    async def ask_async(self, context: TaskContext, kind: str, name: str, details: Any, timeout: float) -> Approval:
        raise ApprovalDenied("nobody can be asked before the handler begins")


GATEKEEPER = Gatekeeper()


class Approvals:
    """Ask for all tasks of one worker: what a handler asks for, and what a policy wants before the handler begins.

    :param questions: sends each request and gets the decision.
    """

    def __init__(self, config: WorkerConfig, questions: Questions) -> None:
        self.questions = questions
        self._gateway = config.policy_gateway
        self._lock = threading.Lock()

    # -- asking (any thread) --

    def ask(
        self, context: TaskContext, kind: str, name: str, details: Any, timeout: float, enforcer: Any = None
    ) -> Optional[Approval]:
        """Ask, and wait for the decision: :meth:`sekuire.handlers.context.Asker.ask`."""
        steps = self._steps(context, kind, name, details, timeout, self._policy_of(context, enforcer))
        try:
            while True:
                question = next(steps)
                ended = threading.Event()
                self.questions.when_ended(question, ended.set)
                if not ended.wait(question.deadline.remaining()):
                    self.questions.end(question, Outcome(EXPIRED))
        except StopIteration as done:
            approval: Optional[Approval] = done.value
            return approval
        finally:
            # Ctrl-C, for example: nobody waits any more.
            steps.close()

    async def ask_async(self, context: TaskContext, kind: str, name: str, details: Any, timeout: float) -> Approval:
        """Ask, and let the loop go on until there is a decision."""
        import asyncio  # Only for async handlers.

        loop = asyncio.get_running_loop()
        steps = self._steps(context, kind, name, details, timeout, self._policy_of(context, None))
        try:
            while True:
                question = next(steps)
                ended = asyncio.Event()
                self.questions.when_ended(question, functools.partial(_wake, loop, ended))
                await ended.wait()
        except StopIteration as done:
            approval: Approval = done.value
        finally:
            steps.close()
        return approval

    def ask_later(
        self,
        context: TaskContext,
        subject: Tuple[str, str, Any, float],
        policy: Optional[Tuple[bool, Optional[str]]],
        done: Callable[[Optional[Approval], Optional[BaseException]], object],
    ) -> None:
        """Ask for a handler in another process. Call ``done(approval, error)`` once, in any thread.

        :param subject: kind, name, details and timeout.
        :param policy: as for :meth:`_steps`; None if the handler asks.
        """
        steps = self._steps(context, *subject, policy or self._policy_of(context, None))

        def go_on() -> None:
            try:
                question = next(steps)
            except StopIteration as end:
                done(end.value, None)
            except BaseException as error:  # noqa: BLE001  # It goes to the handler.
                done(None, error)
            else:
                self.questions.when_ended(question, go_on)

        go_on()

    def _steps(
        self,
        context: TaskContext,
        kind: str,
        name: str,
        details: Any,
        timeout: float,
        policy: Tuple[bool, Optional[str]],
    ) -> Generator[Question, None, Optional[Approval]]:
        """Yield each question that has to be waited for. Return the approval.

        :param policy: True if the gateway's policy counts, and the hash of the one by which the question arose.
        """
        control = control_of(context)
        follows, seen = policy
        self._check(control)
        if kind == "tool" and control.asked is not None and control.asked.use_up(name):
            return None
        clean = masked(kind, name, details)
        left = context.remaining()
        timeout = min(timeout, protocol.MAX_DURATION if left is None else left)
        deadline = Deadline(timeout)
        skipped = 0
        while True:
            if follows:
                current = self._enforcer()
                if current is not None and _hash_of(current) != seen:
                    seen = _hash_of(current)
                    if not current.still_needs_approval(kind, name, control.task.capability):
                        return None
            question = self._make(control, kind, name, clean, seen, deadline, timeout)
            self.questions.begin(question)
            try:
                yield question
            finally:
                self.questions.end(question, Outcome(ABANDONED))
            assert question.outcome is not None
            state, approval, _ = question.outcome
            if state == SKIPPED:
                skipped += 1
                if skipped < MOST_SKIPPED:
                    continue
            if state != APPROVED:
                raise question.error()
            # It may have been cancelled in the same moment.
            self._check(control)
            if not follows or _hash_of(self._enforcer()) == seen:
                return approval
            log.info("[%s] the policy has changed while a person decided", control.task.task_id)

    def ask_for(self, control: TaskControl, gate: Gate, needed: ApprovalNeeded, input: Any, is_wanted: Any) -> Question:
        """Return the question for a task that has not begun. The caller calls :meth:`begin`."""
        details: Any = None
        try:
            details = masked(needed.kind, needed.name, {"input": input})
        except ApprovalDenied:
            # A large input, for example. The platform has it, and can show it.
            details = {"input": None, "omitted": "the input cannot be shown here"}
        control.asked = gate.asked
        return self._make(
            control, needed.kind, needed.name, details, needed.policy_hash, gate.deadline, APPROVAL_TIME, is_wanted
        )

    def _make(
        self,
        control: TaskControl,
        kind: str,
        name: str,
        details: Any,
        policy_hash: Optional[str],
        deadline: Deadline,
        timeout: float,
        is_wanted: Optional[Callable[[], bool]] = None,
    ) -> Question:
        task_id, name = control.task.task_id, scrub(name)
        digest = protocol.approval_digest(task_id, kind, name, details, policy_hash)
        with self._lock:
            if control.asked is None:
                control.asked = Asked()
            counts = control.asked.counts
            number = counts[digest] = counts.get(digest, 0) + 1
        return Question(
            control=control,
            kind=kind,
            name=name,
            details=details,
            policy_hash=policy_hash,
            digest=digest,
            approval_id=protocol.approval_id(task_id, digest, number),
            deadline=deadline,
            timeout=timeout,
            is_of_handler=is_wanted is None,
            is_wanted=is_wanted or _always,
        )

    # -- around it --

    def _check(self, control: TaskControl) -> None:
        """Raise if the task was cancelled, or the worker stops."""
        reason = control.reason()
        if reason is not None:
            raise TaskCancelled(reason)
        if self.questions.is_draining:
            raise stopping()

    def _enforcer(self) -> Optional[PolicyEnforcer]:
        """Return the enforcer of the gateway's current policy. None without one, or for a gateway of another kind."""
        enforcer = getattr(self._gateway, "enforcer", None)
        return enforcer if hasattr(enforcer, "still_needs_approval") else None

    def _policy_of(self, context: TaskContext, enforcer: Any) -> Tuple[bool, Optional[str]]:
        """Return True if the gateway's policy counts for a question, and the hash of the one by which it arose."""
        current = self._enforcer()
        if enforcer is None:
            return current is not None, _hash_of(current)
        return enforcer is control_of(context).policy or enforcer is current, _hash_of(enforcer)


def masked(kind: str, name: str, details: Any) -> Any:
    """Return details as they may be shown: plain JSON, without the secrets of this process.

    :raises ApprovalDenied: they have no JSON form, or are too large.
    """
    problem = ""
    try:
        plain = canonical.canonical_json(_without_secrets(details, 0))
        if len(plain) <= 2 * protocol.MAX_DETAILS:
            shown = protocol.decode_body(scrub_json(plain))
            # A mask may be longer than what it hides.
            length = len(canonical.canonical_json(shown))
            if length <= protocol.MAX_DETAILS:
                return shown
        problem = f"have more than {protocol.MAX_DETAILS} bytes as JSON"
    except Exception as error:  # noqa: BLE001  # They may be a class with code of its own.
        text = str(error) if isinstance(error, canonical.NotCanonical) else type(error).__name__
        problem = f"cannot be shown: {text}"
    raise ApprovalDenied(
        f"nobody was asked for {kind} {protocol.one_line(scrub(name))[:200]!r}: the details {problem}",
        {"kind": kind, "name": scrub(name)},
    )


def _without_secrets(value: Any, depth: int) -> Any:
    """Return ``value`` with a mask in place of each Secret."""
    if isinstance(value, Secret):
        return "***"
    if depth > canonical.MAX_DEPTH:
        return value  # It is refused next.
    if isinstance(value, dict):
        return {key: _without_secrets(one, depth + 1) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_secrets(one, depth + 1) for one in value]
    return value


def _hash_of(enforcer: Any) -> Optional[str]:
    return getattr(getattr(enforcer, "policy", None), "hash", None)


def _wake(loop: Any, event: Any) -> None:
    try:
        loop.call_soon_threadsafe(event.set)
    except RuntimeError:
        # The loop was closed just now: nobody waits.
        return


def _always() -> bool:
    return True
