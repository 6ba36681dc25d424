"""Spans of tasks, as OpenTelemetry's SDK collects them."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any, Callable, Dict, Tuple

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from sekuire import TaskContext, TaskError, Worker
from sekuire.contrib.opentelemetry import tracing

from ..support.scripted import Scripted
from ..support.waiting import GUARD, until

Make = Callable[..., Worker]

TRACE_ID, SPAN_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def collected() -> Tuple[TracerProvider, InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return provider, exporter


def by_name(exporter: InMemorySpanExporter) -> Dict[str, ReadableSpan]:
    return {span.name: span for span in exporter.get_finished_spans()}


def test_a_span_for_each_task(
    scripted: Scripted, worker_of: Make, collected: Tuple[TracerProvider, InMemorySpanExporter]
) -> None:
    """A consumer span with the task's facts, linked to its submitter, the parent of what the handler opens."""
    provider, exporter = collected
    worker = worker_of(scripted)
    worker.middleware(tracing(provider))

    @worker.on_task("echo")
    async def echo(ctx: TaskContext, input: Any) -> Any:
        with trace.get_tracer("user", tracer_provider=provider).start_as_current_span("inner"):
            await asyncio.sleep(0)
        return "secret result"

    with worker:
        scripted.send("task", {"task_id": "t1", "capability": "echo", "tool": "hammer", "requester_id": "r",
                               "workspace_id": "ws", "attempt": 2, "trace_id": f"00-{TRACE_ID}-{SPAN_ID}-01",
                               "input": {"x": "secret input"}})  # fmt: skip
        scripted.completion("t1")
        until(lambda: len(exporter.get_finished_spans()) == 2)
    spans = by_name(exporter)
    span, inner = spans["process echo"], spans["inner"]
    assert span.kind is trace.SpanKind.CONSUMER
    assert dict(span.attributes or {}) == {
        "messaging.system": "sekuire", "messaging.operation.type": "process", "messaging.destination.name": "echo",
        "messaging.message.id": "t1", "sekuire.attempt": 2, "sekuire.workspace_id": "ws", "sekuire.requester_id": "r",
        "sekuire.tool": "hammer", "sekuire.trace_id": f"00-{TRACE_ID}-{SPAN_ID}-01",
    }  # fmt: skip
    assert [(f"{link.context.trace_id:032x}", f"{link.context.span_id:016x}") for link in span.links] == [
        (TRACE_ID, SPAN_ID)
    ]
    assert inner.parent is not None
    assert span.context is not None
    assert inner.parent.span_id == span.context.span_id
    assert span.status.status_code is trace.StatusCode.UNSET
    assert "secret" not in json.dumps([json.loads(one.to_json()) for one in spans.values()])


@pytest.mark.parametrize(
    ("error", "code"),
    [(TaskError("own", "said"), "own"), (KeyError("k"), "KeyError"), (None, None)],
    ids=["own", "unexpected", "cancelled"],
)
def test_a_failure_is_the_spans_error(
    platform: Any,
    worker_of: Make,
    collected: Tuple[TracerProvider, InMemorySpanExporter],
    error: Any,
    code: Any,
) -> None:
    """What the handler raises is on the span, once, and goes on to be the task's failure."""
    provider, exporter = collected
    worker = worker_of(platform)
    worker.middleware(tracing(provider))
    begun = threading.Event()

    @worker.on_task("echo")
    def echo(ctx: TaskContext, input: Any) -> Any:
        if error is not None:
            raise error
        begun.set()
        assert ctx.wait_cancelled(GUARD)
        ctx.raise_if_cancelled()

    with worker:
        task_id = platform.submit("echo", None)
        if error is None:
            # A task that is cancelled before its handler has no span.
            assert begun.wait(GUARD)
            platform.command(platform.installations()[0]["installation_id"], "terminate")
        failure = platform.wait(task_id, GUARD)["error"]
        until(exporter.get_finished_spans)
    span = by_name(exporter)["process echo"]
    assert (span.attributes or {})["error.type"] == (code or "cancelled")
    assert failure["code"] == {"own": "own", "KeyError": "handler_error", None: "cancelled"}[code]
    assert span.status.status_code is trace.StatusCode.ERROR
    assert [event.name for event in span.events] == ["exception"]
    assert span.links == ()


@pytest.mark.parametrize("trace_id", ["tr", "a-b-c-d", f"00-{'0' * 32}-{SPAN_ID}-01", None])
def test_another_trace_id_is_an_attribute_only(
    scripted: Scripted, worker_of: Make, collected: Tuple[TracerProvider, InMemorySpanExporter], trace_id: Any
) -> None:
    """A trace_id that is not a traceparent makes no link."""
    provider, exporter = collected
    worker = worker_of(scripted)
    worker.middleware(tracing(provider))
    worker.on_task("echo", lambda ctx, input: None)
    with worker:
        scripted.task("t1", **({"trace_id": trace_id} if trace_id else {}))
        scripted.completion("t1")
        until(exporter.get_finished_spans)
    span = by_name(exporter)["process echo"]
    assert (span.links, (span.attributes or {}).get("sekuire.trace_id")) == ((), trace_id)
