"""Manifests: what of ``sekuire.yml`` is used, what is refused, and an SDK made from one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List

import pytest

from sekuire import SekuireSDK
from sekuire.errors import ConfigurationError, PolicyViolationError
from sekuire.identity import sekuire_id
from sekuire.local import LocalPlatform
from sekuire.manifest import read_manifest

from .conftest import AGENT
from .support.servers import run_python
from .support.waiting import GUARD

PUBLISHED = """
# As a project has it.
project:
  name: research-helper
  version: "1.4.0"
identity:
  model: gpt-4o
  system_prompt_path: ./prompt.md
  tools_path: ./tools.json
permissions:
  network:
    enabled: true
    require_tls: true
    allowed_domains: ["api.openai.com", "*.example.com"]
  filesystem:
    allowed_paths: ["/srv/reports/*"]
  tools:
    blocked_tools: [shell]
rate_limits:
  requests: {max_per_minute: 600}
capabilities:
  provides: [summarize, translate]
toolkits:
  - anything
"""


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes a manifest with the files that it names."""

    def make(text: str = PUBLISHED, **files: str) -> Path:
        for name, content in {"prompt.md": "\nYou are helpful.\n", "tools.json": "[]", **files}.items():
            (tmp_path / name).write_text(content, encoding="utf-8")
        path = tmp_path / "sekuire.yml"
        path.write_text(text, encoding="utf-8")
        return path

    return make


# -- reading --


def test_a_published_one(write: Callable[..., Path]) -> None:
    """Name, identity, capabilities and rules are read; what is for other programs is ignored without a word."""
    manifest = read_manifest(write())
    assert manifest.name == "research-helper"
    assert manifest.capabilities == ("summarize", "translate")
    assert manifest.agent_id() == sekuire_id(model="gpt-4o", system_prompt="You are helpful.", tools=[])
    assert list(manifest.rules) == ["permissions", "rate_limits"]
    assert manifest.warnings == ()


def test_the_least(write: Callable[..., Path]) -> None:
    """An id is enough."""
    manifest = read_manifest(write("project: {sekuire_id: abc}"))
    assert (manifest.agent_id(), manifest.name, manifest.capabilities, dict(manifest.rules)) == ("abc", None, (), {})


def test_misspelt_keys(write: Callable[..., Path]) -> None:
    """What was probably meant is said; what is close to nothing is somebody else's."""
    text = "projekt: {name: a}\nproject: {nmae: a, homepage: x}\ncapability: {}\ncapabilities: {provide: [x]}\nother: 1"
    assert read_manifest(write(text)).warnings == (
        "'projekt' is not read; did you mean 'project'?",
        "'capability' is not read; did you mean 'capabilities'?",
        "'project.nmae' is not read; did you mean 'project.name'?",
        "'capabilities.provide' is not read; did you mean 'capabilities.provides'?",
    )


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join(['*' + chr(97 + n)] * 10)}]\n" for n in range(8)
)


