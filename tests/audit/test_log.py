"""Audit events: batched, bounded, delivered once, never in a handler's way, without secrets."""

from __future__ import annotations

import datetime as dt
import json
import logging
import math
import os
import pathlib
import threading
import time
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional

import pytest

from sekuire import SekuireSDK, TaskError
from sekuire._internal.threads import Deadline
from sekuire.audit import AuditHandler, AuditStats, buffer, sender
from sekuire.errors import ConfigurationError, PolicyViolationError, SekuireError
from sekuire.secret import Secret
from sekuire.wire import protocol

from ..conftest import AGENT
from ..local.test_restart import Process
from ..support.scripted import Answer, Blackhole, Request, Scripted
from ..support.servers import run_python
from ..support.waiting import GUARD, client_threads, until

Make = Callable[..., SekuireSDK]


@pytest.fixture
def sdk_of() -> Iterator[Make]:
    """SDKs for a platform that have a runtime token and send no heartbeats of their own, shut down at the end."""
    made: List[SekuireSDK] = []

    def make(platform: Any, **options: Any) -> SekuireSDK:
        url = platform if isinstance(platform, str) else platform.url
        given = {"runtime_token": "rt-canary-1", "installation_id": "inst-1", "auto_heartbeat": False}
        if hasattr(platform, "create_install_token"):
            given = {"install_token": platform.create_install_token(AGENT), "auto_heartbeat": True}
        options = {"connect_timeout": 2.0, "read_timeout": 5.0, "heartbeat_interval": 0.1, **given, **options}
        made.append(SekuireSDK(AGENT, api_base_url=url, **options))
        return made[-1]

    yield make
    for sdk in made:
        sdk.shutdown(1.0)


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sender, "RETRY_MAX", 0.02)


def events_of(scripted: Scripted) -> List[Dict[str, Any]]:
    return [event for request in scripted.of("logs") for event in request.json["events"]]


def data_of(events: List[Dict[str, Any]], event_type: str = "model_call") -> List[Any]:
    return [event["event_data"] for event in events if event["event_type"] == event_type]


def messages(caplog: pytest.LogCaptureFixture, level: int) -> List[str]:
    return [r.getMessage() for r in caplog.records if r.name == "sekuire.audit" and r.levelno == level]


def echo(ctx: Any, input: Any) -> Any:
    return input


# -- batches ----------------------------------------------------------------------------------------------------------


def test_a_batch_goes_when_it_is_full(scripted: Scripted, sdk_of: Make) -> None:
    """Fifty events go at once, in order, as one request; the rest waits for its time, or a flush."""
    sdk = sdk_of(scripted)
    sdk.start()
    for number in range(120):
        sdk.log("model_call", {"n": number})
    scripted.wait_for("logs", 2)
    until(lambda: sdk.audit.stats().delivered == 100)
    assert sdk.audit.stats() == AuditStats(noted=120, delivered=100, waiting=20)
    assert sdk.audit.flush(GUARD)
    assert [len(request.json["events"]) for request in scripted.of("logs")] == [50, 50, 20]
    assert data_of(events_of(scripted)) == [{"n": number} for number in range(120)]
    assert len({request.headers["Idempotency-Key"] for request in scripted.of("logs")}) == 3


