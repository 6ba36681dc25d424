"""Serve the dashboard beside the endpoints of the contract: who may see it, and what its answers carry.

It is a Flask application of its own under ``/ui/``. Requests to it meet no injected faults, are not counted among those
of the contract, and never carry the API key. A session opens no endpoint of the contract.
"""

from __future__ import annotations

import hashlib
import io
import json
import pathlib
from typing import Any, Callable, Dict, Iterable, Optional

import flask
from werkzeug.exceptions import HTTPException

from ..._internal.logs import get_logger
from ...errors import ConfigurationError
from ...version import __version__
from ..approvals import Approvals
from ..faults import Faults
from ..record import Record
from ..store import Refusal, Settings, Store
from ..streams import Hub, Watch
from .desk import Desk
from .figures import Figures
from .pages import PAGES
from .queries import Queries
from .rendering import FILTERS
from .sessions import SESSION_SECONDS, Sessions
from .signals import MOST_PAGES, Signals

__all__ = ["PREFIX", "Dashboard"]

logger = get_logger("sekuire.local")

PREFIX = "/ui"
_MAX_LOGIN_BODY = 8 * 1024
_MAX_BODY = 32 * 1024 * 1024
_HERE = pathlib.Path(__file__).parent

#: Nothing but this server's own files. No inline script or style, no frame, no other form target.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; form-action 'self';"
    " base-uri 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}

Environ = Dict[str, Any]


