"""A short run of the chaos; and that its proxy does, and its checker finds, what they are for."""

from __future__ import annotations

import http.client
import json
import os
import socket
from typing import Any, Dict, Iterator, List, Tuple

import pytest

from tests.servers import Answer, RawServer, WebServer, read_request, until

from .invariants import Accepted, End, Evidence, Run, TaskRow, Verdict, judge
from .proxy import CALL_FAULTS, GONE, STREAM_FAULTS, FaultProxy, Rule, Seen
from .scenario import Plan, run

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL and process groups")

COMPLETION = "/api/v1/tasks/t/complete"


class TestRun:
    def test_nothing_is_lost_and_nothing_runs_twice(self, tmp_path: Any) -> None:
        """Three hundred tasks, faulty calls, one kill -9 of the worker and of the platform, and every other trouble."""
        troubles = (
            (0.1, "pause"),
            (0.2, "kill-worker-in-report"),
            (0.35, "expire-tokens"),
            (0.5, "kill-platform"),
            (0.65, "drop-streams"),
            (0.75, "outage"),
            (0.85, "restart-worker"),
        )
        figures = run(Plan(seed=7, tasks=300, at=troubles, limit=60.0, settle=40.0, backlog=100), str(tmp_path))
        report = "\n".join(figures.lines())
        assert not figures.violations, report
        assert (figures.tasks, figures.verdict.lost, figures.verdict.double_accepts) == (300, 0, 0), report
        assert figures.happened == {trouble: 1 for _, trouble in troubles}, report
        assert sum(figures.injected.values()) > 5, report


# -- the checker ------------------------------------------------------------------------------------------------------

DONE = TaskRow("completed", None, "1-1", 10.0, (Accepted("t:1", 1, "completed"),))
FIRST = Run("t", 1, 101, "1-1", 1.0)
SECOND = Run("t", 2, 102, "2-1", 6.0)
KILLED = End(True, 5.0)


def verdict_of(
    row: TaskRow = DONE,
    runs: Tuple[Run, ...] = (FIRST,),
    seen: Tuple[Seen, ...] = (),
    ends: Dict[int, End] = {},  # noqa: B006
    with_outbox: bool = True,
) -> Verdict:
    return judge(Evidence(with_outbox, {"t"}, {"t": row}, runs, seen, ends))


