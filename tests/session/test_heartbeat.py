"""Heartbeats and the lease they keep."""

from __future__ import annotations

import contextlib
import datetime as dt
import logging
import threading
import time
from email.utils import format_datetime
from typing import Any, Callable, Dict, Iterator, List, Optional

import pytest

from sekuire import SekuireSDK, TaskContext, Worker, WorkerConfig
from sekuire._internal import threads
from sekuire._internal.clock import Clock
from sekuire._internal.threads import Deadline, PeriodicThread
from sekuire.errors import SekuireError
from sekuire.session import heartbeat
from sekuire.session.heartbeat import Lease
from sekuire.session.installation import Installation

from ..conftest import AGENT
from ..support.gateway import FakeGateway
from ..support.scripted import Scripted, grant
from ..support.waiting import GUARD, until

Make = Callable[..., Worker]


class Hand:
    """A clock that a test sets."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


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
    scripted.on["heartbeat"] = lambda request: (200, {"heartbeat_interval_seconds": 0.6})
    with worker:
        scripted.wait_for("heartbeat", 4)
        assert worker.installation.heartbeat.interval() == 0.6


def test_an_order_does_not_wait_for_the_token_beside_it(scripted: Scripted, worker_of: Make) -> None:
    """While a renewal holds the store, a heartbeat with a token and a revocation stops the worker at once."""
    worker = worker_of(scripted, heartbeat_interval=0.05)
    worker.on_task("echo", lambda ctx, input: input)
    with worker:
        scripted.wait_for("heartbeat", 2)
        store = worker.installation.store
        with store._writing(Deadline(GUARD)):
            scripted.on["heartbeat"] = lambda request: (200, {"refreshed_token": "rt-2", "revoked": True})
            assert worker.wait(5.0)
    assert "revoked" in str(worker.stop_reason)


def test_a_lease_does_not_wait_for_the_token_beside_it(scripted: Scripted, worker_of: Make) -> None:
    """While a renewal holds the store, a heartbeat with a token and a lease renews the lease at once."""
    worker = worker_of(scripted, heartbeat_interval=0.05)
    worker.on_task("echo", lambda ctx, input: input)
    with worker:
        scripted.wait_for("heartbeat", 2)
        with worker.installation.store._writing(Deadline(GUARD)):
            scripted.on["heartbeat"] = lambda request: (200, lease_of(60.0, refreshed_token="rt-2"))
            until(lambda: worker.stats().lease_expires_at, timeout=5.0)
        scripted.on["heartbeat"] = lambda request: (200, {})
        until(lambda: scripted.of("heartbeat")[-1].headers["Authorization"] == "Bearer rt-2")


@pytest.mark.parametrize("endpoint", ["complete", "policy"])
@pytest.mark.parametrize(
    "body", [{"error": "x", "code": "INSTALLATION_REVOKED"}, b'{"revoked" : true, "reason": "cut'], ids=["code", "cut"]
)
def test_a_success_that_revokes(scripted: Scripted, worker_of: Make, endpoint: str, body: Any) -> None:
    """A revocation in the answer to any call, with the status of a success, ends the Beacon and its worker."""
    with SekuireSDK(
        AGENT, api_base_url=scripted.url, install_token="skt_1", heartbeat_interval=30.0, workspace_id="ws"
    ) as sdk:
        worker = sdk.create_task_worker(heartbeat_interval=30.0)
        worker.on_task("echo", lambda ctx, input: input)
        worker.start()
        scripted.on[endpoint] = lambda request: (200, body)
        if endpoint == "complete":
            scripted.task("t1")
        else:
            with contextlib.suppress(SekuireError):
                sdk.policy_gateway.refresh()
        assert worker.wait(5.0)
        until(lambda: sdk.beacon_status.state == "revoked", timeout=5.0)


@pytest.mark.parametrize("where", ["bootstrap", "connected"])
def test_the_interval_comes_with_the_login_too(scripted: Scripted, worker_of: Make, where: str) -> None:
    """An interval in the bootstrap's answer or the stream's first event counts."""
    fields = {"heartbeat_interval_seconds": 0.6}
    if where == "bootstrap":
        scripted.on["bootstrap"] = lambda request: (201, grant(**fields))
    else:
        scripted.connected = fields
    worker = worker_of(scripted, heartbeat_interval=1000.0)
    worker.on_task("echo", lambda ctx, input: input)
    with worker:
        until(lambda: worker.installation.heartbeat.interval() == 0.6)
        scripted.wait_for("heartbeat", 4)


def test_an_interval_in_connected_shortens_the_wait_in_progress(scripted: Scripted, worker_of: Make) -> None:
    """An interval that comes while the next beat is far away is used at once, and does not beat by itself."""
    open_up = threading.Event()

    def late(request: Any) -> None:
        assert open_up.wait(GUARD)
        scripted.stream(request)

    scripted.on["stream"] = late
    scripted.connected = {"heartbeat_interval_seconds": 0.5}
    worker = worker_of(scripted, heartbeat_interval=1000.0)
    worker.on_task("echo", lambda ctx, input: input)
    starter = threading.Thread(target=worker.start)
    starter.start()
    until(lambda: worker.stats().last_heartbeat_at)
    beats = scripted.count("heartbeat")
    open_up.set()
    starter.join(GUARD)
    scripted.wait_for("heartbeat", beats + 2)


def test_a_tiny_interval_does_not_spin(scripted: Scripted, worker_of: Make) -> None:
    """A platform that names a billionth of a second gets a beat every half second."""
    scripted.on["heartbeat"] = lambda request: (200, {"heartbeat_interval_seconds": 1e-9})
    worker = worker_of(scripted, heartbeat_interval=1000.0)
    worker.on_task("echo", lambda ctx, input: input)
    with worker:
        until(lambda: worker.stats().last_heartbeat_at)
        assert worker.installation.heartbeat.interval() == 0.5


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

    scripted.on["heartbeat"] = lambda request: (200, {"active_policy_hash": "h2"})
    gateway = FakeGateway(heartbeat_error=RuntimeError("gateway"), policy=Policy())
    worker = worker_of(scripted, heartbeat_interval=0.03, policy_gateway=gateway)
    worker.on_task("echo", lambda ctx, input: input)
    with worker:
        scripted.wait_for("heartbeat", 4)
    assert {one.active_policy_hash for one in gateway.heard} == {"h2"}
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
            worker.installation.heartbeat.nudge()
    assert scripted.count("heartbeat") == 0
    assert sum("no heartbeats" in record.message for record in caplog.records) == 1


# -- the lease --


def test_lease_arithmetic() -> None:
    """A lease lasts its lifetime and the grace from when the beat was sent, and only another one replaces it."""
    hand = Hand(100.0)
    lease = Lease(Clock(hand))
    assert not lease.renew(None, None, 100.0, 10.0)
    assert lease.is_held()
    assert lease.renew(5.0, None, 100.0, 10.0)
    assert (lease.limit, lease.time_left()) == (115.0, 15.0)
    assert not lease.renew(None, None, 105.0, 10.0)
    assert lease.limit == 115.0
    hand.now = 115.0
    assert not lease.is_held()
    assert lease.renew(60.0, None, 114.0, 10.0)
    assert lease.is_held()


def test_a_lease_that_the_platform_ends() -> None:
    """An end in the past ends the lease; the grace counts from then, and saying it again does not prolong it."""
    hand = Hand(100.0)
    lease = Lease(Clock(hand))
    lease.renew(60.0, None, 100.0, 10.0)
    assert lease.renew(0.0, None, 105.0, 10.0)
    assert lease.limit == 115.0
    for sent_at in (106.0, 114.0, 120.0):
        assert not lease.renew(0.0, None, sent_at, 10.0)
        assert lease.limit == 115.0
    first = Lease(Clock(hand))
    assert first.renew(0.0, None, 100.0, 10.0)
    assert first.limit == 110.0


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


def reasons_of_a_cancelled_task(scripted: Scripted, worker_of: Make) -> List[Any]:
    """Run a task until it is cancelled, on a worker that beats often. Return the reason, as a list."""
    reasons: List[Any] = []

    def handler(ctx: TaskContext, input: Any) -> None:
        ctx.wait_cancelled(GUARD)
        reasons.append(ctx.cancel_reason)

    worker = worker_of(scripted, heartbeat_interval=0.05)
    worker.on_task("echo", handler)
    with worker:
        scripted.task("t1")
        until(lambda: reasons)
    return reasons


def test_the_lease_of_the_login_ends_too(scripted: Scripted, worker_of: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lease that came with the bootstrap and that no heartbeat renews ends, with the worker's grace."""
    monkeypatch.setattr(heartbeat, "MIN_GRACE", 0.0)
    scripted.on["bootstrap"] = lambda request: (201, grant(**lease_of(0.5)))
    scripted.on["heartbeat"] = lambda request: (503, {})
    assert reasons_of_a_cancelled_task(scripted, worker_of) == ["lease lost"]


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
    assert reasons_of_a_cancelled_task(scripted, worker_of) == ["lease lost"]
    assert renewed == [1]


