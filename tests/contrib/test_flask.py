"""Flask: contexts around handlers, settings, factories and blueprints, and the command, with the real framework."""

from __future__ import annotations

import multiprocessing
import signal
import subprocess
import sys
import textwrap
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Callable, Dict, List

import flask
import pytest

from sekuire import ProcessExecutor, RemoteExecutor, SekuireSDK, TaskRegistry, Worker
from sekuire.contrib.flask import Sekuire, tasks_of
from sekuire.errors import ConfigurationError
from sekuire.local import LocalPlatform
from sekuire.testing import submitted

from ..cli.conftest import POSIX_ONLY, Process, Run
from ..conftest import AGENT
from ..health.asking import ask, free_port
from ..support.waiting import GUARD, until

#: A public key as a policy's are; nobody has the private one.
KEY = "3b6a27bcceb6a42d62a3a8d02a6f0d73653215771de243a63ac048a18b59da29"


@pytest.fixture
def settings(platform: LocalPlatform) -> Dict[str, Any]:
    return {
        "SEKUIRE_API_URL": platform.url,
        "SEKUIRE_AGENT_ID": AGENT,
        "SEKUIRE_INSTALL_TOKEN": platform.create_install_token(AGENT),
        "SEKUIRE_HEARTBEAT_INTERVAL": 0.2,
    }


@pytest.fixture
def app(settings: Dict[str, Any]) -> flask.Flask:
    app = flask.Flask("shop")
    app.config.update(settings)
    return app


def outputs(platform: LocalPlatform, worker: Worker, *tasks: Any) -> List[Any]:
    """What a worker makes of the tasks (capability and input): an output, or an error's code."""
    sdk: SekuireSDK = worker.sdk
    sdk.start()
    try:
        with worker:
            ids = [platform.submit(name, input, agent_id=AGENT) for name, input in tasks]
            done = [platform.wait(task_id, timeout=GUARD) for task_id in ids]
    finally:
        sdk.shutdown()
    return [one["output"] if one["status"] == "completed" else one["error"]["code"] for one in done]


def test_a_context_around_each_handler(platform: LocalPlatform, app: flask.Flask) -> None:
    """current_app and g work, g is new for each task, and what is torn down sees the handler's exception."""
    sekuire = Sekuire(app)
    torn_down: List[Any] = []

    @app.teardown_appcontext
    def tear_down(error: Any) -> None:
        torn_down.append(type(error).__name__)

    @sekuire.task("context")
    def context(ctx: Any, input: Any) -> Any:
        assert not hasattr(flask.g, "seen")
        flask.g.seen = True
        if input == "fail":
            raise ValueError("on purpose")
        return flask.current_app.name

    worker = sekuire.create_worker(app, max_workers=1)
    assert outputs(platform, worker, ("context", 1), ("context", "fail"), ("context", 2)) == [
        "shop", "handler_error", "shop",
    ]  # fmt: skip
    assert torn_down == ["NoneType", "ValueError", "NoneType"]


def test_an_async_handler(platform: LocalPlatform, app: flask.Flask) -> None:
    """It has the context too."""
    sekuire = Sekuire(app)

    @sekuire.task("async")
    async def handle(ctx: Any, input: Any) -> Any:
        return flask.current_app.name

    assert outputs(platform, sekuire.create_worker(app), ("async", None)) == ["shop"]


def test_sessions_of_flask_sqlalchemy(platform: LocalPlatform, app: flask.Flask, tmp_path: Path) -> None:
    """A task's session is removed with it: its uncommitted rows are gone, its connection is back."""
    flask_sqlalchemy = pytest.importorskip("flask_sqlalchemy")
    app.config["SQLALCHEMY_DATABASE_URI"] = f"sqlite:///{tmp_path / 'shop.db'}"
    db = flask_sqlalchemy.SQLAlchemy(app)

    class Order(db.Model):  # type: ignore[misc,name-defined]
        id = db.Column(db.Integer, primary_key=True)

    with app.app_context():
        db.create_all()
    sekuire = Sekuire(app)
    sessions: List[int] = []

    @sekuire.task("order")
    def order(ctx: Any, commit: bool) -> Any:
        sessions.append(db.session().hash_key)
        count = db.session.query(Order).count()
        db.session.add(Order())
        db.session.flush()
        if commit:
            db.session.commit()
        return count

    worker = sekuire.create_worker(app, max_workers=1)
    assert outputs(platform, worker, *[("order", commit) for commit in (False, True, False, True)]) == [0, 0, 1, 1]
    assert len(set(sessions)) == 4
    with app.app_context():
        assert db.engine.pool.checkedout() == 0
        db.engine.dispose()