class Dashboard:
    """Answer the requests for the dashboard, as a WSGI application, and hold what lives with it."""

    # Threads: HTTP threads call it. It has no state of its own beside `_port`, which is set before the server runs.

    def __init__(
        self, store: Store, hub: Hub, approvals: Approvals, record: Record, settings: Settings, faults: Faults
    ) -> None:
        queries = Queries(store)
        figures = Figures(store, hub, queries)
        self.desk = Desk(
            store=store,
            hub=hub,
            approvals=approvals,
            record=record,
            settings=settings,
            faults=faults,
            queries=queries,
            figures=figures,
            sessions=Sessions(store),
            signals=Signals(store, record, faults, figures.look),
        )
        self._port = 0
        self._version = _version_of_files()
        self._flask = self._build()

    # -- used by the platform ------------------------------------------------------------------------------------------

    def start(self, watch: Watch, url: str, port: int) -> None:
        self.desk.url = url
        self._port = port
        self.desk.signals.start(watch)

    def stop(self) -> None:
        self.desk.signals.stop()

    def link(self) -> str:
        """Return a link that lets one person in, within ten minutes."""
        return f"{self.desk.url}{PREFIX}/login?code={self.desk.sessions.make_code()}"

    @staticmethod
    def serves(environ: Environ) -> bool:
        path: str = environ["PATH_INFO"]
        return path == "/" or path == PREFIX or path.startswith(f"{PREFIX}/")

    def __call__(self, environ: Environ, start_response: Callable[..., Any]) -> Iterable[bytes]:
        return self._flask.wsgi_app(environ, start_response)

    # -- the application -----------------------------------------------------------------------------------------------

    def _build(self) -> flask.Flask:
        app = flask.Flask("sekuire.local.ui", root_path=str(_HERE), static_folder=None)
        app.jinja_options = {"trim_blocks": True, "lstrip_blocks": True, "autoescape": True}
        app.config.update(MAX_CONTENT_LENGTH=_MAX_BODY, MAX_FORM_MEMORY_SIZE=_MAX_BODY, MAX_FORM_PARTS=5000)
        app.jinja_env.filters.update(FILTERS)
        app.jinja_env.globals.update(
            prefix=PREFIX, version=__version__, file_version=self._version, form_token=self._form_token,
            policy_text=POLICY,
        )  # fmt: skip
        app.before_request(self._before)
        app.after_request(self._after)
        app.register_error_handler(Refusal, self._refused)
        app.register_error_handler(HTTPException, self._http_error)
        app.register_error_handler(Exception, self._crash)
        app.add_url_rule("/", "root", lambda: _redirect(f"{PREFIX}/"))
        app.add_url_rule(PREFIX, "bare", lambda: _redirect(f"{PREFIX}/"))
        app.add_url_rule(f"{PREFIX}/static/<path:name>", "static", self._static)
        app.add_url_rule(f"{PREFIX}/login", "login", self._login)
        app.add_url_rule(f"{PREFIX}/login", "enter", self._enter, methods=["POST"])
        app.add_url_rule(f"{PREFIX}/logout", "leave", self._leave, methods=["POST"])
        app.add_url_rule(f"{PREFIX}/links", "links", self._links, methods=["POST"])
        app.add_url_rule(f"{PREFIX}/events", "events", self._events)
        app.add_url_rule(f"{PREFIX}/live", "live", self._live)
        for add in PAGES:
            add(app, self.desk)
        return app

    #: What is answered without a session.
    _OPEN = frozenset(("root", "bare", "static", "login", "enter", "links"))

    def _before(self) -> Optional[flask.Response]:
        request = flask.request
        if request.endpoint == "links":
            self._check_key()
        elif request.endpoint not in self._OPEN:
            secret = self._secret()
            if secret is None:
                return self._ask_to_log_in()
            request.environ["sekuire.connection"].know()
        if request.method not in ("GET", "HEAD", "OPTIONS"):
            self._read_body()
            if request.endpoint not in self._OPEN:
                self._check_form()
        return None

    def _secret(self) -> Optional[str]:
        """Return the secret of the open session that the request comes with, or None."""
        secret = flask.request.cookies.get(self._cookie)
        return secret if self.desk.sessions.is_open(secret) else None

    @property
    def _cookie(self) -> str:
        # Cookies do not tell ports apart, so that platforms on two ports would sign each other out.
        return f"sekuire_ui_{self._port}"

    def _form_token(self) -> str:
        secret = flask.request.cookies.get(self._cookie)
        return self.desk.sessions.form_token(secret) if secret else ""

    def _read_body(self) -> None:
        """Read the body, and give it to Flask as a file. The server's own bodies are not files."""
        environ = flask.request.environ
        is_known: bool = environ["sekuire.connection"].is_known
        raw: bytes = environ["wsgi.input"].read(_MAX_BODY if is_known else _MAX_LOGIN_BODY, known=is_known)
        environ["wsgi.input"] = io.BytesIO(raw)
        environ["CONTENT_LENGTH"] = str(len(raw))
        environ.pop("HTTP_TRANSFER_ENCODING", None)

    def _check_form(self) -> None:
        request = flask.request
        # A browser says which site a request comes from. Older ones do not; the token is checked in any case.
        if request.headers.get("Sec-Fetch-Site", "same-origin") not in ("same-origin", "none"):
            raise Refusal(403, "WRONG_ORIGIN", "another site has sent this request")
        token = request.headers.get("X-Form-Token") or request.form.get("_token", "")
        if not self.desk.sessions.is_form_token(self._secret() or "", token):
            raise Refusal(403, "WRONG_TOKEN", "the form is out of date; reload the page and try again")

    def _check_key(self) -> None:
        if not self.desk.store.is_api_key(flask.request.headers.get("X-API-Key")):
            raise Refusal(401, "INVALID_API_KEY", "this needs the platform's API key: X-API-Key: sk_live_...")
        flask.request.environ["sekuire.connection"].know()

    def _ask_to_log_in(self) -> flask.Response:
        request = flask.request
        is_page = request.endpoint not in (None, "events", "live") and "_region" not in request.args
        if request.method == "GET" and is_page:
            return _redirect(f"{PREFIX}/login")
        return flask.Response("sign in first: sekuire dev --link", 401, mimetype="text/plain")

    def _after(self, response: flask.Response) -> flask.Response:
        response.headers.update(_HEADERS)
        if "Cache-Control" not in response.headers:
            response.headers["Cache-Control"] = "no-store"
        response.headers["Vary"] = "Cookie"
        return response

    # -- errors --------------------------------------------------------------------------------------------------------

    def _refused(self, refusal: Refusal) -> flask.Response:
        return self._problem(refusal.status, refusal.message)

    def _http_error(self, error: HTTPException) -> flask.Response:
        status = error.code or 500
        if status < 400:
            return error.get_response()  # type: ignore[return-value]
        text = "there is no such page" if status == 404 else (error.description or error.name)
        return self._problem(status, text)

    def _crash(self, error: Exception) -> flask.Response:
        if isinstance(error, ConfigurationError):
            return self._problem(503, "the local platform is stopping")
        logger.error("the dashboard failed to answer %s", flask.request.path, exc_info=error)
        return self._problem(500, "the dashboard failed; see the platform's log")

    def _problem(self, status: int, text: str) -> flask.Response:
        if flask.request.endpoint in ("links", "events", "live"):
            body = json.dumps({"message": text})
            return flask.Response(body, status, mimetype="application/json")
        if "HX-Request" in flask.request.headers or "_region" in flask.request.args:
            # Browsers log a failed request as an error of the page, which a person's mistake is not.
            is_answer = flask.request.method == "POST" and status in (400, 404, 409, 410, 422)
            response = flask.Response(text, 204 if is_answer else status, mimetype="text/plain")
            notice = {"notice": {"text": text[:1].upper() + text[1:], "bad": True}}
            response.headers["HX-Trigger"] = json.dumps(notice)
            return response
        is_in = self._secret() is not None
        html = flask.render_template("problem.html", title="Not possible", status=status, text=text, is_in=is_in)
        return flask.Response(html, status, mimetype="text/html")

    # -- files, sessions, streams --------------------------------------------------------------------------------------

    def _static(self, name: str) -> flask.Response:
        response = flask.send_from_directory(_HERE / "static", name, max_age=31536000)
        # Their address changes with them.
        is_current = flask.request.args.get("v") == self._version
        response.headers["Cache-Control"] = "private, max-age=31536000, immutable" if is_current else "no-cache"
        return response

    def _login(self) -> flask.Response:
        code = flask.request.args.get("code", "")
        html = flask.render_template("login.html", title="Sign in", code=code, is_in=self._secret() is not None)
        return flask.Response(html, mimetype="text/html")

    def _enter(self) -> flask.Response:
        if flask.request.headers.get("Sec-Fetch-Site", "same-origin") not in ("same-origin", "none"):
            raise Refusal(403, "WRONG_ORIGIN", "another site has sent this request")
        secret = self.desk.sessions.redeem(flask.request.form.get("code", ""))
        if secret is None:
            html = flask.render_template("login.html", title="Sign in", code="", is_in=False, is_stale=True)
            return flask.Response(html, 403, mimetype="text/html")
        response = _redirect(f"{PREFIX}/")
        response.set_cookie(
            self._cookie, secret, max_age=int(SESSION_SECONDS), path=PREFIX, httponly=True, samesite="Strict"
        )
        return response

    def _leave(self) -> flask.Response:
        secret = self._secret()
        if secret is not None:
            self.desk.sessions.close(secret)
        response = _redirect(f"{PREFIX}/login")
        response.delete_cookie(self._cookie, path=PREFIX, httponly=True, samesite="Strict")
        return response

    def _links(self) -> flask.Response:
        return flask.Response(json.dumps({"url": self.link()}), 201, mimetype="application/json")

    def _events(self) -> flask.Response:
        if flask.request.method == "HEAD":
            raise Refusal(405, "METHOD_NOT_ALLOWED", "HEAD is not allowed here")
        page = self.desk.signals.open(flask.request.environ["sekuire.connection"].socket)
        response = flask.Response(page)
        response.direct_passthrough = True
        response.headers["Content-Type"] = "text/event-stream"
        return response

    def _live(self) -> flask.Response:
        """Say why a stream was refused, which a browser does not show to a page."""
        is_full = self.desk.signals.count() >= MOST_PAGES
        text = f"{MOST_PAGES} pages are live already; close one" if is_full else ""
        return flask.Response(json.dumps({"problem": text}), mimetype="application/json")


def _redirect(to: str) -> flask.Response:
    return flask.redirect(to, 303)  # type: ignore[return-value]


def _version_of_files() -> str:
    digest = hashlib.sha256()
    for path in sorted((_HERE / "static").rglob("*")):
        if path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
