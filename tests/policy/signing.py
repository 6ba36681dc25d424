"""Policies signed by a key of the test's own, and a platform that serves whatever a test says, over real HTTP."""

from __future__ import annotations

import json
from typing import Any, Dict, Mapping, Optional

import rfc8785
from blake3 import blake3
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from ..support.scripted import Answer, Request, Scripted

WORKSPACE = "ws"


class Signer:
    """An owner of a workspace, with a key."""

    def __init__(self, seed: int = 1) -> None:
        self._key = Ed25519PrivateKey.from_private_bytes(bytes([seed]) * 32)
        self.public = self._key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw).hex()

    def policy(
        self,
        version: int,
        content: Optional[Mapping[str, Any]] = None,
        *,
        workspace_id: str = WORKSPACE,
        covers: str = "bound",
        **changed: Any,
    ) -> Dict[str, Any]:
        """A policy, good but for what ``changed`` says after the signing; None takes a field out.

        :param covers: what the signature covers: ``bound``, or the ``hash`` alone.
        """
        content = {} if content is None else dict(content)
        named = {
            "hash": blake3(rfc8785.dumps(content)).hexdigest(),
            "policy_id": "pol-1",
            "version": version,
            "workspace_id": workspace_id,
        }
        message = rfc8785.dumps(named) if covers == "bound" else named["hash"].encode()
        signature = self._key.sign(message).hex()
        whole = {
            **named,
            "status": "active",
            "content": content,
            "signature": signature,
            "signing_key_id": "key-1",
            "signing_public_key": self.public,
            **changed,
        }
        return {name: value for name, value in whole.items() if value is not None}


class Served:
    """What a scripted platform serves as the policy: a policy, a status, or None for 404."""

    def __init__(self, scripted: Scripted, policy: Any = None) -> None:
        self.policy = policy
        self.scripted = scripted
        scripted.on["policy"] = self._answer
        scripted.on["heartbeat"] = lambda request: (200, self.beat)
        self.beat: Dict[str, Any] = {}

    def _answer(self, request: Request) -> Answer:
        if self.policy is None:
            return 404, {"error": "not_found", "code": "POLICY_NOT_FOUND", "message": "no policy"}
        if isinstance(self.policy, int):
            return self.policy, {"error": "x", "message": "as the test says"}
        return 200, json.dumps(self.policy).encode()

    @property
    def count(self) -> int:
        return self.scripted.count("policy")


def denying(*capabilities: str) -> Dict[str, Any]:
    return {"agent": {"capabilities": {"denied_capabilities": list(capabilities)}}}
