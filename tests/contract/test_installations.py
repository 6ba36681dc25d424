"""Logging in, staying in, and being thrown out."""

from __future__ import annotations

import datetime as dt
import secrets
from typing import Any

import pytest

from .client import Client, Installation


def _time(text: str) -> dt.datetime:
    return dt.datetime.fromisoformat(text.replace("Z", "+00:00"))


# -- bootstrap and recover --------------------------------------------------------------------------------------------


def test_bootstrap_grants_credentials(client: Client) -> None:
    """An install token becomes an installation with a runtime token, a refresh token and an end."""
    answer = client.bootstrap("boot-agent", client.install_token("boot-agent"))
    assert answer.status == 201
    for name in ("installation_id", "runtime_token", "refresh_token", "workspace_id"):
        assert isinstance(answer.body[name], str)
        assert answer.body[name]
    assert answer.body["expires_at"].endswith("Z")
    assert _time(answer.body["expires_at"]) > dt.datetime.now(dt.timezone.utc)


def test_an_install_token_is_consumed(client: Client) -> None:
    """The second use of an install token is a permanent 409."""
    token = client.install_token("a")
    assert client.bootstrap("a", token).status == 201
    answer = client.bootstrap("a", token)
    assert (answer.status, answer.code) == (409, "INSTALL_TOKEN_CONSUMED")


def test_an_install_token_may_have_several_uses(client: Client) -> None:
    """A token made with max_uses makes as many installations."""
    token = client.install_token("a", max_uses=2)
    answers = [client.bootstrap("a", token) for _ in range(3)]
    assert [answer.status for answer in answers] == [201, 201, 409]
    assert answers[0].body["installation_id"] != answers[1].body["installation_id"]


def test_a_repeated_bootstrap_gets_the_same_answer(client: Client) -> None:
    """The same Idempotency-Key gets the same installation again and uses nothing up."""
    token = client.install_token("a")
    key = secrets.token_hex(32)
    first, second = client.bootstrap("a", token, key), client.bootstrap("a", token, key)
    assert (first.status, second.status) == (201, 201)
    assert first.body == second.body


@pytest.mark.parametrize("uses", [1, 2])
def test_two_holders_of_one_install_token_are_two(client: Client, uses: int) -> None:
    """Another key is another holder: it gets an installation of its own while the token has uses left, else a 409."""
    token = client.install_token("a", max_uses=uses)
    keys = [secrets.token_hex(32) for _ in range(2)]
    first, second = (client.bootstrap("a", token, key) for key in keys)
    assert (first.status, second.status) == (201, 201 if uses == 2 else 409)
    if uses == 2:
        assert first.body["installation_id"] != second.body["installation_id"]
    # Each one's retry uses nothing up.
    again = [client.bootstrap("a", token, key) for key in keys]
    assert [answer.body for answer in again[:uses]] == [first.body, second.body][:uses]


@pytest.mark.parametrize("uses", [1, 2])
def test_no_answer_of_a_revoked_installation_is_repeated(client: Client, uses: int) -> None:
    """After the revocation the same key is a new request, which needs another use of the token."""
    token = client.install_token("a", max_uses=uses)
    key = secrets.token_hex(32)
    first = client.bootstrap("a", token, key)
    assert client.admin("POST", f"/installations/{first.body['installation_id']}/revoke", {}).status == 200
    second = client.bootstrap("a", token, key)
    if uses == 1:
        assert (second.status, second.code) == (409, "INSTALL_TOKEN_CONSUMED")
    else:
        assert second.status == 201
        assert second.body["installation_id"] != first.body["installation_id"]
        assert client.bootstrap("a", token, key).body == second.body


