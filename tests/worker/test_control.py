"""Pause, resume, terminate, revocation: what the platform orders and what follows."""

from __future__ import annotations

import threading
import time
from typing import Any, Callable, List

import pytest

from sekuire import Command, TaskContext, Worker
from sekuire._internal.threads import Deadline
from sekuire.errors import RevokedError
from sekuire.wire import protocol

from ..conftest import AGENT
from ..support.scripted import Scripted
from ..support.waiting import GUARD, until

Make = Callable[..., Worker]


class Handler:
    """Waits to be let go or cancelled."""

    def __init__(self, obedient: bool = True) -> None:
        self.go = threading.Event()
        self.begun: List[str] = []
        self.reasons: List[str] = []
        self._obedient = obedient

    def __call__(self, ctx: TaskContext, input: Any) -> str:
        self.begun.append(ctx.task_id)
        if self._obedient:
            end = time.monotonic() + GUARD
            while not self.go.is_set() and not ctx.wait_cancelled(0.01):
                assert time.monotonic() < end
        else:
            assert self.go.wait(GUARD)
        if ctx.cancel_reason:
            self.reasons.append(ctx.cancel_reason)
        return "finished"


@pytest.fixture
def handler() -> Any:
    made = Handler()
    yield made
    made.go.set()


def installation_of(platform: Any) -> str:
    return str(platform.installations()[0]["installation_id"])


def outcome(platform: Any, task_id: str) -> Any:
    task = platform.wait(task_id, GUARD)
    return task["error"]["code"] if task["error"] else task["output"]


def test_pause_by_command(scripted: Scripted, worker_of: Make, handler: Handler) -> None:
    """At a pause a running task finishes, a waiting one is rejected, new ones are; resume lifts it."""
    worker = worker_of(scripted, max_workers=1)
    worker.on_task("echo", handler)
    with worker:
        scripted.task("t1")
        scripted.task("t2")
        until(lambda: worker.stats().waiting == 1)
        scripted.command("pause", reason="lunch")
        error = scripted.completion("t2")["error"]
        assert error == {"code": "worker_paused", "message": "the worker is paused: lunch", "retryable": True}
        assert worker.is_paused()
        scripted.task("t3")
        assert scripted.completion("t3")["error"]["code"] == "worker_paused"
        handler.go.set()
        assert scripted.completion("t1")["output"] == "finished"
        until(lambda: scripted.wait_for("heartbeat")[-1].json["status"] == "paused")
        scripted.command("resume")
        until(lambda: not worker.is_paused())
        scripted.task("t4")
        assert scripted.completion("t4")["output"] == "finished"
        assert handler.begun == ["t1", "t4"]


def test_a_pause_lost_on_the_stream_comes_by_heartbeat(platform: Any, worker_of: Make, handler: Handler) -> None:
    """A pause and a resume that the stream lost are made good by the next heartbeat, callbacks included."""
    heard = []
    handler.go.set()
    worker = worker_of(platform, heartbeat_interval=0.05)
    worker.on_task("echo", handler)
    worker.on_command(lambda command: heard.append(command.type))
    with worker:
        platform.hold_commands = True
        platform.command(installation_of(platform), "pause")
        until(worker.is_paused)
        assert outcome(platform, platform.submit("echo", {}, AGENT)) == "worker_paused"
        platform.command(installation_of(platform), "resume")
        until(lambda: not worker.is_paused())
        assert outcome(platform, platform.submit("echo", {}, AGENT)) == "finished"
        until(lambda: heard == ["pause", "resume"])


def test_a_pause_lost_on_the_stream_comes_by_connected(platform: Any, worker_of: Make, handler: Handler) -> None:
    """A reconnect tells the desired state too."""
    worker = worker_of(platform, heartbeat_interval=1000.0)
    worker.on_task("echo", handler)
    with worker:
        until(lambda: worker.stats().last_heartbeat_at)
        platform.hold_commands = True
        platform.command(installation_of(platform), "pause")
        platform.drop_streams()
        until(worker.is_paused)


