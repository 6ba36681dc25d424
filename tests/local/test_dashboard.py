"""The dashboard over HTTP: who gets in, what its answers carry, and that nothing of a task becomes a part of a page."""

from __future__ import annotations

import datetime
import gzip
import hashlib
import html
import http.client
import json
import pathlib
import re
import socket
from typing import Any, Callable, Dict, Iterator, List, Mapping, NamedTuple, Optional
from urllib.parse import urlencode, urlsplit

import pytest

from sekuire.errors import ConfigurationError
from sekuire.local import LocalPlatform
from sekuire.local.ui import signals

from ..contract.client import audit_event
from ..support.waiting import GUARD, until
from .conftest import client_of

STATIC = pathlib.Path(signals.__file__).parent / "static"
SCRIPT = '<script>alert("1")</script>'
PAGES = [
    "/ui/", "/ui/tasks", "/ui/submit", "/ui/workers", "/ui/approvals", "/ui/policy", "/ui/audit", "/ui/faults",
    "/ui/requests",
]  # fmt: skip


class Answer(NamedTuple):
    status: int
    headers: Mapping[str, str]
    text: str


class Browser:
    """What a browser does without its scripts: it keeps the cookie, and sends forms with their token."""

    def __init__(self, platform: LocalPlatform) -> None:
        self.host = urlsplit(platform.url).netloc
        self.cookie: Optional[str] = None
        self.token = ""

    def ask(self, method: str, path: str, form: Optional[Mapping[str, Any]] = None, **headers: str) -> Answer:
        connection = http.client.HTTPConnection(self.host, timeout=GUARD)
        sent: Dict[str, str] = {name.replace("_", "-"): value for name, value in headers.items()}
        if self.cookie is not None:
            sent.setdefault("Cookie", self.cookie)
        body = None
        if form is not None:
            body = urlencode(form, doseq=True)
            sent["Content-Type"] = "application/x-www-form-urlencoded"
        try:
            connection.request(method, path, body, sent)
            response = connection.getresponse()
            return Answer(response.status, dict(response.headers), response.read().decode())
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Answer:
        return self.ask("GET", path, **headers)

    def post(self, path: str, form: Optional[Mapping[str, Any]] = None, **headers: str) -> Answer:
        return self.ask("POST", path, {"_token": self.token, **(form or {})}, **headers)

    def enter(self, link: str) -> Answer:
        code = urlsplit(link).query.partition("=")[2]
        answer = self.ask("POST", "/ui/login", {"code": code})
        if answer.status == 303:
            self.cookie = answer.headers["Set-Cookie"].partition(";")[0]
            self.token = re.findall(r'name="_token" value="([0-9a-f]{64})"', self.get("/ui/tasks").text)[0]
        return answer


@pytest.fixture
def shown(make: Callable[..., LocalPlatform]) -> LocalPlatform:
    return make(redelivery_delay=0.2, retry_delay=0.05, ui=True)


@pytest.fixture
def browser(shown: LocalPlatform) -> Browser:
    browser = Browser(shown)
    assert browser.enter(shown.dashboard_link()).status == 303
    return browser


# -- who gets in -------------------------------------------------------------------------------------------------------


def test_without_the_option_there_is_no_dashboard(platform: LocalPlatform) -> None:
    """A platform of a test serves the contract and nothing else."""
    for path in ("/", "/ui/", "/ui/login"):
        assert Browser(platform).get(path).status == 404
    with pytest.raises(ConfigurationError, match="ui=True"):
        platform.dashboard_link()


def test_a_link_lets_one_browser_in_once(shown: LocalPlatform) -> None:
    """Opening it shows a button; only the button uses it up, so that a preview of the link does not."""
    link = shown.dashboard_link()
    path = link[len(shown.url) :]
    first, second = Browser(shown), Browser(shown)
    assert "Open the dashboard" in first.get(path).text
    assert "Open the dashboard" in first.get(path).text
    assert first.get("/ui/").headers["Location"] == "/ui/login"
    entered = first.enter(link)
    assert entered.status == 303
    assert entered.headers["Location"] == "/ui/"
    cookie = entered.headers["Set-Cookie"]
    assert cookie.startswith(f"sekuire_ui_{urlsplit(shown.url).port}=")
    assert {"HttpOnly", "SameSite=Strict", "Path=/ui"} <= set(cookie.split("; "))
    assert first.get("/ui/").status == 200
    assert second.enter(link).status == 403
    assert second.get("/ui/").status == 303


