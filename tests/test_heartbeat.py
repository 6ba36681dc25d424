"""Heartbeats and the lease they keep."""

from __future__ import annotations

import datetime as dt
import logging
import threading
from email.utils import format_datetime
from typing import Any, Callable, Dict, List

import pytest

from sekuire import TaskContext, Worker, heartbeat
from sekuire.heartbeat import Lease
from sekuire.lifecycle import PeriodicThread

from .conftest import AGENT
from .scripted import GUARD, Scripted, grant, until

Make = Callable[..., Worker]


def lease_of(seconds: float, **fields: Any) -> Dict[str, Any]:
    end = dt.datetime.now(dt.timezone.utc) + dt.timedelta(seconds=seconds)
    return {"lease_expires_at": end.strftime("%Y-%m-%dT%H:%M:%S.%fZ"), **fields}


@pytest.fixture
def worker(scripted: Scripted, worker_of: Make) -> Worker:
    made = worker_of(scripted, heartbeat_interval=0.05)
    made.on_task("echo", lambda ctx, input: input)
    return made


def test_the_request(scripted: Scripted, worker: Worker) -> None:
    """A heartbeat tells the status, the uptime, the platform and how each worker is; the last one says stopped."""
    with worker:
        scripted.wait_for("heartbeat", 3)
    requests = scripted.of("heartbeat")
    body = requests[1].json
    assert requests[0].path == "/api/v1/installations/inst-1/heartbeat"
    assert body["status"] == "healthy"
    assert isinstance(body["uptime_seconds"], int)
    assert body["platform"]["type"] in ("bare_metal", "docker", "kubernetes", "aws_lambda")
    assert body["capabilities"] == ["echo"]
    assert body["sdk"]["name"] == "sekuire-python"
    assert body["workers"] == [
        {"worker_id": worker.worker_id, "status": "healthy", "active_tasks": 0, "capabilities": ["echo"]}
    ]
    assert [request.json["status"] for request in requests].index("stopped") == len(requests) - 1


def test_a_heartbeat_tells_the_running_tasks(scripted: Scripted, worker_of: Make) -> None:
    """active_tasks is what runs now."""
    go = threading.Event()
    worker = worker_of(scripted, heartbeat_interval=0.03)
    worker.on_task("echo", lambda ctx, input: go.wait(GUARD))
    with worker:
        scripted.task("t1")
        until(lambda: [r.json["workers"][0]["active_tasks"] for r in scripted.of("heartbeat")][-1:] == [1])
        go.set()
        until(lambda: scripted.wait_for("heartbeat")[-1].json["workers"][0]["active_tasks"] == 0)


def test_the_platform_names_the_interval(scripted: Scripted, worker_of: Make) -> None:
    """The shortest interval counts: the worker's own, or the one that bootstrap, `connected` or a heartbeat names."""
    worker = worker_of(scripted, heartbeat_interval=1000.0)
    worker.on_task("echo", lambda ctx, input: input)
    scripted.on["heartbeat"] = lambda request: (200, {"heartbeat_interval_seconds": 0.02})
    with worker:
        scripted.wait_for("heartbeat", 5)
        assert worker._heartbeat.interval() == 0.02


@pytest.mark.parametrize("where", ["bootstrap", "connected"])
def test_the_interval_comes_with_the_login_too(scripted: Scripted, worker_of: Make, where: str) -> None:
    """An interval in the bootstrap's answer or the stream's first event counts."""
    fields = {"heartbeat_interval_seconds": 0.02}
    if where == "bootstrap":
        scripted.on["bootstrap"] = lambda request: (201, grant(**fields))
    else:
        scripted.connected = fields
    worker = worker_of(scripted, heartbeat_interval=1000.0)
    worker.on_task("echo", lambda ctx, input: input)
    with worker:
        until(lambda: worker._heartbeat.interval() == 0.02)
        if where == "bootstrap":
            scripted.wait_for("heartbeat", 4)


def test_a_refreshed_token_is_used_at_once(scripted: Scripted, worker: Worker) -> None:
    """The token that a heartbeat brings replaces the one in use."""
    scripted.on["heartbeat"] = lambda request: (200, {"refreshed_token": "rt-2"})
    with worker:
        until(lambda: scripted.wait_for("heartbeat")[-1].headers["Authorization"] == "Bearer rt-2")
        scripted.task("t1")
        scripted.completion("t1")
        assert scripted.of("complete")[0].headers["Authorization"] == "Bearer rt-2"
    assert scripted.count("refresh") == 0


