"""Draw what something between a client and its platform answers: pages, foreign JSON, and interim answers."""

from __future__ import annotations

import email.utils
import http
import json
import random
import re
import time
from typing import Dict, List, NamedTuple, Optional, Tuple

_PREFIX = "/api/v1"
_PATHS: Tuple[Tuple[str, "re.Pattern[str]"], ...] = tuple(
    (name, re.compile(_PREFIX + path + r"\Z"))
    for name, path in (
        ("tasks", "/tasks"),
        ("stream", "/tasks/stream"),
        ("complete", "/tasks/[^/]+/complete"),
        ("release", "/tasks/[^/]+/release"),
        ("progress", "/tasks/[^/]+/progress"),
        ("bootstrap", "/installations/bootstrap"),
        ("refresh", "/installations/[^/]+/refresh"),
        ("heartbeat", "/installations/[^/]+/heartbeat"),
        ("capabilities", "/installations/[^/]+/capabilities"),
        ("policy", "/workspaces/[^/]+/policy"),
    )
)
#: The endpoints that get pages.
ENDPOINTS = tuple(name for name, _ in _PATHS)

#: Statuses that an error page, a portal, a firewall or an ingress sends.
STATUSES = (
    200, 202, 301, 302, 303, 307, 308, 400, 401, 402, 403, 404, 405, 408, 409, 410, 413, 421, 422, 425, 426, 429, 431,
    451, 500, 501, 502, 503, 504, 520, 530,
)  # fmt: skip
#: Those that are retried even where nothing proves yet that the address is the platform's.
_ALWAYS_RETRIED = frozenset({401, 408, 425, 429, *range(500, 600)})
#: Endpoints whose answers need fields: JSON without them is not a success, whatever its status.
_NEED_FIELDS = ("bootstrap", "refresh", "heartbeat", "policy", "stream")
_FOREIGN = ({"status": "ok"}, {"detail": "Not Found"}, {"message": "no Route matched with those values"})


class Page(NamedTuple):
    """An answer that is not the platform's: its name in the figures, and its bytes."""

    name: str
    data: bytes
    #: True if the connection ends with it.
    is_last: bool = False


def endpoint_of(path: str) -> Optional[str]:
    """Return the endpoint of a path without its query, if it is one that gets pages."""
    return next((name for name, pattern in _PATHS if pattern.match(path)), None)


def draw_page(dice: random.Random, endpoint: str, *, is_proven: bool) -> Page:
    """Return a page that must not decide anything at this endpoint.

    :param is_proven: this endpoint has already answered this client. Before that, most pages rightly mean "another
        server answered", and a worker gives up on them.
    """
    statuses = [one for one in STATUSES if is_proven or one in _ALWAYS_RETRIED]
    form = dice.choices(("html", "json", "text", "empty", "cut"), (5, 3, 1, 1, 1))[0]
    if form == "cut":
        # A page that was announced and never came.
        status = 200 if is_proven else 502
        return Page(f"{status}-cut", _answer(dice, status, "text/html", b"", announced=500), is_last=True)
    status = dice.choice(statuses)
    if form == "empty" and status < 300:
        # An empty success is an answer of the platform, at some endpoints.
        form = "html"
    if form == "json":
        value: object = dice.choice(_FOREIGN)
        if status < 300 and endpoint not in _NEED_FIELDS:
            value = ["ok"]
        return Page(f"{status}-json", _answer(dice, status, "application/json", json.dumps(value).encode()))
    if form == "text":
        return Page(f"{status}-text", _answer(dice, status, "text/plain", b"upstream connect error\n"))
    if form == "empty":
        return Page(f"{status}-empty", _answer(dice, status, "", b""))
    body = b"<!DOCTYPE html><html><head><title>%d</title></head><body><h1>%d</h1></body></html>" % (status, status)
    return Page(f"{status}-html", _answer(dice, status, "text/html; charset=utf-8", body))


def draw_interim(dice: random.Random) -> bytes:
    """Return one or more interim answers."""
    found = dice.choices(
        (
            b"HTTP/1.1 102 Processing\r\n\r\n",
            b"HTTP/1.1 103 Early Hints\r\nLink: </style.css>; rel=preload; as=style\r\n\r\n",
            b"HTTP/1.1 100 Continue\r\n\r\n",
        ),
        (4, 4, 1),
        k=dice.choices((1, 2, 4), (6, 3, 1))[0],
    )
    return b"".join(found)


def _answer(dice: random.Random, status: int, content_type: str, body: bytes, announced: Optional[int] = None) -> bytes:
    lines = [f"HTTP/1.1 {status} {_REASONS.get(status, 'Unknown Error')}", "Server: something in between"]
    lines.append(f"Content-Length: {len(body) if announced is None else announced}")
    if content_type:
        lines.append(f"Content-Type: {content_type}")
    if 300 <= status < 400:
        lines.append("Location: /portal/login")
    if status == 401:
        lines.append('WWW-Authenticate: Basic realm="portal"')
    if status in (429, 503) and dice.random() < 0.5:
        lines += _retry_after(dice)
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def _retry_after(dice: random.Random) -> List[str]:
    if dice.random() < 0.7:
        return ["Retry-After: 1"]
    now = time.time()
    return [f"Date: {email.utils.formatdate(now, usegmt=True)}",
            f"Retry-After: {email.utils.formatdate(now + 1.0, usegmt=True)}"]  # fmt: skip


_REASONS: Dict[int, str] = {one.value: one.phrase for one in http.HTTPStatus}
