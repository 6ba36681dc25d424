"""Results, releases and progress on their way to a platform that does not always take them."""

from __future__ import annotations

import functools
import threading
import time
from typing import Any, Callable, Iterator, List, cast

import pytest

from sekuire import TaskContext, TaskError, Worker
from sekuire._internal import delivery
from sekuire._internal.monitor import Monitor
from sekuire._internal.threads import Deadline
from sekuire.credentials import store
from sekuire.errors import TransportError
from sekuire.handlers.registry import HandlerEntry
from sekuire.wire.verdict import Later, Settled, Support, Unauthorized
from sekuire.worker import progress, release, report, results
from sekuire.worker.records import Record, State, move

from ..conftest import AGENT
from ..support.builders import completion_of, task_of
from ..support.scripted import Request, Scripted, grant
from ..support.waiting import GUARD, until

Make = Callable[..., Worker]


@pytest.fixture
def worker(scripted: Scripted, worker_of: Make) -> Worker:
    made = worker_of(scripted)
    made.on_task("echo", lambda ctx, input: input)
    return made


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (report, release):
        monkeypatch.setattr(module, "RETRY_MIN", 0.01)
        monkeypatch.setattr(module, "RETRY_MAX", 0.05)
    monkeypatch.setattr(progress, "PROGRESS_PAUSE", 0.05)


def test_the_request(scripted: Scripted, worker: Worker) -> None:
    """A completion carries the task, its attempt, the worker, the time it took, and a key."""
    with worker:
        scripted.task("t1", input={"x": "é"}, attempt=2)
        scripted.completion("t1")
    (request,) = scripted.of("complete")
    body = request.json
    assert 0 <= body.pop("execution_time_ms") < 10_000
    assert body == {
        "task_id": "t1", "status": "completed", "output": {"x": "é"}, "attempt": 2, "worker_id": worker.worker_id,
    }  # fmt: skip
    assert request.headers["Idempotency-Key"] == "t1:2"
    assert request.headers["Authorization"] == "Bearer rt-1"
    assert request.headers["Content-Type"] == "application/json"


@pytest.mark.parametrize(
    "answer",
    [
        (500, b"<html>"), (503, {}), (429, {}), (408, {}), None, (200, b"<html>"), (302, b""), (404, b"<html>"),
        (403, {"detail": "x"}), (409, b""), (410, {"status": "down"}), (413, b"<html>"), (422, b"[]"),
    ],
    ids=str,
)  # fmt: skip
def test_a_passing_problem_is_retried_with_the_same_key(scripted: Scripted, worker: Worker, answer: Any) -> None:
    """5xx, 429, 408, a broken connection, an answer of another server: the same body and key until it is accepted."""
    scripted.on["complete"] = lambda request: answer if scripted.count("complete") < 6 else (200, {})
    with worker:
        scripted.task("t1")
        requests = scripted.wait_for("complete", 6)
        until(lambda: worker.stats().undelivered == 0)
    assert {request.raw for request in requests} == {requests[0].raw}
    assert {request.headers["Idempotency-Key"] for request in requests} == {"t1:1"}
    assert scripted.count("complete") == 6


def test_retry_after_is_honoured(scripted: Scripted, worker: Worker) -> None:
    """Retry-After holds the next try back; a stop sends at once all the same."""
    scripted.on["complete"] = lambda request: (
        (200, {}) if scripted.count("complete") > 1 else (503, {}, {"Retry-After": "300"})
    )
    worker.start()
    scripted.task("t1")
    scripted.wait_for("complete")
    scripted.task("t2")
    scripted.completion("t2")
    assert len(scripted.completions("t1")) == 1
    # The try is over and the next one planned.
    until(lambda: worker._reporter.delivery.queue)
    worker.stop()
    assert len(scripted.completions("t1")) == 2
    assert worker.stats().undelivered == 0


@pytest.mark.parametrize(("status", "dropped"), [(409, 0), (404, 1), (410, 1)])
def test_what_settles_a_result(
    scripted: Scripted, worker: Worker, status: int, dropped: int, caplog: pytest.LogCaptureFixture
) -> None:
    """409 counts as delivered; 404 and 410 drop the result, in the log and the count."""
    scripted.on["complete"] = lambda request: (status, {"error": "x"})
    with worker:
        scripted.task("t1")
        scripted.wait_for("complete")
        until(lambda: worker.stats().undelivered == 0)
        assert worker.stats().dropped == dropped
    assert scripted.count("complete") == 1
    assert sum("no longer knows this task" in record.message for record in caplog.records) == dropped


