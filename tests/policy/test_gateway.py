"""PolicyGateway over real HTTP: what decides, and how it stays the active policy."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path
from typing import Any, Callable, Iterator, List, Optional

import pytest

from sekuire import PolicyClient, PolicyGateway
from sekuire._internal.threads import Deadline
from sekuire.errors import (
    APIError,
    AuthenticationError,
    ConfigurationError,
    PolicyIntegrityError,
    PolicyUnavailableError,
    PolicyViolationError,
    SekuireError,
    TransportError,
)
from sekuire.policy import client as client_module
from sekuire.policy import loader as loader_module
from sekuire.policy.source import InstallationSource, Workspace
from sekuire.wire.models import HeartbeatReply

from ..support.scripted import Blackhole, Request, Scripted
from ..support.waiting import GUARD, client_threads, until
from .signing import WORKSPACE, Served, Signer, denying

Make = Callable[..., PolicyGateway]
OWNER, OTHER = Signer(1), Signer(2)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader_module, "_RETRY_MIN", 0.01)
    monkeypatch.setattr(loader_module, "_RETRY_MAX", 0.02)
    monkeypatch.setattr(client_module, "FETCH_TIMEOUT", 5.0)


@pytest.fixture
def served(scripted: Scripted) -> Served:
    return Served(scripted, OWNER.policy(1, denying("one")))


@pytest.fixture
def make(scripted: Scripted) -> Iterator[Make]:
    made: List[Any] = []

    def make(url: Optional[str] = None, client: Any = None, **options: Any) -> PolicyGateway:
        client = PolicyClient(url or scripted.url, api_key="k", **(client or {}))
        gateway = PolicyGateway(client, WORKSPACE, **options)
        made.extend((gateway, client))
        return gateway

    yield make
    for one in made:
        one.close()


class NamedLater(Workspace):
    """A workspace that the login may name later."""

    def __init__(self, name: Optional[str]) -> None:
        super().__init__(None)
        self.name = name

    @property
    def workspace_id(self) -> Optional[str]:
        return self.name


def version_of(gateway: PolicyGateway) -> Optional[int]:
    return None if gateway.policy is None else gateway.policy.version


def policy_threads() -> List[str]:
    return [thread.name for thread in client_threads() if thread.name == "sekuire-policy"]


# -- decisions --------------------------------------------------------------------------------------------------------


def test_it_decides(served: Served, make: Make) -> None:
    """The first question loads the policy; capabilities and request rates are decided by it."""
    served.policy = OWNER.policy(1, {**denying("no"), "rate_limits": {"requests": {"max_per_minute": 2}}})
    gateway = make()
    gateway.check_capability("yes")
    with pytest.raises(PolicyViolationError) as caught:
        gateway.check_capability("no")
    assert caught.value.rule == "capability.blocked"
    gateway.check_request()
    gateway.check_request()
    with pytest.raises(PolicyViolationError) as caught:
        gateway.check_request()
    assert caught.value.rule == "rate_limit.requests_per_minute"
    assert caught.value.retry_after is not None
    assert version_of(gateway) == 1
    assert served.count == 1


def test_a_denied_task_costs_no_request(served: Served, make: Make) -> None:
    """check_task() counts a task only where its capability is allowed, and tells who decided."""
    served.policy = OWNER.policy(1, {**denying("no"), "rate_limits": {"requests": {"max_per_minute": 1}}})
    gateway = make()
    for _ in range(3):
        with pytest.raises(PolicyViolationError, match="capability"):
            gateway.check_task("no")
    enforcer = gateway.check_task("yes")
    assert enforcer is gateway.enforcer
    assert enforcer is not None
    assert enforcer.policy is gateway.policy
    with pytest.raises(PolicyViolationError, match="rate_limit"):
        gateway.check_task("yes")


def test_no_policy_allows(served: Served, make: Make) -> None:
    """A workspace without a policy allows everything."""
    served.policy = None
    gateway = make()
    gateway.check_capability("one")
    gateway.check_request()
    gateway.enforcer.enforce_network("example.com", "http")
    assert gateway.policy is None


def test_never_loaded_denies(served: Served, make: Make, caplog: pytest.LogCaptureFixture) -> None:
    """Without any policy everything is denied, until one is loaded; the log says so once."""
    served.policy = 400
    gateway = make()
    with pytest.raises(PolicyUnavailableError, match="as the test says"):
        gateway.check_capability("x")
    served.scripted.wait_for("policy", 4)
    with pytest.raises(PolicyUnavailableError):
        gateway.check_request()
    with pytest.raises(PolicyUnavailableError):
        gateway.check_task("x")
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 1
    assert "every task is denied" in errors[0].message
    served.policy = OWNER.policy(1)
    until(lambda: gateway.policy)
    gateway.check_task("x")
    until(lambda: not policy_threads())


def test_never_loaded_allows_by_option(served: Served, make: Make) -> None:
    """on_unavailable="allow" lets tasks begin while none could be loaded."""
    served.policy = 400
    gateway = make(on_unavailable="allow")
    gateway.check_task("x")
    gateway.check_request()
    served.policy = OWNER.policy(1, denying("x"))
    until(lambda: gateway.policy)
    with pytest.raises(PolicyViolationError):
        gateway.check_task("x")


def test_a_first_question_has_a_time_limit(blackhole: Blackhole, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A platform that is silent does not hold a first decision for ever."""
    monkeypatch.setattr(client_module, "FETCH_TIMEOUT", 0.5)
    gateway = make(blackhole.url, {"read_timeout": 0.2})
    with pytest.raises(PolicyUnavailableError, match=r"no answer within 0\.05 s"):
        gateway.ensure_loaded(0.05)
    stop = threading.Event()
    stop.set()
    with pytest.raises(PolicyUnavailableError):
        gateway.ensure_loaded(GUARD, stop)
    with pytest.raises(PolicyUnavailableError):
        gateway.check_task("x")


