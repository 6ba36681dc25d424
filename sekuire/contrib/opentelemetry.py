"""Open an OpenTelemetry span around each task, by a middleware (extra ``opentelemetry``).

Only OpenTelemetry's API is used. Unless the program sets up an SDK, spans are dropped and cost next to nothing.
"""

from __future__ import annotations

from typing import Any, Dict, List, Optional

try:
    from opentelemetry import trace
    from opentelemetry.trace import Link, SpanKind, Status, StatusCode, TracerProvider
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"sekuire.contrib.opentelemetry needs OpenTelemetry's API ({error}); run: pip install 'sekuire[opentelemetry]'",
        name=error.name,
    ) from error

from ..errors import TaskCancelled, TaskError
from ..handlers.context import TaskContext
from ..handlers.invoke import CallNext, Middleware
from ..version import __version__

__all__ = ["tracing"]

_FACTS = ("workspace_id", "requester_id", "parent_task_id", "workflow_id", "trace_id", "tool")


def tracing(tracer_provider: Optional[TracerProvider] = None) -> Middleware:
    """Return a middleware that opens a span for each task: ``worker.middleware(tracing())``.

    The span is of the kind *consumer* and named after the capability. It is the current span in the handler, also in an
    async one but not in another process. Spans that the handler makes are its children.

    Its attributes describe the task: ``messaging.message.id`` is the task's id, ``sekuire.trace_id`` the task's
    ``trace_id``. If the ``trace_id`` is a W3C ``traceparent``, the span is also linked to the submitter's span.

    The span does not contain the input or the result. It contains the text of an exception. A failed task sets the
    span's error, with the task's code as ``error.type``.

    :param tracer_provider: None takes the program's own.
    """
    tracer = trace.get_tracer("sekuire", __version__, tracer_provider)

    def traced(ctx: TaskContext, input: Any, call_next: CallNext) -> Any:
        attributes: Dict[str, Any] = {
            "messaging.system": "sekuire",
            "messaging.operation.type": "process",
            "messaging.destination.name": ctx.capability,
            "messaging.message.id": ctx.task_id,
            "sekuire.attempt": ctx.attempt,
        }
        for name in _FACTS:
            value = getattr(ctx, name)
            if value is not None:
                attributes[f"sekuire.{name}"] = value
        with tracer.start_as_current_span(
            f"process {ctx.capability}",
            kind=SpanKind.CONSUMER,
            attributes=attributes,
            links=_links(ctx.trace_id),
            set_status_on_exception=False,
        ) as span:
            try:
                return call_next(input)
            except BaseException as error:
                span.set_attribute("error.type", _code(error))
                span.set_status(Status(StatusCode.ERROR))
                raise

    return traced


def _links(trace_id: Optional[str]) -> List[Link]:
    if trace_id is None or trace_id.count("-") < 3:
        return []
    context = TraceContextTextMapPropagator().extract({"traceparent": trace_id})
    submitter = trace.get_current_span(context).get_span_context()
    return [Link(submitter)] if submitter.is_valid else []


def _code(error: BaseException) -> str:
    if isinstance(error, TaskError) and isinstance(error.code, str):
        return error.code
    return "cancelled" if isinstance(error, TaskCancelled) else type(error).__name__
