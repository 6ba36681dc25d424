"""The life of a worker by itself: its phases, its link to the platform, and who begins the stop."""

from __future__ import annotations

import textwrap
import threading
from typing import Any, Callable, Dict, List

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sekuire import Worker
from sekuire.errors import ConfigurationError, RevokedError, StreamError
from sekuire.worker.announcer import Announcer
from sekuire.worker.life import Life, Link, Phase

from ..support.scripted import Scripted
from ..support.waiting import GUARD, until


class Stop:
    """Carry out a stop, and note what it was asked for."""

    def __init__(self, life: Life) -> None:
        self.life = life
        self.asked: List[str] = []

    def begin(self) -> None:
        self.asked.append("begin")

    def hurry(self) -> None:
        self.asked.append("terminate" if self.life.is_terminated else "hurry")

    def close_unstarted(self) -> None:
        self.asked.append("close")


@pytest.fixture
def life() -> Life:
    return Life(5.0, Announcer())


@pytest.fixture
def stop(life: Life) -> Stop:
    found = Stop(life)
    life.attach(found)
    return found


OPERATIONS: Dict[str, Callable[[Life], object]] = {
    "start": Life.start,
    "connect": Life.connect,
    "end of the stream": lambda life: life.disconnect(False),
    "refusal": lambda life: life.disconnect(True),
    "stop": Life.request_stop,
    "stop at once": lambda life: life.request_stop(0.0),
    "terminate": lambda life: life.terminate(1.0, "terminated"),
    "fail": lambda life: life.fail(StreamError("no stream")),
    "revoke": lambda life: life.revoke(RevokedError("breach", 1.0)),
    "leave": lambda life: life.leave("the program ends"),
    "finish": Life.finish,
}


@given(st.lists(st.sampled_from(sorted(OPERATIONS)), max_size=12))
def test_any_order(names: List[str]) -> None:
    """Whatever the parts of a worker ask for, and when: the life takes legal edges only, and stops once."""
    life = Life(5.0, Announcer())
    stop = Stop(life)
    life.attach(stop)
    order = list(Phase)
    was_started = False
    for name in names:
        before, link, reason = life.phase, life.link, life.reason
        if name == "start" and before is not Phase.NEW:
            with pytest.raises(ConfigurationError, match="a worker starts once"):
                life.start()
        elif name != "finish" or before is Phase.STOPPING:
            OPERATIONS[name](life)
        assert life.phase is before or life.phase in before.edges
        assert life.link is link or life.link in link.edges
        assert order.index(life.phase) >= order.index(before)
        # The first reason stays.
        assert reason is None or life.reason == reason
        was_started = was_started or life.phase is Phase.RUNNING
        assert (life.reason is not None) is (was_started and life.phase is not Phase.RUNNING)
        assert not (life.phase is Phase.STOPPED and life.is_connected)
    assert stop.asked.count("close") <= 1
    assert "begin" not in stop.asked or "close" not in stop.asked
    assert life.wait(0) is (life.phase is Phase.STOPPED)


def test_only_legal_edges(life: Life) -> None:
    """A worker that runs cannot finish without a stop, and one that has stopped cannot finish again."""
    life.start()
    with pytest.raises(AssertionError):
        life.finish()
    life.request_stop()
    life.finish()
    with pytest.raises(AssertionError):
        life.finish()


def test_a_stop_that_is_asked_for_twice(life: Life, stop: Stop) -> None:
    """The first call names the reason, a later one may only shorten the time; both begin what is not begun."""
    life.start()
    life.request_stop(3600.0, reason="first")
    life.request_stop(reason="second")
    assert life.reason == "first"
    assert life.deadline.remaining() > 3000.0
    life.request_stop(0.0)
    assert life.deadline.is_expired()
    assert stop.asked == ["begin", "begin", "hurry", "begin", "hurry"]


def test_a_termination_of_a_drain(life: Life, stop: Stop) -> None:
    """A terminate that comes while the worker drains ends more than the drain does; the reason stays."""
    life.start()
    life.request_stop(reason="signal 15")
    life.terminate(None, "terminated")
    assert stop.asked == ["begin", "begin", "terminate"]
    assert life.reason == "signal 15"


