"""What the workspace's policy allows: read, verified and enforced.

Importing this package needs no extra. What needs one says so when it is used: ``pip install 'sekuire[policy]'``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._internal import lazy

if TYPE_CHECKING:
    from .client import PolicyClient as PolicyClient
    from .document import Policy as Policy
    from .enforcer import Decision as Decision
    from .enforcer import PolicyEnforcer as PolicyEnforcer
    from .gateway import PolicyGateway as PolicyGateway
    from .limits import RateLimiter as RateLimiter

__all__ = ["Decision", "Policy", "PolicyClient", "PolicyEnforcer", "PolicyGateway", "RateLimiter"]

#: Public name → the module that defines it.
_HOMES = {
    "Decision": "enforcer",
    "Policy": "document",
    "PolicyClient": "client",
    "PolicyEnforcer": "enforcer",
    "PolicyGateway": "gateway",
    "RateLimiter": "limits",
}

__getattr__, __dir__ = lazy.names_of(__name__, _HOMES)