def test_no_recovery_of_a_revoked_installation_is_repeated(client: Client) -> None:
    """After the revocation the same key recovers into a new installation."""
    headers = {"X-API-Key": client.api_key, "Idempotency-Key": secrets.token_hex(32)}
    body = {"agent_id": "a", "workspace_id": None, "runtime_info": {}}
    first = client.call("POST", "/installations/recover", body, headers)
    assert client.admin("POST", f"/installations/{first.body['installation_id']}/revoke", {}).status == 200
    second = client.call("POST", "/installations/recover", body, headers)
    assert second.status == 201
    assert second.body["installation_id"] != first.body["installation_id"]


def test_a_foreign_idempotency_key_gives_nothing_away(client: Client) -> None:
    """Somebody else's Idempotency-Key does not get somebody else's credentials."""
    key = secrets.token_hex(32)
    granted = client.bootstrap("a", client.install_token("a"), key)
    answer = client.bootstrap("a", client.install_token("a"), key)
    assert answer.status >= 400
    assert granted.body["runtime_token"] not in str(answer.body)


@pytest.mark.parametrize(("agent_id", "status"), [("a", 401), ("b", 403)])
def test_a_wrong_install_token_is_refused(client: Client, agent_id: str, status: int) -> None:
    """An unknown install token is 401, one made for another agent 403, and neither is used up by it."""
    token = "skt_unknown" if status == 401 else client.install_token("a")
    assert client.bootstrap(agent_id, token).status == status
    if status == 403:
        assert client.bootstrap("a", token).status == 201


@pytest.mark.parametrize("missing", ["install_token", "agent_id"])
def test_a_bootstrap_without_a_field_names_it(client: Client, missing: str) -> None:
    """A missing field is a 400 whose message names it."""
    body = {"install_token": "skt_x", "agent_id": "a"}
    del body[missing]
    answer = client.call("POST", "/installations/bootstrap", body)
    assert answer.status == 400
    assert missing in answer.body["message"]


def test_recover_needs_the_api_key(client: Client) -> None:
    """The API key makes an installation without an install token; nothing else does."""
    body = {"agent_id": "a", "workspace_id": "ws_mine", "runtime_info": {}}
    answer = client.admin("POST", "/installations/recover", body)
    assert answer.status == 201
    assert answer.body["workspace_id"] == "ws_mine"
    assert client.call("POST", "/installations/recover", body).status == 401
    assert client.call("POST", "/installations/recover", body, {"X-API-Key": "sk_live_wrong"}).status == 401


def test_a_repeated_recover_gets_the_same_answer(client: Client) -> None:
    """Recover is as repeatable as bootstrap."""
    headers = {"X-API-Key": client.api_key, "Idempotency-Key": secrets.token_hex(32)}
    body = {"agent_id": "a", "workspace_id": None, "runtime_info": {}}
    first, second = (client.call("POST", "/installations/recover", body, headers) for _ in range(2))
    assert first.body == second.body


# -- refresh ----------------------------------------------------------------------------------------------------------


def test_refresh_gives_a_new_token(installation: Installation) -> None:
    """A refresh gives a runtime token that works; the one before it works on until its end."""
    answer = installation.refresh(installation.grant["refresh_token"])
    assert answer.status == 200
    old, installation.token = installation.token, answer.body["runtime_token"]
    assert installation.token != old
    assert installation.heartbeat().status == 200
    installation.token = old
    assert installation.heartbeat().status == 200


def test_a_repeated_refresh_gets_the_same_answer(installation: Installation) -> None:
    """The same Idempotency-Key gets the same tokens again."""
    key = secrets.token_hex(32)
    token = installation.grant["refresh_token"]
    assert installation.refresh(token, key).body == installation.refresh(token, key).body


def test_a_lost_refresh_locks_nobody_out(installation: Installation) -> None:
    """Whoever never saw the new refresh token can use the previous one; the new one keeps working too."""
    first = installation.grant["refresh_token"]
    second = installation.refresh(first).body["refresh_token"]
    third = installation.refresh(first)
    assert third.status == 200
    assert installation.refresh(first).status == 200
    assert installation.refresh(second).status == 200
    assert installation.refresh(third.body["refresh_token"]).status == 200


