"""Send requests for approval, and end each with a decision, without a thread for each.

A :class:`Question` is one request. ``sekuire-approval-N``, at most four threads, send it and look for its decision
every 5 s; the stream's ``approval`` event brings the decision sooner. Whatever goes wrong, the answer is no.
"""

# Threads: any thread may begin a question, and any thread may end it: that of a decision, of a cancellation or of the
# stop, `sekuire-timer` at its deadline. `_lock` guards the questions and their outcomes. It is not held over a callback
# or I/O. A question's callbacks run in the thread that ends it.

from __future__ import annotations

import functools
import logging
import random
import threading
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

import attrs

from .._internal.clock import time
from .._internal.delivery import Delivery
from .._internal.logs import get_logger
from .._internal.threads import Deadline, Timer
from ..approvals import ApprovalRequest
from ..config import WorkerConfig
from ..errors import APIError, ApprovalDenied, ApprovalExpired, TaskCancelled, TaskError
from ..handlers.context import TaskControl
from ..transport.http import make_idempotency_key
from ..transport.retry import full_jitter
from ..wire import protocol
from ..wire.models import Approval
from ..wire.verdict import Dropped, Failed, Later, Retry, Revoked, Settled, Unauthorized, Unsupported
from .answers import WorkerAudit
from .sending import Sender

log = get_logger("sekuire.approvals")

#: Seconds between two looks for a decision, and the share by which they vary.
POLL, _JITTER = 5.0, 0.2
#: First and longest pause between two tries to ask, in seconds.
RETRY_MIN, RETRY_MAX = 0.2, 5.0
#: Numbers that nobody has answered in earlier runs, after which a request counts as expired.
MOST_SKIPPED = 100
#: The code of a 409 that is about the request, not about the attempt.
_CONFLICT = "APPROVAL_ID_REUSED"
_NOT_OFFERED = "the platform offers no approvals, and the worker has no approval_handler"

#: Words for what ends a question beside a decision.
APPROVED, DENIED, EXPIRED = "approved", "denied", "expired"
SKIPPED, REFUSED, CANCELLED, DRAINING, SUPERSEDED, ABANDONED = (
    "skipped", "refused", "cancelled", "draining", "superseded", "abandoned",
)  # fmt: skip
#: The outcomes that are decisions on the request: they are logged and noted in the audit log.
_DECISIONS = (APPROVED, DENIED, EXPIRED, REFUSED)


class Outcome(NamedTuple):
    """Say how a question has ended: a word of this module, what the platform said of it, and why in words."""

    state: str
    approval: Optional[Approval] = None
    problem: str = ""


@attrs.define(eq=False, kw_only=True)
class Question:
    """Hold one request for approval. The lock of :class:`Questions` guards what changes.

    ``is_wanted`` returns False once nobody waits. ``is_of_handler``: a handler waits; else the task has not begun.
    """

    control: TaskControl
    kind: str
    name: str
    details: Any
    policy_hash: Optional[str]
    digest: str
    approval_id: str
    deadline: Deadline
    timeout: float
    is_of_handler: bool
    is_wanted: Callable[[], bool]
    outcome: Optional[Outcome] = None
    callbacks: Tuple[Callable[[], None], ...] = ()
    #: The platform has it. Until then it is sent again, each time with the same key.
    is_posted: bool = False
    #: The user's handler decides, and not the platform.
    is_decided_here: bool = False
    key: str = ""
    tries: int = 0
    #: The number of the plan that counts: an older one does nothing when its time comes.
    plan: int = 0
    timer: Optional[int] = None
    cancel: Optional[Callable[[], None]] = None
    has_warned: bool = False
    is_said: bool = False

    @property
    def what(self) -> str:
        """Return what is asked for, for people: one line that is not too long."""
        return f"{self.kind} {protocol.one_line(self.name)[:200]!r}"

    def error(self) -> Exception:
        """Return the error for an outcome that is not an approval."""
        assert self.outcome is not None
        state, approval, problem = self.outcome
        facts: Dict[str, Any] = {"kind": self.kind, "name": self.name, "approval_id": self.approval_id}
        if self.kind != "action":
            facts["rule"] = f"{self.kind}.approval_required"
        if state in (CANCELLED, SUPERSEDED):
            return TaskCancelled(self.control.reason() or "cancelled")
        if state == DRAINING:
            return stopping()
        if state in (EXPIRED, SKIPPED):
            return ApprovalExpired(f"nobody has decided on {self.what} within {self.timeout:g} s", facts)
        if approval is not None:
            facts.update({name: value for name, value in _claims(approval).items() if value})
        if state == DENIED:
            problem = f"{self.what} was denied{_by(approval)}"
        return ApprovalDenied(problem or f"{self.what} was not approved", facts)