def test_a_link_expires(shown: LocalPlatform, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sekuire.local.ui.sessions.CODE_SECONDS", 0.0)
    stale = Browser(shown).enter(shown.dashboard_link())
    assert stale.status == 403
    assert "ten minutes" in stale.text


def test_another_link_needs_the_api_key(shown: LocalPlatform) -> None:
    browser = Browser(shown)
    assert browser.ask("POST", "/ui/links", {}).status == 401
    assert browser.ask("POST", "/ui/links", {}, X_API_Key="sk_live_wrong").status == 401
    made = browser.ask("POST", "/ui/links", {}, X_API_Key=shown.api_key)
    assert made.status == 201
    assert browser.enter(json.loads(made.text)["url"]).status == 303


def test_signing_out_ends_the_session(browser: Browser) -> None:
    assert browser.post("/ui/logout").status == 303
    assert browser.get("/ui/").status == 303
    assert browser.get("/ui/tasks?_region=list").status == 401


def test_a_session_outlives_a_restart(make: Callable[..., LocalPlatform], tmp_path: pathlib.Path) -> None:
    """An open page goes on when the platform is started again."""
    platform = make(path=tmp_path / "dev.db", ui=True)
    browser = Browser(platform)
    browser.enter(platform.dashboard_link())
    port = urlsplit(platform.url).port
    platform.stop()
    make(path=tmp_path / "dev.db", ui=True, port=port)
    assert browser.get("/ui/").status == 200


def test_the_cookie_opens_no_endpoint_of_the_contract(shown: LocalPlatform, browser: Browser) -> None:
    for method, path in (("GET", "/api/v1/tasks"), ("GET", "/api/v1/installations"), ("POST", "/api/v1/tasks")):
        assert browser.ask(method, path, X_Form_Token=browser.token).status == 401
    # The workers' endpoints are not behind the dashboard's checks.
    assert client_of(shown).install().id


def test_a_change_needs_the_token_of_the_page(shown: LocalPlatform, browser: Browser) -> None:
    task_id = shown.submit("echo", {}, "a")
    for form in ({}, {"_token": ""}, {"_token": "0" * 64}):
        assert browser.ask("POST", f"/ui/tasks/{task_id}/cancel", form).status == 403
    other = Browser(shown)
    other.enter(shown.dashboard_link())
    assert browser.ask("POST", f"/ui/tasks/{task_id}/cancel", {"_token": other.token}).status == 403
    assert browser.get(f"/ui/tasks/{task_id}/cancel").status == 405
    assert shown.task(task_id)["status"] == "queued"
    assert browser.post(f"/ui/tasks/{task_id}/cancel").status == 303
    assert shown.task(task_id)["status"] == "failed"


def test_other_sites_are_refused(shown: LocalPlatform, browser: Browser) -> None:
    task_id = shown.submit("echo", {}, "a")
    path = f"/ui/tasks/{task_id}/cancel"
    assert browser.get("/ui/", Host="evil.example:80").status == 421
    assert browser.post(path, Origin="http://evil.example").status == 403
    assert browser.post(path, Origin="null").status == 403
    assert browser.post(path, Sec_Fetch_Site="cross-site").status == 403
    assert Browser(shown).ask("POST", "/ui/login", {"code": "x"}, Sec_Fetch_Site="same-site").status == 403
    assert shown.task(task_id)["status"] == "queued"


# -- what the answers carry --------------------------------------------------------------------------------------------


def everything(shown: LocalPlatform, browser: Browser) -> Iterator[str]:
    """Each page, with something on it."""
    yield from PAGES
    yield f"/ui/tasks/{shown.submit('echo', {}, 'a')}"
    yield "/ui/login"
    yield "/ui/nowhere"


def test_pages_allow_only_files_of_this_server(shown: LocalPlatform, browser: Browser) -> None:
    """No inline script, style or handler, no other host; frames and other form targets are refused."""
    for path in everything(shown, browser):
        answer = browser.get(path)
        policy = answer.headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none';"), path
        assert "unsafe" not in policy
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Cache-Control"] == "no-store"
        assert not re.search(r"<script(?![^>]* src=)|<style|\sstyle=|\son[a-z]+=|javascript:|hx-on|js:", answer.text), (
            path
        )
        assert not re.findall(r'(?:src|href|action)="(?!/ui/|#)[^"]*"', answer.text), path


def test_nothing_of_a_task_becomes_a_part_of_a_page(shown: LocalPlatform, browser: Browser) -> None:
    """Input, output, error, names and reasons are text, wherever they are shown."""
    client = client_of(shown)
    installation = client.install(agent_id=SCRIPT)
    shown.submit(SCRIPT, {SCRIPT: SCRIPT}, SCRIPT, trace_id=SCRIPT, tool=SCRIPT)
    with installation.stream(worker_id=SCRIPT) as stream:
        task = stream.next("task")
        path = f"/tasks/{task['task_id']}"
        assert installation.call("POST", f"{path}/progress", {"progress": 0.5, "message": SCRIPT}).status == 200
        seen = [browser.get(f"/ui/tasks/{task['task_id']}").text, browser.get("/ui/tasks").text]
        failure = {"code": SCRIPT, "message": SCRIPT, "details": {"problems": [{"path": SCRIPT, "problem": SCRIPT}]}}
        body = {"status": "failed", "error": failure, "attempt": 1}
        assert installation.call("POST", f"{path}/complete", body).status == 200
    shown.submit(SCRIPT, SCRIPT, SCRIPT)
    schema = {"type": "object", "properties": {SCRIPT: {"type": "string", "description": SCRIPT}}}
    info = {"capabilities": [{"name": SCRIPT, "description": SCRIPT, "input_schema": schema}]}
    assert installation.call("POST", f"/installations/{installation.id}/capabilities", info).status == 200
    data = {"task_id": SCRIPT, "kind": SCRIPT, "target": SCRIPT, "rule": SCRIPT, "reason": SCRIPT}
    events = [audit_event(event_type="policy_violation", event_data=data, sekuire_id=SCRIPT)]
    assert installation.call("POST", "/logs", {"events": events}).status == 202
    shown.set_policy("ws_local", {"permissions": {"tools": {"blocked_tools": [SCRIPT]}}})
    shown.set_policy("ws_local", {"permissions": {"tools": {"blocked_tools": []}}})
    shown.command(installation.id, "pause", SCRIPT)
    seen.append(browser.get("/ui/submit?" + urlencode({"capability": SCRIPT, "agent": SCRIPT})).text)
    seen += [browser.get(page).text for page in PAGES]
    seen.append(browser.get(f"/ui/tasks/{task['task_id']}").text)
    seen.append(browser.get("/ui/tasks?" + urlencode({"capability": SCRIPT, "text": SCRIPT, "agent": SCRIPT})).text)
    for text in seen:
        assert "<script>" not in text
    assert sum("&lt;script&gt;" in text for text in seen) >= 6


def test_the_key_is_on_no_page(shown: LocalPlatform, browser: Browser) -> None:
    token = shown.create_install_token("a")
    for path in everything(shown, browser):
        text = browser.get(path).text
        assert shown.api_key not in text
        assert token not in text


def test_faults_do_not_touch_the_dashboard(shown: LocalPlatform, browser: Browser) -> None:
    """Not even an outage, which could not be ended otherwise; requests to it are not counted either."""
    before = len(shown.requests)
    shown.faults.error(503)
    assert browser.get("/ui/").status == 200
    shown.faults.clear()
    with shown.faults.outage():
        assert browser.get("/ui/").status == 200
        with pytest.raises((ConnectionError, http.client.HTTPException)):
            browser.ask("GET", "/api/v1/tasks", X_API_Key=shown.api_key)
    assert len(shown.requests) == before
    assert browser.ask("GET", "/api/v1/tasks", X_API_Key=shown.api_key).status == 200


def test_an_outage_cuts_the_workers_streams(shown: LocalPlatform) -> None:
    with client_of(shown).install().stream() as stream, shown.faults.outage():
        assert stream.next() is None


# -- regions and signals -----------------------------------------------------------------------------------------------


def region(text: str, name: str) -> str:
    (address,) = re.findall(rf'hx-get="([^"]*_region={name}[^"]*)"', text)
    return address.replace("&amp;", "&")


def test_a_region_is_sent_alone_and_only_if_it_has_changed(shown: LocalPlatform, browser: Browser) -> None:
    shown.submit("echo", {}, "a")
    address = region(browser.get("/ui/tasks?capability=echo").text, "list")
    assert "capability=echo" in address
    assert browser.get(address).status == 204
    task_id = shown.submit("echo", {}, "a")
    changed = browser.get(address)
    assert changed.status == 200
    assert task_id in changed.text
    assert "<html" not in changed.text
    assert browser.get("/ui/tasks?_region=nothing").status == 404


class Signals:
    """The stream of signals, as a page reads it."""

    def __init__(self, browser: Browser) -> None:
        self._connection = http.client.HTTPConnection(browser.host, timeout=GUARD)
        self._connection.request("GET", "/ui/events", headers={"Cookie": browser.cookie or ""})
        self.response = self._connection.getresponse()
        self.status = self.response.status

    def next(self) -> List[str]:
        """The topics of the next signal."""
        while True:
            line = self.response.readline().decode()
            assert line, "the stream has ended"
            if line == "event: signal\n":
                topics: List[str] = json.loads(self.response.readline().decode().partition(": ")[2])
                return topics

    def close(self) -> None:
        if self._connection.sock is not None:
            self._connection.sock.shutdown(socket.SHUT_RDWR)
        self.response.close()
        self._connection.close()


def test_pages_are_notified_of_changes(shown: LocalPlatform, browser: Browser) -> None:
    page = Signals(browser)
    shown.submit("echo", {}, "a")
    assert "tasks" in page.next()
    client_of(shown).install()
    assert "workers" in page.next()
    page.close()


def test_pages_are_bounded_apart_from_the_workers(shown: LocalPlatform, browser: Browser) -> None:
    """The 21st live page is refused with the reason; a worker still connects, and a closed page makes room."""
    pages = [Signals(browser) for _ in range(signals.MOST_PAGES)]
    refused = Signals(browser)
    assert refused.status == 503
    assert "20 pages" in json.loads(refused.response.read())["message"]
    refused.close()
    assert "20 pages" in json.loads(browser.get("/ui/live").text)["problem"]
    with client_of(shown).install().stream() as stream:
        assert stream.connected["desired_state"] == "running"
    for page in pages:
        page.close()
    until(lambda: json.loads(browser.get("/ui/live").text)["problem"] == "")
    last = Signals(browser)
    assert last.status == 200
    last.close()


# -- tasks -------------------------------------------------------------------------------------------------------------


def ids_in(text: str) -> List[str]:
    return list(dict.fromkeys(re.findall(r"/ui/tasks/(task_[0-9a-f]{32})", text)))


def test_tasks_are_filtered_and_paged(shown: LocalPlatform, browser: Browser) -> None:
    made = [shown.submit("one" if n % 2 else "two", {"n": f"word{n}"}, f"agent{n % 3}") for n in range(120)]
    newest = made[::-1]
    first = browser.get("/ui/tasks")
    assert ids_in(first.text) == newest[:50]
    (older,) = re.findall(r'href="([^"]*)" rel="next"', first.text)
    assert ids_in(browser.get(older).text) == newest[50:100]

    def found(**asked: str) -> List[str]:
        return ids_in(browser.get("/ui/tasks?" + urlencode(asked)).text)

    assert found(capability="one") == [task for n, task in enumerate(made) if n % 2][::-1][:50]
    assert (
        found(agent="agent1", capability="two", status="queued")
        == [task for n, task in enumerate(made) if n % 3 == 1 and not n % 2][::-1]
    )
    assert found(text="word77") == [made[77]]
    assert found(text=made[5]) == [made[5]]
    assert found(text="100%") == []
    assert found(time="1h") == newest[:50]
    assert found(status="failed") == []


def test_ticked_tasks_are_cancelled_and_retried(shown: LocalPlatform, browser: Browser) -> None:
    made = [shown.submit("echo", {}, "a") for _ in range(3)]
    answer = browser.post("/ui/tasks/bulk", {"ids": made[:2], "action": "cancel"}, HX_Request="true")
    assert json.loads(answer.headers["HX-Trigger"])["notice"]["text"] == "2 tasks cancelled"
    assert [shown.task(task)["status"] for task in made] == ["failed", "failed", "queued"]
    answer = browser.post("/ui/tasks/bulk", {"ids": made, "action": "retry"}, HX_Request="true")
    notice = json.loads(answer.headers["HX-Trigger"])["notice"]
    assert notice["text"].startswith("2 tasks queued again; 1 other was not: the task is queued")
    assert [shown.task(task)["status"] for task in made] == ["queued"] * 3


def test_a_task_shows_its_life(shown: LocalPlatform, browser: Browser) -> None:
    mine = client_of(shown).install(agent_id="a")
    task_id = shown.submit("echo", {"word": "Ada"}, "a")
    with mine.stream() as stream:
        stream.next("task")
        text = browser.get(f"/ui/tasks/{task_id}").text
        assert "assigned, attempt 1" in text
        assert "Cancel this task?" in text
        assert mine.complete(task_id, output={"hello": "Ada"}).status == 200
    text = browser.get(f"/ui/tasks/{task_id}").text
    assert '<rect class="p-good"' in text
    assert "sekuire send echo" in text
    assert "X-API-Key: $SEKUIRE_API_KEY" in text
    assert browser.get("/ui/tasks/task_0").status == 404


# -- the other pages --------------------------------------------------------------------------------------------------

SCHEMA = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "description": "what it is called"},
        "pages": {"type": "integer", "minimum": 1, "default": 10},
        "author": {"$ref": "#/$defs/author"},
        "tags": {"anyOf": [{"type": "array", "items": {"type": "string"}}, {"type": "null"}]},
        "kind": {"enum": ["novel", "play"]},
        "extra": {"type": "array", "items": {"type": "integer"}},
        "is_new": {"type": "boolean"},
    },
    "required": ["title"],
    "additionalProperties": False,
    "$defs": {"author": {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}},
}