def test_an_older_refresh_token_is_dead(installation: Installation) -> None:
    """Once the new refresh token was used, the one two steps back is refused."""
    first = installation.grant["refresh_token"]
    second = installation.refresh(first).body["refresh_token"]
    assert installation.refresh(second).status == 200
    answer = installation.refresh(first)
    assert (answer.status, answer.code) == (401, "INVALID_REFRESH_TOKEN")


def test_refresh_tokens_belong_to_one_installation(client: Client, installation: Installation) -> None:
    """Another installation's refresh token is 401, an unknown installation 404."""
    other = client.install()
    assert installation.refresh(other.grant["refresh_token"]).status == 401
    other.id = "inst_unknown"
    assert other.refresh(other.grant["refresh_token"]).status == 404


# -- runtime tokens and heartbeats ------------------------------------------------------------------------------------


def test_a_heartbeat_renews_the_lease(installation: Installation) -> None:
    """The answer to a heartbeat says how long the lease lasts now, and what state is wanted."""
    first, second = installation.heartbeat(), installation.heartbeat()
    assert first.status == 200
    assert _time(second.body["lease_expires_at"]) >= _time(first.body["lease_expires_at"])
    assert first.body["desired_state"] == "running"
    assert first.body["revoked"] is False


def test_wrong_credentials(client: Client, installation: Installation) -> None:
    """No token, an unknown one and an API key are 401; another installation's is 403; no such installation 404."""
    path = f"/installations/{installation.id}/heartbeat"
    body = {"status": "healthy", "uptime_seconds": 1, "platform": {}}
    assert client.call("POST", path, body).status == 401
    assert client.call("POST", path, body, {"Authorization": "Bearer rt_unknown"}).status == 401
    assert client.call("POST", path, body, {"Authorization": f"Bearer {client.api_key}"}).status == 401
    assert client.admin("POST", path, body).status == 401
    other = client.install()
    assert other.call("POST", path, body).status == 403
    assert other.call("POST", "/installations/inst_unknown/heartbeat", body).status == 404


@pytest.mark.parametrize(
    ("name", "value"),
    [("status", "fine"), ("status", None), ("uptime_seconds", "1"), ("platform", []), ("workers", [{}])],
)
def test_a_malformed_heartbeat_names_the_field(installation: Installation, name: str, value: Any) -> None:
    """A heartbeat with a wrong field is a 400 that names it."""
    answer = installation.heartbeat(**{name: value})
    assert answer.status == 400
    assert name in answer.body["message"]


@pytest.mark.parametrize(
    ("commands", "state"),
    [(["pause"], "paused"), (["pause", "resume"], "running"), (["terminate"], "terminated")],
)
def test_commands_leave_a_level_behind(installation: Installation, commands: Any, state: str) -> None:
    """A heartbeat tells the state the commands lead to, for a client that lost them."""
    for command in commands:
        assert installation.command(command, reason="because").status in (200, 201, 202)
    answer = installation.heartbeat()
    assert answer.body["desired_state"] == state
    assert answer.body["reason"] == "because"


def test_a_wrong_command_is_refused(client: Client, installation: Installation) -> None:
    """A command of no known type is 400, one to no known installation 404."""
    assert installation.command("dance").status == 400
    assert client.admin("POST", "/installations/inst_unknown/commands", {"type": "pause"}).status == 404


def test_installations_are_listed(client: Client, installation: Installation) -> None:
    """An administrator sees every installation with its last status."""
    installation.heartbeat("degraded")
    found = [
        i
        for i in client.admin("GET", "/installations").body["installations"]
        if i["installation_id"] == installation.id
    ]
    assert [i["status"] for i in found] == ["degraded"]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/installations"),
        ("POST", "/install-tokens"),
        ("POST", "/installations/x/commands"),
        ("POST", "/installations/x/revoke"),
        ("PUT", "/workspaces/x/policy"),
    ],
)
def test_administration_needs_the_api_key(installation: Installation, method: str, path: str) -> None:
    """A runtime token opens nothing that is the administrator's."""
    body = None if method == "GET" else {}
    assert installation.call(method, path, body).status == 401


