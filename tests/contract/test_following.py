"""What somebody who submits tasks asks for: states, waits, lists, cancels, retries, delays and expiry."""

from __future__ import annotations

import secrets
import threading
import time
from typing import Any, Dict, List

import pytest

from ..support.waiting import until
from .client import Client, Installation

# -- waiting ----------------------------------------------------------------------------------------------------------


def test_a_question_waits_for_the_end(installation: Installation) -> None:
    """``wait_ms`` is answered when the task ends, with the task as it is then."""
    client = installation.client
    answers: List[Dict[str, Any]] = []
    with installation.stream() as stream:
        task_id = installation.submit()
        stream.next("task")
        thread = threading.Thread(target=lambda: answers.append(client.admin("GET", wait_for(task_id)).body))
        thread.start()
        # A moment in which it could answer too soon.
        time.sleep(0.2)
        assert answers == []
        installation.complete(task_id, output="done")
        thread.join()
    assert (answers[0]["status"], answers[0]["output"]) == ("completed", "done")


def test_a_question_ends_with_its_time(installation: Installation) -> None:
    """When the time is up, the answer is the task as it is."""
    began = time.monotonic()
    answer = installation.client.admin("GET", wait_for(installation.submit(), 300))
    assert answer.body["status"] == "queued"
    assert time.monotonic() - began >= 0.3


def test_a_question_for_a_task_that_has_ended(installation: Installation) -> None:
    """It is answered at once."""
    task_id = ended(installation)
    assert installation.client.admin("GET", wait_for(task_id)).body["status"] == "completed"


@pytest.mark.parametrize("value", ["-1", "1.5", "soon", ""])
def test_a_wrong_wait(installation: Installation, value: str) -> None:
    """It is refused, and the field is named."""
    answer = installation.client.admin("GET", f"/tasks/{installation.submit()}?wait_ms={value}")
    assert answer.status == 400
    assert "wait_ms" in answer.body["message"]


def wait_for(task_id: str, milliseconds: int = 10**9) -> str:
    return f"/tasks/{task_id}?wait_ms={milliseconds}"


def ended(installation: Installation, **fields: Any) -> str:
    with installation.stream() as stream:
        task_id = installation.submit(**fields)
        stream.next("task")
        assert installation.complete(task_id, output={"n": 1}).status == 200
    return task_id


# -- lists ------------------------------------------------------------------------------------------------------------


def test_several_tasks_at_once(installation: Installation) -> None:
    """``ids`` returns their states in its order, without input and output. Unknown ones are left out."""
    first, second = ended(installation), installation.submit()
    answer = installation.client.admin("GET", f"/tasks?ids={second},task_unknown,{first}")
    tasks = answer.body["tasks"]
    assert [task["task_id"] for task in tasks] == [second, first]
    # The platform may not have noticed yet that the stream of the first one was closed.
    assert tasks[0]["status"] in ("queued", "assigned")
    assert tasks[1]["status"] == "completed"
    assert not any({"input", "output"} & set(task) for task in tasks)
    assert installation.client.admin("GET", "/tasks?ids=" + ",".join(["t"] * 101)).status == 400


def test_filters_and_pages(client: Client) -> None:
    """A list is newest first, by agent, capability and state, in pages that lead to each other."""
    installation = client.install()
    ids = [installation.submit(name) for name in ("a", "b", "a", "a")]
    mine = f"agent_id={installation.agent_id}"

    def listed(query: str) -> Any:
        return client.admin("GET", f"/tasks?{mine}&{query}").body

    assert [task["task_id"] for task in listed("capability=a")["tasks"]] == [ids[3], ids[2], ids[0]]
    assert listed("status=completed")["tasks"] == []
    page = listed("limit=3")
    assert [task["task_id"] for task in page["tasks"]] == ids[:0:-1]
    last = listed(f"limit=3&before={page['next_before']}")
    assert [task["task_id"] for task in last["tasks"]] == ids[:1]
    assert last["next_before"] is None
    assert "input" not in last["tasks"][0]