def test_pauses_are_separate_flags(scripted: Scripted, worker_of: Make, handler: Handler) -> None:
    """A worker is paused while any of the three says so: the platform's resume leaves pause() alone, and vice versa."""
    desired = {"desired_state": "running"}
    scripted.on["heartbeat"] = lambda request: (200, desired)
    worker = worker_of(scripted, heartbeat_interval=0.03)
    worker.on_task("echo", handler)
    with worker:
        worker.pause("mine")
        scripted.command("pause", command_id="c1")
        scripted.command("resume", command_id="c2")
        scripted.wait_for("heartbeat", scripted.count("heartbeat") + 3)
        assert worker.is_paused()
        worker.resume()
        assert not worker.is_paused()
        desired["desired_state"] = "paused"
        until(worker.is_paused)
        worker.pause()
        worker.resume()
        assert worker.is_paused()
        desired["desired_state"] = "running"
        until(lambda: not worker.is_paused())


def test_a_stale_heartbeat_does_not_undo_a_newer_command(scripted: Scripted, worker_of: Make, handler: Handler) -> None:
    """What a heartbeat that was sent before a command says of the desired state does not count."""
    hold, held = threading.Event(), threading.Event()

    def heartbeat(request: Any) -> Any:
        if hold.is_set():
            held.set()
            until(lambda: not hold.is_set())
        return 200, {"desired_state": "running"}

    scripted.on["heartbeat"] = heartbeat
    heard: List[str] = []
    worker = worker_of(scripted, heartbeat_interval=1000.0)
    worker.on_task("echo", handler)
    worker.on_command(lambda command: heard.append(command.type))
    with worker:
        until(lambda: worker.stats().last_heartbeat_at)
        first = worker.stats().last_heartbeat_at
        hold.set()
        worker.installation.heartbeat.nudge()
        assert held.wait(GUARD)
        scripted.command("pause", command_id="c1")
        until(worker.is_paused)
        assert worker.stats().last_heartbeat_at == first
        # The beat that the command itself caused must not answer, or its newer word would count.
        beats = scripted.count("heartbeat")
        scripted.on["heartbeat"] = lambda request: (200, {"desired_state": "paused"})
        hold.clear()
        scripted.wait_for("heartbeat", beats + 1)
        assert worker.is_paused()
    assert heard == ["pause"]


def test_a_stale_connected_does_not_undo_a_newer_heartbeat(
    scripted: Scripted, worker_of: Make, handler: Handler
) -> None:
    """What the stream says late, of the time when it was asked for, does not count against what a heartbeat told."""
    scripted.connected = {"desired_state": "running"}
    scripted.on["heartbeat"] = lambda request: (200, {"desired_state": "paused"})
    worker = worker_of(scripted, heartbeat_interval=0.03)
    heard: List[str] = []

    def late(request: Any) -> None:
        until(worker.is_paused)
        scripted.wait_for("heartbeat", scripted.count("heartbeat") + 3)
        scripted.stream(request)

    scripted.on["stream"] = late
    worker.on_task("echo", handler)
    worker.on_command(lambda command: heard.append(command.type))
    with worker:
        scripted.task("t1")
        assert scripted.completion("t1")["error"]["code"] == "worker_paused"
        scripted.wait_for("heartbeat", scripted.count("heartbeat") + 3)
    assert heard == ["pause"]


def test_command_ids_are_carried_out_once(scripted: Scripted, worker_of: Make, handler: Handler) -> None:
    """A command that is replayed after a reconnect does nothing; one without an id always counts."""
    heard: List[str] = []
    worker = worker_of(scripted)
    worker.on_task("echo", handler)
    worker.on_command(lambda command: heard.append(f"{command.type} {command.command_id}"))
    with worker:
        scripted.command("pause", command_id="c1")
        scripted.command("resume", command_id="c2")
        scripted.end()
        scripted.wait_for("stream", 2)
        scripted.command("pause", command_id="c1")
        scripted.command("resume", command_id="c2")
        scripted.command("pause")
        until(lambda: len(heard) == 3)
        assert heard == ["pause c1", "resume c2", "pause None"]
        assert worker.is_paused()


