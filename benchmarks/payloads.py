"""The task and the result that every measurement uses, so that all of them speak of the same bytes."""

from __future__ import annotations

import json
from typing import Any, Dict

AGENT_ID = "agent-benchmark"
WORKSPACE_ID = "workspace-benchmark"
INSTALLATION_ID = "installation-benchmark"
#: Known to both sides; the platform refuses a call without it.
RUNTIME_TOKEN = "benchmark-runtime-token-0123456789abcdef"
#: The same for who submits tasks.
API_KEY = "sk_live_benchmark0123456789abcdef"
CAPABILITY = "bench.noop"

#: Size of a task's input and of a result, in bytes of compact JSON.
INPUT_BYTES = 1024
RESULT_BYTES = 100

#: A clock value of typical width; the platform puts the real one in its place.
_TYPICAL_NS = 10**15


def compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def task_input(sent_ns: int = _TYPICAL_NS) -> Dict[str, Any]:
    """An input of 1 KB: a small order with lines, so that a parser meets keys, numbers and text in the usual mixture.

    ``sent_ns`` is the monotonic clock at sending; processes of one machine share that clock on Linux.
    """
    document: Dict[str, Any] = {
        "sent_ns": sent_ns,
        "order_id": "ord-2024-000417",
        "customer": {"id": 90210, "name": "Ada Example", "country": "NL", "verified": True},
        "lines": [
            {"sku": f"SKU-{number:05d}", "quantity": number % 4 + 1, "price": 12.5 + number, "gift": number % 3 == 0}
            for number in range(8)
        ],
        "discount": None,
        "note": "",
    }
    missing = INPUT_BYTES - len(compact({**document, "sent_ns": _TYPICAL_NS}))
    document["note"] = ("please leave it with the neighbours if nobody answers; " * 20)[:missing]
    return document


def result() -> Dict[str, Any]:
    """A handler's result of 100 bytes."""
    document: Dict[str, Any] = {"accepted": True, "score": 0.875, "order_id": "ord-2024-000417", "note": ""}
    document["note"] = ("packed and ready to be sent to the customer" * 2)[: RESULT_BYTES - len(compact(document))]
    return document


def policy() -> Dict[str, Any]:
    """An unsigned policy that lets the benchmark's tasks begin, and asks something of each. Needs the extra."""
    from sekuire.policy.document import content_hash

    content = {
        "agent": {
            "capabilities": {"allowed_capabilities": ["bench.*", "other"], "denied_capabilities": ["drop.*", "rm"]}
        },
        "rate_limits": {"requests": {"max_per_minute": 10**8, "max_per_hour": 10**9}},
    }
    return {
        "policy_id": "policy-benchmark",
        "workspace_id": WORKSPACE_ID,
        "version": 1,
        "status": "active",
        "hash": content_hash(content),
        "content": content,
    }


def big_text() -> str:
    """A task of just under 16 MiB, the largest that is taken by default: many small orders."""
    one = compact(task_input())
    orders = ",".join([one] * (16 * 1024 * 1024 // (len(one) + 1) - 1))
    return f'{{"task_id":"{task_id(0)}","capability":"{CAPABILITY}","input":[{orders}]}}'


def task_id(number: int) -> str:
    """The id of the task with that number, as wide as a UUID."""
    return f"00000000-0000-4000-8000-{number:012x}"


def task_text(number: int = 1, sent_ns: int = _TYPICAL_NS, capability: str = CAPABILITY) -> str:
    """A task as the platform sends it: compact JSON, without line ends."""
    return compact(
        {
            "task_id": task_id(number),
            "capability": capability,
            "input": task_input(sent_ns),
            "workspace_id": WORKSPACE_ID,
            "requester_agent_id": "agent-requester",
            "trace_id": "4bf92f3577b34da6a3ce929d0e0e4736",
            "attempt": 1,
        }
    )


def event_template(capability: str) -> bytes:
    """A task event with ``%`` places for the event's number, the task's number and the clock."""
    text = task_text(0, 0, capability).replace("%", "%%")
    text = text.replace(task_id(0), task_id(0)[:-12] + "%012x", 1).replace('"sent_ns":0', '"sent_ns":%d', 1)
    return b"event: task\nid: %d\ndata: " + text.encode() + b"\n\n"


def task_event(number: int = 1, sent_ns: int = _TYPICAL_NS) -> bytes:
    """One task event as it stands on the wire, within its HTTP chunk."""
    return event_template(CAPABILITY) % (number, number, sent_ns)


def completion(number: int = 1) -> Dict[str, Any]:
    """The body of a completion; the floors post it, so that they carry as many bytes as a worker does."""
    return {
        "task_id": task_id(number),
        "status": "completed",
        "output": result(),
        "execution_time_ms": 0,
        "attempt": 1,
        "worker_id": "worker-0123456789abcdef0123456789abcdef",
    }
