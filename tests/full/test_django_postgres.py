"""Django's connections to PostgreSQL: kept, replaced when they broke, and shared by a pool."""

from __future__ import annotations

import os
import pathlib
import shutil
import sys
import tempfile
import textwrap
from typing import Any, Dict, Iterator, List, Optional

import pytest

from sekuire.local import LocalPlatform

from ..cli.conftest import Run
from ..cli.conftest import run as run
from ..conftest import AGENT
from ..support.waiting import GUARD, until
from .postgres import postgres

pytestmark = pytest.mark.full

TASKS = """
import asyncio
from asgiref.sync import sync_to_async
from django.db import connection, transaction
from sekuire.contrib.django import task

@task("backend")
def backend(ctx, input):
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid() FROM pg_sleep(0.02)")
        return cursor.fetchone()[0]

@task("kill")
def kill(ctx, input):
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_terminate_backend(%s)", [input])

@task("backends")
def backends(ctx, input):
    with connection.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'")
        return cursor.fetchone()[0]

@task("async_backend")
async def async_backend(ctx, input):
    first, second = await asyncio.gather(sync_to_async(backend)(ctx, input), sync_to_async(backend)(ctx, input))
    assert first == second
    return first

@task("async_kill")
async def async_kill(ctx, input):
    own = await sync_to_async(backend)(ctx, None)
    await sync_to_async(kill)(ctx, own)

@task("async_transaction")
async def async_transaction(ctx, input):
    await sync_to_async(transaction.set_autocommit)(False)
    return await sync_to_async(backend)(ctx, input)

@task("async_thread")
async def async_thread(ctx, input):
    return await asyncio.to_thread(backend, ctx, input)
"""

ASYNC = ["async_backend", "async_transaction", "async_thread"]


@pytest.fixture(scope="module")
def server() -> Iterator[Dict[str, Any]]:
    # A short path: that of a socket may have 107 characters.
    directory = pathlib.Path(tempfile.mkdtemp(prefix="pg-"))
    try:
        with postgres(directory) as found:
            yield found
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def worker(server: Dict[str, Any], platform: LocalPlatform, tmp_path: pathlib.Path, run: Run) -> Any:
    """Start a project's worker whose database has further options."""
    pytest.importorskip("psycopg")

    def start(*arguments: str, **options: Any) -> Any:
        database = {"ENGINE": "django.db.backends.postgresql", **server, **options}
        (tmp_path / "site_settings.py").write_text(
            f'INSTALLED_APPS = ["work", "sekuire.contrib.django"]\nSECRET_KEY = "x"\n'
            f"DATABASES = {{'default': {database!r}}}\n"
        )
        (tmp_path / "work").mkdir()
        (tmp_path / "work" / "__init__.py").touch()
        (tmp_path / "work" / "sekuire_tasks.py").write_text(textwrap.dedent(TASKS))
        variables = {
            "DJANGO_SETTINGS_MODULE": "site_settings",
            "PYTHONPATH": os.pathsep.join([".", *sys.path[1:]]),
            "SEKUIRE_API_URL": platform.url,
            "SEKUIRE_AGENT_ID": AGENT,
            "SEKUIRE_INSTALL_TOKEN": platform.create_install_token(AGENT),
        }
        return run("run_sekuire_worker", *arguments, env=variables, program=("-m", "django"))

    return start


def ask(platform: LocalPlatform, capability: str, input: Any = None) -> Any:
    done = platform.wait(platform.submit(capability, input, agent_id=AGENT), timeout=GUARD)
    assert done["status"] == "completed", done
    return done["output"]


def test_persistent_connections(worker: Any, platform: LocalPlatform) -> None:
    """CONN_MAX_AGE keeps a thread's connection over tasks; the health check replaces one that the server has ended."""
    worker("--max-workers", "1", CONN_MAX_AGE=None, CONN_HEALTH_CHECKS=True)
    first = ask(platform, "backend")
    assert ask(platform, "backend") == first
    # Ended by itself, so that the connection is dead when the next task begins.
    done = platform.wait(platform.submit("kill", first, agent_id=AGENT), timeout=GUARD)
    assert done["status"] == "failed"
    second = ask(platform, "backend")
    assert second != first
    assert ask(platform, "backend") == second


def test_without_persistence(worker: Any, platform: LocalPlatform) -> None:
    """By default each task has a connection of its own, and none is left behind."""
    worker("--max-workers", "4")
    tasks = [platform.submit("backend", None, agent_id=AGENT) for _ in range(12)]
    found = [platform.wait(task, timeout=GUARD)["output"] for task in tasks]
    assert len(set(found)) == 12
    # The one that asks.
    assert ask(platform, "backends") == 1


def test_a_pool(worker: Any, platform: LocalPlatform) -> None:
    """More threads than the pool has connections: each task waits for one, gives it back, and all are done."""
    import django

    if django.VERSION < (5, 1):
        pytest.skip("Django has pools since 5.1")
    worker("--max-workers", "8", OPTIONS={"pool": {"min_size": 1, "max_size": 2}})
    tasks = [platform.submit("backend", None, agent_id=AGENT) for _ in range(40)]
    found = [platform.wait(task, timeout=GUARD)["output"] for task in tasks]
    assert len(set(found)) <= 2
    assert ask(platform, "backends") <= 2


def run_together(platform: LocalPlatform, names: List[str]) -> List[Any]:
    """What the handlers return whose tasks are there at once."""
    tasks = [platform.submit(name, None, agent_id=AGENT) for name in names]
    return [platform.wait(task, timeout=GUARD)["output"] for task in tasks]


@pytest.mark.parametrize("age", [0, None])
def test_async_handlers(worker: Any, platform: LocalPlatform, age: Optional[int]) -> None:
    """Each task of an async handler has a connection of its own, whatever CONN_MAX_AGE says; none is left behind."""
    worker("--max-workers", "8", CONN_MAX_AGE=age)
    found = run_together(platform, 20 * ASYNC)
    assert None not in found
    assert len(set(found)) == 60
    # A server ends the process of a connection a moment after that is closed. The one that asks is left.
    until(lambda: ask(platform, "backends") == 1)


def test_async_handlers_whose_connection_breaks(worker: Any, platform: LocalPlatform) -> None:
    """It costs that task, and no other one."""
    worker("--max-workers", "4", CONN_MAX_AGE=None)
    tasks = [platform.submit(name, None, agent_id=AGENT) for name in 10 * ["async_backend", "async_kill"]]
    done = [platform.wait(task, timeout=GUARD)["status"] for task in tasks]
    assert done == 10 * ["completed", "failed"]
    until(lambda: ask(platform, "backends") == 1)


def test_async_handlers_on_a_pool(worker: Any, platform: LocalPlatform) -> None:
    """They wait for the pool's connections, and give each back, with nothing open in it."""
    import django

    if django.VERSION < (5, 1):
        pytest.skip("Django has pools since 5.1")
    worker("--max-workers", "8", OPTIONS={"pool": {"min_size": 1, "max_size": 2}})
    found = run_together(platform, 20 * ASYNC)
    assert None not in found
    assert len(set(found)) <= 2
    assert ask(platform, "backends") <= 2
