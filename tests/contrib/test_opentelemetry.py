"""Spans and metrics of tasks, as OpenTelemetry's SDK collects them."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import json
import pathlib
import threading
import timeit
from typing import Any, Callable, Dict, Iterator, List, Tuple

import attrs
import pytest
from opentelemetry import trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from sekuire import PolicyGateway, ProcessExecutor, SekuireClient, TaskContext, TaskError, Worker
from sekuire._internal import instrumentation
from sekuire.contrib import opentelemetry as bridge
from sekuire.contrib.opentelemetry import SekuireInstrumentor, instrument, uninstrument
from sekuire.errors import APIError, ConfigurationError, TransportError
from sekuire.testing import run_task

from ..support import elsewhere
from ..support.scripted import Scripted
from ..support.waiting import GUARD, until

Make = Callable[..., Worker]

TRACE_ID, SPAN_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE_ID}-{SPAN_ID}-01"


@attrs.define
class Collected:
    """Everything that the SDK was given, in memory."""

    tracers: TracerProvider
    meters: MeterProvider
    exporter: InMemorySpanExporter
    reader: InMemoryMetricReader

    @property
    def finished(self) -> List[ReadableSpan]:
        return list(self.exporter.get_finished_spans())

    def span(self, name: str) -> ReadableSpan:
        until(lambda: name in [span.name for span in self.finished])
        (found,) = (span for span in self.finished if span.name == name)
        return found

    def metrics(self) -> Dict[str, List[Any]]:
        data = self.reader.get_metrics_data()
        if data is None:
            return {}
        return {
            metric.name: list(metric.data.data_points)
            for resource in data.resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
        }


@pytest.fixture
def collected() -> Iterator[Collected]:
    """The process is instrumented, and all is kept."""
    exporter, reader = InMemorySpanExporter(), InMemoryMetricReader()
    tracers = TracerProvider()
    tracers.add_span_processor(SimpleSpanProcessor(exporter))
    meters = MeterProvider([reader])
    instrument(tracer_provider=tracers, meter_provider=meters)
    yield Collected(tracers, meters, exporter, reader)
    uninstrument()
    meters.shutdown()
    tracers.shutdown()


@pytest.fixture
def client(platform: Any) -> Iterator[SekuireClient]:
    with SekuireClient(api_base_url=platform.url, api_key=platform.api_key, agent_id="agent-1") as client:
        yield client


def attributes(span: ReadableSpan) -> Dict[str, Any]:
    return dict(span.attributes or {})


def ids(span: ReadableSpan) -> Tuple[int, int]:
    assert span.context is not None
    return span.context.trace_id, span.context.span_id


def links(span: ReadableSpan) -> List[Tuple[str, str]]:
    return [(f"{link.context.trace_id:032x}", f"{link.context.span_id:016x}") for link in span.links]


def parent(span: ReadableSpan) -> Any:
    return None if span.parent is None else span.parent.span_id


# -- tasks ------------------------------------------------------------------------------------------------------------


def test_a_span_for_each_task(scripted: Scripted, worker_of: Make, collected: Collected) -> None:
    """A consumer span with the task's facts, linked to its submitter, the parent of what the handler opens."""
    worker = worker_of(scripted)

    @worker.on_task("echo")
    async def echo(ctx: TaskContext, input: Any) -> Any:
        with trace.get_tracer("user", tracer_provider=collected.tracers).start_as_current_span("inner"):
            await asyncio.sleep(0)
        return "secret result"

    with worker:
        scripted.send("task", {"task_id": "t1", "capability": "echo", "tool": "hammer", "requester_id": "r",
                               "workspace_id": "ws", "attempt": 2, "trace_id": TRACEPARENT,
                               "input": {"x": "secret input"}})  # fmt: skip
        scripted.completion("t1")
        span, inner = collected.span("process echo"), collected.span("inner")
    assert span.kind is trace.SpanKind.CONSUMER
    # The required and recommended attributes of the conventions, and the library's own.
    assert attributes(span) == {
        "messaging.system": "sekuire", "messaging.operation.name": "process", "messaging.operation.type": "process",
        "messaging.destination.name": "echo", "messaging.message.id": "t1", "messaging.client.id": worker.worker_id,
        "server.address": "127.0.0.1", "server.port": int(scripted.url.rpartition(":")[2]),
        "sekuire.agent_id": "agent-1", "sekuire.attempt": 2, "sekuire.workspace_id": "ws",
        "sekuire.requester_id": "r", "sekuire.tool": "hammer", "sekuire.trace_id": TRACEPARENT,
    }  # fmt: skip
    assert links(span) == [(TRACE_ID, SPAN_ID)]
    assert f"{parent(span):016x}" == SPAN_ID
    assert f"{ids(span)[0]:032x}" == TRACE_ID
    assert parent(inner) == ids(span)[1]
    assert span.status.status_code is trace.StatusCode.UNSET
    assert "secret" not in json.dumps([json.loads(one.to_json()) for one in collected.finished])