class TestChecker:
    def test_accepts_a_task_that_ran_once(self) -> None:
        assert verdict_of() == Verdict(0, 0, 1, 0, 0, 0, 0, [])

    def test_finds_a_task_that_was_never_completed(self) -> None:
        verdict = verdict_of(TaskRow("assigned", None, None, 1.0, ()))
        assert verdict.lost == 1
        assert "it is assigned" in verdict.violations[0]

    def test_finds_a_task_that_the_platform_forgot(self) -> None:
        verdict = judge(Evidence(True, {"t", "u"}, {"t": DONE}, [FIRST], [], {}))
        assert verdict.lost == 1
        assert verdict.violations == ["u: submitted, and not in the database"]

    def test_finds_two_accepted_completions(self) -> None:
        twice = DONE._replace(accepted=(*DONE.accepted, Accepted("t:2", 2, "completed")))
        assert verdict_of(twice).double_accepts == 1

    def test_finds_a_result_of_no_run(self) -> None:
        assert "its runs were []" in verdict_of(runs=()).violations[0]

    def test_finds_a_failure_that_nothing_explains(self) -> None:
        row = DONE._replace(status="failed", code="handler_error")
        assert "handler_error" in verdict_of(row).violations[0]

    def test_explains_a_second_run_by_a_kill(self) -> None:
        verdict = verdict_of(runs=(FIRST, SECOND), ends={1: KILLED})
        assert (verdict.extra_by_kill, verdict.extra_unexplained, verdict.violations) == (1, 0, [])

    def test_explains_a_second_run_by_a_retryable_failure(self) -> None:
        row = DONE._replace(accepted=(Accepted("t:1", 1, "queued"), Accepted("t:2", 2, "completed")))
        verdict = verdict_of(row, (FIRST, SECOND._replace(name="1-2")))
        assert (verdict.retries, verdict.violations) == (1, [])

    def test_explains_a_second_run_by_an_answered_404(self) -> None:
        seen = (Seen("given", "t"), Seen("posted", "t", "t:1", "w1", "1-1", 1), Seen("dropped", "t", worker_id="w1"))
        verdict = verdict_of(runs=(FIRST, SECOND), seen=seen, ends={1: KILLED})
        assert (verdict.extra_by_drop, verdict.violations) == (1, [])

    @pytest.mark.parametrize(
        ("second", "end", "reason"),
        [
            (SECOND._replace(name="1-2"), KILLED, "the process is the same"),
            (SECOND, None, "has not ended"),
            (SECOND, End(False, 5.0), "was stopped in order"),
            (SECOND, End(True, 5.0, frozenset({"t"})), "was in the outbox"),
            (SECOND, End(True, 11.0), "was accepted 1.000 s before"),
        ],
    )
    def test_finds_a_second_run_without_a_reason(self, second: Run, end: Any, reason: str) -> None:
        verdict = verdict_of(runs=(FIRST, second), ends={} if end is None else {1: end})
        assert verdict.extra_unexplained == 1
        assert reason in verdict.violations[0]

    def test_finds_a_run_after_its_result_was_sent(self) -> None:
        """The outbox has it before the first POST; without an outbox a kill may cost a second run."""
        seen = (Seen("given", "t"), Seen("posted", "t", "t:1", "w1", "1-1", 1))
        facts: Dict[str, Any] = {"runs": (FIRST, SECOND), "seen": seen, "ends": {1: KILLED}}
        assert "had been sent" in verdict_of(**facts).violations[0]
        assert verdict_of(**facts, with_outbox=False).violations == []

    def test_finds_a_report_after_a_drop(self) -> None:
        posted = Seen("posted", "t", "t:1", "w1", "1-1", 1)
        seen = [Seen("given", "t"), posted, Seen("dropped", "t", worker_id="w1"), posted]
        assert "after the platform's 404" in verdict_of(seen=tuple(seen)).violations[0]
        seen.insert(3, Seen("given", "t"))
        assert verdict_of(seen=tuple(seen)).violations == []

    def test_finds_a_failure_that_answers_a_second_try(self) -> None:
        posted = Seen("posted", "t", "t:1", "w1", "1-1", 1)
        seen = (Seen("given", "t"), posted, posted._replace(kind="accepted"), Seen("given", "t"))
        assert "sent as t:2" in verdict_of(seen=(*seen, posted._replace(key="t:2", attempt=2))).violations[0]
        assert verdict_of(seen=(*seen, posted._replace(key="t:2", run="1-2", attempt=2))).violations == []

    def test_finds_a_wrong_key(self) -> None:
        assert "with the key 't:1'" in verdict_of(seen=(Seen("posted", "t", "t:1", "w1", "1-1", 2),)).violations[0]

    def test_finds_one_key_with_two_results(self) -> None:
        seen = (Seen("posted", "t", "t:1", "w1", "1-1", 1), Seen("posted", "t", "t:1", "w2", "2-1", 1))
        assert "the key t:1" in verdict_of(seen=seen).violations[0]


# -- the proxy --------------------------------------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[WebServer]:
    with WebServer(lambda request: Answer(200, {"answer": "a" * 100})) as web:
        yield web


@pytest.fixture
def proxy(server: WebServer) -> Iterator[FaultProxy]:
    with FaultProxy(server.port, "test", longest_stall=0.2) as one:
        yield one


def post(proxy: FaultProxy, path: str = COMPLETION) -> Tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=20.0)
    try:
        body = json.dumps({"output": {"run": "1-1"}}, separators=(",", ":")) + ',"attempt":1,"worker_id":"w"'
        connection.request("POST", path, body, {"Idempotency-Key": "t:1"})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


#: Fault → what the client gets (None: no whole answer) and how many requests come through whole.
OUTCOMES = {
    "latency": (200, 1),
    "error-500": (500, 0),
    "error-503": (503, 0),
    "error-503-retry-after": (503, 0),
    "bad-gateway-after": (502, 1),
    "reset-before": (None, 0),
    "reset-in-request": (None, 0),
    "reset-after-request": (None, 1),
    "reset-in-answer": (None, 1),
    "half-answer": (None, 1),
    "stall": (200, 1),
    "stall-in-answer": (200, 1),
    "throttle": (200, 1),
    "duplicate": (200, 2),
}


