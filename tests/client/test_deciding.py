"""Approvals in SekuireClient: listing, deciding once, and refusing where an agent would decide."""

from __future__ import annotations

from typing import Any, Iterator, Tuple

import pytest

from sekuire import SekuireClient, SekuireSDK
from sekuire.errors import APIError, ConfigurationError
from sekuire.local import LocalPlatform

from ..conftest import AGENT
from ..contract.client import Client, Installation
from ..local.test_approvals import ask
from ..support.servers import Answer, Request, WebServer


@pytest.fixture
def given(platform: LocalPlatform) -> Iterator[Tuple[Installation, str]]:
    """An installation, and a task that its worker has."""
    installation = Client(platform.url, platform.api_key).install()
    with installation.stream() as stream:
        task_id = installation.submit()
        stream.next("task")
        yield installation, task_id


@pytest.fixture
def client(platform: LocalPlatform) -> Iterator[SekuireClient]:
    with SekuireClient(api_base_url=platform.url, api_key=platform.api_key) as client:
        yield client


def test_deciding(client: SekuireClient, given: Tuple[Installation, str]) -> None:
    """What waits is listed, a decision returns the request, and a second one says who was first."""
    first, second = ask(*given, details={"amount": 5}), ask(*given, n=2)
    assert [one["approval_id"] for one in client.approvals("pending")] == [second, first]
    approved = client.approve(first, "fine", decided_by="ada")
    facts = {name: approved[name] for name in ("status", "reason", "decided_by", "details")}
    assert facts == {"status": "approved", "reason": "fine", "decided_by": "ada", "details": {"amount": 5}}
    assert client.deny(second)["status"] == "denied"
    assert list(client.approvals(status="pending")) == []
    assert [one["approval_id"] for one in client.approvals(limit=1)] == [second]
    with pytest.raises(APIError, match="was approved by ada already") as caught:
        client.deny(first)
    assert caught.value.status == 409
    with pytest.raises(APIError, match="there is no request for approval"):
        client.approve("unknown")


def test_pages(client: SekuireClient, given: Tuple[Installation, str]) -> None:
    """More than a page are listed, page by page, each with large details."""
    ids = [ask(*given, n=n + 1, details="\N{SNOWMAN}" * 20_000) for n in range(102)]
    assert [one["approval_id"] for one in client.approvals()] == ids[::-1]
    assert [one["approval_id"] for one in client.approvals(limit=101)] == ids[:0:-1]


def test_a_decision_whose_answer_is_lost(
    platform: LocalPlatform, client: SekuireClient, given: Tuple[Installation, str]
) -> None:
    """It is sent again, and is one decision."""
    approval_id = ask(*given)
    platform.faults.add("reset:on=decision,when=after,times=1")
    assert client.approve(approval_id)["status"] == "approved"
    assert platform.count("decision", 200) == 1


def test_an_agent_decides_nothing(platform: LocalPlatform, given: Tuple[Installation, str]) -> None:
    """The client of an SDK refuses without asking the platform, which would refuse too."""
    approval_id = ask(*given)
    token = platform.create_install_token(AGENT)
    sdk = SekuireSDK(AGENT, api_base_url=platform.url, install_token=token, auto_heartbeat=False)
    client = sdk.client()
    for call in (lambda: client.approve(approval_id), lambda: client.deny(approval_id), client.approvals):
        with pytest.raises(ConfigurationError, match=r"\(\) needs an API key: an agent must not decide"):
            call()
    assert platform.count("decision") == platform.count("approval_list") == 0
    assert platform.approvals()[0]["status"] == "pending"


@pytest.mark.parametrize(
    ("name", "arguments", "text"),
    [
        ("approvals", {"status": "open"}, "status: must be one of pending, approved, denied, expired, got 'open'"),
        ("approvals", {"limit": 0}, "limit: must be a whole number"),
        ("approve", {"approval_id": ""}, "approval_id: must be a non-empty str"),
        ("approve", {"approval_id": "x", "reason": 1}, "reason: must be a str, got int"),
        ("deny", {"approval_id": "x", "decided_by": b"ada"}, "decided_by: must be a str, got bytes"),
    ],
    ids=str,
)
def test_wrong_arguments(client: SekuireClient, name: str, arguments: Any, text: str) -> None:
    """Each is refused at the call, by its name."""
    with pytest.raises(ConfigurationError) as caught:
        getattr(client, name)(**arguments)
    assert str(caught.value).startswith(text)


def test_a_platform_without_approvals() -> None:
    """Its 404 is the error."""

    def answer(request: Request) -> Answer:
        return Answer(404, b'{"error": "not_found", "message": "there is nothing here"}')

    with WebServer(answer) as server, SekuireClient(api_base_url=server.url, api_key="sk_live_test") as client:
        with pytest.raises(APIError, match="there is nothing here"):
            list(client.approvals())
        with pytest.raises(APIError, match="there is nothing here"):
            client.approve("x")