def stopping() -> TaskError:
    """Return the error for a handler that waits while the worker stops."""
    return TaskError("worker_shutdown", "the worker stopped while the task waited for approval", retryable=True)


class Questions:
    """Send the questions of one worker, and look for the decisions. ::

        questions.when_ended(question, go_on)
        questions.begin(question)

    :param sender: sends to the platform. None: nobody but ``approval_handler`` is asked, in the thread that asks.
    :param audit: notes each request and each decision.
    :param owner: the object whose ``stop()`` an approval handler must not wait for.
    """

    def __init__(
        self,
        config: WorkerConfig,
        sender: Optional[Sender],
        *,
        timer: Timer,
        audit: Optional[WorkerAudit] = None,
        owner: object = None,
    ) -> None:
        self._sender = sender
        self._handler = config.approval_handler
        self._timer = timer
        self._audit = audit
        self._lock = threading.Lock()
        self._pending: Dict[str, Question] = {}
        #: The worker stops: handlers wait for nobody any more.
        self.is_draining = False
        #: One pool sends and looks, so that a platform that hangs delays no reports. The other calls the user's code.
        self._polls = Delivery("sekuire-approval", owner=owner)
        self._calls = Delivery("sekuire-approval-handler", owner=owner)

    def begin(self, question: Question) -> None:
        """Send a question. From now on it may end at any moment."""
        with self._lock:
            self._pending[question.approval_id] = question
            is_late = self.is_draining and question.is_of_handler
        if is_late:
            self.end(question, Outcome(DRAINING))
            return
        question.key = make_idempotency_key()
        task_id = question.control.task.task_id
        log.debug("[%s] asks for approval of %s (%s)", task_id, question.what, question.approval_id)
        self._note(question, "requested")
        question.timer = self._timer.call_at(
            time.monotonic() + question.deadline.remaining(), lambda: self.end(question, Outcome(EXPIRED))
        )
        if question.is_of_handler:
            question.cancel = lambda: self.end(question, Outcome(CANCELLED))
            question.control.add_waiter(question.cancel)
        # The platform does not know a pushed task, and can ask nobody for it.
        if self._sender is None or question.control.is_pushed:
            self._decide_here(question)
        else:
            self._plan(question, 0.0)

    def when_ended(self, question: Question, callback: Callable[[], None]) -> None:
        """Call ``callback`` once the question has ended, at once if it has."""
        with self._lock:
            if question.outcome is None:
                question.callbacks += (callback,)
                return
        callback()

    def end(self, question: Question, outcome: Outcome) -> None:
        """End a question, unless it has ended."""
        if not question.is_wanted():
            outcome = Outcome(ABANDONED)
        with self._lock:
            if question.outcome is not None:
                return
            question.outcome = outcome
            if self._pending.get(question.approval_id) is question:
                del self._pending[question.approval_id]
            callbacks, question.callbacks = question.callbacks, ()
        if question.timer is not None:
            self._timer.cancel(question.timer)
        if question.cancel is not None:
            question.control.remove_waiter(question.cancel)
        if outcome.state in _DECISIONS:
            self._say(question, outcome)
            self._note(question, outcome.state, outcome.approval)
        elif outcome.state == SUPERSEDED and question.is_of_handler:
            question.control.cancel("superseded")
        for callback in callbacks:
            callback()

    # -- what comes from outside --

    def note(self, approval: Approval) -> None:
        """Act on an ``approval`` event. The stream's thread."""
        with self._lock:
            question = self._pending.get(approval.approval_id or "")
        if question is not None and question.control.task.task_id == approval.task_id:
            self._accept(question, approval)

    def look_now(self) -> None:
        """Look for every decision now: events may have been lost. The stream's thread."""
        for question in self._questions():
            self._plan(question, 0.0)

    def drain(self) -> None:
        """End what handlers wait for, now and later, because the worker stops."""
        with self._lock:
            self.is_draining = True
        for question in self._questions():
            if question.is_of_handler:
                self.end(question, Outcome(DRAINING))

    def close(self) -> None:
        """End the threads. Return at once."""
        self._polls.close()
        self._calls.close()

    def join(self, deadline: Deadline) -> bool:
        """Wait for the threads. Return True if they ended before ``deadline``."""
        # One that calls the user's code may never end.
        return not self._polls.join(deadline)

    @property
    def waiting(self) -> int:
        """Return how many questions have no decision."""
        return len(self._pending)

    def _questions(self) -> List[Question]:
        with self._lock:
            return list(self._pending.values())

    # -- sending and looking (sekuire-approval-N) --

    def _plan(self, question: Question, delay: float) -> None:
        with self._lock:
            if question.is_decided_here:
                return
            question.plan += 1
            number = question.plan
        self._polls.schedule(delay, functools.partial(self._step, question, number), is_awaited=False)

    def _step(self, question: Question, number: int) -> None:
        """Send a question, or look for its decision, and plan the next step unless it has ended."""
        if question.outcome is not None or number != question.plan:
            return
        if not question.is_wanted():
            self.end(question, Outcome(ABANDONED))
            return
        delay = RETRY_MAX
        try:
            delay = self._look(question) if question.is_posted else self._post(question)
        except BaseException:  # sys.exit() in a token provider, for example.
            log.exception("[%s] asking for approval failed in an unforeseen way", question.control.task.task_id)
        finally:
            # A reconnect may have planned one already.
            if question.outcome is None and number == question.plan:
                self._plan(question, delay)

    def _post(self, question: Question) -> float:
        """Send a question. Return the seconds until the next step."""
        sender = self._sender
        assert sender is not None
        if not sender.support.is_offered("approvals"):
            self._decide_here(question)
            return RETRY_MAX
        control = question.control
        body = protocol.approval_body(
            question.approval_id,
            control.attempt,
            sender.worker_id,
            kind=question.kind,
            name=question.name,
            details=question.details,
            policy_hash=question.policy_hash,
            digest=question.digest,
            timeout=question.deadline.remaining(),
        )
        found, answer = sender.exchange("POST", "approvals", control.task.task_id, body=body, key=question.key)
        sender.support.note("approvals", found)
        if isinstance(found, Settled):
            return self._note_asked(question, answer)
        if isinstance(found, Unsupported) and not sender.support.is_offered("approvals"):
            self._decide_here(question)
        elif isinstance(found, Dropped):
            self._end_refused(question, found)
        elif not isinstance(found, (Retry, Later, Unauthorized, Unsupported, Revoked)):
            self.end(question, Outcome(REFUSED, None, f"the platform did not accept the request ({found.error})"))
        else:
            return self._retry(question, found)
        return RETRY_MAX

    def _note_asked(self, question: Question, answer: bytes) -> float:
        """Act on the answer to a question that the platform has accepted, or knows."""
        question.tries = 0
        try:
            approval = protocol.parse_approval(protocol.decode_body(answer))
        except protocol.Malformed as error:
            return self._retry(question, None, str(error))
        question.is_posted = True
        if approval.status == "pending" and not question.is_said:
            question.is_said = True
            log.say(
                logging.INFO, "[%s] waits for approval of %s, at most %.0f s; `sekuire approvals list` shows it",
                question.control.task.task_id, question.what, question.deadline.remaining(),
            )  # fmt: skip
        if approval.status == EXPIRED:
            # Nobody answered it in an earlier run. It is asked again under the next number.
            self.end(question, Outcome(SKIPPED))
        elif approval.status != "pending":
            if approval.digest is None:
                return 0.0
            self._accept(question, approval)
        return _poll_delay()

    def _end_refused(self, question: Question, found: Dropped) -> None:
        code = found.error.code if isinstance(found.error, APIError) else None
        if found.is_superseded and code != _CONFLICT:
            log.warning("[%s] the platform has given the task to another worker; it ends here",
                        question.control.task.task_id)  # fmt: skip
            self.end(question, Outcome(SUPERSEDED))
        else:
            self.end(question, Outcome(REFUSED, None, f"the platform did not accept the request ({found.error})"))

    def _look(self, question: Question) -> float:
        """Look for the decision. Return the seconds until the next step."""
        sender = self._sender
        assert sender is not None
        found, answer = sender.exchange(
            "GET", "approval", question.control.task.task_id, approval_id=question.approval_id
        )
        if isinstance(found, Settled):
            try:
                self._accept(question, protocol.parse_approval(protocol.decode_body(answer)))
            except protocol.Malformed as error:
                log.debug("[%s] the state of an approval cannot be read (%s)", question.control.task.task_id, error)
        elif isinstance(found, Failed):
            if isinstance(found.error, APIError) and found.error.status == 404 and not isinstance(found, Retry):
                # The platform has forgotten it.
                question.is_posted, question.key = False, make_idempotency_key()
                return self._retry(question, found)
            log.debug("[%s] cannot look for a decision (%s)", question.control.task.task_id, found.error)
            return max(_poll_delay(), getattr(found, "delay", 0.0))
        return _poll_delay()

    def _retry(self, question: Question, found: Optional[Failed], problem: str = "") -> float:
        delay = max(full_jitter(question.tries, RETRY_MIN, RETRY_MAX), getattr(found, "delay", 0.0))
        level = log.debug if question.tries else log.warning
        question.tries += 1
        level("[%s] approval of %s cannot be asked for now (%s); again in %.1f s", question.control.task.task_id,
              question.what, problem if found is None else found.error, delay)  # fmt: skip
        return delay

    def _accept(self, question: Question, approval: Approval) -> None:
        """End a question by what the platform says of it. A decision on anything else is void."""
        if approval.status == "pending":
            return
        is_other = approval.approval_id not in (None, question.approval_id)
        if is_other or (approval.digest != question.digest and approval.status != EXPIRED):
            if not question.has_warned:
                question.has_warned = True
                log.warning("[%s] a decision on %s is void: it was made for something else",
                            question.control.task.task_id, question.what)  # fmt: skip
            return
        self.end(question, Outcome(approval.status, approval))

    # -- without the platform --

    def _decide_here(self, question: Question) -> None:
        """Have the user's handler decide. Without one, deny."""
        with self._lock:
            # A step that a reconnect has planned may come here too.
            is_first, question.is_decided_here = not question.is_decided_here, True
        if not is_first:
            return
        if self._handler is None:
            self.end(question, Outcome(REFUSED, None, _NOT_OFFERED))
        elif self._sender is None:
            self._call_handler(question)
        else:
            self._calls.schedule(0.0, functools.partial(self._call_handler, question), is_awaited=False)

    def _call_handler(self, question: Question) -> None:
        if question.outcome is not None or not question.is_wanted() or self._handler is None:
            self.end(question, Outcome(ABANDONED))
            return
        task_id = question.control.task.task_id
        request = ApprovalRequest(
            approval_id=question.approval_id,
            task_id=task_id,
            kind=question.kind,
            name=question.name,
            details=question.details,
            timeout=question.deadline.remaining(),
        )
        problem = ""
        answer: Any = None
        try:
            answer = self._handler(request)
        except BaseException as error:  # It must not end the thread, nor approve.
            log.exception("[%s] the approval_handler failed; %s is denied", task_id, question.what)
            problem = f"the approval_handler failed ({type(error).__name__})"
        state = APPROVED if answer is True else DENIED
        approval = Approval(
            status=state,
            approval_id=question.approval_id,
            task_id=task_id,
            decided_by="approval_handler",
            digest=question.digest,
        )
        self.end(question, Outcome(REFUSED, None, problem) if problem else Outcome(state, approval))

    def _say(self, question: Question, outcome: Outcome) -> None:
        task_id = question.control.task.task_id
        if outcome.state == APPROVED and not question.is_decided_here:
            log.say(logging.INFO, "[%s] %s is approved%s", task_id, question.what, _by(outcome.approval))
        elif outcome.state in (APPROVED, DENIED):
            # Whoever decides in this process knows it, and the failure of the task says it.
            log.info("[%s] %s is %s%s", task_id, question.what, outcome.state, _by(outcome.approval))
        elif outcome.state == EXPIRED:
            log.info("[%s] nobody has decided on %s in time: denied", task_id, question.what)
        else:
            log.info("[%s] %s is denied: %s", task_id, question.what, outcome.problem)

    def _note(self, question: Question, state: str, approval: Optional[Approval] = None) -> None:
        if self._audit is not None:
            claims = {} if approval is None else _claims(approval)
            subject = (question.kind, question.name)
            self._audit.note_approval(question.control.task, subject, question.approval_id, state, claims)


def _poll_delay() -> float:
    return POLL * random.uniform(1 - _JITTER, 1 + _JITTER)


def _claims(approval: Approval) -> Dict[str, Optional[str]]:
    return {"decided_by": approval.decided_by, "reason": approval.reason}


def _by(approval: Optional[Approval]) -> str:
    """Return who decided and why, as the end of a sentence."""
    if approval is None:
        return ""
    by = f" by {approval.decided_by}" if approval.decided_by else ""
    return by + (f": {approval.reason}" if approval.reason else "")