class TestProxy:
    def test_forwards_faithfully(self, proxy: FaultProxy, server: WebServer) -> None:
        assert post(proxy) == (200, json.dumps({"answer": "a" * 100}).encode())
        until(lambda: len(proxy.seen) == 2)
        assert proxy.seen == [Seen("posted", "t", "t:1", "w", "1-1", 1), Seen("accepted", "t", "t:1", "w", "1-1", 1)]
        assert not proxy.injected

    def test_knows_what_every_fault_does(self) -> None:
        assert set(OUTCOMES) == set(CALL_FAULTS)

    @pytest.mark.parametrize("fault", OUTCOMES)
    def test_injects(self, proxy: FaultProxy, server: WebServer, fault: str) -> None:
        proxy.rules = [Rule("/", 1.0, {fault: 1})]
        status, reached = OUTCOMES[fault]
        if status is None:
            with pytest.raises((OSError, http.client.HTTPException)):
                post(proxy)
        else:
            assert post(proxy)[0] == status
        assert proxy.injected == {fault: 1}
        until(lambda: len(server.requests) >= reached)
        proxy.close()
        whole = [one for one in server.requests if len(one.body) == int(one.headers.get("Content-Length", 0))]
        assert len([one for one in whole if b"run" in one.body]) == reached

    def test_tells_a_lie_about_a_completion_only(self, proxy: FaultProxy, server: WebServer) -> None:
        proxy.gone_rate = 1.0
        assert post(proxy)[0] == 404
        assert post(proxy, "/api/v1/other")[0] == 200
        until(lambda: len(proxy.seen) == 2)
        assert proxy.injected == {GONE: 1}
        assert [seen.kind for seen in proxy.seen] == ["posted", "dropped"]
        assert proxy.gone == {"t"}

    def test_spares_other_paths(self, proxy: FaultProxy) -> None:
        proxy.rules = [Rule("/api/v1/tasks/stream", 1.0, STREAM_FAULTS)]
        assert post(proxy)[0] == 200

    def test_draws_the_same_faults_from_the_same_seed(self, server: WebServer) -> None:
        def statuses(seed: int) -> List[int]:
            with FaultProxy(server.port, seed) as proxy:
                proxy.rules = [Rule("/", 0.5, {"error-500": 1, "error-503": 1})]
                return [post(proxy)[0] for _ in range(30)]

        assert statuses(1) == statuses(1)
        assert len(set(statuses(1))) == 3

    def test_swallows_calls(self, proxy: FaultProxy, server: WebServer) -> None:
        proxy.swallowing = True
        with pytest.raises((OSError, http.client.HTTPException)):
            post(proxy)
        assert [seen.kind for seen in proxy.seen] == ["posted"]
        assert server.requests == []

    def test_refuses_connections_during_an_outage(self, proxy: FaultProxy) -> None:
        assert post(proxy)[0] == 200
        proxy.refuse()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", proxy.port), 20.0)
        proxy.listen()
        assert post(proxy)[0] == 200

    @pytest.mark.parametrize("fault", STREAM_FAULTS)
    def test_breaks_a_stream(self, fault: str) -> None:
        """Whatever happens to a stream, the bytes that come are the right ones."""
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
        events = b"".join(b'data: {"task_id":"task_%d"}\n\n' % number for number in range(20_000))

        def talk(sock: socket.socket, number: int) -> None:
            read_request(sock)
            sock.sendall(head + events)

        with RawServer(talk) as stream, FaultProxy(stream.port, fault, longest_stall=0.2) as proxy:
            proxy.rules = [Rule("/api/v1/tasks/stream", 1.0, {fault: 1})]
            with socket.create_connection(("127.0.0.1", proxy.port), 20.0) as client:
                client.sendall(b"GET /api/v1/tasks/stream HTTP/1.1\r\nHost: x\r\n\r\n")
                got = b""
                try:
                    while piece := client.recv(65536):
                        got += piece
                except ConnectionResetError:
                    pass
            assert proxy.injected == {fault: 1}
            if fault == "stream-503":
                assert got.startswith(b"HTTP/1.1 503 ")
            elif fault in ("stream-pause", "stream-dribble", "stream-buffer"):
                assert got == head + events
                assert [seen.task_id for seen in proxy.seen] == [f"task_{number}" for number in range(20_000)]
            else:
                assert (head + events).startswith(got)
                assert len(got) < len(head + events)
