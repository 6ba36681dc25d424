"""Approvals on the local platform: from Python, over a kill, with faults, and in an old database."""

from __future__ import annotations

import sqlite3
import threading
from pathlib import Path
from typing import Any, Callable, Dict

import pytest

from sekuire.errors import APIError, ConfigurationError
from sekuire.local import LocalPlatform
from sekuire.wire import protocol

from ..contract.client import Answer, Client, Installation
from ..support.waiting import GUARD, until
from .conftest import client_of
from .test_restart import Process, run  # noqa: F401

Make = Callable[..., LocalPlatform]


def question(task_id: str, name: str = "pay", details: Any = None, n: int = 1, **fields: Any) -> Dict[str, Any]:
    digest = protocol.approval_digest(task_id, "action", name, details)
    return {
        "approval_id": protocol.approval_id(task_id, digest, n), "attempt": 1, "worker_id": "w1",
        "subject": {"kind": "action", "name": name}, "details": details, "digest": digest, "timeout_ms": 600_000,
        **fields,
    }  # fmt: skip


def ask(installation: Installation, task_id: str, **fields: Any) -> str:
    body = question(task_id, **fields)
    answer = installation.call("POST", f"/tasks/{task_id}/approvals", body)
    assert answer.status in (200, 201), answer
    return str(body["approval_id"])


def state(installation: Installation, task_id: str, approval_id: str) -> str:
    return str(installation.call("GET", f"/tasks/{task_id}/approvals/{approval_id}").body["status"])


def decide(client: Client, approval_id: str, decision: str = "approved") -> Answer:
    return client.admin("POST", f"/approvals/{approval_id}/decision", {"decision": decision})


def test_approvals_from_python(platform: LocalPlatform, installation: Installation) -> None:
    """A test waits for a request, decides it as a person does, and sees who was recorded."""
    with installation.stream() as stream:
        task_id = installation.submit()
        stream.next("task")
        approval_id = ask(installation, task_id, details={"amount": 5})
        found = platform.wait_for_approval(GUARD, task_id=task_id)
        assert (found["approval_id"], found["subject"]["name"], found["details"]) == (approval_id, "pay", {"amount": 5})
        assert [one["approval_id"] for one in platform.approvals("pending")] == [approval_id]
        decided = platform.decide(approval_id, "approved", "fine", decided_by="ada")
        assert (decided["status"], decided["decided_by"], decided["credential"]) == ("approved", "ada", "local")
        assert stream.next("approval")["status"] == "approved"
        assert platform.approvals("pending") == []
        with pytest.raises(APIError) as caught:
            platform.decide(approval_id, "denied")
        assert (caught.value.status, caught.value.code) == (409, "ALREADY_DECIDED")
        # Over HTTP the key is what is recorded, whatever the body claims.
        second = ask(installation, task_id, name="two")
        assert decide(client_of(platform), second).status == 200
        assert {one["approval_id"]: one["credential"] for one in platform.approvals()} == {
            approval_id: "local", second: "api_key",
        }  # fmt: skip


def test_waiting_for_a_request(platform: LocalPlatform, installation: Installation) -> None:
    """The wait ends with the request that comes, and in time without one. A request of another task is none."""
    with pytest.raises(TimeoutError, match=r"asked for an approval in 0\.01 s"):
        platform.wait_for_approval(0.01)
    with installation.stream() as stream:
        task_id, other = installation.submit(), installation.submit()
        stream.next("task")
        stream.next("task")
        found = []
        thread = threading.Thread(target=lambda: found.append(platform.wait_for_approval(GUARD, task_id=task_id)))
        thread.start()
        ask(installation, other)
        approval_id = ask(installation, task_id)
        thread.join(GUARD)
        assert [one["approval_id"] for one in found] == [approval_id]
        assert platform.wait_for_approval(0)["task_id"] == other


def test_wrong_arguments(platform: LocalPlatform) -> None:
    """An unknown status, decision or request says what is known."""
    with pytest.raises(ConfigurationError, match="status: must be one of pending, approved, denied, expired"):
        platform.approvals("open")
    with pytest.raises(ConfigurationError, match="decision: must be one of approved, denied"):
        platform.decide("x", "yes")
    with pytest.raises(ConfigurationError, match="reason: must be a str, got int"):
        platform.decide("x", "approved", 5)  # type: ignore[arg-type]
    with pytest.raises(APIError, match="no request for approval 'x'"):
        platform.decide("x", "approved")