@pytest.fixture
def published(shown: LocalPlatform) -> None:
    installation = client_of(shown).install(agent_id="a")
    info = {"capabilities": [{"name": "index", "description": "Put a book into the index.", "input_schema": SCHEMA}]}
    assert installation.call("POST", f"/installations/{installation.id}/capabilities", info).status == 200


def submitted(shown: LocalPlatform, answer: Answer) -> Dict[str, Any]:
    assert answer.status == 303, answer
    return shown.task(answer.headers["Location"].rpartition("/")[2])


@pytest.mark.usefixtures("published")
def test_a_form_submits_what_was_typed(shown: LocalPlatform, browser: Browser) -> None:
    """Every kind of field; what is left empty is not sent; the options beside the input."""
    text = browser.get("/ui/submit?capability=index&agent=a").text
    assert "Put a book into the index." in text
    assert "what it is called" in text
    assert re.search(r'name="f/pages"[^>]* min="1"[^>]* value="10"', text)
    form = {
        "agent": "a", "capability": "index", "f/title": "Moby Dick", "f/pages": "635", "f/author/name": "Melville",
        "f/tags": "sea\r\nwhale", "f/kind": "novel", "f/extra": "[1, 2]", "f/is_new": "on", "max_attempts": "3",
        "delay_ms": "600000", "trace_id": "t1",
    }  # fmt: skip
    task = submitted(shown, browser.post("/ui/submit", form))
    assert task["input"] == {
        "title": "Moby Dick", "pages": 635, "author": {"name": "Melville"}, "tags": ["sea", "whale"], "kind": "novel",
        "extra": [1, 2], "is_new": True,
    }  # fmt: skip
    assert (task["max_attempts"], task["trace_id"]) == (3, "t1")
    task = submitted(shown, browser.post("/ui/submit", {"agent": "a", "capability": "index", "f/title": "Emma"}))
    assert task["input"] == {"title": "Emma"}
    text = browser.get(f"/ui/submit?like={task['task_id']}").text
    assert 'value="Emma"' in text


