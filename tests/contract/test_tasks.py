"""Results: the first wins, the same again is no harm, and nobody reports another's."""

from __future__ import annotations

import secrets
import time
from typing import Any, Dict, List

import pytest

from .client import Client, Installation, audit_event


@pytest.fixture
def given(installation: Installation) -> Any:
    """A task on its way to the worker ``w1`` of ``installation``, whose stream stays open."""
    with installation.stream() as stream:
        task_id = installation.submit()
        stream.next("task")
        yield task_id


def test_a_completed_task(installation: Installation, given: str) -> None:
    """A completion's output is the task's, and its status is final."""
    assert installation.complete(given, output={"answer": [42, None]}).status == 200
    task = installation.client.task(given)
    assert (task["status"], task["output"]) == ("completed", {"answer": [42, None]})


def test_a_failed_task(installation: Installation, given: str) -> None:
    """A failed completion is final, retryable or not, for a task with one attempt."""
    assert installation.fail(given, retryable=True).status == 200
    task = installation.client.task(given)
    assert task["status"] == "failed"
    assert task["error"]["code"] == "handler_error"


def test_the_same_completion_again(installation: Installation, given: str) -> None:
    """A repeated Idempotency-Key gets the same answer as before."""
    first, second = (installation.complete(given, output="x") for _ in range(2))
    assert (first.status, first.body) == (second.status, second.body) == (200, second.body)


def test_another_completion_is_a_conflict(installation: Installation, given: str) -> None:
    """A second result is 409 and changes nothing."""
    installation.complete(given, output="first")
    assert installation.complete(given, output="second", key=f"{given}:1:2").status == 409
    assert installation.client.task(given)["output"] == "first"


def test_a_substituted_completion_is_accepted(installation: Installation, given: str) -> None:
    """A result that was refused can be substituted by another under a key of its own."""
    assert installation.complete(given, execution_time_ms="long").status == 400
    error = {"code": "result_rejected", "message": "", "retryable": False}
    assert installation.complete(given, key=f"{given}:1:2", status="failed", error=error).status == 200
    assert installation.client.task(given)["error"]["code"] == "result_rejected"


def test_an_unknown_task(installation: Installation) -> None:
    """A completion of a task nobody knows is 404."""
    assert installation.complete("task_unknown").status == 404


def test_another_installations_task(client: Client, installation: Installation, given: str) -> None:
    """A completion, release or progress from an installation that never had the task is 403."""
    other = client.install(installation.agent_id)
    assert other.complete(given).status == 403
    assert other.release(given).status == 403
    assert other.call("POST", f"/tasks/{given}/progress", {"progress": 0.5}).status == 403
    assert client.task(given)["status"] not in ("completed", "failed")


def test_a_completion_needs_a_runtime_token(client: Client, given: str) -> None:
    """Neither nothing nor the API key completes a task."""
    body = {"status": "completed", "output": 1, "execution_time_ms": 1}
    assert client.call("POST", f"/tasks/{given}/complete", body).status == 401
    assert client.admin("POST", f"/tasks/{given}/complete", body).status == 401


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"status": "done"}, "status"),
        ({"task_id": "task_other"}, "task_id"),
        ({"attempt": 0}, "attempt"),
        ({"attempt": True}, "attempt"),
        ({"attempt": 7}, "attempt"),
        ({"execution_time_ms": -1}, "execution_time_ms"),
        ({"worker_id": 5}, "worker_id"),
        ({"status": "failed"}, "error"),
        ({"status": "failed", "error": {"message": "", "retryable": False}}, "error.code"),
        ({"status": "failed", "error": {"code": "x", "message": "", "retryable": "no"}}, "error.retryable"),
    ],
)
def test_a_malformed_completion_names_the_field(
    installation: Installation, given: str, fields: Dict[str, Any], name: str
) -> None:
    """A completion with a wrong field is a 400 that names it, and the task stays open."""
    answer = installation.complete(given, **fields)
    assert answer.status == 400
    assert name in answer.body["message"]
    assert installation.complete(given).status == 200


def test_a_task_with_attempts_left_is_tried_again(installation: Installation) -> None:
    """A retryable failure of a task with max_attempts comes back, as a higher attempt, after at least a second."""
    with installation.stream() as stream:
        task_id = installation.submit(max_attempts=2)
        stream.next("task")
        began = time.monotonic()
        assert installation.fail(task_id).status == 200
        task = stream.next("task")
        assert time.monotonic() - began >= 0.99
        assert (task["task_id"], task["attempt"]) == (task_id, 2)
        assert installation.fail(task_id).status == 200, "the first report, repeated, is no second failure"
        assert installation.client.task(task_id)["status"] not in ("completed", "failed")
        assert installation.fail(task_id, attempt=2).status == 200
    assert installation.client.task(task_id)["status"] == "failed"


def test_a_failure_that_is_not_retryable_is_final(installation: Installation) -> None:
    """max_attempts does not help a failure that says it would happen again."""
    with installation.stream() as stream:
        task_id = installation.submit(max_attempts=5)
        stream.next("task")
        installation.fail(task_id, retryable=False)
    assert installation.client.task(task_id)["status"] == "failed"