def test_callbacks_in_order_and_failing_ones(
    scripted: Scripted, worker_of: Make, handler: Handler, caplog: pytest.LogCaptureFixture
) -> None:
    """Callbacks see every command in order after it took effect; one that raises, even SystemExit, harms no other."""
    heard: List[Any] = []
    worker = worker_of(scripted)
    worker.on_task("echo", handler)

    @worker.on_command
    def failing(command: Command) -> None:
        raise SystemExit if command.type == "pause" else ValueError("callback")

    @worker.on_command
    def hearing(command: Command) -> None:
        heard.append((command.type, threading.current_thread().name))

    with worker:
        for _ in range(3):
            scripted.command("pause")
            scripted.command("resume")
        until(lambda: len(heard) == 6)
        assert heard == [("pause", "sekuire-callback"), ("resume", "sekuire-callback")] * 3
    assert sum("a callback" in record.message for record in caplog.records) == 6


@pytest.mark.parametrize("kind", protocol.COMMANDS)
def test_every_command_of_the_contract(platform: Any, worker_of: Make, kind: str) -> None:
    """The local platform sends each type of command, and a worker carries it out and announces it."""
    worker = worker_of(platform, heartbeat_interval=1000.0)
    worker.on_task("echo", lambda ctx, input: input)
    announced: List[str] = []
    worker.on_command(lambda command: announced.append(command.type))
    with worker:
        assert worker.wait_until_connected(GUARD)
        # The answer to a heartbeat under way would name the desired state before the stream brings the command.
        until(lambda: worker.stats().last_heartbeat_at)
        platform.command(platform.installations()[0]["installation_id"], kind)
        until(lambda: announced == [kind])


def test_a_hanging_callback_harms_nothing(scripted: Scripted, worker_of: Make, handler: Handler) -> None:
    """While a callback hangs, commands, tasks and heartbeats go on, and a stop names its thread and returns."""
    hang = threading.Event()
    handler.go.set()
    worker = worker_of(scripted, shutdown_timeout=2.0)
    worker.on_task("echo", handler)
    worker.on_command(lambda command: hang.wait(GUARD))
    worker.start()
    scripted.command("pause")
    scripted.command("resume")
    scripted.task("t1")
    assert scripted.completion("t1")["output"] == "finished"
    beats = scripted.count("heartbeat")
    scripted.wait_for("heartbeat", beats + 2)
    worker.stop()
    assert worker.wait(0)
    hang.set()


def test_stop_from_a_callback(scripted: Scripted, worker_of: Make, handler: Handler) -> None:
    """stop() from a callback asks for the stop and returns."""
    worker = worker_of(scripted)
    worker.on_task("echo", handler)
    worker.on_command(lambda command: worker.stop())
    worker.start()
    scripted.command("pause")
    assert worker.wait(GUARD)
    assert worker.stop_reason == "stop()"


# -- terminate --


def test_terminate_cancels_at_once_and_drains(platform: Any, worker_of: Make, handler: Handler) -> None:
    """A terminate cancels running contexts at once; what ends in time is reported, waiting tasks are answered."""
    worker = worker_of(platform, max_workers=1, heartbeat_interval=1000.0)
    worker.on_task("echo", handler)
    heard: List[Command] = []
    worker.on_command(heard.append)
    worker.start()
    # A heartbeat under way would tell the desired state before the stream tells the command.
    until(lambda: worker.stats().last_heartbeat_at)
    running = platform.submit("echo", {}, AGENT)
    until(lambda: handler.begun)
    waiting = platform.submit("echo", {}, AGENT)
    until(lambda: worker.stats().waiting == 1)
    platform.command(installation_of(platform), "terminate", "end of life", 15.0)
    assert outcome(platform, running) == "finished"
    assert outcome(platform, waiting) == "worker_terminated"
    assert worker.wait(GUARD)
    assert handler.reasons == ["terminated"]
    assert worker.stop_reason == "terminated: end of life"
    assert [(c.type, c.reason, c.shutdown_timeout) for c in heard] == [("terminate", "end of life", 15.0)]
    assert platform.heartbeats(installation_of(platform))[-1]["status"] == "stopped"


