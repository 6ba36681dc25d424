"""Test that the simulation of a fleet agrees with the model on paper (docs/scaling.md)."""

from __future__ import annotations

import random

import pytest

from benchmarks.fleet import INTERVAL, LONGEST, Model, Outage, Simulation
from sekuire._internal.clock import time

WORKERS = 300


def test_reconnects_after_an_outage_are_spread_as_the_model_says() -> None:
    """All streams are back within the longest delay, and the first second brings what the model says."""
    fleet = Simulation(WORKERS, Outage(200.0, 500.0)).run(600.0)
    back = [moment - 500.0 for moment in fleet.back if moment >= 500.0]
    assert len(back) == WORKERS
    assert max(back) <= LONGEST
    expected = Model(WORKERS).reconnect_peak * 5
    assert 0.7 < sum(moment < 5.0 for moment in back) / expected < 1.1
    assert fleet.lost_leases == WORKERS


def test_an_outage_shorter_than_the_lease_costs_no_lease() -> None:
    fleet = Simulation(WORKERS, Outage(200.0, 230.0)).run(300.0)
    assert fleet.lost_leases == 0


def test_a_restart_brings_all_at_once_unless_the_streams_had_a_retry() -> None:
    restart = Outage(200.0, 200.2)
    assert Simulation(WORKERS, restart).run(260.0).peak("stream", 200.0) > WORKERS
    assert Simulation(WORKERS, restart, retry=LONGEST).run(260.0).peak("stream", 200.0) < WORKERS / 10


def test_heartbeats_come_at_their_interval() -> None:
    fleet = Simulation(WORKERS).run(200.0)
    beats = sum(count for second, count in fleet.counts["heartbeat"].items() if 100 <= second < 200)
    assert beats == pytest.approx(100 * WORKERS / INTERVAL, rel=0.02)


def test_the_clocks_and_random_numbers_are_as_before_after_a_simulation() -> None:
    before, state = (time.monotonic, time.time), random.getstate()
    Simulation(3).run(20.0)
    assert (time.monotonic, time.time) == before
    assert random.getstate() == state
