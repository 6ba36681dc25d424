"""The examples that stand in docstrings as a block run, and print what their comments say."""

from __future__ import annotations

import contextlib
import inspect
import io
import re
import textwrap
from typing import Any, Dict, Iterator

import pytest

import sekuire
from sekuire import errors, secret, testing
from sekuire.local import LocalPlatform

OBJECTS = [
    sekuire,
    sekuire.SekuireSDK,
    sekuire.Beacon,
    sekuire.WorkerConfig,
    sekuire.RuntimeCredentials,
    secret.Secret,
    *(getattr(errors, name) for name in errors.__all__),
    testing.run_task,
    testing.TaskResult,
    testing.Workbench,
]
#: Errors that a user only reads about.
WITHOUT = {
    "APIError",
    "PolicyIntegrityError",
    "PolicyUnavailableError",
    "RevokedError",
    "StreamError",
    "TransportError",
}


def example_of(documented: Any) -> str:
    """Return the first literal block of a docstring."""
    text = inspect.cleandoc(documented.__doc__ or "")
    found = re.search(r"::\n\n((?:    .*\n|\n)+)", text + "\n")
    return textwrap.dedent(found.group(1)).strip() if found else ""


@pytest.fixture
def names() -> Iterator[Dict[str, Any]]:
    """What the examples find: the public names, a registry, a worker of a local platform, and a token for it."""
    tasks = sekuire.TaskRegistry()
    tasks.task("shorten", lambda ctx, input: input)
    policy = sekuire.Policy.from_content({"permissions": {"tools": {"blocked_tools": ["shell"]}}})
    with testing.Workbench() as bench:
        worker = bench.worker()
        worker.include(tasks)
        client = sekuire.SekuireClient(
            api_base_url=bench.platform.url, api_key=bench.platform.api_key, agent_id="support-agent"
        )
        yield {
            **{name: getattr(sekuire, name) for name in sekuire.__all__},
            **{name: getattr(errors, name) for name in errors.__all__},
            **{name: getattr(testing, name) for name in testing.__all__},
            "Secret": secret.Secret,
            "tasks": tasks,
            "worker": worker,
            "client": client,
            "enforcer": sekuire.PolicyEnforcer(policy),
            "platform": bench.platform,
        }
        client.close()


@pytest.mark.parametrize(
    "documented", [one for one in OBJECTS if one.__name__ not in WITHOUT], ids=lambda one: one.__name__
)
def test_examples_run(documented: Any, names: Dict[str, Any]) -> None:
    """Each example of three to ten lines runs against a local platform, and prints what its comments say."""
    example = example_of(documented)
    assert 1 <= len(example.splitlines()) <= 10
    platform: LocalPlatform = names["platform"]
    token = f'"{platform.create_install_token("support-agent")}"'
    runnable = example.replace('"skt_install_..."', f'{token}, api_base_url="{platform.url}"').replace("block=True", "")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(runnable, f"<docstring of {documented.__name__}>", "exec"), names)
    for name in ("worker", "sdk", "beacon"):
        stop = getattr(names.get(name), "stop", None) or getattr(names.get(name), "shutdown", None)
        if stop is not None:
            stop()
    said = re.findall(r"^ *print\(.*\)  # (.+)$", example, flags=re.MULTILINE)
    lines = printed.getvalue().splitlines()
    assert lines == said[: len(lines)], example


def test_what_has_no_example_is_known() -> None:
    """Nothing that is exempt has an example after all."""
    assert {one.__name__ for one in OBJECTS if not example_of(one)} == WITHOUT
