"""Trace and measure tasks with OpenTelemetry, from their submission to their handler (extra ``opentelemetry``).

Only OpenTelemetry's API is used. Unless the program sets up an SDK, nothing is recorded, and a task costs next to
nothing more. Names follow OpenTelemetry's semantic conventions for messaging.
"""

# Threads: any thread begins and ends spans. The state is written by instrument() and uninstrument(), and is two caches
# whose entries are made again if two threads make one at once.

from __future__ import annotations

import os
import re
import traceback
import weakref
from contextvars import Context
from typing import TYPE_CHECKING, Any, Callable, Collection, Dict, List, Mapping, Optional, Tuple, TypeVar
from urllib.parse import urlsplit

try:
    from opentelemetry import context as otel_context
    from opentelemetry import metrics, trace
    from opentelemetry.trace import Link, Span, SpanContext, SpanKind, Status, StatusCode, TraceFlags
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"sekuire.contrib.opentelemetry needs OpenTelemetry's API ({error}); run: pip install 'sekuire[opentelemetry]'",
        name=error.name,
    ) from error

from .._internal import instrumentation
from .._internal.clock import time
from .._internal.logs import get_logger
from .._internal.scrub import scrub
from ..errors import APIError, ConfigurationError
from ..handlers.context import TaskContext, control_of
from ..version import __version__
from ..wire.models import Failure

if TYPE_CHECKING:
    from opentelemetry.metrics import MeterProvider
    from opentelemetry.trace import TracerProvider

__all__ = ["SekuireInstrumentor", "instrument", "uninstrument"]

log = get_logger("sekuire.tracing")

_T = TypeVar("_T")
_Attributes = Dict[str, Any]