@pytest.mark.parametrize(
    ("text", "where", "problem"),
    [
        ("", "", "must hold a mapping"),
        ("- a", "", "must hold a mapping"),
        ("project: [", "", "is not YAML as it should be"),
        ("project: {name: a}\nproject: {name: b}", "", "the key 'project' stands twice (line 2, column 1)"),
        ("project: {name: a, name: b}", "", "the key 'name' stands twice"),
        ("project: !!python/object/apply:os.system ['true']", "", "is not YAML as it should be"),
        (BOMB, "", "has more than 20000 values"),
        ("a: &a [*a]", "", "is nested deeper than 32 levels"),
        ("a: " + "[" * 40 + "]" * 40, "", "is nested deeper than 32 levels"),
        ("a: " + "[" * 5000 + "]" * 5000, "", "is nested deeper than 32 levels"),
        ("x: " + "y" * 1024 * 1024, "", "is larger than 1 MiB"),
        ("project: text", "project", "must be a mapping, got a text"),
        ("project: {name: 5}", "project.name", "must be a text, got a number; put it in quotes"),
        ("project: {sekuire_id: no}", "project.sekuire_id", "must be a text, got true or false"),
        ('project: {sekuire_id: ".."}', "project.sekuire_id", "must be an id"),
        ('project: {name: ""}', "project.name", "must be a text of printable characters"),
        ("identity: {model: m}", "identity.system_prompt_path", "is required"),
        ("identity: {system_prompt_path: prompt.md}", "identity.model", "is required"),
        ("identity: {model: m, system_prompt_path: no.md}", "identity.system_prompt_path", "cannot be read: No such"),
        ("identity: {model: m, system_prompt_path: .}", "identity.system_prompt_path", "cannot be read"),
        (
            "identity: {model: m, system_prompt_path: prompt.md, tools_path: prompt.md}",
            "identity.tools_path",
            "is not JSON",
        ),
        ("capabilities: {provides: x}", "capabilities.provides", "must be a list of names, got a text"),
        ("capabilities: {provides: [yes]}", "capabilities.provides[0]", "must be a text, got true or false"),
        ('capabilities: {provides: ["a,b"]}', "capabilities.provides[0]", "cannot name a capability"),
        ("permissions: 5", "permissions", "must be a mapping, got a number"),
    ],
)
def test_what_is_refused(write: Callable[..., Path], text: str, where: str, problem: str) -> None:
    """The error names the file and the key, and what is wrong there."""
    path = write(text)
    with pytest.raises(ConfigurationError) as caught:
        read_manifest(path)
    assert problem in caught.value.problem
    assert (caught.value.option or "", caught.value.source) == (where, str(path))


def test_a_file_that_is_missing_or_not_text(tmp_path: Path) -> None:
    """The error is the system's."""
    with pytest.raises(ConfigurationError, match="No such file"):
        read_manifest(tmp_path / "sekuire.yml")
    (tmp_path / "sekuire.yml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigurationError, match="is not text in UTF-8"):
        read_manifest(tmp_path / "sekuire.yml")


def test_without_the_extra(write: Callable[..., Path]) -> None:
    """The error names what to install."""
    script = """
import sys
sys.modules["yaml"] = None
from sekuire import SekuireSDK
from sekuire.errors import ConfigurationError
try:
    SekuireSDK.from_manifest(sys.argv[1])
except ConfigurationError as error:
    print(error)
"""
    assert "pip install 'sekuire[manifest]'" in run_python(script, str(write())).stdout


# -- an SDK from one --

BOTH = """
project: {name: helper, sekuire_id: AGENT}
permissions: {tools: {blocked_tools: [shell]}}
rate_limits: {requests: {max_per_hour: 3}}
capabilities: {provides: [echo]}
""".replace("AGENT", AGENT)


@pytest.fixture
def sdk_of(platform: LocalPlatform, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., SekuireSDK]]:
    """SDKs from a manifest, against the local platform, shut down at the end."""
    made: List[SekuireSDK] = []
    monkeypatch.setenv("SEKUIRE_API_URL", platform.url)
    monkeypatch.setenv("SEKUIRE_INSTALL_TOKEN", platform.create_install_token(AGENT))
    monkeypatch.delenv("SEKUIRE_AGENT_ID", raising=False)

    def make(path: Path, **options: Any) -> SekuireSDK:
        sdk = SekuireSDK.from_manifest(path, **options)
        made.append(sdk)
        return sdk

    yield make
    for sdk in made:
        sdk.shutdown(1.0)


