"""sekuire policy: what is in force, whether it is good, and what it allows."""

from __future__ import annotations

import io
import json
import os
import stat
from pathlib import Path
from typing import Any, Dict, List

import pytest

from sekuire import RuntimeCredentials, RuntimeCredentialsStore
from sekuire.local import LocalPlatform

from ..policy.signing import Served, Signer
from ..support.scripted import Scripted
from .conftest import AGENT, Call

WORKSPACE = "ws_local"
CONTENT: Dict[str, Any] = {
    "permissions": {
        "network": {"enabled": True, "require_tls": True, "allowed_domains": ["*.example.com"]},
        "filesystem": {"enabled": True, "allowed_paths": ["/srv/data/*"]},
        "tools": {"blocked_tools": ["shell"]},
        "api": {"allowed_services": ["mail"]},
    },
    "agent": {
        "models": {"allowed_models": ["small-*"], "allowed_providers": ["acme"]},
        "capabilities": {"denied_capabilities": ["drop"]},
    },
}


@pytest.fixture
def environ(platform: LocalPlatform) -> Dict[str, str]:
    return {
        "SEKUIRE_API_URL": platform.url,
        "SEKUIRE_API_KEY": platform.api_key,
        "SEKUIRE_WORKSPACE_ID": WORKSPACE,
        "SEKUIRE_POLICY_PUBLIC_KEYS": platform.policy_public_key,
    }


# -- pull, verify, show -----------------------------------------------------------------------------------------------


def test_pull_and_verify(call: Call, platform: LocalPlatform, environ: Dict[str, str], tmp_path: Path) -> None:
    """What pull writes is the policy as it came, and verifies again from its file without a platform."""
    platform.set_policy(WORKSPACE, CONTENT)
    code, out, err = call("policy", "pull", env=environ)
    assert (code, err) == (0, "")
    assert json.loads(out) == platform.policy(WORKSPACE)
    code, out, err = call("policy", "pull", "--output", "policy.json")
    assert (code, out) == (0, "")
    assert "version 1 is in policy.json: signed by a pinned key" in err
    if os.name == "posix":
        assert stat.S_IMODE((tmp_path / "policy.json").stat().st_mode) == 0o600
    code, out, _ = call("policy", "verify", "--file", "policy.json", env={"SEKUIRE_API_URL": "http://127.0.0.1:9"})
    assert code == 0
    assert out.endswith("of ws_local, version 1 is good: signed by a pinned key\n")


def test_verify_from_the_platform(call: Call, platform: LocalPlatform, environ: Dict[str, str]) -> None:
    """Without a key it is whole; with the wrong one it is refused, with what was expected and found."""
    platform.set_policy(WORKSPACE, {"permissions": {"n": 1}})
    code, out, err = call("policy", "verify", env={**environ, "SEKUIRE_POLICY_PUBLIC_KEYS": ""})
    assert code == 0
    assert "no key is pinned" in out
    assert "warning: permissions.n is unknown" in err
    other = Signer(9).public
    code, out, err = call("policy", "verify", "--trusted-key", other, env=environ)
    assert (code, out) == (1, "")
    assert f"expected {other}, found {platform.policy_public_key}" in err


@pytest.mark.parametrize("change", ["content", "hash", "signature", "workspace_id"])
def test_verify_a_file_that_was_changed(
    call: Call, platform: LocalPlatform, environ: Dict[str, str], tmp_path: Path, change: str
) -> None:
    """A changed file is refused: exit 1."""
    policy = platform.set_policy(WORKSPACE, CONTENT)
    policy[change] = {"content": {}, "hash": "ab" * 32, "signature": "ab" * 64, "workspace_id": "ws_other"}[change]
    (tmp_path / "policy.json").write_text(json.dumps(policy))
    code, out, err = call("policy", "verify", "--file", "policy.json", env=environ)
    assert (code, out) == (1, "")
    assert "the policy is refused" in err


