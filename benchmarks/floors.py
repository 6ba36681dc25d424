"""What a plain POST costs a client: the floors that a task's cost is compared with.

Run as a process for one kind of client; it says when it is warm, and measures when it is told to.
"""

from __future__ import annotations

import argparse
import http.client
import json
import time
from typing import Callable, Dict, List, Optional

import requests
import urllib3

from . import payloads
from .process import busy, hear, say, usage, wanted

_JSON = "application/json"
#: Calls between two looks at the clock.
_BATCH = 20

Post = Callable[[], None]


def _check(status: int) -> None:
    if status != 200:
        raise RuntimeError(f"the platform answered {status}")


def _http_client(host: str, port: int) -> Post:
    connection = http.client.HTTPConnection(host, port)
    body = payloads.completion()
    headers = {"Content-Type": _JSON}

    def post() -> None:
        connection.request("POST", "/echo", payloads.compact(body).encode(), headers)
        response = connection.getresponse()
        response.read()
        _check(response.status)

    return post


def _urllib3(host: str, port: int) -> Post:
    pool = urllib3.HTTPConnectionPool(host, port, maxsize=1)
    body = payloads.completion()
    headers = {"Content-Type": _JSON}

    def post() -> None:
        response = pool.urlopen("POST", "/echo", body=payloads.compact(body).encode(), headers=headers)
        _check(response.status)

    return post


def _requests(host: str, port: int, trust_env: bool = True) -> Post:
    session = requests.Session()
    session.trust_env = trust_env
    body = payloads.completion()
    url = f"http://{host}:{port}/echo"

    def post() -> None:
        _check(session.post(url, json=body).status_code)

    return post


def _requests_no_env(host: str, port: int) -> Post:
    return _requests(host, port, trust_env=False)


#: Every floor by its name, from dear to cheap; all encode the same body and read the whole answer.
KINDS: Dict[str, Callable[[str, int], Post]] = {
    "requests": _requests,
    "requests-no-env": _requests_no_env,
    "urllib3": _urllib3,
    "http.client": _http_client,
}

LABELS: Dict[str, str] = {
    "requests": "requests.Session().post(url, json=…)",
    "requests-no-env": "  the same, trust_env=False",
    "urllib3": "urllib3.HTTPConnectionPool.urlopen",
    "http.client": "http.client.HTTPConnection.request",
}


def _repeat(post: Post, seconds: float) -> int:
    """Post for about so long; the number of calls."""
    calls = 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for _ in range(_BATCH):
            post()
        calls += _BATCH
    return calls


def main(arguments: Optional[List[str]] = None) -> None:
    """Measure one floor as often as the parent asks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("kind", choices=list(KINDS))
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--warm-up", type=float, default=0.15, metavar="SECONDS")
    options = parser.parse_args(arguments)
    post = KINDS[options.kind]("127.0.0.1", options.port)
    _repeat(post, options.warm_up)
    say({"ready": True, "body_bytes": len(json.dumps(payloads.completion(), separators=(",", ":")))})
    while True:
        order = hear()
        if order is None:
            return
        before = usage()
        calls = _repeat(post, order["seconds"])
        after = usage()
        say(
            {
                "calls": calls,
                "cpu_us": (after["cpu_ns"] - before["cpu_ns"]) / 1e3 / calls,
                "per_second": calls * 1e9 / (after["wall_ns"] - before["wall_ns"]),
                "busy": busy(before, after),
                "wanted": wanted(before, after),
            }
        )


if __name__ == "__main__":
    main()
