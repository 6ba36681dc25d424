"""Django: what is around a handler, tasks on commit, checks and settings, with the real framework."""

from __future__ import annotations

import atexit
import contextlib
import contextvars
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import urllib.request
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Tuple

import pytest

from sekuire import ProcessExecutor, testing
from sekuire.errors import ConfigurationError, SekuireError, TaskFailed, TransportError
from sekuire.local import LocalPlatform

from ..cli.conftest import POSIX_ONLY, Run
from ..conftest import AGENT
from ..health.asking import ask, free_port
from ..support.builders import context_of
from ..support.waiting import GUARD, until

django = pytest.importorskip("django")

from django.conf import settings  # noqa: E402

if not settings.configured:
    # A file, because a database in memory is never closed, and settings are made once for the process.
    DIRECTORY = tempfile.mkdtemp(prefix="sekuire-django-")
    atexit.register(shutil.rmtree, DIRECTORY, ignore_errors=True)
    settings.configure(
        DATABASES={
            "default": {
                "ENGINE": "django.db.backends.sqlite3",
                "NAME": f"{DIRECTORY}/notes.db",
                "OPTIONS": {"timeout": 20},
            }
        },
        INSTALLED_APPS=["tests.contrib.djangoapp", "sekuire.contrib.django"],
        DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
        LANGUAGE_CODE="de",
        TIME_ZONE="Europe/Berlin",
        USE_TZ=True,
        SECRET_KEY="for tests",
        DEBUG=True,
    )
    django.setup()

from django.core.management import CommandError, call_command  # noqa: E402
from django.db import DatabaseError, connection, connections, transaction  # noqa: E402
from django.db.backends.signals import connection_created  # noqa: E402
from django.test import override_settings  # noqa: E402

from sekuire.contrib.django import checks, conf, handlers, submit_on_commit  # noqa: E402

from .djangoapp.models import Note  # noqa: E402


@pytest.fixture(autouse=True)
def database() -> Iterator[None]:
    """The table, and no connection that stays."""
    with connection.schema_editor() as editor:
        editor.create_model(Note)
    yield
    with connection.schema_editor() as editor:
        editor.delete_model(Note)
    connections.close_all()


@pytest.fixture
def configured(platform: LocalPlatform) -> Iterator[None]:
    values = {
        "API_URL": platform.url,
        "AGENT_ID": AGENT,
        "INSTALL_TOKEN": platform.create_install_token(AGENT),
        "API_KEY": platform.api_key,
        "HEARTBEAT_INTERVAL": 0.2,
    }
    with override_settings(SEKUIRE=values):
        yield


def submitted(platform: LocalPlatform) -> List[Dict[str, Any]]:
    """All tasks, as the platform lists them."""
    request = urllib.request.Request(f"{platform.url}/api/v1/tasks", headers={"X-API-Key": platform.api_key})
    with urllib.request.urlopen(request, timeout=GUARD) as answer:
        found: List[Dict[str, Any]] = json.load(answer)["tasks"]
    # A list has no inputs.
    return [platform.task(task["task_id"]) for task in found]


def results(platform: LocalPlatform, *capabilities: str) -> List[Any]:
    """What a worker with one thread makes of the tasks, one after the other."""
    found = []
    with warnings.catch_warnings():
        # A thread's persistent connection ends with the thread, as everywhere in Django; Python 3.13 warns of that.
        warnings.simplefilter("ignore", ResourceWarning)
        with conf.read().sdk() as sdk, conf.make_worker(sdk, max_workers=1):
            for name in capabilities:
                found.append(platform.wait(platform.submit(name, None, agent_id=AGENT), timeout=GUARD))
        gc.collect()
    return [one["output"] if one["status"] == "completed" else one["error"] for one in found]