@pytest.mark.usefixtures("published")
@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ({"f/title": "x", "f/pages": "0"}, "0 is less than the minimum of 1"),
        ({"f/title": "x", "f/pages": "one"}, "not JSON"),
        ({"f/title": "x", "f/extra": "[1"}, "not JSON"),
        ({"f/title": "x", "f/extra": '["a"]'}, "is not of type"),
        ({"f/title": "x", "max_attempts": "many"}, "Attempts must be a whole number"),
        ({"f/title": "x", "max_attempts": "5000"}, "Max_attempts must be an integer from 1 to 1000"),
        ({"agent": "", "f/title": "x"}, "Name the agent"),
        ({"json": "1", "input": "{"}, "line 1, column 2"),
        ({"json": "1", "input": "{}"}, "is needed"),
        ({"json": "1", "input": '{"title": NaN}'}, "NaN"),
        ({"json": "1", "input": '{"a": 1, "a": 2}'}, "holds a key twice"),
    ],
)
def test_what_cannot_be_submitted_is_explained(
    shown: LocalPlatform, browser: Browser, typed: Dict[str, str], said: str
) -> None:
    answer = browser.post("/ui/submit", {"agent": "a", "capability": "index", **typed})
    assert answer.status == 422
    assert said in answer.text
    assert ids_in(browser.get("/ui/tasks").text) == []


