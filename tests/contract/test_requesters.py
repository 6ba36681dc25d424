"""Tasks that an agent submits with its runtime token: whose they are, and who sees them."""

from __future__ import annotations

import secrets
from typing import Any, Dict, List

import pytest

from .client import Answer, Client, Installation

OTHERS = "ws-others"


def submit(requester: Installation, agent_id: str = "helper", **fields: Any) -> Answer:
    body = {"agent_id": agent_id, "capability": "work", "input": {}, **fields}
    return requester.call("POST", "/tasks", body)


def submitted(requester: Installation, **fields: Any) -> str:
    answer = submit(requester, **fields)
    assert answer.status == 201, answer
    found: str = answer.body["task_id"]
    return found


def listed(requester: Installation, query: str = "") -> List[str]:
    answer = requester.call("GET", f"/tasks{query}")
    assert answer.status == 200, answer
    return [task["task_id"] for task in answer.body["tasks"]]


def test_an_agent_submits_a_task(client: Client, installation: Installation) -> None:
    """A task goes to another agent, which is told who asks; the requester reads its result."""
    helper = client.install()
    with helper.stream() as stream:
        task_id = submitted(installation, agent_id=helper.agent_id, input={"n": 1})
        task = stream.next("task")
        assert (task["task_id"], task["input"]) == (task_id, {"n": 1})
        assert task["requester_agent_id"] == installation.agent_id
        assert task["workspace_id"] == installation.grant["workspace_id"]
        helper.complete(task_id, output="done")
    found = installation.call("GET", f"/tasks/{task_id}")
    assert found.status == 200
    assert (found.body["status"], found.body["output"]) == ("completed", "done")


@pytest.mark.parametrize("claimed", ["agent-of-another", "", None])
def test_the_requester_is_the_agent_itself(installation: Installation, claimed: Any) -> None:
    """Whatever the body says, the task's requester is the agent whose token came."""
    answer = submit(installation, requester_agent_id=claimed)
    assert answer.status == 201
    assert answer.body["requester_agent_id"] == installation.agent_id


def test_the_administrator_names_any_requester(client: Client, installation: Installation) -> None:
    """With the API key the body names the requester, who then sees the task."""
    task_id = client.submit("helper", requester_agent_id=installation.agent_id)
    assert client.task(task_id)["requester_agent_id"] == installation.agent_id
    assert installation.call("GET", f"/tasks/{task_id}").status == 200


def test_another_workspace_is_refused(client: Client, installation: Installation) -> None:
    """A runtime token submits in its own workspace only. The administrator's tasks there stay unseen."""
    answer = submit(installation, workspace_id=OTHERS)
    assert (answer.status, answer.code) == (403, "WRONG_WORKSPACE")
    assert submit(installation, workspace_id=installation.grant["workspace_id"]).status == 201
    elsewhere = client.submit("helper", workspace_id=OTHERS, requester_agent_id=installation.agent_id)
    assert installation.call("GET", f"/tasks/{elsewhere}").status == 404
    assert elsewhere not in listed(installation)


def test_only_what_was_requested_is_visible(client: Client, installation: Installation) -> None:
    """Tasks of others do not exist for an agent, not even those that it runs."""
    other = client.install()
    mine = submitted(installation)
    unseen = [submitted(other), client.submit("helper"), installation.submit()]
    for task_id in unseen:
        answer = installation.call("GET", f"/tasks/{task_id}")
        assert (answer.status, answer.code) == (404, "TASK_NOT_FOUND")
        assert installation.call("GET", f"/tasks?before={task_id}").status == 400
    assert listed(installation) == [mine]
    assert listed(other) == unseen[:1]


def test_a_list_is_paged_and_narrowed(installation: Installation) -> None:
    """An agent's own tasks come newest first, page by page, by status and capability."""
    ids = [submitted(installation, capability=f"kind-{number % 2}") for number in range(5)]
    assert listed(installation) == ids[::-1]
    page = installation.call("GET", "/tasks?limit=2").body
    assert [task["task_id"] for task in page["tasks"]] == ids[:2:-1]
    assert listed(installation, f"?before={page['next_before']}") == ids[2::-1]
    assert listed(installation, "?capability=kind-1") == [ids[3], ids[1]]
    assert listed(installation, "?status=completed") == []


def test_the_key_of_a_submission(client: Client, installation: Installation) -> None:
    """An Idempotency-Key counts for an agent's submissions too, and gives no one another agent's task."""
    key = secrets.token_hex(8)
    body: Dict[str, Any] = {"agent_id": "helper", "capability": "work", "input": {}}
    first = installation.call("POST", "/tasks", body, Idempotency_Key=key)
    again = installation.call("POST", "/tasks", body, Idempotency_Key=key)
    assert (first.status, again.status) == (201, 200)
    assert first.body["task_id"] == again.body["task_id"]
    refused = client.install().call("POST", "/tasks", body, Idempotency_Key=key)
    assert (refused.status, refused.code) == (422, "IDEMPOTENCY_KEY_REUSED")
    assert first.body["task_id"] not in str(refused.body)


@pytest.mark.parametrize(("method", "path"), [("POST", "/tasks"), ("GET", "/tasks"), ("GET", "/tasks/task_1")])
def test_credentials_that_do_not_count(client: Client, method: str, path: str) -> None:
    """An unknown token is 401 and a revoked installation's refused, as everywhere; so is a request with neither."""
    body = {"agent_id": "helper", "capability": "work", "input": {}} if method == "POST" else None
    assert client.call(method, path, body).status == 401
    assert client.call(method, path, body, {"Authorization": "Bearer unknown"}).status == 401
    gone = client.install()
    assert gone.revoke(reason="test").status == 200
    answer = gone.call(method, path, body)
    assert (answer.status, answer.code) == (403, "INSTALLATION_REVOKED")
