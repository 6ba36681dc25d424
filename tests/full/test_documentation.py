"""The built documentation in a browser: nothing is missing, no script fails, everyone can read it, search finds it."""

from __future__ import annotations

import contextlib
import mimetypes
import pathlib
import subprocess
import sys
import urllib.parse
from html.parser import HTMLParser
from typing import Any, Dict, Iterator, List, Optional, Set, Tuple

import pytest

from ..support.waiting import GUARD
from .browser import Answer, executable, serve

playwright = pytest.importorskip("playwright.sync_api")

pytestmark = pytest.mark.full

ROOT = pathlib.Path(__file__).resolve().parents[2]
AXE = (pathlib.Path(__file__).parent / "vendor/axe.min.js").read_text(encoding="utf-8")
#: A wide window, and a phone.
WIDTHS = (1280, 390)
#: What a reader looks for, and the page that has to come first.
SEARCHES = {
    "docker": "deploying.html",
    "kubernetes": "deploying.html",
    "metrics": "observability.html",
    "gevent": "gevent.html",
    "approval": "approvals.html",
    "policy": "policy.html",
    "proxy": "configuration.html",
    "ProcessExecutor": "reference/process-executor.html",
    "raise_if_cancelled": "reference/task-context.html",
}

#: What is wrong with the layout of a page: it is wider than the window, or a block neither fits nor scrolls.
LAYOUT = """() => {
  const found = [];
  const beyond = document.documentElement.scrollWidth - innerWidth;
  if (beyond > 0) found.push(`the page is ${beyond} px wider than the window`);
  for (const block of document.querySelectorAll("article pre, article .table-wrapper")) {
    if (!block.checkVisibility() || block.scrollWidth <= block.clientWidth) continue;
    const name = block.textContent.trim().slice(0, 40);
    if (!/auto|scroll/.test(getComputedStyle(block).overflowX)) found.push(`does not scroll: ${name}`);
    if (block.tabIndex !== 0) found.push(`no key reaches: ${name}`);
  }
  return found;
}"""

#: The violations that axe calls serious or critical, in short.
VIOLATIONS = """async () => (await axe.run(document, {resultTypes: ["violations"]})).violations
  .filter((one) => ["serious", "critical"].includes(one.impact))
  .map((one) => `${one.id}: ${one.nodes.length} x ${one.nodes[0].target} ${one.nodes[0].html.slice(0, 120)}`)"""


#: Axe checks these of the reference. Its pages are alike, and there are many.
OF_THE_REFERENCE = tuple(f"reference/{name}.html" for name in ("index", "errors", "sekuire-client", "worker-config"))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    target = tmp_path_factory.mktemp("html")
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-W",
        "--keep-going",
        "-q",
        "-b",
        "html",
        str(ROOT / "docs"),
        str(target),
    ]
    ran = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=GUARD, check=False
    )
    assert ran.returncode == 0, ran.stdout
    return target


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    program = executable()
    assert program, "tox -e full installs Chromium; here it is missing"
    with playwright.sync_playwright() as driver:
        # Names other than this machine's do not resolve, so that a page that needs the network shows it.
        offline = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox", offline])
        yield browser
        browser.close()


class Site:
    """The files of a directory, and what was asked for that it does not have."""

    def __init__(self, directory: pathlib.Path) -> None:
        self.directory = directory
        self.missing: List[str] = []

    def __call__(self, method: str, path: str, headers: Dict[str, str], body: bytes) -> Answer:
        file = self.directory / urllib.parse.urlsplit(path).path.lstrip("/")
        if not file.is_file():
            self.missing.append(path)
            return 404, "text/plain", b""
        return 200, mimetypes.guess_type(file.name)[0] or "application/octet-stream", file.read_bytes()


class Opened:
    """A browser window on a site. ``problems`` is what its pages asked for in vain, or said on the console."""

    def __init__(self, browser: Any, directory: pathlib.Path, width: int = 1280) -> None:
        self._site = Site(directory)
        self._closing = contextlib.ExitStack()
        self._origin = f"http://127.0.0.1:{self._closing.enter_context(serve(self._site))}/"
        self._said: List[str] = []
        # Axe sees the colours of the end of a transition, not of its middle.
        context = browser.new_context(viewport={"width": width, "height": 900}, reduced_motion="reduce")
        context.set_default_timeout(GUARD * 1000)
        context.add_init_script(AXE)
        self._closing.callback(context.close)
        self.page = context.new_page()
        self.page.on("console", lambda one: self._said.append(one.text) if one.type != "log" else None)
        self.page.on("pageerror", lambda error: self._said.append(str(error)))
        self.page.on("request", self._requested)

    def _requested(self, request: Any) -> None:
        if not request.url.startswith((self._origin, "data:", "blob:")):
            self._said.append(f"asks for {request.url}")

    def open(self, path: str) -> Any:
        self.page.goto(self._origin + path)
        return self.page

    @property
    def problems(self) -> List[str]:
        return [*(f"missing: {path}" for path in self._site.missing), *self._said]

    def close(self) -> None:
        self._closing.close()