def test_violations_are_told(served: Served, make: Make) -> None:
    """on_violation hears of what is denied."""
    heard: List[PolicyViolationError] = []
    gateway = make(on_violation=heard.append)
    with pytest.raises(PolicyViolationError):
        gateway.check_task("one")
    assert [error.rule for error in heard] == ["capability.blocked"]


# -- staying up to date -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_mapping", [False, True])
def test_a_heartbeat_names_a_new_policy(served: Served, make: Make, as_mapping: bool) -> None:
    """A heartbeat with another hash has the policy fetched in the background; with the same hash nothing is."""
    gateway = make()
    gateway.refresh()
    old = gateway.policy
    assert old is not None

    def beat(named: Optional[str]) -> None:
        gateway.on_heartbeat_response(
            {"active_policy_hash": named} if as_mapping else HeartbeatReply(active_policy_hash=named)
        )

    for named in (old.hash, old.hash.upper(), None):
        beat(named)
    assert policy_threads() == []
    assert served.count == 1
    served.policy = OWNER.policy(2, denying("two"))
    beat(served.policy["hash"])
    until(lambda: version_of(gateway) == 2)
    gateway.check_capability("one")
    with pytest.raises(PolicyViolationError):
        gateway.check_capability("two")
    until(lambda: not policy_threads())


def test_a_heartbeat_is_never_held_up(blackhole: Blackhole, make: Make) -> None:
    """on_heartbeat_response() returns while the platform is silent; so do decisions."""
    gateway = make(blackhole.url, {"read_timeout": 0.2}, on_unavailable="allow")
    gateway.loader.note("x")  # As if a first try had failed.
    for _ in range(100):
        gateway.on_heartbeat_response(HeartbeatReply(active_policy_hash="h"))
        gateway.check_task("x")
    assert policy_threads() == ["sekuire-policy"]
    gateway.client.close()


