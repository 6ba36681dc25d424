"""Show the health of a worker that has ``--http``, and exit by it: ``sekuire status``."""

from __future__ import annotations

import argparse
import http.client
import json
import socket
from typing import Any, Dict, List, NamedTuple, Optional, Tuple
from urllib.parse import urlsplit

from ..config import ENVIRONMENT, health_address, is_loopback, shown_address, source_of, variable
from ..errors import ConfigurationError
from ..service.arguments import seconds
from ..wire.protocol import one_line
from . import terminal
from .exits import FAILED, OK, CommandError
from .options import add_env_file

DESCRIPTION = """\
Ask a worker that was started with --http (or SEKUIRE_WORKER_HTTP, or the option health) how it is, and show it as a
table. URL is its address, such as http://127.0.0.1:8080, or PORT, or HOST:PORT; without it that of SEKUIRE_WORKER_HTTP,
or port 8080 of this machine."""
EPILOG = """\
example:  sekuire status                     (in a container, as the probe of its readiness)
          sekuire status 8080 --live         (as the probe of its liveness: a pause or an outage does not fail it)

Exit codes: 0 ready for tasks (with --live: alive); 1 not, or no worker answers; 2 wrong usage or configuration."""
LOG_LEVEL = "warning"

_DEFAULT = ("127.0.0.1", 8080)
#: Addresses that mean every interface, where a server listens, and the one to ask instead.
_ANY = {"0.0.0.0": "127.0.0.1", "::": "::1"}
#: Most bytes of an answer.
_MOST = 1024 * 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("url", nargs="?", metavar="URL", help="the worker's address, its port, or HOST:PORT")
    parser.add_argument("--live", action="store_true", help="exit by /livez: 0 while the worker's own threads live")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--timeout", type=seconds, default=3.0, metavar="S", help="longest wait for each answer (default: 3)"
    )
    add_env_file(parser)


def run(args: argparse.Namespace) -> int:
    place = _place(args.url)
    live, ready, status = _ask_all(place, args.timeout)
    is_well = bool(live["live"] if args.live else ready["ready"])
    if args.json:
        found = {"url": place.url, **live, **ready, "workers": None, **(status or {})}
        found["reasons"] = [*live["reasons"], *ready["reasons"]]
        terminal.say(json.dumps(found, indent=2))
    else:
        for line in _lines(place, live, ready, status):
            terminal.say(line)
    return OK if is_well else FAILED


# -- where ------------------------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """Hold where a worker shows its health."""

    is_tls: bool
    host: str
    port: int

    @property
    def url(self) -> str:
        """Return the address as a URL."""
        return f"http{'s' if self.is_tls else ''}://{shown_address((self.host, self.port))}"


def _place(given: Optional[str]) -> Place:
    """Return where to ask.

    :raises CommandError: the argument is wrong.
    :raises ConfigurationError: the variable is wrong.
    """
    if given is not None and "://" in given:
        return _of_url(given)
    if given is not None:
        found = health_address(given)
        if found is None:
            raise CommandError(f"{given!r} is neither a URL nor PORT nor HOST:PORT, such as http://127.0.0.1:8080")
        return _of_address(found)
    name = ENVIRONMENT["health"]
    text = variable(name)
    if text is None:
        return _of_address(_DEFAULT)
    found = health_address(text)
    if found is None:
        raise ConfigurationError(f"must be PORT or HOST:PORT, got {text[:80]!r}", None, source_of(name))
    return _of_address(found)


def _of_address(address: Tuple[str, int]) -> Place:
    return Place(False, _ANY.get(address[0], address[0]), address[1])


def _of_url(given: str) -> Place:
    try:
        parts = urlsplit(given)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
        raise CommandError("URL must be such as http://127.0.0.1:8080, without a user name")
    is_tls = parts.scheme == "https"
    return Place(is_tls, _ANY.get(parts.hostname, parts.hostname), port or (443 if is_tls else 80))


# -- asking -----------------------------------------------------------------------------------------------------------


