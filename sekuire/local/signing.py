"""Hash policies, and sign them with the platform's own Ed25519 key."""

from __future__ import annotations

import hashlib
from typing import Any, Mapping

from blake3 import blake3
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from rfc8785 import dumps

__all__ = ["PolicyKey", "policy_hash"]


class PolicyKey:
    """Sign policies with one key. Immutable.

    :param secret: 32 bytes as hex; None makes a new key.
    """

    __slots__ = ("_key", "id", "public")

    def __init__(self, secret: str = "") -> None:
        self._key = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(secret)) if secret else _new_key()
        public = self._key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        #: The public key, which clients pin: 32 bytes as hex.
        self.public = public.hex()
        self.id = "key_" + hashlib.sha256(public).hexdigest()[:16]

    def secret(self) -> str:
        """Return the private key, for the database."""
        return self._key.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption()).hex()

    def sign(self, policy: Mapping[str, Any]) -> str:
        """Return the signature over the fields that identify a policy, as hex. Equal fields give the same signature."""
        named = {name: policy[name] for name in ("hash", "policy_id", "version", "workspace_id")}
        return self._key.sign(dumps(named)).hex()

    def __repr__(self) -> str:
        return f"<PolicyKey {self.id}>"


def policy_hash(content: Mapping[str, Any]) -> str:
    """Return the BLAKE3 hash of the content in RFC 8785 form, as lower-case hex.

    :raises ValueError: the content has no such form: a number that is not finite or too large, a lone surrogate, or a
        wrong type.
    """
    problem = ""
    try:
        digest: str = blake3(dumps(dict(content))).hexdigest()
    except RecursionError:
        problem = "it is nested too deep"
    except AttributeError:
        # rfc8785 before 0.1.3 accepts it.
        problem = "an object's key is not a string"
    if problem:
        raise ValueError(problem)
    return digest


def _new_key() -> Ed25519PrivateKey:
    return Ed25519PrivateKey.generate()
