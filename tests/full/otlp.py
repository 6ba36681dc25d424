"""A receiver of OpenTelemetry's protocol, OTLP over HTTP, that keeps the spans and metrics which come."""

from __future__ import annotations

import gzip
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Dict, List, NamedTuple

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

_KINDS: Dict[str, Any] = {
    "/v1/traces": (ExportTraceServiceRequest, ExportTraceServiceResponse),
    "/v1/metrics": (ExportMetricsServiceRequest, ExportMetricsServiceResponse),
}


class SentSpan(NamedTuple):
    """One span, as it was on the wire."""

    name: str
    kind: int
    trace_id: str
    span_id: str
    parent_id: str
    links: List[str]
    attributes: Dict[str, Any]
    #: Which program it came from: its process id.
    pid: Any
    service: Any
    #: Begin and end in nanoseconds of the wall clock.
    begin: int
    end: int


class Receiver:
    """Serve ``/v1/traces`` and ``/v1/metrics`` on a port of its own: ``with Receiver() as receiver``."""

    def __init__(self) -> None:
        self.spans: List[SentSpan] = []
        #: The names of the metrics that came.
        self.metrics: Dict[str, Any] = {}
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                ask, answer = _KINDS[self.path]
                outer._keep(ask.FromString(body))
                data = answer().SerializeToString()
                self.send_response(200)
                self.send_header("Content-Type", "application/x-protobuf")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def named(self, name: str) -> List[SentSpan]:
        with self._lock:
            return [span for span in self.spans if span.name == name]

    def _keep(self, request: Any) -> None:
        with self._lock:
            if isinstance(request, ExportMetricsServiceRequest):
                for resource in request.resource_metrics:
                    for scope in resource.scope_metrics:
                        self.metrics.update({metric.name: metric for metric in scope.metrics})
                return
            for resource in request.resource_spans:
                facts = _values(resource.resource.attributes)
                for scope in resource.scope_spans:
                    self.spans += [_read(span, facts) for span in scope.spans]

    def __enter__(self) -> Receiver:
        self._thread.start()
        return self

    def __exit__(self, *args: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def _read(span: Any, resource: Dict[str, Any]) -> SentSpan:
    return SentSpan(
        name=span.name,
        kind=span.kind,
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        links=[link.span_id.hex() for link in span.links],
        attributes=_values(span.attributes),
        pid=resource.get("process.pid"),
        service=resource.get("service.name"),
        begin=span.start_time_unix_nano,
        end=span.end_time_unix_nano,
    )


def _values(attributes: Any) -> Dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in attributes}


# -- a figure ---------------------------------------------------------------------------------------------------------

_COLOURS = ("#4c6ef5", "#12b886", "#f59f00", "#e64980")
_LEFT, _RIGHT, _ROW = 210, 690, 26


def waterfall(spans: List[SentSpan]) -> str:
    """Return an SVG of a trace: a row for each span, a colour for each process."""
    ordered = sorted(spans, key=lambda span: span.begin)
    first, last = ordered[0].begin, max(span.end for span in ordered)
    depths: Dict[str, int] = {}
    pids: List[Any] = []
    rows: List[str] = []
    for number, span in enumerate(ordered):
        depths[span.span_id] = depths.get(span.parent_id, -1) + 1
        if span.pid not in pids:
            pids.append(span.pid)
        colour = _COLOURS[pids.index(span.pid) % len(_COLOURS)]
        x = _LEFT + (span.begin - first) / (last - first) * (_RIGHT - _LEFT)
        width = max(2.0, (span.end - span.begin) / (last - first) * (_RIGHT - _LEFT))
        y = 34 + number * _ROW
        milliseconds = (span.end - span.begin) / 1e6
        inside, is_early = width > 80, x < (_LEFT + _RIGHT) / 2
        rows.append(
            f'<text x="{16 + 12 * depths[span.span_id]}" y="{y + 13}">{span.name}</text>'
            f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="18" rx="3" fill="{colour}"/>'
            f'<text x="{x + (width - 6 if inside else width + 6 if is_early else -6):.1f}" y="{y + 13}" '
            f'text-anchor="{"start" if is_early and not inside else "end"}" '
            f'fill="{"#fff" if inside else "#495057"}">{milliseconds:.1f} ms</text>'
        )
    names = ("the submitter", "the worker", "the handler's process", "another process")
    y = 34 + len(ordered) * _ROW + 18
    legend = "".join(
        f'<rect x="{16 + 180 * number}" y="{y - 10}" width="12" height="12" rx="2" fill="{_COLOURS[number]}"/>'
        f'<text x="{34 + 180 * number}" y="{y}">{names[number]}</text>'
        for number in range(min(len(pids), len(_COLOURS)))
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 {y + 16}" font-family="sans-serif" font-size="12">'
        f'<rect width="720" height="{y + 16}" rx="6" fill="#f8f9fa"/><g fill="#212529">'
        f'<text x="16" y="22" font-weight="bold">One trace over three processes</text>'
        f"{''.join(rows)}{legend}</g></svg>\n"
    )
