"""A Worker under a policy: the local platform signs, a PolicyGateway decides, over real HTTP."""

from __future__ import annotations

import threading
from typing import Any, Callable, Dict, Iterator, List

import pytest

from sekuire import PolicyClient, PolicyGateway, RuntimeCredentialsStore, TaskContext, Worker
from sekuire.errors import PolicyUnavailableError, PolicyViolationError
from sekuire.policy import loader as loader_module
from sekuire.policy.enforcer import PolicyEnforcer

from ..conftest import AGENT
from ..policy.signing import Served, Signer, denying
from ..support.scripted import Blackhole, Scripted
from ..support.waiting import GUARD, until

Make = Callable[..., Worker]
WORKSPACE = "ws_local"
OWNER = Signer(1)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader_module, "_RETRY_MIN", 0.01)
    monkeypatch.setattr(loader_module, "_RETRY_MAX", 0.05)


@pytest.fixture
def gateway_of() -> Iterator[Callable[..., Any]]:
    """A gateway for a platform, which shares its credentials with a worker by a store."""
    made: List[Any] = []

    def make(platform: Any, workspace_id: str = WORKSPACE, client: Any = None, **options: Any) -> PolicyGateway:
        store = RuntimeCredentialsStore()
        fetcher = PolicyClient(platform.url, credentials_store=store, **(client or {}))
        gateway = PolicyGateway(fetcher, workspace_id, **options)
        made.extend((gateway, fetcher))
        return gateway

    yield make
    for one in made:
        one.close()


def store_of(gateway: PolicyGateway) -> Any:
    return gateway.client._source._store  # type: ignore[attr-defined]


def worker_under(gateway: PolicyGateway, platform: Any, worker_of: Make, **options: Any) -> Worker:
    issue = getattr(platform, "create_install_token", lambda agent: "skt-1")
    return worker_of(
        platform,
        policy_gateway=gateway,
        credentials_store=store_of(gateway),
        install_token=issue(AGENT),
        **{"heartbeat_interval": 0.05, **options},
    )


def result(platform: Any, capability: str = "echo", input: Any = None) -> Dict[str, Any]:
    found: Dict[str, Any] = platform.wait(platform.submit(capability, input or {}, AGENT), GUARD)
    return found


def test_a_policy_decides_over_tasks(platform: Any, worker_of: Make, gateway_of: Callable[..., Any]) -> None:
    """Denied capabilities are answered policy_denied; a new policy counts from the next task on; no restart."""
    platform.set_policy(WORKSPACE, denying("drop"))
    gateway = gateway_of(platform, client={"trusted_policy_keys": [platform.policy_public_key]})
    worker = worker_under(gateway, platform, worker_of)
    ran: List[str] = []
    worker.on_task("*", lambda ctx, input: ran.append(ctx.capability))
    with worker:
        assert result(platform, "keep")["status"] == "completed"
        denied = result(platform, "drop")["error"]
        assert (denied["code"], denied["retryable"]) == ("policy_denied", False)
        assert denied["details"] == {"rule": "capability.blocked"}
        installation = platform.installations()[0]["installation_id"]
        changed = platform.set_policy(WORKSPACE, denying("keep"))
        # The platform hears which policy is in force.
        until(lambda: platform.heartbeats(installation)[-1].get("policy_hash") == changed["hash"])
        assert result(platform, "keep")["error"]["code"] == "policy_denied"
        assert result(platform, "drop")["status"] == "completed"
    assert ran == ["keep", "drop"]
    assert worker.stats().rejected == 2


def test_rate_limits(platform: Any, worker_of: Make, gateway_of: Callable[..., Any]) -> None:
    """A task beyond the limit is answered rate_limited, retryable, with the seconds to wait."""
    platform.set_policy(WORKSPACE, {"rate_limits": {"requests": {"max_per_minute": 2}}})
    worker = worker_under(gateway_of(platform), platform, worker_of)
    worker.on_task("echo", lambda ctx, input: None)
    with worker:
        assert [result(platform)["status"] for _ in range(2)] == ["completed"] * 2
        refused = result(platform)["error"]
    assert (refused["code"], refused["retryable"]) == ("rate_limited", True)
    assert refused["details"]["rule"] == "rate_limit.requests_per_minute"
    assert 0 < refused["details"]["retry_after"] <= 60