def test_the_timeline(installation: Installation) -> None:
    """A task tells what happened to it: each state with its time and attempt, and the worker."""
    with installation.stream() as stream:
        task_id = installation.submit(max_attempts=2)
        stream.next("task")
        installation.release(task_id)
    with installation.stream("w2") as stream:
        stream.next("task")
        installation.complete(task_id, attempt=2)
    timeline = installation.client.task(task_id)["timeline"]
    facts = [(entry["state"], entry["attempt"], entry.get("worker_id")) for entry in timeline]
    assert facts == [
        ("queued", 0, None),
        ("assigned", 1, "w1"),
        ("queued", 1, None),
        ("assigned", 2, "w2"),
        ("completed", 2, "w2"),
    ]
    assert sorted(entry["at"] for entry in timeline) == [entry["at"] for entry in timeline]


# -- delay and expiry -------------------------------------------------------------------------------------------------


def test_a_delayed_task(installation: Installation) -> None:
    """It is queued with the time at which it may begin, and no worker gets it before."""
    with installation.stream() as stream:
        before = time.time()
        task_id = installation.submit(delay_ms=400)
        task = installation.client.task(task_id)
        assert (task["status"], task["available_at"] > task["created_at"]) == ("queued", True)
        assert stream.next("task")["task_id"] == task_id
        assert time.time() - before >= 0.4


def test_a_task_that_expires(installation: Installation) -> None:
    """One that has not begun in its time fails with the code ``expired``, and no worker gets it."""
    task_id = installation.submit(expires_in_ms=50)
    task = installation.client.admin("GET", wait_for(task_id)).body
    assert (task["status"], task["error"]["code"], task["error"]["retryable"]) == ("failed", "expired", False)
    with installation.stream() as stream:
        other = installation.submit()
        assert stream.next("task")["task_id"] == other


def test_a_task_that_has_begun_does_not_expire(installation: Installation) -> None:
    with installation.stream() as stream:
        task_id = installation.submit(expires_in_ms=50)
        stream.next("task")
        time.sleep(0.2)
        assert installation.complete(task_id).status == 200


def test_a_task_released_after_its_time(installation: Installation) -> None:
    """It expires then."""
    with installation.stream() as stream:
        task_id = installation.submit(expires_in_ms=50)
        stream.next("task")
        time.sleep(0.2)
        installation.release(task_id)
        assert installation.client.task(task_id)["error"]["code"] == "expired"


@pytest.mark.parametrize(
    ("field", "value"), [("delay_ms", -1), ("delay_ms", 10**10), ("expires_in_ms", 0), ("expires_in_ms", "soon")]
)
def test_wrong_times(installation: Installation, field: str, value: Any) -> None:
    """They are refused, and the field is named."""
    body = {"agent_id": installation.agent_id, "capability": "work", "input": {}, field: value}
    answer = installation.client.admin("POST", "/tasks", body)
    assert answer.status == 400
    assert field in answer.body["message"]


# -- retries ----------------------------------------------------------------------------------------------------------


def test_a_failed_task_is_tried_again(installation: Installation) -> None:
    """It is queued again under the next attempt, and the same key gets the same answer."""
    client = installation.client
    with installation.stream() as stream:
        task_id = installation.submit()
        stream.next("task")
        installation.fail(task_id, retryable=False)
        key = {"X-API-Key": client.api_key, "Idempotency-Key": secrets.token_hex(8)}
        answers = [client.call("POST", f"/tasks/{task_id}/retry", {}, key) for _ in range(2)]
        assert [answer.status for answer in answers] == [200, 200]
        assert answers[0].body["status"] == "queued"
        assert stream.next("task")["attempt"] == 2
        installation.complete(task_id, attempt=2, output="better")
        assert client.task(task_id)["output"] == "better"


