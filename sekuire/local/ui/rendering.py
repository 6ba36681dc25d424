"""Render pages, and alone the regions of a page that have changed. Show values as people read them.

A region is a template that is rendered in its page, and alone for ``?_region=NAME`` on the page's address. A region
that looks as it did (``_v``) is answered with 204, which the page ignores.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import json
from typing import Any, Callable, Dict, Mapping, NamedTuple, Optional, Sequence, Tuple, Union
from urllib.parse import urlencode

import flask
from markupsafe import Markup

from ...wire.protocol import parse_time
from ..store import Refusal

__all__ = ["FILTERS", "Region", "done", "render"]

#: Stands where there is no value.
NOTHING = "\u2013"
#: Largest value that is shown in full, in characters.
_MOST_SHOWN = 100_000


class Region(NamedTuple):
    """Describe a part of a page that is asked for again when one of its topics has changed."""

    topics: Sequence[str]
    build: Callable[[], Mapping[str, Any]]
    #: Seconds after which it is asked for again without a change. 0: never.
    every: int = 0


def render(
    name: str, title: str, regions: Mapping[str, Region], *, status: int = 200, only: str = "", **context: Any
) -> flask.Response:
    """Return a page, or the one region of it that the query asks for, or that is ``only`` wanted."""
    wanted = only or flask.request.args.get("_region")
    if wanted is not None:
        if wanted not in regions:
            raise Refusal(404, "NOT_FOUND", f"this page has no region {wanted!r}")
        html, version = _region(name, wanted, regions[wanted], context)
        if not only and flask.request.args.get("_v") == version:
            return flask.Response(status=204)
        return flask.Response(html, mimetype="text/html")

    def region(which: str) -> Markup:
        return _region(name, which, regions[which], context)[0]

    text = flask.render_template(f"{name}.html", title=title, page=name, region=region, **context)
    return flask.Response(text, status, mimetype="text/html")


def _region(page: str, name: str, region: Region, context: Mapping[str, Any]) -> Tuple[Markup, str]:
    inner = flask.render_template(f"{page}_{name}.html", page=page, **{**context, **region.build()})
    version = hashlib.sha256(inner.encode("utf-8", "replace")).hexdigest()[:12]
    pairs = [(key, value) for key, value in flask.request.args.items(multi=True) if not key.startswith("_")]
    address = f"{flask.request.path}?{urlencode([*pairs, ('_region', name), ('_v', version)])}"
    html = flask.render_template(
        "region.html", name=name, topics=" ".join(region.topics), every=region.every, address=address,
        inner=Markup(inner),
    )  # fmt: skip
    return Markup(html), version


def done(message: str, to: str, *, moves: bool = False, is_bad: bool = False) -> flask.Response:
    """Answer an action: a notice for a page that runs scripts, else the way back.

    :param moves: the page goes to ``to`` in both cases.
    """
    if "HX-Request" not in flask.request.headers:
        return flask.redirect(to, 303)  # type: ignore[return-value]
    response = flask.Response(status=204)
    response.headers["HX-Trigger"] = json.dumps({"notice": {"text": message, "bad": is_bad}})
    if moves:
        response.headers["HX-Redirect"] = to
    return response


# -- filters -----------------------------------------------------------------------------------------------------------


def _instant(value: Union[str, float, None]) -> Optional[dt.datetime]:
    if value is None:
        return None
    if isinstance(value, str):
        return parse_time(value)
    return dt.datetime.fromtimestamp(value, dt.timezone.utc)


def when(value: Union[str, float, None], kind: str = "ago") -> Union[str, Markup]:
    """Return a ``<time>``. A script makes it relative; without one it shows the time of the day.

    :param kind: ``ago``, ``left`` (a countdown), ``since`` (a duration that grows) or ``clock`` (stays as it is).
    """
    at = _instant(value)
    if at is None:
        return NOTHING
    exact = at.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return Markup('<time datetime="{}" data-kind="{}" title="{}">{}</time>').format(
        exact, kind, at.strftime("%Y-%m-%d %H:%M:%S.%f")[:-3] + " UTC", at.strftime("%H:%M:%S")
    )


def duration(seconds: Optional[float]) -> str:
    """Return a duration with two or three significant digits: 8 ms, 1.24 s, 3 min 20 s."""
    if seconds is None:
        return NOTHING
    if seconds < 0.9995:
        milliseconds = seconds * 1000
        return f"{milliseconds:.1f} ms" if milliseconds < 9.95 else f"{milliseconds:.0f} ms"
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 9.995 else f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def span(begin: Union[str, float, None], end: Union[str, float, None]) -> Optional[float]:
    """Return the seconds from one time to another."""
    first, last = _instant(begin), _instant(end)
    return None if first is None or last is None else max(0.0, (last - first).total_seconds())


def short(value: Optional[str]) -> str:
    """Return an id without its prefix, cut to what tells it from others on one page."""
    if not value:
        return NOTHING
    prefix, _, rest = value.partition("_")
    text = rest if rest and len(prefix) <= 6 else value
    return text[:8] if len(text) > 12 else text


def pretty(value: Any) -> str:
    text = json.dumps(value, indent=2, ensure_ascii=False, sort_keys=False)
    if len(text) > _MOST_SHOWN:
        return f"{text[:_MOST_SHOWN]}\n… {len(text) - _MOST_SHOWN:,} more characters"
    return text


def compact(value: Any, most: int = 160) -> str:
    text = json.dumps(value, ensure_ascii=False, separators=(", ", ": "))
    return text if len(text) <= most else f"{text[: most - 1]}…"


def pairs(value: Mapping[str, Any], most: int = 500) -> str:
    """Return the values of an event as NAME=VALUE, without its task, which has a place of its own."""
    parts = [
        f"{name}={one if isinstance(one, str) and one and ' ' not in one else compact(one, most)}"
        for name, one in value.items()
        if name != "task_id" and one is not None
    ]
    text = " ".join(parts)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def percent(share: Optional[float]) -> str:
    if share is None:
        return NOTHING
    return f"{share * 100:.1f} %" if 0 < share < 0.1 else f"{share * 100:.0f} %"


def number(value: Optional[float]) -> str:
    """Return a number with thin spaces between thousands."""
    if value is None:
        return NOTHING
    if value == int(value):
        return f"{int(value):,}".replace(",", "\u202f")
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"


def plural(count: int, one: str, more: Optional[str] = None) -> str:
    return f"{number(count)} {one if count == 1 else more or one + 's'}"


FILTERS: Dict[str, Callable[..., Any]] = {
    "when": when,
    "duration": duration,
    "span": span,
    "short": short,
    "pretty": pretty,
    "compact": compact,
    "pairs": pairs,
    "percent": percent,
    "number": number,
    "plural": plural,
}