def test_a_batch_goes_after_its_time(scripted: Scripted, sdk_of: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """An event does not wait longer than the interval for others."""
    monkeypatch.setattr(buffer, "INTERVAL", 0.02)
    sdk = sdk_of(scripted)
    sdk.start()
    for number in range(2):
        sdk.log("model_call", {"n": number})
        scripted.wait_for("logs", number + 1)


def test_the_shape(scripted: Scripted, sdk_of: Make) -> None:
    """An event says who, where, when, what and how grave, as the contract has it."""
    sdk = sdk_of(scripted, workspace_id="ws-1", environment="test", agent_name="The Clerk")
    sdk.log("network_access", {"domain": "example.org", "ünï": [1, None]}, "warn")
    sdk.log("health")
    sdk.log("file_access", "a path")
    sdk.start()
    assert sdk.audit.flush(GUARD)
    (request,) = scripted.of("logs")
    assert request.headers["Authorization"] == "Bearer rt-canary-1"
    assert request.headers["Content-Type"] == "application/json"
    event = request.json["events"][0]
    assert protocol.parse_time(event.pop("event_timestamp")) is not None
    assert event == {
        "sekuire_id": AGENT,
        "session_id": sdk.audit.session_id,
        "workspace_id": "ws-1",
        "agent_name": "The Clerk",
        "environment": "test",
        "event_type": "network_access",
        "severity": "warn",
        "event_data": {"domain": "example.org", "ünï": [1, None]},
    }
    assert [one["event_data"] for one in request.json["events"][1:]] == [{}, {"value": "a path"}]
    assert sdk_of(scripted).audit.session_id != sdk.audit.session_id


def test_the_api_key_where_there_is_no_token(scripted: Scripted, sdk_of: Make) -> None:
    """A platform that gives no runtime token gets the events by the API key, with the device's fingerprint."""
    scripted.on["recover"] = lambda request: (503, {"error": "unavailable"})
    nothing = {"install_token": None, "runtime_token": None, "installation_id": None}
    key = {"api_key": "sk_live_1", "device_fingerprint": "device-7"}
    sdk = sdk_of(scripted, auto_heartbeat=True, required=False, **nothing, **key)
    sdk.start(0)
    sdk.log("model_call", {"n": 1})
    assert sdk.audit.flush(GUARD)
    request = scripted.of("logs")[0]
    assert request.headers["X-API-Key"] == "sk_live_1"
    assert request.headers["X-Device-Fingerprint"] == "device-7"
    assert "Authorization" not in request.headers
    recover = scripted.wait_for("recover")[0]
    assert recover.headers["X-Device-Fingerprint"] == "device-7"


def test_the_fingerprint_goes_with_api_keys_alone(scripted: Scripted, sdk_of: Make) -> None:
    """Requests that carry a token or none do not have it."""
    with sdk_of(scripted, device_fingerprint="device-7", auto_heartbeat=True):
        scripted.wait_for("heartbeat")
    sent = [request for name in ("bootstrap", "heartbeat", "logs") for request in scripted.of(name)]
    assert all("X-Device-Fingerprint" not in request.headers for request in sent)


def test_the_workspace_of_the_login(platform: Any, sdk_of: Make) -> None:
    """Without a workspace of the user's own, events carry that of the login; without a name, none."""
    with sdk_of(platform) as sdk:
        sdk.log("model_call")
    (event,) = platform.logs("model_call")
    assert event["workspace_id"] == "ws_local"
    assert "agent_name" not in event


def test_many_threads_lose_nothing(scripted: Scripted, sdk_of: Make) -> None:
    """What 64 threads log at once arrives, each thread's in its order, nothing twice."""
    sdk = sdk_of(scripted)
    sdk.start()
    barrier = threading.Barrier(64)

    def work(thread: int) -> None:
        barrier.wait(GUARD)
        for number in range(100):
            sdk.log("model_call", {"thread": thread, "n": number})

    threads = [threading.Thread(target=work, args=(number,)) for number in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(GUARD)
    assert sdk.audit.flush(GUARD)
    found: Dict[int, List[int]] = {number: [] for number in range(64)}
    for data in data_of(events_of(scripted)):
        found[data["thread"]].append(data["n"])
    assert found == {number: list(range(100)) for number in range(64)}
    assert max(len(request.json["events"]) for request in scripted.of("logs")) == 50
    assert sdk.audit.stats() == AuditStats(noted=6400, delivered=6400)


def test_large_events_make_small_batches(scripted: Scripted, sdk_of: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch goes, and ends, where it would grow too large."""
    monkeypatch.setattr(buffer, "BATCH_BYTES", 5000)
    sdk = sdk_of(scripted)
    sdk.start()
    for number in range(8):
        sdk.log("model_call", {"n": number, "text": "x" * 1000})
    scripted.wait_for("logs", 2)
    assert sdk.audit.flush(GUARD)
    assert [len(request.json["events"]) for request in scripted.of("logs")] in ([3, 3, 2], [3, 3, 1, 1])


# -- bounds -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bound", "value"), [("MAX_EVENTS", 60), ("MAX_BYTES", 60 * (300 + len('{"n":100}')))])
def test_the_oldest_go(
    scripted: Scripted,
    sdk_of: Make,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    bound: str,
    value: int,
) -> None:
    """Beyond the bounds the oldest events are dropped and counted, with one warning a spell."""
    monkeypatch.setattr(buffer, bound, value)
    sdk = sdk_of(scripted)
    for number in range(100, 200):
        sdk.log("model_call", {"n": number})
    assert sdk.audit.stats() == AuditStats(noted=100, dropped=40, waiting=60)
    sdk.start()
    assert sdk.audit.flush(GUARD)
    assert data_of(events_of(scripted)) == [{"n": number} for number in range(140, 200)]
    assert len(messages(caplog, logging.WARNING)) == 1
    assert "(40 so far)" in messages(caplog, logging.WARNING)[0]


def test_a_batch_on_its_way_is_whole(scripted: Scripted, sdk_of: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is dropped in an outage is never part of a batch that was sent once already."""
    monkeypatch.setattr(buffer, "MAX_EVENTS", 55)
    down = True
    scripted.on["logs"] = lambda request: (503, {}) if down else (200, {})
    sdk = sdk_of(scripted)
    sdk.start()
    for number in range(50):
        sdk.log("model_call", {"n": number})
    scripted.wait_for("logs", 2)
    for number in range(50, 200):
        sdk.log("model_call", {"n": number})
    down = False
    assert sdk.audit.flush(GUARD)
    taken = {request.headers["Idempotency-Key"]: request for request in scripted.of("logs")}
    numbers = [data["n"] for request in taken.values() for data in data_of(request.json["events"])]
    assert numbers == [*range(50), *range(145, 200)]
    assert sdk.audit.stats() == AuditStats(noted=200, delivered=105, dropped=95)


# -- outages and refusals ---------------------------------------------------------------------------------------------


def failing(*answers: Any) -> Callable[[Request], Answer]:
    """Give these answers, one after the other, then 200; None cuts the connection."""
    left = list(answers)

    def answer(request: Request) -> Answer:
        if not left:
            return 200, {}
        found = left.pop(0)
        return found(request) if callable(found) else found

    return answer


def test_an_outage(scripted: Scripted, sdk_of: Make, caplog: pytest.LogCaptureFixture) -> None:
    """A batch is sent again, the same under the same key, until it is taken; the outage is told once."""
    caplog.set_level(logging.INFO, "sekuire.audit")
    scripted.on["logs"] = failing((503, {}), None, lambda request: request.reset(), (429, {}), (500, b"<html>"))
    sdk = sdk_of(scripted)
    sdk.start()
    sdk.log("model_call", {"n": 1})
    assert sdk.audit.flush(GUARD)
    requests = scripted.of("logs")
    assert len(requests) == 6
    assert len({(request.raw, request.headers["Idempotency-Key"]) for request in requests}) == 1
    assert len(messages(caplog, logging.WARNING)) == 1
    assert messages(caplog, logging.INFO) == ["audit events are delivered again"]
    assert sdk.audit.stats() == AuditStats(noted=1, delivered=1)


def test_an_expired_token(platform: Any, sdk_of: Make) -> None:
    """A 401 is answered by the renewal that all share, and the batch comes through."""
    with sdk_of(platform, heartbeat_interval=1000.0) as sdk:
        platform.expire_tokens()
        sdk.log("model_call", {"n": 1})
        assert sdk.audit.flush(GUARD)
        assert data_of(platform.logs()) == [{"n": 1}]
        assert platform.count("logs", 401) == 1
        assert platform.count("refresh", 200) == 1


@pytest.mark.parametrize("status", [404, 405, 501])
def test_a_platform_without_logs(
    scripted: Scripted, sdk_of: Make, caplog: pytest.LogCaptureFixture, status: int
) -> None:
    """A platform that takes none gets no more, and that is told once."""
    scripted.on["logs"] = lambda request: (status, {"error": "what?"})
    sdk = sdk_of(scripted)
    sdk.start()
    for _ in range(3):
        sdk.log("model_call")
        assert sdk.audit.flush(GUARD)
    sdk.shutdown()
    assert scripted.count("logs") == 1
    (told,) = messages(caplog, logging.WARNING)
    assert f"does not offer audit events (HTTP {status}" in told
    assert "(1 are dropped)" in told


def test_a_404_of_a_platform_that_takes_logs(scripted: Scripted, sdk_of: Make) -> None:
    """After a batch was taken, a 404 is an outage: nothing is lost over a deployment."""
    scripted.on["logs"] = failing((200, {}), (404, {}), (405, {}))
    sdk = sdk_of(scripted)
    sdk.start()
    for number in range(2):
        sdk.log("model_call", {"n": number})
        assert sdk.audit.flush(GUARD)
    assert sdk.audit.stats() == AuditStats(noted=2, delivered=2)
    assert scripted.count("logs") == 4


@pytest.mark.parametrize("status", [400, 402, 403, 413, 422])
def test_a_batch_that_is_refused(
    scripted: Scripted, sdk_of: Make, caplog: pytest.LogCaptureFixture, status: int
) -> None:
    """What repeating would not mend is dropped and counted, told once, and the next batch is tried."""
    scripted.on["logs"] = failing((status, {"error": "no"}), (status, {"error": "no"}))
    sdk = sdk_of(scripted)
    sdk.start()
    for number in range(3):
        sdk.log("model_call", {"n": number})
        assert sdk.audit.flush(GUARD)
    assert sdk.audit.stats() == AuditStats(noted=3, delivered=1, dropped=2)
    (told,) = messages(caplog, logging.ERROR)
    assert f"HTTP {status}" in told


def test_a_batch_that_is_too_large(scripted: Scripted, sdk_of: Make) -> None:
    """A platform that takes less at once gets less at once, and all of it in order."""
    taken: List[Any] = []

    def answer(request: Request) -> Answer:
        if len(request.json["events"]) > 10:
            return 413, {}
        taken.extend(data_of(request.json["events"]))
        return 200, {}

    scripted.on["logs"] = answer
    sdk = sdk_of(scripted)
    sdk.start()
    for number in range(50):
        sdk.log("model_call", {"n": number})
    assert sdk.audit.flush(GUARD)
    assert taken == [{"n": number} for number in range(50)]
    keys = [request.headers["Idempotency-Key"] for request in scripted.of("logs")]
    assert len(set(keys)) == len(keys)


def test_a_revocation(scripted: Scripted, sdk_of: Make, caplog: pytest.LogCaptureFixture) -> None:
    """A revoked installation sends nothing any more."""
    scripted.on["logs"] = lambda request: (403, {"code": "INSTALLATION_REVOKED", "message": "breach"})
    sdk = sdk_of(scripted)
    sdk.start()
    for _ in range(2):
        sdk.log("model_call")
        assert sdk.audit.flush(GUARD)
    assert scripted.count("logs") == 1
    assert "breach" in messages(caplog, logging.WARNING)[0]


def test_an_unforeseen_failure_costs_one_batch(
    scripted: Scripted, sdk_of: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A defect while sending does not end the thread."""
    sdk = sdk_of(scripted)
    sdk.start()
    with monkeypatch.context() as patch:
        patch.setattr(protocol, "audit_body", None)
        sdk.log("model_call", {"n": 1})
        assert sdk.audit.flush(GUARD)
    sdk.log("model_call", {"n": 2})
    assert sdk.audit.flush(GUARD)
    assert data_of(events_of(scripted)) == [{"n": 2}]
    assert sdk.audit.stats() == AuditStats(noted=2, delivered=1, dropped=1)
    assert "unforeseen" in messages(caplog, logging.ERROR)[0]


def test_an_answer_that_was_lost(platform: Any, sdk_of: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that the platform kept, but could not say so, is not kept twice."""
    keep = platform._store.log
    failures = iter([True])

    def log(*arguments: Any) -> None:
        keep(*arguments)
        if next(failures, False):
            raise OSError("the answer is lost")

    monkeypatch.setattr(platform._store, "log", log)
    with sdk_of(platform) as sdk:
        sdk.log("model_call", {"n": 1})
        assert sdk.audit.flush(GUARD)
    assert platform.count("logs", 500) == 1
    assert data_of(platform.logs()) == [{"n": 1}]


@pytest.mark.slow
def test_a_platform_that_is_killed(sdk_of: Make, tmp_path: pathlib.Path) -> None:
    """Over kills of the platform in mid-batch every event comes through once, in order."""
    path = tmp_path / "platform.db"
    process = Process(path)
    try:
        token = process.client.install_token(AGENT)
        sdk = sdk_of(process.url, install_token=token, runtime_token=None, installation_id=None)
        sdk.start()
        number = 0
        for _ in range(3):
            reached = sdk.audit.stats().delivered + 100
            while sdk.audit.stats().delivered < reached:
                sdk.log("model_call", {"n": number})
                number += 1
                time.sleep(0)
            for _ in range(300):
                sdk.log("model_call", {"n": number})
                number += 1
            process.kill()
            process = Process(path, process.port)
        assert sdk.audit.flush(GUARD)
        stats = sdk.audit.stats()
        assert (stats.dropped, stats.waiting) == (0, 0)
        found: List[int] = []
        after = 0
        while True:
            page = process.client.admin("GET", f"/logs?event_type=model_call&limit=1000&after={after}").body
            if not page["events"]:
                break
            found += [event["event_data"]["n"] for event in page["events"]]
            after = page["next_after"]
        # The platform keeps the last 10,000.
        assert found == list(range(number))[-len(found) :]
        assert len(found) == min(number, 10_000)
        sdk.shutdown()
    finally:
        process.kill()


# -- never in the way -------------------------------------------------------------------------------------------------


def test_a_hanging_platform_blocks_nobody(blackhole: Blackhole, sdk_of: Make, caplog: Any) -> None:
    """While the platform does not answer, log() returns, and shutdown() ends without it and says what was lost."""
    sdk = sdk_of(blackhole)
    sdk.start()
    for _ in range(50):
        sdk.log("model_call")
    connection = blackhole.accept()
    for _ in range(1000):
        sdk.log("model_call")
    assert sdk.audit.stats() == AuditStats(noted=1050, waiting=1050)
    sdk.shutdown(0.2)
    connection.close()
    assert "1051 audit events could not be delivered" in messages(caplog, logging.WARNING)[-1]
    assert sdk.audit.stats() == AuditStats(noted=1051, dropped=1051)


def test_a_handler_is_not_blocked(scripted: Scripted, sdk_of: Make) -> None:
    """Tasks go on, and are reported, while the platform hangs over their audit events."""
    entered, leave = threading.Event(), threading.Event()

    def hang(request: Request) -> Answer:
        entered.set()
        leave.wait(GUARD)
        return 200, {}

    scripted.on["logs"] = hang
    sdk = sdk_of(scripted)
    worker = sdk.create_task_worker(heartbeat_interval=0.1)

    @worker.on_task("work")
    def work(ctx: Any, input: Any) -> Any:
        for _ in range(60):
            sdk.log("model_call", {"task": ctx.task_id})
        return "done"

    with sdk, worker:
        scripted.task("t-1", "work")
        assert entered.wait(GUARD)
        for number in range(2, 6):
            scripted.task(f"t-{number}", "work")
        for number in range(1, 6):
            assert scripted.completion(f"t-{number}")["output"] == "done"
        assert scripted.count("logs") == 1
        leave.set()
    assert len(data_of(events_of(scripted))) == 300
    assert len(data_of(events_of(scripted), "tool_execution")) == 5


# -- life -------------------------------------------------------------------------------------------------------------


def test_shutdown_sends_what_is_left(platform: Any, sdk_of: Make) -> None:
    """What was logged before the end is delivered: after the results, before the last heartbeat."""
    sdk = sdk_of(platform)
    worker = sdk.create_task_worker(heartbeat_interval=0.1)

    @worker.on_task("work")
    def work(ctx: Any, input: Any) -> Any:
        sdk.log("model_call", {"n": 1})

    with sdk, worker:
        platform.wait(platform.submit("work", {}), GUARD)
    assert data_of(platform.logs()) == [{"n": 1}]
    assert [event["event_data"]["task_id"] for event in platform.logs("tool_execution")] != []
    names = [name for name, _ in platform.requests if name in ("complete", "logs", "heartbeat")]
    assert names.index("complete") < names.index("logs")
    assert names[-1] == "heartbeat"
    assert sdk.audit.stats().dropped == 0


def test_before_the_start_and_after_the_end(scripted: Scripted, sdk_of: Make, caplog: pytest.LogCaptureFixture) -> None:
    """Events of before the start are kept until the login; those of after the shutdown are ignored, told once."""
    caplog.set_level(logging.DEBUG, "sekuire.audit")
    sdk = sdk_of(scripted)
    sdk.log("model_call", {"n": 0})
    assert not sdk.audit.flush(GUARD)
    assert client_threads() == []
    with sdk:
        sdk.log("model_call", {"n": 1})
    for number in range(3):
        sdk.log("model_call", {"n": number})
    assert data_of(events_of(scripted)) == [{"n": 0}, {"n": 1}]
    assert len([text for text in messages(caplog, logging.DEBUG) if "ignored" in text]) == 1


def test_events_wait_for_the_login(scripted: Scripted, sdk_of: Make) -> None:
    """With a heartbeat to make the login, audit events make none of their own, and go when it is there."""
    ready = threading.Event()

    def bootstrap(request: Request) -> Answer:
        ready.wait(GUARD)
        return scripted._usual(request)

    scripted.on["bootstrap"] = bootstrap
    sdk = sdk_of(scripted, install_token="skt-1", runtime_token=None, installation_id=None, auto_heartbeat=True)
    starting = threading.Thread(target=sdk.start)
    starting.start()
    sdk.log("model_call", {"n": 1})
    sdk.audit.open()
    scripted.wait_for("bootstrap")
    ready.set()
    starting.join(GUARD)
    assert sdk.audit.flush(GUARD)
    assert data_of(events_of(scripted)) == [{"n": 1}]
    assert scripted.count("bootstrap") == 1


def test_without_heartbeats_the_log_may_log_in(platform: Any, sdk_of: Make) -> None:
    """An SDK without heartbeat and worker, once started, logs in for its audit events."""
    with sdk_of(platform, auto_heartbeat=False) as sdk:
        assert platform.installations() == []
        sdk.log("model_call", {"n": 1})
        assert sdk.audit.flush(GUARD)
    assert data_of(platform.logs()) == [{"n": 1}]


def test_a_worker_opens_it_too(platform: Any, sdk_of: Make) -> None:
    """Events of a worker whose SDK was not started are sent with the worker's login."""
    sdk = sdk_of(platform)
    worker = sdk.create_task_worker(heartbeat_interval=0.1)
    worker.on_task("echo", echo)
    with worker:
        platform.wait(platform.submit("echo", {}), GUARD)
        assert sdk.audit.flush(GUARD)
        assert len(platform.logs("tool_execution")) == 1


def test_a_start_that_fails(scripted: Scripted, sdk_of: Make) -> None:
    """Where the login is refused nothing is sent, and the reason is the platform's own."""
    scripted.on["bootstrap"] = lambda request: (403, {"message": "no such agent"})
    sdk = sdk_of(scripted, install_token="skt-1", runtime_token=None, installation_id=None, auto_heartbeat=True)
    sdk.log("model_call")
    with pytest.raises(SekuireError, match="no such agent"):
        sdk.start()
    sdk.shutdown()
    assert scripted.count("logs") == 0
    assert sdk.audit.stats().dropped >= 1


def test_logging_can_be_switched_off(platform: Any, sdk_of: Make) -> None:
    """logging_enabled=False: no event, no request, no thread, nothing on the way of a task."""
    sdk = sdk_of(platform, logging_enabled=False)
    worker = sdk.create_task_worker(heartbeat_interval=0.1)
    worker.on_task("echo", echo)
    with sdk, worker:
        sdk.log("model_call", {"n": object()})
        platform.wait(platform.submit("echo", {}), GUARD)
        assert worker._dispatcher.answers.audit is None
        assert "sekuire-audit" not in [thread.name for thread in client_threads()]
        assert sdk.audit.flush(GUARD)
    assert platform.count("logs") == 0
    assert sdk.audit.stats() == AuditStats()


def test_a_worker_alone_has_no_audit(platform: Any, worker_of: Any) -> None:
    """A Worker made without an SDK sends none."""
    worker = worker_of(platform)
    worker.on_task("echo", echo)
    with worker:
        platform.wait(platform.submit("echo", {}), GUARD)
    assert platform.count("logs") == 0


FORK = """
import logging, os, sys, warnings
warnings.simplefilter("ignore")
from sekuire import SekuireSDK, SekuireError
from sekuire.audit import AuditHandler
sdk = SekuireSDK("a", api_base_url="http://127.0.0.1:9", runtime_token="t", installation_id="i", auto_heartbeat=False)
logging.getLogger("mine").addHandler(AuditHandler(sdk))
sdk.start()
sdk.log("health")
# As if a thread of the parent held it at the fork.
sdk.audit.buffer.condition.acquire()
child = os.fork()
if child == 0:
    logging.getLogger("mine").warning("one")
    logging.getLogger("mine").warning("two")
    try:
        sdk.log("health")
    except SekuireError as error:
        print(error, flush=True)
    os._exit(0)
os.waitpid(child, 0)
sdk.audit.buffer.condition.release()
sdk.shutdown(0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork()")
def test_a_forked_child() -> None:
    """In a forked child log() says what to do instead, a logging handler says it once, and neither hangs."""
    ran = run_python(FORK, forks=True)
    assert "after fork() make a new SekuireSDK in the child" in ran.stdout
    assert ran.stderr.count("--- Logging error ---") == 1


END = """
import sys
from sekuire import SekuireSDK
sdk = SekuireSDK.from_env(logging_enabled=True)
sdk.start()
sdk.log("model_call", {"n": 1})
"""


def test_the_end_of_the_interpreter(platform: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A script that ends without shutdown() still delivers what it logged."""
    monkeypatch.setenv("SEKUIRE_API_URL", platform.url)
    monkeypatch.setenv("SEKUIRE_AGENT_ID", AGENT)
    monkeypatch.setenv("SEKUIRE_INSTALL_TOKEN", platform.create_install_token(AGENT))
    run_python(END)
    assert data_of(platform.logs()) == [{"n": 1}]


# -- what is in them --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_enabled", [True, False])
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("tool_executed",), ["event_type", "did you mean 'tool_execution'?", "model_call"]),
        ((None,), ["event_type", "got None"]),
        (("health", {}, "warning"), ["severity", "debug, info, warn, error", "did you mean 'warn'?"]),
        (("health", {}, ["x"]), ["severity"]),
    ],
)
def test_wrong_types_and_severities(
    scripted: Scripted, sdk_of: Make, arguments: Any, words: List[str], is_enabled: bool
) -> None:
    """A programmer's error is told at once, naming what is allowed; with logging switched off too."""
    sdk = sdk_of(scripted, logging_enabled=is_enabled)
    with pytest.raises(ConfigurationError) as caught:
        sdk.log(*arguments)
    for word in words:
        assert word in str(caught.value)


class Hostile(Dict[str, Any]):
    def items(self) -> Any:
        raise RuntimeError("secret of the user")

    __iter__ = keys = items


def cycle() -> Dict[str, Any]:
    data: Dict[str, Any] = {}
    data["self"] = data
    return data


def deep() -> Dict[str, Any]:
    data: Dict[str, Any] = {}
    for _ in range(100_000):
        data = {"x": data}
    return data


def test_a_secret_in_the_data(scripted: Scripted, sdk_of: Make) -> None:
    """A Secret anywhere in the data is masked, and the event is kept whole."""
    sdk = sdk_of(scripted)
    sdk.start()
    sdk.log("model_call", {"model": "m", "key": Secret("sk_live_1"), "more": [{"é": Secret("skt_2")}]})
    assert sdk.audit.flush(GUARD)
    assert sdk.audit.stats() == AuditStats(noted=1, delivered=1)
    assert data_of(events_of(scripted)) == [{"model": "m", "key": "***", "more": [{"é": "***"}]}]


@pytest.mark.parametrize(
    "make",
    [
        lambda: {"x": object()},
        lambda: {"x": math.nan},
        lambda: {(1, 2): 3},
        lambda: {"x": "\ud800"},
        lambda: {"x": "y" * 65536},
        lambda: {1, 2},
        lambda: Hostile(x=1),
        cycle,
        deep,
    ],
)
def test_data_without_a_json_form(scripted: Scripted, sdk_of: Make, make: Callable[[], Any]) -> None:
    """Data that cannot be sent is replaced by a short description, counted, and never an error."""
    sdk = sdk_of(scripted)
    sdk.start()
    sdk.log("model_call", make())
    assert sdk.audit.flush(GUARD)
    assert sdk.audit.stats() == AuditStats(noted=1, delivered=1, replaced=1)
    (data,) = data_of(events_of(scripted))
    assert list(data) == ["omitted"]
    assert "JSON" in data["omitted"]
    assert "secret of the user" not in data["omitted"]


def test_data_is_taken_as_it_is_now(scripted: Scripted, sdk_of: Make) -> None:
    """What the caller does to his data afterwards does not change the event."""
    sdk = sdk_of(scripted)
    data = {"n": 1}
    sdk.log("model_call", data)
    data["n"] = 2
    sdk.start()
    assert sdk.audit.flush(GUARD)
    assert data_of(events_of(scripted)) == [{"n": 1}]


def test_events_of_tasks(platform: Any, sdk_of: Make) -> None:
    """Every result of a task is an event: what, how, how long, by whom; never its input or output."""
    sdk = sdk_of(platform)
    worker = sdk.create_task_worker(heartbeat_interval=0.1)

    @worker.on_task("fail")
    def fail(ctx: Any, input: Any) -> Any:
        raise TaskError("no_funds", "canary-message")

    @worker.on_task("crash")
    def crash(ctx: Any, input: Any) -> Any:
        raise ValueError("canary-error")

    worker.on_task("echo", echo)
    worker.on_task("bad", lambda ctx, input: object())
    worker.on_task("slow", lambda ctx, input: ctx.wait_cancelled(GUARD), timeout=0.01)
    with sdk, worker:
        ids = {}
        for name in ("echo", "fail", "crash", "bad", "slow"):
            ids[name] = platform.submit(name, {"secret": "canary-input"}, trace_id=f"trace-{name}")
            platform.wait(ids[name], GUARD)
        worker.pause()
        ids["paused"] = platform.submit("echo", {})
        platform.wait(ids["paused"], GUARD)
        assert sdk.audit.flush(GUARD)
        events = {event["event_data"]["task_id"]: event for event in platform.logs("tool_execution")}
        worker.resume()
    assert len(platform.logs("tool_execution")) == 6
    expected = {
        "echo": ("info", None),
        "fail": ("warn", "no_funds"),
        "crash": ("error", "handler_error"),
        "bad": ("error", "result_not_serializable"),
        "slow": ("error", "timeout"),
        "paused": ("warn", "worker_paused"),
    }
    for name, (severity, code) in expected.items():
        event = events[ids[name]]
        data = event["event_data"]
        assert (event["severity"], data.get("error_code")) == (severity, code)
        assert data["status"] == ("completed" if code is None else "failed")
        assert data["capability"] == ("echo" if name == "paused" else name)
        assert data.get("trace_id") == (None if name == "paused" else f"trace-{name}")
        assert data["worker_id"] == worker.worker_id
        assert data["attempt"] == 1
        assert data["execution_time_ms"] >= 0
    assert "canary" not in json.dumps(platform.logs())


def test_an_unknown_capability(scripted: Scripted, sdk_of: Make) -> None:
    """A task that no handler takes is an event too; one with a field that has no JSON form says so."""
    sdk = sdk_of(scripted)
    worker = sdk.create_task_worker(["other"], heartbeat_interval=0.1)
    worker.on_task("echo", echo)
    with sdk, worker:
        scripted.task("t-1", "other")
        scripted.task("t-2", "other", trace_id="\ud800")
        scripted.completion("t-1")
        scripted.completion("t-2")
        assert sdk.audit.flush(GUARD)
        first, second = data_of(events_of(scripted), "tool_execution")
    assert (first["task_id"], first["error_code"]) == ("t-1", "unknown_capability")
    assert "omitted" in second


def test_events_of_health(scripted: Scripted, sdk_of: Make) -> None:
    """The installation's and the workers' states are events, in their order."""
    sdk = sdk_of(scripted, auto_heartbeat=True)
    worker = sdk.create_task_worker(heartbeat_interval=0.1)
    worker.on_task("echo", echo)
    with sdk, worker:
        assert worker.wait_until_connected(GUARD)
        worker.pause("lunch")
        worker.resume()
        scripted.command("pause", reason="maintenance")
        scripted.command("resume")
        scripted.command("terminate", reason="enough")
        assert worker.wait(GUARD)
    found = data_of(events_of(scripted), "health")
    of_worker = [(one["state"], one.get("reason")) for one in found if one["of"] == "worker"]
    assert of_worker == [
        ("started", None),
        ("paused", "lunch"),
        ("resumed", None),
        ("paused", "maintenance"),
        ("resumed", None),
        ("terminated", "enough"),
        ("stopped", "terminated: enough"),
    ]
    assert {one["worker_id"] for one in found if one["of"] == "worker"} == {worker.worker_id}
    of_installation = [one["state"] for one in found if one["of"] == "installation"]
    assert of_installation == ["connected", "stopped"]


def test_a_desired_state_is_told_too(scripted: Scripted, sdk_of: Make) -> None:
    """A command that was lost, and made good by a heartbeat, is an event as well."""
    sdk = sdk_of(scripted, auto_heartbeat=True)
    worker = sdk.create_task_worker(heartbeat_interval=0.05)
    worker.on_task("echo", echo)
    with sdk, worker:
        assert worker.wait_until_connected(GUARD)
        scripted.on["heartbeat"] = lambda request: (200, {"desired_state": "terminated"})
        assert worker.wait(GUARD)
    states = [data["state"] for data in data_of(events_of(scripted), "health") if data["of"] == "worker"]
    assert states == ["started", "terminated", "stopped"]


def test_a_degraded_installation(scripted: Scripted, sdk_of: Make) -> None:
    """Lost heartbeats are told once, with the reason, and so is their return."""
    beats = failing((200, {}), (500, {"message": "out of order"}), (500, {"message": "out of order"}))
    scripted.on["heartbeat"] = beats
    sdk = sdk_of(scripted, auto_heartbeat=True, heartbeat_interval=0.02)
    with sdk:
        scripted.wait_for("heartbeat", 6)
    found = [(e["event_data"]["state"], e["severity"]) for e in events_of(scripted) if e["event_type"] == "health"]
    assert found == [("connected", "info"), ("degraded", "warn"), ("connected", "info"), ("stopped", "info")]
    assert "out of order" in events_of(scripted)[1]["event_data"]["reason"]


def test_a_lost_lease(
    scripted: Scripted, sdk_of: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The end of a lease is one event of the worker, however often it is looked at."""
    monkeypatch.setattr("sekuire.session.heartbeat.MIN_GRACE", 0.0)
    end = protocol.utc_now() + dt.timedelta(seconds=0.5)
    scripted.on["heartbeat"] = lambda request: (200, {"lease_expires_at": end.isoformat()})
    sdk = sdk_of(scripted)
    worker = sdk.create_task_worker(heartbeat_interval=0.1)
    worker.on_task("echo", echo)
    with sdk, worker:
        until(lambda: any("the lease has ended" in record.message for record in caplog.records))
        for _ in range(3):
            beats = scripted.count("heartbeat")
            scripted.wait_for("heartbeat", beats + 1)
    assert [data["state"] for data in data_of(events_of(scripted), "health")].count("lease lost") == 1


class Decision(NamedTuple):
    allowed: bool
    rule: Optional[str] = None
    reason: str = ""


def test_events_of_the_policy(scripted: Scripted, sdk_of: Make) -> None:
    """What a gateway decides is a check that was passed, or a violation with its rule."""
    sdk = sdk_of(scripted)
    sdk.start()
    sdk.audit.policy(Decision(True), "tool", "search", task_id="t-1")
    sdk.audit.policy(Decision(False, "network.blocked", "evil.example is blocked"), target="evil.example")
    sdk.audit.policy(PolicyViolationError("tool.blocked", "shell is blocked"))
    sdk.audit.policy(object())
    assert sdk.audit.flush(GUARD)
    assert [(event["event_type"], event["severity"], event["event_data"]) for event in events_of(scripted)] == [
        ("policy_check", "info", {"kind": "tool", "target": "search", "task_id": "t-1", "allowed": True}),
        (
            "policy_violation",
            "warn",
            {
                "kind": "network",
                "target": "evil.example",
                "rule": "network.blocked",
                "reason": "evil.example is blocked",
                "allowed": False,
            },
        ),
        (
            "policy_violation",
            "warn",
            {"kind": "tool", "rule": "tool.blocked", "reason": "shell is blocked", "allowed": False},
        ),
        ("policy_check", "info", {}),
    ]


def test_no_token_goes_out(scripted: Scripted, sdk_of: Make) -> None:
    """Live tokens are replaced wherever they stand, also those that JSON writes differently."""
    tokens = {
        "runtime_token": 'rt-canary-"quoted"',
        "refresh_token": "rf-canary-1\\2",
        "install_token": "skt-canary-1",
        "api_key": "sk_live_canary",
    }
    sdk = sdk_of(scripted, **tokens)
    sdk.start()
    handler = AuditHandler(sdk)
    logger = logging.getLogger("canary.audit")
    logger.addHandler(handler)
    try:
        for token in tokens.values():
            sdk.log("model_call", {"key": f"<{token}>", token: [token]})
            sdk.audit.policy(PolicyViolationError("tool.blocked", token), "tool", token)
            try:
                raise ValueError(token)
            except ValueError:
                logger.exception("it is %s", token)
    finally:
        logger.removeHandler(handler)
    assert sdk.audit.flush(GUARD)
    sent = b"".join(request.raw for request in scripted.of("logs")).decode()
    assert "canary-" not in sent
    assert "live_canary" not in sent
    assert data_of(events_of(scripted))[0] == {"key": "<***>", "***": ["***"]}


# -- logging ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    logger = logging.getLogger("audited")
    logger.setLevel(logging.DEBUG)
    yield logger
    logger.handlers.clear()


def test_records_become_events(scripted: Scripted, sdk_of: Make, logger: logging.Logger) -> None:
    """Records of a logger are events: the level a severity, an exception its type and message alone."""
    sdk = sdk_of(scripted)
    sdk.start()
    logger.addHandler(AuditHandler(sdk, level="INFO", event_type="file_access"))
    logger.debug("left out")
    logger.info("read %s", "a file")
    logger.warning("careful", extra={"task_id": "t-1", "capability": "read", "other": object()})
    password = "canary-local"
    try:
        raise KeyError("missing")
    except KeyError:
        logger.critical("broke", exc_info=True, stack_info=True)
    assert password
    assert sdk.audit.flush(GUARD)
    events = events_of(scripted)
    assert [event["severity"] for event in events] == ["info", "warn", "error"]
    assert {event["event_type"] for event in events} == {"file_access"}
    assert [event["event_data"] for event in events] == [
        {"logger": "audited", "message": "read a file"},
        {"logger": "audited", "message": "careful", "task_id": "t-1", "capability": "read"},
        {"logger": "audited", "message": "broke", "exception": {"type": "KeyError", "message": "'missing'"}},
    ]


def test_sending_makes_no_events(scripted: Scripted, sdk_of: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attached to everything at the lowest level, the handler does not feed on what its own sending logs."""
    root = logging.getLogger()
    monkeypatch.setattr(root, "level", logging.DEBUG)
    for name in ("sekuire", "urllib3"):
        monkeypatch.setattr(logging.getLogger(name), "level", logging.DEBUG)
    logging.getLogger("sekuire").manager._clear_cache()  # type: ignore[attr-defined]
    scripted.on["logs"] = failing((503, {}), None)
    sdk = sdk_of(scripted)
    handler = AuditHandler(sdk, level=logging.DEBUG)
    sdk.start()
    root.addHandler(handler)
    try:
        logging.getLogger("audited").warning("one")
        assert sdk.audit.flush(GUARD)
    finally:
        root.removeHandler(handler)
        logging.getLogger("sekuire").manager._clear_cache()  # type: ignore[attr-defined]
    assert scripted.count("logs") == 3
    assert sdk.audit.stats() == AuditStats(noted=1, delivered=1)


def test_a_broken_record(scripted: Scripted, sdk_of: Make, logger: logging.Logger, capsys: Any) -> None:
    """A record whose message cannot be made is logging's to report, as with its own handlers."""
    sdk = sdk_of(scripted)
    # Not through the logger: pytest's own handler does not put up with it.
    AuditHandler(sdk).handle(logger.makeRecord("audited", logging.ERROR, "", 0, "%d", ("no number",), None))
    assert "--- Logging error ---" in capsys.readouterr().err
    assert sdk.audit.stats().noted == 0


def test_wrong_handlers(scripted: Scripted, sdk_of: Make) -> None:
    """A handler without an SDK, or of an unknown type, is refused."""
    with pytest.raises(ConfigurationError, match="must be a SekuireSDK, got NoneType"):
        AuditHandler(None)
    with pytest.raises(ConfigurationError, match="event_type"):
        AuditHandler(sdk_of(scripted), event_type="log")


def test_its_text(scripted: Scripted, sdk_of: Make) -> None:
    """The repr says where it stands."""
    sdk = sdk_of(scripted)
    sdk.log("health")
    assert repr(sdk.audit).endswith(" 1 wait>")
    sdk.shutdown()
    assert repr(sdk.audit).endswith(" closed>")
    assert repr(sdk_of(scripted, logging_enabled=False).audit).endswith(" off>")


def test_the_end_is_not_held_up(sdk_of: Make) -> None:
    """Where the platform was never reached there is no token to send with, and the shutdown does not wait for one."""
    sdk = sdk_of("http://127.0.0.1:9", runtime_token=None, installation_id=None, install_token="skt-1")
    sdk.audit.open()
    sdk.log("health", {"n": 1})
    deadline = Deadline(GUARD)
    assert sdk.audit.close(deadline) is False
    assert not deadline.remaining()
    assert sdk.audit.stats().dropped == 1
