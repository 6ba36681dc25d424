"""What it costs to submit tasks and to wait for them: ``python -m benchmarks.submits``.

Every round runs, in fresh processes against the fast platform, a plain ``requests.Session().post`` and then a client
that submits with ``submit_many``. Afterwards the requests are counted of a single ``call()`` and of many handles that
are waited for. Nothing here passes or fails on a time.
"""

from __future__ import annotations

import argparse
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Dict, Iterator, List, Optional

from sekuire import SekuireClient

from . import measuring, payloads, report
from .process import Child, ChildError, Message, busy, hear, say, usage, wanted
from .report import Spread, cells, number, table

#: Submissions before anything is measured: connections and threads are there then.
_WARM_UP = 500
#: Seconds that the task of a single call takes.
_CALL_SECONDS = 1.0


def _items(count: int) -> Iterator[Dict[str, Any]]:
    for number_ in range(count):
        yield {"capability": payloads.CAPABILITY, "input": payloads.task_input(number_)}


def _submit(client: SekuireClient, order: Message) -> Message:
    """Submit as many as ordered, and keep none of the handles."""
    before = usage()
    done = sum(1 for _ in client.submit_many(_items(order["count"]), max_in_flight=order["max_in_flight"]))
    after = usage()
    return {
        "cpu_us": (after["cpu_ns"] - before["cpu_ns"]) / 1e3 / done,
        "per_second": done * 1e9 / (after["wall_ns"] - before["wall_ns"]),
        "busy": busy(before, after),
        "wanted": wanted(before, after),
        "grown_kib": after["rss_kib"] - before["rss_kib"],
    }


def _wait(client: SekuireClient, order: Message) -> Message:
    """Submit as many as ordered, say so, and wait for all of them, one after the other or in threads."""
    handles = list(client.submit_many(_items(order["count"])))
    say({"submitted": len(handles)})
    begun = time.monotonic()
    if order["threads"] > 1:
        with ThreadPoolExecutor(order["threads"]) as pool:
            done = sum(pool.map(lambda handle: handle.wait(60.0), handles))
    else:
        done = sum(handle.wait(60.0) for handle in handles)
    return {"done": done, "seconds": time.monotonic() - begun}


def _client(options: argparse.Namespace) -> None:
    """Do what the parent orders, with one client."""
    url = f"http://127.0.0.1:{options.port}"
    with SekuireClient(api_base_url=url, api_key=payloads.API_KEY, agent_id=payloads.AGENT_ID) as client:
        say({"ready": True})
        while (order := hear()) is not None:
            if order["op"] == "submit":
                say(_submit(client, order))
            elif order["op"] == "wait":
                say(_wait(client, order))
            else:
                output = client.call(payloads.CAPABILITY, payloads.task_input())
                say({"is_right": output == payloads.result()})


def _throughput(platform: Child, port: int, count: int, max_in_flight: int) -> Message:
    with Child("submits", "client", "--port", str(port)) as child:
        child.receive()
        child.ask("submit", count=_WARM_UP, max_in_flight=max_in_flight)
        before = platform.ask("usage")
        figures = child.ask("submit", timeout=300.0, count=count, max_in_flight=max_in_flight)
        figures["platform_busy"] = busy(before, platform.ask("usage"))
    return figures


def _polls(platform: Child, child: Child, count: int, threads: int) -> Message:
    """Wait for open tasks that are completed together. Return what that took, and how many requests."""
    platform.ask("hold")
    child.send("wait", count=count, threads=threads)
    child.receive(timeout=300.0)
    before = platform.ask("usage")
    time.sleep(_CALL_SECONDS)
    platform.ask("let_go")
    figures = child.receive(timeout=300.0)
    after = platform.ask("usage")
    if figures["done"] != count:
        raise ChildError(f"{figures['done']} of {count} tasks were seen to end")
    return {**figures, "polls": after["polls"] - before["polls"], "most_waiting": after["most_waiting"]}


def measure(options: argparse.Namespace) -> Message:
    """All rounds, then what is counted; raw figures."""
    raw: Message = {"floors": [], "submits": [], "waits": {}}
    with Child("platform") as platform:
        port = platform.receive()["port"]
        for _ in range(max(1, options.rounds)):
            raw["floors"].append(measuring.floor(platform, port, "requests", 0.6))
            raw["submits"].append(_throughput(platform, port, options.count, options.max_in_flight))
        with Child("submits", "client", "--port", str(port)) as child:
            child.receive()
            platform.ask("hold")
            before = platform.ask("usage")
            child.send("call")
            time.sleep(_CALL_SECONDS)
            platform.ask("let_go")
            raw["call_is_right"] = child.receive()["is_right"]
            after = platform.ask("usage")
            raw["call"] = {name: after[name] - before[name] for name in ("submits", "polls")}
            for threads in (1, options.threads):
                raw["waits"][str(threads)] = _polls(platform, child, options.count, threads)
    return raw


def show(raw: Message, options: argparse.Namespace) -> None:
    """Print the tables."""
    rows = []
    for label, phases in (("requests.Session().post", raw["floors"]), ("submit_many", raw["submits"])):
        cpu = Spread.of([phase["cpu_us"] for phase in phases])
        speed = Spread.of([phase["per_second"] for phase in phases])
        rows.append([label, *cells(cpu, number), *cells(speed, number)])
    print(table([f"one POST, or one of {options.count:,} submissions", "CPU µs", "min - max", "per second",
                 "min - max"], rows))  # fmt: skip
    print()
    rows = []
    for label, field in (("CPU of a submission ÷ one requests.Session().post", "cpu_us"),
                         ("submissions a second ÷ such posts a second", "per_second")):  # fmt: skip
        found = report.ratio(raw["submits"], raw["floors"], field)
        rows.append([label, *cells(found, "{:.2f}".format)] if found else [label, "refused", "platform saturated"])
    grown = Spread.of([phase["grown_kib"] / 1024 for phase in raw["submits"]])
    rows.append([f"memory (RSS) that {options.count:,} submissions add, MiB", *cells(grown, number)])
    print(table(["", "median", "min - max"], rows))
    print()
    rows = [[f"one call() of {_CALL_SECONDS:g} s", str(raw["call"]["submits"]), str(raw["call"]["polls"]), "1", ""]]
    for threads, figures in raw["waits"].items():
        label = f"{options.count:,} handles, waited for by {threads} thread{'s' if threads != '1' else ''}"
        rows.append([label, f"{options.count}", str(figures["polls"]), str(figures["most_waiting"]),
                     number(figures["seconds"])])  # fmt: skip
    print(table(["waiting", "submissions", "polls", "at once", "seconds"], rows))


def main(arguments: Optional[List[str]] = None) -> int:
    """Measure and print; the further role is the process that it starts."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.submits", description="What submitting tasks costs.")
    parser.add_argument("role", nargs="?", choices=("measure", "client"), default="measure")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--count", type=int, default=10_000, help="submissions of a round")
    parser.add_argument("--max-in-flight", type=int, default=32, help="of submit_many")
    parser.add_argument("--threads", type=int, default=64, help="that wait for the handles, besides one")
    parser.add_argument("--json", metavar="FILE", help="write the raw figures there")
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.role == "client":
        _client(options)
        return 0
    facts = report.facts()
    try:
        raw = measure(options)
    except ChildError as error:
        print(f"cannot measure: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print("  ".join(f"{name} {value}" for name, value in facts.items()) + "\n")
    show(raw, options)
    report.save(options.json, facts, raw)
    return 0


if __name__ == "__main__":
    sys.exit(main())