def test_factories_and_blueprints(platform: LocalPlatform, settings: Dict[str, Any]) -> None:
    """One extension serves many applications; a blueprint's handlers belong to those that register it."""
    sekuire = Sekuire()
    sekuire.task("both")(lambda ctx, input: flask.current_app.name)
    shared = TaskRegistry()
    shared.task("shared", lambda ctx, input: "included")
    sekuire.include(shared)
    blueprint = flask.Blueprint("reports", __name__)
    reports = tasks_of(blueprint)
    reports.task("report")(lambda ctx, input: f"report of {flask.current_app.name}")
    seen: List[str] = []

    @sekuire.middleware
    def note(ctx: Any, input: Any, call_next: Callable[[Any], Any]) -> Any:
        seen.append(flask.current_app.name)
        return call_next(input)

    def create_app(name: str, with_reports: bool, first: bool) -> flask.Flask:
        app = flask.Flask(name)
        app.config.update(settings, SEKUIRE_INSTALL_TOKEN=platform.create_install_token(AGENT))
        if with_reports and first:
            app.register_blueprint(blueprint)
        sekuire.init_app(app)
        if with_reports and not first:
            app.register_blueprint(blueprint)
        return app

    tasks = [("both", None), ("shared", None), ("report", None)]
    one, two, three = create_app("one", True, True), create_app("two", True, False), create_app("three", False, False)
    assert outputs(platform, sekuire.create_worker(one), *tasks) == ["one", "included", "report of one"]
    assert outputs(platform, sekuire.create_worker(two), *tasks) == ["two", "included", "report of two"]
    worker = sekuire.create_worker(three)
    assert worker.capabilities == ("both", "shared")
    assert outputs(platform, worker, *tasks[:2]) == ["three", "included"]
    assert seen.count("three") == 2


