"""What Sekuire's published material says of the wire, each fact over real HTTP."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any, Dict, List, Optional

import pytest

from sekuire import Beacon, PolicyClient, PolicyGateway, RuntimeCredentials, RuntimeCredentialsStore, SekuireSDK
from sekuire.cli import main
from sekuire.errors import AuthenticationError, PolicyIntegrityError, PolicyUnavailableError
from sekuire.identity import sekuire_id

from ..conftest import AGENT
from ..policy.signing import Served, Signer
from ..support.scripted import Request, Scripted, grant
from ..support.waiting import GUARD, until
from .test_sdk import Make, clean_environment, sdk_of  # noqa: F401

OWNER = Signer(1)


def seen(ctx: Any, input: Any) -> Dict[str, Any]:
    return {
        "capability": ctx.capability,
        "tool": ctx.tool,
        "workspace": ctx.workspace_id,
        "requester": ctx.requester_id,
        "input": input,
    }


# -- tasks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"tool": "search"}, ("search", "search", None, None)),
        ({"target_tool": "search"}, ("search", "search", None, None)),
        ({"capability": None, "tool": "search"}, ("search", "search", None, None)),
        ({"capability": "plan", "tool": "search"}, ("plan", "search", None, None)),
        ({"type": "plan"}, ("plan", None, None, None)),
        (
            {"context": {"skill": "plan", "workspace_id": "ws-2", "requester_id": "agent-2"}},
            ("plan", None, "ws-2", "agent-2"),
        ),
        (
            {
                "type": "plan",
                "workspace_id": "mine",
                "context": {"skill": "x", "workspace_id": "ws-2", "requester_id": "agent-2"},
            },
            ("plan", None, "mine", "agent-2"),
        ),
    ],
)
def test_the_forms_of_a_task(scripted: Scripted, sdk_of: Make, fields: Any, expected: Any) -> None:  # noqa: F811
    """A tool without a capability runs the handler of its name, and the pushed form is read; own fields come first."""
    with sdk_of(scripted) as sdk:
        worker = sdk.create_task_worker()
        for name in ("search", "plan"):
            worker.on_task(name, seen)
        worker.start()
        scripted.send("task", {"task_id": "t-1", "input": {"n": 1}, **fields})
        completion = scripted.completion("t-1")
    assert completion["status"] == "completed", completion
    assert completion["output"] == dict(zip(("capability", "tool", "workspace", "requester"), expected), input={"n": 1})


def test_the_workspace_of_the_local_platform(platform: Any, sdk_of: Make) -> None:  # noqa: F811
    """Each task of the local platform names its workspace, given or not."""
    with sdk_of(platform) as sdk:
        worker = sdk.create_task_worker()
        worker.on_task("plan", seen)
        worker.start()
        for fields, expected in (({}, "ws_local"), ({"workspace_id": "ws-2"}, "ws-2")):
            task = platform.wait(platform.submit("plan", {}, AGENT, **fields), GUARD)
            assert task["output"]["workspace"] == task["workspace_id"] == expected


def nested(code: str, message: str) -> Dict[str, Any]:
    return {"error": {"code": code, "message": message}}


def test_a_nested_error_of_a_login(scripted: Scripted, sdk_of: Make) -> None:  # noqa: F811
    """Code and message of the nested form are read: a refusal of the login says both."""
    scripted.on["bootstrap"] = lambda request: (403, nested("AGENT_UNKNOWN", "no such agent here"))
    with pytest.raises(AuthenticationError, match="no such agent here") as caught:
        sdk_of(scripted).start()
    assert caught.value.code == "AGENT_UNKNOWN"


def test_a_nested_revocation(scripted: Scripted, sdk_of: Make) -> None:  # noqa: F811
    """INSTALLATION_REVOKED counts in the nested form too, on a completion for example."""
    scripted.on["complete"] = lambda request: (403, nested("INSTALLATION_REVOKED", "breach"))
    with sdk_of(scripted) as sdk:
        worker = sdk.create_task_worker()
        worker.on_task("plan", seen)
        worker.start()
        scripted.task("t-1", "plan")
        until(lambda: not worker.is_running())
        until(lambda: sdk.beacon_status.state == "revoked")
        assert "breach" in str(sdk.beacon_status.error)


# -- policies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "submitted", "rule"),
    [
        ({"require_tool_approval": True}, {"tool": "search"}, "tool.approval_required"),
        ({"require_approval": ["plan"]}, {}, "capability.approval_required"),
        ({"require_approval": ["plan"], "denied_capabilities": ["plan"]}, {}, "capability.blocked"),
    ],
)
def test_what_needs_an_approval(
    platform: Any,
    sdk_of: Make,  # noqa: F811
    section: Any,
    submitted: Any,
    rule: str,
) -> None:
    """A person is asked about a tool or a capability under an approval, and nobody about what is denied anyway."""
    platform.set_policy("ws_local", {"agent": {"capabilities": section}})
    with sdk_of(platform, trusted_policy_keys=[platform.policy_public_key]) as sdk:
        worker = sdk.create_task_worker(policy_required=True)
        worker.on_task("*", seen)
        worker.start()
        task_id = platform.submit("plan", {}, AGENT, **submitted)
        code = "policy_denied"
        if rule.endswith("approval_required"):
            code = "approval_denied"
            platform.decide(platform.wait_for_approval(GUARD, task_id=task_id)["approval_id"], "denied")
        error = platform.wait(task_id, GUARD)["error"]
        assert (error["code"], error["details"]["rule"]) == (code, rule)
        assert len(platform.approvals()) == (code == "approval_denied")
        assert platform.wait(platform.submit("other", {}, AGENT), GUARD)["status"] == "completed"


@pytest.mark.parametrize("pinned", [False, True])
def test_an_unknown_list(platform: Any, sdk_of: Make, pinned: bool) -> None:  # noqa: F811
    """A misspelt list closes its section; with a pinned key the policy is refused, and nothing runs."""
    platform.set_policy("ws_local", {"permissions": {"tools": {"blocked_tool": ["shell"]}}})
    options = {"trusted_policy_keys": [platform.policy_public_key]} if pinned else {}
    with sdk_of(platform, **options) as sdk:
        worker = sdk.create_task_worker()
        worker.on_task("*", seen)
        worker.start()
        error = platform.wait(platform.submit("plan", {}, AGENT, tool="search"), GUARD)["error"]
        assert error["code"] == ("policy_unavailable" if pinned else "policy_denied")
        assert pinned or error["details"]["rule"] == "policy.unknown_key"
        without = platform.wait(platform.submit("plan", {}, AGENT), GUARD)
        assert (without["status"] == "completed") == (not pinned)


@pytest.mark.parametrize(
    "content",
    [{"Statement": [{"Effect": "Deny"}]}, {"policy": {"rules": []}, "kind": "x"}],
    ids=["Statement", "policy"],
)
@pytest.mark.parametrize("pinned", [False, True])
def test_another_format(scripted: Scripted, content: Dict[str, Any], pinned: bool) -> None:
    """A content of another format is refused by what it holds, and denies as long as there was no other policy."""
    Served(scripted, OWNER.policy(1, content))
    keys = [OWNER.public] if pinned else []
    with PolicyClient(scripted.url, api_key="k", trusted_policy_keys=keys) as client:
        with PolicyGateway(client, "ws") as gateway:
            with pytest.raises(PolicyIntegrityError, match=f"has '{next(iter(content))}'.*another format"):
                gateway.refresh()
            with pytest.raises(PolicyUnavailableError):
                gateway.check_capability("plan")


# -- credentials ------------------------------------------------------------------------------------------------------


def test_the_fingerprint_goes_with_each_api_key(
    scripted: Scripted,
    clean_environment: pytest.MonkeyPatch,  # noqa: F811
    tmp_path: Path,
) -> None:
    """Whatever sends the API key sends the device's fingerprint with it: clients, a Beacon, the command line."""
    variables = {"API_URL": scripted.url, "API_KEY": "sk_live_1", "DEVICE_FINGERPRINT": "device-7", "AGENT_ID": AGENT}
    for name, value in {**variables, "WORKSPACE_ID": "ws"}.items():
        clean_environment.setenv(f"SEKUIRE_{name}", value)
    clean_environment.chdir(tmp_path)
    Served(scripted, OWNER.policy(1))
    options: Dict[str, Any] = {"api_base_url": scripted.url, "api_key": "sk_live_1", "device_fingerprint": "device-7"}
    with PolicyClient(**options) as client:
        client.fetch_active_policy("ws")
    with Beacon(AGENT, **options):
        pass
    with SekuireSDK.from_env() as sdk:
        sdk.log("health")
    assert main(["policy", "verify"]) == 0
    main(["send", "plan", "{}"])
    main(["doctor"])
    sent = [request for requests in scripted.requests.values() for request in requests]
    with_key = [request for request in sent if "X-API-Key" in request.headers]
    assert {request.name for request in with_key} >= {"policy", "recover", "unknown"}
    assert len(with_key) >= 6
    assert {request.headers["X-Device-Fingerprint"] for request in with_key} == {"device-7"}
    assert not [one for one in sent if "X-API-Key" not in one.headers and "X-Device-Fingerprint" in one.headers]