def test_handlers_have_the_enforcer(platform: Any, worker_of: Make, gateway_of: Callable[..., Any]) -> None:
    """ctx.policy answers finer questions; a violation that is let pass is the task's failure."""
    platform.set_policy(WORKSPACE, {"permissions": {"tools": {"blocked_tools": ["shell"]}}})
    worker = worker_under(gateway_of(platform), platform, worker_of)
    seen: List[Any] = []

    def use(ctx: TaskContext, input: Any) -> None:
        seen.append(ctx.policy)
        ctx.policy.enforce_tool(input["tool"])

    worker.on_task("use", use)
    with worker:
        assert result(platform, "use", {"tool": "search"})["status"] == "completed"
        assert result(platform, "use", {"tool": "shell"})["error"]["details"] == {"rule": "tool.blocked"}
    assert isinstance(seen[0], PolicyEnforcer)


def test_without_a_gateway_there_is_no_enforcer(platform: Any, worker_of: Make) -> None:
    """ctx.policy is None where no gateway was given."""
    worker = worker_of(platform)
    worker.on_task("echo", lambda ctx, input: ctx.policy is None)
    with worker:
        assert result(platform)["output"] is True


def test_a_workspace_without_a_policy(platform: Any, worker_of: Make, gateway_of: Callable[..., Any]) -> None:
    """404: everything is allowed, and the handler's enforcer says so too."""
    worker = worker_under(gateway_of(platform), platform, worker_of)
    worker.on_task("echo", lambda ctx, input: ctx.policy.enforce_tool("anything"))
    with worker:
        assert result(platform)["status"] == "completed"


@pytest.mark.parametrize("on_change", ["continue", "cancel"])
def test_a_change_and_a_running_task(
    platform: Any, worker_of: Make, gateway_of: Callable[..., Any], on_change: str
) -> None:
    """Running tasks go on under the policy they began with; with "cancel" those not allowed any more are cancelled."""
    platform.set_policy(WORKSPACE, {})
    gateway = gateway_of(platform, on_change=on_change)
    worker = worker_under(gateway, platform, worker_of)
    begun = {name: threading.Event() for name in ("drop", "keep")}
    go = threading.Event()
    reasons: Dict[str, Any] = {}

    def work(ctx: TaskContext, input: Any) -> int:
        begun[ctx.capability].set()
        if on_change == "cancel" and ctx.capability == "drop":
            assert ctx.wait_cancelled(GUARD)
            reasons[ctx.capability] = ctx.cancel_reason
            ctx.raise_if_cancelled()
        assert go.wait(GUARD)
        reasons[ctx.capability] = ctx.cancel_reason
        return int(ctx.policy.policy.version)

    worker.on_task("*", work)
    with worker:
        tasks = {name: platform.submit(name, {}, AGENT) for name in begun}
        for event in begun.values():
            assert event.wait(GUARD)
        platform.set_policy(WORKSPACE, denying("drop"))
        until(lambda: gateway.policy is not None and gateway.policy.version == 2)
        if on_change == "cancel":
            cancelled = platform.wait(tasks["drop"], GUARD)["error"]
            assert (cancelled["code"], cancelled["message"]) == ("cancelled", "policy changed")
        go.set()
        assert platform.wait(tasks["keep"], GUARD)["output"] == 1
        if on_change == "continue":
            assert platform.wait(tasks["drop"], GUARD)["output"] == 1
    assert reasons == {"keep": None, "drop": "policy changed" if on_change == "cancel" else None}
    assert gateway.in_force.listener_count == 0