def test_another_try_is_another_workers(installation: Installation) -> None:
    """A task that failed on one worker is tried on another, if there is one."""
    with installation.stream("w1") as one:
        task_id = installation.submit(max_attempts=2)
        one.next("task")
        with installation.stream("w2") as two:
            installation.fail(task_id)
            assert two.next("task")["attempt"] == 2


def test_a_paused_worker_gets_no_second_tries(installation: Installation) -> None:
    """A task that is tried again waits until its worker is no longer paused."""
    with installation.stream() as stream:
        task_id = installation.submit(max_attempts=2)
        stream.next("task")
        installation.command("pause")
        stream.next("command")
        installation.fail(task_id)
        # Once the second try is due a first one overtakes it; there is no event to wait for, nothing may happen.
        time.sleep(1.2)
        first_try = installation.submit()
        assert stream.next("task")["task_id"] == first_try
        installation.command("resume")
        stream.next("command")
        assert stream.next("task")["task_id"] == task_id


def test_a_released_task_goes_to_another_worker(installation: Installation) -> None:
    """A task that was given back is at once another worker's, as the next attempt."""
    with installation.stream("w1") as one, installation.stream("w2", max_in_flight=0) as _:
        task_id = installation.submit()
        one.next("task")
        assert installation.release(task_id).status == 200
        assert installation.release(task_id).status == 200, "a repeated release is no error"
        with installation.stream("w3") as three:
            task = three.next("task")
            assert (task["task_id"], task["attempt"]) == (task_id, 2)
        assert installation.release(task_id).status == 409


def test_a_released_task_returns_as_the_same_attempt(installation: Installation) -> None:
    """The worker that gave a task back gets it as the same attempt when it connects anew and nobody else took it."""
    with installation.stream() as stream:
        task_id = installation.submit()
        stream.next("task")
        installation.release(task_id)
    with installation.stream() as stream:
        assert stream.next("task")["attempt"] == 1


@pytest.mark.parametrize("body", [{"worker_id": "w1"}, {"attempt": 1}, {"attempt": "1", "worker_id": "w1"}])
def test_a_malformed_release(installation: Installation, given: str, body: Dict[str, Any]) -> None:
    """A release needs the worker and the attempt."""
    assert installation.call("POST", f"/tasks/{given}/release", body).status == 400


def test_progress_is_kept(installation: Installation, given: str) -> None:
    """The newest progress is the task's; after the result there is no more."""
    path = f"/tasks/{given}/progress"
    assert installation.call("POST", path, {"progress": 0.25}).status == 200
    assert installation.call("POST", path, {"progress": 0.5, "message": "half"}).status == 200
    assert installation.client.task(given)["progress"] == {"progress": 0.5, "message": "half"}
    assert installation.call("POST", path, {"progress": 2}).status == 400
    installation.complete(given)
    assert installation.call("POST", path, {"progress": 1}).status == 409


# -- the administrator's side -----------------------------------------------------------------------------------------


def test_tasks_are_listed_newest_first(client: Client) -> None:
    """A list goes from new to old, page by page, without gap or repetition."""
    agent = client.install()
    ids = [agent.submit("listed") for _ in range(5)]
    seen = []
    before = ""
    while True:
        page = client.admin("GET", f"/tasks?capability=listed&limit=2{before}").body
        seen += [task["task_id"] for task in page["tasks"]]
        if page["next_before"] is None:
            break
        before = f"&before={page['next_before']}"
    assert seen == ids[::-1]


def test_tasks_are_listed_by_status(installation: Installation, given: str) -> None:
    """A list can be narrowed to one status."""
    installation.complete(given)
    tasks = installation.client.admin("GET", "/tasks?status=completed&limit=1000").body["tasks"]
    assert given in [task["task_id"] for task in tasks]
    assert {task["status"] for task in tasks} == {"completed"}


@pytest.mark.parametrize("query", ["status=done", "limit=0", "limit=x", "before=task_unknown"])
def test_a_malformed_list(client: Client, query: str) -> None:
    """A list that cannot be understood is a 400, not everything."""
    assert client.admin("GET", f"/tasks?{query}").status == 400


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"agent_id": ""}, "agent_id"),
        ({"capability": None}, "capability"),
        ({"timeout_ms": 0}, "timeout_ms"),
        ({"timeout_ms": "5"}, "timeout_ms"),
        ({"max_attempts": 0}, "max_attempts"),
        ({"trace_id": 1}, "trace_id"),
    ],
)
def test_a_malformed_submission_names_the_field(client: Client, fields: Dict[str, Any], name: str) -> None:
    """A task with a wrong field is a 400 that names it."""
    answer = client.admin("POST", "/tasks", {"agent_id": "a", "capability": "c", "input": {}, **fields})
    assert answer.status == 400
    assert name in answer.body["message"]


def test_an_unknown_task_is_not_found(client: Client) -> None:
    """A task nobody knows is 404."""
    assert client.admin("GET", "/tasks/task_unknown").status == 404


# -- policies and logs ------------------------------------------------------------------------------------------------


