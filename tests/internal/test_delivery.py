"""Timed actions on a few threads, and the lock that they share with who plans them."""

from __future__ import annotations

import functools
import threading
from typing import Any, Iterator, List

import pytest

from sekuire._internal.delivery import MAX_THREADS, Delivery
from sekuire._internal.monitor import Monitor
from sekuire._internal.threads import Deadline

from ..support.waiting import GUARD, until


@pytest.fixture
def delivery() -> Iterator[Delivery]:
    made = Delivery("sekuire-test")
    yield made
    made.close()
    assert made.join(Deadline(GUARD)) == []


def test_a_cancelled_action_does_not_run(delivery: Delivery) -> None:
    """The others do, at their time, and nobody waits for the cancelled one."""
    ran: List[str] = []
    delivery.schedule(0.02, lambda: ran.append("late"))
    number = delivery.schedule(3600.0, lambda: ran.append("cancelled"))
    delivery.schedule(0.0, lambda: ran.append("soon"))
    assert number is not None
    with delivery.lock:
        delivery.cancel(number)
        delivery.cancel(number)
        assert delivery.awaited <= 2
    assert delivery.wait_until(lambda: not delivery.awaited, Deadline(GUARD))
    delivery.hurry()
    assert sorted(ran) == ["late", "soon"]


def test_hurry_makes_all_of_it_due(delivery: Delivery) -> None:
    """What would wait for an hour runs now; what is not awaited runs too, and is not waited for."""
    ran: List[str] = []
    delivery.schedule(3600.0, lambda: ran.append("awaited"))
    delivery.schedule(3600.0, lambda: ran.append("not awaited"), is_awaited=False)
    assert delivery.awaited == 1
    assert not delivery.wait_until(lambda: not delivery.awaited, Deadline(0.0))
    delivery.hurry()
    assert delivery.wait_until(lambda: not delivery.awaited, Deadline(GUARD))
    until(lambda: sorted(ran) == ["awaited", "not awaited"])


def test_no_more_threads_than_allowed(delivery: Delivery) -> None:
    """Each due action has a thread of its own, up to the limit; the others follow."""
    go = threading.Event()
    begun: List[str] = []

    def act() -> None:
        begun.append(threading.current_thread().name)
        assert go.wait(GUARD)

    for _ in range(3 * MAX_THREADS):
        delivery.schedule(0.0, act)
    until(lambda: len(begun) == MAX_THREADS)
    assert sorted(begun) == [f"sekuire-test-{number}" for number in range(1, MAX_THREADS + 1)]
    go.set()
    assert delivery.wait_until(lambda: not delivery.awaited, Deadline(GUARD))
    assert len(begun) == 3 * MAX_THREADS
    assert len(delivery.threads) == MAX_THREADS


def test_without_threads_the_waiting_one_acts(delivery: Delivery, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waits for the actions runs them itself where no thread can be started."""
    ran: List[threading.Thread] = []

    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    delivery.schedule(0.0, lambda: ran.append(threading.current_thread()))
    assert (ran, delivery.threads) == ([], [])
    assert delivery.wait_until(lambda: not delivery.awaited, Deadline(GUARD))
    assert ran == [threading.current_thread()]


def test_after_close_nothing_is_planned(delivery: Delivery) -> None:
    """What was planned is forgotten, and what comes is refused."""
    delivery.schedule(3600.0, lambda: None)
    delivery.close()
    assert delivery.schedule(0.0, lambda: None) is None
    assert delivery.queue == []


def test_a_monitor_wakes_only_its_own() -> None:
    """Of two monitors with one lock each wakes those who wait at it, and counts them."""
    one = Monitor()
    other = Monitor(one.lock)
    woken: List[Any] = []

    def wait(monitor: Monitor) -> None:
        with monitor.lock:
            monitor.wait(GUARD)
            woken.append(monitor)

    threads = [threading.Thread(target=wait, args=(monitor,)) for monitor in (one, other)]
    for thread in threads:
        thread.start()
    until(lambda: one.sleepers == other.sleepers == 1)
    for monitor, thread in ((other, threads[1]), (one, threads[0])):
        with monitor.lock:
            monitor.wake()
        thread.join(GUARD)
        assert woken[-1] is monitor
    assert one.sleepers == other.sleepers == 0


def test_no_memory_while_an_action_is_taken_out(delivery: Delivery, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that has taken an action runs it, although no further thread can be made for the next one."""
    ran: List[str] = []

    def refuse(*arguments: Any) -> None:
        raise MemoryError

    delivery.schedule(0.0, lambda: ran.append("first"))
    until(lambda: ran == ["first"] and delivery.idle_threads == 1)
    monkeypatch.setattr("sekuire._internal.delivery.sum", refuse, raising=False)
    for name in ("second", "third"):
        delivery.schedule(0.0, functools.partial(ran.append, name))
    until(lambda: ran == ["first", "second", "third"])
    assert delivery.wait_until(lambda: not delivery.awaited, Deadline(GUARD))