@pytest.mark.usefixtures("published")
def test_an_input_that_does_not_fit_can_be_sent_anyway(shown: LocalPlatform, browser: Browser) -> None:
    """Somebody may want to see what the handler does with it."""
    form = {"agent": "a", "capability": "index", "json": "1", "input": '{"pages": "many"}'}
    assert "Send it anyway" in browser.post("/ui/submit", form).text
    assert submitted(shown, browser.post("/ui/submit", {**form, "force": "1"}))["input"] == {"pages": "many"}


def test_without_a_schema_json_is_submitted(shown: LocalPlatform, browser: Browser) -> None:
    for value in ('"text"', "[1, null]", "{}", "12.5", "null"):
        form = {"agent": "b", "capability": "any", "json": "1", "input": value}
        assert submitted(shown, browser.post("/ui/submit", form))["input"] == json.loads(value)


def test_an_install_token_is_made_and_not_kept_on_the_page(shown: LocalPlatform, browser: Browser) -> None:
    made = browser.post("/ui/workers", {"agent": "new", "max_uses": "2"})
    (token,) = set(re.findall(r"skt_[\w-]{20,}", made.text))
    assert client_of(shown).bootstrap("new", token).status == 201
    assert "skt_" not in browser.get("/ui/workers").text
    for form in ({"agent": "", "max_uses": "1"}, {"agent": "a", "max_uses": "0"}, {"agent": "a", "max_uses": "x"}):
        assert browser.post("/ui/workers", form).status == 422