@pytest.mark.parametrize("trace_id", ["tr", "a-b-c-d", f"00-{'0' * 32}-{SPAN_ID}-01", "0" * 32, None])
def test_another_trace_id_is_an_attribute_only(
    scripted: Scripted, worker_of: Make, collected: Collected, trace_id: Any
) -> None:
    """A trace_id that names no trace makes no link, and its task a trace of its own."""
    worker = worker_of(scripted)
    worker.on_task("echo", lambda ctx, input: None)
    with worker:
        scripted.task("t1", **({"trace_id": trace_id} if trace_id else {}))
        span = collected.span("process echo")
    assert (span.links, attributes(span).get("sekuire.trace_id"), parent(span)) == ((), trace_id, None)


@pytest.mark.parametrize("trace_id", [TRACE_ID, "0af76519-16cd-43dd-8448-eb211c80319c"], ids=["hex", "uuid"])
def test_a_bare_trace_id_is_linked(scripted: Scripted, worker_of: Make, collected: Collected, trace_id: str) -> None:
    """The id of a trace, without a span, is linked to. There is no span that could be the parent."""
    worker = worker_of(scripted)
    worker.on_task("echo", lambda ctx, input: None)
    with worker:
        scripted.task("t1", trace_id=trace_id)
        span = collected.span("process echo")
    assert links(span) == [(TRACE_ID, "0" * 16)]
    assert dict(span.links[0].attributes or {}) == {"sekuire.trace_id": trace_id}
    assert parent(span) is None


def test_a_trace_that_only_links(scripted: Scripted, worker_of: Make, collected: Collected) -> None:
    """continue_traces=False: a trace for each task, linked to the submitter's."""
    instrument(tracer_provider=collected.tracers, continue_traces=False)
    worker = worker_of(scripted)
    worker.on_task("echo", lambda ctx, input: None)
    with worker:
        scripted.task("t1", trace_id=TRACEPARENT)
        span = collected.span("process echo")
    assert links(span) == [(TRACE_ID, SPAN_ID)]
    assert parent(span) is None
    assert f"{ids(span)[0]:032x}" != TRACE_ID


@pytest.mark.parametrize(
    ("error", "code"),
    [(TaskError("own", "said"), "own"), (KeyError("k"), "handler_error"), (None, "worker_terminated")],
    ids=["own", "unexpected", "cancelled"],
)
def test_a_failure_is_the_spans_error(
    platform: Any, worker_of: Make, collected: Collected, error: Any, code: str
) -> None:
    """The task's failure is the span's error; what the handler raised is its event, once."""
    worker = worker_of(platform)
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
        span = collected.span("process echo")
    assert failure["code"] == code
    assert attributes(span)["error.type"] == code
    assert (span.status.status_code, span.status.description) == (trace.StatusCode.ERROR, failure["message"])
    (event,) = span.events
    assert event.name == "exception"
    assert (event.attributes or {})["exception.type"] == {
        "own": "TaskError", "handler_error": "KeyError", "worker_terminated": "TaskCancelled"
    }[code]  # fmt: skip
    (point,) = collected.metrics()["messaging.process.duration"]
    assert dict(point.attributes)["error.type"] == code


def test_secrets_are_removed_from_errors(scripted: Scripted, worker_of: Make, collected: Collected) -> None:
    """A token in an exception's text reaches no span."""
    worker = worker_of(scripted)
    token = "rt-a-secret-runtime-token"
    from sekuire.secret import Secret

    secret = Secret(token)

    @worker.on_task("echo")
    def echo(ctx: TaskContext, input: Any) -> Any:
        raise ValueError(f"refused: {secret.reveal()}")

    with worker:
        scripted.task("t1")
        span = collected.span("process echo")
    assert token not in span.to_json()
    assert "refused" in span.to_json()


