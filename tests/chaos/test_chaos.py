"""A short run of the chaos; and that its proxy does, and its checker finds, what they are for."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import socket
from typing import Any, Dict, Iterator, List, Tuple

import pytest

from tests.support.servers import Answer, RawServer, WebServer, read_request
from tests.support.waiting import until

from .invariants import FIRST_TWIN, FORBIDDEN, Accepted, End, Evidence, Process, Run, TaskRow, Verdict, judge
from .pages import ENDPOINTS, STATUSES, draw_interim, draw_page, endpoint_of
from .proxy import CALL_FAULTS, GONE, INTERIM, STREAM_FAULTS, Beat, FaultProxy, Rule, Seen
from .scenario import KINDS, Plan, run

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL and process groups")

COMPLETION = "/api/v1/tasks/t/complete"


@pytest.mark.slow
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
        plan = Plan(seed=7, tasks=300, at=troubles, limit=60.0, settle=40.0, backlog=100, kinds=())
        figures = run(plan, str(tmp_path))
        report = "\n".join(figures.lines())
        assert not figures.violations, report
        assert (figures.tasks, figures.verdict.lost, figures.verdict.double_accepts) == (300, 0, 0), report
        assert figures.happened == {trouble: 1 for _, trouble in troubles}, report
        assert sum(figures.injected.values()) > 5, report

    def test_what_stands_between_decides_nothing(self, tmp_path: Any) -> None:
        """The same under interim answers, pages, failovers, and a second replica with the same token."""
        troubles = (
            (0.1, "expire-tokens"),
            (0.2, "failover"),
            (0.35, "new-policy"),
            (0.5, "kill-twin"),
            (0.65, "drop-streams"),
            (0.75, "expire-tokens"),
            (0.85, "restart-worker"),
        )
        plan = Plan(seed=9, tasks=300, at=troubles, limit=60.0, settle=40.0, backlog=100, kinds=tuple(KINDS))
        figures = run(plan, str(tmp_path))
        report = "\n".join(figures.lines())
        assert not figures.violations, report
        assert (figures.tasks, figures.verdict.lost, figures.verdict.double_accepts) == (300, 0, 0), report
        assert sum(figures.happened.values()) == len(troubles), report
        assert figures.injected["interim"] > 5, report
        assert figures.injected["page"] > 5, report

    @pytest.mark.parametrize(("seed", "installations"), [(2, 2), (3, 3)], ids=["with files", "without a file"])
    def test_replicas_with_one_token(self, tmp_path: Any, seed: int, installations: int) -> None:
        """Each is an installation of its own; without a credentials file its next process is another one."""
        plan = Plan(seed=seed, tasks=100, at=((0.5, "kill-twin"),), limit=60.0, settle=40.0, kinds=("twins",))
        figures = run(plan, str(tmp_path))
        report = "\n".join(figures.lines())
        assert not figures.violations, report
        assert (figures.tasks, figures.installations) == (100, installations), report

    @pytest.mark.full
    def test_no_handler_begins_past_its_lease(self, tmp_path: Any) -> None:
        """For longer than a lease and its grace every heartbeat is answered by something in between."""
        at = ((0.2, "lapse"),)
        plan = Plan(seed=1, tasks=300, at=at, limit=90.0, settle=60.0, backlog=50, kinds=("pages",))
        figures = run(plan, str(tmp_path))
        report = "\n".join(figures.lines())
        assert not figures.violations, report
        assert figures.tasks == 300, report


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
    **facts: Any,
) -> Verdict:
    return judge(Evidence(with_outbox, {"t"}, {"t": row}, runs, seen, ends, **facts))


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
        seen = (Seen("given", "t"), posted, posted._replace(kind="accepted"), Seen("given", "t", at=1.0))
        again = posted._replace(key="t:2", attempt=2)
        assert "sent as t:2" in verdict_of(seen=(*seen, again)).violations[0]
        # The next try may have come before the answer.
        assert verdict_of(seen=(*seen[:3], Seen("given", "t", at=0.1), again)).violations == []
        assert verdict_of(seen=(*seen, posted._replace(key="t:2", run="1-2", attempt=2))).violations == []

    def test_finds_a_wrong_key(self) -> None:
        assert "with the key 't:1'" in verdict_of(seen=(Seen("posted", "t", "t:1", "w1", "1-1", 2),)).violations[0]

    def test_finds_one_key_with_two_results(self) -> None:
        seen = (Seen("posted", "t", "t:1", "w1", "1-1", 1), Seen("posted", "t", "t:1", "w2", "2-1", 1))
        assert "the key t:1" in verdict_of(seen=seen).violations[0]

    def test_finds_a_run_that_the_policy_denies(self) -> None:
        denied = TaskRow("failed", "policy_denied", None, 1.0, (Accepted("t:1", 1, "failed"),), FORBIDDEN)
        assert verdict_of(denied, runs=()).violations == []
        assert "although the policy denies" in verdict_of(denied).violations[0]
        assert "completed with None although" in verdict_of(DONE._replace(capability=FORBIDDEN), ()).violations[0]

    def test_finds_a_run_past_its_lease(self) -> None:
        facts: Dict[str, Any] = {"processes": {1: Process(0.0, "i")}, "grace": 10.0}
        run = FIRST._replace(at=30.0)
        late = verdict_of(runs=(run,), beats=(Beat(5.0, "i", 15.0), Beat(31.0, "i", 41.0)), **facts)
        assert (late.past_lease, len(late.violations)) == (1, 1)
        assert "15.0 s after the lease had ended" in late.violations[0]
        assert verdict_of(runs=(run,), beats=(Beat(5.0, "i", 21.0),), **facts).violations == []
        assert verdict_of(runs=(run,), beats=(Beat(5.0, "other", 15.0),), **facts).violations == []
        # No lease was ever granted to this process.
        facts["processes"] = {1: Process(6.0, "i")}
        assert verdict_of(runs=(run,), beats=(Beat(5.0, "i", 15.0),), **facts).violations == []

    def test_finds_replicas_that_share_an_installation(self) -> None:
        def found(first: Process, *twins: Process) -> List[str]:
            processes = {1: first, 2: first, **{FIRST_TWIN + number: twin for number, twin in enumerate(twins)}}
            return verdict_of(processes=processes).violations

        first, own, none = Process(0.0, "i"), Process(0.0, "j"), Process(0.0, "k", has_file=False)
        assert found(first, own, own) == []
        assert found(first, none, none._replace(installation_id="l"), Process(0.0)) == []
        assert "one installation of 2 replicas" in found(first, first)[0]
        assert "one installation of 2 replicas" in found(first, none, none)[0]
        assert "had 2 installations" in found(first, own, own._replace(installation_id="l"))[0]

    def test_explains_a_second_run_by_the_other_replica(self) -> None:
        shared = {1: Process(0.0, "i"), FIRST_TWIN: Process(0.0, "j")}
        twin = SECOND._replace(name=f"{FIRST_TWIN}-1")
        moved = verdict_of(runs=(FIRST, twin), processes=shared)
        assert (moved.extra_by_move, moved.violations) == (1, [])
        # The other replica was given it first, and comes to it last.
        late = (FIRST._replace(attempt=2), twin._replace(attempt=1))
        assert verdict_of(runs=late, processes=shared).extra_by_move == 1
        same_attempt = verdict_of(runs=(FIRST, twin._replace(attempt=1)), processes=shared)
        assert same_attempt.extra_unexplained == 1
        back = Run("t", 3, 101, "1-9", 8.0)
        assert verdict_of(runs=(FIRST, twin, back), processes=shared).extra_unexplained == 1
        # Not where its first run was a failure that the platform had accepted, to try again.
        tried = DONE._replace(accepted=(Accepted("t:1", 1, "queued"), Accepted("t:3", 3, "completed")))
        assert verdict_of(tried, (FIRST, twin, back), processes=shared).violations == []


# -- the pages --------------------------------------------------------------------------------------------------------


class TestPages:
    def test_every_endpoint_gets_every_status(self) -> None:
        dice = random.Random(1)
        for endpoint in ENDPOINTS:
            pages = [draw_page(dice, endpoint, is_proven=True) for _ in range(5000)]
            assert {int(page.data.split()[1]) for page in pages} == set(STATUSES)

    def test_none_has_the_platforms_form(self) -> None:
        """Where a JSON object would be a success, there is none; no page has an error of the contract's form."""
        dice = random.Random(2)
        for endpoint in ENDPOINTS:
            for page in (draw_page(dice, endpoint, is_proven=True) for _ in range(2000)):
                head, _, body = page.data.partition(b"\r\n\r\n")
                assert page.is_last or body or not 200 <= int(head.split()[1]) < 300
                assert b'"error"' not in body
                if b"application/json" in head and head.startswith(b"HTTP/1.1 2"):
                    assert body == b'["ok"]' or endpoint in (
                        "bootstrap",
                        "refresh",
                        "heartbeat",
                        "policy",
                        "stream",
                        "capabilities",
                    )

    def test_an_address_that_proved_nothing_gets_what_is_retried(self) -> None:
        dice = random.Random(3)
        found = {int(draw_page(dice, "bootstrap", is_proven=False).data.split()[1]) for _ in range(3000)}
        assert found == {401, 408, 425, 429, 500, 501, 502, 503, 504, 520, 530}

    def test_interim_answers_are_not_final(self) -> None:
        dice = random.Random(4)
        for _ in range(100):
            lines = draw_interim(dice).split(b"\r\n\r\n")
            assert lines.pop() == b""
            assert all(line.startswith((b"HTTP/1.1 100", b"HTTP/1.1 102", b"HTTP/1.1 103")) for line in lines)

    def test_names_endpoints(self) -> None:
        assert endpoint_of(COMPLETION) == "complete"
        assert endpoint_of("/api/v1/installations/i/heartbeat") == "heartbeat"
        assert endpoint_of("/api/v1/tasks/stream") == "stream"
        assert endpoint_of("/api/v1/tasks") == "tasks"
        assert endpoint_of("/api/v1/tasks/t") is None


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
        posted = Seen("posted", "t", "t:1", "w", "1-1", 1)
        assert [seen._replace(at=0.0) for seen in proxy.seen] == [posted, posted._replace(kind="accepted")]
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

    @pytest.mark.parametrize(("fault", "reached"), [("page", 0), ("page-after", 1)])
    def test_sends_pages(self, proxy: FaultProxy, server: WebServer, fault: str, reached: int) -> None:
        proxy.rules = [Rule("/", 1.0, {fault: 1})]
        pages = 0
        while not pages:
            # One that was announced and does not come is no answer at all.
            with contextlib.suppress(http.client.HTTPException):
                assert b"answer" not in post(proxy)[1]
                pages += 1
        assert sum(proxy.pages.values()) == proxy.injected[fault] >= 1
        proxy.close()
        assert len(server.requests) == reached * proxy.injected[fault]
        assert {seen.kind for seen in proxy.seen} == {"posted"}

    def test_spares_a_stream_that_has_not_been_open(self, proxy: FaultProxy) -> None:
        """Most pages rightly end a worker whose stream never worked."""
        assert not proxy.is_proven("/api/v1/tasks/stream", "w")
        proxy.connected.add("w")
        assert proxy.is_proven("/api/v1/tasks/stream", "w")
        assert not proxy.is_proven("/api/v1/installations/bootstrap")
        assert proxy.is_proven("/api/v1/installations/i/refresh")

    def test_sends_interim_answers(self, proxy: FaultProxy) -> None:
        """They stand before the answer, and the next request of the connection gets its own."""
        proxy.interim_rate = 1.0
        with socket.create_connection(("127.0.0.1", proxy.port), 20.0) as client:
            for _ in range(3):
                client.sendall(b"GET /api/v1/other HTTP/1.1\r\nHost: x\r\n\r\n")
                got = b""
                while not got.endswith(b'"}'):
                    got += client.recv(65536)
                assert got.startswith(b"HTTP/1.1 10")
                assert got.count(b"HTTP/1.1 200") == 1
        assert proxy.injected == {INTERIM: 3}

    def test_notes_leases(self) -> None:
        answer = Answer(200, {"lease_expires_at": "2026-01-02T03:04:05Z"})
        with WebServer(lambda request: answer) as web, FaultProxy(web.port) as proxy:
            assert post(proxy, "/api/v1/installations/i/heartbeat")[0] == 200
            assert [(beat.installation_id, beat.ends) for beat in proxy.beats] == [("i", 1767323045.0)]

    def test_a_lapse_is_for_heartbeats(self, proxy: FaultProxy) -> None:
        proxy.has_lapse = True
        with contextlib.suppress(http.client.HTTPException):
            assert b"answer" not in post(proxy, "/api/v1/installations/i/heartbeat")[1]
        assert post(proxy)[0] == 200
        assert sum(proxy.pages.values()) == 1

    def test_a_failover_leaves_old_connections_silent(self, proxy: FaultProxy, server: WebServer) -> None:
        """No answer and no end comes on them; a new one works, and what is sent on an old one is lost."""
        request = b"POST /api/v1/other HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
        with socket.create_connection(("127.0.0.1", proxy.port), 20.0) as old:
            old.sendall(request)
            assert old.recv(65536).startswith(b"HTTP/1.1 200")
            assert proxy.silence() == 1
            old.sendall(request)
            assert post(proxy)[0] == 200
            until(lambda: proxy.lost)
            old.settimeout(0.3)
            with pytest.raises(socket.timeout):
                while old.recv(65536):
                    # The rest of the first answer.
                    pass
        assert len(server.requests) == 2
        assert [path for _, path in proxy.lost] == ["/api/v1/other"]

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