def test_an_installation_is_revoked_by_its_whole_id(shown: LocalPlatform, browser: Browser) -> None:
    installation = client_of(shown).install()
    path = f"/ui/workers/{installation.id}"
    assert browser.post(f"{path}/revoke", {"confirm": installation.id[:8]}).status == 400
    assert browser.post(f"{path}/command", {"type": "explode"}).status == 400
    assert browser.post("/ui/workers/inst_0/cut").status == 404
    assert browser.post(f"{path}/revoke", {"confirm": installation.id, "reason": "lost"}).status == 303
    (one,) = shown.installations()
    assert (one["revoked"], one["reason"]) == (True, "lost")
    assert browser.post(f"{path}/command", {"type": "pause"}).status == 409


def test_versions_of_a_policy_are_kept_and_compared(shown: LocalPlatform, browser: Browser) -> None:
    contents = [{"permissions": {"tools": {"blocked_tools": [name]}}} for name in ("one", "two", "three")]
    for content in contents:
        form = {"workspace": "ws_local", "content": json.dumps(content), "action": "activate"}
        assert "is signed and active" in browser.post("/ui/policy", form).text
    active = shown.policy("ws_local")
    assert active is not None
    assert (active["version"], active["content"]) == (3, contents[2])
    text = browser.get("/ui/policy?old=1&new=3").text
    removed = re.findall(r'<span class="del">(.*)', text)
    added = re.findall(r'<span class="ins">(.*)', text)
    assert ["one" in line for line in removed] == ["three" in line for line in added] == [True]


