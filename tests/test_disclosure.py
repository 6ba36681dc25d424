"""The whole library in a process of its own, with everything logged and every frame shown: no secret is in its output.

What it sends to the platform is looked at too: failures, progress, audit events.
"""

from __future__ import annotations

import base64
import contextlib
import html
import json
import os
import pathlib
import socket
import subprocess
import sys
from typing import Any, Dict, Iterator, List, Set
from urllib.parse import quote

import pytest

from sekuire.local import LocalPlatform

from .support.servers import Answer, RawServer, Request, WebServer, free_port, read_request
from .support.waiting import GUARD, until

ODD_TOKEN = "skt_odd\"quote'back\\slash+plus/and%25<&>end"
PASSWORD = "proxy+pass%2Fword"
STORE_PASSWORD = "store-pass-word"
TASKS = ("fine", "broken", "quotes", "own_error", "progress", "no_json")


def echo(request: Request) -> Answer:
    """An error that quotes all that it was asked with, in the platform's form and beside it."""
    text = f"{request.body.decode()} {dict(request.headers)}"
    if request.path.endswith("/policy"):
        return Answer(502, text.encode(), [("Content-Type", "text/html")])
    return Answer(403, {"code": "X", "message": text, "detail": [{"input": text}]})


def quote_in_headers(sock: socket.socket, number: int) -> None:
    """An answer that quotes the request in a header, and in a line that is none. urllib3 logs such lines."""
    sent = read_request(sock).replace(b"\r\n", b" ").replace(b":", b"=")
    head = b"HTTP/1.1 400 Bad %s\r\nContent-Length: 3\r\nSent: %s\r\nsent %s\r\n\r\nbad"
    sock.sendall(head % (sent, sent, sent))


def refuse_as_proxy(sock: socket.socket, number: int) -> None:
    """A proxy that quotes the request, its last headers first, in the status line and in the body."""
    said = b" ".join(reversed(read_request(sock).split(b"\r\n")))
    head = b"HTTP/1.1 407 %s\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n\r\n"
    sock.sendall(head % (said, len(said)) + said)


def be_silent(sock: socket.socket, number: int) -> None:
    while sock.recv(65536):
        pass


def forms_of(secret: str) -> Set[str]:
    """How a secret may stand in a text. Not by the code that is tested."""
    forms = {secret, repr(secret)[1:-1], json.dumps(secret)[1:-1], json.dumps(json.dumps(secret))[3:-3]}
    forms |= {html.escape(secret), quote(secret), quote(secret, safe=""), secret.encode().hex()}
    for before in ("", "u", "us"):
        for alphabet in (base64.b64encode, base64.urlsafe_b64encode):
            encoded = alphabet((before + secret).encode()).decode().rstrip("=")
            forms.add(encoded[4 if before else 0 : -1])
    return {form.lower() for form in forms}


def found_in(text: str, secrets: List[str]) -> List[str]:
    text = text.lower()
    found = []
    for secret in secrets:
        for form in forms_of(secret):
            place = text.find(form)
            if place >= 0:
                found.append(f"{secret}: …{text[max(0, place - 300) : place + 100]}…")
    return found


@pytest.fixture
def life(tmp_path: pathlib.Path) -> Iterator[Dict[str, Any]]:
    """Run the program to its end. Its output, its secrets, and what the platform got."""
    yield from run_life(tmp_path, "tests.support.whole_life")