# -- revocation -------------------------------------------------------------------------------------------------------


def test_a_revoked_installation_is_told_by_its_heartbeat(installation: Installation) -> None:
    """After a revocation heartbeats say so, with the reason and the time left."""
    assert installation.revoke(reason="stolen", shutdown_timeout_ms=20000).status == 200
    answer = installation.heartbeat()
    assert answer.status == 200
    assert answer.body["revoked"] is True
    assert answer.body["reason"] == "stolen"
    assert answer.body["shutdown_timeout_ms"] == 20000


def test_a_revoked_installation_gets_no_stream_and_no_tokens(installation: Installation) -> None:
    """New streams and refreshes of a revoked installation are refused at once, by code."""
    installation.revoke()
    for answer in (installation.refused(), installation.refresh(installation.grant["refresh_token"])):
        assert (answer.status, answer.code) == (403, "INSTALLATION_REVOKED")


def test_a_revoked_installation_may_report(installation: Installation) -> None:
    """What was running may be completed until the time to shut down ends."""
    with installation.stream() as stream:
        task_id = installation.submit()
        stream.next("task")
        installation.revoke(shutdown_timeout_ms=20000)
        assert installation.complete(task_id).status == 200


def test_after_the_time_to_shut_down_nothing_is_accepted(installation: Installation) -> None:
    """A revocation without time to shut down ends heartbeats and completions as well."""
    with installation.stream() as stream:
        task_id = installation.submit()
        stream.next("task")
        installation.revoke(shutdown_timeout_ms=0)
        for answer in (installation.heartbeat(), installation.complete(task_id)):
            assert (answer.status, answer.code) == (403, "INSTALLATION_REVOKED")


def test_revoking_reaches_the_stream(installation: Installation) -> None:
    """A revocation is a terminate command on the live stream."""
    with installation.stream() as stream:
        installation.revoke(reason="stolen", shutdown_timeout_ms=5000)
        command = stream.next("command")
    assert command["type"] == "terminate"
    assert command["reason"] == "stolen"
    assert command["shutdown_timeout_ms"] == 5000


# -- what an installation can do --------------------------------------------------------------------------------------


def test_published_capabilities(client: Client, installation: Installation) -> None:
    """What an installation publishes replaces what was there, and is listed; another's token is refused."""
    path = f"/installations/{installation.id}/capabilities"
    first = {"name": "a", "description": "Do a.", "input_schema": {"type": "object"}, "output_schema": {}}
    assert installation.call("POST", path, {"capabilities": [first, {"name": "b", "more": 1}]}).status == 200

    def listed() -> Any:
        found = client.admin("GET", "/installations").body["installations"]
        return next(one["capability_info"] for one in found if one["installation_id"] == installation.id)

    assert listed() == [first, {"name": "b"}]
    assert installation.call("POST", path, {"capabilities": []}).status == 200
    assert listed() == []
    other = client.install()
    assert other.call("POST", path, {"capabilities": []}).status == 403


@pytest.mark.parametrize(
    ("body", "name"),
    [
        ({}, "capabilities"),
        ({"capabilities": {}}, "capabilities"),
        ({"capabilities": [{"description": "x"}]}, "capabilities"),
        ({"capabilities": [{"name": "a", "description": 3}]}, "description"),
        ({"capabilities": [{"name": "a", "input_schema": []}]}, "input_schema"),
        ({"capabilities": [{"name": "a", "output_schema": {"title": "x" * 65536}}]}, "output_schema"),
    ],
)
def test_malformed_capabilities(installation: Installation, body: Any, name: str) -> None:
    """The refusal names the field."""
    answer = installation.call("POST", f"/installations/{installation.id}/capabilities", body)
    assert answer.status == 400
    assert name in answer.body["message"]
