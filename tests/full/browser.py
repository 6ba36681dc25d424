"""A headless Chromium for one page: no driver, the page tells its findings by a request to the test's own server."""

from __future__ import annotations

import contextlib
import pathlib
import shutil
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Callable, Dict, Iterator, List, Optional, Tuple

NAMES = ("chromium", "chromium-browser", "google-chrome")

#: Path → handler; gets method, path, headers and body, and gives status, content type and body.
Answer = Tuple[int, str, bytes]
Page = Callable[[str, str, Dict[str, str], bytes], Answer]


def executable() -> Optional[str]:
    return next((found for found in map(shutil.which, NAMES) if found), None)


@contextlib.contextmanager
def chromium(directory: pathlib.Path, url: str, *options: str) -> Iterator[pathlib.Path]:
    """Chromium with ``url`` open; the file that its log, console messages included, goes to."""
    program = executable()
    assert program, "tox -e full installs Chromium; here it is missing"
    log = directory / "chromium.log"
    command = [
        program,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--no-first-run",
        "--no-proxy-server",
        "--enable-logging=stderr",
        f"--user-data-dir={directory / 'profile'}",
        "--remote-debugging-port=0",
        *options,
        url,
    ]
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)
        try:
            yield log
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextlib.contextmanager
def serve(page: Page, host: str = "127.0.0.1", port: int = 0) -> Iterator[int]:
    """``page`` over HTTP on ``host``; the port."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, kind, text = page(self.command, self.path, dict(self.headers), body)
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(text)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(text)

        do_GET = do_POST = do_PUT = do_OPTIONS = do_HEAD = answer

        def log_message(self, format: str, *args: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        block_on_close = False

        def handle_error(self, request: object, client_address: object) -> None:
            """A browser that is closed resets its connections."""

    server = Server((host, port), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def console(log: pathlib.Path) -> List[str]:
    """The lines of a log that a page's console made."""
    return [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if "CONSOLE" in line]
