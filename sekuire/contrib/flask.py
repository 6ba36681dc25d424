"""Run handlers with a Flask application's context and settings, by ``flask sekuire worker`` (extra ``flask``).

The state of an application is in ``app.extensions["sekuire"]`` and not in the extension object. Therefore one object
serves factories and tests with many applications.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import weakref
from typing import TYPE_CHECKING, Any, Callable, List, Optional, TypeVar

try:
    import click
    import flask
    from flask.cli import AppGroup, ScriptInfo
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"sekuire.contrib.flask needs Flask ({error}); run: pip install 'sekuire[flask]'", name=error.name
    ) from error

from .._internal.logs import enable_loggers, get_logger
from ..client import SekuireClient, TaskHandle
from ..errors import ConfigurationError, SekuireError
from ..handlers.context import TaskContext
from ..handlers.invoke import CallNext, Middleware
from ..handlers.registry import TaskRegistry, shown
from ..sdk import SekuireSDK
from ..service import runner
from ..service.arguments import IDLE_WITH_RELOAD
from ..service.exit_codes import code_of
from ..service.findings import GOOD, WARNING, WRONG, Finding
from ..service.reloader import Reloader, is_reloaded, program
from ..worker.worker import Worker
from .flask_pushed import pushed_tasks
from .settings import PREFIX, Settings, diagnose

if TYPE_CHECKING:
    from ..handlers.invoke import DeclaredHandler

__all__ = ["Sekuire", "pushed_tasks", "tasks_of"]

log = get_logger("sekuire.contrib.flask")

_H = TypeVar("_H", bound="DeclaredHandler")
_M = TypeVar("_M", bound=Middleware)

_NAME = "sekuire"


class _State:
    """Hold the extension of one application, and the handlers of its blueprints."""

    def __init__(self) -> None:
        self.extension: Optional[Sekuire] = None
        self.registries: List[TaskRegistry] = []
        self._lock = threading.Lock()
        self._client: Optional[SekuireClient] = None

    def client(self, app: flask.Flask, settings: Settings) -> SekuireClient:
        """Return the application's client, which keeps its connections open. A forked child opens its own."""
        with self._lock:
            if self._client is None:
                client = self._client = settings.client()
                # With an application of a test, for example, of which there are many.
                weakref.finalize(app, client.close).atexit = False
            return self._client


def _check_app(app: Any, option: str) -> None:
    if not isinstance(app, flask.Flask):
        raise ConfigurationError(f"must be a flask.Flask, got {type(app).__name__}", option)


def _state(app: Any) -> _State:
    state: _State = app.extensions.setdefault(_NAME, _State())
    return state


def _current_app() -> flask.Flask:
    app: flask.Flask = flask.current_app._get_current_object()  # type: ignore[attr-defined]  # Not in the stubs.
    return app


def _settings(app: flask.Flask) -> Settings:
    values = {key[len(PREFIX) :]: value for key, value in app.config.items() if key.startswith(PREFIX)}
    return Settings(values, lambda key: f"app.config[{PREFIX + key!r}]")