@pytest.mark.parametrize("status", [403, 418])
def test_other_refusals_keep_the_result(
    scripted: Scripted, worker: Worker, status: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any other answer keeps the result, logs it once, and tries slowly again, until it is taken."""
    monkeypatch.setattr(report, "REFUSED_PAUSE", 0.05)
    take = threading.Event()
    scripted.on["complete"] = lambda request: (200, {}) if take.is_set() else (status, {"error": "x"})
    with worker:
        scripted.task("t1")
        scripted.wait_for("complete", 4)
        assert worker.stats().undelivered == 1
        take.set()
        until(lambda: worker.stats().undelivered == 0)
    assert sum("cannot be delivered" in record.message for record in caplog.records) == 1


def test_a_401_is_answered_by_one_refresh_and_a_replay(scripted: Scripted, worker: Worker) -> None:
    """A 401 for many reports together: one refresh, and each is sent again with the new token."""
    together = threading.Barrier(4)

    def complete(request: Request) -> Any:
        if request.headers["Authorization"] == "Bearer rt-1":
            together.wait(GUARD)
            return 401, {"error": "unauthorized"}
        return 200, {}

    scripted.on["complete"] = complete
    with worker:
        for number in range(4):
            scripted.task(f"t{number}")
        scripted.wait_for("complete", 8)
        until(lambda: worker.stats().undelivered == 0)
    assert scripted.count("refresh") == 1
    assert scripted.count("complete") == 8


def test_a_401_after_the_renewal_is_taken_for_bad_luck(scripted: Scripted, worker: Worker) -> None:
    """A token that was ended right after its renewal: the result is sent again soon, with another one."""
    scripted.on["complete"] = lambda request: (200, {}) if scripted.count("complete") > 6 else (401, {"error": "x"})
    with worker:
        scripted.task("t1")
        scripted.wait_for("complete", 7)
        until(lambda: worker.stats().undelivered == 0)
    assert {request.headers["Idempotency-Key"] for request in scripted.of("complete")} == {"t1:1"}


def test_a_401_that_stays_keeps_the_result(
    scripted: Scripted, worker: Worker, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After some tries a result refused with 401 is tried slowly, like one that is refused for another reason."""
    monkeypatch.setattr(report, "REFUSED_PAUSE", 0.05)
    take = threading.Event()
    scripted.on["complete"] = lambda request: (200, {}) if take.is_set() else (401, {"error": "x"})
    with worker:
        scripted.task("t1")
        until(lambda: any("cannot be delivered" in record.message for record in caplog.records))
        scripted.wait_for("complete", scripted.count("complete") + 4)
        take.set()
        until(lambda: worker.stats().undelivered == 0)
    assert sum("cannot be delivered" in record.message for record in caplog.records) == 1


def test_a_401_of_another_server_passes(
    scripted: Scripted, worker: Worker, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often a page answers 401, the result is sent again soon: the platform has refused nothing."""
    monkeypatch.setattr(report, "RETRY_MAX", 0.05)
    page = (401, b"<html>log in</html>", {"Content-Type": "text/html"})
    scripted.on["complete"] = lambda request: (200, {}) if scripted.count("complete") > 16 else page
    with worker:
        scripted.task("t1")
        scripted.wait_for("complete", 17)
        until(lambda: worker.stats().undelivered == 0)
    assert not any("cannot be delivered" in record.message for record in caplog.records)


def test_a_stop_waits_for_the_next_login(scripted: Scripted, worker_of: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A result whose login has to wait, because its tokens were refused at once, is delivered by the stop."""
    monkeypatch.setattr(store, "full_jitter", lambda *args: 0.3)
    tokens = iter(range(2, 100))
    scripted.on["refresh"] = lambda request: (200, grant(f"rt-{next(tokens)}"))
    refused = {f"Bearer rt-{number}" for number in range(1, 5)}
    scripted.on["complete"] = lambda request: (401, {}) if request.headers["Authorization"] in refused else (200, {})
    go, begun = threading.Event(), threading.Event()
    worker = worker_of(scripted, heartbeat_interval=30.0)
    worker.on_task("echo", lambda ctx, input: begun.set() or go.wait(GUARD))
    worker.start()
    scripted.task("t1")
    assert begun.wait(GUARD)
    stopper = threading.Thread(target=worker.stop)
    stopper.start()
    until(worker.installation.stop.is_set)
    go.set()
    stopper.join(GUARD)
    assert worker.stats().undelivered == 0
    assert scripted.of("complete")[-1].headers["Authorization"] == "Bearer rt-5"


def test_flush_sends_until_the_platform_is_back(scripted: Scripted, worker: Worker) -> None:
    """A stop goes on sending results that failed for a passing reason, within its time."""
    take = threading.Event()
    scripted.on["complete"] = lambda request: (200, {}) if take.is_set() else (503, {})
    worker.start()
    for number in range(5):
        scripted.task(f"t{number}")
    for number in range(5):
        scripted.completion(f"t{number}")
    stopper = threading.Thread(target=worker.stop)
    stopper.start()
    until(lambda: worker.stop_reason)
    scripted.wait_for("complete", scripted.count("complete") + 5)
    take.set()
    stopper.join(GUARD)
    assert not stopper.is_alive()
    assert worker.stats().undelivered == 0
    assert all(scripted.completions(f"t{number}")[-1] for number in range(5))


def test_flush_begins_the_backoff_anew(scripted: Scripted, worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """After many failures a stop does not wait for the long delay they led to."""
    monkeypatch.setattr(report, "full_jitter", lambda tries, first, longest: 0.0 if tries < 3 else 100_000.0)
    scripted.on["complete"] = lambda request: (200, {}) if scripted.count("complete") > 6 else (503, {})
    worker.start()
    scripted.task("t1")
    scripted.wait_for("complete", 4)
    worker.stop()
    assert scripted.count("complete") == 7
    assert worker.stats().undelivered == 0


def test_undelivered_results_are_named(scripted: Scripted, worker: Worker, caplog: pytest.LogCaptureFixture) -> None:
    """What could not be delivered by the end of a stop is named in the log and counted."""
    scripted.on["complete"] = lambda request: (503, {})
    worker.start()
    for number in range(25):
        scripted.task(f"t{number}")
    until(lambda: worker.stats().undelivered == 25)
    worker.stop(0)
    (record,) = [record for record in caplog.records if "were not delivered" in record.message]
    assert "25 tasks" in record.message
    assert record.message.count("t") >= 20
    assert record.message.endswith("...")
    assert worker.stats().undelivered == 25


def test_a_lasting_refusal_does_not_hold_up_the_stop(
    scripted: Scripted, worker_of: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """A stop tries a refused result once more and does not wait for what will not pass."""
    scripted.on["complete"] = lambda request: (403, {"error": "x"})
    worker = worker_of(scripted, shutdown_timeout=100_000.0)
    worker.on_task("echo", lambda ctx, input: input)
    worker.start()
    scripted.task("t1")
    until(lambda: any("cannot be delivered" in record.message for record in caplog.records))
    worker.stop()
    assert worker.wait(0)
    assert (scripted.count("complete"), worker.stats().undelivered) == (2, 1)


# -- the pool --


def take(worker: Worker, task_id: str) -> results.Report:
    """A result in the reporter's hands that nobody sends yet."""
    taken = worker._reporter.accept(completion_of(task_id, output=1))
    assert taken is not None
    return taken


@pytest.fixture
def patient(scripted: Scripted, worker_of: Make) -> Worker:
    """It waits for an answer longer than any test."""
    return worker_of(scripted, read_timeout=3 * GUARD)


@pytest.fixture
def slow(scripted: Scripted, patient: Worker) -> Iterator[threading.Event]:
    """One thread of the pool is there, and idle; from now on answers come when this is set."""
    reporter = patient._reporter
    reporter.enqueue(take(patient, "t0"))
    until(lambda: patient.stats().undelivered == 0 and not reporter.delivery.awaited)
    # It waits for the next: with a result that comes before, there may be need of another thread.
    until(lambda: reporter.delivery.idle_threads)
    assert len(reporter.delivery.threads) == 1
    go = threading.Event()
    scripted.on["complete"] = lambda request: (200, {}) if go.wait(GUARD) else (500, {})
    yield go
    go.set()
    assert reporter.close(Deadline(GUARD)) == []


def test_a_slow_answer_holds_up_no_other(scripted: Scripted, patient: Worker, slow: threading.Event) -> None:
    """A burst of results is sent by as many threads as there are, not by the one that happens to be idle."""
    reporter = patient._reporter
    burst = [take(patient, f"t{number}") for number in range(1, 9)]
    # The idle thread wakes when all have come, as in a burst.
    with reporter.delivery.lock:
        for one in burst:
            reporter.enqueue(one)
    scripted.wait_for("complete", 1 + delivery.MAX_THREADS)
    assert len(reporter.delivery.threads) == delivery.MAX_THREADS
    slow.set()
    until(lambda: patient.stats().undelivered == 0)


def test_a_slow_answer_holds_up_no_retry(scripted: Scripted, patient: Worker, slow: threading.Event) -> None:
    """What becomes due while the only thread waits for an answer gets another thread."""
    reporter = patient._reporter
    first, second = take(patient, "t1"), take(patient, "t2")
    # Both planned before the thread looks.
    with reporter.delivery.lock:
        for one in (first, second):
            reporter.delivery.schedule(0.05, functools.partial(reporter.post, one))
    scripted.wait_for("complete", 3)
    slow.set()
    until(lambda: patient.stats().undelivered == 0)


def test_whatever_an_action_raises_ends_no_thread(
    scripted: Scripted, worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    """A thread of the pool goes on after what ends programs, and sends what comes next."""
    reporter = worker._reporter

    def leave() -> None:
        raise SystemExit

    for _ in range(2 * delivery.MAX_THREADS):
        reporter.delivery.schedule(0.0, leave)
    until(lambda: not reporter.delivery.awaited)
    reporter.enqueue(take(worker, "t1"))
    until(lambda: worker.stats().undelivered == 0)
    assert all(thread.is_alive() for thread in reporter.delivery.threads)
    assert sum("unforeseen" in record.message for record in caplog.records) == 2 * delivery.MAX_THREADS
    assert reporter.close(Deadline(GUARD)) == []


def test_new_attempts_leave_one_plan(scripted: Scripted, worker: Worker) -> None:
    """Each higher attempt of a refused result is answered at once; the slow tries stay one row."""
    scripted.on["complete"] = lambda request: (403, {"error": "x"})
    reporter = worker._reporter
    worker.start()
    scripted.task("t1")
    scripted.wait_for("complete")
    until(lambda: len(reporter.delivery.queue) == 1)
    for attempt in range(2, 8):
        scripted.task("t1", attempt=attempt)
        assert scripted.wait_for("complete", attempt)[-1].json["attempt"] == attempt
        # The answer has been acted upon: nothing is under way, and what follows is planned.
        until(lambda: len(reporter.delivery.queue) == reporter.delivery.awaited)
        assert reporter.delivery.awaited == 1
    worker.stop()
    assert scripted.count("complete") == 8


def test_a_new_attempt_while_a_refused_result_is_sent(scripted: Scripted, worker: Worker) -> None:
    """It is not sent beside the request that is under way, but at once after that."""
    under_way, go = threading.Event(), threading.Event()

    def refuse(request: Request) -> Any:
        if scripted.count("complete") == 2:
            under_way.set()
            assert go.wait(GUARD)
        return 403, {"error": "x"}

    scripted.on["complete"] = refuse
    reporter = worker._reporter
    worker.start()
    scripted.task("t1")
    scripted.wait_for("complete")
    until(lambda: len(reporter.delivery.queue) == 1)
    scripted.task("t1", attempt=2)
    assert under_way.wait(GUARD)
    scripted.task("t1", attempt=3)
    until(lambda: worker.stats().duplicates == 2)
    assert not reporter.delivery.queue
    assert scripted.count("complete") == 2
    go.set()
    assert scripted.wait_for("complete", 3)[-1].json["attempt"] == 3
    worker.stop()


@pytest.mark.parametrize(("first", "then", "when"), [(50.0, 0.5, 0.5), (0.5, 50.0, 0.5)])
def test_a_report_is_planned_once(worker: Worker, first: float, then: float, when: float) -> None:
    """Of two plans for one report the earlier stays, and a flush waits for it alone."""
    reporter = worker._reporter
    one = take(worker, "t1")
    reporter.plan(one, first + 1000)
    reporter.plan(one, then + 1000)
    (action,) = reporter.delivery.queue
    assert reporter.delivery.awaited == 1
    assert action.when - time.monotonic() == pytest.approx(when + 1000, abs=40.0)
    assert one.plan is not None
    assert one.plan[1] == action.number
    assert reporter.close(Deadline(GUARD)) == []


# -- release --


def test_a_release_is_retried(scripted: Scripted, worker_of: Make) -> None:
    """A release that fails for a passing reason is sent again; a refused one is let go."""
    answers: List[Any] = [(503, {}), None, (200, {})]
    scripted.on["release"] = lambda request: (409, {}) if request.task_id == "t2" else answers.pop(0)
    go, begun = threading.Event(), threading.Event()
    worker = worker_of(scripted, max_workers=1, max_queued=2)
    worker.on_task("echo", lambda ctx, input: begun.set() or go.wait(GUARD))
    worker.start()
    for number in range(3):
        scripted.task(f"t{number}")
    assert begun.wait(GUARD)
    until(lambda: worker.stats().waiting == 2)
    stopper = threading.Thread(target=worker.stop)
    stopper.start()
    until(lambda: not answers)
    go.set()
    stopper.join(GUARD)
    assert [request.task_id for request in scripted.of("release")].count("t2") == 1
    assert [request.task_id for request in scripted.of("complete")] == ["t0"]


def test_a_release_outlasts_a_401_of_another_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """However often a page answers 401 to a release, it is sent again until the platform has accepted it."""
    monkeypatch.setattr(release, "RETRY_MAX", 0.01)
    page = Unauthorized(TransportError("a page"), is_foreign=True)
    answers: List[Any] = [page] * (release.REFUSALS + 3) + [Settled()]

    class Gateway:
        """Answers as a proxy does that asks for a password, and at last as the platform."""

        worker_id = "w"
        support = Support()

        def ask(self, endpoint: str, task_id: str, body: bytes) -> Any:
            return answers.pop(0)

    pool = delivery.Delivery("test-release")
    releases = release.Releases(cast(Any, Gateway()), pool)
    one = release.Release(Monitor(), "t1", 1)
    releases.send(one)
    until(lambda: one.state in (release.RELEASED, release.REFUSED))
    pool.close()
    assert one.state is release.RELEASED
    assert not answers
    assert pool.join(Deadline(GUARD)) == []


def test_a_release_refused_for_good_does_not_hold_up_the_stop(scripted: Scripted, worker_of: Make) -> None:
    """A release that a revoked installation may not make is not repeated."""
    scripted.on["release"] = lambda request: (403, {"error": "x", "message": "y", "code": "INSTALLATION_REVOKED"})
    go, begun = threading.Event(), threading.Event()
    worker = worker_of(scripted, max_workers=1, shutdown_timeout=100_000.0)
    worker.on_task("echo", lambda ctx, input: begun.set() or go.wait(GUARD))
    worker.start()
    scripted.task("t1")
    scripted.task("t2")
    assert begun.wait(GUARD)
    until(lambda: worker.stats().waiting == 1)
    stopper = threading.Thread(target=worker.stop)
    stopper.start()
    scripted.wait_for("release")
    go.set()
    stopper.join(GUARD)
    assert not stopper.is_alive()
    assert scripted.count("release") == 1


# -- progress --


def test_progress_is_the_newest_value(scripted: Scripted, worker_of: Make) -> None:
    """Of many values only the newest is sent once the pause is over; none is sent after the completion."""
    go, sending = threading.Event(), threading.Event()

    def progress(request: Request) -> Any:
        sending.set()
        return 200, {}

    scripted.on["progress"] = progress
    worker = worker_of(scripted)

    @worker.on_task("echo")
    def handler(ctx: TaskContext, input: Any) -> None:
        ctx.report_progress(0, "begun")
        assert sending.wait(GUARD)
        for number in range(1, 1000):
            ctx.report_progress(number / 1000)
        ctx.report_progress(1.0, "last")
        assert go.wait(GUARD)
        ctx.report_progress(0.5, "too late")

    with worker:
        scripted.task("t1")
        until(lambda: scripted.of("progress")[-1:] and scripted.of("progress")[-1].json["progress"] == 1.0)
        bodies = [request.json for request in scripted.of("progress")]
        assert bodies[0] == {"progress": 0.0, "message": "begun"}
        assert bodies[-1] == {"progress": 1.0, "message": "last"}
        assert len(bodies) < 500
        count = scripted.count("progress")
        go.set()
        scripted.completion("t1")
        worker.stop()
        assert scripted.count("progress") == count


def test_progress_keeps_its_pause(scripted: Scripted, worker_of: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within the pause after one report of a task no other is sent, however many values come."""
    monkeypatch.setattr(progress, "PROGRESS_PAUSE", 1000.0)
    worker = worker_of(scripted)

    @worker.on_task("echo")
    def handler(ctx: TaskContext, input: Any) -> None:
        ctx.report_progress(0.1)
        scripted.wait_for("progress")
        if ctx.task_id == "t2":
            return
        for _ in range(100):
            ctx.report_progress(0.2)
        # What is sent for another task shows that nothing of this one was due before.
        scripted.task("t2")
        scripted.completion("t2")

    with worker:
        scripted.task("t1")
        scripted.completion("t1")
    assert [request.task_id for request in scripted.of("progress")].count("t1") == 1


@pytest.mark.parametrize("status", [404, 405, 501])
def test_progress_is_switched_off(
    scripted: Scripted, worker_of: Make, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    """A platform without progress is asked once and warned of once."""
    scripted.on["progress"] = lambda request: (status, {})
    worker = worker_of(scripted)

    @worker.on_task("echo")
    def handler(ctx: TaskContext, input: Any) -> None:
        ctx.report_progress(0.1)
        until(lambda: any("does not offer progress reports" in record.message for record in caplog.records))
        ctx.report_progress(0.2)

    with worker:
        for number in range(3):
            scripted.task(f"t{number}")
            scripted.completion(f"t{number}")
    assert scripted.count("progress") == 1
    assert sum("does not offer progress reports" in record.message for record in caplog.records) == 1


def test_progress_of_a_task_that_has_ended_switches_nothing_off(scripted: Scripted, worker_of: Make) -> None:
    """404 for a progress that came after the task's end means that task only."""
    ended = threading.Event()

    def progress(request: Request) -> Any:
        if request.task_id == "t1":
            assert ended.wait(GUARD)
            return 404, {}
        return 200, {}

    scripted.on["progress"] = progress
    worker = worker_of(scripted)

    @worker.on_task("echo")
    def handler(ctx: TaskContext, input: Any) -> None:
        ctx.report_progress(0.5)
        scripted.wait_for("progress", 1 if ctx.task_id == "t1" else 2)

    with worker:
        scripted.task("t1")
        scripted.completion("t1")
        ended.set()
        scripted.task("t2")
        assert scripted.completion("t2")["status"] == "completed"


def test_progress_that_is_not_taken_is_no_error(scripted: Scripted, worker_of: Make) -> None:
    """A failing progress report is forgotten; wrong values are the handler's error."""
    scripted.on["progress"] = lambda request: (500, {})
    worker = worker_of(scripted)
    problems: List[str] = []

    @worker.on_task("echo")
    def handler(ctx: TaskContext, input: Any) -> None:
        ctx.report_progress(0.5)
        scripted.wait_for("progress")
        wrong: List[Any] = [-0.1, 1.1, float("nan"), True, "0.5"]
        for value in wrong:
            try:
                ctx.report_progress(value)
            except ValueError as error:
                problems.append(str(error))
        try:
            ctx.report_progress(0.5, b"x")  # type: ignore[arg-type]
        except ValueError as error:
            problems.append(str(error))

    with worker:
        scripted.task("t1")
        assert scripted.completion("t1")["status"] == "completed"
    assert len(problems) == 6
    assert all("must be" in problem for problem in problems)


# -- what is remembered --


def test_the_memory_is_bounded(scripted: Scripted, worker_of: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only so many tasks, and so many bytes of results, are remembered; a forgotten one runs again."""
    monkeypatch.setattr(results, "MEMORY", 3)
    monkeypatch.setattr(results, "MEMORY_BYTES", 500)
    monkeypatch.setattr(results, "MEMORY_ENTRY_BYTES", 300)
    worker = worker_of(scripted, max_workers=1)
    ran: List[str] = []
    worker.on_task("echo", lambda ctx, input: ran.append(ctx.task_id) or "x" * input["size"])
    with worker:
        for number, size in enumerate((400, 150, 150, 150)):
            scripted.task(f"t{number}", input={"size": size})
            scripted.completion(f"t{number}")
        until(lambda: worker.stats().undelivered == 0)
        assert worker._reporter.results.remembered_bytes <= 500
        assert list(worker._reporter.results.remembered) == ["t1", "t2", "t3"]
        scripted.task("t0", input={"size": 1})
        until(lambda: ran == ["t0", "t1", "t2", "t3", "t0"])
        scripted.task("t3", input={"size": 1})
        until(lambda: len(scripted.completions("t3")) == 2)
        assert len(ran) == 5
        scripted.task("t2", input={"size": 1})
        until(lambda: worker.stats().duplicates == 2)


def test_the_local_platform_accepts_each_result_once(platform: Any, worker_of: Make) -> None:
    """Cut streams and repeated deliveries leave one accepted completion per task."""
    worker = worker_of(platform, max_workers=4)
    worker.on_task("echo", lambda ctx, input: input)
    with worker:
        ids = [platform.submit("echo", number, AGENT) for number in range(60)]
        for number, task_id in enumerate(ids):
            if number % 20 == 0:
                platform.drop_streams()
            assert platform.wait(task_id, GUARD)["output"] == number
        until(lambda: worker.stats().undelivered == 0)
    assert all([status for status, _ in platform.completions(task_id)].count(200) >= 1 for task_id in ids)
    assert worker.stats().completed == 60


@pytest.mark.parametrize("status", [200, 409])
def test_a_next_try_that_comes_with_the_answer(scripted: Scripted, worker_of: Make, status: int) -> None:
    """A new try that comes at the moment in which the failure of the last one is settled is not forgotten."""
    scripted.on["complete"] = lambda request: (status, {})
    worker = worker_of(scripted)
    runs: List[int] = []

    def flaky(ctx: Any, input: Any) -> str:
        runs.append(ctx.attempt)
        if ctx.attempt == 1:
            raise TaskError("busy", retryable=True)
        return "done"

    worker.on_task("echo", flaky)
    reporter = worker._reporter
    original = reporter.results.settle

    def settle(report: Any, *args: Any, **options: Any) -> bool:
        # The platform is faster than its answer: the next try is here before the answer is acted upon.
        if report.attempt == 1:
            worker._dispatcher.submit(task_of("t1", "echo", attempt=2))
        return original(report, *args, **options)

    reporter.results.settle = settle  # type: ignore[method-assign]
    with worker:
        scripted.task("t1")
        until(lambda: [request.json["attempt"] for request in scripted.completions("t1")] == [1, 2])
        until(lambda: worker.stats().undelivered == 0)
    assert runs == [1]


# -- a result always has an owner --


@pytest.mark.parametrize("error", [MemoryError, KeyError, SystemExit, KeyboardInterrupt, AssertionError])
@pytest.mark.parametrize("where", ["handler", "pool"])
def test_whatever_is_raised_while_sending_plans_the_result_again(
    scripted: Scripted, worker: Worker, monkeypatch: pytest.MonkeyPatch, error: Any, where: str
) -> None:
    """No memory, a bug of a library, sys.exit() in a user's token provider: the result is sent again, and delivered."""
    reporter = worker._reporter
    send, failures = reporter.sender.ask, iter([error("unforeseen")] * 3)

    def fail(path: str, *args: Any) -> Any:
        for failure in failures:
            raise failure
        return send(path, *args)

    monkeypatch.setattr(reporter.sender, "ask", fail)
    worker.start()
    if where == "handler":
        scripted.task("t1")
    else:
        reporter.enqueue(take(worker, "t1"))
    scripted.completion("t1")
    until(lambda: worker.stats().undelivered == 0)
    assert next(failures, None) is None
    scripted.task("t2")
    assert scripted.completion("t2")["status"] == "completed"
    worker.stop()
    assert reporter.delivery.awaited == 0
    assert not worker.is_running()


@pytest.mark.parametrize("part", ["jitter", "schedule", "settle", "outbox"])
def test_a_failure_of_our_own_parts_leaves_no_result(
    scripted: Scripted, worker_of: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Any, part: str
) -> None:
    """Also where what plans it again fails: then a sweep finds it."""
    monkeypatch.setattr(report, "SWEEP", 0.05)
    worker = worker_of(scripted, outbox=tmp_path / "outbox.db")
    worker.on_task("echo", lambda ctx, input: input)
    scripted.on["complete"] = lambda request: (503, {"error": "x"}) if scripted.count("complete") < 3 else (200, {})
    where, name = {
        "jitter": (report, "full_jitter"),
        "schedule": (worker._reporter.delivery, "schedule"),
        "settle": (worker._reporter.results, "settle"),
        "outbox": (worker._reporter.spool, "put"),
    }[part]
    real, failures = getattr(where, name), iter([MemoryError()] * 2)

    def fail(*args: Any, **options: Any) -> Any:
        for failure in failures:
            raise failure
        return real(*args, **options)

    monkeypatch.setattr(where, name, fail)
    with worker:
        scripted.task("t1")
        until(lambda: next(failures, None) is None and worker.stats().completed and worker.stats().undelivered == 0)
    assert scripted.completion("t1")["status"] == "completed"


def test_a_sweep_finds_a_result_that_its_thread_left(
    scripted: Scripted, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A result that was accepted, and that nobody sends or has planned, is sent."""
    monkeypatch.setattr(report, "SWEEP", 0.05)
    worker.start()
    take(worker, "t1")
    assert scripted.completion("t1")["output"] == 1
    until(lambda: worker.stats().undelivered == 0)


def test_a_stop_sends_a_result_that_its_thread_left(scripted: Scripted, worker: Worker) -> None:
    """It does not wait for the next sweep."""
    worker.start()
    take(worker, "t1")
    worker.stop()
    assert len(scripted.completions("t1")) == 1
    assert worker.stats().undelivered == 0


def test_a_result_that_a_sweep_took_is_not_sent_beside(scripted: Scripted, worker: Worker) -> None:
    """Its own thread, which was only slow, leaves the sending to whoever has it."""
    under_way, go = threading.Event(), threading.Event()

    def complete(request: Request) -> Any:
        under_way.set()
        assert go.wait(GUARD)
        return 200, {}

    scripted.on["complete"] = complete
    worker.start()
    reporter = worker._reporter
    one = take(worker, "t1")
    reporter.sweep(at_once=True)
    assert under_way.wait(GUARD)
    reporter.post(one)
    go.set()
    until(lambda: worker.stats().undelivered == 0)
    assert scripted.count("complete") == 1


@pytest.mark.parametrize("end", ["sweep", "stop"])
def test_results_wait_for_threads_that_cannot_be_started(
    scripted: Scripted, worker_of: Make, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    """A timeout's answer while no thread can be started is sent when one can be, or by the stop itself."""
    monkeypatch.setattr(report, "SWEEP", 0.05)
    worker = worker_of(scripted, max_workers=2)
    overdue = threading.Event()
    worker.on_task("hang", lambda ctx, input: overdue.wait(GUARD), timeout=0.05)
    real, refused = threading.Thread.start, threading.Event()

    def start(thread: threading.Thread) -> None:
        if thread.name.startswith("sekuire-report"):
            refused.set()
            raise RuntimeError("can't start new thread")
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    worker.start()
    scripted.task("t1", "hang")
    assert refused.wait(GUARD)
    until(lambda: worker.stats().failed == 1)
    assert (worker.stats().undelivered, scripted.count("complete")) == (1, 0)
    if end == "sweep":
        monkeypatch.setattr(threading.Thread, "start", real)
        assert scripted.completion("t1")["error"]["code"] == "timeout"
        until(lambda: worker.stats().undelivered == 0)
    worker.stop(5.0)
    assert len(scripted.completions("t1")) == 1
    assert worker.stats().undelivered == 0
    overdue.set()


def test_a_timeout_while_the_timers_thread_cannot_be_started(
    scripted: Scripted, worker_of: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A heartbeat starts it once one can be, also if nothing else asks for it: the task is answered timeout."""
    real, refused = threading.Thread.start, threading.Event()

    def start(thread: threading.Thread) -> None:
        if thread.name == "sekuire-timer":
            refused.set()
            raise RuntimeError("can't start new thread")
        real(thread)

    scripted.on["heartbeat"] = lambda request: (200, {})
    worker = worker_of(scripted, max_workers=2, heartbeat_interval=0.2)
    overdue, begun = threading.Event(), threading.Event()
    worker.on_task("hang", lambda ctx, input: begun.set() or overdue.wait(GUARD), timeout=0.05)
    monkeypatch.setattr(threading.Thread, "start", start)
    with worker:
        scripted.task("t1", "hang")
        assert begun.wait(GUARD)
        assert refused.wait(GUARD)
        monkeypatch.setattr(threading.Thread, "start", real)
        assert scripted.completion("t1")["error"]["code"] == "timeout"
        overdue.set()


def test_whatever_is_raised_while_releasing_plans_the_release_again(
    scripted: Scripted, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task on its way back gets there."""
    reporter = worker._reporter
    send, failures = reporter.sender.ask, iter([MemoryError(), SystemExit(), KeyError()])

    def fail(path: str, *args: Any) -> Any:
        for failure in failures:
            raise failure
        return send(path, *args)

    monkeypatch.setattr(reporter.sender, "ask", fail)
    worker.start()
    given_back = Record(task_of(), HandlerEntry("echo", lambda ctx, input: input), reporter, "t1")
    move(given_back, State.RELEASED)
    worker._dispatcher.answers.give_back(given_back)
    assert [request.task_id for request in scripted.wait_for("release")] == ["t1"]
    until(lambda: not reporter.releases.under_way)
    worker.stop()
    assert scripted.count("release") == 1


def test_a_release_that_a_failure_of_tls_stops(
    scripted: Scripted, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is sent again, slowly, as a result would be: until then nobody else can run the task. A stop does not wait."""
    monkeypatch.setattr("sekuire.worker.release.REFUSED_PAUSE", 0.05)
    reporter = worker._reporter
    send, left = reporter.sender.ask, iter(range(2))
    problem = Later(TransportError("TLS with api.example failed", retryable=False))

    def fail(path: str, *args: Any) -> Any:
        return send(path, *args) if path != "release" or next(left, None) is None else problem

    monkeypatch.setattr(reporter.sender, "ask", fail)
    worker.start()

    def give_back(task_id: str) -> None:
        given_back = Record(task_of(task_id), HandlerEntry("echo", lambda ctx, input: input), reporter, task_id)
        move(given_back, State.RELEASED)
        worker._dispatcher.answers.give_back(given_back)

    give_back("t1")
    assert scripted.wait_for("release")[0].task_id == "t1"
    until(lambda: not reporter.releases.under_way)
    left = iter(range(1000))
    monkeypatch.setattr("sekuire.worker.release.REFUSED_PAUSE", 3600.0)
    give_back("t2")
    worker.stop(GUARD)
    assert worker.wait(0)
    assert scripted.count("release") == 1


def test_a_pool_thread_that_ends_is_replaced(
    scripted: Scripted, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where an exception comes at a place that nobody foresaw, the next result is sent."""
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    reporter = worker._reporter
    worker.start()
    perform, failures = reporter.delivery.perform, iter([MemoryError()])

    def fail(action: Any) -> None:
        perform(action)
        for failure in failures:
            raise failure

    monkeypatch.setattr(reporter.delivery, "perform", fail)
    reporter.enqueue(take(worker, "t1"))
    scripted.completion("t1")
    until(lambda: not reporter.delivery.threads)
    reporter.enqueue(take(worker, "t2"))
    scripted.completion("t2")
    until(lambda: worker.stats().undelivered == 0)


def test_only_legal_edges() -> None:
    """A settled report is not sent, and a sent one is not settled twice."""
    one = results.Report("t1", 1, b"", True)
    with pytest.raises(AssertionError):
        results.move(one, results.State.SETTLED)
    results.move(one, results.State.SENDING)
    results.move(one, results.State.SETTLED)
    for state in (results.State.SENDING, results.State.SETTLED, results.State.DROPPED):
        with pytest.raises(AssertionError):
            results.move(one, state)
