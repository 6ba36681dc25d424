"""Starting and stopping a worker, in any state and from any thread."""

from __future__ import annotations

import itertools
import os
import threading
from typing import Any, Callable, List

import pytest

from sekuire import RuntimeCredentialsStore, TaskContext, Worker, create_worker
from sekuire.credentials import store as store_module
from sekuire.errors import AuthenticationError, ConfigurationError, PlanLimitError, SekuireError, StreamError

from ..conftest import AGENT
from ..support.scripted import Blackhole, Scripted, grant
from ..support.waiting import GUARD, client_threads, until

Make = Callable[..., Worker]


def echo(ctx: TaskContext, input: Any) -> Any:
    return input


# -- start --


def test_a_permanent_refusal_raises(scripted: Scripted, worker_of: Make) -> None:
    """start() raises AuthenticationError for a refused install token, with what to do; no thread stays."""
    refusal = {"error": "gone", "message": "already used", "code": "TOKEN_CONSUMED"}
    scripted.on["bootstrap"] = lambda request: (410, refusal)
    worker = worker_of(scripted)
    worker.on_task("echo", echo)
    with pytest.raises(AuthenticationError, match="SEKUIRE_CREDENTIALS_FILE") as caught:
        worker.start()
    assert (caught.value.status, caught.value.code) == (410, "TOKEN_CONSUMED")
    assert not worker.is_running()
    assert scripted.count("bootstrap") == 1


