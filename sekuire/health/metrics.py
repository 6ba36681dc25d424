"""Write metrics as Prometheus reads them. Only this module imports ``prometheus_client`` (extra ``metrics``)."""

from __future__ import annotations

from typing import Any, Callable, Iterable, Iterator, List, Mapping, Optional, Sequence, Tuple

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from ..version import __version__
from ..wire.models import WorkerHealth
from .meter import BOUNDS, Histogram

_AGENT = ("agent_id",)
#: Name of a count → the metric, without ``_total``, and its help.
_COUNTERS: Mapping[str, Tuple[str, str]] = {
    "received": ("sekuire_tasks_received", "Task events that came, repeated deliveries too."),
    "released": ("sekuire_tasks_released", "Tasks that went back to the platform before they began."),
    "duplicates": ("sekuire_tasks_duplicate", "Deliveries of a task that was known already."),
    "dropped": ("sekuire_events_dropped", "Events and results that could not be used or were not wanted any more."),
    "reconnects": ("sekuire_stream_reconnects", "Times that the task stream was opened again."),
}
_Value = Callable[[List[WorkerHealth]], Optional[float]]


def _least(values: Iterable[Optional[float]]) -> Optional[float]:
    return min((value for value in values if value is not None), default=None)


def _most(values: Iterable[Optional[float]]) -> Optional[float]:
    return max((value for value in values if value is not None), default=None)


#: Metric → its help, and its value for the workers of one agent; None for no sample.
_GAUGES: Mapping[str, Tuple[str, _Value]] = {
    "sekuire_workers": ("Workers of this process.", len),
    "sekuire_workers_ready": ("Workers that would run a task now.", lambda all_: sum(one.ready for one in all_)),
    "sekuire_workers_paused": ("Workers that are paused.", lambda all_: sum("paused" in one.reasons for one in all_)),
    "sekuire_workers_draining": (
        "Workers that stop.",
        lambda all_: sum("draining" in one.reasons for one in all_),
    ),
    "sekuire_tasks_running": ("Tasks that run now.", lambda all_: sum(one.stats.running for one in all_)),
    "sekuire_tasks_running_limit": ("Tasks that can run at once.", lambda all_: sum(one.max_workers for one in all_)),
    "sekuire_tasks_waiting": (
        "Tasks that wait for a thread, the lease, or results to be delivered.",
        lambda all_: sum(one.stats.waiting for one in all_),
    ),
    "sekuire_tasks_overdue": (
        "Handlers that still run although their task has ended.",
        lambda all_: sum(one.stats.overdue for one in all_),
    ),
    "sekuire_results_undelivered": (
        "Results that the platform has not accepted yet.",
        lambda all_: sum(one.stats.undelivered for one in all_),
    ),
    "sekuire_approvals_waiting": (
        "Approvals that somebody has to decide.",
        lambda all_: sum(one.approvals_waiting for one in all_),
    ),
    "sekuire_lease_remaining_seconds": (
        "Seconds to the end of the lease, negative after it; no sample without a lease.",
        lambda all_: _least(one.lease_seconds_left for one in all_),
    ),
    "sekuire_heartbeat_age_seconds": (
        "Seconds since the last heartbeat that the platform accepted.",
        lambda all_: _most(one.heartbeat_age for one in all_),
    ),
}


class _Collected(Collector):
    """Yield the metrics of what is to be seen of each agent."""

    def __init__(self, sights: Sequence[Any]) -> None:
        self._sights = sights

    def collect(self) -> Iterator[Metric]:
        info = GaugeMetricFamily("sekuire_worker_info", "The library's version.", labels=("agent_id", "version"))
        for sight in self._sights:
            info.add_metric((sight.agent_id, __version__), 1)
        yield info
        for name, (metric, text) in _COUNTERS.items():
            counter = CounterMetricFamily(metric, text, labels=_AGENT)
            for sight in self._sights:
                counter.add_metric((sight.agent_id,), sight.totals.counts.get(name, 0))
            yield counter
        for metric, (text, value_of) in _GAUGES.items():
            gauge = GaugeMetricFamily(metric, text, labels=_AGENT)
            for sight in self._sights:
                value = value_of(sight.workers)
                if value is not None:
                    gauge.add_metric((sight.agent_id,), value)
            yield gauge
        yield self._finished()
        yield self._durations()
        yield from self._shared()

    def _finished(self) -> Metric:
        labels = ("agent_id", "capability", "status", "code")
        counter = CounterMetricFamily("sekuire_tasks_finished", "Tasks that were answered.", labels=labels)
        for sight in self._sights:
            for key, count in sorted(sight.totals.finished.items()):
                counter.add_metric((sight.agent_id, *key), count)
        return counter

    def _durations(self) -> Metric:
        histogram = HistogramMetricFamily(
            "sekuire_task_duration_seconds",
            "Seconds from the start of a handler to the task's answer.",
            labels=("agent_id", "capability"),
        )
        for sight in self._sights:
            for name, durations in sorted(sight.totals.durations.items()):
                histogram.add_metric((sight.agent_id, name), _buckets(durations), durations.total)
        return histogram

    def _shared(self) -> Iterator[Metric]:
        refreshes = CounterMetricFamily(
            "sekuire_credentials_refreshes", "Runtime tokens that were replaced by a new one.", labels=_AGENT
        )
        denials = CounterMetricFamily(
            "sekuire_policy_denials", "What the policy has denied, by rule.", labels=("agent_id", "rule")
        )
        for sight in self._sights:
            refreshes.add_metric((sight.agent_id,), sum(sight.shared.get("refreshes", {}).values()))
            for rule, count in sorted(sight.shared.get("denials", {}).items()):
                denials.add_metric((sight.agent_id, rule), count)
        yield refreshes
        yield denials


def _buckets(durations: Histogram) -> List[Tuple[str, float]]:
    buckets: List[Tuple[str, float]] = []
    count = 0
    for bound, more in zip((*map(str, BOUNDS), "+Inf"), durations.buckets):
        count += more
        buckets.append((bound, count))
    return buckets


#: CPU time, memory, descriptors and start of the process, where the system says them.
_PROCESS = CollectorRegistry(auto_describe=False)
ProcessCollector(registry=_PROCESS)


def expose(sights: Sequence[Any], accept: str) -> Tuple[bytes, str]:
    """Return the metrics' text, and its content type, in the form that an ``Accept`` header asks for."""
    encoder, content_type = choose_encoder(accept)
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collected(sights))
    registry.register(_Process())
    text: bytes = encoder(registry)
    return text, content_type


class _Process(Collector):
    def collect(self) -> Iterator[Metric]:
        return iter(_PROCESS.collect())