def test_more_requests_than_a_page_has(platform: LocalPlatform, installation: Installation) -> None:
    """All are returned, newest first."""
    with installation.stream() as stream:
        task_id = installation.submit()
        stream.next("task")
        ids = [ask(installation, task_id, n=n + 1) for n in range(103)]
        assert [one["approval_id"] for one in platform.approvals()] == ids[::-1]


def test_a_lost_event(platform: LocalPlatform, installation: Installation) -> None:
    """A decision that the stream has lost is there when the worker asks."""
    platform.hold_commands = True
    with installation.stream() as stream:
        task_id = installation.submit()
        stream.next("task")
        approval_id = ask(installation, task_id)
        platform.decide(approval_id, "denied")
        assert state(installation, task_id, approval_id) == "denied"
        platform.hold_commands = False
        platform.decide(ask(installation, task_id, n=2), "approved")
        assert stream.next("approval")["status"] == "approved"


def test_faults_of_the_endpoints(make: Make) -> None:
    """A decision whose answer was lost has been recorded, and the same call again gets its answer."""
    platform = make()
    installation = client_of(platform).install()
    with installation.stream() as stream:
        task_id = installation.submit()
        stream.next("task")
        platform.faults.add("error:503,on=approvals,times=1")
        body = question(task_id)
        assert installation.call("POST", f"/tasks/{task_id}/approvals", body).status == 503
        assert platform.approvals() == []
        approval_id = ask(installation, task_id)
        platform.faults.add("reset:on=decision,when=after,times=1")
        client = client_of(platform)
        headers = {"X-API-Key": client.api_key, "Idempotency-Key": "k"}
        path = f"/approvals/{approval_id}/decision"
        with pytest.raises(OSError):  # A reset, in one of its forms.
            client.call("POST", path, {"decision": "approved"}, headers)
        assert client.call("POST", path, {"decision": "approved"}, headers).status == 200
        assert client.call("POST", path, {"decision": "approved"}, {**headers, "Idempotency-Key": "l"}).status == 409


@pytest.mark.slow
def test_requests_and_decisions_survive_a_kill(run: Callable[..., Process], tmp_path: Path) -> None:  # noqa: F811
    """After SIGKILL and a restart an open request can be decided, a decided one stays so, and time goes on."""
    path = tmp_path / "platform.db"
    first = run(path)
    installation = first.client.install()
    with installation.stream() as stream:
        task_id = installation.submit()
        stream.next("task")
        waiting, decided = ask(installation, task_id), ask(installation, task_id, n=2)
        short = ask(installation, task_id, name="short", timeout_ms=50)
        assert decide(first.client, decided, "denied").status == 200
        first.kill()
    second = run(path, first.port)
    with installation.stream() as stream:
        assert stream.next("task")["task_id"] == task_id
        until(lambda: state(installation, task_id, short) == "expired")
        assert decide(second.client, short).status == 410
        assert (state(installation, task_id, decided), state(installation, task_id, waiting)) == ("denied", "pending")
        # The worker asks for the same again after its own restart, and gets its decision.
        assert ask(installation, task_id) == waiting
        assert decide(second.client, waiting).status == 200
        events = iter(lambda: stream.next("approval"), None)
        assert next(event["status"] for event in events if event["approval_id"] == waiting) == "approved"


def test_a_request_expires_over_a_restart(make: Make, tmp_path: Path) -> None:
    """The time of a request goes on while the platform is stopped; what remains of it counts after the start."""
    path = tmp_path / "platform.db"
    platform = make(path=path)
    installation = client_of(platform).install()
    with installation.stream() as stream:
        task_id = installation.submit()
        stream.next("task")
        approval_id = ask(installation, task_id, timeout_ms=300)
        platform.stop()
    platform.start()
    until(lambda: any(one.kind == "decision" for one in platform.happenings_after(0)))
    assert [one["status"] for one in platform.approvals()] == ["expired"]
    with pytest.raises(APIError, match="it expired at"):
        platform.decide(approval_id, "approved")


def test_a_database_of_before_approvals(tmp_path: Path) -> None:
    """A file that an earlier version has made gets the table."""
    path = tmp_path / "earlier.db"
    with LocalPlatform(path):
        pass
    db = sqlite3.connect(path)
    db.execute("DROP TRIGGER approvals_of_ended_task")
    db.execute("DROP TABLE approvals")
    db.commit()
    db.close()
    with LocalPlatform(path) as platform:
        installation = client_of(platform).install()
        with installation.stream() as stream:
            task_id = installation.submit()
            stream.next("task")
            ask(installation, task_id)
            assert installation.complete(task_id, output=1).status == 200
            (found,) = platform.approvals()
            assert (found["status"], found["reason"]) == ("expired", "the task has ended")
