"""The task stream: how it connects, reconnects and gives up, as a real server sees it."""

from __future__ import annotations

import threading
from typing import Any, Callable, List

import pytest

from sekuire import TaskContext, Worker
from sekuire.worker.stream import TaskStream

from ..conftest import AGENT
from ..support.scripted import Request, Scripted
from ..support.waiting import GUARD, until

Make = Callable[..., Worker]


def echo(ctx: TaskContext, input: Any) -> Any:
    return input


@pytest.fixture
def worker(scripted: Scripted, worker_of: Make) -> Worker:
    made = worker_of(scripted)
    made.on_task("echo", echo)
    return made


def works(scripted: Scripted, task_id: str) -> None:
    scripted.task(task_id)
    assert scripted.completion(task_id)["status"] == "completed"


def test_the_request(scripted: Scripted, worker: Worker) -> None:
    """The stream is asked for with the runtime token, as an event stream that is not compressed, without an id."""
    with worker:
        headers = scripted.wait_for("stream")[0].headers
        assert headers["Authorization"] == "Bearer rt-1"
        assert headers["Accept"] == "text/event-stream"
        assert headers["Accept-Encoding"] == "identity"
        assert headers["Last-Event-ID"] is None


@pytest.mark.parametrize("how", ["end", "cut", "rst"])
def test_it_comes_back_after_any_end(scripted: Scripted, worker: Worker, how: str) -> None:
    """After a proper end, a FIN in the middle and a RST the worker connects anew, with the id it saw last."""
    with worker:
        works(scripted, "t1")
        scripted.send("ping", "{}", event_id="ev 1é")
        getattr(scripted, how)()
        second = scripted.wait_for("stream", 2)[1]
        assert second.headers["Last-Event-ID"].encode("latin-1").decode() == "ev 1é"
        works(scripted, "t2")
        stats = worker.stats()
        assert stats.reconnects == 1
        assert scripted.of("stream")[0].query == second.query


@pytest.mark.parametrize("event_id", ["a\x01b", "\x7f", "\x1b[31m", "x" * 4097], ids=ascii)
def test_an_id_that_no_header_may_hold_is_left_out(scripted: Scripted, worker: Worker, event_id: str) -> None:
    """Servers answer 400 to control characters in a header: such an id must not shut the stream for good."""
    with worker:
        scripted.send("ping", "{}", event_id=event_id)
        works(scripted, "t1")
        scripted.end()
        assert scripted.wait_for("stream", 2)[1].headers["Last-Event-ID"] is None
        works(scripted, "t2")


def test_an_idle_stream_is_opened_anew(scripted: Scripted, worker_of: Make) -> None:
    """A stream on which nothing comes for stream_idle_timeout is given up."""
    worker = worker_of(scripted, stream_idle_timeout=0.1)
    worker.on_task("echo", echo)
    with worker:
        scripted.wait_for("stream", 3)
        until(lambda: worker.stats().reconnects >= 2)


def test_an_id_counts_only_when_its_event_was_handled(scripted: Scripted, worker_of: Make) -> None:
    """The id of a task that could not be taken because the worker had no room is not confirmed by a reconnect."""
    go = threading.Event()
    scripted.on["release"] = lambda request: (501, {})
    worker = worker_of(scripted, max_workers=1, max_queued=0, max_waiting_bytes=1)
    worker.on_task("echo", lambda ctx, input: go.wait(GUARD))
    with worker:
        scripted.send("task", {"task_id": "t1", "capability": "echo"}, event_id="1")
        scripted.send("task", {"task_id": "t2", "capability": "echo"}, event_id="2")
        until(lambda: worker.stats().received == 2)
        assert worker._stream._last_event_id == "1"
        go.set()
        until(lambda: worker._stream._last_event_id == "2")


@pytest.mark.parametrize("answer", [(500, b"oops"), (503, {}), (429, {}), (408, {}), (425, {}), None], ids=str)
def test_a_passing_problem_is_tried_again(scripted: Scripted, worker: Worker, answer: Any) -> None:
    """5xx, 408, 425, 429 and a broken connection are tried again, before the first stream and after."""
    tries: List[int] = []

    def stream(request: Any) -> Any:
        tries.append(1)
        return answer if len(tries) % 3 else scripted.stream(request)

    scripted.on["stream"] = stream
    with worker:
        assert worker.wait_until_connected(GUARD)
        assert len(tries) == 3
        scripted.cut()
        scripted.wait_for("stream", 6)
        works(scripted, "t1")