def test_a_catch_all_has_one_name(scripted: Scripted, worker_of: Make, collected: Collected) -> None:
    """Names that no handler is registered for are attributes of spans, and neither span names nor metrics."""
    worker = worker_of(scripted)
    worker.on_task("*", lambda ctx, input: None)
    with worker:
        scripted.task("t1", "anything")
        span = collected.span("process *")
    assert attributes(span)["messaging.destination.name"] == "anything"
    assert attributes(span)["messaging.destination.template"] == "*"
    (point,) = collected.metrics()["messaging.client.consumed.messages"]
    assert "messaging.destination.name" not in point.attributes
    assert point.attributes["messaging.destination.template"] == "*"


# -- from the submitter to another process ----------------------------------------------------------------------------


def test_one_trace_from_submit_to_the_handlers_process(
    platform: Any, worker_of: Make, client: SekuireClient, collected: Collected
) -> None:
    """The submitter's span, the policy's, the handler's and what runs in another process are one trace."""
    with ProcessExecutor(1) as executor:
        worker = worker_of(platform, executor=executor, max_workers=1)
        worker.on_task("echo", elsewhere.current_trace)
        with worker, trace.get_tracer("user", tracer_provider=collected.tracers).start_as_current_span("order"):
            handle = client.submit("echo", {"n": 1})
            seen = handle.result(GUARD)
    send, process, order = collected.span("send echo"), collected.span("process echo"), collected.span("order")
    assert send.kind is trace.SpanKind.PRODUCER
    assert parent(send) == ids(order)[1]
    assert parent(process) == ids(send)[1]
    assert {one.context.trace_id for one in collected.finished if one.context} == {ids(order)[0]}
    assert platform.task(handle.id)["trace_id"].startswith(f"00-{ids(send)[0]:032x}-{ids(send)[1]:016x}-")
    # No SDK is set up in that process: it passes on the span that it has been given.
    assert seen == [f"{ids(process)[0]:032x}", f"{ids(process)[1]:016x}"]


def test_the_producers_span(platform: Any, client: SekuireClient, collected: Collected) -> None:
    """A submission has the attributes of the conventions, and is counted and timed."""
    handle = client.submit("echo")
    span = collected.span("send echo")
    facts = {
        "messaging.system": "sekuire", "messaging.operation.name": "send", "messaging.operation.type": "send",
        "messaging.destination.name": "echo", "server.address": "127.0.0.1",
        "server.port": int(platform.url.rpartition(":")[2]),
    }  # fmt: skip
    assert attributes(span) == {**facts, "messaging.message.id": handle.id, "sekuire.agent_id": "agent-1"}
    metrics = collected.metrics()
    assert [(point.value, dict(point.attributes)) for point in metrics["messaging.client.sent.messages"]] == [
        (1, facts)
    ]
    (point,) = metrics["messaging.client.operation.duration"]
    assert (point.count, dict(point.attributes)) == (1, facts)


def test_a_refused_submission_is_an_error(client: SekuireClient, collected: Collected) -> None:
    """The platform's code, or else the kind of the error, is the span's error."""
    with pytest.raises(APIError) as raised:
        client.submit("echo", {"n": 1}, idempotency_key="k")
        client.submit("echo", {"n": 2}, idempotency_key="k")
    span = [one for one in collected.finished if one.name == "send echo"][-1]
    assert attributes(span)["error.type"] == (raised.value.code or "APIError")
    assert span.status.status_code is trace.StatusCode.ERROR


def test_a_submitters_own_ids_stay(platform: Any, client: SekuireClient, collected: Collected) -> None:
    """A given trace_id travels unchanged, and with a given key nothing of the call's trace is in the body."""
    assert platform.task(client.submit("echo", trace_id="mine").id)["trace_id"] == "mine"
    first = client.submit("echo", {"n": 1}, idempotency_key="order-1")
    # Another body under the same key would be refused.
    assert client.submit("echo", {"n": 1}, idempotency_key="order-1").id == first.id
    assert platform.task(first.id).get("trace_id") is None