PAGE = (200, b"<html>sign in</html>", {"Content-Type": "text/html"})


@pytest.mark.parametrize(
    ("answer", "is_beat"),
    [
        ((200, {}), True),
        ((200, b""), True),
        ((204, b""), True),
        ((200, {"lease_expires_at": 12345}), True),
        ((200, {"lease_expires_at": "tomorrow"}), True),
        ((200, []), False),
        ((200, b'{"lease_expires_at": "9999-12-31T23:59:59Z"'), False),
        (PAGE, False),
        ((302, b"", {"Location": "https://portal.example/"}), False),
        ((404, b"<html>no such page</html>", {"Content-Type": "text/html"}), False),
        ((503, {"error": "maintenance"}), False),
    ],
    ids=str,
)
def test_an_answer_without_a_usable_lease(
    scripted: Scripted, worker_of: Make, monkeypatch: pytest.MonkeyPatch, answer: Any, is_beat: bool
) -> None:
    """What holds no usable lease leaves the old one to its end, whoever answered and with what status."""
    monkeypatch.setattr(heartbeat, "MIN_GRACE", 0.0)
    scripted.on["heartbeat"] = lambda request: (200, lease_of(0.3))
    begun = threading.Event()
    reasons: List[Any] = []

    def hold(ctx: TaskContext, input: Any) -> None:
        begun.set()
        ctx.wait_cancelled(GUARD)
        reasons.append(ctx.cancel_reason)

    worker = worker_of(scripted, heartbeat_interval=0.05)
    worker.on_task("echo", hold)
    with worker:
        until(lambda: worker.stats().lease_expires_at)
        scripted.task("t1")
        assert begun.wait(GUARD)
        scripted.on["heartbeat"] = lambda request: answer
        until(lambda: reasons == ["lease lost"])
        assert worker.stats().lease_expires_at is not None
        beat, count = worker.stats().last_heartbeat_at, scripted.count("heartbeat")
        scripted.wait_for("heartbeat", count + 3)
        assert (worker.stats().last_heartbeat_at != beat) is is_beat


