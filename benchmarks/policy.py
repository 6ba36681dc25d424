"""What a decision of the policy enforcer costs, by kind: CPU time, and decisions a second on one core.

The policy has twenty entries in each list. With the extra installed, verifying a signed policy is measured too, and
with ``--storage-uri`` a rate limit that is shared through a store.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

from sekuire.errors import ConfigurationError
from sekuire.policy import Policy, PolicyEnforcer, RateLimiter

from . import report
from .report import number, table
from .stages import Stage, measure

#: Entries in each list of the policy.
_ENTRIES = 20
#: A limit that is not reached.
_ENDLESS = 10**12


def _content(directory: str) -> Dict[str, Any]:
    numbers = range(_ENTRIES)
    return {
        "permissions": {
            "network": {
                "require_tls": True,
                "allowed_domains": ["*.example.com", *(f"host-{n}.example.org" for n in numbers)],
                "blocked_domains": [f"*.bad-{n}.example.com" for n in numbers],
            },
            "filesystem": {
                "allowed_paths": [f"{directory}/*", *(f"/srv/data-{n}/*" for n in numbers)],
                "blocked_paths": [f"/srv/secret-{n}/*" for n in numbers],
                "allowed_extensions": [".csv", ".json"],
            },
            "tools": {
                "allowed_tools": ["read_*", *(f"tool_{n}" for n in numbers)],
                "blocked_tools": [f"drop_{n}_*" for n in numbers],
            },
            "api": {"allowed_services": [f"service-{n}" for n in numbers]},
        },
        "agent": {
            "models": {"allowed_providers": ["openai"], "allowed_models": ["gpt-*"], "denied_models": ["gpt-3*"]},
            "capabilities": {"allowed_capabilities": [f"capability-{n}" for n in numbers]},
        },
        "rate_limits": {"requests": {"max_per_minute": _ENDLESS, "max_per_hour": _ENDLESS}},
    }


def _questions(enforcer: PolicyEnforcer, directory: str) -> Iterator[Tuple[str, Callable[[], Any]]]:
    yield "capability, exact", lambda: enforcer.enforce_capability("capability-7")
    yield "tool, exact", lambda: enforcer.enforce_tool("tool_7")
    yield "tool, by a star", lambda: enforcer.enforce_tool("read_something")
    yield "tool, refused", lambda: enforcer.check_tool("drop_7_table")
    yield "service", lambda: enforcer.enforce_api("service-7")
    yield "model", lambda: enforcer.enforce_model("gpt-4o", "openai")
    yield "domain", lambda: enforcer.enforce_network("api.eu.example.com", "https")
    yield "domain, beyond ASCII", lambda: enforcer.enforce_network("b\u00fccher.example.com", "https")
    yield "domain, refused", lambda: enforcer.check_network("api.example.net", "https")
    yield "path, of a file that is there", lambda: enforcer.enforce_filesystem(f"{directory}/report.csv", "read")
    yield "path, refused", lambda: enforcer.check_filesystem(f"{directory}/../report.csv", "read")
    yield "rate of requests, in memory", lambda: enforcer.enforce_rate_limit("requests")


def _signed(content: Dict[str, Any]) -> Tuple[bytes, bytes]:
    """A signed policy as a platform sends it, and its key."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from sekuire.policy.document import content_hash, signed_message

    private = Ed25519PrivateKey.generate()
    key = private.public_key().public_bytes_raw()
    digest = content_hash(content)
    signature = private.sign(signed_message(digest, "pol_1", 1, "ws_1"))
    head = {"policy_id": "pol_1", "workspace_id": "ws_1", "version": 1, "status": "active"}
    return json.dumps({**head, "hash": digest, "content": content, "signature": signature.hex()}).encode(), key


def _verification(content: Dict[str, Any]) -> Iterator[Tuple[str, Callable[[], Any]]]:
    from sekuire.policy.document import decode_policy

    try:
        body, key = _signed(content)
    except (ImportError, ConfigurationError) as error:
        print(f"left out: verifying a policy ({error})", file=sys.stderr)
        return
    size = f"{len(body) / 1024:.1f} KB"
    yield f"verify a policy of {size}", lambda: decode_policy(body, workspace_id="ws_1", trusted_keys=[key])


def _per_second(run: Callable[[], Any], seconds: float) -> float:
    """Calls a second by the clock on the wall: for what waits for another process."""
    done, begun = 0, time.perf_counter()
    while time.perf_counter() - begun < seconds:
        run()
        done += 1
    return done / (time.perf_counter() - begun)


def main(arguments: Optional[List[str]] = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.policy", description="What a policy decision costs.")
    parser.add_argument("--seconds", type=float, default=0.5, help="for each kind")
    parser.add_argument("--storage-uri", help="also measure a shared rate limit, for example redis://localhost:6379")
    options = parser.parse_args(arguments)
    rows = []
    with tempfile.TemporaryDirectory(prefix="sekuire-policy-") as directory:
        directory = os.path.realpath(directory)
        with open(os.path.join(directory, "report.csv"), "wb"):
            pass
        content = _content(directory)
        policy = Policy.from_content(content, workspace_id="ws_1")
        enforcer = PolicyEnforcer(policy)
        stages = list(_questions(enforcer, directory))
        stages.append(("make an enforcer", lambda: PolicyEnforcer(policy)))
        stages += _verification(content)
        for name, run in stages:
            took = measure(Stage(name, run), options.seconds)
            spread = f"{number(took['lowest_us'])} - {number(took['highest_us'])}"
            rows.append([name, number(took["cpu_us"]), spread, number(1e6 / took["cpu_us"])])
    facts = report.facts()
    print(", ".join(f"{name} {facts[name]}" for name in ("cpu", "cores", "python", "load before")))
    print(f"a policy with {_ENTRIES} entries in each list\n")
    print(table(["decision", "CPU µs", "min - max", "a second"], rows))
    if options.storage_uri:
        limiter = RateLimiter(options.storage_uri, namespace=f"benchmark-{os.getpid()}")
        endless = Policy.from_content({"rate_limits": {"requests": {"max_per_minute": 10**6, "max_per_hour": 10**7}}})
        shared = PolicyEnforcer(endless, limiter=limiter)
        rate = _per_second(lambda: shared.enforce_rate_limit("requests"), max(options.seconds, 1.0))
        print(f"\nrate of requests, shared through a store: {number(rate)} a second, one after the other")
    return 0


if __name__ == "__main__":
    sys.exit(main())