def test_settings(app: flask.Flask, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Keys of the config win over the environment, options of create_worker over both."""
    monkeypatch.setenv("SEKUIRE_AGENT_ID", "from-the-environment")
    monkeypatch.setenv("SEKUIRE_WORKSPACE_ID", "ws-1")
    app.config.update(
        SEKUIRE_MAX_WORKERS=3,
        SEKUIRE_TASK_TIMEOUT=7.5,
        SEKUIRE_OUTBOX=str(tmp_path / "outbox.db"),
        SEKUIRE_CREDENTIALS_FILE=str(tmp_path / "credentials.json"),
        SEKUIRE_API_KEY=None,
    )
    sekuire = Sekuire(app)
    sekuire.task("x")(lambda ctx, input: None)
    worker = sekuire.create_worker(app, task_timeout=1.5)
    config = worker.config
    assert (config.agent_id, config.max_workers, config.task_timeout) == (AGENT, 3, 1.5)
    assert config.outbox == str(tmp_path / "outbox.db")
    assert worker.sdk.config.workspace_id == "ws-1"
    assert worker.sdk.config.credentials_store is not None
    worker.stop()
    worker.sdk.shutdown()


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"SEKUIRE_MAX_WORKRES": 3}, "app.config['SEKUIRE_MAX_WORKRES']: unknown setting; did you mean "
                                     "app.config['SEKUIRE_MAX_WORKERS']?"),
        ({"SEKUIRE_MAX_WORKERS": "3"}, "app.config['SEKUIRE_MAX_WORKERS']: must be a whole number"),
        ({"SEKUIRE_API_URL": "ftp://x"}, "app.config['SEKUIRE_API_URL']: must begin with https://"),
        ({"SEKUIRE_INSTALL_TOKEN": "skt_canary\n"}, "app.config['SEKUIRE_INSTALL_TOKEN']: begins or ends with white"),
        ({"SEKUIRE_CREDENTIALS_FILE": "/nowhere/c"}, "app.config['SEKUIRE_CREDENTIALS_FILE']: the directory"),
        ({"SEKUIRE_AGENT_ID": None}, "app.config['SEKUIRE_AGENT_ID']: is required; set SEKUIRE_AGENT_ID"),
        ({"SEKUIRE_POLICY_PUBLIC_KEYS": "zz"}, "app.config['SEKUIRE_POLICY_PUBLIC_KEYS']: an Ed25519 public key is 32"),
        ({"SEKUIRE_POLICY_PUBLIC_KEYS": KEY, "SEKUIRE_TRUSTED_POLICY_KEYS": [KEY]},
         "app.config['SEKUIRE_TRUSTED_POLICY_KEYS']: says the same as app.config['SEKUIRE_POLICY_PUBLIC_KEYS']"),
        ({"SEKUIRE_POLICY_OPTIONS": {"x": 1}}, "app.config['SEKUIRE_POLICY_OPTIONS']: has no 'x'"),
        ({"SEKUIRE_POLICY_OPTIONS": {"on_change": "x"}}, "app.config['SEKUIRE_POLICY_OPTIONS']: on_change must be"),
    ],
)  # fmt: skip
def test_wrong_settings(app: flask.Flask, changed: Dict[str, Any], text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the key as the user wrote it, and quotes no token."""
    monkeypatch.delenv("SEKUIRE_AGENT_ID", raising=False)
    app.config.update(changed)
    sekuire = Sekuire(app)
    sekuire.task("x")(lambda ctx, input: None)
    with pytest.raises(ConfigurationError) as caught:
        sekuire.create_worker(app)
    assert str(caught.value).startswith(text)
    assert "canary" not in str(caught.value)


def test_wrong_use(app: flask.Flask) -> None:
    """Each mistake is reported where it is made."""
    sekuire = Sekuire()
    with pytest.raises(ConfigurationError, match=r"call init_app\(app\) first"):
        sekuire.create_worker(app)
    sekuire.init_app(app)
    sekuire.init_app(app)
    with pytest.raises(ConfigurationError, match="has a Sekuire extension already"):
        Sekuire(app)
    with pytest.raises(ConfigurationError, match=r"needs the capability's name first.*, got .*test_flask\.py:\d+"):
        sekuire.task(lambda ctx, input: None)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="must accept two arguments"):
        sekuire.task("one")(lambda ctx: None)  # type: ignore[arg-type,misc]
    with pytest.raises(ConfigurationError, match="must be a TaskRegistry"):
        sekuire.include("tasks")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="must accept three arguments"):
        sekuire.middleware(lambda ctx, input: None)  # type: ignore[arg-type]
    sekuire.task("x")(lambda ctx, input: 1)
    sekuire.task("x")(lambda ctx, input: 2)
    with pytest.raises(ConfigurationError, match=r"is taken by .*test_flask\.py"):
        sekuire.create_worker(app)


def test_what_is_no_application(app: flask.Flask) -> None:
    """The error names what it is, not what it lacks."""
    calls: List[Any] = [
        (lambda: Sekuire("x"), "init_app: must be a flask.Flask, got str"),
        (lambda: Sekuire().init_app(flask.Blueprint("b", __name__)), "init_app: must be a flask.Flask, got Blueprint"),
        (lambda: Sekuire().sdk("x"), "app: must be a flask.Flask, got str"),
        (lambda: Sekuire().create_worker("x"), "app: must be a flask.Flask, got str"),
        (lambda: tasks_of(app), "tasks_of: must be a flask.Blueprint, got Flask; an application's own handlers"),
    ]
    for call, text in calls:
        with pytest.raises(ConfigurationError) as caught:
            call()
        assert str(caught.value).startswith(text)
    with app.app_context():
        Sekuire(flask.current_app)


