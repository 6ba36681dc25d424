"""The command ``python -m benchmarks.gateway``: what a policy gateway adds to a task, and what one decision costs.

Every round starts fresh processes, the worker without a gateway and the worker with one in turn, on the same platform;
the difference is formed within a round. Needs the extra ``policy``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import threading
import time
import timeit
from typing import Any, Callable, Dict, List, Optional

from . import measuring, payloads, report
from .process import Child, ChildError, Message
from .report import Spread, cells, number, table

_DECISIONS = 2000


def _throughput(platform: Child, port: int, threads: int, seconds: float, *more: str) -> Message:
    with Child("worker", "--port", str(port), "--threads", str(threads), *more) as child:
        child.receive()
        platform.ask("feed", seconds=min(seconds, 0.4))
        return measuring.throughput(platform, child, {"seconds": seconds})


def _gateway() -> Any:
    """A gateway under the benchmarks' policy, with nothing to fetch it from but memory."""
    from sekuire.policy.client import PolicyFetcher
    from sekuire.policy.gateway import PolicyGateway
    from sekuire.transport.http import Reply
    from sekuire.wire.protocol import Endpoints

    body = json.dumps(payloads.policy()).encode()

    class Memory:
        def get(self, path: str, deadline: object) -> Reply:
            headers = {"Content-Length": str(len(body))}
            return Reply(200, headers, body, time.monotonic(), time.time())

        def close(self) -> None:
            pass

    gateway = PolicyGateway(PolicyFetcher(Memory(), Endpoints()), payloads.WORKSPACE_ID)
    gateway.refresh()
    return gateway


def _microseconds(run: Callable[[], object], repeats: int = 7) -> Spread:
    """CPU µs of one call: the median of ``repeats`` loops, with the least and the most."""
    timer = timeit.Timer(run, timer=time.thread_time)
    return Spread.of([took * 1e6 / _DECISIONS for took in timer.repeat(repeats, _DECISIONS)])


def _decisions() -> Dict[str, Spread]:
    """One decision, alone and while another thread swaps the policy as fast as it can."""
    gateway = _gateway()
    check = gateway.check_task
    found = {"a decision (check_task)": _microseconds(lambda: check(payloads.CAPABILITY))}
    is_over = threading.Event()

    def swap() -> None:
        while not is_over.is_set():
            gateway.refresh()

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        found["a decision, while the policy is loaded over and over"] = _microseconds(
            lambda: check(payloads.CAPABILITY)
        )
    finally:
        is_over.set()
        thread.join()
    found["loading and verifying a policy"] = Spread.of(
        [took * 1e6 / 50 for took in timeit.Timer(gateway.refresh, timer=time.thread_time).repeat(5, 50)]
    )
    gateway.close()
    return found


def measure(rounds: int, seconds: float, threads: int) -> Message:
    """All rounds, then single decisions; raw figures."""
    found: Dict[str, List[Message]] = {"without": [], "with": []}
    with Child("platform") as platform:
        port = platform.receive()["port"]
        for _ in range(rounds):
            found["without"].append(_throughput(platform, port, threads, seconds))
            found["with"].append(_throughput(platform, port, threads, seconds, "--policy"))
    return {**found, "decisions": {name: spread._asdict() for name, spread in _decisions().items()}}


def show(raw: Message, threads: int) -> None:
    """Print the tables."""
    rows = []
    for name in ("without", "with"):
        phases = raw[name]
        speed = Spread.of([phase["per_second"] for phase in phases])
        cpu = Spread.of([phase["cpu_us"] for phase in phases])
        rows.append([f"worker {name} a gateway, {threads} threads", *cells(cpu, number), *cells(speed, number)])
    print(table(["one task", "CPU µs", "min - max", "per second", "min - max"], rows))
    added = [one["cpu_us"] - other["cpu_us"] for one, other in zip(raw["with"], raw["without"])]
    share = [one["cpu_us"] / other["cpu_us"] for one, other in zip(raw["with"], raw["without"])]
    print(f"\nadded by the gateway: {statistics.median(added):.1f} µs CPU a task"
          f" ({min(added):.1f} - {max(added):.1f}), {statistics.median(share) - 1:+.1%}\n")  # fmt: skip
    rows = [[name, *cells(Spread(**spread), "{:.2f}".format)] for name, spread in raw["decisions"].items()]
    print(table(["alone, one thread", "CPU µs", "min - max"], rows))


def main(arguments: Optional[List[str]] = None) -> int:
    """Measure, print, and write the raw figures where that was asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gateway", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="how often to repeat both workers")
    parser.add_argument("--seconds", type=float, default=2.0, help="of tasks for each worker and round")
    parser.add_argument("--threads", type=int, default=1, help="of the worker")
    parser.add_argument("--json", metavar="FILE", help="write the raw figures there")
    options = parser.parse_args(arguments)
    facts = report.facts()
    try:
        raw = measure(max(1, options.rounds), options.seconds, options.threads)
    except ChildError as error:
        print(f"cannot measure: {error}", file=sys.stderr)
        return 1
    print("  ".join(f"{name} {value}" for name, value in facts.items()) + "\n")
    show(raw, options.threads)
    report.save(options.json, facts, raw)
    return 0


if __name__ == "__main__":
    sys.exit(main())