def _ask_all(place: Place, timeout: float) -> Tuple[Dict[str, Any], Dict[str, Any], Optional[Dict[str, Any]]]:
    """Return what ``/livez``, ``/readyz`` and, where it is shown, ``/status`` say.

    :raises CommandError: no worker answers.
    """
    answers: List[Tuple[int, Any]] = []
    for path in ("/livez", "/readyz", "/status"):
        problem = ""
        try:
            answers.append(_ask(place, path, timeout))
        except socket.timeout:
            problem = f"no answer within {timeout:g} s"
        except (OSError, http.client.HTTPException) as error:
            problem = getattr(error, "strerror", None) or str(error) or type(error).__name__
        if problem:
            hint = ""
            if is_loopback(place.host):
                hint = f"; is it started with --http {place.port} (SEKUIRE_WORKER_HTTP)?"
            raise CommandError(f"no worker answers at {place.url} ({problem}){hint}", code=FAILED)
    (_, live), (_, ready), (code, status) = answers
    for found, key in ((live, "live"), (ready, "ready")):
        if not isinstance(found, dict) or not isinstance(found.get(key), bool):
            said = f" ({found['error']})" if isinstance(found, dict) and isinstance(found.get("error"), str) else ""
            raise CommandError(f"another server than a worker's answers at {place.url}{said}", code=FAILED)
        found.setdefault("reasons", [])
    return live, ready, status if code == 200 and isinstance(status, dict) else None


def _ask(place: Place, path: str, timeout: float) -> Tuple[int, Any]:
    kind = http.client.HTTPSConnection if place.is_tls else http.client.HTTPConnection
    connection = kind(place.host, place.port, timeout=timeout)
    try:
        connection.request("GET", path, headers={"Accept": "application/json"})
        answer = connection.getresponse()
        body = answer.read(_MOST)
    finally:
        connection.close()
    try:
        return answer.status, json.loads(body)
    except ValueError:
        return answer.status, None


# -- showing ----------------------------------------------------------------------------------------------------------


def _lines(place: Place, live: Dict[str, Any], ready: Dict[str, Any], status: Optional[Dict[str, Any]]) -> List[str]:
    word, colour = ("ready", "green") if ready["ready"] else ("not ready", "yellow")
    if not live["live"]:
        word, colour = "not alive", "red"
    reasons = ", ".join(map(str, [*live["reasons"], *ready["reasons"]]))
    process = f" (process {status.get('pid')}, sekuire {status.get('version')})" if status is not None else ""
    lines = [f"{terminal.paint(word, colour)}{': ' if reasons else ''}{terminal.clean(reasons)}", ""]
    rows = [("url", place.url + process)]
    for note in ready.get("notes") or []:
        rows.append(("note", str(note)))
    for one in (status or {}).get("workers") or []:
        rows += _rows(one)
    if status is None:
        rows.append(("status", "not shown there: it is for loopback, or SEKUIRE_WORKER_HTTP_STATUS=1"))
    return lines + terminal.plain_table([(name, one_line(value)) for name, value in rows])


def _rows(worker: Dict[str, Any]) -> List[Tuple[str, str]]:
    """Return the rows for one worker of ``/status``."""
    stats = worker["stats"]
    age, left = worker["heartbeat_age"], worker["lease_seconds_left"]
    rows = [
        ("", ""),
        ("worker", f"{worker['worker_id'][:8]} of {worker['agent_id']}, {worker['state']}"),
        ("reasons", ", ".join(worker["reasons"]) or "none: it is ready"),
        ("installation", worker["installation_id"] or "none yet"),
        ("heartbeat", "none was accepted yet" if age is None else f"accepted {age:.0f} s ago"),
        ("lease", "none, so work is not limited" if left is None else _left(left)),
        ("policy", worker["policy"]),
        ("tasks", f"{stats['running']} of {worker['max_workers']} running, {stats['waiting']} waiting"),
        (
            "ended",
            f"{stats['completed']} completed, {stats['failed']} failed, {stats['rejected']} rejected, "
            f"{stats['released']} given back",
        ),
        ("results", f"{stats['undelivered']} not delivered"),
        ("reconnects", str(stats["reconnects"])),
    ]
    if stats["overdue"]:
        rows.append(("overdue", f"{stats['overdue']} handlers still run although their task has ended"))
    if worker["error"]:
        rows.append(("error", worker["error"]))
    return rows


def _left(seconds_left: float) -> str:
    return f"{seconds_left:.0f} s left" if seconds_left >= 0 else f"ended {-seconds_left:.0f} s ago"
