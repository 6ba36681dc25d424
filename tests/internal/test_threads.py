"""Threads, deadlines, exit and fork: by events, not by the clock."""

from __future__ import annotations

import functools
import logging
import os
import sys
import threading
import time
import types
from typing import Any, Callable, Iterator, List, Optional

import pytest

from sekuire._internal import threads as thread_tools
from sekuire._internal.threads import (
    CallbackThread,
    Deadline,
    PeriodicThread,
    Timer,
    check_process,
    check_starter,
    is_owned_by,
    join_all,
    owned_by,
)
from sekuire.errors import SekuireError

from ..support.servers import run_python
from ..support.waiting import GUARD, SLACK, until

FOREVER = 3600.0


@pytest.fixture
def timer() -> Iterator[Timer]:
    timer = Timer("test-timer")
    yield timer
    timer.close()
    assert timer.join(Deadline(GUARD))


# -- deadlines --------------------------------------------------------------------------------------------------------


def test_a_deadline_passes() -> None:
    """A deadline has time left until it is expired, and never less than none."""
    assert not Deadline(FOREVER).is_expired()
    assert FOREVER - SLACK < Deadline(FOREVER).remaining() <= FOREVER
    for seconds in (0.0, -5.0):
        assert Deadline(seconds).is_expired()
        assert Deadline(seconds).remaining() == 0.0


def test_a_deadline_is_only_brought_forward() -> None:
    """shorten() makes a deadline end sooner, never later."""
    deadline = Deadline(FOREVER)
    deadline.shorten(2 * FOREVER)
    assert deadline.remaining() <= FOREVER
    deadline.shorten(0)
    assert deadline.is_expired()
    deadline.shorten(FOREVER)
    assert deadline.is_expired()


def test_an_earlier_deadline_moves_with_the_whole() -> None:
    """A view of a deadline lies before it, moves with it, and can be shortened by itself."""
    whole = Deadline(FOREVER)
    view = whole.earlier(100)
    assert 0 < view.remaining() <= FOREVER - 100
    assert not view.is_expired()
    assert whole.earlier(2 * FOREVER).is_expired()
    other = whole.earlier(100)
    other.shorten(0)
    assert other.is_expired()
    assert not view.is_expired()
    whole.shorten(50)
    assert view.is_expired()
    assert view.remaining() == 0.0
    assert not whole.is_expired()


def test_joins_share_one_deadline() -> None:
    """join_all() names those that still run at the deadline, and leaves out the caller and what never started."""
    release = threading.Event()
    slow = threading.Thread(target=release.wait, name="slow", daemon=True)
    quick = threading.Thread(target=lambda: None, name="quick")
    slow.start()
    quick.start()
    quick.join(GUARD)
    never = threading.Thread(name="never")
    assert join_all([quick, slow, never, threading.current_thread()], Deadline(0.01)) == ["slow"]
    release.set()
    assert join_all([quick, slow], Deadline(GUARD)) == []


def test_a_thread_knows_its_owners() -> None:
    """A thread works for those that marked it, nested ones too, and for no others."""
    one, other = object(), object()
    assert not is_owned_by(one)
    with owned_by(one):
        with owned_by(other):
            assert is_owned_by(one)
            assert is_owned_by(other)
        assert not is_owned_by(other)
        seen: List[bool] = []
        thread = threading.Thread(target=lambda: seen.append(is_owned_by(one)))
        thread.start()
        thread.join(GUARD)
        assert seen == [False]
    assert not is_owned_by(one)
    with pytest.raises(KeyError), owned_by(one):
        raise KeyError
    assert not is_owned_by(one)


# -- periodic ---------------------------------------------------------------------------------------------------------


class Beats:
    """Beats that can be waited for, each doing what ``act`` says."""

    def __init__(self, act: Callable[[int], None] = lambda number: None) -> None:
        self.count = 0
        self._act = act
        self._changed = threading.Condition()

    def every(self, interval: Callable[[], float]) -> Beats:
        self.interval = interval  # type: ignore[method-assign]
        return self

    def interval(self) -> float:
        return FOREVER

    def beat(self) -> None:
        with self._changed:
            self.count += 1
            self._changed.notify_all()
        self._act(self.count)

    def wait_for(self, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self.count >= count, GUARD)