def test_only_a_failed_task_is_tried_again(installation: Installation) -> None:
    client = installation.client
    for task_id in (installation.submit(), ended(installation)):
        assert client.admin("POST", f"/tasks/{task_id}/retry").status == 409
    assert client.admin("POST", "/tasks/task_unknown/retry").status == 404


# -- cancels ----------------------------------------------------------------------------------------------------------


def cancel(installation: Installation, task_id: str, **body: Any) -> int:
    return installation.client.admin("POST", f"/tasks/{task_id}/cancel", body).status


def code_of(installation: Installation, task_id: str) -> Any:
    task = installation.client.task(task_id)
    return (task["status"], (task["error"] or {}).get("code"))


def test_cancel_a_queued_task(installation: Installation) -> None:
    """It ends at once, and a repeated cancel is no error."""
    task_id = installation.submit()
    assert [cancel(installation, task_id, reason="not needed") for _ in range(2)] == [200, 200]
    assert code_of(installation, task_id) == ("failed", "cancelled")
    assert "not needed" in installation.client.task(task_id)["error"]["message"]
    with installation.stream() as stream:
        other = installation.submit()
        assert stream.next("task")["task_id"] == other


def test_cancel_an_assigned_task(installation: Installation) -> None:
    """Its worker gets the event, heartbeats repeat it, and the worker's own result counts."""
    with installation.stream() as stream:
        task_id = installation.submit()
        stream.next("task")
        assert cancel(installation, task_id, reason="stop") == 200
        assert stream.next("cancel") == {"task_id": task_id, "reason": "stop"}
        assert installation.heartbeat().body["cancel_tasks"] == [task_id]
        assert installation.complete(task_id, output="finished all the same").status == 200
    assert code_of(installation, task_id) == ("completed", None)
    assert "cancel_tasks" not in installation.heartbeat().body
    assert cancel(installation, task_id) == 409


def test_a_cancelled_task_is_not_tried_again(installation: Installation) -> None:
    """A failure that its worker reports is final and keeps its code, also where attempts are left."""
    with installation.stream() as stream:
        task_id = installation.submit(max_attempts=5)
        stream.next("task")
        cancel(installation, task_id)
        installation.fail(task_id, retryable=True, code="no_luck")
    assert code_of(installation, task_id) == ("failed", "no_luck")


def test_a_cancelled_task_that_is_released(installation: Installation) -> None:
    """It ends."""
    with installation.stream() as stream:
        task_id = installation.submit()
        stream.next("task")
        cancel(installation, task_id)
        assert installation.release(task_id).status == 200
    assert code_of(installation, task_id) == ("failed", "cancelled")


def test_a_cancelled_task_whose_worker_vanishes(installation: Installation) -> None:
    """It ends, is not given to another worker, and a later result of the first one is refused."""
    with installation.stream() as stream:
        task_id = installation.submit()
        stream.next("task")
        cancel(installation, task_id)
    until(lambda: code_of(installation, task_id) == ("failed", "cancelled"))
    assert cancel(installation, task_id) == 200
    assert installation.complete(task_id).status == 409


def test_a_cancelled_task_is_not_delivered_again(installation: Installation) -> None:
    """A worker that reconnects gets the cancel, not the task."""
    with installation.stream() as stream:
        task_id = installation.submit()
        stream.next("task")
        cancel(installation, task_id, reason="stop")
        with installation.stream() as again:
            assert again.next("task", "cancel") == {"task_id": task_id, "reason": "stop"}
            installation.complete(task_id)


@pytest.mark.parametrize("name", ["cancel", "retry"])
def test_who_may_ask(installation: Installation, name: str) -> None:
    """An unknown task is 404, a request without credentials 401."""
    client = installation.client
    answer = client.admin("POST", f"/tasks/task_unknown/{name}")
    assert (answer.status, answer.code) == (404, "TASK_NOT_FOUND")
    assert client.call("POST", f"/tasks/task_unknown/{name}").status == 401