@pytest.mark.parametrize(
    "answer",
    [
        (404, {}), (405, {}), (200, b"<html>", {"Content-Type": "text/html"}), (202, b""), (301, b""), (403, b"<html>"),
        (402, {"detail": "x"}),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_fatal_at_first_is_not_later(scripted: Scripted, worker: Worker, answer: Any) -> None:
    """After a first 200 an answer that is no stream means a proxy or a deployment: it is tried again."""
    with worker:
        works(scripted, "t1")
        scripted.on["stream"] = lambda request: answer
        scripted.end()
        scripted.wait_for("stream", 4)
        del scripted.on["stream"]
        until(worker.is_connected)
        works(scripted, "t2")


@pytest.mark.parametrize("answer", [(204, b""), (403, {}), (402, {})], ids=str)
def test_what_is_fatal_later_too(scripted: Scripted, worker: Worker, answer: Any) -> None:
    """204 and a refusal of the platform stop the worker whenever they come."""
    with worker:
        works(scripted, "t1")
        scripted.on["stream"] = lambda request: answer
        scripted.end()
        assert worker.wait(GUARD)
        assert scripted.count("stream") == 2
        assert str(answer[0]) in str(worker.stop_reason)


def test_a_401_is_answered_by_one_refresh(scripted: Scripted, worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """A 401 on the stream renews the token once and connects at once with the new one."""
    delays = recorded_delays(monkeypatch)
    refused = (401, {"error": "unauthorized"})
    scripted.on["stream"] = lambda request: (
        refused if request.headers["Authorization"] == "Bearer rt-1" else scripted.stream(request)
    )
    with worker:
        works(scripted, "t1")
        assert (scripted.count("refresh"), scripted.count("stream")) == (1, 2)
        assert scripted.of("stream")[1].headers["Authorization"] == "Bearer rt-refreshed"
        assert delays == []


def test_a_401_that_stays_slows_down(scripted: Scripted, worker_of: Make) -> None:
    """A platform that refuses the fresh token too is tried again with a backoff, not in a loop, until it takes it."""
    scripted.on["stream"] = lambda request: (401, {"error": "unauthorized"})
    worker = worker_of(scripted, start_timeout=0.01)
    worker.on_task("echo", echo)
    with worker:
        scripted.wait_for("stream", 4)
        assert worker.is_running()
        assert scripted.count("refresh") <= scripted.count("stream")
        del scripted.on["stream"]
        works(scripted, "t1")


def test_a_401_whose_refresh_is_refused_is_fatal(scripted: Scripted, worker_of: Make) -> None:
    """When no way of authenticating is left the worker stops with an AuthenticationError."""
    from sekuire.errors import AuthenticationError

    scripted.on["stream"] = lambda request: (401, {"error": "unauthorized"})
    scripted.on["refresh"] = lambda request: (401, {"error": "unauthorized", "message": "revoked family"})
    worker = worker_of(scripted, runtime_token="rt-old", refresh_token="rf-old", installation_id="inst-1")
    worker.on_task("echo", echo)
    with pytest.raises(AuthenticationError, match="revoked family"):
        worker.start()
    assert scripted.count("refresh") == 1


@pytest.mark.slow
def test_retry_after_bounds_the_delay(scripted: Scripted, worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Retry-After is the least delay before the next try."""
    delays = recorded_delays(monkeypatch)
    dates = {"Date": "Mon, 01 Jan 2018 00:00:00 GMT", "Retry-After": "Mon, 01 Jan 2018 00:00:02 GMT"}
    answers: List[Any] = [(503, {}, {"Retry-After": "1"}), (429, {}, {"Retry-After": "junk"}), (503, {}, dates)]
    scripted.on["stream"] = lambda request: answers.pop(0) if answers else scripted.stream(request)
    with worker:
        assert worker.wait_until_connected(GUARD)
    assert delays[0] == 1.0
    assert delays[1] <= 0.05
    # The platform's clock counts, which is years behind ours.
    assert delays[2] == 2.0


@pytest.mark.parametrize(("retry", "base"), [(2000, 2.0), (1, 0.1), (10**9, 60.0)])
def test_the_servers_retry_sets_the_base_delay(
    scripted: Scripted, worker: Worker, monkeypatch: pytest.MonkeyPatch, retry: int, base: float
) -> None:
    """A `retry:` line sets the base of the reconnect delay, within its bounds."""
    from sekuire.transport.retry import Backoff

    bases = []
    monkeypatch.setattr(Backoff, "next", lambda self, at_least=None: bases.append(self.first) or 0.0)
    with worker:
        scripted.raw(f"retry: {retry}\n\n".encode())
        works(scripted, "t1")
        scripted.end()
        scripted.wait_for("stream", 2)
    assert bases == [base]


def test_a_stream_that_was_open_for_a_while_comes_back_at_once(
    scripted: Scripted, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cuts of a stream that worked do not add up; attempts that open none do, however long they take."""
    from sekuire.transport import retry

    monkeypatch.setattr(retry, "HEALING", 1e-9)
    monkeypatch.setattr(retry.random, "uniform", lambda low, high: high)
    delays = recorded_delays(monkeypatch)
    with worker:
        for number in range(6):
            works(scripted, f"t{number}")
            scripted.end()
            scripted.wait_for("stream", number + 2)
        assert delays == [0.01] * 6
        works(scripted, "t6")
        scripted.on["stream"] = lambda request: (503, {})
        scripted.end()
        until(lambda: len(delays) >= 11)
    assert delays[6:11] == [0.01, 0.02, 0.04, 0.05, 0.05]


def recorded_delays(monkeypatch: pytest.MonkeyPatch) -> List[float]:
    from sekuire.transport.retry import Backoff

    delays: List[float] = []
    original = Backoff.next

    def record(self: Backoff, at_least: Any = None) -> float:
        delays.append(original(self, at_least))
        return delays[-1]

    monkeypatch.setattr(Backoff, "next", record)
    return delays


def test_an_event_that_is_too_large_is_counted(scripted: Scripted, worker_of: Make) -> None:
    """An event above max_event_bytes is skipped and counted; the stream goes on."""
    worker = worker_of(scripted, max_event_bytes=1000)
    worker.on_task("echo", echo)
    with worker:
        scripted.task("t1", input={"x": "y" * 2000})
        works(scripted, "t2")
        until(lambda: worker.stats().dropped == 1)


def test_an_unforeseen_failure_stops_the_worker_with_an_error(
    scripted: Scripted, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bug in the stream's thread is logged and stops the worker; it does not leave a dead worker that looks alive."""
    from sekuire.errors import SekuireError

    def broken(self: TaskStream, answer: Any) -> None:
        raise RuntimeError("bug")

    monkeypatch.setattr(TaskStream, "_read", broken)
    with pytest.raises(SekuireError, match="RuntimeError"):
        worker.start(block=True)


def test_commands_missed_while_away_come_with_the_reconnect(platform: Any, worker_of: Make) -> None:
    """A command given while the worker was away is made good by `connected`, then replayed by Last-Event-ID, once."""
    heard: List[Any] = []
    worker = worker_of(platform, heartbeat_interval=1000.0)
    worker.on_task("echo", echo)
    worker.on_command(lambda command: heard.append((command.type, command.command_id)))
    with worker:
        # A heartbeat under way would tell the desired state before the stream tells the command.
        until(lambda: worker.stats().last_heartbeat_at)
        installation = platform.installations()[0]["installation_id"]
        pause = platform.command(installation, "pause")
        until(lambda: heard == [("pause", pause)])
        platform.drop_streams()
        resume = platform.command(installation, "resume")
        until(lambda: not worker.is_paused())
        platform.drop_streams()
        until(platform.streams)
        assert platform.wait(platform.submit("echo", 1, AGENT), GUARD)["output"] == 1
        until(lambda: heard[-1] == ("resume", resume))
        assert heard.count(("resume", resume)) == heard.count(("pause", pause)) == 1
        assert set(heard[1:-1]) <= {("resume", None)}


def test_an_answer_cut_in_its_headers_is_no_verdict(scripted: Scripted, worker_of: Callable[..., Worker]) -> None:
    """A connection that ends within the answer's headers says nothing about the platform: the stream is tried again."""
    usual = scripted.stream

    def cut(request: Request) -> Any:
        if scripted.count("stream") == 1:
            request.write(b"HTTP/1.1 200 OK\r\nServer: x\r\n")
            return None
        return usual(request)

    scripted.on["stream"] = cut
    worker = worker_of(scripted)
    worker.on_task("echo", lambda ctx, input: input)
    worker.start()
    assert worker.wait_until_connected(GUARD)
    assert scripted.count("stream") == 2
    worker.stop()


def test_a_flood_of_events_that_cannot_be_read(
    scripted: Scripted, worker_of: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """All are counted, and a few of each kind are logged."""
    worker = worker_of(scripted)
    worker.on_task("x", lambda ctx, input: input)
    with worker:
        events = ['event: task\ndata: {"capability":"x"}\n\n', 'event: command\ndata: {"type":5}\n\n',
                  'event: command\ndata: {"type":"dance"}\n\n']  # fmt: skip
        scripted.raw("".join(events * 500).encode())
        until(lambda: worker.stats().dropped == 1500)
    assert sum(record.levelname == "ERROR" for record in caplog.records) <= 30