def test_a_periodic_thread_beats_at_once_and_when_nudged() -> None:
    """The first beat comes at the start, further ones when nudged, whatever the interval."""
    beats = Beats()
    periodic = PeriodicThread("test-periodic", beats)
    periodic.start()
    for number in range(1, 5):
        beats.wait_for(number)
        periodic.nudge()
    beats.wait_for(5)
    periodic.stop()
    assert periodic.join(Deadline(GUARD))
    assert not periodic.thread.is_alive()


def test_a_periodic_thread_that_cannot_run(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """It warns if it could go on only long after its wait was over. One that was woken early or in time does not."""
    monkeypatch.setattr(thread_tools, "_LATE", -GUARD)
    beats = Beats()
    periodic = PeriodicThread("test-periodic", beats.every(lambda: 0.001))
    with caplog.at_level(logging.WARNING):
        periodic.start()
        beats.wait_for(2)
    monkeypatch.setattr(thread_tools, "_LATE", GUARD)
    periodic.stop()
    assert periodic.join(Deadline(GUARD))
    assert "test-periodic could not run for" in caplog.text
    assert "overloaded" in caplog.text


def test_owners_where_threads_become_greenlets_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who owns a thread is kept by its number, and not in a threading.local, which all greenlets would share."""
    numbers = iter([1, 1, 2, 1])
    with monkeypatch.context() as patch:
        patch.setattr(threading, "get_ident", lambda: next(numbers))
        owner = object()
        with owned_by(owner):
            found = [is_owned_by(owner), is_owned_by(owner), is_owned_by(owner)]
    assert found == [True, False, True]


@pytest.mark.parametrize(("has_threads", "is_refused"), [(0, True), (1, False)])
def test_uwsgi_without_threads(monkeypatch: pytest.MonkeyPatch, has_threads: int, is_refused: bool) -> None:
    """In a uWSGI process whose Python has no threads nothing is started that would stand still."""
    monkeypatch.setitem(sys.modules, "uwsgi", types.SimpleNamespace(has_threads=has_threads))
    if not is_refused:
        check_starter("Worker")
        return
    with pytest.raises(SekuireError, match="a Worker would stand still; start uWSGI with enable-threads"):
        check_starter("Worker")


def test_a_periodic_thread_beats_by_itself() -> None:
    """With a short interval the beats come without a nudge, and the interval is asked for anew after each."""
    intervals = iter([0.001, 0.001, 0.0, -1.0])
    beats = Beats()
    periodic = PeriodicThread("test-periodic", beats.every(lambda: next(intervals, 0.001)))
    periodic.start()
    beats.wait_for(8)
    periodic.stop()
    assert periodic.join(Deadline(GUARD))


@pytest.mark.parametrize("error", [ValueError("boom"), SystemExit(1)])
def test_a_failing_beat_does_not_end_it(error: BaseException, caplog: pytest.LogCaptureFixture) -> None:
    """A beat that raises, even sys.exit(), is logged and the next one comes."""

    def act(number: int) -> None:
        if number == 1:
            raise error

    beats = Beats(act)
    periodic = PeriodicThread("test-periodic", beats)
    periodic.start()
    beats.wait_for(1)
    periodic.nudge()
    beats.wait_for(2)
    periodic.stop()
    assert periodic.join(Deadline(GUARD))
    assert len(caplog.records) == 1
    assert "test-periodic" in caplog.messages[0]


def test_a_stop_during_a_beat_lets_it_end() -> None:
    """stop() lets the present beat end, and no other follows; a join by its own thread does not wait."""
    inside, release = threading.Event(), threading.Event()

    def act(number: int) -> None:
        periodic.join(Deadline(FOREVER))
        inside.set()
        assert release.wait(GUARD)

    beats = Beats(act)
    periodic = PeriodicThread("test-periodic", beats.every(lambda: 0.0))
    periodic.start()
    assert inside.wait(GUARD)
    periodic.stop()
    assert not periodic.join(Deadline(0.01))
    release.set()
    assert periodic.join(Deadline(GUARD))
    assert beats.count == 1


def test_a_nudge_during_a_beat_is_kept() -> None:
    """A nudge that comes while a beat runs causes another one."""

    def act(number: int) -> None:
        if number == 1:
            periodic.nudge()

    beats = Beats(act)
    periodic = PeriodicThread("test-periodic", beats)
    periodic.start()
    beats.wait_for(2)
    periodic.stop()
    assert periodic.join(Deadline(GUARD))


def test_a_stop_before_the_start() -> None:
    """A thread that was stopped before it was started does not beat, and one never started can be joined."""
    beats = Beats()
    periodic = PeriodicThread("test-periodic", beats)
    assert periodic.join(Deadline(0))
    periodic.stop()
    periodic.start()
    assert periodic.join(Deadline(GUARD))
    assert beats.count == 0


def test_a_beat_works_for_its_owner() -> None:
    """The thread is marked as its owner's."""
    owner = object()
    seen: List[bool] = []
    beats = Beats(lambda number: seen.append(is_owned_by(owner)))
    periodic = PeriodicThread("test-periodic", beats, owner=owner)
    periodic.start()
    until(lambda: seen)
    periodic.stop()
    assert periodic.join(Deadline(GUARD))
    assert seen == [True]


# -- timer ------------------------------------------------------------------------------------------------------------


def test_timed_calls_come_in_order(timer: Timer) -> None:
    """Calls are made by their time, not by when they were asked for, and equal times in the order of asking."""
    seen: List[int] = []
    done = threading.Event()
    start = time.monotonic() + 0.05
    for number, offset in ((3, 0.02), (1, 0.0), (4, 0.03), (2, 0.0)):
        timer.call_at(start + offset, lambda number=number: seen.append(number))
    timer.call_at(start + 0.04, done.set)
    assert done.wait(GUARD)
    assert seen == [1, 2, 3, 4]


def test_a_nearer_call_overtakes(timer: Timer) -> None:
    """A call asked for later, but due sooner, does not wait for the one before it."""
    done = threading.Event()
    timer.call_at(time.monotonic() + FOREVER, lambda: None)
    timer.call_at(time.monotonic(), done.set)
    assert done.wait(GUARD)


def test_a_cancelled_call_is_not_made(timer: Timer) -> None:
    """A cancelled call is not made; cancelling one that was made, or never was, does nothing."""
    seen: List[str] = []
    done = threading.Event()
    when = time.monotonic() + 0.05
    number = timer.call_at(when, lambda: seen.append("cancelled"))
    timer.call_at(when, done.set)
    timer.cancel(number)
    assert done.wait(GUARD)
    assert seen == []
    timer.cancel(number)
    timer.cancel(12345)


@pytest.mark.filterwarnings("default::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_failing_call_does_not_end_the_timer(timer: Timer, caplog: pytest.LogCaptureFixture) -> None:
    """A call that raises is logged, and the next is made; calls may ask for calls."""
    done = threading.Event()

    def fail() -> None:
        timer.call_at(time.monotonic(), done.set)
        raise ValueError("boom")

    timer.call_at(time.monotonic(), fail)
    assert done.wait(GUARD)
    assert any(message.startswith("test-timer: a timed call failed: ") for message in caplog.messages)


def test_cancelled_calls_do_not_pile_up(timer: Timer) -> None:
    """With many calls cancelled long before their time, what is kept stays in proportion to what is asked for."""
    when = time.monotonic() + FOREVER
    kept = [timer.call_at(when, lambda: None) for _ in range(10)]
    for _ in range(10_000):
        timer.cancel(timer.call_at(when, lambda: None))
        assert len(timer._heap) <= 66
    for number in kept:
        timer.cancel(number)


def test_a_closed_timer_makes_no_calls() -> None:
    """close() forgets what was asked for, ends the thread, and later calls are never made."""
    timer = Timer("test-timer")
    seen: List[int] = []
    timer.call_at(time.monotonic() + FOREVER, lambda: seen.append(1))
    timer.close()
    assert timer.join(Deadline(GUARD))
    timer.call_at(time.monotonic(), lambda: seen.append(2))
    assert timer.join(Deadline(0))
    assert seen == []
    unused = Timer()
    unused.close()
    assert unused.join(Deadline(0))


def test_a_timer_used_by_many_threads(timer: Timer) -> None:
    """Calls asked for and cancelled by many threads at once are each made exactly once, or not at all."""
    seen: List[int] = []
    cancelled: List[int] = []

    def ask(base: int) -> None:
        for number in range(base, base + 200):
            key = timer.call_at(time.monotonic() + 0.001 * (number % 7), lambda number=number: seen.append(number))
            if number % 3 == 0:
                timer.cancel(key)
                cancelled.append(number)

    threads = [threading.Thread(target=ask, args=(index * 1000,)) for index in range(8)]
    for thread in threads:
        thread.start()
    assert join_all(threads, Deadline(GUARD)) == []
    until(lambda: len(set(seen) | set(cancelled)) == 1600)
    assert len(seen) == len(set(seen))


class Unstartable:
    """Threads of some name that cannot be started while ``error`` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self.error: Optional[BaseException] = RuntimeError("can't start new thread")
        #: Whether the thread starts all the same, as when Ctrl-C comes while its start is waited for.
        self.starts = False
        self.tries = 0
        real = threading.Thread.start

        def start(thread: threading.Thread) -> None:
            if thread.name != name:
                return real(thread)
            self.tries += 1
            if self.starts or self.error is None:
                real(thread)
            if self.error is not None:
                raise self.error
            return None

        monkeypatch.setattr(threading.Thread, "start", start)


def test_a_timer_whose_thread_cannot_be_started(
    timer: Timer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Calls asked for while no thread can be started are kept, with one warning, and made once one can be."""
    unstartable = Unstartable(monkeypatch, "test-timer")
    seen: List[int] = []
    done = threading.Event()
    numbers = [timer.call_at(time.monotonic(), functools.partial(seen.append, number)) for number in range(3)]
    assert unstartable.tries == 3
    assert [record.getMessage() for record in caplog.records] == [
        "test-timer: no new thread can be started, so timed calls come late; the next one tries again"
    ]
    assert timer.join(Deadline(0))
    timer.cancel(numbers[1])
    unstartable.error = None
    timer.call_at(time.monotonic(), done.set)
    assert done.wait(GUARD)
    assert seen == [0, 2]
    assert unstartable.tries == 4


@pytest.mark.parametrize("starts", [False, True], ids=["before", "after"])
def test_a_timer_that_is_interrupted_as_it_starts(starts: bool, timer: Timer, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a Ctrl-C while the thread is started one thread makes the calls, whether that one came up or not."""
    unstartable = Unstartable(monkeypatch, "test-timer")
    unstartable.error, unstartable.starts = KeyboardInterrupt(), starts
    made, done = threading.Event(), threading.Event()
    with pytest.raises(KeyboardInterrupt):
        timer.call_at(time.monotonic(), made.set)
    unstartable.error = None
    timer.call_at(time.monotonic(), done.set)
    assert made.wait(GUARD)
    assert done.wait(GUARD)
    until(lambda: len([thread for thread in threading.enumerate() if thread.name == "test-timer"]) == 1)


# -- callbacks --------------------------------------------------------------------------------------------------------


@pytest.fixture
def callbacks() -> Iterator[CallbackThread]:
    callbacks = CallbackThread("test-callback", limit=5)
    yield callbacks
    callbacks.close()
    assert callbacks.join(Deadline(GUARD))


def test_callbacks_run_in_order_on_one_thread(callbacks: CallbackThread) -> None:
    """Callbacks run one after the other, in the order of posting, on a thread that is not the poster's."""
    seen: List[Any] = []
    done = threading.Event()
    for number in range(3):
        callbacks.post(lambda *args: seen.append((*args, threading.current_thread().name)), number, "x")
    callbacks.post(done.set)
    assert done.wait(GUARD)
    assert seen == [(number, "x", "test-callback") for number in range(3)]


@pytest.mark.parametrize("error", [ValueError("boom"), SystemExit(3), KeyboardInterrupt()])
def test_a_failing_callback_harms_no_other(
    error: BaseException, callbacks: CallbackThread, caplog: pytest.LogCaptureFixture
) -> None:
    """A callback that raises, whatever it is, is logged, and the next one runs."""

    def fail() -> None:
        raise error

    done = threading.Event()
    callbacks.post(fail)
    callbacks.post(done.set)
    assert done.wait(GUARD)
    assert len(caplog.records) == 1
    assert caplog.records[0].levelno == logging.ERROR


def test_a_hanging_callback_is_bounded(callbacks: CallbackThread, caplog: pytest.LogCaptureFixture) -> None:
    """Behind a callback that hangs a limited number waits, further ones are left out with one warning."""
    running, release = threading.Event(), threading.Event()
    seen: List[int] = []

    def hang() -> None:
        running.set()
        assert release.wait(GUARD)

    callbacks.post(hang)
    assert running.wait(GUARD)
    for number in range(20):
        callbacks.post(seen.append, number)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    release.set()
    until(lambda: len(seen) == 5)
    done = threading.Event()
    callbacks.post(done.set)
    assert done.wait(GUARD)
    assert seen == [0, 1, 2, 3, 4]


def test_what_waits_at_the_close_still_runs() -> None:
    """close() takes no more, lets what waits run, and ends the thread; one that was never used has none."""
    callbacks = CallbackThread("test-callback")
    running, release = threading.Event(), threading.Event()
    seen: List[int] = []

    def hang() -> None:
        running.set()
        assert release.wait(GUARD)

    callbacks.post(hang)
    callbacks.post(seen.append, 1)
    assert running.wait(GUARD)
    callbacks.close()
    callbacks.post(seen.append, 2)
    assert not callbacks.join(Deadline(0.01))
    release.set()
    assert callbacks.join(Deadline(GUARD))
    assert seen == [1]
    unused = CallbackThread()
    unused.close()
    assert unused.join(Deadline(0))


def test_a_callback_works_for_its_owner() -> None:
    """The callbacks' thread is marked as its owner's."""
    owner = object()
    seen: List[bool] = []
    callbacks = CallbackThread("test-callback", owner=owner)
    callbacks.post(lambda: seen.append(is_owned_by(owner)))
    callbacks.close()
    assert callbacks.join(Deadline(GUARD))
    assert seen == [True]


def test_callbacks_whose_thread_cannot_be_started(
    callbacks: CallbackThread, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Callbacks posted while no thread can be started are kept, with one warning, and run in order once one can be."""
    unstartable = Unstartable(monkeypatch, "test-callback")
    seen: List[int] = []
    done = threading.Event()
    for number in range(3):
        callbacks.post(seen.append, number)
    assert [record.getMessage() for record in caplog.records] == [
        "test-callback: no new thread can be started, so callbacks come late; the next one tries again"
    ]
    unstartable.error = None
    callbacks.post(done.set)
    assert done.wait(GUARD)
    assert seen == [0, 1, 2]
    assert unstartable.tries == 4


@pytest.mark.parametrize("recovers", [True, False])
def test_the_close_of_callbacks_whose_thread_could_not_be_started(
    recovers: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """close() has those run that could not be before, or tells how many are left out."""
    unstartable = Unstartable(monkeypatch, "test-callback")
    callbacks = CallbackThread("test-callback")
    seen: List[int] = []
    callbacks.post(seen.append, 1)
    caplog.clear()
    if recovers:
        unstartable.error = None
    callbacks.close()
    assert callbacks.join(Deadline(GUARD))
    assert seen == ([1] if recovers else [])
    left_out = [] if recovers else ["test-callback: no new thread can be started; 1 callbacks are left out"]
    assert [record.getMessage() for record in caplog.records] == left_out


def test_callbacks_that_are_interrupted_as_they_start(
    callbacks: CallbackThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Ctrl-C while the thread is started does not make two threads of it: callbacks stay in order."""
    unstartable = Unstartable(monkeypatch, "test-callback")
    unstartable.error, unstartable.starts = KeyboardInterrupt(), True
    seen: List[Any] = []
    done = threading.Event()
    with pytest.raises(KeyboardInterrupt):
        callbacks.post(lambda: seen.append((0, threading.get_ident())))
    unstartable.error = None
    for number in range(1, 4):
        callbacks.post(lambda number=number: seen.append((number, threading.get_ident())))
    callbacks.post(done.set)
    assert done.wait(GUARD)
    assert [number for number, _ in seen] == [0, 1, 2, 3]
    assert len({thread for _, thread in seen}) == 1


# -- the process ------------------------------------------------------------------------------------------------------

_LEAVER = """
import concurrent.futures, os, sys, threading
from sekuire._internal import threads as lifecycle

class Leaver:
    pid = os.getpid()
    def __init__(self, name, act=lambda: None):
        self.name, self.act = name, act
    def leave(self):
        print("leave", self.name, flush=True)
        self.act()
"""


def test_leaving_comes_before_the_executors_are_joined() -> None:
    """At the interpreter's end leave() is called before it waits for handlers, which can so be told to end."""
    script = _LEAVER + (
        "release = threading.Event()\n"
        "leaver = Leaver('one', release.set)\n"
        "lifecycle.at_exit(leaver)\n"
        "pool = concurrent.futures.ThreadPoolExecutor(1)\n"
        "pool.submit(lambda: (release.wait(60), print('handler ended', release.is_set(), flush=True)))\n"
    )
    assert run_python(script).stdout.split("\n")[:2] == ["leave one", "handler ended True"]


def test_who_leaves() -> None:
    """Each leaver that still exists and has not been forgotten leaves; one that fails does not keep the others."""
    script = _LEAVER + (
        "def fail(): raise ValueError\n"
        "leavers = [Leaver('one', fail), Leaver('two', fail), Leaver('forgotten')]\n"
        "for leaver in [*leavers, Leaver('collected')]: lifecycle.at_exit(leaver)\n"
        "del leaver\n"
        "lifecycle.forget_exit(leavers[2])\n"
        "lifecycle.forget_exit(leavers[2])\n"
    )
    result = run_python(script)
    assert sorted(result.stdout.split("\n")) == ["", "leave one", "leave two"]
    assert result.stderr == ""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork()")
def test_a_child_does_not_leave_for_its_parent() -> None:
    """A forked child does not call its parent's leavers at its end, and can register its own, whatever was held."""
    script = _LEAVER + (
        "leaver = Leaver('parent')\n"
        "lifecycle.at_exit(leaver)\n"
        "lifecycle._leave_lock.acquire()\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    own = Leaver('child'); own.pid = os.getpid()\n"
        "    lifecycle.at_exit(own)\n"
        "    sys.exit(0)\n"
        "lifecycle._leave_lock.release()\n"
        "print('child', os.waitpid(pid, 0)[1], flush=True)\n"
    )
    assert run_python(script, forks=True).stdout.split("\n") == ["leave child", "child 0", "leave parent", ""]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork()")
def test_a_child_is_told_not_to_use_its_parents_objects() -> None:
    """An object started before a fork is refused in the child, with what to do instead."""
    script = (
        "import os, sys\n"
        "from sekuire._internal.threads import check_process\n"
        "from sekuire.errors import SekuireError\n"
        "mine = os.getpid()\n"
        "check_process(mine, 'Worker')\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    try: check_process(mine, 'Worker')\n"
        "    except SekuireError as error: print(error, flush=True); os._exit(0)\n"
        "    os._exit(1)\n"
        "assert os.waitpid(pid, 0)[1] == 0\n"
    )
    assert "make a new Worker in the child" in run_python(script, forks=True).stdout


def test_a_process_is_known_by_its_id() -> None:
    """The same process passes, another one is a SekuireError."""
    check_process(os.getpid(), "Beacon")
    with pytest.raises(SekuireError, match="this Beacon was started in process 1"):
        check_process(1 if os.getpid() != 1 else 2, "Beacon")


def test_long_waits_are_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wait for longer than the platform's limit is made of shorter ones."""
    monkeypatch.setattr(thread_tools, "LONG_WAIT", 0.001)
    beats = Beats()
    timer, callbacks = Timer("test-timer"), CallbackThread("test-callback")
    periodic = PeriodicThread("test-periodic", beats)
    first, second = threading.Event(), threading.Event()
    periodic.start()
    timer.call_at(time.monotonic() + FOREVER, lambda: None)
    callbacks.post(first.set)
    assert first.wait(GUARD)
    timer.call_at(time.monotonic() + 0.05, second.set)
    assert second.wait(GUARD)
    assert beats.count == 1
    for one in (timer, callbacks):
        one.close()
        assert one.join(Deadline(GUARD))
    periodic.stop()
    assert periodic.join(Deadline(GUARD))