def test_events_are_exported_as_lines_of_json(shown: LocalPlatform, browser: Browser) -> None:
    installation = client_of(shown).install()
    sent = [audit_event(event_data={"n": n}, severity="warn" if n % 2 else "info") for n in range(1200)]
    for first in range(0, len(sent), 400):
        assert installation.call("POST", "/logs", {"events": sent[first : first + 400]}).status == 202
    answer = browser.get("/ui/audit.jsonl?severity=warn")
    assert "attachment" in answer.headers["Content-Disposition"]
    assert [json.loads(line)["event_data"]["n"] for line in answer.text.splitlines()] == list(range(1, 1200, 2))


def test_the_first_page_says_what_needs_a_look(shown: LocalPlatform, browser: Browser) -> None:
    """In words, with where to look: what waits for nobody, a lost lease, a denial, failures, faults."""
    client = client_of(shown)
    installation = client.install("a")
    shown.submit("paint", {}, "nobody")
    with installation.stream(capabilities=["copy"]) as stream:
        shown.submit("summarize", {}, "a")
        task_id = shown.submit("copy", {}, "a")
        stream.next("task")
        installation.fail(task_id, code="no_text", retryable=False)
        data = {"kind": "tool", "target": "shell", "rule": "tool.blocked", "reason": "it is blocked"}
        now = datetime.datetime.now(datetime.timezone.utc).isoformat().replace("+00:00", "Z")
        event = audit_event(event_type="policy_violation", event_data=data, event_timestamp=now)
        installation.call("POST", "/logs", {"events": [event]})
        shown.faults.latency(0.001)
        text = html.unescape(browser.get("/ui/").text)
    assert "No worker accepts “paint”" in text
    assert "no worker of this agent is connected" in text
    assert "No worker accepts “summarize”" in text
    assert "its workers have other handlers" in text
    assert "Policy refused tool.blocked: shell" in text
    assert "1 task failed with no_text" in text
    assert "1 fault is being injected" in text


def test_a_lost_lease_is_an_alert(make: Callable[..., LocalPlatform]) -> None:
    platform = make(ui=True, lease_seconds=0.05)
    browser = Browser(platform)
    browser.enter(platform.dashboard_link())
    client_of(platform).install("a").heartbeat()
    until(lambda: "Lease lost: a" in browser.get("/ui/").text)
    assert "lease lost" in browser.get("/ui/workers").text


# -- files -------------------------------------------------------------------------------------------------------------


def test_vendored_files_are_the_released_ones() -> None:
    """The manifest names each with its version, licence and SHA-256."""
    entries = json.loads((STATIC / "vendor/manifest.json").read_text())
    files = {path.name for path in (STATIC / "vendor").iterdir()} - {"manifest.json", "LICENSES.txt"}
    assert {entry["file"] for entry in entries} == files
    for entry in entries:
        assert {"name", "version", "licence", "source", "sha256"} <= set(entry)
        assert hashlib.sha256((STATIC / "vendor" / entry["file"]).read_bytes()).hexdigest() == entry["sha256"]


def test_static_files_are_small() -> None:
    """Together at most 60 KB as they are sent compressed; the hand-written style sheet at most 12 KB."""
    files = [path for path in STATIC.rglob("*") if path.suffix in (".js", ".css", ".svg")]
    assert sum(len(gzip.compress(path.read_bytes(), 9)) for path in files) <= 60 * 1024
    assert (STATIC / "ui.css").stat().st_size <= 12 * 1024


def test_static_files_have_an_address_for_each_version(browser: Browser) -> None:
    (address,) = re.findall(r'src="(/ui/static/ui\.js\?v=[0-9a-f]+)"', browser.get("/ui/").text)
    assert "immutable" in browser.get(address).headers["Cache-Control"]
    assert browser.get("/ui/static/ui.js").headers["Cache-Control"] == "no-cache"
    for path in ("/ui/static/../app.py", "/ui/static/%2e%2e/app.py", "/ui/static/nothing"):
        assert browser.get(path).status == 404
