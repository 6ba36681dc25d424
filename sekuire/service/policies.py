"""Make a policy client for a command, and say what a policy's signature proves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Dict, Optional, Sequence

from ..config import ConnectionConfig
from ..credentials import RuntimeCredentialsStore
from ..secret import Secret
from ..wire.models import RuntimeCredentials

if TYPE_CHECKING:
    from ..policy.client import PolicyClient

#: The ``origin`` of a policy, in words.
ORIGINS = {
    "pinned": "signed by a pinned key",
    "content": "signed by a pinned key over its hash alone, so its content is proved, and an older one can be replayed",
    "integrity": "whole, as its signature shows; no key is pinned, so its origin is not proved",
    "unsigned": "unsigned: only its hash is proved",
}


def client_for(
    config: ConnectionConfig, keys: Sequence[str], signature: str, key: Optional[Secret], token: Optional[Secret]
) -> PolicyClient:
    """Return a client that uses an API key or a runtime token.

    :param signature: what a signature must cover.
    :raises ConfigurationError: a key is malformed, or the extra is not installed.
    """
    from ..policy.client import PolicyClient

    options: Dict[str, Any] = {"api_key": key, "device_fingerprint": config.device_fingerprint}
    if key is None:
        options = {"credentials_store": RuntimeCredentialsStore(RuntimeCredentials(runtime_token=token))}
    options["policy_signature"] = signature
    return PolicyClient(
        config.api_base_url, trusted_policy_keys=keys, allow_insecure_http=config.allow_insecure_http, **options
    )
