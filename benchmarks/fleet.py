"""Model what 1 to 10,000 workers ask of one platform, and check it by simulation: ``python -m benchmarks.fleet``.

The simulation runs the library's own reconnect backoff, lease, and decision to renew a token, under a simulated clock;
only the network and the platform are played. Every worker is an installation of its own, with the default options.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import heapq
import itertools
import math
import random
import sys
from typing import Any, Callable, Counter, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import attrs

from sekuire._internal import clock
from sekuire.config import WorkerConfig
from sekuire.credentials.authenticator import RENEWAL_PAUSE, is_fresh
from sekuire.credentials.store import Snapshot
from sekuire.session.heartbeat import MIN_GRACE, Lease
from sekuire.transport.retry import Backoff
from sekuire.wire.models import RuntimeCredentials

from .report import table

SIZES = (1, 10, 100, 1_000, 10_000)
#: What the platform grants, in seconds: the values of the contract's examples.
LEASE, TOKEN = 60.0, 3600.0
_OPTIONS: Dict[str, Any] = {field.name: field.default for field in attrs.fields(WorkerConfig)}
INTERVAL: float = _OPTIONS["heartbeat_interval"]
FIRST: float = _OPTIONS["reconnect_min"]
LONGEST: float = _OPTIONS["reconnect_max"]
#: Seconds that an exchange takes.
_EXCHANGE = 0.05


class Outage(NamedTuple):
    """When the platform is unreachable, in simulated seconds. All streams are cut at its beginning."""

    begin: float
    end: float


class Simulation:
    """Run a fleet. ``counts`` has the requests of each second by kind; ``back`` when each stream was open again.

    :param spread: seconds over which the workers start.
    :param retry: the first bound of the reconnects that the platform has sent on its streams (``retry:``), in seconds.
    """

    def __init__(
        self,
        workers: int,
        outage: Optional[Outage] = None,
        *,
        spread: float = 60.0,
        retry: float = FIRST,
        seed: int = 1,
    ) -> None:
        self.now = 0.0
        self.counts: Dict[str, Counter[int]] = collections.defaultdict(collections.Counter)
        self.back: List[float] = []
        self.lost_leases = 0
        self.retry = retry
        self.random = random.Random(seed)
        self._outage = outage
        self._events: List[Tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self.workers = [_Worker(self, self.random.uniform(0.0, spread)) for _ in range(workers)]
        if outage is not None:
            self.at(outage.begin, self._cut)

    def run(self, until: float) -> Simulation:
        """Let the clock run to ``until``."""
        with _simulated(self):
            while self._events and self._events[0][0] <= until:
                self.now, _, event = heapq.heappop(self._events)
                event()
        return self

    def at(self, moment: float, event: Callable[[], None]) -> None:
        """Call ``event`` at a moment."""
        heapq.heappush(self._events, (moment, next(self._order), event))

    def ask(self, kind: str) -> bool:
        """Count a request. Return True if the platform answers it."""
        self.counts[kind][int(self.now)] += 1
        return self._outage is None or not self._outage.begin <= self.now < self._outage.end

    def peak(self, kind: str, begin: float = 0.0, end: float = math.inf) -> int:
        """Return the most requests of a kind in one second."""
        return max((count for second, count in self.counts[kind].items() if begin <= second < end), default=0)

    def _cut(self) -> None:
        for worker in self.workers:
            worker.lose_stream()


class _Worker:
    """Act as one worker does: a stream that it opens again, heartbeats at the interval, a token that it renews."""

    def __init__(self, simulation: Simulation, begin: float) -> None:
        self._simulation = simulation
        self._backoff = Backoff(simulation.retry, LONGEST)
        self._lease = Lease(clock.Clock(lambda: simulation.now, lambda: simulation.now))
        self._has_lease = True
        self._opened_at: Optional[float] = None
        self._next_try = 0.0
        self._snapshot: Optional[Snapshot] = None
        simulation.at(begin, self._start)

    def _start(self) -> None:
        self._renew()
        self._open()
        self._beat()

    def _open(self) -> None:
        simulation = self._simulation
        if simulation.ask("stream"):
            self._opened_at = simulation.now
            simulation.back.append(simulation.now)
        else:
            simulation.at(simulation.now + self._backoff.next(), self._open)

    def lose_stream(self) -> None:
        if self._opened_at is not None:
            self._backoff.was_open(self._simulation.now - self._opened_at)
            self._opened_at = None
            self._simulation.at(self._simulation.now + self._backoff.next(), self._open)

    def _beat(self) -> None:
        simulation = self._simulation
        if self._has_lease and not self._lease.is_held():
            self._has_lease = False
            simulation.lost_leases += 1
        left = None if self._snapshot is None else self._snapshot.time_left()
        if left is not None and self._snapshot is not None and not is_fresh(self._snapshot, left):
            self._try_renewal()
        if simulation.ask("heartbeat"):
            self._has_lease = True
            self._lease.renew(LEASE, None, simulation.now, max(INTERVAL, MIN_GRACE))
        simulation.at(simulation.now + INTERVAL, self._beat)

    def _try_renewal(self) -> None:
        if self._simulation.now >= self._next_try:
            self._next_try = self._simulation.now + RENEWAL_PAUSE * random.uniform(1.0, 1.2)
            self._renew()

    def _renew(self) -> None:
        simulation = self._simulation
        if simulation.ask("refresh"):
            end = simulation.now + TOKEN
            self._snapshot = Snapshot(
                generation=1, credentials=RuntimeCredentials(), lifetime=TOKEN, ends_at=end, ends_at_wall=end
            )


@contextlib.contextmanager
def _simulated(simulation: Simulation) -> Iterator[None]:
    """Have the library read the simulated clock, and draw the same random numbers each time."""
    before = clock.time.monotonic, clock.time.time
    state = random.getstate()
    random.seed(simulation.random.random())
    clock.time.monotonic = clock.time.time = lambda: simulation.now
    try:
        yield
    finally:
        clock.time.monotonic, clock.time.time = before
        random.setstate(state)


class Model:
    """Predict on paper what a fleet of ``workers`` asks."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        #: A second, in steady state: each beats once in an interval.
        self.heartbeats = workers / INTERVAL
        #: A second, on average: a token is renewed when 240 to 300 s of 3,600 are left.
        self.refreshes = workers / (TOKEN - 270.0)
        #: In the busiest second of a fleet that was started within a second and is idle. The renewals are spread over a
        #: minute, but each waits for its worker's next heartbeat, and all beat in the same second of an interval.
        self.refresh_peak = workers * INTERVAL / 60.0
        #: In the first second after a long outage: what is left of a wait between 0 and L has the density 2(L-r)/L².
        self.reconnect_peak = workers * (2 / LONGEST - 1 / LONGEST**2)
        #: In the first second after a restart that takes 0.2 s: all come within half a second, and those that come
        #: before its end once more.
        self.restart_peak = workers * (1 + 0.2 / FIRST)
        #: Seconds until half of the streams are open again after a long outage.
        self.half_back = LONGEST * (1 - math.sqrt(0.5))