def test_an_unknown_end_names_all_that_repeats_it(scripted: Scripted, collected: Collected) -> None:
    """The advice after a lost answer has the trace_id too: the same key with another body is refused."""
    scripted.on["unknown"] = lambda request: request.reset()
    with SekuireClient(api_base_url=scripted.url, api_key="sk_test", agent_id="a", retry_for=0.01) as client:
        with pytest.raises(TransportError) as raised:
            client.submit("echo")
    sent = scripted.of("unknown")[-1].json["trace_id"]
    assert f"trace_id={sent!r}" in str(raised.value)


def test_many_submissions_are_one_trace_each_a_span(platform: Any, client: SekuireClient, collected: Collected) -> None:
    """submit_many() sends in threads; each span is a child of the caller's."""
    with trace.get_tracer("user", tracer_provider=collected.tracers).start_as_current_span("order"):
        handles = list(client.submit_many([{"capability": "echo", "input": n} for n in range(3)], max_in_flight=2))
    order = collected.span("order")
    spans = [span for span in collected.finished if span.name == "send echo"]
    assert {parent(span) for span in spans} == {ids(order)[1]}
    assert {attributes(span)["messaging.message.id"] for span in spans} == {handle.id for handle in handles}


def test_a_prepared_task_that_is_sent_twice(client: SekuireClient, collected: Collected) -> None:
    """The second time has no span: it is the same task."""
    prepared = client.prepare("echo")
    assert client.send(prepared).id == client.send(prepared).id
    assert len(collected.finished) == 1


# -- policies ---------------------------------------------------------------------------------------------------------


def gateway_of(tmp_path: pathlib.Path, content: Any) -> PolicyGateway:
    path = tmp_path / "policy.json"
    path.write_text(json.dumps(content))
    return PolicyGateway.from_file(path)


@pytest.mark.parametrize("is_allowed", [True, False], ids=["allowed", "denied"])
def test_the_policys_decision_is_a_span(
    scripted: Scripted, worker_of: Make, collected: Collected, tmp_path: pathlib.Path, is_allowed: bool
) -> None:
    """sekuire.policy.evaluate has the decision and its rule. A denial is what it is for, and no error."""
    content = {"agent": {"capabilities": {"denied_capabilities": [] if is_allowed else ["echo"]}}}
    with gateway_of(tmp_path, content) as gateway:
        worker = worker_of(scripted, policy_gateway=gateway)
        worker.on_task("echo", lambda ctx, input: None)
        with worker:
            scripted.task("t1", trace_id=TRACEPARENT)
            scripted.completion("t1")
            span = collected.span("sekuire.policy.evaluate")
    facts = attributes(span)
    assert facts["sekuire.policy.decision"] == ("allowed" if is_allowed else "denied")
    assert facts.get("sekuire.policy.rule") == (None if is_allowed else "capability.blocked")
    assert facts["messaging.message.id"] == "t1"
    assert (f"{ids(span)[0]:032x}", f"{parent(span):016x}") == (TRACE_ID, SPAN_ID)
    assert span.status.status_code is trace.StatusCode.UNSET
    assert ("process echo" in [one.name for one in collected.finished]) is is_allowed


def test_a_policy_that_cannot_decide_is_an_error(scripted: Scripted, worker_of: Make, collected: Collected) -> None:
    """A gateway that fails is the span's error."""

    class Broken:
        def check_request(self) -> None:
            raise OSError("broken")

        def check_capability(self, name: str) -> None: ...

        def on_heartbeat_response(self, response: Any) -> None: ...

    worker = worker_of(scripted, policy_gateway=Broken())
    worker.on_task("echo", lambda ctx, input: None)
    with worker:
        scripted.task("t1")
        span = collected.span("sekuire.policy.evaluate")
    assert attributes(span)["error.type"] == "policy_unavailable"
    assert span.status.status_code is trace.StatusCode.ERROR


# -- metrics ----------------------------------------------------------------------------------------------------------


