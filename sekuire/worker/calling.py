"""Ask the policy about a task, call its handler, and turn what either does into the task's result."""

from __future__ import annotations

from typing import Optional, Union

from .._internal import instrumentation
from .._internal.logs import get_logger
from ..config import WorkerConfig
from ..errors import ConfigurationError, PolicyUnavailableError, PolicyViolationError
from ..handlers import outcome
from ..handlers.context import TaskContext, control_of
from ..handlers.invoke import with_structure
from ..wire import protocol
from ..wire.models import Completion, Failure
from .answers import WorkerAudit
from .approvals import ApprovalNeeded
from .records import Record

log = get_logger("sekuire.dispatch")


class Caller:
    """Ask the policy gateway about each task, and call its handler. On the handler's thread; no state of its own.

    :param audit: notes each task that the policy allowed.
    """

    def __init__(self, config: WorkerConfig, audit: Optional[WorkerAudit] = None) -> None:
        self._gateway = config.policy_gateway
        #: True if there is a policy to ask.
        self.has_policy = self._gateway is not None
        # One question, so that one policy answers all of it. A gateway of the user's own may not have it.
        self._check_task = getattr(self._gateway, "check_task", None)
        self._check_tool = getattr(self._gateway, "check_tool", None)
        self._expose_errors = config.expose_errors
        self._audit = audit

    def call(self, record: Record, context: TaskContext, began: float) -> Completion:
        """Call the handler and return the task's result. Raises nothing that the handler raises.

        :param began: when the task's time began (``time.monotonic()``).
        """
        return outcome.run(record.entry, context, record.input(), began=began, expose_errors=self._expose_errors)

    def check(self, record: Record, context: TaskContext) -> Union[Failure, ApprovalNeeded, None]:
        """Return why the policy denies a task or what a person must approve, or None if it may begin.

        The gateway may block.
        """
        watching = instrumentation.current
        span = None if watching is None else watching.begin_check(context)
        denial = self._check(record, context)
        if span is not None:
            span.end(denial if isinstance(denial, Failure) else None, control_of(context).policy)
        return denial

    def _check(self, record: Record, context: TaskContext) -> Union[Failure, ApprovalNeeded, None]:
        task = record.task
        gateway = self._gateway
        try:
            if gateway is None:
                return None
            if self._check_task is not None:
                # A gateway of the user's own that knows no tools fails for a task that names one: it is denied.
                asked = (task.capability,) if task.tool is None else (task.capability, task.tool)
                enforcer = control_of(context).policy = self._check_task(*asked)
                if self._audit is not None and enforcer is not None and enforcer.policy is not None:
                    self._audit.note_passed(task)
            else:
                gateway.check_request()
                gateway.check_capability(task.capability)
                if task.tool is not None and self._check_tool is not None:
                    self._check_tool(task.tool)
        except ApprovalNeeded as needed:
            # An input that fits no handler is not worth anybody's time.
            return self._check_input(record, context) or needed
        except (PolicyViolationError, PolicyUnavailableError) as error:
            return outcome.failure_of(error, context, self._expose_errors)
        except ConfigurationError as error:
            log.error("[%s] the policy cannot be asked, the task is denied: %s", task.task_id, error)
            return protocol.failure("policy_unavailable", str(error)).as_logged()
        except Exception as error:
            log.exception("[%s] the policy gateway failed; the task is denied", task.task_id)
            failure = protocol.failure("policy_unavailable", f"the policy gateway failed ({type(error).__name__})")
            return failure.as_logged()
        return None

    def _check_input(self, record: Record, context: TaskContext) -> Optional[Failure]:
        """Return the failure of a task whose input does not fit its handler, None if it may fit."""
        entry = record.entry
        if entry.structure is None or entry.layers:
            # Middleware may change the input.
            return None
        try:
            with_structure(_accept, entry.structure)(context, record.input())
        except BaseException as error:  # noqa: BLE001  # A type of the user's own has code of its own.
            return outcome.failure_of(error, context, self._expose_errors)
        return None


def _accept(context: TaskContext, input: object) -> None:
    """Do nothing, in place of the handler of a task whose input is only checked."""