@pytest.mark.parametrize("answer", [(500, {}), (404, {}), (200, b"no json"), (200, []), None], ids=str)
def test_a_bad_answer_is_lived_with(scripted: Scripted, worker: Worker, answer: Any) -> None:
    """A heartbeat that fails, or is answered nonsense, stops nothing; the next comes at its time."""
    scripted.on["heartbeat"] = lambda request: answer
    with worker:
        scripted.wait_for("heartbeat", 3)
        scripted.task("t1")
        assert scripted.completion("t1")["status"] == "completed"


def test_a_gateway_hears_of_every_answer(scripted: Scripted, worker_of: Make, caplog: pytest.LogCaptureFixture) -> None:
    """The policy gateway gets each heartbeat's answer, each heartbeat its hash, and its failure harms nothing."""

    class Policy:
        hash = "h1"

    class Gateway:
        policy = Policy()
        heard: List[Any] = []

        def check_request(self) -> None: ...

        def check_capability(self, name: str) -> None: ...

        def on_heartbeat_response(self, response: Any) -> None:
            self.heard.append(response.active_policy_hash)
            raise RuntimeError("gateway")

    scripted.on["heartbeat"] = lambda request: (200, {"active_policy_hash": "h2"})
    worker = worker_of(scripted, heartbeat_interval=0.03, policy_gateway=Gateway())
    worker.on_task("echo", lambda ctx, input: input)
    with worker:
        scripted.wait_for("heartbeat", 4)
    assert set(Gateway.heard) == {"h2"}
    assert {request.json["policy_hash"] for request in scripted.of("heartbeat")} == {"h1"}
    assert any("policy gateway failed" in record.message for record in caplog.records)