def run_life(tmp_path: pathlib.Path, module: str) -> Iterator[Dict[str, Any]]:
    with contextlib.ExitStack() as stack:
        platform = stack.enter_context(LocalPlatform(heartbeat_refreshes_token=1.0, redelivery_delay=0.2))
        token = platform.create_install_token("agent-1")
        urls = {
            "ECHO_URL": stack.enter_context(WebServer(echo)).url,
            "BROKEN_URL": stack.enter_context(RawServer(quote_in_headers)).url,
            "SILENT_URL": stack.enter_context(RawServer(be_silent)).url,
        }
        proxy = stack.enter_context(RawServer(refuse_as_proxy)).url
        environ = {
            **os.environ,
            **urls,
            "PYTHONUNBUFFERED": "1",
            "SEKUIRE_AGENT_ID": "agent-1",
            "SEKUIRE_API_URL": platform.url,
            "SEKUIRE_API_KEY": platform.api_key,
            "SEKUIRE_INSTALL_TOKEN": token,
            "SEKUIRE_WORKSPACE_ID": "ws_local",
            "SEKUIRE_CREDENTIALS_FILE": str(tmp_path / "credentials.json"),
            "OUTBOX": str(tmp_path / "outbox.db"),
            "SECRETS_FILE": str(tmp_path / "secrets.json"),
            "ODD_TOKEN": ODD_TOKEN,
            "PROXY_WITH_PASSWORD": proxy.replace("//", f"//user:{PASSWORD}@"),
            "DEAD_PROXY": f"http://user:{PASSWORD}@127.0.0.1:{free_port()}",
            "DEAD_STORE": f"redis://user:{STORE_PASSWORD}@127.0.0.1:{free_port()}/0",
            "WRONG_STORE": f"nothing://user:{STORE_PASSWORD}@127.0.0.1:1/0",
        }
        path = tmp_path / "output.txt"
        with open(path, "wb") as output:
            process = subprocess.Popen([sys.executable, "-m", module], env=environ, stdout=output, stderr=output)
        stack.callback(process.wait, GUARD)
        stack.callback(process.kill)
        until(lambda: process.poll() is not None or bool(platform.installations()))
        ended = {}
        for capability in TASKS:
            ended[capability] = platform.wait(platform.submit(capability, {}, "agent-1"), GUARD)
        platform.expire_tokens()
        platform.wait(platform.submit("fine", {}, "agent-1"), GUARD)
        until(lambda: len(platform.logs("model_call")) > 0)
        platform.revoke(platform.installations()[0]["installation_id"], "it is over", shutdown_timeout=1.0)
        process.wait(GUARD)
        text = path.read_bytes().decode("utf-8", "replace")
        if "KEEP" in os.environ:
            pathlib.Path(os.environ["KEEP"]).write_text(text)
        assert process.returncode == 0, text[-3000:]
        secrets = json.loads((tmp_path / "secrets.json").read_text())
        secrets = sorted({*secrets, token, platform.api_key, ODD_TOKEN, PASSWORD, STORE_PASSWORD})
        yield {"output": text, "secrets": secrets, "ended": ended, "logs": platform.logs(), "outbox": tmp_path}


@pytest.mark.slow
def test_a_whole_life_with_everything_shown(life: Dict[str, Any]) -> None:
    """Logs of all loggers, prints of http.client, tracebacks with variables, reprs, pickles, failures, audit events."""
    output, secrets = life["output"], life["secrets"]
    # It ran: each error was shown, with the variables of frames, and other libraries logged.
    assert output.rstrip().endswith("the end")
    assert output.count("Traceback (most recent call last)") >= 30
    assert "self = " in output
    assert "Failed to parse headers" in output
    assert "KeyboardInterrupt" in output
    assert len(secrets) >= 9
    assert found_in(output, secrets) == []
    sent = {
        name: {key: task.get(key) for key in ("output", "error", "progress", "message")}
        for name, task in life["ended"].items()
    }
    assert sent["own_error"]["error"]["details"]["deep"]
    assert "***" in sent["quotes"]["error"]["message"]
    assert "***" in json.dumps(life["ended"]["progress"])
    assert found_in(json.dumps(life["ended"]), secrets) == []
    assert "***" in json.dumps(life["logs"])
    assert found_in(json.dumps(life["logs"]), secrets) == []
    left = b"".join(path.read_bytes() for path in life["outbox"].glob("outbox.db*"))
    assert found_in(left.decode("latin-1"), secrets) == []