class Sekuire:
    """Connect a Flask application to the platform: ``Sekuire(app)``, or ``Sekuire()`` and later ``init_app(app)``. ::

        app = flask.Flask(__name__)
        sekuire = Sekuire(app)

        @sekuire.task("greet")
        def greet(ctx, input):
            return f"Hello from {flask.current_app.name}"

    Handlers declared with :meth:`task` belong to every application that the extension is initialised with. Those of a
    blueprint (:func:`tasks_of`) belong to the applications that register the blueprint.

    Each handler runs in an application context of its own, so ``current_app`` and ``g`` work. The context is torn down
    after the task, with the handler's exception if there is one. A session of Flask-SQLAlchemy, for example, ends then.

    Declare handlers from one thread, before a worker is made. A worker has the handlers that are declared then.
    """

    def __init__(self, app: Optional[flask.Flask] = None) -> None:
        self._declared: List[Callable[[TaskRegistry], object]] = []
        if app is not None:
            self.init_app(app)

    def init_app(self, app: flask.Flask) -> None:
        """Attach the extension to ``app``, with the commands ``flask sekuire worker`` and ``flask sekuire doctor``.

        :raises ConfigurationError: another extension object is attached already, or ``app`` is not an application.
        """
        _check_app(app, "init_app")
        state = _state(app)
        if state.extension is not None and state.extension is not self:
            raise ConfigurationError("the application has a Sekuire extension already; use one for all", "init_app")
        state.extension = self
        app.cli.add_command(_commands)

    # -- declaring --

    def task(
        self, name: str, *, timeout: Optional[float] = None, max_concurrency: Optional[int] = None
    ) -> Callable[[_H], _H]:
        """Declare a handler, as :meth:`TaskRegistry.task() <sekuire.TaskRegistry.task>` does."""

        def register(function: _H) -> _H:
            def declare(registry: TaskRegistry) -> object:
                return registry.task(name, function, timeout=timeout, max_concurrency=max_concurrency)

            # On a registry of its own first, so that a wrong argument is reported at this declaration.
            declare(TaskRegistry())
            self._declared.append(declare)
            return function

        if not isinstance(name, str):
            raise ConfigurationError(
                f"needs the capability's name first: @sekuire.task('summarize'), got {shown(name)}", "task"
            )
        return register

    def include(self, registry: TaskRegistry) -> None:
        """Have every worker include ``registry``."""
        if not isinstance(registry, TaskRegistry):
            raise ConfigurationError(f"must be a TaskRegistry, got {type(registry).__name__}", "include")
        self._declared.append(lambda own: own.include(registry))

    def middleware(self, function: _M) -> _M:
        """Put ``function(ctx, input, call_next)`` around every handler, inside the application context."""
        TaskRegistry().middleware(function)
        self._declared.append(lambda own: own.middleware(function))
        return function

    # -- submitting --

    def submit(
        self, capability: str, input: Any = None, *, agent_id: Optional[str] = None, **fields: Any
    ) -> TaskHandle:
        """Submit a task with the API key of the current application, and return its handle. ::

            @app.post("/orders")
            def order():
                handle = sekuire.submit("confirm_order", {"order_id": 7})
                return {"task_id": handle.id}, 202

        It is sent again for up to 5 seconds while the platform cannot be reached. The application's settings count as
        they are at the first call.

        :param agent_id: the agent that gets the task; the default is the settings' agent.
        :param fields: the others of :meth:`SekuireClient.submit() <sekuire.SekuireClient.submit>`, such as ``delay``,
            ``timeout`` or ``idempotency_key``.
        :raises ConfigurationError: there is no application context, the API key or the agent is missing, or the task
            is invalid.
        :raises SekuireError: the task could not be submitted, as :meth:`SekuireClient.submit()
            <sekuire.SekuireClient.submit>` says.
        """
        if not flask.has_app_context():
            raise ConfigurationError(
                "needs an application context: call it while a request or a task is handled, or within "
                "`with app.app_context():`",
                "Sekuire.submit",
            )
        app = _current_app()
        self._check_attached(app)
        settings = _settings(app)
        client = _state(app).client(app, settings)
        agent_id = settings.agent_id() if agent_id is None else agent_id
        return client.send(client.prepare(capability, input, agent_id=agent_id, **fields))

    # -- running --

    def sdk(self, app: flask.Flask) -> SekuireSDK:
        """Return an SDK with the application's settings, not yet started.

        ``SEKUIRE_…`` keys of ``app.config`` win over environment variables of the same name.

        :raises ConfigurationError: a setting is wrong, missing or unknown; the text names the key.
        """
        _check_app(app, "app")
        return _settings(app).sdk()

    def create_worker(self, app: flask.Flask, sdk: Optional[SekuireSDK] = None, **options: Any) -> Worker:
        """Return a worker for ``app``'s handlers, not yet started.

        :param sdk: the worker's SDK; None makes one from the settings.
        :param options: options of :meth:`SekuireSDK.create_task_worker() <sekuire.SekuireSDK.create_task_worker>`,
            which win over the settings.
        :raises ConfigurationError: a setting is wrong, a name is declared twice, or no handler is declared.
        """
        _check_app(app, "app")
        self._check_attached(app)
        enable_loggers()  # The application's dictConfig may have disabled them.
        settings = _settings(app)
        worker = settings.worker(settings.sdk() if sdk is None else sdk, **options)
        if settings.runs_elsewhere(**options):
            log.warning(
                "handlers run in other processes, where they have no application context; give the executor an "
                "initializer that pushes one, or let each handler make its own"
            )

        def in_context(ctx: TaskContext, input: Any, call_next: CallNext) -> Any:
            with app.app_context():
                return call_next(input)

        worker.middleware(in_context)
        registry = TaskRegistry()
        for declare in self._declared:
            declare(registry)
        for one in _state(app).registries:
            registry.include(one)
        worker.include(registry)
        return worker

    def _check_attached(self, app: flask.Flask) -> None:
        if _state(app).extension is not self:
            raise ConfigurationError("call init_app(app) first: the application does not know this extension", "app")


