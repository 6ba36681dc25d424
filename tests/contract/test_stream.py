"""Delivery: who gets what, when, and again."""

from __future__ import annotations

import time
from typing import Any

import pytest

from .client import API, Client, Installation


def test_a_stream_begins_with_connected(installation: Installation) -> None:
    """The first event tells the installation, the interval of heartbeats and the wanted state."""
    with installation.stream() as stream:
        assert stream.headers["Content-Type"].startswith("text/event-stream")
        assert stream.connected["installation_id"] == installation.id
        assert stream.connected["heartbeat_interval_seconds"] > 0
        assert stream.connected["desired_state"] == "running"


def test_a_silent_stream_carries_comments(installation: Installation) -> None:
    """When nothing happens a comment comes at least every 15 seconds."""
    with installation.stream() as stream:
        began = time.monotonic()
        line = stream.line()
        assert time.monotonic() - began <= 15.5
    assert line is not None
    assert line.startswith(":")


def test_a_task_arrives_with_its_fields(installation: Installation) -> None:
    """A task event carries everything that was submitted, and counts attempts from 1."""
    fields = {
        "input": {"text": "snow ☃ \u2028 line\nbreak", "n": [1, 2.5, None]},
        "tool": "t",
        "workspace_id": "ws",
        "requester_agent_id": "r",
        "parent_task_id": "p",
        "workflow_id": "wf",
        "trace_id": "tr",
        "timeout_ms": 1500,
    }
    with installation.stream() as stream:
        task_id = installation.submit(**fields)
        task = stream.next("task")
    assert {name: task[name] for name in fields} == fields
    assert (task["task_id"], task["capability"], task["attempt"]) == (task_id, "work", 1)


def test_every_task_has_a_workspace(installation: Installation) -> None:
    """A task that was submitted without a workspace arrives with one."""
    with installation.stream() as stream:
        installation.submit()
        assert stream.next("task")["workspace_id"]


def test_tasks_wait_for_a_worker(installation: Installation) -> None:
    """Tasks submitted before anyone is connected come in order when somebody is."""
    ids = [installation.submit() for _ in range(3)]
    with installation.stream() as stream:
        assert [stream.next("task")["task_id"] for _ in range(3)] == ids


def test_capabilities_filter(installation: Installation) -> None:
    """A stream gets only the capabilities it names, whatever characters they hold; without any it gets all."""
    with installation.stream("picky", capabilities=["ärger/1", "b"]) as picky:
        installation.submit("other")
        mine = installation.submit("ärger/1")
        assert picky.next("task")["task_id"] == mine
    with installation.stream("any") as catch_all:
        assert catch_all.next("task")["capability"] == "other"


def test_no_more_than_max_in_flight(installation: Installation) -> None:
    """A stream gets the next task only when it has completed one."""
    with installation.stream(max_in_flight=1) as stream:
        first, second = installation.submit(), installation.submit()
        assert stream.next("task")["task_id"] == first
        # Had the second been sent, it would come before the command.
        installation.command("resume")
        stream.next("command")
        assert installation.complete(first).status == 200
        assert stream.next("task")["task_id"] == second


def test_a_stream_without_room_gets_nothing(installation: Installation) -> None:
    """max_in_flight=0 takes commands only."""
    with installation.stream("full", max_in_flight=0) as full:
        installation.submit()
        installation.command("resume")
        full.next("command")


def test_a_task_goes_to_one_stream(installation: Installation) -> None:
    """Two workers share the tasks: each gets its part, none twice."""
    with installation.stream("w1") as one, installation.stream("w2") as two:
        ids = {installation.submit() for _ in range(6)}
        got = [[stream.next("task")["task_id"] for _ in range(3)] for stream in (one, two)]
        assert set(got[0]) | set(got[1]) == ids


def test_agents_do_not_see_each_other(client: Client, installation: Installation) -> None:
    """A task goes to its own agent only."""
    other = client.install()
    with installation.stream() as stream:
        other.submit()
        mine = installation.submit()
        assert stream.next("task")["task_id"] == mine


def test_an_unfinished_task_comes_again_on_reconnect(installation: Installation) -> None:
    """The same worker gets what it has not completed again, as the same attempt."""
    with installation.stream() as stream:
        done, open_ = installation.submit(), installation.submit()
        stream.next("task")
        stream.next("task")
        installation.complete(done)
    with installation.stream() as stream:
        task = stream.next("task")
        assert (task["task_id"], task["attempt"]) == (open_, 1)


def test_a_vanished_worker_loses_its_tasks(installation: Installation) -> None:
    """Another worker gets the tasks of one that is gone, as the next attempt; the first result wins."""
    task_id = installation.submit()
    with installation.stream("gone") as stream:
        stream.next("task")
    with installation.stream("heir") as stream:
        task = stream.next("task")
        assert (task["task_id"], task["attempt"]) == (task_id, 2)
        assert installation.complete(task_id, 1, output="first").status == 200
        assert installation.complete(task_id, 2, output="second").status == 409
    assert installation.client.task(task_id)["output"] == "first"


def test_a_second_stream_of_a_worker_replaces_the_first(installation: Installation) -> None:
    """A worker that connects again while its old connection seems alive is served on the new one."""
    with installation.stream() as old, installation.stream() as new:
        assert old.next() is None
        task_id = installation.submit()
        assert new.next("task")["task_id"] == task_id