@pytest.mark.parametrize("keys", [f" {KEY}, {KEY},", [KEY, KEY]])
def test_keys_named_as_the_variable(app: flask.Flask, keys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """SEKUIRE_POLICY_PUBLIC_KEYS is a text as in the environment, or a list; empty, it leaves the environment's."""
    monkeypatch.setenv("SEKUIRE_POLICY_PUBLIC_KEYS", "zz")
    app.config["SEKUIRE_POLICY_PUBLIC_KEYS"] = keys
    sdk = Sekuire(app).sdk(app)
    assert sdk.config.trusted_policy_keys == (KEY, KEY)
    sdk.shutdown()
    app.config["SEKUIRE_POLICY_PUBLIC_KEYS"] = ""
    with pytest.raises(ConfigurationError, match="environment variable SEKUIRE_POLICY_PUBLIC_KEYS"):
        app.extensions["sekuire"].extension.sdk(app)


def test_a_blueprint_under_two_names(platform: LocalPlatform, app: flask.Flask) -> None:
    """Its handlers are there once."""
    sekuire = Sekuire(app)
    blueprint = flask.Blueprint("reports", __name__)
    tasks_of(blueprint).task("report")(lambda ctx, input: "a report")
    app.register_blueprint(blueprint, url_prefix="/one")
    app.register_blueprint(blueprint, url_prefix="/two", name="again")
    assert outputs(platform, sekuire.create_worker(app), ("report", None)) == ["a report"]


def in_context() -> None:
    """Begin a process with an application context."""
    flask.Flask("elsewhere").app_context().push()


def name_of_app(ctx: Any, input: Any) -> str:
    return flask.current_app.name


@pytest.mark.slow
def test_handlers_in_other_processes(
    platform: LocalPlatform, app: flask.Flask, caplog: pytest.LogCaptureFixture
) -> None:
    """A warning says that there is no context; an initializer that pushes one fixes it."""
    sekuire = Sekuire(app)
    sekuire.task("name")(name_of_app)
    text = "handlers run in other processes, where they have no application context"
    with ProcessExecutor(1) as executor:
        app.config["SEKUIRE_EXECUTOR"] = RemoteExecutor(executor)
        sekuire.create_worker(app, max_workers=1)
        assert [record.getMessage().startswith(text) for record in caplog.records] == [True]
    caplog.clear()
    with ProcessExecutor(1, initializer=in_context) as executor:
        worker = sekuire.create_worker(app, executor=executor, max_workers=1)
        assert outputs(platform, worker, ("name", None)) == ["elsewhere"]
        pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=in_context)
        sekuire.create_worker(app, executor=pool, max_workers=1)
        pool.shutdown()
    assert text not in caplog.text


# -- the command --

APP = """
import os
import flask
from sekuire.contrib.flask import Sekuire

sekuire = Sekuire()

@sekuire.task("greet")
def greet(ctx, input):
    ctx.report_progress(0.5)
    while input.get("until") and not os.path.exists(input["until"]):
        ctx.wait_cancelled(0.01)
    return f"{flask.current_app.config['GREETING']}, {input['name']}"

def create_app():
    app = flask.Flask(__name__)
    app.config["GREETING"] = "Hello"
    app.config.from_prefixed_env("SHOP")
    sekuire.init_app(app)
    return app
"""


def flask_run(tmp_path: Path, run: Run, *args: str, env: Dict[str, str]) -> Process:
    (tmp_path / "shop.py").write_text(textwrap.dedent(APP), encoding="utf-8")
    return run(*args, env=env, program=("-m", "flask", "--app", "shop:create_app", "sekuire"))


@pytest.fixture
def variables(settings: Dict[str, Any]) -> Dict[str, str]:
    return {name: str(value) for name, value in settings.items() if "INTERVAL" not in name}


@pytest.mark.slow
@POSIX_ONLY
def test_the_command_drains_on_sigterm(
    platform: LocalPlatform,
    tmp_path: Path,
    run: Run,
    variables: Dict[str, str],
) -> None:
    """flask sekuire worker loads the factory, works, shows that it lives, and ends what runs before it ends."""
    port = free_port()
    alive = tmp_path / "alive"
    process = flask_run(
        tmp_path, run, "worker", "--max-workers", "1", "--liveness-file", str(alive), "--http", str(port),
        env={**variables, "SHOP_SEKUIRE_TASK_TIMEOUT": "20.5"},
    )  # fmt: skip
    task_id = platform.submit("greet", {"name": "Ada", "until": "go"}, agent_id=AGENT)
    until(lambda: platform.progress(task_id))
    assert alive.read_text() == f"{process.popen.pid}\n"
    assert ask(("127.0.0.1", port), "/readyz")[0] == 200
    process.signal(signal.SIGTERM)
    (tmp_path / "go").touch()
    code, _, err = process.end()
    assert (code, "Traceback" in err) == (0, False)
    assert platform.task(task_id)["output"] == "Hello, Ada"
    assert not alive.exists()
    (installation,) = platform.installations()
    assert platform.heartbeats(installation["installation_id"])[-1]["status"] == "stopped"


