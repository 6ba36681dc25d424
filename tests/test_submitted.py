"""sekuire.testing.submitted(): what the code under test submits is recorded, and run at once if a test wants that."""

from __future__ import annotations

import contextlib
import pathlib
import subprocess
import sys
import threading
from typing import Any, Iterator

import pytest

from sekuire import SekuireClient, SekuireSDK, TaskError, create_worker
from sekuire.errors import APIError, ConfigurationError, SekuireError, TaskFailed, TransportError
from sekuire.local import LocalPlatform
from sekuire.testing import submitted

from .support.builders import tasks_of
from .support.waiting import GUARD, until


@pytest.fixture
def client() -> Iterator[SekuireClient]:
    """Of a platform that is not there."""
    with SekuireClient(
        api_base_url="http://127.0.0.1:9", api_key="sk_live_x", agent_id="writer", retry_for=0
    ) as client:
        yield client


class TestRecording:
    def test_every_field(self, client: SekuireClient) -> None:
        """As it was given, and None where it was not."""
        with submitted() as tasks:
            assert tasks == []
            handle = client.submit(
                "sum", {"x": (1, None)}, agent_id="counter", idempotency_key="k-1", delay=1.5, expires_in=60.0,
                timeout=5.0, max_attempts=3, trace_id="t-1", workspace_id="ws",
            )  # fmt: skip
            client.submit("plain")
        first, second = tasks
        assert (first.task_id, first.capability, first.input) == (handle.id, "sum", {"x": [1, None]})
        assert (first.agent_id, first.idempotency_key) == ("counter", "k-1")
        assert (first.delay, first.expires_in, first.timeout, first.max_attempts) == (1.5, 60.0, 5.0, 3)
        assert (first.trace_id, first.workspace_id, first.status) == ("t-1", "ws", "queued")
        assert (second.agent_id, second.input, second.delay, second.result) == ("writer", None, None, None)
        assert second.idempotency_key
        assert first.task_id != second.task_id

    def test_every_kind_of_submission(self, client: SekuireClient) -> None:
        """Of any client, in any thread."""
        sdk = SekuireSDK("caller", install_token="skt-1", api_base_url="http://127.0.0.1:9", auto_heartbeat=False)
        with submitted() as tasks:
            handles = list(client.submit_many({"capability": "many", "input": number} for number in range(50)))
            thread = threading.Thread(target=client.submit, args=("thread",))
            thread.start()
            thread.join(GUARD)
            sdk.client().submit("agent", agent_id="other")
            client.send(client.prepare("prepared"))
        assert [task.capability for task in tasks].count("many") == 50
        assert sorted(task.input for task in tasks[:50]) == list(range(50))
        assert {handle.id for handle in handles} == {task.task_id for task in tasks[:50]}
        assert [task.capability for task in tasks[50:]] == ["thread", "agent", "prepared"]
        assert [task.agent_id for task in tasks[50:]] == ["writer", "other", "writer"]
        sdk.shutdown()

    def test_one_key_is_one_task(self, client: SekuireClient) -> None:
        """Another task under it is refused, as the platform does."""
        with submitted() as tasks:
            ids = {client.submit("sum", [1], idempotency_key="k").id for _ in range(2)}
            with pytest.raises(APIError, match="HTTP 422 IDEMPOTENCY_KEY_REUSED"):
                client.submit("sum", [2], idempotency_key="k")
        assert ids == {task.task_id for task in tasks}
        assert len(tasks) == 1

    def test_a_wrong_task_is_not_recorded(self, client: SekuireClient) -> None:
        """It is the same error as without."""
        with submitted() as tasks:
            with pytest.raises(ConfigurationError, match=r"^timeout: "):
                client.submit("sum", timeout=0)
        assert tasks == []

    def test_handles(self, client: SekuireClient) -> None:
        """One that waits gets an error at once, and not a wait without end."""
        with submitted() as tasks:
            handle = client.submit("sum", [1])
            assert (handle.status(), handle.progress(), handle.wait(0)) == ("queued", None, False)
            for wait in (lambda: handle.wait(GUARD), handle.result, lambda: client.call("sum")):
                with pytest.raises(SekuireError, match=r"\(sum\) was only recorded, by submitted\(\), .* give run="):
                    wait()
            assert client.task(handle.id)["input"] == [1]
            assert [task["task_id"] for task in client.tasks(status="queued", limit=1)] == [tasks[-1].task_id]
            handle.cancel("not needed")
            with pytest.raises(TaskFailed, match="cancelled: the task was cancelled: not needed"):
                handle.result()
            with pytest.raises(APIError, match="409"):
                handle.cancel()
            with pytest.raises(APIError, match="404"):
                client.task("unknown")
            assert client.retry(handle.id).status() == "queued"

    def test_several_that_wait(self, client: SekuireClient) -> None:
        """They share a poll; each gets the error."""
        found = []

        def wait(handle: Any) -> None:
            try:
                handle.result(GUARD)
            except SekuireError as error:
                found.append(str(error))

        with submitted():
            handles = [client.submit("sum", number) for number in range(3)]
            threads = [threading.Thread(target=wait, args=(handle,)) for handle in handles]
            for thread in threads:
                thread.start()
            until(lambda: len(found) == 3)
            for thread in threads:
                thread.join(GUARD)
        assert all("only recorded" in text for text in found)

    def test_the_end(self, client: SekuireClient, make_platform: Any) -> None:
        """After it, and for other calls within it, there is the platform again. An inner block records alone."""
        platform: LocalPlatform = make_platform()
        real = SekuireClient(api_base_url=platform.url, api_key=platform.api_key, agent_id="writer")
        with submitted() as outer:
            assert list(real.installations()) == []
            with submitted() as inner:
                real.submit("inner")
            real.submit("outer")
        assert [task.capability for task in inner] == ["inner"]
        assert [task.capability for task in outer] == ["outer"]
        real.submit("real")
        assert [task["capability"] for task in real.tasks()] == ["real"]
        real.close()