_SYSTEM = "sekuire"
#: What of a task is an attribute of its span, by the name in the context.
_FACTS = ("workspace_id", "requester_id", "parent_task_id", "workflow_id", "trace_id", "tool")
#: A W3C trace id, also as a UUID is written.
_TRACE_ID = re.compile(r"[0-9a-f]{32}|[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
#: Upper bounds of the durations' histogram in seconds, as the conventions advise them.
_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
#: Seconds for which a worker does not look again for an SDK that may have been set up.
_IDLE_TIME = 0.1
_propagator = TraceContextTextMapPropagator()


def instrument(
    *,
    tracer_provider: Optional[TracerProvider] = None,
    meter_provider: Optional[MeterProvider] = None,
    continue_traces: bool = True,
) -> None:
    """Trace and measure every task that this process submits or runs, from now on. ::

        from sekuire.contrib.opentelemetry import instrument

        instrument()

    A submission is a span *send CAPABILITY* of the kind producer. It travels in the task's ``trace_id``, as a W3C
    ``traceparent``, unless a ``trace_id`` or an ``idempotency_key`` is given. A run of a handler is a span *process
    CAPABILITY* of the kind consumer, which is linked to the submitter's span, and a child of it. It is the current span
    in the handler, also in an async one. In another process the handler runs in a further span, *run CAPABILITY*. The
    policy's decision before is a span *sekuire.policy.evaluate*.

    The metrics are ``messaging.client.sent.messages``, ``messaging.client.operation.duration`` (of submissions),
    ``messaging.client.consumed.messages`` and ``messaging.process.duration``.

    No span contains an input or a result. That of a failed task has its code as ``error.type``, and the text and the
    traceback of the handler's exception, without the secrets that the library knows.

    :param tracer_provider: None takes the program's own, also if it is set up later.
    :param meter_provider: the same for metrics.
    :param continue_traces: False begins a new trace with each task, which is then only linked to the submitter's span.
    """
    if not isinstance(continue_traces, bool):
        raise ConfigurationError(f"must be True or False, got {continue_traces!r}", "continue_traces")
    instrumentation.install(_OpenTelemetry(tracer_provider, meter_provider, continue_traces))


def uninstrument() -> None:
    """Undo :func:`instrument`. Tasks that run keep their spans."""
    instrumentation.install(None)


class SekuireInstrumentor:
    """Let ``opentelemetry-instrument`` find :func:`instrument` and call it, without a line in the program."""

    def instrumentation_dependencies(self) -> Collection[str]:
        """Return what must be installed to be instrumented: nothing but this package, which is."""
        return ()

    def instrument(self, **options: Any) -> None:
        """Call :func:`instrument` with the providers among ``options``."""
        known = ("tracer_provider", "meter_provider", "continue_traces")
        instrument(**{name: options[name] for name in known if name in options})

    def uninstrument(self, **options: Any) -> None:
        """Call :func:`uninstrument`."""
        uninstrument()


class _OpenTelemetry:
    """Watch tasks with one pair of providers."""

    def __init__(
        self, tracer_provider: Optional[TracerProvider], meter_provider: Optional[MeterProvider], continues: bool
    ) -> None:
        self._tracer_provider = tracer_provider
        self._meter_provider = meter_provider
        self._continues = continues
        self._tracer = trace.get_tracer(_SYSTEM, __version__, tracer_provider)
        meter = metrics.get_meter(_SYSTEM, __version__, meter_provider)
        self._sent = meter.create_counter(
            "messaging.client.sent.messages",
            "{message}",
            "Number of messages producer attempted to send to the broker.",
        )
        self._consumed = meter.create_counter(
            "messaging.client.consumed.messages", "{message}",
            "Number of messages that were delivered to the application.",
        )  # fmt: skip
        self._submit_time = _histogram(
            meter, "messaging.client.operation.duration",
            "Duration of messaging operation initiated by a producer or consumer client.",
        )  # fmt: skip
        self._process_time = _histogram(meter, "messaging.process.duration", "Duration of processing operation.")
        #: What every span and measurement of one worker has, by worker.
        self._of_worker: weakref.WeakKeyDictionary[Any, Tuple[_Attributes, _Attributes]] = weakref.WeakKeyDictionary()
        self._has_failed = False
        #: Until then (``time.monotonic()``) nothing records what a worker does.
        self._idle_until = 0.0

    # -- what records --

    def _listeners(self) -> Tuple[bool, bool]:
        """Return if anything records spans, and if anything records measurements."""
        now = time.monotonic()
        if now < self._idle_until:
            return False, False
        # A provider of the API itself drops everything. It is not asked, because a span costs more than this question.
        tracers = type(self._tracer_provider or trace.get_tracer_provider()).__module__
        meters = type(self._meter_provider or metrics.get_meter_provider()).__module__
        found = not tracers.startswith("opentelemetry.trace"), not meters.startswith("opentelemetry.metrics")
        if found == (False, False):
            # The question itself costs 2 µs.
            self._idle_until = now + _IDLE_TIME
        return found

    def fail(self, error: Exception) -> None:
        """Say once that OpenTelemetry, or what a program has added to it, raised. No task may suffer from it."""
        if not self._has_failed:
            self._has_failed = True
            log.warning("OpenTelemetry failed, tasks go on without it: %s: %s", type(error).__name__, error)

    # -- submissions --

    def begin_submit(
        self, capability: str, agent_id: Optional[str], fields: Mapping[str, Any], url: str
    ) -> Optional[_Submitting]:
        try:
            measured = {"messaging.operation.name": "send", "messaging.operation.type": "send", **_place(url)}
            # A capability that an agent lacks is a name like any other here: only registered ones have few values.
            measured.update({"messaging.system": _SYSTEM, "messaging.destination.name": str(capability)})
            attributes: _Attributes = {**measured, **_known(agent_id=agent_id, workspace_id=fields.get("workspace_id"))}
            span = self._tracer.start_span(f"send {capability}", kind=SpanKind.PRODUCER, attributes=attributes)
            return _Submitting(self, span, measured, fields)
        except Exception as error:  # noqa: BLE001  # Of a program's own sampler or processor.
            self.fail(error)
            return None

    def count_submit(self, measured: _Attributes, seconds: float, code: Optional[str]) -> None:
        _count(self._sent, self._submit_time, measured, seconds, code)

    # -- tasks --

    def begin_task(self, space: Context, context: TaskContext, name: str) -> Optional[_Processing]:
        try:
            is_tracing, is_measuring = self._listeners()
            if not is_tracing and not is_measuring:
                return None
            operation = {"messaging.operation.name": "process", "messaging.operation.type": "process"}
            of_spans, of_metrics = self._facts_of_worker(context)
            # A handler for "*" accepts names that nobody has registered; too many for a metric.
            known = "messaging.destination.template" if name == "*" else "messaging.destination.name"
            measured = {**operation, **of_metrics, known: name} if is_measuring else None
            span = None
            if is_tracing:
                attributes = {**operation, **of_spans, known: name, **_facts_of_task(context)}
                span = self._start(f"process {name}", SpanKind.CONSUMER, context, attributes)
                space.run(otel_context.attach, trace.set_span_in_context(span, otel_context.get_current()))
            return _Processing(self, span, measured)
        except Exception as error:  # noqa: BLE001
            self.fail(error)
            return None

    def begin_check(self, context: TaskContext) -> Optional[_Checking]:
        try:
            if not self._listeners()[0]:
                return None
            attributes = {
                "messaging.message.id": context.task_id,
                "sekuire.capability": context.capability,
                **_known(tool=context.tool, workspace_id=context.workspace_id),
            }
            return _Checking(self, self._start("sekuire.policy.evaluate", SpanKind.INTERNAL, context, attributes))
        except Exception as error:  # noqa: BLE001
            self.fail(error)
            return None

    def remote(self) -> Optional[_Remote]:
        try:
            carrier: Dict[str, str] = {}
            _propagator.inject(carrier)
            return _Remote(carrier) if carrier else None
        except Exception as error:  # noqa: BLE001
            self.fail(error)
            return None

    def count_task(self, measured: _Attributes, seconds: float, code: Optional[str]) -> None:
        _count(self._consumed, self._process_time, measured, seconds, code)

    def guarded(self, record: Callable[[], object]) -> None:
        """Call ``record()``, and let nothing that it raises reach a task."""
        try:
            record()
        except Exception as error:  # noqa: BLE001
            self.fail(error)

    def _start(self, name: str, kind: SpanKind, context: TaskContext, attributes: _Attributes) -> Span:
        submitter = _submitter_of(context.trace_id)
        links: List[Link] = []
        parent = None
        if submitter is not None:
            # A link to a trace without a span is dropped unless it says something more.
            links = [Link(submitter, None if submitter.is_valid else {"sekuire.trace_id": context.trace_id or ""})]
            if self._continues and submitter.is_valid:
                parent = trace.set_span_in_context(trace.NonRecordingSpan(submitter))
        return self._tracer.start_span(name, parent, kind, attributes, links)

    def _facts_of_worker(self, context: TaskContext) -> Tuple[_Attributes, _Attributes]:
        """Return what spans, and what measurements, say of the worker that runs the task."""
        owner = control_of(context).owner
        config = getattr(owner, "config", None)
        if config is None:
            return {"messaging.system": _SYSTEM}, {"messaging.system": _SYSTEM}
        found = self._of_worker.get(owner)
        if found is None:
            measured = {"messaging.system": _SYSTEM, **_place(config.api_base_url)}
            # The worker's id is another one after each start: too many for a metric.
            own = {"messaging.client.id": owner.worker_id, "sekuire.agent_id": config.agent_id}
            found = self._of_worker[owner] = ({**measured, **own}, measured)
        return found


class _Submitting:
    """Watch one submission, from its preparation to the platform's answer."""

    def __init__(self, owner: _OpenTelemetry, span: Span, measured: _Attributes, fields: Mapping[str, Any]) -> None:
        self._owner = owner
        self._span: Optional[Span] = span
        self._measured = measured
        self.trace_id: Optional[str] = None
        given = fields.get("trace_id")
        if given is not None:
            span.set_attribute("sekuire.trace_id", str(given))
        elif fields.get("idempotency_key") is None:
            # A second submission under the same key must have the same body, so with the submitter's key nothing of
            # this call may get into it.
            carrier: Dict[str, str] = {}
            _propagator.inject(carrier, trace.set_span_in_context(span))
            self.trace_id = carrier.get("traceparent")

    def run(self, send: Callable[[], _T]) -> _T:
        span, self._span = self._span, None
        if span is None:
            # The same prepared task is sent again.
            return send()
        began = time.monotonic()
        code: Optional[str] = None
        text = ""
        token = otel_context.attach(trace.set_span_in_context(span))
        try:
            handle = send()
            self._owner.guarded(lambda: span.set_attribute("messaging.message.id", str(getattr(handle, "id", ""))))
            return handle
        except BaseException as error:
            code = (isinstance(error, APIError) and error.code) or type(error).__name__
            text = scrub(str(error))
            raise
        finally:
            otel_context.detach(token)
            seconds = time.monotonic() - began
            self._owner.guarded(lambda: self._owner.count_submit(self._measured, seconds, code))
            self._owner.guarded(lambda: _end(span, code, text))


class _Processing:
    """Watch one run of a handler."""

    def __init__(self, owner: _OpenTelemetry, span: Optional[Span], measured: Optional[_Attributes]) -> None:
        self._owner = owner
        self._span = span
        self._measured = measured
        self._began = time.monotonic()

    def note_error(self, error: BaseException) -> None:
        span = self._span
        if span is not None and span.is_recording():
            self._owner.guarded(lambda: _add_exception(span, error))

    def end(self, failure: Optional[Failure], policy: Any = None) -> None:
        seconds = time.monotonic() - self._began
        code = None if failure is None else failure.code
        try:
            if self._measured is not None:
                self._owner.count_task(self._measured, seconds, code)
            if self._span is not None:
                _end(self._span, code, "" if failure is None else failure.message)
        except Exception as error:  # noqa: BLE001
            self._owner.fail(error)


class _Checking:
    """Watch one policy check."""

    def __init__(self, owner: _OpenTelemetry, span: Span) -> None:
        self._owner = owner
        self._span = span

    def note_error(self, error: BaseException) -> None:
        pass

    def end(self, failure: Optional[Failure], policy: Any = None) -> None:
        try:
            span = self._span
            decided = getattr(policy, "policy", None)
            facts = _known(prefix="sekuire.policy.", id=getattr(decided, "policy_id", None),
                           version=getattr(decided, "version", None),
                           rule=None if failure is None or failure.details is None else failure.details.get("rule"),
                           decision="allowed" if failure is None else "denied")  # fmt: skip
            span.set_attributes(facts)
            # A denial is what the check is for. Only one that could not decide has failed.
            is_error = failure is not None and failure.code == "policy_unavailable"
            _end(span, failure.code if is_error and failure else None, failure.message if failure else "")
        except Exception as error:  # noqa: BLE001
            self._owner.fail(error)


class _Remote:
    """Continue a trace in the process that runs the handler, with the tracer of that process."""

    def __init__(self, carrier: Dict[str, str]) -> None:
        self._carrier = carrier

    def run(self, context: TaskContext, function: Callable[[], _T]) -> _T:
        span: Optional[Span] = None
        token = None
        try:
            parent = _propagator.extract(self._carrier, otel_context.Context())
            facts: _Attributes = {"messaging.message.id": context.task_id, "process.pid": os.getpid()}
            tracer = trace.get_tracer(_SYSTEM, __version__)
            span = tracer.start_span(f"run {context.capability}", parent, SpanKind.INTERNAL, facts)
            # Without an SDK an older API makes a span of no trace, and what the handler calls would lose it.
            is_known = span.get_span_context().is_valid
            token = otel_context.attach(trace.set_span_in_context(span) if is_known else parent)
        except Exception as error:  # noqa: BLE001
            log.warning("OpenTelemetry failed, the task goes on without it: %s: %s", type(error).__name__, error)
        failed: Optional[BaseException] = None
        try:
            return function()
        except BaseException as error:
            failed = error
            raise
        finally:
            try:
                if token is not None:
                    otel_context.detach(token)
                if span is not None:
                    _end(span, None if failed is None else type(failed).__name__, "")
            except Exception as error:  # noqa: BLE001
                log.warning("OpenTelemetry failed: %s: %s", type(error).__name__, error)
            finally:
                failed = None


# -- building blocks --------------------------------------------------------------------------------------------------


def _histogram(meter: metrics.Meter, name: str, description: str) -> metrics.Histogram:
    try:
        return meter.create_histogram(name, "s", description, explicit_bucket_boundaries_advisory=_BOUNDS)
    except TypeError:
        # OpenTelemetry before 1.30 has no advice about buckets.
        return meter.create_histogram(name, "s", description)


def _count(
    number: metrics.Counter, time_taken: metrics.Histogram, measured: _Attributes, seconds: float, code: Optional[str]
) -> None:
    if code is not None:
        measured = {**measured, "error.type": code}
    number.add(1, measured)
    time_taken.record(seconds, measured)


def _end(span: Span, code: Optional[str], message: str) -> None:
    if code is not None:
        span.set_attribute("error.type", code)
        span.set_status(Status(StatusCode.ERROR, message))
    span.end()


def _add_exception(span: Span, error: BaseException) -> None:
    # Not Span.record_exception(): its texts may hold secrets.
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    span.add_event(
        "exception",
        {
            "exception.type": type(error).__qualname__,
            "exception.message": scrub(str(error)),
            "exception.stacktrace": scrub(text),
        },
    )


def _facts_of_task(context: TaskContext) -> _Attributes:
    facts = {
        "messaging.destination.name": context.capability,
        "messaging.message.id": context.task_id,
        "sekuire.attempt": context.attempt,
    }
    return {**facts, **_known(**{name: getattr(context, name) for name in _FACTS})}


def _known(prefix: str = "sekuire.", **values: Any) -> _Attributes:
    return {prefix + name: value for name, value in values.items() if value is not None}


_places: Dict[str, _Attributes] = {}


def _place(url: str) -> _Attributes:
    """Return the attributes that say where a platform is."""
    found = _places.get(url)
    if found is None:
        parts = urlsplit(url)
        port = parts.port or {"https": 443, "http": 80}.get(parts.scheme)
        found = _places[url] = {"server.address": parts.hostname or "", **({"server.port": port} if port else {})}
    return found


def _submitter_of(trace_id: Optional[str]) -> Optional[SpanContext]:
    """Return whose trace a task continues: a span by its ``traceparent``, or a trace without a span by its id."""
    if trace_id is None:
        return None
    if _TRACE_ID.fullmatch(trace_id):
        number = int(trace_id.replace("-", ""), 16)
        return SpanContext(number, 0, is_remote=True, trace_flags=TraceFlags(0)) if number else None
    if trace_id.count("-") < 3:
        return None
    context = _propagator.extract({"traceparent": trace_id}, otel_context.Context())
    submitter = trace.get_current_span(context).get_span_context()
    return submitter if submitter.is_valid else None
