"""Approvals: a worker asks, a person decides once, and nothing but that decision counts."""

from __future__ import annotations

import hashlib
import json
import secrets
import threading
import time
from typing import Any, Dict, Iterator, List, NamedTuple, Optional

import pytest

from ..support.waiting import GUARD
from .client import Answer, Client, Installation, Stream

#: Milliseconds that a request lasts which must not expire within its test.
LONG = 600_000


class Given(NamedTuple):
    """A task on its way to the worker ``w1``, whose stream stays open."""

    installation: Installation
    stream: Stream
    task_id: str

    def question(self, name: str = "pay", details: Any = None, n: int = 1, **fields: Any) -> Dict[str, Any]:
        """The body of a request: keys in order and plain numbers are canonical as the standard library writes them."""
        kind = fields.pop("kind", "action")
        asked = {
            "details": details, "policy_hash": fields.get("policy_hash"), "subject": {"kind": kind, "name": name},
            "task_id": self.task_id,
        }  # fmt: skip
        form = json.dumps(asked, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        digest = hashlib.sha256(form.encode()).hexdigest()
        return {
            "approval_id": hashlib.sha256(f"{self.task_id}:{digest}:{n}".encode()).hexdigest(),
            "attempt": 1,
            "worker_id": "w1",
            "subject": {"kind": kind, "name": name},
            "details": details,
            "digest": digest,
            "timeout_ms": LONG,
            **fields,
        }

    def send(self, question: Dict[str, Any], installation: Optional[Installation] = None) -> Answer:
        return (installation or self.installation).call("POST", f"/tasks/{self.task_id}/approvals", question)

    def ask(self, name: str = "pay", details: Any = None, n: int = 1, **fields: Any) -> str:
        answer = self.send(self.question(name, details, n, **fields))
        assert answer.status == 201, answer
        approval_id: str = answer.body["approval_id"]
        return approval_id

    def state(self, approval_id: str) -> Dict[str, Any]:
        answer = self.installation.call("GET", f"/tasks/{self.task_id}/approvals/{approval_id}")
        assert answer.status == 200, answer
        state: Dict[str, Any] = answer.body
        return state

    def decide(self, approval_id: str, decision: str = "approved", **fields: Any) -> Answer:
        return decide(self.installation.client, approval_id, decision, **fields)


def decide(client: Client, approval_id: str, decision: str = "approved", key: str = "", **fields: Any) -> Answer:
    headers = {"X-API-Key": client.api_key, "Idempotency-Key": key or secrets.token_hex(16)}
    return client.call("POST", f"/approvals/{approval_id}/decision", {"decision": decision, **fields}, headers)


@pytest.fixture
def given(installation: Installation) -> Iterator[Given]:
    with installation.stream() as stream:
        task_id = installation.submit()
        stream.next("task")
        yield Given(installation, stream, task_id)


def test_a_request_waits(given: Given) -> None:
    """A new request is pending and says until when; the same again is the same."""
    question = given.question(details={"amount": 5})
    first, second = given.send(question), given.send(question)
    assert (first.status, first.body["status"]) == (201, "pending")
    assert first.body["approval_id"] == question["approval_id"]
    assert (second.status, second.body["status"]) == (200, "pending")
    assert second.body["expires_at"] == first.body["expires_at"]
    state = given.state(question["approval_id"])
    assert (state["status"], state["digest"]) == ("pending", question["digest"])


@pytest.mark.parametrize("decision", ["approved", "denied"])
def test_a_decision(given: Given, decision: str) -> None:
    """The worker hears of it on its stream, and when it asks; it says who has decided and why."""
    question = given.question()
    approval_id = given.send(question).body["approval_id"]
    answer = given.decide(approval_id, decision, reason="because", decided_by="ada")
    assert (answer.status, answer.body["status"]) == (200, decision)
    event = given.stream.next("approval")
    expected = {"status": decision, "decided_by": "ada", "reason": "because", "digest": question["digest"]}
    for found in (event, given.state(approval_id), given.send(question).body):
        assert {name: found[name] for name in expected} == expected
    assert (event["approval_id"], event["task_id"]) == (approval_id, given.task_id)


def test_the_first_decision_wins(given: Given) -> None:
    """A second decision is 409, whatever it says, and changes nothing."""
    approval_id = given.ask()
    assert given.decide(approval_id, "denied", reason="no").status == 200
    for decision in ("approved", "denied"):
        assert given.decide(approval_id, decision, reason="late").status == 409
    assert (given.state(approval_id)["status"], given.state(approval_id)["reason"]) == ("denied", "no")


def test_a_decision_that_is_sent_again(given: Given) -> None:
    """Whoever lost the answer sends the same again, with the same key, and gets it."""
    approval_id = given.ask()
    for _ in range(2):
        answer = given.decide(approval_id, key="once-" + approval_id)
        assert (answer.status, answer.body["status"]) == (200, "approved")
    assert given.decide(approval_id).status == 409


def test_two_people_at_once(given: Given) -> None:
    """Of several who decide at the same moment one succeeds, and what the worker gets is that one's decision."""
    approval_id = given.ask()
    start = threading.Barrier(6)
    answers: List[Answer] = []

    def person(number: int) -> None:
        start.wait()
        answers.append(given.decide(approval_id, "denied" if number % 2 else "approved", decided_by=str(number)))

    threads = [threading.Thread(target=person, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answer.status for answer in answers) == [200, *[409] * 5]
    (won,) = (answer.body for answer in answers if answer.status == 200)
    event = given.stream.next("approval")
    assert (event["status"], event["decided_by"]) == (won["status"], won["decided_by"])
    assert given.state(approval_id)["decided_by"] == won["decided_by"]


def test_two_equal_actions_need_two_decisions(given: Given) -> None:
    """The second request for the same has a number, and so an id, of its own."""
    first, second = given.ask(), given.ask(n=2)
    assert given.decide(first).status == 200
    assert (given.state(first)["status"], given.state(second)["status"]) == ("approved", "pending")


def test_who_may_decide(given: Given) -> None:
    """Neither an agent's own token nor nobody decides or lists; the request stays open."""
    approval_id = given.ask()
    path = f"/approvals/{approval_id}/decision"
    assert given.installation.call("POST", path, {"decision": "approved"}).status == 403
    assert given.installation.call("GET", "/approvals").status == 403
    client = given.installation.client
    assert client.call("POST", path, {"decision": "approved"}).status == 401
    assert client.call("GET", "/approvals").status == 401
    assert client.call("POST", path, {"decision": "approved"}, {"X-API-Key": "sk_live_wrong"}).status == 401
    # What a body claims proves nothing.
    fields = {"decision": "approved", "decided_by": "admin"}
    assert given.installation.call("POST", path, fields).status == 403
    assert given.state(approval_id)["status"] == "pending"


def test_who_may_ask(client: Client, given: Given) -> None:
    """Only the installation that has the task asks, and reads what it has asked."""
    other = client.install(given.installation.agent_id)
    question = given.question()
    assert given.send(question, other).status == 403
    approval_id = given.ask()
    assert other.call("GET", f"/tasks/{given.task_id}/approvals/{approval_id}").status == 403
    assert client.call("POST", f"/tasks/{given.task_id}/approvals", question).status == 401
    assert client.admin("POST", f"/tasks/{given.task_id}/approvals", question).status == 401


def test_what_is_unknown(given: Given) -> None:
    """An unknown task or request is 404. A text that means something elsewhere means nothing here."""
    answer = given.installation.call("POST", "/tasks/task_unknown/approvals", given.question())
    assert (answer.status, answer.code) == (404, "TASK_NOT_FOUND")
    for name in ("unknown", "x'%20OR%201=1--", "%3Cb%3E", "a%2Fb", "0" * 64):
        assert given.decide(name).status == 404
        assert given.installation.call("GET", f"/tasks/{given.task_id}/approvals/{name}").status == 404


def test_a_digest_of_something_else(given: Given) -> None:
    """The platform computes digest and id itself: nobody can be shown one thing and approve another."""
    question = given.question(details={"amount": 5})
    assert given.send({**question, "details": {"amount": 5000}}).status == 422
    assert given.send({**question, "subject": {"kind": "tool", "name": "pay"}}).status == 422
    assert given.send({**question, "policy_hash": "another"}).status == 422
    assert given.send({**question, "digest": "0" * 64}).status == 422
    assert given.send({**question, "approval_id": "0" * 64}).status == 422
    assert given.send(question).status == 201
    # A known id with another digest, which would be right for what it says.
    other = given.question(details={"amount": 6})
    assert given.send({**other, "approval_id": question["approval_id"]}).status == 409
    assert given.state(question["approval_id"])["digest"] == question["digest"]


NASTY = {
    "a": "<script>alert(1)</script>",
    "b": "'; DROP TABLE approvals; --",
    "c": "\u001b[2J\u202e",
    "d": ["\u20ac", None],
}


def test_details_are_kept_as_they_are(given: Given) -> None:
    """What was asked is shown as it was asked, whatever it holds."""
    approval_id = given.ask("'; DROP TABLE tasks; --", NASTY, kind="tool", policy_hash="h" * 64)
    answer = given.installation.client.admin("GET", "/approvals?status=pending&limit=1")
    (found,) = answer.body["approvals"]
    assert found["approval_id"] == approval_id
    assert found["subject"] == {"kind": "tool", "name": "'; DROP TABLE tasks; --"}
    assert (found["details"], found["task_id"], found["policy_hash"]) == (NASTY, given.task_id, "h" * 64)


def test_details_that_no_request_can_have(given: Given) -> None:
    """64 KiB are the most, and a number that readers understand differently is refused."""
    given.ask(details="x" * (64 * 1024 - 2))
    assert given.send(given.question(details="x" * (64 * 1024 - 1))).status == 422
    assert given.send(given.question(details={"n": 2**53})).status == 422


@pytest.mark.parametrize(
    "fields",
    [
        {"approval_id": None}, {"approval_id": 7}, {"attempt": None}, {"attempt": 0}, {"attempt": 2}, {"attempt": "1"},
        {"worker_id": None}, {"subject": None}, {"subject": "pay"}, {"subject": {"kind": "all", "name": "pay"}},
        {"subject": {"kind": "tool", "name": ""}}, {"subject": {"kind": "action", "name": "x" * 4097}},
        {"subject": {"kind": ["tool"], "name": "x"}}, {"digest": None}, {"digest": 1}, {"timeout_ms": 0},
        {"timeout_ms": -1}, {"timeout_ms": None}, {"timeout_ms": "1"}, {"timeout_ms": 31 * 86_400_000},
        {"policy_hash": 1},
    ],
    ids=lambda fields: str(fields)[:60],
)  # fmt: skip
def test_malformed_requests(given: Given, fields: Dict[str, Any]) -> None:
    """A wrong or missing field is 400."""
    assert given.send({**given.question(), **fields}).status == 400


@pytest.mark.parametrize(
    "body",
    [{}, {"decision": "yes"}, {"decision": True}, {"decision": "pending"}, {"decision": "approved", "reason": 1}],
)
def test_malformed_decisions(given: Given, body: Dict[str, Any]) -> None:
    """A decision that is none is 400, and the request stays open."""
    approval_id = given.ask()
    assert given.installation.client.admin("POST", f"/approvals/{approval_id}/decision", body).status == 400
    assert given.state(approval_id)["status"] == "pending"


def test_nobody_answers(given: Given) -> None:
    """After its time a request is expired, nobody can decide it, and the next number can be asked for."""
    approval_id = given.ask(timeout_ms=50)
    event = given.stream.next("approval")
    assert (event["approval_id"], event["status"]) == (approval_id, "expired")
    assert given.state(approval_id)["status"] == "expired"
    assert given.decide(approval_id).status == 410
    assert given.send(given.question()).body["status"] == "expired"
    assert given.ask(n=2) != approval_id


def test_the_end_of_a_task_ends_its_requests(given: Given) -> None:
    """Whatever its result, nobody can decide then, and nothing can be asked."""
    pending, decided = given.ask("one"), given.ask("two")
    given.decide(decided)
    error = {"code": "timeout", "message": "", "retryable": False}
    assert given.installation.complete(given.task_id, status="failed", error=error).status == 200
    assert given.decide(pending).status == 410
    assert (given.state(pending)["status"], given.state(decided)["status"]) == ("expired", "approved")
    assert given.send(given.question("three")).status == 409


def test_a_cancelled_task_ends_its_requests(client: Client, given: Given) -> None:
    """A task that ends because its worker never reports it has no open request either."""
    approval_id = given.ask()
    assert client.admin("POST", f"/tasks/{given.task_id}/cancel").status == 200
    given.stream.close()
    deadline = time.monotonic() + GUARD
    while client.task(given.task_id)["status"] != "failed":
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert given.decide(approval_id).status == 410


def test_another_attempt_finds_the_decision(client: Client, given: Given) -> None:
    """The attempt that lost the task cannot ask, the new one finds what was asked, and gets the decision."""
    question = given.question()
    approval_id = given.ask()
    other = client.install(given.installation.agent_id)
    given.stream.close()
    with other.stream("w2") as stream:
        assert stream.next("task")["attempt"] == 2
        assert given.send(question).status == 409
        again = given.send({**question, "attempt": 2, "worker_id": "w2"}, other)
        assert (again.status, again.body["status"]) == (200, "pending")
        assert given.decide(approval_id).status == 200
        assert stream.next("approval")["status"] == "approved"


def test_a_retried_task_finds_the_decision(given: Given) -> None:
    """A request outlives a failure that is tried again: the next attempt asks for the same and gets the decision."""
    task_id = given.installation.submit(max_attempts=2)
    retried = given._replace(task_id=task_id)
    given.stream.next("task")
    approval_id = retried.ask()
    error = {"code": "worker_shutdown", "message": "", "retryable": True}
    assert given.installation.complete(task_id, status="failed", error=error).status == 200
    assert retried.decide(approval_id).status == 200
    assert given.stream.next("task")["attempt"] == 2
    answer = retried.send({**retried.question(), "attempt": 2})
    assert (answer.status, answer.body["status"]) == (200, "approved")
    assert retried.send(retried.question()).status == 409


def test_pages(given: Given) -> None:
    """Requests are listed newest first, by status, page by page."""
    ids = [given.ask(str(number)) for number in range(5)]
    given.decide(ids[1], "denied")
    client = given.installation.client
    first = client.admin("GET", "/approvals?limit=2").body
    assert [one["approval_id"] for one in first["approvals"]] == [ids[4], ids[3]]
    second = client.admin("GET", f"/approvals?limit=2&status=pending&before={first['next_before']}").body
    assert [one["approval_id"] for one in second["approvals"]] == [ids[2], ids[0]]
    (denied,) = client.admin("GET", "/approvals?status=denied&limit=1").body["approvals"]
    assert denied["approval_id"] == ids[1]
    assert denied["decided_at"]
    for query in ("status=open", "limit=0", "limit=x", "before=unknown"):
        assert client.admin("GET", f"/approvals?{query}").status == 400
