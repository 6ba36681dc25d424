"""Ask the policy whether a task may begin."""

from __future__ import annotations

from typing import Callable, Optional

from .._internal.logs import get_logger
from ..config import WorkerConfig
from ..errors import ConfigurationError, PolicyUnavailableError, PolicyViolationError
from ..handlers import outcome
from ..handlers.context import TaskContext
from ..wire import protocol
from ..wire.models import Failure, Task
from .answers import TaskAudit

log = get_logger("sekuire.dispatch")


class Gate:
    """The policy gateway of a worker, asked on the handler's thread before each task. It may take its time.

    :param scrub: removes secrets from a text that goes to the platform.
    :param audit: notes each task that the policy allowed.
    """

    def __init__(self, config: WorkerConfig, scrub: Callable[[str], str], audit: Optional[TaskAudit] = None) -> None:
        self._gateway = config.policy_gateway
        #: True if there is a policy to ask.
        self.is_there = self._gateway is not None
        # One question, so that one policy answers all of it. A gateway of the user's own may not have it.
        self._check_task = getattr(self._gateway, "check_task", None)
        self._check_tool = getattr(self._gateway, "check_tool", None)
        self._expose_errors = config.expose_errors
        self._scrub = scrub
        self._audit = audit

    def check(self, task: Task, context: TaskContext) -> Optional[Failure]:
        """Return why the policy denies a task, or None if it may begin."""
        gateway = self._gateway
        try:
            if gateway is None:
                return None
            if self._check_task is not None:
                # A gateway of the user's own that knows no tools fails for a task that names one: it is denied.
                asked = (task.capability,) if task.tool is None else (task.capability, task.tool)
                enforcer = context._policy = self._check_task(*asked)
                if self._audit is not None and enforcer is not None and enforcer.policy is not None:
                    self._audit.passed(task)
            else:
                gateway.check_request()
                gateway.check_capability(task.capability)
                if task.tool is not None and self._check_tool is not None:
                    self._check_tool(task.tool)
        except (PolicyViolationError, PolicyUnavailableError) as error:
            return outcome.failure_of(error, context, self._expose_errors, self._scrub)
        except ConfigurationError as error:
            log.error("[%s] the policy cannot be asked, the task is denied: %s", task.task_id, error)
            return protocol.failure("policy_unavailable", str(error))
        except Exception as error:
            log.exception("[%s] the policy gateway failed; the task is denied", task.task_id)
            return protocol.failure("policy_unavailable", f"the policy gateway failed ({type(error).__name__})")
        return None