@pytest.mark.usefixtures("configured")
class TestAround:
    def test_a_task_begins_as_a_request_does(self, platform: LocalPlatform) -> None:
        """Nothing of the task before is there: connection, queries, language, time zone."""
        first, second = results(platform, "look", "look")
        for one in (first, second):
            assert (one["was_open"], one["queries"]) == (False, 0)
            assert (one["language"], one["zone"]) == ("de", "Europe/Berlin")

    def test_persistent_connections_stay(self, platform: LocalPlatform, monkeypatch: pytest.MonkeyPatch) -> None:
        """With CONN_MAX_AGE a thread's next task finds the connection open."""
        monkeypatch.setitem(settings.DATABASES["default"], "CONN_MAX_AGE", None)
        monkeypatch.setitem(connections.settings["default"], "CONN_MAX_AGE", None)
        first, second = results(platform, "look", "look")
        assert (first["was_open"], second["was_open"]) == (False, True)
        assert first["connection"] == second["connection"]
        assert second["queries"] == 0

    def test_an_open_transaction_is_rolled_back(self, platform: LocalPlatform, monkeypatch: pytest.MonkeyPatch) -> None:
        """What a handler left uncommitted is gone with its connection; the next task has a clean one."""
        monkeypatch.setitem(connections.settings["default"], "CONN_MAX_AGE", None)
        _, second = results(platform, "spoil", "look")
        assert (second["was_open"], second["count"]) == (False, 0)

    def test_an_async_handler(self, platform: LocalPlatform) -> None:
        """Its coroutine and its database thread begin as a request does too."""
        first, second = results(platform, "async", "async")
        assert first == second == {"found": [False, "de", "Europe/Berlin"], "language": first["language"], "count": 0}


@pytest.fixture
def opened() -> Iterator[List[Tuple[Any, Any]]]:
    """Every connection that was opened, each as Django's wrapper and the driver's object."""
    found: List[Tuple[Any, Any]] = []

    def note(*, connection: Any, **kwargs: Any) -> None:
        found.append((connection, connection.connection))

    connection_created.connect(note)
    yield found
    connection_created.disconnect(note)


