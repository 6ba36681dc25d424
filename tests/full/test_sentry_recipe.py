"""docs/logging.md's recipe for Sentry: the events of a failed handler have the task's ids as tags."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ..docs.markdown import blocks
from ..support.waiting import GUARD

pytestmark = pytest.mark.full

#: Runs the recipe with a transport that keeps the events, and prints what is in them.
PROGRAM = """
import functools, json, logging
import sentry_sdk
from sentry_sdk.transport import Transport
from sekuire import create_worker
from sekuire.errors import TaskError
from sekuire.local import LocalPlatform

events = []

class Keep(Transport):
    def capture_envelope(self, envelope):
        event = envelope.get_event()
        if event is not None:
            events.append(event)

sentry_sdk.init = functools.partial(sentry_sdk.init, transport=Keep())
import sentry
sentry.set_up()

with LocalPlatform() as platform:
    worker = create_worker(
        api_base_url=platform.url, agent_id="my-agent", install_token=platform.create_install_token("my-agent")
    )

    @worker.on_task("broken")
    def broken(ctx, input):
        logging.getLogger("shop").error("of another package")
        raise LookupError("in the handler")

    @worker.on_task("async")
    async def coroutine(ctx, input):
        sentry_sdk.capture_message("of the coroutine")

    @worker.on_task("said")
    def said(ctx, input):
        raise TaskError("no_text", "the input needs a text")

    with worker:
        ids = [platform.submit(name, {}, agent_id="my-agent") for name in ("broken", "async", "said")]
        for task_id in ids:
            platform.wait(task_id, 60)
    installation = platform.installations()[0]["installation_id"]

logging.getLogger("shop").error("outside of a task")
sentry_sdk.flush(10)
found = []
for event in events:
    what = event.get("exception", {}).get("values", [{}])[-1].get("value")
    log = event.get("logentry") or {}
    found.append([what or log.get("formatted") or log.get("message") or event.get("message"), event.get("tags")])
print(json.dumps({"events": found, "ids": ids, "worker": worker.worker_id, "installation": installation}))
"""


def test_the_recipe(tmp_path: Path) -> None:
    pytest.importorskip("sentry_sdk")
    (recipe,) = [block for block in blocks("docs/logging.md") if block.marks.get("file") == "sentry.py"]
    (tmp_path / "sentry.py").write_text(recipe.text)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "SENTRY_DSN": "https://public@sentry.test/1"},
        capture_output=True,
        timeout=GUARD,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    found = json.loads(done.stdout.splitlines()[-1])
    events = dict(found["events"])
    known = {"worker_id": found["worker"], "installation_id": found["installation"]}
    broken, coroutine, said = found["ids"]
    for text in ("of another package", "in the handler"):
        tags = {"task_id": broken, "capability": "broken", **known}
        assert {name: events[text].get(name) for name in tags} == tags
    assert events["of the coroutine"]["task_id"] == coroutine
    assert not events["outside of a task"]
    assert not any((tags or {}).get("task_id") == said for tags in events.values())