def test_a_policy_swapped_under_load(platform: Any, worker_of: Make, gateway_of: Callable[..., Any]) -> None:
    """While two policies alternate, each denying what the other allows, every task is decided by one of them."""
    contents = {True: denying("left", "both"), False: denying("right", "both")}
    platform.set_policy(WORKSPACE, contents[True])
    gateway = gateway_of(platform)
    worker = worker_under(gateway, platform, worker_of, heartbeat_interval=0.02)
    wrong: List[str] = []

    def check(ctx: TaskContext, input: Any) -> None:
        version = ctx.policy.policy.version
        if ctx.capability == "both" or (version % 2 == 1) != (ctx.capability == "right"):
            wrong.append(f"{ctx.capability} ran under version {version}")

    worker.on_task("*", check)
    with worker:
        tasks = []
        for number in range(60):
            if number % 6 == 5:
                version = platform.policy(WORKSPACE)["version"] + 1
                platform.set_policy(WORKSPACE, contents[version % 2 == 1])
                until(lambda version=version: gateway.policy.version == version)  # type: ignore[misc]
            tasks += [platform.submit(name, {}, AGENT) for name in ("left", "right", "both")]
        answers = [platform.wait(one, GUARD) for one in tasks]
    assert wrong == []
    assert {one["status"] for one in answers} == {"completed", "failed"}
    assert all(one["status"] == "completed" or one["error"]["code"] == "policy_denied" for one in answers)
    assert [one["status"] for one in answers if one["capability"] == "both"] == ["failed"] * 60


# -- the tool that a task names --------------------------------------------------------------------------------------


def test_a_blocked_tool_denies_the_task(scripted: Scripted, worker_of: Make, gateway_of: Callable[..., Any]) -> None:
    """A task's ``tool`` is checked like its capability, before the handler, by either name of the field."""
    content = {"permissions": {"tools": {"blocked_tools": ["shell"], "allowed_tools": ["*"]}}}
    Served(scripted, OWNER.policy(1, content, workspace_id="ws"))
    ran: List[Any] = []
    worker = worker_under(gateway_of(scripted, "ws"), scripted, worker_of)
    worker.on_task("echo", lambda ctx, input: ran.append(ctx.task_id))
    with worker:
        for number, fields in enumerate(({"tool": "shell"}, {"target_tool": "SHELL"}, {"tool": ""})):
            scripted.task(f"t{number}", **fields)
            error = scripted.completion(f"t{number}")["error"]
            assert error["code"] == "policy_denied"
            assert error["details"]["rule"] == ("tool.blocked" if number < 2 else "tool.not_allowed")
        for number, fields in enumerate(({"tool": "read"}, {})):
            scripted.task(f"good{number}", **fields)
            assert scripted.completion(f"good{number}")["status"] == "completed"
    assert ran == ["good0", "good1"]


@pytest.mark.parametrize("method", ["check_tool", "check_task"])
def test_a_gateway_of_the_user_s_own_is_asked_about_tools(scripted: Scripted, worker_of: Make, method: str) -> None:
    """By check_task(capability, tool) where it has that, else by check_tool(name)."""

    class Own:
        def check_request(self) -> None: ...

        def check_capability(self, name: str) -> None: ...

        def on_heartbeat_response(self, response: Any) -> None: ...

    def refuse(*asked: Any) -> None:
        if asked[-1] == "shell":
            raise PolicyViolationError("tool.blocked", "no shell")

    gateway = Own()
    setattr(gateway, method, refuse)
    worker = worker_of(scripted, policy_gateway=gateway, install_token="skt-1")
    worker.on_task("echo", lambda ctx, input: None)
    with worker:
        scripted.task("t1", tool="shell")
        assert scripted.completion("t1")["error"]["code"] == "policy_denied"
        scripted.task("t2", tool="read")
        assert scripted.completion("t2")["status"] == "completed"
        scripted.task("t3")
        assert scripted.completion("t3")["status"] == "completed"


# -- loading at the start ---------------------------------------------------------------------------------------------