@pytest.mark.usefixtures("configured")
class TestAsync:
    """Database work of async handlers, which asgiref runs in other threads than the handlers'."""

    def test_an_open_transaction_ends_with_its_task(self, platform: LocalPlatform) -> None:
        """It is rolled back, and the writes of later tasks are not in it."""
        found = results(platform, "async-spoil", "async-write", "async-write")
        assert found[0] is None
        assert [note.text for note in Note.objects.all()] == ["kept", "kept"]

    def test_a_broken_connection_costs_one_task(self, platform: LocalPlatform) -> None:
        """The next task has a connection of its own."""
        assert results(platform, "async-cut", "async-write", "async-write") == [None, 1, 2]

    def test_handlers_do_not_wait_for_each_other(self, platform: LocalPlatform) -> None:
        """Two handlers are in the database at once, on two connections."""
        with conf.read().sdk() as sdk, conf.make_worker(sdk, max_workers=2):
            ids = [platform.submit("async-meet", None, agent_id=AGENT) for _ in range(2)]
            first, second = (platform.wait(task_id, timeout=2 * GUARD) for task_id in ids)
        assert (first["status"], second["status"]) == ("completed", "completed"), (first, second)
        assert first["output"] != second["output"]

    @pytest.mark.parametrize("name", ["async-write", "async-spoil", "async-elsewhere", "plain-with-loop"])
    def test_no_connection_is_left(self, platform: LocalPlatform, opened: List[Tuple[Any, Any]], name: str) -> None:
        """Each connection is closed at the end of its task: of asgiref's thread, of another one, of a late task."""
        found = results(platform, name)[0]
        assert not isinstance(found, dict), found
        assert opened
        assert [wrapper.connection for wrapper, _ in opened] == [None] * len(opened)

    def test_a_connection_of_a_thread_that_others_use_stays(self, platform: LocalPlatform) -> None:
        """A pool of the project's own may be working for another task."""
        with ThreadPoolExecutor(1) as pool:
            made: List[Any] = []

            def around(input: Any) -> None:
                context = contextvars.copy_context()
                made.append(pool.submit(context.run, lambda: (Note.objects.count(), connection)[1].connection).result())

            handlers.around(context_of(), None, around)
            assert pool.submit(lambda: connection.connection).result(GUARD) is made[0]
            pool.submit(connections.close_all).result(GUARD)

    def test_a_connection_that_cannot_be_closed(
        self, platform: LocalPlatform, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The task has its result all the same; the log names the database and no more."""
        wrapper_class = type(connections["default"])
        real = wrapper_class._close

        def fail(wrapper: Any) -> None:
            real(wrapper)
            if threading.current_thread().name.startswith("sekuire-task"):
                raise DatabaseError("password=canary")

        monkeypatch.setattr(wrapper_class, "_close", fail)
        assert results(platform, "async-write") == [1]
        assert "cannot close a connection to the database 'default' (DatabaseError)" in caplog.text
        assert "canary" not in caplog.text


@pytest.mark.usefixtures("configured")
class TestSubmitOnCommit:
    def test_waits_for_the_commit(self, platform: LocalPlatform) -> None:
        """The task is not there before the commit, and has the input of the call, not of later."""
        input = {"note": 1}
        with transaction.atomic():
            Note.objects.create(text="kept")
            submit_on_commit("look", input, trace_id="trace-1", timeout=5.0, max_attempts=2)
            input["note"] = 2
            assert submitted(platform) == []
        (task,) = submitted(platform)
        assert (task["capability"], task["agent_id"], task["input"]) == ("look", AGENT, {"note": 1})
        assert (task["trace_id"], task["timeout_ms"]) == ("trace-1", 5000)

    def test_a_rollback_submits_nothing(self, platform: LocalPlatform) -> None:
        """Neither of a whole transaction nor of a savepoint."""
        with pytest.raises(ValueError, match="on purpose"):
            with transaction.atomic():
                submit_on_commit("look", None)
                raise ValueError("on purpose")
        with transaction.atomic():
            with pytest.raises(ValueError, match="on purpose"):
                with transaction.atomic():
                    submit_on_commit("look", None)
                    raise ValueError("on purpose")
        assert submitted(platform) == []

    def test_without_a_transaction(self, platform: LocalPlatform) -> None:
        """It goes out at once."""
        submit_on_commit("look", [1], agent_id="another-agent")
        assert [task["agent_id"] for task in submitted(platform)] == ["another-agent"]

    @pytest.mark.parametrize(
        ("arguments", "text"),
        [
            (("a,b", None), "cannot name a capability"),
            (("look", {1, 2}), "the task cannot be written as JSON: TypeError"),
            (("look", float("nan")), "the task cannot be written as JSON: ValueError"),
        ],
    )
    def test_a_wrong_task(self, arguments: Any, text: str) -> None:
        """It is reported at the call: after the commit it would be too late."""
        with transaction.atomic():
            with pytest.raises(ConfigurationError, match=text):
                submit_on_commit(*arguments)
        with pytest.raises(ConfigurationError, match="unknown field of a task; known are capability"):
            submit_on_commit("look", None, priority=1)

    @pytest.mark.parametrize(
        ("field", "value", "text"),
        [
            ("timeout", "60s", "must be a number of seconds above 0, got '60s'"),
            ("timeout", 0, "must be a number of seconds above 0, got 0"),
            ("timeout", float("inf"), "must be a number of seconds above 0, got inf"),
            ("timeout", True, "must be a number of seconds above 0, got True"),
            ("max_attempts", 0, "must be a whole number, 1 or more, got 0"),
            ("max_attempts", 1.0, "must be a whole number, 1 or more, got 1.0"),
            ("trace_id", 7, "must be a non-empty str"),
            ("workspace_id", "", "must be a non-empty str"),
            ("agent_id", 7, "must be a non-empty str"),
        ],
    )
    def test_a_wrong_field(self, platform: LocalPlatform, field: str, value: Any, text: str) -> None:
        """It is reported at the call too, so that the transaction can be rolled back."""
        with transaction.atomic():
            with pytest.raises(ConfigurationError, match=f"^{field}: {text}"):
                submit_on_commit("look", None, robust=True, **{field: value})
        assert submitted(platform) == []

    def test_a_field_that_is_none(self, platform: LocalPlatform) -> None:
        """It counts as not given."""
        submit_on_commit("look", None, trace_id=None, timeout=None, max_attempts=None, workspace_id=None)
        (task,) = submitted(platform)
        assert task.get("trace_id") is None

    def test_the_handle(self, platform: LocalPlatform) -> None:
        """Its key is known before the commit, its id after it."""
        with transaction.atomic():
            handle = submit_on_commit("look", 1)
            key = handle.idempotency_key
            for use in (lambda: handle.id, handle.status, handle.result, handle.cancel, lambda: handle.wait(0)):
                with pytest.raises(SekuireError, match=f"the task with the key {key} is not submitted before its"):
                    use()
            assert repr(handle) == f"<OnCommitHandle without a task, key {key}>"
        (task,) = submitted(platform)
        assert (handle.id, handle.status()) == (task["task_id"], "queued")
        assert handle.id in repr(handle)
        again = submit_on_commit("look", 1, idempotency_key=key)
        assert again.id == handle.id
        handle.cancel()
        with pytest.raises(TaskFailed, match="cancelled"):
            handle.result(GUARD)

    def test_the_handle_after_a_rollback(self, platform: LocalPlatform) -> None:
        """It says so, of a whole transaction and of a savepoint."""
        with transaction.atomic():
            kept = submit_on_commit("look", "kept")
            with pytest.raises(ValueError, match="on purpose"):
                with transaction.atomic():
                    lost = submit_on_commit("look", "lost")
                    raise ValueError("on purpose")
            with pytest.raises(SekuireError, match="was not submitted: its transaction was rolled back"):
                lost.wait(0)
        assert kept.status() == "queued"
        with pytest.raises(ValueError, match="on purpose"):
            with transaction.atomic():
                lost = submit_on_commit("look", "lost")
                raise ValueError("on purpose")
        with pytest.raises(SekuireError, match="its transaction was rolled back"):
            print(lost.id)

    def test_the_handle_after_a_failure(self, platform: LocalPlatform) -> None:
        """It says why nothing was submitted; the same key can be used again."""
        with platform.faults.error(400, on="tasks"):
            with transaction.atomic():
                handle = submit_on_commit("look", None, robust=True)
        with pytest.raises(SekuireError, match="was not submitted after the commit: HTTP 400"):
            handle.status()
        assert submit_on_commit("look", None, idempotency_key=handle.idempotency_key).status() == "queued"

    def test_recorded_for_a_test(self) -> None:
        """A rollback records nothing; a commit does, and runs the task if there is a handler."""
        with testing.submitted(run={"look": lambda ctx, input: input + 1}) as tasks:
            with transaction.atomic():
                handle = submit_on_commit("look", 1, delay=5.0)
                assert tasks == []
            assert (handle.result(), tasks[0].delay, tasks[0].agent_id) == (2, 5.0, AGENT)
            with pytest.raises(ValueError, match="on purpose"):
                with transaction.atomic():
                    submit_on_commit("look", 1)
                    raise ValueError("on purpose")
        assert len(tasks) == 1

    def test_a_platform_that_is_not_there(self, platform: LocalPlatform) -> None:
        """The data is committed, and the error says that nothing was submitted; robust=True logs it."""
        with override_settings(SEKUIRE={**settings.SEKUIRE, "API_URL": "http://127.0.0.1:9"}):
            with pytest.raises(TransportError, match="nothing was submitted"):
                with transaction.atomic():
                    Note.objects.create(text="kept")
                    submit_on_commit("look", None)
            with transaction.atomic():
                submit_on_commit("look", None, robust=True)
        assert Note.objects.count() == 1

    @pytest.mark.parametrize(
        ("key", "text"),
        [
            ("API_KEY", r"settings.SEKUIRE\['API_KEY'\]: is required to submit tasks; set SEKUIRE_API_KEY"),
            ("AGENT_ID", r"settings.SEKUIRE\['AGENT_ID'\]: is required; set SEKUIRE_AGENT_ID"),
        ],
    )
    def test_a_missing_setting(self, key: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """The error names it."""
        monkeypatch.delenv(f"SEKUIRE_{key}", raising=False)
        with override_settings(SEKUIRE={**settings.SEKUIRE, key: None}):
            with pytest.raises(ConfigurationError, match=text):
                submit_on_commit("look", None)


class TestChecks:
    def ids(self, check: Callable[..., Any]) -> List[str]:
        return [message.id for message in check(None)]

    def test_nothing_is_wrong(self, tmp_path: Path) -> None:
        """Credentials may be missing: a web process needs none."""
        with override_settings(SEKUIRE={"AGENT_ID": AGENT, "CREDENTIALS_FILE": tmp_path / "c.json"}):
            assert self.ids(checks.check_settings) == []
        assert self.ids(checks.check_handlers) == []
        call_command("check", verbosity=0)

    @pytest.mark.parametrize(
        ("values", "text"),
        [
            ([], "settings.SEKUIRE: must be a dict"),
            ({"AGENTID": "a"}, "settings.SEKUIRE['AGENTID']: unknown setting; did you mean"),
            ({"MAX_WORKERS": 0}, "settings.SEKUIRE['MAX_WORKERS']: must be"),
            ({"API_URL": "api.sekuire.ai"}, "settings.SEKUIRE['API_URL']: must begin with https://"),
            ({"API_KEY": "sk_live canary"}, "settings.SEKUIRE['API_KEY']: holds whitespace"),
            ({"CREDENTIALS_FILE": "/nowhere/c.json"}, "settings.SEKUIRE['CREDENTIALS_FILE']: the directory '/nowhere'"),
            ({"OUTBOX": "/nowhere/o.db"}, "settings.SEKUIRE['OUTBOX']: the directory '/nowhere' does not exist"),
            ({"OUTBOX": os.getcwd()}, f"settings.SEKUIRE['OUTBOX']: {os.path.realpath(os.getcwd())!r} is a directory"),
            ({"POLICY_PATH": "/nowhere/p", "CREDENTIALS_FILE": "c.json"}, "settings.SEKUIRE['POLICY_PATH']: the direc"),
            ({"POLICY_OPTIONS": {"x": 1}}, "settings.SEKUIRE['POLICY_OPTIONS']: has no 'x'; known are warn_only"),
            ({"POLICY_OPTIONS": {"environment": "x"}}, "settings.SEKUIRE['POLICY_OPTIONS']: has no 'environment'"),
            ({"POLICY_OPTIONS": {"on_change": 3}}, "settings.SEKUIRE['POLICY_OPTIONS']: on_change must be"),
            ({"TRUSTED_POLICY_KEYS": ["zz"]}, "settings.SEKUIRE['TRUSTED_POLICY_KEYS']: an Ed25519 public key is 32"),
            ({"POLICY_PUBLIC_KEYS": "zz,yy"}, "settings.SEKUIRE['POLICY_PUBLIC_KEYS']: an Ed25519 public key is 32"),
        ],
    )
    def test_wrong_settings(self, values: Any, text: str) -> None:
        """manage.py check names the setting and quotes no key."""
        with override_settings(SEKUIRE=values):
            (message,) = checks.check_settings(None)
            with pytest.raises(Exception, match=r"sekuire\.E001"):
                call_command("check", verbosity=0)
        assert (message.id, "canary" in message.msg) == ("sekuire.E001", False)
        assert message.msg.startswith(text)

    @pytest.mark.parametrize(
        ("name", "value"), [("API_URL", "api.sekuire.ai"), ("OUTBOX", "/nowhere/o"), ("POLICY_PUBLIC_KEYS", "zz")]
    )
    def test_a_wrong_variable(self, name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """A wrong value from the environment is reported with its variable."""
        monkeypatch.setenv(f"SEKUIRE_{name}", value)
        (message,) = checks.check_settings(None)
        assert f"environment variable SEKUIRE_{name}" in message.msg

    def test_the_policy_without_its_extra(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A web process does not need the extra, and cannot check a key without it."""
        monkeypatch.setattr("sekuire.policy.client.missing_packages", lambda: ("blake3",))
        with override_settings(SEKUIRE={"POLICY_PUBLIC_KEYS": "zz"}):
            assert self.ids(checks.check_settings) == []

    def test_handlers_in_other_processes(self, caplog: pytest.LogCaptureFixture) -> None:
        """A warning, until something sets Django up there."""
        with ProcessExecutor(1) as executor, override_settings(SEKUIRE={"EXECUTOR": executor}):
            (message,) = checks.check_settings(None)
            assert (message.id, "initializer=django.setup" in message.hint) == ("sekuire.W002", True)
        with ProcessExecutor(1, initializer=django.setup) as executor:
            with override_settings(SEKUIRE={"EXECUTOR": executor}):
                assert self.ids(checks.check_settings) == []

    def test_a_worker_with_other_processes(
        self, configured: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The worker's log says it too, for those who skip the checks."""
        monkeypatch.setattr(handlers.tasks, "_frozen", None)
        with ProcessExecutor(1) as executor, conf.read().sdk() as sdk:
            conf.make_worker(sdk, executor=executor, max_workers=1)
        assert "handlers run in other processes, where Django is not set up" in caplog.text

    @pytest.mark.parametrize(
        ("code", "id", "text", "place"),
        [
            (
                "@task\ndef f(ctx, input): ...",
                "sekuire.E002",
                "needs the capability's name first",
                "sekuire_tasks.py:2",
            ),
            ("@task('x')\ndef f(ctx): ...", "sekuire.E002", "must accept two arguments", "sekuire_tasks.py:2"),
            ("\n@task('look')\ndef f(ctx, input): ...", "sekuire.E002", "is taken by look", "sekuire_tasks.py:3"),
            ("import no_such_module", "sekuire.E003", "ModuleNotFoundError", "sekuire_tasks.py:2"),
            ("import json\njson.loads('x')", "sekuire.E003", "JSONDecodeError", "sekuire_tasks.py:3"),
            ("from wrongapp import helper", "sekuire.E003", "ZeroDivisionError", "helper.py:3"),
            ("def f(:", "sekuire.E003", "SyntaxError", "sekuire_tasks.py:2"),
            ("raise SystemExit(3)", "sekuire.E003", "ended with sys.exit(3) when it was", "sekuire_tasks.py:2"),
        ],
    )
    def test_wrong_handlers(
        self, code: str, id: str, text: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A module that cannot be used, or not be imported, is an error that says whose it is, why, and where."""
        with self.wrong_app(tmp_path, monkeypatch, code):
            (message,) = checks.check_handlers(None)
        assert (message.id, text in message.msg) == (id, True), message
        assert message.msg.startswith("wrongapp.sekuire_tasks")
        name, _, line = place.partition(":")
        # A decorator's call stands in the line of its function before Python 3.10.
        lines = [int(line)] + ([int(line) + 1] if "@task" in code and sys.version_info < (3, 10) else [])
        assert message.msg.endswith(tuple(f" ({tmp_path / 'wrongapp' / name}:{one})" for one in lines))

    def test_every_app_is_told(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """One check finds the mistakes of all apps; what an installed package raises has a place in it."""
        monkeypatch.setattr(checks, "_NOT_THEIRS", (*checks._NOT_THEIRS, str(tmp_path)))
        with self.wrong_app(tmp_path, monkeypatch, "1 / 0", "wrongapp", "wrongapp2"):
            one, two = checks.check_handlers(None)
        assert one.msg.endswith(f"{tmp_path / 'wrongapp' / 'sekuire_tasks.py'}:2)")
        assert two.msg.endswith(f"{tmp_path / 'wrongapp2' / 'sekuire_tasks.py'}:2)")

    def test_an_exit_does_not_end_the_worker(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without the check, too, it is an error, and not an end without a word."""
        with self.wrong_app(tmp_path, monkeypatch, "import sys\nsys.exit()"):
            with pytest.raises(ConfigurationError, match=r"^wrongapp.sekuire_tasks: ended with sys.exit\(\)"):
                handlers.discover()

    @contextlib.contextmanager
    def wrong_app(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, *names: str) -> Iterator[None]:
        """Apps with ``code`` among the installed ones."""
        names = names or ("wrongapp",)
        for name in names:
            app = tmp_path / name
            app.mkdir()
            (app / "__init__.py").touch()
            (app / "helper.py").write_text("def fail():\n    pass\nfail.x = 1 / 0\n")
            (app / "sekuire_tasks.py").write_text(f"from sekuire.contrib.django import task\n{code}\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        # A worker of another test may have taken the handlers.
        monkeypatch.setattr(handlers.tasks, "_frozen", None)
        try:
            with override_settings(INSTALLED_APPS=[*settings.INSTALLED_APPS, *names]):
                yield
        finally:
            for name in [name for name in sys.modules if name.startswith("wrongapp")]:
                del sys.modules[name]

    def test_no_handler(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """An app that is installed for nothing is a warning."""
        monkeypatch.setattr(handlers, "tasks", type(handlers.tasks)())
        assert self.ids(checks.check_handlers) == ["sekuire.W001"]

    def test_deploy(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """check --deploy warns about options that are for development only."""
        monkeypatch.delenv("SEKUIRE_CREDENTIALS_FILE", raising=False)
        values = {"VERIFY": False, "ALLOW_INSECURE_HTTP": True, "INSTALL_TOKEN": "skt_x", "ENVIRONMENT": "staging"}
        with override_settings(SEKUIRE=values):
            assert self.ids(checks.check_security) == ["sekuire.W010", "sekuire.W011", "sekuire.W012", "sekuire.W013"]
        with override_settings(SEKUIRE={"INSTALL_TOKEN": "skt_x", "CREDENTIALS_FILE": "c.json"}):
            assert self.ids(checks.check_security) == []
        with override_settings(SEKUIRE={"WRONG": 1}):
            assert self.ids(checks.check_security) == []


class TestCommand:
    @pytest.fixture
    def project(self, tmp_path: Path) -> Path:
        """A project whose handler ends when a file is there."""
        (tmp_path / "site_settings.py").write_text(
            'INSTALLED_APPS = ["work", "sekuire.contrib.django"]\nSECRET_KEY = "x"\nSEKUIRE = {"MAX_WORKERS": 1}\n'
        )
        (tmp_path / "work").mkdir()
        (tmp_path / "work" / "__init__.py").touch()
        (tmp_path / "work" / "sekuire_tasks.py").write_text(
            textwrap.dedent("""
                import os
                from sekuire.contrib.django import task

                @task("slow")
                def slow(ctx, input):
                    ctx.report_progress(0.5)
                    while not os.path.exists("go"):
                        ctx.wait_cancelled(0.01)
                    return "done"
            """)
        )
        return tmp_path

    @pytest.fixture
    def variables(self, platform: LocalPlatform) -> Dict[str, str]:
        return {
            "DJANGO_SETTINGS_MODULE": "site_settings",
            "PYTHONPATH": ".",
            "SEKUIRE_API_URL": platform.url,
            "SEKUIRE_AGENT_ID": AGENT,
            "SEKUIRE_INSTALL_TOKEN": platform.create_install_token(AGENT),
        }

    @pytest.mark.slow
    @POSIX_ONLY
    def test_drains_on_sigterm(
        self, platform: LocalPlatform, project: Path, run: Run, variables: Dict[str, str]
    ) -> None:
        """The running task ends and is reported, the last heartbeat is sent, the exit code is 0."""
        port = free_port()
        process = run(
            "run_sekuire_worker", "--liveness-file", "alive", "--http", str(port), env=variables,
            program=("-m", "django"),
        )  # fmt: skip
        task_id = platform.submit("slow", None, agent_id=AGENT)
        until(lambda: platform.progress(task_id))
        assert (project / "alive").exists()
        assert ask(("127.0.0.1", port), "/readyz")[0] == 200
        process.signal(signal.SIGTERM)
        (project / "go").touch()
        code, _, err = process.end()
        assert (code, "Traceback" in err) == (0, False)
        assert platform.task(task_id)["output"] == "done"
        assert not (project / "alive").exists()

    @pytest.mark.slow
    @POSIX_ONLY
    def test_ends_when_idle(self, platform: LocalPlatform, project: Path, run: Run, variables: Dict[str, str]) -> None:
        """A drain that cron starts."""
        (project / "go").touch()
        task_id = platform.submit("slow", None, agent_id=AGENT)
        process = run("run_sekuire_worker", "--stop-when-idle", "0.3", env=variables, program=("-m", "django"))
        assert process.end()[0] == 0
        assert platform.task(task_id)["output"] == "done"

    @pytest.mark.slow
    @POSIX_ONLY
    def test_loggers_that_the_settings_disabled(
        self, platform: LocalPlatform, project: Path, run: Run, variables: Dict[str, str]
    ) -> None:
        """LOGGING disables the loggers of what the settings import; the worker's log lines are there all the same."""
        logging = {
            "version": 1,
            "formatters": {"f": {"format": "%(name)s: %(message)s"}},
            "handlers": {"o": {"class": "logging.StreamHandler", "formatter": "f"}},
            "root": {"level": "INFO", "handlers": ["o"]},
        }
        with (project / "site_settings.py").open("a") as file:
            file.write(f"from sekuire import ProcessExecutor, SekuireSDK, Worker\nLOGGING = {logging!r}\n")
        (project / "go").touch()
        platform.submit("slow", None, agent_id=AGENT)
        process = run("run_sekuire_worker", "--stop-when-idle", "0.3", env=variables, program=("-m", "django"))
        code, _, err = process.end()
        assert code == 0
        assert "sekuire.worker were disabled" in err
        assert "sekuire.worker: the worker has stopped" in err

    @pytest.mark.slow
    @POSIX_ONLY
    def test_refused_credentials(self, project: Path, run: Run, variables: Dict[str, str]) -> None:
        """A clear line, exit code 1, no traceback."""
        process = run(
            "run_sekuire_worker", env={**variables, "SEKUIRE_INSTALL_TOKEN": "skt_wrong"}, program=("-m", "django")
        )
        code, _, err = process.end()
        assert (code, "Traceback" in err) == (1, False)
        assert "CommandError: " in err

    def test_nobody_configured(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What is missing is named, with exit code 2."""
        monkeypatch.delenv("SEKUIRE_AGENT_ID", raising=False)
        text = r"^settings.SEKUIRE\['AGENT_ID'\]: is required; set SEKUIRE_AGENT_ID"
        with pytest.raises(CommandError, match=text) as caught:
            call_command("run_sekuire_worker")
        assert caught.value.returncode == 2

    @pytest.mark.slow
    @POSIX_ONLY
    @pytest.mark.parametrize(
        "program", [("manage.py", "run_sekuire_worker", "--reload"), ("-m", "django", "run_sekuire_worker", "--reload"),
                    ("inside.py",)]
    )  # fmt: skip
    def test_reloads(
        self, program: Tuple[str, ...], platform: LocalPlatform, project: Path, run: Run, variables: Dict[str, str]
    ) -> None:
        """However it was started, a save restarts it with the same options."""
        pytest.importorskip("watchfiles")
        (project / "go").touch()
        (project / "manage.py").write_text(
            "import sys\nfrom django.core.management import execute_from_command_line as run\nrun(sys.argv)\n"
        )
        (project / "inside.py").write_text(
            "import django\nfrom django.core.management import call_command\ndjango.setup()\n"
            "call_command('run_sekuire_worker', reload=True, liveness_file='alive', max_workers=1, http='0')\n"
        )
        options = () if program == ("inside.py",) else ("--liveness-file", "alive", "--max-workers", "1", "--http", "0")
        # Python puts the directory of a script on the path, and `-m` the current one.
        variables = {name: value for name, value in variables.items() if name != "PYTHONPATH"}
        process = run(*options, env={**variables, "PYTHONDONTWRITEBYTECODE": "1"}, program=program)

        def answer() -> Any:
            return platform.wait(platform.submit("slow", None, agent_id=AGENT), timeout=GUARD)["output"]

        assert answer() == "done"
        assert int((project / "alive").read_text()) != process.popen.pid
        module = project / "work" / "sekuire_tasks.py"
        part = project / "part"
        part.write_text(module.read_text().replace('"done"', '"new"'))
        part.replace(module)
        until(lambda: answer() == "new")
        process.signal(signal.SIGTERM)
        assert process.end()[0] == 0

    @pytest.mark.parametrize("argument", ["--rel", "--max=1"])
    def test_abbreviations(self, argument: str) -> None:
        """They are refused: the process that reloads would not know its own option again."""
        with pytest.raises(CommandError, match="unrecognized arguments: --"):
            call_command("run_sekuire_worker", argument)

    def test_what_does_not_go_with_a_reload(self) -> None:
        """An end when idle, and settings that another process could not find."""
        with pytest.raises(CommandError, match="--stop-when-idle does not go with --reload"):
            call_command("run_sekuire_worker", reload=True, stop_when_idle=1.0)
        with pytest.raises(CommandError, match="needs settings that are a module"):
            call_command("run_sekuire_worker", reload=True)

    @pytest.mark.parametrize("arguments", [["--max-workers", "0"], ["--stop-when-idle", "never"], ["--http", "x"]])
    def test_wrong_arguments(self, arguments: List[str]) -> None:
        """They are refused before anything starts."""
        with pytest.raises(CommandError, match="must be"):
            call_command("run_sekuire_worker", *arguments)


def test_nothing_is_imported_by_the_library() -> None:
    """Who does not use Django does not pay for it."""
    code = "import sekuire, sys; sys.exit('django' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=GUARD).returncode == 0


def test_results_that_hold_models() -> None:
    """A model or a query set is not a result; the error says what to return in its place."""
    from sekuire import TaskRegistry
    from sekuire.testing import run_task

    tasks = TaskRegistry()
    Note.objects.create(text="secret")

    @tasks.task("one")
    def one(ctx: Any, input: Any) -> Any:
        return {"note": Note.objects.first()}

    @tasks.task("all")
    def every(ctx: Any, input: Any) -> Any:
        return {"notes": Note.objects.all()}

    @tasks.task("values")
    def values(ctx: Any, input: Any) -> Any:
        return list(Note.objects.values("text"))

    messages = []
    for name in ("one", "all"):
        error = run_task(tasks, name).error
        assert error is not None
        assert error.code == "result_not_serializable"
        messages.append(error.message)
    assert messages[0].endswith(
        "one: output.note is a Note; return django.forms.models.model_to_dict(value), or a dict of the fields you want"
    )
    assert messages[1].endswith(
        "all: output.notes is a QuerySet; return list(value.values(...)) with the fields you want"
    )
    assert run_task(tasks, "values").value == [{"text": "secret"}]
