"""The library's worker with a handler that does nothing, in a process of its own, so that its cost is its own.

It says when it is connected; ``usage`` reports what the process has used so far, ``latencies`` the times from the
platform's send to the handler's first line since it was last asked.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import threading
import time
from typing import Any, Callable, Dict, Iterator, List, Optional

from . import payloads
from .process import hear, say, usage


def _find_create_worker() -> Optional[Callable[..., Any]]:
    """``sekuire.create_worker``, or None in a checkout that has none yet."""
    found: Optional[Callable[..., Any]] = getattr(importlib.import_module("sekuire"), "create_worker", None)
    return found


def is_available() -> bool:
    """Whether there is a worker to measure."""
    return _find_create_worker() is not None


def _gateway(port: int) -> Dict[str, Any]:
    """The options of a worker with a policy gateway, which share the worker's credentials."""
    from sekuire import PolicyClient, PolicyGateway, RuntimeCredentialsStore

    store = RuntimeCredentialsStore()
    client = PolicyClient(f"http://127.0.0.1:{port}", credentials_store=store)
    gateway = PolicyGateway(client, payloads.WORKSPACE_ID)
    return {"credentials_store": store, "policy_gateway": gateway, "policy_required": True}


def _trace() -> None:
    """Instrument this process with OpenTelemetry's SDK, which keeps each span and exports none."""
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

    from sekuire.contrib.opentelemetry import instrument

    class Nowhere(SpanExporter):
        def export(self, spans: Any) -> Any:
            return SpanExportResult.SUCCESS

    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(Nowhere()))
    instrument(tracer_provider=provider)


def _stats(worker: Any) -> Dict[str, int]:
    stats = worker.stats()
    names = (
        "received",
        "waiting",
        "completed",
        "failed",
        "rejected",
        "duplicates",
        "dropped",
        "undelivered",
        "reconnects",
    )
    return {name: getattr(stats, name) for name in names}


def main(arguments: Optional[List[str]] = None) -> None:
    """Run a worker until the parent has no more questions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--handlers", type=int, default=1, help="capabilities registered")
    parser.add_argument("--options", type=json.loads, default={}, metavar="JSON", help="more options of create_worker")
    parser.add_argument("--policy", action="store_true", help="with a policy gateway")
    parser.add_argument("--features", action="store_true", help="with a resource, and with health and metrics")
    parser.add_argument("--tracing", action="store_true", help="with OpenTelemetry's SDK")
    parser.add_argument("--compute", type=float, default=0.0, metavar="MS", help="CPU time that the handler uses")
    options = parser.parse_args(arguments)

    # As in a service that has set up its logging: warnings are shown, and what is below is not formatted.
    logging.basicConfig(level=logging.WARNING)
    create_worker = _find_create_worker()
    if create_worker is None:
        say({"error": "sekuire.create_worker does not exist"})
        return
    worker = create_worker(
        **{
            "api_base_url": f"http://127.0.0.1:{options.port}",
            "agent_id": payloads.AGENT_ID,
            "runtime_token": payloads.RUNTIME_TOKEN,
            "installation_id": payloads.INSTALLATION_ID,
            "capabilities": [payloads.CAPABILITY],
            "max_workers": options.threads,
            **options.options,
            **({"health": ("127.0.0.1", 0)} if options.features else {}),
            **(_gateway(options.port) if options.policy else {}),
        }
    )
    clock = time.monotonic_ns
    latencies: List[int] = []
    timed = False
    result = payloads.result()
    gate = threading.Event()
    gate.set()

    def handle(context: Any, document: Dict[str, Any]) -> Dict[str, Any]:
        if not gate.is_set():
            gate.wait()
        if timed:
            latencies.append(clock() - document["sent_ns"])
        return result

    def compute(context: Any, document: Dict[str, Any]) -> Dict[str, Any]:
        end = time.thread_time() + options.compute / 1e3
        while time.thread_time() < end:
            sum(range(200))
        return result

    def pool() -> Iterator[List[int]]:
        yield []

    def handle_with_pool(context: Any, document: Dict[str, Any], *, pool: List[int]) -> Dict[str, Any]:
        return handle(context, document)

    if options.tracing:
        _trace()
    if options.features:
        worker.resource(pool)
    chosen = compute if options.compute else handle_with_pool if options.features else handle
    worker.on_task(payloads.CAPABILITY, chosen)
    for number in range(1, options.handlers):
        worker.on_task(f"bench.other-{number}", lambda context, document: None)
    worker.start(block=False)
    try:
        if not worker.wait_until_connected(15.0):
            say({"error": "the worker did not connect within 15 s"})
            return
        say({"ready": True})
        while True:
            order = hear()
            if order is None:
                return
            if order["op"] == "usage":
                say({**usage(), **_stats(worker)})
            elif order["op"] == "time":
                timed = True
                latencies.clear()
                say({})
            elif order["op"] == "hold":
                gate.clear()
                say({})
            elif order["op"] == "release":
                gate.set()
                say({})
            elif order["op"] == "latencies":
                timed = False
                say({"latencies_ns": latencies})
            else:
                say({"error": f"no such order: {order['op']}"})
    finally:
        worker.stop(timeout=5.0)


if __name__ == "__main__":
    main()
