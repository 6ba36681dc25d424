"""Traces and metrics of whole programs, over OpenTelemetry's protocol."""

from __future__ import annotations

import os
import pathlib
import shutil
import signal
import subprocess
import sys
from typing import Any, Dict, List

import pytest

from sekuire.local import LocalPlatform

from ..cli.conftest import clean_environ
from ..conftest import AGENT
from ..docs.markdown import ROOT
from ..support.waiting import GUARD, until

pytest.importorskip("opentelemetry.proto")

from .otlp import Receiver, SentSpan, waterfall

pytestmark = pytest.mark.full

FIGURE = ROOT / "docs/_static/trace.svg"

#: Handlers in a process of their own.
JOBS = """
import os
import time

from opentelemetry import trace

from sekuire import ProcessExecutor, SekuireSDK, TaskRegistry

tasks = TaskRegistry()


@tasks.task("begin")
def begin(ctx, input):
    return "the process is there"


@tasks.task("greet")
def greet(ctx, input):
    with trace.get_tracer("jobs").start_as_current_span("look up the name"):
        time.sleep(0.03)
        return {"greeting": f"Hello, {input['name']}!", "pid": os.getpid()}


def make_worker():
    worker = SekuireSDK.from_env().create_task_worker(executor=ProcessExecutor(1), max_workers=1)
    worker.include(tasks)
    return worker
"""

SUBMIT = """
from opentelemetry import trace

from sekuire import SekuireClient

with SekuireClient.from_env() as client:
    client.call("begin", wait=180.0)
    with trace.get_tracer("shop").start_as_current_span("order"):
        print(client.call("greet", {"name": "Ada"}, wait=180.0)["pid"])
"""

#: What a program writes that sets up the SDK itself.
SET_UP = """
import os

from opentelemetry import metrics, trace
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

from sekuire.contrib.opentelemetry import instrument

resource = Resource.create({"process.pid": os.getpid()})
provider = TracerProvider(resource=resource)
provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
trace.set_tracer_provider(provider)
metrics.set_meter_provider(MeterProvider([PeriodicExportingMetricReader(OTLPMetricExporter())], resource=resource))
instrument()
"""


@pytest.mark.parametrize("is_automatic", [False, True], ids=["own", "opentelemetry-instrument"])
def test_one_trace_over_three_processes(platform: LocalPlatform, tmp_path: pathlib.Path, is_automatic: bool) -> None:
    """The program that submits, the worker and the handler's process send the spans of one trace."""
    set_up = "" if is_automatic else SET_UP
    (tmp_path / "jobs.py").write_text(set_up + JOBS)
    (tmp_path / "submit.py").write_text(set_up + SUBMIT)
    program = [shutil.which("opentelemetry-instrument", path=os.path.dirname(sys.executable))] if is_automatic else []
    assert None not in program, "tox -e full installs opentelemetry-distro; here it is missing"
    with Receiver() as receiver:
        environ = environment(platform, receiver, tmp_path)
        command = [*map(str, program), sys.executable, "-m", "sekuire", "worker", "jobs:make_worker"]
        with open(tmp_path / "worker.log", "w+b") as log:
            worker = subprocess.Popen(command, cwd=tmp_path, env=environ, stdout=log, stderr=log)
            try:
                until(platform.installations)
                command = [*map(str, program), sys.executable, "submit.py"]
                submitted = subprocess.run(
                    command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=GUARD, check=False
                )
                assert submitted.returncode == 0, submitted.stderr
                worker.send_signal(signal.SIGTERM)
                assert worker.wait(GUARD) == 0, (tmp_path / "worker.log").read_text()
            finally:
                if worker.poll() is None:
                    worker.kill()
                    worker.wait()
        names = ["order", "send greet", "process greet", "run greet", "look up the name"]
        # The worker has ended, and its process with it. They send what they have before that.
        chain = [one for name in names for one in receiver.named(name)]
        assert [span.name for span in chain] == names, (tmp_path / "worker.log").read_text()
        metrics = receiver.metrics
    assert len({span.trace_id for span in chain}) == 1
    assert [span.parent_id for span in chain[1:]] == [span.span_id for span in chain[:-1]]
    assert chain[2].links == [chain[1].span_id]
    handled_by = int(submitted.stdout)
    assert chain[3].attributes["process.pid"] == handled_by
    if not is_automatic:
        assert chain[0].pid == chain[1].pid
        assert [chain[2].pid, chain[3].pid, chain[4].pid] == [worker.pid, handled_by, handled_by]
    assert {
        "messaging.client.sent.messages", "messaging.client.operation.duration",
        "messaging.client.consumed.messages", "messaging.process.duration",
    } <= set(metrics)  # fmt: skip
    if not is_automatic:
        draw_figure([span for span in receiver.spans if span.trace_id == chain[0].trace_id])


def draw_figure(spans: List[SentSpan]) -> None:
    """Draw the trace for the documentation if SEKUIRE_FIGURES says so; else check that the figure shows this trace."""
    if os.environ.get("SEKUIRE_FIGURES") == "1":
        FIGURE.write_text(waterfall(spans), encoding="utf-8")
    drawn = FIGURE.read_text(encoding="utf-8")
    assert [span.name for span in spans if f">{span.name}<" not in drawn] == []


def environment(platform: LocalPlatform, receiver: Receiver, directory: pathlib.Path) -> Dict[str, str]:
    more: Dict[str, Any] = {
        "SEKUIRE_API_URL": platform.url,
        "SEKUIRE_AGENT_ID": AGENT,
        "SEKUIRE_API_KEY": platform.api_key,
        "SEKUIRE_INSTALL_TOKEN": platform.create_install_token(AGENT),
        "SEKUIRE_CREDENTIALS_FILE": str(directory / "credentials.json"),
        "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url,
        "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
        "OTEL_TRACES_EXPORTER": "otlp",
        "OTEL_METRICS_EXPORTER": "otlp",
        "OTEL_LOGS_EXPORTER": "none",
        "OTEL_SERVICE_NAME": "shop",
        "PYTHONPATH": str(directory),
    }
    return clean_environ(**more)
