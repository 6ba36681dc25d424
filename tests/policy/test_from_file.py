"""PolicyGateway.from_file(): a policy in a file decides, and no platform is asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sekuire import create_worker
from sekuire.errors import ConfigurationError, PolicyIntegrityError, PolicyViolationError
from sekuire.local import LocalPlatform
from sekuire.policy import PolicyGateway

from ..conftest import AGENT
from ..support.waiting import GUARD

CONTENT = {"agent": {"capabilities": {"denied_capabilities": ["forbidden"]}}}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "policy.json"
    path.write_text(json.dumps(CONTENT))
    return path


def test_a_content(path: Path) -> None:
    """It decides at once; refresh() reads the file again."""
    with PolicyGateway.from_file(path) as gateway:
        gateway.check_capability("echo")
        with pytest.raises(PolicyViolationError, match="forbidden"):
            gateway.check_capability("forbidden")
        path.write_text(json.dumps({"agent": {"capabilities": {"denied_capabilities": ["echo"]}}}))
        gateway.check_capability("echo")
        gateway.refresh()
        with pytest.raises(PolicyViolationError, match="echo"):
            gateway.check_capability("echo")


def test_a_whole_policy(tmp_path: Path, platform: LocalPlatform) -> None:
    """One as ``sekuire policy pull`` writes it is verified, also against a pinned key."""
    policy = platform.set_policy("ws_1", CONTENT)
    (tmp_path / "policy.json").write_text(json.dumps(policy))
    with PolicyGateway.from_file(tmp_path / "policy.json", trusted_policy_keys=[platform.policy_public_key]) as gateway:
        assert gateway.policy is not None
        assert (gateway.policy.origin, gateway.policy.workspace_id) == ("pinned", "ws_1")
    (tmp_path / "policy.json").write_text(json.dumps({**policy, "content": {}}))
    with pytest.raises(PolicyIntegrityError, match="hash"):
        PolicyGateway.from_file(tmp_path / "policy.json")


@pytest.mark.parametrize(
    ("body", "error", "problem"),
    [
        (b"{", PolicyIntegrityError, "JSON"),
        (b"[]", PolicyIntegrityError, "must be an object"),
        (b'{"Statement": []}', PolicyIntegrityError, "another format"),
        (b'{"agent": {"capabilities": 5}}', PolicyIntegrityError, "agent.capabilities"),
        (b'{"a": "' + b"x" * 1024 * 1024 + b'"}', ConfigurationError, "larger than 1 MiB"),
        (None, ConfigurationError, "cannot be read: No such file"),
    ],
)
def test_what_is_refused(tmp_path: Path, body: Any, error: Any, problem: str) -> None:
    """A file that cannot be enforced is refused at once."""
    if body is not None:
        (tmp_path / "p.json").write_bytes(body)
    with pytest.raises(error, match=problem):
        PolicyGateway.from_file(tmp_path / "p.json")


def test_a_content_and_a_pin(path: Path, platform: LocalPlatform) -> None:
    """Nobody signed a content, so that a pinned key refuses it."""
    with pytest.raises(PolicyIntegrityError, match="no pinned key can prove"):
        PolicyGateway.from_file(path, trusted_policy_keys=[platform.policy_public_key])


def test_a_worker(path: Path, platform: LocalPlatform, caplog: pytest.LogCaptureFixture) -> None:
    """The file decides over its tasks; another active policy of the platform is an error in the log, once."""
    platform.set_policy("ws_local", {"compliance": {}})
    gateway = PolicyGateway.from_file(path)
    worker = create_worker(
        api_base_url=platform.url,
        agent_id=AGENT,
        install_token=platform.create_install_token(AGENT),
        policy_gateway=gateway,
        heartbeat_interval=0.05,
    )
    worker.on_task("echo", lambda ctx, input: input)
    worker.on_task("forbidden", lambda ctx, input: input)
    with gateway, worker:
        assert platform.wait(platform.submit("echo", 1, AGENT), GUARD)["output"] == 1
        denied = platform.wait(platform.submit("forbidden", 1, AGENT), GUARD)
        assert denied["error"]["code"] == "policy_denied"
    warned = [record for record in caplog.records if "names another active policy" in record.getMessage()]
    assert len(warned) == 1
