"""Canonical form, hash and signature are those that other implementations make; tests/vectors/README.md says which."""

from __future__ import annotations

import importlib.util
import json
import pathlib
import struct
from typing import Any, Dict

import pytest

from sekuire.errors import ConfigurationError, PolicyIntegrityError
from sekuire.policy.document import canonical, content_hash, decode_policy, parse_key, signed_message

VECTORS = pathlib.Path(__file__).resolve().parents[1] / "vectors"


def load(name: str) -> Dict[str, Any]:
    found: Dict[str, Any] = json.loads((VECTORS / name).read_text(encoding="utf-8"))
    return found


def reference() -> Any:
    spec = importlib.util.spec_from_file_location("make", VECTORS / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


POLICIES = load("policies.json")["cases"]
each_policy = pytest.mark.parametrize("case", POLICIES, ids=lambda case: case["name"])


@each_policy
def test_canonical_form_and_hash(case: Dict[str, Any]) -> None:
    """The content of each vector has the canonical form and the hash that it says."""
    content = json.loads(case["content"])
    assert canonical(content).decode() == case["canonical"]
    assert content_hash(content) == case["hash"]


def body_of(case: Dict[str, Any], **changes: Any) -> bytes:
    fields = ("policy_id", "workspace_id", "version", "hash", "signature")
    head = {name: case[name] for name in fields}
    head.update(status="active", signing_public_key=case["public_key"], **changes)
    return (json.dumps(head)[:-1] + f', "content": {case["content"]}}}').encode()


@each_policy
def test_signature(case: Dict[str, Any]) -> None:
    """The signature of each vector, made elsewhere, is accepted with its key pinned, and covers what it says."""
    message = signed_message(case["hash"], case["policy_id"], case["version"], case["workspace_id"])
    assert message.decode() == case["message"]
    keys = [parse_key(case["public_key"])]
    policy = decode_policy(body_of(case), workspace_id=case["workspace_id"], trusted_keys=keys)
    assert (policy.origin, policy.hash, policy.version) == ("pinned", case["hash"], case["version"])


@each_policy
def test_signature_of_the_hash_alone(case: Dict[str, Any]) -> None:
    """The weaker signature of each vector proves integrity while no key is pinned, and nothing when one is."""
    body = body_of(case, signature=case["signature_of_hash"])
    policy = decode_policy(body, workspace_id=case["workspace_id"])
    assert policy.origin == "integrity"
    assert policy.warnings == ("signature covers the hash alone, not id, version and workspace",)
    with pytest.raises(PolicyIntegrityError, match="covers the hash alone"):
        decode_policy(body, workspace_id=case["workspace_id"], trusted_keys=[parse_key(case["public_key"])])


def test_blake3_of_the_published_inputs() -> None:
    """The package hashes the published inputs to the published hashes, and so does the reference."""
    from blake3 import blake3

    made = reference()
    for length, digest in load("blake3.json")["cases"]:
        data = bytes(index % 251 for index in range(length))
        assert (made.blake3(data), blake3(data).hexdigest()) == (digest, digest), length


def test_ed25519_of_the_rfc() -> None:
    """The reference signs the messages of RFC 8032 to its signatures."""
    made = reference()
    for seed, key, message, signature in load("ed25519.json")["cases"]:
        assert made.public_key(bytes.fromhex(seed)).hex() == key
        assert made.sign(bytes.fromhex(seed), bytes.fromhex(message)).hex() == signature


def test_the_vectors_are_what_the_reference_makes() -> None:
    """The files hold what make.py makes today."""
    made = reference()
    assert made.policies() == POLICIES
    assert made.small_order_keys() == load("weak-keys.json")["cases"]


def test_canonical_form_of_the_rfc() -> None:
    """The examples and the numbers of RFC 8785."""
    data = load("rfc8785.json")
    for case in data["cases"]:
        assert canonical(json.loads(case["input"])).decode() == case["canonical"], case["name"]
    for bits, text in data["numbers"]:
        (number,) = struct.unpack(">d", bytes.fromhex(bits))
        assert canonical(number).decode() == text, bits
    for bits in data["no_numbers"]:
        (number,) = struct.unpack(">d", bytes.fromhex(bits))
        with pytest.raises(PolicyIntegrityError, match="not finite"):
            canonical(number)


@pytest.mark.parametrize("key", load("weak-keys.json")["cases"])
def test_weak_keys_are_refused(key: str) -> None:
    """A point of small order cannot be pinned: a signature under it needs no private key."""
    with pytest.raises(ConfigurationError, match="small order"):
        parse_key(key)