def test_terminate_leaves_shutdown_timeout(scripted: Scripted, worker_of: Make) -> None:
    """A handler that does not end within the command's shutdown_timeout is answered worker_shutdown."""
    handler = Handler(obedient=False)
    worker = worker_of(scripted, shutdown_timeout=1000.0)
    worker.on_task("echo", handler)
    worker.start()
    scripted.task("t1")
    until(lambda: handler.begun)
    scripted.command("terminate", shutdown_timeout_ms=300)
    error = scripted.completion("t1")["error"]
    assert (error["code"], error["retryable"]) == ("worker_shutdown", True)
    assert worker.wait(GUARD)
    assert worker.stats().overdue == 1
    handler.go.set()
    until(lambda: worker.stats().overdue == 0)
    assert len(scripted.completions("t1")) == 1


def test_terminate_by_desired_state(platform: Any, worker_of: Make, handler: Handler) -> None:
    """A lost terminate comes by heartbeat, and its callback is called once."""
    heard: List[str] = []
    worker = worker_of(platform, heartbeat_interval=0.05)
    worker.on_task("echo", handler)
    worker.on_command(lambda command: heard.append(command.type))
    worker.start()
    platform.hold_commands = True
    platform.command(installation_of(platform), "terminate")
    assert worker.wait(GUARD)
    assert heard == ["terminate"]
    assert worker.stop_reason is not None
    assert "desired state" in worker.stop_reason


def test_terminate_during_a_stop_cancels(scripted: Scripted, worker_of: Make, handler: Handler) -> None:
    """A kill switch that comes while a stop drains cancels what runs."""
    worker = worker_of(scripted, heartbeat_interval=0.05)
    worker.on_task("echo", handler)
    worker.start()
    scripted.task("t1")
    until(lambda: handler.begun)
    stopper = threading.Thread(target=worker.stop)
    stopper.start()
    until(lambda: scripted.wait_for("heartbeat")[-1].json["workers"][0]["status"] == "stopping")
    assert handler.reasons == []
    scripted.on["heartbeat"] = lambda request: (200, {"revoked": True, "reason": "breach"})
    stopper.join(GUARD)
    assert not stopper.is_alive()
    assert handler.reasons == ["terminated"]


# -- revocation --


def test_revoked_by_heartbeat(platform: Any, worker_of: Make, handler: Handler, caplog: Any) -> None:
    """A revocation stops the worker, which says why; what was running is cancelled and reported."""
    worker = worker_of(platform, heartbeat_interval=0.05)
    worker.on_task("echo", handler)
    worker.start()
    task_id = platform.submit("echo", {}, AGENT)
    until(lambda: handler.begun)
    platform.hold_commands = True
    platform.revoke(installation_of(platform), "leaked key")
    assert worker.wait(GUARD)
    assert outcome(platform, task_id) == "finished"
    assert worker.stop_reason == "the installation was revoked: leaked key"
    assert any("leaked key" in record.message for record in caplog.records if record.levelname == "ERROR")


def test_revoked_by_the_stream(scripted: Scripted, worker_of: Make, handler: Handler) -> None:
    """The code INSTALLATION_REVOKED on the stream is the kill switch, with its time to shut down."""
    worker = worker_of(scripted, shutdown_timeout=1000.0)
    stubborn = Handler(obedient=False)
    worker.on_task("echo", stubborn)
    worker.start()
    scripted.task("t1")
    until(lambda: stubborn.begun)
    scripted.on["stream"] = lambda request: (
        403,
        {"error": "forbidden", "message": "breach", "code": "INSTALLATION_REVOKED", "shutdown_timeout_ms": 200},
    )
    scripted.end()
    assert worker.wait(GUARD)
    stubborn.go.set()
    assert worker.stop_reason == "the installation was revoked: breach"
    assert scripted.completion("t1")["error"]["code"] == "worker_shutdown"