def test_a_termination_counts_once(life: Life) -> None:
    """Command, desired state and revocation speak of one termination: only the first is news."""
    life.start()
    assert life.claim_termination()
    assert not life.claim_termination()
    assert life.is_terminated


@pytest.mark.parametrize("is_connected", [False, True])
def test_a_revocation(is_connected: bool, caplog: pytest.LogCaptureFixture) -> None:
    """It is logged and announced once; it is the error of start() only if the platform never let the worker in."""
    announcer = Announcer()
    heard: List[Any] = []
    announcer.add_callback(heard.append)
    life = Life(5.0, announcer)
    life.start()
    if is_connected:
        life.connect()
    for _ in range(2):
        life.revoke(RevokedError("breach", 1.0))
    until(lambda: heard)
    announcer.close()
    assert life.reason is not None
    assert "breach" in life.reason
    assert (life.error is None) is is_connected
    assert caplog.text.count("the worker stops") == 1
    assert [(one.type, one.reason, one.shutdown_timeout) for one in heard] == [("terminate", "breach", 1.0)]


def test_an_error_of_a_worker_that_stops_already(life: Life) -> None:
    """What breaks during a stop is not the reason of it."""
    life.start()
    life.request_stop()
    life.fail(StreamError("late"))
    assert life.error is None
    assert life.reason == "stop()"


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (["end of the stream"], Link.UNKNOWN),
        (["refusal"], Link.REFUSED),
        (["refusal", "connect"], Link.OPEN),
        (["connect", "refusal"], Link.LOST),
        (["connect", "end of the stream", "connect"], Link.OPEN),
        (["connect", "stop", "finish", "connect"], Link.LOST),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value.value,
)
def test_the_link(life: Life, steps: List[str], expected: Link) -> None:
    """Silence says nothing, an answer is a verdict, and a stream that a stop has left behind opens nothing."""
    life.start()
    for step in steps:
        OPERATIONS[step](life)
    assert life.link is expected
    assert life.is_connected is (expected is Link.OPEN)
    assert life.was_connected is (expected in (Link.OPEN, Link.LOST))


@pytest.mark.parametrize("step", ["connect", "refusal", "stop and finish"])
def test_who_waits_is_woken(life: Life, step: str) -> None:
    """A verdict, a stream or an end wakes the one that waits for it."""
    life.start()
    waits = {
        "connect": lambda: life.wait_until_connected(GUARD),
        "refusal": lambda: life.wait_for_verdict(GUARD),
        "stop and finish": lambda: life.wait(None),
    }
    thread = threading.Thread(target=waits[step], daemon=True)
    thread.start()
    for name in step.split(" and "):
        OPERATIONS[name](life)
    thread.join(GUARD)
    assert not thread.is_alive()


def test_a_step_of_a_stop_that_fails(
    scripted: Scripted, worker_of: Callable[..., Worker], monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """It is logged by its name, and the next ones run: the last heartbeat is sent and every thread ends."""
    monkeypatch.setattr(
        "sekuire.worker.dispatch.Dispatcher.drain", lambda *args: (_ for _ in ()).throw(RuntimeError("odd"))
    )
    worker = worker_of(scripted)
    worker.on_task("echo", lambda ctx, input: input)
    worker.start()
    until(lambda: worker.stats().last_heartbeat_at)
    worker.stop()
    assert worker.wait(0)
    assert "stopping: a step failed (_drain); going on" in caplog.text
    assert scripted.of("heartbeat")[-1].json["status"] == "stopped"


def test_the_example_of_a_life() -> None:
    """The example in the docstring of Life holds."""
    # Python 3.13 keeps docstrings without their indentation.
    block = textwrap.dedent((Life.__doc__ or "").split("::\n\n")[1].split("\n\n")[0])
    exec(block, {"Life": Life, "Announcer": Announcer, "Phase": Phase})
