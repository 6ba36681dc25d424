"""The built documentation opens in a browser: nothing is missing, and no script fails."""

from __future__ import annotations

import mimetypes
import pathlib
import queue
import subprocess
import sys
import urllib.parse
from typing import Dict, List

import pytest

from ..support.waiting import GUARD
from .browser import Answer, chromium, console, serve

pytestmark = pytest.mark.full

ROOT = pathlib.Path(__file__).resolve().parents[2]

#: Put before a page's end: tells the server when everything is loaded, with what the page shows.
PROBE = b"""<script>addEventListener("load", () => setTimeout(() => fetch("/loaded?" + new URLSearchParams({
  page: location.pathname, title: document.title, links: document.links.length}), {method: "POST"}), 50))</script>"""


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


class Site:
    """The built pages, each with the probe in it."""

    def __init__(self, directory: pathlib.Path) -> None:
        self.directory = directory
        self.missing: List[str] = []
        self.loaded: queue.Queue[Dict[str, str]] = queue.Queue()

    def __call__(self, method: str, path: str, headers: Dict[str, str], body: bytes) -> Answer:
        parts = urllib.parse.urlsplit(path)
        if parts.path == "/loaded":
            self.loaded.put(dict(urllib.parse.parse_qsl(parts.query)))
            return 200, "text/plain", b""
        file = self.directory / parts.path.lstrip("/")
        if not file.is_file():
            if parts.path != "/favicon.ico":
                self.missing.append(path)
            return 404, "text/plain", b""
        data = file.read_bytes()
        if file.suffix == ".html":
            data = data.replace(b"</body>", PROBE + b"</body>")
        return 200, mimetypes.guess_type(file.name)[0] or "application/octet-stream", data


def test_pages_open_without_errors(built: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Every page loads with all that it asks for, from its own server only, and says nothing on the console."""
    pages = sorted(path.stem for path in (ROOT / "docs").glob("*.md"))
    assert {path.stem for path in built.glob("*.html")} >= set(pages)
    for page in pages:
        site = Site(built)
        directory = tmp_path / page
        directory.mkdir()
        # Names other than this machine's do not resolve, so that a page that needs the network shows it.
        offline = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
        with serve(site) as port, chromium(directory, f"http://127.0.0.1:{port}/{page}.html", offline) as log:
            seen = site.loaded.get(timeout=GUARD)
        assert seen["page"] == f"/{page}.html"
        assert "sekuire" in seen["title"]
        assert int(seen["links"]) > 5
        assert site.missing == []
        assert [line for line in console(log) if "favicon" not in line] == [], page


def test_a_failing_script_is_seen(tmp_path: pathlib.Path) -> None:
    """The test above would see an error: one that is made shows in the log."""
    (tmp_path / "bad.html").write_text("<title>bad</title><body><script>noSuchName()</script></body>", encoding="utf-8")
    site = Site(tmp_path)
    with serve(site) as port, chromium(tmp_path, f"http://127.0.0.1:{port}/bad.html") as log:
        site.loaded.get(timeout=GUARD)
    assert any("noSuchName is not defined" in line for line in console(log))
