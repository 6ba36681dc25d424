"""A worker with one of the parts that can be put around a handler, in a process of its own.

``--part`` names it; ``usage`` reports what this process and those of its executor have used so far.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import time
import timeit
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any, Callable, Dict, Iterator, List, Optional

import sekuire
from sekuire import CallNext, TaskContext, TaskRegistry, Worker
from sekuire._internal import instrumentation
from sekuire.handlers.outcome import run as run_handler
from sekuire.health.meter import Meter
from sekuire.wire.models import Task
from sekuire.wire.protocol import completion_head
from sekuire.worker.answers import measure
from sekuire.worker.records import Record

from . import handlers, payloads
from .process import Message, hear, say, usage

Setup = Callable[[Worker], None]


def _plain(worker: Worker) -> None:
    worker.on_task(payloads.CAPABILITY, handlers.plain)


def _registry(worker: Worker) -> None:
    tasks = TaskRegistry()
    tasks.task(payloads.CAPABILITY, handlers.plain)
    worker.include(tasks)


def _middleware(count: int) -> Setup:
    def passing(ctx: TaskContext, input: Any, call_next: CallNext) -> Any:
        return call_next(input)

    def set_up(worker: Worker) -> None:
        _plain(worker)
        for _ in range(count):
            worker.middleware(passing)

    return set_up


def _handler(name: str) -> Setup:
    return lambda worker: worker.on_task(payloads.CAPABILITY, getattr(handlers, name)) and None


def _opentelemetry(sampled: Optional[float] = None, *, measures: bool = False) -> Setup:
    """Instrument, with an SDK if ``sampled`` says which part of the traces it keeps. What it keeps is discarded."""

    def set_up(worker: Worker) -> None:
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import InMemoryMetricReader
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
        from opentelemetry.sdk.trace.sampling import TraceIdRatioBased

        from sekuire.contrib.opentelemetry import instrument

        class Discarding(SpanExporter):
            def export(self, spans: Any) -> SpanExportResult:
                return SpanExportResult.SUCCESS

        _plain(worker)
        tracers = None
        if sampled is not None:
            tracers = TracerProvider(sampler=TraceIdRatioBased(sampled))
            tracers.add_span_processor(BatchSpanProcessor(Discarding()))
        instrument(
            tracer_provider=tracers, meter_provider=MeterProvider([InMemoryMetricReader()]) if measures else None
        )

    return set_up


def _resource(scope: str) -> Setup:
    def shared() -> Iterator[int]:
        yield 1

    def set_up(worker: Worker) -> None:
        worker.on_task(payloads.CAPABILITY, handlers.sharing)
        worker.resource(shared, scope=scope)

    return set_up


def _health(worker: Worker) -> None:
    _plain(worker)
    worker.reconfigure(health=("127.0.0.1", 0))


#: What is measured, by name: a label, and what sets the worker up.
PARTS: Dict[str, Any] = {
    "bare": ("a plain handler", _plain),
    "registry": ("from a TaskRegistry", _registry),
    "middleware-1": ("1 middleware", _middleware(1)),
    "middleware-4": ("4 middlewares", _middleware(4)),
    "async": ("an async handler", _handler("later")),
    "dataclass": ("input: a dataclass with 8 lines (cattrs)", _handler("dataclass_in")),
    "typeddict": ("input: the same as TypedDicts (cattrs)", _handler("typed_dict_in")),
    "pydantic": ("input: the same as a pydantic model", _handler("pydantic_in")),
    "resource": ("a resource of the worker", _resource("worker")),
    "resource-task": ("a resource of the task", _resource("task")),
    "result": ("result: a dataclass", _handler("dataclass_out")),
    "opentelemetry": ("OpenTelemetry, without an SDK", _opentelemetry()),
    "traces-dropped": ("OpenTelemetry, no trace is sampled", _opentelemetry(0.0)),
    "traces": ("OpenTelemetry, traces", _opentelemetry(1.0)),
    "traces-metrics": ("OpenTelemetry, traces and metrics", _opentelemetry(1.0, measures=True)),
    "health": ("health and metrics", _health),
    "threads": ("executor=ThreadPoolExecutor(1)", _plain),
    "processes": ("executor=ProcessExecutor(1)", _plain),
}


def alone(part: str, seconds: float, repeats: int = 7) -> List[float]:
    """CPU µs of one run of the handler and the encoding of its result, with nothing else of a task; of each repeat."""
    worker = sekuire.create_worker(agent_id=payloads.AGENT_ID, runtime_token=payloads.RUNTIME_TOKEN)
    PARTS[part][1](worker)
    worker.handlers.freeze()
    for resource in worker.handlers.resources:
        if worker.handlers.opened is not None:
            worker.handlers.opened.get(resource.name)
    entry = worker.handlers.find(payloads.CAPABILITY)
    assert entry is not None
    task = Task(task_id=payloads.task_id(1), capability=payloads.CAPABILITY, input=payloads.task_input())
    context = TaskContext(task)
    meter = Meter([payloads.CAPABILITY]) if worker.config.health is not None else None
    sink: Any = None  # Nothing is sent.
    record = Record(task, entry, sink, task.task_id)

    def run() -> None:
        began = time.monotonic()
        completion = run_handler(entry, context, task.input, began=began, expose_errors=True)
        if completion.failure is not None:
            raise RuntimeError(completion.failure.message)
        completion_head(completion)
        # As at the end of each task, where a worker with metrics counts it.
        if meter is not None:
            record.began = began
            measure(meter, record, completion, None, False)

    timer = timeit.Timer(run, timer=time.process_time)
    number = max(1, int(seconds / repeats / max(timer.timeit(20) / 20, 1e-7)))
    try:
        found = timer.repeat(repeats, number)
    finally:
        # The next part is measured in this process too.
        instrumentation.install(None)
    return [took * 1e6 / number for took in found]


def _executor(part: str, stack: ExitStack) -> Any:
    if part == "threads":
        return stack.enter_context(ThreadPoolExecutor(1))
    if part == "processes":
        return stack.enter_context(sekuire.ProcessExecutor(1))
    return None


def _of_children() -> int:
    """CPU time in ns of the processes that this one has started."""
    ticks = 0
    for child in multiprocessing.active_children():
        with open(f"/proc/{child.pid}/stat", encoding="ascii", errors="replace") as stat:
            fields = stat.read().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks * 10**9 // os.sysconf("SC_CLK_TCK")


def main(arguments: Optional[List[str]] = None) -> None:
    """Run the worker until the parent has no more questions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--part", choices=list(PARTS), required=True)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING)
    with ExitStack() as stack:
        worker = sekuire.create_worker(
            api_base_url=f"http://127.0.0.1:{options.port}",
            agent_id=payloads.AGENT_ID,
            runtime_token=payloads.RUNTIME_TOKEN,
            installation_id=payloads.INSTALLATION_ID,
            max_workers=1,
            max_queued=8,
            executor=_executor(options.part, stack),
        )
        PARTS[options.part][1](worker)
        with worker:
            if not worker.wait_until_connected(15.0):
                say({"error": "the worker did not connect within 15 s"})
                return
            say({"ready": True})
            while hear() is not None:
                figures: Message = usage()
                figures["cpu_ns"] += _of_children()
                say(figures)


if __name__ == "__main__":
    main()
