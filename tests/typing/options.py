"""Options as a user gives them. A line that ends with two codes is an error of mypy and of pyright; others are none."""
# pyright: strict

from __future__ import annotations

import pathlib
from typing import List

from sekuire import (
    Beacon,
    BeaconStatus,
    PolicyClient,
    PolicyGateway,
    ProcessExecutor,
    RuntimeCredentials,
    RuntimeCredentialsStore,
    SekuireSDK,
    Worker,
    WorkerConfig,
    create_worker,
)
from sekuire.secret import Secret

# -- what is right ----------------------------------------------------------------------------------------------------

stored = RuntimeCredentials(installation_id="i", runtime_token="t", refresh_token=Secret("t"))
store = RuntimeCredentialsStore(stored, path="credentials.json")
policies = PolicyClient("https://platform.test", api_key="key", credentials_store=store, token_provider=lambda: "token")
gateway = PolicyGateway(policies, "ws-1")
states: List[str] = []


def note(status: BeaconStatus) -> None:
    states.append(status.state)


class OwnGateway:
    """Decides by itself."""

    def check_request(self) -> None: ...

    def check_capability(self, name: str) -> None: ...

    def on_heartbeat_response(self, response: object) -> None: ...


worker: Worker = create_worker(
    agent_id="a",
    install_token="t",
    runtime_token=Secret("t"),
    capabilities=["one", "two"],
    heartbeat_interval=5,
    max_workers=4,
    max_queued=None,
    task_timeout=2.5,
    quiet=True,
    executor=ProcessExecutor(2),
    outbox=pathlib.Path("outbox.db"),
    verify=pathlib.Path("ca.pem"),
    client_cert=("cert.pem", pathlib.Path("key.pem")),
    proxies={},
    endpoints={"bootstrap": "/x"},
    policy_gateway=OwnGateway(),
    token_provider=lambda: "token",
)
config: WorkerConfig = WorkerConfig(agent_id="a", credentials_store=store, policy_gateway=gateway)
another: Worker = Worker(config)

sdk: SekuireSDK = SekuireSDK("a", install_token="t", policy_options={"on_change": "cancel"}, trusted_policy_keys=["k"])
loose: SekuireSDK = SekuireSDK("a", install_token="t", policy_signature="hash")
strict: PolicyClient = PolicyClient("https://platform.test", api_key="k", policy_signature="bound")
from_file: PolicyGateway = PolicyGateway.from_file("policy.json", policy_signature="hash")
from_variables: SekuireSDK = SekuireSDK.from_env(heartbeat_interval=30, quiet=True, policy_path="policy.json")
named: SekuireSDK = SekuireSDK.from_env(agent_id="a")
shared: Worker = sdk.create_task_worker(["one"], heartbeat_interval=10.0, max_workers=4, read_timeout=2)

with Beacon("a", install_token="t", on_status_change=note) as beacon:
    status: BeaconStatus = beacon.status

# -- an option that does not exist ------------------------------------------------------------------------------------

create_worker(agent_id="a", heartbeat_intervall=5)  # E: call-arg reportCallIssue
WorkerConfig(agent_id="a", heartbeat_intervall=5)  # E: call-arg reportCallIssue
Beacon("a", heartbeat_intervall=5)  # E: call-arg reportCallIssue
SekuireSDK("a", heartbeat_intervall=5)  # E: call-arg reportCallIssue
SekuireSDK.from_env(heartbeat_intervall=5)  # E: call-arg reportCallIssue
sdk.create_task_worker(heartbeat_intervall=5)  # E: call-arg reportCallIssue
PolicyClient(api_keey="k")  # E: call-arg reportCallIssue

# -- a value of another type ------------------------------------------------------------------------------------------

create_worker(agent_id="a", max_workers="4")  # E: arg-type reportArgumentType
create_worker(agent_id=5)  # E: arg-type reportArgumentType
create_worker(agent_id="a", install_token=5)  # E: arg-type reportArgumentType
create_worker(agent_id="a", capabilities=[5])  # E: list-item reportArgumentType
create_worker(agent_id="a", policy_gateway=5)  # E: arg-type reportArgumentType
create_worker(agent_id="a", credentials_store="file")  # E: arg-type reportArgumentType
create_worker(agent_id="a", token_provider="token")  # E: arg-type reportArgumentType
WorkerConfig(agent_id="a", max_workers="4")  # E: arg-type reportArgumentType
Worker("a")  # E: arg-type reportArgumentType
Beacon("a", heartbeat_interval="5")  # E: arg-type reportArgumentType
Beacon("a", on_status_change=5)  # E: arg-type reportArgumentType
SekuireSDK("a", auto_heartbeat="yes")  # E: arg-type reportArgumentType
create_worker(agent_id="a", quiet="yes")  # E: arg-type reportArgumentType
SekuireSDK.from_env(read_timeout="5")  # E: arg-type reportArgumentType
sdk.create_task_worker(max_workers="4")  # E: arg-type reportArgumentType
PolicyClient(api_base_url=5)  # E: arg-type reportArgumentType
RuntimeCredentials(runtime_token=5)  # E: arg-type reportArgumentType
PolicyClient(cache_ttl="5")  # E: arg-type reportArgumentType
PolicyClient(policy_signature="loose")  # E: arg-type reportArgumentType
SekuireSDK("a", policy_signature=True)  # E: arg-type reportArgumentType
SekuireSDK.from_env(policy_signature="loose")  # E: arg-type reportArgumentType
PolicyGateway.from_file("policy.json", policy_signature="loose")  # E: arg-type reportArgumentType

# -- an option that another object decides ----------------------------------------------------------------------------

create_worker(install_token="t")  # E: call-arg reportCallIssue
create_worker(agent_id="a", api_key="k")  # E: call-arg reportCallIssue
Beacon(install_token="t")  # E: call-arg reportCallIssue
SekuireSDK("a", on_status_change=note)  # E: call-arg reportCallIssue
sdk.create_task_worker(agent_id="a")  # E: call-arg reportCallIssue
sdk.create_task_worker(api_base_url="https://platform.test")  # E: call-arg reportCallIssue
sdk.create_task_worker(install_token="t")  # E: call-arg reportCallIssue
sdk.create_task_worker(runtime_token="t")  # E: call-arg reportCallIssue
sdk.create_task_worker(installation_id="i")  # E: call-arg reportCallIssue
sdk.create_task_worker(refresh_token="t")  # E: call-arg reportCallIssue
sdk.create_task_worker(credentials_store=store)  # E: call-arg reportCallIssue
sdk.create_task_worker(token_provider=lambda: "t")  # E: call-arg reportCallIssue
sdk.create_task_worker(policy_gateway=gateway)  # E: call-arg reportCallIssue