def test_the_first_task_waits_for_the_policy(
    scripted: Scripted, worker_of: Make, gateway_of: Callable[..., Any]
) -> None:
    """The policy is loaded after the login and before the stream is opened."""
    served = Served(scripted, OWNER.policy(1, denying("echo"), workspace_id="ws"))
    order: List[str] = []
    for name in ("policy", "stream"):
        usual = scripted.on.get(name, scripted.stream)
        scripted.on[name] = lambda request, name=name, usual=usual: (order.append(name), usual(request))[1]  # type: ignore
    worker = worker_under(gateway_of(scripted, "ws"), scripted, worker_of)
    worker.on_task("echo", lambda ctx, input: None)
    with worker:
        scripted.task("t1")
        assert scripted.completion("t1")["error"]["code"] == "policy_denied"
    assert order == ["policy", "stream"]
    assert served.count == 1


def test_an_outage_at_the_start(scripted: Scripted, worker_of: Make, gateway_of: Callable[..., Any]) -> None:
    """Without a policy tasks are answered policy_unavailable, retryable, until one could be loaded."""
    served = Served(scripted, 400)
    worker = worker_under(gateway_of(scripted, "ws"), scripted, worker_of)
    worker.on_task("echo", lambda ctx, input: None)
    with worker:
        scripted.task("t1")
        error = scripted.completion("t1")["error"]
        assert (error["code"], error["retryable"]) == ("policy_unavailable", True)
        served.policy = OWNER.policy(1, workspace_id="ws")
        until(lambda: worker.config.policy_gateway.policy)
        scripted.task("t2")
        assert scripted.completion("t2")["status"] == "completed"


@pytest.mark.parametrize("served", [400, None, "forged"])
def test_a_required_policy(scripted: Scripted, worker_of: Make, gateway_of: Callable[..., Any], served: Any) -> None:
    """With policy_required=True a worker does not start where no policy could be loaded, or there is none."""
    Served(scripted, Signer(2).policy(1, workspace_id="ws") if served == "forged" else served)
    gateway = gateway_of(scripted, "ws", client={"trusted_policy_keys": [OWNER.public]})
    worker = worker_under(gateway, scripted, worker_of, policy_required=True)
    worker.on_task("echo", lambda ctx, input: None)
    with pytest.raises(PolicyUnavailableError, match="policy_required=True"):
        worker.start(block=True)
    assert scripted.count("stream") == 0


def test_a_required_policy_that_is_withdrawn(
    scripted: Scripted, worker_of: Make, gateway_of: Callable[..., Any]
) -> None:
    """policy_required=True holds after the start too: "no policy" changes nothing."""
    served = Served(scripted, OWNER.policy(1, denying("drop"), workspace_id="ws"))
    gateway = gateway_of(scripted, "ws")
    worker = worker_under(gateway, scripted, worker_of, policy_required=True)
    worker.on_task("*", lambda ctx, input: None)
    with worker:
        scripted.task("t1", "drop")
        assert scripted.completion("t1")["error"]["code"] == "policy_denied"
        served.policy = None
        before = served.count
        served.beat = {"active_policy_hash": "0" * 64}
        until(lambda: served.count >= before + 2)
        scripted.task("t2", "drop")
        assert scripted.completion("t2")["error"]["code"] == "policy_denied"
        assert gateway.policy is not None


def test_a_required_policy_that_is_there(platform: Any, worker_of: Make, gateway_of: Callable[..., Any]) -> None:
    """With a policy loaded it runs."""
    platform.set_policy(WORKSPACE, {})
    worker = worker_under(gateway_of(platform), platform, worker_of, policy_required=True)
    worker.on_task("echo", lambda ctx, input: 1)
    with worker:
        assert result(platform)["output"] == 1


def test_a_stop_while_the_policy_is_loaded(
    scripted: Scripted, blackhole: Blackhole, worker_of: Make, gateway_of: Callable[..., Any]
) -> None:
    """A stop does not wait for a policy."""
    scripted.on["policy"] = lambda request: (asked.set(), release.wait(GUARD), (400, {}))[2]  # type: ignore[func-returns-value]
    asked, release = threading.Event(), threading.Event()
    worker = worker_under(gateway_of(scripted, "ws"), scripted, worker_of, start_timeout=0.0)
    worker.on_task("echo", lambda ctx, input: 1)
    worker.start()
    assert asked.wait(GUARD)
    worker.stop()
    assert not worker.is_running()
    assert scripted.count("stream") == 0
    release.set()