def test_revoked_by_a_report(scripted: Scripted, worker_of: Make, handler: Handler) -> None:
    """A completion answered with INSTALLATION_REVOKED stops the worker without waiting for what cannot come."""
    handler.go.set()
    scripted.on["complete"] = lambda request: (
        403,
        {"error": "forbidden", "message": "breach", "code": "INSTALLATION_REVOKED"},
    )
    worker = worker_of(scripted, shutdown_timeout=1000.0)
    worker.on_task("echo", handler)
    worker.start()
    scripted.task("t1")
    assert worker.wait(GUARD)
    assert worker.stop_reason == "the installation was revoked: breach"
    assert worker.stats().undelivered == 1


def test_start_against_a_revoked_installation(platform: Any, worker_of: Make, handler: Handler) -> None:
    """start() of a worker whose installation is revoked raises, and names the reason."""
    first = worker_of(platform)
    first.on_task("echo", handler)
    with first:
        env = first.installation.store.current.to_env()
    platform.revoke(env["SEKUIRE_INSTALLATION_ID"], "gone")
    for options in (
        {"runtime_token": env["SEKUIRE_RUNTIME_TOKEN"]},
        {"refresh_token": env["SEKUIRE_REFRESH_TOKEN"]},
    ):
        worker = worker_of(platform, installation_id=env["SEKUIRE_INSTALLATION_ID"], **options)
        worker.on_task("echo", handler)
        with pytest.raises(RevokedError, match="gone"):
            worker.start()
        assert not worker.is_running()
        assert worker.stop_reason is not None
        assert "revoked" in worker.stop_reason


@pytest.mark.parametrize(
    "answer",
    [
        (200, {"revoked": True, "reason": "stolen laptop", "shutdown_timeout_ms": 20_000}),
        (200, {"revoked": "True", "reason": "stolen laptop", "shutdown_timeout_ms": 20_000}),
        (200, {"revoked": 1, "reason": "stolen laptop", "shutdown_timeout_ms": 20_000}),
        (200, {"code": "INSTALLATION_REVOKED", "message": "stolen laptop", "shutdown_timeout_ms": 20_000}),
        (418, {"code": "INSTALLATION_REVOKED", "message": "stolen laptop", "shutdown_timeout_ms": 20_000}),
        (503, {"error": {"code": "INSTALLATION_REVOKED", "message": "stolen laptop"}, "shutdown_timeout_ms": 20_000}),
    ],
    ids=str,
)
def test_a_revocation_is_a_terminate(scripted: Scripted, worker_of: Make, handler: Handler, answer: Any) -> None:
    """Callbacks hear a revocation as a terminate with its reason and its time, and running work is cancelled."""
    heard: List[Any] = []
    worker = worker_of(scripted, heartbeat_interval=0.05)
    worker.on_task("echo", handler)
    worker.on_command(lambda command: heard.append((command.type, command.reason, command.shutdown_timeout)))
    worker.start()
    scripted.task("t1")
    until(lambda: handler.begun)
    scripted.on["heartbeat"] = lambda request: answer
    assert worker.wait(GUARD)
    assert handler.reasons == ["terminated"]
    assert heard == [("terminate", "stolen laptop", 20.0)]
    assert worker.stop_reason == "the installation was revoked: stolen laptop"


def test_callbacks_hear_of_a_revocation_by_the_stream(scripted: Scripted, worker_of: Make, handler: Handler) -> None:
    """The same where the stream's refusal says it."""
    heard: List[Any] = []
    worker = worker_of(scripted)
    worker.on_task("echo", handler)
    worker.on_command(lambda command: heard.append((command.type, command.reason)))
    worker.start()
    scripted.on["stream"] = lambda request: (403, {"message": "breach", "code": "INSTALLATION_REVOKED"})
    scripted.end()
    assert worker.wait(GUARD)
    assert heard == [("terminate", "breach")]


