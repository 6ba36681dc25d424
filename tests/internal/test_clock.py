"""The clock that counts a suspend of the machine."""

from __future__ import annotations

import ast
import pathlib
import sys
import time
import types
from typing import List

import pytest

import sekuire
from sekuire._internal.clock import SYSTEM_CLOCK, Clock, WallElapsed, choose_elapsed

from ..support.servers import run_python


class Hand:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_this_system_has_one() -> None:
    """Elapsed time goes on like the monotonic clock while nothing is suspended."""
    elapsed, monotonic = SYSTEM_CLOCK.elapsed(), SYSTEM_CLOCK.monotonic()
    time.sleep(0.02)
    assert SYSTEM_CLOCK.elapsed() > elapsed
    assert SYSTEM_CLOCK.monotonic() > monotonic


@pytest.mark.skipif(not hasattr(time, "CLOCK_BOOTTIME"), reason="needs CLOCK_BOOTTIME")
def test_boottime_is_used_where_it_exists() -> None:
    """On Linux elapsed time is the time since the machine was booted, suspends included."""
    before = time.clock_gettime(time.CLOCK_BOOTTIME)
    assert before <= choose_elapsed()() <= time.clock_gettime(time.CLOCK_BOOTTIME)


def test_a_sandbox_without_the_clock_it_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that the system names and does not have is not used."""

    def refuse(clock: int) -> float:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(time, "clock_gettime", refuse, raising=False)
    monkeypatch.setattr(time, "CLOCK_BOOTTIME", 7, raising=False)
    assert isinstance(choose_elapsed("linux"), WallElapsed)


def test_the_clocks_of_other_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    """MacOS has a raw clock that counts sleep, the clock of Windows does so anyway, elsewhere the wall clock helps."""
    asked: List[int] = []

    def read(clock: int) -> float:
        asked.append(clock)
        return 5.0

    monkeypatch.delattr(time, "CLOCK_BOOTTIME", raising=False)
    monkeypatch.setattr(time, "CLOCK_MONOTONIC_RAW", 4, raising=False)
    monkeypatch.setattr(time, "clock_gettime", read, raising=False)
    assert choose_elapsed("darwin")() == 5.0
    assert asked == [4]
    assert choose_elapsed("win32") is time.monotonic
    assert isinstance(choose_elapsed("sunos5"), WallElapsed)


def test_the_wall_clock_as_addition() -> None:
    """A gap by which the wall clock ran ahead is added; a slewed clock adds nothing, and a step back takes nothing."""
    monotonic, wall = Hand(), Hand()
    elapsed = WallElapsed(types.SimpleNamespace(monotonic=monotonic, time=wall))
    clock = Clock(elapsed, monotonic)
    for _ in range(10):
        monotonic.now += 1.0
        wall.now += 1.05
        assert clock.offset() == 0.0
    wall.now += 3600.0
    assert clock.offset() == pytest.approx(3600.0)
    monotonic.now += 1.0
    wall.now += 1.0
    assert elapsed() == pytest.approx(111.0 + 3600.0)
    wall.now -= 7200.0
    assert clock.offset() == pytest.approx(3600.0)
    wall.now += 2.0
    assert clock.offset() == pytest.approx(3602.0)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs CLOCK_BOOTTIME")
def test_a_suspend_of_a_real_process() -> None:
    """A process whose machine slept beats when it wakes, keeps its work if the platform answers, else cancels it.

    A machine cannot be suspended in a test. In a process of its own the system call that reads the clock is replaced,
    before the library is imported, by one that is ahead after the sleep.
    """
    run_python(
        """
        import time

        ahead = 0.0
        read = time.clock_gettime
        time.clock_gettime = lambda clock: read(clock) + (ahead if clock == time.CLOCK_BOOTTIME else 0.0)

        from sekuire import create_worker
        from sekuire.local import LocalPlatform

        from tests.support.waiting import until

        seen = []

        def hold(ctx, input):
            seen.append("begun")
            ctx.wait_cancelled(60)
            seen.append(ctx.cancel_reason)

        with LocalPlatform(lease_seconds=600.0, heartbeat_interval=300.0) as platform:
            worker = create_worker(
                api_base_url=platform.url, agent_id="a", install_token=platform.create_install_token("a"),
                heartbeat_interval=300.0,
            )
            worker.on_task("hold", hold)
            with worker:
                until(lambda: worker.stats().lease_expires_at)
                platform.submit("hold", {}, "a")
                until(lambda: seen == ["begun"])
                beat = worker.stats().last_heartbeat_at
                ahead = 5000.0
                until(lambda: worker.stats().last_heartbeat_at != beat)
                assert seen == ["begun"]
                platform.stop()
                ahead = 10000.0
                until(lambda: seen == ["begun", "lease lost"])
                platform.start()
        """
    )


def test_the_library_reads_the_real_clocks() -> None:
    """No module but the command line's takes the clocks from where a test may freeze them."""
    root = pathlib.Path(sekuire.__file__).parent
    found = []
    for path in sorted(root.rglob("*.py")):
        place = path.relative_to(root)
        if place.parts[0] == "cli" or place == pathlib.Path("_internal", "clock.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if "time" in names or (isinstance(node, ast.ImportFrom) and node.module == "time"):
                found.append(f"{place}:{node.lineno}")
    assert found == [], "use: from .._internal.clock import time"