def test_a_token_is_compared_with_a_str(scripted: Scripted, sdk_of: Make) -> None:  # noqa: F811
    """People compare what the login brought with a text."""
    store = RuntimeCredentialsStore()
    with sdk_of(scripted, credentials_store=store):
        assert store.current.runtime_token == "rt-1"
        assert store.current.runtime_token != "rt-2"
        assert store.current == RuntimeCredentials(
            installation_id="inst-1", runtime_token="rt-1", refresh_token="rf-1", workspace_id="ws"
        )


# -- variables, identity, manifest ------------------------------------------------------------------------------------


def test_a_platform_in_another_container(
    scripted: Scripted,
    clean_environment: pytest.MonkeyPatch,  # noqa: F811
) -> None:
    """SEKUIRE_ALLOW_INSECURE_HTTP lets an agent log in at http://host.docker.internal."""
    port = int(scripted.url.rpartition(":")[2])
    resolve = socket.getaddrinfo

    def resolved(host: Any, *args: Any, **options: Any) -> Any:
        return resolve("127.0.0.1" if host == "host.docker.internal" else host, *args, **options)

    clean_environment.setattr(socket, "getaddrinfo", resolved)
    for name, value in {
        "API_URL": f"http://host.docker.internal:{port}",
        "AGENT_ID": AGENT,
        "INSTALL_TOKEN": "skt_1",
        "ALLOW_INSECURE_HTTP": "1",
    }.items():
        clean_environment.setenv(f"SEKUIRE_{name}", value)
    with SekuireSDK.from_env(proxies={}) as sdk:
        assert sdk.is_connected()
    assert scripted.of("bootstrap")[0].headers["Host"] == f"host.docker.internal:{port}"


