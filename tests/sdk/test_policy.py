"""SekuireSDK and policies: the gateway it makes by itself, and the errors where it cannot."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List

import pytest

from sekuire import PolicyClient, PolicyGateway, RuntimeCredentialsStore, SekuireSDK
from sekuire.errors import ConfigurationError, PolicyUnavailableError, SekuireError
from sekuire.policy import client as client_module

from ..conftest import AGENT
from ..policy.signing import Served, Signer, denying
from ..support.scripted import Scripted, grant
from ..support.waiting import GUARD, until
from .test_sdk import Make, clean_environment, echo, sdk_of  # noqa: F401

WORKSPACE = "ws_local"
OWNER = Signer(1)


def run(platform: Any, capability: str = "echo") -> Dict[str, Any]:
    found: Dict[str, Any] = platform.wait(platform.submit(capability, {}, AGENT), GUARD)
    return found


@pytest.mark.parametrize("given", [True, False])
def test_it_makes_a_gateway(platform: Any, sdk_of: Make, given: bool) -> None:  # noqa: F811
    """The workspace given, or else the one that the login tells, has its policy enforced by every worker."""
    platform.set_policy(WORKSPACE, denying("drop"))
    options = {"workspace_id": WORKSPACE} if given else {}
    with sdk_of(platform, trusted_policy_keys=[platform.policy_public_key], **options) as sdk:
        workers = [sdk.create_task_worker(policy_required=True) for _ in range(2)]
        for worker, name in zip(workers, ("keep", "drop")):
            worker.on_task(name, echo)
            worker.start()
        assert run(platform, "keep")["status"] == "completed"
        assert run(platform, "drop")["error"]["code"] == "policy_denied"
        assert isinstance(sdk.policy_gateway, PolicyGateway)
        assert sdk.policy_gateway.policy is not None
        assert sdk.policy_gateway.policy.origin == "pinned"
        until(lambda: platform.heartbeats(platform.installations()[0]["installation_id"])[-1].get("policy_hash"))


def test_a_refused_token_is_renewed_once(platform: Any, sdk_of: Make) -> None:  # noqa: F811
    """A policy fetch that meets a 401 renews the token as every call does."""
    platform.set_policy(WORKSPACE, denying("drop"))
    with sdk_of(platform, heartbeat_interval=1000.0) as sdk:
        until(lambda: sdk.policy_gateway.policy is not None)
        platform.expire_tokens()
        platform.set_policy(WORKSPACE, {})
        sdk.policy_gateway.refresh()
        assert sdk.policy_gateway.policy.version == 2
        assert platform.count("refresh", 200) == 1


def test_the_disk(platform: Any, sdk_of: Make, tmp_path: Path) -> None:  # noqa: F811
    """policy_path keeps the policy for the next run."""
    platform.set_policy(WORKSPACE, denying("drop"))
    path = tmp_path / "policy.json"
    with sdk_of(platform, policy_path=path) as sdk:
        until(lambda: sdk.policy_gateway.policy is not None)
    assert WORKSPACE in path.read_text()


def test_without_a_workspace(
    scripted: Scripted,
    sdk_of: Make,  # noqa: F811
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Where nobody tells the workspace nothing is enforced; a platform that names a policy makes that an ERROR."""
    scripted.on["bootstrap"] = lambda request: (201, grant(workspace_id=None))
    Served(scripted).beat = {"active_policy_hash": "ab" * 32}
    with sdk_of(scripted) as sdk:
        worker = sdk.create_task_worker()
        worker.on_task("echo", lambda ctx, input: ctx.policy is None)
        worker.start()
        scripted.task("t1")
        assert scripted.completion("t1")["output"] is True
        until(lambda: any("names an active policy" in record.message for record in caplog.records))
        with pytest.raises(ConfigurationError, match="SEKUIRE_WORKSPACE_ID"):
            sdk.policy_gateway.refresh()
        required = sdk.create_task_worker(policy_required=True)
        required.on_task("echo", echo)
        with pytest.raises(SekuireError, match="workspace is not known"):
            required.start(block=True)
    errors = [record for record in caplog.records if "names an active policy" in record.message]
    # One for each worker; the second may have stopped before a heartbeat told it.
    assert {record.levelname for record in errors} == {"ERROR"}
    assert len(errors) <= 2
    assert "SEKUIRE_WORKSPACE_ID" in errors[0].message