def test_logins_whose_tokens_are_refused_at_once_are_not_repeated_in_a_loop(
    scripted: Scripted, worker_of: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often a worker is answered 401 with every token it is granted, it logs in again only after a delay."""
    monkeypatch.setattr(store_module, "full_jitter", lambda count, first, longest: longest)
    numbers = itertools.count()
    for name in ("bootstrap", "refresh"):
        scripted.on[name] = lambda request: (201, grant(f"rt-{next(numbers)}"))
    for name in ("heartbeat", "stream"):
        scripted.on[name] = lambda request: (401, {"error": "unauthorized", "message": "unknown token"})
    worker = worker_of(scripted, start_timeout=0.1)
    worker.on_task("echo", echo)
    worker.start()
    scripted.wait_for("heartbeat", 8)
    # One login, and one that replaces its token at once.
    assert next(numbers) == 2


def test_a_page_of_an_ingress_does_not_end_a_worker(scripted: Scripted, worker_of: Make) -> None:
    """A worker whose refresh is answered by something in between refreshes again, and goes on."""
    pages = iter([(404, b"404 page not found\n", {"Content-Type": "text/plain"})] * 2)
    scripted.on["refresh"] = lambda request: next(pages, None) or (200, grant("rt-2"))
    scripted.on["heartbeat"] = lambda request: (
        (200, {}) if request.headers["Authorization"].endswith("rt-2") else (401, {"error": "expired"})
    )
    worker = worker_of(scripted)
    worker.on_task("echo", echo)
    with worker:
        scripted.wait_for("refresh", 3)
        scripted.task("t-1")
        assert scripted.completion("t-1")["status"] == "completed"
    assert scripted.count("bootstrap") == 1


def test_a_permanent_refusal_raises_from_a_blocking_start(scripted: Scripted, worker_of: Make) -> None:
    """start(block=True) raises the error because of which the worker stopped."""
    scripted.on["bootstrap"] = lambda request: (403, {"error": "forbidden", "message": "no"})
    worker = worker_of(scripted)
    worker.on_task("echo", echo)
    with pytest.raises(AuthenticationError):
        worker.start(block=True)


def test_nothing_configured() -> None:
    """Without any credentials there is an error that lists them, before any thread starts."""
    with pytest.raises(ConfigurationError, match="SEKUIRE_INSTALL_TOKEN"):
        create_worker(agent_id=AGENT)
    assert client_threads() == []


def test_no_handler(scripted: Scripted, worker_of: Make) -> None:
    """A worker without handlers does not start, and can be given one and started then."""
    worker = worker_of(scripted)
    with pytest.raises(ConfigurationError, match="no handler is registered"):
        worker.start()
    worker.on_task("echo", echo)
    with worker:
        assert worker.is_connected()


def test_an_unreachable_platform_is_no_error(worker_of: Make, make_platform: Callable[..., Any], tmp_path: Any) -> None:
    """start() returns after start_timeout when nobody answers, and the worker comes up by itself later."""
    platform = make_platform(path=tmp_path / "db")
    token, url = platform.create_install_token(AGENT), platform.url
    platform.stop()
    worker = worker_of(url, install_token=token, start_timeout=0.05)
    worker.on_task("echo", echo)
    worker.start()
    assert worker.is_running()
    assert not worker.is_connected()
    assert worker.wait_until_connected(0.01) is False
    platform.start()
    assert worker.wait_until_connected(GUARD)
    assert platform.wait(platform.submit("echo", 7, AGENT), GUARD)["output"] == 7


def test_an_empty_store_waits_for_the_beacon(platform: Any, worker_of: Make) -> None:
    """A worker whose store is still empty starts, and works once somebody fills it."""
    store = RuntimeCredentialsStore()
    worker = worker_of(platform, credentials_store=store, start_timeout=0.05)
    worker.on_task("echo", echo)
    worker.start()
    other = worker_of(platform)
    other.on_task("other", echo)
    with other:
        store.update(other.installation.store.current)
        assert worker.wait_until_connected(GUARD)


def test_a_worker_starts_once(scripted: Scripted, worker_of: Make) -> None:
    """start() of a running or stopped worker is an error that says so."""
    worker = worker_of(scripted)
    worker.on_task("echo", echo)
    with worker:
        with pytest.raises(ConfigurationError, match="this worker is running"):
            worker.start()
        assert worker.is_running()
    with pytest.raises(ConfigurationError, match="this worker is stopped"):
        worker.start()


def test_stop_before_start(scripted: Scripted, worker_of: Make) -> None:
    """A worker that was stopped before it started stays stopped."""
    worker = worker_of(scripted)
    worker.on_task("echo", echo)
    worker.stop()
    assert worker.wait(0)
    with pytest.raises(ConfigurationError, match="this worker is stopped"):
        worker.start()
    assert scripted.requests == {}


def test_with_statement_and_states(scripted: Scripted, worker_of: Make) -> None:
    """with worker: starts it and stops it; its states tell."""
    worker = worker_of(scripted)
    worker.on_task("echo", echo)
    assert (worker.is_running(), worker.is_connected(), worker.is_paused()) == (False, False, False)
    assert worker.stop_reason is None
    with worker as same:
        assert same is worker
        assert (worker.is_running(), worker.is_connected()) == (True, True)
        assert not worker.wait(0.01)
        assert AGENT in repr(worker)
    assert (worker.is_running(), worker.is_connected(), worker.stop_reason) == (False, False, "stop()")
    assert worker.wait(0)
    assert worker.wait_until_connected(0) is False


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((200, b"<html>", {"Content-Type": "text/html"}), ["200", "'text/html'", "endpoints="]),
        ((404, {"error": "x", "message": "nothing here"}), ["404", "nothing here", "'application/json'", "endpoints="]),
        ((405, {"error": "x"}), ["405", "endpoints="]),
        ((201, b""), ["201", "endpoints="]),
        ((204, b""), ["204", "do not connect again"]),
        ((302, b"", {"Location": "https://evil.example/"}), ["302", "redirect", "api_base_url"]),
        ((418, b"tea"), ["418", "tea", "another server", "endpoints="]),
        ((400, {"error": "bad", "message": "no such agent"}), ["400", "no such agent"]),
    ],
    ids=lambda value: str(value[0]) if isinstance(value, tuple) else "",
)
def test_a_stream_that_is_none_is_fatal_at_first(scripted: Scripted, worker_of: Make, answer: Any, words: Any) -> None:
    """Before the first 200, an answer that is no stream is a StreamError that names URL, status and type."""
    scripted.on["stream"] = lambda request: answer
    worker = worker_of(scripted)
    worker.on_task("echo", echo)
    with pytest.raises(StreamError) as caught:
        worker.start()
    for word in [*words, scripted.url + "/api/v1/tasks/stream"]:
        assert word in str(caught.value)
    assert scripted.count("stream") == 1
    assert "rt-1" not in str(caught.value)


def test_a_plan_limit_is_fatal(scripted: Scripted, worker_of: Make) -> None:
    """402 is fatal, with the plan that is needed and where to get it."""
    body = {"error": "plan", "message": "too many workers", "required_plan": "team", "upgrade_url": "https://up"}
    scripted.on["stream"] = lambda request: (402, body)
    worker = worker_of(scripted)
    worker.on_task("echo", echo)
    with pytest.raises(PlanLimitError) as caught:
        worker.start()
    assert (caught.value.required_plan, caught.value.upgrade_url) == ("team", "https://up")


def test_a_worker_that_fails_later_raises_from_its_blocking_start(scripted: Scripted, worker_of: Make) -> None:
    """start(block=True) raises what ended the worker after it had worked, in any thread."""
    worker = worker_of(scripted)
    worker.on_task("echo", echo)
    raised: List[BaseException] = []

    def run() -> None:
        try:
            worker.start(block=True)
        except SekuireError as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    assert worker.wait_until_connected(GUARD)
    scripted.on["stream"] = lambda request: (204, b"")
    scripted.end()
    thread.join(GUARD)
    assert not thread.is_alive()
    assert isinstance(raised[0], StreamError)
    assert worker.stop_reason == str(raised[0])


# -- stop --


def test_a_blocking_start_in_another_thread_ends_with_stop(scripted: Scripted, worker_of: Make) -> None:
    """start(block=True) outside the main thread installs no signal handlers and returns after stop()."""
    worker = worker_of(scripted)
    worker.on_task("echo", echo)
    thread = threading.Thread(target=worker.start, kwargs={"block": True})
    thread.start()
    assert worker.wait_until_connected(GUARD)
    worker.stop()
    thread.join(GUARD)
    assert not thread.is_alive()


def test_stop_lets_running_tasks_end_and_releases_the_others(platform: Any, worker_of: Make) -> None:
    """At stop() a running task finishes uncancelled, waiting ones go back to the platform, and it says goodbye."""
    go, begun = threading.Event(), threading.Event()

    def handler(ctx: TaskContext, input: Any) -> Any:
        begun.set()
        assert go.wait(GUARD)
        return ctx.is_cancelled()

    worker = worker_of(platform, max_workers=1)
    worker.on_task("echo", handler)
    worker.start()
    running = platform.submit("echo", {}, AGENT)
    assert begun.wait(GUARD)
    waiting = platform.submit("echo", {}, AGENT)
    until(lambda: worker.stats().waiting == 1)
    stopper = threading.Thread(target=worker.stop)
    stopper.start()
    until(lambda: platform.task(waiting)["status"] == "queued")
    assert worker.is_running()
    go.set()
    stopper.join(GUARD)
    assert not stopper.is_alive()
    task = platform.task(running)
    assert (task["status"], task["output"]) == ("completed", False)
    assert platform.count("release", 200) == 1
    assert worker.stats().released == 1
    installation = platform.installations()[0]
    assert installation["status"] == "stopped"


def test_release_not_supported(scripted: Scripted, worker_of: Make) -> None:
    """Where a platform takes nothing back, the task is answered worker_shutdown, retryable."""
    scripted.on["release"] = lambda request: (501, {})
    go, begun = threading.Event(), threading.Event()
    worker = worker_of(scripted, max_workers=1)
    worker.on_task("echo", lambda ctx, input: begun.set() or go.wait(GUARD))
    worker.start()
    for number in range(3):
        scripted.task(f"t{number}", attempt=2)
    assert begun.wait(GUARD)
    until(lambda: worker.stats().waiting == 2)
    stopper = threading.Thread(target=worker.stop)
    stopper.start()
    for number in (1, 2):
        error = scripted.completion(f"t{number}")["error"]
        assert (error["code"], error["retryable"]) == ("worker_shutdown", True)
    go.set()
    stopper.join(GUARD)
    assert scripted.completion("t0")["status"] == "completed"
    assert {(r.json["attempt"], r.json["worker_id"]) for r in scripted.of("release")} == {(2, worker.worker_id)}
    assert worker.stats().released == 0


def test_stop_with_an_overdue_handler(scripted: Scripted, worker_of: Make, caplog: pytest.LogCaptureFixture) -> None:
    """stop(timeout) cancels what still runs at its end, answers worker_shutdown, names it, and returns."""
    go, begun = threading.Event(), threading.Event()
    reasons = []

    def handler(ctx: TaskContext, input: Any) -> None:
        begun.set()
        assert go.wait(GUARD)
        reasons.append(ctx.cancel_reason)

    worker = worker_of(scripted)
    worker.on_task("slow", handler)
    worker.start()
    scripted.task("t1", "slow")
    assert begun.wait(GUARD)
    worker.stop(0.2)
    assert worker.wait(0)
    assert scripted.completion("t1")["error"]["code"] == "worker_shutdown"
    assert any("slow t1" in record.message for record in caplog.records)
    go.set()
    until(lambda: reasons == ["shutdown"])
    until(lambda: worker.stats().overdue == 0)


def test_stop_from_a_handler(scripted: Scripted, worker_of: Make) -> None:
    """stop() in a handler asks for the stop and returns; the handler's result is delivered."""
    worker = worker_of(scripted)
    worker.on_task("echo", lambda ctx, input: worker.stop() or "stopped it")
    worker.start()
    scripted.task("t1")
    assert worker.wait(GUARD)
    assert scripted.completion("t1")["output"] == "stopped it"


def test_stop_from_many_threads(scripted: Scripted, worker_of: Make) -> None:
    """stop() from many threads at once stops once; all return when it is done."""
    worker = worker_of(scripted)
    worker.on_task("echo", echo)
    worker.start()
    barrier = threading.Barrier(8)
    done: List[bool] = []

    def stop() -> None:
        barrier.wait(GUARD)
        worker.stop()
        done.append(worker.wait(0))

    threads = [threading.Thread(target=stop) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(GUARD)
    assert done == [True] * 8
    assert sum(request.json["status"] == "stopped" for request in scripted.of("heartbeat")) == 1


def test_a_shorter_stop_hurries_a_longer_one(scripted: Scripted, worker_of: Make) -> None:
    """A second stop() with a timeout brings the end of a drain forward."""
    go, begun = threading.Event(), threading.Event()
    worker = worker_of(scripted, shutdown_timeout=1000.0)
    worker.on_task("echo", lambda ctx, input: begun.set() or go.wait(GUARD))
    worker.start()
    scripted.task("t1")
    assert begun.wait(GUARD)
    first = threading.Thread(target=worker.stop)
    first.start()
    until(lambda: worker.stop_reason)
    worker.stop(0.1)
    first.join(GUARD)
    assert not first.is_alive()
    go.set()


def test_stop_during_a_connect_to_a_blackhole(blackhole: Blackhole, worker_of: Make) -> None:
    """A stop while the stream waits for an answer that never comes ends it at once."""
    patient = {"read_timeout": 1000.0, "connect_timeout": 1000.0}
    worker = worker_of(blackhole.url, runtime_token="rt", start_timeout=0.01, **patient)
    worker.on_task("echo", echo)
    worker.start()
    with blackhole.accept() as sock:
        sock.recv(1)
        worker.stop()
        assert worker.wait(0)


def test_stop_during_a_login(blackhole: Blackhole, worker_of: Make) -> None:
    """A stop while the login waits for an answer returns without waiting for it."""
    worker = worker_of(blackhole.url, install_token="skt", start_timeout=0.01, read_timeout=GUARD)
    worker.on_task("echo", echo)
    worker.start()
    with blackhole.accept() as sock:
        sock.recv(1)
        worker.stop()
        assert worker.wait(0)
        assert not worker.is_running()


def test_stop_during_a_backoff(scripted: Scripted, worker_of: Make) -> None:
    """A stop during a long reconnect delay does not wait for its end."""
    scripted.on["stream"] = lambda request: (503, {}, {"Retry-After": "300"})
    worker = worker_of(scripted)
    worker.on_task("echo", echo)
    worker.start()
    scripted.wait_for("stream")
    worker.stop()
    assert worker.wait(0)
    assert scripted.count("stream") == 1


def test_stop_during_a_login_that_is_tried_again(scripted: Scripted, worker_of: Make) -> None:
    """A stop during the pause between two tries of a login ends it."""
    scripted.on["bootstrap"] = lambda request: (503, {}, {"Retry-After": "20"})
    worker = worker_of(scripted, start_timeout=0.01)
    worker.on_task("echo", echo)
    worker.start()
    scripted.wait_for("bootstrap")
    worker.stop()
    assert worker.wait(0)
    assert scripted.count("heartbeat") == 0


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts /proc/self/fd")
def test_no_descriptor_and_no_thread_is_left(scripted: Scripted, worker_of: Make) -> None:
    """Twenty starts and stops leave neither a thread nor an open descriptor."""

    def cycle() -> None:
        worker = worker_of(scripted)
        worker.on_task("echo", echo)
        with worker:
            scripted.task(worker.worker_id)
            scripted.completion(worker.worker_id)
        until(lambda: client_threads() == [])

    def descriptors() -> int:
        # The server's side of a connection closes a moment after ours.
        return min(len(os.listdir("/proc/self/fd")) for _ in range(3))

    for _ in range(3):
        cycle()
    before = descriptors()
    for _ in range(20):
        cycle()
    until(lambda: descriptors() <= before + 2)


def test_stats(platform: Any, worker_of: Make) -> None:
    """stats() counts what came and what became of it, and tells the lease."""
    worker = worker_of(platform)
    worker.on_task("echo", echo)
    worker.on_task("fail", lambda ctx, input: 1 / 0)
    with worker:
        for capability in ("echo", "fail", "echo"):
            platform.wait(platform.submit(capability, {}, AGENT), GUARD)
        worker.pause()
        platform.wait(platform.submit("echo", {}), GUARD)
        worker.resume()
        until(lambda: worker.stats().undelivered == 0 and worker.stats().last_heartbeat_at)
        platform.drop_streams()
        until(lambda: worker.stats().reconnects == 1 and worker.is_connected())
        stats = worker.stats()
    assert (stats.received, stats.completed, stats.failed, stats.rejected) == (4, 2, 1, 1)
    assert (stats.waiting, stats.running, stats.duplicates, stats.dropped, stats.released, stats.overdue) == (0,) * 6
    assert stats.last_heartbeat_at is not None
    assert stats.lease_expires_at is not None
    assert stats.lease_expires_at > stats.last_heartbeat_at
    assert stats.last_heartbeat_at.tzinfo is not None


def test_two_workers_with_a_fast_switch(platform: Any, worker_of: Make) -> None:
    """Hundreds of tasks on two workers with threads that switch all the time: each ends once, none is lost."""
    import sys

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        workers = [worker_of(platform, max_workers=4, task_timeout=30.0) for _ in range(2)]
        for worker in workers:
            worker.on_task("echo", echo, max_concurrency=3)
            worker.on_task("fail", lambda ctx, input: 1 / 0)
            worker.start()
        ids = [platform.submit("echo" if n % 3 else "fail", n, AGENT) for n in range(300)]
        for number, task_id in enumerate(ids):
            task = platform.wait(task_id, GUARD)
            assert task["output"] == (number if number % 3 else None)
        until(lambda: sum(worker.stats().completed + worker.stats().failed for worker in workers) == 300)
        for worker in workers:
            worker.stop()
            assert worker.stats().undelivered == 0
        assert all([status for status, _ in platform.completions(task_id)] == [200] for task_id in ids)
    finally:
        sys.setswitchinterval(interval)