@pytest.mark.parametrize("by", ["option", "variable"])
def test_a_signature_over_the_hash(call: Call, scripted: Scripted, environ: Dict[str, str], by: str) -> None:
    """--policy-signature hash, or its variable, accepts what else is refused, from the platform and from a file."""
    owner = Signer(1)
    Served(scripted, owner.policy(3, CONTENT, workspace_id=WORKSPACE, covers="hash"))
    environ.update(SEKUIRE_API_URL=scripted.url, SEKUIRE_POLICY_PUBLIC_KEYS=owner.public)
    code, _, err = call("policy", "verify", env=environ)
    assert code == 1
    assert "covers the hash alone" in err
    assert "SEKUIRE_POLICY_SIGNATURE=hash" in err
    options = ("--policy-signature", "hash") if by == "option" else ()
    if by == "variable":
        environ["SEKUIRE_POLICY_SIGNATURE"] = "hash"
    assert call("policy", "pull", "--output", "policy.json", *options, env=environ)[0] == 0
    for more in ((), ("--file", "policy.json")):
        code, out, err = call("policy", "verify", *options, *more, env=environ)
        assert (code, err) == (0, "")
        assert "signed by a pinned key over its hash alone" in out
    environ["SEKUIRE_POLICY_SIGNATURE"] = "loose"
    code, _, err = call("policy", "verify", env=environ)
    assert code == 2
    assert "environment variable SEKUIRE_POLICY_SIGNATURE: must be 'bound' or 'hash', got 'loose'" in err


def test_show(call: Call, platform: LocalPlatform, environ: Dict[str, str], tmp_path: Path) -> None:
    """show prints the facts and the content, from the platform and from a file."""
    platform.set_policy(WORKSPACE, CONTENT)
    code, out, _ = call("policy", "show", env=environ)
    assert code == 0
    facts, _, content = out.partition("{")
    assert json.loads("{" + content) == CONTENT
    assert "version    1\n" in facts
    assert f"hash       {(platform.policy(WORKSPACE) or {})['hash']}\n" in facts
    (tmp_path / "content.json").write_text(json.dumps(CONTENT))
    code, out, err = call("policy", "show", "--file", "content.json")
    assert code == 0
    assert "unsigned" in out
    assert "which no key can prove" in err


def test_no_policy(call: Call, environ: Dict[str, str]) -> None:
    """A workspace without one: nothing to pull or verify, everything is allowed."""
    assert call("policy", "pull", env=environ)[0] == 1
    assert call("policy", "verify")[0] == 1
    assert call("policy", "show")[:2] == (0, "the workspace has no policy: everything is allowed\n")
    assert call("policy", "check", "tool", "shell")[:2] == (0, "allowed shell: the workspace has no policy\n")


# -- check ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "code", "lines"),
    [
        (["tool", "search"], 0, ["allowed search: the policy does not restrict it"]),
        (["tool", "search", "shell"], 1, ["allowed search:", "denied shell: tool.blocked: "]),
        (["network", "api.example.com"], 0, ["allowed api.example.com: by '*.example.com' in permissions.network."]),
        (["network", "api.example.com", "--protocol", "http"], 1, ["denied api.example.com: network.tls_required:"]),
        (["network", "example.org"], 1, ["denied example.org: network.not_allowed:"]),
        (["filesystem", "/srv/data/x"], 0, ["allowed /srv/data/x: by '/srv/data/*'"]),
        (["filesystem", "/etc/passwd", "--operation", "write"], 1, ["denied /etc/passwd: fs.not_allowed: write"]),
        (["model", "small-1", "--provider", "acme"], 0, ["allowed small-1:"]),
        (["model", "small-1"], 1, ["denied small-1: model.provider_not_allowed:"]),
        (["api", "mail"], 0, ["allowed mail: by 'mail'"]),
        (["api", "news"], 1, ["denied news: api.not_allowed:"]),
        (["capability", "keep"], 0, ["allowed keep:"]),
        (["capability", "drop"], 1, ["denied drop: capability.blocked:"]),
    ],
)
@pytest.mark.parametrize("source", ["platform", "file"])
def test_check(
    call: Call,
    platform: LocalPlatform,
    environ: Dict[str, str],
    tmp_path: Path,
    source: str,
    args: List[str],
    code: int,
    lines: List[str],
) -> None:
    """Each kind is answered allowed (0) or denied (1), and by which rule, whether asked of the platform or a file."""
    options = []
    if source == "file":
        (tmp_path / "content.json").write_text(json.dumps(CONTENT))
        options, environ = ["--file", "content.json"], {}
    else:
        platform.set_policy(WORKSPACE, CONTENT)
    found, out, err = call("policy", "check", *args, *options, env=environ)
    assert (found, err) == (code, "")
    printed = out.splitlines()
    assert len(printed) == len(lines)
    assert all(line.startswith(start) for line, start in zip(printed, lines)), printed


