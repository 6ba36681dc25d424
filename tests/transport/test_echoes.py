"""A token that a server echoes does not reach an error or a log, however the server escapes it."""

from __future__ import annotations

import html
import json
import logging
from typing import Any, Callable
from urllib.parse import quote

import pytest

from sekuire import create_worker
from sekuire.errors import AuthenticationError
from sekuire.transport.echoes import is_shown, without
from tests.support.scripted import Scripted
from tests.support.waiting import until

TOKEN = "rt/a+b=c&s-e_c\"x'1"


def php(text: str) -> str:
    return json.dumps(text).replace("/", "\\/")[1:-1]


def dotnet(text: str) -> str:
    return "".join(one if one.isalnum() else f"\\u{ord(one):04X}" for one in text)


def numbered(text: str) -> str:
    return "".join(one if one.isalnum() else f"&#{ord(one)};" for one in text)


@pytest.mark.parametrize("escape", [str, php, dotnet, lambda text: php(php(text)), quote, html.escape, numbered])
def test_each_way_to_escape(escape: Callable[[str], str]) -> None:
    """The token goes, each time it is there, and what is around it stays."""
    content = f"a%20 &amp; \\n{escape(TOKEN)} b \\/ {escape(TOKEN)}.".encode()
    assert without(TOKEN, content) == b"a%20 &amp; \\n*** b \\/ ***."


def test_what_is_shown() -> None:
    """A success in JSON is never quoted; a page with the status of a success is."""
    assert not is_shown(200, b"\xef\xbb\xbf {}")
    assert not is_shown(204, b"")
    assert is_shown(200, b"Authorization: Bearer x")
    assert is_shown(403, b"{}")


def test_a_short_token() -> None:
    """A token of two characters stays, so that an answer keeps its form."""
    assert without("ab", b"ab") == b"ab"
    assert without("a\\b", b"a\\/b") == b"a\\/b"


@pytest.mark.parametrize("escape", [php, dotnet])
@pytest.mark.parametrize(("status", "kind"), [(200, "text/plain"), (403, "application/json")])
def test_an_echo_of_a_login(
    scripted: Scripted, caplog: pytest.LogCaptureFixture, escape: Any, status: int, kind: str
) -> None:
    """An install token that the answer to the login repeats is in neither the error nor the log."""
    caplog.set_level(logging.DEBUG, "sekuire")
    shown = escape(TOKEN)
    body = json.dumps({"error": "no", "message": "?"}).replace("?", shown)
    scripted.on["bootstrap"] = lambda request: (
        status,
        body.encode() if status == 403 else f"you sent {shown}".encode(),
        {"Content-Type": kind},
    )
    worker = create_worker(api_base_url=scripted.url, agent_id="a", install_token=TOKEN)
    worker.on_task("x", lambda ctx, input: input)
    with pytest.raises(AuthenticationError) as caught:
        worker.start()
    for text in (str(caught.value), caplog.text):
        assert "***" in text
        assert "rt/a" not in text
        assert "s-e_c" not in text


@pytest.mark.parametrize("escape", [str, dotnet])
def test_an_echo_of_a_heartbeat(scripted: Scripted, caplog: pytest.LogCaptureFixture, escape: Any) -> None:
    """A server that answers a heartbeat with its headers, as 200 and plain text, puts no token into the log."""
    caplog.set_level(logging.DEBUG, "sekuire")
    scripted.on["heartbeat"] = lambda request: (
        200,
        escape(request.headers["Authorization"]).encode(),
        {"Content-Type": "text/plain"},
    )
    worker = create_worker(
        api_base_url=scripted.url, agent_id="a", runtime_token=TOKEN, installation_id="i", heartbeat_interval=1.0
    )
    worker.on_task("x", lambda ctx, input: input)
    with worker:
        until(lambda: "a heartbeat was not accepted" in caplog.text)
    assert "s-e_c" not in caplog.text
    assert "u002D" not in caplog.text