@pytest.mark.slow
@POSIX_ONLY
def test_the_command_with_wrong_settings(tmp_path: Path, run: Run, variables: Dict[str, str]) -> None:
    """One line and exit code 2."""
    for name in ("MAX_WORKERS", "WORKER_HTTP"):
        env = {**variables, f"SHOP_SEKUIRE_{name}": "0" if name == "MAX_WORKERS" else "x"}
        code, out, err = flask_run(tmp_path, run, "worker", env=env).end()
        assert (code, out) == (2, "")
        assert f"flask sekuire worker: error: app.config['SEKUIRE_{name}']: must be" in err
        assert "Traceback" not in err


@pytest.mark.slow
@POSIX_ONLY
def test_the_command_reloads(platform: LocalPlatform, tmp_path: Path, run: Run, variables: Dict[str, str]) -> None:
    """--reload runs the new code after a save."""
    pytest.importorskip("watchfiles")
    process = flask_run(tmp_path, run, "worker", "--reload", env=variables)

    def greeting() -> Any:
        return platform.wait(platform.submit("greet", {"name": "Ada"}, agent_id=AGENT), GUARD)["output"]

    assert greeting() == "Hello, Ada"
    part = tmp_path / "shop.py.part"
    part.write_text(APP.replace('return f"', 'return f"new '), encoding="utf-8")
    part.replace(tmp_path / "shop.py")
    # Until the old one has begun to drain, it may still take a task.
    until(lambda: greeting() == "new Hello, Ada")
    process.signal(signal.SIGTERM)
    assert process.end()[0] == 0


@pytest.mark.slow
@POSIX_ONLY
def test_the_command_reloads_once(platform: LocalPlatform, tmp_path: Path, run: Run, variables: Dict[str, str]) -> None:
    """Where a variable of Flask's asks for it, the child has that too, and is a worker all the same."""
    pytest.importorskip("watchfiles")
    process = flask_run(tmp_path, run, "worker", env={**variables, "FLASK_SEKUIRE_WORKER_RELOAD": "1"})
    done = platform.wait(platform.submit("greet", {"name": "Ada"}, agent_id=AGENT), GUARD)
    assert done["output"] == "Hello, Ada"
    process.signal(signal.SIGTERM)
    assert process.end()[0] == 0


@pytest.mark.slow
@POSIX_ONLY
def test_the_command_does_not_reload_when_idle(tmp_path: Path, run: Run, variables: Dict[str, str]) -> None:
    """The two options contradict each other."""
    code, _, err = flask_run(tmp_path, run, "worker", "--reload", "--stop-when-idle", "1", env=variables).end()
    assert (code, "--stop-when-idle does not go with --reload" in err) == (2, True)


@pytest.mark.slow
@POSIX_ONLY
def test_the_command_reloads_without_the_extra(tmp_path: Path, run: Run, variables: Dict[str, str]) -> None:
    """One line that names it, and no traceback."""
    (tmp_path / "watchfiles.py").write_text("raise ImportError('not here')", encoding="utf-8")
    code, _, err = flask_run(tmp_path, run, "worker", "--reload", env=variables).end()
    assert code == 2
    assert "pip install 'sekuire[reload]'" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("package", "bridge", "extra"),
    [("flask", "flask", "flask"), ("django", "django", "django"), ("opentelemetry", "opentelemetry", "opentelemetry")],
)
def test_without_the_extra(package: str, bridge: str, extra: str) -> None:
    """The import's error names what to install."""
    code = f"import sys; sys.modules[{package!r}] = None; import sekuire.contrib.{bridge}"
    ran = subprocess.run([sys.executable, "-c", code], check=False, timeout=GUARD, capture_output=True, text=True)
    last = ran.stderr.splitlines()[-1]
    assert last.startswith("ModuleNotFoundError: ")
    assert last.endswith(f"pip install 'sekuire[{extra}]'")


