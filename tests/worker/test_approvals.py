"""Approvals in a worker: a handler or the policy asks, a person decides, and whatever goes wrong means no."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime as dt
import email.utils
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional

import pytest
import requests

from sekuire import (
    PolicyClient,
    PolicyGateway,
    ProcessExecutor,
    RuntimeCredentialsStore,
    SekuireClient,
    SekuireSDK,
    TaskContext,
    Worker,
)
from sekuire.approvals import ApprovalRequest
from sekuire.errors import ApprovalDenied, PolicyViolationError, TaskCancelled, TaskError
from sekuire.policy import Policy, PolicyEnforcer
from sekuire.secret import Secret
from sekuire.testing import wait_idle
from sekuire.wire import protocol
from sekuire.worker import approvals as approvals_module
from sekuire.worker import gates as gates_module
from sekuire.worker import questions as questions_module

from ..conftest import AGENT
from ..support import elsewhere
from ..support.gateway import FakeGateway
from ..support.scripted import Request, Scripted
from ..support.waiting import GUARD, until

Make = Callable[..., Worker]
WORKSPACE = "ws_local"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retry soon, and look for a decision only where a test says so: events must bring them."""
    monkeypatch.setattr(questions_module, "POLL", 3600.0)
    monkeypatch.setattr(questions_module, "RETRY_MIN", 0.01)
    monkeypatch.setattr(questions_module, "RETRY_MAX", 0.05)


def pay(ctx: TaskContext, input: Any) -> List[Any]:
    decision = ctx.require_approval("pay", {"amount": input["amount"]}, timeout=GUARD)
    return [decision.status, decision.decided_by, decision.reason]


def asked_of(platform: Any, task_id: str) -> Dict[str, Any]:
    found: Dict[str, Any] = platform.wait_for_approval(GUARD, task_id=task_id)
    return found


def decide(platform: Any, task_id: str, decision: str, reason: Optional[str] = None) -> Dict[str, Any]:
    asked = asked_of(platform, task_id)
    platform.decide(asked["approval_id"], decision, reason, decided_by="ada")
    return asked


def error_of(platform: Any, task_id: str) -> Any:
    return platform.wait(task_id, GUARD)["error"]


def started(worker: Worker, **handlers: Callable[..., Any]) -> Worker:
    for name, handler in handlers.items():
        worker.on_task(name, handler)
    worker.start()
    return worker


def no_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lose each approval event."""
    monkeypatch.setattr("sekuire.worker.control.Control.on_approval", lambda self, approval: None)


# -- a handler asks ---------------------------------------------------------------------------------------------------


def test_approved(platform: Any, worker_of: Make) -> None:
    """The handler goes on with the decision, which the event brings long before a poll would."""
    started(worker_of(platform), pay=pay)
    task_id = platform.submit("pay", {"amount": 5}, AGENT)
    asked = decide(platform, task_id, "approved", "fine")
    assert platform.wait(task_id, GUARD)["output"] == ["approved", "ada", "fine"]
    assert asked["subject"] == {"kind": "action", "name": "pay"}
    assert asked["details"] == {"amount": 5}
    digest = protocol.approval_digest(task_id, "action", "pay", {"amount": 5}, None)
    assert asked["digest"] == digest
    assert asked["approval_id"] == protocol.approval_id(task_id, digest, 1)


def test_denied(platform: Any, worker_of: Make) -> None:
    """The task fails with the person's words; it is final. A handler may catch it."""

    def careful(ctx: TaskContext, input: Any) -> Any:
        try:
            ctx.require_approval("pay", timeout=GUARD)
        except ApprovalDenied as error:
            return [error.code, error.decided_by, error.reason]

    started(worker_of(platform), pay=pay, careful=careful)
    task_id = platform.submit("pay", {"amount": 5}, AGENT)
    asked = decide(platform, task_id, "denied", "too much")
    error = error_of(platform, task_id)
    assert (error["code"], error["retryable"]) == ("approval_denied", False)
    assert error["message"] == "action 'pay' was denied by ada: too much"
    assert error["details"] == {
        "kind": "action", "name": "pay", "approval_id": asked["approval_id"], "decided_by": "ada", "reason": "too much",
    }  # fmt: skip
    task_id = platform.submit("careful", None, AGENT)
    decide(platform, task_id, "denied", "no")
    assert platform.wait(task_id, GUARD)["output"] == ["approval_denied", "ada", "no"]


def test_nobody_decides(platform: Any, worker_of: Make) -> None:
    """It expires, which is retryable; the wait is bounded by the timeout."""

    def hasty(ctx: TaskContext, input: Any) -> None:
        ctx.require_approval("pay", timeout=0.1)

    started(worker_of(platform), hasty=hasty)
    error = error_of(platform, platform.submit("hasty", None, AGENT))
    assert (error["code"], error["retryable"]) == ("approval_expired", True)
    assert "within 0.1 s" in error["message"]


def test_the_tasks_time_goes_on(platform: Any, worker_of: Make) -> None:
    """The time limit of the task ends the wait, and the platform is asked for no longer than that."""
    started(worker_of(platform), pay=pay)
    task_id = platform.submit("pay", {"amount": 5}, AGENT, timeout_ms=400)
    asked = asked_of(platform, task_id)
    assert asked["expires_at"] <= asked["created_at"][:17] + "99"
    assert error_of(platform, task_id)["code"] in ("timeout", "approval_expired")