def test_who_wins(
    sdk_of: Callable[..., SekuireSDK], write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest is the last to be asked: variables come before it, keywords before both."""
    config = sdk_of(write(BOTH)).config
    assert (config.agent_id, config.agent_name, config.capabilities) == (AGENT, "helper", ("echo",))
    monkeypatch.setenv("SEKUIRE_AGENT_ID", "variable")
    assert sdk_of(write(BOTH)).config.agent_id == "variable"
    config = sdk_of(write(BOTH), agent_id="keyword", agent_name="n", capabilities=["x"]).config
    assert (config.agent_id, config.agent_name, config.capabilities) == ("keyword", "n", ("x",))


def test_without_an_agent(sdk_of: Callable[..., SekuireSDK], write: Callable[..., Path]) -> None:
    """The error says where an id may come from."""
    with pytest.raises(ConfigurationError, match=r"SEKUIRE_AGENT_ID, or give the manifest project\.sekuire_id"):
        sdk_of(write("project: {name: a}"))


def test_its_rules_are_enforced(
    platform: LocalPlatform, sdk_of: Callable[..., SekuireSDK], write: Callable[..., Path]
) -> None:
    """Beside the workspace's policy: each denies by itself and is named, and a request counts once."""
    platform.set_policy("ws_local", {"permissions": {"tools": {"blocked_tools": ["curl"]}}})
    found: Dict[str, str] = {}

    def echo(ctx: Any, input: Any) -> None:
        for tool in ("shell", "curl", "search"):
            try:
                ctx.policy.enforce_tool(tool)
            except PolicyViolationError as error:
                found[tool] = error.reason
        assert ctx.policy.check_network("x.test", "https").reason.endswith("(the workspace's policy)")

    sdk = sdk_of(write(BOTH))
    worker = sdk.create_task_worker()
    worker.on_task("echo", echo)
    with sdk, worker:
        results = [platform.wait(platform.submit("echo", {}, AGENT), GUARD) for _ in range(4)]
    assert [result["status"] for result in results] == ["completed"] * 3 + ["failed"]
    assert results[3]["error"]["code"] == "rate_limited"
    assert list(found) == ["shell", "curl"]
    assert found["shell"].endswith("(sekuire.yml)")
    assert found["curl"].endswith("(the workspace's policy)")


def test_its_rules_without_a_policy(
    platform: LocalPlatform, sdk_of: Callable[..., SekuireSDK], write: Callable[..., Path]
) -> None:
    """They decide alone where the workspace has no policy; they are no policy for ``policy_required``."""
    sdk = sdk_of(write(BOTH))
    worker = sdk.create_task_worker()
    worker.on_task("echo", lambda ctx, input: bool(ctx.policy.check_tool("shell")))
    strict = sdk.create_task_worker(policy_required=True)
    strict.on_task("echo", lambda ctx, input: None)
    with sdk, worker:
        assert platform.wait(platform.submit("echo", {}, AGENT), GUARD)["output"] is False
        with pytest.raises(Exception, match="policy_required"):
            strict.start(block=True)


def test_rules_that_cannot_be_enforced(sdk_of: Callable[..., SekuireSDK], write: Callable[..., Path]) -> None:
    """They are refused by their path; a gateway of one's own cannot have them."""
    with pytest.raises(ConfigurationError, match=r"permissions\.tools\.blocked_tools"):
        sdk_of(write(BOTH.replace("[shell]", "shell")))
    with pytest.raises(ConfigurationError, match="cannot enforce the permissions of a manifest"):
        sdk_of(write(BOTH), policy_gateway=sdk_of(write(BOTH)).policy_gateway)


def test_what_it_provides_needs_a_handler(sdk_of: Callable[..., SekuireSDK], write: Callable[..., Path]) -> None:
    """A worker does not start while a promised capability has no handler, in any worker of the SDK."""
    sdk = sdk_of(write(BOTH.replace("[echo]", "[echo, shout]")))
    worker = sdk.create_task_worker()
    worker.on_task("echo", lambda ctx, input: None)
    with pytest.raises(ConfigurationError, match="provides shout, and no handler is registered"):
        worker.start()
    other = sdk.create_task_worker(["shout"])
    other.on_task("shout", lambda ctx, input: None)
    worker.start()
    worker.stop()


def test_the_example_of_a_tool_file(write: Callable[..., Path]) -> None:
    """The tools' file enters the id as JSON: its spaces and the order of its keys do not count."""
    one = read_manifest(write(**{"tools.json": json.dumps([{"a": 1, "b": 2}], indent=4)}))
    two = read_manifest(write(**{"tools.json": '[{"b":2,"a":1}]'}))
    other = read_manifest(write(**{"tools.json": '[{"b":3,"a":1}]'}))
    assert one.agent_id() == two.agent_id() != other.agent_id()
