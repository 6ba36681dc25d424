"""Send the progress of running tasks: the newest of each, and not too often."""

from __future__ import annotations

from typing import Dict, Optional, Tuple

from .._internal.clock import time
from .._internal.delivery import Delivery
from .._internal.logs import get_logger
from .._internal.scrub import scrub
from ..handlers.context import TaskContext, control_of
from ..wire import protocol
from ..wire.verdict import Dropped, Settled, Unsupported
from .results import Results
from .sending import Sender

log = get_logger("sekuire.report")

#: Seconds between two progress reports of one task.
PROGRESS_PAUSE = 1.0


class Progress:
    """Send what handlers report of their progress. Nothing of it is sent twice, or kept for a stop.

    Any thread may call anything; it is sent by the threads of ``delivery``, whose lock guards all state.

    :param results: a task that has a result makes no progress any more.
    """

    def __init__(self, sender: Sender, delivery: Delivery, results: Results) -> None:
        self._sender = sender
        self._delivery = delivery
        self._results = results
        #: What is to be sent next, by task.
        self._newest: Dict[str, Tuple[float, Optional[str]]] = {}
        #: When the next report of a task may be sent.
        self._not_before: Dict[str, float] = {}

    def report(self, context: TaskContext, fraction: float, message: Optional[str]) -> None:
        """Send the progress of a task soon, in place of an older one that was not sent yet. Never blocks."""
        task_id = context.task_id
        with self._delivery.lock:
            if (
                not self._sender.support.is_offered("progress")
                or self._delivery.is_closed
                or self._results.has_result(task_id)
            ):
                return
            is_planned = task_id in self._newest
            self._newest[task_id] = (fraction, message)
            delay = self._not_before.get(task_id, 0.0) - time.monotonic()
        if not is_planned:
            self._delivery.schedule(max(delay, 0.0), lambda: self._send(context), is_awaited=False)

    def forget(self, task_id: str) -> None:
        """Forget a task that has its result now. Needs the lock."""
        # Most tasks report none.
        if self._not_before or self._newest:
            self._newest.pop(task_id, None)
            self._not_before.pop(task_id, None)

    def _send(self, context: TaskContext) -> None:
        task_id = context.task_id
        with self._delivery.lock:
            newest = self._newest.pop(task_id, None)
            if newest is None:
                return
            self._not_before[task_id] = time.monotonic() + PROGRESS_PAUSE
        fraction, message = newest
        body = protocol.progress_body(fraction, None if message is None else scrub(message))
        found = self._sender.ask("progress", task_id, body)
        with self._delivery.lock:
            # A task that has ended since may be unknown to the platform: that says nothing of the endpoint.
            is_open = not self._results.has_result(task_id)
        if is_open and isinstance(found, Unsupported) and self._sender.support.note("progress", found):
            with self._delivery.lock:
                self._newest.clear()
            log.warning("the platform does not offer progress reports (%s); no more are sent", found.error)
        elif isinstance(found, Dropped) and found.is_superseded and is_open:
            # The platform gave the task to another worker, which finished first: nobody waits for this result.
            log.warning("[%s] the platform has the task's result already; the handler is cancelled", task_id)
            control_of(context).cancel("superseded")
        elif not isinstance(found, Settled):
            log.debug("[%s] progress was not accepted (%s)", task_id, found.error)