def test_nothing_is_imported_by_the_library() -> None:
    """Who does not use Flask does not pay for it."""
    code = "import sekuire, sys; sys.exit('flask' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=GUARD).returncode == 0


# -- submitting -------------------------------------------------------------------------------------------------------


def test_submitting_from_a_view(platform: LocalPlatform, app: flask.Flask) -> None:
    """With the API key of the application that handles the request, over connections that stay open."""
    sekuire = Sekuire(app)
    app.config["SEKUIRE_API_KEY"] = platform.api_key
    other = flask.Flask("other")
    other.config.update({**app.config, "SEKUIRE_AGENT_ID": "other-agent"})
    sekuire.init_app(other)

    def order() -> Any:
        handle = sekuire.submit("confirm", {"order": 7}, trace_id="t-1", **flask.request.args)
        return {"task_id": handle.id, "status": handle.status()}

    for one in (app, other):
        one.add_url_rule("/", view_func=order, methods=["POST"])
    for one, agent_id in ((app, AGENT), (app, AGENT), (other, "other-agent")):
        answer = one.test_client().post("/").json
        task = platform.task(answer["task_id"])
        assert (task["capability"], task["input"], task["agent_id"], task["trace_id"]) == (
            "confirm", {"order": 7}, agent_id, "t-1",
        )  # fmt: skip
        assert answer["status"] == "queued"
    answer = app.test_client().post("/?agent_id=third&idempotency_key=k").json
    assert platform.task(answer["task_id"])["agent_id"] == "third"
    assert app.test_client().post("/?agent_id=third&idempotency_key=k").json == answer


def test_submitting_from_a_handler(platform: LocalPlatform, app: flask.Flask) -> None:
    """Its application context is enough."""
    sekuire = Sekuire(app)
    app.config["SEKUIRE_API_KEY"] = platform.api_key

    @sekuire.task("outer")
    def outer(ctx: Any, input: Any) -> Any:
        return sekuire.submit("inner", input).result(GUARD)

    sekuire.task("inner")(lambda ctx, input: input + 1)
    assert outputs(platform, sekuire.create_worker(app), ("outer", 1)) == [2]


def test_a_submission_that_cannot_be(app: flask.Flask, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is missing is named, with the key of app.config."""
    for name in ("SEKUIRE_API_KEY", "SEKUIRE_AGENT_ID"):
        monkeypatch.delenv(name, raising=False)
    sekuire = Sekuire(app)
    with pytest.raises(ConfigurationError, match=r"^Sekuire.submit: needs an application context"):
        sekuire.submit("confirm")
    with app.app_context():
        with pytest.raises(ConfigurationError, match=r"^app.config\['SEKUIRE_API_KEY'\]: is required to submit tasks"):
            sekuire.submit("confirm")
        app.config["SEKUIRE_API_KEY"] = "sk_live_x"
        with pytest.raises(ConfigurationError, match=r"^app: call init_app\(app\) first"):
            Sekuire().submit("confirm")
        with pytest.raises(ConfigurationError, match=r"unknown field of a task; use delay \(seconds\)"):
            sekuire.submit("confirm", delay_ms=1)
        app.config["SEKUIRE_AGENT_ID"] = None
        with pytest.raises(ConfigurationError, match=r"^app.config\['SEKUIRE_AGENT_ID'\]: is required"):
            sekuire.submit("confirm")


def test_submissions_of_a_test(app: flask.Flask) -> None:
    """Recorded, and run by the application's own worker, in its context."""
    sekuire = Sekuire(app)
    app.config["SEKUIRE_API_KEY"] = "sk_live_x"
    sekuire.task("greet")(lambda ctx, input: f"{flask.current_app.name} greets {input}")
    with submitted(run=sekuire.create_worker(app)) as tasks, app.app_context():
        assert sekuire.submit("greet", "Ada").result() == "shop greets Ada"
    assert [(task.capability, task.agent_id) for task in tasks] == [("greet", AGENT)]