def test_a_page_ends_no_lease(scripted: Scripted, worker_of: Make, caplog: pytest.LogCaptureFixture) -> None:
    """A platform that never sent a lease sets no limit, and a page in its place is warned of once."""
    scripted.on["heartbeat"] = lambda request: PAGE
    worker = worker_of(scripted, heartbeat_interval=0.05)
    worker.on_task("echo", lambda ctx, input: "ran")
    with worker:
        scripted.wait_for("heartbeat", 4)
        scripted.task("t1")
        assert scripted.completion("t1")["output"] == "ran"
    (record,) = [record for record in caplog.records if "was not accepted" in record.message]
    assert "sign in" in record.message


def test_a_platform_that_ends_the_lease(scripted: Scripted, worker_of: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """An end before the answer's Date ends the lease, although it is said with every beat."""
    monkeypatch.setattr(heartbeat, "MIN_GRACE", 0.5)
    ended = threading.Event()

    def beat(request: Any) -> Any:
        now = dt.datetime.now(dt.timezone.utc)
        return 200, lease_of(-100.0 if ended.is_set() else 1000.0), {"Date": format_datetime(now, usegmt=True)}

    scripted.on["heartbeat"] = beat
    reasons: List[Any] = []

    def hold(ctx: TaskContext, input: Any) -> None:
        ctx.wait_cancelled(GUARD)
        reasons.append(ctx.cancel_reason)

    worker = worker_of(scripted, heartbeat_interval=0.05)
    worker.on_task("hold", hold)
    worker.on_task("echo", lambda ctx, input: "ran")
    with worker:
        scripted.task("t1", "hold")
        until(lambda: worker.stats().running == 1)
        ended.set()
        until(lambda: reasons == ["lease lost"])
        ended.clear()
        scripted.task("t2")
        assert scripted.completion("t2")["output"] == "ran"


def test_a_past_lease_without_a_date_is_warned_of_once(
    scripted: Scripted, worker_of: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a Date an end that has passed may be our clock's fault: it is ignored, with one warning."""
    scripted.on["bootstrap"] = lambda request: (201, grant(**lease_of(-100.0)))
    scripted.on["heartbeat"] = lambda request: (200, lease_of(-100.0))
    worker = worker_of(scripted, heartbeat_interval=0.05)
    worker.on_task("echo", lambda ctx, input: "ran")
    with worker:
        scripted.wait_for("heartbeat", 4)
        scripted.task("t1")
        assert scripted.completion("t1")["output"] == "ran"
        assert worker.stats().lease_expires_at is None
    (record,) = [record for record in caplog.records if "lease_expires_at" in record.message]
    assert record.levelname == "WARNING"


# -- a machine that sleeps --


class Sleeper:
    """A worker whose machine sleeps when a test says so."""

    def __init__(self, scripted: Scripted, **options: Any) -> None:
        self.ahead = 0.0
        config = WorkerConfig(
            api_base_url=scripted.url, agent_id=AGENT, install_token="skt-1", shutdown_timeout=2.0, **options
        )
        self.clock = Clock(lambda: time.monotonic() + self.ahead)
        self.installation = Installation(config, pool_size=8, clock=self.clock)
        self.worker = Worker(config, _installation=self.installation)
        self.reasons: List[Optional[str]] = []
        self.begun = threading.Event()
        self.worker.on_task("hold", self._hold)
        self.worker.on_task("echo", lambda ctx, input: "ran")

    def _hold(self, ctx: TaskContext, input: Any) -> None:
        self.begun.set()
        ctx.wait_cancelled(GUARD)
        self.reasons.append(ctx.cancel_reason)


@pytest.fixture
def sleeper_of(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Sleeper]]:
    monkeypatch.setattr(threads, "LOOK_AGAIN", 0.05)
    made: List[Sleeper] = []

    def make(scripted: Scripted, **options: Any) -> Sleeper:
        made.append(Sleeper(scripted, **options))
        return made[-1]

    yield make
    for sleeper in made:
        sleeper.worker.stop(1.0)
        sleeper.installation.close()


def test_a_machine_that_wakes_beats_first(scripted: Scripted, sleeper_of: Callable[..., Sleeper]) -> None:
    """After a suspend that outlasted the lease a heartbeat is sent by itself, and work that it keeps goes on."""
    scripted.on["heartbeat"] = lambda request: (200, lease_of(600.0))
    sleeper = sleeper_of(scripted, heartbeat_interval=300.0)
    with sleeper.worker as worker:
        until(lambda: worker.stats().lease_expires_at)
        scripted.task("t1", "hold")
        assert sleeper.begun.wait(GUARD)
        for _ in range(2):
            beats = scripted.count("heartbeat")
            sleeper.ahead += 5000.0
            scripted.wait_for("heartbeat", beats + 1)
            until(sleeper.installation.heartbeat.lease.is_held)
        scripted.task("t2")
        assert scripted.completion("t2")["output"] == "ran"
        assert sleeper.reasons == []


def test_a_short_sleep_counts_for_the_interval(scripted: Scripted, sleeper_of: Callable[..., Sleeper]) -> None:
    """A suspend shorter than the lease, or without any, brings the next beat forward all the same."""
    sleeper = sleeper_of(scripted, heartbeat_interval=300.0)
    with sleeper.worker as worker:
        until(lambda: worker.stats().last_heartbeat_at)
        beats = scripted.count("heartbeat")
        sleeper.ahead += 301.0
        scripted.wait_for("heartbeat", beats + 1)


def test_a_machine_that_wakes_without_its_platform(scripted: Scripted, sleeper_of: Callable[..., Sleeper]) -> None:
    """If the one more heartbeat after a suspend is not accepted, work is cancelled; nothing begins until it is."""
    accepts = threading.Event()
    accepts.set()
    scripted.on["heartbeat"] = lambda request: (200, lease_of(600.0)) if accepts.is_set() else (503, {})
    sleeper = sleeper_of(scripted, heartbeat_interval=300.0)
    with sleeper.worker as worker:
        until(lambda: worker.stats().lease_expires_at)
        scripted.task("t1", "hold")
        assert sleeper.begun.wait(GUARD)
        accepts.clear()
        beats = scripted.count("heartbeat")
        sleeper.ahead += 5000.0
        until(lambda: sleeper.reasons == ["lease lost"])
        assert scripted.count("heartbeat") > beats
        scripted.task("t2")
        until(lambda: worker.stats().received == 2)
        assert scripted.completions("t2") == []
        accepts.set()
        sleeper.ahead += 5000.0
        assert scripted.completion("t2")["output"] == "ran"


def test_a_beat_that_was_under_way_when_the_machine_slept(
    scripted: Scripted, sleeper_of: Callable[..., Sleeper]
) -> None:
    """A request that went out before a suspend cannot speak for the time after it: another one is tried."""
    asleep, go = threading.Event(), threading.Event()

    def beat(request: Any) -> Any:
        if asleep.is_set() and not go.is_set():
            assert go.wait(GUARD)
            return 503, {}
        return 200, lease_of(600.0)

    scripted.on["heartbeat"] = beat
    sleeper = sleeper_of(scripted, heartbeat_interval=300.0)
    with sleeper.worker as worker:
        until(lambda: worker.stats().lease_expires_at)
        scripted.task("t1", "hold")
        assert sleeper.begun.wait(GUARD)
        asleep.set()
        beats = scripted.count("heartbeat")
        sleeper.installation.heartbeat.nudge()
        scripted.wait_for("heartbeat", beats + 1)
        sleeper.ahead += 5000.0
        until(lambda: not sleeper.installation.heartbeat.lease.is_held())
        go.set()
        scripted.wait_for("heartbeat", beats + 2)
        until(sleeper.installation.heartbeat.lease.is_held)
        assert sleeper.reasons == []


@pytest.mark.slow
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
    scripted.on["heartbeat"] = lambda request: None if scripted.count("heartbeat") % 2 else (400, {"error": "bad"})
    with worker:
        scripted.wait_for("heartbeat", 4)
        until(lambda: {r.levelname for r in caplog.records if "was not accepted" in r.message} == {"DEBUG", "WARNING"})


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
    # A beat may take a second: longer than this lease.
    worker = worker_of(scripted, heartbeat_interval=0.3)
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
        assert worker.installation.heartbeat.interval() == 0.05


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
    beats = worker.installation.heartbeat
    monkeypatch.setattr(PeriodicThread, "start", lambda thread: (_ for _ in ()).throw(RuntimeError("no thread")))
    with pytest.raises(RuntimeError, match="no thread"):
        beats.start()
    monkeypatch.undo()
    worker.on_task("echo", lambda ctx, input: input)
    with worker:
        scripted.wait_for("heartbeat")