class TestRunning:
    def test_results(self, client: SekuireClient) -> None:
        """Handles have them, and the entry has all that run_task shows."""
        error = ValueError("on purpose")

        def fail(ctx: Any, input: Any) -> Any:
            raise error

        def add(ctx: Any, input: Any) -> Any:
            ctx.report_progress(0.5, "half")
            return [ctx.task_id, ctx.trace_id, sum(input)]

        with submitted(run=tasks_of(add=add, fail=fail)) as tasks:
            handle = client.submit("add", (1, 2), trace_id="t-1")
            assert handle.wait(0)
            assert handle.result() == [handle.id, "t-1", 3]
            assert handle.progress() == (0.5, "half")
            assert client.call("add", [4])[-1] == 4
            with pytest.raises(TaskFailed, match="handler_error: ValueError: on purpose"):
                client.call("fail")
        assert [task.status for task in tasks] == ["completed", "completed", "failed"]
        assert tasks[2].result.exception is error

    def test_a_handler_that_submits(self, client: SekuireClient) -> None:
        """Its task is recorded and run too."""
        tasks_ = tasks_of(outer=lambda ctx, input: client.call("inner", input) + 1, inner=lambda ctx, input: input * 2)
        with submitted(run=tasks_) as tasks:
            assert client.call("outer", 3) == 7
        assert [task.capability for task in tasks] == ["outer", "inner"]

    def test_attempts(self, client: SekuireClient) -> None:
        """A retryable failure is tried again, so often as was asked for. A retry is one more."""
        seen = []

        def shaky(ctx: Any, input: Any) -> Any:
            seen.append(ctx.attempt)
            if ctx.attempt < input:
                raise TaskError("busy", "not yet", retryable=True)
            return ctx.attempt

        with submitted(run={"shaky": shaky}) as tasks:
            assert client.call("shaky", 3, max_attempts=5) == 3
            with pytest.raises(TaskFailed, match="busy"):
                client.call("shaky", 3, max_attempts=2)
            assert client.retry(tasks[1].task_id).result() == 3
        assert seen == [1, 2, 3, 1, 2, 3]

    def test_a_timeout(self, client: SekuireClient) -> None:
        """The task's own."""

        def slow(ctx: Any, input: Any) -> Any:
            assert ctx.wait_cancelled(GUARD)

        with submitted(run={"slow": slow}):
            with pytest.raises(TaskFailed, match="timeout"):
                client.call("slow", timeout=0.05)

    def test_a_worker_with_middleware(self, client: SekuireClient) -> None:
        """It is not started, and may be used for the next test."""
        worker = create_worker(agent_id="a", install_token="skt-1")
        worker.on_task("add", lambda ctx, input: sum(input))
        worker.middleware(lambda ctx, input, call_next: call_next(input) * 10)
        for _ in range(2):
            with submitted(run=worker):
                assert client.call("add", [1, 2]) == 30

    def test_a_task_that_cancels_itself(self, client: SekuireClient) -> None:
        """What its handler makes of that is the result."""

        def give_up(ctx: Any, input: Any) -> Any:
            client.cancel(ctx.task_id, "enough")
            return "went on"

        with submitted(run={"give_up": give_up}) as tasks:
            assert client.call("give_up") == "went on"
        assert tasks[0].status == "completed"

    def test_a_capability_of_another_agent(self, client: SekuireClient) -> None:
        """It is only recorded."""
        with submitted(run=tasks_of(add=lambda ctx, input: sum(input))) as tasks:
            handle = client.submit("translate", "hello")
            assert handle.status() == "queued"
            with pytest.raises(SekuireError, match=r"\(translate\) was only recorded"):
                handle.result()
        assert tasks[0].result is None

    @pytest.mark.parametrize("run", ["shop:tasks", 7, [tasks_of()]])
    def test_a_wrong_run(self, run: Any) -> None:
        with pytest.raises(ConfigurationError, match=r"^run: must be a TaskRegistry, or a mapping"), submitted(run):
            pass


def test_blocks_that_end_in_any_order(client: SekuireClient) -> None:
    """As those of fixtures and threads may. Nothing is recorded after the last of them."""
    first, second = submitted(), submitted()
    with contextlib.ExitStack() as both:
        first.__enter__()
        tasks = both.enter_context(second)
        first.__exit__(None, None, None)
        client.submit("x")
        assert [task.capability for task in tasks] == ["x"]
    with pytest.raises(TransportError, match="nothing was submitted"):
        client.submit("y")
    assert len(tasks) == 1


def test_the_fixture(tmp_path: pathlib.Path) -> None:
    """With and without handlers to run."""
    (tmp_path / "test_shop.py").write_text(
        "import pytest\n"
        "from sekuire import SekuireClient\n"
        "client = SekuireClient(api_key='sk_live_x', agent_id='writer')\n"
        "def test_recorded(sekuire_submitted):\n"
        "    client.submit('add', [1, 2])\n"
        "    assert [task.capability for task in sekuire_submitted] == ['add']\n"
        "class TestRun:\n"
        "    @pytest.fixture\n"
        "    def sekuire_run(self):\n"
        "        return {'add': lambda ctx, input: sum(input)}\n"
        "    def test_run(self, sekuire_submitted):\n"
        "        assert client.call('add', [1, 2]) == 3\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", str(tmp_path)],
        capture_output=True, text=True, timeout=GUARD, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert "2 passed" in done.stdout, done.stdout + done.stderr