def test_the_metrics_of_the_conventions(scripted: Scripted, worker_of: Make, collected: Collected) -> None:
    """A task is counted once, and its handler timed; no id is in an attribute."""
    worker = worker_of(scripted)
    worker.on_task("echo", lambda ctx, input: None)
    with worker:
        scripted.task("t1")
        scripted.task("t2")
        scripted.completion("t1")
        scripted.completion("t2")
        until(lambda: len(collected.finished) == 2)
    facts = {
        "messaging.system": "sekuire", "messaging.operation.name": "process", "messaging.operation.type": "process",
        "messaging.destination.name": "echo", "server.address": "127.0.0.1",
        "server.port": int(scripted.url.rpartition(":")[2]),
    }  # fmt: skip
    metrics = collected.metrics()
    assert [(one.value, dict(one.attributes)) for one in metrics["messaging.client.consumed.messages"]] == [(2, facts)]
    (duration,) = metrics["messaging.process.duration"]
    assert (duration.count, dict(duration.attributes)) == (2, facts)
    # OpenTelemetry before 1.30 takes no advice about buckets.
    assert duration.explicit_bounds[0] in (0.005, 0.0)


def test_metrics_alone(scripted: Scripted, worker_of: Make, collected: Collected) -> None:
    """A program may measure and not trace."""
    instrument(tracer_provider=trace.NoOpTracerProvider(), meter_provider=collected.meters)
    worker = worker_of(scripted)
    worker.on_task("echo", lambda ctx, input: None)
    with worker:
        scripted.task("t1")
        until(lambda: "messaging.process.duration" in collected.metrics())
    assert collected.finished == []


# -- what a program adds, and what it does not pay ---------------------------------------------------------------------


def test_what_a_program_adds_cannot_harm_a_task(
    scripted: Scripted, worker_of: Make, collected: Collected, caplog: pytest.LogCaptureFixture
) -> None:
    """A span processor that raises is one warning. The tasks go on."""

    class Broken(SimpleSpanProcessor):
        def on_start(self, span: Any, parent_context: Any = None) -> None:
            raise OSError("on start")

    collected.tracers.add_span_processor(Broken(collected.exporter))
    worker = worker_of(scripted)
    worker.on_task("echo", lambda ctx, input: None)
    with worker:
        scripted.task("t1")
        scripted.task("t2")
        assert scripted.completion("t1")["status"] == scripted.completion("t2")["status"] == "completed"
    assert [record.message for record in caplog.records if record.name == "sekuire.tracing"] == [
        "OpenTelemetry failed, tasks go on without it: OSError: on start"
    ]


def test_the_instrumentor_is_found() -> None:
    """opentelemetry-instrument finds it by its entry point, and hands options on."""
    from importlib.metadata import entry_points

    every: Any = entry_points()
    group = "opentelemetry_instrumentor"
    found = every.select(group=group) if hasattr(every, "select") else every.get(group, ())
    (entry,) = {one.value: one for one in found if one.name == "sekuire"}.values()
    instrumentor = entry.load()()
    assert isinstance(instrumentor, SekuireInstrumentor)
    assert list(instrumentor.instrumentation_dependencies()) == []
    instrumentor.instrument(tracer_provider=TracerProvider(), skip_dep_check=True)
    assert isinstance(instrumentation.current, bridge._OpenTelemetry)
    instrumentor.uninstrument()
    assert instrumentation.current is None


def test_a_wrong_option() -> None:
    with pytest.raises(ConfigurationError, match=r"continue_traces: must be True or False, got 'yes'"):
        instrument(continue_traces="yes")  # type: ignore[arg-type]


def test_without_an_sdk_nothing_is_made(worker_of: Make, scripted: Scripted) -> None:
    """With the API alone the watched code gets nothing to call, whatever the task has, and a span is not asked for."""
    instrument()
    try:
        watching = instrumentation.current
        assert watching is not None
        worker = worker_of(scripted)
        seen: List[Any] = []

        @worker.on_task("echo")
        def echo(ctx: TaskContext, input: Any) -> None:
            assert watching is not None
            seen.append((watching.begin_task(contextvars.copy_context(), ctx, "echo"), watching.begin_check(ctx)))

        assert run_task(worker, "echo", trace_id=TRACEPARENT).status == "completed"
        assert seen == [(None, None)]
        # By far more than it takes, for a machine that does other things too: benchmarks/parts.py measures it.
        context: Any = object()
        once = functools.partial(watching.begin_task, context, context, "echo")
        assert min(timeit.repeat(once, number=2000, repeat=5)) / 2000 < 20e-6
    finally:
        uninstrument()