def tasks_of(blueprint: flask.Blueprint) -> TaskRegistry:
    """Return a registry whose handlers belong to every application that registers ``blueprint``, once or more often.

    :raises ConfigurationError: ``blueprint`` is not a blueprint.
    """
    if not isinstance(blueprint, flask.Blueprint):
        raise ConfigurationError(
            f"must be a flask.Blueprint, got {type(blueprint).__name__}; an application's own handlers are declared by "
            "its Sekuire(app).task",
            "tasks_of",
        )
    registry = TaskRegistry()

    def add(setup: Any) -> None:
        # Blueprints may be registered before or after init_app(), which uses the same state.
        registries = _state(setup.app).registries
        # One application may register the blueprint under several names.
        if not any(one is registry for one in registries):
            registries.append(registry)

    blueprint.record(add)
    return registry


# -- the command ------------------------------------------------------------------------------------------------------

_commands = AppGroup(_NAME, help="Work for a Sekuire platform.")


@_commands.command("worker", with_appcontext=False)
@click.option("--max-workers", type=click.IntRange(1, 10_000), help="Handlers that run at once.")
@click.option(
    "--stop-when-idle",
    type=click.FloatRange(min=0, min_open=True),
    metavar="S",
    help="End after so many seconds without a task.",
)
@click.option(
    "--http", metavar="[HOST:]PORT", help="Show health and metrics here; PORT alone is for this machine only."
)
@click.option("--liveness-file", metavar="PATH", help="Touch this file every 5 s while the worker is alive.")
@click.option("--reload", is_flag=True, help="For development: restart it whenever a Python file is saved.")
@click.pass_obj
def _worker(
    info: ScriptInfo,
    max_workers: Optional[int],
    stop_when_idle: Optional[float],
    http: Optional[str],
    liveness_file: Optional[str],
    reload: bool,
) -> None:
    """Run the application's handlers until SIGTERM or Ctrl-C, which drain it; a second one stops at once."""
    if reload and stop_when_idle is not None:
        raise click.UsageError(IDLE_WITH_RELOAD)
    # The child inherits FLASK_SEKUIRE_WORKER_RELOAD, which sets the option too.
    if reload and not is_reloaded():
        sys.exit(_reload())
    changed = {"max_workers": max_workers, "stop_when_idle": stop_when_idle, "health": http}
    options = {name: value for name, value in changed.items() if value is not None}

    def make() -> Worker:
        app = info.load_app()
        extension = _state(app).extension
        assert extension is not None  # init_app() has added this command.
        return extension.create_worker(app, extension.sdk(app), **options)

    try:
        code = runner.run(make, _report, liveness_file)
    except SekuireError as error:
        code = _report(error)
    sys.exit(code)


@_commands.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print all findings as one JSON object.")
def _doctor(as_json: bool) -> None:
    """Check the settings, the credentials and the way to the platform, and say how to fix what is wrong."""
    app = _current_app()
    findings = diagnose(lambda: _settings(app), (lambda finding: None) if as_json else _show)
    if as_json:
        click.echo(json.dumps(findings.as_json(), indent=2))
    else:
        click.echo("\n" + findings.verdict())
    sys.exit(findings.exit_code)


_COLOURS = {GOOD: "green", WARNING: "yellow", WRONG: "red"}


def _show(finding: Finding) -> None:
    for line in finding.lines(click.style(finding.state.ljust(8), _COLOURS.get(finding.state))):
        click.echo(line)


def _reload() -> int:
    # click accepts no abbreviations, so the option is spelled like this.
    command = [*program(), *(one for one in sys.argv[1:] if one != "--reload")]
    try:
        return Reloader(command, [os.getcwd()], say=lambda line: click.echo(f"reload: {line}", err=True)).run()
    except SekuireError as error:
        return _report(error)


def _report(error: SekuireError) -> int:
    click.echo(f"flask sekuire worker: error: {error}", err=True)
    return code_of(error)
