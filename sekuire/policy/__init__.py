"""Read, verify and enforce the workspace's policy.

Importing this package needs no extra. What needs one says so when it is used: ``pip install 'sekuire[policy]'``.

A policy takes this path::

    client      fetches it (source: with which credentials), verifies it and keeps the last good one (cache)
    document    reads it strictly and checks hash, signature and version
    loader      asks for it when a heartbeat names another one; in_force puts it in the place of the old one
    gateway     is asked before each task; it asks the enforcer of the policy in force
    enforcer    raises, reports and counts (limits); rulebook decides, by the lists that matching compiled
    decision    is what a rule says, in words
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