def test_a_subject_that_steers_the_terminal(call: Call, tmp_path: Path) -> None:
    """Control characters of an argument are not shown."""
    (tmp_path / "content.json").write_text("{}")
    _, out, _ = call("policy", "check", "tool", "a\x1b[31mb", "--file", "content.json")
    assert "\x1b" not in out


# -- where it comes from ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["file", "token", "stored"])
def test_credentials(call: Call, platform: LocalPlatform, environ: Dict[str, str], tmp_path: Path, by: str) -> None:
    """The API key from a file, a runtime token, or the credentials file, whose workspace is known too, will do."""
    platform.set_policy(WORKSPACE, CONTENT)
    store = platform._store
    token = store.bootstrap(store.create_install_token(AGENT), AGENT, [], {}, None)["runtime_token"]
    del environ["SEKUIRE_API_KEY"]
    args: List[str] = []
    if by == "file":
        (tmp_path / "key").write_text(platform.api_key)
        args = ["--api-key-file", "key"]
    elif by == "token":
        environ["SEKUIRE_RUNTIME_TOKEN"] = token
    else:
        del environ["SEKUIRE_WORKSPACE_ID"]
        environ["SEKUIRE_CREDENTIALS_FILE"] = "credentials.json"
        RuntimeCredentialsStore(path=tmp_path / "credentials.json").update(
            RuntimeCredentials(installation_id="i", runtime_token=token, workspace_id=WORKSPACE)
        )
    code, out, err = call("policy", "verify", *args, env=environ)
    assert (code, err) == (0, "")
    assert "is good" in out


@pytest.mark.parametrize(
    ("args", "drop", "more", "code", "text"),
    [
        (["pull"], "SEKUIRE_API_KEY", {}, 2, "nothing to authenticate with"),
        (["pull"], "SEKUIRE_WORKSPACE_ID", {}, 2, "whose policy?"),
        (["pull", "--workspace", ".."], None, {}, 2, "--workspace"),
        (["pull", "--trusted-key", "abc"], None, {}, 2, "--trusted-key: an Ed25519 public key"),
        (["show"], None, {"SEKUIRE_POLICY_PUBLIC_KEYS": "abc"}, 2, "SEKUIRE_POLICY_PUBLIC_KEYS: an Ed25519 public key"),
        (["pull"], None, {"SEKUIRE_API_KEY": "wrong"}, 1, "refused the credentials"),
        (["pull", "--url", "nonsense"], None, {}, 2, "api_base_url"),
        (["pull", "--output", "missing/policy.json"], None, {}, 2, "--output: cannot write"),
        (["show", "--file", "missing.json"], None, {}, 2, "--file: cannot use 'missing.json': No such file"),
        (["verify", "--file", "content.json"], None, {}, 1, "policy_id"),
        (["check", "tool"], None, {}, 2, "TOOL"),
        (["check", "toool", "x"], None, {}, 2, "invalid choice"),
        (["check"], None, {}, 2, "KIND"),
        ([], None, {}, 2, "ACTION"),
        (["show", "--file", "wrong.json"], None, {}, 1, "permissions.tools.blocked_tools"),
    ],
)
def test_wrong_usage(
    call: Call,
    platform: LocalPlatform,
    environ: Dict[str, str],
    tmp_path: Path,
    args: List[str],
    drop: Any,
    more: Dict[str, str],
    code: int,
    text: str,
) -> None:
    """Each error names the option. Exit 2 is wrong usage, 1 a refusal."""
    platform.set_policy(WORKSPACE, {})
    (tmp_path / "content.json").write_text(json.dumps(CONTENT))
    (tmp_path / "wrong.json").write_text('{"permissions": {"tools": {"blocked_tools": 5}}}')
    environ.update(more)
    environ.pop(drop, None)
    found, out, err = call("policy", *args, env=environ)
    assert found == code, err
    assert text in err
    assert out == ""


def test_help(call: Call) -> None:
    """Every level explains itself."""
    for args, text in (
        ((), "Exit codes"),
        (("pull",), "--output"),
        (("check",), "network"),
        (("check", "model"), "--provider"),
    ):
        code, out, _ = call("policy", *args, "--help")
        assert code == 0
        assert text in out


def test_stdin(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """--file - reads stdin."""
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(json.dumps(CONTENT).encode())))
    code, out, _ = call("policy", "check", "tool", "shell", "--file", "-")
    assert code == 1
    assert out.startswith("denied shell: tool.blocked")