def test_a_workspace_has_no_policy_at_first(installation: Installation) -> None:
    """No policy is 404, which means that everything is allowed."""
    assert installation.call("GET", "/workspaces/ws_none/policy").status == 404


def test_a_policy_is_served(client: Client, installation: Installation) -> None:
    """A policy is served as it was set, its version rising, to a runtime token and to the API key."""
    path = "/workspaces/ws%2Fmine%20%2525/policy"
    content = {"permissions": {"network": {"enabled": True}}}
    assert client.admin("PUT", path, {"content": {}}).status == 200
    assert client.admin("PUT", path, {"content": content}).status == 200
    for answer in (client.admin("GET", path), installation.call("GET", path)):
        assert answer.status == 200
        assert answer.body["content"] == content
        assert answer.body["version"] == 2
        assert answer.body["workspace_id"] == "ws/mine %25"
        assert len(bytes.fromhex(answer.body["hash"])) == 32
        assert len(bytes.fromhex(answer.body["signature"])) == 64
        assert len(bytes.fromhex(answer.body["signing_public_key"])) == 32
        assert answer.body["policy_id"]
    assert client.call("GET", path).status == 401


def test_a_malformed_policy(client: Client) -> None:
    """A policy without content is refused."""
    assert client.admin("PUT", "/workspaces/w/policy", {"permissions": {}}).status == 400


def test_audit_events_are_taken(client: Client, installation: Installation) -> None:
    """A batch of audit events is accepted with either credential."""
    body = {"events": [audit_event()]}
    assert client.admin("POST", "/logs", body).status < 300
    assert installation.call("POST", "/logs", body).status < 300
    assert installation.call("POST", "/logs", {"events": {}}).status == 400
    assert client.call("POST", "/logs", body).status == 401


def test_audit_events_are_kept_once(client: Client, installation: Installation) -> None:
    """A batch whose Idempotency-Key came before is not taken twice; the log can be read page by page."""
    session = f"s-{installation.id}"
    events = [audit_event(session_id=session, event_data={"n": n}, event_type="model_call") for n in range(3)]
    for _ in range(2):
        answer = installation.call("POST", "/logs", {"events": events}, Idempotency_Key=f"{session}:1")
        assert answer.status < 300
    found: List[Any] = []
    after = 0
    while True:
        page = client.admin("GET", f"/logs?event_type=model_call&severity=info&limit=2&after={after}")
        assert page.status == 200
        if not page.body["events"]:
            break
        found += [event for event in page.body["events"] if event["session_id"] == session]
        after = page.body["next_after"]
    assert found == events
    assert installation.call("GET", "/logs").status == 401


@pytest.mark.parametrize(
    "fields",
    [
        {"event_type": "gossip"},
        {"severity": "warning"},
        {"event_timestamp": "yesterday"},
        {"event_data": []},
        {"session_id": None},
        {"workspace_id": 1},
    ],
)
def test_malformed_audit_events(installation: Installation, fields: Dict[str, Any]) -> None:
    """A batch with an event that is none is refused as a whole, naming the field."""
    answer = installation.call("POST", "/logs", {"events": [audit_event(), audit_event(**fields)]})
    assert answer.status == 400
    assert next(iter(fields)) in answer.body["message"]


@pytest.mark.parametrize("query", ["event_type=x", "severity=x", "limit=0", "limit=x", "after=x"])
def test_wrong_queries_of_the_log(client: Client, query: str) -> None:
    """A wrong filter or page of the log is refused, not ignored."""
    assert client.admin("GET", f"/logs?{query}").status == 400


def test_a_submission_with_a_key_is_one_task(client: Client) -> None:
    """The same Idempotency-Key and body get the same task, 200; another body gets 422; another workspace, a task."""
    body = {"agent_id": "a", "capability": "once", "input": {"n": 1}}
    headers = {"X-API-Key": client.api_key, "Idempotency-Key": secrets.token_hex(16)}
    first, again = (client.call("POST", "/tasks", body, headers) for _ in range(2))
    assert (first.status, again.status) == (201, 200)
    assert first.body["task_id"] == again.body["task_id"]
    for other in ({**body, "input": {"n": 2}}, {**body, "agent_id": "b"}, {**body, "max_attempts": 2}):
        answer = client.call("POST", "/tasks", other, headers)
        assert (answer.status, answer.code) == (422, "IDEMPOTENCY_KEY_REUSED")
    elsewhere = client.call("POST", "/tasks", {**body, "workspace_id": "elsewhere"}, headers)
    assert elsewhere.status == 201
    assert elsewhere.body["task_id"] != first.body["task_id"]


def test_submissions_without_a_key_are_new(client: Client) -> None:
    """Without a key, or under another, the same body is another task."""
    body = {"agent_id": "a", "capability": "often", "input": {}}
    keys: list[dict[str, str]] = [{}, {}, {"Idempotency-Key": secrets.token_hex(16)}]
    answers = [client.call("POST", "/tasks", body, {"X-API-Key": client.api_key, **key}) for key in keys]
    assert {answer.status for answer in answers} == {201}
    assert len({answer.body["task_id"] for answer in answers}) == 3