def test_a_policy_has_its_time(served: Served, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any heartbeat the policy is asked for again when cache_ttl is over, by the next decision."""
    now = [1000.0]
    monkeypatch.setattr(loader_module.time, "monotonic", lambda: now[0])
    gateway = make(client={"cache_ttl": 60.0})
    gateway.refresh()
    served.policy = OWNER.policy(2, denying("two"))
    now[0] += 50.0
    gateway.check_task("x")
    assert served.count == 1
    now[0] += 11.0
    # The decision that starts it does not wait for it.
    gateway.check_task("x")
    until(lambda: version_of(gateway) == 2)
    until(lambda: not policy_threads())
    assert served.count == 2
    now[0] += 61.0
    gateway.on_heartbeat_response(HeartbeatReply())
    served.scripted.wait_for("policy", 3)
    until(lambda: not policy_threads())


def test_a_hash_that_is_never_served(served: Served, make: Make) -> None:
    """A heartbeat that names what the platform does not serve costs one request, not a storm."""
    gateway = make()
    gateway.refresh()
    gateway.on_heartbeat_response(HeartbeatReply(active_policy_hash="ab" * 32))
    served.scripted.wait_for("policy", 2)
    until(lambda: not policy_threads())
    assert served.count == 2
    assert version_of(gateway) == 1


def test_a_removed_policy(served: Served, make: Make, caplog: pytest.LogCaptureFixture) -> None:
    """Without a pinned key a 404 later allows everything, with a warning."""
    gateway = make()
    gateway.refresh()
    served.policy = None
    assert gateway.refresh() is None
    gateway.check_capability("one")
    assert any("no policy any more" in record.message for record in caplog.records)


# -- outages and attacks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["status", "reset", "gone"])
def test_an_outage(served: Served, make: Make, how: str, caplog: pytest.LogCaptureFixture) -> None:
    """While the platform is down the last good policy decides; when it is back the new one does."""
    gateway = make()
    gateway.refresh()
    usual = served.scripted.on["policy"]
    named = HeartbeatReply(active_policy_hash="ab" * 32)
    if how == "status":
        served.policy = 400
    elif how == "reset":
        served.scripted.on["policy"] = lambda request: request.reset()
    else:
        served.scripted.on["policy"] = lambda request: None
    gateway.on_heartbeat_response(named)
    served.scripted.wait_for("policy", 3)
    for _ in range(100):
        gateway.check_capability("x")
        with pytest.raises(PolicyViolationError):
            gateway.check_capability("one")
    served.policy = OWNER.policy(2, denying("two"))
    served.scripted.on["policy"] = usual
    until(lambda: version_of(gateway) == 2)
    with pytest.raises(PolicyViolationError):
        gateway.check_capability("two")


ATTACKS = {
    "rollback": OWNER.policy(1, {}),
    "wrong key": OTHER.policy(6, {}),
    "named key": OTHER.policy(6, {}, signing_public_key=OWNER.public),
    "unsigned": OWNER.policy(6, {}, signature=None),
    "hash": {**OWNER.policy(6, denying("x")), "content": {}},
    "workspace": OWNER.policy(6, {}, workspace_id="ws-other"),
    "none": None,
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack(served: Served, make: Make, attack: str, caplog: pytest.LogCaptureFixture) -> None:
    """A policy that is refused changes nothing; an ERROR tells of it once; a good one is taken afterwards."""
    served.policy = OWNER.policy(5, denying("one"))
    gateway = make(client={"trusted_policy_keys": [OWNER.public]})
    gateway.refresh()
    served.policy = ATTACKS[attack]
    for _ in range(3):
        with pytest.raises(PolicyIntegrityError):
            gateway.refresh()
        with pytest.raises(PolicyViolationError):
            gateway.check_capability("one")
    assert version_of(gateway) == 5
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 1
    assert "version 5 stays in force" in errors[0].message
    served.policy = OWNER.policy(7, {})
    gateway.refresh()
    gateway.check_capability("one")


def test_an_attack_at_the_start(served: Served, make: Make) -> None:
    """A first policy that is refused denies everything."""
    served.policy = OTHER.policy(1, {})
    gateway = make(client={"trusted_policy_keys": [OWNER.public]})
    with pytest.raises(PolicyUnavailableError, match="not pinned"):
        gateway.check_task("x")


def test_an_outage_at_the_start(served: Served, make: Make, tmp_path: Path) -> None:
    """With a path the policy of the run before decides until the platform answers."""
    path = tmp_path / "policy.json"
    make(client={"path": path}).refresh()
    served.policy = 503
    gateway = make(client={"path": path})
    gateway.ensure_loaded(0.0)
    assert version_of(gateway) == 1
    with pytest.raises(PolicyViolationError):
        gateway.check_task("one")
    served.policy = OWNER.policy(2, {})
    until(lambda: version_of(gateway) == 2)
    gateway.check_task("one")


def test_a_tampered_disk_at_the_start(served: Served, make: Make, tmp_path: Path) -> None:
    """During an outage a policy that was changed on disk decides nothing: everything is denied."""
    path = tmp_path / "policy.json"
    pinned = {"trusted_policy_keys": [OWNER.public], "path": path}
    make(client=pinned).refresh()
    path.write_text(path.read_text().replace("one", "two"))
    served.policy = 400
    gateway = make(client=pinned)
    with pytest.raises(PolicyUnavailableError):
        gateway.check_task("one")


def test_credentials_that_die(served: Served, make: Make) -> None:
    """Refused credentials are an outage: the policy in force stays, and refresh() says why."""
    gateway = make()
    gateway.refresh()
    served.policy = 401
    with pytest.raises(AuthenticationError):
        gateway.refresh()
    assert version_of(gateway) == 1


# -- swapping ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_swap_under_load(served: Served, make: Make) -> None:
    """Two policies, each denying what the other allows, swapped all the time: no task is decided by neither.

    Every task must be decided by one of them whole: "both" is denied by each, "left" by the odd versions, "right" by
    the even ones, and the enforcer that comes back belongs to a policy that allows it.
    """
    odd, even = denying("left", "both"), denying("right", "both")
    served.policy = OWNER.policy(1, odd)
    gateway = make()
    gateway.refresh()
    usual = served.scripted.on["policy"]
    is_over = threading.Event()
    wrong: List[str] = []
    decided = {"allowed": 0, "denied": 0}

    def answer(request: Request) -> Any:
        version = served.policy["version"] + 1
        served.policy = OWNER.policy(version, odd if version % 2 else even)
        return usual(request)

    served.scripted.on["policy"] = answer

    def work() -> None:
        while not is_over.is_set():
            for name in ("left", "right", "both"):
                try:
                    enforcer = gateway.check_task(name)
                except PolicyViolationError as error:
                    decided["denied"] += 1
                    if error.rule != "capability.blocked":
                        wrong.append(f"{name}: {error}")
                else:
                    decided["allowed"] += 1
                    version = enforcer.policy.version if enforcer is not None and enforcer.policy is not None else 0
                    if name == "both" or version % 2 != (name == "right"):
                        wrong.append(f"{name} was allowed by version {version}")

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for count in range(2, 26):
        gateway.on_heartbeat_response(HeartbeatReply(active_policy_hash="ab" * 32))
        served.scripted.wait_for("policy", count)
    is_over.set()
    for thread in threads:
        thread.join(GUARD)
    assert wrong == []
    assert min(decided.values()) > 0


def test_a_slow_answer_does_not_undo_a_newer_one(served: Served, make: Make) -> None:
    """Of two results the higher version stays in force, whichever comes last."""
    gateway = make()
    served.policy = OWNER.policy(3, {})
    new = gateway.refresh()
    old = make().refresh
    served.policy = OWNER.policy(2, denying("x"))
    older = old()
    assert older is not None
    gateway.in_force.adopt(WORKSPACE, older, 1)
    assert gateway.policy is new
    # "There is none", the answer to an earlier question, comes last.
    gateway.in_force.adopt(WORKSPACE, None, 0)
    assert gateway.policy is new


def test_a_stored_policy_that_cannot_be_enforced_any_more(
    served: Served, make: Make, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without an answer it denies, and says why; nothing else fails."""
    path = tmp_path / "policy.json"
    monkeypatch.chdir(tmp_path)
    served.policy = OWNER.policy(1, {"permissions": {"filesystem": {"enabled": True, "allowed_paths": ["data/*"]}}})
    gateway = make(client={"path": path})
    assert gateway.client.fetch_active_policy(WORKSPACE) is not None
    served.policy = 500
    monkeypatch.setattr(client_module, "FETCH_TIMEOUT", 0.2)
    real = os.path.abspath

    def gone(path: Any) -> Any:
        if not os.path.isabs(path):
            raise FileNotFoundError("the working directory is gone")
        return real(path)

    monkeypatch.setattr(os.path, "abspath", gone)
    with pytest.raises(SekuireError):
        gateway.refresh()
    with pytest.raises(PolicyUnavailableError, match="cannot be enforced any more"):
        gateway.check_task("x")


@pytest.mark.parametrize("pinned", [False, True])
def test_a_workspace_that_nobody_tells(served: Served, pinned: bool) -> None:
    """Nothing is enforced; unless a key is pinned, which the platform could get round otherwise."""
    keys = [OWNER.public] if pinned else []
    client = PolicyClient(served.scripted.url, api_key="k", trusted_policy_keys=keys)
    with client, PolicyGateway(client, Workspace(None)) as gateway:
        if pinned:
            with pytest.raises(PolicyUnavailableError, match="SEKUIRE_WORKSPACE_ID"):
                gateway.check_task("x")
        else:
            assert gateway.check_task("x") is None


def test_an_installation_that_is_not_there_yet() -> None:
    """Before the installation is made nobody can be asked, and the workspace is the one that was given, or none."""
    source = InstallationSource(None)
    assert source.workspace_id is None
    assert InstallationSource(WORKSPACE).workspace_id == WORKSPACE
    with pytest.raises(TransportError, match="not there yet"):
        source.get("/policy", Deadline(1.0))


def test_rate_limits_outlive_a_change(served: Served, make: Make) -> None:
    """What was counted under the old policy counts under the new one."""
    limit = {"rate_limits": {"requests": {"max_per_minute": 3}}}
    served.policy = OWNER.policy(1, limit)
    gateway = make()
    for _ in range(3):
        gateway.check_request()
    served.policy = OWNER.policy(2, {**limit, **denying("x")})
    gateway.refresh()
    with pytest.raises(PolicyViolationError, match="rate_limit"):
        gateway.check_request()


def test_listeners_hear_of_changes(served: Served, make: Make, caplog: pytest.LogCaptureFixture) -> None:
    """With on_change="cancel" each listener can ask the new policy; one that fails harms no other."""
    gateway = make(on_change="cancel")
    heard: List[Any] = []

    def listen(is_allowed: Callable[[str], bool]) -> None:
        heard.append((is_allowed("one"), is_allowed("two")))

    def fail(is_allowed: Callable[[str], bool]) -> None:
        raise RuntimeError("listener")

    gateway.add_listener(fail)
    gateway.add_listener(listen)
    gateway.refresh()
    gateway.refresh()
    served.policy = OWNER.policy(2, denying("two"))
    gateway.refresh()
    gateway.remove_listener(listen)
    gateway.remove_listener(listen)
    served.policy = OWNER.policy(3, {})
    gateway.refresh()
    assert heard == [(False, True), (True, False)]
    assert any("a listener to policy changes failed" in record.message for record in caplog.records)


def test_a_tool_of_a_task(served: Served, make: Make) -> None:
    """The tool that a task names is decided like its capability, before a request is counted; listeners can ask too."""
    content = {
        "permissions": {"tools": {"blocked_tools": ["shell*"]}},
        "rate_limits": {"requests": {"max_per_minute": 1}},
    }
    served.policy = OWNER.policy(1, content)
    gateway = make(on_change="cancel")
    for _ in range(2):
        with pytest.raises(PolicyViolationError) as caught:
            gateway.check_task("one", "shell_exec")
        assert caught.value.rule == "tool.blocked"
    with pytest.raises(PolicyViolationError, match="shell"):
        gateway.check_tool("shell")
    gateway.check_tool("read")
    gateway.check_task("one", "read")
    heard: List[Any] = []
    gateway.add_listener(lambda is_allowed: heard.append((is_allowed("one", "shell"), is_allowed("one", "read"))))
    served.policy = OWNER.policy(2, {"permissions": {"tools": {"allowed_tools": ["shell"]}}})
    gateway.refresh()
    assert heard == [(True, False)]
    served.policy = 400
    with pytest.raises(PolicyUnavailableError):
        make().check_tool("read")


# -- no policy, where one is required ---------------------------------------------------------------------------------


def test_a_required_policy_stays(served: Served, make: Make, caplog: pytest.LogCaptureFixture) -> None:
    """Once a policy is required, "no policy" is never adopted: the last good one decides until the next."""
    gateway = make()
    gateway.require_policy()
    gateway.refresh()
    served.policy = None
    for _ in range(2):
        with pytest.raises(PolicyUnavailableError, match="one is required"):
            gateway.refresh()
        assert version_of(gateway) == 1
        with pytest.raises(PolicyViolationError):
            gateway.check_task("one")
    errors = [record for record in caplog.records if "stays in force" in record.getMessage()]
    assert len([record for record in errors if record.levelno >= logging.WARNING]) == 1
    served.policy = OWNER.policy(2, denying("two"))
    gateway.refresh()
    assert version_of(gateway) == 2


def test_a_required_policy_that_never_was(served: Served, make: Make) -> None:
    """Without a policy before it everything is denied; nor does an unknown workspace allow anything."""
    served.policy = None
    gateway = make()
    gateway.require_policy()
    with pytest.raises(PolicyUnavailableError, match="one is required"):
        gateway.check_task("two")
    client = PolicyClient(served.scripted.url, api_key="k")
    unknown = PolicyGateway(client, Workspace(None))
    assert unknown.check_task("two") is None
    unknown.require_policy()
    with pytest.raises(PolicyUnavailableError, match="SEKUIRE_WORKSPACE_ID"):
        unknown.check_task("two")
    unknown.close()
    client.close()


# -- warning only -----------------------------------------------------------------------------------------------------

OVERRIDE = "SEKUIRE_POLICY_DEV_OVERRIDE"


@pytest.mark.parametrize("by", ["option", "variable"])
def test_warn_only(
    served: Served, make: Make, by: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Outside production violations can be only logged; a loud warning says so."""
    if by == "variable":
        monkeypatch.setenv(OVERRIDE, "1")
    gateway = make(warn_only=by == "option", environment="development")
    assert "POLICIES ARE NOT ENFORCED" in caplog.records[0].message
    gateway.check_task("one")
    assert any("capability" in record.message and "one" in record.message for record in caplog.records)
    served.policy = 400
    make(warn_only=by == "option", environment="development").check_task("x")


@pytest.mark.parametrize(
    ("variables", "options", "pinned", "match"),
    [
        ({}, {"warn_only": True}, False, "warn_only: is refused in production"),
        ({OVERRIDE: "1"}, {}, False, f"{OVERRIDE}: is refused in production"),
        ({OVERRIDE: "true"}, {"environment": "Production"}, False, "refused in production"),
        ({OVERRIDE: "1", "SEKUIRE_ENVIRONMENT": "production"}, {}, False, "refused in production"),
        ({}, {"warn_only": True, "environment": "development"}, True, "a policy key is pinned"),
        ({OVERRIDE: "1", "SEKUIRE_ENVIRONMENT": "staging"}, {}, True, "a policy key is pinned"),
        (
            {OVERRIDE: "maybe"},
            {"environment": "development"},
            False,
            "must be one of 1, true, yes, on or one of 0, false",
        ),
        ({}, {"warn_only": 1}, False, "warn_only"),
        *(
            ({OVERRIDE: "1"}, {"environment": name}, False, "refused in production")
            for name in (
                "PRODUCTION",
                "prod",
                "prod-eu",
                "eu_production",
                '"production"',
                " production ",
                "PRD",
                "prod2",
            )
        ),
        *(
            ({OVERRIDE: "1", "SEKUIRE_ENVIRONMENT": value}, {}, False, "SEKUIRE_ENVIRONMENT: begins or ends with")
            for value in (
                '"production"',
                "'production'",
                "production ",
                "production\n",
                "\ufeffproduction",
                '"staging"',
            )
        ),
        ({OVERRIDE: '"1"'}, {"environment": "development"}, False, f"{OVERRIDE}: begins or ends with a quote"),
        ({OVERRIDE: "1 "}, {"environment": "development"}, False, f"{OVERRIDE}: begins or ends with a space"),
    ],
)
def test_warn_only_is_refused(
    make: Make, monkeypatch: pytest.MonkeyPatch, variables: Any, options: Any, pinned: bool, match: str
) -> None:
    """In production, and with a pinned key, the override is refused, by the name of what asked for it."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError, match=match):
        make(client={"trusted_policy_keys": [OWNER.public] if pinned else []}, **options)


@pytest.mark.parametrize("environment", ["development", "pre-production", "nonprod", "non-production", "product-demo"])
def test_what_is_not_production(served: Served, make: Make, environment: str) -> None:
    """An environment that is not production may only warn."""
    make(warn_only=True, environment=environment).check_task("one")


@pytest.mark.parametrize("value", ["", "0", "false", "off", "NO"])
def test_an_override_that_is_off(served: Served, make: Make, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """An override of 0 enforces."""
    monkeypatch.setenv(OVERRIDE, value)
    with pytest.raises(PolicyViolationError):
        make().check_task("one")


# -- life -------------------------------------------------------------------------------------------------------------


def test_close_ends_the_thread(served: Served, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """close() ends the thread in the middle of its wait; decisions go on, and nothing is fetched any more."""
    gateway = make()
    is_waiting = threading.Event()

    def long(at_least: Optional[float]) -> float:
        is_waiting.set()
        return 3 * GUARD

    monkeypatch.setattr(gateway.loader.backoff, "next", long)
    gateway.refresh()
    served.policy = 400
    gateway.on_heartbeat_response(HeartbeatReply(active_policy_hash="ab" * 32))
    assert is_waiting.wait(GUARD)
    gateway.close(GUARD)
    assert policy_threads() == []
    gateway.close()
    count = served.count
    gateway.on_heartbeat_response(HeartbeatReply(active_policy_hash="cd" * 32))
    gateway.check_task("x")
    with pytest.raises(PolicyViolationError):
        gateway.check_task("one")
    assert policy_threads() == []
    assert served.count == count


def test_close_does_not_wait_for_a_silent_platform(
    blackhole: Blackhole, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """A thread in the middle of a request ends with it, and close() says so."""
    gateway = make(blackhole.url, {"read_timeout": 0.5})
    gateway.on_heartbeat_response(HeartbeatReply(active_policy_hash="h"))
    connection = blackhole.accept()
    try:
        gateway.close(0.0)
        assert any("ends with its request" in record.message for record in caplog.records)
        gateway.client.close()
    finally:
        connection.close()


def test_an_unforeseen_error_does_not_end_it(
    served: Served, make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever goes wrong in one round, the next one comes."""
    gateway = make()
    gateway.refresh()
    real, calls = gateway.client.fetch_active_policy, []

    def fail(workspace_id: str) -> Any:
        calls.append(workspace_id)
        if len(calls) == 1:
            raise ZeroDivisionError
        return real(workspace_id)

    monkeypatch.setattr(gateway.client, "fetch_active_policy", fail)
    served.policy = OWNER.policy(2, {})
    gateway.on_heartbeat_response(HeartbeatReply(active_policy_hash="ab" * 32))
    until(lambda: version_of(gateway) == 2)
    assert any("unforeseen" in record.message for record in caplog.records)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"on_unavailable": "maybe"}, "on_unavailable: must be 'deny' or 'allow'"),
        ({"on_change": "stop"}, "on_change: must be 'continue' or 'cancel'"),
        ({"on_violation": 5}, "on_violation"),
        ({"storage_uri": "nonsense://x"}, "storage_uri"),
        ({"storage_uri": 5}, "storage_uri"),
    ],
)
def test_wrong_options(make: Make, options: Any, match: str) -> None:
    """A wrong option is told at construction, by name."""
    with pytest.raises(ConfigurationError, match=match):
        make(**options)


def test_wrong_arguments(make: Make) -> None:
    """So are a client that is none and a workspace that is none."""
    client = make().client
    with pytest.raises(ConfigurationError, match="client"):
        PolicyGateway(object(), WORKSPACE)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="workspace_id"):
        PolicyGateway(client, "")


def test_what_it_shows(served: Served, make: Make) -> None:
    """Its text tells workspace and version."""
    gateway = make()
    assert repr(gateway) == "<PolicyGateway ws new>"
    gateway.refresh()
    assert repr(gateway) == "<PolicyGateway ws version 1>"
    served.policy = None
    gateway.refresh()
    assert repr(gateway) == "<PolicyGateway ws no policy>"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="fork")
def test_a_child_may_use_it(served: Served, make: Make) -> None:
    """After a fork a child decides and refreshes, whatever a thread of its parent was doing."""
    gateway = make()
    gateway.refresh()
    served.policy = OWNER.policy(2, denying("two"))
    locks = (gateway.loader._lock, gateway.in_force._swap_lock)
    for lock in locks:
        lock.acquire()
    gateway.loader._thread = threading.current_thread()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            gateway.on_heartbeat_response(HeartbeatReply(active_policy_hash="ab" * 32))
            until(lambda: version_of(gateway) == 2)
            gateway.check_task("one")
            code = 0
        finally:
            os._exit(code)
    gateway.loader._thread = None
    for lock in locks:
        lock.release()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="fork")
def test_a_child_loads_what_its_parent_was_loading(served: Served, make: Make) -> None:
    """A fork while the parent loads a newer policy: the child's next decision asks for it, without a heartbeat."""
    gateway = make()
    gateway.refresh()
    served.policy = OWNER.policy(2, denying("two"))
    forked = threading.Event()
    usual = served.scripted.on["policy"]

    def answer(request: Request) -> Any:
        assert served.count > 2 or forked.wait(GUARD)
        return usual(request)

    served.scripted.on["policy"] = answer
    gateway.loader.wake()
    served.scripted.wait_for("policy", 2)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            until(lambda: gateway.check_task("two-b") and version_of(gateway) == 2, timeout=5.0)
            code = 0
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    forked.set()
    assert code == 0


def test_a_load_whose_thread_cannot_be_started(served: Served, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A policy whose time is over while no thread can be started is asked for by a later decision."""
    gateway = make()
    gateway.refresh()
    served.policy = OWNER.policy(2, denying("two"))
    gateway.loader.due = 0.0
    with monkeypatch.context() as full:
        full.setattr(loader_module, "spawn", lambda *args: None)
        gateway.check_task("x")
    until(lambda: gateway.check_task("x") and version_of(gateway) == 2)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="fork")
@pytest.mark.parametrize("is_known", [True, False])
def test_a_child_gets_no_rate_budget(served: Served, make: Make, is_known: bool) -> None:
    """What is rate-limited is refused in a child, with the way out; the rest goes on, also under a newer policy."""
    served.policy = OWNER.policy(1, {**denying("no"), "rate_limits": {"requests": {"max_per_minute": 5}}})
    client = PolicyClient(served.scripted.url, api_key="k")
    workspace = NamedLater(WORKSPACE if is_known else None)
    gateway = PolicyGateway(client, workspace)
    if is_known:
        gateway.refresh()
        gateway.check_task("yes")
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            workspace.name = WORKSPACE
            gateway.refresh()
            for ask in (gateway.check_request, lambda: gateway.check_task("yes")):
                with pytest.raises(ConfigurationError, match="after the fork, or count in shared storage"):
                    ask()
            gateway.check_capability("yes")
            with pytest.raises(PolicyViolationError):
                gateway.check_task("no")
            own = PolicyGateway(client, WORKSPACE)
            own.check_task("yes")
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    workspace.name = WORKSPACE
    gateway.refresh()
    gateway.check_request()
    gateway.close()
    client.close()


def test_errors_of_refresh(served: Served, make: Make) -> None:
    """refresh() raises what the fetch raised."""
    served.policy = 403
    with pytest.raises(APIError) as caught:
        make().refresh()
    assert caught.value.status == 403
    assert isinstance(caught.value, SekuireError)


def test_close_gives_up_the_store_of_rates(served: Served, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """close() closes the connections that a shared store of rate limits holds."""
    gateway = make()
    gateway.refresh()
    closed: List[int] = []
    monkeypatch.setattr(gateway.limiter, "close", lambda: closed.append(1))
    gateway.close()
    assert closed == [1]
