"""Run handlers with a Flask application's context and settings, by ``flask sekuire worker`` (extra ``flask``).

The state of an application is in ``app.extensions["sekuire"]`` and not in the extension object. Therefore one object
serves factories and tests with many applications.
"""

from __future__ import annotations

import os
import sys
from typing import Any, Callable, List, Optional, TypeVar

try:
    import click
    import flask
    from flask.cli import AppGroup, ScriptInfo
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"sekuire.contrib.flask needs Flask ({error}); run: pip install 'sekuire[flask]'", name=error.name
    ) from error

from .._internal.logs import get_logger
from ..errors import ConfigurationError, SekuireError
from ..handlers.context import TaskContext
from ..handlers.invoke import CallNext, Handler, Middleware
from ..handlers.registry import TaskRegistry, shown
from ..sdk import SekuireSDK
from ..service import runner
from ..service.arguments import IDLE_WITH_RELOAD
from ..service.exit_codes import code_of
from ..service.reloader import Reloader, is_reloaded, program
from ..worker.worker import Worker
from .settings import PREFIX, Settings

__all__ = ["Sekuire", "tasks_of"]

log = get_logger("sekuire.contrib.flask")

_H = TypeVar("_H", bound=Handler)
_M = TypeVar("_M", bound=Middleware)

_NAME = "sekuire"


class _State:
    """Hold the extension of one application, and the handlers of its blueprints."""

    def __init__(self) -> None:
        self.extension: Optional[Sekuire] = None
        self.registries: List[TaskRegistry] = []


def _check_app(app: Any, option: str) -> None:
    if not isinstance(app, flask.Flask):
        raise ConfigurationError(f"must be a flask.Flask, got {type(app).__name__}", option)


def _state(app: Any) -> _State:
    state: _State = app.extensions.setdefault(_NAME, _State())
    return state


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
        """Attach the extension to ``app``, with the command ``flask sekuire worker``.

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
        state = _state(app)
        if state.extension is not self:
            raise ConfigurationError("call init_app(app) first: the application does not know this extension", "app")
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
        for one in state.registries:
            registry.include(one)
        worker.include(registry)
        return worker


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
@click.option("--liveness-file", metavar="PATH", help="Touch this file every 5 s while the worker is alive.")
@click.option("--reload", is_flag=True, help="For development: restart it whenever a Python file is saved.")
@click.pass_obj
def _worker(
    info: ScriptInfo,
    max_workers: Optional[int],
    stop_when_idle: Optional[float],
    liveness_file: Optional[str],
    reload: bool,
) -> None:
    """Run the application's handlers until SIGTERM or Ctrl-C, which drain it; a second one stops at once."""
    if reload and stop_when_idle is not None:
        raise click.UsageError(IDLE_WITH_RELOAD)
    # The child inherits FLASK_SEKUIRE_WORKER_RELOAD, which sets the option too.
    if reload and not is_reloaded():
        sys.exit(_reload())
    changed = {"max_workers": max_workers, "stop_when_idle": stop_when_idle}
    options = {name: value for name, value in changed.items() if value is not None}

    def make() -> Worker:
        app = info.load_app()
        extension = _state(app).extension
        assert extension is not None  # init_app() has added this command.
        sdk = extension.sdk(app)
        worker = extension.create_worker(app, sdk, **options)
        sdk.start()
        return worker

    try:
        code = runner.run(make, _report, liveness_file)
    except SekuireError as error:
        code = _report(error)
    sys.exit(code)


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
