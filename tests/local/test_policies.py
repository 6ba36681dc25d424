"""Policies: what is signed, with which key, and what lasts."""

from __future__ import annotations

import json
import os
from typing import Any, Callable, Dict

import pytest
from blake3 import blake3
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from sekuire.errors import APIError, ConfigurationError
from sekuire.local import LocalPlatform

from .conftest import client_of

Make = Callable[..., LocalPlatform]

CONTENT = {"permissions": {"tools": {"blocked_tools": ["rm", "é"]}}, "rate_limits": {"requests": {"max_per_minute": 9}}}


def verify(policy: Dict[str, Any], key: str) -> None:
    """With canonical forms written by hand; the content here has nothing that JSON could write in two ways."""
    canonical = json.dumps(policy["content"], sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert policy["hash"] == blake3(canonical.encode()).hexdigest()
    parts = [f'"{name}":{json.dumps(policy[name])}' for name in ("hash", "policy_id", "version", "workspace_id")]
    named = "{" + ",".join(parts) + "}"
    public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(key))
    public.verify(bytes.fromhex(policy["signature"]), named.encode())


def test_a_policy_is_signed(platform: LocalPlatform) -> None:
    """A policy comes with its hash and a signature that the platform's public key proves, over HTTP too."""
    policy = platform.set_policy("ws_local", CONTENT)
    assert policy["signing_public_key"] == platform.policy_public_key
    verify(policy, platform.policy_public_key)
    assert client_of(platform).admin("GET", "/workspaces/ws_local/policy").body == policy
    assert platform.policy("ws_local") == policy


def test_there_may_be_none(platform: LocalPlatform) -> None:
    """policy() is None where there is no policy."""
    assert platform.policy("ws_other") is None


def test_another_workspace_has_another_signature(platform: LocalPlatform) -> None:
    """The signature covers the workspace, so that one workspace's policy cannot pass for another's."""
    mine, other = (platform.set_policy(name, CONTENT) for name in ("ws_local", "ws_other"))
    assert mine["hash"] == other["hash"]
    with pytest.raises(InvalidSignature):
        verify({**mine, "workspace_id": "ws_other"}, platform.policy_public_key)


def test_a_rotated_key_signs_everything(platform: LocalPlatform) -> None:
    """After a rotation the policies that were set before carry the new key's signature; version and hash stay."""
    before = platform.set_policy("ws_local", CONTENT)
    old = platform.policy_public_key
    new = platform.rotate_policy_key()
    assert new == platform.policy_public_key != old
    after = platform.policy("ws_local")
    assert after is not None
    verify(after, new)
    with pytest.raises(InvalidSignature):
        verify(after, old)
    changed = {"signature", "signing_key_id", "signing_public_key"}
    assert {name for name in after if after[name] != before[name]} == changed


def test_key_and_versions_last(make: Make, tmp_path: Any) -> None:
    """With a database the key, the policy and its version survive a restart, and the next version is higher."""
    path = tmp_path / "platform.db"
    first = make(path=path)
    first.rotate_policy_key()
    policy = [first.set_policy("ws_local", CONTENT) for _ in range(3)][-1]
    assert policy["version"] == 3
    first.stop()
    second = make(path=path)
    assert second.policy("ws_local") == policy
    assert second.set_policy("ws_local", {})["version"] == 4
    if os.name == "posix":
        assert os.stat(path).st_mode & 0o077 == 0


def test_two_platforms_have_two_keys(make: Make) -> None:
    """A platform in memory makes its own key."""
    assert make().policy_public_key != make().policy_public_key


@pytest.mark.parametrize(
    "content",
    [{"a": float("inf")}, {"a": 2**60}, {"a": "\ud800"}, {1: 2}, {"a": object()}],
    ids=["infinity", "large", "surrogate", "key", "type"],
)
def test_what_cannot_be_hashed_is_refused(platform: LocalPlatform, content: Any) -> None:
    """Content without a canonical form is a 400, and the policy in force stays."""
    policy = platform.set_policy("ws_local", CONTENT)
    with pytest.raises(APIError, match="RFC 8785") as caught:
        platform.set_policy("ws_local", content)
    assert (caught.value.status, caught.value.code) == (400, "INVALID_POLICY")
    assert platform.policy("ws_local") == policy


def test_deep_content_is_refused(platform: LocalPlatform) -> None:
    """Content that no JSON parser would read is refused too."""
    content: Any = []
    for _ in range(100_000):
        content = [content]
    with pytest.raises(APIError, match="too deep"):
        platform.set_policy("ws_local", {"a": content})


def test_a_number_that_is_none_is_refused_over_http(platform: LocalPlatform) -> None:
    """1e999 is JSON and infinite: 400, with a sentence."""
    client = client_of(platform)
    headers = {"X-API-Key": platform.api_key}
    answer = client.call("PUT", "/workspaces/w/policy", headers=headers, raw=b'{"content": {"a": 1e999}}')
    assert (answer.status, answer.code) == (400, "INVALID_JSON")


def test_content_must_be_a_mapping(platform: LocalPlatform) -> None:
    """A list is not a content."""
    with pytest.raises(ConfigurationError, match="mapping"):
        platform.set_policy("ws_local", [])  # type: ignore[arg-type]


def test_the_key_shows_nothing(platform: LocalPlatform) -> None:
    """No text of the signing key holds its secret half."""
    key = platform._store.policy_key
    assert key.secret() not in f"{key!r} {key} {platform!r}"