def test_a_policy_without_a_gateway_is_warned_of_once(
    scripted: Scripted, worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    """A platform that names a policy which nothing enforces is an error in the log, once."""
    scripted.on["heartbeat"] = lambda request: (200, {"active_policy_hash": "h2"})
    with worker:
        scripted.wait_for("heartbeat", 4)
    assert sum("names an active policy" in record.message for record in caplog.records) == 1


def test_policy_required_without_a_gateway_stops(scripted: Scripted, worker_of: Make) -> None:
    """With policy_required=True that is fatal."""
    from sekuire.errors import ConfigurationError

    scripted.on["heartbeat"] = lambda request: (200, {"active_policy_hash": "h2"})
    worker = worker_of(scripted, policy_required=True)
    worker.on_task("echo", lambda ctx, input: input)
    with pytest.raises(ConfigurationError, match="policy_gateway"):
        worker.start(block=True)


def test_no_id_no_heartbeats(scripted: Scripted, worker_of: Make, caplog: pytest.LogCaptureFixture) -> None:
    """A runtime token whose installation nobody tells means no heartbeats, and one warning."""
    worker = worker_of(scripted, runtime_token="rt", heartbeat_interval=0.03)
    worker.on_task("echo", lambda ctx, input: input)
    with worker:
        scripted.task("t1")
        scripted.completion("t1")
        until(lambda: any("no heartbeats" in record.message for record in caplog.records))
        for _ in range(3):
            worker._heartbeat.nudge()
    assert scripted.count("heartbeat") == 0
    assert sum("no heartbeats" in record.message for record in caplog.records) == 1


# -- the lease --


def test_lease_arithmetic() -> None:
    """A lease lasts its lifetime and the grace from when the beat was sent; an unknown one has no end."""
    lease = Lease()
    assert lease.is_held()
    lease.renew(5.0, None, 100.0, 10.0)
    assert lease.limit == 115.0
    lease.renew(None, None, 100.0, 10.0)
    assert lease.is_held()
    lease.renew(1.0, None, -1e9, 10.0)
    assert not lease.is_held()


def test_a_lost_lease(
    scripted: Scripted, worker_of: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without heartbeats beyond the grace running contexts are cancelled and no task begins, until it is renewed."""
    monkeypatch.setattr(heartbeat, "MIN_GRACE", 0.0)
    mode = {"ok": True}
    # The Date header has whole seconds, so a lease shorter than one cannot be told by it: none is sent.
    scripted.on["heartbeat"] = lambda request: (200, lease_of(0.3)) if mode["ok"] else (503, {})
    reasons: List[Any] = []

    begun = threading.Event()

    def handler(ctx: TaskContext, input: Any) -> Any:
        begun.set()
        ctx.wait_cancelled(GUARD)
        reasons.append(ctx.cancel_reason)

    worker = worker_of(scripted, heartbeat_interval=0.05)
    worker.on_task("hold", handler)
    worker.on_task("echo", lambda ctx, input: "ran")
    with worker:
        until(lambda: worker.stats().lease_expires_at)
        scripted.task("t1", "hold")
        assert begun.wait(GUARD)
        mode["ok"] = False
        until(lambda: reasons == ["lease lost"])
        scripted.completion("t1")
        scripted.task("t2")
        until(lambda: worker.stats().received == 2)
        beats = scripted.count("heartbeat")
        scripted.wait_for("heartbeat", beats + 3)
        assert scripted.completions("t2") == []
        mode["ok"] = True
        assert scripted.completion("t2")["output"] == "ran"
    assert any("the lease has ended" in record.message for record in caplog.records)


def test_a_task_is_given_back_when_the_lease_ends_before_it_begins(
    scripted: Scripted, worker_of: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A waiting task whose turn comes after the lease's end goes back to the platform unbegun."""
    monkeypatch.setattr(heartbeat, "MIN_GRACE", 0.0)
    mode = {"ok": True}
    scripted.on["heartbeat"] = lambda request: (200, lease_of(0.3)) if mode["ok"] else (503, {})
    ran: List[str] = []

    def handler(ctx: TaskContext, input: Any) -> None:
        ran.append(ctx.task_id)
        if ctx.task_id == "t1":
            ctx.wait_cancelled(GUARD)

    worker = worker_of(scripted, heartbeat_interval=0.05, max_workers=1)
    worker.on_task("echo", handler)
    with worker:
        scripted.task("t1")
        scripted.task("t2")
        until(lambda: worker.stats().waiting == 1)
        mode["ok"] = False
        (request,) = scripted.wait_for("release")
        assert request.task_id == "t2"
        assert worker.stats().released == 1
        mode["ok"] = True
        scripted.wait_for("heartbeat", scripted.count("heartbeat") + 2)
        scripted.task("t2", attempt=1)
        assert scripted.completion("t2")["status"] == "completed"
    assert ran == ["t1", "t2"]


def test_the_lease_of_the_login_ends_too(scripted: Scripted, worker_of: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lease that came with the bootstrap and that no heartbeat renews ends, with the worker's grace."""
    monkeypatch.setattr(heartbeat, "MIN_GRACE", 0.0)
    scripted.on["bootstrap"] = lambda request: (201, grant(**lease_of(0.5)))
    scripted.on["heartbeat"] = lambda request: (503, {})
    reasons: List[Any] = []

    def handler(ctx: TaskContext, input: Any) -> None:
        ctx.wait_cancelled(GUARD)
        reasons.append(ctx.cancel_reason)

    worker = worker_of(scripted, heartbeat_interval=0.05)
    worker.on_task("echo", handler)
    with worker:
        scripted.task("t1")
        until(lambda: reasons == ["lease lost"])


def test_a_lease_that_a_refresh_renewed_is_watched(
    scripted: Scripted, worker_of: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lease that came with a login, not a heartbeat, ends work all the same when no heartbeat renews it."""
    monkeypatch.setattr(heartbeat, "MIN_GRACE", 0.0)
    scripted.on["bootstrap"] = lambda request: (201, grant(**lease_of(0.5)))
    renewed: List[Any] = []

    def refresh(request: Any) -> Any:
        renewed.append(1)
        return 200, grant("rt-2", **lease_of(1.0))

    def beat(request: Any) -> Any:
        return (401, {}) if request.headers["Authorization"] == "Bearer rt-1" else (503, {})

    scripted.on["refresh"], scripted.on["heartbeat"] = refresh, beat
    reasons: List[Any] = []

    def handler(ctx: TaskContext, input: Any) -> None:
        ctx.wait_cancelled(GUARD)
        reasons.append(ctx.cancel_reason)

    worker = worker_of(scripted, heartbeat_interval=0.05)
    worker.on_task("echo", handler)
    with worker:
        scripted.task("t1")
        until(lambda: reasons == ["lease lost"])
    assert renewed == [1]


def test_a_platform_that_goes_silent(make_platform: Callable[..., Any], worker_of: Make, tmp_path: Any,
                                     monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """When the platform is gone for longer than the lease the worker holds still; it works again when that is back."""
    monkeypatch.setattr(heartbeat, "MIN_GRACE", 0.0)
    platform = make_platform(path=tmp_path / "db", lease_seconds=1.5)
    cancelled = threading.Event()
    begun = threading.Event()

    def hold(ctx: TaskContext, input: Any) -> str:
        begun.set()
        if ctx.wait_cancelled(GUARD):
            cancelled.set()
        return str(ctx.cancel_reason)

    worker = worker_of(platform, heartbeat_interval=0.1)
    worker.on_task("hold", hold)
    worker.on_task("echo", lambda ctx, input: input)
    with worker:
        until(lambda: worker.stats().lease_expires_at)
        task_id = platform.submit("hold", {}, AGENT)
        assert begun.wait(GUARD)
        platform.stop()
        assert cancelled.wait(GUARD)
        platform.start()
        assert platform.wait(task_id, GUARD)["output"] == "lease lost"
        assert platform.wait(platform.submit("echo", 5, AGENT), GUARD)["output"] == 5


def test_the_log_level_of_a_missed_beat(scripted: Scripted, worker: Worker, caplog: pytest.LogCaptureFixture) -> None:
    """A refused heartbeat is a warning; one that a broken network lost is only debug."""
    caplog.set_level(logging.DEBUG, "sekuire.heartbeat")
    scripted.on["heartbeat"] = lambda request: None if scripted.count("heartbeat") % 2 else (400, {"message": "bad"})
    with worker:
        scripted.wait_for("heartbeat", 4)
        until(lambda: {r.levelname for r in caplog.records if "was not taken" in r.message} == {"DEBUG", "WARNING"})


def test_a_stalled_heartbeat_does_not_delay_the_end_of_the_lease(
    scripted: Scripted, worker_of: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a heartbeat call hangs the lease ends on time, and a later beat that is taken begins work again."""
    monkeypatch.setattr(heartbeat, "MIN_GRACE", 0.0)
    hang, go = threading.Event(), threading.Event()
    hung: List[int] = []
    ends: List[Any] = []

    def beat(request: Any) -> Any:
        if hang.is_set() and not go.is_set():
            hung.append(1)
            assert go.wait(GUARD)
            return None
        return 200, lease_of(0.6)

    def hold(ctx: TaskContext, input: Any) -> None:
        ctx.wait_cancelled(GUARD)
        # The call that hung had begun, and was not over.
        ends.append((ctx.cancel_reason, bool(hung), go.is_set()))

    scripted.on["heartbeat"] = beat
    # A beat may take half of its interval: longer than this lease.
    worker = worker_of(scripted, heartbeat_interval=0.3)
    monkeypatch.setattr(heartbeat, "BEAT_LEAST", 5.0)
    worker.on_task("hold", hold)
    worker.on_task("echo", lambda ctx, input: "ran")
    with worker:
        until(lambda: worker.stats().lease_expires_at)
        scripted.task("t1", "hold")
        until(lambda: worker.stats().running == 1)
        hang.set()
        until(lambda: ends)
        assert ends == [("lease lost", True, False)]
        scripted.task("t2")
        until(lambda: worker.stats().received == 2)
        assert scripted.completions("t2") == []
        go.set()
        assert scripted.completion("t2")["output"] == "ran"


@pytest.mark.parametrize(
    "fields",
    [
        {"lease_expires_at": "1970-01-01T00:00:00Z"},
        {"lease_expires_at": "9999-12-31T23:59:59Z"},
        {"lease_expires_at": "0001-01-01T00:00:00+14:00"},
        {"lease_expires_at": "yesterday"},
        {"lease_expires_at": 1e308},
        {"heartbeat_interval_seconds": 0},
        {"heartbeat_interval_seconds": -5},
        {"heartbeat_interval_seconds": 1e300},
        {"heartbeat_interval_seconds": "NaN"},
        {"shutdown_timeout_ms": -1, "desired_state": "running"},
        {"refreshed_token": "rt-9", "refreshed_token_expires_at": "1970-01-01T00:00:00Z"},
    ],
    ids=str,
)
def test_absurd_times_do_no_harm(
    scripted: Scripted, worker_of: Make, monkeypatch: pytest.MonkeyPatch, fields: Any
) -> None:
    """Times that are past, endless or no times at all end no lease, and beats go on at the worker's own interval."""
    monkeypatch.setattr(heartbeat, "MIN_GRACE", 0.0)
    scripted.on["heartbeat"] = lambda request: (200, fields)
    worker = worker_of(scripted, heartbeat_interval=0.05)
    worker.on_task("echo", lambda ctx, input: (ctx.wait_cancelled(0.2), "ran")[1])
    with worker:
        scripted.wait_for("heartbeat", 3)
        scripted.task("t1")
        assert scripted.completion("t1")["output"] == "ran"
        scripted.wait_for("heartbeat", scripted.count("heartbeat") + 2)
        assert worker._heartbeat.interval() == 0.05


@pytest.mark.parametrize("skew", [-86_400 * 365, 86_400 * 365], ids=["a year slow", "a year fast"])
def test_a_platform_whose_clock_is_wrong(
    scripted: Scripted, worker_of: Make, monkeypatch: pytest.MonkeyPatch, skew: int
) -> None:
    """A lease counts by the platform's own Date: however wrong its clock, it ends neither early nor never."""
    monkeypatch.setattr(heartbeat, "MIN_GRACE", 0.0)
    now = dt.datetime.now(dt.timezone.utc).replace(microsecond=0) + dt.timedelta(seconds=skew)
    answer = {"lease_expires_at": (now + dt.timedelta(seconds=1)).isoformat()}
    date = {"Date": format_datetime(now, usegmt=True)}
    ok = threading.Event()
    ok.set()
    scripted.on["heartbeat"] = lambda request: (200, answer, date) if ok.is_set() else (503, {})
    reasons: List[Any] = []

    def hold(ctx: TaskContext, input: Any) -> None:
        ctx.wait_cancelled(GUARD)
        reasons.append(ctx.cancel_reason)

    worker = worker_of(scripted, heartbeat_interval=0.05)
    worker.on_task("echo", hold)
    with worker:
        until(lambda: worker.stats().lease_expires_at)
        scripted.task("t1")
        until(lambda: worker.stats().running == 1)
        scripted.wait_for("heartbeat", scripted.count("heartbeat") + 5)
        assert reasons == []
        ok.clear()
        until(lambda: reasons == ["lease lost"])


def test_heartbeats_go_on_until_the_last_report(scripted: Scripted, worker_of: Make) -> None:
    """During a drain the lease is kept until the last result has been taken; only then comes the last heartbeat."""
    accept, begun = threading.Event(), threading.Event()
    scripted.on["complete"] = lambda request: (200, {}) if accept.is_set() else (503, {})
    worker = worker_of(scripted, heartbeat_interval=0.05)
    worker.on_task("echo", lambda ctx, input: begun.set() or "done")
    worker.start()
    scripted.task("t1")
    assert begun.wait(GUARD)
    stopper = threading.Thread(target=worker.stop)
    stopper.start()
    until(lambda: worker.stop_reason and worker.stats().running == 0)
    beats = scripted.count("heartbeat")
    scripted.wait_for("heartbeat", beats + 4)
    accept.set()
    stopper.join(GUARD)
    assert not stopper.is_alive()
    statuses = [request.json["status"] for request in scripted.of("heartbeat")]
    assert statuses.count("stopped") == 1
    assert statuses[-1] == "stopped"
    assert set(statuses[beats + 1 : -1]) == {"stopping"}


def test_a_thread_that_cannot_be_started(scripted: Scripted, worker_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next one who starts the heartbeat tries again."""
    worker = worker_of(scripted)
    beats = worker._heartbeat
    monkeypatch.setattr(PeriodicThread, "start", lambda thread: (_ for _ in ()).throw(RuntimeError("no thread")))
    with pytest.raises(RuntimeError, match="no thread"):
        beats.start()
    monkeypatch.undo()
    worker.on_task("echo", lambda ctx, input: input)
    with worker:
        scripted.wait_for("heartbeat")