def test_a_decision_that_no_event_brings(platform: Any, worker_of: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker looks for it by itself."""
    no_events(monkeypatch)
    monkeypatch.setattr(questions_module, "POLL", 0.05)
    started(worker_of(platform), pay=pay)
    task_id = platform.submit("pay", {"amount": 5}, AGENT)
    decide(platform, task_id, "approved")
    assert platform.wait(task_id, GUARD)["status"] == "completed"


def test_at_once_after_a_reconnect(platform: Any, worker_of: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decision made while the stream was broken is found as soon as it is open again."""
    no_events(monkeypatch)
    started(worker_of(platform), pay=pay)
    task_id = platform.submit("pay", {"amount": 5}, AGENT)
    decide(platform, task_id, "approved")
    platform.drop_streams()
    assert platform.wait(task_id, GUARD)["status"] == "completed"


def test_two_equal_actions_need_two_decisions(platform: Any, worker_of: Make) -> None:
    """An approval counts for one request."""

    def twice(ctx: TaskContext, input: Any) -> List[str]:
        return [ctx.require_approval("pay", {"n": 1}, timeout=GUARD).approval_id or "" for _ in range(2)]

    started(worker_of(platform), twice=twice)
    task_id = platform.submit("twice", None, AGENT)
    first = decide(platform, task_id, "approved")
    second = decide(platform, task_id, "approved")
    assert first["digest"] == second["digest"]
    assert platform.wait(task_id, GUARD)["output"] == [first["approval_id"], second["approval_id"]]
    assert second["approval_id"] == protocol.approval_id(task_id, first["digest"], 2)


def test_two_people_at_once(platform: Any, worker_of: Make) -> None:
    """The first decision wins, and it is the one that the handler gets."""
    started(worker_of(platform), pay=pay)
    task_id = platform.submit("pay", {"amount": 5}, AGENT)
    asked = asked_of(platform, task_id)
    url = f"{platform.url}/api/v1/approvals/{asked['approval_id']}/decision"
    together, answers = threading.Barrier(2), []

    def person(decision: str) -> None:
        together.wait(GUARD)
        answer = requests.post(url, json={"decision": decision}, headers={"X-API-Key": platform.api_key}, timeout=GUARD)
        answers.append((answer.status_code, decision))

    people = [threading.Thread(target=person, args=(one,)) for one in ("approved", "denied")]
    for one in people:
        one.start()
    for one in people:
        one.join(GUARD)
    assert sorted(status for status, _ in answers) == [200, 409]
    won = next(decision for status, decision in answers if status == 200)
    task = platform.wait(task_id, GUARD)
    assert (task["status"] == "completed") == (won == "approved")


def test_an_agent_cannot_decide(platform: Any, worker_of: Make) -> None:
    """The agent's own token is refused, and the request stays open."""
    worker = started(worker_of(platform), pay=pay)
    task_id = platform.submit("pay", {"amount": 5}, AGENT)
    asked = asked_of(platform, task_id)
    token = worker.installation.store.current.runtime_token
    assert token is not None
    answer = requests.post(
        f"{platform.url}/api/v1/approvals/{asked['approval_id']}/decision",
        json={"decision": "approved"}, headers={"Authorization": f"Bearer {token.reveal()}"}, timeout=GUARD,
    )  # fmt: skip
    assert answer.status_code == 403
    assert platform.approvals()[0]["status"] == "pending"
    decide(platform, task_id, "denied")
    assert error_of(platform, task_id)["code"] == "approval_denied"


def test_a_second_attempt_finds_its_decision(make_platform: Callable[..., Any], worker_of: Make) -> None:
    """A handler that fails after the approval does not ask again when its task is tried again."""
    platform = make_platform()
    attempts: List[int] = []

    def flaky(ctx: TaskContext, input: Any) -> str:
        ctx.require_approval("pay", timeout=GUARD)
        attempts.append(ctx.attempt)
        if ctx.attempt == 1:
            raise TaskError("flaky", retryable=True)
        return "paid"

    started(worker_of(platform), flaky=flaky)
    task_id = platform.submit("flaky", None, AGENT, max_attempts=2)
    decide(platform, task_id, "approved")
    assert platform.wait(task_id, GUARD)["output"] == "paid"
    assert attempts == [1, 2]
    assert len(platform.approvals()) == 1


def test_an_expired_number_is_skipped(make_platform: Callable[..., Any], worker_of: Make) -> None:
    """What nobody answered in one attempt is asked again in the next."""
    platform = make_platform()

    def hasty(ctx: TaskContext, input: Any) -> str:
        ctx.require_approval("pay", timeout=input if ctx.attempt == 1 else GUARD)
        return "paid"

    def asked(task_id: str) -> List[Any]:
        return [one for one in platform.approvals() if one["task_id"] == task_id]

    started(worker_of(platform), hasty=hasty)
    # On a busy machine the first time may end before the platform has got the request.
    for seconds in (0.05, 1.0, 10.0, 100.0):
        task_id = platform.submit("hasty", seconds, AGENT, max_attempts=2)
        until(lambda task_id=task_id: platform.task(task_id)["attempt"] == 2 and asked(task_id)[:1])
        until(lambda task_id=task_id: asked(task_id)[0]["status"] == "pending")
        found = asked(task_id)
        decide(platform, task_id, "approved")
        assert platform.wait(task_id, GUARD)["output"] == "paid"
        if len(found) == 2:
            break
    second, first = found
    assert (first["status"], second["status"]) == ("expired", "pending")
    assert second["approval_id"] == protocol.approval_id(task_id, first["digest"], 2)


def test_secrets_are_masked(platform: Any, worker_of: Make) -> None:
    """No token of this process is shown to whoever decides, wherever it stands in the details."""
    secret = Secret("tok_4711_0815_secret")

    def leaky(ctx: TaskContext, input: Any) -> str:
        details = {"url": f"https://x.test/?key={secret.reveal()}", secret.reveal(): [secret], "proxy": "http://a:b@c/"}
        ctx.require_approval("send", details, timeout=GUARD)
        return "sent"

    started(worker_of(platform), leaky=leaky)
    task_id = platform.submit("leaky", None, AGENT)
    asked = decide(platform, task_id, "approved")
    assert asked["details"] == {"url": "https://x.test/?key=***", "***": ["***"], "proxy": "http://***@c/"}
    assert platform.wait(task_id, GUARD)["status"] == "completed"


@pytest.mark.parametrize(
    ("details", "problem"),
    [
        (b"bytes", "a bytes"),
        ({1: 2}, "key that is not a string"),
        (float("nan"), "not finite"),
        ({"s": {1, 2}}, "a set"),
        ({"n": 2**60}, "integer beyond"),
        ("x" * protocol.MAX_DETAILS, "more than 65536 bytes"),
    ],
)
def test_details_that_cannot_be_shown(platform: Any, worker_of: Make, details: Any, problem: str) -> None:
    """Nothing is asked, and the answer is no."""

    def odd(ctx: TaskContext, input: Any) -> None:
        ctx.require_approval("pay", details, timeout=GUARD)

    started(worker_of(platform), odd=odd)
    error = error_of(platform, platform.submit("odd", None, AGENT))
    assert error["code"] == "approval_denied"
    assert problem in error["message"]
    assert platform.approvals() == []


def test_wrong_arguments(platform: Any, worker_of: Make) -> None:
    """They are errors of the handler."""
    problems: List[str] = []

    def wrong(ctx: TaskContext, input: Any) -> None:
        for name, timeout in (("", 1.0), (7, 1.0), ("pay", 0), ("pay", float("nan")), ("pay", "1"), ("pay", None)):
            with pytest.raises(ValueError) as raised:
                ctx.require_approval(name, timeout=timeout)  # type: ignore[arg-type]
            problems.append(str(raised.value).split()[0])

    started(worker_of(platform), wrong=wrong)
    assert platform.wait(platform.submit("wrong", None, AGENT), GUARD)["status"] == "completed"
    assert problems == ["name"] * 2 + ["timeout"] * 4


def test_outside_a_handler(platform: Any, worker_of: Make) -> None:
    """A context that is used after its handler has ended asks nobody."""
    kept: List[TaskContext] = []
    started(worker_of(platform), keep=lambda ctx, input: kept.append(ctx))
    platform.wait(platform.submit("keep", None, AGENT), GUARD)
    with pytest.raises(ApprovalDenied, match="nobody can be asked"):
        until(lambda: kept)[0].require_approval("pay")


# -- the end of a wait ------------------------------------------------------------------------------------------------


class Waiting:
    """Asks, and remembers how that ended."""

    def __init__(self) -> None:
        self.raised: List[BaseException] = []

    def __call__(self, ctx: TaskContext, input: Any) -> str:
        try:
            ctx.require_approval("pay", timeout=GUARD)
        except BaseException as error:
            self.raised.append(error)
            raise
        return "paid"

    async def later(self, ctx: TaskContext, input: Any) -> str:
        try:
            await ctx.require_approval_async("pay", timeout=GUARD)
        except BaseException as error:
            self.raised.append(error)
            raise
        return "paid"


@pytest.fixture(params=["thread", "loop"])
def waiting(request: pytest.FixtureRequest) -> Any:
    waiting = Waiting()
    return waiting, waiting if request.param == "thread" else waiting.later


def test_cancelled_while_it_waits(platform: Any, worker_of: Make, waiting: Any) -> None:
    """The handler gets TaskCancelled at once, and the task is answered cancelled."""
    watched, handler = waiting
    started(worker_of(platform), wait=handler)
    task_id = platform.submit("wait", None, AGENT)
    asked_of(platform, task_id)
    with SekuireClient(api_base_url=platform.url, api_key=platform.api_key) as client:
        client.cancel(task_id, "not needed")
    assert error_of(platform, task_id)["code"] == "cancelled"
    assert type(watched.raised[0]) in (TaskCancelled, asyncio.CancelledError)


def test_terminated_while_it_waits(platform: Any, worker_of: Make, waiting: Any) -> None:
    """The wait ends, and the task is answered worker_terminated."""
    _, handler = waiting
    worker = started(worker_of(platform), wait=handler)
    task_id = platform.submit("wait", None, AGENT)
    asked_of(platform, task_id)
    platform.command(platform.installations()[0]["installation_id"], "terminate", "enough")
    assert error_of(platform, task_id)["code"] == "worker_terminated"
    assert worker.wait(GUARD)


def test_revoked_while_it_waits(platform: Any, worker_of: Make) -> None:
    """The kill switch ends it in the same way."""
    started(worker_of(platform), wait=Waiting())
    task_id = platform.submit("wait", None, AGENT)
    asked_of(platform, task_id)
    platform.revoke(platform.installations()[0]["installation_id"], "breach", shutdown_timeout=GUARD)
    assert error_of(platform, task_id)["code"] == "worker_terminated"


def test_a_drain_ends_it_at_once(platform: Any, worker_of: Make, waiting: Any) -> None:
    """A stop does not wait for a person: the task is answered worker_shutdown, retryable."""
    _, handler = waiting
    worker = started(worker_of(platform), wait=handler)
    task_id = platform.submit("wait", None, AGENT)
    asked_of(platform, task_id)
    worker.stop()
    error = error_of(platform, task_id)
    assert (error["code"], error["retryable"]) == ("worker_shutdown", True)


def test_a_drain_and_another_worker(make_platform: Callable[..., Any], worker_of: Make) -> None:
    """The next worker gets the task again, and the approval that came in between."""
    platform = make_platform()
    first = started(worker_of(platform), wait=Waiting())
    task_id = platform.submit("wait", None, AGENT, max_attempts=3)
    decide(platform, task_id, "approved")
    assert platform.wait(task_id, GUARD)["output"] == "paid"
    task_id = platform.submit("wait", None, AGENT, max_attempts=3)
    asked_of(platform, task_id)
    first.stop()
    started(worker_of(platform), wait=Waiting())
    decide(platform, task_id, "approved")
    assert platform.wait(task_id, GUARD)["output"] == "paid"


def test_a_lost_lease(scripted: Scripted, worker_of: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends the wait as it cancels every handler."""
    monkeypatch.setattr("sekuire.session.heartbeat.MIN_GRACE", 0.0)
    is_lost = threading.Event()
    scripted.on["approvals"] = lambda request: (201, {"status": "pending", "approval_id": request.json["approval_id"]})
    scripted.on["approval"] = lambda request: (200, {"status": "pending"})

    def heartbeat(request: Request) -> Any:
        end = dt.datetime.now(dt.timezone.utc) + dt.timedelta(seconds=-60 if is_lost.is_set() else 60)
        date = email.utils.formatdate(usegmt=True)
        return 200, {"lease_expires_at": protocol.format_time(end)}, {"Date": date}

    scripted.on["heartbeat"] = heartbeat
    worker = started(worker_of(scripted), wait=Waiting())
    scripted.task("t-1", "wait")
    scripted.wait_for("approvals")
    is_lost.set()
    assert scripted.completion("t-1")["error"]["code"] == "cancelled"
    worker.stop()


def test_a_pause_does_not_end_it(platform: Any, worker_of: Make) -> None:
    """A handler that waits goes on, and gets its decision while the worker is paused."""
    worker = started(worker_of(platform), wait=Waiting())
    task_id = platform.submit("wait", None, AGENT)
    asked_of(platform, task_id)
    worker.pause("lunch")
    decide(platform, task_id, "approved")
    assert platform.wait(task_id, GUARD)["output"] == "paid"


def test_a_superseded_attempt(scripted: Scripted, worker_of: Make) -> None:
    """409: another worker has the task. The handler is cancelled as superseded, and its end is no answer."""
    scripted.on["approvals"] = lambda request: (409, {"error": "conflict", "code": "SUPERSEDED"})
    waiting = Waiting()
    worker = started(worker_of(scripted), wait=waiting, other=lambda ctx, input: "done")
    scripted.task("t-1", "wait")
    until(lambda: waiting.raised)
    assert str(waiting.raised[0]) == "superseded"
    until(lambda: worker.stats().dropped == 1)
    scripted.task("t-2", "other")
    assert scripted.completion("t-2")["output"] == "done"
    assert scripted.completions("t-1") == []


# -- the platform fails -----------------------------------------------------------------------------------------------


def answers(*given: Any) -> Callable[[Request], Any]:
    """Answer requests for approval with each of these in turn, and then go on with the last."""
    left = list(given)

    def answer(request: Request) -> Any:
        status, body = left.pop(0) if len(left) > 1 else left[0]
        named = {"approval_id": request.json["approval_id"], "digest": request.json["digest"]}
        return status, {**named, **body} if isinstance(body, dict) and "status" in body else body

    return answer


def test_transient_failures_are_retried(scripted: Scripted, worker_of: Make) -> None:
    """Each try has the same id and key."""
    page = (503, "<html>busy</html>")
    approved = {"status": "approved", "decided_by": "ada"}
    scripted.on["approvals"] = answers((503, {"error": "busy"}), page, (200, {}), (302, ""), (201, approved))
    started(worker_of(scripted), pay=pay)
    scripted.task("t-1", "pay", {"amount": 1})
    assert scripted.completion("t-1")["output"] == ["approved", "ada", None]
    sent = scripted.of("approvals")
    assert len(sent) == 5
    assert len({request.headers["Idempotency-Key"] for request in sent}) == 1
    assert len({request.json["approval_id"] for request in sent}) == 1


@pytest.mark.parametrize(
    ("status", "code"),
    [(403, "NOT_YOURS"), (422, "WRONG_DIGEST"), (404, "TASK_NOT_FOUND"), (409, "APPROVAL_ID_REUSED")],
)
def test_a_refused_request(scripted: Scripted, worker_of: Make, status: int, code: str) -> None:
    """What the platform refuses to ask is denied."""
    scripted.on["approvals"] = lambda request: (status, {"error": "no", "code": code})
    started(worker_of(scripted), pay=pay)
    scripted.task("t-1", "pay", {"amount": 1})
    assert scripted.completion("t-1")["error"]["code"] == "approval_denied"


@pytest.mark.parametrize("by", ["event", "poll", "answer"])
def test_a_decision_for_another_digest(
    scripted: Scripted, worker_of: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, by: str
) -> None:
    """It is void, whatever brings it; so is one without a digest."""
    monkeypatch.setattr(questions_module, "POLL", 0.02)
    forged = {"status": "approved", "digest": "0" * 64}
    known: Dict[str, Any] = {"status": "pending"}
    scripted.on["approvals"] = lambda request: (201, forged if by == "answer" else {"status": "pending"})
    scripted.on["approval"] = lambda request: (200, {**known})
    started(worker_of(scripted), pay=pay)
    scripted.task("t-1", "pay", {"amount": 1})
    asked = scripted.wait_for("approvals")[0].json
    facts = {"approval_id": asked["approval_id"], "task_id": "t-1"}
    if by == "event":
        scripted.send("approval", {**facts, **forged})
        scripted.send("approval", {**facts, "status": "approved"})
        scripted.send("approval", {**facts, "task_id": "t-2", "status": "approved", "digest": asked["digest"]})
        scripted.send("approval", "not JSON")
    elif by == "poll":
        known.update(forged)
    until(lambda: "is void" in caplog.text)
    scripted.wait_for("approval", scripted.count("approval") + 3)
    assert scripted.completions("t-1") == []
    known.update({"status": "denied", "digest": asked["digest"]})
    assert scripted.completion("t-1")["error"]["code"] == "approval_denied"
    assert caplog.text.count("is void") == 1


def test_a_platform_that_has_forgotten_the_request(
    scripted: Scripted, worker_of: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is asked again, with the same id."""
    monkeypatch.setattr(questions_module, "POLL", 0.02)
    scripted.on["approvals"] = answers((201, {"status": "pending"}), (201, {"status": "approved"}))
    scripted.on["approval"] = lambda request: (404, {"error": "unknown", "code": "APPROVAL_NOT_FOUND"})
    started(worker_of(scripted), pay=pay)
    scripted.task("t-1", "pay", {"amount": 1})
    assert scripted.completion("t-1")["status"] == "completed"
    sent = scripted.of("approvals")
    assert len({request.json["approval_id"] for request in sent}) == 1
    assert len({request.headers["Idempotency-Key"] for request in sent}) == 2


# -- a platform without approvals -------------------------------------------------------------------------------------

NOT_FOUND = (404, {"error": "not found"})


def test_unsupported_and_nobody_to_ask(scripted: Scripted, worker_of: Make) -> None:
    """It is denied."""
    scripted.on["approvals"] = lambda request: NOT_FOUND
    started(worker_of(scripted), pay=pay)
    scripted.task("t-1", "pay", {"amount": 1})
    error = scripted.completion("t-1")["error"]
    assert error["code"] == "approval_denied"
    assert "no approval_handler" in error["message"]


@pytest.mark.parametrize("answer", [True, 1, "yes", None, False, RuntimeError("broken"), SystemExit(1)], ids=repr)
def test_unsupported_and_a_handler(scripted: Scripted, worker_of: Make, answer: Any) -> None:
    """Exactly True approves. It is called in a thread of its own, and the platform is not asked a second time."""
    scripted.on["approvals"] = lambda request: NOT_FOUND
    seen: List[Any] = []

    def handler(request: ApprovalRequest) -> Any:
        seen.append((request, threading.current_thread().name))
        if isinstance(answer, BaseException):
            raise answer
        return answer

    started(worker_of(scripted, approval_handler=handler), pay=pay)
    for number in range(2):
        scripted.task(f"t-{number}", "pay", {"amount": 1})
        done = scripted.completion(f"t-{number}")
        assert (done["status"] == "completed") == (answer is True)
        assert answer is True or done["error"]["code"] == "approval_denied"
    assert scripted.count("approvals") == 1
    request, thread = seen[0]
    assert (request.task_id, request.kind, request.name, request.details) == ("t-0", "action", "pay", {"amount": 1})
    assert 0 < request.timeout <= GUARD
    assert thread.startswith("sekuire-approval-handler")


def test_a_handler_that_hangs(scripted: Scripted, worker_of: Make) -> None:
    """The timeout ends the wait, and a later True approves nothing."""
    scripted.on["approvals"] = lambda request: NOT_FOUND
    go_on = threading.Event()

    def handler(request: ApprovalRequest) -> bool:
        return go_on.wait(GUARD)

    def hasty(ctx: TaskContext, input: Any) -> None:
        ctx.require_approval("pay", timeout=0.1)

    started(worker_of(scripted, approval_handler=handler), hasty=hasty)
    scripted.task("t-1", "hasty")
    assert scripted.completion("t-1")["error"]["code"] == "approval_expired"
    go_on.set()


def test_a_reconnect_while_a_handler_decides(scripted: Scripted, worker_of: Make) -> None:
    """It is asked once."""
    scripted.on["approvals"] = lambda request: NOT_FOUND
    calls: List[str] = []
    go_on = threading.Event()

    def handler(request: ApprovalRequest) -> bool:
        calls.append(request.approval_id)
        return go_on.wait(GUARD)

    worker = started(worker_of(scripted, approval_handler=handler), pay=pay)
    scripted.task("t-1", "pay", {"amount": 1})
    until(lambda: calls)
    scripted.end()
    until(lambda: worker.stats().reconnects)
    assert worker.wait_until_connected(GUARD)
    time.sleep(0.1)
    go_on.set()
    assert scripted.completion("t-1")["status"] == "completed"
    assert len(calls) == 1


@pytest.mark.parametrize("asks", ["a handler", "the policy"])
def test_a_platform_that_reports_everything_expired(
    scripted: Scripted, worker_of: Make, monkeypatch: pytest.MonkeyPatch, asks: str
) -> None:
    """It is not asked without end."""
    monkeypatch.setattr(approvals_module, "MOST_SKIPPED", 3)
    monkeypatch.setattr(gates_module, "MOST_SKIPPED", 3)
    scripted.on["approvals"] = lambda request: (200, {"status": "expired"})
    options: Dict[str, Any] = {}
    if asks == "the policy":
        options["policy_gateway"] = NeedsApproval()
    started(worker_of(scripted, **options), pay=pay)
    scripted.task("t-1", "pay", {"amount": 1})
    assert scripted.completion("t-1")["error"]["code"] == "approval_expired"
    assert scripted.count("approvals") in (3, 4)


def test_a_superseded_attempt_that_has_not_begun(scripted: Scripted, worker_of: Make) -> None:
    """Another worker has the task: it is forgotten here, without an answer or a release."""
    scripted.on["approvals"] = lambda request: (409, {"error": "conflict", "code": "SUPERSEDED"})
    worker = started(worker_of(scripted, policy_gateway=NeedsApproval()), pay=pay)
    scripted.task("t-1", "pay", {"amount": 1})
    until(lambda: worker.stats().dropped == 1)
    assert worker.stats().waiting == 0
    worker.stop()
    assert scripted.completions("t-1") == scripted.of("release") == []


class NeedsApproval(FakeGateway):
    """Want an approval for each task, as a policy does."""

    def check_task(self, capability: str, tool: Optional[str] = None) -> Any:
        enforcer = PolicyEnforcer(Policy.from_content(capabilities(require_approval=["*"])))
        enforcer.enforce_task(capability, tool)
        return enforcer


def test_an_option_of_the_sdk(scripted: Scripted) -> None:
    """Its Workers have the SDK's handler."""
    scripted.on["approvals"] = lambda request: NOT_FOUND
    with SekuireSDK(
        AGENT, api_base_url=scripted.url, install_token="skt-1", approval_handler=lambda request: True
    ) as sdk:
        started(sdk.create_task_worker(), pay=pay)
        scripted.task("t-1", "pay", {"amount": 1})
        assert scripted.completion("t-1")["status"] == "completed"


def test_an_intermediary_does_not_switch_it_off(scripted: Scripted, worker_of: Make) -> None:
    """One 404 of another server is tried again; the handler is not asked in the platform's place."""
    page = (404, "<html>no such page</html>")
    scripted.on["approvals"] = answers(page, (201, {"status": "denied"}))
    started(worker_of(scripted, approval_handler=lambda request: True), pay=pay)
    scripted.task("t-1", "pay", {"amount": 1})
    assert scripted.completion("t-1")["error"]["code"] == "approval_denied"


# -- the policy asks --------------------------------------------------------------------------------------------------


def capabilities(**rules: Any) -> Dict[str, Any]:
    return {"agent": {"capabilities": rules}}


ASK_FOR_PAY = capabilities(require_approval=["pay"])
ASK_FOR_TOOLS = capabilities(require_tool_approval=True)


@pytest.fixture
def under(platform: Any, worker_of: Make) -> Iterator[Callable[..., Any]]:
    """A worker under a policy, with handlers; and its gateway."""
    made: List[Any] = []

    def make(policy: Any, handlers: Dict[str, Any], at: Any = None, options: Any = None, **worker: Any) -> Any:
        home = at or platform
        home.set_policy(WORKSPACE, policy)
        store = RuntimeCredentialsStore()
        client = PolicyClient(home.url, credentials_store=store)
        gateway = PolicyGateway(client, WORKSPACE, **(options or {}))
        made.extend((gateway, client))
        found = worker_of(
            home, policy_gateway=gateway, credentials_store=store, install_token=home.create_install_token(AGENT),
            **{"heartbeat_interval": 0.05, **worker},
        )  # fmt: skip
        return started(found, **handlers), gateway

    yield make
    for one in made:
        one.close()


def paid(ctx: TaskContext, input: Any) -> str:
    return "paid"


def change(platform: Any, gateway: PolicyGateway, policy: Any) -> None:
    """Put a policy in force."""
    new = platform.set_policy(WORKSPACE, policy)
    until(lambda: gateway.policy is not None and gateway.policy.hash == new["hash"])


def test_a_capability_that_needs_an_approval(platform: Any, under: Callable[..., Any]) -> None:
    """A person sees the input, and decides before the handler begins. Others run at the same time."""
    worker, gateway = under(ASK_FOR_PAY, {"pay": paid, "other": paid}, max_workers=1)
    task_id = platform.submit("pay", {"amount": 5}, AGENT)
    asked = asked_of(platform, task_id)
    assert asked["subject"] == {"kind": "capability", "name": "pay"}
    assert asked["details"] == {"input": {"amount": 5}}
    assert asked["policy_hash"] == gateway.policy.hash
    until(lambda: (worker.stats().waiting, worker.stats().running) == (1, 0))
    assert platform.wait(platform.submit("other", {}, AGENT), GUARD)["output"] == "paid"
    decide(platform, task_id, "approved")
    assert platform.wait(task_id, GUARD)["output"] == "paid"
    task_id = platform.submit("pay", {"amount": 6}, AGENT)
    decide(platform, task_id, "denied", "no")
    error = error_of(platform, task_id)
    assert (error["code"], error["details"]["rule"]) == ("approval_denied", "capability.approval_required")
    assert (worker.stats().waiting, worker.stats().rejected) == (0, 1)


def test_a_tool_of_the_task(platform: Any, under: Callable[..., Any]) -> None:
    """Its approval covers the first use of that tool in the handler; the second asks again, with its details."""

    def use(ctx: TaskContext, input: Any) -> str:
        ctx.policy.enforce_tool("search")
        ctx.policy.enforce_tool("search", details={"query": "x"})
        return "used"

    under(ASK_FOR_TOOLS, {"use": use})
    task_id = platform.submit("use", {}, AGENT, tool="search")
    before = decide(platform, task_id, "approved")
    assert before["subject"] == {"kind": "tool", "name": "search"}
    within = decide(platform, task_id, "approved")
    assert (within["subject"], within["details"]) == (before["subject"], {"query": "x"})
    assert platform.wait(task_id, GUARD)["output"] == "used"
    assert len(platform.approvals()) == 2


def test_a_tool_in_a_handler(platform: Any, under: Callable[..., Any]) -> None:
    """It is asked for in the task's thread and in its context, and denied in a thread of the handler's own."""
    found: List[Any] = []

    def use(ctx: TaskContext, input: Any) -> str:
        def elsewhere() -> None:
            try:
                ctx.policy.enforce_tool("search")
            except PolicyViolationError as error:
                found.append(error.rule)

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join(GUARD)
        ctx.policy.enforce_tool("search")
        return "used"

    async def use_async(ctx: TaskContext, input: Any) -> str:
        await asyncio.to_thread(ctx.policy.enforce_tool, "search")
        return "used"

    _, gateway = under(ASK_FOR_TOOLS, {"use": use, "use_async": use_async})
    for capability in ("use", "use_async"):
        task_id = platform.submit(capability, {}, AGENT)
        decide(platform, task_id, "approved")
        assert platform.wait(task_id, GUARD)["output"] == "used"
        task_id = platform.submit(capability, {}, AGENT)
        decide(platform, task_id, "denied")
        error = error_of(platform, task_id)
        assert (error["code"], error["details"]["rule"]) == ("approval_denied", "tool.approval_required")
    assert found == ["tool.approval_required"] * 2
    with pytest.raises(PolicyViolationError, match="approval_required"):
        gateway.check_tool("search")


def test_deny_rules_win_before_anybody_is_asked(platform: Any, under: Callable[..., Any]) -> None:
    """A task whose tool is denied is not asked about, although its capability needs an approval."""
    under(capabilities(require_approval=["*"], denied_tools=["shell"]), {"pay": paid})
    error = error_of(platform, platform.submit("pay", {}, AGENT, tool="shell"))
    assert (error["code"], error["details"]["rule"]) == ("policy_denied", "tool.blocked")
    assert platform.approvals() == []


def test_an_input_that_does_not_fit(platform: Any, under: Callable[..., Any]) -> None:
    """Nobody is asked about it."""

    @dataclasses.dataclass
    class Payment:
        amount: int

    def typed(ctx: TaskContext, input: Payment) -> int:
        return input.amount

    typed.__annotations__["input"] = Payment
    under(ASK_FOR_PAY, {"pay": typed})
    assert error_of(platform, platform.submit("pay", {"amount": "much"}, AGENT))["code"] == "invalid_task"
    assert platform.approvals() == []
    task_id = platform.submit("pay", {"amount": 7}, AGENT)
    decide(platform, task_id, "approved")
    assert platform.wait(task_id, GUARD)["output"] == 7


def test_warnings_only(platform: Any, under: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    """warn_only logs what would be asked for, and asks nobody."""

    def use(ctx: TaskContext, input: Any) -> str:
        ctx.policy.enforce_tool("search")
        return "used"

    policy = capabilities(require_approval=["*"], require_tool_approval=True)
    under(policy, {"use": use}, options={"warn_only": True, "environment": "development"})
    assert platform.wait(platform.submit("use", {}, AGENT), GUARD)["output"] == "used"
    assert platform.approvals() == []
    assert "capability.approval_required" in caplog.text
    assert "tool.approval_required" in caplog.text


def test_requests_are_counted_once(platform: Any, under: Callable[..., Any]) -> None:
    """A task that waits for an approval counts for the rate limit when it begins."""
    policy = {**ASK_FOR_PAY, "rate_limits": {"requests": {"max_per_hour": 2}}}
    under(policy, {"pay": paid})
    for _ in range(2):
        task_id = platform.submit("pay", {}, AGENT)
        decide(platform, task_id, "approved")
        assert platform.wait(task_id, GUARD)["output"] == "paid"


# -- the policy changes while a person decides ------------------------------------------------------------------------


def test_a_capability_that_is_denied_now(platform: Any, under: Callable[..., Any]) -> None:
    """An approval does not outweigh the new policy."""
    _, gateway = under(ASK_FOR_PAY, {"pay": paid})
    task_id = platform.submit("pay", {}, AGENT)
    asked_of(platform, task_id)
    change(platform, gateway, capabilities(denied_capabilities=["pay"]))
    decide(platform, task_id, "approved")
    assert error_of(platform, task_id)["code"] == "policy_denied"


def test_a_capability_that_is_denied_at_once(platform: Any, under: Callable[..., Any]) -> None:
    """With on_change="cancel" nobody needs to decide any more."""
    _, gateway = under(ASK_FOR_PAY, {"pay": paid, "other": paid}, options={"on_change": "cancel"})
    task_id = platform.submit("pay", {}, AGENT)
    asked_of(platform, task_id)
    change(platform, gateway, capabilities(denied_capabilities=["pay"]))
    assert error_of(platform, task_id)["code"] == "policy_denied"
    assert platform.wait(platform.submit("other", {}, AGENT), GUARD)["output"] == "paid"


def test_a_capability_that_needs_it_still(platform: Any, under: Callable[..., Any]) -> None:
    """It is asked for again, by the new policy."""
    _, gateway = under(ASK_FOR_PAY, {"pay": paid})
    task_id = platform.submit("pay", {}, AGENT)
    first = asked_of(platform, task_id)
    change(platform, gateway, capabilities(require_approval=["pay", "more"]))
    decide(platform, task_id, "approved")
    second = decide(platform, task_id, "approved")
    assert first["policy_hash"] != second["policy_hash"] == gateway.policy.hash
    assert platform.wait(task_id, GUARD)["output"] == "paid"


def test_an_action_under_a_new_policy(platform: Any, under: Callable[..., Any]) -> None:
    """What a handler has asked for is asked for again, and denied if the task is."""
    _, gateway = under(capabilities(), {"act": pay})
    task_id = platform.submit("act", {"amount": 1}, AGENT)
    first = asked_of(platform, task_id)
    change(platform, gateway, capabilities(denied_tools=["shell"]))
    platform.decide(first["approval_id"], "approved")
    second = asked_of(platform, task_id)
    assert first["policy_hash"] != second["policy_hash"]
    change(platform, gateway, capabilities(denied_capabilities=["act"]))
    platform.decide(second["approval_id"], "approved")
    assert error_of(platform, task_id)["code"] == "policy_denied"


def test_a_tool_that_is_free_now(platform: Any, under: Callable[..., Any]) -> None:
    """The next use of a tool asks by the policy in force, and goes on where that asks for nothing."""
    go_on = threading.Event()

    def use(ctx: TaskContext, input: Any) -> str:
        ctx.policy.enforce_tool("search")
        assert go_on.wait(GUARD)
        ctx.policy.enforce_tool("search")
        return "used"

    _, gateway = under(ASK_FOR_TOOLS, {"use": use})
    task_id = platform.submit("use", {}, AGENT)
    decide(platform, task_id, "approved")
    change(platform, gateway, capabilities(denied_tools=["shell"]))
    go_on.set()
    assert platform.wait(task_id, GUARD)["output"] == "used"
    assert len(platform.approvals()) == 1


# -- tasks that wait before they begin --------------------------------------------------------------------------------


def test_a_pause_answers_them(platform: Any, under: Callable[..., Any]) -> None:
    """They have not begun."""
    worker, _ = under(ASK_FOR_PAY, {"pay": paid})
    task_id = platform.submit("pay", {}, AGENT)
    asked_of(platform, task_id)
    worker.pause("lunch")
    assert error_of(platform, task_id)["code"] == "worker_paused"
    assert worker.stats().waiting == 0


def test_a_cancel_answers_them(platform: Any, under: Callable[..., Any]) -> None:
    """They have not begun."""
    worker, _ = under(ASK_FOR_PAY, {"pay": paid})
    task_id = platform.submit("pay", {}, AGENT)
    asked_of(platform, task_id)
    with SekuireClient(api_base_url=platform.url, api_key=platform.api_key) as client:
        client.cancel(task_id)
    assert error_of(platform, task_id)["code"] == "cancelled"
    assert worker.stats().waiting == 0


def test_a_termination_answers_them(platform: Any, under: Callable[..., Any]) -> None:
    """They have not begun."""
    worker, _ = under(ASK_FOR_PAY, {"pay": paid})
    task_id = platform.submit("pay", {}, AGENT)
    asked_of(platform, task_id)
    platform.command(platform.installations()[0]["installation_id"], "terminate")
    assert error_of(platform, task_id)["code"] == "worker_terminated"
    assert worker.wait(GUARD)


def test_a_stop_releases_them(platform: Any, under: Callable[..., Any]) -> None:
    """The next worker finds the request, and the decision that came in between."""
    worker, _ = under(ASK_FOR_PAY, {"pay": paid})
    task_id = platform.submit("pay", {}, AGENT)
    asked = asked_of(platform, task_id)
    worker.stop()
    assert worker.stats().released == 1
    platform.decide(asked["approval_id"], "approved")
    under(ASK_FOR_PAY, {"pay": paid})
    assert platform.wait(task_id, GUARD)["output"] == "paid"
    assert len(platform.approvals()) == 1


def test_a_lost_lease_releases_them(make_platform: Callable[..., Any], under: Callable[..., Any]) -> None:
    """As it does with all that has not begun."""
    platform = make_platform(redelivery_delay=0.1)
    worker, _ = under(ASK_FOR_PAY, {"pay": paid}, at=platform)
    task_id = platform.submit("pay", {}, AGENT)
    asked_of(platform, task_id)
    worker._dispatcher.lose_lease()
    until(lambda: worker.stats().released == 1)
    # It comes again, on another stream, and finds its request.
    platform.drop_streams()
    decide(platform, task_id, "approved")
    assert platform.wait(task_id, GUARD)["output"] == "paid"


def test_nobody_decides_on_a_capability(
    platform: Any, under: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It expires, retryable."""
    monkeypatch.setattr("sekuire.worker.records.APPROVAL_TIME", 0.1)
    under(ASK_FOR_PAY, {"pay": paid})
    error = error_of(platform, platform.submit("pay", {}, AGENT))
    assert (error["code"], error["retryable"]) == ("approval_expired", True)


@pytest.mark.parametrize("approves", [True, False])
def test_a_handler_decides_before_the_task(
    platform: Any, under: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, approves: bool
) -> None:
    """On a platform without approvals."""
    off = "sekuire.wire.verdict.Support.is_offered"
    monkeypatch.setattr(off, lambda self, endpoint: endpoint != "approvals")
    under(ASK_FOR_PAY, {"pay": paid}, approval_handler=lambda request: approves and request.kind == "capability")
    task = platform.wait(platform.submit("pay", {}, AGENT), GUARD)
    assert task.get("output") == ("paid" if approves else None)


@pytest.mark.slow
def test_a_thousand_waiting_tasks(
    make_platform: Callable[..., Any], under: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They hold no thread; what is beyond the limit is released, and comes when there is room. None is lost."""
    monkeypatch.setattr(gates_module, "RELEASE_PAUSE", 0.05)
    platform = make_platform(redelivery_delay=0.2)
    worker, _ = under(ASK_FOR_PAY, {"pay": paid, "other": paid}, at=platform, max_workers=2, max_queued=1100)
    ids = [platform.submit("pay", {"n": n}, AGENT) for n in range(1020)]
    until(lambda: len(platform.approvals("pending")) >= 1000)
    until(lambda: worker.stats().released > 0)
    assert len(worker._dispatcher.records.asking) <= 1000
    assert len([one for one in threading.enumerate() if one.name.startswith("sekuire-task")]) <= 4
    assert len([one for one in threading.enumerate() if one.name.startswith("sekuire-approval")]) <= 4
    assert platform.wait(platform.submit("other", {}, AGENT), GUARD)["output"] == "paid"
    done: set[str] = set()

    def decide_all() -> bool:
        for asked in platform.approvals("pending"):
            platform.decide(asked["approval_id"], "approved")
            done.add(asked["task_id"])
        return len(done) == len(ids)

    assert platform.approvals("pending")
    decide_all()
    # What a stream has released comes again on another.
    platform.drop_streams()
    until(decide_all, pause=0.1)
    wait_idle(worker, GUARD, platform=platform)
    assert {platform.task(task_id)["output"] for task_id in ids} == {"paid"}


# -- handlers in other processes --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_in_another_process(platform: Any, worker_of: Make, under: Callable[..., Any]) -> None:
    """A RemoteTaskContext asks through the worker's process: thread or loop, action or tool; cancels reach it."""
    with ProcessExecutor(2) as executor:
        handlers = {
            "ask": elsewhere.ask_for_approval,
            "ask_async": elsewhere.ask_for_approvals,
            "tool": elsewhere.ask_for_tools,
        }
        worker, _ = under(ASK_FOR_TOOLS, handlers, executor=executor, max_workers=2)
        task_id = platform.submit("ask", {"amount": 1}, AGENT)
        asked = decide(platform, task_id, "approved")
        assert asked["details"] == {"amount": 1}
        assert platform.wait(task_id, GUARD)["output"] == ["approved", "ada", "RemoteTaskContext"]
        task_id = platform.submit("ask", {"amount": 1}, AGENT)
        decide(platform, task_id, "denied", "no")
        assert error_of(platform, task_id)["message"] == "action 'pay' was denied by ada: no"
        task_id = platform.submit("ask_async", None, AGENT)
        for _ in range(2):
            decide(platform, task_id, "approved")
        assert platform.wait(task_id, GUARD)["output"] == ["approved", "approved"]
        task_id = platform.submit("tool", None, AGENT, tool="search")
        for _ in range(2):
            assert decide(platform, task_id, "approved")["subject"] == {"kind": "tool", "name": "search"}
        assert platform.wait(task_id, GUARD)["output"] == "used"
        task_id = platform.submit("ask", {"amount": 2}, AGENT)
        asked_of(platform, task_id)
        with SekuireClient(api_base_url=platform.url, api_key=platform.api_key) as client:
            client.cancel(task_id)
        assert error_of(platform, task_id)["code"] == "cancelled"
        task_id = platform.submit("ask", {"amount": 3}, AGENT)
        asked_of(platform, task_id)
        worker.stop()
        assert error_of(platform, task_id)["code"] == "worker_shutdown"


@pytest.mark.slow
def test_in_a_pool_that_cannot_ask(platform: Any, worker_of: Make) -> None:
    """A ProcessPoolExecutor has no way back to the worker: denied."""
    import concurrent.futures
    import multiprocessing

    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        started(worker_of(platform, executor=pool, max_workers=1), ask=elsewhere.ask_for_approval)
        error = error_of(platform, platform.submit("ask", {"amount": 1}, AGENT))
        assert error["code"] == "approval_denied"
        assert "use ProcessExecutor" in error["message"]
        assert platform.approvals() == []


# -- killed -----------------------------------------------------------------------------------------------------------

_WORKER = """
    import sys
    from sekuire import create_worker

    worker = create_worker(agent_id="AGENT", api_base_url=sys.argv[1], install_token=sys.argv[2], reconnect_min=0.01)

    @worker.on_task("pay")
    def pay(ctx, input):
        return [ctx.require_approval("pay", input).decided_by, ctx.attempt]

    worker.start(block=True)
"""
_PLATFORM = """
    import sys
    from sekuire.local import LocalPlatform

    with LocalPlatform(sys.argv[1], port=int(sys.argv[2]), redelivery_delay=0.2) as platform:
        print(platform.url, platform.api_key, flush=True)
        sys.stdin.read()
"""


def program(source: str, *arguments: Any) -> subprocess.Popen[str]:
    text = textwrap.dedent(source).replace("AGENT", AGENT)
    command = [sys.executable, "-c", text, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def kill(process: subprocess.Popen[str]) -> None:
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=GUARD)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_killed_worker(make_platform: Callable[..., Any], when: str) -> None:
    """Its successor finds the request, and the decision if there is one, and nobody is asked twice."""
    platform = make_platform(redelivery_delay=0.2)
    workers: List[subprocess.Popen[str]] = []

    def start() -> None:
        workers.append(program(_WORKER, platform.url, platform.create_install_token(AGENT)))

    try:
        start()
        task_id = platform.submit("pay", {"amount": 5}, AGENT)
        asked = asked_of(platform, task_id)
        kill(workers[0])
        if when == "before":
            platform.decide(asked["approval_id"], "approved", decided_by="ada")
        start()
        if when == "after":
            until(lambda: platform.task(task_id)["attempt"] == 2)
            platform.decide(asked["approval_id"], "approved", decided_by="ada")
        assert platform.wait(task_id, GUARD)["output"] == ["ada", 2]
        assert len(platform.approvals()) == 1
    finally:
        for one in workers:
            one.kill()
            one.communicate(timeout=GUARD)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_a_killed_platform(worker_of: Make, tmp_path: Path) -> None:
    """The handler waits through the outage, and gets the decision that is made after it."""
    path = tmp_path / "platform.db"
    process = program(_PLATFORM, path, 0)
    try:
        assert process.stdout is not None
        url, key = process.stdout.readline().split()
        with SekuireClient(api_base_url=url, api_key=key, agent_id=AGENT) as client:
            started(worker_of(url, install_token=client.create_install_token(AGENT)), pay=pay)
            handle = client.submit("pay", {"amount": 5})
            headers = {"X-API-Key": key}

            def pending() -> Any:
                found = requests.get(f"{url}/api/v1/approvals?status=pending", headers=headers, timeout=GUARD)
                return found.json()["approvals"]

            asked = until(pending)[0]
            kill(process)
            time.sleep(0.1)
            process = program(_PLATFORM, path, url.rpartition(":")[2])
            assert process.stdout is not None
            assert process.stdout.readline().split() == [url, key]
            assert until(pending)[0]["approval_id"] == asked["approval_id"]
            answer = requests.post(
                f"{url}/api/v1/approvals/{asked['approval_id']}/decision", headers=headers,
                json={"decision": "approved", "decided_by": "ada"}, timeout=GUARD,
            )  # fmt: skip
            assert answer.status_code == 200
            assert handle.result(GUARD) == ["approved", "ada", None]
    finally:
        process.kill()
        process.communicate(timeout=GUARD)


# -- audit ------------------------------------------------------------------------------------------------------------


def test_audit_events(platform: Any) -> None:
    """Each request and each decision is one, with who decided; and the worker says both in its log."""
    with SekuireSDK(AGENT, api_base_url=platform.url, install_token=platform.create_install_token(AGENT)) as sdk:
        started(sdk.create_task_worker(), pay=pay)
        for decision in ("approved", "denied"):
            task_id = platform.submit("pay", {"amount": 5}, AGENT)
            asked = decide(platform, task_id, decision, "because")
            platform.wait(task_id, GUARD)
        assert sdk.audit.flush(GUARD)
        data = [one["event_data"] for one in platform.logs() if one["event_data"].get("kind") == "approval"]
    assert [one["status"] for one in data] == ["requested", "approved", "requested", "denied"]
    last = data[-1]
    assert last["approval_id"] == asked["approval_id"]
    assert (last["target"], last["task_id"], last["allowed"]) == ("pay", task_id, False)
    assert (last["decided_by"], last["reason"]) == ("ada", "because")


def test_polls_are_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand waiting workers do not ask in the same moment."""
    monkeypatch.setattr(questions_module, "POLL", 5.0)
    delays = {questions_module._poll_delay() for _ in range(100)}
    assert len(delays) > 50
    assert all(4.0 <= delay <= 6.0 for delay in delays)