class Finding(NamedTuple):
    """One line of the table, with what the model says and what the simulation found."""

    name: str
    model: float
    found: float


def findings(workers: int) -> List[Finding]:
    """Simulate a fleet of this size in each situation."""
    model = Model(workers)
    steady = Simulation(workers).run(400.0)
    beats = sum(count for second, count in steady.counts["heartbeat"].items() if 100 <= second < 400) / 300
    tokens = Simulation(workers, spread=1.0).run(TOKEN + 100.0)
    long = Simulation(workers, Outage(200.0, 800.0)).run(900.0)
    restart = Simulation(workers, Outage(200.0, 200.2)).run(300.0)
    gentle = Simulation(workers, Outage(200.0, 200.2), retry=LONGEST).run(300.0)
    back = sorted(moment - 800.0 for moment in long.back if moment >= 800.0)
    return [
        Finding("heartbeats a second", model.heartbeats, beats),
        Finding("refreshes, busiest second, all started at once", model.refresh_peak, tokens.peak("refresh", 60.0)),
        Finding("reconnects, first second after 10 min outage", model.reconnect_peak, long.peak("stream", 800.0)),
        Finding("  seconds until half are back", model.half_back, back[len(back) // 2]),
        Finding("  seconds until all are back, at most", LONGEST, back[-1]),
        Finding("reconnects, busiest second after a restart", model.restart_peak, restart.peak("stream", 200.0)),
        Finding("  the same, streams with retry: 30000", workers / LONGEST, gentle.peak("stream", 200.0)),
    ]


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Simulate and print; with ``--plot`` write a picture too."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fleet", description="A fleet on one platform.")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), metavar="N", help="numbers of workers")
    parser.add_argument("--plot", metavar="FILE", help="write an SVG of the largest fleet there; needs matplotlib")
    options = parser.parse_args(arguments)
    columns: List[List[Finding]] = [findings(size) for size in options.sizes]
    head = ["model / simulated", *(f"{size:,} worker{'s' if size > 1 else ''}" for size in options.sizes)]
    rows = [
        [lines[0].name, *(f"{_shown(line.model)} / {_shown(line.found)}" for line in lines)] for lines in zip(*columns)
    ]
    print(table(head, rows))
    if options.plot:
        plot(max(options.sizes), options.plot)
    return 0


def _shown(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def plot(workers: int, path: str) -> None:
    """Draw what a fleet asks after an outage and after a restart, and when its tokens are renewed."""
    from . import plots

    long = Simulation(workers, Outage(200.0, 800.0)).run(900.0)
    restart = Simulation(workers, Outage(200.0, 200.2)).run(300.0)
    gentle = Simulation(workers, Outage(200.0, 200.2), retry=LONGEST).run(300.0)
    tokens = Simulation(workers, spread=1.0).run(TOKEN + 100.0)
    seconds = range(-5, 40)
    with plots.figure(path, 3, "seconds after the platform is back", "requests a second") as axes:
        series: Any = axes[0]
        series.set_title(f"{workers:,} streams after 10 minutes without a platform", fontsize=10)
        series.step(seconds, [long.counts["stream"][800 + s] for s in seconds], where="post", label="simulated")
        curve = [workers * 2 * (LONGEST - s) / LONGEST**2 for s in range(int(LONGEST))]
        series.plot(range(int(LONGEST)), curve, linestyle="--", label="model")
        series = axes[1]
        series.set_title("after a restart of the platform that took 0.2 s", fontsize=10)
        series.step(seconds, [restart.counts["stream"][200 + s] for s in seconds], where="post", label="default")
        counts = [gentle.counts["stream"][200 + s] for s in seconds]
        series.step(seconds, counts, where="post", label="its streams had sent retry: 30000")
        series.set_yscale("symlog", linthresh=10)
        series = axes[2]
        begin = int(TOKEN) - 320
        span = range(120)
        series.set_title("refreshes of a fleet that was started within one second", fontsize=10)
        series.step(span, [tokens.counts["refresh"][begin + s] for s in span], where="post", label="simulated")
        series.axhline(Model(workers).refresh_peak, linestyle="--", color="C1", label="model, busiest second")
        series.set_xlabel(f"seconds after {begin:,} s")


if __name__ == "__main__":
    sys.exit(main())