@pytest.mark.parametrize("name", ["SEKUIRE_SERVICE_HOST", "SEKUIRE_PORT_80_TCP_ADDR", "SEKUIRE_INSTAL_TOKEN"])
def test_an_unknown_variable_costs_no_login(
    scripted: Scripted,
    clean_environment: pytest.MonkeyPatch,  # noqa: F811
    caplog: pytest.LogCaptureFixture,
    name: str,
) -> None:
    """A misspelt variable is a warning and Kubernetes' service links are none; the agent logs in all the same."""
    for variable, value in (("API_URL", scripted.url), ("AGENT_ID", AGENT), ("INSTALL_TOKEN", "skt_1")):
        clean_environment.setenv(f"SEKUIRE_{variable}", value)
    clean_environment.setenv(name, "x")
    with SekuireSDK.from_env() as sdk:
        assert sdk.is_connected()
    warned = [record.getMessage() for record in caplog.records if name in record.getMessage()]
    assert warned == (
        [f"unknown environment variable {name}; did you mean SEKUIRE_INSTALL_TOKEN?"] if "INSTAL_" in name else []
    )


@pytest.mark.parametrize("registered", [None, "agent-of-the-manifest"])
def test_the_agent_of_a_manifest(
    scripted: Scripted,
    clean_environment: pytest.MonkeyPatch,  # noqa: F811
    tmp_path: Path,
    registered: Optional[str],
) -> None:
    """An SDK from a manifest logs in as the agent that it names, or else under the id that its identity yields."""
    clean_environment.setenv("SEKUIRE_API_URL", scripted.url)
    clean_environment.setenv("SEKUIRE_INSTALL_TOKEN", "skt_1")
    (tmp_path / "prompt.md").write_text("\nBe kind.\n")
    (tmp_path / "tools.json").write_text('[ {"name": "search"} ]')
    named = "" if registered is None else f", sekuire_id: {registered}"
    (tmp_path / "sekuire.yml").write_text(
        f"project: {{name: helper{named}}}\n"
        "identity: {model: gpt-4o, system_prompt_path: ./prompt.md, tools_path: ./tools.json}\n"
        "capabilities: {provides: [plan]}\n"
    )
    bodies: List[Any] = []

    def answer(request: Request) -> Any:
        bodies.append(request.json)
        return 201, grant()

    scripted.on["bootstrap"] = answer
    sdk = SekuireSDK.from_manifest(tmp_path / "sekuire.yml")
    with sdk:
        assert sdk.is_connected()
    expected = registered or sekuire_id(model="gpt-4o", system_prompt="Be kind.", tools=[{"name": "search"}])
    assert (bodies[0]["agent_id"], bodies[0]["capabilities"]) == (expected, ["plan"])


def test_the_documented_spellings(
    scripted: Scripted,
    clean_environment: pytest.MonkeyPatch,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """``policy validate``, ``--out`` and ``--backend`` are accepted as documented."""
    Served(scripted, OWNER.policy(3))
    clean_environment.setenv("SEKUIRE_API_KEY", "sk_live_1")
    file = tmp_path / "policy.json"
    source = ["--backend", scripted.url, "--workspace", "ws"]
    assert main(["policy", "pull", "--out", str(file), *source]) == 0
    assert main(["policy", "validate", *source]) == 0
    assert main(["policy", "validate", "--file", str(file)]) == 0
    assert "policy pol-1 of ws, version 3 is good" in capsys.readouterr().out