def test_without_the_extra(
    platform: Any,
    sdk_of: Make,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Without the extra nothing is enforced, the log says how to mend it, and what asks for a policy is refused."""
    monkeypatch.setattr(client_module, "missing_packages", lambda: ("blake3",))
    platform.set_policy(WORKSPACE, denying("echo"))
    with sdk_of(platform) as sdk:
        assert sdk.policy_gateway is None
        worker = sdk.create_task_worker()
        worker.on_task("echo", echo)
        worker.start()
        assert run(platform)["status"] == "completed"
        until(lambda: any("pip install 'sekuire[policy]'" in record.message for record in caplog.records))
        required = sdk.create_task_worker(policy_required=True)
        required.on_task("echo", echo)
        with pytest.raises(ConfigurationError, match="policy_required"):
            required.start()
    for option in (
        {"trusted_policy_keys": [OWNER.public]},
        {"policy_path": "x"},
        {"policy_options": {"on_change": "cancel"}},
    ):
        with pytest.raises(ConfigurationError, match="pip install"):
            sdk_of(platform, **option)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"trusted_policy_keys": ["abcd"]}, "trusted_policy_keys"),
        ({"policy_path": "/no/such/directory/policy.json"}, "policy_path"),
        ({"policy_options": {"on_chang": "x"}}, "policy_options: has no 'on_chang'"),
        ({"policy_options": {"on_change": "x"}}, "on_change"),
        ({"policy_options": {"storage_uri": "nonsense://"}}, "storage_uri"),
        ({"policy_options": {"warn_only": True}}, "warn_only: is refused in production"),
        ({"policy_options": {"warn_only": True, "environment": "test"}}, "policy_options: has no 'environment'"),
    ],
)
def test_wrong_options(scripted: Scripted, sdk_of: Make, options: Any, match: str) -> None:  # noqa: F811
    """A wrong option is told at construction, by name."""
    with pytest.raises(ConfigurationError, match=match):
        sdk_of(scripted, **options)


def test_options_of_the_gateway(platform: Any, sdk_of: Make) -> None:  # noqa: F811
    """policy_options reach the gateway."""
    platform.set_policy(WORKSPACE, denying("echo"))
    heard: List[Any] = []
    with sdk_of(platform, policy_options={"on_violation": heard.append}) as sdk:
        worker = sdk.create_task_worker()
        worker.on_task("echo", echo)
        worker.start()
        task = run(platform)
        assert task["error"]["code"] == "policy_denied"
        assert sdk.audit.flush(GUARD)
        (noted,) = [one["event_data"] for one in platform.logs() if one["event_type"] == "policy_violation"]
    assert [error.rule for error in heard] == ["capability.blocked"]
    assert (noted["kind"], noted["target"], noted["task_id"]) == ("capability", "echo", task["task_id"])
    assert noted["allowed"] is False


def test_a_gateway_of_the_user_s_own(platform: Any, sdk_of: Make) -> None:  # noqa: F811
    """A gateway that was given is used, and stays its maker's to close; options for another one are refused."""
    platform.set_policy(WORKSPACE, denying("echo"))
    store = RuntimeCredentialsStore()
    client = PolicyClient(platform.url, credentials_store=store)
    with client, PolicyGateway(client, WORKSPACE) as gateway:
        with sdk_of(platform, policy_gateway=gateway, credentials_store=store) as sdk:
            worker = sdk.create_task_worker()
            worker.on_task("echo", echo)
            worker.start()
            assert run(platform)["error"]["code"] == "policy_denied"
            assert sdk.policy_gateway is gateway
        assert not gateway.loader.is_closed
        with pytest.raises(ConfigurationError, match="trusted_policy_keys: belongs to the PolicyClient"):
            sdk_of(platform, policy_gateway=gateway, trusted_policy_keys=[OWNER.public])


def test_keys_from_the_environment(
    platform: Any,
    clean_environment: pytest.MonkeyPatch,  # noqa: F811
) -> None:
    """from_env() pins the keys of SEKUIRE_POLICY_PUBLIC_KEYS; a wrong one is told by the variable's name."""
    setenv = clean_environment.setenv
    setenv("SEKUIRE_API_URL", platform.url)
    setenv("SEKUIRE_AGENT_ID", AGENT)
    setenv("SEKUIRE_INSTALL_TOKEN", platform.create_install_token(AGENT))
    setenv("SEKUIRE_POLICY_PUBLIC_KEYS", f"{OWNER.public} ,, {platform.policy_public_key}")
    platform.set_policy(WORKSPACE, {})
    with SekuireSDK.from_env() as sdk:
        until(lambda: sdk.policy_gateway.policy is not None)
        assert sdk.policy_gateway.policy.origin == "pinned"
    # A gateway of one's own has its own keys.
    client = PolicyClient(platform.url, api_key=platform.api_key)
    gateway = PolicyGateway(client, WORKSPACE)
    SekuireSDK.from_env(policy_gateway=gateway).shutdown()
    client.close()
    setenv("SEKUIRE_POLICY_PUBLIC_KEYS", "nonsense")
    with pytest.raises(ConfigurationError, match="environment variable SEKUIRE_POLICY_PUBLIC_KEYS"):
        SekuireSDK.from_env()


def test_a_forged_policy_keeps_a_worker_from_starting(scripted: Scripted, sdk_of: Make) -> None:  # noqa: F811
    """policy_required with a policy by another key than the pinned one: it does not start."""
    Served(scripted, Signer(2).policy(1))
    with sdk_of(scripted, trusted_policy_keys=[OWNER.public]) as sdk:
        worker = sdk.create_task_worker(policy_required=True)
        worker.on_task("echo", echo)
        with pytest.raises(PolicyUnavailableError, match="not pinned"):
            worker.start(block=True)


_CORE = """
import importlib.util, sys
find = importlib.util.find_spec
gone = ("blake3", "cryptography", "rfc8785", "limits")
importlib.util.find_spec = lambda name, *more: None if name.partition(".")[0] in gone else find(name, *more)
for name in gone:
    sys.modules[name] = None
import sekuire
assert not any(name.startswith("sekuire.policy") for name in sys.modules)
from sekuire import Policy, PolicyClient, PolicyEnforcer, PolicyGateway
PolicyEnforcer(Policy.from_content({})).enforce_tool("x")
try:
    PolicyClient("http://127.0.0.1:1", api_key="k")
except sekuire.errors.ConfigurationError as error:
    print(error)
sdk = sekuire.SekuireSDK("a", api_base_url="http://127.0.0.1:1", install_token="t")
print(sdk.policy_gateway)
assert "PolicyGateway" in dir(sekuire)
try:
    sekuire.PolicyGatewayy
except AttributeError as error:
    print(error)
"""


def test_the_core_alone(tmp_path: Path) -> None:
    """The names can be imported without the extra, and are loaded when they are used; using them names the extra."""
    done = subprocess.run([sys.executable, "-c", _CORE], capture_output=True, text=True, check=True, cwd=tmp_path)
    first, second, third = done.stdout.splitlines()
    assert "pip install 'sekuire[policy]'" in first
    assert second == "None"
    assert "PolicyGatewayy" in third


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("pinned", [True, False])
def test_the_workspace_is_learned_once(
    scripted: Scripted,
    sdk_of: Make,  # noqa: F811
    given: bool,
    pinned: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A refresh that names another workspace changes nothing, and is one ERROR, however often it comes."""
    served = Served(scripted, OWNER.policy(1, denying("drop"), workspace_id="ws"))
    usual = scripted.on["policy"]
    elsewhere: List[str] = []

    def policy(request: Any) -> Any:
        if "/ws/" in request.path:
            return usual(request)
        elsewhere.append(request.path)
        return 404, {"error": "not_found", "code": "POLICY_NOT_FOUND", "message": "no policy"}

    dead: List[str] = []

    def beat(request: Any) -> Any:
        token = request.headers["Authorization"]
        if token not in dead and len(dead) < 3:
            dead.append(token)
        if token in dead:
            return 401, {"error": "unauthorized", "message": "x"}
        return 200, served.beat

    fresh = iter(range(2, 100))
    scripted.on["policy"] = policy
    scripted.on["refresh"] = lambda request: (200, grant(f"rt-{next(fresh)}", workspace_id="ws-2"))
    options = {"workspace_id": "ws"} if given else {}
    if pinned:
        options["trusted_policy_keys"] = [OWNER.public]
    with sdk_of(scripted, heartbeat_interval=0.05, **options) as sdk:
        until(lambda: sdk.policy_gateway.policy is not None)
        scripted.on["heartbeat"] = beat
        until(lambda: len(dead) == 3 and sdk.is_connected())
        before = served.count
        served.beat = {"active_policy_hash": "ab" * 32}
        until(lambda: served.count > before)
        assert sdk.installation_credentials.workspace_id == "ws"
        assert sdk.policy_gateway.policy.version == 1
        worker = sdk.create_task_worker(policy_required=True)
        worker.on_task("*", echo)
        worker.start()
        scripted.task("t1", "drop")
        assert scripted.completion("t1")["error"]["code"] == "policy_denied"
    assert elsewhere == []
    errors = [record for record in caplog.records if "names the workspace ws-2" in record.getMessage()]
    assert [record.levelname for record in errors] == ["ERROR"]