def test_commands_arrive(installation: Installation) -> None:
    """A command arrives on the stream with type, reason and id."""
    with installation.stream() as stream:
        installation.command("pause", reason="lunch")
        event = stream.next()
    assert event.name == "command"
    assert event.id
    assert (event.data["type"], event.data["reason"]) == ("pause", "lunch")


def test_missed_commands_are_replayed(installation: Installation) -> None:
    """A client that names the last event it saw gets the commands since then, and only those."""
    with installation.stream() as stream:
        installation.command("pause", reason="1")
        seen = stream.next().id
    installation.command("resume", reason="2")
    installation.command("pause", reason="3")
    with installation.stream(last_event_id=seen) as stream:
        assert [stream.next("command")["reason"] for _ in range(2)] == ["2", "3"]
        last = installation.command("resume", reason="4")
        assert last.status < 300
        assert stream.next("command")["reason"] == "4"


def test_a_first_connection_replays_nothing(installation: Installation) -> None:
    """Without Last-Event-ID, or with one that was never given out, `connected` alone tells where things stand."""
    installation.command("pause", reason="old")
    for last in (None, "999999999", "abc"):
        with installation.stream(last_event_id=last) as stream:
            assert stream.connected["desired_state"] == "paused"
            installation.command("pause", reason="new")
            assert stream.next("command")["reason"] == "new"


def test_the_first_event_can_be_resumed_from(installation: Installation) -> None:
    """`connected` has an id, so that a command missed right after it is replayed."""
    connection, response = installation.open()
    try:
        first = response.readline().decode()
    finally:
        response.close()
        connection.close()
    assert first.startswith("id: ")
    installation.command("pause", reason="missed")
    with installation.stream(last_event_id=first[4:].strip()) as stream:
        assert stream.next("command")["reason"] == "missed"


def test_a_paused_installation_leaves_tasks_to_others(client: Client, installation: Installation) -> None:
    """A paused installation gets a task only when nobody else could take it."""
    other = client.install(installation.agent_id)
    with installation.stream("paused") as paused:
        installation.command("pause")
        paused.next("command")
        with other.stream("awake") as awake:
            first = installation.submit()
            assert awake.next("task")["task_id"] == first
            other.complete(first)
        # The other one has gone: now the paused one is asked, so that it can answer `worker_paused`.
        second = installation.submit()
        assert paused.next("task")["task_id"] == second


@pytest.mark.parametrize("status", ["stopping", "stopped"])
def test_a_stopping_worker_gets_nothing(client: Client, installation: Installation, status: str) -> None:
    """A worker that says it stops gets no more tasks; one that connects afterwards does."""
    with installation.stream("old") as old:
        installation.heartbeat(status, workers=[{"worker_id": "old", "status": status, "active_tasks": 0}])
        task_id = installation.submit()
        installation.command("resume")
        old.next("command")
        with installation.stream("new") as new:
            assert new.next("task")["task_id"] == task_id


def test_a_terminated_installation_gets_nothing(installation: Installation) -> None:
    """A terminated installation gets no tasks until it is resumed."""
    with installation.stream() as stream:
        installation.command("terminate")
        stream.next("command")
        task_id = installation.submit()
        installation.command("resume")
        stream.next("command")
        assert stream.next("task")["task_id"] == task_id


def test_a_stream_needs_a_runtime_token(client: Client, installation: Installation) -> None:
    """No token, an API key and another agent's token open no stream."""
    path = f"/tasks/stream?agent_id={installation.agent_id}&worker_id=w"
    assert client.call("GET", path).status == 401
    assert client.admin("GET", path).status == 401
    other = client.install()
    assert other.call("GET", path).status == 403
    assert other.call("GET", f"/tasks/stream?installation_id={installation.id}&worker_id=w").status == 403
    assert other.call("GET", "/tasks/stream?installation_id=inst_unknown&worker_id=w").status == 404


@pytest.mark.parametrize(("query", "name"), [("", "worker_id"), ("&worker_id=w&max_in_flight=-1", "max_in_flight")])
def test_a_malformed_stream_request_names_the_field(installation: Installation, query: str, name: str) -> None:
    """A missing or wrong parameter is a 400 that names it."""
    answer: Any = installation.call("GET", f"/tasks/stream?agent_id={installation.agent_id}{query}")
    assert answer.status == 400
    assert name in answer.body["message"]


def test_events_are_chunked_and_not_held_back(installation: Installation) -> None:
    """A stream is sent chunked over HTTP/1.1, each event at once."""
    connection = installation.client.connect()
    try:
        connection.request(
            "GET",
            f"{API}/tasks/stream?agent_id={installation.agent_id}&worker_id=w&max_in_flight=5",
            headers={"Authorization": f"Bearer {installation.token}"},
        )
        response = connection.getresponse()
        assert response.headers["Transfer-Encoding"] == "chunked"
        assert response.version == 11
        assert b"event: connected" in response.read1(65536)
        task_id = installation.submit()
        text = b""
        while b"event: task" not in text:
            text = response.read1(65536)
        assert task_id.encode() in text
        response.close()
    finally:
        connection.close()