@pytest.mark.parametrize("body", [b'{"revoked": true', b'{"revoked" :\n true, "lease_expires_at": NaN}'], ids=repr)
def test_an_unreadable_answer_that_speaks_of_a_revocation(
    scripted: Scripted, worker_of: Make, handler: Handler, body: bytes
) -> None:
    """JSON that cannot be read and holds "revoked": true fails closed; a page that holds it is only a page."""
    scripted.on["heartbeat"] = lambda request: (200, body, {"Content-Type": "text/html"})
    worker = worker_of(scripted, heartbeat_interval=0.05)
    worker.on_task("echo", handler)
    worker.start()
    scripted.wait_for("heartbeat", 3)
    assert worker.is_running()
    scripted.on["heartbeat"] = lambda request: (200, body, {"Content-Type": "application/json; charset=utf-8"})
    assert worker.wait(GUARD)
    assert worker.stop_reason is not None
    assert "revoked" in worker.stop_reason


def test_a_revocation_that_another_call_is_answered(scripted: Scripted, worker_of: Make, handler: Handler) -> None:
    """The kill switch counts whichever call of the installation is answered with it."""
    worker = worker_of(scripted, heartbeat_interval=1000.0)
    worker.on_task("echo", handler)
    worker.start()
    until(lambda: worker.stats().last_heartbeat_at)
    scripted.on["logs"] = lambda request: (403, {"message": "breach", "code": "INSTALLATION_REVOKED"})
    with pytest.raises(RevokedError):
        worker.installation.auth.request("POST", lambda snapshot: "/api/v1/logs", body=b"{}", deadline=Deadline(GUARD))
    assert worker.wait(GUARD)
    assert worker.stop_reason == "the installation was revoked: breach"


def test_spellings_that_are_plain(scripted: Scripted, worker_of: Make, handler: Handler) -> None:
    """A desired state in another spelling counts, in a heartbeat's answer and in the stream's first event."""
    scripted.connected = {"desired_state": " Paused "}
    worker = worker_of(scripted, heartbeat_interval=0.05)
    worker.on_task("echo", handler)
    with worker:
        until(worker.is_paused)
        scripted.on["heartbeat"] = lambda request: (200, {"desired_state": "RUNNING"})
        until(lambda: not worker.is_paused())
        scripted.on["heartbeat"] = lambda request: (200, {"desired_state": "Terminated"})
        assert worker.wait(GUARD)


def test_orders_that_are_not_plain_are_said_once(
    scripted: Scripted, worker_of: Make, handler: Handler, caplog: pytest.LogCaptureFixture
) -> None:
    """An order that cannot be understood is an error in the log, once for each field, and changes nothing."""
    scripted.connected = {"desired_state": ["paused"]}
    scripted.on["heartbeat"] = lambda request: (200, {"desired_state": "halted", "revoked": "perhaps"})
    worker = worker_of(scripted, heartbeat_interval=0.05)
    worker.on_task("echo", handler)
    with worker:
        scripted.wait_for("heartbeat", 4)
        assert not worker.is_paused()
    for field in ("desired_state", "revoked"):
        (record,) = [record for record in caplog.records if f"sent {field}" in record.message]
        assert record.levelname == "ERROR"


def test_an_unknown_command_changes_nothing(
    scripted: Scripted, worker_of: Make, handler: Handler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command of an unknown type is counted; the worker runs on, hears of none, and its id is still free."""
    worker = worker_of(scripted)
    worker.on_task("echo", handler)
    heard: List[str] = []
    worker.on_command(lambda command: heard.append(command.type))
    with worker:
        scripted.send("command", {"type": "promote", "command_id": "c-1"})
        until(lambda: worker.stats().dropped == 1)
        # As one that a later version of the decoder lets through.
        monkeypatch.setattr(protocol, "COMMANDS", (*protocol.COMMANDS, "promote"))
        scripted.send("command", {"type": "promote", "command_id": "c-1"})
        until(lambda: worker.stats().dropped == 2)
        scripted.task("t-1")
        until(lambda: worker.stats().running == 1)
        assert not worker.is_paused()
        scripted.command("pause", command_id="c-1")
        until(worker.is_paused)
        scripted.command("resume")
        until(lambda: not worker.is_paused())
        handler.go.set()
        assert scripted.completion("t-1")["output"] == "finished"
        until(lambda: heard == ["pause", "resume"])
        # The next desired state is not taken for a repeated termination.
        scripted.on["heartbeat"] = lambda request: (200, {"desired_state": "terminated"})
        assert worker.wait(GUARD)
