"""The dashboard in a real browser: every action as a person does it, for everyone, on a page that stays live."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
import threading
import time
from typing import Any, Dict, Iterator, List, Literal, Optional, Tuple
from urllib.parse import urlsplit

import attrs
import pytest

from sekuire import TaskError, Worker, create_worker
from sekuire.local import LocalPlatform
from sekuire.wire import protocol

from ..contract.client import Client, Installation
from ..contract.client import audit_event as an_event
from ..support.waiting import GUARD, until
from .browser import executable

playwright = pytest.importorskip("playwright.sync_api")

pytestmark = pytest.mark.full

AXE = (pathlib.Path(__file__).parent / "vendor/axe.min.js").read_text(encoding="utf-8")
#: Where the pictures of the pages go, if a directory is named. CI keeps it.
PICTURES = os.environ.get("SEKUIRE_SCREENSHOTS")
PAGES = ("", "tasks", "submit", "workers", "approvals", "policy", "audit", "faults", "requests")
SCRIPT = '<img src=x onerror="document.title=1">'

Page = Any


@attrs.define
class Book:
    """A book to put into the index."""

    title: str
    pages: int = 1
    language: Literal["en", "de"] = "en"
    tags: Optional[List[str]] = None


def index(ctx: Any, book: Book) -> Dict[str, Any]:
    """Put a book into the index."""
    if book.title == "none":
        raise TaskError("no_title", "the book has no title")
    return {"indexed": book.title}


@contextlib.contextmanager
def a_worker(platform: LocalPlatform, agent_id: str = "clerk") -> Iterator[Worker]:
    worker = create_worker(
        api_base_url=platform.url,
        agent_id=agent_id,
        install_token=platform.create_install_token(agent_id),
        max_workers=4,
        quiet=True,
    )
    worker.on_task("index", index)
    with worker:
        assert worker.wait_until_connected(GUARD)
        until(lambda: platform.installations()[-1]["capability_info"])
        yield worker


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    program = executable()
    assert program, "tox -e full installs Chromium; here it is missing"
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


@pytest.fixture
def platform() -> Iterator[LocalPlatform]:
    with LocalPlatform(ui=True, redelivery_delay=0.2, retry_delay=0.05) as platform:
        yield platform


class Opened:
    """Open pages of one platform, and keep what their consoles said."""

    def __init__(self, browser: Any) -> None:
        self._browser = browser
        self._contexts: List[Any] = []
        self.errors: List[str] = []
        #: What may be among the errors: a test that stops the platform breaks connections.
        self.expected = "(?!)"

    def page(self, platform: LocalPlatform, width: int = 1280, scheme: str = "light", motion: str = "reduce") -> Page:
        context = self._browser.new_context(
            viewport={"width": width, "height": 900 if width > 500 else 844}, color_scheme=scheme, reduced_motion=motion
        )
        context.set_default_timeout(GUARD * 1000)
        context.add_init_script(
            "document.addEventListener('securitypolicyviolation',"
            " (event) => console.error('CSP', event.violatedDirective, event.blockedURI));"
        )
        self._contexts.append(context)
        page = context.new_page()
        page.on("console", lambda one: self.errors.append(one.text) if one.type == "error" else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("dialog", lambda dialog: self.errors.append("a dialog was opened"))
        page.goto(platform.dashboard_link())
        page.get_by_role("button", name="Open the dashboard").click()
        page.get_by_text("live", exact=True).wait_for()
        return page

    def close(self) -> None:
        for context in self._contexts:
            context.close()


@pytest.fixture
def opened(chromium: Any, platform: LocalPlatform) -> Iterator[Opened]:
    # Closed before the platform is stopped.
    opened = Opened(chromium)
    yield opened
    opened.close()
    assert [error for error in opened.errors if not re.search(opened.expected, error)] == []


@pytest.fixture
def page(opened: Opened, platform: LocalPlatform) -> Page:
    return opened.page(platform)


def go(page: Page, path: str) -> None:
    page.goto(re.match(r"https?://[^/]+", page.url).group(0) + f"/ui/{path}")  # type: ignore[union-attr]


def says(page: Page, text: str) -> None:
    """Wait for a notice, and let it go."""
    page.locator("#notices").get_by_text(text).first.wait_for()


def approval(platform: LocalPlatform, installation: Installation, name: str) -> Tuple[str, str]:
    """A task that waits for an approval of an action: the ids of both."""
    task_id = platform.submit("work", {}, installation.agent_id)
    until(lambda: platform.task(task_id)["status"] == "assigned")
    details = {"amount": 420, "to": SCRIPT}
    digest = protocol.approval_digest(task_id, "action", name, details, None)
    approval_id = protocol.approval_id(task_id, digest, 1)
    body = {
        "approval_id": approval_id, "attempt": 1, "worker_id": "w1", "subject": {"kind": "action", "name": name},
        "details": details, "digest": digest, "timeout_ms": 600_000,
    }  # fmt: skip
    answer = installation.call("POST", f"/tasks/{task_id}/approvals", body)
    assert answer.status == 201, answer
    return task_id, approval_id


def fill(platform: LocalPlatform) -> Client:
    """Put something on every page."""
    client = Client(platform.url, platform.api_key)
    done = client.install("a")
    task_id = client.submit("a", "copy", {"text": SCRIPT})
    with done.stream() as stream:
        stream.next("task")
        done.complete(task_id, output={"copy": SCRIPT})
        failing = client.submit("a", "copy", {"text": None}, max_attempts=2)
        stream.next("task")
        done.fail(failing, code="no_text", retryable=False)
        client.submit("a", SCRIPT, {})
        approval(platform, done, "wire_money")
    client.submit("nobody", "paint", {})
    platform.set_policy("ws_local", {"permissions": {"tools": {"blocked_tools": ["rm"]}}})
    platform.set_policy("ws_local", {"permissions": {"tools": {"blocked_tools": ["rm", "shell"]}}})
    data = {"task_id": task_id, "kind": "tool", "target": "shell", "rule": "tool.blocked", "reason": SCRIPT}
    events = [an_event(event_type="policy_violation", severity="warn", event_data=data), an_event()]
    assert done.call("POST", "/logs", {"events": events}).status == 202
    platform.faults.latency(0.001, rate=0.5)
    return client


# -- as a person does it -----------------------------------------------------------------------------------------------


def press_g_and(page: Page, letter: str) -> None:
    """Press g and a letter. Both count only if the second follows at once, which a busy machine may not manage."""
    before = page.url

    def has_gone() -> bool:
        page.keyboard.press("g")
        page.keyboard.press(letter)
        page.wait_for_timeout(50)
        return bool(page.url != before)

    until(has_gone)


def test_submit_watch_and_retry_by_keyboard_alone(page: Page, platform: LocalPlatform) -> None:
    """No pointer is needed: shortcuts, Tab, Enter; the page shows each state by itself."""
    with a_worker(platform):
        keys = page.keyboard
        press_g_and(page, "s")
        page.get_by_role("heading", name="Submit a task").wait_for()
        keys.press("/")
        keys.type("index")
        keys.press("Tab")
        keys.press("Control+a")
        keys.type("clerk")
        keys.press("Enter")
        page.get_by_role("heading", name="index Put a book into the index.").wait_for()
        press_tab_until(page, "title")
        keys.type("none")
        keys.press("Enter")
        page.get_by_text("no_title", exact=True).wait_for()
        press_tab_until(page, "Retry")
        keys.press("Enter")
        until(lambda: platform.task(page.url.rpartition("/")[2])["attempt"] == 2)
        page.locator(".steps").get_by_text("attempt 2").wait_for()


def press_tab_until(page: Page, name: str) -> None:
    """Press Tab until what has the focus has this label or text."""
    for _ in range(60):
        page.keyboard.press("Tab")
        found = page.evaluate(
            "(() => { const e = document.activeElement;"
            " return (e.labels && e.labels[0] ? e.labels[0].innerText : e.innerText || '').trim(); })()"
        )
        if found == name or found.startswith(f"{name} "):
            return
    raise AssertionError(f"no Tab reaches {name!r}")


def test_a_form_says_beside_each_field_what_is_wrong(page: Page, platform: LocalPlatform) -> None:
    """The published schema makes the form; the task is completed by what was typed, and can be submitted again."""
    with a_worker(platform):
        go(page, "submit")
        page.get_by_role("link", name="index").click()
        page.get_by_label("title").fill("Moby Dick")
        page.get_by_label("pages").fill("1.5")
        page.get_by_role("button", name="Submit", exact=True).click()
        page.get_by_text("does not fit the schema").wait_for()
        field = page.get_by_label("pages")
        assert field.get_attribute("aria-invalid") == "true"
        assert "integer" in page.locator(f"#{field.get_attribute('aria-describedby')}").inner_text()
        assert page.evaluate("document.activeElement.name") == "f/pages"
        assert page.get_by_label("title").input_value() == "Moby Dick"
        field.fill("635")
        page.get_by_label("tags").fill("sea\nwhale")
        page.get_by_role("button", name="Submit", exact=True).click()
        page.get_by_text('"indexed": "Moby Dick"').wait_for()
        page.get_by_role("link", name="Submit one like this").click()
        assert page.get_by_label("tags").input_value() == "sea\nwhale"
        page.get_by_role("link", name="As JSON").click()
        page.get_by_role("textbox", name="Input").fill('{"title": }')
        page.get_by_role("button", name="Submit", exact=True).click()
        page.get_by_text("line 1, column 11").wait_for()


def test_tasks_are_filtered_ticked_cancelled_and_retried(page: Page, platform: LocalPlatform) -> None:
    """A list that changes keeps what is ticked; the question before it says how many."""
    tasks = [platform.submit("copy", {"n": n}, "a") for n in range(3)]
    go(page, "tasks?capability=copy")
    for task in tasks[:2]:
        page.locator(f"#t-{task}").get_by_role("checkbox").check()
    page.get_by_text("2 tasks selected").wait_for()
    later = platform.submit("copy", {}, "a")
    page.locator(f"#t-{later}").wait_for()
    page.get_by_text("2 tasks selected").wait_for()
    assert page.locator(f"#t-{tasks[0]}").get_by_role("checkbox").is_checked()
    page.get_by_role("button", name="Cancel").click()
    page.get_by_text("Cancel 2 tasks?").wait_for()
    page.get_by_role("button", name="No, go back").click()
    page.get_by_role("button", name="Cancel").click()
    page.get_by_role("button", name="Yes").click()
    says(page, "2 tasks cancelled")
    assert [platform.task(task)["status"] for task in tasks] == ["failed", "failed", "queued"]
    page.locator(f"#t-{tasks[0]}").get_by_text("failed").wait_for()
    page.get_by_role("link", name="Failed").click()
    page.get_by_label("Select all on this page").check()
    page.get_by_role("button", name="Retry").click()
    page.get_by_role("button", name="Yes").click()
    says(page, "2 tasks queued again")
    page.get_by_text("No task fits").wait_for()
    page.get_by_role("link", name="Clear the filters").click()
    page.get_by_label("Text").fill('"n": 1')
    page.get_by_label("Text").fill(tasks[1])
    page.get_by_role("button", name="Filter").click()
    page.locator(f"#t-{tasks[1]}").wait_for()
    assert page.locator("tbody tr").count() == 1


def test_workers_are_commanded_and_revoked(page: Page, platform: LocalPlatform) -> None:
    with a_worker(platform) as worker:
        until(lambda: platform.heartbeats(platform.installations()[0]["installation_id"]))
        (one,) = platform.installations()
        go(page, "workers")
        page.get_by_role("button", name="Pause", exact=True).last.click()
        until(worker.is_paused)
        page.get_by_role("button", name="Resume").click()
        until(lambda: not worker.is_paused())
        before = platform.count("task_stream")
        page.get_by_role("button", name="Cut the stream").click()
        says(page, "1 stream cut")
        until(lambda: platform.count("task_stream") > before)
        page.get_by_role("button", name="Expire the token").click()
        says(page, "1 token expired")
        page.get_by_role("button", name="Terminate").click()
        page.get_by_role("button", name="Yes").click()
        says(page, "Terminating")
        assert platform.installations()[0]["desired_state"] == "terminated"
        page.get_by_role("button", name="Revoke…").click()
        page.get_by_label("Id of the installation").fill("something else")
        page.get_by_role("button", name="Revoke", exact=True).click()
        says(page, "Type the whole id")
        page.get_by_label("Id of the installation").fill(one["installation_id"])
        page.get_by_label("Reason").fill("lost laptop")
        page.get_by_role("button", name="Revoke", exact=True).click()
        says(page, "Revoked")
        until(lambda: platform.installations()[0]["revoked"])
        page.get_by_text("lost laptop").first.wait_for(state="attached")


def test_an_install_token_is_shown_once(page: Page, platform: LocalPlatform) -> None:
    go(page, "workers")
    page.get_by_label("Agent").fill("new-agent")
    page.get_by_label("Uses").fill("0")
    page.get_by_role("button", name="Make a token").click()
    page.get_by_text("Uses must be a whole number").wait_for()
    page.get_by_label("Uses").fill("2")
    page.get_by_role("button", name="Make a token").click()
    page.get_by_text("It is shown once").wait_for()
    token = page.get_by_label("install token", exact=True).inner_text().strip()
    client = Client(platform.url, platform.api_key)
    assert client.bootstrap("new-agent", token).status == 201
    page.reload()
    page.get_by_role("heading", name="new-agent").wait_for()
    assert token not in page.content()


def test_a_policy_is_tried_activated_and_compared(page: Page, platform: LocalPlatform) -> None:
    platform.set_policy("ws_local", {"permissions": {"tools": {"blocked_tools": ["rm"]}}})
    go(page, "policy")
    editor = page.get_by_label("Content of the policy")
    editor.fill('{"permissions": {"tools": {"blocked_tools": "shell"}}}')
    page.get_by_role("button", name="Validate").click()
    page.get_by_text("Workers would refuse it").wait_for()
    editor.fill("{")
    page.get_by_role("button", name="Validate").click()
    page.get_by_text("cannot be read").wait_for()
    editor.fill('{"permissions": {"tools": {"blocked_tools": ["shell"]}}}')
    page.get_by_label("Name, host or path").fill("shell")
    page.get_by_label("Name, host or path").press("Enter")
    page.get_by_text("“shell” would be denied").wait_for()
    page.get_by_text("tool.blocked", exact=True).wait_for()
    page.get_by_role("button", name="Sign and activate").click()
    page.get_by_text("Version 2 is signed and active").wait_for()
    active = platform.policy("ws_local")
    assert active is not None
    assert active["content"] == {"permissions": {"tools": {"blocked_tools": ["shell"]}}}
    page.locator(".ins").get_by_text("shell").wait_for()
    page.locator(".del").get_by_text("rm").wait_for()


def test_approvals_are_decided(page: Page, platform: LocalPlatform) -> None:
    """What waits is shown with its details; typed words stay while the page changes."""
    client = Client(platform.url, platform.api_key)
    installation = client.install("a")
    with installation.stream():
        task_id, first = approval(platform, installation, "wire_money")
        go(page, "")
        page.get_by_role("link", name="1 approval waits for you").click()
        page.get_by_text('"amount": 420').wait_for()
        page.get_by_label("Reason").fill("no such customer")
        _, second = approval(platform, installation, "send_mail")
        page.get_by_role("heading", name="send_mail").wait_for()
        assert page.locator(f"#reason-{first}").input_value() == "no such customer"
        page.locator(f"#a-{first}").get_by_role("button", name="Deny").click()
        says(page, "Denied")
        page.locator(f"#a-{second}").get_by_role("button", name="Approve").click()
        says(page, "Approved")
    states = {one["approval_id"]: (one["status"], one["reason"]) for one in platform.approvals()}
    assert states == {first: ("denied", "no such customer"), second: ("approved", None)}
    go(page, f"tasks/{task_id}")
    page.get_by_text("no such customer").wait_for()


def test_audit_events_come_by_themselves_and_are_exported(page: Page, platform: LocalPlatform) -> None:
    client = Client(platform.url, platform.api_key)
    installation = client.install("a")
    go(page, "audit")
    for number, severity in enumerate(("info", "error")):
        event = an_event(severity=severity, event_data={"number": number})
        assert installation.call("POST", "/logs", {"events": [event]}).status == 202
        page.get_by_text(f"number={number}").wait_for()
    page.get_by_label("Severity").select_option("error")
    page.wait_for_url("**severity=error")
    assert page.locator("tbody tr").count() == 1
    with page.expect_download() as download:
        page.get_by_role("link", name="Export as JSONL").click()
    lines = pathlib.Path(download.value.path()).read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["event_data"] for line in lines] == [{"number": 1}]


def test_faults_are_switched_on_and_off(page: Page, platform: LocalPlatform) -> None:
    client = Client(platform.url, platform.api_key)
    go(page, "faults")
    page.get_by_label("Fault of the kind error").fill("error:503,on=tasks")
    page.get_by_role("button", name="Switch on error").click()
    says(page, "Switched on: error:503")
    assert client.admin("GET", "/tasks").status == 503
    page.locator("#r-standing tbody").get_by_text("1", exact=True).wait_for()
    page.get_by_role("button", name="Switch off").click()
    says(page, "Switched off")
    assert client.admin("GET", "/tasks").status == 200
    page.get_by_label("Fault of the kind reset").fill("reset:rate=2")
    page.get_by_role("button", name="Switch on reset").click()
    page.locator(".is-bad").wait_for()
    go(page, "requests")
    page.get_by_role("rowheader", name="tasks").first.wait_for()


# -- live --------------------------------------------------------------------------------------------------------------


def test_a_page_reconnects_after_a_restart(opened: Opened, tmp_path: pathlib.Path) -> None:
    """It says so, needs nobody, and shows what happened in between."""
    opened.expected = "ERR_CONNECTION|ERR_INCOMPLETE|ERR_EMPTY|ERR_FAILED|Failed to fetch|object Event"
    first = LocalPlatform(tmp_path / "dev.db", ui=True)
    first.start()
    page = opened.page(first)
    go(page, "tasks")
    page.get_by_text("No task yet").wait_for()
    port = urlsplit(first.url).port or 0
    first.stop()
    page.get_by_text("reconnecting").wait_for()
    with LocalPlatform(tmp_path / "dev.db", port=port, ui=True) as again:
        task_id = again.submit("copy", {}, "a")
        page.locator(f"#t-{task_id}").wait_for()
        page.get_by_text("live", exact=True).wait_for()


def test_pause_stops_the_page_and_going_on_fetches(page: Page, platform: LocalPlatform) -> None:
    go(page, "tasks")
    page.get_by_role("button", name="Pause").click()
    page.get_by_text("paused", exact=True).wait_for()
    task_id = platform.submit("copy", {}, "a")
    page.wait_for_timeout(1500)
    assert page.locator(f"#t-{task_id}").count() == 0
    page.get_by_role("button", name="Go on").click()
    page.locator(f"#t-{task_id}").wait_for()


def test_a_busy_platform_leaves_the_page_responsive(page: Page, platform: LocalPlatform) -> None:
    """Five hundred updates a second: the open list answers keys, keeps the focus, and no task of it takes long."""
    client = Client(platform.url, platform.api_key)
    installation = client.install("a")
    go(page, "tasks")
    page.evaluate(
        "() => { window.longest = 0; new PerformanceObserver((list) => { for (const one of list.getEntries())"
        " window.longest = Math.max(window.longest, one.duration); }).observe({ type: 'longtask' }); }"
    )
    stopping = threading.Event()

    def work() -> None:
        with installation.stream(max_in_flight=100) as stream:
            while not stopping.is_set():
                task_id = platform.submit("copy", {}, "a")
                stream.next("task")
                installation.complete(task_id)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        field = page.get_by_label("Text")
        field.focus()
        end = time.monotonic() + 5
        typed = ""
        while time.monotonic() < end:
            page.keyboard.type("x")
            typed += "x"
            page.wait_for_timeout(100)
        assert field.input_value() == typed
        assert page.evaluate("document.activeElement.name") == "text"
    finally:
        stopping.set()
        thread.join()
    # 100 ms on a machine that has nothing else to do.
    assert page.evaluate("window.longest") < 1000
    print("longest task in the browser:", page.evaluate("window.longest"), "ms")


# -- for everyone ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_page_is_accessible(opened: Opened, platform: LocalPlatform, width: int, scheme: str) -> None:
    """axe-core finds nothing serious, nothing is wider than the window, and nothing of a task has become markup."""
    client = fill(platform)
    page = opened.page(platform, width, scheme)
    task_id = client.admin("GET", "/tasks?status=failed").body["tasks"][0]["task_id"]
    paths = [*PAGES, f"tasks/{task_id}", "submit?capability=copy&agent=a", "login"]
    for path in paths:
        go(page, path)
        page.locator("main").wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= width, path
        page.evaluate(AXE)
        found = page.evaluate("axe.run(document, { resultTypes: ['violations'] })")
        problems = [
            f"{one['id']}: {one['nodes'][0]['html'][:200]}"
            for one in found["violations"]
            if one["impact"] in ("serious", "critical")
        ]
        assert problems == [], (path, problems)
        assert page.title() != "1"
        if PICTURES and path in ("", "tasks", "workers", "policy", "approvals", f"tasks/{task_id}"):
            name = "task" if path.startswith("tasks/") else path or "overview"
            pathlib.Path(PICTURES).mkdir(parents=True, exist_ok=True)
            page.screenshot(path=f"{PICTURES}/{name}-{width}-{scheme}.png")


@pytest.mark.parametrize("width", [360, 3840])
def test_pages_fit_small_and_large_windows(opened: Opened, platform: LocalPlatform, width: int) -> None:
    fill(platform)
    page = opened.page(platform, width)
    for path in PAGES:
        go(page, path)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, path


def test_the_first_page_says_how_to_begin(page: Page, platform: LocalPlatform, tmp_path: pathlib.Path) -> None:
    """What it says is enough for a first completed task."""
    source = page.get_by_label("agent.py", exact=True).inner_text()
    assert (
        page.get_by_label("the command that starts the worker", exact=True).inner_text().strip()
        == "sekuire worker agent:tasks"
    )
    assert (
        page.get_by_label("the command that sends a task", exact=True)
        .inner_text()
        .strip()
        .startswith("sekuire send greet '{")
    )
    names: Dict[str, Any] = {}
    exec(compile(source, "agent.py", "exec"), names)
    worker = create_worker(
        api_base_url=platform.url,
        agent_id="my-agent",
        install_token=platform.create_install_token("my-agent"),
        quiet=True,
    )
    worker.include(names["tasks"])
    with worker:
        page.get_by_text("Connect a first worker").wait_for(state="detached")
        task_id = platform.submit("greet", {"name": "Ada"}, "my-agent")
        page.locator(f"#n-{task_id}").get_by_text("completed").wait_for()
    assert platform.task(task_id)["output"] == {"greeting": "Hello, Ada!"}


def test_shortcuts_are_listed(page: Page) -> None:
    page.keyboard.press("?")
    page.get_by_role("dialog", name="Shortcuts").wait_for()
    page.keyboard.press("Escape")
    page.get_by_role("dialog", name="Shortcuts").wait_for(state="hidden")
    press_g_and(page, "t")
    page.get_by_role("heading", name="Tasks", exact=True).wait_for()