def pages_of(directory: pathlib.Path) -> List[str]:
    """Return the pages that people wrote: the listings of source code are not among them."""
    names = (path.relative_to(directory).as_posix() for path in directory.rglob("*.html"))
    return sorted(name for name in names if not name.startswith(("_modules/", "_static/")))


@pytest.mark.parametrize("width", WIDTHS)
def test_pages_are_for_everyone(built: pathlib.Path, chromium: Any, width: int) -> None:
    """Every page loads from its own server, fits its window, can be used by keyboard, and passes axe."""
    names = pages_of(built)
    assert {path.stem for path in (ROOT / "docs").glob("*.md")} <= {name[: -len(".html")] for name in names}
    found: Dict[str, List[str]] = {}
    with contextlib.closing(Opened(chromium, built, width)) as opened:
        for name in names:
            before = len(opened.problems)
            page = opened.open(name)
            assert "sekuire" in page.title()
            problems = page.evaluate(LAYOUT)
            if not name.startswith("reference/") or name in OF_THE_REFERENCE:
                problems += page.evaluate(VIOLATIONS)
            found[name] = problems + opened.problems[before:]
    assert {name: problems for name, problems in found.items() if problems} == {}


def test_blocks_of_a_tab_are_reached(built: pathlib.Path, chromium: Any) -> None:
    """What scrolls in a tab that is opened later, or in a window that becomes narrow, can be reached by key."""
    with contextlib.closing(Opened(chromium, built)) as opened:
        page = opened.open("index.html")
        page.set_viewport_size({"width": 390, "height": 844})
        for label in page.locator(".sd-tab-label").all():
            label.click()
            page.wait_for_function(f"() => ({LAYOUT})().length === 0")
        assert opened.problems == []


def test_what_is_wrong_is_seen(chromium: Any, tmp_path: pathlib.Path) -> None:
    """The test above would see a failing script, a wide page, a block without a key, and what axe refuses."""
    (tmp_path / "bad.html").write_text(
        '<title>bad</title><article><div style="width:2000px">wide</div><pre style="width:90px">too long a line of code'
        '</pre></article><img src="none.png"><script>noSuchName()</script>',
        encoding="utf-8",
    )
    with contextlib.closing(Opened(chromium, tmp_path)) as opened:
        page = opened.open("bad.html")
        layout, violations = page.evaluate(LAYOUT), page.evaluate(VIOLATIONS)
        problems = opened.problems
    assert [line.split(": ")[0] for line in layout] == [
        "the page is 728 px wider than the window",
        "does not scroll",
        "no key reaches",
    ]
    assert any(line.startswith("image-alt") for line in violations)
    assert "missing: /none.png" in problems
    assert any("noSuchName is not defined" in line for line in problems)


@pytest.mark.parametrize("words", SEARCHES)
def test_search_finds_the_page(built: pathlib.Path, chromium: Any, words: str) -> None:
    """The first result of the site's own search is the page that answers the question."""
    with contextlib.closing(Opened(chromium, built)) as opened:
        page = opened.open(f"search.html?q={words}")
        page.wait_for_function("/found|matched/.test(document.querySelector('.search-summary')?.textContent ?? '')")
        links = page.locator("#search-results li a").evaluate_all("(all) => all.map((one) => one.href)")
        assert [urllib.parse.urlsplit(link).path.lstrip("/") for link in links][:1] == [SEARCHES[words]], links[:5]
        # Sphinx looks for the summary of an object by a selector that takes the dots of its name for classes.
        assert [one for one in opened.problems if "Anchored content block not found" not in one] == []


class Anchors(HTMLParser):
    """The ids of a page, and where its links lead."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: Set[str] = set()
        self.links: List[str] = []

    def handle_starttag(self, tag: str, attrs: List[Tuple[str, Optional[str]]]) -> None:
        values = dict(attrs)
        self.ids |= {value for name in ("id", "name") for value in [values.get(name)] if value}
        if tag == "a" and values.get("href"):
            self.links.append(str(values["href"]))


def test_links_and_anchors(built: pathlib.Path) -> None:
    """Every link within the site leads to a page that was built, and to an anchor that the page has."""
    parsed: Dict[pathlib.Path, Anchors] = {}
    for file in built.rglob("*.html"):
        parsed[file] = Anchors()
        parsed[file].feed(file.read_text(encoding="utf-8"))
    broken = set()
    for file in (built / name for name in pages_of(built)):
        for link in parsed[file].links:
            parts = urllib.parse.urlsplit(link)
            if parts.scheme or parts.netloc or file.name == "404.html":
                continue
            target = (file.parent / urllib.parse.unquote(parts.path)).resolve() if parts.path else file
            anchor = urllib.parse.unquote(parts.fragment)
            if not target.is_file() or (anchor and target in parsed and anchor not in parsed[target].ids):
                broken.add(f"{file.name}: {link}")
    assert sorted(broken) == []
    assert "max-workers" in parsed[built / "configuration.html"].ids
